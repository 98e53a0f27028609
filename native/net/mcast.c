// SPDX-License-Identifier: BSD-3-Clause
/*
 * mcast.c - membership in multicast groups: the sockets follow the engine's list.
 *
 * A wildly bound socket joins by itself; the kernel gives a multicast datagram to every socket that
 * has joined, past any reuseport steering. A socket that is bound to one address never hears a group:
 * then each group has a socket of its own, bound to the group's address, which several processes
 * may do at once (SO_REUSEADDR), looked at by epoll as those of further addresses are.
 */
#include "net/net.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static bool v4(const struct mg_member *m)
{
	return mg_gid_is_v4(m->addr.gid);
}

static int change_v4(const struct mg_device *dev, int fd, const struct mg_addr *addr, bool join)
{
	struct ip_mreqn req = {.imr_ifindex = (int)dev->port.ifindex};

	memcpy(&req.imr_multiaddr, addr->gid + 12, 4);
	return setsockopt(fd, IPPROTO_IP, join ? IP_ADD_MEMBERSHIP : IP_DROP_MEMBERSHIP, &req, sizeof(req))
		       ? errno
		       : 0;
}

static int change_v6(const struct mg_device *dev, int fd, const struct mg_addr *addr, bool join)
{
	struct ipv6_mreq req = {.ipv6mr_interface = dev->port.ifindex};

	memcpy(&req.ipv6mr_multiaddr, addr->gid, 16);
	return setsockopt(fd, IPPROTO_IPV6, join ? IPV6_JOIN_GROUP : IPV6_LEAVE_GROUP, &req, sizeof(req))
		       ? errno
		       : 0;
}

/* A socket bound to the group. */
static int open_own(struct mg_device *dev, struct mg_member *m)
{
	struct sockaddr_in sin = {.sin_family = AF_INET, .sin_port = htons(MG_ROCE_PORT)};
	const int on = 1;
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0), ret;

	if (fd < 0)
		return errno;
	memcpy(&sin.sin_addr, m->addr.gid + 12, 4);
	if (setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &on, sizeof(on)) ||
	    bind(fd, (struct sockaddr *)&sin, sizeof(sin)))
		ret = errno;
	else
		ret = change_v4(dev, fd, &m->addr, true);
	if (!ret)
		ret = mg_net_watch_also(dev->net, fd);
	if (ret) {
		close(fd);
		return ret;
	}
	mg_progress_wake(dev); /* it must wait for this one, too */
	mg_net_tune(fd);
	m->own = (struct mg_sock){.fd = fd, .sport = MG_ROCE_PORT};
	memcpy(m->own.gid, m->addr.gid, 16);
	if (dev->net->want_header)
		mg_net_tell_header(fd, true);
	return 0;
}

static int join(struct mg_device *dev, struct mg_member *m)
{
	const struct mg_sock *s = &dev->net->sock[v4(m) ? MG_V4 : MG_V6];

	if (s->fd < 0) /* nor are there further ones */
		return EAFNOSUPPORT;
	if (!v4(m))
		return change_v6(dev, s->fd, &m->addr, true);
	return s->wild ? change_v4(dev, s->fd, &m->addr, true) : open_own(dev, m);
}

static void leave(struct mg_device *dev, struct mg_member *m)
{
	const struct mg_sock *s = &dev->net->sock[v4(m) ? MG_V4 : MG_V6];

	if (m->own.fd >= 0)
		close(m->own.fd);
	else if (s->fd >= 0)
		(void)(v4(m) ? change_v4 : change_v6)(dev, s->fd, &m->addr, false);
}

static bool wanted(const struct mg_device *dev, const struct mg_addr *addr)
{
	struct mg_addr group;

	for (uint32_t i = 0; mg_mcast_group(dev->engine, i, &group); i++)
		if (!memcmp(&group, addr, sizeof(group)))
			return true;
	return false;
}

static bool member(const struct mg_net *net, const struct mg_addr *addr)
{
	for (unsigned i = 0; i < net->n_member; i++)
		if (!memcmp(&net->member[i].addr, addr, sizeof(*addr)))
			return true;
	return false;
}

int mg_net_mcast_sync(struct mg_device *dev)
{
	struct mg_net *net = dev->net;
	struct mg_addr group;
	int ret = 0;

	if (!mg_net_open(net)) /* stopped: joined when there are sockets again */
		return 0;
	for (unsigned i = net->n_member; i--;) {
		if (wanted(dev, &net->member[i].addr))
			continue;
		leave(dev, &net->member[i]);
		net->member[i] = net->member[--net->n_member];
	}
	for (uint32_t i = 0; mg_mcast_group(dev->engine, i, &group); i++) {
		struct mg_member m = {.addr = group, .own.fd = -1};
		int err;

		if (member(net, &group))
			continue;
		err = net->n_member == MG_MAX_MCAST ? ENOMEM : join(dev, &m);
		if (!err)
			net->member[net->n_member++] = m;
		else if (!ret)
			ret = err;
	}
	return ret;
}

void mg_net_mcast_close(struct mg_net *net)
{
	for (unsigned i = 0; i < net->n_member; i++)
		if (net->member[i].own.fd >= 0)
			close(net->member[i].own.fd);
	net->n_member = 0;
}
