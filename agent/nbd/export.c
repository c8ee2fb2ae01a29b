/* What is read of a region, and who may write it. An export is there as long as a connection is on it or something that
 * was written is not settled. */
#include "agent/nbd/inside.h"

#include "agent/base/log.h"

#include <errno.h>
#include <stdlib.h>

#define VIEW_IDLE_MS 1000u

struct export *export_get(struct nbd *n, const char *name)
{
    struct export *x;
    TAILQ_FOREACH(x, &n->exports, link)
    if (!strcmp(x->name, name)) {
        x->conns++;
        return x;
    }
    size_t len = strlen(name) + 1;
    x = calloc(1, sizeof *x + len);
    if (!x)
        return NULL;
    x->nbd = n;
    x->conns = 1;
    TAILQ_INIT(&x->layers);
    TAILQ_INIT(&x->waiters);
    memcpy(x->name, name, len);
    TAILQ_INSERT_TAIL(&n->exports, x, link);
    return x;
}

void view_drop(struct nbd *n, struct view *v)
{
    v->used = uv_now(n->loop);
    if (--v->refs)
        return;
    store_unpin(v->pin);
    free(v);
}

void view_forget(struct export *x)
{
    if (x->view)
        view_drop(x->nbd, x->view);
    x->view = NULL;
}

static void no_answer(void *arg, int err, const struct frame_attached *to)
{
    (void)arg;
    (void)err;
    (void)to;
}

static void no_pin(void *arg, int err, struct store_pin *pin, const struct frame_entry *e, const char *text)
{
    (void)arg;
    (void)err;
    (void)pin;
    (void)e;
    (void)text;
}

/* The region as it is now; write: and the lease. */
static int look(struct export *x, bool write, struct frame_attached *to)
{
    struct nbd *n = x->nbd;
    struct store_attach ask = {.name = x->name, .host = n->host, .identity = &n->identity, .write = write};
    *to = (struct frame_attached){0};
    return store_attach(n->store, &ask, to, no_answer, NULL);
}

static struct view *view_new(struct export *x)
{
    struct view *v = calloc(1, sizeof *v);
    struct frame_entry *e = malloc(sizeof *e);
    if (!v || !e || store_ask_pin(x->nbd->store, x->name, &v->pin, e, no_pin, NULL)) {
        free(v);
        free(e);
        return NULL;
    }
    v->refs = 1;
    v->lineage = e->lineage;
    v->epoch = e->epoch;
    v->size = e->size;
    free(e);
    return v;
}

struct view *export_view(struct export *x, const struct id *lineage, int *err)
{
    struct frame_attached to;
    *err = look(x, false, &to);
    if (!*err && (to.status != FRAME_ATTACH_EXISTS || !id_same(&to.lineage, lineage)))
        *err = -ESHUTDOWN; /* removed, or another has its name: not what was chosen */
    if (*err)
        return NULL;
    if (!x->view || x->view->epoch != to.epoch || !id_same(&x->view->lineage, lineage)) {
        view_forget(x);
        x->view = view_new(x);
    }
    if (!x->view) {
        *err = -ENOMEM;
        return NULL;
    }
    x->view->refs++;
    return x->view;
}

bool export_own(const struct nbd_conn *c)
{
    const struct export *x = c->export;
    return x->leased && !strcmp(x->party, c->party) && id_same(&x->lineage, &c->lineage);
}

static unsigned leased_count(const struct nbd *n)
{
    unsigned count = 0;
    struct export *x;
    TAILQ_FOREACH(x, &n->exports, link)
    count += x->leased;
    return count;
}

static int lease_take(struct nbd_conn *c)
{
    struct export *x = c->export;
    struct frame_attached to;
    if (leased_count(c->nbd) >= NBD_WRITTEN)
        return -ENOMEM;
    int err = look(x, true, &to);
    if (!err && to.status == FRAME_ATTACH_HELD)
        err = -EPERM;
    else if (!err && to.status != FRAME_ATTACH_EXISTS && to.status != FRAME_ATTACH_NONE)
        err = -EIO;
    if (err) {
        log_info("NBD client %s may not write %s: %s", c->party, x->name, to.holder);
        return err;
    }
    if (to.status == FRAME_ATTACH_NONE || !id_same(&to.lineage, &c->lineage)) {
        store_lease_drop(c->nbd->store, x->name, &c->nbd->identity);
        return -ESHUTDOWN;
    }
    memcpy(x->party, c->party, sizeof x->party);
    x->leased = true;
    x->lineage = to.lineage;
    x->epoch = to.epoch;
    x->fence = to.fence;
    x->size = to.size;
    return 0;
}

int export_writer(struct nbd_conn *c)
{
    struct export *x = c->export;
    if (c->writer)
        return x->broken ? x->err : 0;
    if (x->leased && !x->writers)
        return -EAGAIN; /* the last client's is being settled */
    if (x->leased && !export_own(c))
        return -EPERM;
    int err = x->leased ? 0 : lease_take(c);
    if (err)
        return err;
    c->writer = true;
    x->writers++;
    return x->broken ? x->err : 0;
}

void export_unblock(struct export *x)
{
    struct nbd_conn *c;
    TAILQ_FOREACH(c, &x->nbd->conns, link)
    if (c->export == x && c->blocked) {
        c->blocked = false;
        conn_pump(c);
    }
}

void export_settle(struct export *x)
{
    struct nbd *n = x->nbd;
    if (x->leased && !x->writers) {
        layer_want(x);
        if (!x->committing && (x->broken || TAILQ_EMPTY(&x->layers))) {
            layers_forget(x);
            store_lease_drop(n->store, x->name, &n->identity);
            x->leased = x->broken = false;
            x->err = 0;
            export_unblock(x);
        }
    }
    if (x->conns || x->leased)
        return;
    view_forget(x);
    TAILQ_REMOVE(&n->exports, x, link);
    free(x);
    nbd_look(n);
}

void export_leave(struct nbd_conn *c)
{
    struct export *x = c->export;
    c->export = NULL;
    if (!x)
        return;
    x->conns--;
    x->writers -= c->writer;
    export_settle(x);
}

void export_tick(struct export *x, uint64_t now)
{
    if (x->view && x->view->refs == 1 && now - x->view->used > VIEW_IDLE_MS)
        view_forget(x);
    if (x->open && now - x->open->since >= NBD_LAYER_MS)
        layer_want(x);
}
