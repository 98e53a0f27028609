/* SPDX-License-Identifier: BSD-3-Clause */
/* id.c - the process's device as the connection manager sees it; making and ending ids. */
#include "rdmacm/mgc.h"

#include <infiniband/sa.h>
#include <stdlib.h>
#include <sys/random.h>
#include <unistd.h>

static struct {
	pthread_mutex_t lock;
	struct ibv_context *verbs; /* stays open, as in the real library */
	struct ibv_pd *pd;
	int real; /* 0 not looked yet, 1 ours, 2 the real library's */
} cma = {.lock = PTHREAD_MUTEX_INITIALIZER};

struct mgv_list mgc_ids = {&mgc_ids, &mgc_ids};

static bool real_devices(void)
{
	__typeof__(&ibv_get_device_list) get = MGV_REAL(ibv_get_device_list);
	struct ibv_device **list;
	int n = 0;

	if (access("/dev/infiniband/rdma_cm", R_OK | W_OK))
		return false;
	list = get ? get(&n) : NULL;
	if (list)
		MGV_FORWARD_VOID(ibv_free_device_list, list);
	return n > 0;
}

bool mgc_real(void)
{
	const char *env;

	pthread_mutex_lock(&cma.lock);
	if (!cma.real) {
		env = getenv("MIGROCE_CM");
		cma.real = !(env && *env == '1') && real_devices() ? 2 : 1;
	}
	pthread_mutex_unlock(&cma.lock);
	return cma.real == 2;
}

struct ibv_context *mgc_context(void)
{
	pthread_mutex_lock(&cma.lock);
	if (cma.verbs && mgv_ctx(cma.verbs)->dev->forked) { /* a child's copy of its parent's */
		cma.verbs = NULL;
		cma.pd = NULL;
		mgv_list_init(&mgc_ids);
	}
	if (!cma.verbs) {
		/* Gives our device its name. */
		struct ibv_device **list = ibv_get_device_list(NULL);

		if (list)
			ibv_free_device_list(list);
		mg_device_set_cm_hook(mgc_on_event);
		cma.verbs = list ? ibv_open_device(&mgv_device.ib) : NULL;
		if (!list)
			errno = ENODEV;
	}
	pthread_mutex_unlock(&cma.lock);
	return cma.verbs;
}

struct ibv_pd *mgc_pd(void)
{
	struct ibv_context *verbs = mgc_context();

	if (!verbs)
		return NULL;
	pthread_mutex_lock(&cma.lock);
	if (!cma.pd)
		cma.pd = ibv_alloc_pd(verbs);
	pthread_mutex_unlock(&cma.lock);
	return cma.pd;
}

MGC_EXPORT struct ibv_context **rdma_get_devices(int *num_devices)
{
	struct ibv_context **list, *verbs;

	MGC_FORWARD_P(rdma_get_devices, num_devices);
	verbs = mgc_context();
	list = verbs ? calloc(2, sizeof(*list)) : NULL;
	if (list)
		list[0] = verbs;
	if (num_devices)
		*num_devices = list ? 1 : 0;
	return list;
}

MGC_EXPORT void rdma_free_devices(struct ibv_context **list)
{
	MGC_FORWARD_V(rdma_free_devices, list);
	free(list);
}

/* ---- ids ------------------------------------------------------------------------------------------------ */

static struct mgc_id *alloc_id(struct mg_device *dev, void *context, enum rdma_port_space ps,
			       enum ibv_qp_type type)
{
	struct mgc_id *id = calloc(1, sizeof(*id));

	if (!id)
		return NULL;
	/* From the beginning: a program may bring its own QP to RTS before it accepts. */
	if (getrandom(&id->psn, sizeof(id->psn), 0) != sizeof(id->psn))
		id->psn = (uint32_t)mg_now(); /* only to be different from the last one's */
	id->psn &= 0xffffff;
	id->dev = dev;
	id->ib.context = context;
	id->ib.ps = ps;
	id->ib.qp_type = type;
	pthread_mutex_init(&id->mutex, NULL);
	pthread_cond_init(&id->cond, NULL);
	mgv_list_init(&id->link);
	mgv_list_init(&id->groups);
	return id;
}

static void free_id(struct mgc_id *id)
{
	mgc_leave_all(id);
	rdma_freeaddrinfo(id->resolved);
	pthread_mutex_destroy(&id->mutex);
	pthread_cond_destroy(&id->cond);
	free(id->ib.route.path_rec);
	free(id->ep_attr);
	free(id->ep_private);
	free(id);
}

struct mgc_id *mgc_new(struct rdma_event_channel *channel, void *context, enum rdma_port_space ps,
		       enum ibv_qp_type type)
{
	struct ibv_context *verbs = mgc_context();
	struct mgc_id *id;

	if (!verbs)
		return NULL;
	id = alloc_id(mgv_ctx(verbs)->dev, context, ps, type);
	if (!id) {
		errno = ENOMEM;
		return NULL;
	}
	id->lib.sync = !channel;
	id->ib.channel = channel ? channel : mgc_channel_new();
	if (!id->ib.channel) {
		free_id(id);
		return NULL;
	}
	mg_device_lock(id->dev);
	mgv_list_add(&mgc_ids, &id->link);
	mg_device_unlock(id->dev);
	return id;
}

struct mgc_id *mgc_new_child(struct mgc_id *listener, struct mg_cm_conn *conn)
{
	struct mgc_id *id =
		alloc_id(listener->dev, listener->ib.context, listener->ib.ps, listener->ib.qp_type);

	if (!id)
		return NULL;
	id->ib.channel = listener->ib.channel;
	id->conn = conn;
	id->listener = listener;
	id->tos = listener->tos;
	id->ack_timeout = listener->ack_timeout;
	id->passive = true;
	id->state = MGC_REQUEST;
	mgv_list_add(&mgc_ids, &id->link);
	return id;
}

int mgc_attach(struct mgc_id *id)
{
	id->ib.verbs = mgc_context();
	id->ib.port_num = 1;
	if (!id->ib.pd)
		id->ib.pd = mgc_pd();
	return id->ib.verbs && id->ib.pd ? 0 : errno;
}

int mgc_conn(struct mgc_id *id)
{
	if (!id->conn)
		id->conn = mg_cm_conn_new(id->dev->cm, id);
	return id->conn ? 0 : ENOMEM;
}

MGC_EXPORT int rdma_create_id(struct rdma_event_channel *channel, struct rdma_cm_id **out, void *context,
			      enum rdma_port_space ps)
{
	struct mgc_id *id;

	MGC_FORWARD(rdma_create_id, channel, out, context, ps);
	if (ps != RDMA_PS_TCP && ps != RDMA_PS_UDP && ps != RDMA_PS_IB) /* IPoIB is for another link layer */
		return mgc_err(EPROTONOSUPPORT);
	id = mgc_new(channel, context, ps, ps == RDMA_PS_UDP ? IBV_QPT_UD : IBV_QPT_RC);
	if (!id)
		return -1;
	*out = &id->ib;
	return 0;
}

static void wait_acks(struct mgc_id *id)
{
	pthread_mutex_lock(&id->mutex);
	while (id->acked != id->delivered)
		pthread_cond_wait(&id->cond, &id->mutex);
	pthread_mutex_unlock(&id->mutex);
}

/* Lock held: all of it but the memory. */
static void detach(struct mgc_id *id)
{
	mgc_withdraw(id);
	mgc_unclaim(id);
	if (id->listed)
		mg_device_service(id->dev, (uint32_t)id->conn->service_id, false);
	if (id->conn)
		mg_cm_conn_destroy(id->conn, mg_now());
	id->conn = NULL;
	mgv_list_del(&id->link);
	for (struct mgv_list *l = mgc_ids.next; l != &mgc_ids; l = l->next) {
		struct mgc_id *o = mgv_container(l, struct mgc_id, link);

		if (o->listener == id)
			o->listener = NULL;
	}
}

void mgc_drop(struct mgc_id *id)
{
	detach(id);
	free_id(id);
}

MGC_EXPORT int rdma_destroy_id(struct rdma_cm_id *ib)
{
	struct mgc_id *id;

	MGC_FORWARD(rdma_destroy_id, ib);
	id = mgc_id(ib);
	mg_device_lock(id->dev);
	detach(id);
	mg_net_flush(id->dev, 0);
	mg_device_unlock(id->dev);
	if (id->lib.sync && ib->event) {
		rdma_ack_cm_event(ib->event);
		ib->event = NULL;
	}
	wait_acks(id);
	if (id->lib.sync)
		mgc_channel_free(ib->channel);
	free_id(id);
	return 0;
}

MGC_EXPORT int rdma_migrate_id(struct rdma_cm_id *ib, struct rdma_event_channel *channel)
{
	struct rdma_event_channel *old, *own = NULL;
	struct mgc_id *id;
	bool was_sync;

	MGC_FORWARD(rdma_migrate_id, ib, channel);
	id = mgc_id(ib);
	if (!channel) {
		channel = own = mgc_channel_new();
		if (!channel)
			return -1;
	}
	was_sync = id->lib.sync;
	old = ib->channel;
	if (was_sync && ib->event) {
		rdma_ack_cm_event(ib->event);
		ib->event = NULL;
	}
	mg_device_lock(id->dev);
	mgc_move_events(id, channel);
	ib->channel = channel;
	id->lib.sync = own != NULL;
	mg_device_unlock(id->dev);
	wait_acks(id);
	if (was_sync)
		mgc_channel_free(old);
	return 0;
}
