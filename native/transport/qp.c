/* SPDX-License-Identifier: BSD-3-Clause */
/* qp.c - queue pairs: creation, states, error and flush, timers. */
#include "transport/internal.h"

#include <errno.h>
#include <stdlib.h>

static uint32_t pow2_at_least(uint32_t n)
{
	uint32_t p = 1;

	while (p < n)
		p *= 2;
	return p;
}

static int alloc_queues(struct mg_qp *qp)
{
	size_t data = qp->cap.max_send_sge * sizeof(struct ibv_sge);

	if (data < qp->cap.max_inline_data)
		data = qp->cap.max_inline_data;
	qp->sq_size = pow2_at_least(qp->cap.max_send_wr ? qp->cap.max_send_wr : 1);
	if (qp->type == IBV_QPT_UD)
		data += sizeof(struct mg_ud_dest) + 15;
	qp->sq_stride =
		(uint32_t)((offsetof(struct mg_swqe, u) + data + sizeof(struct ibv_sge) + 15) & ~15ul);
	qp->sq = calloc(qp->sq_size, qp->sq_stride);
	qp->taken = mg_rwqe_alloc();
	if (!qp->sq || !qp->taken)
		return ENOMEM;
	return mg_rq_init(&qp->rq, qp->cap.max_recv_wr, qp->cap.max_recv_sge);
}

static void free_queues(struct mg_qp *qp)
{
	free(qp->sq);
	free(qp->taken);
	mg_rq_free(&qp->rq);
}

static int draw_qpn(struct mg_engine *e, uint32_t *qpn)
{
	/* Drawn at random so that numbers cannot be guessed; give up when the range is nearly full. */
	for (int tries = 0; tries < 1000; tries++) {
		uint32_t r;

		e->ops->random(e->arg, &r, sizeof(r));
		*qpn = e->cfg.qpn_base + r % e->cfg.qpn_count;
		if (*qpn > 1 && *qpn != MG_QPN_MULTICAST && !mg_idtab_get(&e->qps, *qpn))
			return 0;
	}
	return ENOMEM;
}

static uint8_t service(enum ibv_qp_type type)
{
	switch (type) {
	case IBV_QPT_UC: return MG_SVC_UC;
	case IBV_QPT_UD: return MG_SVC_UD;
	case IBV_QPT_XRC_SEND:
	case IBV_QPT_XRC_RECV: return MG_SVC_XRC;
	default: return MG_SVC_RC;
	}
}

/* Which parts a type is made of; those it does not use are left out of *q. */
static int check_parts(const struct mg_qp_parts *p, enum ibv_qp_type type, struct mg_qp_parts *q)
{
	*q = *p;
	switch (type) {
	case IBV_QPT_RC:
	case IBV_QPT_UC:
	case IBV_QPT_UD:
		q->xrcd = NULL;
		return p->pd && p->send_cq && p->recv_cq && !(p->srq && p->srq->xrcd) ? 0 : EINVAL;
	case IBV_QPT_XRC_SEND:
		*q = (struct mg_qp_parts){.pd = p->pd, .send_cq = p->send_cq};
		return p->pd && p->send_cq ? 0 : EINVAL;
	case IBV_QPT_XRC_RECV: *q = (struct mg_qp_parts){.xrcd = p->xrcd}; return p->xrcd ? 0 : EINVAL;
	default: return EOPNOTSUPP;
	}
}

/*
 * Queues that a type does not have are not looked at, and granted as nothing. Inline data may fill the room of
 * a request's scatter/gather elements, asked for or not: so it is with rxe, and programs rely on it (rdma_xclient).
 */
static int check_caps(const struct mg_qp_parts *q, struct ibv_qp_cap *cap)
{
	if (!q->send_cq)
		cap->max_send_wr = cap->max_send_sge = cap->max_inline_data = 0;
	if (!q->recv_cq || q->srq)
		cap->max_recv_wr = cap->max_recv_sge = 0;
	if (cap->max_send_sge <= MG_MAX_SGE &&
	    cap->max_inline_data < cap->max_send_sge * sizeof(struct ibv_sge))
		cap->max_inline_data = (uint32_t)(cap->max_send_sge * sizeof(struct ibv_sge));
	return cap->max_send_wr > MG_MAX_QP_WR || cap->max_recv_wr > MG_MAX_QP_WR ||
			       cap->max_send_sge > MG_MAX_SGE || cap->max_recv_sge > MG_MAX_SGE ||
			       cap->max_inline_data > MG_MAX_INLINE
		       ? EINVAL
		       : 0;
}

/* Count `by` (1 or -1) users more of all that the QP is made of. */
static void count_refs(struct mg_qp *qp, uint32_t by)
{
	if (qp->xrcd)
		qp->xrcd->refs += by;
	else
		qp->pd->refs += by;
	if (qp->send_cq)
		qp->send_cq->refs += by;
	if (qp->recv_cq)
		qp->recv_cq->refs += by;
	if (qp->srq)
		qp->srq->refs += by;
}

int mg_qp_create(struct mg_engine *e, const struct mg_qp_parts *parts, struct ibv_qp_init_attr_ex *attr,
		 void *owner, struct mg_qp **out)
{
	struct mg_qp_parts p;
	struct mg_qp *qp;
	int err;

	err = check_parts(parts, attr->qp_type, &p);
	if (!err)
		err = check_caps(&p, &attr->cap);
	if (err)
		return err;
	qp = calloc(1, sizeof(*qp));
	if (!qp)
		return ENOMEM;
	*qp = (struct mg_qp){.e = e,
			     .pd = p.pd,
			     .send_cq = p.send_cq,
			     .recv_cq = p.recv_cq,
			     .srq = p.srq,
			     .xrcd = p.xrcd,
			     .owner = owner,
			     .state = IBV_QPS_RESET,
			     .type = attr->qp_type,
			     .svc = service(attr->qp_type),
			     .cap = attr->cap,
			     .sq_sig_all = attr->sq_sig_all,
			     .timer = MG_NEVER,
			     .local = e->cfg.addr,
			     .sgid_index = MG_GID_MAIN};
	err = alloc_queues(qp);
	if (!err)
		err = mg_heap_reserve(e, e->qps.used + 1);
	if (!err)
		err = draw_qpn(e, &qp->qpn);
	if (!err)
		err = mg_idtab_put(&e->qps, qp->qpn, qp);
	if (err) {
		free_queues(qp);
		free(qp);
		return err;
	}
	e->ops->random(e->arg, qp->mig.token, sizeof(qp->mig.token));
	qp->mig.announce_at = qp->mig.token_at = qp->mig.resume_at = qp->mig.probe_at = MG_NEVER;
	mg_req_reset(qp);
	mg_resp_reset(qp);
	qp->block_self = attr->comp_mask & IBV_QP_INIT_ATTR_CREATE_FLAGS &&
			 attr->create_flags & IBV_QP_CREATE_BLOCK_SELF_MCAST_LB;
	count_refs(qp, 1);
	*out = qp;
	return 0;
}

static void unready(struct mg_qp *qp)
{
	if (!qp->is_ready)
		return;
	qp->ready.prev->next = qp->ready.next;
	qp->ready.next->prev = qp->ready.prev;
	qp->is_ready = false;
}

/*
 * Completions that nobody has fetched go with what they tell of. IBA leaves it open, rdma_rxe keeps them; the
 * drivers of hardware (mlx5, mlx4, hns) take them away, and programs written there count on it: a wr_id is
 * often a pointer into what the program frees next.
 */
static void purge(struct mg_qp *qp)
{
	if (qp->send_cq)
		mg_cq_purge(qp->send_cq, qp->qpn);
	if (qp->recv_cq && qp->recv_cq != qp->send_cq)
		mg_cq_purge(qp->recv_cq, qp->qpn);
}

int mg_qp_destroy(struct mg_qp *qp)
{
	struct mg_engine *e = qp->e;

	if (qp->n_mcast)
		return EBUSY;
	unready(qp);
	purge(qp);
	mg_mw_qp_gone(qp);
	mg_heap_remove(qp);
	mg_idtab_del(&e->qps, qp->qpn);
	count_refs(qp, UINT32_MAX);
	free(qp->req.reads);
	free(qp->resp.res);
	free(qp->resp.jobs);
	free_queues(qp);
	free(qp);
	return 0;
}

uint32_t mg_qp_num(const struct mg_qp *qp)
{
	return qp->qpn;
}

void *mg_qp_owner(const struct mg_qp *qp)
{
	return qp->owner;
}

void mg_qp_set_owner(struct mg_qp *qp, void *owner)
{
	qp->owner = owner;
}

/* ---- states (what a transition may set: qp_attr.c) ------------------------------------------ */

static void reset(struct mg_qp *qp)
{
	unready(qp);
	purge(qp);
	mg_heap_remove(qp);
	mg_req_reset(qp);
	mg_resp_reset(qp);
	qp->rq.head = qp->rq.tail = 0;
	qp->attr = (struct ibv_qp_attr){0};
	qp->local = qp->e->cfg.addr;
	qp->sgid_index = MG_GID_MAIN;
	qp->overrun = false;
	qp->state = IBV_QPS_RESET;
	/* The token stays with the number: a peer that learned it may still hold it. */
	struct mg_migration fresh = {
		.announce_at = MG_NEVER, .token_at = MG_NEVER, .resume_at = MG_NEVER, .probe_at = MG_NEVER};
	memcpy(fresh.token, qp->mig.token, sizeof(fresh.token));
	qp->mig = fresh;
}

/* What the other half of an XRC connection needs may be given too: programs treat it as RC. */
static int own_half(enum ibv_qp_type type, int mask)
{
	switch (type) {
	case IBV_QPT_XRC_SEND: return mask & ~(IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
	case IBV_QPT_XRC_RECV: return mask & ~(IBV_QP_MAX_QP_RD_ATOMIC | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY);
	default: return mask;
	}
}

int mg_qp_modify(struct mg_qp *qp, mg_time now, const struct ibv_qp_attr *attr, int mask)
{
	enum ibv_qp_state from = qp->state, to = mask & IBV_QP_STATE ? attr->qp_state : from;
	int err;

	qp->e->now = now;
	mask = own_half(qp->type, mask);
	if (mask & IBV_QP_CUR_STATE && attr->cur_qp_state != from)
		return EINVAL;
	err = mg_qp_check_transition(qp->type, from, to, mask);
	if (!err)
		err = mg_qp_check_attr(qp, attr, mask);
	if (!err)
		err = mg_qp_apply_attr(qp, attr, mask);
	if (err)
		return err;
	if (to == IBV_QPS_RESET) {
		reset(qp);
		return 0;
	}
	if (to == IBV_QPS_ERR) {
		mg_qp_error(qp);
		return 0;
	}
	qp->state = to;
	if (from == IBV_QPS_INIT && to == IBV_QPS_RTR) {
		if (qp->type == IBV_QPT_UD)
			qp->mtu = qp->e->cfg.max_path_mtu;
		else
			mg_mig_connected(qp, now);
	}
	if (mg_qp_connected(qp)) {
		mg_qp_ready(qp);
		mg_qp_deadline(qp);
	}
	if (to == IBV_QPS_SQD)
		mg_comp_advance(qp); /* may be drained already */
	return 0;
}

int mg_qp_query(struct mg_qp *qp, struct ibv_qp_attr *attr, int mask, struct ibv_qp_init_attr *init)
{
	(void)mask; /* verbs let us fill more than was asked for */
	*attr = qp->attr;
	attr->qp_state = attr->cur_qp_state = qp->state;
	attr->path_mig_state = IBV_MIG_MIGRATED;
	if (attr->ah_attr.is_global)
		attr->ah_attr.grh.sgid_index = qp->sgid_index;
	attr->cap = qp->cap;
	attr->rq_psn = qp->resp.epsn;
	attr->sq_psn = (uint32_t)qp->req.end & MG_PSN_MASK;
	attr->sq_draining = qp->state == IBV_QPS_SQD && qp->req.una != qp->req.snd;
	memcpy(attr->ah_attr.grh.dgid.raw, qp->peer.gid, 16);
	if (init) {
		*init = (struct ibv_qp_init_attr){
			.cap = qp->cap, .qp_type = qp->type, .sq_sig_all = qp->sq_sig_all};
	}
	return 0;
}

/* ---- errors -------------------------------------------------------------------------------- */

void mg_qp_error(struct mg_qp *qp)
{
	if (qp->state == IBV_QPS_ERR)
		return;
	qp->state = IBV_QPS_ERR;
	mg_heap_remove(qp);
	mg_req_flush(qp);
	mg_resp_flush(qp);
	if (qp->srq && !qp->xrcd) /* the queue may lose its last QP now: no more will be taken for this one */
		qp->e->ops->async_event(qp->e->arg, IBV_EVENT_QP_LAST_WQE_REACHED, qp);
	if (qp->resp.nak)
		mg_qp_ready(qp);
}

void mg_qp_fatal(struct mg_qp *qp, enum ibv_event_type event)
{
	if (qp->state == IBV_QPS_ERR)
		return;
	mg_qp_error(qp);
	qp->e->ops->async_event(qp->e->arg, event, qp);
}

void mg_qp_overrun(struct mg_qp *qp)
{
	qp->overrun = false;
	mg_resp_last_ack(qp);
	mg_qp_fatal(qp, IBV_EVENT_QP_FATAL);
}

/* ---- timers and packets ----------------------------------------------------------------------- */

void mg_qp_deadline(struct mg_qp *qp)
{
	mg_time req, mig;

	if (qp->e->stopped || !mg_qp_connected(qp))
		return;
	req = mg_req_deadline(qp);
	mig = mg_mig_deadline(qp);
	mg_heap_wake(qp, req < mig ? req : mig);
}

void mg_qp_timer(struct mg_qp *qp, mg_time now)
{
	if (mg_qp_connected(qp))
		mg_mig_timer(qp, now);
	if (mg_qp_sends(qp))
		mg_req_timer(qp, now);
	mg_qp_deadline(qp);
}

void mg_qp_hdrs(const struct mg_qp *qp, uint8_t opcode, uint32_t psn, struct mg_hdrs *h)
{
	*h = (struct mg_hdrs){.opcode = opcode & MG_SVC_MASK ? opcode : opcode | qp->svc,
			      .capable = true,
			      .pkey = MG_PKEY_DEFAULT,
			      .dest_qpn = qp->peer_qpn,
			      .psn = psn & MG_PSN_MASK};
}

void mg_pkt_finish(struct mg_qp *qp, struct mg_pkt *p, struct mg_hdrs *h, uint32_t n)
{
	struct mg_engine *e = qp->e;

	h->pad = (uint8_t)(-n & 3u);
	p->qpn = qp->qpn;
	p->src = qp->local;
	p->dst = qp->peer;
	p->sport = qp->sport;
	p->tclass = qp->attr.ah_attr.grh.traffic_class;
	p->hop_limit = qp->attr.ah_attr.grh.hop_limit ? qp->attr.ah_attr.grh.hop_limit : 64;
	p->pad = h->pad;
	p->hdr_len = (uint16_t)mg_hdrs_build(h, p->hdr);
	p->len = p->hdr_len + n + p->pad + MG_ICRC_LEN;
	/* Small payloads are copied: cheaper than an iovec each, and they cannot change between the
	 * ICRC and the kernel's copy (a counter that a peer polls by READ). */
	if (n && n <= MG_PKT_COPY) {
		uint32_t len = p->hdr_len;
		unsigned i;

		for (i = 0; i < p->n_iov; i++) {
			if (!mg_copy(e, p->hdr + len, p->iov[i].iov_base, p->iov[i].iov_len))
				break; /* the caller will find out, too, and say so (mg_tx_fault) */
			len += (uint32_t)p->iov[i].iov_len;
		}
		if (i == p->n_iov) {
			p->hdr_len = (uint16_t)len;
			p->n_iov = 0;
		}
	}
	qp->tx_packets++;
	qp->tx_bytes += n;
	e->counters[MG_CNT_TX_PACKETS]++;
	e->counters[MG_CNT_TX_BYTES] += n;
}
