/* SPDX-License-Identifier: BSD-3-Clause */
/* engine.c - the device object: who gets a packet, who may send one, whose timer is due. */
#include "transport/gsi.h"
#include "transport/internal.h"

#include <errno.h>
#include <stdlib.h>

#define TURN 32 /* packets a QP may send before the next one gets its turn */

const char *const mg_counter_name[MG_CNT_MAX] = {
	[MG_CNT_TX_PACKETS] = "tx_packets",
	[MG_CNT_RX_PACKETS] = "rx_packets",
	[MG_CNT_TX_BYTES] = "tx_bytes",
	[MG_CNT_RX_BYTES] = "rx_bytes",
	[MG_CNT_RETRANSMITS] = "retransmits",
	[MG_CNT_TIMEOUTS] = "timeouts",
	[MG_CNT_RNR_NAKS_RX] = "rnr_naks_rx",
	[MG_CNT_RNR_NAKS_TX] = "rnr_naks_tx",
	[MG_CNT_SEQ_NAKS_RX] = "seq_naks_rx",
	[MG_CNT_SEQ_NAKS_TX] = "seq_naks_tx",
	[MG_CNT_DUPLICATES] = "duplicates",
	[MG_CNT_RX_MALFORMED] = "rx_malformed",
	[MG_CNT_RX_ICRC] = "rx_icrc",
	[MG_CNT_RX_NO_QP] = "rx_no_qp",
	[MG_CNT_RX_BAD_SOURCE] = "rx_bad_source",
	[MG_CNT_NAK_STOPPED_RX] = "nak_stopped_rx",
	[MG_CNT_RESUMES_TX] = "resumes_tx",
	[MG_CNT_RESUMES_RX] = "resumes_rx",
	[MG_CNT_RESUMES_REFUSED] = "resumes_refused",
	[MG_CNT_TX_ERRORS] = "tx_errors",
	[MG_CNT_RX_BAD_QKEY] = "rx_bad_qkey",
	[MG_CNT_RX_DROPPED] = "rx_dropped",
};

struct mg_engine *mg_engine_create(const struct mg_config *cfg, const struct mg_ops *ops, void *arg)
{
	struct mg_engine *e;

	if (cfg->qpn_count < 4 || cfg->qpn_base > MG_QPN_MASK ||
	    cfg->qpn_count - 1 > MG_QPN_MASK - cfg->qpn_base || cfg->max_path_mtu < 256 ||
	    cfg->max_path_mtu > 4096) {
		errno = EINVAL;
		return NULL;
	}
	e = calloc(1, sizeof(*e));
	if (!e)
		return NULL;
	e->cfg = *cfg;
	e->ops = ops;
	e->arg = arg;
	e->ready.prev = e->ready.next = &e->ready;
	e->held.prev = e->held.next = &e->held;
	e->gid[MG_GID_MAIN] = cfg->addr;
	e->n_gid = MG_GID_MAIN + 1;
	e->gsi.wake = MG_NEVER;
	return e;
}

void mg_engine_destroy(struct mg_engine *e)
{
	void *o;

	if (!e)
		return;
	for (uint32_t it = 0; (o = mg_idtab_next(&e->qps, &it)); it = 0) {
		mg_mcast_detach_all(o);
		mg_qp_destroy(o);
	}
	for (uint32_t it = 0; (o = mg_idtab_next(&e->srqs, &it)); it = 0)
		mg_srq_destroy(o);
	for (uint32_t it = 0; (o = mg_idtab_next(&e->xrcds, &it)); it = 0)
		mg_xrcd_destroy(o);
	for (uint32_t it = 0; (o = mg_idtab_next(&e->ahs, &it)); it = 0)
		mg_ah_destroy(o);
	for (uint32_t it = 0; (o = mg_idtab_next(&e->mws, &it)); it = 0)
		mg_mw_destroy(o);
	for (uint32_t it = 0; (o = mg_idtab_next(&e->mrs, &it)); it = 0)
		mg_mr_destroy(o);
	for (uint32_t it = 0; (o = mg_idtab_next(&e->cqs, &it)); it = 0)
		mg_cq_destroy(o);
	for (uint32_t it = 0; (o = mg_idtab_next(&e->pds, &it)); it = 0)
		mg_pd_destroy(o);
	mg_idtab_free(&e->qps);
	mg_idtab_free(&e->srqs);
	mg_idtab_free(&e->xrcds);
	mg_idtab_free(&e->mrs);
	mg_idtab_free(&e->ahs);
	free(e->group);
	mg_idtab_free(&e->mws);
	mg_idtab_free(&e->cqs);
	mg_idtab_free(&e->pds);
	mg_gsi_free(e);
	free(e->heap);
	free(e);
}

uint32_t mg_engine_handle(struct mg_engine *e)
{
	do { /* wraps after 2^32 objects; 0 means none */
		e->next_handle++;
	} while (!e->next_handle || mg_idtab_get(&e->pds, e->next_handle) ||
		 mg_idtab_get(&e->cqs, e->next_handle) || mg_idtab_get(&e->xrcds, e->next_handle) ||
		 mg_idtab_get(&e->ahs, e->next_handle));
	return e->next_handle;
}

void mg_count(struct mg_engine *e, enum mg_counter c, uint64_t n)
{
	e->counters[c] += n;
}

uint64_t mg_counter_get(const struct mg_engine *e, enum mg_counter c)
{
	return e->counters[c];
}

/* ---- sending ------------------------------------------------------------------------------------ */

static void append(struct mg_list *list, struct mg_qp *qp, bool held)
{
	qp->ready.prev = list->prev;
	qp->ready.next = list;
	list->prev->next = &qp->ready;
	list->prev = &qp->ready;
	qp->is_ready = true;
	qp->is_held = held;
}

static void unlink_qp(struct mg_qp *qp)
{
	qp->ready.prev->next = qp->ready.next;
	qp->ready.next->prev = qp->ready.prev;
	qp->is_ready = false;
}

void mg_qp_ready(struct mg_qp *qp)
{
	if (qp->is_ready && qp->is_held)
		unlink_qp(qp);
	if (!qp->is_ready)
		append(&qp->e->ready, qp, false);
}

static struct mg_qp *take(struct mg_list *list)
{
	struct mg_qp *qp = (struct mg_qp *)((char *)list->next - offsetof(struct mg_qp, ready));

	unlink_qp(qp);
	return qp;
}

/* `more`: packets of this QP are on their way already, so requests have nothing to wait for. */
static enum mg_tx_result qp_tx(struct mg_qp *qp, mg_time now, unsigned flags, bool more, struct mg_pkt *p)
{
	enum mg_tx_result resp, req;

	if (qp->overrun)
		mg_qp_overrun(qp);
	if (mg_mig_tx(qp, p))
		return MG_TX_PACKET;
	if (mg_qp_unacked(qp))
		return mg_unack_tx(qp, now, p);
	resp = mg_resp_tx(qp, flags, p);
	if (resp == MG_TX_PACKET)
		return resp;
	req = mg_req_tx(qp, now, more ? flags & ~MG_TX_LAZY : flags, p);
	return req > resp ? req : resp;
}

size_t mg_tx(struct mg_engine *e, mg_time now, unsigned flags, struct mg_pkt *out, size_t max)
{
	size_t n = 0;

	e->now = now;
	if (e->stopped)
		return 0;
	if (!(flags & MG_TX_LAZY))
		while (e->held.next != &e->held)
			append(&e->ready, take(&e->held), false);
	n = mg_gsi_tx(e, out, max);
	while (n < max && e->ready.next != &e->ready) {
		struct mg_qp *qp = take(&e->ready);
		enum mg_tx_result res = MG_TX_PACKET;
		size_t before = n;

		for (int turn = 0; turn < TURN && n < max; turn++) {
			res = qp_tx(qp, now, flags, n != before, &out[n]);
			if (res != MG_TX_PACKET)
				break;
			n++;
		}
		/* An acknowledgement rides along with data: a train of its own would cost as much again. */
		if (res == MG_TX_HELD && n != before && n < max &&
		    mg_resp_tx(qp, flags & ~MG_TX_LAZY, &out[n]) == MG_TX_PACKET && ++n < max) {
			res = qp_tx(qp, now, flags, true, &out[n]);
			n += res == MG_TX_PACKET;
		}
		if (n != before)
			mg_qp_deadline(qp);
		if (qp->is_ready) /* it found new work on its way */
			continue;
		if (res == MG_TX_PACKET)
			append(&e->ready, qp, false);
		else if (res == MG_TX_HELD) /* until something changes for it or nothing may wait */
			append(&e->held, qp, true);
	}
	return n;
}

void mg_tx_fault(struct mg_engine *e, const struct mg_pkt *pkt)
{
	struct mg_qp *qp = mg_idtab_get(&e->qps, pkt->qpn);
	uint32_t psn = (uint32_t)pkt->hdr[9] << 16 | (uint32_t)pkt->hdr[10] << 8 | pkt->hdr[11];

	if (!qp || !mg_qp_connected(qp))
		return;
	if (mg_opinfo[pkt->hdr[0]].mask & MG_P_REQUEST)
		mg_req_fault(qp, psn);
	else
		mg_resp_fault(qp, psn);
}

bool mg_tx_pending(const struct mg_engine *e)
{
	return !e->stopped && (e->ready.next != &e->ready || e->held.next != &e->held || e->gsi.first);
}

/* ---- receiving ------------------------------------------------------------------------------------ */

bool mg_rx_dry(const struct mg_engine *e)
{
	return e->dry;
}

/* Which service's packets a QP takes; the migration extension's are for connected ones. */
static bool service_ok(const struct mg_qp *qp, const struct mg_hdrs *h)
{
	unsigned svc = h->opcode & MG_SVC_MASK;

	switch (qp->type) {
	case IBV_QPT_RC:
	case IBV_QPT_XRC_SEND:
	case IBV_QPT_XRC_RECV: return svc == qp->svc || svc == MG_SVC_MIG;
	/* The acknowledgement that announces the extension, the same for all connected services. */
	case IBV_QPT_UC: return svc == qp->svc || svc == MG_SVC_MIG || h->opcode == MG_OP_ACK;
	case IBV_QPT_UD: return svc == qp->svc;
	default: return false;
	}
}

static bool pkey_ok(const struct mg_hdrs *h)
{
	return (h->pkey & 0x7fff) == (MG_PKEY_DEFAULT & 0x7fff);
}

/* A packet of a connected service, from anybody: only the peer's counts, to the address it was connected to. */
static void rx_connected(struct mg_qp *qp, mg_time now, const struct mg_rx *meta, const struct mg_hdrs *h)
{
	struct mg_engine *e = qp->e;

	if (memcmp(meta->src.gid, qp->peer.gid, 16) != 0 || memcmp(meta->dst.gid, qp->local.gid, 16) != 0) {
		e->counters[MG_CNT_RX_BAD_SOURCE]++;
		return;
	}
	e->counters[MG_CNT_RX_BYTES] += h->payload_len;
	qp->rx_bytes += h->payload_len;
	if (h->capable)
		mg_mig_heard(qp, now);
	else if (!qp->mig.peer_capable)
		mg_mig_heard_plain(qp, now);
	if (!(h->mask & MG_P_REQUEST)) {
		if (qp->type != IBV_QPT_UC)
			mg_comp_rx(qp, now, h);
		else if (h->capable)
			mg_unack_heard(qp, h->psn);
	} else if (qp->type == IBV_QPT_UC) {
		mg_uc_rx(qp, h);
	} else if (qp->type != IBV_QPT_XRC_SEND) {
		mg_resp_rx(qp, now, h);
	}
}

void mg_rx(struct mg_engine *e, mg_time now, const struct mg_rx *meta, const uint8_t *buf, size_t len)
{
	struct mg_hdrs h;
	struct mg_qp *qp;

	e->now = now;
	if (e->stopped)
		return;
	if (mg_hdrs_parse(buf, len, &h)) {
		e->counters[MG_CNT_RX_MALFORMED]++;
		return;
	}
	if (h.dest_qpn == MG_GSI_QPN) {
		mg_gsi_rx(e, now, meta, &h);
		return;
	}
	if (h.dest_qpn == MG_QPN_MULTICAST && (h.opcode & MG_SVC_MASK) == MG_SVC_UD && pkey_ok(&h)) {
		mg_mcast_rx(e, meta, &h);
		return;
	}
	qp = mg_idtab_get(&e->qps, h.dest_qpn);
	if (qp && qp->overrun) /* no more messages whose completion would be lost */
		mg_qp_overrun(qp);
	if (!qp || !mg_qp_connected(qp)) {
		e->counters[MG_CNT_RX_NO_QP]++;
		return;
	}
	/* Another service, or another partition: dropped in silence (IBA 9.6.1.1). */
	if (!service_ok(qp, &h) || !pkey_ok(&h)) {
		e->counters[MG_CNT_RX_MALFORMED]++;
		return;
	}
	e->counters[MG_CNT_RX_PACKETS]++;
	qp->rx_packets++;
	if (!(h.mask & MG_P_CONTROL))
		h.opcode &= (uint8_t)~MG_SVC_MASK; /* what it does is the same in every service */
	if (h.mask & MG_P_CONTROL)
		mg_mig_rx(qp, now, meta, &h);
	else if (qp->type == IBV_QPT_UD)
		mg_ud_rx(qp, meta, &h);
	else
		rx_connected(qp, now, meta, &h);
	mg_qp_deadline(qp);
}

/* ---- time ------------------------------------------------------------------------------------------- */

mg_time mg_deadline(const struct mg_engine *e)
{
	mg_time at = e->heap_len ? e->heap[0]->timer : MG_NEVER;

	return e->stopped ? MG_NEVER : at < e->gsi.wake ? at : e->gsi.wake;
}

void mg_timer(struct mg_engine *e, mg_time now)
{
	e->now = now;
	while (!e->stopped && e->heap_len && e->heap[0]->timer <= now) {
		struct mg_qp *qp = e->heap[0];

		mg_heap_remove(qp);
		mg_qp_timer(qp, now);
	}
	if (!e->stopped)
		mg_gsi_timer(e, now);
}

/* ---- stop and resume ---------------------------------------------------------------------------------- */

bool mg_stop_ready(const struct mg_engine *e)
{
	struct mg_qp *qp;

	for (uint32_t it = 0; (qp = mg_idtab_next(&e->qps, &it));)
		if (mg_qp_connected(qp) && qp->mig.peer_capable && !qp->mig.token_acked)
			return false;
	return true;
}

void mg_stop(struct mg_engine *e)
{
	e->stopped = true;
}

bool mg_stopped(const struct mg_engine *e)
{
	return e->stopped;
}

void mg_resume(struct mg_engine *e, mg_time now, const struct mg_addr *addr)
{
	struct mg_qp *qp;

	if (!e->stopped)
		return;
	e->stopped = false;
	e->epoch++;
	if (addr)
		e->cfg.addr = *addr;
	e->gid[MG_GID_MAIN] = e->cfg.addr;
	mg_gids_resume(e);
	for (uint32_t it = 0; (qp = mg_idtab_next(&e->qps, &it));)
		mg_mig_resume(qp, now);
	mg_gsi_resume(e, now);
}
