/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * events.c - completion channels and asynchronous events.
 *
 * Programs read events by ibv_get_cq_event / ibv_get_async_event, or poll the descriptor first, or
 * make it non-blocking. The descriptor is an eventfd in semaphore mode (CRIU carries eventfds
 * along) whose value is the length of the queue. Blocking is a plain read(2): restarted after a
 * signal as the handler's SA_RESTART asks, and after a checkpoint in any case.
 */
#include "verbs/forward.h"
#include "verbs/mgv.h"

#include <stdlib.h>
#include <sys/eventfd.h>
#include <poll.h>
#include <sys/uio.h>
#include <unistd.h>

/* ---- the semaphore ------------------------------------------------------------------------------ */

int mgv_sem_open(struct mgv_sem *s)
{
	s->surplus = 0;
	s->fd = eventfd(0, EFD_CLOEXEC | EFD_SEMAPHORE);
	return s->fd < 0 ? errno : 0;
}

void mgv_sem_close(struct mgv_sem *s)
{
	close(s->fd);
	s->fd = -1;
}

void mgv_sem_add(struct mgv_sem *s, uint64_t n)
{
	/* Cannot block: that would take 2^64 events. */
	if (n && write(s->fd, &n, sizeof(n)) != sizeof(n))
		s->surplus = 0;
}

/* Take back up to n, never blocking (the descriptor's own mode is the application's). */
static uint64_t sem_take_back(struct mgv_sem *s, uint64_t n)
{
	uint64_t taken = 0;

	while (taken < n) {
		uint64_t v;
		struct iovec iov = {&v, sizeof(v)};
		ssize_t got = preadv2(s->fd, &iov, 1, -1, RWF_NOWAIT);

		if (got < 0 && errno != EAGAIN && errno != EINTR) { /* a kernel without RWF_NOWAIT here */
			struct pollfd p = {.fd = s->fd, .events = POLLIN};

			got = poll(&p, 1, 0) == 1 ? read(s->fd, &v, sizeof(v)) : -1;
		}
		if (got != sizeof(v))
			break;
		if (v > n - taken) { /* semaphore mode got lost (see sem_taken) */
			mgv_sem_add(s, v - (n - taken));
			v = n - taken;
		}
		taken += v;
	}
	return taken;
}

/*
 * A reader took `v` and fetched one event. v is 1, unless a restore brought the eventfd back
 * without its semaphore flag: then it took all and gives the others back. Once the queue is
 * empty, values that withdrawn events left behind go too.
 */
void mgv_sem_taken(struct mgv_sem *s, uint64_t v, bool empty)
{
	if (v > 1)
		mgv_sem_add(s, v - 1);
	if (empty && s->surplus) {
		sem_take_back(s, UINT32_MAX);
		s->surplus = 0;
	}
}

void mgv_sem_withdraw(struct mgv_sem *s, uint64_t n)
{
	s->surplus += n - sem_take_back(s, n);
}

/* ---- completion events ---------------------------------------------------------------------------- */

/* The engine calls this with the lock held: an armed CQ has something to tell. */
static void on_cq_event(struct mg_cq *mg)
{
	struct mgv_cq *cq = mg_cq_owner(mg);
	struct mgv_channel *ch;

	cq->armed = false;
	if (!cq->ib.channel)
		return;
	ch = mgv_channel(cq->ib.channel);
	if (!cq->pending++)
		mgv_list_add(&ch->cqs, &cq->ready);
	mg_cq_note(mg, ch->ib.fd, cq->pending);
	mgv_sem_add(&ch->sem, 1);
}

void mgv_channel_withdraw(struct mgv_cq *cq)
{
	if (!cq->pending)
		return;
	mgv_sem_withdraw(&mgv_channel(cq->ib.channel)->sem, cq->pending);
	cq->pending = 0; /* the CQ itself may be gone */
	mgv_list_del(&cq->ready);
}

MGV_EXPORT struct ibv_comp_channel *ibv_create_comp_channel(struct ibv_context *context)
{
	struct mgv_context *ctx;
	struct mgv_channel *ch;
	int err;

	if (!mgv_is_ours(context))
		return MGV_FORWARD_PTR(ibv_create_comp_channel, context);
	ctx = mgv_ctx(context);
	ch = calloc(1, sizeof(*ch));
	err = ch ? mgv_sem_open(&ch->sem) : ENOMEM;
	if (err) {
		free(ch);
		errno = err;
		return NULL;
	}
	ch->ib.context = context;
	ch->ib.fd = ch->sem.fd;
	ch->dev = ctx->dev;
	mgv_list_init(&ch->cqs);
	mg_device_lock(ctx->dev);
	mgv_list_add(&ctx->channels, &ch->link);
	mg_device_unlock(ctx->dev);
	return &ch->ib;
}

MGV_EXPORT int ibv_destroy_comp_channel(struct ibv_comp_channel *channel)
{
	struct ibv_context *context = channel->context;
	struct mgv_context *ctx;
	struct mgv_channel *ch;
	int busy;

	if (!mgv_is_ours(context))
		return MGV_FORWARD_INT(ibv_destroy_comp_channel, channel);
	ctx = mgv_ctx(context);
	ch = mgv_channel(channel);
	pthread_mutex_lock(&context->mutex);
	busy = channel->refcnt;
	pthread_mutex_unlock(&context->mutex);
	if (busy)
		return EBUSY;
	mg_device_lock(ctx->dev);
	mgv_list_del(&ch->link);
	mg_device_unlock(ctx->dev);
	mgv_sem_close(&ch->sem);
	free(ch);
	return 0;
}

MGV_EXPORT int ibv_get_cq_event(struct ibv_comp_channel *channel, struct ibv_cq **cq, void **cq_context)
{
	struct mgv_channel *ch;
	struct mgv_cq *head;
	uint64_t v;

	if (!mgv_is_ours(channel->context))
		return MGV_FORWARD_NEG(ibv_get_cq_event, channel, cq, cq_context);
	ch = mgv_channel(channel);
	do {
		if (read(ch->sem.fd, &v, sizeof(v)) != sizeof(v))
			return -1;
		mg_device_lock(ch->dev);
		head = NULL;
		if (!mgv_list_empty(&ch->cqs)) {
			head = mgv_container(ch->cqs.next, struct mgv_cq, ready);
			mgv_list_del(&head->ready);
			if (--head->pending) /* others first */
				mgv_list_add(&ch->cqs, &head->ready);
			head->comp_delivered++;
			mg_cq_note(head->mg, ch->ib.fd, head->pending);
		}
		mgv_sem_taken(&ch->sem, v, mgv_list_empty(&ch->cqs));
		mg_device_unlock(ch->dev);
	} while (!head); /* withdrawn between the two: wait for the next one */
	*cq = mgv_cq_ib(head);
	*cq_context = head->ib.cq_context;
	return 0;
}

MGV_EXPORT void ibv_ack_cq_events(struct ibv_cq *cq, unsigned int nevents)
{
	if (!mgv_is_ours(cq->context)) {
		MGV_FORWARD_VOID(ibv_ack_cq_events, cq, nevents);
		return;
	}
	pthread_mutex_lock(&cq->mutex);
	cq->comp_events_completed += nevents;
	pthread_cond_signal(&cq->cond);
	pthread_mutex_unlock(&cq->mutex);
}

void mgv_wait_acks(pthread_mutex_t *m, pthread_cond_t *c, const uint32_t *completed, uint32_t delivered)
{
	pthread_mutex_lock(m);
	while (*completed != delivered)
		pthread_cond_wait(c, m);
	pthread_mutex_unlock(m);
}

/* ---- asynchronous events ----------------------------------------------------------------------------- */

static bool is_cq_event(enum ibv_event_type t)
{
	return t == IBV_EVENT_CQ_ERR;
}

static bool is_qp_event(enum ibv_event_type t)
{
	switch (t) {
	case IBV_EVENT_QP_FATAL:
	case IBV_EVENT_QP_REQ_ERR:
	case IBV_EVENT_QP_ACCESS_ERR:
	case IBV_EVENT_COMM_EST:
	case IBV_EVENT_SQ_DRAINED:
	case IBV_EVENT_PATH_MIG:
	case IBV_EVENT_PATH_MIG_ERR:
	case IBV_EVENT_QP_LAST_WQE_REACHED: return true;
	default: return false;
	}
}

static bool is_srq_event(enum ibv_event_type t)
{
	return t == IBV_EVENT_SRQ_ERR || t == IBV_EVENT_SRQ_LIMIT_REACHED;
}

static void async_queue(struct mgv_context *ctx, const struct ibv_async_event *ev, uint32_t *delivered)
{
	struct mgv_async *a = malloc(sizeof(*a));

	if (!a) /* an event nobody can be told of, as when the kernel has no memory for it */
		return;
	a->ev = *ev;
	a->delivered = delivered;
	mgv_list_add(&ctx->async, &a->link);
	mgv_sem_add(&ctx->async_sem, 1);
}

static void on_async_event(enum ibv_event_type type, void *object)
{
	struct ibv_async_event ev = {.event_type = type};

	if (is_cq_event(type) && object) {
		struct mgv_cq *cq = mg_cq_owner(object);

		ev.element.cq = mgv_cq_ib(cq);
		async_queue(mgv_ctx(cq->ib.context), &ev, &cq->async_delivered);
	} else if (is_qp_event(type) && object) {
		struct mgv_qp *owner = mg_qp_owner(object), *qp = owner;

		do { /* an XRC target's is told to everybody who has opened it */
			ev.element.qp = &qp->ex.qp_base;
			async_queue(mgv_ctx(qp->ex.qp_base.context), &ev, &qp->async_delivered);
			qp = mgv_container(qp->sharers.next, struct mgv_qp, sharers);
		} while (qp != owner);
	} else if (is_srq_event(type) && object) {
		struct mgv_srq *srq = mg_srq_owner(object);

		ev.element.srq = &srq->ib;
		async_queue(mgv_ctx(srq->ib.context), &ev, &srq->async_delivered);
	} else { /* the port's or the device's: everybody hears it */
		ev.element.port_num = 1;
		for (struct mgv_list *l = mgv_device.contexts.next; l != &mgv_device.contexts; l = l->next)
			async_queue(mgv_container(l, struct mgv_context, link), &ev, NULL);
	}
}

const struct mg_device_hooks mgv_hooks = {.cq_event = on_cq_event, .async_event = on_async_event};

void mgv_async_withdraw(struct mgv_context *ctx, const void *object)
{
	uint64_t n = 0;

	for (struct mgv_list *l = ctx->async.next, *next; l != &ctx->async; l = next) {
		struct mgv_async *a = mgv_container(l, struct mgv_async, link);

		next = l->next;
		if (object && (!a->delivered || (const void *)a->ev.element.qp != object))
			continue;
		mgv_list_del(l);
		free(a);
		n++;
	}
	mgv_sem_withdraw(&ctx->async_sem, n);
}

MGV_EXPORT int ibv_get_async_event(struct ibv_context *context, struct ibv_async_event *event)
{
	struct mgv_context *ctx;
	struct mgv_async *a;
	uint64_t v;

	if (!mgv_is_ours(context))
		return MGV_FORWARD_NEG(ibv_get_async_event, context, event);
	ctx = mgv_ctx(context);
	do {
		if (read(ctx->async_sem.fd, &v, sizeof(v)) != sizeof(v))
			return -1;
		mg_device_lock(ctx->dev);
		a = NULL;
		if (!mgv_list_empty(&ctx->async)) {
			a = mgv_container(ctx->async.next, struct mgv_async, link);
			mgv_list_del(&a->link);
			if (a->delivered)
				++*a->delivered;
		}
		mgv_sem_taken(&ctx->async_sem, v, mgv_list_empty(&ctx->async));
		mg_device_unlock(ctx->dev);
	} while (!a);
	*event = a->ev;
	free(a);
	return 0;
}

MGV_EXPORT void ibv_ack_async_event(struct ibv_async_event *event)
{
	pthread_mutex_t *mutex;
	pthread_cond_t *cond;
	uint32_t *completed;

	if (is_cq_event(event->event_type) && mgv_is_ours(event->element.cq->context)) {
		mutex = &event->element.cq->mutex;
		cond = &event->element.cq->cond;
		completed = &event->element.cq->async_events_completed;
	} else if (is_qp_event(event->event_type) && mgv_is_ours(event->element.qp->context)) {
		mutex = &event->element.qp->mutex;
		cond = &event->element.qp->cond;
		completed = &event->element.qp->events_completed;
	} else if (is_srq_event(event->event_type) && mgv_is_ours(event->element.srq->context)) {
		mutex = &event->element.srq->mutex;
		cond = &event->element.srq->cond;
		completed = &event->element.srq->events_completed;
	} else { /* a real device's, or a port event, which nobody counts */
		MGV_FORWARD_VOID(ibv_ack_async_event, event);
		return;
	}
	pthread_mutex_lock(mutex);
	++*completed;
	pthread_cond_signal(cond);
	pthread_mutex_unlock(mutex);
}
