/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * unsupported.c - what every function pointer does until somebody implements it.
 *
 * libibverbs' contract: functions that return int give an errno value, those that return a
 * pointer give NULL and set errno. No pointer in a table of ours is ever NULL, so that a caller
 * who does not look gets an error and no crash.
 */
#include "verbs/mgv.h"

#define NO_PTR(type, name, ...)        \
	static type *name(__VA_ARGS__) \
	{                              \
		errno = EOPNOTSUPP;    \
		return NULL;           \
	}                              \
	_Static_assert(1, "")
#define NO_INT(name, ...)            \
	static int name(__VA_ARGS__) \
	{                            \
		return EOPNOTSUPP;   \
	}                            \
	_Static_assert(1, "")

/* ---- ibv_context_ops -------------------------------------------------------------------------- */

static void *no_compat(void)
{
	errno = ENOSYS;
	return NULL;
}

NO_PTR(struct ibv_mw, no_alloc_mw, struct ibv_pd *pd, enum ibv_mw_type type);
NO_INT(no_bind_mw, struct ibv_qp *qp, struct ibv_mw *mw, struct ibv_mw_bind *bind);
NO_INT(no_dealloc_mw, struct ibv_mw *mw);

/* ---- verbs_context -------------------------------------------------------------------------------- */

static int no_post_srq_ops(struct ibv_srq *srq, struct ibv_ops_wr *op, struct ibv_ops_wr **bad)
{
	if (bad)
		*bad = op;
	return EOPNOTSUPP;
}

NO_INT(no_advise_mr, struct ibv_pd *pd, enum ibv_advise_mr_advice advice, uint32_t flags,
       struct ibv_sge *list, uint32_t n);
NO_PTR(struct ibv_mr, no_alloc_null_mr, struct ibv_pd *pd);
NO_INT(no_read_counters, struct ibv_counters *c, uint64_t *values, uint32_t n, uint32_t flags);
NO_INT(no_attach_counters, struct ibv_counters *c, struct ibv_counter_attach_attr *attr,
       struct ibv_flow *flow);
NO_PTR(struct ibv_counters, no_create_counters, struct ibv_context *c, struct ibv_counters_init_attr *attr);
NO_INT(no_destroy_counters, struct ibv_counters *c);
NO_PTR(struct ibv_mr, no_reg_dm_mr, struct ibv_pd *pd, struct ibv_dm *dm, uint64_t offset, size_t len,
       unsigned access);
NO_PTR(struct ibv_dm, no_alloc_dm, struct ibv_context *c, struct ibv_alloc_dm_attr *attr);
NO_INT(no_free_dm, struct ibv_dm *dm);
NO_INT(no_modify_flow_action, struct ibv_flow_action *action, struct ibv_flow_action_esp_attr *attr);
NO_INT(no_destroy_flow_action, struct ibv_flow_action *action);
NO_PTR(struct ibv_flow_action, no_create_flow_action, struct ibv_context *c,
       struct ibv_flow_action_esp_attr *attr);
NO_INT(no_rate_limit, struct ibv_qp *qp, struct ibv_qp_rate_limit_attr *attr);
NO_INT(no_modify_cq, struct ibv_cq *cq, struct ibv_modify_cq_attr *attr);
NO_INT(no_destroy_rwq, struct ibv_rwq_ind_table *table);
NO_PTR(struct ibv_rwq_ind_table, no_create_rwq, struct ibv_context *c,
       struct ibv_rwq_ind_table_init_attr *attr);
NO_INT(no_destroy_wq, struct ibv_wq *wq);
NO_INT(no_modify_wq, struct ibv_wq *wq, struct ibv_wq_attr *attr);
NO_PTR(struct ibv_wq, no_create_wq, struct ibv_context *c, struct ibv_wq_init_attr *attr);
NO_INT(no_destroy_flow, struct ibv_flow *flow);
NO_PTR(struct ibv_flow, no_create_flow, struct ibv_qp *qp, struct ibv_flow_attr *attr);

static void context_ops(struct ibv_context_ops *ops)
{
	ops->_compat_alloc_pd = no_compat;
	ops->_compat_dealloc_pd = no_compat;
	ops->_compat_reg_mr = no_compat;
	ops->_compat_rereg_mr = no_compat;
	ops->_compat_dereg_mr = no_compat;
	ops->alloc_mw = no_alloc_mw;
	ops->bind_mw = no_bind_mw;
	ops->dealloc_mw = no_dealloc_mw;
	ops->_compat_create_cq = no_compat;
	ops->_compat_cq_event = no_compat;
	ops->_compat_resize_cq = no_compat;
	ops->_compat_destroy_cq = no_compat;
	ops->_compat_create_srq = no_compat;
	ops->_compat_modify_srq = no_compat;
	ops->_compat_query_srq = no_compat;
	ops->_compat_destroy_srq = no_compat;
	ops->_compat_create_qp = no_compat;
	ops->_compat_query_qp = no_compat;
	ops->_compat_modify_qp = no_compat;
	ops->_compat_destroy_qp = no_compat;
	ops->_compat_create_ah = no_compat;
	ops->_compat_destroy_ah = no_compat;
	ops->_compat_attach_mcast = no_compat;
	ops->_compat_detach_mcast = no_compat;
	ops->_compat_async_event = no_compat;
}

void mgv_ops_defaults(struct verbs_context *v)
{
	context_ops(&v->context.ops);
	v->advise_mr = no_advise_mr;
	v->alloc_null_mr = no_alloc_null_mr;
	v->read_counters = no_read_counters;
	v->attach_counters_point_flow = no_attach_counters;
	v->create_counters = no_create_counters;
	v->destroy_counters = no_destroy_counters;
	v->reg_dm_mr = no_reg_dm_mr;
	v->alloc_dm = no_alloc_dm;
	v->free_dm = no_free_dm;
	v->modify_flow_action_esp = no_modify_flow_action;
	v->destroy_flow_action = no_destroy_flow_action;
	v->create_flow_action_esp = no_create_flow_action;
	v->modify_qp_rate_limit = no_rate_limit;
	v->modify_cq = no_modify_cq;
	v->post_srq_ops = no_post_srq_ops;
	v->destroy_rwq_ind_table = no_destroy_rwq;
	v->create_rwq_ind_table = no_create_rwq;
	v->destroy_wq = no_destroy_wq;
	v->modify_wq = no_modify_wq;
	v->create_wq = no_create_wq;
	v->ibv_destroy_flow = no_destroy_flow;
	v->ibv_create_flow = no_create_flow;
	/* Programs built against libibverbs 1.1.8 look for the two flow calls here. */
	v->ABI_placeholder1 = (void (*)(void))no_create_flow;
	v->ABI_placeholder2 = (void (*)(void))no_destroy_flow;
}
