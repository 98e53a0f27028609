/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * rq.c - receive queues: a QP's own or one shared by many (srq.c).
 *
 * A receive request is taken from its queue when a message begins, and copied into the QP: so
 * several QPs can be in the middle of messages from one shared queue. A message broken off leaves
 * the request to the QP's next one (UC).
 */
#include "transport/internal.h"

#include <errno.h>
#include <stdlib.h>

static uint32_t rwqe_stride(uint32_t max_sge)
{
	return (uint32_t)((sizeof(struct mg_rwqe) + max_sge * sizeof(struct ibv_sge) + 15) & ~15ul);
}

static struct mg_rwqe *at(const struct mg_rq *rq, uint32_t i)
{
	return (struct mg_rwqe *)(rq->ring + (size_t)(i & (rq->size - 1)) * rq->stride);
}

struct mg_rwqe *mg_rwqe_alloc(void)
{
	return calloc(1, rwqe_stride(MG_MAX_SGE));
}

int mg_rq_init(struct mg_rq *rq, uint32_t max_wr, uint32_t max_sge)
{
	*rq = (struct mg_rq){.size = 1, .stride = rwqe_stride(max_sge), .max_wr = max_wr, .max_sge = max_sge};
	while (rq->size < max_wr)
		rq->size *= 2;
	rq->ring = calloc(rq->size, rq->stride);
	return rq->ring ? 0 : ENOMEM;
}

void mg_rq_free(struct mg_rq *rq)
{
	free(rq->ring);
	rq->ring = NULL;
}

int mg_rq_resize(struct mg_rq *rq, uint32_t max_wr)
{
	struct mg_rq new;
	uint32_t n = mg_rq_fill(rq);

	if (n > max_wr)
		return EINVAL;
	if (mg_rq_init(&new, max_wr, rq->max_sge))
		return ENOMEM;
	for (; new.tail < n; new.tail++)
		memcpy(at(&new, new.tail), at(rq, rq->head + new.tail), rq->stride);
	free(rq->ring);
	*rq = new;
	return 0;
}

int mg_rq_post(struct mg_rq *rq, const struct ibv_recv_wr *wr)
{
	struct mg_rwqe *w;
	uint64_t length = 0;

	if (wr->num_sge < 0 || (uint32_t)wr->num_sge > rq->max_sge || (wr->num_sge && !wr->sg_list))
		return EINVAL;
	if (mg_rq_fill(rq) >= rq->max_wr)
		return ENOMEM;
	for (int i = 0; i < wr->num_sge; i++)
		length += wr->sg_list[i].length;
	if (length > UINT32_MAX)
		return EINVAL;
	w = at(rq, rq->tail++);
	w->wr_id = wr->wr_id;
	w->length = (uint32_t)length;
	w->n_sge = (uint32_t)wr->num_sge;
	if (wr->num_sge)
		memcpy(w->sge, wr->sg_list, (size_t)wr->num_sge * sizeof(struct ibv_sge));
	return 0;
}

/* ---- the request that a message uses -------------------------------------------------------- */

struct mg_rwqe *mg_recv_take(struct mg_qp *qp, struct mg_srq *srq)
{
	struct mg_rq *rq = srq ? &srq->rq : &qp->rq;
	const struct mg_rwqe *w;

	if (qp->resp.have_wqe)
		return qp->taken;
	if (!mg_rq_fill(rq))
		return NULL;
	w = at(rq, rq->head++);
	memcpy(qp->taken, w, sizeof(*w) + w->n_sge * sizeof(w->sge[0]));
	qp->resp.have_wqe = true;
	qp->resp.wqe_srq = srq;
	if (srq)
		mg_srq_taken(srq);
	return qp->taken;
}

int mg_recv_scatter(struct mg_qp *qp, uint32_t offset, const uint8_t *data, uint32_t len)
{
	struct mg_pd *pd = qp->resp.wqe_srq ? qp->resp.wqe_srq->pd : qp->pd;

	return mg_sge_scatter(pd, qp->taken->sge, qp->taken->n_sge, offset, data, len);
}

void mg_recv_done(struct mg_qp *qp, struct ibv_wc *wc, bool solicited)
{
	struct mg_srq *srq = qp->resp.wqe_srq;

	wc->wr_id = qp->taken->wr_id;
	wc->qp_num = qp->qpn;
	qp->resp.have_wqe = false;
	qp->recv_done++;
	if (mg_qp_unacked(qp) && !mg_rq_fill(srq ? &srq->rq : &qp->rq))
		qp->e->dry = true;
	mg_cq_push(srq && srq->cq ? srq->cq : qp->recv_cq, qp, wc, solicited);
}

void mg_recv_flush(struct mg_qp *qp)
{
	bool own = !qp->srq && !qp->xrcd; /* a shared queue keeps what it has for the others */

	while (qp->resp.have_wqe || (own && mg_recv_take(qp, NULL))) {
		struct ibv_wc wc = {.status = IBV_WC_WR_FLUSH_ERR};

		mg_recv_done(qp, &wc, false);
	}
}
