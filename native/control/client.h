/* SPDX-License-Identifier: BSD-3-Clause */
/* client.h - what the two parts of the library's end share: open.c, before there is a thread, and client.c. */
#ifndef MG_CONTROL_CLIENT_H
#define MG_CONTROL_CLIENT_H

#include "control/control.h"

#include <sys/time.h>

#define MG_CTL_MS 1000000ull
#define MG_CTL_ANSWER_NS (5000 * MG_CTL_MS)    /* for the agent to answer a HELLO */
#define MG_CTL_RECONNECT_NS (1000 * MG_CTL_MS) /* running, the agent is gone */

enum mg_control_state { LINKED, DRAIN, STOPPED, RESUMING, LOST, GREETING };

struct mg_alarm {
	bool held;
	unsigned changes; /* how often the program had changed it then */
	struct itimerval left;
};

struct mg_control {
	enum mg_control_state state;
	int fd;
	mg_time next; /* when time asks for something */
	mg_time drain_until;
	uint32_t request;      /* of the STOP being carried out */
	uint32_t last_request; /* of ours */
	uint32_t n_qp;	       /* when stopped */
	unsigned searches;     /* for an agent, since the stop */
	_Atomic bool away;     /* stopped, and the agent waits for us to come back */
	struct mg_alarm alarm;
	struct mg_ctl_hello self;
	char path[108];
};

void mg_control_change(struct mg_control *c, enum mg_control_state to, mg_time next);
int mg_control_say_hello(struct mg_control *c, enum mg_ctl_hello_state state, const int *fds, size_t n_fds);
/* Take over what a welcome gives; addr: where the device is, NULL: not known yet. */
void mg_control_learn(struct mg_control *c, const struct mg_ctl_welcome *w, const struct mg_addr *addr);

/* alarm.c: from the stop to the resume the program's alarm stands still. */
void mg_alarm_hold(struct mg_alarm *a);
void mg_alarm_release(struct mg_alarm *a);

#endif
