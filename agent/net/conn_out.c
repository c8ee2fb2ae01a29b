/* The queues of frames to go, and the ends of streams: see conn_private.h. */
#include "agent/net/conn_private.h"

#include <assert.h>
#include <errno.h>
#include <stdlib.h>

void out_free(struct out *o)
{
    buf_drop(o->payload);
    free(o);
}

void out_queue_free(struct out_queue *q)
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
    for (int p = 0; p < CONN_PRIORITIES; p++)
        TAILQ_INIT(&c->ready[p]);
}

void conn_out_free(struct conn *c)
{
    for (unsigned b = 0; b < CONN_BUCKETS; b++)
        while (c->buckets[b])
            conn_stream_free(c, c->buckets[b]);
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
    out_queue_free(&s->queue);
    c->queued -= s->queued;
    s->queued = 0;
    s->high = false;
    conn_stream_ready(c, s);
}

void conn_stream_free(struct conn *c, struct stream *s)
{
    stream_empty(c, s);
    stream_drop_held(c, s);
    free(s->held);
    c->closing -= s->forgotten && !s->told;
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
    bool ready = sendable(s);
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

void conn_control(struct sock *k, uint8_t type, const void *payload, size_t len)
{
    if (!k || k->shut)
        return;
    struct conn *c = k->conn;
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
    TAILQ_INSERT_TAIL(&k->control, o, link);
    k->control_queued += out_size(o);
    conn_kick(c);
    if (k->control_queued > CONN_CONTROL_MAX)
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
    conn_kick(c);
    if (p != CONN_BULK)
        return;
    c->bulk = true;
    if (c->state == CONN_OPEN && !c->socks[1])
        conn_grow(c);
}

size_t conn_queued(const struct conn *c, uint32_t stream)
{
    const struct stream *s = stream ? conn_stream((struct conn *)c, stream) : NULL;
    if (stream)
        return s ? s->queued : 0;
    size_t all = c->queued;
    for (unsigned i = 0; i < CONN_SOCKETS; i++)
        all += c->socks[i] ? c->socks[i]->control_queued : 0;
    return all;
}

static void tell_close(struct conn *c, struct stream *s)
{
    uint8_t payload[4];
    put_u32(payload, s->id);
    s->told = true;
    conn_control(c->socks[0], FRAME_CLOSE, payload, sizeof payload);
}

void conn_stream_drop(struct conn *c, struct stream *s)
{
    stream_empty(c, s);
    stream_drop_held(c, s);
    s->forgotten = true;
    if (!s->spread) {
        tell_close(c, s);
        return;
    }
    s->round = c->round + 1; /* not the one under way */
    c->closing++;
    conn_kick(c);
}

void conn_closings(struct conn *c)
{
    for (unsigned b = 0; b < CONN_BUCKETS && c->closing; b++)
        for (struct stream *s = c->buckets[b], *next; s; s = next) {
            next = s->next;
            if (!s->forgotten || s->told || s->round > c->round)
                continue;
            tell_close(c, s);
            c->closing--;
            if (s->heard)
                conn_stream_free(c, s);
        }
}

void conn_forget(struct conn *c, uint32_t stream)
{
    struct stream *s = conn_stream(c, stream);
    if (s && !s->forgotten && c->state < CONN_LEAVING)
        conn_stream_drop(c, s);
}
