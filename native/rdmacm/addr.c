/* SPDX-License-Identifier: BSD-3-Clause */
/* addr.c - addresses: binding, resolving, listening on a port. */
#include "rdmacm/mgc.h"

#include <arpa/inet.h>
#include <infiniband/sa.h>
#include <linux/capability.h>
#include <netinet/in.h>
#include <stdlib.h>
#include <sys/random.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Ports that nobody asked for by number: 32768 to 60999, as Linux has them. */
#define PORT_FIRST 32768u
#define PORT_COUNT 28224u
#define PORT_RESERVED 1024u /* below: the kernel's PROT_SOCK */

bool mgc_gid_of(const struct sockaddr *sa, struct mg_addr *gid)
{
	if (sa->sa_family == AF_INET) {
		memset(gid->gid, 0, 10);
		memset(gid->gid + 10, 0xff, 2);
		memcpy(gid->gid + 12, &((const struct sockaddr_in *)(const void *)sa)->sin_addr, 4);
		return true;
	}
	if (sa->sa_family == AF_INET6) {
		memcpy(gid->gid, &((const struct sockaddr_in6 *)(const void *)sa)->sin6_addr, 16);
		return true;
	}
	return false;
}

void mgc_sockaddr(const uint8_t gid[16], uint16_t port, struct sockaddr_storage *sa)
{
	memset(sa, 0, sizeof(*sa));
	if (mg_gid_is_v4(gid)) {
		struct sockaddr_in *sin = (struct sockaddr_in *)sa;

		sin->sin_family = AF_INET;
		sin->sin_port = htons(port);
		memcpy(&sin->sin_addr, gid + 12, 4);
	} else {
		struct sockaddr_in6 *sin6 = (struct sockaddr_in6 *)sa;

		sin6->sin6_family = AF_INET6;
		sin6->sin6_port = htons(port);
		memcpy(&sin6->sin6_addr, gid, 16);
	}
}

void mgc_tell_gids(struct rdma_addr *a)
{
	struct mg_addr src = {{0}}, dst = {{0}};

	mgc_gid_of(&a->src_addr, &src);
	mgc_gid_of(&a->dst_addr, &dst);
	memcpy(a->addr.ibaddr.sgid.raw, src.gid, sizeof(src.gid));
	memcpy(a->addr.ibaddr.dgid.raw, dst.gid, sizeof(dst.gid));
	a->addr.ibaddr.pkey = htons(0xffff);
}

socklen_t mgc_len(const struct sockaddr *sa)
{
	switch (sa->sa_family) {
	case AF_INET: return sizeof(struct sockaddr_in);
	case AF_INET6: return sizeof(struct sockaddr_in6);
	default: return 0;
	}
}

bool mgc_any(const struct sockaddr *sa)
{
	if (sa->sa_family == AF_INET)
		return ((const struct sockaddr_in *)(const void *)sa)->sin_addr.s_addr == htonl(INADDR_ANY);
	return sa->sa_family == AF_INET6 &&
	       IN6_IS_ADDR_UNSPECIFIED(&((const struct sockaddr_in6 *)(const void *)sa)->sin6_addr);
}

/*
 * As the kernel has it (cma_any_addr): loopback addresses mean any of ours, unless the device has that very
 * one. libfabric looks for devices by binding to "localhost".
 */
static bool any_of_ours(struct mg_device *dev, const struct sockaddr *sa)
{
	const struct in6_addr *a6 = &((const struct sockaddr_in6 *)(const void *)sa)->sin6_addr;
	struct mg_addr gid;

	if (mgc_any(sa))
		return true;
	if (sa->sa_family == AF_INET) {
		if (ntohl(((const struct sockaddr_in *)(const void *)sa)->sin_addr.s_addr) >> 24 !=
		    IN_LOOPBACKNET)
			return false;
	} else if (!IN6_IS_ADDR_LOOPBACK(a6)) {
		return false;
	}
	return mgc_gid_of(sa, &gid) && mgc_gid_index(dev, &gid) == MGC_NO_GID;
}

/* The port is at the same place in both families. */
uint16_t mgc_port(const struct sockaddr *sa)
{
	return mgc_len(sa) ? ntohs(((const struct sockaddr_in *)(const void *)sa)->sin_port) : 0;
}

uint64_t mgc_service(const struct mgc_id *id, uint16_t port)
{
	switch (id->ib.ps) {
	case RDMA_PS_UDP: return MG_IP_PREFIX_UDP | port;
	case RDMA_PS_IB: return MG_IP_PREFIX_IB | port;
	default: return MG_IP_PREFIX_TCP | port;
	}
}

void mgc_set_port(struct sockaddr *sa, uint16_t port)
{
	((struct sockaddr_in *)(void *)sa)->sin_port = htons(port);
}

static unsigned index_in(const struct mg_port *port, const struct mg_addr *gid)
{
	for (unsigned i = 0; i < port->n_gid; i++)
		if (!memcmp(port->gid[i].gid, gid->gid, sizeof(gid->gid)))
			return i;
	return MGC_NO_GID;
}

unsigned mgc_gid_index(struct mg_device *dev, const struct mg_addr *gid)
{
	struct mg_port port;

	mg_device_port(dev, &port);
	return index_in(&port, gid);
}

struct ibv_ah_attr mgc_ah_attr(const struct mgc_id *id, const struct mg_addr *own, const struct mg_addr *dst)
{
	unsigned index = index_in(&id->dev->port, own);
	struct ibv_ah_attr a = {.is_global = 1, .port_num = 1};

	memcpy(a.grh.dgid.raw, dst->gid, sizeof(dst->gid));
	if (index != MGC_NO_GID)
		a.grh.sgid_index = (uint8_t)index;
	a.grh.hop_limit = 64;
	a.grh.traffic_class = id->tos;
	return a;
}

/* What the routing table has packets to `dst` leave from. Connecting a UDP socket asks it and sends nothing. */
static bool routed(const struct sockaddr *dst, unsigned ifindex, struct mg_addr *own)
{
	struct sockaddr_storage to = {0}, self;
	struct sockaddr_in6 *d6 = (struct sockaddr_in6 *)&to;
	socklen_t len = sizeof(self);
	int fd = socket(dst->sa_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	bool found;

	if (fd < 0)
		return false;
	memcpy(&to, dst, mgc_len(dst));
	mgc_set_port((struct sockaddr *)&to, MG_ROCE_PORT);
	if (dst->sa_family == AF_INET6 && IN6_IS_ADDR_LINKLOCAL(&d6->sin6_addr))
		d6->sin6_scope_id = ifindex;
	found = !connect(fd, (struct sockaddr *)&to, mgc_len(dst)) &&
		!getsockname(fd, (struct sockaddr *)&self, &len) && mgc_gid_of((struct sockaddr *)&self, own);
	close(fd);
	return found;
}

/*
 * The address of ours that goes with `dst`: the route's, as in the kernel; if that is none of ours, the main one,
 * or, if that is of the other family, the first that is not (link-local ones, index 0, for link-local ones
 * only). False: there is none.
 */
static bool source_for(struct mg_device *dev, const struct sockaddr *dst, struct mg_addr *own)
{
	bool v4 = dst->sa_family == AF_INET;
	const struct sockaddr_in6 *d6 = (const struct sockaddr_in6 *)(const void *)dst;
	static const struct mg_addr none;
	struct mg_port port;

	mg_device_port(dev, &port);
	if (routed(dst, port.ifindex, own) && index_in(&port, own) != MGC_NO_GID)
		return true;
	for (unsigned i = !v4 && IN6_IS_ADDR_LINKLOCAL(&d6->sin6_addr) ? 0 : 1; i < port.n_gid; i++) {
		if (mg_gid_is_v4(port.gid[i].gid) == v4 && memcmp(&port.gid[i], &none, sizeof(none)) != 0) {
			*own = port.gid[i];
			return true;
		}
	}
	return false;
}

MGC_EXPORT __be16 rdma_get_src_port(struct rdma_cm_id *ib)
{
	return htons(mgc_port(&ib->route.addr.src_addr));
}

MGC_EXPORT __be16 rdma_get_dst_port(struct rdma_cm_id *ib)
{
	return htons(mgc_port(&ib->route.addr.dst_addr));
}

/* ---- bind --------------------------------------------------------------------------------------------------- */

/* IPv4 keeps to itself unless told otherwise, IPv6 does not. */
static struct mg_claim claim_of(const struct mgc_id *id, const struct sockaddr *sa, bool shared)
{
	struct mg_claim c = {.space = id->ib.ps == RDMA_PS_IB ? 2 : mgc_is_ud(id),
			     .port = mgc_port(sa),
			     .v6 = sa->sa_family == AF_INET6,
			     .only = id->only_set ? id->only : sa->sa_family == AF_INET,
			     .shared = shared};

	if (!mgc_any(sa))
		mgc_gid_of(sa, &c.addr);
	return c;
}

static int claim(struct mgc_id *id, const struct sockaddr *sa, bool shared)
{
	int err;

	id->claim = claim_of(id, sa, shared);
	err = mg_port_claim(id->dev, &id->claim);
	id->claimed = !err;
	return err;
}

int mgc_reclaim(struct mgc_id *id, bool listens)
{
	struct mg_claim want = claim_of(id, &id->ib.route.addr.src_addr, id->reuse && !listens);
	int err = id->claimed ? mg_port_change(id->dev, &id->claim, &want, listens) : 0;

	if (!err)
		id->claim = want;
	return err;
}

void mgc_unclaim(struct mgc_id *id)
{
	if (id->claimed)
		mg_port_unclaim(id->dev, &id->claim);
	id->claimed = false;
}

/* Lock held. A port that nobody asked for by number is not shared. */
static int pick_port(struct mgc_id *id, struct sockaddr *sa)
{
	uint32_t r;

	if (getrandom(&r, sizeof(r), 0) != sizeof(r))
		return EIO;
	for (uint32_t i = 0; i < PORT_COUNT; i++) {
		int err;

		mgc_set_port(sa, (uint16_t)(PORT_FIRST + (r + i) % PORT_COUNT));
		err = claim(id, sa, false);
		if (err != EADDRINUSE && err != EADDRNOTAVAIL)
			return err;
	}
	return EADDRNOTAVAIL;
}

/* CAP_NET_BIND_SERVICE, as the kernel asks for it (cma_use_port); where one cannot ask: yes. */
static bool may_have_reserved_ports(void)
{
	struct __user_cap_header_struct header = {.version = _LINUX_CAPABILITY_VERSION_3};
	struct __user_cap_data_struct data[_LINUX_CAPABILITY_U32S_3] = {{0}};

	return syscall(SYS_capget, &header, data) || (data[0].effective & 1u << CAP_NET_BIND_SERVICE);
}

static int bind_id(struct mgc_id *id, const struct sockaddr *addr)
{
	struct sockaddr_storage sa = {0};
	struct mg_addr want;
	int err;

	if (id->state != MGC_IDLE)
		return EINVAL;
	if (!mgc_len(addr))
		return EINVAL;
	memcpy(&sa, addr, mgc_len(addr));
	mgc_gid_of(addr, &want);
	if (any_of_ours(id->dev, addr)) {
		memset(&sa, 0, sizeof(sa));
		sa.ss_family = addr->sa_family;
		mgc_set_port((struct sockaddr *)&sa, mgc_port(addr));
	} else {
		if (mgc_gid_index(id->dev, &want) == MGC_NO_GID)
			return EADDRNOTAVAIL;
		err = mgc_attach(id);
		if (err)
			return err;
	}
	mg_device_lock(id->dev);
	if (!mgc_port(addr))
		err = pick_port(id, (struct sockaddr *)&sa);
	else if (mgc_port(addr) < PORT_RESERVED && !may_have_reserved_ports())
		err = EACCES;
	else
		err = claim(id, (struct sockaddr *)&sa, id->reuse);
	if (!err) {
		memcpy(&id->ib.route.addr.src_storage, &sa, sizeof(sa));
		id->state = MGC_BOUND;
		mgc_reclaim(id, false); /* a port just picked may be shared from now on */
	}
	mg_device_unlock(id->dev);
	return err;
}

MGC_EXPORT int rdma_bind_addr(struct rdma_cm_id *ib, struct sockaddr *addr)
{
	MGC_FORWARD(rdma_bind_addr, ib, addr);
	if (!addr)
		return mgc_err(EINVAL);
	return mgc_err(bind_id(mgc_id(ib), addr));
}

/* ---- resolve ------------------------------------------------------------------------------------------------ */

/* Whether there is a route: connecting a UDP socket asks the routing table and sends nothing. errno value. */
static int reachable(struct mgc_id *id, const struct mg_addr *own, const struct sockaddr *dst)
{
	struct sockaddr_storage src, to = {0};
	struct mg_port port;
	int fd, err = 0;

	mg_device_port(id->dev, &port);
	mgc_sockaddr(own->gid, 0, &src);
	memcpy(&to, dst, mgc_len(dst));
	mgc_set_port((struct sockaddr *)&to, MG_ROCE_PORT);
	if (dst->sa_family == AF_INET6) {
		struct sockaddr_in6 *s6 = (struct sockaddr_in6 *)&src, *d6 = (struct sockaddr_in6 *)&to;

		if (IN6_IS_ADDR_LINKLOCAL(&s6->sin6_addr))
			s6->sin6_scope_id = port.ifindex;
		if (IN6_IS_ADDR_LINKLOCAL(&d6->sin6_addr))
			d6->sin6_scope_id = port.ifindex;
	}
	fd = socket(dst->sa_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
	if (fd < 0)
		return errno;
	if (bind(fd, (struct sockaddr *)&src, mgc_len((struct sockaddr *)&src)) ||
	    connect(fd, (struct sockaddr *)&to, mgc_len(dst)))
		err = errno;
	close(fd);
	return err;
}

MGC_EXPORT int rdma_resolve_addr(struct rdma_cm_id *ib, struct sockaddr *src, struct sockaddr *dst,
				 int timeout_ms)
{
	struct sockaddr_storage any = {0}, to = {0};
	struct mgc_id *id;
	struct mg_addr own;
	int err = 0;

	MGC_FORWARD(rdma_resolve_addr, ib, src, dst, timeout_ms);
	id = mgc_id(ib);
	if (!dst || !mgc_len(dst))
		return mgc_err(EINVAL);
	any.ss_family = dst->sa_family;
	if (id->state == MGC_IDLE) {
		err = bind_id(id, src ? src : (struct sockaddr *)&any);
		if (err)
			return mgc_err(err);
	}
	if (id->state != MGC_BOUND || ib->route.addr.src_addr.sa_family != dst->sa_family)
		return mgc_err(EINVAL);
	memcpy(&to, dst, mgc_len(dst));
	if (!mgc_any(&ib->route.addr.src_addr))
		mgc_gid_of(&ib->route.addr.src_addr, &own);
	else if (!source_for(id->dev, dst, &own))
		err = ENODEV;
	if (!err && any_of_ours(id->dev, dst)) /* this machine, as everywhere */
		mgc_sockaddr(own.gid, mgc_port(dst), &to);
	/* As the kernel: no route is told at once, a device that is not there by the event. */
	if (!err) {
		bool same = mg_gid_is_v4(own.gid) == (to.ss_family == AF_INET);
		int no_route = same ? reachable(id, &own, (struct sockaddr *)&to) : EINVAL;

		if (no_route)
			return mgc_err(no_route);
		err = mgc_attach(id);
	}
	mg_device_lock(id->dev);
	if (!err) {
		struct sockaddr_storage from;

		mgc_sockaddr(own.gid, mgc_port(&ib->route.addr.src_addr), &from);
		memcpy(&ib->route.addr.src_storage, &from, sizeof(from));
		memcpy(&ib->route.addr.dst_storage, &to, sizeof(to));
		mgc_tell_gids(&ib->route.addr);
		id->state = MGC_ADDR;
		mgc_reclaim(id, false);
	}
	mgc_post(id, err ? RDMA_CM_EVENT_ADDR_ERROR : RDMA_CM_EVENT_ADDR_RESOLVED, -err);
	mg_device_unlock(id->dev);
	return mgc_complete(id);
}

/* What the subnet manager would say on InfiniBand; programs look at the GIDs and the MTU. */
static struct ibv_sa_path_rec *path_record(struct mgc_id *id)
{
	struct ibv_sa_path_rec *p = calloc(1, sizeof(*p));
	struct mg_port port;
	struct mg_addr src, dst;

	if (!p)
		return NULL;
	mg_device_port(id->dev, &port);
	mgc_gid_of(&id->ib.route.addr.dst_addr, &dst);
	mgc_gid_of(&id->ib.route.addr.src_addr, &src);
	memcpy(p->sgid.raw, src.gid, 16);
	memcpy(p->dgid.raw, dst.gid, 16);
	p->hop_limit = 64;
	p->traffic_class = id->tos;
	p->reversible = 1;
	p->numb_path = 1;
	p->pkey = htons(0xffff);
	p->mtu_selector = p->rate_selector = p->packet_life_time_selector = 2; /* exactly */
	p->mtu = (uint8_t)(__builtin_ctz(port.active_mtu) - 7);
	p->rate = IBV_RATE_10_GBPS;
	p->packet_life_time = 16;
	return p;
}

MGC_EXPORT int rdma_resolve_route(struct rdma_cm_id *ib, int timeout_ms)
{
	struct ibv_sa_path_rec *path;
	struct mgc_id *id;

	MGC_FORWARD(rdma_resolve_route, ib, timeout_ms);
	id = mgc_id(ib);
	if (id->state != MGC_ADDR)
		return mgc_err(EINVAL);
	path = path_record(id);
	if (!path)
		return mgc_err(ENOMEM);
	mg_device_lock(id->dev);
	id->state = MGC_ROUTE;
	free(ib->route.path_rec);
	ib->route.path_rec = path;
	ib->route.num_paths = 1;
	mgc_post(id, RDMA_CM_EVENT_ROUTE_RESOLVED, 0);
	mg_device_unlock(id->dev);
	return mgc_complete(id);
}

/* ---- listen -------------------------------------------------------------------------------------------------- */

MGC_EXPORT int rdma_listen(struct rdma_cm_id *ib, int backlog)
{
	struct sockaddr_storage any = {.ss_family = AF_INET};
	const struct sockaddr *sa;
	struct mg_addr bound = {{0}};
	struct mgc_id *id;
	uint64_t service;
	int err = 0;

	MGC_FORWARD(rdma_listen, ib, backlog);
	id = mgc_id(ib);
	if (id->state == MGC_IDLE)
		err = bind_id(id, (struct sockaddr *)&any);
	if (!err && id->state != MGC_BOUND)
		err = EINVAL;
	if (!err && !mgc_pd())
		err = errno;
	if (err)
		return mgc_err(err);
	sa = &ib->route.addr.src_addr;
	service = mgc_service(id, mgc_port(sa));
	mg_device_lock(id->dev);
	err = mgc_reclaim(id, true);
	if (!err)
		err = mgc_conn(id);
	if (!err) {
		if (!mgc_any(sa))
			mgc_gid_of(sa, &bound);
		id->conn->v4_only = sa->sa_family == AF_INET;
		id->conn->v6_only = sa->sa_family == AF_INET6 && id->only;
		err = mg_cm_listen(id->conn, service, &bound);
	}
	if (!err)
		err = mg_device_service(id->dev, (uint32_t)service, true);
	if (!err) {
		id->listed = true;
		id->backlog = backlog > 0 && backlog < MGC_BACKLOG_MAX ? backlog : MGC_BACKLOG_MAX;
		id->state = MGC_LISTEN;
	}
	mg_device_unlock(id->dev);
	return mgc_err(err);
}
