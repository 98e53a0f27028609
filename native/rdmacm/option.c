/* SPDX-License-Identifier: BSD-3-Clause */
/* option.c - rdma_set_option, ECE. */
#include "rdmacm/mgc.h"

static int set_id_option(struct mgc_id *id, int name, const void *val, size_t len)
{
	int on = 0;

	switch (name) {
	case RDMA_OPTION_ID_TOS:
	case RDMA_OPTION_ID_ACK_TIMEOUT:
		if (len != sizeof(uint8_t))
			return EINVAL;
		if (name == RDMA_OPTION_ID_TOS)
			id->tos = *(const uint8_t *)val;
		else if (*(const uint8_t *)val > 31)
			return EINVAL;
		else
			id->ack_timeout = *(const uint8_t *)val;
		return 0;
	case RDMA_OPTION_ID_REUSEADDR:
	case RDMA_OPTION_ID_AFONLY:
		if (len != sizeof(int))
			return EINVAL;
		memcpy(&on, val, sizeof(on));
		/* Where a port is listened on it is too late; the kernel's rules (rdma_set_reuseaddr, _afonly). */
		if (id->state != MGC_IDLE &&
		    (name == RDMA_OPTION_ID_AFONLY ? id->state != MGC_BOUND : !on || id->state == MGC_LISTEN))
			return EINVAL;
		if (name == RDMA_OPTION_ID_REUSEADDR) {
			id->reuse = on != 0;
		} else {
			id->only = on != 0;
			id->only_set = true;
		}
		mg_device_lock(id->dev);
		mgc_reclaim(id, false);
		mg_device_unlock(id->dev);
		return 0;
	default: return ENOSYS;
	}
}

MGC_EXPORT int rdma_set_option(struct rdma_cm_id *ib, int level, int optname, void *optval, size_t optlen)
{
	MGC_FORWARD(rdma_set_option, ib, level, optname, optval, optlen);
	if (!optval)
		return mgc_err(EINVAL);
	if (level != RDMA_OPTION_ID) /* an IB path is for InfiniBand's subnet manager */
		return mgc_err(ENOSYS);
	return mgc_err(set_id_option(mgc_id(ib), optname, optval, optlen));
}

/* Enhanced connection establishment is between adapters of one vendor; we offer nothing, as rxe. */
MGC_EXPORT int rdma_set_local_ece(struct rdma_cm_id *ib, struct ibv_ece *ece)
{
	MGC_FORWARD(rdma_set_local_ece, ib, ece);
	return ece && ece->vendor_id ? mgc_err(EINVAL) : 0;
}

MGC_EXPORT int rdma_get_remote_ece(struct rdma_cm_id *ib, struct ibv_ece *ece)
{
	MGC_FORWARD(rdma_get_remote_ece, ib, ece);
	if (!ece)
		return mgc_err(EINVAL);
	memset(ece, 0, sizeof(*ece));
	return 0;
}
