/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * A libibverbs.so.1 with two "real" devices, mlx5_0 and rxe0, for machines without RDMA hardware:
 * enough of it to see which calls our library hands on, and to which version of a symbol. The old
 * versions abort.
 */
#include <errno.h>
#include <infiniband/verbs.h>
#include <stdio.h>
#include <stdlib.h>

#undef ibv_reg_mr
#undef ibv_query_port

#define OLD(name)                                                            \
	void old_##name(void);                                               \
	void old_##name(void)                                                \
	{                                                                    \
		fprintf(stderr, "stub: %s@IBVERBS_1.0 was called\n", #name); \
		abort();                                                     \
	}                                                                    \
	__asm__(".symver old_" #name "," #name "@IBVERBS_1.0");

static struct ibv_device devices[2] = {{.name = "mlx5_0"}, {.name = "rxe0"}};
int stub_calls;	     /* to new versions */
int stub_lists_open; /* ibv_get_device_list without its ibv_free_device_list */

struct ibv_device **new_list(int *n);
struct ibv_device **new_list(int *n)
{
	struct ibv_device **l = calloc(3, sizeof(*l));

	stub_calls++;
	stub_lists_open++;
	l[0] = &devices[0];
	l[1] = &devices[1];
	if (n)
		*n = 2;
	return l;
}
__asm__(".symver new_list,ibv_get_device_list@@IBVERBS_1.1");
OLD(ibv_get_device_list)

void new_free(struct ibv_device **l);
void new_free(struct ibv_device **l)
{
	stub_lists_open--;
	free(l);
}
__asm__(".symver new_free,ibv_free_device_list@@IBVERBS_1.1");
OLD(ibv_free_device_list)

const char *new_name(struct ibv_device *d);
const char *new_name(struct ibv_device *d)
{
	return d->name;
}
__asm__(".symver new_name,ibv_get_device_name@@IBVERBS_1.1");

struct ibv_context *new_open(struct ibv_device *d);
struct ibv_context *new_open(struct ibv_device *d)
{
	struct ibv_context *c = calloc(1, sizeof(*c));

	stub_calls++;
	c->device = d;
	return c;
}
__asm__(".symver new_open,ibv_open_device@@IBVERBS_1.1");
OLD(ibv_open_device)

int new_close(struct ibv_context *c);
int new_close(struct ibv_context *c)
{
	stub_calls++;
	free(c);
	return 0;
}
__asm__(".symver new_close,ibv_close_device@@IBVERBS_1.1");
OLD(ibv_close_device)

struct ibv_pd *new_pd(struct ibv_context *c);
struct ibv_pd *new_pd(struct ibv_context *c)
{
	struct ibv_pd *pd = calloc(1, sizeof(*pd));

	stub_calls++;
	pd->context = c;
	return pd;
}
__asm__(".symver new_pd,ibv_alloc_pd@@IBVERBS_1.1");
OLD(ibv_alloc_pd)

int new_dealloc(struct ibv_pd *pd);
int new_dealloc(struct ibv_pd *pd)
{
	stub_calls++;
	free(pd);
	return 4242; /* handed back as it is */
}
__asm__(".symver new_dealloc,ibv_dealloc_pd@@IBVERBS_1.1");
OLD(ibv_dealloc_pd)

struct ibv_mr *new_reg(struct ibv_pd *pd, void *addr, size_t length, int access);
struct ibv_mr *new_reg(struct ibv_pd *pd, void *addr, size_t length, int access)
{
	(void)pd, (void)addr, (void)length, (void)access;
	stub_calls++;
	errno = EXFULL;
	return NULL;
}
__asm__(".symver new_reg,ibv_reg_mr@@IBVERBS_1.1");
OLD(ibv_reg_mr)

int ibv_query_qp_data_in_order(struct ibv_qp *qp, enum ibv_wr_opcode op, uint32_t flags)
{
	(void)qp, (void)op, (void)flags;
	stub_calls++;
	return 1;
}
