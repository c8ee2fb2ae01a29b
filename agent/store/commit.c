/* The way of a committed transaction, all of it driven by store_pump on the loop thread:
 *
 *   queue --------------------> batch (one job) -----------> applying ---------------> freed
 *     |  large ones: files        | make room, write           | one job (apply_job.c):
 *     |  synced before that       | the record, fdatasync      | files, names
 *     v                           v
 *   refused <---------------------+    told from the loop; what depends on it is checked anew
 *
 *   checkpoint (one job), when the journal is half full: sync changed files, save the table, free the journal up to
 *   there
 *
 * Order: an epoch waits for those before it in its chain or on the same names and regions; others pass one whose
 * spilled pages are still being synced. A full disk while applying stops everything but the retry timer, and new epochs
 * are refused until it is over: acknowledged ones stay in the journal. */
#include "agent/store/inside.h"

#include "agent/base/job.h"
#include "agent/base/log.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define BATCH_MAX 256
#define BATCH_BYTES (8u << 20)
#define UNAPPLIED_MAX (32u << 20)
#define RETRY_MS 500
#define DIRTY_MAX 512u

void store_fail(struct store *s, const char *what, int err)
{
    if (s->failed)
        return;
    s->failed = true;
    const char *dir = s->volume->ops->dir(s->volume);
    snprintf(s->failure, STORE_ERROR, "the store %.250s takes no more epochs until it is opened again: %.120s: %s",
             dir ? dir : "mem:", what, strerror(-err));
    log_error("%s", s->failure);
}

/* t->err and t->error say why. */
static void refused_as_said(struct store_txn *t)
{
    txns_push(&t->s->refused, t);
    store_wake(t->s);
}

static void refused(struct store_txn *t, int err, const char *text)
{
    if (!t->err) {
        t->err = err;
        snprintf(t->error, STORE_ERROR, "%s", text);
    }
    refused_as_said(t);
}

static void discard_work(void *arg)
{
    struct store_txn *t = arg;
    const struct volume_ops *ops = t->s->volume->ops;
    for (size_t i = 0; i < t->parts_len; i++) {
        struct region *r = t->parts[i]->r;
        if (!t->parts[i]->created)
            continue;
        pthread_rwlock_wrlock(&r->lock);
        if (r->fd >= 0) {
            ops->file_remove(t->s->volume, r->file);
            close(r->fd);
            r->fd = -1;
            r->gone = true;
        }
        pthread_rwlock_unlock(&r->lock);
    }
    if (t->spill_fd >= 0)
        ops->spill_remove(t->s->volume, t->spill);
}

static void discard_done(void *arg)
{
    struct store_txn *t = arg;
    struct store *s = t->s;
    txn_free(t);
    s->jobs--;
    store_pump(s);
}

void txn_discard(struct store_txn *t)
{
    bool on_disk = t->spill_fd >= 0;
    for (size_t i = 0; i < t->parts_len; i++)
        on_disk = on_disk || (t->parts[i]->created && t->parts[i]->r->fd >= 0);
    if (on_disk && job_run(t->s->loop, discard_work, discard_done, t) == 0)
        t->s->jobs++;
    else
        txn_free(t);
}

void volume_txn_abort(struct store_txn *t)
{
    t->aborted = true;
    if (!t->spilling) /* else that job's end is its end */
        txn_discard(t);
}

/* Whether an epoch of the same chain, handed in before, is about to be refused. */
static bool chain_broken(const struct store *s, const struct store_txn *t)
{
    for (const struct store_txn *o = s->refused.first; o; o = o->next)
        if (o->chain == t->chain)
            return true;
    for (const struct store_txn *o = s->queue.first; o; o = o->next)
        if (o->chain == t->chain && o->err)
            return true;
    return false;
}

static void jobs_start(struct store *s);

void volume_txn_commit(struct store_txn *t, void (*durable)(void *arg, int err, const char *text), void *arg)
{
    struct store *s = t->s;
    char error[STORE_ERROR];
    t->durable = durable;
    t->durable_arg = arg;
    t->committed_at = (int64_t)time(NULL);
    if (t->err) {
        refused_as_said(t);
        return;
    }
    int err;
    if (s->failed || s->closing) {
        err = -EIO;
        snprintf(error, sizeof error, "%s", s->failed ? s->failure : "the store is being closed");
    } else if (s->retrying || s->unsaved) {
        err = -ENOSPC;
        snprintf(error, sizeof error, "the store's disk is full: earlier epochs wait for room");
    } else if (chain_broken(s, t)) {
        err = -EEXIST;
        snprintf(error, sizeof error, "the epoch before failed");
    } else
        err = txn_check(t, error);
    if (err) {
        refused(t, err, error);
        return;
    }
    t->committed = true;
    txns_push(&s->queue, t);
    spill_start(t);
    jobs_start(s);
}

/* Files of a large transaction reach the disk before its record names them. */
static void ready_work(void *arg)
{
    struct store_txn *t = arg;
    const struct volume_ops *ops = t->s->volume->ops;
    int err = 0;
    for (size_t i = 0; !err && ops->lasting && i < t->parts_len; i++)
        if (t->parts[i]->direct && fdatasync(t->parts[i]->r->fd) < 0)
            err = -errno;
    if (!err && ops->lasting && t->spill_fd >= 0 && fdatasync(t->spill_fd) < 0)
        err = -errno;
    if (!err)
        err = ops->files_sync(t->s->volume);
    store_step("sync a large epoch");
    if (err) {
        t->err = err;
        snprintf(t->error, STORE_ERROR, "a large epoch cannot be synced: %s", strerror(-err));
    }
}

static void ready_done(void *arg)
{
    struct store_txn *t = arg;
    struct store *s = t->s;
    t->spilling = false;
    t->ready = true;
    s->jobs--;
    store_pump(s);
}

static bool is_ready(struct store_txn *t)
{
    struct store *s = t->s;
    if (t->err || t->spilling)
        return false;
    if (!t->large || t->ready)
        return true;
    if (t->memory) /* the rest of it is about to be spilled */
        return false;
    t->spilling = true;
    if (job_run(s->loop, ready_work, ready_done, t) < 0) {
        t->spilling = false;
        t->err = -ENOMEM;
    } else
        s->jobs++;
    return false;
}

static void block(struct store *s, const struct store_txn *t)
{
    for (size_t i = 0; i < t->bindings_len; i++)
        t->bindings[i].name->blocked = s->batch_no;
    for (size_t i = 0; i < t->parts_len; i++)
        if (t->parts[i]->from)
            t->parts[i]->from->blocked = s->batch_no;
    for (size_t i = 0; i < t->slots_len; i++)
        t->slots[i].name->blocked = s->batch_no;
}

static bool blocked(const struct store *s, const struct store_txn *t, const struct txns *skipped)
{
    for (const struct store_txn *o = skipped->first; o; o = o->next)
        if (o->chain == t->chain)
            return true;
    for (size_t i = 0; i < t->bindings_len; i++)
        if (t->bindings[i].name->blocked == s->batch_no)
            return true;
    for (size_t i = 0; i < t->slots_len; i++)
        if (t->slots[i].name->blocked == s->batch_no)
            return true;
    return false;
}

struct batch {
    struct store *s;
    struct store_txn *txns[BATCH_MAX];
    size_t deltas;  /* up to and with the last one that has deltas */
    size_t n, good; /* good: how many of them got room */
    uint64_t pos, len, unapplied;
    int err;       /* of txns[good] */
    int write_err; /* of the record */
    bool unsynced;
    char error[STORE_ERROR];
};

static bool share_region(const struct store_txn *t, const struct store_txn *o)
{
    for (size_t i = 0; i < t->parts_len; i++)
        for (size_t k = 0; k < o->parts_len; k++)
            if (t->parts[i]->r == o->parts[k]->r)
                return true;
    return false;
}

/* Whether a later one of the batch may have deltas of what this one writes. */
static bool is_base(const struct batch *b, size_t of)
{
    for (size_t i = of + 1; i < b->deltas; i++)
        if (b->txns[i]->deltas && share_region(b->txns[i], b->txns[of]))
            return true;
    return false;
}

static void batch_work(void *arg)
{
    struct batch *b = arg;
    struct store *s = b->s;
    uint64_t unapplied = b->unapplied;
    struct bases *bases = b->deltas ? bases_new() : NULL;
    for (; b->good < b->n; b->good++) {
        b->err = apply_verify(s, bases, b->txns[b->good], is_base(b, b->good), b->error);
        if (!b->err)
            b->err = apply_reserve(s, b->txns[b->good], unapplied, b->error);
        if (b->err)
            break;
        unapplied += b->txns[b->good]->data;
    }
    bases_free(bases);
    if (b->good && s->volume->ops->lasting)
        b->write_err = journal_write(&s->journal, b->pos, b->txns, b->good, &b->len, &b->unsynced);
}

static void told_durable(struct store_txn *t)
{
    t->spilled = NULL; /* whom it told is gone after this */
    if (t->durable)
        t->durable(t->durable_arg, 0, "");
}

/* Heads as they are on disk, then what waits is checked again, in its order; what no longer stands is refused. */
static void requeue(struct store *s, struct txns *waiting)
{
    for (size_t i = 0; i < s->names_len; i++)
        s->names[i]->head = s->names[i]->durable;
    for (size_t i = 0; i < sizeof s->by_file / sizeof *s->by_file; i++)
        for (struct region *r = s->by_file[i]; r; r = r->chain)
            r->head = r->durable;
    struct txns all = *waiting;
    s->queue = (struct txns){0};
    for (struct store_txn *t; (t = txns_pop(&all));) {
        char error[STORE_ERROR] = "";
        int err = t->err;
        if (!err && chain_broken(s, t)) {
            t->err = err = -EEXIST;
            snprintf(t->error, STORE_ERROR, "the epoch before failed");
        }
        if (!err)
            err = txn_check(t, error);
        if (!err || t->spilling) /* one with an error waits for its job only */
            txns_push(&s->queue, t);
        else
            refused(t, err, error);
    }
}

static void batch_done(void *arg)
{
    struct batch *b = arg;
    struct store *s = b->s;
    s->committing = false;
    size_t durable = b->write_err ? 0 : b->good;
    if (durable && s->volume->ops->lasting) {
        int err = journal_wrote(&s->journal, b->pos, b->len);
        if (err)
            store_fail(s, "no memory to follow the journal", err);
    }
    if (b->write_err && (b->unsynced || b->write_err != -ENOSPC))
        store_fail(s, b->unsynced ? "the journal cannot be synced" : "the journal cannot be written", b->write_err);
    for (size_t i = 0; i < durable; i++) {
        struct store_txn *t = b->txns[i];
        t->number = ++s->durable_no;
        t->seq = s->journal.seq - 1;
        s->unapplied += t->data;
        s->unapplied_memory += t->memory;
        txn_durable(t);
        for (size_t k = 0; k < t->bindings_len; k++)
            t->bindings[k].name->pending++;
        txns_push(&s->applying, t);
    }
    if (durable < b->n) {
        struct txns again = {0};
        for (size_t i = durable; i < b->n; i++) {
            struct store_txn *t = b->txns[i];
            if (b->write_err)
                refused(t, b->write_err == -ENOSPC ? -ENOSPC : -EIO,
                        s->failed ? s->failure : "the journal's disk is full");
            else if (i == b->good)
                refused(t, b->err, b->error);
            else
                txns_push(&again, t);
        }
        for (struct store_txn *t; (t = txns_pop(&s->queue));)
            txns_push(&again, t);
        requeue(s, &again);
    }
    for (size_t i = 0; i < durable; i++)
        told_durable(b->txns[i]);
    free(b);
    store_pump(s);
}

/* What stands in the way of a name is looked for only where nothing of ours is, or is about to go. */
static void binding_look(const struct store *s, struct binding *b)
{
    b->look = !name_clash(s, b->name->text, SIDE_DISK);
    b->fresh = b->look && !b->name->durable && !b->name->pending;
}

/* Deltas are checked against files: all that comes before must be in them, or be easily laid over them. */
static bool base_missing(const struct store *s, const struct batch *b, const struct store_txn *t)
{
    for (const struct store_txn *o = s->applying.first; o && t->deltas; o = o->next)
        if (share_region(t, o))
            return true;
    for (size_t i = 0; i < b->n && t->deltas; i++)
        if (share_region(t, b->txns[i]) && !bases_simple(b->txns[i]))
            return true;
    return false;
}

static void batch_start(struct store *s)
{
    struct batch *b = calloc(1, sizeof *b);
    if (!b)
        return;
    b->s = s;
    b->unapplied = s->unapplied;
    s->batch_no++;
    uint64_t body = 0;
    bool full = false;
    struct txns rest = {0};
    for (struct store_txn *t; (t = txns_pop(&s->queue));) {
        uint64_t len = record_length(t);
        bool wait = !is_ready(t) || full || base_missing(s, b, t) || blocked(s, t, &rest) || b->n == BATCH_MAX ||
                    (b->n && body + len > BATCH_BYTES);
        if (!wait && s->volume->ops->lasting && !journal_place(&s->journal, journal_length(body + len), &b->pos)) {
            s->want_checkpoint = wait = full = true; /* none may pass it, or it might wait for ever */
            if (journal_length(len) > s->journal.size) {
                t->err = -ENOBUFS;
                snprintf(t->error, STORE_ERROR, "an epoch of so many regions does not fit into the store's journal");
                store_wake(s);
            }
        }
        if (wait) {
            block(s, t);
            txns_push(&rest, t);
            continue;
        }
        for (size_t i = 0; i < t->bindings_len; i++)
            binding_look(s, &t->bindings[i]);
        body += len;
        b->txns[b->n++] = t;
        if (t->deltas)
            b->deltas = b->n;
    }
    s->queue = rest;
    if (b->n && s->volume->ops->lasting)
        journal_place(&s->journal, journal_length(body), &b->pos);
    if (!b->n) {
        free(b);
        return;
    }
    if (job_run(s->loop, batch_work, batch_done, b) < 0) {
        b->write_err = -ENOMEM;
        batch_done(b);
        return;
    }
    s->committing = true;
}

static void retry_now(uv_timer_t *timer)
{
    struct store *s = timer->data;
    if (s->unsaved) {
        s->unsaved = false;
        store_pump(s);
    }
    if (s->applying.first && !s->apply_busy && !s->failed)
        apply_start(s);
}

static void refused_tell(struct store *s)
{
    for (struct store_txn *t; (t = txns_pop(&s->refused));) {
        t->spilled = NULL;
        if (t->durable)
            t->durable(t->durable_arg, t->err, t->error);
        txn_discard(t);
    }
}

static void handle_closed(uv_handle_t *h)
{
    struct store *s = h->data;
    if (--s->handles)
        return;
    void (*closed)(void *) = s->closed;
    void *arg = s->closed_arg;
    store_free(s);
    closed(arg);
}

void store_finish(struct store *s)
{
    s->finishing = true;
    s->handles = 2;
    uv_close((uv_handle_t *)&s->wake, handle_closed);
    uv_close((uv_handle_t *)&s->retry, handle_closed);
}

static bool spoiled(const struct store *s)
{
    for (const struct store_txn *t = s->queue.first; t; t = t->next)
        if (t->err && !t->spilling)
            return true;
    return s->queue.first && (s->failed || s->unsaved || s->retrying);
}

static void queue_check(struct store *s)
{
    if (!spoiled(s) || s->committing)
        return;
    struct txns all = s->queue, again = {0};
    for (struct store_txn *t; (t = txns_pop(&all));) {
        if (!t->err && !t->spilling) {
            t->err = s->failed ? -EIO : s->unsaved || s->retrying ? -ENOSPC : 0;
            snprintf(t->error, STORE_ERROR, "%s",
                     s->failed ? s->failure : "the store's disk is full: earlier epochs wait for room");
        }
        if (t->err && !t->spilling)
            refused_as_said(t);
        else
            txns_push(&again, t);
    }
    requeue(s, &again);
}

static void close_pump(struct store *s)
{
    if (s->queue.first || s->committing || s->apply_busy || s->checkpointing || s->jobs || s->refused.first ||
        s->finishing)
        return;
    if (s->applying.first && !s->failed && !s->retrying)
        return;
    if (s->failed || s->retrying || s->unsaved ||
        !s->volume->ops->lasting) { /* the journal keeps what is not in the files */
        waiters_tell(s->checkpoint_waiters);
        s->checkpoint_waiters = NULL;
        store_finish(s);
    } else
        checkpoint_start(s, true);
}

static void jobs_start(struct store *s)
{
    if (!s->committing && !s->failed && s->queue.first && s->unapplied_memory < UNAPPLIED_MAX && !s->retrying)
        batch_start(s);
    if (!s->apply_busy && !s->failed && !s->retrying && s->applying.first)
        apply_start(s);
}

void store_pump(struct store *s)
{
    if (s->finishing)
        return;
    queue_check(s);
    spills_resume(s);
    jobs_start(s);
    const struct journal *j = &s->journal;
    bool full = s->retrying || s->unsaved;
    if (full && !uv_is_active((uv_handle_t *)&s->retry))
        uv_timer_start(&s->retry, retry_now, RETRY_MS, RETRY_MS);
    else if (!full)
        uv_timer_stop(&s->retry);
    if (j->used > j->size / 2 || s->dirty_len > DIRTY_MAX)
        s->want_checkpoint = true;
    bool news = j->marks_len && j->marks[0].seq <= s->applied_seq;
    bool asked = s->checkpoint_waiters && !s->applying.first && !s->queue.first && !s->committing;
    if (s->volume->ops->lasting && !s->checkpointing && !s->failed && !s->unsaved &&
        ((s->want_checkpoint && news) || (asked && !s->closing)))
        checkpoint_start(s, false);
    else if (asked && (!s->volume->ops->lasting || s->failed || s->unsaved)) {
        struct waiter *w = s->checkpoint_waiters;
        s->checkpoint_waiters = NULL;
        waiters_tell(w);
    }
    pins_applied(s);
    if (s->refused.first)
        store_wake(s);
    if (s->closing)
        close_pump(s);
}

/* The loop's turn for what must not be told from within a call. */
void store_woken(struct store *s)
{
    store_credits(s);
    refused_tell(s);
    store_pump(s);
}
