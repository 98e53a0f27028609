/* Invariant: no packet, order of packets or order of calls breaks memory, completion order or the engine's word. */
/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Two engines with two connections between them. The input is a program: post, transmit, deliver, lose,
 * repeat, reorder, forge, move time, stop, resume elsewhere, reset, ... A stand-in answers for a stopped
 * engine and at the addresses it has left. Checked besides what the sanitizers see:
 *
 * - every packet sent is well-formed, bears the capability bit, fits the path MTU and its peer;
 * - completions come in posting order, once each; none that was asked for is missing;
 * - memory without remote rights is never written, nor anything outside a registered region;
 * - as long as nothing was forged or misused, the network coming back lets everything complete.
 */
#include "fuzz/fuzz.h"
#include "transport/dump.h"
#include "transport/engine.h"
#include "wire/wire.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdarg.h>

#define MTU(q) ((q) ? 512u : 256u) /* of connection q: with and without a copy of the payload */
#define DATA_LEN 4096u		   /* all rights */
#define KEPT_LEN 512u		   /* no QP may write here */
#define KEPT_BYTE 0x5a
#define DATA_VA 0x100000u /* not the address, so that an input does the same in every process */
#define KEPT_VA 0x200000u
#define DEPTH 16u
#define CQ_DEPTH 1024u
#define N_QP 2u
#define MAX_STEPS 400
#define MAX_MOVES 6u
#define MAX_ROUNDS 20000
#define WIRE_LEN 64u
#define PKT_MAX (MG_HDR_MAX + MTU(1) + 3 + MG_ICRC_LEN)
#define IDS 1024u
#define START 1000000000u /* ns */

struct flying {
	struct mg_rx meta;
	size_t len;
	uint8_t buf[PKT_MAX];
};

struct conn {
	struct mg_qp *qp;
	uint32_t qpn;
	uint64_t send_next, send_done; /* next to post, next to complete; a wr_id is this * N_QP + index */
	uint64_t recv_next, recv_done;
	uint64_t send_base, recv_base; /* the first since the last reset */
	uint8_t signaled[IDS];
	uint32_t seen[2];  /* PSN of the last response and of the last request sent to it */
	struct mg_meh meh; /* the last one it sent */
};

/* An address that was left, and what the stand-in there knows. */
struct left {
	struct mg_addr from, to;
	struct mg_dump_qp qp[N_QP];
};

struct side {
	struct mg_engine *e;
	struct mg_pd *pd, *other_pd;
	struct mg_mr *data, *kept, *foreign;
	struct mg_mw *mw[2]; /* of type 1 and 2 */
	uint8_t *data_mem, *kept_mem;
	struct mg_cq *send_cq, *recv_cq;
	struct conn c[N_QP];
	struct mg_addr addr;
	mg_time clock; /* what its clock is ahead of the world's */
	bool stopped;
	struct mg_dump_qp at_stop[N_QP];
	struct left left[MAX_MOVES];
	unsigned n_left;
};

static struct world {
	struct side s[2];
	struct flying wire[WIRE_LEN];
	size_t flying;
	mg_time now;
	uint64_t seed;
	uint8_t options;
	bool honest;  /* nothing forged, misused or torn down: everything must complete */
	bool overrun; /* a CQ was overrun: completions are missing */
} w;

#define OPT_FEW_RETRIES 1
#define OPT_SMALL_CQ 2
#define OPT_SIG_ALL 4
#define OPT_NO_STANDIN 8
#define OPT_HONEST 16 /* nothing is forged or misused: losses, time and moves only */

/* FUZZ_TRACE=1 in the environment: what happens, for whoever reads a reproducer. */
static bool tracing;

__attribute__((format(printf, 2, 3))) static void trace(const struct side *s, const char *fmt, ...)
{
	va_list args;

	if (!tracing)
		return;
	fprintf(stderr, "%9.3f ms  %c  ", (double)(w.now - START) / 1e6, !s ? '-' : s == w.s ? 'A' : 'B');
	va_start(args, fmt);
	vfprintf(stderr, fmt, args);
	va_end(args);
	fputc('\n', stderr);
}

static void trace_packet(const struct side *s, const char *what, const uint8_t *buf, size_t len)
{
	struct mg_hdrs h;

	if (!tracing || mg_hdrs_parse(buf, len, &h))
		return;
	trace(s, "%s qpn %06x %s psn %06x%s syndrome %02x msn %u epoch %u payload %u", what, h.dest_qpn,
	      mg_opinfo[h.opcode].name, h.psn, h.ackreq ? " A" : "", h.aeth.syndrome, h.aeth.msn, h.meh.epoch,
	      h.payload_len);
}

/* Whether to do something that ends the promise that everything completes. */
static bool misuse(bool wanted)
{
	if (!wanted || w.options & OPT_HONEST)
		return false;
	w.honest = false;
	return true;
}

static void random_bytes(void *arg, void *buf, size_t n)
{
	uint8_t *p = buf;

	(void)arg;
	while (n--) {
		w.seed ^= w.seed << 13;
		w.seed ^= w.seed >> 7;
		w.seed ^= w.seed << 17;
		*p++ = (uint8_t)(w.seed >> 32);
	}
}

static void cq_event(void *arg, struct mg_cq *cq)
{
	const struct side *s = arg;

	FUZZ_CHECK(cq == s->send_cq || cq == s->recv_cq);
}

static void async_event(void *arg, enum ibv_event_type type, void *object)
{
	const struct side *s = arg;

	FUZZ_CHECK(object == s->c[0].qp || object == s->c[1].qp || object == s->send_cq ||
		   object == s->recv_cq);
	if (type == IBV_EVENT_CQ_ERR)
		w.overrun = true;
	if (type != IBV_EVENT_COMM_EST && type != IBV_EVENT_SQ_DRAINED)
		w.honest = false;
}

static const struct mg_ops ops = {random_bytes, cq_event, async_event};

static mg_time now_of(const struct side *s)
{
	return w.now + s->clock;
}

static struct side *other(const struct side *s)
{
	return &w.s[s == w.s];
}

/* ---- set-up ----------------------------------------------------------------------------------- */

static void connect_qp(struct side *s, unsigned q)
{
	const unsigned access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ |
				IBV_ACCESS_REMOTE_ATOMIC | MG_ACCESS_FLUSH_GLOBAL;
	const uint32_t psn[2] = {0xfffff8 + q, 0x000100}; /* one side's PSNs wrap soon */
	const uint8_t retries = w.options & OPT_FEW_RETRIES ? 1 : 7;
	struct ibv_qp_attr a = {.port_num = 1, .qp_access_flags = access};
	struct mg_qp *qp = s->c[q].qp;

	a.qp_state = IBV_QPS_INIT;
	FUZZ_CHECK(!mg_qp_modify(qp, now_of(s), &a,
				 IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS));
	a.qp_state = IBV_QPS_RTR;
	a.path_mtu = q ? IBV_MTU_512 : IBV_MTU_256;
	a.dest_qp_num = other(s)->c[q].qpn;
	a.rq_psn = psn[other(s) - w.s];
	a.max_dest_rd_atomic = 4;
	a.min_rnr_timer = 1;
	a.ah_attr.is_global = 1;
	a.ah_attr.port_num = 1;
	a.ah_attr.grh.sgid_index = 1;
	a.ah_attr.grh.hop_limit = 64;
	memcpy(a.ah_attr.grh.dgid.raw, other(s)->addr.gid, 16);
	FUZZ_CHECK(!mg_qp_modify(qp, now_of(s), &a,
				 IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN |
					 IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER));
	s->c[q].seen[0] = psn[s - w.s] - 1;
	s->c[q].seen[1] = a.rq_psn - 1;
	a.qp_state = IBV_QPS_RTS;
	a.timeout = 8;
	a.retry_cnt = retries;
	a.rnr_retry = retries;
	a.sq_psn = psn[s - w.s];
	a.max_rd_atomic = 4;
	FUZZ_CHECK(!mg_qp_modify(qp, now_of(s), &a,
				 IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
					 IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC));
}

static void create_windows(struct side *s)
{
	for (int i = 0; i < 2; i++)
		FUZZ_CHECK(!mg_mw_create(s->pd, i ? IBV_MW_TYPE_2 : IBV_MW_TYPE_1, &s->mw[i]));
}

static void create_side(struct side *s, uint8_t last)
{
	const unsigned all = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ |
			     IBV_ACCESS_REMOTE_ATOMIC | IBV_ACCESS_MW_BIND | MG_ACCESS_FLUSH_GLOBAL;
	const uint32_t depth = w.options & OPT_SMALL_CQ ? 3 : CQ_DEPTH;
	struct mg_config cfg = {.qpn_base = 0x40000, .qpn_count = 0x40000, .max_path_mtu = 4096};
	struct ibv_qp_init_attr_ex init = {.qp_type = IBV_QPT_RC, .sq_sig_all = !!(w.options & OPT_SIG_ALL)};
	struct mg_qp_parts parts;

	memcpy(cfg.addr.gid, (const uint8_t[16]){[10] = 0xff, 0xff, 10, 0, 0, last}, 16);
	s->addr = cfg.addr;
	s->clock = (mg_time)last << 50;
	s->e = mg_engine_create(&cfg, &ops, s);
	FUZZ_CHECK(s->e);
	s->pd = mg_pd_create(s->e);
	s->other_pd = mg_pd_create(s->e);
	s->data_mem = malloc(DATA_LEN);
	s->kept_mem = malloc(KEPT_LEN);
	FUZZ_CHECK(s->pd && s->other_pd && s->data_mem && s->kept_mem);
	memset(s->data_mem, last, DATA_LEN);
	memset(s->kept_mem, KEPT_BYTE, KEPT_LEN);
	FUZZ_CHECK(!mg_mr_create(s->pd, s->data_mem, DATA_LEN, DATA_VA, all, &s->data));
	FUZZ_CHECK(!mg_mr_create(s->pd, s->kept_mem, KEPT_LEN, KEPT_VA, IBV_ACCESS_REMOTE_READ, &s->kept));
	/* All rights, but of a protection domain that no QP is in. */
	FUZZ_CHECK(!mg_mr_create(s->other_pd, s->kept_mem, KEPT_LEN, KEPT_VA, all, &s->foreign));
	create_windows(s);
	FUZZ_CHECK(!mg_cq_create(s->e, depth, s, &s->send_cq) && !mg_cq_create(s->e, depth, s, &s->recv_cq));
	init.cap = (struct ibv_qp_cap){DEPTH, DEPTH, 4, 4, 64};
	parts = (struct mg_qp_parts){.pd = s->pd, .send_cq = s->send_cq, .recv_cq = s->recv_cq};
	for (unsigned q = 0; q < N_QP; q++) {
		struct conn *c = &s->c[q];

		FUZZ_CHECK(!mg_qp_create(s->e, &parts, &init, s, &c->qp));
		FUZZ_CHECK(mg_qp_owner(c->qp) == s);
		c->qpn = mg_qp_num(c->qp);
		FUZZ_CHECK(c->qpn >= cfg.qpn_base && c->qpn < cfg.qpn_base + cfg.qpn_count && c->qpn > 1);
	}
	FUZZ_CHECK(s->c[0].qpn != s->c[1].qpn);
}

/* ---- packets ---------------------------------------------------------------------------------- */

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

/* Put onto the wire what side `s` has to send, at most `max` packets. */
static size_t transmit(struct side *s, unsigned flags, size_t max)
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

static void hand_over(const struct mg_rx *meta, const uint8_t *buf, size_t len)
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

/* Deliver packet `i`; it goes on flying if it is kept. */
static void deliver(size_t i, bool keep)
{
	const struct flying f = w.wire[i]; /* a stand-in's answer changes the array */

	if (!keep)
		memmove(&w.wire[i], &w.wire[i + 1], (--w.flying - i) * sizeof(w.wire[0]));
	hand_over(&f.meta, f.buf, f.len);
}

/* A captured packet with bytes changed, or cut, or with something behind it, or from elsewhere. */
static void deliver_mutated(struct fuzz_in *in, size_t i)
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

/* A packet nobody sent, of the kind and with the numbers the receiver may expect. */
static void forge(struct fuzz_in *in, struct side *to, unsigned q)
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

/* ---- the application -------------------------------------------------------------------------- */

/* What atomics, flushes and windows need besides, or (if `wrong`) anything. */
static void specialize(struct fuzz_in *in, struct side *s, struct ibv_send_wr *wr, bool wrong)
{
	static struct ibv_mw mw; /* looked at while posting only */
	static struct ibv_mr mr;
	const struct mg_mw *window = s->mw[wrong && fuzz_u8(in) & 1];
	const uint32_t rkey = wr->wr.rdma.rkey;

	switch ((int)wr->opcode) {
	case MG_WR_FLUSH:
		wr->num_sge = 0;
		wr->wr.atomic.compare_add = wrong ? fuzz_u16(in) : 1 | (fuzz_u8(in) & 1) << 8;
		wr->wr.atomic.swap = fuzz_u16(in) % (wrong ? 65536 : DATA_LEN);
		wr->wr.atomic.rkey = rkey;
		break;
	case IBV_WR_ATOMIC_CMP_AND_SWP:
	case IBV_WR_ATOMIC_FETCH_AND_ADD:
		wr->wr.atomic.compare_add = fuzz_u8(in);
		wr->wr.atomic.swap = fuzz_u8(in);
		wr->wr.atomic.rkey = rkey;
		break;
	case MG_WR_ATOMIC_WRITE:
		if (wr->num_sge && !wrong) {
			wr->num_sge = 1;
			wr->sg_list[0].length = 8;
			wr->sg_list[0].addr = DATA_VA + fuzz_u8(in);
			wr->send_flags &= ~(unsigned)IBV_SEND_INLINE;
		}
		break;
	case IBV_WR_LOCAL_INV:
	case IBV_WR_SEND_WITH_INV:
		wr->invalidate_rkey = fuzz_u8(in) & 1 ? mg_mw_rkey(window) : fuzz_u32(in);
		break;
	case IBV_WR_BIND_MW:
		mw = (struct ibv_mw){.rkey = mg_mw_rkey(window)};
		mr = (struct ibv_mr){.lkey = mg_mr_lkey(wrong && fuzz_u8(in) & 1 ? s->kept : s->data)};
		wr->bind_mw.mw = &mw;
		wr->bind_mw.rkey = mw.rkey + (wrong ? fuzz_u16(in) : 0);
		wr->bind_mw.bind_info = (struct ibv_mw_bind_info){
			.mr = &mr,
			.addr = DATA_VA + (wrong ? fuzz_u16(in) : fuzz_u8(in)),
			.length = fuzz_u8(in),
			.mw_access_flags = IBV_ACCESS_REMOTE_READ |
					   (fuzz_u8(in) & 1 ? IBV_ACCESS_REMOTE_WRITE : 0) |
					   (wrong && fuzz_u8(in) & 1 ? IBV_ACCESS_ZERO_BASED : 0)};
		break;
	}
}

static void post_send(struct fuzz_in *in, struct side *s, unsigned q)
{
	static const enum ibv_wr_opcode opcodes[] = {IBV_WR_SEND, IBV_WR_SEND_WITH_IMM, IBV_WR_RDMA_WRITE,
						     IBV_WR_RDMA_WRITE_WITH_IMM, IBV_WR_RDMA_READ};
	static const enum ibv_wr_opcode special[] = {IBV_WR_ATOMIC_CMP_AND_SWP,
						     IBV_WR_ATOMIC_FETCH_AND_ADD,
						     IBV_WR_BIND_MW,
						     (enum ibv_wr_opcode)MG_WR_FLUSH,
						     (enum ibv_wr_opcode)MG_WR_ATOMIC_WRITE,
						     IBV_WR_LOCAL_INV, /* those from here on may well fail */
						     IBV_WR_SEND_WITH_INV};
	const uint8_t what = fuzz_u8(in), how = fuzz_u8(in);
	const struct side *peer = other(s);
	struct conn *c = &s->c[q];
	struct ibv_sge sge[5];
	struct ibv_send_wr wr = {
		.wr_id = c->send_next * N_QP + q, .opcode = opcodes[what % 5], .sg_list = sge};
	struct ibv_send_wr *bad = NULL;
	int err;

	if (what >= 200 && what < 240)
		wr.opcode = special[what % 5];
	if (what >= 250 && !(w.options & OPT_HONEST))
		wr.opcode = special[what - 250 + 1];
	wr.num_sge = what < 240 || w.options & OPT_HONEST ? (how >> 2) % 4 : (how >> 2) % 6;
	for (int i = 0; i < wr.num_sge; i++) {
		const uint32_t at = fuzz_u16(in) % DATA_LEN;
		const uint32_t len = fuzz_u16(in) % (how & 2 ? 1300 : 100); /* three fit a receive */

		sge[i] = (struct ibv_sge){DATA_VA + at, len < DATA_LEN - at ? len : DATA_LEN - at,
					  mg_mr_lkey(s->data)};
	}
	bool wrong = misuse(what >= 240);
	/* Never inline with a wild length: that would be the fuzzer's own overrun. */
	wr.send_flags = (how & 1 ? IBV_SEND_SIGNALED : 0u) | (how & 32 ? IBV_SEND_SOLICITED : 0u) |
			(how & 64 ? IBV_SEND_FENCE : 0u) | (how & 128 && !wrong ? IBV_SEND_INLINE : 0u);
	for (int i = 0; i < wr.num_sge && wr.send_flags & IBV_SEND_INLINE; i++)
		sge[i].addr = sge[i].addr - DATA_VA + (uintptr_t)s->data_mem;
	wr.imm_data = htonl(fuzz_u16(in));
	wr.wr.rdma.remote_addr = DATA_VA;
	wr.wr.rdma.rkey = mg_mr_rkey(peer->data);
	if (wrong) {
		if (wr.num_sge && what & 1)
			sge[0].lkey = fuzz_u8(in) & 1 ? mg_mr_lkey(s->foreign) : fuzz_u32(in);
		if (wr.num_sge && what & 2)
			sge[0].length += fuzz_u32(in);
		if (what & 4)
			wr.wr.rdma.rkey =
				fuzz_u8(in) & 1 ? mg_mr_rkey(peer->kept) : mg_mr_rkey(peer->foreign);
		wr.wr.rdma.remote_addr += (uint64_t)(int64_t)(int16_t)fuzz_u16(in);
	}
	if (what >= 200)
		specialize(in, s, &wr, wrong);
	err = mg_post_send(c->qp, now_of(s), &wr, &bad);
	trace(s, "qpn %06x posts send opcode %d wr %u: %d", c->qpn, (int)wr.opcode, (unsigned)wr.wr_id, err);
	FUZZ_CHECK(err == 0 || (err > 0 && bad == &wr));
	if (err)
		return;
	c->signaled[c->send_next % IDS] = how & 1 || w.options & OPT_SIG_ALL;
	c->send_next++;
}

static void post_recv(struct fuzz_in *in, struct side *s, unsigned q)
{
	const uint8_t how = fuzz_u8(in);
	struct conn *c = &s->c[q];
	struct ibv_sge sge[7];
	struct ibv_recv_wr wr = {.wr_id = c->recv_next * N_QP + q, .sg_list = sge, .num_sge = 1}, *bad = NULL;
	int err;

	/* What is always long enough, unless asked otherwise. */
	sge[0] = (struct ibv_sge){DATA_VA, DATA_LEN, mg_mr_lkey(s->data)};
	if (misuse(how & 1)) {
		wr.num_sge = how >> 1 & 7;
		for (int i = 0; i < wr.num_sge; i++)
			sge[i] = (struct ibv_sge){DATA_VA + fuzz_u16(in) % (2 * DATA_LEN),
						  fuzz_u16(in) % (how & 32 ? 300 : 65536),
						  mg_mr_lkey(how & 16 ? s->kept : s->data)};
	}
	err = mg_post_recv(c->qp, &wr, &bad);
	trace(s, "qpn %06x posts receive wr %u: %d", c->qpn, (unsigned)wr.wr_id, err);
	FUZZ_CHECK(err == 0 || (err > 0 && bad == &wr));
	if (!err)
		c->recv_next++;
}

static void check_send(struct conn *c, uint64_t id, const struct ibv_wc *wc)
{
	FUZZ_CHECK(wc->qp_num == c->qpn && id >= c->send_done && id < c->send_next);
	for (uint64_t k = c->send_done; k < id; k++) /* passed over: not asked for, or gone with a reset */
		FUZZ_CHECK(w.overrun || k < c->send_base || !c->signaled[k % IDS]);
	FUZZ_CHECK(wc->status != IBV_WC_SUCCESS || c->signaled[id % IDS]);
	FUZZ_CHECK(!w.honest || wc->status == IBV_WC_SUCCESS || wc->status == IBV_WC_RETRY_EXC_ERR ||
		   (wc->status == IBV_WC_RNR_RETRY_EXC_ERR && w.options & OPT_FEW_RETRIES) ||
		   wc->status == IBV_WC_WR_FLUSH_ERR);
	c->send_done = id + 1;
}

static void check_recv(struct conn *c, uint64_t id, const struct ibv_wc *wc)
{
	FUZZ_CHECK(wc->qp_num == c->qpn && id >= c->recv_done && id < c->recv_next);
	FUZZ_CHECK(id == c->recv_done || w.overrun || c->recv_done < c->recv_base);
	FUZZ_CHECK(!w.honest || wc->status == IBV_WC_SUCCESS || wc->status == IBV_WC_WR_FLUSH_ERR);
	c->recv_done = id + 1;
}

static size_t poll_side(struct side *s, int n)
{
	bool good = true;
	struct ibv_wc wc[8];
	size_t polled;
	int got;

	n = n < 8 ? n : 8;
	got = mg_cq_poll(s->send_cq, n, wc);
	FUZZ_CHECK(got >= 0 && got <= n);
	for (int i = 0; i < got; i++) {
		trace(s, "send wr %u completes: %d", (unsigned)wc[i].wr_id, wc[i].status);
		check_send(&s->c[wc[i].wr_id % N_QP], wc[i].wr_id / N_QP, &wc[i]);
		good &= wc[i].status == IBV_WC_SUCCESS;
	}
	polled = (size_t)got;
	got = mg_cq_poll(s->recv_cq, n, wc);
	FUZZ_CHECK(got >= 0 && got <= n);
	for (int i = 0; i < got; i++) {
		trace(s, "receive wr %u completes: %d", (unsigned)wc[i].wr_id, wc[i].status);
		check_recv(&s->c[wc[i].wr_id % N_QP], wc[i].wr_id / N_QP, &wc[i]);
		good &= wc[i].status == IBV_WC_SUCCESS;
	}
	if (!good)
		w.honest = false; /* a connection has failed, which breaks its peer too */
	return polled + (size_t)got;
}

/* ---- time, stop, resume, states --------------------------------------------------------------- */

static void pass_time(mg_time ns)
{
	w.now += ns;
	for (int i = 0; i < 2; i++)
		mg_timer(w.s[i].e, now_of(&w.s[i]));
}

static void dump(const struct side *s, struct mg_dump_qp out[N_QP])
{
	const size_t need = mg_dump(s->e, NULL, 0);
	struct mg_dump_record rec = {0};
	uint8_t *buf = malloc(need);
	unsigned n = 0;

	FUZZ_CHECK(buf && need >= sizeof(struct mg_dump_header) && need < 65536);
	memset(buf, 0xee, need);
	FUZZ_CHECK(mg_dump(s->e, buf, need - 1) == need && buf[0] == 0xee);
	FUZZ_CHECK(mg_dump(s->e, buf, need) == need && memcmp(buf, MG_DUMP_MAGIC, 8) == 0);
	for (size_t at = sizeof(struct mg_dump_header); rec.type != MG_DUMP_END;
	     at += sizeof(rec) + rec.length) {
		FUZZ_CHECK(at + sizeof(rec) <= need);
		memcpy(&rec, buf + at, sizeof(rec));
		FUZZ_CHECK(rec.length <= need - at - sizeof(rec) && !(rec.length & 7));
		FUZZ_CHECK(rec.type != MG_DUMP_END || at + sizeof(rec) + rec.length == need);
		if (rec.type == MG_DUMP_QP) {
			FUZZ_CHECK(n < N_QP && rec.length == sizeof(*out));
			memcpy(&out[n++], buf + at + sizeof(rec), sizeof(*out));
		}
	}
	FUZZ_CHECK(n == N_QP);
	free(buf);
}

static void stop(struct side *s)
{
	if (s->stopped)
		return;
	trace(s, "stops, ready %d", mg_stop_ready(s->e));
	mg_stop(s->e);
	s->stopped = true;
	FUZZ_CHECK(mg_stopped(s->e) && mg_deadline(s->e) == MG_NEVER);
	dump(s, s->at_stop);
}

static void resume(struct fuzz_in *in, struct side *s)
{
	const uint8_t how = fuzz_u8(in);

	stop(s); /* clock and address change under a stopped engine only */
	if (how & 1)
		s->clock += (mg_time)fuzz_u16(in) << 20;
	if (how & 2)
		s->clock -= (mg_time)fuzz_u8(in) << 20;
	if (how & 4 && s->n_left < MAX_MOVES) {
		struct left *left = &s->left[s->n_left++];

		left->from = s->addr;
		memcpy(left->qp, s->at_stop, sizeof(left->qp));
		for (unsigned q = 0; q < N_QP; q++) { /* a move that cannot be proved ends the connection */
			if (!s->at_stop[q].token_acked || w.options & OPT_NO_STANDIN)
				w.honest = false;
		}
		s->addr.gid[14]++;
		left->to = s->addr;
		mg_resume(s->e, now_of(s), &s->addr);
	} else {
		mg_resume(s->e, now_of(s), NULL);
	}
	trace(s, "resumes, %u moves", s->n_left);
	s->stopped = false;
	FUZZ_CHECK(!mg_stopped(s->e));
}

static void change_state(struct fuzz_in *in, struct side *s, unsigned q)
{
	static const enum ibv_qp_state states[] = {IBV_QPS_RESET, IBV_QPS_INIT, IBV_QPS_RTR, IBV_QPS_RTS,
						   IBV_QPS_SQD,	  IBV_QPS_ERR,	IBV_QPS_SQE};
	const uint8_t how = fuzz_u8(in);
	struct ibv_qp_attr a = {.qp_state = states[how % 7], .en_sqd_async_notify = 1};
	struct conn *c = &s->c[q];
	struct ibv_qp_init_attr init;
	int mask = IBV_QP_STATE;

	if (how & 128)
		a.qp_state = IBV_QPS_RESET;
	if (a.qp_state != IBV_QPS_SQD && a.qp_state != IBV_QPS_RTS && !misuse(true))
		return;
	if (a.qp_state == IBV_QPS_SQD && how & 64)
		mask |= IBV_QP_EN_SQD_ASYNC_NOTIFY;
	trace(s, "qpn %06x to state %d", c->qpn, a.qp_state);
	if (mg_qp_modify(c->qp, now_of(s), &a, mask))
		return;
	FUZZ_CHECK(!mg_qp_query(c->qp, &a, IBV_QP_STATE, &init));
	if (a.qp_state == IBV_QPS_RESET) {
		c->send_base = c->send_next;
		c->recv_base = c->recv_next;
		if (how & 128)
			connect_qp(s, q);
	}
}

/* Another region at another place; requests in the queues still name the old one, which is gone. */
static void change_region(struct fuzz_in *in, struct side *s)
{
	const unsigned access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ;
	uint8_t *fresh = malloc(DATA_LEN);

	FUZZ_CHECK(fresh);
	if (mg_mr_destroy(s->data) == EBUSY) {
		for (int i = 0; i < 2; i++)
			mg_mw_destroy(s->mw[i]);
		create_windows(s);
		FUZZ_CHECK(!mg_mr_destroy(s->data));
	}
	free(s->data_mem);
	s->data_mem = fresh;
	memset(fresh, fuzz_u8(in), DATA_LEN);
	FUZZ_CHECK(!mg_mr_create(s->pd, fresh, DATA_LEN, DATA_VA, access, &s->data));
}

/* ---- the run ---------------------------------------------------------------------------------- */

static void step(struct fuzz_in *in)
{
	const uint8_t c = fuzz_u8(in);
	struct side *s = &w.s[c & 1];
	const unsigned q = c >> 7, n = c >> 5 & 3;
	size_t at = w.flying ? (c >> 5) % w.flying : 0;

	switch (c >> 1 & 15) {
	case 0:
	case 1: transmit(s, q ? MG_TX_LAZY : 0, 1 + n * 2); break;
	case 2:
	case 3:
		for (unsigned i = 0; i <= n && w.flying; i++)
			deliver(0, false);
		break;
	case 4:
		if (w.flying)
			deliver(at, n == 0);
		break;
	case 5:
		if (w.flying)
			memmove(&w.wire[at], &w.wire[at + 1], (--w.flying - at) * sizeof(w.wire[0]));
		break;
	case 6:
		if (w.flying && misuse(true))
			deliver_mutated(in, at);
		break;
	case 7:
		if (misuse(true))
			forge(in, s, q);
		break;
	case 8:
	case 9: post_send(in, s, q); break;
	case 10: post_recv(in, s, q); break;
	case 11:
		poll_side(s, 1 + (c >> 5));
		mg_cq_arm(n & 1 ? s->send_cq : s->recv_cq, q);
		break;
	case 12: pass_time((mg_time)(1 + fuzz_u8(in)) << (c >> 5) * 4); break;
	case 13:
		if (n == 0)
			dump(s, (struct mg_dump_qp[N_QP]){{0}});
		else if (n == 1)
			stop(s);
		else
			resume(in, s);
		break;
	case 14:
		if (n == 0) {
			if (misuse(true))
				change_region(in, s);
		} else if (n == 1) {
			change_state(in, s, q);
		} else if (n == 2) {
			(void)mg_cq_resize(q ? s->send_cq : s->recv_cq, fuzz_u8(in) + 1u);
		} else {
			const mg_time due = mg_deadline(s->e);

			FUZZ_CHECK(!(s->stopped && due != MG_NEVER));
			if (due != MG_NEVER && due > now_of(s) && due - now_of(s) < (mg_time)1 << 40)
				pass_time(due - now_of(s));
		}
		break;
	default: {
		const struct mg_rx meta = {other(s)->addr, s->addr, 0, 0, 64};
		const size_t len = in->left < (c >> 5) * 16u ? in->left : (c >> 5) * 16u;

		if (misuse(true))
			hand_over(&meta, in->p, len);
		in->p += len;
		in->left -= len;
	}
	}
}

static bool all_done(void)
{
	struct ibv_qp_init_attr init;
	struct ibv_qp_attr a;

	for (unsigned i = 0; i < 2 * N_QP; i++) {
		const struct conn *c = &w.s[i / N_QP].c[i % N_QP];

		FUZZ_CHECK(!mg_qp_query(c->qp, &a, IBV_QP_STATE, &init));
		for (uint64_t id = c->send_done; id < c->send_next; id++) {
			if (c->signaled[id % IDS] && a.qp_state == IBV_QPS_RTS)
				return false;
		}
	}
	return true;
}

static void back_to_work(struct side *s)
{
	struct ibv_qp_attr a = {.qp_state = IBV_QPS_RTS};

	if (s->stopped)
		mg_resume(s->e, now_of(s), NULL);
	s->stopped = false;
	for (unsigned q = 0; q < N_QP; q++) /* those that are draining go on */
		(void)mg_qp_modify(s->c[q].qp, now_of(s), &a, IBV_QP_STATE);
}

/* The network works again, receives are posted: everything that was asked for completes. */
static void drain(void)
{
	trace(w.s, "the network works again");
	back_to_work(&w.s[0]);
	back_to_work(&w.s[1]);
	for (int round = 0; w.honest && !all_done(); round++) {
		struct fuzz_in none = {(const uint8_t *)"", 0};
		mg_time next = MG_NEVER;
		size_t moved = w.flying;

		FUZZ_CHECK(round < MAX_ROUNDS);
		for (size_t n = w.flying; n > 0; n--)
			deliver(0, false);
		for (unsigned i = 0; i < 2; i++) {
			struct side *s = &w.s[i];
			mg_time due;

			for (unsigned q = 0; q < N_QP; q++) {
				if (s->c[q].recv_next - s->c[q].recv_done < DEPTH)
					post_recv(&none, s, q);
			}
			moved += transmit(s, 0, 8);
			moved += poll_side(s, 8);
			due = mg_deadline(s->e);
			if (due != MG_NEVER && (due <= now_of(s) || due - now_of(s) < next))
				next = due <= now_of(s) ? 0 : due - now_of(s);
		}
		if (moved)
			continue;
		FUZZ_CHECK(!w.honest || next != MG_NEVER || all_done());
		if (next != MG_NEVER)
			pass_time(next + 1);
	}
}

static void tear_down(void)
{
	for (int i = 0; i < 2; i++) {
		struct side *s = &w.s[i];

		for (size_t k = 0; k < KEPT_LEN; k++)
			FUZZ_CHECK(s->kept_mem[k] == KEPT_BYTE);
		FUZZ_CHECK(mg_pd_destroy(s->pd) == EBUSY && mg_cq_destroy(s->send_cq) == EBUSY);
		if (w.seed & 1) { /* piece by piece, or all by the engine */
			FUZZ_CHECK(!mg_qp_destroy(s->c[1].qp) && !mg_qp_destroy(s->c[0].qp));
			for (int k = 0; k < 2; k++)
				mg_mw_destroy(s->mw[k]);
			FUZZ_CHECK(!mg_mr_destroy(s->data) && !mg_mr_destroy(s->kept));
			FUZZ_CHECK(!mg_mr_destroy(s->foreign) && !mg_pd_destroy(s->pd));
			FUZZ_CHECK(!mg_cq_destroy(s->send_cq) && !mg_cq_destroy(s->recv_cq));
		}
		mg_engine_destroy(s->e);
		free(s->data_mem);
		free(s->kept_mem);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct fuzz_in in = {data, size};

	memset(&w, 0, sizeof(w));
	w.seed = 0x9e3779b97f4a7c15ull + fuzz_u8(&in);
	w.options = fuzz_u8(&in);
	w.now = START;
	tracing = getenv("FUZZ_TRACE") != NULL;
	w.honest = true;
	create_side(&w.s[0], 1);
	create_side(&w.s[1], 2);
	for (unsigned q = 0; q < N_QP; q++) {
		connect_qp(&w.s[0], q);
		connect_qp(&w.s[1], q);
	}
	for (int i = 0; i < MAX_STEPS && in.left; i++)
		step(&in);
	drain();
	tear_down();
	return 0;
}
