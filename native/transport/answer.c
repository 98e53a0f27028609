/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * answer.c - what the responder sends: acknowledgements, NAKs, answers to READs and atomics.
 *
 * Acknowledgements are cumulative and sent when the caller has no more packets for us, when
 * enough have gathered, or at once for errors. READ answers are jobs in PSN order; nothing that
 * acknowledges a later PSN overtakes them (IBA 9.7.4.1.2).
 *
 * An ACK never names the PSN of a READ or atomic, though those are the last that were executed: its answer
 * may be lost, and there are requesters (Linux's rxe_comp.c) that take the ACK for it and complete the
 * request without its data.
 */
#include "transport/responder.h"

#define ACK_BATCH 16 /* requests acknowledged together at most, while more keep coming */

void mg_resp_end_job(struct mg_responder *r)
{
	r->job_head = (r->job_head + 1) % r->n_jobs;
	r->job_fill--;
}

/* False: there is no packet to be sent. */
static bool tx_read(struct mg_qp *qp, struct mg_pkt *p)
{
	struct mg_responder *r = &qp->resp;
	struct mg_job *j = &r->jobs[r->job_head];
	bool first = !j->started, last = j->psn == j->last_psn;
	uint32_t n = j->left < qp->mtu ? j->left : qp->mtu;
	uint8_t *from = NULL;
	struct mg_hdrs h;

	if (qp->xrcd)
		mg_resp_enter_xrc(qp, j->srqn);
	if (n && qp->pd)
		from = mg_remote_map(qp, j->rkey, j->va, n, IBV_ACCESS_REMOTE_READ);
	if (qp->xrcd)
		mg_resp_leave_xrc(qp);
	if (n && !from && j->again) {
		mg_resp_deny_again(qp, j->psn);
		mg_resp_end_job(r);
		return false;
	}
	if (n && !from) {
		mg_resp_fault(qp, j->psn); /* deregistered while we were answering */
		return false;
	}
	mg_qp_hdrs(qp,
		   first && last ? MG_OP_READ_RESP_ONLY
		   : last	 ? MG_OP_READ_RESP_LAST
		   : first	 ? MG_OP_READ_RESP_FIRST
				 : MG_OP_READ_RESP_MIDDLE,
		   j->psn, &h);
	h.aeth.syndrome = MG_AETH_ACK;
	h.aeth.msn = r->msn;
	p->n_iov = 0;
	if (n)
		p->iov[p->n_iov++] = (struct iovec){.iov_base = from, .iov_len = n};
	mg_pkt_finish(qp, p, &h, n);
	j->started = true;
	j->va += n;
	j->left -= n;
	j->psn = (j->psn + 1) & MG_PSN_MASK;
	if (last)
		mg_resp_end_job(r);
	return true;
}

static void tx_atomic(struct mg_qp *qp, struct mg_pkt *p)
{
	struct mg_responder *r = &qp->resp;
	const struct mg_job *j = &r->jobs[r->job_head];
	struct mg_hdrs h;

	mg_qp_hdrs(qp, mg_opinfo[j->opcode].mask & MG_P_ATOMIC ? MG_OP_ATOMIC_ACK : MG_OP_READ_RESP_ONLY,
		   j->psn, &h);
	h.aeth.syndrome = MG_AETH_ACK;
	h.aeth.msn = r->msn;
	h.atomic_orig = j->orig;
	p->n_iov = 0;
	mg_pkt_finish(qp, p, &h, 0);
	mg_resp_end_job(r);
}

static bool tx_answer(struct mg_qp *qp, struct mg_pkt *p)
{
	if (qp->resp.jobs[qp->resp.job_head].opcode == MG_OP_READ_REQ)
		return tx_read(qp, p);
	tx_atomic(qp, p);
	return true;
}

static void build_ack(struct mg_qp *qp, uint8_t syndrome, uint32_t psn, struct mg_pkt *p)
{
	struct mg_hdrs h;

	mg_qp_hdrs(qp, MG_OP_ACK, psn, &h);
	h.aeth.syndrome = syndrome;
	h.aeth.msn = qp->resp.msn;
	p->n_iov = 0;
	mg_pkt_finish(qp, p, &h, 0);
}

static void tx_ack(struct mg_qp *qp, uint8_t syndrome, uint32_t psn, struct mg_pkt *p)
{
	struct mg_responder *r = &qp->resp;

	build_ack(qp, syndrome, psn, p);
	r->ack_pending = r->dup_pending = r->ack_force = false; /* a NAK acknowledges what came before it */
	r->ack_count = 0;
}

enum mg_tx_result mg_resp_tx(struct mg_qp *qp, unsigned flags, struct mg_pkt *p)
{
	struct mg_responder *r = &qp->resp;
	uint8_t syndrome;

	while (r->job_fill && (qp->state != IBV_QPS_ERR || r->nak))
		if (tx_answer(qp, p))
			return MG_TX_PACKET;
	if (r->denied && (qp->state != IBV_QPS_ERR || r->nak)) {
		r->denied = false;
		build_ack(qp, MG_NAK_REM_ACCESS, r->denied_psn, p);
		return MG_TX_PACKET;
	}
	if (r->nak) {
		syndrome = r->nak;
		r->nak = 0;
		tx_ack(qp, syndrome, syndrome == MG_AETH_ACK ? r->ack_psn : r->epsn, p);
		return MG_TX_PACKET;
	}
	if (!(r->ack_pending || r->dup_pending) || !mg_qp_connected(qp))
		return MG_TX_NONE;
	if (flags & MG_TX_LAZY && !r->ack_force && r->ack_count < ACK_BATCH)
		return MG_TX_HELD;
	if (r->dup_pending && r->dup_psn != r->ack_psn) {
		r->dup_pending = false;
		build_ack(qp, MG_AETH_ACK, r->dup_psn, p);
		return MG_TX_PACKET;
	}
	tx_ack(qp, MG_AETH_ACK, r->ack_psn, p);
	return MG_TX_PACKET;
}
