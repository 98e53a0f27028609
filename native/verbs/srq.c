/* SPDX-License-Identifier: BSD-3-Clause */
/* srq.c - shared receive queues, basic and XRC ones: create, modify, query, post, destroy. */
#include "verbs/forward.h"
#include "verbs/mgv.h"

#include <stdlib.h>

static struct ibv_srq *create(struct ibv_pd *pd, struct ibv_xrcd *xrcd, struct ibv_cq *cq, void *srq_context,
			      struct ibv_srq_attr *attr)
{
	struct mgv_context *ctx = mgv_ctx(pd->context);
	struct ibv_srq_attr granted = *attr;
	struct mgv_srq *srq = calloc(1, sizeof(*srq));
	int err;

	if (!srq) {
		errno = ENOMEM;
		return NULL;
	}
	srq->dev = ctx->dev;
	mg_device_lock(ctx->dev);
	err = mg_srq_create(mgv_pd(pd)->mg, xrcd ? mgv_xrcd(xrcd)->domain->mg : NULL,
			    cq ? mgv_cq(cq)->mg : NULL, &granted, srq, &srq->mg);
	if (!err) {
		srq->ib.handle = mgv_handle(ctx);
		mgv_list_add(&ctx->srqs, &srq->link);
		if (xrcd) {
			srq->xrcd = mgv_xrcd(xrcd);
			srq->xrcd->users++;
		}
	}
	mg_device_unlock(ctx->dev);
	if (err) {
		free(srq);
		errno = err;
		return NULL;
	}
	srq->ib.context = pd->context;
	srq->ib.srq_context = srq_context;
	srq->ib.pd = pd;
	pthread_mutex_init(&srq->ib.mutex, NULL);
	pthread_cond_init(&srq->ib.cond, NULL);
	attr->max_wr = granted.max_wr;
	attr->max_sge = granted.max_sge;
	return &srq->ib;
}

MGV_EXPORT struct ibv_srq *ibv_create_srq(struct ibv_pd *pd, struct ibv_srq_init_attr *init)
{
	if (!mgv_is_ours(pd->context))
		return MGV_FORWARD_PTR(ibv_create_srq, pd, init);
	return create(pd, NULL, NULL, init->srq_context, &init->attr);
}

#define BASIC_MASK (IBV_SRQ_INIT_ATTR_TYPE | IBV_SRQ_INIT_ATTR_PD)
#define XRC_MASK (BASIC_MASK | IBV_SRQ_INIT_ATTR_XRCD | IBV_SRQ_INIT_ATTR_CQ)

struct ibv_srq *mgv_create_srq_ex(struct ibv_context *c, struct ibv_srq_init_attr_ex *a)
{
	bool typed = a->comp_mask & IBV_SRQ_INIT_ATTR_TYPE;
	bool xrc = typed && a->srq_type == IBV_SRQT_XRC;

	/* Tag matching needs hardware. */
	if ((typed && !xrc && a->srq_type != IBV_SRQT_BASIC) ||
	    (a->comp_mask & ~(uint32_t)(xrc ? XRC_MASK : BASIC_MASK))) {
		errno = EOPNOTSUPP;
		return NULL;
	}
	if (!(a->comp_mask & IBV_SRQ_INIT_ATTR_PD) || !a->pd || a->pd->context != c ||
	    (xrc && ((a->comp_mask & XRC_MASK) != XRC_MASK || !a->xrcd || !a->cq || a->xrcd->context != c ||
		     a->cq->context != c))) {
		errno = EINVAL;
		return NULL;
	}
	return create(a->pd, xrc ? a->xrcd : NULL, xrc ? a->cq : NULL, a->srq_context, &a->attr);
}

MGV_EXPORT int ibv_modify_srq(struct ibv_srq *ibsrq, struct ibv_srq_attr *attr, int mask)
{
	struct mgv_srq *srq;
	int err;

	if (!mgv_is_ours(ibsrq->context))
		return MGV_FORWARD_INT(ibv_modify_srq, ibsrq, attr, mask);
	srq = mgv_srq(ibsrq);
	mg_device_lock(srq->dev);
	err = mg_srq_modify(srq->mg, attr, mask);
	mg_device_unlock(srq->dev);
	return err;
}

MGV_EXPORT int ibv_query_srq(struct ibv_srq *ibsrq, struct ibv_srq_attr *attr)
{
	struct mgv_srq *srq;

	if (!mgv_is_ours(ibsrq->context))
		return MGV_FORWARD_INT(ibv_query_srq, ibsrq, attr);
	srq = mgv_srq(ibsrq);
	mg_device_lock(srq->dev);
	mg_srq_query(srq->mg, attr);
	mg_device_unlock(srq->dev);
	return 0;
}

int mgv_get_srq_num(struct ibv_srq *ibsrq, uint32_t *num)
{
	*num = mg_srq_num(mgv_srq(ibsrq)->mg);
	return 0;
}

int mgv_post_srq_recv(struct ibv_srq *ibsrq, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad)
{
	struct mgv_srq *srq = mgv_srq(ibsrq);
	int err;

	mg_device_lock(srq->dev);
	err = mg_post_srq_recv(srq->mg, wr, bad);
	mg_device_unlock(srq->dev);
	return err;
}

int mgv_srq_release(struct mgv_srq *srq)
{
	int err = mg_srq_destroy(srq->mg);

	if (err)
		return err;
	if (srq->xrcd)
		srq->xrcd->users--;
	mgv_list_del(&srq->link);
	return 0;
}

void mgv_srq_free(struct mgv_srq *srq)
{
	pthread_mutex_destroy(&srq->ib.mutex);
	pthread_cond_destroy(&srq->ib.cond);
	free(srq);
}

MGV_EXPORT int ibv_destroy_srq(struct ibv_srq *ibsrq)
{
	struct mgv_srq *srq;
	uint32_t delivered = 0;
	int err;

	if (!mgv_is_ours(ibsrq->context))
		return MGV_FORWARD_INT(ibv_destroy_srq, ibsrq);
	srq = mgv_srq(ibsrq);
	mg_device_lock(srq->dev);
	err = mgv_srq_release(srq);
	if (!err) {
		mgv_async_withdraw(mgv_ctx(ibsrq->context), ibsrq);
		delivered = srq->async_delivered;
	}
	mg_device_unlock(srq->dev);
	if (err)
		return err;
	mgv_wait_acks(&ibsrq->mutex, &ibsrq->cond, &ibsrq->events_completed, delivered);
	mgv_srq_free(srq);
	return 0;
}
