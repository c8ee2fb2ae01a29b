#include "agent/track/hashes.h"
#include "agent/base/xxh3.h"
#include "agent/track/extents.h"

#include <errno.h>
#include <string.h>
#include <sys/mman.h>

struct page_hash page_hash_of(const uint8_t *page)
{
    /* Zeros are told apart by looking: cheap, since almost every page differs in its first bytes. */
    if (!page[0] && !memcmp(page, page + 1, PAGE - 1))
        return (struct page_hash){0, 0};
    XXH128_hash_t h = XXH3_128bits(page, PAGE);
    struct page_hash v = {h.low64, h.high64};
    if (!v.hi && v.lo <= 1)
        v.hi = 1; /* the two reserved values */
    return v;
}

static void *table(void *old, size_t had, size_t want)
{
    void *at = old ? mremap(old, had, want, MREMAP_MAYMOVE)
                   : mmap(NULL, want, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return at == MAP_FAILED ? NULL : at;
}

int hashes_room(struct hashes *h, uint64_t pages)
{
    if (pages <= h->pages)
        return 0;
    if (pages > (uint64_t)1 << 44)
        return -ENOMEM;
    uint64_t want = (pages + 255) & ~255ULL; /* whole pages of entries */
    if (want < h->pages * 2)
        want = h->pages * 2;
    void *at = table(h->at, h->pages * sizeof *h->at, want * sizeof *h->at);
    if (!at)
        return -ENOMEM;
    h->at = at;
    if (h->blocks || !h->pages) {
        void *blocks = table(h->blocks, h->pages * sizeof *h->blocks, want * sizeof *h->blocks);
        if (!blocks && h->blocks)
            munmap(h->blocks, h->pages * sizeof *h->blocks);
        h->blocks = blocks;
    }
    h->pages = want;
    return 0;
}

uint32_t hashes_blocks(struct hashes *h, uint64_t page, const uint8_t *data)
{
    if (!h->blocks || page >= h->pages)
        return 0;
    uint32_t *of = h->blocks[page].of, known = 0, mask = 0;
    /* The table's first touch is a write: reading first would map the page of zeros, to be taken back at once. */
    of[0] = __atomic_exchange_n(&of[0], 0, __ATOMIC_RELAXED);
    for (unsigned i = 0; i < BLOCKS_A_PAGE; i++) {
        uint32_t now = (uint32_t)XXH3_64bits(data + i * BLOCK_BYTES, BLOCK_BYTES);
        known |= of[i];
        mask |= (uint32_t)(of[i] != now) << i;
        of[i] = now;
    }
    return known ? mask : 0;
}

void hashes_forget_blocks(struct hashes *h, uint64_t page)
{
    if (h->blocks && page < h->pages)
        memset(&h->blocks[page], 0, sizeof *h->blocks);
}

struct page_hash hashes_get(const struct hashes *h, uint64_t page)
{
    return page < h->pages ? h->at[page] : (struct page_hash){0, 0};
}

void hashes_set(struct hashes *h, uint64_t page, struct page_hash v)
{
    if (page < h->pages)
        h->at[page] = v;
}

void hashes_cut(struct hashes *h, uint64_t size)
{
    uint64_t page = size / PAGE;
    if (page >= h->pages)
        return;
    if (size % PAGE) {
        hashes_forget_blocks(h, page);
        h->at[page++] = HASH_UNKNOWN;
    }
    uint64_t keep = (page + 255) & ~255ULL; /* up to a whole page of entries, then let go */
    if (keep > h->pages)
        keep = h->pages;
    memset(h->at + page, 0, (keep - page) * sizeof *h->at);
    if (keep < h->pages)
        madvise(h->at + keep, (h->pages - keep) * sizeof *h->at, MADV_DONTNEED);
}

void hashes_free(struct hashes *h)
{
    if (h->at)
        munmap(h->at, h->pages * sizeof *h->at);
    if (h->blocks)
        munmap(h->blocks, h->pages * sizeof *h->blocks);
    *h = (struct hashes){0};
}
