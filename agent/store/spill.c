/* Large epochs: pages to disk before the commit, and the windows of those who send them. Loop thread, but spill_work.
 *
 * Once a transaction's `memory` passes its limit the oldest frames go to disk, 4 MiB a job, one job at a time: those of
 * regions that it creates straight into their file, others into its spill file. Windows are opened (`spilled`) at once
 * while the transaction is small, and beyond that only as memory is freed. What is in memory at the commit goes into
 * the journal record; its spilled pages come before. */
#include "agent/store/inside.h"

#include "agent/base/job.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define SPILL_CHUNK (4u << 20)

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
    size_t len, bytes;
    uint64_t spilled; /* bytes appended to the spill file */
    int err;
};

static int direct_extent(void *arg, struct part *p, const struct frame_extent *e)
{
    const int *fd = arg;
    (void)p;
    if (!e->data) /* what is not there reads as zeros; what an earlier round put there has to go */
        return file_zero(*fd, e->len, e->offset);
    return io_write(*fd, e->data, e->len, e->offset);
}

static int spill_direct(struct store *s, struct part *p, const struct buf *b)
{
    pthread_rwlock_wrlock(&p->r->lock);
    int fd = region_open(s, p->r, true);
    pthread_rwlock_unlock(&p->r->lock);
    return fd < 0 ? fd : frame_extents(p, b->data, b->len, PAGES_WHOLE, direct_extent, &fd);
}

static void spill_work(void *arg)
{
    struct spill_job *j = arg;
    struct store_txn *t = j->t;
    struct store *s = t->s;
    if (s->volume->ops->space(s->volume) < j->bytes + STORE_TABLE_ROOM)
        j->err = -ENOSPC;
    for (size_t i = 0; i < j->len && !j->err; i++) {
        struct part *p = j->parts[i];
        const struct buf *b = j->held[i].buf;
        if (p->created) {
            j->err = spill_direct(s, p, b);
            continue;
        }
        if (t->spill_fd < 0 && (t->spill_fd = s->volume->ops->spill_open(s->volume, t->spill, true)) < 0) {
            j->err = t->spill_fd;
            break;
        }
        uint8_t head[SPILL_HEAD];
        put_u32(head, j->held[i].part);
        put_u32(head + 4, b->len);
        uint64_t at = t->spill_len + j->spilled;
        j->err = io_write(t->spill_fd, head, SPILL_HEAD, at);
        if (!j->err)
            j->err = io_write(t->spill_fd, b->data, b->len, at + SPILL_HEAD);
        j->spilled += SPILL_HEAD + b->len;
    }
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
    if (j->err && !t->err) {
        t->err = j->err;
        const char *dir = s->volume->ops->dir(s->volume);
        snprintf(t->error, STORE_ERROR, "%.250s cannot take a large epoch: %s", dir ? dir : "mem:", strerror(-j->err));
    }
    free(j->parts);
    free(j->held);
    free(j);
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

void spill_start(struct store_txn *t)
{
    size_t limit = txn_limit(t);
    if (t->spilling || t->aborted || t->err || t->memory <= (t->large && !t->durable ? limit - limit / 4 : limit))
        return;
    struct spill_job *j = calloc(1, sizeof *j);
    size_t most = t->held_len - t->held_first, n = 0;
    if (j) {
        j->t = t;
        j->parts = malloc(most * sizeof *j->parts);
        j->held = malloc(most * sizeof *j->held);
    }
    if (!j || !j->parts || !j->held)
        goto out;
    for (; n < most && j->bytes < SPILL_CHUNK; n++) {
        j->held[n] = t->held[t->held_first + n];
        struct part *p = j->parts[n] = t->parts[j->held[n].part];
        j->bytes += j->held[n].buf->len;
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
