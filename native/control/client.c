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
 * Everything here runs in the progress thread (the way to LINKED or LOST at device open: open.c).
 */
#include "control/client.h"

#include "net/net.h"
#include "transport/dump.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define SEARCH_NS (2 * MG_CTL_MS) /* stopped, an agent is to come */
#define DRAIN_NS (MG_CTL_MS / 2)  /* between looks at mg_stop_ready */
#define DRAIN_MAX_MS 60000u
#define MAX_SEARCHES 1000u /* until the alarm goes on, the device may be closed: nobody takes a checkpoint */
#define FINAL_ROUNDS 256u  /* trains read before the stop at most */

/* ---- connection ------------------------------------------------------------------------------ */

void mg_control_change(struct mg_control *c, enum mg_control_state to, mg_time next)
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
	case RESUMING: mg_control_change(c, STOPPED, now + SEARCH_NS); break;
	default: mg_control_change(c, LOST, now + MG_CTL_RECONNECT_NS); break;
	}
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
	mg_alarm_hold(&c->alarm); /* a checkpoint may begin as soon as that is out */
	sent = mg_ctl_send(c->fd, out, out_len, &fd, ret ? 0 : 1);
	if (!ret)
		close(fd);
	if (ret || sent) {
		/* Not stopped after all. */
		mg_alarm_release(&c->alarm);
		mg_resume(dev->engine, mg_now(), NULL);
		mg_net_send(dev, now, 0);
		mg_control_change(c, LINKED, MG_NEVER);
		if (sent)
			lost(c, now);
	} else {
		mg_net_close(dev->net);
		mg_control_hang_up(c);
		c->searches = 0;
		atomic_store(&c->away, true);
		mg_control_change(c, STOPPED, now + SEARCH_NS);
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

		mg_control_learn(c, w, &addr);
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
	if (!ret)
		mg_alarm_release(&c->alarm);
	mg_device_unlock(dev);
	len = mg_ctl_build_resumed(out, c->last_request, (uint32_t)ret, ret ? 0 : c->n_qp);
	if (!ret)
		mg_control_change(c, LINKED, MG_NEVER);
	atomic_store(&dev->services_changed, dev->n_services != 0);
	if (mg_ctl_send(c->fd, out, len, NULL, 0) || ret)
		lost(c, mg_now());
	if (!ret)
		atomic_store(&c->away, false);
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
		c->next = now + MG_CTL_RECONNECT_NS;
	} else if (w->qpn_base != c->self.qpn_base || w->qpn_count != c->self.qpn_count) {
		/* Our QPNs are fixed: with another range packets would not reach us. */
		lost(c, now);
		c->next = now + MG_CTL_RECONNECT_NS;
	} else if (c->state == GREETING) {
		c->self.slot = w->slot;
		mg_control_change(c, LINKED, MG_NEVER);
		atomic_store(&dev->services_changed, dev->n_services != 0); /* a new agent knows of none */
		mg_progress_lock(dev);
		dev->net->alone = false;
		mg_watch_look(dev, true); /* what came while there was no agent */
		mg_device_unlock(dev);
	} else {
		*n_fds = 0;
		resume_now(dev, w, fds, n);
	}
}

/* Sockets of further addresses that were asked for: what they are bound to comes into the GID table. */
static void on_sockets(struct mg_device *dev, const int *fds, size_t *n_fds)
{
	if (dev->control->state != LINKED && dev->control->state != DRAIN)
		return;
	mg_progress_lock(dev);
	mg_net_adopt_more(dev->net, fds, *n_fds);
	*n_fds = 0;
	mg_watch_look(dev, false); /* what the agent has not sent it cannot have now */
	mg_device_unlock(dev);
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
		c->drain_until = now + wait_ms * MG_CTL_MS;
		mg_control_change(c, DRAIN, now);
		break;
	case MG_CTL_SOCKETS: on_sockets(dev, fds, n_fds); break;
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
	int fds[MG_CTL_MAX_FDS], ret;
	size_t n = 0;

	c->next = now + (stopped ? SEARCH_NS : MG_CTL_RECONNECT_NS);
	ret = mg_ctl_connect(c->path, 0);
	if (ret < 0)
		return;
	c->fd = ret;
	mg_progress_lock(dev); /* the sockets stay what they are until they are sent */
	for (int i = 0; i < MG_FAMILIES && !stopped; i++)
		if (dev->net->sock[i].fd >= 0)
			fds[n++] = dev->net->sock[i].fd;
	for (unsigned i = 0; i < dev->net->n_further && n < MG_CTL_MAX_FDS; i++)
		fds[n++] = dev->net->further[i].fd;
	ret = mg_control_say_hello(c, stopped ? MG_HELLO_STOPPED : MG_HELLO_RUNNING, fds, n);
	mg_device_unlock(dev);
	mg_control_change(c, stopped ? RESUMING : GREETING, now + MG_CTL_ANSWER_NS);
	if (ret)
		lost(c, now);
}

static void on_time(struct mg_device *dev, mg_time now)
{
	struct mg_control *c = dev->control;

	switch (c->state) {
	case DRAIN: drain(dev, now); break;
	case STOPPED:
		if (++c->searches == MAX_SEARCHES) {
			mg_alarm_release(&c->alarm);
			atomic_store(&c->away, false);
		}
		reconnect(dev, now);
		break;
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

static void ask_addresses(struct mg_device *dev, mg_time now)
{
	struct mg_control *c = dev->control;
	struct mg_addr have[MG_MAX_GID];
	uint8_t out[MG_CTL_MAX_LEN];
	unsigned n;
	size_t len;

	atomic_store(&dev->ask_addresses, false);
	mg_progress_lock(dev);
	n = dev->net->n_further;
	for (unsigned i = 0; i < n; i++)
		memcpy(have[i].gid, dev->net->further[i].gid, sizeof(have[i].gid));
	mg_device_unlock(dev);
	len = mg_ctl_build_addresses(out, ++c->last_request, have, n);
	if (mg_ctl_send(c->fd, out, len, NULL, 0))
		lost(c, now);
}

void mg_control_settle(struct mg_control *c)
{
	static const struct timespec moment = {.tv_nsec = MG_CTL_MS};

	while (c && atomic_load(&c->away))
		nanosleep(&moment, NULL);
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
	if (c->state == STOPPED && c->next > now + MG_CTL_RECONNECT_NS)
		c->next = now;
	if (now >= c->next)
		on_time(dev, now);
	if (c->state == LINKED && atomic_load(&dev->services_changed))
		tell_services(dev, now);
	if (c->state == LINKED && atomic_load(&dev->ask_addresses))
		ask_addresses(dev, now);
	return c->next;
}
