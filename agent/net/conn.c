/* The life of a connection, and its receiving half. The sending half is conn_out.c; the states are in conn_private.h.
 *
 * Whatever ends a connection ends in conn_destroy: every handle is closed, and when libuv has given the last one back,
 * the owner's `closed` is called and the memory freed. So `closed` never comes from within a call of the owner's, and
 * nothing is freed under a callback. A fault found in what the peer sends takes the way over CONN_LEAVING, so that the
 * peer's log says what was wrong with it. */
#include "agent/net/addr.h"
#include "agent/net/conn_private.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define CONN_HELLO_MS 5000u
#define CONN_LEAVE_MS 1000u
#define CONN_NOTSENT (128 << 10)
#define IN_CAP (512u << 10)
#define IN_ROOM (128u << 10) /* less than this at the buffer's end: what is left of it moves to the front */

static void dial_next(struct conn *c);

static void last_handle(struct conn *c)
{
    conn_out_free(c);
    c->ops->closed(c->owner, c->err, c->why);
    free(c->in);
    free(c);
}

static void handle_gone(struct conn *c)
{
    if (!--c->handles)
        last_handle(c);
}

static void on_handle_closed(uv_handle_t *h)
{
    handle_gone(h->data);
}

static void on_socket_closed(uv_handle_t *h)
{
    struct conn *c = h->data;
    free(h);
    handle_gone(c);
}

static void socket_close(struct conn *c)
{
    if (!c->socket)
        return;
    uv_close((uv_handle_t *)c->socket, on_socket_closed);
    c->socket = NULL;
}

void conn_destroy(struct conn *c)
{
    if (c->state == CONN_CLOSED)
        return;
    bool resolving = c->state == CONN_DIALLING && c->resolve.data;
    c->state = CONN_CLOSED;
    if (resolving)
        uv_cancel((uv_req_t *)&c->resolve);
    if (c->addresses)
        uv_freeaddrinfo(c->addresses);
    c->addresses = c->address = NULL;
    socket_close(c);
    uv_close((uv_handle_t *)&c->timer, on_handle_closed);
    uv_close((uv_handle_t *)&c->pump, on_handle_closed);
}

static void keep_reason(struct conn *c, int err, const char *why)
{
    if (c->why[0])
        return;
    c->err = err;
    snprintf(c->why, sizeof c->why, "%s", why);
}

static void tell_error(struct conn *c, uint16_t code, const char *text)
{
    struct frame_failed f = {.code = code};
    snprintf(f.text, sizeof f.text, "%s", text);
    uint8_t payload[FRAME_TEXT_MAX + 16];
    conn_control(c, FRAME_ERROR, payload, frame_failed_put(payload, sizeof payload, &f));
}

static void on_timer(uv_timer_t *t);

/* The last words are queued. Others' frames go too unless in a hurry. */
static void leave(struct conn *c, bool hurry)
{
    c->state = CONN_LEAVING;
    c->control_only = hurry;
    if (c->mute) {
        conn_destroy(c);
        return;
    }
    uv_timer_start(&c->timer, on_timer, CONN_LEAVE_MS, 0);
    conn_kick(c);
}

void conn_fault(struct conn *c, int err, uint16_t code, const char *format, ...)
{
    char why[sizeof c->why];
    va_list ap;
    va_start(ap, format);
    vsnprintf(why, sizeof why, format, ap);
    va_end(ap);
    if (c->state >= CONN_LEAVING)
        return;
    keep_reason(c, err, why);
    if (!code || c->state == CONN_DIALLING) {
        conn_destroy(c);
        return;
    }
    conn_drop_queues(c);
    tell_error(c, code, why);
    if (c->state < CONN_LEAVING)
        leave(c, true);
}

void conn_close(struct conn *c, bool flush, uint16_t code, const char *text)
{
    if (c->state >= CONN_LEAVING)
        return;
    keep_reason(c, 0, text ? text : "closed here");
    if (c->state == CONN_DIALLING || (!flush && !text)) {
        conn_destroy(c);
        return;
    }
    if (text)
        tell_error(c, code, text);
    if (c->state < CONN_LEAVING)
        leave(c, !flush);
}

/* Time */

static void tick(struct conn *c)
{
    if (c->heard) {
        c->heard = false;
        c->silent = 0;
        return;
    }
    /* Ticks are counted, not time: a process that was stopped for a minute has not heard its peer's silence. */
    if (++c->silent >= 5) {
        conn_fault(c, -ETIMEDOUT, 0, "%s has been silent for %u ms", c->peer, c->silence_ms);
        return;
    }
    uint8_t token[8];
    put_u64(token, c->silent);
    conn_control(c, FRAME_PING, token, sizeof token);
}

static void on_timer(uv_timer_t *t)
{
    struct conn *c = t->data;
    switch (c->state) {
    case CONN_DIALLING:
        conn_fault(c, -ETIMEDOUT, 0, "%s does not answer: no connection within %u ms", c->peer, CONN_SILENCE_MS);
        break;
    case CONN_GREETING:
        conn_fault(c, -ETIMEDOUT, FRAME_E_PROTOCOL, "%s said no HELLO within %u ms: is it a memsync agent?", c->peer,
                   CONN_HELLO_MS);
        break;
    case CONN_OPEN:
        tick(c);
        break;
    case CONN_LEAVING:
        conn_destroy(c);
        break;
    case CONN_CLOSED:
        break;
    }
}

void conn_set_silence(struct conn *c, unsigned ms)
{
    c->silence_ms = ms;
    if (c->state == CONN_OPEN)
        uv_timer_start(&c->timer, on_timer, ms / 5, ms / 5);
}

/* Receiving */

static void on_hello(struct conn *c, const struct buf *p)
{
    struct frame_hello peer;
    if (c->state != CONN_GREETING || frame_hello_get(p->data, p->len, &peer) < 0) {
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
    c->state = CONN_OPEN;
    conn_set_silence(c, c->silence_ms);
    conn_kick(c);
    c->ops->open(c->owner, &peer);
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

static void on_close(struct conn *c, struct buf *p)
{
    if (p->len != 4) {
        conn_fault(c, -EPROTO, FRAME_E_PROTOCOL, "%s: a CLOSE out of form", c->peer);
        return;
    }
    struct stream *s = conn_stream(c, get_u32(p->data));
    bool ours = s && s->forgotten, known = s && !ours;
    if (s)
        conn_stream_free(c, s);
    if (!ours) /* whoever closes first hears CLOSE in answer, and then knows that nothing more comes */
        conn_control(c, FRAME_CLOSE, p->data, p->len);
    if (known && c->state == CONN_OPEN)
        c->ops->frame(c->owner, 0, FRAME_CLOSE, p);
}

static void on_control(struct conn *c, uint8_t type, struct buf *p)
{
    if (type == FRAME_ERROR) {
        on_error(c, p);
    } else if (type == FRAME_HELLO || c->state == CONN_GREETING) {
        if (type == FRAME_HELLO)
            on_hello(c, p);
        else
            conn_fault(c, -EPROTO, FRAME_E_PROTOCOL, "%s began without a HELLO", c->peer);
    } else if (type == FRAME_PING) {
        conn_control(c, FRAME_PONG, p->data, p->len < 8 ? p->len : 8);
    } else if (type == FRAME_WINDOW_MORE) {
        on_window(c, p);
    } else if (type == FRAME_CLOSE) {
        on_close(c, p);
    } else if (type != FRAME_PONG) {
        conn_fault(c, -EPROTO, FRAME_E_PROTOCOL, "%s: a frame of type %u on stream 0", c->peer, type);
    }
}

static void on_frame(struct conn *c, const struct frame_header *h, struct buf *p)
{
    if (!h->stream) {
        on_control(c, h->type, p);
        return;
    }
    if (c->state != CONN_OPEN) {
        if (c->state == CONN_GREETING)
            conn_fault(c, -EPROTO, FRAME_E_PROTOCOL, "%s began without a HELLO", c->peer);
        return;
    }
    if (h->type < FRAME_ATTACH) {
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
    c->ops->frame(c->owner, h->stream, h->type, p);
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
    conn_control(c, FRAME_WINDOW_MORE, payload, sizeof payload);
}

/* Takes one whole frame off the input. False when there is none, or no more is wanted. */
static bool step(struct conn *c)
{
    struct frame_header h;
    int64_t n = frame_step(c->in + c->in_start, c->in_end - c->in_start, &h);
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
    memcpy(p->data, c->in + c->in_start + FRAME_HEADER, h.len);
    p->len = h.len;
    c->in_start += (size_t)n;
    on_frame(c, &h, p);
    buf_drop(p);
    return true;
}

static bool deaf(const struct conn *c)
{
    return c->state == CONN_CLOSED || (c->state == CONN_LEAVING && c->control_only);
}

static void on_alloc(uv_handle_t *h, size_t suggested, uv_buf_t *to)
{
    struct conn *c = h->data;
    (void)suggested;
    if (c->in_start == c->in_end) {
        c->in_start = c->in_end = 0;
    } else if (IN_CAP - c->in_end < IN_ROOM) {
        memmove(c->in, c->in + c->in_start, c->in_end - c->in_start);
        c->in_end -= c->in_start;
        c->in_start = 0;
    }
    *to = uv_buf_init((char *)c->in + c->in_end, (unsigned)(IN_CAP - c->in_end));
}

static void on_eof(struct conn *c)
{
    if (c->state == CONN_LEAVING)
        conn_destroy(c);
    else if (c->mute)
        conn_fault(c, c->mute, 0, "%s: %s", c->peer, uv_strerror(c->mute));
    else if (c->state == CONN_GREETING)
        conn_fault(c, -ECONNRESET, 0, "%s hung up before saying HELLO", c->peer);
    else if (c->in_start != c->in_end)
        conn_fault(c, -ECONNRESET, 0, "%s hung up in the middle of a frame", c->peer);
    else
        conn_fault(c, 0, 0, "%s closed the connection", c->peer);
}

static void on_read(uv_stream_t *socket, ssize_t n, const uv_buf_t *buf)
{
    struct conn *c = socket->data;
    (void)buf;
    if (c->state == CONN_CLOSED || !n)
        return;
    if (n == UV_EOF) {
        on_eof(c);
        return;
    }
    if (n < 0) {
        if (c->state == CONN_LEAVING)
            conn_destroy(c);
        else
            conn_fault(c, (int)n, 0, "%s: %s", c->peer, uv_strerror((int)n));
        return;
    }
    c->heard = true;
    c->bytes_in += (uint64_t)n;
    c->in_end += (size_t)n;
    while (!deaf(c) && step(c))
        ;
    if (deaf(c))
        c->in_start = c->in_end = 0;
}

/* Beginnings */

static struct conn *conn_new(uv_loop_t *loop, const struct frame_hello *self, const struct conn_ops *ops, void *owner)
{
    struct conn *c = calloc(1, sizeof *c);
    if (!c || !(c->in = malloc(IN_CAP))) {
        free(c);
        return NULL;
    }
    c->loop = loop;
    c->self = *self;
    c->ops = ops;
    c->owner = owner;
    c->silence_ms = CONN_SILENCE_MS;
    conn_out_init(c);
    uv_timer_init(loop, &c->timer);
    uv_idle_init(loop, &c->pump);
    c->timer.data = c->pump.data = c;
    c->handles = 2;
    return c;
}

static void socket_options(uv_stream_t *socket)
{
    if (socket->type != UV_TCP)
        return;
    uv_tcp_nodelay((uv_tcp_t *)socket, 1);
    int fd, ahead = CONN_NOTSENT;
    if (!uv_fileno((uv_handle_t *)socket, &fd)) /* without it urgent frames wait longer, nothing more */
        (void)!setsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &ahead, sizeof ahead);
}

/* The socket is connected. */
static void greet(struct conn *c)
{
    uint8_t hello[512];
    socket_options(c->socket);
    c->socket->data = c;
    c->state = CONN_GREETING;
    uv_timer_start(&c->timer, on_timer, CONN_HELLO_MS, 0);
    int rc = uv_read_start(c->socket, on_alloc, on_read);
    if (rc < 0)
        conn_fault(c, rc, 0, "%s: %s", c->peer, uv_strerror(rc));
    else
        conn_control(c, FRAME_HELLO, hello, frame_hello_put(hello, sizeof hello, &c->self));
}

struct conn *conn_take(uv_stream_t *stream, const struct frame_hello *self, const struct conn_ops *ops, void *owner)
{
    struct conn *c = conn_new(stream->loop, self, ops, owner);
    if (!c)
        return NULL;
    struct sockaddr_storage sa;
    int len = sizeof sa;
    if (stream->type == UV_TCP && !uv_tcp_getpeername((uv_tcp_t *)stream, (struct sockaddr *)&sa, &len))
        addr_text((struct sockaddr *)&sa, c->peer, sizeof c->peer);
    else
        snprintf(c->peer, sizeof c->peer, "%s", stream->type == UV_TCP ? "a peer that is gone" : "unix:peer");
    c->socket = stream;
    c->handles++;
    greet(c);
    return c;
}

static void on_connected(uv_connect_t *req, int status)
{
    struct conn *c = req->data;
    if (c->state == CONN_CLOSED)
        return;
    if (status < 0) {
        c->dial_err = status;
        dial_next(c);
        return;
    }
    uv_freeaddrinfo(c->addresses);
    c->addresses = c->address = NULL;
    greet(c);
}

static void socket_new(struct conn *c, bool tcp)
{
    union {
        uv_tcp_t tcp;
        uv_pipe_t pipe;
    } *h = calloc(1, tcp ? sizeof h->tcp : sizeof h->pipe);
    if (!h)
        return;
    if (tcp)
        uv_tcp_init(c->loop, &h->tcp);
    else
        uv_pipe_init(c->loop, &h->pipe, 0);
    c->socket = (uv_stream_t *)h;
    c->socket->data = c;
    c->handles++;
}

/* Tries the addresses of the host one after the other. */
static void dial_next(struct conn *c)
{
    while (c->address) {
        struct addrinfo *ai = c->address;
        c->address = ai->ai_next;
        socket_close(c);
        socket_new(c, true);
        if (!c->socket)
            break;
        c->connect.data = c;
        int rc = uv_tcp_connect(&c->connect, (uv_tcp_t *)c->socket, ai->ai_addr, on_connected);
        if (!rc)
            return;
        c->dial_err = rc;
    }
    conn_fault(c, c->dial_err ? c->dial_err : -ENOMEM, 0, "cannot connect to %s: %s", c->peer,
               uv_strerror(c->dial_err ? c->dial_err : -ENOMEM));
}

static void on_resolved(uv_getaddrinfo_t *req, int status, struct addrinfo *all)
{
    struct conn *c = req->data;
    req->data = NULL;
    if (c->state == CONN_CLOSED) {
        uv_freeaddrinfo(all);
    } else if (status < 0) {
        conn_fault(c, -EHOSTUNREACH, 0, "the host of %s is not found: %s", c->peer, uv_strerror(status));
    } else {
        c->addresses = c->address = all;
        dial_next(c);
    }
    handle_gone(c);
}

static void dial_unix(struct conn *c, const char *path)
{
    struct sockaddr_un sa;
    int dir, rc = addr_unix(path, &sa, &dir);
    if (rc < 0) {
        conn_fault(c, rc, 0, "cannot connect to %s: %s", c->peer, uv_strerror(rc));
        return;
    }
    socket_new(c, false);
    c->connect.data = c;
    if (c->socket)
        uv_pipe_connect(&c->connect, (uv_pipe_t *)c->socket, sa.sun_path, on_connected);
    else
        conn_fault(c, -ENOMEM, 0, "no memory to connect to %s", c->peer);
    if (dir >= 0)
        close(dir);
}

struct conn *conn_dial(uv_loop_t *loop, const char *addr, const struct frame_hello *self, const struct conn_ops *ops,
                       void *owner)
{
    struct conn *c = conn_new(loop, self, ops, owner);
    if (!c)
        return NULL;
    struct addr a;
    snprintf(c->peer, sizeof c->peer, "%s", addr);
    uv_timer_start(&c->timer, on_timer, CONN_SILENCE_MS, 0);
    if (addr_parse(&a, addr) < 0) {
        conn_fault(c, -EINVAL, 0, "%s is not an address: HOST:PORT, [V6]:PORT or unix:PATH", addr);
        return c;
    }
    if (a.is_unix) {
        dial_unix(c, a.path);
        return c;
    }
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM};
    c->resolve.data = c;
    int rc = uv_getaddrinfo(loop, &c->resolve, on_resolved, a.host, a.port, &hints);
    if (rc < 0) {
        c->resolve.data = NULL;
        conn_fault(c, rc, 0, "the host of %s is not found: %s", c->peer, uv_strerror(rc));
    } else {
        c->handles++;
    }
    return c;
}

const char *conn_peer(const struct conn *c)
{
    return c->peer;
}

uint64_t conn_bytes_in(const struct conn *c)
{
    return c->bytes_in;
}
