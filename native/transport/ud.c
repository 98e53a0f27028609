/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * ud.c - the receiving end of the unreliable datagram service, unicast and multicast (IBA 9.8.4).
 *
 * The first 40 bytes of every receive buffer are the packet's network header: an IPv6 header, or
 * 20 bytes of zeros and an IPv4 header, as the kernel's drivers lay it out.
 */
#include "transport/internal.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdlib.h>

#define GRH_LEN 40u
#define PROTO_UDP 17u

static void put16(uint8_t *to, uint32_t v)
{
	to[0] = (uint8_t)(v >> 8);
	to[1] = (uint8_t)v;
}

/* The header of a UDP datagram with `len` bytes of payload, as it was on the wire. */
static void build_grh(const struct mg_rx *meta, uint32_t len, uint8_t grh[GRH_LEN])
{
	uint8_t *ip = grh + 20;
	uint32_t sum = 0;

	memset(grh, 0, GRH_LEN);
	if (!mg_gid_is_v4(meta->dst.gid)) {
		grh[0] = (uint8_t)(0x60 | meta->tclass >> 4);
		grh[1] = (uint8_t)(meta->tclass << 4 | (meta->flow_label >> 16 & 0xf));
		put16(grh + 2, meta->flow_label & 0xffff);
		put16(grh + 4, len + 8);
		grh[6] = PROTO_UDP;
		grh[7] = meta->hop_limit;
		memcpy(grh + 8, meta->src.gid, 16);
		memcpy(grh + 24, meta->dst.gid, 16);
		return;
	}
	ip[0] = 0x45;
	ip[1] = meta->tclass;
	put16(ip + 2, len + 28);
	put16(ip + 4, meta->ip_id);
	ip[6] = 0x40; /* DF */
	ip[8] = meta->hop_limit;
	ip[9] = PROTO_UDP;
	memcpy(ip + 12, meta->src.gid + 12, 4);
	memcpy(ip + 16, meta->dst.gid + 12, 4);
	for (int i = 0; i < 20; i += 2)
		sum += (uint32_t)ip[i] << 8 | ip[i + 1];
	sum = (sum & 0xffff) + (sum >> 16);
	sum = (sum & 0xffff) + (sum >> 16);
	put16(ip + 10, ~sum);
}

/*
 * What kind of header stands in the GRH's place, in the service level that RoCE has no use for: bit 3 RoCEv2, 2
 * IPv4, 1 IPv6, as ConnectX cards tell it. rdma_rxe leaves 0; UCX reads it and would drop everything.
 */
#define SL_ROCE_V2_IPV4 0xau
#define SL_ROCE_V2_IPV6 0x9u

static void local_error(struct mg_qp *qp)
{
	struct ibv_wc wc = {.status = IBV_WC_LOC_PROT_ERR, .opcode = IBV_WC_RECV};

	mg_recv_done(qp, &wc, false);
	mg_qp_fatal(qp, IBV_EVENT_QP_FATAL);
}

void mg_ud_rx(struct mg_qp *qp, const struct mg_rx *meta, const struct mg_hdrs *h)
{
	struct mg_engine *e = qp->e;
	struct ibv_wc wc = {.status = IBV_WC_SUCCESS,
			    .opcode = IBV_WC_RECV,
			    .byte_len = GRH_LEN + h->payload_len,
			    .src_qp = h->deth.src_qpn,
			    .sl = mg_gid_is_v4(meta->src.gid) ? SL_ROCE_V2_IPV4 : SL_ROCE_V2_IPV6,
			    .wc_flags = IBV_WC_GRH};
	uint8_t grh[GRH_LEN];

	if (h->deth.qkey != qp->attr.qkey) {
		e->counters[MG_CNT_RX_BAD_QKEY]++;
		return;
	}
	/* No receive request, or one that is too short: dropped in silence; it serves the next one. */
	if (h->payload_len > qp->mtu || !mg_recv_take(qp, qp->srq) || wc.byte_len > qp->taken->length) {
		e->counters[MG_CNT_RX_DROPPED]++;
		return;
	}
	build_grh(meta, mg_opinfo[MG_SVC_UD | h->opcode].hdr_len + h->payload_len + h->pad + MG_ICRC_LEN,
		  grh);
	if (mg_recv_scatter(qp, 0, grh, GRH_LEN) ||
	    mg_recv_scatter(qp, GRH_LEN, h->payload, h->payload_len)) {
		local_error(qp);
		return;
	}
	if (h->mask & MG_H_IMM) {
		wc.wc_flags |= IBV_WC_WITH_IMM;
		wc.imm_data = htonl(h->imm);
	}
	qp->rx_bytes += h->payload_len;
	e->counters[MG_CNT_RX_BYTES] += h->payload_len;
	mg_recv_done(qp, &wc, h->solicited);
	mg_resp_comm_est(qp);
}

/* ---- multicast --------------------------------------------------------------------------------- */

bool mg_gid_multicast(const uint8_t gid[16])
{
	return gid[0] == 0xff || (mg_gid_is_v4(gid) && (gid[12] & 0xf0) == 0xe0);
}

static struct mg_group *find_group(struct mg_engine *e, const uint8_t gid[16])
{
	for (uint32_t i = 0; i < e->n_group; i++)
		if (!memcmp(e->group[i].addr.gid, gid, 16))
			return &e->group[i];
	return NULL;
}

static struct mg_group *make_group(struct mg_engine *e, const uint8_t gid[16])
{
	struct mg_group *bigger = realloc(e->group, (e->n_group + 1) * sizeof(*bigger));

	if (!bigger)
		return NULL;
	e->group = bigger;
	bigger += e->n_group++;
	*bigger = (struct mg_group){.n = 0};
	memcpy(bigger->addr.gid, gid, 16);
	return bigger;
}

static void drop_group(struct mg_engine *e, struct mg_group *g)
{
	free(g->qp);
	*g = e->group[--e->n_group];
}

static uint32_t find_member(const struct mg_group *g, const struct mg_qp *qp)
{
	uint32_t i = 0;

	while (i < g->n && g->qp[i] != qp)
		i++;
	return i;
}

int mg_mcast_attach(struct mg_qp *qp, const struct mg_addr *addr)
{
	struct mg_engine *e = qp->e;
	struct mg_group *g = find_group(e, addr->gid);
	struct mg_qp **bigger;

	if (qp->type != IBV_QPT_UD || !mg_gid_multicast(addr->gid))
		return EINVAL;
	if (g && find_member(g, qp) < g->n)
		return 0;
	if (!g && e->n_group == MG_MAX_MCAST)
		return ENOMEM;
	if (!g)
		g = make_group(e, addr->gid);
	if (!g)
		return ENOMEM;
	bigger = realloc(g->qp, (g->n + 1) * sizeof(*bigger));
	if (!bigger) {
		if (!g->n)
			drop_group(e, g);
		return ENOMEM;
	}
	g->qp = bigger;
	g->qp[g->n++] = qp;
	qp->n_mcast++;
	return 0;
}

int mg_mcast_detach(struct mg_qp *qp, const struct mg_addr *addr)
{
	struct mg_engine *e = qp->e;
	struct mg_group *g = find_group(e, addr->gid);
	uint32_t i = g ? find_member(g, qp) : 0;

	if (!g || i == g->n)
		return EINVAL;
	g->qp[i] = g->qp[--g->n];
	qp->n_mcast--;
	if (!g->n)
		drop_group(e, g);
	return 0;
}

void mg_mcast_detach_all(struct mg_qp *qp)
{
	for (uint32_t i = qp->e->n_group; qp->n_mcast && i--;) {
		struct mg_addr addr = qp->e->group[i].addr;

		(void)mg_mcast_detach(qp, &addr);
	}
}

bool mg_mcast_group(const struct mg_engine *e, uint32_t i, struct mg_addr *addr)
{
	if (i >= e->n_group)
		return false;
	*addr = e->group[i].addr;
	return true;
}

static bool ours(const struct mg_engine *e, const struct mg_addr *addr)
{
	for (unsigned i = 0; i < e->n_gid; i++)
		if (!memcmp(&e->gid[i], addr, sizeof(*addr)))
			return true;
	return false;
}

void mg_mcast_rx(struct mg_engine *e, const struct mg_rx *meta, const struct mg_hdrs *h)
{
	const struct mg_group *g = find_group(e, meta->dst.gid);

	if (!g) {
		e->counters[MG_CNT_RX_NO_QP]++;
		return;
	}
	for (uint32_t i = 0; i < g->n; i++) {
		struct mg_qp *qp = g->qp[i];

		if (!mg_qp_connected(qp) ||
		    (qp->block_self && h->deth.src_qpn == qp->qpn && ours(e, &meta->src)))
			continue;
		e->counters[MG_CNT_RX_PACKETS]++;
		qp->rx_packets++;
		mg_ud_rx(qp, meta, h);
	}
}
