/* SPDX-License-Identifier: BSD-3-Clause */
/* The initiator's half: draws operations from the plan, posts them, checks their completions. */
#include "mgcheck.h"

#include <arpa/inet.h>
#include <string.h>

#define CHAIN 6u /* work requests posted at once */

struct chain {
	unsigned n;
	struct ibv_send_wr wr[CHAIN];
	struct entry *entry[CHAIN];
};

static uint64_t roll(struct conn *c)
{
	return rng_next(&c->dice);
}

/*
 * Room for `size` bytes in up to `pieces` pieces with canaries between and around them, in the local
 * ring. False when it is full for now. *end: to be stored in the entry.
 */
static bool local_alloc(struct conn *c, uint32_t size, unsigned pieces, struct ibv_sge *sge, unsigned *n_sge,
			uint64_t *end)
{
	uint32_t room = c->local_size;
	uint64_t pos = c->local_head;
	uint32_t need, off, at = 0;
	unsigned n = size < pieces ? 1 : pieces;
	uint8_t *p;

	need = size + (n + 1) * GAP + 8;
	if (pos % room + need > room)
		pos += room - pos % room;
	if (pos + need - c->local_tail > room)
		return false;
	p = c->local_ring + pos % room;
	memset(p, CANARY, need);
	off = GAP + (uint32_t)(roll(c) % 8); /* odd alignments too */
	for (unsigned i = 0; i < n; i++) {
		uint32_t left = size - at;
		uint32_t len = i + 1 == n ? left : 1 + (uint32_t)(roll(c) % (left - (n - i - 1)));

		sge[i] = (struct ibv_sge){
			.addr = (uintptr_t)p + off, .length = len, .lkey = c->local_mr->lkey};
		at += len;
		off += len + GAP;
	}
	*n_sge = size ? n : (unsigned)(roll(c) % 2); /* an empty message: no piece or an empty one */
	c->local_head = pos + need;
	*end = c->local_head;
	return true;
}

static void scatter(const struct entry *e, const uint8_t *from)
{
	for (unsigned i = 0; i < e->n_sge; i++) {
		memcpy((void *)(uintptr_t)e->sge[i].addr, from, e->sge[i].length);
		from += e->sge[i].length;
	}
}

static bool has_room(struct run *r, struct conn *c, const struct chain *ch, unsigned n)
{
	return ch->n + n <= CHAIN && c->head - c->tail + n <= r->opt.depth;
}

static struct entry *add(struct run *r, struct conn *c, struct chain *ch, enum entry_type type,
			 enum ibv_wr_opcode opcode)
{
	static const enum ibv_wc_opcode wc_opcode[] = {
		[IBV_WR_RDMA_WRITE] = IBV_WC_RDMA_WRITE,
		[IBV_WR_RDMA_WRITE_WITH_IMM] = IBV_WC_RDMA_WRITE,
		[IBV_WR_SEND] = IBV_WC_SEND,
		[IBV_WR_SEND_WITH_IMM] = IBV_WC_SEND,
		[IBV_WR_RDMA_READ] = IBV_WC_RDMA_READ,
		[IBV_WR_ATOMIC_CMP_AND_SWP] = IBV_WC_COMP_SWAP,
		[IBV_WR_ATOMIC_FETCH_AND_ADD] = IBV_WC_FETCH_ADD,
	};
	struct entry *e = &c->entries[c->head % r->opt.depth];
	struct ibv_send_wr *wr = &ch->wr[ch->n];

	*e = (struct entry){.wr_id = WR_ID(c, c->head), .type = type, .opcode = wc_opcode[opcode]};
	*wr = (struct ibv_send_wr){.wr_id = e->wr_id, .opcode = opcode, .sg_list = e->sge};
	ch->entry[ch->n++] = e;
	c->head++;
	return e;
}

/* Whether this one gets a completion of its own; often enough that the rings never fill with quiet ones. */
static void choose_signal(struct run *r, struct conn *c, struct entry *e, struct ibv_send_wr *wr, bool must)
{
	c->quiet_run++;
	c->quiet_bytes += e->op.size + (MAX_SGE + 2) * GAP;
	e->signalled = must || roll(c) % 2 || c->quiet_run >= 12 || c->quiet_bytes > c->local_size / 6;
	if (!e->signalled) {
		r->unsignalled++;
		return;
	}
	wr->send_flags |= IBV_SEND_SIGNALED;
	c->quiet_run = c->quiet_bytes = 0;
}

static void read_credit(struct run *r, struct conn *c, struct chain *ch)
{
	struct entry *e;
	struct ibv_send_wr *wr;

	if (c->credit_busy || !has_room(r, c, ch, 1))
		return;
	e = add(r, c, ch, E_CREDIT, IBV_WR_RDMA_READ);
	wr = &ch->wr[ch->n - 1];
	e->n_sge = 1;
	e->sge[0] =
		(struct ibv_sge){.addr = (uintptr_t)c->credit_slot, .length = 8, .lkey = c->local_mr->lkey};
	e->local_end = c->local_head;
	wr->num_sge = 1;
	wr->wr.rdma.remote_addr = c->theirs.counter;
	wr->wr.rdma.rkey = c->theirs.window_rkey;
	choose_signal(r, c, e, wr, true);
	c->credit_busy = true;
	r->credit_reads++;
}

/* Write a pattern to the peer's scratch area and read it back: the READ must see the WRITE. */
static bool add_readback(struct run *r, struct conn *c, struct chain *ch)
{
	struct entry *w, *e;
	struct ibv_send_wr *wr;
	uint64_t saved = c->local_head;
	struct ibv_sge sge[2][MAX_SGE];
	unsigned n[2];
	uint64_t end[2];
	uint64_t key = roll(c);

	if (!has_room(r, c, ch, 2))
		return false;
	if (!local_alloc(c, c->op.size, 1 + roll(c) % r->opt.sges, sge[0], &n[0], &end[0]) ||
	    !local_alloc(c, c->op.size, 1 + roll(c) % r->opt.sges, sge[1], &n[1], &end[1])) {
		c->local_head = saved;
		return false;
	}
	for (int i = 0; i < 2; i++) {
		e = add(r, c, ch, i ? E_SCRATCH_READ : E_SCRATCH_WRITE,
			i ? IBV_WR_RDMA_READ : IBV_WR_RDMA_WRITE);
		wr = &ch->wr[ch->n - 1];
		memcpy(e->sge, sge[i], sizeof(sge[i]));
		e->n_sge = n[i];
		e->local_end = end[i];
		e->op = c->op;
		e->key = key;
		wr->num_sge = (int)n[i];
		wr->wr.rdma.remote_addr = c->theirs.scratch;
		wr->wr.rdma.rkey = c->theirs.window_rkey;
		choose_signal(r, c, e, wr, false);
		if (i == 0) {
			w = e;
			scatter(w, pattern(r->expect, key, 0, c->op.size));
		}
	}
	c->scratch_busy = true;
	return true;
}

/* Three in four additions or exchanges that hit; the others find another value. */
static bool add_atomic(struct run *r, struct conn *c, struct chain *ch)
{
	bool add_to = roll(c) % 2, hit = roll(c) % 2;
	uint64_t with = roll(c);
	struct ibv_sge sge[MAX_SGE];
	struct ibv_send_wr *wr;
	struct entry *e;
	unsigned n_sge;
	uint64_t end;

	if (!has_room(r, c, ch, 1) || !local_alloc(c, 8, 1, sge, &n_sge, &end))
		return false;
	e = add(r, c, ch, E_OP, add_to ? IBV_WR_ATOMIC_FETCH_AND_ADD : IBV_WR_ATOMIC_CMP_AND_SWP);
	wr = &ch->wr[ch->n - 1];
	e->op = c->op;
	e->n_sge = 1;
	e->local_end = end;
	e->sge[0] = sge[0];
	e->key = c->word;
	wr->num_sge = 1;
	wr->wr.atomic.remote_addr = c->theirs.counter + 8;
	wr->wr.atomic.rkey = c->theirs.window_rkey;
	wr->wr.atomic.compare_add = add_to ? with : hit ? c->word : ~c->word;
	wr->wr.atomic.swap = with;
	if (add_to)
		c->word += with;
	else if (hit)
		c->word = with;
	choose_signal(r, c, e, wr, false);
	return true;
}

static bool add_op(struct run *r, struct conn *c, struct chain *ch)
{
	static const enum ibv_wr_opcode opcode[K_COUNT] = {
		[K_SEND] = IBV_WR_SEND,	       [K_SEND_IMM] = IBV_WR_SEND_WITH_IMM,
		[K_WRITE] = IBV_WR_RDMA_WRITE, [K_WRITE_IMM] = IBV_WR_RDMA_WRITE_WITH_IMM,
		[K_READ] = IBV_WR_RDMA_READ,
	};
	const struct op *op = &c->op;
	struct ibv_sge sge[MAX_SGE];
	struct ibv_send_wr *wr;
	struct entry *e;
	unsigned n_sge;
	uint64_t end;
	uint8_t *m;

	if (op->kind == K_ATOMIC)
		return add_atomic(r, c, ch);
	if (op->kind == K_READ && !c->scratch_busy && roll(c) % 3 == 0)
		return add_readback(r, c, ch);
	if (!has_room(r, c, ch, 1) ||
	    !local_alloc(c, op->size, roll(c) % 2 ? 1 : 1 + roll(c) % r->opt.sges, sge, &n_sge, &end))
		return false;
	e = add(r, c, ch, E_OP, opcode[op->kind]);
	wr = &ch->wr[ch->n - 1];
	e->op = *op;
	e->n_sge = n_sge;
	e->local_end = end;
	memcpy(e->sge, sge, sizeof(sge));
	wr->num_sge = (int)n_sge;
	if (n_sge > 1)
		r->scattered++;

	if (op->kind == K_READ) {
		wr->wr.rdma.remote_addr = c->theirs.source + op->read_off;
		wr->wr.rdma.rkey = c->theirs.source_rkey;
	} else {
		m = message(r->expect, &c->tx, op);
		if (r->opt.corrupt_every && op->size && ++r->corruptible % r->opt.corrupt_every == 0) {
			m[roll(c) % op->size] ^= (uint8_t)(1u << roll(c) % 8);
			r->corrupted++;
		}
		scatter(e, m);
		if (op->size <= c->inline_max && roll(c) % 2) {
			wr->send_flags |= IBV_SEND_INLINE;
			r->inlined++;
		}
	}
	if (op->kind == K_WRITE || op->kind == K_WRITE_IMM) {
		wr->wr.rdma.remote_addr = c->theirs.ring + op->ring_off;
		wr->wr.rdma.rkey = c->theirs.window_rkey;
	}
	if (op->kind == K_SEND_IMM || op->kind == K_WRITE_IMM)
		wr->imm_data = htonl((uint32_t)op->seq & IMM_MASK);
	if (!r->opt.no_fence && roll(c) % 32 == 0) {
		wr->send_flags |= IBV_SEND_FENCE;
		r->fenced++;
	}
	choose_signal(r, c, e, wr, false);
	return true;
}

static bool add_fin(struct run *r, struct conn *c, struct chain *ch)
{
	uint64_t count = c->tx.next - c->have_op; /* what was drawn but not posted does not count */
	struct ibv_send_wr *wr;
	struct entry *e;
	struct ibv_sge sge[MAX_SGE];
	unsigned n_sge;
	uint64_t end;

	if (!has_room(r, c, ch, 1) || !local_alloc(c, sizeof(count), 1, sge, &n_sge, &end))
		return false;
	e = add(r, c, ch, E_FIN, IBV_WR_SEND_WITH_IMM);
	wr = &ch->wr[ch->n - 1];
	e->n_sge = 1;
	e->local_end = end;
	e->sge[0] = sge[0];
	scatter(e, (uint8_t *)&count);
	wr->num_sge = 1;
	wr->imm_data = htonl(FIN_IMM | (r->stopping ? FIN_STOP : 0));
	choose_signal(r, c, e, wr, true);
	c->fin_posted = true;
	return true;
}

static int post_new(struct run *r, struct conn *c, struct chain *ch)
{
	struct ibv_qp_ex *q = c->qpx;

	if (roll(c) % 64 == 0) { /* what is aborted must leave no trace */
		ibv_wr_start(q);
		q->wr_id = ~0ull;
		q->wr_flags = IBV_SEND_SIGNALED;
		ibv_wr_send(q);
		ibv_wr_set_sge(q, c->local_mr->lkey, (uintptr_t)c->local_ring, 8);
		ibv_wr_abort(q);
	}
	ibv_wr_start(q);
	for (unsigned i = 0; i < ch->n; i++) {
		struct ibv_send_wr *wr = &ch->wr[i];
		size_t n = (size_t)wr->num_sge;

		q->wr_id = wr->wr_id;
		q->wr_flags = wr->send_flags; /* with IBV_SEND_INLINE: rdma-core's rxe wants to be told */
		switch (wr->opcode) {
		case IBV_WR_SEND: ibv_wr_send(q); break;
		case IBV_WR_SEND_WITH_IMM: ibv_wr_send_imm(q, wr->imm_data); break;
		case IBV_WR_RDMA_WRITE:
			ibv_wr_rdma_write(q, wr->wr.rdma.rkey, wr->wr.rdma.remote_addr);
			break;
		case IBV_WR_RDMA_WRITE_WITH_IMM:
			ibv_wr_rdma_write_imm(q, wr->wr.rdma.rkey, wr->wr.rdma.remote_addr, wr->imm_data);
			break;
		case IBV_WR_ATOMIC_CMP_AND_SWP:
			ibv_wr_atomic_cmp_swp(q, wr->wr.atomic.rkey, wr->wr.atomic.remote_addr,
					      wr->wr.atomic.compare_add, wr->wr.atomic.swap);
			break;
		case IBV_WR_ATOMIC_FETCH_AND_ADD:
			ibv_wr_atomic_fetch_add(q, wr->wr.atomic.rkey, wr->wr.atomic.remote_addr,
						wr->wr.atomic.compare_add);
			break;
		default: ibv_wr_rdma_read(q, wr->wr.rdma.rkey, wr->wr.rdma.remote_addr); break;
		}
		if (wr->send_flags & IBV_SEND_INLINE) {
			struct ibv_data_buf bufs[MAX_SGE];

			for (size_t k = 0; k < n; k++)
				bufs[k] =
					(struct ibv_data_buf){.addr = (void *)(uintptr_t)wr->sg_list[k].addr,
							      .length = wr->sg_list[k].length};
			if (n == 1)
				ibv_wr_set_inline_data(q, bufs[0].addr, bufs[0].length);
			else
				ibv_wr_set_inline_data_list(q, n, bufs);
		} else if (n == 1) {
			ibv_wr_set_sge(q, wr->sg_list->lkey, wr->sg_list->addr, wr->sg_list->length);
		} else {
			ibv_wr_set_sge_list(q, n, wr->sg_list);
		}
	}
	(void)r;
	return ibv_wr_complete(q);
}

static void post(struct run *r, struct conn *c, struct chain *ch)
{
	struct ibv_send_wr *bad = NULL;
	int rc;

	for (unsigned i = 0; i + 1 < ch->n; i++)
		ch->wr[i].next = &ch->wr[i + 1];
	rc = r->opt.new_api ? post_new(r, c, ch) : ibv_post_send(c->qp, ch->wr, &bad);
	if (rc) {
		fatal(r, "QP %u: posting %u requests: %s", c->index, ch->n, strerror(rc));
		return;
	}
	for (unsigned i = 0; i < ch->n; i++) { /* inline data is taken at once: the buffer is ours again */
		if (!(ch->wr[i].send_flags & IBV_SEND_INLINE))
			continue;
		for (unsigned k = 0; k < ch->entry[i]->n_sge; k++)
			memset((void *)(uintptr_t)ch->entry[i]->sge[k].addr, 0xee,
			       ch->entry[i]->sge[k].length);
	}
	r->chains++;
}

static bool finished(struct run *r, struct conn *c, int64_t now)
{
	const struct terms *t = &r->opt.terms;

	return r->stopping || (t->messages && c->tx.next - c->have_op >= t->messages) ||
	       (r->deadline && now >= r->deadline);
}

void pump(struct run *r, struct conn *c, int64_t now)
{
	uint32_t ring = plan_ring_size(&r->opt.terms.plan);
	struct chain ch = {.n = 0};

	if (c->fin_posted || !c->sends)
		return;
	while (ch.n < CHAIN) {
		if (finished(r, c, now)) {
			add_fin(r, c, &ch);
			break;
		}
		if (!c->have_op) {
			plan_next(&c->tx, &c->op);
			c->have_op = true;
		}
		if (c->op.ring_end && now >= c->credit_after && c->op.ring_end > c->credited + ring / 2)
			read_credit(r, c, &ch);
		if (c->op.ring_end > c->credited + ring || !rate_allows(r, now) || !add_op(r, c, &ch))
			break;
		c->have_op = false;
		r->tokens -= 1;
		r->sent.ops[c->op.kind]++;
		r->sent.bytes += c->op.size;
	}
	if (ch.n)
		post(r, c, &ch);
}

bool rate_allows(struct run *r, int64_t now)
{
	if (r->opt.rate == 0)
		return true;
	if (r->token_time)
		r->tokens += (double)(now - r->token_time) * 1e-9 * r->opt.rate;
	r->token_time = now;
	if (r->tokens > 32) /* what could not be sent in a pause is not made up for */
		r->tokens = 32;
	return r->tokens >= 1;
}

/* The data that a READ brought, and nothing around it. */
static void check_read(struct run *r, struct conn *c, const struct entry *e)
{
	const uint8_t *want;
	uint8_t *at = r->gathered;
	char why[160];

	if (e->op.kind == K_ATOMIC)
		want = (const uint8_t *)&e->key;
	else if (e->type == E_SCRATCH_READ)
		want = pattern(r->expect, e->key, 0, e->op.size);
	else
		want = pattern(r->expect, plan_source_key(&c->tx), e->op.read_off, e->op.size);
	for (unsigned i = 0; i < e->n_sge; i++) {
		const uint8_t *p = (const uint8_t *)(uintptr_t)e->sge[i].addr;
		uint32_t len = e->sge[i].length;

		memcpy(at, p, len);
		at += len;
		for (unsigned k = 1; k <= 16; k++)
			if (p[-(int)k] != CANARY || p[len - 1 + k] != CANARY) {
				wrong(r, "QP %u: %s %llu wrote outside of its buffer", c->index,
				      kind_name[e->op.kind], (unsigned long long)e->op.seq);
				break;
			}
	}
	if (memcmp(r->gathered, want, e->op.size)) {
		message_explain(r->gathered, want, e->op.size, why, sizeof(why));
		wrong(r, "QP %u: %s %llu%s: %s", c->index, kind_name[e->op.kind],
		      (unsigned long long)e->op.seq, e->type == E_SCRATCH_READ ? " (back)" : "", why);
	}
}

static void finish_entry(struct run *r, struct conn *c, struct entry *e, int64_t now)
{
	uint64_t value;

	c->tail++;
	c->local_tail = e->local_end;
	switch (e->type) {
	case E_OP:
		if (e->op.kind == K_READ || e->op.kind == K_ATOMIC)
			check_read(r, c, e);
		break;
	case E_SCRATCH_READ:
		check_read(r, c, e);
		c->scratch_busy = false;
		break;
	case E_CREDIT:
		value = *c->credit_slot;
		if (value < c->credited || value > c->tx.ring_pos)
			wrong(r, "QP %u: the peer's counter went from %llu to %llu (written: %llu)", c->index,
			      (unsigned long long)c->credited, (unsigned long long)value,
			      (unsigned long long)c->tx.ring_pos);
		if (value == c->credited)
			c->credit_after = now + 50000;
		c->credited = value;
		c->credit_busy = false;
		break;
	case E_FIN: c->tx_done = true; break;
	case E_SCRATCH_WRITE: break;
	}
}

void retire(struct run *r, struct conn *c, const struct ibv_wc *wc)
{
	int64_t now = now_ns();

	for (;;) {
		struct entry *e = &c->entries[c->tail % r->opt.depth];
		bool same = e->wr_id == wc->wr_id;

		if (c->tail == c->head) {
			fatal(r, "QP %u: a completion for wr_id %llx, but nothing is outstanding", c->index,
			      (unsigned long long)wc->wr_id);
			return;
		}
		if (same != e->signalled) {
			fatal(r, "QP %u: %s: wr_id %llx completed, the oldest signalled one is %llx",
			      c->index, same ? "an unsignalled request completed" : "completion out of order",
			      (unsigned long long)wc->wr_id, (unsigned long long)e->wr_id);
			return;
		}
		if (same && wc->opcode != e->opcode)
			wrong(r, "QP %u: completion says opcode %d instead of %d", c->index, (int)wc->opcode,
			      (int)e->opcode);
		finish_entry(r, c, e, now);
		if (same)
			return;
	}
}
