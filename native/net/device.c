// SPDX-License-Identifier: BSD-3-Clause
/*
 * device.c - the process's one device: opened by the first get, closed by the last put.
 */
#include "net/net.h"

#include "cm/cm.h"
#include "control/control.h"
#include "transport/gsi.h"

#include <arpa/inet.h>
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <unistd.h>

static struct {
	pthread_mutex_t lock; /* before dev->lock */
	pthread_once_t once;
	struct mg_device *dev;
	/* Registered by every open, always the same ones. */
	const struct mg_device_hooks *_Atomic hooks;
	mg_cm_event_hook *_Atomic cm_hook;
	bool said; /* why there is no device */
} the = {.lock = PTHREAD_MUTEX_INITIALIZER, .once = PTHREAD_ONCE_INIT};

/* As mg_device_lock: with it held there is no cancellation. Returns what unlock_the restores. */
static int lock_the(void)
{
	int cancel_state;

	pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &cancel_state);
	pthread_mutex_lock(&the.lock);
	return cancel_state;
}

static void unlock_the(int cancel_state)
{
	pthread_mutex_unlock(&the.lock);
	pthread_setcancelstate(cancel_state, NULL);
}

void mg_say(const char *fmt, ...)
{
	char line[512];
	va_list ap;

	va_start(ap, fmt);
	vsnprintf(line, sizeof(line), fmt, ap);
	va_end(ap);
	fprintf(stderr, "migroce: %s\n", line); /* one write: lines of several processes stay whole */
}

/* ---- what the engine asks for --------------------------------------------------------------- */

static void op_random(void *arg, void *buf, size_t n)
{
	uint8_t *p = buf;

	(void)arg;
	while (n) {
		ssize_t got = getrandom(p, n, 0);

		if (got < 0) {
			if (errno == EINTR)
				continue;
			/* Guessable ids and tokens are no way to go on. */
			mg_say("no random numbers from the kernel: %s", strerror(errno));
			abort();
		}
		p += got;
		n -= (size_t)got;
	}
}

static void op_cq_event(void *arg, struct mg_cq *cq)
{
	const struct mg_device_hooks *hooks = the.hooks;

	(void)arg;
	if (hooks)
		hooks->cq_event(cq);
}

static void op_async_event(void *arg, enum ibv_event_type type, void *object)
{
	const struct mg_device_hooks *hooks = the.hooks;

	(void)arg;
	if (hooks && hooks->async_event)
		hooks->async_event(type, object);
}

void mg_device_event(enum ibv_event_type type)
{
	op_async_event(NULL, type, NULL);
}

static const struct mg_ops engine_ops = {
	.random = op_random,
	.cq_event = op_cq_event,
	.async_event = op_async_event,
	.guarded = mg_guarded,
};

void mg_device_set_hooks(const struct mg_device_hooks *hooks)
{
	the.hooks = hooks;
}

void mg_device_set_cm_hook(mg_cm_event_hook *hook)
{
	the.cm_hook = hook;
}

/* ---- the connection manager, on QP 1 ---------------------------------------------------------- */

static void gsi_rx(void *arg, mg_time now, const struct mg_rx *meta, const uint8_t *mad)
{
	struct mg_device *dev = arg;

	mg_cm_rx(dev->cm, now, &meta->src, &meta->dst, meta->tclass, mad);
}

static void gsi_timer(void *arg, mg_time now)
{
	mg_cm_timer(((struct mg_device *)arg)->cm, now);
}

static void gsi_resumed(void *arg, mg_time now, const struct mg_addr *addr)
{
	(void)addr; /* connections keep the address they were made with */
	mg_cm_resumed(((struct mg_device *)arg)->cm, now);
}

static const struct mg_gsi_user gsi_user = {.rx = gsi_rx, .timer = gsi_timer, .resumed = gsi_resumed};

static void cm_send(void *arg, const struct mg_addr *src, const struct mg_addr *dst, uint8_t tclass,
		    const uint8_t *mad)
{
	/* No room is a loss like any other: it will be repeated. */
	mg_gsi_send(((struct mg_device *)arg)->engine, src, dst, tclass, mad);
}

static bool cm_event(void *arg, struct mg_cm_conn *conn, enum mg_cm_event ev, const struct mg_cm_msg *m)
{
	mg_cm_event_hook *hook = the.cm_hook;

	return hook && hook(arg, conn, (int)ev, m);
}

static void cm_wake(void *arg, mg_time at)
{
	mg_gsi_wake(((struct mg_device *)arg)->engine, at);
}

static const struct mg_cm_ops cm_ops = {
	.random = op_random, .send = cm_send, .event = cm_event, .wake = cm_wake};

int mg_device_service(struct mg_device *dev, uint32_t service, bool on)
{
	uint32_t n = dev->n_services;

	if (on) {
		if (n == MG_MAX_SERVICES)
			return ENOSPC;
		dev->service[dev->n_services++] = service;
	}
	for (uint32_t i = 0; i < n && !on; i++) {
		if (dev->service[i] == service) {
			dev->service[i] = dev->service[--dev->n_services];
			break;
		}
	}
	if (dev->control) {
		atomic_store(&dev->services_changed, true);
		mg_progress_wake(dev);
	}
	return 0;
}

static int open_cm(struct mg_device *dev, const struct mg_config *cfg)
{
	/* The slot is what a QPN of ours begins with, and a communication id, too. */
	bool slotted = cfg->qpn_count <= MG_QPN_MASK;

	dev->cm = mg_cm_create(&cm_ops, dev, cfg->slot << 26, slotted ? 6 : 0);
	if (!dev->cm)
		return ENOMEM;
	dev->cm_slot = cfg->slot;
	mg_gsi_attach(dev->engine, &gsi_user, dev);
	return 0;
}

/* ---- fork ------------------------------------------------------------------------------------ */

static void before_fork(void)
{
	pthread_mutex_lock(&the.lock);
	if (the.dev)
		pthread_mutex_lock(&the.dev->lock);
}

static void after_fork_parent(void)
{
	if (the.dev)
		pthread_mutex_unlock(&the.dev->lock);
	pthread_mutex_unlock(&the.lock);
}

/*
 * The child has no progress thread and must not speak for the parent's QPs: its copy of the device
 * is dead (a new one can be opened). Its descriptors are closed, so that it neither keeps the port
 * nor the agent's connection.
 */
static void after_fork_child(void)
{
	struct mg_device *dev = the.dev;

	if (dev) {
		dev->forked = true;
		mg_net_close(dev->net);
		if (dev->control)
			mg_control_hang_up(dev->control);
		close(dev->wake_fd);
		dev->wake_fd = -1;
		atomic_store(&dev->lock_wanted, false);
		pthread_mutex_unlock(&dev->lock);
		the.dev = NULL;
	}
	pthread_mutex_unlock(&the.lock);
}

static void watch_forks(void)
{
	pthread_atfork(before_fork, after_fork_parent, after_fork_child);
}

/* ---- open and close ---------------------------------------------------------------------------- */

/* What is taken when an address has a socket on the port already, and what to do. */
static void say_bind_error(const struct mg_addr *addr, const char *ifname, int err)
{
	char text[INET6_ADDRSTRLEN];

	mg_addr_print(addr->gid, text, sizeof(text));
	if (err == EADDRINUSE)
		mg_say("UDP port %u on %s (%s) is in use: without an agent one process can use the device; "
		       "start `migroce agent`, or give each process an address of its own by MIGROCE_ADDR "
		       "(`ss -ulpn sport = %u` shows who has the port)",
		       MG_ROCE_PORT, text, ifname, MG_ROCE_PORT);
	else
		mg_say("cannot bind UDP port %u on %s (%s): %s", MG_ROCE_PORT, text, ifname, strerror(err));
}

static void say_choose_error(int err)
{
	const char *addr = getenv("MIGROCE_ADDR"), *iface = getenv("MIGROCE_IFACE");

	if (addr && *addr && (err == EINVAL || err == EADDRNOTAVAIL))
		mg_say("MIGROCE_ADDR=%s %s", addr,
		       err == EINVAL ? "is no IP address"
				     : "is not an address of this machine (see `ip addr`)");
	else if (iface && *iface && err == EADDRNOTAVAIL)
		mg_say("MIGROCE_IFACE=%s: no such interface, or it has no IP address (see `ip addr`)", iface);
	else
		mg_say("no network interface to put the device on: %s", strerror(err));
}

/* Alone: our own socket, all QPNs. */
static int open_alone(struct mg_device *dev, struct mg_config *cfg)
{
	int ret = mg_addr_choose(NULL, &dev->port, &cfg->addr);

	if (ret) {
		say_choose_error(ret);
		return ret;
	}
	ret = mg_net_bind(dev->net, &cfg->addr);
	if (ret)
		say_bind_error(&cfg->addr, dev->port.ifname, ret);
	cfg->qpn_count = MG_QPN_MASK + 1u;
	if (dev->control)
		mg_control_alone(dev->control, &cfg->addr);
	return ret;
}

/* With what the agent gave us. */
static int open_welcomed(struct mg_device *dev, struct mg_config *cfg, const struct mg_ctl_welcome *w,
			 const int *fds)
{
	int ret = mg_net_adopt(dev->net, fds, w->n_sockets);

	if (ret) {
		mg_say("the agent's sockets cannot be used: %s", strerror(ret));
		return ret;
	}
	ret = mg_control_addr(dev, w, &dev->port, &cfg->addr);
	if (ret) {
		char text[INET6_ADDRSTRLEN];

		mg_say("the agent's address %s is not on any interface here",
		       mg_addr_print(w->gid, text, sizeof(text)));
		return ret;
	}
	cfg->slot = w->slot;
	cfg->qpn_base = w->qpn_base;
	cfg->qpn_count = w->qpn_count;
	return 0;
}

/* MIGROCE_STATS=1: the counters that are not zero, when the device is closed or the program exits. */
static void say_counters(struct mg_device *dev)
{
	const char *env = getenv("MIGROCE_STATS");
	char line[480];
	size_t at = 0;

	if (!env || !*env || *env == '0')
		return;
	line[0] = '\0';
	for (int i = 0; i < MG_CNT_MAX && at < sizeof(line); i++) {
		unsigned long long n = mg_counter_get(dev->engine, i);

		if (n)
			at += (size_t)snprintf(line + at, sizeof(line) - at, " %s=%llu", mg_counter_name[i],
					       n);
	}
	mg_say("counters%s", line);
}

static void close_device(struct mg_device *dev)
{
	/* The sockets before the connection: when the agent sees its end, nothing is left open here. */
	mg_net_free(dev->net);
	mg_control_free(dev->control);
	if (dev->engine)
		mg_engine_destroy(dev->engine);
	mg_cm_free(dev->cm);
	if (dev->wake_fd >= 0)
		close(dev->wake_fd);
	pthread_mutex_destroy(&dev->lock);
	free(dev);
}

static int open_device(struct mg_device *dev)
{
	struct mg_config cfg = {0};
	struct mg_ctl_welcome welcome;
	int fds[MG_CTL_MAX_FDS];
	int ret;

	mg_guard_install();
	dev->net = mg_net_new();
	dev->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (!dev->net || dev->wake_fd < 0) {
		ret = errno;
		goto said;
	}
	mg_watch_open(dev->net); /* before the interface is looked at: no change is missed */
	ret = mg_control_open(&dev->control, &welcome, fds);
	if (!ret)
		ret = open_welcomed(dev, &cfg, &welcome, fds);
	else if (ret == ENOENT)
		ret = open_alone(dev, &cfg);
	if (ret)
		return ret;
	cfg.max_path_mtu = dev->port.active_mtu;
	dev->engine = mg_engine_create(&cfg, &engine_ops, dev);
	if (!dev->engine) {
		ret = ENOMEM;
		goto said;
	}
	mg_further_sync(dev, &dev->port, true);
	mg_net_usable(dev->net, &dev->port);
	mg_net_gids(dev);
	ret = open_cm(dev, &cfg);
	if (!ret)
		ret = mg_progress_start(dev);
	if (!ret)
		return 0;
said:
	mg_say("cannot open the device: %s", strerror(ret));
	return ret;
}

struct mg_device *mg_device_get(void)
{
	struct mg_device *dev;
	pthread_mutexattr_t attr;
	int ret = 0, cancel_state;

	pthread_once(&the.once, watch_forks);
	cancel_state = lock_the();
	dev = the.dev;
	if (dev) {
		dev->refs++;
		goto out;
	}
	dev = calloc(1, sizeof(*dev));
	if (!dev) {
		ret = ENOMEM;
		goto out;
	}
	/* Held for a few microseconds at most: spinning beats a futex when threads contend. */
	pthread_mutexattr_init(&attr);
	pthread_mutexattr_settype(&attr, PTHREAD_MUTEX_ADAPTIVE_NP);
	pthread_mutex_init(&dev->lock, &attr);
	pthread_mutexattr_destroy(&attr);
	dev->wake_fd = -1;
	dev->refs = 1;
	ret = open_device(dev);
	if (ret) {
		close_device(dev);
		dev = NULL;
	}
	the.dev = dev;
out:
	unlock_the(cancel_state);
	if (!dev)
		errno = ret;
	return dev;
}

static void last_put(struct mg_device *dev)
{
	mg_control_settle(dev->control);
	/* The last acknowledgements, that a peer may be waiting for. */
	mg_device_lock(dev);
	mg_cm_farewell(dev->cm, mg_now());
	mg_net_flush(dev, 0);
	mg_device_unlock(dev);
	mg_progress_stop(dev);
	say_counters(dev);
	close_device(dev);
}

void mg_device_put(struct mg_device *dev)
{
	/* Until the end: whoever opens the device anew meanwhile needs the port, and a fork finds no half of one. */
	int cancel_state = lock_the();

	/* In a child's copy there is nothing to close: the thread, the memory and the peers are the parent's. */
	if (!--dev->refs && !dev->forked) {
		the.dev = NULL;
		last_put(dev);
	}
	unlock_the(cancel_state);
}

void mg_device_port(struct mg_device *dev, struct mg_port *port)
{
	mg_device_lock(dev);
	mg_watch_run(dev);
	*port = dev->port;
	mg_device_unlock(dev);
}

int mg_device_probe(struct mg_port *port)
{
	struct mg_port found;
	struct mg_addr addr;
	int ret = 0, cancel_state = lock_the();

	if (the.dev)
		mg_device_port(the.dev, &found);
	else
		ret = mg_addr_choose(NULL, &found, &addr);
	if (ret && !the.said) /* a program would only find that there is no device */
		say_choose_error(ret);
	the.said |= ret != 0;
	unlock_the(cancel_state);
	if (!ret && port)
		*port = found;
	return ret;
}

/* A program that exits without closing: its peers get the acknowledgements that were held back. */
__attribute__((destructor)) static void at_exit(void)
{
	struct mg_device *dev;

	/* Another thread may be opening or closing it, or have been ended with its lock held. */
	if (pthread_mutex_trylock(&the.lock))
		return;
	dev = the.dev;
	if (dev && !dev->forked)
		mg_control_settle(dev->control);
	if (dev && !pthread_mutex_trylock(&dev->lock)) {
		mg_cm_farewell(dev->cm, mg_now());
		mg_net_flush(dev, 0);
		say_counters(dev);
		pthread_mutex_unlock(&dev->lock);
	}
	pthread_mutex_unlock(&the.lock);
}
