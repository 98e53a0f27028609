/* SPDX-License-Identifier: BSD-3-Clause */
/* ep.c - endpoints: ids made from an rdma_addrinfo in one go, and requests taken synchronously. */
#include "rdmacm/mgc.h"

#include <stdlib.h>

#define RESOLVE_MS 2000

static int keep_passive(struct mgc_id *id, struct rdma_addrinfo *res, struct ibv_pd *pd,
			struct ibv_qp_init_attr *attr)
{
	if (rdma_bind_addr(&id->ib, res->ai_src_addr))
		return -1;
	if (attr) {
		id->ep_attr = malloc(sizeof(*attr));
		if (!id->ep_attr)
			return mgc_err(ENOMEM);
		*id->ep_attr = *attr;
		id->ep_attr->qp_type = res->ai_qp_type;
	}
	if (pd)
		id->ib.pd = pd;
	return 0;
}

static int go_active(struct mgc_id *id, struct rdma_addrinfo *res, struct ibv_pd *pd,
		     struct ibv_qp_init_attr *attr)
{
	if (rdma_resolve_addr(&id->ib, res->ai_src_addr, res->ai_dst_addr, RESOLVE_MS) ||
	    rdma_resolve_route(&id->ib, RESOLVE_MS))
		return -1;
	if (attr) {
		attr->qp_type = res->ai_qp_type;
		if (rdma_create_qp(&id->ib, pd, attr))
			return -1;
	}
	if (res->ai_connect_len) {
		id->ep_private = malloc(res->ai_connect_len);
		if (!id->ep_private)
			return mgc_err(ENOMEM);
		memcpy(id->ep_private, res->ai_connect, res->ai_connect_len);
		id->ep_private_len = res->ai_connect_len;
	}
	return 0;
}

MGC_EXPORT int rdma_create_ep(struct rdma_cm_id **out, struct rdma_addrinfo *res, struct ibv_pd *pd,
			      struct ibv_qp_init_attr *attr)
{
	struct mgc_id *id;
	int ret, err;

	MGC_FORWARD(rdma_create_ep, out, res, pd, attr);
	if (res->ai_port_space != RDMA_PS_TCP && res->ai_port_space != RDMA_PS_UDP)
		return mgc_err(EPROTONOSUPPORT);
	id = mgc_new(NULL, NULL, res->ai_port_space, res->ai_qp_type);
	if (!id)
		return -1;
	ret = res->ai_flags & RAI_PASSIVE ? keep_passive(id, res, pd, attr) : go_active(id, res, pd, attr);
	if (ret) {
		err = errno;
		rdma_destroy_ep(&id->ib);
		return mgc_err(err);
	}
	*out = &id->ib;
	return 0;
}

MGC_EXPORT void rdma_destroy_ep(struct rdma_cm_id *ib)
{
	MGC_FORWARD_V(rdma_destroy_ep, ib);
	if (ib->qp)
		rdma_destroy_qp(ib);
	if (ib->srq)
		rdma_destroy_srq(ib);
	rdma_destroy_id(ib);
}

MGC_EXPORT int rdma_get_request(struct rdma_cm_id *listen, struct rdma_cm_id **out)
{
	struct rdma_cm_event *ev;
	struct mgc_id *l;
	int err;

	MGC_FORWARD(rdma_get_request, listen, out);
	l = mgc_id(listen);
	if (!l->lib.sync)
		return mgc_err(EINVAL);
	if (listen->event) {
		rdma_ack_cm_event(listen->event);
		listen->event = NULL;
	}
	if (rdma_get_cm_event(listen->channel, &ev))
		return -1;
	err = ev->status ? abs(ev->status) : ev->event != RDMA_CM_EVENT_CONNECT_REQUEST ? EINVAL : 0;
	if (!err && l->ep_attr) {
		struct ibv_qp_init_attr attr = *l->ep_attr;

		if (rdma_create_qp(ev->id, listen->pd, &attr))
			err = errno;
	}
	if (err) {
		struct rdma_cm_id *child = ev->event == RDMA_CM_EVENT_CONNECT_REQUEST ? ev->id : NULL;

		rdma_ack_cm_event(ev);
		if (child)
			rdma_destroy_id(child);
		return mgc_err(err);
	}
	*out = ev->id;
	(*out)->event = ev;
	return 0;
}
