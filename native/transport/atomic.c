/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * atomic.c - compare-and-swap and fetch-and-add on 64-bit words of memory.
 *
 * The words are changed by the CPU's own atomic instructions, in host byte order: atomic for all
 * QPs of the device and for the program's threads.
 */
#include "transport/internal.h"

void mg_atomic_build(struct mg_qp *qp, const struct mg_swqe *w, struct mg_pkt *p)
{
	bool cas = w->opcode == IBV_WR_ATOMIC_CMP_AND_SWP;
	struct mg_hdrs h;

	p->n_iov = 0;
	mg_qp_hdrs(qp, cas ? MG_OP_CMP_SWAP : MG_OP_FETCH_ADD, (uint32_t)w->psn, &h);
	h.ackreq = true;
	h.xrc_srqn = w->srqn;
	h.atomic.va = w->remote_addr;
	h.atomic.rkey = w->rkey;
	h.atomic.swap_add = cas ? w->swap : w->compare_add;
	h.atomic.compare = cas ? w->compare_add : 0;
	mg_pkt_finish(qp, p, &h, 0);
}

struct word {
	uint64_t *at;
	const struct mg_hdrs *h;
	uint64_t orig;
};

static void change(void *what)
{
	struct word *w = what;
	const struct mg_hdrs *h = w->h;

	if (h->opcode == MG_OP_CMP_SWAP) {
		w->orig = h->atomic.compare;
		__atomic_compare_exchange_n(w->at, &w->orig, h->atomic.swap_add, false, __ATOMIC_SEQ_CST,
					    __ATOMIC_SEQ_CST);
	} else {
		w->orig = __atomic_fetch_add(w->at, h->atomic.swap_add, __ATOMIC_SEQ_CST);
	}
}

uint8_t mg_atomic_execute(struct mg_qp *qp, const struct mg_hdrs *h, uint64_t *orig)
{
	struct word w;
	uint8_t *at;

	if (!(qp->access & IBV_ACCESS_REMOTE_ATOMIC))
		return MG_NAK_INVALID_REQ;
	if (h->atomic.va & 7) /* IBA 9.4.5: C9-85 */
		return MG_NAK_INVALID_REQ;
	at = mg_mr_map(qp->pd, h->atomic.rkey, h->atomic.va, sizeof(*orig), IBV_ACCESS_REMOTE_ATOMIC);
	if (!at)
		return MG_NAK_REM_ACCESS;
	if ((uintptr_t)at & 7) /* its remote view is aligned, but the word itself is not */
		return MG_NAK_INVALID_REQ;
	w = (struct word){.at = (uint64_t *)(void *)at, .h = h};
	if (!qp->e->ops->guarded)
		change(&w);
	else if (!qp->e->ops->guarded(qp->e->arg, change, &w))
		return MG_NAK_REM_ACCESS;
	*orig = w.orig;
	return 0;
}
