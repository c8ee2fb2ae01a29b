/* The sockets of a connection: from dialling, or from an accepted one that JOINs, to the end of one, which is the end
 * of all. See conn_private.h.
 *
 * Reading. One socket is read for IN_TURN bytes, then the loop goes on to the others. When the peer shuts one socket,
 * or one fails, the others are read on for as long as they bring something, at most CONN_LEAVE_MS of quiet: the peer's
 * last frames and words may be on them. */
#include "agent/net/addr.h"
#include "agent/net/conn_private.h"

#include "agent/base/log.h"

#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <unistd.h>

#define NOTSENT (64 << 10)       /* bytes that the kernel of a TCP socket takes beyond what it can send */
#define NOTSENT_BULK (128 << 10) /* 512 KiB, or no limit, brings no more at 0 and at 40 ms */
#define RANK_BULK 2              /* socket(7), SO_PRIORITY, tc-prio(8): in the queue of our own network card */
#define RANK_URGENT 6
#define AHEAD_BULK (128u << 10)
#define IN_CAP SOCK_IN_CAP
#define IN_ROOM (128u << 10) /* less than this at the buffer's end: what is left of it moves to the front */
#define IN_TURN (128u << 10)

struct sock *sock_new(struct conn *c, unsigned index)
{
    struct sock *k = calloc(1, sizeof *k);
    if (!k || !(k->in = malloc(IN_CAP))) {
        free(k);
        return NULL;
    }
    k->conn = c;
    k->index = index;
    k->connect.data = k->write.data = k->shutdown.data = k;
    TAILQ_INIT(&k->control);
    c->socks[index] = k;
    return k;
}

static void sock_free(struct sock *k)
{
    out_queue_free(&k->control);
    if (k->part)
        out_free(k->part);
    tls_free(k->tls);
    free(k->sealed);
    free(k->in);
    free(k);
}

static void on_sock_closed(uv_handle_t *h)
{
    struct sock *k = h->data;
    struct conn *c = k->conn;
    sock_free(k);
    free(h);
    conn_handle_gone(c);
}

void sock_close(struct sock *k)
{
    k->conn->socks[k->index] = NULL;
    if (k->stream)
        uv_close((uv_handle_t *)k->stream, on_sock_closed);
    else
        sock_free(k);
}

static void on_stream_closed(uv_handle_t *h)
{
    struct conn *c = h->data;
    free(h);
    conn_handle_gone(c);
}

void sock_stream_close(struct sock *k)
{
    if (!k->stream)
        return;
    k->stream->data = k->conn;
    uv_close((uv_handle_t *)k->stream, on_stream_closed);
    k->stream = NULL;
}

bool sock_stream_new(struct sock *k, bool tcp)
{
    union {
        uv_tcp_t tcp;
        uv_pipe_t pipe;
    } *h = calloc(1, tcp ? sizeof h->tcp : sizeof h->pipe);
    if (!h)
        return false;
    if (tcp)
        uv_tcp_init(k->conn->loop, &h->tcp);
    else
        uv_pipe_init(k->conn->loop, &h->pipe, 0);
    k->stream = (uv_stream_t *)h;
    k->stream->data = k;
    k->conn->handles++;
    return true;
}

int sock_dial_unix(struct sock *k, const char *path, uv_connect_cb done)
{
    struct sockaddr_un sa;
    int dir, rc = addr_unix(path, &sa, &dir);
    if (rc < 0)
        return rc;
    if (sock_stream_new(k, false))
        uv_pipe_connect(&k->connect, (uv_pipe_t *)k->stream, sa.sun_path, done);
    else
        rc = -ENOMEM;
    if (dir >= 0)
        close(dir);
    return rc;
}

static void set_options(struct sock *k)
{
    bool tcp = k->stream->type == UV_TCP, bulk = k->index;
    k->ahead = bulk || !tcp ? AHEAD_BULK : CONN_AHEAD;
    if (!tcp)
        return;
    uv_tcp_nodelay((uv_tcp_t *)k->stream, 1);
    int fd, ahead = bulk ? NOTSENT_BULK : NOTSENT, rank = bulk ? RANK_BULK : RANK_URGENT;
    if (uv_fileno((uv_handle_t *)k->stream, &fd))
        return;
    /* Without these urgent frames wait longer, nothing more. */
    (void)!setsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &ahead, sizeof ahead);
    (void)!setsockopt(fd, SOL_SOCKET, SO_PRIORITY, &rank, sizeof rank);
}

/* Its peers have shut every socket, or they have failed. */
static bool all_ended(const struct conn *c)
{
    for (unsigned i = 0; i < CONN_SOCKETS; i++)
        if (c->socks[i] && c->socks[i]->state == SOCK_OPEN && !c->socks[i]->ended)
            return false;
    return c->socks[0]->ended;
}

void sock_failed(struct sock *k, int err)
{
    struct conn *c = k->conn;
    if (k->index && k->state != SOCK_OPEN) {
        log_info("%s: no further socket for bulk: %s", c->peer, uv_strerror(err));
        c->enough = true;
        sock_close(k);
        return;
    }
    k->ended = true;
    if (c->state == CONN_LEAVING) {
        if (all_ended(c))
            conn_destroy(c);
        return;
    }
    if (!c->mute)
        c->mute = err;
    uv_idle_stop(&c->pump);
    if (all_ended(c))
        conn_fault(c, c->mute, 0, "%s: %s", c->peer, uv_strerror(c->mute));
    else
        uv_timer_start(&c->timer, conn_on_timer, CONN_LEAVE_MS, 0);
}

static bool cut(const struct conn *c)
{
    for (unsigned i = 0; i < CONN_SOCKETS; i++)
        if (c->socks[i] && c->socks[i]->in_start != c->socks[i]->in_end)
            return true;
    return c->held;
}

static void on_eof(struct sock *k)
{
    struct conn *c = k->conn;
    if (c->state == CONN_LEAVING || (k->index && k->state != SOCK_OPEN)) {
        sock_failed(k, -ECONNRESET);
        return;
    }
    if (k->tls && k->state == SOCK_OPEN && !tls_ended(k->tls)) { /* anybody on the path can shut a socket */
        sock_failed(k, -ECONNRESET);
        return;
    }
    k->ended = true;
    if (!all_ended(c)) {
        if (!c->ending && !c->mute)
            uv_timer_start(&c->timer, conn_on_timer, CONN_LEAVE_MS, 0);
        c->ending = true;
    } else if (c->mute) {
        conn_fault(c, c->mute, 0, "%s: %s", c->peer, uv_strerror(c->mute));
    } else if (c->state == CONN_GREETING) {
        conn_fault(c, -ECONNRESET, 0, "%s hung up before saying HELLO", c->peer);
    } else if (cut(c)) {
        conn_fault(c, -ECONNRESET, 0, "%s hung up in the middle of a frame", c->peer);
    } else {
        conn_fault(c, 0, 0, "%s closed the connection", c->peer);
    }
}

void sock_room(struct sock *k)
{
    if (k->in_start == k->in_end) {
        k->in_start = k->in_end = 0;
    } else if (IN_CAP - k->in_end < IN_ROOM) {
        memmove(k->in, k->in + k->in_start, k->in_end - k->in_start);
        k->in_end -= k->in_start;
        k->in_start = 0;
    }
}

static void on_alloc(uv_handle_t *h, size_t suggested, uv_buf_t *to)
{
    struct sock *k = h->data;
    (void)suggested;
    sock_room(k);
    /* No room ends this socket's turn: libuv would go on for as long as there is something to read. */
    if (k->in_turn >= IN_TURN) {
        *to = uv_buf_init(NULL, 0);
        return;
    }
    size_t room = IN_CAP - k->in_end, turn = IN_TURN - k->in_turn;
    uint8_t *at = k->tls ? conn_tls_room(&room) : k->in + k->in_end;
    *to = uv_buf_init((char *)at, (unsigned)(turn < room ? turn : room));
}

static void on_read(uv_stream_t *stream, ssize_t n, const uv_buf_t *buf)
{
    struct sock *k = stream->data;
    if (n == UV_ENOBUFS)
        k->in_turn = 0;
    if (k->conn->state == CONN_CLOSED || !n || n == UV_ENOBUFS)
        return;
    if (n == UV_EOF) {
        on_eof(k);
        return;
    }
    if (n < 0) {
        sock_failed(k, (int)n);
        return;
    }
    k->heard = true;
    k->conn->bytes_in += (uint64_t)n;
    k->in_turn += (size_t)n;
    if (k->tls) {
        conn_tls_in(k, (const uint8_t *)buf->base, (size_t)n);
        return;
    }
    k->in_end += (size_t)n;
    while (!conn_deaf(k->conn) && conn_step(k)) /* a JOIN moves it to another connection */
        ;
    if (conn_deaf(k->conn))
        k->in_start = k->in_end = 0;
}

void sock_begin(struct sock *k)
{
    struct conn *c = k->conn;
    if (k->stream->data != k) { /* an accepted one */
        k->stream->data = k;
        c->handles++;
    }
    set_options(k);
    k->state = SOCK_GREETING;
    int rc = uv_read_start(k->stream, on_alloc, on_read);
    if (rc < 0 && !k->index)
        conn_fault(c, rc, 0, "%s: %s", c->peer, uv_strerror(rc));
    else if (rc < 0)
        sock_failed(k, rc);
    else if (c->tls)
        conn_tls_begin(k);
    else
        sock_greet(k);
}

void sock_greet(struct sock *k)
{
    struct conn *c = k->conn;
    uint8_t payload[512];
    if (!k->index)
        conn_control(k, FRAME_HELLO, payload, frame_hello_put(payload, sizeof payload, &c->self));
    else
        conn_control(k, FRAME_JOIN, c->token.b, sizeof c->token.b);
}

int sock_join(struct sock *k, struct conn *to)
{
    struct conn *from = k->conn;
    unsigned i = 1;
    if (to->state != CONN_OPEN || to->ending || to->mute)
        return -ENOENT;
    const char *who = conn_identity(from), *whose = conn_identity(to);
    if (!who != !whose || (who && strcmp(who, whose)))
        return -ENOENT; /* a token that another's connection was told */
    while (i < CONN_SOCKETS && to->socks[i])
        i++;
    if (i == CONN_SOCKETS)
        return -ENOBUFS;
    from->socks[k->index] = NULL;
    from->handles--; /* it has others */
    to->handles++;
    to->socks[i] = k;
    k->conn = to;
    k->index = i;
    k->state = SOCK_OPEN;
    k->heard = true;
    set_options(k);
    conn_kick(to);
    return 0;
}
