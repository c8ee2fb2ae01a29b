/* Opening, copying and closing descriptors, and the sync points on them. Read-only opens cost nothing: only what can be
 * written is looked at. */
#include "shim/real.h"
#include "shim/view.h"

#include <pthread.h>

static bool writable(int flags)
{
    int access = flags & O_ACCMODE;
    return (access == O_WRONLY || access == O_RDWR) && !(flags & O_PATH);
}

/* A new number: whatever the table said of it is over. */
static int opened(int fd, int flags)
{
    if (fd < 0 || !shim_active())
        return fd;
    int saved = errno;
    if (writable(flags))
        files_opened(fd, FILES_FRESH | (flags & O_TRUNC ? FILES_TRUNCATED : 0));
    else if (files_entry(fd) != FD_UNKNOWN)
        files_renewed(fd);
    streams_standard(fd);
    errno = saved;
    return fd;
}

#define MODE_OF(flags, mode)                                                                                           \
    mode_t mode = 0;                                                                                                   \
    if ((flags) & (O_CREAT | (O_TMPFILE & ~O_DIRECTORY))) {                                                            \
        va_list args;                                                                                                  \
        va_start(args, flags);                                                                                         \
        mode = va_arg(args, mode_t);                                                                                   \
        va_end(args);                                                                                                  \
    }

/* Where a pull rule presents a remote region, nothing is opened on the disk. */
#define PULLED(dir, path, flags)                                                                                       \
    if (__builtin_expect(view_pulls, false) && shim_active()) {                                                        \
        int pulled_ = view_open(dir, path, flags);                                                                     \
        if (pulled_ != VIEW_NOT_OURS)                                                                                  \
            return pulled_;                                                                                            \
    }

SHIM_EXPORT int open(const char *path, int flags, ...)
{
    MODE_OF(flags, mode)
    PULLED(AT_FDCWD, path, flags)
    return opened(real.open ? real.open(path, flags, mode) : raw_openat(AT_FDCWD, path, flags, mode), flags);
}

SHIM_EXPORT int open64(const char *path, int flags, ...)
{
    MODE_OF(flags, mode)
    flags |= O_LARGEFILE;
    PULLED(AT_FDCWD, path, flags)
    return opened(real.open64 ? real.open64(path, flags, mode) : raw_openat(AT_FDCWD, path, flags, mode), flags);
}

SHIM_EXPORT int openat(int dir, const char *path, int flags, ...)
{
    MODE_OF(flags, mode)
    PULLED(dir, path, flags)
    return opened(real.openat ? real.openat(dir, path, flags, mode) : raw_openat(dir, path, flags, mode), flags);
}

SHIM_EXPORT int openat64(int dir, const char *path, int flags, ...)
{
    MODE_OF(flags, mode)
    flags |= O_LARGEFILE;
    PULLED(dir, path, flags)
    return opened(real.openat64 ? real.openat64(dir, path, flags, mode) : raw_openat(dir, path, flags, mode), flags);
}

/* The forms that fortified programs call when no mode is given. */
SHIM_EXPORT int __open_2(const char *path, int flags)
{
    return open(path, flags & ~O_CREAT);
}

SHIM_EXPORT int __open64_2(const char *path, int flags)
{
    return open64(path, flags & ~O_CREAT);
}

SHIM_EXPORT int __openat_2(int dir, const char *path, int flags)
{
    return openat(dir, path, flags & ~O_CREAT);
}

SHIM_EXPORT int __openat64_2(int dir, const char *path, int flags)
{
    return openat64(dir, path, flags & ~O_CREAT);
}

SHIM_EXPORT int creat(const char *path, mode_t mode)
{
    return open(path, O_CREAT | O_WRONLY | O_TRUNC, mode);
}

SHIM_EXPORT int creat64(const char *path, mode_t mode)
{
    return open64(path, O_CREAT | O_WRONLY | O_TRUNC, mode);
}

/* ---- closing */

static int real_close(int fd)
{
    return real.close ? real.close(fd) : raw_close(fd);
}

static bool hidden(int fd)
{
    return own_is(fd) && shim_mine();
}

SHIM_EXPORT int close(int fd)
{
    if (!shim_active())
        return real_close(fd);
    if (hidden(fd)) {
        errno = EBADF;
        return -1;
    }
    struct closing c = files_close_begin(fd);
    struct ticket t;
    if (c.last)
        sync_begin(&t, c.number);
    int rc = real_close(fd);
    int saved = errno;
    if (c.last) {
        sync_end(&t);
        files_close_end(&c);
    }
    errno = saved;
    return rc;
}

static int raw_close_range(unsigned first, unsigned last, int flags)
{
    return (int)syscall(SYS_close_range, first, last, flags);
}

/* Closes [first, last] without our own descriptors and with the sync points that single closes would have been. */
static int close_between(unsigned first, unsigned last, int flags)
{
    for (unsigned fd = first; fd <= last && fd < SHIM_FDS; fd++) {
        uint32_t entry = files_entry((int)fd);
        if (files_tracked(entry) || files_viewed(entry))
            close((int)fd);
        else
            __atomic_store_n(&files_fd[fd], FD_UNKNOWN, __ATOMIC_RELAXED);
    }
    for (;;) {
        unsigned own = ~0u; /* the lowest of ours in what is left */
        if (client_fd >= 0 && (unsigned)client_fd >= first)
            own = (unsigned)client_fd;
        if (arm_kept >= 0 && (unsigned)arm_kept >= first && (unsigned)arm_kept < own)
            own = (unsigned)arm_kept;
        int viewed = view_count ? view_own_above((int)first) : -1;
        if (viewed >= 0 && (unsigned)viewed < own)
            own = (unsigned)viewed;
        if (own > last || own == ~0u)
            return raw_close_range(first, last, flags);
        if (own > first && raw_close_range(first, own - 1, flags))
            return -1;
        if (own == last)
            return 0;
        first = own + 1;
    }
}

SHIM_EXPORT int close_range(unsigned first, unsigned last, int flags)
{
    if (!shim_active() || first > last || flags || !shim_mine())
        return raw_close_range(first, last, flags);
    return close_between(first, last, flags);
}

SHIM_EXPORT void closefrom(int low)
{
    unsigned first = low < 0 ? 0 : (unsigned)low;
    if (!shim_active() || !shim_mine())
        raw_close_range(first, ~0u, 0);
    else
        close_between(first, ~0u, 0);
}

/* ---- copies */

static int copied(int oldfd, int newfd)
{
    if (newfd >= 0 && shim_active()) {
        int saved = errno;
        if (files_tracked(files_entry(newfd)) || files_viewed(files_entry(newfd)))
            files_renewed(newfd);
        files_copied(oldfd, newfd);
        streams_standard(newfd);
        errno = saved;
    }
    return newfd;
}

SHIM_EXPORT int dup(int oldfd)
{
    if (shim_active() && hidden(oldfd)) {
        errno = EBADF;
        return -1;
    }
    return copied(oldfd, (int)syscall(SYS_dup, oldfd));
}

static int dup_over(int oldfd, int newfd, int flags, bool three)
{
    if (shim_active() && oldfd != newfd) {
        if (hidden(oldfd)) {
            errno = EBADF;
            return -1;
        }
        if (own_is(newfd) && shim_mine()) {
            struct held h = shim_lock();
            own_evade(newfd);
            shim_unlock(&h);
        }
    }
    if (!three && oldfd == newfd)
        return raw_fcntl(oldfd, F_GETFD, 0) < 0 ? -1 : newfd;
    if (!shim_active() || oldfd == newfd)
        return (int)syscall(SYS_dup3, oldfd, newfd, flags);
    if (files_viewed(files_entry(newfd)) && (raw_fcntl(oldfd, F_GETFD, 0) < 0 || (flags & ~O_CLOEXEC)))
        return (int)syscall(SYS_dup3, oldfd, newfd, flags); /* fails: what is closed there could not come back */
    struct closing c = files_close_begin(newfd);
    struct ticket t;
    if (c.last)
        sync_begin(&t, c.number);
    int rc = (int)syscall(SYS_dup3, oldfd, newfd, flags);
    int saved = errno;
    if (c.last)
        sync_end(&t);
    if (rc < 0)
        files_close_undo(newfd, &c);
    else {
        files_close_end(&c);
        files_copied(oldfd, newfd);
        streams_standard(newfd);
    }
    errno = saved;
    return rc;
}

SHIM_EXPORT int dup2(int oldfd, int newfd)
{
    return dup_over(oldfd, newfd, 0, false);
}

SHIM_EXPORT int dup3(int oldfd, int newfd, int flags)
{
    return dup_over(oldfd, newfd, flags, true);
}

/* What fcntl says of a remote region as of any file. Locks of a pulled one hold against nobody: no one can write to
 * it. false: the kernel's answer is right. */
static bool view_control(int fd, int command, void *arg, int *rc)
{
    struct flock *lock = arg;
    bool locks = command == F_GETLK || command == F_SETLK || command == F_SETLKW || command == F_OFD_GETLK ||
                 command == F_OFD_SETLK || command == F_OFD_SETLKW;
    if ((!locks && command != F_GETFL && command != F_SETFL) || !view_of(fd))
        return false;
    struct open_file *f = view_of(fd);
    if (locks && f->held->mode == CONTROL_MIRROR) {
        *rc = mirror_fcntl(f, command, lock, real.fcntl);
        return true;
    }
    if (command == F_SETFL) {
        uint32_t keeps = f->held->flags & ~(uint32_t)(O_APPEND | O_NONBLOCK);
        f->held->flags = keeps | ((uint32_t)(uintptr_t)arg & (O_APPEND | O_NONBLOCK));
    }
    *rc = command == F_GETFL ? (int)f->held->flags | O_LARGEFILE : 0;
    int e = 0;
    if (locks && !raw_readable(lock, sizeof *lock))
        e = EFAULT;
    else if (locks && lock->l_type == F_WRLCK && command != F_GETLK && command != F_OFD_GETLK)
        e = EBADF;
    else if (command == F_GETLK || command == F_OFD_GETLK)
        lock->l_type = F_UNLCK;
    if (e) {
        errno = e;
        *rc = -1;
    }
    return true;
}

static int control(int fd, int command, void *arg, __typeof__(&fcntl) call)
{
    if (shim_active() && hidden(fd)) {
        errno = EBADF;
        return -1;
    }
    int rc;
    if (view_maybe(fd) && view_control(fd, command, arg, &rc))
        return rc;
    rc = call ? call(fd, command, arg) : raw_fcntl(fd, command, (long)arg);
    return command == F_DUPFD || command == F_DUPFD_CLOEXEC ? copied(fd, rc) : rc;
}

#define ARGUMENT_OF(command, arg)                                                                                      \
    va_list args;                                                                                                      \
    va_start(args, command);                                                                                           \
    void *arg = va_arg(args, void *);                                                                                  \
    va_end(args);

SHIM_EXPORT int fcntl(int fd, int command, ...)
{
    ARGUMENT_OF(command, arg)
    return control(fd, command, arg, real.fcntl);
}

SHIM_EXPORT int fcntl64(int fd, int command, ...)
{
    ARGUMENT_OF(command, arg)
    return control(fd, command, arg, real.fcntl64);
}

/* ---- sync points */

static int raw_fsync(int fd)
{
    return real.fsync ? real.fsync(fd) : (int)syscall(SYS_fsync, fd);
}

static int raw_fdatasync(int fd)
{
    return real.fdatasync ? real.fdatasync(fd) : (int)syscall(SYS_fdatasync, fd);
}

static int sync_file(int fd, int (*call)(int))
{
    uint32_t region = shim_active() && __atomic_load_n(&files_open, __ATOMIC_RELAXED) ? files_lookup(fd) : 0;
    struct open_file *f = view_maybe(fd) ? view_of(fd) : view_of_unknown(fd);
    if (f)
        return mirror_sync(f);
    if (!region || !shim_mine())
        return call(fd);
    struct ticket t;
    int rc;
    sync_begin(&t, region);
    pthread_cleanup_push(sync_abandon, &t);
    rc = call(fd);
    pthread_cleanup_pop(0);
    return sync_result(rc, sync_end(&t));
}

SHIM_EXPORT int fsync(int fd)
{
    return sync_file(fd, raw_fsync);
}

SHIM_EXPORT int fdatasync(int fd)
{
    return sync_file(fd, raw_fdatasync);
}

static bool anything_open(void)
{
    return shim_active() && __atomic_load_n(&files_open, __ATOMIC_RELAXED) && shim_mine();
}

SHIM_EXPORT void sync(void)
{
    struct ticket t = {.kind = TICKET_NONE};
    if (anything_open())
        sync_begin(&t, 0);
    syscall(SYS_sync);
    sync_end(&t);
}

SHIM_EXPORT int syncfs(int fd)
{
    struct ticket t = {.kind = TICKET_NONE};
    if (anything_open())
        sync_begin(&t, 0);
    bool viewed = (view_maybe(fd) && view_of(fd)) || view_of_unknown(fd); /* on no file system of this host */
    int rc = viewed ? 0 : (int)syscall(SYS_syncfs, fd);
    return sync_result(rc, sync_end(&t));
}
