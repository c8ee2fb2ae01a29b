#include "agent/track/hashes.h"
#include "agent/base/xxh3.h"
#include "agent/track/extents.h"
#include "wire/bytes.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define LET_GO 4096u /* entries: shorter runs are zeroed, not given back */

static struct page_hash valued(XXH128_hash_t h)
{
    struct page_hash v = {h.low64, h.high64};
    if (!v.hi && v.lo <= 1)
        v.hi = 1; /* the two reserved values */
    return v;
}

struct page_hash page_hash_of(const uint8_t *page)
{
    /* Zeros are told apart by looking: cheap, since almost every page differs in its first bytes. */
    if (bytes_zero(page, PAGE))
        return HASH_ZEROS;
    return valued(XXH3_128bits(page, PAGE));
}

void page_hash_put(uint8_t *to, struct page_hash v)
{
    XXH128_canonical_t c;
    XXH128_canonicalFromHash(&c, (XXH128_hash_t){v.lo, v.hi});
    memcpy(to, &c, sizeof c);
}

struct page_hash page_hash_from(const uint8_t *from)
{
    XXH128_canonical_t c;
    memcpy(&c, from, sizeof c);
    XXH128_hash_t h = XXH128_hashFromCanonical(&c);
    return (struct page_hash){h.low64, h.high64};
}

/* ---- room ---- */

static void *table(void *old, size_t had, size_t want)
{
    void *at = old ? mremap(old, had, want, MREMAP_MAYMOVE)
                   : mmap(NULL, want, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return at == MAP_FAILED ? NULL : at;
}

unsigned hashes_top(uint64_t pages)
{
    unsigned level = 0;
    while (hashes_nodes(pages, level) > 1)
        level++;
    return level;
}

uint64_t hashes_nodes(uint64_t pages, unsigned level)
{
    unsigned shift = level * HASH_FAN_BITS;
    return (pages >> shift) + ((pages & ((1ULL << shift) - 1)) != 0);
}

/* Before the pages get theirs: tables that are too long do no harm. A new level has one node over all that was. */
static int inner_room(struct hashes *h, uint64_t pages, unsigned top)
{
    for (unsigned n = 1; n <= top; n++) {
        uint64_t want = hashes_nodes(pages, n);
        if (want <= h->inner_room[n])
            continue;
        struct page_hash *at = table(h->inner[n], h->inner_room[n] * sizeof **h->inner, want * sizeof **h->inner);
        if (!at)
            return -ENOMEM;
        if (!h->inner[n] && h->pages)
            at[0] = HASH_UNKNOWN;
        h->inner[n] = at;
        h->inner_room[n] = want;
    }
    return 0;
}

static void blocks_free(struct hashes *h)
{
    hashes_forget_all_blocks(h);
    if (h->blocks)
        munmap(h->blocks, h->pages * sizeof *h->blocks);
    if (h->blocks_used)
        munmap(h->blocks_used, h->pages / BLOCKS_STEP / 8);
    h->blocks = NULL;
    h->blocks_used = NULL;
}

/* Without memory there are none from now on. */
static void blocks_room(struct hashes *h, uint64_t pages)
{
    size_t had = h->pages / BLOCKS_STEP / 8, want = pages / BLOCKS_STEP / 8;
    uint8_t *used = table(h->blocks_used, had, want); /* untouched memory: a peer may name any size */
    if (used)
        h->blocks_used = used;
    void *blocks = used ? table(h->blocks, h->pages * sizeof *h->blocks, pages * sizeof *h->blocks) : NULL;
    if (blocks)
        h->blocks = blocks;
    else {
        if (used) { /* longer by now than blocks_free thinks */
            munmap(used, want);
            h->blocks_used = NULL;
        }
        blocks_free(h);
    }
}

int hashes_room(struct hashes *h, uint64_t pages)
{
    if (pages <= h->pages)
        return 0;
    if (pages > (uint64_t)1 << (HASH_LEVELS * HASH_FAN_BITS))
        return -ENOMEM;
    uint64_t want = (pages + 255) & ~255ULL; /* whole pages of entries */
    if (want < h->pages * 2)
        want = h->pages * 2;
    unsigned top = hashes_top(want);
    if (inner_room(h, want, top))
        return -ENOMEM;
    void *at = table(h->at, h->pages * sizeof *h->at, want * sizeof *h->at);
    if (!at)
        return -ENOMEM;
    h->at = at;
    if (h->blocks || (!h->pages && !h->bare))
        blocks_room(h, want);
    h->pages = want;
    h->top = top;
    return 0;
}

void hashes_free(struct hashes *h)
{
    if (h->at)
        munmap(h->at, h->pages * sizeof *h->at);
    blocks_free(h);
    for (unsigned n = 1; n <= HASH_LEVELS; n++)
        if (h->inner[n])
            munmap(h->inner[n], h->inner_room[n] * sizeof **h->inner);
    *h = (struct hashes){.bare = h->bare};
}

/* ---- pages ---- */

struct page_hash hashes_get(const struct hashes *h, uint64_t page)
{
    return page < h->pages ? h->at[page] : HASH_ZEROS;
}

static void changed(struct hashes *h, uint64_t page)
{
    for (unsigned n = 1; n <= h->top; n++) {
        struct page_hash *node = &h->inner[n][page >> n * HASH_FAN_BITS];
        if (page_hash_same(*node, HASH_UNKNOWN))
            return;
        *node = HASH_UNKNOWN;
    }
}

void hashes_set(struct hashes *h, uint64_t page, struct page_hash v)
{
    if (page >= h->pages || page_hash_same(h->at[page], v))
        return;
    h->at[page] = v;
    changed(h, page);
}

void hashes_take(struct hashes *h, uint64_t page, const uint8_t *data, size_t pages)
{
    for (size_t i = 0; i < pages; i++, page++) {
        struct page_hash v = page_hash_of(data + i * PAGE);
        if (page_hash_same(hashes_get(h, page), v))
            continue;
        hashes_forget_blocks(h, page);
        hashes_set(h, page, v);
    }
}

void hashes_doubt(struct hashes *h, uint64_t from, uint64_t to)
{
    for (; from < to; from++)
        hashes_set(h, from, HASH_UNKNOWN);
}

static void zero_entries(struct page_hash *at, uint64_t from, uint64_t to)
{
    uint64_t a_page = PAGE / sizeof *at, first = (from + a_page - 1) / a_page * a_page, last = to / a_page * a_page;
    if (from + LET_GO > to || madvise(at + first, (last - first) * sizeof *at, MADV_DONTNEED))
        first = last = to;
    memset(at + from, 0, (first - from) * sizeof *at);
    memset(at + last, 0, (to - last) * sizeof *at);
}

void hashes_clear(struct hashes *h, uint64_t from, uint64_t to)
{
    if (to > h->pages)
        to = h->pages;
    if (from >= to)
        return;
    zero_entries(h->at, from, to);
    for (unsigned n = 1; n <= h->top; n++) { /* nodes over nothing else; what is only partly in it is computed anew */
        uint64_t first = hashes_nodes(from, n), last = to >> n * HASH_FAN_BITS;
        if (to == h->pages)
            last = hashes_nodes(to, n);
        if (first < last)
            zero_entries(h->inner[n], first, last);
    }
    if (from)
        changed(h, from - 1);
    if (to < h->pages)
        changed(h, to);
}

void hashes_cut(struct hashes *h, uint64_t size)
{
    uint64_t page = size / PAGE;
    if (page >= h->pages)
        return;
    if (size % PAGE) {
        hashes_forget_blocks(h, page);
        hashes_set(h, page++, HASH_UNKNOWN);
    }
    hashes_clear(h, page, h->pages);
}

/* ---- tree ---- */

struct page_hash hashes_node(struct hashes *h, unsigned level, uint64_t i)
{
    uint8_t of[HASH_FAN * HASH_BYTES];
    bool zeros = true;
    if (!level)
        return hashes_get(h, i);
    bool kept = level <= h->top;
    if (kept ? i >= h->inner_room[level] : i > 0)
        return HASH_ZEROS;
    if (kept && !page_hash_same(h->inner[level][i], HASH_UNKNOWN))
        return h->inner[level][i];
    for (unsigned k = 0; k < HASH_FAN; k++) {
        struct page_hash child = hashes_node(h, level - 1, i * HASH_FAN + k);
        if (page_hash_same(child, HASH_UNKNOWN))
            return HASH_UNKNOWN;
        zeros &= page_hash_same(child, HASH_ZEROS);
        page_hash_put(of + k * HASH_BYTES, child);
    }
    struct page_hash v = zeros ? HASH_ZEROS : valued(XXH3_128bits(of, sizeof of));
    if (kept)
        h->inner[level][i] = v;
    return v;
}

/* From a page where a node begins, the end of the largest node that `skip` is true of; the page itself if of none. */
static uint64_t past_nodes(const struct hashes *h, uint64_t page, bool (*skip)(struct page_hash))
{
    uint64_t past = page;
    if (!skip(h->at[page]))
        return page;
    past++;
    for (unsigned n = 1; n <= h->top && !(page & ((1ULL << n * HASH_FAN_BITS) - 1)); n++) {
        if (!skip(h->inner[n][page >> n * HASH_FAN_BITS]))
            break;
        past = page + (1ULL << n * HASH_FAN_BITS);
    }
    return past;
}

static uint64_t next_not(const struct hashes *h, uint64_t page, bool (*skip)(struct page_hash))
{
    while (page < h->pages) {
        uint64_t past = past_nodes(h, page, skip);
        if (past == page)
            return page;
        page = past;
    }
    return h->pages;
}

static bool is_zeros(struct page_hash v)
{
    return page_hash_same(v, HASH_ZEROS);
}

static bool is_known(struct page_hash v)
{
    return !page_hash_same(v, HASH_UNKNOWN);
}

uint64_t hashes_next(const struct hashes *h, uint64_t page)
{
    return next_not(h, page, is_zeros);
}

uint64_t hashes_next_unknown(const struct hashes *h, uint64_t page)
{
    return next_not(h, page, is_known);
}

/* ---- files ---- */

/* At most HASH_SCRATCH bytes of pages. */
static int read_run(struct hashes *h, int fd, uint64_t from, uint64_t to, uint8_t *scratch)
{
    size_t len = (size_t)(to - from) * PAGE, have = 0;
    while (have < len) {
        ssize_t n = pread(fd, scratch + have, len - have, (off_t)(from * PAGE + have));
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        if (!n)
            break;
        have += (size_t)n;
    }
    memset(scratch + have, 0, len - have);
    hashes_take(h, from, scratch, len / PAGE);
    return 0;
}

static bool zeros(const struct hashes *h, uint64_t from, uint64_t to)
{
    while (from < to && !h->at[from].lo && !h->at[from].hi)
        from++;
    return from == to;
}

/* A hole is asked for only behind zeros, and its beginning never: tmpfs looks for the end of data page by page. */
int hashes_read(struct hashes *h, int fd, uint64_t from, uint64_t to, uint8_t *scratch)
{
    int rc = hashes_room(h, to);
    while (!rc && from < to) {
        uint64_t end = to - from < HASH_SCRATCH / PAGE ? to : from + HASH_SCRATCH / PAGE;
        rc = read_run(h, fd, from, end, scratch);
        bool skip = !rc && end < to && zeros(h, from, end);
        from = end;
        off_t data = skip ? lseek(fd, (off_t)(from * PAGE), SEEK_DATA) : 0;
        if (!skip || (data < 0 && errno != ENXIO))
            continue;
        end = data < 0 || (uint64_t)data / PAGE > to ? to : (uint64_t)data / PAGE;
        hashes_clear(h, from, end);
        from = end;
    }
    return rc;
}

/* ---- blocks ---- */

uint64_t hashes_blocks_most = 256u << 20;
static uint64_t all_bytes;

uint64_t hashes_blocks_all(void)
{
    return __atomic_load_n(&all_bytes, __ATOMIC_RELAXED);
}

uint64_t hashes_blocks_bytes(const struct hashes *h)
{
    return __atomic_load_n(&h->blocks_bytes, __ATOMIC_RELAXED);
}

static bool is_used(const struct hashes *h, uint64_t page)
{
    return h->blocks && page < h->pages && h->blocks_used[page / BLOCKS_STEP / 8] >> page / BLOCKS_STEP % 8 & 1;
}

/* Whether there is memory for the page's, and it is counted. Several threads may pass the limit by a step each. */
static bool claim(struct hashes *h, uint64_t page)
{
    const uint64_t step = BLOCKS_STEP * sizeof *h->blocks;
    if (is_used(h, page))
        return true;
    if (!h->blocks || page >= h->pages)
        return false;
    if (hashes_blocks_all() + step > hashes_blocks_most)
        hashes_forget_all_blocks(h);
    if (hashes_blocks_all() + step > hashes_blocks_most)
        return false;
    h->blocks_used[page / BLOCKS_STEP / 8] |= (uint8_t)(1u << page / BLOCKS_STEP % 8);
    __atomic_fetch_add(&h->blocks_bytes, step, __ATOMIC_RELAXED);
    __atomic_fetch_add(&all_bytes, step, __ATOMIC_RELAXED);
    return true;
}

uint32_t hashes_blocks(struct hashes *h, uint64_t page, const uint8_t *data)
{
    if (!claim(h, page))
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
    if (is_used(h, page))
        h->blocks[page] = (struct block_hashes){{0}};
}

void hashes_forget_all_blocks(struct hashes *h)
{
    if (!h->blocks_bytes)
        return;
    if (madvise(h->blocks, h->pages * sizeof *h->blocks, MADV_DONTNEED))
        memset(h->blocks, 0, h->pages * sizeof *h->blocks);
    if (madvise(h->blocks_used, h->pages / BLOCKS_STEP / 8, MADV_DONTNEED))
        memset(h->blocks_used, 0, h->pages / BLOCKS_STEP / 8);
    __atomic_fetch_sub(&all_bytes, h->blocks_bytes, __ATOMIC_RELAXED);
    __atomic_store_n(&h->blocks_bytes, 0, __ATOMIC_RELAXED);
}
