/* SPDX-License-Identifier: BSD-3-Clause */
/* qp.c - queue pairs: create, modify, query, post, destroy. */
#include "verbs/forward.h"
#include "verbs/mgv.h"

#include <stdlib.h>

#define KNOWN_MASK                                                                               \
	(IBV_QP_INIT_ATTR_PD | IBV_QP_INIT_ATTR_CREATE_FLAGS | IBV_QP_INIT_ATTR_SEND_OPS_FLAGS | \
	 IBV_QP_INIT_ATTR_MAX_TSO_HEADER)

static int check_init(const struct ibv_context *c, const struct ibv_qp_init_attr_ex *a)
{
	if (a->comp_mask & ~(uint32_t)KNOWN_MASK)
		return EOPNOTSUPP;
	if ((a->comp_mask & IBV_QP_INIT_ATTR_CREATE_FLAGS) && a->create_flags)
		return EOPNOTSUPP;
	if ((a->comp_mask & IBV_QP_INIT_ATTR_MAX_TSO_HEADER) && a->max_tso_header)
		return EOPNOTSUPP;
	if ((a->comp_mask & IBV_QP_INIT_ATTR_SEND_OPS_FLAGS) && (a->send_ops_flags & ~(uint64_t)MGV_SEND_OPS))
		return EOPNOTSUPP;
	if (!(a->comp_mask & IBV_QP_INIT_ATTR_PD) || !a->pd || a->pd->context != c)
		return EINVAL;
	if (a->srq)
		return EOPNOTSUPP;
	if (!a->send_cq || !a->recv_cq || a->send_cq->context != c || a->recv_cq->context != c)
		return EINVAL;
	return 0;
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
	if (err)
		goto err;
	qp = calloc(1, sizeof(*qp));
	if (!qp) {
		err = ENOMEM;
		goto err;
	}
	a = *attr;
	qp->dev = ctx->dev;
	mg_device_lock(ctx->dev);
	parts = (struct mg_qp_parts){
		.pd = mgv_pd(a.pd)->mg, .send_cq = mgv_cq(a.send_cq)->mg, .recv_cq = mgv_cq(a.recv_cq)->mg};
	err = mg_qp_create(ctx->dev->engine, &parts, &a, qp, &qp->mg);
	ib = &qp->ex.qp_base;
	if (!err) {
		ib->context = c;
		ib->qp_context = a.qp_context;
		ib->pd = a.pd;
		ib->send_cq = a.send_cq;
		ib->recv_cq = a.recv_cq;
		ib->qp_num = mg_qp_num(qp->mg);
		ib->handle = mgv_handle(ctx);
		ib->state = IBV_QPS_RESET;
		ib->qp_type = a.qp_type;
		mgv_list_add(&ctx->qps, &qp->link);
	}
	mg_device_unlock(ctx->dev);
	if (err)
		goto err;
	pthread_mutex_init(&ib->mutex, NULL);
	pthread_cond_init(&ib->cond, NULL);
	qp->cap = a.cap;
	qp->has_ex = a.comp_mask & IBV_QP_INIT_ATTR_SEND_OPS_FLAGS;
	mgv_qp_ex_init(qp);
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

/*
 * A path's source is an entry of the GID table, and the one that packets leave from: with another
 * one a peer would wait for an address that never sends (the engine checks the rest).
 */
static int check_path(struct mg_device *dev, const struct ibv_ah_attr *a)
{
	struct mg_port port;

	mgv_port(dev, &port);
	if (a->grh.sgid_index >= port.n_gid)
		return EINVAL;
	return memcmp(&port.gid[a->grh.sgid_index], &port.gid[MGV_GID_IN_USE], 16) ? EINVAL : 0;
}

MGV_EXPORT int ibv_modify_qp(struct ibv_qp *ibqp, struct ibv_qp_attr *attr, int mask)
{
	struct mgv_qp *qp;
	int err;

	if (!mgv_is_ours(ibqp->context))
		return MGV_FORWARD_INT(ibv_modify_qp, ibqp, attr, mask);
	qp = mgv_qp(ibqp);
	if ((mask & IBV_QP_AV) && check_path(qp->dev, &attr->ah_attr))
		return EINVAL;
	mg_device_lock(qp->dev);
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
	err = mg_qp_destroy(qp->mg);
	if (!err) {
		mgv_async_withdraw(mgv_ctx(ibqp->context), ibqp);
		mgv_list_del(&qp->link);
		delivered = qp->async_delivered;
	}
	mg_device_unlock(qp->dev);
	if (err)
		return err;
	mgv_wait_acks(&ibqp->mutex, &ibqp->cond, &ibqp->events_completed, delivered);
	mgv_qp_free(qp);
	return 0;
}

int mgv_post_send(struct ibv_qp *ibqp, struct ibv_send_wr *wr, struct ibv_send_wr **bad)
{
	struct mgv_qp *qp = mgv_qp(ibqp);
	int err;

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
