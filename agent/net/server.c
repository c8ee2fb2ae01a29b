/* Listeners, and the life of a server. See server_private.h. */
#include "agent/net/addr.h"
#include "agent/net/server_private.h"

#include "agent/base/log.h"

#include <errno.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

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

static void on_connection(uv_stream_t *listening, int status)
{
    struct listener *l = listening->data;
    if (status < 0) {
        log_error("a connection could not be accepted: %s", uv_strerror(status));
        return;
    }
    bool tcp = listening->type == UV_TCP;
    uv_stream_t *h = calloc(1, tcp ? sizeof(uv_tcp_t) : sizeof(uv_pipe_t));
    if (!h)
        return; /* libuv leaves the connection waiting, and calls again after the next accept */
    if (tcp)
        uv_tcp_init(l->server->loop, (uv_tcp_t *)h);
    else
        uv_pipe_init(l->server->loop, (uv_pipe_t *)h, 0);
    int rc = uv_accept(listening, h);
    if (rc < 0)
        uv_close((uv_handle_t *)h, on_refused_closed);
    else
        rc = server_take(l->server, h);
    if (rc < 0)
        log_error("a connection could not be accepted: %s", strerror(-rc));
}

static void on_listener_closed(uv_handle_t *h)
{
    struct listener *l = h->data;
    struct server *s = l->server;
    TAILQ_REMOVE(&s->listeners, l, link);
    free(l);
    server_look(s);
}

static void listener_close(struct listener *l)
{
    if (uv_is_closing(&l->h.any))
        return;
    if (l->path[0])
        unlink(l->path);
    uv_close(&l->h.any, on_listener_closed);
}

/* Removes a socket that nobody listens on any more. */
static int stale_remove(const char *path, const struct sockaddr_un *sa)
{
    struct stat st;
    if (lstat(path, &st) < 0)
        return errno == ENOENT ? 0 : -errno;
    if (!S_ISSOCK(st.st_mode))
        return -EEXIST;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (fd < 0)
        return -errno;
    int rc = connect(fd, (const struct sockaddr *)sa, sizeof *sa) < 0 ? -errno : 0;
    close(fd);
    if (rc != -ECONNREFUSED)
        return -EADDRINUSE;
    return unlink(path) < 0 ? -errno : 0;
}

static int listen_unix(struct listener *l, const char *path)
{
    struct sockaddr_un sa;
    int dir, rc = addr_unix(path, &sa, &dir);
    if (rc < 0)
        return rc;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    rc = fd < 0 ? -errno : stale_remove(path, &sa);
    if (!rc && bind(fd, (struct sockaddr *)&sa, sizeof sa) < 0)
        rc = -errno;
    if (!rc) {
        snprintf(l->path, sizeof l->path, "%s", path);
        if (chmod(path, 0600) < 0) /* before it listens, nobody is let in */
            rc = -errno;
    }
    if (!rc)
        rc = uv_pipe_open(&l->h.pipe, fd);
    if (rc < 0 && fd >= 0)
        close(fd);
    if (dir >= 0)
        close(dir);
    return rc;
}

static int listen_tcp(struct listener *l, const struct addr *a, char *bound, size_t cap)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE}, *all;
    int rc = getaddrinfo(a->host, a->port, &hints, &all);
    if (rc)
        return rc == EAI_SYSTEM ? -errno : -EADDRNOTAVAIL;
    rc = uv_tcp_bind(&l->h.tcp, all->ai_addr, 0);
    freeaddrinfo(all);
    struct sockaddr_storage sa;
    int len = sizeof sa;
    if (!rc)
        rc = uv_tcp_getsockname(&l->h.tcp, (struct sockaddr *)&sa, &len);
    if (!rc)
        addr_text((struct sockaddr *)&sa, bound, cap);
    return rc;
}

int server_listen(struct server *s, const char *addr, char *bound, size_t cap)
{
    struct addr a;
    if (addr_parse(&a, addr) < 0)
        return -EINVAL;
    struct listener *l = calloc(1, sizeof *l);
    if (!l)
        return -ENOMEM;
    l->server = s;
    snprintf(bound, cap, "%s", addr);
    if (a.is_unix)
        uv_pipe_init(s->loop, &l->h.pipe, 0);
    else
        uv_tcp_init(s->loop, &l->h.tcp);
    l->h.any.data = l;
    TAILQ_INSERT_TAIL(&s->listeners, l, link);
    int rc = a.is_unix ? listen_unix(l, a.path) : listen_tcp(l, &a, bound, cap);
    if (!rc)
        rc = uv_listen(&l->h.stream, 128, on_connection);
    if (rc < 0)
        listener_close(l);
    return rc;
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
    struct listener *l;
    TAILQ_FOREACH(l, &s->listeners, link)
    listener_close(l);
    struct session *one;
    TAILQ_FOREACH(one, &s->sessions, link)
    session_stop(one);
    server_look(s);
}

unsigned server_peers(const struct server *s)
{
    return s->peers;
}
