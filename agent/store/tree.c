/* Hash trees of regions (track/hashes.h), in memory, for those that were asked about: 17 bytes for each page with data.
 *
 * A region's tree is made by the first HASH: every page that may have data counts as unknown, and is read and hashed
 * when it is asked about. From then on applying keeps it: what is written becomes unknown, what is zeroed or cut off
 * zeros, both under the region's write lock, before the bytes change. It goes with the region, and as a whole when a
 * delta did not come out right, for then the file is not what the epochs made of it. It is not saved.
 *
 * A pin answers as of its epoch. As long as no later epoch touched the region (`behind`) the region's tree is the
 * pin's. After that the pin has a tree of its own: a copy of the region's in which the pages saved aside are unknown,
 * and are read from the side file; what changes later changes nothing in it.
 *
 * Locks: the region's, for reading, keeps the file, the side file and the shape of trees as they are; a tree's mutex is
 * for its values, among the jobs that read the same region. Pages are read and hashed outside of the mutex. Trees are
 * made and dropped under the write lock.
 *
 * A request is worked on in slices, so that no thread is kept from epochs for long. If we die nothing is lost. */
#include "agent/store/inside.h"

#include "agent/track/hashes.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define SLICE_PAGES ((16u << 20) / FRAME_PAGE)
#define STEP_PAGES (HASH_SCRATCH / FRAME_PAGE)

struct tree {
    pthread_mutex_t lock;
    struct hashes hashes;
};

static struct tree *tree_new(uint64_t pages)
{
    struct tree *t = calloc(1, sizeof *t);
    if (!t)
        return NULL;
    t->hashes.bare = true;
    if (hashes_room(&t->hashes, pages ? pages : 1)) {
        free(t);
        return NULL;
    }
    pthread_mutex_init(&t->lock, NULL);
    return t;
}

void tree_free(struct tree *t)
{
    if (!t)
        return;
    hashes_free(&t->hashes);
    pthread_mutex_destroy(&t->lock);
    free(t);
}

void tree_forget(struct region *r)
{
    tree_free(r->tree);
    r->tree = NULL;
}

static uint64_t pages_of(uint64_t bytes)
{
    return bytes / FRAME_PAGE + (bytes % FRAME_PAGE != 0);
}

static void doubt(struct tree *t, uint64_t from, uint64_t to)
{
    for (uint64_t page = from / FRAME_PAGE; page < pages_of(to); page++)
        hashes_set(&t->hashes, page, HASH_UNKNOWN);
}

void tree_wrote(struct region *r, uint64_t from, uint64_t to)
{
    if (r->tree)
        doubt(r->tree, from, to);
}

void tree_zeroed(struct region *r, uint64_t from, uint64_t to)
{
    uint64_t first = pages_of(from), last = to / FRAME_PAGE;
    if (!r->tree)
        return;
    if (first >= last) {
        doubt(r->tree, from, to);
        return;
    }
    doubt(r->tree, from, first * FRAME_PAGE);
    hashes_clear(&r->tree->hashes, first, last);
    doubt(r->tree, last * FRAME_PAGE, to);
}

void tree_sized(struct region *r, uint64_t size)
{
    if (!r->tree)
        return;
    hashes_cut(&r->tree->hashes, size); /* beyond the end all was zeros already, when it grows */
    if (hashes_room(&r->tree->hashes, pages_of(size)))
        tree_forget(r);
}

/* ---- making them, under the write lock ---- */

/* Every page with data is unknown; holes are zeros. */
static int region_tree(struct region *r, int fd)
{
    struct stat st;
    if (fstat(fd, &st) < 0)
        return -errno;
    uint64_t size = (uint64_t)st.st_size;
    struct tree *t = tree_new(pages_of(size));
    if (!t)
        return -ENOBUFS;
    for (uint64_t at = 0; at < size;) {
        off_t data = lseek(fd, (off_t)at, SEEK_DATA);
        if (data < 0 && errno == ENXIO)
            break;
        off_t hole = data < 0 ? -1 : lseek(fd, data, SEEK_HOLE);
        uint64_t from = data < 0 ? at : (uint64_t)data, to = hole < 0 ? size : (uint64_t)hole;
        doubt(t, from, to);
        at = to;
    }
    r->tree = t;
    return 0;
}

static int pin_tree(struct store_pin *pin)
{
    uint64_t pages = pages_of(pin->size);
    struct tree *t = tree_new(pages);
    if (!t)
        return -ENOBUFS;
    const struct hashes *from = &pin->r->tree->hashes;
    for (uint64_t page = hashes_next(from, 0); page < pages && page < from->pages; page = hashes_next(from, page + 1))
        hashes_set(&t->hashes, page, from->at[page]);
    for (uint64_t page = 0; pin->saved && page < pages; page++) {
        if (page % 8 == 0 && !pin->saved[page / 8])
            page += 7;
        else if (pin_saved(pin, page))
            hashes_set(&t->hashes, page, HASH_UNKNOWN);
    }
    if (pin->size % FRAME_PAGE) /* it may go on now where it ended then */
        hashes_set(&t->hashes, pages - 1, HASH_UNKNOWN);
    pin->tree = t;
    return 0;
}

static int trees_make(struct store_pin *pin)
{
    struct region *r = pin->r;
    pthread_rwlock_wrlock(&r->lock);
    int fd = region_open(pin->s, r, false);
    int err = fd < 0 ? fd : pin->lost ? -ENOBUFS : 0;
    if (!err && !r->tree && !pin->tree)
        err = region_tree(r, fd);
    if (!err && pin->behind && !pin->tree)
        err = pin_tree(pin);
    pthread_rwlock_unlock(&r->lock);
    return err;
}

/* The tree that is the pin's now, the region being locked for reading and its file open: a checkpoint closes that of a
 * region at rest, and leaves its tree. */
static int trees_lock(struct store_pin *pin, struct tree **out)
{
    for (;;) {
        pthread_rwlock_rdlock(&pin->r->lock);
        *out = pin->tree ? pin->tree : pin->behind ? NULL : pin->r->tree;
        if (pin->lost || (*out && pin->r->fd >= 0))
            break;
        pthread_rwlock_unlock(&pin->r->lock);
        int err = trees_make(pin);
        if (err)
            return err;
    }
    if (!pin->lost)
        return 0;
    pthread_rwlock_unlock(&pin->r->lock);
    return -ENOBUFS;
}

/* ---- reading ---- */

/* From q->at on, as far as the tree is right; then up to `max` pages that have to be read. */
static uint64_t next_run(struct tree *t, struct tree_read *q, uint64_t max)
{
    uint64_t end = q->at;
    pthread_mutex_lock(&t->lock);
    if (!q->fresh)
        end = q->at = hashes_next_unknown(&t->hashes, q->at);
    while (end < q->to && end - q->at < max && (q->fresh || page_hash_same(hashes_get(&t->hashes, end), HASH_UNKNOWN)))
        end++;
    if (q->at > q->to)
        q->at = end = q->to;
    pthread_mutex_unlock(&t->lock);
    return end;
}

static int read_step(struct tree_read *q, uint8_t *scratch, uint64_t *budget)
{
    struct tree *t;
    struct store_pin *pin = q->pin;
    int err = trees_lock(pin, &t);
    if (err)
        return err;
    uint64_t end = next_run(t, q, *budget < STEP_PAGES ? *budget : STEP_PAGES);
    uint64_t offset = q->at * FRAME_PAGE, len = (end - q->at) * FRAME_PAGE;
    if (q->at < end) {
        uint64_t have = q->size - offset < len ? q->size - offset : len;
        err = pin_read(pin, scratch, (size_t)have, offset);
        memset(scratch + have, 0, (size_t)(len - have));
    }
    struct page_hash v[STEP_PAGES];
    for (uint64_t i = 0; !err && i < end - q->at; i++)
        v[i] = page_hash_of(scratch + i * FRAME_PAGE);
    pthread_mutex_lock(&t->lock);
    if (!err && pin->live && hashes_room(&t->hashes, end)) /* it may have been cut, and its tree made anew */
        err = -ENOBUFS;
    for (uint64_t i = 0; !err && i < end - q->at; i++)
        hashes_set(&t->hashes, q->at + i, v[i]);
    pthread_mutex_unlock(&t->lock);
    pthread_rwlock_unlock(&pin->r->lock);
    *budget -= end - q->at;
    q->at = end;
    return err;
}

/* All pages below were read: the nodes follow. False: some of them were changed since, and have to be read again. */
static int nodes_put(struct tree_read *q, uint8_t *to, bool *whole)
{
    struct tree *t;
    int err = trees_lock(q->pin, &t);
    if (err)
        return err;
    *whole = true;
    pthread_mutex_lock(&t->lock);
    for (uint32_t i = 0; i < q->count && *whole; i++) {
        struct page_hash v = hashes_node(&t->hashes, q->level, q->first + i);
        *whole = !page_hash_same(v, HASH_UNKNOWN);
        page_hash_put(to + (size_t)i * HASH_BYTES, v);
    }
    pthread_mutex_unlock(&t->lock);
    pthread_rwlock_unlock(&q->pin->r->lock);
    return 0;
}

void tree_read_init(struct tree_read *q, struct store_pin *pin, unsigned level, uint64_t first, uint32_t count,
                    bool fresh)
{
    unsigned shift = level * HASH_FAN_BITS;
    uint64_t size = pin->live ? pin->r->durable.size : pin->size;
    uint64_t pages = pages_of(size), nodes = hashes_nodes(pages, level);
    *q = (struct tree_read){.pin = pin, .size = size, .level = level, .first = first, .fresh = fresh};
    if (first >= nodes)
        return;
    q->count = nodes - first < count ? (uint32_t)(nodes - first) : count;
    q->at = q->from = first << shift;
    q->to = first + q->count == nodes ? pages : (first + q->count) << shift;
}

int tree_read_slice(struct tree_read *q, uint8_t *to, bool *done)
{
    uint64_t budget = SLICE_PAGES;
    uint8_t *scratch = malloc(HASH_SCRATCH);
    int err = scratch ? 0 : -ENOMEM;
    *done = !q->count;
    while (!err && budget && q->at < q->to)
        err = read_step(q, scratch, &budget);
    if (!err && q->count && q->at >= q->to) {
        err = nodes_put(q, to, done);
        q->fresh = false;
        q->at = q->from;
    }
    free(scratch);
    return err;
}
