/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * crowd - a process with many threads that poll, QPs in every state, and children, to be moved.
 *
 * Each thread exchanges messages on a connection of its own within the process and compares each byte.
 * Children are born and end all the time; one stays, with copies of everything. Six QPs stand in as many
 * states. When a file exists all end; status 0 if each message was right and each QP is in its state.
 */
#include "../verbs/c/tv.h"

#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MAX_THREADS 256
#define LEN 20000u

static struct ibv_context *ctx;
static _Atomic bool stop;
static _Atomic unsigned long messages;

static struct ibv_wc polled(struct ibv_cq *cq)
{
	struct ibv_wc wc;
	int n;

	while (!(n = ibv_poll_cq(cq, 1, &wc)))
		;
	CHECK_EQ(n, 1);
	CHECK_EQ(wc.status, IBV_WC_SUCCESS);
	return wc;
}

static void *exchange(void *arg)
{
	const struct tv_opt opt = {.timeout = 18};
	unsigned seed = (unsigned)(uintptr_t)arg;
	struct tv_end a, b;

	tv_end_open(&a, ctx, &opt);
	tv_end_open(&b, ctx, &opt);
	tv_connect(a.qp, b.qp, &opt);
	while (!atomic_load(&stop)) {
		struct ibv_send_wr wr;
		struct ibv_sge sge;

		CHECK_EQ(tv_recv(&b, ++seed, 0, LEN), 0);
		tv_fill(a.buf, LEN, seed);
		wr = tv_wr(&a, IBV_WR_SEND, seed, &sge, 0, LEN);
		CHECK_EQ(tv_post(&a, &wr), 0);
		CHECK_EQ(polled(b.rcq).wr_id, seed);
		CHECK(tv_filled(b.buf, LEN, seed));
		CHECK_EQ(polled(a.scq).wr_id, seed);
		atomic_fetch_add(&messages, 1);
	}
	tv_end_close(&a);
	tv_end_close(&b);
	return NULL;
}

static const enum ibv_qp_state states[] = {IBV_QPS_RESET, IBV_QPS_INIT, IBV_QPS_RTR,
					   IBV_QPS_RTS,	  IBV_QPS_SQD,	IBV_QPS_ERR};
#define N_STATES (sizeof(states) / sizeof(states[0]))

/* A QP in a state; its peer is itself, and nothing is ever sent. */
static void bring_to(struct tv_end *e, enum ibv_qp_state state)
{
	const struct tv_opt opt = {0};
	struct ibv_qp_attr attr = {.qp_state = state};

	tv_end_open(e, ctx, &opt);
	if (state != IBV_QPS_RESET)
		tv_to_init(e->qp, &opt);
	if (state > IBV_QPS_INIT)
		CHECK_EQ(tv_to_rtr(e->qp, e->qp->qp_num, &opt), 0);
	if (state > IBV_QPS_RTR)
		CHECK_EQ(tv_to_rts(e->qp, &opt), 0);
	if (state > IBV_QPS_RTS)
		CHECK_EQ(ibv_modify_qp(e->qp, &attr, IBV_QP_STATE), 0);
}

static void still_in(struct tv_end *e, enum ibv_qp_state state)
{
	struct ibv_qp_init_attr init;
	struct ibv_qp_attr attr;

	CHECK_EQ(ibv_query_qp(e->qp, &attr, IBV_QP_STATE, &init), 0);
	CHECK_EQ(attr.qp_state, state);
	CHECK_EQ(attr.qp_access_flags != 0, state != IBV_QPS_RESET);
	tv_end_close(e);
}

/* A child that is there for a moment: nothing of it may be seen. */
static void bear(void)
{
	const struct timespec moment = {.tv_nsec = 20000000};
	int status;
	pid_t pid = fork();

	CHECK(pid >= 0);
	if (!pid) {
		nanosleep(&moment, NULL);
		exit(0);
	}
	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK_EQ(status, 0);
}

int main(int argc, char **argv)
{
	struct tv_end standing[N_STATES];
	pthread_t thread[MAX_THREADS];
	unsigned long n;
	pid_t holder;

	if (argc != 3 || (n = strtoul(argv[1], NULL, 10)) == 0 || n > MAX_THREADS) {
		fputs("usage: crowd THREADS STOP-FILE\n", stderr);
		return 2;
	}
	ctx = tv_open();
	for (unsigned i = 0; i < N_STATES; i++)
		bring_to(&standing[i], states[i]);
	for (unsigned long i = 0; i < n; i++)
		CHECK_EQ(pthread_create(&thread[i], NULL, exchange, (void *)(i << 16)), 0);
	holder = fork();
	CHECK(holder >= 0);
	while (!holder)
		pause();
	while (access(argv[2], F_OK))
		bear();
	atomic_store(&stop, true);
	for (unsigned long i = 0; i < n; i++)
		pthread_join(thread[i], NULL);
	for (unsigned i = 0; i < N_STATES; i++)
		still_in(&standing[i], states[i]);
	kill(holder, SIGKILL);
	waitpid(holder, NULL, 0);
	CHECK_EQ(ibv_close_device(ctx), 0);
	printf("%lu messages\n", messages);
	return 0;
}
