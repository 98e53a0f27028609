/* SPDX-License-Identifier: BSD-3-Clause */
/* hook.c - from the state machine's events to librdmacm's. Called with the device's lock held. */
#include "rdmacm/mgc.h"

static void set_private(struct mgc_event *ev, const uint8_t *data, size_t len, bool ud)
{
	memcpy(ev->private_data, data, len);
	if (ud) {
		ev->ib.param.ud.private_data = ev->private_data;
		ev->ib.param.ud.private_data_len = (uint8_t)len;
	} else {
		ev->ib.param.conn.private_data = ev->private_data;
		ev->ib.param.conn.private_data_len = (uint8_t)len;
	}
}

/* Requests and replies say what the sender takes and starts; to us it is the other way round. */
static void set_conn(struct mgc_id *id, struct mgc_event *ev, const struct mg_cm_msg *m)
{
	struct rdma_conn_param *p = &ev->ib.param.conn;

	p->responder_resources = id->responder_resources = m->initiator_depth;
	p->initiator_depth = id->initiator_depth = m->responder_resources;
	p->flow_control = m->flow_control;
	p->retry_count = m->retry_count;
	p->rnr_retry_count = m->rnr_retry_count & 7;
	p->srq = m->srq;
	p->qp_num = m->qpn;
}

/* Of a request: who asks whom, in the program's terms. */
static void set_addresses(struct mgc_id *id, const struct mg_cm_conn *conn)
{
	struct rdma_addr *a = &id->ib.route.addr;

	mgc_sockaddr(conn->ip.dst, (uint16_t)conn->service_id, &a->src_storage);
	mgc_sockaddr(conn->ip.src, conn->ip.sport, &a->dst_storage);
	mgc_tell_gids(a);
}

static bool request(struct mg_cm_conn *conn, bool ud, const struct mg_cm_msg *m)
{
	struct mgc_id *listener = conn->listener->owner, *id;
	struct mgc_event *ev;

	if (!listener || listener->backlog <= 0) /* it will be repeated */
		return false;
	id = mgc_new_child(listener, conn);
	if (!id)
		return false;
	set_addresses(id, conn);
	id->req = *m;
	ev = mgc_post(id, RDMA_CM_EVENT_CONNECT_REQUEST, 0);
	if (!ev) {		 /* no memory: as if it had not come */
		id->conn = NULL; /* stays the caller's */
		mgc_drop(id);
		return false;
	}
	conn->owner = id;
	listener->backlog--;
	if (!ud)
		set_conn(id, ev, m);
	set_private(ev, m->private_data + MG_IP_HDR_LEN, mg_cm_private_len(m->attr) - MG_IP_HDR_LEN, ud);
	return true;
}

static void reply(struct mgc_id *id, const struct mg_cm_msg *m)
{
	struct mgc_event *ev = mgc_post(id, RDMA_CM_EVENT_CONNECT_RESPONSE, 0);

	id->rep = *m;
	if (!ev)
		return;
	ev->respond = true;
	set_conn(id, ev, m);
	set_private(ev, m->private_data, mg_cm_private_len(MG_CM_REP), false);
}

/*
 * As in the kernel an id connects once: after a refusal, as after an answer that did not come, there is nothing
 * for it but to end. One that has not been accepted yet has no events: accepting it will fail.
 */
static void rejected(struct mgc_id *id, const struct mg_cm_msg *m)
{
	struct mgc_event *ev =
		id->state == MGC_REQUEST ? NULL : mgc_post(id, RDMA_CM_EVENT_REJECTED, m->reason);

	if (ev)
		set_private(ev, m->private_data, mg_cm_private_len(MG_CM_REJ), false);
}

static void established(struct mgc_id *id, const struct mg_cm_msg *m)
{
	struct mgc_event *ev = mgc_post(id, RDMA_CM_EVENT_ESTABLISHED, 0);

	id->state = MGC_ESTABLISHED;
	if (ev && m)
		set_private(ev, m->private_data, mg_cm_private_len(MG_CM_RTU), false);
}

/* Once per connection, whoever began. */
static void disconnected(struct mgc_id *id, int status)
{
	if (id->state == MGC_DISCONNECTED)
		return;
	id->state = MGC_DISCONNECTED;
	mgc_post(id, RDMA_CM_EVENT_DISCONNECTED, status);
}

static void timed_out(struct mgc_id *id, enum mg_cm_state state)
{
	if (state == MG_CM_DREQ_SENT) {
		disconnected(id, -ETIMEDOUT);
		return;
	}
	mgc_post(id, RDMA_CM_EVENT_UNREACHABLE, -ETIMEDOUT);
}

/* The answer to a SIDR request: the peer's UD QP. */
static void resolved(struct mgc_id *id, const struct mg_cm_msg *m)
{
	struct rdma_ud_param *p;
	struct mgc_event *ev;

	if (m->status) {
		ev = mgc_post(id, RDMA_CM_EVENT_UNREACHABLE, m->status);
		if (ev)
			set_private(ev, m->private_data, mg_cm_private_len(MG_CM_SIDR_REP), true);
		return;
	}
	id->state = MGC_ESTABLISHED;
	ev = mgc_post(id, RDMA_CM_EVENT_ESTABLISHED, 0);
	if (!ev)
		return;
	p = &ev->ib.param.ud;
	p->qp_num = m->qpn;
	p->qkey = m->qkey;
	p->ah_attr = mgc_ah_attr(id, &id->conn->local, &id->conn->peer);
	set_private(ev, m->private_data, mg_cm_private_len(MG_CM_SIDR_REP), true);
}

bool mgc_on_event(struct mg_device *dev, struct mg_cm_conn *conn, int event, const struct mg_cm_msg *m)
{
	struct mgc_id *id = conn->owner;

	(void)dev;
	switch ((enum mg_cm_event)event) {
	case MG_CM_EV_REQ: return request(conn, false, m);
	case MG_CM_EV_SIDR_REQ: return request(conn, true, m);
	case MG_CM_EV_REP: reply(id, m); break;
	case MG_CM_EV_ESTABLISHED: established(id, m); break;
	case MG_CM_EV_REJ: rejected(id, m); break;
	case MG_CM_EV_STALE:
	case MG_CM_EV_DREQ:
	case MG_CM_EV_DREP: disconnected(id, 0); break;
	case MG_CM_EV_TIMEWAIT_EXIT:
		if (id->state == MGC_DISCONNECTED)
			mgc_post(id, RDMA_CM_EVENT_TIMEWAIT_EXIT, 0);
		break;
	case MG_CM_EV_TIMEOUT: timed_out(id, conn->state); break;
	case MG_CM_EV_SIDR_REP: resolved(id, m); break;
	}
	return true;
}
