/* SPDX-License-Identifier: BSD-3-Clause */
/* The device's files, as programs look for them that do not ask libibverbs. */
#include "tv.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#define SYS "/sys/class/infiniband/rxe0"

static void named(char *node, size_t size)
{
	struct ibv_device *dev, **list = tv_devices(&dev);

	snprintf(node, size, "/dev/infiniband/%s", dev->dev_name);
	ibv_free_device_list(list);
}

/* What UCX asks before it takes a device. */
static void the_device_node_looks_like_one(void)
{
	struct stat st;
	char node[128];

	named(node, sizeof(node));
	CHECK_EQ(stat(node, &st), 0);
	CHECK(S_ISCHR(st.st_mode));
	CHECK_EQ(access(node, R_OK | W_OK), 0);
	CHECK_EQ(stat("/dev/infiniband/uverbs-other", &st), -1);
	CHECK_EQ(errno, ENOENT);
}

static void read_all(const char *path, char *out, size_t size)
{
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	ssize_t n;

	CHECK(fd >= 0);
	CHECK(fcntl(fd, F_GETFD) & FD_CLOEXEC);
	n = read(fd, out, size - 1);
	CHECK(n > 0);
	out[n] = 0;
	CHECK_EQ(read(fd, out + n, size - 1 - (size_t)n), 0);
	close(fd);
}

static void sysfs_can_be_read(void)
{
	char text[128], node[128];
	struct stat st;
	FILE *f;

	named(node, sizeof(node));
	read_all(SYS "/ports/1/gid_attrs/types/0", text, sizeof(text));
	CHECK(!strcmp(text, "RoCE v2\n"));
	read_all(SYS "/ports/1/link_layer", text, sizeof(text));
	CHECK(!strcmp(text, "Ethernet\n"));
	f = fopen(SYS "/ports/1/state", "r");
	CHECK(f && fgets(text, sizeof(text), f) && !strcmp(text, "4: ACTIVE\n"));
	fclose(f);
	CHECK(!stat(SYS "/ports/1/state", &st) && S_ISREG(st.st_mode));
	CHECK(!stat(SYS, &st) && S_ISDIR(st.st_mode));
	CHECK_EQ(access(SYS "/ports/1/state", R_OK), 0);
}

static void sysfs_cannot_be_written_nor_read_where_nothing_is(void)
{
	struct stat st;
	char node[128];

	named(node, sizeof(node));
	CHECK_EQ(open(SYS "/node_desc", O_WRONLY), -1);
	CHECK_EQ(errno, EACCES);
	CHECK(!fopen(SYS "/node_desc", "w") && errno == EACCES);
	CHECK_EQ(access(SYS "/node_desc", W_OK), -1);
	CHECK_EQ(open(SYS "/ports/2/state", O_RDONLY), -1);
	CHECK_EQ(errno, ENOENT);
	CHECK_EQ(stat(SYS "/ports/1/gids/999", &st), -1);
	CHECK_EQ(open(SYS "0/node_desc", O_RDONLY), -1); /* another device's */
	CHECK_EQ(errno, ENOENT);
}

static void other_files_are_what_they_are(void)
{
	char path[] = "/tmp/migroce-t-files-XXXXXX", text[16] = "";
	struct stat st;
	int fd = mkstemp(path);

	CHECK(fd >= 0);
	CHECK_EQ(write(fd, "abc", 3), 3);
	close(fd);
	CHECK(!stat(path, &st) && st.st_size == 3);
	CHECK_EQ(access(path, R_OK), 0);
	fd = open(path, O_RDONLY);
	CHECK_EQ(read(fd, text, sizeof(text)), 3);
	close(fd);
	CHECK_EQ(unlink(path), 0);
	fd = openat(AT_FDCWD, path, O_WRONLY | O_CREAT | O_EXCL, 0640); /* the mode arrives */
	CHECK(fd >= 0 && !fstat(fd, &st) && (st.st_mode & 0777) == (0640 & ~umask(022)));
	close(fd);
	CHECK_EQ(unlink(path), 0);
	CHECK_EQ(open(path, O_RDONLY), -1);
	CHECK_EQ(errno, ENOENT);
}

TV_MAIN(T(the_device_node_looks_like_one), T(sysfs_can_be_read),
	T(sysfs_cannot_be_written_nor_read_where_nothing_is), T(other_files_are_what_they_are))
