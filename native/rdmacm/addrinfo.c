/* SPDX-License-Identifier: BSD-3-Clause */
/* addrinfo.c - rdma_getaddrinfo: getaddrinfo in the connection manager's terms. */
#include "rdmacm/mgc.h"

#include <netdb.h>
#include <stdlib.h>

static struct sockaddr *copy_addr(const struct sockaddr *sa, socklen_t len)
{
	struct sockaddr *copy = malloc(len);

	if (copy)
		memcpy(copy, sa, len);
	return copy;
}

static void free_one(struct rdma_addrinfo *rai)
{
	free(rai->ai_src_addr);
	free(rai->ai_dst_addr);
	free(rai->ai_src_canonname);
	free(rai->ai_dst_canonname);
	free(rai->ai_route);
	free(rai->ai_connect);
	free(rai);
}

MGC_EXPORT void rdma_freeaddrinfo(struct rdma_addrinfo *res)
{
	MGC_FORWARD_V(rdma_freeaddrinfo, res);
	while (res) {
		struct rdma_addrinfo *next = res->ai_next;

		free_one(res);
		res = next;
	}
}

static int port_space(const struct rdma_addrinfo *hints)
{
	if (hints && hints->ai_port_space)
		return hints->ai_port_space;
	return hints && hints->ai_qp_type == IBV_QPT_UD ? RDMA_PS_UDP : RDMA_PS_TCP;
}

static struct rdma_addrinfo *one(const struct addrinfo *ai, const struct rdma_addrinfo *hints)
{
	struct rdma_addrinfo *rai = calloc(1, sizeof(*rai));
	char *name;

	if (!rai)
		return NULL;
	rai->ai_flags = hints ? hints->ai_flags : 0;
	rai->ai_family = ai->ai_family;
	rai->ai_port_space = port_space(hints);
	rai->ai_qp_type = hints && hints->ai_qp_type	      ? hints->ai_qp_type
			  : rai->ai_port_space == RDMA_PS_UDP ? IBV_QPT_UD
							      : IBV_QPT_RC;
	name = ai->ai_canonname ? strdup(ai->ai_canonname) : NULL;
	if (rai->ai_flags & RAI_PASSIVE) {
		rai->ai_src_addr = copy_addr(ai->ai_addr, ai->ai_addrlen);
		rai->ai_src_len = ai->ai_addrlen;
		rai->ai_src_canonname = name;
		if (!rai->ai_src_addr)
			goto fail;
		return rai;
	}
	rai->ai_dst_addr = copy_addr(ai->ai_addr, ai->ai_addrlen);
	rai->ai_dst_len = ai->ai_addrlen;
	rai->ai_dst_canonname = name;
	if (!rai->ai_dst_addr)
		goto fail;
	if (hints && hints->ai_src_len && hints->ai_src_addr) {
		rai->ai_src_addr = copy_addr(hints->ai_src_addr, hints->ai_src_len);
		rai->ai_src_len = hints->ai_src_len;
		if (!rai->ai_src_addr)
			goto fail;
	}
	return rai;
fail:
	free_one(rai);
	return NULL;
}

static bool keep_addr(const struct sockaddr *sa, socklen_t len, struct sockaddr **out, socklen_t *out_len)
{
	if (!sa || !len)
		return true;
	*out = copy_addr(sa, len);
	*out_len = len;
	return *out != NULL;
}

static bool plausible(const struct sockaddr *sa, socklen_t len)
{
	return !sa || !len || (len <= sizeof(struct sockaddr_storage) && len >= mgc_len(sa) && mgc_len(sa));
}

/* Nothing to look up: what the hints bring along, one address, both or none. */
static int from_hints(const struct rdma_addrinfo *hints, struct rdma_addrinfo **res)
{
	struct rdma_addrinfo *rai;

	if (!plausible(hints->ai_src_addr, hints->ai_src_len) ||
	    !plausible(hints->ai_dst_addr, hints->ai_dst_len))
		return mgc_err(EINVAL);
	rai = calloc(1, sizeof(*rai));
	if (!rai)
		return mgc_err(ENOMEM);
	rai->ai_flags = hints->ai_flags;
	rai->ai_family = hints->ai_family;
	rai->ai_qp_type = hints->ai_qp_type;
	rai->ai_port_space = hints->ai_port_space;
	if (!keep_addr(hints->ai_src_addr, hints->ai_src_len, &rai->ai_src_addr, &rai->ai_src_len) ||
	    !keep_addr(hints->ai_dst_addr, hints->ai_dst_len, &rai->ai_dst_addr, &rai->ai_dst_len)) {
		free_one(rai);
		return mgc_err(ENOMEM);
	}
	*res = rai;
	return 0;
}

MGC_EXPORT int rdma_getaddrinfo(const char *node, const char *service, const struct rdma_addrinfo *hints,
				struct rdma_addrinfo **res)
{
	struct addrinfo want = {.ai_socktype = SOCK_STREAM}, *found = NULL;
	struct rdma_addrinfo **tail = res;
	int ret;

	MGC_FORWARD(rdma_getaddrinfo, node, service, hints, res);
	*res = NULL;
	if (!mgc_context())
		return -1;
	if (!node && !service)
		return hints ? from_hints(hints, res) : mgc_err(EINVAL);
	if (hints) {
		want.ai_flags = (hints->ai_flags & RAI_PASSIVE ? AI_PASSIVE : 0) |
				(hints->ai_flags & RAI_NUMERICHOST ? AI_NUMERICHOST : 0);
		want.ai_family = hints->ai_flags & RAI_FAMILY ? hints->ai_family : 0;
	}
	ret = getaddrinfo(node, service, &want, &found);
	if (ret) /* an EAI_ code, as the real one returns it */
		return ret;
	for (struct addrinfo *ai = found; ai; ai = ai->ai_next) {
		if (!mgc_len(ai->ai_addr))
			continue;
		*tail = one(ai, hints);
		if (!*tail) {
			freeaddrinfo(found);
			rdma_freeaddrinfo(*res);
			*res = NULL;
			return mgc_err(ENOMEM);
		}
		tail = &(*tail)->ai_next;
	}
	freeaddrinfo(found);
	return *res ? 0 : mgc_err(ENODATA);
}

/* ---- the same by an event (rdma-core 59) ------------------------------------------------------------- */

/* Not in the headers we may be built with. */
int rdma_resolve_addrinfo(struct rdma_cm_id *id, const char *node, const char *service,
			  const struct rdma_addrinfo *hints);
int rdma_query_addrinfo(struct rdma_cm_id *id, struct rdma_addrinfo **info);

/* As the real one it looks up by itself, and says so by the event. */
MGC_EXPORT int rdma_resolve_addrinfo(struct rdma_cm_id *ib, const char *node, const char *service,
				     const struct rdma_addrinfo *hints)
{
	struct rdma_addrinfo *found = NULL;
	struct mgc_id *id;
	bool busy;
	int ret;

	MGC_FORWARD(rdma_resolve_addrinfo, ib, node, service, hints);
	if (!ib)
		return mgc_err(EINVAL);
	if (hints && hints->ai_flags & MGC_RAI_SA) /* of a subnet administrator, which RoCE has not */
		return mgc_err(EOPNOTSUPP);
	id = mgc_id(ib);
	mg_device_lock(id->dev);
	busy = id->resolving;
	id->resolving = true;
	mg_device_unlock(id->dev);
	if (busy)
		return mgc_err(EBUSY);
	errno = 0;
	ret = rdma_getaddrinfo(node, service, hints, &found);
	if (ret && (ret != -1 || !errno))
		errno = EADDRNOTAVAIL; /* an EAI_ code */
	mg_device_lock(id->dev);
	id->resolving = !ret;
	id->resolved = found;
	if (!ret)
		mgc_post(id, (enum rdma_cm_event_type)MGC_EVENT_ADDRINFO_RESOLVED, 0);
	mg_device_unlock(id->dev);
	return ret ? -1 : mgc_complete(id);
}

/* The caller's from here on, to be freed by rdma_freeaddrinfo. */
MGC_EXPORT int rdma_query_addrinfo(struct rdma_cm_id *ib, struct rdma_addrinfo **info)
{
	struct mgc_id *id;

	MGC_FORWARD(rdma_query_addrinfo, ib, info);
	if (!ib || !info)
		return mgc_err(EINVAL);
	id = mgc_id(ib);
	mg_device_lock(id->dev);
	*info = id->resolved;
	id->resolved = NULL;
	id->resolving &= !*info;
	mg_device_unlock(id->dev);
	return mgc_err(*info ? 0 : ENOENT);
}
