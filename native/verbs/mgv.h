/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * mgv.h - the verbs layer's own structures: libibverbs' ABI on top of the engine.
 *
 * Every object an application holds is a libibverbs struct at the start of one of ours. Whose an
 * object is (ours or a real device's) is told by its context's device pointer alone: there is
 * exactly one device of ours. Calls about real objects go on to the real library (forward.h).
 *
 * Locks: dev->lock guards the engine, all lists in here, event queues and the counts of events
 * handed out. Above it (taken before it) are a QP's builder lock and a CQ's poll lock. The mutexes
 * inside ibv_cq and ibv_qp are leaves and are never held together with dev->lock.
 */
#ifndef MGV_H
#define MGV_H

#include "net/device.h"

#include <errno.h>
#include <stddef.h>
#include <string.h>

/* Header macros that would rename or inline what we define. */
#undef ibv_query_port
#undef ibv_reg_mr
#undef ibv_reg_mr_iova
#undef ibv_get_device_list

#define MGV_EXPORT __attribute__((visibility("default")))
#define mgv_container(ptr, type, member) ((type *)(void *)((char *)(ptr)-offsetof(type, member)))

/* ---- lists ------------------------------------------------------------------------------- */

struct mgv_list {
	struct mgv_list *prev, *next;
};
static inline void mgv_list_init(struct mgv_list *l)
{
	l->prev = l->next = l;
}
static inline bool mgv_list_empty(const struct mgv_list *l)
{
	return l->next == l;
}
static inline void mgv_list_add(struct mgv_list *head, struct mgv_list *l)
{
	l->prev = head->prev;
	l->next = head;
	head->prev->next = l;
	head->prev = l;
}
static inline void mgv_list_del(struct mgv_list *l)
{
	l->prev->next = l->next;
	l->next->prev = l->prev;
	mgv_list_init(l);
}

/* ---- the device --------------------------------------------------------------------------- */

/*
 * The one device of ours. The zeros stand where providers look for their own fields behind an
 * ibv_device (mlx5dv_is_supported and the like compare an ops pointer there).
 */
struct mgv_device {
	struct ibv_device ib;
	uint64_t zeros[32];
	pthread_mutex_t lock; /* guards `named` and ib's strings */
	bool named;
	struct mgv_list contexts; /* dev->lock */
	struct mgv_list domains;  /* of struct mgv_domain; dev->lock */
};
extern struct mgv_device mgv_device;

static inline bool mgv_is_device(const struct ibv_device *d)
{
	return d == &mgv_device.ib;
}
static inline bool mgv_is_ours(const struct ibv_context *c)
{
	return c->device == &mgv_device.ib;
}
/* The node GUID (network order) rdma_rxe would make of this MAC address. */
__be64 mgv_guid(const uint8_t mac[6]);
/* A copy of what the port looks like now (an address may change when the process is moved). */
/* IBA PortInfo:PortPhysicalState, as the kernel tells it of a network device. */
enum { MGV_PHYS_POLLING = 2, MGV_PHYS_DISABLED = 3, MGV_PHYS_LINK_UP = 5 };
uint8_t mgv_phys_state(const struct mg_port *port);

/* ---- events (events.c) --------------------------------------------------------------------- */

/*
 * A counting semaphore that programs can poll: an eventfd whose value is the number of queued
 * events. `surplus` counts values that could not be taken back when events were withdrawn,
 * because a reader had them already.
 */
struct mgv_sem {
	int fd;
	uint64_t surplus;
};

struct mgv_async {
	struct mgv_list link;
	struct ibv_async_event ev;
	uint32_t *delivered; /* the object's count of events handed out, NULL: nobody waits for acks */
};

/* ---- objects --------------------------------------------------------------------------------- */

struct mgv_context {
	struct mg_device *dev;
	struct mgv_list link; /* in mgv_device.contexts */
	struct mgv_list pds, mrs, mws, cqs, qps, ahs, channels, srqs, xrcds;
	struct mgv_list async; /* of struct mgv_async, oldest first */
	struct mgv_sem async_sem;
	uint32_t handles;
	struct verbs_context v; /* grows toward lower addresses; ibv_context is its last member */
};
static inline struct mgv_context *mgv_ctx(struct ibv_context *c)
{
	return mgv_container(c, struct mgv_context, v.context);
}

struct mgv_pd {
	struct ibv_pd ib;
	struct mg_pd *mg;
	struct mgv_pd *parent; /* a parent domain stands for this PD */
	unsigned children;
	struct mgv_list link;
};
static inline struct mgv_pd *mgv_pd(struct ibv_pd *p)
{
	return mgv_container(p, struct mgv_pd, ib);
}

struct mgv_mr {
	struct ibv_mr ib;
	struct mg_mr *mg;
	uint64_t iova;
	unsigned access;
	struct mgv_list link;
};
static inline struct mgv_mr *mgv_mr(struct ibv_mr *m)
{
	return mgv_container(m, struct mgv_mr, ib);
}

struct mgv_mw {
	struct ibv_mw ib;
	struct mg_mw *mg;
	struct mgv_list link;
};
static inline struct mgv_mw *mgv_mw(struct ibv_mw *m)
{
	return mgv_container(m, struct mgv_mw, ib);
}

struct mgv_channel {
	struct ibv_comp_channel ib;
	struct mg_device *dev;
	struct mgv_sem sem;
	struct mgv_list cqs; /* CQs with events not yet fetched, oldest first */
	struct mgv_list link;
};
static inline struct mgv_channel *mgv_channel(struct ibv_comp_channel *c)
{
	return mgv_container(c, struct mgv_channel, ib);
}

struct mgv_cq {
	struct ibv_cq_ex ib; /* starts like ibv_cq */
	struct mg_cq *mg;
	struct mg_device *dev;
	unsigned busy;		   /* polls since the network was last looked at */
	bool armed;		   /* an event is wanted: polling does not keep the progress thread away */
	struct ibv_wc wc;	   /* what read_* tell about */
	mg_time stamp;		   /* ... when it came, for CQs that asked for it */
	pthread_mutex_t poll_lock; /* start_poll .. end_poll */
	unsigned pending;	   /* events in the channel's queue */
	struct mgv_list ready;	   /* in the channel's cqs */
	uint32_t comp_delivered, async_delivered;
	struct mgv_list link;
};
static inline struct ibv_cq *mgv_cq_ib(struct mgv_cq *cq)
{
	return (struct ibv_cq *)&cq->ib;
}
static inline struct mgv_cq *mgv_cq(struct ibv_cq *c)
{
	return mgv_container(c, struct mgv_cq, ib);
}

/* An XRC domain, by as many handles as have opened it (xrc.c). */
struct mgv_domain {
	struct mg_xrcd *mg;
	bool is_file;
	dev_t st_dev; /* which */
	ino_t st_ino;
	unsigned opened;
	struct mgv_list link; /* in mgv_device.domains */
};

struct mgv_xrcd {
	struct ibv_xrcd ib;
	struct mgv_domain *domain;
	unsigned users; /* SRQs and QPs */
	struct mgv_list link;
};
static inline struct mgv_xrcd *mgv_xrcd(struct ibv_xrcd *x)
{
	return mgv_container(x, struct mgv_xrcd, ib);
}

struct mgv_srq {
	struct ibv_srq ib;
	struct mg_srq *mg;
	struct mg_device *dev;
	struct mgv_xrcd *xrcd; /* of an XRC one */
	uint32_t async_delivered;
	struct mgv_list link;
};
static inline struct mgv_srq *mgv_srq(struct ibv_srq *s)
{
	return mgv_container(s, struct mgv_srq, ib);
}

/* What ibv_wr_* have put together since ibv_wr_start (qp_ex.c). */
struct mgv_builder {
	pthread_mutex_t lock; /* wr_start .. wr_complete / wr_abort */
	struct ibv_send_wr *wr;
	struct mgv_piece {
		uint32_t sge, n_sge;	   /* in `sge` */
		uint32_t bytes_off, bytes; /* inline data, in `bytes` */
		bool is_inline, set;
	} * piece;
	struct ibv_sge *sge;
	uint8_t *bytes;
	uint32_t n_wr, cap_wr, n_sge, cap_sge, n_bytes, cap_bytes;
	int err; /* the first thing that went wrong */
};

#define MGV_QP_SPARE 16 /* slots for ibv_wr_* of rdma-core releases to come */
struct mgv_qp {
	struct ibv_qp_ex ex; /* starts with ibv_qp */
	void (*spare[MGV_QP_SPARE])(struct ibv_qp_ex *);
	struct mg_qp *mg;
	struct mg_device *dev;
	bool has_ex; /* made with IBV_QP_INIT_ATTR_SEND_OPS_FLAGS */
	struct ibv_qp_cap cap;
	struct mgv_builder b;
	uint32_t async_delivered;
	struct mgv_xrcd *xrcd;	 /* of an XRC target */
	struct mgv_list sharers; /* the other handles of the same XRC target (ibv_open_qp) */
	struct mgv_list link;
};
static inline struct mgv_qp *mgv_qp(struct ibv_qp *q)
{
	return mgv_container(q, struct mgv_qp, ex.qp_base);
}

struct mgv_ah { /* the ibv_ah is the engine's: mg_ah_ib */
	struct mg_ah *mg;
	struct mgv_list link;
};

/* ---- between the files ------------------------------------------------------------------------- */

/* context.c: the function tables; unsupported.c: their defaults, never NULL. */
void mgv_ops_defaults(struct verbs_context *v);
uint32_t mgv_handle(struct mgv_context *ctx); /* dev->lock held */

/* query.c */
#define MGV_FW_VER "0.0.0" /* what rdma_rxe has: no firmware, but programs print it */
int mgv_query_device_ex(struct ibv_context *c, const struct ibv_query_device_ex_input *in,
			struct ibv_device_attr_ex *attr, size_t size);
int mgv_query_rt_values(struct ibv_context *c, struct ibv_values_ex *values);
int mgv_query_port(struct ibv_context *c, uint8_t port, struct ibv_port_attr *attr, size_t len);

/* sysfs.c: the text of a file below the device's directory in /sys, without line end */
#define MGV_SYSFS_MAX 128
bool mgv_sysfs(const char *file, char *out, size_t size);

/* pd.c, mr.c */
struct ibv_td *mgv_alloc_td(struct ibv_context *c, struct ibv_td_init_attr *attr);
int mgv_dealloc_td(struct ibv_td *td);
struct ibv_pd *mgv_alloc_parent_domain(struct ibv_context *c, struct ibv_parent_domain_init_attr *attr);
struct mgv_buf;
/* buf.c: whether the range lies within what ibv_alloc_buf gave. */
bool mgv_buf_holds(const struct mgv_buf *buf, const struct ibv_pd *pd, const void *addr, size_t length);
struct ibv_mr *mgv_reg_mr(struct ibv_pd *pd, void *addr, size_t length, uint64_t iova, unsigned access);
/* 0 when [addr, addr+length) is mapped readable (and writable when asked), else EFAULT. */
int mgv_check_mapped(const void *addr, size_t length, bool write);

/* mw.c */
struct ibv_mw *mgv_alloc_mw(struct ibv_pd *pd, enum ibv_mw_type type);
int mgv_dealloc_mw(struct ibv_mw *mw);
int mgv_bind_mw(struct ibv_qp *qp, struct ibv_mw *mw, struct ibv_mw_bind *bind);

/* cq.c, cq_ex.c */
struct ibv_cq_ex *mgv_create_cq_ex(struct ibv_context *c, struct ibv_cq_init_attr_ex *attr);
int mgv_poll_cq(struct ibv_cq *c, int n, struct ibv_wc *wc);
int mgv_req_notify_cq(struct ibv_cq *c, int solicited_only);
int mgv_cq_fetch(struct mgv_cq *cq, int n, struct ibv_wc *wc); /* dev->lock held */
void mgv_cq_ex_init(struct mgv_cq *cq);
void mgv_cq_free(struct mgv_cq *cq);

/* qp.c, qp_ex.c */
struct ibv_qp *mgv_create_qp_ex(struct ibv_context *c, struct ibv_qp_init_attr_ex *attr);
int mgv_post_send(struct ibv_qp *q, struct ibv_send_wr *wr, struct ibv_send_wr **bad);
int mgv_post_recv(struct ibv_qp *q, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad);
void mgv_qp_ex_init(struct mgv_qp *qp);
void mgv_qp_ex_free(struct mgv_qp *qp);
void mgv_qp_free(struct mgv_qp *qp);
#define MGV_EX_WITH_FLUSH (1 << 11)
#define MGV_EX_WITH_ATOMIC_WRITE (1 << 12)
#define MGV_SEND_OPS                                                                                   \
	(IBV_QP_EX_WITH_RDMA_WRITE | IBV_QP_EX_WITH_RDMA_WRITE_WITH_IMM | IBV_QP_EX_WITH_SEND |        \
	 IBV_QP_EX_WITH_SEND_WITH_IMM | IBV_QP_EX_WITH_RDMA_READ | IBV_QP_EX_WITH_ATOMIC_CMP_AND_SWP | \
	 IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD | IBV_QP_EX_WITH_LOCAL_INV | IBV_QP_EX_WITH_BIND_MW |     \
	 IBV_QP_EX_WITH_SEND_WITH_INV | MGV_EX_WITH_FLUSH | MGV_EX_WITH_ATOMIC_WRITE)
void mgv_qp_init(struct mgv_qp *qp, struct ibv_context *c, struct mg_qp *mg); /* dev->lock held */
int mgv_qp_release(struct mgv_qp *qp); /* out of the engine, lists, counts; dev->lock held */

/* ah.c */
void mgv_ah_release(struct mgv_ah *ah); /* dev->lock held */

/* srq.c, xrc.c; those that release: with dev->lock held */
struct ibv_srq *mgv_create_srq_ex(struct ibv_context *c, struct ibv_srq_init_attr_ex *attr);
int mgv_get_srq_num(struct ibv_srq *srq, uint32_t *num);
int mgv_post_srq_recv(struct ibv_srq *srq, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad);
int mgv_srq_release(struct mgv_srq *srq); /* as mgv_qp_release */
void mgv_srq_free(struct mgv_srq *srq);
struct ibv_xrcd *mgv_open_xrcd(struct ibv_context *c, struct ibv_xrcd_init_attr *attr);
int mgv_close_xrcd(struct ibv_xrcd *xrcd);
void mgv_xrcd_release(struct mgv_xrcd *x); /* no longer used by anybody */
struct ibv_qp *mgv_open_qp(struct ibv_context *c, struct ibv_qp_open_attr *attr);

/* events.c: called with dev->lock held, except where said */
extern const struct mg_device_hooks mgv_hooks;
int mgv_sem_open(struct mgv_sem *s);
void mgv_sem_close(struct mgv_sem *s);
void mgv_sem_add(struct mgv_sem *s, uint64_t n);
void mgv_sem_taken(struct mgv_sem *s, uint64_t v, bool empty);
void mgv_sem_withdraw(struct mgv_sem *s, uint64_t n);
void mgv_channel_withdraw(struct mgv_cq *cq);			      /* its unfetched completion events */
void mgv_async_withdraw(struct mgv_context *ctx, const void *object); /* the same for async; NULL: all */
/* Lock not held. Wait until `*completed` (under the object's mutex) has reached `delivered`. */
void mgv_wait_acks(pthread_mutex_t *m, pthread_cond_t *c, const uint32_t *completed, uint32_t delivered);

#endif
