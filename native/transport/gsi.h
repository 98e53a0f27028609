/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * gsi.h - the general services interface: management datagrams on QP 1 (IBA 13.5).
 *
 * One user per engine, the connection manager, hears MADs, its own timer and the end of a stop. It is
 * called from within mg_* calls, as mg_ops are, and may call the functions below from there.
 */
#ifndef MG_GSI_H
#define MG_GSI_H

#include "transport/engine.h"

#define MG_GSI_QPN 1u
#define MG_GSI_QKEY 0x80010000u
#define MG_GSI_MAD_LEN 256u
#define MG_GSI_QUEUE_MAX 1024u /* datagrams that wait for mg_tx; more are lost, as on the wire */

struct mg_gsi_user {
	/* A datagram of MG_GSI_MAD_LEN bytes for us; nothing in it has been looked at. */
	void (*rx)(void *arg, mg_time now, const struct mg_rx *meta, const uint8_t *mad);
	void (*timer)(void *arg, mg_time now);
	void (*resumed)(void *arg, mg_time now, const struct mg_addr *addr); /* mg_resume: rebase timers */
};

/* NULL: none any more. `user` is not copied. */
void mg_gsi_attach(struct mg_engine *e, const struct mg_gsi_user *user, void *arg);
/* Queue a datagram. 0, or ENOBUFS, ENOMEM: it is lost. */
int mg_gsi_send(struct mg_engine *e, const struct mg_addr *src, const struct mg_addr *dst, uint8_t tclass,
		const uint8_t mad[MG_GSI_MAD_LEN]);
/* When `timer` is to be called; replaces what was said before. MG_NEVER: not at all. */
void mg_gsi_wake(struct mg_engine *e, mg_time at);

#endif
