/* What was published of a region: the XXH3-128 of each 4 KiB page, the last one taken as filled up with zeros.
 *
 * A page of zeros is the value 0, so the table of an empty region is untouched memory: 16 bytes for each page that ever
 * held data, 0.4 % of it. UNKNOWN stands for a page of which nothing is known; it equals no page's hash. Not locked:
 * the capture that runs owns it. */
#ifndef TRACK_HASHES_H
#define TRACK_HASHES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct page_hash {
    uint64_t lo, hi;
};

#define BLOCK_BYTES 128u
#define BLOCKS_A_PAGE 32u

/* All 0: not known. */
struct block_hashes {
    uint32_t of[BLOCKS_A_PAGE];
};

struct hashes {
    struct page_hash *at;
    uint64_t pages; /* room; pages beyond are zeros */
    struct block_hashes *blocks; /* of as many pages; NULL: none kept */
};

#define HASH_UNKNOWN ((struct page_hash){1, 0})

static inline bool page_hash_same(struct page_hash a, struct page_hash b)
{
    return a.lo == b.lo && a.hi == b.hi;
}

struct page_hash page_hash_of(const uint8_t *page); /* of 4096 bytes; 0 for zeros */
int hashes_room(struct hashes *h, uint64_t pages);  /* makes it at least that long; -ENOMEM */
struct page_hash hashes_get(const struct hashes *h, uint64_t page);
void hashes_set(struct hashes *h, uint64_t page, struct page_hash v); /* within the room */
/* Takes the page's blocks as published. Returns the mask of those that differ from before; 0 when nothing was known of them. */
uint32_t hashes_blocks(struct hashes *h, uint64_t page, const uint8_t *data);
void hashes_forget_blocks(struct hashes *h, uint64_t page);
void hashes_cut(struct hashes *h,
                uint64_t size); /* the region was cut to size bytes: zeros beyond, the page across it unknown */
void hashes_free(struct hashes *h);

#endif
