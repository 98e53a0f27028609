/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * mapped.c - is a range of memory there? A driver learns it by pinning; we look it up, so that a
 * bad registration is EFAULT at ibv_reg_mr and not a fault in the middle of a packet.
 */
#include "verbs/mgv.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

/* Without /proc: mincore says ENOMEM for what is not mapped, and nothing about permissions. */
static int check_mincore(uintptr_t addr, size_t length)
{
	size_t page = (size_t)sysconf(_SC_PAGESIZE);
	uintptr_t end = addr + length;
	unsigned char vec[1024];

	addr &= ~(uintptr_t)(page - 1);
	while (addr < end) {
		size_t n = end - addr;

		if (n > sizeof(vec) * page)
			n = sizeof(vec) * page;
		if (mincore((void *)addr, n, vec) && errno == ENOMEM)
			return EFAULT;
		addr += n;
	}
	return 0;
}

int mgv_check_mapped(const void *addr, size_t length, bool write)
{
	uintptr_t at = (uintptr_t)addr, end = at + length;
	int err = EFAULT;
	char line[512];
	FILE *maps;

	maps = fopen("/proc/self/maps", "re");
	if (!maps)
		return check_mincore(at, length);
	/* Sorted by address: walk through until the range is covered or there is a hole. */
	while (fgets(line, sizeof(line), maps)) {
		uintptr_t from, to;
		char perm[5];
		bool cut = !strchr(line, '\n');

		if (sscanf(line, "%" SCNxPTR "-%" SCNxPTR " %4s", &from, &to, perm) == 3 && to > at) {
			if (from > at || perm[0] != 'r' || (write && perm[1] != 'w'))
				break;
			at = to;
			if (at >= end) {
				err = 0;
				break;
			}
		}
		while (cut && fgets(line, sizeof(line), maps)) /* the rest of a long path */
			cut = !strchr(line, '\n');
	}
	fclose(maps);
	return err;
}
