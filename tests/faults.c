/* What tests/faults.py preloads (LD_PRELOAD): a fault at one operation on files.

   Operations are what changes files below one of the folders `roots`: open for writing, write,
   fsync, rename, unlink, mkdir, truncate. They are counted in a file that all processes of a trial
   map, so that operation number `at` is the same in each run of one command.

   kill, term, hup   the signal, to the process group, before operation `at`
   torn              half of the first write from `at` on, then SIGKILL
   power             SIGKILL before `at`; a copy of each file as it was at its last fsync is in the
                     folder `copies`, under its inode: faults.py puts these in place of the files
   disk              SIGKILL before `at`; faults.py then cuts the power of the disk
   full, readonly    ENOSPC, EROFS for every operation from `at` on
   eio               EIO for `times` reads of files below the folder `reads`, from number `at` on
   clock             the time of day is an hour earlier from operation `at` on */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static struct { volatile int64_t operations, reads; } *count;    /* shared by the processes */
static char kind[16], roots[2][4096], reads[4096], copies[4096];
static int64_t at, times;

#define REAL(name) ((__typeof__(&name)) dlsym(RTLD_NEXT, #name))

/* Begin to count, and to fail where FAULT_KIND is set: called by faults.py in the child that it
   forked, and in each program that this child starts. */
__attribute__((constructor)) void fault_arm(void)
{
    const char *file = getenv("FAULT_COUNT");
    if (!file || count) return;
    int fd = REAL(open)(file, O_RDWR | O_CREAT, 0644);
    if (fd < 0 || REAL(ftruncate)(fd, sizeof *count)) abort();
    count = mmap(NULL, sizeof *count, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    snprintf(kind, sizeof kind, "%s", getenv("FAULT_KIND"));
    snprintf(roots[0], 4096, "%s", getenv("FAULT_ROOT_1"));
    snprintf(roots[1], 4096, "%s", getenv("FAULT_ROOT_2"));
    snprintf(reads, 4096, "%s", getenv("FAULT_READS"));
    snprintf(copies, 4096, "%s", getenv("FAULT_COPIES"));
    at = atoll(getenv("FAULT_AT")), times = atoll(getenv("FAULT_TIMES"));
}

static int below(const char *path, const char *root)
{
    char full[8192];
    if (path[0] != '/') {                                    /* paths are not normalised otherwise */
        if (!getcwd(full, 4096)) return 0;
        strcat(strcat(full, "/"), path);
        path = full;
    }
    return root[0] && !strncmp(path, root, strlen(root));
}

static const char *path_of(int fd, char *path)
{
    char link[32];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, 4095);
    path[n < 0 ? 0 : n] = 0;
    return path;
}

/* Count an operation on a path, and fail here if it is time: the error, or 0. */
static int operation(const char *path, int is_write)
{
    if (!count || !(below(path, roots[0]) || below(path, roots[1]))) return 0;
    int64_t now = __sync_fetch_and_add(&count->operations, 1);
    if (now < at) return 0;
    if (!strcmp(kind, "full")) return ENOSPC;
    if (!strcmp(kind, "readonly")) return EROFS;
    if (!strcmp(kind, "torn")) return is_write ? -1 : 0;
    if (now > at) return 0;
    if (!strcmp(kind, "kill") || !strcmp(kind, "power") || !strcmp(kind, "disk"))
        kill(0, SIGKILL), pause();
    if (!strcmp(kind, "term")) kill(0, SIGTERM);
    if (!strcmp(kind, "hup")) kill(0, SIGHUP);
    return 0;
}

#define FAIL(path) do { int error = operation(path, 0); \
                        if (error > 0) return errno = error, -1; } while (0)

/* The content of a file is no longer that of its last fsync. */
static void forget(const char *path)
{
    struct stat of;
    char copy[8192];
    if (!count || !copies[0] || stat(path, &of)) return;
    snprintf(copy, sizeof copy, "%s/%ld", copies, (long) of.st_ino);
    REAL(unlink)(copy);
}

static void keep(int fd)
{
    struct stat of;
    char copy[8192], buffer[65536];
    if (!count || !copies[0] || fstat(fd, &of) || !S_ISREG(of.st_mode)) return;
    snprintf(copy, sizeof copy, "/proc/self/fd/%d", fd);
    int from = REAL(open)(copy, O_RDONLY);
    snprintf(copy, sizeof copy, "%s/%ld", copies, (long) of.st_ino);
    int to = REAL(open)(copy, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    for (ssize_t n; (n = REAL(read)(from, buffer, sizeof buffer)) > 0;)
        if (REAL(write)(to, buffer, n) != n) abort();
    close(from), close(to);
}

static int fail_read(int fd)
{
    char path[4096];
    if (!count || !below(path_of(fd, path), reads)) return 0;
    int64_t now = __sync_fetch_and_add(&count->reads, 1);
    return !strcmp(kind, "eio") && at <= now && now < at + times;
}

#define OPEN(name) int name(const char *path, int flags, ...) \
{ \
    va_list more; va_start(more, flags); \
    mode_t mode = va_arg(more, mode_t); va_end(more); \
    if (flags & (O_CREAT | O_TRUNC | O_WRONLY | O_RDWR)) FAIL(path); \
    if (flags & O_TRUNC) forget(path); \
    return REAL(name)(path, flags, mode); \
}
OPEN(open)
OPEN(open64)

ssize_t write(int fd, const void *from, size_t n)
{
    char path[4096];
    int error = count ? operation(path_of(fd, path), 1) : 0;
    if (error > 0) return errno = error, -1;
    if (error < 0) {
        if (REAL(write)(fd, from, n / 2) < 0) abort();
        kill(0, SIGKILL), pause();
    }
    return REAL(write)(fd, from, n);
}

ssize_t read(int fd, void *into, size_t n)
{
    if (fail_read(fd)) return errno = EIO, -1;
    return REAL(read)(fd, into, n);
}

int fsync(int fd)
{
    char path[4096];
    FAIL(path_of(fd, path));
    keep(fd);
    if (!strcmp(kind, "disk")) return REAL(fsync)(fd);
    return 0;                                                /* the machine stays on: save the time */
}
int fdatasync(int fd) { return fsync(fd); }

int rename(const char *from, const char *to) { FAIL(to); forget(to); return REAL(rename)(from, to); }
int unlink(const char *path) { FAIL(path); forget(path); return REAL(unlink)(path); }
int mkdir(const char *path, mode_t mode) { FAIL(path); return REAL(mkdir)(path, mode); }
int rmdir(const char *path) { FAIL(path); return REAL(rmdir)(path); }
int ftruncate64(int fd, off_t size)
{
    char path[4096];
    FAIL(path_of(fd, path));
    return REAL(ftruncate64)(fd, size);
}

int clock_gettime(clockid_t clock, struct timespec *now)
{
    int error = REAL(clock_gettime)(clock, now);
    if (clock == CLOCK_REALTIME && count && !strcmp(kind, "clock") && count->operations > at)
        now->tv_sec -= 3600;
    return error;
}
