/* Listeners, and the life of a server. See server_private.h. */
#include "agent/net/server_private.h"

#include "agent/base/log.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

#define SEEN_MS 2000u

static void on_timer(uv_timer_t *t)
{
    struct server *s = t->data;
    struct session *one;
    TAILQ_FOREACH(one, &s->sessions, link)
    if (one->open)
        store_lease_seen(s->store, &one->peer.identity);
    pinned_expire(s, false);
}

struct server *server_new(uv_loop_t *loop, struct store *store, const struct id *identity, const char *host)
{
    struct server *s = calloc(1, sizeof *s);
    if (!s)
        return NULL;
    s->loop = loop;
    s->store = store;
    s->self = (struct frame_hello){.version = FRAME_VERSION, .identity = *identity};
    snprintf(s->self.host, sizeof s->self.host, "%s", host);
    TAILQ_INIT(&s->listeners);
    TAILQ_INIT(&s->sessions);
    TAILQ_INIT(&s->pinned);
    uv_idle_init(loop, &s->reader);
    s->reader.data = s;
    uv_timer_init(loop, &s->timer);
    s->timer.data = s;
    uv_timer_start(&s->timer, on_timer, SEEN_MS, SEEN_MS);
    return s;
}

void server_secure(struct server *s, struct tls_config *tls, struct grants *grants)
{
    s->tls = tls;
    s->grants = grants;
}

static void on_refused_closed(uv_handle_t *h)
{
    free(h);
}

int server_take(struct server *s, uv_stream_t *stream)
{
    int rc = s->stopping ? -ESHUTDOWN : s->peers >= SERVER_PEERS ? -EUSERS : session_new(s, stream);
    if (rc < 0)
        uv_close((uv_handle_t *)stream, on_refused_closed);
    return rc;
}

static void on_connection(void *owner, uv_stream_t *stream, int err)
{
    int rc = stream ? server_take(owner, stream) : err;
    if (rc < 0)
        log_error("a connection could not be accepted: %s", strerror(-rc));
}

static void on_listener_closed(void *owner)
{
    server_look(owner);
}

int server_listen(struct server *s, const char *addr, char *bound, size_t cap)
{
    return listen_open(&s->listeners, s->loop, addr, bound, cap, on_connection, on_listener_closed, s);
}

static void on_reader_closed(uv_handle_t *h)
{
    struct server *s = h->data;
    void (*done)(void *) = s->done;
    void *arg = s->arg;
    free(s);
    done(arg);
}

static void on_timer_closed(uv_handle_t *h)
{
    struct server *s = h->data;
    uv_close((uv_handle_t *)&s->reader, on_reader_closed);
}

void server_look(struct server *s)
{
    if (!s->stopping || s->ended || s->work || !TAILQ_EMPTY(&s->sessions) || !TAILQ_EMPTY(&s->listeners))
        return;
    s->ended = true;
    uv_close((uv_handle_t *)&s->timer, on_timer_closed);
}

void server_stop(struct server *s, void (*done)(void *arg), void *arg)
{
    s->done = done;
    s->arg = arg;
    s->stopping = true;
    pinned_expire(s, true);
    listen_close(&s->listeners);
    struct session *one;
    TAILQ_FOREACH(one, &s->sessions, link)
    session_stop(one);
    server_look(s);
}

unsigned server_peers(const struct server *s)
{
    return s->peers;
}
