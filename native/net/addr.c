// SPDX-License-Identifier: BSD-3-Clause
/*
 * addr.c - which interface carries the device, its GID table and MTU.
 *
 * getifaddrs and interface ioctls only: neither sysfs nor /proc need to be mounted in a container.
 */
#include "net/net.h"

#include <arpa/inet.h>
#include <errno.h>
#include <ifaddrs.h>
#include <linux/ethtool.h>
#include <linux/if_packet.h>
#include <linux/sockios.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define MG_RXE_HEADERS 80u /* what rdma_rxe subtracts from the netdev MTU */

uint32_t mg_addr_rdma_mtu(uint32_t netdev_mtu)
{
	uint32_t mtu = 4096;

	while (mtu > 256 && mtu + MG_RXE_HEADERS > netdev_mtu)
		mtu /= 2;
	return mtu;
}

const char *mg_addr_print(const uint8_t gid[16], char *buf, size_t len)
{
	bool v4 = mg_gid_is_v4(gid);

	if (!inet_ntop(v4 ? AF_INET : AF_INET6, v4 ? gid + 12 : gid, buf, (socklen_t)len))
		buf[0] = '\0';
	return buf;
}

static bool gid_parse(const char *text, struct mg_addr *addr)
{
	memset(addr->gid, 0, 10);
	memset(addr->gid + 10, 0xff, 2);
	return inet_pton(AF_INET, text, addr->gid + 12) == 1 || inet_pton(AF_INET6, text, addr->gid) == 1;
}

/* False for families that are no GID. */
static bool gid_of(const struct sockaddr *sa, struct mg_addr *addr)
{
	if (!sa)
		return false;
	if (sa->sa_family == AF_INET) {
		memset(addr->gid, 0, 10);
		memset(addr->gid + 10, 0xff, 2);
		memcpy(addr->gid + 12, &((const struct sockaddr_in *)sa)->sin_addr, 4);
		return true;
	}
	if (sa->sa_family == AF_INET6) {
		memcpy(addr->gid, &((const struct sockaddr_in6 *)sa)->sin6_addr, 16);
		return true;
	}
	return false;
}

static bool link_local(const struct mg_addr *addr)
{
	return addr->gid[0] == 0xfe && (addr->gid[1] & 0xc0) == 0x80;
}

static const struct ifaddrs *find_addr(const struct ifaddrs *list, const struct mg_addr *want)
{
	struct mg_addr have;

	for (const struct ifaddrs *i = list; i; i = i->ifa_next)
		if (gid_of(i->ifa_addr, &have) && !memcmp(have.gid, want->gid, 16))
			return i;
	/* All of 127.0.0.0/8 is on lo, which shows 127.0.0.1 only. */
	if (mg_gid_is_v4(want->gid) && want->gid[12] == 127)
		for (const struct ifaddrs *i = list; i; i = i->ifa_next)
			if ((i->ifa_flags & IFF_LOOPBACK) && gid_of(i->ifa_addr, &have) &&
			    mg_gid_is_v4(have.gid))
				return i;
	return NULL;
}

/* The best address of an interface (NULL: of any that is up and no loopback): IPv4 before IPv6. */
static const struct ifaddrs *find_iface(const struct ifaddrs *list, const char *name)
{
	const struct ifaddrs *best = NULL;
	int best_score = 0;

	for (const struct ifaddrs *i = list; i; i = i->ifa_next) {
		struct mg_addr have;
		int score;

		if (!gid_of(i->ifa_addr, &have))
			continue;
		if (name ? strcmp(name, i->ifa_name) != 0
			 : !(i->ifa_flags & IFF_UP) || (i->ifa_flags & IFF_LOOPBACK))
			continue;
		score = mg_gid_is_v4(have.gid) ? 3 : link_local(&have) ? 1 : 2;
		/* A cable comes before none, but a link that is just coming up before lo. */
		score += i->ifa_flags & IFF_RUNNING ? 3 : 0;
		if (score > best_score) {
			best = i;
			best_score = score;
		}
	}
	return best;
}

/*
 * The address that packets to the world leave from. Connecting a UDP socket sends nothing; it only
 * asks the routing table. The targets are documentation addresses (RFC 5737, RFC 3849).
 */
static const struct ifaddrs *find_default_route(const struct ifaddrs *list)
{
	struct sockaddr_in v4 = {.sin_family = AF_INET, .sin_port = htons(MG_ROCE_PORT)};
	struct sockaddr_in6 v6 = {.sin6_family = AF_INET6, .sin6_port = htons(MG_ROCE_PORT)};
	const struct ifaddrs *found = NULL;

	inet_pton(AF_INET, "203.0.113.1", &v4.sin_addr);
	inet_pton(AF_INET6, "2001:db8::1", &v6.sin6_addr);
	for (int i = 0; i < 2 && !found; i++) {
		struct sockaddr *to = i ? (struct sockaddr *)&v6 : (struct sockaddr *)&v4;
		socklen_t len = i ? sizeof(v6) : sizeof(v4);
		union {
			struct sockaddr sa;
			struct sockaddr_in6 room;
		} self;
		struct mg_addr addr;
		int fd = socket(to->sa_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);

		if (fd < 0)
			continue;
		if (!connect(fd, to, len)) {
			len = sizeof(self);
			if (!getsockname(fd, &self.sa, &len) && gid_of(&self.sa, &addr))
				found = find_addr(list, &addr);
		}
		close(fd);
		if (found && (found->ifa_flags & IFF_LOOPBACK))
			found = NULL;
	}
	return found;
}

/* Speed in Mbit/s, 0 when the driver does not say. */
static uint64_t link_speed(int fd, struct ifreq *ifr)
{
	union {
		struct ethtool_link_settings req;
		uint32_t room[sizeof(struct ethtool_link_settings) / sizeof(uint32_t) + 3 * 127];
	} cmd;

	memset(&cmd, 0, sizeof(cmd));
	cmd.req.cmd = ETHTOOL_GLINKSETTINGS;
	/* The driver answers the first call with the number of words that it wants, negated. */
	ifr->ifr_data = (char *)&cmd;
	if (ioctl(fd, SIOCETHTOOL, ifr) || cmd.req.link_mode_masks_nwords >= 0)
		return 0;
	cmd.req.link_mode_masks_nwords = (int8_t)-cmd.req.link_mode_masks_nwords;
	cmd.req.cmd = ETHTOOL_GLINKSETTINGS;
	if (ioctl(fd, SIOCETHTOOL, ifr) || cmd.req.speed == (uint32_t)SPEED_UNKNOWN)
		return 0;
	return cmd.req.speed;
}

static int fill_link(struct mg_port *port)
{
	struct ifreq ifr;
	int ret = 0, fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	if (fd < 0)
		fd = socket(AF_INET6, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return errno;
	memset(&ifr, 0, sizeof(ifr));
	memcpy(ifr.ifr_name, port->ifname, sizeof(ifr.ifr_name));
	if (ioctl(fd, SIOCGIFMTU, &ifr)) {
		ret = errno;
		goto out;
	}
	port->netdev_mtu = (uint32_t)ifr.ifr_mtu;
	port->active_mtu = mg_addr_rdma_mtu(port->netdev_mtu);
	if (!ioctl(fd, SIOCGIFHWADDR, &ifr))
		memcpy(port->mac, ifr.ifr_hwaddr.sa_data, 6);
	port->link_mbps = link_speed(fd, &ifr);
out:
	close(fd);
	return ret;
}

static void add_gid(struct mg_port *port, const struct mg_addr *addr)
{
	for (unsigned i = 0; i < port->n_gid; i++)
		if (!memcmp(port->gid[i].gid, addr->gid, 16))
			return;
	if (port->n_gid < sizeof(port->gid) / sizeof(port->gid[0]))
		port->gid[port->n_gid++] = *addr;
}

bool mg_addr_single(void)
{
	const char *addr = getenv("MIGROCE_ADDR");

	return addr && *addr;
}

/*
 * 0: link-local, as on every RoCE port; 1: the address we use; then the interface's others. Several processes
 * that were given an address each are side by side: then nobody takes the others' ones.
 */
static void fill_gids(struct mg_port *port, const struct ifaddrs *list)
{
	struct mg_addr eui64 = {{0xfe, 0x80}}, have;
	bool single = mg_addr_single();

	memcpy(eui64.gid + 8, port->mac, 3);
	eui64.gid[8] ^= 2;
	eui64.gid[11] = 0xff;
	eui64.gid[12] = 0xfe;
	memcpy(eui64.gid + 13, port->mac + 3, 3);

	port->n_gid = 0;
	for (const struct ifaddrs *i = list; i && !port->n_gid; i = i->ifa_next)
		if (!strcmp(i->ifa_name, port->ifname) && gid_of(i->ifa_addr, &have) && link_local(&have))
			add_gid(port, &have);
	port->link_local = port->n_gid;
	if (!port->n_gid)
		add_gid(port, &eui64);
	if (find_addr(list, &port->own))
		add_gid(port, &port->own);
	for (int v4 = 1; v4 >= 0; v4--)
		for (const struct ifaddrs *i = list; i; i = i->ifa_next)
			if (!strcmp(i->ifa_name, port->ifname) && gid_of(i->ifa_addr, &have) &&
			    mg_gid_is_v4(have.gid) == v4 && !link_local(&have) && !(v4 && single))
				add_gid(port, &have);
}

int mg_addr_choose(const struct mg_addr *want, struct mg_port *port, struct mg_addr *addr)
{
	const char *env_addr = getenv("MIGROCE_ADDR"), *env_iface = getenv("MIGROCE_IFACE");
	const struct ifaddrs *chosen = NULL;
	struct ifaddrs *list = NULL;
	struct mg_port fresh = {0};
	struct mg_addr picked;
	int ret = 0;

	if (getifaddrs(&list))
		return errno;
	if (want || mg_addr_single()) {
		if (want)
			picked = *want;
		else if (!gid_parse(env_addr, &picked))
			ret = EINVAL;
		if (!ret)
			chosen = find_addr(list, &picked);
		if (!ret && !chosen)
			ret = EADDRNOTAVAIL;
	} else if (env_iface && *env_iface) {
		chosen = find_iface(list, env_iface);
		if (!chosen)
			ret = EADDRNOTAVAIL;
	} else {
		chosen = find_default_route(list);
		if (!chosen)
			chosen = find_iface(list, NULL);
		if (!chosen)
			chosen = find_iface(list, "lo");
		if (!chosen)
			ret = ENODEV;
	}
	if (ret)
		goto out;
	if (!want && !mg_addr_single())
		gid_of(chosen->ifa_addr, &picked);
	strncpy(fresh.ifname, chosen->ifa_name, sizeof(fresh.ifname) - 1);
	fresh.ifindex = if_nametoindex(fresh.ifname);
	fresh.flags = chosen->ifa_flags;
	fresh.own = picked;
	ret = fill_link(&fresh);
	if (ret)
		goto out;
	fill_gids(&fresh, list);
	*port = fresh;
	*addr = picked;
out:
	freeifaddrs(list);
	return ret;
}

int mg_addr_look(const struct mg_port *before, struct mg_port *now)
{
	const struct ifaddrs *on;
	struct ifaddrs *list;
	char name[IF_NAMESIZE];

	if (getifaddrs(&list))
		return errno;
	*now = *before;
	now->flags = 0;
	on = find_addr(list, &now->own);
	if (!on &&
	    if_indextoname(now->ifindex, name)) /* the interface itself is in the list, too (AF_PACKET) */
		for (on = list; on && strcmp(on->ifa_name, name) != 0;)
			on = on->ifa_next;
	if (on) {
		memset(now->ifname, 0, sizeof(now->ifname));
		strncpy(now->ifname, on->ifa_name, sizeof(now->ifname) - 1);
		now->ifindex = if_nametoindex(now->ifname);
		now->flags = on->ifa_flags;
		if (fill_link(now)) /* gone between the two */
			now->flags = 0;
	}
	fill_gids(now, list);
	freeifaddrs(list);
	return 0;
}
