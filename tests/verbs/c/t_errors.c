/* SPDX-License-Identifier: BSD-3-Clause */
/* Error completions: what went wrong, on which side, and what becomes of the queues. */
#include "tv.h"

static struct tv_end a, b;

static enum ibv_qp_state state(struct ibv_qp *qp)
{
	struct ibv_qp_init_attr init;
	struct ibv_qp_attr attr;

	CHECK_EQ(ibv_query_qp(qp, &attr, IBV_QP_STATE, &init), 0);
	return attr.qp_state;
}

static void to_remote(struct ibv_send_wr *wr)
{
	wr->wr.rdma.remote_addr = (uintptr_t)b.buf;
	wr->wr.rdma.rkey = b.mr->rkey;
}

/* The request fails with `status`, the next one is flushed, the QP is in ERR. */
static void fails(struct ibv_send_wr *wr, enum ibv_wc_status status)
{
	struct ibv_send_wr *bad, after;
	struct ibv_sge sge;
	struct ibv_wc wc;

	wr->wr_id = 10;
	CHECK_EQ(ibv_post_send(a.qp, wr, &bad), 0);
	after = tv_wr(&a, IBV_WR_RDMA_WRITE, 11, &sge, 0, 8);
	to_remote(&after);
	after.send_flags = 0; /* flushed requests complete, signalled or not */
	CHECK_EQ(ibv_post_send(a.qp, &after, &bad), 0);
	wc = tv_wait(a.scq);
	CHECK_EQ(wc.status, status);
	CHECK_EQ(wc.wr_id, 10);
	CHECK_EQ(wc.qp_num, a.qp->qp_num);
	wc = tv_wait(a.scq);
	CHECK_EQ(wc.status, IBV_WC_WR_FLUSH_ERR);
	CHECK_EQ(wc.wr_id, 11);
	CHECK_EQ(state(a.qp), IBV_QPS_ERR);
}

static void a_bad_local_key_is_a_protection_error(void)
{
	struct ibv_send_wr wr;
	struct ibv_sge sge;

	tv_pair(&a, &b, &(struct tv_opt){0});
	wr = tv_wr(&a, IBV_WR_RDMA_WRITE, 1, &sge, 0, 64);
	to_remote(&wr);
	sge.lkey ^= 0x55;
	fails(&wr, IBV_WC_LOC_PROT_ERR);
	tv_pair_close(&a, &b);
}

static void a_range_beyond_the_region_is_a_protection_error(void)
{
	struct ibv_send_wr wr;
	struct ibv_sge sge;

	tv_pair(&a, &b, &(struct tv_opt){0});
	wr = tv_wr(&a, IBV_WR_SEND, 1, &sge, TV_BUF - 10, 11);
	CHECK_EQ(tv_recv(&b, 1, 0, 64), 0);
	fails(&wr, IBV_WC_LOC_PROT_ERR);
	tv_pair_close(&a, &b);
}

static void reading_into_a_read_only_region_is_a_protection_error(void)
{
	struct ibv_send_wr wr;
	struct ibv_sge sge;
	struct ibv_mr *ro;

	tv_pair(&a, &b, &(struct tv_opt){0});
	CHECK(ro = ibv_reg_mr(a.pd, a.buf, 4096, 0));
	wr = tv_wr(&a, IBV_WR_RDMA_READ, 1, &sge, 0, 64);
	to_remote(&wr);
	sge.lkey = ro->lkey;
	fails(&wr, IBV_WC_LOC_PROT_ERR);
	CHECK_EQ(ibv_dereg_mr(ro), 0);
	tv_pair_close(&a, &b);
}

static void a_bad_remote_key_is_a_remote_access_error(void)
{
	struct ibv_send_wr wr;
	struct ibv_sge sge;

	tv_pair(&a, &b, &(struct tv_opt){0});
	wr = tv_wr(&a, IBV_WR_RDMA_WRITE, 1, &sge, 0, 64);
	to_remote(&wr);
	wr.wr.rdma.rkey ^= 0x55;
	fails(&wr, IBV_WC_REM_ACCESS_ERR);
	CHECK_EQ(state(b.qp), IBV_QPS_ERR);
	tv_pair_close(&a, &b);
}

static void reading_a_bad_remote_range_is_a_remote_access_error(void)
{
	struct ibv_send_wr wr;
	struct ibv_sge sge;

	tv_pair(&a, &b, &(struct tv_opt){0});
	wr = tv_wr(&a, IBV_WR_RDMA_READ, 1, &sge, 0, 64);
	to_remote(&wr);
	wr.wr.rdma.remote_addr += TV_BUF - 63;
	fails(&wr, IBV_WC_REM_ACCESS_ERR);
	tv_pair_close(&a, &b);
}

static void writing_needs_permission(void)
{
	struct ibv_send_wr wr;
	struct ibv_sge sge;

	tv_pair(&a, &b, &(struct tv_opt){.access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ});
	wr = tv_wr(&a, IBV_WR_RDMA_READ, 1, &sge, 0, 64);
	to_remote(&wr);
	CHECK_EQ(tv_post(&a, &wr), 0);
	tv_wait_ok(a.scq, 1);
	wr.opcode = IBV_WR_RDMA_WRITE;
	fails(&wr, IBV_WC_REM_INV_REQ_ERR); /* the QP does not offer it */
	tv_pair_close(&a, &b);
}

static void a_region_needs_permission_too(void)
{
	struct ibv_send_wr wr;
	struct ibv_sge sge;
	struct ibv_mr *mr;

	tv_pair(&a, &b, &(struct tv_opt){0});
	CHECK(mr = ibv_reg_mr(b.pd, b.buf, TV_BUF, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ));
	wr = tv_wr(&a, IBV_WR_RDMA_READ, 1, &sge, 0, 64);
	to_remote(&wr);
	wr.wr.rdma.rkey = mr->rkey;
	CHECK_EQ(tv_post(&a, &wr), 0);
	tv_wait_ok(a.scq, 1);
	wr.opcode = IBV_WR_RDMA_WRITE;
	fails(&wr, IBV_WC_REM_ACCESS_ERR);
	CHECK_EQ(ibv_dereg_mr(mr), 0);
	tv_pair_close(&a, &b);
}

/* A key of another PD of the same process is as bad as none. */
static void keys_belong_to_their_pd(void)
{
	struct ibv_send_wr wr;
	struct ibv_sge sge;

	tv_pair(&a, &b, &(struct tv_opt){0});
	wr = tv_wr(&a, IBV_WR_RDMA_WRITE, 1, &sge, 0, 64);
	wr.wr.rdma.remote_addr = (uintptr_t)a.buf;
	wr.wr.rdma.rkey = a.mr->rkey;
	fails(&wr, IBV_WC_REM_ACCESS_ERR);
	tv_pair_close(&a, &b);
}

static void a_message_too_long_for_its_buffer_fails_on_both_sides(void)
{
	struct ibv_send_wr wr;
	struct ibv_sge sge;
	struct ibv_wc wc;

	tv_pair(&a, &b, &(struct tv_opt){0});
	CHECK_EQ(tv_recv(&b, 5, 0, 100), 0);
	CHECK_EQ(tv_recv(&b, 6, 0, 100), 0);
	wr = tv_wr(&a, IBV_WR_SEND, 1, &sge, 0, 101);
	fails(&wr, IBV_WC_REM_INV_REQ_ERR);
	wc = tv_wait(b.rcq);
	CHECK_EQ(wc.status, IBV_WC_LOC_LEN_ERR);
	CHECK_EQ(wc.wr_id, 5);
	wc = tv_wait(b.rcq);
	CHECK_EQ(wc.status, IBV_WC_WR_FLUSH_ERR);
	CHECK_EQ(wc.wr_id, 6);
	CHECK_EQ(b.buf[100], 0);
	tv_pair_close(&a, &b);
}

static void a_bad_receive_key_fails_on_both_sides(void)
{
	struct ibv_sge r;
	struct ibv_recv_wr rwr = {.wr_id = 5, .sg_list = &r, .num_sge = 1}, *rbad;
	struct ibv_send_wr wr;
	struct ibv_sge sge;
	struct ibv_wc wc;

	tv_pair(&a, &b, &(struct tv_opt){0});
	r = (struct ibv_sge){(uintptr_t)b.buf, 100, b.mr->lkey ^ 0x55};
	CHECK_EQ(ibv_post_recv(b.qp, &rwr, &rbad), 0);
	wr = tv_wr(&a, IBV_WR_SEND, 1, &sge, 0, 50);
	fails(&wr, IBV_WC_REM_OP_ERR);
	wc = tv_wait(b.rcq);
	CHECK_EQ(wc.status, IBV_WC_LOC_PROT_ERR);
	CHECK_EQ(wc.wr_id, 5);
	tv_pair_close(&a, &b);
}

static void a_receiver_that_is_never_ready_ends_in_rnr(void)
{
	struct ibv_send_wr wr;
	struct ibv_sge sge;

	tv_pair(&a, &b, &(struct tv_opt){.rnr_retry = 2});
	wr = tv_wr(&a, IBV_WR_SEND, 1, &sge, 0, 50);
	fails(&wr, IBV_WC_RNR_RETRY_EXC_ERR);
	tv_pair_close(&a, &b);
}

static void a_late_receiver_is_waited_for(void)
{
	struct ibv_send_wr wr;
	struct ibv_sge sge;
	struct ibv_wc wc;

	tv_pair(&a, &b, &(struct tv_opt){0}); /* rnr_retry 7: for ever */
	tv_fill(a.buf, 3000, 8);
	wr = tv_wr(&a, IBV_WR_SEND, 1, &sge, 0, 3000);
	CHECK_EQ(tv_post(&a, &wr), 0);
	for (int i = 0; i < 20000; i++)
		CHECK_EQ(ibv_poll_cq(a.scq, 1, &wc), 0);
	CHECK_EQ(tv_recv(&b, 2, 0, 3000), 0);
	tv_wait_ok(b.rcq, 2);
	tv_wait_ok(a.scq, 1);
	CHECK(tv_filled(b.buf, 3000, 8));
	tv_pair_close(&a, &b);
}

static void a_peer_that_does_not_answer_ends_in_retries_exceeded(void)
{
	struct tv_opt opt = {.timeout = 1, .retry_cnt = 1, .unconnected = true};
	struct ibv_send_wr wr;
	struct ibv_sge sge;

	tv_pair(&a, &b, &opt);
	tv_to_init(a.qp, &opt);
	CHECK_EQ(tv_to_rtr(a.qp, b.qp->qp_num ^ 1, &opt), 0); /* nobody's number */
	CHECK_EQ(tv_to_rts(a.qp, &opt), 0);
	wr = tv_wr(&a, IBV_WR_SEND, 1, &sge, 0, 50);
	fails(&wr, IBV_WC_RETRY_EXC_ERR);
	tv_pair_close(&a, &b);
}

static void going_to_err_flushes_everything(void)
{
	struct ibv_qp_attr attr = {.qp_state = IBV_QPS_ERR};
	struct ibv_send_wr wr;
	struct ibv_sge sge;
	struct ibv_wc wc;

	tv_pair(&a, &b, &(struct tv_opt){0});
	for (unsigned i = 0; i < 3; i++) {
		wr = tv_wr(&a, IBV_WR_SEND, i, &sge, 0, 8); /* nobody receives */
		CHECK_EQ(tv_post(&a, &wr), 0);
		CHECK_EQ(tv_recv(&a, 10 + i, 0, 8), 0);
	}
	CHECK_EQ(ibv_modify_qp(a.qp, &attr, IBV_QP_STATE), 0);
	for (unsigned i = 0; i < 3; i++) {
		wc = tv_wait(a.scq);
		CHECK_EQ(wc.status, IBV_WC_WR_FLUSH_ERR);
		CHECK_EQ(wc.wr_id, i);
		wc = tv_wait(a.rcq);
		CHECK_EQ(wc.status, IBV_WC_WR_FLUSH_ERR);
		CHECK_EQ(wc.wr_id, 10 + i);
	}
	/* What is posted from now on as well. The kernel learns of a receive when something is sent after it. */
	CHECK_EQ(tv_recv(&a, 21, 0, 8), 0);
	wr = tv_wr(&a, IBV_WR_SEND, 20, &sge, 0, 8);
	CHECK_EQ(tv_post(&a, &wr), 0);
	CHECK_EQ(tv_wait(a.scq).status, IBV_WC_WR_FLUSH_ERR);
	CHECK_EQ(tv_wait(a.rcq).status, IBV_WC_WR_FLUSH_ERR);
	tv_pair_close(&a, &b);
}

static void earlier_requests_complete_before_the_failed_one(void)
{
	struct ibv_send_wr wr[3], *bad;
	struct ibv_sge s[3];

	tv_pair(&a, &b, &(struct tv_opt){0});
	for (unsigned i = 0; i < 3; i++) {
		wr[i] = tv_wr(&a, IBV_WR_RDMA_WRITE, i, &s[i], 0, 5000);
		to_remote(&wr[i]);
		wr[i].next = i < 2 ? &wr[i + 1] : NULL;
	}
	wr[1].wr.rdma.rkey ^= 1;
	CHECK_EQ(ibv_post_send(a.qp, wr, &bad), 0);
	tv_wait_ok(a.scq, 0);
	CHECK_EQ(tv_wait(a.scq).status, IBV_WC_REM_ACCESS_ERR);
	CHECK_EQ(tv_wait(a.scq).status, IBV_WC_WR_FLUSH_ERR);
	tv_pair_close(&a, &b);
}

static void a_deregistered_key_no_longer_works(void)
{
	int all = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE;
	struct ibv_send_wr wr;
	struct ibv_sge sge;
	struct ibv_mr *mr;
	uint32_t rkey;

	tv_pair(&a, &b, &(struct tv_opt){0});
	CHECK(mr = ibv_reg_mr(b.pd, b.buf, 4096, all));
	rkey = mr->rkey;
	CHECK_EQ(ibv_dereg_mr(mr), 0);
	wr = tv_wr(&a, IBV_WR_RDMA_WRITE, 1, &sge, 0, 64);
	to_remote(&wr);
	wr.wr.rdma.rkey = rkey;
	fails(&wr, IBV_WC_REM_ACCESS_ERR);
	tv_pair_close(&a, &b);
}

TV_MAIN(T(a_bad_local_key_is_a_protection_error), T(a_range_beyond_the_region_is_a_protection_error),
	T(reading_into_a_read_only_region_is_a_protection_error),
	T(a_bad_remote_key_is_a_remote_access_error), T(reading_a_bad_remote_range_is_a_remote_access_error),
	T(writing_needs_permission), T(a_region_needs_permission_too), T(keys_belong_to_their_pd),
	T(a_message_too_long_for_its_buffer_fails_on_both_sides), T(a_bad_receive_key_fails_on_both_sides),
	T(a_receiver_that_is_never_ready_ends_in_rnr), T(a_late_receiver_is_waited_for),
	T(a_peer_that_does_not_answer_ends_in_retries_exceeded), T(going_to_err_flushes_everything),
	T(earlier_requests_complete_before_the_failed_one), T(a_deregistered_key_no_longer_works))
