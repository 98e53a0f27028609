/* SPDX-License-Identifier: BSD-3-Clause */
/* ah.c - address handles, and address attributes from a received message's header. */
#include "verbs/forward.h"
#include "verbs/mgv.h"

#include <arpa/inet.h>
#include <netinet/ip.h>
#include <stdlib.h>

MGV_EXPORT struct ibv_ah *ibv_create_ah(struct ibv_pd *pd, struct ibv_ah_attr *attr)
{
	struct mgv_context *ctx;
	struct mgv_ah *ah;
	struct ibv_ah *ib;
	int err;

	if (!mgv_is_ours(pd->context))
		return MGV_FORWARD_PTR(ibv_create_ah, pd, attr);
	ah = calloc(1, sizeof(*ah));
	if (!ah) {
		errno = ENOMEM;
		return NULL;
	}
	ctx = mgv_ctx(pd->context);
	mg_device_lock(ctx->dev);
	err = mg_ah_create(mgv_pd(pd)->mg, attr, ah, &ah->mg);
	if (!err) {
		ib = mg_ah_ib(ah->mg);
		ib->context = pd->context;
		ib->pd = pd;
		ib->handle = mgv_handle(ctx);
		mgv_list_add(&ctx->ahs, &ah->link);
	}
	mg_device_unlock(ctx->dev);
	if (!err)
		return ib;
	free(ah);
	errno = err;
	return NULL;
}

void mgv_ah_release(struct mgv_ah *ah)
{
	mg_ah_destroy(ah->mg);
	mgv_list_del(&ah->link);
	free(ah);
}

MGV_EXPORT int ibv_destroy_ah(struct ibv_ah *ibah)
{
	struct mg_device *dev;

	if (!mgv_is_ours(ibah->context))
		return MGV_FORWARD_INT(ibv_destroy_ah, ibah);
	dev = mgv_ctx(ibah->context)->dev;
	mg_device_lock(dev);
	mgv_ah_release(mg_ah_owner(mg_ah_of(ibah)));
	mg_device_unlock(dev);
	return 0;
}

static int find_gid(struct ibv_context *c, uint8_t port_num, const union ibv_gid *gid, uint8_t *index)
{
	struct ibv_gid_entry e;
	int err;

	for (unsigned i = 0; i <= UINT8_MAX; i++) {
		err = _ibv_query_gid_ex(c, port_num, i, &e, 0, sizeof(e));
		if (err == EINVAL)
			break;
		if (!err && !memcmp(&e.gid, gid, sizeof(*gid))) {
			*index = (uint8_t)i;
			return 0;
		}
	}
	return ENOENT;
}

static void map_v4(union ibv_gid *gid, const void *v4)
{
	memset(gid, 0, sizeof(*gid));
	gid->raw[10] = gid->raw[11] = 0xff;
	memcpy(gid->raw + 12, v4, 4);
}

/*
 * The 40 bytes in front of a UD message: an IPv6-shaped header, or an IPv4 header in its last 20
 * (told by version 4 there and none in the first byte, IBA annex A17.4.5.1).
 */
static int ah_from_grh(struct ibv_context *c, uint8_t port_num, const struct ibv_grh *grh,
		       struct ibv_ah_attr *attr)
{
	const uint8_t *raw = (const uint8_t *)grh;
	uint32_t vtf = ntohl(grh->version_tclass_flow);
	union ibv_gid local;
	struct iphdr ip4;

	if (vtf >> 28 == 6) {
		attr->grh.dgid = grh->sgid;
		local = grh->dgid;
		attr->grh.flow_label = vtf & 0xfffff;
		attr->grh.traffic_class = (uint8_t)(vtf >> 20);
		attr->grh.hop_limit = grh->hop_limit;
	} else if (raw[20] >> 4 == 4) {
		memcpy(&ip4, raw + 20, sizeof(ip4));
		map_v4(&attr->grh.dgid, &ip4.saddr);
		map_v4(&local, &ip4.daddr);
		attr->grh.traffic_class = ip4.tos;
		attr->grh.hop_limit = ip4.ttl;
	} else {
		return EPROTONOSUPPORT;
	}
	if (mg_gid_multicast(local.raw))
		return EINVAL;
	return find_gid(c, port_num, &local, &attr->grh.sgid_index);
}

MGV_EXPORT int ibv_init_ah_from_wc(struct ibv_context *context, uint8_t port_num, struct ibv_wc *wc,
				   struct ibv_grh *grh, struct ibv_ah_attr *ah_attr)
{
	int err;

	if (!mgv_is_ours(context))
		return MGV_FORWARD_NEG(ibv_init_ah_from_wc, context, port_num, wc, grh, ah_attr);
	memset(ah_attr, 0, sizeof(*ah_attr));
	ah_attr->dlid = wc->slid;
	ah_attr->sl = wc->sl;
	ah_attr->src_path_bits = wc->dlid_path_bits;
	ah_attr->port_num = port_num;
	if (!(wc->wc_flags & IBV_WC_GRH))
		return 0;
	ah_attr->is_global = 1;
	err = ah_from_grh(context, port_num, grh, ah_attr);
	if (!err)
		return 0;
	errno = err;
	return -1;
}

MGV_EXPORT struct ibv_ah *ibv_create_ah_from_wc(struct ibv_pd *pd, struct ibv_wc *wc, struct ibv_grh *grh,
						uint8_t port_num)
{
	struct ibv_ah_attr attr;

	if (!mgv_is_ours(pd->context))
		return MGV_FORWARD_PTR(ibv_create_ah_from_wc, pd, wc, grh, port_num);
	if (ibv_init_ah_from_wc(pd->context, port_num, wc, grh, &attr))
		return NULL;
	return ibv_create_ah(pd, &attr);
}

/* Ethernet addresses are the kernel's business under a UDP socket. */
MGV_EXPORT int ibv_resolve_eth_l2_from_gid(struct ibv_context *context, struct ibv_ah_attr *attr,
					   uint8_t eth_mac[ETHERNET_LL_SIZE], uint16_t *vid)
{
	if (!mgv_is_ours(context))
		return MGV_FORWARD_NEG(ibv_resolve_eth_l2_from_gid, context, attr, eth_mac, vid);
	errno = EOPNOTSUPP;
	return -EOPNOTSUPP;
}
