// SPDX-License-Identifier: BSD-3-Clause
/*
 * udp.c - the device's UDP sockets: made here or taken over from the agent, and set up.
 *
 * The sockets stay unconnected on purpose: only then, with DF set, does the kernel send IP id 0
 * (0, 1, 2, ... for the segments of one GSO call), which the ICRC covers and we cannot see.
 *
 * SO_NO_CHECK (a zero UDP checksum, as the kernel's driver sends) is out: the kernel refuses
 * UDP_SEGMENT on such a socket (EINVAL) and GRO leaves packets without checksum alone.
 */
#include "net/net.h"

#include <errno.h>
#include <fcntl.h>
#include <netinet/udp.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif
#ifndef UDP_GRO
#define UDP_GRO 104
#endif

#define MG_RCVBUF (64 << 20) /* what UC and UD may have under way: nothing holds their senders back */
#define MG_SNDBUF (4 << 20)

#ifndef IPV6_MULTICAST_ALL
#define IPV6_MULTICAST_ALL 29
#endif
#ifndef IPV6_FLOWINFO
#define IPV6_FLOWINFO 11
#endif

/* Without an agent: as large as we are allowed to. The agent does the same for its sockets. */
static void grow_buffers(int fd)
{
	int rcv = MG_RCVBUF, snd = MG_SNDBUF;

	if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &rcv, sizeof(rcv)))
		setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &rcv, sizeof(rcv));
	if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &snd, sizeof(snd)))
		setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &snd, sizeof(snd));
}

void mg_net_tune(int fd)
{
	const int on = 1;

	grow_buffers(fd);
	setsockopt(fd, IPPROTO_UDP, UDP_GRO, &on, sizeof(on));
}

void mg_net_tell_header(int fd, bool v4)
{
	const int on = 1;

	setsockopt(fd, v4 ? IPPROTO_IP : IPPROTO_IPV6, v4 ? IP_RECVTTL : IPV6_RECVHOPLIMIT, &on, sizeof(on));
	setsockopt(fd, v4 ? IPPROTO_IP : IPPROTO_IPV6, v4 ? IP_RECVTOS : IPV6_FLOWINFO, &on, sizeof(on));
}

void mg_net_want_header(struct mg_device *dev)
{
	struct mg_net *net = dev->net;

	if (net->want_header)
		return;
	net->want_header = true; /* and after a move, too: set_up */
	for (int i = 0; i < MG_FAMILIES; i++)
		if (net->sock[i].fd >= 0)
			mg_net_tell_header(net->sock[i].fd, i == MG_V4);
	for (unsigned i = 0; i < net->n_further; i++)
		mg_net_tell_header(net->further[i].fd, true);
}

/* What its bound address tells: family, port, address. The options do not survive CRIU: set anew. */
static int set_up(struct mg_net *net, int fd, struct mg_sock *s)
{
	union {
		struct sockaddr sa;
		struct sockaddr_in v4;
		struct sockaddr_in6 v6;
	} name;
	socklen_t len = sizeof(name);
	const int on = 1, off = 0;
	int type = 0, df, flags;
	socklen_t type_len = sizeof(type);
	bool v4;

	*s = (struct mg_sock){.fd = fd, .tos = -1};
	if (getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &type_len) || type != SOCK_DGRAM)
		return EINVAL;
	memset(&name, 0, sizeof(name));
	if (getsockname(fd, &name.sa, &len))
		return errno;
	v4 = name.sa.sa_family == AF_INET;
	if (v4) {
		s->wild = name.v4.sin_addr.s_addr == htonl(INADDR_ANY);
		memset(s->gid, 0, 10);
		memset(s->gid + 10, 0xff, 2);
		memcpy(s->gid + 12, &name.v4.sin_addr, 4);
		s->sport = ntohs(name.v4.sin_port);
		df = IP_PMTUDISC_DO;
		if (setsockopt(fd, IPPROTO_IP, IP_MTU_DISCOVER, &df, sizeof(df)))
			return errno;
		if (s->wild && setsockopt(fd, IPPROTO_IP, IP_PKTINFO, &on, sizeof(on)))
			return errno;
	} else if (name.sa.sa_family == AF_INET6) {
		s->wild = IN6_IS_ADDR_UNSPECIFIED(&name.v6.sin6_addr);
		memcpy(s->gid, &name.v6.sin6_addr, 16);
		s->sport = ntohs(name.v6.sin6_port);
		df = IPV6_PMTUDISC_DO;
		if (setsockopt(fd, IPPROTO_IPV6, IPV6_MTU_DISCOVER, &df, sizeof(df)))
			return errno;
		if (s->wild && setsockopt(fd, IPPROTO_IPV6, IPV6_RECVPKTINFO, &on, sizeof(on)))
			return errno;
		/* RoCE has the ICRC: other implementations send checksum 0 over IPv6, too (IBA A17.3.1). */
		if (setsockopt(fd, IPPROTO_UDP, UDP_NO_CHECK6_RX, &on, sizeof(on)))
			return errno;
	} else {
		return EINVAL;
	}
	if (s->sport == 0)
		return EINVAL;
	flags = fcntl(fd, F_GETFL);
	if (flags < 0 || fcntl(fd, F_SETFL, flags | O_NONBLOCK) || fcntl(fd, F_SETFD, FD_CLOEXEC))
		return errno;
	/* Optional: without them it is one packet per call. */
	setsockopt(fd, IPPROTO_UDP, UDP_GRO, &on, sizeof(on));
	/* Off: a way to see single packets in a capture, or out of a driver's trouble with GSO. */
	net->gso = !getenv("MIGROCE_NO_GSO");
	/* Only what it has joined itself: other processes' groups are not for this one. */
	if (v4)
		setsockopt(fd, IPPROTO_IP, IP_MULTICAST_ALL, &off, sizeof(off));
	else
		setsockopt(fd, IPPROTO_IPV6, IPV6_MULTICAST_ALL, &off, sizeof(off));
	if (net->want_header)
		mg_net_tell_header(fd, v4);
	return 0;
}

/* The first of its family is the main one; a further one of IPv4 is another address's. */
static int take_in(struct mg_net *net, int fd)
{
	struct mg_sock s, *main;
	int ret = set_up(net, fd, &s);

	if (ret)
		return ret;
	main = &net->sock[mg_gid_is_v4(s.gid) ? MG_V4 : MG_V6];
	if (main->fd < 0)
		*main = s;
	else if (main == &net->sock[MG_V4] && !main->wild && !s.wild && memcmp(s.gid, main->gid, 16) != 0)
		ret = mg_further_put(net, &s);
	else
		ret = EINVAL;
	return ret;
}

struct mg_net *mg_net_new(void)
{
	struct mg_net *net = calloc(1, sizeof(*net));

	if (!net)
		return NULL;
	for (int i = 0; i < MG_FAMILIES; i++)
		net->sock[i].fd = -1;
	net->watch = -1;
	net->ports = mg_ports_new();
	if (!net->ports) {
		free(net);
		return NULL;
	}
	atomic_init(&net->more_ep, -1);
	return net;
}

void mg_net_free(struct mg_net *net)
{
	if (!net)
		return;
	mg_net_close(net);
	mg_ports_free(net->ports);
	free(net);
}

void mg_net_close(struct mg_net *net)
{
	int ep = atomic_exchange(&net->more_ep, -1);

	mg_net_mcast_close(net);
	mg_further_close(net);
	if (ep >= 0)
		close(ep);
	mg_watch_close(net);
	mg_ports_close(net->ports);
	net->rest.at = net->rest.len;
	for (int i = 0; i < MG_FAMILIES; i++) {
		if (net->sock[i].fd >= 0)
			close(net->sock[i].fd);
		net->sock[i].fd = -1;
	}
}

static int bind_v4(struct mg_net *net, const struct mg_addr *addr)
{
	struct sockaddr_in sin = {.sin_family = AF_INET, .sin_port = htons(MG_ROCE_PORT)};
	int fd, ret;

	memcpy(&sin.sin_addr, addr->gid + 12, 4);
	fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return errno;
	grow_buffers(fd);
	ret = bind(fd, (struct sockaddr *)&sin, sizeof(sin)) ? errno : take_in(net, fd);
	if (ret)
		close(fd);
	return ret;
}

/* Wild, because a link-local and a global address may both be in use. */
static int bind_v6(struct mg_net *net)
{
	struct sockaddr_in6 sin6 = {
		.sin6_family = AF_INET6, .sin6_port = htons(MG_ROCE_PORT), .sin6_addr = IN6ADDR_ANY_INIT};
	const int on = 1;
	int fd, ret;

	fd = socket(AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (fd < 0)
		return errno;
	grow_buffers(fd);
	if (setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof(on)) ||
	    bind(fd, (struct sockaddr *)&sin6, sizeof(sin6)))
		ret = errno;
	else
		ret = take_in(net, fd);
	if (ret)
		close(fd);
	return ret;
}

int mg_net_watch_also(struct mg_net *net, int fd)
{
	struct epoll_event ev = {.events = EPOLLIN, .data.fd = fd};
	int ep = atomic_load(&net->more_ep);

	if (ep < 0) {
		ep = epoll_create1(EPOLL_CLOEXEC);
		if (ep < 0)
			return errno;
		atomic_store(&net->more_ep, ep);
	}
	return epoll_ctl(ep, EPOLL_CTL_ADD, fd, &ev) ? errno : 0;
}

int mg_net_bind_further(struct mg_net *net, const struct mg_addr *addr)
{
	return bind_v4(net, addr);
}

int mg_net_bind(struct mg_net *net, const struct mg_addr *addr)
{
	int ret;

	net->alone = true;
	if (!mg_gid_is_v4(addr->gid))
		return bind_v6(net);
	ret = bind_v4(net, addr);
	if (!ret)
		bind_v6(net); /* for peers that chose a link-local GID; nothing is lost without */
	return ret;
}

int mg_net_adopt(struct mg_net *net, const int *fds, size_t n)
{
	int ret = n ? 0 : EINVAL;

	net->alone = false;
	net->lazy_since = 0;
	for (size_t i = 0; i < n; i++) {
		int err = ret ? ret : take_in(net, fds[i]);

		if (err) {
			close(fds[i]);
			ret = err;
		}
	}
	if (ret)
		mg_net_close(net);
	return ret;
}

void mg_net_adopt_more(struct mg_net *net, const int *fds, size_t n)
{
	for (size_t i = 0; i < n; i++)
		if (take_in(net, fds[i]))
			close(fds[i]);
}

static bool can_send(struct mg_net *net, const struct mg_port *port, const struct mg_addr *gid)
{
	const struct mg_sock *s = &net->sock[mg_gid_is_v4(gid->gid) ? MG_V4 : MG_V6];

	return !memcmp(gid, &port->own, sizeof(*gid)) || mg_sock_has(s, gid->gid) ||
	       mg_further_of(net, gid->gid);
}

/* An IPv4 socket that is bound to one address cannot send from the interface's others. */
void mg_net_usable(struct mg_net *net, struct mg_port *port)
{
	unsigned n = 1;

	for (unsigned i = 1; i < port->n_gid; i++)
		if (can_send(net, port, &port->gid[i]))
			port->gid[n++] = port->gid[i];
	memset(port->gid + n, 0, sizeof(port->gid) - n * sizeof(port->gid[0]));
	port->n_gid = n;
}

/* GID 0 is listed, as every RoCE port lists it, but no source where the interface has no such address. */
void mg_net_gids(struct mg_device *dev)
{
	const struct mg_port *port = &dev->port;
	struct mg_addr usable[MG_MAX_GID] = {0};

	for (unsigned i = 0; i < port->n_gid; i++)
		if (can_send(dev->net, port, &port->gid[i]) && (i || port->link_local))
			usable[i] = port->gid[i];
	mg_set_gids(dev->engine, usable, port->n_gid);
}
