/* Invariant: no packet, order of packets or order of calls breaks memory, completion order or the engine's word. */
/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * Two engines with two connections between them. The input is a program: post, transmit, deliver, lose,
 * repeat, reorder, forge, move time, stop, resume elsewhere, reset, ... A stand-in answers for a stopped
 * engine and at the addresses it has left. Checked besides what the sanitizers see:
 *
 * - every packet sent is well-formed, bears the capability bit, fits the path MTU and its peer;
 * - completions come in posting order, once each; none that was asked for is missing;
 * - memory without remote rights is never written, nor anything outside a registered region;
 * - as long as nothing was forged or misused, the network coming back lets everything complete.
 */
#include "fuzz/engine.h"

#include <errno.h>

/* ---- time, stop, resume, states --------------------------------------------------------------- */

static void pass_time(mg_time ns)
{
	w.now += ns;
	for (int i = 0; i < 2; i++)
		mg_timer(w.s[i].e, now_of(&w.s[i]));
}

static void dump(const struct side *s, struct mg_dump_qp out[N_QP])
{
	const size_t need = mg_dump(s->e, NULL, 0);
	struct mg_dump_record rec = {0};
	uint8_t *buf = malloc(need);
	unsigned n = 0;

	FUZZ_CHECK(buf && need >= sizeof(struct mg_dump_header) && need < 65536);
	memset(buf, 0xee, need);
	FUZZ_CHECK(mg_dump(s->e, buf, need - 1) == need && buf[0] == 0xee);
	FUZZ_CHECK(mg_dump(s->e, buf, need) == need && memcmp(buf, MG_DUMP_MAGIC, 8) == 0);
	for (size_t at = sizeof(struct mg_dump_header); rec.type != MG_DUMP_END;
	     at += sizeof(rec) + rec.length) {
		FUZZ_CHECK(at + sizeof(rec) <= need);
		memcpy(&rec, buf + at, sizeof(rec));
		FUZZ_CHECK(rec.length <= need - at - sizeof(rec) && !(rec.length & 7));
		FUZZ_CHECK(rec.type != MG_DUMP_END || at + sizeof(rec) + rec.length == need);
		if (rec.type == MG_DUMP_QP) {
			FUZZ_CHECK(n < N_QP && rec.length == sizeof(*out));
			memcpy(&out[n++], buf + at + sizeof(rec), sizeof(*out));
		}
	}
	FUZZ_CHECK(n == N_QP);
	free(buf);
}

static void stop(struct side *s)
{
	if (s->stopped)
		return;
	trace(s, "stops, ready %d", mg_stop_ready(s->e));
	mg_stop(s->e);
	s->stopped = true;
	FUZZ_CHECK(mg_stopped(s->e) && mg_deadline(s->e) == MG_NEVER);
	dump(s, s->at_stop);
}

static void resume(struct fuzz_in *in, struct side *s)
{
	const uint8_t how = fuzz_u8(in);

	stop(s); /* clock and address change under a stopped engine only */
	if (how & 1)
		s->clock += (mg_time)fuzz_u16(in) << 20;
	if (how & 2)
		s->clock -= (mg_time)fuzz_u8(in) << 20;
	if (how & 4 && s->n_left < MAX_MOVES) {
		struct left *left = &s->left[s->n_left++];

		left->from = s->addr;
		memcpy(left->qp, s->at_stop, sizeof(left->qp));
		for (unsigned q = 0; q < N_QP; q++) { /* a move that cannot be proved ends the connection */
			if (!s->at_stop[q].token_acked || w.options & OPT_NO_STANDIN)
				w.honest = false;
		}
		s->addr.gid[14]++;
		left->to = s->addr;
		mg_resume(s->e, now_of(s), &s->addr);
	} else {
		mg_resume(s->e, now_of(s), NULL);
	}
	trace(s, "resumes, %u moves", s->n_left);
	s->stopped = false;
	FUZZ_CHECK(!mg_stopped(s->e));
}

static void change_state(struct fuzz_in *in, struct side *s, unsigned q)
{
	static const enum ibv_qp_state states[] = {IBV_QPS_RESET, IBV_QPS_INIT, IBV_QPS_RTR, IBV_QPS_RTS,
						   IBV_QPS_SQD,	  IBV_QPS_ERR,	IBV_QPS_SQE};
	const uint8_t how = fuzz_u8(in);
	struct ibv_qp_attr a = {.qp_state = states[how % 7], .en_sqd_async_notify = 1};
	struct conn *c = &s->c[q];
	struct ibv_qp_init_attr init;
	int mask = IBV_QP_STATE;

	if (how & 128)
		a.qp_state = IBV_QPS_RESET;
	if (a.qp_state != IBV_QPS_SQD && a.qp_state != IBV_QPS_RTS && !misuse(true))
		return;
	if (a.qp_state == IBV_QPS_SQD && how & 64)
		mask |= IBV_QP_EN_SQD_ASYNC_NOTIFY;
	trace(s, "qpn %06x to state %d", c->qpn, a.qp_state);
	if (mg_qp_modify(c->qp, now_of(s), &a, mask))
		return;
	FUZZ_CHECK(!mg_qp_query(c->qp, &a, IBV_QP_STATE, &init));
	if (a.qp_state == IBV_QPS_RESET) {
		c->send_base = c->send_next;
		c->recv_base = c->recv_next;
		if (how & 128)
			connect_qp(s, q);
	}
}

/* Another region at another place; requests in the queues still name the old one, which is gone. */
static void change_region(struct fuzz_in *in, struct side *s)
{
	const unsigned access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ;
	uint8_t *fresh = malloc(DATA_LEN);

	FUZZ_CHECK(fresh);
	if (mg_mr_destroy(s->data) == EBUSY) {
		for (int i = 0; i < 2; i++)
			mg_mw_destroy(s->mw[i]);
		create_windows(s);
		FUZZ_CHECK(!mg_mr_destroy(s->data));
	}
	free(s->data_mem);
	s->data_mem = fresh;
	memset(fresh, fuzz_u8(in), DATA_LEN);
	FUZZ_CHECK(!mg_mr_create(s->pd, fresh, DATA_LEN, DATA_VA, access, &s->data));
}

/* ---- the run ---------------------------------------------------------------------------------- */

static void step(struct fuzz_in *in)
{
	const uint8_t c = fuzz_u8(in);
	struct side *s = &w.s[c & 1];
	const unsigned q = c >> 7, n = c >> 5 & 3;
	size_t at = w.flying ? (c >> 5) % w.flying : 0;

	switch (c >> 1 & 15) {
	case 0:
	case 1: transmit(s, q ? MG_TX_LAZY : 0, 1 + n * 2); break;
	case 2:
	case 3:
		for (unsigned i = 0; i <= n && w.flying; i++)
			deliver(0, false);
		break;
	case 4:
		if (w.flying)
			deliver(at, n == 0);
		break;
	case 5:
		if (w.flying)
			memmove(&w.wire[at], &w.wire[at + 1], (--w.flying - at) * sizeof(w.wire[0]));
		break;
	case 6:
		if (w.flying && misuse(true))
			deliver_mutated(in, at);
		break;
	case 7:
		if (misuse(true))
			forge(in, s, q);
		break;
	case 8:
	case 9: post_send(in, s, q); break;
	case 10: post_recv(in, s, q); break;
	case 11:
		poll_side(s, 1 + (c >> 5));
		mg_cq_arm(n & 1 ? s->send_cq : s->recv_cq, q);
		break;
	case 12: pass_time((mg_time)(1 + fuzz_u8(in)) << (c >> 5) * 4); break;
	case 13:
		if (n == 0)
			dump(s, (struct mg_dump_qp[N_QP]){{0}});
		else if (n == 1)
			stop(s);
		else
			resume(in, s);
		break;
	case 14:
		if (n == 0) {
			if (misuse(true))
				change_region(in, s);
		} else if (n == 1) {
			change_state(in, s, q);
		} else if (n == 2) {
			(void)mg_cq_resize(q ? s->send_cq : s->recv_cq, fuzz_u8(in) + 1u);
		} else {
			const mg_time due = mg_deadline(s->e);

			FUZZ_CHECK(!(s->stopped && due != MG_NEVER));
			if (due != MG_NEVER && due > now_of(s) && due - now_of(s) < (mg_time)1 << 40)
				pass_time(due - now_of(s));
		}
		break;
	default: {
		const struct mg_rx meta = {other(s)->addr, s->addr, 0, 0, 64};
		const size_t len = in->left < (c >> 5) * 16u ? in->left : (c >> 5) * 16u;

		if (misuse(true))
			hand_over(&meta, in->p, len);
		in->p += len;
		in->left -= len;
	}
	}
}

static bool all_done(void)
{
	struct ibv_qp_init_attr init;
	struct ibv_qp_attr a;

	for (unsigned i = 0; i < 2 * N_QP; i++) {
		const struct conn *c = &w.s[i / N_QP].c[i % N_QP];

		FUZZ_CHECK(!mg_qp_query(c->qp, &a, IBV_QP_STATE, &init));
		for (uint64_t id = c->send_done; id < c->send_next; id++) {
			if (c->signaled[id % IDS] && a.qp_state == IBV_QPS_RTS)
				return false;
		}
	}
	return true;
}

static void back_to_work(struct side *s)
{
	struct ibv_qp_attr a = {.qp_state = IBV_QPS_RTS};

	if (s->stopped)
		mg_resume(s->e, now_of(s), NULL);
	s->stopped = false;
	for (unsigned q = 0; q < N_QP; q++) /* those that are draining go on */
		(void)mg_qp_modify(s->c[q].qp, now_of(s), &a, IBV_QP_STATE);
}

/* The network works again, receives are posted: everything that was asked for completes. */
static void drain(void)
{
	trace(w.s, "the network works again");
	back_to_work(&w.s[0]);
	back_to_work(&w.s[1]);
	for (int round = 0; w.honest && !all_done(); round++) {
		struct fuzz_in none = {(const uint8_t *)"", 0};
		mg_time next = MG_NEVER;
		size_t moved = w.flying;

		FUZZ_CHECK(round < MAX_ROUNDS);
		for (size_t n = w.flying; n > 0; n--)
			deliver(0, false);
		for (unsigned i = 0; i < 2; i++) {
			struct side *s = &w.s[i];
			mg_time due;

			for (unsigned q = 0; q < N_QP; q++) {
				if (s->c[q].recv_next - s->c[q].recv_done < DEPTH)
					post_recv(&none, s, q);
			}
			moved += transmit(s, 0, 8);
			moved += poll_side(s, 8);
			due = mg_deadline(s->e);
			if (due != MG_NEVER && (due <= now_of(s) || due - now_of(s) < next))
				next = due <= now_of(s) ? 0 : due - now_of(s);
		}
		if (moved)
			continue;
		FUZZ_CHECK(!w.honest || next != MG_NEVER || all_done());
		if (next != MG_NEVER)
			pass_time(next + 1);
	}
}

static void tear_down(void)
{
	for (int i = 0; i < 2; i++) {
		struct side *s = &w.s[i];

		for (size_t k = 0; k < KEPT_LEN; k++)
			FUZZ_CHECK(s->kept_mem[k] == KEPT_BYTE);
		FUZZ_CHECK(mg_pd_destroy(s->pd) == EBUSY && mg_cq_destroy(s->send_cq) == EBUSY);
		if (w.seed & 1) { /* piece by piece, or all by the engine */
			FUZZ_CHECK(!mg_qp_destroy(s->c[1].qp) && !mg_qp_destroy(s->c[0].qp));
			for (int k = 0; k < 2; k++)
				mg_mw_destroy(s->mw[k]);
			FUZZ_CHECK(!mg_mr_destroy(s->data) && !mg_mr_destroy(s->kept));
			FUZZ_CHECK(!mg_mr_destroy(s->foreign) && !mg_pd_destroy(s->pd));
			FUZZ_CHECK(!mg_cq_destroy(s->send_cq) && !mg_cq_destroy(s->recv_cq));
		}
		mg_engine_destroy(s->e);
		free(s->data_mem);
		free(s->kept_mem);
	}
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	struct fuzz_in in = {data, size};

	memset(&w, 0, sizeof(w));
	w.seed = 0x9e3779b97f4a7c15ull + fuzz_u8(&in);
	w.options = fuzz_u8(&in);
	w.now = START;
	tracing = getenv("FUZZ_TRACE") != NULL;
	w.honest = true;
	create_side(&w.s[0], 1);
	create_side(&w.s[1], 2);
	for (unsigned q = 0; q < N_QP; q++) {
		connect_qp(&w.s[0], q);
		connect_qp(&w.s[1], q);
	}
	for (int i = 0; i < MAX_STEPS && in.left; i++)
		step(&in);
	drain();
	tear_down();
	return 0;
}
