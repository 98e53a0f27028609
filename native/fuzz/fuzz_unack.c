/* Invariant: UC and UD never break memory, complete in posting order once each, and UD sends always complete. */
/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Two engines with a UC connection, two UD QPs each and a multicast group. The input is a program: post,
 * transmit, deliver, lose, repeat, damage, forge, stop, resume elsewhere, change states.
 */
#include "fuzz/fuzz.h"
#include "transport/engine.h"
#include "wire/wire.h"

#include <errno.h>

#define DATA_LEN 8192u
#define KEPT_LEN 256u
#define KEPT_BYTE 0x5a
#define KEPT_VA 0x200000u
#define DATA_VA 0x100000u
#define DEPTH 16u
#define MTU 512u
#define WIRE 48u
#define PKT_MAX 5200u
#define MAX_STEPS 400
#define QKEY 0x1111u
#define N_QP 3u /* 0: UC, 1 and 2: UD */
#define START 1000000000u

struct flying {
	struct mg_rx meta;
	size_t len;
	uint8_t buf[PKT_MAX];
};

struct fqp {
	struct mg_qp *qp;
	uint32_t qpn;
	uint64_t send_posted, send_done, recv_posted, recv_done;
	uint32_t recv_len[DEPTH];
};

struct side {
	struct mg_engine *e;
	struct mg_pd *pd;
	struct mg_mr *data, *kept;
	uint8_t *data_mem, *kept_mem;
	struct mg_cq *cq;
	struct fqp q[N_QP];
	struct mg_ah *ah[3]; /* the other one, itself, the group; NULL: destroyed */
	struct mg_addr addr;
};

static struct world {
	struct side s[2];
	struct flying wire[WIRE];
	size_t flying;
	mg_time now;
	uint64_t seed;
} w;

static const struct mg_addr group = {{[10] = 0xff, 0xff, 239, 1, 1, 1}};

static void random_bytes(void *arg, void *buf, size_t n)
{
	uint8_t *p = buf;

	(void)arg;
	while (n--) {
		w.seed = w.seed * 6364136223846793005u + 1442695040888963407u;
		*p++ = (uint8_t)(w.seed >> 40);
	}
}

static void cq_event(void *arg, struct mg_cq *cq)
{
	FUZZ_CHECK(cq == ((struct side *)arg)->cq);
}

static void async_event(void *arg, enum ibv_event_type type, void *object)
{
	(void)arg;
	FUZZ_CHECK(object && (type == IBV_EVENT_COMM_EST || type == IBV_EVENT_QP_FATAL ||
			      type == IBV_EVENT_SQ_DRAINED));
}

static const struct mg_ops ops = {random_bytes, cq_event, async_event};

static struct side *other(const struct side *s)
{
	return &w.s[s == w.s];
}

/* ---- set-up ------------------------------------------------------------------------------------- */

static void connect_qp(struct side *s, unsigned i)
{
	struct ibv_qp_attr a = {.port_num = 1, .qkey = QKEY, .path_mtu = IBV_MTU_512};
	int init = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT, rtr = IBV_QP_STATE;

	if (i) {
		init |= IBV_QP_QKEY;
	} else {
		init |= IBV_QP_ACCESS_FLAGS;
		rtr |= IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN;
	}
	a.qp_access_flags = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE;
	a.qp_state = IBV_QPS_INIT;
	FUZZ_CHECK(!mg_qp_modify(s->q[i].qp, w.now, &a, init));
	a.qp_state = IBV_QPS_RTR;
	a.dest_qp_num = other(s)->q[0].qpn;
	a.rq_psn = a.sq_psn = 0xfffffe;
	a.ah_attr.is_global = 1;
	a.ah_attr.port_num = 1;
	a.ah_attr.grh.sgid_index = 1;
	memcpy(a.ah_attr.grh.dgid.raw, other(s)->addr.gid, 16);
	FUZZ_CHECK(!mg_qp_modify(s->q[i].qp, w.now, &a, rtr));
	a.qp_state = IBV_QPS_RTS;
	FUZZ_CHECK(!mg_qp_modify(s->q[i].qp, w.now, &a, IBV_QP_STATE | IBV_QP_SQ_PSN));
}

static void make_ah(struct side *s, unsigned i)
{
	const struct mg_addr *to = i == 0 ? &other(s)->addr : i == 1 ? &s->addr : &group;
	struct ibv_ah_attr a = {.is_global = 1, .port_num = 1, .grh.sgid_index = 1};

	memcpy(a.grh.dgid.raw, to->gid, 16);
	FUZZ_CHECK(!mg_ah_create(s->pd, &a, s, &s->ah[i]));
}

static void create_side(struct side *s, uint8_t last)
{
	const unsigned all = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE;
	struct mg_config cfg = {.qpn_base = 0x40000, .qpn_count = 0x40000, .max_path_mtu = 1024};
	struct mg_qp_parts parts;

	memcpy(cfg.addr.gid, (const uint8_t[16]){[10] = 0xff, 0xff, 10, 0, 0, last}, 16);
	s->addr = cfg.addr;
	s->e = mg_engine_create(&cfg, &ops, s);
	FUZZ_CHECK(s->e && (s->pd = mg_pd_create(s->e)));
	s->data_mem = calloc(1, DATA_LEN);
	s->kept_mem = malloc(KEPT_LEN);
	FUZZ_CHECK(s->data_mem && s->kept_mem);
	memset(s->kept_mem, KEPT_BYTE, KEPT_LEN);
	FUZZ_CHECK(!mg_mr_create(s->pd, s->data_mem, DATA_LEN, DATA_VA, all, &s->data));
	FUZZ_CHECK(!mg_mr_create(s->pd, s->kept_mem, KEPT_LEN, KEPT_VA, 0, &s->kept));
	FUZZ_CHECK(!mg_cq_create(s->e, 4096, s, &s->cq));
	parts = (struct mg_qp_parts){.pd = s->pd, .send_cq = s->cq, .recv_cq = s->cq};
	for (unsigned i = 0; i < N_QP; i++) {
		struct ibv_qp_init_attr_ex init = {.qp_type = i ? IBV_QPT_UD : IBV_QPT_UC,
						   .sq_sig_all = 1,
						   .cap = {DEPTH, DEPTH, 2, 2, 64}};

		FUZZ_CHECK(!mg_qp_create(s->e, &parts, &init, s, &s->q[i].qp));
		s->q[i].qpn = mg_qp_num(s->q[i].qp);
	}
}

/* ---- commands ------------------------------------------------------------------------------------ */

static uint64_t tag(unsigned q, bool recv, uint64_t n)
{
	return n << 8 | recv << 4 | q;
}

static void poll_side(struct side *s)
{
	struct ibv_wc wc[32];
	int n;

	while ((n = mg_cq_poll(s->cq, 32, wc)) > 0) {
		for (int i = 0; i < n; i++) {
			const unsigned q = wc[i].wr_id & 0xf;
			const uint64_t number = wc[i].wr_id >> 8;
			struct fqp *f = &s->q[q];

			FUZZ_CHECK(q < N_QP && wc[i].qp_num == f->qpn);
			if (!(wc[i].wr_id & 0x10)) {
				FUZZ_CHECK(number == f->send_done && f->send_done < f->send_posted);
				f->send_done++;
				continue;
			}
			FUZZ_CHECK(number == f->recv_done && f->recv_done < f->recv_posted);
			if (wc[i].status == IBV_WC_SUCCESS && wc[i].opcode == IBV_WC_RECV)
				FUZZ_CHECK(wc[i].byte_len <= f->recv_len[number % DEPTH] &&
					   (!q || wc[i].byte_len >= 40));
			f->recv_done++;
		}
	}
	for (unsigned i = 0; i < KEPT_LEN; i++)
		FUZZ_CHECK(s->kept_mem[i] == KEPT_BYTE);
}

static struct ibv_sge piece(struct side *s, struct fuzz_in *in, uint32_t most)
{
	const uint8_t how = fuzz_u8(in);
	const uint32_t len = fuzz_u16(in) % most, off = fuzz_u16(in) % DATA_LEN;
	struct ibv_sge sge = {DATA_VA + off, len, mg_mr_lkey(s->data)};

	if (len > DATA_LEN - off && how < 250)
		sge.addr = DATA_VA;
	if (how >= 253)
		sge = (struct ibv_sge){KEPT_VA, len % KEPT_LEN, mg_mr_lkey(s->kept)};
	else if (how == 252)
		sge.lkey ^= 0x100;
	return sge;
}

static void post_send(struct side *s, struct fuzz_in *in, unsigned q)
{
	static const enum ibv_wr_opcode opcode[] = {IBV_WR_SEND, IBV_WR_SEND_WITH_IMM, IBV_WR_RDMA_WRITE,
						    IBV_WR_RDMA_WRITE_WITH_IMM, IBV_WR_RDMA_READ};
	const uint8_t how = fuzz_u8(in);
	struct fqp *f = &s->q[q];
	struct ibv_sge sge[2] = {piece(s, in, 1500), piece(s, in, 700)};
	struct ibv_send_wr wr = {.wr_id = tag(q, false, f->send_posted),
				 .sg_list = sge,
				 .num_sge = 1 + (how & 1),
				 .opcode = opcode[(how >> 1) % 5],
				 .send_flags = how & 0x40 ? IBV_SEND_SOLICITED : 0},
			   *bad;

	if (q) {
		const uint8_t to = fuzz_u8(in);
		struct mg_ah *ah = s->ah[to % 3];
		const struct side *dst = to % 3 ? s : other(s);

		wr.wr.ud.ah = ah ? mg_ah_ib(ah) : NULL;
		wr.wr.ud.remote_qpn = to % 3 == 2 ? 0xffffff : dst->q[(to >> 2) % N_QP].qpn;
		wr.wr.ud.remote_qkey = to & 0x80 ? fuzz_u32(in) : QKEY;
	} else {
		wr.wr.rdma.remote_addr = (how & 0x80 ? KEPT_VA : DATA_VA) + fuzz_u16(in) % DATA_LEN;
		wr.wr.rdma.rkey = mg_mr_rkey(how & 0x80 ? other(s)->kept : other(s)->data);
	}
	if (!mg_post_send(f->qp, w.now, &wr, &bad))
		f->send_posted++;
}

static void post_recv(struct side *s, struct fuzz_in *in, unsigned q)
{
	struct fqp *f = &s->q[q];
	struct ibv_sge sge = piece(s, in, 2000);
	struct ibv_recv_wr wr = {.wr_id = tag(q, true, f->recv_posted), .sg_list = &sge, .num_sge = 1}, *bad;

	if (f->recv_posted - f->recv_done >= DEPTH) /* recv_len remembers so many */
		return;
	if (!mg_post_recv(f->qp, &wr, &bad))
		f->recv_len[f->recv_posted++ % DEPTH] = sge.length;
}

static void transmit(struct side *s)
{
	struct mg_pkt pkt[4];
	size_t n = mg_tx(s->e, w.now, 0, pkt, 4);

	FUZZ_CHECK(n <= 4);
	for (size_t i = 0; i < n; i++) {
		struct flying *f = &w.wire[w.flying % WIRE];
		struct mg_hdrs h;

		FUZZ_CHECK(pkt[i].len <= PKT_MAX && !memcmp(pkt[i].src.gid, s->addr.gid, 16));
		memcpy(f->buf, pkt[i].hdr, f->len = pkt[i].hdr_len);
		for (unsigned k = 0; k < pkt[i].n_iov; k++) {
			memcpy(f->buf + f->len, pkt[i].iov[k].iov_base, pkt[i].iov[k].iov_len);
			f->len += pkt[i].iov[k].iov_len;
		}
		memset(f->buf + f->len, 0, pkt[i].pad + MG_ICRC_LEN);
		f->len += pkt[i].pad + MG_ICRC_LEN;
		FUZZ_CHECK(f->len == pkt[i].len && !mg_hdrs_parse(f->buf, f->len, &h) && h.capable);
		FUZZ_CHECK(h.payload_len <= 1024);
		f->meta = (struct mg_rx){.src = pkt[i].src, .dst = pkt[i].dst, .sport = pkt[i].sport};
		if (w.flying < WIRE)
			w.flying++;
	}
}

static void deliver(const struct flying *f)
{
	uint8_t *exact = malloc(f->len); /* ASan sees an overread */

	FUZZ_CHECK(exact);
	memcpy(exact, f->buf, f->len);
	for (unsigned i = 0; i < 2; i++) {
		struct side *s = &w.s[i];

		if (!memcmp(f->meta.dst.gid, s->addr.gid, 16) || mg_gid_multicast(f->meta.dst.gid))
			mg_rx(s->e, w.now, &f->meta, exact, f->len);
	}
	free(exact);
}

static void forge(struct side *s, struct fuzz_in *in)
{
	static struct flying f;
	const uint8_t how = fuzz_u8(in);
	uint32_t qpn = how & 0x40 ? 0xffffff : s->q[how % N_QP].qpn;

	f.meta = (struct mg_rx){.src = other(s)->addr, .dst = how & 0x40 ? group : s->addr, .ip_id = how};
	f.len = 12u + fuzz_u16(in) % 700u;
	memset(f.buf, 0, f.len);
	fuzz_take(in, f.buf + 8, 40);
	f.buf[0] = fuzz_u8(in);
	f.buf[1] = how & 0x30;
	f.buf[2] = f.buf[3] = 0xff;
	f.buf[4] = how >> 7;
	for (unsigned i = 0; i < 3; i++)
		f.buf[5 + i] = (uint8_t)(qpn >> (16 - 8 * i));
	if (how & 0x20) { /* the next PSN or nearly, a key that is right */
		uint32_t rkey = mg_mr_rkey(s->data);
		struct ibv_qp_attr a;
		struct ibv_qp_init_attr init;

		FUZZ_CHECK(!mg_qp_query(s->q[0].qp, &a, 0, &init));
		f.buf[9] = (uint8_t)(a.rq_psn >> 16);
		f.buf[10] = (uint8_t)(a.rq_psn >> 8);
		f.buf[11] = (uint8_t)(a.rq_psn + (how & 7 ? 0 : 1));
		for (unsigned i = 0; i < 4; i++)
			f.buf[20 + i] = (uint8_t)(rkey >> (24 - 8 * i));
	}
	deliver(&f);
}

static void change_state(struct side *s, struct fuzz_in *in)
{
	const uint8_t how = fuzz_u8(in);
	const unsigned q = how % N_QP;
	struct ibv_qp_attr a = {0};

	a.qp_state = how & 0x80	  ? IBV_QPS_RTS
		     : how & 0x40 ? IBV_QPS_SQD
		     : how & 0x20 ? IBV_QPS_ERR
				  : IBV_QPS_RESET;
	(void)mg_qp_modify(s->q[q].qp, w.now, &a, IBV_QP_STATE);
	if (a.qp_state != IBV_QPS_RESET)
		return;
	poll_side(s);
	s->q[q].send_done = s->q[q].send_posted; /* what was queued is gone without a word */
	s->q[q].recv_done = s->q[q].recv_posted;
	connect_qp(s, q);
}

static void stop_or_resume(struct side *s, struct fuzz_in *in)
{
	const uint8_t how = fuzz_u8(in);

	if (!mg_stopped(s->e)) {
		mg_stop(s->e);
		return;
	}
	if (how & 1)
		s->addr.gid[14] = how;
	mg_resume(s->e, w.now, &s->addr);
}

static void change_objects(struct side *s, struct fuzz_in *in)
{
	const uint8_t how = fuzz_u8(in);
	const unsigned i = how % 3;

	if (how & 0x80) {
		int (*change)(struct mg_qp *, const struct mg_addr *) =
			how & 0x40 ? mg_mcast_attach : mg_mcast_detach;

		(void)change(s->q[i].qp, &group);
	} else if (s->ah[i]) {
		FUZZ_CHECK(!mg_ah_destroy(s->ah[i]));
		s->ah[i] = NULL;
	} else {
		make_ah(s, i);
	}
}

static void step(struct fuzz_in *in)
{
	const uint8_t c = fuzz_u8(in);
	struct side *s = &w.s[c & 1];
	const unsigned arg = c >> 5;
	struct flying *f = w.flying ? &w.wire[arg * 7u % w.flying] : NULL;

	switch ((c >> 1) & 0xf) {
	case 0:
	case 1: post_send(s, in, arg % N_QP); break;
	case 2:
	case 3: post_recv(s, in, arg % N_QP); break;
	case 4:
	case 5: transmit(s); break;
	case 6: /* all in order */
		for (size_t i = 0; i < w.flying; i++)
			deliver(&w.wire[i]);
		w.flying = 0;
		break;
	case 7: /* one, which stays: a copy comes later */
		if (f)
			deliver(f);
		break;
	case 8: w.flying = w.flying ? w.flying - 1 : 0; break;
	case 9:
		if (f)
			f->buf[fuzz_u16(in) % f->len] ^= (uint8_t)(1u << arg);
		break;
	case 10: forge(s, in); break;
	case 11: poll_side(s); break;
	case 12:
		w.now += (mg_time)fuzz_u16(in) * 10000u;
		mg_timer(s->e, w.now);
		break;
	case 13: stop_or_resume(s, in); break;
	case 14: change_state(s, in); break;
	default: change_objects(s, in); break;
	}
}

/* Whatever happened: a UD QP in RTS has nothing to wait for. */
static void finish(struct side *s)
{
	struct ibv_qp_init_attr init;
	struct ibv_qp_attr a;

	if (mg_stopped(s->e))
		mg_resume(s->e, w.now, NULL);
	for (int i = 0; i < 200; i++)
		transmit(s);
	poll_side(s);
	for (unsigned q = 1; q < N_QP; q++) {
		FUZZ_CHECK(!mg_qp_query(s->q[q].qp, &a, 0, &init));
		if (a.qp_state == IBV_QPS_RTS)
			FUZZ_CHECK(s->q[q].send_done == s->q[q].send_posted);
	}
	FUZZ_CHECK(mg_dump(s->e, NULL, 0) > 0);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct fuzz_in in = {data, size};

	w = (struct world){.now = START, .seed = 88172645463325252u};
	for (unsigned i = 0; i < 2; i++)
		create_side(&w.s[i], (uint8_t)(i + 1));
	for (unsigned i = 0; i < 2; i++) {
		for (unsigned q = 0; q < N_QP; q++)
			connect_qp(&w.s[i], q);
		for (unsigned k = 0; k < 3; k++)
			make_ah(&w.s[i], k);
		FUZZ_CHECK(!mg_mcast_attach(w.s[i].q[1].qp, &group));
	}
	for (int i = 0; i < MAX_STEPS && in.left; i++)
		step(&in);
	for (unsigned i = 0; i < 2; i++)
		finish(&w.s[i]);
	for (unsigned i = 0; i < 2; i++) {
		mg_engine_destroy(w.s[i].e);
		free(w.s[i].data_mem);
		free(w.s[i].kept_mem);
	}
	return 0;
}
