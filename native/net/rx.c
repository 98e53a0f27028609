// SPDX-License-Identifier: BSD-3-Clause
/*
 * rx.c - from the sockets to the engine: one recvmsg takes a whole GRO train.
 */
#include "net/net.h"

#include <errno.h>
#include <poll.h>
#include <netinet/udp.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <time.h>

#ifndef UDP_GRO
#define UDP_GRO 104
#endif

/* A second socket without traffic for this long is looked at only now and then. */
#ifndef IPV6_FLOWINFO
#define IPV6_FLOWINFO 11
#endif

#define MG_HOT_NS 1000000000u
#define MG_COLD_POLLS 64u

union source {
	struct sockaddr sa;
	struct sockaddr_in v4;
	struct sockaddr_in6 v6;
};

/* What a UD receiver is shown of the IP header. */
static void describe_header(struct cmsghdr *c, struct mg_rx *meta)
{
	const void *data = CMSG_DATA(c);
	uint32_t flow;
	int value;

	if (c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_TOS) {
		memcpy(&meta->tclass, data, 1);
	} else if ((c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_TTL) ||
		   (c->cmsg_level == IPPROTO_IPV6 && c->cmsg_type == IPV6_HOPLIMIT)) {
		memcpy(&value, data, sizeof(value));
		meta->hop_limit = (uint8_t)value;
	} else if (c->cmsg_level == IPPROTO_IPV6 && c->cmsg_type == IPV6_FLOWINFO) {
		memcpy(&flow, data, sizeof(flow));
		meta->tclass = (uint8_t)(ntohl(flow) >> 20);
		meta->flow_label = ntohl(flow) & 0xfffff;
	}
}

/* Source, destination and segment size of what was received. False: not to be used. */
static bool describe(const struct mg_sock *s, struct msghdr *m, const union source *from, struct mg_rx *meta,
		     size_t *segment)
{
	bool have_dst = !s->wild;

	if (from->sa.sa_family == AF_INET && m->msg_namelen >= sizeof(from->v4)) {
		memset(meta->src.gid, 0, 10);
		memset(meta->src.gid + 10, 0xff, 2);
		memcpy(meta->src.gid + 12, &from->v4.sin_addr, 4);
		meta->sport = ntohs(from->v4.sin_port);
	} else if (from->sa.sa_family == AF_INET6 && m->msg_namelen >= sizeof(from->v6)) {
		memcpy(meta->src.gid, &from->v6.sin6_addr, 16);
		meta->sport = ntohs(from->v6.sin6_port);
	} else {
		return false;
	}
	memcpy(meta->dst.gid, s->gid, 16);
	for (struct cmsghdr *c = CMSG_FIRSTHDR(m); c; c = CMSG_NXTHDR(m, c)) {
		if (c->cmsg_level == IPPROTO_UDP && c->cmsg_type == UDP_GRO) {
			int size;

			memcpy(&size, CMSG_DATA(c), sizeof(size));
			if (size > 0)
				*segment = (size_t)size;
		} else if (c->cmsg_level == IPPROTO_IP && c->cmsg_type == IP_PKTINFO) {
			struct in_pktinfo info;

			memcpy(&info, CMSG_DATA(c), sizeof(info));
			memset(meta->dst.gid, 0, 10);
			memset(meta->dst.gid + 10, 0xff, 2);
			memcpy(meta->dst.gid + 12, &info.ipi_addr, 4);
			have_dst = true;
		} else if (c->cmsg_level == IPPROTO_IPV6 && c->cmsg_type == IPV6_PKTINFO) {
			struct in6_pktinfo info;

			memcpy(&info, CMSG_DATA(c), sizeof(info));
			memcpy(meta->dst.gid, &info.ipi6_addr, 16);
			have_dst = true;
		} else {
			describe_header(c, meta);
		}
	}
	return have_dst;
}

static bool rests(const struct mg_net *net)
{
	return net->rest.at < net->rest.len;
}

/* The packets of net->rest; what follows one that runs a receive queue dry is left there. */
static int take(struct mg_device *dev, mg_time now)
{
	struct mg_net *net = dev->net;
	struct mg_rx *meta = &net->rest.meta;
	struct mg_flow flow = {.sport = meta->sport, .dport = net->rest.dport, .df = true};
	int n = 0;

	memcpy(flow.src, meta->src.gid, 16);
	memcpy(flow.dst, meta->dst.gid, 16);
	for (; rests(net); n++) {
		size_t at = net->rest.at, left = net->rest.len - at;
		size_t part = left < net->rest.segment ? left : net->rest.segment;
		bool dry = mg_rx_dry(dev->engine);
		uint16_t id;

		net->rest.at += part;
		if (!mg_icrc_check(&flow, net->rx + at, part, &id)) {
			mg_count(dev->engine, MG_CNT_RX_ICRC, 1);
			continue;
		}
		/* Ids run on within a train, and mostly also where two trains were merged. */
		flow.ip_id = (uint16_t)(id + 1);
		meta->ip_id = id;
		mg_rx(dev->engine, now, meta, net->rx + at, part);
		if (!dry && mg_rx_dry(dev->engine)) {
			net->dry_until = now + MG_DRY_NS;
			return n + 1;
		}
	}
	return n;
}

static int receive(struct mg_device *dev, mg_time now, struct mg_sock *s)
{
	struct mg_net *net = dev->net;
	union source from;
	union {
		struct cmsghdr align;
		/* GRO, TTL, TOS or flow, PKTINFO at most. */
		uint8_t buf[3 * CMSG_SPACE(sizeof(int)) + CMSG_SPACE(sizeof(struct in6_pktinfo))];
	} ctl;
	struct iovec iov = {net->rx, sizeof(net->rx)};
	struct msghdr m = {.msg_name = &from,
			   .msg_namelen = sizeof(from),
			   .msg_iov = &iov,
			   .msg_iovlen = 1,
			   .msg_control = ctl.buf,
			   .msg_controllen = sizeof(ctl.buf)};
	ssize_t len = recvmsg(s->fd, &m, MSG_DONTWAIT);
	size_t segment;

	if (len < 0)
		return 0;
	s->hot = now;
	segment = (size_t)len;
	net->rest.meta = (struct mg_rx){0};
	if (len == 0 || (m.msg_flags & MSG_TRUNC) || !describe(s, &m, &from, &net->rest.meta, &segment)) {
		mg_count(dev->engine, MG_CNT_RX_MALFORMED, 1);
		return 1;
	}
	net->rest.at = 0;
	net->rest.len = (size_t)len;
	net->rest.segment = segment;
	net->rest.dport = s->sport;
	return take(dev, now);
}

static bool hot(mg_time traffic, mg_time now)
{
	return traffic && now - traffic < MG_HOT_NS;
}

/* The socket behind a descriptor of the epoll set. */
static struct mg_sock *more_sock(struct mg_net *net, int fd)
{
	for (unsigned i = 0; i < net->n_further; i++)
		if (net->further[i].fd == fd)
			return &net->further[i];
	for (unsigned i = 0; i < net->n_member; i++)
		if (net->member[i].own.fd == fd)
			return &net->member[i].own;
	return NULL;
}

/* From those sockets of further addresses and of multicast groups that have something. */
static int receive_more(struct mg_device *dev, mg_time now)
{
	struct mg_net *net = dev->net;
	struct epoll_event ev[8];
	int ready = epoll_wait(net->more_ep, ev, 8, 0), n = 0;

	for (int i = 0; i < ready; i++) {
		struct mg_sock *s = more_sock(net, ev[i].data.fd);

		if (s)
			n += receive(dev, now, s);
		net->more_hot = now;
		if (rests(net))
			break;
	}
	return n;
}

int mg_net_receive(struct mg_device *dev, mg_time now)
{
	struct mg_net *net = dev->net;
	struct mg_sock *v4 = &net->sock[MG_V4], *v6 = &net->sock[MG_V6];
	bool cold;
	int n = 0;

	net->looked = now;
	if (rests(net))
		return take(dev, now);
	if (v4->fd >= 0)
		n = receive(dev, now, v4);
	if (rests(net))
		return n;
	/* Each further socket costs a system call per poll: only while it is in use. */
	cold = ++net->idle_polls >= MG_COLD_POLLS;
	if (cold)
		net->idle_polls = 0;
	if (v6->fd >= 0 && (v4->fd < 0 || cold || hot(v6->hot, now)))
		n += receive(dev, now, v6);
	if (rests(net))
		return n;
	if (atomic_load_explicit(&net->more_ep, memory_order_relaxed) >= 0 &&
	    (cold || hot(net->more_hot, now)))
		n += receive_more(dev, now);
	return n;
}

bool mg_net_held(const struct mg_device *dev, mg_time now)
{
	return mg_rx_dry(dev->engine) && now < dev->net->dry_until;
}

void mg_net_timers(struct mg_device *dev, mg_time now, bool drained)
{
	mg_time due = mg_deadline(dev->engine);

	/* An acknowledgement that waits behind others in the socket is not late: we are. */
	if (due <= now && (drained || now - due >= MG_TIMER_LATE_NS))
		mg_timer(dev->engine, now);
}

/* How often the CPU has been taken from this thread. */
static long preemptions(void)
{
	struct rusage use;

	return getrusage(RUSAGE_THREAD, &use) ? 0 : use.ru_nivcsw;
}

static void wait_for_packet(struct mg_device *dev, mg_time now)
{
	const struct timespec wait = {.tv_nsec = MG_RELAX_NS};
	struct pollfd fd[MG_FAMILIES + 1];
	int ep, cancel_state;
	nfds_t n = 0;

	/* Polling is no cancellation point elsewhere, and the caller may have locks of its own. */
	pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &cancel_state);
	mg_device_lock(dev);
	for (int i = 0; i < MG_FAMILIES; i++)
		if (dev->net->sock[i].fd >= 0)
			fd[n++] = (struct pollfd){.fd = dev->net->sock[i].fd, .events = POLLIN};
	ep = atomic_load(&dev->net->more_ep);
	if (ep >= 0)
		fd[n++] = (struct pollfd){.fd = ep, .events = POLLIN};
	/* To the progress thread this is polling. */
	mg_note_poll(dev, now + MG_RELAX_NS);
	mg_device_unlock(dev);
	ppoll(fd, n, &wait, NULL);
	pthread_setcancelstate(cancel_state, NULL);
}

/* One more poll in vain; true once that has become a habit. */
static bool spinning(struct mg_net *net, mg_time now, mg_time last)
{
	unsigned spins = atomic_load_explicit(&net->spins, memory_order_relaxed);
	pthread_t self = pthread_self();

	if (atomic_load_explicit(&net->spinner, memory_order_relaxed) != self) {
		atomic_store_explicit(&net->spinner, self, memory_order_relaxed);
		spins = 0;
	} else if (spins >= MG_SPIN_POLLS) {
		return true;
	} else {
		spins = now < last + MG_SPIN_GAP_NS ? spins + 1 : 0;
	}
	if (spins == MG_SPIN_POLLS)
		atomic_store_explicit(&net->preempted, preemptions(), memory_order_relaxed);
	atomic_store_explicit(&net->spins, spins, memory_order_relaxed);
	return false;
}

void mg_net_relax(struct mg_device *dev)
{
	struct mg_net *net = dev->net;
	mg_time now = atomic_load_explicit(&dev->last_poll, memory_order_relaxed);
	mg_time last = atomic_exchange_explicit(&net->spun, now, memory_order_relaxed);

	/* 0: somebody has armed a CQ and is about to sleep anyway. */
	if (!now || !spinning(net, now, last))
		return;
	/* Away for a while: either the application had something else to do, or the CPU was taken. */
	if (now >= last + MG_SPIN_GAP_NS) {
		long count = preemptions();

		if (atomic_exchange_explicit(&net->preempted, count, memory_order_relaxed) == count) {
			atomic_store_explicit(&net->spins, 0, memory_order_relaxed);
			return;
		}
		atomic_store_explicit(&net->crowded, now + MG_CROWDED_NS, memory_order_relaxed);
	}
	if (now < atomic_load_explicit(&net->crowded, memory_order_relaxed)) {
		wait_for_packet(dev, now);
		atomic_store_explicit(&net->spun, mg_now(), memory_order_relaxed);
	}
}

int mg_net_poll(struct mg_device *dev)
{
	struct mg_net *net = dev->net;
	mg_time now = mg_now();
	int n;

	mg_note_poll(dev, now);
	n = mg_net_receive(dev, now);
	if (n > 0)
		atomic_store_explicit(&net->spins, 0, memory_order_relaxed);
	mg_net_timers(dev, now, n == 0);
	if (n > 0)
		mg_net_send(dev, now, MG_TX_LAZY);
	else if (mg_tx_pending(dev->engine) && now - net->lazy_since >= MG_LAZY_NS)
		mg_net_send(dev, now, 0);
	mg_progress_check(dev, now);
	return n;
}
