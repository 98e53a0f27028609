// SPDX-License-Identifier: BSD-3-Clause
/*
 * alarm.c - the process's alarm (ITIMER_REAL) in a checkpoint.
 *
 * CRIU notes which signals are pending, writes the memory, and reads the timers last. They go on meanwhile,
 * so an alarm that goes off in between is in neither and never heard of: a benchmark that ends by one does
 * not end. Therefore it is held from the stop to the resume. What the program asks for in between counts,
 * which is why the calls for it are ours; they only count, as they may come from a signal handler.
 */
#include "control/client.h"

#include <stdatomic.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MG_EXPORT __attribute__((visibility("default")))

/* How often the program has set or ended its alarm: the process's, like the alarm itself. */
static _Atomic unsigned changes;

static int set(const struct itimerval *to, struct itimerval *before)
{
	return (int)syscall(SYS_setitimer, ITIMER_REAL, to, before);
}

void mg_alarm_hold(struct mg_alarm *a)
{
	static const struct itimerval none;

	a->changes = atomic_load(&changes);
	a->held = !set(&none, &a->left) && timerisset(&a->left.it_value);
}

void mg_alarm_release(struct mg_alarm *a)
{
	if (a->held && a->changes == atomic_load(&changes))
		set(&a->left, NULL);
	a->held = false;
}

MG_EXPORT int setitimer(__itimer_which_t which, const struct itimerval *to, struct itimerval *before)
{
	if (which == ITIMER_REAL && to)
		atomic_fetch_add(&changes, 1);
	return (int)syscall(SYS_setitimer, which, to, before);
}

MG_EXPORT unsigned alarm(unsigned seconds)
{
	struct itimerval to = {.it_value.tv_sec = seconds}, before;
	unsigned left;

	if (setitimer(ITIMER_REAL, &to, &before))
		return 0;
	left = (unsigned)before.it_value.tv_sec;
	/* Rounded, but never to 0, which would mean that there was none. */
	return left + (before.it_value.tv_usec >= 500000 || (!left && before.it_value.tv_usec));
}

MG_EXPORT useconds_t ualarm(useconds_t value, useconds_t interval)
{
	struct itimerval before, to = {.it_value = {value / 1000000, value % 1000000},
				       .it_interval = {interval / 1000000, interval % 1000000}};

	if (setitimer(ITIMER_REAL, &to, &before))
		return (useconds_t)-1;
	return (useconds_t)(before.it_value.tv_sec * 1000000 + before.it_value.tv_usec);
}
