/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * forward.h - the real libibverbs, for objects of real devices.
 *
 * MGV_REAL(ibv_x) is the real ibv_x (its default version), or NULL where the process has none.
 * The look-up is made once per call site; it is idempotent, so a race only makes it twice.
 */
#ifndef MGV_FORWARD_H
#define MGV_FORWARD_H

#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>

void *mgv_real_symbol(const char *name);
/* The C library's dlsym; the one that programs see is ours (dlsym.c). */
void *mgv_dlsym(void *handle, const char *name);

#define MGV_REAL_AS(type, name)                                                            \
	({                                                                                 \
		static _Atomic(void *) mgv_cached;                                         \
		void *mgv_sym = atomic_load_explicit(&mgv_cached, memory_order_relaxed);   \
		if (!mgv_sym) {                                                            \
			mgv_sym = mgv_real_symbol(name);                                   \
			atomic_store_explicit(&mgv_cached, mgv_sym, memory_order_relaxed); \
		}                                                                          \
		(type) mgv_sym;                                                            \
	})
#define MGV_REAL(fn) MGV_REAL_AS(__typeof__(&(fn)), #fn)

/* Hand the call on: to an int function (errno value on failure), or one that returns a pointer. */
#define MGV_FORWARD_INT(fn, ...)                         \
	({                                               \
		__typeof__(&(fn)) mgv_fn = MGV_REAL(fn); \
		mgv_fn ? mgv_fn(__VA_ARGS__) : ENOSYS;   \
	})
#define MGV_FORWARD_NEG(fn, ...)                                     \
	({                                                           \
		__typeof__(&(fn)) mgv_fn = MGV_REAL(fn);             \
		mgv_fn ? mgv_fn(__VA_ARGS__) : (errno = ENOSYS, -1); \
	})
#define MGV_FORWARD_PTR(fn, ...)                                       \
	({                                                             \
		__typeof__(&(fn)) mgv_fn = MGV_REAL(fn);               \
		mgv_fn ? mgv_fn(__VA_ARGS__) : (errno = ENOSYS, NULL); \
	})
#define MGV_FORWARD_VOID(fn, ...)                        \
	do {                                             \
		__typeof__(&(fn)) mgv_fn = MGV_REAL(fn); \
		if (mgv_fn)                              \
			mgv_fn(__VA_ARGS__);             \
	} while (0)

#endif
