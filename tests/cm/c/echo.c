/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * echo.c - plain TCP sockets: `echo ADDRESS` echoes one connection to its end, `echo ADDRESS ask` talks to it
 * and compares each byte. Knows nothing of RDMA: librspreload.so makes rsockets of its sockets.
 */
#include <arpa/inet.h>
#include <err.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define SIZE 100000
#define TURNS 20

static char data[SIZE], back[SIZE];

static void put(int fd, const char *from, size_t n)
{
	for (ssize_t done; n; from += done, n -= (size_t)done)
		if ((done = send(fd, from, n, 0)) < 0)
			err(1, "send");
}

static ssize_t get(int fd)
{
	ssize_t n = recv(fd, back, sizeof(back), 0);

	if (n < 0)
		err(1, "recv");
	return n;
}

static void ask(int fd)
{
	for (int turn = 0; turn < TURNS; turn++) {
		for (size_t i = 0; i < SIZE; i++)
			data[i] = (char)(i * 7 + (size_t)turn + i / 251);
		put(fd, data, SIZE);
		for (size_t n = 0, got; n < SIZE; n += got) {
			got = (size_t)get(fd);
			if (!got || n + got > SIZE || memcmp(back, data + n, got))
				errx(1, "turn %d: wrong after %zu bytes", turn, n);
		}
	}
	if (shutdown(fd, SHUT_WR))
		err(1, "shutdown");
	if (get(fd))
		errx(1, "more than was sent");
}

static void echo(int fd)
{
	ssize_t n;

	while ((n = get(fd)))
		put(fd, back, (size_t)n);
}

int main(int argc, char **argv)
{
	struct sockaddr_in sin = {.sin_family = AF_INET, .sin_port = htons(7471)};
	socklen_t len = sizeof(sin);
	char peer[INET_ADDRSTRLEN];
	int fd = socket(AF_INET, SOCK_STREAM, 0), talk = fd;

	if (argc < 2 || fd < 0 || !inet_aton(argv[1], &sin.sin_addr))
		errx(2, "usage: echo ADDRESS [ask]");
	if (argc > 2) {
		if (connect(fd, (struct sockaddr *)&sin, sizeof(sin)))
			err(1, "connect");
		ask(fd);
	} else {
		if (bind(fd, (struct sockaddr *)&sin, sizeof(sin)) || listen(fd, 1))
			err(1, "listen");
		if ((talk = accept(fd, (struct sockaddr *)&sin, &len)) < 0)
			err(1, "accept");
		echo(talk);
		puts(inet_ntop(AF_INET, &sin.sin_addr, peer, sizeof(peer)));
	}
	return close(talk);
}
