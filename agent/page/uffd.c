#include "agent/page/uffd.h"

#include "agent/page/pages.h"
#include "agent/track/kernel.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define FAULTS_A_TIME 64u
#define TRIES 1000u

static int open_any(void)
{
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    if (fd < 0)
        fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (fd >= 0)
        return fd;
    int err = -errno, device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
    if (device < 0)
        return err;
    fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
    err = fd < 0 ? -errno : fd;
    close(device);
    return err;
}

int page_uffd(void)
{
    static int kept = -1;
    if (kept >= 0)
        return kept;
    int fd = open_any();
    struct uffdio_api api = {.api = UFFD_API};
    if (fd < 0)
        return fd;
    if (ioctl(fd, UFFDIO_API, &api) || !(api.features & UFFD_FEATURE_MISSING_SHMEM)) {
        close(fd);
        return -EOPNOTSUPP;
    }
    kept = fd;
    return kept;
}

int page_uffd_watch(int uffd, void *at, size_t len)
{
    struct uffdio_register r = {.range = {(uintptr_t)at, len}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    return ioctl(uffd, UFFDIO_REGISTER, &r) ? -errno : 0;
}

/* After a call over [*at, end) of which the kernel did `done` bytes, or refused with errno: moves *at to where to go
 * on. 0 to go on, 1 at the end, or the error. EAGAIN: it was interrupted, or the address space is changing: again, from
 * there. EEXIST: that one page is there. */
static int understand(bool refused, int64_t done, uint64_t *at, uint64_t end, unsigned *tries)
{
    int err = refused ? errno : 0;
    if (done > 0)
        *at += (uint64_t)done;
    switch (err) {
    case 0:
    case EAGAIN:
        if (done <= 0 && ++*tries > TRIES)
            return -EAGAIN;
        break;
    case EEXIST:
        *at += PAGE_SIZE;
        break;
    case EINVAL:
    case ENOTTY:
        return -EOPNOTSUPP;
    default:
        return -err;
    }
    return *at >= end;
}

int page_copy(int uffd, void *to, const void *from, size_t len)
{
    uint64_t start = (uintptr_t)to, at = start, end = at + len;
    unsigned tries = 0;
    int rc = len ? 0 : 1;
    while (!rc) {
        struct uffdio_copy c = {
            .dst = at, .src = (uintptr_t)from + (at - start), .len = end - at, .mode = UFFDIO_COPY_MODE_DONTWAKE};
        bool refused = ioctl(uffd, UFFDIO_COPY, &c) < 0;
        rc = understand(refused, c.copy, &at, end, &tries);
    }
    return rc < 0 ? rc : 0;
}

int page_zero(int uffd, void *to, size_t len)
{
    uint64_t at = (uintptr_t)to, end = at + len;
    unsigned tries = 0;
    int rc = len ? 0 : 1;
    while (!rc) {
        struct uffdio_zeropage z = {.range = {at, end - at}, .mode = UFFDIO_ZEROPAGE_MODE_DONTWAKE};
        bool refused = ioctl(uffd, UFFDIO_ZEROPAGE, &z) < 0;
        rc = understand(refused, z.zeropage, &at, end, &tries);
    }
    return rc < 0 ? rc : 0;
}

int page_poison(int uffd, uint64_t addr, uint64_t len)
{
    uint64_t at = addr, end = addr + len;
    unsigned tries = 0;
    int rc = len ? 0 : 1;
    while (!rc) {
        struct kernel_uffdio_poison p = {.range = {at, end - at}};
        bool refused = ioctl(uffd, KERNEL_UFFDIO_POISON, &p) < 0;
        rc = understand(refused, p.updated, &at, end, &tries);
    }
    return rc < 0 ? rc : 0;
}

int page_wake(int uffd, uint64_t addr, uint64_t len)
{
    struct uffdio_range r = {addr, len};
    return ioctl(uffd, UFFDIO_WAKE, &r) ? -errno : 0;
}

int page_faults(int uffd, uint64_t *addr, size_t cap)
{
    struct uffd_msg msgs[FAULTS_A_TIME];
    size_t n = cap < FAULTS_A_TIME ? cap : FAULTS_A_TIME;
    ssize_t got = read(uffd, msgs, n * sizeof *msgs);
    if (got < 0)
        return errno == EINTR ? -EAGAIN : -errno;
    if (!got)
        return -ESRCH;
    int count = 0;
    for (size_t i = 0; i < (size_t)got / sizeof *msgs; i++)
        if (msgs[i].event == UFFD_EVENT_PAGEFAULT)
            addr[count++] = msgs[i].arg.pagefault.address & ~(uint64_t)(PAGE_SIZE - 1);
    return count;
}
