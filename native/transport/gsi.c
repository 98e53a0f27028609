/* SPDX-License-Identifier: BSD-3-Clause */
/* gsi.c - QP 1: datagrams in and out of the engine's packets. */
#include "transport/gsi.h"
#include "transport/internal.h"

#include <errno.h>
#include <stdlib.h>

struct mg_gsi_mad {
	struct mg_gsi_mad *next;
	struct mg_addr src, dst;
	uint8_t tclass;
	uint8_t mad[MG_GSI_MAD_LEN];
};

_Static_assert(MG_GSI_MAD_LEN <= MG_PKT_COPY, "a datagram fits behind a packet's headers");

void mg_gsi_attach(struct mg_engine *e, const struct mg_gsi_user *user, void *arg)
{
	e->gsi.user = user;
	e->gsi.arg = arg;
	e->gsi.wake = MG_NEVER;
}

int mg_gsi_send(struct mg_engine *e, const struct mg_addr *src, const struct mg_addr *dst, uint8_t tclass,
		const uint8_t mad[MG_GSI_MAD_LEN])
{
	struct mg_gsi_mad *m;

	if (e->gsi.queued >= MG_GSI_QUEUE_MAX)
		return ENOBUFS;
	m = malloc(sizeof(*m));
	if (!m)
		return ENOMEM;
	m->next = NULL;
	m->src = *src;
	m->dst = *dst;
	m->tclass = tclass;
	memcpy(m->mad, mad, MG_GSI_MAD_LEN);
	if (e->gsi.last)
		e->gsi.last->next = m;
	else
		e->gsi.first = m;
	e->gsi.last = m;
	e->gsi.queued++;
	return 0;
}

void mg_gsi_wake(struct mg_engine *e, mg_time at)
{
	e->gsi.wake = at;
}

static struct mg_gsi_mad *take(struct mg_engine *e)
{
	struct mg_gsi_mad *m = e->gsi.first;

	e->gsi.first = m->next;
	if (!m->next)
		e->gsi.last = NULL;
	e->gsi.queued--;
	return m;
}

size_t mg_gsi_tx(struct mg_engine *e, struct mg_pkt *out, size_t max)
{
	size_t n = 0;

	while (n < max && e->gsi.first) {
		struct mg_gsi_mad *m = take(e);
		struct mg_pkt *p = &out[n++];
		/* AckReq as the kernel's driver sets it on the last packet of any message. */
		struct mg_hdrs h = {.opcode = MG_SVC_UD + MG_OP_SEND_ONLY,
				    .capable = true,
				    .ackreq = true,
				    .pkey = MG_PKEY_DEFAULT,
				    .dest_qpn = MG_GSI_QPN,
				    .psn = e->gsi.psn++ & MG_PSN_MASK,
				    .deth = {MG_GSI_QKEY, MG_GSI_QPN}};

		p->src = m->src;
		p->dst = m->dst;
		p->qpn = MG_GSI_QPN;
		p->sport = MG_ROCE_PORT;
		p->tclass = m->tclass;
		p->hop_limit = 64;
		p->pad = 0;
		p->n_iov = 0;
		p->hdr_len = (uint16_t)mg_hdrs_build(&h, p->hdr);
		memcpy(p->hdr + p->hdr_len, m->mad, MG_GSI_MAD_LEN);
		p->hdr_len = (uint16_t)(p->hdr_len + MG_GSI_MAD_LEN);
		p->len = p->hdr_len + MG_ICRC_LEN;
		free(m);
		e->counters[MG_CNT_TX_PACKETS]++;
	}
	return n;
}

void mg_gsi_rx(struct mg_engine *e, mg_time now, const struct mg_rx *meta, const struct mg_hdrs *h)
{
	if (!e->gsi.user) {
		e->counters[MG_CNT_RX_NO_QP]++;
		return;
	}
	if (h->opcode != MG_SVC_UD + MG_OP_SEND_ONLY || h->payload_len != MG_GSI_MAD_LEN ||
	    h->deth.qkey != MG_GSI_QKEY || (h->pkey & 0x7fff) != (MG_PKEY_DEFAULT & 0x7fff)) {
		e->counters[MG_CNT_RX_MALFORMED]++;
		return;
	}
	e->counters[MG_CNT_RX_PACKETS]++;
	e->gsi.user->rx(e->gsi.arg, now, meta, h->payload);
}

void mg_gsi_timer(struct mg_engine *e, mg_time now)
{
	if (e->gsi.wake > now)
		return;
	e->gsi.wake = MG_NEVER;
	if (e->gsi.user)
		e->gsi.user->timer(e->gsi.arg, now);
}

void mg_gsi_resume(struct mg_engine *e, mg_time now)
{
	if (e->gsi.user)
		e->gsi.user->resumed(e->gsi.arg, now, &e->cfg.addr);
}

void mg_gsi_free(struct mg_engine *e)
{
	while (e->gsi.first)
		free(take(e));
}
