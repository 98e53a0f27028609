/* SPDX-License-Identifier: BSD-3-Clause */
/* Queue pairs and CQs as objects: creation, states, queries, references. */
#include "tv.h"

static void a_qp_says_what_it_is(void)
{
	struct tv_end a, b;

	tv_pair(&a, &b, &(struct tv_opt){.unconnected = true});
	CHECK(a.qp->context == a.ctx && a.qp->pd == a.pd && a.qp->send_cq == a.scq && a.qp->recv_cq == a.rcq);
	CHECK(a.qp->qp_context == &a && !a.qp->srq);
	CHECK_EQ(a.qp->qp_type, IBV_QPT_RC);
	CHECK_EQ(a.qp->state, IBV_QPS_RESET);
	CHECK(a.qp->qp_num > 1 && a.qp->qp_num < 1u << 24 && a.qp->qp_num != b.qp->qp_num);
	CHECK(!ibv_qp_to_qp_ex(a.qp)); /* not made for ibv_wr_* */
	tv_pair_close(&a, &b);
}

static void a_small_cq_gets_some_more(void)
{
	struct ibv_context *ctx = tv_open();
	struct ibv_cq *cq = ibv_create_cq(ctx, 1, NULL, NULL, 0);

	CHECK(cq);
	CHECK(cq->cqe >= 4); /* ib_send_lat -e asks for one and needs more */
	CHECK_EQ(ibv_destroy_cq(cq), 0);
	CHECK_EQ(ibv_close_device(ctx), 0);
}

static void creation_checks_its_arguments(void)
{
	struct ibv_context *ctx = tv_open();
	struct ibv_pd *pd = ibv_alloc_pd(ctx);
	struct ibv_cq *cq = ibv_create_cq(ctx, 16, NULL, NULL, 0);
	struct ibv_qp_init_attr_ex ok = {.send_cq = cq,
					 .recv_cq = cq,
					 .pd = pd,
					 .qp_type = IBV_QPT_RC,
					 .cap = {8, 8, 1, 1, 0},
					 .comp_mask = IBV_QP_INIT_ATTR_PD},
				   x;
	struct ibv_qp *qp;

	x = ok;
	CHECK(qp = ibv_create_qp_ex(ctx, &x));
	CHECK(x.cap.max_inline_data >= ok.cap.max_send_sge * sizeof(struct ibv_sge)); /* as rxe grants it */
	CHECK_EQ(ibv_destroy_qp(qp), 0);
#define REFUSED(err, change)                                 \
	do {                                                 \
		x = ok;                                      \
		change;                                      \
		CHECK_ERRNO(ibv_create_qp_ex(ctx, &x), err); \
	} while (0)
	REFUSED(EOPNOTSUPP, x.comp_mask |= 1u << 20);
	REFUSED(EINVAL, (x.comp_mask |= IBV_QP_INIT_ATTR_XRCD, x.qp_type = IBV_QPT_XRC_RECV));
	REFUSED(EOPNOTSUPP, x.comp_mask |= IBV_QP_INIT_ATTR_RX_HASH);
	REFUSED(EOPNOTSUPP, (x.comp_mask |= IBV_QP_INIT_ATTR_CREATE_FLAGS, x.create_flags = 2));
	REFUSED(EOPNOTSUPP, (x.comp_mask |= IBV_QP_INIT_ATTR_MAX_TSO_HEADER, x.max_tso_header = 64));
	REFUSED(EOPNOTSUPP, (x.comp_mask |= IBV_QP_INIT_ATTR_SEND_OPS_FLAGS, x.send_ops_flags = 1ull << 40));
	REFUSED(EOPNOTSUPP,
		(x.comp_mask |= IBV_QP_INIT_ATTR_SEND_OPS_FLAGS, x.send_ops_flags = IBV_QP_EX_WITH_TSO));
	REFUSED(EOPNOTSUPP, (x.comp_mask |= IBV_QP_INIT_ATTR_SEND_OPS_FLAGS, x.qp_type = IBV_QPT_UC,
			     x.send_ops_flags = IBV_QP_EX_WITH_RDMA_READ));
	REFUSED(EOPNOTSUPP, (x.comp_mask |= IBV_QP_INIT_ATTR_SEND_OPS_FLAGS, x.qp_type = IBV_QPT_UD,
			     x.send_ops_flags = IBV_QP_EX_WITH_RDMA_WRITE));
	REFUSED(EINVAL, x.comp_mask = IBV_QP_INIT_ATTR_CREATE_FLAGS);
	REFUSED(EINVAL, x.send_cq = NULL);
	REFUSED(EINVAL, x.recv_cq = NULL);
	REFUSED(EOPNOTSUPP, x.qp_type = IBV_QPT_RAW_PACKET);
	REFUSED(EINVAL, x.cap.max_inline_data = 1u << 20);
	REFUSED(EINVAL, x.cap.max_send_wr = 1u << 30);
	CHECK_ERRNO(ibv_create_cq(ctx, 0, NULL, NULL, 0), EINVAL);
	CHECK_ERRNO(ibv_create_cq(ctx, -1, NULL, NULL, 0), EINVAL);
	CHECK_ERRNO(ibv_create_cq(ctx, 16, NULL, NULL, ctx->num_comp_vectors), EINVAL);
	CHECK_ERRNO(ibv_create_cq(ctx, 16, NULL, NULL, -1), EINVAL);
	CHECK_EQ(ibv_destroy_cq(cq), 0);
	CHECK_EQ(ibv_dealloc_pd(pd), 0);
	CHECK_EQ(ibv_close_device(ctx), 0);
}

static void what_is_in_use_cannot_be_destroyed(void)
{
	struct tv_end a, b;

	tv_pair(&a, &b, &(struct tv_opt){.channel = true});
	CHECK_EQ(ibv_destroy_cq(a.scq), EBUSY);
	CHECK_EQ(ibv_destroy_cq(a.rcq), EBUSY);
	CHECK_EQ(ibv_dealloc_pd(a.pd), EBUSY);
	CHECK_EQ(ibv_destroy_comp_channel(a.channel), EBUSY);
	tv_pair_close(&a, &b);
}

static void states_are_followed(void)
{
	struct tv_opt opt = {.unconnected = true};
	struct ibv_qp_init_attr init;
	struct ibv_qp_attr attr;
	struct tv_end a, b;

	tv_pair(&a, &b, &opt);
	CHECK_EQ(tv_to_rts(a.qp, &opt), EINVAL); /* not from RESET */
	CHECK_EQ(a.qp->state, IBV_QPS_RESET);
	tv_to_init(a.qp, &opt);
	CHECK_EQ(a.qp->state, IBV_QPS_INIT);
	CHECK_EQ(tv_to_rtr(a.qp, b.qp->qp_num, &opt), 0);
	CHECK_EQ(a.qp->state, IBV_QPS_RTR);
	CHECK_EQ(tv_to_rts(a.qp, &opt), 0);
	CHECK_EQ(a.qp->state, IBV_QPS_RTS);

	memset(&attr, 0xa5, sizeof(attr));
	memset(&init, 0xa5, sizeof(init));
	CHECK_EQ(ibv_query_qp(a.qp, &attr, IBV_QP_STATE | IBV_QP_AV | IBV_QP_CAP, &init), 0);
	CHECK_EQ(attr.qp_state, IBV_QPS_RTS);
	CHECK_EQ(attr.dest_qp_num, b.qp->qp_num);
	CHECK_EQ(attr.path_mtu, IBV_MTU_1024);
	CHECK_EQ(attr.port_num, 1);
	CHECK(attr.ah_attr.is_global && attr.ah_attr.grh.sgid_index == 1 && attr.ah_attr.grh.hop_limit == 64);
	CHECK(attr.retry_cnt == 7 && attr.rnr_retry == 7 && attr.timeout == 14 && attr.max_rd_atomic == 4);
	CHECK(init.send_cq == a.scq && init.recv_cq == a.rcq && init.qp_context == &a && !init.srq);
	CHECK_EQ(init.qp_type, IBV_QPT_RC);
	CHECK(init.cap.max_send_wr >= 64 && init.cap.max_recv_sge >= 4);

	attr.qp_state = IBV_QPS_ERR;
	CHECK_EQ(ibv_modify_qp(a.qp, &attr, IBV_QP_STATE), 0);
	CHECK_EQ(a.qp->state, IBV_QPS_ERR);
	attr.qp_state = IBV_QPS_RESET;
	CHECK_EQ(ibv_modify_qp(a.qp, &attr, IBV_QP_STATE), 0);
	CHECK_EQ(a.qp->state, IBV_QPS_RESET);
	tv_pair_close(&a, &b);
}

static void modify_checks_its_arguments(void)
{
	const int rtr = IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
			IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER;
	struct tv_opt opt = {.unconnected = true};
	struct ibv_qp_attr ok, x;
	struct tv_end a, b;
	int index;

	tv_pair(&a, &b, &opt);
	x = (struct ibv_qp_attr){.qp_state = IBV_QPS_INIT, .port_num = 2};
	CHECK_EQ(
		ibv_modify_qp(a.qp, &x, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS),
		EINVAL);
	x.port_num = 1;
	x.pkey_index = 64; /* rxe has that many */
	CHECK_EQ(
		ibv_modify_qp(a.qp, &x, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS),
		EINVAL);
	CHECK_EQ(ibv_modify_qp(a.qp, &x, IBV_QP_STATE), EINVAL);
	tv_to_init(a.qp, &opt);
	ok = (struct ibv_qp_attr){.qp_state = IBV_QPS_RTR,
				  .path_mtu = IBV_MTU_1024,
				  .dest_qp_num = b.qp->qp_num,
				  .max_dest_rd_atomic = 1,
				  .ah_attr = {.is_global = 1, .port_num = 1}};
	tv_gid(a.ctx, &ok.ah_attr.grh.dgid, &index);
	ok.ah_attr.grh.sgid_index = (uint8_t)index;
#define BAD(change)                                             \
	do {                                                    \
		x = ok;                                         \
		change;                                         \
		CHECK_EQ(ibv_modify_qp(a.qp, &x, rtr), EINVAL); \
		CHECK_EQ(a.qp->state, IBV_QPS_INIT);            \
	} while (0)
	BAD(x.path_mtu = 0);
	BAD(x.path_mtu = 9);
	BAD(x.ah_attr.is_global = 0);
	BAD(x.ah_attr.grh.sgid_index = 99);
	x = ok;
	x.ah_attr.grh.sgid_index = 9;
	CHECK_EQ(ibv_modify_qp(a.qp, &x, rtr), ENODATA); /* an empty entry */
	BAD(x.ah_attr.grh.sgid_index = 0);		 /* the link-local one */
	BAD(x.dest_qp_num = 1u << 24);
	BAD(x.min_rnr_timer = 77);
	CHECK_EQ(ibv_modify_qp(a.qp, &ok, rtr & ~IBV_QP_AV), EINVAL);
	CHECK_EQ(ibv_modify_qp(a.qp, &ok, rtr | IBV_QP_QKEY), EINVAL);
	CHECK_EQ(ibv_modify_qp(a.qp, &ok, rtr), 0);
	tv_pair_close(&a, &b);
}

static void posting_needs_a_state(void)
{
	struct tv_opt opt = {.unconnected = true};
	struct ibv_send_wr wr, *bad = NULL;
	struct ibv_recv_wr rwr = {0}, *rbad = NULL;
	struct tv_end a, b;
	struct ibv_sge sge;

	tv_pair(&a, &b, &opt);
	wr = tv_wr(&a, IBV_WR_SEND, 1, &sge, 0, 8);
	CHECK_EQ(ibv_post_send(a.qp, &wr, &bad), EINVAL);
	CHECK(bad == &wr);
	CHECK_EQ(ibv_post_recv(a.qp, &rwr, &rbad), EINVAL);
	CHECK(rbad == &rwr);
	tv_to_init(a.qp, &opt);
	CHECK_EQ(ibv_post_send(a.qp, &wr, &bad), EINVAL);
	CHECK_EQ(ibv_post_recv(a.qp, &rwr, &rbad), 0);
	CHECK_EQ(tv_to_rtr(a.qp, b.qp->qp_num, &opt), 0);
	CHECK_EQ(ibv_post_send(a.qp, &wr, &bad), EINVAL);
	tv_pair_close(&a, &b);
}

static void cqs_can_be_resized(void)
{
	struct tv_end a, b;
	struct ibv_send_wr wr;
	struct ibv_sge sge;

	tv_pair(&a, &b, &(struct tv_opt){.cqe = 8});
	CHECK(a.scq->cqe >= 8);
	for (unsigned i = 0; i < 4; i++) {
		wr = tv_wr(&a, IBV_WR_RDMA_WRITE, i, &sge, 0, 8);
		wr.wr.rdma.remote_addr = (uintptr_t)b.buf;
		wr.wr.rdma.rkey = b.mr->rkey;
		CHECK_EQ(tv_post(&a, &wr), 0);
	}
	tv_wait_ok(a.scq, 0);
	CHECK_EQ(ibv_resize_cq(a.scq, 100), 0);
	CHECK(a.scq->cqe >= 100);
	for (unsigned i = 1; i < 4; i++)
		tv_wait_ok(a.scq, i);
	CHECK_EQ(ibv_resize_cq(a.scq, 0), EINVAL);
	CHECK_EQ(ibv_resize_cq(a.scq, 1 << 30), EINVAL);
	tv_pair_close(&a, &b);
}

static void ece_and_order_promise_nothing(void)
{
	struct ibv_ece ece = {0};
	struct tv_end a, b;

	tv_pair(&a, &b, &(struct tv_opt){0});
	CHECK_EQ(ibv_query_ece(a.qp, &ece), EOPNOTSUPP);
	CHECK_EQ(ibv_set_ece(a.qp, &ece), EOPNOTSUPP);
	CHECK_EQ(ibv_query_qp_data_in_order(a.qp, IBV_WR_RDMA_WRITE, 0), 0);
	CHECK_EQ(ibv_attach_mcast(a.qp, &(union ibv_gid){.raw = {0xff}}, 0), EINVAL);
	CHECK_EQ(ibv_detach_mcast(a.qp, &(union ibv_gid){.raw = {0xff}}, 0), EINVAL);
	tv_pair_close(&a, &b);
}

TV_MAIN(T(a_qp_says_what_it_is), T(creation_checks_its_arguments), T(a_small_cq_gets_some_more),
	T(what_is_in_use_cannot_be_destroyed), T(states_are_followed), T(modify_checks_its_arguments),
	T(posting_needs_a_state), T(cqs_can_be_resized), T(ece_and_order_promise_nothing))
