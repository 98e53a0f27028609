/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * migrate.c - the wire extension (docs/protocol.md): who is capable, tokens, pause, Resume.
 */
#include "transport/internal.h"

#define ANNOUNCE_TRIES 5
#define ANNOUNCE_GAP (10 * MG_MS) /* times 4 each */
#define TOKEN_GAP (2 * MG_MS)	  /* doubling to TOKEN_GAP_MAX */
#define TOKEN_GAP_MAX (1 * MG_S)
#define RESUME_GAP (1 * MG_MS) /* doubling to RESUME_GAP_MAX */
#define RESUME_GAP_MAX (100 * MG_MS)
#define PROBE_GAP (20 * MG_MS) /* doubling to PROBE_GAP_MAX */
#define PROBE_GAP_MAX (200 * MG_MS)
#define IDLE_GAP (500 * MG_MS) /* of a paused QP with nothing to send, doubling to IDLE_GAP_MAX */
#define IDLE_GAP_MAX (8 * MG_S)
#define SILENCE_MAX (120 * MG_S) /* a stopped peer that nobody answers for: ordinary retries begin */

static uint64_t doubled(uint64_t gap, uint64_t max)
{
	return gap * 2 > max ? max : gap * 2;
}

static bool same_token(const uint8_t a[16], const uint8_t b[16])
{
	uint8_t diff = 0;

	for (int i = 0; i < 16; i++) /* in constant time */
		diff |= a[i] ^ b[i];
	return diff == 0;
}

/* ---- getting to know each other ---------------------------------------------------------------- */

static void announce(struct mg_qp *qp, mg_time now)
{
	struct mg_migration *m = &qp->mig;

	m->announce_left = ANNOUNCE_TRIES - 1;
	m->announce_gap = ANNOUNCE_GAP;
	m->announce_at = now + m->announce_gap;
	m->send_announce = true;
}

static void send_token(struct mg_migration *m, mg_time now)
{
	m->send_token = true;
	m->token_gap = TOKEN_GAP;
	m->token_at = now + m->token_gap;
}

void mg_mig_connected(struct mg_qp *qp, mg_time now)
{
	announce(qp, now);
}

void mg_mig_heard(struct mg_qp *qp, mg_time now)
{
	struct mg_migration *m = &qp->mig;

	m->last_heard = now;
	if (m->peer_capable)
		return;
	m->peer_capable = true;
	m->announce_at = MG_NEVER;
	if (!m->token_acked)
		send_token(m, now);
	mg_qp_ready(qp);
}

/* It never will: a packet of our kind has the bit. */
void mg_mig_heard_plain(struct mg_qp *qp, mg_time now)
{
	qp->mig.last_heard = now;
	qp->mig.peer_plain = true;
	qp->mig.send_announce = false;
	qp->mig.announce_at = MG_NEVER;
}

/* ---- pause --------------------------------------------------------------------------------------- */

void mg_mig_pause(struct mg_qp *qp, mg_time now)
{
	struct mg_migration *m = &qp->mig;

	m->last_heard = now;
	qp->req.retry_left = qp->attr.retry_cnt;
	if (m->paused)
		return;
	m->paused = true;
	m->paused_idle = qp->req.una == qp->req.end; /* what is posted next is the first probe */
	m->probe_gap = m->paused_idle ? IDLE_GAP : PROBE_GAP;
	m->probe_at = now + m->probe_gap;
	qp->req.probe_credit = m->paused_idle;
	mg_req_go_back(qp);
}

void mg_mig_probed(struct mg_qp *qp, mg_time now)
{
	struct mg_migration *m = &qp->mig;

	if (!m->paused_idle)
		return;
	m->paused_idle = false;
	m->probe_gap = PROBE_GAP;
	m->probe_at = now + m->probe_gap;
}

bool mg_mig_pause_with_others(struct mg_qp *qp, mg_time now)
{
	const struct mg_qp *other;

	if (!qp->mig.peer_capable)
		return false;
	for (uint32_t it = 0; (other = mg_idtab_next(&qp->e->qps, &it));) {
		const struct mg_migration *m = &other->mig;

		if (other == qp || !m->paused || now - m->last_heard >= SILENCE_MAX ||
		    memcmp(other->peer.gid, qp->peer.gid, sizeof(qp->peer.gid)))
			continue;
		mg_mig_pause(qp, now);
		qp->mig.last_heard = m->last_heard; /* they do not keep each other waiting for ever */
		return true;
	}
	return false;
}

void mg_mig_unpause(struct mg_qp *qp, mg_time now)
{
	qp->mig.paused = false;
	qp->mig.probe_at = MG_NEVER;
	mg_req_restart(qp, now);
}

/* ---- Resume ---------------------------------------------------------------------------------------- */

static void send_resume(struct mg_migration *m, mg_time now)
{
	m->send_resume = true;
	m->resume_gap = RESUME_GAP;
	m->resume_at = now + m->resume_gap;
}

void mg_mig_resume(struct mg_qp *qp, mg_time now)
{
	struct mg_migration *m = &qp->mig;
	struct mg_responder *r = &qp->resp;

	mg_heap_remove(qp); /* armed by the other machine's clock */
	if (!mg_qp_connected(qp))
		return;
	if (qp->type == IBV_QPT_UD) { /* nobody to tell */
		mg_qp_ready(qp);
		return;
	}
	m->paused = false;
	m->probe_at = m->announce_at = m->token_at = MG_NEVER;
	m->last_heard = now;
	if (m->peer_capable) {
		m->resuming = true;
		send_resume(m, now);
		if (!m->token_acked)
			send_token(m, now);
	} else if (!m->peer_plain) {
		announce(qp, now);
	}
	if (mg_qp_unacked(qp)) {
		mg_unack_resume(qp);
	} else {
		/* Whatever was on its way is lost; the peer asks again. READ answers start from that. */
		r->nak = 0;
		r->nak_sent = r->denied = false;
		r->job_head = r->job_fill = 0;
		r->ack_pending = r->ack_force = r->epsn != qp->attr.rq_psn;
		if (mg_qp_sends(qp))
			mg_req_restart(qp, now);
	}
	mg_qp_ready(qp);
	mg_qp_deadline(qp);
}

static void resumed(struct mg_qp *qp, mg_time now)
{
	qp->mig.resuming = qp->mig.paused = false; /* a NAK stopped from before is no longer true */
	qp->mig.resume_at = qp->mig.probe_at = MG_NEVER;
	qp->mig.send_resume = false;
	if (mg_qp_unacked(qp))
		mg_qp_ready(qp);
	else if (mg_qp_sends(qp))
		mg_req_restart(qp, now);
}

/* The peer's responder has executed everything below `psn`. */
static void acknowledged(struct mg_qp *qp, mg_time now, uint32_t psn)
{
	uint64_t to = mg_psn_extend(qp->req.una, psn);

	if (mg_qp_sends(qp) && to > qp->req.una && to <= qp->req.max)
		mg_comp_ack_to(qp, now, to);
}

static void rx_resume(struct mg_qp *qp, mg_time now, const struct mg_rx *meta, const struct mg_meh *meh)
{
	struct mg_migration *m = &qp->mig;
	bool known = m->have_peer_token && same_token(meh->token, m->peer_token);
	/* Before the tokens were exchanged nobody can prove a move; staying where one was needs no proof. */
	bool stayed = !m->have_peer_token && memcmp(meta->src.gid, qp->peer.gid, 16) == 0 &&
		      memcmp(meh->gid, qp->peer.gid, 16) == 0;

	if ((!known && !stayed) || (int32_t)(meh->epoch - m->peer_epoch) < 0 || !meh->epoch) {
		qp->e->counters[MG_CNT_RESUMES_REFUSED]++;
		return;
	}
	mg_mig_heard(qp, now);
	if (meh->epoch != m->peer_epoch) {
		m->peer_epoch = meh->epoch;
		memcpy(qp->peer.gid, meh->gid, 16);
		qp->e->counters[MG_CNT_RESUMES_RX]++;
		qp->resp.nak_sent = false;
		acknowledged(qp, now, meh->psn);
		if (!mg_qp_connected(qp)) /* completing may have failed a request */
			return;
		if (m->resuming) /* it may have missed ours while it was stopped */
			send_resume(m, now);
		else if (mg_qp_sends(qp) && !mg_qp_unacked(qp))
			mg_mig_unpause(qp, now);
	}
	m->send_resume_ack = true;
	m->ack_epoch = meh->epoch;
	mg_qp_ready(qp);
}

void mg_mig_rx(struct mg_qp *qp, mg_time now, const struct mg_rx *meta, const struct mg_hdrs *h)
{
	struct mg_migration *m = &qp->mig;
	const struct mg_meh *meh = &h->meh;
	bool from_peer = memcmp(meta->src.gid, qp->peer.gid, 16) == 0, known = mg_mig_peer_is_ours(qp);

	if (meh->version != 1 || meh->src_qpn != qp->peer_qpn ||
	    mg_gid_is_v4(meh->gid) != mg_gid_is_v4(qp->peer.gid)) {
		qp->e->counters[MG_CNT_RX_MALFORMED]++;
		return;
	}
	switch (h->opcode) {
	case MG_OP_RESUME: rx_resume(qp, now, meta, meh); return;
	case MG_OP_RESUME_ACK:
		if (!m->resuming || meh->epoch != qp->e->epoch ||
		    !(m->have_peer_token ? same_token(meh->token, m->peer_token) : from_peer))
			return;
		mg_mig_heard(qp, now);
		acknowledged(qp, now, meh->psn);
		if (mg_qp_connected(qp))
			resumed(qp, now);
		return;
	}
	if (!from_peer) {
		qp->e->counters[MG_CNT_RX_BAD_SOURCE]++;
		return;
	}
	if (h->opcode == MG_OP_TOKEN) {
		if (!m->have_peer_token) { /* the first one stands: who knows it is who we connected to */
			memcpy(m->peer_token, meh->token, 16);
			m->have_peer_token = true;
		} else if (!same_token(meh->token, m->peer_token)) {
			return;
		}
		mg_mig_heard(qp, now);
		m->send_token_ack = true;
		mg_qp_ready(qp);
	} else if (h->opcode == MG_OP_TOKEN_ACK && same_token(meh->token, m->token)) {
		mg_mig_heard(qp, now);
		m->token_acked = true;
		m->send_token = false;
		m->token_at = MG_NEVER;
		if (m->paused && m->paused_idle)
			mg_mig_unpause(qp, now);
	}
	if (!known && mg_mig_peer_is_ours(qp))
		mg_req_peer_known(qp, now);
}

/* ---- sending ---------------------------------------------------------------------------------------- */

static void build(struct mg_qp *qp, uint8_t opcode, uint32_t epoch, const uint8_t token[16], struct mg_pkt *p)
{
	struct mg_hdrs h;

	mg_qp_hdrs(qp, opcode, 0, &h);
	h.meh = (struct mg_meh){.version = 1, .src_qpn = qp->qpn, .epoch = epoch, .psn = qp->resp.epsn};
	memcpy(h.meh.token, token, 16);
	memcpy(h.meh.gid, qp->local.gid, 16);
	p->n_iov = 0;
	mg_pkt_finish(qp, p, &h, 0);
}

bool mg_mig_tx(struct mg_qp *qp, struct mg_pkt *p)
{
	struct mg_migration *m = &qp->mig;

	if (!mg_qp_connected(qp))
		return false;
	if (m->send_resume) {
		m->send_resume = false;
		qp->e->counters[MG_CNT_RESUMES_TX]++;
		build(qp, MG_OP_RESUME, qp->e->epoch, m->token, p);
	} else if (m->send_resume_ack) {
		m->send_resume_ack = false;
		build(qp, MG_OP_RESUME_ACK, m->ack_epoch, m->token, p);
	} else if (m->send_token_ack) {
		m->send_token_ack = false;
		build(qp, MG_OP_TOKEN_ACK, qp->e->epoch, m->peer_token, p);
	} else if (m->send_token) {
		m->send_token = false;
		build(qp, MG_OP_TOKEN, qp->e->epoch, m->token, p);
	} else if (m->send_announce && !qp->resp.job_fill) {
		/*
		 * An acknowledgement that any RoCE peer ignores as a duplicate, with the capability bit. Not
		 * between the packets of a READ's answer: rdma_rxe would forget that it was within one
		 * (rxe_comp.c, check_psn and COMPST_UPDATE_COMP), and break the QP over the next.
		 */
		struct mg_hdrs h;

		m->send_announce = false;
		mg_qp_hdrs(qp, MG_OP_ACK, qp->resp.ack_psn, &h);
		h.opcode = qp->type == IBV_QPT_UC ? MG_OP_ACK : h.opcode; /* UC has none */
		h.aeth.syndrome = MG_AETH_ACK;
		h.aeth.msn = qp->resp.msn;
		p->n_iov = 0;
		mg_pkt_finish(qp, p, &h, 0);
	} else {
		return false;
	}
	return true;
}

/* ---- timers ----------------------------------------------------------------------------------------- */

mg_time mg_mig_deadline(const struct mg_qp *qp)
{
	const struct mg_migration *m = &qp->mig;
	mg_time t = m->announce_at;

	t = m->token_at < t ? m->token_at : t;
	t = m->resume_at < t ? m->resume_at : t;
	return m->probe_at < t ? m->probe_at : t;
}

static void probe(struct mg_qp *qp, mg_time now)
{
	struct mg_migration *m = &qp->mig;

	if (now - m->last_heard >= SILENCE_MAX) {
		mg_mig_unpause(qp, now);
		return;
	}
	m->probe_gap = doubled(m->probe_gap, m->paused_idle ? IDLE_GAP_MAX : PROBE_GAP_MAX);
	m->probe_at = now + m->probe_gap;
	if (m->paused_idle) { /* an announcement that came late is found out: nobody but the peer itself answers */
		m->send_token = true;
		mg_qp_ready(qp);
		return;
	}
	mg_req_go_back(qp);
	qp->req.probe_credit = true;
}

void mg_mig_timer(struct mg_qp *qp, mg_time now)
{
	struct mg_migration *m = &qp->mig;

	if (now >= m->announce_at) {
		m->send_announce = true;
		m->announce_gap *= 4;
		m->announce_at = --m->announce_left ? now + m->announce_gap : MG_NEVER;
		mg_qp_ready(qp);
	}
	if (now >= m->token_at) {
		m->send_token = true;
		m->token_gap = doubled(m->token_gap, TOKEN_GAP_MAX);
		m->token_at = now + m->token_gap;
		mg_qp_ready(qp);
	}
	if (now >= m->resume_at) {
		if (now - m->last_heard >= SILENCE_MAX) {
			resumed(qp, now);
		} else {
			m->send_resume = true;
			m->resume_gap = doubled(m->resume_gap, RESUME_GAP_MAX);
			m->resume_at = now + m->resume_gap;
			mg_qp_ready(qp);
		}
	}
	if (now >= m->probe_at)
		probe(qp, now);
}
