/* SPDX-License-Identifier: BSD-3-Clause */
/* internal.h - between cm.c (what the program does, timers) and cm_rx.c (what the peer says). */
#ifndef MG_CM_INTERNAL_H
#define MG_CM_INTERNAL_H

#include "cm/cm.h"

#include <errno.h>
#include <string.h>

/*
 * Programs that listen, take one connection and listen anew (perftest) leave a moment without a listener:
 * a request that comes then is dropped, to be repeated, instead of refused.
 */
#define MG_CM_GRACE 2000000000ull /* ns */
#define MG_CM_CLOSED 8u

struct mg_cm {
	struct {
		uint64_t service_id;
		mg_time at;
	} closed[MG_CM_CLOSED]; /* listeners that ended last */
	unsigned n_closed;
	const struct mg_cm_ops *ops;
	void *arg;
	uint32_t id_prefix;
	unsigned id_bits;
	struct mg_cm_conn list; /* head */
	mg_time deadline;	/* as last told by ops->wake; never later than the earliest timer */
};

#define MG_CM_FOR_EACH(c, cm) for (c = (cm)->list.next; c != &(cm)->list; c = c->next)

/* Send without remembering. */
void mg_cm_emit(struct mg_cm_conn *c, struct mg_cm_msg *m);
/* Send, remember, and repeat until told otherwise. */
void mg_cm_request(struct mg_cm_conn *c, mg_time now, struct mg_cm_msg *m, enum mg_cm_state to);
void mg_cm_repeat(struct mg_cm_conn *c); /* the remembered one, now */
void mg_cm_arm(struct mg_cm_conn *c, mg_time at);
void mg_cm_set(struct mg_cm_conn *c, enum mg_cm_state to); /* no timer */
void mg_cm_timewait(struct mg_cm_conn *c, mg_time now);
/* Tell the owner; a connection that has none and nothing left to do is freed: false, c is gone. */
bool mg_cm_tell(struct mg_cm_conn *c, enum mg_cm_event ev, const struct mg_cm_msg *m);
void mg_cm_unlink(struct mg_cm_conn *c); /* and free */
void mg_cm_reject(struct mg_cm_conn *c, uint16_t reason, enum mg_cm_about about, const void *data,
		  size_t len);
uint64_t mg_cm_ns(unsigned code); /* 4.096 us * 2^code */

#endif
