// SPDX-License-Identifier: BSD-3-Clause
/*
 * tx.c - from the engine's packets to as few system calls as possible.
 *
 * A batch of packets is cut into trains: consecutive packets to one destination, all of one size
 * but the last, which may be shorter. Each train is one UDP_SEGMENT message whose iovec points at
 * the headers (in net->stage) and straight into the application's buffers; several trains go out
 * in one sendmmsg. The kernel gives a train's segments the IP ids 0, 1, 2, ..., so the ICRC of a
 * packet depends on its place in the train.
 */
#include "net/net.h"

#include <errno.h>
#include <netinet/udp.h>
#include <poll.h>
#include <string.h>

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif

/* How long to wait for room in the socket's send buffer before a packet counts as lost. */
#define MG_SEND_WAIT_MS 2
/* The unacknowledged services have nothing but the socket to slow them down. */
#define MG_SEND_WAIT_UNACKED_MS 50
/* Batches that one caller sends before others get the lock. */
#define MG_TX_TURN 32

struct builder {
	struct mg_net *net;
	const struct mg_port *port;
	size_t stage; /* bytes used */
	size_t iov;   /* entries used */
};

/*
 * Processes behind one address are told apart by the destination QPN's top six bits, and the kernel
 * looks at a train's first packet only: all must be for the same process.
 */
static bool is_mad(const struct mg_pkt *p)
{
	return !p->hdr[5] && !p->hdr[6] && p->hdr[7] == 1;
}

static bool same_train(const struct mg_pkt *a, const struct mg_pkt *b)
{
	if (is_mad(a) || is_mad(b)) /* told apart by what they say */
		return false;
	return a->tclass == b->tclass && a->hop_limit == b->hop_limit && !((a->hdr[5] ^ b->hdr[5]) >> 2) &&
	       !memcmp(&a->dst, &b->dst, sizeof(a->dst)) && !memcmp(&a->src, &b->src, sizeof(a->src));
}

/* How many of the `n` packets at `pkt` one UDP_SEGMENT message can carry. */
static size_t train_length(const struct mg_pkt *pkt, size_t n)
{
	size_t count = 1, bytes = pkt->len, iov = pkt->n_iov + 2u;

	while (count < n && count < MG_TRAIN_SEGS && pkt[count - 1].len == pkt->len) {
		const struct mg_pkt *next = pkt + count;

		bytes += next->len;
		iov += next->n_iov + 2u;
		if (next->len > pkt->len || bytes > MG_TRAIN_BYTES || iov > MG_TRAIN_IOV ||
		    !same_train(pkt, next))
			break;
		count++;
	}
	return count;
}

/* Append to the message under construction; adjacent pieces become one. */
static void add_piece(struct msghdr *m, void *base, size_t len)
{
	struct iovec *last = m->msg_iov + m->msg_iovlen;

	if (m->msg_iovlen && (uint8_t *)last[-1].iov_base + last[-1].iov_len == (uint8_t *)base) {
		last[-1].iov_len += len;
		return;
	}
	last->iov_base = base;
	last->iov_len = len;
	m->msg_iovlen++;
}

/* Headers, data, pad and ICRC of one packet; `id` is the IP id that the kernel will give it. */
static void add_packet(struct builder *b, struct msghdr *m, struct mg_flow *flow, const struct mg_pkt *pkt,
		       uint16_t id)
{
	static const uint8_t zero[4];
	struct iovec covered[MG_MAX_SGE + 2];
	uint8_t *head = b->net->stage + b->stage, *tail = head + pkt->hdr_len;
	unsigned pad = pkt->pad & 3u;
	uint32_t icrc;
	int n = 0;

	memcpy(head, pkt->hdr, pkt->hdr_len);
	memcpy(tail, zero, pad);
	covered[n++] = (struct iovec){head, pkt->hdr_len};
	if (pkt->n_iov) {
		add_piece(m, head, pkt->hdr_len);
		for (unsigned i = 0; i < pkt->n_iov; i++) {
			covered[n++] = pkt->iov[i];
			add_piece(m, pkt->iov[i].iov_base, pkt->iov[i].iov_len);
		}
		if (pad)
			covered[n++] = (struct iovec){tail, pad};
		add_piece(m, tail, pad + MG_ICRC_LEN);
	} else {
		covered[0].iov_len += pad;
		add_piece(m, head, pkt->hdr_len + pad + MG_ICRC_LEN);
	}
	flow->ip_id = id;
	icrc = mg_icrc(flow, covered, n, pkt->len - MG_ICRC_LEN);
	for (unsigned i = 0; i < MG_ICRC_LEN; i++)
		tail[pad + i] = (uint8_t)(icrc >> (8 * i));
	b->stage += pkt->hdr_len + pad + MG_ICRC_LEN;
}

static void add_control(struct msghdr *m, int level, int type, const void *data, size_t len)
{
	struct cmsghdr *c = (struct cmsghdr *)((uint8_t *)m->msg_control + m->msg_controllen);

	c->cmsg_level = level;
	c->cmsg_type = type;
	c->cmsg_len = CMSG_LEN(len);
	memcpy(CMSG_DATA(c), data, len);
	m->msg_controllen += CMSG_SPACE(len);
}

/*
 * A TOS that differs from the socket's own. Most programs use one: that becomes the socket's. The hop limit of an
 * AH or QP is for multicast only: to one address the kernel's drivers send with the route's, whatever the program
 * says (ib_resolve_unicast_gid_dmac), and some examples say 1.
 */
static void add_ttl_tos(struct mg_sock *s, struct msghdr *m, const struct mg_pkt *pkt, bool v4)
{
	int level = v4 ? IPPROTO_IP : IPPROTO_IPV6;
	int ttl = pkt->hop_limit ? pkt->hop_limit : 64, tos = pkt->tclass;

	if (s->tos < 0 && !setsockopt(s->fd, level, v4 ? IP_TOS : IPV6_TCLASS, &tos, sizeof(tos)))
		s->tos = tos;
	if (mg_gid_multicast(pkt->dst.gid))
		add_control(m, level, v4 ? IP_TTL : IPV6_HOPLIMIT, &ttl, sizeof(ttl));
	if (s->tos != tos)
		add_control(m, level, v4 ? IP_TOS : IPV6_TCLASS, &tos, sizeof(tos));
}

/*
 * The address a packet leaves from. The engine knows one address of ours, usually IPv4; to a peer
 * that was given our GID 0 we are the link-local one.
 */
static const uint8_t *source_of(const struct builder *b, const struct mg_sock *s, const struct mg_pkt *pkt)
{
	if (!s->wild)
		return s->gid;
	return mg_gid_is_v4(pkt->src.gid) == mg_gid_is_v4(pkt->dst.gid) ? pkt->src.gid : b->port->gid[0].gid;
}

/* A wildly bound socket is told the source address; others have it from their binding. */
static void add_source(struct builder *b, struct mg_sock *s, struct msghdr *m, const uint8_t src[16], bool v4)
{
	if (!s->wild)
		return;
	if (v4) {
		struct in_pktinfo info = {0};

		memcpy(&info.ipi_spec_dst, src + 12, 4);
		add_control(m, IPPROTO_IP, IP_PKTINFO, &info, sizeof(info));
	} else {
		struct in6_pktinfo info = {.ipi6_ifindex = b->port->ifindex};

		memcpy(&info.ipi6_addr, src, 16);
		add_control(m, IPPROTO_IPV6, IPV6_PKTINFO, &info, sizeof(info));
	}
}

static void set_destination(struct builder *b, struct msghdr *m, size_t at, const struct mg_pkt *pkt, bool v4)
{
	if (v4) {
		struct sockaddr_in *to = &b->net->to[at].v4;

		*to = (struct sockaddr_in){.sin_family = AF_INET, .sin_port = htons(MG_ROCE_PORT)};
		memcpy(&to->sin_addr, pkt->dst.gid + 12, 4);
		m->msg_name = to;
		m->msg_namelen = sizeof(*to);
	} else {
		struct sockaddr_in6 *to = &b->net->to[at].v6;

		*to = (struct sockaddr_in6){.sin6_family = AF_INET6, .sin6_port = htons(MG_ROCE_PORT)};
		memcpy(&to->sin6_addr, pkt->dst.gid, 16);
		if (IN6_IS_ADDR_LINKLOCAL(&to->sin6_addr))
			to->sin6_scope_id = b->port->ifindex;
		m->msg_name = to;
		m->msg_namelen = sizeof(*to);
	}
}

/* Multicast leaves by the device's interface, whatever the routes say. */
static void set_interface(const struct builder *b, struct mg_sock *s, bool v4)
{
	struct ip_mreqn req = {.imr_ifindex = (int)b->port->ifindex};
	int index = (int)b->port->ifindex;

	if (v4)
		setsockopt(s->fd, IPPROTO_IP, IP_MULTICAST_IF, &req, sizeof(req));
	else
		setsockopt(s->fd, IPPROTO_IPV6, IPV6_MULTICAST_IF, &index, sizeof(index));
	s->mcast = true;
}

/* Build message `at` from the train. */
static void build(struct builder *b, struct mg_sock *s, size_t at, const struct mg_train *t)
{
	const struct mg_pkt *pkt = b->net->pkt + t->first;
	struct msghdr *m = &b->net->msg[at].msg_hdr;
	bool v4 = mg_gid_is_v4(pkt->dst.gid);
	struct mg_flow flow = {.sport = s->sport, .dport = MG_ROCE_PORT, .df = true};

	if (!s->mcast && mg_gid_multicast(pkt->dst.gid))
		set_interface(b, s, v4);
	memcpy(flow.src, source_of(b, s, pkt), 16);
	memcpy(flow.dst, pkt->dst.gid, 16);
	*m = (struct msghdr){.msg_iov = b->net->iov + b->iov, .msg_control = b->net->ctl[at].buf};
	set_destination(b, m, at, pkt, v4);
	for (size_t i = 0; i < t->n; i++)
		add_packet(b, m, &flow, pkt + i, (uint16_t)i);
	b->iov += m->msg_iovlen;
	if (t->n > 1) {
		uint16_t segment = (uint16_t)pkt->len;

		add_control(m, IPPROTO_UDP, UDP_SEGMENT, &segment, sizeof(segment));
	}
	add_ttl_tos(s, m, pkt, v4);
	add_source(b, s, m, flow.src, v4);
	if (!m->msg_controllen)
		m->msg_control = NULL;
}

/*
 * Returns messages sent, at least 1 of `n` or a negative errno for the first. A full send buffer is
 * waited for a little: the link drains it, and a retransmission costs far more.
 */
static int send_some(int fd, struct mmsghdr *msg, size_t n, int patience_ms)
{
	for (int tries = 0;; tries++) {
		struct pollfd p = {.fd = fd, .events = POLLOUT};
		int ret;

		if (n == 1)
			ret = sendmsg(fd, &msg->msg_hdr, MSG_DONTWAIT) < 0 ? -1 : 1;
		else
			ret = sendmmsg(fd, msg, (unsigned)n, MSG_DONTWAIT);
		if (ret > 0)
			return ret;
		if (errno == EINTR)
			continue;
		if (errno != EAGAIN || tries || poll(&p, 1, patience_ms) <= 0)
			return -errno;
	}
}

/* No checksum offload on the way (EIO), or a path that takes no trains: one by one from now on. */
static bool gso_refused(int err)
{
	return err == EIO || err == EINVAL || err == EOPNOTSUPP || err == ENOPROTOOPT;
}

static void note_error(struct mg_device *dev, size_t packets, const struct mg_pkt *pkt, int err)
{
	mg_count(dev->engine, MG_CNT_TX_ERRORS, packets);
	if (err == EMSGSIZE && !dev->net->said_msgsize) {
		dev->net->said_msgsize = true;
		mg_say("a packet of %u bytes does not fit the MTU of %s (%u bytes): connections made with a "
		       "path MTU above %u bytes stall; raise the interface's MTU",
		       pkt->len + 28u, dev->port.ifname, dev->port.netdev_mtu, dev->port.active_mtu);
	}
}

static bool unacked(const struct mg_pkt *pkt)
{
	uint8_t svc = pkt->hdr[0] & MG_SVC_MASK;

	return svc == MG_SVC_UC || svc == MG_SVC_UD;
}

/* Messages [from, to), one train each. */
struct building {
	struct mg_device *dev;
	struct mg_sock *s;
	size_t from, to;
};

static void build_all(void *what)
{
	const struct building *w = what;
	struct builder b = {.net = w->dev->net, .port = &w->dev->port};

	for (size_t i = w->from; i < w->to; i++)
		build(&b, w->s, i, &b.net->train[i]);
}

/* The same, unless memory that is to be sent has gone: then all of them count as lost. */
static bool build_trains(struct mg_device *dev, struct mg_sock *s, size_t from, size_t to)
{
	struct building what = {dev, s, from, to};
	struct mg_net *net = dev->net;

	if (mg_guarded(NULL, build_all, &what))
		return true;
	for (size_t i = from; i < to; i++)
		for (size_t k = net->train[i].first; k < net->train[i].first + net->train[i].n; k++) {
			mg_count(dev->engine, MG_CNT_TX_ERRORS, 1);
			if (!mg_readable(net->pkt[k].iov, net->pkt[k].n_iov))
				mg_tx_fault(dev->engine, net->pkt + k);
		}
	return false;
}

/* Send the trains [from, to), all through one socket. */
static void send_trains(struct mg_device *dev, struct mg_sock *s, size_t from, size_t to)
{
	struct mg_net *net = dev->net;
	int patience = MG_SEND_WAIT_MS;

	if (!build_trains(dev, s, from, to))
		return;
	for (size_t i = from; i < to; i++)
		if (unacked(net->pkt + net->train[i].first))
			patience = MG_SEND_WAIT_UNACKED_MS;
	while (from < to) {
		int ret = send_some(s->fd, &net->msg[from], to - from, patience);
		const struct mg_train t = net->train[from];

		if (ret > 0) {
			from += (size_t)ret;
			continue;
		}
		if (t.n == 1 || !gso_refused(-ret)) {
			note_error(dev, t.n, net->pkt + t.first, -ret);
			from++;
			continue;
		}
		/* Single packets have IP id 0 each: built anew, in the room of the refused train. */
		for (size_t k = 0; k < t.n; k++) {
			const struct mg_train one = {t.first + k, 1};

			net->train[from] = one;
			if (!build_trains(dev, s, from, from + 1))
				continue;
			ret = send_some(s->fd, &net->msg[from], 1, patience);
			if (ret < 0)
				note_error(dev, 1, net->pkt + one.first, -ret);
			else
				net->gso = false; /* it was the train, not the packet */
		}
		from++;
		if (!build_trains(dev, s, from, to))
			return;
	}
}

/* NULL: the address it is to leave from is not here (any more). */
static struct mg_sock *socket_for(struct mg_net *net, const struct mg_pkt *pkt, mg_time now)
{
	struct mg_sock *s = &net->sock[mg_gid_is_v4(pkt->dst.gid) ? MG_V4 : MG_V6];

	if (mg_sock_has(s, pkt->src.gid)) {
		s->hot = now;
		return s;
	}
	net->more_hot = now;
	return mg_gid_is_v4(pkt->dst.gid) ? mg_further_of(net, pkt->src.gid) : NULL;
}

static void send_batch(struct mg_device *dev, mg_time now, size_t n)
{
	struct mg_net *net = dev->net;
	size_t trains = 0, begun = 0;
	struct mg_sock *s = NULL;

	for (size_t i = 0; i < n;) {
		struct mg_sock *own = socket_for(net, net->pkt + i, now);
		size_t len = net->gso ? train_length(net->pkt + i, n - i) : 1;

		if (!own) {
			note_error(dev, len, net->pkt + i, EADDRNOTAVAIL);
			i += len;
			continue;
		}
		if (s && s != own) {
			send_trains(dev, s, begun, trains);
			begun = trains;
		}
		s = own;
		net->train[trains++] = (struct mg_train){i, len};
		i += len;
	}
	if (s)
		send_trains(dev, s, begun, trains);
}

void mg_net_send(struct mg_device *dev, mg_time now, unsigned tx_flags)
{
	struct mg_net *net = dev->net;
	unsigned turn = 0;
	size_t n;

	if (!mg_net_open(net))
		return;
	do {
		n = mg_tx(dev->engine, now, tx_flags, net->pkt, MG_TX_BATCH);
		if (n)
			send_batch(dev, now, n);
	} while (n == MG_TX_BATCH && ++turn < MG_TX_TURN);
	if (!(tx_flags & MG_TX_LAZY) || !mg_tx_pending(dev->engine))
		net->lazy_since = 0;
	else if (!net->lazy_since)
		net->lazy_since = now;
}

/*
 * Who posts bulk data, one piece after the other, is in here all the time and looks at the sockets
 * itself: as good as polling, and the progress thread would only be in the way. Not who has armed a
 * CQ, to sleep after posting.
 */
static void note_bulk(struct mg_device *dev, mg_time now, uint64_t bytes)
{
	mg_time last = dev->net->bulk;

	if (bytes < MG_BULK_BYTES)
		return;
	dev->net->bulk = now;
	if (now - last < MG_POLLING_NS && atomic_load_explicit(&dev->last_poll, memory_order_relaxed))
		mg_note_poll(dev, now);
}

void mg_net_flush(struct mg_device *dev, unsigned tx_flags)
{
	mg_time now = mg_now();

	uint64_t before;

	if (now - dev->net->looked > MG_UNSEEN_NS && mg_net_open(dev->net) && !mg_net_held(dev, now))
		mg_net_receive(dev, now);
	before = mg_counter_get(dev->engine, MG_CNT_TX_BYTES);
	mg_net_send(dev, now, tx_flags);
	note_bulk(dev, now, mg_counter_get(dev->engine, MG_CNT_TX_BYTES) - before);
	mg_progress_check(dev, now);
}
