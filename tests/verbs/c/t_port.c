/* SPDX-License-Identifier: BSD-3-Clause */
/* The interface changes while the device is open: the port's state, the GID table, the events. */
#include "tv.h"

#include <arpa/inet.h>
#include <net/if.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <unistd.h>

static struct ibv_context *ctx;

static void ip(const char *args)
{
	char command[256];

	snprintf(command, sizeof(command), "ip %s", args);
	CHECK_EQ(system(command), 0);
}

/* The kernel notices a cable after a while. */
static void wait_running(const char *name)
{
	int fd = socket(AF_INET, SOCK_DGRAM, 0);
	struct ifreq ifr = {0};

	strcpy(ifr.ifr_name, name);
	do {
		usleep(1000);
		CHECK_EQ(ioctl(fd, SIOCGIFFLAGS, &ifr), 0);
	} while (!(ifr.ifr_flags & IFF_RUNNING));
	close(fd);
}

/* The kernel lets an address of IPv6 be used when its workqueue has come to it, without DAD, too. */
static void add6(const char *address)
{
	char args[128];

	snprintf(args, sizeof(args), "address add %s/64 dev mgp0 nodad", address);
	ip(args);
	while (system("ip -6 address show dev mgp0 tentative | grep -q inet6") == 0)
		usleep(1000);
}

/* An interface with one address. */
static void make_port(void)
{
	unsetenv("LD_PRELOAD"); /* ip needs no device */
	ip("link add mgp0 type veth peer name mgp1");
	ip("link set mgp0 addrgenmode none");
	ip("link set mgp0 mtu 2200 up");
	ip("link set mgp1 up");
	ip("address add 10.98.0.1/24 dev mgp0");
	wait_running("mgp0");
}

/* The device on one address of IPv4, and the interface's of IPv6. */
static void open_port(void)
{
	setenv("MIGROCE_ADDR", "10.98.0.1", 1);
	make_port();
	CHECK(ctx = tv_open());
}

/* The device on the interface with all its addresses, which are those given here alone. */
static void open_interface(void)
{
	unsetenv("MIGROCE_ADDR");
	setenv("MIGROCE_IFACE", "mgp0", 1);
	make_port();
	ip("address add 10.98.0.2/24 dev mgp0");
	ip("address add 10.98.1.1/24 dev mgp0");
	CHECK(ctx = tv_open());
}

static bool told(void)
{
	return poll(&(struct pollfd){.fd = ctx->async_fd, .events = POLLIN}, 1, 0) == 1;
}

static void expect(enum ibv_event_type type)
{
	struct ibv_async_event ev;

	CHECK_EQ(ibv_get_async_event(ctx, &ev), 0);
	CHECK_EQ(ev.event_type, type);
	CHECK_EQ(ev.element.port_num, 1);
	ibv_ack_async_event(&ev);
}

static void expect_port(enum ibv_port_state state, int phys)
{
	struct ibv_port_attr attr;

	CHECK_EQ(ibv_query_port(ctx, 1, &attr), 0);
	CHECK_EQ(attr.state, state);
	CHECK_EQ(attr.phys_state, phys);
}

static void expect_gid(int index, const char *address)
{
	union ibv_gid want = {0}, gid;

	if (address)
		CHECK_EQ(inet_pton(AF_INET6, address, want.raw), 1);
	CHECK_EQ(ibv_query_gid(ctx, 1, index, &gid), 0);
	CHECK(!memcmp(&gid, &want, sizeof(gid)));
}

static void the_port_is_as_active_as_its_interface(void)
{
	open_port();
	expect_port(IBV_PORT_ACTIVE, 5);
	ip("link set mgp0 down");
	expect_port(IBV_PORT_DOWN, 3); /* asked at once, without waiting for the event */
	expect(IBV_EVENT_PORT_ERR);
	expect_gid(1, "::ffff:10.98.0.1"); /* an interface that is down keeps its IPv4 addresses */
	CHECK(!told());
	ip("link set mgp0 up");
	expect(IBV_EVENT_PORT_ACTIVE);
	expect_port(IBV_PORT_ACTIVE, 5);
	ip("link set mgp1 down"); /* the cable is pulled */
	expect(IBV_EVENT_PORT_ERR);
	expect_port(IBV_PORT_DOWN, 2);
	ip("link set mgp1 up");
	expect(IBV_EVENT_PORT_ACTIVE);
	ip("link set lo down"); /* none of ours */
	expect_port(IBV_PORT_ACTIVE, 5);
	CHECK(!told());
}

static void an_address_that_comes_is_a_gid_at_once(void)
{
	struct ibv_gid_entry table[16];
	struct ibv_ah_attr av = {.is_global = 1, .port_num = 1, .grh = {.sgid_index = 2, .hop_limit = 9}};
	struct ibv_pd *pd;
	struct ibv_ah *ah;

	open_port();
	CHECK(pd = ibv_alloc_pd(ctx));
	CHECK_EQ(inet_pton(AF_INET6, "fd98::9", av.grh.dgid.raw), 1);
	CHECK_ERRNO(ibv_create_ah(pd, &av), ENODATA);
	expect_gid(2, NULL);
	add6("fd98::1");
	expect_gid(2, "fd98::1");
	expect(IBV_EVENT_GID_CHANGE);
	CHECK(ah = ibv_create_ah(pd, &av));
	CHECK_EQ(ibv_destroy_ah(ah), 0);
	add6("fd98::2");
	expect(IBV_EVENT_GID_CHANGE);
	CHECK_EQ(ibv_query_gid_table(ctx, table, 16, 0), 4);
	CHECK_EQ(table[3].gid_index, 3);
	/* Nobody else's place changes when one goes, and the next takes its place. */
	ip("address del fd98::1/64 dev mgp0");
	expect_gid(2, NULL);
	expect_gid(3, "fd98::2");
	expect(IBV_EVENT_GID_CHANGE);
	CHECK_ERRNO(ibv_create_ah(pd, &av), ENODATA);
	CHECK_EQ(ibv_query_gid_table(ctx, table, 16, 0), 3);
	CHECK_EQ(table[2].gid_index, 3);
	add6("fd98::7");
	expect_gid(2, "fd98::7");
	expect_gid(3, "fd98::2");
	expect(IBV_EVENT_GID_CHANGE);
	ip("address add fd98::8/64 dev mgp1 nodad"); /* another interface's */
	expect_gid(4, NULL);
	CHECK(!told());
}

static void the_device_outlives_its_address(void)
{
	union ibv_gid none = {0};

	open_port();
	ip("address del 10.98.0.1/24 dev mgp0");
	expect(IBV_EVENT_GID_CHANGE);
	expect_gid(1, NULL);
	add6("fd98::1"); /* index 1 is kept for its own */
	expect(IBV_EVENT_GID_CHANGE);
	expect_gid(1, NULL);
	expect_gid(2, "fd98::1");
	ip("address add 10.98.0.1/24 dev mgp0");
	expect(IBV_EVENT_GID_CHANGE);
	expect_gid(1, "::ffff:10.98.0.1");
	ip("link del mgp0");
	expect(IBV_EVENT_PORT_ERR);
	expect(IBV_EVENT_GID_CHANGE);
	expect_port(IBV_PORT_DOWN, 3);
	expect_gid(1, NULL);
	CHECK_EQ(ibv_query_gid(ctx, 1, 0, &none), 0);
	CHECK(none.raw[0] == 0xfe); /* of the MAC */
	CHECK_EQ(ibv_close_device(ctx), 0);
}

static void the_mtu_follows(void)
{
	struct ibv_port_attr attr;

	open_port();
	CHECK_EQ(ibv_query_port(ctx, 1, &attr), 0);
	CHECK_EQ(attr.active_mtu, IBV_MTU_2048);
	ip("link set mgp0 mtu 1500");
	CHECK_EQ(ibv_query_port(ctx, 1, &attr), 0);
	CHECK_EQ(attr.active_mtu, IBV_MTU_1024);
	CHECK(!told());
}

/* In the kernel's order: a network's first address comes before its others. */
static void every_ipv4_address_is_a_gid(void)
{
	open_interface();
	expect_gid(1, "::ffff:10.98.0.1");
	expect_gid(2, "::ffff:10.98.1.1");
	expect_gid(3, "::ffff:10.98.0.2");
	expect_gid(4, NULL);
	ip("address add 10.98.2.1/24 dev mgp0");
	expect_gid(4, "::ffff:10.98.2.1");
	expect(IBV_EVENT_GID_CHANGE);
	ip("address del 10.98.1.1/24 dev mgp0");
	expect_gid(2, NULL);
	expect_gid(3, "::ffff:10.98.0.2");
	expect(IBV_EVENT_GID_CHANGE);
	ip("address add 10.98.3.1/24 dev mgp1"); /* another interface's */
	CHECK(!told());
	ip("address add 10.98.4.1/24 dev mgp0");
	expect_gid(2, "::ffff:10.98.4.1");
	expect(IBV_EVENT_GID_CHANGE);
}

static void an_address_of_somebody_elses_is_no_gid(void)
{
	struct sockaddr_in sin = {.sin_family = AF_INET, .sin_port = htons(4791)};
	int fd = socket(AF_INET, SOCK_DGRAM, 0);

	open_interface();
	ip("address add 10.98.2.1/32 dev lo");
	CHECK_EQ(inet_pton(AF_INET, "10.98.2.1", &sin.sin_addr), 1);
	CHECK_EQ(bind(fd, (struct sockaddr *)&sin, sizeof(sin)), 0);
	ip("address del 10.98.2.1/32 dev lo");
	ip("address add 10.98.2.1/24 dev mgp0");
	expect_gid(4, NULL);
	CHECK(!told());
	CHECK_EQ(close(fd), 0);
	ip("address add 10.98.3.1/24 dev mgp0"); /* looked at anew */
	expect_gid(4, "::ffff:10.98.2.1");
	expect_gid(5, "::ffff:10.98.3.1");
	expect(IBV_EVENT_GID_CHANGE);
}

static void one_address_that_was_asked_for_is_alone(void)
{
	open_port();
	ip("address add 10.98.2.1/24 dev mgp0");
	expect_gid(2, NULL);
	CHECK(!told());
}

/* From one to the other, as to anybody else; not from one that is gone, until it is back. */
static void a_connection_runs_between_any_two(void)
{
	struct tv_opt opt = {.unconnected = true};
	struct ibv_ah_attr av[2] = {{.is_global = 1, .port_num = 1}, {.is_global = 1, .port_num = 1}};
	struct tv_end a, b;
	struct ibv_sge sge;

	open_interface();
	tv_end_open(&a, ctx, &opt);
	tv_end_open(&b, ctx, &opt);
	av[0].grh.sgid_index = 2;
	av[1].grh.sgid_index = 3;
	CHECK_EQ(ibv_query_gid(ctx, 1, 3, &av[0].grh.dgid), 0);
	CHECK_EQ(ibv_query_gid(ctx, 1, 2, &av[1].grh.dgid), 0);
	for (int i = 0; i < 2; i++) {
		struct tv_end *e = i ? &b : &a, *other = i ? &a : &b;
		struct ibv_qp_attr attr = {.qp_state = IBV_QPS_RTR,
					   .ah_attr = av[i],
					   .path_mtu = IBV_MTU_1024,
					   .dest_qp_num = other->qp->qp_num,
					   .rq_psn = 0xfffff0,
					   .max_dest_rd_atomic = 1,
					   .min_rnr_timer = 1};

		tv_to_init(e->qp, &opt);
		CHECK_EQ(ibv_modify_qp(e->qp, &attr,
				       IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN |
					       IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC |
					       IBV_QP_MIN_RNR_TIMER),
			 0);
		CHECK_EQ(tv_to_rts(e->qp, &opt), 0);
	}
	for (int i = 0; i < 3; i++) {
		struct ibv_send_wr wr = tv_wr(&a, IBV_WR_SEND, 1, &sge, 0, 5000);

		CHECK_EQ(tv_recv(&b, 2, 8192, 5000), 0);
		CHECK_EQ(tv_post(&a, &wr), 0);
		tv_wait_ok(a.scq, 1);
		tv_wait_ok(b.rcq, 2);
		if (i == 0) {
			ip("address del 10.98.1.1/24 dev mgp0");
			expect_gid(2, NULL);
			ip("address add 10.98.1.1/24 dev mgp0");
			expect_gid(2, "::ffff:10.98.1.1");
		}
	}
	ip("address del 10.98.1.1/24 dev mgp0");
	expect_gid(2, NULL);
	{
		struct ibv_send_wr wr = tv_wr(&a, IBV_WR_SEND, 1, &sge, 0, 5000);

		CHECK_EQ(tv_post(&a, &wr), 0);
		CHECK_EQ(tv_wait(a.scq).status, IBV_WC_RETRY_EXC_ERR);
	}
	tv_end_close(&a);
	tv_end_close(&b);
}

TV_MAIN(T(every_ipv4_address_is_a_gid), T(an_address_of_somebody_elses_is_no_gid),
	T(one_address_that_was_asked_for_is_alone), T(a_connection_runs_between_any_two),
	T(the_port_is_as_active_as_its_interface), T(an_address_that_comes_is_a_gid_at_once),
	T(the_device_outlives_its_address), T(the_mtu_follows))
