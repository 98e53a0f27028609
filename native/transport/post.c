/* SPDX-License-Identifier: BSD-3-Clause */
/* post.c - work requests into the queues. */
#include "transport/internal.h"

#include <arpa/inet.h>
#include <errno.h>

#define MAX_MESSAGE (1u << 31) /* bytes, IBA 9.7.1 */

static bool known_opcode(enum ibv_wr_opcode op)
{
	return op == IBV_WR_SEND || op == IBV_WR_SEND_WITH_IMM || op == IBV_WR_SEND_WITH_INV ||
	       op == IBV_WR_RDMA_WRITE || op == IBV_WR_RDMA_WRITE_WITH_IMM || mg_wr_is_answered(op) ||
	       mg_wr_is_local(op);
}

/* What the window and the region allow is looked at when the request's turn comes. */
static int check_local(const struct ibv_send_wr *wr)
{
	const struct ibv_mw_bind_info *b = &wr->bind_mw.bind_info;

	if (wr->opcode == IBV_WR_LOCAL_INV)
		return 0;
	return wr->bind_mw.mw && (b->mr || (!b->addr && !b->length)) ? 0 : EINVAL;
}

/* ibv_send_wr has no place of its own for a flush: compare_add is its type and level, swap its length. */
static int check_flush(const struct mg_qp *qp, const struct ibv_send_wr *wr)
{
	uint64_t type = wr->wr.atomic.compare_add & 0xff, level = wr->wr.atomic.compare_add >> 8;

	return type && !(type & ~(uint64_t)(MG_FLUSH_GLOBAL | MG_FLUSH_PERSISTENT)) && level <= MG_FLUSH_MR &&
			       wr->wr.atomic.swap <= UINT32_MAX && !wr->num_sge && qp->req.n_reads
		       ? 0
		       : EINVAL;
}

/* What each service can do (IBA table 42). */
static bool service_does(enum ibv_qp_type type, enum ibv_wr_opcode op)
{
	bool send = op == IBV_WR_SEND || op == IBV_WR_SEND_WITH_IMM;
	bool write = op == IBV_WR_RDMA_WRITE || op == IBV_WR_RDMA_WRITE_WITH_IMM;

	return type == IBV_QPT_UD ? send : type == IBV_QPT_UC ? send || write || mg_wr_is_local(op) : true;
}

static int check_ud(const struct mg_qp *qp, const struct ibv_send_wr *wr)
{
	const struct mg_ah *ah = wr->wr.ud.ah ? mg_ah_of(wr->wr.ud.ah) : NULL;

	return ah && ah->pd == qp->pd && wr->wr.ud.remote_qpn <= MG_QPN_MASK ? 0 : EINVAL;
}

static int check_send(const struct mg_qp *qp, const struct ibv_send_wr *wr, uint64_t *length)
{
	bool inl = wr->send_flags & IBV_SEND_INLINE;

	*length = 0;
	if (qp->type == IBV_QPT_XRC_RECV)
		return EINVAL;
	if (!known_opcode(wr->opcode))
		return wr->opcode <= IBV_WR_TSO ? EOPNOTSUPP : EINVAL;
	if (!service_does(qp->type, wr->opcode) || (qp->type == IBV_QPT_UD && check_ud(qp, wr)))
		return EINVAL;
	if (mg_wr_is_local(wr->opcode))
		return check_local(wr);
	if (wr->opcode == MG_WR_FLUSH)
		return check_flush(qp, wr);
	if (wr->num_sge < 0 || (!inl && (uint32_t)wr->num_sge > qp->cap.max_send_sge) ||
	    (wr->num_sge && !wr->sg_list))
		return EINVAL;
	for (int i = 0; i < wr->num_sge; i++)
		*length += wr->sg_list[i].length;
	if (wr->opcode == MG_WR_ATOMIC_WRITE && *length != sizeof(uint64_t))
		return EINVAL;
	/* An ATOMIC WRITE's word has room in every request. */
	if (inl && wr->opcode != MG_WR_ATOMIC_WRITE &&
	    (mg_wr_is_answered(wr->opcode) || *length > qp->cap.max_inline_data))
		return EINVAL;
	if (*length > MAX_MESSAGE)
		return EINVAL;
	if (mg_wr_is_answered(wr->opcode) && !qp->req.n_reads)
		return EINVAL;
	if (mg_wr_is_atomic(wr->opcode)) { /* the result's place; what is beyond stays as it is */
		if (*length < sizeof(uint64_t))
			return EINVAL;
		*length = sizeof(uint64_t);
	}
	return 0;
}

/* A copy: the address handle may be gone before the request is sent. */
static void fill_ud(struct mg_qp *qp, struct mg_swqe *w, const struct ibv_send_wr *wr)
{
	const struct mg_ah *ah = mg_ah_of(wr->wr.ud.ah);

	*mg_swqe_ud(qp, w) = (struct mg_ud_dest){.src = ah->src,
						 .dst = ah->dst,
						 .qpn = wr->wr.ud.remote_qpn,
						 .qkey = wr->wr.ud.remote_qkey,
						 .sgid_index = ah->attr.grh.sgid_index,
						 .tclass = ah->attr.grh.traffic_class,
						 .hop_limit = ah->attr.grh.hop_limit};
}

static void fill_send(struct mg_qp *qp, struct mg_swqe *w, const struct ibv_send_wr *wr, uint32_t length)
{
	w->wr_id = wr->wr_id;
	w->length = length;
	w->psn = qp->req.end;
	w->n_psn = mg_wr_is_local(wr->opcode) ? 0 : qp->type == IBV_QPT_UD ? 1 : mg_packets(length, qp->mtu);
	w->opcode = (uint8_t)wr->opcode;
	w->status = IBV_WC_SUCCESS;
	w->imm = ntohl(wr->imm_data);
	w->srqn = wr->qp_type.xrc.remote_srqn & MG_QPN_MASK;
	if (qp->type == IBV_QPT_UD) {
		fill_ud(qp, w, wr);
	} else if (mg_wr_is_atomic(wr->opcode) || wr->opcode == MG_WR_FLUSH) {
		w->remote_addr = wr->wr.atomic.remote_addr;
		w->rkey = wr->wr.atomic.rkey;
		w->compare_add = wr->wr.atomic.compare_add;
		w->swap = wr->wr.atomic.swap;
	} else {
		w->remote_addr = wr->wr.rdma.remote_addr;
		w->rkey = wr->wr.rdma.rkey;
	}
	if (wr->opcode == MG_WR_FLUSH)
		w->length = (uint32_t)w->swap;
	if (wr->opcode == IBV_WR_SEND_WITH_INV)
		w->imm = wr->invalidate_rkey;
	if (wr->opcode == IBV_WR_LOCAL_INV)
		w->rkey = wr->invalidate_rkey;
	if (wr->opcode == IBV_WR_BIND_MW) {
		const struct ibv_mw_bind_info *b = &wr->bind_mw.bind_info;

		w->imm = wr->bind_mw.mw->rkey;
		w->rkey = wr->bind_mw.rkey;
		w->remote_addr = b->addr;
		w->compare_add = b->length;
		w->swap = (uint64_t)b->mw_access_flags << 32 | (b->mr ? b->mr->lkey : 0);
	}
	w->flags = (uint8_t)((wr->send_flags & IBV_SEND_SIGNALED || qp->sq_sig_all ? MG_WQE_SIGNALED : 0) |
			     (wr->send_flags & IBV_SEND_SOLICITED ? MG_WQE_SOLICITED : 0) |
			     (wr->send_flags & IBV_SEND_FENCE ? MG_WQE_FENCE : 0) |
			     (wr->send_flags & IBV_SEND_INLINE ? MG_WQE_INLINE : 0));
	w->n_sge = 0;
	if (mg_wr_is_local(wr->opcode) || wr->opcode == MG_WR_FLUSH) {
		w->flags &= (uint8_t)~MG_WQE_INLINE; /* whatever the list says: they have no data */
	} else if (w->flags & MG_WQE_INLINE) {
		uint8_t *to = w->u.inline_data;

		for (int i = 0; i < wr->num_sge; i++) {
			if (wr->sg_list[i].length)
				memcpy(to, (const void *)(uintptr_t)wr->sg_list[i].addr,
				       wr->sg_list[i].length);
			to += wr->sg_list[i].length;
		}
	} else {
		w->n_sge = (uint8_t)wr->num_sge;
		if (wr->num_sge)
			memcpy(w->u.sge, wr->sg_list, (size_t)wr->num_sge * sizeof(struct ibv_sge));
	}
	qp->req.end += w->n_psn;
}

int mg_check_send(const struct mg_qp *qp, const struct ibv_send_wr *wr)
{
	uint64_t length;
	int err = 0;

	for (; wr && !err; wr = wr->next)
		err = check_send(qp, wr, &length);
	return err;
}

static bool in_error(const struct mg_qp *qp)
{
	return qp->state == IBV_QPS_ERR || qp->state == IBV_QPS_SQE;
}

int mg_post_send(struct mg_qp *qp, mg_time now, struct ibv_send_wr *wr, struct ibv_send_wr **bad)
{
	int err = 0;

	qp->e->now = now;
	for (; wr; wr = wr->next) {
		uint64_t length;

		/* IBA 10.8.2: posting is an error before RTS; in the error states requests are flushed. */
		err = mg_qp_sends(qp) || in_error(qp) ? 0 : EINVAL;
		if (!err)
			err = check_send(qp, wr, &length);
		if (!err && qp->req.tail - qp->req.head >= qp->cap.max_send_wr)
			err = ENOMEM;
		if (err)
			break;
		fill_send(qp, mg_sq_at(qp, qp->req.tail), wr, (uint32_t)length);
		qp->req.tail++;
	}
	if (err && bad)
		*bad = wr;
	if (in_error(qp))
		mg_req_flush(qp);
	else if (qp->req.cur != qp->req.tail)
		mg_qp_ready(qp);
	return err;
}

int mg_post_recv(struct mg_qp *qp, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad)
{
	int err = 0;

	qp->e->dry = false;
	for (; wr; wr = wr->next) {
		bool none = qp->srq || qp->type == IBV_QPT_XRC_SEND || qp->type == IBV_QPT_XRC_RECV;

		err = qp->state == IBV_QPS_RESET || none ? EINVAL : mg_rq_post(&qp->rq, wr);
		if (err)
			break;
	}
	if (err && bad)
		*bad = wr;
	if (qp->state == IBV_QPS_ERR)
		mg_recv_flush(qp);
	return err;
}

int mg_post_srq_recv(struct mg_srq *srq, struct ibv_recv_wr *wr, struct ibv_recv_wr **bad)
{
	int err = 0;

	srq->e->dry = false;
	for (; wr && !err; wr = err ? wr : wr->next)
		err = mg_rq_post(&srq->rq, wr);
	if (err && bad)
		*bad = wr;
	return err;
}

uint32_t mg_qp_send_room(const struct mg_qp *qp)
{
	return qp->cap.max_send_wr - (qp->req.tail - qp->req.head);
}
