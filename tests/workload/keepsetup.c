// SPDX-License-Identifier: BSD-3-Clause
/* keepsetup.c - what keepcheck and opcheck have: memory, queues, QPs and their connections. */
#include "keepcheck.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define FLUSH_GLOBAL (1 << 8)
#define ALL (IBV_ACCESS_LOCAL_WRITE | REMOTE | IBV_ACCESS_MW_BIND | FLUSH_GLOBAL)
#define OPS                                                                                           \
	(IBV_QP_EX_WITH_RDMA_READ | IBV_QP_EX_WITH_RDMA_WRITE | IBV_QP_EX_WITH_ATOMIC_FETCH_AND_ADD | \
	 IBV_QP_EX_WITH_ATOMIC_WRITE | 1 << 11 /* FLUSH */)

volatile sig_atomic_t terminated; /* tcp.c looks at it */

_Noreturn void die(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	fputs("keepcheck: ", stderr);
	vfprintf(stderr, fmt, ap);
	fprintf(stderr, ": %s\n", strerror(errno));
	va_end(ap);
	exit(2);
}

_Noreturn void broken(const char *fmt, ...)
{
	va_list ap;

	va_start(ap, fmt);
	fputs("keepcheck: ", stderr);
	vfprintf(stderr, fmt, ap);
	fputc('\n', stderr);
	va_end(ap);
	_exit(1);
}

int64_t now_ns(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ll + t.tv_nsec;
}

void keep_meet(int tcp, char where)
{
	char theirs;

	tcp_write(tcp, &where, 1);
	tcp_read(tcp, &theirs, 1);
	if (theirs != where)
		broken("the peer is at %c, not %c", theirs, where);
}

void fill(uint8_t *p, size_t n, uint64_t number)
{
	for (size_t i = 0; i < n; i++)
		p[i] = (uint8_t)(number * 7 + i + (i >> 8));
}

bool filled(const uint8_t *p, size_t n, uint64_t number)
{
	for (size_t i = 0; i < n; i++)
		if (p[i] != (uint8_t)(number * 7 + i + (i >> 8)))
			return false;
	return true;
}

void *need(void *made, const char *what)
{
	if (!made)
		die("%s", what);
	return made;
}

static struct ibv_qp *make_qp(struct keep *k, int q)
{
	static const enum ibv_qp_type types[QPS] = {[Q_XSEND] = IBV_QPT_XRC_SEND,
						    [Q_XRECV] = IBV_QPT_XRC_RECV,
						    [Q_UC] = IBV_QPT_UC,
						    [Q_UD] = IBV_QPT_UD};
	struct ibv_qp_init_attr_ex a = {.qp_type = types[q] ? types[q] : IBV_QPT_RC,
					.send_cq = k->cq,
					.recv_cq = k->recv_cq,
					.cap = {64, DEPTH, 1, 1, 0},
					.comp_mask = IBV_QP_INIT_ATTR_PD,
					.pd = k->pd};

	switch (q) {
	case Q_LOAD:
		a.comp_mask |= IBV_QP_INIT_ATTR_SEND_OPS_FLAGS;
		a.send_ops_flags = OPS;
		a.send_cq = a.recv_cq = load_cq(k);
		break;
	case Q_SRQ:
		a.recv_cq = k->srq_cq;
		a.srq = k->srq;
		break;
	case Q_CHANNEL: a.recv_cq = k->channel_cq; break;
	case Q_OVER: a.send_cq = k->over_cq; break;
	case Q_XSEND:
		a.comp_mask |= IBV_QP_INIT_ATTR_SEND_OPS_FLAGS;
		a.send_ops_flags = OPS;
		a.cap.max_recv_wr = a.cap.max_recv_sge = 0;
		break;
	case Q_XRECV:
		a = (struct ibv_qp_init_attr_ex){
			.qp_type = IBV_QPT_XRC_RECV, .comp_mask = IBV_QP_INIT_ATTR_XRCD, .xrcd = k->xrcd};
		break;
	default: break;
	}
	return need(ibv_create_qp_ex(k->ctx, &a), "a QP");
}

/* Memory of one kind, of at least BUF_SIZE bytes: private, sparse, memfd, or the name of a file to map. */
static uint8_t *memory(const char *kind, size_t *size)
{
	int fd = -1, flags = MAP_PRIVATE | MAP_ANONYMOUS;
	void *at;

	*size = BUF_SIZE;
	if (!strcmp(kind, "sparse")) {
		*size = (size_t)2 << 30;
		flags |= MAP_NORESERVE;
	} else if (strcmp(kind, "private") != 0) {
		fd = strcmp(kind, "memfd") ? open(kind, O_RDWR | O_CREAT, 0600)
					   : memfd_create("keepcheck", 0);
		if (fd < 0 || ftruncate(fd, BUF_SIZE))
			die("%s", kind);
		flags = MAP_SHARED;
	}
	at = mmap(NULL, *size, PROT_READ | PROT_WRITE, flags, fd, 0);
	if (at == MAP_FAILED)
		die("mmap of %s", kind);
	if (fd >= 0)
		close(fd);
	return at;
}

void make(struct keep *k)
{
	size_t size;
	struct ibv_device **list = need(ibv_get_device_list(NULL), "no RDMA device");
	struct ibv_srq_init_attr si = {.attr = {.max_wr = DEPTH, .max_sge = 1}};
	struct ibv_srq_init_attr_ex xi = {.attr = si.attr, .srq_type = IBV_SRQT_XRC};
	struct ibv_xrcd_init_attr di = {
		.comp_mask = IBV_XRCD_INIT_ATTR_FD | IBV_XRCD_INIT_ATTR_OFLAGS, .fd = -1, .oflags = O_CREAT};

	k->ctx = need(list[0] ? ibv_open_device(list[0]) : NULL, "no RDMA device");
	ibv_free_device_list(list);
	k->pd = need(ibv_alloc_pd(k->ctx), "a PD");
	k->buf = memory(k->memory, &size);
	memset(k->buf, 0, BUF_SIZE);
	k->mr = need(ibv_reg_mr(k->pd, k->buf, size, ALL), "a region");
	k->cq = need(ibv_create_cq(k->ctx, 256, NULL, NULL, 0), "a CQ");
	k->recv_cq = need(ibv_create_cq(k->ctx, 64, NULL, NULL, 0), "a CQ");
	k->srq_cq = need(ibv_create_cq(k->ctx, DEPTH, NULL, NULL, 0), "a CQ");
	k->xrc_cq = need(ibv_create_cq(k->ctx, DEPTH, NULL, NULL, 0), "a CQ");
	k->over_cq = need(ibv_create_cq(k->ctx, 2, NULL, NULL, 0), "a CQ");
	k->channel = need(ibv_create_comp_channel(k->ctx), "a channel");
	k->channel_cq = need(ibv_create_cq(k->ctx, DEPTH, &k->channel_cq, k->channel, 0), "a CQ");
	k->srq = need(ibv_create_srq(k->pd, &si), "an SRQ");
	k->xrcd = need(ibv_open_xrcd(k->ctx, &di), "an XRC domain");
	xi.comp_mask =
		IBV_SRQ_INIT_ATTR_TYPE | IBV_SRQ_INIT_ATTR_PD | IBV_SRQ_INIT_ATTR_XRCD | IBV_SRQ_INIT_ATTR_CQ;
	xi.pd = k->pd;
	xi.xrcd = k->xrcd;
	xi.cq = k->xrc_cq;
	k->xsrq = need(ibv_create_srq_ex(k->ctx, &xi), "an XRC SRQ");
	for (int q = 0; q < QPS; q++) {
		k->qp[q] = make_qp(k, q);
		k->mine.qpn[q] = k->qp[q]->qp_num;
	}
	if (ibv_query_gid(k->ctx, 1, 1, (union ibv_gid *)k->mine.gid) ||
	    ibv_get_srq_num(k->xsrq, &k->mine.xsrqn))
		die("ibv_query_gid, ibv_get_srq_num");
	k->mine.rkey = k->mr->rkey;
	k->mine.addr = (uintptr_t)k->buf;
}

void connect_qp(struct keep *k, int q)
{
	static const int peer[QPS] = {[Q_XSEND] = Q_XRECV, [Q_XRECV] = Q_XSEND,	  [Q_OVER] = Q_SINK,
				      [Q_SINK] = Q_OVER,   [Q_DENIED] = Q_DENIES, [Q_DENIES] = Q_DENIED};
	struct ibv_qp_attr a = {
		.qp_state = IBV_QPS_INIT,
		.port_num = 1,
		.qkey = QKEY,
		.qp_access_flags = q == Q_UC ? IBV_ACCESS_REMOTE_WRITE : REMOTE | FLUSH_GLOBAL,
		.path_mtu = IBV_MTU_1024,
		.dest_qp_num = k->theirs.qpn[peer[q] ? peer[q] : q],
		.max_dest_rd_atomic = 8,
		.max_rd_atomic = 8,
		.min_rnr_timer = 1,
		.timeout = 14,
		.retry_cnt = 7,
		.rnr_retry = 7,
		.ah_attr = {.is_global = 1, .port_num = 1, .grh = {.sgid_index = 1, .hop_limit = 64}}};
	int init = IBV_QP_STATE | IBV_QP_PKEY_INDEX | IBV_QP_PORT;
	int rtr = IBV_QP_STATE, rts = IBV_QP_STATE | IBV_QP_SQ_PSN;

	memcpy(a.ah_attr.grh.dgid.raw, k->theirs.gid, 16);
	init |= q == Q_UD ? IBV_QP_QKEY : IBV_QP_ACCESS_FLAGS;
	if (q != Q_UD)
		rtr |= IBV_QP_AV | IBV_QP_PATH_MTU | IBV_QP_DEST_QPN | IBV_QP_RQ_PSN;
	if (q != Q_UD && q != Q_UC) {
		rtr |= IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER;
		rts |= IBV_QP_TIMEOUT | IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC;
	}
	if (q == Q_XSEND)
		rtr &= ~(IBV_QP_MAX_DEST_RD_ATOMIC | IBV_QP_MIN_RNR_TIMER);
	if (q == Q_XRECV)
		rts &= ~(IBV_QP_RETRY_CNT | IBV_QP_RNR_RETRY | IBV_QP_MAX_QP_RD_ATOMIC);
	if ((errno = ibv_modify_qp(k->qp[q], &a, init)))
		die("QP %d to INIT", q);
	a.qp_state = IBV_QPS_RTR;
	if ((errno = ibv_modify_qp(k->qp[q], &a, rtr)))
		die("QP %d to RTR", q);
	a.qp_state = IBV_QPS_RTS;
	if ((errno = ibv_modify_qp(k->qp[q], &a, rts)))
		die("QP %d to RTS", q);
	if (q == Q_UD)
		k->ah = need(ibv_create_ah(k->pd, &a.ah_attr), "an address handle");
}
