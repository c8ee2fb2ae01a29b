/* Pins. A pin reads its region as it was after the `barrier`th durable epoch: reads wait until that many are applied,
 * and later ones save each page they are about to change, once, into the pin's side file (a memfd, page for page at the
 * same offset; `saved` says which). Holes are noted, not copied.
 *
 * A live pin reads what is durable when it is asked: each read has a barrier of its own, and nothing is saved. It is of
 * use to the region's writer only, and ends with the first epoch of another. */
#include "agent/store/inside.h"

#include "agent/base/job.h"
#include "agent/track/hashes.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#define COPY_STEP (256u << 10)
#define AT_ONCE FRAME_DATA_MAX /* as much the loop reads itself, when it is in memory: changes of thread cost more */

struct pin_read {
    struct store_pin *pin;
    struct pin_read *next;
    uint64_t offset, barrier;
    uint32_t len, room;
    bool hash, extents, changed, whole; /* whole: nothing is left to do */
    struct tree_read tree;
    int err;
    struct buf *data;
    void (*done)(void *arg, int err, struct buf *data);
    void *arg;
};

static uint64_t pages_of(uint64_t bytes)
{
    return bytes / FRAME_PAGE + (bytes % FRAME_PAGE != 0);
}

bool pin_saved(const struct store_pin *pin, uint64_t page)
{
    return pin->saved && pin->saved[page / 8] & 1u << page % 8;
}

static void set_saved(struct store_pin *pin, uint64_t from, uint64_t to)
{
    for (; from < to && from % 8; from++)
        pin->saved[from / 8] |= (uint8_t)(1u << from % 8);
    if (to > from) {
        memset(pin->saved + from / 8, 0xff, (size_t)((to - from) / 8));
        for (from += (to - from) / 8 * 8; from < to; from++)
            pin->saved[from / 8] |= (uint8_t)(1u << from % 8);
    }
}

/* preadv2 that reads zeros beyond the file's end. */
static int read_padded(int fd, uint8_t *to, size_t len, uint64_t offset, int flags)
{
    while (len) {
        struct iovec iov = {.iov_base = to, .iov_len = len};
        ssize_t n = preadv2(fd, &iov, 1, (off_t)offset, flags);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        if (!n) {
            memset(to, 0, len);
            return 0;
        }
        to += n;
        len -= (size_t)n;
        offset += (size_t)n;
    }
    return 0;
}

/* A piece of at most COPY_STEP, unless it is zeros, which the side file has of itself. */
static int copy_aside(struct store_pin *pin, int fd, uint8_t *step, size_t len, uint64_t at)
{
    int err = read_padded(fd, step, len, at, 0);
    if (err || bytes_zero(step, len))
        return err;
    if (pin->used + len > pin->s->limits.pin_budget || pwrite(pin->side, step, len, (off_t)at) != (ssize_t)len)
        pin->lost = true;
    pin->used += len;
    return 0;
}

/* Pages from .. to, none of them saved. Where a hole begins is never asked: tmpfs looks for it page by page. */
static int save_pages(struct store_pin *pin, int fd, uint64_t from, uint64_t to)
{
    uint64_t at = from * FRAME_PAGE, end = to * FRAME_PAGE;
    uint8_t *step = malloc(end - at < COPY_STEP ? (size_t)(end - at) : COPY_STEP);
    int err = step ? 0 : -ENOMEM;
    while (!err && at < end && !pin->lost) {
        off_t data = lseek(fd, (off_t)at, SEEK_DATA);
        if (data < 0 && errno != ENXIO)
            err = -errno;
        if (data < 0 || (uint64_t)data >= end)
            break;
        if ((uint64_t)data > at)
            at = (uint64_t)data / FRAME_PAGE * FRAME_PAGE;
        size_t len = end - at < COPY_STEP ? (size_t)(end - at) : COPY_STEP;
        err = copy_aside(pin, fd, step, len, at);
        at += len;
    }
    free(step);
    if (!err)
        set_saved(pin, from, to);
    return err;
}

int pin_save(struct store_pin *pin, int fd, uint64_t from, uint64_t to)
{
    if (pin->live)
        return 0;
    pin->behind = true;
    if (to > pin->size)
        to = pin->size;
    if (pin->lost || from >= to)
        return 0;
    uint64_t page = from / FRAME_PAGE, end = pages_of(to);
    if (!pin->saved) {
        pin->saved = calloc(1, (size_t)(pages_of(pin->size) / 8 + 1));
        pin->side = memfd_create("memsync-pin", MFD_CLOEXEC);
        pin->lost = !pin->saved || pin->side < 0;
    }
    int err = 0;
    while (!err && !pin->lost && page < end) {
        if (pin_saved(pin, page)) {
            page++;
            continue;
        }
        uint64_t stop = page + 1;
        while (stop < end && !pin_saved(pin, stop))
            stop++;
        err = save_pages(pin, fd, page, stop);
        page = stop;
    }
    return err;
}

static int pinned(struct store_pin *pin, uint8_t *to, size_t len, uint64_t offset, int flags)
{
    int err = 0;
    while (!err && len) {
        uint64_t page = offset / FRAME_PAGE;
        bool saved = pin_saved(pin, page);
        size_t n = (size_t)(FRAME_PAGE - offset % FRAME_PAGE);
        while (n < len && pin_saved(pin, ++page) == saved)
            n += FRAME_PAGE;
        if (n > len)
            n = len;
        err = read_padded(saved ? pin->side : pin->r->fd, to, n, offset, saved ? 0 : flags);
        to += n;
        len -= n;
        offset += n;
    }
    return err;
}

/* Under the region's read lock. */
int pin_read(struct store_pin *pin, uint8_t *to, size_t len, uint64_t offset)
{
    return pinned(pin, to, len, offset, 0);
}

static int read_locked(struct pin_read *q)
{
    struct store_pin *pin = q->pin;
    struct region *r = pin->r;
    pthread_rwlock_rdlock(&r->lock);
    if (r->fd < 0) {
        pthread_rwlock_unlock(&r->lock);
        pthread_rwlock_wrlock(&r->lock);
        int fd = region_open(pin->s, r, false);
        if (fd < 0) {
            pthread_rwlock_unlock(&r->lock);
            return fd;
        }
    }
    int err = pin->lost      ? -ENOBUFS
              : q->extents ? pin_extents(pin, q->offset, q->offset + q->len, q->data)
                           : pin_read(pin, q->data->data + q->room, q->len, q->offset);
    pthread_rwlock_unlock(&r->lock);
    return err;
}

static void read_clip(struct pin_read *q)
{
    uint64_t left = q->offset < q->pin->size ? q->pin->size - q->offset : 0;
    if (q->len > left && !q->hash && !q->pin->live)
        q->len = (uint32_t)left;
}

/* On the loop thread: not when it would have to wait, for the disk or for who has the region now. */
static void read_at_once(struct pin_read *q)
{
    struct store_pin *pin = q->pin;
    struct region *r = pin->r;
    read_clip(q);
    if (q->hash || q->extents || q->changed || q->len > AT_ONCE || pthread_rwlock_tryrdlock(&r->lock))
        return;
    int flags = pin->s->volume->ops->lasting && !r->in_memory ? RWF_NOWAIT : 0;
    q->data = r->fd >= 0 && !pin->lost ? buf_new((size_t)q->room + q->len) : NULL;
    q->whole = q->data && !pinned(pin, q->data->data + q->room, q->len, q->offset, flags);
    pthread_rwlock_unlock(&r->lock);
    if (q->whole)
        q->data->len = q->room + q->len;
}

/* The stretches of saved pages up to `end`, taken together over gaps of up to `gap` pages; into `to`, unless that is NULL. */
static uint32_t stretches(const struct store_pin *pin, uint64_t end, uint64_t gap, uint8_t *to)
{
    uint32_t n = 0;
    for (uint64_t page = 0, from = 0, behind = 0; page <= end; page++) {
        bool on = page < end && pin_saved(pin, page);
        if (on && (!behind || page - behind > gap)) {
            from = page;
            n++;
        }
        behind = on ? page + 1 : behind;
        if (on && to) {
            put_u64(to + 16 * (size_t)(n - 1), from);
            put_u64(to + 16 * (size_t)(n - 1) + 8, behind - from);
        }
        if (!on && page % 64 == 0 && page + 64 <= end && pin->saved && !get_u64(pin->saved + page / 8))
            page += 63;
    }
    return n;
}

/* What was saved of a pin is what has changed since. `offset`: the pages that matter. */
static int changed_since(struct pin_read *q)
{
    struct store_pin *pin = q->pin;
    pthread_rwlock_rdlock(&pin->r->lock);
    bool all = pin->lost || pin->live;
    uint64_t end = q->offset, gap = 0;
    uint32_t n = all || !pin->saved ? 0 : stretches(pin, end, 0, NULL);
    for (gap = 1; n > FRAME_EXTENTS_MAX; gap *= 2)
        n = stretches(pin, end, gap, NULL);
    gap = gap == 1 ? 0 : gap / 2;
    q->data = buf_new(FRAME_EXTENTS_HEAD + 16 * (size_t)n);
    if (q->data) {
        q->data->len = (uint32_t)(FRAME_EXTENTS_HEAD + 16 * (size_t)n);
        frame_extents_head(q->data->data, 0, all, n);
        if (n)
            stretches(pin, end, gap, q->data->data + FRAME_EXTENTS_HEAD);
    }
    pthread_rwlock_unlock(&pin->r->lock);
    return q->data ? 0 : -ENOMEM;
}

static void read_work(void *arg)
{
    struct pin_read *q = arg;
    struct store_pin *pin = q->pin;
    read_clip(q);
    if (q->hash && __atomic_load_n(&pin->dropped, __ATOMIC_RELAXED))
        q->err = -ECANCELED;
    if (q->changed) {
        q->whole = true;
        q->err = changed_since(q);
        return;
    }
    if (!q->data)
        q->data = buf_new(q->hash      ? (size_t)q->tree.count * HASH_BYTES
                          : q->extents ? STORE_EXTENTS * sizeof(struct store_extent)
                                       : (size_t)q->room + q->len);
    if (!q->data)
        q->err = -ENOMEM;
    if (q->err)
        return;
    if (q->hash) {
        q->err = tree_read_slice(&q->tree, q->data->data, &q->whole);
        q->data->len = q->tree.count * HASH_BYTES;
        return;
    }
    q->whole = true;
    q->err = read_locked(q);
    if (!q->extents)
        q->data->len = q->room + q->len;
}

void pin_release(struct store_pin *pin)
{
    if (--pin->jobs || !pin->dropped)
        return;
    if (pin->side >= 0)
        close(pin->side);
    free(pin->saved);
    tree_free(pin->tree);
    region_drop(pin->s, pin->r);
    free(pin);
}

static void read_end(struct pin_read *q)
{
    struct store_pin *pin = q->pin;
    struct store *s = pin->s;
    if (q->err) {
        buf_drop(q->data);
        q->data = NULL;
    }
    if (pin->dropped)
        buf_drop(q->data);
    else
        q->done(q->arg, q->err, q->data);
    free(q);
    pin_release(pin);
    s->jobs--;
}

static void read_start(struct pin_read *q);

static void read_done(void *arg)
{
    struct pin_read *q = arg;
    struct store *s = q->pin->s;
    if (!q->err && !q->whole) { /* the next slice, behind what else waits for a thread */
        read_start(q);
        return;
    }
    read_end(q);
    store_pump(s);
}

static void read_start(struct pin_read *q)
{
    if (job_run(q->pin->s->loop, read_work, read_done, q) < 0)
        store_fail(q->pin->s, "no thread for a read", -ENOMEM);
}

/* Reads made at once, and those that waited for epochs to be applied. When the store has failed they never will be. */
void pins_applied(struct store *s)
{
    for (struct pin_read **at = &s->pin_waiting, *q; (q = *at);) {
        if (q->barrier > s->applied_no && !s->failed && !q->pin->dropped && !q->err) {
            at = &q->next;
            continue;
        }
        *at = q->next;
        if (q->barrier > s->applied_no && !q->err)
            q->err = -EIO;
        if (q->err || q->whole)
            read_end(q);
        else
            read_start(q);
        at = &s->pin_waiting; /* a callback may have changed the list */
    }
}

static struct pin_read *read_new(struct store_pin *pin, void (*done)(void *, int, struct buf *), void *arg)
{
    struct pin_read *q = calloc(1, sizeof *q);
    if (!q)
        abort(); /* there is no way to tell, and nothing was promised to the peer that a restart breaks */
    *q = (struct pin_read){.pin = pin, .barrier = pin->live ? pin->s->durable_no : pin->barrier, .done = done, .arg = arg};
    return q;
}

static bool stale(const struct store_pin *pin)
{
    const struct figures *now = &pin->r->durable;
    return pin->live && (!pin->r->bound || (now->epoch != pin->epoch && !id_same(&now->writer, &pin->owner)));
}

static void read_add(struct pin_read *q)
{
    struct store_pin *pin = q->pin;
    struct store *s = pin->s;
    pin->jobs++;
    s->jobs++;
    q->err = stale(pin) ? -ESTALE : 0;
    bool there = q->barrier <= s->applied_no && !s->failed && !q->err;
    if (there)
        read_at_once(q);
    if (there && !q->whole) {
        read_start(q);
        return;
    }
    struct pin_read **at = &s->pin_waiting;
    while (*at)
        at = &(*at)->next;
    *at = q;
    store_wake(s);
}

void volume_pin_read(struct store_pin *pin, uint64_t offset, uint32_t len, uint32_t room,
                     void (*done)(void *arg, int err, struct buf *data), void *arg)
{
    struct pin_read *q = read_new(pin, done, arg);
    q->offset = offset;
    q->len = len;
    q->room = room;
    read_add(q);
}

struct buf *volume_pin_read_now(struct store_pin *pin, uint64_t offset, uint32_t len, uint32_t room)
{
    struct store *s = pin->s;
    struct pin_read q = {.pin = pin, .offset = offset, .len = len, .room = room};
    uint64_t barrier = pin->live ? s->durable_no : pin->barrier;
    if (barrier > s->applied_no || s->failed || stale(pin))
        return NULL;
    read_at_once(&q);
    if (q.whole)
        return q.data;
    buf_drop(q.data);
    return NULL;
}

int volume_pin_extents(struct store_pin *pin, uint64_t offset, uint32_t len,
                       void (*done)(void *arg, int err, struct buf *extents), void *arg)
{
    struct pin_read *q = read_new(pin, done, arg);
    q->extents = true;
    q->offset = offset;
    q->len = len;
    read_add(q);
    return 0;
}

void volume_pin_hash(struct store_pin *pin, unsigned level, uint64_t first, uint32_t count, bool fresh,
                     void (*done)(void *arg, int err, struct buf *data), void *arg)
{
    struct pin_read *q = read_new(pin, done, arg);
    q->hash = true;
    tree_read_init(&q->tree, pin, level, first, count, fresh);
    read_add(q);
}

int volume_pin_changed(struct store_pin *pin, struct store_pin *later,
                       void (*done)(void *arg, int err, struct buf *data), void *arg)
{
    if (pin->r != later->r || later->barrier < pin->barrier)
        return -ESTALE;
    struct pin_read *q = read_new(pin, done, arg);
    q->changed = true;
    q->barrier = later->barrier; /* all that was overwritten until then has been saved */
    q->offset = pages_of(pin->size < later->size ? pin->size : later->size);
    read_add(q);
    return 0;
}

int store_pin(struct store *s, const char *name, struct store_pin **out, struct frame_entry *e)
{
    int err = store_lookup(s, name, e, NULL, NULL);
    if (err)
        return err;
    struct store_pin *pin = calloc(1, sizeof *pin);
    if (!pin)
        return -ENOMEM;
    struct region *r = name_find(s, name)->durable;
    *pin = (struct store_pin){.s = s,
                              .r = region_hold(r),
                              .size = r->durable.size,
                              .barrier = s->durable_no,
                              .epoch = r->durable.epoch,
                              .jobs = 1,
                              .side = -1,
                              .next = r->pins};
    r->pins = pin;
    *out = pin;
    return 0;
}

int volume_pin_live(struct store_pin *pin, const struct id *owner)
{
    pin->live = true;
    pin->owner = *owner;
    return 0;
}

void volume_unpin(struct store_pin *pin)
{
    for (struct store_pin **at = &pin->r->pins; *at; at = &(*at)->next)
        if (*at == pin) {
            *at = pin->next;
            break;
        }
    __atomic_store_n(&pin->dropped, true, __ATOMIC_RELAXED); /* jobs look at it */
    store_wake(pin->s);
    pin_release(pin);
}
