/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * sysfs.c - ibv_read_sysfs_file() for our device. It has no directory in /sys, so the files that
 * programs ask for through libibverbs are made up here, worded as the kernel words them.
 */
#include "verbs/forward.h"
#include "verbs/mgv.h"

#include <stdio.h>
#include <stdlib.h>

static void put_guid(char *out, size_t size, const uint8_t b[8])
{
	snprintf(out, size, "%02x%02x:%02x%02x:%02x%02x:%02x%02x", b[0], b[1], b[2], b[3], b[4], b[5], b[6],
		 b[7]);
}

static void put_gid(char *out, size_t size, const uint8_t g[16])
{
	int at = 0;

	for (int i = 0; i < 16; i += 2)
		at += snprintf(out + at, size - (size_t)at, "%s%02x%02x", i ? ":" : "", g[i], g[i + 1]);
}

/* "<prefix><decimal index>" with index < n. */
static bool indexed(const char *file, const char *prefix, unsigned n, unsigned *index)
{
	size_t len = strlen(prefix);
	unsigned long v;
	char *end;

	if (strncmp(file, prefix, len) || file[len] < '0' || file[len] > '9')
		return false;
	v = strtoul(file + len, &end, 10);
	*index = (unsigned)v;
	return !*end && v < n;
}

static const char *phys_state(const struct mg_port *port)
{
	switch (mgv_phys_state(port)) {
	case MGV_PHYS_LINK_UP: return "5: LinkUp";
	case MGV_PHYS_POLLING: return "2: Polling";
	default: return "3: Disabled";
	}
}

bool mgv_sysfs(const char *file, char *out, size_t size)
{
	static const struct {
		const char *file, *text;
	} fixed[] = {
		{"node_type", "1: CA"}, {"node_desc", "migroce"},
		{"fw_ver", MGV_FW_VER}, {"ports/1/link_layer", "Ethernet"},
		{"ports/1/lid", "0x0"}, {"ports/1/pkeys/0", "0xffff"},
	};
	struct mg_port port;
	uint8_t guid[8];
	unsigned i;

	for (i = 0; i < sizeof(fixed) / sizeof(fixed[0]); i++)
		if (!strcmp(file, fixed[i].file)) {
			snprintf(out, size, "%s", fixed[i].text);
			return true;
		}
	if (mg_device_probe(&port))
		return false;
	if (!strcmp(file, "node_guid") || !strcmp(file, "sys_image_guid")) {
		__be64 g = mgv_guid(port.mac);

		memcpy(guid, &g, sizeof(guid));
		put_guid(out, size, guid);
	} else if (!strcmp(file, "ports/1/state")) {
		snprintf(out, size, "%s", mg_port_active(&port) ? "4: ACTIVE" : "1: DOWN");
	} else if (!strcmp(file, "ports/1/phys_state")) {
		snprintf(out, size, "%s", phys_state(&port));
	} else if (!strcmp(file, "parent")) {
		snprintf(out, size, "%s", port.ifname);
	} else if (indexed(file, "ports/1/gids/", port.n_gid, &i)) {
		put_gid(out, size, port.gid[i].gid);
	} else if (indexed(file, "ports/1/gid_attrs/types/", port.n_gid, &i)) {
		snprintf(out, size, "RoCE v2");
	} else if (indexed(file, "ports/1/gid_attrs/ndevs/", port.n_gid, &i)) {
		snprintf(out, size, "%s", port.ifname);
	} else {
		return false;
	}
	return true;
}

/* Not in an installed header (rdma-core keeps it in driver.h), yet programs and librdmacm use it. */
int ibv_read_sysfs_file(const char *dir, const char *file, char *buf, size_t size);

/* Length without the final newline, as libibverbs returns it; -1 when there is no such file. */
MGV_EXPORT int ibv_read_sysfs_file(const char *dir, const char *file, char *buf, size_t size)
{
	size_t own = strlen(mgv_device.ib.ibdev_path);
	char text[MGV_SYSFS_MAX], path[512];
	size_t len;

	/* dir may already hold a part of the way: ".../rxe0/ports/1" with "pkeys/0". */
	if (!own || strncmp(dir, mgv_device.ib.ibdev_path, own) || (dir[own] && dir[own] != '/'))
		return MGV_FORWARD_NEG(ibv_read_sysfs_file, dir, file, buf, size);
	dir += own + (dir[own] == '/');
	snprintf(path, sizeof(path), "%s%s%s", dir, *dir && dir[strlen(dir) - 1] != '/' ? "/" : "", file);
	if (!mgv_sysfs(path, text, sizeof(text))) {
		errno = ENOENT;
		return -1;
	}
	len = strlen(text);
	if (len >= size) {
		errno = ENOSPC;
		return -1;
	}
	memcpy(buf, text, len + 1);
	return (int)len;
}
