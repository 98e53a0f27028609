/* SPDX-License-Identifier: BSD-3-Clause */
/* pd.c - protection domains, thread domains, parent domains. */
#include "verbs/forward.h"
#include "verbs/mgv.h"

#include <stdlib.h>

static struct ibv_pd *pd_link(struct mgv_context *ctx, struct mgv_pd *pd)
{
	pd->ib.context = &ctx->v.context;
	pd->ib.handle = mgv_handle(ctx);
	mgv_list_add(&ctx->pds, &pd->link);
	return &pd->ib;
}

MGV_EXPORT struct ibv_pd *ibv_alloc_pd(struct ibv_context *context)
{
	struct mgv_context *ctx;
	struct mgv_pd *pd;

	if (!mgv_is_ours(context))
		return MGV_FORWARD_PTR(ibv_alloc_pd, context);
	ctx = mgv_ctx(context);
	pd = calloc(1, sizeof(*pd));
	if (!pd)
		goto err;
	mg_device_lock(ctx->dev);
	pd->mg = mg_pd_create(ctx->dev->engine);
	if (pd->mg)
		pd_link(ctx, pd);
	mg_device_unlock(ctx->dev);
	if (!pd->mg)
		goto err;
	return &pd->ib;
err:
	free(pd);
	errno = ENOMEM;
	return NULL;
}

MGV_EXPORT int ibv_dealloc_pd(struct ibv_pd *ibpd)
{
	struct mgv_context *ctx;
	struct mgv_pd *pd;
	int err = 0;

	if (!mgv_is_ours(ibpd->context))
		return MGV_FORWARD_INT(ibv_dealloc_pd, ibpd);
	ctx = mgv_ctx(ibpd->context);
	pd = mgv_pd(ibpd);
	mg_device_lock(ctx->dev);
	if (pd->children)
		err = EBUSY;
	else if (pd->parent)
		pd->parent->children--;
	else
		err = mg_pd_destroy(pd->mg);
	if (!err)
		mgv_list_del(&pd->link);
	mg_device_unlock(ctx->dev);
	if (!err)
		free(pd);
	return err;
}

/*
 * A thread domain promises that one thread at a time uses its objects. Our locks are shared with
 * the progress thread and stay, so the promise is accepted and not used.
 */
struct ibv_td *mgv_alloc_td(struct ibv_context *c, struct ibv_td_init_attr *attr)
{
	struct ibv_td *td;

	if (attr->comp_mask) {
		errno = EOPNOTSUPP;
		return NULL;
	}
	td = calloc(1, sizeof(*td));
	if (!td) {
		errno = ENOMEM;
		return NULL;
	}
	td->context = c;
	return td;
}

int mgv_dealloc_td(struct ibv_td *td)
{
	free(td);
	return 0;
}

/* A parent domain is a second name for its PD; custom allocators would have nothing to allocate. */
struct ibv_pd *mgv_alloc_parent_domain(struct ibv_context *c, struct ibv_parent_domain_init_attr *attr)
{
	struct mgv_context *ctx = mgv_ctx(c);
	struct mgv_pd *pd, *parent;

	if (attr->comp_mask & ~(uint32_t)IBV_PARENT_DOMAIN_INIT_ATTR_PD_CONTEXT) {
		errno = EOPNOTSUPP;
		return NULL;
	}
	if (!attr->pd || attr->pd->context != c || (attr->td && attr->td->context != c)) {
		errno = EINVAL;
		return NULL;
	}
	pd = calloc(1, sizeof(*pd));
	if (!pd) {
		errno = ENOMEM;
		return NULL;
	}
	parent = mgv_pd(attr->pd);
	mg_device_lock(ctx->dev);
	if (parent->parent)
		parent = parent->parent;
	pd->parent = parent;
	pd->mg = parent->mg;
	parent->children++;
	pd_link(ctx, pd);
	mg_device_unlock(ctx->dev);
	return &pd->ib;
}

MGV_EXPORT struct ibv_pd *ibv_import_pd(struct ibv_context *context, uint32_t pd_handle)
{
	if (!mgv_is_ours(context))
		return MGV_FORWARD_PTR(ibv_import_pd, context, pd_handle);
	errno = EOPNOTSUPP;
	return NULL;
}

MGV_EXPORT void ibv_unimport_pd(struct ibv_pd *pd)
{
	if (!mgv_is_ours(pd->context))
		MGV_FORWARD_VOID(ibv_unimport_pd, pd);
}
