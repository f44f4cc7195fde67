/* Preloaded before the C library: calls that change files under a folder fail, as on a full or read-only disk.

   FAIL_UNDER  the folder; without it nothing fails
   FAIL_AT     the number of the first call that fails, from 1; all behind it fail too. A write takes half first
   FAIL_WITH   the errno: ENOSPC spares what needs no space (unlink, rmdir, opening what is there)
   FAIL_LOG    a file that gets a line for each call, "NAME PATH", failed or not */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int calls;

/* 1 where the call on that path is to fail, 2 where it is the first that does */
static int fails(const char *name, const char *path, int needs_space) {
    const char *under = getenv("FAIL_UNDER"), *at = getenv("FAIL_AT"), *with = getenv("FAIL_WITH");
    const char *log = getenv("FAIL_LOG");
    if (!under || !at || !path || strncmp(path, under, strlen(under))) return 0;
    int number = __atomic_add_fetch(&calls, 1, __ATOMIC_SEQ_CST), error = with ? atoi(with) : ENOSPC;
    if (log) {
        char line[4200];
        int length = snprintf(line, sizeof line, "%s %s\n", name, path + strlen(under));
        int fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
        syscall(SYS_write, fd, line, length);
        syscall(SYS_close, fd);
    }
    if (number < atoi(at) || (error != EROFS && !needs_space)) return 0;
    errno = error;
    return number == atoi(at) ? 2 : 1;
}

static int fd_fails(const char *name, int fd) {
    char link[64], path[4096];
    if (fd < 3 || !getenv("FAIL_UNDER")) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return fails(name, path, 1);
}

static int open_fails(const char *path, int flags) {
    if ((flags & O_ACCMODE) == O_RDONLY) return 0;
    return fails("open", path, (flags & O_CREAT) && access(path, F_OK));
}

/* `first` are the parameters before the flags, with and without their types */
#define OPEN(name, typed, first)                                                                                     \
    int name(typed, int flags, ...) {                                                                                \
        va_list list;                                                                                                \
        va_start(list, flags);                                                                                       \
        int mode = va_arg(list, int);                                                                                \
        va_end(list);                                                                                                \
        return open_fails(path, flags) ? -1 : NEXT(name)(first, flags, mode);                                        \
    }
#define PATH const char *path
#define BOTH(a, b) a, b
OPEN(open, PATH, path)
OPEN(open64, PATH, path)
OPEN(openat, BOTH(int at, PATH), BOTH(at, path))
OPEN(openat64, BOTH(int at, PATH), BOTH(at, path))

ssize_t write(int fd, const void *data, size_t size) {
    int found = fd_fails("write", fd);
    if (found == 1 || (found && size < 2)) return -1;
    return NEXT(write)(fd, data, found ? size / 2 : size);
}

#define PWRITEV(name, type)                                                                                          \
    ssize_t name(int fd, const struct iovec *parts, int count, type offset) {                                        \
        int found = fd_fails("pwritev", fd);                                                                         \
        if (found == 1 || (found && parts->iov_len < 2)) return -1;                                                  \
        struct iovec half = {parts->iov_base, parts->iov_len / 2};                                                   \
        return found ? NEXT(name)(fd, &half, 1, offset) : NEXT(name)(fd, parts, count, offset);                      \
    }
PWRITEV(pwritev, off_t)
PWRITEV(pwritev64, off64_t)

#define PWRITEV2(name, type)                                                                                         \
    ssize_t name(int fd, const struct iovec *parts, int count, type offset, int flags) {                             \
        int found = fd_fails("pwritev", fd);                                                                         \
        if (found == 1 || (found && parts->iov_len < 2)) return -1;                                                  \
        struct iovec half = {parts->iov_base, parts->iov_len / 2};                                                   \
        return found ? NEXT(name)(fd, &half, 1, offset, flags) : NEXT(name)(fd, parts, count, offset, flags);        \
    }
PWRITEV2(pwritev2, off_t)
PWRITEV2(pwritev64v2, off64_t)

int fsync(int fd) { return fd_fails("fsync", fd) ? -1 : NEXT(fsync)(fd); }

int ftruncate(int fd, off_t size) { return fd_fails("truncate", fd) ? -1 : NEXT(ftruncate)(fd, size); }
int ftruncate64(int fd, off64_t size) { return fd_fails("truncate", fd) ? -1 : NEXT(ftruncate64)(fd, size); }

int mkdir(const char *path, mode_t mode) { return fails("mkdir", path, 1) ? -1 : NEXT(mkdir)(path, mode); }

int rename(const char *from, const char *to) { return fails("rename", to, 1) ? -1 : NEXT(rename)(from, to); }

int link(const char *from, const char *to) { return fails("link", to, 1) ? -1 : NEXT(link)(from, to); }

int unlink(const char *path) { return fails("unlink", path, 0) ? -1 : NEXT(unlink)(path); }

int rmdir(const char *path) { return fails("rmdir", path, 0) ? -1 : NEXT(rmdir)(path); }
