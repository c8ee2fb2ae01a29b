/* Pins, and reads of what they pin. See disk.h.
 *
 * Whoever reads one piece after the other is read ahead for, in blocks kept here: a server that is far away is then as
 * fast as what is in flight allows. Others go to the server as they are. What is about to be written is forgotten here
 * before, so that a read never sees less than what was answered to a write.
 *
 * Holes: at each new pin the server is asked what of the export it has no data for, in the background, and that is read
 * as zeros without asking. The map is built no further once something is written here. */
#include "agent/nbd/disk.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* A read that is made of blocks. */
struct blocks_read {
    uint64_t offset;
    uint32_t len;
    uint8_t *to;
    unsigned pending; /* blocks not here yet, and one until all were looked at */
    int err;
    nbd_client_done *done;
    void *arg;
};

struct reader_wait {
    struct reader_wait *next;
    struct blocks_read *read;
};

/* ---- holes ---- */

static void holes_ask(struct disk *d);

static void holes_mark(struct disk *d, uint64_t from, uint64_t to)
{
    uint64_t step = d->hole_step;
    for (uint64_t i = (from + step - 1) / step; i < to / step; i++)
        d->holes[i / 8] |= (uint8_t)(1u << i % 8);
    if (to == d->traits.size && to % step && from <= to / step * step)
        d->holes[to / step / 8] |= (uint8_t)(1u << to / step % 8);
}

static void on_status(void *arg, int err, const char *text)
{
    struct disk *d = arg;
    (void)text;
    d->hole_asking = false;
    uint64_t at = d->hole_at, zero = 0;
    if (err || d->state != DISK_UP || !d->holes || d->hole_round) {
        d->hole_round = 0;
        holes_ask(d);
        return;
    }
    for (uint32_t i = 0; i < d->hole_answer->n; i++) {
        uint64_t end = at + d->hole_answer->at[i].len;
        end = end < d->traits.size ? end : d->traits.size;
        if (d->hole_answer->at[i].state & NBD_STATE_ZERO)
            holes_mark(d, at, end);
        zero += end - at;
        at = end;
    }
    d->hole_at = zero ? at : d->traits.size;
    holes_ask(d);
}

static void holes_ask(struct disk *d)
{
    if (d->state != DISK_UP || d->hole_asking || !d->holes || d->hole_at >= d->traits.size)
        return;
    d->hole_answer->n = 0;
    d->hole_asking = !nbd_client_status(d->client, d->hole_at, d->traits.size - d->hole_at, d->hole_answer, on_status, d);
}

static void holes_begin(struct disk *d)
{
    if (!d->traits.allocation || !d->traits.size)
        return;
    d->hole_step = 64u << 10;
    while (d->traits.size / d->hole_step >= HOLE_BITS)
        d->hole_step *= 2;
    size_t bytes = (size_t)(d->traits.size / d->hole_step / 8 + 1);
    if (!d->hole_answer && (d->hole_answer = malloc(sizeof *d->hole_answer + 1024 * sizeof(struct nbd_extent))))
        d->hole_answer->cap = 1024;
    if (!d->holes)
        d->holes = d->hole_answer ? malloc(bytes) : NULL;
    if (!d->holes)
        return;
    memset(d->holes, 0, bytes);
    d->hole_at = 0;
    d->hole_round = d->hole_asking; /* an answer that is under way is of before */
    holes_ask(d);
}

static bool is_hole(const struct disk *d, uint64_t from, uint64_t to)
{
    if (!d->holes)
        return false;
    for (uint64_t i = from / d->hole_step; i * d->hole_step < to; i++)
        if (!(d->holes[i / 8] & 1u << i % 8))
            return false;
    return true;
}

static void holes_fill(struct disk *d, uint64_t from, uint64_t to)
{
    if (!d->holes)
        return;
    d->hole_at = d->traits.size;
    d->hole_round = d->hole_asking;
    for (uint64_t i = from / d->hole_step; i * d->hole_step < to; i++)
        d->holes[i / 8] &= (uint8_t) ~(1u << i % 8);
}

/* ---- blocks ---- */

static void block_free(struct block *b)
{
    free(b->bytes);
    *b = (struct block){.at = UINT64_MAX};
}

static struct block *block_find(struct disk *d, uint64_t at)
{
    for (unsigned i = 0; i < AHEAD_BLOCKS; i++)
        if (d->blocks[i].at == at && !d->blocks[i].stale)
            return &d->blocks[i];
    return NULL;
}

static void read_less(struct blocks_read *r)
{
    if (--r->pending)
        return;
    r->done(r->arg, r->err, r->err ? strerror(-r->err) : "");
    free(r);
}

static void block_copy(struct block *b, struct blocks_read *r)
{
    uint64_t from = b->at > r->offset ? b->at : r->offset;
    uint64_t end = b->at + b->len, to = r->offset + r->len < end ? r->offset + r->len : end;
    b->used = ++b->disk->clock;
    memcpy(r->to + (from - r->offset), b->bytes + (from - b->at), (size_t)(to - from));
}

static void on_block(void *arg, int err, const char *text)
{
    struct block *b = arg;
    struct reader_wait *waits = b->waits;
    (void)text;
    b->waits = NULL;
    b->here = true;
    for (struct reader_wait *w = waits; w; w = w->next)
        if (err)
            w->read->err = err;
        else
            block_copy(b, w->read);
    if (err || b->stale || b->disk->state != DISK_UP)
        block_free(b);
    for (struct reader_wait *w = waits, *next; w; w = next) {
        next = w->next;
        read_less(w->read);
        free(w);
    }
}

/* False: there is no room for it, or it cannot be asked for. */
static bool block_ask(struct disk *d, uint64_t at)
{
    struct block *b = NULL;
    for (unsigned i = 0; i < AHEAD_BLOCKS; i++) {
        struct block *one = &d->blocks[i];
        bool fit = one->at == UINT64_MAX || (one->here && !one->waits);
        if (fit && (!b || (b->at != UINT64_MAX && (one->at == UINT64_MAX || one->used < b->used))))
            b = one;
    }
    if (!b)
        return false;
    uint8_t *bytes = b->bytes ? b->bytes : malloc(AHEAD_BLOCK);
    *b = (struct block){.at = UINT64_MAX, .bytes = bytes, .disk = d, .used = ++d->clock};
    if (!bytes)
        return false;
    uint64_t left = d->traits.size - at;
    b->len = left < AHEAD_BLOCK ? (uint32_t)left : AHEAD_BLOCK;
    if (nbd_client_read(d->client, at, b->len, bytes, on_block, b)) {
        block_free(b);
        return false;
    }
    b->at = at;
    return true;
}

static void read_ahead(struct disk *d, struct reader *r)
{
    uint64_t from = r->next / AHEAD_BLOCK * AHEAD_BLOCK, to = from + (uint64_t)r->blocks * AHEAD_BLOCK;
    if (r->ahead < from)
        r->ahead = from;
    for (; r->ahead < to && r->ahead < d->traits.size; r->ahead += AHEAD_BLOCK) {
        uint64_t end = r->ahead + AHEAD_BLOCK < d->traits.size ? r->ahead + AHEAD_BLOCK : d->traits.size;
        if (!is_hole(d, r->ahead, end) && !block_find(d, r->ahead) && !block_ask(d, r->ahead))
            return;
    }
}

/* Requests of one reader come a little out of order. */
static void follow(struct disk *d, uint64_t offset, uint32_t len)
{
    struct reader *oldest = &d->readers[0];
    uint64_t end = offset + len;
    for (unsigned i = 0; i < AHEAD_READERS; i++) {
        struct reader *r = &d->readers[i];
        if (r->used && offset + (4u << 20) >= r->next && offset <= r->next + (4u << 20)) {
            r->used = ++d->clock;
            if (end > r->next && offset >= r->next) {
                r->blocks = r->blocks ? r->blocks * 2 : 2;
                r->blocks = r->blocks < AHEAD_MOST ? r->blocks : AHEAD_MOST;
            }
            if (end > r->next)
                r->next = end;
            read_ahead(d, r);
            return;
        }
        if (r->used < oldest->used)
            oldest = r;
    }
    *oldest = (struct reader){.next = end, .used = ++d->clock};
}

static bool covered(struct disk *d, uint64_t offset, uint64_t end)
{
    for (uint64_t at = offset / AHEAD_BLOCK * AHEAD_BLOCK; at < end; at += AHEAD_BLOCK)
        if (!block_find(d, at))
            return false;
    return true;
}

static void read_done(void *arg)
{
    read_less(arg);
}

static int blocks_read(struct disk *d, uint64_t offset, uint32_t len, uint8_t *to, nbd_client_done *done, void *arg,
                       bool hole)
{
    struct blocks_read *r = malloc(sizeof *r);
    if (!r)
        return -ENOMEM;
    *r = (struct blocks_read){offset, len, to, 1, 0, done, arg};
    if (disk_later(d->s, read_done, r)) {
        free(r);
        return -ENOMEM;
    }
    if (hole)
        memset(to, 0, len);
    for (uint64_t at = offset / AHEAD_BLOCK * AHEAD_BLOCK; !hole && at < offset + len; at += AHEAD_BLOCK) {
        struct block *b = block_find(d, at);
        if (b->here) {
            block_copy(b, r);
            continue;
        }
        struct reader_wait *w = malloc(sizeof *w);
        if (!w) {
            r->err = -ENOMEM;
            continue;
        }
        *w = (struct reader_wait){b->waits, r};
        b->waits = w;
        r->pending++;
    }
    return 0;
}

int disk_read(struct disk *d, uint64_t offset, uint32_t len, uint8_t *to, nbd_client_done *done, void *arg)
{
    if (is_hole(d, offset, offset + len))
        return blocks_read(d, offset, len, to, done, arg, true);
    follow(d, offset, len);
    if (covered(d, offset, offset + len))
        return blocks_read(d, offset, len, to, done, arg, false);
    return nbd_client_read(d->client, offset, len, to, done, arg);
}

static void pin_mark(struct store_pin *pin, uint64_t from, uint64_t to)
{
    uint64_t pages = (pin->size + FRAME_PAGE - 1) / FRAME_PAGE, end = (to + FRAME_PAGE - 1) / FRAME_PAGE;
    if (pin->live || pin->lost || !pages)
        return;
    if (!pin->written && !(pin->written = calloc(1, (size_t)(pages / 8 + 1)))) {
        pin->lost = true;
        return;
    }
    for (uint64_t page = from / FRAME_PAGE; page < end && page < pages; page++)
        pin->written[page / 8] |= (uint8_t)(1u << page % 8);
}

void disk_changing(struct disk *d, uint64_t from, uint64_t to)
{
    d->written++;
    for (struct store_pin *pin = d->pins; pin; pin = pin->next)
        pin_mark(pin, from, to);
    holes_fill(d, from, to);
    for (unsigned i = 0; i < AHEAD_BLOCKS; i++) {
        struct block *b = &d->blocks[i];
        if (b->at == UINT64_MAX || b->at >= to || b->at + b->len <= from)
            continue;
        if (b->here)
            block_free(b);
        else
            b->stale = true;
    }
    uint64_t end = (to + FRAME_PAGE - 1) / FRAME_PAGE;
    end = end < d->hashes.pages ? end : d->hashes.pages;
    if (from / FRAME_PAGE < end)
        hashes_doubt(&d->hashes, from / FRAME_PAGE, end);
}

void disk_read_open(struct disk *d)
{
    memset(d->readers, 0, sizeof d->readers);
}

void disk_read_forget(struct disk *d)
{
    for (unsigned i = 0; i < AHEAD_BLOCKS; i++)
        if (d->blocks[i].here)
            block_free(&d->blocks[i]);
    hashes_free(&d->hashes);
    d->hashes = (struct hashes){0};
    free(d->holes);
    d->holes = NULL;
    if (!d->hole_asking) {
        free(d->hole_answer);
        d->hole_answer = NULL;
    }
}

/* ---- pins ---- */

struct store_pin *disk_pin(struct disk *d)
{
    struct store_pin *pin = malloc(sizeof *pin);
    if (!pin)
        return NULL;
    *pin = (struct store_pin){
        .s = d->s, .d = d, .next = d->pins, .size = d->size, .epoch = d->epoch, .lineage = d->lineage};
    d->pins = pin;
    d->busy++;
    holes_begin(d);
    return pin;
}

static void pin_look(struct store_pin *pin)
{
    if (!pin->dropped || pin->jobs)
        return;
    struct store_pin **at = &pin->d->pins;
    while (*at != pin)
        at = &(*at)->next;
    *at = pin->next;
    disk_release(pin->d);
    free(pin->written);
    free(pin);
}

void disk_unpin(struct store_pin *pin)
{
    pin->dropped = true;
    pin_look(pin);
}

void disk_pin_job_done(struct store_pin *pin)
{
    pin->jobs--;
    pin_look(pin);
}

int disk_pin_live(struct store_pin *pin, const struct id *owner)
{
    pin->live = true;
    pin->owner = *owner;
    return 0;
}

int disk_pin_fault(const struct store_pin *pin, uint64_t from, uint64_t to)
{
    const struct disk *d = pin->d;
    if (!pin->live && pin->lost)
        return -ENOBUFS;
    to = to < pin->size ? to : pin->size;
    for (uint64_t page = from / FRAME_PAGE; !pin->live && pin->written && page * FRAME_PAGE < to; page++)
        if (pin->written[page / 8] & 1u << page % 8)
            return -ENOBUFS;
    if (!pin->live)
        return 0;
    return d->vacant || (d->epoch != pin->epoch && !id_same(&d->writer, &pin->owner)) ? -ESTALE : 0;
}

struct pin_job {
    struct store_pin *pin;
    struct buf *data;
    uint32_t len;
    uint64_t offset;
    int err;
    void (*done)(void *arg, int err, struct buf *data);
    void *arg;
    struct nbd_extents *status;
};

static void job_end(struct pin_job *j, int err)
{
    struct store_pin *pin = j->pin;
    if (err)
        buf_drop(j->data);
    j->done(j->arg, err, err ? NULL : j->data);
    free(j->status);
    free(j);
    disk_pin_job_done(pin);
}

static void job_fail(void *arg)
{
    struct pin_job *j = arg;
    job_end(j, j->err);
}

static void on_read(void *arg, int err, const char *text)
{
    struct pin_job *j = arg;
    (void)text;
    job_end(j, err ? err : disk_pin_fault(j->pin, j->offset, j->offset + j->len));
}

static struct pin_job *job_new(struct store_pin *pin, uint64_t offset, uint32_t len, void (*done)(void *arg, int err, struct buf *data), void *arg,
                               size_t bytes)
{
    struct pin_job *j = calloc(1, sizeof *j);
    if (!j)
        abort(); /* as store/pin.c: nobody to tell */
    *j = (struct pin_job){.pin = pin, .done = done, .arg = arg, .data = buf_new(bytes), .offset = offset, .len = len};
    j->err = j->data ? disk_pin_fault(pin, offset, offset + len) : -ENOMEM;
    pin->jobs++;
    return j;
}

static void job_answer(struct pin_job *j, int err)
{
    j->err = err;
    if (disk_later(j->pin->s, job_fail, j))
        abort();
}

/* Bytes of the disk in [offset, offset + len): what lies behind the region's end is zeros for a live pin, else cut. */
static uint32_t part_there(const struct store_pin *pin, uint64_t offset, uint32_t *len)
{
    uint64_t size = pin->live ? pin->d->size : pin->size;
    uint64_t left = offset < size ? size - offset : 0;
    if (!pin->live && *len > left)
        *len = (uint32_t)left;
    return *len > left ? (uint32_t)left : *len;
}

void disk_pin_read(struct store_pin *pin, uint64_t offset, uint32_t len, uint32_t room,
                   void (*done)(void *arg, int err, struct buf *data), void *arg)
{
    uint32_t there = part_there(pin, offset, &len);
    struct pin_job *j = job_new(pin, offset, len, done, arg, (size_t)room + len);
    if (j->err) {
        job_answer(j, j->err);
        return;
    }
    j->data->len = room + len;
    memset(j->data->data + room + there, 0, len - there);
    int err = there ? disk_read(pin->d, offset, there, j->data->data + room, on_read, j) : 0;
    if (err || !there)
        job_answer(j, err);
}

struct buf *disk_pin_read_now(struct store_pin *pin, uint64_t offset, uint32_t len, uint32_t room)
{
    struct disk *d = pin->d;
    uint32_t there = part_there(pin, offset, &len);
    struct block *b = block_find(d, offset / AHEAD_BLOCK * AHEAD_BLOCK);
    bool hole = is_hole(d, offset, offset + there);
    if (disk_pin_fault(pin, offset, offset + len) || !there || (!hole && (!b || !b->here || offset + there > b->at + b->len)))
        return NULL;
    struct buf *data = buf_new((size_t)room + len);
    if (!data)
        return NULL;
    data->len = room + len;
    memset(data->data + room, 0, len);
    if (!hole) {
        follow(d, offset, there);
        b = block_find(d, offset / AHEAD_BLOCK * AHEAD_BLOCK); /* reading ahead may have taken its place */
    }
    if (!hole && (!b || !b->here)) {
        buf_drop(data);
        return NULL;
    }
    if (!hole)
        block_copy(b, &(struct blocks_read){.offset = offset, .len = there, .to = data->data + room});
    return data;
}

static void on_extents(void *arg, int err, const char *text)
{
    struct pin_job *j = arg;
    (void)text;
    struct store_extent *all = (void *)j->data->data;
    uint64_t at = j->offset, end = j->offset + j->len;
    unsigned n = 0;
    for (uint32_t i = 0; !err && i < j->status->n && at < end; i++) {
        at = j->status->at[i].len < end - at ? at + j->status->at[i].len : end;
        bool hole = j->status->at[i].state & NBD_STATE_ZERO;
        if (n && all[n - 1].hole == hole)
            n--;
        all[n++] = (struct store_extent){.end = at, .hole = hole};
    }
    j->data->len = (uint32_t)(n * sizeof *all);
    job_end(j, err ? err : disk_pin_fault(j->pin, j->offset, end));
}

int disk_pin_extents(struct store_pin *pin, uint64_t offset, uint32_t len,
                     void (*done)(void *arg, int err, struct buf *extents), void *arg)
{
    struct disk *d = pin->d;
    uint32_t there = part_there(pin, offset, &len);
    if (!d->traits.allocation || !there || there < len)
        return -ENOTSUP;
    struct pin_job *j = job_new(pin, offset, len, done, arg, STORE_EXTENTS * sizeof(struct store_extent));
    j->status = malloc(sizeof *j->status + STORE_EXTENTS * sizeof(struct nbd_extent));
    int err = j->err ? j->err : j->status ? 0 : -ENOMEM;
    if (!err) {
        *j->status = (struct nbd_extents){.cap = STORE_EXTENTS};
        err = nbd_client_status(d->client, offset, len, j->status, on_extents, j);
    }
    if (err)
        job_answer(j, err);
    return 0;
}

int disk_pin_changed(struct store_pin *pin, struct store_pin *later,
                     void (*done)(void *arg, int err, struct buf *data), void *arg)
{
    (void)done;
    (void)arg;
    return pin->d != later->d || !id_same(&pin->lineage, &later->lineage) || later->epoch < pin->epoch ? -ESTALE
                                                                                                        : -EOPNOTSUPP;
}
