/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * control.h - the library's side of the protocol with the agent (docs/control.md).
 *
 * Unix SOCK_SEQPACKET, one message per packet, little-endian. The agent may be any process that
 * listens on that path: its messages are parsed as carefully as packets from the network.
 */
#ifndef MG_CONTROL_H
#define MG_CONTROL_H

#include "net/device.h"

#define MG_CTL_MAGIC 0x3152474du /* "MGR1" */
#define MG_CTL_VERSION 1u
#define MG_CTL_HEADER_LEN 16u
#define MG_CTL_MAX_LEN 4096u
#define MG_CTL_MAX_FDS 18u /* two, and one for each further address */
#define MG_CTL_DEFAULT_PATH "/run/migroce/agent.sock"
#define MG_CTL_NO_SLOT 0xffffffffu

enum mg_ctl_type {
	MG_CTL_HELLO = 1,
	MG_CTL_WELCOME = 2,
	MG_CTL_STOP = 3,
	MG_CTL_STOPPED = 4,
	MG_CTL_RESUMED = 5,
	MG_CTL_DUMP_REQ = 6,
	MG_CTL_DUMP = 7,
	MG_CTL_LISTENS = 8,
	MG_CTL_ADDRESSES = 9,
	MG_CTL_SOCKETS = 10,
};

enum mg_ctl_hello_state { MG_HELLO_FRESH = 0, MG_HELLO_STOPPED = 1, MG_HELLO_RUNNING = 2 };

struct mg_ctl_hello {
	uint8_t instance[16]; /* random per process */
	uint32_t pid;
	uint32_t state; /* mg_ctl_hello_state */
	uint32_t slot;	/* or MG_CTL_NO_SLOT */
	uint32_t qpn_base, qpn_count;
	char comm[16];
	uint8_t gid[16];
	uint32_t flags; /* MG_HELLO_FURTHER */
};
#define MG_HELLO_FURTHER 1u /* it takes sockets of the interface's other IPv4 addresses, too */

struct mg_ctl_welcome {
	uint32_t status; /* 0 or errno */
	uint32_t slot;
	uint32_t qpn_base, qpn_count;
	uint32_t n_sockets; /* that came along */
	uint32_t flags;
	uint8_t gid[16]; /* all zero: choose yourself */
};

struct mg_ctl_stop {
	uint32_t flags;
	uint32_t timeout_ms;
};

struct mg_ctl_sockets {
	uint32_t status;    /* 0 or errno */
	uint32_t n_sockets; /* that came along */
};

/* A message of the agent. */
struct mg_ctl_msg {
	uint16_t type; /* also types not known here: to be ignored */
	uint32_t request;
	union {
		struct mg_ctl_welcome welcome;
		struct mg_ctl_stop stop;
		struct mg_ctl_sockets sockets;
	};
};

/* ---- proto.c: pure functions over buffers ------------------------------------------------------ */

/*
 * Parse one message (`len` bytes, all of one packet). 0, or EBADMSG: bad magic, version or
 * length, a body too short for its type, values that cannot be (QPN range, more sockets than
 * MG_CTL_MAX_FDS). Longer bodies and unknown types are fine.
 */
int mg_ctl_parse(const uint8_t *buf, size_t len, struct mg_ctl_msg *msg);
/* Each writes a whole message to `out` (MG_CTL_MAX_LEN bytes) and returns its length. */
size_t mg_ctl_build_hello(uint8_t *out, uint32_t request, const struct mg_ctl_hello *h);
size_t mg_ctl_build_stopped(uint8_t *out, uint32_t request, uint32_t status, uint32_t n_qp,
			    uint64_t dump_len);
size_t mg_ctl_build_resumed(uint8_t *out, uint32_t request, uint32_t status, uint32_t n_qp);
size_t mg_ctl_build_dump(uint8_t *out, uint32_t request, uint32_t status, uint64_t dump_len);

size_t mg_ctl_build_listens(uint8_t *out, uint32_t request, const uint32_t *services, uint32_t n);
/* The further addresses that have a socket (at most MG_MAX_GID). */
size_t mg_ctl_build_addresses(uint8_t *out, uint32_t request, const struct mg_addr *addr, uint32_t n);

/* ---- link.c: the socket, with descriptors ---------------------------------------------------------- */

/* Connect without waiting for longer than timeout_ms (0: do not wait at all). A descriptor or -errno. */
int mg_ctl_connect(const char *path, unsigned timeout_ms);
/* 0 or errno. */
int mg_ctl_send(int fd, const uint8_t *buf, size_t len, const int *fds, size_t n_fds);
/*
 * One message and its descriptors (*n_fds of at most MG_CTL_MAX_FDS; the caller's to close).
 * 0, EAGAIN, EPIPE at the end of the connection, EBADMSG, or another errno.
 */
int mg_ctl_receive(int fd, struct mg_ctl_msg *msg, int fds[MG_CTL_MAX_FDS], size_t *n_fds);

/* ---- client.c: the state machine -------------------------------------------------------------------- */

/*
 * At device open: connect, say hello, wait for the agent's welcome and sockets (n_sockets in fds,
 * the caller's). ENOENT: there is no agent; then mg_control_alone is to follow, or *out is NULL when
 * none is wanted. Other errors have been said on stderr, *out is NULL.
 */
int mg_control_open(struct mg_control **out, struct mg_ctl_welcome *welcome, int fds[MG_CTL_MAX_FDS]);
/* We run without an agent, at this address and with all QPNs; one that comes later is told so. */
void mg_control_alone(struct mg_control *c, const struct mg_addr *addr);
void mg_control_free(struct mg_control *c); /* NULL is fine */
/*
 * Before closing, without the lock: one that is stopped comes back first, for which the agent waits, unless
 * nobody has taken a checkpoint for two seconds. NULL is fine.
 */
void mg_control_settle(struct mg_control *c);
int mg_control_fd(const struct mg_control *c); /* to poll for input; -1: none */
void mg_control_hang_up(struct mg_control *c); /* close the connection and no more (after fork) */
/* The interface and address a welcome asks for. */
int mg_control_addr(struct mg_device *dev, const struct mg_ctl_welcome *w, struct mg_port *port,
		    struct mg_addr *addr);
/*
 * The progress thread, without the lock: take the agent's messages when `readable`, do what time
 * asks for. Returns when to call again at the latest.
 */
mg_time mg_control_run(struct mg_device *dev, mg_time now, bool readable);

/* progress.c: take the device's lock, before an application that polls without pause. */
void mg_progress_lock(struct mg_device *dev);

#endif
