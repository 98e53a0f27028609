/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * link.c - the way from one engine's mg_tx to another's mg_rx, with all that can happen to a
 * packet: rules for single packets first (directed tests), then the link's seeded adversity.
 */
#include "sim/sim.h"
#include "transport/internal.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* ---- the heap of packets on their way, by (time, order of sending) ---- */

static bool before(const struct sim_packet *a, const struct sim_packet *b)
{
	return a->t != b->t ? a->t < b->t : a->seq < b->seq;
}

static void heap_push(struct sim_heap *h, struct sim_packet *p)
{
	size_t i = h->n++;

	h->v = sim_grow(h->v, i, &h->cap, sizeof(*h->v));
	while (i && before(p, h->v[(i - 1) / 2])) {
		h->v[i] = h->v[(i - 1) / 2];
		i = (i - 1) / 2;
	}
	h->v[i] = p;
}

struct sim_packet *sim_heap_pop(struct sim_heap *h)
{
	struct sim_packet *top = h->v[0], *last = h->v[--h->n];
	size_t i = 0;

	for (;;) {
		size_t c = 2 * i + 1;

		if (c >= h->n)
			break;
		if (c + 1 < h->n && before(h->v[c + 1], h->v[c]))
			c++;
		if (!before(h->v[c], last))
			break;
		h->v[i] = h->v[c];
		i = c;
	}
	h->v[i] = last;
	return top;
}

/* ---- packets ---- */

static struct sim_packet *packet_new(struct mgs_world *w, size_t len)
{
	struct sim_packet *p = malloc(sizeof(*p) + len);

	if (!p)
		abort();
	memset(p, 0, sizeof(*p));
	p->seq = w->seq++;
	p->len = (uint32_t)len;
	p->from = -1;
	return p;
}

static struct sim_packet *packet_copy(struct mgs_world *w, const struct sim_packet *p)
{
	struct sim_packet *q = packet_new(w, p->len);
	const uint64_t seq = q->seq;

	memcpy(q, p, sizeof(*p) + p->len);
	q->seq = seq;
	return q;
}

static struct mg_flow flow_of(const struct sim_packet *p)
{
	struct mg_flow f = {.sport = p->sport, .dport = MG_ROCE_PORT, .ip_id = p->ip_id, .df = true};

	memcpy(f.src, p->src, 16);
	memcpy(f.dst, p->dst, 16);
	return f;
}

static void seal(struct sim_packet *p)
{
	const struct mg_flow f = flow_of(p);
	const struct iovec v = {p->data, p->len - MG_ICRC_LEN};
	const uint32_t crc = mg_icrc(&f, &v, 1, p->len - MG_ICRC_LEN);

	for (unsigned i = 0; i < MG_ICRC_LEN; i++)
		p->data[p->len - MG_ICRC_LEN + i] = (uint8_t)(crc >> 8 * i);
}

static uint32_t dest_qpn(const struct sim_packet *p)
{
	return p->len < MG_BTH_LEN ? 0 : (uint32_t)p->data[5] << 16 | (uint32_t)p->data[6] << 8 | p->data[7];
}

/* ---- routes ---- */

static bool in_range(uint32_t qpn, uint32_t base, uint32_t count)
{
	return qpn - base < count;
}

/* The engine that takes the packet now, or -1. */
static int route(const struct mgs_world *w, const struct sim_packet *p)
{
	const uint32_t qpn = dest_qpn(p);

	if (p->member)
		return w->engine[p->member - 1].e && w->engine[p->member - 1].attached ? p->member - 1 : -1;
	for (int i = 0; i < w->n_engine; i++) {
		const struct sim_engine *e = &w->engine[i];

		if (e->e && e->attached && !memcmp(e->gid, p->dst, 16) &&
		    in_range(qpn, e->cfg.qpn_base, e->cfg.qpn_count))
			return i;
	}
	return -1;
}

static int route_standin(const struct mgs_world *w, const struct sim_packet *p)
{
	const uint32_t qpn = dest_qpn(p);

	for (int i = 0; i < SIM_MAX_STANDINS; i++) {
		const struct sim_standin *s = &w->standin[i];

		if (s->on && !memcmp(s->gid, p->dst, 16) && in_range(qpn, s->qpn_base, s->qpn_count))
			return i;
	}
	return -1;
}

/* Whose link a packet to this address takes, also while its owner is away. */
static int link_dst(const struct mgs_world *w, const struct sim_packet *p)
{
	int r = p->member ? p->member - 1 : route(w, p);

	for (int i = 0; r < 0 && i < w->n_engine; i++)
		if (!memcmp(w->engine[i].gid, p->dst, 16) || !memcmp(w->engine[i].cfg.gid, p->dst, 16))
			r = i;
	return r < 0 ? 0 : r;
}

static void keep(struct mgs_world *w, const struct sim_packet *p, int to)
{
	struct sim_packet *q = packet_copy(w, p);

	q->to = to;
	q->t = w->now;
	w->captured = sim_grow(w->captured, w->n_captured, &w->cap_captured, sizeof(*w->captured));
	w->captured[w->n_captured++] = q;
}

/* ---- mercy: how often a packet has been lost ---- */

static uint32_t *tally(struct sim_tally *t, uint64_t key)
{
	size_t i;

	if (2 * t->n >= t->cap) {
		struct sim_tally old = *t;

		t->cap = old.cap ? 2 * old.cap : 1024;
		t->key = calloc(t->cap, sizeof(*t->key));
		t->count = calloc(t->cap, sizeof(*t->count));
		if (!t->key || !t->count)
			abort();
		t->n = 0;
		for (i = 0; i < old.cap; i++)
			if (old.key[i])
				*tally(t, old.key[i]) = old.count[i];
		free(old.key);
		free(old.count);
	}
	key |= (uint64_t)1 << 63;
	for (i = (size_t)(key * 0x9e3779b97f4a7c15u >> 20) & (t->cap - 1); t->key[i] && t->key[i] != key;)
		i = (i + 1) & (t->cap - 1);
	if (!t->key[i]) {
		t->key[i] = key;
		t->n++;
	}
	return &t->count[i];
}

/*
 * What counts as the same packet: requests and READ responses by PSN; acknowledgements and the
 * extension's control packets by kind alone, counting losses in a row, for theirs differ each time.
 */
static uint64_t mercy_key(const struct sim_packet *p, bool *in_a_row)
{
	const uint8_t op = p->data[0];
	const uint64_t psn = (uint64_t)p->data[9] << 16 | (uint64_t)p->data[10] << 8 | p->data[11];

	*in_a_row = op == MG_OP_ACK || op >= MG_SVC_MIG;
	return (uint64_t)dest_qpn(p) << 32 | (uint64_t)op << 24 | (*in_a_row ? 0 : psn);
}

static bool may_lose(struct mgs_world *w, const struct sim_link *l, const struct sim_packet *p)
{
	bool in_a_row;
	uint32_t *n;

	if (!l->p.fair)
		return true;
	n = tally(&w->tally, mercy_key(p, &in_a_row));
	if (*n >= l->p.fair)
		return false;
	++*n;
	return true;
}

static void note_passed(struct mgs_world *w, const struct sim_link *l, const struct sim_packet *p)
{
	bool in_a_row;
	uint64_t key;

	if (!l->p.fair)
		return;
	key = mercy_key(p, &in_a_row);
	if (in_a_row)
		*tally(&w->tally, key) = 0;
}

/* ---- adversity ---- */

static void damage(struct mgs_world *w, struct sim_packet *p)
{
	const unsigned n = 1 + (unsigned)sim_below(&w->rng, 3);

	for (unsigned i = 0; i < n; i++) {
		const uint64_t bit = sim_below(&w->rng, (uint64_t)p->len * 8);

		p->data[bit / 8] ^= (uint8_t)(1u << bit % 8);
	}
	p->damaged = true;
}

/* In order behind everything sent before, or (reordered) anywhere in the next while. */
static void launch(struct mgs_world *w, struct sim_link *l, struct sim_packet *p, uint64_t extra)
{
	const uint64_t wire = (uint64_t)p->len * l->p.ps_per_byte / 1000;
	const uint64_t start = l->free_at > w->now ? l->free_at : w->now;

	l->free_at = start + wire;
	p->t = l->free_at + l->p.delay + extra;
	if (sim_chance(&w->rng, l->p.reorder)) {
		p->t += sim_below(&w->rng, l->p.reorder_by + 1);
		w->stats.reordered++;
	} else {
		p->t += sim_below(&w->rng, l->p.jitter + 1);
		if (!extra) {
			if (p->t < l->last)
				p->t = l->last;
			l->last = p->t;
		}
	}
	heap_push(&w->heap, p);
}

static void lose(struct mgs_world *w, struct sim_packet *p, const char *why, int to)
{
	sim_trace_packet(w, why, p, to);
	w->stats.lost++;
	free(p);
}

/* Returns true when the packet is done with. *extra, *spared: what the rule did to it otherwise. */
static bool apply_rules(struct mgs_world *w, struct sim_packet *p, int to, uint64_t *extra, bool *spared)
{
	const struct mg_opinfo *info = &mg_opinfo[p->data[0]];

	for (int i = 0; i < w->n_rule; i++) {
		struct mgs_rule *r = &w->rule[i];
		struct mg_hdrs h;

		if ((r->src != MGS_ANY && r->src != p->from) || (r->dst != MGS_ANY && r->dst != to))
			continue;
		if (p->data[0] < r->op_lo || p->data[0] > r->op_hi)
			continue;
		if (r->syn_mask) {
			if (!(info->mask & MG_H_AETH) || mg_hdrs_parse(p->data, p->len, &h) ||
			    (h.aeth.syndrome & r->syn_mask) != r->syn)
				continue;
		}
		if (w->rule_seen[i]++ < r->skip || (r->count && r->hits >= r->count))
			continue;
		r->hits++;
		switch (r->action) {
		case MGS_DROP: lose(w, p, "rule-", to); return true;
		case MGS_STEAL:
			keep(w, p, to);
			lose(w, p, "steal", to);
			return true;
		case MGS_CAPTURE: keep(w, p, to); break;
		case MGS_DUP: {
			struct sim_packet *q = packet_copy(w, p);

			launch(w, &w->link[p->from < 0 ? 0 : p->from][to], q, r->delay);
			w->stats.duplicated++;
			break;
		}
		case MGS_DELAY: *extra = r->delay; break;
		case MGS_SWAP:
			if (!mg_hdrs_parse(p->data, p->len, &h) && h.payload_len) {
				p->data[(size_t)(h.payload - p->data)] ^= 0xff;
				seal(p);
			}
			break;
		default: *spared = true; break;
		}
		return false;
	}
	return false;
}

static void transmit(struct mgs_world *w, struct sim_packet *p)
{
	const int to = link_dst(w, p);
	struct sim_link *l = &w->link[p->from < 0 ? 0 : p->from][to];
	uint64_t extra = 0;
	bool spared = false, late = false, bad;

	w->stats.sent++;
	w->stats.bytes += p->len;
	sim_trace_packet(w, "send", p, to);
	if (l->p.strip)
		p->data[4] &= (uint8_t)~MG_BTH4_CAPABLE;
	if (apply_rules(w, p, to, &extra, &spared))
		return;
	if (l->p.down) {
		lose(w, p, "down", to);
		return;
	}
	if (l->p.queue && l->free_at > w->now + l->p.queue && may_lose(w, l, p)) {
		lose(w, p, "full", to);
		return;
	}
	if (!spared) {
		bad = l->burst_left > 0;
		if (bad)
			l->burst_left--;
		else if (sim_chance(&w->rng, l->p.loss)) {
			bad = true;
			l->burst_left = l->p.burst ? l->p.burst - 1 : 0;
		}
		if (bad && may_lose(w, l, p)) {
			lose(w, p, "lost", to);
			return;
		}
		if (sim_chance(&w->rng, l->p.dup)) {
			launch(w, l, packet_copy(w, p), l->p.delay + sim_below(&w->rng, l->p.reorder_by + 1));
			w->stats.duplicated++;
		}
		if (sim_chance(&w->rng, l->p.late) && may_lose(w, l, p)) {
			late = true;
			extra += sim_below(&w->rng, l->p.late_by + 1);
			sim_trace_packet(w, "late", p, to);
		}
		if (sim_chance(&w->rng, l->p.corrupt) && may_lose(w, l, p)) {
			damage(w, p);
			sim_trace_packet(w, "corrupt", p, to);
			w->stats.corrupted++;
		}
	}
	if (!p->damaged && !late)
		note_passed(w, l, p);
	launch(w, l, p, extra);
}

/* A copy for each host that has joined the group, the sender's own too. */
static void spread(struct mgs_world *w, struct sim_packet *p)
{
	for (int i = 0; i < w->n_engine; i++) {
		if (!w->engine[i].e || !sim_joined(&w->engine[i], p->dst))
			continue;
		p->member = i + 1;
		transmit(w, packet_copy(w, p));
	}
	free(p);
}

/* An ACK that named a READ or atomic would make the kernel's rdma_rxe complete it without its data. */
static void check_ack(struct sim_engine *e, const struct mg_pkt *k, const struct mg_hdrs *h)
{
	const struct mg_qp *qp = mg_idtab_get(&e->e->qps, k->qpn);

	if (!qp || (h->opcode & ~MG_SVC_MASK) != MG_OP_ACK || h->aeth.syndrome & MG_AETH_KIND)
		return;
	for (uint32_t i = 0; i < qp->resp.n_res; i++) {
		const struct mg_resource *s = &qp->resp.res[i];

		if (s->opcode && mg_psn_diff(h->psn, s->first_psn) >= 0 &&
		    mg_psn_diff(h->psn, s->last_psn) <= 0)
			sim_violate(e->w, "e%d: mg_tx: an ACK names PSN %u of a READ or atomic", e->index,
				    h->psn);
	}
}

/* What mg_tx gave, checked against engine.h's promises, becomes bytes. */
void sim_send(struct sim_engine *e, const struct mg_pkt *k, unsigned index)
{
	struct mgs_world *w = e->w;
	struct sim_packet *p;
	struct mg_hdrs h;
	size_t len = k->hdr_len;

	for (unsigned i = 0; i < k->n_iov && i < MG_MAX_SGE; i++)
		len += k->iov[i].iov_len;
	len += k->pad + MG_ICRC_LEN;
	if (k->n_iov > MG_MAX_SGE || k->hdr_len > sizeof(k->hdr) || k->pad > 3 || len != k->len) {
		sim_violate(w, "e%d: mg_tx: pieces make %zu bytes, len says %u (hdr %u, iov %u, pad %u)",
			    e->index, len, k->len, k->hdr_len, k->n_iov, k->pad);
		return;
	}
	if (memcmp(k->src.gid, e->gid, 16))
		sim_violate(w, "e%d: mg_tx: source address is not the engine's", e->index);
	p = packet_new(w, len);
	memcpy(p->src, k->src.gid, 16);
	memcpy(p->dst, k->dst.gid, 16);
	p->from = e->index;
	p->sport = k->sport;
	p->tclass = k->tclass;
	p->hop_limit = k->hop_limit;
	p->ip_id = e->cfg.id_mode == 0	 ? 0
		   : e->cfg.id_mode == 1 ? (uint16_t)index
					 : (uint16_t)sim_rand(&w->rng);
	memcpy(p->data, k->hdr, k->hdr_len);
	len = k->hdr_len;
	for (unsigned i = 0; i < k->n_iov; i++) {
		memcpy(p->data + len, k->iov[i].iov_base, k->iov[i].iov_len);
		len += k->iov[i].iov_len;
	}
	memset(p->data + len, 0, k->pad);
	seal(p);
	if (mg_hdrs_parse(p->data, p->len, &h))
		sim_violate(w, "e%d: mg_tx: a packet that does not parse, opcode %02x, %u bytes", e->index,
			    p->data[0], p->len);
	else if (!h.capable || h.pkey != MG_PKEY_DEFAULT || h.pad != k->pad ||
		 h.payload_len > e->cfg.max_path_mtu)
		sim_violate(w, "e%d: mg_tx: opcode %02x: capable %d, pkey %04x, pad %u (said %u), payload %u",
			    e->index, h.opcode, h.capable, h.pkey, h.pad, k->pad, h.payload_len);
	else
		check_ack(e, k, &h);
	if (mg_gid_multicast(p->dst))
		spread(w, p);
	else
		transmit(w, p);
}

void sim_deliver(struct mgs_world *w, struct sim_packet *p)
{
	const struct mg_flow f = flow_of(p);
	struct mg_flow seen = f;
	const int to = route(w, p);
	struct sim_engine *e;
	struct mg_rx meta = {.sport = p->sport, .tclass = p->tclass, .hop_limit = p->hop_limit};

	if (to < 0) {
		const int s = route_standin(w, p);

		sim_trace_packet(w, s < 0 ? "noroute" : "standin", p, s);
		if (s < 0) {
			w->stats.unrouted++;
			free(p);
			return;
		}
		p->to = s;
		w->inbox = sim_grow(w->inbox, w->n_inbox, &w->cap_inbox, sizeof(*w->inbox));
		w->inbox[w->n_inbox++] = p;
		return;
	}
	e = &w->engine[to];
	sim_trace_packet(w, "deliver", p, to);
	seen.ip_id = 0; /* a UDP socket does not tell */
	if (p->len < MG_BTH_LEN + MG_ICRC_LEN || !mg_icrc_check(&seen, p->data, p->len, NULL)) {
		mg_count(e->e, MG_CNT_RX_ICRC, 1);
		free(p);
		return;
	}
	if (p->damaged) {
		/* Either only masked bits were hit, or the check was fooled by a wrong IP id. */
		uint32_t crc = 0;
		const struct iovec v = {p->data, p->len - MG_ICRC_LEN};

		for (unsigned i = 0; i < MG_ICRC_LEN; i++)
			crc |= (uint32_t)p->data[p->len - MG_ICRC_LEN + i] << 8 * i;
		if (crc != mg_icrc(&f, &v, 1, p->len - MG_ICRC_LEN)) {
			w->stats.false_accepts++;
			free(p);
			return;
		}
	}
	memcpy(meta.src.gid, p->src, 16);
	memcpy(meta.dst.gid, p->dst, 16);
	w->stats.delivered++;
	mg_rx(e->e, sim_engine_now(e), &meta, p->data, p->len);
	free(p);
	sim_after(e, true);
}

/* ---- API ---- */

void mgs_link_set(struct mgs_world *w, int src, int dst, const struct mgs_link *link)
{
	for (int s = 0; s < SIM_MAX_ENGINES; s++)
		for (int d = 0; d < SIM_MAX_ENGINES; d++)
			if ((src == MGS_ANY || src == s) && (dst == MGS_ANY || dst == d))
				w->link[s][d].p = *link;
}

int mgs_rule_add(struct mgs_world *w, const struct mgs_rule *rule)
{
	if (w->n_rule == SIM_MAX_RULES)
		return -ENOSPC;
	w->rule[w->n_rule] = *rule;
	w->rule[w->n_rule].hits = 0;
	w->rule_seen[w->n_rule] = 0;
	return w->n_rule++;
}

uint32_t mgs_rule_hits(struct mgs_world *w, int rule)
{
	return rule >= 0 && rule < w->n_rule ? w->rule[rule].hits : 0;
}

void mgs_rules_clear(struct mgs_world *w)
{
	w->n_rule = 0;
}

int mgs_standin_set(struct mgs_world *w, int id, const uint8_t *gid, uint32_t qpn_base, uint32_t qpn_count,
		    int on)
{
	if (id < 0 || id >= SIM_MAX_STANDINS)
		return -EINVAL;
	memcpy(w->standin[id].gid, gid, 16);
	w->standin[id].qpn_base = qpn_base;
	w->standin[id].qpn_count = qpn_count;
	w->standin[id].on = on != 0;
	return 0;
}

static void tell(const struct sim_packet *p, struct mgs_packet_info *info, uint8_t *buf, size_t cap)
{
	memset(info, 0, sizeof(*info));
	info->t = p->t;
	memcpy(info->src, p->src, 16);
	memcpy(info->dst, p->dst, 16);
	info->sport = p->sport;
	info->ip_id = p->ip_id;
	info->tclass = p->tclass;
	info->hop_limit = p->hop_limit;
	info->len = p->len;
	info->from = p->from;
	info->to = p->to;
	memcpy(buf, p->data, p->len < cap ? p->len : cap);
}

int mgs_standin_next(struct mgs_world *w, struct mgs_packet_info *info, uint8_t *buf, size_t cap)
{
	struct sim_packet *p;

	while (w->inbox_head < w->n_inbox) {
		p = w->inbox[w->inbox_head++];
		if (w->inbox_head == w->n_inbox)
			w->inbox_head = w->n_inbox = 0;
		/* What the agent does with every packet: no ICRC, no answer. */
		const struct mg_flow f = flow_of(p);

		if (p->len >= MG_BTH_LEN + MG_ICRC_LEN && mg_icrc_check(&f, p->data, p->len, NULL)) {
			tell(p, info, buf, cap);
			free(p);
			return 1;
		}
		free(p);
	}
	return 0;
}

int mgs_captured(struct mgs_world *w, int i, struct mgs_packet_info *info, uint8_t *buf, size_t cap)
{
	if (i < 0 || (size_t)i >= w->n_captured)
		return 0;
	tell(w->captured[i], info, buf, cap);
	return 1;
}

int mgs_inject(struct mgs_world *w, int from, const uint8_t *src, const uint8_t *dst, uint16_t sport,
	       const uint8_t *buf, size_t len, int with_icrc)
{
	struct sim_packet *p;

	if (len > 65507 - MG_ICRC_LEN || ((!with_icrc || from >= 0) && len < MG_BTH_LEN) || !len)
		return -EINVAL;
	p = packet_new(w, len + (with_icrc ? 0 : MG_ICRC_LEN));
	memcpy(p->src, src, 16);
	memcpy(p->dst, dst, 16);
	p->from = from;
	p->sport = sport;
	p->hop_limit = 64;
	memcpy(p->data, buf, len);
	if (!with_icrc)
		seal(p);
	w->stats.injected++;
	if (from < 0 || from >= w->n_engine) {
		p->from = -1;
		p->t = w->now;
		sim_trace_packet(w, "inject", p, -1);
		heap_push(&w->heap, p);
	} else if (mg_gid_multicast(p->dst)) {
		spread(w, p);
	} else {
		transmit(w, p);
	}
	return 0;
}

void sim_link_free(struct mgs_world *w)
{
	while (w->heap.n)
		free(sim_heap_pop(&w->heap));
	for (size_t i = w->inbox_head; i < w->n_inbox; i++)
		free(w->inbox[i]);
	for (size_t i = 0; i < w->n_captured; i++)
		free(w->captured[i]);
	free(w->heap.v);
	free(w->inbox);
	free(w->captured);
	free(w->tally.key);
	free(w->tally.count);
}
