/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Work requests that are refused: each stands second in a list. The call names it and says why, what is before
 * it is carried out, what is behind it is not, and the QP goes on.
 */
#include "tv.h"

#define FLUSH 14
#define ATOMIC_WRITE 15

struct end {
	struct ibv_context *ctx;
	struct ibv_pd *pd, *other;
	struct ibv_cq *cq;
	struct ibv_mr *mr;
	struct ibv_ah *ah, *foreign;
	struct ibv_qp *qp;
	uint8_t *buf;
};

static void modify(struct ibv_qp *qp, struct ibv_qp_attr a, enum ibv_qp_state to, int mask)
{
	a.qp_state = to;
	CHECK_EQ(ibv_modify_qp(qp, &a, IBV_QP_STATE | mask), 0);
}

/* A QP of any type but XRC, connected to itself. */
static void open_end(struct end *e, enum ibv_qp_type type, bool connect)
{
	struct ibv_qp_init_attr init = {.qp_type = type, .cap = {4, 4, 2, 2, 64}};
	struct ibv_qp_attr a = {.port_num = 1,
				.qkey = 7,
				.path_mtu = IBV_MTU_1024,
				.max_rd_atomic = 1,
				.max_dest_rd_atomic = 1,
				.ah_attr = {.is_global = 1, .port_num = 1, .grh.hop_limit = 64}};
	bool rc = type == IBV_QPT_RC, ud = type == IBV_QPT_UD;
	int index;

	*e = (struct end){.ctx = tv_open()};
	CHECK(e->pd = ibv_alloc_pd(e->ctx));
	CHECK(e->other = ibv_alloc_pd(e->ctx));
	CHECK(init.send_cq = init.recv_cq = e->cq = ibv_create_cq(e->ctx, 32, NULL, NULL, 0));
	CHECK(e->buf = calloc(1, 4096));
	CHECK(e->mr = ibv_reg_mr(e->pd, e->buf, 4096, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE));
	tv_gid(e->ctx, &a.ah_attr.grh.dgid, &index);
	a.ah_attr.grh.sgid_index = (uint8_t)index;
	CHECK(e->ah = ibv_create_ah(e->pd, &a.ah_attr));
	CHECK(e->foreign = ibv_create_ah(e->other, &a.ah_attr));
	CHECK(e->qp = ibv_create_qp(e->pd, &init));
	if (!connect)
		return;
	a.dest_qp_num = e->qp->qp_num;
	a.qp_access_flags = IBV_ACCESS_REMOTE_WRITE;
	modify(e->qp, a, IBV_QPS_INIT,
	       IBV_QP_PKEY_INDEX | IBV_QP_PORT | (ud ? IBV_QP_QKEY : IBV_QP_ACCESS_FLAGS));
	modify(e->qp, a, IBV_QPS_RTR,
	       ud ? 0
		  : IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
			       (rc ? IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER : 0));
	a.timeout = 14;
	a.retry_cnt = a.rnr_retry = 7;
	modify(e->qp, a, IBV_QPS_RTS,
	       IBV_QP_SQ_PSN |
		       (rc ? IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC
			   : 0));
}

static void close_end(struct end *e)
{
	CHECK_EQ(ibv_destroy_qp(e->qp), 0);
	CHECK_EQ(ibv_destroy_ah(e->ah), 0);
	CHECK_EQ(ibv_destroy_ah(e->foreign), 0);
	CHECK_EQ(ibv_dereg_mr(e->mr), 0);
	CHECK_EQ(ibv_destroy_cq(e->cq), 0);
	CHECK_EQ(ibv_dealloc_pd(e->pd), 0);
	CHECK_EQ(ibv_dealloc_pd(e->other), 0);
	CHECK_EQ(ibv_close_device(e->ctx), 0);
	free(e->buf);
}

/* One that every service carries out; without a receive to meet, where there is a choice. */
static struct ibv_send_wr good(const struct end *e, struct ibv_sge *sge, uint64_t id)
{
	struct ibv_send_wr wr = {.wr_id = id, .sg_list = sge, .num_sge = 1, .send_flags = IBV_SEND_SIGNALED};

	*sge = (struct ibv_sge){(uintptr_t)e->buf, 8, e->mr->lkey};
	if (e->qp->qp_type == IBV_QPT_UD) {
		wr.opcode = IBV_WR_SEND;
		wr.wr.ud.ah = e->ah;
		wr.wr.ud.remote_qpn = e->qp->qp_num;
		wr.wr.ud.remote_qkey = 7;
	} else {
		wr.opcode = IBV_WR_RDMA_WRITE;
		wr.wr.rdma.remote_addr = (uintptr_t)e->buf + 64;
		wr.wr.rdma.rkey = e->mr->rkey;
	}
	return wr;
}

static void refuse(struct end *e, struct ibv_send_wr second, int err)
{
	struct ibv_sge sge[2];
	struct ibv_send_wr first = good(e, &sge[0], 1), third = good(e, &sge[1], 3), *bad = NULL;
	int got;

	first.next = &second;
	second.next = &third;
	got = ibv_post_send(e->qp, &first, &bad);
	if (got != err)
		fprintf(stderr, "QP type %d, opcode %d\n", e->qp->qp_type, second.opcode);
	CHECK_EQ(got, err);
	CHECK(bad == &second);
	tv_wait_ok(e->cq, 1);
	CHECK_EQ(ibv_post_send(e->qp, &third, &bad), 0); /* it was not, before */
	tv_wait_ok(e->cq, 3);
}

static void each_service_refuses_what_it_cannot_do(void)
{
	static const struct {
		enum ibv_qp_type type;
		int opcode, err;
	} cases[] = {
		{IBV_QPT_RC, IBV_WR_TSO, EOPNOTSUPP},
		{IBV_QPT_RC, IBV_WR_TSO + 1, EINVAL},
		{IBV_QPT_RC, 99, EINVAL},
		{IBV_QPT_UC, IBV_WR_RDMA_READ, EINVAL},
		{IBV_QPT_UC, IBV_WR_ATOMIC_CMP_AND_SWP, EINVAL},
		{IBV_QPT_UC, IBV_WR_ATOMIC_FETCH_AND_ADD, EINVAL},
		{IBV_QPT_UC, IBV_WR_SEND_WITH_INV, EINVAL},
		{IBV_QPT_UC, FLUSH, EINVAL},
		{IBV_QPT_UC, ATOMIC_WRITE, EINVAL},
		{IBV_QPT_UC, IBV_WR_TSO, EOPNOTSUPP},
		{IBV_QPT_UD, IBV_WR_RDMA_WRITE, EINVAL},
		{IBV_QPT_UD, IBV_WR_RDMA_WRITE_WITH_IMM, EINVAL},
		{IBV_QPT_UD, IBV_WR_RDMA_READ, EINVAL},
		{IBV_QPT_UD, IBV_WR_ATOMIC_CMP_AND_SWP, EINVAL},
		{IBV_QPT_UD, IBV_WR_ATOMIC_FETCH_AND_ADD, EINVAL},
		{IBV_QPT_UD, IBV_WR_SEND_WITH_INV, EINVAL},
		{IBV_QPT_UD, IBV_WR_LOCAL_INV, EINVAL},
		{IBV_QPT_UD, IBV_WR_BIND_MW, EINVAL},
		{IBV_QPT_UD, FLUSH, EINVAL},
		{IBV_QPT_UD, ATOMIC_WRITE, EINVAL},
	};
	enum ibv_qp_type open = 0;
	struct end e;

	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		struct ibv_send_wr wr;
		struct ibv_sge sge;

		if (cases[i].type != open) {
			if (open)
				close_end(&e);
			open_end(&e, open = cases[i].type, true);
		}
		wr = good(&e, &sge, 2);
		wr.opcode = (enum ibv_wr_opcode)cases[i].opcode;
		refuse(&e, wr, cases[i].err);
	}
	close_end(&e);
}

static void wrong_sends_are_named(void)
{
	struct ibv_sge sge[3];
	struct ibv_send_wr ok, wr;
	struct end e;

	open_end(&e, IBV_QPT_RC, true);
	ok = good(&e, sge, 2);
	sge[1] = sge[2] = sge[0];
#define REFUSED(change)                 \
	do {                            \
		wr = ok;                \
		change;                 \
		refuse(&e, wr, EINVAL); \
	} while (0)
	REFUSED(wr.num_sge = 3);
	REFUSED(wr.num_sge = -1);
	REFUSED(wr.sg_list = NULL);
	REFUSED((wr.send_flags |= IBV_SEND_INLINE, sge[0].length = 65));
	REFUSED(sge[0].length = (1u << 31) + 1);
	sge[0].length = 8;
	REFUSED((wr.opcode = IBV_WR_RDMA_READ, wr.send_flags |= IBV_SEND_INLINE));
	REFUSED((wr.opcode = IBV_WR_ATOMIC_FETCH_AND_ADD, sge[0].length = 7));
	REFUSED((wr.opcode = (enum ibv_wr_opcode)ATOMIC_WRITE, sge[0].length = 9));
	REFUSED((wr.opcode = IBV_WR_BIND_MW, wr.bind_mw.mw = NULL));
	close_end(&e);
}

static void wrong_destinations_of_datagrams_are_named(void)
{
	struct ibv_send_wr ok, wr;
	struct ibv_sge sge[1];
	struct end e;

	open_end(&e, IBV_QPT_UD, true);
	ok = good(&e, sge, 2);
	REFUSED(wr.wr.ud.ah = NULL);
	REFUSED(wr.wr.ud.ah = e.foreign); /* another PD's */
	REFUSED(wr.wr.ud.remote_qpn = 1u << 24);
	close_end(&e);
}

static void wrong_receives_are_named(void)
{
	static const struct {
		int num_sge;
		bool list;
	} wrong[] = {{3, true}, {-1, true}, {1, false}};
	struct ibv_sge sge[3] = {{0}};
	struct end e;

	open_end(&e, IBV_QPT_RC, true);
	for (size_t i = 0; i < 3; i++) {
		struct ibv_recv_wr last = {.wr_id = 3};
		struct ibv_recv_wr second = {
			.next = &last, .sg_list = wrong[i].list ? sge : NULL, .num_sge = wrong[i].num_sge};
		struct ibv_recv_wr first = {.next = &second, .wr_id = i}, *bad = NULL;

		CHECK_EQ(ibv_post_recv(e.qp, &first, &bad), EINVAL);
		CHECK(bad == &second);
	}
	/* Three are there; the queue takes four. */
	for (int room = 1; room >= 0; room--) {
		struct ibv_recv_wr wr = {.wr_id = 3}, *bad = NULL;

		CHECK_EQ(ibv_post_recv(e.qp, &wr, &bad), room ? 0 : ENOMEM);
		CHECK(bad == (room ? NULL : &wr));
	}
	modify(e.qp, (struct ibv_qp_attr){0}, IBV_QPS_ERR, 0);
	for (uint64_t i = 0; i < 4; i++) {
		struct ibv_wc wc = tv_wait(e.cq);

		CHECK(wc.wr_id == i && wc.status == IBV_WC_WR_FLUSH_ERR);
	}
	close_end(&e);
}

static void a_full_send_queue_says_so(void)
{
	struct ibv_send_wr wr[5], *bad = NULL;
	struct ibv_sge sge[5];
	struct end e;

	open_end(&e, IBV_QPT_RC, true);
	for (unsigned i = 0; i < 5; i++) {
		wr[i] = good(&e, &sge[i], i);
		wr[i].next = i < 4 ? &wr[i + 1] : NULL;
	}
	CHECK_EQ(ibv_post_send(e.qp, wr, &bad), ENOMEM);
	CHECK(bad == &wr[4]);
	for (uint64_t i = 0; i < 4; i++)
		tv_wait_ok(e.cq, i);
	CHECK_EQ(ibv_post_send(e.qp, bad, &bad), 0);
	tv_wait_ok(e.cq, 4);
	close_end(&e);
}

TV_MAIN(T(each_service_refuses_what_it_cannot_do), T(wrong_sends_are_named),
	T(wrong_destinations_of_datagrams_are_named), T(wrong_receives_are_named),
	T(a_full_send_queue_says_so))
