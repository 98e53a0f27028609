/* SPDX-License-Identifier: BSD-3-Clause */
/* mad.c - CM messages byte by byte: IBA 12.6.5 to 12.11, offsets in the comments are the message's. */
#include "cm/mad.h"

#include <errno.h>
#include <string.h>

#define HDR_LEN 24u /* common MAD header (13.4.2) */
#define CLASS_CM 0x07
#define METHOD_SEND 0x03

static uint16_t get16(const uint8_t *p)
{
	return (uint16_t)(p[0] << 8 | p[1]);
}

static uint32_t get24(const uint8_t *p)
{
	return (uint32_t)p[0] << 16 | (uint32_t)p[1] << 8 | p[2];
}

static uint32_t get32(const uint8_t *p)
{
	return (uint32_t)p[0] << 24 | get24(p + 1);
}

static uint64_t get64(const uint8_t *p)
{
	return (uint64_t)get32(p) << 32 | get32(p + 4);
}

static void put16(uint8_t *p, uint16_t v)
{
	p[0] = (uint8_t)(v >> 8);
	p[1] = (uint8_t)v;
}

static void put24(uint8_t *p, uint32_t v)
{
	p[0] = (uint8_t)(v >> 16);
	put16(p + 1, (uint16_t)v);
}

static void put32(uint8_t *p, uint32_t v)
{
	p[0] = (uint8_t)(v >> 24);
	put24(p + 1, v);
}

static void put64(uint8_t *p, uint64_t v)
{
	put32(p, (uint32_t)(v >> 32));
	put32(p + 4, (uint32_t)v);
}

/* Where the private data of each message begins, in the 232 bytes behind the header, and its length. */
static const struct {
	uint8_t at, len;
} private_data[] = {
	[MG_CM_REQ - MG_CM_REQ] = {140, 92},	  [MG_CM_MRA - MG_CM_REQ] = {10, 222},
	[MG_CM_REJ - MG_CM_REQ] = {84, 148},	  [MG_CM_REP - MG_CM_REQ] = {36, 196},
	[MG_CM_RTU - MG_CM_REQ] = {8, 224},	  [MG_CM_DREQ - MG_CM_REQ] = {12, 220},
	[MG_CM_DREP - MG_CM_REQ] = {8, 224},	  [MG_CM_SIDR_REQ - MG_CM_REQ] = {16, 216},
	[MG_CM_SIDR_REP - MG_CM_REQ] = {96, 136},
};

static bool known(uint16_t attr)
{
	return attr >= MG_CM_REQ && attr <= MG_CM_SIDR_REP;
}

size_t mg_cm_private_len(uint16_t attr)
{
	return known(attr) ? private_data[attr - MG_CM_REQ].len : 0;
}

/* ---- REQ ------------------------------------------------------------------------------------------ */

static void parse_route(const uint8_t *p, struct mg_cm_route *r)
{
	uint32_t flow = get32(p + 36);

	r->local_lid = get16(p);
	r->remote_lid = get16(p + 2);
	memcpy(r->local_gid, p + 4, 16);
	memcpy(r->remote_gid, p + 20, 16);
	r->flow_label = flow >> 12;
	r->flow_rsv = flow >> 6 & 0x3f;
	r->rate = flow & 0x3f;
	r->tclass = p[40];
	r->hop_limit = p[41];
	r->sl = p[42] >> 4;
	r->subnet_local = p[42] & 0x08;
	r->ack_timeout = p[43] >> 3;
}

static void build_route(const struct mg_cm_route *r, uint8_t *p)
{
	put16(p, r->local_lid);
	put16(p + 2, r->remote_lid);
	memcpy(p + 4, r->local_gid, 16);
	memcpy(p + 20, r->remote_gid, 16);
	put32(p + 36, r->flow_label << 12 | (uint32_t)(r->flow_rsv & 0x3f) << 6 | (r->rate & 0x3fu));
	p[40] = r->tclass;
	p[41] = r->hop_limit;
	p[42] = (uint8_t)(r->sl << 4 | r->subnet_local << 3);
	p[43] = (uint8_t)(r->ack_timeout << 3);
}

static void parse_req(const uint8_t *p, struct mg_cm_msg *m)
{
	m->service_id = get64(p + 8);
	m->ca_guid = get64(p + 16);
	m->qkey = get32(p + 28);
	m->qpn = get24(p + 32);
	m->responder_resources = p[35];
	m->eecn = get24(p + 36);
	m->initiator_depth = p[39];
	m->remote_eecn = get24(p + 40);
	m->remote_timeout = p[43] >> 3;
	m->service_type = p[43] >> 1 & 3;
	m->flow_control = p[43] & 1;
	m->psn = get24(p + 44);
	m->local_timeout = p[47] >> 3;
	m->retry_count = p[47] & 7;
	m->pkey = get16(p + 48);
	m->path_mtu = p[50] >> 4;
	m->rdc_exists = p[50] & 0x08;
	m->rnr_retry_count = p[50] & 7;
	m->max_cm_retries = p[51] >> 4;
	m->srq = p[51] & 0x08;
	m->extended_type = p[51] & 7;
	parse_route(p + 52, &m->primary);
	parse_route(p + 96, &m->alternate);
}

static void build_req(const struct mg_cm_msg *m, uint8_t *p)
{
	put64(p + 8, m->service_id);
	put64(p + 16, m->ca_guid);
	put32(p + 28, m->qkey);
	put24(p + 32, m->qpn);
	p[35] = m->responder_resources;
	put24(p + 36, m->eecn);
	p[39] = m->initiator_depth;
	put24(p + 40, m->remote_eecn);
	p[43] = (uint8_t)(m->remote_timeout << 3 | (m->service_type & 3) << 1 | m->flow_control);
	put24(p + 44, m->psn);
	p[47] = (uint8_t)(m->local_timeout << 3 | (m->retry_count & 7));
	put16(p + 48, m->pkey);
	p[50] = (uint8_t)(m->path_mtu << 4 | m->rdc_exists << 3 | (m->rnr_retry_count & 7));
	p[51] = (uint8_t)(m->max_cm_retries << 4 | m->srq << 3 | (m->extended_type & 7));
	build_route(&m->primary, p + 52);
	build_route(&m->alternate, p + 96);
}

/* ---- the others -------------------------------------------------------------------------------------- */

static void parse_rep(const uint8_t *p, struct mg_cm_msg *m)
{
	m->qkey = get32(p + 8);
	m->qpn = get24(p + 12);
	m->eecn = get24(p + 16);
	m->psn = get24(p + 20);
	m->responder_resources = p[24];
	m->initiator_depth = p[25];
	m->target_ack_delay = p[26] >> 3;
	m->failover_accepted = p[26] >> 1 & 3;
	m->flow_control = p[26] & 1;
	m->rnr_retry_count = p[27] >> 5;
	m->srq = p[27] & 0x10;
	m->ca_guid = get64(p + 28);
}

static void build_rep(const struct mg_cm_msg *m, uint8_t *p)
{
	put32(p + 8, m->qkey);
	put24(p + 12, m->qpn);
	put24(p + 16, m->eecn);
	put24(p + 20, m->psn);
	p[24] = m->responder_resources;
	p[25] = m->initiator_depth;
	p[26] = (uint8_t)(m->target_ack_delay << 3 | (m->failover_accepted & 3) << 1 | m->flow_control);
	p[27] = (uint8_t)(m->rnr_retry_count << 5 | m->srq << 4);
	put64(p + 28, m->ca_guid);
}

static void parse_info(const uint8_t *p, uint8_t len, struct mg_cm_msg *m)
{
	m->info_len = len < sizeof(m->info) ? len : (uint8_t)sizeof(m->info);
	memcpy(m->info, p, sizeof(m->info));
}

static void parse_sidr_rep(const uint8_t *p, struct mg_cm_msg *m)
{
	m->status = p[4];
	m->qpn = get24(p + 8);
	m->service_id = get64(p + 12);
	m->qkey = get32(p + 20);
	parse_info(p + 24, p[5], m);
}

static void build_sidr_rep(const struct mg_cm_msg *m, uint8_t *p)
{
	p[4] = m->status;
	p[5] = m->info_len;
	put24(p + 8, m->qpn);
	put64(p + 12, m->service_id);
	put32(p + 20, m->qkey);
	memcpy(p + 24, m->info, sizeof(m->info));
}

int mg_cm_parse(const uint8_t *mad, size_t len, struct mg_cm_msg *m)
{
	const uint8_t *p = mad + HDR_LEN;

	if (len != MG_MAD_LEN || mad[0] != 1 || mad[1] != CLASS_CM || mad[2] != 2 || mad[3] != METHOD_SEND ||
	    !known(get16(mad + 16)))
		return -EBADMSG;
	memset(m, 0, sizeof(*m));
	m->attr = get16(mad + 16);
	m->tid = get64(mad + 8);
	m->local_id = get32(p);
	if (m->attr != MG_CM_REQ && m->attr != MG_CM_SIDR_REQ && m->attr != MG_CM_SIDR_REP)
		m->remote_id = get32(p + 4);
	switch (m->attr) {
	case MG_CM_REQ: parse_req(p, m); break;
	case MG_CM_REP: parse_rep(p, m); break;
	case MG_CM_MRA:
		m->about = p[8] >> 6;
		m->service_timeout = p[9] >> 3;
		break;
	case MG_CM_REJ:
		m->about = p[8] >> 6;
		m->reason = get16(p + 10);
		parse_info(p + 12, p[9] >> 1, m);
		break;
	case MG_CM_DREQ: m->qpn = get24(p + 8); break;
	case MG_CM_SIDR_REQ:
		m->pkey = get16(p + 4);
		m->service_id = get64(p + 8);
		break;
	case MG_CM_SIDR_REP: parse_sidr_rep(p, m); break;
	default: break;
	}
	memcpy(m->private_data, p + private_data[m->attr - MG_CM_REQ].at, mg_cm_private_len(m->attr));
	return 0;
}

void mg_cm_build(const struct mg_cm_msg *m, uint8_t mad[MG_MAD_LEN])
{
	uint8_t *p = mad + HDR_LEN;

	memset(mad, 0, MG_MAD_LEN);
	mad[0] = 1;
	mad[1] = CLASS_CM;
	mad[2] = 2;
	mad[3] = METHOD_SEND;
	put64(mad + 8, m->tid);
	put16(mad + 16, m->attr);
	put32(p, m->local_id);
	if (m->attr != MG_CM_REQ && m->attr != MG_CM_SIDR_REQ && m->attr != MG_CM_SIDR_REP)
		put32(p + 4, m->remote_id);
	switch (m->attr) {
	case MG_CM_REQ: build_req(m, p); break;
	case MG_CM_REP: build_rep(m, p); break;
	case MG_CM_MRA:
		p[8] = (uint8_t)(m->about << 6);
		p[9] = (uint8_t)(m->service_timeout << 3);
		break;
	case MG_CM_REJ:
		p[8] = (uint8_t)(m->about << 6);
		p[9] = (uint8_t)(m->info_len << 1);
		put16(p + 10, m->reason);
		memcpy(p + 12, m->info, sizeof(m->info));
		break;
	case MG_CM_DREQ: put24(p + 8, m->qpn); break;
	case MG_CM_SIDR_REQ:
		put16(p + 4, m->pkey);
		put64(p + 8, m->service_id);
		break;
	case MG_CM_SIDR_REP: build_sidr_rep(m, p); break;
	default: break;
	}
	if (known(m->attr))
		memcpy(p + private_data[m->attr - MG_CM_REQ].at, m->private_data, mg_cm_private_len(m->attr));
}

/* ---- the IP header ------------------------------------------------------------------------------------ */

static void get_ip(const uint8_t *p, uint8_t version, uint8_t gid[16])
{
	memcpy(gid, p, 16);
	if (version == 4) {
		memset(gid, 0, 10);
		memset(gid + 10, 0xff, 2);
	}
}

static void put_ip(uint8_t *p, uint8_t version, const uint8_t gid[16])
{
	memcpy(p, gid, 16);
	if (version == 4)
		memset(p, 0, 12);
}

int mg_ip_hdr_parse(const uint8_t *p, struct mg_ip_hdr *h)
{
	h->version = p[1] >> 4;
	if (p[0] != 0 || (h->version != 4 && h->version != 6))
		return -EBADMSG;
	h->sport = get16(p + 2);
	get_ip(p + 4, h->version, h->src);
	get_ip(p + 20, h->version, h->dst);
	return 0;
}

void mg_ip_hdr_build(const struct mg_ip_hdr *h, uint8_t *p)
{
	p[0] = 0;
	p[1] = (uint8_t)(h->version << 4);
	put16(p + 2, h->sport);
	put_ip(p + 4, h->version, h->src);
	put_ip(p + 20, h->version, h->dst);
}
