/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * plan.h - what a stream of messages looks like, from a seed: both ends draw the same plan, so the
 * receiver knows of every message what it must be, byte for byte, without being told.
 *
 * A stream is one direction of one QP: its initiator posts SEND, WRITE and READ in the plan's order.
 * Plain WRITEs tell the target nothing; it checks them when the next message that completes a receive
 * arrives (RC places an earlier WRITE before a later message completes). The WRITEs go into a ring in
 * the target's memory; how far the target has checked it is a counter the initiator reads by RDMA READ.
 * Atomics change a word there that is the stream's alone: the initiator knows each result beforehand.
 */
#ifndef MGCHECK_PLAN_H
#define MGCHECK_PLAN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum kind { K_SEND, K_SEND_IMM, K_WRITE, K_WRITE_IMM, K_READ, K_ATOMIC, K_COUNT };
extern const char *const kind_name[K_COUNT]; /* as in --ops and in the verdict */

#define OPS_ALL ((1u << K_COUNT) - 1)
/* The target's program is not told of it by a completion. */
static inline bool kind_is_silent(enum kind k)
{
	return k == K_WRITE || k == K_READ || k == K_ATOMIC;
}
#define CANARY 0xa5
#define CANARY_LEN 16u /* behind every WRITE in the ring */

struct plan_config {
	uint64_t seed;
	uint32_t ops;	     /* bits of enum kind, not 0 */
	uint32_t max_size;   /* bytes */
	uint32_t fixed_size; /* bytes, or UINT32_MAX: mixed */
};

struct op {
	enum kind kind;
	uint64_t seq;
	uint32_t size;
	uint32_t ring_off; /* WRITE: where in the target's ring */
	uint64_t ring_end; /* WRITE: position of its end, counted from the stream's start */
	uint32_t read_off; /* READ: where in the target's source area */
};

struct plan {
	const struct plan_config *cfg;
	uint64_t key; /* the stream's */
	uint64_t rng;
	uint64_t next; /* sequence number of the next operation */
	uint64_t ring_pos;
	uint32_t unnoticed; /* ring bytes since the target last heard of the stream */
};

/* `stream`: unique per QP and direction. */
void plan_init(struct plan *p, const struct plan_config *cfg, uint32_t stream);
void plan_next(struct plan *p, struct op *op);

uint32_t plan_ring_size(const struct plan_config *cfg);	  /* bytes */
uint32_t plan_source_size(const struct plan_config *cfg); /* bytes */

/* Small generator for local choices and for the plan itself. */
uint64_t rng_next(uint64_t *state);
/* Pattern bytes [off, off+len) of `key`; buf needs len + 16 bytes; returns where they start in it. */
uint8_t *pattern(uint8_t *buf, uint64_t key, uint64_t off, size_t len);
/* The key of the source area that READs of this stream fetch. */
uint64_t plan_source_key(const struct plan *p);

/*
 * The message of `op`: pattern bytes; from 32 bytes on with a header (number, length, CRC-32 of the
 * rest). buf: op->size + 16 bytes; returns where it starts in it.
 */
#define MSG_HEADER 24u
#define MSG_MIN_HEADER 32u
uint8_t *message(uint8_t *buf, const struct plan *p, const struct op *op);

/*
 * Say in `out` what `got` (size bytes, differing from `want`) looks like: which message, whether its
 * CRC holds, the first byte that differs.
 */
void message_explain(const uint8_t *got, const uint8_t *want, uint32_t size, char *out, size_t cap);

#endif
