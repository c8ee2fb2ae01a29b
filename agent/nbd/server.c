/* Listeners, and the life of the block device server: it is at its end when no listener, no connection and no export is
 * left. Exports stay until what was written is durable or has failed. */
#include "agent/nbd/inside.h"

#include "agent/base/log.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define TICK_MS 500u

static void on_flush(uv_prepare_t *p)
{
    struct nbd *n = p->data;
    struct nbd_conn *c;
    n->turn = 0;
    if (n->starved && n->owed <= NBD_BUDGET_ALL / 2) {
        n->starved = false;
        TAILQ_FOREACH(c, &n->conns, link)
        conn_pump(c);
    }
    TAILQ_FOREACH(c, &n->conns, link)
    if (c->flushing)
        conn_flush(c);
}

static void on_tick(uv_timer_t *t)
{
    struct nbd *n = t->data;
    uint64_t now = uv_now(n->loop);
    struct export *x, *next;
    bool leased = false;
    for (x = TAILQ_FIRST(&n->exports); x; x = next) {
        next = TAILQ_NEXT(x, link);
        leased |= x->leased;
        export_tick(x, now);
    }
    if (leased)
        store_lease_seen(n->store, &n->identity);
    struct nbd_conn *c;
    TAILQ_FOREACH(c, &n->conns, link)
    conn_tick(c, now);
}

struct nbd *nbd_new(uv_loop_t *loop, struct store *store, const struct id *identity, const char *host)
{
    struct nbd *n = calloc(1, sizeof *n);
    if (!n)
        return NULL;
    n->loop = loop;
    n->store = store;
    n->identity = *identity;
    n->identity.b[15] ^= 0x6e;
    snprintf(n->host, sizeof n->host, "%.240s, over NBD", host);
    TAILQ_INIT(&n->listeners);
    TAILQ_INIT(&n->conns);
    TAILQ_INIT(&n->exports);
    uv_prepare_init(loop, &n->flush);
    n->flush.data = n;
    uv_prepare_start(&n->flush, on_flush);
    uv_timer_init(loop, &n->timer);
    n->timer.data = n;
    uv_timer_start(&n->timer, on_tick, TICK_MS, TICK_MS);
    return n;
}

static void on_refused_closed(uv_handle_t *h)
{
    free(h);
}

static void on_connection(void *owner, uv_stream_t *stream, int err)
{
    struct nbd *n = owner;
    struct nbd_conn *c = NULL;
    int rc = !stream ? err : n->stopping ? -ESHUTDOWN : n->conns_n >= NBD_CONNECTIONS ? -EUSERS : 0;
    if (!rc && !(c = conn_new(n, stream, NULL)))
        rc = -ENOMEM;
    if (c)
        conn_greet(c);
    if (rc < 0)
        log_error("an NBD connection could not be accepted: %s", strerror(-rc));
    if (rc < 0 && stream)
        uv_close((uv_handle_t *)stream, on_refused_closed);
}

static void on_listener_closed(void *owner)
{
    nbd_look(owner);
}

int nbd_listen(struct nbd *n, const char *addr, char *bound, size_t cap)
{
    return listen_open(&n->listeners, n->loop, addr, bound, cap, on_connection, on_listener_closed, n);
}

/* A socket that libuv has none of its own for is as good as a pipe. */
static uv_stream_t *stream_of(uv_loop_t *loop, int fd, int *err)
{
    union {
        uv_tcp_t tcp;
        uv_pipe_t pipe;
    } *h = malloc(sizeof *h);
    struct sockaddr_storage sa = {0};
    socklen_t len = sizeof sa;
    bool tcp = !getsockname(fd, (struct sockaddr *)&sa, &len) && sa.ss_family != AF_UNIX;
    *err = !h ? -ENOMEM : tcp ? uv_tcp_init(loop, &h->tcp) : uv_pipe_init(loop, &h->pipe, 0);
    if (*err) {
        free(h);
        return NULL;
    }
    *err = tcp ? uv_tcp_open(&h->tcp, fd) : uv_pipe_open(&h->pipe, fd);
    if (*err) {
        uv_close((uv_handle_t *)h, on_refused_closed);
        return NULL;
    }
    return (uv_stream_t *)h;
}

int nbd_serve(struct nbd *n, int fd, const char *name, const char *who, nbd_served *done, void *arg)
{
    int err = n->stopping                           ? -ESHUTDOWN
              : n->conns_n >= NBD_CONNECTIONS       ? -EUSERS
              : name && strlen(name) > NBD_NAME_MAX ? -ENAMETOOLONG
                                                    : 0;
    uv_stream_t *stream = err ? NULL : stream_of(n->loop, fd, &err);
    if (!stream) {
        close(fd);
        return err;
    }
    struct nbd_conn *c = conn_new(n, stream, who);
    if (!c) {
        uv_close((uv_handle_t *)stream, on_refused_closed);
        return -ENOMEM;
    }
    c->served = done;
    c->served_arg = arg;
    if (name)
        handshake_serve(c, name);
    else
        conn_greet(c);
    return 0;
}

static void on_timer_closed(uv_handle_t *h)
{
    struct nbd *n = h->data;
    void (*done)(void *) = n->done;
    void *arg = n->arg;
    free(n);
    done(arg);
}

static void on_flush_closed(uv_handle_t *h)
{
    struct nbd *n = h->data;
    uv_close((uv_handle_t *)&n->timer, on_timer_closed);
}

void nbd_look(struct nbd *n)
{
    if (!n->stopping || n->ended || !TAILQ_EMPTY(&n->listeners) || !TAILQ_EMPTY(&n->conns) || !TAILQ_EMPTY(&n->exports))
        return;
    n->ended = true;
    uv_close((uv_handle_t *)&n->flush, on_flush_closed);
}

void nbd_stop(struct nbd *n, void (*done)(void *arg), void *arg)
{
    n->done = done;
    n->arg = arg;
    n->stopping = true;
    listen_close(&n->listeners);
    struct nbd_conn *c;
    TAILQ_FOREACH(c, &n->conns, link)
    conn_fail(c, "the server stops");
    nbd_look(n);
}
