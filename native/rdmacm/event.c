/* SPDX-License-Identifier: BSD-3-Clause */
/* event.c - event channels: a list of events and an eventfd whose value is its length, as verbs/events.c has it. */
#include "rdmacm/mgc.h"

#include <stdlib.h>
#include <unistd.h>

struct rdma_event_channel *mgc_channel_new(void)
{
	struct mgc_channel *ch = calloc(1, sizeof(*ch));
	int err = ch ? mgv_sem_open(&ch->sem) : ENOMEM;

	if (err) {
		free(ch);
		errno = err;
		return NULL;
	}
	ch->ib.fd = ch->sem.fd;
	mgv_list_init(&ch->events);
	return &ch->ib;
}

void mgc_channel_free(struct rdma_event_channel *channel)
{
	struct mgc_channel *ch = mgc_channel(channel);

	mgv_sem_close(&ch->sem);
	free(ch);
}

MGC_EXPORT struct rdma_event_channel *rdma_create_event_channel(void)
{
	__typeof__(&rdma_create_event_channel) real;

	if (mgc_real()) {
		real = MGV_REAL(rdma_create_event_channel);
		return real ? real() : NULL;
	}
	return mgc_context() ? mgc_channel_new() : NULL;
}

MGC_EXPORT void rdma_destroy_event_channel(struct rdma_event_channel *channel)
{
	MGC_FORWARD_V(rdma_destroy_event_channel, channel);
	mgc_channel_free(channel);
}

/* ---- queueing ---------------------------------------------------------------------------------------------- */

struct mgc_event *mgc_post(struct mgc_id *id, enum rdma_cm_event_type type, int status)
{
	struct mgc_channel *ch = mgc_channel(id->ib.channel);
	struct mgc_event *ev = calloc(1, sizeof(*ev));

	if (!ev)
		return NULL;
	ev->ib.id = &id->ib;
	ev->ib.event = type;
	ev->ib.status = status;
	ev->counted = id;
	if (type == RDMA_CM_EVENT_CONNECT_REQUEST) {
		ev->counted = id->listener;
		ev->ib.listen_id = &id->listener->ib;
	}
	mgv_list_add(&ch->events, &ev->link);
	mgv_sem_add(&ch->sem, 1);
	return ev;
}

void mgc_withdraw_mcast(struct mgc_id *id, const struct mgc_mcast *mc)
{
	struct mgc_channel *ch = mgc_channel(id->ib.channel);

	for (struct mgv_list *l = ch->events.next, *next; l != &ch->events; l = next) {
		struct mgc_event *ev = mgv_container(l, struct mgc_event, link);

		next = l->next;
		if (ev->mcast != mc)
			continue;
		mgv_list_del(&ev->link);
		mgv_sem_withdraw(&ch->sem, 1);
		free(ev);
	}
}

/* The id's events in its channel, one after the other. */
static struct mgc_event *next_of(struct mgc_id *id)
{
	struct mgc_channel *ch = mgc_channel(id->ib.channel);

	for (struct mgv_list *l = ch->events.next; l != &ch->events; l = l->next) {
		struct mgc_event *ev = mgv_container(l, struct mgc_event, link);

		if (ev->counted == id || ev->ib.id == &id->ib)
			return ev;
	}
	return NULL;
}

void mgc_withdraw(struct mgc_id *id)
{
	struct mgc_channel *ch = mgc_channel(id->ib.channel);
	struct mgc_event *ev;

	while ((ev = next_of(id))) {
		struct mgc_id *child = ev->ib.id == &id->ib ? NULL : mgc_id(ev->ib.id);

		mgv_list_del(&ev->link);
		mgv_sem_withdraw(&ch->sem, 1);
		free(ev);
		if (child)
			mgc_drop(child);
	}
}

void mgc_move_events(struct mgc_id *id, struct rdma_event_channel *to)
{
	struct mgc_channel *from = mgc_channel(id->ib.channel), *ch = mgc_channel(to);
	struct mgc_event *ev;

	if (from == ch)
		return;
	while ((ev = next_of(id))) {
		mgv_list_del(&ev->link);
		mgv_sem_withdraw(&from->sem, 1);
		mgv_list_add(&ch->events, &ev->link);
		mgv_sem_add(&ch->sem, 1);
		if (ev->ib.id != &id->ib) /* a request's id comes along */
			ev->ib.id->channel = to;
	}
}

/* ---- fetching ------------------------------------------------------------------------------------------------- */

/* An event was fetched: do what is to be done in the program's thread. */
static void fetched(struct mgc_event *ev)
{
	struct mgc_id *id = mgc_id(ev->ib.id);
	int err;

	if (ev->ib.event == RDMA_CM_EVENT_CONNECT_REQUEST) {
		if (mgc_attach(id)) /* cannot fail: the device is open, its PD was made for the listener's */
			return;
		if (mgc_id(ev->ib.listen_id)->lib.sync)
			rdma_migrate_id(&id->ib, NULL);
	} else if (ev->ib.event == RDMA_CM_EVENT_REJECTED) {
		mgc_qp_error(id);
	} else if (ev->mcast) {
		err = mgc_joined(id, ev->mcast);
		ev->ib.status = -err;
		if (err)
			ev->ib.event = RDMA_CM_EVENT_MULTICAST_ERROR;
	} else if (ev->respond && id->ib.qp) {
		err = mgc_respond(id);
		ev->ib.event = err ? RDMA_CM_EVENT_CONNECT_ERROR : RDMA_CM_EVENT_ESTABLISHED;
		ev->ib.status = -err;
	}
}

static void count(struct mgc_event *ev)
{
	struct mgc_id *id = ev->counted;

	pthread_mutex_lock(&id->mutex);
	id->delivered++;
	if (ev->mcast)
		mgc_mcast_event(ev->mcast, false);
	pthread_mutex_unlock(&id->mutex);
}

MGC_EXPORT int rdma_get_cm_event(struct rdma_event_channel *channel, struct rdma_cm_event **event)
{
	struct ibv_context *verbs;
	struct mgc_event *ev;
	struct mg_device *dev;
	struct mgc_channel *ch;
	uint64_t v;

	MGC_FORWARD(rdma_get_cm_event, channel, event);
	if (!event || !channel)
		return mgc_err(EINVAL);
	ch = mgc_channel(channel);
	verbs = mgc_context();
	if (!verbs)
		return -1;
	dev = mgv_ctx(verbs)->dev;
	do {
		mg_note_sleep(dev);
		if (read(ch->sem.fd, &v, sizeof(v)) != sizeof(v))
			return -1;
		mg_device_lock(dev);
		ev = NULL;
		if (!mgv_list_empty(&ch->events)) {
			ev = mgv_container(ch->events.next, struct mgc_event, link);
			mgv_list_del(&ev->link);
			count(ev);
			if (ev->ib.event == RDMA_CM_EVENT_CONNECT_REQUEST) {
				ev->counted->backlog++;
				mgc_id(ev->ib.id)->listener = NULL;
			}
		}
		mgv_sem_taken(&ch->sem, v, mgv_list_empty(&ch->events));
		mg_device_unlock(dev);
	} while (!ev); /* withdrawn between the two: wait for the next one */
	fetched(ev);
	*event = &ev->ib;
	return 0;
}

/* Of rdma-core 59; not in the headers we may be built with. The real one writes to the channel, which is an eventfd here. */
int rdma_write_cm_event(struct rdma_cm_id *id, enum rdma_cm_event_type event, int status, uint64_t arg);

MGC_EXPORT int rdma_write_cm_event(struct rdma_cm_id *ib, enum rdma_cm_event_type event, int status,
				   uint64_t arg)
{
	struct mgc_event *ev;
	struct mgc_id *id;

	MGC_FORWARD(rdma_write_cm_event, ib, event, status, arg);
	if (!ib || (int)event != MGC_EVENT_USER)
		return mgc_err(EINVAL);
	id = mgc_id(ib);
	mg_device_lock(id->dev);
	ev = mgc_post(id, event, status);
	if (ev)
		memcpy(&ev->ib.param, &arg, sizeof(arg)); /* param.arg */
	mg_device_unlock(id->dev);
	return mgc_err(ev ? 0 : ENOMEM);
}

MGC_EXPORT int rdma_ack_cm_event(struct rdma_cm_event *event)
{
	struct mgc_event *ev;
	struct mgc_id *id;

	MGC_FORWARD(rdma_ack_cm_event, event);
	if (!event)
		return mgc_err(EINVAL);
	ev = mgv_container(event, struct mgc_event, ib);
	id = ev->counted;
	pthread_mutex_lock(&id->mutex);
	id->acked++;
	if (ev->mcast)
		mgc_mcast_event(ev->mcast, true);
	pthread_cond_broadcast(&id->cond); /* one may destroy the id while another leaves a group */
	pthread_mutex_unlock(&id->mutex);
	free(ev);
	return 0;
}

int mgc_complete(struct mgc_id *id)
{
	struct rdma_cm_event *ev;

	if (!id->lib.sync)
		return 0;
	if (id->ib.event) {
		rdma_ack_cm_event(id->ib.event);
		id->ib.event = NULL;
	}
	if (rdma_get_cm_event(id->ib.channel, &id->ib.event))
		return -1;
	ev = id->ib.event;
	if (!ev->status)
		return 0;
	if (ev->event == RDMA_CM_EVENT_REJECTED)
		return mgc_err(ECONNREFUSED);
	return mgc_err(ev->status < 0 ? -ev->status : ev->status);
}
