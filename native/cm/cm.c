/* SPDX-License-Identifier: BSD-3-Clause */
/* cm.c - connections: what the program asks for, repetitions and other timers. */
#include "cm/internal.h"

#include <stdlib.h>

#define TIMEWAIT_DEFAULT 1000000000ull /* ns, where no REQ told the packet life time */
#define TIMEWAIT_MAX 60000000000ull
#define SIDR_KEPT 20000000000ull /* a request's repetitions come within this */

const char *const mg_cm_state_name[MG_CM_N_STATES] = {
	"idle",	     "listen",	  "req_sent", "req_rcvd",  "rep_sent",	"rep_rcvd", "established",
	"dreq_sent", "dreq_rcvd", "timewait", "sidr_sent", "sidr_rcvd", "sidr_done"};

uint64_t mg_cm_ns(unsigned code)
{
	return 4096ull << (code & 31);
}

struct mg_cm *mg_cm_create(const struct mg_cm_ops *ops, void *arg, uint32_t id_prefix, unsigned id_bits)
{
	struct mg_cm *cm = calloc(1, sizeof(*cm));

	if (!cm)
		return NULL;
	cm->ops = ops;
	cm->arg = arg;
	cm->id_bits = id_bits;
	cm->id_prefix = id_prefix;
	cm->list.prev = cm->list.next = &cm->list;
	cm->deadline = MG_NEVER;
	return cm;
}

void mg_cm_free(struct mg_cm *cm)
{
	if (!cm)
		return;
	while (cm->list.next != &cm->list)
		mg_cm_unlink(cm->list.next);
	free(cm);
}

/* ---- connections ------------------------------------------------------------------------------------ */

static uint32_t new_id(struct mg_cm *cm)
{
	uint32_t mask = cm->id_bits ? UINT32_MAX >> cm->id_bits : UINT32_MAX, id;
	const struct mg_cm_conn *c;

	do {
		cm->ops->random(cm->arg, &id, sizeof(id));
		id = (cm->id_prefix & ~mask) | (id & mask);
		MG_CM_FOR_EACH(c, cm)
		if (c->local_id == id)
			break;
	} while (!id || c != &cm->list);
	return id;
}

struct mg_cm_conn *mg_cm_conn_new(struct mg_cm *cm, void *owner)
{
	struct mg_cm_conn *c = calloc(1, sizeof(*c));

	if (!c)
		return NULL;
	c->cm = cm;
	c->owner = owner;
	c->local_id = new_id(cm);
	c->timer = MG_NEVER;
	c->timewait = TIMEWAIT_DEFAULT;
	c->prev = cm->list.prev;
	c->next = &cm->list;
	c->prev->next = c->next->prev = c;
	return c;
}

void mg_cm_unlink(struct mg_cm_conn *c)
{
	struct mg_cm_conn *o;

	MG_CM_FOR_EACH(o, c->cm)
	if (o->listener == c)
		o->listener = NULL;
	c->prev->next = c->next;
	c->next->prev = c->prev;
	free(c);
}

bool mg_cm_tell(struct mg_cm_conn *c, enum mg_cm_event ev, const struct mg_cm_msg *m)
{
	if (c->owner) {
		c->cm->ops->event(c->cm->arg, c, ev, m);
		return true;
	}
	if (c->timer != MG_NEVER)
		return true;
	mg_cm_unlink(c);
	return false;
}

/* ---- timers and sending -------------------------------------------------------------------------------- */

void mg_cm_arm(struct mg_cm_conn *c, mg_time at)
{
	struct mg_cm *cm = c->cm;

	c->timer = at;
	if (at < cm->deadline) {
		cm->deadline = at;
		cm->ops->wake(cm->arg, at);
	}
}

void mg_cm_set(struct mg_cm_conn *c, enum mg_cm_state to)
{
	c->state = to;
	c->timer = MG_NEVER; /* the deadline that was told may be too early now, which hurts nobody */
}

void mg_cm_timewait(struct mg_cm_conn *c, mg_time now)
{
	mg_cm_set(c, MG_CM_TIMEWAIT);
	mg_cm_arm(c, now + c->timewait);
}

static void send_mad(const struct mg_cm_conn *c, const uint8_t *mad)
{
	c->cm->ops->send(c->cm->arg, &c->local, &c->peer, c->tclass, mad);
}

void mg_cm_emit(struct mg_cm_conn *c, struct mg_cm_msg *m)
{
	uint8_t mad[MG_MAD_LEN];

	m->tid = c->tid;
	m->local_id = c->local_id;
	m->remote_id = c->remote_id;
	mg_cm_build(m, mad);
	send_mad(c, mad);
}

void mg_cm_request(struct mg_cm_conn *c, mg_time now, struct mg_cm_msg *m, enum mg_cm_state to)
{
	m->tid = c->tid;
	m->local_id = c->local_id;
	m->remote_id = c->remote_id;
	mg_cm_build(m, c->mad);
	c->state = to;
	c->retries = MG_CM_RETRIES;
	c->gap = MG_CM_FIRST_GAP;
	mg_cm_arm(c, now + c->gap);
	send_mad(c, c->mad);
}

void mg_cm_repeat(struct mg_cm_conn *c)
{
	send_mad(c, c->mad);
}

static void new_tid(struct mg_cm_conn *c)
{
	c->cm->ops->random(c->cm->arg, &c->tid, sizeof(c->tid));
}

/* Sent again and again without an answer. */
static void give_up(struct mg_cm_conn *c, mg_time now)
{
	c->timer = MG_NEVER;
	switch (c->state) {
	case MG_CM_REQ_SENT:
		mg_cm_reject(c, MG_REJ_TIMEOUT, MG_ABOUT_REQ, NULL, 0);
		if (mg_cm_tell(c, MG_CM_EV_TIMEOUT, NULL))
			mg_cm_set(c, MG_CM_IDLE);
		break;
	case MG_CM_REP_SENT:
		mg_cm_reject(c, MG_REJ_TIMEOUT, MG_ABOUT_REP, NULL, 0);
		if (mg_cm_tell(c, MG_CM_EV_TIMEOUT, NULL))
			mg_cm_set(c, MG_CM_IDLE);
		break;
	case MG_CM_DREQ_SENT:
		if (mg_cm_tell(c, MG_CM_EV_TIMEOUT, NULL))
			mg_cm_timewait(c, now);
		break;
	default: /* SIDR_SENT */
		if (mg_cm_tell(c, MG_CM_EV_TIMEOUT, NULL))
			mg_cm_set(c, MG_CM_IDLE);
		break;
	}
}

static void expired(struct mg_cm_conn *c, mg_time now)
{
	switch (c->state) {
	case MG_CM_REQ_SENT:
	case MG_CM_REP_SENT:
	case MG_CM_DREQ_SENT:
	case MG_CM_SIDR_SENT: {
		uint64_t full = mg_cm_ns(MG_CM_TIMEOUT);

		if (c->gap >= full && !c->retries--) {
			give_up(c, now);
			return;
		}
		c->gap = c->gap * 2 < full ? c->gap * 2 : full;
		mg_cm_repeat(c);
		mg_cm_arm(c, now + c->gap);
		return;
	}
	case MG_CM_TIMEWAIT:
		mg_cm_set(c, MG_CM_IDLE);
		mg_cm_tell(c, MG_CM_EV_TIMEWAIT_EXIT, NULL);
		return;
	default:
		c->timer = MG_NEVER;
		if (!c->owner)
			mg_cm_unlink(c);
		return;
	}
}

void mg_cm_timer(struct mg_cm *cm, mg_time now)
{
	struct mg_cm_conn *c, *next;
	mg_time at = MG_NEVER;

	for (c = cm->list.next; c != &cm->list; c = next) {
		next = c->next;
		if (c->timer <= now)
			expired(c, now);
	}
	MG_CM_FOR_EACH(c, cm)
	at = c->timer < at ? c->timer : at;
	cm->deadline = at;
	cm->ops->wake(cm->arg, at);
}

mg_time mg_cm_deadline(const struct mg_cm *cm)
{
	return cm->deadline;
}

void mg_cm_resumed(struct mg_cm *cm, mg_time now)
{
	struct mg_cm_conn *c;

	cm->n_closed = 0;
	memset(cm->closed, 0, sizeof(cm->closed));
	cm->deadline = MG_NEVER; /* of another machine's clock */
	cm->ops->wake(cm->arg, MG_NEVER);
	MG_CM_FOR_EACH(c, cm)
	{
		if (c->timer == MG_NEVER)
			continue;
		switch (c->state) {
		case MG_CM_REQ_SENT:
		case MG_CM_REP_SENT:
		case MG_CM_DREQ_SENT:
		case MG_CM_SIDR_SENT:
			c->retries = MG_CM_RETRIES;
			c->gap = MG_CM_FIRST_GAP;
			mg_cm_repeat(c);
			mg_cm_arm(c, now + c->gap);
			break;
		case MG_CM_TIMEWAIT: mg_cm_arm(c, now + c->timewait); break;
		default: mg_cm_arm(c, now + SIDR_KEPT); break;
		}
	}
}

/* ---- what the program does --------------------------------------------------------------------------------- */

static bool same_gid(const struct mg_addr *a, const struct mg_addr *b)
{
	return !memcmp(a->gid, b->gid, sizeof(a->gid));
}

int mg_cm_listen(struct mg_cm_conn *c, uint64_t service_id, const struct mg_addr *bound)
{
	const struct mg_cm_conn *o;

	if (c->state != MG_CM_IDLE)
		return EINVAL;
	MG_CM_FOR_EACH(o, c->cm)
	if (o->state == MG_CM_LISTEN && o->service_id == service_id && same_gid(&o->bound, bound) &&
	    o->v4_only == c->v4_only && o->v6_only == c->v6_only)
		return EADDRINUSE;
	c->service_id = service_id;
	c->bound = *bound;
	c->state = MG_CM_LISTEN;
	return 0;
}

/* Twice the packet life time, the ACK delay included (IBA 12.9.8.4): the ACK timeout says both. */
static void set_timewait(struct mg_cm_conn *c, unsigned ack_timeout)
{
	uint64_t ns = ack_timeout ? mg_cm_ns(ack_timeout) * 2 : TIMEWAIT_DEFAULT;

	c->timewait = ns < TIMEWAIT_MAX ? ns : TIMEWAIT_MAX;
}

int mg_cm_send_req(struct mg_cm_conn *c, mg_time now, struct mg_cm_msg *m, const struct mg_addr *local,
		   const struct mg_addr *peer)
{
	if (c->state != MG_CM_IDLE)
		return EINVAL;
	c->local = *local;
	c->peer = *peer;
	c->tclass = m->primary.tclass;
	c->remote_id = 0;
	new_tid(c);
	set_timewait(c, m->primary.ack_timeout);
	m->attr = MG_CM_REQ;
	m->remote_timeout = m->local_timeout = MG_CM_TIMEOUT;
	m->max_cm_retries = MG_CM_RETRIES;
	mg_cm_request(c, now, m, MG_CM_REQ_SENT);
	return 0;
}

int mg_cm_send_rep(struct mg_cm_conn *c, mg_time now, struct mg_cm_msg *m)
{
	if (c->state != MG_CM_REQ_RCVD)
		return EINVAL;
	m->attr = MG_CM_REP;
	mg_cm_request(c, now, m, MG_CM_REP_SENT);
	return 0;
}

int mg_cm_send_rtu(struct mg_cm_conn *c, mg_time now)
{
	struct mg_cm_msg m = {.attr = MG_CM_RTU};

	if (c->state != MG_CM_REP_RCVD)
		return EINVAL;
	(void)now;
	mg_cm_set(c, MG_CM_ESTABLISHED);
	mg_cm_emit(c, &m);
	return 0;
}

void mg_cm_reject(struct mg_cm_conn *c, uint16_t reason, enum mg_cm_about about, const void *data, size_t len)
{
	struct mg_cm_msg m = {.attr = MG_CM_REJ, .about = (uint8_t)about, .reason = reason};

	if (len > mg_cm_private_len(MG_CM_REJ))
		len = mg_cm_private_len(MG_CM_REJ);
	if (len)
		memcpy(m.private_data, data, len);
	mg_cm_emit(c, &m);
}

int mg_cm_send_rej(struct mg_cm_conn *c, mg_time now, uint16_t reason, const void *data, size_t len)
{
	switch (c->state) {
	case MG_CM_REQ_RCVD: mg_cm_reject(c, reason, MG_ABOUT_REQ, data, len); break;
	case MG_CM_REP_RCVD: mg_cm_reject(c, reason, MG_ABOUT_REP, data, len); break;
	default: return EINVAL;
	}
	/* A repeated REQ is to hear it again, not to become a new connection. */
	mg_cm_timewait(c, now);
	return 0;
}

int mg_cm_send_dreq(struct mg_cm_conn *c, mg_time now)
{
	struct mg_cm_msg m = {.attr = MG_CM_DREQ, .qpn = c->peer_qpn};

	if (c->state != MG_CM_ESTABLISHED && c->state != MG_CM_REP_SENT)
		return EINVAL;
	mg_cm_request(c, now, &m, MG_CM_DREQ_SENT);
	return 0;
}

int mg_cm_send_drep(struct mg_cm_conn *c, mg_time now)
{
	struct mg_cm_msg m = {.attr = MG_CM_DREP};

	if (c->state != MG_CM_DREQ_RCVD)
		return EINVAL;
	mg_cm_emit(c, &m);
	mg_cm_timewait(c, now);
	return 0;
}

int mg_cm_send_sidr_req(struct mg_cm_conn *c, mg_time now, struct mg_cm_msg *m, const struct mg_addr *local,
			const struct mg_addr *peer)
{
	if (c->state != MG_CM_IDLE)
		return EINVAL;
	c->local = *local;
	c->peer = *peer;
	new_tid(c);
	m->attr = MG_CM_SIDR_REQ;
	mg_cm_request(c, now, m, MG_CM_SIDR_SENT);
	return 0;
}

int mg_cm_send_sidr_rep(struct mg_cm_conn *c, mg_time now, struct mg_cm_msg *m)
{
	if (c->state != MG_CM_SIDR_RCVD)
		return EINVAL;
	m->attr = MG_CM_SIDR_REP;
	m->tid = c->tid;
	m->local_id = c->remote_id; /* the request's id */
	m->service_id = c->service_id;
	mg_cm_build(m, c->mad);
	mg_cm_set(c, MG_CM_SIDR_DONE);
	mg_cm_arm(c, now + SIDR_KEPT);
	mg_cm_repeat(c);
	return 0;
}

int mg_cm_notify(struct mg_cm_conn *c, mg_time now)
{
	(void)now;
	switch (c->state) {
	case MG_CM_REP_SENT:
		mg_cm_set(c, MG_CM_ESTABLISHED);
		mg_cm_tell(c, MG_CM_EV_ESTABLISHED, NULL);
		return 0;
	case MG_CM_ESTABLISHED: return EISCONN;
	default: return EINVAL;
	}
}

/* What the peer is told when the program lets go of a connection. */
static void say_end(struct mg_cm_conn *c, mg_time now)
{
	struct mg_cm_msg m = {.status = 2}; /* SIDR: rejected */

	switch (c->state) {
	case MG_CM_REQ_SENT:
		mg_cm_reject(c, MG_REJ_TIMEOUT, MG_ABOUT_REQ, NULL, 0);
		mg_cm_set(c, MG_CM_IDLE);
		break;
	case MG_CM_REQ_RCVD:
	case MG_CM_REP_RCVD: mg_cm_send_rej(c, now, MG_REJ_CONSUMER, NULL, 0); break;
	case MG_CM_ESTABLISHED:
	case MG_CM_REP_SENT: mg_cm_send_dreq(c, now); break;
	case MG_CM_DREQ_RCVD: mg_cm_send_drep(c, now); break;
	case MG_CM_SIDR_RCVD: mg_cm_send_sidr_rep(c, now, &m); break;
	case MG_CM_LISTEN: {
		unsigned at = c->cm->n_closed++ % MG_CM_CLOSED;

		c->cm->closed[at].service_id = c->service_id;
		c->cm->closed[at].at = now;
		mg_cm_set(c, MG_CM_IDLE);
		break;
	}
	case MG_CM_SIDR_SENT: mg_cm_set(c, MG_CM_IDLE); break;
	default: break;
	}
}

void mg_cm_conn_destroy(struct mg_cm_conn *c, mg_time now)
{
	c->owner = NULL;
	say_end(c, now);
	if (c->timer == MG_NEVER)
		mg_cm_unlink(c);
}

void mg_cm_farewell(struct mg_cm *cm, mg_time now)
{
	struct mg_cm_conn *c, *next;

	for (c = cm->list.next; c != &cm->list; c = next) {
		next = c->next;
		say_end(c, now);
	}
}
