/* SPDX-License-Identifier: BSD-3-Clause */
/* mr.c - memory regions. Nothing is pinned: the engine copies through the process's own
 * mapping, and net/guard.c sees to what has been unmapped since. */
#include "verbs/forward.h"
#include "verbs/mgv.h"

#include <stdlib.h>

#define REMOTE_WRITERS (IBV_ACCESS_REMOTE_WRITE | IBV_ACCESS_REMOTE_ATOMIC)
#define KNOWN                                                                                            \
	(IBV_ACCESS_LOCAL_WRITE | REMOTE_WRITERS | IBV_ACCESS_REMOTE_READ | IBV_ACCESS_MW_BIND |         \
	 IBV_ACCESS_ZERO_BASED | IBV_ACCESS_ON_DEMAND | IBV_ACCESS_HUGETLB | IBV_ACCESS_OPTIONAL_RANGE | \
	 MG_ACCESS_FLUSH_GLOBAL)

/* What the kernel would check before a driver sees the registration. */
static int check_mr(const void *addr, size_t length, unsigned access)
{
	if (access & ~(unsigned)KNOWN)
		return EOPNOTSUPP;
	if (access & IBV_ACCESS_ON_DEMAND) /* the device reports no ODP */
		return EOPNOTSUPP;
	if ((access & REMOTE_WRITERS) && !(access & IBV_ACCESS_LOCAL_WRITE))
		return EINVAL;
	if (!length || (uintptr_t)addr + length < (uintptr_t)addr)
		return EINVAL;
	return mgv_check_mapped(addr, length, access & IBV_ACCESS_LOCAL_WRITE);
}

static uint64_t base(uint64_t iova, unsigned access)
{
	return access & IBV_ACCESS_ZERO_BASED ? 0 : iova;
}

static unsigned access_of(unsigned access)
{
	return access & (IBV_ACCESS_LOCAL_WRITE | REMOTE_WRITERS | IBV_ACCESS_REMOTE_READ |
			 IBV_ACCESS_MW_BIND | MG_ACCESS_FLUSH_GLOBAL);
}

static void mr_fill(struct mgv_mr *mr, struct mgv_pd *pd, void *addr, size_t length, uint64_t iova,
		    unsigned access, struct mg_mr *mg)
{
	mr->mg = mg;
	mr->iova = iova;
	mr->access = access;
	mr->ib.context = pd->ib.context;
	mr->ib.pd = &pd->ib;
	mr->ib.addr = addr;
	mr->ib.length = length;
	mr->ib.lkey = mg_mr_lkey(mg);
	mr->ib.rkey = mg_mr_rkey(mg);
}

struct ibv_mr *mgv_reg_mr(struct ibv_pd *ibpd, void *addr, size_t length, uint64_t iova, unsigned access)
{
	struct mgv_context *ctx = mgv_ctx(ibpd->context);
	struct mgv_pd *pd = mgv_pd(ibpd);
	struct mgv_mr *mr = NULL;
	struct mg_mr *mg;
	int err;

	err = check_mr(addr, length, access);
	if (err)
		goto err;
	mr = calloc(1, sizeof(*mr));
	if (!mr) {
		err = ENOMEM;
		goto err;
	}
	mg_device_lock(ctx->dev);
	err = mg_mr_create(pd->mg, addr, length, base(iova, access), access_of(access), &mg);
	if (!err) {
		mr_fill(mr, pd, addr, length, iova, access, mg);
		mr->ib.handle = mgv_handle(ctx);
		mgv_list_add(&ctx->mrs, &mr->link);
	}
	mg_device_unlock(ctx->dev);
	if (!err)
		return &mr->ib;
err:
	free(mr);
	errno = err;
	return NULL;
}

MGV_EXPORT struct ibv_mr *ibv_reg_mr(struct ibv_pd *pd, void *addr, size_t length, int access)
{
	if (!mgv_is_ours(pd->context))
		return MGV_FORWARD_PTR(ibv_reg_mr, pd, addr, length, access);
	return mgv_reg_mr(pd, addr, length, (uintptr_t)addr, (unsigned)access);
}

MGV_EXPORT struct ibv_mr *ibv_reg_mr_iova(struct ibv_pd *pd, void *addr, size_t length, uint64_t iova,
					  int access)
{
	if (!mgv_is_ours(pd->context))
		return MGV_FORWARD_PTR(ibv_reg_mr_iova, pd, addr, length, iova, access);
	return mgv_reg_mr(pd, addr, length, iova, (unsigned)access);
}

MGV_EXPORT struct ibv_mr *ibv_reg_mr_iova2(struct ibv_pd *pd, void *addr, size_t length, uint64_t iova,
					   unsigned int access)
{
	if (!mgv_is_ours(pd->context))
		return MGV_FORWARD_PTR(ibv_reg_mr_iova2, pd, addr, length, iova, access);
	return mgv_reg_mr(pd, addr, length, iova, access);
}

MGV_EXPORT struct ibv_mr *ibv_reg_dmabuf_mr(struct ibv_pd *pd, uint64_t offset, size_t length, uint64_t iova,
					    int fd, int access)
{
	if (!mgv_is_ours(pd->context))
		return MGV_FORWARD_PTR(ibv_reg_dmabuf_mr, pd, offset, length, iova, fd, access);
	errno = EOPNOTSUPP;
	return NULL;
}

/*
 * rdma-core >= 58: ibv_reg_mr_ex(pd, attr). Declared here because older headers lack it; perftest
 * 25 uses it for every registration where its libibverbs has it.
 */
struct reg_mr_ex_attr {
	size_t length;
	int access;
	uint64_t comp_mask;
	uint64_t iova;
	void *addr;
	int fd; /* this, fd_offset and dmah: refused by comp_mask */
	uint64_t fd_offset;
	void *dmah;
	struct mgv_buf *buf; /* from rdma-core 64 on */
};
#define REG_MR_EX_IOVA (1ull << 0)
#define REG_MR_EX_ADDR (1ull << 1)
#define REG_MR_EX_BUF (1ull << 5)

MGV_EXPORT struct ibv_mr *mgv_reg_mr_ex(struct ibv_pd *pd,
					struct reg_mr_ex_attr *attr) __asm__("ibv_reg_mr_ex");
struct ibv_mr *mgv_reg_mr_ex(struct ibv_pd *pd, struct reg_mr_ex_attr *attr)
{
	if (!mgv_is_ours(pd->context)) {
		__typeof__(&mgv_reg_mr_ex) real = MGV_REAL_AS(__typeof__(&mgv_reg_mr_ex), "ibv_reg_mr_ex");

		if (real)
			return real(pd, attr);
		errno = ENOSYS;
		return NULL;
	}
	if (attr->comp_mask & ~(REG_MR_EX_IOVA | REG_MR_EX_ADDR | REG_MR_EX_BUF)) {
		errno = EOPNOTSUPP;
		return NULL;
	}
	if (!(attr->comp_mask & REG_MR_EX_ADDR) ||
	    (attr->comp_mask & REG_MR_EX_BUF &&
	     (!attr->buf || !mgv_buf_holds(attr->buf, pd, attr->addr, attr->length)))) {
		errno = EINVAL;
		return NULL;
	}
	return mgv_reg_mr(pd, attr->addr, attr->length,
			  attr->comp_mask & REG_MR_EX_IOVA ? attr->iova : (uintptr_t)attr->addr,
			  (unsigned)attr->access);
}

/*
 * The keys stay, as with the kernel's driver. On failure the old region stays as it was, which
 * libibverbs calls IBV_REREG_MR_ERR_INPUT.
 */
MGV_EXPORT int ibv_rereg_mr(struct ibv_mr *ibmr, int flags, struct ibv_pd *ibpd, void *addr, size_t length,
			    int access)
{
	struct mgv_context *ctx;
	struct mgv_mr *mr;
	struct mgv_pd *pd;
	uint64_t iova;
	int err;

	if (!mgv_is_ours(ibmr->context))
		return MGV_FORWARD_NEG(ibv_rereg_mr, ibmr, flags, ibpd, addr, length, access);
	ctx = mgv_ctx(ibmr->context);
	mr = mgv_mr(ibmr);
	pd = mgv_pd(ibmr->pd);
	iova = (uintptr_t)addr;
	err = EINVAL;
	if (!flags || (flags & ~IBV_REREG_MR_FLAGS_SUPPORTED) ||
	    (access && !(flags & IBV_REREG_MR_CHANGE_ACCESS)))
		goto err;
	if (flags & IBV_REREG_MR_CHANGE_PD) {
		if (!ibpd || ibpd->context != ibmr->context)
			goto err;
		pd = mgv_pd(ibpd);
	}
	if (!(flags & IBV_REREG_MR_CHANGE_TRANSLATION)) {
		addr = ibmr->addr;
		length = ibmr->length;
		iova = mr->iova;
	}
	if (!(flags & IBV_REREG_MR_CHANGE_ACCESS))
		access = (int)mr->access;
	err = check_mr(addr, length, (unsigned)access);
	if (err)
		goto err;
	mg_device_lock(ctx->dev);
	err = mg_mr_change(mr->mg, pd->mg, addr, length, base(iova, (unsigned)access),
			   access_of((unsigned)access));
	if (!err)
		mr_fill(mr, pd, addr, length, iova, (unsigned)access, mr->mg);
	mg_device_unlock(ctx->dev);
	if (!err)
		return 0;
err:
	errno = err;
	return IBV_REREG_MR_ERR_INPUT;
}

MGV_EXPORT int ibv_dereg_mr(struct ibv_mr *ibmr)
{
	struct mgv_context *ctx;
	struct mgv_mr *mr;
	int err;

	if (!mgv_is_ours(ibmr->context))
		return MGV_FORWARD_INT(ibv_dereg_mr, ibmr);
	ctx = mgv_ctx(ibmr->context);
	mr = mgv_mr(ibmr);
	mg_device_lock(ctx->dev);
	err = mg_mr_destroy(mr->mg);
	if (!err)
		mgv_list_del(&mr->link);
	mg_device_unlock(ctx->dev);
	if (!err)
		free(mr);
	return err;
}

MGV_EXPORT struct ibv_mr *ibv_import_mr(struct ibv_pd *pd, uint32_t mr_handle)
{
	if (!mgv_is_ours(pd->context))
		return MGV_FORWARD_PTR(ibv_import_mr, pd, mr_handle);
	errno = EOPNOTSUPP;
	return NULL;
}

MGV_EXPORT void ibv_unimport_mr(struct ibv_mr *mr)
{
	if (!mgv_is_ours(mr->context))
		MGV_FORWARD_VOID(ibv_unimport_mr, mr);
}

MGV_EXPORT struct ibv_dm *ibv_import_dm(struct ibv_context *context, uint32_t dm_handle)
{
	if (!mgv_is_ours(context))
		return MGV_FORWARD_PTR(ibv_import_dm, context, dm_handle);
	errno = EOPNOTSUPP;
	return NULL;
}
