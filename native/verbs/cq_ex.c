/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * cq_ex.c - extended CQs: start_poll, next_poll, end_poll and the readers.
 *
 * One completion at a time is taken from the engine, so that what has not been read stays where
 * ibv_poll_cq, resize and destroy find it. The poll lock is held from a successful start_poll to
 * end_poll, as the verb's contract has it.
 */
#include "verbs/mgv.h"

#include <time.h>

static struct mgv_cq *of(struct ibv_cq_ex *c)
{
	return mgv_container(c, struct mgv_cq, ib);
}

/* 0 or ENOENT */
static int fetch_one(struct mgv_cq *cq)
{
	int got;

	mg_device_lock(cq->dev);
	got = mgv_cq_fetch(cq, 1, &cq->wc);
	cq->stamp = mg_cq_stamp_polled(cq->mg);
	mg_device_unlock(cq->dev);
	if (!got)
		mg_net_relax(cq->dev);
	if (got <= 0)
		return ENOENT;
	cq->ib.wr_id = cq->wc.wr_id;
	cq->ib.status = cq->wc.status;
	return 0;
}

static int start_poll(struct ibv_cq_ex *c, struct ibv_poll_cq_attr *attr)
{
	struct mgv_cq *cq = of(c);
	int err;

	if (attr && attr->comp_mask)
		return EINVAL;
	pthread_mutex_lock(&cq->poll_lock);
	err = fetch_one(cq);
	if (err)
		pthread_mutex_unlock(&cq->poll_lock);
	return err;
}

static int next_poll(struct ibv_cq_ex *c)
{
	return fetch_one(of(c));
}

static void end_poll(struct ibv_cq_ex *c)
{
	pthread_mutex_unlock(&of(c)->poll_lock);
}

static enum ibv_wc_opcode read_opcode(struct ibv_cq_ex *c)
{
	return of(c)->wc.opcode;
}

static uint32_t read_vendor_err(struct ibv_cq_ex *c)
{
	return of(c)->wc.vendor_err;
}

static uint32_t read_byte_len(struct ibv_cq_ex *c)
{
	return of(c)->wc.byte_len;
}

static __be32 read_imm_data(struct ibv_cq_ex *c)
{
	return of(c)->wc.imm_data;
}

static uint32_t read_qp_num(struct ibv_cq_ex *c)
{
	return of(c)->wc.qp_num;
}

static uint32_t read_src_qp(struct ibv_cq_ex *c)
{
	return of(c)->wc.src_qp;
}

static unsigned int read_wc_flags(struct ibv_cq_ex *c)
{
	return of(c)->wc.wc_flags;
}

static uint32_t read_slid(struct ibv_cq_ex *c)
{
	return of(c)->wc.slid;
}

static uint8_t read_sl(struct ibv_cq_ex *c)
{
	return of(c)->wc.sl;
}

static uint8_t read_dlid_path_bits(struct ibv_cq_ex *c)
{
	return of(c)->wc.dlid_path_bits;
}

/* The device's clock counts ns (ibv_query_rt_values_ex): when the packet's batch was looked at. */
static uint64_t read_completion_ts(struct ibv_cq_ex *c)
{
	return of(c)->stamp;
}

static uint64_t ns(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t read_wallclock(struct ibv_cq_ex *c)
{
	return of(c)->stamp ? ns(CLOCK_REALTIME) - (ns(CLOCK_MONOTONIC) - of(c)->stamp) : 0;
}

/* Not to be asked for (creation refuses the flags), and answered by zeros if asked all the same. */
static uint32_t read_zero32(struct ibv_cq_ex *c)
{
	return 0;
}
static uint16_t read_zero16(struct ibv_cq_ex *c)
{
	return 0;
}
static void read_tm_info(struct ibv_cq_ex *c, struct ibv_wc_tm_info *info)
{
	memset(info, 0, sizeof(*info));
}

void mgv_cq_ex_init(struct mgv_cq *cq)
{
	struct ibv_cq_ex *c = &cq->ib;

	c->start_poll = start_poll;
	c->next_poll = next_poll;
	c->end_poll = end_poll;
	c->read_opcode = read_opcode;
	c->read_vendor_err = read_vendor_err;
	c->read_byte_len = read_byte_len;
	c->read_imm_data = read_imm_data;
	c->read_qp_num = read_qp_num;
	c->read_src_qp = read_src_qp;
	c->read_wc_flags = read_wc_flags;
	c->read_slid = read_slid;
	c->read_sl = read_sl;
	c->read_dlid_path_bits = read_dlid_path_bits;
	c->read_completion_ts = read_completion_ts;
	c->read_cvlan = read_zero16;
	c->read_flow_tag = read_zero32;
	c->read_tm_info = read_tm_info;
	c->read_completion_wallclock_ns = read_wallclock;
}
