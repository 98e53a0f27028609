/* SPDX-License-Identifier: BSD-3-Clause */
/* datagram.c - address handles and multicast groups of the flat API. */
#include "sim/sim.h"

#include <errno.h>
#include <string.h>

struct mg_ah *sim_ah_get(struct mgs_world *w, int ah)
{
	return ah >= 0 && ah < w->n_ah ? w->ah[ah].ah : NULL;
}

int mgs_ah_new(struct mgs_world *w, int pd, const struct mgs_path *path)
{
	struct ibv_ah_attr attr = {.is_global = 1, .port_num = 1};
	size_t cap = (size_t)w->cap_ah;
	struct mg_ah *ah;
	int rc;

	if (pd < 0 || pd >= w->n_pd || !w->pd[pd].pd)
		return -EINVAL;
	attr.grh.sgid_index = 1;
	attr.grh.hop_limit = path->hop_limit;
	attr.grh.traffic_class = path->tclass;
	memcpy(attr.grh.dgid.raw, path->dgid, 16);
	rc = mg_ah_create(w->pd[pd].pd, &attr, NULL, &ah);
	if (rc)
		return -rc;
	w->ah = sim_grow(w->ah, (size_t)w->n_ah, &cap, sizeof(*w->ah));
	w->cap_ah = (int)cap;
	w->ah[w->n_ah] = (struct sim_ah){ah, w->pd[pd].engine};
	return w->n_ah++;
}

int mgs_ah_free(struct mgs_world *w, int ah)
{
	struct mg_ah *a = sim_ah_get(w, ah);

	if (!a)
		return -EINVAL;
	w->ah[ah].ah = NULL;
	return -mg_ah_destroy(a);
}

bool sim_joined(const struct sim_engine *e, const uint8_t gid[16])
{
	struct mg_addr group;

	for (uint32_t i = 0; mg_mcast_group(e->e, i, &group); i++)
		if (!memcmp(group.gid, gid, 16))
			return true;
	return false;
}

int mgs_mcast(struct mgs_world *w, int qp, const uint8_t *gid, int on)
{
	struct mg_addr group;

	if (qp < 0 || qp >= w->n_qp || !w->qp[qp].qp)
		return -EINVAL;
	memcpy(group.gid, gid, 16);
	return -(on ? mg_mcast_attach(w->qp[qp].qp, &group) : mg_mcast_detach(w->qp[qp].qp, &group));
}
