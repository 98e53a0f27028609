/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * qp_ex.c - the ibv_wr_* posting interface.
 *
 * Between ibv_wr_start and ibv_wr_complete work requests are put together here, inline data
 * copied; complete hands all of them to the engine, or none when anything was wrong. The engine
 * is not locked meanwhile: a program may take its time, and peers must be answered.
 */
#include "verbs/mgv.h"

#include <stdlib.h>

static struct mgv_qp *of(struct ibv_qp_ex *q)
{
	return mgv_container(q, struct mgv_qp, ex);
}

static void fail(struct mgv_builder *b, int err)
{
	if (!b->err)
		b->err = err;
}

/* Room for `more` elements behind the first `used`. */
static int grow(void **array, uint32_t *cap, uint32_t used, uint32_t more, size_t size)
{
	uint32_t want = *cap ? *cap : 16;
	void *p;

	if (more <= *cap - used)
		return 0;
	while (want - used < more)
		want *= 2;
	p = realloc(*array, want * size);
	if (!p)
		return ENOMEM;
	*array = p;
	*cap = want;
	return 0;
}

static int grow_wr(struct mgv_builder *b)
{
	uint32_t cap = b->cap_wr;
	int err;

	if (b->n_wr < cap)
		return 0;
	err = grow((void **)&b->piece, &cap, b->n_wr, 1, sizeof(*b->piece));
	if (!err)
		err = grow((void **)&b->wr, &b->cap_wr, b->n_wr, 1, sizeof(*b->wr));
	return err;
}

/* ---- the requests ------------------------------------------------------------------------------------ */

/* A new work request, or NULL after an error. */
static struct ibv_send_wr *add(struct mgv_qp *qp, enum ibv_wr_opcode opcode)
{
	struct mgv_builder *b = &qp->b;
	struct ibv_send_wr *wr;

	if (b->err)
		return NULL;
	if (b->n_wr == qp->cap.max_send_wr) {
		fail(b, ENOMEM);
		return NULL;
	}
	if (grow_wr(b)) {
		fail(b, ENOMEM);
		return NULL;
	}
	b->piece[b->n_wr] = (struct mgv_piece){.sge = b->n_sge};
	wr = &b->wr[b->n_wr++];
	memset(wr, 0, sizeof(*wr));
	wr->wr_id = qp->ex.wr_id;
	wr->send_flags = qp->ex.wr_flags & ~(unsigned)IBV_SEND_INLINE;
	wr->opcode = opcode;
	return wr;
}

static void rdma(struct ibv_qp_ex *q, enum ibv_wr_opcode opcode, uint32_t rkey, uint64_t addr, __be32 imm)
{
	struct ibv_send_wr *wr = add(of(q), opcode);

	if (!wr)
		return;
	wr->imm_data = imm;
	wr->wr.rdma.remote_addr = addr;
	wr->wr.rdma.rkey = rkey;
}

static void wr_rdma_read(struct ibv_qp_ex *q, uint32_t rkey, uint64_t addr)
{
	rdma(q, IBV_WR_RDMA_READ, rkey, addr, 0);
}

static void wr_rdma_write(struct ibv_qp_ex *q, uint32_t rkey, uint64_t addr)
{
	rdma(q, IBV_WR_RDMA_WRITE, rkey, addr, 0);
}

static void wr_rdma_write_imm(struct ibv_qp_ex *q, uint32_t rkey, uint64_t addr, __be32 imm)
{
	rdma(q, IBV_WR_RDMA_WRITE_WITH_IMM, rkey, addr, imm);
}

static void wr_send(struct ibv_qp_ex *q)
{
	add(of(q), IBV_WR_SEND);
}

static void wr_send_imm(struct ibv_qp_ex *q, __be32 imm)
{
	struct ibv_send_wr *wr = add(of(q), IBV_WR_SEND_WITH_IMM);

	if (wr)
		wr->imm_data = imm;
}

static void atomic(struct ibv_qp_ex *q, enum ibv_wr_opcode opcode, uint32_t rkey, uint64_t addr,
		   uint64_t compare_add, uint64_t swap)
{
	struct ibv_send_wr *wr = add(of(q), opcode);

	if (!wr)
		return;
	wr->wr.atomic.remote_addr = addr;
	wr->wr.atomic.rkey = rkey;
	wr->wr.atomic.compare_add = compare_add;
	wr->wr.atomic.swap = swap;
}

static void wr_atomic_cmp_swp(struct ibv_qp_ex *q, uint32_t rkey, uint64_t addr, uint64_t compare,
			      uint64_t swap)
{
	atomic(q, IBV_WR_ATOMIC_CMP_AND_SWP, rkey, addr, compare, swap);
}

static void wr_atomic_fetch_add(struct ibv_qp_ex *q, uint32_t rkey, uint64_t addr, uint64_t add_val)
{
	atomic(q, IBV_WR_ATOMIC_FETCH_AND_ADD, rkey, addr, add_val, 0);
}

static void wr_send_inv(struct ibv_qp_ex *q, uint32_t rkey)
{
	struct ibv_send_wr *wr = add(of(q), IBV_WR_SEND_WITH_INV);

	if (wr)
		wr->invalidate_rkey = rkey;
}

/* Requests that have no data, or have it already: none may be set (ibv_wr_post(3)). */
static struct ibv_send_wr *add_whole(struct ibv_qp_ex *q, enum ibv_wr_opcode opcode)
{
	struct mgv_builder *b = &of(q)->b;
	struct ibv_send_wr *wr = add(of(q), opcode);

	if (wr)
		b->piece[b->n_wr - 1].set = true;
	return wr;
}

static void wr_local_inv(struct ibv_qp_ex *q, uint32_t rkey)
{
	struct ibv_send_wr *wr = add_whole(q, IBV_WR_LOCAL_INV);

	if (wr)
		wr->invalidate_rkey = rkey;
}

static void wr_bind_mw(struct ibv_qp_ex *q, struct ibv_mw *mw, uint32_t rkey,
		       const struct ibv_mw_bind_info *info)
{
	struct ibv_send_wr *wr = add_whole(q, IBV_WR_BIND_MW);

	if (!wr)
		return;
	wr->bind_mw.mw = mw;
	wr->bind_mw.rkey = rkey;
	if (info)
		wr->bind_mw.bind_info = *info;
}

typedef void (*flush_fn)(struct ibv_qp_ex *, uint32_t, uint64_t, size_t, uint8_t, uint8_t);

/* As mg_post_send wants it: see check_flush there. */
static void wr_flush(struct ibv_qp_ex *q, uint32_t rkey, uint64_t addr, size_t len, uint8_t type,
		     uint8_t level)
{
	struct ibv_send_wr *wr = add_whole(q, (enum ibv_wr_opcode)MG_WR_FLUSH);

	if (!wr)
		return;
	wr->wr.atomic.remote_addr = addr;
	wr->wr.atomic.rkey = rkey;
	wr->wr.atomic.compare_add = (uint64_t)level << 8 | type;
	wr->wr.atomic.swap = len;
}

/* ---- what our QPs do not do: the batch fails ------------------------------------------------------------ */

static void wr_unsupported(struct ibv_qp_ex *q)
{
	fail(&of(q)->b, EOPNOTSUPP);
}
static void wr_send_tso(struct ibv_qp_ex *q, void *hdr, uint16_t hdr_sz, uint16_t mss)
{
	wr_unsupported(q);
}

/* Of the latest request (ibv_wr_post(3)). */
static void wr_set_ud_addr(struct ibv_qp_ex *q, struct ibv_ah *ah, uint32_t qpn, uint32_t qkey)
{
	struct mgv_builder *b = &of(q)->b;

	if (b->err)
		return;
	if (!b->n_wr || q->qp_base.qp_type != IBV_QPT_UD || !ah || !mgv_is_ours(ah->context)) {
		fail(b, EINVAL);
		return;
	}
	b->wr[b->n_wr - 1].wr.ud.ah = ah;
	b->wr[b->n_wr - 1].wr.ud.remote_qpn = qpn;
	b->wr[b->n_wr - 1].wr.ud.remote_qkey = qkey;
}

static void wr_set_xrc_srqn(struct ibv_qp_ex *q, uint32_t srqn)
{
	struct mgv_builder *b = &of(q)->b;

	if (b->err)
		return;
	if (!b->n_wr || q->qp_base.qp_type != IBV_QPT_XRC_SEND)
		fail(b, EINVAL);
	else
		b->wr[b->n_wr - 1].qp_type.xrc.remote_srqn = srqn;
}

/* ---- the data ------------------------------------------------------------------------------------------- */

/* The request that data is being set for; data may be set once (ibv_wr_post(3)). */
static struct mgv_piece *current(struct mgv_builder *b)
{
	if (b->err)
		return NULL;
	if (!b->n_wr || b->piece[b->n_wr - 1].set) {
		fail(b, EINVAL);
		return NULL;
	}
	b->piece[b->n_wr - 1].set = true;
	return &b->piece[b->n_wr - 1];
}

static void wr_set_sge_list(struct ibv_qp_ex *q, size_t num_sge, const struct ibv_sge *sg_list)
{
	struct mgv_qp *qp = of(q);
	struct mgv_builder *b = &qp->b;
	struct mgv_piece *p = current(b);

	if (!p)
		return;
	if (num_sge > qp->cap.max_send_sge) {
		fail(b, EINVAL);
		return;
	}
	if (grow((void **)&b->sge, &b->cap_sge, b->n_sge, (uint32_t)num_sge, sizeof(*b->sge))) {
		fail(b, ENOMEM);
		return;
	}
	if (num_sge)
		memcpy(b->sge + b->n_sge, sg_list, num_sge * sizeof(*sg_list));
	p->n_sge = (uint32_t)num_sge;
	b->n_sge += (uint32_t)num_sge;
}

static void wr_set_sge(struct ibv_qp_ex *q, uint32_t lkey, uint64_t addr, uint32_t length)
{
	struct ibv_sge sge = {.addr = addr, .length = length, .lkey = lkey};

	wr_set_sge_list(q, 1, &sge);
}

static bool is_atomic(enum ibv_wr_opcode opcode)
{
	return opcode == IBV_WR_ATOMIC_CMP_AND_SWP || opcode == IBV_WR_ATOMIC_FETCH_AND_ADD;
}

/* Take `num_buf` pieces, at most `left` bytes, into *p (NULL: nothing was begun). */
static void copy_inline(struct mgv_builder *b, struct mgv_piece *p, size_t num_buf,
			const struct ibv_data_buf *buf, uint32_t left)
{
	if (!p)
		return;
	if (grow((void **)&b->bytes, &b->cap_bytes, b->n_bytes, left, 1) ||
	    grow((void **)&b->sge, &b->cap_sge, b->n_sge, 1, sizeof(*b->sge))) {
		fail(b, ENOMEM);
		return;
	}
	p->is_inline = true;
	p->bytes_off = b->n_bytes;
	for (size_t i = 0; i < num_buf; i++) {
		if (buf[i].length > left) {
			fail(b, EINVAL);
			return;
		}
		if (buf[i].length)
			memcpy(b->bytes + b->n_bytes, buf[i].addr, buf[i].length);
		left -= (uint32_t)buf[i].length;
		b->n_bytes += (uint32_t)buf[i].length;
	}
	p->bytes = b->n_bytes - p->bytes_off;
	p->n_sge = 1;
	b->n_sge++; /* its entry is filled at the end: `bytes` may move */
}

static void wr_set_inline_data_list(struct ibv_qp_ex *q, size_t num_buf, const struct ibv_data_buf *buf)
{
	struct mgv_qp *qp = of(q);
	struct mgv_builder *b = &qp->b;
	struct mgv_piece *p = current(b);

	if (p && (b->wr[b->n_wr - 1].opcode == IBV_WR_RDMA_READ || is_atomic(b->wr[b->n_wr - 1].opcode)))
		fail(b, EINVAL); /* data comes back: it needs a place */
	else
		copy_inline(b, p, num_buf, buf, qp->cap.max_inline_data);
}

static void wr_set_inline_data(struct ibv_qp_ex *q, void *addr, size_t length)
{
	struct ibv_data_buf buf = {.addr = addr, .length = length};

	wr_set_inline_data_list(q, 1, &buf);
}

static void wr_atomic_write(struct ibv_qp_ex *q, uint32_t rkey, uint64_t addr, const void *data)
{
	struct mgv_builder *b = &of(q)->b;

	rdma(q, (enum ibv_wr_opcode)MG_WR_ATOMIC_WRITE, rkey, addr, 0);
	copy_inline(b, current(b), 1, &(struct ibv_data_buf){(void *)(uintptr_t)data, sizeof(uint64_t)},
		    sizeof(uint64_t));
}

/* ---- the batch ------------------------------------------------------------------------------------------- */

static void wr_start(struct ibv_qp_ex *q)
{
	struct mgv_builder *b = &of(q)->b;

	pthread_mutex_lock(&b->lock);
	b->n_wr = b->n_sge = b->n_bytes = 0;
	b->err = 0;
}

static void wr_abort(struct ibv_qp_ex *q)
{
	pthread_mutex_unlock(&of(q)->b.lock);
}

/* Indices become pointers, now that nothing moves any more. */
static void link_up(struct mgv_builder *b)
{
	for (uint32_t i = 0; i < b->n_wr; i++) {
		const struct mgv_piece *p = &b->piece[i];
		struct ibv_send_wr *wr = &b->wr[i];

		wr->sg_list = b->sge + p->sge;
		wr->num_sge = (int)p->n_sge;
		wr->next = i + 1 < b->n_wr ? wr + 1 : NULL;
		if (p->is_inline) {
			wr->send_flags |= IBV_SEND_INLINE;
			b->sge[p->sge] = (struct ibv_sge){.addr = (uintptr_t)b->bytes + p->bytes_off,
							  .length = p->bytes};
		}
	}
}

static int wr_complete(struct ibv_qp_ex *q)
{
	struct mgv_qp *qp = of(q);
	struct mgv_builder *b = &qp->b;
	struct ibv_send_wr *bad;
	int err = b->err;

	if (!err && b->n_wr) {
		link_up(b);
		mg_device_lock(qp->dev);
		if (b->n_wr > mg_qp_send_room(qp->mg))
			err = ENOMEM;
		else if (b->n_wr > 1) /* all or none */
			err = mg_check_send(qp->mg, b->wr);
		if (!err)
			err = mg_post_send(qp->mg, mg_now(), b->wr, &bad);
		mg_net_flush(qp->dev, MG_TX_LAZY);
		mg_device_unlock(qp->dev);
	}
	pthread_mutex_unlock(&b->lock);
	return err;
}

void mgv_qp_ex_init(struct mgv_qp *qp)
{
	struct ibv_qp_ex *q = &qp->ex;

	pthread_mutex_init(&qp->b.lock, NULL);
	q->wr_atomic_cmp_swp = wr_atomic_cmp_swp;
	q->wr_atomic_fetch_add = wr_atomic_fetch_add;
	q->wr_bind_mw = wr_bind_mw;
	q->wr_local_inv = wr_local_inv;
	q->wr_rdma_read = wr_rdma_read;
	q->wr_rdma_write = wr_rdma_write;
	q->wr_rdma_write_imm = wr_rdma_write_imm;
	q->wr_send = wr_send;
	q->wr_send_imm = wr_send_imm;
	q->wr_send_inv = wr_send_inv;
	q->wr_send_tso = wr_send_tso;
	q->wr_set_ud_addr = wr_set_ud_addr;
	q->wr_set_xrc_srqn = wr_set_xrc_srqn;
	q->wr_set_inline_data = wr_set_inline_data;
	q->wr_set_inline_data_list = wr_set_inline_data_list;
	q->wr_set_sge = wr_set_sge;
	q->wr_set_sge_list = wr_set_sge_list;
	q->wr_start = wr_start;
	q->wr_complete = wr_complete;
	q->wr_abort = wr_abort;
	q->wr_atomic_write = wr_atomic_write;
	for (unsigned i = 0; i < MGV_QP_SPARE; i++)
		qp->spare[i] = wr_unsupported;
	/* ibv_qp_ex ends with wr_atomic_write until rdma-core 46, whose programs find wr_flush behind it. */
	*(flush_fn *)(void *)((char *)qp + offsetof(struct mgv_qp, ex.wr_atomic_write) + sizeof(flush_fn)) =
		wr_flush;
}

void mgv_qp_ex_free(struct mgv_qp *qp)
{
	pthread_mutex_destroy(&qp->b.lock);
	free(qp->b.wr);
	free(qp->b.piece);
	free(qp->b.sge);
	free(qp->b.bytes);
}
