/* How many sockets a connection has: a further one for bulk as soon as there is bulk, more when the path asks for it.
 *
 * It does when what is in flight is bounded by the buffers of our kernel or of the peer's, rather than by the network:
 * the sockets have been waiting for a buffer for most of the time in which they had something to send, and what they
 * deliver in a round trip is no small part of a buffer (a slow reader at the end of a short path is helped by nothing).
 * That is looked at once a second while bulk waits; a socket that brought less than a tenth more was the last.
 *
 * Only the end that dials can add one, and sees nothing of what bounds the other: who is sent bulk says by conn_want what
 * the path is worth. */
#include "agent/net/conn_private.h"

#include <errno.h>

#define LOOK_MS 1000u
#define IN_FLIGHT (1u << 20) /* a socket that delivers less in a round trip is bounded by something else */

static void on_connected(uv_connect_t *req, int status)
{
    struct sock *k = req->data;
    if (k->conn->state == CONN_CLOSED || k->conn->socks[k->index] != k)
        return;
    if (status < 0)
        sock_failed(k, status);
    else
        sock_begin(k);
}

void conn_grow(struct conn *c)
{
    unsigned i = 1;
    while (i < CONN_SOCKETS && c->socks[i] && c->socks[i]->state == SOCK_OPEN)
        i++;
    bool can = c->path || c->dialled.ss_family != AF_UNSPEC;
    if (!can || c->enough || c->state != CONN_OPEN || id_none(&c->token) || i == CONN_SOCKETS || c->socks[i])
        return;
    struct sock *k = sock_new(c, i);
    int rc = !k        ? -ENOMEM
             : c->path ? sock_dial_unix(k, c->path, on_connected)
             : !sock_stream_new(k, true)
                 ? -ENOMEM
                 : uv_tcp_connect(&k->connect, (uv_tcp_t *)k->stream, (struct sockaddr *)&c->dialled, on_connected);
    if (k && rc < 0)
        sock_failed(k, rc);
}

void conn_want(struct conn *c, unsigned sockets)
{
    if (c->wanted >= sockets)
        return;
    c->wanted = sockets < CONN_SOCKETS ? sockets : CONN_SOCKETS;
    conn_grow_on(c);
}

/* One after the other: a server may refuse them, or another one answer. */
void conn_grow_on(struct conn *c)
{
    if (conn_sockets(c) < c->wanted)
        conn_grow(c);
}

/* Adds what has happened on the socket since the last look. */
static bool add(struct tcp_path *all, struct sock *k)
{
    int fd;
    struct tcp_path p;
    if (k->stream->type != UV_TCP || uv_fileno((uv_handle_t *)k->stream, &fd) || !tcp_path(fd, &p))
        return false;
    all->busy_us += p.busy_us - k->path.busy_us;
    all->limited_us += p.limited_us - k->path.limited_us;
    all->acked += p.acked - k->path.acked;
    all->in_flight += p.in_flight;
    k->path = p;
    return true;
}

/* After a batch of bulk. */
void conn_grow_look(struct conn *c)
{
    uint64_t now = uv_now(c->loop), ms = now - c->looked;
    if (c->enough || ms < LOOK_MS)
        return;
    c->looked = now;
    struct tcp_path all = {0};
    unsigned sockets = 0;
    for (; sockets + 1 < CONN_SOCKETS && c->socks[sockets + 1]; sockets++)
        if (c->socks[sockets + 1]->state != SOCK_OPEN || !add(&all, c->socks[sockets + 1]))
            return;
    if (ms > 2 * LOOK_MS) /* nothing was sent for a while: no rate to compare */
        return;
    double rate = (double)all.acked / (double)ms;
    bool asks = all.limited_us > all.busy_us / 2 && all.in_flight >= (uint64_t)sockets * IN_FLIGHT;
    c->enough = c->grown && rate < c->rate * 1.1;
    c->grown = asks && !c->enough;
    c->rate = rate;
    if (c->grown)
        conn_grow(c);
}
