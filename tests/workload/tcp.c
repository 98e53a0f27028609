/* SPDX-License-Identifier: BSD-3-Clause */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include "mgcheck.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

static struct addrinfo *resolve(const char *host, const char *port, int flags)
{
	struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = flags};
	struct addrinfo *list;
	int rc = getaddrinfo(host, port, &hints, &list);

	if (rc)
		die("%s port %s: %s", host ? host : "any address", port, gai_strerror(rc));
	return list;
}

static int ready(int fd)
{
	int one = 1;

	setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	return fd;
}

int tcp_connect(const char *host, const char *port, uint32_t seconds)
{
	struct addrinfo *list = resolve(host, port, 0);
	int64_t until = now_ns() + seconds * 1000000000ll;
	int err = 0;

	do {
		for (struct addrinfo *a = list; a; a = a->ai_next) {
			int fd = socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, a->ai_protocol);

			if (fd >= 0 && connect(fd, a->ai_addr, a->ai_addrlen) == 0) {
				freeaddrinfo(list);
				return ready(fd);
			}
			err = errno;
			if (fd >= 0)
				close(fd);
		}
		/* The server may not listen yet: ask again until the time is up. */
		nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
	} while (now_ns() < until && !terminated);
	die("cannot connect to %s port %s: %s", host, port, strerror(err));
}

int tcp_accept(const char *port)
{
	struct addrinfo *list = resolve(NULL, port, AI_PASSIVE);
	int listener = -1, fd, one = 1, zero = 0;

	/* One IPv6 socket serves both families; IPv4 alone where there is no IPv6. */
	for (int family = AF_INET6; listener < 0 && family; family = family == AF_INET6 ? AF_INET : 0) {
		for (struct addrinfo *a = list; a && listener < 0; a = a->ai_next) {
			if (a->ai_family != family)
				continue;
			listener = socket(family, a->ai_socktype | SOCK_CLOEXEC, a->ai_protocol);
			if (listener < 0)
				continue;
			setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
			if (family == AF_INET6)
				setsockopt(listener, IPPROTO_IPV6, IPV6_V6ONLY, &zero, sizeof(zero));
			if (bind(listener, a->ai_addr, a->ai_addrlen) || listen(listener, 1)) {
				close(listener);
				listener = -1;
			}
		}
	}
	if (listener < 0)
		die("cannot listen on port %s: %s", port, strerror(errno));
	freeaddrinfo(list);
	while ((fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC)) < 0)
		if (errno != EINTR || terminated)
			die("accept: %s", terminated ? "told to end" : strerror(errno));
	close(listener);
	return ready(fd);
}

bool tcp_try_write(int fd, const void *buf, size_t len)
{
	while (len) {
		ssize_t n = send(fd, buf, len, MSG_NOSIGNAL);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return false;
		buf = (const uint8_t *)buf + n;
		len -= (size_t)n;
	}
	return true;
}

void tcp_write(int fd, const void *buf, size_t len)
{
	if (!tcp_try_write(fd, buf, len))
		die("control connection lost: %s", strerror(errno));
}

bool tcp_try_read(int fd, void *buf, size_t len, int ms)
{
	int64_t until = now_ns() + ms * 1000000ll;

	while (len) {
		struct pollfd p = {.fd = fd, .events = POLLIN};
		int64_t left = (until - now_ns()) / 1000000;
		int rc = left < 0 ? 0 : poll(&p, 1, (int)left + 1);
		ssize_t n;

		if (rc < 0 && errno == EINTR)
			continue;
		if (rc <= 0)
			return false;
		n = recv(fd, buf, len, 0);
		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return false;
		buf = (uint8_t *)buf + n;
		len -= (size_t)n;
	}
	return true;
}

void tcp_read(int fd, void *buf, size_t len)
{
	if (!tcp_try_read(fd, buf, len, 3600 * 1000))
		die("control connection lost");
}

bool tcp_readable(int fd)
{
	struct pollfd p = {.fd = fd, .events = POLLIN};

	return fd >= 0 && poll(&p, 1, 0) == 1;
}
