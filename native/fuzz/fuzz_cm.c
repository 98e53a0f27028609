/* Invariant: whatever arrives, connections keep valid states, ids and timers; those of no owner end by themselves. */
/* SPDX-License-Identifier: BSD-3-Clause */
#include "cm/internal.h"
#include "fuzz/fuzz.h"

/*
 * Two connection managers with a network in between that the input rules: commands make, answer and end
 * connections, and deliver, lose, double, change and forge datagrams, let time pass and processes move.
 */
#define SIDES 2
#define OWNED 6
#define QUEUE 12
#define SECOND 1000000000ull
#define PREFIX(side) ((uint32_t)((side) + 5) << 26)

struct datagram {
	struct mg_addr src, dst;
	uint8_t mad[MG_MAD_LEN];
};

static struct {
	struct mg_cm *cm[SIDES];
	struct mg_cm_conn *owned[SIDES][OWNED];
	struct datagram queue[QUEUE];
	unsigned queued;
	mg_time now;
	uint32_t random;
} w;

static struct mg_addr address(unsigned side)
{
	return (struct mg_addr){{[10] = 0xff, [11] = 0xff, [12] = 10, [15] = (uint8_t)(side + 1)}};
}

static void op_random(void *arg, void *buf, size_t n)
{
	(void)arg;
	for (size_t i = 0; i < n; i++) {
		w.random = w.random * 1664525u + 1013904223u;
		((uint8_t *)buf)[i] = (uint8_t)(w.random >> 24);
	}
}

static void op_send(void *arg, const struct mg_addr *src, const struct mg_addr *dst, uint8_t tclass,
		    const uint8_t mad[MG_MAD_LEN])
{
	struct mg_cm_msg m;

	(void)arg;
	(void)tclass;
	FUZZ_CHECK(mg_cm_parse(mad, MG_MAD_LEN, &m) == 0); /* we say nothing that we would not take */
	if (w.queued == QUEUE)
		return;
	w.queue[w.queued].src = *src;
	w.queue[w.queued].dst = *dst;
	memcpy(w.queue[w.queued++].mad, mad, MG_MAD_LEN);
}

static bool op_event(void *arg, struct mg_cm_conn *conn, enum mg_cm_event ev, const struct mg_cm_msg *m)
{
	struct mg_cm_conn **owned = arg;
	const bool timer = ev == MG_CM_EV_TIMEOUT || ev == MG_CM_EV_TIMEWAIT_EXIT || ev == MG_CM_EV_STALE;

	FUZZ_CHECK(m || timer || ev == MG_CM_EV_ESTABLISHED);
	if (ev != MG_CM_EV_REQ && ev != MG_CM_EV_SIDR_REQ) {
		FUZZ_CHECK(conn->owner);
		return true;
	}
	FUZZ_CHECK(!conn->owner && conn->listener && conn->listener->state == MG_CM_LISTEN);
	for (unsigned i = 0; i < OWNED; i++) {
		if (owned[i])
			continue;
		owned[i] = conn;
		conn->owner = &owned[i];
		return true;
	}
	return false; /* no room */
}

static void op_wake(void *arg, mg_time at)
{
	(void)arg;
	(void)at;
}

static const struct mg_cm_ops ops = {
	.random = op_random, .send = op_send, .event = op_event, .wake = op_wake};

/* What must hold between any two calls. */
static void check(const struct mg_cm *cm, unsigned side)
{
	const struct mg_cm_conn *c, *o;
	unsigned owned = 0;

	MG_CM_FOR_EACH(c, cm)
	{
		FUZZ_CHECK(c->state < MG_CM_N_STATES);
		FUZZ_CHECK(c->next->prev == c && c->prev->next == c);
		FUZZ_CHECK(c->local_id >> 26 == PREFIX(side) >> 26);
		FUZZ_CHECK(c->timer >= cm->deadline);
		FUZZ_CHECK(c->owner || c->timer != MG_NEVER); /* nobody's lives for its timer only */
		FUZZ_CHECK(c->timer == MG_NEVER || c->timer <= w.now + 300 * SECOND);
		owned += c->owner != NULL;
		for (o = c->next; o != &cm->list; o = o->next)
			FUZZ_CHECK(o->local_id != c->local_id);
	}
	FUZZ_CHECK(owned <= OWNED);
}

static struct mg_cm_conn **new_conn(unsigned side)
{
	for (unsigned i = 0; i < OWNED; i++) {
		struct mg_cm_conn **slot = &w.owned[side][i];

		if (*slot)
			continue;
		*slot = mg_cm_conn_new(w.cm[side], slot);
		return *slot ? slot : NULL;
	}
	return NULL;
}

static void request(unsigned side, unsigned how, bool sidr)
{
	struct mg_addr own = address(side), peer = address(!side);
	struct mg_cm_msg m = {.attr = sidr ? MG_CM_SIDR_REQ : MG_CM_REQ};
	struct mg_ip_hdr ip = {.version = how & 4 ? 6 : 4, .sport = 4000};
	struct mg_cm_conn **slot = new_conn(side);

	if (!slot)
		return;
	memcpy(ip.src, own.gid, 16);
	memcpy(ip.dst, peer.gid, 16);
	mg_ip_hdr_build(&ip, m.private_data);
	m.service_id = (sidr ? MG_IP_PREFIX_UDP : MG_IP_PREFIX_TCP) + (how & 1);
	m.qpn = 2 + (how & 3);
	m.primary.ack_timeout = (uint8_t)(how >> 3);
	if (sidr)
		FUZZ_CHECK(mg_cm_send_sidr_req(*slot, w.now, &m, &own, &peer) == 0);
	else
		FUZZ_CHECK(mg_cm_send_req(*slot, w.now, &m, &own, &peer) == 0);
}

static void serve(unsigned side, unsigned how)
{
	static const struct mg_addr any;
	struct mg_addr own = address(side);
	uint64_t service = (how & 2 ? MG_IP_PREFIX_UDP : MG_IP_PREFIX_TCP) + (how & 1);
	struct mg_cm_conn **slot = new_conn(side);

	if (!slot)
		return;
	(*slot)->v4_only = how & 8;
	if (mg_cm_listen(*slot, service, how & 4 ? &own : &any)) {
		mg_cm_conn_destroy(*slot, w.now);
		*slot = NULL;
	}
}

/* Any of the calls a program can make, in place or not. */
static void call(struct mg_cm_conn **slot, unsigned what)
{
	struct mg_cm_msg m = {.qpn = 9, .qkey = 7};
	struct mg_cm_conn *c = *slot;
	int err = 0;

	if (!c)
		return;
	switch (what & 7) {
	case 0: err = mg_cm_send_rep(c, w.now, &m); break;
	case 1: err = mg_cm_send_rtu(c, w.now); break;
	case 2: err = mg_cm_send_rej(c, w.now, MG_REJ_CONSUMER, "no", 2); break;
	case 3: err = mg_cm_send_dreq(c, w.now); break;
	case 4: err = mg_cm_send_drep(c, w.now); break;
	case 5: err = mg_cm_send_sidr_rep(c, w.now, &m); break;
	case 6: err = mg_cm_notify(c, w.now); break;
	default:
		*slot = NULL;
		mg_cm_conn_destroy(c, w.now);
		break;
	}
	FUZZ_CHECK(err == 0 || err == EINVAL || err == EISCONN);
}

static void take(unsigned i)
{
	memmove(&w.queue[i], &w.queue[i + 1], (w.queued - i - 1) * sizeof(w.queue[0]));
	w.queued--;
}

static void receive(const struct datagram *d)
{
	const unsigned side = d->dst.gid[15] == 2;
	struct mg_cm_msg m, again;
	uint8_t mad[MG_MAD_LEN];

	if (!mg_cm_parse(d->mad, MG_MAD_LEN, &m)) {
		mg_cm_build(&m, mad);
		FUZZ_CHECK(mg_cm_parse(mad, MG_MAD_LEN, &again) == 0);
		FUZZ_CHECK(memcmp(&m, &again, sizeof(m)) == 0);
	}
	mg_cm_rx(w.cm[side], w.now, &d->src, &d->dst, 0, d->mad);
}

static void forge(struct fuzz_in *in, unsigned side)
{
	struct datagram d = {.src = address(!side), .dst = address(side)};
	const uint8_t how = fuzz_u8(in), of = fuzz_u8(in);
	const struct mg_cm_conn *c = w.owned[side][of % OWNED], *peer = w.owned[!side][(of >> 4) % OWNED];

	d.mad[0] = 1;
	d.mad[1] = 7;
	d.mad[2] = 2;
	d.mad[3] = 3;
	d.mad[17] = 0x10 + how % 11;
	fuzz_take(in, d.mad + 24, 16);
	if (c && how & 0x10) { /* from somebody who knows the ids */
		for (int i = 0; i < 4; i++) {
			d.mad[24 + i] = (uint8_t)(c->remote_id >> (24 - 8 * i));
			d.mad[28 + i] = (uint8_t)(c->local_id >> (24 - 8 * i));
		}
		for (int i = 0; i < 8; i++)
			d.mad[8 + i] = (uint8_t)(c->tid >> (56 - 8 * i));
	} else if (peer && how & 0x20) {
		memcpy(d.mad, peer->mad, MG_MAD_LEN);
		d.mad[17] = 0x10 + how % 11;
	}
	if (how & 0x40)
		d.src.gid[15] = 77; /* a stranger */
	receive(&d);
}

static void move(unsigned side)
{
	mg_cm_resumed(w.cm[side], w.now);
}

static void datagram(struct fuzz_in *in, unsigned what, unsigned i)
{
	struct datagram d;

	if (!w.queued)
		return;
	i %= w.queued;
	d = w.queue[i];
	switch (what) {
	case 0:
		take(i);
		receive(&d);
		break;
	case 1: take(i); break;
	case 2: receive(&d); break; /* and once more, later */
	default: {
		const uint8_t at = fuzz_u8(in);

		w.queue[i].mad[at] = fuzz_u8(in);
		break;
	}
	}
}

static void command(struct fuzz_in *in)
{
	const uint8_t op = fuzz_u8(in);
	const unsigned side = op & 1, arg = op >> 5;

	switch (op >> 1 & 15) {
	case 0:
	case 1:
	case 2:
	case 3: datagram(in, op >> 1 & 3, arg); break;
	case 4: forge(in, side); break;
	case 5: request(side, fuzz_u8(in), false); break;
	case 6: request(side, fuzz_u8(in), true); break;
	case 7: serve(side, arg); break;
	case 8: call(&w.owned[side][arg % OWNED], fuzz_u8(in)); break;
	case 9:
		w.now += fuzz_u16(in) * (arg & 1 ? SECOND / 1000 : SECOND / 100);
		mg_cm_timer(w.cm[side], w.now);
		break;
	case 10: move(side); break;
	case 11:
		if (arg == 7)
			mg_cm_farewell(w.cm[side], w.now);
		break;
	default: datagram(in, 0, 0); break;
	}
}

static void finish(unsigned side)
{
	struct mg_cm *cm = w.cm[side];

	for (unsigned i = 0; i < OWNED; i++)
		if (w.owned[side][i])
			mg_cm_conn_destroy(w.owned[side][i], w.now);
	for (mg_time at; (at = mg_cm_deadline(cm)) != MG_NEVER;) {
		w.now = at > w.now ? at : w.now;
		mg_cm_timer(cm, w.now);
		check(cm, side);
	}
	FUZZ_CHECK(cm->list.next == &cm->list); /* nothing is left of what nobody owns */
	mg_cm_free(cm);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct fuzz_in in = {data, size};

	memset(&w, 0, sizeof(w));
	w.now = 1000 * SECOND;
	w.random = fuzz_u8(&in);
	for (unsigned side = 0; side < SIDES; side++) {
		w.cm[side] = mg_cm_create(&ops, w.owned[side], PREFIX(side), 6);
		if (!w.cm[side])
			abort();
	}
	while (in.left) {
		command(&in);
		for (unsigned side = 0; side < SIDES; side++)
			check(w.cm[side], side);
	}
	for (unsigned side = 0; side < SIDES; side++)
		finish(side);
	return 0;
}
