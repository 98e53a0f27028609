/* SPDX-License-Identifier: BSD-3-Clause */
#include "mgcheck.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>

static void *area(size_t len)
{
	void *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED)
		die("no memory for %zu bytes", len);
	return p;
}

static void *zeroed(size_t n, size_t size)
{
	void *p = calloc(n, size);

	if (!p)
		die("no memory");
	return p;
}

static void choose_gid(struct run *r, const struct ibv_port_attr *port)
{
	static const uint8_t v4[12] = {[10] = 0xff, [11] = 0xff};
	union ibv_gid gid;
	int found = r->opt.gid_index;

	/* The IPv4 one of RoCE v2; where the library cannot tell the versions, the first IPv4 one. */
	for (int pass = 0; pass < 2 && found < 0; pass++) {
		for (int i = 0; i < port->gid_tbl_len && found < 0; i++) {
			struct ibv_gid_entry e;

			if (pass == 0 && !ibv_query_gid_ex(r->ctx, r->opt.ib_port, (uint32_t)i, &e, 0) &&
			    e.gid_type == IBV_GID_TYPE_ROCE_V2 && !memcmp(e.gid.raw, v4, 12))
				found = i;
			if (pass == 1 && !ibv_query_gid(r->ctx, r->opt.ib_port, i, &gid) &&
			    !memcmp(gid.raw, v4, 12))
				found = i;
		}
	}
	r->gid_index = found < 0 ? 0 : found;
	if (ibv_query_gid(r->ctx, r->opt.ib_port, r->gid_index, &gid))
		die("no GID with index %d", r->gid_index);
	memcpy(r->mine.gid, gid.raw, 16);
}

void setup_device(struct run *r)
{
	struct ibv_device **list = ibv_get_device_list(NULL), *dev = NULL;
	struct ibv_device_attr attr;
	struct ibv_port_attr port;

	if (!list)
		die("no list of RDMA devices: %s", strerror(errno));
	for (int i = 0; list[i] && !dev; i++)
		if (!r->opt.device || !strcmp(r->opt.device, ibv_get_device_name(list[i])))
			dev = list[i];
	if (!dev)
		die("no RDMA device %s", r->opt.device ? r->opt.device : "at all");
	r->ctx = ibv_open_device(dev);
	if (!r->ctx)
		die("cannot open %s: %s", ibv_get_device_name(dev), strerror(errno));
	ibv_free_device_list(list);
	if (ibv_query_device(r->ctx, &attr) || ibv_query_port(r->ctx, r->opt.ib_port, &port))
		die("cannot query the device");
	if (port.state != IBV_PORT_ACTIVE)
		die("port %u is not active", r->opt.ib_port);
	r->ethernet = port.link_layer == IBV_LINK_LAYER_ETHERNET;
	r->mine.has_grh = r->ethernet || r->opt.gid_index >= 0;
	r->mine.lid = port.lid;
	r->mine.mtu = 128u << port.active_mtu;
	r->mine.rd_atomic = (uint32_t)(attr.max_qp_rd_atom < 16 ? attr.max_qp_rd_atom : 16);
	choose_gid(r, &port);
	fcntl(r->ctx->async_fd, F_SETFL, fcntl(r->ctx->async_fd, F_GETFL) | O_NONBLOCK);
}

static struct ibv_cq *make_cq(struct run *r, unsigned entries)
{
	struct ibv_cq *cq = ibv_create_cq(r->ctx, (int)entries, NULL, r->channel, 0);

	if (!cq)
		die("cannot create a CQ with %u entries: %s", entries, strerror(errno));
	r->cqs[r->n_cqs++] = cq;
	return cq;
}

/* Not every device has atomics: --ops leaves them out. */
static unsigned atomic_access(const struct run *r)
{
	return r->opt.terms.plan.ops & 1u << K_ATOMIC ? IBV_ACCESS_REMOTE_ATOMIC : 0;
}

static void make_qp(struct run *r, struct conn *c)
{
	struct ibv_qp_init_attr_ex attr = {
		.qp_type = IBV_QPT_RC,
		.send_cq = c->send_cq,
		.recv_cq = c->recv_cq,
		.pd = r->pd,
		.comp_mask = IBV_QP_INIT_ATTR_PD,
		.cap = {.max_send_wr = r->opt.depth,
			.max_recv_wr = r->opt.recv_depth,
			.max_send_sge = MAX_SGE,
			.max_recv_sge = MAX_SGE},
	};

	/* Devices differ in how much they take inline; all take nothing. */
	for (uint32_t n = r->opt.inline_max; !c->qp; n /= 2) {
		attr.cap.max_inline_data = n;
		if (r->opt.new_api) {
			attr.comp_mask |= IBV_QP_INIT_ATTR_SEND_OPS_FLAGS;
			attr.send_ops_flags = IBV_QP_EX_WITH_SEND | IBV_QP_EX_WITH_SEND_WITH_IMM |
					      IBV_QP_EX_WITH_RDMA_WRITE | IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM |
					      IBV_QP_EX_WITH_RDMA_READ;
			if (atomic_access(r))
				attr.send_ops_flags |= IBV_QP_EX_WITH_ATOMIC_CMP_AND_SWP |
						       IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD;
			c->qp = ibv_create_qp_ex(r->ctx, &attr);
		} else {
			struct ibv_qp_init_attr old = {.qp_type = attr.qp_type,
						       .send_cq = attr.send_cq,
						       .recv_cq = attr.recv_cq,
						       .cap = attr.cap};

			c->qp = ibv_create_qp(r->pd, &old);
			attr.cap = old.cap;
		}
		if (!n && !c->qp)
			die("cannot create QP %u: %s", c->index, strerror(errno));
	}
	c->inline_max =
		attr.cap.max_inline_data < r->opt.inline_max ? attr.cap.max_inline_data : r->opt.inline_max;
	if (r->opt.new_api && !(c->qpx = ibv_qp_to_qp_ex(c->qp)))
		die("the device has no ibv_wr_* interface");
}

static struct ibv_mr *reg(struct run *r, void *p, size_t len, int access)
{
	struct ibv_mr *mr = ibv_reg_mr(r->pd, p, len, access);

	if (!mr)
		die("cannot register %zu bytes: %s", len, strerror(errno));
	return mr;
}

static size_t window_size(const struct plan_config *p)
{
	return plan_ring_size(p) + ((p->max_size + 127) & ~63u) + 64;
}

static size_t slot_size(const struct plan_config *p)
{
	return (p->max_size + (MAX_SGE + 2) * GAP + 63) & ~63u;
}

static size_t local_size(struct run *r, struct conn *c)
{
	return c->local_size + r->opt.recv_depth * slot_size(&r->opt.terms.plan) + 64;
}

static void make_memory(struct run *r, struct conn *c)
{
	const struct plan_config *p = &r->opt.terms.plan;
	uint32_t ring = plan_ring_size(p), source = plan_source_size(p);
	uint64_t source_key = plan_source_key(&c->rx);
	uint8_t chunk[4096 + 16];

	c->window = area(window_size(p));
	c->ring = c->window;
	c->scratch = c->ring + ring;
	c->counter = (uint64_t *)(c->window + window_size(p) - 64);
	memset(c->ring, CANARY, c->receives ? ring : 0);

	/* What the peer's READs fetch: the pattern of its stream, so only for streams it sends. */
	c->source = area(source);
	for (uint32_t off = 0; c->receives && off < source; off += 4096) {
		uint32_t n = source - off < 4096 ? source - off : 4096;

		memcpy(c->source + off, pattern(chunk, source_key, off, n), n);
	}

	c->local_size = 6 * ((p->max_size + (MAX_SGE + 2) * GAP + 4095) & ~4095u);
	c->local = area(local_size(r, c));
	c->local_ring = c->local;
	c->recv_area = c->local + c->local_size;
	c->credit_slot = (uint64_t *)(c->recv_area + r->opt.recv_depth * slot_size(p));

	c->window_mr = reg(r, c->window, window_size(p),
			   IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ |
				   (int)atomic_access(r));
	c->source_mr = reg(r, c->source, source, IBV_ACCESS_REMOTE_READ);
	c->local_mr = reg(r, c->local, local_size(r, c), IBV_ACCESS_LOCAL_WRITE);

	for (uint32_t i = 0; i < r->opt.recv_depth; i++)
		c->slots[i].base = c->recv_area + i * slot_size(p);
}

void setup_conns(struct run *r)
{
	struct terms *t = &r->opt.terms;
	bool client = r->opt.server != NULL;
	unsigned sends = r->opt.depth, recvs = r->opt.recv_depth;
	struct ibv_cq *send_cq = NULL, *recv_cq = NULL;

	r->pd = ibv_alloc_pd(r->ctx);
	if (!r->pd)
		die("cannot allocate a PD: %s", strerror(errno));
	if (r->opt.events && !(r->channel = ibv_create_comp_channel(r->ctx)))
		die("cannot create a completion channel: %s", strerror(errno));
	r->conns = zeroed(t->qps, sizeof(*r->conns));
	r->cqs = zeroed(t->qps + 2, sizeof(struct ibv_cq *));
	r->expect = zeroed(1, t->plan.max_size + 64);
	r->gathered = zeroed(1, t->plan.max_size + 64);

	if (r->opt.cq_mode == CQ_SHARED)
		send_cq = recv_cq = make_cq(r, t->qps * (sends + recvs));
	if (r->opt.cq_mode == CQ_SPLIT) {
		send_cq = make_cq(r, t->qps * sends);
		recv_cq = make_cq(r, t->qps * recvs);
	}
	for (unsigned i = 0; i < t->qps; i++) {
		struct conn *c = &r->conns[i];

		c->index = i;
		c->sends = t->directions & (client ? 1 : 2);
		c->receives = t->directions & (client ? 2 : 1);
		plan_init(&c->tx, &t->plan, 2 * i + (client ? 0 : 1));
		plan_init(&c->rx, &t->plan, 2 * i + (client ? 1 : 0));
		c->dice = c->tx.key + 1;
		c->tx_done = !c->sends;
		c->rx_done = !c->receives;
		c->entries = zeroed(r->opt.depth, sizeof(*c->entries));
		c->slots = zeroed(r->opt.recv_depth, sizeof(*c->slots));
		c->rnr_next = t->rnr_every ? t->rnr_every / 2 + i * 13 % (t->rnr_every + 1) : UINT64_MAX;
		make_memory(r, c);
		if (r->opt.cq_mode == CQ_PER_QP)
			send_cq = recv_cq = make_cq(r, sends + recvs);
		c->send_cq = send_cq;
		c->recv_cq = recv_cq;
		make_qp(r, c);
	}
}

static void to_init(struct run *r, struct conn *c)
{
	struct ibv_qp_attr attr = {
		.qp_state = IBV_QPS_INIT,
		.port_num = r->opt.ib_port,
		.qp_access_flags = IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ | atomic_access(r),
	};
	int rc = ibv_modify_qp(c->qp, &attr,
			       IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT | IBV_QP_ACCESS_FLAGS);

	if (rc)
		die("QP %u to INIT: %s", c->index, strerror(rc));
}

static void to_rts(struct run *r, struct conn *c)
{
	uint32_t rd = r->mine.rd_atomic < r->theirs.rd_atomic ? r->mine.rd_atomic : r->theirs.rd_atomic;
	struct ibv_qp_attr attr = {
		.qp_state = IBV_QPS_RTR,
		.path_mtu = (enum ibv_mtu)r->mtu,
		.dest_qp_num = c->theirs.qpn,
		.rq_psn = c->theirs.psn,
		.max_dest_rd_atomic = (uint8_t)rd,
		.min_rnr_timer = 12, /* 0.64 ms */
		.ah_attr = {.dlid = (uint16_t)r->theirs.lid, .port_num = r->opt.ib_port},
	};
	int rc;

	if (r->mine.has_grh) {
		attr.ah_attr.is_global = 1;
		attr.ah_attr.grh.hop_limit = 64;
		attr.ah_attr.grh.sgid_index = (uint8_t)r->gid_index;
		memcpy(attr.ah_attr.grh.dgid.raw, r->theirs.gid, 16);
	}
	rc = ibv_modify_qp(c->qp, &attr,
			   IBV_QP_STATE | IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN |
				   IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
	if (rc)
		die("QP %u to RTR: %s", c->index, strerror(rc));
	attr = (struct ibv_qp_attr){
		.qp_state = IBV_QPS_RTS,
		.sq_psn = c->mine.psn,
		.timeout = 14, /* 67 ms */
		.retry_cnt = 7,
		.rnr_retry = 7, /* for ever */
		.max_rd_atomic = (uint8_t)rd,
	};
	rc = ibv_modify_qp(c->qp, &attr,
			   IBV_QP_STATE | IBV_QP_SQ_PSN | IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT |
				   IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC);
	if (rc)
		die("QP %u to RTS: %s", c->index, strerror(rc));
}

void setup_connect(struct run *r)
{
	struct terms *t = &r->opt.terms;
	size_t len = t->qps * sizeof(struct qp_info);
	struct qp_info *info = zeroed(t->qps, sizeof(*info));
	uint32_t mtu, go = 0;

	for (unsigned i = 0; i < t->qps; i++) {
		struct conn *c = &r->conns[i];
		uint32_t psn = t->first_psn;

		if (psn == UINT32_MAX && getrandom(&psn, sizeof(psn), 0) != sizeof(psn))
			die("no random numbers");
		to_init(r, c);
		post_receives(r, c, 0);
		c->mine = (struct qp_info){
			.qpn = c->qp->qp_num,
			.psn = psn & 0xffffff,
			.window_rkey = c->window_mr->rkey,
			.source_rkey = c->source_mr->rkey,
			.ring = (uintptr_t)c->ring,
			.scratch = (uintptr_t)c->scratch,
			.counter = (uintptr_t)c->counter,
			.source = (uintptr_t)c->source,
		};
		info[i] = c->mine;
	}
	tcp_write(r->tcp, &r->mine, sizeof(r->mine));
	tcp_write(r->tcp, info, len);
	tcp_read(r->tcp, &r->theirs, sizeof(r->theirs));
	tcp_read(r->tcp, info, len);

	mtu = r->mine.mtu < r->theirs.mtu ? r->mine.mtu : r->theirs.mtu;
	if (t->mtu && t->mtu < mtu)
		mtu = t->mtu;
	for (r->mtu = IBV_MTU_256; r->mtu < IBV_MTU_4096 && (256u << r->mtu) <= mtu; r->mtu++)
		;
	for (unsigned i = 0; i < t->qps; i++) {
		r->conns[i].theirs = info[i];
		to_rts(r, &r->conns[i]);
	}
	free(info);
	/* Nobody sends before both are ready. */
	tcp_write(r->tcp, &go, sizeof(go));
	tcp_read(r->tcp, &go, sizeof(go));
}

void teardown(struct run *r)
{
	for (unsigned i = 0; i < r->opt.terms.qps; i++) {
		struct conn *c = &r->conns[i];

		if (ibv_destroy_qp(c->qp))
			wrong(r, "QP %u cannot be destroyed: %s", i, strerror(errno));
		if (ibv_dereg_mr(c->window_mr) || ibv_dereg_mr(c->source_mr) || ibv_dereg_mr(c->local_mr))
			wrong(r, "an MR of QP %u cannot be deregistered: %s", i, strerror(errno));
		munmap(c->window, window_size(&r->opt.terms.plan));
		munmap(c->source, plan_source_size(&r->opt.terms.plan));
		munmap(c->local, local_size(r, c));
		free(c->entries);
		free(c->slots);
	}
	for (unsigned i = 0; i < r->n_cqs; i++)
		if (ibv_destroy_cq(r->cqs[i]))
			wrong(r, "CQ %u cannot be destroyed: %s", i, strerror(errno));
	if (r->channel && ibv_destroy_comp_channel(r->channel))
		wrong(r, "the completion channel cannot be destroyed");
	if (ibv_dealloc_pd(r->pd))
		wrong(r, "the PD cannot be deallocated");
	if (ibv_close_device(r->ctx))
		wrong(r, "the device cannot be closed");
	free(r->conns);
	free(r->cqs);
	free(r->expect);
	free(r->gathered);
}
