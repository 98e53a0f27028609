/* Invariant: with shared receive queues, XRC and windows no packet and no call completes a request twice or writes where none may. */
/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * One engine that receives: an RC QP on a shared receive queue, an XRC_RECV QP whose packets name one of two
 * XRC queues in two protection domains, and windows that the RC QP binds. The input is a program: forge packets
 * with the PSNs that are waited for (the peer has gone mad), post, resize, set limits, destroy and make
 * queues, bind and invalidate windows, reset, stop and resume. Checked besides what the sanitizers see:
 *
 * - a receive request completes at most once, and only one that was posted; its length is kept;
 * - memory without remote or local rights is never written;
 * - every answer is well-formed and goes to the peer.
 */
#include "fuzz/fuzz.h"
#include "transport/dump.h"
#include "transport/engine.h"
#include "wire/wire.h"

#include <errno.h>

#define MTU 256u
#define DATA_LEN 2048u
#define KEPT_BYTE 0x5a
#define DATA_VA 0x100000u /* that of protection domain n: + n * DATA_LEN */
#define KEPT_VA 0x200000u
#define PEER_QPN 0x123u
#define N_SRQ 3u /* 0: the RC QP's; 1, 2: XRC, in PD 0 and 1 */
#define MAX_IDS 512u
#define MAX_STEPS 300
#define START 1000000000u

enum { RC, XRC, N_QP };

static struct world {
	struct mg_engine *e;
	struct mg_pd *pd[2];
	struct mg_mr *data[2], *kept[2];
	uint8_t mem[2][DATA_LEN], kept_mem[DATA_LEN];
	struct mg_mw *mw[2]; /* of type 1 and 2 */
	struct mg_cq *cq, *send_cq;
	struct mg_xrcd *xrcd;
	struct mg_srq *srq[N_SRQ];
	struct mg_qp *qp[N_QP];
	uint32_t qpn[N_QP];
	uint16_t length[MAX_IDS]; /* of each receive request posted */
	uint8_t posted[MAX_IDS];  /* and not completed */
	unsigned ids;
	uint64_t sends, send_done;
	mg_time now;
	uint64_t seed;
	bool stopped;
} w;

static const struct mg_addr ours = {{[10] = 0xff, 0xff, 10, 0, 0, 1}};
static const struct mg_addr peers = {{[10] = 0xff, 0xff, 10, 0, 0, 2}};

static void random_bytes(void *arg, void *buf, size_t n)
{
	(void)arg;
	for (uint8_t *p = buf; n--; p++) {
		w.seed = w.seed * 6364136223846793005ull + 1442695040888963407ull;
		*p = (uint8_t)(w.seed >> 56);
	}
}

static void cq_event(void *arg, struct mg_cq *cq)
{
	(void)arg;
	FUZZ_CHECK(cq == w.cq || cq == w.send_cq);
}

static void async_event(void *arg, enum ibv_event_type type, void *object)
{
	(void)arg;
	if (type == IBV_EVENT_SRQ_LIMIT_REACHED)
		FUZZ_CHECK(object == w.srq[0] || object == w.srq[1] || object == w.srq[2]);
	else
		FUZZ_CHECK(object == w.qp[RC] || object == w.qp[XRC] || object == w.cq ||
			   object == w.send_cq);
}

static const struct mg_ops ops = {random_bytes, cq_event, async_event, NULL};

/* ---- set-up ----------------------------------------------------------------------------------- */

static void create_srq(unsigned i)
{
	struct ibv_srq_attr attr = {.max_wr = 8, .max_sge = 2};

	FUZZ_CHECK(!mg_srq_create(w.pd[i == 2], i ? w.xrcd : NULL, i ? w.cq : NULL, &attr, &w, &w.srq[i]));
}

static void connect_qp(unsigned q)
{
	struct ibv_qp_attr a = {.qp_state = IBV_QPS_INIT,
				.port_num = 1,
				.qp_access_flags = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ |
						   IBV_ACCESS_REMOTE_ATOMIC};

	FUZZ_CHECK(!mg_qp_modify(w.qp[q], w.now, &a,
				 IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS));
	a.qp_state = IBV_QPS_RTR;
	a.path_mtu = IBV_MTU_256;
	a.dest_qp_num = PEER_QPN + q;
	a.rq_psn = 0xfffffc;
	a.max_dest_rd_atomic = 2;
	a.min_rnr_timer = 1;
	a.ah_attr.is_global = 1;
	a.ah_attr.port_num = 1;
	a.ah_attr.grh.sgid_index = 1;
	memcpy(a.ah_attr.grh.dgid.raw, peers.gid, 16);
	FUZZ_CHECK(!mg_qp_modify(w.qp[q], w.now, &a,
				 IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN |
					 IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER));
	if (q == XRC)
		return;
	a.qp_state = IBV_QPS_RTS;
	a.timeout = 8;
	a.retry_cnt = a.rnr_retry = 7;
	a.max_rd_atomic = 2;
	FUZZ_CHECK(!mg_qp_modify(w.qp[q], w.now, &a,
				 IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
					 IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC));
}

static void create_world(void)
{
	const unsigned all = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ |
			     IBV_ACCESS_REMOTE_ATOMIC | IBV_ACCESS_MW_BIND;
	const struct mg_config cfg = {
		.qpn_base = 0x40000, .qpn_count = 0x40000, .max_path_mtu = 4096, .addr = ours};
	struct ibv_qp_init_attr_ex init = {.qp_type = IBV_QPT_RC, .cap = {8, 0, 2, 0, 64}, .sq_sig_all = 1};
	struct mg_qp_parts parts;

	w.e = mg_engine_create(&cfg, &ops, &w);
	FUZZ_CHECK(w.e && (w.xrcd = mg_xrcd_create(w.e)));
	memset(w.kept_mem, KEPT_BYTE, sizeof(w.kept_mem));
	FUZZ_CHECK(!mg_cq_create(w.e, 1024, &w, &w.cq) && !mg_cq_create(w.e, 64, &w, &w.send_cq));
	for (unsigned i = 0; i < 2; i++) {
		FUZZ_CHECK((w.pd[i] = mg_pd_create(w.e)));
		FUZZ_CHECK(
			!mg_mr_create(w.pd[i], w.mem[i], DATA_LEN, DATA_VA + i * DATA_LEN, all, &w.data[i]));
		FUZZ_CHECK(!mg_mr_create(w.pd[i], w.kept_mem, DATA_LEN, KEPT_VA, IBV_ACCESS_REMOTE_READ,
					 &w.kept[i]));
	}
	for (unsigned i = 0; i < 2; i++)
		FUZZ_CHECK(!mg_mw_create(w.pd[0], i ? IBV_MW_TYPE_2 : IBV_MW_TYPE_1, &w.mw[i]));
	for (unsigned i = 0; i < N_SRQ; i++)
		create_srq(i);
	parts = (struct mg_qp_parts){.pd = w.pd[0], .send_cq = w.send_cq, .recv_cq = w.cq, .srq = w.srq[0]};
	FUZZ_CHECK(!mg_qp_create(w.e, &parts, &init, &w, &w.qp[RC]));
	parts = (struct mg_qp_parts){.xrcd = w.xrcd};
	init = (struct ibv_qp_init_attr_ex){.qp_type = IBV_QPT_XRC_RECV};
	FUZZ_CHECK(!mg_qp_create(w.e, &parts, &init, &w, &w.qp[XRC]));
	for (unsigned q = 0; q < N_QP; q++) {
		w.qpn[q] = mg_qp_num(w.qp[q]);
		connect_qp(q);
	}
}

/* ---- packets ---------------------------------------------------------------------------------- */

static void transmit(void)
{
	static struct mg_pkt out[8];
	struct mg_hdrs h;
	uint8_t flat[MG_HDR_MAX + MTU + 3 + MG_ICRC_LEN];
	size_t n;

	while ((n = mg_tx(w.e, w.now, 0, out, 8)) > 0) {
		FUZZ_CHECK(!w.stopped);
		for (size_t i = 0; i < n; i++) {
			size_t len = out[i].hdr_len;

			FUZZ_CHECK(out[i].len <= sizeof(flat));
			memcpy(flat, out[i].hdr, len);
			for (unsigned k = 0; k < out[i].n_iov; len += out[i].iov[k++].iov_len)
				memcpy(flat + len, out[i].iov[k].iov_base, out[i].iov[k].iov_len);
			memset(flat + len, 0, out[i].len - len);
			FUZZ_CHECK(!mg_hdrs_parse(flat, out[i].len, &h));
			FUZZ_CHECK(h.dest_qpn == PEER_QPN || h.dest_qpn == PEER_QPN + 1);
			FUZZ_CHECK(!memcmp(out[i].dst.gid, peers.gid, 16));
		}
	}
}

static uint32_t some_rkey(uint8_t how)
{
	switch (how & 7) {
	case 0:
	case 1: return mg_mw_rkey(w.mw[how & 1]);
	case 2: return mg_mr_rkey(w.kept[how >> 3 & 1]);
	case 3: return mg_mw_rkey(w.mw[1]) ^ how >> 3;
	default: return mg_mr_rkey(w.data[how >> 3 & 1]);
	}
}

static uint64_t some_va(struct fuzz_in *in, uint8_t how)
{
	const uint64_t base = (how & 7) == 2 ? KEPT_VA : DATA_VA + (how >> 3 & 1) * DATA_LEN;

	return base + (how & 64 ? fuzz_u16(in) % (DATA_LEN + 16) : fuzz_u8(in)) - (how >> 7);
}

static void forge(struct fuzz_in *in, unsigned q)
{
	static const uint8_t opcodes[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 17, 19, 20, 22, 23, 29};
	const struct mg_rx meta = {peers, ours, 0xc000, 0, 64, 0, 0};
	const uint8_t what = fuzz_u8(in), how = fuzz_u8(in), key = fuzz_u8(in);
	struct ibv_qp_init_attr init;
	struct mg_hdrs h = {
		.pkey = MG_PKEY_DEFAULT, .dest_qpn = w.qpn[q], .capable = true, .ackreq = how & 1};
	struct ibv_qp_attr a;
	uint8_t *buf;
	size_t len;

	h.opcode = (uint8_t)(opcodes[what % sizeof(opcodes)] + (q == XRC ? 0xa0 : 0));
	FUZZ_CHECK(!mg_qp_query(w.qp[q], &a, IBV_QP_RQ_PSN, &init));
	h.psn = (a.rq_psn + (how & 2 ? (uint32_t)(fuzz_u8(in) % 5) - 2 : 0)) & MG_PSN_MASK;
	h.xrc_srqn = how & 4 ? fuzz_u16(in) : mg_srq_num(w.srq[how >> 3 & 1 ? 2 : 1]);
	if (how & 16 && how & 32)
		h.xrc_srqn = mg_srq_num(w.srq[0]); /* not an XRC one */
	if (mg_opinfo[h.opcode].mask & MG_H_PAYLOAD)
		h.payload_len = how & 64 || mg_opinfo[h.opcode].mask & (MG_P_FIRST | MG_P_MIDDLE)
					? MTU
					: fuzz_u8(in) + (how >> 7);
	h.pad = -h.payload_len & 3;
	h.reth.length = how & 128 ? fuzz_u16(in) : h.payload_len;
	h.reth.va = h.atomic.va = some_va(in, key);
	h.reth.rkey = h.atomic.rkey = h.ieth = some_rkey(key);
	h.atomic.swap_add = 3;
	h.aeth.syndrome = key;
	buf = malloc(MG_HDR_MAX + h.payload_len + h.pad + MG_ICRC_LEN);
	FUZZ_CHECK(buf);
	len = mg_hdrs_build(&h, buf);
	memset(buf + len, what, h.payload_len + h.pad + MG_ICRC_LEN);
	buf = realloc(buf, len + h.payload_len + h.pad + MG_ICRC_LEN); /* reading beyond is seen */
	FUZZ_CHECK(buf);
	mg_rx(w.e, w.now, &meta, buf, len + h.payload_len + h.pad + MG_ICRC_LEN);
	free(buf);
}

/* ---- the application --------------------------------------------------------------------------- */

static void post_srq(struct fuzz_in *in, unsigned i)
{
	const uint8_t how = fuzz_u8(in);
	const unsigned pd = i == 2;
	struct ibv_sge sge[3];
	struct ibv_recv_wr wr = {.wr_id = w.ids, .sg_list = sge, .num_sge = how & 3}, *bad = NULL;
	unsigned total = 0;
	int err;

	for (int k = 0; k < wr.num_sge; k++) {
		const uint16_t at = fuzz_u16(in) % DATA_LEN, len = fuzz_u16(in) % (DATA_LEN - at);

		sge[k] = (struct ibv_sge){DATA_VA + pd * DATA_LEN + at, len, mg_mr_lkey(w.data[pd])};
		if (how & 128 && how & 64) /* of the other domain; not to be written */
			sge[k].lkey = mg_mr_lkey(how & 32 ? w.kept[pd] : w.data[!pd]);
		total += len;
	}
	err = w.ids < MAX_IDS ? mg_post_srq_recv(w.srq[i], &wr, &bad) : ENOMEM;
	FUZZ_CHECK(err >= 0);
	if (err)
		return;
	w.length[w.ids] = (uint16_t)total;
	w.posted[w.ids++] = 1;
}

static void poll_all(void)
{
	struct ibv_wc wc;

	while (mg_cq_poll(w.cq, 1, &wc) == 1) {
		FUZZ_CHECK(wc.wr_id < w.ids && w.posted[wc.wr_id]);
		FUZZ_CHECK(wc.qp_num == w.qpn[RC] || wc.qp_num == w.qpn[XRC]);
		FUZZ_CHECK(wc.status != IBV_WC_SUCCESS || wc.opcode != IBV_WC_RECV ||
			   wc.byte_len <= w.length[wc.wr_id]);
		w.posted[wc.wr_id] = 0;
	}
	while (mg_cq_poll(w.send_cq, 1, &wc) == 1) {
		FUZZ_CHECK(wc.wr_id >= w.send_done && wc.wr_id < w.sends);
		w.send_done = wc.wr_id + 1;
	}
}

static void window(struct fuzz_in *in)
{
	const uint8_t how = fuzz_u8(in);
	const struct mg_mw *chosen = w.mw[how & 1];
	struct ibv_mw mw = {.rkey = mg_mw_rkey(chosen)};
	struct ibv_mr mr = {.lkey = mg_mr_lkey(how & 2 ? w.data[0] : how & 4 ? w.kept[0] : w.data[1])};
	struct ibv_send_wr wr = {.wr_id = w.sends, .opcode = IBV_WR_BIND_MW}, *bad = NULL;

	wr.bind_mw.mw = &mw;
	wr.bind_mw.rkey = mw.rkey + fuzz_u8(in) % 4;
	wr.bind_mw.bind_info = (struct ibv_mw_bind_info){
		.mr = &mr,
		.addr = DATA_VA + fuzz_u16(in) % (DATA_LEN + 8),
		.length = fuzz_u16(in) % DATA_LEN,
		.mw_access_flags = IBV_ACCESS_REMOTE_READ | (how & 16 ? IBV_ACCESS_REMOTE_WRITE : 0) |
				   (how & 32 ? IBV_ACCESS_REMOTE_ATOMIC : 0)};
	if (how & 64) {
		wr.opcode = IBV_WR_LOCAL_INV;
		wr.invalidate_rkey = mg_mw_rkey(chosen);
	}
	if (!mg_post_send(w.qp[RC], w.now, &wr, &bad))
		w.sends++;
}

static void change_srq(struct fuzz_in *in, unsigned i)
{
	const uint8_t how = fuzz_u8(in);
	struct ibv_srq_attr attr = {.max_wr = 1 + how % 16, .srq_limit = how >> 4};

	if (how < 192) {
		(void)mg_srq_modify(w.srq[i], &attr, how & 1 ? IBV_SRQ_LIMIT : IBV_SRQ_MAX_WR);
		mg_srq_query(w.srq[i], &attr);
		FUZZ_CHECK(attr.max_wr >= 1 && attr.max_sge == 2);
	} else if (i) {
		if (!mg_srq_destroy(w.srq[i]))
			create_srq(i);
	} else {
		FUZZ_CHECK(mg_srq_destroy(w.srq[0]) == EBUSY && mg_xrcd_destroy(w.xrcd) == EBUSY);
	}
}

static void again(unsigned q, bool reconnect)
{
	struct ibv_qp_attr a = {.qp_state = reconnect ? IBV_QPS_RESET : IBV_QPS_ERR};

	FUZZ_CHECK(!mg_qp_modify(w.qp[q], w.now, &a, IBV_QP_STATE));
	if (reconnect)
		connect_qp(q);
}

static void new_window(unsigned i)
{
	mg_mw_destroy(w.mw[i]);
	FUZZ_CHECK(!mg_mw_create(w.pd[0], i ? IBV_MW_TYPE_2 : IBV_MW_TYPE_1, &w.mw[i]));
}

static void stop_or_resume(void)
{
	const size_t need = mg_dump(w.e, NULL, 0);
	uint8_t *buf = malloc(need);

	FUZZ_CHECK(buf && mg_dump(w.e, buf, need) == need);
	free(buf);
	w.stopped = !w.stopped;
	if (w.stopped)
		mg_stop(w.e);
	else
		mg_resume(w.e, w.now, NULL);
}

static void step(struct fuzz_in *in)
{
	const uint8_t c = fuzz_u8(in);
	const unsigned q = c >> 4 & 1, i = (c >> 5) % N_SRQ;

	switch (c & 15) {
	case 8:
	case 9:
	case 10: post_srq(in, i); break;
	case 11: window(in); break;
	case 12: change_srq(in, i); break;
	case 13:
		if (c >> 5 == 0)
			again(q, true);
		else if (c >> 5 == 1)
			again(q, false);
		else if (c >> 5 == 2)
			new_window(q);
		else if (c >> 5 == 3)
			stop_or_resume();
		else
			poll_all();
		break;
	case 14: transmit(); break;
	case 15:
		w.now += (mg_time)(1 + fuzz_u8(in)) << (c >> 4);
		mg_timer(w.e, w.now);
		break;
	default: forge(in, q);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct fuzz_in in = {data, size};

	memset(&w, 0, sizeof(w));
	w.seed = fuzz_u8(&in);
	w.now = START;
	create_world();
	for (int i = 0; i < MAX_STEPS && in.left; i++)
		step(&in);
	transmit();
	poll_all();
	for (size_t k = 0; k < sizeof(w.kept_mem); k++)
		FUZZ_CHECK(w.kept_mem[k] == KEPT_BYTE);
	if (w.seed & 1) { /* piece by piece, or all by the engine */
		FUZZ_CHECK(!mg_qp_destroy(w.qp[RC]) && !mg_qp_destroy(w.qp[XRC]));
		for (unsigned i = 0; i < N_SRQ; i++)
			FUZZ_CHECK(!mg_srq_destroy(w.srq[i]));
		FUZZ_CHECK(!mg_xrcd_destroy(w.xrcd));
	}
	mg_engine_destroy(w.e);
	return 0;
}
