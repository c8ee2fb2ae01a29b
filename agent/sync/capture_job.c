/* What a capture does on a thread of the pool: look at page tables, marks and files (scan), then read and compare
 * a slice of what may have changed. It touches the capture, its parts and what they hold, and of the bodies only
 * `published` and `fd` (capture.h). */
#include "agent/sync/encode.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define SLICE_READ (4u << 20) /* bytes that one job looks at, and */
#define SLICE_OUT 16u         /* frames it makes, more or less: some 1 MiB, which is sent while it is in the cache */
#define SCRATCH (128u << 10)  /* likewise */
#define RACY_NS 50000000      /* a file's time stamps tell a change only when older than the clock's tick by far */

static uint64_t now_us(void)
{
    return uv_hrtime() / 1000;
}

/* ---- scan ---- */

static void take_marks(struct marks *m, struct part *p)
{
    uint64_t low = __atomic_exchange_n(&m->min_size, UINT64_MAX, __ATOMIC_SEQ_CST);
    if (low < p->min_size)
        p->min_size = low;
    if (__atomic_exchange_n(&m->all, 0, __ATOMIC_SEQ_CST))
        p->everything = true;
    if (__atomic_exchange_n(&m->beyond, 0, __ATOMIC_SEQ_CST))
        extents_add(&p->found, (uint64_t)MARKS_WORDS * 64 * MARKS_PAGE, UINT64_MAX / 2);
    for (uint64_t s = 0; s < MARKS_SUMMARY; s++) {
        if (!__atomic_load_n(&m->summary[s], __ATOMIC_RELAXED))
            continue;
        uint64_t words = __atomic_exchange_n(&m->summary[s], 0, __ATOMIC_SEQ_CST);
        for (; words; words &= words - 1) {
            uint64_t word = s * 64 + (uint64_t)__builtin_ctzll(words);
            uint64_t bits = __atomic_exchange_n(&m->pages[word], 0, __ATOMIC_SEQ_CST);
            for (; bits; bits &= bits - 1) {
                uint64_t page = word * 64 + (uint64_t)__builtin_ctzll(bits);
                extents_add(&p->found, page * MARKS_PAGE, (page + 1) * MARKS_PAGE);
            }
        }
    }
}

void marks_collect(struct marks *m, struct body *b)
{
    struct part p = {.body = b, .min_size = b->min_size};
    take_marks(m, &p);
    b->min_size = p.min_size;
    b->unknown |= p.everything;
    extents_move(&b->dirty, &p.found);
    extents_free(&p.found);
}

static int64_t ns_of(struct timespec t)
{
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* A file found by its content need not be read while its time stamps stand and are old enough to be believed. */
static bool stamps_stand(const struct body *b, const struct part *p)
{
    return p->mtime == b->stat_mtime && p->ctime == b->stat_ctime && p->size == b->size &&
           b->stat_seen - b->stat_ctime > RACY_NS;
}

/* A mirror's holes before that were not fetched. */
static uint64_t holes_from(const struct body *b)
{
    return b->mirror ? __atomic_load_n(&b->base, __ATOMIC_SEQ_CST) : 0;
}

static void scan_part(struct part *p, uint64_t began)
{
    struct stat st;
    struct timespec t;
    for (size_t i = 0; i < p->nmarks; i++)
        take_marks(p->marks[i], p);
    clock_gettime(CLOCK_REALTIME, &t);
    p->seen = ns_of(t);
    if (fstat(p->body->fd, &st) < 0) {
        p->err = -errno;
        return;
    }
    p->size = (uint64_t)st.st_size;
    p->mtime = ns_of(st.st_mtim);
    p->ctime = ns_of(st.st_ctim);
    struct track_file file = {.fd = p->body->fd,
                              .size = p->size,
                              .published = &p->body->published,
                              .holes_from = holes_from(p->body),
                              .began = began,
                              .clock = p->glance,
                              .events = p->watch && watch_take(p->watch)};
    for (size_t i = 0; i < p->nmaps && !p->err; i++)
        if ((p->err = track_collect(&p->maps[i], &file, &p->found)))
            p->failed = p->owners[i];
    if (file.events || (p->by_hash && !stamps_stand(p->body, p)))
        p->everything = true;
    if (p->everything && !p->err)
        p->err = track_everything(&file, &p->found);
}

void capture_scan(void *arg)
{
    struct capture *c = arg;
    uint64_t began = uv_hrtime(), from = began / 1000;
    for (size_t i = 0; i < c->nparts; i++)
        scan_part(&c->parts[i], began);
    c->scan_us += now_us() - from;
}

/* ---- read ---- */

/* Everything at hand is compared with what was published; what differs goes out and counts as published. */
/* A page of zeros that a mirror has may be a hole. One that is none may have been one when it was read. */
static bool absent(struct capture *c, const struct part *p, uint64_t offset, uint8_t *page, struct page_hash *h)
{
    const struct body *b = p->body;
    size_t len = p->size - offset < PAGE ? (size_t)(p->size - offset) : PAGE;
    if (!page_hash_same(*h, HASH_ZEROS) || offset >= holes_from(b))
        return false;
    if (lseek(b->fd, (off_t)offset, SEEK_DATA) != (off_t)offset)
        return true;
    if (pread(b->fd, page, len, (off_t)offset) < 0)
        c->err = -errno;
    *h = page_hash_of(page);
    return false;
}

/* From `at` on nothing is there before this; no further than `end`. */
static uint64_t past_hole(const struct body *b, uint64_t at, uint64_t end)
{
    uint64_t from = holes_from(b), stop = (end < from ? end : from) / PAGE * PAGE;
    if (at >= stop)
        return at;
    off_t data = lseek(b->fd, (off_t)at, SEEK_DATA);
    if (data < 0)
        return errno == ENXIO ? stop : at;
    return (uint64_t)data < stop ? (uint64_t)data : stop;
}

static void read_run(struct capture *c, struct encoder *b, uint8_t *scratch, uint64_t offset, size_t len)
{
    struct part *p = &c->parts[c->part];
    size_t have = 0;
    size_t want = p->size - offset < len ? (size_t)(p->size - offset) : len;
    while (have < want) {
        ssize_t n = pread(p->body->fd, scratch + have, want - have, (off_t)(offset + have));
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0) {
            c->err = -errno;
            return;
        }
        if (!n)
            break; /* cut while we read: the next capture is told */
        have += (size_t)n;
    }
    memset(scratch + have, 0, len - have);
    for (size_t at = 0; at < len && !c->err; at += PAGE) {
        uint64_t page = (offset + at) / PAGE;
        struct page_hash h = page_hash_of(scratch + at);
        if (absent(c, p, offset + at, scratch + at, &h) || page_hash_same(h, hashes_get(&p->body->published, page)))
            continue;
        encode_page(b, offset + at, scratch + at, h);
    }
}

/* What the epoch before left can be named as a source, if there was one, and this one does not cut it. */
static bool may_move(const struct capture *c, const struct part *p)
{
    uint64_t look = extents_bytes(&p->todo) / PAGE;
    return c->pass == 1 && !p->plain && p->body->epoch && p->cut == UINT64_MAX && look >= MOVES_LEAST &&
           look >= p->size / PAGE / MOVES_SHARE;
}

static void prepare_part(struct capture *c, struct part *p)
{
    p->prepared = true;
    if (hashes_room(&p->body->published, (p->size + PAGE - 1) / PAGE))
        c->err = -ENOMEM;
    if (p->cut < p->from_size) {
        hashes_cut(&p->body->published, p->cut);
        extents_add(&p->todo, p->cut, p->cut + 1);
    }
    extents_settle(&p->todo, p->size);
    if (p->todo.lost)
        c->err = -ENOMEM;
    p->movable = may_move(c, p);
    p->at = p->todo.count ? p->todo.at[0].start : 0;
}

static void part_on(struct part *p, uint64_t at)
{
    p->at = at;
    if (p->at >= p->todo.at[p->extent].end && ++p->extent < p->todo.count)
        p->at = p->todo.at[p->extent].start;
}

void capture_read(void *arg)
{
    struct capture *c = arg;
    uint64_t from = now_us();
    uint8_t *scratch = malloc(SCRATCH);
    struct encoder *b = encoder_new(c);
    size_t budget = SLICE_READ;
    if (!scratch || !b)
        c->err = -ENOMEM;
    while (!c->err && budget && c->part < c->nparts && c->nout < SLICE_OUT) {
        struct part *p = &c->parts[c->part];
        if (!p->prepared)
            prepare_part(c, p);
        encode_part(b, p);
        while (!c->err && budget && p->extent < p->todo.count && c->nout < SLICE_OUT) {
            uint64_t end = p->todo.at[p->extent].end, data = past_hole(p->body, p->at, end);
            if (data > p->at) {
                __atomic_store_n(&p->looked, p->looked + (data - p->at), __ATOMIC_RELAXED);
                part_on(p, data);
                continue;
            }
            size_t len = end - p->at < SCRATCH ? (size_t)(end - p->at) : SCRATCH;
            if (len > budget)
                len = budget;
            read_run(c, b, scratch, p->at, len);
            budget -= len;
            __atomic_store_n(&p->looked, p->looked + len, __ATOMIC_RELAXED);
            part_on(p, p->at + len);
        }
        if (!c->err)
            encode_flush(b);
        if (p->extent >= p->todo.count)
            c->part++;
    }
    free(scratch);
    encoder_free(b);
    c->read_us += now_us() - from;
}
