/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * waits.c - poll, in the form that outlives a checkpoint.
 *
 * When CRIU takes hold of a process the kernel interrupts its system calls and would begin them again.
 * Of poll it would do so by a restart block (ERESTART_RESTARTBLOCK), which cannot be saved: the restored
 * process gets EINTR, though no handler has run and signal(7) says that poll never gives it then. Programs
 * that wait for a completion channel take it for an error. ppoll is begun anew by its arguments
 * (ERESTARTNOHAND) with the time that is left, and gives EINTR after a handler only.
 */
#undef _FORTIFY_SOURCE /* would define a poll of its own */
#include "verbs/mgv.h"

#include <poll.h>
#include <time.h>

/* Not in headers: glibc's end of a program that would overrun a buffer. */
extern _Noreturn void __chk_fail(void);
MGV_EXPORT int __poll_chk(struct pollfd *fds, nfds_t n, int timeout, size_t size);

MGV_EXPORT int poll(struct pollfd *fds, nfds_t n, int timeout)
{
	struct timespec left = {.tv_sec = timeout / 1000, .tv_nsec = timeout % 1000 * 1000000L};

	return ppoll(fds, n, timeout < 0 ? NULL : &left, NULL);
}

/* What a program compiled with _FORTIFY_SOURCE calls. */
MGV_EXPORT int __poll_chk(struct pollfd *fds, nfds_t n, int timeout, size_t size)
{
	if (size / sizeof(*fds) < n)
		__chk_fail();
	return poll(fds, n, timeout);
}
