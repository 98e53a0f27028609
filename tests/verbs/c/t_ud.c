/* SPDX-License-Identifier: BSD-3-Clause */
/* UD and UC through the verbs API: address handles, replies from a header, multicast, both ways to post. */
#include "tv.h"

#include <arpa/inet.h>

#define QKEY 0x11223344u
#define GRH 40

static struct ibv_context *ctx;
static struct ibv_pd *pd;
static struct ibv_cq *cq;
static struct ibv_mr *mr;
static uint8_t *buf;

static void open_all(void)
{
	ctx = tv_open();
	CHECK(pd = ibv_alloc_pd(ctx));
	CHECK(cq = ibv_create_cq(ctx, 64, NULL, NULL, 0));
	CHECK(buf = calloc(1, TV_BUF));
	CHECK(mr = ibv_reg_mr(pd, buf, TV_BUF, IBV_ACCESS_LOCAL_WRITE));
}

static void close_all(void)
{
	CHECK_EQ(ibv_dereg_mr(mr), 0);
	CHECK_EQ(ibv_destroy_cq(cq), 0);
	CHECK_EQ(ibv_dealloc_pd(pd), 0);
	CHECK_EQ(ibv_close_device(ctx), 0);
	free(buf);
}

static uint32_t create_flags;

static struct ibv_qp *make_qp(void)
{
	struct ibv_qp_init_attr_ex x = {.qp_type = IBV_QPT_UD,
					.send_cq = cq,
					.recv_cq = cq,
					.sq_sig_all = 1,
					.cap = {8, 8, 2, 2, 64},
					.comp_mask = IBV_QP_INIT_ATTR_PD | IBV_QP_INIT_ATTR_SEND_OPS_FLAGS |
						     IBV_QP_INIT_ATTR_CREATE_FLAGS,
					.create_flags = create_flags,
					.pd = pd,
					.send_ops_flags = IBV_QP_EX_WITH_SEND | IBV_QP_EX_WITH_SEND_WITH_IMM};
	struct ibv_qp_attr a = {.qp_state = IBV_QPS_INIT, .port_num = 1, .qkey = QKEY};
	struct ibv_qp_init_attr init;
	struct ibv_qp *qp;

	CHECK(qp = ibv_create_qp_ex(ctx, &x));
	/* What RC needs is not for UD, and the Q_Key is not optional (ibv_modify_qp(3)). */
	CHECK_EQ(ibv_modify_qp(qp, &a, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS),
		 EINVAL);
	CHECK_EQ(ibv_modify_qp(qp, &a, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT), EINVAL);
	CHECK_EQ(ibv_modify_qp(qp, &a, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_QKEY), 0);
	a.qp_state = IBV_QPS_RTR;
	CHECK_EQ(ibv_modify_qp(qp, &a, IBV_QP_STATE), 0);
	a.qp_state = IBV_QPS_RTS;
	CHECK_EQ(ibv_modify_qp(qp, &a, IBV_QP_STATE), EINVAL);
	CHECK_EQ(ibv_modify_qp(qp, &a, IBV_QP_STATE | IBV_QP_SQ_PSN), 0);
	CHECK_EQ(ibv_query_qp(qp, &a, IBV_QP_QKEY, &init), 0);
	CHECK_EQ(a.qkey, QKEY);
	CHECK_EQ(init.qp_type, IBV_QPT_UD);
	return qp;
}

static struct ibv_ah *ah_to(const union ibv_gid *gid, uint8_t tclass)
{
	struct ibv_ah_attr a = {
		.is_global = 1, .port_num = 1, .grh = {.hop_limit = 7, .traffic_class = tclass}};
	union ibv_gid own;
	struct ibv_ah *ah;
	int index;

	tv_gid(ctx, &own, &index);
	a.grh.sgid_index = (uint8_t)index;
	a.grh.dgid = gid ? *gid : own;
	CHECK(ah = ibv_create_ah(pd, &a));
	return ah;
}

static void recv_at(struct ibv_qp *qp, uint64_t id, uint32_t off)
{
	struct ibv_sge sge = {(uintptr_t)buf + off, 1024, mr->lkey};
	struct ibv_recv_wr wr = {.wr_id = id, .sg_list = &sge, .num_sge = 1}, *bad;

	CHECK_EQ(ibv_post_recv(qp, &wr, &bad), 0);
}

static int send_to(struct ibv_qp *qp, struct ibv_ah *ah, uint32_t qpn, const char *text)
{
	struct ibv_sge sge = {(uintptr_t)text, (uint32_t)strlen(text), 0};
	struct ibv_send_wr wr = {.wr_id = 1,
				 .sg_list = &sge,
				 .num_sge = 1,
				 .opcode = IBV_WR_SEND,
				 .send_flags = IBV_SEND_INLINE,
				 .wr.ud = {ah, qpn, QKEY}},
			   *bad;

	return ibv_post_send(qp, &wr, &bad);
}

static struct ibv_wc wait_recv(void)
{
	struct ibv_wc wc = {0};

	do {
		wc = tv_wait(cq);
		CHECK_EQ(wc.status, IBV_WC_SUCCESS);
	} while (wc.opcode != IBV_WC_RECV);
	return wc;
}

/* The second QP answers to what the header says. */
static void a_reply_finds_the_sender(void)
{
	struct ibv_qp *x, *y;
	struct ibv_ah *ah, *back;
	struct ibv_ah_attr attr;
	struct ibv_wc wc;

	open_all();
	x = make_qp();
	y = make_qp();
	recv_at(y, 10, 0);
	recv_at(x, 11, 2048);
	ah = ah_to(NULL, 0x28);
	CHECK_EQ(send_to(x, ah, y->qp_num, "question"), 0);
	wc = wait_recv();
	CHECK_EQ(ibv_destroy_ah(ah), 0);
	CHECK_EQ(wc.wr_id, 10);
	CHECK_EQ(wc.byte_len, GRH + 8);
	CHECK_EQ(wc.src_qp, x->qp_num);
	CHECK_EQ(wc.wc_flags, IBV_WC_GRH);
	CHECK(!memcmp(buf + GRH, "question", 8));
	CHECK_EQ(ibv_init_ah_from_wc(ctx, 1, &wc, (struct ibv_grh *)buf, &attr), 0);
	CHECK_EQ(attr.grh.traffic_class, 0x28);
	CHECK(attr.grh.hop_limit > 7); /* the route's, as with the kernel's drivers, not the AH's */
	CHECK(back = ibv_create_ah_from_wc(pd, &wc, (struct ibv_grh *)buf, 1));
	CHECK_EQ(send_to(y, back, wc.src_qp, "answer"), 0);
	wc = wait_recv();
	CHECK_EQ(wc.wr_id, 11);
	CHECK(!memcmp(buf + 2048 + GRH, "answer", 6));
	CHECK_EQ(ibv_destroy_ah(back), 0);
	CHECK_EQ(ibv_destroy_qp(x), 0);
	CHECK_EQ(ibv_destroy_qp(y), 0);
	close_all();
}

static void a_posted_request_has_a_copy_of_its_handle(void)
{
	struct ibv_qp *x, *y;
	struct ibv_ah *ah;

	open_all();
	x = make_qp();
	y = make_qp();
	recv_at(y, 10, 0);
	ah = ah_to(NULL, 0);
	CHECK_EQ(send_to(x, ah, y->qp_num, "question"), 0);
	CHECK_EQ(ibv_destroy_ah(ah), 0);
	CHECK_EQ(wait_recv().wr_id, 10);
	CHECK_EQ(ibv_destroy_qp(x), 0);
	CHECK_EQ(ibv_destroy_qp(y), 0);
	close_all();
}

static void the_extended_interface_names_the_destination(void)
{
	struct ibv_qp *x, *y;
	struct ibv_qp_ex *q;
	struct ibv_ah *ah;
	struct ibv_wc wc;

	open_all();
	x = make_qp();
	y = make_qp();
	recv_at(y, 10, 0);
	ah = ah_to(NULL, 0);
	memcpy(buf + 4096, "extended", 8);
	CHECK(q = ibv_qp_to_qp_ex(x));
	ibv_wr_start(q);
	q->wr_id = 5;
	q->wr_flags = IBV_SEND_SIGNALED;
	ibv_wr_send_imm(q, htonl(0xabcd));
	ibv_wr_set_ud_addr(q, ah, y->qp_num, QKEY);
	ibv_wr_set_sge(q, mr->lkey, (uintptr_t)buf + 4096, 8);
	CHECK_EQ(ibv_wr_complete(q), 0);
	wc = wait_recv();
	CHECK_EQ(wc.byte_len, GRH + 8);
	CHECK_EQ(wc.wc_flags, IBV_WC_GRH | IBV_WC_WITH_IMM);
	CHECK_EQ(ntohl(wc.imm_data), 0xabcd);
	CHECK(!memcmp(buf + GRH, "extended", 8));
	/* Without a destination nothing is posted. */
	ibv_wr_start(q);
	ibv_wr_send(q);
	ibv_wr_set_sge(q, mr->lkey, (uintptr_t)buf, 8);
	CHECK_EQ(ibv_wr_complete(q), EINVAL);
	CHECK_EQ(send_to(x, NULL, y->qp_num, "x"), EINVAL);
	CHECK_EQ(ibv_destroy_ah(ah), 0);
	CHECK_EQ(ibv_destroy_qp(x), 0);
	CHECK_EQ(ibv_destroy_qp(y), 0);
	close_all();
}

static void every_member_of_a_group_gets_a_copy(void)
{
	union ibv_gid group = {.raw = {[10] = 0xff, [11] = 0xff, 239, 7, 7, 7}}, no_group = group;
	struct ibv_qp *x, *y;
	struct ibv_ah *ah;
	struct ibv_wc wc[2];

	open_all();
	x = make_qp();
	y = make_qp();
	no_group.raw[12] = 10;
	CHECK_EQ(ibv_attach_mcast(x, &no_group, 0), EINVAL);
	CHECK_EQ(ibv_detach_mcast(x, &group, 0), EINVAL);
	CHECK_EQ(ibv_attach_mcast(x, &group, 0), 0);
	CHECK_EQ(ibv_attach_mcast(y, &group, 0), 0);
	recv_at(x, 10, 0);
	recv_at(y, 11, 2048);
	ah = ah_to(&group, 0);
	CHECK_EQ(send_to(x, ah, 0xffffff, "everybody"), 0);
	wc[0] = wait_recv();
	wc[1] = wait_recv();
	CHECK_EQ(wc[0].wr_id + wc[1].wr_id, 21);
	CHECK(!memcmp(buf + GRH, "everybody", 9) && !memcmp(buf + 2048 + GRH, "everybody", 9));
	CHECK(!memcmp(buf + 36, group.raw + 12, 4)); /* the group in the header */
	CHECK_EQ(buf[28], 7);			     /* and the AH's hop limit, which is for groups only */
	CHECK_EQ(ibv_destroy_qp(x), EBUSY);
	CHECK_EQ(ibv_detach_mcast(x, &group, 0), 0);
	CHECK_EQ(ibv_destroy_qp(x), 0);
	recv_at(y, 12, 0);
	x = make_qp();
	CHECK_EQ(send_to(x, ah, 0xffffff, "only one"), 0); /* a sender need not be a member */
	CHECK_EQ(wait_recv().wr_id, 12);
	CHECK_EQ(ibv_detach_mcast(y, &group, 0), 0);
	CHECK_EQ(ibv_destroy_ah(ah), 0);
	CHECK_EQ(ibv_destroy_qp(x), 0);
	CHECK_EQ(ibv_destroy_qp(y), 0);
	close_all();
}

/* IBV_QP_CREATE_BLOCK_SELF_MCAST_LB: a member that does not want its own. */
static void a_member_may_do_without_its_own(void)
{
	union ibv_gid group = {.raw = {[10] = 0xff, [11] = 0xff, 239, 7, 7, 9}};
	struct ibv_qp *x, *y;
	struct ibv_ah *ah;

	open_all();
	create_flags = IBV_QP_CREATE_BLOCK_SELF_MCAST_LB;
	x = make_qp();
	y = make_qp();
	CHECK_EQ(ibv_attach_mcast(x, &group, 0), 0);
	CHECK_EQ(ibv_attach_mcast(y, &group, 0), 0);
	recv_at(x, 10, 0);
	recv_at(y, 11, 2048);
	ah = ah_to(&group, 0);
	CHECK_EQ(send_to(x, ah, 0xffffff, "the others"), 0);
	CHECK_EQ(wait_recv().wr_id, 11);
	CHECK_EQ(send_to(y, ah, 0xffffff, "the others"), 0);
	CHECK_EQ(wait_recv().wr_id, 10);
	CHECK_EQ(ibv_detach_mcast(x, &group, 0), 0);
	CHECK_EQ(ibv_detach_mcast(y, &group, 0), 0);
	CHECK_EQ(ibv_destroy_ah(ah), 0);
	CHECK_EQ(ibv_destroy_qp(x), 0);
	CHECK_EQ(ibv_destroy_qp(y), 0);
	close_all();
}

/* Dropped in silence, but counted. */
static void a_wrong_q_key_is_counted(void)
{
	struct ibv_port_attr port;
	uint32_t before; /* the kernel's port outlives the program */
	struct ibv_qp_attr a = {.qp_state = IBV_QPS_RTS, .qkey = QKEY + 1};
	struct ibv_qp *x, *y;
	struct ibv_ah *ah;

	open_all();
	x = make_qp();
	y = make_qp();
	CHECK_EQ(ibv_modify_qp(y, &a, IBV_QP_STATE | IBV_QP_QKEY), 0);
	recv_at(y, 10, 0);
	recv_at(x, 11, 2048);
	ah = ah_to(NULL, 0);
	CHECK_EQ(ibv_query_port(ctx, 1, &port), 0);
	before = port.qkey_viol_cntr;
	CHECK_EQ(send_to(x, ah, y->qp_num, "not for you"), 0);
	CHECK_EQ(send_to(y, ah, x->qp_num, "for you"), 0);
	CHECK_EQ(wait_recv().wr_id, 11);
	CHECK_EQ(ibv_query_port(ctx, 1, &port), 0);
	CHECK_EQ(port.qkey_viol_cntr, before + 1);
	CHECK_EQ(ibv_destroy_ah(ah), 0);
	CHECK_EQ(ibv_destroy_qp(x), 0);
	CHECK_EQ(ibv_destroy_qp(y), 0);
	close_all();
}

static void closing_the_device_takes_members_along(void)
{
	union ibv_gid group = {.raw = {[10] = 0xff, [11] = 0xff, 239, 7, 7, 8}};

	open_all();
	CHECK_EQ(ibv_attach_mcast(make_qp(), &group, 0), 0);
	ah_to(NULL, 0);
	CHECK_EQ(ibv_close_device(ctx), 0);
	/* All is free again. */
	open_all();
	struct ibv_qp *qp = make_qp();
	CHECK_EQ(ibv_attach_mcast(qp, &group, 0), 0);
	CHECK_EQ(ibv_detach_mcast(qp, &group, 0), 0);
	CHECK_EQ(ibv_destroy_qp(qp), 0);
	close_all();
}

static void an_ah_keeps_its_pd(void)
{
	struct ibv_ah *ah;

	open_all();
	ah = ah_to(NULL, 0);
	CHECK_EQ(ibv_dereg_mr(mr), 0);
	CHECK_EQ(ibv_dealloc_pd(pd), EBUSY);
	CHECK_EQ(ibv_destroy_ah(ah), 0);
	CHECK_EQ(ibv_dealloc_pd(pd), 0);
	CHECK_EQ(ibv_close_device(ctx), 0);
}

TV_MAIN(T(a_reply_finds_the_sender), T(a_posted_request_has_a_copy_of_its_handle),
	T(the_extended_interface_names_the_destination), T(every_member_of_a_group_gets_a_copy),
	T(a_member_may_do_without_its_own), T(a_wrong_q_key_is_counted),
	T(closing_the_device_takes_members_along), T(an_ah_keeps_its_pd))
