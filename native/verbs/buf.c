/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * buf.c - buffers that libibverbs allocates for a program (rdma-core >= 64: ibv_alloc_buf): pages of its own
 * heap, as for rxe. Declared here because older headers lack them, named by asm labels.
 *
 * The handle is laid out as libibverbs' (its driver.h): ibv_export_buf_dmabuf_fd, which we leave to it, finds
 * no dma-buf in it and says so, and ibv_free_buf finds in any handle whose it is.
 */
#include "verbs/forward.h"
#include "verbs/mgv.h"

#include <stdlib.h>
#include <unistd.h>

struct mgv_buf {
	void *addr;
	size_t size;
	struct ibv_pd *pd;
	int dmabuf_fd;
};

MGV_EXPORT void *mgv_alloc_buf(struct ibv_pd *pd, size_t size, struct mgv_buf **out) __asm__("ibv_alloc_buf");
void *mgv_alloc_buf(struct ibv_pd *pd, size_t size, struct mgv_buf **out)
{
	__typeof__(&mgv_alloc_buf) real;
	struct mgv_buf *buf;
	void *addr = NULL;
	int err;

	if (!mgv_is_ours(pd->context)) {
		real = MGV_REAL_AS(__typeof__(&mgv_alloc_buf), "ibv_alloc_buf");
		errno = EOPNOTSUPP;
		return real ? real(pd, size, out) : NULL;
	}
	buf = malloc(sizeof(*buf));
	err = buf ? posix_memalign(&addr, (size_t)sysconf(_SC_PAGESIZE), size) : ENOMEM;
	if (err) {
		free(buf);
		errno = err;
		return NULL;
	}
	*buf = (struct mgv_buf){addr, size, pd, -1};
	*out = buf;
	return addr;
}

MGV_EXPORT void mgv_free_buf(struct mgv_buf *buf) __asm__("ibv_free_buf");
void mgv_free_buf(struct mgv_buf *buf)
{
	__typeof__(&mgv_free_buf) real;

	if (!mgv_is_ours(buf->pd->context)) {
		real = MGV_REAL_AS(__typeof__(&mgv_free_buf), "ibv_free_buf");
		if (real)
			real(buf);
		return;
	}
	free(buf->addr);
	free(buf);
}

bool mgv_buf_holds(const struct mgv_buf *buf, const struct ibv_pd *pd, const void *addr, size_t length)
{
	uintptr_t at = (uintptr_t)addr - (uintptr_t)buf->addr;

	return buf->pd == pd && (uintptr_t)addr >= (uintptr_t)buf->addr && at <= buf->size &&
	       length <= buf->size - at;
}

MGV_EXPORT struct ibv_mr *mgv_reg_buf_mr(struct ibv_pd *pd, struct mgv_buf *buf, void *addr, size_t length,
					 int access) __asm__("ibv_reg_buf_mr");
struct ibv_mr *mgv_reg_buf_mr(struct ibv_pd *pd, struct mgv_buf *buf, void *addr, size_t length, int access)
{
	__typeof__(&mgv_reg_buf_mr) real;

	if (!mgv_is_ours(pd->context)) {
		real = MGV_REAL_AS(__typeof__(&mgv_reg_buf_mr), "ibv_reg_buf_mr");
		errno = EOPNOTSUPP;
		return real ? real(pd, buf, addr, length, access) : NULL;
	}
	if (!buf || !mgv_buf_holds(buf, pd, addr, length)) {
		errno = EINVAL;
		return NULL;
	}
	return mgv_reg_mr(pd, addr, length, (uintptr_t)addr, (unsigned)access);
}
