/* SPDX-License-Identifier: BSD-3-Clause */
/* responder.h - what the parts of the responder share: responder.c, answer.c, duplicate.c. */
#ifndef MG_RESPONDER_H
#define MG_RESPONDER_H

#include "transport/internal.h"

/* Answer with NAK `syndrome` and end; `status`: of the receive request in use, if there is one and it is not success. */
void mg_resp_refuse(struct mg_qp *qp, uint8_t syndrome, enum ibv_wc_status status);
bool mg_resp_read_allowed(const struct mg_qp *qp, const struct mg_hdrs *h);
/*
 * What a READ that was executed before names is closed by now. A peer that still waits for the data is told so;
 * mostly it is a copy that comes late, whose answer arrived before the memory was closed: no error of ours.
 */
void mg_resp_deny_again(struct mg_qp *qp, uint32_t psn);
/* Answer a READ or atomic, up to `last_psn`, when its turn comes; orig: an atomic's result. There is room. */
struct mg_job *mg_resp_add_job(struct mg_qp *qp, uint32_t last_psn, const struct mg_hdrs *h, uint64_t orig);
/* The oldest of them is answered, or need not be. */
void mg_resp_end_job(struct mg_responder *r);

/*
 * An XRC request names a queue of its QP's domain and runs in that queue's PD (IBA annex A14). Both
 * stay NULL if there is none, and may be gone when the next request comes.
 */
void mg_resp_enter_xrc(struct mg_qp *qp, uint32_t srqn);
void mg_resp_leave_xrc(struct mg_qp *qp);

/* duplicate.c */
/* What a READ (its last PSN aside), an atomic, an ATOMIC WRITE or a FLUSH names. */
struct mg_resource mg_resp_named(const struct mg_hdrs *h);
/* Remember what was executed, in the place of what the requester cannot ask for any more. */
void mg_resp_record(struct mg_responder *r, const struct mg_resource *res);
/* A request before the expected one. */
void mg_resp_duplicate(struct mg_qp *qp, const struct mg_hdrs *h);

#endif
