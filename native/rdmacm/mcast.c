/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * mcast.c - joining multicast groups by an id. RoCE has no subnet manager that would be asked: the group's
 * GID is its IP address, as in the kernel's cma_iboe_set_mgid. The id's QP is attached when the program
 * fetches the event, in its thread; attaching joins the group on the network (IGMP, MLD).
 */
#include "rdmacm/mgc.h"

#include <stdlib.h>

#define MULTICAST_QPN 0xffffffu

struct mgc_mcast {
	struct mgv_list link; /* in id->groups */
	struct sockaddr_storage addr;
	struct mg_addr mgid;
	void *context;
	bool send_only;
	bool attached;
	uint32_t delivered, acked; /* of its events; id->mutex */
};

static struct mgc_mcast *find(struct mgc_id *id, const struct sockaddr *addr)
{
	for (struct mgv_list *l = id->groups.next; l != &id->groups; l = l->next) {
		struct mgc_mcast *mc = mgv_container(l, struct mgc_mcast, link);

		if (!memcmp(&mc->addr, addr, mgc_len(addr)))
			return mc;
	}
	return NULL;
}

static union ibv_gid ib_gid(const struct mg_addr *addr)
{
	union ibv_gid gid;

	memcpy(gid.raw, addr->gid, sizeof(gid.raw));
	return gid;
}

/* Lock held: the answer that the kernel makes up for RoCE. */
static void post_join(struct mgc_id *id, struct mgc_mcast *mc)
{
	struct mgc_event *ev = mgc_post(id, RDMA_CM_EVENT_MULTICAST_JOIN, 0);
	struct rdma_ud_param *p;
	struct mg_addr own;

	if (!ev)
		return;
	ev->mcast = mc;
	p = &ev->ib.param.ud;
	p->private_data = mc->context;
	p->qp_num = MULTICAST_QPN;
	p->qkey = RDMA_UDP_QKEY;
	mgc_gid_of(&id->ib.route.addr.src_addr, &own);
	p->ah_attr = mgc_ah_attr(id, &own, &mc->mgid);
}

static int join(struct mgc_id *id, const struct sockaddr *addr, bool send_only, void *context)
{
	struct mgc_mcast *mc;
	int err = 0;

	if (!addr || !mgc_len(addr) || !mgc_is_ud(id) || !id->ib.verbs)
		return EINVAL;
	mc = calloc(1, sizeof(*mc));
	if (!mc)
		return ENOMEM;
	memcpy(&mc->addr, addr, mgc_len(addr));
	mgc_gid_of(addr, &mc->mgid);
	mc->context = context;
	mc->send_only = send_only;
	mg_device_lock(id->dev);
	if (id->state != MGC_BOUND && id->state != MGC_ADDR)
		err = EINVAL;
	if (!err) {
		mgv_list_add(&id->groups, &mc->link);
		post_join(id, mc);
	}
	mg_device_unlock(id->dev);
	if (err)
		free(mc);
	return err;
}

int mgc_joined(struct mgc_id *id, struct mgc_mcast *mc)
{
	union ibv_gid gid = ib_gid(&mc->mgid);
	int err;

	if (!id->ib.qp || mc->send_only)
		return 0;
	err = ibv_attach_mcast(id->ib.qp, &gid, 0);
	mc->attached = !err;
	return err;
}

void mgc_mcast_event(struct mgc_mcast *mc, bool acked)
{
	if (acked)
		mc->acked++;
	else
		mc->delivered++;
}

void mgc_leave_all(struct mgc_id *id)
{
	while (!mgv_list_empty(&id->groups)) {
		struct mgc_mcast *mc = mgv_container(id->groups.next, struct mgc_mcast, link);

		mgv_list_del(&mc->link);
		free(mc);
	}
}

MGC_EXPORT int rdma_join_multicast_ex(struct rdma_cm_id *ib, struct rdma_cm_join_mc_attr_ex *attr,
				      void *context)
{
	const uint32_t needed = RDMA_CM_JOIN_MC_ATTR_ADDRESS | RDMA_CM_JOIN_MC_ATTR_JOIN_FLAGS;
	struct mgc_id *id;
	int err;

	MGC_FORWARD(rdma_join_multicast_ex, ib, attr, context);
	id = mgc_id(ib);
	if (!attr)
		return mgc_err(EINVAL);
	if (attr->comp_mask >= RDMA_CM_JOIN_MC_ATTR_RESERVED)
		return mgc_err(ENOTSUP);
	if ((attr->comp_mask & needed) != needed || attr->join_flags >= RDMA_MC_JOIN_FLAG_RESERVED)
		return mgc_err(EINVAL);
	err = join(id, attr->addr, attr->join_flags == RDMA_MC_JOIN_FLAG_SENDONLY_FULLMEMBER, context);
	return err ? mgc_err(err) : mgc_complete(id);
}

MGC_EXPORT int rdma_join_multicast(struct rdma_cm_id *ib, struct sockaddr *addr, void *context)
{
	struct mgc_id *id;
	int err;

	MGC_FORWARD(rdma_join_multicast, ib, addr, context);
	id = mgc_id(ib);
	err = join(id, addr, false, context);
	return err ? mgc_err(err) : mgc_complete(id);
}

MGC_EXPORT int rdma_leave_multicast(struct rdma_cm_id *ib, struct sockaddr *addr)
{
	struct mgc_mcast *mc = NULL;
	struct mgc_id *id;
	union ibv_gid gid;
	int err = 0;

	MGC_FORWARD(rdma_leave_multicast, ib, addr);
	id = mgc_id(ib);
	if (!addr || !mgc_len(addr))
		return mgc_err(EINVAL);
	mg_device_lock(id->dev);
	mc = find(id, addr);
	if (mc) {
		mgv_list_del(&mc->link);
		mgc_withdraw_mcast(id, mc);
	}
	mg_device_unlock(id->dev);
	if (!mc)
		return mgc_err(EADDRNOTAVAIL);
	gid = ib_gid(&mc->mgid);
	if (id->ib.qp && mc->attached)
		err = ibv_detach_mcast(id->ib.qp, &gid, 0);
	if (id->lib.sync && ib->event && mgv_container(ib->event, struct mgc_event, ib)->mcast == mc) {
		rdma_ack_cm_event(ib->event);
		ib->event = NULL;
	}
	pthread_mutex_lock(&id->mutex);
	while (mc->acked != mc->delivered)
		pthread_cond_wait(&id->cond, &id->mutex);
	pthread_mutex_unlock(&id->mutex);
	free(mc);
	return mgc_err(err);
}
