/* System calls and the lock that hooked paths may use: no malloc, no stdio, no symbol that this library itself exports.
 *
 * syscall(2) keeps libc's convention (-1 and errno), so a raw call can stand for the libc function it replaces. */
#ifndef SHIM_RAW_H
#define SHIM_RAW_H

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <stdbool.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static inline void *raw_mmap(void *at, size_t len, int prot, int flags, int fd, off_t offset)
{
    return (void *)syscall(SYS_mmap, at, len, prot, flags, fd, offset);
}

static inline int raw_munmap(void *at, size_t len)
{
    return (int)syscall(SYS_munmap, at, len);
}

static inline int raw_close(int fd)
{
    return (int)syscall(SYS_close, fd);
}

static inline int raw_fcntl(int fd, int command, long arg)
{
    return (int)syscall(SYS_fcntl, fd, command, arg);
}

static inline int raw_openat(int dir, const char *path, int flags, mode_t mode)
{
    return (int)syscall(SYS_openat, dir, path, flags, mode);
}

/* Whether the program's pointer can be read, so that the kernel and not we find it bad: an unknown `how` is refused,
 * but only after the set was read. */
static inline bool raw_readable(const void *p, size_t len)
{
    uintptr_t at = (uintptr_t)p, end = at + len;
    int saved = errno;
    bool good = p && end > at;
    for (; good && at < end; at = (at | 4095) + 1) {
        uintptr_t probe = end - at < 8 && len >= 8 ? end - 8 : at;
        good = syscall(SYS_rt_sigprocmask, 99, probe, NULL, 8) < 0 && errno == EINVAL;
    }
    errno = saved;
    return good;
}

/* Likewise a path: not empty, not too long. Nothing is looked up: -1 is no directory. */
static inline bool raw_path(const char *path)
{
    int saved = errno;
    bool good = path && syscall(SYS_symlinkat, path, -1, "x") < 0 && errno == EBADF;
    errno = saved;
    return good;
}

static inline int raw_fstat(int fd, struct stat *st)
{
    return (int)syscall(SYS_fstat, fd, st);
}

static inline int raw_statx(int dir, const char *path, int flags, unsigned mask, struct statx *st)
{
    return (int)syscall(SYS_statx, dir, path, flags, mask, st);
}

static inline off_t raw_lseek(int fd, off_t at, int whence)
{
    return (off_t)syscall(SYS_lseek, fd, at, whence);
}

static inline int raw_access(const char *path, int how)
{
    return (int)syscall(SYS_faccessat, AT_FDCWD, path, how);
}

static inline ssize_t raw_readlink(int dir, const char *path, char *to, size_t cap)
{
    return syscall(SYS_readlinkat, dir, path, to, cap);
}

static inline pid_t raw_getpid(void)
{
    return (pid_t)syscall(SYS_getpid);
}

static inline uint64_t raw_now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

/* Sleeps while *word is value, at most ms. The word may be shared with another process. */
static inline void raw_futex_wait(uint32_t *word, uint32_t value, unsigned ms)
{
    struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000};
    syscall(SYS_futex, word, FUTEX_WAIT, value, &t, NULL, 0);
}

static inline void raw_futex_wake(uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0);
}

static inline void raw_sleep_ms(unsigned ms)
{
    struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = (long)(ms % 1000) * 1000000};
    syscall(SYS_nanosleep, &t, NULL);
}

/* Anonymous memory of our own, zeroed; NULL without. */
static inline void *raw_memory(size_t len)
{
    void *at = raw_mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return at == MAP_FAILED ? NULL : at;
}

#endif
