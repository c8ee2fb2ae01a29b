/* Epochs into writes. See disk.h.
 *
 *     open ---commit---> queued: its writes are asked for ---all answered, first in the queue---> flushed ---> durable
 *       \___abort or refused: what is at the client is waited for, then freed
 *
 * Only whole data: what rests on the page before (DELTA, COPY) is refused with the code that makes a writer send plain
 * pages, since reading them over the network first would cost more than it saves. */
#include "agent/nbd/disk.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define TXN_HANDLES 16u /* in one epoch: they are names of one export */

struct txn_handle {
    uint32_t handle;
    char *name;
};

struct held {
    struct buf *buf;
    struct held *next;
};

struct store_txn {
    struct store *s; /* first */
    struct disk *d;  /* known from the first frame on */
    struct store_txn *next;
    struct id holder, writer;
    struct store_names names;
    void (*spilled)(void *arg, size_t bytes);
    void *arg;
    struct txn_handle handles[TXN_HANDLES];
    unsigned handles_n;
    struct held *held, **held_end;
    size_t memory, owed; /* owed: to be told to `spilled` when nothing is written yet */
    bool crediting;
    bool created, unlinked, stated, started; /* started: written as it comes */
    bool queued, dropped, covered;
    struct id lineage;
    struct frame_region region; /* the last one; min_size: the lowest */
    uint64_t zeroed, highest;   /* once started: up to where it is zeros; end of what was written */
    unsigned asked;             /* at the client */
    int err;
    char error[STORE_ERROR];
    void (*durable)(void *arg, int err, const char *text);
    void *durable_arg;
};

/* One request of a transaction. */
struct ask {
    struct store_txn *t;
    size_t bytes; /* to be told to `spilled` */
};

static int refuse(struct store_txn *t, int err, const char *format, ...) __attribute__((format(printf, 3, 4)));
static int refuse(struct store_txn *t, int err, const char *format, ...)
{
    if (t->err)
        return t->err;
    va_list ap;
    va_start(ap, format);
    vsnprintf(t->error, sizeof t->error, format, ap);
    va_end(ap);
    return t->err = err;
}

struct store_txn *disk_txn_new(struct store *s, const struct id *holder, struct store_names names,
                               void (*spilled)(void *arg, size_t bytes), void *arg)
{
    struct store_txn *t = calloc(1, sizeof *t);
    if (!t)
        return NULL;
    t->s = s;
    t->holder = t->writer = *holder;
    t->names = names;
    t->spilled = spilled;
    t->arg = arg;
    t->held_end = &t->held;
    return t;
}

void disk_txn_chain(struct store_txn *t, const void *chain)
{
    (void)t; /* a disk has one queue, whoever writes */
    (void)chain;
}

void disk_txn_writer(struct store_txn *t, const struct id *writer)
{
    t->writer = *writer;
}

static void txn_free(struct store_txn *t)
{
    struct disk *d = t->d;
    for (struct held *h = t->held, *next; h; h = next) {
        next = h->next;
        buf_drop(h->buf);
        free(h);
    }
    for (unsigned i = 0; i < t->handles_n; i++)
        free(t->handles[i].name);
    free(t);
    if (d)
        disk_release(d);
}

static void txn_look(struct store_txn *t)
{
    if (t->dropped && !t->asked && !t->crediting)
        txn_free(t);
}

static void queue_step(struct disk *d);

static void on_written(void *arg, int err, const char *text)
{
    struct ask *a = arg;
    struct store_txn *t = a->t;
    if (err)
        refuse(t, err, "%.200s: %.250s", t->s->url, *text ? text : strerror(-err));
    if (a->bytes && !t->dropped && t->spilled)
        t->spilled(t->arg, a->bytes);
    free(a);
    t->asked--;
    if (t->queued)
        queue_step(t->d);
    else
        txn_look(t);
}

static void ask_one(struct store_txn *t, const struct frame_extent *e, struct buf *data, size_t bytes)
{
    struct disk *d = t->d;
    struct ask *a = t->err ? NULL : malloc(sizeof *a);
    uint64_t end = e->offset + e->len;
    if (!a) {
        refuse(t, -ENOMEM, "no memory for a write");
        return;
    }
    *a = (struct ask){t, bytes};
    disk_changing(d, e->offset, end);
    int err = data ? nbd_client_write(d->client, e->offset, e->len, data, (uint32_t)(e->data - data->data), on_written, a)
                   : nbd_client_zeroes(d->client, e->offset, e->len, on_written, a);
    if (err) {
        free(a);
        refuse(t, err, "%.200s: %s", t->s->url, strerror(-err));
        return;
    }
    t->asked++;
    if (end > t->highest)
        t->highest = end;
}

static void zero(struct store_txn *t, uint64_t from, uint64_t to)
{
    uint64_t highest = t->highest;
    while (from < to && !t->err) { /* the frame's lengths have 32 bits; the client's have not, but are checked alike */
        uint32_t len = to - from > (1u << 30) ? 1u << 30 : (uint32_t)(to - from);
        ask_one(t, &(struct frame_extent){.offset = from, .len = len}, NULL, 0);
        from += len;
    }
    t->highest = highest;
    if (to > t->zeroed)
        t->zeroed = to;
}

/* Pages beyond the region's end, but within the export, are written too: a later REGION may reach them. */
static void write_frame(struct store_txn *t, struct buf *b, bool credit)
{
    struct frame_pages pages;
    struct frame_extent e;
    uint64_t room = t->d->traits.size;
    size_t bytes = credit ? b->len : 0;
    frame_pages_get(b->data, b->len, &pages);
    while (frame_pages_next(&pages, &e) && !t->err) {
        if (e.offset >= room)
            continue;
        if (e.len > room - e.offset)
            e.len = (uint32_t)(room - e.offset);
        if (!e.len)
            continue;
        ask_one(t, &e, e.kind == FRAME_PAGES_DATA ? b : NULL, bytes);
        bytes = 0;
    }
    t->owed += bytes; /* nothing of it was to be written */
}

static void credit_now(void *arg)
{
    struct store_txn *t = arg;
    t->crediting = false;
    size_t bytes = t->owed;
    t->owed = 0;
    if (!t->dropped && !t->queued && bytes && t->spilled)
        t->spilled(t->arg, bytes);
    txn_look(t);
}

static void credit_soon(struct store_txn *t)
{
    if (t->owed && !t->crediting)
        t->crediting = !disk_later(t->s, credit_now, t);
}

static void start(struct store_txn *t)
{
    uint64_t base = t->created ? 0 : t->d->head_size;
    uint64_t low = t->region.min_size < base ? t->region.min_size : base;
    t->started = true;
    t->zeroed = low;
    zero(t, low, t->region.size);
    while (t->held && !t->err) {
        struct held *h = t->held;
        if (!(t->held = h->next))
            t->held_end = &t->held;
        write_frame(t, h->buf, false);
        buf_drop(h->buf);
        free(h);
    }
    t->memory = 0;
}

/* ---- frames ---- */

/* The name behind a handle within this epoch; finds the disk. */
static struct txn_handle *handle_get(struct store_txn *t, uint32_t handle)
{
    for (unsigned i = 0; i < t->handles_n; i++)
        if (t->handles[i].handle == handle)
            return &t->handles[i];
    const char *name = t->names.name_of(t->names.arg, handle);
    int err = 0;
    struct disk *d = name ? disk_named(t->s, name, false, &err) : NULL;
    if (!d || d->state != DISK_UP) {
        refuse(t, -ENOENT, "handle %u is not attached", handle);
        return NULL;
    }
    if (t->d && t->d != d) {
        refuse(t, -EOPNOTSUPP, "exports of a foreign server cannot be changed together");
        return NULL;
    }
    if (!t->d) {
        t->d = d;
        d->busy++;
    }
    struct txn_handle *h = &t->handles[t->handles_n];
    if (t->handles_n == TXN_HANDLES || !(h->name = strdup(name))) {
        refuse(t, -ENOBUFS, "too many names for one export");
        return NULL;
    }
    h->handle = handle;
    t->handles_n++;
    if (!d->leased || !id_same(&d->holder, &t->holder)) {
        refuse(t, -ESTALE, "%.300s is written by %.100s now", name, d->leased ? d->holder_host : "nobody");
        return NULL;
    }
    return h;
}

static int add_op(struct store_txn *t, const struct buf *b)
{
    struct frame_op op;
    if (frame_op_get(b->data, b->len, &op))
        return refuse(t, -EPROTO, "malformed OP");
    if (!handle_get(t, op.handle))
        return t->err;
    if (t->stated)
        return refuse(t, -EOPNOTSUPP, "one export, one region: it cannot be replaced within an epoch");
    switch (op.kind) {
    case FRAME_OP_CREATE:
        t->created = true;
        t->unlinked = false;
        t->lineage = op.lineage;
        return 0;
    case FRAME_OP_UNLINK:
        t->created = false;
        t->unlinked = true;
        return 0;
    default:
        return refuse(t, -EOPNOTSUPP, "an export of a foreign server cannot be renamed");
    }
}

static int add_region(struct store_txn *t, const struct buf *b)
{
    struct frame_region g;
    if (frame_region_get(b->data, b->len, &g))
        return refuse(t, -EPROTO, "malformed REGION");
    if (!handle_get(t, g.handle))
        return t->err;
    struct disk *d = t->d;
    if (g.base != (t->created ? 0 : d->head_epoch) || (d->vacant && !t->created))
        return refuse(t, -EEXIST, "the region is at epoch %llu, which epoch %llu does not continue",
                      (unsigned long long)d->head_epoch, (unsigned long long)g.epoch);
    if (g.fence != d->fence)
        return refuse(t, -ESTALE, "fenced: its lease has number %llu now, not %llu", (unsigned long long)d->fence,
                      (unsigned long long)g.fence);
    if (g.size > d->traits.size)
        return refuse(t, -ENOSPC, "%.200s holds %llu bytes, and the region has %llu", t->s->url,
                      (unsigned long long)d->traits.size, (unsigned long long)g.size);
    if (t->stated && t->started) {
        if (g.min_size < t->region.min_size || (g.size > t->zeroed && t->highest > t->zeroed))
            return refuse(t, -EBADMSG, "cut while it was being written"); /* compared, and sent again */
        zero(t, t->zeroed, g.size);
    }
    if (t->stated && t->region.min_size < g.min_size)
        g.min_size = t->region.min_size;
    t->stated = true;
    t->region = g;
    return t->err;
}

static int add_pages(struct store_txn *t, struct buf *b)
{
    struct frame_pages pages;
    struct frame_extent e;
    if (frame_pages_get(b->data, b->len, &pages))
        return refuse(t, -EPROTO, "malformed PAGES");
    if (!t->stated || !handle_get(t, pages.handle))
        return refuse(t, -EPROTO, "PAGES of handle %u before its REGION", pages.handle);
    while (frame_pages_next(&pages, &e))
        if (e.kind != FRAME_PAGES_DATA && e.kind != FRAME_PAGES_ZEROS)
            return refuse(t, -EBADMSG, "only plain pages can be written to %.300s", t->s->url);
    if (!t->started && t->memory + b->len > STORE_TXN_MEMORY)
        start(t);
    if (t->started) {
        write_frame(t, b, true);
    } else {
        struct held *h = malloc(sizeof *h);
        if (!h)
            return refuse(t, -ENOMEM, "no memory for the epoch's pages");
        *h = (struct held){.buf = buf_hold(b)};
        *t->held_end = h;
        t->held_end = &h->next;
        t->memory += b->len;
        t->owed += b->len;
    }
    credit_soon(t);
    return t->err;
}

int disk_txn_add(struct store_txn *t, uint8_t type, struct buf *payload, char error[STORE_ERROR])
{
    int err = t->err             ? t->err
              : type == FRAME_OP ? add_op(t, payload)
              : type == FRAME_REGION ? add_region(t, payload)
              : type == FRAME_PAGES  ? add_pages(t, payload)
                                     : refuse(t, -EPROTO, "frame type %u has no place in an epoch", type);
    if (err)
        snprintf(error, STORE_ERROR, "%s", t->error);
    return err;
}

bool disk_txn_received(struct store_txn *t, void (*received)(void *arg))
{
    (void)t;
    (void)received;
    return true;
}

/* ---- the queue ---- */

/* The head goes: what it leaves is what is there. */
static void txn_finish(struct disk *d, struct store_txn *t)
{
    if (!(d->queue = t->next))
        d->queue_end = &d->queue;
    if (!t->err && t->stated) {
        if (t->created)
            d->lineage = t->lineage;
        d->vacant = false;
        d->epoch = t->region.epoch;
        d->size = t->region.size;
        d->writer = t->writer;
        d->committed_at = time(NULL);
    } else if (!t->err && t->unlinked) {
        d->vacant = true;
    }
    if (t->err) {
        d->head_epoch = d->epoch;
        d->head_size = d->size;
        for (struct store_txn *n = d->queue; n; n = n->next)
            refuse(n, -EIO, "an epoch before it failed: %.400s", t->error);
    }
    t->durable(t->durable_arg, t->err, t->error);
    t->queued = false;
    t->dropped = true;
    txn_look(t);
}

static void on_flushed(void *arg, int err, const char *text)
{
    struct disk *d = arg;
    d->flushing = false;
    d->busy++;
    while (d->queue && d->queue->covered) {
        if (err)
            refuse(d->queue, err, "%.200s: %.250s", d->s->url, *text ? text : strerror(-err));
        txn_finish(d, d->queue);
    }
    queue_step(d);
    disk_release(d);
}

static void queue_step(struct disk *d)
{
    d->busy++;
    while (d->queue && !d->flushing && !d->queue->asked && d->queue->err)
        txn_finish(d, d->queue);
    if (d->queue && !d->flushing && !d->queue->asked) {
        for (struct store_txn *t = d->queue; t && !t->asked && !t->err; t = t->next)
            t->covered = true;
        int err = nbd_client_flush(d->client, on_flushed, d);
        d->flushing = !err;
        if (err) {
            refuse(d->queue, err, "%.200s: %s", d->s->url, strerror(-err));
            txn_finish(d, d->queue);
        }
    }
    disk_release(d);
}

static void commit_later(void *arg)
{
    struct store_txn *t = arg;
    t->asked--;
    if (t->d) {
        queue_step(t->d);
        return;
    }
    t->durable(t->durable_arg, t->err, t->error); /* an epoch of nothing */
    t->dropped = true;
    txn_look(t);
}

void disk_txn_commit(struct store_txn *t, void (*durable)(void *arg, int err, const char *text), void *arg)
{
    struct disk *d = t->d;
    t->durable = durable;
    t->durable_arg = arg;
    if (d && !t->err && t->created && !t->stated)
        refuse(t, -EPROTO, "CREATE without REGION");
    if (d && !t->err && t->stated && t->region.base != (t->created ? 0 : d->head_epoch))
        refuse(t, -EEXIST, "the region is no longer what this epoch continues");
    t->queued = d;
    if (d && !t->err && t->stated) {
        if (!t->started)
            start(t);
        d->head_epoch = t->region.epoch;
        d->head_size = t->region.size;
    }
    if (d) {
        *d->queue_end = t;
        d->queue_end = &t->next;
    }
    t->asked++;
    if (disk_later(t->s, commit_later, t))
        abort(); /* no memory, and nobody to tell */
}

void disk_txn_abort(struct store_txn *t)
{
    t->dropped = true;
    txn_look(t);
}
