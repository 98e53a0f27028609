/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * sim.h - the simulator's own parts. See simapi.h for what it offers.
 *
 *   simapi.c  verbs and engine calls of the flat API
 *   simsrq.c  ... those about shared receive queues and XRC
 *   world.c   the virtual clock: events, timers, calling the engines, completion log
 *   link.c    from mg_tx to mg_rx: adversity, rules, routes, stand-ins, injection
 *   datagram.c  address handles and multicast of the flat API
 *   trace.c   text of what happens
 */
#ifndef MG_SIM_H
#define MG_SIM_H

#include "sim/simapi.h"
#include "transport/engine.h"
#include "wire/wire.h"

#include <stdarg.h>

#define SIM_MAX_ENGINES 16
#define SIM_MAX_STANDINS 32
#define SIM_MAX_RULES 64
#define SIM_TX_MAX 64
#define SIM_SPIN_MAX 16

struct sim_packet {
	uint64_t t; /* delivery */
	uint64_t seq;
	uint8_t src[16], dst[16];
	uint16_t sport, ip_id;
	uint8_t tclass, hop_limit;
	bool damaged;
	int from;   /* engine, -1 injected */
	int member; /* multicast: the engine that this copy is for, + 1 */
	int to;	    /* stand-in id, once in its inbox */
	uint32_t len;
	uint8_t data[]; /* nothing after it: ASan sees an overread */
};

struct sim_heap {
	struct sim_packet **v;
	size_t n, cap;
};

struct sim_engine {
	struct mgs_world *w;
	struct mg_engine *e; /* NULL: freed */
	int index;
	bool attached;
	uint8_t gid[16];
	struct mgs_engine_config cfg;
	uint64_t offset; /* engine time = world time + offset */
	uint64_t rng;
	uint64_t flush_at;     /* a non-lazy mg_tx is promised by then */
	mg_time seen_deadline; /* its own clock; */
	uint64_t due;	       /* the world's, with slack */
	uint64_t spin_at;
	unsigned spin;
	uint8_t *arena;
};

struct sim_cq {
	struct mg_cq *cq; /* NULL: freed */
	int engine, mode;
	bool event;
	bool armed;
	uint64_t events;
};

struct sim_qp {
	struct mg_qp *qp;
	int engine;
};

struct sim_ah {
	struct mg_ah *ah;
	int engine;
};

struct sim_pd {
	struct mg_pd *pd;
	int engine;
};

struct sim_mr {
	struct mg_mr *mr;
	int engine;
};

struct sim_srq {
	struct mg_srq *srq;
	int engine;
};

struct sim_xrcd {
	struct mg_xrcd *xrcd;
	int engine;
};

struct sim_mw {
	struct mg_mw *mw;
	int engine;
};

struct sim_link {
	struct mgs_link p;
	uint64_t free_at; /* the wire is busy until */
	uint64_t last;	  /* latest in-order arrival so far */
	uint32_t burst_left;
};

struct sim_standin {
	bool on;
	uint8_t gid[16];
	uint32_t qpn_base, qpn_count;
};

/* How often something was lost, by key: open addressing, key 0 is free. */
struct sim_tally {
	uint64_t *key;
	uint32_t *count;
	size_t n, cap;
};

struct mgs_world {
	uint64_t now, seq, rng;
	uint64_t budget;
	bool break_wc, break_async;
	struct sim_engine engine[SIM_MAX_ENGINES];
	int n_engine;
	struct sim_cq *cq;
	struct sim_qp *qp;
	struct sim_pd *pd;
	struct sim_mr *mr;
	struct sim_ah *ah;
	int n_ah, cap_ah;
	struct sim_mw *mw;
	int n_mw, cap_mw;
	int n_cq, n_qp, n_pd, n_mr, cap_cq, cap_qp, cap_pd, cap_mr;
	struct sim_srq *srq;
	struct sim_xrcd *xrcd;
	int n_srq, n_xrcd, cap_srq, cap_xrcd;
	struct sim_link link[SIM_MAX_ENGINES][SIM_MAX_ENGINES];
	struct mgs_rule rule[SIM_MAX_RULES];
	uint32_t rule_seen[SIM_MAX_RULES];
	int n_rule;
	struct sim_standin standin[SIM_MAX_STANDINS];
	struct sim_heap heap;
	struct sim_packet **inbox, **captured;
	size_t n_inbox, inbox_head, cap_inbox, n_captured, cap_captured;
	struct sim_tally tally;
	struct mgs_wc *wc;
	size_t n_wc, wc_head, cap_wc;
	struct mgs_async *async;
	size_t n_async, async_head, cap_async;
	struct mgs_stats stats;
	bool violated;
	char violation[256];
	bool tracing;
	char *trace, *trace_out;
	size_t trace_len, trace_cap;
	int mutation;
	uint64_t mutate_at, wc_count;
	bool wc_held_set;
	struct mgs_wc wc_held;
	struct mg_pkt tx[SIM_TX_MAX];
};

/* Abort on a failed allocation: this is a test tool. Grows *cap so that index n fits. */
void *sim_grow(void *v, size_t n, size_t *cap, size_t elem);
uint64_t sim_rand(uint64_t *state);
uint64_t sim_below(uint64_t *state, uint64_t n); /* 0..n-1; 0 for n = 0 */
static inline bool sim_chance(uint64_t *state, uint32_t ppm)
{
	return ppm && sim_below(state, 1000000) < ppm;
}

void sim_violate(struct mgs_world *w, const char *fmt, ...) __attribute__((format(printf, 2, 3)));

/* world.c */
static inline mg_time sim_engine_now(const struct sim_engine *e)
{
	return e->w->now + e->offset;
}
uint64_t sim_deadline(const struct sim_engine *e); /* world time, never before now */
void sim_after(struct sim_engine *e, bool lazy);   /* after any call into it: send, poll, check */
void sim_poll_cq(struct mgs_world *w, int i);
struct sim_engine *sim_engine_get(struct mgs_world *w, int i); /* NULL: no such */
/* The same for pd, mr, mw, cq, qp, srq, xrcd. */
#define SIM_GET(w, what, i) ((i) >= 0 && (i) < (w)->n_##what && (w)->what[i].what ? &(w)->what[i] : NULL)
/* Room for one more, zeroed; its index. */
#define SIM_SLOT(w, what) sim_slot((void **)&(w)->what, &(w)->n_##what, &(w)->cap_##what, sizeof(*(w)->what))
int sim_slot(void **v, int *n, int *cap, size_t elem);
extern const struct mg_ops sim_ops;

/* link.c */
void sim_send(struct sim_engine *e, const struct mg_pkt *p, unsigned index);
void sim_deliver(struct mgs_world *w, struct sim_packet *p); /* takes it */
struct sim_packet *sim_heap_pop(struct sim_heap *h);
struct mg_ah *sim_ah_get(struct mgs_world *w, int ah); /* NULL: no such */
bool sim_joined(const struct sim_engine *e, const uint8_t gid[16]);
void sim_link_free(struct mgs_world *w);

/* trace.c */
void sim_trace(struct mgs_world *w, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void sim_trace_packet(struct mgs_world *w, const char *what, const struct sim_packet *p, int to);

#endif
