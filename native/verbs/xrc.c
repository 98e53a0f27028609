/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * xrc.c - XRC domains, and opening a target QP once more (ibv_open_xrcd(3), ibv_open_qp(3)).
 *
 * Opening the same file twice gives the same domain, in one process: the device is a library inside
 * it. Another process that opens the file gets a domain of its own, as it cannot place data in this
 * one's memory; without O_CREAT it is told so (EAGAIN, as the kernel says of a domain not there).
 */
#include "verbs/forward.h"
#include "verbs/mgv.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>

/* The domain of a file, or NULL. dev->lock held. */
static struct mgv_domain *find(const struct stat *st)
{
	for (struct mgv_list *l = mgv_device.domains.next; l != &mgv_device.domains; l = l->next) {
		struct mgv_domain *d = mgv_container(l, struct mgv_domain, link);

		if (d->is_file && d->st_dev == st->st_dev && d->st_ino == st->st_ino)
			return d;
	}
	return NULL;
}

static int domain_get(struct mg_device *dev, const struct stat *st, int oflags, struct mgv_domain **out)
{
	struct mgv_domain *d = st ? find(st) : NULL;

	if (d && (oflags & O_EXCL))
		return EINVAL;
	if (st && !d && !(oflags & O_CREAT))
		return EAGAIN;
	if (!d) {
		d = calloc(1, sizeof(*d));
		if (!d)
			return ENOMEM;
		d->mg = mg_xrcd_create(dev->engine);
		if (!d->mg) {
			free(d);
			return ENOMEM;
		}
		if (st) {
			d->is_file = true;
			d->st_dev = st->st_dev;
			d->st_ino = st->st_ino;
		}
		mgv_list_add(&mgv_device.domains, &d->link);
	}
	d->opened++;
	*out = d;
	return 0;
}

struct ibv_xrcd *mgv_open_xrcd(struct ibv_context *c, struct ibv_xrcd_init_attr *attr)
{
	const uint32_t need = IBV_XRCD_INIT_ATTR_FD | IBV_XRCD_INIT_ATTR_OFLAGS;
	struct mgv_context *ctx = mgv_ctx(c);
	struct mgv_xrcd *x = NULL;
	struct stat st;
	int err = 0;

	if (attr->comp_mask & ~need)
		err = EOPNOTSUPP;
	else if (attr->comp_mask != need)
		err = EINVAL;
	else if (attr->fd != -1 && fstat(attr->fd, &st))
		err = errno;
	if (!err && !(x = calloc(1, sizeof(*x))))
		err = ENOMEM;
	if (!err) {
		mg_device_lock(ctx->dev);
		err = domain_get(ctx->dev, attr->fd == -1 ? NULL : &st, attr->oflags, &x->domain);
		if (!err)
			mgv_list_add(&ctx->xrcds, &x->link);
		mg_device_unlock(ctx->dev);
	}
	if (err) {
		free(x);
		errno = err;
		return NULL;
	}
	x->ib.context = c;
	return &x->ib;
}

void mgv_xrcd_release(struct mgv_xrcd *x)
{
	struct mgv_domain *d = x->domain;

	mgv_list_del(&x->link);
	if (--d->opened)
		return;
	mg_xrcd_destroy(d->mg); /* has no users, as none of those who opened it has */
	mgv_list_del(&d->link);
	free(d);
}

int mgv_close_xrcd(struct ibv_xrcd *xrcd)
{
	struct mgv_context *ctx = mgv_ctx(xrcd->context);
	struct mgv_xrcd *x = mgv_xrcd(xrcd);
	int err;

	mg_device_lock(ctx->dev);
	err = x->users ? EBUSY : 0;
	if (!err)
		mgv_xrcd_release(x);
	mg_device_unlock(ctx->dev);
	if (!err)
		free(x);
	return err;
}

struct ibv_qp *mgv_open_qp(struct ibv_context *c, struct ibv_qp_open_attr *a)
{
	const uint32_t need = IBV_QP_OPEN_ATTR_NUM | IBV_QP_OPEN_ATTR_XRCD | IBV_QP_OPEN_ATTR_TYPE;
	struct mgv_context *ctx = mgv_ctx(c);
	struct mgv_qp *qp = NULL;
	struct mg_qp *mg;
	int err = EINVAL;

	if (a->comp_mask & ~(need | IBV_QP_OPEN_ATTR_CONTEXT)) {
		err = EOPNOTSUPP;
		goto err;
	}
	if ((a->comp_mask & need) != need || !a->xrcd || a->xrcd->context != c ||
	    a->qp_type != IBV_QPT_XRC_RECV)
		goto err;
	qp = calloc(1, sizeof(*qp));
	if (!qp) {
		err = ENOMEM;
		goto err;
	}
	mg_device_lock(ctx->dev);
	mg = mg_xrcd_find(mgv_xrcd(a->xrcd)->domain->mg, a->qp_num);
	if (mg) {
		struct mgv_qp *first = mg_qp_owner(mg);

		mgv_qp_init(qp, c, mg);
		qp->ex.qp_base.state = first->ex.qp_base.state;
		qp->ex.qp_base.qp_type = IBV_QPT_XRC_RECV;
		qp->ex.qp_base.qp_context = a->comp_mask & IBV_QP_OPEN_ATTR_CONTEXT ? a->qp_context : NULL;
		qp->xrcd = mgv_xrcd(a->xrcd);
		qp->xrcd->users++;
		mgv_list_add(&first->sharers, &qp->sharers);
		mgv_list_add(&ctx->qps, &qp->link);
	}
	mg_device_unlock(ctx->dev);
	if (!mg)
		goto err;
	return &qp->ex.qp_base;
err:
	free(qp);
	errno = err;
	return NULL;
}
