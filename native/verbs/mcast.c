/* SPDX-License-Identifier: BSD-3-Clause */
/* mcast.c - attaching UD QPs to multicast groups. RoCE has no LIDs: that argument is not looked at. */
#include "verbs/forward.h"
#include "verbs/mgv.h"

static struct mg_addr group_of(const union ibv_gid *gid)
{
	struct mg_addr addr;

	memcpy(addr.gid, gid->raw, sizeof(addr.gid));
	return addr;
}

MGV_EXPORT int ibv_attach_mcast(struct ibv_qp *ibqp, const union ibv_gid *gid, uint16_t lid)
{
	struct mg_addr group;
	struct mgv_qp *qp;
	int err;

	if (!mgv_is_ours(ibqp->context))
		return MGV_FORWARD_INT(ibv_attach_mcast, ibqp, gid, lid);
	qp = mgv_qp(ibqp);
	group = group_of(gid);
	mg_device_lock(qp->dev);
	err = mg_mcast_attach(qp->mg, &group);
	if (!err) {
		err = mg_net_mcast_sync(qp->dev);
		if (err) /* the group cannot be joined on this host */
			(void)mg_mcast_detach(qp->mg, &group);
	}
	mg_device_unlock(qp->dev);
	return err;
}

MGV_EXPORT int ibv_detach_mcast(struct ibv_qp *ibqp, const union ibv_gid *gid, uint16_t lid)
{
	struct mg_addr group;
	struct mgv_qp *qp;
	int err;

	if (!mgv_is_ours(ibqp->context))
		return MGV_FORWARD_INT(ibv_detach_mcast, ibqp, gid, lid);
	qp = mgv_qp(ibqp);
	group = group_of(gid);
	mg_device_lock(qp->dev);
	err = mg_mcast_detach(qp->mg, &group);
	(void)mg_net_mcast_sync(qp->dev);
	mg_device_unlock(qp->dev);
	return err;
}
