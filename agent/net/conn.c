/* The life of a connection: beginning, time, end. The states are in conn_private.h.
 *
 * Whatever ends a connection ends in conn_destroy: every handle is closed, and when libuv has given the last one back,
 * the owner's `closed` is called and the memory freed. So `closed` never comes from within a call of the owner's, and
 * nothing is freed under a callback. A fault found in what the peer sends takes the way over CONN_LEAVING, so that the
 * peer's log says what was wrong with it. */
#include "agent/net/addr.h"
#include "agent/net/conn_private.h"

#include <errno.h>
#include <netdb.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

static void dial_next(struct conn *c);

static void last_handle(struct conn *c)
{
    conn_out_free(c);
    c->ops->closed(c->owner, c->err, c->why);
    free(c->path);
    free(c->tls_host);
    free(c);
}

void conn_handle_gone(struct conn *c)
{
    if (!--c->handles)
        last_handle(c);
}

static void on_handle_closed(uv_handle_t *h)
{
    conn_handle_gone(h->data);
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
    for (unsigned i = 0; i < CONN_SOCKETS; i++)
        if (c->socks[i])
            sock_close(c->socks[i]);
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
    conn_control(c->socks[0], FRAME_ERROR, payload, frame_failed_put(payload, sizeof payload, &f));
}

/* The last words are queued. Others' frames go too unless in a hurry. */
static void leave(struct conn *c, bool hurry)
{
    c->state = CONN_LEAVING;
    c->control_only = hurry;
    if (c->mute) {
        conn_destroy(c);
        return;
    }
    for (unsigned i = 1; i < CONN_SOCKETS; i++)
        if (c->socks[i] && c->socks[i]->state != SOCK_OPEN)
            sock_close(c->socks[i]);
    uv_timer_start(&c->timer, conn_on_timer, CONN_LEAVE_MS, 0);
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

static void sock_tick(struct conn *c, struct sock *k)
{
    if (k->heard) {
        k->heard = false;
        k->silent = 0;
        return;
    }
    /* Ticks are counted, not time: a process that was stopped for a minute has not heard its peer's silence. */
    if (++k->silent >= 5) {
        if (k->state == SOCK_OPEN)
            conn_fault(c, -ETIMEDOUT, 0, "%s has been silent for %u ms", c->peer, c->silence_ms);
        else
            sock_failed(k, -ETIMEDOUT);
        return;
    }
    uint8_t token[8];
    put_u64(token, k->silent);
    if (k->state == SOCK_OPEN)
        conn_control(k, FRAME_PING, token, sizeof token);
}

static void tick(struct conn *c)
{
    for (unsigned i = 0; i < CONN_SOCKETS && c->state == CONN_OPEN; i++)
        if (c->socks[i])
            sock_tick(c, c->socks[i]);
}

/* A socket has failed or was shut by the peer a moment ago. While the others bring something it is waited for. */
static void end_of_ending(struct conn *c)
{
    bool heard = false;
    for (unsigned i = 0; i < CONN_SOCKETS; i++)
        if (c->socks[i]) {
            heard = heard || (c->socks[i]->heard && !c->socks[i]->ended);
            c->socks[i]->heard = false;
        }
    if (heard && !c->mute)
        uv_timer_start(&c->timer, conn_on_timer, CONN_LEAVE_MS, 0);
    else
        conn_fault(c, c->mute ? c->mute : -ECONNRESET, 0, "%s: one of its %u sockets is lost: %s", c->peer,
                   conn_sockets(c), c->mute ? uv_strerror(c->mute) : "closed by the peer");
}

void conn_on_timer(uv_timer_t *t)
{
    struct conn *c = t->data;
    if (c->state < CONN_LEAVING && (c->ending || c->mute)) {
        end_of_ending(c);
        return;
    }
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
    if (c->state == CONN_OPEN && !c->ending && !c->mute)
        uv_timer_start(&c->timer, conn_on_timer, ms / 5, ms / 5);
}

/* Beginnings */

static struct conn *conn_new(uv_loop_t *loop, const struct frame_hello *self, const struct conn_ops *ops, void *owner)
{
    struct conn *c = calloc(1, sizeof *c);
    if (!c || !sock_new(c, 0)) {
        free(c);
        return NULL;
    }
    c->loop = loop;
    c->self = *self;
    memset(&c->self.token, 0, sizeof c->self.token);
    c->ops = ops;
    c->owner = owner;
    c->silence_ms = CONN_SILENCE_MS;
    conn_out_init(c);
    uv_timer_init(loop, &c->timer);
    uv_idle_init(loop, &c->pump);
    c->timer.data = c->pump.data = c;
    c->handles += 2;
    return c;
}

struct conn *conn_take_tls(uv_stream_t *stream, struct tls_config *tls, const struct frame_hello *self,
                           const struct conn_ops *ops, void *owner)
{
    struct conn *c = conn_new(stream->loop, self, ops, owner);
    if (!c)
        return NULL;
    c->tls = tls;
    if (ops->join)
        id_new(&c->self.token);
    struct sockaddr_storage sa;
    int len = sizeof sa;
    if (stream->type == UV_TCP && !uv_tcp_getpeername((uv_tcp_t *)stream, (struct sockaddr *)&sa, &len))
        addr_text((struct sockaddr *)&sa, c->peer, sizeof c->peer);
    else
        snprintf(c->peer, sizeof c->peer, "%s", stream->type == UV_TCP ? "a peer that is gone" : "unix:peer");
    c->socks[0]->stream = stream;
    stream->data = NULL; /* whatever its owner left there: sock_begin counts one that is not its own yet */
    c->state = CONN_GREETING;
    uv_timer_start(&c->timer, conn_on_timer, CONN_HELLO_MS, 0);
    sock_begin(c->socks[0]);
    return c;
}

struct conn *conn_take(uv_stream_t *stream, const struct frame_hello *self, const struct conn_ops *ops, void *owner)
{
    return conn_take_tls(stream, NULL, self, ops, owner);
}

static void on_connected(uv_connect_t *req, int status)
{
    struct conn *c = ((struct sock *)req->data)->conn;
    if (c->state == CONN_CLOSED)
        return;
    if (status < 0) {
        c->dial_err = status;
        dial_next(c);
        return;
    }
    uv_freeaddrinfo(c->addresses);
    c->addresses = c->address = NULL;
    int len = sizeof c->dialled;
    uv_stream_t *stream = c->socks[0]->stream;
    if (stream->type != UV_TCP || uv_tcp_getpeername((uv_tcp_t *)stream, (struct sockaddr *)&c->dialled, &len) < 0)
        c->dialled.ss_family = AF_UNSPEC;
    c->state = CONN_GREETING;
    uv_timer_start(&c->timer, conn_on_timer, CONN_HELLO_MS, 0);
    sock_begin(c->socks[0]);
}

/* Tries the addresses of the host one after the other. */
static void dial_next(struct conn *c)
{
    struct sock *k = c->socks[0];
    while (c->address) {
        struct addrinfo *ai = c->address;
        c->address = ai->ai_next;
        sock_stream_close(k);
        if (!sock_stream_new(k, true))
            break;
        int rc = uv_tcp_connect(&k->connect, (uv_tcp_t *)k->stream, ai->ai_addr, on_connected);
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
    conn_handle_gone(c);
}

struct conn *conn_dial(uv_loop_t *loop, const char *addr, const struct frame_hello *self, const struct conn_ops *ops,
                       void *owner)
{
    struct conn *c = conn_new(loop, self, ops, owner);
    if (!c)
        return NULL;
    struct addr a;
    snprintf(c->peer, sizeof c->peer, "%s", addr);
    uv_timer_start(&c->timer, conn_on_timer, CONN_SILENCE_MS, 0);
    if (addr_parse(&a, addr) < 0) {
        conn_fault(c, -EINVAL, 0, "%s is not an address: HOST:PORT, [V6]:PORT or unix:PATH", addr);
        return c;
    }
    if (a.is_unix) {
        int rc = (c->path = strdup(a.path)) ? sock_dial_unix(c->socks[0], c->path, on_connected) : -ENOMEM;
        if (rc < 0)
            conn_fault(c, rc, 0, "cannot connect to %s: %s", c->peer, uv_strerror(rc));
        return c;
    }
    c->tls = tls_dial_config();
    if (a.tls && !c->tls) {
        conn_fault(c, -EACCES, 0,
                   "%s: TLS is asked for, but this process has nothing to show: MEMSYNC_CERT_DIR or MEMSYNC_PSK_FILE was "
                   "not set when it started",
                   addr);
        return c;
    }
    if (c->tls && !(c->tls_host = strdup(a.host))) {
        conn_fault(c, -ENOMEM, 0, "no memory for %s", addr);
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

bool conn_has_token(const struct conn *c, const struct id *token)
{
    uint8_t other = 0;
    for (size_t i = 0; i < sizeof token->b; i++)
        other |= (uint8_t)(c->self.token.b[i] ^ token->b[i]);
    return !other && !id_none(token);
}

unsigned conn_sockets(const struct conn *c)
{
    unsigned n = 0;
    for (unsigned i = 0; i < CONN_SOCKETS; i++)
        n += c->socks[i] && c->socks[i]->state == SOCK_OPEN;
    return n;
}

const char *conn_identity(const struct conn *c)
{
    return c->socks[0] && c->socks[0]->tls ? tls_peer(c->socks[0]->tls) : NULL;
}

const char *conn_peer(const struct conn *c)
{
    return c->peer;
}

uint64_t conn_bytes_in(const struct conn *c)
{
    return c->bytes_in;
}

uint64_t conn_bytes_out(const struct conn *c)
{
    return c->bytes_out;
}
