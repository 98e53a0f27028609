/* SPDX-License-Identifier: BSD-3-Clause */
/* conn.c - connecting, accepting, rejecting, disconnecting. */
#include "rdmacm/mgc.h"

#include <stdlib.h>

#define ACK_TIMEOUT 17u /* 0.5 s: what rdma_cm and rxe ask for */
#define RATE_10_GBPS 10u

/* Lock held, as for `guid`: the device's thread looks at the interface anew whenever that changes. */
static unsigned mtu_code(const struct mg_device *dev)
{
	return (unsigned)__builtin_ctz(dev->port.active_mtu) - 7u;
}

static uint64_t guid(const struct mg_device *dev)
{
	__be64 be = mgv_guid(dev->port.mac);

	return __builtin_bswap64(be);
}

/* RDMA_MAX_*: as many as the device can; more than that is an error. */
static int depth(uint8_t asked, uint8_t highest, uint8_t *out)
{
	if (asked != 0xff && asked > MG_MAX_RD_ATOMIC)
		return EINVAL;
	*out = asked == 0xff ? highest : asked;
	return 0;
}

static uint32_t qpn_of(const struct mgc_id *id, const struct rdma_conn_param *p)
{
	return id->ib.qp ? id->ib.qp->qp_num : p->qp_num & 0xffffff;
}

static void set_ip_hdr(const struct mgc_id *id, uint8_t *out)
{
	const struct rdma_addr *a = &id->ib.route.addr;
	struct mg_ip_hdr h = {.version = a->src_addr.sa_family == AF_INET ? 4 : 6,
			      .sport = mgc_port(&a->src_addr)};
	struct mg_addr gid;

	mgc_gid_of(&a->src_addr, &gid);
	memcpy(h.src, gid.gid, 16);
	mgc_gid_of(&a->dst_addr, &gid);
	memcpy(h.dst, gid.gid, 16);
	mg_ip_hdr_build(&h, out);
}

static int set_data(struct mg_cm_msg *m, size_t at, const struct rdma_conn_param *p)
{
	if (at + p->private_data_len > mg_cm_private_len(m->attr) ||
	    (p->private_data_len && !p->private_data))
		return EINVAL;
	if (p->private_data_len)
		memcpy(m->private_data + at, p->private_data, p->private_data_len);
	return 0;
}

/* Lock held. */
static int build_req(struct mgc_id *id, const struct rdma_conn_param *p, struct mg_cm_msg *m)
{
	const struct rdma_addr *a = &id->ib.route.addr;
	struct mg_cm_route *r = &m->primary;
	struct mg_addr gid;
	int err;

	*m = (struct mg_cm_msg){.attr = MG_CM_REQ};
	err = depth(p->responder_resources, MG_MAX_RD_ATOMIC, &m->responder_resources);
	if (!err)
		err = depth(p->initiator_depth, MG_MAX_RD_ATOMIC, &m->initiator_depth);
	if (!err)
		err = set_data(m, MG_IP_HDR_LEN, p);
	if (err)
		return err;
	set_ip_hdr(id, m->private_data);
	m->service_id = mgc_service(id, mgc_port(&a->dst_addr));
	m->ca_guid = guid(id->dev);
	m->qpn = id->qpn = qpn_of(id, p);
	m->psn = id->psn;
	if (id->ib.qp && id->ib.qp->qp_type == IBV_QPT_UC)
		m->service_type = 1;
	m->flow_control = p->flow_control != 0;
	m->retry_count = p->retry_count < 7 ? p->retry_count : 7;
	m->rnr_retry_count = p->rnr_retry_count < 7 ? p->rnr_retry_count : 7;
	m->srq = id->ib.qp ? id->ib.qp->srq != NULL : p->srq != 0;
	m->pkey = 0xffff;
	m->path_mtu = (uint8_t)mtu_code(id->dev);
	r->local_lid = r->remote_lid = 0xffff;
	mgc_gid_of(&a->src_addr, &gid);
	memcpy(r->local_gid, gid.gid, 16);
	mgc_gid_of(&a->dst_addr, &gid);
	memcpy(r->remote_gid, gid.gid, 16);
	r->rate = RATE_10_GBPS;
	r->tclass = id->tos;
	r->hop_limit = 64;
	r->ack_timeout = id->ack_timeout ? id->ack_timeout : ACK_TIMEOUT;
	return 0;
}

static int build_sidr_req(struct mgc_id *id, const struct rdma_conn_param *p, struct mg_cm_msg *m)
{
	*m = (struct mg_cm_msg){.attr = MG_CM_SIDR_REQ, .pkey = 0xffff};
	m->service_id = mgc_service(id, mgc_port(&id->ib.route.addr.dst_addr));
	set_ip_hdr(id, m->private_data);
	return set_data(m, MG_IP_HDR_LEN, p);
}

static const struct rdma_conn_param default_param = {.responder_resources = RDMA_MAX_RESP_RES,
						     .initiator_depth = RDMA_MAX_INIT_DEPTH,
						     .retry_count = 7,
						     .rnr_retry_count = 7};

/* Without a QP of the id's the program names its own. */
static bool has_qpn(const struct mgc_id *id, const struct rdma_conn_param *param)
{
	return mgc_is_ud(id) || id->ib.qp || param;
}

MGC_EXPORT int rdma_connect(struct rdma_cm_id *ib, struct rdma_conn_param *param)
{
	struct rdma_conn_param p = param ? *param : default_param;
	struct mg_addr local, peer;
	struct mgc_id *id;
	int err;

	MGC_FORWARD(rdma_connect, ib, param);
	id = mgc_id(ib);
	if (!has_qpn(id, param))
		return mgc_err(EINVAL);
	if (id->ep_private_len && !p.private_data_len) {
		p.private_data = id->ep_private;
		p.private_data_len = (uint8_t)id->ep_private_len;
	}
	mg_device_lock(id->dev);
	err = id->state == MGC_ROUTE ? mgc_conn(id) : EINVAL;
	if (!err)
		err = mgc_is_ud(id) ? build_sidr_req(id, &p, &id->req) : build_req(id, &p, &id->req);
	if (!err) {
		mgc_gid_of(&ib->route.addr.src_addr, &local);
		mgc_gid_of(&ib->route.addr.dst_addr, &peer);
		err = mgc_is_ud(id) ? mg_cm_send_sidr_req(id->conn, mg_now(), &id->req, &local, &peer)
				    : mg_cm_send_req(id->conn, mg_now(), &id->req, &local, &peer);
	}
	if (!err) {
		id->state = MGC_CONNECT;
		mg_net_flush(id->dev, 0);
	}
	mg_device_unlock(id->dev);
	if (err)
		return mgc_err(err);
	return mgc_complete(id);
}

/* The connection's own RTU; the QP, if it is the program's, is its business. */
static int establish(struct mgc_id *id)
{
	int err;

	mg_device_lock(id->dev);
	err = id->conn && id->state == MGC_CONNECT ? mg_cm_send_rtu(id->conn, mg_now()) : EINVAL;
	if (!err) {
		id->state = MGC_ESTABLISHED;
		mg_net_flush(id->dev, 0);
	}
	mg_device_unlock(id->dev);
	return err;
}

int mgc_respond(struct mgc_id *id)
{
	int err = mgc_qp_to_rts(id);

	if (!err)
		return establish(id);
	mgc_qp_error(id);
	mg_device_lock(id->dev);
	if (id->conn)
		mg_cm_send_rej(id->conn, mg_now(), MG_REJ_CONSUMER, NULL, 0);
	mg_net_flush(id->dev, 0);
	mg_device_unlock(id->dev);
	return err;
}

MGC_EXPORT int rdma_establish(struct rdma_cm_id *ib)
{
	MGC_FORWARD(rdma_establish, ib);
	/* Where the id has a QP the library has done it. */
	return mgc_err(ib->qp ? EINVAL : establish(mgc_id(ib)));
}

/* ---- the passive side ---------------------------------------------------------------------------------------- */

static int accept_ud(struct mgc_id *id, const struct rdma_conn_param *p)
{
	struct mg_cm_msg m = {.attr = MG_CM_SIDR_REP, .qpn = qpn_of(id, p), .qkey = RDMA_UDP_QKEY};
	int err = set_data(&m, 0, p);

	if (err)
		return err;
	mg_device_lock(id->dev);
	err = id->conn && id->state == MGC_REQUEST ? mg_cm_send_sidr_rep(id->conn, mg_now(), &m) : EINVAL;
	if (!err) {
		id->state = MGC_ESTABLISHED;
		mg_net_flush(id->dev, 0);
	}
	mg_device_unlock(id->dev);
	return err;
}

static int build_rep(struct mgc_id *id, const struct rdma_conn_param *p, struct mg_cm_msg *m)
{
	*m = (struct mg_cm_msg){.attr = MG_CM_REP};
	m->qpn = id->qpn = qpn_of(id, p);
	m->psn = id->psn;
	m->responder_resources = id->responder_resources;
	m->initiator_depth = id->initiator_depth;
	m->target_ack_delay = 15;
	m->flow_control = p->flow_control != 0;
	m->rnr_retry_count = p->rnr_retry_count < 7 ? p->rnr_retry_count : 7;
	m->srq = id->ib.qp ? id->ib.qp->srq != NULL : p->srq != 0;
	return set_data(m, 0, p);
}

static int accept_rc(struct mgc_id *id, const struct rdma_conn_param *p)
{
	uint8_t most = MG_MAX_RD_ATOMIC, resources, initiator;
	int err;

	/* RDMA_MAX_*: what the peer asked for, within what we can. */
	err = depth(p->responder_resources, id->responder_resources < most ? id->responder_resources : most,
		    &resources);
	if (!err)
		err = depth(p->initiator_depth, id->initiator_depth < most ? id->initiator_depth : most,
			    &initiator);
	if (err)
		return err;
	id->responder_resources = resources;
	id->initiator_depth = initiator;
	err = build_rep(id, p, &id->rep);
	if (!err && id->ib.qp)
		err = mgc_qp_to_rts(id); /* data may come before the RTU */
	if (err)
		return err;
	mg_device_lock(id->dev);
	id->rep.ca_guid = guid(id->dev);
	err = id->conn && id->state == MGC_REQUEST ? mg_cm_send_rep(id->conn, mg_now(), &id->rep) : EINVAL;
	if (!err) {
		id->state = MGC_ACCEPT;
		mg_net_flush(id->dev, 0);
	}
	mg_device_unlock(id->dev);
	if (err) /* the peer has given up meanwhile */
		mgc_qp_error(id);
	return err;
}

MGC_EXPORT int rdma_accept(struct rdma_cm_id *ib, struct rdma_conn_param *param)
{
	const struct rdma_conn_param *p = param ? param : &default_param;
	struct mgc_id *id;
	int err;

	MGC_FORWARD(rdma_accept, ib, param);
	id = mgc_id(ib);
	if (id->state != MGC_REQUEST || !has_qpn(id, param))
		return mgc_err(EINVAL);
	err = mgc_is_ud(id) ? accept_ud(id, p) : accept_rc(id, p);
	if (err || mgc_is_ud(id))
		return mgc_err(err);
	return mgc_complete(id);
}

static int reject(struct rdma_cm_id *ib, const void *data, uint8_t len, uint16_t reason)
{
	struct mg_cm_msg m = {.attr = MG_CM_SIDR_REP, .status = 2};
	struct rdma_conn_param p = {.private_data = data, .private_data_len = len};
	struct mgc_id *id;
	int err;

	id = mgc_id(ib);
	m.attr = mgc_is_ud(id) ? MG_CM_SIDR_REP : MG_CM_REJ;
	err = set_data(&m, 0, &p);
	mg_device_lock(id->dev);
	if (!err && !id->conn)
		err = EINVAL;
	if (!err)
		err = mgc_is_ud(id) ? mg_cm_send_sidr_rep(id->conn, mg_now(), &m)
				    : mg_cm_send_rej(id->conn, mg_now(), reason, data, len);
	if (!err)
		mg_net_flush(id->dev, 0);
	mg_device_unlock(id->dev);
	return mgc_err(err);
}

MGC_EXPORT int rdma_reject(struct rdma_cm_id *ib, const void *data, uint8_t len)
{
	MGC_FORWARD(rdma_reject, ib, data, len);
	return reject(ib, data, len, MG_REJ_CONSUMER);
}

MGC_EXPORT int rdma_reject_ece(struct rdma_cm_id *ib, const void *data, uint8_t len)
{
	MGC_FORWARD(rdma_reject_ece, ib, data, len);
	return reject(ib, data, len, MG_REJ_VENDOR_OPTION);
}

MGC_EXPORT int rdma_notify(struct rdma_cm_id *ib, enum ibv_event_type event)
{
	struct mgc_id *id;
	int err = 0;

	MGC_FORWARD(rdma_notify, ib, event);
	id = mgc_id(ib);
	if (event != IBV_EVENT_COMM_EST) /* and PATH_MIG, for a path that no connection has */
		return mgc_err(EINVAL);
	mg_device_lock(id->dev);
	err = id->conn ? mg_cm_notify(id->conn, mg_now()) : EINVAL;
	mg_device_unlock(id->dev);
	return mgc_err(err);
}

MGC_EXPORT int rdma_disconnect(struct rdma_cm_id *ib)
{
	struct mgc_id *id;
	int err;

	MGC_FORWARD(rdma_disconnect, ib);
	id = mgc_id(ib);
	if (!id->conn)
		return mgc_err(EINVAL);
	err = mgc_qp_error(id);
	if (err)
		return mgc_err(err);
	mg_device_lock(id->dev);
	if (mg_cm_send_dreq(id->conn, mg_now())) /* the peer was first, or there is nothing to end */
		mg_cm_send_drep(id->conn, mg_now());
	mg_net_flush(id->dev, 0);
	mg_device_unlock(id->dev);
	return mgc_complete(id);
}
