/* SPDX-License-Identifier: BSD-3-Clause */
/* cq.c - completion queues: create, poll, arm, resize, destroy. */
#include "verbs/forward.h"
#include "verbs/mgv.h"

#include <stdlib.h>

/* A program that always finds something polls the network once in so many polls. */
#define BUSY_POLLS 8u

#define STAMPS (IBV_WC_EX_WITH_COMPLETION_TIMESTAMP | IBV_WC_EX_WITH_COMPLETION_TIMESTAMP_WALLCLOCK)
/*
 * Granted at least. Hardware rounds up, too, and there are programs that live by it: perftest's ib_send_lat -e asks for
 * one, takes one after each event, and an event may be the other queue's. An overrun would end its QP.
 */
#define CQE_MIN 16u
#define WC_FLAGS ((uint64_t)(IBV_WC_STANDARD_FLAGS | STAMPS))

static struct mgv_cq *cq_create(struct ibv_context *c, uint32_t cqe, void *cq_context,
				struct ibv_comp_channel *channel, uint32_t comp_vector, bool stamps)
{
	struct mgv_context *ctx = mgv_ctx(c);
	struct mgv_cq *cq = NULL;
	int err = EINVAL;

	if (!cqe || cqe > MG_MAX_CQE || comp_vector >= (uint32_t)c->num_comp_vectors ||
	    (channel && channel->context != c))
		goto err;
	err = ENOMEM;
	cq = calloc(1, sizeof(*cq));
	if (!cq)
		goto err;
	mgv_list_init(&cq->ready);
	cq->dev = ctx->dev;
	mg_device_lock(ctx->dev);
	err = mg_cq_create(ctx->dev->engine, cqe < CQE_MIN ? CQE_MIN : cqe, cq, &cq->mg);
	if (!err && stamps) {
		err = mg_cq_stamp(cq->mg);
		if (err)
			mg_cq_destroy(cq->mg);
	}
	if (!err) {
		cq->ib.handle = mgv_handle(ctx);
		mg_cq_note(cq->mg, channel ? channel->fd : -1, 0);
		cq->ib.cqe = (int)mg_cq_depth(cq->mg);
		mgv_list_add(&ctx->cqs, &cq->link);
	}
	mg_device_unlock(ctx->dev);
	if (err)
		goto err;
	cq->ib.context = c;
	cq->ib.channel = channel;
	cq->ib.cq_context = cq_context;
	pthread_mutex_init(&cq->ib.mutex, NULL);
	pthread_cond_init(&cq->ib.cond, NULL);
	pthread_mutex_init(&cq->poll_lock, NULL);
	mgv_cq_ex_init(cq);
	if (channel) {
		pthread_mutex_lock(&c->mutex);
		channel->refcnt++;
		pthread_mutex_unlock(&c->mutex);
	}
	return cq;
err:
	free(cq);
	errno = err;
	return NULL;
}

MGV_EXPORT struct ibv_cq *ibv_create_cq(struct ibv_context *context, int cqe, void *cq_context,
					struct ibv_comp_channel *channel, int comp_vector)
{
	struct mgv_cq *cq;

	if (!mgv_is_ours(context))
		return MGV_FORWARD_PTR(ibv_create_cq, context, cqe, cq_context, channel, comp_vector);
	if (cqe < 0 || comp_vector < 0) {
		errno = EINVAL;
		return NULL;
	}
	cq = cq_create(context, (uint32_t)cqe, cq_context, channel, (uint32_t)comp_vector, false);
	return cq ? mgv_cq_ib(cq) : NULL;
}

struct ibv_cq_ex *mgv_create_cq_ex(struct ibv_context *c, struct ibv_cq_init_attr_ex *attr)
{
	struct mgv_cq *cq;

	/* IGNORE_OVERRUN would let completions be overwritten: no. SINGLE_THREADED: a hint. */
	if ((attr->comp_mask & ~(uint32_t)(IBV_CQ_INIT_ATTR_MASK_FLAGS | IBV_CQ_INIT_ATTR_MASK_PD)) ||
	    (attr->wc_flags & ~WC_FLAGS) ||
	    ((attr->comp_mask & IBV_CQ_INIT_ATTR_MASK_FLAGS) &&
	     (attr->flags & ~(uint32_t)IBV_CREATE_CQ_ATTR_SINGLE_THREADED))) {
		errno = EOPNOTSUPP;
		return NULL;
	}
	/* The PD must be a parent domain (ibv_create_cq_ex(3)). */
	if ((attr->comp_mask & IBV_CQ_INIT_ATTR_MASK_PD) &&
	    (!attr->parent_domain || attr->parent_domain->context != c ||
	     !mgv_pd(attr->parent_domain)->parent)) {
		errno = EINVAL;
		return NULL;
	}
	cq = cq_create(c, attr->cqe, attr->cq_context, attr->channel, attr->comp_vector,
		       attr->wc_flags & STAMPS);
	return cq ? &cq->ib : NULL;
}

MGV_EXPORT int ibv_resize_cq(struct ibv_cq *ibcq, int cqe)
{
	struct mgv_cq *cq;
	int err;

	if (!mgv_is_ours(ibcq->context))
		return MGV_FORWARD_INT(ibv_resize_cq, ibcq, cqe);
	if (cqe <= 0 || (unsigned)cqe > MG_MAX_CQE)
		return EINVAL;
	cq = mgv_cq(ibcq);
	mg_device_lock(cq->dev);
	err = mg_cq_resize(cq->mg, (uint32_t)cqe);
	if (!err)
		ibcq->cqe = (int)mg_cq_depth(cq->mg);
	mg_device_unlock(cq->dev);
	return err;
}

void mgv_cq_free(struct mgv_cq *cq)
{
	pthread_mutex_destroy(&cq->poll_lock);
	pthread_mutex_destroy(&cq->ib.mutex);
	pthread_cond_destroy(&cq->ib.cond);
	free(cq);
}

MGV_EXPORT int ibv_destroy_cq(struct ibv_cq *ibcq)
{
	struct ibv_comp_channel *channel;
	struct mgv_cq *cq;
	uint32_t comp = 0, async = 0;
	int err;

	if (!mgv_is_ours(ibcq->context))
		return MGV_FORWARD_INT(ibv_destroy_cq, ibcq);
	cq = mgv_cq(ibcq);
	channel = ibcq->channel;
	mg_device_lock(cq->dev);
	err = mg_cq_destroy(cq->mg);
	if (!err) {
		mgv_channel_withdraw(cq);
		mgv_async_withdraw(mgv_ctx(ibcq->context), ibcq);
		mgv_list_del(&cq->link);
		comp = cq->comp_delivered;
		async = cq->async_delivered;
	}
	mg_device_unlock(cq->dev);
	if (err)
		return err;
	/* Somebody may be handling an event of this CQ: wait for the acknowledgements. */
	mgv_wait_acks(&ibcq->mutex, &ibcq->cond, &ibcq->comp_events_completed, comp);
	mgv_wait_acks(&ibcq->mutex, &ibcq->cond, &ibcq->async_events_completed, async);
	if (channel) {
		pthread_mutex_lock(&channel->context->mutex);
		channel->refcnt--;
		pthread_mutex_unlock(&channel->context->mutex);
	}
	mgv_cq_free(cq);
	return 0;
}

int mgv_cq_fetch(struct mgv_cq *cq, int n, struct ibv_wc *wc)
{
	int got = mg_cq_poll(cq->mg, n, wc);

	if (got && ++cq->busy < BUSY_POLLS)
		return got;
	cq->busy = 0;
	mg_net_poll(cq->dev);
	if (!got)
		got = mg_cq_poll(cq->mg, n, wc);
	/*
	 * Who has armed the CQ is about to sleep: its last look at the queue must not keep the
	 * progress thread away, which alone can wake it.
	 */
	if (cq->armed)
		mg_note_sleep(cq->dev);
	return got;
}

int mgv_poll_cq(struct ibv_cq *ibcq, int n, struct ibv_wc *wc)
{
	struct mgv_cq *cq = mgv_cq(ibcq);
	int got;

	if (n <= 0)
		return n ? -1 : 0;
	mg_device_lock(cq->dev);
	got = mgv_cq_fetch(cq, n, wc);
	mg_device_unlock(cq->dev);
	if (!got)
		mg_net_relax(cq->dev);
	return got;
}

int mgv_req_notify_cq(struct ibv_cq *ibcq, int solicited_only)
{
	struct mgv_cq *cq = mgv_cq(ibcq);

	mg_device_lock(cq->dev);
	mg_cq_arm(cq->mg, solicited_only != 0);
	if (ibcq->channel) {
		cq->armed = true;
		mg_note_sleep(cq->dev);
	}
	mg_device_unlock(cq->dev);
	return 0;
}
