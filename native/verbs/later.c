/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * later.c - exported calls that our device does not carry out (yet): an error for our objects, the
 * real library for others. Calls whose object only an unsupported call could have made (a device
 * memory, an imported handle) are not exported at all, see tests/verbs/symbols.txt.
 */
#include "verbs/forward.h"
#include "verbs/mgv.h"

/* ---- enhanced connection establishment --------------------------- */

MGV_EXPORT int ibv_set_ece(struct ibv_qp *qp, struct ibv_ece *ece)
{
	return mgv_is_ours(qp->context) ? EOPNOTSUPP : MGV_FORWARD_INT(ibv_set_ece, qp, ece);
}

MGV_EXPORT int ibv_query_ece(struct ibv_qp *qp, struct ibv_ece *ece)
{
	return mgv_is_ours(qp->context) ? EOPNOTSUPP : MGV_FORWARD_INT(ibv_query_ece, qp, ece);
}

/* Packets are placed in order, the bytes within one by memcpy in any order: no promise. */
MGV_EXPORT int ibv_query_qp_data_in_order(struct ibv_qp *qp, enum ibv_wr_opcode op, uint32_t flags)
{
	__typeof__(&ibv_query_qp_data_in_order) real;

	if (mgv_is_ours(qp->context))
		return 0;
	real = MGV_REAL(ibv_query_qp_data_in_order);
	return real ? real(qp, op, flags) : 0;
}

/* ---- newer than the oldest header we build with: declared here, named by asm labels ------------------ */

#define NEWER_PTR(fn, name, ...)                             \
	({                                                   \
		__typeof__(&fn) mgv_fn;                      \
                                                             \
		errno = EOPNOTSUPP;                          \
		mgv_fn = MGV_REAL_AS(__typeof__(&fn), name); \
		mgv_fn ? mgv_fn(__VA_ARGS__) : NULL;         \
	})
#define NEWER_INT(fn, name, ...)                             \
	({                                                   \
		__typeof__(&fn) mgv_fn;                      \
                                                             \
		mgv_fn = MGV_REAL_AS(__typeof__(&fn), name); \
		mgv_fn ? mgv_fn(__VA_ARGS__) : EOPNOTSUPP;   \
	})

/* rdma-core 58 */
MGV_EXPORT void *mgv_alloc_dmah(struct ibv_context *c, void *attr) __asm__("ibv_alloc_dmah");
void *mgv_alloc_dmah(struct ibv_context *c, void *attr)
{
	errno = EOPNOTSUPP;
	return mgv_is_ours(c) ? NULL : NEWER_PTR(mgv_alloc_dmah, "ibv_alloc_dmah", c, attr);
}

/* rdma-core 65 */
MGV_EXPORT int mgv_comp_cntr_caps(struct ibv_context *c, void *caps,
				  size_t size) __asm__("_ibv_query_comp_cntr_caps");
int mgv_comp_cntr_caps(struct ibv_context *c, void *caps, size_t size)
{
	return mgv_is_ours(c) ? EOPNOTSUPP
			      : NEWER_INT(mgv_comp_cntr_caps, "_ibv_query_comp_cntr_caps", c, caps, size);
}

MGV_EXPORT void *mgv_create_comp_cntr(struct ibv_context *c, void *attr) __asm__("ibv_create_comp_cntr");
void *mgv_create_comp_cntr(struct ibv_context *c, void *attr)
{
	errno = EOPNOTSUPP;
	return mgv_is_ours(c) ? NULL : NEWER_PTR(mgv_create_comp_cntr, "ibv_create_comp_cntr", c, attr);
}

MGV_EXPORT int mgv_qp_attach_comp_cntr(struct ibv_qp *qp, void *cntr,
				       void *attr) __asm__("ibv_qp_attach_comp_cntr");
int mgv_qp_attach_comp_cntr(struct ibv_qp *qp, void *cntr, void *attr)
{
	return mgv_is_ours(qp->context)
		       ? EOPNOTSUPP
		       : NEWER_INT(mgv_qp_attach_comp_cntr, "ibv_qp_attach_comp_cntr", qp, cntr, attr);
}
