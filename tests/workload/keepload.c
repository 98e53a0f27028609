// SPDX-License-Identifier: BSD-3-Clause
/*
 * keepload.c - traffic that is always in flight: rounds of fetch and add, WRITE, ATOMIC WRITE, FLUSH and
 * READ. Each fetch must return what all before it have added, each READ what its round has written.
 */
#include "keepcheck.h"

#include <pthread.h>
#include <stdatomic.h>
#include <string.h>
#include <time.h>

enum { R_ADD, R_WRITE, R_WORD, R_FLUSH, R_READ, R_OPS };

/* wr_flush is the slot behind the last one that the oldest header knows. */
typedef void (*flush_fn)(struct ibv_qp_ex *, uint32_t, uint64_t, size_t, uint8_t, uint8_t);

static struct {
	struct keep *k;
	struct ibv_comp_channel *channel;
	struct ibv_cq *cq;
	pthread_t thread;
	atomic_bool stop;
	atomic_ullong done;
} load;

/* Where lane `n` sends from and reads to. */
struct local {
	struct lane from, to;
	uint64_t fetched;
};

static struct local *local_of(uint64_t n)
{
	struct local *all = (struct local *)(load.k->buf + LOAD_AT + sizeof(struct load_area));

	return &all[n % LANES];
}

static uint64_t remote_of(uint64_t n)
{
	return load.k->theirs.addr + LOAD_AT + offsetof(struct load_area, lane) +
	       n % LANES * sizeof(struct lane);
}

static void post_round(uint64_t n)
{
	struct ibv_qp_ex *q = ibv_qp_to_qp_ex(load.k->qp[Q_LOAD]);
	struct local *l = local_of(n);
	uint32_t rkey = load.k->theirs.rkey, lkey = load.k->mr->lkey;
	uint64_t to = remote_of(n);
	flush_fn *flush = (flush_fn *)(void *)((char *)q + offsetof(struct ibv_qp_ex, wr_atomic_write) +
					       sizeof(flush_fn));

	l->from.word = n;
	fill(l->from.block, sizeof(l->from.block), n);
	memset(&l->to, 0, sizeof(l->to));
	ibv_wr_start(q);
	q->wr_flags = IBV_SEND_SIGNALED;
	q->wr_id = n * R_OPS + R_ADD;
	ibv_wr_atomic_fetch_add(q, rkey, load.k->theirs.addr + LOAD_AT, 1);
	ibv_wr_set_sge(q, lkey, (uintptr_t)&l->fetched, 8);
	q->wr_id = n * R_OPS + R_WRITE;
	ibv_wr_rdma_write(q, rkey, to + 8);
	ibv_wr_set_sge(q, lkey, (uintptr_t)l->from.block, sizeof(l->from.block));
	q->wr_id = n * R_OPS + R_WORD;
	ibv_wr_atomic_write(q, rkey, to, &l->from.word);
	q->wr_id = n * R_OPS + R_FLUSH;
	(*flush)(q, rkey, to, sizeof(struct lane), 1, 0);
	q->wr_id = n * R_OPS + R_READ;
	ibv_wr_rdma_read(q, rkey, to);
	ibv_wr_set_sge(q, lkey, (uintptr_t)&l->to, sizeof(l->to));
	if (ibv_wr_complete(q))
		broken("a round of traffic cannot be posted");
}

static void check_round(uint64_t n)
{
	const struct local *l = local_of(n);

	if (l->fetched != n)
		broken("fetch and add number %llu found %llu", (unsigned long long)n,
		       (unsigned long long)l->fetched);
	if (l->to.word != n || !filled(l->to.block, sizeof(l->to.block), n))
		broken("a READ does not find what round %llu has written", (unsigned long long)n);
}

static void wait_for_event(void)
{
	struct ibv_cq *cq;
	void *context;

	if (ibv_get_cq_event(load.channel, &cq, &context))
		broken("the load's channel");
	ibv_ack_cq_events(cq, 1);
}

static void *run(void *unused)
{
	uint64_t posted = 0, next = 0; /* next: completion */
	struct ibv_wc wc;

	while (!load.stop || next < posted * R_OPS) {
		int n;

		while (!load.stop && posted < next / R_OPS + LANES)
			post_round(posted++);
		n = ibv_poll_cq(load.cq, 1, &wc);
		if (!n) {
			/* Armed first, polled again then: nothing that came in between is slept over. */
			if (ibv_req_notify_cq(load.cq, 0))
				broken("ibv_req_notify_cq");
			n = ibv_poll_cq(load.cq, 1, &wc);
			if (!n)
				wait_for_event();
		}
		if (n <= 0)
			continue;
		if (wc.status || wc.wr_id != next)
			broken("the load: %s of request %llu, not %llu", ibv_wc_status_str(wc.status),
			       (unsigned long long)wc.wr_id, (unsigned long long)next);
		if (next++ % R_OPS == R_READ) {
			check_round(next / R_OPS - 1);
			load.done = next / R_OPS;
		}
	}
	return unused;
}

struct ibv_cq *load_cq(struct keep *k)
{
	load.k = k;
	load.channel = ibv_create_comp_channel(k->ctx);
	if (!load.channel || !(load.cq = ibv_create_cq(k->ctx, LANES * R_OPS, NULL, load.channel, 0)))
		die("the load's completion queue");
	return load.cq;
}

void load_start(struct keep *k)
{
	load.k = k;
	if (pthread_create(&load.thread, NULL, run, NULL))
		die("pthread_create");
}

void load_advance(uint64_t rounds)
{
	uint64_t target = load.done + rounds;
	int64_t until = now_ns() + 60 * 1000000000ll;

	while (load.done < target) {
		if (now_ns() > until)
			broken("the load stands still");
		nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
	}
}

uint64_t load_stop(void)
{
	load.stop = true;
	if (pthread_join(load.thread, NULL))
		die("pthread_join");
	return load.done;
}
