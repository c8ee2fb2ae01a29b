/* Committed transactions into the plain files: one job at a time takes the oldest of the apply queue, in their order,
 * with the pins that have to keep what is written over.
 *
 * What is here is acknowledged and in the journal: a death in between loses nothing, since recovery applies the records
 * again. So an error is nobody's refusal. A full disk leaves the rest in the queue, to be tried again by the timer in
 * commit.c; any other fails the store. */
#include "agent/store/inside.h"

#include "agent/base/job.h"
#include "agent/base/log.h"

#include <errno.h>
#include <stdlib.h>

#define APPLY_MAX 64

struct apply_job {
    struct store *s;
    struct store_txn *txns[APPLY_MAX];
    size_t n, done;
    struct pinned pinned;
    int err;
};

static void apply_work(void *arg)
{
    struct apply_job *j = arg;
    for (; j->done < j->n; j->done++) {
        j->err = apply_txn(j->s, j->txns[j->done], &j->pinned);
        if (j->err)
            break;
    }
}

static void applied(struct store *s, struct store_txn *t)
{
    s->applied_no = t->number;
    const struct store_txn *more = s->applying.first;
    s->applied_seq =
        more && more->seq == t->seq ? t->seq - 1 : t->seq; /* a record counts when all its epochs are in the files */
    s->unapplied -= t->data;
    s->unapplied_memory -= t->memory;
    for (size_t i = 0; i < t->bindings_len; i++)
        t->bindings[i].name->pending--;
    for (size_t i = 0; i < t->parts_len; i++) {
        struct part *p = t->parts[i];
        if (p->stated)
            p->r->applied = p->epoch;
        if (s->volume->ops->lasting && p->stated && p->r->bound)
            region_dirty(s, p->r);
    }
    if (t->spill_fd >= 0) {
        struct spill_mark *m = malloc(sizeof *m);
        if (m) { /* else the file stays until the next start */
            *m = (struct spill_mark){.number = t->spill, .seq = t->seq, .next = s->spills};
            s->spills = m;
            s->want_checkpoint = true;
        }
    }
    txn_free(t);
}

static void apply_done(void *arg)
{
    struct apply_job *j = arg;
    struct store *s = j->s;
    s->apply_busy = false;
    for (size_t i = 0; i < j->pinned.len; i++)
        pin_release(j->pinned.pins[i]);
    for (size_t i = 0; i < j->done; i++)
        applied(s, txns_pop(&s->applying));
    if (j->err == -ENOSPC || j->err == -EDQUOT) {
        if (!s->retrying)
            log_error("the store's disk is full while an acknowledged epoch is put into its files: no more are taken "
                      "until there is room");
        s->retrying = true;
    } else if (j->err)
        store_fail(s, "an epoch cannot be put into its files", j->err);
    else
        s->retrying = false;
    free(j->pinned.pins);
    free(j);
    store_pump(s);
}

static int pins_collect(struct apply_job *j)
{
    size_t cap = 0;
    for (size_t i = 0; i < j->n; i++) {
        const struct store_txn *t = j->txns[i];
        for (size_t k = 0; k < t->parts_len + t->dead_len; k++) {
            struct region *r = k < t->parts_len ? t->parts[k]->r : t->dead[k - t->parts_len];
            for (struct store_pin *pin = r->pins; pin; pin = pin->next) {
                bool known = false;
                for (size_t p = 0; p < j->pinned.len && !known; p++)
                    known = j->pinned.pins[p] == pin;
                if (known)
                    continue;
                struct store_pin **pins = store_grow(j->pinned.pins, j->pinned.len, &cap, sizeof *pins);
                if (!pins)
                    return -ENOMEM;
                j->pinned.pins = pins;
                pins[j->pinned.len++] = pin;
                pin->jobs++;
            }
        }
    }
    return 0;
}

void apply_start(struct store *s)
{
    struct apply_job *j = calloc(1, sizeof *j);
    if (!j)
        return;
    j->s = s;
    for (struct store_txn *t = s->applying.first; t && j->n < APPLY_MAX; t = t->next)
        j->txns[j->n++] = t;
    s->apply_busy = true;
    if (pins_collect(j) || job_run(s->loop, apply_work, apply_done, j) < 0) {
        j->err = -ENOMEM;
        apply_done(j);
    }
}
