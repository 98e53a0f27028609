// SPDX-License-Identifier: BSD-3-Clause
/*
 * keepcheck - everything a verbs program may have pending, left pending until the program is let go on.
 *
 *	keepcheck --hold DIR --memory KIND             server
 *	keepcheck --hold DIR --memory KIND SERVER-IP   client
 *
 * Both ends do the same to each other. They write the name of each step they have come to into DIR/at and
 * go on when there is a file DIR/go-STEP; in between (a move, one hopes) nothing may change:
 *
 *	pending   completions and events that nobody has fetched, an SRQ with its limit armed, sends that
 *	          find no receive, an overflowed CQ, windows bound, address handles made
 *	used      all of it fetched and used, windows bound anew, the old keys dead
 *	done
 *
 * keepload.c keeps atomics, READs, WRITEs and FLUSHes in flight all the while.
 */
#include "keepcheck.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define PORT "7474"
#define PATIENCE_NS (60 * 1000000000ll)

/* Slots of receives (RECV_AT); what is sent there comes from the same slots of the peer (SEND_AT). */
enum {
	S_SRQ,
	S_CHANNEL = S_SRQ + DEPTH,
	S_RNR = S_CHANNEL + 2,
	S_XRC = S_RNR + 2,
	S_UC = S_XRC + 4,
	S_UD,
	S_INV,
	SLOTS
};

static struct keep my;
static struct ibv_mw *mw[2];
static const char *hold;
static int tcp;

static void step(const char *name)
{
	char path[256], temporary[256];
	FILE *f;

	snprintf(path, sizeof(path), "%s/at", hold);
	snprintf(temporary, sizeof(temporary), "%s/at~", hold);
	f = fopen(temporary, "w");
	if (!f)
		die("%s", temporary);
	fprintf(f, "%s\n", name);
	fclose(f);
	rename(temporary, path);
	snprintf(path, sizeof(path), "%s/go-%s", hold, name);
	while (access(path, F_OK))
		usleep(2000);
}

/* ---- verbs --------------------------------------------------------------------------------------- */

static struct ibv_sge slot(uint32_t area, unsigned n)
{
	return (struct ibv_sge){(uintptr_t)my.buf + area + n * SLOT, SLOT, my.mr->lkey};
}

static void post_recv(int q, unsigned n)
{
	struct ibv_sge sge = slot(RECV_AT, n);
	struct ibv_recv_wr wr = {.wr_id = n, .sg_list = &sge, .num_sge = 1}, *bad;

	if (q == Q_SRQ || q == Q_XRECV)
		errno = ibv_post_srq_recv(q == Q_SRQ ? my.srq : my.xsrq, &wr, &bad);
	else
		errno = ibv_post_recv(my.qp[q], &wr, &bad);
	if (errno)
		die("a receive request of QP %d", q);
}

static struct ibv_send_wr request(enum ibv_wr_opcode opcode, uint64_t wr_id, struct ibv_sge *sge)
{
	return (struct ibv_send_wr){.wr_id = wr_id,
				    .opcode = opcode,
				    .sg_list = sge,
				    .num_sge = 1,
				    .send_flags = IBV_SEND_SIGNALED};
}

static void post(int q, struct ibv_send_wr *wr)
{
	struct ibv_send_wr *bad;

	if ((errno = ibv_post_send(my.qp[q], wr, &bad)))
		die("a request of QP %d", q);
}

/* The message for the peer's receive slot `n`; datagrams leave room for the header. */
static void send_to(int q, unsigned n)
{
	struct ibv_sge sge = slot(SEND_AT, n);
	struct ibv_send_wr wr = request(IBV_WR_SEND, n, &sge);

	if (q == Q_UD) {
		sge.length -= GRH;
		wr.wr.ud.ah = my.ah;
		wr.wr.ud.remote_qpn = my.theirs.qpn[Q_UD];
		wr.wr.ud.remote_qkey = QKEY;
	}
	wr.qp_type.xrc.remote_srqn = q == Q_XSEND ? my.theirs.xsrqn : 0;
	fill(my.buf + SEND_AT + n * SLOT, sge.length, n);
	post(q, &wr);
}

static struct ibv_wc reap(struct ibv_cq *cq, const char *what)
{
	int64_t until = now_ns() + PATIENCE_NS;
	struct ibv_wc wc = {0};
	int n;

	while (!(n = ibv_poll_cq(cq, 1, &wc))) {
		if (now_ns() > until)
			broken("no completion: %s", what);
		usleep(100);
	}
	if (n < 0)
		broken("ibv_poll_cq: %s", what);
	return wc;
}

static void sent(uint64_t wr_id, enum ibv_wc_status status, const char *what)
{
	struct ibv_wc wc = reap(my.cq, what);

	if (wc.wr_id != wr_id || wc.status != status)
		broken("%s: %s of request %llu, not %s of %llu", what, ibv_wc_status_str(wc.status),
		       (unsigned long long)wc.wr_id, ibv_wc_status_str(status), (unsigned long long)wr_id);
}

static void arrived(const struct ibv_wc *wc, int q, unsigned n, const char *what)
{
	if (wc->status || wc->wr_id != n || wc->qp_num != my.qp[q]->qp_num || wc->byte_len != SLOT ||
	    !filled(my.buf + RECV_AT + n * SLOT, SLOT, n))
		broken("%s: not message %u: %s, request %llu, %u bytes", what, n,
		       ibv_wc_status_str(wc->status), (unsigned long long)wc->wr_id, wc->byte_len);
}

/* ---- windows ------------------------------------------------------------------------------------- */

/* Bind window `i` (0: type 1, 1: type 2) to its slot; its key, told to the peer, whose one is returned. */
static uint32_t bind_window(int i)
{
	struct ibv_mw_bind_info info = {my.mr, (uintptr_t)my.buf + WINDOW_AT + (unsigned)i * SLOT, SLOT,
					REMOTE};
	struct ibv_mw_bind one = {.wr_id = 70, .send_flags = IBV_SEND_SIGNALED, .bind_info = info};
	struct ibv_send_wr two = {.wr_id = 70, .opcode = IBV_WR_BIND_MW, .send_flags = IBV_SEND_SIGNALED};
	uint32_t key, theirs;

	if (i == 0) {
		if ((errno = ibv_bind_mw(my.qp[Q_WINDOW], mw[i], &one)))
			die("ibv_bind_mw");
		key = mw[i]->rkey;
	} else {
		key = ibv_inc_rkey(mw[i]->rkey);
		two.bind_mw.mw = mw[i];
		two.bind_mw.rkey = key;
		two.bind_mw.bind_info = info;
		post(Q_WINDOW, &two);
	}
	sent(70, IBV_WC_SUCCESS, "binding a window");
	tcp_write(tcp, &key, 4);
	tcp_read(tcp, &theirs, 4);
	return theirs;
}

/* WRITE through the peer's window `i` and READ it back. */
static void through_window(int i, uint32_t key, uint64_t number)
{
	uint64_t at = my.theirs.addr + WINDOW_AT + (unsigned)i * SLOT;
	struct ibv_sge from = slot(SEND_AT, SLOTS), to = slot(RECV_AT, SLOTS);
	struct ibv_send_wr wr = request(IBV_WR_RDMA_WRITE, 71, &from),
			   rd = request(IBV_WR_RDMA_READ, 72, &to);

	wr.wr.rdma.remote_addr = rd.wr.rdma.remote_addr = at;
	wr.wr.rdma.rkey = rd.wr.rdma.rkey = key;
	fill(my.buf + SEND_AT + SLOTS * SLOT, SLOT, number);
	memset(my.buf + RECV_AT + SLOTS * SLOT, 0, SLOT);
	post(Q_WINDOW, &wr);
	post(Q_WINDOW, &rd);
	sent(71, IBV_WC_SUCCESS, "a WRITE through a window");
	sent(72, IBV_WC_SUCCESS, "a READ through a window");
	if (!filled(my.buf + RECV_AT + SLOTS * SLOT, SLOT, number))
		broken("a window shows other memory");
}

/* A dead key opens nothing: Q_DENIED breaks on it. */
static void refused(uint32_t key)
{
	struct ibv_sge from = slot(SEND_AT, SLOTS);
	struct ibv_send_wr wr = request(IBV_WR_RDMA_WRITE, 73, &from);

	wr.wr.rdma.remote_addr = my.theirs.addr + WINDOW_AT;
	wr.wr.rdma.rkey = key;
	post(Q_DENIED, &wr);
	sent(73, IBV_WC_REM_ACCESS_ERR, "a WRITE with the key of an earlier binding");
}

/* ---- the steps ----------------------------------------------------------------------------------- */

static void async(enum ibv_event_type type, const void *element)
{
	struct pollfd p = {.fd = my.ctx->async_fd, .events = POLLIN};
	struct ibv_async_event ev;

	if (poll(&p, 1, 60000) != 1 || ibv_get_async_event(my.ctx, &ev))
		broken("no asynchronous event, but %s", ibv_event_type_str(type));
	if (ev.event_type != type || (const void *)ev.element.qp != element)
		broken("%s, not %s", ibv_event_type_str(ev.event_type), ibv_event_type_str(type));
	ibv_ack_async_event(&ev);
}

static bool readable(int fd)
{
	struct pollfd p = {.fd = fd, .events = POLLIN};

	return poll(&p, 1, 0) == 1;
}

static void until_readable(int fd, const char *what)
{
	struct pollfd p = {.fd = fd, .events = POLLIN};

	if (poll(&p, 1, 60000) != 1)
		broken("%s", what);
}

static void leave_pending(void)
{
	struct ibv_srq_attr limit = {.srq_limit = LIMIT};
	struct ibv_sge sge = slot(SEND_AT, SLOTS);
	struct ibv_send_wr wr = request(IBV_WR_RDMA_WRITE, 60, &sge);

	for (unsigned i = 0; i < DEPTH; i++)
		post_recv(Q_SRQ, S_SRQ + i);
	for (unsigned i = 0; i < 4; i++)
		post_recv(Q_XRECV, S_XRC + i);
	for (unsigned i = 0; i < 2; i++)
		post_recv(Q_CHANNEL, S_CHANNEL + i);
	post_recv(Q_UC, S_UC);
	post_recv(Q_UD, S_UD);
	if (ibv_modify_srq(my.srq, &limit, IBV_SRQ_LIMIT) || ibv_req_notify_cq(my.channel_cq, 0))
		die("arming");
	keep_meet(tcp, 'p');
	/* As many as leave the limit just not reached; nobody fetches what comes. */
	for (unsigned i = 0; i < DEPTH - LIMIT; i++) {
		send_to(Q_SRQ, S_SRQ + i);
		sent(S_SRQ + i, IBV_WC_SUCCESS, "a message to the shared queue");
	}
	for (unsigned i = 0; i < 2; i++) {
		send_to(Q_XSEND, S_XRC + i);
		sent(S_XRC + i, IBV_WC_SUCCESS, "a message by XRC");
	}
	send_to(Q_CHANNEL, S_CHANNEL);
	sent(S_CHANNEL, IBV_WC_SUCCESS, "a message that is told");
	until_readable(my.channel->fd, "a completion is not told");
	if (readable(my.ctx->async_fd))
		broken("an asynchronous event, and nothing has happened");
	wr.wr.rdma.remote_addr = my.theirs.addr + WINDOW_AT;
	wr.wr.rdma.rkey = my.theirs.rkey;
	for (int i = 0; i <= my.over_cq->cqe; i++)
		post(Q_OVER, &wr);
	until_readable(my.ctx->async_fd, "an overflow is not told");
	/* Nothing to receive into before the peer goes on. */
	for (unsigned i = 0; i < 2; i++)
		send_to(Q_RNR, S_RNR + i);
	keep_meet(tcp, 'P');
}

/* UC and UD may lose: the same message until the peer has it. Only one receive is posted. */
static void unreliable(int q, unsigned n, const char *what)
{
	int64_t until = now_ns() + PATIENCE_NS;
	uint32_t head = q == Q_UD ? GRH : 0;
	bool have = false, told = false;
	char word = 'k';

	while (!have || !told) {
		struct ibv_wc wc;
		int got;

		if (now_ns() > until)
			broken("%s: nothing arrives", what);
		send_to(q, n);
		sent(n, IBV_WC_SUCCESS, what);
		usleep(5000);
		got = ibv_poll_cq(my.recv_cq, 1, &wc);
		if (got) {
			if (got < 0 || have || wc.status || wc.wr_id != n || wc.byte_len != SLOT ||
			    !filled(my.buf + RECV_AT + n * SLOT + head, SLOT - head, n))
				broken("%s: another message", what);
			have = true;
			tcp_write(tcp, &word, 1);
		}
		if (!told && tcp_readable(tcp)) {
			tcp_read(tcp, &word, 1);
			told = true;
		}
	}
}

static void use_what_is_pending(uint32_t key[2])
{
	struct ibv_cq *cq;
	struct ibv_wc wc;
	void *context;

	load_advance(50);
	/* Events first, in their order: they were there before. */
	if (!readable(my.ctx->async_fd) || !readable(my.channel->fd))
		broken("an event that nobody has fetched is lost");
	async(IBV_EVENT_CQ_ERR, my.over_cq);
	async(IBV_EVENT_QP_FATAL, my.qp[Q_OVER]);
	if (ibv_get_cq_event(my.channel, &cq, &context) || cq != my.channel_cq || context != &my.channel_cq)
		broken("another completion event");
	wc = reap(my.channel_cq, "told before");
	arrived(&wc, Q_CHANNEL, S_CHANNEL, "told before");
	if (ibv_req_notify_cq(my.channel_cq, 0))
		die("ibv_req_notify_cq");

	for (unsigned i = 0; i < DEPTH - LIMIT; i++) {
		wc = reap(my.srq_cq, "in the queue before");
		arrived(&wc, Q_SRQ, S_SRQ + i, "in the queue before");
	}
	for (unsigned i = 0; i < 2; i++) {
		wc = reap(my.xrc_cq, "by XRC before");
		arrived(&wc, Q_XRECV, S_XRC + i, "by XRC before");
	}
	if (readable(my.ctx->async_fd) || readable(my.channel->fd))
		broken("an event, and nothing has happened");
	for (unsigned i = 0; i < 2; i++)
		post_recv(Q_RNR, S_RNR + i);
	keep_meet(tcp, 'u');
	for (unsigned i = 0; i < 2; i++) {
		sent(S_RNR + i, IBV_WC_SUCCESS, "held back by RNR");
		wc = reap(my.recv_cq, "held back by RNR");
		arrived(&wc, Q_RNR, S_RNR + i, "held back by RNR");
	}
	keep_meet(tcp, 'R');

	send_to(Q_CHANNEL, S_CHANNEL + 1);
	sent(S_CHANNEL + 1, IBV_WC_SUCCESS, "a second message that is told");
	if (ibv_get_cq_event(my.channel, &cq, &context) || cq != my.channel_cq)
		broken("another completion event");
	ibv_ack_cq_events(my.channel_cq, 2);
	wc = reap(my.channel_cq, "told after");
	arrived(&wc, Q_CHANNEL, S_CHANNEL + 1, "told after");

	for (unsigned i = 2; i < 4; i++) {
		send_to(Q_XSEND, S_XRC + i);
		sent(S_XRC + i, IBV_WC_SUCCESS, "a message by XRC");
		wc = reap(my.xrc_cq, "by XRC after");
		arrived(&wc, Q_XRECV, S_XRC + i, "by XRC after");
	}
	/* The limit is armed still, and once. */
	for (unsigned i = DEPTH - LIMIT; i < DEPTH; i++) {
		send_to(Q_SRQ, S_SRQ + i);
		sent(S_SRQ + i, IBV_WC_SUCCESS, "a message to the shared queue");
		wc = reap(my.srq_cq, "by the shared queue after");
		arrived(&wc, Q_SRQ, S_SRQ + i, "by the shared queue after");
	}
	async(IBV_EVENT_SRQ_LIMIT_REACHED, my.srq);
	unreliable(Q_UC, S_UC, "UC");
	keep_meet(tcp, 'c');
	unreliable(Q_UD, S_UD, "UD");
	keep_meet(tcp, 'd');
	for (int i = 0; i < 2; i++)
		through_window(i, key[i], 200 + (unsigned)i);
	keep_meet(tcp, 'w');
}

static void end(const uint32_t key[2], uint32_t new_key)
{
	struct load_area *area = (struct load_area *)(my.buf + LOAD_AT);
	struct ibv_sge sge = slot(SEND_AT, S_INV);
	struct ibv_send_wr wr = request(IBV_WR_SEND_WITH_INV, S_INV, &sge);
	uint64_t rounds, theirs;
	struct ibv_wc wc;

	load_advance(50);
	through_window(0, new_key, 300);
	through_window(1, key[1], 301);
	refused(key[0]);
	post_recv(Q_WINDOW, S_INV);
	keep_meet(tcp, 'i');
	wr.invalidate_rkey = key[1];
	fill(my.buf + SEND_AT + S_INV * SLOT, SLOT, S_INV);
	post(Q_WINDOW, &wr);
	sent(S_INV, IBV_WC_SUCCESS, "a SEND with invalidate");
	wc = reap(my.recv_cq, "a SEND with invalidate");
	arrived(&wc, Q_WINDOW, S_INV, "a SEND with invalidate");
	if (!(wc.wc_flags & IBV_WC_WITH_INV))
		broken("the peer has invalidated nothing");
	rounds = load_stop();
	tcp_write(tcp, &rounds, 8);
	tcp_read(tcp, &theirs, 8);
	if (area->counter != theirs)
		broken("%llu were added, the peer has added %llu", (unsigned long long)area->counter,
		       (unsigned long long)theirs);
	printf("{\"state\": \"done\", \"rounds\": %llu}\n", (unsigned long long)rounds);
}

int main(int argc, char **argv)
{
	uint32_t key[2], new_key;

	if (argc < 5 || strcmp(argv[1], "--hold") != 0 || strcmp(argv[3], "--memory") != 0) {
		fputs("usage: keepcheck --hold DIR --memory private|sparse|memfd|FILE [SERVER-IP]\n", stderr);
		return 2;
	}
	hold = argv[2];
	my.memory = argv[4];
	tcp = argc > 5 ? tcp_connect(argv[5], PORT, 20) : tcp_accept(PORT);
	make(&my);
	tcp_write(tcp, &my.mine, sizeof(my.mine));
	tcp_read(tcp, &my.theirs, sizeof(my.theirs));
	for (int q = 0; q < QPS; q++)
		connect_qp(&my, q);
	keep_meet(tcp, 'c');
	for (int i = 0; i < 2; i++) {
		mw[i] = need(ibv_alloc_mw(my.pd, i ? IBV_MW_TYPE_2 : IBV_MW_TYPE_1), "a window");
		key[i] = bind_window(i);
	}
	load_start(&my);
	leave_pending();
	load_advance(1);
	step("pending");
	use_what_is_pending(key);
	new_key = bind_window(0);
	step("used");
	end(key, new_key);
	return 0;
}
