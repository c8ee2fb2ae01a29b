/* Calls that write to a mirror: into the memfd itself, between the two marks that any tracked file's writes have
 * (hooks_write.c).
 *
 * A page of the memfd that has not been fetched is a hole. One that is written as a whole need not be: the agent never
 * fills over what is there. One that is written in part is fetched first; so is everything under a buffer that cannot
 * be read to its end, because the kernel makes a page of zeros of a hole whose copy breaks off. What lies beyond the
 * end of the file is zeros: nothing has to be fetched there, but the file is made longer first (TRUNCATE).
 *
 * Pages that are taken out of the memfd meanwhile: `calls` is raised before it is looked what is there, so the agent
 * leaves alone what we find (wire/shared.h). */
#include "shim/real.h"
#include "shim/view.h"

#include <limits.h>
#include <linux/falloc.h>
#include <linux/fs.h>

#define HERE (-1)
#define CHUNK (64u << 10)
#define COPY_TRIES 3
#define WRITE_MAX 0x7ffff000u /* what one call of the kernel's writes */

static bool total(const struct iovec *iov, int n, uint64_t *sum)
{
    *sum = 0;
    errno = n < 0 || n > IOV_MAX ? EINVAL : n && !raw_readable(iov, (size_t)n * sizeof *iov) ? EFAULT : 0;
    for (int i = 0; !errno && i < n; i++)
        if (__builtin_add_overflow(*sum, iov[i].iov_len, sum) || *sum > SSIZE_MAX)
            errno = EINVAL;
    return !errno;
}

static bool readable(const struct iovec *iov, int n)
{
    for (int i = 0; i < n; i++)
        if (iov[i].iov_len && !raw_readable(iov[i].iov_base, iov[i].iov_len))
            return false;
    return true;
}

/* Bytes [from, to) are in the memfd, as far as the file goes. */
static int there(struct mount *m, uint64_t from, uint64_t to)
{
    uint64_t size = view_size(m);
    to = to < size ? to : size;
    return from < to ? view_need(m, from, to - from, &(uint64_t){0}) : 0;
}

static uint64_t page_of(uint64_t at)
{
    return at & ~(shim_page - 1);
}

/* Of [at, end), after the file was made long enough. iov NULL: zeros. */
static int prepare(struct mount *m, const struct iovec *iov, int n, uint64_t at, uint64_t end)
{
    if (__atomic_load_n(&m->view->punches, __ATOMIC_SEQ_CST) & 1)
        return there(m, page_of(at), end + shim_page); /* pages are going: answered when that is over */
    int rc = at % shim_page ? there(m, page_of(at), page_of(at) + shim_page) : 0;
    if (!rc && end % shim_page && end < view_size(m))
        rc = there(m, page_of(end), page_of(end) + shim_page);
    if (!rc && iov && !view_present(m, at, end - at) && !readable(iov, n))
        rc = there(m, at, end);
    return rc;
}

static bool shown(const struct iovec *iov, int n)
{
    for (int i = 0; i < n; i++)
        if (view_shows((uint64_t)(uintptr_t)iov[i].iov_base, (uint64_t)(uintptr_t)iov[i].iov_base + iov[i].iov_len))
            return true;
    return false;
}

/* To memory of our own, pages that are missing waited for. How many bytes could be read. */
static size_t copied(char *to, char *from, size_t len)
{
    size_t sum = 0;
    for (int tries = 0; sum < len && tries < COPY_TRIES; tries++) {
        struct iovec here = {to + sum, len - sum}, there = {from + sum, len - sum};
        ssize_t got = syscall(SYS_process_vm_readv, getpid(), &here, 1, &there, 1, 0);
        sum += got > 0 ? (size_t)got : 0;
        if (sum < len)
            view_buffer((uint64_t)(uintptr_t)from, len); /* where the kernel cannot wait */
    }
    return sum;
}

/* From a mapping of a view by way of other memory. A write holds the lock of the memfd while it waits for the page that
 * it reads, and the agent, which is to bring that page, asks for the same lock. */
static ssize_t put_shown(int memory, const struct iovec *iov, int n, uint64_t at)
{
    char *buffer = raw_memory(CHUNK);
    ssize_t sum = 0, done = 0;
    if (!buffer) {
        errno = ENOMEM;
        return -1;
    }
    for (int i = 0; i < n; i++)
        for (size_t from = 0, some, got; from < iov[i].iov_len; from += some) {
            some = iov[i].iov_len - from < CHUNK ? iov[i].iov_len - from : CHUNK;
            got = copied(buffer, (char *)iov[i].iov_base + from, some);
            errno = EFAULT;
            done = got ? syscall(SYS_pwrite64, memory, buffer, got, at + (uint64_t)sum) : -1;
            sum += done > 0 ? done : 0;
            if (done < (ssize_t)some)
                goto out;
        }
out:;
    int saved = errno;
    raw_munmap(buffer, CHUNK);
    errno = saved;
    return sum ? sum : done;
}

/* At an offset that is known. Bytes written, or -1. */
static ssize_t put(struct mount *m, const struct iovec *iov, int n, uint64_t at, uint64_t len)
{
    uint64_t end = at + len;
    ssize_t done = -1;
    if (end > INT64_MAX) {
        errno = EFBIG;
        return -1;
    }
    struct shared *s = mirror_enter(m);
    files_mark(m->region, at, len);
    int rc = mirror_grow(m, end);
    if (!rc)
        rc = prepare(m, iov, n, at, end);
    int memory = rc ? -1 : view_memory(m);
    if (memory >= 0)
        done = shown(iov, n) ? put_shown(memory, iov, n, at) : syscall(SYS_pwritev, memory, iov, n, at, 0);
    else
        errno = rc ? -rc : EIO;
    int saved = errno;
    files_mark(m->region, at, len);
    if (done > 0) /* it may have been cut meanwhile, and then the kernel has made it longer again */
        mirror_grow(m, at + (uint64_t)done);
    mirror_leave(s);
    mirror_touch(m);
    errno = saved;
    return done;
}

static ssize_t append(struct open_file *f, struct mount *m, const struct iovec *iov, int n, uint64_t len, bool here)
{
    struct appending a;
    int rc = there(m, page_of(view_size(m)), UINT64_MAX); /* now, so that nobody waits long for us */
    if (!rc)
        rc = mirror_append_begin(m, &a);
    if (rc) {
        errno = -rc;
        return -1;
    }
    uint64_t at = view_size(m);
    ssize_t done = put(m, iov, n, at, len);
    if (done < (ssize_t)len) { /* nothing may stand behind what was written */
        int saved = errno;
        mirror_resize(f, at + (uint64_t)(done > 0 ? done : 0));
        errno = saved;
    }
    mirror_append_end(&a);
    if (done > 0 && here)
        __atomic_store_n(&f->held->offset, at + (uint64_t)done, __ATOMIC_SEQ_CST);
    return done;
}

/* Threads that share the offset each get a stretch of their own, as the kernel sees to it for files. */
static ssize_t put_here(struct open_file *f, struct mount *m, const struct iovec *iov, int n, uint64_t len)
{
    uint64_t at = __atomic_fetch_add(&f->held->offset, len, __ATOMIC_SEQ_CST), end = at + len;
    ssize_t done = put(m, iov, n, at, len);
    if (done < (ssize_t)len)
        __atomic_compare_exchange_n(&f->held->offset, &end, at + (uint64_t)(done > 0 ? done : 0), false,
                                    __ATOMIC_SEQ_CST, __ATOMIC_RELAXED);
    return done;
}

/* What fits into one call of iov: its first entries, *len bytes; `last` when the first one alone does not. */
static const struct iovec *fitting(const struct iovec *iov, int *n, uint64_t *len, struct iovec *last)
{
    if (*len <= WRITE_MAX)
        return iov;
    *len = 0;
    for (int i = 0; i < *n; *len += iov[i++].iov_len)
        if (iov[i].iov_len > WRITE_MAX - *len) {
            *n = i;
            break;
        }
    if (*len)
        return iov;
    *last = (struct iovec){iov[*n].iov_base, WRITE_MAX};
    *n = 1;
    *len = WRITE_MAX;
    return last;
}

static struct mount *writable(struct open_file *f)
{
    errno = view_writable(f) ? 0 : EBADF;
    struct mount *m = errno ? NULL : view_mount(f);
    if (m && !m->region) {
        errno = EBADF;
        return NULL;
    }
    return m;
}

ssize_t view_write(struct open_file *f, const struct iovec *iov, int n, off_t at, int flags)
{
    uint64_t len;
    int saved = errno;
    struct mount *m = writable(f);
    if (!m || !total(iov, n, &len))
        return -1;
    errno = at < HERE ? EINVAL : flags & ~(RWF_HIPRI | RWF_DSYNC | RWF_SYNC | RWF_APPEND) ? EOPNOTSUPP : saved;
    if (errno != saved)
        return -1;
    struct iovec last;
    iov = fitting(iov, &n, &len, &last);
    uint32_t how = __atomic_load_n(&f->held->flags, __ATOMIC_RELAXED);
    bool appends = (how & O_APPEND) || (flags & RWF_APPEND);
    ssize_t done = !len         ? 0
                   : appends    ? append(f, m, iov, n, len, at == HERE)
                   : at == HERE ? put_here(f, m, iov, n, len)
                                : put(m, iov, n, (uint64_t)at, len);
    saved = errno;
    if (done > 0 && ((how & (O_SYNC | O_DSYNC)) || (flags & (RWF_SYNC | RWF_DSYNC))))
        sync_now(m->region);
    errno = saved;
    return done;
}

ssize_t view_send(struct open_file *f, int from, off64_t *at, size_t len)
{
    char *buffer = raw_memory(CHUNK);
    ssize_t sum = 0, got = 0, put_now = 0;
    if (!buffer) {
        errno = ENOMEM;
        return -1;
    }
    while (len && (got = at ? pread64(from, buffer, len < CHUNK ? len : CHUNK, *at)
                            : read(from, buffer, len < CHUNK ? len : CHUNK)) > 0) {
        put_now = view_write(f, &(struct iovec){buffer, (size_t)got}, 1, HERE, 0);
        if (put_now <= 0)
            break;
        sum += put_now;
        len -= (size_t)put_now;
        if (at)
            *at += put_now;
        if (put_now < got)
            break;
    }
    int saved = errno;
    raw_munmap(buffer, CHUNK);
    errno = saved;
    return sum ? sum : got < 0 || put_now < 0 ? -1 : 0;
}

/* ---- fallocate */

/* Zeros, as a hole reads: a hole of the memfd would be what the remote has. */
static int zero(struct open_file *f, uint64_t at, uint64_t len)
{
    char *zeros = raw_memory(CHUNK);
    struct mount *m = view_mount(f);
    int rc = zeros && m ? 0 : -1;
    uint64_t size = m ? view_size(m) : 0;
    len = at >= size ? 0 : len < size - at ? len : size - at;
    while (!rc && len) {
        uint64_t some = len < CHUNK ? len : CHUNK;
        ssize_t done = put(m, &(struct iovec){zeros, some}, 1, at, some);
        rc = done > 0 ? 0 : -1;
        at += done > 0 ? (uint64_t)done : 0;
        len -= done > 0 ? (uint64_t)done : 0;
    }
    if (zeros)
        raw_munmap(zeros, CHUNK);
    return rc;
}

int view_allocate(struct open_file *f, int mode, off_t at, off_t len)
{
    struct mount *m = writable(f);
    if (!m)
        return -1;
    bool zeroes = mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE);
    errno = at < 0 || len <= 0                                                                      ? EINVAL
            : at > INT64_MAX - len                                                                  ? EFBIG
            : mode & ~(FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE)           ? EOPNOTSUPP
            : (mode & FALLOC_FL_PUNCH_HOLE) && mode != (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE) ? EOPNOTSUPP
                                                                                                    : 0;
    if (errno)
        return -1;
    int rc = 0;
    if (!(mode & FALLOC_FL_KEEP_SIZE)) {
        struct shared *s = mirror_enter(m);
        rc = mirror_grow(m, (uint64_t)(at + len));
        mirror_leave(s);
    }
    if (rc) {
        errno = -rc;
        return -1;
    }
    return zeroes ? zero(f, (uint64_t)at, (uint64_t)len) : 0;
}
