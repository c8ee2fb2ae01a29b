/* The soft-dirty bits of one program's page table, for all of its mappings that are tracked so. Any thread. */
#ifndef TRACK_SOFTDIRTY_H
#define TRACK_SOFTDIRTY_H

#include <stdint.h>

struct softdirty;

/* Takes over clear_refs and stat, that program's files in /proc; pagemap stays the caller's, and open as long as this
 * is. NULL when there is no memory; both are closed then. */
struct softdirty *softdirty_new(int pagemap, int clear_refs, int stat);
void softdirty_free(struct softdirty *s); /* NULL is nothing */
/* [addr, addr + len) is looked at no more. */
void softdirty_forget(struct softdirty *s, uint64_t addr, uint64_t len);

#endif
