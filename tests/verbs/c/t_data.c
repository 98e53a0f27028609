/* SPDX-License-Identifier: BSD-3-Clause */
/* Moving data by ibv_post_send and ibv_post_recv. */
#include "tv.h"

#include <arpa/inet.h>

static struct tv_end a, b;

static void remote(struct ibv_send_wr *wr, uint32_t off)
{
	wr->wr.rdma.remote_addr = (uintptr_t)b.buf + off;
	wr->wr.rdma.rkey = b.mr->rkey;
}

static void a_send_arrives(void)
{
	struct ibv_send_wr wr;
	struct ibv_sge sge;
	struct ibv_wc wc;

	tv_pair(&a, &b, &(struct tv_opt){0});
	tv_fill(a.buf, 5000, 1);
	CHECK_EQ(tv_recv(&b, 77, 100, 6000), 0);
	wr = tv_wr(&a, IBV_WR_SEND, 55, &sge, 0, 5000);
	CHECK_EQ(tv_post(&a, &wr), 0);
	wc = tv_wait(b.rcq);
	CHECK_EQ(wc.status, IBV_WC_SUCCESS);
	CHECK_EQ(wc.opcode, IBV_WC_RECV);
	CHECK_EQ(wc.wr_id, 77);
	CHECK_EQ(wc.byte_len, 5000);
	CHECK_EQ(wc.qp_num, b.qp->qp_num);
	CHECK_EQ(wc.wc_flags, 0);
	CHECK(tv_filled(b.buf + 100, 5000, 1));
	CHECK_EQ(b.buf[5100], 0);
	wc = tv_wait(a.scq);
	CHECK_EQ(wc.status, IBV_WC_SUCCESS);
	CHECK_EQ(wc.opcode, IBV_WC_SEND);
	CHECK_EQ(wc.wr_id, 55);
	CHECK_EQ(wc.qp_num, a.qp->qp_num);
	tv_pair_close(&a, &b);
}

static void immediate_data_arrives_in_network_order(void)
{
	struct ibv_send_wr wr;
	struct ibv_sge sge;
	struct ibv_wc wc;

	tv_pair(&a, &b, &(struct tv_opt){0});
	CHECK_EQ(tv_recv(&b, 1, 0, 64), 0);
	CHECK_EQ(tv_recv(&b, 2, 0, 64), 0);
	wr = tv_wr(&a, IBV_WR_SEND_WITH_IMM, 1, &sge, 0, 0);
	wr.num_sge = 0;
	wr.imm_data = htonl(0x12345678);
	CHECK_EQ(tv_post(&a, &wr), 0);
	wc = tv_wait(b.rcq);
	CHECK_EQ(wc.status, IBV_WC_SUCCESS);
	CHECK_EQ(wc.byte_len, 0);
	CHECK(wc.wc_flags & IBV_WC_WITH_IMM);
	CHECK_EQ(ntohl(wc.imm_data), 0x12345678);

	tv_fill(a.buf, 3000, 9);
	wr = tv_wr(&a, IBV_WR_RDMA_WRITE_WITH_IMM, 2, &sge, 0, 3000);
	remote(&wr, 4096);
	wr.imm_data = htonl(0xcafe);
	CHECK_EQ(tv_post(&a, &wr), 0);
	wc = tv_wait(b.rcq);
	CHECK_EQ(wc.opcode, IBV_WC_RECV_RDMA_WITH_IMM);
	CHECK_EQ(wc.byte_len, 3000);
	CHECK_EQ(ntohl(wc.imm_data), 0xcafe);
	CHECK(tv_filled(b.buf + 4096, 3000, 9));
	tv_wait_ok(a.scq, 1);
	wc = tv_wait(a.scq);
	CHECK_EQ(wc.opcode, IBV_WC_RDMA_WRITE);
	tv_pair_close(&a, &b);
}

static void write_and_read_reach_remote_memory(void)
{
	struct ibv_send_wr wr;
	struct ibv_sge sge;
	struct ibv_wc wc;

	tv_pair(&a, &b, &(struct tv_opt){0});
	tv_fill(a.buf, 100000, 3);
	wr = tv_wr(&a, IBV_WR_RDMA_WRITE, 1, &sge, 0, 100000);
	remote(&wr, 50000);
	CHECK_EQ(tv_post(&a, &wr), 0);
	wc = tv_wait(a.scq);
	CHECK_EQ(wc.status, IBV_WC_SUCCESS);
	CHECK_EQ(wc.opcode, IBV_WC_RDMA_WRITE);
	CHECK(tv_filled(b.buf + 50000, 100000, 3));

	wr = tv_wr(&a, IBV_WR_RDMA_READ, 2, &sge, 150000, 100000);
	remote(&wr, 50000);
	CHECK_EQ(tv_post(&a, &wr), 0);
	wc = tv_wait(a.scq);
	CHECK_EQ(wc.status, IBV_WC_SUCCESS);
	CHECK_EQ(wc.opcode, IBV_WC_RDMA_READ);
	CHECK_EQ(wc.byte_len, 100000);
	CHECK(tv_filled(a.buf + 150000, 100000, 3));
	tv_pair_close(&a, &b);
}

static void every_mtu_and_length_is_whole(void)
{
	static const uint32_t len[] = {0,    1,	   3,	 255,  256,   257,   1023, 1024,
				       1025, 4095, 4096, 4097, 65535, 65536, 65537};
	struct ibv_port_attr port;
	struct ibv_send_wr wr;
	struct ibv_sge sge;
	struct ibv_wc wc;

	for (enum ibv_mtu mtu = IBV_MTU_256; mtu <= IBV_MTU_4096; mtu++) {
		struct ibv_context *ctx = tv_open();

		CHECK_EQ(ibv_query_port(ctx, 1, &port), 0);
		CHECK_EQ(ibv_close_device(ctx), 0);
		if (mtu > port.active_mtu)
			break;
		tv_pair(&a, &b, &(struct tv_opt){.mtu = mtu});
		for (unsigned i = 0; i < sizeof(len) / sizeof(*len); i++) {
			tv_fill(a.buf, len[i], i);
			b.buf[len[i]] = 0xee;
			CHECK_EQ(tv_recv(&b, i, 0, TV_BUF), 0);
			wr = tv_wr(&a, IBV_WR_SEND, i, &sge, 0, len[i]);
			CHECK_EQ(tv_post(&a, &wr), 0);
			wc = tv_wait(b.rcq);
			CHECK_EQ(wc.status, IBV_WC_SUCCESS);
			CHECK_EQ(wc.byte_len, len[i]);
			CHECK(tv_filled(b.buf, len[i], i));
			CHECK_EQ(b.buf[len[i]], 0xee);
			tv_wait_ok(a.scq, i);
		}
		tv_pair_close(&a, &b);
	}
}

static void sges_gather_and_scatter(void)
{
	struct ibv_sge s[4], r[3];
	struct ibv_send_wr wr = {.wr_id = 1,
				 .sg_list = s,
				 .num_sge = 4,
				 .opcode = IBV_WR_SEND,
				 .send_flags = IBV_SEND_SIGNALED},
			   *bad;
	struct ibv_recv_wr rwr = {.wr_id = 2, .sg_list = r, .num_sge = 3}, *rbad;
	static const uint32_t sl[4] = {1, 1500, 0, 3000}, rl[3] = {7, 4000, 2000};
	uint32_t at = 0;

	tv_pair(&a, &b, &(struct tv_opt){0});
	tv_fill(a.buf, 4501, 4);
	for (int i = 0; i < 4; i++) { /* the pattern, cut and moved apart */
		memmove(a.buf + 20000u * (unsigned)(i + 1), a.buf + at, sl[i]);
		s[i] = (struct ibv_sge){(uintptr_t)a.buf + 20000u * (unsigned)(i + 1), sl[i], a.mr->lkey};
		at += sl[i];
	}
	for (int i = 0; i < 3; i++)
		r[i] = (struct ibv_sge){(uintptr_t)b.buf + 30000u * (unsigned)(i + 1), rl[i], b.mr->lkey};
	CHECK_EQ(ibv_post_recv(b.qp, &rwr, &rbad), 0);
	CHECK_EQ(ibv_post_send(a.qp, &wr, &bad), 0);
	CHECK_EQ(tv_wait(b.rcq).byte_len, 4501);
	memcpy(b.buf, b.buf + 30000, 7);
	memcpy(b.buf + 7, b.buf + 60000, 4000);
	memcpy(b.buf + 4007, b.buf + 90000, 494);
	CHECK(tv_filled(b.buf, 4501, 4));
	CHECK_EQ(b.buf[90494], 0);
	tv_wait_ok(a.scq, 1);
	tv_pair_close(&a, &b);
}

static void inline_data_is_taken_at_once(void)
{
	uint8_t local[188]; /* not registered */
	struct ibv_sge s[2] = {{(uintptr_t)local, 100, 0}, {(uintptr_t)local + 100, 88, 0xdead}};
	struct ibv_send_wr wr = {.wr_id = 1,
				 .sg_list = s,
				 .num_sge = 2,
				 .opcode = IBV_WR_SEND,
				 .send_flags = IBV_SEND_SIGNALED | IBV_SEND_INLINE},
			   *bad;

	tv_pair(&a, &b, &(struct tv_opt){.inline_data = 188});
	tv_fill(local, sizeof(local), 5);
	CHECK_EQ(ibv_post_send(a.qp, &wr, &bad), 0); /* nobody receives yet: RNR */
	memset(local, 0, sizeof(local));
	CHECK_EQ(tv_recv(&b, 2, 0, 1000), 0);
	CHECK_EQ(tv_wait(b.rcq).byte_len, 188);
	CHECK(tv_filled(b.buf, 188, 5));
	tv_wait_ok(a.scq, 1);
	s[1].length = 89; /* one too many */
	CHECK_EQ(ibv_post_send(a.qp, &wr, &bad), EINVAL);
	CHECK(bad == &wr);
	s[1].length = 88;
	wr.opcode = IBV_WR_RDMA_READ;
	CHECK_EQ(ibv_post_send(a.qp, &wr, &bad), EINVAL);
	tv_pair_close(&a, &b);
}

static void unsignalled_requests_are_silent(void)
{
	struct ibv_send_wr wr;
	struct ibv_sge sge;

	tv_pair(&a, &b, &(struct tv_opt){0});
	for (unsigned i = 0; i < 200; i++) { /* more than the queue holds: silent ones free it too */
		wr = tv_wr(&a, IBV_WR_RDMA_WRITE, i, &sge, 0, 32);
		remote(&wr, 0);
		if (i % 20 != 19)
			wr.send_flags = 0;
		CHECK_EQ(tv_post(&a, &wr), 0);
		if (i % 20 == 19)
			tv_wait_ok(a.scq, i);
	}
	tv_pair_close(&a, &b);
}

static void sq_sig_all_signals_all(void)
{
	struct ibv_send_wr wr;
	struct ibv_sge sge;

	tv_pair(&a, &b, &(struct tv_opt){.sig_all = true});
	for (unsigned i = 0; i < 5; i++) {
		wr = tv_wr(&a, IBV_WR_RDMA_WRITE, i, &sge, 0, 32);
		remote(&wr, 0);
		wr.send_flags = 0;
		CHECK_EQ(tv_post(&a, &wr), 0);
	}
	for (unsigned i = 0; i < 5; i++)
		tv_wait_ok(a.scq, i);
	tv_pair_close(&a, &b);
}

static void lists_are_posted_in_order(void)
{
	struct ibv_send_wr wr[32], *bad;
	struct ibv_recv_wr rwr[32], *rbad;
	struct ibv_sge s[32], r[32];
	struct ibv_wc wc[32];

	tv_pair(&a, &b, &(struct tv_opt){0});
	for (unsigned i = 0; i < 32; i++) {
		tv_fill(a.buf + i * 2048, 1100 + i, i);
		wr[i] = tv_wr(&a, IBV_WR_SEND, i, &s[i], i * 2048, 1100 + i);
		wr[i].next = i < 31 ? &wr[i + 1] : NULL;
		r[i] = (struct ibv_sge){(uintptr_t)b.buf + i * 2048, 2048, b.mr->lkey};
		rwr[i] = (struct ibv_recv_wr){.wr_id = 100 + i,
					      .sg_list = &r[i],
					      .num_sge = 1,
					      .next = i < 31 ? &rwr[i + 1] : NULL};
	}
	CHECK_EQ(ibv_post_recv(b.qp, rwr, &rbad), 0);
	CHECK_EQ(ibv_post_send(a.qp, wr, &bad), 0);
	for (unsigned i = 0; i < 32;) {
		int n = ibv_poll_cq(b.rcq, 32, wc);

		CHECK(n >= 0);
		for (int k = 0; k < n; k++, i++) {
			CHECK_EQ(wc[k].wr_id, 100 + i);
			CHECK_EQ(wc[k].byte_len, 1100 + i);
			CHECK(tv_filled(b.buf + i * 2048, 1100 + i, i));
		}
	}
	for (unsigned i = 0; i < 32; i++)
		tv_wait_ok(a.scq, i);
	tv_pair_close(&a, &b);
}

static void full_queues_are_enomem(void)
{
	struct ibv_send_wr wr[3], *bad;
	struct ibv_sge s[3];
	struct ibv_qp_init_attr init;
	struct ibv_qp_attr attr;
	unsigned room;

	tv_pair(&a, &b, &(struct tv_opt){.send_wr = 2, .recv_wr = 4});
	CHECK_EQ(ibv_query_qp(a.qp, &attr, IBV_QP_CAP, &init), 0);
	room = init.cap.max_send_wr;
	CHECK_EQ(room, 2);
	for (unsigned i = 0; i < 3; i++) { /* no receive is posted: nothing completes */
		wr[i] = tv_wr(&a, IBV_WR_SEND, i, &s[i], 0, 8);
		wr[i].next = i < 2 ? &wr[i + 1] : NULL;
	}
	CHECK_EQ(ibv_post_send(a.qp, wr, &bad), ENOMEM);
	CHECK(bad == &wr[2]); /* the first two were taken */
	for (unsigned i = 0; i < 4; i++)
		CHECK_EQ(tv_recv(&b, i, 0, 64), 0);
	tv_wait_ok(a.scq, 0);
	tv_wait_ok(a.scq, 1);
	for (unsigned i = 4; i < 6; i++)
		CHECK_EQ(tv_recv(&b, i, 0, 64), 0);
	CHECK_EQ(tv_recv(&b, 9, 0, 64), ENOMEM);
	tv_pair_close(&a, &b);
}

static void bad_arguments_are_told_at_once(void)
{
	struct ibv_sge s[8] = {0};
	struct ibv_send_wr ok, wr, *bad = NULL;
	struct ibv_recv_wr rwr = {.sg_list = s, .num_sge = 5}, *rbad = NULL;
	struct ibv_sge sge;

	tv_pair(&a, &b, &(struct tv_opt){0});
	ok = tv_wr(&a, IBV_WR_SEND, 1, &sge, 0, 8);
#define BAD(err, change)                                       \
	do {                                                   \
		wr = ok;                                       \
		change;                                        \
		CHECK_EQ(ibv_post_send(a.qp, &wr, &bad), err); \
		CHECK(bad == &wr);                             \
	} while (0)
	BAD(EINVAL, (wr.sg_list = s, wr.num_sge = 5));
	BAD(EINVAL, wr.num_sge = -1);
	BAD(EINVAL, wr.sg_list = NULL);
	BAD(EINVAL, wr.opcode = 99);
	BAD(EINVAL, (wr.opcode = IBV_WR_ATOMIC_CMP_AND_SWP, sge.length = 7));
	sge.length = 8;
	BAD(EOPNOTSUPP, wr.opcode = IBV_WR_TSO);
	BAD(EINVAL, wr.opcode = IBV_WR_BIND_MW); /* no window */
	BAD(EINVAL, (wr.opcode = IBV_WR_ATOMIC_WRITE, sge.length = 4));
	sge.length = 8;
	CHECK_EQ(ibv_post_recv(a.qp, &rwr, &rbad), EINVAL);
	CHECK(rbad == &rwr);
	rwr.num_sge = -3;
	CHECK_EQ(ibv_post_recv(a.qp, &rwr, &rbad), EINVAL);
	/* And an empty list, or none who asks for `bad`, is no crime. */
	CHECK_EQ(ibv_post_send(a.qp, NULL, &bad), 0);
	wr = ok;
	wr.num_sge = -1;
	CHECK_EQ(ibv_post_send(a.qp, &wr, NULL), EINVAL);
	/* The QP is as well as before. */
	CHECK_EQ(tv_recv(&b, 4, 0, 8), 0);
	CHECK_EQ(ibv_post_send(a.qp, &ok, &bad), 0);
	tv_wait_ok(a.scq, 1);
	tv_pair_close(&a, &b);
}

static void polling_nothing_gives_nothing(void)
{
	struct ibv_wc wc[4];

	tv_pair(&a, &b, &(struct tv_opt){0});
	CHECK_EQ(ibv_poll_cq(a.scq, 4, wc), 0);
	CHECK_EQ(ibv_poll_cq(a.scq, 0, wc), 0);
	CHECK(ibv_poll_cq(a.scq, -1, wc) < 0);
	tv_pair_close(&a, &b);
}

static void one_cq_serves_many_qps(void)
{
	struct ibv_qp_init_attr init = {.qp_type = IBV_QPT_RC, .cap = {8, 8, 1, 1, 0}};
	struct ibv_qp *q[8];
	struct tv_opt opt = {0};
	struct ibv_sge sge;
	struct ibv_send_wr wr, *bad;
	unsigned seen = 0;

	tv_pair(&a, &b, &opt);
	init.send_cq = init.recv_cq = a.scq;
	for (int i = 0; i < 8; i++)
		CHECK(q[i] = ibv_create_qp(a.pd, &init));
	for (int i = 0; i < 8; i += 2) {
		tv_to_init(q[i], &opt);
		tv_to_init(q[i + 1], &opt);
		CHECK_EQ(tv_to_rtr(q[i], q[i + 1]->qp_num, &opt), 0);
		CHECK_EQ(tv_to_rtr(q[i + 1], q[i]->qp_num, &opt), 0);
		CHECK_EQ(tv_to_rts(q[i], &opt), 0);
	}
	for (int i = 0; i < 8; i += 2) {
		wr = tv_wr(&a, IBV_WR_RDMA_WRITE, (unsigned)i, &sge, 0, 64);
		wr.wr.rdma.remote_addr = (uintptr_t)a.buf + 4096;
		wr.wr.rdma.rkey = a.mr->rkey;
		CHECK_EQ(ibv_post_send(q[i], &wr, &bad), 0);
	}
	for (int i = 0; i < 4; i++) {
		struct ibv_wc wc = tv_wait(a.scq);

		CHECK_EQ(wc.status, IBV_WC_SUCCESS);
		CHECK_EQ(wc.qp_num, q[wc.wr_id]->qp_num);
		seen |= 1u << wc.wr_id;
	}
	CHECK_EQ(seen, 0x55);
	for (int i = 0; i < 8; i++)
		CHECK_EQ(ibv_destroy_qp(q[i]), 0);
	tv_pair_close(&a, &b);
}

static void an_iova_and_zero_based_regions_are_addressed(void)
{
	struct ibv_mr *iova, *zero;
	struct ibv_send_wr wr;
	struct ibv_sge sge;
	int all = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ;

	tv_pair(&a, &b, &(struct tv_opt){0});
	CHECK(iova = ibv_reg_mr_iova(b.pd, b.buf, 8192, 0x1000000000, all));
	CHECK(zero = ibv_reg_mr(b.pd, b.buf + 8192, 8192, all | IBV_ACCESS_ZERO_BASED));
	tv_fill(a.buf, 2000, 6);
	wr = tv_wr(&a, IBV_WR_RDMA_WRITE, 1, &sge, 0, 2000);
	wr.wr.rdma.remote_addr = 0x1000000000 + 100;
	wr.wr.rdma.rkey = iova->rkey;
	CHECK_EQ(tv_post(&a, &wr), 0);
	tv_wait_ok(a.scq, 1);
	CHECK(tv_filled(b.buf + 100, 2000, 6));
	wr.wr.rdma.remote_addr = 200;
	wr.wr.rdma.rkey = zero->rkey;
	CHECK_EQ(tv_post(&a, &wr), 0);
	tv_wait_ok(a.scq, 1);
	CHECK(tv_filled(b.buf + 8192 + 200, 2000, 6));
	CHECK_EQ(ibv_dereg_mr(iova), 0);
	CHECK_EQ(ibv_dereg_mr(zero), 0);
	tv_pair_close(&a, &b);
}

static void a_qp_can_be_used_again_after_reset(void)
{
	struct ibv_qp_attr attr = {.qp_state = IBV_QPS_RESET};
	struct tv_opt opt = {0};
	struct ibv_send_wr wr;
	struct ibv_sge sge;

	tv_pair(&a, &b, &opt);
	for (int round = 0; round < 3; round++) {
		CHECK_EQ(tv_recv(&b, 1, 0, 64), 0);
		wr = tv_wr(&a, IBV_WR_SEND, 2, &sge, 0, 64);
		CHECK_EQ(tv_post(&a, &wr), 0);
		tv_wait_ok(b.rcq, 1);
		tv_wait_ok(a.scq, 2);
		CHECK_EQ(ibv_modify_qp(a.qp, &attr, IBV_QP_STATE), 0);
		CHECK_EQ(ibv_modify_qp(b.qp, &attr, IBV_QP_STATE), 0);
		tv_connect(a.qp, b.qp, &opt);
		CHECK_EQ(tv_to_rts(b.qp, &opt), 0);
	}
	tv_pair_close(&a, &b);
}

/* A QP on b's CQs, in RTR's stead: what it is asked to receive is flushed. */
static void flush_one(struct ibv_qp *qp, uint64_t wr_id)
{
	struct ibv_recv_wr wr = {.wr_id = wr_id}, *bad;

	CHECK_EQ(ibv_post_recv(qp, &wr, &bad), 0);
}

static void completions_go_with_their_qp(void)
{
	struct ibv_qp_init_attr init = {.cap = {.max_recv_wr = 4, .max_recv_sge = 1}, .qp_type = IBV_QPT_RC};
	struct ibv_qp_attr attr = {.qp_state = IBV_QPS_ERR};
	struct tv_opt opt = {.cqe = 5};
	struct ibv_qp *other;
	struct ibv_wc wc[5];
	struct ibv_send_wr wr;
	struct ibv_sge sge;

	tv_pair(&a, &b, &opt);
	init.send_cq = init.recv_cq = b.rcq;
	CHECK(other = ibv_create_qp(b.pd, &init));
	tv_to_init(other, &opt);
	CHECK_EQ(ibv_modify_qp(other, &attr, IBV_QP_STATE), 0);
	/* The ring is to be used around its end. */
	for (uint64_t i = 0; i < 3; i++) {
		flush_one(other, i);
		CHECK_EQ(ibv_poll_cq(b.rcq, 1, wc), 1);
	}
	for (uint64_t i = 0; i < 2; i++) {
		CHECK_EQ(tv_recv(&b, 20 + i, 0, 64), 0);
		wr = tv_wr(&a, IBV_WR_SEND, i, &sge, 0, 64);
		CHECK_EQ(tv_post(&a, &wr), 0);
		tv_wait_ok(a.scq, i); /* it has arrived */
		flush_one(other, 10 + i);
	}
	attr.qp_state = IBV_QPS_RESET;
	CHECK_EQ(ibv_modify_qp(b.qp, &attr, IBV_QP_STATE), 0);
	CHECK_EQ(ibv_poll_cq(b.rcq, 5, wc), 2);
	for (int i = 0; i < 2; i++) {
		CHECK_EQ(wc[i].wr_id, 10 + i);
		CHECK_EQ(wc[i].qp_num, other->qp_num);
	}
	flush_one(other, 12);
	CHECK_EQ(ibv_destroy_qp(other), 0);
	CHECK_EQ(ibv_poll_cq(b.rcq, 5, wc), 0);
	/* The requester's, too. */
	CHECK_EQ(ibv_modify_qp(a.qp, &attr, IBV_QP_STATE), 0);
	tv_connect(a.qp, b.qp, &opt);
	CHECK_EQ(tv_recv(&b, 20, 0, 64), 0);
	wr = tv_wr(&a, IBV_WR_SEND, 1, &sge, 0, 64);
	CHECK_EQ(tv_post(&a, &wr), 0);
	attr.qp_state = IBV_QPS_ERR;
	CHECK_EQ(ibv_modify_qp(a.qp, &attr, IBV_QP_STATE), 0); /* done, or flushed */
	attr.qp_state = IBV_QPS_RESET;
	CHECK_EQ(ibv_modify_qp(a.qp, &attr, IBV_QP_STATE), 0);
	CHECK_EQ(ibv_poll_cq(a.scq, 5, wc), 0);
	tv_pair_close(&a, &b);
}

TV_MAIN(T(a_send_arrives), T(immediate_data_arrives_in_network_order), T(write_and_read_reach_remote_memory),
	T(every_mtu_and_length_is_whole), T(sges_gather_and_scatter), T(inline_data_is_taken_at_once),
	T(unsignalled_requests_are_silent), T(sq_sig_all_signals_all), T(lists_are_posted_in_order),
	T(full_queues_are_enomem), T(bad_arguments_are_told_at_once), T(polling_nothing_gives_nothing),
	T(one_cq_serves_many_qps), T(an_iova_and_zero_based_regions_are_addressed),
	T(a_qp_can_be_used_again_after_reset), T(completions_go_with_their_qp))
