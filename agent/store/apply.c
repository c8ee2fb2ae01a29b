/* Epochs into files, on worker threads. Two jobs: making room before the journal record is written, and applying after.
 *
 * Room: an epoch must not be acknowledged if its files cannot take it. Far from a full disk it is enough to ask how
 * much is free; near it (ROOM_MARGIN) the extents are allocated beforehand. Should applying still meet a full disk
 * (another program was faster), commit.c keeps the epoch in the journal and tries again, and takes no more epochs until
 * it fits.
 *
 * A region is cut to the epoch's min_size, made its size, then gets its pages; before each change pinned pages are saved
 * and the region's hash tree is told. All of it can be done again. */
#include "agent/store/inside.h"

#include "agent/base/log.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define ROOM_MARGIN (64u << 20)
#define ZERO_STEP (16u << 20)
#define ZERO_PUNCH (64u << 10) /* shorter runs of zeros are written: a hole would only have to be filled again */

struct applying {
    struct store *s;
    const struct pinned *pinned;
};

static int save_pinned(const struct applying *a, struct part *p, uint64_t number, int fd, uint64_t from, uint64_t to)
{
    for (size_t i = 0; a->pinned && i < a->pinned->len; i++) {
        struct store_pin *pin = a->pinned->pins[i];
        int err = pin->r == p->r && pin->barrier < number ? pin_save(pin, fd, from, to) : 0;
        if (err)
            return err;
    }
    return 0;
}

static int zeros_write(int fd, uint64_t len, uint64_t offset)
{
    static const uint8_t zeros[64 << 10];
    int err = 0;
    for (uint64_t step; !err && len; len -= step, offset += step) {
        step = len < sizeof zeros ? len : sizeof zeros;
        err = io_write(fd, zeros, (size_t)step, offset);
    }
    return err;
}

int file_zero(int fd, uint64_t len, uint64_t offset)
{
    if (len >= ZERO_PUNCH && fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)len) == 0)
        return 0;
    if (len >= ZERO_PUNCH && errno != EOPNOTSUPP)
        return -errno;
    return zeros_write(fd, len, offset);
}

struct content {
    struct applying *a;
    uint64_t number;
};

static int apply_extent(void *arg, struct part *p, const struct frame_extent *e)
{
    const struct content *c = arg;
    int err = 0;
    uint64_t step;
    for (uint64_t done = 0; !err && done < e->len; done += step) {
        step = e->len - done < ZERO_STEP ? e->len - done : ZERO_STEP;
        uint64_t at = e->offset + done;
        pthread_rwlock_wrlock(&p->r->lock);
        int fd = region_open(c->a->s, p->r, false);
        err = fd < 0 ? fd : save_pinned(c->a, p, c->number, fd, at, at + step);
        (e->data ? tree_wrote : tree_zeroed)(p->r, at, at + step);
        if (!err)
            err = e->data ? io_write(fd, e->data + done, (size_t)step, at) : file_zero(fd, step, at);
        pthread_rwlock_unlock(&p->r->lock);
        store_step("apply pages");
    }
    return err;
}

static int cut(const struct applying *a, struct part *p, uint64_t number, int fd, uint64_t size)
{
    struct stat st;
    if (fstat(fd, &st) < 0)
        return -errno;
    uint64_t now = (uint64_t)st.st_size;
    if (size == now)
        return 0;
    int err = save_pinned(a, p, number, fd, size, now);
    tree_sized(p->r, size);
    if (!err && ftruncate(fd, (off_t)size) < 0)
        err = -errno;
    store_step("apply a size");
    return err;
}

static int apply_sizes(struct applying *a, struct part *p, uint64_t number)
{
    pthread_rwlock_wrlock(&p->r->lock);
    int fd = region_open(a->s, p->r, p->created && !p->direct);
    int err = fd < 0 ? fd : 0;
    uint64_t least = !p->created ? p->min_size : p->direct ? UINT64_MAX : 0;
    struct stat st;
    if (!err && fstat(fd, &st) < 0)
        err = -errno;
    if (!err && least < (uint64_t)st.st_size)
        err = cut(a, p, number, fd, least);
    if (!err)
        err = cut(a, p, number, fd, p->size);
    pthread_rwlock_unlock(&p->r->lock);
    return err;
}

int apply_content(struct store *s, struct store_txn *t, const struct pinned *pinned)
{
    struct applying a = {.s = s, .pinned = pinned};
    for (size_t i = 0; i < t->parts_len; i++) {
        struct part *p = t->parts[i];
        int err = p->r && p->stated ? apply_sizes(&a, p, t->number) : 0;
        if (err)
            return err;
    }
    return txn_pages(t, PAGES_CLIPPED, apply_extent, &(struct content){.a = &a, .number = t->number});
}

static bool no_room(int err)
{
    return err == -ENOSPC || err == -EDQUOT;
}

/* A name in whose way somebody has put something is only not shown: its content is in the volume, and the next start
 * tries again. */
int name_apply(struct store *s, const char *name, uint64_t file)
{
    const struct volume_ops *ops = s->volume->ops;
    int err = file ? ops->show(s->volume, name, file) : ops->hide(s->volume, name);
    if (!err || no_room(err))
        return err;
    log_warn("region %s cannot be %s in %s: %s", name, file ? "shown" : "removed", ops->dir(s->volume), strerror(-err));
    return 0;
}

static int apply_names(struct store *s, const struct store_txn *t)
{
    int err = 0;
    for (size_t i = 0; !err && i < t->bindings_len; i++)
        if (t->bindings[i].part < 0)
            err = name_apply(s, t->bindings[i].name->text, 0);
    for (size_t i = 0; !err && i < t->bindings_len; i++)
        if (t->bindings[i].part >= 0)
            err = name_apply(s, t->bindings[i].name->text, t->parts[t->bindings[i].part]->r->file);
    return err;
}

/* A pinned region stays readable by the descriptor it is opened by here at the latest. */
static int bury(struct store *s, struct region *r, const struct pinned *pinned)
{
    bool wanted = false;
    for (size_t i = 0; pinned && i < pinned->len; i++)
        wanted = wanted || pinned->pins[i]->r == r;
    pthread_rwlock_wrlock(&r->lock);
    int err = 0;
    if (wanted && !r->gone) {
        int fd = region_open(s, r, false);
        err = fd < 0 ? fd : 0;
    }
    if (!err)
        err = s->volume->ops->file_remove(s->volume, r->file);
    if (!err)
        r->gone = true;
    if (!err && !wanted && r->fd >= 0) {
        close(r->fd);
        r->fd = -1;
    }
    pthread_rwlock_unlock(&r->lock);
    return err;
}

int apply_txn(struct store *s, struct store_txn *t, const struct pinned *pinned)
{
    int err = apply_content(s, t, pinned);
    if (!err)
        err = apply_names(s, t);
    for (size_t i = 0; !err && i < t->dead_len; i++)
        err = bury(s, t->dead[i], pinned);
    return err;
}

static int reserve_extent(void *arg, struct part *p, const struct frame_extent *e)
{
    struct store *s = arg;
    if (!e->data)
        return 0;
    pthread_rwlock_wrlock(&p->r->lock);
    int fd = region_open(s, p->r, p->created);
    int err = fd < 0 ? fd : 0;
    off_t hole = err ? 0 : lseek(fd, (off_t)e->offset, SEEK_HOLE);
    if (!err && hole < (off_t)(e->offset + e->len)) { /* else it has its room already */
        if (s->volume->ops->space(s->volume) < e->len + STORE_TABLE_ROOM)
            err = -ENOSPC;
        else if (fallocate(fd, FALLOC_FL_KEEP_SIZE, (off_t)e->offset, e->len) < 0)
            err = -errno;
    }
    pthread_rwlock_unlock(&p->r->lock);
    return err;
}

/* Gives back what was allocated beyond the ends of files. */
static void unreserve(struct store_txn *t)
{
    for (size_t i = 0; i < t->parts_len; i++) {
        struct region *r = t->parts[i]->r;
        struct stat st;
        pthread_rwlock_wrlock(&r->lock);
        if (r->fd >= 0 && fstat(r->fd, &st) == 0 && ftruncate(r->fd, st.st_size) < 0)
            store_step("room could not be given back");
        pthread_rwlock_unlock(&r->lock);
    }
}

int apply_reserve(struct store *s, struct store_txn *t, uint64_t unapplied, char error[STORE_ERROR])
{
    const struct volume_ops *ops = s->volume->ops;
    int err = 0;
    for (size_t i = 0; !err && i < t->bindings_len; i++)
        if (t->bindings[i].part >= 0 && t->bindings[i].look)
            err = ops->vacant(s->volume, t->bindings[i].name->text, t->bindings[i].fresh, error);
    if (err)
        return err;
    for (size_t i = 0; i < t->parts_len; i++) {
        err = t->parts[i]->stated ? ops->fits(s->volume, t->parts[i]->size) : 0;
        if (err) {
            snprintf(error, STORE_ERROR, "a region of %llu bytes is longer than the store's file system takes",
                     (unsigned long long)t->parts[i]->size);
            return err == -EFBIG ? -ENOBUFS : err;
        }
    }
    uint64_t need = t->data + unapplied + (t->parts_len + t->bindings_len) * FRAME_PAGE;
    uint64_t space = ops->space(s->volume);
    if (space > ROOM_MARGIN && need < space - ROOM_MARGIN)
        return 0;
    err = txn_pages(t, PAGES_CLIPPED, reserve_extent, s);
    if (err == -EOPNOTSUPP)
        err = need < space ? 0 : -ENOSPC;
    if (err) {
        unreserve(t);
        snprintf(error, STORE_ERROR, "%.200s cannot take an epoch of %llu bytes: %s; %llu bytes are free",
                 ops->dir(s->volume) ? ops->dir(s->volume) : "the store", (unsigned long long)t->data, strerror(-err),
                 (unsigned long long)space);
    }
    return err;
}
