/* Waiting for descriptors. A pulled file is always ready, like any regular file; the kernel would refuse the descriptor
 * that stands for it. The others are then only looked at, not waited for. */
#include "shim/real.h"
#include "shim/view.h"

#include <string.h>

#define READY (POLLIN | POLLRDNORM | POLLOUT | POLLWRNORM)
#define FEW 64u

static bool viewed(int fd)
{
    return view_maybe(fd) && view_of(fd);
}

static bool any_viewed(struct pollfd *fds, nfds_t n)
{
    if (__builtin_expect(!__atomic_load_n(&view_count, __ATOMIC_RELAXED), true) || !raw_readable(fds, n * sizeof *fds))
        return false;
    for (nfds_t i = 0; i < n; i++)
        if (viewed(fds[i].fd))
            return true;
    return false;
}

/* Whether one of ours is asked for what a regular file always is. The rest it never is. */
static bool answered(const struct pollfd *fds, nfds_t n)
{
    for (nfds_t i = 0; i < n; i++)
        if ((fds[i].events & READY) && viewed(fds[i].fd))
            return true;
    return false;
}

/* The kernel sees the others, in `some`, a copy. */
static int poll_others(struct pollfd *fds, nfds_t n, const struct timespec *t, const sigset_t *mask,
                       struct pollfd *some)
{
    const struct timespec now = {0};
    memcpy(some, fds, n * sizeof *fds);
    for (nfds_t i = 0; i < n; i++)
        if (viewed(fds[i].fd))
            some[i].fd = -1;
    int rc = REAL(ppoll)(some, n, answered(fds, n) ? &now : t, mask);
    for (nfds_t i = 0; i < n && rc >= 0; i++) {
        bool ours = some[i].fd != fds[i].fd;
        fds[i].revents = ours ? fds[i].events & READY : some[i].revents;
        rc += ours && fds[i].revents;
    }
    return rc;
}

static int poll_viewed(struct pollfd *fds, nfds_t n, const struct timespec *t, const sigset_t *mask)
{
    struct pollfd few[FEW], *some = n <= FEW ? few : raw_memory(n * sizeof *fds);
    if (!some) {
        errno = ENOMEM;
        return -1;
    }
    int rc = poll_others(fds, n, t, mask, some), saved = errno;
    if (some != few)
        raw_munmap(some, n * sizeof *fds);
    errno = saved;
    return rc;
}

SHIM_EXPORT int poll(struct pollfd *fds, nfds_t n, int ms)
{
    if (!any_viewed(fds, n))
        return REAL(poll)(fds, n, ms);
    struct timespec t = {.tv_sec = ms / 1000, .tv_nsec = ms % 1000 * 1000000L};
    return poll_viewed(fds, n, ms < 0 ? NULL : &t, NULL);
}

SHIM_EXPORT int ppoll(struct pollfd *fds, nfds_t n, const struct timespec *t, const sigset_t *mask)
{
    return any_viewed(fds, n) ? poll_viewed(fds, n, t, mask) : REAL(ppoll)(fds, n, t, mask);
}

/* The forms that fortified programs call. A length beyond the buffer is theirs to die of. */
SHIM_EXPORT int __poll_chk(struct pollfd *fds, nfds_t n, int ms, size_t room)
{
    return room / sizeof *fds < n ? REAL(__poll_chk)(fds, n, ms, room) : poll(fds, n, ms);
}

SHIM_EXPORT int __ppoll_chk(struct pollfd *fds, nfds_t n, const struct timespec *t, const sigset_t *mask, size_t room)
{
    return room / sizeof *fds < n ? REAL(__ppoll_chk)(fds, n, t, mask, room) : ppoll(fds, n, t, mask);
}

/* ---- select */

/* Takes ours out of one set, keeping them in *ours: how many. */
static int take(int n, fd_set *set, fd_set *ours)
{
    int count = 0;
    FD_ZERO(ours);
    for (int fd = 0; set && fd < n; fd++)
        if (FD_ISSET(fd, set) && viewed(fd)) {
            FD_CLR(fd, set);
            FD_SET(fd, ours);
            count++;
        }
    return count;
}

static void give(int n, fd_set *set, const fd_set *ours)
{
    for (int fd = 0; set && fd < n; fd++)
        if (FD_ISSET(fd, ours))
            FD_SET(fd, set);
}

static bool plain(int n, const fd_set *set)
{
    return !set || raw_readable(set, (size_t)(n + 63) / 64 * 8);
}

/* false: none of ours is waited for. An exception is what a regular file never has, so those are only left out. */
static bool select_viewed(int n, fd_set *in, fd_set *out, fd_set *except, const sigset_t *mask, int *rc)
{
    fd_set ours[3];
    const struct timespec now = {0};
    if (__builtin_expect(!__atomic_load_n(&view_count, __ATOMIC_RELAXED), true) || n <= 0 || n > FD_SETSIZE ||
        !plain(n, in) || !plain(n, out) || !plain(n, except))
        return false;
    take(n, except, &ours[2]);
    int count = take(n, in, &ours[0]) + take(n, out, &ours[1]);
    if (!count)
        return false;
    *rc = REAL(pselect)(n, in, out, except, &now, mask);
    if (*rc < 0)
        give(n, except, &ours[2]);
    else
        *rc += count;
    give(n, in, &ours[0]);
    give(n, out, &ours[1]);
    return true;
}

SHIM_EXPORT int select(int n, fd_set *in, fd_set *out, fd_set *except, struct timeval *t)
{
    int rc;
    return select_viewed(n, in, out, except, NULL, &rc) ? rc : REAL(select)(n, in, out, except, t);
}

SHIM_EXPORT int pselect(int n, fd_set *in, fd_set *out, fd_set *except, const struct timespec *t, const sigset_t *mask)
{
    int rc;
    return select_viewed(n, in, out, except, mask, &rc) ? rc : REAL(pselect)(n, in, out, except, t, mask);
}

/* ---- epoll: refused, as the kernel refuses regular files, so that programs fall back as they do for those */

SHIM_EXPORT int epoll_ctl(int epoll, int how, int fd, struct epoll_event *event)
{
    if (how == EPOLL_CTL_ADD && viewed(fd)) {
        errno = EPERM;
        return -1;
    }
    return (int)syscall(SYS_epoll_ctl, epoll, how, fd, event);
}
