/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * raw_udp - what the kernel's UDP gives without any RDMA on top: the yardstick of the benchmarks.
 *
 *   raw_udp recv [-p PORT] [-s SECONDS] [-1]             receiver (-1: without GRO)
 *   raw_udp send [-p PORT] [-s SECONDS] [-l BYTES] [-g SEGMENTS] ADDRESS
 *   raw_udp pong [-p PORT] [-s SECONDS]                  latency: answers
 *   raw_udp ping [-p PORT] [-n ROUNDS] [-l BYTES] ADDRESS  latency: asks; both spin
 *
 * BYTES is the UDP payload: 4112 is a 4096 byte RC SEND or WRITE packet in the middle of a message (BTH,
 * payload, ICRC), 20 a SEND of 2 bytes. -g 1 sends packet by packet, the default is as many as fit a
 * datagram. The socket options are those that the library sets. Prints one line of JSON.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/udp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif
#ifndef UDP_GRO
#define UDP_GRO 104
#endif

#define MAX_DATAGRAM 65507u
#define MAX_ROUNDS 10000000u

static int port = 4791;
static double seconds = 1;
static unsigned length = 4112, segments, rounds = 20000;
static bool gro = true;

static void die(const char *what)
{
	fprintf(stderr, "raw_udp: %s: %s\n", what, strerror(errno));
	exit(2);
}

static int64_t now_ns(void)
{
	struct timespec ts;

	clock_gettime(CLOCK_MONOTONIC, &ts);
	return ts.tv_sec * 1000000000ll + ts.tv_nsec;
}

static struct sockaddr_in address(const char *text)
{
	struct sockaddr_in a = {.sin_family = AF_INET, .sin_port = htons((uint16_t)port)};

	if (text && inet_pton(AF_INET, text, &a.sin_addr) != 1) {
		errno = EINVAL;
		die(text);
	}
	return a;
}

static int make_socket(bool bound)
{
	int fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0), rcv = 8 << 20, snd = 4 << 20,
	    pmtu = IP_PMTUDISC_DO;
	struct sockaddr_in a = address(NULL);

	if (fd < 0)
		die("socket");
	if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &rcv, sizeof(rcv)))
		setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &rcv, sizeof(rcv));
	if (setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &snd, sizeof(snd)))
		setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &snd, sizeof(snd));
	setsockopt(fd, IPPROTO_IP, IP_MTU_DISCOVER, &pmtu, sizeof(pmtu));
	if (bound && bind(fd, (struct sockaddr *)&a, sizeof(a)))
		die("bind");
	return fd;
}

static int do_recv(void)
{
	int fd = make_socket(true), one = gro, idle_ms = 0;
	static char buf[65536];
	uint64_t bytes = 0, calls = 0;
	int64_t first = 0, last = 0, asked;
	struct timeval tv = {.tv_usec = 100000};

	setsockopt(fd, IPPROTO_UDP, UDP_GRO, &one, sizeof(one));
	setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &tv, sizeof(tv));
	puts("ready");
	fflush(stdout);
	asked = now_ns();
	/* Measures from the first packet to the last: until the sender has been silent for 200 ms. */
	while (idle_ms < 200 || !bytes) {
		ssize_t n = recv(fd, buf, sizeof(buf), 0);

		if (n < 0) {
			if (errno != EAGAIN && errno != EINTR)
				die("recv");
			idle_ms += 100;
			if (now_ns() - asked > (int64_t)((seconds + 10) * 1e9))
				break;
			continue;
		}
		idle_ms = 0;
		last = now_ns();
		if (!first)
			first = last; /* the first call's bytes are not counted */
		else
			bytes += (uint64_t)n;
		calls++;
	}
	printf("{\"bytes\": %llu, \"calls\": %llu, \"seconds\": %.6f, \"gbps\": %.4f}\n",
	       (unsigned long long)bytes, (unsigned long long)calls, (double)(last - first) / 1e9,
	       last > first ? (double)bytes * 8 / (double)(last - first) : 0.0);
	return 0;
}

static int do_send(const char *to)
{
	int fd = make_socket(false);
	struct sockaddr_in a = address(to);
	unsigned fit = MAX_DATAGRAM / length;
	unsigned n = segments && segments < fit ? segments : fit;
	int size = (int)length;
	static char buf[65536];
	struct iovec iov = {.iov_base = buf, .iov_len = (size_t)n * length};
	struct msghdr m = {.msg_name = &a, .msg_namelen = sizeof(a), .msg_iov = &iov, .msg_iovlen = 1};
	int64_t start = now_ns(), end = start + (int64_t)(seconds * 1e9), now = start;
	uint64_t bytes = 0;

	if (n > 1 && setsockopt(fd, IPPROTO_UDP, UDP_SEGMENT, &size, sizeof(size)))
		die("UDP_SEGMENT");
	while (now < end) {
		for (int i = 0; i < 16; i++) {
			ssize_t rc = sendmsg(fd, &m, 0);

			if (rc < 0 && errno != ENOBUFS && errno != EAGAIN && errno != ECONNREFUSED)
				die("sendmsg");
			if (rc > 0)
				bytes += (uint64_t)rc;
		}
		now = now_ns();
	}
	printf("{\"bytes\": %llu, \"segments\": %u, \"seconds\": %.6f, \"gbps\": %.4f}\n",
	       (unsigned long long)bytes, n, (double)(now - start) / 1e9,
	       (double)bytes * 8 / (double)(now - start));
	return 0;
}

static int do_pong(void)
{
	int fd = make_socket(true);
	char buf[9000];
	int64_t last = now_ns();
	uint64_t rounds_seen = 0;

	puts("ready");
	fflush(stdout);
	/* Ends by an empty datagram, or when nothing came for a while. */
	for (unsigned spin = 0;; spin++) {
		struct sockaddr_in from;
		socklen_t len = sizeof(from);
		ssize_t n = recvfrom(fd, buf, sizeof(buf), MSG_DONTWAIT, (struct sockaddr *)&from, &len);

		if (n == 0)
			break;
		if (n > 0) {
			sendto(fd, buf, (size_t)n, 0, (struct sockaddr *)&from, len);
			rounds_seen++;
			spin = 0;
		} else if (spin % 1024 == 1023) {
			int64_t now = now_ns();

			if (spin == 1023)
				last = now;
			if (now - last > (int64_t)((seconds + 10) * 1e9))
				break;
		}
	}
	printf("{\"rounds\": %llu}\n", (unsigned long long)rounds_seen);
	return 0;
}

static int compare(const void *a, const void *b)
{
	uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;

	return x < y ? -1 : x > y;
}

static int do_ping(const char *to)
{
	int fd = make_socket(true);
	struct sockaddr_in a = address(to);
	char buf[9000] = {0};
	uint32_t *t = calloc(rounds, sizeof(*t));
	unsigned lost = 0;
	double sum = 0;

	if (!t || length > sizeof(buf))
		die("arguments");
	for (unsigned i = 0; i < rounds; i++) {
		int64_t start = now_ns(), end;

		sendto(fd, buf, length, 0, (struct sockaddr *)&a, sizeof(a));
		for (;;) {
			ssize_t n = recv(fd, buf, sizeof(buf), MSG_DONTWAIT);

			end = now_ns();
			if (n >= 0)
				break;
			if (end - start > 100000000) {
				lost++;
				break;
			}
		}
		t[i] = (uint32_t)(end - start);
		sum += t[i];
	}
	for (int i = 0; i < 3; i++)
		sendto(fd, buf, 0, 0, (struct sockaddr *)&a, sizeof(a));
	qsort(t, rounds, sizeof(*t), compare);
	printf("{\"rounds\": %u, \"lost\": %u, \"half_us\": {\"median\": %.3f, \"average\": %.3f, \"p99\": "
	       "%.3f}}\n",
	       rounds, lost, t[rounds / 2] / 2e3, sum / rounds / 2e3, t[(uint64_t)rounds * 99 / 100] / 2e3);
	free(t);
	return 0;
}

int main(int argc, char **argv)
{
	const char *mode = argc > 1 ? argv[1] : "", *to;
	int c;

	optind = 2;
	while ((c = getopt(argc, argv, "p:s:l:g:n:1")) != -1) {
		switch (c) {
		case 'p': port = atoi(optarg); break;
		case 's': seconds = atof(optarg); break;
		case 'l': length = (unsigned)atoi(optarg); break;
		case 'g': segments = (unsigned)atoi(optarg); break;
		case 'n': rounds = (unsigned)atoi(optarg); break;
		case '1': gro = false; break;
		default: return 2;
		}
	}
	to = optind < argc ? argv[optind] : NULL;
	if (port < 1 || port > 65535 || length < 1 || length > MAX_DATAGRAM || rounds < 1 ||
	    rounds > MAX_ROUNDS || !(seconds > 0 && seconds < 3600))
		mode = "";
	if (!strcmp(mode, "recv"))
		return do_recv();
	if (!strcmp(mode, "pong"))
		return do_pong();
	if (!strcmp(mode, "send") && to)
		return do_send(to);
	if (!strcmp(mode, "ping") && to)
		return do_ping(to);
	fputs("usage: raw_udp recv|pong|send ADDRESS|ping ADDRESS  (the source's head says more)\n", stderr);
	return 2;
}
