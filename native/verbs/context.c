/* SPDX-License-Identifier: BSD-3-Clause */
/* context.c - opening and closing our device; the function tables that inline verbs go through. */
#include "verbs/forward.h"
#include "verbs/mgv.h"

#include <stdlib.h>
#include <unistd.h>

uint32_t mgv_handle(struct mgv_context *ctx)
{
	return ++ctx->handles;
}

static void set_ops(struct verbs_context *v)
{
	struct ibv_context_ops *ops = &v->context.ops;

	mgv_ops_defaults(v);

	/* The post-1.0 ABI's leftovers, filled as libibverbs fills them. */
	ops->_compat_query_device = ibv_query_device;
	ops->_compat_query_port = ibv_query_port;

	ops->poll_cq = mgv_poll_cq;
	ops->req_notify_cq = mgv_req_notify_cq;
	ops->post_send = mgv_post_send;
	ops->post_recv = mgv_post_recv;
	ops->alloc_mw = mgv_alloc_mw;
	ops->bind_mw = mgv_bind_mw;
	ops->dealloc_mw = mgv_dealloc_mw;
	ops->post_srq_recv = mgv_post_srq_recv;

	v->query_port = mgv_query_port;
	v->query_device_ex = mgv_query_device_ex;
	v->query_rt_values = mgv_query_rt_values;
	v->create_cq_ex = mgv_create_cq_ex;
	v->create_qp_ex = mgv_create_qp_ex;
	v->open_qp = mgv_open_qp;
	v->create_srq_ex = mgv_create_srq_ex;
	v->get_srq_num = mgv_get_srq_num;
	v->open_xrcd = mgv_open_xrcd;
	v->close_xrcd = mgv_close_xrcd;
	v->alloc_td = mgv_alloc_td;
	v->dealloc_td = mgv_dealloc_td;
	v->alloc_parent_domain = mgv_alloc_parent_domain;
}

static struct ibv_context *open_ours(void)
{
	struct mgv_context *ctx = calloc(1, sizeof(*ctx));
	struct ibv_context *c;
	long cpus = sysconf(_SC_NPROCESSORS_ONLN);
	int err;

	if (!ctx) {
		errno = ENOMEM;
		return NULL;
	}
	c = &ctx->v.context;
	mgv_list_init(&ctx->pds);
	mgv_list_init(&ctx->mrs);
	mgv_list_init(&ctx->mws);
	mgv_list_init(&ctx->cqs);
	mgv_list_init(&ctx->qps);
	mgv_list_init(&ctx->ahs);
	mgv_list_init(&ctx->channels);
	mgv_list_init(&ctx->srqs);
	mgv_list_init(&ctx->xrcds);
	mgv_list_init(&ctx->async);

	err = mgv_sem_open(&ctx->async_sem);
	if (err)
		goto err_free;
	mg_device_set_hooks(&mgv_hooks);
	ctx->dev = mg_device_get();
	if (!ctx->dev) {
		err = errno ? errno : ENODEV;
		goto err_sem;
	}

	c->device = &mgv_device.ib;
	c->cmd_fd = ctx->async_sem.fd; /* no kernel takes commands; programs may still dup it */
	c->async_fd = ctx->async_sem.fd;
	c->num_comp_vectors = cpus > 0 ? (int)cpus : 1;
	c->abi_compat = __VERBS_ABI_IS_EXTENDED;
	pthread_mutex_init(&c->mutex, NULL);
	ctx->v.sz = sizeof(ctx->v);
	set_ops(&ctx->v);

	mg_device_lock(ctx->dev);
	mgv_list_add(&mgv_device.contexts, &ctx->link);
	mg_device_unlock(ctx->dev);
	return c;

err_sem:
	mgv_sem_close(&ctx->async_sem);
err_free:
	free(ctx);
	errno = err;
	return NULL;
}

MGV_EXPORT struct ibv_context *ibv_open_device(struct ibv_device *device)
{
	if (!mgv_is_device(device))
		return MGV_FORWARD_PTR(ibv_open_device, device);
	return open_ours();
}

/* The first of a list whose elements its loop takes away, or NULL. */
#define first(list, type) (mgv_list_empty(list) ? NULL : mgv_container((list)->next, type, link))

/*
 * What the application left behind goes with the context, as the kernel does it when the device
 * file is closed: users before what they use.
 */
static void release_all(struct mgv_context *ctx)
{
	struct mg_device *dev = ctx->dev;
	struct mgv_channel *ch;
	struct mgv_xrcd *xrcd;
	struct mgv_srq *srq;
	struct mgv_qp *qp;
	struct mgv_cq *cq;
	struct mgv_mw *mw;
	struct mgv_mr *mr;
	struct mgv_ah *ah;
	struct mgv_pd *pd;

	mg_device_lock(dev);
	mgv_list_del(&ctx->link);
	while ((qp = first(&ctx->qps, struct mgv_qp))) {
		mg_mcast_detach_all(qp->mg);
		mgv_qp_release(qp);
		mgv_qp_free(qp);
	}
	(void)mg_net_mcast_sync(dev); /* leaves what nobody is in any more */
	while ((srq = first(&ctx->srqs, struct mgv_srq))) {
		mgv_srq_release(srq);
		mgv_srq_free(srq);
	}
	while ((xrcd = first(&ctx->xrcds, struct mgv_xrcd))) {
		mgv_xrcd_release(xrcd);
		free(xrcd);
	}
	while ((cq = first(&ctx->cqs, struct mgv_cq))) {
		mgv_channel_withdraw(cq);
		mg_cq_destroy(cq->mg);
		mgv_list_del(&cq->link);
		mgv_cq_free(cq);
	}
	while ((mw = first(&ctx->mws, struct mgv_mw))) {
		mg_mw_destroy(mw->mg);
		mgv_list_del(&mw->link);
		free(mw);
	}
	while ((mr = first(&ctx->mrs, struct mgv_mr))) {
		mg_mr_destroy(mr->mg);
		mgv_list_del(&mr->link);
		free(mr);
	}
	while ((ah = first(&ctx->ahs, struct mgv_ah)))
		mgv_ah_release(ah);
	while ((pd = first(&ctx->pds, struct mgv_pd))) {
		if (!pd->parent)
			mg_pd_destroy(pd->mg);
		mgv_list_del(&pd->link);
		free(pd);
	}
	while ((ch = first(&ctx->channels, struct mgv_channel))) {
		mgv_list_del(&ch->link);
		mgv_sem_close(&ch->sem);
		free(ch);
	}
	mgv_async_withdraw(ctx, NULL);
	mg_device_unlock(dev);
}

MGV_EXPORT int ibv_close_device(struct ibv_context *context)
{
	struct mgv_context *ctx;

	if (!mgv_is_ours(context))
		return MGV_FORWARD_INT(ibv_close_device, context);
	ctx = mgv_ctx(context);
	release_all(ctx);
	mgv_sem_close(&ctx->async_sem);
	mg_device_put(ctx->dev);
	pthread_mutex_destroy(&context->mutex);
	free(ctx);
	return 0;
}

/* Imports name a kernel file descriptor or kernel object handles: ours cannot be shared so. */
MGV_EXPORT struct ibv_context *ibv_import_device(int cmd_fd)
{
	struct ibv_context *c = MGV_FORWARD_PTR(ibv_import_device, cmd_fd);

	if (!c && (errno == EINVAL || errno == ENOSYS)) /* no real device's: may be our cmd_fd */
		errno = EOPNOTSUPP;
	return c;
}
