/* SPDX-License-Identifier: BSD-3-Clause */
/*
 * files.c - the device's files, for programs that look past libibverbs: UCX, NCCL and others read
 * /sys/class/infiniband/rxe0/... by themselves and want /dev/infiniband/<dev_name> to be a character
 * device. There are none, as no kernel driver is behind rxe0, so the C library's calls that name such
 * a path are answered here; all others go straight on. Reading gives what sysfs.c has, in a memory
 * file, which CRIU takes along.
 */
#include "verbs/forward.h"
#include "verbs/mgv.h"

#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/*
 * The wrappers have names of their own and are given the C library's by label: its headers may
 * rename open to open64, which is a symbol besides open.
 */
#define WRAP(ret, symbol, name, ...)           \
	MGV_EXPORT ret name(__VA_ARGS__);      \
	ret name(__VA_ARGS__) __asm__(symbol); \
	MGV_EXPORT ret name(__VA_ARGS__)

typedef int (*open_fn)(const char *, int, ...);
typedef int (*openat_fn)(int, const char *, int, ...);
typedef FILE *(*fopen_fn)(const char *, const char *);
typedef int (*stat_fn)(const char *, struct stat *);
typedef int (*access_fn)(const char *, int);

enum what { NOT_OURS, NODE, FILE_OF_SYS, DIR_OF_SYS, MISSING };

static const char *below(const char *path, const char *dir)
{
	size_t n = strlen(dir);

	return !strncmp(path, dir, n) && (!path[n] || path[n] == '/') ? path + n : NULL;
}

static enum what look(const char *path, char *text, size_t size)
{
	const struct ibv_device *ib = &mgv_device.ib;
	const char *rest;

	/* Nearly every path ends here. Nothing is ours before the device was listed once. */
	if (!path || path[0] != '/' || (path[1] != 's' && path[1] != 'd') || !ib->ibdev_path[0])
		return NOT_OURS;
	if (!strncmp(path, "/dev/infiniband/", 16))
		return strcmp(path + 16, ib->dev_name) ? NOT_OURS : NODE;
	rest = below(path, ib->ibdev_path);
	if (!rest)
		return NOT_OURS;
	rest += strspn(rest, "/");
	if (!*rest || !strcmp(rest, "ports") || !strcmp(rest, "ports/1"))
		return DIR_OF_SYS;
	return mgv_sysfs(rest, text, size) ? FILE_OF_SYS : MISSING;
}

/* A descriptor at the start of `text` and a line end, as sysfs gives it. */
static int memory_file(const char *text, int flags)
{
	int fd;

	if ((flags & O_ACCMODE) != O_RDONLY) {
		errno = EACCES;
		return -1;
	}
	fd = memfd_create("migroce-sysfs", flags & O_CLOEXEC ? MFD_CLOEXEC : 0);
	if (fd < 0)
		return -1;
	if (dprintf(fd, "%s\n", text) < 0 || lseek(fd, 0, SEEK_SET) < 0) {
		close(fd);
		errno = EIO;
		return -1;
	}
	return fd;
}

/* True: *fd is the answer (-1 with errno). False: the C library's turn, with *path. */
static bool open_ours(const char **path, int flags, int *fd)
{
	char text[MGV_SYSFS_MAX];

	switch (look(*path, text, sizeof(text))) {
	case NODE: *path = "/dev/null"; return false; /* to be opened, not to be used: verbs go by calls */
	case FILE_OF_SYS: *fd = memory_file(text, flags); return true;
	case DIR_OF_SYS:
	case MISSING:
		errno = ENOENT;
		*fd = -1;
		return true;
	default: return false;
	}
}

static mode_t creation_mode(int flags, va_list ap)
{
	return flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(ap, mode_t) : 0;
}

/* open or openat: `params` and `args` are its own and its call's, in parentheses. */
#define LIST(...) __VA_ARGS__
#define WRAP_OPEN(symbol, name, type, params, args)                   \
	WRAP(int, symbol, name, LIST params, ...)                     \
	{                                                             \
		type real = MGV_REAL_AS(type, symbol);                \
		mode_t mode;                                          \
		va_list ap;                                           \
		int fd;                                               \
                                                                      \
		va_start(ap, flags);                                  \
		mode = creation_mode(flags, ap);                      \
		va_end(ap);                                           \
		return open_ours(&path, flags, &fd) ? fd : real args; \
	}                                                             \
	_Static_assert(1, "")
#define OPEN(symbol, name) \
	WRAP_OPEN(symbol, name, open_fn, (const char *path, int flags), (path, flags, mode))
#define OPENAT(symbol, name) \
	WRAP_OPEN(symbol, name, openat_fn, (int dir, const char *path, int flags), (dir, path, flags, mode))
#define WRAP_OPEN_2(symbol, name) /* what open() becomes under _FORTIFY_SOURCE */       \
	WRAP(int, symbol, name, const char *path, int flags)                            \
	{                                                                               \
		int (*real)(const char *, int) = MGV_REAL_AS(__typeof__(real), symbol); \
		int fd;                                                                 \
                                                                                        \
		return open_ours(&path, flags, &fd) ? fd : real(path, flags);           \
	}                                                                               \
	_Static_assert(1, "")
#define WRAP_FOPEN(symbol, name)                                                      \
	WRAP(FILE *, symbol, name, const char *path, const char *mode)                \
	{                                                                             \
		fopen_fn real = MGV_REAL_AS(fopen_fn, symbol);                        \
		int flags = mode[0] == 'r' && !strchr(mode, '+') ? O_RDONLY : O_RDWR; \
		FILE *f;                                                              \
		int fd;                                                               \
                                                                                      \
		if (!open_ours(&path, flags | O_CLOEXEC, &fd))                        \
			return real(path, mode);                                      \
		f = fd < 0 ? NULL : fdopen(fd, "r");                                  \
		if (!f && fd >= 0)                                                    \
			close(fd);                                                    \
		return f;                                                             \
	}                                                                             \
	_Static_assert(1, "")
/* A file's attributes are those of something like it that is there. */
#define WRAP_STAT(symbol, name)                                    \
	WRAP(int, symbol, name, const char *path, struct stat *st) \
	{                                                          \
		stat_fn real = MGV_REAL_AS(stat_fn, symbol);       \
                                                                   \
		return stat_path(&path) ? -1 : real(path, st);     \
	}                                                          \
	_Static_assert(1, "")

static int stat_path(const char **path)
{
	char text[MGV_SYSFS_MAX];

	switch (look(*path, text, sizeof(text))) {
	case NODE: *path = "/dev/null"; return 0;
	case FILE_OF_SYS: *path = "/proc/version"; return 0; /* a regular file that all may read */
	case DIR_OF_SYS: *path = "/"; return 0;
	case MISSING: errno = ENOENT; return -1;
	default: return 0;
	}
}

OPEN("open", mgv_open);
OPEN("open64", mgv_open64);
OPENAT("openat", mgv_openat);
OPENAT("openat64", mgv_openat64);
WRAP_OPEN_2("__open_2", mgv_open_2);
WRAP_OPEN_2("__open64_2", mgv_open64_2);
WRAP_FOPEN("fopen", mgv_fopen);
WRAP_FOPEN("fopen64", mgv_fopen64);
WRAP_STAT("stat", mgv_stat);
WRAP_STAT("stat64", mgv_stat64);
WRAP_STAT("lstat", mgv_lstat);
WRAP_STAT("lstat64", mgv_lstat64);

WRAP(int, "access", mgv_access, const char *path, int mode)
{
	access_fn real = MGV_REAL_AS(access_fn, "access");
	char text[MGV_SYSFS_MAX];

	switch (look(path, text, sizeof(text))) {
	case NODE: return real("/dev/null", mode);
	case FILE_OF_SYS:
	case DIR_OF_SYS:
		if (!(mode & W_OK))
			return 0;
		errno = EACCES;
		return -1;
	case MISSING: errno = ENOENT; return -1;
	default: return real(path, mode);
	}
}
