// SPDX-License-Identifier: BSD-3-Clause
/*
 * further.c - the interface's other IPv4 addresses: a socket each.
 *
 * Every IPv4 address of the interface is a GID that packets leave from and come to, as with rdma_rxe. Not by
 * one socket bound to any address: processes with an address each are side by side in a network namespace.
 * What is not the main socket is looked at by epoll, which costs those nothing who use the main address only.
 *
 * Without an agent we bind them ourselves; an address that somebody else has is not in the GID table. An agent
 * hands them out, as several processes share each address: it sends what it can with its WELCOME, and is
 * asked again when the interface's addresses change.
 */
#include "net/net.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

struct mg_sock *mg_further_of(struct mg_net *net, const uint8_t gid[16])
{
	for (unsigned i = 0; i < net->n_further; i++)
		if (!memcmp(net->further[i].gid, gid, 16))
			return &net->further[i];
	return NULL;
}

int mg_further_put(struct mg_net *net, const struct mg_sock *s)
{
	int ret;

	if (mg_further_of(net, s->gid))
		return EEXIST;
	if (net->n_further == MG_MAX_GID)
		return ENOSPC;
	ret = mg_net_watch_also(net, s->fd);
	if (!ret)
		net->further[net->n_further++] = *s;
	return ret;
}

static bool listed(const struct mg_port *port, const uint8_t gid[16])
{
	for (unsigned i = 1; i < port->n_gid; i++)
		if (!memcmp(port->gid[i].gid, gid, 16))
			return true;
	return false;
}

/* Whether an address needs a socket that it does not have. */
static bool missing(struct mg_net *net, const struct mg_addr *gid)
{
	return mg_gid_is_v4(gid->gid) && !mg_sock_has(&net->sock[MG_V4], gid->gid) &&
	       !mg_further_of(net, gid->gid);
}

void mg_further_sync(struct mg_device *dev, const struct mg_port *port, bool ask)
{
	struct mg_net *net = dev->net;
	bool tell = false;

	if (!mg_net_open(net))
		return;
	for (unsigned i = net->n_further; i--;) {
		if (listed(port, net->further[i].gid))
			continue;
		close(net->further[i].fd);
		net->further[i] = net->further[--net->n_further];
		tell = true;
	}
	for (unsigned i = 1; i < port->n_gid; i++) {
		if (!missing(net, &port->gid[i]))
			continue;
		if (!net->alone)
			tell = true;
		else if (!mg_net_bind_further(net, &port->gid[i]))
			mg_progress_wake(dev); /* it must wait for this one, too */
	}
	if (tell && ask && !net->alone && dev->control) {
		atomic_store(&dev->ask_addresses, true);
		mg_progress_wake(dev);
	}
}

void mg_further_close(struct mg_net *net)
{
	while (net->n_further)
		close(net->further[--net->n_further].fd);
}
