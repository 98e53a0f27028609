// SPDX-License-Identifier: BSD-3-Clause
/*
 * cmcheck - a connection by rdma_cm between two processes that can be held at every step of it.
 *
 *	cmcheck [--ud] [--hold DIR] [--messages N]             server: one connection
 *	cmcheck [--ud] [--hold DIR] [--messages N] SERVER-IP   client
 *
 * With --hold the program writes the name of each step it has come to into DIR/at and goes on when there
 * is a file DIR/go-STEP. Events are left in their channel until then where a step says so. Private data of
 * both directions, the order of events and every message (echoed by the server) are checked.
 *
 * server: listening, arrived (a request, not fetched), request (fetched), accepted (answered), established,
 *         ended (an event, not fetched)
 * client: created, addressed, routed (each: the event not fetched), connecting (requested), answered (the
 *         event not fetched), established, disconnecting (DREQ sent), left (answered, the event not fetched)
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <poll.h>
#include <rdma/rdma_cma.h>
#include <rdma/rdma_verbs.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define PORT 7473
#define GRH 40u
#define SLOT 2048u
#define DEPTH 8u
#define PATIENCE_MS 100 /* for the answer to a datagram */

static const char asks[] = "may I?", answers[] = "you may";

static struct {
	struct rdma_event_channel *channel;
	struct rdma_cm_id *id;
	struct ibv_mr *mr;
	uint8_t buf[(DEPTH + 1) * SLOT]; /* DEPTH receive slots, then one to send from */
	struct ibv_ah *ah;
	uint32_t qpn, qkey;
	bool ud;
	const char *hold;
	unsigned messages;
} my = {.messages = 100};

static _Noreturn void die(const char *what)
{
	fprintf(stderr, "cmcheck: %s: %s\n", what, strerror(errno));
	exit(2);
}

static _Noreturn void wrong(const char *what)
{
	fprintf(stderr, "cmcheck: %s\n", what);
	exit(1);
}

static uint64_t now_ms(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

static void step(const char *name)
{
	char path[256], temporary[256];
	FILE *f;

	if (!my.hold)
		return;
	snprintf(path, sizeof(path), "%s/at", my.hold);
	snprintf(temporary, sizeof(temporary), "%s/at~", my.hold);
	f = fopen(temporary, "w");
	if (!f)
		die(temporary);
	fprintf(f, "%s\n", name);
	fclose(f);
	rename(temporary, path);
	snprintf(path, sizeof(path), "%s/go-%s", my.hold, name);
	while (access(path, F_OK))
		usleep(2000);
}

/* Until there is an event to fetch. */
static void pending(const char *name)
{
	struct pollfd p = {.fd = my.channel->fd, .events = POLLIN};

	if (poll(&p, 1, -1) != 1)
		die("poll");
	step(name);
	if (poll(&p, 1, 0) != 1)
		wrong("an event that was there has gone");
}

/* The next event, which must be this one. */
static struct rdma_cm_event *expect(enum rdma_cm_event_type type)
{
	struct rdma_cm_event *ev;

	if (rdma_get_cm_event(my.channel, &ev))
		die("rdma_get_cm_event");
	if (ev->event != type || ev->status) {
		fprintf(stderr, "cmcheck: %s (%d) instead of %s\n", rdma_event_str(ev->event), ev->status,
			rdma_event_str(type));
		exit(1);
	}
	return ev;
}

static void check_private(const void *data, size_t len, const char *want)
{
	if (len < strlen(want) || memcmp(data, want, strlen(want)) != 0)
		wrong("other private data than the peer's");
}

/* ---- verbs -------------------------------------------------------------------------------------- */

static void post_recv(uint64_t slot)
{
	if (rdma_post_recv(my.id, (void *)(uintptr_t)slot, my.buf + slot * SLOT, SLOT, my.mr))
		die("rdma_post_recv");
}

static void set_up(void)
{
	struct ibv_qp_init_attr init = {.qp_type = my.ud ? IBV_QPT_UD : IBV_QPT_RC,
					.cap = {DEPTH, DEPTH, 1, 1, 0}};

	if (rdma_create_qp(my.id, NULL, &init))
		die("rdma_create_qp");
	my.mr = rdma_reg_msgs(my.id, my.buf, sizeof(my.buf));
	if (!my.mr)
		die("rdma_reg_msgs");
	for (uint64_t slot = 0; slot < DEPTH; slot++)
		post_recv(slot);
}

static void send_slot(uint32_t length)
{
	uint8_t *from = my.buf + DEPTH * SLOT;
	struct ibv_wc wc;
	int ret =
		my.ud ? rdma_post_ud_send(my.id, NULL, from, length, my.mr, IBV_SEND_SIGNALED, my.ah, my.qpn)
		      : rdma_post_send(my.id, NULL, from, length, my.mr, IBV_SEND_SIGNALED);

	if (ret)
		die("rdma_post_send");
	if (rdma_get_send_comp(my.id, &wc) != 1)
		die("rdma_get_send_comp");
	if (wc.status)
		wrong(ibv_wc_status_str(wc.status));
}

static void fill(uint32_t number, uint32_t *length)
{
	uint8_t *data = my.buf + DEPTH * SLOT;

	*length = 4 + number * 37 % 900;
	memcpy(data, &number, 4);
	for (uint32_t i = 4; i < *length; i++)
		data[i] = (uint8_t)(number * 7 + i);
}

/* Its number, if the message is whole. */
static uint32_t number_of(const struct ibv_wc *wc)
{
	const uint8_t *data = my.buf + wc->wr_id * SLOT + (my.ud ? GRH : 0);
	uint32_t number, length = wc->byte_len - (my.ud ? GRH : 0);

	memcpy(&number, data, 4);
	if (wc->status || length != 4 + number * 37 % 900)
		wrong(wc->status ? ibv_wc_status_str(wc->status) : "a message of another length");
	for (uint32_t i = 4; i < length; i++)
		if (data[i] != (uint8_t)(number * 7 + i))
			wrong("a damaged message");
	return number;
}

/* ---- the two roles ------------------------------------------------------------------------------- */

static void know_peer(struct ibv_wc *wc)
{
	if (!my.ud)
		return;
	if (!my.ah)
		my.ah = ibv_create_ah_from_wc(my.id->pd, wc, (struct ibv_grh *)(my.buf + wc->wr_id * SLOT),
					      1);
	if (!my.ah)
		die("ibv_create_ah_from_wc");
	my.qpn = wc->src_qp;
}

/* Echo until all was answered; datagrams may come twice, and are answered each time. */
static void serve_messages(void)
{
	for (uint32_t next = 0; next < my.messages;) {
		struct ibv_wc wc;
		uint32_t number, length;

		if (rdma_get_recv_comp(my.id, &wc) != 1)
			die("rdma_get_recv_comp");
		number = number_of(&wc);
		if (number > next || (!my.ud && number != next))
			wrong("a message out of order");
		know_peer(&wc);
		fill(number, &length);
		post_recv(wc.wr_id);
		send_slot(length);
		next = number + 1;
	}
}

/* False: no answer in time (a datagram may be lost). */
static bool await(uint32_t number)
{
	uint64_t until = now_ms() + PATIENCE_MS;
	struct ibv_wc wc;

	while (!my.ud || now_ms() < until) {
		int n = my.ud ? ibv_poll_cq(my.id->recv_cq, 1, &wc) : rdma_get_recv_comp(my.id, &wc);
		uint32_t got;

		if (n < 0)
			die("a receive completion");
		if (!n) {
			usleep(50);
			continue;
		}
		got = number_of(&wc);
		if (got > number || (!my.ud && got != number))
			wrong("an answer to what was not asked");
		post_recv(wc.wr_id);
		if (got == number)
			return true;
	}
	return false;
}

static void ask_messages(void)
{
	for (uint32_t number = 0; number < my.messages; number++) {
		do {
			uint32_t length;

			fill(number, &length);
			send_slot(length);
		} while (!await(number));
	}
}

static void serve(void)
{
	struct sockaddr_in sin = {.sin_family = AF_INET, .sin_port = htons(PORT)};
	struct rdma_conn_param param = {.private_data = answers, .private_data_len = sizeof(answers)};
	struct rdma_cm_event *ev;
	struct rdma_cm_id *listener;

	if (rdma_create_id(my.channel, &listener, NULL, my.ud ? RDMA_PS_UDP : RDMA_PS_TCP) ||
	    rdma_bind_addr(listener, (struct sockaddr *)&sin) || rdma_listen(listener, 4))
		die("rdma_listen");
	step("listening");
	pending("arrived");
	ev = expect(RDMA_CM_EVENT_CONNECT_REQUEST);
	my.id = ev->id;
	if (my.ud)
		check_private(ev->param.ud.private_data, ev->param.ud.private_data_len, asks);
	else
		check_private(ev->param.conn.private_data, ev->param.conn.private_data_len, asks);
	param.responder_resources = param.initiator_depth = my.ud ? 0 : 1;
	rdma_ack_cm_event(ev);
	step("request");
	set_up();
	param.qp_num = my.id->qp->qp_num;
	param.rnr_retry_count = 7;
	if (rdma_accept(my.id, &param))
		die("rdma_accept");
	step("accepted");
	if (!my.ud)
		rdma_ack_cm_event(expect(RDMA_CM_EVENT_ESTABLISHED));
	step("established");
	serve_messages();
	if (!my.ud) {
		pending("ended");
		rdma_ack_cm_event(expect(RDMA_CM_EVENT_DISCONNECTED));
		if (rdma_disconnect(my.id))
			die("rdma_disconnect");
	}
	rdma_destroy_qp(my.id);
	rdma_dereg_mr(my.mr);
	if (my.ah)
		ibv_destroy_ah(my.ah);
	rdma_destroy_id(my.id);
	rdma_destroy_id(listener);
}

static void ask(const char *server)
{
	struct sockaddr_in sin = {.sin_family = AF_INET, .sin_port = htons(PORT)};
	struct rdma_conn_param param = {.private_data = asks,
					.private_data_len = sizeof(asks),
					.responder_resources = 1,
					.initiator_depth = 1,
					.retry_count = 7,
					.rnr_retry_count = 7};
	struct rdma_cm_event *ev;

	if (inet_pton(AF_INET, server, &sin.sin_addr) != 1)
		die(server);
	if (rdma_create_id(my.channel, &my.id, NULL, my.ud ? RDMA_PS_UDP : RDMA_PS_TCP))
		die("rdma_create_id");
	step("created");
	if (rdma_resolve_addr(my.id, NULL, (struct sockaddr *)&sin, 2000))
		die("rdma_resolve_addr");
	pending("addressed");
	rdma_ack_cm_event(expect(RDMA_CM_EVENT_ADDR_RESOLVED));
	if (rdma_resolve_route(my.id, 2000))
		die("rdma_resolve_route");
	pending("routed");
	rdma_ack_cm_event(expect(RDMA_CM_EVENT_ROUTE_RESOLVED));
	set_up();
	if (rdma_connect(my.id, &param))
		die("rdma_connect");
	step("connecting");
	pending("answered");
	ev = expect(RDMA_CM_EVENT_ESTABLISHED);
	if (my.ud) {
		check_private(ev->param.ud.private_data, ev->param.ud.private_data_len, answers);
		my.ah = ibv_create_ah(my.id->pd, &ev->param.ud.ah_attr);
		if (!my.ah)
			die("ibv_create_ah");
		my.qpn = ev->param.ud.qp_num;
	} else {
		check_private(ev->param.conn.private_data, ev->param.conn.private_data_len, answers);
	}
	rdma_ack_cm_event(ev);
	step("established");
	ask_messages();
	if (!my.ud) {
		if (rdma_disconnect(my.id))
			die("rdma_disconnect");
		step("disconnecting");
		pending("left");
		rdma_ack_cm_event(expect(RDMA_CM_EVENT_DISCONNECTED));
		rdma_ack_cm_event(expect(RDMA_CM_EVENT_TIMEWAIT_EXIT));
	}
	rdma_destroy_qp(my.id);
	rdma_dereg_mr(my.mr);
	if (my.ah)
		ibv_destroy_ah(my.ah);
	rdma_destroy_id(my.id);
}

int main(int argc, char **argv)
{
	const char *server = NULL;

	for (int i = 1; i < argc; i++) {
		if (!strcmp(argv[i], "--ud"))
			my.ud = true;
		else if (!strcmp(argv[i], "--hold") && i + 1 < argc)
			my.hold = argv[++i];
		else if (!strcmp(argv[i], "--messages") && i + 1 < argc)
			my.messages = (unsigned)strtoul(argv[++i], NULL, 10);
		else
			server = argv[i];
	}
	my.channel = rdma_create_event_channel();
	if (!my.channel)
		die("rdma_create_event_channel");
	if (server)
		ask(server);
	else
		serve();
	rdma_destroy_event_channel(my.channel);
	printf("{\"state\": \"done\"}\n");
	return 0;
}
