/* SPDX-License-Identifier: BSD-3-Clause */
/* device.c - the device list: what the real library knows, and our one device behind it. */
#include "verbs/forward.h"
#include "verbs/mgv.h"

#include <stdio.h>
#include <stdlib.h>

struct mgv_device mgv_device = {
	.ib = {.node_type = IBV_NODE_CA, .transport_type = IBV_TRANSPORT_IB},
	.lock = PTHREAD_MUTEX_INITIALIZER,
	.contexts = {&mgv_device.contexts, &mgv_device.contexts},
	.domains = {&mgv_device.domains, &mgv_device.domains},
};

/* A list we gave out. Applications hold &devs[0]; ibv_free_device_list goes back from there. */
struct device_list {
	uint64_t magic;
	struct ibv_device **real;
	struct ibv_device *devs[];
};
#define LIST_MAGIC 0x6d69677265636564ull

__be64 mgv_guid(const uint8_t mac[6])
{
	uint8_t g[8] = {mac[0] ^ 2, mac[1], mac[2], 0xff, 0xfe, mac[3], mac[4], mac[5]};
	__be64 guid;

	memcpy(&guid, g, sizeof(guid));
	return guid;
}

static bool name_taken(struct ibv_device *const *real, int n, const char *name)
{
	for (int i = 0; i < n; i++)
		if (!strcmp(real[i]->name, name))
			return true;
	return false;
}

/* rxe0, or the next number that no real device has. Once named, the name stays. */
static void name_device(struct ibv_device *const *real, int n)
{
	struct ibv_device *ib = &mgv_device.ib;

	pthread_mutex_lock(&mgv_device.lock);
	for (unsigned i = 0; !mgv_device.named; i++) {
		snprintf(ib->name, sizeof(ib->name), "rxe%u", i);
		if (name_taken(real, n, ib->name))
			continue;
		snprintf(ib->dev_name, sizeof(ib->dev_name), "uverbs-%.40s", ib->name);
		snprintf(ib->dev_path, sizeof(ib->dev_path), "/sys/class/infiniband_verbs/%s", ib->dev_name);
		snprintf(ib->ibdev_path, sizeof(ib->ibdev_path), "/sys/class/infiniband/%s", ib->name);
		mgv_device.named = true;
	}
	pthread_mutex_unlock(&mgv_device.lock);
}

MGV_EXPORT struct ibv_device **ibv_get_device_list(int *num_devices)
{
	__typeof__(&ibv_get_device_list) real_get = MGV_REAL(ibv_get_device_list);
	struct ibv_device **real;
	struct device_list *l;
	int n_real = 0, n = 0, err;
	bool ours;

	errno = ENOSYS;
	real = real_get ? real_get(&n_real) : NULL;
	err = errno;
	if (!real)
		n_real = 0;
	ours = mg_device_probe(NULL) == 0;
	if (num_devices)
		*num_devices = 0;
	if (!real && !ours) {
		errno = err;
		return NULL;
	}

	l = calloc(1, sizeof(*l) + ((size_t)n_real + 2) * sizeof(l->devs[0]));
	if (!l) {
		if (real)
			MGV_FORWARD_VOID(ibv_free_device_list, real);
		errno = ENOMEM;
		return NULL;
	}
	l->magic = LIST_MAGIC;
	l->real = real;
	/* Ours comes last: a program that takes the first device takes a real one if there is one. */
	for (int i = 0; i < n_real; i++)
		l->devs[n++] = real[i];
	if (ours) {
		name_device(real, n_real);
		l->devs[n++] = &mgv_device.ib;
	}
	if (num_devices)
		*num_devices = n;
	return l->devs;
}

MGV_EXPORT void ibv_free_device_list(struct ibv_device **list)
{
	struct device_list *l = mgv_container(list, struct device_list, devs);

	if (l->magic != LIST_MAGIC) { /* made by the real library before we were there */
		MGV_FORWARD_VOID(ibv_free_device_list, list);
		return;
	}
	if (l->real)
		MGV_FORWARD_VOID(ibv_free_device_list, l->real);
	l->magic = 0;
	free(l);
}

MGV_EXPORT const char *ibv_get_device_name(struct ibv_device *device)
{
	return device->name;
}

MGV_EXPORT __be64 ibv_get_device_guid(struct ibv_device *device)
{
	struct mg_port port;

	if (!mgv_is_device(device)) {
		__typeof__(&ibv_get_device_guid) real = MGV_REAL(ibv_get_device_guid);

		return real ? real(device) : 0;
	}
	return mg_device_probe(&port) ? 0 : mgv_guid(port.mac);
}

/* The kernel's number for a device; ours has none (-1, as libibverbs says on old kernels). */
MGV_EXPORT int ibv_get_device_index(struct ibv_device *device)
{
	return mgv_is_device(device) ? -1 : MGV_FORWARD_NEG(ibv_get_device_index, device);
}

/*
 * Our engine copies in the caller's address space and nothing of it is pinned, so a fork needs no
 * preparation on our side; real devices may need theirs.
 */
MGV_EXPORT int ibv_fork_init(void)
{
	__typeof__(&ibv_fork_init) real = MGV_REAL(ibv_fork_init);
	int err = real ? real() : 0;

	return err == ENOSYS ? 0 : err;
}
