/* SPDX-License-Identifier: BSD-3-Clause */
/* Several threads on one device: verbs are thread-safe. */
#include "tv.h"

#include <pthread.h>
#include <stdatomic.h>

#define THREADS 3
#define ROUNDS 400u

/* Each thread works on a pair of its own, on one context. */
static void *own_pair(void *arg)
{
	struct ibv_context *ctx = arg;
	struct tv_opt opt = {.send_ops = IBV_QP_EX_WITH_SEND};
	struct tv_end a, b;
	struct ibv_qp_ex *q;

	tv_end_open(&a, ctx, &opt);
	tv_end_open(&b, ctx, &opt);
	tv_connect(a.qp, b.qp, &opt);
	q = ibv_qp_to_qp_ex(a.qp);
	for (unsigned i = 0; i < ROUNDS; i++) {
		CHECK_EQ(tv_recv(&b, i, 0, 4096), 0);
		tv_fill(a.buf, 600, i);
		ibv_wr_start(q);
		q->wr_id = i;
		q->wr_flags = IBV_SEND_SIGNALED;
		ibv_wr_send(q);
		ibv_wr_set_sge(q, a.mr->lkey, (uintptr_t)a.buf, 600);
		CHECK_EQ(ibv_wr_complete(q), 0);
		tv_wait_ok(b.rcq, i);
		CHECK(tv_filled(b.buf, 600, i));
		tv_wait_ok(a.scq, i);
	}
	tv_end_close(&a);
	tv_end_close(&b);
	return NULL;
}

static void threads_with_qps_of_their_own(void)
{
	struct ibv_context *ctx = tv_open();
	pthread_t t[THREADS];

	for (int i = 0; i < THREADS; i++)
		CHECK_EQ(pthread_create(&t[i], NULL, own_pair, ctx), 0);
	for (int i = 0; i < THREADS; i++)
		pthread_join(t[i], NULL);
	CHECK_EQ(ibv_close_device(ctx), 0);
}

/* All threads post to and poll one QP. */
static struct tv_end a, b;
static _Atomic unsigned completed;

static void *shared_qp(void *arg)
{
	unsigned mine = 0;
	struct ibv_wc wc;

	(void)arg;
	while (mine < ROUNDS || atomic_load(&completed) < THREADS * ROUNDS) {
		if (mine < ROUNDS) {
			struct ibv_sge sge;
			struct ibv_send_wr wr = tv_wr(&a, IBV_WR_RDMA_WRITE, 1, &sge, 0, 100), *bad;
			int err;

			wr.wr.rdma.remote_addr = (uintptr_t)b.buf;
			wr.wr.rdma.rkey = b.mr->rkey;
			err = ibv_post_send(a.qp, &wr, &bad);
			CHECK(err == 0 || err == ENOMEM);
			mine += !err;
		}
		if (ibv_poll_cq(a.scq, 1, &wc) == 1) {
			CHECK_EQ(wc.status, IBV_WC_SUCCESS);
			atomic_fetch_add(&completed, 1);
		}
	}
	return NULL;
}

static void threads_that_share_a_qp(void)
{
	pthread_t t[THREADS];

	tv_pair(&a, &b, &(struct tv_opt){0});
	for (int i = 0; i < THREADS; i++)
		CHECK_EQ(pthread_create(&t[i], NULL, shared_qp, NULL), 0);
	for (int i = 0; i < THREADS; i++)
		pthread_join(t[i], NULL);
	CHECK_EQ(completed, THREADS * ROUNDS);
	tv_pair_close(&a, &b);
}

/* One thread sleeps on the channel while another one sends. */
static void *event_loop(void *arg)
{
	unsigned seen = 0;

	(void)arg;
	while (seen < ROUNDS) {
		struct ibv_wc wc[4];
		struct ibv_cq *cq;
		void *context;
		int n;

		CHECK_EQ(ibv_get_cq_event(b.channel, &cq, &context), 0);
		ibv_ack_cq_events(cq, 1);
		CHECK_EQ(ibv_req_notify_cq(cq, 0), 0);
		while ((n = ibv_poll_cq(cq, 4, wc)) > 0)
			for (int i = 0; i < n; i++, seen++) {
				CHECK_EQ(wc[i].status, IBV_WC_SUCCESS);
				CHECK_EQ(tv_recv(&b, 1, 0, 64), 0);
			}
	}
	return NULL;
}

static void a_sleeping_receiver_misses_nothing(void)
{
	pthread_t t;

	tv_pair(&a, &b, &(struct tv_opt){.channel = true});
	for (int i = 0; i < 32; i++)
		CHECK_EQ(tv_recv(&b, 1, 0, 64), 0);
	CHECK_EQ(ibv_req_notify_cq(b.rcq, 0), 0);
	CHECK_EQ(pthread_create(&t, NULL, event_loop, NULL), 0);
	for (unsigned i = 0; i < ROUNDS; i++) {
		struct ibv_sge sge;
		struct ibv_send_wr wr = tv_wr(&a, IBV_WR_SEND, i, &sge, 0, 64);

		CHECK_EQ(tv_post(&a, &wr), 0);
		tv_wait_ok(a.scq, i);
	}
	pthread_join(t, NULL);
	tv_pair_close(&a, &b);
}

static void *open_and_close(void *arg)
{
	(void)arg;
	for (int i = 0; i < 20; i++) {
		struct ibv_context *ctx = tv_open();
		struct ibv_pd *pd = ibv_alloc_pd(ctx);

		CHECK(pd);
		CHECK_EQ(ibv_dealloc_pd(pd), 0);
		CHECK_EQ(ibv_close_device(ctx), 0);
	}
	return NULL;
}

/* The last one to close gives the port up before the next one wants it. */
static void opening_and_closing_from_several_threads(void)
{
	pthread_t t[THREADS];

	for (int i = 0; i < THREADS; i++)
		CHECK_EQ(pthread_create(&t[i], NULL, open_and_close, NULL), 0);
	for (int i = 0; i < THREADS; i++)
		pthread_join(t[i], NULL);
}

static void *poll_for_ever(void *arg)
{
	struct ibv_wc wc;

	(void)arg;
	for (;;) {
		CHECK_EQ(ibv_poll_cq(b.scq, 1, &wc), 0);
		pthread_testcancel();
	}
	return NULL;
}

static void *post_for_ever(void *arg)
{
	struct ibv_sge sge;
	struct ibv_wc wc;

	(void)arg;
	for (;;) {
		struct ibv_send_wr wr = tv_wr(&a, IBV_WR_RDMA_WRITE, 1, &sge, 0, 100);

		wr.wr.rdma.remote_addr = (uintptr_t)b.buf;
		wr.wr.rdma.rkey = b.mr->rkey;
		if (!tv_post(&a, &wr))
			while (!ibv_poll_cq(a.scq, 1, &wc))
				pthread_testcancel();
	}
	return NULL;
}

/* As rping and other programs end their threads: posting and polling are no cancellation points, nor is the lock kept. */
static void a_cancelled_thread_leaves_the_device_usable(void)
{
	void *(*const body[])(void *) = {poll_for_ever, post_for_ever};

	tv_pair(&a, &b, &(struct tv_opt){0});
	for (int i = 0; i < 50; i++) {
		struct ibv_wc wc;
		pthread_t t;
		void *end;

		CHECK_EQ(pthread_create(&t, NULL, body[i % 2], NULL), 0);
		for (int k = 0; k < 20; k++)
			CHECK_EQ(ibv_poll_cq(b.rcq, 1, &wc), 0);
		CHECK_EQ(pthread_cancel(t), 0);
		CHECK_EQ(pthread_join(t, &end), 0);
		CHECK(end == PTHREAD_CANCELED);
	}
	tv_pair_close(&a, &b);
}

TV_MAIN(T(threads_with_qps_of_their_own), T(threads_that_share_a_qp), T(a_sleeping_receiver_misses_nothing),
	T(opening_and_closing_from_several_threads), T(a_cancelled_thread_leaves_the_device_usable))
