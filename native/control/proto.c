// SPDX-License-Identifier: BSD-3-Clause
/*
 * proto.c - messages between library and agent, byte by byte.
 */
#include "control/control.h"

#include "wire/wire.h"

#include <errno.h>
#include <string.h>

#define HELLO_LEN 72u
#define WELCOME_LEN 40u
#define STOP_LEN 8u
#define SOCKETS_LEN 8u

static uint16_t get16(const uint8_t *p)
{
	return (uint16_t)(p[0] | p[1] << 8);
}

static uint32_t get32(const uint8_t *p)
{
	return p[0] | (uint32_t)p[1] << 8 | (uint32_t)p[2] << 16 | (uint32_t)p[3] << 24;
}

static uint8_t *put32(uint8_t *p, uint32_t v)
{
	for (int i = 0; i < 4; i++)
		p[i] = (uint8_t)(v >> (8 * i));
	return p + 4;
}

static uint8_t *put64(uint8_t *p, uint64_t v)
{
	return put32(put32(p, (uint32_t)v), (uint32_t)(v >> 32));
}

static uint8_t *put_bytes(uint8_t *p, const void *src, size_t n)
{
	memcpy(p, src, n);
	return p + n;
}

static uint8_t *put_header(uint8_t *p, uint16_t type, uint32_t length, uint32_t request)
{
	p = put32(p, MG_CTL_MAGIC);
	p = put32(p, (uint32_t)type | MG_CTL_VERSION << 16);
	p = put32(p, length);
	return put32(p, request);
}

static int parse_welcome(const uint8_t *p, size_t len, struct mg_ctl_welcome *w)
{
	if (len < WELCOME_LEN)
		return EBADMSG;
	w->status = get32(p);
	w->slot = get32(p + 4);
	w->qpn_base = get32(p + 8);
	w->qpn_count = get32(p + 12);
	w->n_sockets = get32(p + 16);
	w->flags = get32(p + 20);
	memcpy(w->gid, p + 24, 16);
	if (w->n_sockets > MG_CTL_MAX_FDS)
		return EBADMSG;
	if (w->status == 0 &&
	    (w->qpn_count == 0 || w->qpn_base > MG_QPN_MASK || w->qpn_count > MG_QPN_MASK + 1u - w->qpn_base))
		return EBADMSG;
	return 0;
}

static int parse_stop(const uint8_t *p, size_t len, struct mg_ctl_stop *s)
{
	if (len < STOP_LEN)
		return EBADMSG;
	s->flags = get32(p);
	s->timeout_ms = get32(p + 4);
	return 0;
}

static int parse_sockets(const uint8_t *p, size_t len, struct mg_ctl_sockets *s)
{
	if (len < SOCKETS_LEN)
		return EBADMSG;
	s->status = get32(p);
	s->n_sockets = get32(p + 4);
	return s->n_sockets > MG_CTL_MAX_FDS ? EBADMSG : 0;
}

int mg_ctl_parse(const uint8_t *buf, size_t len, struct mg_ctl_msg *msg)
{
	size_t body;

	memset(msg, 0, sizeof(*msg));
	if (len < MG_CTL_HEADER_LEN || get32(buf) != MG_CTL_MAGIC || get16(buf + 6) != MG_CTL_VERSION)
		return EBADMSG;
	body = len - MG_CTL_HEADER_LEN;
	if (get32(buf + 8) != body)
		return EBADMSG;
	msg->type = get16(buf + 4);
	msg->request = get32(buf + 12);
	buf += MG_CTL_HEADER_LEN;
	switch (msg->type) {
	case MG_CTL_WELCOME: return parse_welcome(buf, body, &msg->welcome);
	case MG_CTL_STOP: return parse_stop(buf, body, &msg->stop);
	case MG_CTL_SOCKETS: return parse_sockets(buf, body, &msg->sockets);
	default: return 0;
	}
}

size_t mg_ctl_build_hello(uint8_t *out, uint32_t request, const struct mg_ctl_hello *h)
{
	uint8_t *p = put_header(out, MG_CTL_HELLO, HELLO_LEN, request);

	p = put_bytes(p, h->instance, sizeof(h->instance));
	p = put32(p, h->pid);
	p = put32(p, h->state);
	p = put32(p, h->slot);
	p = put32(p, h->qpn_base);
	p = put32(p, h->qpn_count);
	p = put_bytes(p, h->comm, sizeof(h->comm));
	p = put_bytes(p, h->gid, sizeof(h->gid));
	p = put32(p, h->flags);
	return (size_t)(p - out);
}

size_t mg_ctl_build_stopped(uint8_t *out, uint32_t request, uint32_t status, uint32_t n_qp, uint64_t dump_len)
{
	uint8_t *p = put_header(out, MG_CTL_STOPPED, 16, request);

	return (size_t)(put64(put32(put32(p, status), n_qp), dump_len) - out);
}

size_t mg_ctl_build_resumed(uint8_t *out, uint32_t request, uint32_t status, uint32_t n_qp)
{
	uint8_t *p = put_header(out, MG_CTL_RESUMED, 8, request);

	return (size_t)(put32(put32(p, status), n_qp) - out);
}

size_t mg_ctl_build_dump(uint8_t *out, uint32_t request, uint32_t status, uint64_t dump_len)
{
	uint8_t *p = put_header(out, MG_CTL_DUMP, 16, request);

	return (size_t)(put64(put32(put32(p, status), 0), dump_len) - out);
}

size_t mg_ctl_build_listens(uint8_t *out, uint32_t request, const uint32_t *services, uint32_t n)
{
	uint8_t *p = put32(put_header(out, MG_CTL_LISTENS, 4 + 4 * n, request), n);

	for (uint32_t i = 0; i < n; i++)
		p = put32(p, services[i]);
	return (size_t)(p - out);
}

size_t mg_ctl_build_addresses(uint8_t *out, uint32_t request, const struct mg_addr *addr, uint32_t n)
{
	uint8_t *p = put32(put_header(out, MG_CTL_ADDRESSES, 4 + 16 * n, request), n);

	for (uint32_t i = 0; i < n; i++)
		p = put_bytes(p, addr[i].gid, sizeof(addr[i].gid));
	return (size_t)(p - out);
}
