/* SPDX-License-Identifier: BSD-3-Clause */
/* sge.c - between a message's byte range and the application's scatter/gather list. */
#include "transport/internal.h"

#include <errno.h>

int mg_sge_gather(struct mg_pd *pd, const struct ibv_sge *sge, uint32_t n_sge, uint32_t offset, uint32_t len,
		  struct mg_pkt *p)
{
	for (uint32_t i = 0; i < n_sge && len; i++) {
		uint32_t n;
		uint8_t *at;

		if (offset >= sge[i].length) {
			offset -= sge[i].length;
			continue;
		}
		n = sge[i].length - offset < len ? sge[i].length - offset : len;
		at = mg_mr_map(pd, sge[i].lkey, sge[i].addr + offset, n, 0);
		if (!at)
			return EFAULT;
		p->iov[p->n_iov++] = (struct iovec){.iov_base = at, .iov_len = n};
		offset = 0;
		len -= n;
	}
	return len ? EFAULT : 0;
}

int mg_sge_scatter(struct mg_pd *pd, const struct ibv_sge *sge, uint32_t n_sge, uint32_t offset,
		   const uint8_t *data, uint32_t len)
{
	for (uint32_t i = 0; i < n_sge && len; i++) {
		uint32_t n;
		uint8_t *at;

		if (offset >= sge[i].length) {
			offset -= sge[i].length;
			continue;
		}
		n = sge[i].length - offset < len ? sge[i].length - offset : len;
		at = mg_mr_map(pd, sge[i].lkey, sge[i].addr + offset, n, IBV_ACCESS_LOCAL_WRITE);
		if (!at || !mg_copy(pd->e, at, data, n))
			return EFAULT;
		data += n;
		offset = 0;
		len -= n;
	}
	return len ? EMSGSIZE : 0;
}
