/* Listeners, and the life of the block device server: it is at its end when no listener, no connection and no export is
 * left. Exports stay until what was written is durable or has failed. */
#include "agent/nbd/inside.h"

#include "agent/base/log.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#define TICK_MS 500u

static void on_flush(uv_prepare_t *p)
{
    struct nbd *n = p->data;
    struct nbd_conn *c;
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
    int rc = !stream ? err : n->stopping ? -ESHUTDOWN : n->conns_n >= NBD_CONNECTIONS ? -EUSERS : conn_new(n, stream);
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
