// SPDX-License-Identifier: BSD-3-Clause
/* open.c - the library finds its agent when the device is opened, and takes what it gives. */
#include "control/client.h"

#include "net/net.h"

#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <unistd.h>

int mg_control_say_hello(struct mg_control *c, enum mg_ctl_hello_state state, const int *fds, size_t n_fds)
{
	uint8_t buf[MG_CTL_MAX_LEN];
	size_t len;

	c->self.state = state;
	c->self.pid = (uint32_t)getpid();
	/* Not the name of the thread that happens to say hello. */
	snprintf(c->self.comm, sizeof(c->self.comm), "%.15s", program_invocation_short_name);
	c->self.flags = mg_addr_single() ? 0 : MG_HELLO_FURTHER;
	len = mg_ctl_build_hello(buf, ++c->last_request, &c->self);
	return mg_ctl_send(c->fd, buf, len, fds, n_fds);
}

void mg_control_learn(struct mg_control *c, const struct mg_ctl_welcome *w, const struct mg_addr *addr)
{
	c->self.slot = w->slot;
	c->self.qpn_base = w->qpn_base;
	c->self.qpn_count = w->qpn_count;
	if (addr)
		memcpy(c->self.gid, addr->gid, 16);
}

static int await_welcome(struct mg_control *c, struct mg_ctl_welcome *welcome, int *fds)
{
	mg_time end = mg_now() + MG_CTL_ANSWER_NS;
	struct pollfd p = {.fd = c->fd, .events = POLLIN};
	struct mg_ctl_msg msg;
	size_t n;

	for (;;) {
		mg_time now = mg_now();
		int ret;

		if (now >= end)
			return ETIMEDOUT;
		poll(&p, 1, (int)((end - now) / MG_CTL_MS) + 1);
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
	ret = mg_control_say_hello(c, MG_HELLO_FRESH, NULL, 0);
	if (!ret)
		ret = await_welcome(c, welcome, fds);
	if (!ret)
		mg_control_learn(c, welcome, NULL);
	return ret;
}

void mg_control_alone(struct mg_control *c, const struct mg_addr *addr)
{
	c->self.qpn_count = MG_QPN_MASK + 1u;
	memcpy(c->self.gid, addr->gid, 16);
	mg_control_change(c, LOST, mg_now() + MG_CTL_RECONNECT_NS);
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
	c->fd = mg_ctl_connect(path, MG_CTL_ANSWER_NS / MG_CTL_MS);
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
		mg_control_change(c, LINKED, MG_NEVER);
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
	mg_alarm_release(&c->alarm);
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
