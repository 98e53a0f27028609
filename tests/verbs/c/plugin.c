/* SPDX-License-Identifier: BSD-3-Clause */
/* A shared library linked with libibverbs, for t_dlopen.c. */
#include <infiniband/verbs.h>
#include <string.h>

int plugin_sees_rxe(void);
int plugin_sees_rxe(void)
{
	struct ibv_device **list = ibv_get_device_list(NULL);
	int seen = 0;

	for (int i = 0; list && list[i]; i++)
		seen += !strncmp(ibv_get_device_name(list[i]), "rxe", 3);
	ibv_free_device_list(list);
	return seen;
}
