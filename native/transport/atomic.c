/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * atomic.c - operations on words of memory that are answered one by one: compare-and-swap and
 * fetch-and-add, and (IBA annex A19) ATOMIC WRITE and FLUSH.
 *
 * The words are changed by the CPU's own atomic instructions, in host byte order: atomic for all
 * QPs of the device and for the program's threads. What a peer has written is in memory before
 * anything is answered, so that a flush has nothing left to do but to order.
 */
#include "transport/internal.h"

#define WORD ((uint32_t)sizeof(uint64_t))

static uint8_t opcode_of(const struct mg_swqe *w)
{
	switch (w->opcode) {
	case IBV_WR_ATOMIC_CMP_AND_SWP: return MG_OP_CMP_SWAP;
	case IBV_WR_ATOMIC_FETCH_AND_ADD: return MG_OP_FETCH_ADD;
	case MG_WR_FLUSH: return MG_OP_FLUSH;
	default: return MG_OP_ATOMIC_WRITE;
	}
}

int mg_atomic_build(struct mg_qp *qp, const struct mg_swqe *w, struct mg_pkt *p)
{
	uint8_t opcode = opcode_of(w);
	struct mg_hdrs h;

	p->n_iov = 0;
	if (opcode == MG_OP_ATOMIC_WRITE) {
		if (w->flags & MG_WQE_INLINE)
			p->iov[p->n_iov++] = (struct iovec){(void *)w->u.inline_data, WORD};
		else if (mg_sge_gather(qp->pd, w->u.sge, w->n_sge, 0, WORD, p))
			return IBV_WC_LOC_PROT_ERR;
	}
	mg_qp_hdrs(qp, opcode, (uint32_t)w->psn, &h);
	h.ackreq = true;
	h.xrc_srqn = w->srqn;
	h.atomic.va = h.reth.va = w->remote_addr;
	h.atomic.rkey = h.reth.rkey = w->rkey;
	h.reth.length = w->length;
	h.atomic.swap_add = opcode == MG_OP_CMP_SWAP ? w->swap : w->compare_add;
	h.atomic.compare = opcode == MG_OP_CMP_SWAP ? w->compare_add : 0;
	h.feth.type = w->compare_add & 0xff;
	h.feth.level = w->compare_add >> 8 & 0xff;
	mg_pkt_finish(qp, p, &h, opcode == MG_OP_ATOMIC_WRITE ? WORD : 0);
	return IBV_WC_SUCCESS;
}

/* ---- executing ------------------------------------------------------------------------------- */

/* Whether all of the types a flush asks for are open; the flags of a QP and of a region are the same. */
static unsigned flush_access(const struct mg_hdrs *h)
{
	return (h->feth.type & MG_FLUSH_GLOBAL ? MG_ACCESS_FLUSH_GLOBAL : 0) |
	       (h->feth.type & MG_FLUSH_PERSISTENT ? MG_ACCESS_FLUSH_PERSISTENT : 0);
}

static uint8_t execute_flush(struct mg_qp *qp, const struct mg_hdrs *h)
{
	unsigned need = flush_access(h);
	struct mg_mr *mr;

	/* No kind, one that the QP does not offer (persistence never), or a reserved range. */
	if (!need || h->feth.type & ~(MG_FLUSH_GLOBAL | MG_FLUSH_PERSISTENT) || h->feth.level > MG_FLUSH_MR ||
	    (qp->access & need) != need)
		return MG_NAK_INVALID_REQ;
	if (h->feth.level == MG_FLUSH_MR) {
		mr = mg_mr_find(qp->e, h->reth.rkey);
		if (!mr || mr->pd != qp->pd || (mr->access & need) != need)
			return MG_NAK_REM_ACCESS;
	} else if (h->reth.length && !mg_remote_map(qp, h->reth.rkey, h->reth.va, h->reth.length, need)) {
		return MG_NAK_REM_ACCESS;
	}
	__atomic_thread_fence(__ATOMIC_SEQ_CST);
	return 0;
}

/* The word that an atomic is about, or why there is none. */
static uint8_t find_word(struct mg_qp *qp, uint32_t rkey, uint64_t va, unsigned need, uint64_t **word)
{
	uint8_t *at;

	if (!(qp->access & need) || va & (WORD - 1)) /* not offered; IBA 9.7.4.1.6: aligned */
		return MG_NAK_INVALID_REQ;
	at = mg_remote_map(qp, rkey, va, WORD, need);
	if (!at)
		return MG_NAK_REM_ACCESS;
	if ((uintptr_t)at & (WORD - 1)) /* its remote view is aligned, but the word itself is not */
		return MG_NAK_INVALID_REQ;
	*word = (uint64_t *)(void *)at;
	return 0;
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

	if (h->opcode == MG_OP_ATOMIC_WRITE) {
		uint64_t value;

		memcpy(&value, h->payload, WORD);
		__atomic_store_n(w->at, value, __ATOMIC_SEQ_CST);
	} else if (h->opcode == MG_OP_CMP_SWAP) {
		w->orig = h->atomic.compare;
		__atomic_compare_exchange_n(w->at, &w->orig, h->atomic.swap_add, false, __ATOMIC_SEQ_CST,
					    __ATOMIC_SEQ_CST);
	} else {
		w->orig = __atomic_fetch_add(w->at, h->atomic.swap_add, __ATOMIC_SEQ_CST);
	}
}

uint8_t mg_atomic_execute(struct mg_qp *qp, const struct mg_hdrs *h, uint64_t *orig)
{
	struct word w = {.h = h};
	uint8_t nak;

	*orig = 0;
	if (h->opcode == MG_OP_FLUSH)
		return execute_flush(qp, h);
	if (h->opcode == MG_OP_ATOMIC_WRITE && (h->payload_len != WORD || h->reth.length != WORD))
		return MG_NAK_INVALID_REQ;
	if (h->opcode == MG_OP_ATOMIC_WRITE)
		nak = find_word(qp, h->reth.rkey, h->reth.va, IBV_ACCESS_REMOTE_WRITE, &w.at);
	else
		nak = find_word(qp, h->atomic.rkey, h->atomic.va, IBV_ACCESS_REMOTE_ATOMIC, &w.at);
	if (nak)
		return nak;
	if (!qp->e->ops->guarded)
		change(&w);
	else if (!qp->e->ops->guarded(qp->e->arg, change, &w))
		return MG_NAK_REM_ACCESS;
	*orig = w.orig;
	return 0;
}
