/* SPDX-License-Identifier: BSD-3-Clause */
/* dump.c - writes the context's dump (dump.h): what the stand-in answers from, what people inspect. */
#include "transport/internal.h"

#include <libdeflate.h>

struct writer {
	uint8_t *buf;
	size_t cap, len;
	uint32_t records;
};

static void put(struct writer *w, const void *data, size_t n)
{
	if (w->len + n <= w->cap && w->buf)
		memcpy(w->buf + w->len, data, n);
	w->len += n;
}

static void record(struct writer *w, uint16_t type, const void *body, uint32_t n)
{
	struct mg_dump_record head = {type, 1, n};

	put(w, &head, sizeof(head));
	put(w, body, n);
	w->records++;
}

static void dump_qp(struct writer *w, const struct mg_qp *qp)
{
	const struct mg_migration *m = &qp->mig;
	const struct mg_requester *rq = &qp->req;
	const struct mg_responder *rs = &qp->resp;
	struct mg_dump_qp d = {
		.qpn = qp->qpn,
		.type = qp->type,
		.state = qp->state,
		.mstate = qp->e->stopped && mg_qp_connected(qp) ? MG_MSTATE_STOPPED
			  : m->resuming				? MG_MSTATE_RESUMING
			  : m->paused				? MG_MSTATE_PAUSED
								: MG_MSTATE_NORMAL,
		.pd = qp->pd ? qp->pd->handle : 0,
		.send_cq = qp->send_cq ? qp->send_cq->handle : 0,
		.recv_cq = qp->recv_cq ? qp->recv_cq->handle : 0,
		.srq = qp->srq ? qp->srq->handle : 0,
		.xrcd = qp->xrcd ? qp->xrcd->handle : 0,
		.qkey = qp->attr.qkey,
		.peer_qpn = qp->peer_qpn,
		.path_mtu = qp->mtu,
		.peer_capable = m->peer_capable,
		.have_peer_token = m->have_peer_token,
		.token_acked = m->token_acked,
		.epoch = qp->e->epoch,
		.peer_epoch = m->peer_epoch,
		.sport = qp->sport,
		.una_psn = (uint32_t)rq->una & MG_PSN_MASK,
		.next_psn = (uint32_t)rq->max & MG_PSN_MASK,
		.epsn = rs->epsn,
		.msn = rs->msn,
		.sq_depth = qp->cap.max_send_wr,
		.sq_fill = rq->tail - rq->head,
		.rq_depth = qp->cap.max_recv_wr,
		.rq_fill = mg_rq_fill(&qp->rq) + (rs->have_wqe && !rs->wqe_srq),
		.retry_cnt = qp->attr.retry_cnt,
		.rnr_retry = qp->attr.rnr_retry,
		.timeout = qp->attr.timeout,
		.min_rnr_timer = qp->attr.min_rnr_timer,
		.n_resources = rs->n_res,
		.tclass_hop =
			(uint32_t)qp->attr.ah_attr.grh.traffic_class << 8 | qp->attr.ah_attr.grh.hop_limit,
		.tx_packets = qp->tx_packets,
		.rx_packets = qp->rx_packets,
		.tx_bytes = qp->tx_bytes,
		.rx_bytes = qp->rx_bytes,
		.retransmits = qp->retransmits,
		.duplicates = qp->duplicates,
		.send_done = qp->send_done,
		.recv_done = qp->recv_done,
	};

	memcpy(d.local_gid, qp->local.gid, 16);
	memcpy(d.peer_gid, qp->peer.gid, 16);
	memcpy(d.token, m->token, 16);
	memcpy(d.peer_token, m->peer_token, 16);
	record(w, MG_DUMP_QP, &d, sizeof(d));
	for (uint32_t i = 0; i < rs->n_res; i++) {
		const struct mg_resource *s = &rs->res[i];
		struct mg_dump_resource r = {.qpn = qp->qpn,
					     .opcode = s->opcode,
					     .first_psn = s->first_psn,
					     .last_psn = s->last_psn,
					     .va = s->va,
					     .rkey = s->rkey,
					     .length = s->length,
					     .atomic_orig = s->atomic_orig};

		if (s->opcode)
			record(w, MG_DUMP_RESOURCE, &r, sizeof(r));
	}
}

static void dump_srq(struct writer *w, const struct mg_srq *srq)
{
	struct mg_dump_srq d = {
		.handle = srq->handle,
		.num = srq->num,
		.pd = srq->pd->handle,
		.cq = srq->cq ? srq->cq->handle : 0,
		.xrcd = srq->xrcd ? srq->xrcd->handle : 0,
		.depth = srq->rq.max_wr,
		.fill = mg_rq_fill(&srq->rq),
		.max_sge = srq->rq.max_sge,
		.limit = srq->limit,
		.refs = srq->refs,
		.total = srq->total,
	};

	record(w, MG_DUMP_SRQ, &d, sizeof(d));
}

static void dump_ah(struct writer *w, const struct mg_ah *ah)
{
	const struct ibv_global_route *grh = &ah->attr.grh;
	struct mg_dump_ah d = {.handle = ah->handle,
			       .pd = ah->pd->handle,
			       .sgid_index = grh->sgid_index,
			       .flow_label = grh->flow_label,
			       .tclass_hop = (uint32_t)grh->traffic_class << 8 | grh->hop_limit};

	memcpy(d.sgid, ah->src.gid, 16);
	memcpy(d.dgid, ah->dst.gid, 16);
	record(w, MG_DUMP_AH, &d, sizeof(d));
}

static void dump_group(struct writer *w, const struct mg_group *g)
{
	for (uint32_t i = 0; i < g->n; i++) {
		struct mg_dump_mcast d = {.qpn = g->qp[i]->qpn};

		memcpy(d.gid, g->addr.gid, 16);
		record(w, MG_DUMP_MCAST, &d, sizeof(d));
	}
}

static void dump_context(struct writer *w, const struct mg_engine *e)
{
	struct mg_dump_context c = {.qpn_base = e->cfg.qpn_base,
				    .qpn_count = e->cfg.qpn_count,
				    .slot = e->cfg.slot,
				    .epoch = e->epoch,
				    .max_path_mtu = e->cfg.max_path_mtu,
				    .n_qp = e->qps.used,
				    .n_mr = e->mrs.used,
				    .n_cq = e->cqs.used,
				    .n_pd = e->pds.used,
				    .n_srq = e->srqs.used,
				    .n_xrcd = e->xrcds.used};

	memcpy(c.gid, e->cfg.addr.gid, 16);
	record(w, MG_DUMP_CONTEXT, &c, sizeof(c));
	record(w, MG_DUMP_COUNTERS, e->counters, sizeof(e->counters));
}

size_t mg_dump(const struct mg_engine *e, uint8_t *buf, size_t cap)
{
	const size_t end_len = sizeof(struct mg_dump_record) + 8;
	struct writer w = {buf, cap, sizeof(struct mg_dump_header), 0};
	struct mg_dump_header head = {.magic = {0}, .version = MG_DUMP_VERSION, .header_len = sizeof(head)};
	uint32_t crc[2] = {0, 0};
	void *o;

	dump_context(&w, e);
	for (uint32_t it = 0; (o = mg_idtab_next(&e->pds, &it));) {
		const struct mg_pd *pd = o;
		struct mg_dump_pd d = {pd->handle, pd->refs};

		record(&w, MG_DUMP_PD, &d, sizeof(d));
	}
	for (uint32_t it = 0; (o = mg_idtab_next(&e->mrs, &it));) {
		const struct mg_mr *mr = o;
		struct mg_dump_mr d = {(uintptr_t)mr->addr, mr->length,	   mr->iova, mr->key, mr->key,
				       mr->access,	    mr->pd->handle};

		record(&w, MG_DUMP_MR, &d, sizeof(d));
	}
	for (uint32_t it = 0; (o = mg_idtab_next(&e->mws, &it));) {
		const struct mg_mw *mw = o;
		struct mg_dump_mw d = {.rkey = mw->rkey, .type = mw->type, .pd = mw->pd->handle};

		if (mw->mr) {
			d.access = mw->access;
			d.mr = mw->mr->key;
			d.qpn = mw->qp ? mw->qp->qpn : 0;
			d.addr = mw->addr;
			d.length = mw->length;
		}
		record(&w, MG_DUMP_MW, &d, sizeof(d));
	}
	for (uint32_t it = 0; (o = mg_idtab_next(&e->cqs, &it));) {
		const struct mg_cq *cq = o;
		struct mg_dump_cq d = {cq->handle, cq->depth,	cq->fill,  cq->armed,
				       cq->total,  cq->channel, cq->events};

		record(&w, MG_DUMP_CQ, &d, sizeof(d));
	}
	for (uint32_t it = 0; (o = mg_idtab_next(&e->xrcds, &it));) {
		const struct mg_xrcd *x = o;
		struct mg_dump_xrcd d = {x->handle, x->refs};

		record(&w, MG_DUMP_XRCD, &d, sizeof(d));
	}
	for (uint32_t it = 0; (o = mg_idtab_next(&e->srqs, &it));)
		dump_srq(&w, o);
	for (uint32_t it = 0; (o = mg_idtab_next(&e->qps, &it));)
		dump_qp(&w, o);
	for (uint32_t it = 0; (o = mg_idtab_next(&e->ahs, &it));)
		dump_ah(&w, o);
	for (uint32_t i = 0; i < e->n_group; i++)
		dump_group(&w, &e->group[i]);

	memcpy(head.magic, MG_DUMP_MAGIC, sizeof(head.magic));
	head.total_len = w.len + end_len;
	head.n_records = w.records + 1;
	head.flags = e->stopped;
	if (!buf || head.total_len > cap)
		return head.total_len;
	memcpy(buf, &head, sizeof(head));
	crc[0] = libdeflate_crc32(0, buf, w.len);
	record(&w, MG_DUMP_END, crc, sizeof(crc));
	return w.len;
}
