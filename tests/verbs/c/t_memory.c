/* SPDX-License-Identifier: BSD-3-Clause */
/* Protection domains and memory regions. */
#include "tv.h"

#include <sys/mman.h>

#define LEN 8192u

static struct ibv_context *ctx;
static struct ibv_pd *pd;

static void *map(int prot)
{
	void *p = mmap(NULL, LEN, prot, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(p != MAP_FAILED);
	return p;
}

static void begin(void)
{
	ctx = tv_open();
	CHECK(pd = ibv_alloc_pd(ctx));
	CHECK(pd->context == ctx);
}

static void end(void)
{
	CHECK_EQ(ibv_dealloc_pd(pd), 0);
	CHECK_EQ(ibv_close_device(ctx), 0);
}

static void a_region_says_what_it_is(void)
{
	struct ibv_mr *mr, *other;
	void *p = map(PROT_READ | PROT_WRITE);

	begin();
	CHECK(mr = ibv_reg_mr(pd, p, LEN, IBV_ACCESS_LOCAL_WRITE));
	CHECK(mr->context == ctx && mr->pd == pd && mr->addr == p && mr->length == LEN);
	CHECK(other = ibv_reg_mr(pd, p, LEN, IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_READ));
	CHECK(mr->lkey != other->lkey && mr->handle != other->handle);
	CHECK_EQ(ibv_dealloc_pd(pd), EBUSY);
	CHECK_EQ(ibv_dereg_mr(mr), 0);
	CHECK_EQ(ibv_dereg_mr(other), 0);
	end();
}

static void memory_that_is_not_there_is_efault(void)
{
	uint8_t *p = map(PROT_READ | PROT_WRITE), *ro = map(PROT_READ), *none = map(PROT_NONE);
	struct ibv_mr *mr;

	begin();
	CHECK_EQ(munmap(p + LEN / 2, LEN / 2), 0);
	CHECK_ERRNO(ibv_reg_mr(pd, p, LEN, IBV_ACCESS_LOCAL_WRITE), EFAULT);
	CHECK_ERRNO(ibv_reg_mr(pd, (void *)4096, LEN, 0), EFAULT);
	CHECK_ERRNO(ibv_reg_mr(pd, none, LEN, 0), EFAULT);
	CHECK_ERRNO(ibv_reg_mr(pd, ro, LEN, IBV_ACCESS_LOCAL_WRITE), EFAULT);
	CHECK(mr = ibv_reg_mr(pd, ro, LEN, IBV_ACCESS_REMOTE_READ));
	CHECK_EQ(ibv_dereg_mr(mr), 0);
	CHECK(mr = ibv_reg_mr(pd, p + 100, LEN / 2 - 100, IBV_ACCESS_LOCAL_WRITE));
	CHECK_EQ(ibv_dereg_mr(mr), 0);
	end();
}

static void bad_registrations_are_refused(void)
{
	void *p = map(PROT_READ | PROT_WRITE);

	begin();
	CHECK_ERRNO(ibv_reg_mr(pd, p, 0, IBV_ACCESS_LOCAL_WRITE), EINVAL);
	CHECK_ERRNO(ibv_reg_mr(pd, p, SIZE_MAX, IBV_ACCESS_LOCAL_WRITE), EINVAL);
	CHECK_ERRNO(ibv_reg_mr(pd, p, LEN, IBV_ACCESS_REMOTE_WRITE), EINVAL);
	CHECK_ERRNO(ibv_reg_mr(pd, p, LEN, IBV_ACCESS_REMOTE_ATOMIC), EINVAL);
	CHECK_ERRNO(ibv_reg_mr(pd, p, LEN, IBV_ACCESS_ON_DEMAND), EOPNOTSUPP);
	CHECK_ERRNO(ibv_reg_mr(pd, p, LEN, 1 << 15), EOPNOTSUPP);
	end();
}

static void optional_flags_are_ignored(void)
{
	void *p = map(PROT_READ | PROT_WRITE);
	struct ibv_mr *mr;
	int flags = IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_RELAXED_ORDERING;

	begin();
	CHECK(mr = ibv_reg_mr(pd, p, LEN, flags)); /* goes through ibv_reg_mr_iova2 */
	CHECK_EQ(ibv_dereg_mr(mr), 0);
	end();
}

static void reregistering_changes_in_place(void)
{
	uint8_t *p = map(PROT_READ | PROT_WRITE), *q = map(PROT_READ | PROT_WRITE);
	struct ibv_pd *pd2;
	struct ibv_mr *mr;
	uint32_t key;

	begin();
	CHECK(pd2 = ibv_alloc_pd(ctx));
	CHECK(mr = ibv_reg_mr(pd, p, LEN, IBV_ACCESS_LOCAL_WRITE));
	key = mr->rkey;
	CHECK_EQ(ibv_rereg_mr(mr, IBV_REREG_MR_CHANGE_TRANSLATION, NULL, q, LEN / 2, 0), 0);
	CHECK(mr->addr == q && mr->length == LEN / 2 && mr->pd == pd);
	CHECK_EQ(ibv_rereg_mr(mr, IBV_REREG_MR_CHANGE_PD, pd2, NULL, 0, 0), 0);
	CHECK(mr->pd == pd2 && mr->addr == q);
	CHECK_EQ(ibv_rereg_mr(mr, IBV_REREG_MR_CHANGE_ACCESS, NULL, NULL, 0,
			      IBV_ACCESS_LOCAL_WRITE | IBV_ACCESS_REMOTE_WRITE),
		 0);
	/* Failures leave it as it was. */
	CHECK_EQ(ibv_rereg_mr(mr, 0, NULL, NULL, 0, 0), IBV_REREG_MR_ERR_INPUT);
	CHECK_EQ(ibv_rereg_mr(mr, 1 << 10, NULL, NULL, 0, 0), IBV_REREG_MR_ERR_INPUT);
	CHECK_EQ(ibv_rereg_mr(mr, IBV_REREG_MR_CHANGE_TRANSLATION, NULL, NULL, LEN, 0),
		 IBV_REREG_MR_ERR_INPUT);
	CHECK_EQ(ibv_rereg_mr(mr, IBV_REREG_MR_CHANGE_PD, NULL, NULL, 0, 0), IBV_REREG_MR_ERR_INPUT);
	CHECK(mr->pd == pd2 && mr->addr == q && mr->length == LEN / 2);
	CHECK(mr->rkey == key && mr->lkey == key); /* programs go on with keys that peers know */
	CHECK_EQ(ibv_dealloc_pd(pd2), EBUSY);
	CHECK_EQ(ibv_dereg_mr(mr), 0);
	CHECK_EQ(ibv_dealloc_pd(pd2), 0);
	end();
}

/* rdma-core >= 58's call, which older headers lack. */
struct reg_attr {
	size_t length;
	int access;
	uint64_t comp_mask, iova;
	void *addr;
	int fd;
	uint64_t fd_offset;
	void *dmah, *buf;
};
struct ibv_mr *reg_mr_ex(struct ibv_pd *pd, struct reg_attr *attr) __asm__("ibv_reg_mr_ex")
	__attribute__((weak));

static void the_newer_registration_works(void)
{
	struct reg_attr a = {.length = LEN,
			     .access = IBV_ACCESS_LOCAL_WRITE,
			     .comp_mask = 2,
			     .addr = map(PROT_READ | PROT_WRITE)};
	struct ibv_mr *mr;

	begin();
	CHECK(reg_mr_ex);
	CHECK(mr = reg_mr_ex(pd, &a));
	CHECK(mr->addr == a.addr && mr->length == LEN);
	CHECK_EQ(ibv_dereg_mr(mr), 0);
	a.comp_mask = 2 | 4; /* a descriptor */
	CHECK_ERRNO(reg_mr_ex(pd, &a), EOPNOTSUPP);
	a.comp_mask = 0;
	CHECK_ERRNO(reg_mr_ex(pd, &a), EINVAL);
	end();
}

/* rdma-core 64's, whose ibv_rc_pingpong works in such a buffer. */
void *alloc_buf(struct ibv_pd *pd, size_t size, void **buf) __asm__("ibv_alloc_buf") __attribute__((weak));
void free_buf(void *buf) __asm__("ibv_free_buf") __attribute__((weak));
struct ibv_mr *reg_buf_mr(struct ibv_pd *pd, void *buf, void *addr, size_t length,
			  int access) __asm__("ibv_reg_buf_mr") __attribute__((weak));

static void buffers_are_allocated_and_registered(void)
{
	struct reg_attr a = {.length = LEN, .access = IBV_ACCESS_LOCAL_WRITE, .comp_mask = 2 | 32};
	struct ibv_pd *other;
	struct ibv_mr *mr;
	void *buf;
	char *p;

	begin();
	CHECK(alloc_buf && free_buf && reg_buf_mr);
	CHECK(p = alloc_buf(pd, LEN, &buf));
	CHECK_EQ((uintptr_t)p % 4096, 0);
	memset(p, 1, LEN);
	CHECK(mr = reg_buf_mr(pd, buf, p, LEN, IBV_ACCESS_LOCAL_WRITE));
	CHECK(mr->addr == p && mr->length == LEN);
	CHECK_EQ(ibv_dereg_mr(mr), 0);
	CHECK(mr = reg_buf_mr(pd, buf, p + 1, LEN - 1, 0));
	CHECK_EQ(ibv_dereg_mr(mr), 0);
	CHECK_ERRNO(reg_buf_mr(pd, buf, p, LEN + 1, 0), EINVAL);
	CHECK_ERRNO(reg_buf_mr(pd, buf, p + 1, SIZE_MAX, 0), EINVAL);
	CHECK(other = ibv_alloc_pd(pd->context));
	CHECK_ERRNO(reg_buf_mr(other, buf, p, LEN, 0), EINVAL); /* another PD's */
	CHECK_EQ(ibv_dealloc_pd(other), 0);
	CHECK_ERRNO(reg_buf_mr(pd, buf, p - 1, 1, 0), EINVAL);
	CHECK_ERRNO(reg_buf_mr(pd, NULL, p, LEN, 0), EINVAL);
	a.addr = p;
	a.buf = buf;
	CHECK(mr = reg_mr_ex(pd, &a));
	CHECK_EQ(ibv_dereg_mr(mr), 0);
	a.length++;
	CHECK_ERRNO(reg_mr_ex(pd, &a), EINVAL);
	free_buf(buf);
	CHECK_ERRNO(alloc_buf(pd, SIZE_MAX / 2, &buf), ENOMEM);
	end();
}

static void parent_domains_stand_for_their_pd(void)
{
	struct ibv_parent_domain_init_attr attr = {0};
	struct ibv_pd *parent;
	struct ibv_td *td;
	struct ibv_mr *mr;
	void *p = map(PROT_READ | PROT_WRITE);

	begin();
	CHECK(td = ibv_alloc_td(ctx, &(struct ibv_td_init_attr){0}));
	CHECK_ERRNO(ibv_alloc_td(ctx, &(struct ibv_td_init_attr){.comp_mask = 1}), EOPNOTSUPP);
	CHECK_ERRNO(ibv_alloc_parent_domain(ctx, &attr), EINVAL);
	attr.pd = pd;
	attr.td = td;
	attr.comp_mask = IBV_PARENT_DOMAIN_INIT_ATTR_ALLOCATORS;
	CHECK_ERRNO(ibv_alloc_parent_domain(ctx, &attr), EOPNOTSUPP);
	attr.comp_mask = 0;
	CHECK(parent = ibv_alloc_parent_domain(ctx, &attr));
	CHECK_EQ(ibv_dealloc_pd(pd), EBUSY);
	CHECK(mr = ibv_reg_mr(parent, p, LEN, IBV_ACCESS_LOCAL_WRITE));
	CHECK(mr->pd == parent);
	CHECK_EQ(ibv_dereg_mr(mr), 0);
	CHECK_EQ(ibv_dealloc_pd(parent), 0);
	CHECK_EQ(ibv_dealloc_td(td), 0);
	end();
}

TV_MAIN(T(a_region_says_what_it_is), T(memory_that_is_not_there_is_efault), T(bad_registrations_are_refused),
	T(optional_flags_are_ignored), T(reregistering_changes_in_place), T(the_newer_registration_works),
	T(buffers_are_allocated_and_registered), T(parent_domains_stand_for_their_pd))
