/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * cm.h - the connection manager's state machines (IBA 12.9), sans I/O.
 *
 * Datagrams and time come in, datagrams, events and the next deadline go out through mg_cm_ops. No
 * system call, clock, lock or thread; everything is plain memory, so it is moved with the process.
 * Nothing a datagram contains may make a call fail. All calls on one mg_cm are serialised by the caller.
 */
#ifndef MG_CM_H
#define MG_CM_H

#include "cm/mad.h"
#include "transport/engine.h"

/* As the kernel's rdma_cm: 4.096 us * 2^20 = 4.3 s, fifteen times; an MRA asks for 69 s. */
#define MG_CM_TIMEOUT 20u
#define MG_CM_RETRIES 15u
#define MG_CM_MRA_TIMEOUT 24u
#define MG_CM_FIRST_GAP 250000000ull /* ns; doubling up to the timeout, these repetitions do not count */

/* docs/cm.md has the diagram. */
enum mg_cm_state {
	MG_CM_IDLE,
	MG_CM_LISTEN,
	MG_CM_REQ_SENT,
	MG_CM_REQ_RCVD,
	MG_CM_REP_SENT,
	MG_CM_REP_RCVD,
	MG_CM_ESTABLISHED,
	MG_CM_DREQ_SENT,
	MG_CM_DREQ_RCVD,
	MG_CM_TIMEWAIT,
	MG_CM_SIDR_SENT,
	MG_CM_SIDR_RCVD,
	MG_CM_SIDR_DONE, /* answered: kept for a while, to answer repetitions */
	MG_CM_N_STATES,
};
extern const char *const mg_cm_state_name[MG_CM_N_STATES];

enum mg_cm_event {
	MG_CM_EV_REQ,	   /* on a new connection; conn->listener says whose */
	MG_CM_EV_SIDR_REQ, /* likewise */
	MG_CM_EV_REP,
	MG_CM_EV_ESTABLISHED, /* RTU, or what counts as one */
	MG_CM_EV_REJ,
	MG_CM_EV_STALE, /* the peer knows nothing of this connection any more; as EV_DREQ */
	MG_CM_EV_DREQ,	/* answer by mg_cm_send_drep or by destroying */
	MG_CM_EV_DREP,
	MG_CM_EV_TIMEWAIT_EXIT,
	MG_CM_EV_TIMEOUT, /* of the request in conn->mad; conn->state is what it was sent in */
	MG_CM_EV_SIDR_REP,
};

struct mg_cm;

struct mg_cm_conn {
	struct mg_cm *cm;
	struct mg_cm_conn *prev, *next;
	void *owner; /* NULL: nobody's any more; it only lives for its timers */
	enum mg_cm_state state;
	uint32_t local_id, remote_id;
	uint64_t tid;
	struct mg_addr local, peer;
	uint8_t tclass;
	uint32_t peer_qpn;
	/* LISTEN */
	uint64_t service_id;
	struct mg_addr bound; /* all zero: any address */
	bool v6_only;	      /* of any address: IPv6 only; otherwise both */
	bool v4_only;
	/* of a received request, as long as that exists */
	struct mg_cm_conn *listener;
	struct mg_ip_hdr ip;
	/* what is repeated until it is answered, or when it is asked for again */
	uint8_t mad[MG_MAD_LEN];
	unsigned retries;
	uint64_t gap;
	mg_time timer;	   /* MG_NEVER: none */
	uint64_t timewait; /* ns */
};

struct mg_cm_ops {
	/* Bytes that an attacker cannot guess. */
	void (*random)(void *arg, void *buf, size_t n);
	void (*send)(void *arg, const struct mg_addr *src, const struct mg_addr *dst, uint8_t tclass,
		     const uint8_t mad[MG_MAD_LEN]);
	/*
	 * Must not call back, but may set conn->owner. `m` is NULL for the timers' events. For EV_REQ and
	 * EV_SIDR_REQ false drops the request in silence (no room: it will be repeated).
	 */
	bool (*event)(void *arg, struct mg_cm_conn *conn, enum mg_cm_event ev, const struct mg_cm_msg *m);
	void (*wake)(void *arg, mg_time at); /* the next deadline has changed */
};

/*
 * Local communication ids begin with the `id_bits` top bits of `id_prefix`, by which the agent's
 * filter finds the process (docs/control.md); the rest is random.
 */
struct mg_cm *mg_cm_create(const struct mg_cm_ops *ops, void *arg, uint32_t id_prefix, unsigned id_bits);
void mg_cm_free(struct mg_cm *cm); /* and all connections, in silence */

/* A datagram of MG_MAD_LEN bytes. */
void mg_cm_rx(struct mg_cm *cm, mg_time now, const struct mg_addr *src, const struct mg_addr *dst,
	      uint8_t tclass, const uint8_t *mad);
void mg_cm_timer(struct mg_cm *cm, mg_time now);
mg_time mg_cm_deadline(const struct mg_cm *cm);
/* The process was stopped and goes on: what is unanswered is sent again, all timers start anew. */
void mg_cm_resumed(struct mg_cm *cm, mg_time now);
/* The process ends: tell the peers of all connections, once. */
void mg_cm_farewell(struct mg_cm *cm, mg_time now);

/* ---- connections: functions return 0, ENOMEM or EINVAL (out of place in this state) -------------- */

struct mg_cm_conn *mg_cm_conn_new(struct mg_cm *cm, void *owner); /* NULL: no memory */
/* Ends it as its state asks for: REJ, DREQ, DREP; it may live on without owner for a while. */
void mg_cm_conn_destroy(struct mg_cm_conn *c, mg_time now);

/* EADDRINUSE: somebody listens there. */
int mg_cm_listen(struct mg_cm_conn *c, uint64_t service_id, const struct mg_addr *bound);
/* In each, ids and tid of *m are filled in here; the rest is the caller's. */
int mg_cm_send_req(struct mg_cm_conn *c, mg_time now, struct mg_cm_msg *m, const struct mg_addr *local,
		   const struct mg_addr *peer);
int mg_cm_send_rep(struct mg_cm_conn *c, mg_time now, struct mg_cm_msg *m);
int mg_cm_send_rtu(struct mg_cm_conn *c, mg_time now);
int mg_cm_send_rej(struct mg_cm_conn *c, mg_time now, uint16_t reason, const void *data, size_t len);
int mg_cm_send_dreq(struct mg_cm_conn *c, mg_time now);
int mg_cm_send_drep(struct mg_cm_conn *c, mg_time now);
int mg_cm_send_sidr_req(struct mg_cm_conn *c, mg_time now, struct mg_cm_msg *m, const struct mg_addr *local,
			const struct mg_addr *peer);
int mg_cm_send_sidr_rep(struct mg_cm_conn *c, mg_time now, struct mg_cm_msg *m);
/* Data has come on the connection before the RTU (the QP's COMM_EST). EISCONN: it is established. */
int mg_cm_notify(struct mg_cm_conn *c, mg_time now);

#endif
