/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * dlsym.c - programs that load libibverbs themselves: dlopen, then dlsym or dlvsym from that handle.
 *
 * A look-up by handle does not go by the order of preloading, so it finds the real function. We stand
 * before dlsym and dlvsym and give, for what libibverbs or librdmacm would have given, what a program
 * that is linked with them gets. Everything else goes on to the C library by a jump: it tells the
 * caller, which RTLD_NEXT is about, by the return address.
 *
 * dlopen is left alone: it, too, goes by who calls it (run paths), and has nothing to be told.
 */
#include "verbs/forward.h"

#include <dlfcn.h>
#include <elf.h>
#include <link.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

/* ---- the C library's own, found without asking anybody ------------------------------------------ */

/* What dlsym finds: the tables of one object. Pointers are absolute (glibc has relocated them). */
struct object {
	ElfW(Addr) base;
	const ElfW(Sym) * sym;
	const char *str;
	const uint32_t *hash;	   /* DT_GNU_HASH */
	const ElfW(Half) * versym; /* NULL: no versions */
};

static const void *pointer(ElfW(Addr) base, ElfW(Addr) at)
{
	return (const void *)(at < base ? base + at : at); /* a read-only dynamic section is not relocated */
}

static bool read_object(const struct dl_phdr_info *info, struct object *o)
{
	*o = (struct object){.base = info->dlpi_addr};
	for (unsigned i = 0; i < info->dlpi_phnum; i++) {
		if (info->dlpi_phdr[i].p_type != PT_DYNAMIC)
			continue;
		for (const ElfW(Dyn) *d = pointer(0, o->base + info->dlpi_phdr[i].p_vaddr); d->d_tag; d++) {
			const void *at = pointer(o->base, d->d_un.d_ptr);

			switch (d->d_tag) {
			case DT_SYMTAB: o->sym = at; break;
			case DT_STRTAB: o->str = at; break;
			case DT_GNU_HASH: o->hash = at; break;
			case DT_VERSYM: o->versym = at; break;
			}
		}
	}
	return o->sym && o->str && o->hash;
}

/* The default version of a function. */
static void *find(const struct object *o, const char *name)
{
	const uint32_t buckets = o->hash[0], first = o->hash[1], bloom = o->hash[2];
	const uint32_t *bucket = o->hash + 4 + bloom * (sizeof(ElfW(Addr)) / 4), *chain = bucket + buckets;
	uint32_t hash = 5381, i;

	for (const char *c = name; *c; c++)
		hash = hash * 33 + (uint8_t)*c;
	i = bucket[hash % buckets];
	if (i < first)
		return NULL;
	for (;; i++) {
		const ElfW(Sym) *s = o->sym + i;

		if ((chain[i - first] | 1) == (hash | 1) && s->st_shndx != SHN_UNDEF &&
		    !strcmp(o->str + s->st_name, name) && !(o->versym && o->versym[i] & 0x8000))
			return (void *)(o->base + s->st_value);
		if (chain[i - first] & 1)
			return NULL;
	}
}

typedef void *dlsym_fn(void *handle, const char *name);
typedef void *dlvsym_fn(void *handle, const char *name, const char *version);

static void *no_dlsym(void *handle, const char *name)
{
	return NULL;
}

static void *no_dlvsym(void *handle, const char *name, const char *version)
{
	return NULL;
}

/* Where the jumps go; set before the first of them. */
extern dlsym_fn *_Atomic mgv_next_dlsym;
extern dlvsym_fn *_Atomic mgv_next_dlvsym;
__attribute__((visibility("hidden"))) dlsym_fn *_Atomic mgv_next_dlsym;
__attribute__((visibility("hidden"))) dlvsym_fn *_Atomic mgv_next_dlvsym;

static int look_in(struct dl_phdr_info *info, size_t size, void *arg)
{
	const char *base = info->dlpi_name ? strrchr(info->dlpi_name, '/') : NULL;
	struct object o;
	void *fn;

	base = base ? base + 1 : info->dlpi_name;
	/* libdl: before glibc 2.34 */
	if (!base || (strcmp(base, "libc.so.6") && strcmp(base, "libdl.so.2")) || !read_object(info, &o))
		return 0;
	fn = find(&o, "dlsym");
	if (fn)
		mgv_next_dlsym = (dlsym_fn *)fn;
	fn = find(&o, "dlvsym");
	if (fn)
		mgv_next_dlvsym = (dlvsym_fn *)fn;
	return mgv_next_dlsym && mgv_next_dlvsym;
}

/* Repeating it is harmless: it finds the same. */
static void look(void)
{
	if (mgv_next_dlsym && mgv_next_dlvsym)
		return;
	dl_iterate_phdr(look_in, NULL);
	if (!mgv_next_dlsym)
		mgv_next_dlsym = no_dlsym;
	if (!mgv_next_dlvsym)
		mgv_next_dlvsym = no_dlvsym;
}

void *mgv_dlsym(void *handle, const char *name)
{
	look();
	return mgv_next_dlsym(handle, name);
}

/* ---- what is ours to give ------------------------------------------------------------------------ */

static bool may_be_ours(void *handle, const char *name)
{
	if (handle == RTLD_NEXT || handle == RTLD_DEFAULT || !name)
		return false;
	if (*name == '_')
		name++;
	return !strncmp(name, "ibv_", 4) || !strncmp(name, "rdma_", 5);
}

static bool from_rdma_core(const void *sym)
{
	const char *base;
	Dl_info info;

	if (!sym || !dladdr(sym, &info) || !info.dli_fname)
		return false;
	base = strrchr(info.dli_fname, '/');
	base = base ? base + 1 : info.dli_fname;
	return !strncmp(base, "libibverbs.so", 13) || !strncmp(base, "librdmacm.so", 12);
}

/* In place of `sym`, or NULL to leave things as they are. Neither touches what dlerror() will say. */
static void *replace(void *sym, const char *name)
{
	void *linked;

	if (!from_rdma_core(sym))
		return NULL;
	linked = mgv_next_dlsym(RTLD_DEFAULT, name);
	if (!linked)
		dlerror();
	return linked;
}

void *mgv_dlsym_ours(void *handle, const char *name);
void *mgv_dlvsym_ours(void *handle, const char *name, const char *version);

__attribute__((visibility("hidden"))) void *mgv_dlsym_ours(void *handle, const char *name)
{
	look();
	return may_be_ours(handle, name) ? replace(mgv_next_dlsym(handle, name), name) : NULL;
}

__attribute__((visibility("hidden"))) void *mgv_dlvsym_ours(void *handle, const char *name,
							    const char *version)
{
	look();
	/* IBVERBS_1.0 is another ABI, before 2006. */
	if (!may_be_ours(handle, name) || !version || !strcmp(version, "IBVERBS_1.0"))
		return NULL;
	return replace(mgv_next_dlvsym(handle, name, version), name);
}

/* ---- the entries ----------------------------------------------------------------------------------- */

#if defined(__has_feature)
#define SANITIZED (__has_feature(address_sanitizer) || __has_feature(thread_sanitizer))
#elif defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define SANITIZED 1
#else
#define SANITIZED 0
#endif

#if SANITIZED
/* None: the sanitizer's runtime asks dlsym for what it needs before anything instrumented may run. */
#elif defined(__x86_64__) && defined(__LP64__)
#define ENTRY(name)                                                                                  \
	__asm__(".text\n\t.p2align 4\n\t.globl " #name "\n\t.type " #name ",@function\n" #name ":\n" \
		"	.cfi_startproc\n"                                                                  \
		"	endbr64\n"                                                                         \
		"	pushq %rdi\n	.cfi_adjust_cfa_offset 8\n"                                           \
		"	pushq %rsi\n	.cfi_adjust_cfa_offset 8\n"                                           \
		"	pushq %rdx\n	.cfi_adjust_cfa_offset 8\n"                                           \
		"	call mgv_" #name "_ours\n"                                                   \
		"	popq %rdx\n	.cfi_adjust_cfa_offset -8\n"                                           \
		"	popq %rsi\n	.cfi_adjust_cfa_offset -8\n"                                           \
		"	popq %rdi\n	.cfi_adjust_cfa_offset -8\n"                                           \
		"	testq %rax, %rax\n"                                                                \
		"	jne 1f\n"                                                                          \
		"	movq mgv_next_" #name "(%rip), %rax\n"                                       \
		"	jmp *%rax\n"                                                                       \
		"1:	ret\n"                                                                           \
		"	.cfi_endproc\n"                                                                    \
		"	.size " #name ", .-" #name)
ENTRY(dlsym);
ENTRY(dlvsym);
#elif defined(__aarch64__)
#define ENTRY(name)                                                                                  \
	__asm__(".text\n\t.p2align 4\n\t.globl " #name "\n\t.type " #name ",%function\n" #name ":\n" \
		"	.cfi_startproc\n"                                                                  \
		"	hint #34\n" /* bti c */                                                      \
		"	stp x29, x30, [sp, #-48]!\n"                                                       \
		"	.cfi_def_cfa_offset 48\n"                                                          \
		"	.cfi_offset 29, -48\n	.cfi_offset 30, -40\n"                                       \
		"	stp x0, x1, [sp, #16]\n"                                                           \
		"	str x2, [sp, #32]\n"                                                               \
		"	bl mgv_" #name "_ours\n"                                                     \
		"	mov x16, x0\n"                                                                     \
		"	ldr x2, [sp, #32]\n"                                                               \
		"	ldp x0, x1, [sp, #16]\n"                                                           \
		"	ldp x29, x30, [sp], #48\n"                                                         \
		"	.cfi_def_cfa_offset 0\n	.cfi_restore 29\n	.cfi_restore 30\n"                       \
		"	cbnz x16, 1f\n"                                                                    \
		"	adrp x16, mgv_next_" #name "\n"                                              \
		"	ldr x16, [x16, :lo12:mgv_next_" #name "]\n"                                  \
		"	br x16\n"                                                                          \
		"1:	mov x0, x16\n"                                                                   \
		"	ret\n"                                                                             \
		"	.cfi_endproc\n"                                                                    \
		"	.size " #name ", .-" #name)
ENTRY(dlsym);
ENTRY(dlvsym);
#else
/* The compiler makes jumps of these calls when it optimizes. */
__attribute__((visibility("default"))) void *dlsym(void *restrict handle, const char *restrict name)
{
	void *ours = mgv_dlsym_ours(handle, name);

	return ours ? ours : mgv_next_dlsym(handle, name);
}

__attribute__((visibility("default"))) void *dlvsym(void *restrict handle, const char *restrict name,
						    const char *restrict version)
{
	void *ours = mgv_dlvsym_ours(handle, name, version);

	return ours ? ours : mgv_next_dlvsym(handle, name, version);
}
#endif
