/* What is read of a region, and who may write it. An export is there as long as a connection is on it, the store has an
 * answer for it to give, or something that was written is not settled. */
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
    TAILQ_INIT(&x->parked);
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

/* Views */

struct view_ask {
    struct export *export;
    uint64_t seq;
    struct frame_entry entry; /* of an answer at once */
};

static int view_take(struct view_ask *q, int err, struct store_pin *pin, const struct frame_entry *e, const char *text)
{
    struct export *x = q->export;
    x->asking = false;
    struct view *v = err ? NULL : calloc(1, sizeof *v);
    if (v) {
        *v = (struct view){.refs = 1,
                           .pin = pin,
                           .lineage = e->lineage,
                           .epoch = e->epoch,
                           .size = e->size,
                           .seq = q->seq,
                           .came = uv_now(x->nbd->loop)};
        view_forget(x);
        x->view = v;
    } else if (!err) {
        store_unpin(pin);
        err = -ENOMEM;
    } else {
        log_info("region %s cannot be read for NBD clients: %s", x->name, text && *text ? text : strerror(-err));
    }
    free(q);
    return err == -ENOENT ? -ESHUTDOWN : err; /* removed since it was chosen */
}

static void on_view(void *arg, int err, struct store_pin *pin, const struct frame_entry *e, const char *text)
{
    struct view_ask *q = arg;
    struct export *x = q->export;
    err = view_take(q, err, pin, e, text);
    parked_resume(x, err);
    export_unblock(x);
    x->conns--;
    export_settle(x);
}

static int view_ask(struct export *x)
{
    if (x->asking)
        return -EINPROGRESS;
    struct view_ask *q = malloc(sizeof *q);
    if (!q)
        return -ENOMEM;
    layers_done(x); /* the answer has them */
    q->export = x;
    q->seq = x->durable;
    x->asking = true;
    struct store_pin *pin = NULL;
    int err = store_ask_pin(x->nbd->store, x->name, &pin, &q->entry, on_view, q);
    if (err != -EINPROGRESS)
        return view_take(q, err, pin, &q->entry, NULL);
    x->conns++;
    return err;
}

static void no_answer(void *arg, int err, const struct frame_attached *to)
{
    (void)arg;
    (void)err;
    (void)to;
}

/* Whether the view, if there is one, is the newest; told from memory, or -EINPROGRESS. */
static int view_look(struct export *x, const struct id *lineage)
{
    struct nbd *n = x->nbd;
    struct store_attach ask = {.name = x->name, .host = n->host, .identity = &n->identity};
    struct frame_attached to = {0};
    int err = store_attach(n->store, &ask, &to, no_answer, NULL);
    if (err)
        return err;
    if (to.status != FRAME_ATTACH_EXISTS || !id_same(&to.lineage, lineage))
        return -ESHUTDOWN; /* removed, or another has its name: not what was chosen */
    if (x->view && (x->view->epoch != to.epoch || !id_same(&x->view->lineage, lineage)))
        view_forget(x);
    return 0;
}

int export_view(struct export *x, const struct id *lineage, struct view **v)
{
    struct nbd *n = x->nbd;
    int err = n->slow ? -EINPROGRESS : view_look(x, lineage);
    if (err && err != -EINPROGRESS)
        return err;
    n->slow = err;
    if (n->slow && x->view && uv_now(n->loop) - x->view->came >= NBD_FOLLOW_MS)
        view_forget(x);
    err = x->view ? 0 : view_ask(x);
    if (err)
        return err;
    if (!id_same(&x->view->lineage, lineage))
        return -ESHUTDOWN;
    x->view->refs++;
    *v = x->view;
    return 0;
}

/* Writers */

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
    count += x->leased || x->leasing;
    return count;
}

static int lease_answered(struct nbd_conn *c, struct export *x, int err, const struct frame_attached *to)
{
    if (!err && to->status == FRAME_ATTACH_HELD)
        err = -EPERM;
    else if (!err && to->status != FRAME_ATTACH_EXISTS && to->status != FRAME_ATTACH_NONE)
        err = -EIO;
    if (err) {
        log_info("NBD client %s may not write %s: %s", c->party, x->name,
                 to && to->holder[0] ? to->holder : strerror(-err));
        return err;
    }
    if (to->status == FRAME_ATTACH_NONE || !id_same(&to->lineage, &c->lineage)) {
        store_lease_drop(x->nbd->store, x->name, &x->nbd->identity);
        return -ESHUTDOWN;
    }
    memcpy(x->party, c->party, sizeof x->party);
    x->leased = true;
    x->lineage = to->lineage;
    x->epoch = to->epoch;
    x->fence = to->fence;
    x->size = to->size;
    return 0;
}

struct lease_ask {
    struct export *export;
    struct nbd_conn *conn;
};

static void on_lease(void *arg, int err, const struct frame_attached *to)
{
    struct lease_ask *q = arg;
    struct export *x = q->export;
    struct nbd_conn *c = q->conn;
    free(q);
    x->leasing = false;
    c->lease_err = lease_answered(c, x, err, to);
    if (!c->lease_err && c->export) {
        c->writer = true;
        x->writers++;
    }
    export_unblock(x);
    conn_drop(c);
    x->conns--;
    export_settle(x); /* gives it back when the client has gone */
}

static int lease_take(struct nbd_conn *c)
{
    struct export *x = c->export;
    struct nbd *n = x->nbd;
    if (leased_count(n) >= NBD_WRITTEN)
        return -ENOMEM;
    struct lease_ask *q = malloc(sizeof *q);
    if (!q)
        return -ENOMEM;
    *q = (struct lease_ask){.export = x, .conn = c};
    struct store_attach ask = {.name = x->name, .host = n->host, .identity = &n->identity, .write = true};
    struct frame_attached to = {0};
    int err = store_attach(n->store, &ask, &to, on_lease, q);
    if (err != -EINPROGRESS) {
        free(q);
        return lease_answered(c, x, err, &to);
    }
    x->leasing = true;
    x->conns++;
    conn_hold(c);
    return -EAGAIN;
}

int export_writer(struct nbd_conn *c)
{
    struct export *x = c->export;
    if (c->writer)
        return 0;
    int err = c->lease_err;
    c->lease_err = 0;
    if (err)
        return err;
    if (x->leasing || (x->leased && !x->writers))
        return -EAGAIN; /* being asked for, or the last client's is being settled */
    if (x->leased && !export_own(c))
        return -EPERM;
    err = x->leased ? 0 : lease_take(c);
    if (err)
        return err;
    c->writer = true;
    x->writers++;
    return 0;
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
        if (!x->committing && (x->broken || x->durable == x->seq)) {
            if (x->broken)
                log_warn("region %s: what NBD client %s wrote and could not flush is lost with its connection", x->name,
                         x->party);
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
    layers_forget(x);
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
    if (x->view && x->view->refs == 1 && now - x->view->used > VIEW_IDLE_MS && now - x->view->came > VIEW_IDLE_MS)
        view_forget(x);
    if (x->open && now - x->open->since >= NBD_LAYER_MS)
        layer_want(x);
}
