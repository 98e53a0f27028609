/* SPDX-License-Identifier: BSD-3-Clause */
/* cq.c - completion queues: a ring of ibv_wc, armed once for a notification. */
#include "transport/internal.h"

#include <errno.h>
#include <stdlib.h>

int mg_cq_create(struct mg_engine *e, uint32_t cqe, void *owner, struct mg_cq **out)
{
	struct mg_cq *cq;
	int err = ENOMEM;

	if (!cqe || cqe > MG_MAX_CQE)
		return EINVAL;
	cq = calloc(1, sizeof(*cq));
	if (!cq)
		return ENOMEM;
	*cq = (struct mg_cq){.e = e, .owner = owner, .depth = cqe, .handle = mg_engine_handle(e)};
	cq->ring = calloc(cqe, sizeof(*cq->ring));
	if (!cq->ring)
		goto fail;
	err = mg_idtab_put(&e->cqs, cq->handle, cq);
	if (err)
		goto fail;
	*out = cq;
	return 0;
fail:
	free(cq->ring);
	free(cq);
	return err;
}

int mg_cq_destroy(struct mg_cq *cq)
{
	if (cq->refs)
		return EBUSY;
	mg_idtab_del(&cq->e->cqs, cq->handle);
	free(cq->ring);
	free(cq->stamp);
	free(cq);
	return 0;
}

int mg_cq_stamp(struct mg_cq *cq)
{
	cq->stamp = calloc(cq->depth, sizeof(*cq->stamp));
	return cq->stamp ? 0 : ENOMEM;
}

mg_time mg_cq_stamp_polled(const struct mg_cq *cq)
{
	return cq->stamp_polled;
}

int mg_cq_resize(struct mg_cq *cq, uint32_t cqe)
{
	mg_time *stamp = NULL;
	struct ibv_wc *ring;

	if (!cqe || cqe > MG_MAX_CQE || cqe < cq->fill)
		return EINVAL;
	ring = calloc(cqe, sizeof(*ring));
	if (cq->stamp)
		stamp = calloc(cqe, sizeof(*stamp));
	if (!ring || (cq->stamp && !stamp)) {
		free(ring);
		free(stamp);
		return ENOMEM;
	}
	for (uint32_t i = 0; i < cq->fill; i++) {
		ring[i] = cq->ring[(cq->head + i) % cq->depth];
		if (stamp)
			stamp[i] = cq->stamp[(cq->head + i) % cq->depth];
	}
	free(cq->ring);
	free(cq->stamp);
	cq->stamp = stamp;
	cq->ring = ring;
	cq->depth = cqe;
	cq->head = 0;
	return 0;
}

uint32_t mg_cq_depth(const struct mg_cq *cq)
{
	return cq->depth;
}

void *mg_cq_owner(const struct mg_cq *cq)
{
	return cq->owner;
}

int mg_cq_poll(struct mg_cq *cq, int n, struct ibv_wc *wc)
{
	int got = 0;

	while (got < n && cq->fill) {
		wc[got++] = cq->ring[cq->head];
		if (cq->stamp)
			cq->stamp_polled = cq->stamp[cq->head];
		cq->head = cq->head + 1 == cq->depth ? 0 : cq->head + 1;
		cq->fill--;
	}
	return got;
}

void mg_cq_purge(struct mg_cq *cq, uint32_t qpn)
{
	uint32_t kept = 0;

	for (uint32_t i = 0; i < cq->fill; i++) {
		uint32_t from = (cq->head + i) % cq->depth, to = (cq->head + kept) % cq->depth;

		if (cq->ring[from].qp_num == qpn)
			continue;
		cq->ring[to] = cq->ring[from];
		if (cq->stamp)
			cq->stamp[to] = cq->stamp[from];
		kept++;
	}
	cq->fill = kept;
}

void mg_cq_note(struct mg_cq *cq, int channel, uint32_t events)
{
	cq->channel = (uint32_t)(channel + 1);
	cq->events = events;
}

void mg_cq_arm(struct mg_cq *cq, bool solicited_only)
{
	/* Arming for everything is not weakened by a later arming for solicited ones (IBA 11.4.2.2). */
	if (cq->armed != 1)
		cq->armed = solicited_only ? 2 : 1;
}

/* Not at once: whoever completes a request may be in the middle of a queue. */
static void overrun(struct mg_cq *cq, struct mg_qp *qp)
{
	if (!cq->overrun) /* IBA C10-39: told once */
		cq->e->ops->async_event(cq->e->arg, IBV_EVENT_CQ_ERR, cq);
	cq->overrun = true;
	qp->overrun = true;
	mg_qp_ready(qp);
}

void mg_cq_push(struct mg_cq *cq, struct mg_qp *qp, const struct ibv_wc *wc, bool solicited)
{
	struct mg_engine *e = cq->e;
	uint32_t at;

	if (cq->fill == cq->depth) {
		overrun(cq, qp);
		return;
	}
	at = cq->head + cq->fill;
	at = at >= cq->depth ? at - cq->depth : at;
	cq->ring[at] = *wc;
	if (cq->stamp)
		cq->stamp[at] = e->now;
	cq->fill++;
	cq->total++;
	if (cq->armed == 1 || (cq->armed == 2 && (solicited || wc->status != IBV_WC_SUCCESS))) {
		cq->armed = 0;
		e->ops->cq_event(e->arg, cq);
	}
}
