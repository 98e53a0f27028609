/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * simapi.c - the flat API's engine and verbs calls: indices to pointers, flat structs to verbs'.
 */
#include "sim/sim.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define POST_MAX 64

struct sim_engine *sim_engine_get(struct mgs_world *w, int i)
{
	return i >= 0 && i < w->n_engine && w->engine[i].e ? &w->engine[i] : NULL;
}

static struct sim_pd *pd_get(struct mgs_world *w, int i)
{
	return i >= 0 && i < w->n_pd && w->pd[i].pd ? &w->pd[i] : NULL;
}

static struct sim_mr *mr_get(struct mgs_world *w, int i)
{
	return i >= 0 && i < w->n_mr && w->mr[i].mr ? &w->mr[i] : NULL;
}

static struct sim_mw *mw_get(struct mgs_world *w, int i)
{
	return i >= 0 && i < w->n_mw && w->mw[i].mw ? &w->mw[i] : NULL;
}

static struct sim_cq *cq_get(struct mgs_world *w, int i)
{
	return i >= 0 && i < w->n_cq && w->cq[i].cq ? &w->cq[i] : NULL;
}

static struct sim_qp *qp_get(struct mgs_world *w, int i)
{
	return i >= 0 && i < w->n_qp && w->qp[i].qp ? &w->qp[i] : NULL;
}

/* Room for one more element; returns its index. */
static int slot(void **v, int *n, int *cap, size_t elem)
{
	size_t c = (size_t)*cap;

	*v = sim_grow(*v, (size_t)*n, &c, elem);
	*cap = (int)c;
	memset((char *)*v + (size_t)*n * elem, 0, elem);
	return (*n)++;
}
#define SLOT(w, what) slot((void **)&(w)->what, &(w)->n_##what, &(w)->cap_##what, sizeof(*(w)->what))

/* ---- engines ---- */

int mgs_engine_new(struct mgs_world *w, const struct mgs_engine_config *cfg)
{
	struct mg_config c = {.qpn_base = cfg->qpn_base,
			      .qpn_count = cfg->qpn_count,
			      .slot = cfg->slot,
			      .max_path_mtu = cfg->max_path_mtu};
	struct sim_engine *e;

	if (w->n_engine == SIM_MAX_ENGINES)
		return -ENOSPC;
	if (!cfg->tx_batch || cfg->tx_batch > SIM_TX_MAX || !cfg->arena)
		return -EINVAL;
	e = &w->engine[w->n_engine];
	memset(e, 0, sizeof(*e));
	e->w = w;
	e->index = w->n_engine;
	e->cfg = *cfg;
	e->rng = cfg->seed;
	e->offset = cfg->clock_offset;
	memcpy(e->gid, cfg->gid, 16);
	memcpy(c.addr.gid, cfg->gid, 16);
	e->flush_at = e->seen_deadline = e->due = MG_NEVER;
	e->attached = true;
	/* Page-aligned as programs do it, so that a wrong address shows. */
	if (posix_memalign((void **)&e->arena, 4096, cfg->arena))
		return -ENOMEM;
	memset(e->arena, 0, cfg->arena);
	e->e = mg_engine_create(&c, &sim_ops, e);
	if (!e->e) {
		free(e->arena);
		e->arena = NULL;
		return -ENOMEM;
	}
	return w->n_engine++;
}

void mgs_engine_free(struct mgs_world *w, int engine)
{
	struct sim_engine *e = sim_engine_get(w, engine);

	if (!e)
		return;
	mg_engine_destroy(e->e);
	e->e = NULL;
	for (int i = 0; i < w->n_pd; i++)
		if (w->pd[i].engine == engine)
			w->pd[i].pd = NULL;
	for (int i = 0; i < w->n_mr; i++)
		if (w->mr[i].engine == engine)
			w->mr[i].mr = NULL;
	for (int i = 0; i < w->n_mw; i++)
		if (w->mw[i].engine == engine)
			w->mw[i].mw = NULL;
	for (int i = 0; i < w->n_cq; i++)
		if (w->cq[i].engine == engine)
			w->cq[i].cq = NULL;
	for (int i = 0; i < w->n_qp; i++)
		if (w->qp[i].engine == engine)
			w->qp[i].qp = NULL;
	for (int i = 0; i < w->n_srq; i++)
		if (w->srq[i].engine == engine)
			w->srq[i].srq = NULL;
	for (int i = 0; i < w->n_xrcd; i++)
		if (w->xrcd[i].engine == engine)
			w->xrcd[i].xrcd = NULL;
	for (int i = 0; i < w->n_ah; i++)
		if (w->ah[i].engine == engine)
			w->ah[i].ah = NULL;
}

void *mgs_arena(struct mgs_world *w, int engine)
{
	return engine >= 0 && engine < w->n_engine ? w->engine[engine].arena : NULL;
}

void mgs_attach(struct mgs_world *w, int engine, int on)
{
	struct sim_engine *e = sim_engine_get(w, engine);

	if (e)
		e->attached = on != 0;
}

int mgs_stop_ready(struct mgs_world *w, int engine)
{
	struct sim_engine *e = sim_engine_get(w, engine);

	return e && mg_stop_ready(e->e);
}

void mgs_stop(struct mgs_world *w, int engine)
{
	struct sim_engine *e = sim_engine_get(w, engine);

	if (!e)
		return;
	sim_trace(w, "stop     e%d", engine);
	mg_stop(e->e);
	sim_after(e, false);
}

int mgs_stopped(struct mgs_world *w, int engine)
{
	struct sim_engine *e = sim_engine_get(w, engine);

	return e && mg_stopped(e->e);
}

void mgs_resume(struct mgs_world *w, int engine, const uint8_t *gid, uint64_t clock_offset)
{
	struct sim_engine *e = sim_engine_get(w, engine);
	struct mg_addr addr;

	if (!e)
		return;
	sim_trace(w, "resume   e%d", engine);
	e->offset = clock_offset;
	e->seen_deadline = e->due = MG_NEVER;
	if (gid) {
		memcpy(addr.gid, gid, 16);
		memcpy(e->gid, gid, 16);
	}
	mg_resume(e->e, sim_engine_now(e), gid ? &addr : NULL);
	sim_after(e, false);
}

size_t mgs_dump(struct mgs_world *w, int engine, uint8_t *buf, size_t cap)
{
	struct sim_engine *e = sim_engine_get(w, engine);

	return e ? mg_dump(e->e, buf, cap) : 0;
}

uint64_t mgs_counter(struct mgs_world *w, int engine, int counter)
{
	struct sim_engine *e = sim_engine_get(w, engine);

	return e && counter >= 0 && counter < MG_CNT_MAX ? mg_counter_get(e->e, (enum mg_counter)counter) : 0;
}

int mgs_counter_count(void)
{
	return MG_CNT_MAX;
}

const char *mgs_counter_name(int counter)
{
	return counter >= 0 && counter < MG_CNT_MAX ? mg_counter_name[counter] : NULL;
}

uint64_t mgs_deadline(struct mgs_world *w, int engine)
{
	struct sim_engine *e = sim_engine_get(w, engine);

	return e ? sim_deadline(e) : MG_NEVER;
}

int mgs_rx_dry(struct mgs_world *w, int engine)
{
	struct sim_engine *e = sim_engine_get(w, engine);

	return e && mg_rx_dry(e->e);
}

int mgs_tx_pending(struct mgs_world *w, int engine)
{
	struct sim_engine *e = sim_engine_get(w, engine);

	return e && mg_tx_pending(e->e);
}

/* ---- PD, MR, CQ ---- */

int mgs_pd_new(struct mgs_world *w, int engine)
{
	struct sim_engine *e = sim_engine_get(w, engine);
	struct mg_pd *pd = e ? mg_pd_create(e->e) : NULL;
	int i;

	if (!pd)
		return -ENOMEM;
	i = SLOT(w, pd);
	w->pd[i] = (struct sim_pd){pd, engine};
	return i;
}

int mgs_pd_free(struct mgs_world *w, int pd)
{
	struct sim_pd *p = pd_get(w, pd);
	int rc = p ? mg_pd_destroy(p->pd) : EINVAL;

	if (!rc)
		p->pd = NULL;
	return -rc;
}

int mgs_mr_new(struct mgs_world *w, int pd, uint64_t offset, uint64_t length, uint64_t iova, uint32_t access)
{
	struct sim_pd *p = pd_get(w, pd);
	struct mg_mr *mr;
	int rc, i;

	if (!p || offset > w->engine[p->engine].cfg.arena || length > w->engine[p->engine].cfg.arena - offset)
		return -EINVAL;
	rc = mg_mr_create(p->pd, w->engine[p->engine].arena + offset, length, iova, access, &mr);
	if (rc)
		return -rc;
	i = SLOT(w, mr);
	w->mr[i] = (struct sim_mr){mr, p->engine};
	return i;
}

int mgs_mr_free(struct mgs_world *w, int mr)
{
	struct sim_mr *m = mr_get(w, mr);
	int rc = m ? mg_mr_destroy(m->mr) : EINVAL;

	if (!rc)
		m->mr = NULL;
	return -rc;
}

uint32_t mgs_mr_lkey(struct mgs_world *w, int mr)
{
	struct sim_mr *m = mr_get(w, mr);

	return m ? mg_mr_lkey(m->mr) : 0;
}

uint32_t mgs_mr_rkey(struct mgs_world *w, int mr)
{
	struct sim_mr *m = mr_get(w, mr);

	return m ? mg_mr_rkey(m->mr) : 0;
}

int mgs_mw_new(struct mgs_world *w, int pd, int type)
{
	struct sim_pd *p = pd_get(w, pd);
	struct mg_mw *mw;
	int rc, i;

	rc = p ? mg_mw_create(p->pd, (enum ibv_mw_type)type, &mw) : EINVAL;
	if (rc)
		return -rc;
	i = SLOT(w, mw);
	w->mw[i] = (struct sim_mw){mw, p->engine};
	return i;
}

int mgs_mw_free(struct mgs_world *w, int mw)
{
	struct sim_mw *m = mw_get(w, mw);

	if (!m)
		return -EINVAL;
	mg_mw_destroy(m->mw);
	m->mw = NULL;
	return 0;
}

uint32_t mgs_mw_rkey(struct mgs_world *w, int mw)
{
	struct sim_mw *m = mw_get(w, mw);

	return m ? mg_mw_rkey(m->mw) : 0;
}

int mgs_cq_new(struct mgs_world *w, int engine, uint32_t cqe, int mode)
{
	struct sim_engine *e = sim_engine_get(w, engine);
	struct mg_cq *cq;
	int rc, i;

	if (!e)
		return -EINVAL;
	rc = mg_cq_create(e->e, cqe, NULL, &cq);
	if (rc)
		return -rc;
	i = SLOT(w, cq);
	w->cq[i] = (struct sim_cq){.cq = cq, .engine = engine, .mode = mode};
	if (mode == MGS_CQ_EVENT || mode == MGS_CQ_SOLICITED) {
		w->cq[i].armed = true;
		mg_cq_arm(cq, mode == MGS_CQ_SOLICITED);
	}
	return i;
}

int mgs_cq_free(struct mgs_world *w, int cq)
{
	struct sim_cq *c = cq_get(w, cq);
	int rc = c ? mg_cq_destroy(c->cq) : EINVAL;

	if (!rc)
		c->cq = NULL;
	return -rc;
}

uint64_t mgs_cq_events(struct mgs_world *w, int cq)
{
	struct sim_cq *c = cq_get(w, cq);

	return c ? c->events : 0;
}

int mgs_cq_resize(struct mgs_world *w, int cq, uint32_t cqe)
{
	struct sim_cq *c = cq_get(w, cq);

	return c ? -mg_cq_resize(c->cq, cqe) : -EINVAL;
}

/* ---- QP ---- */

int mgs_qp_new(struct mgs_world *w, int pd, int send_cq, int recv_cq, struct mgs_caps *caps, int sig_all)
{
	return mgs_qp_new_type(w, pd, send_cq, recv_cq, caps, sig_all, IBV_QPT_RC);
}

int mgs_qp_new_type(struct mgs_world *w, int pd, int send_cq, int recv_cq, struct mgs_caps *caps, int sig_all,
		    int type)
{
	struct sim_pd *p = pd_get(w, pd);
	struct sim_cq *s = cq_get(w, send_cq), *r = cq_get(w, recv_cq);
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
	i = SLOT(w, qp);
	w->qp[i] = (struct sim_qp){qp, p->engine};
	return i;
}

int mgs_qp_free(struct mgs_world *w, int qp)
{
	struct sim_qp *q = qp_get(w, qp);
	int rc = q ? mg_qp_destroy(q->qp) : EINVAL;

	if (!rc) {
		q->qp = NULL;
		sim_after(&w->engine[q->engine], false);
	}
	return -rc;
}

uint32_t mgs_qp_num(struct mgs_world *w, int qp)
{
	struct sim_qp *q = qp_get(w, qp);

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
	struct sim_qp *q = qp_get(w, qp);
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
	struct sim_qp *q = qp_get(w, qp);
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
	struct sim_qp *q = qp_get(w, qp);
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
	struct sim_qp *q = qp_get(w, qp);
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
	struct sim_qp *q = qp_get(w, qp);
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
