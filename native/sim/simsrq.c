/* SPDX-License-Identifier: BSD-3-Clause */
/* simsrq.c - the flat API's shared receive queues, XRC domains, and QPs made of them. */
#include "sim/sim.h"

#include <errno.h>
#include <string.h>

#define POST_MAX 64

int mgs_xrcd_new(struct mgs_world *w, int engine)
{
	struct sim_engine *e = sim_engine_get(w, engine);
	struct mg_xrcd *xrcd = e ? mg_xrcd_create(e->e) : NULL;
	int i;

	if (!xrcd)
		return -ENOMEM;
	i = SIM_SLOT(w, xrcd);
	w->xrcd[i] = (struct sim_xrcd){xrcd, engine};
	return i;
}

int mgs_xrcd_free(struct mgs_world *w, int xrcd)
{
	struct sim_xrcd *x = SIM_GET(w, xrcd, xrcd);
	int rc = x ? mg_xrcd_destroy(x->xrcd) : EINVAL;

	if (!rc)
		x->xrcd = NULL;
	return -rc;
}

int mgs_srq_new(struct mgs_world *w, int pd, int xrcd, int cq, uint32_t max_wr, uint32_t max_sge)
{
	struct ibv_srq_attr attr = {.max_wr = max_wr, .max_sge = max_sge};
	struct sim_pd *p = SIM_GET(w, pd, pd);
	struct sim_xrcd *x = SIM_GET(w, xrcd, xrcd);
	struct sim_cq *c = SIM_GET(w, cq, cq);
	struct mg_srq *srq;
	int rc, i;

	if (!p)
		return -EINVAL;
	rc = mg_srq_create(p->pd, x ? x->xrcd : NULL, c ? c->cq : NULL, &attr, NULL, &srq);
	if (rc)
		return -rc;
	i = SIM_SLOT(w, srq);
	w->srq[i] = (struct sim_srq){srq, p->engine};
	return i;
}

int mgs_srq_free(struct mgs_world *w, int srq)
{
	struct sim_srq *s = SIM_GET(w, srq, srq);
	int rc = s ? mg_srq_destroy(s->srq) : EINVAL;

	if (!rc)
		s->srq = NULL;
	return -rc;
}

uint32_t mgs_srq_num(struct mgs_world *w, int srq)
{
	struct sim_srq *s = SIM_GET(w, srq, srq);

	return s ? mg_srq_num(s->srq) : 0;
}

int mgs_srq_modify(struct mgs_world *w, int srq, uint32_t max_wr, uint32_t limit)
{
	struct ibv_srq_attr attr = {.max_wr = max_wr, .srq_limit = limit};
	struct sim_srq *s = SIM_GET(w, srq, srq);

	return s ? -mg_srq_modify(s->srq, &attr, max_wr ? IBV_SRQ_MAX_WR | IBV_SRQ_LIMIT : IBV_SRQ_LIMIT)
		 : -EINVAL;
}

int mgs_post_srq_recv(struct mgs_world *w, int srq, const struct mgs_wr *wr, int n, int *posted)
{
	struct ibv_recv_wr list[POST_MAX], *bad = NULL;
	struct ibv_sge sge[POST_MAX][34];
	struct sim_srq *s = SIM_GET(w, srq, srq);
	int rc;

	*posted = 0;
	if (!s || n < 1 || n > POST_MAX)
		return -EINVAL;
	for (int i = 0; i < n; i++) {
		list[i] = (struct ibv_recv_wr){.wr_id = wr[i].wr_id,
					       .next = i + 1 < n ? &list[i + 1] : NULL,
					       .sg_list = sge[i],
					       .num_sge = (int)wr[i].n_sge};
		for (uint32_t k = 0; k < wr[i].n_sge && k < 34; k++)
			sge[i][k] =
				(struct ibv_sge){wr[i].sge[k].addr, wr[i].sge[k].length, wr[i].sge[k].lkey};
	}
	rc = mg_post_srq_recv(s->srq, list, &bad);
	if (rc && !(bad >= list && bad < list + n))
		sim_violate(w, "e%d: mg_post_srq_recv failed with %d, but bad_wr is not one of the list",
			    s->engine, rc);
	*posted = rc && bad ? (int)(bad - list) : n;
	sim_after(&w->engine[s->engine], true);
	return -rc;
}

int mgs_qp_make(struct mgs_world *w, int engine, const struct mgs_parts *parts, struct mgs_caps *caps)
{
	struct sim_pd *pd = SIM_GET(w, pd, parts->pd);
	struct sim_cq *scq = SIM_GET(w, cq, parts->send_cq), *rcq = SIM_GET(w, cq, parts->recv_cq);
	struct sim_srq *srq = SIM_GET(w, srq, parts->srq);
	struct sim_xrcd *xrcd = SIM_GET(w, xrcd, parts->xrcd);
	struct sim_engine *e = sim_engine_get(w, engine);
	struct mg_qp_parts p = {.pd = pd ? pd->pd : NULL,
				.send_cq = scq ? scq->cq : NULL,
				.recv_cq = rcq ? rcq->cq : NULL,
				.srq = srq ? srq->srq : NULL,
				.xrcd = xrcd ? xrcd->xrcd : NULL};
	struct ibv_qp_init_attr_ex attr = {
		.qp_type = (enum ibv_qp_type)parts->type,
		.cap = {caps->max_send_wr, caps->max_recv_wr, caps->max_send_sge, caps->max_recv_sge,
			caps->max_inline},
	};
	struct mg_qp *qp;
	int rc, i;

	if (!e)
		return -EINVAL;
	rc = mg_qp_create(e->e, &p, &attr, NULL, &qp);
	if (rc)
		return -rc;
	*caps = (struct mgs_caps){attr.cap.max_send_wr, attr.cap.max_recv_wr, attr.cap.max_send_sge,
				  attr.cap.max_recv_sge, attr.cap.max_inline_data};
	i = SIM_SLOT(w, qp);
	w->qp[i] = (struct sim_qp){qp, engine};
	return i;
}
