/* SPDX-License-Identifier: BSD-3-Clause */
/* The device, its attributes, and the shape of its function tables. */
#include "tv.h"

#include <arpa/inet.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <poll.h>

/* In libibverbs, but not in its installed headers. */
int ibv_query_gid_type(struct ibv_context *context, uint8_t port_num, unsigned int index, int *type);
int ibv_read_sysfs_file(const char *dir, const char *file, char *buf, size_t size);

static void rxe0_is_listed(void)
{
	struct ibv_device *dev, **list = tv_devices(&dev);

	CHECK_EQ(dev->node_type, IBV_NODE_CA);
	CHECK_EQ(dev->transport_type, IBV_TRANSPORT_IB);
	CHECK(!strcmp(ibv_get_device_name(dev), "rxe0"));
	CHECK(!strcmp(dev->name, "rxe0"));
	CHECK(dev->dev_name[0] && dev->dev_path[0] == '/' && dev->ibdev_path[0] == '/');
	CHECK(ibv_get_device_guid(dev) != 0);
	CHECK_EQ(ibv_get_device_index(dev), -1);
	ibv_free_device_list(list);
}

static void the_list_needs_no_count(void)
{
	struct ibv_device **list = ibv_get_device_list(NULL);

	CHECK(list && list[0]);
	ibv_free_device_list(list);
}

/* Providers look behind struct ibv_device for a pointer of their own (mlx5dv_is_supported, ...). */
static void what_follows_the_device_is_zero(void)
{
	struct ibv_device *dev, **list = tv_devices(&dev);
	const uint8_t *p = (const uint8_t *)(dev + 1);

	for (unsigned i = 0; i < 64; i++)
		CHECK_EQ(p[i], 0);
	ibv_free_device_list(list);
}

static void a_device_can_be_opened_twice(void)
{
	struct ibv_context *a = tv_open(), *b = tv_open();
	struct ibv_pd *pa = ibv_alloc_pd(a), *pb;

	CHECK(a != b && pa);
	CHECK(a->async_fd != b->async_fd);
	CHECK_EQ(ibv_dealloc_pd(pa), 0);
	CHECK_EQ(ibv_close_device(a), 0);
	CHECK(pb = ibv_alloc_pd(b));
	CHECK_EQ(ibv_dealloc_pd(pb), 0);
	CHECK_EQ(ibv_close_device(b), 0);
	a = tv_open();
	CHECK_EQ(ibv_close_device(a), 0);
}

/* A program that exits or closes without destroying anything. */
static void closing_takes_what_is_left(void)
{
	struct tv_end a, b;
	struct ibv_context *other = tv_open();
	struct ibv_sge sge;
	struct ibv_send_wr wr;

	tv_pair(&a, &b, &(struct tv_opt){.channel = true});
	CHECK_EQ(ibv_req_notify_cq(b.rcq, 0), 0);
	CHECK_EQ(tv_recv(&b, 1, 0, 64), 0);
	wr = tv_wr(&a, IBV_WR_SEND, 2, &sge, 0, 64);
	CHECK_EQ(tv_post(&a, &wr), 0);
	tv_wait_ok(a.scq, 2);
	CHECK_EQ(ibv_close_device(a.ctx), 0);
	free(a.buf);
	free(b.buf);
	CHECK_EQ(ibv_close_device(other), 0);
}

static void attributes_are_those_of_a_small_rxe(void)
{
	struct ibv_context *ctx = tv_open();
	struct ibv_device_attr attr;
	struct ibv_device_attr_ex ex;

	memset(&attr, 0xa5, sizeof(attr));
	CHECK_EQ(ibv_query_device(ctx, &attr), 0);
	CHECK_EQ(attr.phys_port_cnt, 1);
	CHECK_EQ(attr.vendor_id, 0xffffff);
	CHECK(attr.node_guid == ibv_get_device_guid(ctx->device));
	CHECK(attr.max_qp > 0 && attr.max_qp_wr >= 8192 && attr.max_sge >= 8 && attr.max_cqe >= 65536);
	CHECK(attr.max_qp_rd_atom > 0 && attr.max_qp_init_rd_atom == attr.max_qp_rd_atom);
	CHECK_EQ(attr.max_pkeys, 1);
	CHECK(attr.max_srq >= 960 && attr.max_srq_wr >= 16384 && attr.max_srq_sge >= 8);
	CHECK(attr.device_cap_flags & IBV_DEVICE_SRQ_RESIZE);
	CHECK(attr.device_cap_flags & IBV_DEVICE_BAD_QKEY_CNTR); /* qkey_viol_cntr of the port */
	CHECK(!strcmp(attr.fw_ver, "0.0.0"));
	CHECK_EQ(attr.atomic_cap, IBV_ATOMIC_HCA);
	memset(&ex, 0xa5, sizeof(ex));
	CHECK_EQ(ibv_query_device_ex(ctx, NULL, &ex), 0);
	CHECK(!memcmp(&ex.orig_attr, &attr, sizeof(attr)));
	CHECK_EQ(ex.phys_port_cnt_ex, 1);
	CHECK_EQ(ex.odp_caps.general_caps, 0);
	CHECK(ex.completion_timestamp_mask == UINT64_MAX && ex.hca_core_clock == 1000000);
	CHECK_EQ(ibv_query_device_ex(ctx, &(struct ibv_query_device_ex_input){.comp_mask = 1}, &ex), EINVAL);
	CHECK_EQ(ibv_close_device(ctx), 0);
}

/* What the limits say can be created. */
static void limits_hold(void)
{
	struct ibv_context *ctx = tv_open();
	struct ibv_device_attr attr;
	struct ibv_pd *pd = ibv_alloc_pd(ctx);
	struct ibv_qp_init_attr init = {.qp_type = IBV_QPT_RC};
	struct ibv_qp *qp;
	struct ibv_cq *cq;

	CHECK_EQ(ibv_query_device(ctx, &attr), 0);
	CHECK(cq = ibv_create_cq(ctx, attr.max_cqe, NULL, NULL, 0));
	CHECK(cq->cqe >= attr.max_cqe);
	CHECK_ERRNO(ibv_create_cq(ctx, attr.max_cqe + 1, NULL, NULL, 0), EINVAL);
	init.send_cq = init.recv_cq = cq;
	init.cap = (struct ibv_qp_cap){(unsigned)attr.max_qp_wr, (unsigned)attr.max_qp_wr,
				       (unsigned)attr.max_sge, (unsigned)attr.max_sge, 0};
	CHECK(qp = ibv_create_qp(pd, &init));
	CHECK_EQ(ibv_destroy_qp(qp), 0);
	init.cap.max_send_sge++;
	CHECK_ERRNO(ibv_create_qp(pd, &init), EINVAL);
	init.cap.max_send_sge--;
	init.cap.max_recv_wr++;
	CHECK_ERRNO(ibv_create_qp(pd, &init), EINVAL);
	CHECK_EQ(ibv_destroy_cq(cq), 0);
	CHECK_EQ(ibv_dealloc_pd(pd), 0);
	CHECK_EQ(ibv_close_device(ctx), 0);
}

static void the_port_is_active_ethernet(void)
{
	struct ibv_context *ctx = tv_open();
	struct ibv_port_attr p;

	memset(&p, 0xa5, sizeof(p));
	CHECK_EQ(ibv_query_port(ctx, 1, &p), 0);
	CHECK_EQ(p.state, IBV_PORT_ACTIVE);
	CHECK_EQ(p.phys_state, 5);
	CHECK_EQ(p.link_layer, IBV_LINK_LAYER_ETHERNET);
	CHECK_EQ(p.max_mtu, IBV_MTU_4096);
	CHECK(p.active_mtu >= IBV_MTU_256 && p.active_mtu <= IBV_MTU_4096);
	CHECK(p.gid_tbl_len >= 2);
	CHECK_EQ(p.pkey_tbl_len, 1);
	CHECK_EQ(p.lid, 0);
	CHECK_EQ(p.port_cap_flags2, 0);
	CHECK(p.active_width && p.active_speed);
	CHECK_EQ(ibv_query_port(ctx, 0, &p), EINVAL);
	CHECK_EQ(ibv_query_port(ctx, 2, &p), EINVAL);
	CHECK_EQ(ibv_close_device(ctx), 0);
}

/* Programs are built against shorter and longer versions of struct ibv_port_attr. */
static void port_attributes_fit_any_length(void)
{
	struct ibv_context *ctx = tv_open();
	struct verbs_context *v = verbs_get_ctx(ctx);
	union {
		struct ibv_port_attr p;
		uint8_t raw[256];
	} u;
	size_t flags_end = offsetof(struct ibv_port_attr, port_cap_flags2);

	CHECK(v && v->sz == sizeof(*v));
	memset(&u, 0xa5, sizeof(u));
	CHECK_EQ(v->query_port(ctx, 1, &u.p, flags_end), 0);
	CHECK_EQ(u.p.link_layer, IBV_LINK_LAYER_ETHERNET);
	CHECK_EQ(u.raw[flags_end], 0xa5);
	CHECK_EQ(v->query_port(ctx, 1, &u.p, 200), 0);
	CHECK_EQ(u.p.link_layer, IBV_LINK_LAYER_ETHERNET);
	CHECK_EQ(u.raw[199], 0);
	CHECK_EQ(u.raw[200], 0xa5);
	/* The entry point that inline code does not use any more. */
	memset(&u, 0xa5, sizeof(u));
	CHECK_EQ(ctx->ops._compat_query_port(ctx, 1, (struct _compat_ibv_port_attr *)&u.p), 0);
	CHECK_EQ(u.p.state, IBV_PORT_ACTIVE);
	CHECK_EQ(u.raw[flags_end], 0xa5);
	CHECK_EQ(ibv_close_device(ctx), 0);
}

static void gids_are_roce_v2(void)
{
	static const uint8_t mapped[12] = {[10] = 0xff, [11] = 0xff};
	struct ibv_context *ctx = tv_open();
	struct ibv_gid_entry e, table[64];
	struct ibv_port_attr p;
	union ibv_gid gid;
	ssize_t n;
	int type;

	CHECK_EQ(ibv_query_port(ctx, 1, &p), 0);
	CHECK_EQ(ibv_query_gid_ex(ctx, 1, 1, &e, 0), 0);
	CHECK_EQ(e.gid_type, IBV_GID_TYPE_ROCE_V2);
	CHECK_EQ(e.gid_index, 1);
	CHECK_EQ(e.port_num, 1);
	CHECK(e.ndev_ifindex > 0);
	CHECK(!memcmp(e.gid.raw, mapped, 12));
	CHECK_EQ(ibv_query_gid(ctx, 1, 1, &gid), 0);
	CHECK(!memcmp(&gid, &e.gid, 16));
	CHECK_EQ(ibv_query_gid_type(ctx, 1, 1, &type), 0);
	CHECK_EQ(type, 1); /* RoCE v2 in sysfs's numbers */

	n = ibv_query_gid_table(ctx, table, 64, 0);
	CHECK(n >= 1);
	for (ssize_t i = 0; i < n; i++)
		CHECK_EQ(table[i].gid_type, IBV_GID_TYPE_ROCE_V2);
	CHECK_EQ(ibv_query_gid_table(ctx, table, 0, 0), -EINVAL);
	CHECK_EQ(ibv_query_gid_table(ctx, table, 64, 1), -EINVAL);

	/* Empty entries: zeros from the old call, ENODATA from the new one. */
	memset(&gid, 0xa5, sizeof(gid));
	CHECK_EQ(ibv_query_gid(ctx, 1, p.gid_tbl_len - 1, &gid), 0);
	CHECK(!gid.global.interface_id && !gid.global.subnet_prefix);
	CHECK_EQ(ibv_query_gid_ex(ctx, 1, (uint32_t)p.gid_tbl_len - 1, &e, 0), ENODATA);
	CHECK_EQ(ibv_query_gid(ctx, 1, p.gid_tbl_len, &gid), -1);
	CHECK_EQ(ibv_query_gid(ctx, 1, -1, &gid), -1);
	CHECK_EQ(ibv_query_gid(ctx, 2, 0, &gid), -1);
	CHECK_EQ(ibv_query_gid_ex(ctx, 1, (uint32_t)p.gid_tbl_len, &e, 0), EINVAL);
	CHECK_EQ(ibv_query_gid_ex(ctx, 1, 0, &e, 1), EINVAL);
	CHECK_EQ(ibv_close_device(ctx), 0);
}

static void the_pkey_is_the_default_one(void)
{
	struct ibv_context *ctx = tv_open();
	__be16 pkey;

	CHECK_EQ(ibv_query_pkey(ctx, 1, 0, &pkey), 0);
	CHECK_EQ(pkey, 0xffff);
	CHECK_EQ(ibv_query_pkey(ctx, 1, 1, &pkey), -1);
	CHECK_EQ(ibv_get_pkey_index(ctx, 1, pkey), 0);
	CHECK(ibv_get_pkey_index(ctx, 1, htons(0x1234)) < 0);
	CHECK_EQ(ibv_close_device(ctx), 0);
}

static void sysfs_files_are_answered(void)
{
	struct ibv_device *dev, **list = tv_devices(&dev);
	char buf[64];

	CHECK_EQ(ibv_read_sysfs_file(dev->ibdev_path, "node_type", buf, sizeof(buf)), 5);
	CHECK(!strcmp(buf, "1: CA"));
	CHECK_EQ(ibv_read_sysfs_file(dev->ibdev_path, "fw_ver", buf, sizeof(buf)), 5);
	CHECK(!strcmp(buf, "0.0.0"));
	CHECK(ibv_read_sysfs_file(dev->ibdev_path, "ports/1/gid_attrs/types/1", buf, sizeof(buf)) > 0);
	CHECK(!strcmp(buf, "RoCE v2"));
	CHECK_EQ(ibv_read_sysfs_file(dev->ibdev_path, "ports/1/gids/1", buf, sizeof(buf)), 39);
	CHECK(!strncmp(buf, "0000:0000:0000:0000:0000:ffff:", 30));
	CHECK_EQ(ibv_read_sysfs_file(dev->ibdev_path, "ports/1/gids/1", buf, 39), -1);
	CHECK_EQ(ibv_read_sysfs_file(dev->ibdev_path, "no_such_file", buf, sizeof(buf)), -1);
	CHECK_EQ(ibv_read_sysfs_file(dev->ibdev_path, "ports/1/gids/15", buf, sizeof(buf)), -1);
	/* Other directories are the real function's. */
	CHECK(ibv_read_sysfs_file("/proc/self", "comm", buf, sizeof(buf)) > 0);
	CHECK_EQ(ibv_read_sysfs_file("/nonexistent", "comm", buf, sizeof(buf)), -1);
	ibv_free_device_list(list);
}

/* From context.ops and verbs_context: everything can be called. */
static void no_function_pointer_is_null(void)
{
	struct ibv_context *ctx = tv_open();
	struct verbs_context *v = verbs_get_ctx(ctx);
	size_t skip_priv = offsetof(struct verbs_context, priv),
	       last = offsetof(struct verbs_context, _ABI_placeholder3);

	for (size_t at = 0; at < sizeof(ctx->ops); at += sizeof(void *))
		CHECK(*(void **)((char *)&ctx->ops + at));
	for (size_t at = offsetof(struct verbs_context, query_port); at < last; at += sizeof(void *))
		if (at != skip_priv)
			CHECK(*(void **)((char *)v + at));
	CHECK_EQ(ibv_close_device(ctx), 0);
}

static void what_is_not_there_says_so(void)
{
	struct ibv_context *ctx = tv_open();
	struct ibv_pd *pd = ibv_alloc_pd(ctx);
	struct ibv_srq_init_attr_ex srq = {.comp_mask = IBV_SRQ_INIT_ATTR_TYPE, .srq_type = IBV_SRQT_TM};
	struct ibv_alloc_dm_attr dm = {.length = 64};
	struct ibv_values_ex values = {.comp_mask = IBV_VALUES_MASK_RESERVED};

	CHECK_ERRNO(ibv_create_srq_ex(ctx, &srq), EOPNOTSUPP);
	CHECK_ERRNO(ibv_alloc_dm(ctx, &dm), EOPNOTSUPP);
	CHECK_ERRNO(ibv_alloc_null_mr(pd), EOPNOTSUPP);
	CHECK_ERRNO(ibv_create_counters(ctx, &(struct ibv_counters_init_attr){0}), EOPNOTSUPP);
	CHECK_ERRNO(ibv_reg_dmabuf_mr(pd, 0, 4096, 0, 0, IBV_ACCESS_LOCAL_WRITE), EOPNOTSUPP);
	CHECK_ERRNO(ibv_import_pd(ctx, 1), EOPNOTSUPP);
	CHECK_ERRNO(ibv_import_mr(pd, 1), EOPNOTSUPP);
	CHECK_ERRNO(ibv_import_dm(ctx, 1), EOPNOTSUPP);
	CHECK_EQ(ibv_query_rt_values_ex(ctx, &values), EINVAL);
	CHECK_EQ(ibv_advise_mr(pd, IBV_ADVISE_MR_ADVICE_PREFETCH, 0, NULL, 0), EOPNOTSUPP);
	CHECK_EQ(ibv_dealloc_pd(pd), 0);
	CHECK_EQ(ibv_close_device(ctx), 0);
}

static void fork_init_succeeds(void)
{
	CHECK_EQ(ibv_fork_init(), 0);
}

static void the_async_descriptor_is_quiet(void)
{
	struct ibv_context *ctx = tv_open();
	struct pollfd p = {.fd = ctx->async_fd, .events = POLLIN};
	struct ibv_async_event ev;

	CHECK_EQ(poll(&p, 1, 0), 0);
	CHECK_EQ(fcntl(ctx->async_fd, F_SETFL, fcntl(ctx->async_fd, F_GETFL) | O_NONBLOCK), 0);
	CHECK_EQ(ibv_get_async_event(ctx, &ev), -1);
	CHECK_EQ(errno, EAGAIN);
	CHECK_EQ(ibv_close_device(ctx), 0);
}

/* The ABI's older half of a symbol is not ours to give; the newer one is, also by a handle. */
static void a_handle_gives_what_linking_gives(void)
{
	void *lib = dlopen("libibverbs.so.1", RTLD_NOW | RTLD_NOLOAD);

	CHECK(lib);
	CHECK(dlsym(lib, "ibv_open_device") == (void *)ibv_open_device);
	CHECK(dlvsym(lib, "ibv_open_device", "IBVERBS_1.1") == (void *)ibv_open_device);
	CHECK(dlvsym(lib, "ibv_open_device", "IBVERBS_1.0") != (void *)ibv_open_device);
}

static void address_handles_can_be_made(void)
{
	struct ibv_context *ctx = tv_open();
	struct ibv_pd *pd = ibv_alloc_pd(ctx);
	struct ibv_ah_attr a = {.is_global = 1, .port_num = 1};
	struct ibv_ah *ah;
	union ibv_gid own;
	int index;

	tv_gid(ctx, &own, &index);
	a.grh.dgid = own;
	a.grh.sgid_index = (uint8_t)index;
	CHECK(ah = ibv_create_ah(pd, &a));
	CHECK(ah->context == ctx && ah->pd == pd);
	CHECK_EQ(ibv_destroy_ah(ah), 0);
	a.grh.sgid_index = 200;
	CHECK_ERRNO(ibv_create_ah(pd, &a), EINVAL);
	a.grh.sgid_index = (uint8_t)index;
	a.port_num = 2;
	CHECK_ERRNO(ibv_create_ah(pd, &a), EINVAL);
	a.port_num = 1;
	a.is_global = 0;
	CHECK_ERRNO(ibv_create_ah(pd, &a), EINVAL);
	CHECK_EQ(ibv_dealloc_pd(pd), 0);
	CHECK_EQ(ibv_close_device(ctx), 0);
}

static void a_reply_address_comes_from_a_completion(void)
{
	struct ibv_context *ctx = tv_open();
	struct ibv_wc wc = {.wc_flags = IBV_WC_GRH};
	union {
		struct ibv_grh grh;
		uint8_t raw[40];
	} g = {0};
	struct ibv_ah_attr a;
	union ibv_gid own;
	int index;

	tv_gid(ctx, &own, &index);
	g.raw[20] = 0x45;
	g.raw[21] = 0x20; /* TOS */
	g.raw[28] = 33;	  /* TTL */
	memcpy(g.raw + 32, (const uint8_t[]){10, 1, 2, 3}, 4);
	memcpy(g.raw + 36, own.raw + 12, 4);
	CHECK_EQ(ibv_init_ah_from_wc(ctx, 1, &wc, &g.grh, &a), 0);
	CHECK(a.is_global && a.grh.sgid_index == index && a.grh.traffic_class == 0x20 &&
	      a.grh.hop_limit == 33);
	CHECK(!memcmp(a.grh.dgid.raw + 12, (const uint8_t[]){10, 1, 2, 3}, 4));
	g.raw[39] ^= 1; /* not an address of ours */
	CHECK_EQ(ibv_init_ah_from_wc(ctx, 1, &wc, &g.grh, &a), -1);
	g.raw[20] = 0;
	CHECK_EQ(ibv_init_ah_from_wc(ctx, 1, &wc, &g.grh, &a), -1);
	CHECK_EQ(ibv_close_device(ctx), 0);
}

TV_MAIN(T(rxe0_is_listed), T(the_list_needs_no_count), T(what_follows_the_device_is_zero),
	T(a_device_can_be_opened_twice), T(closing_takes_what_is_left),
	T(attributes_are_those_of_a_small_rxe), T(limits_hold), T(the_port_is_active_ethernet),
	T(port_attributes_fit_any_length), T(gids_are_roce_v2), T(the_pkey_is_the_default_one),
	T(sysfs_files_are_answered), T(no_function_pointer_is_null), T(what_is_not_there_says_so),
	T(fork_init_succeeds), T(the_async_descriptor_is_quiet), T(a_handle_gives_what_linking_gives),
	T(address_handles_can_be_made), T(a_reply_address_comes_from_a_completion))
