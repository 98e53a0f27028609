/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * mw.c - memory windows of type 1 and 2B (IBA 10.6.7): a part of a region opened to peers under a
 * key of its own, and closed again, by work requests.
 *
 * Binding and invalidating are local operations: they take their turn in the send queue, but no
 * PSN. A type 2 window belongs to the QP that bound it.
 */
#include "transport/internal.h"

#include <errno.h>
#include <stdlib.h>

/* LOCAL_WRITE is the region's matter; programs name it all the same, and drivers let it pass. */
#define WINDOW_ACCESS                                                                \
	(IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_REMOTE_WRITE | \
	 IBV_ACCESS_REMOTE_ATOMIC | IBV_ACCESS_ZERO_BASED | IBV_ACCESS_OPTIONAL_RANGE)

int mg_mw_create(struct mg_pd *pd, enum ibv_mw_type type, struct mg_mw **out)
{
	struct mg_engine *e = pd->e;
	struct mg_mw *mw;
	int err;

	if (type != IBV_MW_TYPE_1 && type != IBV_MW_TYPE_2)
		return EINVAL;
	mw = calloc(1, sizeof(*mw));
	if (!mw)
		return ENOMEM;
	*mw = (struct mg_mw){.pd = pd, .type = type};
	mg_key_draw(e, &mw->rkey);
	err = mg_idtab_put(&e->mws, mw->rkey >> 8, mw);
	if (err) {
		free(mw);
		return err;
	}
	pd->refs++;
	*out = mw;
	return 0;
}

static void unbind(struct mg_mw *mw)
{
	if (mw->mr)
		mw->mr->n_mw--;
	mw->mr = NULL;
	mw->qp = NULL;
}

void mg_mw_destroy(struct mg_mw *mw)
{
	unbind(mw);
	mg_idtab_del(&mw->pd->e->mws, mw->rkey >> 8);
	mw->pd->refs--;
	free(mw);
}

uint32_t mg_mw_rkey(const struct mg_mw *mw)
{
	return mw->rkey;
}

void mg_mw_qp_gone(struct mg_qp *qp)
{
	struct mg_mw *mw;

	for (uint32_t it = 0; (mw = mg_idtab_next(&qp->e->mws, &it));)
		if (mw->qp == qp)
			unbind(mw);
}

/* ---- local operations ------------------------------------------------------------------------ */

static bool in_region(const struct mg_mr *mr, uint64_t va, uint64_t len)
{
	return va >= mr->iova && va - mr->iova <= mr->length && len <= mr->length - (va - mr->iova);
}

static int bind(struct mg_qp *qp, const struct mg_swqe *w)
{
	struct mg_mw *mw = mg_idtab_get(&qp->e->mws, w->imm >> 8);
	uint32_t lkey = (uint32_t)w->swap;
	unsigned access = (unsigned)(w->swap >> 32);
	uint64_t length = w->compare_add;
	struct mg_mr *mr = lkey ? mg_mr_find(qp->e, lkey) : NULL;

	if (!mw || mw->pd != qp->pd || w->rkey >> 8 != mw->rkey >> 8) /* C10-72 */
		return EINVAL;
	if (access & ~(unsigned)WINDOW_ACCESS || (length && !mr))
		return EINVAL;
	if (mw->type == IBV_MW_TYPE_1 && access & IBV_ACCESS_ZERO_BASED) /* o10-36.2.2 */
		return EINVAL;
	/* o10-37.2.30, o10-37.2.40: a bound window of type 2 must be invalidated first. */
	if (mw->type == IBV_MW_TYPE_2 && (mw->mr || !length))
		return EINVAL;
	if (length) {
		if (mr->pd != qp->pd || !(mr->access & IBV_ACCESS_MW_BIND)) /* C10-73 */
			return EINVAL;
		if (access & (IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC) && /* C10-74 */
		    !(mr->access & IBV_ACCESS_LOCAL_WRITE))
			return EINVAL;
		if (!in_region(mr, w->remote_addr, length)) /* C10-75 */
			return EINVAL;
	}
	unbind(mw);
	mw->rkey = w->rkey;
	mw->access = access;
	mw->addr = w->remote_addr;
	mw->length = length;
	if (length) {
		mw->mr = mr;
		mr->n_mw++;
		mw->qp = mw->type == IBV_MW_TYPE_2 ? qp : NULL;
	}
	return 0;
}

/* Regions that programs register cannot be invalidated, as with the kernel's driver: only type 2 windows. */
int mg_mw_invalidate(const struct mg_qp *qp, uint32_t rkey)
{
	struct mg_mw *mw = mg_idtab_get(&qp->e->mws, rkey >> 8);

	if (!mw || mw->rkey != rkey || mw->type != IBV_MW_TYPE_2 || !mw->mr || mw->qp != qp)
		return EINVAL;
	unbind(mw);
	return 0;
}

enum ibv_wc_status mg_mw_run(struct mg_qp *qp, const struct mg_swqe *w)
{
	if (w->opcode == IBV_WR_BIND_MW)
		return bind(qp, w) ? IBV_WC_MW_BIND_ERR : IBV_WC_SUCCESS;
	return mg_mw_invalidate(qp, w->rkey) ? IBV_WC_LOC_QP_OP_ERR : IBV_WC_SUCCESS;
}

/* ---- access ---------------------------------------------------------------------------------- */

uint8_t *mg_mw_map(const struct mg_qp *qp, uint32_t rkey, uint64_t va, uint64_t len, unsigned need)
{
	const struct mg_mw *mw = mg_idtab_get(&qp->e->mws, rkey >> 8);
	uint64_t at;

	if (!mw || mw->rkey != rkey || !mw->mr || mw->pd != qp->pd || (mw->access & need) != need ||
	    (mw->type == IBV_MW_TYPE_2 && mw->qp != qp))
		return NULL;
	at = mw->access & IBV_ACCESS_ZERO_BASED ? va : va - mw->addr;
	if ((!(mw->access & IBV_ACCESS_ZERO_BASED) && va < mw->addr) || at > mw->length ||
	    len > mw->length - at)
		return NULL;
	return mw->mr->addr + (mw->addr - mw->mr->iova) + at;
}
