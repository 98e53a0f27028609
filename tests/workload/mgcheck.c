/* SPDX-License-Identifier: BSD-3-Clause */
#include "mgcheck.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define TERMS_MAGIC 0x4b43474du
#define TERMS_VERSION 2u
#define MS 1000000ll

volatile sig_atomic_t terminated;

int64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000000000ll + ts.tv_nsec;
}

static void on_term(int sig)
{
	(void)sig;
	terminated = 1;
}

_Noreturn void die(const char *fmt, ...)
{
	va_list ap;

	fputs("mgcheck: ", stderr);
	va_start(ap, fmt);
	vfprintf(stderr, fmt, ap);
	va_end(ap);
	fputc('\n', stderr);
	exit(2);
}

static void tell(struct run *r, const char *fmt, va_list ap)
{
	r->errors++;
	if (r->n_told == MAX_ERRORS_TOLD)
		return;
	vsnprintf(r->told[r->n_told], sizeof(r->told[0]), fmt, ap);
	fprintf(stderr, "mgcheck: %s\n", r->told[r->n_told]);
	r->n_told++;
}

void wrong(struct run *r, const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	tell(r, fmt, ap);
	va_end(ap);
}

void fatal(struct run *r, const char *fmt, ...)
{
	va_list ap;

	if (r->abort)
		return; /* the first says it all */
	va_start(ap, fmt);
	tell(r, fmt, ap);
	va_end(ap);
	r->abort = true;
}

static uint64_t sum(const struct counts *c)
{
	uint64_t n = 0;

	for (int k = 0; k < K_COUNT; k++)
		n += c->ops[k];
	return n;
}

/* One line of fixed length, written in place: a reader always finds a whole one. Opened each time: an open
 * file on a host's directory would keep a container from being checkpointed. */
void progress(struct run *r, int64_t now)
{
	char line[256];
	int fd, n;

	r->last_progress = now;
	if (!r->opt.progress)
		return;
	n = snprintf(line, sizeof(line),
		     "{\"state\": \"%s\", \"sent\": %llu, \"received\": %llu, \"bytes_sent\": %llu, "
		     "\"bytes_received\": %llu, \"errors\": %llu, \"longest_gap_ms\": %.1f}",
		     r->state, (unsigned long long)sum(&r->sent), (unsigned long long)sum(&r->received),
		     (unsigned long long)r->sent.bytes, (unsigned long long)r->received.bytes,
		     (unsigned long long)r->errors, (double)r->longest_gap / 1e6);
	memset(line + n, ' ', sizeof(line) - (size_t)n);
	line[sizeof(line) - 1] = '\n';
	fd = open(r->opt.progress, O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
	if (fd < 0 || pwrite(fd, line, sizeof(line), 0) != (ssize_t)sizeof(line))
		die("%s: %s", r->opt.progress, strerror(errno));
	close(fd);
}

static void agree(struct run *r)
{
	struct terms *t = &r->opt.terms;

	t->magic = TERMS_MAGIC;
	t->version = TERMS_VERSION;
	if (r->opt.server) {
		r->tcp = tcp_connect(r->opt.server, r->opt.tcp_port, r->opt.connect_s);
		tcp_write(r->tcp, t, sizeof(*t));
		return;
	}
	r->tcp = tcp_accept(r->opt.tcp_port);
	tcp_read(r->tcp, t, sizeof(*t));
	if (t->magic != TERMS_MAGIC || t->version != TERMS_VERSION)
		die("the client is another program or version");
	if (!t->qps || t->qps > MAX_QPS || !(t->plan.ops & OPS_ALL) || (t->plan.ops & ~OPS_ALL) ||
	    t->plan.max_size > 1u << 24 ||
	    (t->plan.fixed_size != UINT32_MAX && t->plan.fixed_size > t->plan.max_size))
		die("the client's terms make no sense");
}

static void idle(struct run *r)
{
	struct stat st;
	uint32_t go = 1;

	r->state = "idle";
	progress(r, now_ns());
	while (r->opt.idle_until && stat(r->opt.idle_until, &st) && !terminated)
		nanosleep(&(struct timespec){.tv_nsec = 10 * MS}, NULL);
	if (r->opt.terms.tcp_closes) {
		close(r->tcp);
		r->tcp = -1;
		return;
	}
	/* Who waits for a file makes the other wait as well. */
	tcp_write(r->tcp, &go, sizeof(go));
	tcp_read(r->tcp, &go, sizeof(go));
}

static void note_completions(struct run *r, int64_t now)
{
	int64_t gap = now - r->last_cqe;

	if (r->last_cqe) {
		if (gap > r->longest_gap)
			r->longest_gap = gap;
		if (gap >= 10 * MS && r->n_gaps < MAX_GAPS)
			r->gaps[r->n_gaps++] = (struct gap){(r->last_cqe - r->started) / MS, gap / MS};
	}
	r->last_cqe = now;
}

static int drain(struct run *r)
{
	struct ibv_wc wc[16];
	int total = 0;

	for (unsigned i = 0, n_more = 0; i < r->n_cqs && !r->abort; i++) {
		int n = ibv_poll_cq(r->cqs[i], 16, wc);
		int64_t now = now_ns();

		if (n < 0 || n > 16) {
			fatal(r, "ibv_poll_cq: %d", n);
			break;
		}
		for (int k = 0; k < n && !r->abort; k++)
			completion(r, &wc[k], now);
		if (n)
			note_completions(r, now);
		total += n;
		/* With many QPs there is much to take; the posting of receives must not wait for all of it. */
		if (n == 16 && ++n_more < r->opt.terms.qps)
			i--;
	}
	return total;
}

static bool take_event(struct run *r, int ms)
{
	struct pollfd p = {.fd = r->channel->fd, .events = POLLIN};
	struct ibv_cq *cq;
	void *ctx;

	if (poll(&p, 1, ms) != 1)
		return false;
	if (ibv_get_cq_event(r->channel, &cq, &ctx)) {
		fatal(r, "ibv_get_cq_event: %s", strerror(errno));
		return false;
	}
	ibv_ack_cq_events(cq, 1);
	r->events++;
	return true;
}

/* How long nothing but a completion can give us something to do. */
static int may_sleep_ms(struct run *r, int64_t now)
{
	int64_t until = r->last_progress + 50 * MS;

	if (r->deadline && !r->stopping && r->deadline < until && r->deadline > now)
		until = r->deadline;
	for (unsigned i = 0; i < r->opt.terms.qps; i++) {
		struct conn *c = &r->conns[i];

		if (c->hold_until > now && c->hold_until < until)
			until = c->hold_until;
		if (c->have_op && c->credit_after > now && c->credit_after < until)
			until = c->credit_after;
		if (r->opt.rate != 0 && c->sends && !c->fin_posted && until > now + MS)
			until = now + MS;
	}
	return until <= now ? 0 : (int)((until - now + MS - 1) / MS);
}

static void sleep_for_event(struct run *r, int64_t now)
{
	int n = 0;

	for (unsigned i = 0; i < r->n_cqs; i++)
		if (ibv_req_notify_cq(r->cqs[i], 0))
			fatal(r, "ibv_req_notify_cq: %s", strerror(errno));
	/* What came before the request makes no event. */
	if (drain(r) || r->abort || take_event(r, may_sleep_ms(r, now)))
		return;
	/* Nothing said that anything came: then nothing may be there, or its event is just under way. */
	n = drain(r);
	if (n && !take_event(r, 500))
		fatal(r, "%d completions came without an event", n);
}

static void check_async(struct run *r)
{
	struct ibv_async_event e;
	struct pollfd p = {.fd = r->ctx->async_fd, .events = POLLIN};

	while (poll(&p, 1, 0) == 1 && !ibv_get_async_event(r->ctx, &e)) {
		if (e.event_type != IBV_EVENT_COMM_EST && e.event_type != IBV_EVENT_PORT_ACTIVE &&
		    e.event_type != IBV_EVENT_GID_CHANGE)
			wrong(r, "asynchronous event: %s", ibv_event_type_str(e.event_type));
		r->async_events++;
		ibv_ack_async_event(&e);
	}
}

/* A program must not see from outside that its QP is being moved. */
static void check_state(struct run *r, struct conn *c)
{
	struct ibv_qp_init_attr init;
	struct ibv_qp_attr attr;
	int rc = ibv_query_qp(c->qp, &attr, IBV_QP_STATE | IBV_QP_DEST_QPN, &init);

	if (rc)
		wrong(r, "QP %u: ibv_query_qp: %s", c->index, strerror(rc));
	else if (attr.qp_state != IBV_QPS_RTS || attr.dest_qp_num != c->theirs.qpn)
		fatal(r, "QP %u: state %d, peer 0x%x", c->index, (int)attr.qp_state, attr.dest_qp_num);
}

static void every_few_ms(struct run *r, int64_t now, unsigned *turn)
{
	progress(r, now);
	check_async(r);
	check_state(r, &r->conns[(*turn)++ % r->opt.terms.qps]);
	if (terminated)
		r->stopping = true;
	if (now - (r->last_cqe ? r->last_cqe : r->started) > r->opt.stall_s * 1000 * MS)
		fatal(r, "nothing happened for %u s", r->opt.stall_s);
}

static bool all_done(const struct run *r)
{
	for (unsigned i = 0; i < r->opt.terms.qps; i++)
		if (!r->conns[i].tx_done || !r->conns[i].rx_done)
			return false;
	return true;
}

static void take_verdict(struct run *r)
{
	r->have_verdict = true;
	if (!tcp_try_read(r->tcp, &r->theirs_verdict, sizeof(r->theirs_verdict), (int)r->opt.stall_s * 1000))
		fatal(r, "the peer is gone");
}

static void exchange(struct run *r)
{
	unsigned turn = 0, spin = 0;
	int64_t now = now_ns(), before = now;

	r->state = "running";
	r->started = now;
	r->deadline = r->opt.terms.seconds_ms ? now + (int64_t)r->opt.terms.seconds_ms * MS : 0;
	progress(r, now);
	while (!r->abort && !all_done(r)) {
		int n;

		now = now_ns();
		if (!r->opt.events && now - before > r->longest_turn)
			r->longest_turn = now - before;
		before = now;
		for (unsigned i = 0; i < r->opt.terms.qps && !r->abort; i++) {
			post_receives(r, &r->conns[i], now);
			pump(r, &r->conns[i], now);
		}
		n = drain(r);
		if (!n && !r->abort && r->opt.events && !all_done(r))
			sleep_for_event(r, now);
		if (now - r->last_progress >= 50 * MS)
			every_few_ms(r, now, &turn);
		/* The peer may be done before us (its last acknowledgement is under way) or give up. */
		if (++spin % 256 == 0 && !r->have_verdict && tcp_readable(r->tcp)) {
			take_verdict(r);
			if (r->theirs_verdict.errors && !all_done(r))
				fatal(r, "the peer gave up");
		}
	}
	r->ended = now_ns();
}

static void compare_counts(struct run *r, const struct counts *said, const struct counts *seen,
			   const char *who)
{
	for (int k = 0; k < K_COUNT; k++)
		if (said->ops[k] != seen->ops[k])
			wrong(r, "%s: %llu %s were sent, %llu arrived", who, (unsigned long long)said->ops[k],
			      kind_name[k], (unsigned long long)seen->ops[k]);
}

static bool settle(struct run *r)
{
	struct verdict mine = {.errors = r->errors, .sent = r->sent, .received = r->received};
	struct verdict *theirs = &r->theirs_verdict;

	if (r->tcp < 0) {
		/* Nobody can tell us that the peer needs us no more. */
		nanosleep(&(struct timespec){r->opt.linger_ms / 1000, r->opt.linger_ms % 1000 * 1000000},
			  NULL);
		return true;
	}
	if (!tcp_try_write(r->tcp, &mine, sizeof(mine)) && !r->have_verdict)
		fatal(r, "the peer is gone");
	else if (!r->have_verdict)
		take_verdict(r);
	if (!r->errors)
		compare_counts(r, &r->sent, &theirs->received, "to the peer");
	if (!r->errors)
		compare_counts(r, &theirs->sent, &r->received, "from the peer");
	return theirs->errors == 0;
}

static void print_counts(const char *name, const struct counts *c)
{
	printf("\"%s\": {", name);
	for (int k = 0; k < K_COUNT; k++)
		printf("\"%s\": %llu, ", kind_name[k], (unsigned long long)c->ops[k]);
	printf("\"messages\": %llu, \"bytes\": %llu}, ", (unsigned long long)sum(c),
	       (unsigned long long)c->bytes);
}

static void print_text(const char *s)
{
	putchar('"');
	for (; *s; s++) {
		if (*s == '"' || *s == '\\')
			putchar('\\');
		if ((unsigned char)*s >= ' ')
			putchar(*s);
	}
	putchar('"');
}

static void print_verdict(struct run *r, const char *device, bool good)
{
	double s = (double)(r->ended - r->started) / 1e9;

	printf("{\"verdict\": \"%s\", \"role\": \"%s\", \"device\": ", good ? "ok" : "wrong",
	       r->opt.server ? "client" : "server");
	print_text(device);
	printf(", \"qps\": %u, \"mtu\": %u, \"seconds\": %.3f, ", r->opt.terms.qps, 128u << r->mtu, s);
	print_counts("sent", &r->sent);
	print_counts("received", &r->received);
	printf("\"inline\": %llu, \"unsignalled\": %llu, \"several_sges\": %llu, \"fenced\": %llu, "
	       "\"credit_reads\": %llu, \"rnr_holds\": %llu, \"posts\": %llu, \"cq_events\": %llu, "
	       "\"async_events\": %llu, \"corrupted\": %llu, ",
	       (unsigned long long)r->inlined, (unsigned long long)r->unsignalled,
	       (unsigned long long)r->scattered, (unsigned long long)r->fenced,
	       (unsigned long long)r->credit_reads, (unsigned long long)r->holds,
	       (unsigned long long)r->chains, (unsigned long long)r->events,
	       (unsigned long long)r->async_events, (unsigned long long)r->corrupted);
	printf("\"longest_gap_ms\": %.1f, \"longest_turn_ms\": %.1f, \"gaps\": [",
	       (double)r->longest_gap / 1e6, (double)r->longest_turn / 1e6);
	for (unsigned i = 0; i < r->n_gaps; i++)
		printf("%s{\"at_ms\": %lld, \"ms\": %lld}", i ? ", " : "", (long long)r->gaps[i].at_ms,
		       (long long)r->gaps[i].ms);
	printf("], \"peer_errors\": %llu, \"errors\": %llu, \"error_messages\": [",
	       (unsigned long long)r->theirs_verdict.errors, (unsigned long long)r->errors);
	for (unsigned i = 0; i < r->n_told; i++) {
		fputs(i ? ", " : "", stdout);
		print_text(r->told[i]);
	}
	puts("]}");
	fflush(stdout);
}

int main(int argc, char **argv)
{
	static struct run run;
	struct run *r = &run;
	struct sigaction sa = {.sa_handler = on_term};
	char device[64];
	bool good;

	parse_options(argc, argv, &r->opt);
	sigaction(SIGTERM, &sa, NULL);
	sigaction(SIGINT, &sa, NULL);
	r->state = "connecting";
	progress(r, now_ns());
	setup_device(r);
	snprintf(device, sizeof(device), "%s", ibv_get_device_name(r->ctx->device));
	agree(r);
	setup_conns(r);
	setup_connect(r);
	idle(r);
	exchange(r);
	r->state = "settling";
	progress(r, now_ns());
	check_async(r);
	for (unsigned i = 0; i < r->opt.terms.qps && !r->abort; i++)
		check_state(r, &r->conns[i]);
	good = settle(r);
	teardown(r);
	good = good && !r->errors;
	print_verdict(r, device, good);
	r->state = good ? "ok" : "wrong";
	progress(r, now_ns());
	return good ? 0 : 1;
}
