/* SPDX-License-Identifier: BSD-3-Clause */
/* mr.c - protection domains, memory regions and the checks of every access. */
#include "transport/internal.h"

#include <errno.h>
#include <stdlib.h>

struct mg_pd *mg_pd_create(struct mg_engine *e)
{
	struct mg_pd *pd = calloc(1, sizeof(*pd));

	if (!pd)
		return NULL;
	pd->e = e;
	pd->handle = mg_engine_handle(e);
	if (mg_idtab_put(&e->pds, pd->handle, pd)) {
		free(pd);
		return NULL;
	}
	return pd;
}

int mg_pd_destroy(struct mg_pd *pd)
{
	if (pd->refs)
		return EBUSY;
	mg_idtab_del(&pd->e->pds, pd->handle);
	free(pd);
	return 0;
}

/* Random, so that a key tells nothing about the next one; the first 256 stay unused. */
void mg_key_draw(struct mg_engine *e, uint32_t *key)
{
	do {
		e->ops->random(e->arg, key, sizeof(*key));
	} while (!(*key >> 8) || mg_idtab_get(&e->mrs, *key >> 8) || mg_idtab_get(&e->mws, *key >> 8));
}

static int check_region(const void *addr, size_t length, uint64_t iova, unsigned access)
{
	const unsigned known = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_READ |
			       IBV_ACCESS_REMOTE_ATOMIC | IBV_ACCESS_MW_BIND | IBV_ACCESS_RELAXED_ORDERING |
			       IBV_ACCESS_HUGETLB | MG_ACCESS_FLUSH_GLOBAL;

	if (access & ~known & ~(unsigned)IBV_ACCESS_OPTIONAL_RANGE)
		return EOPNOTSUPP;
	/* IBA 10.6.3.1: remote write and atomic need local write. */
	if ((access & (IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC)) &&
	    !(access & IBV_ACCESS_LOCAL_WRITE))
		return EINVAL;
	if (length && ((uintptr_t)addr + length - 1 < (uintptr_t)addr || iova + length - 1 < iova))
		return EINVAL;
	return 0;
}

int mg_mr_create(struct mg_pd *pd, void *addr, size_t length, uint64_t iova, unsigned access,
		 struct mg_mr **out)
{
	struct mg_engine *e = pd->e;
	struct mg_mr *mr;
	int err = check_region(addr, length, iova, access);

	if (err)
		return err;
	mr = calloc(1, sizeof(*mr));
	if (!mr)
		return ENOMEM;
	*mr = (struct mg_mr){.pd = pd, .addr = addr, .iova = iova, .length = length, .access = access};
	mg_key_draw(e, &mr->key);
	err = mg_idtab_put(&e->mrs, mr->key >> 8, mr);
	if (err) {
		free(mr);
		return err;
	}
	pd->refs++;
	*out = mr;
	return 0;
}

int mg_mr_change(struct mg_mr *mr, struct mg_pd *pd, void *addr, size_t length, uint64_t iova,
		 unsigned access)
{
	int err = mr->n_mw ? EBUSY : check_region(addr, length, iova, access);

	if (err)
		return err;
	mr->pd->refs--;
	pd->refs++;
	*mr = (struct mg_mr){
		.pd = pd, .addr = addr, .iova = iova, .length = length, .access = access, .key = mr->key};
	return 0;
}

int mg_mr_destroy(struct mg_mr *mr)
{
	struct mg_engine *e = mr->pd->e;

	if (mr->n_mw)
		return EBUSY;
	if (e->mr_last == mr)
		e->mr_last = NULL;
	mg_idtab_del(&e->mrs, mr->key >> 8);
	mr->pd->refs--;
	free(mr);
	return 0;
}

uint32_t mg_mr_lkey(const struct mg_mr *mr)
{
	return mr->key;
}

uint32_t mg_mr_rkey(const struct mg_mr *mr)
{
	return mr->key;
}

struct mg_mr *mg_mr_find(struct mg_engine *e, uint32_t key)
{
	struct mg_mr *mr = e->mr_last;

	if (mr && mr->key == key)
		return mr;
	mr = mg_idtab_get(&e->mrs, key >> 8);
	if (!mr || mr->key != key)
		return NULL;
	return e->mr_last = mr;
}

struct copy {
	void *to;
	const void *from;
	size_t n;
};

static void do_copy(void *what)
{
	const struct copy *c = what;

	memcpy(c->to, c->from, c->n);
}

bool mg_copy(struct mg_engine *e, void *to, const void *from, size_t n)
{
	struct copy c = {to, from, n};

	if (e->ops->guarded)
		return e->ops->guarded(e->arg, do_copy, &c);
	do_copy(&c);
	return true;
}

uint8_t *mg_mr_map(struct mg_pd *pd, uint32_t key, uint64_t va, uint64_t len, unsigned need)
{
	struct mg_mr *mr = mg_mr_find(pd->e, key);

	if (!mr || mr->pd != pd || (mr->access & need) != need)
		return NULL;
	if (va < mr->iova || va - mr->iova > mr->length || len > mr->length - (va - mr->iova))
		return NULL;
	return mr->addr + (va - mr->iova);
}
