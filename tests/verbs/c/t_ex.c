/* SPDX-License-Identifier: BSD-3-Clause */
/* The extended interfaces: posting by ibv_wr_*, polling by ibv_start_poll. */
#include "tv.h"

#include <arpa/inet.h>
#include <time.h>
#include <unistd.h>

static struct tv_end a, b;
static struct ibv_qp_ex *q;

#define OPS                                                                               \
	(IBV_QP_EX_WITH_SEND | IBV_QP_EX_WITH_SEND_WITH_IMM | IBV_QP_EX_WITH_RDMA_WRITE | \
	 IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM | IBV_QP_EX_WITH_RDMA_READ)

static void begin(struct tv_opt opt)
{
	opt.send_ops = OPS;
	tv_pair(&a, &b, &opt);
	CHECK(q = ibv_qp_to_qp_ex(a.qp));
	CHECK(&q->qp_base == a.qp);
}

static void start(uint64_t wr_id)
{
	ibv_wr_start(q);
	q->wr_id = wr_id;
	q->wr_flags = IBV_SEND_SIGNALED;
}

static void every_operation_works(void)
{
	struct ibv_wc wc;

	begin((struct tv_opt){0});
	tv_fill(a.buf, 20000, 1);
	CHECK_EQ(tv_recv(&b, 1, 0, 20000), 0);
	start(1);
	ibv_wr_send(q);
	ibv_wr_set_sge(q, a.mr->lkey, (uintptr_t)a.buf, 20000);
	CHECK_EQ(ibv_wr_complete(q), 0);
	tv_wait_ok(b.rcq, 1);
	CHECK(tv_filled(b.buf, 20000, 1));
	tv_wait_ok(a.scq, 1);

	CHECK_EQ(tv_recv(&b, 2, 0, 64), 0);
	start(2);
	ibv_wr_send_imm(q, htonl(7));
	CHECK_EQ(ibv_wr_complete(q), 0); /* no data at all */
	wc = tv_wait(b.rcq);
	CHECK(wc.wc_flags & IBV_WC_WITH_IMM && ntohl(wc.imm_data) == 7 && wc.byte_len == 0);
	tv_wait_ok(a.scq, 2);

	start(3);
	ibv_wr_rdma_write(q, b.mr->rkey, (uintptr_t)b.buf + 30000);
	ibv_wr_set_sge(q, a.mr->lkey, (uintptr_t)a.buf, 20000);
	CHECK_EQ(ibv_wr_complete(q), 0);
	wc = tv_wait(a.scq);
	CHECK(wc.wr_id == 3 && wc.opcode == IBV_WC_RDMA_WRITE && wc.status == IBV_WC_SUCCESS);
	CHECK(tv_filled(b.buf + 30000, 20000, 1));

	CHECK_EQ(tv_recv(&b, 4, 0, 64), 0);
	start(4);
	ibv_wr_rdma_write_imm(q, b.mr->rkey, (uintptr_t)b.buf + 60000, htonl(9));
	ibv_wr_set_sge(q, a.mr->lkey, (uintptr_t)a.buf, 100);
	CHECK_EQ(ibv_wr_complete(q), 0);
	wc = tv_wait(b.rcq);
	CHECK(wc.opcode == IBV_WC_RECV_RDMA_WITH_IMM && ntohl(wc.imm_data) == 9 && wc.byte_len == 100);
	tv_wait_ok(a.scq, 4);

	start(5);
	ibv_wr_rdma_read(q, b.mr->rkey, (uintptr_t)b.buf + 30000);
	ibv_wr_set_sge(q, a.mr->lkey, (uintptr_t)a.buf + 100000, 20000);
	CHECK_EQ(ibv_wr_complete(q), 0);
	wc = tv_wait(a.scq);
	CHECK(wc.wr_id == 5 && wc.opcode == IBV_WC_RDMA_READ && wc.status == IBV_WC_SUCCESS);
	CHECK(tv_filled(a.buf + 100000, 20000, 1));
	tv_pair_close(&a, &b);
}

static void a_batch_is_posted_in_order(void)
{
	begin((struct tv_opt){.inline_data = 64});
	for (unsigned i = 0; i < 40; i++)
		CHECK_EQ(tv_recv(&b, i, i * 64, 64), 0);
	ibv_wr_start(q);
	for (unsigned i = 0; i < 40; i++) {
		uint8_t byte[32];

		memset(byte, (int)i, sizeof(byte));
		q->wr_id = i;
		q->wr_flags = i == 39 ? IBV_SEND_SIGNALED : 0;
		ibv_wr_send(q);
		if (i % 2)
			ibv_wr_set_inline_data(q, byte, sizeof(byte)); /* taken at once */
		else
			ibv_wr_set_sge(q, a.mr->lkey, (uintptr_t)a.buf + i * 64, 33);
	}
	CHECK_EQ(ibv_wr_complete(q), 0);
	for (unsigned i = 0; i < 40; i++) {
		struct ibv_wc wc = tv_wait(b.rcq);

		CHECK_EQ(wc.wr_id, i);
		CHECK_EQ(wc.byte_len, i % 2 ? 32 : 33);
		CHECK_EQ(b.buf[i * 64 + 31], i % 2 ? i : 0);
	}
	tv_wait_ok(a.scq, 39);
	tv_pair_close(&a, &b);
}

static void lists_of_pieces_are_gathered(void)
{
	struct ibv_sge s[3];
	struct ibv_data_buf d[3];

	begin((struct tv_opt){.inline_data = 256});
	tv_fill(a.buf, 700, 2);
	s[0] = (struct ibv_sge){(uintptr_t)a.buf, 100, a.mr->lkey};
	s[1] = (struct ibv_sge){(uintptr_t)a.buf + 100, 500, a.mr->lkey};
	s[2] = (struct ibv_sge){(uintptr_t)a.buf + 600, 100, a.mr->lkey};
	CHECK_EQ(tv_recv(&b, 1, 0, 1000), 0);
	start(1);
	ibv_wr_send(q);
	ibv_wr_set_sge_list(q, 3, s);
	CHECK_EQ(ibv_wr_complete(q), 0);
	tv_wait_ok(b.rcq, 1);
	tv_wait_ok(a.scq, 1);
	CHECK(tv_filled(b.buf, 700, 2));

	d[0] = (struct ibv_data_buf){a.buf, 10};
	d[1] = (struct ibv_data_buf){NULL, 0};
	d[2] = (struct ibv_data_buf){a.buf + 10, 246};
	CHECK_EQ(tv_recv(&b, 2, 5000, 1000), 0);
	start(2);
	ibv_wr_send(q);
	ibv_wr_set_inline_data_list(q, 3, d);
	CHECK_EQ(ibv_wr_complete(q), 0);
	CHECK_EQ(tv_wait(b.rcq).byte_len, 256);
	tv_wait_ok(a.scq, 2);
	CHECK(tv_filled(b.buf + 5000, 256, 2));
	tv_pair_close(&a, &b);
}

static void aborted_batches_leave_nothing(void)
{
	begin((struct tv_opt){0});
	start(1);
	ibv_wr_rdma_write(q, b.mr->rkey, (uintptr_t)b.buf);
	ibv_wr_set_sge(q, a.mr->lkey, (uintptr_t)a.buf, 100);
	ibv_wr_abort(q);
	start(2);
	ibv_wr_rdma_write(q, b.mr->rkey, (uintptr_t)b.buf);
	ibv_wr_set_sge(q, a.mr->lkey, (uintptr_t)a.buf, 100);
	CHECK_EQ(ibv_wr_complete(q), 0);
	tv_wait_ok(a.scq, 2);
	ibv_wr_start(q);
	CHECK_EQ(ibv_wr_complete(q), 0); /* empty */
	tv_pair_close(&a, &b);
}

/* A batch with a mistake is refused whole, and says why. */
static void mistakes_refuse_the_whole_batch(void)
{
	struct ibv_sge s[5] = {0};

	begin((struct tv_opt){.inline_data = 100});
#define REFUSED(err, ...)                                             \
	do {                                                          \
		start(1);                                             \
		ibv_wr_rdma_write(q, b.mr->rkey, (uintptr_t)b.buf);   \
		ibv_wr_set_sge(q, a.mr->lkey, (uintptr_t)a.buf, 100); \
		__VA_ARGS__;                                          \
		CHECK_EQ(ibv_wr_complete(q), err);                    \
	} while (0)
	REFUSED(EINVAL,
		ibv_wr_atomic_cmp_swp(q, b.mr->rkey, (uintptr_t)b.buf, 1, 2)); /* no place for the result */
	REFUSED(EINVAL, (ibv_wr_atomic_fetch_add(q, b.mr->rkey, (uintptr_t)b.buf, 1),
			 ibv_wr_set_inline_data(q, a.buf, 8)));
	REFUSED(EINVAL, (ibv_wr_local_inv(q, 1), ibv_wr_set_sge(q, a.mr->lkey, (uintptr_t)a.buf, 1)));
	REFUSED(EINVAL, ibv_wr_bind_mw(q, NULL, 0, NULL));
	REFUSED(EINVAL, ibv_wr_bind_mw(q, NULL, 0, &(struct ibv_mw_bind_info){.length = 1}));
	REFUSED(EOPNOTSUPP, ibv_wr_send_tso(q, NULL, 0, 0));
	REFUSED(EINVAL, (ibv_wr_atomic_write(q, b.mr->rkey, (uintptr_t)b.buf, "12345678"),
			 ibv_wr_set_sge(q, a.mr->lkey, (uintptr_t)a.buf, 8)));
	REFUSED(EINVAL, (ibv_wr_send(q), ibv_wr_set_ud_addr(q, NULL, 1, 1)));
	REFUSED(EINVAL, ibv_wr_set_sge(q, a.mr->lkey, (uintptr_t)a.buf, 100)); /* a second time */
	REFUSED(EINVAL, (ibv_wr_send(q), ibv_wr_set_sge_list(q, 5, s)));
	REFUSED(EINVAL, (ibv_wr_send(q), ibv_wr_set_inline_data(q, a.buf, 101)));
	REFUSED(EINVAL, (ibv_wr_send(q), ibv_wr_set_inline_data(q, a.buf, SIZE_MAX)));
	REFUSED(EINVAL,
		(ibv_wr_rdma_read(q, b.mr->rkey, (uintptr_t)b.buf), ibv_wr_set_inline_data(q, a.buf, 8)));
	/* Nothing of all that was posted, and the QP goes on. */
	start(2);
	ibv_wr_rdma_write(q, b.mr->rkey, (uintptr_t)b.buf);
	ibv_wr_set_sge(q, a.mr->lkey, (uintptr_t)a.buf, 100);
	CHECK_EQ(ibv_wr_complete(q), 0);
	tv_wait_ok(a.scq, 2);
	tv_pair_close(&a, &b);
}

static void a_batch_larger_than_the_queue_is_refused_whole(void)
{
	struct ibv_wc wc;

	begin((struct tv_opt){.send_wr = 4});
	for (unsigned n = 5; n >= 3; n--) {
		ibv_wr_start(q);
		for (unsigned i = 0; i < n; i++) {
			q->wr_id = i;
			q->wr_flags = IBV_SEND_SIGNALED;
			ibv_wr_send(q); /* no receive posted: nothing completes */
			ibv_wr_set_sge(q, a.mr->lkey, (uintptr_t)a.buf, 8);
		}
		if (n == 4)
			ibv_wr_abort(q);
		else
			CHECK_EQ(ibv_wr_complete(q), n == 5 ? ENOMEM : 0);
	}
	ibv_wr_start(q); /* one place is left */
	ibv_wr_send(q);
	ibv_wr_send(q);
	CHECK_EQ(ibv_wr_complete(q), ENOMEM);
	CHECK_EQ(ibv_poll_cq(a.scq, 1, &wc), 0);
	for (unsigned i = 0; i < 3; i++)
		CHECK_EQ(tv_recv(&b, i, 0, 64), 0);
	for (unsigned i = 0; i < 3; i++)
		tv_wait_ok(a.scq, i);
	tv_pair_close(&a, &b);
}

static void posting_before_rts_is_refused(void)
{
	struct tv_opt opt = {.unconnected = true};

	begin(opt);
	start(1);
	ibv_wr_send(q);
	CHECK_EQ(ibv_wr_complete(q), EINVAL);
	tv_pair_close(&a, &b);
}

static void both_interfaces_mix(void)
{
	struct ibv_send_wr wr;
	struct ibv_sge sge;

	begin((struct tv_opt){0});
	for (unsigned i = 0; i < 10; i++) {
		CHECK_EQ(tv_recv(&b, i, 0, 64), 0);
		if (i % 2) {
			start(i);
			ibv_wr_send(q);
			ibv_wr_set_sge(q, a.mr->lkey, (uintptr_t)a.buf, 10);
			CHECK_EQ(ibv_wr_complete(q), 0);
		} else {
			wr = tv_wr(&a, IBV_WR_SEND, i, &sge, 0, 10);
			CHECK_EQ(tv_post(&a, &wr), 0);
		}
	}
	for (unsigned i = 0; i < 10; i++) {
		tv_wait_ok(b.rcq, i);
		tv_wait_ok(a.scq, i);
	}
	tv_pair_close(&a, &b);
}

/* ---- extended CQs -------------------------------------------------------------------------------- */

static struct ibv_cq_ex *ex(struct ibv_cq *cq)
{
	return (struct ibv_cq_ex *)cq;
}

static void start_wait(struct ibv_cq_ex *cq)
{
	struct ibv_poll_cq_attr attr = {0};
	int err;

	while ((err = ibv_start_poll(cq, &attr)) == ENOENT)
		;
	CHECK_EQ(err, 0);
}

static void completions_are_read_field_by_field(void)
{
	struct ibv_cq_ex *r, *s;
	struct ibv_wc_tm_info tm;

	begin((struct tv_opt){.ex_cq = true});
	r = ex(b.rcq);
	s = ex(a.scq);
	CHECK(ibv_cq_ex_to_cq(r) == b.rcq);
	CHECK_EQ(ibv_start_poll(r, &(struct ibv_poll_cq_attr){0}), ENOENT);
	CHECK_EQ(ibv_start_poll(r, &(struct ibv_poll_cq_attr){.comp_mask = 1}), EINVAL);
	for (unsigned i = 0; i < 3; i++) {
		CHECK_EQ(tv_recv(&b, 70 + i, 0, 64), 0);
		start(i);
		ibv_wr_send_imm(q, htonl(40 + i));
		ibv_wr_set_sge(q, a.mr->lkey, (uintptr_t)a.buf, 10 + i);
		CHECK_EQ(ibv_wr_complete(q), 0);
	}
	start_wait(s); /* the third is acknowledged: all are there */
	for (int err, n = 1; n < 3; n++)
		while ((err = ibv_next_poll(s)))
			CHECK_EQ(err, ENOENT);
	CHECK_EQ(s->wr_id, 2);
	CHECK_EQ(s->status, IBV_WC_SUCCESS);
	CHECK_EQ(ibv_wc_read_opcode(s), IBV_WC_SEND);
	CHECK_EQ(ibv_wc_read_qp_num(s), a.qp->qp_num);
	CHECK_EQ(ibv_next_poll(s), ENOENT);
	ibv_end_poll(s);

	start_wait(r);
	for (unsigned i = 0; i < 3; i++) {
		CHECK_EQ(r->wr_id, 70 + i);
		CHECK_EQ(r->status, IBV_WC_SUCCESS);
		CHECK_EQ(ibv_wc_read_opcode(r), IBV_WC_RECV);
		CHECK_EQ(ibv_wc_read_byte_len(r), 10 + i);
		CHECK_EQ(ntohl(ibv_wc_read_imm_data(r)), 40 + i);
		CHECK_EQ(ibv_wc_read_qp_num(r), b.qp->qp_num);
		CHECK_EQ(ibv_wc_read_wc_flags(r), IBV_WC_WITH_IMM);
		CHECK_EQ(ibv_wc_read_vendor_err(r), 0);
		CHECK_EQ(ibv_wc_read_slid(r) | ibv_wc_read_sl(r) | ibv_wc_read_dlid_path_bits(r), 0);
		/* Never NULL, whatever was asked for at creation. */
		CHECK_EQ(ibv_wc_read_completion_ts(r), 0);
		CHECK_EQ(ibv_wc_read_completion_wallclock_ns(r), 0);
		CHECK_EQ(ibv_wc_read_cvlan(r), 0);
		CHECK_EQ(ibv_wc_read_flow_tag(r), 0);
		ibv_wc_read_tm_info(r, &tm);
		CHECK_EQ(tm.tag, 0);
		CHECK_EQ(ibv_next_poll(r), i < 2 ? 0 : ENOENT);
	}
	ibv_end_poll(r);
	tv_pair_close(&a, &b);
}

static void an_extended_cq_can_be_polled_the_old_way(void)
{
	begin((struct tv_opt){.ex_cq = true});
	for (unsigned i = 0; i < 4; i++) {
		CHECK_EQ(tv_recv(&b, i, 0, 64), 0);
		start(i);
		ibv_wr_send(q);
		CHECK_EQ(ibv_wr_complete(q), 0);
	}
	start_wait(ex(b.rcq));
	CHECK_EQ(ex(b.rcq)->wr_id, 0);
	ibv_end_poll(ex(b.rcq));
	for (unsigned i = 1; i < 4; i++)
		tv_wait_ok(b.rcq, i);
	tv_pair_close(&a, &b);
}

static uint64_t raw_clock(struct ibv_context *ctx)
{
	struct ibv_values_ex v = {.comp_mask = IBV_VALUES_MASK_RAW_CLOCK};

	CHECK_EQ(ibv_query_rt_values_ex(ctx, &v), 0);
	CHECK(!v.raw_clock.tv_sec);
	return (uint64_t)v.raw_clock.tv_nsec;
}

static uint64_t wallclock(void)
{
	struct timespec t;

	clock_gettime(CLOCK_REALTIME, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static void completions_tell_when_they_came(void)
{
	const struct tv_opt opt = {.ex_cq = true,
				   .wc_flags = IBV_WC_EX_WITH_COMPLETION_TIMESTAMP |
					       IBV_WC_EX_WITH_COMPLETION_TIMESTAMP_WALLCLOCK};
	uint64_t before, after, last, wall;
	struct ibv_sge sge;
	struct ibv_wc wc;

	tv_pair(&a, &b, &opt);
	for (unsigned i = 0; i < 3; i++)
		CHECK_EQ(tv_recv(&b, i, 0, 64), 0);
	before = last = raw_clock(a.ctx);
	wall = wallclock();
	for (unsigned i = 0; i < 3; i++) {
		struct ibv_send_wr wr = tv_wr(&a, IBV_WR_SEND, i, &sge, 0, 64);

		CHECK_EQ(tv_post(&a, &wr), 0);
		wc = tv_wait(a.scq); /* the receiver's is there now, and is looked at later */
		CHECK(wc.status == IBV_WC_SUCCESS && wc.wr_id == i);
	}
	CHECK_EQ(ibv_resize_cq(b.rcq, 300), 0);
	after = raw_clock(a.ctx);
	usleep(10000);
	for (unsigned i = 0; i < 3; i++) {
		start_wait(ex(b.rcq));
		CHECK_EQ(ex(b.rcq)->wr_id, i);
		CHECK(ibv_wc_read_completion_ts(ex(b.rcq)) >= last);
		last = ibv_wc_read_completion_ts(ex(b.rcq));
		CHECK(last >= before && last <= after);
		CHECK(ibv_wc_read_completion_wallclock_ns(ex(b.rcq)) - wall <= after - before + 5000000);
		ibv_end_poll(ex(b.rcq));
	}
	tv_pair_close(&a, &b);
}

static void creation_of_extended_cqs_checks_flags(void)
{
	struct ibv_context *ctx = tv_open();
	struct ibv_pd *pd = ibv_alloc_pd(ctx), *parent;
	struct ibv_cq_init_attr_ex ok = {.cqe = 16, .wc_flags = IBV_WC_STANDARD_FLAGS}, x;
	struct ibv_parent_domain_init_attr pa = {.pd = pd};
	struct ibv_cq_ex *cq;

	CHECK(parent = ibv_alloc_parent_domain(ctx, &pa));
#define BAD(err, change)                                     \
	do {                                                 \
		x = ok;                                      \
		change;                                      \
		CHECK_ERRNO(ibv_create_cq_ex(ctx, &x), err); \
	} while (0)
	BAD(EOPNOTSUPP, x.comp_mask = 1u << 9);
	BAD(EOPNOTSUPP, x.wc_flags |= IBV_WC_EX_WITH_CVLAN);
	BAD(EOPNOTSUPP, x.wc_flags |= IBV_WC_EX_WITH_FLOW_TAG);
	BAD(EOPNOTSUPP, x.wc_flags |= 1ull << 50);
	BAD(EOPNOTSUPP,
	    (x.comp_mask = IBV_CQ_INIT_ATTR_MASK_FLAGS, x.flags = IBV_CREATE_CQ_ATTR_IGNORE_OVERRUN));
	BAD(EINVAL, x.cqe = 0);
	BAD(EINVAL, x.comp_vector = (uint32_t)ctx->num_comp_vectors);
	BAD(EINVAL, x.comp_mask = IBV_CQ_INIT_ATTR_MASK_PD);
	BAD(EINVAL, (x.comp_mask = IBV_CQ_INIT_ATTR_MASK_PD, x.parent_domain = pd)); /* no parent domain */
	x = ok;
	x.comp_mask = IBV_CQ_INIT_ATTR_MASK_FLAGS | IBV_CQ_INIT_ATTR_MASK_PD;
	x.flags = IBV_CREATE_CQ_ATTR_SINGLE_THREADED;
	x.parent_domain = parent;
	CHECK(cq = ibv_create_cq_ex(ctx, &x));
	CHECK_EQ(ibv_modify_cq(ibv_cq_ex_to_cq(cq), &(struct ibv_modify_cq_attr){0}), EOPNOTSUPP);
	CHECK_EQ(ibv_destroy_cq(ibv_cq_ex_to_cq(cq)), 0);
	CHECK_EQ(ibv_dealloc_pd(parent), 0);
	CHECK_EQ(ibv_dealloc_pd(pd), 0);
	CHECK_EQ(ibv_close_device(ctx), 0);
}

TV_MAIN(T(every_operation_works), T(a_batch_is_posted_in_order), T(lists_of_pieces_are_gathered),
	T(aborted_batches_leave_nothing), T(mistakes_refuse_the_whole_batch),
	T(a_batch_larger_than_the_queue_is_refused_whole), T(posting_before_rts_is_refused),
	T(both_interfaces_mix), T(completions_are_read_field_by_field),
	T(an_extended_cq_can_be_polled_the_old_way), T(completions_tell_when_they_came),
	T(creation_of_extended_cqs_checks_flags))
