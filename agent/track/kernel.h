/* The kernel's interface as far as memsync uses it and Debian 12's headers (6.1) lack it: userfaultfd's newer feature
 * bits and PAGEMAP_SCAN. Values are the kernel's ABI (include/uapi/linux/userfaultfd.h and fs.h, Linux 6.7 and later);
 * they never change. Shared by shim and agent. */
#ifndef TRACK_KERNEL_H
#define TRACK_KERNEL_H

#include <linux/userfaultfd.h>
#include <stdint.h>
#include <sys/ioctl.h>

#define KERNEL_UFFD_WP (1ULL << 0)              /* UFFD_FEATURE_PAGEFAULT_FLAG_WP */
#define KERNEL_UFFD_WP_FILE (1ULL << 12)        /* UFFD_FEATURE_WP_HUGETLBFS_SHMEM */
#define KERNEL_UFFD_WP_UNPOPULATED (1ULL << 13) /* 6.4 */
#define KERNEL_UFFD_POISON (1ULL << 14)         /* 6.6 */
#define KERNEL_UFFD_WP_ASYNC (1ULL << 15)       /* 6.7 */

#ifndef UFFD_USER_MODE_ONLY
#define UFFD_USER_MODE_ONLY 1
#endif
#ifndef USERFAULTFD_IOC_NEW
#define USERFAULTFD_IOC_NEW _IO(0xAA, 0x00)
#endif

/* 6.6 */
struct kernel_uffdio_poison {
    struct uffdio_range range;
    uint64_t mode;
    int64_t updated;
};
#define KERNEL_UFFDIO_POISON _IOWR(UFFDIO, 0x08, struct kernel_uffdio_poison)

#define KERNEL_PAGE_IS_WRITTEN (1ULL << 1)
#define KERNEL_SCAN_WP_MATCHING (1ULL << 0)
#define KERNEL_SCAN_CHECK_WPASYNC (1ULL << 1)

struct kernel_page_region {
    uint64_t start, end, categories;
};

struct kernel_scan_arg {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
    uint64_t category_inverted, category_mask, category_anyof_mask, return_mask;
};

#define KERNEL_PAGEMAP_SCAN _IOWR('f', 16, struct kernel_scan_arg)

#endif
