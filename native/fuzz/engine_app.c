/* SPDX-License-Identifier: BSD-3-Clause */
/* engine_app.c - fuzz_engine: what is posted, rightly or wrongly, and how it must complete. */
#include "fuzz/engine.h"

#include <arpa/inet.h>

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

void post_send(struct fuzz_in *in, struct side *s, unsigned q)
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

void post_recv(struct fuzz_in *in, struct side *s, unsigned q)
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

size_t poll_side(struct side *s, int n)
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
