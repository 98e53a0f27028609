/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * heap.c - the timers: one entry per QP in a binary heap.
 *
 * An entry may be earlier than the QP's real deadline: moving a deadline later (which every
 * acknowledgement does) costs nothing, the early wake-up just looks again.
 */
#include "transport/internal.h"

#include <errno.h>
#include <stdlib.h>

static void place(struct mg_engine *e, uint32_t i, struct mg_qp *qp)
{
	e->heap[i] = qp;
	qp->heap_pos = i + 1;
}

static void up(struct mg_engine *e, uint32_t i, struct mg_qp *qp)
{
	while (i && e->heap[(i - 1) / 2]->timer > qp->timer) {
		place(e, i, e->heap[(i - 1) / 2]);
		i = (i - 1) / 2;
	}
	place(e, i, qp);
}

static void down(struct mg_engine *e, uint32_t i, struct mg_qp *qp)
{
	for (;;) {
		uint32_t c = 2 * i + 1;

		if (c >= e->heap_len)
			break;
		if (c + 1 < e->heap_len && e->heap[c + 1]->timer < e->heap[c]->timer)
			c++;
		if (e->heap[c]->timer >= qp->timer)
			break;
		place(e, i, e->heap[c]);
		i = c;
	}
	place(e, i, qp);
}

int mg_heap_reserve(struct mg_engine *e, uint32_t n)
{
	struct mg_qp **bigger;

	if (n <= e->heap_cap)
		return 0;
	n = n < 16 ? 16 : n * 2;
	bigger = realloc(e->heap, n * sizeof(*bigger));
	if (!bigger)
		return ENOMEM;
	e->heap = bigger;
	e->heap_cap = n;
	return 0;
}

void mg_heap_wake(struct mg_qp *qp, mg_time at)
{
	struct mg_engine *e = qp->e;

	if (at == MG_NEVER || (qp->heap_pos && qp->timer <= at))
		return;
	qp->timer = at;
	if (qp->heap_pos)
		up(e, qp->heap_pos - 1, qp);
	else
		up(e, e->heap_len++, qp); /* mg_heap_reserve has made room at creation */
}

void mg_heap_remove(struct mg_qp *qp)
{
	struct mg_engine *e = qp->e;
	uint32_t i = qp->heap_pos;
	struct mg_qp *last;

	if (!i)
		return;
	qp->heap_pos = 0;
	qp->timer = MG_NEVER;
	last = e->heap[--e->heap_len];
	if (last == qp)
		return;
	i--;
	if (i && e->heap[(i - 1) / 2]->timer > last->timer)
		up(e, i, last);
	else
		down(e, i, last);
}
