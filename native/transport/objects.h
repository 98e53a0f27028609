/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * objects.h - the transport's own structures (internal.h has its functions).
 *
 * Sequence numbers of the requester are 64-bit ("extended PSNs"): their low 24 bits go on the
 * wire, comparisons never wrap. The responder needs only the distance of a packet's PSN from the
 * one it expects and stays with 24 bits.
 */
#ifndef MG_OBJECTS_H
#define MG_OBJECTS_H

#include "transport/dump.h"
#include "transport/engine.h"
#include "wire/wire.h"

/* ---- id table: u32 -> object, open addressing (idtab.c) ---------------------------------- */

struct mg_idtab {
	struct mg_identry {
		uint32_t key;
		void *val; /* NULL: free */
	} * slot;
	uint32_t mask; /* slots - 1; 0 with slot == NULL when empty */
	uint32_t used;
};
void *mg_idtab_get(const struct mg_idtab *t, uint32_t key);
int mg_idtab_put(struct mg_idtab *t, uint32_t key, void *val); /* key must be new; ENOMEM */
void mg_idtab_del(struct mg_idtab *t, uint32_t key);
void mg_idtab_free(struct mg_idtab *t);
/* Iterate: start with *it = 0; NULL at the end. The table must not change meanwhile. */
void *mg_idtab_next(const struct mg_idtab *t, uint32_t *it);

/* ---- objects ------------------------------------------------------------------------------ */

struct mg_list {
	struct mg_list *prev, *next;
};

struct mg_pd {
	struct mg_engine *e;
	uint32_t handle;
	uint32_t refs;
};

struct mg_mr {
	struct mg_pd *pd;
	uint8_t *addr;
	uint64_t iova;
	uint64_t length;
	uint32_t key; /* lkey and rkey are the same number; key >> 8 is the region's alone */
	unsigned access;
	uint32_t n_mw; /* windows bound to it */
};

/* A memory window (mw.c). Its rkey's low 8 bits change with each binding. */
struct mg_mw {
	struct mg_pd *pd;
	enum ibv_mw_type type;
	uint32_t rkey;
	struct mg_mr *mr; /* bound to; NULL: opens nothing */
	unsigned access;
	uint64_t addr, length;	/* in the region's remote view */
	const struct mg_qp *qp; /* type 2: the QP that bound it, and alone may use it */
};

/* An address handle. The verbs structure comes first: work requests name it by that. */
struct mg_ah {
	struct ibv_ah ib;
	struct mg_pd *pd;
	void *owner;
	uint32_t handle;
	struct mg_addr src, dst; /* src: what attr's sgid_index stands for */
	struct ibv_ah_attr attr;
};

struct mg_group { /* multicast */
	struct mg_addr addr;
	struct mg_qp **qp;
	uint32_t n;
};

struct mg_cq {
	struct mg_engine *e;
	void *owner;
	struct ibv_wc *ring;
	uint32_t depth, head, fill;
	uint32_t handle;
	uint32_t refs;
	uint8_t armed; /* 0 no, 1 any completion, 2 solicited or error */
	bool overrun;
	uint64_t total;
	uint32_t channel, events; /* for the dump only: mg_cq_note */
	mg_time *stamp;		  /* beside `ring`: when each was put there; NULL: nobody asks */
	mg_time stamp_polled;	  /* of the one polled last */
};

/* Window in packets (window.c). */
struct mg_window {
	uint32_t cwnd;
	uint32_t ssthresh;
	uint32_t credit;  /* acknowledged packets toward the next +1 */
	uint64_t recover; /* no second reduction until this extended PSN is acknowledged */
};
#define MG_WIN_MIN 4u
#define MG_WIN_INIT 128u
#define MG_WIN_MAX 512u
#define MG_WIN_PLAIN 128u /* at most, to a peer not known to be of our kind: what rdma_rxe allows itself */
void mg_window_init(struct mg_window *w);
void mg_window_acked(struct mg_window *w, uint32_t packets, bool limited);
void mg_window_loss(struct mg_window *w, uint64_t una, uint64_t sent);

enum mg_wqe_flag {
	MG_WQE_SIGNALED = 1,
	MG_WQE_SOLICITED = 2,
	MG_WQE_FENCE = 4,
	MG_WQE_INLINE = 8,
	MG_WQE_DONE = 16, /* a local operation that was carried out */
};

struct mg_swqe {
	uint64_t wr_id;
	uint64_t psn; /* extended, of the first packet */
	uint32_t n_psn;
	uint32_t length; /* bytes */
	uint64_t remote_addr;
	uint32_t rkey;
	uint32_t imm;	/* host order */
	uint32_t srqn;	/* of an XRC request */
	uint8_t opcode; /* enum ibv_wr_opcode */
	uint8_t flags;	/* enum mg_wqe_flag */
	uint8_t n_sge;
	uint8_t status; /* enum ibv_wc_status found before transmission; IBV_WC_SUCCESS */
	uint64_t compare_add,
		swap; /* atomics; BIND_MW: length; access << 32 | lkey; FLUSH: level << 8 | type */
	union {
		struct ibv_sge sge[1];	/* n_sge entries */
		uint8_t inline_data[1]; /* length bytes */
	} u;
};

/* Where a UD request goes: behind the request, at the end of its slot in the send queue. */
struct mg_ud_dest {
	struct mg_addr src, dst;
	uint32_t qpn, qkey;
	uint8_t sgid_index, tclass, hop_limit;
};

struct mg_rwqe {
	uint64_t wr_id;
	uint32_t length;
	uint32_t n_sge;
	struct ibv_sge sge[];
};

/* A receive queue: a QP's own or an SRQ's (rq.c). */
struct mg_rq {
	uint8_t *ring;	       /* `size` entries of `stride` bytes each */
	uint32_t size, stride; /* size: a power of two */
	uint32_t head, tail;   /* free-running */
	uint32_t max_wr, max_sge;
};

struct mg_srq {
	struct mg_engine *e;
	struct mg_pd *pd;
	struct mg_xrcd *xrcd; /* NULL: a basic one */
	struct mg_cq *cq;     /* an XRC one's receive completions; NULL: they go to the QP's CQ */
	void *owner;
	uint32_t num;
	uint32_t handle;
	uint32_t refs; /* QPs */
	struct mg_rq rq;
	uint32_t limit; /* below: IBV_EVENT_SRQ_LIMIT_REACHED, once; 0: not armed */
	uint64_t total; /* requests taken ever */
};

struct mg_xrcd {
	struct mg_engine *e;
	uint32_t handle;
	uint32_t refs; /* SRQs and QPs */
};

/* One answer to send or send again, a READ's or an atomic's: in PSN order. */
struct mg_job {
	uint8_t opcode;	   /* the request's */
	uint32_t psn;	   /* next to send */
	uint32_t last_psn; /* of this request */
	bool started;	   /* its first packet has gone out */
	uint64_t va;	   /* of the next packet's data */
	uint32_t rkey;
	uint32_t srqn; /* XRC: in whose PD */
	uint32_t left; /* bytes */
	uint64_t orig; /* an atomic's result */
	bool again;    /* it was executed before */
};

/* Replay record (IBA 9.7.5.1.3): what a duplicate READ or atomic may ask for again. */
struct mg_resource {
	uint32_t first_psn, last_psn;
	uint64_t va;
	uint32_t rkey, length;
	uint8_t opcode; /* 0: free */
	uint64_t atomic_orig;
};

struct mg_responder {
	uint32_t epsn;
	uint32_t ack_psn; /* of the last packet taken that an ACK may name: not a READ's or an atomic's */
	uint32_t msn;
	bool nak_sent; /* since epsn last moved: later packets are dropped in silence */
	bool ack_pending;
	bool ack_force;	  /* not to be held back by MG_TX_LAZY */
	bool dup_pending; /* a SEND or WRITE came again: dup_psn is to be acknowledged */
	uint32_t dup_psn;
	bool dup_left; /* one that came again, at dup_left_psn, is left to the answer of the READ behind it */
	uint32_t dup_left_psn;
	uint8_t ack_count;
	uint8_t nak; /* syndrome to send, 0: none; RNR syndromes too, and a last ACK */
	bool denied; /* a READ was asked for again, at denied_psn, whose memory is closed by now: NAK to send */
	uint32_t denied_psn;
	bool comm_est;	/* IBV_EVENT_COMM_EST was raised */
	uint8_t opcode; /* last one accepted of a message in progress; MG_RESP_IDLE else */
	bool have_wqe; /* qp->taken is a receive request of ours: the message in progress or the next uses it */
	struct mg_srq *wqe_srq; /* where it came from, NULL: our own queue */
	uint64_t wr_va;		/* WRITE in progress */
	uint32_t wr_rkey, wr_left;
	uint32_t offset; /* SEND in progress: bytes placed */
	struct mg_resource *res;
	uint32_t n_res, res_next;
	struct mg_job *jobs; /* ring of n_jobs */
	uint32_t n_jobs, job_head, job_fill;
};
#define MG_RESP_IDLE 0xff

struct mg_requester {
	uint64_t una;		  /* oldest unacknowledged */
	uint64_t snd;		  /* next to transmit */
	uint64_t max;		  /* one past the highest ever transmitted */
	uint64_t end;		  /* next to assign to a posted request */
	uint64_t heard;		  /* UC: the peer has seen all below, or we do not wait for it */
	mg_time stall_until;	  /* UC: too far ahead of the peer, until it tells or this time; 0: not */
	bool unheard;		  /* UC: that time came; the peer is not waited for until it tells again */
	uint32_t head, cur, tail; /* free-running WQE indices: oldest, holding snd, next free */
	struct mg_window win;
	uint64_t *reads;   /* ring: extended PSN one past each outstanding READ or atomic request */
	uint64_t data_end; /* extended PSN one past the last READ of some bytes that was sent */
	uint32_t n_reads, read_head, read_fill;
	uint32_t read_chunk; /* packets one READ request may ask for */
	uint8_t retry_left, rnr_left;
	uint8_t grace_left; /* retries beyond those, while a plain peer is heard otherwise */
	bool probing;	    /* send one packet only, until something comes back */
	bool probe_credit;
	uint64_t gap_recover; /* no second go-back for implied loss below this */
	mg_time rnr_until;    /* 0: not waiting */
	mg_time ack_since;    /* last progress or first transmission since; 0: nothing in flight */
	mg_time soft_at;      /* next soft retransmission */
	uint64_t soft_rto;
	uint64_t srtt;	    /* ns, 0 unknown */
	uint64_t rtt_psn;   /* extended PSN being timed */
	mg_time rtt_sent;   /* 0: none */
	uint64_t nak_psn;   /* of a NAK that overtook the answer to a READ or atomic before it */
	uint8_t nak_status; /* what it is to become (enum ibv_wc_status); 0: there is none */
};

struct mg_migration {
	uint8_t token[16], peer_token[16];
	bool peer_capable, have_peer_token, token_acked;
	bool peer_plain;  /* it has sent a packet without the capability bit */
	bool paused;	  /* the peer is stopped */
	bool paused_idle; /* and we have not asked it anything since */
	bool resuming;	  /* we moved; requests wait for the peer's acknowledgement */
	uint32_t peer_epoch;
	uint8_t announce_left;
	bool send_announce, send_token, send_token_ack, send_resume, send_resume_ack;
	uint32_t ack_epoch;				    /* to echo in RESUME_ACK */
	mg_time announce_at, token_at, resume_at, probe_at; /* MG_NEVER: off */
	uint64_t announce_gap, token_gap, resume_gap, probe_gap;
	mg_time last_heard; /* of a paused or resuming connection, and from a plain peer */
};

struct mg_qp {
	struct mg_engine *e;
	/* Of an XRC_RECV QP: the PD of the request being executed, NULL in between. */
	struct mg_pd *pd;
	struct mg_cq *send_cq, *recv_cq; /* NULL where the type has none */
	struct mg_xrcd *xrcd;		 /* of an XRC_RECV QP */
	void *owner;
	uint32_t qpn;
	enum ibv_qp_state state;
	enum ibv_qp_type type;
	uint8_t svc; /* enum mg_service: in each opcode it sends and takes */
	struct ibv_qp_cap cap;
	bool sq_sig_all;
	struct ibv_qp_attr attr; /* as set by modify_qp */
	uint32_t mtu;		 /* bytes */
	unsigned access;
	struct mg_addr local, peer;
	uint32_t peer_qpn;
	uint16_t sport;

	struct mg_requester req;
	struct mg_responder resp;
	struct mg_migration mig;
	bool sqd_notify;
	bool overrun; /* a CQ had no room for a completion of ours */

	uint8_t *sq; /* ring of sq_size entries, sq_stride bytes each */
	uint32_t sq_size, sq_stride;
	struct mg_rq rq;
	struct mg_srq *srq;    /* used in place of rq; of an XRC_RECV QP as `pd` */
	struct mg_rwqe *taken; /* mg_recv_take */

	uint32_t n_mcast;   /* groups it is attached to */
	bool block_self;    /* IBV_QP_CREATE_BLOCK_SELF_MCAST_LB */
	uint8_t sgid_index; /* of `local` */

	struct mg_list ready; /* in e->ready when something may be sent, in e->held when it may wait */
	bool is_ready;	      /* in one of them */
	bool is_held;
	mg_time timer;	   /* when the heap will wake us; MG_NEVER: not in it */
	uint32_t heap_pos; /* index + 1; 0: not in the heap */

	uint64_t tx_packets, rx_packets, tx_bytes, rx_bytes, retransmits, duplicates, send_done, recv_done;
};

/* QP 1 (gsi.c) */
struct mg_gsi {
	const struct mg_gsi_user *user;
	void *arg;
	struct mg_gsi_mad *first, *last; /* waiting for mg_tx */
	uint32_t queued, psn;
	mg_time wake;
};

struct mg_engine {
	struct mg_config cfg;
	const struct mg_ops *ops;
	void *arg;
	struct mg_idtab qps;
	struct mg_idtab mrs, mws; /* by key >> 8: no number in both */
	struct mg_idtab pds, cqs; /* by handle */
	struct mg_idtab srqs;	  /* by number */
	struct mg_idtab xrcds;	  /* by handle */
	struct mg_idtab ahs;	  /* by handle */
	struct mg_group *group;
	uint32_t n_group;
	struct mg_addr gid[MG_MAX_GID];
	unsigned n_gid;
	uint32_t next_handle;
	struct mg_list ready, held;
	struct mg_qp **heap;
	uint32_t heap_len, heap_cap;
	struct mg_mr *mr_last; /* the one looked up last */
	struct mg_gsi gsi;
	bool stopped;
	bool dry; /* mg_rx_dry */
	uint32_t epoch;
	uint64_t counters[MG_CNT_MAX];
	mg_time now; /* the latest we were told */
};

#endif
