/* Opening, closing, and what is answered from memory. The rest: see inside.h. */
#include "agent/store/inside.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define JOURNAL_BYTES                                                                                                  \
    (32u << 20) /* twice what a transaction keeps in memory: one fits while the one before is being applied */

static const struct limits usual = {
    .journal = JOURNAL_BYTES,
    .txn_memory = STORE_TXN_MEMORY,
    .all_memory = 8u * STORE_TXN_MEMORY,
    .pin_budget = STORE_PIN_BUDGET,
    .lease_ms = STORE_LEASE_MS,
};

static void woken(uv_async_t *async)
{
    struct store *s = async->data;
    uv_unref((uv_handle_t *)async);
    store_woken(s);
}

/* The handle holds the loop only while something waits for its turn. */
void store_wake(struct store *s)
{
    if (s->finishing)
        return;
    uv_ref((uv_handle_t *)&s->wake);
    uv_async_send(&s->wake);
}

void store_free(struct store *s)
{
    s->finishing = true;
    for (size_t i = 0; i < s->dirty_len; i++)
        region_drop(s, s->dirty[i]);
    for (struct store_txn *t; (t = txns_pop(&s->applying));) /* a failed store: the journal has them */
        txn_free(t);
    for (size_t i = 0; i < s->names_len; i++) {
        region_drop(s, s->names[i]->durable);
        free(s->names[i]);
    }
    for (struct holder *h = s->holders, *next; h; h = next) {
        next = h->next;
        free(h);
    }
    for (struct spill_mark *m = s->spills, *next; m; m = next) {
        next = m->next;
        free(m);
    }
    if (s->journal.fd >= 0)
        close(s->journal.fd);
    if (s->volume)
        s->volume->ops->close(s->volume);
    free(s->journal.marks);
    free(s->dirty);
    free(s->names);
    free(s);
}

static int volume_open(struct volume **out, const char *url, char error[STORE_ERROR])
{
    if (!strncmp(url, "file:", 5) && url[5])
        return volume_file_open(out, url + 5, error);
    if (!strcmp(url, "mem:"))
        return volume_mem_open(out);
    static const char *const later[] = {"dir:", "s3:", "redis:"};
    for (size_t i = 0; i < sizeof later / sizeof *later; i++)
        if (!strncmp(url, later[i], strlen(later[i]))) {
            snprintf(error, STORE_ERROR, "store %.300s: not built; file:DIR and mem: are", url);
            return -ENOTSUP;
        }
    snprintf(error, STORE_ERROR, "%.300s is not a store: give file:DIR or mem:", url);
    return -EINVAL;
}

int store_open_with(struct store **out, uv_loop_t *loop, const char *url, const struct limits *limits,
                    char error[STORE_ERROR])
{
    *error = 0;
    struct store *s = calloc(1, sizeof *s);
    if (!s)
        return -ENOMEM;
    s->ops = &volume_store_ops;
    s->loop = loop;
    s->limits = *limits;
    s->journal.fd = -1;
    s->next_file = s->next_spill = 1;
    int err = volume_open(&s->volume, url, error);
    if (!err && s->volume->ops->lasting)
        err = store_recover(s, error);
    if (!err)
        err = uv_async_init(loop, &s->wake, woken);
    if (err) {
        if (!*error)
            snprintf(error, STORE_ERROR, "store %.300s cannot be opened: %s", url, strerror(-err));
        store_free(s);
        return err;
    }
    uv_timer_init(loop, &s->retry);
    s->wake.data = s->retry.data = s;
    uv_unref((uv_handle_t *)&s->wake);
    s->open = true;
    *out = s;
    return 0;
}

int store_open(struct store **out, uv_loop_t *loop, const char *url, char error[STORE_ERROR])
{
    return store_open_with(out, loop, url, &usual, error);
}

static void volume_close(struct store *s, void (*done)(void *arg), void *arg)
{
    s->closing = true;
    s->closed = done;
    s->closed_arg = arg;
    store_wake(s);
}

static const char *volume_dir(const struct store *s)
{
    return s->volume->ops->dir(s->volume);
}

static void entry_fill(const struct store *s, const struct name *n, struct frame_entry *e)
{
    const struct region *r = n->durable;
    *e = (struct frame_entry){.lineage = r->lineage,
                              .writer = r->durable.writer,
                              .epoch = r->durable.epoch,
                              .size = r->durable.size,
                              .committed_at = r->durable.committed_at,
                              .leased = lease_held(s, n)};
    snprintf(e->name, sizeof e->name, "%s", n->text);
    if (e->leased)
        snprintf(e->holder, sizeof e->holder, "%s", n->lease.holder->host);
}

int store_lookup(struct store *s, const char *name, struct frame_entry *e, struct source *source,
                 char error[STORE_ERROR])
{
    char unused[STORE_ERROR];
    if (!error)
        error = unused;
    const char *fault = name_fault(name);
    if (fault) {
        snprintf(error, STORE_ERROR, "the name %.200s %s", name, fault);
        return -EINVAL;
    }
    const struct name *n = name_find(s, name);
    if (n && n->durable) {
        entry_fill(s, n, e);
        if (source)
            *source = n->durable->source;
        return 0;
    }
    const char *other = name_clash(s, name, SIDE_DURABLE);
    if (other) {
        snprintf(error, STORE_ERROR, "%.200s and %.200s cannot both be regions: one is inside the other", name, other);
        return -EINVAL;
    }
    snprintf(error, STORE_ERROR, "there is no region %.300s", name);
    return -ENOENT;
}

void store_list(struct store *s, store_each *each, void *arg)
{
    struct frame_entry *e = malloc(sizeof *e);
    for (size_t i = 0; e && i < s->names_len; i++)
        if (s->names[i]->durable) {
            entry_fill(s, s->names[i], e);
            each(arg, e);
        }
    free(e);
}

static const char *no_names(void *arg, uint32_t handle)
{
    (void)arg;
    (void)handle;
    return NULL;
}

static void volume_remove(struct store *s, const char *name, const struct id *identity, bool force,
                          void (*done)(void *arg, int err, const char *text), void *arg)
{
    struct name *n = name_find(s, name);
    struct store_txn *t = volume_txn_new(s, identity, (struct store_names){.name_of = no_names}, NULL, NULL);
    if (!t)
        abort(); /* see read_new */
    t->chain = t;
    t->removing = true;
    if (!n || !n->head) {
        t->err = -ENOENT;
        snprintf(t->error, STORE_ERROR, "there is no region %.300s", name);
    } else if (!force && lease_held(s, n) && !lease_stands(s, n, identity)) {
        t->err = -EBUSY;
        snprintf(t->error, STORE_ERROR, "%.250s is being written by %.150s", name, n->lease.holder->host);
    } else {
        txn_unbind(t, n);
        n->lease = (struct lease){0};
    }
    volume_txn_commit(t, done, arg);
}

/* Fills in what is there under the name; NONE, EXISTS, or BAD. */
static void attach_look(struct store *s, const char *name, struct frame_attached *to)
{
    struct frame_entry e;
    char error[STORE_ERROR] = "";
    int rc = store_lookup(s, name, &e, &to->source, error);
    if (rc == -ENOENT) {
        to->status = FRAME_ATTACH_NONE;
    } else if (rc < 0) {
        to->status = FRAME_ATTACH_BAD;
        snprintf(to->holder, sizeof to->holder, "%.255s", error);
    } else {
        to->status = FRAME_ATTACH_EXISTS;
        to->lineage = e.lineage;
        to->writer = e.writer;
        to->epoch = e.epoch;
        to->size = e.size;
    }
}

static int volume_attach(struct store *s, const struct store_attach *a, struct frame_attached *to,
                         store_attach_done *done, void *arg)
{
    char holder[256] = "";
    (void)done;
    (void)arg;
    attach_look(s, a->name, to);
    if (to->status == FRAME_ATTACH_BAD || !a->write)
        return 0;
    int rc = store_lease(s, a->name, a->identity, a->host, &to->fence, holder);
    if (!rc)
        return 0;
    to->status = rc == -EBUSY ? FRAME_ATTACH_HELD : FRAME_ATTACH_BAD;
    if (rc == -EBUSY)
        snprintf(to->holder, sizeof to->holder, "%s", holder);
    else
        snprintf(to->holder, sizeof to->holder, "the lease cannot be given: %s", strerror(-rc));
    return 0;
}

static bool volume_txn_received(struct store_txn *t, void (*received)(void *arg))
{
    (void)t;
    (void)received;
    return true;
}

static int volume_ask_list(struct store *s, store_each *each, void (*done)(void *arg, int err, const char *text),
                           void *arg)
{
    (void)done;
    store_list(s, each, arg);
    return 0;
}

static int volume_ask_pin(struct store *s, const char *name, struct store_pin **pin, struct frame_entry *e,
                          store_pin_done *done, void *arg)
{
    (void)done;
    (void)arg;
    return store_pin(s, name, pin, e);
}

const struct store_ops volume_store_ops = {
    .close = volume_close,
    .dir = volume_dir,
    .attach = volume_attach,
    .lease_drop = volume_lease_drop,
    .lease_seen = volume_lease_seen,
    .txn_new = volume_txn_new,
    .txn_chain = volume_txn_chain,
    .txn_writer = volume_txn_writer,
    .txn_add = volume_txn_add,
    .txn_received = volume_txn_received,
    .txn_commit = volume_txn_commit,
    .txn_abort = volume_txn_abort,
    .ask_list = volume_ask_list,
    .ask_pin = volume_ask_pin,
    .pin_live = volume_pin_live,
    .pin_changed = volume_pin_changed,
    .pin_read = volume_pin_read,
    .pin_read_now = volume_pin_read_now,
    .pin_hash = volume_pin_hash,
    .pin_extents = volume_pin_extents,
    .unpin = volume_unpin,
    .remove = volume_remove,
};
