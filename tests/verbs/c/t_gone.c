/* SPDX-License-Identifier: BSD-3-Clause */
/* Memory that goes while it is registered: an error for who uses it, never a crash. */
#include "tv.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define LEN 65536u

#define RIGHTS \
	(IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_ATOMIC)

static struct tv_end a, b;

struct area {
	uint8_t *at;
	struct ibv_mr *mr;
	int fd;
};

/* How the second half of an area goes. */
static enum { UNMAPPED, MOVED, PROTECTED, CUT_OFF } way;

static struct area area(struct tv_end *e)
{
	int fd = -1, flags = MAP_PRIVATE | MAP_ANONYMOUS;
	struct area x;

	if (way == CUT_OFF) { /* a file that gets shorter: SIGBUS */
		fd = memfd_create("area", MFD_CLOEXEC);
		flags = MAP_SHARED;
		CHECK(fd >= 0);
		CHECK_EQ(ftruncate(fd, LEN), 0);
	}
	x.fd = fd;
	x.at = mmap(NULL, LEN, PROT_READ | PROT_WRITE, flags, fd, 0);
	CHECK(x.at != MAP_FAILED);
	CHECK(x.mr = ibv_reg_mr(e->pd, x.at, LEN, RIGHTS));
	return x;
}

static void *lose_half(const struct area *x)
{
	uint8_t *half = x->at + LEN / 2;
	void *moved = NULL;

	switch (way) {
	case UNMAPPED: CHECK_EQ(munmap(half, LEN / 2), 0); break;
	case MOVED:
		moved = mremap(half, LEN / 2, LEN, MREMAP_MAYMOVE);
		CHECK(moved != MAP_FAILED && moved != half);
		break;
	case PROTECTED: CHECK_EQ(mprotect(half, LEN / 2, PROT_NONE), 0); break;
	case CUT_OFF:
		CHECK_EQ(ftruncate(x->fd, LEN / 2), 0);
		close(x->fd);
		break;
	}
	return moved;
}

static enum ibv_qp_state state(struct ibv_qp *qp)
{
	struct ibv_qp_init_attr init;
	struct ibv_qp_attr attr;

	CHECK_EQ(ibv_query_qp(qp, &attr, IBV_QP_STATE, &init), 0);
	return attr.qp_state;
}

/* A request of `a` that uses `len` bytes of b's area, which has gone; and one that is flushed. */
static void remote(enum ibv_wr_opcode op, uint32_t len)
{
	struct ibv_send_wr wr, *bad;
	struct ibv_async_event event;
	struct ibv_sge sge;
	struct area gone;
	struct ibv_wc wc;
	void *moved;

	tv_pair(&a, &b, &(struct tv_opt){.access = RIGHTS});
	gone = area(&b);
	moved = lose_half(&gone);
	wr = tv_wr(&a, op, 1, &sge, 0, len);
	wr.wr.rdma.remote_addr = (uintptr_t)gone.at + LEN / 2;
	wr.wr.rdma.rkey = gone.mr->rkey;
	if (op == IBV_WR_ATOMIC_FETCH_AND_ADD) {
		wr.wr.atomic.remote_addr = (uintptr_t)gone.at + LEN / 2;
		wr.wr.atomic.rkey = gone.mr->rkey;
		wr.wr.atomic.compare_add = 1;
	}
	CHECK_EQ(ibv_post_send(a.qp, &wr, &bad), 0);
	wc = tv_wait(a.scq);
	CHECK_EQ(wc.status, IBV_WC_REM_ACCESS_ERR);
	CHECK_EQ(state(a.qp), IBV_QPS_ERR);
	CHECK_EQ(state(b.qp), IBV_QPS_ERR);
	do { /* after COMM_EST */
		CHECK_EQ(ibv_get_async_event(b.ctx, &event), 0);
		ibv_ack_async_event(&event);
	} while (event.event_type == IBV_EVENT_COMM_EST);
	CHECK_EQ(event.event_type, IBV_EVENT_QP_ACCESS_ERR);
	CHECK_EQ(ibv_dereg_mr(gone.mr), 0);
	munmap(gone.at, LEN);
	if (moved)
		munmap(moved, LEN);
	tv_pair_close(&a, &b);
}

static void a_write_to_it_is_an_access_error(void)
{
	remote(IBV_WR_RDMA_WRITE, 64);
	remote(IBV_WR_RDMA_WRITE, 20000);
}

static void a_read_of_it_is_an_access_error(void)
{
	remote(IBV_WR_RDMA_READ, 64);
	remote(IBV_WR_RDMA_READ, 20000);
}

static void an_atomic_on_it_is_an_access_error(void)
{
	remote(IBV_WR_ATOMIC_FETCH_AND_ADD, 8);
}

static void memory_that_was_moved_protected_or_cut_off_is_an_access_error(void)
{
	for (way = MOVED; way <= CUT_OFF; way++) {
		remote(IBV_WR_RDMA_WRITE, 20000);
		remote(IBV_WR_RDMA_READ, 64);
		remote(IBV_WR_ATOMIC_FETCH_AND_ADD, 8);
	}
	way = UNMAPPED;
}

/* A request of `a` whose own memory has gone, behind one that has not. */
static void local(enum ibv_wr_opcode op, uint32_t len)
{
	struct ibv_send_wr first, wr, *bad;
	struct ibv_sge ok, sge;
	struct area gone;
	struct ibv_wc wc;

	tv_pair(&a, &b, &(struct tv_opt){0});
	gone = area(&a);
	CHECK_EQ(munmap(gone.at + LEN / 2, LEN / 2), 0);
	first = tv_wr(&a, IBV_WR_RDMA_WRITE, 1, &ok, 0, 5000);
	wr = tv_wr(&a, op, 2, &sge, 0, len);
	first.wr.rdma.remote_addr = wr.wr.rdma.remote_addr = (uintptr_t)b.buf;
	first.wr.rdma.rkey = wr.wr.rdma.rkey = b.mr->rkey;
	first.next = &wr;
	/* It begins where there is still memory, and ends where there is none. */
	sge = (struct ibv_sge){
		.addr = (uintptr_t)gone.at + LEN / 2 - len / 2, .length = len, .lkey = gone.mr->lkey};
	CHECK_EQ(ibv_post_send(a.qp, &first, &bad), 0);
	tv_wait_ok(a.scq, 1);
	wc = tv_wait(a.scq);
	CHECK_EQ(wc.wr_id, 2);
	CHECK_EQ(wc.status, IBV_WC_LOC_PROT_ERR);
	CHECK_EQ(state(a.qp), IBV_QPS_ERR);
	CHECK_EQ(ibv_dereg_mr(gone.mr), 0);
	munmap(gone.at, LEN / 2);
	tv_pair_close(&a, &b);
}

static void sending_it_is_a_protection_error(void)
{
	local(IBV_WR_RDMA_WRITE, 64);
	local(IBV_WR_RDMA_WRITE, 20000);
}

static void reading_into_it_is_a_protection_error(void)
{
	local(IBV_WR_RDMA_READ, 64);
	local(IBV_WR_RDMA_READ, 20000);
}

static void receiving_into_it_is_a_protection_error(void)
{
	struct ibv_send_wr wr;
	struct ibv_recv_wr recv, *bad;
	struct ibv_sge sge, to;
	struct area gone;
	struct ibv_wc wc;

	tv_pair(&a, &b, &(struct tv_opt){0});
	gone = area(&b);
	CHECK_EQ(munmap(gone.at, LEN), 0);
	to = (struct ibv_sge){.addr = (uintptr_t)gone.at, .length = 4096, .lkey = gone.mr->lkey};
	recv = (struct ibv_recv_wr){.wr_id = 7, .sg_list = &to, .num_sge = 1};
	CHECK_EQ(ibv_post_recv(b.qp, &recv, &bad), 0);
	wr = tv_wr(&a, IBV_WR_SEND, 1, &sge, 0, 3000);
	CHECK_EQ(tv_post(&a, &wr), 0);
	wc = tv_wait(a.scq);
	CHECK_EQ(wc.status, IBV_WC_REM_OP_ERR);
	wc = tv_wait(b.rcq);
	CHECK_EQ(wc.wr_id, 7);
	CHECK_EQ(wc.status, IBV_WC_LOC_PROT_ERR);
	CHECK_EQ(ibv_dereg_mr(gone.mr), 0);
	tv_pair_close(&a, &b);
}

/* The program's own faults are its own. */
static sigjmp_buf back;
static void *volatile fault_at;
static int handled;

static void on_segv(int sig, siginfo_t *info, void *context)
{
	sigset_t mask;

	(void)context;
	handled++;
	CHECK_EQ(sig, SIGSEGV);
	CHECK(info->si_addr == fault_at);
	CHECK_EQ(pthread_sigmask(SIG_BLOCK, NULL, &mask), 0);
	CHECK(sigismember(&mask, SIGSEGV) && sigismember(&mask, SIGUSR1));
	siglongjmp(back, 1);
}

static void a_programs_own_handler_gets_its_own_faults(void)
{
	struct sigaction mine = {.sa_flags = SA_SIGINFO};

	mine.sa_sigaction = on_segv;
	sigemptyset(&mine.sa_mask);
	sigaddset(&mine.sa_mask, SIGUSR1);
	CHECK_EQ(sigaction(SIGSEGV, &mine, NULL), 0);
	remote(IBV_WR_RDMA_WRITE, 20000);
	CHECK_EQ(handled, 0);
	fault_at = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (!sigsetjmp(back, 1))
		*(volatile char *)fault_at = 1;
	CHECK_EQ(handled, 1);
	remote(IBV_WR_RDMA_WRITE, 20000);
	CHECK_EQ(handled, 1);
}

static void a_program_without_a_handler_dies_of_its_faults(void)
{
	int status;
	pid_t pid;

	signal(SIGSEGV, SIG_DFL);
	signal(SIGBUS, SIG_DFL);
	fault_at = mmap(NULL, 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK_EQ(ibv_close_device(tv_open()), 0);
	for (int how = 0; how < 3; how++) {
		pid = fork();
		if (!pid) {
			if (how == 0)
				*(volatile char *)fault_at = 1;
			raise(how == 1 ? SIGSEGV : SIGBUS);
			_exit(0);
		}
		CHECK_EQ(waitpid(pid, &status, 0), pid);
		CHECK(WIFSIGNALED(status));
		CHECK_EQ(WTERMSIG(status), how == 2 ? SIGBUS : SIGSEGV);
	}
}

TV_MAIN(T(a_write_to_it_is_an_access_error), T(a_read_of_it_is_an_access_error),
	T(an_atomic_on_it_is_an_access_error),
	T(memory_that_was_moved_protected_or_cut_off_is_an_access_error), T(sending_it_is_a_protection_error),
	T(reading_into_it_is_a_protection_error), T(receiving_into_it_is_a_protection_error),
	T(a_programs_own_handler_gets_its_own_faults), T(a_program_without_a_handler_dies_of_its_faults))
