/* What this kernel can do, found out by doing it: nothing here believes a version number or a feature bit alone.
 * Blocking, a few milliseconds each. */
#ifndef CLI_PROBE_H
#define CLI_PROBE_H

#include <stdbool.h>
#include <stddef.h>

enum probe_way { PROBE_DEVICE, PROBE_CALL, PROBE_CALL_USER, PROBE_WAYS }; /* ways of getting a userfaultfd */

/* A descriptor, or a negative errno. */
int probe_uffd(enum probe_way way);
/* The first that works. *how tells which, when not NULL. */
int probe_uffd_any(enum probe_way *how);
/* All features that the kernel's userfaultfd has, 0 when there is none. */
unsigned long long probe_features(void);
/* A file is made in dir, mapped shared, armed, stored to and scanned: 0 when exactly the page stored to was found, and
 * none the next time; else a negative errno with what failed in why. */
int probe_tracking(const char *dir, char *why, size_t cap);
/* A memfd is mapped twice, a page of it is put in through one mapping while a thread waits for it in the other: 0 when
 * that came through whole; else a negative errno with what failed in why. */
int probe_filling(char *why, size_t cap);
/* clear_refs and pagemap bit 55, round trip. */
bool probe_softdirty(void);

#endif
