/* Calls that change a tracked file. The pages are marked before the raw call and after it, with `calls` raised in
 * between (wire/shared.h says why both). Where a call appends, its place is known only afterwards: from the size before
 * to the size after. */
#include "shim/real.h"
#include "shim/view.h"

#include <limits.h>

#include <linux/falloc.h>
#include <linux/fs.h>
#include <pthread.h>
#include <sys/ioctl.h>

#define HERE (-1) /* at the file position */

struct writing {
    int fd, flags;
    uint32_t region; /* 0: not tracked */
    uint64_t from, len;
    bool here, append;
    struct shared *shared;
};

static uint32_t tracked(int fd)
{
    if (!shim_active())
        return 0;
    uint32_t entry = files_entry(fd);
    if (entry == FD_UNKNOWN) {
        int saved = errno;
        entry = files_resolve(fd);
        errno = saved;
    }
    return files_tracked(entry) && shim_mine() ? files_number(entry) : 0;
}

static uint64_t size_of(int fd)
{
    struct stat st;
    return raw_fstat(fd, &st) ? 0 : (uint64_t)st.st_size;
}

static void calls_add(struct shared *s, uint32_t n)
{
    if (s)
        __atomic_add_fetch(&s->calls, n, __ATOMIC_SEQ_CST);
}

static void enter(struct writing *w, int fd, uint32_t region)
{
    w->fd = fd;
    w->region = region;
    w->shared = client_shared();
    calls_add(w->shared, 1);
}

static void leave(struct writing *w)
{
    calls_add(w->shared, (uint32_t)-1);
}

/* at: an offset, or HERE. */
static void begin(struct writing *w, int fd, uint32_t region, off_t at, uint64_t len)
{
    *w = (struct writing){0};
    int saved = errno;
    files_mark(region, 0, 0); /* the memory, and with it the connection */
    enter(w, fd, region);
    w->flags = raw_fcntl(fd, F_GETFL, 0);
    w->append = w->flags & O_APPEND;
    w->here = at == HERE && !w->append;
    if (w->append)
        w->from = size_of(fd);
    else
        w->from = at == HERE ? (uint64_t)raw_lseek(fd, 0, SEEK_CUR) : (uint64_t)at;
    w->len = len;
    if ((int64_t)w->from < 0)
        w->from = 0;
    files_mark(region, w->from, len);
    errno = saved;
}

/* Marks again and makes the sync point that O_SYNC and its like ask for. */
static void end(struct writing *w, ssize_t done, bool durable)
{
    int saved = errno;
    uint64_t from = w->from, upto = w->from + w->len;
    if (w->append) {
        uint64_t size = size_of(w->fd);
        upto = size > upto ? size : upto;
    } else if (w->here && done > 0) {
        /* Threads that share the position may have written before or after us. */
        uint64_t now = (uint64_t)raw_lseek(w->fd, 0, SEEK_CUR);
        if ((int64_t)now >= done) {
            from = now - (uint64_t)done < from ? now - (uint64_t)done : from;
            upto = now > upto ? now : upto;
        }
    }
    files_mark(w->region, from, upto - from);
    leave(w);
    if (done > 0 && (durable || (w->flags & (O_SYNC | O_DSYNC))))
        sync_now(w->region);
    errno = saved;
}

/* A cancelled thread leaves as if the call had failed: marked, and not counted any more. */
static void cancelled(void *arg)
{
    struct writing *w = arg;
    files_mark(w->region, w->from, w->len);
    leave(w);
}

#define WRITING(fd, at, len, durable, call)                                                                            \
    do {                                                                                                               \
        struct writing w_;                                                                                             \
        uint32_t region_ = tracked(fd);                                                                                \
        if (!region_)                                                                                                  \
            return call;                                                                                               \
        begin(&w_, fd, region_, at, len);                                                                              \
        ssize_t done_;                                                                                                 \
        pthread_cleanup_push(cancelled, &w_);                                                                          \
        done_ = call;                                                                                                  \
        pthread_cleanup_pop(0);                                                                                        \
        end(&w_, done_, durable);                                                                                      \
        return done_;                                                                                                  \
    } while (0)

static uint64_t total(const struct iovec *iov, int n)
{
    uint64_t sum = 0;
    if (n <= 0 || n > IOV_MAX || !raw_readable(iov, (size_t)n * sizeof *iov))
        return 0; /* the kernel will say so */
    for (int i = 0; i < n; i++)
        sum += iov[i].iov_len;
    return sum;
}

/* Into a mirror. A descriptor that came over exec is known only after it was looked at. */
static struct open_file *mirrored(int fd)
{
    if (!__builtin_expect(view_pulls, false) || !shim_active())
        return NULL;
    struct open_file *f = view_maybe(fd) ? view_of(fd) : view_of_unknown(fd);
    return f && f->held->mode == CONTROL_MIRROR ? f : NULL;
}

#define MIRRORED(fd, vector, count, at, flags)                                                                         \
    do {                                                                                                               \
        struct open_file *f_ = mirrored(fd);                                                                           \
        if (__builtin_expect(f_ != NULL, false))                                                                       \
            return view_write(f_, vector, count, at, flags);                                                           \
    } while (0)
#define ONE(from, len) (&(struct iovec){(void *)(uintptr_t)(from), len})

static off_t offset_of(off_t at)
{
    return at < 0 ? -2 : at;
}

SHIM_EXPORT ssize_t write(int fd, const void *from, size_t len)
{
    VIEW_BUFFER(from, len);
    MIRRORED(fd, ONE(from, len), 1, HERE, 0);
    WRITING(fd, HERE, len, false, real.write ? real.write(fd, from, len) : syscall(SYS_write, fd, from, len));
}

SHIM_EXPORT ssize_t pwrite(int fd, const void *from, size_t len, off_t at)
{
    VIEW_BUFFER(from, len);
    MIRRORED(fd, ONE(from, len), 1, offset_of(at), 0);
    WRITING(fd, at, len, false,
            real.pwrite ? real.pwrite(fd, from, len, at) : syscall(SYS_pwrite64, fd, from, len, at));
}

SHIM_EXPORT ssize_t pwrite64(int fd, const void *from, size_t len, off64_t at)
{
    VIEW_BUFFER(from, len);
    MIRRORED(fd, ONE(from, len), 1, offset_of(at), 0);
    WRITING(fd, at, len, false,
            real.pwrite64 ? real.pwrite64(fd, from, len, at) : syscall(SYS_pwrite64, fd, from, len, at));
}

SHIM_EXPORT ssize_t writev(int fd, const struct iovec *iov, int n)
{
    VIEW_BUFFERS(iov, n);
    MIRRORED(fd, iov, n, HERE, 0);
    if (!tracked(fd))
        return real.writev ? real.writev(fd, iov, n) : syscall(SYS_writev, fd, iov, n);
    WRITING(fd, HERE, total(iov, n), false, real.writev(fd, iov, n));
}

SHIM_EXPORT ssize_t pwritev(int fd, const struct iovec *iov, int n, off_t at)
{
    VIEW_BUFFERS(iov, n);
    MIRRORED(fd, iov, n, offset_of(at), 0);
    if (!tracked(fd))
        return real.pwritev ? real.pwritev(fd, iov, n, at) : syscall(SYS_pwritev, fd, iov, n, at, 0);
    WRITING(fd, at, total(iov, n), false, real.pwritev(fd, iov, n, at));
}

SHIM_EXPORT ssize_t pwritev64(int fd, const struct iovec *iov, int n, off64_t at)
{
    VIEW_BUFFERS(iov, n);
    MIRRORED(fd, iov, n, offset_of(at), 0);
    if (!tracked(fd))
        return real.pwritev64 ? real.pwritev64(fd, iov, n, at) : syscall(SYS_pwritev, fd, iov, n, at, 0);
    WRITING(fd, at, total(iov, n), false, real.pwritev64(fd, iov, n, at));
}

SHIM_EXPORT ssize_t pwritev2(int fd, const struct iovec *iov, int n, off_t at, int flags)
{
    VIEW_BUFFERS(iov, n);
    MIRRORED(fd, iov, n, at, flags);
    if (!tracked(fd))
        return real.pwritev2 ? real.pwritev2(fd, iov, n, at, flags) : syscall(SYS_pwritev2, fd, iov, n, at, 0, flags);
    WRITING(fd, at, total(iov, n), flags & (RWF_SYNC | RWF_DSYNC), real.pwritev2(fd, iov, n, at, flags));
}

SHIM_EXPORT ssize_t pwritev64v2(int fd, const struct iovec *iov, int n, off64_t at, int flags)
{
    VIEW_BUFFERS(iov, n);
    MIRRORED(fd, iov, n, at, flags);
    if (!tracked(fd))
        return real.pwritev64v2 ? real.pwritev64v2(fd, iov, n, at, flags)
                                : syscall(SYS_pwritev2, fd, iov, n, at, 0, flags);
    WRITING(fd, at, total(iov, n), flags & (RWF_SYNC | RWF_DSYNC), real.pwritev64v2(fd, iov, n, at, flags));
}

/* Where the bytes of a view go. */
struct destination {
    int fd;
    unsigned flags;
    off64_t *at;
};

static ssize_t sent(int memory, off64_t *at, size_t len, void *of)
{
    const struct destination *d = of;
    return syscall(SYS_sendfile, d->fd, memory, at, len);
}

static ssize_t spliced(int memory, off64_t *at, size_t len, void *of)
{
    const struct destination *d = of;
    return syscall(SYS_splice, memory, at, d->fd, d->at, len, d->flags);
}

static ssize_t send_file(int to, int from, off64_t *at, size_t len)
{
    struct destination d = {.fd = to};
    struct open_file *f = mirrored(to);
    if (f)
        return view_send(f, from, at, len);
    ssize_t moved = view_maybe(from) ? view_transfer(from, at, len, sent, &d) : VIEW_NOT_OURS;
    return moved == VIEW_NOT_OURS ? syscall(SYS_sendfile, to, from, at, len) : moved;
}

SHIM_EXPORT ssize_t sendfile(int to, int from, off_t *at, size_t len)
{
    WRITING(to, HERE, len, false, send_file(to, from, at, len));
}

SHIM_EXPORT ssize_t sendfile64(int to, int from, off64_t *at, size_t len)
{
    WRITING(to, HERE, len, false, send_file(to, from, at, len));
}

static ssize_t splice_any(int from, off64_t *from_at, int to, off64_t *to_at, size_t len, unsigned flags)
{
    struct destination d = {.fd = to, .flags = flags, .at = to_at};
    if (mirrored(to)) { /* as of a file that cannot be spliced into */
        errno = EINVAL;
        return -1;
    }
    ssize_t moved = view_maybe(from) ? view_transfer(from, from_at, len, spliced, &d) : VIEW_NOT_OURS;
    return moved != VIEW_NOT_OURS ? moved
           : real.splice          ? real.splice(from, from_at, to, to_at, len, flags)
                                  : syscall(SYS_splice, from, from_at, to, to_at, len, flags);
}

/* Between two file systems no kernel copies a range: programs know it and read. */
static ssize_t copy_range(int from, off64_t *from_at, int to, off64_t *to_at, size_t len, unsigned flags)
{
    if ((view_maybe(from) && view_of(from)) || mirrored(to)) {
        errno = EXDEV;
        return -1;
    }
    return syscall(SYS_copy_file_range, from, from_at, to, to_at, len, flags);
}

static off_t peek(const off64_t *at)
{
    return raw_readable(at, sizeof *at) ? *at : HERE;
}

SHIM_EXPORT ssize_t splice(int from, off64_t *from_at, int to, off64_t *to_at, size_t len, unsigned flags)
{
    WRITING(to, peek(to_at), len, false, splice_any(from, from_at, to, to_at, len, flags));
}

SHIM_EXPORT ssize_t copy_file_range(int from, off64_t *from_at, int to, off64_t *to_at, size_t len, unsigned flags)
{
    WRITING(to, peek(to_at), len, false, copy_range(from, from_at, to, to_at, len, flags));
}

/* Nothing of these is tracked: only their buffers matter. */
SHIM_EXPORT ssize_t send(int fd, const void *from, size_t len, int flags)
{
    VIEW_BUFFER(from, len);
    return REAL(send)(fd, from, len, flags);
}

SHIM_EXPORT ssize_t sendto(int fd, const void *from, size_t len, int flags, const struct sockaddr *to, socklen_t room)
{
    VIEW_BUFFER(from, len);
    return REAL(sendto)(fd, from, len, flags, to, room);
}

SHIM_EXPORT ssize_t sendmsg(int fd, const struct msghdr *m, int flags)
{
    if (__builtin_expect(view_buffers, false) && raw_readable(m, sizeof *m))
        view_buffer_vector(m->msg_iov, (int)m->msg_iovlen);
    return REAL(sendmsg)(fd, m, flags);
}

/* ---- sizes */

static int truncate_fd(int fd, off_t size)
{
    struct open_file *f = mirrored(fd);
    if (f && (size < 0 || !view_writable(f))) {
        errno = EINVAL;
        return -1;
    }
    if (f)
        return mirror_resize(f, (uint64_t)size);
    uint32_t region = size >= 0 ? tracked(fd) : 0;
    if (!region)
        return (int)syscall(SYS_ftruncate, fd, size);
    struct writing w = {0};
    int saved = errno;
    files_mark(region, 0, 0);
    enter(&w, fd, region);
    uint64_t before = size_of(fd);
    files_mark_resize(region, before, (uint64_t)size);
    errno = saved;
    int rc = (int)syscall(SYS_ftruncate, fd, size);
    saved = errno;
    files_mark_resize(region, before, (uint64_t)size);
    leave(&w);
    errno = saved;
    return rc;
}

SHIM_EXPORT int ftruncate(int fd, off_t size)
{
    return truncate_fd(fd, size);
}

SHIM_EXPORT int ftruncate64(int fd, off64_t size)
{
    return truncate_fd(fd, size);
}

/* A descriptor that the process has open for writing on the file at path, or -1. */
static int descriptor_at(const char *path)
{
    struct statx st;
    if (raw_statx(AT_FDCWD, path, 0, STATX_BASIC_STATS | STATX_BTIME, &st))
        return -1;
    uint32_t region = files_lookup_stat(&st);
    struct held h = shim_lock();
    int fd = region ? files_descriptor(region) : -1;
    shim_unlock(&h);
    return fd;
}

/* By path: through a descriptor of the process when it has one, else through one opened for it, so that the change is a
 * region's like any other. */
static int truncate_path(const char *path, off_t size)
{
    struct statx st;
    int viewed = view_truncate_path(path, size);
    if (viewed != VIEW_NOT_OURS)
        return viewed;
    if (!shim_active() || size < 0 || !shim_mine() || raw_statx(AT_FDCWD, path, 0, STATX_TYPE, &st) ||
        !S_ISREG(st.stx_mode) || !names_matched(path))
        return (int)syscall(SYS_truncate, path, size);
    int had = descriptor_at(path);
    if (had >= 0)
        return truncate_fd(had, size);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0)
        return (int)syscall(SYS_truncate, path, size);
    int rc = truncate_fd(fd, size), saved = errno;
    close(fd);
    errno = saved;
    return rc;
}

SHIM_EXPORT int truncate(const char *path, off_t size)
{
    return truncate_path(path, size);
}

SHIM_EXPORT int truncate64(const char *path, off64_t size)
{
    return truncate_path(path, size);
}

static void mark_allocation(uint32_t region, int mode, off_t at, off_t len, uint64_t before, uint64_t now)
{
    if (mode & (FALLOC_FL_COLLAPSE_RANGE | FALLOC_FL_INSERT_RANGE)) {
        files_mark_all(region);
        files_mark_size(region, (uint64_t)at);
    } else if (mode & ~FALLOC_FL_KEEP_SIZE) {
        files_mark(region, (uint64_t)at, (uint64_t)len);
    }
    files_mark_resize(region, before, now);
}

static int allocate(int fd, int mode, off_t at, off_t len)
{
    struct open_file *f = mirrored(fd);
    if (f)
        return view_allocate(f, mode, at, len);
    uint32_t region = at >= 0 && len > 0 ? tracked(fd) : 0;
    if (!region)
        return real.fallocate ? real.fallocate(fd, mode, at, len) : (int)syscall(SYS_fallocate, fd, mode, at, len);
    struct writing w = {0};
    int saved = errno;
    files_mark(region, 0, 0);
    enter(&w, fd, region);
    uint64_t before = size_of(fd);
    mark_allocation(region, mode, at, len, before, before);
    errno = saved;
    int rc = (int)syscall(SYS_fallocate, fd, mode, at, len);
    saved = errno;
    mark_allocation(region, mode, at, len, before, size_of(fd));
    leave(&w);
    errno = saved;
    return rc;
}

SHIM_EXPORT int fallocate(int fd, int mode, off_t at, off_t len)
{
    return allocate(fd, mode, at, len);
}

SHIM_EXPORT int fallocate64(int fd, int mode, off64_t at, off64_t len)
{
    return allocate(fd, mode, at, len);
}

/* It changes no byte but may make the file longer. */
static int reserve(int fd, off_t at, off_t len, __typeof__(&posix_fallocate) call)
{
    struct open_file *f = mirrored(fd);
    if (f)
        return view_allocate(f, 0, at, len) ? errno : 0;
    uint32_t region = tracked(fd);
    uint64_t before = region ? size_of(fd) : 0;
    int rc = call ? call(fd, at, len) : syscall(SYS_fallocate, fd, 0, at, len) ? errno : 0;
    if (region)
        files_mark_resize(region, before, size_of(fd));
    return rc;
}

SHIM_EXPORT int posix_fallocate(int fd, off_t at, off_t len)
{
    return reserve(fd, at, len, real.posix_fallocate);
}

SHIM_EXPORT int posix_fallocate64(int fd, off64_t at, off64_t len)
{
    return reserve(fd, at, len, real.posix_fallocate64);
}

/* Clones put another file's blocks into this one. */
SHIM_EXPORT int ioctl(int fd, unsigned long request, ...)
{
    va_list args;
    va_start(args, request);
    void *arg = va_arg(args, void *);
    va_end(args);
    if (view_maybe(fd) && view_of(fd)) {
        errno = request == FICLONE || request == FICLONERANGE ? EOPNOTSUPP : ENOTTY;
        return -1;
    }
    uint32_t region = request == FICLONE || request == FICLONERANGE ? tracked(fd) : 0;
    if (region)
        files_mark_all(region);
    int rc = (int)syscall(SYS_ioctl, fd, request, arg);
    if (region) {
        int saved = errno;
        files_mark_all(region);
        errno = saved;
    }
    return rc;
}
