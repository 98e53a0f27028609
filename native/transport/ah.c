/* SPDX-License-Identifier: BSD-3-Clause */
/* ah.c - the GID table, address vectors and address handles: where packets leave from and go to. */
#include "transport/internal.h"

#include <errno.h>
#include <stdlib.h>

static bool unset(const struct mg_addr *gid)
{
	static const struct mg_addr zero;

	return memcmp(gid, &zero, sizeof(zero)) == 0;
}

void mg_set_gids(struct mg_engine *e, const struct mg_addr *gid, unsigned n)
{
	e->n_gid = n < MG_MAX_GID ? n : MG_MAX_GID;
	memset(e->gid, 0, sizeof(e->gid));
	memcpy(e->gid, gid, e->n_gid * sizeof(*gid));
}

void mg_set_path_mtu(struct mg_engine *e, uint32_t mtu)
{
	e->cfg.max_path_mtu = mtu;
}

const struct mg_addr *mg_gid_at(const struct mg_engine *e, unsigned index)
{
	return index < e->n_gid && !unset(&e->gid[index]) ? &e->gid[index] : NULL;
}

int mg_av_check(const struct mg_engine *e, const struct ibv_ah_attr *a)
{
	const struct mg_addr *src = mg_gid_at(e, a->grh.sgid_index);

	/* RoCE routes by GID: there is always a GRH, from and to one address family. */
	if (a->is_global && !src && a->grh.sgid_index && a->grh.sgid_index < MG_MAX_GID)
		return ENODATA; /* an entry without an address; 0 has one, that is no source */
	if (!a->is_global || !src || unset((const struct mg_addr *)a->grh.dgid.raw) ||
	    mg_gid_is_v4(a->grh.dgid.raw) != mg_gid_is_v4(src->gid))
		return EINVAL;
	return 0; /* a flow label is taken as the kernel takes it: more than 20 bits are no error */
}

static void set_av(struct mg_ah *ah, const struct ibv_ah_attr *a)
{
	memcpy(ah->dst.gid, a->grh.dgid.raw, 16);
	ah->src = *mg_gid_at(ah->pd->e, a->grh.sgid_index);
	ah->attr = *a;
}

int mg_ah_create(struct mg_pd *pd, const struct ibv_ah_attr *attr, void *owner, struct mg_ah **out)
{
	struct mg_engine *e = pd->e;
	struct mg_ah *ah;
	int err = attr->port_num == 1 ? mg_av_check(e, attr) : EINVAL;

	if (err)
		return err;
	ah = calloc(1, sizeof(*ah));
	if (!ah)
		return ENOMEM;
	ah->pd = pd;
	ah->owner = owner;
	ah->handle = mg_engine_handle(e);
	set_av(ah, attr);
	err = mg_idtab_put(&e->ahs, ah->handle, ah);
	if (err) {
		free(ah);
		return err;
	}
	pd->refs++;
	*out = ah;
	return 0;
}

int mg_ah_destroy(struct mg_ah *ah)
{
	mg_idtab_del(&ah->pd->e->ahs, ah->handle);
	ah->pd->refs--;
	free(ah);
	return 0;
}

struct ibv_ah *mg_ah_ib(struct mg_ah *ah)
{
	return &ah->ib;
}

struct mg_ah *mg_ah_of(struct ibv_ah *ib)
{
	return (struct mg_ah *)ib;
}

void *mg_ah_owner(const struct mg_ah *ah)
{
	return ah->owner;
}

/* ---- after a move -------------------------------------------------------------------------------- */

/* Where a source is now: the table may have been laid out anew. Falls back on the main address. */
static void follow(const struct mg_engine *e, struct mg_addr *src, uint8_t *index)
{
	const struct mg_addr *same = mg_gid_at(e, *index);
	unsigned i = 0;

	while (i < e->n_gid && memcmp(&e->gid[i], src, sizeof(*src)) != 0)
		i++;
	if (i == e->n_gid)
		i = same && mg_gid_is_v4(same->gid) == mg_gid_is_v4(src->gid) ? *index : MG_GID_MAIN;
	*index = (uint8_t)i;
	*src = e->gid[i];
}

/* Requests that were posted and not sent yet. */
static void follow_queued(struct mg_qp *qp)
{
	for (uint32_t i = qp->req.head; i != qp->req.tail; i++) {
		struct mg_ud_dest *d = mg_swqe_ud(qp, mg_sq_at(qp, i));

		follow(qp->e, &d->src, &d->sgid_index);
	}
}

void mg_gids_resume(struct mg_engine *e)
{
	struct mg_ah *ah;
	struct mg_qp *qp;

	for (uint32_t it = 0; (ah = mg_idtab_next(&e->ahs, &it));)
		follow(e, &ah->src, &ah->attr.grh.sgid_index);
	for (uint32_t it = 0; (qp = mg_idtab_next(&e->qps, &it));) {
		follow(e, &qp->local, &qp->sgid_index);
		if (qp->type == IBV_QPT_UD)
			follow_queued(qp);
	}
}
