// SPDX-License-Identifier: BSD-3-Clause
/*
 * opcheck - every operation of RC, XRC, UC and UD, in one packet and in three, once; each checked at both ends.
 *
 *	opcheck               server
 *	opcheck SERVER-IP     client
 *
 * Both ends do the same to each other, step by step. So every opcode there is goes over the wire, both ways.
 */
#include "keepcheck.h"

#include <endian.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define PORT "7475"
#define PATIENCE_NS (60 * 1000000000ll)
#define SHORT 5u /* padded */
#define LONG 2503u
#define IMM 0x1234abcdu
#define RECEIVED 0u    /* offset of where messages come to */
#define FROM 0x4000u   /* ...of where they and WRITEs come from */
#define TARGET 0x8000u /* ...of where the peer's WRITEs and atomics go */
#define SOURCE 0xc000u /* ...of what the peer READs */
#define BACK 0x10000u  /* ...of what READs and atomics bring */

/* wr_flush is the slot behind the last one that the oldest header knows. */
typedef void (*flush_fn)(struct ibv_qp_ex *, uint32_t, uint64_t, size_t, uint8_t, uint8_t);

static struct keep my = {.memory = "private"};
static struct ibv_mw *mw;
static int tcp;
static uint64_t number; /* of the operation */

static struct ibv_wc reap(struct ibv_cq *cq)
{
	int64_t until = now_ns() + PATIENCE_NS;
	struct ibv_wc wc;
	int n;

	while (!(n = ibv_poll_cq(cq, 1, &wc)) && now_ns() < until)
		usleep(100);
	if (n != 1 || wc.status)
		broken("operation %llu: %s", (unsigned long long)number,
		       n == 1 ? ibv_wc_status_str(wc.status) : "no completion");
	return wc;
}

static struct ibv_sge at(uint32_t offset, uint32_t length)
{
	return (struct ibv_sge){(uintptr_t)my.buf + offset, length, my.mr->lkey};
}

static void is_there(uint32_t offset, uint32_t length, uint64_t what)
{
	int64_t until = now_ns() + PATIENCE_NS; /* UC's WRITEs say nothing when they have come */

	while (!filled(my.buf + offset, length, what))
		if (now_ns() > until)
			broken("operation %llu: other data", (unsigned long long)number);
}

static void receive(int q, uint32_t room)
{
	struct ibv_sge sge = at(RECEIVED, room);
	struct ibv_recv_wr wr = {.sg_list = &sge, .num_sge = 1}, *bad;

	errno = q == Q_XSEND ? ibv_post_srq_recv(my.xsrq, &wr, &bad) : ibv_post_recv(my.qp[q], &wr, &bad);
	if (errno)
		die("a receive request of QP %d", q);
}

static void post(int q, struct ibv_send_wr *wr)
{
	struct ibv_send_wr *bad;

	wr->send_flags = IBV_SEND_SIGNALED;
	if (q == Q_XSEND)
		wr->qp_type.xrc.remote_srqn = my.theirs.xsrqn;
	if ((errno = ibv_post_send(my.qp[q], wr, &bad)))
		die("operation %llu", (unsigned long long)number);
}

/* A window over the target; its key, told to the peer, whose one is returned. */
static uint32_t bind_window(void)
{
	struct ibv_send_wr wr = {.opcode = IBV_WR_BIND_MW};
	uint32_t theirs, key = ibv_inc_rkey(mw->rkey);

	wr.bind_mw.mw = mw;
	wr.bind_mw.rkey = key;
	wr.bind_mw.bind_info =
		(struct ibv_mw_bind_info){my.mr, (uintptr_t)my.buf + TARGET, LONG, IBV_ACCESS_REMOTE_WRITE};
	post(Q_WINDOW, &wr);
	reap(my.cq);
	tcp_write(tcp, &key, 4);
	tcp_read(tcp, &theirs, 4);
	return theirs;
}

/* A SEND or WRITE of `length` bytes. */
static void transfer(int q, enum ibv_wr_opcode opcode, uint32_t length)
{
	bool write = opcode == IBV_WR_RDMA_WRITE || opcode == IBV_WR_RDMA_WRITE_WITH_IMM;
	bool imm = opcode == IBV_WR_SEND_WITH_IMM || opcode == IBV_WR_RDMA_WRITE_WITH_IMM;
	bool invalidate = opcode == IBV_WR_SEND_WITH_INV, told = opcode != IBV_WR_RDMA_WRITE;
	uint32_t head = q == Q_UD ? GRH : 0;
	struct ibv_sge from = at(FROM, length);
	struct ibv_send_wr wr = {.opcode = opcode, .sg_list = &from, .num_sge = 1};
	struct ibv_wc wc;

	number++;
	fill(my.buf + FROM, length, number);
	if (told)
		receive(q, head + (write ? 0 : length));
	if (invalidate)
		wr.invalidate_rkey = bind_window();
	if (imm)
		wr.imm_data = htobe32(IMM);
	if (write) {
		wr.wr.rdma.remote_addr = my.theirs.addr + TARGET;
		wr.wr.rdma.rkey = my.theirs.rkey;
	}
	if (q == Q_UD) {
		wr.wr.ud.ah = my.ah;
		wr.wr.ud.remote_qpn = my.theirs.qpn[Q_UD];
		wr.wr.ud.remote_qkey = QKEY;
	}
	keep_meet(tcp, 'p');
	post(q, &wr);
	reap(my.cq);
	if (told) {
		wc = reap(q == Q_XSEND ? my.xrc_cq : my.recv_cq);
		if (wc.byte_len != head + length || !(wc.wc_flags & IBV_WC_WITH_IMM) != !imm ||
		    (imm && wc.imm_data != htobe32(IMM)) || !(wc.wc_flags & IBV_WC_WITH_INV) != !invalidate)
			broken("operation %llu: %u bytes, flags %#x", (unsigned long long)number, wc.byte_len,
			       wc.wc_flags);
	}
	is_there(write ? TARGET : RECEIVED + head, length, number);
	keep_meet(tcp, 't');
}

static void read_back(int q, uint32_t length)
{
	struct ibv_sge to = at(BACK, length);
	struct ibv_send_wr wr = {.opcode = IBV_WR_RDMA_READ, .sg_list = &to, .num_sge = 1};

	number++;
	fill(my.buf + SOURCE, length, number);
	wr.wr.rdma.remote_addr = my.theirs.addr + SOURCE;
	wr.wr.rdma.rkey = my.theirs.rkey;
	keep_meet(tcp, 'p');
	post(q, &wr);
	reap(my.cq);
	is_there(BACK, length, number);
	keep_meet(tcp, 'r');
}

static void word_is(uint32_t offset, uint64_t wanted)
{
	uint64_t found;

	memcpy(&found, my.buf + offset, 8);
	if (found != wanted)
		broken("operation %llu: %llu", (unsigned long long)number, (unsigned long long)found);
}

static void atomic(int q, enum ibv_wr_opcode opcode)
{
	struct ibv_sge to = at(BACK, 8);
	struct ibv_send_wr wr = {.opcode = opcode, .sg_list = &to, .num_sge = 1};
	bool swap = opcode == IBV_WR_ATOMIC_CMP_AND_SWP;
	uint64_t before = ++number;

	memcpy(my.buf + TARGET, &before, 8);
	keep_meet(tcp, 'p');
	wr.wr.atomic.remote_addr = my.theirs.addr + TARGET;
	wr.wr.atomic.rkey = my.theirs.rkey;
	wr.wr.atomic.compare_add = swap ? before : 1000;
	wr.wr.atomic.swap = before + 1000;
	post(q, &wr);
	reap(my.cq);
	word_is(BACK, before);
	keep_meet(tcp, 'a');
	word_is(TARGET, before + 1000);
}

/* ATOMIC WRITE and FLUSH, which only the extended interface has. */
static void placed(int q)
{
	struct ibv_qp_ex *ex = ibv_qp_to_qp_ex(my.qp[q]);
	flush_fn *flush = (flush_fn *)(void *)((char *)ex + offsetof(struct ibv_qp_ex, wr_atomic_write) +
					       sizeof(flush_fn));
	struct ibv_cq *cq = my.qp[q]->send_cq;

	number++;
	memset(my.buf + TARGET, 0, 8);
	keep_meet(tcp, 'p');
	ibv_wr_start(ex);
	ex->wr_flags = IBV_SEND_SIGNALED;
	ibv_wr_atomic_write(ex, my.theirs.rkey, my.theirs.addr + TARGET, &number);
	if (q == Q_XSEND)
		ibv_wr_set_xrc_srqn(ex, my.theirs.xsrqn);
	(*flush)(ex, my.theirs.rkey, my.theirs.addr + TARGET, 8, 1, 0);
	if (q == Q_XSEND)
		ibv_wr_set_xrc_srqn(ex, my.theirs.xsrqn);
	if ((errno = ibv_wr_complete(ex)))
		die("ATOMIC WRITE and FLUSH");
	reap(cq);
	reap(cq);
	keep_meet(tcp, 'f');
	word_is(TARGET, number);
}

static void all_of(int q, uint32_t length)
{
	transfer(q, IBV_WR_SEND, length);
	transfer(q, IBV_WR_SEND_WITH_IMM, length);
	if (q == Q_UD)
		return;
	transfer(q, IBV_WR_RDMA_WRITE, length);
	transfer(q, IBV_WR_RDMA_WRITE_WITH_IMM, length);
	if (q == Q_UC)
		return;
	read_back(q, length);
	atomic(q, IBV_WR_ATOMIC_FETCH_AND_ADD);
	atomic(q, IBV_WR_ATOMIC_CMP_AND_SWP);
	if (q == Q_WINDOW)
		transfer(q, IBV_WR_SEND_WITH_INV, length);
}

int main(int argc, char **argv)
{
	static const int services[] = {Q_WINDOW, Q_XSEND, Q_UC, Q_UD};

	tcp = argc > 1 ? tcp_connect(argv[1], PORT, 20) : tcp_accept(PORT);
	make(&my);
	tcp_write(tcp, &my.mine, sizeof(my.mine));
	tcp_read(tcp, &my.theirs, sizeof(my.theirs));
	for (int q = 0; q < QPS; q++)
		connect_qp(&my, q);
	mw = need(ibv_alloc_mw(my.pd, IBV_MW_TYPE_2), "a window");
	keep_meet(tcp, 'c');
	for (unsigned i = 0; i < sizeof(services) / sizeof(services[0]); i++) {
		all_of(services[i], SHORT);
		if (services[i] != Q_UD)
			all_of(services[i], LONG);
	}
	placed(Q_LOAD);
	placed(Q_XSEND);
	keep_meet(tcp, 'e');
	return 0;
}
