/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * simapi.h - the transport under a simulated network: what tests/sim calls through cffi.
 *
 * A *world* has a virtual clock, engines (native/transport), links between them with seeded
 * adversity, and stand-ins answered by Python. Nothing here reads a clock or sleeps; the same
 * calls in the same order give the same result, to the byte.
 *
 * Everything is named by small integers, valid within their world: no pointer crosses to Python
 * but the engine's arena (the application's memory). Functions returning int give an index or 0,
 * or a negative errno value. Times are ns of virtual time.
 *
 * cffi reads this file: between the two marks below only plain C declarations, no preprocessor.
 */
#ifndef MG_SIMAPI_H
#define MG_SIMAPI_H

#include <stddef.h>
#include <stdint.h>

/* cffi: begin */

struct mgs_world;

enum { MGS_ANY = 255 }; /* wherever an engine index is asked for: each of them */

/* Why mgs_run came back. */
enum mgs_reason {
	MGS_UNTIL = 0,	   /* the time asked for has come */
	MGS_QUIET = 1,	   /* ... and nothing at all is left to happen: no packet, no timer */
	MGS_WC = 2,	   /* completions wait in the log */
	MGS_STANDIN = 3,   /* packets for a stand-in wait */
	MGS_ASYNC = 4,	   /* asynchronous events wait */
	MGS_BUDGET = 5,	   /* more events than mgs_set_budget allows: a livelock */
	MGS_VIOLATION = 6, /* the engine broke a rule of engine.h: see mgs_violation */
};

/* How a CQ is served while the world runs. */
enum mgs_cq_mode {
	MGS_CQ_MANUAL = 0,    /* only by mgs_cq_poll */
	MGS_CQ_POLL = 1,      /* polled after each step */
	MGS_CQ_EVENT = 2,     /* polled only when its event came, then armed anew */
	MGS_CQ_SOLICITED = 3, /* likewise, armed for solicited events; polled once more by mgs_cq_sweep */
};

/* Adversity of the way from one engine to another. Rates are in parts per million. */
struct mgs_link {
	uint64_t delay;	     /* least, ns */
	uint64_t jitter;     /* uniform on top; order is kept */
	uint64_t queue;	     /* ns of packets that may wait for the wire; beyond: dropped (0: no end) */
	uint64_t reorder_by; /* a reordered packet comes up to this much later, past others */
	uint64_t late_by;
	uint32_t ps_per_byte; /* serialisation */
	uint32_t loss, dup, corrupt, reorder;
	uint32_t burst; /* packets lost in a row once one is (0, 1: each on its own) */
	uint32_t fair;	/* no packet is lost more often than this, no ACK train longer (0: no mercy) */
	uint32_t down;	/* drop everything */
	uint32_t late;	/* as good as lost, but then they come, up to late_by behind their time */
	uint32_t strip; /* clear the capability bit: both ends look like strangers to each other */
};

/* A rule for single packets, tried in the order given; the first that matches acts. */
enum mgs_action {
	MGS_PASS = 0, /* spared from the link's adversity */
	MGS_DROP = 1,
	MGS_DUP = 2,	 /* comes twice, the second `delay` later */
	MGS_DELAY = 3,	 /* comes `delay` later than it would */
	MGS_CAPTURE = 4, /* kept for mgs_captured, and goes on */
	MGS_STEAL = 5,	 /* kept for mgs_captured, and lost */
	MGS_SWAP = 6,	 /* mutation: the payload's first byte is inverted, the ICRC made good */
};

struct mgs_rule {
	uint8_t src, dst;      /* engine indices or MGS_ANY; dst: who would get it now */
	uint8_t op_lo, op_hi;  /* BTH opcodes */
	uint8_t syn_mask, syn; /* AETH syndrome & syn_mask == syn; mask 0: any packet */
	uint8_t action;	       /* enum mgs_action */
	uint8_t rsv;
	uint32_t skip, count; /* leave out the first, then act on so many (0: for ever) */
	uint64_t delay;
	uint32_t hits; /* out: how often it acted */
	uint32_t rsv2;
};

struct mgs_caps {
	uint32_t max_send_wr, max_recv_wr, max_send_sge, max_recv_sge, max_inline;
};

struct mgs_path {
	uint8_t dgid[16];
	uint32_t dest_qpn, rq_psn, sq_psn;
	uint32_t mtu;	 /* bytes */
	uint32_t access; /* enum ibv_access_flags */
	uint8_t timeout, retry_cnt, rnr_retry, min_rnr_timer, max_rd_atomic, max_dest_rd_atomic;
	uint8_t hop_limit, tclass;
	uint32_t qkey; /* UD */
};

struct mgs_sge {
	uint64_t addr;
	uint32_t length, lkey;
};

struct mgs_wr {
	uint64_t wr_id;
	uint64_t remote_addr;
	uint32_t rkey;
	uint32_t opcode; /* enum ibv_wr_opcode */
	uint32_t flags;	 /* enum ibv_send_flags */
	uint32_t imm;	 /* host order; *_INV: the key to invalidate */
	uint32_t n_sge;
	uint32_t srqn; /* of an XRC request */
	/* Atomics. BIND_MW: compare_add is the length. FLUSH: level << 8 | type, and the length. */
	uint64_t compare_add, swap;
	struct mgs_sge sge[34]; /* more than the engine's limit, to try that too */
	uint32_t ah;		/* UD: index + 1; with it, the two below in place of remote_addr and rkey */
	uint32_t remote_qpn, remote_qkey;
	uint32_t mw_rkey, mr_lkey, mw_access; /* BIND_MW; its new key is rkey, its address remote_addr */
};

struct mgs_wc {
	uint64_t t;
	uint64_t wr_id;
	uint32_t engine, cq;
	uint32_t status, opcode, vendor_err, byte_len;
	uint32_t imm; /* host order; or the invalidated key */
	uint32_t qp_num, src_qp, flags;
};

struct mgs_async {
	uint64_t t;
	uint32_t engine, type; /* enum ibv_event_type */
	int32_t qp, cq, srq;   /* index of its object, or -1 */
	int32_t rsv;
};

/* A packet for a stand-in, or captured. The bytes go from the BTH to the ICRC. */
struct mgs_packet_info {
	uint64_t t;
	uint8_t src[16], dst[16];
	uint16_t sport, ip_id;
	uint8_t tclass, hop_limit;
	uint16_t rsv;
	uint32_t len;
	int32_t from; /* engine index, -1: injected */
	int32_t to;   /* stand-in id or engine index */
};

struct mgs_stats {
	uint64_t events, sent, delivered, lost, corrupted, duplicated, reordered, unrouted, injected;
	uint64_t false_accepts; /* corrupted, but the ICRC looked right: dropped as UDP's checksum would */
	uint64_t timer_calls, bytes;
};

/* ---- the world ---- */
struct mgs_world *mgs_world_new(uint64_t seed);
void mgs_world_free(struct mgs_world *w);
uint64_t mgs_now(const struct mgs_world *w);
int mgs_run(struct mgs_world *w, uint64_t until);	   /* enum mgs_reason; UINT64_MAX: till it is quiet */
void mgs_set_budget(struct mgs_world *w, uint64_t events); /* from now on */
void mgs_set_break(struct mgs_world *w, int on_wc, int on_async);
const char *mgs_violation(const struct mgs_world *w); /* NULL: none */
void mgs_get_stats(const struct mgs_world *w, struct mgs_stats *out);
void mgs_trace(struct mgs_world *w, int on);
size_t mgs_trace_text(struct mgs_world *w, const char **text); /* and empties it; valid until the next call */

/* ---- engines: an address in the network, and the process behind it ---- */
struct mgs_engine_config {
	uint8_t gid[16];
	uint32_t qpn_base, qpn_count, slot, max_path_mtu;
	uint64_t seed;
	uint64_t clock_offset; /* its monotonic clock is this much ahead of the world's (wraps) */
	uint64_t arena;	       /* bytes of application memory */
	uint64_t batch_window; /* packets this close together are one receive batch (lazy tx within) */
	uint64_t timer_slack;  /* timers are served up to this late */
	uint32_t tx_batch;     /* 1..64 packets asked from mg_tx at once */
	uint32_t id_mode;      /* IPv4 id: 0 zero, 1 counts within a batch (GSO), 2 random */
	uint32_t early_timer;  /* ppm of steps with a needless mg_timer call */
	uint32_t train;	       /* nothing is sent within a receive batch, as if it were one GRO train */
};
int mgs_engine_new(struct mgs_world *w, const struct mgs_engine_config *cfg);
void mgs_engine_free(struct mgs_world *w, int engine); /* with all it holds, as when a process dies */
void *mgs_arena(struct mgs_world *w, int engine);
void mgs_attach(struct mgs_world *w, int engine, int on); /* whether packets find their way to it */
int mgs_stop_ready(struct mgs_world *w, int engine);
void mgs_stop(struct mgs_world *w, int engine);
int mgs_stopped(struct mgs_world *w, int engine);
/* gid: the new address or NULL. clock_offset: that of the clock it finds there. */
void mgs_resume(struct mgs_world *w, int engine, const uint8_t *gid, uint64_t clock_offset);
size_t mgs_dump(struct mgs_world *w, int engine, uint8_t *buf, size_t cap);
uint64_t mgs_counter(struct mgs_world *w, int engine, int counter);
int mgs_counter_count(void);
const char *mgs_counter_name(int counter);
uint64_t mgs_deadline(struct mgs_world *w, int engine); /* in world time; UINT64_MAX: none */
int mgs_rx_dry(struct mgs_world *w, int engine);	/* mg_rx_dry: 0 or 1 */
int mgs_tx_pending(struct mgs_world *w, int engine);

/* ---- verbs ---- */
int mgs_pd_new(struct mgs_world *w, int engine);
int mgs_pd_free(struct mgs_world *w, int pd);
int mgs_mr_new(struct mgs_world *w, int pd, uint64_t offset, uint64_t length, uint64_t iova, uint32_t access);
int mgs_mr_free(struct mgs_world *w, int mr);
uint32_t mgs_mr_lkey(struct mgs_world *w, int mr);
uint32_t mgs_mr_rkey(struct mgs_world *w, int mr);
int mgs_mw_new(struct mgs_world *w, int pd, int type); /* enum ibv_mw_type */
int mgs_mw_free(struct mgs_world *w, int mw);
uint32_t mgs_mw_rkey(struct mgs_world *w, int mw);
int mgs_cq_new(struct mgs_world *w, int engine, uint32_t cqe, int mode);
int mgs_cq_free(struct mgs_world *w, int cq);
int mgs_cq_poll(struct mgs_world *w, int cq, int n, struct mgs_wc *out);
void mgs_cq_sweep(struct mgs_world *w, int cq); /* poll into the log whatever its mode */
uint64_t mgs_cq_events(struct mgs_world *w, int cq);
int mgs_cq_resize(struct mgs_world *w, int cq, uint32_t cqe);
int mgs_qp_new(struct mgs_world *w, int pd, int send_cq, int recv_cq, struct mgs_caps *caps, int sig_all);
int mgs_qp_new_type(struct mgs_world *w, int pd, int send_cq, int recv_cq, struct mgs_caps *caps, int sig_all,
		    int type); /* enum ibv_qp_type */
int mgs_qp_free(struct mgs_world *w, int qp);
/* An address handle from path's dgid, hop_limit and tclass. */
int mgs_ah_new(struct mgs_world *w, int pd, const struct mgs_path *path);
int mgs_ah_free(struct mgs_world *w, int ah);
int mgs_mcast(struct mgs_world *w, int qp, const uint8_t *gid, int on); /* attach or detach */
uint32_t mgs_qp_num(struct mgs_world *w, int qp);
int mgs_qp_modify(struct mgs_world *w, int qp, int state,
		  const struct mgs_path *path); /* enum ibv_qp_state */
int mgs_qp_state(struct mgs_world *w, int qp);
int mgs_qp_query(struct mgs_world *w, int qp, struct mgs_path *path, struct mgs_caps *caps);
/* posted: how many were taken. 0 or -errno. */
int mgs_post_send(struct mgs_world *w, int qp, const struct mgs_wr *wr, int n, int *posted);
int mgs_post_recv(struct mgs_world *w, int qp, const struct mgs_wr *wr, int n, int *posted);
/* Shared receive queues and XRC. xrcd and cq: -1 for a basic one. */
int mgs_xrcd_new(struct mgs_world *w, int engine);
int mgs_xrcd_free(struct mgs_world *w, int xrcd);
int mgs_srq_new(struct mgs_world *w, int pd, int xrcd, int cq, uint32_t max_wr, uint32_t max_sge);
int mgs_srq_free(struct mgs_world *w, int srq);
uint32_t mgs_srq_num(struct mgs_world *w, int srq);
int mgs_srq_modify(struct mgs_world *w, int srq, uint32_t max_wr, uint32_t limit); /* max_wr 0: as it is */
int mgs_post_srq_recv(struct mgs_world *w, int srq, const struct mgs_wr *wr, int n, int *posted);
struct mgs_parts {
	int type;			     /* enum ibv_qp_type */
	int pd, send_cq, recv_cq, srq, xrcd; /* -1: none */
};
int mgs_qp_make(struct mgs_world *w, int engine, const struct mgs_parts *parts, struct mgs_caps *caps);
int mgs_wc_drain(struct mgs_world *w, struct mgs_wc *out, int max);
int mgs_async_drain(struct mgs_world *w, struct mgs_async *out, int max);

/* ---- the network ---- */
void mgs_link_set(struct mgs_world *w, int src, int dst, const struct mgs_link *link);
int mgs_rule_add(struct mgs_world *w, const struct mgs_rule *rule);
uint32_t mgs_rule_hits(struct mgs_world *w, int rule);
void mgs_rules_clear(struct mgs_world *w);
/* Packets to `gid` for these QPNs that no attached engine takes go to stand-in `id`. */
int mgs_standin_set(struct mgs_world *w, int id, const uint8_t *gid, uint32_t qpn_base, uint32_t qpn_count,
		    int on);
int mgs_standin_next(struct mgs_world *w, struct mgs_packet_info *info, uint8_t *buf,
		     size_t cap); /* 1 or 0 */
int mgs_captured(struct mgs_world *w, int i, struct mgs_packet_info *info, uint8_t *buf,
		 size_t cap); /* 1 or 0 */
/* Send from outside; with_icrc: buf has one (right or wrong), else one is added. -1: no engine's link. */
int mgs_inject(struct mgs_world *w, int from, const uint8_t *src, const uint8_t *dst, uint16_t sport,
	       const uint8_t *buf, size_t len, int with_icrc);

/* Mutations, to see that the tests can fail: see simapi.c. */
enum mgs_mutation {
	MGS_MUT_NONE = 0,
	MGS_MUT_LOSE_WC = 1,	 /* the n-th completion vanishes */
	MGS_MUT_DUP_WC = 2,	 /* ... comes twice */
	MGS_MUT_SWAP_WC = 3,	 /* ... changes places with the one before it in its CQ */
	MGS_MUT_FLIP_MEMORY = 4, /* at the n-th completion the last byte of its engine's arena changes */
	MGS_MUT_ERROR_WC = 5,	 /* ... has status "general error" */
};
void mgs_mutate(struct mgs_world *w, int mutation, uint64_t n);

/* cffi: end */

#endif
