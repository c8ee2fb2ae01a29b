/* The library's own descriptors: the agent's socket, the userfaultfd, and what is behind views. They live at high numbers, where programs do
 * not look, and stay there when the program closes or overwrites every number it can think of. */
#include "shim/shim.h"

#include <sys/resource.h>

int own_keep(int fd)
{
    if (fd < 0)
        return fd;
    struct rlimit limit;
    int from = 900;
    if (!getrlimit(RLIMIT_NOFILE, &limit) && limit.rlim_cur < 1000)
        from = limit.rlim_cur > 40 ? (int)limit.rlim_cur - 24 : 3;
    int high = raw_fcntl(fd, F_DUPFD_CLOEXEC, from);
    if (high < 0)
        return fd;
    raw_close(fd);
    return high;
}

/* Lock held. The kernel closes the old number when the program's call takes it. */
void own_evade(int fd)
{
    int *kept = fd == client_fd ? &client_fd : fd == arm_kept ? &arm_kept : NULL;
    if (!kept) {
        view_evade(fd);
        return;
    }
    int other = raw_fcntl(fd, F_DUPFD_CLOEXEC, fd + 1);
    if (other < 0)
        other = raw_fcntl(fd, F_DUPFD_CLOEXEC, 3);
    *kept = other;
}
