/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * engine.h - fuzz_engine.c in parts: the world of two engines (engine_world.c), its wire (engine_wire.c), its
 * program (engine_app.c).
 */
#ifndef MG_FUZZ_ENGINE_H
#define MG_FUZZ_ENGINE_H

#include "fuzz/fuzz.h"
#include "transport/dump.h"
#include "transport/engine.h"
#include "wire/wire.h"

#define MTU(q) ((q) ? 512u : 256u) /* of connection q: with and without a copy of the payload */
#define DATA_LEN 4096u		   /* all rights */
#define KEPT_LEN 512u		   /* no QP may write here */
#define KEPT_BYTE 0x5a
#define DATA_VA 0x100000u /* not the address, so that an input does the same in every process */
#define KEPT_VA 0x200000u
#define DEPTH 16u
#define CQ_DEPTH 1024u
#define N_QP 2u
#define MAX_STEPS 400
#define MAX_MOVES 6u
#define MAX_ROUNDS 20000
#define WIRE_LEN 64u
#define PKT_MAX (MG_HDR_MAX + MTU(1) + 3 + MG_ICRC_LEN)
#define IDS 1024u
#define START 1000000000u /* ns */

struct flying {
	struct mg_rx meta;
	size_t len;
	uint8_t buf[PKT_MAX];
};

struct conn {
	struct mg_qp *qp;
	uint32_t qpn;
	uint64_t send_next, send_done; /* next to post, next to complete; a wr_id is this * N_QP + index */
	uint64_t recv_next, recv_done;
	uint64_t send_base, recv_base; /* the first since the last reset */
	uint8_t signaled[IDS];
	uint32_t seen[2];  /* PSN of the last response and of the last request sent to it */
	struct mg_meh meh; /* the last one it sent */
};

/* An address that was left, and what the stand-in there knows. */
struct left {
	struct mg_addr from, to;
	struct mg_dump_qp qp[N_QP];
};

struct side {
	struct mg_engine *e;
	struct mg_pd *pd, *other_pd;
	struct mg_mr *data, *kept, *foreign;
	struct mg_mw *mw[2]; /* of type 1 and 2 */
	uint8_t *data_mem, *kept_mem;
	struct mg_cq *send_cq, *recv_cq;
	struct conn c[N_QP];
	struct mg_addr addr;
	mg_time clock; /* what its clock is ahead of the world's */
	bool stopped;
	struct mg_dump_qp at_stop[N_QP];
	struct left left[MAX_MOVES];
	unsigned n_left;
};

struct world {
	struct side s[2];
	struct flying wire[WIRE_LEN];
	size_t flying;
	mg_time now;
	uint64_t seed;
	uint8_t options;
	bool honest;  /* nothing forged, misused or torn down: everything must complete */
	bool overrun; /* a CQ was overrun: completions are missing */
};
extern struct world w;

#define OPT_FEW_RETRIES 1
#define OPT_SMALL_CQ 2
#define OPT_SIG_ALL 4
#define OPT_NO_STANDIN 8
#define OPT_HONEST 16 /* nothing is forged or misused: losses, time and moves only */

static inline mg_time now_of(const struct side *s)
{
	return w.now + s->clock;
}

static inline struct side *other(const struct side *s)
{
	return &w.s[s == w.s];
}

/* ---- engine_world.c ----------------------------------------------------------------------------- */

extern bool tracing;
/* FUZZ_TRACE=1 in the environment: what happens, for whoever reads a reproducer. */
__attribute__((format(printf, 2, 3))) void trace(const struct side *s, const char *fmt, ...);
void trace_packet(const struct side *s, const char *what, const uint8_t *buf, size_t len);
/* Whether to do something that ends the promise that everything completes. */
bool misuse(bool wanted);
void create_side(struct side *s, uint8_t last);
void create_windows(struct side *s);
void connect_qp(struct side *s, unsigned q); /* from RESET to RTS */

/* ---- engine_wire.c ------------------------------------------------------------------------------ */

/* Put onto the wire what side `s` has to send, at most `max` packets. */
size_t transmit(struct side *s, unsigned flags, size_t max);
void hand_over(const struct mg_rx *meta, const uint8_t *buf, size_t len);
/* Deliver packet `i`; it goes on flying if it is kept. */
void deliver(size_t i, bool keep);
/* A captured packet with bytes changed, or cut, or with something behind it, or from elsewhere. */
void deliver_mutated(struct fuzz_in *in, size_t i);
/* A packet nobody sent, of the kind and with the numbers the receiver may expect. */
void forge(struct fuzz_in *in, struct side *to, unsigned q);

/* ---- engine_app.c: of what is posted, completions come in order, once each, and none is missing ----- */

void post_send(struct fuzz_in *in, struct side *s, unsigned q);
void post_recv(struct fuzz_in *in, struct side *s, unsigned q);
size_t poll_side(struct side *s, int n); /* at most n of each queue; returns how many there were */

#endif
