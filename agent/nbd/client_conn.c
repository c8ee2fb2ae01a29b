/* The client's connections (client.h, Loss).
 *
 *     dialling ---greeting, options---> up ---one lost: all closed---> down ---back-off---> dialling
 *
 * The first connection decides: what the server offers, and whether there are more. One of those more that is refused
 * or lost in its handshake is done without. When one that is up is lost all are closed, and once their requests are the
 * library's no more, everything under way or kept waits again. A server that does not get through its handshake in
 * HELLO_MS is given up like one that is lost; a host that has vanished is found by TCP's keepalive. */
#include "agent/nbd/client_inside.h"

#include "agent/base/log.h"

#include <errno.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define IN_FIRST (128u << 10)
#define IN_MOST (NBD_STATUS_BYTES + 65536u)
#define BACKOFF_MIN_MS 50u
#define BACKOFF_MAX_MS 2000u
#define DRAIN_MS 1000u
#define HELLO_MS 10000u
#define KEEPALIVE_S 10u

void client_broke(struct nbd_client *c, int err, const char *why)
{
    if (c->broken)
        return;
    c->broken = err;
    snprintf(c->why, sizeof c->why, "%s", why);
    if (c->opened)
        c->watch.changed(c->watch.arg, false, c->why);
    client_lose(c, why);
}

static void look_closed(struct nbd_client *c)
{
    if (!c->closing || !c->timer_closed || c->looking || !TAILQ_EMPTY(&c->lines))
        return;
    client_end_all(c, -ECANCELED, "");
    uv_freeaddrinfo(c->found);
    c->closed(c->closed_arg);
    free(c);
}

static void begin(struct nbd_client *c);

static void on_timer(uv_timer_t *t)
{
    struct nbd_client *c = t->data;
    if (c->broken)
        client_end_all(c, c->broken, c->why);
    else
        begin(c);
}

void client_again(struct nbd_client *c)
{
    c->backoff = c->backoff ? c->backoff * 2 : BACKOFF_MIN_MS;
    c->backoff = c->backoff < BACKOFF_MAX_MS ? c->backoff : BACKOFF_MAX_MS;
    uv_timer_start(&c->timer, on_timer, c->broken ? 0 : c->backoff, 0);
}

static void on_timer_closed(uv_handle_t *h)
{
    struct nbd_client *c = h->data;
    c->timer_closed = true;
    look_closed(c);
}

static void timer_end(struct nbd_client *c)
{
    if (!uv_is_closing((uv_handle_t *)&c->timer))
        uv_close((uv_handle_t *)&c->timer, on_timer_closed);
}

static void on_line_closed(uv_handle_t *h)
{
    struct line *l = h->data;
    struct nbd_client *c = l->c;
    for (struct call *a; (a = TAILQ_FIRST(&l->calls));) {
        TAILQ_REMOVE(&l->calls, a, link);
        a->line = NULL;
        TAILQ_INSERT_TAIL(&c->waiting, a, link);
    }
    TAILQ_REMOVE(&c->lines, l, link);
    free(l->in);
    free(l);
    if (!TAILQ_EMPTY(&c->lines))
        return;
    client_put_back(c);
    if (c->closing)
        timer_end(c);
    else if (c->opened)
        client_again(c);
}

static void line_close(struct line *l)
{
    if (l->closing)
        return;
    l->closing = true;
    uv_close(&l->u.handle, on_line_closed);
}

void client_lose(struct nbd_client *c, const char *why)
{
    struct line *l;
    bool was = !c->down;
    c->down = true;
    uv_freeaddrinfo(c->found);
    c->found = c->address = NULL;
    if (TAILQ_EMPTY(&c->lines) && c->opened && !c->closing)
        client_again(c);
    TAILQ_FOREACH(l, &c->lines, link)
    line_close(l);
    if (was && c->opened && !c->closing && !c->broken)
        c->watch.changed(c->watch.arg, false, why);
}

/* Could not be opened, or not again. */
static void fail(struct nbd_client *c, int err, const char *text)
{
    bool first = !c->opened && !c->broken && !c->closing;
    client_lose(c, text);
    if (!first)
        return;
    c->broken = err;
    snprintf(c->why, sizeof c->why, "%s", text);
    c->watch.opened(c->watch.arg, err, c->why);
}

/* One connection more that cannot be had is done without. */
static void line_fail(struct line *l, int err, const char *text)
{
    if (!l->up && l->c->opened && !l->c->down)
        line_close(l);
    else
        fail(l->c, err, text);
}

static void traits_take(struct nbd_client *c, const struct nbd_hello *h)
{
    struct nbd_traits *t = &c->traits;
    *t = (struct nbd_traits){
        .size = h->size / h->block_min * h->block_min,
        .block_min = h->block_min,
        .block_max = h->block_max < NBD_PAYLOAD_MAX ? h->block_max : NBD_PAYLOAD_MAX,
        .read_only = h->flags & NBD_FLAG_READ_ONLY,
        .flush = h->flags & NBD_FLAG_FLUSH,
        .zeroes = h->flags & NBD_FLAG_WRITE_ZEROES,
        .multi_conn = h->flags & NBD_FLAG_MULTI_CONN,
        .allocation = h->allocation,
    };
}

static void dial(struct nbd_client *c);

static void on_granted(struct line *l)
{
    struct nbd_client *c = l->c;
    struct nbd_traits before = c->traits;
    l->up = true;
    l->talk = (struct nbd_talk){
        .structured = l->hello.structured, .allocation = l->hello.allocation, .context = l->hello.context};
    if (!c->opened || c->down) {
        traits_take(c, &l->hello);
        const char *less = before.size != c->traits.size              ? "the export has another size now"
                           : before.block_min != c->traits.block_min  ? "the export has other blocks now"
                           : !before.read_only && c->traits.read_only ? "it is read-only now"
                           : before.flush && !c->traits.flush         ? "the server cannot flush any more"
                                                                      : NULL;
        if (c->opened && less) {
            client_broke(c, -EIO, less);
            return;
        }
        c->down = false;
        c->backoff = 0;
        uv_timer_stop(&c->timer);
        if (c->traits.multi_conn)
            for (unsigned i = 1; i < NBD_CLIENT_CONNS; i++)
                dial(c);
        if (!c->opened) {
            c->opened = true;
            c->watch.opened(c->watch.arg, 0, "");
        } else {
            c->watch.changed(c->watch.arg, true, "");
        }
    }
    client_pump(c);
}

static void on_hello_sent(uv_write_t *out, int err)
{
    (void)err; /* reading tells */
    free(out);
}

static int64_t hello_take(struct line *l, const uint8_t *at, size_t have)
{
    struct out {
        uv_write_t write;
        uint8_t bytes[NBD_HELLO_SEND];
    } *out = malloc(sizeof *out);
    size_t sent = 0;
    if (!out) {
        line_fail(l, -ENOMEM, "no memory");
        return -1;
    }
    int64_t n = nbd_hello_step(&l->hello, at, have, out->bytes, &sent);
    uv_buf_t buf = uv_buf_init((char *)out->bytes, (unsigned)sent);
    if (!sent || uv_write(&out->write, &l->u.stream, &buf, 1, on_hello_sent))
        free(out);
    if (n < 0 || l->hello.phase == NBD_REFUSED) {
        line_fail(l, l->hello.err ? l->hello.err : -EPROTO, l->hello.text);
        return -1;
    }
    if (l->hello.phase == NBD_GRANTED)
        on_granted(l);
    return n;
}

static void on_alloc(uv_handle_t *h, size_t hint, uv_buf_t *buf)
{
    struct line *l = h->data;
    (void)hint;
    if (l->fill_left && !l->have) {
        *buf = uv_buf_init((char *)l->fill, l->fill_left);
        return;
    }
    if (l->have == l->cap) {
        size_t cap = l->cap ? l->cap * 2 : IN_FIRST;
        uint8_t *in = cap <= 2 * IN_MOST ? realloc(l->in, cap) : NULL;
        if (in) {
            l->in = in;
            l->cap = cap;
        }
    }
    *buf = uv_buf_init((char *)l->in + l->have, (unsigned)(l->cap - l->have));
}

static void on_bytes(uv_stream_t *s, ssize_t n, const uv_buf_t *buf)
{
    struct line *l = s->data;
    struct nbd_client *c = l->c;
    if (!n || l->closing)
        return;
    if (n < 0) {
        line_fail(l, n == UV_EOF ? -ECONNRESET : (int)n,
                  n == UV_EOF ? "the server ended the connection" : uv_strerror((int)n));
        return;
    }
    if (l->fill_left && (uint8_t *)buf->base == l->fill) {
        client_filled(l, (size_t)n);
        client_pump(c);
        return;
    }
    l->have += (size_t)n;
    size_t at = 0;
    while (at < l->have && !l->closing) {
        int64_t took = l->up ? client_answer(l, l->in + at, l->have - at) : hello_take(l, l->in + at, l->have - at);
        if (took <= 0)
            break;
        at += (size_t)took;
    }
    memmove(l->in, l->in + at, l->have - at);
    l->have -= at;
    client_pump(c);
}

static void line_open(struct nbd_client *c, const struct sockaddr *to);

static void on_connect(uv_connect_t *r, int err)
{
    struct line *l = r->data;
    struct nbd_client *c = l->c;
    if (err == UV_ECANCELED || l->closing)
        return;
    if (!err)
        err = uv_read_start(&l->u.stream, on_alloc, on_bytes);
    if (err && (!c->opened || c->down) && c->address && c->address->ai_next) { /* the host has another address */
        c->address = c->address->ai_next;
        line_close(l);
        line_open(c, c->address->ai_addr);
    } else if (err) {
        line_fail(l, err, uv_strerror(err));
    }
}

static void line_open(struct nbd_client *c, const struct sockaddr *to)
{
    struct line *l = calloc(1, sizeof *l);
    if (!l) {
        fail(c, -ENOMEM, "no memory");
        return;
    }
    l->c = c;
    l->hello.name = c->uri.name;
    TAILQ_INIT(&l->calls);
    if (to)
        uv_tcp_init(c->loop, &l->u.tcp);
    else
        uv_pipe_init(c->loop, &l->u.pipe, 0);
    l->u.handle.data = l;
    l->connect.data = l;
    TAILQ_INSERT_TAIL(&c->lines, l, link);
    int err = 0;
    if (to) {
        uv_tcp_nodelay(&l->u.tcp, 1);
        uv_tcp_keepalive(&l->u.tcp, 1, KEEPALIVE_S);
        err = uv_tcp_connect(&l->connect, &l->u.tcp, to, on_connect);
    } else {
        uv_pipe_connect(&l->connect, &l->u.pipe, c->uri.path, on_connect);
    }
    if (err)
        fail(c, err, uv_strerror(err));
}

static void on_looked_up(uv_getaddrinfo_t *r, int err, struct addrinfo *res)
{
    struct nbd_client *c = r->data;
    c->looking = false;
    if (c->closing || c->broken || err) {
        uv_freeaddrinfo(res);
        if (c->closing)
            look_closed(c);
        else if (!c->broken)
            fail(c, -EHOSTUNREACH, uv_strerror(err));
        return;
    }
    c->found = c->address = res;
    line_open(c, res->ai_addr);
}

static void dial(struct nbd_client *c)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM};
    if (c->uri.is_unix) {
        line_open(c, NULL);
    } else if (c->address) {
        line_open(c, c->address->ai_addr);
    } else if (!c->looking) {
        c->lookup.data = c;
        c->looking = !uv_getaddrinfo(c->loop, &c->lookup, on_looked_up, c->uri.host, c->uri.port, &hints);
        if (!c->looking)
            fail(c, -EHOSTUNREACH, "the host's address cannot be looked up");
    }
}

static void on_late(uv_timer_t *t)
{
    fail(t->data, -ETIMEDOUT, "the server does not answer");
}

static void begin(struct nbd_client *c)
{
    uv_timer_start(&c->timer, on_late, HELLO_MS, 0); /* first: it may fail at once */
    dial(c);
}

/* ---- the calls of client.h ---- */

int nbd_client_open(struct nbd_client **out, uv_loop_t *loop, const struct nbd_uri *uri,
                    const struct nbd_client_watch *watch)
{
    struct nbd_client *c = calloc(1, sizeof *c);
    if (!c)
        return -ENOMEM;
    c->loop = loop;
    c->uri = *uri;
    c->watch = *watch;
    c->traits.block_min = 1;
    TAILQ_INIT(&c->lines);
    TAILQ_INIT(&c->waiting);
    TAILQ_INIT(&c->kept);
    uv_timer_init(loop, &c->timer);
    c->timer.data = c;
    uv_timer_start(&c->timer, on_timer, 0, 0);
    *out = c;
    return 0;
}

/* What is under way is waited for, a while: there are servers that do not bear a connection that ends before. */
static void on_drained(uv_timer_t *t)
{
    struct nbd_client *c = t->data;
    struct line *l;
    TAILQ_FOREACH(l, &c->lines, link)
    line_close(l);
}

void client_bye(struct line *l)
{
    uint8_t bye[NBD_REQUEST];
    uv_buf_t buf = uv_buf_init((char *)bye, sizeof bye);
    nbd_ask(bye, &(struct nbd_asked){.command = NBD_CMD_DISC, .cookie = ++l->c->cookie});
    if (!l->closing && l->up)
        uv_try_write(&l->u.stream, &buf, 1);
    line_close(l);
}

void nbd_client_close(struct nbd_client *c, void (*closed)(void *arg), void *arg)
{
    struct line *l;
    c->closing = true;
    c->closed = closed;
    c->closed_arg = arg;
    uv_timer_start(&c->timer, on_drained, DRAIN_MS, 0);
    TAILQ_FOREACH(l, &c->lines, link)
    if (!l->up || !l->n)
        client_bye(l);
    if (TAILQ_EMPTY(&c->lines))
        timer_end(c);
}

const struct nbd_traits *nbd_client_traits(const struct nbd_client *c)
{
    return &c->traits;
}

int nbd_client_broken(const struct nbd_client *c)
{
    return c->broken;
}

unsigned nbd_client_conns(const struct nbd_client *c)
{
    unsigned n = 0;
    struct line *l;
    TAILQ_FOREACH(l, &c->lines, link)
    n += l->up && !l->closing;
    return n;
}
