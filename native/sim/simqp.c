/* SPDX-License-Identifier: BSD-3-Clause */
/* simqp.c - the flat API's QPs: states, attributes, work requests. */
#include "sim/sim.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define POST_MAX 64

int mgs_qp_new(struct mgs_world *w, int pd, int send_cq, int recv_cq, struct mgs_caps *caps, int sig_all)
{
	return mgs_qp_new_type(w, pd, send_cq, recv_cq, caps, sig_all, IBV_QPT_RC);
}

int mgs_qp_new_type(struct mgs_world *w, int pd, int send_cq, int recv_cq, struct mgs_caps *caps, int sig_all,
		    int type)
{
	struct sim_pd *p = SIM_GET(w, pd, pd);
	struct sim_cq *s = SIM_GET(w, cq, send_cq), *r = SIM_GET(w, cq, recv_cq);
	struct ibv_qp_init_attr_ex attr = {
		.qp_type = (enum ibv_qp_type)type,
		.sq_sig_all = sig_all,
		.cap = {caps->max_send_wr, caps->max_recv_wr, caps->max_send_sge, caps->max_recv_sge,
			caps->max_inline},
	};
	struct mg_qp_parts parts;
	struct mg_qp *qp;
	int rc, i;

	if (!p || !s || !r)
		return -EINVAL;
	parts = (struct mg_qp_parts){.pd = p->pd, .send_cq = s->cq, .recv_cq = r->cq};
	rc = mg_qp_create(w->engine[p->engine].e, &parts, &attr, NULL, &qp);
	if (rc)
		return -rc;
	*caps = (struct mgs_caps){attr.cap.max_send_wr, attr.cap.max_recv_wr, attr.cap.max_send_sge,
				  attr.cap.max_recv_sge, attr.cap.max_inline_data};
	i = SIM_SLOT(w, qp);
	w->qp[i] = (struct sim_qp){qp, p->engine};
	return i;
}

int mgs_qp_free(struct mgs_world *w, int qp)
{
	struct sim_qp *q = SIM_GET(w, qp, qp);
	int rc = q ? mg_qp_destroy(q->qp) : EINVAL;

	if (!rc) {
		q->qp = NULL;
		sim_after(&w->engine[q->engine], false);
	}
	return -rc;
}

uint32_t mgs_qp_num(struct mgs_world *w, int qp)
{
	struct sim_qp *q = SIM_GET(w, qp, qp);

	return q ? mg_qp_num(q->qp) : 0;
}

static enum ibv_mtu mtu_enum(uint32_t bytes)
{
	return bytes >= 4096   ? IBV_MTU_4096
	       : bytes >= 2048 ? IBV_MTU_2048
	       : bytes >= 1024 ? IBV_MTU_1024
	       : bytes >= 512  ? IBV_MTU_512
			       : IBV_MTU_256;
}

/* Of what RC needs, the part that the unreliable services have. */
static int mask_of(struct mg_qp *qp, int state, const struct mgs_path *path, int mask)
{
	const int rc_only = IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER | IBV_QP_TIMEOUT |
			    IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC;
	const int connected =
		IBV_QP_ACCESS_FLAGS | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN;
	struct ibv_qp_init_attr init = {0};
	struct ibv_qp_attr attr;

	if (mg_qp_query(qp, &attr, IBV_QP_STATE, &init) || !path)
		return mask;
	if (init.qp_type == IBV_QPT_UC)
		return mask & ~rc_only;
	if (init.qp_type == IBV_QPT_UD)
		return (mask & ~rc_only & ~connected) | (state == IBV_QPS_INIT ? IBV_QP_QKEY : 0);
	return mask;
}

/* The attributes each transition needs (IBA 11.2.5.2, as programs give them). */
int mgs_qp_modify(struct mgs_world *w, int qp, int state, const struct mgs_path *path)
{
	struct sim_qp *q = SIM_GET(w, qp, qp);
	struct ibv_qp_attr a = {.qp_state = (enum ibv_qp_state)state};
	int mask = IBV_QP_STATE, rc;

	if (!q)
		return -EINVAL;
	if (path && state == IBV_QPS_INIT) {
		a.port_num = 1;
		a.qp_access_flags = path->access;
		mask |= IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS;
	} else if (path && state == IBV_QPS_RTR) {
		a.path_mtu = mtu_enum(path->mtu);
		a.dest_qp_num = path->dest_qpn;
		a.rq_psn = path->rq_psn;
		a.max_dest_rd_atomic = path->max_dest_rd_atomic;
		a.min_rnr_timer = path->min_rnr_timer;
		a.ah_attr.is_global = 1;
		a.ah_attr.port_num = 1;
		a.ah_attr.grh.sgid_index = 1;
		a.ah_attr.grh.hop_limit = path->hop_limit;
		a.ah_attr.grh.traffic_class = path->tclass;
		memcpy(a.ah_attr.grh.dgid.raw, path->dgid, 16);
		mask |= IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
			IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER;
	} else if (path && state == IBV_QPS_RTS) {
		a.sq_psn = path->sq_psn;
		a.timeout = path->timeout;
		a.retry_cnt = path->retry_cnt;
		a.rnr_retry = path->rnr_retry;
		a.max_rd_atomic = path->max_rd_atomic;
		mask |= IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_SQ_PSN |
			IBV_QP_MAX_QP_RD_ATOMIC;
	} else if (path && state == IBV_QPS_SQD) { /* in it already */
		a.max_rd_atomic = path->max_rd_atomic;
		a.max_dest_rd_atomic = path->max_dest_rd_atomic;
		mask |= IBV_QP_MAX_QP_RD_ATOMIC | IBV_QP_MAX_DEST_RD_ATOMIC;
	}
	mask = mask_of(q->qp, state, path, mask);
	a.qkey = path ? path->qkey : 0;
	sim_trace(w, "modify   e%d qp%d state %d", q->engine, qp, state);
	rc = mg_qp_modify(q->qp, sim_engine_now(&w->engine[q->engine]), &a, mask);
	sim_after(&w->engine[q->engine], false);
	return -rc;
}

int mgs_qp_state(struct mgs_world *w, int qp)
{
	struct sim_qp *q = SIM_GET(w, qp, qp);
	struct ibv_qp_init_attr init;
	struct ibv_qp_attr attr = {0};
	int rc;

	if (!q)
		return -EINVAL;
	rc = mg_qp_query(q->qp, &attr, IBV_QP_STATE, &init);
	return rc ? -rc : (int)attr.qp_state;
}

int mgs_qp_query(struct mgs_world *w, int qp, struct mgs_path *path, struct mgs_caps *caps)
{
	struct sim_qp *q = SIM_GET(w, qp, qp);
	struct ibv_qp_init_attr init = {0};
	struct ibv_qp_attr a = {0};
	int rc = q ? mg_qp_query(q->qp, &a, IBV_QP_STATE | IBV_QP_CAP, &init) : EINVAL;

	if (rc)
		return -rc;
	*path = (struct mgs_path){
		.dest_qpn = a.dest_qp_num,
		.rq_psn = a.rq_psn,
		.sq_psn = a.sq_psn,
		.mtu = a.path_mtu ? 128u << a.path_mtu : 0,
		.access = a.qp_access_flags,
		.timeout = a.timeout,
		.retry_cnt = a.retry_cnt,
		.rnr_retry = a.rnr_retry,
		.min_rnr_timer = a.min_rnr_timer,
		.max_rd_atomic = a.max_rd_atomic,
		.max_dest_rd_atomic = a.max_dest_rd_atomic,
		.hop_limit = a.ah_attr.grh.hop_limit,
		.tclass = a.ah_attr.grh.traffic_class,
	};
	memcpy(path->dgid, a.ah_attr.grh.dgid.raw, 16);
	*caps = (struct mgs_caps){a.cap.max_send_wr, a.cap.max_recv_wr, a.cap.max_send_sge,
				  a.cap.max_recv_sge, a.cap.max_inline_data};
	return memcmp(&a.cap, &init.cap, sizeof(a.cap)) ? -EPROTO : 0;
}

static int sges(struct ibv_sge *out, const struct mgs_wr *wr)
{
	const uint32_t max = sizeof(wr->sge) / sizeof(wr->sge[0]);

	for (uint32_t i = 0; i < wr->n_sge && i < max; i++)
		out[i] = (struct ibv_sge){wr->sge[i].addr, wr->sge[i].length, wr->sge[i].lkey};
	return (int)wr->n_sge;
}

static void fill_bind(struct ibv_send_wr *to, const struct mgs_wr *wr, struct ibv_mw *mw, struct ibv_mr *mr)
{
	*mw = (struct ibv_mw){.rkey = wr->mw_rkey};
	*mr = (struct ibv_mr){.lkey = wr->mr_lkey};
	to->bind_mw.mw = mw;
	to->bind_mw.rkey = wr->rkey;
	to->bind_mw.bind_info = (struct ibv_mw_bind_info){.mr = wr->mr_lkey ? mr : NULL,
							  .addr = wr->remote_addr,
							  .length = wr->compare_add,
							  .mw_access_flags = wr->mw_access};
}

int mgs_post_send(struct mgs_world *w, int qp, const struct mgs_wr *wr, int n, int *posted)
{
	struct ibv_sge sge[POST_MAX][34];
	struct ibv_send_wr list[POST_MAX], *bad = NULL;
	struct ibv_mw mw[POST_MAX];
	struct ibv_mr mr[POST_MAX];
	struct sim_qp *q = SIM_GET(w, qp, qp);
	struct sim_engine *e;
	int rc;

	*posted = 0;
	if (!q || n < 1 || n > POST_MAX)
		return -EINVAL;
	e = &w->engine[q->engine];
	for (int i = 0; i < n; i++) {
		list[i] = (struct ibv_send_wr){
			.wr_id = wr[i].wr_id,
			.next = i + 1 < n ? &list[i + 1] : NULL,
			.sg_list = sge[i],
			.num_sge = sges(sge[i], &wr[i]),
			.opcode = (enum ibv_wr_opcode)wr[i].opcode,
			.send_flags = wr[i].flags,
			.imm_data = htonl(wr[i].imm),
			.wr.rdma = {.remote_addr = wr[i].remote_addr, .rkey = wr[i].rkey},
			.qp_type.xrc.remote_srqn = wr[i].srqn,
		};
		if (wr[i].opcode == IBV_WR_SEND_WITH_INV || wr[i].opcode == IBV_WR_LOCAL_INV)
			list[i].invalidate_rkey = wr[i].imm;
		if (wr[i].opcode == IBV_WR_BIND_MW)
			fill_bind(&list[i], &wr[i], &mw[i], &mr[i]);
		if (wr[i].opcode == IBV_WR_ATOMIC_CMP_AND_SWP ||
		    wr[i].opcode == IBV_WR_ATOMIC_FETCH_AND_ADD || wr[i].opcode == MG_WR_FLUSH) {
			list[i].wr.atomic.compare_add = wr[i].compare_add;
			list[i].wr.atomic.swap = wr[i].swap;
			list[i].wr.atomic.rkey = wr[i].rkey;
		} else if (wr[i].ah) {
			struct mg_ah *ah = sim_ah_get(w, (int)wr[i].ah - 1);

			list[i].wr.ud.ah = ah ? mg_ah_ib(ah) : NULL;
			list[i].wr.ud.remote_qpn = wr[i].remote_qpn;
			list[i].wr.ud.remote_qkey = wr[i].remote_qkey;
		}
		sim_trace(w, "post     e%d qp%d send wr %lu op %u flags %x sge %u", e->index, qp,
			  (unsigned long)wr[i].wr_id, wr[i].opcode, wr[i].flags, wr[i].n_sge);
	}
	rc = mg_post_send(q->qp, sim_engine_now(e), list, &bad);
	if (rc && !(bad >= list && bad < list + n))
		sim_violate(w, "e%d: mg_post_send failed with %d, but bad_wr is not one of the list",
			    e->index, rc);
	*posted = rc && bad ? (int)(bad - list) : n;
	sim_after(e, true);
	return -rc;
}

int mgs_post_recv(struct mgs_world *w, int qp, const struct mgs_wr *wr, int n, int *posted)
{
	struct ibv_sge sge[POST_MAX][34];
	struct ibv_recv_wr list[POST_MAX], *bad = NULL;
	struct sim_qp *q = SIM_GET(w, qp, qp);
	struct sim_engine *e;
	int rc;

	*posted = 0;
	if (!q || n < 1 || n > POST_MAX)
		return -EINVAL;
	e = &w->engine[q->engine];
	for (int i = 0; i < n; i++)
		list[i] = (struct ibv_recv_wr){
			.wr_id = wr[i].wr_id,
			.next = i + 1 < n ? &list[i + 1] : NULL,
			.sg_list = sge[i],
			.num_sge = sges(sge[i], &wr[i]),
		};
	rc = mg_post_recv(q->qp, list, &bad);
	if (rc && !(bad >= list && bad < list + n))
		sim_violate(w, "e%d: mg_post_recv failed with %d, but bad_wr is not one of the list",
			    e->index, rc);
	*posted = rc && bad ? (int)(bad - list) : n;
	sim_after(e, true);
	return -rc;
}
