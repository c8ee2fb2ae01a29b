/* Page-table tracking: userfaultfd's asynchronous write protection, read by PAGEMAP_SCAN
 * (Documentation/admin-guide/mm/pagemap.rst, Linux 6.7).
 *
 * The program registered and protected the range; the first store to a page lets go of its protection without a fault
 * to anybody. The scan, made through that program's pagemap descriptor, lists such pages and protects them again in one
 * step.
 *
 * A program that dies leaves a memory map without mappings, in which a scan finds nothing and says success. So after
 * each scan the map is asked whether it still has users (a pagemap read returns 0 bytes when not): if it has now, it
 * had during the scan. */
#include "agent/track/track.h"
#include "agent/track/kernel.h"

#include <errno.h>
#include <unistd.h>

#define BATCH 512

static int alive(const struct track_map *map)
{
    uint64_t entry;
    ssize_t n = pread(map->pagemap, &entry, sizeof entry, (off_t)(map->addr / PAGE * sizeof entry));
    return n == sizeof entry ? 0 : n < 0 ? -errno : -ESRCH;
}

static int uffd_collect(const struct track_map *map, const struct track_file *file, struct extents *out)
{
    (void)file;
    struct kernel_page_region found[BATCH];
    struct kernel_scan_arg arg = {
        .size = sizeof arg,
        .flags = KERNEL_SCAN_WP_MATCHING | KERNEL_SCAN_CHECK_WPASYNC,
        .start = map->addr,
        .end = map->addr + map->len,
        .vec = (uintptr_t)found,
        .vec_len = BATCH,
        .category_mask = KERNEL_PAGE_IS_WRITTEN,
        .return_mask = KERNEL_PAGE_IS_WRITTEN,
    };
    while (arg.start < arg.end) {
        int n = ioctl(map->pagemap, KERNEL_PAGEMAP_SCAN, &arg);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        for (int i = 0; i < n; i++)
            extents_add(out, map->offset + (found[i].start - map->addr), map->offset + (found[i].end - map->addr));
        if (arg.walk_end <= arg.start)
            return -EIO;
        arg.start = arg.walk_end;
    }
    return alive(map);
}

static int uffd_arm(const struct track_map *map)
{
    return map->pagemap < 0 ? -ENOENT : alive(map);
}

const struct track_ops track_uffd = {.name = "uffd", .arm = uffd_arm, .collect = uffd_collect};
