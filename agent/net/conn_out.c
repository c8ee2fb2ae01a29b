/* The sending half of a connection: see conn_private.h. */
#include "agent/net/conn_private.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>

#define BATCH 64

static void out_free(struct out *o)
{
    buf_drop(o->payload);
    free(o);
}

static void queue_free(struct out_queue *q)
{
    struct out *o;
    while ((o = TAILQ_FIRST(q))) {
        TAILQ_REMOVE(q, o, link);
        out_free(o);
    }
}

static void stream_init(struct stream *s, uint32_t id)
{
    *s = (struct stream){.id = id, .priority = CONN_NORMAL, .recv_window = FRAME_WINDOW, .send_window = FRAME_WINDOW};
    TAILQ_INIT(&s->queue);
}

void conn_out_init(struct conn *c)
{
    stream_init(&c->control, 0);
    for (int p = 0; p < CONN_PRIORITIES; p++)
        TAILQ_INIT(&c->ready[p]);
}

void conn_out_free(struct conn *c)
{
    for (unsigned b = 0; b < CONN_BUCKETS; b++)
        while (c->buckets[b])
            conn_stream_free(c, c->buckets[b]);
    queue_free(&c->control.queue);
    if (c->part)
        out_free(c->part);
    c->part = NULL;
}

struct stream *conn_stream(struct conn *c, uint32_t id)
{
    struct stream *s = c->buckets[id % CONN_BUCKETS];
    while (s && s->id != id)
        s = s->next;
    return s;
}

struct stream *conn_stream_new(struct conn *c, uint32_t id)
{
    struct stream *s = malloc(sizeof *s);
    if (!s)
        return NULL;
    stream_init(s, id);
    s->next = c->buckets[id % CONN_BUCKETS];
    c->buckets[id % CONN_BUCKETS] = s;
    c->streams++;
    return s;
}

static void stream_empty(struct conn *c, struct stream *s)
{
    queue_free(&s->queue);
    c->queued -= s->queued;
    s->queued = 0;
    s->high = false;
    conn_stream_ready(c, s);
}

void conn_stream_free(struct conn *c, struct stream *s)
{
    stream_empty(c, s);
    struct stream **at = &c->buckets[s->id % CONN_BUCKETS];
    while (*at != s)
        at = &(*at)->next;
    *at = s->next;
    c->streams--;
    free(s);
}

static bool sendable(const struct stream *s)
{
    const struct out *o = TAILQ_FIRST(&s->queue);
    return o && out_window(o) <= s->send_window;
}

void conn_stream_ready(struct conn *c, struct stream *s)
{
    bool ready = s->id && sendable(s);
    if (ready == s->ready)
        return;
    if (ready)
        TAILQ_INSERT_TAIL(&c->ready[s->priority], s, turn);
    else
        TAILQ_REMOVE(&c->ready[s->priority], s, turn);
    s->ready = ready;
}

void conn_drop_queues(struct conn *c)
{
    for (unsigned b = 0; b < CONN_BUCKETS; b++)
        for (struct stream *s = c->buckets[b]; s; s = s->next)
            stream_empty(c, s);
}

static void stream_push(struct conn *c, struct stream *s, struct out *o)
{
    TAILQ_INSERT_TAIL(&s->queue, o, link);
    s->queued += out_size(o);
    c->queued += out_size(o);
    s->high = s->high || s->queued >= CONN_LOW;
    conn_stream_ready(c, s);
    conn_kick(c);
}

static struct out *out_new(uint32_t stream, uint8_t type, struct buf *payload)
{
    struct out *o = malloc(sizeof *o);
    if (!o) {
        buf_drop(payload);
        return NULL;
    }
    o->payload = payload;
    o->stream = stream;
    o->type = type;
    o->sealed = false;
    return o;
}

void conn_control(struct conn *c, uint8_t type, const void *payload, size_t len)
{
    struct buf *b = len ? buf_new(len) : NULL;
    struct out *o = len && !b ? NULL : out_new(0, type, b);
    if (!o) {
        conn_fault(c, -ENOMEM, 0, "no memory for a frame to %s", c->peer);
        return;
    }
    if (len) {
        memcpy(b->data, payload, len);
        b->len = (uint32_t)len;
    }
    stream_push(c, &c->control, o);
    if (c->control.queued > CONN_CONTROL_MAX)
        conn_fault(c, -ENOBUFS, 0, "%s asks, but reads no answers", c->peer);
}

void conn_send(struct conn *c, uint32_t stream, uint8_t type, struct buf *payload)
{
    assert(stream);
    if (c->state >= CONN_LEAVING) {
        buf_drop(payload);
        return;
    }
    struct stream *s = conn_stream(c, stream);
    if (!s)
        s = conn_stream_new(c, stream);
    struct out *o = s ? out_new(stream, type, payload) : NULL;
    if (!o) {
        if (!s)
            buf_drop(payload);
        conn_fault(c, -ENOMEM, 0, "no memory for a frame to %s", c->peer);
    } else if (s->forgotten) {
        out_free(o);
    } else {
        stream_push(c, s, o);
    }
}

void conn_set_priority(struct conn *c, uint32_t stream, enum conn_priority p)
{
    struct stream *s = conn_stream(c, stream);
    if (!s && c->state < CONN_LEAVING)
        s = conn_stream_new(c, stream);
    if (!s || s->priority == p)
        return;
    if (s->ready)
        TAILQ_REMOVE(&c->ready[s->priority], s, turn);
    s->ready = false;
    s->priority = p;
    conn_stream_ready(c, s);
}

size_t conn_queued(const struct conn *c, uint32_t stream)
{
    if (!stream)
        return c->queued;
    const struct stream *s = conn_stream((struct conn *)c, stream);
    return s ? s->queued : 0;
}

void conn_forget(struct conn *c, uint32_t stream)
{
    struct stream *s = conn_stream(c, stream);
    if (!s || s->forgotten || c->state >= CONN_LEAVING)
        return;
    stream_empty(c, s);
    s->forgotten = true;
    uint8_t payload[4];
    put_u32(payload, stream);
    conn_control(c, FRAME_CLOSE, payload, sizeof payload);
}

/* Which stream may send next: stream 0, then by priority, then by turns. */
static struct stream *next_stream(struct conn *c)
{
    if (!TAILQ_EMPTY(&c->control.queue))
        return &c->control;
    bool others = c->state == CONN_OPEN || (c->state == CONN_LEAVING && !c->control_only);
    for (int p = 0; others && p < CONN_PRIORITIES; p++)
        if (!TAILQ_EMPTY(&c->ready[p]))
            return TAILQ_FIRST(&c->ready[p]);
    return NULL;
}

static struct out *next_out(struct conn *c)
{
    struct stream *s = next_stream(c);
    if (!s)
        return NULL;
    struct out *o = TAILQ_FIRST(&s->queue);
    TAILQ_REMOVE(&s->queue, o, link);
    s->queued -= out_size(o);
    c->queued -= out_size(o);
    s->send_window -= out_window(o);
    if (s->ready) { /* to the end of the line */
        TAILQ_REMOVE(&c->ready[s->priority], s, turn);
        s->ready = false;
    }
    conn_stream_ready(c, s);
    if (!o->sealed) {
        const struct buf *b = o->payload;
        uint64_t hash = !b ? frame_payload_hash("", 0) : b->hashed ? b->hash : frame_payload_hash(b->data, b->len);
        frame_header_put(o->header, o->type, o->stream, s->id ? s->sealed++ : 0, b ? b->len : 0, hash);
        o->sealed = true;
    }
    return o;
}

static struct stream *stream_of(struct conn *c, const struct out *o)
{
    return o->stream ? conn_stream(c, o->stream) : &c->control;
}

static void put_back(struct conn *c, struct out *o)
{
    struct stream *s = stream_of(c, o);
    s->send_window += out_window(o);
    TAILQ_INSERT_HEAD(&s->queue, o, link);
    s->queued += out_size(o);
    c->queued += out_size(o);
    conn_stream_ready(c, s);
}

/* What of frame o is beyond byte `at`, as one or two pieces. */
static unsigned pieces(const struct out *o, size_t at, uv_buf_t *to)
{
    unsigned n = 0;
    if (at < FRAME_HEADER)
        to[n++] = uv_buf_init((char *)o->header + at, (unsigned)(FRAME_HEADER - at));
    size_t skip = at > FRAME_HEADER ? at - FRAME_HEADER : 0;
    if (o->payload && o->payload->len > skip)
        to[n++] = uv_buf_init((char *)o->payload->data + skip, (unsigned)(o->payload->len - skip));
    return n;
}

static void leave_when_empty(struct conn *c);
static void pump(struct conn *c);

/* Tells `drained` for streams whose queue has become short. The callbacks may do anything to the connection. */
static void tell_drained(struct conn *c, const uint32_t *streams, unsigned count)
{
    for (unsigned i = 0; i < count && c->state == CONN_OPEN; i++) {
        struct stream *s = conn_stream(c, streams[i]);
        if (!s || !s->high || s->queued >= CONN_LOW)
            continue;
        s->high = false;
        c->ops->drained(c->owner, streams[i]);
    }
}

/* A peer that says ERROR and hangs up makes our next write fail before we have read why: so reading goes on, and ends
 * the connection when there is no more to read. */
static void write_failed(struct conn *c, int err)
{
    c->mute = err;
    uv_idle_stop(&c->pump);
    if (c->state == CONN_LEAVING)
        conn_destroy(c);
}

static void on_written(uv_write_t *req, int status)
{
    struct conn *c = req->data;
    uint32_t stream = c->part->stream;
    if (!status)
        c->bytes_out += out_size(c->part) - c->part_at;
    out_free(c->part);
    c->part = NULL;
    if (c->state == CONN_CLOSED)
        return;
    if (status < 0) {
        write_failed(c, status);
        return;
    }
    tell_drained(c, &stream, 1);
    pump(c);
}

/* The kernel is full: hand libuv the frame in the middle of which it stopped, or else the next one, and wait. */
static void write_part(struct conn *c)
{
    if (!c->part) {
        c->part = next_out(c);
        c->part_at = 0;
    }
    uv_buf_t bufs[2];
    unsigned n = pieces(c->part, c->part_at, bufs);
    c->write.data = c;
    int rc = uv_write(&c->write, c->socket, bufs, n, on_written);
    if (rc < 0) {
        out_free(c->part);
        c->part = NULL;
        write_failed(c, rc);
    }
}

/* `written` bytes of the batch are with the kernel. True when that is all of it. */
static bool settle(struct conn *c, struct out **batch, unsigned n, size_t written)
{
    unsigned i = 0;
    c->bytes_out += written;
    for (; i < n && written >= out_size(batch[i]); i++) {
        written -= out_size(batch[i]);
        out_free(batch[i]);
    }
    if (i == n)
        return true;
    if (written) {
        c->part = batch[i++];
        c->part_at = written;
    }
    while (n > i)
        put_back(c, batch[--n]);
    return false;
}

static void pump(struct conn *c)
{
    if (c->state == CONN_CLOSED || c->part || c->shut || c->mute)
        return;
    struct out *batch[BATCH];
    uint32_t streams[BATCH];
    uv_buf_t bufs[BATCH * 2];
    unsigned n = 0, pieces_n = 0;
    for (size_t bytes = 0; n < BATCH && bytes < CONN_AHEAD; n++) {
        struct out *o = next_out(c);
        if (!o)
            break;
        batch[n] = o;
        streams[n] = o->stream;
        pieces_n += pieces(o, 0, bufs + pieces_n);
        bytes += out_size(o);
    }
    if (!n) {
        uv_idle_stop(&c->pump);
        leave_when_empty(c);
        return;
    }
    int rc = uv_try_write(c->socket, bufs, pieces_n);
    bool all = settle(c, batch, n, rc > 0 ? (size_t)rc : 0);
    if (rc < 0 && rc != UV_EAGAIN) {
        write_failed(c, rc);
        return;
    }
    if (all) {
        conn_kick(c); /* more in the next turn: others have theirs in between */
    } else {
        uv_idle_stop(&c->pump);
        write_part(c);
    }
    tell_drained(c, streams, n);
}

static void on_pump(uv_idle_t *idle)
{
    pump(idle->data);
}

void conn_kick(struct conn *c)
{
    if (c->state != CONN_DIALLING && c->state != CONN_CLOSED && !c->part && !c->shut && !c->mute)
        uv_idle_start(&c->pump, on_pump);
}

static void on_shut(uv_shutdown_t *req, int status)
{
    struct conn *c = req->data;
    if (status < 0 && c->state != CONN_CLOSED)
        conn_destroy(c);
}

/* Leaving, and all is sent that can be: our end is shut, and the peer's end awaited, because closing with unread bytes
 * would make the kernel reset the connection and take from the peer what it has not read yet. */
static void leave_when_empty(struct conn *c)
{
    if (c->state != CONN_LEAVING)
        return;
    for (unsigned b = 0; b < CONN_BUCKETS && !c->control_only; b++)
        for (struct stream *s = c->buckets[b]; s; s = s->next)
            if (s->queued)
                return; /* its window is closed: the peer may yet open it */
    c->shut = true;
    c->shutdown.data = c;
    if (uv_shutdown(&c->shutdown, c->socket, on_shut) < 0)
        conn_destroy(c);
}

uint64_t conn_bytes_out(const struct conn *c)
{
    return c->bytes_out;
}
