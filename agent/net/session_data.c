/* READ. It is read piece by piece, as large as a DATA frame may be: small enough to be still in the processor's cache
 * when it is sent, and when its memory is used again. The pieces of one READ go out in their order; zeros are put
 * together until something else comes.
 *
 * A piece that is in memory is read and queued at once, others by the store's threads. What is bulk is started from the
 * server's idle handle: in a turn of the loop at most as many pieces of a session as make SESSION_PIECES that are being
 * read, or SESSION_AT_ONCE of those in memory, and none for a stream that has CONN_LOW bytes waiting for the network
 * (its `drained` goes on). So a demanded page never finds the loop or the store's threads busy with more than that, and
 * what a slow peer has asked for is on the disk until it can go. */
#include "agent/net/server_private.h"

#include <errno.h>
#include <stdlib.h>

struct piece {
    struct request *request;
    uint32_t len;
    bool done;
    struct buf *data;
};

/* With a buf: len bytes of it, behind room for the head. NULL: zeros. */
static void data_send(struct request *r, struct buf *data, uint32_t len)
{
    struct buf *b = data ? buf_hold(data) : buf_new(FRAME_DATA_HEAD);
    if (!b) {
        session_end(r->session, -ENOMEM, "no memory for an answer");
        return;
    }
    r->sent += len;
    uint8_t kind = (uint8_t)((!data && len ? FRAME_DATA_ZEROS : 0) | (r->sent < r->len ? FRAME_DATA_MORE : 0));
    frame_data_head(b->data, r->number, kind, len);
    b->len = FRAME_DATA_HEAD + (data ? len : 0);
    conn_send(r->session->conn, r->stream, FRAME_DATA, b);
}

static void piece_send(struct request *r, const struct piece *p)
{
    bool zeros = bytes_zero(p->data->data + FRAME_DATA_HEAD, p->len);
    if (zeros)
        r->zeros += p->len;
    if (r->zeros && (!zeros || r->sent + r->zeros == r->len)) {
        data_send(r, NULL, r->zeros);
        r->zeros = 0;
    }
    if (!zeros)
        data_send(r, p->data, p->len);
}

/* What is there in front of the others. */
static void pieces_send(struct request *r)
{
    for (struct piece *p; r->gone < r->started && (p = &r->pieces[r->gone])->done; r->gone++) {
        if (r->session && r->stream && !r->failed)
            piece_send(r, p);
        buf_drop(p->data);
    }
}

static void read_free(struct request *r)
{
    free(r->pieces);
    session_request_free(r);
}

/* True: that was all of it, and it is gone. */
static bool read_look(struct request *r)
{
    if (r->running || r->waiting || (r->started < r->count && !r->failed && r->session))
        return false;
    read_free(r);
    return true;
}

static bool piece_start(struct request *r);

/* Of what somebody waits for, all behind the first. */
static void pieces_rest(struct request *r)
{
    while (r->started < r->count && !r->failed)
        piece_start(r);
}

static void on_piece(void *arg, int err, struct buf *data)
{
    struct piece *p = arg;
    struct request *r = p->request;
    struct session *s = r->session;
    p->data = data;
    p->done = true;
    r->running--;
    if (!err && (!data || data->len != FRAME_DATA_HEAD + p->len))
        err = -EIO;
    if (err && !r->failed && s)
        session_refuse_read(s, r->stream, r->number, err);
    r->failed |= err != 0;
    if (s && r->bulk)
        s->pieces--;
    pieces_send(r);
    if (s && !r->bulk)
        pieces_rest(r);
    read_look(r);
    if (s)
        session_read_on(s);
}

/* True: it is there already, in its place in front of the next. False: a thread reads it. */
static bool piece_start(struct request *r)
{
    struct piece *p = &r->pieces[r->started];
    uint32_t at = r->started++ * FRAME_DATA_MAX, left = r->len - at;
    *p = (struct piece){.request = r, .len = left < FRAME_DATA_MAX ? left : FRAME_DATA_MAX};
    p->data = store_pin_read_now(r->pin->of->pin, r->offset + at, p->len, FRAME_DATA_HEAD);
    p->done = p->data && p->data->len == FRAME_DATA_HEAD + p->len;
    if (p->done) {
        pieces_send(r);
        return true;
    }
    buf_drop(p->data);
    p->data = NULL;
    r->running++;
    if (r->bulk)
        r->session->pieces++;
    store_pin_read(r->pin->of->pin, r->offset + at, p->len, FRAME_DATA_HEAD, on_piece, p);
    return false;
}

static bool can_go(const struct session *s, const struct request *r)
{
    return r->failed || !r->stream || conn_queued(s->conn, r->stream) < CONN_LOW;
}

/* True: there is more to start, and room for it. */
static bool pieces_start(struct session *s)
{
    struct request *r = TAILQ_FIRST(&s->bulk), *next;
    for (unsigned now = 0; r && s->pieces < SESSION_PIECES && now < SESSION_AT_ONCE; r = next) {
        next = TAILQ_NEXT(r, turn);
        if (!can_go(s, r))
            continue;
        bool wanted = !r->failed && r->stream;
        if (wanted)
            now += piece_start(r);
        if (wanted && r->started < r->count) {
            next = r;
            continue;
        }
        TAILQ_REMOVE(&s->bulk, r, turn);
        r->waiting = false;
        r->count = r->started;
        if (!r->running)
            read_free(r);
    }
    return r != NULL;
}

void server_read_on(uv_idle_t *idle)
{
    struct server *server = idle->data;
    struct session *s, *next;
    bool more = false;
    for (s = TAILQ_FIRST(&server->sessions); s; s = next) {
        next = TAILQ_NEXT(s, link);
        more |= pieces_start(s) && s->pieces < SESSION_PIECES;
    }
    if (!more)
        uv_idle_stop(idle);
}

void session_read_on(struct session *s)
{
    if (!TAILQ_EMPTY(&s->bulk))
        uv_idle_start(&s->server->reader, server_read_on);
}

void session_read(struct session *s, uint32_t stream, struct pin *pin, const struct frame_read *f)
{
    struct request *r = session_request_new(s, stream, f->request, pin);
    if (!r)
        return;
    uint64_t size = pin->of->live ? INT64_MAX : pin->of->entry.size, left = f->offset < size ? size - f->offset : 0;
    r->offset = f->offset;
    r->len = left < f->len ? (uint32_t)left : f->len;
    r->count = (r->len + FRAME_DATA_MAX - 1) / FRAME_DATA_MAX;
    r->bulk = f->bulk == FRAME_READ_BULK;
    if (!r->len) {
        data_send(r, NULL, 0);
        read_free(r);
        return;
    }
    r->pieces = calloc(r->count, sizeof *r->pieces);
    if (!r->pieces) {
        session_refuse(s, stream, f->request, -ENOBUFS, "no memory for a READ");
        read_free(r);
    } else if (r->bulk) {
        TAILQ_INSERT_TAIL(&s->bulk, r, turn);
        r->waiting = true;
        session_read_on(s);
    } else {
        if (piece_start(r)) /* else the others follow when it is there: it is what is waited for */
            pieces_rest(r);
        read_look(r);
    }
}

void session_read_orphan(struct session *s)
{
    struct request *r;
    while ((r = TAILQ_FIRST(&s->bulk))) {
        TAILQ_REMOVE(&s->bulk, r, turn);
        r->waiting = false;
        if (!r->running)
            read_free(r);
    }
}

void session_read_frame(struct session *s, uint32_t stream, const struct buf *payload)
{
    struct frame_read f;
    if (frame_read_get(payload->data, payload->len, &f) < 0) {
        session_violated(s, "a READ out of form");
        return;
    }
    struct pin **p = f.pin ? session_pin_slot(s, f.pin) : NULL;
    if (!p) {
        session_refuse(s, stream, f.request, -ENOENT, "no such pin");
        return;
    }
    if (!f.len || f.len > FRAME_READ_MAX || f.offset > INT64_MAX) {
        session_refuse(s, stream, f.request, -EPROTO, "a READ of 0, of too many bytes, or from too far");
        return;
    }
    if (f.bulk != FRAME_READ_PLAIN)
        conn_set_priority(s->conn, stream, f.bulk == FRAME_READ_BULK ? CONN_BULK : CONN_URGENT);
    session_read(s, stream, *p, &f);
}
