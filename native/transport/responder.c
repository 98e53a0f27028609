/* SPDX-License-Identifier: BSD-3-Clause */
/* responder.c - executes the peer's requests in PSN order (what it answers: answer.c). */
#include "transport/responder.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdlib.h>

void mg_resp_reset(struct mg_qp *qp)
{
	struct mg_responder *r = &qp->resp;
	struct mg_resource *res = r->res;
	struct mg_job *jobs = r->jobs;
	uint32_t n_res = r->n_res, n_jobs = r->n_jobs;

	*r = (struct mg_responder){
		.res = res, .jobs = jobs, .n_res = n_res, .n_jobs = n_jobs, .opcode = MG_RESP_IDLE};
	for (uint32_t i = 0; i < n_res; i++)
		res[i].opcode = 0;
}

/* What is still to be answered stays, and what can be asked for again: the newest, as many as there is room for. */
int mg_resp_resources(struct mg_qp *qp, uint32_t n)
{
	struct mg_responder *r = &qp->resp;
	struct mg_resource *res = calloc(n ? n : 1, sizeof(*res));
	struct mg_job *jobs = calloc(n ? n : 1, sizeof(*jobs));
	uint32_t kept = n < r->n_res ? n : r->n_res;

	if (!res || !jobs) {
		free(res);
		free(jobs);
		return ENOMEM;
	}
	for (uint32_t i = 0; i < kept; i++)
		res[i] = r->res[(r->res_next + r->n_res - kept + i) % r->n_res];
	for (uint32_t i = 0; i < r->job_fill; i++)
		jobs[i] = r->jobs[(r->job_head + i) % r->n_jobs];
	free(r->res);
	free(r->jobs);
	r->res = res;
	r->jobs = jobs;
	r->n_res = r->n_jobs = n;
	r->res_next = n ? kept % n : 0;
	r->job_head = 0;
	return 0;
}

void mg_resp_last_ack(struct mg_qp *qp)
{
	struct mg_responder *r = &qp->resp;

	if (!r->nak && (r->ack_pending || r->job_fill))
		r->nak = MG_AETH_ACK;
}

void mg_resp_flush(struct mg_qp *qp)
{
	struct mg_responder *r = &qp->resp;

	mg_recv_flush(qp);
	if (!r->nak) { /* the peer is still told why; what came before the refused request is answered first */
		r->job_fill = 0;
		r->denied = false;
	}
	r->ack_pending = r->dup_pending = r->dup_left = false;
	r->opcode = MG_RESP_IDLE;
}

/* ---- refusing -------------------------------------------------------------------------------- */

static void nak(struct mg_qp *qp, uint8_t syndrome)
{
	qp->resp.nak = syndrome;
	qp->resp.nak_sent = true;
	mg_qp_ready(qp);
}

/* A class B/C responder error (IBA 9.9.3.1): tell the peer, break the QP; with `status`, the
 * receive request in use completes with it first. */
void mg_resp_refuse(struct mg_qp *qp, uint8_t syndrome, enum ibv_wc_status status)
{
	enum ibv_event_type event = syndrome == MG_NAK_REM_ACCESS    ? IBV_EVENT_QP_ACCESS_ERR
				    : syndrome == MG_NAK_INVALID_REQ ? IBV_EVENT_QP_REQ_ERR
								     : IBV_EVENT_QP_FATAL;

	if (status != IBV_WC_SUCCESS && qp->resp.have_wqe) {
		struct ibv_wc wc = {.status = status, .opcode = IBV_WC_RECV, .src_qp = qp->peer_qpn};

		mg_recv_done(qp, &wc, false);
	}
	nak(qp, syndrome);
	mg_qp_fatal(qp, event);
}

static void rnr(struct mg_qp *qp)
{
	qp->e->counters[MG_CNT_RNR_NAKS_TX]++;
	nak(qp, (uint8_t)(MG_AETH_RNR | (qp->attr.min_rnr_timer & 0x1f)));
}

void mg_resp_enter_xrc(struct mg_qp *qp, uint32_t srqn)
{
	struct mg_srq *srq = mg_idtab_get(&qp->e->srqs, srqn);

	if (!srq || srq->xrcd != qp->xrcd)
		return;
	qp->srq = srq;
	qp->pd = srq->pd;
}

void mg_resp_leave_xrc(struct mg_qp *qp)
{
	qp->srq = NULL;
	qp->pd = NULL;
}

/* ---- executing --------------------------------------------------------------------------------- */

/* IBA 9.7.4.1.5: FIRST and ONLY begin a message, MIDDLE and LAST go on with the same kind. */
static bool sequence_ok(const struct mg_responder *r, const struct mg_hdrs *h)
{
	bool begins = h->mask & (MG_P_FIRST | MG_P_ONLY) || h->opcode == MG_OP_READ_REQ;

	if (r->opcode == MG_RESP_IDLE)
		return begins;
	return !begins && ((mg_opinfo[r->opcode].mask ^ h->mask) & (MG_P_SEND | MG_P_WRITE)) == 0;
}

static bool length_ok(const struct mg_qp *qp, const struct mg_hdrs *h)
{
	if (h->mask & (MG_P_FIRST | MG_P_MIDDLE))
		return h->payload_len == qp->mtu && h->pad == 0;
	if (h->mask & MG_P_LAST)
		return h->payload_len >= 1 && h->payload_len <= qp->mtu;
	if (h->opcode == MG_OP_READ_REQ)
		return h->payload_len == 0;
	return h->payload_len <= qp->mtu;
}

void mg_resp_comm_est(struct mg_qp *qp)
{
	if (qp->resp.comm_est)
		return;
	qp->resp.comm_est = true;
	if (qp->state == IBV_QPS_RTR)
		qp->e->ops->async_event(qp->e->arg, IBV_EVENT_COMM_EST, qp);
}

static void accepted(struct mg_qp *qp, const struct mg_hdrs *h, uint32_t n_psn)
{
	struct mg_responder *r = &qp->resp;
	bool ends = h->mask & (MG_P_LAST | MG_P_ONLY) || h->opcode == MG_OP_READ_REQ;

	r->epsn = (r->epsn + n_psn) & MG_PSN_MASK;
	r->nak_sent = r->dup_left = false;
	r->opcode = ends ? MG_RESP_IDLE : h->opcode;
	if (ends)
		r->msn = (r->msn + 1) & MG_PSN_MASK;
	mg_resp_comm_est(qp);
	if (h->mask & MG_P_ANSWERED) {
		r->ack_pending = r->dup_pending = false; /* its answer acknowledges all that came before */
	} else {
		r->ack_psn = h->psn;
		r->ack_pending |= h->ackreq;
		r->ack_count += h->ackreq;
	}
	mg_qp_ready(qp);
}

static void recv_done(struct mg_qp *qp, const struct mg_hdrs *h, enum ibv_wc_opcode opcode, uint32_t bytes)
{
	struct ibv_wc wc = {
		.status = IBV_WC_SUCCESS, .opcode = opcode, .byte_len = bytes, .src_qp = qp->peer_qpn};

	if (h->mask & MG_H_IMM) {
		wc.wc_flags = IBV_WC_WITH_IMM;
		wc.imm_data = htonl(h->imm);
	} else if (h->mask & MG_H_IETH) {
		wc.wc_flags = IBV_WC_WITH_INV;
		wc.invalidated_rkey = h->ieth;
	}
	mg_recv_done(qp, &wc, h->solicited);
}

/*
 * A class J error (IBA 9.9.3.1): the message is there and is acknowledged, but its key was nothing
 * that may be invalidated. Only this end is told.
 */
static void not_invalidated(struct mg_qp *qp, const struct mg_hdrs *h)
{
	struct ibv_wc wc = {.status = IBV_WC_REM_INV_REQ_ERR, .opcode = IBV_WC_RECV};

	mg_recv_done(qp, &wc, false);
	accepted(qp, h, 1);
	nak(qp, MG_AETH_ACK);
	mg_qp_fatal(qp, IBV_EVENT_QP_ACCESS_ERR);
}

static void rx_send(struct mg_qp *qp, const struct mg_hdrs *h)
{
	struct mg_responder *r = &qp->resp;
	int err;

	if (h->mask & (MG_P_FIRST | MG_P_ONLY)) {
		if (!mg_recv_take(qp, qp->srq)) {
			rnr(qp);
			return;
		}
		r->offset = 0;
	} else if (!r->have_wqe) { /* an XRC one's queue was destroyed */
		mg_resp_refuse(qp, MG_NAK_INVALID_REQ, IBV_WC_SUCCESS);
		return;
	}
	if (h->payload_len > qp->taken->length - r->offset) {
		mg_resp_refuse(qp, MG_NAK_INVALID_REQ, IBV_WC_LOC_LEN_ERR);
		return;
	}
	err = mg_recv_scatter(qp, r->offset, h->payload, h->payload_len);
	if (err) {
		mg_resp_refuse(qp, MG_NAK_REM_OP, IBV_WC_LOC_PROT_ERR);
		return;
	}
	r->offset += h->payload_len;
	if (!(h->mask & (MG_P_LAST | MG_P_ONLY)))
		accepted(qp, h, 1);
	else if (h->mask & MG_H_IETH && mg_mw_invalidate(qp, h->ieth))
		not_invalidated(qp, h);
	else {
		recv_done(qp, h, IBV_WC_RECV, r->offset);
		if (!qp->overrun) /* else nobody learns of it: not acknowledged */
			accepted(qp, h, 1);
	}
}

static void rx_write(struct mg_qp *qp, const struct mg_hdrs *h)
{
	struct mg_responder *r = &qp->resp;
	bool begins = h->mask & (MG_P_FIRST | MG_P_ONLY), ends = h->mask & (MG_P_LAST | MG_P_ONLY);
	uint64_t va = begins ? h->reth.va : r->wr_va;
	uint32_t rkey = begins ? h->reth.rkey : r->wr_rkey;
	uint32_t left = begins ? h->reth.length : r->wr_left;
	uint8_t *to = NULL;

	if (h->payload_len > left || (ends && h->payload_len != left) || (!ends && h->payload_len == left)) {
		mg_resp_refuse(qp, MG_NAK_INVALID_REQ, IBV_WC_SUCCESS);
		return;
	}
	/* Not offered by this QP (IBA 9.7.4.1.5), or longer than a message may be, whatever the key opens. */
	if (!(qp->access & IBV_ACCESS_REMOTE_WRITE) || left > 1u << 31) {
		mg_resp_refuse(qp, MG_NAK_INVALID_REQ, IBV_WC_SUCCESS);
		return;
	}
	/* A write of no bytes is not checked against a key (IBA 9.7.4.1.6, C9-88). */
	if (left && !(to = mg_remote_map(qp, rkey, va, left, IBV_ACCESS_REMOTE_WRITE))) {
		mg_resp_refuse(qp, MG_NAK_REM_ACCESS, IBV_WC_SUCCESS);
		return;
	}
	if (h->mask & MG_H_IMM && !mg_recv_take(qp, qp->srq)) {
		rnr(qp);
		return;
	}
	if (h->payload_len && !mg_copy(qp->e, to, h->payload, h->payload_len)) {
		mg_resp_refuse(qp, MG_NAK_REM_ACCESS, IBV_WC_SUCCESS);
		return;
	}
	if (begins)
		r->offset = 0;
	r->offset += h->payload_len;
	r->wr_va = va + h->payload_len;
	r->wr_rkey = rkey;
	r->wr_left = left - h->payload_len;
	if (h->mask & MG_H_IMM)
		recv_done(qp, h, IBV_WC_RECV_RDMA_WITH_IMM, r->offset);
	if (!qp->overrun)
		accepted(qp, h, 1);
}

struct mg_job *mg_resp_add_job(struct mg_qp *qp, uint32_t last_psn, const struct mg_hdrs *h, uint64_t orig)
{
	struct mg_responder *r = &qp->resp;
	struct mg_job *j = &r->jobs[(r->job_head + r->job_fill++) % r->n_jobs];

	*j = (struct mg_job){.opcode = h->opcode,
			     .psn = h->psn,
			     .last_psn = last_psn,
			     .va = h->reth.va,
			     .rkey = h->reth.rkey,
			     .srqn = h->xrc_srqn,
			     .left = h->reth.length,
			     .orig = orig};
	mg_qp_ready(qp);
	return j;
}

bool mg_resp_read_allowed(const struct mg_qp *qp, const struct mg_hdrs *h)
{
	return !h->reth.length || (qp->pd && mg_remote_map(qp, h->reth.rkey, h->reth.va, h->reth.length,
							   IBV_ACCESS_REMOTE_READ));
}

/*
 * A READ or atomic that has not come before: false, if it is more than we granted. Whoever asks for one more has
 * the answer to the oldest, also where that has come again meanwhile and waits to be answered again.
 */
static bool room_for_one(struct mg_responder *r)
{
	if (r->job_fill && r->job_fill == r->n_jobs && r->jobs[r->job_head].again)
		mg_resp_end_job(r);
	return r->job_fill < r->n_jobs;
}

static void rx_read(struct mg_qp *qp, const struct mg_hdrs *h)
{
	struct mg_responder *r = &qp->resp;
	uint32_t n = mg_packets(h->reth.length, qp->mtu);
	uint32_t last = (h->psn + n - 1) & MG_PSN_MASK;
	struct mg_resource res;

	/* Not offered, more at once than we granted, or longer than a message may be (IBA 9.7.4.1.5). */
	if (!(qp->access & IBV_ACCESS_REMOTE_READ) || !room_for_one(r) || h->reth.length > 1u << 31) {
		mg_resp_refuse(qp, MG_NAK_INVALID_REQ, IBV_WC_SUCCESS);
		return;
	}
	if (!mg_resp_read_allowed(qp, h)) {
		mg_resp_refuse(qp, MG_NAK_REM_ACCESS, IBV_WC_SUCCESS);
		return;
	}
	res = mg_resp_named(h);
	res.last_psn = last;
	mg_resp_record(r, &res);
	mg_resp_add_job(qp, last, h, 0);
	accepted(qp, h, n);
}

static void rx_atomic(struct mg_qp *qp, const struct mg_hdrs *h)
{
	struct mg_responder *r = &qp->resp;
	struct mg_resource res;
	uint64_t orig;
	uint8_t refused;

	if (!room_for_one(r)) {
		mg_resp_refuse(qp, MG_NAK_INVALID_REQ, IBV_WC_SUCCESS);
		return;
	}
	refused = mg_atomic_execute(qp, h, &orig);
	if (refused) {
		mg_resp_refuse(qp, refused, IBV_WC_SUCCESS);
		return;
	}
	res = mg_resp_named(h);
	res.atomic_orig = orig;
	mg_resp_record(r, &res);
	mg_resp_add_job(qp, h->psn, h, orig);
	accepted(qp, h, 1);
}

static void rx_request(struct mg_qp *qp, const struct mg_hdrs *h)
{
	struct mg_responder *r = &qp->resp;
	int32_t diff = mg_psn_diff(h->psn, r->epsn);

	if (diff > 0) {
		if (!r->nak_sent) {
			qp->e->counters[MG_CNT_SEQ_NAKS_TX]++;
			nak(qp, MG_NAK_PSN_SEQ);
		}
		return;
	}
	if (diff < 0) {
		mg_resp_duplicate(qp, h);
		return;
	}
	if (r->nak && (r->nak & MG_AETH_KIND) == MG_AETH_RNR)
		return; /* the RNR NAK about this very packet has not gone out yet */
	r->nak = 0;	/* a sequence NAK that is no longer true */
	if (!sequence_ok(r, h) || !length_ok(qp, h) || (qp->xrcd && !qp->srq)) {
		mg_resp_refuse(qp, MG_NAK_INVALID_REQ, r->have_wqe ? IBV_WC_LOC_QP_OP_ERR : IBV_WC_SUCCESS);
		return;
	}
	if (h->mask & MG_P_SEND)
		rx_send(qp, h);
	else if (h->mask & MG_P_WRITE)
		rx_write(qp, h);
	else if (h->opcode == MG_OP_READ_REQ)
		rx_read(qp, h);
	else
		rx_atomic(qp, h);
}

void mg_resp_rx(struct mg_qp *qp, mg_time now, const struct mg_hdrs *h)
{
	(void)now;
	if (!qp->xrcd) {
		rx_request(qp, h);
		return;
	}
	mg_resp_enter_xrc(qp, h->xrc_srqn);
	rx_request(qp, h);
	mg_resp_leave_xrc(qp);
}

void mg_resp_fault(struct mg_qp *qp, uint32_t psn)
{
	qp->resp.epsn = psn; /* the NAK names the packet that cannot come */
	qp->resp.job_fill = 0;
	mg_resp_refuse(qp, MG_NAK_REM_ACCESS, IBV_WC_SUCCESS);
}

void mg_resp_deny_again(struct mg_qp *qp, uint32_t psn)
{
	struct mg_responder *r = &qp->resp;

	if (!r->denied || mg_psn_diff(psn, r->denied_psn) < 0) /* of several the first one counts */
		r->denied_psn = psn;
	r->denied = true;
	mg_qp_ready(qp);
}
