/* SPDX-License-Identifier: BSD-3-Clause */
/* query.c - attributes of the device, its port, its GIDs and its P_Key. */
#include "verbs/forward.h"
#include "verbs/mgv.h"

#include <stdio.h>

#define PORT 1u
#define N_PKEY 1
#define N_GID (sizeof(((struct mg_port *)0)->gid) / sizeof(struct mg_addr))
#define MAX_MSG (1u << 31)
#define CAP_FLUSH_GLOBAL (1ull << 38) /* enum ib_uverbs_device_cap_flags, of newer headers */
#define CAP_ATOMIC_WRITE (1ull << 40)

/* libibverbs' driver.h, which is not installed. */
enum ibv_gid_type_sysfs {
	IBV_GID_TYPE_SYSFS_IB_ROCE_V1,
	IBV_GID_TYPE_SYSFS_ROCE_V2,
};
int ibv_query_gid_type(struct ibv_context *context, uint8_t port_num, unsigned int index,
		       enum ibv_gid_type_sysfs *type);

/* ---- device ------------------------------------------------------------------------------------ */

/* Numbers rdma_rxe gives where they mean nothing else; ours where the engine has a limit. */
static void device_attr(struct mg_device *dev, struct ibv_device_attr *a)
{
	struct mg_port port;

	mg_device_port(dev, &port);
	memset(a, 0, sizeof(*a));
	snprintf(a->fw_ver, sizeof(a->fw_ver), "%s", MGV_FW_VER);
	a->node_guid = mgv_guid(port.mac);
	a->sys_image_guid = a->node_guid;
	a->max_mr_size = UINT64_MAX;
	a->page_size_cap = 0xfffff000;
	a->vendor_id = 0xffffff;
	a->max_qp = (1 << 18) - 2; /* a process's id range */
	a->max_qp_wr = MG_MAX_QP_WR;
	a->device_cap_flags = IBV_DEVICE_BAD_QKEY_CNTR | IBV_DEVICE_CURR_QP_STATE_MOD |
			      IBV_DEVICE_SYS_IMAGE_GUID | IBV_DEVICE_RC_RNR_NAK_GEN | IBV_DEVICE_SRQ_RESIZE |
			      IBV_DEVICE_XRC | IBV_DEVICE_PORT_ACTIVE_EVENT | IBV_DEVICE_MEM_WINDOW |
			      IBV_DEVICE_MEM_WINDOW_TYPE_2B | IBV_DEVICE_MEM_MGT_EXTENSIONS;
	a->max_sge = MG_MAX_SGE;
	a->max_sge_rd = MG_MAX_SGE;
	a->max_cq = 1 << 20;
	a->max_cqe = MG_MAX_CQE;
	a->max_mr = 1 << 20;
	a->max_mw = 1 << 20;
	a->max_pd = 1 << 20;
	a->max_srq = 1 << 20;
	a->max_srq_wr = MG_MAX_SRQ_WR;
	a->max_srq_sge = MG_MAX_SGE;
	a->max_qp_rd_atom = MG_MAX_RD_ATOMIC;
	a->max_res_rd_atom = MG_MAX_RD_ATOMIC * 4096;
	a->max_qp_init_rd_atom = MG_MAX_RD_ATOMIC;
	a->atomic_cap = IBV_ATOMIC_HCA;
	a->max_ah = 1 << 20;
	a->max_mcast_grp = MG_MAX_MCAST;
	a->max_mcast_qp_attach = 1 << 16;
	a->max_total_mcast_qp_attach = MG_MAX_MCAST << 16;
	a->max_pkeys = N_PKEY;
	a->local_ca_ack_delay = 15;
	a->phys_port_cnt = PORT;
}

MGV_EXPORT int ibv_query_device(struct ibv_context *context, struct ibv_device_attr *attr)
{
	if (!mgv_is_ours(context))
		return MGV_FORWARD_INT(ibv_query_device, context, attr);
	device_attr(mgv_ctx(context)->dev, attr);
	return 0;
}

int mgv_query_device_ex(struct ibv_context *c, const struct ibv_query_device_ex_input *in,
			struct ibv_device_attr_ex *attr, size_t size)
{
	struct ibv_device_attr_ex full = {.phys_port_cnt_ex = PORT};

	if ((in && in->comp_mask) || size < sizeof(full.orig_attr))
		return EINVAL;
	device_attr(mgv_ctx(c)->dev, &full.orig_attr);
	full.device_cap_flags_ex = full.orig_attr.device_cap_flags | CAP_FLUSH_GLOBAL | CAP_ATOMIC_WRITE;
	full.completion_timestamp_mask = UINT64_MAX;
	full.hca_core_clock = 1000000; /* kHz: mg_now counts ns */
	memset(attr, 0, size);
	memcpy(attr, &full, size < sizeof(full) ? size : sizeof(full));
	return 0;
}

/* The clock of completion timestamps, in ticks as hardware's drivers give it: tv_nsec alone. */
int mgv_query_rt_values(struct ibv_context *c, struct ibv_values_ex *values)
{
	(void)c;
	if (values->comp_mask & ~(uint32_t)IBV_VALUES_MASK_RAW_CLOCK)
		return EINVAL;
	if (values->comp_mask & IBV_VALUES_MASK_RAW_CLOCK)
		values->raw_clock = (struct timespec){.tv_nsec = (long)mg_now()};
	return 0;
}

/* ---- port -------------------------------------------------------------------------------------- */

static enum ibv_mtu mtu_enum(uint32_t bytes)
{
	enum ibv_mtu m = IBV_MTU_256;

	while (m < IBV_MTU_4096 && bytes >= 512u << (m - 1))
		m++;
	return m;
}

/* IBA's link width and speed codes that come nearest from below; 1x 2.5 Gb/s when unknown. */
static void link_speed(uint64_t mbps, uint8_t *width, uint8_t *speed)
{
	static const struct {
		uint64_t mbps;
		uint8_t width, speed;
	} table[] = {
		{400000, 2, 128}, {200000, 2, 64}, {100000, 2, 32}, {56000, 2, 16}, {50000, 1, 64},
		{40000, 2, 4},	  {25000, 1, 32},  {20000, 2, 2},   {10000, 1, 4},  {0, 1, 1},
	};
	unsigned i = 0;

	while (mbps < table[i].mbps)
		i++;
	*width = table[i].width;
	*speed = table[i].speed;
}

uint8_t mgv_phys_state(const struct mg_port *port)
{
	return mg_port_active(port)   ? MGV_PHYS_LINK_UP
	       : port->flags & IFF_UP ? MGV_PHYS_POLLING
				      : MGV_PHYS_DISABLED;
}

int mgv_query_port(struct ibv_context *c, uint8_t port_num, struct ibv_port_attr *attr, size_t len)
{
	struct ibv_port_attr full = {
		.max_mtu = IBV_MTU_4096,
		.gid_tbl_len = N_GID,
		.port_cap_flags = IBV_PORT_CM_SUP | IBV_PORT_IP_BASED_GIDS,
		.max_msg_sz = MAX_MSG,
		.pkey_tbl_len = N_PKEY,
		.max_vl_num = 1,
		.link_layer = IBV_LINK_LAYER_ETHERNET,
		.flags = IBV_QPF_GRH_REQUIRED,
	};
	struct mg_port port;

	if (port_num != PORT)
		return EINVAL;
	mg_device_port(mgv_ctx(c)->dev, &port);
	full.state = mg_port_active(&port) ? IBV_PORT_ACTIVE : IBV_PORT_DOWN;
	full.phys_state = mgv_phys_state(&port);
	full.active_mtu = mtu_enum(port.active_mtu);
	mg_device_lock(mgv_ctx(c)->dev);
	full.qkey_viol_cntr = (uint32_t)mg_counter_get(mgv_ctx(c)->dev->engine, MG_CNT_RX_BAD_QKEY);
	mg_device_unlock(mgv_ctx(c)->dev);
	link_speed(port.link_mbps, &full.active_width, &full.active_speed);
	memset(attr, 0, len);
	memcpy(attr, &full, len < sizeof(full) ? len : sizeof(full));
	return 0;
}

/* The 1.1 entry point knows ibv_port_attr up to and with `flags`. */
#define COMPAT_PORT_LEN offsetof(struct ibv_port_attr, port_cap_flags2)

MGV_EXPORT int ibv_query_port(struct ibv_context *context, uint8_t port_num,
			      struct _compat_ibv_port_attr *port_attr)
{
	if (!mgv_is_ours(context))
		return MGV_FORWARD_INT(ibv_query_port, context, port_num, port_attr);
	return mgv_query_port(context, port_num, (struct ibv_port_attr *)port_attr, COMPAT_PORT_LEN);
}

/* rdma-core >= 61 (not in every header): effective speed in units of 100 Mb/s. */
MGV_EXPORT int mgv_query_port_speed(struct ibv_context *context, uint32_t port_num,
				    uint64_t *speed) __asm__("ibv_query_port_speed");
int mgv_query_port_speed(struct ibv_context *context, uint32_t port_num, uint64_t *speed)
{
	struct mg_port port;

	if (!mgv_is_ours(context)) {
		__typeof__(&mgv_query_port_speed) real =
			MGV_REAL_AS(__typeof__(&mgv_query_port_speed), "ibv_query_port_speed");

		return real ? real(context, port_num, speed) : EOPNOTSUPP;
	}
	if (port_num != PORT)
		return EINVAL;
	mg_device_port(mgv_ctx(context)->dev, &port);
	*speed = port.link_mbps / 100;
	return 0;
}

/* ---- GIDs: all are RoCE v2 --------------------------------------------------------------------- */

static bool gid_is_zero(const struct mg_addr *gid)
{
	static const struct mg_addr zero;

	return memcmp(gid, &zero, sizeof(zero)) == 0;
}

/* 0, EINVAL for an index beyond the table, ENODATA for an empty entry. */
static int gid_entry(struct ibv_context *c, uint32_t port_num, uint32_t index, struct ibv_gid_entry *e)
{
	struct mg_port port;

	if (port_num != PORT || index >= N_GID)
		return EINVAL;
	mg_device_port(mgv_ctx(c)->dev, &port);
	memset(e, 0, sizeof(*e));
	if (index >= port.n_gid || gid_is_zero(&port.gid[index]))
		return ENODATA;
	memcpy(e->gid.raw, port.gid[index].gid, sizeof(e->gid.raw));
	e->gid_index = index;
	e->port_num = port_num;
	e->gid_type = IBV_GID_TYPE_ROCE_V2;
	e->ndev_ifindex = port.ifindex;
	return 0;
}

MGV_EXPORT int _ibv_query_gid_ex(struct ibv_context *context, uint32_t port_num, uint32_t gid_index,
				 struct ibv_gid_entry *entry, uint32_t flags, size_t entry_size)
{
	struct ibv_gid_entry e;
	int err;

	if (!mgv_is_ours(context))
		return MGV_FORWARD_INT(_ibv_query_gid_ex, context, port_num, gid_index, entry, flags,
				       entry_size);
	if (flags || !entry_size) /* there are no flags */
		return EINVAL;
	err = gid_entry(context, port_num, gid_index, &e);
	if (err)
		return err;
	memset(entry, 0, entry_size);
	memcpy(entry, &e, entry_size < sizeof(e) ? entry_size : sizeof(e));
	return 0;
}

MGV_EXPORT ssize_t _ibv_query_gid_table(struct ibv_context *context, struct ibv_gid_entry *entries,
					size_t max_entries, uint32_t flags, size_t entry_size)
{
	uint8_t *out = (uint8_t *)entries;
	struct ibv_gid_entry e;
	size_t n = 0;

	if (!mgv_is_ours(context)) {
		__typeof__(&_ibv_query_gid_table) real = MGV_REAL(_ibv_query_gid_table);

		return real ? real(context, entries, max_entries, flags, entry_size) : -ENOSYS;
	}
	if (flags || !entry_size)
		return -EINVAL;
	for (uint32_t i = 0; i < N_GID; i++) {
		if (gid_entry(context, PORT, i, &e))
			continue;
		if (n == max_entries)
			return -EINVAL;
		memset(out + n * entry_size, 0, entry_size);
		memcpy(out + n * entry_size, &e, entry_size < sizeof(e) ? entry_size : sizeof(e));
		n++;
	}
	return (ssize_t)n;
}

MGV_EXPORT int ibv_query_gid(struct ibv_context *context, uint8_t port_num, int index, union ibv_gid *gid)
{
	struct ibv_gid_entry e;
	int err;

	if (!mgv_is_ours(context))
		return MGV_FORWARD_NEG(ibv_query_gid, context, port_num, index, gid);
	err = index < 0 ? EINVAL : gid_entry(context, port_num, (uint32_t)index, &e);
	if (err && err != ENODATA) {
		errno = err;
		return -1;
	}
	*gid = e.gid; /* an empty entry reads as zeros */
	return 0;
}

MGV_EXPORT int ibv_query_gid_type(struct ibv_context *context, uint8_t port_num, unsigned int index,
				  enum ibv_gid_type_sysfs *type)
{
	if (!mgv_is_ours(context))
		return MGV_FORWARD_NEG(ibv_query_gid_type, context, port_num, index, type);
	if (port_num != PORT || index >= N_GID) {
		errno = EINVAL;
		return -1;
	}
	*type = IBV_GID_TYPE_SYSFS_ROCE_V2;
	return 0;
}

/* ---- P_Key ------------------------------------------------------------------------------------- */

MGV_EXPORT int ibv_query_pkey(struct ibv_context *context, uint8_t port_num, int index, __be16 *pkey)
{
	if (!mgv_is_ours(context))
		return MGV_FORWARD_NEG(ibv_query_pkey, context, port_num, index, pkey);
	if (port_num != PORT || index < 0 || index >= N_PKEY) {
		errno = EINVAL;
		return -1;
	}
	*pkey = 0xffff; /* the same in either byte order */
	return 0;
}

MGV_EXPORT int ibv_get_pkey_index(struct ibv_context *context, uint8_t port_num, __be16 pkey)
{
	if (!mgv_is_ours(context))
		return MGV_FORWARD_NEG(ibv_get_pkey_index, context, port_num, pkey);
	if (port_num == PORT && pkey == 0xffff)
		return 0;
	errno = EINVAL;
	return -1;
}
