/* Checkpoints: what is applied is synced, the table saved, the journal free up to there. One job at a time; epochs go
 * on being committed and applied while it runs. The last one, at closing, also lets the files rest. */
#include "agent/store/inside.h"

#include "agent/base/job.h"
#include "agent/base/log.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

struct checkpoint {
    struct store *s;
    struct region **dirty;
    size_t dirty_len;
    struct spill_mark *spills;
    struct waiter *waiters;
    void *meta;
    size_t meta_len;
    uint64_t seq;
    bool last;
    struct name **names; /* at the last one: a list for rest */
    size_t names_len;
    int err;
    bool unsynced;
};

static void rest_names(struct checkpoint *c)
{
    struct volume *v = c->s->volume;
    for (size_t i = 0; i < c->names_len; i++)
        if (c->names[i]->durable && v->ops->rest(v, c->names[i]->text, c->names[i]->durable->file) < 0)
            log_warn("%s is not shown in %s: its content stays in .memsync/data until the next start",
                     c->names[i]->text, v->ops->dir(v));
}

static void checkpoint_work(void *arg)
{
    struct checkpoint *c = arg;
    struct volume *v = c->s->volume;
    for (size_t i = 0; i < c->dirty_len && !c->err; i++) {
        pthread_rwlock_wrlock(&c->dirty[i]->lock);
        int fd = region_open(c->s, c->dirty[i], false);
        bool gone = c->dirty[i]->gone;
        fd = fd < 0 ? fd : dup(fd);
        pthread_rwlock_unlock(&c->dirty[i]->lock);
        if (fd < 0 && gone)
            continue;
        if (fd < 0 || fdatasync(fd) < 0) {
            c->err = -errno;
            c->unsynced = true;
        }
        if (fd >= 0)
            close(fd);
        store_step("sync a file");
    }
    if (!c->err)
        c->err = v->ops->files_sync(v);
    if (!c->err)
        c->err = v->ops->names_sync(v);
    if (!c->err)
        c->err = v->ops->save(v, c->meta, c->meta_len);
    for (struct spill_mark *m = c->spills; m && !c->err; m = m->next)
        c->err = v->ops->spill_remove(v, m->number);
    if (!c->err && c->last)
        rest_names(c);
}

static void clean_fd(struct store *s, struct region *r)
{
    if (!s->volume->ops->lasting || r->dirty || r->pins || s->finishing || pthread_rwlock_trywrlock(&r->lock))
        return;
    int fd = r->fd;
    r->fd = -1;
    pthread_rwlock_unlock(&r->lock);
    if (fd >= 0)
        fd_close_later(s, fd);
}

void waiters_tell(struct waiter *w)
{
    for (struct waiter *next; w; w = next) {
        next = w->next;
        w->done(w->arg);
        free(w);
    }
}

/* What the checkpoint's result means; frees it and returns who waits for it. */
static struct waiter *checkpoint_settle(struct store *s, struct checkpoint *c)
{
    s->checkpointing = false;
    if (c->unsynced || (c->err && c->err != -ENOSPC && c->err != -EDQUOT))
        store_fail(s, "the files cannot be synced", c->err);
    else if (c->err) {
        log_error("the store's disk is full while its table is saved: no more epochs are taken until there is room");
        s->unsaved = s->want_checkpoint = true;
    } else
        journal_trim(&s->journal, c->seq);
    for (size_t i = 0; i < c->dirty_len; i++) {
        struct region *r = c->dirty[i];
        if (c->err)
            region_dirty(s, r);
        else
            clean_fd(s, r);
        region_drop(s, r);
    }
    for (struct spill_mark *m = c->spills, *next; m; m = next) {
        next = m->next;
        free(m); /* after an error the file stays until the next start */
    }
    struct waiter *waiters = c->waiters;
    free(c->dirty);
    free(c->meta);
    free(c->names);
    free(c);
    return waiters;
}

static void checkpoint_done(void *arg)
{
    struct checkpoint *c = arg;
    struct store *s = c->s;
    bool last = c->last;
    s->finishing = last; /* no more jobs, not even to close a descriptor */
    waiters_tell(checkpoint_settle(s, c));
    if (last)
        store_finish(s);
    else
        store_pump(s);
}

static struct checkpoint *checkpoint_new(struct store *s, bool last)
{
    struct checkpoint *c = calloc(1, sizeof *c);
    if (!c)
        return NULL;
    c->s = s;
    c->last = last;
    c->seq = s->applied_seq;
    c->meta = meta_put(s, c->seq + 1, journal_next(&s->journal, c->seq), &c->meta_len);
    if (last)
        c->names = malloc(s->names_len * sizeof *c->names + 1);
    if (!c->meta || (last && !c->names)) {
        free(c->meta);
        free(c->names);
        free(c);
        return NULL;
    }
    if (last && s->names_len)
        memcpy(c->names, s->names, (c->names_len = s->names_len) * sizeof *c->names);
    c->dirty = s->dirty;
    c->dirty_len = s->dirty_len;
    s->dirty = NULL;
    s->dirty_len = s->dirty_cap = 0;
    for (size_t i = 0; i < c->dirty_len; i++)
        c->dirty[i]->dirty = false; /* what is applied from now on is the next one's */
    for (struct spill_mark **at = &s->spills, *m; (m = *at);)
        if (m->seq <= c->seq) {
            *at = m->next;
            m->next = c->spills;
            c->spills = m;
        } else
            at = &m->next;
    c->waiters = s->checkpoint_waiters;
    s->checkpoint_waiters = NULL;
    return c;
}

void checkpoint_start(struct store *s, bool last)
{
    struct checkpoint *c = checkpoint_new(s, last);
    if (!c)
        return;
    s->want_checkpoint = false;
    s->checkpointing = true;
    if (job_run(s->loop, checkpoint_work, checkpoint_done, c) < 0) {
        c->err = -ENOMEM;
        checkpoint_done(c);
    }
}

int checkpoint_now(struct store *s)
{
    struct checkpoint *c = checkpoint_new(s, false);
    if (!c)
        return -ENOMEM;
    checkpoint_work(c);
    int err = c->err;
    checkpoint_settle(s, c);
    return err;
}

void store_checkpoint(struct store *s, void (*done)(void *arg), void *arg)
{
    struct waiter *w = malloc(sizeof *w);
    if (!w)
        abort(); /* see read_new */
    *w = (struct waiter){.done = done, .arg = arg, .next = s->checkpoint_waiters};
    s->checkpoint_waiters = w;
    store_wake(s);
}
