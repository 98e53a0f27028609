/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * engine.h - the sans-I/O RoCE transport: what net/, verbs/ and the simulator call.
 *
 * The engine makes no system call, reads no clock, takes no lock and starts no thread. Packets,
 * time (ns, any monotonic origin) and work requests come in as arguments; packets, completions,
 * events and the next deadline come out. The caller serialises all calls on one engine (one
 * mutex in the library, none in the simulator).
 *
 * Error contract: functions that return int return 0 or a positive errno value, as verbs do.
 * Nothing a packet contains may make any call fail: bad packets are counted and dropped.
 *
 * Verbs' own types are used where verbs define them (ibv_wc, ibv_qp_attr, ...).
 */
#ifndef MG_ENGINE_H
#define MG_ENGINE_H

#include <infiniband/verbs.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/uio.h>

typedef uint64_t mg_time; /* ns */
#define MG_NEVER UINT64_MAX

#define MG_MAX_SGE 32u	    /* per work request */
#define MG_MAX_INLINE 1024u /* bytes */
#define MG_MAX_QP_WR 1048576u
#define MG_MAX_CQE 1048576u
#define MG_MAX_SRQ_WR 1048576u
#define MG_MAX_RD_ATOMIC 128u

/* Of newer headers than the oldest we are built with: rdma-core 46 and 44. */
#define MG_WR_FLUSH 14
#define MG_WR_ATOMIC_WRITE 15
#define MG_WC_FLUSH 8
#define MG_WC_ATOMIC_WRITE 9
#define MG_ACCESS_FLUSH_GLOBAL (1u << 8)
#define MG_ACCESS_FLUSH_PERSISTENT (1u << 9)
#define MG_PKT_COPY 256u /* payloads up to this are copied behind the headers */

struct mg_addr {
	uint8_t gid[16]; /* IPv4 as ::ffff:a.b.c.d */
};

struct mg_engine;
struct mg_pd;
struct mg_mr;
struct mg_mw;
struct mg_cq;
struct mg_srq;
struct mg_xrcd;
struct mg_ah;
struct mg_qp;

/* What the engine asks of its surroundings. Called from within mg_* calls; must not call back. */
struct mg_ops {
	/* Fill buf with n random bytes that an attacker cannot guess (a seeded generator in the simulator). */
	void (*random)(void *arg, void *buf, size_t n);
	/* An armed CQ got a completion (ibv_req_notify_cq): write to its channel. It is disarmed. */
	void (*cq_event)(void *arg, struct mg_cq *cq);
	/* An asynchronous event; `object` is the mg_qp / mg_cq / mg_srq it is about. */
	void (*async_event)(void *arg, enum ibv_event_type type, void *object);
	/*
	 * Do access(what), which reads or writes memory of the application; false when that memory has
	 * gone (it may have been half done then). NULL: it never goes.
	 */
	bool (*guarded)(void *arg, void (*access)(void *what), void *what);
};

struct mg_config {
	uint32_t qpn_base; /* QPNs are drawn from [qpn_base, qpn_base + qpn_count), never 0 or 1 */
	uint32_t qpn_count;
	struct mg_addr addr;   /* our GID for RoCE (GID index 1 as the kernel lays them out) */
	uint32_t slot;	       /* for the dump only */
	uint32_t max_path_mtu; /* bytes, 256..4096: what the link carries */
};

struct mg_engine *mg_engine_create(const struct mg_config *cfg, const struct mg_ops *ops, void *arg);
void mg_engine_destroy(struct mg_engine *e); /* frees everything that is left */

/* ---- resources ------------------------------------------------------------------------- */

struct mg_pd *mg_pd_create(struct mg_engine *e);
int mg_pd_destroy(struct mg_pd *pd); /* EBUSY while used */

/* `addr` is dereferenced only in [addr, addr+length). iova: the remote view of its start. */
int mg_mr_create(struct mg_pd *pd, void *addr, size_t length, uint64_t iova, unsigned access,
		 struct mg_mr **out);
/* Another region under the same keys. As create, and EBUSY while windows are bound to it; then it stays as it was. */
int mg_mr_change(struct mg_mr *mr, struct mg_pd *pd, void *addr, size_t length, uint64_t iova,
		 unsigned access);
int mg_mr_destroy(struct mg_mr *mr); /* EBUSY while windows are bound to it */
uint32_t mg_mr_lkey(const struct mg_mr *mr);
uint32_t mg_mr_rkey(const struct mg_mr *mr);

/*
 * Memory windows. They are bound by IBV_WR_BIND_MW, of whose ibv_mw and ibv_mr the engine looks at the
 * keys alone, and unbound by IBV_WR_LOCAL_INV, by a peer's SEND with invalidate or when they go away.
 */
int mg_mw_create(struct mg_pd *pd, enum ibv_mw_type type, struct mg_mw **out);
void mg_mw_destroy(struct mg_mw *mw);
uint32_t mg_mw_rkey(const struct mg_mw *mw);

int mg_cq_create(struct mg_engine *e, uint32_t cqe, void *owner, struct mg_cq **out);
int mg_cq_destroy(struct mg_cq *cq); /* EBUSY while used */
int mg_cq_resize(struct mg_cq *cq, uint32_t cqe);
uint32_t mg_cq_depth(const struct mg_cq *cq);
void *mg_cq_owner(const struct mg_cq *cq);
int mg_cq_poll(struct mg_cq *cq, int n, struct ibv_wc *wc); /* entries written, 0..n; <0 never */
void mg_cq_arm(struct mg_cq *cq, bool solicited_only);
/* From now on note when a completion comes in; to be called before any does. */
int mg_cq_stamp(struct mg_cq *cq);
mg_time mg_cq_stamp_polled(const struct mg_cq *cq); /* of the one that mg_cq_poll gave last */
/* For the dump: the completion channel's descriptor (-1: none), its events of this CQ not fetched yet. */
void mg_cq_note(struct mg_cq *cq, int channel, uint32_t events);

/*
 * A shared receive queue. With an XRC domain and a CQ for its receive completions: an XRC one.
 * *attr is updated to what was granted; its srq_limit is not looked at. Numbers are unique per engine.
 */
int mg_srq_create(struct mg_pd *pd, struct mg_xrcd *xrcd, struct mg_cq *cq, struct ibv_srq_attr *attr,
		  void *owner, struct mg_srq **out);
int mg_srq_destroy(struct mg_srq *srq); /* EBUSY while used */
int mg_srq_modify(struct mg_srq *srq, const struct ibv_srq_attr *attr, int mask);
void mg_srq_query(const struct mg_srq *srq, struct ibv_srq_attr *attr);
uint32_t mg_srq_num(const struct mg_srq *srq);
void *mg_srq_owner(const struct mg_srq *srq);

struct mg_xrcd *mg_xrcd_create(struct mg_engine *e);
int mg_xrcd_destroy(struct mg_xrcd *xrcd); /* EBUSY while used */

/* What a QP is made of. Which of them it needs is a matter of its type; the others are NULL. */
struct mg_qp_parts {
	struct mg_pd *pd; /* all but XRC_RECV */
	struct mg_cq *send_cq, *recv_cq;
	struct mg_srq *srq;   /* may be NULL: a receive queue of its own */
	struct mg_xrcd *xrcd; /* XRC_RECV only */
};
/*
 * attr: as for ibv_create_qp_ex, its type, capabilities and sq_sig_all; cap is updated to what was
 * granted. The objects are those in `parts`. EOPNOTSUPP: a type that we do not have.
 */
int mg_qp_create(struct mg_engine *e, const struct mg_qp_parts *parts, struct ibv_qp_init_attr_ex *attr,
		 void *owner, struct mg_qp **out);
int mg_qp_destroy(struct mg_qp *qp);
uint32_t mg_qp_num(const struct mg_qp *qp);
void *mg_qp_owner(const struct mg_qp *qp);
void mg_qp_set_owner(struct mg_qp *qp, void *owner);
struct mg_qp *mg_xrcd_find(const struct mg_xrcd *xrcd, uint32_t qpn); /* an XRC_RECV QP of it, or NULL */
int mg_qp_modify(struct mg_qp *qp, mg_time now, const struct ibv_qp_attr *attr, int mask);
int mg_qp_query(struct mg_qp *qp, struct ibv_qp_attr *attr, int mask, struct ibv_qp_init_attr *init);

/* As ibv_post_send / ibv_post_recv: on error *bad is the first one not posted. */
int mg_post_send(struct mg_qp *qp, mg_time now, struct ibv_send_wr *wr, struct ibv_send_wr **bad);
/* What mg_post_send would say about these requests in themselves, without posting any. */
int mg_check_send(const struct mg_qp *qp, const struct ibv_send_wr *wr);
int mg_post_recv(struct mg_qp *qp, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad);
int mg_post_srq_recv(struct mg_srq *srq, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad);
uint32_t mg_qp_send_room(const struct mg_qp *qp); /* work requests that can be posted now */

/*
 * The GID table, as programs see it: an sgid_index stands for the address a QP or AH sends from.
 * At first entry MG_GID_MAIN (1) is mg_config.addr and the only one. All-zero entries are empty.
 */
#define MG_MAX_GID 16u
#define MG_GID_MAIN 1u
void mg_set_gids(struct mg_engine *e, const struct mg_addr *gid, unsigned n);
/* The link carries this much now (mg_config.max_path_mtu): what connects from here on may use it. */
void mg_set_path_mtu(struct mg_engine *e, uint32_t mtu);

/*
 * Address handles. Work requests name one by mg_ah_ib, whose fields are the caller's. EINVAL:
 * no GRH, no such sgid_index, or source and destination are of different address families.
 */
int mg_ah_create(struct mg_pd *pd, const struct ibv_ah_attr *attr, void *owner, struct mg_ah **out);
int mg_ah_destroy(struct mg_ah *ah);
struct ibv_ah *mg_ah_ib(struct mg_ah *ah);
struct mg_ah *mg_ah_of(struct ibv_ah *ib);
void *mg_ah_owner(const struct mg_ah *ah);

/*
 * Multicast groups of UD QPs (a QP in one cannot be destroyed: EBUSY). The caller makes packets
 * for each mg_mcast_group come in: call it with i = 0, 1, ... until false, after every change.
 */
#define MG_MAX_MCAST 8192u /* groups */
bool mg_gid_multicast(const uint8_t gid[16]);
int mg_mcast_attach(struct mg_qp *qp, const struct mg_addr *addr); /* EINVAL: no UD QP or no group */
int mg_mcast_detach(struct mg_qp *qp, const struct mg_addr *addr); /* EINVAL: not attached */
void mg_mcast_detach_all(struct mg_qp *qp);
bool mg_mcast_group(const struct mg_engine *e, uint32_t i, struct mg_addr *addr);

/* ---- packets and time ------------------------------------------------------------------ */

/*
 * A packet to send. UDP payload = hdr[0..hdr_len) then iov[0..n_iov) then `pad` zero bytes then
 * the ICRC, `len` bytes in all. hdr holds the headers and, for small packets, the payload too.
 * iov points into the application's memory: valid until the next mg_* call only.
 */
struct mg_pkt {
	struct mg_addr src, dst;
	uint16_t sport; /* host order; the destination port is MG_ROCE_PORT */
	uint8_t tclass;
	uint8_t hop_limit;
	uint8_t pad;
	uint8_t n_iov;
	uint16_t hdr_len;
	uint32_t len;
	uint32_t qpn; /* whose it is */
	struct iovec iov[MG_MAX_SGE];
	uint8_t hdr[64 + MG_PKT_COPY];
};

/*
 * Fill up to `max` packets that should be sent now; returns how many. Call until it returns
 * less than max. MG_TX_LAZY: leave out plain ACKs that can wait for more requests to come in
 * (the caller promises to call without it soon: when a receive batch found nothing more) and
 * small sends that the next acknowledgement will push out anyway.
 */
#define MG_TX_LAZY 1u
size_t mg_tx(struct mg_engine *e, mg_time now, unsigned flags, struct mg_pkt *out, size_t max);
/*
 * A packet that cannot be sent: memory in its iov has gone. Its request fails, or the READ it answers is
 * refused. It counts as lost, with whatever else was not sent.
 */
void mg_tx_fault(struct mg_engine *e, const struct mg_pkt *pkt);
bool mg_tx_pending(const struct mg_engine *e); /* something is (or lazily could be) ready for mg_tx */

/* A received UDP payload, ICRC already verified by the caller and still at its end. */
struct mg_rx {
	struct mg_addr src, dst;
	uint16_t sport;
	uint8_t tclass, hop_limit;
	uint16_t ip_id;	     /* IPv4 */
	uint32_t flow_label; /* IPv6 */
};
void mg_rx(struct mg_engine *e, mg_time now, const struct mg_rx *meta, const uint8_t *buf, size_t len);
/*
 * True from when a message takes the last receive request of a queue whose service drops what finds none (UC,
 * UD), until any request is posted: the caller had better let the application run before it receives more.
 */
bool mg_rx_dry(const struct mg_engine *e);

mg_time mg_deadline(const struct mg_engine *e); /* MG_NEVER: no timer runs */
void mg_timer(struct mg_engine *e, mg_time now);

/* ---- stop, dump, resume (docs/protocol.md) ----------------------------------------------- */

/* False while a connected, capable peer has not acknowledged our token: give it a little time. */
bool mg_stop_ready(const struct mg_engine *e);
/*
 * Stop: from here mg_tx yields nothing, mg_rx drops, no timer runs; posting and polling go on.
 * Idempotent.
 */
void mg_stop(struct mg_engine *e);
bool mg_stopped(const struct mg_engine *e);
/*
 * Go on, at `addr` (NULL: as before): rebases timers to `now`, raises the epoch, sends Resume on
 * every connected QP with a capable peer until acknowledged. Also used for undo.
 */
void mg_resume(struct mg_engine *e, mg_time now, const struct mg_addr *addr);

/* The context's dump (transport/dump.h). Returns bytes needed; writes only if that fits cap. */
size_t mg_dump(const struct mg_engine *e, uint8_t *buf, size_t cap);

/* ---- counters ------------------------------------------------------------------------------ */
enum mg_counter {
	MG_CNT_TX_PACKETS,
	MG_CNT_RX_PACKETS,
	MG_CNT_TX_BYTES, /* payload */
	MG_CNT_RX_BYTES,
	MG_CNT_RETRANSMITS, /* packets sent again */
	MG_CNT_TIMEOUTS,
	MG_CNT_RNR_NAKS_RX,
	MG_CNT_RNR_NAKS_TX,
	MG_CNT_SEQ_NAKS_RX,
	MG_CNT_SEQ_NAKS_TX,
	MG_CNT_DUPLICATES, /* requests received again */
	MG_CNT_RX_MALFORMED,
	MG_CNT_RX_ICRC, /* counted by the caller through mg_count */
	MG_CNT_RX_NO_QP,
	MG_CNT_RX_BAD_SOURCE, /* not from the QP's peer, or to another address of ours than the QP's */
	MG_CNT_NAK_STOPPED_RX,
	MG_CNT_RESUMES_TX,
	MG_CNT_RESUMES_RX,	/* accepted */
	MG_CNT_RESUMES_REFUSED, /* wrong token, old epoch */
	MG_CNT_TX_ERRORS,	/* the socket refused (caller) */
	MG_CNT_RX_BAD_QKEY,
	MG_CNT_RX_DROPPED, /* UC and UD messages without a receive request, incomplete or not allowed */
	MG_CNT_MAX
};
extern const char *const mg_counter_name[MG_CNT_MAX]; /* snake_case, as in the dump's order */
void mg_count(struct mg_engine *e, enum mg_counter c, uint64_t n);
uint64_t mg_counter_get(const struct mg_engine *e, enum mg_counter c);

#endif
