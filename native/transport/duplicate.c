/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * duplicate.c - requests that were executed already and come again (IBA 9.7.5.1.4): a SEND or WRITE is
 * acknowledged again, a READ or atomic answered again from the replay record, never executed twice.
 */
#include "transport/responder.h"

void mg_resp_record(struct mg_responder *r, const struct mg_resource *res)
{
	r->res[r->res_next] = *res;
	r->res_next = (r->res_next + 1) % r->n_res;
}

struct mg_resource mg_resp_named(const struct mg_hdrs *h)
{
	struct mg_resource res = {.first_psn = h->psn, .last_psn = h->psn, .opcode = h->opcode};

	if (h->mask & MG_H_RETH) {
		res.va = h->reth.va;
		res.rkey = h->reth.rkey;
		res.length = h->reth.length;
	} else {
		res.va = h->atomic.va;
		res.rkey = h->atomic.rkey;
		res.length = sizeof(res.atomic_orig);
	}
	return res;
}

/*
 * The requester has gone back to `psn`: it will ask again for whatever was still to come from
 * there. False: there is no room, which only happens when it asks for more than we granted.
 */
static bool restart_jobs(struct mg_responder *r, uint32_t psn)
{
	while (r->job_fill &&
	       mg_psn_diff(r->jobs[(r->job_head + r->job_fill - 1) % r->n_jobs].last_psn, psn) >= 0)
		r->job_fill--;
	return r->job_fill < r->n_jobs;
}

/*
 * A READ or atomic comes again and is answered: that acknowledges what came before it. A requester that goes
 * back asks for all of it in one go, and an ACK among the answers does harm (see `acknowledge_again`).
 */
static void answered_again(struct mg_responder *r, uint32_t psn)
{
	if (r->dup_pending && mg_psn_diff(psn, r->dup_psn) > 0)
		r->dup_pending = false;
	r->dup_left = false;
}

static void duplicate_read(struct mg_qp *qp, const struct mg_hdrs *h)
{
	struct mg_responder *r = &qp->resp;
	uint32_t n = mg_packets(h->reth.length, qp->mtu);

	for (uint32_t i = 0; i < r->n_res; i++) {
		const struct mg_resource *s = &r->res[i];
		int32_t skip = mg_psn_diff(h->psn, s->first_psn);

		if (s->opcode != MG_OP_READ_REQ || skip < 0 ||
		    mg_psn_diff((h->psn + n - 1) & MG_PSN_MASK, s->last_psn) > 0)
			continue;
		if (s->rkey != h->reth.rkey || h->reth.va != s->va + (uint64_t)skip * qp->mtu ||
		    (uint64_t)skip * qp->mtu + h->reth.length > s->length)
			return; /* not what was asked before: dropped */
		if (!mg_resp_read_allowed(qp, h)) {
			mg_resp_deny_again(qp, h->psn);
			return;
		}
		if (restart_jobs(r, h->psn)) {
			mg_resp_add_job(qp, (h->psn + n - 1) & MG_PSN_MASK, h, 0)->again = true;
			answered_again(r, h->psn);
		}
		return;
	}
}

/* Its recorded result, never a second execution (IBA C9-105). */
static void duplicate_atomic(struct mg_qp *qp, const struct mg_hdrs *h)
{
	struct mg_resource same = mg_resp_named(h);
	struct mg_responder *r = &qp->resp;

	for (uint32_t i = 0; i < r->n_res; i++) {
		const struct mg_resource *s = &r->res[i];

		if (s->opcode != h->opcode || s->first_psn != h->psn)
			continue;
		if (s->rkey == same.rkey && s->va == same.va && restart_jobs(r, h->psn)) {
			mg_resp_add_job(qp, h->psn, h, s->atomic_orig)->again = true;
			answered_again(r, h->psn);
		}
		return;
	}
}

/*
 * A requester that does not know us may have a part of the answer of a READ behind this request: the ACK of
 * something before it ends the READ in rdma_rxe, with SUCCESS. Whoever goes back here asks for the READ as well,
 * whose answer says as much as the ACK. So the ACK is left to it, until the request comes again without the READ.
 */
static bool left_to_the_read(struct mg_responder *r, uint32_t psn)
{
	if (r->dup_left && mg_psn_diff(psn, r->dup_left_psn) <= 0)
		return false;
	r->dup_left = true;
	r->dup_left_psn = psn;
	return true;
}

/*
 * All that was executed is acknowledged, unless a READ or atomic is between: an ACK beyond it says that
 * its answer is lost (IBA 9.7.5.2.8), while it is about to be asked for again and answered. rdma_rxe goes
 * back once more for that.
 */
static void acknowledge_again(struct mg_qp *qp, uint32_t psn)
{
	struct mg_responder *r = &qp->resp;
	uint32_t named = r->ack_psn;
	bool long_read = false;

	for (uint32_t i = 0; i < r->n_res; i++) {
		const struct mg_resource *s = &r->res[i];

		if (!s->opcode || mg_psn_diff(s->first_psn, psn) < 0)
			continue;
		long_read |= s->opcode == MG_OP_READ_REQ && s->first_psn != s->last_psn;
		if (mg_psn_diff(r->ack_psn, s->first_psn) > 0)
			named = psn;
	}
	if (long_read && !mg_mig_peer_is_ours(qp) && left_to_the_read(r, psn))
		return;
	r->dup_pending = true;
	r->dup_psn = named;
	mg_qp_ready(qp);
}

void mg_resp_duplicate(struct mg_qp *qp, const struct mg_hdrs *h)
{
	qp->duplicates++;
	qp->e->counters[MG_CNT_DUPLICATES]++;
	if (h->opcode == MG_OP_READ_REQ) {
		duplicate_read(qp, h);
		return;
	}
	if (h->mask & MG_P_ANSWERED) {
		duplicate_atomic(qp, h);
		return;
	}
	acknowledge_again(qp, h->psn);
}
