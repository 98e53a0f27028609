/* SPDX-License-Identifier: BSD-3-Clause */
/* internal.h - what the transport's files have of each other; nothing outside transport/ includes this. */
#ifndef MG_INTERNAL_H
#define MG_INTERNAL_H

#include "transport/objects.h"

#include <string.h>

/* ---- helpers ------------------------------------------------------------------------------ */

#define MG_US 1000ull
#define MG_MS 1000000ull
#define MG_S 1000000000ull

static inline int32_t mg_psn_diff(uint32_t a, uint32_t b)
{
	return (int32_t)((a - b) << 8) >> 8;
}
static inline uint64_t mg_psn_extend(uint64_t near, uint32_t psn)
{
	return near + (uint64_t)(int64_t)mg_psn_diff(psn, (uint32_t)near & MG_PSN_MASK);
}
static inline struct mg_swqe *mg_sq_at(const struct mg_qp *qp, uint32_t i)
{
	return (struct mg_swqe *)(qp->sq + (size_t)(i & (qp->sq_size - 1)) * qp->sq_stride);
}
static inline uint32_t mg_rq_fill(const struct mg_rq *rq)
{
	return rq->tail - rq->head;
}
static inline struct mg_ud_dest *mg_swqe_ud(const struct mg_qp *qp, struct mg_swqe *w)
{
	return (struct mg_ud_dest *)((uint8_t *)w + qp->sq_stride - sizeof(struct mg_ud_dest));
}
/* It takes packets (of UC and UD also after an error in sending). */
static inline bool mg_qp_connected(const struct mg_qp *qp)
{
	return qp->state == IBV_QPS_RTR || qp->state == IBV_QPS_RTS || qp->state == IBV_QPS_SQD ||
	       qp->state == IBV_QPS_SQE;
}
static inline bool mg_qp_unacked(const struct mg_qp *qp)
{
	return qp->type == IBV_QPT_UC || qp->type == IBV_QPT_UD;
}
static inline bool mg_qp_sends(const struct mg_qp *qp)
{
	return qp->state == IBV_QPS_RTS || qp->state == IBV_QPS_SQD;
}
static inline uint32_t mg_packets(uint32_t bytes, uint32_t mtu)
{
	return bytes ? (uint32_t)(((uint64_t)bytes + mtu - 1) / mtu) : 1;
}

/* engine.c */
void mg_qp_ready(struct mg_qp *qp); /* it may have something to send */
uint32_t mg_engine_handle(struct mg_engine *e);

/* heap.c: wake `qp` at `at` or earlier; timers are only ever looked at again, never lost */
int mg_heap_reserve(struct mg_engine *e, uint32_t n);
void mg_heap_wake(struct mg_qp *qp, mg_time at);
void mg_heap_remove(struct mg_qp *qp);

/* mr.c */
struct mg_mr *mg_mr_find(struct mg_engine *e, uint32_t key);
/* The memory behind [va, va+len) of `key` for a local or remote access, or NULL. */
uint8_t *mg_mr_map(struct mg_pd *pd, uint32_t key, uint64_t va, uint64_t len, unsigned need);

bool mg_copy(struct mg_engine *e, void *to, const void *from, size_t n); /* false: memory has gone */
/* sge.c: a message's bytes [offset, offset+len) in its scatter/gather list */
int mg_sge_gather(struct mg_pd *pd, const struct ibv_sge *sge, uint32_t n_sge, uint32_t offset, uint32_t len,
		  struct mg_pkt *p); /* fills p->iov; EFAULT: a bad lkey or range */
int mg_sge_scatter(struct mg_pd *pd, const struct ibv_sge *sge, uint32_t n_sge, uint32_t offset,
		   const uint8_t *data, uint32_t len); /* EFAULT as above, EMSGSIZE: the list is too short */

/* cq.c */
/* A completion of `qp` into `cq`. If there is no room both break: the QP not before its next turn. */
void mg_cq_push(struct mg_cq *cq, struct mg_qp *qp, const struct ibv_wc *wc, bool solicited);
void mg_cq_purge(struct mg_cq *cq,
		 uint32_t qpn); /* take out what tells of one QP; the others keep their order */

/* rq.c */
int mg_rq_init(struct mg_rq *rq, uint32_t max_wr, uint32_t max_sge);
void mg_rq_free(struct mg_rq *rq);
int mg_rq_resize(struct mg_rq *rq, uint32_t max_wr);		/* EINVAL: more are queued */
int mg_rq_post(struct mg_rq *rq, const struct ibv_recv_wr *wr); /* one; EINVAL, ENOMEM: full */
struct mg_rwqe *mg_rwqe_alloc(void);				/* room for one of any queue */
/*
 * The receive request for a message that begins, from `srq` or, when NULL, the QP's own queue. It is
 * qp->taken until mg_recv_done completes it; taking again meanwhile gives the same one. NULL: none.
 */
struct mg_rwqe *mg_recv_take(struct mg_qp *qp, struct mg_srq *srq);
int mg_recv_scatter(struct mg_qp *qp, uint32_t offset, const uint8_t *data,
		    uint32_t len); /* into qp->taken; as mg_sge_scatter */
void mg_recv_done(struct mg_qp *qp, struct ibv_wc *wc, bool solicited); /* fills wr_id and qp_num */
void mg_recv_flush(struct mg_qp *qp);

/* srq.c */
void mg_srq_taken(struct mg_srq *srq); /* one was taken: tell of the limit */

/* qp.c */
void mg_qp_error(struct mg_qp *qp);			       /* to ERR: everything queued is flushed */
void mg_qp_fatal(struct mg_qp *qp, enum ibv_event_type event); /* the same, and an async event */
void mg_qp_overrun(struct mg_qp *qp);			       /* a CQ had no room for its completion */
void mg_qp_deadline(struct mg_qp *qp);			       /* recompute and arm the QP's timer */
void mg_qp_timer(struct mg_qp *qp, mg_time now);
void mg_qp_hdrs(const struct mg_qp *qp, uint8_t opcode, uint32_t psn,
		struct mg_hdrs *h); /* what all packets share */
/* Finish *p from *h and the payload pieces already in p->iov (n_iov pieces, n bytes). */
void mg_pkt_finish(struct mg_qp *qp, struct mg_pkt *p, struct mg_hdrs *h, uint32_t n);

/* ah.c */
const struct mg_addr *mg_gid_at(const struct mg_engine *e, unsigned index); /* NULL: no such entry */
int mg_av_check(const struct mg_engine *e, const struct ibv_ah_attr *attr); /* EINVAL */
void mg_gids_resume(struct mg_engine *e); /* sources of AHs, QPs and queued requests, after a move */

/* qp_attr.c: 0, or EINVAL for a mask or value that is not allowed; ENOMEM */
int mg_qp_check_transition(enum ibv_qp_type type, enum ibv_qp_state from, enum ibv_qp_state to, int mask);
int mg_qp_check_attr(const struct mg_qp *qp, const struct ibv_qp_attr *attr, int mask);
int mg_qp_apply_attr(struct mg_qp *qp, const struct ibv_qp_attr *attr, int mask);

uint16_t mg_flow_sport(uint32_t a, uint32_t b); /* the source port that rdma_rxe gives a flow */

/* requester.c */
enum mg_tx_result {
	MG_TX_NONE,   /* nothing to send now */
	MG_TX_HELD,   /* something, but it can wait (MG_TX_LAZY) */
	MG_TX_PACKET, /* *p is filled */
};
enum mg_tx_result mg_req_tx(struct mg_qp *qp, mg_time now, unsigned flags, struct mg_pkt *p);
/* The packet at snd of a SEND or WRITE; enum ibv_wc_status. */
int mg_req_build_data(struct mg_qp *qp, struct mg_swqe *w, bool ackreq, struct mg_pkt *p);
void mg_req_go_back(struct mg_qp *qp);		   /* transmit again from the oldest unacknowledged */
void mg_req_fault(struct mg_qp *qp, uint32_t psn); /* the memory of the request that has it has gone */
void mg_req_run_local(struct mg_qp *qp);	   /* local operations whose turn has come */
void mg_req_flush(struct mg_qp *qp);
void mg_req_reset(struct mg_qp *qp);
mg_time mg_req_deadline(const struct mg_qp *qp);
void mg_req_timer(struct mg_qp *qp, mg_time now);
uint64_t mg_req_ack_timeout(const struct mg_qp *qp);   /* ns, 0: none */
void mg_req_peer_known(struct mg_qp *qp, mg_time now); /* the peer has turned out to be of our kind */
void mg_req_fresh_retries(struct mg_qp *qp);	       /* there was progress, or there may be again */
uint64_t mg_req_soft_base(const struct mg_qp *qp);     /* ns until the first soft retransmission */
void mg_req_restart(struct mg_qp *qp, mg_time now);    /* go back with fresh retry counters and timers */

/* unack.c: UC and UD */
enum mg_tx_result mg_unack_tx(struct mg_qp *qp, mg_time now, struct mg_pkt *p);
void mg_unack_heard(struct mg_qp *qp, uint32_t psn); /* the peer has seen all up to there */
void mg_unack_timer(struct mg_qp *qp, mg_time now);
void mg_unack_resume(struct mg_qp *qp);
void mg_qp_sqe(struct mg_qp *qp); /* to SQE: what is to be sent is flushed */

/* uc.c, ud.c */
void mg_uc_rx(struct mg_qp *qp, const struct mg_hdrs *h);
void mg_ud_rx(struct mg_qp *qp, const struct mg_rx *meta, const struct mg_hdrs *h);
#define MG_QPN_MULTICAST 0xffffffu
void mg_mcast_rx(struct mg_engine *e, const struct mg_rx *meta, const struct mg_hdrs *h);

/* completer.c */
void mg_comp_rx(struct mg_qp *qp, mg_time now, const struct mg_hdrs *h);
void mg_comp_advance(struct mg_qp *qp);				 /* complete what lies below una */
bool mg_comp_ack_to(struct mg_qp *qp, mg_time now, uint64_t to); /* false: READ data below `to` is missing */
void mg_comp_fail(struct mg_qp *qp, enum ibv_wc_status status);	 /* the oldest request fails; QP to ERR */

/* atomic.c */
static inline bool mg_wr_is_atomic(unsigned opcode)
{
	return opcode == IBV_WR_ATOMIC_CMP_AND_SWP || opcode == IBV_WR_ATOMIC_FETCH_AND_ADD;
}
/* Both are answered by an empty READ response (IBA annex A19). */
static inline bool mg_wr_is_placed(unsigned opcode)
{
	return opcode == MG_WR_FLUSH || opcode == MG_WR_ATOMIC_WRITE;
}
/* Requests with an answer of their own: nothing else acknowledges them (IBA 9.7.5.1.2). */
static inline bool mg_wr_is_answered(unsigned opcode)
{
	return opcode == IBV_WR_RDMA_READ || mg_wr_is_atomic(opcode) || mg_wr_is_placed(opcode);
}
/* A READ of no bytes: an acknowledgement tells all there is. */
static inline bool mg_wqe_is_empty_read(const struct mg_swqe *w)
{
	return w->opcode == IBV_WR_RDMA_READ && !w->length;
}
/* One of CMP_SWAP, FETCH_ADD, FLUSH, ATOMIC_WRITE into a packet; an enum ibv_wc_status. */
int mg_atomic_build(struct mg_qp *qp, const struct mg_swqe *w, struct mg_pkt *p);
/* Check and execute a peer's: 0 and the value there was before, or the NAK to send. */
uint8_t mg_atomic_execute(struct mg_qp *qp, const struct mg_hdrs *h, uint64_t *orig);

/* mw.c */
static inline bool mg_wr_is_local(unsigned opcode)
{
	return opcode == IBV_WR_BIND_MW || opcode == IBV_WR_LOCAL_INV;
}
/* What a peer's key opens: a region, or a window of this QP's. */
uint8_t *mg_mw_map(const struct mg_qp *qp, uint32_t rkey, uint64_t va, uint64_t len, unsigned need);
static inline uint8_t *mg_remote_map(const struct mg_qp *qp, uint32_t rkey, uint64_t va, uint64_t len,
				     unsigned need)
{
	uint8_t *at = mg_mr_map(qp->pd, rkey, va, len, need);

	return at || !qp->e->mws.used ? at : mg_mw_map(qp, rkey, va, len, need);
}
int mg_mw_invalidate(const struct mg_qp *qp, uint32_t rkey);		 /* EINVAL: nothing that may be */
enum ibv_wc_status mg_mw_run(struct mg_qp *qp, const struct mg_swqe *w); /* a local operation */
void mg_mw_qp_gone(struct mg_qp *qp);
void mg_key_draw(struct mg_engine *e, uint32_t *key); /* one that no region or window has */

/* responder.c */
void mg_resp_rx(struct mg_qp *qp, mg_time now, const struct mg_hdrs *h);
enum mg_tx_result mg_resp_tx(struct mg_qp *qp, unsigned flags, struct mg_pkt *p); /* answer.c */
void mg_resp_fault(struct mg_qp *qp, uint32_t psn); /* the memory that an answer is read from has gone */
void mg_resp_flush(struct mg_qp *qp);
/* Before the QP ends by no fault of the peer's: what it sent and was executed is still answered and acknowledged. */
void mg_resp_last_ack(struct mg_qp *qp);
void mg_resp_reset(struct mg_qp *qp);
int mg_resp_resources(struct mg_qp *qp, uint32_t n);
void mg_resp_comm_est(struct mg_qp *qp); /* a packet was accepted: IBV_EVENT_COMM_EST, once, in RTR */

/* gsi.c */
struct mg_gsi_user;
size_t mg_gsi_tx(struct mg_engine *e, struct mg_pkt *out, size_t max);
void mg_gsi_rx(struct mg_engine *e, mg_time now, const struct mg_rx *meta, const struct mg_hdrs *h);
void mg_gsi_timer(struct mg_engine *e, mg_time now);
void mg_gsi_resume(struct mg_engine *e, mg_time now);
void mg_gsi_free(struct mg_engine *e);

/* migrate.c */
/*
 * It has sent a token of its connection, or ours back. The capability bit alone is no proof: whatever the network sets
 * in reserved bits is to be ignored, and a peer of another kind must be spared what it cannot take.
 */
static inline bool mg_mig_peer_is_ours(const struct mg_qp *qp)
{
	return qp->mig.peer_capable && (qp->mig.have_peer_token || qp->mig.token_acked);
}
void mg_mig_connected(struct mg_qp *qp, mg_time now);	/* reached RTR */
void mg_mig_heard(struct mg_qp *qp, mg_time now);	/* a capable packet from the peer */
void mg_mig_heard_plain(struct mg_qp *qp, mg_time now); /* one without the bit */
void mg_mig_rx(struct mg_qp *qp, mg_time now, const struct mg_rx *meta, const struct mg_hdrs *h);
bool mg_mig_tx(struct mg_qp *qp, struct mg_pkt *p);
void mg_mig_pause(struct mg_qp *qp, mg_time now);
/* Nobody answers, and another QP to the same address was told why: pause this one too. False: there is none. */
bool mg_mig_pause_with_others(struct mg_qp *qp, mg_time now);
void mg_mig_unpause(struct mg_qp *qp, mg_time now);
/* A paused QP has sent a request. */
void mg_mig_probed(struct mg_qp *qp, mg_time now);
mg_time mg_mig_deadline(const struct mg_qp *qp);
void mg_mig_timer(struct mg_qp *qp, mg_time now);
void mg_mig_resume(struct mg_qp *qp, mg_time now);

#endif
