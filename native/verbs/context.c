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

	v->query_port = mgv_query_port;
	v->query_device_ex = mgv_query_device_ex;
	v->create_cq_ex = mgv_create_cq_ex;
	v->create_qp_ex = mgv_create_qp_ex;
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
	mgv_list_init(&ctx->cqs);
	mgv_list_init(&ctx->qps);
	mgv_list_init(&ctx->ahs);
	mgv_list_init(&ctx->channels);
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
	c->cmd_fd = -1;
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

#define for_each_safe(pos, head)                                                             \
	for (struct mgv_list *pos = (head)->next, *pos##_n = pos->next; pos != (head);       \
	     pos = pos##_n, pos##_n = pos->next)

/*
 * What the application left behind goes with the context, as the kernel does it when the device
 * file is closed: users before what they use.
 */
static void release_all(struct mgv_context *ctx)
{
	struct mg_device *dev = ctx->dev;

	mg_device_lock(dev);
	mgv_list_del(&ctx->link);
	for_each_safe(l, &ctx->qps) {
		struct mgv_qp *qp = mgv_container(l, struct mgv_qp, link);

		mg_qp_destroy(qp->mg);
		mgv_list_del(&qp->link);
		mgv_qp_free(qp);
	}
	for_each_safe(l, &ctx->cqs) {
		struct mgv_cq *cq = mgv_container(l, struct mgv_cq, link);

		mgv_channel_withdraw(cq);
		mg_cq_destroy(cq->mg);
		mgv_list_del(&cq->link);
		mgv_cq_free(cq);
	}
	for_each_safe(l, &ctx->mrs) {
		struct mgv_mr *mr = mgv_container(l, struct mgv_mr, link);

		mg_mr_destroy(mr->mg);
		mgv_list_del(&mr->link);
		free(mr);
	}
	for_each_safe(l, &ctx->ahs) {
		mgv_list_del(l);
		free(mgv_container(l, struct mgv_ah, link));
	}
	for_each_safe(l, &ctx->pds) {
		struct mgv_pd *pd = mgv_container(l, struct mgv_pd, link);

		if (!pd->parent)
			mg_pd_destroy(pd->mg);
		mgv_list_del(&pd->link);
		free(pd);
	}
	for_each_safe(l, &ctx->channels) {
		struct mgv_channel *ch = mgv_container(l, struct mgv_channel, link);

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

/* Imports name a kernel file descriptor or kernel object handles: never ours. */
MGV_EXPORT struct ibv_context *ibv_import_device(int cmd_fd)
{
	return MGV_FORWARD_PTR(ibv_import_device, cmd_fd);
}
