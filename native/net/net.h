/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * net.h - what net/ and control/ share: sockets, batches, the progress thread's state.
 *
 * One object per device. Everything is guarded by the device's lock unless noted.
 */
#ifndef MG_NET_H
#define MG_NET_H

#include "net/device.h"
#include "wire/wire.h"

#include <netinet/in.h>
#include <string.h>
#include <sys/socket.h>

#define MG_TX_BATCH 64u	      /* packets per mg_tx call: one or more trains */
#define MG_TRAIN_SEGS 64u     /* UDP_MAX_SEGMENTS of kernels before 6.9 */
#define MG_TRAIN_BYTES 65000u /* below the 65,507 bytes of a UDP/IPv4 datagram */
#define MG_TRAIN_IOV 1024u    /* UIO_MAXIOV */
#define MG_RX_BUF 65536u
/* Room behind a batch's headers for pads and ICRCs. */
#define MG_TX_STAGE (MG_TX_BATCH * (64u + MG_PKT_COPY + 8u))
#define MG_TX_IOV (MG_TX_BATCH * (MG_MAX_SGE + 2u))

enum mg_family { MG_V4, MG_V6, MG_FAMILIES };

/*
 * How long a lazily held packet (an ACK that may ride along with data) waits at most while somebody
 * polls, and how long the progress thread lets an application that is not polling answer first.
 */
#define MG_LAZY_NS 4000u
#define MG_LAZY_THREAD_NS 15000u
/* An application that polled this recently is polling now. */
#define MG_POLLING_NS 50000u
/* One that polled this recently may still answer what arrives. */
#define MG_ACTIVE_NS 10000000u
/* So late a timer runs although packets are waiting, among which there may be what it waits for. */
#define MG_TIMER_LATE_NS 50000000u
/* An application that only posts looks at the sockets, too, when nobody has for this long. */
#define MG_UNSEEN_NS 100000u
/* A post that sends so much is of bulk data. */
#define MG_BULK_BYTES 32768u
/* Polls that follow each other this closely spin; so many of them in vain are a wait, not a race. */
#define MG_SPIN_GAP_NS 20000u
#define MG_SPIN_POLLS 256u
/* Where the CPU was taken from a spinning application, its polls wait for packets, for so long each... */
#define MG_RELAX_NS 200000u
/* ...before it is tried again whether the CPU has become free. */
#define MG_CROWDED_NS 50000000u
/*
 * Where a UC or UD receive queue has run dry, what follows waits in the socket for the application to post
 * more, instead of being dropped: for so long, once, looked at so often.
 */
#define MG_DRY_NS 100000000u
#define MG_DRY_NAP_NS 100000u
/* The progress thread's nap while somebody polls. */
#define MG_NAP_MIN_NS 50000u
#define MG_NAP_MAX_NS 1000000u

struct mg_sock {
	int fd;		 /* -1: none */
	bool wild;	 /* bound to the any-address: packets carry their own by PKTINFO */
	uint8_t gid[16]; /* the bound address, when not wild */
	uint16_t sport;	 /* the port it sends from, host order: the ICRC covers it */
	int tos;	 /* the socket's default, to save a control message per packet */
	bool mcast;	 /* it has been told the interface for multicast */
	mg_time hot;	 /* last traffic: a quiet second socket is looked at less often */
};

/* Whether packets leave from an address by it. */
static inline bool mg_sock_has(const struct mg_sock *s, const uint8_t gid[16])
{
	return s->fd >= 0 && (s->wild || !memcmp(s->gid, gid, sizeof(s->gid)));
}

/* Membership in a multicast group, by a wildly bound socket or one of its own (mcast.c). */
struct mg_member {
	struct mg_addr addr;
	struct mg_sock own; /* fd -1: none */
};

/* A train being sent: consecutive packets that one UDP_SEGMENT call can carry. */
struct mg_train {
	size_t first, n; /* packets in the batch */
};

struct mg_net {
	struct mg_sock sock[MG_FAMILIES];
	struct mg_sock further[MG_MAX_GID]; /* of the interface's other IPv4 addresses (further.c) */
	unsigned n_further;
	bool alone; /* the sockets are our own, no agent's */
	struct mg_member member[MG_MAX_MCAST];
	unsigned n_member;
	struct mg_ports *ports;
	int watch; /* rtnetlink: what happens to the interface; -1: none */
	_Atomic mg_time
		settle;	  /* until then a port that is down after a move still counts as it was; 0: no such */
	mg_time more_hot; /* last traffic of further addresses' and groups' own sockets */
	_Atomic int more_ep; /* epoll over these; -1: none */
	bool want_header;    /* UD QPs are told of TTL and TOS */
	bool gso;	     /* UDP_SEGMENT works on this path */
	bool said_msgsize;   /* warned once about packets larger than the link's MTU */
	unsigned idle_polls; /* since the quiet socket was last looked at */
	mg_time lazy_since;  /* 0: nothing is held back */
	mg_time looked;	     /* when the sockets were last looked at */
	mg_time bulk;	     /* when bulk data was last posted */

	/* mg_net_relax, about one thread that spins; two of them disturb each other and just go on. */
	_Atomic pthread_t spinner;
	_Atomic unsigned spins;	 /* polls in vain, one right after the other */
	_Atomic mg_time spun;	 /* the last of them */
	_Atomic long preempted;	 /* how often the CPU had been taken from the thread then */
	_Atomic mg_time crowded; /* others want its CPU: until then */

	/*
	 * When the progress thread looks by itself next, 0 while it is awake. Written by the thread
	 * (and by those who wake it) with the lock held, so that posters see what it sleeps on.
	 */
	_Atomic mg_time thread_until;
	_Atomic bool napping; /* the thread sleeps without the sockets: the application polls */

	/* Batch under construction. */
	struct mg_pkt pkt[MG_TX_BATCH];
	struct iovec iov[MG_TX_IOV];
	struct mmsghdr msg[MG_TX_BATCH];
	struct mg_train train[MG_TX_BATCH];
	union {
		struct sockaddr_in v4;
		struct sockaddr_in6 v6;
	} to[MG_TX_BATCH];
	/* UDP_SEGMENT, TTL, TOS and PKTINFO at most. */
	union {
		struct cmsghdr align;
		uint8_t buf[CMSG_SPACE(sizeof(uint16_t)) + 2 * CMSG_SPACE(sizeof(int)) +
			    CMSG_SPACE(sizeof(struct in6_pktinfo))];
	} ctl[MG_TX_BATCH];
	uint8_t stage[MG_TX_STAGE];
	uint8_t rx[MG_RX_BUF];
	/* What is left in `rx` of a train in whose middle a receive queue ran dry. */
	struct {
		size_t at, len, segment; /* at == len: nothing */
		struct mg_rx meta;
		uint16_t dport;
	} rest;
	mg_time dry_until;
};

/* ---- udp.c: sockets ----------------------------------------------------------------------- */

struct mg_net *mg_net_new(void);
void mg_net_free(struct mg_net *net); /* closes what is open */
/*
 * Bind our own socket on addr's port 4791 (no agent). 0 or errno; EADDRINUSE: somebody else
 * has the port.
 */
int mg_net_bind(struct mg_net *net, const struct mg_addr *addr);
/*
 * Take over sockets that the agent made (v4[, v6]); they belong to net from here, also on error
 * (then they are closed). EINVAL when one is not a UDP socket bound to a port.
 */
int mg_net_adopt(struct mg_net *net, const int *fds, size_t n);
/* The same for one more address of the interface. */
int mg_net_bind_further(struct mg_net *net, const struct mg_addr *addr);
void mg_net_close(struct mg_net *net);
/* Further sockets of the agent's (SOCKETS); they belong to net from here. Those that cannot be used are closed. */
void mg_net_adopt_more(struct mg_net *net, const int *fds, size_t n);
/* One that is looked at by epoll: 0 or errno. Who has no thread of ours wakes the progress thread then. */
int mg_net_watch_also(struct mg_net *net, int fd);
void mg_net_tune(int fd);		  /* buffers and GRO, as far as allowed */
void mg_net_tell_header(int fd, bool v4); /* TTL and TOS of what is received */
/* Leave what the sockets can send from in port->gid, and GID 0. */
void mg_net_usable(struct mg_net *net, struct mg_port *port);
/* Tell the engine the device's GIDs, as far as they can be a source of packets. */
void mg_net_gids(struct mg_device *dev);

/* ---- further.c ------------------------------------------------------------------------------ */

/* The socket of one of the interface's other IPv4 addresses, or NULL. */
struct mg_sock *mg_further_of(struct mg_net *net, const uint8_t gid[16]);
/* Take a socket in: 0 or errno (EEXIST, ENOSPC); then it is the caller's still. */
int mg_further_put(struct mg_net *net, const struct mg_sock *s);
/*
 * Lock held. Close the sockets of addresses that are not in `port` any more; open those that are missing, or,
 * with `ask`, have the agent do so. What cannot be had is left out.
 */
void mg_further_sync(struct mg_device *dev, const struct mg_port *port, bool ask);
void mg_further_close(struct mg_net *net);

/* ---- mcast.c -------------------------------------------------------------------------------- */

void mg_net_mcast_close(struct mg_net *net);

static inline bool mg_net_open(const struct mg_net *net)
{
	return net->sock[MG_V4].fd >= 0 || net->sock[MG_V6].fd >= 0;
}

/* ---- ports.c (mg_port_claim is in device.h) ------------------------------------------------------ */

struct mg_ports *mg_ports_new(void);
void mg_ports_free(struct mg_ports *p);
void mg_ports_close(struct mg_ports *p);      /* others do not see our ports any more */
void mg_ports_resumed(struct mg_device *dev); /* lock held: after a stop they do again */

/* ---- watch.c (mg_watch_run is in device.h) ------------------------------------------------------ */

void mg_watch_open(struct mg_net *net);
/* Lock held. Look at the interface anew; `ask`: the agent for sockets that are missing. */
void mg_watch_look(struct mg_device *dev, bool ask);
void mg_watch_close(struct mg_net *net);
/* When mg_watch_run has something to do besides what the kernel says; MG_NEVER. */
mg_time mg_watch_due(const struct mg_device *dev);
/* Lock held. The interface's flags are these now. */
void mg_watch_link(struct mg_device *dev, unsigned flags);
/* Lock held, the new sockets open: the device is on another port (after a stop). */
void mg_watch_moved(struct mg_device *dev, const struct mg_port *port);

/* ---- tx.c, rx.c (mg_net_flush and mg_net_poll are in device.h) --------------------------------- */

/* Receive one batch from each socket that has something; returns packets. Does not send. */
int mg_net_receive(struct mg_device *dev, mg_time now);
/* A receive queue has run dry, and whoever is not the one that refills it should receive nothing now. */
bool mg_net_held(const struct mg_device *dev, mg_time now);
void mg_net_send(struct mg_device *dev, mg_time now, unsigned tx_flags);
/* Run due timers; `drained`: nothing waits to be received that they might be waiting for. */
void mg_net_timers(struct mg_device *dev, mg_time now, bool drained);

/* ---- guard.c: memory of the application that may not be there any more -------------------------- */

void mg_guard_install(void); /* takes SIGSEGV and SIGBUS, once; passes on what is not ours */
/* access(what), in the caller's thread; false when it faulted. No lock may be taken within. (struct mg_ops) */
bool mg_guarded(void *arg, void (*access)(void *what), void *what);
bool mg_readable(const struct iovec *iov, size_t n);

/* ---- addr.c ----------------------------------------------------------------------------------- */

/*
 * Choose the interface and address: `want` (from the agent) or MIGROCE_ADDR or MIGROCE_IFACE or
 * the one that carries the default route, or the first that is up and no loopback, or lo.
 * 0 or errno: ENODEV no interface at all, EADDRNOTAVAIL what was asked for is not here, EINVAL
 * the environment variable cannot be read. *port and *addr are written on success only.
 */
int mg_addr_choose(const struct mg_addr *want, struct mg_port *port, struct mg_addr *addr);
/*
 * The same port once more, as it is now, by `own` and the interface's index: 0 or errno. An address or
 * an interface that is gone is a port that is down.
 */
int mg_addr_look(const struct mg_port *before, struct mg_port *now);
/* MIGROCE_ADDR is set: the device has that IPv4 address and no other. */
bool mg_addr_single(void);
/* Largest RDMA MTU in a netdev MTU, both in bytes, as rdma_rxe has it (80 bytes of headers). */
uint32_t mg_addr_rdma_mtu(uint32_t netdev_mtu);
/* Printable address of a GID into buf (at least INET6_ADDRSTRLEN bytes); returns buf. */
const char *mg_addr_print(const uint8_t gid[16], char *buf, size_t len);

/* ---- progress.c --------------------------------------------------------------------------------- */

int mg_progress_start(struct mg_device *dev); /* 0 or errno */
void mg_progress_stop(struct mg_device *dev); /* ends and joins the thread */
/* Any thread: make the progress thread look now. */
void mg_progress_wake(struct mg_device *dev);
/* Lock held, by others than the thread: wake it if it sleeps past what is due now. */
void mg_progress_check(struct mg_device *dev, mg_time now);

/* One line on stderr, with the library's name before it. */
__attribute__((format(printf, 1, 2))) void mg_say(const char *fmt, ...);

#endif
