// SPDX-License-Identifier: BSD-3-Clause
/*
 * ports.c - the port spaces of rdma_cm, shared by the processes behind one address in a network namespace.
 *
 * In the kernel they are tables of the namespace. Here each bound id is a read lock on one byte of the file
 * that stands for the namespace (/proc/self/ns/net, the same for all its processes): the offset says what it
 * is bound to (offset_of). Others see the lock (F_OFD_GETLK), nobody needs to be asked, and the locks of a
 * process go with it. One descriptor serves all ids of a process.
 *
 * While the device is stopped the file is closed, as the sockets are (CRIU refuses locks); when it goes on,
 * at whatever node, the ports are taken again. Without /proc only the process's own ids are looked at.
 */
#include "net/net.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <unistd.h>

/* 63 bits: the device's address (hashed), port space, port, kind, the address bound to (hashed). */
#define ADDR_BITS 22
#define KIND_BITS 3
#define PORT_BITS 16
#define SPACE_BITS 2
#define DEVICE_BITS 20
#define KINDS (1u << KIND_BITS)
#define KIND_V6 4u
#define KIND_ONLY 2u
#define KIND_SHARED 1u
#define ADDRS (1ull << ADDR_BITS)
#define TURNS 64u /* for somebody else to finish his few system calls */

struct mg_ports {
	int fd; /* -1: not open */
	struct mg_claim *claim;
	size_t n, room;
};

static uint64_t hash(const struct mg_addr *addr) /* FNV-1a */
{
	uint64_t h = 0xcbf29ce484222325ull;

	for (size_t i = 0; i < sizeof(addr->gid); i++)
		h = (h ^ addr->gid[i]) * 0x100000001b3ull;
	return h ^ h >> 32;
}

static bool any(const struct mg_addr *addr)
{
	static const struct mg_addr zero;

	return !memcmp(addr, &zero, sizeof(zero));
}

static unsigned kind_of(const struct mg_claim *c)
{
	return (c->v6 ? KIND_V6 : 0) | (c->only ? KIND_ONLY : 0) | (c->shared ? KIND_SHARED : 0);
}

/* Where those of a kind are on the claim's port; the first is for any address. */
static uint64_t kind_at(const struct mg_device *dev, const struct mg_claim *c, unsigned kind)
{
	uint64_t at = hash(&dev->port.own) & ((1u << DEVICE_BITS) - 1);

	at = at << SPACE_BITS | (c->space & ((1u << SPACE_BITS) - 1));
	at = at << PORT_BITS | c->port;
	at = at << KIND_BITS | kind;
	return at << ADDR_BITS;
}

static uint64_t addr_at(const struct mg_addr *addr)
{
	return any(addr) ? 0 : 1 + hash(addr) % (ADDRS - 1);
}

static uint64_t offset_of(const struct mg_device *dev, const struct mg_claim *c)
{
	return kind_at(dev, c, kind_of(c)) + addr_at(&c->addr);
}

static void set(int fd, uint64_t at, short type)
{
	struct flock lock = {.l_type = type, .l_whence = SEEK_SET, .l_start = (off_t)at, .l_len = 1};

	if (fd >= 0)
		fcntl(fd, F_OFD_SETLK, &lock); /* read locks are in nobody's way */
}

static bool others_have(int fd, uint64_t from, uint64_t n)
{
	struct flock lock = {
		.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = (off_t)from, .l_len = (off_t)n};

	return fd >= 0 && !fcntl(fd, F_OFD_GETLK, &lock) && lock.l_type != F_UNLCK;
}

/* ---- the kernel's rules (cma_check_port) --------------------------------------------------------------- */

static bool apart(const struct mg_claim *c, bool v6, bool only, bool shared)
{
	return (c->shared && shared) || (c->only && only && c->v6 != v6);
}

/* With the process's other ids; `but` is the one that asks, or the number of all. */
static int own_conflict(const struct mg_ports *p, const struct mg_claim *c, size_t but)
{
	for (size_t i = 0; i < p->n; i++) {
		const struct mg_claim *o = &p->claim[i];

		if (i == but || o->space != c->space || o->port != c->port ||
		    apart(c, o->v6, o->only, o->shared))
			continue;
		if (any(&c->addr) || any(&o->addr))
			return EADDRNOTAVAIL;
		if (!memcmp(&c->addr, &o->addr, sizeof(c->addr)))
			return EADDRINUSE;
	}
	return 0;
}

static int others_conflict(const struct mg_device *dev, int fd, const struct mg_claim *c)
{
	if (!others_have(fd, kind_at(dev, c, 0), KINDS * ADDRS))
		return 0;
	for (unsigned kind = 0; kind < KINDS; kind++) {
		uint64_t at = kind_at(dev, c, kind);
		bool v6 = kind & KIND_V6;

		if (apart(c, v6, kind & KIND_ONLY, kind & KIND_SHARED))
			continue;
		if (others_have(fd, at, any(&c->addr) ? ADDRS : 1))
			return EADDRNOTAVAIL;
		if (c->v6 == v6 && others_have(fd, at + addr_at(&c->addr), 1))
			return EADDRINUSE;
	}
	return 0;
}

/* ---- taking and giving back --------------------------------------------------------------------------- */

static int open_file(void)
{
	return open("/proc/self/ns/net", O_RDONLY | O_CLOEXEC);
}

/*
 * Who takes a port marks it first and looks then: of two that do so at once one sees the other. That not both
 * give up they take turns; nobody is waited for long, as anybody might hold the file.
 */
static void take_turn(int fd)
{
	for (unsigned i = 0; fd >= 0 && i < TURNS && flock(fd, LOCK_EX | LOCK_NB); i++)
		sched_yield();
}

static void give_turn(int fd)
{
	if (fd >= 0)
		flock(fd, LOCK_UN);
}

static size_t find(const struct mg_device *dev, uint64_t offset)
{
	const struct mg_ports *p = dev->net->ports;
	size_t i = 0;

	while (i < p->n && offset_of(dev, &p->claim[i]) != offset)
		i++;
	return i;
}

/* Unless another id of ours is there, too (REUSEADDR). */
static void unlock(const struct mg_device *dev, uint64_t offset)
{
	if (find(dev, offset) == dev->net->ports->n)
		set(dev->net->ports->fd, offset, F_UNLCK);
}

int mg_port_claim(struct mg_device *dev, const struct mg_claim *c)
{
	struct mg_ports *p = dev->net->ports;
	int err = own_conflict(p, c, p->n);

	if (err)
		return err;
	if (p->n == p->room) {
		size_t room = p->room ? 2 * p->room : 16;
		struct mg_claim *more = realloc(p->claim, room * sizeof(*more));

		if (!more)
			return ENOMEM;
		p->claim = more;
		p->room = room;
	}
	if (p->fd < 0 && mg_net_open(dev->net))
		p->fd = open_file();
	take_turn(p->fd);
	p->claim[p->n++] = *c;
	set(p->fd, offset_of(dev, c), F_RDLCK);
	err = others_conflict(dev, p->fd, c);
	if (err)
		mg_port_unclaim(dev, c);
	give_turn(p->fd);
	return err;
}

int mg_port_change(struct mg_device *dev, const struct mg_claim *had, const struct mg_claim *want, bool check)
{
	struct mg_ports *p = dev->net->ports;
	uint64_t from = offset_of(dev, had), to = offset_of(dev, want);
	size_t at = find(dev, from);
	int err = 0;

	if (at == p->n || from == to)
		return 0;
	if (check)
		err = own_conflict(p, want, at);
	if (err)
		return err;
	take_turn(p->fd);
	p->claim[at] = *want;
	set(p->fd, to, F_RDLCK);
	if (check)
		err = others_conflict(dev, p->fd, want);
	if (err)
		p->claim[at] = *had;
	unlock(dev, err ? to : from);
	give_turn(p->fd);
	return err;
}

void mg_port_unclaim(struct mg_device *dev, const struct mg_claim *c)
{
	struct mg_ports *p = dev->net->ports;
	uint64_t offset = offset_of(dev, c);
	size_t at = find(dev, offset);

	if (at == p->n)
		return;
	p->claim[at] = p->claim[--p->n];
	unlock(dev, offset);
}

/* ---- stop and resume ------------------------------------------------------------------------------------- */

struct mg_ports *mg_ports_new(void)
{
	struct mg_ports *p = calloc(1, sizeof(*p));

	if (p)
		p->fd = -1;
	return p;
}

void mg_ports_free(struct mg_ports *p)
{
	if (!p)
		return;
	mg_ports_close(p);
	free(p->claim);
	free(p);
}

void mg_ports_close(struct mg_ports *p)
{
	if (p->fd >= 0)
		close(p->fd);
	p->fd = -1;
}

void mg_ports_resumed(struct mg_device *dev)
{
	struct mg_ports *p = dev->net->ports;

	mg_ports_close(p);
	p->fd = p->n ? open_file() : -1;
	for (size_t i = 0; i < p->n; i++)
		set(p->fd, offset_of(dev, &p->claim[i]), F_RDLCK);
}
