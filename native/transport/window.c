/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * window.c - how many packets a QP may have in flight: slow start, then additive increase,
 * halved on loss. IBA leaves this to the implementation; without a lossless fabric and with a
 * socket buffer at the far end, a fixed window would either starve or drown it.
 */
#include "transport/internal.h"

void mg_window_init(struct mg_window *w)
{
	*w = (struct mg_window){.cwnd = MG_WIN_INIT, .ssthresh = MG_WIN_MAX};
}

/* `limited`: the window, not the application, held the sender back. */
void mg_window_acked(struct mg_window *w, uint32_t packets, bool limited)
{
	if (!limited || w->cwnd >= MG_WIN_MAX)
		return;
	if (w->cwnd < w->ssthresh) {
		w->cwnd += packets;
	} else {
		w->credit += packets;
		if (w->credit >= w->cwnd) {
			w->credit -= w->cwnd;
			w->cwnd++;
		}
	}
	if (w->cwnd > MG_WIN_MAX)
		w->cwnd = MG_WIN_MAX;
}

void mg_window_loss(struct mg_window *w, uint64_t una, uint64_t sent)
{
	if (una < w->recover)
		return; /* the same loss, seen again */
	w->recover = sent;
	w->ssthresh = w->cwnd / 2 < MG_WIN_MIN ? MG_WIN_MIN : w->cwnd / 2;
	w->cwnd = w->ssthresh;
	w->credit = 0;
}
