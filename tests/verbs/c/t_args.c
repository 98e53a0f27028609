/* SPDX-License-Identifier: BSD-3-Clause */
/* What is refused, and with which errno: calls that the other programs do not look at argument by argument. */
#include "tv.h"

static struct ibv_context *ctx;
static struct ibv_pd *pd;
static struct ibv_cq *cq;

static void begin(void)
{
	ctx = tv_open();
	CHECK(pd = ibv_alloc_pd(ctx));
	CHECK(cq = ibv_create_cq(ctx, 32, NULL, NULL, 0));
}

static void end(void)
{
	CHECK_EQ(ibv_destroy_cq(cq), 0);
	CHECK_EQ(ibv_dealloc_pd(pd), 0);
	CHECK_EQ(ibv_close_device(ctx), 0);
}

static struct ibv_ah_attr ah_to_self(void)
{
	struct ibv_ah_attr a = {.is_global = 1, .port_num = 1};
	int index;

	tv_gid(ctx, &a.grh.dgid, &index);
	a.grh.sgid_index = (uint8_t)index;
	return a;
}

/* ---- what is used stays ----------------------------------------------------------------------------------- */

static void a_domain_stays_as_long_as_it_is_used(void)
{
	struct ibv_srq_init_attr srq_attr = {.attr = {.max_wr = 4, .max_sge = 1}};
	struct ibv_qp_init_attr qp_attr = {.qp_type = IBV_QPT_RC, .cap = {1, 1, 1, 1, 0}};
	struct ibv_ah_attr ah_attr;
	struct ibv_srq *srq;
	struct ibv_ah *ah;
	struct ibv_mr *mr;
	struct ibv_mw *mw;
	struct ibv_qp *qp;
	static char buf[64];

	begin();
	ah_attr = ah_to_self();
	qp_attr.send_cq = qp_attr.recv_cq = cq;
#define USED(object, make, end_of)                   \
	do {                                         \
		CHECK(object = make);                \
		CHECK_EQ(ibv_dealloc_pd(pd), EBUSY); \
		CHECK_EQ(end_of(object), 0);         \
	} while (0)
	USED(mr, ibv_reg_mr(pd, buf, sizeof(buf), IBV_ACCESS_LOCAL_WRITE), ibv_dereg_mr);
	USED(mw, ibv_alloc_mw(pd, IBV_MW_TYPE_1), ibv_dealloc_mw);
	USED(mw, ibv_alloc_mw(pd, IBV_MW_TYPE_2), ibv_dealloc_mw);
	USED(ah, ibv_create_ah(pd, &ah_attr), ibv_destroy_ah);
	USED(srq, ibv_create_srq(pd, &srq_attr), ibv_destroy_srq);
	USED(qp, ibv_create_qp(pd, &qp_attr), ibv_destroy_qp);
	end();
}

static void queues_stay_as_long_as_they_are_used(void)
{
	struct ibv_srq_init_attr srq_attr = {.attr = {.max_wr = 4, .max_sge = 1}};
	struct ibv_qp_init_attr qp_attr = {.qp_type = IBV_QPT_RC, .cap = {1, 1, 1, 1, 0}};
	struct ibv_comp_channel *channel;
	struct ibv_cq *rcq;
	struct ibv_qp *qp;

	begin();
	CHECK(channel = ibv_create_comp_channel(ctx));
	CHECK(rcq = ibv_create_cq(ctx, 32, NULL, channel, 0));
	CHECK(qp_attr.srq = ibv_create_srq(pd, &srq_attr));
	qp_attr.send_cq = cq;
	qp_attr.recv_cq = rcq;
	CHECK(qp = ibv_create_qp(pd, &qp_attr));
	CHECK_EQ(ibv_destroy_cq(cq), EBUSY);
	CHECK_EQ(ibv_destroy_cq(rcq), EBUSY);
	CHECK_EQ(ibv_destroy_srq(qp_attr.srq), EBUSY);
	CHECK_EQ(ibv_destroy_qp(qp), 0);
	CHECK_EQ(ibv_destroy_srq(qp_attr.srq), 0);
	CHECK_EQ(ibv_destroy_comp_channel(channel), EBUSY);
	CHECK_EQ(ibv_destroy_cq(rcq), 0);
	CHECK_EQ(ibv_destroy_comp_channel(channel), 0);
	end();
}

/* ---- addresses, windows ------------------------------------------------------------------------------------ */

static void address_handles_are_checked(void)
{
	static const struct {
		uint8_t global, port;
		int index, err; /* index: -1 as it should be */
	} cases[] = {
		{1, 1, -1, 0}, {0, 1, -1, EINVAL}, {1, 0, -1, EINVAL}, {1, 2, -1, EINVAL}, {1, 1, 9, ENODATA},
	};

	begin();
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		struct ibv_ah_attr a = ah_to_self();
		struct ibv_ah *ah;

		a.is_global = cases[i].global;
		a.port_num = cases[i].port;
		if (cases[i].index >= 0)
			a.grh.sgid_index = (uint8_t)cases[i].index;
		errno = 0;
		ah = ibv_create_ah(pd, &a);
		if (!ah != !!cases[i].err || (!ah && errno != cases[i].err))
			fprintf(stderr, "case %zu: errno %d\n", i, errno);
		CHECK_EQ(!ah, !!cases[i].err);
		if (ah)
			CHECK_EQ(ibv_destroy_ah(ah), 0);
		else
			CHECK_EQ(errno, cases[i].err);
	}
	end();
}

static void windows_have_one_of_two_types(void)
{
	begin();
	CHECK_ERRNO(ibv_alloc_mw(pd, (enum ibv_mw_type)0), EINVAL);
	CHECK_ERRNO(ibv_alloc_mw(pd, (enum ibv_mw_type)3), EINVAL);
	end();
}

static void a_call_binds_what_it_may(void)
{
	static char buf[128];
	struct ibv_qp_init_attr init = {.qp_type = IBV_QPT_RC, .cap = {1, 1, 1, 1, 0}};
	struct ibv_mw_bind bind = {0};
	struct ibv_mr *mr, *other;
	struct ibv_mw *one, *two;
	struct ibv_pd *pd2;
	struct ibv_qp *qp;

	begin();
	CHECK(pd2 = ibv_alloc_pd(ctx));
	init.send_cq = init.recv_cq = cq;
	CHECK(qp = ibv_create_qp(pd, &init));
	CHECK(mr = ibv_reg_mr(pd, buf, 64, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_MW_BIND));
	CHECK(other = ibv_reg_mr(pd2, buf, 64, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_MW_BIND));
	CHECK(one = ibv_alloc_mw(pd, IBV_MW_TYPE_1));
	CHECK(two = ibv_alloc_mw(pd, IBV_MW_TYPE_2));
	bind.bind_info = (struct ibv_mw_bind_info){mr, (uintptr_t)buf, 64, IBV_ACCESS_REMOTE_READ};
	CHECK_EQ(ibv_bind_mw(qp, two, &bind), EINVAL); /* by a work request only */
	bind.bind_info.mr = NULL;
	CHECK_EQ(ibv_bind_mw(qp, one, &bind), EINVAL);
	bind.bind_info.mr = other;
	CHECK_EQ(ibv_bind_mw(qp, one, &bind), EPERM); /* of another domain */
	CHECK_EQ(ibv_dealloc_mw(one), 0);
	CHECK_EQ(ibv_dealloc_mw(two), 0);
	CHECK_EQ(ibv_dereg_mr(mr), 0);
	CHECK_EQ(ibv_dereg_mr(other), 0);
	CHECK_EQ(ibv_destroy_qp(qp), 0);
	CHECK_EQ(ibv_dealloc_pd(pd2), 0);
	end();
}

/* ---- sizes -------------------------------------------------------------------------------------------------- */

static void sizes_end_at_what_the_device_says(void)
{
	struct ibv_srq_init_attr srq_attr = {.attr = {.max_wr = 8, .max_sge = 1}};
	struct ibv_device_attr dev;
	struct ibv_srq_attr a = {0};
	struct ibv_srq *srq;

	begin();
	CHECK_EQ(ibv_query_device(ctx, &dev), 0);
	CHECK_ERRNO(ibv_create_cq(ctx, dev.max_cqe + 1, NULL, NULL, 0), EINVAL);
	CHECK_EQ(ibv_resize_cq(cq, dev.max_cqe + 1), EINVAL);
	CHECK_EQ(ibv_resize_cq(cq, 0), EINVAL);
	CHECK(srq = ibv_create_srq(pd, &srq_attr));
	a.max_wr = (uint32_t)dev.max_srq_wr + 1;
	CHECK_EQ(ibv_modify_srq(srq, &a, IBV_SRQ_MAX_WR), EINVAL);
	a.max_wr = 0;
	CHECK_EQ(ibv_modify_srq(srq, &a, IBV_SRQ_MAX_WR), EINVAL);
	a.srq_limit = (uint32_t)dev.max_srq_wr + 1;
	CHECK_EQ(ibv_modify_srq(srq, &a, IBV_SRQ_LIMIT), EINVAL);
	CHECK_EQ(ibv_query_srq(srq, &a), 0);
	CHECK(a.max_wr >= 8 && !a.srq_limit); /* as it was */
	CHECK_EQ(ibv_destroy_srq(srq), 0);
	end();
}

static void each_size_of_a_qp_is_checked(void)
{
	struct ibv_device_attr dev;

	begin();
	CHECK_EQ(ibv_query_device(ctx, &dev), 0);
#define TOO_MUCH(member, value)                                                                       \
	do {                                                                                          \
		struct ibv_qp_init_attr x = {                                                         \
			.send_cq = cq, .recv_cq = cq, .qp_type = IBV_QPT_RC, .cap = {4, 4, 1, 1, 0}}; \
                                                                                                      \
		x.cap.member = (uint32_t)(value);                                                     \
		CHECK_ERRNO(ibv_create_qp(pd, &x), EINVAL);                                           \
	} while (0)
	TOO_MUCH(max_send_wr, dev.max_qp_wr + 1);
	TOO_MUCH(max_recv_wr, dev.max_qp_wr + 1);
	TOO_MUCH(max_send_sge, dev.max_sge + 1);
	TOO_MUCH(max_recv_sge, dev.max_sge + 1);
	TOO_MUCH(max_inline_data, 1u << 20);
	end();
}

static void extended_shared_queues_are_checked(void)
{
	const uint32_t basic = IBV_SRQ_INIT_ATTR_TYPE | IBV_SRQ_INIT_ATTR_PD;
	struct ibv_srq_init_attr_ex ok = {.attr = {.max_wr = 4, .max_sge = 1}, .srq_type = IBV_SRQT_BASIC}, x;
	struct ibv_srq *srq;

	begin();
	ok.comp_mask = basic;
	ok.pd = pd;
	ok.cq = cq;
	CHECK(srq = ibv_create_srq_ex(ctx, &ok));
	CHECK_EQ(ibv_destroy_srq(srq), 0);
#define REFUSED(err, change)                                  \
	do {                                                  \
		x = ok;                                       \
		change;                                       \
		CHECK_ERRNO(ibv_create_srq_ex(ctx, &x), err); \
	} while (0)
	REFUSED(EOPNOTSUPP,
		(x.srq_type = IBV_SRQT_TM, x.comp_mask |= IBV_SRQ_INIT_ATTR_CQ | IBV_SRQ_INIT_ATTR_TM));
	REFUSED(EOPNOTSUPP, x.comp_mask |= 1u << 20);
	REFUSED(EINVAL, x.comp_mask &= ~(uint32_t)IBV_SRQ_INIT_ATTR_PD);
	REFUSED(EINVAL, (x.srq_type = IBV_SRQT_XRC, x.comp_mask |= IBV_SRQ_INIT_ATTR_CQ)); /* no domain */
	REFUSED(EINVAL, x.attr.max_wr = 0);
	end();
}

/* ---- questions ------------------------------------------------------------------------------------------------ */

static void what_is_not_there_cannot_be_asked_for(void)
{
	struct ibv_port_attr port;
	struct ibv_gid_entry entry;
	union ibv_gid gid;
	__be16 pkey;

	begin();
	CHECK_EQ(ibv_query_port(ctx, 0, &port), EINVAL);
	CHECK_EQ(ibv_query_port(ctx, 2, &port), EINVAL);
	CHECK_EQ(ibv_query_port(ctx, 1, &port), 0);
	CHECK(ibv_query_gid(ctx, 2, 0, &gid) != 0);
	CHECK(ibv_query_gid(ctx, 1, port.gid_tbl_len, &gid) != 0);
	CHECK_EQ(ibv_query_gid_ex(ctx, 1, (uint32_t)port.gid_tbl_len, &entry, 0), EINVAL);
	CHECK_EQ(ibv_query_gid_ex(ctx, 2, 0, &entry, 0), EINVAL);
	CHECK_EQ(ibv_query_gid_ex(ctx, 1, 9, &entry, 0), ENODATA);
	CHECK_EQ(ibv_query_gid_ex(ctx, 1, 1, &entry, 1), EINVAL); /* no flag */
	CHECK(ibv_query_pkey(ctx, 1, port.pkey_tbl_len, &pkey) != 0);
	CHECK(ibv_query_pkey(ctx, 2, 0, &pkey) != 0);
	CHECK(ibv_get_pkey_index(ctx, 1, 0x1234) < 0);
	end();
}

TV_MAIN(T(a_domain_stays_as_long_as_it_is_used), T(queues_stay_as_long_as_they_are_used),
	T(address_handles_are_checked), T(windows_have_one_of_two_types), T(a_call_binds_what_it_may),
	T(sizes_end_at_what_the_device_says), T(each_size_of_a_qp_is_checked),
	T(extended_shared_queues_are_checked), T(what_is_not_there_cannot_be_asked_for))
