/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * world.c - the virtual clock and what a host does around an engine: hand packets in, serve its
 * deadline, send what it has, poll its CQs; and the rules of engine.h that can be checked there.
 */
#include "sim/sim.h"

#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void *sim_grow(void *v, size_t n, size_t *cap, size_t elem)
{
	if (n < *cap)
		return v;
	while (n >= *cap)
		*cap = *cap ? 2 * *cap : 64;
	v = realloc(v, *cap * elem);
	if (!v)
		abort();
	return v;
}

/* splitmix64 */
uint64_t sim_rand(uint64_t *state)
{
	uint64_t z = *state += 0x9e3779b97f4a7c15u;

	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
	z = (z ^ z >> 27) * 0x94d049bb133111ebu;
	return z ^ z >> 31;
}

uint64_t sim_below(uint64_t *state, uint64_t n)
{
	return n > 1 ? sim_rand(state) % n : 0;
}

void sim_violate(struct mgs_world *w, const char *fmt, ...)
{
	va_list ap;

	if (w->violated)
		return;
	w->violated = true;
	va_start(ap, fmt);
	vsnprintf(w->violation, sizeof(w->violation), fmt, ap);
	va_end(ap);
	sim_trace(w, "VIOLATION %s", w->violation);
}

/* ---- what the engine asks of us ---- */

static void op_random(void *arg, void *buf, size_t n)
{
	struct sim_engine *e = arg;
	uint8_t *p = buf;

	while (n--)
		*p++ = (uint8_t)(sim_rand(&e->rng) >> 32);
}

static void op_cq_event(void *arg, struct mg_cq *cq)
{
	struct sim_engine *e = arg;

	for (int i = 0; i < e->w->n_cq; i++) {
		struct sim_cq *c = &e->w->cq[i];

		if (c->cq != cq)
			continue;
		if (!c->armed)
			sim_violate(e->w, "e%d: cq%d: an event, but it was not armed", e->index, i);
		c->armed = false;
		c->event = true;
		c->events++;
	}
}

static void op_async_event(void *arg, enum ibv_event_type type, void *object)
{
	struct sim_engine *e = arg;
	struct mgs_world *w = e->w;
	struct mgs_async a = {.t = w->now,
			      .engine = (uint32_t)e->index,
			      .type = (uint32_t)type,
			      .qp = -1,
			      .cq = -1,
			      .srq = -1};

	for (int i = 0; i < w->n_qp; i++)
		if (object && w->qp[i].qp == object)
			a.qp = i;
	for (int i = 0; i < w->n_cq; i++)
		if (object && w->cq[i].cq == object)
			a.cq = i;
	for (int i = 0; i < w->n_srq; i++)
		if (object && w->srq[i].srq == object)
			a.srq = i;
	w->async = sim_grow(w->async, w->n_async, &w->cap_async, sizeof(*w->async));
	w->async[w->n_async++] = a;
	sim_trace(w, "async    e%d type %d qp%d cq%d srq%d", e->index, (int)type, a.qp, a.cq, a.srq);
}

const struct mg_ops sim_ops = {.random = op_random, .cq_event = op_cq_event, .async_event = op_async_event};

/* ---- completions ---- */

static void wc_append(struct mgs_world *w, const struct mgs_wc *wc)
{
	w->wc = sim_grow(w->wc, w->n_wc, &w->cap_wc, sizeof(*w->wc));
	w->wc[w->n_wc++] = *wc;
}

static void wc_log(struct mgs_world *w, struct mgs_wc wc)
{
	const bool mine = ++w->wc_count == w->mutate_at;

	sim_trace(w, "wc       e%u cq%u wr %" PRIu64 " status %u opcode %u qp %06x len %u", wc.engine, wc.cq,
		  wc.wr_id, wc.status, wc.opcode, wc.qp_num, wc.byte_len);
	if (mine && w->mutation == MGS_MUT_LOSE_WC)
		return;
	if (mine && w->mutation == MGS_MUT_SWAP_WC) {
		w->wc_held = wc;
		w->wc_held_set = true;
		return;
	}
	if (mine && w->mutation == MGS_MUT_ERROR_WC)
		wc.status = IBV_WC_GENERAL_ERR;
	if (mine && w->mutation == MGS_MUT_FLIP_MEMORY) {
		struct sim_engine *e = &w->engine[wc.engine];

		e->arena[e->cfg.arena - 1] ^= 0x10; /* nothing that arrives later covers it up */
	}
	wc_append(w, &wc);
	if (mine && w->mutation == MGS_MUT_DUP_WC)
		wc_append(w, &wc);
	if (w->wc_held_set && w->wc_held.cq == wc.cq) {
		w->wc_held_set = false;
		wc_append(w, &w->wc_held);
	}
}

static struct mgs_wc wc_flat(const struct mgs_world *w, int cq, const struct ibv_wc *c)
{
	return (struct mgs_wc){
		.t = w->now,
		.wr_id = c->wr_id,
		.engine = (uint32_t)w->cq[cq].engine,
		.cq = (uint32_t)cq,
		.status = (uint32_t)c->status,
		.opcode = (uint32_t)c->opcode,
		.vendor_err = c->vendor_err,
		.byte_len = c->byte_len,
		.imm = c->wc_flags & IBV_WC_WITH_IMM   ? __builtin_bswap32(c->imm_data)
		       : c->wc_flags & IBV_WC_WITH_INV ? c->invalidated_rkey
						       : 0,
		.qp_num = c->qp_num,
		.src_qp = c->src_qp,
		.flags = (uint32_t)c->wc_flags,
	};
}

void sim_poll_cq(struct mgs_world *w, int i)
{
	struct ibv_wc wc[16];
	int n;

	do {
		n = mg_cq_poll(w->cq[i].cq, 16, wc);
		if (n < 0 || n > 16) {
			sim_violate(w, "cq%d: mg_cq_poll(16) gave %d", i, n);
			return;
		}
		for (int k = 0; k < n; k++)
			wc_log(w, wc_flat(w, i, &wc[k]));
	} while (n == 16);
}

/* As a program with a completion channel does: poll, arm, poll again for what came in between. */
static void serve_cq(struct mgs_world *w, int i)
{
	struct sim_cq *c = &w->cq[i];

	if (c->mode == MGS_CQ_POLL) {
		sim_poll_cq(w, i);
	} else if (c->mode != MGS_CQ_MANUAL && c->event) {
		c->event = false;
		sim_poll_cq(w, i);
		c->armed = true;
		mg_cq_arm(c->cq, c->mode == MGS_CQ_SOLICITED);
		sim_poll_cq(w, i);
	}
}

int mgs_cq_poll(struct mgs_world *w, int cq, int n, struct mgs_wc *out)
{
	struct ibv_wc wc[64];
	int got;

	if (cq < 0 || cq >= w->n_cq || !w->cq[cq].cq)
		return 0;
	got = mg_cq_poll(w->cq[cq].cq, n < 64 ? n : 64, wc);
	for (int i = 0; i < got; i++)
		out[i] = wc_flat(w, cq, &wc[i]);
	return got;
}

void mgs_cq_sweep(struct mgs_world *w, int cq)
{
	if (cq >= 0 && cq < w->n_cq && w->cq[cq].cq)
		sim_poll_cq(w, cq);
}

static int drain(void *out, int max, void *v, size_t *head, size_t *n, size_t elem)
{
	size_t k = *n - *head;

	if (k > (size_t)max)
		k = (size_t)max;
	if (k)
		memcpy(out, (char *)v + *head * elem, k * elem);
	*head += k;
	if (*head == *n)
		*head = *n = 0;
	return (int)k;
}

int mgs_wc_drain(struct mgs_world *w, struct mgs_wc *out, int max)
{
	return drain(out, max, w->wc, &w->wc_head, &w->n_wc, sizeof(*out));
}

int mgs_async_drain(struct mgs_world *w, struct mgs_async *out, int max)
{
	return drain(out, max, w->async, &w->async_head, &w->n_async, sizeof(*out));
}

/* ---- calling the engine ---- */

uint64_t sim_deadline(const struct sim_engine *e)
{
	const mg_time d = mg_deadline(e->e), now = sim_engine_now(e);

	if (d == MG_NEVER)
		return MG_NEVER;
	return d <= now ? e->w->now : e->w->now + (d - now);
}

static void pump(struct sim_engine *e, unsigned flags)
{
	struct mgs_world *w = e->w;
	const size_t batch = e->cfg.tx_batch;
	size_t n, total = 0;

	do {
		n = mg_tx(e->e, sim_engine_now(e), flags, w->tx, batch);
		if (n > batch) {
			sim_violate(w, "e%d: mg_tx(%zu) gave %zu", e->index, batch, n);
			return;
		}
		for (size_t i = 0; i < n; i++)
			sim_send(e, &w->tx[i], (unsigned)i);
		total += n;
		if (total > 100000) {
			sim_violate(w, "e%d: mg_tx never ends: %zu packets at one instant", e->index, total);
			return;
		}
	} while (n == batch);
	if (mg_stopped(e->e) && total)
		sim_violate(w, "e%d: stopped, but mg_tx gave %zu packets", e->index, total);
	if (!(flags & MG_TX_LAZY) && mg_tx_pending(e->e))
		sim_violate(w, "e%d: mg_tx gave less than asked for, but mg_tx_pending", e->index);
}

static bool more_now(const struct sim_engine *e)
{
	const struct mgs_world *w = e->w;

	return w->heap.n && w->heap.v[0]->t == w->now && !memcmp(w->heap.v[0]->dst, e->gid, 16);
}

void sim_after(struct sim_engine *e, bool lazy)
{
	struct mgs_world *w = e->w;
	mg_time d;

	if (lazy && (e->cfg.batch_window || more_now(e))) {
		const uint64_t at = w->now + e->cfg.batch_window;

		if (!e->cfg.train)
			pump(e, MG_TX_LAZY);
		if (e->flush_at > at)
			e->flush_at = at;
	} else {
		pump(e, 0);
		e->flush_at = MG_NEVER;
	}
	for (int i = 0; i < w->n_cq; i++)
		if (w->cq[i].cq && w->cq[i].engine == e->index)
			serve_cq(w, i);
	d = mg_deadline(e->e);
	if (d != MG_NEVER && mg_stopped(e->e))
		sim_violate(w, "e%d: stopped, but a timer runs", e->index);
	if (d != e->seen_deadline) {
		e->seen_deadline = d;
		e->due = sim_deadline(e);
		if (d != MG_NEVER)
			e->due += sim_below(&w->rng, e->cfg.timer_slack + 1);
	}
}

static void run_timer(struct sim_engine *e)
{
	struct mgs_world *w = e->w;

	if (e->spin_at != w->now) {
		e->spin_at = w->now;
		e->spin = 0;
	}
	if (++e->spin > SIM_SPIN_MAX) {
		sim_violate(w, "e%d: the deadline stays in the past: %u mg_timer calls at one instant",
			    e->index, e->spin);
		return;
	}
	w->stats.timer_calls++;
	sim_trace(w, "timer    e%d", e->index);
	mg_timer(e->e, sim_engine_now(e));
	sim_after(e, false);
}

/* The next thing to happen: returns its time, *who the engine or -1 for a packet. */
static uint64_t next_event(struct mgs_world *w, int *who, bool *flush)
{
	uint64_t t = w->heap.n ? w->heap.v[0]->t : MG_NEVER;

	*who = -1;
	*flush = false;
	for (int i = 0; i < w->n_engine; i++) {
		struct sim_engine *e = &w->engine[i];

		if (!e->e)
			continue;
		if (e->due < t) {
			t = e->due;
			*who = i;
			*flush = false;
		}
		if (e->flush_at < t) {
			t = e->flush_at;
			*who = i;
			*flush = true;
		}
	}
	return t;
}

static int reason_to_stop(const struct mgs_world *w)
{
	if (w->violated)
		return MGS_VIOLATION;
	if (w->inbox_head < w->n_inbox)
		return MGS_STANDIN;
	if (w->break_wc && w->wc_head < w->n_wc)
		return MGS_WC;
	if (w->break_async && w->async_head < w->n_async)
		return MGS_ASYNC;
	return -1;
}

int mgs_run(struct mgs_world *w, uint64_t until)
{
	for (;;) {
		int r = reason_to_stop(w), who;
		bool flush;
		uint64_t t;

		if (r >= 0)
			return r;
		t = next_event(w, &who, &flush);
		if (t == MG_NEVER || t > until) {
			if (until != MG_NEVER && until > w->now)
				w->now = until;
			return t == MG_NEVER ? MGS_QUIET : MGS_UNTIL;
		}
		if (!w->budget)
			return MGS_BUDGET;
		w->budget--;
		w->stats.events++;
		if (t > w->now)
			w->now = t;
		if (who < 0) {
			sim_deliver(w, sim_heap_pop(&w->heap));
		} else if (flush) {
			sim_after(&w->engine[who], false);
		} else {
			run_timer(&w->engine[who]);
		}
		for (int i = 0; i < w->n_engine; i++) {
			struct sim_engine *e = &w->engine[i];

			if (e->e && e->cfg.early_timer && !mg_stopped(e->e) &&
			    sim_chance(&w->rng, e->cfg.early_timer)) {
				mg_timer(e->e, sim_engine_now(e));
				sim_after(e, false);
			}
		}
	}
}

/* ---- the world ---- */

struct mgs_world *mgs_world_new(uint64_t seed)
{
	struct mgs_world *w = calloc(1, sizeof(*w));

	if (!w)
		return NULL;
	w->rng = seed;
	w->now = 1000000; /* not 0: engines must not take 0 for "never set" by luck */
	w->budget = UINT64_MAX;
	return w;
}

void mgs_world_free(struct mgs_world *w)
{
	if (!w)
		return;
	for (int i = 0; i < w->n_engine; i++) {
		if (w->engine[i].e)
			mg_engine_destroy(w->engine[i].e);
		free(w->engine[i].arena);
	}
	sim_link_free(w);
	free(w->cq);
	free(w->qp);
	free(w->pd);
	free(w->ah);
	free(w->mr);
	free(w->srq);
	free(w->xrcd);
	free(w->mw);
	free(w->wc);
	free(w->async);
	free(w->trace);
	free(w->trace_out);
	free(w);
}

uint64_t mgs_now(const struct mgs_world *w)
{
	return w->now;
}

void mgs_set_budget(struct mgs_world *w, uint64_t events)
{
	w->budget = events;
}

void mgs_set_break(struct mgs_world *w, int on_wc, int on_async)
{
	w->break_wc = on_wc != 0;
	w->break_async = on_async != 0;
}

const char *mgs_violation(const struct mgs_world *w)
{
	return w->violated ? w->violation : NULL;
}

void mgs_get_stats(const struct mgs_world *w, struct mgs_stats *out)
{
	*out = w->stats;
}

/* See enum mgs_mutation: the n-th completion (from 1, of all engines) is the one that suffers. */
void mgs_mutate(struct mgs_world *w, int mutation, uint64_t n)
{
	w->mutation = mutation;
	w->mutate_at = n;
}
