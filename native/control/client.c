// SPDX-License-Identifier: BSD-3-Clause
/*
 * client.c - the library's part in stop and resume: what the agent says and what time asks for.
 *
 *   LINKED   --STOP-->          DRAIN     wait for mg_stop_ready, traffic goes on
 *   DRAIN    --ready, time-->   STOPPED   dump sent, sockets and connection closed
 *   DRAIN    --agent lost-->    LOST      as if STOP had not come
 *   STOPPED  --agent there-->   RESUMING  HELLO(stopped) sent
 *   RESUMING --WELCOME-->       LINKED    new sockets in use, Resumes sent, RESUMED
 *   RESUMING --lost, time-->    STOPPED
 *   LINKED   --agent lost-->    LOST      runs on without an agent
 *   LOST     --agent there-->   GREETING  HELLO(running) with our sockets sent
 *   GREETING --WELCOME-->       LINKED
 *   GREETING --lost, time-->    LOST
 *
 * Everything here runs in the progress thread (but open and free, before and after it).
 */
#include "control/control.h"

#include "net/net.h"
#include "transport/dump.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/random.h>
#include <unistd.h>

#define MS 1000000ull
#define ANSWER_NS (5000 * MS)	 /* for the agent to answer a HELLO */
#define RECONNECT_NS (1000 * MS) /* running, the agent is gone */
#define SEARCH_NS (2 * MS)	 /* stopped, an agent is to come */
#define DRAIN_NS (MS / 2)	 /* between looks at mg_stop_ready */
#define DRAIN_MAX_MS 60000u
#define FINAL_ROUNDS 256u /* trains read before the stop at most */

enum state { LINKED, DRAIN, STOPPED, RESUMING, LOST, GREETING };

struct mg_control {
	enum state state;
	int fd;
	mg_time next; /* when time asks for something */
	mg_time drain_until;
	uint32_t request;      /* of the STOP being carried out */
	uint32_t last_request; /* of ours */
	uint32_t n_qp;	       /* when stopped */
	struct mg_ctl_hello self;
	char path[108];
};

/* ---- connection ------------------------------------------------------------------------------ */

static void change(struct mg_control *c, enum state to, mg_time next)
{
	c->state = to;
	c->next = next;
}

void mg_control_hang_up(struct mg_control *c)
{
	if (c->fd >= 0)
		close(c->fd);
	c->fd = -1;
}

/* The connection broke or was ended: which state that leads to. */
static void lost(struct mg_control *c, mg_time now)
{
	mg_control_hang_up(c);
	switch (c->state) {
	case STOPPED:
	case RESUMING: change(c, STOPPED, now + SEARCH_NS); break;
	default: change(c, LOST, now + RECONNECT_NS); break;
	}
}

static int say_hello(struct mg_control *c, enum mg_ctl_hello_state state, const int *fds, size_t n_fds)
{
	uint8_t buf[MG_CTL_MAX_LEN];
	size_t len;

	c->self.state = state;
	c->self.pid = (uint32_t)getpid();
	/* Not the name of the thread that happens to say hello. */
	snprintf(c->self.comm, sizeof(c->self.comm), "%.15s", program_invocation_short_name);
	len = mg_ctl_build_hello(buf, ++c->last_request, &c->self);
	return mg_ctl_send(c->fd, buf, len, fds, n_fds);
}

static void learn(struct mg_control *c, const struct mg_ctl_welcome *w, const struct mg_addr *addr)
{
	c->self.slot = w->slot;
	c->self.qpn_base = w->qpn_base;
	c->self.qpn_count = w->qpn_count;
	if (addr)
		memcpy(c->self.gid, addr->gid, 16);
}

/* ---- open, before there is a thread -------------------------------------------------------------- */

static int await_welcome(struct mg_control *c, struct mg_ctl_welcome *welcome, int *fds)
{
	mg_time end = mg_now() + ANSWER_NS;
	struct pollfd p = {.fd = c->fd, .events = POLLIN};
	struct mg_ctl_msg msg;
	size_t n;

	for (;;) {
		mg_time now = mg_now();
		int ret;

		if (now >= end)
			return ETIMEDOUT;
		poll(&p, 1, (int)((end - now) / MS) + 1);
		ret = mg_ctl_receive(c->fd, &msg, fds, &n);
		if (ret == EAGAIN)
			continue;
		if (ret)
			return ret;
		if (msg.type == MG_CTL_WELCOME)
			break;
		while (n)
			close(fds[--n]);
	}
	*welcome = msg.welcome;
	if (!welcome->status && n)
		return 0;
	while (n)
		close(fds[--n]);
	return welcome->status ? (int)welcome->status : EPROTO;
}

/* Say who we are and get an address, ids and sockets. */
static int introduce(struct mg_control *c, struct mg_ctl_welcome *welcome, int *fds)
{
	struct mg_port port;
	struct mg_addr addr;
	int ret;

	/* Where we would be by ourselves; the agent may know better. */
	if (!mg_addr_choose(NULL, &port, &addr))
		memcpy(c->self.gid, addr.gid, 16);
	ret = say_hello(c, MG_HELLO_FRESH, NULL, 0);
	if (!ret)
		ret = await_welcome(c, welcome, fds);
	if (!ret)
		learn(c, welcome, NULL);
	return ret;
}

void mg_control_alone(struct mg_control *c, const struct mg_addr *addr)
{
	c->self.qpn_count = MG_QPN_MASK + 1u;
	memcpy(c->self.gid, addr->gid, 16);
	change(c, LOST, mg_now() + RECONNECT_NS);
}

int mg_control_open(struct mg_control **out, struct mg_ctl_welcome *welcome, int fds[MG_CTL_MAX_FDS])
{
	const char *path = getenv("MIGROCE_AGENT");
	struct mg_control *c;
	int ret;

	*out = NULL;
	if (!path)
		path = MG_CTL_DEFAULT_PATH;
	if (!*path)
		return ENOENT; /* MIGROCE_AGENT= : none wanted */
	c = calloc(1, sizeof(*c));
	if (!c)
		return ENOMEM;
	c->self.slot = MG_CTL_NO_SLOT;
	snprintf(c->path, sizeof(c->path), "%s", path);
	c->fd = mg_ctl_connect(path, ANSWER_NS / MS);
	ret = c->fd < 0 ? -c->fd : 0;
	if (getrandom(c->self.instance, sizeof(c->self.instance), 0) != sizeof(c->self.instance))
		ret = EIO;
	switch (ret) {
	case 0: break;
	case ENOENT:
	case ENOTDIR:
	case ECONNREFUSED:
	case EACCES: *out = c; return ENOENT;
	default: mg_say("cannot connect to the agent at %s: %s", path, strerror(ret)); goto fail;
	}
	ret = introduce(c, welcome, fds);
	if (!ret) {
		change(c, LINKED, MG_NEVER);
		*out = c;
		return 0;
	}
	if (ret == ETIMEDOUT)
		mg_say("the agent at %s does not answer: see `migroce agent status`", path);
	else
		mg_say("the agent at %s gives no device: %s", path, strerror(ret));
	if (ret == ENOENT)
		ret = EPROTO; /* ENOENT is for "no agent" */
fail:
	mg_control_free(c);
	return ret;
}

void mg_control_free(struct mg_control *c)
{
	if (!c)
		return;
	mg_control_hang_up(c);
	free(c);
}

int mg_control_fd(const struct mg_control *c)
{
	return c ? c->fd : -1;
}

int mg_control_addr(struct mg_device *dev, const struct mg_ctl_welcome *w, struct mg_port *port,
		    struct mg_addr *addr)
{
	static const uint8_t none[16];
	const struct mg_sock *v4 = &dev->net->sock[MG_V4];
	struct mg_addr want;
	int ret;

	if (memcmp(w->gid, none, 16))
		memcpy(want.gid, w->gid, 16);
	else if (v4->fd >= 0 && !v4->wild)
		memcpy(want.gid, v4->gid, 16);
	else
		return mg_addr_choose(NULL, port, addr);
	ret = mg_addr_choose(&want, port, addr);
	if (!ret && dev->control)
		memcpy(dev->control->self.gid, addr->gid, 16);
	return ret;
}

/* ---- dump ------------------------------------------------------------------------------------------ */

static uint32_t dump_n_qp(const uint8_t *dump, size_t len)
{
	struct mg_dump_context context;
	struct mg_dump_record record;
	size_t at = sizeof(struct mg_dump_header);

	while (at + sizeof(record) + sizeof(context) <= len) {
		memcpy(&record, dump + at, sizeof(record));
		at += sizeof(record);
		if (record.type == MG_DUMP_CONTEXT && record.length >= sizeof(context)) {
			memcpy(&context, dump + at, sizeof(context));
			return context.n_qp;
		}
		at += record.length;
	}
	return 0;
}

static int write_all(int fd, const uint8_t *buf, size_t len)
{
	while (len) {
		ssize_t n = write(fd, buf, len);

		if (n < 0 && errno == EINTR)
			continue;
		if (n < 0)
			return errno;
		buf += n;
		len -= (size_t)n;
	}
	return 0;
}

/* Lock held. The context's dump in a memfd: 0 or errno; the caller closes *fd. */
static int dump_to_memfd(struct mg_device *dev, int *fd, size_t *len, uint32_t *n_qp)
{
	uint8_t *buf;
	int ret;

	*len = mg_dump(dev->engine, NULL, 0);
	buf = malloc(*len);
	if (!buf)
		return ENOMEM;
	mg_dump(dev->engine, buf, *len);
	*n_qp = dump_n_qp(buf, *len);
	*fd = memfd_create("migroce-dump", MFD_CLOEXEC);
	ret = *fd < 0 ? errno : write_all(*fd, buf, *len);
	if (ret && *fd >= 0)
		close(*fd);
	free(buf);
	return ret;
}

static void answer_dump(struct mg_device *dev, uint32_t request, mg_time now)
{
	struct mg_control *c = dev->control;
	uint8_t out[MG_CTL_MAX_LEN];
	size_t len = 0, out_len;
	uint32_t n_qp;
	int fd, ret, sent;

	mg_progress_lock(dev);
	ret = dump_to_memfd(dev, &fd, &len, &n_qp);
	mg_device_unlock(dev);
	out_len = mg_ctl_build_dump(out, request, (uint32_t)ret, ret ? 0 : len);
	sent = mg_ctl_send(c->fd, out, out_len, &fd, ret ? 0 : 1);
	if (!ret)
		close(fd);
	if (sent)
		lost(c, now);
}

/* ---- stop and resume ----------------------------------------------------------------------------------- */

/*
 * Stop and tell the agent. Our sockets are closed only when the STOPPED is out, so that a dead agent
 * leaves us running; the end of the connection tells the agent that nothing is left open here.
 */
static void stop_now(struct mg_device *dev, mg_time now)
{
	struct mg_control *c = dev->control;
	uint8_t out[MG_CTL_MAX_LEN];
	size_t len = 0, out_len;
	int fd, ret, sent;

	mg_progress_lock(dev);
	/* What has arrived need not be sent again. */
	for (unsigned i = 0; i < FINAL_ROUNDS && mg_net_receive(dev, now) > 0; i++)
		;
	mg_net_send(dev, now, 0);
	mg_stop(dev->engine);
	ret = dump_to_memfd(dev, &fd, &len, &c->n_qp);
	out_len = mg_ctl_build_stopped(out, c->request, (uint32_t)ret, ret ? 0 : c->n_qp, ret ? 0 : len);
	sent = mg_ctl_send(c->fd, out, out_len, &fd, ret ? 0 : 1);
	if (!ret)
		close(fd);
	if (ret || sent) {
		/* Not stopped after all. */
		mg_resume(dev->engine, mg_now(), NULL);
		mg_net_send(dev, now, 0);
		change(c, LINKED, MG_NEVER);
		if (sent)
			lost(c, now);
	} else {
		mg_net_close(dev->net);
		mg_control_hang_up(c);
		change(c, STOPPED, now + SEARCH_NS);
	}
	mg_device_unlock(dev);
}

static void drain(struct mg_device *dev, mg_time now)
{
	struct mg_control *c = dev->control;
	bool ready;

	mg_progress_lock(dev);
	ready = mg_stop_ready(dev->engine);
	if (!ready)
		mg_net_send(dev, now, 0);
	mg_device_unlock(dev);
	if (ready || now >= c->drain_until)
		stop_now(dev, now);
	else
		c->next = now + DRAIN_NS;
}

/* Carry on with the agent's new sockets; they are ours. */
static void resume_now(struct mg_device *dev, const struct mg_ctl_welcome *w, const int *fds, size_t n_fds)
{
	struct mg_control *c = dev->control;
	uint8_t out[MG_CTL_MAX_LEN];
	struct mg_port port;
	struct mg_addr addr;
	size_t len;
	int ret;

	mg_progress_lock(dev);
	mg_watch_open(dev->net);
	ret = mg_net_adopt(dev->net, fds, n_fds);
	if (!ret) {
		ret = mg_control_addr(dev, w, &port, &addr);
		if (ret)
			mg_net_close(dev->net);
	}
	if (!ret) {
		mg_time now = mg_now();

		learn(c, w, &addr);
		/* Marks of another machine's clock. */
		atomic_store(&dev->last_poll, 0);
		mg_watch_moved(dev, &port);
		mg_ports_resumed(dev);
		mg_resume(dev->engine, now, &addr);
		/* The dump told of the groups; one that cannot be joined here is a silent one. */
		(void)mg_net_mcast_sync(dev);
		mg_net_send(dev, now, 0);
		prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0);
	}
	mg_device_unlock(dev);
	len = mg_ctl_build_resumed(out, c->last_request, (uint32_t)ret, ret ? 0 : c->n_qp);
	if (!ret)
		change(c, LINKED, MG_NEVER);
	atomic_store(&dev->services_changed, dev->n_services != 0);
	if (mg_ctl_send(c->fd, out, len, NULL, 0) || ret)
		lost(c, mg_now());
}

/* ---- the agent speaks, time passes ------------------------------------------------------------------------ */

static void on_welcome(struct mg_device *dev, const struct mg_ctl_welcome *w, int *fds, size_t *n_fds,
		       mg_time now)
{
	struct mg_control *c = dev->control;
	size_t n = *n_fds;

	if (c->state != RESUMING && c->state != GREETING)
		return;
	if (w->status) {
		/* Not now: tried again as if it had not been there. */
		lost(c, now);
		c->next = now + RECONNECT_NS;
	} else if (w->qpn_base != c->self.qpn_base || w->qpn_count != c->self.qpn_count) {
		/* Our QPNs are fixed: with another range packets would not reach us. */
		lost(c, now);
		c->next = now + RECONNECT_NS;
	} else if (c->state == GREETING) {
		c->self.slot = w->slot;
		change(c, LINKED, MG_NEVER);
		atomic_store(&dev->services_changed, dev->n_services != 0); /* a new agent knows of none */
	} else {
		*n_fds = 0;
		resume_now(dev, w, fds, n);
	}
}

static void on_message(struct mg_device *dev, const struct mg_ctl_msg *msg, int *fds, size_t *n_fds,
		       mg_time now)
{
	struct mg_control *c = dev->control;
	uint32_t wait_ms;

	switch (msg->type) {
	case MG_CTL_WELCOME: on_welcome(dev, &msg->welcome, fds, n_fds, now); break;
	case MG_CTL_STOP:
		if (c->state != LINKED && c->state != DRAIN)
			break;
		c->request = msg->request;
		wait_ms = msg->stop.timeout_ms < DRAIN_MAX_MS ? msg->stop.timeout_ms : DRAIN_MAX_MS;
		c->drain_until = now + wait_ms * MS;
		change(c, DRAIN, now);
		break;
	case MG_CTL_DUMP_REQ:
		if (c->state == LINKED || c->state == DRAIN)
			answer_dump(dev, msg->request, now);
		break;
	default: break;
	}
}

static void reconnect(struct mg_device *dev, mg_time now)
{
	struct mg_control *c = dev->control;
	bool stopped = c->state == STOPPED;
	int fds[MG_FAMILIES], ret;
	size_t n = 0;

	c->next = now + (stopped ? SEARCH_NS : RECONNECT_NS);
	ret = mg_ctl_connect(c->path, 0);
	if (ret < 0)
		return;
	c->fd = ret;
	/* Only this thread replaces the sockets. */
	for (int i = 0; i < MG_FAMILIES && !stopped; i++)
		if (dev->net->sock[i].fd >= 0)
			fds[n++] = dev->net->sock[i].fd;
	ret = say_hello(c, stopped ? MG_HELLO_STOPPED : MG_HELLO_RUNNING, fds, n);
	change(c, stopped ? RESUMING : GREETING, now + ANSWER_NS);
	if (ret)
		lost(c, now);
}

static void on_time(struct mg_device *dev, mg_time now)
{
	struct mg_control *c = dev->control;

	switch (c->state) {
	case DRAIN: drain(dev, now); break;
	case STOPPED:
	case LOST: reconnect(dev, now); break;
	case RESUMING:
	case GREETING: lost(c, now); break;
	case LINKED: c->next = MG_NEVER; break;
	}
}

static void tell_services(struct mg_device *dev, mg_time now)
{
	struct mg_control *c = dev->control;
	uint8_t out[MG_CTL_MAX_LEN];
	size_t len;

	atomic_store(&dev->services_changed, false);
	mg_progress_lock(dev);
	len = mg_ctl_build_listens(out, ++c->last_request, dev->service, dev->n_services);
	mg_device_unlock(dev);
	if (mg_ctl_send(c->fd, out, len, NULL, 0))
		lost(c, now);
}

mg_time mg_control_run(struct mg_device *dev, mg_time now, bool readable)
{
	struct mg_control *c = dev->control;

	if (!c)
		return MG_NEVER;
	while (readable && c->fd >= 0) {
		int fds[MG_CTL_MAX_FDS], ret;
		struct mg_ctl_msg msg;
		size_t n;

		ret = mg_ctl_receive(c->fd, &msg, fds, &n);
		if (ret == EAGAIN)
			break;
		if (ret) {
			lost(c, now);
			break;
		}
		on_message(dev, &msg, fds, &n, now);
		while (n)
			close(fds[--n]);
	}
	/* The clock may be another machine's after a restore: never wait for longer than from now. */
	if (c->state == STOPPED && c->next > now + RECONNECT_NS)
		c->next = now;
	if (now >= c->next)
		on_time(dev, now);
	if (c->state == LINKED && atomic_load(&dev->services_changed))
		tell_services(dev, now);
	return c->next;
}
