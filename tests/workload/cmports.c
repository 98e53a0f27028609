/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * cmports - binds ids of rdma_cm to ports as it is told:
 *
 *	cmports DIR
 *
 * Command N (from 0) is the file DIR/N, its answer the file DIR/N.said: "0 PORT", or the errno's name. Ids are named
 * by a digit.
 *
 *	new I tcp|udp    bind I ADDRESS PORT    listen I    reuse I    only I    resolve I ADDRESS PORT    drop I
 */
#include <arpa/inet.h>
#include <err.h>
#include <errno.h>
#include <rdma/rdma_cma.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#define N_IDS 10

static struct rdma_event_channel *channel;
static struct rdma_cm_id *ids[N_IDS];

static int flag(struct rdma_cm_id *id, int option)
{
	int on = 1;

	return rdma_set_option(id, RDMA_OPTION_ID, option, &on, sizeof(on));
}

static int resolve(struct rdma_cm_id *id, struct sockaddr *to)
{
	struct rdma_cm_event *ev;
	int status;

	if (rdma_resolve_addr(id, NULL, to, 2000) || rdma_get_cm_event(channel, &ev))
		return -1;
	status = ev->status;
	rdma_ack_cm_event(ev);
	errno = -status;
	return status ? -1 : 0;
}

static int carry_out(const char *verb, unsigned at, const char *text, unsigned port)
{
	struct sockaddr_storage sa = {0};
	struct sockaddr_in *v4 = (struct sockaddr_in *)&sa;
	struct sockaddr_in6 *v6 = (struct sockaddr_in6 *)&sa;
	struct rdma_cm_id *id = ids[at];
	int ret;

	if (inet_pton(AF_INET, text, &v4->sin_addr) == 1)
		sa.ss_family = AF_INET;
	else if (inet_pton(AF_INET6, text, &v6->sin6_addr) == 1)
		sa.ss_family = AF_INET6;
	v4->sin_port = htons((uint16_t)port); /* at the same place in both */
	if (!strcmp(verb, "new"))
		return rdma_create_id(channel, &ids[at], NULL,
				      strcmp(text, "udp") ? RDMA_PS_TCP : RDMA_PS_UDP);
	if (!strcmp(verb, "bind"))
		return rdma_bind_addr(id, (struct sockaddr *)&sa);
	if (!strcmp(verb, "resolve"))
		return resolve(id, (struct sockaddr *)&sa);
	if (!strcmp(verb, "listen"))
		return rdma_listen(id, 1);
	if (!strcmp(verb, "reuse"))
		return flag(id, RDMA_OPTION_ID_REUSEADDR);
	if (!strcmp(verb, "only"))
		return flag(id, RDMA_OPTION_ID_AFONLY);
	if (strcmp(verb, "drop"))
		errx(2, "%s?", verb);
	ret = rdma_destroy_id(id);
	ids[at] = NULL;
	return ret;
}

int main(int argc, char **argv)
{
	char path[256], said[270], temporary[280], verb[16], text[64];

	channel = rdma_create_event_channel();
	if (argc != 2 || !channel)
		errx(2, "usage: cmports DIR, where there is a device");
	for (unsigned n = 0;; n++) {
		unsigned at = 0, port = 0;
		FILE *f;
		int ret;

		snprintf(path, sizeof(path), "%s/%u", argv[1], n);
		while (!(f = fopen(path, "r")))
			usleep(2000);
		text[0] = '\0';
		if (fscanf(f, "%15s %u %63s %u", verb, &at, text, &port) < 2 || at >= N_IDS)
			errx(2, "%s says nothing", path);
		fclose(f);
		errno = 0;
		ret = carry_out(verb, at, text, port);
		snprintf(said, sizeof(said), "%s.said", path);
		snprintf(temporary, sizeof(temporary), "%s~", said);
		f = fopen(temporary, "w");
		if (!f)
			err(1, "%s", temporary);
		if (ret)
			fprintf(f, "%s", strerrorname_np(errno));
		else
			fprintf(f, "0 %u", ids[at] ? ntohs(rdma_get_src_port(ids[at])) : 0);
		if (fclose(f) || rename(temporary, said))
			err(1, "%s", said);
	}
}
