/* SPDX-License-Identifier: BSD-3-Clause */
/* Beside real devices: linked with stub_ibverbs.c in place of libibverbs. */
#include "tv.h"

#undef ibv_reg_mr

extern int stub_calls, stub_lists_open;

static struct ibv_device **list;

static void begin(void)
{
	int n;

	CHECK(list = ibv_get_device_list(&n));
	CHECK_EQ(n, 3);
	CHECK_EQ(stub_calls, 1);
	CHECK(!list[3]);
}

static void real_devices_come_first(void)
{
	begin();
	CHECK(!strcmp(ibv_get_device_name(list[0]), "mlx5_0"));
	CHECK(!strcmp(ibv_get_device_name(list[1]), "rxe0"));
	ibv_free_device_list(list);
	CHECK_EQ(stub_lists_open, 0);
}

static void a_taken_name_is_not_used_twice(void)
{
	begin();
	CHECK(!strcmp(ibv_get_device_name(list[2]), "rxe1"));
	ibv_free_device_list(list);
	CHECK(list = ibv_get_device_list(NULL));
	CHECK(!strcmp(ibv_get_device_name(list[2]), "rxe1")); /* and stays */
	ibv_free_device_list(list);
	CHECK_EQ(stub_lists_open, 0);
}

static void objects_of_real_devices_are_handed_on(void)
{
	struct ibv_context *ctx;
	struct ibv_qp qp = {0};
	struct ibv_pd *pd;
	char mem[64];

	begin();
	CHECK(ctx = ibv_open_device(list[0]));
	CHECK(ctx->device == list[0]);
	CHECK(pd = ibv_alloc_pd(ctx));
	CHECK_ERRNO(ibv_reg_mr(pd, mem, sizeof(mem), 0), EXFULL);
	qp.context = ctx;
	CHECK_EQ(ibv_query_qp_data_in_order(&qp, IBV_WR_SEND, 0), 1);
	CHECK_EQ(ibv_dealloc_pd(pd), 4242);
	CHECK_EQ(ibv_close_device(ctx), 0);
	CHECK_EQ(stub_calls, 7);
	ibv_free_device_list(list);
}

static void our_objects_are_not(void)
{
	struct ibv_context *ctx;
	struct ibv_qp qp = {0};
	struct ibv_pd *pd;
	char mem[64];
	struct ibv_mr *mr;

	begin();
	CHECK(ctx = ibv_open_device(list[2]));
	CHECK(pd = ibv_alloc_pd(ctx));
	CHECK(mr = ibv_reg_mr(pd, mem, sizeof(mem), 0));
	qp.context = ctx;
	CHECK_EQ(ibv_query_qp_data_in_order(&qp, IBV_WR_SEND, 0), 0);
	CHECK_EQ(ibv_dereg_mr(mr), 0);
	CHECK_EQ(ibv_dealloc_pd(pd), 0);
	CHECK_EQ(ibv_close_device(ctx), 0);
	CHECK_EQ(stub_calls, 1);
	ibv_free_device_list(list);
}

/* A call the real library is too old for. */
static void what_the_real_library_lacks_is_an_error(void)
{
	struct ibv_context *ctx;
	struct ibv_device_attr attr;

	begin();
	CHECK(ctx = ibv_open_device(list[0]));
	CHECK_EQ(ibv_query_device(ctx, &attr), ENOSYS);
	CHECK_ERRNO(ibv_create_comp_channel(ctx), ENOSYS);
	CHECK_EQ(ibv_close_device(ctx), 0);
	ibv_free_device_list(list);
}

TV_MAIN(T(real_devices_come_first), T(a_taken_name_is_not_used_twice),
	T(objects_of_real_devices_are_handed_on), T(our_objects_are_not),
	T(what_the_real_library_lacks_is_an_error))
