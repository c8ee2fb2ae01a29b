/* What comes in: frames of stream 0 on each socket, and those of the streams, put back in order. See conn_private.h. */
#include "agent/net/conn_private.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

static void on_hello(struct sock *k, const struct buf *p)
{
    struct conn *c = k->conn;
    struct frame_hello peer;
    if (k->state != SOCK_GREETING || frame_hello_get(p->data, p->len, &peer) < 0) {
        conn_fault(c, -EPROTO, FRAME_E_PROTOCOL, "%s: a HELLO out of place or out of form", c->peer);
        return;
    }
    if (peer.version != c->self.version) {
        char text[FRAME_TEXT_MAX];
        snprintf(text, sizeof text, "peer speaks version %u, this agent %u: upgrade the older one", peer.version,
                 c->self.version);
        conn_fault(c, -EPROTONOSUPPORT, FRAME_E_VERSION, "%s", text);
        return;
    }
    if (k->index && !id_same(&peer.identity, &c->identity)) {
        sock_failed(k, -EADDRNOTAVAIL); /* another server answers at the same address */
        return;
    }
    k->state = SOCK_OPEN;
    k->heard = true;
    conn_kick(c);
    if (k->index) {
        conn_grow_on(c);
        return; /* our JOIN is out: from now on it carries bulk */
    }
    c->state = CONN_OPEN;
    c->identity = peer.identity;
    c->token = peer.token;
    conn_set_silence(c, c->silence_ms);
    c->ops->open(c->owner, &peer);
    if (c->bulk)
        conn_grow(c);
}

static void on_error(struct conn *c, const struct buf *p)
{
    struct frame_failed f;
    if (frame_failed_get(p->data, p->len, &f) < 0) {
        conn_fault(c, -EPROTO, 0, "%s: an ERROR out of form", c->peer);
        return;
    }
    for (char *t = f.text; *t; t++) /* it goes to logs and terminals */
        if ((unsigned char)*t < ' ' || *t == 0x7f)
            *t = '?';
    conn_fault(c, frame_code_errno(f.code), 0, "%s says: %s", c->peer, f.text);
}

/* The first frame on a socket just taken: it is one more of another connection's. */
static void on_join(struct sock *k, const struct buf *p)
{
    struct conn *c = k->conn;
    struct id token;
    if (c->state != CONN_GREETING || !c->ops->join || p->len != sizeof token.b) {
        conn_fault(c, -EPROTO, FRAME_E_PROTOCOL, "%s: a JOIN out of place or out of form", c->peer);
        return;
    }
    memcpy(token.b, p->data, sizeof token.b);
    struct conn *to = c->ops->join(c->owner, &token);
    int rc = to ? sock_join(k, to) : -ENOENT;
    if (!rc)
        conn_fault(c, 0, 0, "%s joined its connection", c->peer);
    else if (rc == -ENOBUFS)
        conn_fault(c, rc, FRAME_E_LIMIT, "%s: a JOIN of a connection that has %u sockets", c->peer, CONN_SOCKETS);
    else
        conn_fault(c, rc, FRAME_E_NOT_FOUND, "%s: a JOIN of no connection here", c->peer);
}

static void on_window(struct conn *c, const struct buf *p)
{
    uint32_t id = p->len == 8 ? get_u32(p->data) : 0, more = p->len == 8 ? get_u32(p->data + 4) : 0;
    struct stream *s = conn_stream(c, id);
    if (p->len != 8 || (s && more > FRAME_WINDOW - s->send_window)) {
        conn_fault(c, -EPROTO, FRAME_E_PROTOCOL, "%s gives back more window than it had from us on stream %u", c->peer,
                   id);
        return;
    }
    if (!s)
        return; /* of a stream just closed */
    s->send_window += more;
    conn_stream_ready(c, s);
    conn_kick(c);
}

/* Whoever closes first hears CLOSE in answer, and then knows that nothing more comes. */
static void on_close(struct conn *c, struct buf *p)
{
    if (p->len != 4) {
        conn_fault(c, -EPROTO, FRAME_E_PROTOCOL, "%s: a CLOSE out of form", c->peer);
        return;
    }
    struct stream *s = conn_stream(c, get_u32(p->data));
    bool known = s && !s->forgotten;
    if (!s) {
        conn_control(c->socks[0], FRAME_CLOSE, p->data, p->len);
        return;
    }
    s->heard = true;
    if (known)
        conn_stream_drop(c, s);
    if (s->told)
        conn_stream_free(c, s);
    if (known && c->state == CONN_OPEN)
        c->ops->frame(c->owner, 0, FRAME_CLOSE, p);
}

/* What is said on each socket for itself. */
static bool on_own(struct sock *k, uint8_t type, struct buf *p)
{
    if (type == FRAME_ERROR)
        on_error(k->conn, p);
    else if (type == FRAME_HELLO)
        on_hello(k, p);
    else if (type == FRAME_JOIN)
        on_join(k, p);
    else if (k->state != SOCK_OPEN)
        conn_fault(k->conn, -EPROTO, FRAME_E_PROTOCOL, "%s began without a HELLO", k->conn->peer);
    else if (type == FRAME_PING)
        conn_control(k, FRAME_PONG, p->data, p->len < 8 ? p->len : 8);
    else if (type != FRAME_PONG)
        return false;
    else if (p->len == 8)
        conn_round_pong(k, get_u64(p->data));
    return true;
}

static void on_control(struct sock *k, uint8_t type, struct buf *p)
{
    struct conn *c = k->conn;
    if (on_own(k, type, p))
        return;
    if (!k->index && type == FRAME_WINDOW_MORE)
        on_window(c, p);
    else if (!k->index && type == FRAME_CLOSE)
        on_close(c, p);
    else
        conn_fault(c, -EPROTO, FRAME_E_PROTOCOL, "%s: a frame of type %u on stream 0%s", c->peer, type,
                   k->index ? " of a further socket" : "");
}

/* Order */

void stream_drop_held(struct conn *c, struct stream *s)
{
    for (unsigned i = 0; s->held && i < CONN_SOCKETS; i++)
        for (struct held *e; (e = TAILQ_FIRST(&s->held[i]));) {
            TAILQ_REMOVE(&s->held[i], e, link);
            c->held -= early_cost(e->payload);
            buf_drop(e->payload);
            free(e);
        }
}

static bool hold(struct sock *k, struct stream *s, const struct frame_header *h, struct buf *p)
{
    struct held *e = malloc(sizeof *e);
    if (e && !s->held && (s->held = malloc(CONN_SOCKETS * sizeof *s->held)))
        for (unsigned i = 0; i < CONN_SOCKETS; i++)
            TAILQ_INIT(&s->held[i]);
    if (!e || !s->held) {
        free(e);
        return false;
    }
    *e = (struct held){.payload = buf_hold(p), .order = h->order, .type = h->type};
    TAILQ_INSERT_TAIL(&s->held[k->index], e, link);
    k->conn->held += early_cost(p);
    return true;
}

static void on_early(struct sock *k, struct stream *s, const struct frame_header *h, struct buf *p)
{
    struct conn *c = k->conn;
    struct held *last = s->held ? TAILQ_LAST(&s->held[k->index], held_queue) : NULL;
    if (h->order - s->recv_next > INT32_MAX || (last && h->order - last->order - 1 > INT32_MAX))
        conn_fault(c, -EPROTO, FRAME_E_PROTOCOL, "%s: a frame out of order on stream %u", c->peer, s->id);
    else if (c->held + early_cost(p) > CONN_EARLY_MAX)
        conn_fault(c, -ENOBUFS, FRAME_E_LIMIT, "%s sends too far ahead of a frame missing on stream %u", c->peer,
                   s->id);
    else if (!hold(k, s, h, p))
        conn_fault(c, -ENOMEM, 0, "no memory for a frame from %s", c->peer);
}

/* The held frame whose turn it is, or NULL. */
static struct held *next_held(struct conn *c, struct stream *s)
{
    for (unsigned i = 0; s->held && c->held && i < CONN_SOCKETS; i++) {
        struct held *e = TAILQ_FIRST(&s->held[i]);
        if (e && e->order == s->recv_next) {
            TAILQ_REMOVE(&s->held[i], e, link);
            c->held -= early_cost(e->payload);
            return e;
        }
    }
    return NULL;
}

/* A frame whose turn it is, and those that waited for it. The owner may forget the stream in the call, or close. */
static void deliver(struct conn *c, struct stream *s, uint8_t type, struct buf *p)
{
    s->recv_next++;
    c->ops->frame(c->owner, s->id, type, p);
    struct held *e;
    while (c->state == CONN_OPEN && !s->forgotten && (e = next_held(c, s))) {
        s->recv_next++;
        c->ops->frame(c->owner, s->id, e->type, e->payload);
        buf_drop(e->payload);
        free(e);
    }
}

static void on_frame(struct sock *k, const struct frame_header *h, struct buf *p)
{
    struct conn *c = k->conn;
    if (!h->stream) {
        on_control(k, h->type, p);
        return;
    }
    if (c->state != CONN_OPEN || k->state != SOCK_OPEN) {
        if (c->state == CONN_GREETING || c->state == CONN_OPEN)
            conn_fault(c, -EPROTO, FRAME_E_PROTOCOL, "%s began without a HELLO", c->peer);
        return;
    }
    if (h->type < FRAME_ATTACH || h->type == FRAME_JOIN) {
        conn_fault(c, -EPROTO, FRAME_E_PROTOCOL, "%s: a frame of type %u on stream %u", c->peer, h->type, h->stream);
        return;
    }
    struct stream *s = conn_stream(c, h->stream);
    if (!s && c->streams >= CONN_STREAMS_MAX) {
        conn_fault(c, -ENOBUFS, FRAME_E_LIMIT, "%s uses more than %u streams", c->peer, CONN_STREAMS_MAX);
        return;
    }
    if (!s && !(s = conn_stream_new(c, h->stream))) {
        conn_fault(c, -ENOMEM, 0, "no memory for a stream of %s", c->peer);
        return;
    }
    if (s->forgotten)
        return;
    uint32_t window = conn_window(h->type, p->data, p->len);
    if (window > s->recv_window) {
        conn_fault(c, -EPROTO, FRAME_E_PROTOCOL, "%s sends beyond its window on stream %u", c->peer, h->stream);
        return;
    }
    s->recv_window -= window;
    if (h->order == s->recv_next)
        deliver(c, s, h->type, p);
    else
        on_early(k, s, h, p);
}

void conn_credit(struct conn *c, uint32_t stream, uint32_t bytes)
{
    struct stream *s = conn_stream(c, stream);
    if (!s || s->forgotten || c->state >= CONN_LEAVING)
        return;
    uint32_t used = FRAME_WINDOW - s->recv_window - s->credit;
    s->credit += bytes < used ? bytes : used;
    if (s->credit < CONN_CREDIT_STEP)
        return;
    uint8_t payload[8];
    put_u32(payload, stream);
    put_u32(payload + 4, s->credit);
    s->recv_window += s->credit;
    s->credit = 0;
    conn_control(c->socks[0], FRAME_WINDOW_MORE, payload, sizeof payload);
}

bool conn_step(struct sock *k)
{
    struct conn *c = k->conn;
    struct frame_header h;
    int64_t n = frame_step(k->in + k->in_start, k->in_end - k->in_start, &h);
    if (n < 0 && c->state == CONN_GREETING && !k->tls && k->in[k->in_start] == 0x16) {
        conn_fault(c, -EPROTO, FRAME_E_PROTOCOL, "%s speaks TLS, and this end does not: has it certificates or keys?",
                   c->peer);
        return false;
    }
    if (n < 0) {
        conn_fault(c, (int)n, FRAME_E_PROTOCOL, "%s sent %s", c->peer,
                   n == -EBADMSG ? "a frame with a wrong checksum" : "what is not a frame of the memsync protocol");
        return false;
    }
    if (!n)
        return false;
    struct buf *p = buf_new(h.len);
    if (!p) {
        conn_fault(c, -ENOMEM, 0, "no memory for a frame from %s", c->peer);
        return false;
    }
    memcpy(p->data, k->in + k->in_start + FRAME_HEADER, h.len);
    p->len = h.len;
    k->in_start += (size_t)n;
    on_frame(k, &h, p);
    buf_drop(p);
    return true;
}

bool conn_deaf(const struct conn *c)
{
    return c->state == CONN_CLOSED || (c->state == CONN_LEAVING && c->control_only);
}
