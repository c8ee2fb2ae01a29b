#include "agent/sync/moves.h"

#include <stdlib.h>
#include <string.h>

#define NONE UINT32_MAX

/* The hashes are copied: the table they come from changes as pages are sent. */
struct moves {
    uint64_t mask;
    uint32_t *slot; /* page numbers, by hash; open addressing */
    struct page_hash of[];
};

static void put(struct moves *m, uint32_t page)
{
    struct page_hash h = m->of[page];
    if ((!h.lo && !h.hi) || page_hash_same(h, HASH_UNKNOWN))
        return;
    uint64_t at = h.lo & m->mask;
    while (m->slot[at] != NONE) {
        if (page_hash_same(m->of[m->slot[at]], h))
            return; /* one is enough */
        at = (at + 1) & m->mask;
    }
    m->slot[at] = page;
}

struct moves *moves_new(const struct hashes *published, uint64_t pages, const struct extents * not )
{
    if (pages > published->pages)
        pages = published->pages;
    uint64_t slots = 64;
    while (slots < pages + pages / 2)
        slots *= 2;
    if (pages * sizeof(struct page_hash) + slots * sizeof(uint32_t) > MOVES_MEMORY)
        return NULL;
    struct moves *m = malloc(sizeof *m + pages * sizeof *m->of);
    uint32_t *slot = malloc(slots * sizeof *slot);
    if (!m || !slot) {
        free(m);
        free(slot);
        return NULL;
    }
    m->mask = slots - 1;
    m->slot = slot;
    memset(slot, 0xff, slots * sizeof *slot);
    memcpy(m->of, published->at, pages * sizeof *m->of);
    size_t next = 0;
    for (uint64_t page = 0; page < pages; page++) {
        uint64_t at = page * PAGE;
        while (next < not ->count && not ->at[next].end <= at)
            next++;
        if (next == not ->count || not ->at[next].start > at)
            put(m, (uint32_t)page);
    }
    return m;
}

bool moves_find(const struct moves *m, struct page_hash h, uint64_t *page)
{
    for (uint64_t at = h.lo & m->mask; m->slot[at] != NONE; at = (at + 1) & m->mask)
        if (page_hash_same(m->of[m->slot[at]], h)) {
            *page = m->slot[at];
            return true;
        }
    return false;
}

void moves_free(struct moves *m)
{
    if (m)
        free(m->slot);
    free(m);
}
