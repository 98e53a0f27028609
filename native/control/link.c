// SPDX-License-Identifier: BSD-3-Clause
/*
 * link.c - the SOCK_SEQPACKET connection to the agent, descriptors included.
 */
#include "control/control.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

int mg_ctl_connect(const char *path, unsigned timeout_ms)
{
	struct timeval t = {.tv_sec = timeout_ms / 1000, .tv_usec = (timeout_ms % 1000) * 1000};
	struct sockaddr_un sun = {.sun_family = AF_UNIX};
	int fd, err;

	if (strlen(path) >= sizeof(sun.sun_path))
		return -ENAMETOOLONG;
	memcpy(sun.sun_path, path, strlen(path));
	/* Looked for every 2 ms while stopped: no descriptor exists for as long as there is no agent. */
	if (access(path, F_OK))
		return -errno;
	fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | (timeout_ms ? 0 : SOCK_NONBLOCK), 0);
	if (fd < 0)
		return -errno;
	if (timeout_ms)
		setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &t, sizeof(t));
	if (connect(fd, (struct sockaddr *)&sun, sizeof(sun))) {
		err = errno;
		close(fd);
		return -err;
	}
	if (timeout_ms && fcntl(fd, F_SETFL, O_NONBLOCK)) {
		err = errno;
		close(fd);
		return -err;
	}
	return fd;
}

int mg_ctl_send(int fd, const uint8_t *buf, size_t len, const int *fds, size_t n_fds)
{
	union {
		struct cmsghdr align;
		uint8_t buf[CMSG_SPACE(MG_CTL_MAX_FDS * sizeof(int))];
	} ctl = {0};
	struct iovec iov = {(void *)buf, len};
	struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1};
	ssize_t ret;

	if (n_fds) {
		struct cmsghdr *c = &ctl.align;

		c->cmsg_level = SOL_SOCKET;
		c->cmsg_type = SCM_RIGHTS;
		c->cmsg_len = CMSG_LEN(n_fds * sizeof(int));
		memcpy(CMSG_DATA(c), fds, n_fds * sizeof(int));
		m.msg_control = ctl.buf;
		m.msg_controllen = CMSG_SPACE(n_fds * sizeof(int));
	}
	do
		ret = sendmsg(fd, &m, MSG_NOSIGNAL | MSG_DONTWAIT);
	while (ret < 0 && errno == EINTR);
	return ret < 0 ? errno : 0;
}

static size_t take_fds(struct msghdr *m, int *fds)
{
	size_t n = 0;

	for (struct cmsghdr *c = CMSG_FIRSTHDR(m); c; c = CMSG_NXTHDR(m, c)) {
		size_t have;

		if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
			continue;
		have = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
		for (size_t i = 0; i < have; i++) {
			int fd;

			memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(fd));
			if (n < MG_CTL_MAX_FDS)
				fds[n++] = fd;
			else
				close(fd);
		}
	}
	return n;
}

int mg_ctl_receive(int fd, struct mg_ctl_msg *msg, int fds[MG_CTL_MAX_FDS], size_t *n_fds)
{
	uint8_t buf[MG_CTL_MAX_LEN];
	union {
		struct cmsghdr align;
		uint8_t buf[CMSG_SPACE(MG_CTL_MAX_FDS * sizeof(int))];
	} ctl;
	struct iovec iov = {buf, sizeof(buf)};
	struct msghdr m = {
		.msg_iov = &iov, .msg_iovlen = 1, .msg_control = ctl.buf, .msg_controllen = sizeof(ctl.buf)};
	ssize_t len;
	int ret;

	*n_fds = 0;
	do
		len = recvmsg(fd, &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
	while (len < 0 && errno == EINTR);
	if (len < 0)
		return errno;
	if (len == 0)
		return EPIPE;
	*n_fds = take_fds(&m, fds);
	ret = m.msg_flags & (MSG_TRUNC | MSG_CTRUNC) ? EBADMSG : mg_ctl_parse(buf, (size_t)len, msg);
	if (!ret && msg->type == MG_CTL_WELCOME && msg->welcome.n_sockets != *n_fds)
		ret = EBADMSG;
	if (!ret && msg->type == MG_CTL_SOCKETS && msg->sockets.n_sockets != *n_fds)
		ret = EBADMSG;
	if (ret) {
		while (*n_fds)
			close(fds[--*n_fds]);
	}
	return ret;
}
