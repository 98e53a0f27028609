// SPDX-License-Identifier: BSD-3-Clause
/*
 * watch.c - the interface changes while the device is open: it goes down or up, gets and loses addresses.
 *
 * As with rdma_rxe the port's state is the interface's (IBV_EVENT_PORT_ERR, IBV_EVENT_PORT_ACTIVE), and the
 * GID table follows its addresses (IBV_EVENT_GID_CHANGE): an entry stays where it is as long as its
 * address is there, and a new address takes the first free one.
 *
 * The kernel tells by rtnetlink(7). Who asks for an attribute reads what it has told so far, so that the
 * answer is never older than the question; the progress thread reads for those who wait for events. The
 * socket is closed and opened with the others: there is none while the device is stopped.
 */
#include "net/net.h"

#include <errno.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <string.h>
#include <unistd.h>

#define MG_WATCH_ROUNDS 64u	  /* messages read at once: more are for the next time */
#define MG_SETTLE_NS 10000000000u /* for a container that has moved to be plugged in */

void mg_watch_open(struct mg_net *net)
{
	struct sockaddr_nl nl = {.nl_family = AF_NETLINK,
				 .nl_groups = RTMGRP_LINK | RTMGRP_IPV4_IFADDR | RTMGRP_IPV6_IFADDR};
	int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_ROUTE);

	if (fd >= 0 && bind(fd, (struct sockaddr *)&nl, sizeof(nl))) {
		close(fd);
		fd = -1;
	}
	net->watch = fd; /* without it the table stays as it was when the device was opened */
}

void mg_watch_close(struct mg_net *net)
{
	if (net->watch >= 0)
		close(net->watch);
	net->watch = -1;
	atomic_store(&net->settle, 0);
}

/* ---- the port's state ------------------------------------------------------------------------- */

void mg_watch_link(struct mg_device *dev, unsigned flags)
{
	bool was = mg_port_active(&dev->port), is;

	if (atomic_load(&dev->net->settle)) {
		if (!mg_flags_active(flags))
			return;
		atomic_store(&dev->net->settle, 0);
	}
	dev->port.flags = flags;
	is = mg_port_active(&dev->port);
	if (is != was)
		mg_device_event(is ? IBV_EVENT_PORT_ACTIVE : IBV_EVENT_PORT_ERR);
}

/* ---- the GID table ---------------------------------------------------------------------------- */

static bool unset(const struct mg_addr *gid)
{
	static const struct mg_addr zero;

	return !memcmp(gid, &zero, sizeof(zero));
}

static bool listed(const struct mg_port *port, const struct mg_addr *gid)
{
	for (unsigned i = 0; i < port->n_gid; i++)
		if (!memcmp(&port->gid[i], gid, sizeof(*gid)))
			return true;
	return false;
}

static void put(struct mg_port *port, const struct mg_addr *gid)
{
	unsigned i = MG_GID_MAIN;

	if (memcmp(gid, &port->own, sizeof(*gid)) != 0) /* whose place is kept */
		for (i++; i < port->n_gid && !unset(&port->gid[i]); i++)
			;
	if (i == sizeof(port->gid) / sizeof(port->gid[0]))
		return;
	port->gid[i] = *gid;
	if (i >= port->n_gid)
		port->n_gid = i + 1;
}

/* Lay out what is in `fresh`, in any order, as `port` has it already. */
static void keep_places(struct mg_port *fresh, const struct mg_port *port)
{
	const struct mg_port found = *fresh;

	memcpy(fresh->gid, port->gid, sizeof(fresh->gid));
	fresh->n_gid = port->n_gid;
	fresh->gid[0] = found.gid[0]; /* link-local, always */
	for (unsigned i = 1; i < fresh->n_gid; i++)
		if (!listed(&found, &fresh->gid[i]))
			memset(&fresh->gid[i], 0, sizeof(fresh->gid[i]));
	for (unsigned i = 1; i < found.n_gid; i++)
		if (!unset(&found.gid[i]) && !listed(fresh, &found.gid[i]))
			put(fresh, &found.gid[i]);
}

void mg_watch_look(struct mg_device *dev, bool ask)
{
	struct mg_port fresh;
	bool changed;

	if (mg_addr_look(&dev->port, &fresh))
		return;
	mg_further_sync(dev, &fresh, ask);
	mg_net_usable(dev->net, &fresh);
	keep_places(&fresh, &dev->port);
	changed = memcmp(fresh.gid, dev->port.gid, sizeof(fresh.gid)) != 0;
	mg_watch_link(dev, fresh.flags);
	fresh.flags = dev->port.flags;
	dev->port = fresh;
	mg_set_path_mtu(dev->engine, fresh.active_mtu);
	if (!changed)
		return;
	mg_net_gids(dev);
	mg_device_event(IBV_EVENT_GID_CHANGE);
}

void mg_watch_moved(struct mg_device *dev, const struct mg_port *port)
{
	const struct mg_port before = dev->port;

	/* The new port is plugged in when the container runs: only one that stays down is a port that fails. */
	if (mg_port_active(&before) && !mg_port_active(port))
		atomic_store(&dev->net->settle, mg_now() + MG_SETTLE_NS);
	mg_watch_link(dev, port->flags);
	dev->port = *port;
	if (atomic_load(&dev->net->settle))
		dev->port.flags = before.flags;
	mg_set_path_mtu(dev->engine, port->active_mtu);
	mg_further_sync(dev, &dev->port, true);
	mg_net_usable(dev->net, &dev->port);
	mg_net_gids(dev);
	/* Entry 0 is made of the MAC, which is another one on each node, unless it is an address. */
	if (memcmp(before.gid + 1, dev->port.gid + 1, sizeof(before.gid) - sizeof(before.gid[0])) != 0 ||
	    ((before.link_local || dev->port.link_local) &&
	     memcmp(&before.gid[0], &dev->port.gid[0], sizeof(before.gid[0])) != 0))
		mg_device_event(IBV_EVENT_GID_CHANGE);
}

/* ---- what the kernel says ------------------------------------------------------------------------ */

/* True when addresses, MTU or the like have to be looked at. */
static bool heed(struct mg_device *dev, const struct nlmsghdr *h)
{
	const struct ifinfomsg *link = (const struct ifinfomsg *)NLMSG_DATA(h);

	switch (h->nlmsg_type) {
	case RTM_NEWADDR:
	case RTM_DELADDR: return true;
	case RTM_NEWLINK:
	case RTM_DELLINK: break;
	default: return false;
	}
	if (h->nlmsg_len < NLMSG_LENGTH(sizeof(*link)) || link->ifi_family != AF_UNSPEC ||
	    link->ifi_index != (int)dev->port.ifindex)
		return false;
	/* Each change is told, though the interface may be up again by now. */
	mg_watch_link(dev, h->nlmsg_type == RTM_DELLINK ? 0 : link->ifi_flags);
	return true;
}

static bool heed_all(struct mg_device *dev, const uint8_t *buf, size_t len)
{
	bool changed = false;

	while (len >= sizeof(struct nlmsghdr)) {
		const struct nlmsghdr *h = (const struct nlmsghdr *)(const void *)buf;
		size_t step = NLMSG_ALIGN(h->nlmsg_len);

		if (h->nlmsg_len < sizeof(*h) || h->nlmsg_len > len)
			break;
		changed |= heed(dev, h);
		if (step >= len)
			break;
		buf += step;
		len -= step;
	}
	return changed;
}

mg_time mg_watch_due(const struct mg_device *dev)
{
	mg_time at = atomic_load(&dev->net->settle);

	return at ? at : MG_NEVER;
}

void mg_watch_run(struct mg_device *dev)
{
	_Alignas(struct nlmsghdr) uint8_t buf[16384];
	bool changed = false;

	if (mg_watch_due(dev) <= mg_now()) {
		atomic_store(&dev->net->settle, 0);
		changed = true;
	}
	for (unsigned i = 0; i < MG_WATCH_ROUNDS && dev->net->watch >= 0; i++) {
		struct sockaddr_nl from = {0};
		socklen_t from_len = sizeof(from);
		ssize_t n =
			recvfrom(dev->net->watch, buf, sizeof(buf), 0, (struct sockaddr *)&from, &from_len);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0 && errno == ENOBUFS) { /* more happened than fits */
			changed = true;
			continue;
		}
		if (n < 0)
			break;
		if (!from.nl_pid) /* the kernel's word alone */
			changed |= heed_all(dev, buf, (size_t)n);
	}
	if (changed)
		mg_watch_look(dev, true);
}
