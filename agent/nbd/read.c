/* READ, CACHE and BLOCK_STATUS. A read is cut into pieces, each a read of the pin: short ones that the page cache has
 * are answered by the loop itself, others by the pool's threads. With replies in chunks each goes out as it comes, a
 * piece of zeros as a hole; else, or with DF, when all are there. */
#include "agent/nbd/inside.h"

#include <errno.h>
#include <stdlib.h>

struct reading;

struct piece {
    struct reading *of;
    struct buf *data;
    uint64_t offset;
    uint32_t len;
};

struct reading {
    struct nbd_conn *conn;
    struct nbd *nbd;
    struct nbd_request request;
    struct view *view;
    struct layer *layers[NBD_LAYERS + 1];
    size_t layers_n;
    bool whole;       /* answered when all is there */
    bool sent, again; /* some of it has been; it has been tried before */
    int err;
    uint32_t pieces, left;
    struct piece piece[];
};

static void chunk_send(struct reading *q, struct piece *p, struct buf *data, bool last)
{
    uint8_t head[NBD_CHUNK + 12];
    uint16_t done = last ? NBD_CHUNK_DONE : 0;
    bool hole = bytes_zero(data->data, p->len);
    if (hole) {
        buf_drop(data);
        data = NULL;
    }
    q->sent = true;
    size_t n =
        nbd_chunk_head(head, done, hole ? NBD_CHUNK_HOLE : NBD_CHUNK_DATA, q->request.cookie, hole ? 12 : 8 + p->len);
    put_u64(head + n, p->offset);
    put_u32(head + n + 8, p->len);
    conn_out(q->conn, head, n + (hole ? 12 : 8), data, p->len);
}

static void whole_send(struct reading *q)
{
    uint8_t head[NBD_CHUNK + 8];
    size_t n;
    bool hole = q->conn->proto.structured;
    for (uint32_t i = 0; hole && i < q->pieces; i++)
        hole = bytes_zero(q->piece[i].data->data, q->piece[i].len);
    if (hole) {
        n = nbd_chunk_head(head, NBD_CHUNK_DONE, NBD_CHUNK_HOLE, q->request.cookie, 12);
        put_u64(head + n, q->request.offset);
        put_u32(head + n + 8, q->request.len);
        conn_out(q->conn, head, n + 12, NULL, 0);
        return; /* the data goes with the pieces */
    }
    if (q->conn->proto.structured) {
        n = nbd_chunk_head(head, NBD_CHUNK_DONE, NBD_CHUNK_DATA, q->request.cookie, 8 + q->request.len);
        put_u64(head + n, q->request.offset);
        n += 8;
    } else {
        n = nbd_simple(head, q->request.cookie, 0);
    }
    for (uint32_t i = 0; i < q->pieces; i++) {
        struct piece *p = &q->piece[i];
        conn_out(q->conn, head, i ? 0 : n, p->data, p->len);
        p->data = NULL;
    }
}

static void park(struct nbd_conn *c, const struct nbd_request *r, bool again);
static void reading_begin(struct nbd_conn *c, const struct nbd_request *r, bool again);

static void reading_end(struct reading *q)
{
    struct nbd_conn *c = q->conn;
    bool again = q->err && q->nbd->slow && !q->again && !q->sent && !c->closing && c->export;
    if (again && c->export->view == q->view)
        view_forget(c->export);
    if (!again && (q->err || q->request.command == NBD_CMD_CACHE))
        request_answer(c, &q->request, q->err);
    else if (!again && q->whole)
        whole_send(q);
    for (uint32_t i = 0; i < q->pieces; i++) {
        struct piece *p = &q->piece[i];
        if (p->data)
            conn_paid(c, p->len);
        buf_drop(p->data);
    }
    for (size_t i = 0; i < q->layers_n; i++)
        layer_drop(q->layers[i]);
    view_drop(q->nbd, q->view);
    struct nbd_request r = q->request;
    free(q);
    c->requests--;
    if (again)
        reading_begin(c, &r, true);
}

/* What came of a piece. True: it was the last. */
static bool piece_take(struct piece *p, int err, struct buf *data)
{
    struct reading *q = p->of;
    if (!err && data->len < p->len)
        err = -EIO;
    if (err && !q->err)
        q->err = err == -ENOBUFS ? -EIO : err;
    for (size_t i = 0; i < q->layers_n && !err; i++)
        layer_over(q->layers[i], data->data, p->offset, p->len);
    if (!err && q->whole && q->request.command == NBD_CMD_READ) {
        p->data = data;
    } else if (!err && !q->whole) {
        chunk_send(q, p, data, q->left == 1 && !q->err);
    } else {
        buf_drop(data);
        conn_paid(q->conn, p->len);
    }
    return !--q->left;
}

static void on_piece(void *arg, int err, struct buf *data)
{
    struct piece *p = arg;
    struct nbd_conn *c = p->of->conn;
    if (!piece_take(p, err, data))
        return;
    reading_end(p->of);
    conn_pump(c);
    conn_drop(c);
}

#define NOW_PIECES ((NBD_NOW + FRAME_DATA_MAX - 1) / FRAME_DATA_MAX)

/* Answers what is in memory, if all of it is: a change of threads costs more than the copying. */
static bool reading_now(struct reading *q)
{
    const struct nbd_request *r = &q->request;
    struct buf *data[NOW_PIECES];
    uint32_t n = 0, at = 0, step = FRAME_DATA_MAX;
    if (r->len > NBD_NOW || q->nbd->turn >= NBD_TURN)
        return false;
    for (; at < r->len; at += step, n++) {
        uint32_t len = r->len - at < step ? r->len - at : step;
        data[n] = store_pin_read_now(q->view->pin, r->offset + at, len, 0);
        q->piece[n] = (struct piece){.of = q, .offset = r->offset + at, .len = len};
        if (!data[n])
            break;
    }
    if (at < r->len) {
        while (n)
            buf_drop(data[--n]);
        return false;
    }
    q->nbd->turn += r->len;
    q->pieces = q->left = n;
    q->whole |= n > 1; /* one chunk, in any case */
    for (uint32_t i = 0; i < n; i++)
        piece_take(&q->piece[i], 0, data[i]);
    return true;
}

static void reading_begin(struct nbd_conn *c, const struct nbd_request *r, bool again)
{
    uint32_t pieces = (r->len + NBD_PIECE - 1) / NBD_PIECE;
    struct view *v = NULL;
    int err = export_view(c->export, &c->lineage, &v);
    if (err == -EINPROGRESS) {
        park(c, r, again);
        return;
    }
    if (v && r->offset + r->len > v->size)
        err = -EIO; /* it has been cut since it was chosen */
    struct reading *q =
        err ? NULL : calloc(1, sizeof *q + (pieces < NOW_PIECES ? NOW_PIECES : pieces) * sizeof q->piece[0]);
    if (!q) {
        if (v)
            view_drop(c->nbd, v);
        request_answer(c, r, err ? err : -ENOMEM);
        return;
    }
    *q = (struct reading){
        .conn = c, .nbd = c->nbd, .request = *r, .view = v, .pieces = pieces, .left = pieces, .again = again};
    q->whole = !c->proto.structured || r->flags & NBD_CMD_FLAG_DF || r->command == NBD_CMD_CACHE;
    if (export_own(c))
        q->layers_n = layers_hold(c->export, v->seq, q->layers);
    conn_hold(c);
    c->requests++;
    conn_owe(c, r->len);
    if (reading_now(q)) {
        reading_end(q);
        conn_drop(c);
        return;
    }
    for (uint32_t i = 0; i < pieces; i++) {
        uint32_t at = i * NBD_PIECE, n = r->len - at < NBD_PIECE ? r->len - at : NBD_PIECE;
        q->piece[i] = (struct piece){.of = q, .offset = r->offset + at, .len = n};
        store_pin_read(v->pin, r->offset + at, n, 0, on_piece, &q->piece[i]);
    }
}

void read_begin(struct nbd_conn *c, const struct nbd_request *r)
{
    reading_begin(c, r, false);
}

/* Parked ones count as what they are going to be answered with. */
static uint32_t parked_owe(const struct nbd_request *r)
{
    return r->command == NBD_CMD_BLOCK_STATUS ? 0 : r->len;
}

static void park(struct nbd_conn *c, const struct nbd_request *r, bool again)
{
    struct parked *p = malloc(sizeof *p);
    if (!p) {
        request_answer(c, r, -ENOMEM);
        return;
    }
    *p = (struct parked){.conn = c, .request = *r, .again = again};
    TAILQ_INSERT_TAIL(&c->export->parked, p, link);
    conn_owe(c, parked_owe(r));
    conn_hold(c);
    c->requests++;
}

void parked_resume(struct export *x, int err)
{
    struct parkeds all = TAILQ_HEAD_INITIALIZER(all);
    TAILQ_CONCAT(&all, &x->parked, link);
    for (struct parked *p; (p = TAILQ_FIRST(&all));) {
        struct nbd_conn *c = p->conn;
        TAILQ_REMOVE(&all, p, link);
        conn_paid(c, parked_owe(&p->request));
        c->requests--;
        if (err || c->closing)
            request_answer(c, &p->request, err);
        else if (p->request.command == NBD_CMD_BLOCK_STATUS)
            status_begin(c, &p->request);
        else
            reading_begin(c, &p->request, p->again);
        free(p);
        if (!c->closing)
            conn_pump(c);
        conn_drop(c);
    }
}

struct asking {
    struct nbd_conn *conn;
    struct nbd_request request;
    struct view *view;
};

static void status_send(struct nbd_conn *c, const struct nbd_request *r, const struct store_extent *e, size_t n)
{
    uint8_t head[NBD_CHUNK + 4], table[8 * STORE_EXTENTS];
    uint64_t at = r->offset;
    if (r->flags & NBD_CMD_FLAG_REQ_ONE)
        n = 1;
    for (size_t i = 0; i < n; i++) {
        put_u32(table + 8 * i, (uint32_t)(e[i].end - at));
        put_u32(table + 8 * i + 4, e[i].hole ? NBD_STATE_HOLE | NBD_STATE_ZERO : 0);
        at = e[i].end;
    }
    nbd_chunk_head(head, NBD_CHUNK_DONE, NBD_CHUNK_STATUS, r->cookie, (uint32_t)(4 + 8 * n));
    put_u32(head + NBD_CHUNK, NBD_CONTEXT_ID);
    conn_out_bytes(c, head, sizeof head, table, 8 * n);
}

static void on_extents(void *arg, int err, struct buf *extents)
{
    struct asking *q = arg;
    struct nbd_conn *c = q->conn;
    if (!err && !extents->len)
        err = -EIO;
    if (err)
        request_answer(c, &q->request, err == -ENOBUFS ? -EIO : err);
    else
        status_send(c, &q->request, (const void *)extents->data, extents->len / sizeof(struct store_extent));
    buf_drop(extents);
    view_drop(c->nbd, q->view);
    free(q);
    c->requests--;
    conn_pump(c);
    conn_drop(c);
}

void status_begin(struct nbd_conn *c, const struct nbd_request *r)
{
    /* What its own client has written is waited for: then the region says all. */
    if (export_own(c) && !c->export->broken) {
        layer_want(c->export);
        if (layer_wait(c, r))
            return;
    }
    struct view *v = NULL;
    int err = export_view(c->export, &c->lineage, &v);
    if (err == -EINPROGRESS) {
        park(c, r, false);
        return;
    }
    if (v && r->offset + r->len > v->size)
        err = -EIO;
    struct asking *q = err ? NULL : malloc(sizeof *q);
    if (q) {
        *q = (struct asking){.conn = c, .request = *r, .view = v};
        err = store_pin_extents(v->pin, r->offset, r->len, on_extents, q);
    }
    if (q && !err) {
        conn_hold(c);
        c->requests++;
        return;
    }
    if (err == -ENOTSUP)
        status_send(c, r, &(struct store_extent){.end = r->offset + r->len}, 1);
    else
        request_answer(c, r, err ? err : -ENOMEM);
    free(q);
    if (v)
        view_drop(c->nbd, v);
}
