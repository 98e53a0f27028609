/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * stream - a pair of programs without RDMA, to see how long a moved container is silent.
 *
 *   stream server PORT MIB           answers what it gets; has MIB of memory in use
 *   stream client ADDRESS PORT MS    asks 16 KiB at a time, prints each gap of at least MS milliseconds
 */
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define BLOCK 16384u

static char block[BLOCK];

static void die(const char *what)
{
	fprintf(stderr, "stream: %s: %s\n", what, strerror(errno));
	exit(2);
}

static int64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000000000ll + ts.tv_nsec;
}

static int transfer(int fd, int sending)
{
	size_t at = 0;

	while (at < BLOCK) {
		ssize_t n = sending ? send(fd, block + at, BLOCK - at, MSG_NOSIGNAL)
				    : recv(fd, block + at, BLOCK - at, 0);

		if (n < 0 && errno == EINTR)
			continue;
		if (n <= 0)
			return 0;
		at += (size_t)n;
	}
	return 1;
}

static int connection(const char *address, int port)
{
	struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};
	int fd = socket(AF_INET, SOCK_STREAM, 0), one = 1, peer;

	if (fd < 0)
		die("socket");
	setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
	if (address) {
		if (inet_pton(AF_INET, address, &a.sin_addr) != 1 ||
		    connect(fd, (struct sockaddr *)&a, sizeof(a)))
			die(address);
		peer = fd;
	} else {
		if (bind(fd, (struct sockaddr *)&a, sizeof(a)) || listen(fd, 1))
			die("listen");
		peer = accept(fd, NULL, NULL);
		if (peer < 0)
			die("accept");
		close(fd);
	}
	setsockopt(peer, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
	return peer;
}

static int server(int port, size_t mib)
{
	char *memory = malloc(mib << 20);
	int fd;

	if (!memory)
		die("memory");
	for (size_t i = 0; i < mib << 20; i += 64) /* nothing a checkpoint could leave out */
		memory[i] = (char)(i >> 6 | 1);
	fd = connection(NULL, port);
	while (transfer(fd, 0) && transfer(fd, 1))
		memory[0]++;
	free(memory);
	return 0;
}

static int client(const char *address, int port, int min_ms)
{
	int fd = connection(address, port);
	int64_t last = now_ns();

	puts("connected");
	fflush(stdout);
	while (transfer(fd, 1) && transfer(fd, 0)) {
		int64_t now = now_ns();

		if (now - last >= min_ms * 1000000ll) {
			printf("gap %.3f\n", (double)(now - last) / 1e6);
			fflush(stdout);
		}
		last = now;
	}
	return 0;
}

int main(int argc, char **argv)
{
	if (argc == 4 && !strcmp(argv[1], "server"))
		return server(atoi(argv[2]), (size_t)atoi(argv[3]));
	if (argc == 5 && !strcmp(argv[1], "client"))
		return client(argv[2], atoi(argv[3]), atoi(argv[4]));
	fputs("usage: stream server PORT MIB | client ADDRESS PORT MS\n", stderr);
	return 2;
}
