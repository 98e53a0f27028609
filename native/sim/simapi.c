/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * simapi.c - the flat API's engines, PDs, MRs and CQs: indices to pointers, flat structs to verbs'.
 */
#include "sim/sim.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdlib.h>
#include <string.h>

struct sim_engine *sim_engine_get(struct mgs_world *w, int i)
{
	return i >= 0 && i < w->n_engine && w->engine[i].e ? &w->engine[i] : NULL;
}

int sim_slot(void **v, int *n, int *cap, size_t elem)
{
	size_t c = (size_t)*cap;

	*v = sim_grow(*v, (size_t)*n, &c, elem);
	*cap = (int)c;
	memset((char *)*v + (size_t)*n * elem, 0, elem);
	return (*n)++;
}

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
	i = SIM_SLOT(w, pd);
	w->pd[i] = (struct sim_pd){pd, engine};
	return i;
}

int mgs_pd_free(struct mgs_world *w, int pd)
{
	struct sim_pd *p = SIM_GET(w, pd, pd);
	int rc = p ? mg_pd_destroy(p->pd) : EINVAL;

	if (!rc)
		p->pd = NULL;
	return -rc;
}

int mgs_mr_new(struct mgs_world *w, int pd, uint64_t offset, uint64_t length, uint64_t iova, uint32_t access)
{
	struct sim_pd *p = SIM_GET(w, pd, pd);
	struct mg_mr *mr;
	int rc, i;

	if (!p || offset > w->engine[p->engine].cfg.arena || length > w->engine[p->engine].cfg.arena - offset)
		return -EINVAL;
	rc = mg_mr_create(p->pd, w->engine[p->engine].arena + offset, length, iova, access, &mr);
	if (rc)
		return -rc;
	i = SIM_SLOT(w, mr);
	w->mr[i] = (struct sim_mr){mr, p->engine};
	return i;
}

int mgs_mr_free(struct mgs_world *w, int mr)
{
	struct sim_mr *m = SIM_GET(w, mr, mr);
	int rc = m ? mg_mr_destroy(m->mr) : EINVAL;

	if (!rc)
		m->mr = NULL;
	return -rc;
}

uint32_t mgs_mr_lkey(struct mgs_world *w, int mr)
{
	struct sim_mr *m = SIM_GET(w, mr, mr);

	return m ? mg_mr_lkey(m->mr) : 0;
}

uint32_t mgs_mr_rkey(struct mgs_world *w, int mr)
{
	struct sim_mr *m = SIM_GET(w, mr, mr);

	return m ? mg_mr_rkey(m->mr) : 0;
}

int mgs_mw_new(struct mgs_world *w, int pd, int type)
{
	struct sim_pd *p = SIM_GET(w, pd, pd);
	struct mg_mw *mw;
	int rc, i;

	rc = p ? mg_mw_create(p->pd, (enum ibv_mw_type)type, &mw) : EINVAL;
	if (rc)
		return -rc;
	i = SIM_SLOT(w, mw);
	w->mw[i] = (struct sim_mw){mw, p->engine};
	return i;
}

int mgs_mw_free(struct mgs_world *w, int mw)
{
	struct sim_mw *m = SIM_GET(w, mw, mw);

	if (!m)
		return -EINVAL;
	mg_mw_destroy(m->mw);
	m->mw = NULL;
	return 0;
}

uint32_t mgs_mw_rkey(struct mgs_world *w, int mw)
{
	struct sim_mw *m = SIM_GET(w, mw, mw);

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
	i = SIM_SLOT(w, cq);
	w->cq[i] = (struct sim_cq){.cq = cq, .engine = engine, .mode = mode};
	if (mode == MGS_CQ_EVENT || mode == MGS_CQ_SOLICITED) {
		w->cq[i].armed = true;
		mg_cq_arm(cq, mode == MGS_CQ_SOLICITED);
	}
	return i;
}

int mgs_cq_free(struct mgs_world *w, int cq)
{
	struct sim_cq *c = SIM_GET(w, cq, cq);
	int rc = c ? mg_cq_destroy(c->cq) : EINVAL;

	if (!rc)
		c->cq = NULL;
	return -rc;
}

uint64_t mgs_cq_events(struct mgs_world *w, int cq)
{
	struct sim_cq *c = SIM_GET(w, cq, cq);

	return c ? c->events : 0;
}

int mgs_cq_resize(struct mgs_world *w, int cq, uint32_t cqe)
{
	struct sim_cq *c = SIM_GET(w, cq, cq);

	return c ? -mg_cq_resize(c->cq, cqe) : -EINVAL;
}
