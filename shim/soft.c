/* Soft-dirty bits, for kernels whose userfaultfd cannot protect a file's pages: whether this kernel keeps them. The
 * agent does the rest (agent/track/softdirty.c). */
#include "shim/shim.h"

#include <sys/mman.h>

#define BIT (1ULL << 55)

static bool tried;
static char reason[128];

static bool bit(int pagemap, const volatile char *at)
{
    uint64_t entry = 0;
    long n = syscall(SYS_pread64, pagemap, &entry, sizeof entry, (uint64_t)(uintptr_t)at / shim_page * sizeof entry);
    return n == sizeof entry && (entry & BIT);
}

/* Kernels without them take what is written to clear_refs and say nothing. With them every new page has its bit at
 * first; where it has not, nothing is cleared for the question's sake. */
static bool round_trip(int pagemap, int clear_refs, volatile char *at)
{
    *at = 1;
    if (!bit(pagemap, at) || syscall(SYS_write, clear_refs, "4", 1) != 1 || bit(pagemap, at))
        return false;
    *at = 2;
    return bit(pagemap, at);
}

static void try_once(void)
{
    tried = true;
    int pagemap = raw_openat(AT_FDCWD, "/proc/self/pagemap", O_RDONLY | O_CLOEXEC, 0);
    int clear_refs = raw_openat(AT_FDCWD, "/proc/self/clear_refs", O_WRONLY | O_CLOEXEC, 0);
    volatile char *at = raw_memory(shim_page);
    if (pagemap < 0 || clear_refs < 0)
        say_format(reason, sizeof reason, "soft-dirty bits cannot be had from /proc (%e)",
                   pagemap < 0 ? -pagemap : -clear_refs);
    else if (!at || !round_trip(pagemap, clear_refs, at))
        say_format(reason, sizeof reason, "this kernel has no soft-dirty bits");
    if (at)
        raw_munmap((void *)at, shim_page);
    if (pagemap >= 0)
        raw_close(pagemap);
    if (clear_refs >= 0)
        raw_close(clear_refs);
}

int arm_soft(void)
{
    if (!tried)
        try_once();
    return *reason ? -ENOTSUP : 0;
}

const char *arm_soft_reason(void)
{
    return reason;
}
