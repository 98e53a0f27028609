/* SPDX-License-Identifier: BSD-3-Clause */
/* qp.c - queue pairs: create, modify, query, post, destroy. */
#include "verbs/forward.h"
#include "verbs/mgv.h"

#include <stdlib.h>

#define KNOWN_MASK                                                                               \
	(IBV_QP_INIT_ATTR_PD | IBV_QP_INIT_ATTR_CREATE_FLAGS | IBV_QP_INIT_ATTR_SEND_OPS_FLAGS | \
	 IBV_QP_INIT_ATTR_MAX_TSO_HEADER | IBV_QP_INIT_ATTR_XRCD)

static unsigned send_ops(enum ibv_qp_type type)
{
	const unsigned ud = IBV_QP_EX_WITH_SEND | IBV_QP_EX_WITH_SEND_WITH_IMM;

	switch (type) {
	case IBV_QPT_UD: return ud;
	case IBV_QPT_UC: return ud | IBV_QP_EX_WITH_RDMA_WRITE | IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM;
	default: return MGV_SEND_OPS;
	}
}

static uint32_t create_flags(enum ibv_qp_type type)
{
	return type == IBV_QPT_UD ? IBV_QP_CREATE_BLOCK_SELF_MCAST_LB : 0;
}

static int check_init(const struct ibv_context *c, const struct ibv_qp_init_attr_ex *a)
{
	if (a->comp_mask & ~(uint32_t)KNOWN_MASK)
		return EOPNOTSUPP;
	if ((a->comp_mask & IBV_QP_INIT_ATTR_CREATE_FLAGS) && (a->create_flags & ~create_flags(a->qp_type)))
		return EOPNOTSUPP;
	if ((a->comp_mask & IBV_QP_INIT_ATTR_MAX_TSO_HEADER) && a->max_tso_header)
		return EOPNOTSUPP;
	if ((a->comp_mask & IBV_QP_INIT_ATTR_SEND_OPS_FLAGS) &&
	    (a->send_ops_flags & ~(uint64_t)send_ops(a->qp_type)))
		return EOPNOTSUPP;
	return 0;
}

/* What it is to be made of, of this context; what its type needs is the engine's business. */
static int find_parts(struct ibv_context *c, const struct ibv_qp_init_attr_ex *a, struct mg_qp_parts *p)
{
	bool tgt = a->qp_type == IBV_QPT_XRC_RECV, ini = a->qp_type == IBV_QPT_XRC_SEND;

	*p = (struct mg_qp_parts){0};
	if (tgt) { /* its other members are not looked at */
		if (!(a->comp_mask & IBV_QP_INIT_ATTR_XRCD) || !a->xrcd || a->xrcd->context != c)
			return EINVAL;
		p->xrcd = mgv_xrcd(a->xrcd)->domain->mg;
		return 0;
	}
	if (!(a->comp_mask & IBV_QP_INIT_ATTR_PD) || !a->pd || a->pd->context != c)
		return EINVAL;
	p->pd = mgv_pd(a->pd)->mg;
	if ((a->send_cq && a->send_cq->context != c) || (!ini && a->recv_cq && a->recv_cq->context != c) ||
	    (!ini && a->srq && a->srq->context != c))
		return EINVAL;
	if (a->send_cq)
		p->send_cq = mgv_cq(a->send_cq)->mg;
	if (!ini && a->recv_cq)
		p->recv_cq = mgv_cq(a->recv_cq)->mg;
	if (!ini && a->srq)
		p->srq = mgv_srq(a->srq)->mg;
	return 0;
}

void mgv_qp_init(struct mgv_qp *qp, struct ibv_context *c, struct mg_qp *mg)
{
	struct ibv_qp *ib = &qp->ex.qp_base;

	qp->mg = mg;
	qp->dev = mgv_ctx(c)->dev;
	ib->context = c;
	ib->qp_num = mg_qp_num(mg);
	ib->handle = mgv_handle(mgv_ctx(c));
	pthread_mutex_init(&ib->mutex, NULL);
	pthread_cond_init(&ib->cond, NULL);
	mgv_list_init(&qp->sharers);
	mgv_qp_ex_init(qp);
}

struct ibv_qp *mgv_create_qp_ex(struct ibv_context *c, struct ibv_qp_init_attr_ex *attr)
{
	struct mgv_context *ctx = mgv_ctx(c);
	struct ibv_qp_init_attr_ex a;
	struct mg_qp_parts parts;
	struct mgv_qp *qp = NULL;
	struct ibv_qp *ib;
	int err;

	err = check_init(c, attr);
	if (!err)
		err = find_parts(c, attr, &parts);
	if (err)
		goto err;
	qp = calloc(1, sizeof(*qp));
	if (!qp) {
		err = ENOMEM;
		goto err;
	}
	a = *attr;
	mg_device_lock(ctx->dev);
	err = mg_qp_create(ctx->dev->engine, &parts, &a, qp, &qp->mg);
	ib = &qp->ex.qp_base;
	if (!err) {
		mgv_qp_init(qp, c, qp->mg);
		ib->qp_context = a.qp_context;
		ib->pd = parts.pd ? a.pd : NULL;
		ib->send_cq = parts.send_cq ? a.send_cq : NULL;
		ib->recv_cq = parts.recv_cq ? a.recv_cq : NULL;
		ib->srq = parts.srq ? a.srq : NULL;
		if (parts.xrcd) {
			qp->xrcd = mgv_xrcd(a.xrcd);
			qp->xrcd->users++;
		}
		ib->state = IBV_QPS_RESET;
		ib->qp_type = a.qp_type;
		mgv_list_add(&ctx->qps, &qp->link);
		if (a.qp_type == IBV_QPT_UD)
			mg_net_want_header(ctx->dev);
	}
	mg_device_unlock(ctx->dev);
	if (err)
		goto err;
	qp->cap = a.cap;
	qp->has_ex = a.comp_mask & IBV_QP_INIT_ATTR_SEND_OPS_FLAGS;
	attr->cap = a.cap; /* what was granted */
	return ib;
err:
	free(qp);
	errno = err;
	return NULL;
}

MGV_EXPORT struct ibv_qp *ibv_create_qp(struct ibv_pd *pd, struct ibv_qp_init_attr *attr)
{
	struct ibv_qp_init_attr_ex ex;
	struct ibv_qp *qp;

	if (!mgv_is_ours(pd->context))
		return MGV_FORWARD_PTR(ibv_create_qp, pd, attr);
	memset(&ex, 0, sizeof(ex));
	memcpy(&ex, attr, sizeof(*attr)); /* the extended one starts like it */
	ex.comp_mask = IBV_QP_INIT_ATTR_PD;
	ex.pd = pd;
	qp = mgv_create_qp_ex(pd->context, &ex);
	if (qp)
		attr->cap = ex.cap;
	return qp;
}

MGV_EXPORT struct ibv_qp_ex *ibv_qp_to_qp_ex(struct ibv_qp *qp)
{
	if (!mgv_is_ours(qp->context))
		return MGV_FORWARD_PTR(ibv_qp_to_qp_ex, qp);
	return mgv_qp(qp)->has_ex ? &mgv_qp(qp)->ex : NULL;
}

MGV_EXPORT int ibv_modify_qp(struct ibv_qp *ibqp, struct ibv_qp_attr *attr, int mask)
{
	struct mgv_qp *qp;
	int err;

	if (!mgv_is_ours(ibqp->context))
		return MGV_FORWARD_INT(ibv_modify_qp, ibqp, attr, mask);
	if (mask & ~((IBV_QP_DEST_QPN << 1) - 1)) /* as libibverbs' ibv_cmd_modify_qp() */
		return EOPNOTSUPP;
	qp = mgv_qp(ibqp);
	mg_device_lock(qp->dev);
	/*
	 * What it owes its peer goes out before it ends: an ACK held back for a message that the program has
	 * seen already. Else the peer would repeat that until its retries are used up.
	 */
	if (mask & IBV_QP_STATE && (attr->qp_state == IBV_QPS_ERR || attr->qp_state == IBV_QPS_RESET))
		mg_net_flush(qp->dev, 0);
	err = mg_qp_modify(qp->mg, mg_now(), attr, mask);
	if (!err) {
		if (mask & IBV_QP_STATE)
			ibqp->state = attr->qp_state;
		mg_net_flush(qp->dev, 0);
	}
	mg_device_unlock(qp->dev);
	return err;
}

MGV_EXPORT int ibv_query_qp(struct ibv_qp *ibqp, struct ibv_qp_attr *attr, int mask,
			    struct ibv_qp_init_attr *init)
{
	struct ibv_qp_init_attr dummy;
	struct mgv_qp *qp;
	int err;

	if (!mgv_is_ours(ibqp->context))
		return MGV_FORWARD_INT(ibv_query_qp, ibqp, attr, mask, init);
	qp = mgv_qp(ibqp);
	if (!init)
		init = &dummy;
	mg_device_lock(qp->dev);
	err = mg_qp_query(qp->mg, attr, mask, init);
	mg_device_unlock(qp->dev);
	if (err)
		return err;
	init->qp_context = ibqp->qp_context;
	init->send_cq = ibqp->send_cq;
	init->recv_cq = ibqp->recv_cq;
	init->srq = ibqp->srq;
	init->cap = qp->cap;
	if (mask & IBV_QP_STATE)
		ibqp->state = attr->qp_state;
	return 0;
}

void mgv_qp_free(struct mgv_qp *qp)
{
	mgv_qp_ex_free(qp);
	pthread_mutex_destroy(&qp->ex.qp_base.mutex);
	pthread_cond_destroy(&qp->ex.qp_base.cond);
	free(qp);
}

int mgv_qp_release(struct mgv_qp *qp)
{
	int err = 0;

	if (mgv_list_empty(&qp->sharers)) {
		err = mg_qp_destroy(qp->mg);
	} else if (mg_qp_owner(qp->mg) == qp) { /* an XRC target lives as long as one handle does */
		mg_qp_set_owner(qp->mg, mgv_container(qp->sharers.next, struct mgv_qp, sharers));
	}
	if (err)
		return err;
	mgv_list_del(&qp->sharers);
	mgv_list_del(&qp->link);
	if (qp->xrcd)
		qp->xrcd->users--;
	return 0;
}

MGV_EXPORT int ibv_destroy_qp(struct ibv_qp *ibqp)
{
	struct mgv_qp *qp;
	uint32_t delivered = 0;
	int err;

	if (!mgv_is_ours(ibqp->context))
		return MGV_FORWARD_INT(ibv_destroy_qp, ibqp);
	qp = mgv_qp(ibqp);
	mg_device_lock(qp->dev);
	/* What it owes its peer (an ACK held back) goes out first. */
	mg_net_flush(qp->dev, 0);
	err = mgv_qp_release(qp);
	if (!err) {
		mgv_async_withdraw(mgv_ctx(ibqp->context), ibqp);
		delivered = qp->async_delivered;
	}
	mg_device_unlock(qp->dev);
	if (err)
		return err;
	mgv_wait_acks(&ibqp->mutex, &ibqp->cond, &ibqp->events_completed, delivered);
	mgv_qp_free(qp);
	return 0;
}

/* The engine takes the handles for its own. */
static bool foreign_ah(const struct ibv_send_wr *wr)
{
	for (; wr; wr = wr->next)
		if (wr->wr.ud.ah && !mgv_is_ours(wr->wr.ud.ah->context))
			return true;
	return false;
}

int mgv_post_send(struct ibv_qp *ibqp, struct ibv_send_wr *wr, struct ibv_send_wr **bad)
{
	struct mgv_qp *qp = mgv_qp(ibqp);
	int err;

	if (ibqp->qp_type == IBV_QPT_UD && foreign_ah(wr)) {
		*bad = wr;
		return EINVAL;
	}
	mg_device_lock(qp->dev);
	err = mg_post_send(qp->mg, mg_now(), wr, bad);
	mg_net_flush(qp->dev, MG_TX_LAZY); /* also on error: what stood before the bad one was posted */
	mg_device_unlock(qp->dev);
	return err;
}

int mgv_post_recv(struct ibv_qp *ibqp, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad)
{
	struct mgv_qp *qp = mgv_qp(ibqp);
	int err;

	mg_device_lock(qp->dev);
	err = mg_post_recv(qp->mg, wr, bad);
	mg_device_unlock(qp->dev);
	return err;
}
