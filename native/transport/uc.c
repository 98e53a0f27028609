/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * uc.c - the responder of the unreliable connected service (IBA 9.8.3).
 *
 * A message arrives whole or not at all. When a packet is missing, what was begun is dropped without
 * a word and the next FIRST or ONLY begins anew; a receive request in use serves the next message.
 */
#include "transport/internal.h"

#include <arpa/inet.h>

/*
 * A packet this far behind the expected one is a copy or comes late: IP, unlike InfiniBand, has both,
 * and a message must not arrive twice. Further behind, the peer has begun anew.
 */
#define STALE 65536
#define REPORT_EVERY 64 /* packets */

static void drop(struct mg_qp *qp)
{
	qp->resp.opcode = MG_RESP_IDLE;
	qp->e->counters[MG_CNT_RX_DROPPED]++;
}

/* A fault of the receive request itself (IBA 9.9.3.1, class A): it fails, and the QP with it. */
static void local_error(struct mg_qp *qp)
{
	struct ibv_wc wc = {.status = IBV_WC_LOC_PROT_ERR, .opcode = IBV_WC_RECV, .src_qp = qp->peer_qpn};

	mg_recv_done(qp, &wc, false);
	mg_qp_fatal(qp, IBV_EVENT_QP_FATAL);
}

static void complete(struct mg_qp *qp, const struct mg_hdrs *h, enum ibv_wc_opcode opcode)
{
	struct ibv_wc wc = {.status = IBV_WC_SUCCESS,
			    .opcode = opcode,
			    .byte_len = qp->resp.offset,
			    .src_qp = qp->peer_qpn};

	if (h->mask & MG_H_IMM) {
		wc.wc_flags = IBV_WC_WITH_IMM;
		wc.imm_data = htonl(h->imm);
	}
	mg_recv_done(qp, &wc, h->solicited);
}

/* Both return false when the message is dropped. */
static bool rx_send(struct mg_qp *qp, const struct mg_hdrs *h)
{
	struct mg_responder *r = &qp->resp;

	if (!mg_recv_take(qp, qp->srq) || r->offset > qp->taken->length ||
	    h->payload_len > qp->taken->length - r->offset)
		return false;
	if (mg_recv_scatter(qp, r->offset, h->payload, h->payload_len)) {
		local_error(qp);
		return false;
	}
	r->offset += h->payload_len;
	if (h->mask & (MG_P_LAST | MG_P_ONLY))
		complete(qp, h, IBV_WC_RECV);
	return true;
}

static bool rx_write(struct mg_qp *qp, const struct mg_hdrs *h)
{
	struct mg_responder *r = &qp->resp;
	bool ends = h->mask & (MG_P_LAST | MG_P_ONLY);
	uint8_t *to = NULL;

	if (h->mask & MG_H_RETH) {
		r->wr_va = h->reth.va;
		r->wr_rkey = h->reth.rkey;
		r->wr_left = h->reth.length;
	}
	if (h->payload_len > r->wr_left || ends != (h->payload_len == r->wr_left))
		return false;
	if (!(qp->access & IBV_ACCESS_REMOTE_WRITE) ||
	    (r->wr_left &&
	     !(to = mg_remote_map(qp, r->wr_rkey, r->wr_va, r->wr_left, IBV_ACCESS_REMOTE_WRITE))))
		return false;
	if (h->mask & MG_H_IMM && !mg_recv_take(qp, qp->srq))
		return false;
	if (h->payload_len && !mg_copy(qp->e, to, h->payload, h->payload_len))
		return false;
	r->offset += h->payload_len;
	r->wr_va += h->payload_len;
	r->wr_left -= h->payload_len;
	if (h->mask & MG_H_IMM)
		complete(qp, h, IBV_WC_RECV_RDMA_WITH_IMM);
	return true;
}

static bool length_ok(const struct mg_qp *qp, const struct mg_hdrs *h)
{
	if (h->mask & (MG_P_FIRST | MG_P_MIDDLE))
		return h->payload_len == qp->mtu && h->pad == 0;
	return h->payload_len <= qp->mtu && (h->payload_len || h->mask & MG_P_ONLY);
}

void mg_uc_rx(struct mg_qp *qp, const struct mg_hdrs *h)
{
	struct mg_responder *r = &qp->resp;
	int32_t diff = mg_psn_diff(h->psn, r->epsn);
	bool begins = h->mask & (MG_P_FIRST | MG_P_ONLY), ok;

	if (diff < 0 && diff >= -STALE) {
		qp->duplicates++;
		qp->e->counters[MG_CNT_DUPLICATES]++;
		return;
	}
	r->ack_psn = h->psn;
	r->epsn = (h->psn + 1) & MG_PSN_MASK;
	if (begins || diff) {
		if (r->opcode != MG_RESP_IDLE) /* its end was lost */
			drop(qp);
		r->offset = 0;
	}
	if (!begins && r->opcode == MG_RESP_IDLE)
		return; /* the rest of a message that was dropped */
	if ((!begins && (mg_opinfo[r->opcode].mask ^ h->mask) & (MG_P_SEND | MG_P_WRITE)) ||
	    !length_ok(qp, h)) {
		drop(qp);
		return;
	}
	ok = h->mask & MG_P_SEND ? rx_send(qp, h) : rx_write(qp, h);
	if (!ok) {
		drop(qp);
		return;
	}
	r->opcode = h->mask & (MG_P_LAST | MG_P_ONLY) ? MG_RESP_IDLE : h->opcode;
	if (r->opcode == MG_RESP_IDLE)
		r->msn = (r->msn + 1) & MG_PSN_MASK;
	mg_resp_comm_est(qp);
	/* A peer that knows the extension keeps step with us: the announcement tells how far we are. */
	if (qp->mig.peer_capable && ++r->ack_count >= REPORT_EVERY) {
		r->ack_count = 0;
		qp->mig.send_announce = true;
		mg_qp_ready(qp);
	}
}
