/* Encryption of a connection's sockets: each is a TLS session of its own, further ones too. See conn_private.h, tls.h.
 *
 * The first frame goes when the peer is known, and nothing that comes before is looked at. What is put into records
 * cannot go back to its queue: a batch that the kernel does not take is written by libuv, and an urgent frame waits for
 * the rest of it.
 *
 * A handshake that fails ends the connection by way of CONN_LEAVING, where nothing but the alert is sent. To a peer that
 * begins with a frame where TLS is wanted, that is said in a frame; nothing else goes. */
#include "agent/net/conn_private.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define CIPHER (64u << 10) /* read at a time */

static uint8_t cipher[CIPHER]; /* from one on_alloc to its on_read */

uint8_t *conn_tls_room(size_t *cap)
{
    *cap = sizeof cipher;
    return cipher;
}

static void send_now(struct sock *k)
{
    const uint8_t *bytes;
    size_t len = tls_out(k->tls, &bytes);
    uv_buf_t buf = uv_buf_init((char *)bytes, (unsigned)len);
    if (len && !k->sealed && uv_try_write(k->stream, &buf, 1) == (int)len)
        tls_sent(k->tls, len);
}

static void failed(struct sock *k)
{
    struct conn *c = k->conn;
    if (k->index && k->state != SOCK_OPEN) {
        send_now(k);
        sock_failed(k, -EACCES);
        return;
    }
    if (c->state == CONN_LEAVING)
        return;
    conn_fault(c, -EACCES, FRAME_E_PROTOCOL, "%s: TLS: %s", c->peer, tls_why(k->tls));
}

void conn_tls_begin(struct sock *k)
{
    struct conn *c = k->conn;
    k->tls = tls_new(c->tls, c->tls_host);
    if (!k->tls && k->index)
        sock_failed(k, -ENOMEM);
    else if (!k->tls)
        conn_fault(c, -ENOMEM, 0, "%s: TLS: no memory, or %s is no name", c->peer, c->tls_host ? c->tls_host : "it");
    else if (c->tls_host && tls_feed(k->tls, NULL, 0))
        failed(k);
    else
        conn_kick(c);
}

/* A peer that has not heard of TLS; only a server tells: a client is not to be led away from it. */
static bool is_plain(const struct sock *k, const uint8_t *bytes, size_t len)
{
    uint8_t magic[FRAME_HEADER];
    frame_header_put(magic, FRAME_HELLO, 0, 0, 0, 0);
    return !k->conn->tls_host && !tls_begun(k->tls) && len >= 2 && !memcmp(bytes, magic, 2);
}

static void refuse_plain(struct sock *k)
{
    tls_free(k->tls);
    k->tls = NULL;
    conn_fault(k->conn, -EPROTO, FRAME_E_PROTOCOL,
               "%s speaks without TLS, and this listener takes nothing else: set MEMSYNC_CERT_DIR or MEMSYNC_PSK_FILE there",
               k->conn->peer);
}

void conn_tls_in(struct sock *k, const uint8_t *bytes, size_t len)
{
    if (conn_deaf(k->conn))
        return;
    if (is_plain(k, bytes, len)) {
        refuse_plain(k);
        return;
    }
    if (tls_feed(k->tls, bytes, len)) {
        failed(k);
        return;
    }
    if (tls_ready(k->tls) && !k->greeted) {
        k->greeted = true;
        sock_greet(k);
    }
    ssize_t n = 0;
    while (!conn_deaf(k->conn)) {
        sock_room(k);
        n = tls_take(k->tls, k->in + k->in_end, SOCK_IN_CAP - k->in_end);
        if (n <= 0)
            break;
        k->in_end += (size_t)n;
        while (!conn_deaf(k->conn) && conn_step(k)) /* a JOIN moves it to another connection */
            ;
    }
    if (conn_deaf(k->conn))
        k->in_start = k->in_end = 0;
    else if (n < 0)
        failed(k);
    else if (tls_out(k->tls, &bytes))
        conn_kick(k->conn);
}

static void on_sealed(uv_write_t *req, int status)
{
    struct sock *k = req->data;
    struct conn *c = k->conn;
    free(k->sealed);
    k->sealed = NULL;
    if (c->state == CONN_CLOSED || c->socks[k->index] != k)
        return;
    if (status < 0) {
        conn_write_failed(k, status);
        return;
    }
    if (k->index)
        k->heard = true; /* as in conn_pump.c */
    conn_kick(c);
}

/* The kernel is full: libuv waits with what is left. */
static void write_rest(struct sock *k)
{
    size_t at, len;
    k->sealed = tls_out_take(k->tls, &at, &len);
    k->conn->bytes_out += len;
    uv_buf_t buf = uv_buf_init((char *)k->sealed + at, (unsigned)len);
    int rc = uv_write(&k->write, k->stream, &buf, 1, on_sealed);
    if (rc < 0) {
        free(k->sealed);
        k->sealed = NULL;
        conn_write_failed(k, rc);
    }
}

/* Frames up to a batch, into records. 0, or what tls_put says. */
static int seal_batch(struct sock *k, uint32_t *streams, unsigned *n)
{
    int rc = 0;
    for (size_t bytes = 0; !rc && *n < CONN_BATCH && bytes < k->ahead; ++*n) {
        struct out *o = conn_next_out(k);
        if (!o)
            break;
        uv_buf_t piece[2];
        unsigned pieces = conn_pieces(o, 0, piece);
        for (unsigned i = 0; !rc && i < pieces; i++) {
            rc = tls_put(k->tls, (uint8_t *)piece[i].base, piece[i].len);
            bytes += piece[i].len;
        }
        streams[*n] = o->stream;
        out_free(o);
    }
    return rc ? rc : tls_flush(k->tls);
}

bool conn_tls_pump(struct sock *k, uint32_t *streams, unsigned *n)
{
    const uint8_t *bytes;
    if (tls_failed(k->tls)) {
        out_queue_free(&k->control); /* the alert is all that goes */
        k->control_queued = 0;
    } else if (tls_ready(k->tls) && !tls_out(k->tls, &bytes) && seal_batch(k, streams, n)) {
        failed(k);
        return false;
    }
    size_t len = tls_out(k->tls, &bytes);
    if (!len)
        return false;
    uv_buf_t buf = uv_buf_init((char *)bytes, (unsigned)len);
    int rc = uv_try_write(k->stream, &buf, 1);
    if (rc < 0 && rc != UV_EAGAIN) {
        conn_write_failed(k, rc);
        return false;
    }
    if (rc > 0) {
        k->conn->bytes_out += (unsigned)rc;
        tls_sent(k->tls, (size_t)rc);
    }
    if (rc == (int)len)
        return true;
    write_rest(k);
    return false;
}

void conn_tls_bye(struct sock *k)
{
    tls_bye(k->tls);
    send_now(k);
}
