/* Large epochs: pages to disk before the commit, and the windows of those who send them. Loop thread, but spill_work.
 *
 * Once a transaction's `memory` passes its limit it is large, and its frames go to disk as they come, in their order,
 * 1 to 4 MiB a job, one job at a time, and SPILLS of all transactions, so that there is always a thread for who
 * commits or reads: those of regions that it creates straight into their file, others into its spill file. Writing to
 * the disk is begun with each job, so that little is left to wait for at the commit. Windows are opened (`spilled`) at
 * once while the transaction is small, and beyond that only as memory is freed. At the commit the rest goes the same
 * way, and so does all of one with moved pages, however small (copy.c): nothing of a large epoch passes through the
 * journal but its head. If the process dies before that record is whole, the next start removes the files, which
 * nothing names. */
#include "agent/store/inside.h"

#include "agent/base/job.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define SPILL_CHUNK (4u << 20)
#define SPILLS 4u /* of the pool's 8 threads */
#define SPILL_LEAST (1u << 20) /* short enough to be in the processor's cache still */

void txn_credit(struct store_txn *t, size_t bytes)
{
    t->credit += bytes;
    if (!t->crediting && t->credit) {
        t->crediting = true;
        t->next_credit = t->s->credits;
        t->s->credits = t;
        store_wake(t->s);
    }
}

/* From the loop: gives back windows. A callback may abort its transaction, or others: the list is taken anew each time.
 */
void store_credits(struct store *s)
{
    for (struct store_txn *t; (t = s->credits);) {
        s->credits = t->next_credit;
        t->crediting = false;
        size_t bytes = t->credit;
        t->credit = 0;
        if (t->spilled && !t->aborted)
            t->spilled(t->arg, bytes);
    }
}

void txn_uncredit(struct store_txn *t)
{
    for (struct store_txn **at = &t->s->credits; t->crediting && *at; at = &(*at)->next_credit)
        if (*at == t) {
            *at = t->next_credit;
            t->crediting = false;
            return;
        }
}

size_t txn_limit(const struct store_txn *t)
{
    const struct limits *l = &t->s->limits;
    return t->s->memory > l->all_memory && l->txn_memory > 1u << 20 ? 1u << 20 : l->txn_memory;
}

struct spill_job {
    struct store_txn *t;
    struct part **parts;
    struct held *held;
    size_t len, bytes, room; /* room: what they become */
    uint64_t spilled; /* bytes appended to the spill file */
    int err;
};

/* What was written to one file and is not yet on its way to the disk. */
struct written {
    int fd; /* -1: none */
    uint64_t from, to;
};

static void written_add(struct written *w, uint64_t from, uint64_t len)
{
    if (from < w->from)
        w->from = from;
    if (from + len > w->to)
        w->to = from + len;
}

/* Starts it on its way. A hint: errors come out at the fdatasync before the commit. */
static void written_start(const struct store *s, const struct written *w)
{
    if (w->to > w->from && s->volume->ops->lasting)
        sync_file_range(w->fd, (off_t)w->from, (off_t)(w->to - w->from), SYNC_FILE_RANGE_WRITE);
}

static void written_turn(const struct store *s, struct written *w, int fd)
{
    if (fd == w->fd)
        return;
    written_start(s, w);
    *w = (struct written){.fd = fd, .from = UINT64_MAX};
}

static int direct_extent(void *arg, struct part *p, const struct frame_extent *e)
{
    struct written *w = arg;
    (void)p;
    if (!e->data) /* what is not there reads as zeros; what an earlier round put there has to go */
        return file_zero(w->fd, e->len, e->offset);
    written_add(w, e->offset, e->len);
    return io_write(w->fd, e->data, e->len, e->offset);
}

static int spill_direct(struct store *s, struct part *p, const struct buf *b, struct written *w)
{
    pthread_rwlock_wrlock(&p->r->lock);
    int fd = region_open(s, p->r, true);
    pthread_rwlock_unlock(&p->r->lock);
    if (fd < 0)
        return fd;
    written_turn(s, w, fd);
    return frame_extents(p, b->data, b->len, PAGES_WHOLE, direct_extent, w);
}

/* Where a frame's payloads go. */
struct append {
    struct spill_job *j;
    struct written *w;
    uint32_t part;
};

static int append(void *arg, const uint8_t *payload, uint32_t len)
{
    struct append *a = arg;
    struct store_txn *t = a->j->t;
    uint8_t head[SPILL_HEAD];
    put_u32(head, a->part);
    put_u32(head + 4, len);
    uint64_t at = t->spill_len + a->j->spilled;
    written_turn(t->s, a->w, t->spill_fd);
    written_add(a->w, at, SPILL_HEAD + len);
    a->j->spilled += SPILL_HEAD + len;
    int err = io_write(t->spill_fd, head, SPILL_HEAD, at);
    return err ? err : io_write(t->spill_fd, payload, len, at + SPILL_HEAD);
}

static int spill_held(struct spill_job *j, size_t i, struct written *w)
{
    struct store_txn *t = j->t;
    struct store *s = t->s;
    struct part *p = j->parts[i];
    const struct held *h = &j->held[i];
    if (p->created)
        return spill_direct(s, p, h->buf, w);
    if (t->spill_fd < 0 && (t->spill_fd = s->volume->ops->spill_open(s->volume, t->spill, true)) < 0)
        return t->spill_fd;
    struct append a = {.j = j, .w = w, .part = h->part};
    return h->copies ? copies_expand(s, p, h->buf, append, &a) : append(&a, h->buf->data, h->buf->len);
}

static void spill_work(void *arg)
{
    struct spill_job *j = arg;
    struct store *s = j->t->s;
    struct written w = {.fd = -1};
    if (s->volume->ops->space(s->volume) < j->room + STORE_TABLE_ROOM)
        j->err = -ENOSPC;
    for (size_t i = 0; i < j->len && !j->err; i++)
        j->err = spill_held(j, i, &w);
    written_start(s, &w);
    store_step("spill");
}

static void spill_done(void *arg)
{
    struct spill_job *j = arg;
    struct store_txn *t = j->t;
    struct store *s = t->s;
    for (size_t i = 0; i < j->len; i++)
        buf_drop(j->held[i].buf);
    t->memory -= j->bytes;
    s->memory -= j->bytes;
    t->spill_len += j->spilled;
    t->spilling = false;
    s->jobs--;
    s->spilling--;
    if (j->err && !t->err) {
        t->err = j->err;
        const char *dir = s->volume->ops->dir(s->volume);
        if (j->err == -EBADMSG)
            snprintf(t->error, STORE_ERROR, "a moved page is not what its writer has: whole pages are needed");
        else
            snprintf(t->error, STORE_ERROR, "%.250s cannot take a large epoch: %s", dir ? dir : "mem:", strerror(-j->err));
    }
    free(j->parts);
    free(j->held);
    free(j);
    spills_resume(s);
    if (t->aborted) {
        txn_discard(t);
        store_pump(s);
        return;
    }
    if (t->memory <= txn_limit(t)) {
        txn_credit(t, t->withheld);
        t->withheld = 0;
    }
    spill_start(t);
    store_pump(s);
}

/* What may stay in memory: nothing of a large transaction that is handed in. */
static size_t rests(const struct store_txn *t)
{
    size_t limit = txn_limit(t);
    if (!t->large)
        return limit;
    return t->committed ? 0 : limit < SPILL_LEAST ? limit : SPILL_LEAST;
}

/* For a thread; a frame of moved pages also for their base to be in the region's file (copy.c). */
static bool must_wait(const struct store_txn *t, const struct held *h)
{
    const struct part *p = t->parts[h->part];
    return t->s->spilling >= SPILLS || (h->copies && p->r->applied < p->base);
}

void spill_unwait(struct store_txn *t)
{
    for (struct store_txn **at = &t->s->waiting; t->waiting && *at; at = &(*at)->next_waiting)
        if (*at == t) {
            *at = t->next_waiting;
            t->waiting = false;
            return;
        }
}

void spills_resume(struct store *s)
{
    struct store_txn *all = s->waiting;
    s->waiting = NULL;
    for (struct store_txn *t; (t = all);) {
        all = t->next_waiting;
        t->waiting = false;
        spill_start(t);
    }
}

void spill_start(struct store_txn *t)
{
    if (t->spilling || t->aborted || t->err || t->memory <= rests(t) || t->waiting)
        return;
    if (must_wait(t, &t->held[t->held_first])) {
        struct store_txn **at = &t->s->waiting; /* in turns */
        while (*at)
            at = &(*at)->next_waiting;
        *at = t;
        t->waiting = true;
        t->next_waiting = NULL;
        return;
    }
    struct spill_job *j = calloc(1, sizeof *j);
    size_t most = t->held_len - t->held_first, n = 0;
    if (j) {
        j->t = t;
        j->parts = malloc(most * sizeof *j->parts);
        j->held = malloc(most * sizeof *j->held);
    }
    if (!j || !j->parts || !j->held)
        goto out;
    for (; n < most && j->room < SPILL_CHUNK && !must_wait(t, &t->held[t->held_first + n]); n++) {
        j->held[n] = t->held[t->held_first + n];
        struct part *p = j->parts[n] = t->parts[j->held[n].part];
        j->bytes += j->held[n].buf->len;
        j->room += j->held[n].buf->len + (size_t)j->held[n].copies * FRAME_PAGE;
        if (p->created)
            p->direct = true;
        else if (!t->spill)
            t->spill = t->s->next_spill++;
    }
    j->len = n;
    if (job_run(t->s->loop, spill_work, spill_done, j) < 0)
        goto out;
    t->held_first += n;
    t->spilling = t->large = true;
    t->s->jobs++;
    t->s->spilling++;
    return;
out:
    if (j) {
        free(j->parts);
        free(j->held);
    }
    free(j);
    t->err = -ENOMEM;
    snprintf(t->error, STORE_ERROR, "no memory to spill a large epoch");
}
