/* Calls that are hooked only for the memory that they give to the kernel: pages of a view that nobody has touched,
 * where the kernel cannot wait for them (view.h, calls' buffers). */
#include "shim/real.h"
#include "shim/view.h"

/* ---- stdio: large reads and writes go to the kernel as they are */

SHIM_EXPORT size_t fread(void *restrict to, size_t size, size_t n, FILE *restrict f)
{
    VIEW_BUFFER(to, size * n);
    return REAL(fread)(to, size, n, f);
}

SHIM_EXPORT size_t(fread_unlocked)(void *restrict to, size_t size, size_t n, FILE *restrict f)
{
    VIEW_BUFFER(to, size * n);
    return REAL(fread_unlocked)(to, size, n, f);
}

SHIM_EXPORT size_t __fread_chk(void *to, size_t room, size_t size, size_t n, FILE *f)
{
    VIEW_BUFFER(to, size * n < room ? size * n : room);
    return REAL(__fread_chk)(to, room, size, n, f);
}

SHIM_EXPORT size_t __fread_unlocked_chk(void *to, size_t room, size_t size, size_t n, FILE *f)
{
    VIEW_BUFFER(to, size * n < room ? size * n : room);
    return REAL(__fread_unlocked_chk)(to, room, size, n, f);
}

SHIM_EXPORT size_t fwrite(const void *restrict from, size_t size, size_t n, FILE *restrict f)
{
    VIEW_BUFFER(from, size * n);
    return REAL(fwrite)(from, size, n, f);
}

SHIM_EXPORT size_t(fwrite_unlocked)(const void *restrict from, size_t size, size_t n, FILE *restrict f)
{
    VIEW_BUFFER(from, size * n);
    return REAL(fwrite_unlocked)(from, size, n, f);
}

/* ---- sockets */

SHIM_EXPORT ssize_t recv(int fd, void *to, size_t len, int flags)
{
    VIEW_BUFFER(to, len);
    return REAL(recv)(fd, to, len, flags);
}

SHIM_EXPORT ssize_t __recv_chk(int fd, void *to, size_t len, size_t room, int flags)
{
    VIEW_BUFFER(to, len < room ? len : room);
    return REAL(__recv_chk)(fd, to, len, room, flags);
}

SHIM_EXPORT ssize_t recvfrom(int fd, void *restrict to, size_t len, int flags, struct sockaddr *restrict from,
                             socklen_t *restrict n)
{
    VIEW_BUFFER(to, len);
    return REAL(recvfrom)(fd, to, len, flags, from, n);
}

SHIM_EXPORT ssize_t __recvfrom_chk(int fd, void *to, size_t len, size_t room, int flags, struct sockaddr *from,
                                   socklen_t *n)
{
    VIEW_BUFFER(to, len < room ? len : room);
    return REAL(__recvfrom_chk)(fd, to, len, room, flags, from, n);
}

SHIM_EXPORT ssize_t recvmsg(int fd, struct msghdr *m, int flags)
{
    if (__builtin_expect(view_buffers, false) && raw_readable(m, sizeof *m))
        view_buffer_vector(m->msg_iov, (int)m->msg_iovlen);
    return REAL(recvmsg)(fd, m, flags);
}

/* ---- locked memory */

SHIM_EXPORT int mlock(const void *at, size_t len)
{
    VIEW_BUFFER(at, len);
    return (int)syscall(SYS_mlock, at, len);
}

SHIM_EXPORT int mlock2(const void *at, size_t len, unsigned flags)
{
    if (!(flags & MLOCK_ONFAULT))
        VIEW_BUFFER(at, len);
    return (int)syscall(SYS_mlock2, at, len, flags);
}
