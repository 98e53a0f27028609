/* SPDX-License-Identifier: BSD-3-Clause */
/* rdma_cm's calls in one process, both ends over the loopback: errors, options, events, every way to connect. */
#include "tv.h"

#include <arpa/inet.h>
#include <dlfcn.h>
#include <linux/capability.h>
#include <poll.h>
#include <rdma/rdma_cma.h>
#include <rdma/rdma_verbs.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PORT 7500
#define FAILS(call, err)              \
	do {                          \
		errno = 0;            \
		CHECK((call) < 0);    \
		CHECK_EQ(errno, err); \
	} while (0)

static struct rdma_event_channel *channel;

static struct sockaddr *addr_of(const char *ip, uint16_t port)
{
	static struct sockaddr_in sin[4];
	static unsigned n;
	struct sockaddr_in *s = &sin[n++ % 4];

	*s = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(port)};
	CHECK_EQ(inet_pton(AF_INET, ip, &s->sin_addr), 1);
	return (struct sockaddr *)s;
}

static struct rdma_cm_id *new_id(enum rdma_port_space ps)
{
	struct rdma_cm_id *id;

	if (!channel)
		CHECK(channel = rdma_create_event_channel());
	CHECK_EQ(rdma_create_id(channel, &id, NULL, ps), 0);
	return id;
}

static struct rdma_cm_id *listening(enum rdma_port_space ps, int backlog)
{
	struct rdma_cm_id *id = new_id(ps);

	CHECK_EQ(rdma_bind_addr(id, addr_of("0.0.0.0", PORT)), 0);
	CHECK_EQ(rdma_listen(id, backlog), 0);
	return id;
}

/* The next event of the channel, within 10 s. */
static struct rdma_cm_event *next(enum rdma_cm_event_type want)
{
	struct pollfd p = {.fd = channel->fd, .events = POLLIN};
	struct rdma_cm_event *ev;

	CHECK_EQ(poll(&p, 1, 10000), 1);
	CHECK_EQ(rdma_get_cm_event(channel, &ev), 0);
	CHECK_EQ(ev->event, want);
	return ev;
}

static void expect(enum rdma_cm_event_type want, int status)
{
	struct rdma_cm_event *ev = next(want);

	CHECK_EQ(ev->status, status);
	CHECK_EQ(rdma_ack_cm_event(ev), 0);
}

static struct rdma_cm_id *resolved(enum rdma_port_space ps, uint16_t port)
{
	struct rdma_cm_id *id = new_id(ps);

	CHECK_EQ(rdma_resolve_addr(id, NULL, addr_of("127.0.0.1", port), 1000), 0);
	expect(RDMA_CM_EVENT_ADDR_RESOLVED, 0);
	CHECK_EQ(rdma_resolve_route(id, 1000), 0);
	expect(RDMA_CM_EVENT_ROUTE_RESOLVED, 0);
	return id;
}

static struct rdma_cm_id *requested(const char *data)
{
	struct rdma_cm_event *ev = next(RDMA_CM_EVENT_CONNECT_REQUEST);
	struct rdma_cm_id *id = ev->id;
	const void *got = ev->id->ps == RDMA_PS_UDP ? ev->param.ud.private_data : ev->param.conn.private_data;

	if (data)
		CHECK_EQ(memcmp(got, data, strlen(data)), 0);
	CHECK_EQ(rdma_ack_cm_event(ev), 0);
	return id;
}

static void add_qp(struct rdma_cm_id *id, enum ibv_qp_type type)
{
	struct ibv_qp_init_attr init = {.qp_type = type, .cap = {4, 4, 1, 1, 0}};

	CHECK_EQ(rdma_create_qp(id, NULL, &init), 0);
}

static void drop(struct rdma_cm_id *id)
{
	if (id->qp)
		rdma_destroy_qp(id);
	CHECK_EQ(rdma_destroy_id(id), 0);
}

/* ---- addresses and ports ---------------------------------------------------------------------------- */

static void ports_are_given_and_kept(void)
{
	struct rdma_cm_id *a = new_id(RDMA_PS_TCP), *b = new_id(RDMA_PS_TCP), *u = new_id(RDMA_PS_UDP);
	int on = 1;

	CHECK_EQ(rdma_bind_addr(a, addr_of("127.0.0.1", 0)), 0);
	CHECK(rdma_get_src_port(a) != 0);
	CHECK_EQ(rdma_get_dst_port(a), 0);
	FAILS(rdma_bind_addr(a, addr_of("127.0.0.1", PORT)), EINVAL); /* bound already */
	FAILS(rdma_bind_addr(b, addr_of("127.0.0.1", ntohs(rdma_get_src_port(a)))), EADDRINUSE);
	FAILS(rdma_bind_addr(b, addr_of("0.0.0.0", ntohs(rdma_get_src_port(a)))), EADDRNOTAVAIL);
	FAILS(rdma_bind_addr(b, addr_of("192.0.2.1", PORT)), EADDRNOTAVAIL); /* nobody's here */
	CHECK_EQ(rdma_bind_addr(b, addr_of("127.0.0.2", 0)), 0); /* loopback: any of ours, as in the kernel */
	CHECK(rdma_get_src_port(b) != 0);
	drop(b);
	b = new_id(RDMA_PS_TCP);
	CHECK_EQ(rdma_bind_addr(u, addr_of("127.0.0.1", ntohs(rdma_get_src_port(a)))), 0);
	CHECK_EQ(rdma_set_option(b, RDMA_OPTION_ID, RDMA_OPTION_ID_REUSEADDR, &on, sizeof(on)), 0);
	FAILS(rdma_bind_addr(b, addr_of("127.0.0.1", ntohs(rdma_get_src_port(a)))), EADDRINUSE);
	CHECK_EQ(rdma_set_option(a, RDMA_OPTION_ID, RDMA_OPTION_ID_REUSEADDR, &on, sizeof(on)), 0);
	CHECK_EQ(rdma_bind_addr(b, addr_of("127.0.0.1", ntohs(rdma_get_src_port(a)))), 0);
	drop(b);
	drop(u);
	drop(a);
}

static void what_cannot_be_reached_is_told(void)
{
	struct sockaddr strange = {.sa_family = AF_UNIX};
	struct rdma_cm_id *id = new_id(RDMA_PS_TCP);

	FAILS(rdma_resolve_addr(id, NULL, addr_of("192.0.2.1", PORT), 1000), ENETUNREACH);
	FAILS(rdma_resolve_addr(id, NULL, &strange, 1000), EINVAL);
	FAILS(rdma_resolve_addr(id, NULL, NULL, 1000), EINVAL);
	CHECK_EQ(rdma_resolve_addr(id, NULL, addr_of("127.0.0.1", PORT), 1000), 0); /* and then it works */
	expect(RDMA_CM_EVENT_ADDR_RESOLVED, 0);
	drop(id);
}

static void calls_out_of_place_fail(void)
{
	struct rdma_cm_id *id = new_id(RDMA_PS_TCP), *l = listening(RDMA_PS_TCP, 1), *none;
	struct rdma_conn_param param = {0};
	struct ibv_qp_attr attr = {.qp_state = IBV_QPS_RTR};
	uint8_t byte = 40;
	int mask, on = 1;

	FAILS(rdma_create_id(channel, &none, NULL, RDMA_PS_IPOIB), EPROTONOSUPPORT);
	FAILS(rdma_connect(id, &param), EINVAL);
	FAILS(rdma_accept(id, &param), EINVAL);
	FAILS(rdma_reject(id, NULL, 0), EINVAL);
	FAILS(rdma_disconnect(id), EINVAL);
	FAILS(rdma_establish(id), EINVAL);
	FAILS(rdma_notify(id, IBV_EVENT_COMM_EST), EINVAL);
	FAILS(rdma_resolve_route(id, 100), EINVAL);
	FAILS(rdma_init_qp_attr(id, &attr, &mask), EINVAL);
	FAILS(rdma_join_multicast(id, addr_of("239.1.2.3", 0), NULL), EINVAL); /* not a datagram id */
	FAILS(rdma_leave_multicast(id, addr_of("239.1.2.3", 0)), EADDRNOTAVAIL);
	FAILS(rdma_get_request(l, &none), EINVAL); /* not a synchronous one */
	FAILS(rdma_listen(l, 1), EINVAL);
	FAILS(rdma_set_option(id, RDMA_OPTION_IB, RDMA_OPTION_IB_PATH, &on, sizeof(on)), ENOSYS);
	FAILS(rdma_set_option(id, RDMA_OPTION_ID, RDMA_OPTION_ID_TOS, &on, sizeof(on)), EINVAL);
	FAILS(rdma_set_option(id, RDMA_OPTION_ID, RDMA_OPTION_ID_ACK_TIMEOUT, &byte, 1), EINVAL);
	FAILS(rdma_set_option(l, RDMA_OPTION_ID, RDMA_OPTION_ID_AFONLY, &on, sizeof(on)), EINVAL);
	FAILS(rdma_set_option(l, RDMA_OPTION_ID, RDMA_OPTION_ID_REUSEADDR, &on, sizeof(on)), EINVAL);
	drop(id);
	drop(l);
}

/* ---- connections -------------------------------------------------------------------------------------- */

static void a_rejection_brings_reason_and_data(void)
{
	struct rdma_conn_param param = {.private_data = "hello", .private_data_len = 5, .retry_count = 3};
	struct rdma_cm_id *c = resolved(RDMA_PS_TCP, PORT), *l, *s;
	struct rdma_cm_event *ev;

	add_qp(c, IBV_QPT_RC);
	CHECK_EQ(rdma_connect(c, &param), 0);
	expect(RDMA_CM_EVENT_REJECTED, 8); /* nobody listens: invalid service id */
	drop(c);
	l = listening(RDMA_PS_TCP, 1);
	c = resolved(RDMA_PS_TCP, PORT);
	add_qp(c, IBV_QPT_RC);
	CHECK_EQ(rdma_connect(c, &param), 0);
	s = requested("hello");
	CHECK_EQ(rdma_reject(s, "no room", 7), 0);
	ev = next(RDMA_CM_EVENT_REJECTED);
	CHECK_EQ(ev->status, 28); /* consumer defined */
	CHECK_EQ(ev->param.conn.private_data_len, 148);
	CHECK_EQ(memcmp(ev->param.conn.private_data, "no room", 7), 0);
	CHECK_EQ(rdma_ack_cm_event(ev), 0);
	drop(s);
	drop(c);
	drop(l);
}

static void a_refused_id_does_not_connect_again(void)
{
	struct rdma_conn_param param = {.qp_num = 5};
	struct rdma_cm_id *c = resolved(RDMA_PS_TCP, PORT), *l, *s;

	FAILS(rdma_connect(c, NULL), EINVAL); /* from which QP? */
	CHECK_EQ(rdma_connect(c, &param), 0);
	expect(RDMA_CM_EVENT_REJECTED, 8);
	FAILS(rdma_connect(c, &param), EINVAL);
	FAILS(rdma_resolve_route(c, 1000), EINVAL);
	FAILS(rdma_establish(c), EINVAL);
	CHECK_EQ(rdma_disconnect(c), 0); /* nothing to do */
	drop(c);
	l = listening(RDMA_PS_TCP, 1);
	c = resolved(RDMA_PS_TCP, PORT);
	CHECK_EQ(rdma_connect(c, &param), 0);
	s = requested(NULL);
	FAILS(rdma_accept(s, NULL), EINVAL);
	FAILS(rdma_notify(s, IBV_EVENT_PATH_MIG), EINVAL);
	FAILS(rdma_notify(s, IBV_EVENT_QP_FATAL), EINVAL);
	CHECK_EQ(rdma_reject_ece(s, NULL, 0), 0);
	expect(RDMA_CM_EVENT_REJECTED, 35); /* vendor option not supported */
	FAILS(rdma_reject(s, NULL, 0), EINVAL);
	FAILS(rdma_accept(s, &param), EINVAL);
	drop(s);
	drop(c);
	drop(l);
}

static void a_request_that_was_taken_back_cannot_be_accepted(void)
{
	struct rdma_conn_param param = {.qp_num = 5};
	struct rdma_cm_id *l = listening(RDMA_PS_TCP, 2), *c = resolved(RDMA_PS_TCP, PORT), *s, *later;
	struct rdma_cm_id *again = resolved(RDMA_PS_TCP, PORT);
	struct ibv_qp_init_attr init;
	struct ibv_qp_attr attr;

	CHECK_EQ(rdma_connect(c, &param), 0);
	s = requested(NULL);
	add_qp(s, IBV_QPT_RC);
	drop(c);
	param.qp_num = 6;
	CHECK_EQ(rdma_connect(again, &param), 0);
	later = requested(NULL); /* with no event before it */
	FAILS(rdma_accept(s, &param), EINVAL);
	CHECK_EQ(ibv_query_qp(s->qp, &attr, IBV_QP_STATE, &init), 0);
	CHECK_EQ(attr.qp_state, IBV_QPS_ERR);
	drop(s);
	drop(later);
	expect(RDMA_CM_EVENT_REJECTED, 28);
	drop(again);
	drop(l);
}

static void a_datagram_service_refuses_by_status(void)
{
	struct rdma_conn_param param = {.private_data = "hello", .private_data_len = 5};
	struct rdma_cm_id *l = listening(RDMA_PS_UDP, 1), *c = resolved(RDMA_PS_UDP, PORT), *s;

	add_qp(c, IBV_QPT_UD);
	CHECK_EQ(rdma_connect(c, &param), 0);
	s = requested("hello");
	CHECK_EQ(rdma_reject(s, NULL, 0), 0);
	expect(RDMA_CM_EVENT_UNREACHABLE, 2);
	drop(s);
	drop(c);
	c = resolved(RDMA_PS_UDP, PORT + 1);
	add_qp(c, IBV_QPT_UD);
	CHECK_EQ(rdma_connect(c, &param), 0);
	expect(RDMA_CM_EVENT_UNREACHABLE, 1); /* nobody listens */
	drop(c);
	drop(l);
}

static void the_programs_own_qps_connect(void)
{
	struct rdma_conn_param param = {.qp_num = 0x123, .retry_count = 7};
	struct rdma_cm_id *l = listening(RDMA_PS_TCP, 1), *c = resolved(RDMA_PS_TCP, PORT), *s;
	struct ibv_qp_attr attr = {.qp_state = IBV_QPS_RTR};
	struct rdma_cm_event *ev;
	int mask = 0;

	CHECK_EQ(rdma_connect(c, &param), 0);
	s = requested(NULL);
	CHECK_EQ(rdma_init_qp_attr(s, &attr, &mask), 0);
	CHECK_EQ(attr.dest_qp_num, 0x123);
	CHECK(mask & IBV_QP_DEST_QPN && mask & IBV_QP_AV);
	param.qp_num = 0x456;
	CHECK_EQ(rdma_accept(s, &param), 0);
	ev = next(RDMA_CM_EVENT_CONNECT_RESPONSE);
	CHECK_EQ(ev->param.conn.qp_num, 0x456);
	CHECK_EQ(rdma_ack_cm_event(ev), 0);
	/* Data has come before the RTU, which then says nothing new. */
	CHECK_EQ(rdma_notify(s, IBV_EVENT_COMM_EST), 0);
	expect(RDMA_CM_EVENT_ESTABLISHED, 0);
	FAILS(rdma_notify(s, IBV_EVENT_COMM_EST), EISCONN);
	CHECK_EQ(rdma_establish(c), 0);
	FAILS(rdma_establish(c), EINVAL);
	CHECK_EQ(rdma_disconnect(c), 0);
	expect(RDMA_CM_EVENT_DISCONNECTED, 0);
	CHECK_EQ(rdma_disconnect(s), 0);
	expect(RDMA_CM_EVENT_DISCONNECTED, 0);
	drop(s);
	drop(c);
	drop(l);
}

/* On the same port as another listener, and a request finds the one of its space. */
static void ps_ib_is_a_port_space_of_its_own(void)
{
	struct rdma_conn_param param = {.retry_count = 7};
	struct rdma_cm_id *tcp = listening(RDMA_PS_TCP, 1), *ib = listening(RDMA_PS_IB, 1);
	const enum rdma_port_space spaces[] = {RDMA_PS_IB, RDMA_PS_TCP};
	struct rdma_cm_id *again = new_id(RDMA_PS_IB);

	FAILS(rdma_bind_addr(again, addr_of("0.0.0.0", PORT)), EADDRNOTAVAIL);
	drop(again);
	for (int i = 0; i < 2; i++) {
		struct rdma_cm_id *c = resolved(spaces[i], PORT), *s;
		struct rdma_cm_event *ev;

		add_qp(c, IBV_QPT_RC);
		CHECK_EQ(rdma_connect(c, &param), 0);
		ev = next(RDMA_CM_EVENT_CONNECT_REQUEST);
		CHECK(ev->listen_id == (i ? tcp : ib));
		s = ev->id;
		CHECK_EQ(s->ps, spaces[i]);
		CHECK_EQ(rdma_ack_cm_event(ev), 0);
		add_qp(s, IBV_QPT_RC);
		CHECK_EQ(rdma_accept(s, &param), 0);
		expect(RDMA_CM_EVENT_ESTABLISHED, 0);
		expect(RDMA_CM_EVENT_ESTABLISHED, 0);
		CHECK_EQ(rdma_disconnect(c), 0);
		expect(RDMA_CM_EVENT_DISCONNECTED, 0);
		CHECK_EQ(rdma_disconnect(s), 0);
		expect(RDMA_CM_EVENT_DISCONNECTED, 0);
		drop(c);
		drop(s);
	}
	drop(tcp);
	drop(ib);
}

static void requests_beyond_the_backlog_come_later(void)
{
	struct rdma_conn_param param = {.qp_num = 5};
	struct rdma_cm_id *l = listening(RDMA_PS_TCP, 1), *c[3], *s[3];
	struct pollfd p = {.events = POLLIN};

	for (int i = 0; i < 3; i++)
		c[i] = resolved(RDMA_PS_TCP, PORT);
	for (int i = 0; i < 3; i++) {
		param.qp_num = (uint32_t)(5 + i);
		CHECK_EQ(rdma_connect(c[i], &param), 0);
	}
	p.fd = channel->fd;
	for (int i = 0; i < 3; i++) { /* one at a time; a repetition brings the next */
		CHECK_EQ(poll(&p, 1, 10000), 1);
		s[i] = requested(NULL);
	}
	for (int i = 0; i < 3; i++) { /* whose turn it was is a matter of time */
		struct rdma_cm_event *ev;
		struct rdma_cm_id *id;

		drop(s[i]);
		ev = next(RDMA_CM_EVENT_REJECTED);
		CHECK_EQ(ev->status, 28);
		id = ev->id;
		CHECK(id == c[0] || id == c[1] || id == c[2]);
		CHECK_EQ(rdma_ack_cm_event(ev), 0);
		drop(id);
	}
	drop(l);
}

static void an_id_takes_its_events_to_another_channel(void)
{
	struct rdma_event_channel *first, *second;
	struct rdma_cm_id *id = new_id(RDMA_PS_TCP);
	struct pollfd p = {.events = POLLIN};

	CHECK_EQ(rdma_resolve_addr(id, NULL, addr_of("127.0.0.1", PORT), 1000), 0);
	first = channel;
	CHECK(second = rdma_create_event_channel());
	CHECK_EQ(rdma_migrate_id(id, second), 0);
	CHECK(id->channel == second);
	p.fd = first->fd;
	CHECK_EQ(poll(&p, 1, 0), 0);
	channel = second;
	expect(RDMA_CM_EVENT_ADDR_RESOLVED, 0);
	drop(id);
	rdma_destroy_event_channel(first);
}

/* ---- QPs, SRQs, inline functions, groups ------------------------------------------------------------------ */

static void messages_through_a_shared_receive_queue(void)
{
	struct rdma_conn_param param = {.retry_count = 7, .rnr_retry_count = 7};
	struct rdma_cm_id *l = listening(RDMA_PS_TCP, 1), *c = resolved(RDMA_PS_TCP, PORT), *s;
	struct ibv_srq_init_attr srq = {.attr = {.max_wr = 4, .max_sge = 1}};
	struct ibv_qp_init_attr_ex ex = {.qp_type = IBV_QPT_RC, .cap = {4, 4, 1, 1, 0}};
	static uint8_t out[64] = "data", in[64];
	struct ibv_mr *mr_out, *mr_in;
	struct ibv_wc wc;

	CHECK_EQ(rdma_create_qp_ex(c, &ex), 0);
	FAILS(rdma_create_qp_ex(c, &ex), EINVAL); /* it has one */
	CHECK(mr_out = rdma_reg_msgs(c, out, sizeof(out)));
	CHECK_EQ(rdma_connect(c, &param), 0);
	s = requested(NULL);
	CHECK_EQ(rdma_create_srq(s, NULL, &srq), 0);
	FAILS(rdma_create_srq(s, NULL, &srq), EINVAL);
	add_qp(s, IBV_QPT_RC);
	CHECK(s->qp->srq == s->srq);
	CHECK(mr_in = rdma_reg_msgs(s, in, sizeof(in)));
	CHECK_EQ(rdma_post_recv(s, in, in, sizeof(in), mr_in), 0);
	CHECK_EQ(rdma_accept(s, &param), 0);
	expect(RDMA_CM_EVENT_ESTABLISHED, 0);
	expect(RDMA_CM_EVENT_ESTABLISHED, 0);
	CHECK_EQ(rdma_post_send(c, NULL, out, sizeof(out), mr_out, IBV_SEND_SIGNALED), 0);
	CHECK_EQ(rdma_get_send_comp(c, &wc), 1);
	CHECK_EQ(wc.status, IBV_WC_SUCCESS);
	CHECK_EQ(rdma_get_recv_comp(s, &wc), 1);
	CHECK(wc.wr_id == (uintptr_t)in && wc.byte_len == sizeof(in));
	CHECK_EQ(memcmp(in, out, sizeof(in)), 0);
	CHECK_EQ(rdma_dereg_mr(mr_in), 0);
	CHECK_EQ(rdma_dereg_mr(mr_out), 0);
	rdma_destroy_qp(s);
	rdma_destroy_srq(s);
	drop(s);
	expect(RDMA_CM_EVENT_DISCONNECTED, 0); /* ending an id disconnects */
	drop(c);
	drop(l);
}

static void a_group_is_joined_once_and_left(void)
{
	struct rdma_cm_join_mc_attr_ex ex = {.comp_mask = RDMA_CM_JOIN_MC_ATTR_ADDRESS,
					     .addr = addr_of("239.1.2.4", 0)};
	struct rdma_cm_id *id = new_id(RDMA_PS_UDP);
	struct rdma_cm_event *ev;
	int context;

	CHECK_EQ(rdma_bind_addr(id, addr_of("127.0.0.1", 0)), 0);
	add_qp(id, IBV_QPT_UD);
	CHECK_EQ(rdma_join_multicast(id, addr_of("239.1.2.3", 0), &context), 0);
	ev = next(RDMA_CM_EVENT_MULTICAST_JOIN);
	CHECK_EQ(ev->status, 0);
	CHECK(ev->param.ud.private_data == &context);
	CHECK_EQ(ev->param.ud.qp_num, 0xffffff);
	CHECK_EQ(ev->param.ud.qkey, RDMA_UDP_QKEY);
	CHECK_EQ(ev->param.ud.ah_attr.is_global, 1);
	CHECK_EQ(ev->param.ud.ah_attr.grh.dgid.raw[12], 239);
	CHECK_EQ(ev->param.ud.ah_attr.grh.dgid.raw[11], 0xff);
	CHECK_EQ(rdma_ack_cm_event(ev), 0);
	CHECK_EQ(rdma_leave_multicast(id, addr_of("239.1.2.3", 0)), 0);
	FAILS(rdma_leave_multicast(id, addr_of("239.1.2.3", 0)), EADDRNOTAVAIL);
	FAILS(rdma_join_multicast_ex(id, &ex, NULL), EINVAL); /* no flags */
	ex.comp_mask |= RDMA_CM_JOIN_MC_ATTR_JOIN_FLAGS;
	ex.join_flags = RDMA_MC_JOIN_FLAG_SENDONLY_FULLMEMBER;
	CHECK_EQ(rdma_join_multicast_ex(id, &ex, NULL), 0);
	CHECK_EQ(rdma_leave_multicast(id, ex.addr), 0); /* the event not fetched: it goes, too */
	CHECK_EQ(rdma_join_multicast(id, addr_of("239.1.2.5", 0), NULL), 0);
	expect(RDMA_CM_EVENT_MULTICAST_JOIN, 0);
	CHECK_EQ(rdma_leave_multicast(id, addr_of("239.1.2.5", 0)), 0);
	drop(id);
}

static void addresses_are_translated(void)
{
	struct rdma_addrinfo hints = {.ai_flags = RAI_PASSIVE, .ai_port_space = RDMA_PS_UDP}, *res;

	CHECK_EQ(rdma_getaddrinfo("127.0.0.1", "7500", &hints, &res), 0);
	CHECK(res->ai_src_addr && !res->ai_dst_addr);
	CHECK_EQ(res->ai_port_space, RDMA_PS_UDP);
	CHECK_EQ(res->ai_qp_type, IBV_QPT_UD);
	rdma_freeaddrinfo(res);
	hints = (struct rdma_addrinfo){.ai_src_addr = addr_of("127.0.0.1", 9),
				       .ai_src_len = sizeof(struct sockaddr_in)};
	CHECK_EQ(rdma_getaddrinfo(NULL, NULL, &hints, &res), 0); /* hands them on */
	CHECK_EQ(res->ai_src_len, sizeof(struct sockaddr_in));
	CHECK(!res->ai_dst_addr);
	rdma_freeaddrinfo(res);
	CHECK_EQ(rdma_getaddrinfo("127.0.0.1", "7500", NULL, &res), 0);
	CHECK(res->ai_dst_addr && res->ai_qp_type == IBV_QPT_RC);
	rdma_freeaddrinfo(res);
	FAILS(rdma_getaddrinfo(NULL, NULL, NULL, &res), EINVAL);
}

/* rdma-core 59 and later, whose names an older librdmacm does not have: found as a newer program finds them. */
#define NEWER(name, ...) __typeof__(int (*)(__VA_ARGS__)) name = dlsym(RTLD_DEFAULT, #name)

static void addresses_are_translated_by_an_event(void)
{
	NEWER(rdma_resolve_addrinfo, struct rdma_cm_id *, const char *, const char *,
	      const struct rdma_addrinfo *);
	NEWER(rdma_query_addrinfo, struct rdma_cm_id *, struct rdma_addrinfo **);
	const struct rdma_addrinfo administrator = {.ai_flags = 0x10};
	struct rdma_cm_id *id = new_id(RDMA_PS_TCP), *kept = new_id(RDMA_PS_TCP);
	struct rdma_addrinfo *res;

	CHECK(rdma_resolve_addrinfo && rdma_query_addrinfo);
	FAILS(rdma_query_addrinfo(id, &res), ENOENT);
	FAILS(rdma_resolve_addrinfo(id, NULL, "7500", &administrator), EOPNOTSUPP);
	FAILS(rdma_resolve_addrinfo(id, "no such name", "7500", NULL), EADDRNOTAVAIL);
	FAILS(rdma_resolve_addrinfo(id, NULL, NULL, NULL), EINVAL);
	CHECK_EQ(rdma_resolve_addrinfo(id, "127.0.0.1", "7500", NULL), 0);
	FAILS(rdma_resolve_addrinfo(id, "127.0.0.1", "7500", NULL), EBUSY);
	expect((enum rdma_cm_event_type)(RDMA_CM_EVENT_TIMEWAIT_EXIT + 1), 0);
	CHECK_EQ(rdma_query_addrinfo(id, &res), 0);
	CHECK(res->ai_dst_addr && res->ai_qp_type == IBV_QPT_RC);
	CHECK_EQ(rdma_resolve_addr(id, NULL, res->ai_dst_addr, 1000), 0);
	expect(RDMA_CM_EVENT_ADDR_RESOLVED, 0);
	rdma_freeaddrinfo(res);
	FAILS(rdma_query_addrinfo(id, &res), ENOENT);
	CHECK_EQ(rdma_resolve_addrinfo(kept, "127.0.0.1", "7500", NULL), 0);
	drop(kept); /* with what nobody has asked for */
	drop(id);
}

static void a_program_may_send_itself_an_event(void)
{
	NEWER(rdma_write_cm_event, struct rdma_cm_id *, enum rdma_cm_event_type, int, uint64_t);
	const enum rdma_cm_event_type user = (enum rdma_cm_event_type)(RDMA_CM_EVENT_TIMEWAIT_EXIT + 3);
	struct rdma_cm_id *id = new_id(RDMA_PS_TCP);
	struct rdma_cm_event *ev;
	uint64_t arg;

	CHECK(rdma_write_cm_event);
	FAILS(rdma_write_cm_event(id, RDMA_CM_EVENT_ESTABLISHED, 0, 1), EINVAL);
	CHECK_EQ(rdma_write_cm_event(id, user, 7, 0x123456789abcdef), 0);
	ev = next(user);
	memcpy(&arg, &ev->param, sizeof(arg));
	CHECK(ev->id == id && ev->status == 7 && arg == 0x123456789abcdef);
	CHECK_EQ(rdma_ack_cm_event(ev), 0);
	drop(id);
}

/* Told at once, or by the event, as the kernel does; the id may try again. */
static void wrong_addresses_are_told(void)
{
	struct sockaddr_in6 six = {.sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT};
	struct sockaddr other = {.sa_family = AF_UNIX};
	struct rdma_cm_id *id = new_id(RDMA_PS_TCP);

	FAILS(rdma_resolve_addr(id, NULL, NULL, 1000), EINVAL);
	FAILS(rdma_resolve_addr(id, NULL, &other, 1000), EINVAL);
	FAILS(rdma_bind_addr(id, NULL), EINVAL);
	FAILS(rdma_bind_addr(id, &other), EINVAL);
	FAILS(rdma_resolve_addr(id, addr_of("192.0.2.1", 0), addr_of("127.0.0.1", PORT), 1000),
	      EADDRNOTAVAIL);
	FAILS(rdma_resolve_route(id, 1000), EINVAL); /* no address yet */
	CHECK_EQ(rdma_bind_addr(id, addr_of("0.0.0.0", 0)), 0);
	FAILS(rdma_resolve_addr(id, NULL, (struct sockaddr *)&six, 1000), EINVAL); /* of another family */
	FAILS(rdma_resolve_addr(id, NULL, addr_of("192.0.2.1", PORT), 1000), ENETUNREACH);
	CHECK_EQ(rdma_resolve_addr(id, NULL, addr_of("127.0.0.1", PORT), 1000), 0);
	expect(RDMA_CM_EVENT_ADDR_RESOLVED, 0);
	FAILS(rdma_resolve_addr(id, NULL, addr_of("127.0.0.1", PORT), 1000), EINVAL); /* resolved already */
	FAILS(rdma_connect(id, NULL), EINVAL);					      /* no route yet */
	FAILS(rdma_listen(id, 1), EINVAL);
	drop(id);
}

/* The device has no address of that family: told by the event. The network namespace is this program's own. */
static void a_family_without_an_address_is_told_by_the_event(void)
{
	struct sockaddr_in6 six = {.sin6_family = AF_INET6, .sin6_port = htons(PORT)};
	FILE *off = fopen("/proc/sys/net/ipv6/conf/all/disable_ipv6", "w");
	struct rdma_cm_id *id;

	if (off) { /* else there is no IPv6 at all */
		CHECK(fputs("1", off) >= 0);
		CHECK_EQ(fclose(off), 0);
	}
	id = new_id(RDMA_PS_TCP);
	CHECK_EQ(inet_pton(AF_INET6, "2001:db8::1", &six.sin6_addr), 1);
	CHECK_EQ(rdma_resolve_addr(id, NULL, (struct sockaddr *)&six, 1000), 0);
	expect(RDMA_CM_EVENT_ADDR_ERROR, -ENODEV);
	drop(id);
}

/* As the kernel's cma_use_port: whatever the address, and before it is looked who has the port. */
static void reserved_ports_need_the_capability(void)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3] = {{0}};
	struct rdma_cm_id *a = new_id(RDMA_PS_TCP), *b = new_id(RDMA_PS_TCP), *u = new_id(RDMA_PS_UDP);

	CHECK_EQ(rdma_bind_addr(a, addr_of("127.0.0.1", 1023)), 0);
	CHECK_EQ(syscall(SYS_capget, &header, data), 0);
	data[0].effective &= ~(1u << CAP_NET_BIND_SERVICE);
	CHECK_EQ(syscall(SYS_capset, &header, data), 0);
	FAILS(rdma_bind_addr(b, addr_of("127.0.0.1", 1023)), EACCES);
	FAILS(rdma_bind_addr(b, addr_of("0.0.0.0", 1)), EACCES);
	FAILS(rdma_bind_addr(b, addr_of("192.0.2.1", 1)), EADDRNOTAVAIL);
	FAILS(rdma_bind_addr(u, addr_of("127.0.0.1", 1023)), EACCES);
	CHECK_EQ(rdma_bind_addr(b, addr_of("127.0.0.1", 1024)), 0);
	CHECK_EQ(rdma_bind_addr(u, addr_of("127.0.0.1", 0)), 0);
	CHECK_EQ(rdma_listen(a, 1), 0); /* it has its port */
	drop(a);
	drop(b);
	drop(u);
}

static void ip(const char *args)
{
	char command[256];

	snprintf(command, sizeof(command), "ip %s", args);
	CHECK_EQ(system(command), 0);
}

static void expect_source(struct rdma_cm_id *id, const char *own)
{
	const struct sockaddr_in *sin = (const struct sockaddr_in *)(const void *)rdma_get_local_addr(id);
	char text[INET_ADDRSTRLEN];

	CHECK(inet_ntop(AF_INET, &sin->sin_addr, text, sizeof(text)));
	CHECK(!strcmp(text, own));
	CHECK(!memcmp(id->route.addr.addr.ibaddr.sgid.raw + 12, &sin->sin_addr, 4));
	drop(id);
}

/* Of several addresses in as many networks each reaches its own; one that is named is kept. */
static void the_source_is_the_routes(void)
{
	struct rdma_cm_id *id;

	unsetenv("LD_PRELOAD"); /* ip needs no device */
	unsetenv("MIGROCE_ADDR");
	setenv("MIGROCE_IFACE", "mgp0", 1);
	ip("link add mgp0 type veth peer name mgp1");
	ip("link set mgp1 up");
	ip("link set mgp0 up");
	ip("address add 10.98.0.1/24 dev mgp0");
	ip("address add 10.98.1.1/24 dev mgp0");
	ip("neighbour add 10.98.0.9 lladdr 02:00:00:00:00:09 dev mgp0");
	ip("neighbour add 10.98.1.9 lladdr 02:00:00:00:00:09 dev mgp0");
	id = new_id(RDMA_PS_TCP);
	CHECK_EQ(rdma_resolve_addr(id, NULL, addr_of("10.98.1.9", PORT), 1000), 0);
	expect(RDMA_CM_EVENT_ADDR_RESOLVED, 0);
	expect_source(id, "10.98.1.1");
	id = new_id(RDMA_PS_TCP);
	CHECK_EQ(rdma_resolve_addr(id, NULL, addr_of("10.98.0.9", PORT), 1000), 0);
	expect(RDMA_CM_EVENT_ADDR_RESOLVED, 0);
	expect_source(id, "10.98.0.1");
	id = new_id(RDMA_PS_TCP);
	CHECK_EQ(rdma_resolve_addr(id, addr_of("10.98.1.1", 0), addr_of("10.98.0.9", PORT), 1000), 0);
	expect(RDMA_CM_EVENT_ADDR_RESOLVED, 0);
	expect_source(id, "10.98.1.1");
	id = new_id(RDMA_PS_TCP);
	FAILS(rdma_bind_addr(id, addr_of("10.98.1.2", PORT)), EADDRNOTAVAIL);
	CHECK_EQ(rdma_bind_addr(id, addr_of("10.98.1.1", PORT)), 0);
	drop(id);
}

TV_MAIN(T(addresses_are_translated_by_an_event), T(the_source_is_the_routes),
	T(ps_ib_is_a_port_space_of_its_own), T(reserved_ports_need_the_capability),
	T(a_program_may_send_itself_an_event), T(wrong_addresses_are_told),
	T(a_family_without_an_address_is_told_by_the_event), T(ports_are_given_and_kept),
	T(what_cannot_be_reached_is_told), T(calls_out_of_place_fail), T(a_rejection_brings_reason_and_data),
	T(a_refused_id_does_not_connect_again), T(a_request_that_was_taken_back_cannot_be_accepted),
	T(a_datagram_service_refuses_by_status), T(the_programs_own_qps_connect),
	T(requests_beyond_the_backlog_come_later), T(an_id_takes_its_events_to_another_channel),
	T(messages_through_a_shared_receive_queue), T(a_group_is_joined_once_and_left),
	T(addresses_are_translated))
