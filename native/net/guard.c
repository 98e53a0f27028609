/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * guard.c - memory of the application that is not there any more.
 *
 * Nothing is pinned: a program may unmap, protect or truncate what it has registered. Hardware would
 * not notice; we would fault on behalf of a packet. Asking before each access would cost a system call
 * and still be a guess, so we access, and a SIGSEGV or SIGBUS within mg_guarded comes back as false: the
 * peer gets a NAK, or a request fails, as with on-demand paging hardware. All other faults are passed
 * on to who had the signal before us. Signal handlers belong to the process: hence the one static object.
 */
#include "net/net.h"

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <unistd.h>

static struct {
	pthread_once_t once;
	struct sigaction segv, bus; /* who had it before us */
} guard = {.once = PTHREAD_ONCE_INIT};

/* Where this thread's guarded access goes back to; NULL: it makes none. */
static _Thread_local sigjmp_buf *volatile way_out __attribute__((tls_model("initial-exec")));

static void pass_on(const struct sigaction *to, int sig, siginfo_t *info, void *context)
{
	const struct sigaction dflt = {.sa_handler = SIG_DFL};
	bool sent = info->si_code <= 0; /* by kill or the like: the instruction will not fault again */
	sigset_t mask = to->sa_mask;

	if (!(to->sa_flags & SA_SIGINFO) && to->sa_handler == SIG_IGN && sent)
		return;
	if (!(to->sa_flags & SA_SIGINFO) && (to->sa_handler == SIG_DFL || to->sa_handler == SIG_IGN)) {
		sigaction(sig, &dflt, NULL);
		if (sent)
			raise(sig);
		return;
	}
	if (!(to->sa_flags & SA_NODEFER))
		sigaddset(&mask, sig);
	pthread_sigmask(SIG_BLOCK, &mask, NULL);
	if (to->sa_flags & SA_SIGINFO)
		to->sa_sigaction(sig, info, context);
	else
		to->sa_handler(sig);
}

static void on_fault(int sig, siginfo_t *info, void *context)
{
	sigjmp_buf *out = way_out;

	/* SA_NODEFER and an empty mask: there is no signal mask to restore. */
	if (out && info->si_code > 0)
		siglongjmp(*out, 1);
	pass_on(sig == SIGBUS ? &guard.bus : &guard.segv, sig, info, context);
}

static void install(void)
{
	struct sigaction ours = {.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER | SA_RESTART};

	ours.sa_sigaction = on_fault;
	/* First ask, then take over: a fault in between finds whom to pass it on to. */
	if (!sigaction(SIGSEGV, NULL, &guard.segv))
		sigaction(SIGSEGV, &ours, NULL);
	if (!sigaction(SIGBUS, NULL, &guard.bus))
		sigaction(SIGBUS, &ours, NULL);
}

void mg_guard_install(void)
{
	pthread_once(&guard.once, install);
}

bool mg_guarded(void *arg, void (*access)(void *what), void *what)
{
	sigjmp_buf *const outer = way_out;
	sigjmp_buf here;

	(void)arg;
	if (sigsetjmp(here, 0)) {
		way_out = outer;
		return false;
	}
	way_out = &here;
	access(what);
	way_out = outer;
	return true;
}

static void read_it(void *what)
{
	const struct iovec *v = what;
	const volatile uint8_t *at = v->iov_base;
	size_t page = (size_t)sysconf(_SC_PAGESIZE);

	for (size_t i = 0; i < v->iov_len; i += page)
		(void)at[i];
	if (v->iov_len)
		(void)at[v->iov_len - 1];
}

bool mg_readable(const struct iovec *iov, size_t n)
{
	for (size_t i = 0; i < n; i++) {
		struct iovec v = iov[i];

		if (!mg_guarded(NULL, read_it, &v))
			return false;
	}
	return true;
}
