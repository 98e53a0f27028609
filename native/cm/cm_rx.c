/* SPDX-License-Identifier: BSD-3-Clause */
/* cm_rx.c - what the peer says: IBA 12.9.7 (active), 12.9.8 (passive and common). */
#include "cm/internal.h"

#include "wire/wire.h"

struct from {
	struct mg_cm *cm;
	mg_time now;
	const struct mg_addr *src, *dst;
	uint8_t tclass;
};

static bool same_gid(const struct mg_addr *a, const struct mg_addr *b)
{
	return !memcmp(a->gid, b->gid, sizeof(a->gid));
}

/* The connection that a message names by our id. Only its peer may speak about it. */
static struct mg_cm_conn *find(const struct from *f, uint32_t local_id)
{
	struct mg_cm_conn *c;

	MG_CM_FOR_EACH(c, f->cm)
	if (c->local_id == local_id && c->state != MG_CM_LISTEN && c->state != MG_CM_IDLE)
		return same_gid(&c->peer, f->src) ? c : NULL;
	return NULL;
}

/* ... and by both ids: the peer's must be the one we know. */
static struct mg_cm_conn *find_both(const struct from *f, const struct mg_cm_msg *m)
{
	struct mg_cm_conn *c = find(f, m->remote_id);

	return c && c->remote_id == m->local_id ? c : NULL;
}

/* A request we have had before. */
static struct mg_cm_conn *find_request(const struct from *f, const struct mg_cm_msg *m, bool sidr)
{
	struct mg_cm_conn *c;

	MG_CM_FOR_EACH(c, f->cm)
	if (c->remote_id == m->local_id && c->tid == m->tid && same_gid(&c->peer, f->src) &&
	    (c->state == MG_CM_SIDR_RCVD || c->state == MG_CM_SIDR_DONE) == sidr &&
	    c->state != MG_CM_REQ_SENT && c->state != MG_CM_SIDR_SENT && c->state != MG_CM_IDLE)
		return c;
	return NULL;
}

/* An answer from nobody: to a message that belongs to no connection of ours. */
static void answer(const struct from *f, struct mg_cm_msg *m)
{
	uint8_t mad[MG_MAD_LEN];

	mg_cm_build(m, mad);
	f->cm->ops->send(f->cm->arg, f->dst, f->src, f->tclass, mad);
}

static void refuse(const struct from *f, const struct mg_cm_msg *req, uint16_t reason)
{
	struct mg_cm_msg m = {.attr = MG_CM_REJ,
			      .tid = req->tid,
			      .remote_id = req->local_id,
			      .about = MG_ABOUT_REQ,
			      .reason = reason};

	answer(f, &m);
}

/* ---- REQ and SIDR_REQ ------------------------------------------------------------------------------- */

static bool listens(const struct mg_cm_conn *l, uint64_t service_id, const struct mg_ip_hdr *ip)
{
	static const struct mg_addr any;

	if (l->state != MG_CM_LISTEN || l->service_id != service_id)
		return false;
	if (same_gid(&l->bound, &any))
		return ip->version == 4 ? !l->v6_only : !l->v4_only;
	return !memcmp(l->bound.gid, ip->dst, 16);
}

/* One bound to the address comes before one for any. */
static struct mg_cm_conn *find_listener(const struct from *f, uint64_t service_id, const struct mg_ip_hdr *ip)
{
	struct mg_cm_conn *l, *found = NULL;

	MG_CM_FOR_EACH(l, f->cm)
	if (listens(l, service_id, ip) && (!found || !memcmp(l->bound.gid, ip->dst, 16)))
		found = l;
	return found;
}

static bool is_service(uint64_t id, uint64_t prefix)
{
	return (id & ~0xffffull) == prefix;
}

/* A new connection for a request; NULL: dropped, or refused. */
static struct mg_cm_conn *accept_request(const struct from *f, const struct mg_cm_msg *m,
					 const struct mg_ip_hdr *ip, struct mg_cm_conn *listener)
{
	struct mg_cm_conn *c = mg_cm_conn_new(f->cm, NULL);

	if (!c)
		return NULL;
	c->remote_id = m->local_id;
	c->tid = m->tid;
	c->peer = *f->src;
	c->local = *f->dst;
	c->tclass = f->tclass;
	c->service_id = m->service_id;
	c->listener = listener;
	c->ip = *ip;
	return c;
}

static void dup_req(struct mg_cm_conn *c)
{
	struct mg_cm_msg mra = {
		.attr = MG_CM_MRA, .about = MG_ABOUT_REQ, .service_timeout = MG_CM_MRA_TIMEOUT};

	switch (c->state) {
	case MG_CM_REQ_RCVD: mg_cm_emit(c, &mra); break; /* the program is slow */
	case MG_CM_REP_SENT: mg_cm_repeat(c); break;
	case MG_CM_TIMEWAIT: mg_cm_reject(c, MG_REJ_CONSUMER, MG_ABOUT_REQ, NULL, 0); break;
	default: break;
	}
}

/*
 * Another connection to the peer's QP: the peer has made the QP anew and knows nothing of that one any
 * more (12.9.8.3.1). It ends, and the peer may try again.
 */
static bool stale(const struct from *f, const struct mg_cm_msg *m)
{
	struct mg_cm_conn *c;

	MG_CM_FOR_EACH(c, f->cm)
	{
		if (c->peer_qpn != m->qpn || m->qpn < 2 || !same_gid(&c->peer, f->src) ||
		    (c->state != MG_CM_ESTABLISHED && c->state != MG_CM_REP_SENT))
			continue;
		refuse(f, m, MG_REJ_STALE);
		mg_cm_timewait(c, f->now);
		mg_cm_tell(c, MG_CM_EV_STALE, NULL);
		return true;
	}
	return false;
}

/* In any port space: perftest with -R -c UD makes a listener for datagrams where it had one for streams. */
static bool closed_just_now(const struct from *f, uint64_t service_id)
{
	if (!is_service(service_id, MG_IP_PREFIX_TCP) && !is_service(service_id, MG_IP_PREFIX_UDP) &&
	    !is_service(service_id, MG_IP_PREFIX_IB))
		return false;
	for (unsigned i = 0; i < MG_CM_CLOSED; i++)
		if (f->cm->closed[i].at && !((f->cm->closed[i].service_id ^ service_id) & 0xffff) &&
		    f->now - f->cm->closed[i].at < MG_CM_GRACE)
			return true;
	return false;
}

/* Who listens for a request; NULL: nobody. `prefix`: the IP service that the request must be for. */
static struct mg_cm_conn *asked(const struct from *f, const struct mg_cm_msg *m, uint64_t prefix,
				struct mg_ip_hdr *ip)
{
	if (!is_service(m->service_id, prefix) || mg_ip_hdr_parse(m->private_data, ip))
		return NULL;
	return find_listener(f, m->service_id, ip);
}

/* The new connection goes to the program, or, if that has no room, away: it will be asked again. */
static void hand_over(const struct from *f, struct mg_cm_conn *c, enum mg_cm_event ev,
		      const struct mg_cm_msg *m)
{
	if (!f->cm->ops->event(f->cm->arg, c, ev, m))
		mg_cm_unlink(c);
}

static void rx_req(const struct from *f, const struct mg_cm_msg *m)
{
	struct mg_cm_conn *c = find_request(f, m, false), *listener;
	struct mg_ip_hdr ip;

	if (c) {
		dup_req(c);
		return;
	}
	listener = asked(f, m, MG_IP_PREFIX_TCP, &ip);
	if (!listener)
		listener = asked(f, m, MG_IP_PREFIX_IB, &ip);
	if (!listener) {
		if (!closed_just_now(f, m->service_id))
			refuse(f, m, MG_REJ_INVALID_SERVICE);
		return;
	}
	if (stale(f, m))
		return;
	c = accept_request(f, m, &ip, listener);
	if (!c)
		return;
	c->state = MG_CM_REQ_RCVD;
	c->peer_qpn = m->qpn;
	if (m->primary.ack_timeout)
		c->timewait = mg_cm_ns(m->primary.ack_timeout < 23 ? m->primary.ack_timeout + 1u : 23u);
	hand_over(f, c, MG_CM_EV_REQ, m);
}

static void refuse_sidr(const struct from *f, const struct mg_cm_msg *req)
{
	struct mg_cm_msg rep = {.attr = MG_CM_SIDR_REP,
				.tid = req->tid,
				.local_id = req->local_id,
				.service_id = req->service_id,
				.status = 1}; /* service id not supported */

	answer(f, &rep);
}

static void rx_sidr_req(const struct from *f, const struct mg_cm_msg *m)
{
	struct mg_cm_conn *c = find_request(f, m, true), *listener;
	struct mg_ip_hdr ip;

	if (c) {
		if (c->state == MG_CM_SIDR_DONE)
			mg_cm_repeat(c);
		return;
	}
	listener = asked(f, m, MG_IP_PREFIX_UDP, &ip);
	if (!listener) {
		if (!closed_just_now(f, m->service_id))
			refuse_sidr(f, m);
		return;
	}
	c = accept_request(f, m, &ip, listener);
	if (!c)
		return;
	c->state = MG_CM_SIDR_RCVD;
	hand_over(f, c, MG_CM_EV_SIDR_REQ, m);
}

/* ---- answers ------------------------------------------------------------------------------------------- */

static void rx_rep(const struct from *f, const struct mg_cm_msg *m)
{
	struct mg_cm_msg rtu = {.attr = MG_CM_RTU};
	struct mg_cm_msg mra = {
		.attr = MG_CM_MRA, .about = MG_ABOUT_REP, .service_timeout = MG_CM_MRA_TIMEOUT};
	struct mg_cm_conn *c = find(f, m->remote_id);

	if (!c || m->tid != c->tid)
		return;
	if (c->state == MG_CM_REQ_SENT) {
		c->remote_id = m->local_id;
		c->peer_qpn = m->qpn;
		mg_cm_set(c, MG_CM_REP_RCVD);
		mg_cm_tell(c, MG_CM_EV_REP, m);
	} else if (c->remote_id != m->local_id) {
		return;
	} else if (c->state == MG_CM_ESTABLISHED) {
		mg_cm_emit(c, &rtu); /* ours was lost */
	} else if (c->state == MG_CM_REP_RCVD) {
		mg_cm_emit(c, &mra);
	}
}

static void rx_rtu(const struct from *f, const struct mg_cm_msg *m)
{
	struct mg_cm_conn *c = find_both(f, m);

	if (!c || c->state != MG_CM_REP_SENT)
		return;
	mg_cm_set(c, MG_CM_ESTABLISHED);
	mg_cm_tell(c, MG_CM_EV_ESTABLISHED, m);
}

static void rx_mra(const struct from *f, const struct mg_cm_msg *m)
{
	struct mg_cm_conn *c = find(f, m->remote_id);

	if (!c || (c->state != MG_CM_REQ_SENT && c->state != MG_CM_REP_SENT))
		return;
	/* At most 150 s, whatever it asks for: then we ask again. */
	mg_cm_arm(c, f->now + mg_cm_ns(m->service_timeout < 25 ? m->service_timeout : 25u) +
			     mg_cm_ns(MG_CM_TIMEOUT));
}

static void rx_rej(const struct from *f, const struct mg_cm_msg *m)
{
	struct mg_cm_conn *c;

	if (m->remote_id) {
		c = find(f, m->remote_id);
	} else { /* a REQ that was given up: its sender does not know our id */
		MG_CM_FOR_EACH(c, f->cm)
		if (c->remote_id == m->local_id && c->tid == m->tid && same_gid(&c->peer, f->src))
			break;
		if (c == &f->cm->list)
			return;
	}
	if (!c)
		return;
	switch (c->state) {
	case MG_CM_REQ_SENT:
		mg_cm_set(c, MG_CM_IDLE);
		mg_cm_tell(c, MG_CM_EV_REJ, m);
		return;
	case MG_CM_REQ_RCVD:
	case MG_CM_REP_SENT:
	case MG_CM_REP_RCVD:
		if (c->remote_id != m->local_id)
			return;
		mg_cm_set(c, MG_CM_IDLE);
		mg_cm_tell(c, MG_CM_EV_REJ, m);
		return;
	default: return;
	}
}

static void rx_dreq(const struct from *f, const struct mg_cm_msg *m)
{
	struct mg_cm_msg drep = {
		.attr = MG_CM_DREP, .tid = m->tid, .local_id = m->remote_id, .remote_id = m->local_id};
	struct mg_cm_conn *c = find_both(f, m);

	if (!c) {
		answer(f, &drep); /* gone already: so that it need not be asked again */
		return;
	}
	switch (c->state) {
	case MG_CM_ESTABLISHED:
	case MG_CM_REP_SENT:
	case MG_CM_DREQ_SENT:
		c->tid = m->tid;
		mg_cm_set(c, MG_CM_DREQ_RCVD);
		if (!c->owner)
			mg_cm_send_drep(c, f->now);
		else
			mg_cm_tell(c, MG_CM_EV_DREQ, m);
		break;
	case MG_CM_TIMEWAIT: answer(f, &drep); break;
	default: break;
	}
}

static void rx_drep(const struct from *f, const struct mg_cm_msg *m)
{
	struct mg_cm_conn *c = find_both(f, m);

	if (!c || c->state != MG_CM_DREQ_SENT)
		return;
	mg_cm_timewait(c, f->now);
	mg_cm_tell(c, MG_CM_EV_DREP, m);
}

static void rx_sidr_rep(const struct from *f, const struct mg_cm_msg *m)
{
	struct mg_cm_conn *c = find(f, m->local_id);

	if (!c || c->state != MG_CM_SIDR_SENT || c->tid != m->tid)
		return;
	mg_cm_set(c, MG_CM_IDLE);
	mg_cm_tell(c, MG_CM_EV_SIDR_REP, m);
}

void mg_cm_rx(struct mg_cm *cm, mg_time now, const struct mg_addr *src, const struct mg_addr *dst,
	      uint8_t tclass, const uint8_t *mad)
{
	const struct from f = {cm, now, src, dst, tclass};
	struct mg_cm_msg m;

	if (mg_cm_parse(mad, MG_MAD_LEN, &m))
		return;
	switch (m.attr) {
	case MG_CM_REQ: rx_req(&f, &m); break;
	case MG_CM_MRA: rx_mra(&f, &m); break;
	case MG_CM_REJ: rx_rej(&f, &m); break;
	case MG_CM_REP: rx_rep(&f, &m); break;
	case MG_CM_RTU: rx_rtu(&f, &m); break;
	case MG_CM_DREQ: rx_dreq(&f, &m); break;
	case MG_CM_DREP: rx_drep(&f, &m); break;
	case MG_CM_SIDR_REQ: rx_sidr_req(&f, &m); break;
	case MG_CM_SIDR_REP: rx_sidr_rep(&f, &m); break;
	default: break;
	}
}
