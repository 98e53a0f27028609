/* SPDX-License-Identifier: BSD-3-Clause */
/* qp.c - the id's QP: made, brought from state to state, destroyed; its SRQ and the CQs nobody gave. */
#include "rdmacm/mgc.h"

#include <infiniband/verbs.h>

#define UD_SQ_PSN 0u

/* ---- attributes of each state ------------------------------------------------------------------------------- */

static void init_attr(const struct mgc_id *id, struct ibv_qp_attr *a, int *mask)
{
	a->pkey_index = 0;
	a->port_num = 1;
	*mask = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT;
	if (mgc_is_ud(id)) {
		a->qkey = RDMA_UDP_QKEY;
		*mask |= IBV_QP_QKEY;
		return;
	}
	/* Before a connection nothing is open to the peer. */
	a->qp_access_flags = 0;
	if (id->state >= MGC_CONNECT && id->state != MGC_LISTEN) {
		a->qp_access_flags = IBV_ACCESS_REMOTE_WRITE;
		if (id->responder_resources)
			a->qp_access_flags |= IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC;
	}
	*mask |= IBV_QP_ACCESS_FLAGS;
}

static bool is_uc(const struct mgc_id *id)
{
	return id->req.service_type == 1;
}

static const struct mg_cm_msg *peers_message(const struct mgc_id *id)
{
	return id->passive ? &id->req : &id->rep;
}

/* What the peer's message says, within what we have asked for and can: a reply may say more. */
static uint8_t agreed(const struct mgc_id *id, uint8_t told, uint8_t asked)
{
	uint8_t most = id->passive ? MG_MAX_RD_ATOMIC : asked;

	return told < most ? told : most;
}

/* A message's Starting PSN is where its *recipient* begins to send (IBA 12.7.31). */
static void rtr_attr(const struct mgc_id *id, struct ibv_qp_attr *a, int *mask)
{
	const struct mg_cm_msg *peer = peers_message(id);
	struct mg_port port;
	unsigned mtu;

	mg_device_port(id->dev, &port);
	mtu = (unsigned)__builtin_ctz(port.active_mtu) - 7u;
	if (id->req.path_mtu && id->req.path_mtu < mtu)
		mtu = id->req.path_mtu;
	a->path_mtu = (enum ibv_mtu)mtu;
	a->dest_qp_num = peer->qpn;
	a->rq_psn = id->psn;
	a->ah_attr = (struct ibv_ah_attr){.is_global = 1, .port_num = 1};
	a->ah_attr.grh.hop_limit = 64;
	a->ah_attr.grh.traffic_class = id->tos ? id->tos : id->req.primary.tclass;
	if (id->conn)
		a->ah_attr.grh.sgid_index = (uint8_t)mgc_gid_index(id->dev, &id->conn->local);
	if (id->conn)
		memcpy(a->ah_attr.grh.dgid.raw, id->conn->peer.gid, 16);
	*mask = IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN;
	if (is_uc(id))
		return;
	a->max_dest_rd_atomic = agreed(id, id->responder_resources, id->req.responder_resources);
	a->min_rnr_timer = 0; /* 655 ms, as the kernel has it */
	*mask |= IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER;
}

static void rts_attr(const struct mgc_id *id, struct ibv_qp_attr *a, int *mask)
{
	a->sq_psn = peers_message(id)->psn;
	*mask = IBV_QP_STATE | IBV_QP_SQ_PSN;
	if (is_uc(id))
		return;
	a->timeout = id->req.primary.ack_timeout;
	a->retry_cnt = id->req.retry_count;
	a->rnr_retry = id->passive ? id->req.rnr_retry_count : id->rep.rnr_retry_count;
	a->max_rd_atomic = agreed(id, id->initiator_depth, id->req.initiator_depth);
	*mask |= IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC;
}

MGC_EXPORT int rdma_init_qp_attr(struct rdma_cm_id *ib, struct ibv_qp_attr *attr, int *mask)
{
	struct mgc_id *id;

	MGC_FORWARD(rdma_init_qp_attr, ib, attr, mask);
	id = mgc_id(ib);
	if (!ib->verbs || !attr || !mask)
		return mgc_err(EINVAL);
	if (mgc_is_ud(id)) {
		init_attr(id, attr, mask);
		return 0;
	}
	switch (attr->qp_state) {
	case IBV_QPS_INIT: init_attr(id, attr, mask); return 0;
	case IBV_QPS_RTR:
		if (id->state < MGC_CONNECT || id->state == MGC_LISTEN)
			return mgc_err(EINVAL);
		rtr_attr(id, attr, mask);
		return 0;
	case IBV_QPS_RTS:
		if (id->state < MGC_CONNECT || id->state == MGC_LISTEN)
			return mgc_err(EINVAL);
		rts_attr(id, attr, mask);
		return 0;
	default: return mgc_err(EINVAL);
	}
}

/* ---- transitions ---------------------------------------------------------------------------------------------- */

static int step(struct mgc_id *id, enum ibv_qp_state to)
{
	struct ibv_qp_attr a = {.qp_state = to};
	int mask = 0;

	if (to == IBV_QPS_INIT)
		init_attr(id, &a, &mask);
	else if (to == IBV_QPS_RTR)
		rtr_attr(id, &a, &mask);
	else
		rts_attr(id, &a, &mask);
	return ibv_modify_qp(id->ib.qp, &a, mask);
}

int mgc_qp_to_rts(struct mgc_id *id)
{
	int err = step(id, IBV_QPS_INIT); /* once more: now it is known what the peer may do */

	if (!err)
		err = step(id, IBV_QPS_RTR);
	return err ? err : step(id, IBV_QPS_RTS);
}

int mgc_qp_error(struct mgc_id *id)
{
	struct ibv_qp_attr a = {.qp_state = IBV_QPS_ERR};

	if (!id->ib.qp || mgc_is_ud(id))
		return 0;
	/* Acknowledgements that are held back are still owed. */
	mg_device_lock(id->dev);
	mg_net_flush(id->dev, 0);
	mg_device_unlock(id->dev);
	return ibv_modify_qp(id->ib.qp, &a, IBV_QP_STATE);
}

static int init_ud(struct ibv_qp *qp)
{
	struct ibv_qp_attr a = {.qp_state = IBV_QPS_INIT, .port_num = 1, .qkey = RDMA_UDP_QKEY};
	int err = ibv_modify_qp(qp, &a, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_QKEY);

	a.qp_state = IBV_QPS_RTR;
	if (!err)
		err = ibv_modify_qp(qp, &a, IBV_QP_STATE);
	a.qp_state = IBV_QPS_RTS;
	a.sq_psn = UD_SQ_PSN;
	return err ? err : ibv_modify_qp(qp, &a, IBV_QP_STATE | IBV_QP_SQ_PSN);
}

/* ---- CQs that the program did not give ---------------------------------------------------------------------------- */

static int make_cq(struct mgc_id *id, uint32_t depth, struct ibv_comp_channel **channel, struct ibv_cq **cq)
{
	*channel = ibv_create_comp_channel(id->ib.verbs);
	if (!*channel)
		return errno;
	*cq = ibv_create_cq(id->ib.verbs, depth ? (int)depth : 1, &id->ib, *channel, 0);
	if (*cq)
		return 0;
	ibv_destroy_comp_channel(*channel);
	*channel = NULL;
	return errno;
}

void mgc_free_cqs(struct mgc_id *id)
{
	struct rdma_cm_id *ib = &id->ib;

	if (id->own_recv_cq) {
		ibv_destroy_cq(ib->recv_cq);
		ibv_destroy_comp_channel(ib->recv_cq_channel);
		ib->recv_cq = NULL;
		ib->recv_cq_channel = NULL;
		id->own_recv_cq = false;
	}
	if (id->own_send_cq) {
		ibv_destroy_cq(ib->send_cq);
		ibv_destroy_comp_channel(ib->send_cq_channel);
		ib->send_cq = NULL;
		ib->send_cq_channel = NULL;
		id->own_send_cq = false;
	}
}

static int need_cqs(struct mgc_id *id, struct ibv_qp_init_attr_ex *a)
{
	int err = 0;

	if (!a->recv_cq && !id->ib.recv_cq) {
		err = make_cq(id, a->cap.max_recv_wr, &id->ib.recv_cq_channel, &id->ib.recv_cq);
		id->own_recv_cq = !err;
	}
	if (!err && !a->send_cq && !id->ib.send_cq) {
		err = make_cq(id, a->cap.max_send_wr, &id->ib.send_cq_channel, &id->ib.send_cq);
		id->own_send_cq = !err;
	}
	if (!a->recv_cq)
		a->recv_cq = id->ib.recv_cq;
	if (!a->send_cq)
		a->send_cq = id->ib.send_cq;
	return err;
}

/* ---- create and destroy ------------------------------------------------------------------------------------------- */

MGC_EXPORT int rdma_create_qp_ex(struct rdma_cm_id *ib, struct ibv_qp_init_attr_ex *attr)
{
	struct ibv_qp *qp = NULL;
	struct mgc_id *id;
	int err;

	MGC_FORWARD(rdma_create_qp_ex, ib, attr);
	id = mgc_id(ib);
	if (!ib->verbs || ib->qp || !attr)
		return mgc_err(EINVAL);
	if (!(attr->comp_mask & IBV_QP_INIT_ATTR_PD)) {
		attr->comp_mask |= IBV_QP_INIT_ATTR_PD;
		attr->pd = ib->pd;
	}
	if (!attr->pd || attr->pd->context != ib->verbs || (attr->qp_type == IBV_QPT_UD) != mgc_is_ud(id))
		return mgc_err(EINVAL);
	err = need_cqs(id, attr);
	if (!err) {
		if (!attr->srq)
			attr->srq = ib->srq;
		qp = ibv_create_qp_ex(ib->verbs, attr);
		err = qp ? 0 : errno;
	}
	if (!err) {
		struct ibv_qp_attr a = {.qp_state = IBV_QPS_INIT};
		int mask;

		init_attr(id, &a, &mask);
		err = mgc_is_ud(id) ? init_ud(qp) : ibv_modify_qp(qp, &a, mask);
	}
	if (err) {
		if (qp)
			ibv_destroy_qp(qp);
		mgc_free_cqs(id);
		return mgc_err(err);
	}
	ib->pd = attr->pd;
	ib->qp = qp;
	return 0;
}

MGC_EXPORT int rdma_create_qp(struct rdma_cm_id *ib, struct ibv_pd *pd, struct ibv_qp_init_attr *attr)
{
	struct ibv_qp_init_attr_ex ex = {0};
	int ret;

	MGC_FORWARD(rdma_create_qp, ib, pd, attr);
	if (!attr)
		return mgc_err(EINVAL);
	memcpy(&ex, attr, sizeof(*attr)); /* the extended one starts like it */
	if (pd) {
		ex.comp_mask = IBV_QP_INIT_ATTR_PD;
		ex.pd = pd;
	}
	ret = rdma_create_qp_ex(ib, &ex);
	if (!ret)
		memcpy(attr, &ex, sizeof(*attr));
	return ret;
}

MGC_EXPORT void rdma_destroy_qp(struct rdma_cm_id *ib)
{
	MGC_FORWARD_V(rdma_destroy_qp, ib);
	if (ib->qp)
		ibv_destroy_qp(ib->qp);
	ib->qp = NULL;
	mgc_free_cqs(mgc_id(ib));
}

MGC_EXPORT int rdma_create_srq_ex(struct rdma_cm_id *ib, struct ibv_srq_init_attr_ex *attr)
{
	struct ibv_srq *srq;

	MGC_FORWARD(rdma_create_srq_ex, ib, attr);
	if (!ib->verbs || ib->srq || !attr)
		return mgc_err(EINVAL);
	if (!(attr->comp_mask & IBV_SRQ_INIT_ATTR_PD)) {
		attr->comp_mask |= IBV_SRQ_INIT_ATTR_PD;
		attr->pd = ib->pd;
	}
	srq = ibv_create_srq_ex(ib->verbs, attr);
	if (!srq)
		return -1;
	if (!ib->pd)
		ib->pd = attr->pd;
	ib->srq = srq;
	return 0;
}

MGC_EXPORT int rdma_create_srq(struct rdma_cm_id *ib, struct ibv_pd *pd, struct ibv_srq_init_attr *attr)
{
	struct ibv_srq_init_attr_ex ex = {0};
	int ret;

	MGC_FORWARD(rdma_create_srq, ib, pd, attr);
	if (!attr)
		return mgc_err(EINVAL);
	memcpy(&ex, attr, sizeof(*attr)); /* the extended one starts like it */
	ex.comp_mask = IBV_SRQ_INIT_ATTR_TYPE | (pd ? IBV_SRQ_INIT_ATTR_PD : 0);
	ex.srq_type = IBV_SRQT_BASIC;
	ex.pd = pd;
	ret = rdma_create_srq_ex(ib, &ex);
	if (!ret)
		memcpy(attr, &ex, sizeof(*attr));
	return ret;
}

MGC_EXPORT void rdma_destroy_srq(struct rdma_cm_id *ib)
{
	MGC_FORWARD_V(rdma_destroy_srq, ib);
	if (ib->srq)
		ibv_destroy_srq(ib->srq);
	ib->srq = NULL;
}
