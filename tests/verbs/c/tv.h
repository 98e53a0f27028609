/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * tv.h - a small harness for programs that use our device through the plain libibverbs API.
 *
 * A program holds several tests; it runs the one it is given by name, in a process of its own. The
 * first failed CHECK ends it with status 1 and says where. QPs are pairs in one process, connected
 * to each other over the loopback interface.
 */
#ifndef TV_H
#define TV_H

#include <errno.h>
#include <infiniband/verbs.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

_Noreturn void tv_fail(const char *file, int line, const char *what, long long got, long long want);
#define CHECK(c)                                               \
	do {                                                   \
		if (!(c))                                      \
			tv_fail(__FILE__, __LINE__, #c, 0, 1); \
	} while (0)
#define CHECK_EQ(got, want)                                                              \
	do {                                                                             \
		long long tv_got = (long long)(got), tv_want = (long long)(want);        \
		if (tv_got != tv_want)                                                   \
			tv_fail(__FILE__, __LINE__, #got " == " #want, tv_got, tv_want); \
	} while (0)
/* The call fails by NULL and errno. */
#define CHECK_ERRNO(ptr_call, err)         \
	do {                               \
		errno = 0;                 \
		CHECK((ptr_call) == NULL); \
		CHECK_EQ(errno, err);      \
	} while (0)

struct tv_test {
	const char *name;
	void (*run)(void);
};
#define T(name)             \
	{                   \
#name, name \
	}
#define TV_MAIN(...)                                                      \
	int main(int argc, char **argv)                                   \
	{                                                                 \
		static const struct tv_test tests[] = {__VA_ARGS__, {0}}; \
		return tv_main(argc, argv, tests);                        \
	}
int tv_main(int argc, char **argv, const struct tv_test *tests);

#define TV_BUF 262144u

struct tv_opt {
	unsigned send_wr, recv_wr, send_sge, recv_sge, inline_data; /* 0: 64, 64, 4, 4, 0 */
	int cqe;						    /* 0: 256 */
	bool sig_all;
	bool unconnected;				/* leave the QPs in RESET */
	bool channel;					/* a completion channel for each CQ */
	uint64_t wc_flags;				/* of those CQs, beside the standard ones */
	bool ex_cq;					/* CQs by ibv_create_cq_ex */
	uint64_t send_ops;				/* QPs by ibv_create_qp_ex with these */
	enum ibv_mtu mtu;				/* 0: 1024 */
	int access;					/* QP and MR access; 0: everything */
	uint8_t timeout, retry_cnt, rnr_retry, min_rnr; /* 0: 14, 7, 7, 1; 0xff for a real 0 */
};

struct tv_end {
	struct ibv_context *ctx;
	struct ibv_pd *pd;
	struct ibv_comp_channel *channel;
	struct ibv_cq *scq, *rcq;
	struct ibv_qp *qp;
	struct ibv_mr *mr;
	uint8_t *buf; /* TV_BUF bytes */
};

struct ibv_device **tv_devices(struct ibv_device **ours);
struct ibv_context *tv_open(void);
void tv_gid(struct ibv_context *ctx, union ibv_gid *gid, int *index);
/* Two ends on one context, connected. */
void tv_pair(struct tv_end *a, struct tv_end *b, const struct tv_opt *opt);
void tv_pair_close(struct tv_end *a, struct tv_end *b);
void tv_end_open(struct tv_end *e, struct ibv_context *ctx, const struct tv_opt *opt);
void tv_end_close(struct tv_end *e);
void tv_to_init(struct ibv_qp *qp, const struct tv_opt *opt);
int tv_to_rtr(struct ibv_qp *qp, uint32_t peer, const struct tv_opt *opt);
int tv_to_rts(struct ibv_qp *qp, const struct tv_opt *opt);
/* From RESET: `a` to RTS, `b`, its peer, to RTR. */
void tv_connect(struct ibv_qp *a, struct ibv_qp *b, const struct tv_opt *opt);

/* Wait (at most 10 s) for one completion. */
struct ibv_wc tv_wait(struct ibv_cq *cq);
void tv_wait_ok(struct ibv_cq *cq, uint64_t wr_id);

/* Post on e: `off`, `len` in e's buffer. */
int tv_recv(struct tv_end *e, uint64_t wr_id, uint32_t off, uint32_t len);
struct ibv_send_wr tv_wr(struct tv_end *e, enum ibv_wr_opcode op, uint64_t wr_id, struct ibv_sge *sge,
			 uint32_t off, uint32_t len);
int tv_post(struct tv_end *e, struct ibv_send_wr *wr);
void tv_fill(uint8_t *p, size_t n, unsigned seed);
bool tv_filled(const uint8_t *p, size_t n, unsigned seed);

#endif
