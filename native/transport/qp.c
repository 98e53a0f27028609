/* SPDX-License-Identifier: BSD-3-Clause */
/* qp.c - queue pairs: creation, state transitions, error and flush, timers. */
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
		if (*qpn > 1 && !mg_idtab_get(&e->qps, *qpn))
			return 0;
	}
	return ENOMEM;
}

int mg_qp_create(struct mg_pd *pd, struct mg_cq *send_cq, struct mg_cq *recv_cq,
		 struct ibv_qp_init_attr_ex *attr, void *owner, struct mg_qp **out)
{
	struct mg_engine *e = pd->e;
	struct mg_qp *qp;
	int err;

	if (attr->qp_type != IBV_QPT_RC || attr->srq)
		return EOPNOTSUPP;
	if (!send_cq || !recv_cq)
		return EINVAL;
	if (attr->cap.max_send_wr > MG_MAX_QP_WR || attr->cap.max_recv_wr > MG_MAX_QP_WR ||
	    attr->cap.max_send_sge > MG_MAX_SGE || attr->cap.max_recv_sge > MG_MAX_SGE ||
	    attr->cap.max_inline_data > MG_MAX_INLINE)
		return EINVAL;
	qp = calloc(1, sizeof(*qp));
	if (!qp)
		return ENOMEM;
	*qp = (struct mg_qp){.e = e,
			     .pd = pd,
			     .send_cq = send_cq,
			     .recv_cq = recv_cq,
			     .owner = owner,
			     .state = IBV_QPS_RESET,
			     .type = attr->qp_type,
			     .cap = attr->cap,
			     .sq_sig_all = attr->sq_sig_all,
			     .timer = MG_NEVER,
			     .local = e->cfg.addr};
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
	pd->refs++;
	send_cq->refs++;
	recv_cq->refs++;
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

int mg_qp_destroy(struct mg_qp *qp)
{
	struct mg_engine *e = qp->e;

	unready(qp);
	mg_heap_remove(qp);
	mg_idtab_del(&e->qps, qp->qpn);
	qp->pd->refs--;
	qp->send_cq->refs--;
	qp->recv_cq->refs--;
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

/* ---- transitions (IBA 11.2.5.2, table 91; as ibv_modify_qp(3) lists them for RC) ---------- */

#define INIT_MASK (IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS)
#define RTR_MASK                                                                                     \
	(IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC | \
	 IBV_QP_MIN_RNR_TIMER)
#define RTS_MASK \
	(IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC)
#define ALT_MASK (IBV_QP_ALT_PATH | IBV_QP_PATH_MIG_STATE)
#define LIVE_MASK (IBV_QP_CUR_STATE | IBV_QP_ACCESS_FLAGS | IBV_QP_MIN_RNR_TIMER | ALT_MASK)

static const struct transition {
	enum ibv_qp_state from, to;
	int required, optional;
} transitions[] = {
	{IBV_QPS_RESET, IBV_QPS_INIT, INIT_MASK, 0},
	{IBV_QPS_INIT, IBV_QPS_INIT, 0, INIT_MASK},
	{IBV_QPS_INIT, IBV_QPS_RTR, RTR_MASK, IBV_QP_ACCESS_FLAGS | IBV_QP_PKEY_INDEX | ALT_MASK},
	{IBV_QPS_RTR, IBV_QPS_RTS, RTS_MASK, LIVE_MASK},
	{IBV_QPS_RTS, IBV_QPS_RTS, 0, LIVE_MASK},
	{IBV_QPS_RTS, IBV_QPS_SQD, 0, IBV_QP_EN_SQD_ASYNC_NOTIFY},
	{IBV_QPS_SQD, IBV_QPS_RTS, 0, LIVE_MASK},
	{IBV_QPS_SQD, IBV_QPS_SQD, 0,
	 LIVE_MASK | IBV_QP_PKEY_INDEX | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_AV |
		 IBV_QP_MAX_QP_RD_ATOMIC | IBV_QP_MAX_DEST_RD_ATOMIC},
};

static int check_transition(enum ibv_qp_state from, enum ibv_qp_state to, int mask)
{
	mask &= ~IBV_QP_STATE;
	if (to == IBV_QPS_RESET || to == IBV_QPS_ERR)
		return mask & ~IBV_QP_CUR_STATE ? EINVAL : 0;
	for (size_t i = 0; i < sizeof(transitions) / sizeof(*transitions); i++) {
		const struct transition *t = &transitions[i];

		if (t->from == from && t->to == to)
			return (mask & t->required) != t->required || mask & ~(t->required | t->optional)
				       ? EINVAL
				       : 0;
	}
	return EINVAL;
}

static int check_attr(const struct mg_qp *qp, const struct ibv_qp_attr *a, int mask)
{
	struct mg_engine *e = qp->e;

	if (mask & IBV_QP_PKEY_INDEX && a->pkey_index != 0)
		return EINVAL;
	if (mask & IBV_QP_PORT && a->port_num != 1)
		return EINVAL;
	if (mask & IBV_QP_PATH_MTU && (a->path_mtu < IBV_MTU_256 || a->path_mtu > IBV_MTU_4096 ||
				       (128u << a->path_mtu) > e->cfg.max_path_mtu))
		return EINVAL;
	/* RoCE routes by GID: there is always a GRH, and its address family must be ours. */
	if (mask & IBV_QP_AV &&
	    (!a->ah_attr.is_global || mg_gid_is_v4(a->ah_attr.grh.dgid.raw) != mg_gid_is_v4(e->cfg.addr.gid)))
		return EINVAL;
	if (mask & IBV_QP_DEST_QPN && (a->dest_qp_num < 2 || a->dest_qp_num > MG_QPN_MASK))
		return EINVAL;
	if (mask & IBV_QP_MAX_QP_RD_ATOMIC && a->max_rd_atomic > MG_MAX_RD_ATOMIC)
		return EINVAL;
	if (mask & IBV_QP_MAX_DEST_RD_ATOMIC && a->max_dest_rd_atomic > MG_MAX_RD_ATOMIC)
		return EINVAL;
	if (mask & IBV_QP_MIN_RNR_TIMER && a->min_rnr_timer > 31)
		return EINVAL;
	if ((mask & IBV_QP_TIMEOUT && a->timeout > 31) || (mask & IBV_QP_RETRY_CNT && a->retry_cnt > 7) ||
	    (mask & IBV_QP_RNR_RETRY && a->rnr_retry > 7))
		return EINVAL;
	if (mask & ALT_MASK) /* no automatic path migration, as rxe */
		return mask & IBV_QP_ALT_PATH ? EINVAL : 0;
	return 0;
}

/* rxe's source port for a flow: the captures show it, ECMP and RSS spread by it. */
static uint16_t flow_sport(uint32_t a, uint32_t b)
{
	uint64_t fl = (uint64_t)a * b;

	fl ^= fl >> 20;
	fl ^= fl >> 40;
	fl &= 0xfffff;
	return (uint16_t)(0xc000 | ((fl & 0x3fff) ^ (fl >> 14)));
}

static int set_reads(struct mg_qp *qp, uint32_t n)
{
	uint64_t *reads = realloc(qp->req.reads, (n ? n : 1) * sizeof(*reads));

	if (!reads)
		return ENOMEM;
	qp->req.reads = reads;
	qp->req.n_reads = n;
	qp->req.read_head = qp->req.read_fill = 0;
	return 0;
}

static int apply_attr(struct mg_qp *qp, const struct ibv_qp_attr *a, int mask)
{
	struct ibv_qp_attr *q = &qp->attr;
	int err;

	if (mask & IBV_QP_MAX_DEST_RD_ATOMIC) {
		err = mg_resp_resources(qp, a->max_dest_rd_atomic);
		if (err)
			return err;
		q->max_dest_rd_atomic = a->max_dest_rd_atomic;
	}
	if (mask & IBV_QP_MAX_QP_RD_ATOMIC) {
		err = set_reads(qp, a->max_rd_atomic);
		if (err)
			return err;
		q->max_rd_atomic = a->max_rd_atomic;
	}
	if (mask & IBV_QP_PKEY_INDEX)
		q->pkey_index = a->pkey_index;
	if (mask & IBV_QP_PORT)
		q->port_num = a->port_num;
	if (mask & IBV_QP_ACCESS_FLAGS)
		qp->access = q->qp_access_flags = a->qp_access_flags;
	if (mask & IBV_QP_PATH_MTU) {
		q->path_mtu = a->path_mtu;
		qp->mtu = 128u << a->path_mtu;
		qp->req.read_chunk = 262144u / qp->mtu;
	}
	if (mask & IBV_QP_AV) {
		q->ah_attr = a->ah_attr;
		memcpy(qp->peer.gid, a->ah_attr.grh.dgid.raw, 16);
	}
	if (mask & IBV_QP_DEST_QPN) {
		q->dest_qp_num = qp->peer_qpn = a->dest_qp_num;
		qp->sport = flow_sport(qp->qpn, qp->peer_qpn);
	}
	if (mask & IBV_QP_RQ_PSN) {
		q->rq_psn = a->rq_psn & MG_PSN_MASK;
		qp->resp.epsn = q->rq_psn;
	}
	if (mask & IBV_QP_SQ_PSN) {
		q->sq_psn = a->sq_psn & MG_PSN_MASK;
		/* Far from zero, so that extending a PSN just below the first never wraps. */
		qp->req.una = qp->req.snd = qp->req.max = qp->req.end = (1ull << 32) + q->sq_psn;
	}
	if (mask & IBV_QP_MIN_RNR_TIMER)
		q->min_rnr_timer = a->min_rnr_timer;
	if (mask & IBV_QP_TIMEOUT)
		q->timeout = a->timeout;
	if (mask & IBV_QP_RETRY_CNT)
		q->retry_cnt = qp->req.retry_left = a->retry_cnt;
	if (mask & IBV_QP_RNR_RETRY)
		q->rnr_retry = qp->req.rnr_left = a->rnr_retry;
	if (mask & IBV_QP_EN_SQD_ASYNC_NOTIFY)
		qp->sqd_notify = a->en_sqd_async_notify;
	return 0;
}

static void reset(struct mg_qp *qp)
{
	unready(qp);
	mg_heap_remove(qp);
	mg_req_reset(qp);
	mg_resp_reset(qp);
	qp->rq.head = qp->rq.tail = 0;
	qp->attr = (struct ibv_qp_attr){0};
	qp->state = IBV_QPS_RESET;
	/* The token stays with the number: a peer that learned it may still hold it. */
	struct mg_migration fresh = {
		.announce_at = MG_NEVER, .token_at = MG_NEVER, .resume_at = MG_NEVER, .probe_at = MG_NEVER};
	memcpy(fresh.token, qp->mig.token, sizeof(fresh.token));
	qp->mig = fresh;
}

int mg_qp_modify(struct mg_qp *qp, mg_time now, const struct ibv_qp_attr *attr, int mask)
{
	enum ibv_qp_state from = qp->state, to = mask & IBV_QP_STATE ? attr->qp_state : from;
	int err;

	if (mask & IBV_QP_CUR_STATE && attr->cur_qp_state != from)
		return EINVAL;
	err = check_transition(from, to, mask);
	if (!err)
		err = check_attr(qp, attr, mask);
	if (!err)
		err = apply_attr(qp, attr, mask);
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
	if (from == IBV_QPS_INIT && to == IBV_QPS_RTR)
		mg_mig_connected(qp, now);
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
	uint8_t nak = qp->resp.nak;

	if (qp->state == IBV_QPS_ERR)
		return;
	qp->state = IBV_QPS_ERR;
	mg_heap_remove(qp);
	mg_req_flush(qp);
	mg_resp_flush(qp);
	if (nak) { /* the peer is still told why */
		qp->resp.nak = nak;
		mg_qp_ready(qp);
	}
}

void mg_qp_fatal(struct mg_qp *qp, enum ibv_event_type event)
{
	if (qp->state == IBV_QPS_ERR)
		return;
	mg_qp_error(qp);
	qp->e->ops->async_event(qp->e->arg, event, qp);
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
	*h = (struct mg_hdrs){.opcode = opcode,
			      .capable = true,
			      .pkey = MG_PKEY_DEFAULT,
			      .dest_qpn = qp->peer_qpn,
			      .psn = psn & MG_PSN_MASK};
}

void mg_pkt_finish(struct mg_qp *qp, struct mg_pkt *p, struct mg_hdrs *h, uint32_t n)
{
	struct mg_engine *e = qp->e;

	h->pad = (uint8_t)(-n & 3u);
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
		for (unsigned i = 0; i < p->n_iov; i++) {
			memcpy(p->hdr + p->hdr_len, p->iov[i].iov_base, p->iov[i].iov_len);
			p->hdr_len = (uint16_t)(p->hdr_len + p->iov[i].iov_len);
		}
		p->n_iov = 0;
	}
	qp->tx_packets++;
	qp->tx_bytes += n;
	e->counters[MG_CNT_TX_PACKETS]++;
	e->counters[MG_CNT_TX_BYTES] += n;
}
