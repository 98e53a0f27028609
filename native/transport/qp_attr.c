/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * qp_attr.c - what ibv_modify_qp may set in which transition of which QP type, and setting it.
 */
#include "transport/internal.h"

#include <errno.h>
#include <stdlib.h>

/* ---- transitions (IBA 11.2.5.2, table 91; ibv_modify_qp(3); the kernel's ib_modify_qp_is_ok) ---- */

#define INIT (IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS)
#define INIT_UD (IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_QKEY)
#define CONNECT (IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN)
#define RESPOND (IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER)
#define REQUEST (IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC)
#define ALT (IBV_QP_ALT_PATH | IBV_QP_PATH_MIG_STATE)
#define LIVE (IBV_QP_CUR_STATE | IBV_QP_ACCESS_FLAGS | ALT)
#define LIVE_UD (IBV_QP_CUR_STATE | IBV_QP_QKEY)
#define MORE_RTR (IBV_QP_ACCESS_FLAGS | IBV_QP_PKEY_INDEX | IBV_QP_ALT_PATH)
#define DRAINED (IBV_QP_ACCESS_FLAGS | ALT | IBV_QP_PKEY_INDEX | IBV_QP_AV)

enum { RC, UC, UD, XRC_INI, XRC_TGT, N_TYPES };

static const struct transition {
	uint8_t from, to;		     /* enum ibv_qp_state */
	int required[N_TYPES], opt[N_TYPES]; /* enum ibv_qp_attr_mask */
} transitions[] = {
	{IBV_QPS_RESET, IBV_QPS_INIT, {INIT, INIT, INIT_UD, INIT, INIT}, {0}},
	{IBV_QPS_INIT, IBV_QPS_INIT, {0}, {INIT, INIT, INIT_UD, INIT, INIT}},
	{IBV_QPS_INIT,
	 IBV_QPS_RTR,
	 {CONNECT | RESPOND, CONNECT, 0, CONNECT, CONNECT | RESPOND},
	 {MORE_RTR, MORE_RTR, IBV_QP_PKEY_INDEX | IBV_QP_QKEY, MORE_RTR, MORE_RTR}},
	{IBV_QPS_RTR,
	 IBV_QPS_RTS,
	 {REQUEST | IBV_QP_SQ_PSN, IBV_QP_SQ_PSN, IBV_QP_SQ_PSN, REQUEST | IBV_QP_SQ_PSN,
	  IBV_QP_TIMEOUT | IBV_QP_SQ_PSN},
	 {LIVE | IBV_QP_MIN_RNR_TIMER, LIVE, LIVE_UD, LIVE, LIVE | IBV_QP_MIN_RNR_TIMER}},
	{IBV_QPS_RTS,
	 IBV_QPS_RTS,
	 {0},
	 {LIVE | IBV_QP_MIN_RNR_TIMER, LIVE, LIVE_UD, LIVE, LIVE | IBV_QP_MIN_RNR_TIMER}},
	{IBV_QPS_RTS,
	 IBV_QPS_SQD,
	 {0},
	 {IBV_QP_EN_SQD_ASYNC_NOTIFY, IBV_QP_EN_SQD_ASYNC_NOTIFY, IBV_QP_EN_SQD_ASYNC_NOTIFY,
	  IBV_QP_EN_SQD_ASYNC_NOTIFY, IBV_QP_EN_SQD_ASYNC_NOTIFY}},
	{IBV_QPS_SQD,
	 IBV_QPS_RTS,
	 {0},
	 {LIVE | IBV_QP_MIN_RNR_TIMER, LIVE, LIVE_UD, LIVE, LIVE | IBV_QP_MIN_RNR_TIMER}},
	{IBV_QPS_SQD,
	 IBV_QPS_SQD,
	 {0},
	 {[RC] = DRAINED | IBV_QP_PORT | REQUEST | RESPOND,
	  [UC] = DRAINED,
	  [UD] = IBV_QP_QKEY | IBV_QP_PKEY_INDEX,
	  [XRC_INI] = DRAINED | IBV_QP_PORT | REQUEST,
	  [XRC_TGT] = DRAINED | IBV_QP_PORT | IBV_QP_TIMEOUT | RESPOND}},
	/* Only the unacknowledged services know the send queue error state. */
	{IBV_QPS_SQE, IBV_QPS_RTS, {0}, {[UC] = IBV_QP_CUR_STATE | IBV_QP_ACCESS_FLAGS, [UD] = LIVE_UD}},
};

static int column(enum ibv_qp_type type)
{
	switch (type) {
	case IBV_QPT_UC: return UC;
	case IBV_QPT_UD: return UD;
	case IBV_QPT_XRC_SEND: return XRC_INI;
	case IBV_QPT_XRC_RECV: return XRC_TGT;
	default: return RC;
	}
}

int mg_qp_check_transition(enum ibv_qp_type type, enum ibv_qp_state from, enum ibv_qp_state to, int mask)
{
	int col = column(type);

	mask &= ~IBV_QP_STATE;
	if (to == IBV_QPS_RESET ||
	    to == IBV_QPS_ERR) /* a QP that has not begun cannot fail, says the kernel */
		return mask || (from == IBV_QPS_RESET && to == IBV_QPS_ERR) ? EINVAL : 0;
	if (from == IBV_QPS_SQE && col != UC && col != UD)
		return EINVAL;
	for (size_t i = 0; i < sizeof(transitions) / sizeof(*transitions); i++) {
		const struct transition *t = &transitions[i];

		if (t->from != from || t->to != to)
			continue;
		return (mask & t->required[col]) != t->required[col] ||
				       mask & ~(t->required[col] | t->opt[col])
			       ? EINVAL
			       : 0;
	}
	return EINVAL;
}

/* Those that libibverbs knows, of whatever effect on a QP. */
#define ACCESS_KNOWN (0x3ffu | (unsigned)IBV_ACCESS_OPTIONAL_RANGE)

/* ---- attributes ------------------------------------------------------------------------------- */

int mg_qp_check_attr(const struct mg_qp *qp, const struct ibv_qp_attr *a, int mask)
{
	struct mg_engine *e = qp->e;

	if (mask & IBV_QP_PKEY_INDEX && a->pkey_index != 0)
		return EINVAL;
	if (mask & IBV_QP_PORT && a->port_num != 1)
		return EINVAL;
	if (mask & IBV_QP_PATH_MTU && (a->path_mtu < IBV_MTU_256 || a->path_mtu > IBV_MTU_4096 ||
				       (128u << a->path_mtu) > e->cfg.max_path_mtu))
		return EINVAL;
	if (mask & IBV_QP_AV && (a->ah_attr.port_num != 1 || mg_gid_multicast(a->ah_attr.grh.dgid.raw)))
		return EINVAL;
	if (mask & IBV_QP_AV && mg_av_check(e, &a->ah_attr))
		return mg_av_check(e, &a->ah_attr);
	if (mask & IBV_QP_ACCESS_FLAGS && a->qp_access_flags & ~ACCESS_KNOWN)
		return EINVAL;
	if (mask & IBV_QP_DEST_QPN && (a->dest_qp_num < 2 || a->dest_qp_num > MG_QPN_MASK))
		return EINVAL;
	if (mask & IBV_QP_MAX_QP_RD_ATOMIC && a->max_rd_atomic > MG_MAX_RD_ATOMIC)
		return EINVAL;
	if (mask & IBV_QP_MAX_DEST_RD_ATOMIC && a->max_dest_rd_atomic > MG_MAX_RD_ATOMIC)
		return EINVAL;
	/* In SQD: not fewer than are on their way or still to be answered. */
	if ((mask & IBV_QP_MAX_QP_RD_ATOMIC && a->max_rd_atomic < qp->req.read_fill) ||
	    (mask & IBV_QP_MAX_DEST_RD_ATOMIC && a->max_dest_rd_atomic < qp->resp.job_fill))
		return EINVAL;
	if (mask & IBV_QP_MIN_RNR_TIMER && a->min_rnr_timer > 31)
		return EINVAL;
	if ((mask & IBV_QP_TIMEOUT && a->timeout > 31) || (mask & IBV_QP_RETRY_CNT && a->retry_cnt > 7) ||
	    (mask & IBV_QP_RNR_RETRY && a->rnr_retry > 7))
		return EINVAL;
	if (mask & ALT) /* no automatic path migration, as rxe */
		return mask & IBV_QP_ALT_PATH ? EINVAL : 0;
	return 0;
}

/* rxe's source port for a flow: the captures show it, ECMP and RSS spread by it. */
uint16_t mg_flow_sport(uint32_t a, uint32_t b)
{
	uint64_t fl = (uint64_t)a * b;

	fl ^= fl >> 20;
	fl ^= fl >> 40;
	fl &= 0xfffff;
	return (uint16_t)(0xc000 | ((fl & 0x3fff) ^ (fl >> 14)));
}

/* Those on their way stay. */
static int set_reads(struct mg_qp *qp, uint32_t n)
{
	struct mg_requester *r = &qp->req;
	uint64_t *reads = malloc((n ? n : 1) * sizeof(*reads));

	if (!reads)
		return ENOMEM;
	for (uint32_t i = 0; i < r->read_fill; i++)
		reads[i] = r->reads[(r->read_head + i) % r->n_reads];
	free(r->reads);
	r->reads = reads;
	r->n_reads = n;
	r->read_head = 0;
	return 0;
}

int mg_qp_apply_attr(struct mg_qp *qp, const struct ibv_qp_attr *a, int mask)
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
	if (mask & IBV_QP_QKEY)
		q->qkey = a->qkey;
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
		qp->sgid_index = a->ah_attr.grh.sgid_index;
		qp->local = *mg_gid_at(qp->e, a->ah_attr.grh.sgid_index);
	}
	if (mask & IBV_QP_DEST_QPN) {
		q->dest_qp_num = qp->peer_qpn = a->dest_qp_num;
		qp->sport = mg_flow_sport(qp->qpn, qp->peer_qpn);
	}
	if (mask & IBV_QP_RQ_PSN) {
		q->rq_psn = a->rq_psn & MG_PSN_MASK;
		qp->resp.epsn = q->rq_psn;
		qp->resp.ack_psn = (q->rq_psn - 1) & MG_PSN_MASK;
	}
	if (mask & IBV_QP_SQ_PSN) {
		q->sq_psn = a->sq_psn & MG_PSN_MASK;
		/* Far from zero, so that extending a PSN just below the first never wraps. */
		qp->req.una = qp->req.snd = qp->req.max = qp->req.end = qp->req.heard =
			(1ull << 32) + q->sq_psn;
	}
	if (mask & IBV_QP_MIN_RNR_TIMER)
		q->min_rnr_timer = a->min_rnr_timer;
	if (mask & IBV_QP_TIMEOUT)
		q->timeout = a->timeout;
	if (mask & IBV_QP_RETRY_CNT) {
		q->retry_cnt = a->retry_cnt;
		mg_req_fresh_retries(qp);
	}
	if (mask & IBV_QP_RNR_RETRY)
		q->rnr_retry = qp->req.rnr_left = a->rnr_retry;
	if (mask & IBV_QP_EN_SQD_ASYNC_NOTIFY)
		qp->sqd_notify = a->en_sqd_async_notify;
	return 0;
}
