/* What was written, on its way into epochs. A layer is a transaction of the store that takes one frame for each piece
 * of a write, and a list of the same pieces, over the same bytes, for the client's own reads. */
#include "agent/nbd/inside.h"

#include "agent/base/log.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#define HANDLE 1u

static const char *name_of(void *arg, uint32_t handle)
{
    struct export *x = arg;
    return handle == HANDLE ? x->name : NULL;
}

static void on_spilled(void *arg, size_t bytes)
{
    (void)arg; /* layers are bounded by themselves */
    (void)bytes;
}

void layer_drop(struct layer *l)
{
    if (--l->refs)
        return;
    for (size_t i = 0; i < l->bufs_len; i++)
        buf_drop(l->bufs[i]);
    free(l->bufs);
    free(l->extents);
    free(l);
}

/* Whether what failed may be asked for again: it was not done, and its cause may go. */
static bool may_go(const struct export *x, int err)
{
    if (err == -ENOENT && x->nbd->slow)
        return true; /* a replica that has come back does not know the writer yet */
    return err == -ENOSPC || err == -EDQUOT || err == -ENOTCONN || err == -ENOMEM;
}

static void waiters_tell(struct export *x)
{
    struct waiters all = TAILQ_HEAD_INITIALIZER(all);
    for (struct waiter *w = TAILQ_FIRST(&x->waiters), *next; w; w = next) {
        next = TAILQ_NEXT(w, link);
        if (w->seq > x->durable && !x->broken)
            continue;
        TAILQ_REMOVE(&x->waiters, w, link);
        TAILQ_INSERT_TAIL(&all, w, link);
    }
    int broken = x->broken ? x->err : 0;
    uint64_t durable = x->durable;
    for (struct waiter *w; (w = TAILQ_FIRST(&all));) {
        struct nbd_conn *c = w->conn;
        int err = w->seq > durable ? broken : 0;
        TAILQ_REMOVE(&all, w, link);
        c->requests--;
        if (!err && !c->closing && c->export && w->request.command == NBD_CMD_BLOCK_STATUS)
            status_begin(c, &w->request);
        else
            request_answer(c, &w->request, err);
        free(w);
        conn_pump(c);
        conn_drop(c);
    }
}

static void export_break(struct export *x, int err, const char *text)
{
    if (x->broken)
        return;
    if (x->said != err) /* a client that tries again and again is not the log's matter */
        log_warn("region %s: what NBD client %s writes cannot be put on disk%s: %s", x->name, x->party,
                 may_go(x, err) ? ", and is kept to be tried again when it writes or flushes" : "", text);
    x->said = err;
    x->broken = true;
    x->err = err;
    if (x->open) {
        store_txn_abort(x->open->txn);
        x->open->txn = NULL;
        x->open = NULL;
    }
}

static void commit_waiting(struct export *x);

static void on_durable(void *arg, int err, const char *text)
{
    struct layer *l = arg;
    struct export *x = l->export;
    x->committing--;
    if (err) {
        export_break(x, err, text && *text ? text : strerror(-err));
    } else {
        x->durable = l->seq;
        x->said = 0;
        if (!x->asking) { /* what is being asked for may be without it */
            layers_done(x);
            view_forget(x); /* before the epoch is applied, which would keep what the view has */
        }
    }
    commit_waiting(x);
    x->conns++; /* stays while others are told */
    waiters_tell(x);
    export_unblock(x);
    x->conns--;
    export_settle(x);
}

static void commit_waiting(struct export *x)
{
    struct layer *l = x->open;
    if (!l || !l->wanted || x->committing >= NBD_LAYERS)
        return;
    struct store_txn *t = l->txn;
    x->open = NULL;
    l->txn = NULL;
    x->committing++;
    store_txn_commit(t, on_durable, l);
}

void layer_want(struct export *x)
{
    if (!x->open)
        return;
    x->open->wanted = true;
    commit_waiting(x);
}

/* The layer's transaction, with all that is in the layer by now. */
static int layer_begin(struct layer *l, char error[STORE_ERROR])
{
    struct export *x = l->export;
    struct store_names names = {.name_of = name_of, .arg = x};
    struct frame_region g = {.handle = HANDLE,
                             .epoch = l->epoch,
                             .base = l->epoch - 1,
                             .fence = x->fence,
                             .min_size = UINT64_MAX,
                             .size = x->size};
    struct buf *b = buf_new(64);
    struct store_txn *t = b ? store_txn_new(x->nbd->store, &x->nbd->identity, names, on_spilled, l) : NULL;
    int err = t ? 0 : -ENOMEM;
    snprintf(error, STORE_ERROR, "no memory for an epoch");
    if (t) {
        b->len = (uint32_t)frame_region_put(b->data, b->cap, &g);
        store_txn_chain(t, x);
        err = store_txn_add(t, FRAME_REGION, b, error);
    }
    buf_drop(b);
    for (size_t i = 0; i < l->bufs_len && !err; i++)
        err = store_txn_add(t, FRAME_PAGES, l->bufs[i], error);
    if (err && t)
        store_txn_abort(t);
    else
        l->txn = t;
    return err;
}

/* Hands in once more what a broken export has kept. */
static void layers_again(struct export *x)
{
    char error[STORE_ERROR];
    int err = 0;
    for (struct layer *l = TAILQ_FIRST(&x->layers); l && !err; l = TAILQ_NEXT(l, link)) {
        if (l->seq <= x->durable)
            continue;
        err = layer_begin(l, error);
        if (err)
            break;
        struct store_txn *t = l->txn;
        l->txn = NULL;
        x->committing++;
        store_txn_commit(t, on_durable, l);
    }
    x->broken = err;
    x->err = err;
}

/* The lease has been asked for again. What was committed without an answer is there; a writer in between is the end. */
static void lease_again(struct export *x, int err, const struct frame_attached *to)
{
    x->committing--;
    if (!err && (to->status != FRAME_ATTACH_EXISTS || !id_same(&to->lineage, &x->lineage)))
        err = -ESTALE;
    struct layer *l = NULL;
    TAILQ_FOREACH(l, &x->layers, link)
    {
        if (!err && l->seq > x->durable && to->fence == x->fence && l->epoch <= to->epoch)
            x->durable = l->seq;
        if (l->seq > x->durable)
            break;
    }
    if (!err && l && l->epoch != to->epoch + 1)
        err = -ESTALE;
    if (err) {
        x->err = err == -EIO ? -ENOTCONN : err; /* nobody there to ask: as before */
        return;
    }
    if (!l)
        x->epoch = to->epoch;
    x->fence = to->fence;
    layers_again(x);
}

static void on_lease_again(void *arg, int err, const struct frame_attached *to)
{
    struct export *x = arg;
    lease_again(x, err, to);
    waiters_tell(x);
    export_unblock(x);
    x->conns--;
    export_settle(x);
}

/* Begins to try again, after which the export is whole, or something is under way that ends in on_durable or the like;
 * or neither, and it stays broken. */
static void export_retry(struct export *x)
{
    if (!may_go(x, x->err) || x->committing)
        return;
    struct nbd *n = x->nbd;
    if (!n->slow) {
        layers_again(x);
        return;
    }
    struct store_attach ask = {.name = x->name, .host = n->host, .identity = &n->identity, .write = true};
    struct frame_attached to = {0};
    x->committing++;
    int err = store_attach(n->store, &ask, &to, on_lease_again, x);
    if (err == -EINPROGRESS)
        x->conns++;
    else
        lease_again(x, err, &to);
}

static int layer_open(struct export *x)
{
    if (x->layers_n > NBD_LAYERS)
        return -EAGAIN;
    struct layer *l = calloc(1, sizeof *l);
    if (!l)
        return -ENOMEM;
    *l = (struct layer){.refs = 1,
                        .export = x,
                        .seq = x->seq + 1,
                        .since = uv_now(x->nbd->loop),
                        .epoch = x->epoch + 1,
                        .from = UINT64_MAX};
    char error[STORE_ERROR];
    int err = layer_begin(l, error);
    if (err) {
        free(l);
        export_break(x, err, error);
        return err;
    }
    x->seq++;
    x->epoch++;
    TAILQ_INSERT_TAIL(&x->layers, l, link);
    x->layers_n++;
    x->open = l;
    return 0;
}

static void *grown(void *array, size_t len, size_t *cap, size_t size)
{
    if (len < *cap)
        return array;
    size_t more = *cap ? *cap * 2 : 16;
    void *p = realloc(array, more * size);
    if (p)
        *cap = more;
    return p;
}

static int layer_add(struct layer *l, struct buf *b, const struct layer_extent *e)
{
    struct layer_extent *extents = grown(l->extents, l->extents_len, &l->extents_cap, sizeof *extents);
    if (extents)
        l->extents = extents;
    struct buf **bufs = grown(l->bufs, l->bufs_len, &l->bufs_cap, sizeof *bufs);
    if (bufs)
        l->bufs = bufs;
    if (!extents || !bufs)
        return -ENOMEM;
    char error[STORE_ERROR] = "";
    int err = store_txn_add(l->txn, FRAME_PAGES, b, error);
    if (err) {
        export_break(l->export, err, error);
        return err;
    }
    l->extents[l->extents_len++] = *e;
    l->bufs[l->bufs_len++] = buf_hold(b);
    l->bytes += b->len;
    l->from = e->offset < l->from ? e->offset : l->from;
    l->to = e->offset + e->len > l->to ? e->offset + e->len : l->to;
    return 0;
}

int layer_put(struct nbd_conn *c, uint64_t offset, uint32_t len, const uint8_t *data)
{
    struct export *x = c->export;
    if (x->broken && !c->tried) {
        c->tried = !x->committing;
        export_retry(x);
        if (x->committing)
            return -EAGAIN; /* until that has come to an end */
    }
    c->tried = false;
    if (x->broken)
        return x->err;
    if (offset > x->size || len > x->size - offset)
        return -ENOSPC;
    struct layer *l = x->open;
    if (l && (l->bytes >= NBD_LAYER_BYTES || l->extents_len >= NBD_LAYER_EXTENTS)) {
        layer_want(x);
        if (x->open)
            return -EAGAIN;
    }
    int err = x->open ? 0 : layer_open(x);
    if (err)
        return err;
    l = x->open;
    struct frame_extent e = {.offset = offset, .len = len, .kind = data ? FRAME_PAGES_DATA : FRAME_PAGES_ZEROS};
    struct buf *b = buf_new(FRAME_PAGES_HEAD + FRAME_PAGES_ENTRY + (data ? len : 0));
    if (!b)
        return -ENOMEM;
    size_t head = frame_pages_put(b->data, b->cap, HANDLE, &e, 1);
    if (data)
        memcpy(b->data + head, data, len);
    b->len = (uint32_t)(head + (data ? len : 0));
    err = layer_add(l, b, &(struct layer_extent){offset, len, data ? b->data + head : NULL});
    buf_drop(b);
    return err;
}

bool layer_wait(struct nbd_conn *c, const struct nbd_request *r)
{
    struct export *x = c->export;
    if (x->seq == x->durable)
        return false;
    if (x->broken)
        export_retry(x);
    if (x->broken && !x->committing)
        return false;
    struct waiter *w = malloc(sizeof *w);
    if (!w) {
        conn_fail(c, "no memory for a FLUSH");
        return true;
    }
    *w = (struct waiter){.conn = c, .request = *r, .seq = x->seq};
    TAILQ_INSERT_TAIL(&x->waiters, w, link);
    conn_hold(c);
    c->requests++;
    return true;
}

size_t layers_hold(struct export *x, uint64_t seq, struct layer **to)
{
    size_t n = 0;
    struct layer *l;
    TAILQ_FOREACH(l, &x->layers, link)
    {
        if (l->seq <= seq)
            continue;
        l->refs++;
        to[n++] = l;
    }
    return n;
}

void layer_over(const struct layer *l, uint8_t *to, uint64_t offset, uint32_t len)
{
    uint64_t end = offset + len;
    if (l->from >= end || l->to <= offset)
        return;
    for (size_t i = 0; i < l->extents_len; i++) {
        const struct layer_extent *e = &l->extents[i];
        uint64_t from = e->offset > offset ? e->offset : offset;
        uint64_t stop = e->offset + e->len < end ? e->offset + e->len : end;
        if (from >= stop)
            continue;
        if (e->data)
            memcpy(to + (from - offset), e->data + (from - e->offset), (size_t)(stop - from));
        else
            memset(to + (from - offset), 0, (size_t)(stop - from));
    }
}

void layers_done(struct export *x)
{
    for (struct layer *l; (l = TAILQ_FIRST(&x->layers)) && l->seq <= x->durable;) {
        TAILQ_REMOVE(&x->layers, l, link);
        x->layers_n--;
        layer_drop(l);
    }
}

void layers_forget(struct export *x)
{
    x->durable = x->seq;
    layers_done(x);
}
