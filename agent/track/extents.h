/* Sets of byte ranges of a file, kept as a growing array: added in any order, put in order once before they are read.
 */
#ifndef TRACK_EXTENTS_H
#define TRACK_EXTENTS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define PAGE 4096u

struct extent {
    uint64_t start, end; /* half-open */
};

struct extents {
    struct extent *at;
    size_t count, cap;
    bool lost; /* memory ran out while adding: what is here is not all */
};

void extents_add(struct extents *e, uint64_t start, uint64_t end); /* an empty range is nothing */
/* Widens every range to whole pages, sorts, joins what touches, cuts at `size` rounded up to a page. */
void extents_settle(struct extents *e, uint64_t size);
uint64_t extents_bytes(const struct extents *e); /* of a settled set */
/* Puts all of `from` into `to`; `from` is empty after. */
void extents_move(struct extents *to, struct extents *from);
void extents_free(struct extents *e);

#endif
