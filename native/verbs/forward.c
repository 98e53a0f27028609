/* SPDX-License-Identifier: BSD-3-Clause */
/* forward.c - finding the real libibverbs. */
#include "verbs/forward.h"

#include <dlfcn.h>

/*
 * A look-up without a version takes a symbol's default version, which is what a program linked today
 * gets: ibv_open_device@@IBVERBS_1.1, not its ancient 1.0 namesake. RTLD_NEXT does not see a
 * libibverbs that came in privately (a Python extension, a plugin): ask for that one by name.
 */
void *mgv_real_symbol(const char *name)
{
	void *sym = mgv_dlsym(RTLD_NEXT, name);

	if (!sym) {
		void *lib = dlopen("libibverbs.so.1", RTLD_LAZY | RTLD_LOCAL);

		if (lib)
			sym = mgv_dlsym(lib, name);
	}
	return sym;
}
