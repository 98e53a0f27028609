/* SPDX-License-Identifier: BSD-3-Clause */
/* engine_world.c - fuzz_engine: two engines with two connections between them. */
#include "fuzz/engine.h"

#include <stdarg.h>

struct world w;

bool tracing;

__attribute__((format(printf, 2, 3))) void trace(const struct side *s, const char *fmt, ...)
{
	va_list args;

	if (!tracing)
		return;
	fprintf(stderr, "%9.3f ms  %c  ", (double)(w.now - START) / 1e6, !s ? '-' : s == w.s ? 'A' : 'B');
	va_start(args, fmt);
	vfprintf(stderr, fmt, args);
	va_end(args);
	fputc('\n', stderr);
}

void trace_packet(const struct side *s, const char *what, const uint8_t *buf, size_t len)
{
	struct mg_hdrs h;

	if (!tracing || mg_hdrs_parse(buf, len, &h))
		return;
	trace(s, "%s qpn %06x %s psn %06x%s syndrome %02x msn %u epoch %u payload %u", what, h.dest_qpn,
	      mg_opinfo[h.opcode].name, h.psn, h.ackreq ? " A" : "", h.aeth.syndrome, h.aeth.msn, h.meh.epoch,
	      h.payload_len);
}

bool misuse(bool wanted)
{
	if (!wanted || w.options & OPT_HONEST)
		return false;
	w.honest = false;
	return true;
}

static void random_bytes(void *arg, void *buf, size_t n)
{
	uint8_t *p = buf;

	(void)arg;
	while (n--) {
		w.seed ^= w.seed << 13;
		w.seed ^= w.seed >> 7;
		w.seed ^= w.seed << 17;
		*p++ = (uint8_t)(w.seed >> 32);
	}
}

static void cq_event(void *arg, struct mg_cq *cq)
{
	const struct side *s = arg;

	FUZZ_CHECK(cq == s->send_cq || cq == s->recv_cq);
}

static void async_event(void *arg, enum ibv_event_type type, void *object)
{
	const struct side *s = arg;

	FUZZ_CHECK(object == s->c[0].qp || object == s->c[1].qp || object == s->send_cq ||
		   object == s->recv_cq);
	if (type == IBV_EVENT_CQ_ERR)
		w.overrun = true;
	if (type != IBV_EVENT_COMM_EST && type != IBV_EVENT_SQ_DRAINED)
		w.honest = false;
}

static const struct mg_ops ops = {random_bytes, cq_event, async_event};

/* ---- set-up ----------------------------------------------------------------------------------- */

void connect_qp(struct side *s, unsigned q)
{
	const unsigned access = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ |
				IBV_ACCESS_REMOTE_ATOMIC | MG_ACCESS_FLUSH_GLOBAL;
	const uint32_t psn[2] = {0xfffff8 + q, 0x000100}; /* one side's PSNs wrap soon */
	const uint8_t retries = w.options & OPT_FEW_RETRIES ? 1 : 7;
	struct ibv_qp_attr a = {.port_num = 1, .qp_access_flags = access};
	struct mg_qp *qp = s->c[q].qp;

	a.qp_state = IBV_QPS_INIT;
	FUZZ_CHECK(!mg_qp_modify(qp, now_of(s), &a,
				 IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS));
	a.qp_state = IBV_QPS_RTR;
	a.path_mtu = q ? IBV_MTU_512 : IBV_MTU_256;
	a.dest_qp_num = other(s)->c[q].qpn;
	a.rq_psn = psn[other(s) - w.s];
	a.max_dest_rd_atomic = 4;
	a.min_rnr_timer = 1;
	a.ah_attr.is_global = 1;
	a.ah_attr.port_num = 1;
	a.ah_attr.grh.sgid_index = 1;
	a.ah_attr.grh.hop_limit = 64;
	memcpy(a.ah_attr.grh.dgid.raw, other(s)->addr.gid, 16);
	FUZZ_CHECK(!mg_qp_modify(qp, now_of(s), &a,
				 IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN |
					 IBV_QP_RQ_PSN | IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER));
	s->c[q].seen[0] = psn[s - w.s] - 1;
	s->c[q].seen[1] = a.rq_psn - 1;
	a.qp_state = IBV_QPS_RTS;
	a.timeout = 8;
	a.retry_cnt = retries;
	a.rnr_retry = retries;
	a.sq_psn = psn[s - w.s];
	a.max_rd_atomic = 4;
	FUZZ_CHECK(!mg_qp_modify(qp, now_of(s), &a,
				 IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
					 IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC));
}

void create_windows(struct side *s)
{
	for (int i = 0; i < 2; i++)
		FUZZ_CHECK(!mg_mw_create(s->pd, i ? IBV_MW_TYPE_2 : IBV_MW_TYPE_1, &s->mw[i]));
}

void create_side(struct side *s, uint8_t last)
{
	const unsigned all = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ |
			     IBV_ACCESS_REMOTE_ATOMIC | IBV_ACCESS_MW_BIND | MG_ACCESS_FLUSH_GLOBAL;
	const uint32_t depth = w.options & OPT_SMALL_CQ ? 3 : CQ_DEPTH;
	struct mg_config cfg = {.qpn_base = 0x40000, .qpn_count = 0x40000, .max_path_mtu = 4096};
	struct ibv_qp_init_attr_ex init = {.qp_type = IBV_QPT_RC, .sq_sig_all = !!(w.options & OPT_SIG_ALL)};
	struct mg_qp_parts parts;

	memcpy(cfg.addr.gid, (const uint8_t[16]){[10] = 0xff, 0xff, 10, 0, 0, last}, 16);
	s->addr = cfg.addr;
	s->clock = (mg_time)last << 50;
	s->e = mg_engine_create(&cfg, &ops, s);
	FUZZ_CHECK(s->e);
	s->pd = mg_pd_create(s->e);
	s->other_pd = mg_pd_create(s->e);
	s->data_mem = malloc(DATA_LEN);
	s->kept_mem = malloc(KEPT_LEN);
	FUZZ_CHECK(s->pd && s->other_pd && s->data_mem && s->kept_mem);
	memset(s->data_mem, last, DATA_LEN);
	memset(s->kept_mem, KEPT_BYTE, KEPT_LEN);
	FUZZ_CHECK(!mg_mr_create(s->pd, s->data_mem, DATA_LEN, DATA_VA, all, &s->data));
	FUZZ_CHECK(!mg_mr_create(s->pd, s->kept_mem, KEPT_LEN, KEPT_VA, IBV_ACCESS_REMOTE_READ, &s->kept));
	/* All rights, but of a protection domain that no QP is in. */
	FUZZ_CHECK(!mg_mr_create(s->other_pd, s->kept_mem, KEPT_LEN, KEPT_VA, all, &s->foreign));
	create_windows(s);
	FUZZ_CHECK(!mg_cq_create(s->e, depth, s, &s->send_cq) && !mg_cq_create(s->e, depth, s, &s->recv_cq));
	init.cap = (struct ibv_qp_cap){DEPTH, DEPTH, 4, 4, 64};
	parts = (struct mg_qp_parts){.pd = s->pd, .send_cq = s->send_cq, .recv_cq = s->recv_cq};
	for (unsigned q = 0; q < N_QP; q++) {
		struct conn *c = &s->c[q];

		FUZZ_CHECK(!mg_qp_create(s->e, &parts, &init, s, &c->qp));
		FUZZ_CHECK(mg_qp_owner(c->qp) == s);
		c->qpn = mg_qp_num(c->qp);
		FUZZ_CHECK(c->qpn >= cfg.qpn_base && c->qpn < cfg.qpn_base + cfg.qpn_count && c->qpn > 1);
	}
	FUZZ_CHECK(s->c[0].qpn != s->c[1].qpn);
}
