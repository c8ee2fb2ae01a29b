/* The table of mapped ranges of tracked files: sorted, never overlapping, in memory that the caller provides. Pure: no
 * allocation, no system call, no lock. */
#ifndef SHIM_RANGES_H
#define SHIM_RANGES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum range_state {
    RANGE_IDLE,  /* mapped without PROT_WRITE so far: nobody was told */
    RANGE_UFFD,  /* registered, armed and announced */
    RANGE_SOFT,  /* announced, found by soft-dirty bits */
    RANGE_HASHED /* announced, found by hashing */
};

struct range {
    uint64_t start, end; /* addresses, half open */
    uint64_t offset;     /* of start in the file */
    uint32_t region;
    uint8_t state; /* enum range_state */
    bool dontfork; /* MADV_DONTFORK: a child does not have it */
};

struct ranges {
    struct range *at;
    size_t count, cap;
};

/* The first range that ends after addr: index, count when there is none. */
size_t ranges_first(const struct ranges *t, uint64_t addr);
/* The first range that overlaps [start, end), or NULL. */
struct range *ranges_find(const struct ranges *t, uint64_t start, uint64_t end);
/* Makes start and end boundaries: no range lies across them afterwards. Needs room for two more ranges. */
void ranges_split(struct ranges *t, uint64_t start, uint64_t end);
/* Adds a range where none is, joining it with neighbours that continue it. Needs room for one more. */
void ranges_insert(struct ranges *t, const struct range *r);
/* Removes [start, end), splitting what lies across. Needs room for two more. */
void ranges_cut(struct ranges *t, uint64_t start, uint64_t end);
/* How many ranges belong to the region. */
size_t ranges_of(const struct ranges *t, uint32_t region);

#endif
