/* SPDX-License-Identifier: BSD-3-Clause */
/* Programs that are not linked with libibverbs: they load it, or something that is linked with it. */
#include "tv.h"

#include <dlfcn.h>
#include <unistd.h>

static void *lib;

/* What `find` gives us of libibverbs shows our device and opens it. */
static void use(void *(*find)(const char *name))
{
	__typeof__(&ibv_get_device_list) get = find("ibv_get_device_list");
	__typeof__(&ibv_free_device_list) free_list = find("ibv_free_device_list");
	__typeof__(&ibv_get_device_name) name = find("ibv_get_device_name");
	__typeof__(&ibv_open_device) open = find("ibv_open_device");
	__typeof__(&ibv_close_device) close = find("ibv_close_device");
	struct ibv_device **list, *ours = NULL;
	struct ibv_context *ctx;

	CHECK(get && free_list && name && open && close);
	CHECK(list = get(NULL));
	for (int i = 0; list[i]; i++)
		if (!strncmp(name(list[i]), "rxe", 3))
			ours = list[i];
	CHECK(ours);
	CHECK(ctx = open(ours));
	CHECK_EQ(close(ctx), 0);
	free_list(list);
}

static void *by_dlsym(const char *name)
{
	return dlsym(lib, name);
}

static void *by_dlvsym(const char *name)
{
	return dlvsym(lib, name, "IBVERBS_1.1");
}

static void a_handle_of_libibverbs_gives_our_device(void)
{
	CHECK(lib = dlopen("libibverbs.so.1", RTLD_NOW | RTLD_LOCAL));
	use(by_dlsym);
	use(by_dlvsym);
}

/* A plugin that is linked with libibverbs, as UCX and Open MPI have them. It is in our run path. */
static void a_plugin_linked_with_libibverbs_gets_our_device(void)
{
	int (*ours)(void);

	CHECK(lib = dlopen("tvplugin.so", RTLD_NOW | RTLD_LOCAL));
	CHECK(ours = (int (*)(void))dlsym(lib, "plugin_sees_rxe"));
	CHECK_EQ(ours(), 1);
	use(by_dlsym); /* through the plugin's handle */
}

static void what_is_not_ours_stays_as_it_was(void)
{
	Dl_info info;
	void *sym;

	CHECK(lib = dlopen("libibverbs.so.1", RTLD_NOW | RTLD_LOCAL));
	CHECK(sym = dlsym(lib, "ibv_node_type_str")); /* takes no object: left to the real library */
	CHECK(dladdr(sym, &info) && strstr(info.dli_fname, "libibverbs"));
	CHECK(!dlerror());
	CHECK(!dlsym(lib, "ibv_no_such_thing"));
	CHECK(strstr(dlerror(), "ibv_no_such_thing"));
	CHECK(!dlvsym(lib, "ibv_open_device", "IBVERBS_9.9"));
	CHECK(dlerror());
	CHECK(sym = dlvsym(lib, "ibv_open_device", "IBVERBS_1.0")); /* another ABI */
	CHECK(dladdr(sym, &info) && strstr(info.dli_fname, "libibverbs"));
	CHECK(dlsym(RTLD_DEFAULT, "getppid") == (void *)getppid);
}

/* RTLD_NEXT is about who asks: this program stands before the C library with its own getppid. */
static int asked;
__attribute__((visibility("default"))) pid_t getppid(void)
{
	pid_t (*next)(void) = (pid_t(*)(void))dlsym(RTLD_NEXT, "getppid");

	CHECK_EQ(++asked, 1);
	return next();
}

static void the_next_symbol_is_the_callers_next(void)
{
	CHECK(getppid() > 0);
	CHECK_EQ(asked, 1);
}

TV_MAIN(T(a_handle_of_libibverbs_gives_our_device), T(a_plugin_linked_with_libibverbs_gets_our_device),
	T(what_is_not_ours_stays_as_it_was), T(the_next_symbol_is_the_callers_next))
