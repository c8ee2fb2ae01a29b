/* Arming: userfaultfd, one descriptor a process, for both of its uses. Mappings of tracked files are write-protected in
 * its asynchronous mode: the kernel itself lifts the protection at the first store and leaves the page-table bit that
 * the agent's scan collects. Mappings of views are registered for missing faults, which the agent reads and answers.
 * The descriptor is kept open because closing the last one unregisters: what is missing would read as zeros. */
#include "shim/shim.h"

#include "agent/track/kernel.h"

#define WANTED (KERNEL_UFFD_WP | KERNEL_UFFD_WP_FILE | KERNEL_UFFD_WP_UNPOPULATED | KERNEL_UFFD_WP_ASYNC)

int arm_kept = -1;
bool arm_user_mode_only;
static bool tried, protects, misses; /* what the kernel can do for us */
static char reason[192];

static int open_any(void)
{
    int dev = raw_openat(AT_FDCWD, "/dev/userfaultfd", O_RDWR | O_CLOEXEC, 0);
    if (dev >= 0) {
        int fd = (int)syscall(SYS_ioctl, dev, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
        raw_close(dev);
        arm_user_mode_only = false;
        if (fd >= 0)
            return fd;
    }
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    arm_user_mode_only = fd < 0;
    if (fd < 0)
        fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    return fd < 0 ? -errno : fd;
}

/* Opens one with the features asked for; *has gets the kernel's mask. */
static int open_with(uint64_t features, uint64_t *has)
{
    int fd = open_any();
    if (fd < 0)
        return fd;
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    if (syscall(SYS_ioctl, fd, UFFDIO_API, &api)) {
        int e = errno;
        raw_close(fd);
        return -e;
    }
    *has = api.features;
    return fd;
}

static void open_once(void)
{
    uint64_t has = 0;
    tried = true;
    int fd = open_with(0, &has);
    if (fd < 0) {
        say_format(
            reason, sizeof reason,
            "userfaultfd cannot be opened (%e); allow it in the container's seccomp profile, or use strategy hash", fd);
        return;
    }
    raw_close(fd);
    protects = (has & WANTED) == WANTED;
    misses = has & UFFD_FEATURE_MISSING_SHMEM;
    uint64_t wanted = (protects ? WANTED : 0) | (misses ? UFFD_FEATURE_MISSING_SHMEM : 0);
    if (!protects)
        say_format(reason, sizeof reason,
                   "this kernel's userfaultfd has no asynchronous write protection (Linux 6.7 or later has); use "
                   "strategy hash");
    if (!wanted)
        return;
    fd = open_with(wanted, &has);
    if (fd < 0 || (has & wanted) != wanted) {
        protects = misses = false;
        say_format(reason, sizeof reason, "userfaultfd refused its features (%e)", fd);
        if (fd >= 0)
            raw_close(fd);
        return;
    }
    arm_kept = own_keep(fd);
}

const char *arm_reason(void)
{
    return reason;
}

static void ready(void)
{
    if (tried)
        return;
    open_once();
    if (arm_kept >= 0)
        client_uffd(arm_kept);
}

bool arm_can_miss(void)
{
    ready();
    return misses;
}

int arm_missing(uint64_t addr, uint64_t len)
{
    ready();
    struct uffdio_register r = {.range = {.start = addr, .len = len}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    return !misses ? -ENOTSUP : syscall(SYS_ioctl, arm_kept, UFFDIO_REGISTER, &r) ? -errno : 0;
}

bool arm_can_mirror(void)
{
    ready();
    return misses && protects;
}

static int protect(uint64_t addr, uint64_t len, uint64_t mode)
{
    struct uffdio_register r = {.range = {.start = addr, .len = len}, .mode = mode};
    if (syscall(SYS_ioctl, arm_kept, UFFDIO_REGISTER, &r)) {
        int e = errno;
        say_format(reason, sizeof reason, "the kernel did not register the mapping (%e)", e);
        return -e;
    }
    struct uffdio_writeprotect w = {.range = {.start = addr, .len = len}, .mode = UFFDIO_WRITEPROTECT_MODE_WP};
    while (syscall(SYS_ioctl, arm_kept, UFFDIO_WRITEPROTECT, &w)) {
        int e = errno;
        if (e == EAGAIN)
            continue;
        say_format(reason, sizeof reason, "the kernel did not write-protect the mapping (%e)", e);
        return -e;
    }
    return 0;
}

int arm_range(uint64_t addr, uint64_t len)
{
    ready();
    return protects ? protect(addr, len, UFFDIO_REGISTER_MODE_WP) : -ENOTSUP;
}

int arm_mirror(uint64_t addr, uint64_t len)
{
    return arm_can_mirror() ? protect(addr, len, UFFDIO_REGISTER_MODE_WP | UFFDIO_REGISTER_MODE_MISSING) : -ENOTSUP;
}

void arm_fork_child(void)
{
    if (arm_kept >= 0)
        raw_close(arm_kept);
    arm_kept = -1;
    tried = protects = misses = false;
}
