/* SPDX-License-Identifier: BSD-3-Clause */
/* keepcheck.h - what keepsetup.c (objects), keepload.c (traffic meanwhile) and keepcheck.c share. */
#ifndef KEEPCHECK_H
#define KEEPCHECK_H

#include "mgcheck.h" /* tcp_*, die, now_ns */

#include <stddef.h>

enum {
	Q_LOAD,	   /* keepload.c's */
	Q_SRQ,	   /* receives from the shared queue */
	Q_CHANNEL, /* its receives are told by a channel */
	Q_RNR,	   /* its sends wait for the peer's receives */
	Q_OVER,	   /* its completion queue overflows */
	Q_SINK,	   /* takes what the peer's Q_OVER sends */
	Q_WINDOW,  /* memory windows are bound by it */
	Q_DENIED,  /* tries what must be refused... */
	Q_DENIES,  /* ...by this one of the peer's */
	Q_XSEND,
	Q_XRECV,
	Q_UC,
	Q_UD,
	QPS
};

#define SLOT 1024u
#define DEPTH 8u /* of receive queues */
#define LIMIT 4u /* of the shared one */
#define QKEY 0x11223344u
#define GRH 40u
#define REMOTE (IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC)
#define RECV_AT 0u	   /* slots of receives */
#define SEND_AT 0x8000u	   /* the same number to send from */
#define WINDOW_AT 0x10000u /* two windows, SLOT each */
#define LOAD_AT 0x12000u   /* struct load_area: the peer's traffic goes there, ours comes from behind it */
#define BUF_SIZE 0x20000u
#define LANES 4u /* rounds of traffic under way at a time */

struct load_area {
	uint64_t counter; /* fetched and added to */
	struct lane {
		uint64_t word; /* written atomically, then flushed */
		uint8_t block[SLOT - 8];
	} lane[LANES];
};

/* What the ends tell each other. */
struct side {
	uint8_t gid[16];
	uint32_t qpn[QPS];
	uint32_t rkey, xsrqn;
	uint64_t addr;
};

struct keep {
	struct ibv_context *ctx;
	struct ibv_pd *pd;
	struct ibv_mr *mr;
	struct ibv_qp *qp[QPS];
	struct ibv_cq *cq, *recv_cq; /* of sends, of receives; the other queues are for what they say */
	struct ibv_cq *srq_cq, *xrc_cq, *channel_cq, *over_cq;
	struct ibv_comp_channel *channel;
	struct ibv_srq *srq, *xsrq;
	struct ibv_xrcd *xrcd;
	struct ibv_ah *ah;
	const char *memory; /* its kind: keepsetup.c */
	uint8_t *buf;
	struct side mine, theirs;
};

/* keepsetup.c */
/* Something is not as it must be: say it and end with 1. */
_Noreturn void broken(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
/* Until the other end has come here, too, as its letter by `tcp` says. */
void keep_meet(int tcp, char where);
void fill(uint8_t *p, size_t n, uint64_t number);
bool filled(const uint8_t *p, size_t n, uint64_t number);

/* What a call has returned, which must not be NULL. */
void *need(void *made, const char *what);
void make(struct keep *k);
void connect_qp(struct keep *k, int q);

/* keepload.c: a thread that never rests. Its completions come by a channel of its own. */
struct ibv_cq *load_cq(struct keep *k); /* for Q_LOAD, which it must be made with */
void load_start(struct keep *k);
void load_advance(uint64_t rounds); /* wait for so many more */
uint64_t load_stop(void);	    /* rounds done: each has added one to the peer's counter */

#endif
