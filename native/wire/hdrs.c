/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * hdrs.c - parse and build the BTH and the extended headers, and the RNR timer's code.
 *
 * Reserved bits are written as zero and ignored when read (IBA 9.2), except those docs/protocol.md
 * gives a meaning to.
 */
#include "wire/wire.h"

#include <errno.h>
#include <string.h>

static inline uint16_t get16(const uint8_t *p)
{
	return (uint16_t)(p[0] << 8 | p[1]);
}

static inline uint32_t get24(const uint8_t *p)
{
	return (uint32_t)p[0] << 16 | (uint32_t)p[1] << 8 | p[2];
}

static inline uint32_t get32(const uint8_t *p)
{
	uint32_t v;

	memcpy(&v, p, sizeof(v));
	return __builtin_bswap32(v);
}

static inline uint64_t get64(const uint8_t *p)
{
	uint64_t v;

	memcpy(&v, p, sizeof(v));
	return __builtin_bswap64(v);
}

static inline uint8_t *put16(uint8_t *p, uint16_t v)
{
	p[0] = (uint8_t)(v >> 8);
	p[1] = (uint8_t)v;
	return p + 2;
}

static inline uint8_t *put32(uint8_t *p, uint32_t v)
{
	v = __builtin_bswap32(v);
	memcpy(p, &v, sizeof(v));
	return p + 4;
}

static inline uint8_t *put64(uint8_t *p, uint64_t v)
{
	v = __builtin_bswap64(v);
	memcpy(p, &v, sizeof(v));
	return p + 8;
}

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "get32 and friends swap");

static void parse_meh(const uint8_t *p, struct mg_meh *m)
{
	m->version = p[0];
	m->flags = p[1];
	m->src_qpn = get32(p + 4) & MG_QPN_MASK;
	m->epoch = get32(p + 8);
	m->psn = get32(p + 12) & MG_PSN_MASK;
	memcpy(m->token, p + 16, sizeof(m->token));
	memcpy(m->gid, p + 32, sizeof(m->gid));
}

static uint8_t *build_meh(const struct mg_meh *m, uint8_t *p)
{
	*p++ = m->version;
	*p++ = m->flags;
	p = put16(p, 0);
	p = put32(p, m->src_qpn & MG_QPN_MASK);
	p = put32(p, m->epoch);
	p = put32(p, m->psn & MG_PSN_MASK);
	memcpy(p, m->token, sizeof(m->token));
	memcpy(p + sizeof(m->token), m->gid, sizeof(m->gid));
	return p + sizeof(m->token) + sizeof(m->gid);
}

int mg_hdrs_parse(const uint8_t *buf, size_t len, struct mg_hdrs *h)
{
	const struct mg_opinfo *info;
	const uint8_t *p;
	size_t body;

	if (len < MG_BTH_LEN + MG_ICRC_LEN || len > UINT16_MAX)
		return -EBADMSG;
	info = &mg_opinfo[buf[0]];
	if (!info->name || len < (size_t)info->hdr_len + MG_ICRC_LEN || (buf[1] & 0x0f))
		return -EBADMSG;

	memset(h, 0, sizeof(*h));
	h->opcode = buf[0];
	h->mask = info->mask;
	h->solicited = buf[1] & 0x80;
	h->migreq = buf[1] & 0x40;
	h->pad = buf[1] >> 4 & 3;
	h->pkey = get16(buf + 2);
	h->fecn = buf[4] & 0x80;
	h->becn = buf[4] & 0x40;
	h->capable = buf[4] & MG_BTH4_CAPABLE;
	h->dest_qpn = get24(buf + 5);
	h->ackreq = buf[8] & 0x80;
	h->psn = get24(buf + 9);

	body = len - info->hdr_len - MG_ICRC_LEN;
	if (h->pad > body || (body && !(info->mask & (MG_H_PAYLOAD | MG_P_CONTROL))))
		return -EBADMSG;
	h->payload = buf + info->hdr_len;
	h->payload_len = (uint32_t)(body - h->pad);

	/* In the order of the wire. */
	p = buf + MG_BTH_LEN;
	if (info->mask & MG_H_DETH) {
		h->deth.qkey = get32(p);
		h->deth.src_qpn = get24(p + 5);
		p += 8;
	}
	if (info->mask & MG_H_XRCETH) {
		h->xrc_srqn = get24(p + 1);
		p += 4;
	}
	if (info->mask & MG_H_FETH) {
		h->feth.type = p[3] & 0x0f;
		h->feth.level = p[3] >> 4 & 3;
		p += 4;
	}
	if (info->mask & MG_H_RETH) {
		h->reth.va = get64(p);
		h->reth.rkey = get32(p + 8);
		h->reth.length = get32(p + 12);
		p += 16;
	}
	if (info->mask & MG_H_ATOMIC) {
		h->atomic.va = get64(p);
		h->atomic.rkey = get32(p + 8);
		h->atomic.swap_add = get64(p + 12);
		h->atomic.compare = get64(p + 20);
		p += 28;
	}
	if (info->mask & MG_H_AETH) {
		h->aeth.syndrome = p[0];
		h->aeth.msn = get24(p + 1);
		p += 4;
	}
	if (info->mask & MG_H_ATOMICACK) {
		h->atomic_orig = get64(p);
		p += 8;
	}
	if (info->mask & MG_H_IMM) {
		h->imm = get32(p);
		p += 4;
	}
	if (info->mask & MG_H_IETH) {
		h->ieth = get32(p);
		p += 4;
	}
	if (info->mask & MG_H_MEH)
		parse_meh(p, &h->meh);
	return 0;
}

size_t mg_hdrs_build(const struct mg_hdrs *h, uint8_t *out)
{
	const uint32_t mask = mg_opinfo[h->opcode].mask;
	uint8_t *p = out;

	*p++ = h->opcode;
	*p++ = (uint8_t)(h->solicited << 7 | h->migreq << 6 | (h->pad & 3) << 4);
	p = put16(p, h->pkey);
	p = put32(p, (uint32_t)h->fecn << 31 | (uint32_t)h->becn << 30 |
			     (h->capable ? (uint32_t)MG_BTH4_CAPABLE << 24 : 0) |
			     (h->dest_qpn & MG_QPN_MASK));
	p = put32(p, (uint32_t)h->ackreq << 31 | (h->psn & MG_PSN_MASK));

	if (mask & MG_H_DETH) {
		p = put32(p, h->deth.qkey);
		p = put32(p, h->deth.src_qpn & MG_QPN_MASK);
	}
	if (mask & MG_H_XRCETH)
		p = put32(p, h->xrc_srqn & MG_QPN_MASK);
	if (mask & MG_H_FETH)
		p = put32(p, (uint32_t)(h->feth.level & 3) << 4 | (h->feth.type & 0x0f));
	if (mask & MG_H_RETH) {
		p = put64(p, h->reth.va);
		p = put32(p, h->reth.rkey);
		p = put32(p, h->reth.length);
	}
	if (mask & MG_H_ATOMIC) {
		p = put64(p, h->atomic.va);
		p = put32(p, h->atomic.rkey);
		p = put64(p, h->atomic.swap_add);
		p = put64(p, h->atomic.compare);
	}
	if (mask & MG_H_AETH)
		p = put32(p, (uint32_t)h->aeth.syndrome << 24 | (h->aeth.msn & MG_PSN_MASK));
	if (mask & MG_H_ATOMICACK)
		p = put64(p, h->atomic_orig);
	if (mask & MG_H_IMM)
		p = put32(p, h->imm);
	if (mask & MG_H_IETH)
		p = put32(p, h->ieth);
	if (mask & MG_H_MEH)
		p = build_meh(&h->meh, p);
	return (size_t)(p - out);
}

/* IBA table 45, in units of 10 us, in the order of length. Code 0 is the longest. */
static const uint32_t rnr_10us[32] = {
	65536, 1,   2,	 3,   4,    6,	  8,	12,   16,   24,	  32,	48,    64,    96,    128,   192,
	256,   384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152,
};

uint64_t mg_rnr_timer_ns(unsigned field)
{
	return (uint64_t)rnr_10us[field & 31] * 10000u;
}

unsigned mg_rnr_timer_field(uint64_t ns)
{
	unsigned field;

	for (field = 1; field < 32; field++) {
		if (mg_rnr_timer_ns(field) >= ns)
			return field;
	}
	return 0;
}
