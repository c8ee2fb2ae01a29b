/* What was published of a region: the XXH3-128 of each 4 KiB page, the last one taken as filled up with zeros, and a
 * tree over them, 16 children a node, each node the XXH3-128 of its children's 16 * 16 bytes.
 *
 * Two values are not hashes. ZEROS, 0, stands for a page of zeros and for a node over nothing else, so that the tables
 * of an empty region are untouched memory: 17 bytes for each page that ever held data, 0.4 % of it. UNKNOWN is a page
 * of which nothing is known, and a node that has to be computed anew; it equals no page's hash. Where XXH3 gives one of
 * the two, the upper half counts as 1. These are the values of the wire, too (wire/frame.md): both ends compute every
 * page by page_hash_of.
 *
 * Above an UNKNOWN page or node all nodes are UNKNOWN. Changing a page makes those above it so, up to the first that is
 * already; reading a node computes what is needed below it, and keeps it.
 *
 * Not locked: the capture that runs, or the comparison, owns a body's; store/tree.c has its own lock. */
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

#define HASH_BYTES 16u /* canonical: as on the wire */
#define HASH_FAN 16u
#define HASH_FAN_BITS 4u
#define HASH_LEVELS 11u /* above the pages: of the longest region there can be */

struct hashes {
    struct page_hash *at;
    uint64_t pages;                           /* room; pages beyond are zeros */
    struct block_hashes *blocks;              /* of as many pages; NULL: none kept */
    uint8_t *blocks_used;                     /* a bit for each BLOCKS_STEP of them that is memory */
    uint64_t blocks_bytes;                    /* of memory; read by other threads, atomically */
    bool bare;                                /* set before the first room: keeps no blocks */
    unsigned top;                             /* level of the one node over all the room; 0: no room yet */
    struct page_hash *inner[HASH_LEVELS + 1]; /* by level, from 1 */
    uint64_t inner_room[HASH_LEVELS + 1];
};

#define HASH_ZEROS ((struct page_hash){0, 0})
#define HASH_UNKNOWN ((struct page_hash){1, 0})

static inline bool page_hash_same(struct page_hash a, struct page_hash b)
{
    return a.lo == b.lo && a.hi == b.hi;
}

struct page_hash page_hash_of(const uint8_t *page);  /* of 4096 bytes */
void page_hash_put(uint8_t *to, struct page_hash v); /* HASH_BYTES */
struct page_hash page_hash_from(const uint8_t *from);

int hashes_room(struct hashes *h, uint64_t pages); /* makes it at least that long; -ENOMEM, and it is as it was */
struct page_hash hashes_get(const struct hashes *h, uint64_t page);
void hashes_set(struct hashes *h, uint64_t page, struct page_hash v); /* within the room */
/* Pages from the `page`th on are these now. Of those that differ, the blocks are forgotten. */
void hashes_take(struct hashes *h, uint64_t page, const uint8_t *data, size_t pages);
void hashes_clear(struct hashes *h, uint64_t from, uint64_t to); /* pages from .. to are zeros */
void hashes_doubt(struct hashes *h, uint64_t from, uint64_t to); /* pages from .. to, within the room, are UNKNOWN */
/* The region was cut to size bytes: zeros beyond, the page across it unknown. */
void hashes_cut(struct hashes *h, uint64_t size);
void hashes_free(struct hashes *h);

/* Node i of a level (0: pages) is over pages i << 4 * level up to (i + 1) << 4 * level. UNKNOWN if one of them is. */
struct page_hash hashes_node(struct hashes *h, unsigned level, uint64_t i);
unsigned hashes_top(uint64_t pages);                   /* the lowest level with one node over so many pages */
uint64_t hashes_nodes(uint64_t pages, unsigned level); /* how many of a level there are over so many pages */
/* The first page from `page` on that is not zeros, or that is UNKNOWN; h->pages: none. Passes over whole nodes. */
uint64_t hashes_next(const struct hashes *h, uint64_t page);
uint64_t hashes_next_unknown(const struct hashes *h, uint64_t page);

/* Pages from .. to of the file are read, beyond its end as zeros. scratch: HASH_SCRATCH bytes. Negative errno. */
#define HASH_SCRATCH (256u << 10) /* what was just read is hashed out of the second-level cache */
int hashes_read(struct hashes *h, int fd, uint64_t from, uint64_t to, uint8_t *scratch);

/* Blocks of pages that were sent: a table of 128 bytes a page, a thirty-second of the region at most, which becomes memory
 * by 4 KiB as pages are sent. All tables together are held to hashes_blocks_most: one that would go beyond is let go and
 * starts anew; where that does not make room, nothing is kept. Pages without known blocks go whole. */
#define BLOCKS_STEP (4096u / sizeof(struct block_hashes))
/* Takes the page's blocks as published. Returns the mask of those that differ from before; 0 when nothing was known of
 * them. */
uint32_t hashes_blocks(struct hashes *h, uint64_t page, const uint8_t *data);
void hashes_forget_blocks(struct hashes *h, uint64_t page);
void hashes_forget_all_blocks(struct hashes *h);
uint64_t hashes_blocks_bytes(const struct hashes *h); /* any thread */
extern uint64_t hashes_blocks_most;                   /* bytes; set before the first use */
uint64_t hashes_blocks_all(void);                     /* bytes of all tables; any thread */

#endif
