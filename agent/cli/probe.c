#include "agent/cli/probe.h"
#include "agent/page/uffd.h"
#include "agent/track/kernel.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PAGES 8u
#define STORED 5u

int probe_uffd(enum probe_way way)
{
    int fd, device;
    switch (way) {
    case PROBE_DEVICE:
        device = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
        if (device < 0)
            return -errno;
        fd = ioctl(device, USERFAULTFD_IOC_NEW, O_CLOEXEC | O_NONBLOCK);
        fd = fd < 0 ? -errno : fd;
        close(device);
        return fd;
    case PROBE_CALL:
        fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
        return fd < 0 ? -errno : fd;
    default:
        fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
        return fd < 0 ? -errno : fd;
    }
}

int probe_uffd_any(enum probe_way *how)
{
    int fd = -ENOSYS;
    for (int way = 0; way < PROBE_WAYS; way++) {
        fd = probe_uffd((enum probe_way)way);
        if (fd < 0)
            continue;
        if (how)
            *how = (enum probe_way)way;
        break;
    }
    return fd;
}

unsigned long long probe_features(void)
{
    int fd = probe_uffd_any(NULL);
    struct uffdio_api api = {.api = UFFD_API};
    if (fd < 0)
        return 0;
    if (ioctl(fd, UFFDIO_API, &api))
        api.features = 0;
    close(fd);
    return api.features;
}

static int fail(int err, const char *what, char *why, size_t cap)
{
    snprintf(why, cap, "%s: %s", what, strerror(-err));
    return err;
}

/* Pages of [at, at + PAGES) stored to since the last scan, as bits; armed again. Negative errno else. */
static int scan(int pagemap, const char *at, size_t page)
{
    struct kernel_page_region out[PAGES];
    struct kernel_scan_arg a = {.size = sizeof a,
                                .flags = KERNEL_SCAN_WP_MATCHING | KERNEL_SCAN_CHECK_WPASYNC,
                                .start = (uintptr_t)at,
                                .end = (uintptr_t)at + PAGES * page,
                                .vec = (uintptr_t)out,
                                .vec_len = PAGES,
                                .category_mask = KERNEL_PAGE_IS_WRITTEN,
                                .return_mask = KERNEL_PAGE_IS_WRITTEN};
    int n = ioctl(pagemap, KERNEL_PAGEMAP_SCAN, &a), bits = 0;
    if (n < 0)
        return -errno;
    for (int i = 0; i < n; i++)
        for (uint64_t p = out[i].start; p < out[i].end; p += page)
            bits |= 1 << ((p - (uintptr_t)at) / page);
    return bits;
}

static int round_trip(int uffd, int pagemap, char *at, size_t page, char *why, size_t cap)
{
    struct uffdio_api api = {.api = UFFD_API,
                             .features = KERNEL_UFFD_WP | KERNEL_UFFD_WP_FILE | KERNEL_UFFD_WP_UNPOPULATED |
                                         KERNEL_UFFD_WP_ASYNC};
    struct uffdio_register r = {.range = {.start = (uintptr_t)at, .len = PAGES * page},
                                .mode = UFFDIO_REGISTER_MODE_WP};
    if (ioctl(uffd, UFFDIO_API, &api))
        return fail(-errno, "userfaultfd has no asynchronous write protection (Linux 6.7 and later have)", why, cap);
    if (ioctl(uffd, UFFDIO_REGISTER, &r))
        return fail(-errno, "this file system's mappings cannot be write-protected by userfaultfd", why, cap);
    int armed = scan(pagemap, at, page);
    if (armed < 0)
        return fail(armed, "PAGEMAP_SCAN (Linux 6.7 and later have it)", why, cap);
    at[STORED * page] = 1;
    int first = scan(pagemap, at, page), second = scan(pagemap, at, page);
    if (first != 1 << STORED || second != 0) {
        snprintf(why, cap, "a scan found pages %#x and then %#x, where it should %#x and then none", (unsigned)first,
                 (unsigned)second, 1u << STORED);
        return -EIO;
    }
    return 0;
}

int probe_tracking(const char *dir, char *why, size_t cap)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    char path[4200];
    snprintf(path, sizeof path, "%s/.memsync-doctor-XXXXXX", dir);
    int file = mkostemp(path, O_CLOEXEC);
    if (file < 0)
        return fail(-errno, "no file can be made there", why, cap);
    unlink(path);
    char *at = MAP_FAILED;
    int uffd = -1, pagemap = -1, rc = 0;
    if (ftruncate(file, (off_t)(PAGES * page)) ||
        (at = mmap(NULL, PAGES * page, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0)) == MAP_FAILED)
        rc = fail(-errno, "a file there cannot be mapped", why, cap);
    if (!rc && (uffd = probe_uffd_any(NULL)) < 0)
        rc = fail(uffd, "userfaultfd", why, cap);
    if (!rc && (pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC)) < 0)
        rc = fail(-errno, "/proc/self/pagemap", why, cap);
    if (!rc)
        rc = round_trip(uffd, pagemap, at, page, why, cap);
    if (at != MAP_FAILED)
        munmap(at, PAGES * page);
    close(file);
    if (uffd >= 0)
        close(uffd);
    if (pagemap >= 0)
        close(pagemap);
    return rc;
}

struct waiting {
    const volatile char *at;
    char got;
};

static void *wait_there(void *arg)
{
    struct waiting *w = arg;
    w->got = *w->at;
    return NULL;
}

/* The thread faults at `seen`; `filled` is the agent's side. */
static int fill_one(int uffd, char *filled, char *seen, size_t page, char *why, size_t cap)
{
    struct waiting w = {.at = seen + STORED * page};
    uint64_t addr;
    pthread_t thread;
    char *bytes = malloc(page);
    if (!bytes || pthread_create(&thread, NULL, wait_there, &w)) {
        free(bytes);
        return fail(-ENOMEM, "a thread", why, cap);
    }
    memset(bytes, 7, page);
    struct pollfd p = {.fd = uffd, .events = POLLIN};
    poll(&p, 1, 2000);
    int faults = page_faults(uffd, &addr, 1);
    int rc = page_copy(uffd, filled + STORED * page, bytes, page);
    if (rc) /* not to leave it there */
        page_zero(uffd, seen + STORED * page, page);
    page_wake(uffd, (uintptr_t)seen, PAGES * page);
    pthread_join(thread, NULL);
    free(bytes);
    if (rc)
        return fail(rc, "UFFDIO_COPY into shared memory", why, cap);
    if (faults != 1 || addr != (uintptr_t)w.at || w.got != 7) {
        snprintf(why, cap, "a fault on a missing page was not told, or not answered");
        return -EIO;
    }
    return 0;
}

int probe_filling(char *why, size_t cap)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE), len = PAGES * page;
    int memory = memfd_create("memsync-doctor", MFD_CLOEXEC), uffd = probe_uffd_any(NULL), rc = 0;
    struct uffdio_api api = {.api = UFFD_API};
    char *filled = MAP_FAILED, *seen = MAP_FAILED;
    if (memory < 0 || ftruncate(memory, (off_t)len))
        rc = fail(-errno, "a memfd", why, cap);
    else if (uffd < 0)
        rc = fail(uffd, "userfaultfd", why, cap);
    else if (ioctl(uffd, UFFDIO_API, &api))
        rc = fail(-errno, "UFFDIO_API", why, cap);
    if (!rc && ((filled = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0)) == MAP_FAILED ||
                (seen = mmap(NULL, len, PROT_READ, MAP_SHARED, memory, 0)) == MAP_FAILED))
        rc = fail(-errno, "a memfd cannot be mapped", why, cap);
    if (!rc && ((rc = page_uffd_watch(uffd, filled, len)) || (rc = page_uffd_watch(uffd, seen, len))))
        rc = fail(rc, "shared memory cannot be watched for missing pages (Linux 4.11 and later can)", why, cap);
    if (!rc)
        rc = fill_one(uffd, filled, seen, page, why, cap);
    if (filled != MAP_FAILED)
        munmap(filled, len);
    if (seen != MAP_FAILED)
        munmap(seen, len);
    if (uffd >= 0)
        close(uffd);
    if (memory >= 0)
        close(memory);
    return rc;
}

static bool softdirty_bit(int pagemap, const char *at, size_t page)
{
    uint64_t entry = 0;
    return pread(pagemap, &entry, sizeof entry, (off_t)((uintptr_t)at / page * sizeof entry)) ==
               (ssize_t)sizeof entry &&
           (entry >> 55 & 1);
}

bool probe_softdirty(void)
{
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    volatile char *at = mmap(NULL, page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    int clear = open("/proc/self/clear_refs", O_WRONLY | O_CLOEXEC),
        pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    bool works = false;
    if (at != MAP_FAILED && clear >= 0 && pagemap >= 0) {
        *at = 1;
        bool cleared = write(clear, "4", 1) == 1 && !softdirty_bit(pagemap, (const char *)at, page);
        *at = 2;
        works = cleared && softdirty_bit(pagemap, (const char *)at, page);
    }
    if (at != MAP_FAILED)
        munmap((void *)at, page);
    if (clear >= 0)
        close(clear);
    if (pagemap >= 0)
        close(pagemap);
    return works;
}
