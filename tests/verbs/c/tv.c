/* SPDX-License-Identifier: BSD-3-Clause */
/* tv.c - see tv.h. */
#include "tv.h"

#include <time.h>

_Noreturn void tv_fail(const char *file, int line, const char *what, long long got, long long want)
{
	fprintf(stderr, "%s:%d: %s (got %lld, want %lld, errno %d %s)\n", file, line, what, got, want, errno,
		strerror(errno));
	exit(1);
}

int tv_main(int argc, char **argv, const struct tv_test *tests)
{
	if (argc != 2) {
		fprintf(stderr, "usage: %s TEST\n", argv[0]);
		return 2;
	}
	for (const struct tv_test *t = tests; t->name; t++)
		if (!strcmp(t->name, argv[1])) {
			t->run();
			return 0;
		}
	fprintf(stderr, "%s: no test %s\n", argv[0], argv[1]);
	return 2;
}

struct ibv_device **tv_devices(struct ibv_device **ours)
{
	struct ibv_device **list;
	int n;

	list = ibv_get_device_list(&n);
	CHECK(list);
	*ours = NULL;
	for (int i = 0; i < n; i++)
		if (!strcmp(ibv_get_device_name(list[i]), "rxe0"))
			*ours = list[i];
	CHECK(*ours);
	CHECK(!list[n]);
	return list;
}

struct ibv_context *tv_open(void)
{
	struct ibv_device *dev, **list = tv_devices(&dev);
	struct ibv_context *ctx = ibv_open_device(dev);

	CHECK(ctx);
	ibv_free_device_list(list);
	return ctx;
}

void tv_gid(struct ibv_context *ctx, union ibv_gid *gid, int *index)
{
	*index = 1; /* the IPv4 address */
	CHECK_EQ(ibv_query_gid(ctx, 1, *index, gid), 0);
}

static unsigned or (unsigned v, unsigned dflt)
{
	return v ? v : dflt;
}

static uint8_t byte(uint8_t v, uint8_t dflt)
{
	return v == 0xff ? 0 : v ? v : dflt;
}

static int access_of(const struct tv_opt *opt)
{
	return opt->access ? opt->access
			   : IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ;
}

static struct ibv_cq *make_cq(struct tv_end *e, const struct tv_opt *opt)
{
	struct ibv_cq_init_attr_ex attr = {.cqe = or ((unsigned)opt->cqe, 256),
					   .cq_context = e,
					   .channel = e->channel,
					   .wc_flags = IBV_WC_STANDARD_FLAGS | opt->wc_flags};
	struct ibv_cq_ex *ex;

	if (!opt->ex_cq)
		return ibv_create_cq(e->ctx, (int)attr.cqe, e, e->channel, 0);
	ex = ibv_create_cq_ex(e->ctx, &attr);
	return ex ? ibv_cq_ex_to_cq(ex) : NULL;
}

void tv_end_open(struct tv_end *e, struct ibv_context *ctx, const struct tv_opt *opt)
{
	struct ibv_qp_init_attr_ex attr = {
		.qp_context = e,
		.qp_type = IBV_QPT_RC,
		.sq_sig_all = opt->sig_all,
		.cap = {.max_send_wr = or (opt->send_wr, 64),
			.max_recv_wr = or (opt->recv_wr, 64),
			.max_send_sge = or (opt->send_sge, 4),
			.max_recv_sge = or (opt->recv_sge, 4),
			.max_inline_data = opt->inline_data},
		.comp_mask = IBV_QP_INIT_ATTR_PD | (opt->send_ops ? IBV_QP_INIT_ATTR_SEND_OPS_FLAGS : 0),
		.send_ops_flags = opt->send_ops,
	};

	*e = (struct tv_end){.ctx = ctx};
	CHECK(e->pd = ibv_alloc_pd(ctx));
	if (opt->channel)
		CHECK(e->channel = ibv_create_comp_channel(ctx));
	CHECK(e->scq = make_cq(e, opt));
	CHECK(e->rcq = make_cq(e, opt));
	CHECK(e->buf = aligned_alloc(4096, TV_BUF));
	memset(e->buf, 0, TV_BUF);
	CHECK(e->mr = ibv_reg_mr(e->pd, e->buf, TV_BUF, access_of(opt)));
	attr.pd = e->pd;
	attr.send_cq = e->scq;
	attr.recv_cq = e->rcq;
	CHECK(e->qp = ibv_create_qp_ex(ctx, &attr));
}

void tv_to_init(struct ibv_qp *qp, const struct tv_opt *opt)
{
	struct ibv_qp_attr a = {.qp_state = IBV_QPS_INIT,
				.port_num = 1,
				.qp_access_flags =
					(unsigned)access_of(opt) & ~(unsigned)IBV_ACCESS_LOCAL_WRITE};

	CHECK_EQ(ibv_modify_qp(qp, &a, IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS),
		 0);
}

int tv_to_rtr(struct ibv_qp *qp, uint32_t peer, const struct tv_opt *opt)
{
	struct ibv_qp_attr a = {.qp_state = IBV_QPS_RTR,
				.path_mtu = opt->mtu ? opt->mtu : IBV_MTU_1024,
				.dest_qp_num = peer,
				.rq_psn = 0xfffff0, /* wraps soon */
				.max_dest_rd_atomic = 4,
				.min_rnr_timer = byte(opt->min_rnr, 1),
				.ah_attr = {.is_global = 1, .port_num = 1, .grh.hop_limit = 64}};
	int index;

	tv_gid(qp->context, &a.ah_attr.grh.dgid, &index);
	a.ah_attr.grh.sgid_index = (uint8_t)index;
	return ibv_modify_qp(qp, &a,
			     IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
				     IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
}

int tv_to_rts(struct ibv_qp *qp, const struct tv_opt *opt)
{
	struct ibv_qp_attr a = {.qp_state = IBV_QPS_RTS,
				.sq_psn = 0xfffff0,
				.timeout = byte(opt->timeout, 14),
				.retry_cnt = byte(opt->retry_cnt, 7),
				.rnr_retry = byte(opt->rnr_retry, 7),
				.max_rd_atomic = 4};

	return ibv_modify_qp(qp, &a,
			     IBV_QP_STATE | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY |
				     IBV_QP_SQ_PSN | IBV_QP_MAX_QP_RD_ATOMIC);
}

void tv_connect(struct ibv_qp *a, struct ibv_qp *b, const struct tv_opt *opt)
{
	tv_to_init(a, opt);
	tv_to_init(b, opt);
	CHECK_EQ(tv_to_rtr(a, b->qp_num, opt), 0);
	CHECK_EQ(tv_to_rtr(b, a->qp_num, opt), 0);
	CHECK_EQ(tv_to_rts(a, opt), 0);
}

void tv_pair(struct tv_end *a, struct tv_end *b, const struct tv_opt *opt)
{
	struct ibv_context *ctx = tv_open();

	tv_end_open(a, ctx, opt);
	tv_end_open(b, ctx, opt);
	if (opt->unconnected)
		return;
	tv_connect(a->qp, b->qp, opt);
	CHECK_EQ(tv_to_rts(b->qp, opt), 0);
}

void tv_end_close(struct tv_end *e)
{
	CHECK_EQ(ibv_destroy_qp(e->qp), 0);
	CHECK_EQ(ibv_destroy_cq(e->scq), 0);
	CHECK_EQ(ibv_destroy_cq(e->rcq), 0);
	if (e->channel)
		CHECK_EQ(ibv_destroy_comp_channel(e->channel), 0);
	CHECK_EQ(ibv_dereg_mr(e->mr), 0);
	CHECK_EQ(ibv_dealloc_pd(e->pd), 0);
	free(e->buf);
}

void tv_pair_close(struct tv_end *a, struct tv_end *b)
{
	tv_end_close(a);
	tv_end_close(b);
	CHECK_EQ(ibv_close_device(a->ctx), 0);
}

struct ibv_wc tv_wait(struct ibv_cq *cq)
{
	time_t end = time(NULL) + 10;
	struct ibv_wc wc;

	memset(&wc, 0, sizeof(wc));
	while (time(NULL) < end)
		for (int i = 0; i < 1000; i++) {
			int n = ibv_poll_cq(cq, 1, &wc);

			CHECK(n >= 0);
			if (n)
				return wc;
		}
	CHECK(!"a completion within 10 s");
	return wc;
}

void tv_wait_ok(struct ibv_cq *cq, uint64_t wr_id)
{
	struct ibv_wc wc = tv_wait(cq);

	CHECK_EQ(wc.status, IBV_WC_SUCCESS);
	CHECK_EQ(wc.wr_id, wr_id);
}

int tv_recv(struct tv_end *e, uint64_t wr_id, uint32_t off, uint32_t len)
{
	struct ibv_sge sge = {.addr = (uintptr_t)e->buf + off, .length = len, .lkey = e->mr->lkey};
	struct ibv_recv_wr wr = {.wr_id = wr_id, .sg_list = &sge, .num_sge = 1}, *bad;

	return ibv_post_recv(e->qp, &wr, &bad);
}

struct ibv_send_wr tv_wr(struct tv_end *e, enum ibv_wr_opcode op, uint64_t wr_id, struct ibv_sge *sge,
			 uint32_t off, uint32_t len)
{
	*sge = (struct ibv_sge){.addr = (uintptr_t)e->buf + off, .length = len, .lkey = e->mr->lkey};
	return (struct ibv_send_wr){
		.wr_id = wr_id, .sg_list = sge, .num_sge = 1, .opcode = op, .send_flags = IBV_SEND_SIGNALED};
}

int tv_post(struct tv_end *e, struct ibv_send_wr *wr)
{
	struct ibv_send_wr *bad;

	return ibv_post_send(e->qp, wr, &bad);
}

static uint8_t pattern(size_t i, unsigned seed)
{
	return (uint8_t)((i * 2654435761u + seed * 40503u) >> 13);
}

void tv_fill(uint8_t *p, size_t n, unsigned seed)
{
	for (size_t i = 0; i < n; i++)
		p[i] = pattern(i, seed);
}

bool tv_filled(const uint8_t *p, size_t n, unsigned seed)
{
	for (size_t i = 0; i < n; i++)
		if (p[i] != pattern(i, seed))
			return false;
	return true;
}
