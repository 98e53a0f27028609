/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * What ibv_modify_qp takes: every QP type in every state to every other, each attribute missing that must be there
 * and each that may or may not be there besides. The table is written down from what the kernel's
 * ib_modify_qp_is_ok() answers, which stands before every driver; it is IBA's 11.2.5.2.
 */
#include "tv.h"

#include <fcntl.h>

#define A IBV_QP_ACCESS_FLAGS
#define K IBV_QP_PKEY_INDEX
#define P IBV_QP_PORT
#define Q IBV_QP_QKEY
#define CUR IBV_QP_CUR_STATE
#define MIG IBV_QP_PATH_MIG_STATE
#define RNR IBV_QP_MIN_RNR_TIMER
#define TO (IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN)
#define ASK (IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC)
#define GIVE (IBV_QP_MAX_DEST_RD_ATOMIC | RNR)
#define PSN IBV_QP_SQ_PSN
#define NOTIFY IBV_QP_EN_SQD_ASYNC_NOTIFY

enum { RC, UC, UD, INI, TGT, N };
static const enum ibv_qp_type type_of[N] = {IBV_QPT_RC, IBV_QPT_UC, IBV_QPT_UD, IBV_QPT_XRC_SEND,
					    IBV_QPT_XRC_RECV};

/* What one half of an XRC connection has no use for is passed over: programs give all of RC's (docs/verbs.md). */
static const int passed_over[N] = {[INI] = GIVE, [TGT] = ASK & ~IBV_QP_TIMEOUT};

#define EACH(...)                                                               \
	{                                                                       \
		__VA_ARGS__, __VA_ARGS__, __VA_ARGS__, __VA_ARGS__, __VA_ARGS__ \
	}
static const struct row {
	enum ibv_qp_state from, to;
	int need[N], may[N];
} rows[] = {
	{IBV_QPS_RESET, IBV_QPS_INIT, {K | P | A, K | P | A, K | P | Q, K | P | A, K | P | A}, {0}},
	{IBV_QPS_INIT, IBV_QPS_INIT, {0}, {K | P | A, K | P | A, K | P | Q, K | P | A, K | P | A}},
	{IBV_QPS_INIT, IBV_QPS_RTR, {TO | GIVE, TO, 0, TO, TO | GIVE}, {A | K, A | K, K | Q, A | K, A | K}},
	{IBV_QPS_RTR,
	 IBV_QPS_RTS,
	 {ASK | PSN, PSN, PSN, ASK | PSN, IBV_QP_TIMEOUT | PSN},
	 {CUR | A | RNR | MIG, CUR | A | MIG, CUR | Q, CUR | A | MIG, CUR | A | RNR | MIG}},
	{IBV_QPS_RTS,
	 IBV_QPS_RTS,
	 {0},
	 {CUR | A | RNR | MIG, CUR | A | MIG, CUR | Q, CUR | A | MIG, CUR | A | RNR | MIG}},
	{IBV_QPS_RTS, IBV_QPS_SQD, {0}, EACH(NOTIFY)},
	{IBV_QPS_SQD,
	 IBV_QPS_RTS,
	 {0},
	 {CUR | A | RNR | MIG, CUR | A | MIG, CUR | Q, CUR | A | MIG, CUR | A | RNR | MIG}},
	{IBV_QPS_SQD,
	 IBV_QPS_SQD,
	 {0},
	 {P | IBV_QP_AV | ASK | GIVE | A | K | MIG, IBV_QP_AV | A | K | MIG, K | Q,
	  P | IBV_QP_AV | ASK | A | K | MIG, P | IBV_QP_AV | IBV_QP_TIMEOUT | GIVE | A | K | MIG}},
	{IBV_QPS_SQE, IBV_QPS_RTS, {0}, {[UC] = CUR | A, [UD] = CUR | Q}},
	{IBV_QPS_RESET, IBV_QPS_RESET, {0}, {0}},
	{IBV_QPS_ERR, IBV_QPS_ERR, {0}, {0}},
};

/* From anywhere to the beginning or the end, but for a QP that has not begun: that cannot end. */
static const struct row *find(enum ibv_qp_state from, enum ibv_qp_state to)
{
	static const struct row anytime;

	for (size_t i = 0; i < sizeof(rows) / sizeof(*rows); i++)
		if (rows[i].from == from && rows[i].to == to)
			return &rows[i];
	if (to == IBV_QPS_RESET || (to == IBV_QPS_ERR && from != IBV_QPS_RESET))
		return &anytime;
	return NULL;
}

static struct ibv_context *ctx;
static struct ibv_pd *pd;
static struct ibv_cq *cq;
static struct ibv_xrcd *xrcd;

/* A device without XRC is asked for a domain only where one is needed. */
static void set_up(int type)
{
	struct ibv_xrcd_init_attr attr = {
		.comp_mask = IBV_XRCD_INIT_ATTR_FD | IBV_XRCD_INIT_ATTR_OFLAGS, .fd = -1, .oflags = O_CREAT};

	ctx = tv_open();
	CHECK(pd = ibv_alloc_pd(ctx));
	CHECK(cq = ibv_create_cq(ctx, 64, NULL, NULL, 0));
	if (type == TGT)
		CHECK(xrcd = ibv_open_xrcd(ctx, &attr));
}

static void take_down(void)
{
	if (xrcd)
		CHECK_EQ(ibv_close_xrcd(xrcd), 0);
	xrcd = NULL;
	CHECK_EQ(ibv_destroy_cq(cq), 0);
	CHECK_EQ(ibv_dealloc_pd(pd), 0);
	CHECK_EQ(ibv_close_device(ctx), 0);
}

/* Values that are right in every transition. */
static struct ibv_qp_attr values(const struct ibv_qp *qp, enum ibv_qp_state from, enum ibv_qp_state to)
{
	struct ibv_qp_attr a = {.qp_state = to,
				.cur_qp_state = from,
				.path_mtu = IBV_MTU_1024,
				.path_mig_state = IBV_MIG_MIGRATED,
				.qkey = 0x11111111,
				.port_num = 1,
				.dest_qp_num = qp->qp_num,
				.max_rd_atomic = 2,
				.max_dest_rd_atomic = 2,
				.min_rnr_timer = 12,
				.timeout = 14,
				.retry_cnt = 7,
				.rnr_retry = 7,
				.ah_attr = {.is_global = 1, .port_num = 1, .grh.hop_limit = 64}};
	int index;

	tv_gid(qp->context, &a.ah_attr.grh.dgid, &index);
	a.ah_attr.grh.sgid_index = (uint8_t)index;
	return a;
}

static int modify(struct ibv_qp *qp, enum ibv_qp_state from, enum ibv_qp_state to, int mask)
{
	struct ibv_qp_attr a = values(qp, from, to);

	return ibv_modify_qp(qp, &a, mask);
}

static enum ibv_qp_state state_of(struct ibv_qp *qp)
{
	struct ibv_qp_init_attr init;
	struct ibv_qp_attr a;

	CHECK_EQ(ibv_query_qp(qp, &a, IBV_QP_STATE, &init), 0);
	return a.qp_state;
}

/* Until then it leaves for ERR only. A driver may need a moment to see that there is nothing to drain. */
static void wait_drained(struct ibv_qp *qp)
{
	struct ibv_qp_init_attr init;
	struct ibv_qp_attr a;

	do
		CHECK_EQ(ibv_query_qp(qp, &a, IBV_QP_STATE, &init), 0);
	while (a.sq_draining);
}

static void step(struct ibv_qp *qp, int type, enum ibv_qp_state from, enum ibv_qp_state to)
{
	CHECK_EQ(modify(qp, from, to, IBV_QP_STATE | find(from, to)->need[type]), 0);
}

/* A request without memory of its own: the unacknowledged services know the send queue error state. */
static void break_sending(struct ibv_qp *qp, int type)
{
	struct ibv_sge sge = {.addr = 4096, .length = 8, .lkey = 77};
	struct ibv_send_wr wr = {.sg_list = &sge, .num_sge = 1, .opcode = IBV_WR_SEND}, *bad;
	struct ibv_qp_attr a = values(qp, IBV_QPS_RTS, IBV_QPS_RTS);
	struct ibv_ah *ah = NULL;

	if (type == UD) {
		CHECK(ah = ibv_create_ah(pd, &a.ah_attr));
		wr.wr.ud.ah = ah;
		wr.wr.ud.remote_qpn = qp->qp_num;
	}
	CHECK_EQ(ibv_post_send(qp, &wr, &bad), 0);
	CHECK_EQ(tv_wait(cq).status, IBV_WC_LOC_PROT_ERR);
	if (ah)
		CHECK_EQ(ibv_destroy_ah(ah), 0);
}

/* NULL: its type has no such state. */
static struct ibv_qp *qp_in(int type, enum ibv_qp_state state)
{
	struct ibv_qp_init_attr_ex attr = {.qp_type = type_of[type],
					   .send_cq = cq,
					   .recv_cq = cq,
					   .pd = pd,
					   .xrcd = xrcd,
					   .cap = {1, 1, 1, 1, 0},
					   .comp_mask =
						   type == TGT ? IBV_QP_INIT_ATTR_XRCD : IBV_QP_INIT_ATTR_PD};
	struct ibv_qp *qp;

	if (state == IBV_QPS_SQE && type != UC && type != UD)
		return NULL;
	CHECK(qp = ibv_create_qp_ex(ctx, &attr));
	if (state == IBV_QPS_RESET)
		return qp;
	step(qp, type, IBV_QPS_RESET, IBV_QPS_INIT);
	if (state == IBV_QPS_ERR)
		step(qp, type, IBV_QPS_INIT, IBV_QPS_ERR);
	if (state == IBV_QPS_INIT || state == IBV_QPS_ERR)
		return qp;
	step(qp, type, IBV_QPS_INIT, IBV_QPS_RTR);
	if (state == IBV_QPS_RTR)
		return qp;
	step(qp, type, IBV_QPS_RTR, IBV_QPS_RTS);
	if (state == IBV_QPS_SQE)
		break_sending(qp, type);
	if (state == IBV_QPS_SQD) {
		step(qp, type, IBV_QPS_RTS, IBV_QPS_SQD);
		wait_drained(qp);
	}
	CHECK_EQ(state_of(qp), state);
	return qp;
}

/* *qp is in `from`, and is again afterwards: another one if need be. */
static void attempt(struct ibv_qp **qp, int type, enum ibv_qp_state from, enum ibv_qp_state to, int mask,
		    bool ok)
{
	/* Beyond the last of the base command's attributes a driver that has no more of them is not asked. */
	int refused = mask >= IBV_QP_DEST_QPN << 1 ? EOPNOTSUPP : EINVAL;
	int err = modify(*qp, from, to, mask);

	if (err != (ok ? 0 : refused) || state_of(*qp) != (ok ? to : from)) {
		fprintf(stderr, "type %d, %d to %d, mask %#x: %d, is in %d\n", type_of[type], from, to, mask,
			err, state_of(*qp));
		CHECK(false);
	}
	if (!ok)
		return;
	CHECK_EQ(ibv_destroy_qp(*qp), 0);
	*qp = qp_in(type, from);
}

static void try_all_masks(struct ibv_qp **qp, int type, enum ibv_qp_state from, enum ibv_qp_state to,
			  bool names_state)
{
	const struct row *row = find(from, to);
	int need = row ? row->need[type] : 0, may = row ? row->may[type] : 0;
	/* Without the state bit a QP stays where it is. */
	int base = need | (names_state ? IBV_QP_STATE : 0);

	attempt(qp, type, from, to, base, row != NULL);
	for (int bit = 1; bit <= 1 << 25; bit <<= 1) {
		if (bit == IBV_QP_STATE)
			continue;
		if (base & bit)
			attempt(qp, type, from, to, base & ~bit, passed_over[type] & bit);
		else
			attempt(qp, type, from, to, base | bit, row && (may | passed_over[type]) & bit);
	}
}

static void try_type(int type, bool names_state)
{
	set_up(type);
	for (int from = IBV_QPS_RESET; from <= IBV_QPS_ERR; from++) {
		struct ibv_qp *qp = qp_in(type, (enum ibv_qp_state)from);

		if (!qp)
			continue;
		for (int to = IBV_QPS_RESET; to <= IBV_QPS_ERR; to++)
			if (names_state || from == to)
				try_all_masks(&qp, type, (enum ibv_qp_state)from, (enum ibv_qp_state)to,
					      names_state);
		attempt(&qp, type, (enum ibv_qp_state)from, (enum ibv_qp_state)(IBV_QPS_ERR + 1),
			IBV_QP_STATE, false);
		CHECK_EQ(ibv_destroy_qp(qp), 0);
	}
	take_down();
}

static void rc_takes_what_the_table_says(void)
{
	try_type(RC, true);
}

static void uc_takes_what_the_table_says(void)
{
	try_type(UC, true);
}

static void ud_takes_what_the_table_says(void)
{
	try_type(UD, true);
}

static void xrc_initiators_take_what_the_table_says(void)
{
	try_type(INI, true);
}

static void xrc_targets_take_what_the_table_says(void)
{
	try_type(TGT, true);
}

static void the_table_holds_where_no_state_is_named(void)
{
	for (int type = RC; type <= TGT; type++)
		try_type(type, false);
}

/* Each value that is out of range, where the attribute may be set; the QP stays as it was. */
static void values_out_of_range_are_refused(void)
{
	static const struct {
		enum ibv_qp_state from, to;
		int bit;
		struct ibv_qp_attr bad;
	} cases[] = {
		{IBV_QPS_INIT, IBV_QPS_INIT, P, {.port_num = 0}},
		{IBV_QPS_INIT, IBV_QPS_INIT, P, {.port_num = 2}},
		{IBV_QPS_INIT, IBV_QPS_INIT, K, {.pkey_index = 64}},
		{IBV_QPS_INIT, IBV_QPS_INIT, A, {.qp_access_flags = 1u << 19}},
		{IBV_QPS_INIT, IBV_QPS_INIT, A, {.qp_access_flags = 1u << 31}},
		{IBV_QPS_SQD, IBV_QPS_SQD, IBV_QP_TIMEOUT, {.timeout = 32}},
		{IBV_QPS_SQD, IBV_QPS_SQD, IBV_QP_RETRY_CNT, {.retry_cnt = 8}},
		{IBV_QPS_SQD, IBV_QPS_SQD, IBV_QP_RNR_RETRY, {.rnr_retry = 8}},
		{IBV_QPS_SQD, IBV_QPS_SQD, RNR, {.min_rnr_timer = 32}},
		{IBV_QPS_SQD, IBV_QPS_SQD, IBV_QP_MAX_QP_RD_ATOMIC, {.max_rd_atomic = 129}},
		{IBV_QPS_SQD, IBV_QPS_SQD, IBV_QP_MAX_DEST_RD_ATOMIC, {.max_dest_rd_atomic = 129}},
		{IBV_QPS_SQD, IBV_QPS_SQD, IBV_QP_AV, {.ah_attr = {.is_global = 1, .port_num = 1}}},
		{IBV_QPS_RTS, IBV_QPS_RTS, CUR, {.cur_qp_state = IBV_QPS_SQD}},
		{IBV_QPS_RTS, IBV_QPS_RTS, CUR, {.cur_qp_state = IBV_QPS_ERR + 1}},
	};

	set_up(RC);
	for (size_t i = 0; i < sizeof(cases) / sizeof(*cases); i++) {
		struct ibv_qp *qp = qp_in(RC, cases[i].from);
		struct ibv_qp_attr a = cases[i].bad;

		a.qp_state = cases[i].to;
		if (ibv_modify_qp(qp, &a, IBV_QP_STATE | cases[i].bit) != EINVAL) {
			fprintf(stderr, "case %zu is taken\n", i);
			CHECK(false);
		}
		CHECK_EQ(state_of(qp), cases[i].from);
		CHECK_EQ(ibv_destroy_qp(qp), 0);
	}
	take_down();
}

/* The port of the address is part of it; the kernel looks before the driver does. */
static void an_address_needs_its_port(void)
{
	set_up(RC);
	for (uint8_t port = 0; port < 3; port++) {
		struct ibv_qp *qp = qp_in(RC, IBV_QPS_INIT);
		struct ibv_qp_attr a = values(qp, IBV_QPS_INIT, IBV_QPS_RTR);

		a.ah_attr.port_num = port;
		CHECK_EQ(ibv_modify_qp(qp, &a, IBV_QP_STATE | TO | GIVE), port == 1 ? 0 : EINVAL);
		CHECK_EQ(ibv_destroy_qp(qp), 0);
	}
	take_down();
}

TV_MAIN(T(rc_takes_what_the_table_says), T(uc_takes_what_the_table_says), T(ud_takes_what_the_table_says),
	T(xrc_initiators_take_what_the_table_says), T(xrc_targets_take_what_the_table_says),
	T(the_table_holds_where_no_state_is_named), T(values_out_of_range_are_refused),
	T(an_address_needs_its_port))
