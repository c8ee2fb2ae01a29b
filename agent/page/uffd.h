/* userfaultfd as the pager uses it, and the one place where its errors are understood.
 *
 * The agent fills a view's memfd by UFFDIO_COPY and UFFDIO_ZEROPAGE into a mapping of its own, which its own descriptor
 * watches: a page is written before it is put into the memfd (nobody can see half of it), one that is there is left
 * alone (EEXIST), and neighbours are never brought up with it, as pwrite would do where the memfd is given huge pages.
 * Threads that wait in a fault on another mapping of the memfd, of whatever process, shared or private, find the page
 * when their own process's descriptor is told UFFDIO_WAKE. Found so on Linux 6.18: a fault never returned part of a
 * page in 800 rounds of multi-page copies against waiting and racing readers; WAKE takes ranges larger than what is
 * registered; a private mapping's fault copies from the memfd's page; registering a shared mapping of a descriptor
 * opened for reading only is refused (EPERM), so that the memfd travels as it was made; POISON covers whatever the page
 * table lacks, the page being in the memfd or not, and stops at pages that it has with EAGAIN (part done) or EEXIST; a
 * child that got the mapping by fork is not registered, and MADV_DONTFORK gives it SIGSEGV instead. */
#ifndef PAGE_UFFD_H
#define PAGE_UFFD_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* The agent's own descriptor, opened at the first call; negative errno when there can be none. It takes only faults of
 * user mode, which needs no privilege: nothing faults in the agent's mappings. */
int page_uffd(void);
/* Watches a mapping for missing pages. 0 or a negative errno. */
int page_uffd_watch(int uffd, void *at, size_t len);

/* All of these take whole pages and go on over pages that are there already. 0; -ENOENT when the mapping is gone or
 * changed, -ESRCH when its process is, -EAGAIN when its address space goes on changing, -ENOMEM, -EOPNOTSUPP when the
 * kernel has no such call. */
int page_copy(int uffd, void *to, const void *from, size_t len);
int page_zero(int uffd, void *to, size_t len);
int page_poison(int uffd, uint64_t addr, uint64_t len);
int page_wake(int uffd, uint64_t addr, uint64_t len);

/* The addresses of faults that wait to be read, up to `cap`. How many; -EAGAIN when there is none, another negative
 * errno when there will be none any more. */
int page_faults(int uffd, uint64_t *addr, size_t cap);

#endif
