/* SPDX-License-Identifier: BSD-3-Clause */
/* idtab.c - open-addressing table from 32-bit ids (QPNs, keys, handles) to objects. */
#include "transport/internal.h"

#include <errno.h>
#include <stdlib.h>

static uint32_t hash(uint32_t key)
{
	key *= 0x9e3779b1u; /* Fibonacci hashing; ids are random or counting, never an attacker's choice */
	return key ^ (key >> 15);
}

void *mg_idtab_get(const struct mg_idtab *t, uint32_t key)
{
	if (!t->slot)
		return NULL;
	for (uint32_t i = hash(key) & t->mask;; i = (i + 1) & t->mask) {
		if (!t->slot[i].val)
			return NULL;
		if (t->slot[i].key == key)
			return t->slot[i].val;
	}
}

static void insert(struct mg_idtab *t, uint32_t key, void *val)
{
	uint32_t i = hash(key) & t->mask;

	while (t->slot[i].val)
		i = (i + 1) & t->mask;
	t->slot[i].key = key;
	t->slot[i].val = val;
}

int mg_idtab_put(struct mg_idtab *t, uint32_t key, void *val)
{
	if (!t->slot || (t->used + 1) * 2 > t->mask) {
		uint32_t n = t->slot ? (t->mask + 1) * 2 : 16;
		struct mg_idtab bigger = {calloc(n, sizeof(*t->slot)), n - 1, t->used};

		if (!bigger.slot)
			return ENOMEM;
		for (uint32_t i = 0; t->slot && i <= t->mask; i++)
			if (t->slot[i].val)
				insert(&bigger, t->slot[i].key, t->slot[i].val);
		free(t->slot);
		*t = bigger;
	}
	insert(t, key, val);
	t->used++;
	return 0;
}

void mg_idtab_del(struct mg_idtab *t, uint32_t key)
{
	uint32_t i, j;

	if (!t->slot)
		return;
	for (i = hash(key) & t->mask; t->slot[i].val && t->slot[i].key != key; i = (i + 1) & t->mask)
		;
	if (!t->slot[i].val)
		return;
	/* Close the gap: move back every follower whose home does not lie behind the gap. */
	for (j = (i + 1) & t->mask; t->slot[j].val; j = (j + 1) & t->mask) {
		uint32_t home = hash(t->slot[j].key) & t->mask;

		if (((j - home) & t->mask) >= ((j - i) & t->mask)) {
			t->slot[i] = t->slot[j];
			i = j;
		}
	}
	t->slot[i].val = NULL;
	t->used--;
}

void *mg_idtab_next(const struct mg_idtab *t, uint32_t *it)
{
	while (t->slot && *it <= t->mask) {
		void *val = t->slot[(*it)++].val;

		if (val)
			return val;
	}
	return NULL;
}

void mg_idtab_free(struct mg_idtab *t)
{
	free(t->slot);
	*t = (struct mg_idtab){0};
}
