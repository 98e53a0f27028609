/* SPDX-License-Identifier: BSD-3-Clause */
/* Compare-and-swap and fetch-and-add by both posting interfaces. */
#include "tv.h"

#include <pthread.h>

#define ALL \
	(IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC)
#define OPS (IBV_QP_EX_WITH_ATOMIC_CMP_AND_SWP | IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD)

static struct tv_end a, b;

static uint64_t *word(struct tv_end *e, unsigned i)
{
	return (uint64_t *)(void *)e->buf + i;
}

static int post(enum ibv_wr_opcode op, uint64_t wr_id, uint64_t compare_add, uint64_t swap)
{
	struct ibv_sge sge;
	struct ibv_send_wr wr = tv_wr(&a, op, wr_id, &sge, 64 + (uint32_t)wr_id * 8, 8);

	wr.wr.atomic.remote_addr = (uintptr_t)b.buf;
	wr.wr.atomic.rkey = b.mr->rkey;
	wr.wr.atomic.compare_add = compare_add;
	wr.wr.atomic.swap = swap;
	return tv_post(&a, &wr);
}

static void expect(uint64_t wr_id, enum ibv_wc_opcode op, uint64_t result)
{
	struct ibv_wc wc = tv_wait(a.scq);

	CHECK_EQ(wc.status, IBV_WC_SUCCESS);
	CHECK_EQ(wc.wr_id, wr_id);
	CHECK_EQ(wc.opcode, op);
	CHECK_EQ(wc.byte_len, 8);
	CHECK_EQ(*word(&a, 8 + (unsigned)wr_id), result);
}

static void both_operations_work(void)
{
	tv_pair(&a, &b, &(struct tv_opt){.access = ALL});
	*word(&b, 0) = 40;
	CHECK_EQ(post(IBV_WR_ATOMIC_FETCH_AND_ADD, 0, 2, 0), 0);
	expect(0, IBV_WC_FETCH_ADD, 40);
	CHECK_EQ(post(IBV_WR_ATOMIC_CMP_AND_SWP, 1, 41, 7), 0);
	expect(1, IBV_WC_COMP_SWAP, 42);
	CHECK_EQ(*word(&b, 0), 42);
	CHECK_EQ(post(IBV_WR_ATOMIC_CMP_AND_SWP, 2, 42, UINT64_MAX), 0);
	expect(2, IBV_WC_COMP_SWAP, 42);
	CHECK(*word(&b, 0) == UINT64_MAX);
	tv_pair_close(&a, &b);
}

static void the_extended_interface_does_the_same(void)
{
	struct ibv_qp_ex *q;

	tv_pair(&a, &b, &(struct tv_opt){.access = ALL, .send_ops = OPS});
	CHECK(q = ibv_qp_to_qp_ex(a.qp));
	*word(&b, 0) = 40;
	ibv_wr_start(q);
	q->wr_id = 0;
	q->wr_flags = IBV_SEND_SIGNALED;
	ibv_wr_atomic_fetch_add(q, b.mr->rkey, (uintptr_t)b.buf, 2);
	ibv_wr_set_sge(q, a.mr->lkey, (uintptr_t)word(&a, 8), 8);
	q->wr_id = 1;
	ibv_wr_atomic_cmp_swp(q, b.mr->rkey, (uintptr_t)b.buf, 42, 7);
	ibv_wr_set_sge(q, a.mr->lkey, (uintptr_t)word(&a, 9), 8);
	CHECK_EQ(ibv_wr_complete(q), 0);
	expect(0, IBV_WC_FETCH_ADD, 40);
	expect(1, IBV_WC_COMP_SWAP, 42);
	CHECK_EQ(*word(&b, 0), 7);
	tv_pair_close(&a, &b);
}

static void mistakes_get_their_status(void)
{
	static const struct {
		int offset, access;
		enum ibv_wc_status status;
		enum ibv_event_type event;
	} cases[] = {
		{4, ALL, IBV_WC_REM_INV_REQ_ERR, IBV_EVENT_QP_REQ_ERR},
		{TV_BUF, ALL, IBV_WC_REM_ACCESS_ERR, IBV_EVENT_QP_ACCESS_ERR},
		{0, ALL & ~IBV_ACCESS_REMOTE_ATOMIC, IBV_WC_REM_INV_REQ_ERR, IBV_EVENT_QP_REQ_ERR},
	};

	for (unsigned i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		struct ibv_async_event ev;
		struct ibv_send_wr wr;
		struct ibv_sge sge;

		tv_pair(&a, &b, &(struct tv_opt){.access = cases[i].access});
		wr = tv_wr(&a, IBV_WR_ATOMIC_FETCH_AND_ADD, 1, &sge, 0, 8);
		wr.wr.atomic.remote_addr = (uintptr_t)b.buf + (unsigned)cases[i].offset;
		wr.wr.atomic.rkey = b.mr->rkey;
		wr.wr.atomic.compare_add = 1;
		CHECK_EQ(tv_post(&a, &wr), 0);
		CHECK_EQ(tv_wait(a.scq).status, cases[i].status);
		CHECK_EQ(ibv_get_async_event(b.ctx, &ev), 0);
		CHECK_EQ(ev.event_type, cases[i].event);
		CHECK(ev.element.qp == b.qp);
		ibv_ack_async_event(&ev);
		CHECK_EQ(*word(&b, 0), 0);
		tv_pair_close(&a, &b);
	}
}

#define ADDS 3000u

static void *add_locally(void *arg)
{
	for (unsigned i = 0; i < ADDS; i++)
		__atomic_fetch_add((uint64_t *)arg, 1, __ATOMIC_SEQ_CST);
	return NULL;
}

/* More than IBV_ATOMIC_HCA promises: the program's own atomic instructions count, too. */
static void the_program_s_own_atomics_are_not_lost(void)
{
	pthread_t thread;

	tv_pair(&a, &b, &(struct tv_opt){.access = ALL});
	CHECK_EQ(pthread_create(&thread, NULL, add_locally, word(&b, 0)), 0);
	for (unsigned i = 0; i < ADDS; i++) {
		CHECK_EQ(post(IBV_WR_ATOMIC_FETCH_AND_ADD, 1, 1, 0), 0);
		tv_wait_ok(a.scq, 1);
	}
	CHECK_EQ(pthread_join(thread, NULL), 0);
	CHECK_EQ(*word(&b, 0), 2 * ADDS);
	tv_pair_close(&a, &b);
}

TV_MAIN(T(both_operations_work), T(the_extended_interface_does_the_same), T(mistakes_get_their_status),
	T(the_program_s_own_atomics_are_not_lost))
