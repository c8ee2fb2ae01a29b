/* One connection: bytes in, one message at a time; answers out, gathered until the loop is about to wait.
 *
 * Requests are taken while what they ask for fits the budgets: an answer counts from its request until its last byte is
 * the kernel's. A client that reads no answers is therefore not read any more either. A single request may go beyond a
 * connection's budget, so that the longest can be answered.
 *
 * The end: closed by either side, what is under way finishes with nobody to tell; the memory goes with the last of it.
 */
#include "agent/nbd/inside.h"

#include "agent/base/log.h"
#include "agent/net/addr.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#define BATCH 32u
#define OUT_COST 128u /* of the budget, for an answer however short */

struct sending {
    uv_write_t write;
    struct nbd_conn *conn;
    struct outs outs;
};

void conn_hold(struct nbd_conn *c)
{
    c->refs++;
}

static void outs_drop(struct nbd_conn *c, struct outs *outs)
{
    for (struct out *o; (o = TAILQ_FIRST(outs));) {
        TAILQ_REMOVE(outs, o, link);
        conn_paid(c, o->owed);
        buf_drop(o->data);
        free(o);
    }
}

void conn_drop(struct nbd_conn *c)
{
    if (--c->refs)
        return;
    free(c->in);
    free(c);
}

void conn_owe(struct nbd_conn *c, uint64_t bytes)
{
    c->owed += bytes;
    c->nbd->owed += bytes;
}

void conn_paid(struct nbd_conn *c, uint64_t bytes)
{
    c->owed -= bytes;
    c->nbd->owed -= bytes;
}

static void on_closed(uv_handle_t *h)
{
    struct nbd_conn *c = h->data;
    struct nbd *n = c->nbd;
    c->closed = true;
    outs_drop(c, &c->outs);
    TAILQ_REMOVE(&n->conns, c, link);
    n->conns_n--;
    free(h);
    c->h = NULL;
    export_leave(c);
    conn_drop(c);
    nbd_look(n);
}

static void conn_close(struct nbd_conn *c)
{
    if (c->closing)
        return;
    c->closing = true;
    uv_close(&c->h->any, on_closed);
}

void conn_fail(struct nbd_conn *c, const char *why)
{
    if (!c->closing)
        log_info("NBD client %s: connection closed: %s", c->party, why);
    conn_close(c);
}

static void conn_look(struct nbd_conn *c)
{
    if (c->leaving && !c->requests && !c->asking && !c->owed && TAILQ_EMPTY(&c->outs) &&
        !uv_stream_get_write_queue_size(&c->h->stream))
        conn_close(c);
}

void conn_leave(struct nbd_conn *c)
{
    c->leaving = true;
    c->flushing = true; /* and looked at there */
}

static void on_written(uv_write_t *w, int status)
{
    struct sending *s = w->data;
    struct nbd_conn *c = s->conn;
    c->moved = uv_now(c->nbd->loop);
    outs_drop(c, &s->outs);
    free(s);
    if (status < 0 && !c->closing)
        conn_fail(c, uv_strerror(status));
    if (!c->closing) {
        conn_pump(c);
        conn_look(c);
    }
    conn_drop(c);
}

/* What the socket takes at once costs no turn of the loop; how many of the bufs were left, the first of them cut. Not
 * when the connection waits for what an answer frees: on_written goes on then. */
static unsigned send_now(struct nbd_conn *c, uv_buf_t **bufs, unsigned n)
{
    int sent = c->reading && !c->nbd->starved ? uv_try_write(&c->h->stream, *bufs, n) : 0;
    size_t left = sent > 0 ? (size_t)sent : 0;
    for (; n && left >= (*bufs)->len; n--)
        left -= (*bufs)++->len;
    if (n) {
        (*bufs)->base += left;
        (*bufs)->len -= left;
    }
    return n;
}

static bool batch_send(struct nbd_conn *c)
{
    struct sending *s = malloc(sizeof *s);
    if (!s) {
        conn_fail(c, "no memory for an answer");
        return false;
    }
    *s = (struct sending){.conn = c};
    s->write.data = s;
    TAILQ_INIT(&s->outs);
    uv_buf_t bufs[2 * BATCH], *rest = bufs;
    unsigned n = 0;
    for (struct out *o; n + 2 <= 2 * BATCH && (o = TAILQ_FIRST(&c->outs));) {
        TAILQ_REMOVE(&c->outs, o, link);
        TAILQ_INSERT_TAIL(&s->outs, o, link);
        bufs[n++] = uv_buf_init((char *)o->head, o->len);
        if (o->data)
            bufs[n++] = uv_buf_init((char *)o->data->data, o->data->len);
    }
    n = send_now(c, &rest, n);
    if (!n) {
        c->moved = uv_now(c->nbd->loop);
        outs_drop(c, &s->outs);
        free(s);
        return true;
    }
    conn_hold(c);
    int rc = uv_write(&s->write, &c->h->stream, rest, n, on_written);
    if (!rc)
        return true;
    outs_drop(c, &s->outs);
    free(s);
    conn_fail(c, uv_strerror(rc));
    conn_drop(c);
    return false;
}

void conn_flush(struct nbd_conn *c)
{
    c->flushing = false;
    while (!c->closing && !TAILQ_EMPTY(&c->outs))
        if (!batch_send(c))
            return;
    if (!c->closing)
        conn_look(c);
}

bool conn_out(struct nbd_conn *c, const void *head, size_t len, struct buf *data, uint32_t owed)
{
    struct out *o = c->closing ? NULL : malloc(sizeof *o);
    if (!o) {
        if (!c->closing)
            conn_fail(c, "no memory for an answer");
        conn_paid(c, owed);
        buf_drop(data);
        return false;
    }
    conn_owe(c, OUT_COST);
    *o = (struct out){.data = data, .owed = owed + OUT_COST, .len = (uint32_t)len};
    memcpy(o->head, head, len);
    TAILQ_INSERT_TAIL(&c->outs, o, link);
    c->flushing = true;
    return true;
}

bool conn_out_bytes(struct nbd_conn *c, const void *head, size_t len, const void *more, size_t more_len)
{
    struct buf *b = more_len ? buf_new(more_len) : NULL;
    if (more_len && !b) {
        conn_fail(c, "no memory for an answer");
        return false;
    }
    if (b) {
        memcpy(b->data, more, more_len);
        b->len = (uint32_t)more_len;
    }
    conn_owe(c, more_len);
    return conn_out(c, head, len, b, (uint32_t)more_len);
}

/* Whether no more can be taken before something is done. */
static bool must_wait(struct nbd_conn *c)
{
    struct nbd *n = c->nbd;
    if (c->closing || c->leaving || c->blocked || c->asking || c->requests >= NBD_IN_FLIGHT || c->owed > NBD_BUDGET)
        return true;
    if (n->owed <= NBD_BUDGET_ALL || !c->owed)
        return false;
    n->starved = true;
    return true;
}

/* One message, or a part of a payload: how many bytes it used. *more: there may be another. */
static size_t take(struct nbd_conn *c, const uint8_t *at, size_t have, bool *more)
{
    *more = true;
    if (c->putting)
        return request_put(c, at, have, more);
    if (c->drain) {
        size_t n = have < c->drain ? have : c->drain;
        c->drain -= (uint32_t)n;
        *more = n;
        return n;
    }
    int64_t used = nbd_server_step(&c->proto, at, have, &c->got);
    *more = used > 0;
    if (used < 0)
        conn_fail(c, "it sent what is not of the protocol");
    if (used <= 0)
        return 0;
    if (c->got.kind == NBD_GOT_REQUEST)
        request_begin(c);
    else if (c->got.kind == NBD_GOT_OPTION)
        handshake_option(c);
    else if (c->got.kind == NBD_GOT_REFUSED)
        handshake_refuse(c, c->got.option, c->got.reply, c->got.text);
    return (size_t)used;
}

static void on_alloc(uv_handle_t *h, size_t suggested, uv_buf_t *buf)
{
    (void)suggested;
    struct nbd_conn *c = h->data;
    *buf = uv_buf_init((char *)c->in + c->in_len, (unsigned)(NBD_INPUT - c->in_len));
}

static void on_read(uv_stream_t *stream, ssize_t n, const uv_buf_t *buf)
{
    (void)buf;
    struct nbd_conn *c = stream->data;
    if (n > 0)
        c->in_len += (size_t)n;
    if (n < 0) {
        uv_read_stop(stream);
        c->reading = false;
        if (n != UV_EOF || c->putting || c->proto.phase != NBD_REQUESTS)
            conn_fail(c, n == UV_EOF ? "the client has gone" : uv_strerror((int)n));
        else
            conn_leave(c);
        return;
    }
    conn_pump(c);
}

void conn_pump(struct nbd_conn *c)
{
    size_t at = 0;
    bool more = !c->closing;
    while (more && !must_wait(c))
        at += take(c, c->in + at, c->in_len - at, &more);
    if (c->closing)
        return;
    c->in_len -= at;
    memmove(c->in, c->in + at, c->in_len);
    bool want = !c->leaving && !must_wait(c) && c->in_len < NBD_INPUT;
    if (want && !c->reading)
        uv_read_start(&c->h->stream, on_alloc, on_read);
    else if (!want && c->reading)
        uv_read_stop(&c->h->stream);
    c->reading = want;
}

void conn_tick(struct nbd_conn *c, uint64_t now)
{
    if (c->proto.phase != NBD_REQUESTS && !c->asking && now - c->since > NBD_HANDSHAKE_MS)
        conn_fail(c, "it did not choose an export in time");
    else if (c->nbd->starved && uv_stream_get_write_queue_size(&c->h->stream) && now - c->moved > NBD_STUCK_MS)
        conn_fail(c, "it reads no answers, and others wait for the memory");
}

/* Who it is: a host, or behind a unix socket a process. */
static void party_find(struct nbd_conn *c)
{
    uv_os_fd_t fd;
    struct ucred cred;
    socklen_t len = sizeof cred;
    struct sockaddr_storage sa;
    int sa_len = sizeof sa;
    snprintf(c->party, sizeof c->party, "unknown");
    if (c->h->any.type == UV_TCP) {
        if (!uv_tcp_getpeername(&c->h->tcp, (struct sockaddr *)&sa, &sa_len))
            uv_ip_name((struct sockaddr *)&sa, c->party, sizeof c->party);
    } else if (!uv_fileno(&c->h->any, &fd) && !getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &len)) {
        snprintf(c->party, sizeof c->party, "process %d of user %u", (int)cred.pid, cred.uid);
    }
}

struct nbd_conn *conn_new(struct nbd *n, uv_stream_t *stream, const char *who)
{
    struct nbd_conn *c = calloc(1, sizeof *c);
    if (!c || !(c->in = malloc(NBD_INPUT))) {
        free(c);
        return NULL;
    }
    c->nbd = n;
    c->h = (void *)stream;
    c->h->any.data = c;
    c->refs = 1;
    c->since = c->moved = uv_now(n->loop);
    TAILQ_INIT(&c->outs);
    if (who)
        snprintf(c->party, sizeof c->party, "%s", who);
    else
        party_find(c);
    if (stream->type == UV_TCP)
        uv_tcp_nodelay(&c->h->tcp, 1);
    TAILQ_INSERT_TAIL(&n->conns, c, link);
    n->conns_n++;
    return c;
}

void conn_greet(struct nbd_conn *c)
{
    uint8_t greeting[NBD_GREETING];
    conn_out(c, greeting, nbd_greeting(greeting), NULL, 0);
    conn_pump(c);
}
