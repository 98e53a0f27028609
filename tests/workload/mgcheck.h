/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * mgcheck - the checking workload: a plain verbs program that sends numbered, CRC'd messages by SEND,
 * WRITE and READ over several QPs, in both directions, and verifies each of them. Works on any RDMA
 * device. `mgcheck --help` says how to use it.
 *
 *   options.c  command line          plan.c    what the messages are
 *   tcp.c      control connection    setup.c   device, memory, QPs
 *   post.c     the initiator's half  check.c   the target's half, completions
 *   mgcheck.c  the run, the verdict
 */
#ifndef MGCHECK_H
#define MGCHECK_H

#include "plan.h"

#include <infiniband/verbs.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>

#define MAX_SGE 4u
#define MAX_QPS 4096u
#define GAP 64u /* canary bytes between the pieces of a scattered buffer */
#define MAX_GAPS 32u
#define MAX_ERRORS_TOLD 8u

enum cq_mode { CQ_SHARED, CQ_SPLIT, CQ_PER_QP };

/* What the client decides for both; goes over the wire as it is. */
struct terms {
	uint32_t magic, version;
	struct plan_config plan;
	uint32_t qps;
	uint32_t directions; /* bit 0: client to server, bit 1: server to client */
	uint64_t messages;   /* per QP and direction; 0: no limit */
	uint64_t seconds_ms; /* 0: no limit */
	uint32_t rnr_every;  /* received messages between two deliberate RNR situations; 0: none */
	uint32_t rnr_ms;
	uint32_t first_psn;  /* UINT32_MAX: random */
	uint32_t mtu;	     /* bytes, 0: what the port has */
	uint32_t idle;	     /* the client waits before it starts (--idle-until) */
	uint32_t tcp_closes; /* --no-tcp-after-setup */
};

struct options {
	const char *server; /* NULL: we are the server */
	const char *tcp_port;
	const char *device;
	int gid_index; /* -1: choose */
	uint8_t ib_port;
	struct terms terms;
	bool events;
	bool new_api;
	bool no_fence;
	enum cq_mode cq_mode;
	uint32_t depth;	     /* send queue */
	uint32_t recv_depth; /* receive queue */
	uint32_t inline_max, sges;
	double rate; /* messages/s of this process, 0: as fast as it goes */
	uint64_t corrupt_every;
	const char *progress;
	const char *idle_until;
	uint32_t stall_s, connect_s, linger_ms;
};

/* What the ends tell each other about a QP. */
struct qp_info {
	uint32_t qpn, psn;
	uint32_t window_rkey, source_rkey;
	uint64_t ring, scratch, counter, source;
};
struct peer_info {
	uint8_t gid[16];
	uint32_t lid, mtu, rd_atomic, has_grh;
};

struct counts {
	uint64_t ops[K_COUNT];
	uint64_t bytes;
};

struct verdict {
	uint64_t errors;
	struct counts sent, received; /* received: READs are not seen by the target */
};

/* A posted send work request, until its completion or a later one's. */
enum entry_type { E_OP, E_FIN, E_CREDIT, E_SCRATCH_WRITE, E_SCRATCH_READ };
struct entry {
	uint64_t wr_id;
	enum entry_type type;
	enum ibv_wc_opcode opcode;
	bool signalled;
	struct op op;
	uint64_t key;	    /* READ of scratch: the pattern that was written; atomic: the result */
	uint64_t local_end; /* in the local ring */
	unsigned n_sge;
	struct ibv_sge sge[MAX_SGE];
};

struct recv_slot {
	uint8_t *base;
	unsigned n_sge;
	struct ibv_sge sge[MAX_SGE];
};

struct conn {
	unsigned index;
	struct ibv_qp *qp;
	struct ibv_qp_ex *qpx;
	struct ibv_cq *send_cq, *recv_cq;
	struct qp_info mine, theirs;

	/* memory: what the peer may write, what it may read, what is ours alone */
	uint8_t *window, *source, *local;
	struct ibv_mr *window_mr, *source_mr, *local_mr;
	uint8_t *ring, *scratch;
	uint64_t *counter; /* in the window: how far we have checked the ring; then the peer's word */

	/* initiator */
	struct plan tx;
	struct op op; /* drawn, not yet posted */
	bool have_op, sends, fin_posted, tx_done;
	struct entry *entries; /* ring of opt.depth */
	uint64_t head, tail;
	uint32_t quiet_run, quiet_bytes; /* unsignalled since the last signalled one */
	uint8_t *local_ring;
	uint32_t local_size;
	uint64_t local_head, local_tail;
	uint64_t *credit_slot; /* where the READ of the peer's counter lands */
	uint64_t credited;
	bool credit_busy, scratch_busy;
	uint64_t word;	      /* what the peer's word will hold when all posted atomics are done */
	int64_t credit_after; /* ns: not before */
	uint64_t dice;	      /* local choices */
	uint32_t inline_max;

	/* target */
	struct plan rx;
	bool receives, rx_done;
	struct recv_slot *slots;
	uint8_t *recv_area;
	uint64_t recv_posted, recv_seen, recv_held; /* held: seen but not posted again */
	uint64_t rnr_next;
	int64_t hold_until;
};

struct gap {
	int64_t at_ms, ms;
};

struct run {
	struct options opt;
	int tcp;

	struct ibv_context *ctx;
	struct ibv_pd *pd;
	struct ibv_comp_channel *channel;
	struct ibv_cq **cqs;
	unsigned n_cqs;
	struct peer_info mine, theirs;
	uint32_t mtu; /* enum ibv_mtu */
	uint8_t lid_sl;
	int gid_index;
	bool ethernet;
	struct conn *conns;
	uint8_t *expect, *gathered; /* one message each */

	struct counts sent, received;
	uint64_t inlined, unsignalled, scattered, fenced, holds, credit_reads, corrupted, corruptible;
	uint64_t chains, events, async_events;
	uint64_t errors;
	char told[MAX_ERRORS_TOLD][256];
	unsigned n_told;
	bool abort, stopping;

	int64_t started, deadline, ended; /* ns */
	int64_t last_cqe, last_progress;
	int64_t longest_gap;
	int64_t longest_turn; /* of our own loop: how long the CPU was away from us, while polling */
	struct gap gaps[MAX_GAPS];
	unsigned n_gaps;
	double tokens;
	int64_t token_time;
	const char *state;
	struct verdict theirs_verdict;
	bool have_verdict;
};

/* mgcheck.c */
int64_t now_ns(void);
extern volatile sig_atomic_t terminated;
/* Something is not as it must be: count it, keep the first few sentences. */
void wrong(struct run *r, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* The same, and the run ends: nothing after this would make sense. */
void fatal(struct run *r, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* A condition outside of the test's subject (no device, no peer): message, exit status 2. */
_Noreturn void die(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
void progress(struct run *r, int64_t now);

/* options.c */
void parse_options(int argc, char **argv, struct options *opt);

/* tcp.c: all die() when the connection is lost, except tcp_try_... */
int tcp_connect(const char *host, const char *port, uint32_t seconds);
int tcp_accept(const char *port);
void tcp_write(int fd, const void *buf, size_t len);
bool tcp_try_write(int fd, const void *buf, size_t len);
void tcp_read(int fd, void *buf, size_t len);
/* False when it did not come within `ms` or the connection broke. */
bool tcp_try_read(int fd, void *buf, size_t len, int ms);
bool tcp_readable(int fd);

/* setup.c */
void setup_device(struct run *r);
void setup_conns(struct run *r);
void setup_connect(struct run *r); /* exchanges over r->tcp, QPs to RTS */
void teardown(struct run *r);

/* post.c */
void pump(struct run *r, struct conn *c, int64_t now);
bool rate_allows(struct run *r, int64_t now);
void retire(struct run *r, struct conn *c, const struct ibv_wc *wc); /* a send completion */

/* check.c */
void post_receives(struct run *r, struct conn *c, int64_t now);
void received(struct run *r, struct conn *c, const struct ibv_wc *wc, int64_t now);
void completion(struct run *r, const struct ibv_wc *wc, int64_t now);

/* FIN: the last message of a stream, its immediate's top bit set, 8 bytes: how many went before. */
#define FIN_IMM 0x80000000u
#define FIN_STOP 0x40000000u /* the sender was told to end (SIGTERM): the other may as well */
#define IMM_MASK 0x3fffffffu

/* wr_id: kind, QP, number */
#define WR_RECV (1ull << 63)
#define WR_ID(conn, n) (((uint64_t)(conn)->index << 48) | ((n)&0xffffffffffffull))
#define WR_QP(wr_id) ((unsigned)((wr_id) >> 48 & 0x7fff))

#endif
