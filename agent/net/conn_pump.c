/* Sending: which frame goes next over which socket, the pump, and the rounds that tell what has arrived. See
 * conn_private.h. */
#include "agent/net/conn_private.h"

#include <errno.h>
#include <stdlib.h>

static bool bulk_apart(const struct conn *c)
{
    for (unsigned i = 1; i < CONN_SOCKETS; i++)
        if (c->socks[i] && c->socks[i]->state == SOCK_OPEN)
            return true;
    return false;
}

/* Which stream may send next on the socket: by priority, then by turns. */
static struct stream *next_stream(struct sock *k)
{
    struct conn *c = k->conn;
    bool others = c->state == CONN_OPEN || (c->state == CONN_LEAVING && !c->control_only);
    if (!others || k->state != SOCK_OPEN || c->early_old + c->early_new >= CONN_EARLY_MAX)
        return NULL;
    for (int p = k->index ? CONN_BULK : CONN_URGENT; p < CONN_PRIORITIES; p++)
        if (!TAILQ_EMPTY(&c->ready[p]) && (p != CONN_BULK || k->index || !bulk_apart(c)))
            return TAILQ_FIRST(&c->ready[p]);
    return NULL;
}

static void seal(struct out *o, uint32_t order)
{
    const struct buf *b = o->payload;
    uint64_t hash = !b ? frame_payload_hash("", 0) : b->hashed ? b->hash : frame_payload_hash(b->data, b->len);
    frame_header_put(o->header, o->type, o->stream, order, b ? b->len : 0, hash);
    o->sealed = true;
}

static struct out *next_control(struct sock *k)
{
    struct out *o = TAILQ_FIRST(&k->control);
    if (!o)
        return NULL;
    TAILQ_REMOVE(&k->control, o, link);
    k->control_queued -= out_size(o);
    if (!o->sealed)
        seal(o, 0);
    return o;
}

struct out *conn_next_out(struct sock *k)
{
    struct conn *c = k->conn;
    struct out *o = next_control(k);
    struct stream *s = o ? NULL : next_stream(k);
    if (!s)
        return o;
    o = TAILQ_FIRST(&s->queue);
    TAILQ_REMOVE(&s->queue, o, link);
    s->queued -= out_size(o);
    c->queued -= out_size(o);
    s->send_window -= out_window(o);
    if (s->ready) { /* to the end of the line */
        TAILQ_REMOVE(&c->ready[s->priority], s, turn);
        s->ready = false;
    }
    conn_stream_ready(c, s);
    if (!o->sealed)
        seal(o, s->send_next++);
    s->spread = s->spread || k->index;
    c->spread = c->spread || k->index;
    c->early_new += c->spread ? early_cost(o->payload) : 0;
    return o;
}

static void put_back(struct sock *k, struct out *o)
{
    struct conn *c = k->conn;
    if (!o->stream) {
        TAILQ_INSERT_HEAD(&k->control, o, link);
        k->control_queued += out_size(o);
        return;
    }
    struct stream *s = conn_stream(c, o->stream);
    s->send_window += out_window(o);
    TAILQ_INSERT_HEAD(&s->queue, o, link);
    s->queued += out_size(o);
    c->queued += out_size(o);
    c->early_new -= c->spread ? early_cost(o->payload) : 0;
    conn_stream_ready(c, s);
}

/* What of frame o is beyond byte `at`, as one or two pieces. */
unsigned conn_pieces(const struct out *o, size_t at, uv_buf_t *to)
{
    unsigned n = 0;
    if (at < FRAME_HEADER)
        to[n++] = uv_buf_init((char *)o->header + at, (unsigned)(FRAME_HEADER - at));
    size_t skip = at > FRAME_HEADER ? at - FRAME_HEADER : 0;
    if (o->payload && o->payload->len > skip)
        to[n++] = uv_buf_init((char *)o->payload->data + skip, (unsigned)(o->payload->len - skip));
    return n;
}

/* Tells `drained` for streams whose queue has become short. The callbacks may do anything to the connection. */
static void tell_drained(struct conn *c, const uint32_t *streams, unsigned count)
{
    for (unsigned i = 0; i < count && c->state == CONN_OPEN; i++) {
        struct stream *s = streams[i] ? conn_stream(c, streams[i]) : NULL;
        if (!s || !s->high || s->queued >= CONN_LOW)
            continue;
        s->high = false;
        c->ops->drained(c->owner, streams[i]);
    }
}

/* A peer that says ERROR and hangs up makes our next write fail before we have read why: so reading goes on, and ends
 * the connection when there is no more to read. */
void conn_write_failed(struct sock *k, int err)
{
    struct conn *c = k->conn;
    if (k->index && (k->state != SOCK_OPEN || c->control_only)) {
        k->shut = true; /* the last words are for the first */
        sock_failed(k, err);
        return;
    }
    if (!c->mute)
        c->mute = err;
    uv_idle_stop(&c->pump);
    if (c->state == CONN_LEAVING)
        conn_destroy(c);
    else if (c->state != CONN_CLOSED)
        uv_timer_start(&c->timer, conn_on_timer, CONN_LEAVE_MS, 0);
}

static void on_written(uv_write_t *req, int status)
{
    struct sock *k = req->data;
    struct conn *c = k->conn;
    uint32_t stream = k->part->stream;
    if (!status)
        c->bytes_out += out_size(k->part) - k->part_at;
    out_free(k->part);
    k->part = NULL;
    if (c->state == CONN_CLOSED || c->socks[k->index] != k)
        return;
    if (status < 0) {
        conn_write_failed(k, status);
        return;
    }
    if (k->index && stream)
        k->heard = true; /* its buffers were full, and have moved: bulk makes the peer's PONGs late, not silent */
    tell_drained(c, &stream, 1);
    conn_kick(c);
}

/* The kernel is full: hand libuv the frame in the middle of which it stopped, or else the next one, and wait. */
static void write_part(struct sock *k)
{
    if (!k->part) {
        k->part = conn_next_out(k);
        k->part_at = 0;
    }
    uv_buf_t bufs[2];
    unsigned n = conn_pieces(k->part, k->part_at, bufs);
    int rc = uv_write(&k->write, k->stream, bufs, n, on_written);
    if (rc < 0) {
        out_free(k->part);
        k->part = NULL;
        conn_write_failed(k, rc);
    }
}

/* `written` bytes of the batch are with the kernel. True when that is all of it. */
static bool settle(struct sock *k, struct out **batch, unsigned n, size_t written)
{
    unsigned i = 0;
    k->conn->bytes_out += written;
    for (; i < n && written >= out_size(batch[i]); i++) {
        written -= out_size(batch[i]);
        out_free(batch[i]);
    }
    if (i == n)
        return true;
    if (written) {
        k->part = batch[i++];
        k->part_at = written;
    }
    while (n > i)
        put_back(k, batch[--n]);
    return false;
}

/* A batch on one socket. False when there is nothing to send on it, or it has to wait. */
static bool pump_sock(struct sock *k)
{
    struct conn *c = k->conn;
    if (k->state == SOCK_DIALLING || k->part || k->sealed || k->shut)
        return false;
    uint32_t streams[CONN_BATCH];
    if (k->tls) {
        unsigned sealed = 0;
        bool more = conn_tls_pump(k, streams, &sealed);
        if (k->index && !TAILQ_EMPTY(&c->ready[CONN_BULK]))
            conn_grow_look(c);
        tell_drained(c, streams, sealed);
        return more;
    }
    struct out *batch[CONN_BATCH];
    uv_buf_t bufs[CONN_BATCH * 2];
    unsigned n = 0, pieces_n = 0;
    for (size_t bytes = 0; n < CONN_BATCH && bytes < k->ahead; n++) {
        struct out *o = conn_next_out(k);
        if (!o)
            break;
        batch[n] = o;
        streams[n] = o->stream;
        pieces_n += conn_pieces(o, 0, bufs + pieces_n);
        bytes += out_size(o);
    }
    if (!n)
        return false;
    int rc = uv_try_write(k->stream, bufs, pieces_n);
    bool all = settle(k, batch, n, rc > 0 ? (size_t)rc : 0);
    if (rc < 0 && rc != UV_EAGAIN) {
        conn_write_failed(k, rc);
        return false;
    }
    if (!all)
        write_part(k);
    if (k->index && !TAILQ_EMPTY(&c->ready[CONN_BULK]))
        conn_grow_look(c);
    tell_drained(c, streams, n);
    return all;
}

static void round_begin(struct conn *c)
{
    uint8_t token[8];
    put_u64(token, CONN_ROUND + ++c->round);
    c->round_on = true;
    c->early_old = c->early_new;
    c->early_new = 0;
    for (unsigned i = 0; i < CONN_SOCKETS; i++)
        if (c->socks[i] && c->socks[i]->state == SOCK_OPEN && !c->socks[i]->shut) {
            c->socks[i]->awaited = true;
            conn_control(c->socks[i], FRAME_PING, token, sizeof token);
        }
}

void conn_round_pong(struct sock *k, uint64_t token)
{
    struct conn *c = k->conn;
    if (!c->round_on || token != CONN_ROUND + c->round)
        return;
    k->awaited = false;
    for (unsigned i = 0; i < CONN_SOCKETS; i++)
        if (c->socks[i] && c->socks[i]->awaited)
            return;
    c->round_on = false;
    c->early_old = 0;
    conn_closings(c);
    conn_kick(c);
}

static void on_shut(uv_shutdown_t *req, int status)
{
    struct sock *k = req->data;
    if (status < 0 && k->conn->state != CONN_CLOSED)
        sock_failed(k, status);
}

/* Leaving, and all is sent that can be: our ends are shut, and the peer's awaited, because closing with unread bytes
 * would make the kernel reset the connection and take from the peer what it has not read yet. */
static void leave_when_empty(struct conn *c)
{
    if (c->state != CONN_LEAVING || (c->queued && !c->control_only)) /* a window is closed: the peer may yet open it */
        return;
    for (unsigned i = 0; i < CONN_SOCKETS; i++)
        if (c->socks[i] && (c->socks[i]->part || c->socks[i]->sealed || c->socks[i]->control_queued) && !c->control_only)
            return;
    for (unsigned i = 0; i < CONN_SOCKETS && c->state != CONN_CLOSED; i++) {
        struct sock *k = c->socks[i];
        if (!k || k->shut || k->control_queued)
            continue;
        if (k->tls)
            conn_tls_bye(k);
        k->shut = true;
        int rc = uv_shutdown(&k->shutdown, k->stream, on_shut);
        if (rc < 0)
            sock_failed(k, rc);
    }
}

static void on_pump(uv_idle_t *idle)
{
    struct conn *c = idle->data;
    bool more = false;
    for (unsigned i = 0; i < CONN_SOCKETS && c->state != CONN_CLOSED && !c->mute; i++)
        more = (c->socks[i] && pump_sock(c->socks[i])) || more; /* more in the next turn: others have theirs between */
    if (c->state == CONN_CLOSED || c->mute)
        return;
    if (!c->control_only && !c->round_on && (c->early_new > CONN_EARLY_MAX / 4 || c->closing)) {
        round_begin(c);
        return;
    }
    if (more)
        return;
    uv_idle_stop(&c->pump);
    leave_when_empty(c);
}

void conn_kick(struct conn *c)
{
    if (c->state != CONN_DIALLING && c->state != CONN_CLOSED && !c->mute)
        uv_idle_start(&c->pump, on_pump);
}
