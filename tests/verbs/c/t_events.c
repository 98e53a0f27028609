/* SPDX-License-Identifier: BSD-3-Clause */
/* Completion channels and asynchronous events: blocking, polling, acknowledging. */
#include "tv.h"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/eventfd.h>
#include <time.h>
#include <unistd.h>

static struct tv_end a, b;

static void nonblocking(int fd)
{
	CHECK_EQ(fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK), 0);
}

static int readable(int fd, int timeout_ms)
{
	struct pollfd p = {.fd = fd, .events = POLLIN};

	return poll(&p, 1, timeout_ms);
}

static void send_one(unsigned flags)
{
	struct ibv_send_wr wr;
	struct ibv_sge sge;

	CHECK_EQ(tv_recv(&b, 1, 0, 64), 0);
	wr = tv_wr(&a, IBV_WR_SEND, 2, &sge, 0, 64);
	wr.send_flags |= flags;
	CHECK_EQ(tv_post(&a, &wr), 0);
	tv_wait_ok(a.scq, 2); /* so it has arrived */
}

static void get_event(void)
{
	struct ibv_cq *cq;
	void *context;

	CHECK_EQ(ibv_get_cq_event(b.channel, &cq, &context), 0);
	CHECK(cq == b.rcq && context == &b);
	ibv_ack_cq_events(cq, 1);
}

static void none(void)
{
	struct ibv_cq *cq;
	void *context;

	nonblocking(b.channel->fd);
	CHECK_EQ(ibv_get_cq_event(b.channel, &cq, &context), -1);
	CHECK_EQ(errno, EAGAIN);
	CHECK_EQ(readable(b.channel->fd, 0), 0);
}

static void an_armed_cq_tells_once(void)
{
	tv_pair(&a, &b, &(struct tv_opt){.channel = true});
	send_one(0); /* not armed */
	CHECK_EQ(readable(b.channel->fd, 0), 0);
	CHECK_EQ(ibv_req_notify_cq(b.rcq, 0), 0);
	CHECK_EQ(readable(b.channel->fd, 0), 0); /* what was there before does not count */
	send_one(0);
	send_one(0);
	CHECK_EQ(readable(b.channel->fd, 0), 1);
	get_event();
	none();
	tv_pair_close(&a, &b);
}

static void a_program_that_sleeps_is_woken(void)
{
	tv_pair(&a, &b, &(struct tv_opt){.channel = true});
	for (int i = 0; i < 50; i++) {
		struct ibv_send_wr wr;
		struct ibv_sge sge;

		CHECK_EQ(ibv_req_notify_cq(b.rcq, 0), 0);
		CHECK_EQ(tv_recv(&b, 1, 0, 64), 0);
		wr = tv_wr(&a, IBV_WR_SEND, 2, &sge, 0, 64);
		CHECK_EQ(tv_post(&a, &wr), 0);
		get_event(); /* nobody polls: the progress thread must see the packet */
		tv_wait_ok(b.rcq, 1);
		tv_wait_ok(a.scq, 2);
	}
	tv_pair_close(&a, &b);
}

static void a_descriptor_can_be_polled(void)
{
	struct ibv_send_wr wr;
	struct ibv_sge sge;
	struct ibv_wc wc;

	tv_pair(&a, &b, &(struct tv_opt){.channel = true});
	nonblocking(a.channel->fd);
	for (int i = 0; i < 20; i++) {
		CHECK_EQ(ibv_req_notify_cq(a.scq, 0), 0);
		CHECK_EQ(ibv_poll_cq(a.scq, 1, &wc), 0);
		CHECK_EQ(tv_recv(&b, 1, 0, 64), 0);
		wr = tv_wr(&a, IBV_WR_SEND, 2, &sge, 0, 64);
		CHECK_EQ(tv_post(&a, &wr), 0);
		CHECK_EQ(readable(a.channel->fd, 10000), 1);
		{
			struct ibv_cq *cq;
			void *context;

			CHECK_EQ(ibv_get_cq_event(a.channel, &cq, &context), 0);
			CHECK(cq == a.scq);
			CHECK_EQ(ibv_get_cq_event(a.channel, &cq, &context), -1);
			ibv_ack_cq_events(a.scq, 1);
		}
		tv_wait_ok(a.scq, 2);
		tv_wait_ok(b.rcq, 1);
	}
	tv_pair_close(&a, &b);
}

static void solicited_only_waits_for_a_solicited_one(void)
{
	tv_pair(&a, &b, &(struct tv_opt){.channel = true});
	CHECK_EQ(ibv_req_notify_cq(b.rcq, 1), 0);
	send_one(0);
	CHECK_EQ(readable(b.channel->fd, 0), 0);
	send_one(IBV_SEND_SOLICITED);
	CHECK_EQ(readable(b.channel->fd, 0), 1);
	get_event();
	/* An error counts as solicited. */
	CHECK_EQ(ibv_req_notify_cq(b.rcq, 1), 0);
	CHECK_EQ(tv_recv(&b, 3, 0, 64), 0);
	CHECK_EQ(ibv_modify_qp(b.qp, &(struct ibv_qp_attr){.qp_state = IBV_QPS_ERR}, IBV_QP_STATE), 0);
	get_event();
	tv_pair_close(&a, &b);
}

static void several_cqs_share_a_channel_in_order(void)
{
	struct ibv_cq *cq[4], *got;
	struct ibv_qp_init_attr init = {.qp_type = IBV_QPT_RC, .cap = {4, 4, 1, 1, 0}};
	struct ibv_qp_attr err = {.qp_state = IBV_QPS_ERR};
	struct ibv_recv_wr rwr = {0}, *rbad;
	struct ibv_qp *qp[4];
	struct tv_opt opt = {.channel = true};
	void *context;

	tv_pair(&a, &b, &opt);
	for (int i = 0; i < 4; i++) {
		CHECK(cq[i] = ibv_create_cq(a.ctx, 8, (void *)(uintptr_t)(i + 1), a.channel, 0));
		init.send_cq = init.recv_cq = cq[i];
		CHECK(qp[i] = ibv_create_qp(a.pd, &init));
		tv_to_init(qp[i], &opt);
		CHECK_EQ(ibv_req_notify_cq(cq[i], 0), 0);
	}
	for (int i = 3; i >= 0; i--) { /* a flushed receive makes an event at once */
		CHECK_EQ(ibv_post_recv(qp[i], &rwr, &rbad), 0);
		CHECK_EQ(ibv_modify_qp(qp[i], &err, IBV_QP_STATE), 0);
	}
	CHECK_EQ(ibv_destroy_comp_channel(a.channel), EBUSY);
	CHECK_EQ(ibv_destroy_qp(qp[2]), 0);
	CHECK_EQ(ibv_destroy_cq(cq[2]), 0); /* takes its unread event along */
	for (int i = 3; i >= 0; i--) {
		if (i == 2)
			continue;
		CHECK_EQ(ibv_get_cq_event(a.channel, &got, &context), 0);
		CHECK(got == cq[i] && context == (void *)(uintptr_t)(i + 1));
		ibv_ack_cq_events(got, 1);
	}
	CHECK_EQ(readable(a.channel->fd, 0), 0);
	for (int i = 0; i < 4; i++)
		if (i != 2) {
			CHECK_EQ(ibv_destroy_qp(qp[i]), 0);
			CHECK_EQ(ibv_destroy_cq(cq[i]), 0);
		}
	tv_pair_close(&a, &b);
}

/* Two events of one CQ in the queue, acknowledged together. */
static void events_add_up(void)
{
	struct ibv_cq *cq;
	void *context;

	tv_pair(&a, &b, &(struct tv_opt){.channel = true});
	for (int i = 0; i < 3; i++) {
		CHECK_EQ(ibv_req_notify_cq(b.rcq, 0), 0);
		send_one(0);
	}
	for (int i = 0; i < 3; i++) {
		CHECK_EQ(readable(b.channel->fd, 0), 1);
		CHECK_EQ(ibv_get_cq_event(b.channel, &cq, &context), 0);
	}
	CHECK_EQ(readable(b.channel->fd, 0), 0);
	ibv_ack_cq_events(cq, 3);
	tv_pair_close(&a, &b);
}

static _Atomic int destroyed;

static void *destroyer(void *arg)
{
	CHECK_EQ(ibv_destroy_cq(arg), 0);
	atomic_store(&destroyed, 1);
	return NULL;
}

static void destroying_waits_for_acknowledgements(void)
{
	struct timespec ms = {.tv_nsec = 20000000};
	struct ibv_cq *cq;
	void *context;
	pthread_t t;

	tv_pair(&a, &b, &(struct tv_opt){.channel = true});
	CHECK_EQ(ibv_req_notify_cq(b.rcq, 0), 0);
	send_one(0);
	CHECK_EQ(ibv_get_cq_event(b.channel, &cq, &context), 0);
	CHECK_EQ(ibv_destroy_qp(b.qp), 0);
	CHECK_EQ(pthread_create(&t, NULL, destroyer, b.rcq), 0);
	nanosleep(&ms, NULL); /* can only make the test miss a fault, not fail */
	CHECK_EQ(atomic_load(&destroyed), 0);
	ibv_ack_cq_events(cq, 1);
	pthread_join(t, NULL);
	CHECK_EQ(atomic_load(&destroyed), 1);
	CHECK_EQ(ibv_destroy_cq(b.scq), 0);
	CHECK_EQ(ibv_destroy_comp_channel(b.channel), 0);
}

static void on_signal(int sig)
{
	(void)sig;
}

static void interrupt_me(bool restart)
{
	struct sigaction sa = {.sa_handler = on_signal, .sa_flags = restart ? SA_RESTART : 0};
	struct itimerspec soon = {.it_value.tv_nsec = 5000000, .it_interval.tv_nsec = 5000000};
	struct sigevent ev = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGUSR1};
	timer_t timer;

	CHECK_EQ(sigaction(SIGUSR1, &sa, NULL), 0);
	CHECK_EQ(timer_create(CLOCK_MONOTONIC, &ev, &timer), 0);
	CHECK_EQ(timer_settime(timer, 0, &soon, NULL), 0);
}

static void a_signal_interrupts_the_wait(void)
{
	struct ibv_async_event event;
	struct ibv_cq *cq;
	void *context;

	tv_pair(&a, &b, &(struct tv_opt){.channel = true});
	interrupt_me(false);
	CHECK_EQ(ibv_get_cq_event(b.channel, &cq, &context), -1);
	CHECK_EQ(errno, EINTR);
	CHECK_EQ(ibv_get_async_event(a.ctx, &event), -1);
	CHECK_EQ(errno, EINTR);
	tv_pair_close(&a, &b);
}

static void *late_sender(void *arg)
{
	struct timespec ms = {.tv_nsec = 30000000}, left;
	struct ibv_send_wr wr;
	struct ibv_sge sge;

	(void)arg;
	while (nanosleep(&ms, &left))
		ms = left;
	wr = tv_wr(&a, IBV_WR_SEND, 2, &sge, 0, 64);
	CHECK_EQ(tv_post(&a, &wr), 0);
	return NULL;
}

static void a_restarting_handler_does_not(void)
{
	pthread_t t;

	tv_pair(&a, &b, &(struct tv_opt){.channel = true});
	CHECK_EQ(ibv_req_notify_cq(b.rcq, 0), 0);
	CHECK_EQ(tv_recv(&b, 1, 0, 64), 0);
	interrupt_me(true);
	CHECK_EQ(pthread_create(&t, NULL, late_sender, NULL), 0);
	get_event();
	pthread_join(t, NULL);
	tv_wait_ok(b.rcq, 1);
	tv_pair_close(&a, &b);
}

/* ---- asynchronous events ------------------------------------------------------------------------ */

static void wait_async(struct ibv_qp *qp, enum ibv_event_type want)
{
	struct ibv_async_event ev;

	do { /* COMM_EST may come first */
		CHECK_EQ(readable(a.ctx->async_fd, 10000), 1);
		CHECK_EQ(ibv_get_async_event(a.ctx, &ev), 0);
		ibv_ack_async_event(&ev);
	} while (ev.event_type == IBV_EVENT_COMM_EST && want != IBV_EVENT_COMM_EST);
	CHECK_EQ(ev.event_type, want);
	CHECK(ev.element.qp == qp);
}

static void a_refused_access_is_an_event_for_the_responder(void)
{
	struct ibv_send_wr wr;
	struct ibv_sge sge;

	tv_pair(&a, &b, &(struct tv_opt){0});
	wr = tv_wr(&a, IBV_WR_RDMA_WRITE, 1, &sge, 0, 64);
	wr.wr.rdma.remote_addr = (uintptr_t)b.buf;
	wr.wr.rdma.rkey = b.mr->rkey ^ 1;
	CHECK_EQ(tv_post(&a, &wr), 0);
	CHECK_EQ(tv_wait(a.scq).status, IBV_WC_REM_ACCESS_ERR);
	wait_async(b.qp, IBV_EVENT_QP_ACCESS_ERR);
	tv_pair_close(&a, &b);
}

static void the_first_packet_in_rtr_is_an_event(void)
{
	struct tv_opt opt = {.unconnected = true};
	struct ibv_send_wr wr;
	struct ibv_sge sge;

	tv_pair(&a, &b, &opt);
	tv_connect(a.qp, b.qp, &opt);
	CHECK_EQ(tv_recv(&b, 1, 0, 64), 0);
	wr = tv_wr(&a, IBV_WR_SEND, 1, &sge, 0, 64);
	CHECK_EQ(tv_post(&a, &wr), 0);
	tv_wait_ok(b.rcq, 1);
	wait_async(b.qp, IBV_EVENT_COMM_EST);
	tv_pair_close(&a, &b);
}

static void a_cq_that_overflows_says_so(void)
{
	struct ibv_async_event ev;
	struct ibv_send_wr wr;
	struct ibv_sge sge;
	int cqe;

	tv_pair(&a, &b, &(struct tv_opt){.cqe = 2});
	cqe = a.scq->cqe;
	CHECK(cqe < 60);
	for (int i = 0; i <= cqe; i++) {
		wr = tv_wr(&a, IBV_WR_RDMA_WRITE, (unsigned)i, &sge, 0, 8);
		wr.wr.rdma.remote_addr = (uintptr_t)b.buf;
		wr.wr.rdma.rkey = b.mr->rkey;
		CHECK_EQ(tv_post(&a, &wr), 0);
	}
	do {
		CHECK_EQ(readable(a.ctx->async_fd, 10000), 1);
		CHECK_EQ(ibv_get_async_event(a.ctx, &ev), 0);
		ibv_ack_async_event(&ev);
	} while (ev.event_type == IBV_EVENT_COMM_EST);
	CHECK_EQ(ev.event_type, IBV_EVENT_CQ_ERR);
	CHECK(ev.element.cq == a.scq);
	wait_async(a.qp, IBV_EVENT_QP_FATAL); /* it can no longer tell what became of its requests */
	tv_pair_close(&a, &b);
}

static void a_drained_send_queue_says_so(void)
{
	struct ibv_qp_attr sqd = {.qp_state = IBV_QPS_SQD, .en_sqd_async_notify = 1};
	struct ibv_qp_attr rts = {.qp_state = IBV_QPS_RTS};
	struct ibv_qp_init_attr init;
	struct ibv_qp_attr attr;
	struct ibv_send_wr wr;
	struct ibv_sge sge;
	struct ibv_wc wc;

	/* rdma_rxe repeats nothing in SQD: what its timer takes back would wait. */
	tv_pair(&a, &b, &(struct tv_opt){.timeout = 20});
	wr = tv_wr(&a, IBV_WR_SEND, 1, &sge, 0, 100000);
	CHECK_EQ(tv_recv(&b, 1, 0, 100000), 0);
	CHECK_EQ(tv_recv(&b, 2, 0, 100000), 0);
	a.buf[0] = 1;
	b.buf[0] = 0;
	CHECK_EQ(tv_post(&a, &wr), 0);
	while (!*(volatile uint8_t *)b.buf) /* one that has not begun would wait, too (IBA 10.3.1.5) */
		usleep(100);
	CHECK_EQ(ibv_modify_qp(a.qp, &sqd, IBV_QP_STATE | IBV_QP_EN_SQD_ASYNC_NOTIFY), 0);
	wr.wr_id = 2; /* posted when drained or draining: it waits */
	CHECK_EQ(tv_post(&a, &wr), 0);
	wait_async(a.qp, IBV_EVENT_SQ_DRAINED);
	tv_wait_ok(a.scq, 1);
	CHECK_EQ(ibv_query_qp(a.qp, &attr, IBV_QP_STATE, &init), 0);
	CHECK(attr.qp_state == IBV_QPS_SQD && !attr.sq_draining);
	usleep(20000); /* nothing may happen */
	CHECK_EQ(ibv_poll_cq(a.scq, 1, &wc), 0);
	CHECK_EQ(ibv_modify_qp(a.qp, &rts, IBV_QP_STATE), 0);
	tv_wait_ok(a.scq, 2);
	tv_pair_close(&a, &b);
}

static void unread_async_events_go_with_their_object(void)
{
	struct ibv_async_event ev;
	struct ibv_send_wr wr;
	struct ibv_sge sge;

	tv_pair(&a, &b, &(struct tv_opt){0});
	wr = tv_wr(&a, IBV_WR_RDMA_WRITE, 1, &sge, 0, 64);
	wr.wr.rdma.remote_addr = (uintptr_t)b.buf;
	wr.wr.rdma.rkey = b.mr->rkey ^ 1;
	CHECK_EQ(tv_post(&a, &wr), 0);
	CHECK_EQ(tv_wait(a.scq).status, IBV_WC_REM_ACCESS_ERR);
	CHECK_EQ(readable(a.ctx->async_fd, 10000), 1);
	CHECK_EQ(ibv_destroy_qp(a.qp), 0);
	CHECK_EQ(ibv_destroy_qp(b.qp), 0);
	CHECK_EQ(readable(a.ctx->async_fd, 0), 0);
	nonblocking(a.ctx->async_fd);
	CHECK_EQ(ibv_get_async_event(a.ctx, &ev), -1);
	CHECK_EQ(errno, EAGAIN);
}

static void *qp_destroyer(void *arg)
{
	CHECK_EQ(ibv_destroy_qp(arg), 0);
	atomic_store(&destroyed, 1);
	return NULL;
}

static void destroying_a_qp_waits_for_its_async_acknowledgement(void)
{
	struct timespec ms = {.tv_nsec = 20000000};
	struct ibv_async_event ev;
	struct ibv_send_wr wr;
	struct ibv_sge sge;
	pthread_t t;

	tv_pair(&a, &b, &(struct tv_opt){0});
	wr = tv_wr(&a, IBV_WR_RDMA_WRITE, 1, &sge, 0, 64);
	wr.wr.rdma.remote_addr = (uintptr_t)b.buf;
	wr.wr.rdma.rkey = b.mr->rkey ^ 1;
	CHECK_EQ(tv_post(&a, &wr), 0);
	CHECK_EQ(ibv_get_async_event(a.ctx, &ev), 0); /* blocks until it is there */
	CHECK(ev.element.qp == b.qp);
	CHECK_EQ(pthread_create(&t, NULL, qp_destroyer, b.qp), 0);
	nanosleep(&ms, NULL);
	CHECK_EQ(atomic_load(&destroyed), 0);
	ibv_ack_async_event(&ev);
	pthread_join(t, NULL);
	CHECK_EQ(atomic_load(&destroyed), 1);
}

/* After a restore CRIU may have forgotten that an eventfd was a semaphore: simulate it. */
static void a_channel_survives_losing_its_semaphore_mode(void)
{
	struct ibv_cq *cq;
	void *context;
	uint64_t n = 2;

	tv_pair(&a, &b, &(struct tv_opt){.channel = true});
	CHECK_EQ(ibv_req_notify_cq(b.rcq, 0), 0);
	send_one(0);
	CHECK_EQ(ibv_req_notify_cq(b.rcq, 0), 0);
	send_one(0);
	{ /* the same value in a descriptor without the flag, put in its place */
		int fd = eventfd(2, 0);

		CHECK(fd >= 0 && dup2(fd, b.channel->fd) == b.channel->fd);
		close(fd);
	}
	for (unsigned i = 0; i < n; i++) {
		CHECK_EQ(readable(b.channel->fd, 0), 1);
		CHECK_EQ(ibv_get_cq_event(b.channel, &cq, &context), 0);
	}
	CHECK_EQ(readable(b.channel->fd, 0), 0);
	ibv_ack_cq_events(cq, 2);
	tv_pair_close(&a, &b);
}

TV_MAIN(T(an_armed_cq_tells_once), T(a_program_that_sleeps_is_woken), T(a_descriptor_can_be_polled),
	T(solicited_only_waits_for_a_solicited_one), T(several_cqs_share_a_channel_in_order),
	T(events_add_up), T(destroying_waits_for_acknowledgements), T(a_signal_interrupts_the_wait),
	T(a_restarting_handler_does_not), T(a_refused_access_is_an_event_for_the_responder),
	T(the_first_packet_in_rtr_is_an_event), T(a_cq_that_overflows_says_so),
	T(a_drained_send_queue_says_so), T(unread_async_events_go_with_their_object),
	T(destroying_a_qp_waits_for_its_async_acknowledgement),
	T(a_channel_survives_losing_its_semaphore_mode))
