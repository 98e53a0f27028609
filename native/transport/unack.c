/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * unack.c - the requester of the unacknowledged services, UC and UD.
 *
 * A request is complete when its last packet has been handed out (IBA 9.8.4, 9.8.5): nothing is
 * kept, nothing is sent twice. An error in a request ends sending, not receiving: the send queue error
 * state (IBA 10.3.1.6).
 *
 * What holds it back is the socket. Where that does not, because the peer's process is behind the same
 * kernel, a UC peer that knows the extension tells now and then how far it is, and we do not run far
 * ahead of it: its socket's buffer would overflow. Silence delays us once, for as long as a process may wait
 * for a CPU on a crowded machine; from then on we send into it until the peer is heard again.
 */
#include "transport/internal.h"

#define AHEAD 1024u		/* packets */
#define STALL_MAX (500 * MG_MS) /* without a word */

static int build_ud(struct mg_qp *qp, struct mg_swqe *w, struct mg_pkt *p)
{
	const struct mg_ud_dest *to = mg_swqe_ud(qp, w);
	bool imm = w->opcode == IBV_WR_SEND_WITH_IMM;
	struct mg_hdrs h;

	p->n_iov = 0;
	if (w->flags & MG_WQE_INLINE) {
		if (w->length)
			p->iov[p->n_iov++] =
				(struct iovec){.iov_base = w->u.inline_data, .iov_len = w->length};
	} else if (w->length && mg_sge_gather(qp->pd, w->u.sge, w->n_sge, 0, w->length, p)) {
		return IBV_WC_LOC_PROT_ERR;
	}
	mg_qp_hdrs(qp, imm ? MG_OP_SEND_ONLY_IMM : MG_OP_SEND_ONLY, (uint32_t)qp->req.snd, &h);
	h.dest_qpn = to->qpn;
	h.solicited = w->flags & MG_WQE_SOLICITED;
	h.imm = w->imm;
	/* A controlled Q_Key stands for the QP's own (IBA 10.2.5, C10-15). */
	h.deth.qkey = to->qkey & 0x80000000u ? qp->attr.qkey : to->qkey;
	h.deth.src_qpn = qp->qpn;
	mg_pkt_finish(qp, p, &h, w->length);
	p->src = to->src;
	p->dst = to->dst;
	p->sport = mg_flow_sport(qp->qpn, to->qpn);
	p->tclass = to->tclass;
	p->hop_limit = to->hop_limit ? to->hop_limit : 64;
	return IBV_WC_SUCCESS;
}

/* True: the peer shall catch up first. */
static bool stalled(struct mg_qp *qp, mg_time now)
{
	struct mg_requester *r = &qp->req;

	if (qp->type != IBV_QPT_UC || !qp->mig.peer_capable || r->unheard || r->snd - r->heard < AHEAD)
		return false;
	if (!r->stall_until) {
		r->stall_until = now + STALL_MAX;
		mg_qp_deadline(qp);
	}
	return true;
}

void mg_unack_heard(struct mg_qp *qp, uint32_t psn)
{
	struct mg_requester *r = &qp->req;
	uint64_t to = mg_psn_extend(r->snd, psn) + 1;

	if (to <= r->heard || to > r->snd)
		return;
	r->heard = to;
	r->stall_until = 0;
	r->unheard = false;
	mg_qp_ready(qp);
}

void mg_unack_timer(struct mg_qp *qp, mg_time now)
{
	if (!qp->req.stall_until || now < qp->req.stall_until)
		return;
	qp->req.stall_until = 0;
	qp->req.unheard = true;
	mg_qp_ready(qp);
}

void mg_unack_resume(struct mg_qp *qp)
{
	qp->req.heard = qp->req.snd;
	qp->req.stall_until = 0;
	qp->req.unheard = false;
	mg_qp_ready(qp);
}

enum mg_tx_result mg_unack_tx(struct mg_qp *qp, mg_time now, struct mg_pkt *p)
{
	struct mg_requester *r = &qp->req;
	bool sent = false;

	mg_req_run_local(qp);
	while (!sent && r->snd != r->end) {
		struct mg_swqe *w = mg_sq_at(qp, r->cur);
		int status = IBV_WC_SUCCESS;

		if (mg_wr_is_local(w->opcode))
			return MG_TX_NONE;
		if (!mg_qp_sends(qp) || qp->mig.resuming || (qp->state == IBV_QPS_SQD && r->snd == w->psn))
			return MG_TX_NONE;
		if (stalled(qp, now))
			return MG_TX_NONE;
		/* Longer than the port's MTU: no packet, and no error either (IBA C10-93.1.1). */
		sent = qp->type != IBV_QPT_UD || w->length <= qp->mtu;
		if (sent)
			status = qp->type == IBV_QPT_UD ? build_ud(qp, w, p)
							: mg_req_build_data(qp, w, false, p);
		if (status != IBV_WC_SUCCESS) {
			w->status = (uint8_t)status;
			mg_comp_advance(qp);
			return MG_TX_NONE;
		}
		if (++r->snd == w->psn + w->n_psn)
			r->cur++;
		r->una = r->max = r->snd;
		mg_comp_advance(qp);
	}
	return sent ? MG_TX_PACKET : MG_TX_NONE;
}

void mg_qp_sqe(struct mg_qp *qp)
{
	qp->state = IBV_QPS_SQE;
	mg_req_flush(qp);
}
