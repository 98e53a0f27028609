/* SPDX-License-Identifier: BSD-3-Clause */
/* Memory windows, invalidation, ATOMIC WRITE and FLUSH through the plain and the extended interface. */
#include "tv.h"

#define REMOTE (IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC)
#define FLUSH_GLOBAL (1 << 8)
#define ALL (IBV_ACCESS_LOCAL_WRITE | REMOTE | IBV_ACCESS_MW_BIND | FLUSH_GLOBAL)
#define OPS                                                                                 \
	(IBV_QP_EX_WITH_BIND_MW | IBV_QP_EX_WITH_LOCAL_INV | IBV_QP_EX_WITH_SEND_WITH_INV | \
	 IBV_QP_EX_WITH_RDMA_READ | IBV_QP_EX_WITH_ATOMIC_WRITE | 1 << 11 /* FLUSH */)

static struct tv_end a, b;

static void read_back(uint64_t wr_id, uint64_t addr, uint32_t rkey, enum ibv_wc_status status)
{
	struct ibv_sge sge;
	struct ibv_send_wr wr = tv_wr(&a, IBV_WR_RDMA_READ, wr_id, &sge, 0, 100);
	struct ibv_wc wc;

	memset(a.buf, 0, 100);
	wr.wr.rdma.remote_addr = addr;
	wr.wr.rdma.rkey = rkey;
	CHECK_EQ(tv_post(&a, &wr), 0);
	wc = tv_wait(a.scq);
	CHECK_EQ(wc.wr_id, wr_id);
	CHECK_EQ(wc.status, status);
	if (status == IBV_WC_SUCCESS)
		CHECK(tv_filled(a.buf, 100, 3));
}

static void bound(uint64_t wr_id)
{
	struct ibv_wc wc = tv_wait(b.scq);

	CHECK_EQ(wc.status, IBV_WC_SUCCESS);
	CHECK_EQ(wc.wr_id, wr_id);
	CHECK_EQ(wc.opcode, IBV_WC_BIND_MW);
}

static void type_1_is_bound_by_a_call(void)
{
	struct ibv_mw_bind bind = {.wr_id = 5, .send_flags = IBV_SEND_SIGNALED};
	struct ibv_mw *mw;
	uint32_t unbound;

	tv_pair(&a, &b, &(struct tv_opt){.access = ALL});
	tv_fill(b.buf + 500, 100, 3);
	CHECK(mw = ibv_alloc_mw(b.pd, IBV_MW_TYPE_1));
	CHECK(mw->context == b.ctx && mw->pd == b.pd && mw->type == IBV_MW_TYPE_1);
	unbound = mw->rkey;
	bind.bind_info = (struct ibv_mw_bind_info){b.mr, (uintptr_t)b.buf + 500, 100, REMOTE};
	CHECK_EQ(ibv_bind_mw(b.qp, mw, &bind), 0);
	CHECK(mw->rkey != unbound && mw->rkey >> 8 == unbound >> 8);
	bound(5);
	read_back(1, (uintptr_t)b.buf + 500, mw->rkey, IBV_WC_SUCCESS);
	CHECK_EQ(ibv_dereg_mr(b.mr), EBUSY);
	CHECK_EQ(ibv_rereg_mr(b.mr, IBV_REREG_MR_CHANGE_ACCESS, NULL, NULL, 0, IBV_ACCESS_LOCAL_WRITE),
		 IBV_REREG_MR_ERR_INPUT);
	CHECK_EQ(errno, EBUSY);
	bind.bind_info.mw_access_flags |= IBV_ACCESS_ZERO_BASED;
	CHECK_EQ(ibv_bind_mw(b.qp, mw, &bind), EINVAL);
	/* Bound to nothing it opens nothing. */
	bind.bind_info = (struct ibv_mw_bind_info){0};
	CHECK_EQ(ibv_bind_mw(b.qp, mw, &bind), 0);
	bound(5);
	read_back(2, (uintptr_t)b.buf + 500, mw->rkey, IBV_WC_REM_ACCESS_ERR);
	CHECK_EQ(ibv_dealloc_mw(mw), 0);
	tv_pair_close(&a, &b);
}

static void type_2_is_bound_and_invalidated_by_requests(void)
{
	struct ibv_sge sge;
	struct ibv_send_wr wr = {.wr_id = 1, .opcode = IBV_WR_BIND_MW, .send_flags = IBV_SEND_SIGNALED};
	struct ibv_mw *mw;
	struct ibv_wc wc;

	tv_pair(&a, &b, &(struct tv_opt){.access = ALL});
	tv_fill(b.buf + 500, 100, 3);
	CHECK_ERRNO(ibv_alloc_mw(b.pd, 3), EINVAL);
	CHECK(mw = ibv_alloc_mw(b.pd, IBV_MW_TYPE_2));
	wr.bind_mw.mw = mw;
	wr.bind_mw.rkey = ibv_inc_rkey(mw->rkey);
	wr.bind_mw.bind_info =
		(struct ibv_mw_bind_info){b.mr, (uintptr_t)b.buf + 500, 100, REMOTE | IBV_ACCESS_ZERO_BASED};
	CHECK_EQ(tv_post(&b, &wr), 0);
	bound(1);
	read_back(1, 0, wr.bind_mw.rkey, IBV_WC_SUCCESS);

	/* The peer takes the key back... */
	CHECK_EQ(tv_recv(&b, 9, 0, 8), 0);
	wr = tv_wr(&a, IBV_WR_SEND_WITH_INV, 2, &sge, 0, 8);
	wr.invalidate_rkey = ibv_inc_rkey(mw->rkey);
	CHECK_EQ(tv_post(&a, &wr), 0);
	tv_wait_ok(a.scq, 2);
	wc = tv_wait(b.rcq);
	CHECK_EQ(wc.status, IBV_WC_SUCCESS);
	CHECK(wc.wc_flags & IBV_WC_WITH_INV);
	CHECK_EQ(wc.invalidated_rkey, ibv_inc_rkey(mw->rkey));
	CHECK_EQ(ibv_dereg_mr(b.mr), 0); /* nothing is bound to it any more */
	CHECK(b.mr = ibv_reg_mr(b.pd, b.buf, TV_BUF, ALL));

	/* ... or its owner does. */
	wr = (struct ibv_send_wr){.wr_id = 3, .opcode = IBV_WR_BIND_MW, .send_flags = IBV_SEND_SIGNALED};
	wr.bind_mw.mw = mw;
	wr.bind_mw.rkey = mw->rkey;
	wr.bind_mw.bind_info = (struct ibv_mw_bind_info){b.mr, (uintptr_t)b.buf, 100, REMOTE};
	CHECK_EQ(tv_post(&b, &wr), 0);
	bound(3);
	wr = (struct ibv_send_wr){.wr_id = 4, .opcode = IBV_WR_LOCAL_INV, .send_flags = IBV_SEND_SIGNALED};
	wr.invalidate_rkey = mw->rkey;
	CHECK_EQ(tv_post(&b, &wr), 0);
	wc = tv_wait(b.scq);
	CHECK(wc.wr_id == 4 && wc.opcode == IBV_WC_LOCAL_INV && wc.status == IBV_WC_SUCCESS);
	read_back(3, (uintptr_t)b.buf, mw->rkey, IBV_WC_REM_ACCESS_ERR);
	CHECK_EQ(ibv_dealloc_mw(mw), 0);
	tv_pair_close(&a, &b);
}

static void a_binding_to_a_region_without_the_flag_fails(void)
{
	struct ibv_mw_bind bind = {.wr_id = 5};
	struct ibv_mw *mw;

	tv_pair(&a, &b, &(struct tv_opt){.access = ALL & ~IBV_ACCESS_MW_BIND});
	CHECK(mw = ibv_alloc_mw(b.pd, IBV_MW_TYPE_1));
	bind.bind_info = (struct ibv_mw_bind_info){b.mr, (uintptr_t)b.buf, 100, REMOTE};
	CHECK_EQ(ibv_bind_mw(b.qp, mw, &bind), 0);
	CHECK_EQ(tv_wait(b.scq).status, IBV_WC_MW_BIND_ERR);
	CHECK_EQ(ibv_dealloc_pd(b.pd), EBUSY);
	CHECK_EQ(ibv_dealloc_mw(mw), 0);
	tv_pair_close(&a, &b);
}

static void windows_left_behind_go_with_their_context(void)
{
	struct ibv_context *ctx = tv_open();
	struct ibv_pd *pd = ibv_alloc_pd(ctx);

	CHECK(ibv_alloc_mw(pd, IBV_MW_TYPE_1));
	CHECK(ibv_alloc_mw(pd, IBV_MW_TYPE_2));
	CHECK_EQ(ibv_close_device(ctx), 0);
}

/* wr_flush is the slot behind the last one that the oldest header knows. */
typedef void (*flush_fn)(struct ibv_qp_ex *, uint32_t, uint64_t, size_t, uint8_t, uint8_t);

static void flush(struct ibv_qp_ex *q, uint32_t rkey, uint64_t addr, size_t len, uint8_t type, uint8_t level)
{
	flush_fn *slot = (flush_fn *)(void *)((char *)q + offsetof(struct ibv_qp_ex, wr_atomic_write) +
					      sizeof(flush_fn));

	(*slot)(q, rkey, addr, len, type, level);
}

static void the_extended_interface_does_it_all(void)
{
	struct ibv_qp_ex *q, *p;
	struct ibv_mw_bind_info info;
	struct ibv_mw *mw;
	struct ibv_wc wc;
	uint32_t key;

	tv_pair(&a, &b, &(struct tv_opt){.access = ALL, .send_ops = OPS});
	CHECK(q = ibv_qp_to_qp_ex(a.qp));
	CHECK(p = ibv_qp_to_qp_ex(b.qp));
	tv_fill(b.buf + 500, 100, 3);
	CHECK(mw = ibv_alloc_mw(b.pd, IBV_MW_TYPE_2));
	key = ibv_inc_rkey(mw->rkey);
	info = (struct ibv_mw_bind_info){b.mr, (uintptr_t)b.buf, 4096, REMOTE};
	ibv_wr_start(p);
	p->wr_id = 1;
	p->wr_flags = IBV_SEND_SIGNALED;
	ibv_wr_bind_mw(p, mw, key, &info);
	CHECK_EQ(ibv_wr_complete(p), 0);
	bound(1);
	CHECK_EQ(tv_recv(&b, 9, 8192, 8), 0);
	ibv_wr_start(q);
	q->wr_flags = IBV_SEND_SIGNALED;
	q->wr_id = 2;
	ibv_wr_atomic_write(q, key, (uintptr_t)b.buf + 64, "12345678");
	q->wr_id = 3;
	flush(q, b.mr->rkey, (uintptr_t)b.buf + 64, 8, 1, 0);
	q->wr_id = 4;
	ibv_wr_rdma_read(q, key, (uintptr_t)b.buf + 500);
	ibv_wr_set_sge(q, a.mr->lkey, (uintptr_t)a.buf, 100);
	q->wr_id = 5;
	q->wr_flags |= IBV_SEND_FENCE;
	ibv_wr_send_inv(q, key);
	ibv_wr_set_sge(q, a.mr->lkey, (uintptr_t)a.buf, 8);
	CHECK_EQ(ibv_wr_complete(q), 0);
	for (uint64_t i = 2; i < 6; i++) {
		static const int opcodes[] = {9, 8, IBV_WC_RDMA_READ, IBV_WC_SEND};

		wc = tv_wait(a.scq);
		CHECK_EQ(wc.status, IBV_WC_SUCCESS);
		CHECK_EQ(wc.wr_id, i);
		CHECK_EQ((int)wc.opcode, opcodes[i - 2]);
	}
	CHECK(!memcmp(b.buf + 64, "12345678", 8));
	CHECK(tv_filled(a.buf, 100, 3));
	wc = tv_wait(b.rcq);
	CHECK(wc.wc_flags == IBV_WC_WITH_INV && wc.invalidated_rkey == key);

	/* Invalidated already: not a second time. */
	ibv_wr_start(p);
	p->wr_id = 6;
	ibv_wr_local_inv(p, key);
	CHECK_EQ(ibv_wr_complete(p), 0);
	CHECK_EQ(tv_wait(b.scq).status, IBV_WC_LOC_QP_OP_ERR);
	CHECK_EQ(ibv_dealloc_mw(mw), 0);
	tv_pair_close(&a, &b);
}

static void the_device_says_what_it_can(void)
{
	struct ibv_device_attr_ex ex;
	struct ibv_context *ctx = tv_open();
	unsigned caps = IBV_DEVICE_MEM_WINDOW | IBV_DEVICE_MEM_WINDOW_TYPE_2B | IBV_DEVICE_MEM_MGT_EXTENSIONS;

	CHECK_EQ(ibv_query_device_ex(ctx, NULL, &ex), 0);
	CHECK_EQ(ex.orig_attr.device_cap_flags & caps, caps);
	CHECK(!(ex.orig_attr.device_cap_flags & IBV_DEVICE_MEM_WINDOW_TYPE_2A));
	CHECK(ex.orig_attr.max_mw > 0);
	CHECK(ex.device_cap_flags_ex & 1ull << 38);    /* FLUSH_GLOBAL */
	CHECK(!(ex.device_cap_flags_ex & 1ull << 39)); /* FLUSH_PERSISTENT: memory of programs is not */
	CHECK(ex.device_cap_flags_ex & 1ull << 40);    /* ATOMIC_WRITE */
	CHECK_EQ(ibv_close_device(ctx), 0);
}

TV_MAIN(T(type_1_is_bound_by_a_call), T(type_2_is_bound_and_invalidated_by_requests),
	T(a_binding_to_a_region_without_the_flag_fails), T(windows_left_behind_go_with_their_context),
	T(the_extended_interface_does_it_all), T(the_device_says_what_it_can))
