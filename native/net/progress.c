// SPDX-License-Identifier: BSD-3-Clause
/*
 * progress.c - the thread for what nobody polls for: one-sided requests from peers, timers,
 * completion channels, and the agent.
 *
 * While the application polls, the thread only naps (and listens to the agent). When a nap ends
 * and the application has stopped polling, the thread serves the sockets itself and sleeps on them.
 */
#include "net/net.h"

#include "control/control.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define MG_THREAD_STACK (1u << 20)
#define MG_BUSY_RETRY_NS 50000u	 /* somebody else has the lock */
#define MG_SERVE_NS 500000u	 /* between looks at the agent and the wake-up call */
#define MG_SPIN_NS 30000u	 /* a sleep shorter than this costs more than it saves */
#define MG_LET_IN_NS 2000000000u /* a machine with thirty spinning processes needs a while */

mg_time mg_now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return (mg_time)t.tv_sec * 1000000000u + (mg_time)t.tv_nsec;
}

void mg_device_let_in(struct mg_device *dev)
{
	struct timespec moment = {.tv_nsec = 20000};
	mg_time end = mg_now() + MG_LET_IN_NS;

	/*
	 * Bounded: a thread that died or was stopped by a debugger must not stop us. Sleep, not
	 * sched_yield: some kernels take a whole time slice for each yield and let us starve later.
	 */
	while (atomic_load_explicit(&dev->lock_wanted, memory_order_relaxed) && mg_now() < end) {
		nanosleep(&moment, NULL);
		if (moment.tv_nsec < 1000000)
			moment.tv_nsec *= 2;
	}
}

void mg_progress_lock(struct mg_device *dev)
{
	if (pthread_mutex_trylock(&dev->lock)) {
		atomic_store_explicit(&dev->lock_wanted, true, memory_order_relaxed);
		pthread_mutex_lock(&dev->lock);
		atomic_store_explicit(&dev->lock_wanted, false, memory_order_relaxed);
	}
	dev->cancel_state = PTHREAD_CANCEL_DISABLE; /* nobody has a handle to cancel this thread by */
}

void mg_progress_wake(struct mg_device *dev)
{
	const uint64_t one = 1;

	if (dev->wake_fd < 0)
		return;
	while (write(dev->wake_fd, &one, sizeof(one)) < 0 && errno == EINTR)
		;
}

void mg_progress_check(struct mg_device *dev, mg_time now)
{
	struct mg_net *net = dev->net;
	mg_time until = atomic_load_explicit(&net->thread_until, memory_order_relaxed);

	if (until <= now + MG_NAP_MAX_NS) /* awake, or looks soon */
		return;
	if (mg_deadline(dev->engine) >= until && !mg_tx_pending(dev->engine))
		return;
	atomic_store_explicit(&net->thread_until, 0, memory_order_relaxed);
	mg_progress_wake(dev);
}

void mg_note_sleep(struct mg_device *dev)
{
	/* Either the thread sees that nobody polls, or we see that it naps (see run). */
	atomic_store(&dev->last_poll, 0);
	if (atomic_load(&dev->net->napping) && atomic_exchange(&dev->net->napping, false))
		mg_progress_wake(dev);
}

static bool polling(struct mg_device *dev, mg_time now)
{
	return atomic_load_explicit(&dev->last_poll, memory_order_relaxed) + MG_POLLING_NS > now;
}

/* What the thread knows from one round to the next. */
struct thread {
	mg_time nap; /* the next one's length */
	bool active; /* the application polled a short while ago */
	bool steady; /* packets keep coming: the last sleep on the sockets was too short to be worth it */
	bool got;    /* something was received in the application's place */
	bool away;   /* the application uses the sockets, or has to run first: leave them alone */
};

/*
 * Lock held, nothing more to receive: what to do before the deadline that is returned. An
 * application that polls now and then (it waits for data to appear in its memory, say) gets a moment
 * to answer, so that what is held back lazily can ride along.
 */
static mg_time settle(struct mg_device *dev, const struct thread *t, mg_time now)
{
	mg_time hold = t->active ? MG_LAZY_THREAD_NS : t->steady ? MG_LAZY_NS : 0, until;
	struct mg_net *net = dev->net;

	mg_net_timers(dev, now, true);
	if (mg_tx_pending(dev->engine) && now - net->lazy_since >= hold)
		mg_net_send(dev, now, 0);
	until = mg_deadline(dev->engine);
	if (mg_tx_pending(dev->engine) && !net->lazy_since) /* more than one turn's worth */
		until = now;
	if (net->lazy_since && net->lazy_since + hold < until)
		until = net->lazy_since + hold;
	return until;
}

/* In place of the application: receive what there is, then return when to come back. */
static mg_time serve(struct mg_device *dev, struct thread *t)
{
	mg_time begun = mg_now(), now = begun, heard = begun, until;
	bool stay;

	t->got = t->away = false;
	t->active = atomic_load_explicit(&dev->last_poll, memory_order_relaxed) + MG_ACTIVE_NS > now;
	do {
		if ((now != begun && polling(dev, now)) || pthread_mutex_trylock(&dev->lock)) {
			t->away = true;
			return now + MG_BUSY_RETRY_NS;
		}
		if (!mg_net_open(dev->net)) {
			/* Stopped: there is nothing to serve until the agent brings sockets. */
			pthread_mutex_unlock(&dev->lock);
			return MG_NEVER;
		}
		if (mg_net_held(dev, now)) {
			mg_net_timers(dev, now, false);
			mg_net_send(dev, now, 0);
			atomic_store(&dev->net->napping, true);
			pthread_mutex_unlock(&dev->lock);
			t->away = true;
			return now + MG_DRY_NAP_NS;
		}
		until = 0;
		if (mg_net_receive(dev, now) > 0) {
			t->got = true;
			heard = now;
			mg_net_timers(dev, now, false);
			mg_net_send(dev, now, MG_TX_LAZY);
		} else {
			until = settle(dev, t, now);
		}
		stay = now < begun + MG_SERVE_NS &&
		       (!until || (t->steady && !t->active && now < heard + MG_SPIN_NS));
		/* Once we go to sleep, posters must wake us for anything earlier. */
		atomic_store_explicit(&dev->net->thread_until, stay ? 0 : until, memory_order_relaxed);
		pthread_mutex_unlock(&dev->lock);
		now = mg_now();
	} while (stay);
	return until;
}

struct sleeper {
	struct pollfd fd[4 + MG_FAMILIES]; /* wake, agent, interface, sockets, more of them */
	nfds_t n;
};

static void sleep_on(struct mg_device *dev, struct sleeper *s, bool sockets)
{
	int ep = atomic_load(&dev->net->more_ep);

	s->fd[0] = (struct pollfd){.fd = dev->wake_fd, .events = POLLIN};
	s->fd[1] = (struct pollfd){.fd = mg_control_fd(dev->control), .events = POLLIN};
	s->fd[2] = (struct pollfd){.fd = dev->net->watch, .events = POLLIN};
	s->n = 3;
	/* Only this thread closes or replaces the sockets while it runs: no lock to read them. */
	for (int i = 0; i < MG_FAMILIES && sockets; i++)
		if (dev->net->sock[i].fd >= 0)
			s->fd[s->n++] = (struct pollfd){.fd = dev->net->sock[i].fd, .events = POLLIN};
	if (sockets && ep >= 0)
		s->fd[s->n++] = (struct pollfd){.fd = ep, .events = POLLIN};
}

/* True when the agent has something to say. */
static bool sleep_until(struct mg_device *dev, struct sleeper *s, mg_time now, mg_time until)
{
	struct timespec left, *timeout = NULL;
	uint64_t count;
	int ret;

	if (until != MG_NEVER) {
		mg_time ns = until > now ? until - now : 0;

		left.tv_sec = (time_t)(ns / 1000000000u);
		left.tv_nsec = (long)(ns % 1000000000u);
		timeout = &left;
	}
	ret = ppoll(s->fd, s->n, timeout, NULL);
	atomic_store_explicit(&dev->net->thread_until, 0, memory_order_relaxed);
	atomic_store_explicit(&dev->net->napping, false, memory_order_relaxed);
	if (ret <= 0)
		return false;
	if (s->fd[0].revents && read(dev->wake_fd, &count, sizeof(count)) < 0 && errno != EAGAIN &&
	    errno != EINTR)
		return false;
	return s->fd[1].revents != 0;
}

static void *run(void *arg)
{
	struct mg_device *dev = arg;
	struct thread t = {.nap = MG_NAP_MIN_NS};
	bool agent = false;

	prctl(PR_SET_TIMERSLACK, 1000, 0, 0, 0);
	while (!atomic_load_explicit(&dev->quit, memory_order_relaxed)) {
		mg_time now = mg_now(), until, control;
		struct sleeper s;

		control = mg_control_run(dev, now, agent);
		if (mg_watch_due(dev) < control)
			control = mg_watch_due(dev);
		t.away = polling(dev, now);
		if (!mg_net_open(dev->net)) {
			/* Stopped: the agent is all there is to wait for. */
			until = MG_NEVER;
		} else if (t.away) {
			until = now + t.nap;
			t.nap = t.nap * 2 < MG_NAP_MAX_NS ? t.nap * 2 : MG_NAP_MAX_NS;
			atomic_store(&dev->net->napping, true);
			if (!atomic_load(&dev->last_poll)) /* mg_note_sleep, just now */
				until = 0;
		} else {
			until = serve(dev, &t);
			/* Packets waited while we napped: the application stops polling now and then. */
			if (t.got)
				t.nap = MG_NAP_MIN_NS;
		}
		sleep_on(dev, &s, !t.away);
		now = mg_now();
		agent = sleep_until(dev, &s, now, until < control ? until : control);
		if (s.fd[2].revents || mg_watch_due(dev) <= now) {
			mg_progress_lock(dev);
			mg_watch_run(dev);
			mg_device_unlock(dev);
		}
		t.steady = t.got && mg_now() < now + MG_SPIN_NS;
	}
	return NULL;
}

int mg_progress_start(struct mg_device *dev)
{
	sigset_t all, before;
	pthread_attr_t attr;
	int ret;

	ret = pthread_attr_init(&attr);
	if (ret)
		return ret;
	pthread_attr_setstacksize(&attr, MG_THREAD_STACK);
	/* The application's signals are for its own threads. */
	sigfillset(&all);
	sigdelset(&all, SIGSEGV); /* guard.c */
	sigdelset(&all, SIGBUS);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	ret = pthread_create(&dev->thread, &attr, run, dev);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	pthread_attr_destroy(&attr);
	if (!ret)
		pthread_setname_np(dev->thread, "migroce");
	return ret;
}

void mg_progress_stop(struct mg_device *dev)
{
	atomic_store_explicit(&dev->quit, true, memory_order_relaxed);
	mg_progress_wake(dev);
	pthread_join(dev->thread, NULL);
}
