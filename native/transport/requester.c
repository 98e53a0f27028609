/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * requester.c - turns posted requests into packets; go-back-N and its timers.
 *
 * Two timers guard what is in flight. The local ACK timeout is the standard's (IBA 9.7.6.1.3):
 * each expiry without progress costs one of retry_cnt. Long before it (some round trips), a soft
 * timer sends the oldest packet once more, at no cost, so that a lost tail is mended in
 * milliseconds instead of the 67 ms that programs usually ask for. A peer that has not shown that it is
 * of our kind gets the standard's time: repeating a request is work for it, and may do harm (see
 * spares_peer).
 */
#include "transport/internal.h"

#include <stdlib.h>

#define SOFT_MIN (4 * MG_MS)
#define SOFT_MAX (1 * MG_S)
#define LAZY_BYTES 512u	  /* sends up to this size may wait for company... */
#define LAZY_IN_FLIGHT 8u /* ...while this many packets are on their way... */
#define LAZY_BATCH 16u	  /* ...until this many requests are together */
#define ACK_EVERY 32u	  /* packets between requests for an acknowledgement */
#define GRACE 3u	  /* times as many retries again, see lives */

void mg_req_reset(struct mg_qp *qp)
{
	struct mg_requester *r = &qp->req;
	uint64_t *reads = r->reads;

	*r = (struct mg_requester){.reads = reads, .soft_rto = SOFT_MIN};
	mg_window_init(&r->win);
}

uint64_t mg_req_ack_timeout(const struct mg_qp *qp)
{
	/* IBA 9.7.6.1.3 allows one to four times the nominal value: a busy CPU answers late, not never. */
	return qp->attr.timeout ? 4 * (4096ull << qp->attr.timeout) : 0;
}

uint64_t mg_req_soft_base(const struct mg_qp *qp)
{
	uint64_t rto = SOFT_MIN + 4 * qp->req.srtt;
	uint64_t nominal = qp->attr.timeout ? 4096ull << qp->attr.timeout : SOFT_MAX;

	if (!mg_mig_peer_is_ours(qp) && rto < nominal)
		rto = nominal;
	return rto > SOFT_MAX ? SOFT_MAX : rto;
}

void mg_req_fresh_retries(struct mg_qp *qp)
{
	qp->req.retry_left = qp->attr.retry_cnt;
	qp->req.grace_left = (uint8_t)(GRACE * qp->attr.retry_cnt);
}

void mg_req_go_back(struct mg_qp *qp)
{
	struct mg_requester *r = &qp->req;

	r->snd = r->una;
	r->cur = r->head;
	r->read_fill = 0;
	r->rtt_sent = 0;
	mg_qp_ready(qp);
}

void mg_req_fault(struct mg_qp *qp, uint32_t psn)
{
	struct mg_requester *r = &qp->req;
	uint64_t at = mg_psn_extend(r->una, psn);

	for (uint32_t i = r->head; i != r->tail; i++) {
		struct mg_swqe *w = mg_sq_at(qp, i);

		if (at < w->psn || at >= w->psn + w->n_psn)
			continue;
		/* As if it had been found before transmission: earlier requests complete first. */
		w->status = IBV_WC_LOC_PROT_ERR;
		mg_req_go_back(qp);
		mg_comp_advance(qp);
		return;
	}
}

void mg_req_restart(struct mg_qp *qp, mg_time now)
{
	struct mg_requester *r = &qp->req;

	mg_req_fresh_retries(qp);
	r->rnr_left = qp->attr.rnr_retry;
	r->rnr_until = 0;
	r->probing = false;
	r->soft_rto = mg_req_soft_base(qp);
	r->ack_since = r->max > r->una ? now : 0;
	r->soft_at = now + r->soft_rto;
	r->gap_recover = 0;
	mg_req_go_back(qp);
}

void mg_req_flush(struct mg_qp *qp)
{
	struct mg_requester *r = &qp->req;

	for (; r->head != r->tail; r->head++) {
		struct ibv_wc wc = {.wr_id = mg_sq_at(qp, r->head)->wr_id,
				    .status = IBV_WC_WR_FLUSH_ERR,
				    .qp_num = qp->qpn};

		mg_cq_push(qp->send_cq, qp, &wc, false);
	}
	r->cur = r->tail;
	r->una = r->snd = r->max = r->end;
	r->ack_since = r->rnr_until = 0;
}

/* ---- building packets ------------------------------------------------------------------------- */

static uint8_t data_opcode(const struct mg_swqe *w, bool first, bool last)
{
	bool write = w->opcode == IBV_WR_RDMA_WRITE || w->opcode == IBV_WR_RDMA_WRITE_WITH_IMM;
	bool imm = w->opcode == IBV_WR_SEND_WITH_IMM || w->opcode == IBV_WR_RDMA_WRITE_WITH_IMM;
	bool inv = w->opcode == IBV_WR_SEND_WITH_INV;
	uint8_t base =
		write ? MG_OP_WRITE_FIRST : MG_OP_SEND_FIRST; /* FIRST MIDDLE LAST LAST_IMM ONLY ONLY_IMM */

	if (last && inv)
		return first ? MG_OP_SEND_ONLY_INV : MG_OP_SEND_LAST_INV;
	if (first && last)
		return (uint8_t)(base + 4 + imm);
	if (last)
		return (uint8_t)(base + 2 + imm);
	return first ? base : (uint8_t)(base + 1);
}

int mg_req_build_data(struct mg_qp *qp, struct mg_swqe *w, bool ackreq, struct mg_pkt *p)
{
	struct mg_requester *r = &qp->req;
	uint64_t i = r->snd - w->psn;
	uint32_t offset = (uint32_t)i * qp->mtu;
	uint32_t n = w->length - offset < qp->mtu ? w->length - offset : qp->mtu;
	bool first = i == 0, last = i + 1 == w->n_psn;
	struct mg_hdrs h;

	p->n_iov = 0;
	if (w->flags & MG_WQE_INLINE) {
		if (n)
			p->iov[p->n_iov++] =
				(struct iovec){.iov_base = w->u.inline_data + offset, .iov_len = n};
	} else if (n && mg_sge_gather(qp->pd, w->u.sge, w->n_sge, offset, n, p)) {
		return IBV_WC_LOC_PROT_ERR;
	}
	mg_qp_hdrs(qp, data_opcode(w, first, last), (uint32_t)r->snd, &h);
	h.ackreq = ackreq || (last && !mg_qp_unacked(qp));
	h.solicited = last && w->flags & MG_WQE_SOLICITED;
	h.imm = h.ieth = w->imm;
	h.reth.va = w->remote_addr;
	h.reth.rkey = w->rkey;
	h.reth.length = w->length;
	h.xrc_srqn = w->srqn;
	mg_pkt_finish(qp, p, &h, n);
	return IBV_WC_SUCCESS;
}

static void build_read(struct mg_qp *qp, const struct mg_swqe *w, uint32_t n_psn, struct mg_pkt *p)
{
	struct mg_requester *r = &qp->req;
	uint32_t offset = (uint32_t)(r->snd - w->psn) * qp->mtu;
	uint64_t bytes = (uint64_t)n_psn * qp->mtu;
	struct mg_hdrs h;

	p->n_iov = 0;
	mg_qp_hdrs(qp, MG_OP_READ_REQ, (uint32_t)r->snd, &h);
	h.ackreq = true;
	h.xrc_srqn = w->srqn;
	h.reth.va = w->remote_addr + offset;
	h.reth.rkey = w->rkey;
	h.reth.length = w->length - offset < bytes ? w->length - offset : (uint32_t)bytes;
	mg_pkt_finish(qp, p, &h, 0);
}

/* A READ asks for at most read_chunk packets at a time, always up to the same boundaries: so a
 * repeated request never reaches past one that the responder may have executed already. */
static uint32_t read_packets(const struct mg_qp *qp, const struct mg_swqe *w)
{
	uint32_t i = (uint32_t)(qp->req.snd - w->psn);
	uint32_t chunk = qp->req.read_chunk - i % qp->req.read_chunk;

	return chunk < w->n_psn - i ? chunk : w->n_psn - i;
}

/*
 * Linux's rdma_rxe (rxe_resp.c) answers a repeated READ with a remote access error if the last READ or
 * WRITE it executed was empty: read_reply() goes by qp->resp.length, which is not the repeated request's.
 * So an empty request waits until all data asked for before it is there.
 */
static bool spares_peer(const struct mg_qp *qp, const struct mg_swqe *w)
{
	const struct mg_requester *r = &qp->req;
	bool reth = w->opcode == IBV_WR_RDMA_WRITE || w->opcode == IBV_WR_RDMA_WRITE_WITH_IMM ||
		    w->opcode == IBV_WR_RDMA_READ || w->opcode == MG_WR_FLUSH;

	return reth && !w->length && !mg_mig_peer_is_ours(qp) && r->snd >= r->max && r->una < r->data_end;
}

static bool may_send(const struct mg_qp *qp, const struct mg_swqe *w)
{
	const struct mg_requester *r = &qp->req;
	bool begins = r->snd == w->psn;

	if (!mg_qp_sends(qp) || qp->mig.resuming || r->rnr_until || w->status != IBV_WC_SUCCESS)
		return false;
	if ((r->probing || qp->mig.paused) && !r->probe_credit)
		return false;
	if (qp->state == IBV_QPS_SQD && begins && r->snd >= r->max)
		return false;
	if (begins && spares_peer(qp, w))
		return false;
	return !(begins && w->flags & MG_WQE_FENCE && r->read_fill);
}

static bool can_wait(const struct mg_qp *qp, const struct mg_swqe *w, uint64_t in_flight)
{
	const struct mg_requester *r = &qp->req;

	return w->length <= LAZY_BYTES && !mg_wr_is_answered(w->opcode) && in_flight >= LAZY_IN_FLIGHT &&
	       r->tail - r->cur < LAZY_BATCH && r->snd >= r->max;
}

static void sent(struct mg_qp *qp, const struct mg_swqe *w, mg_time now, uint32_t n, bool ackreq)
{
	struct mg_requester *r = &qp->req;

	if (r->snd < r->max) {
		qp->retransmits++;
		qp->e->counters[MG_CNT_RETRANSMITS]++;
	} else if (!r->rtt_sent && ackreq) {
		r->rtt_psn = r->snd + n - 1;
		r->rtt_sent = now;
	}
	if (!r->ack_since) {
		r->ack_since = now;
		r->soft_rto = mg_req_soft_base(qp);
		r->soft_at = now + r->soft_rto;
	}
	if (w->opcode == IBV_WR_RDMA_READ && w->length && r->snd + n > r->data_end)
		r->data_end = r->snd + n;
	r->snd += n;
	if (r->snd > r->max)
		r->max = r->snd;
	if (r->snd >= w->psn + w->n_psn)
		r->cur++;
	/* rdma_rxe drops a repeated empty READ; what follows brings an acknowledgement of both. */
	r->probe_credit = mg_wqe_is_empty_read(w);
	if (qp->mig.paused)
		mg_mig_probed(qp, now);
}

/*
 * Carry out local operations whose turn has come. An invalidation waits until all requests before it
 * are complete (IBA 10.6.5.1), a binding only when it is fenced.
 */
void mg_req_run_local(struct mg_qp *qp)
{
	struct mg_requester *r = &qp->req;
	struct mg_swqe *w;

	while (r->cur != r->tail && mg_wr_is_local((w = mg_sq_at(qp, r->cur))->opcode)) {
		if (w->flags & MG_WQE_DONE) { /* on the way once more, after going back */
			r->cur++;
			continue;
		}
		if (qp->state != IBV_QPS_RTS || w->status != IBV_WC_SUCCESS)
			return;
		if (w->opcode == IBV_WR_LOCAL_INV ? r->cur != r->head
						  : w->flags & MG_WQE_FENCE && r->read_fill)
			return;
		w->status = (uint8_t)mg_mw_run(qp, w);
		if (w->status == IBV_WC_SUCCESS) {
			w->flags |= MG_WQE_DONE;
			r->cur++;
		}
		mg_comp_advance(qp); /* it may be its time to complete, or to fail */
	}
}

void mg_req_peer_known(struct mg_qp *qp, mg_time now)
{
	struct mg_requester *r = &qp->req;

	if (!r->ack_since || mg_qp_unacked(qp))
		return;
	r->soft_rto = mg_req_soft_base(qp);
	if (now + r->soft_rto < r->soft_at)
		r->soft_at = now + r->soft_rto;
}

/*
 * More in flight only makes a slow peer's queue longer. rdma_rxe does not stand that: if its own retry timer
 * fires while our ACKs wait behind our requests, it repeats what was acknowledged and gets its PSNs wrong
 * (docs/interop.md).
 */
static uint32_t window_of(const struct mg_qp *qp)
{
	uint32_t window = qp->req.win.cwnd;

	return mg_mig_peer_is_ours(qp) || window < MG_WIN_PLAIN ? window : MG_WIN_PLAIN;
}

enum mg_tx_result mg_req_tx(struct mg_qp *qp, mg_time now, unsigned flags, struct mg_pkt *p)
{
	struct mg_requester *r = &qp->req;
	uint64_t in_flight = r->snd - r->una;
	uint32_t window = window_of(qp), n = 1;
	struct mg_swqe *w;
	bool ackreq;
	int status = IBV_WC_SUCCESS;

	if (r->cur != r->tail && mg_wr_is_local(mg_sq_at(qp, r->cur)->opcode))
		mg_req_run_local(qp);
	if (r->snd == r->end)
		return MG_TX_NONE;
	w = mg_sq_at(qp, r->cur);
	if (mg_wr_is_local(w->opcode) || !may_send(qp, w) || in_flight >= window)
		return MG_TX_NONE;
	if (flags & MG_TX_LAZY && !r->probing && can_wait(qp, w, in_flight))
		return MG_TX_HELD;
	ackreq = in_flight + 1 >= window || r->snd % ACK_EVERY == 0 || r->probing || qp->mig.paused;
	if (mg_wr_is_answered(w->opcode)) {
		n = w->opcode == IBV_WR_RDMA_READ ? read_packets(qp, w) : 1;
		/* Behind a lone empty READ (`probe_credit`) a long one goes whatever the window: nothing else helps. */
		if (r->read_fill == r->n_reads ||
		    (in_flight && in_flight + n > window && !(r->probing && r->probe_credit)))
			return MG_TX_NONE;
		if (w->opcode == IBV_WR_RDMA_READ)
			build_read(qp, w, n, p);
		else
			status = mg_atomic_build(qp, w, p);
		if (status == IBV_WC_SUCCESS)
			r->reads[(r->read_head + r->read_fill++) % r->n_reads] = r->snd + n;
	} else {
		status = mg_req_build_data(qp, w, ackreq, p);
	}
	if (status != IBV_WC_SUCCESS) {
		/* Earlier requests complete first; then this one fails (IBA 10.8.2.1). */
		w->status = (uint8_t)status;
		mg_comp_advance(qp);
		return MG_TX_NONE;
	}
	sent(qp, w, now, n, ackreq || r->snd + 1 == w->psn + w->n_psn || mg_wr_is_answered(w->opcode));
	return MG_TX_PACKET;
}

/* ---- timers ------------------------------------------------------------------------------------ */

mg_time mg_req_deadline(const struct mg_qp *qp)
{
	const struct mg_requester *r = &qp->req;
	uint64_t timeout = mg_req_ack_timeout(qp);

	if (!mg_qp_sends(qp) || qp->mig.paused || qp->mig.resuming)
		return MG_NEVER;
	if (r->stall_until)
		return r->stall_until;
	if (r->rnr_until)
		return r->rnr_until;
	if (!r->ack_since)
		return MG_NEVER;
	if (timeout && r->ack_since + timeout < r->soft_at)
		return r->ack_since + timeout;
	return r->soft_at;
}

/*
 * Whether a peer that is not of our kind has sent us anything in the time of all retries, on this connection or
 * another. rdma_rxe serves its QPs in turns; on a busy machine one that was not served for 3 s has answered
 * everything then (docs/interop.md).
 */
static bool lives(const struct mg_qp *qp, mg_time now)
{
	uint64_t span = qp->attr.retry_cnt * mg_req_ack_timeout(qp);
	const struct mg_qp *other;

	if (mg_mig_peer_is_ours(qp))
		return false;
	for (uint32_t it = 0; (other = mg_idtab_next(&qp->e->qps, &it));)
		if (!mg_mig_peer_is_ours(other) && other->mig.last_heard &&
		    now - other->mig.last_heard < span &&
		    !memcmp(other->peer.gid, qp->peer.gid, sizeof(qp->peer.gid)))
			return true;
	return false;
}

void mg_req_timer(struct mg_qp *qp, mg_time now)
{
	struct mg_requester *r = &qp->req;
	uint64_t timeout = mg_req_ack_timeout(qp);

	if (qp->mig.paused || qp->mig.resuming)
		return;
	if (mg_qp_unacked(qp)) {
		mg_unack_timer(qp, now);
		return;
	}
	if (r->rnr_until) {
		if (now < r->rnr_until)
			return;
		r->rnr_until = 0;
		mg_qp_ready(qp);
		return;
	}
	if (!r->ack_since)
		return;
	if (timeout && now >= r->ack_since + timeout) {
		qp->e->counters[MG_CNT_TIMEOUTS]++;
		if (r->retry_left) {
			r->retry_left--;
		} else if (r->grace_left && lives(qp, now)) {
			r->grace_left--;
		} else {
			if (!mg_mig_pause_with_others(qp, now))
				mg_comp_fail(qp, IBV_WC_RETRY_EXC_ERR);
			return;
		}
		r->ack_since = now;
	} else if (now < r->soft_at) {
		return;
	}
	r->soft_rto = r->soft_rto * 2 > SOFT_MAX ? SOFT_MAX : r->soft_rto * 2;
	r->soft_at = now + r->soft_rto;
	mg_window_loss(&r->win, r->una, r->max);
	mg_req_go_back(qp);
	r->probing = r->probe_credit = true;
}
