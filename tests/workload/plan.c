/* SPDX-License-Identifier: BSD-3-Clause */
#include "plan.h"

#include <libdeflate.h>
#include <stdio.h>
#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "written for little-endian machines");

const char *const kind_name[K_COUNT] = {"send", "send_imm", "write", "write_imm", "read", "atomic"};

struct msg_header {
	uint32_t magic;
	uint32_t size;
	uint64_t seq;
	uint32_t kind;
	uint32_t crc; /* of what follows the header */
};
_Static_assert(sizeof(struct msg_header) == MSG_HEADER, "message header");
#define MSG_MAGIC 0x4b43474du /* "MGCK" */

#define GOLDEN 0x9e3779b97f4a7c15ull

static inline uint64_t mix(uint64_t z)
{
	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
	return z ^ (z >> 31);
}

uint64_t rng_next(uint64_t *state)
{
	*state += GOLDEN;
	return mix(*state);
}

uint8_t *pattern(uint8_t *buf, uint64_t key, uint64_t off, size_t len)
{
	uint64_t word = off / 8;
	size_t skip = off % 8;
	size_t n = (skip + len + 7) / 8;

	for (size_t i = 0; i < n; i++) {
		uint64_t v = mix(key + (word + i) * GOLDEN);

		memcpy(buf + i * 8, &v, 8);
	}
	return buf + skip;
}

uint32_t plan_ring_size(const struct plan_config *cfg)
{
	/* A quarter may go unnoticed, one message be under way, one be lost to the ring's end. */
	return 4 * ((cfg->max_size + 2 * CANARY_LEN + 4095) & ~4095u);
}

uint32_t plan_source_size(const struct plan_config *cfg)
{
	return cfg->max_size + 8192;
}

void plan_init(struct plan *p, const struct plan_config *cfg, uint32_t stream)
{
	*p = (struct plan){.cfg = cfg};
	p->key = mix(cfg->seed * GOLDEN + stream + 1);
	p->rng = mix(p->key);
}

uint64_t plan_source_key(const struct plan *p)
{
	return mix(p->key ^ 0x736f757263650000ull);
}

static uint32_t pick_size(struct plan *p)
{
	const struct plan_config *cfg = p->cfg;
	uint64_t r = rng_next(&p->rng);
	uint32_t which = r % 100;
	uint32_t x = r >> 32;
	uint32_t size;

	if (cfg->fixed_size != UINT32_MAX)
		return cfg->fixed_size;
	if (which < 8)
		size = 0;
	else if (which < 35)
		size = 1 + x % 64;
	else if (which < 60)
		size = 1 + x % 4096;
	else if (which < 80)
		size = 1 + x % 32768;
	else if (which < 90)
		size = cfg->max_size ? 1 + x % cfg->max_size : 0;
	else /* around multiples of every MTU */
		size = (256u << (x % 5)) * (1 + (x >> 3) % 8) + (x >> 8) % 3 - 1;
	return size < cfg->max_size ? size : cfg->max_size;
}

void plan_next(struct plan *p, struct op *op)
{
	const struct plan_config *cfg = p->cfg;
	uint32_t ring = plan_ring_size(cfg);
	unsigned n = (unsigned)__builtin_popcount(cfg->ops);
	unsigned pick = rng_next(&p->rng) % n;
	unsigned kind;

	for (kind = 0; kind < K_COUNT; kind++)
		if ((cfg->ops & (1u << kind)) && pick-- == 0)
			break;
	*op = (struct op){.kind = (enum kind)kind, .seq = p->next++, .size = pick_size(p)};

	if (op->kind == K_ATOMIC) {
		op->size = 8;
		return;
	}
	if (op->kind == K_READ) {
		op->read_off = rng_next(&p->rng) % (plan_source_size(cfg) - op->size + 1);
		return;
	}
	if (op->kind == K_WRITE || op->kind == K_WRITE_IMM) {
		uint32_t need = (op->size + CANARY_LEN + 7) & ~7u;

		if (p->ring_pos % ring + need > ring)
			p->ring_pos += ring - p->ring_pos % ring;
		op->ring_off = p->ring_pos % ring;
		p->ring_pos += need;
		op->ring_end = p->ring_pos;
		p->unnoticed += need;
		if (p->unnoticed > ring / 4)
			op->kind = K_WRITE_IMM;
	}
	if (op->kind != K_WRITE)
		p->unnoticed = 0;
}

uint8_t *message(uint8_t *buf, const struct plan *p, const struct op *op)
{
	uint64_t key = mix(p->key ^ (op->seq + 1) * GOLDEN);
	uint8_t *m = pattern(buf, key, 0, op->size);

	if (op->size >= MSG_MIN_HEADER) {
		struct msg_header h = {
			.magic = MSG_MAGIC, .size = op->size, .seq = op->seq, .kind = op->kind};

		h.crc = libdeflate_crc32(0, m + MSG_HEADER, op->size - MSG_HEADER);
		memcpy(m, &h, sizeof(h));
	}
	return m;
}

void message_explain(const uint8_t *got, const uint8_t *want, uint32_t size, char *out, size_t cap)
{
	struct msg_header h;
	uint32_t first = 0, bad = 0;
	size_t n;

	for (uint32_t i = 0; i < size; i++)
		if (got[i] != want[i] && bad++ == 0)
			first = i;
	n = (size_t)snprintf(out, cap, "%u of %u bytes differ, the first at %u (0x%02x, not 0x%02x)", bad,
			     size, first, got[first], want[first]);
	if (size < MSG_MIN_HEADER || n >= cap)
		return;
	memcpy(&h, got, sizeof(h));
	if (h.magic != MSG_MAGIC)
		snprintf(out + n, cap - n, "; no message header there");
	else
		snprintf(out + n, cap - n, "; header says number %llu, %s, %u bytes, CRC %s",
			 (unsigned long long)h.seq, h.kind < K_COUNT ? kind_name[h.kind] : "?", h.size,
			 h.size == size && h.crc == libdeflate_crc32(0, got + MSG_HEADER, size - MSG_HEADER)
				 ? "right"
				 : "wrong");
}
