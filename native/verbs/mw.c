/* SPDX-License-Identifier: BSD-3-Clause */
/* mw.c - memory windows: allocate, bind (type 1 by a call, type 2 by work requests), deallocate. */
#include "verbs/mgv.h"

#include <stdlib.h>

struct ibv_mw *mgv_alloc_mw(struct ibv_pd *ibpd, enum ibv_mw_type type)
{
	struct mgv_context *ctx = mgv_ctx(ibpd->context);
	struct mgv_mw *mw = calloc(1, sizeof(*mw));
	int err = ENOMEM;

	if (!mw)
		goto err;
	mg_device_lock(ctx->dev);
	err = mg_mw_create(mgv_pd(ibpd)->mg, type, &mw->mg);
	if (!err) {
		mw->ib.context = ibpd->context;
		mw->ib.pd = ibpd;
		mw->ib.type = type;
		mw->ib.rkey = mg_mw_rkey(mw->mg);
		mw->ib.handle = mgv_handle(ctx);
		mgv_list_add(&ctx->mws, &mw->link);
	}
	mg_device_unlock(ctx->dev);
	if (!err)
		return &mw->ib;
err:
	free(mw);
	errno = err;
	return NULL;
}

int mgv_dealloc_mw(struct ibv_mw *ibmw)
{
	struct mgv_context *ctx = mgv_ctx(ibmw->context);
	struct mgv_mw *mw = mgv_mw(ibmw);

	mg_device_lock(ctx->dev);
	mg_mw_destroy(mw->mg);
	mgv_list_del(&mw->link);
	mg_device_unlock(ctx->dev);
	free(mw);
	return 0;
}

/* libibverbs has checked the type and the PD. The key changes at once, as ibv_bind_mw(3) says. */
int mgv_bind_mw(struct ibv_qp *qp, struct ibv_mw *mw, struct ibv_mw_bind *bind)
{
	struct ibv_send_wr *bad,
		wr = {.wr_id = bind->wr_id, .opcode = IBV_WR_BIND_MW, .send_flags = bind->send_flags};
	int err;

	if (bind->bind_info.mw_access_flags & IBV_ACCESS_ZERO_BASED)
		return EINVAL;
	wr.bind_mw.mw = mw;
	wr.bind_mw.rkey = ibv_inc_rkey(mw->rkey);
	wr.bind_mw.bind_info = bind->bind_info;
	err = mgv_post_send(qp, &wr, &bad);
	if (!err)
		mw->rkey = wr.bind_mw.rkey;
	return err;
}
