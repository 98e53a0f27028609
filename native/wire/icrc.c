/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * icrc.c - the invariant CRC (IBA 7.8.1, RoCEv2 annex A17.3.3).
 *
 * CRC-32 of Ethernet over 64 one-bits (where the LRH of native InfiniBand would be), the IP and
 * UDP headers and the packet, with everything a router or switch may change replaced by ones:
 * TOS / traffic class and flow label, TTL / hop limit, both checksums and BTH byte 4.
 */
#include "wire/wire.h"

#include <libdeflate.h>
#include <string.h>

#define ONES_CRC 0x2144df1cu /* CRC-32 of the 64 one-bits */
#define PSEUDO_MAX 60u	     /* IPv6 and UDP headers and the BTH */
#define STAGE_LEN 512u
#define STAGE_PIECE 256u /* pieces longer than this are not worth copying */

#define IP4_LEN 20u
#define IP6_LEN 40u
#define UDP_LEN 8u
#define IP4_ID_OFF 4u
#define MAX_UDP_PAYLOAD (65535u - IP4_LEN - UDP_LEN) /* IPv6 jumbograms aside */

static inline uint8_t *put16(uint8_t *p, size_t v)
{
	p[0] = (uint8_t)(v >> 8);
	p[1] = (uint8_t)v;
	return p + 2;
}

/*
 * Write the masked IP and UDP headers and BTH. `len`: UDP payload without the ICRC. Every field
 * is written by constant-size stores: this is a good part of a small packet's cost.
 */
static inline size_t pseudo_build(const struct mg_flow *f, const uint8_t bth[MG_BTH_LEN], size_t len,
				  uint8_t *out)
{
	const size_t udp_len = UDP_LEN + len + MG_ICRC_LEN;
	uint8_t *p = out;

	if (mg_gid_is_v4(f->dst)) {
		p = put16(p, 0x45ff);
		p = put16(p, IP4_LEN + udp_len);
		p = put16(p, f->ip_id);
		p = put16(p, f->df ? 0x4000 : 0);
		p = put16(p, 0xff11);
		p = put16(p, 0xffff);
		memcpy(p, f->src + 12, 4);
		memcpy(p + 4, f->dst + 12, 4);
		p += 8;
	} else {
		memcpy(p, "\x6f\xff\xff\xff", 4);
		p = put16(p + 4, udp_len);
		p = put16(p, 0x11ff);
		memcpy(p, f->src, 16);
		memcpy(p + 16, f->dst, 16);
		p += 32;
	}
	p = put16(p, f->sport);
	p = put16(p, f->dport);
	p = put16(p, udp_len);
	p = put16(p, 0xffff);
	memcpy(p, bth, MG_BTH_LEN);
	p[4] = 0xff;
	return (size_t)(p + MG_BTH_LEN - out);
}

uint32_t mg_icrc(const struct mg_flow *flow, const struct iovec *iov, int n_iov, size_t len)
{
	_Alignas(64) uint8_t stage[STAGE_LEN];
	const uint8_t *piece = iov[0].iov_base;
	size_t left = iov[0].iov_len;
	uint32_t crc = ONES_CRC;
	size_t fill;
	int i = 0;

	_Static_assert(PSEUDO_MAX + STAGE_PIECE <= STAGE_LEN, "headers and one piece fit");
	fill = pseudo_build(flow, piece, len, stage);
	piece += MG_BTH_LEN;
	left -= MG_BTH_LEN;
	for (;;) {
		if (left > STAGE_PIECE) {
			crc = libdeflate_crc32(crc, stage, fill);
			crc = libdeflate_crc32(crc, piece, left);
			fill = 0;
		} else if (left) {
			if (fill + left > STAGE_LEN) {
				crc = libdeflate_crc32(crc, stage, fill);
				fill = 0;
			}
			memcpy(stage + fill, piece, left);
			fill += left;
		}
		if (++i >= n_iov)
			break;
		piece = iov[i].iov_base;
		left = iov[i].iov_len;
	}
	return fill ? libdeflate_crc32(crc, stage, fill) : crc;
}

/*
 * Finding an unknown IPv4 id.
 *
 * The CRC register is a polynomial over GF(2) modulo the CRC's; bit 31 of a value holds the
 * coefficient of x^0, bit 0 that of x^31 (the CRC is a reflected one). CRCs of two messages of one
 * length that differ in the id alone, by d, differ by d * x^(32 + 8n) where n bytes follow the id.
 * Multiplied by x^-(32 + 8n) that gives d back: a polynomial of degree below 16. A random error
 * looks like one with a chance of 2^-16; no single-bit error in a packet of up to 9000 bytes does
 * (tests/wire tries every position).
 *
 * back[k][i] is x^(-8 * i * 16^k): four multiplications take any n back. tests/wire recomputes it.
 */
static const uint32_t back[4][16] = {
	{0x80000000, 0x6567cb95, 0xd7125358, 0x1f81b6e1, 0x5b358fd3, 0xeb21cebf, 0x2ff880c5, 0x97fc423c,
	 0x2e9bb40b, 0x2fb98a7d, 0xd6f6fa3c, 0x2059d4a0, 0x36511375, 0x525983aa, 0x31619cb3, 0x0f125cae},
	{0x80000000, 0x12a59a49, 0x8df9403d, 0x9d764201, 0x5139de12, 0x17958e0b, 0xdb1c4863, 0xc31ec6b9,
	 0xba340226, 0x6b85d37b, 0x0ba861bc, 0x39b0d61c, 0xfb844d1f, 0xc9771684, 0x8073ef0c, 0xc3f881be},
	{0x80000000, 0x29c45641, 0x12fbc105, 0x8b712bc1, 0xecd30c55, 0x930588dc, 0x3c4c471a, 0x25cd5760,
	 0x3755ebd8, 0xe264a9e0, 0xc3a68b42, 0x219c9d64, 0x75cc86fa, 0xebcce135, 0x84773a36, 0x4e1b970f},
	{0x80000000, 0x24ee460c, 0x23783fcf, 0xea8683d0, 0x479933fc, 0x1e25ac62, 0x6523628c, 0x3704e154,
	 0xa39442a5, 0x4ff1fa8c, 0xbc26806e, 0x1b2888be, 0x7910287d, 0xb8721901, 0x7bea74c8, 0x655ffa6b},
};

/* a * b modulo the CRC's polynomial, reflected. */
static uint32_t gf2_mul(uint32_t a, uint32_t b)
{
	uint32_t r = 0;

	while (b) {
		r ^= a & -(b >> 31);
		b <<= 1;
		a = a >> 1 ^ (0xedb88320u & -(a & 1));
	}
	return r;
}

bool mg_icrc_check(const struct mg_flow *flow, const uint8_t *buf, size_t len, uint16_t *ip_id)
{
	struct iovec iov = {.iov_base = (void *)(uintptr_t)buf};
	uint32_t diff, stored;
	unsigned k;
	size_t n;

	if (len < MG_BTH_LEN + MG_ICRC_LEN || len > MAX_UDP_PAYLOAD)
		return false;
	iov.iov_len = len - MG_ICRC_LEN;
	memcpy(&stored, buf + iov.iov_len, sizeof(stored));
	diff = stored ^ mg_icrc(flow, &iov, 1, iov.iov_len);
	if (diff) {
		if (!mg_gid_is_v4(flow->dst))
			return false;
		/* Behind the id: the rest of IP and UDP, the payload, and the 4 bytes of x^32. */
		n = IP4_LEN - IP4_ID_OFF - 2 + UDP_LEN + iov.iov_len + 4;
		for (k = 0; k < 4; k++, n >>= 4)
			diff = gf2_mul(diff, back[k][n & 15]);
		if (diff & 0xffff) /* degree 16 or more: not the id */
			return false;
		/* First byte of the id in bits 16-23, second in 24-31. */
		diff = (diff >> 16 & 0xff) << 8 | diff >> 24;
	}
	if (ip_id)
		*ip_id = flow->ip_id ^ (uint16_t)diff;
	return true;
}
