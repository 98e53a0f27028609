/* SPDX-License-Identifier: BSD-3-Clause */
/* The target's half: posts receives, verifies what arrives against the plan. */
#include "mgcheck.h"

#include <arpa/inet.h>
#include <stdatomic.h>
#include <string.h>

/* A stream whose plan never completes a receive cannot be followed by looking further and further. */
#define LOOK_AHEAD 1000000u

static uint32_t capacity(const struct run *r)
{
	uint32_t max = r->opt.terms.plan.max_size;

	return max < 8 ? 8 : max; /* FIN has 8 bytes */
}

static void prepare_slot(struct run *r, struct conn *c, struct recv_slot *s)
{
	uint32_t left = capacity(r);
	uint8_t *p = s->base;

	s->n_sge = 1 + (unsigned)(rng_next(&c->dice) % MAX_SGE);
	for (unsigned i = 0; i < s->n_sge; i++) {
		uint32_t rest = s->n_sge - i - 1;
		uint32_t len = rest ? 1 + (uint32_t)(rng_next(&c->dice) % (left - rest)) : left;

		/* Short first pieces now and then: messages should cross the seams. */
		if (rest && rng_next(&c->dice) % 2 && len > 100)
			len = 1 + len % 100;
		memset(p, CANARY, GAP);
		p += GAP;
		s->sge[i] = (struct ibv_sge){.addr = (uintptr_t)p, .length = len, .lkey = c->local_mr->lkey};
		p += len;
		left -= len;
	}
	memset(p, CANARY, GAP);
}

void post_receives(struct run *r, struct conn *c, int64_t now)
{
	uint32_t depth = r->opt.recv_depth;
	uint64_t posted = c->recv_posted - c->recv_seen;

	if (now < c->hold_until || c->rx_done || (depth - posted < 4 && posted > 4))
		return;
	while (c->recv_posted - c->recv_seen < depth) {
		struct ibv_recv_wr wr[8], *bad = NULL;
		unsigned n;
		int rc;

		for (n = 0; n < 8 && c->recv_posted - c->recv_seen < depth; n++) {
			struct recv_slot *s = &c->slots[c->recv_posted % depth];

			prepare_slot(r, c, s);
			wr[n] = (struct ibv_recv_wr){.wr_id = WR_RECV | WR_ID(c, c->recv_posted),
						     .sg_list = s->sge,
						     .num_sge = (int)s->n_sge};
			if (n)
				wr[n - 1].next = &wr[n];
			c->recv_posted++;
		}
		rc = ibv_post_recv(c->qp, wr, &bad);
		if (rc) {
			fatal(r, "QP %u: posting receives: %s", c->index, strerror(rc));
			return;
		}
	}
}

static const uint8_t *gather(struct run *r, const struct recv_slot *s, uint32_t size)
{
	uint32_t at = 0;

	for (unsigned i = 0; i < s->n_sge && at < size; i++) {
		uint32_t n = size - at < s->sge[i].length ? size - at : s->sge[i].length;

		memcpy(r->gathered + at, (const void *)(uintptr_t)s->sge[i].addr, n);
		at += n;
	}
	return r->gathered;
}

static bool gaps_intact(const struct recv_slot *s)
{
	for (unsigned i = 0; i < s->n_sge; i++) {
		const uint8_t *p = (const uint8_t *)(uintptr_t)s->sge[i].addr;

		for (unsigned k = 1; k <= 16; k++)
			if (p[-(int)k] != CANARY || p[s->sge[i].length + k - 1] != CANARY)
				return false;
	}
	return true;
}

static bool all_canary(const uint8_t *p, uint32_t n)
{
	for (uint32_t i = 0; i < n; i++)
		if (p[i] != CANARY)
			return false;
	return true;
}

static void compare(struct run *r, struct conn *c, const struct op *op, const uint8_t *got)
{
	const uint8_t *want = message(r->expect, &c->rx, op);
	char why[160];

	if (!memcmp(got, want, op->size))
		return;
	message_explain(got, want, op->size, why, sizeof(why));
	wrong(r, "QP %u: %s %llu: %s", c->index, kind_name[op->kind], (unsigned long long)op->seq, why);
}

static void check_ring(struct run *r, struct conn *c, const struct op *op)
{
	uint8_t *at = c->ring + op->ring_off;

	compare(r, c, op, at);
	if (!all_canary(at + op->size, CANARY_LEN))
		wrong(r, "QP %u: %s %llu wrote beyond its end", c->index, kind_name[op->kind],
		      (unsigned long long)op->seq);
	memset(at, CANARY, op->size + CANARY_LEN);
	atomic_store_explicit((_Atomic uint64_t *)c->counter, op->ring_end, memory_order_release);
}

static void count(struct run *r, const struct op *op)
{
	r->received.ops[op->kind]++;
	if (op->kind != K_READ && op->kind != K_ATOMIC)
		r->received.bytes += op->size;
}

static void fin(struct run *r, struct conn *c, const struct ibv_wc *wc, const struct recv_slot *s,
		uint32_t imm)
{
	uint64_t total = 0;
	struct op op;

	if (wc->byte_len != 8 || wc->opcode != IBV_WC_RECV) {
		fatal(r, "QP %u: the last message has %u bytes, opcode %d", c->index, wc->byte_len,
		      (int)wc->opcode);
		return;
	}
	memcpy(&total, gather(r, s, 8), 8);
	if (total < c->rx.next || total - c->rx.next > LOOK_AHEAD) {
		fatal(r, "QP %u: the sender says it sent %llu messages, we are at %llu", c->index,
		      (unsigned long long)total, (unsigned long long)c->rx.next);
		return;
	}
	while (c->rx.next < total) {
		plan_next(&c->rx, &op);
		if (!kind_is_silent(op.kind)) {
			fatal(r, "QP %u: %s %llu was lost", c->index, kind_name[op.kind],
			      (unsigned long long)op.seq);
			return;
		}
		if (op.kind == K_WRITE)
			check_ring(r, c, &op);
		count(r, &op);
	}
	c->rx_done = true;
	if (imm & FIN_STOP)
		r->stopping = true;
}

void received(struct run *r, struct conn *c, const struct ibv_wc *wc, int64_t now)
{
	struct recv_slot *s = &c->slots[c->recv_seen % r->opt.recv_depth];
	bool with_imm = wc->wc_flags & IBV_WC_WITH_IMM;
	uint32_t imm = with_imm ? ntohl(wc->imm_data) : 0;
	bool want_imm;
	enum ibv_wc_opcode want;
	struct op op;

	if (wc->wr_id != (WR_RECV | WR_ID(c, c->recv_seen)) || c->recv_seen >= c->recv_posted) {
		fatal(r, "QP %u: receive %llx completed instead of %llx", c->index,
		      (unsigned long long)wc->wr_id, (unsigned long long)(WR_RECV | WR_ID(c, c->recv_seen)));
		return;
	}
	c->recv_seen++;
	if (c->rx_done) {
		fatal(r, "QP %u: a message after the last one", c->index);
		return;
	}
	if (!gaps_intact(s))
		wrong(r, "QP %u: message %llu wrote outside of its receive buffer", c->index,
		      (unsigned long long)c->rx.next);
	if (imm & FIN_IMM) {
		fin(r, c, wc, s, imm);
		return;
	}
	for (unsigned n = 0;; n++) { /* what went before without a completion here */
		plan_next(&c->rx, &op);
		count(r, &op);
		if (!kind_is_silent(op.kind))
			break;
		if (op.kind == K_WRITE)
			check_ring(r, c, &op);
		if (n == LOOK_AHEAD) {
			fatal(r, "QP %u: a message arrived that nobody sent", c->index);
			return;
		}
	}
	want = op.kind == K_WRITE_IMM ? IBV_WC_RECV_RDMA_WITH_IMM : IBV_WC_RECV;
	want_imm = op.kind != K_SEND;
	if (wc->opcode != want || with_imm != want_imm || (want_imm && imm != (op.seq & IMM_MASK)) ||
	    wc->byte_len != op.size) {
		fatal(r, "QP %u: expected %s %llu of %u bytes, got opcode %d, %u bytes, immediate %s%u",
		      c->index, kind_name[op.kind], (unsigned long long)op.seq, op.size, (int)wc->opcode,
		      wc->byte_len, with_imm ? "" : "none ", imm);
		return;
	}
	if (op.kind == K_WRITE_IMM)
		check_ring(r, c, &op);
	else
		compare(r, c, &op, gather(r, s, op.size));
	if (c->recv_seen >= c->rnr_next) {
		c->hold_until = now + r->opt.terms.rnr_ms * 1000000ll;
		c->rnr_next = c->recv_seen + r->opt.terms.rnr_every;
		r->holds++;
	}
}

void completion(struct run *r, const struct ibv_wc *wc, int64_t now)
{
	unsigned q = WR_QP(wc->wr_id);
	struct conn *c = &r->conns[q];

	if (q >= r->opt.terms.qps || c->qp->qp_num != wc->qp_num) {
		fatal(r, "a completion with wr_id %llx for QP number 0x%x", (unsigned long long)wc->wr_id,
		      wc->qp_num);
		return;
	}
	if (wc->status != IBV_WC_SUCCESS) {
		fatal(r, "QP %u: %s wr_id %llx failed: %s (%d, vendor 0x%x)", q,
		      wc->wr_id & WR_RECV ? "receive" : "send", (unsigned long long)wc->wr_id,
		      ibv_wc_status_str(wc->status), (int)wc->status, wc->vendor_err);
		return;
	}
	if (wc->wr_id & WR_RECV)
		received(r, c, wc, now);
	else
		retire(r, c, wc);
}
