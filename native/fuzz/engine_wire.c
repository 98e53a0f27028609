/* SPDX-License-Identifier: BSD-3-Clause */
/* engine_wire.c - fuzz_engine: packets on their way, mutated, forged; the stand-in. */
#include "fuzz/engine.h"

static void check_headers(struct side *s, const struct mg_pkt *p, const struct flying *f)
{
	struct side *peer = other(s);
	struct mg_hdrs h;
	unsigned q = 0;

	FUZZ_CHECK(mg_hdrs_parse(f->buf, f->len, &h) == 0);
	FUZZ_CHECK(h.capable && h.pkey == MG_PKEY_DEFAULT);
	FUZZ_CHECK(h.pad == p->pad && !((h.payload_len + h.pad) & 3));
	FUZZ_CHECK(memcmp(&p->src, &s->addr, sizeof(s->addr)) == 0);
	while (q < N_QP && peer->c[q].qpn != h.dest_qpn)
		q++;
	FUZZ_CHECK(q < N_QP && h.payload_len <= MTU(q));
	if (h.mask & MG_P_CONTROL) {
		FUZZ_CHECK(h.meh.version == 1 && h.meh.src_qpn == s->c[q].qpn);
		s->c[q].meh = h.meh;
	} else {
		peer->c[q].seen[!!(h.mask & MG_P_REQUEST)] = h.psn;
	}
}

size_t transmit(struct side *s, unsigned flags, size_t max)
{
	static struct mg_pkt out[8];
	size_t n;

	max = max < 8 ? max : 8;
	if (max > WIRE_LEN - w.flying)
		max = WIRE_LEN - w.flying;
	n = max ? mg_tx(s->e, now_of(s), flags, out, max) : 0;
	FUZZ_CHECK(n <= max && !(n && s->stopped));
	for (size_t i = 0; i < n; i++) {
		const struct mg_pkt *p = &out[i];
		struct flying *f = &w.wire[w.flying++];
		size_t len = p->hdr_len;

		FUZZ_CHECK(p->len <= PKT_MAX && p->hdr_len <= p->len && p->pad <= 3 &&
			   p->n_iov <= MG_MAX_SGE);
		memcpy(f->buf, p->hdr, p->hdr_len);
		for (unsigned k = 0; k < p->n_iov; k++) {
			FUZZ_CHECK(len + p->iov[k].iov_len <= p->len);
			memcpy(f->buf + len, p->iov[k].iov_base, p->iov[k].iov_len);
			len += p->iov[k].iov_len;
		}
		FUZZ_CHECK(len + p->pad + MG_ICRC_LEN == p->len);
		memset(f->buf + len, 0, p->pad + MG_ICRC_LEN);
		f->len = p->len;
		f->meta = (struct mg_rx){p->src, p->dst, p->sport, p->tclass, p->hop_limit};
		trace_packet(s, "sends", f->buf, f->len);
		check_headers(s, p, f);
	}
	return n;
}

/* A RESUME of a peer that was moved meanwhile: the stand-in notes where it is. */
static bool peer_moved(struct mg_dump_qp *qp, const struct mg_meh *meh)
{
	const int32_t newer = (int32_t)(meh->epoch - qp->peer_epoch);

	if (meh->src_qpn != qp->peer_qpn || !meh->epoch || newer < 0)
		return false;
	if (qp->have_peer_token ? memcmp(meh->token, qp->peer_token, 16) : memcmp(meh->gid, qp->peer_gid, 16))
		return false;
	if (newer) {
		memcpy(qp->peer_gid, meh->gid, 16);
		qp->peer_epoch = meh->epoch;
	}
	return true;
}

/*
 * As src/migroce/agent/standin.py (docs/protocol.md, section 4): answer for a stopped container, or at
 * an address it has moved away from (`to`: the new one).
 */
static void stand_in(struct mg_dump_qp qps[N_QP], const struct mg_addr *to, const struct mg_rx *meta,
		     const uint8_t *buf, size_t len)
{
	struct mg_hdrs h, r = {.pkey = MG_PKEY_DEFAULT, .capable = true, .opcode = MG_OP_ACK};
	struct flying *f = &w.wire[w.flying];
	struct mg_dump_qp *qp = NULL;

	if (w.options & OPT_NO_STANDIN || w.flying == WIRE_LEN || mg_hdrs_parse(buf, len, &h) || !h.capable)
		return;
	for (unsigned q = 0; q < N_QP; q++) {
		if (qps[q].qpn == h.dest_qpn)
			qp = &qps[q];
	}
	if (!qp || (h.opcode != MG_OP_RESUME && memcmp(meta->src.gid, qp->peer_gid, 16)) ||
	    (h.opcode == MG_OP_RESUME && !peer_moved(qp, &h.meh)))
		return;
	r.dest_qpn = qp->peer_qpn;
	r.aeth.msn = qp->msn;
	if (to) {
		r.opcode = MG_OP_RESUME;
		r.meh = (struct mg_meh){
			.version = 1, .src_qpn = qp->qpn, .epoch = qp->epoch + 1, .psn = qp->epsn};
		memcpy(r.meh.token, qp->token, 16);
		memcpy(r.meh.gid, to->gid, 16);
	} else if (h.opcode == MG_OP_RESUME) {
		r.psn = (qp->epsn - 1) & MG_PSN_MASK;
		r.aeth.syndrome = MG_AETH_ACK;
	} else if (h.mask & MG_P_REQUEST) {
		r.psn = h.psn;
		r.aeth.syndrome = MG_NAK_STOPPED;
	} else {
		return;
	}
	f->len = mg_hdrs_build(&r, f->buf) + MG_ICRC_LEN;
	memset(f->buf + f->len - MG_ICRC_LEN, 0, MG_ICRC_LEN);
	f->meta = (struct mg_rx){.src = meta->dst, .sport = 0xc000, .hop_limit = 64};
	memcpy(f->meta.dst.gid, qp->peer_gid, 16);
	trace_packet(NULL, "stand-in sends", f->buf, f->len);
	w.flying++;
}

void hand_over(const struct mg_rx *meta, const uint8_t *buf, size_t len)
{
	uint8_t *exact = malloc(len ? len : 1); /* of its own, so that reading beyond is seen */

	FUZZ_CHECK(exact);
	if (len)
		memcpy(exact, buf, len);
	for (int i = 0; i < 2; i++) {
		struct side *s = &w.s[i];

		if (memcmp(&s->addr, &meta->dst, sizeof(meta->dst)) == 0) {
			trace_packet(s, s->stopped ? "is stopped, gets" : "gets", exact, len);
			mg_rx(s->e, now_of(s), meta, exact, len); /* drops it when stopped */
			if (s->stopped)
				stand_in(s->at_stop, NULL, meta, exact, len);
		}
		for (unsigned k = 0; k < s->n_left; k++) {
			if (memcmp(&s->left[k].from, &meta->dst, sizeof(meta->dst)) == 0)
				stand_in(s->left[k].qp, &s->left[k].to, meta, exact, len);
		}
	}
	free(exact);
}

void deliver(size_t i, bool keep)
{
	const struct flying f = w.wire[i]; /* a stand-in's answer changes the array */

	if (!keep)
		memmove(&w.wire[i], &w.wire[i + 1], (--w.flying - i) * sizeof(w.wire[0]));
	hand_over(&f.meta, f.buf, f.len);
}

void deliver_mutated(struct fuzz_in *in, size_t i)
{
	struct flying f = w.wire[i];
	const uint8_t how = fuzz_u8(in);

	for (unsigned k = how & 3; k > 0; k--)
		f.buf[fuzz_u8(in) % (f.len < 80 ? f.len : 80)] ^= fuzz_u8(in);
	if (how & 4)
		f.len -= fuzz_u8(in) % f.len;
	if (how & 8 && f.len + 4 <= PKT_MAX)
		f.len += 4;
	if (how & 16)
		f.meta.src.gid[15] ^= 1;
	hand_over(&f.meta, f.buf, f.len);
}

/* Bounds are where mistakes are: the region's first and last `len` bytes, those and one more, or anything. */
static uint64_t some_address(struct fuzz_in *in, const struct side *s, uint8_t how, uint32_t len)
{
	const uint64_t base = how & 8 ? KEPT_VA : DATA_VA;
	const uint64_t end = base + (how & 8 ? KEPT_LEN : DATA_LEN);
	const uint8_t where = fuzz_u8(in);

	switch (where & 7) {
	case 0: return end - len;
	case 1: return end - len + 1;
	case 2: return base - 1;
	case 3: return base + (uint64_t)(int64_t)(int16_t)fuzz_u16(in);
	case 4: return (uint64_t)-1 - where;
	default: return base;
	}
}

static uint32_t some_rkey(const struct side *s, uint8_t how)
{
	if (!(how & 8))
		return how & 16 ? mg_mw_rkey(s->mw[how >> 5 & 1]) : mg_mr_rkey(s->data);
	return mg_mr_rkey(how & 16 ? s->kept : s->foreign);
}

static uint32_t some_length(struct fuzz_in *in, uint32_t mtu)
{
	const uint8_t what = fuzz_u8(in);

	switch (what & 7) {
	case 0: return mtu;
	case 1: return mtu + 1 + (what >> 3);
	case 2: return fuzz_u16(in) % 1024;
	case 3: return 0;
	default: return what >> 3;
	}
}

void forge(struct fuzz_in *in, struct side *to, unsigned q)
{
	static const uint8_t opcodes[] = {0,  1,  2,  3,  4,  5,  6,  7,  8,	9,    10,   11,	  12, 13, 14,
					  15, 16, 17, 18, 19, 20, 22, 23, 0xc0, 0xc1, 0xc2, 0xc3, 28, 29};
	const struct side *from = other(to);
	uint8_t buf[MG_HDR_MAX + 1024 + 3 + MG_ICRC_LEN];
	struct mg_rx meta = {from->addr, to->addr, 0xc000, 0, 64};
	const uint8_t how = fuzz_u8(in), psn = fuzz_u8(in);
	struct mg_hdrs h = {
		.pkey = MG_PKEY_DEFAULT, .dest_qpn = to->c[q].qpn, .capable = how & 1, .ackreq = how & 2};
	uint32_t mask;
	size_t len;

	h.opcode = how & 4 ? fuzz_u8(in) : opcodes[fuzz_u8(in) % sizeof(opcodes)];
	mask = mg_opinfo[h.opcode].mask;
	h.psn = (to->c[q].seen[!!(mask & MG_P_REQUEST)] + (psn < 200 ? psn % 3u : (uint32_t)(int8_t)psn)) &
		MG_PSN_MASK;
	if (mask & MG_H_PAYLOAD)
		h.payload_len = some_length(in, MTU(q));
	h.pad = -h.payload_len & 3;
	if (mask & MG_H_RETH) {
		h.reth.length = h.payload_len;
		if (how & 32 || !(mask & MG_P_ONLY) || mask & MG_P_READ)
			h.reth.length = how & 128 ? fuzz_u32(in) : fuzz_u16(in) % (DATA_LEN + 64);
		h.reth.va = some_address(in, to, how, h.reth.length);
		h.reth.rkey = some_rkey(to, how);
	}
	if (mask & MG_H_ATOMIC) {
		h.atomic.va = some_address(in, to, how, 8);
		h.atomic.rkey = some_rkey(to, how);
		h.atomic.swap_add = fuzz_u32(in);
	}
	if (mask & MG_H_FETH) {
		h.feth.type = how >> 3 & 3;
		h.feth.level = how >> 6 & 3;
	}
	if (mask & MG_H_IETH)
		h.ieth = how & 8 ? mg_mw_rkey(to->mw[1]) : some_rkey(to, how);
	if (mask & MG_H_AETH) {
		h.aeth.syndrome = fuzz_u8(in);
		h.aeth.msn = fuzz_u16(in);
	}
	if (mask & MG_H_MEH) {
		h.meh = (how & 64 ? to : from)->c[q].meh;
		h.meh.epoch += (uint32_t)(int8_t)fuzz_u8(in);
		h.meh.psn = h.psn;
		memcpy(h.meh.gid, from->addr.gid, 16);
		if (how & 128)
			h.meh.gid[15] = fuzz_u8(in);
		if (how & 32)
			h.meh.token[0] ^= 1;
	}
	len = mg_hdrs_build(&h, buf);
	memset(buf + len, 0xee, h.payload_len + h.pad + MG_ICRC_LEN);
	hand_over(&meta, buf, len + h.payload_len + h.pad + MG_ICRC_LEN);
}
