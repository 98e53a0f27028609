/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * mgc.h - librdmacm's ABI on top of native/cm: ids, event channels, events.
 *
 * Where the machine has real RDMA hardware with the kernel's rdma_cm, all calls go on to the real
 * librdmacm (mgc_real) unless MIGROCE_CM=1; otherwise all ids are ours.
 *
 * Locks: dev->lock guards ids, channels and event lists; an id's mutex is a leaf (acknowledged events).
 * Functions return 0 or -1 with errno, as the real ones do.
 */
#ifndef MGC_H
#define MGC_H

#include "cm/cm.h"
#include "verbs/forward.h"
#include "verbs/mgv.h"
#include "wire/wire.h"

#include <rdma/rdma_cma.h>
#include <rdma/rdma_verbs.h>

#define MGC_EXPORT MGV_EXPORT
#define MGC_BACKLOG_MAX 1024

bool mgc_real(void); /* hand everything on */
#define MGC_FORWARD(fn, ...)                                     \
	do {                                                     \
		if (mgc_real())                                  \
			return MGV_FORWARD_NEG(fn, __VA_ARGS__); \
	} while (0)
#define MGC_FORWARD_P(fn, ...)                                   \
	do {                                                     \
		if (mgc_real())                                  \
			return MGV_FORWARD_PTR(fn, __VA_ARGS__); \
	} while (0)
#define MGC_FORWARD_V(fn, ...)                             \
	do {                                               \
		if (mgc_real()) {                          \
			MGV_FORWARD_VOID(fn, __VA_ARGS__); \
			return;                            \
		}                                          \
	} while (0)

static inline int mgc_err(int err) /* 0 or an errno value -> 0 or -1 */
{
	if (!err)
		return 0;
	errno = err;
	return -1;
}

enum mgc_state {
	MGC_IDLE,
	MGC_BOUND,
	MGC_ADDR,    /* address resolved */
	MGC_ROUTE,   /* route resolved */
	MGC_CONNECT, /* REQ sent, or REP received and not yet answered */
	MGC_LISTEN,
	MGC_REQUEST, /* the peer asks */
	MGC_ACCEPT,  /* REP sent */
	MGC_ESTABLISHED,
	MGC_DISCONNECTED,
};

struct mgc_mcast;

/* Of newer headers than the oldest we are built with: rdma-core 59. */
#define MGC_EVENT_ADDRINFO_RESOLVED 16
#define MGC_EVENT_USER 18
#define MGC_RAI_SA 0x10

struct mgc_channel {
	struct rdma_event_channel ib;
	struct mgv_sem sem;
	struct mgv_list events; /* of struct mgc_event, oldest first */
};
static inline struct mgc_channel *mgc_channel(struct rdma_event_channel *c)
{
	return mgv_container(c, struct mgc_channel, ib);
}

/*
 * What librdmacm has behind an rdma_cm_id (its struct cma_id_private, the same in all its releases). Its
 * rsockets, which cannot be replaced one by one as its rdma_* can, run on our ids and look there: for the
 * device (none: they ask the list of devices, which is ours), and for whether calls wait (then they
 * complete what is under way by rdma_get_cm_event, which is ours).
 */
struct mgc_librdmacm {
	void *cma_dev, *connect;
	size_t connect_len;
	int events_completed, connect_error;
	int sync; /* made without a channel: calls wait */
	int more;
	void *zeros[4]; /* the rest is not for rsockets */
};

struct mgc_id {
	struct rdma_cm_id ib;
	struct mgc_librdmacm lib; /* must follow */
	struct mg_device *dev;
	struct mgv_list link; /* in mgc_ids */
	struct mg_cm_conn *conn;
	enum mgc_state state;
	bool reuse;
	bool only, only_set; /* RDMA_OPTION_ID_AFONLY */
	struct mg_claim claim;
	bool claimed; /* `claim` is ours */
	bool listed;  /* the agent knows of our port */
	uint8_t tos, ack_timeout;
	bool passive;
	/* listening */
	struct mgc_id *listener; /* of a request not yet fetched */
	int backlog;		 /* requests that may still come */
	/* what the QP is set to; the local side's view */
	uint8_t responder_resources, initiator_depth;
	struct mg_cm_msg req, rep; /* as sent or received */
	uint32_t psn, qpn;
	/* UD: the peer's answer */
	uint32_t qkey;
	/* made by rdma_create_ep */
	struct ibv_qp_init_attr *ep_attr;
	void *ep_private;
	size_t ep_private_len;
	bool own_send_cq, own_recv_cq;
	struct mgv_list groups; /* of struct mgc_mcast */
	/* rdma_resolve_addrinfo; dev->lock */
	bool resolving;
	struct rdma_addrinfo *resolved;
	/* events handed out and acknowledged */
	pthread_mutex_t mutex;
	pthread_cond_t cond;
	uint32_t delivered, acked;
};
_Static_assert(offsetof(struct mgc_id, lib) == sizeof(struct rdma_cm_id), "librdmacm looks there");
static inline struct mgc_id *mgc_id(struct rdma_cm_id *id)
{
	return mgv_container(id, struct mgc_id, ib);
}
static inline bool mgc_is_ud(const struct mgc_id *id)
{
	return id->ib.ps == RDMA_PS_UDP;
}

struct mgc_event {
	struct rdma_cm_event ib;
	struct mgv_list link;
	struct mgc_id *counted;	 /* whose count of acknowledgements */
	struct mgc_mcast *mcast; /* of MULTICAST_JOIN */
	bool respond;		 /* a REP that the library answers itself, when the event is fetched */
	uint8_t private_data[MG_CM_PRIVATE_MAX];
};

/* ---- id.c: the process's one device, ids -------------------------------------------------------------- */

extern struct mgv_list mgc_ids; /* dev->lock */

/* Our device's context, opened once; NULL with errno. */
struct ibv_context *mgc_context(void);
struct ibv_pd *mgc_pd(void); /* the default one, of that context; NULL with errno */
struct mgc_id *mgc_new(struct rdma_event_channel *channel, void *context, enum rdma_port_space ps,
		       enum ibv_qp_type type);
void mgc_drop(struct mgc_id *id); /* lock held: end one that the program has never seen */
/* Lock held: an id for a request to `listener`, without any memory of its own yet; NULL. */
struct mgc_id *mgc_new_child(struct mgc_id *listener, struct mg_cm_conn *conn);
/* The device: the id is bound to an address of it. */
int mgc_attach(struct mgc_id *id);
int mgc_conn(struct mgc_id *id); /* lock held: make sure there is a mg_cm_conn; ENOMEM */

/* ---- addr.c --------------------------------------------------------------------------------------------- */

bool mgc_gid_of(const struct sockaddr *sa, struct mg_addr *gid); /* false: neither IPv4 nor IPv6 */
uint64_t mgc_service(const struct mgc_id *id, uint16_t port);	 /* of the id's port space */
void mgc_sockaddr(const uint8_t gid[16], uint16_t port, struct sockaddr_storage *sa);
void mgc_tell_gids(struct rdma_addr *a); /* both addresses are known: `ibaddr`, as librdmacm has it */
bool mgc_any(const struct sockaddr *sa); /* the any-address */
uint16_t mgc_port(const struct sockaddr *sa);
void mgc_set_port(struct sockaddr *sa, uint16_t port);
socklen_t mgc_len(const struct sockaddr *sa); /* 0: a family that is none of ours */
/* The index of an address of ours in the GID table, or MGC_NO_GID. */
#define MGC_NO_GID 0xffu
unsigned mgc_gid_index(struct mg_device *dev, const struct mg_addr *gid);
/*
 * Lock held: what the id is bound to, or its options, have changed. `listens`: it is to listen, which wants the
 * port for itself; EADDRINUSE, EADDRNOTAVAIL.
 */
int mgc_reclaim(struct mgc_id *id, bool listens);
void mgc_unclaim(struct mgc_id *id);
/* Lock held: how an event says to send datagrams from `own` to `dst`. */
struct ibv_ah_attr mgc_ah_attr(const struct mgc_id *id, const struct mg_addr *own, const struct mg_addr *dst);

/* ---- event.c ---------------------------------------------------------------------------------------------- */

/* Lock held. An event of the id, queued on its channel; NULL: no memory (then it is lost). */
struct mgc_event *mgc_post(struct mgc_id *id, enum rdma_cm_event_type type, int status);
/* Lock held: forget what is queued for the id. Requests nobody fetched go, too. */
void mgc_withdraw(struct mgc_id *id);
void mgc_withdraw_mcast(struct mgc_id *id, const struct mgc_mcast *mc); /* lock held: those of a group */
void mgc_move_events(struct mgc_id *id, struct rdma_event_channel *to); /* lock held */
struct rdma_event_channel *mgc_channel_new(void);
void mgc_channel_free(struct rdma_event_channel *channel);
/* Synchronous ids wait for what they have begun: 0 or -1 with errno. */
int mgc_complete(struct mgc_id *id);

/* ---- mcast.c -------------------------------------------------------------------------------------------- */

/* A join's event was fetched: attach the id's QP. errno value */
int mgc_joined(struct mgc_id *id, struct mgc_mcast *mc);
void mgc_mcast_event(struct mgc_mcast *mc, bool acked); /* id->mutex held: one was handed out, or is back */
void mgc_leave_all(struct mgc_id *id);			/* the id ends: its memory of groups */

/* ---- hook.c, conn.c, qp.c ------------------------------------------------------------------------------------ */

mg_cm_event_hook mgc_on_event;
int mgc_respond(struct mgc_id *id);   /* to a REP: QP to RTS, RTU. errno value */
int mgc_qp_error(struct mgc_id *id);  /* errno value */
int mgc_qp_to_rts(struct mgc_id *id); /* INIT, RTR, RTS. errno value */
void mgc_free_cqs(struct mgc_id *id);

#endif
