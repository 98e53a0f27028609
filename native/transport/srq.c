/* SPDX-License-Identifier: BSD-3-Clause */
/* srq.c - shared receive queues (IBA 10.2.9) and XRC domains: creation, limits, numbers. */
#include "transport/internal.h"

#include <errno.h>
#include <stdlib.h>

/* At random, as QPNs: whoever may send to an XRC domain must not guess its queues. */
static int draw_num(struct mg_engine *e, uint32_t *num)
{
	for (int tries = 0; tries < 1000; tries++) {
		e->ops->random(e->arg, num, sizeof(*num));
		*num &= MG_QPN_MASK;
		if (*num && !mg_idtab_get(&e->srqs, *num))
			return 0;
	}
	return ENOMEM;
}

int mg_srq_create(struct mg_pd *pd, struct mg_xrcd *xrcd, struct mg_cq *cq, struct ibv_srq_attr *attr,
		  void *owner, struct mg_srq **out)
{
	struct mg_engine *e = pd->e;
	struct mg_srq *srq;
	int err;

	if (!attr->max_wr || attr->max_wr > MG_MAX_SRQ_WR || attr->max_sge > MG_MAX_SGE || !xrcd != !cq)
		return EINVAL;
	srq = calloc(1, sizeof(*srq));
	if (!srq)
		return ENOMEM;
	if (!attr->max_sge)
		attr->max_sge = 1;
	*srq = (struct mg_srq){
		.e = e, .pd = pd, .xrcd = xrcd, .cq = cq, .owner = owner, .handle = mg_engine_handle(e)};
	err = mg_rq_init(&srq->rq, attr->max_wr, attr->max_sge);
	if (!err)
		err = draw_num(e, &srq->num);
	if (!err)
		err = mg_idtab_put(&e->srqs, srq->num, srq);
	if (err) {
		mg_rq_free(&srq->rq);
		free(srq);
		return err;
	}
	pd->refs++;
	if (cq) {
		cq->refs++;
		xrcd->refs++;
	}
	*out = srq;
	return 0;
}

int mg_srq_destroy(struct mg_srq *srq)
{
	struct mg_engine *e = srq->e;
	struct mg_qp *qp;

	if (srq->refs)
		return EBUSY;
	/* XRC targets name a queue in each packet: one may be in the middle of a message. It finds out
	 * with the next packet. */
	for (uint32_t it = 0; srq->xrcd && (qp = mg_idtab_next(&e->qps, &it));)
		if (qp->resp.wqe_srq == srq) {
			qp->resp.have_wqe = false;
			qp->resp.wqe_srq = NULL;
		}
	mg_idtab_del(&e->srqs, srq->num);
	srq->pd->refs--;
	if (srq->cq) {
		srq->cq->refs--;
		srq->xrcd->refs--;
	}
	mg_rq_free(&srq->rq);
	free(srq);
	return 0;
}

/* Limits as rdma_rxe has them: none above the size, no size below an armed limit. */
int mg_srq_modify(struct mg_srq *srq, const struct ibv_srq_attr *attr, int mask)
{
	uint32_t max_wr = srq->rq.max_wr, limit = srq->limit;
	int err = 0;

	if (mask & ~(IBV_SRQ_MAX_WR | IBV_SRQ_LIMIT))
		return EINVAL;
	if (mask & IBV_SRQ_MAX_WR)
		max_wr = attr->max_wr;
	if (mask & IBV_SRQ_LIMIT)
		limit = attr->srq_limit;
	if (!max_wr || max_wr > MG_MAX_SRQ_WR || limit > max_wr)
		return EINVAL;
	if (mask & IBV_SRQ_MAX_WR)
		err = mg_rq_resize(&srq->rq, max_wr);
	if (!err)
		srq->limit = limit;
	return err;
}

void mg_srq_query(const struct mg_srq *srq, struct ibv_srq_attr *attr)
{
	*attr = (struct ibv_srq_attr){
		.max_wr = srq->rq.max_wr, .max_sge = srq->rq.max_sge, .srq_limit = srq->limit};
}

uint32_t mg_srq_num(const struct mg_srq *srq)
{
	return srq->num;
}

void *mg_srq_owner(const struct mg_srq *srq)
{
	return srq->owner;
}

void mg_srq_taken(struct mg_srq *srq)
{
	srq->total++;
	if (mg_rq_fill(&srq->rq) >= srq->limit)
		return;
	srq->limit = 0; /* disarmed (IBA 11.2.4.3) */
	srq->e->ops->async_event(srq->e->arg, IBV_EVENT_SRQ_LIMIT_REACHED, srq);
}

/* ---- XRC domains ------------------------------------------------------------------------------ */

struct mg_xrcd *mg_xrcd_create(struct mg_engine *e)
{
	struct mg_xrcd *x = calloc(1, sizeof(*x));

	if (!x)
		return NULL;
	*x = (struct mg_xrcd){.e = e, .handle = mg_engine_handle(e)};
	if (mg_idtab_put(&e->xrcds, x->handle, x)) {
		free(x);
		return NULL;
	}
	return x;
}

int mg_xrcd_destroy(struct mg_xrcd *xrcd)
{
	if (xrcd->refs)
		return EBUSY;
	mg_idtab_del(&xrcd->e->xrcds, xrcd->handle);
	free(xrcd);
	return 0;
}

struct mg_qp *mg_xrcd_find(const struct mg_xrcd *xrcd, uint32_t qpn)
{
	struct mg_qp *qp = mg_idtab_get(&xrcd->e->qps, qpn);

	return qp && qp->xrcd == xrcd ? qp : NULL;
}
