/* Hashes of a foreign server's bytes, computed here from what is read, and kept until it is written to. See disk.h.
 *
 * One job a request: it reads the pages under its nodes whose hashes are not known, a few pieces at a time, until none
 * is left; what is written meanwhile makes them unknown again, and is read again, TRIES times at most. */
#include "agent/nbd/disk.h"

#include <errno.h>
#include <stdlib.h>

#define PIECE (512u << 10)
#define PIECES 4u
#define TRIES 8u

struct piece {
    struct hashing *job;
    uint64_t page, pages, written;
    uint8_t *bytes;
};

struct hashing {
    struct store_pin *pin;
    unsigned level, tries, flying;
    uint64_t first, at, from, to; /* nodes; pages */
    uint32_t count;
    int err;
    bool stepping;
    void (*done)(void *arg, int err, struct buf *data);
    void *arg;
};

static void step(struct hashing *h);

static void finish(struct hashing *h)
{
    struct store_pin *pin = h->pin;
    struct buf *data = h->err ? NULL : buf_new((size_t)h->count * HASH_BYTES);
    for (uint32_t i = 0; data && i < h->count; i++, data->len += HASH_BYTES)
        page_hash_put(data->data + data->len, hashes_node(&pin->d->hashes, h->level, h->first + i));
    h->done(h->arg, h->err ? h->err : data ? 0 : -ENOMEM, data);
    free(h);
    disk_pin_job_done(pin);
}

static void on_piece(void *arg, int err, const char *text)
{
    struct piece *p = arg;
    struct hashing *h = p->job;
    struct disk *d = h->pin->d;
    (void)text;
    h->flying--;
    if (err)
        h->err = err;
    else if (d->written == p->written && p->page + p->pages <= d->hashes.pages)
        hashes_take(&d->hashes, p->page, p->bytes, p->pages);
    free(p->bytes);
    free(p);
    step(h);
}

static int piece_ask(struct hashing *h, uint64_t page, uint64_t pages)
{
    struct disk *d = h->pin->d;
    struct piece *p = calloc(1, sizeof *p);
    uint64_t offset = page * FRAME_PAGE, size = d->size, left = offset < size ? size - offset : 0;
    if (!p || !(p->bytes = calloc(pages, FRAME_PAGE))) {
        free(p);
        return -ENOMEM;
    }
    p->job = h;
    p->page = page;
    p->pages = pages;
    p->written = d->written;
    uint32_t len = (uint32_t)(pages * FRAME_PAGE < left ? pages * FRAME_PAGE : left);
    int err = len ? disk_read(d, offset, len, p->bytes, on_piece, p) : -ESTALE;
    if (err) {
        free(p->bytes);
        free(p);
        return err;
    }
    h->flying++;
    return 0;
}

static uint64_t unknown_from(const struct hashing *h, uint64_t page)
{
    uint64_t next = hashes_next_unknown(&h->pin->d->hashes, page);
    return next < h->to ? next : h->to;
}

static void step(struct hashing *h)
{
    struct disk *d = h->pin->d;
    if (!h->err)
        h->err = disk_pin_fault(h->pin, h->from * FRAME_PAGE, h->to * FRAME_PAGE);
    while (!h->err && h->flying < PIECES && (h->at = unknown_from(h, h->at)) < h->to) {
        uint64_t end = h->at + 1;
        while (end < h->to && end - h->at < PIECE / FRAME_PAGE &&
               page_hash_same(hashes_get(&d->hashes, end), HASH_UNKNOWN))
            end++;
        h->err = piece_ask(h, h->at, end - h->at);
        h->at = end;
    }
    if (h->flying)
        return;
    if (!h->err && unknown_from(h, h->from) < h->to) {
        h->at = h->from;
        h->err = ++h->tries > TRIES ? -EBUSY : 0;
        step(h);
        return;
    }
    finish(h);
}

static void begin(void *arg)
{
    step(arg);
}

void disk_pin_hash(struct store_pin *pin, unsigned level, uint64_t first, uint32_t count, bool fresh,
                   void (*done)(void *arg, int err, struct buf *data), void *arg)
{
    struct disk *d = pin->d;
    struct hashing *h = calloc(1, sizeof *h);
    if (!h)
        abort(); /* as store/pin.c: nobody to tell */
    *h = (struct hashing){.pin = pin, .level = level, .first = first, .done = done, .arg = arg};
    uint64_t pages = ((pin->live ? d->size : pin->size) + FRAME_PAGE - 1) / FRAME_PAGE, had = d->hashes.pages;
    uint64_t nodes = hashes_nodes(pages, level), left = first < nodes ? nodes - first : 0;
    h->count = count < left ? count : (uint32_t)left;
    h->err = disk_pin_fault(pin, 0, 0);
    d->hashes.bare = true;
    if (!h->err && pages > had && !(h->err = hashes_room(&d->hashes, pages)))
        hashes_doubt(&d->hashes, had, pages);
    h->from = first << 4 * level;
    h->to = (first + h->count) << 4 * level;
    h->to = h->count ? h->to < pages ? h->to : pages : h->from;
    if (fresh && !h->err && h->from < h->to)
        hashes_doubt(&d->hashes, h->from, h->to);
    h->at = h->from;
    pin->jobs++;
    if (disk_later(pin->s, begin, h))
        abort();
}
