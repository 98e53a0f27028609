/* SPDX-License-Identifier: BSD-3-Clause */
/* Children: whatever one does with its copies, its parent's connections go on as if there were none. */
#include "tv.h"

#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#define LEN 65536u

static struct tv_end a, b;

/* A message, each byte compared. */
static void exchange(struct tv_end *from, struct tv_end *to, unsigned seed)
{
	struct ibv_send_wr wr;
	struct ibv_sge sge;

	CHECK_EQ(tv_recv(to, seed, 0, LEN), 0);
	tv_fill(from->buf, LEN, seed);
	wr = tv_wr(from, IBV_WR_SEND, seed, &sge, 0, LEN);
	CHECK_EQ(tv_post(from, &wr), 0);
	tv_wait_ok(from->scq, seed);
	tv_wait_ok(to->rcq, seed);
	CHECK(tv_filled(to->buf, LEN, seed));
}

static void both_ways(unsigned seed)
{
	exchange(&a, &b, seed);
	exchange(&b, &a, seed + 1);
}

static void ended_well(pid_t pid)
{
	int status;

	CHECK_EQ(waitpid(pid, &status, 0), pid);
	CHECK(WIFEXITED(status));
	CHECK_EQ(WEXITSTATUS(status), 0);
}

static void start(void)
{
	CHECK_EQ(ibv_fork_init(), 0);
	tv_pair(&a, &b, &(struct tv_opt){.channel = true});
	both_ways(1);
}

static void a_child_that_exits(void)
{
	pid_t pid;

	start();
	for (unsigned i = 0; i < 5; i++) {
		fflush(NULL);
		pid = fork();
		if (!pid)
			exit(0); /* with all that is done at a process's end */
		both_ways(10 + i);
		ended_well(pid);
		both_ways(20 + i);
	}
	tv_pair_close(&a, &b);
}

static void a_child_that_takes_its_copies_down(void)
{
	pid_t pid;

	start();
	pid = fork();
	if (!pid) {
		tv_pair_close(&a, &b);
		exit(0);
	}
	both_ways(10);
	ended_well(pid);
	both_ways(20);
	tv_pair_close(&a, &b);
}

/* Nothing of what a child asks of its copies leaves it. */
static void a_child_that_uses_its_copies(void)
{
	struct ibv_qp_attr attr = {.qp_state = IBV_QPS_ERR};
	struct ibv_send_wr wr;
	struct ibv_sge sge;
	struct ibv_wc wc;
	pid_t pid;

	start();
	CHECK_EQ(tv_recv(&b, 77, 0, LEN), 0);
	memset(b.buf, 0x5a, LEN);
	pid = fork();
	if (!pid) {
		wr = tv_wr(&a, IBV_WR_SEND, 5, &sge, 0, LEN);
		(void)tv_post(&a, &wr);
		(void)tv_recv(&a, 6, 0, LEN);
		(void)ibv_req_notify_cq(a.scq, 0);
		for (int i = 0; i < 100000; i++) /* as often as it likes: nothing ever came of it */
			CHECK(ibv_poll_cq(b.rcq, 1, &wc) <= 0);
		(void)ibv_modify_qp(b.qp, &attr, IBV_QP_STATE);
		_exit(0);
	}
	ended_well(pid);
	CHECK_EQ(ibv_poll_cq(b.rcq, 1, &wc), 0);
	for (unsigned i = 0; i < LEN; i++)
		CHECK_EQ(b.buf[i], 0x5a);
	tv_fill(a.buf, LEN, 9);
	wr = tv_wr(&a, IBV_WR_SEND, 7, &sge, 0, LEN);
	CHECK_EQ(tv_post(&a, &wr), 0);
	tv_wait_ok(a.scq, 7);
	tv_wait_ok(b.rcq, 77);
	CHECK(tv_filled(b.buf, LEN, 9));
	both_ways(20);
	tv_pair_close(&a, &b);
}

/* As programs do that call ibv_fork_init: the child has no such memory. */
static void memory_that_children_do_not_get(void)
{
	struct ibv_send_wr wr;
	struct ibv_sge sge;
	struct ibv_mr *mr;
	uint8_t *area;
	pid_t pid;

	start();
	area = mmap(NULL, LEN, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	CHECK(area != MAP_FAILED);
	CHECK_EQ(madvise(area, LEN, MADV_DONTFORK), 0);
	CHECK(mr = ibv_reg_mr(b.pd, area, LEN,
			      IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ));
	pid = fork();
	if (!pid) {
		CHECK(mincore(area, LEN, (unsigned char[LEN / 4096]){0}) == -1 && errno == ENOMEM);
		CHECK_EQ(ibv_dereg_mr(mr), 0);
		tv_pair_close(&a, &b);
		exit(0);
	}
	for (int round = 0; round < 2; round++) {
		tv_fill(a.buf, LEN, 30);
		wr = tv_wr(&a, IBV_WR_RDMA_WRITE, 3, &sge, 0, LEN);
		wr.wr.rdma.remote_addr = (uintptr_t)area;
		wr.wr.rdma.rkey = mr->rkey;
		CHECK_EQ(tv_post(&a, &wr), 0);
		tv_wait_ok(a.scq, 3);
		CHECK(tv_filled(area, LEN, 30));
		if (!round)
			ended_well(pid);
	}
	CHECK_EQ(ibv_dereg_mr(mr), 0);
	munmap(area, LEN);
	tv_pair_close(&a, &b);
}

/* In a child of a child, too; the parent's goes on meanwhile. */
static void children_that_open_the_device_anew(void)
{
	struct tv_end c, d;
	pid_t pid, grandchild;

	start();
	pid = fork();
	if (!pid) {
		setenv("MIGROCE_ADDR", "127.0.0.2", 1);
		tv_pair(&c, &d, &(struct tv_opt){0});
		exchange(&c, &d, 40);
		fflush(NULL);
		grandchild = fork();
		if (!grandchild) {
			setenv("MIGROCE_ADDR", "127.0.0.3", 1);
			tv_pair(&a, &b, &(struct tv_opt){0});
			both_ways(50);
			tv_pair_close(&a, &b);
			exit(0);
		}
		exchange(&d, &c, 60);
		ended_well(grandchild);
		exchange(&c, &d, 70);
		tv_pair_close(&c, &d);
		exit(0);
	}
	both_ways(80);
	ended_well(pid);
	both_ways(90);
	tv_pair_close(&a, &b);
}

/* A program started by it gets no descriptor of the device's, and may open it. */
static void a_child_that_becomes_another_program(void)
{
	const char *list = "for f in /proc/self/fd/*; do readlink $f; done | grep -E "
			   "'socket:|anon_inode|memfd' && exit 1;"
			   "exec ibv_devinfo -d rxe0 >/dev/null";
	pid_t pid;

	start();
	pid = fork();
	if (!pid) {
		setenv("MIGROCE_ADDR", "127.0.0.2", 1);
		execlp("sh", "sh", "-c", list, (char *)NULL);
		_exit(127);
	}
	both_ways(10);
	ended_well(pid);
	CHECK_EQ(system("exit 0"), 0);
	both_ways(20);
	tv_pair_close(&a, &b);
}

TV_MAIN(T(a_child_that_exits), T(a_child_that_takes_its_copies_down), T(a_child_that_uses_its_copies),
	T(memory_that_children_do_not_get), T(children_that_open_the_device_anew),
	T(a_child_that_becomes_another_program))
