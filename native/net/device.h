/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * device.h - the process's one RoCE device: engine + sockets + progress thread + agent link.
 *
 * This is the only global object of the library. verbs/ takes it by mg_device_get() at the first
 * ibv_open_device, net/ owns sockets, timers and the thread, control/ talks to the agent.
 * Lock order: dev->lock only. Every mg_* engine call happens with it held.
 */
#ifndef MG_DEVICE_H
#define MG_DEVICE_H

#include "transport/engine.h"

#include <net/if.h>
#include <pthread.h>
#include <stdatomic.h>

struct mg_ports;
struct mg_net;	   /* net/udp.c: sockets, GSO/GRO, batches */
struct mg_control; /* control/: link to the agent */
struct mg_cm;	   /* cm/: the connection manager */
struct mg_cm_conn;
struct mg_cm_msg;

#define MG_MAX_SERVICES 256u

/* What the verbs layer shows about the port; filled by net/addr.c at open and at resume. */
struct mg_port {
	char ifname[IF_NAMESIZE];
	unsigned ifindex;
	uint8_t mac[6];
	uint32_t netdev_mtu; /* bytes */
	uint32_t active_mtu; /* RDMA path MTU in bytes: 256..4096 */
	struct mg_addr own;  /* what the device is bound to */
	struct mg_addr
		gid[16]; /* 0: link-local fe80::, 1: `own`, then more, as rdma_rxe has it; zero: free */
	unsigned n_gid;
	unsigned flags;	    /* the interface's: IFF_UP, MG_IFF_LOWER_UP */
	bool link_local;    /* gid[0] is an address of the interface, not just made of its MAC */
	uint64_t link_mbps; /* 0 unknown */
};

/* The carrier is there, as rdma_rxe looks at it (IFF_RUNNING comes later); <linux/if.h>, which <net/if.h> excludes. */
#define MG_IFF_LOWER_UP 0x10000u

static inline bool mg_flags_active(unsigned flags)
{
	return (flags & IFF_UP) && (flags & MG_IFF_LOWER_UP);
}
static inline bool mg_port_active(const struct mg_port *port)
{
	return mg_flags_active(port->flags);
}

struct mg_device {
	pthread_mutex_t lock;
	struct mg_engine *engine;
	struct mg_net *net;
	struct mg_control *control; /* NULL: no agent, the process stands alone */
	struct mg_cm *cm;
	uint32_t service[MG_MAX_SERVICES]; /* ports listened on: 0x0106pppp TCP, 0x0111 UDP, 0x013f IB */
	uint32_t n_services;
	_Atomic bool services_changed; /* since the agent was told */
	_Atomic bool ask_addresses;    /* the agent, for sockets of further addresses */
	uint32_t cm_slot;	       /* ours behind the address, 0 without an agent */
	struct mg_port port;
	unsigned refs;
	_Atomic uint64_t last_poll; /* ns: when the application last polled; the thread keeps away */
	pthread_t thread;
	_Atomic bool quit;
	_Atomic bool lock_wanted; /* the progress thread has to stop or resume: let it in */
	int cancel_state;	  /* of who has the lock: as it was before */
	bool forked;		  /* a child's copy: its sockets are closed, nothing works on it */
	int wake_fd;		  /* eventfd to wake the progress thread */
};

/* How the verbs layer learns of engine events; it registers these (they stay where they are) before the first get. */
struct mg_device_hooks {
	void (*cq_event)(struct mg_cq *cq); /* lock held */
	void (*async_event)(enum ibv_event_type type,
			    void *object); /* lock held; object: mg_qp, mg_cq or NULL */
};
void mg_device_set_hooks(const struct mg_device_hooks *hooks);
/* Lock held: tell every context what happened to the port. */
void mg_device_event(enum ibv_event_type type);
/* The same for the connection manager's events (mg_cm_ops.event; `event` is an mg_cm_event). Lock held. */
typedef bool mg_cm_event_hook(struct mg_device *dev, struct mg_cm_conn *conn, int event,
			      const struct mg_cm_msg *m);
void mg_device_set_cm_hook(mg_cm_event_hook *hook);

/*
 * Whether a device can be offered at all, without opening anything (for ibv_get_device_list):
 * 0 or errno; *port is filled when not NULL.
 */
int mg_device_probe(struct mg_port *port);

void mg_device_port(struct mg_device *dev, struct mg_port *port); /* no lock held: the port as it is now */

/*
 * The device, opened on the first call (agent or own socket, engine, progress thread).
 * NULL with errno and one clear line on stderr (what, why, mend) when that fails.
 */
struct mg_device *mg_device_get(void);
void mg_device_put(struct mg_device *dev); /* the last put closes thread, sockets, engine */

/* Lock held. Listen on a service, or no more; the agent is told. ENOSPC: too many. */
int mg_device_service(struct mg_device *dev, uint32_t service, bool on);

/* A port of rdma_cm's, as an id is bound to it. */
struct mg_claim {
	uint8_t space; /* the port space, 0 to 3 */
	uint16_t port;
	bool v6;
	bool only;	     /* beside the other family's: IPv4, or RDMA_OPTION_ID_AFONLY */
	bool shared;	     /* with others that share it, too: RDMA_OPTION_ID_REUSEADDR, not listening */
	struct mg_addr addr; /* all zero: any */
};
/*
 * Lock held. Take a port, in this process and among those behind the same address of the network namespace.
 * 0, ENOMEM, or as the kernel: EADDRINUSE the address has it, EADDRNOTAVAIL one of the two is for any address.
 */
int mg_port_claim(struct mg_device *dev, const struct mg_claim *c);
/* Lock held. What an id has becomes another claim on the same port; `check`: if that may be had (errors as above). */
int mg_port_change(struct mg_device *dev, const struct mg_claim *had, const struct mg_claim *want,
		   bool check);
void mg_port_unclaim(struct mg_device *dev, const struct mg_claim *c); /* lock held */

void mg_device_let_in(struct mg_device *dev); /* give way to the progress thread, for a moment */

/*
 * Whoever has the lock cannot be cancelled: it makes system calls that are cancellation points, and a thread
 * that ended there would leave the device locked for ever.
 */
static inline void mg_device_lock(struct mg_device *dev)
{
	int cancel_state;

	pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &cancel_state);
	/* A spinning poller would take the mutex again before the woken waiter is there. */
	if (__builtin_expect(atomic_load_explicit(&dev->lock_wanted, memory_order_relaxed), 0))
		mg_device_let_in(dev);
	pthread_mutex_lock(&dev->lock);
	dev->cancel_state = cancel_state;
}
static inline void mg_device_unlock(struct mg_device *dev)
{
	int cancel_state = dev->cancel_state;

	pthread_mutex_unlock(&dev->lock);
	pthread_setcancelstate(cancel_state, NULL);
}

mg_time mg_now(void); /* CLOCK_MONOTONIC, ns */

/* Lock held. Send what the engine has (lazy: see MG_TX_LAZY). After posting. */
void mg_net_flush(struct mg_device *dev, unsigned tx_flags);
/*
 * Lock held. Receive what is there (bounded: one train), run due timers, send. Returns packets
 * received. Counts as a poll by the application (mg_note_poll).
 */
int mg_net_poll(struct mg_device *dev);
/*
 * No lock held, after a poll that found nothing. An application that polls on and on in vain, on a CPU
 * that others want too, is made to wait for a packet a fraction of a millisecond at a time.
 */
void mg_net_relax(struct mg_device *dev);
/* Lock held. Join and leave groups as the engine's QPs ask for; 0 or the errno of what failed first. */
int mg_net_mcast_sync(struct mg_device *dev);
/* Lock held. The port as it is now: what the kernel has told of the interface is taken in (watch.c). */
void mg_watch_run(struct mg_device *dev);
/* Lock held. From now on packets come with what UD QPs show of the IP header. */
void mg_net_want_header(struct mg_device *dev);
/* Tell the progress thread that the application is polling (cheap; every poll_cq). */
static inline void mg_note_poll(struct mg_device *dev, mg_time now)
{
	atomic_store_explicit(&dev->last_poll, now, memory_order_relaxed);
}

/*
 * The application is about to sleep until an event comes: it does not poll any more, and a progress
 * thread that keeps out of its way is called back at once.
 */
void mg_note_sleep(struct mg_device *dev);

#endif
