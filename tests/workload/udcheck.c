// SPDX-License-Identifier: BSD-3-Clause
/*
 * udcheck - datagrams between two processes, each checked; lost ones are asked for again.
 *
 *	udcheck [-d DEVICE] [-x GID-INDEX] [--group ADDRESS] [--progress FILE]             server
 *	udcheck [-d DEVICE] [-x GID-INDEX] [--group ADDRESS] [--progress FILE] SERVER-IP   client
 *
 * The client sends numbered requests, every fourth to a multicast group that the server has joined, and
 * repeats each until its answer comes. The server answers with an address handle made from what it
 * received. SERVER-IP is where a TCP connection tells the server's GID; datagrams go by IPv4 or IPv6, as the
 * GIDs are. UD may lose: that is counted ("again") and no error. What arrives must be whole, from the QP
 * it says, and an answer must be to what was asked. Both end with SIGTERM and print one line of JSON.
 */
#include <arpa/inet.h>
#include <errno.h>
#include <infiniband/verbs.h>
#include <libdeflate.h>
#include <netinet/in.h>
#include <signal.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define PORT 7472
#define QKEY 0x22222222u
#define GRH 40u
#define SLOT 2048u
#define DEPTH 32u
#define MULTICAST_QPN 0xffffffu
#define PATIENCE_MS 30 /* for an answer */

struct request {
	uint64_t number;
	uint32_t length; /* of the data behind */
	uint32_t crc;	 /* of the data */
	uint8_t multicast;
	uint8_t rsv[7];
};

struct hello {
	uint8_t gid[16];
	uint32_t qpn;
};

static struct {
	struct ibv_context *ctx;
	struct ibv_pd *pd;
	struct ibv_cq *cq, *sent_cq; /* of receives; of what was sent */
	struct ibv_mr *mr;
	struct ibv_qp *qp;
	uint8_t *buf; /* DEPTH receive slots, then one to send from */
	union ibv_gid own, group;
	bool grouped;
	const char *device, *progress;
	uint8_t gid_index;
	unsigned long long sent, received, again, by_group, errors;
} my;

static volatile sig_atomic_t quit;

static void on_signal(int signal)
{
	(void)signal;
	quit = 1;
}

static _Noreturn void die(const char *what)
{
	fprintf(stderr, "udcheck: %s: %s\n", what, strerror(errno));
	exit(2);
}

static void wrong(const char *what)
{
	my.errors++;
	fprintf(stderr, "udcheck: %s\n", what);
}

static uint64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

static void report(FILE *f, const char *state)
{
	fprintf(f,
		"{\"state\": \"%s\", \"sent\": %llu, \"received\": %llu, \"again\": %llu, "
		"\"by_group\": %llu, \"errors\": %llu}\n",
		state, my.sent, my.received, my.again, my.by_group, my.errors);
}

static bool is_v4(const union ibv_gid *gid)
{
	static const uint8_t prefix[12] = {[10] = 0xff, [11] = 0xff};

	return !memcmp(gid->raw, prefix, sizeof(prefix));
}

static void tell(const char *state)
{
	char name[256];
	FILE *f;

	if (!my.progress)
		return;
	snprintf(name, sizeof(name), "%s~", my.progress);
	f = fopen(name, "w");
	if (!f)
		die(name);
	report(f, state);
	fclose(f);
	rename(name, my.progress);
}

/* ---- verbs -------------------------------------------------------------------------------------- */

static void post_recv(uint64_t slot)
{
	struct ibv_sge sge = {(uintptr_t)my.buf + slot * SLOT, SLOT, my.mr->lkey};
	struct ibv_recv_wr wr = {.wr_id = slot, .sg_list = &sge, .num_sge = 1}, *bad;

	if ((errno = ibv_post_recv(my.qp, &wr, &bad)))
		die("ibv_post_recv");
}

static void modify(enum ibv_qp_state state, int mask)
{
	struct ibv_qp_attr a = {.qp_state = state, .port_num = 1, .qkey = QKEY};

	if ((errno = ibv_modify_qp(my.qp, &a, IBV_QP_STATE | mask)))
		die("ibv_modify_qp");
}

static void set_up(void)
{
	struct ibv_device **list = ibv_get_device_list(NULL);
	struct ibv_qp_init_attr init = {.qp_type = IBV_QPT_UD, .cap = {DEPTH, DEPTH, 1, 1, 0}};

	for (int i = 0; list && list[i] && !my.ctx; i++)
		if (!my.device || !strcmp(my.device, ibv_get_device_name(list[i])))
			my.ctx = ibv_open_device(list[i]);
	if (!my.ctx)
		die("no RDMA device");
	ibv_free_device_list(list);
	my.buf = calloc(DEPTH + 1, SLOT);
	my.pd = ibv_alloc_pd(my.ctx);
	my.cq = ibv_create_cq(my.ctx, DEPTH, NULL, NULL, 0);
	my.sent_cq = ibv_create_cq(my.ctx, 1, NULL, NULL, 0);
	if (!my.buf || !my.pd || !my.cq || !my.sent_cq ||
	    !(my.mr = ibv_reg_mr(my.pd, my.buf, (DEPTH + 1) * SLOT, IBV_ACCESS_LOCAL_WRITE)))
		die("verbs resources");
	init.send_cq = my.sent_cq;
	init.recv_cq = my.cq;
	my.qp = ibv_create_qp(my.pd, &init);
	if (!my.qp)
		die("ibv_create_qp");
	if (ibv_query_gid(my.ctx, 1, my.gid_index, &my.own))
		die("ibv_query_gid");
	modify(IBV_QPS_INIT, IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_QKEY);
	for (uint64_t slot = 0; slot < DEPTH; slot++)
		post_recv(slot);
	modify(IBV_QPS_RTR, 0);
	modify(IBV_QPS_RTS, IBV_QP_SQ_PSN);
}

static struct ibv_ah *ah_to(const union ibv_gid *gid)
{
	struct ibv_ah_attr a = {.is_global = 1,
				.port_num = 1,
				.grh = {.dgid = *gid, .sgid_index = my.gid_index, .hop_limit = 16}};
	struct ibv_ah *ah = ibv_create_ah(my.pd, &a);

	if (!ah)
		die("ibv_create_ah");
	return ah;
}

/* Send what is in the sending slot; the slot is free again on return (a device may read it late). */
static void send_slot(struct ibv_ah *ah, uint32_t qpn, uint32_t length)
{
	struct ibv_sge sge = {(uintptr_t)my.buf + DEPTH * SLOT, length, my.mr->lkey};
	struct ibv_send_wr wr = {.wr_id = DEPTH,
				 .sg_list = &sge,
				 .num_sge = 1,
				 .opcode = IBV_WR_SEND,
				 .send_flags = IBV_SEND_SIGNALED,
				 .wr.ud = {ah, qpn, QKEY}},
			   *bad;
	struct ibv_wc wc;
	int done;

	if ((errno = ibv_post_send(my.qp, &wr, &bad)))
		die("ibv_post_send");
	my.sent++;
	while (!(done = ibv_poll_cq(my.sent_cq, 1, &wc)) && !quit)
		usleep(20);
	if (done < 0 || (done && wc.status != IBV_WC_SUCCESS)) {
		wrong(done < 0 ? "ibv_poll_cq" : ibv_wc_status_str(wc.status));
		quit = 1;
	}
}

/* The next datagram received, or false. */
static bool next(struct ibv_wc *wc)
{
	if (ibv_poll_cq(my.cq, 1, wc) <= 0)
		return false;
	if (wc->status == IBV_WC_SUCCESS)
		return true;
	wrong(ibv_wc_status_str(wc->status));
	quit = 1;
	return false;
}

static struct request *request_of(const struct ibv_wc *wc)
{
	return (struct request *)(my.buf + wc->wr_id * SLOT + GRH);
}

/* Whether the datagram is whole. */
static bool intact(const struct ibv_wc *wc)
{
	const struct request *r = request_of(wc);

	return wc->byte_len >= GRH + sizeof(*r) && wc->byte_len == GRH + sizeof(*r) + r->length &&
	       r->crc == libdeflate_crc32(0, r + 1, r->length) && wc->wc_flags & IBV_WC_GRH;
}

/* ---- the two roles ------------------------------------------------------------------------------- */

static void serve_hello(int listening)
{
	struct hello h = {.qpn = my.qp->qp_num};
	int fd = accept(listening, NULL, NULL);

	if (fd < 0)
		die("accept");
	memcpy(h.gid, my.own.raw, 16);
	if (write(fd, &h, sizeof(h)) != sizeof(h))
		die("write");
	close(fd);
}

static void answer(const struct ibv_wc *wc)
{
	struct request *r = request_of(wc);
	uint8_t *grh = my.buf + wc->wr_id * SLOT;
	bool v4 = is_v4(&my.own);
	/* Of an IPv4 packet the second half of the GRH has the header (annex A17.4.5.1). */
	const uint8_t *from = v4 ? grh + 32 : grh + 8, *to = v4 ? grh + 36 : grh + 24;
	size_t size = v4 ? 4 : 16, skip = 16 - size;
	struct ibv_ah_attr attr;
	struct ibv_ah *ah;

	if (!intact(wc)) {
		wrong("a damaged request");
		return;
	}
	if (memcmp(to, (r->multicast ? &my.group : &my.own)->raw + skip, size) != 0)
		wrong("a request's header names another destination");
	my.received++;
	my.by_group += r->multicast;
	if (r->multicast) { /* the header's destination is nobody's own address: answer its source */
		union ibv_gid source = my.own;

		memcpy(source.raw + skip, from, size);
		ah = ah_to(&source);
	} else {
		struct ibv_wc copy = *wc;

		if (ibv_init_ah_from_wc(my.ctx, 1, &copy, (struct ibv_grh *)grh, &attr) ||
		    !(ah = ibv_create_ah(my.pd, &attr))) {
			wrong("no address handle from a request");
			return;
		}
	}
	memcpy(my.buf + DEPTH * SLOT, r, sizeof(*r) + r->length);
	send_slot(ah, wc->src_qp, (uint32_t)sizeof(*r) + r->length);
	ibv_destroy_ah(ah);
}

static void serve(void)
{
	struct sockaddr_in sin = {.sin_family = AF_INET, .sin_port = htons(PORT)};
	int listening = socket(AF_INET, SOCK_STREAM, 0), on = 1;
	uint64_t told = 0;
	struct ibv_wc wc;

	setsockopt(listening, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on));
	if (bind(listening, (struct sockaddr *)&sin, sizeof(sin)) || listen(listening, 8))
		die("listen");
	if (my.grouped && (errno = ibv_attach_mcast(my.qp, &my.group, 0)))
		die("ibv_attach_mcast");
	tell("listening");
	serve_hello(listening);
	close(listening);
	while (!quit) {
		if (next(&wc)) {
			answer(&wc);
			post_recv(wc.wr_id);
		} else {
			usleep(200);
		}
		if (now_ms() - told > 50) {
			told = now_ms();
			tell("running");
		}
	}
	if (my.grouped && ibv_detach_mcast(my.qp, &my.group, 0))
		wrong("ibv_detach_mcast");
}

static struct hello ask_hello(const char *server)
{
	struct sockaddr_in sin = {.sin_family = AF_INET, .sin_port = htons(PORT)};
	int fd = socket(AF_INET, SOCK_STREAM, 0);
	struct hello h;

	if (inet_pton(AF_INET, server, &sin.sin_addr) != 1 ||
	    connect(fd, (struct sockaddr *)&sin, sizeof(sin)) ||
	    recv(fd, &h, sizeof(h), MSG_WAITALL) != sizeof(h))
		die(server);
	close(fd);
	return h;
}

/* Fill the sending slot with request `number`; its size. */
static uint32_t make_request(uint64_t number, bool multicast)
{
	struct request *r = (struct request *)(my.buf + DEPTH * SLOT);
	uint8_t *data = (uint8_t *)(r + 1);

	*r = (struct request){
		.number = number, .length = (uint32_t)(number * 37 % 900), .multicast = multicast};
	for (uint32_t i = 0; i < r->length; i++)
		data[i] = (uint8_t)(number * 7 + i);
	r->crc = libdeflate_crc32(0, data, r->length);
	return (uint32_t)sizeof(*r) + r->length;
}

/* Until its answer has come; answers to earlier ones (asked twice, or very late) are passed over. */
static void await(uint64_t number, uint32_t server_qpn, uint64_t until)
{
	bool found = false;
	struct ibv_wc wc;

	while (!quit && !found && now_ms() < until) {
		if (!next(&wc)) {
			usleep(50);
			continue;
		}
		if (!intact(&wc) || wc.src_qp != server_qpn)
			wrong("a damaged or foreign answer");
		else if (request_of(&wc)->number > number)
			wrong("an answer to what was not asked");
		else
			found = request_of(&wc)->number == number;
		post_recv(wc.wr_id);
	}
	if (found)
		my.received++;
	else if (!quit)
		my.again++;
}

static void ask(const char *server)
{
	struct hello h = ask_hello(server);
	union ibv_gid gid;
	struct ibv_ah *ah, *group = NULL;
	uint64_t told = 0;

	memcpy(gid.raw, h.gid, 16);
	ah = ah_to(&gid);
	if (my.grouped)
		group = ah_to(&my.group);
	for (uint64_t number = 1; !quit; number++) {
		bool multicast = group && number % 4 == 0;
		unsigned long long before = my.received;

		while (!quit && my.received == before) {
			uint32_t length = make_request(number, multicast);

			send_slot(multicast ? group : ah, multicast ? MULTICAST_QPN : h.qpn, length);
			await(number, h.qpn, now_ms() + PATIENCE_MS);
			if (now_ms() - told > 50) {
				told = now_ms();
				tell("running");
			}
		}
		my.by_group += multicast;
	}
}

int main(int argc, char **argv)
{
	const char *server = NULL;

	for (int i = 1; i < argc; i++) {
		if (!strcmp(argv[i], "-d") && i + 1 < argc) {
			my.device = argv[++i];
		} else if (!strcmp(argv[i], "-x") && i + 1 < argc) {
			my.gid_index = (uint8_t)atoi(argv[++i]);
		} else if (!strcmp(argv[i], "--group") && i + 1 < argc) {
			const char *name = argv[++i];

			my.group = (union ibv_gid){.raw = {[10] = 0xff, [11] = 0xff}};
			if (inet_pton(AF_INET, name, my.group.raw + 12) != 1 &&
			    inet_pton(AF_INET6, name, my.group.raw) != 1)
				die(name);
			my.grouped = true;
		} else if (!strcmp(argv[i], "--progress") && i + 1 < argc) {
			my.progress = argv[++i];
		} else {
			server = argv[i];
		}
	}
	if (!my.gid_index)
		my.gid_index = 1;
	signal(SIGTERM, on_signal);
	signal(SIGINT, on_signal);
	set_up();
	if (server)
		ask(server);
	else
		serve();
	tell("done");
	report(stdout, my.errors ? "failed" : "done");
	return my.errors ? 1 : 0;
}
