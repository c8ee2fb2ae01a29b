/* Calls that read. A program without views pays one test of a word that never changes; one with views pays a look into
 * the fd table. A descriptor that the kernel refuses may be a view's that came from elsewhere: only then is it looked
 * at.
 *
 * What is read of a view is first made sure to be in the memfd, then read from there, in pieces, so that a large read
 * does not wait for all of it before the first byte is copied. */
#include "shim/real.h"
#include "shim/view.h"

#include <limits.h>
#include <linux/memfd.h>
#include <sys/socket.h>

#define PIECE (1u << 20)
#define COPIED (64u << 10)

/* The part of iov that [done, done + most) of its bytes is; at most cap pieces. */
static int part(const struct iovec *iov, int n, uint64_t done, uint64_t most, struct iovec *to, int cap)
{
    int used = 0;
    for (int i = 0; i < n && used < cap && most; i++) {
        if (done >= iov[i].iov_len) {
            done -= iov[i].iov_len;
            continue;
        }
        uint64_t here = iov[i].iov_len - done < most ? iov[i].iov_len - done : most;
        to[used++] = (struct iovec){(char *)iov[i].iov_base + done, here};
        most -= here;
        done = 0;
    }
    return used;
}

/* One piece at offset, of at most len bytes: bytes read, or -1. A smaller one when pages went while it was read. */
static ssize_t piece(struct mount *m, const struct iovec *iov, int n, uint64_t done, uint64_t at, uint64_t len)
{
    struct iovec some[16];
    for (uint64_t since;; len = len > shim_page ? (len + 1) / 2 : len) {
        int used = part(iov, n, done, len, some, 16);
        int rc = view_need(m, at, len, &since);
        int memory = rc ? -1 : view_memory(m);
        if (memory < 0) {
            errno = rc ? -rc : EIO;
            return -1;
        }
        ssize_t got = syscall(SYS_preadv, memory, some, used, at, 0);
        if (view_same(m, since))
            return got;
    }
}

/* All of one epoch: where the view goes on to another meanwhile, what came before that. */
static ssize_t read_at(struct mount *m, const struct iovec *iov, int n, uint64_t at, uint64_t len)
{
    uint64_t done = 0, epoch = __atomic_load_n(&m->view->epoch, __ATOMIC_ACQUIRE);
    for (;;) {
        uint64_t size = view_size(m), most = PIECE - (at + done) % PIECE;
        uint64_t left = at + done < size ? size - at - done : 0;
        left = left < len - done ? left : len - done;
        ssize_t got = left ? piece(m, iov, n, done, at + done, left < most ? left : most) : 0;
        uint64_t now = __atomic_load_n(&m->view->epoch, __ATOMIC_ACQUIRE);
        if (now != epoch && m->how.follow && !done) { /* of either: again */
            epoch = now;
            continue;
        }
        if (got <= 0 || (now != epoch && m->how.follow))
            return got < 0 && !done ? -1 : (ssize_t)done;
        done += (uint64_t)got;
    }
}

static bool total(const struct iovec *iov, int n, uint64_t *sum)
{
    *sum = 0;
    if (n < 0 || n > IOV_MAX) {
        errno = EINVAL;
        return false;
    }
    if (n && !raw_readable(iov, (size_t)n * sizeof *iov)) {
        errno = EFAULT;
        return false;
    }
    for (int i = 0; i < n; i++)
        if (__builtin_add_overflow(*sum, iov[i].iov_len, sum) || *sum > SSIZE_MAX) {
            errno = EINVAL;
            return false;
        }
    *sum = *sum < 0x7ffff000 ? *sum : 0x7ffff000;
    return true;
}

#define HERE (-1)

/* At an offset, or at the file's own, which only moves if no one else moved it meanwhile. */
static ssize_t read_view(struct open_file *f, const struct iovec *iov, int n, off_t at)
{
    uint64_t len;
    struct mount *m = view_mount(f);
    if ((f->held->flags & O_ACCMODE) == O_WRONLY) {
        errno = EBADF;
        return -1;
    }
    if (!m || !total(iov, n, &len))
        return -1;
    if (at < HERE) {
        errno = EINVAL;
        return -1;
    }
    if (at != HERE)
        return read_at(m, iov, n, (uint64_t)at, len);
    for (;;) {
        uint64_t from = __atomic_load_n(&f->held->offset, __ATOMIC_SEQ_CST);
        ssize_t got = read_at(m, iov, n, from, len);
        if (got <= 0 || __atomic_compare_exchange_n(&f->held->offset, &from, from + (uint64_t)got, false,
                                                    __ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
            return got;
    }
}

/* The open file that the call is about, before the kernel is asked and, when that knows no such descriptor, after. */
#define VIEWED(fd, f) (view_maybe(fd) && ((f) = view_of(fd)))
#define VIEWED_AFTER(fd, f, rc)                                                                                        \
    ((rc) < 0 && __builtin_expect(view_pulls, false) && errno == EBADF && ((f) = view_of_unknown(fd)))

#define READING(fd, vector, count, at, call)                                                                           \
    do {                                                                                                               \
        struct open_file *f_;                                                                                          \
        if (VIEWED(fd, f_))                                                                                            \
            return read_view(f_, vector, count, at);                                                                   \
        ssize_t rc_ = call;                                                                                            \
        if (VIEWED_AFTER(fd, f_, rc_))                                                                                 \
            return read_view(f_, vector, count, at);                                                                   \
        return rc_;                                                                                                    \
    } while (0)

#define ONE(to, len) (&(struct iovec){to, len})

static off_t offset_of(off_t at)
{
    return at < 0 ? -2 : at;
}

SHIM_EXPORT ssize_t read(int fd, void *to, size_t len)
{
    VIEW_BUFFER(to, len);
    READING(fd, ONE(to, len), 1, HERE, real.read ? real.read(fd, to, len) : syscall(SYS_read, fd, to, len));
}

SHIM_EXPORT ssize_t pread(int fd, void *to, size_t len, off_t at)
{
    VIEW_BUFFER(to, len);
    READING(fd, ONE(to, len), 1, offset_of(at),
            real.pread ? real.pread(fd, to, len, at) : syscall(SYS_pread64, fd, to, len, at));
}

SHIM_EXPORT ssize_t pread64(int fd, void *to, size_t len, off64_t at)
{
    VIEW_BUFFER(to, len);
    READING(fd, ONE(to, len), 1, offset_of(at),
            real.pread64 ? real.pread64(fd, to, len, at) : syscall(SYS_pread64, fd, to, len, at));
}

SHIM_EXPORT ssize_t readv(int fd, const struct iovec *iov, int n)
{
    VIEW_BUFFERS(iov, n);
    READING(fd, iov, n, HERE, real.readv ? real.readv(fd, iov, n) : syscall(SYS_readv, fd, iov, n));
}

SHIM_EXPORT ssize_t preadv(int fd, const struct iovec *iov, int n, off_t at)
{
    VIEW_BUFFERS(iov, n);
    READING(fd, iov, n, offset_of(at),
            real.preadv ? real.preadv(fd, iov, n, at) : syscall(SYS_preadv, fd, iov, n, at, 0));
}

SHIM_EXPORT ssize_t preadv64(int fd, const struct iovec *iov, int n, off64_t at)
{
    VIEW_BUFFERS(iov, n);
    READING(fd, iov, n, offset_of(at),
            real.preadv64 ? real.preadv64(fd, iov, n, at) : syscall(SYS_preadv, fd, iov, n, at, 0));
}

SHIM_EXPORT ssize_t preadv2(int fd, const struct iovec *iov, int n, off_t at, int flags)
{
    VIEW_BUFFERS(iov, n);
    READING(fd, iov, n, at,
            real.preadv2 ? real.preadv2(fd, iov, n, at, flags) : syscall(SYS_preadv2, fd, iov, n, at, 0, flags));
}

SHIM_EXPORT ssize_t preadv64v2(int fd, const struct iovec *iov, int n, off64_t at, int flags)
{
    VIEW_BUFFERS(iov, n);
    READING(fd, iov, n, at,
            real.preadv64v2 ? real.preadv64v2(fd, iov, n, at, flags) : syscall(SYS_preadv2, fd, iov, n, at, 0, flags));
}

/* The forms that fortified programs call. A length beyond the buffer is theirs to die of. */
SHIM_EXPORT ssize_t __read_chk(int fd, void *to, size_t len, size_t room)
{
    return len > room ? REAL(__read_chk)(fd, to, len, room) : read(fd, to, len);
}

SHIM_EXPORT ssize_t __pread_chk(int fd, void *to, size_t len, off_t at, size_t room)
{
    return len > room ? REAL(__pread_chk)(fd, to, len, at, room) : pread(fd, to, len, at);
}

SHIM_EXPORT ssize_t __pread64_chk(int fd, void *to, size_t len, off64_t at, size_t room)
{
    return len > room ? REAL(__pread64_chk)(fd, to, len, at, room) : pread64(fd, to, len, at);
}

/* ---- the file offset */

static off_t seek_view(struct open_file *f, off_t at, int whence)
{
    uint64_t size = view_file_size(f), seen = __atomic_load_n(&f->held->offset, __ATOMIC_SEQ_CST);
    int64_t to;
    do {
        bool wrong = false;
        switch (whence) {
        case SEEK_SET:
            to = at;
            break;
        case SEEK_CUR:
            wrong = __builtin_add_overflow((int64_t)seen, at, &to);
            break;
        case SEEK_END:
            wrong = __builtin_add_overflow((int64_t)size, at, &to);
            break;
        case SEEK_DATA: /* holes are the remote's business: here all is data */
        case SEEK_HOLE:
            to = whence == SEEK_DATA ? at : (int64_t)size;
            if (at < 0 || (uint64_t)at >= size) {
                errno = ENXIO;
                return -1;
            }
            break;
        default:
            errno = EINVAL;
            return -1;
        }
        if (wrong || to < 0) {
            errno = wrong ? EOVERFLOW : EINVAL;
            return -1;
        }
    } while (
        !__atomic_compare_exchange_n(&f->held->offset, &seen, (uint64_t)to, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED));
    return to;
}

static off_t seek(int fd, off_t at, int whence)
{
    struct open_file *f;
    if (VIEWED(fd, f))
        return seek_view(f, at, whence);
    off_t rc = raw_lseek(fd, at, whence);
    return VIEWED_AFTER(fd, f, rc) ? seek_view(f, at, whence) : rc;
}

SHIM_EXPORT off_t lseek(int fd, off_t at, int whence)
{
    return seek(fd, at, whence);
}

SHIM_EXPORT off64_t lseek64(int fd, off64_t at, int whence)
{
    return seek(fd, at, whence);
}

/* ---- advice and locks */

static bool advised(int fd, off_t at, off_t len, int advice)
{
    struct open_file *f;
    if (!VIEWED(fd, f))
        return false;
    struct mount *m = view_mount(f);
    if (m && at >= 0 && len >= 0)
        view_advise_file(m, (uint64_t)at, (uint64_t)len, advice);
    return true;
}

/* POSIX_FADV_NORMAL to WILLNEED have the numbers of MADV_NORMAL to WILLNEED. */
SHIM_EXPORT int posix_fadvise(int fd, off_t at, off_t len, int advice)
{
    return advised(fd, at, len, advice) ? 0 : syscall(SYS_fadvise64, fd, at, len, advice) < 0 ? errno : 0;
}

SHIM_EXPORT int posix_fadvise64(int fd, off64_t at, off64_t len, int advice)
{
    return posix_fadvise(fd, at, len, advice);
}

SHIM_EXPORT ssize_t readahead(int fd, off64_t at, size_t len)
{
    if (advised(fd, at, (off_t)len, MADV_WILLNEED))
        return 0;
    return syscall(SYS_readahead, fd, at, len);
}

/* Nobody can write to what is pulled: a lock holds against no one, in any process. */
SHIM_EXPORT int flock(int fd, int operation)
{
    struct open_file *f = view_maybe(fd) ? view_of(fd) : view_of_unknown(fd);
    return !f                                ? (int)syscall(SYS_flock, fd, operation)
           : f->held->mode == CONTROL_MIRROR ? mirror_flock(f, operation)
                                             : 0;
}

/* libc's own would not pass our fcntl. */
static int lock_file(int fd, int command, off_t len, __typeof__(&lockf) call)
{
    struct open_file *f = view_maybe(fd) ? view_of(fd) : view_of_unknown(fd);
    if (!f)
        return call(fd, command, len);
    struct flock l = {.l_type = command == F_ULOCK ? F_UNLCK : F_WRLCK, .l_whence = SEEK_CUR, .l_len = len};
    if (command != F_TEST)
        return fcntl(fd, command == F_LOCK ? F_SETLKW : F_SETLK, &l);
    int rc = fcntl(fd, F_GETLK, &l);
    if (rc || l.l_type == F_UNLCK || l.l_pid == raw_getpid())
        return rc;
    errno = EACCES;
    return -1;
}

SHIM_EXPORT int lockf(int fd, int command, off_t len)
{
    return lock_file(fd, command, len, REAL(lockf));
}

SHIM_EXPORT int lockf64(int fd, int command, off64_t len)
{
    return lock_file(fd, command, len, REAL(lockf64));
}

/* ---- from a view to another descriptor, within the kernel */

static ssize_t move_whole(struct mount *m, uint64_t start, size_t len, view_move *move, void *of)
{
    uint64_t since;
    int rc = view_need(m, start, len, &since), memory = rc ? -1 : view_memory(m);
    if (memory < 0) {
        errno = rc ? -rc : EIO;
        return -1;
    }
    off64_t at = (off64_t)start;
    return move(memory, &at, len, of);
}

/* What has been sent cannot be looked at again: where pages may go meanwhile, a copy of them is sent. */
static ssize_t move_copy(struct mount *m, uint64_t start, size_t len, view_move *move, void *of)
{
    len = len < COPIED ? len : COPIED;
    uint8_t *bytes = len ? raw_memory(COPIED) : NULL;
    int fd = (int)syscall(SYS_memfd_create, "memsync:copy", MFD_CLOEXEC);
    ssize_t done = len && !bytes ? -1 : fd < 0 ? -1 : 0;
    if (!done && len)
        done = read_at(m, &(struct iovec){bytes, len}, 1, start, len);
    if (done > 0)
        done = syscall(SYS_pwrite64, fd, bytes, (size_t)done, 0);
    off64_t at = 0;
    if (done >= 0)
        done = move(fd, &at, (size_t)done, of);
    int saved = errno;
    if (fd >= 0)
        raw_close(fd);
    if (bytes)
        raw_munmap(bytes, COPIED);
    errno = saved;
    return done;
}

ssize_t view_transfer(int from, off64_t *from_at, size_t len, view_move *move, void *of)
{
    struct open_file *f;
    if (!VIEWED(from, f))
        return VIEW_NOT_OURS;
    struct mount *m = view_mount(f);
    if (!m)
        return -1;
    if (from_at && !raw_readable(from_at, sizeof *from_at)) {
        errno = EFAULT;
        return -1;
    }
    uint64_t start = from_at ? (uint64_t)*from_at : __atomic_load_n(&f->held->offset, __ATOMIC_SEQ_CST);
    if ((int64_t)start < 0) {
        errno = EINVAL;
        return -1;
    }
    uint64_t size = view_size(m), left = start < size ? size - start : 0;
    len = len < left ? len : left;
    len = len < PIECE ? len : PIECE;
    ssize_t done = m->view->moves ? move_copy(m, start, len, move, of) : move_whole(m, start, len, move, of);
    off64_t at = (off64_t)start + done;
    if (done > 0 && from_at)
        *from_at = at;
    else if (done > 0)
        __atomic_store_n(&f->held->offset, (uint64_t)at, __ATOMIC_SEQ_CST);
    return done;
}
