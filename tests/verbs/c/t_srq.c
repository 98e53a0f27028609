/* SPDX-License-Identifier: BSD-3-Clause */
/* Shared receive queues and XRC: two senders, one queue. */
#include "tv.h"

#include <fcntl.h>
#include <poll.h>
#include <unistd.h>

#define N 2

static const struct tv_opt opt;
static struct tv_end mem, src[N]; /* mem: the receiving side's PD, CQs, memory (its QP is not used) */
static struct ibv_srq *srq;
static struct ibv_xrcd *xrcd;
static struct ibv_qp *dst[N];

static int post_srq(struct ibv_srq *to, uint64_t wr_id, uint32_t off, uint32_t len)
{
	struct ibv_sge sge = {.addr = (uintptr_t)mem.buf + off, .length = len, .lkey = mem.mr->lkey};
	struct ibv_recv_wr wr = {.wr_id = wr_id, .sg_list = &sge, .num_sge = 1}, *bad = NULL;
	int err = ibv_post_srq_recv(to, &wr, &bad);

	CHECK(!err || bad == &wr);
	return err;
}

static void connect_qps(struct ibv_qp *x, struct ibv_qp *y)
{
	struct ibv_qp *q[2] = {x, y};

	for (int i = 0; i < 2; i++)
		tv_to_init(q[i], &opt);
	for (int i = 0; i < 2; i++)
		CHECK_EQ(tv_to_rtr(q[i], q[!i]->qp_num, &opt), 0);
	for (int i = 0; i < 2; i++)
		CHECK_EQ(tv_to_rts(q[i], &opt), 0);
}

/* N senders, each connected to a QP of its own on the one queue. */
static void open_shared(unsigned max_wr)
{
	struct ibv_context *ctx = tv_open();
	struct ibv_srq_init_attr init = {.srq_context = &mem, .attr = {.max_wr = max_wr, .max_sge = 2}};
	struct ibv_qp_init_attr qi = {.qp_type = IBV_QPT_RC, .cap = {.max_send_wr = 4, .max_send_sge = 1}};

	tv_end_open(&mem, ctx, &opt);
	CHECK(srq = ibv_create_srq(mem.pd, &init));
	CHECK(srq->context == ctx && srq->pd == mem.pd && srq->srq_context == &mem);
	CHECK(init.attr.max_wr >= max_wr && init.attr.max_sge >= 2);
	qi.send_cq = mem.scq;
	qi.recv_cq = mem.rcq;
	qi.srq = srq;
	for (int i = 0; i < N; i++) {
		tv_end_open(&src[i], ctx, &opt);
		CHECK(dst[i] = ibv_create_qp(mem.pd, &qi));
		CHECK(dst[i]->srq == srq);
		connect_qps(src[i].qp, dst[i]);
	}
}

static void close_all(void)
{
	struct ibv_context *ctx = mem.ctx;

	for (int i = 0; i < N; i++) {
		tv_end_close(&src[i]);
		CHECK_EQ(ibv_destroy_qp(dst[i]), 0);
	}
	CHECK_EQ(ibv_destroy_srq(srq), 0);
	if (xrcd)
		CHECK_EQ(ibv_close_xrcd(xrcd), 0);
	tv_end_close(&mem);
	CHECK_EQ(ibv_close_device(ctx), 0);
}

static void send_from(int i, uint64_t wr_id, uint32_t len, uint32_t srqn)
{
	struct ibv_sge sge;
	struct ibv_send_wr wr = tv_wr(&src[i], IBV_WR_SEND, wr_id, &sge, 0, len);

	wr.qp_type.xrc.remote_srqn = srqn;
	tv_fill(src[i].buf, len, (unsigned)wr_id);
	CHECK_EQ(tv_post(&src[i], &wr), 0);
	tv_wait_ok(src[i].scq, wr_id);
}

static struct ibv_async_event next_event(void)
{
	struct pollfd p = {.fd = mem.ctx->async_fd, .events = POLLIN};
	struct ibv_async_event ev;

	do {
		CHECK_EQ(poll(&p, 1, 10000), 1);
		CHECK_EQ(ibv_get_async_event(mem.ctx, &ev), 0);
		ibv_ack_async_event(&ev);
	} while (ev.event_type == IBV_EVENT_COMM_EST);
	return ev;
}

static void no_event(void)
{
	struct pollfd p = {.fd = mem.ctx->async_fd, .events = POLLIN};
	struct ibv_async_event ev;

	while (poll(&p, 1, 0) == 1) {
		CHECK_EQ(ibv_get_async_event(mem.ctx, &ev), 0);
		ibv_ack_async_event(&ev);
		CHECK_EQ(ev.event_type, IBV_EVENT_COMM_EST);
	}
}

static void whoever_sends_takes_the_next_request(void)
{
	struct ibv_recv_wr wr = {0}, *bad;
	struct ibv_wc wc;

	open_shared(8);
	for (unsigned i = 0; i < 4; i++)
		CHECK_EQ(post_srq(srq, 10 + i, 4096 * i, 4096), 0);
	for (unsigned i = 0; i < 4; i++) {
		send_from((int)(i % N), 100 + i, 3000, 0);
		wc = tv_wait(mem.rcq);
		CHECK(wc.status == IBV_WC_SUCCESS && wc.opcode == IBV_WC_RECV && wc.byte_len == 3000);
		CHECK_EQ(wc.wr_id, 10 + i);
		CHECK_EQ(wc.qp_num, dst[i % N]->qp_num);
		CHECK_EQ(wc.src_qp, src[i % N].qp->qp_num);
		CHECK(tv_filled(mem.buf + 4096 * i, 3000, 100 + i));
	}
	CHECK_EQ(ibv_post_recv(dst[0], &wr, &bad), EINVAL); /* it has no queue of its own */
	CHECK(bad == &wr);
	close_all();
}

static void a_queue_in_use_stays(void)
{
	open_shared(4);
	CHECK_EQ(ibv_destroy_srq(srq), EBUSY);
	CHECK_EQ(ibv_dealloc_pd(mem.pd), EBUSY);
	close_all();
}

static void attributes_are_checked(void)
{
	struct ibv_context *ctx = tv_open();
	struct ibv_pd *pd = ibv_alloc_pd(ctx);
	struct ibv_device_attr dev;
	struct ibv_srq_init_attr bad = {.attr = {.max_wr = 0, .max_sge = 1}};
	struct ibv_srq_init_attr most = {0};
	struct ibv_srq_attr attr = {0};

	CHECK_EQ(ibv_query_device(ctx, &dev), 0);
	CHECK_ERRNO(ibv_create_srq(pd, &bad), EINVAL);
	bad.attr = (struct ibv_srq_attr){.max_wr = (unsigned)dev.max_srq_wr + 1, .max_sge = 1};
	CHECK_ERRNO(ibv_create_srq(pd, &bad), EINVAL);
	bad.attr = (struct ibv_srq_attr){.max_wr = 1, .max_sge = (unsigned)dev.max_srq_sge + 1};
	CHECK_ERRNO(ibv_create_srq(pd, &bad), EINVAL);
	most.attr = (struct ibv_srq_attr){.max_wr = (unsigned)dev.max_srq_wr,
					  .max_sge = (unsigned)dev.max_srq_sge};
	CHECK(srq = ibv_create_srq(pd, &most));
	CHECK_EQ(ibv_query_srq(srq, &attr), 0);
	CHECK(attr.max_wr == most.attr.max_wr && attr.max_sge == most.attr.max_sge && !attr.srq_limit);
	CHECK_EQ(ibv_modify_srq(srq, &attr, 1 << 7), EINVAL);
	CHECK_EQ(ibv_destroy_srq(srq), 0);
	CHECK_EQ(ibv_dealloc_pd(pd), 0);
	CHECK_EQ(ibv_close_device(ctx), 0);
}

static void resizing_keeps_what_is_queued(void)
{
	struct ibv_srq_attr attr = {.max_wr = 2};
	struct ibv_wc wc;

	open_shared(4);
	for (unsigned i = 0; i < 3; i++)
		CHECK_EQ(post_srq(srq, i, 4096 * i, 4096), 0);
	CHECK_EQ(ibv_modify_srq(srq, &attr, IBV_SRQ_MAX_WR), EINVAL); /* three are queued */
	attr.max_wr = 3;
	CHECK_EQ(ibv_modify_srq(srq, &attr, IBV_SRQ_MAX_WR), 0);
	CHECK_EQ(post_srq(srq, 3, 0, 64), ENOMEM);
	attr.max_wr = 100;
	CHECK_EQ(ibv_modify_srq(srq, &attr, IBV_SRQ_MAX_WR), 0);
	CHECK_EQ(ibv_query_srq(srq, &attr), 0);
	CHECK_EQ(attr.max_wr, 100);
	for (unsigned i = 3; i < 40; i++)
		CHECK_EQ(post_srq(srq, i, 4096 * i, 4096), 0);
	for (unsigned i = 0; i < 40; i++) {
		send_from((int)(i % N), i, 100, 0);
		wc = tv_wait(mem.rcq);
		CHECK(wc.status == IBV_WC_SUCCESS && wc.wr_id == i);
		CHECK(tv_filled(mem.buf + 4096 * i, 100, i));
	}
	close_all();
}

static void the_limit_is_told_once(void)
{
	struct ibv_srq_attr attr = {.srq_limit = 5};
	struct ibv_async_event ev;

	open_shared(4);
	CHECK_EQ(ibv_modify_srq(srq, &attr, IBV_SRQ_LIMIT), EINVAL); /* above the size */
	for (unsigned i = 0; i < 4; i++)
		CHECK_EQ(post_srq(srq, i, 0, 64), 0);
	attr.srq_limit = 3;
	CHECK_EQ(ibv_modify_srq(srq, &attr, IBV_SRQ_LIMIT), 0);
	send_from(0, 1, 8, 0); /* three are left: not below */
	no_event();
	send_from(1, 2, 8, 0);
	ev = next_event();
	CHECK(ev.event_type == IBV_EVENT_SRQ_LIMIT_REACHED && ev.element.srq == srq);
	CHECK_EQ(ibv_query_srq(srq, &attr), 0);
	CHECK_EQ(attr.srq_limit, 0);
	send_from(0, 3, 8, 0);
	no_event();
	close_all();
}

static void an_unread_limit_event_goes_with_its_queue(void)
{
	struct ibv_srq_attr attr = {.srq_limit = 1};

	open_shared(4);
	CHECK_EQ(post_srq(srq, 0, 0, 64), 0);
	CHECK_EQ(ibv_modify_srq(srq, &attr, IBV_SRQ_LIMIT), 0);
	send_from(0, 1, 8, 0);
	/* Not fetched: it goes with its object. */
	close_all();
}

static void an_error_leaves_the_queue_to_the_others(void)
{
	struct ibv_qp_attr err = {.qp_state = IBV_QPS_ERR};
	struct ibv_async_event ev;
	struct ibv_wc wc;

	open_shared(4);
	CHECK_EQ(post_srq(srq, 7, 0, 64), 0);
	CHECK_EQ(ibv_modify_qp(dst[0], &err, IBV_QP_STATE), 0);
	ev = next_event();
	CHECK(ev.event_type == IBV_EVENT_QP_LAST_WQE_REACHED && ev.element.qp == dst[0]);
	CHECK_EQ(ibv_poll_cq(mem.rcq, 1, &wc), 0); /* nothing is flushed */
	send_from(1, 1, 8, 0);
	wc = tv_wait(mem.rcq);
	CHECK(wc.status == IBV_WC_SUCCESS && wc.wr_id == 7 && wc.qp_num == dst[1]->qp_num);
	close_all();
}

static void a_message_too_long_ends_its_qp_only(void)
{
	struct ibv_sge sge;
	struct ibv_send_wr wr;
	struct ibv_wc wc;

	open_shared(4);
	CHECK_EQ(post_srq(srq, 1, 0, 64), 0);
	CHECK_EQ(post_srq(srq, 2, 0, 64), 0);
	wr = tv_wr(&src[0], IBV_WR_SEND, 5, &sge, 0, 65);
	CHECK_EQ(tv_post(&src[0], &wr), 0);
	wc = tv_wait(mem.rcq);
	CHECK(wc.wr_id == 1 && wc.status == IBV_WC_LOC_LEN_ERR && wc.qp_num == dst[0]->qp_num);
	CHECK_EQ(tv_wait(src[0].scq).status, IBV_WC_REM_INV_REQ_ERR);
	send_from(1, 6, 64, 0);
	CHECK_EQ(tv_wait(mem.rcq).wr_id, 2);
	close_all();
}

/* ---- XRC ------------------------------------------------------------------------------------------ */

static struct ibv_xrcd *open_domain(struct ibv_context *ctx, int fd, int oflags)
{
	struct ibv_xrcd_init_attr a = {
		.comp_mask = IBV_XRCD_INIT_ATTR_FD | IBV_XRCD_INIT_ATTR_OFLAGS, .fd = fd, .oflags = oflags};

	return ibv_open_xrcd(ctx, &a);
}

static struct ibv_srq *xrc_srq(struct ibv_xrcd *x, struct ibv_cq *cq, uint32_t *num)
{
	struct ibv_srq_init_attr_ex a = {.attr = {.max_wr = 8, .max_sge = 1},
					 .comp_mask = IBV_SRQ_INIT_ATTR_TYPE | IBV_SRQ_INIT_ATTR_PD |
						      IBV_SRQ_INIT_ATTR_XRCD | IBV_SRQ_INIT_ATTR_CQ,
					 .srq_type = IBV_SRQT_XRC,
					 .pd = mem.pd,
					 .xrcd = x,
					 .cq = cq};
	struct ibv_srq *s = ibv_create_srq_ex(mem.ctx, &a);

	CHECK(s);
	CHECK_EQ(ibv_get_srq_num(s, num), 0);
	CHECK(*num && *num < 1u << 24);
	return s;
}

/* N senders to N targets of one domain with one queue. */
static uint32_t open_xrc(void)
{
	struct ibv_context *ctx = tv_open();
	struct ibv_qp_init_attr_ex ti = {.qp_type = IBV_QPT_XRC_RECV, .comp_mask = IBV_QP_INIT_ATTR_XRCD};
	struct ibv_qp_init_attr_ex si = {.qp_type = IBV_QPT_XRC_SEND,
					 .comp_mask = IBV_QP_INIT_ATTR_PD | IBV_QP_INIT_ATTR_SEND_OPS_FLAGS,
					 .send_ops_flags = IBV_QP_EX_WITH_SEND,
					 .cap = {.max_send_wr = 8, .max_send_sge = 1}};
	uint32_t num;

	tv_end_open(&mem, ctx, &opt);
	CHECK(xrcd = open_domain(ctx, -1, O_CREAT));
	srq = xrc_srq(xrcd, mem.rcq, &num);
	ti.xrcd = xrcd;
	for (int i = 0; i < N; i++) {
		tv_end_open(&src[i], ctx, &opt);
		CHECK_EQ(ibv_destroy_qp(src[i].qp), 0);
		si.pd = src[i].pd;
		si.send_cq = src[i].scq;
		CHECK(src[i].qp = ibv_create_qp_ex(ctx, &si));
		CHECK(dst[i] = ibv_create_qp_ex(ctx, &ti));
		CHECK(!dst[i]->pd && !dst[i]->send_cq && !dst[i]->recv_cq && !dst[i]->srq);
		connect_qps(src[i].qp, dst[i]);
	}
	return num;
}

static void xrc_requests_name_their_queue(void)
{
	uint32_t num = open_xrc(), other;
	struct ibv_srq *second = xrc_srq(xrcd, mem.scq, &other);
	struct ibv_wc wc;

	CHECK(num != other);
	for (unsigned i = 0; i < 2; i++) {
		CHECK_EQ(post_srq(srq, 10 + i, 4096 * i, 4096), 0);
		CHECK_EQ(post_srq(second, 20 + i, 4096 * (2 + i), 4096), 0);
	}
	for (unsigned i = 0; i < 2; i++) {
		send_from((int)i, 30 + i, 2500, num);
		wc = tv_wait(mem.rcq);
		CHECK(wc.status == IBV_WC_SUCCESS && wc.wr_id == 10 + i && wc.byte_len == 2500);
		CHECK(wc.qp_num == dst[i]->qp_num && wc.src_qp == src[i].qp->qp_num);
		CHECK(tv_filled(mem.buf + 4096 * i, 2500, 30 + i));
		send_from((int)i, 40 + i, 2500, other);
		wc = tv_wait(mem.scq);
		CHECK(wc.status == IBV_WC_SUCCESS && wc.wr_id == 20 + i);
		CHECK(tv_filled(mem.buf + 4096 * (2 + i), 2500, 40 + i));
	}
	CHECK_EQ(ibv_destroy_srq(second), 0);
	close_all();
}

static void xrc_writes_and_reads(void)
{
	uint32_t num = open_xrc();
	struct ibv_sge sge;
	struct ibv_send_wr wr = tv_wr(&src[0], IBV_WR_RDMA_WRITE, 1, &sge, 0, 5000);

	wr.qp_type.xrc.remote_srqn = num; /* whose PD the key is of */
	wr.wr.rdma.remote_addr = (uintptr_t)mem.buf;
	wr.wr.rdma.rkey = mem.mr->rkey;
	tv_fill(src[0].buf, 5000, 9);
	CHECK_EQ(tv_post(&src[0], &wr), 0);
	tv_wait_ok(src[0].scq, 1);
	CHECK(tv_filled(mem.buf, 5000, 9));
	wr.opcode = IBV_WR_RDMA_READ;
	wr.wr_id = 2;
	sge.addr += 8192;
	CHECK_EQ(tv_post(&src[0], &wr), 0);
	tv_wait_ok(src[0].scq, 2);
	CHECK(tv_filled(src[0].buf + 8192, 5000, 9));
	close_all();
}

static void xrc_by_the_wr_interface(void)
{
	uint32_t num = open_xrc();
	struct ibv_qp_ex *q = ibv_qp_to_qp_ex(src[0].qp);

	CHECK_EQ(post_srq(srq, 1, 0, 64), 0);
	tv_fill(src[0].buf, 64, 3);
	ibv_wr_start(q);
	q->wr_id = 8;
	q->wr_flags = IBV_SEND_SIGNALED;
	ibv_wr_send(q);
	ibv_wr_set_xrc_srqn(q, num);
	ibv_wr_set_sge(q, src[0].mr->lkey, (uintptr_t)src[0].buf, 64);
	CHECK_EQ(ibv_wr_complete(q), 0);
	tv_wait_ok(src[0].scq, 8);
	CHECK_EQ(tv_wait(mem.rcq).wr_id, 1);
	CHECK(tv_filled(mem.buf, 64, 3));
	close_all();
}

static void an_unknown_xrc_queue_is_refused(void)
{
	uint32_t num = open_xrc(), foreign;
	struct ibv_xrcd *elsewhere = open_domain(mem.ctx, -1, O_CREAT);
	struct ibv_srq *there = xrc_srq(elsewhere, mem.rcq, &foreign);
	uint32_t wrong[N] = {num ^ 1, foreign};

	CHECK_EQ(post_srq(there, 1, 0, 64), 0);
	for (int i = 0; i < N; i++) {
		struct ibv_sge sge;
		struct ibv_send_wr wr = tv_wr(&src[i], IBV_WR_SEND, 5, &sge, 0, 8);
		struct ibv_async_event ev;

		wr.qp_type.xrc.remote_srqn = wrong[i];
		CHECK_EQ(tv_post(&src[i], &wr), 0);
		CHECK_EQ(tv_wait(src[i].scq).status, IBV_WC_REM_INV_REQ_ERR);
		ev = next_event();
		CHECK(ev.event_type == IBV_EVENT_QP_REQ_ERR && ev.element.qp == dst[i]);
	}
	CHECK_EQ(ibv_close_xrcd(elsewhere), EBUSY);
	CHECK_EQ(ibv_destroy_srq(there), 0);
	CHECK_EQ(ibv_close_xrcd(elsewhere), 0);
	close_all();
}

static void each_half_of_xrc_does_its_half(void)
{
	struct ibv_recv_wr recv = {0}, *bad_recv;
	struct ibv_send_wr send = {.opcode = IBV_WR_SEND}, *bad_send;

	open_xrc();
	CHECK_EQ(ibv_post_recv(src[0].qp, &recv, &bad_recv), EINVAL);
	CHECK_EQ(ibv_post_recv(dst[0], &recv, &bad_recv), EINVAL);
	CHECK_EQ(ibv_post_send(dst[0], &send, &bad_send), EINVAL);
	close_all();
}

static void a_file_names_a_domain(void)
{
	struct ibv_context *one = tv_open(), *two = tv_open();
	char path[] = "/tmp/tvxrcXXXXXX";
	struct ibv_xrcd *x, *y;
	int fd = mkstemp(path);

	CHECK(fd >= 0 && !unlink(path));
	CHECK_ERRNO(open_domain(one, fd, 0), EAGAIN); /* not there yet */
	CHECK_ERRNO(open_domain(one, 1 << 20, O_CREAT), EBADF);
	CHECK(x = open_domain(one, fd, O_CREAT));
	CHECK_ERRNO(open_domain(two, fd, O_CREAT | O_EXCL), EINVAL);
	CHECK(y = open_domain(two, fd, 0));
	CHECK_EQ(ibv_close_xrcd(x), 0);
	CHECK(x = open_domain(one, fd, 0)); /* as long as somebody has it open */
	CHECK_EQ(ibv_close_xrcd(x), 0);
	CHECK_EQ(ibv_close_xrcd(y), 0);
	CHECK_ERRNO(open_domain(one, fd, 0), EAGAIN);
	CHECK_EQ(close(fd), 0);
	CHECK_EQ(ibv_close_device(one), 0);
	CHECK_EQ(ibv_close_device(two), 0);
}

static void an_xrc_target_can_be_opened_again(void)
{
	uint32_t num = open_xrc();
	struct ibv_qp_open_attr open = {.comp_mask = IBV_QP_OPEN_ATTR_NUM | IBV_QP_OPEN_ATTR_XRCD |
						     IBV_QP_OPEN_ATTR_TYPE | IBV_QP_OPEN_ATTR_CONTEXT,
					.qp_num = dst[0]->qp_num,
					.xrcd = xrcd,
					.qp_context = &num,
					.qp_type = IBV_QPT_XRC_RECV};
	struct ibv_qp_init_attr init;
	struct ibv_qp_attr attr;
	struct ibv_qp *again;

	CHECK(again = ibv_open_qp(mem.ctx, &open));
	CHECK(again != dst[0] && again->qp_num == dst[0]->qp_num && again->qp_context == &num);
	CHECK_EQ(ibv_query_qp(again, &attr, IBV_QP_STATE, &init), 0);
	CHECK(attr.qp_state == IBV_QPS_RTS && init.qp_type == IBV_QPT_XRC_RECV);
	CHECK_EQ(ibv_destroy_qp(dst[0]), 0); /* the QP lives on */
	dst[0] = again;
	CHECK_EQ(post_srq(srq, 1, 0, 64), 0);
	send_from(0, 2, 64, num);
	CHECK_EQ(tv_wait(mem.rcq).wr_id, 1);
	open.qp_num ^= 1;
	CHECK_ERRNO(ibv_open_qp(mem.ctx, &open), EINVAL);
	open.qp_num = src[0].qp->qp_num; /* no target */
	CHECK_ERRNO(ibv_open_qp(mem.ctx, &open), EINVAL);
	close_all();
}

static void closing_the_device_takes_it_all(void)
{
	uint32_t num = open_xrc();

	CHECK_EQ(post_srq(srq, 1, 0, 64), 0);
	send_from(0, 2, 64, num);
	CHECK_EQ(ibv_close_device(mem.ctx), 0);
	for (int i = 0; i < N; i++)
		free(src[i].buf);
	free(mem.buf);
}

TV_MAIN(T(whoever_sends_takes_the_next_request), T(a_queue_in_use_stays), T(attributes_are_checked),
	T(resizing_keeps_what_is_queued), T(the_limit_is_told_once),
	T(an_unread_limit_event_goes_with_its_queue), T(an_error_leaves_the_queue_to_the_others),
	T(a_message_too_long_ends_its_qp_only), T(xrc_requests_name_their_queue), T(xrc_writes_and_reads),
	T(xrc_by_the_wr_interface), T(an_unknown_xrc_queue_is_refused), T(each_half_of_xrc_does_its_half),
	T(a_file_names_a_domain), T(an_xrc_target_can_be_opened_again), T(closing_the_device_takes_it_all))
