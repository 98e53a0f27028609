/* SPDX-License-Identifier: BSD-3-Clause */
/* completer.c - answers to our requests: ACK, NAK, READ data; completions in posting order. */
#include "transport/internal.h"

#include <errno.h>

static enum ibv_wc_opcode wc_opcode(const struct mg_swqe *w)
{
	switch (w->opcode) {
	case IBV_WR_RDMA_WRITE:
	case IBV_WR_RDMA_WRITE_WITH_IMM: return IBV_WC_RDMA_WRITE;
	case IBV_WR_RDMA_READ: return IBV_WC_RDMA_READ;
	case IBV_WR_ATOMIC_CMP_AND_SWP: return IBV_WC_COMP_SWAP;
	case IBV_WR_ATOMIC_FETCH_AND_ADD: return IBV_WC_FETCH_ADD;
	case IBV_WR_BIND_MW: return IBV_WC_BIND_MW;
	case IBV_WR_LOCAL_INV: return IBV_WC_LOCAL_INV;
	case MG_WR_FLUSH: return (enum ibv_wc_opcode)MG_WC_FLUSH;
	case MG_WR_ATOMIC_WRITE: return (enum ibv_wc_opcode)MG_WC_ATOMIC_WRITE;
	default: return IBV_WC_SEND;
	}
}

static void complete(struct mg_qp *qp, const struct mg_swqe *w, enum ibv_wc_status status)
{
	struct ibv_wc wc = {.wr_id = w->wr_id,
			    .status = status,
			    .opcode = wc_opcode(w),
			    .byte_len = w->length,
			    .qp_num = qp->qpn};

	qp->send_done++;
	if (w->flags & MG_WQE_SIGNALED || status != IBV_WC_SUCCESS)
		mg_cq_push(qp->send_cq, qp, &wc, false);
}

void mg_comp_fail(struct mg_qp *qp, enum ibv_wc_status status)
{
	struct mg_requester *r = &qp->req;

	if (r->head != r->tail)
		complete(qp, mg_sq_at(qp, r->head++), status);
	if (mg_qp_unacked(qp)) {
		mg_qp_sqe(qp);
		return;
	}
	mg_resp_last_ack(qp);
	mg_qp_error(qp);
}

void mg_comp_advance(struct mg_qp *qp)
{
	struct mg_requester *r = &qp->req;

	for (; r->head != r->tail; r->head++) {
		struct mg_swqe *w = mg_sq_at(qp, r->head);

		if (w->status != IBV_WC_SUCCESS && r->una >= w->psn) {
			mg_comp_fail(qp, w->status);
			return;
		}
		if (w->psn + w->n_psn > r->una || (mg_wr_is_local(w->opcode) && !(w->flags & MG_WQE_DONE)))
			break;
		complete(qp, w, IBV_WC_SUCCESS);
	}
	if (qp->state == IBV_QPS_SQD && qp->sqd_notify && r->una == r->max &&
	    (r->head == r->tail || mg_sq_at(qp, r->head)->psn == r->una)) {
		qp->sqd_notify = false;
		qp->e->ops->async_event(qp->e->arg, IBV_EVENT_SQ_DRAINED, qp);
	}
}

static void progress(struct mg_qp *qp, mg_time now, uint64_t to)
{
	struct mg_requester *r = &qp->req;
	bool limited = r->max - r->una >= r->win.cwnd || (r->n_reads && r->read_fill == r->n_reads);

	if (r->rtt_sent && to > r->rtt_psn) {
		uint64_t sample = now - r->rtt_sent;

		r->srtt = r->srtt ? r->srtt - r->srtt / 8 + sample / 8 : sample;
		r->rtt_sent = 0;
	}
	mg_window_acked(&r->win, (uint32_t)(to - r->una), limited);
	r->una = to;
	mg_req_fresh_retries(qp);
	r->rnr_left = qp->attr.rnr_retry;
	r->probing = r->probe_credit = false;
	r->soft_rto = mg_req_soft_base(qp);
	r->ack_since = r->max > r->una ? now : 0;
	r->soft_at = now + r->soft_rto;
	while (r->read_fill && r->reads[r->read_head] <= to) {
		r->read_head = (r->read_head + 1) % r->n_reads;
		r->read_fill--;
	}
	mg_comp_advance(qp);
	if (!mg_qp_sends(qp))
		return;
	if (r->snd < r->una)
		r->snd = r->una;
	if (r->snd == r->una)
		r->cur = r->head;
	if (qp->mig.paused)
		mg_mig_unpause(qp, now);
	if (r->cur != r->tail)
		mg_qp_ready(qp);
}

bool mg_comp_ack_to(struct mg_qp *qp, mg_time now, uint64_t to)
{
	struct mg_requester *r = &qp->req;
	uint64_t limit = r->una;

	for (uint32_t i = r->head; i != r->tail && limit < to; i++) {
		struct mg_swqe *w = mg_sq_at(qp, i);

		/* Only its answer acknowledges a READ or an atomic: an ACK brings no data. */
		if (mg_wr_is_answered(w->opcode) && !mg_wqe_is_empty_read(w)) {
			if (w->psn > limit)
				limit = w->psn;
			break;
		}
		limit = w->psn + w->n_psn;
	}
	if (limit > to)
		limit = to;
	if (limit > r->una)
		progress(qp, now, limit);
	return limit == to;
}

/* Something behind `una` has arrived: what lies before it was lost (IBA 9.7.5.2.8, implied NAK). */
static void implied_loss(struct mg_qp *qp)
{
	struct mg_requester *r = &qp->req;

	if (r->una < r->gap_recover)
		return;
	r->gap_recover = r->max;
	mg_window_loss(&r->win, r->una, r->max);
	mg_req_go_back(qp);
}

static void rx_read(struct mg_qp *qp, mg_time now, uint64_t psn, const struct mg_hdrs *h)
{
	struct mg_requester *r = &qp->req;
	struct mg_swqe *w;
	uint32_t offset, n;

	if (!mg_comp_ack_to(qp, now, psn)) {
		implied_loss(qp);
		return;
	}
	if (!mg_qp_sends(qp) || r->head == r->tail || r->una != psn)
		return;
	w = mg_sq_at(qp, r->head);
	if (mg_wr_is_placed(w->opcode) && h->opcode == MG_OP_READ_RESP_ONLY && !h->payload_len) {
		progress(qp, now, psn + 1);
		return;
	}
	if (w->opcode != IBV_WR_RDMA_READ || psn < w->psn)
		return;
	offset = (uint32_t)(psn - w->psn) * qp->mtu;
	n = w->length - offset < qp->mtu ? w->length - offset : qp->mtu;
	/* FIRST/MIDDLE/LAST is not looked at: after a retry from the middle, responders differ. */
	if (h->payload_len != n) {
		qp->e->counters[MG_CNT_RX_MALFORMED]++;
		return;
	}
	if (n && mg_sge_scatter(qp->pd, w->u.sge, w->n_sge, offset, h->payload, n)) {
		mg_comp_fail(qp, IBV_WC_LOC_PROT_ERR);
		return;
	}
	progress(qp, now, psn + 1);
}

static void rx_atomic(struct mg_qp *qp, mg_time now, uint64_t psn, const struct mg_hdrs *h)
{
	struct mg_requester *r = &qp->req;
	struct mg_swqe *w;

	if (!mg_comp_ack_to(qp, now, psn)) {
		implied_loss(qp);
		return;
	}
	if (!mg_qp_sends(qp) || r->head == r->tail || r->una != psn)
		return;
	w = mg_sq_at(qp, r->head);
	if (!mg_wr_is_atomic(w->opcode))
		return;
	if (mg_sge_scatter(qp->pd, w->u.sge, w->n_sge, 0, (const uint8_t *)&h->atomic_orig,
			   sizeof(h->atomic_orig))) {
		mg_comp_fail(qp, IBV_WC_LOC_PROT_ERR);
		return;
	}
	progress(qp, now, psn + 1);
}

static void rx_rnr(struct mg_qp *qp, mg_time now, uint64_t psn, uint8_t syndrome)
{
	struct mg_requester *r = &qp->req;

	qp->e->counters[MG_CNT_RNR_NAKS_RX]++;
	if (!mg_comp_ack_to(qp, now, psn)) {
		implied_loss(qp);
		return;
	}
	if (!mg_qp_sends(qp) || r->rnr_until)
		return;
	if (!r->rnr_left) {
		mg_comp_fail(qp, IBV_WC_RNR_RETRY_EXC_ERR);
		return;
	}
	if (qp->attr.rnr_retry != 7) /* 7: for ever (IBA 9.7.5.2.8) */
		r->rnr_left--;
	if (qp->mig.paused)
		mg_mig_unpause(qp, now);
	mg_req_fresh_retries(qp);
	r->probing = false;
	r->ack_since = 0; /* the responder lives: its timer counts, ours starts when we send again */
	mg_req_go_back(qp);
	r->rnr_until = now + mg_rnr_timer_ns(syndrome & 0x1f);
}

/*
 * The peer has broken off at `psn`. False: not yet, since a READ or atomic whose answer is missing cannot be
 * passed over, unless the NAK is about that one.
 */
static bool broken_off(struct mg_qp *qp, mg_time now, uint64_t psn, enum ibv_wc_status status)
{
	const struct mg_requester *r = &qp->req;

	if (!mg_comp_ack_to(qp, now, psn) &&
	    (r->head == r->tail || psn >= mg_sq_at(qp, r->head)->psn + mg_sq_at(qp, r->head)->n_psn))
		return false;
	if (mg_qp_sends(qp))
		mg_comp_fail(qp, status);
	return true;
}

static void rx_nak(struct mg_qp *qp, mg_time now, uint64_t psn, uint8_t syndrome)
{
	struct mg_requester *r = &qp->req;
	enum ibv_wc_status status;

	switch (syndrome) {
	case MG_NAK_STOPPED:
		qp->e->counters[MG_CNT_NAK_STOPPED_RX]++;
		mg_mig_pause(qp, now);
		return;
	case MG_NAK_PSN_SEQ:
		qp->e->counters[MG_CNT_SEQ_NAKS_RX]++;
		if (!mg_comp_ack_to(qp, now, psn)) {
			implied_loss(qp);
			return;
		}
		if (!mg_qp_sends(qp))
			return;
		if (qp->mig.paused)
			mg_mig_unpause(qp, now);
		mg_window_loss(&r->win, r->una, r->max);
		r->probing = false;
		mg_req_go_back(qp);
		return;
	case MG_NAK_INVALID_REQ: status = IBV_WC_REM_INV_REQ_ERR; break;
	case MG_NAK_REM_ACCESS: status = IBV_WC_REM_ACCESS_ERR; break;
	case MG_NAK_REM_OP: status = IBV_WC_REM_OP_ERR; break;
	case MG_NAK_INV_RD: status = IBV_WC_REM_INV_RD_REQ_ERR; break;
	default: return; /* reserved: ignored (IBA 9.7.5.1.2) */
	}
	if (!broken_off(qp, now, psn, status)) {
		/* It will not say so again: the answer may be late only. */
		r->nak_psn = psn;
		r->nak_status = (uint8_t)status;
		implied_loss(qp);
	}
}

void mg_comp_rx(struct mg_qp *qp, mg_time now, const struct mg_hdrs *h)
{
	struct mg_requester *r = &qp->req;
	uint64_t psn = mg_psn_extend(r->una, h->psn);

	if (h->opcode == MG_OP_ACK && h->aeth.syndrome == MG_NAK_STOPPED && psn == r->max &&
	    mg_qp_sends(qp)) {
		/* Unasked: nothing in flight is needed, the next packet would be asked about (docs/protocol.md, 4). */
		rx_nak(qp, now, psn, h->aeth.syndrome);
		return;
	}
	if (!mg_qp_sends(qp) || psn < r->una || psn >= r->max)
		return; /* a ghost or duplicate: nothing it could be about (IBA 9.7.5.1.1) */
	if (h->opcode != MG_OP_ACK) {
		if (h->opcode >= MG_OP_READ_RESP_FIRST && h->opcode <= MG_OP_READ_RESP_ONLY)
			rx_read(qp, now, psn, h);
		else if (h->opcode == MG_OP_ATOMIC_ACK && (h->aeth.syndrome & MG_AETH_KIND) == 0)
			rx_atomic(qp, now, psn, h);
		if (r->nak_status && r->una <= r->nak_psn && mg_qp_sends(qp))
			broken_off(qp, now, r->nak_psn, r->nak_status);
		return;
	}
	switch (h->aeth.syndrome & MG_AETH_KIND) {
	case 0:
		if (!mg_comp_ack_to(qp, now, psn + 1))
			implied_loss(qp);
		break;
	case MG_AETH_RNR: rx_rnr(qp, now, psn, h->aeth.syndrome); break;
	case MG_AETH_NAK: rx_nak(qp, now, psn, h->aeth.syndrome); break;
	}
}
