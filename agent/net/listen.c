/* Listening sockets. A listener lives on its owner's list from listen_open until its handle is closed. */
#include "agent/net/listen.h"

#include "agent/net/addr.h"

#include <errno.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

struct listener {
    TAILQ_ENTRY(listener) link;
    struct listeners *all;
    listen_take *take;
    void (*closed)(void *owner);
    void *owner;
    union {
        uv_handle_t any;
        uv_stream_t stream;
        uv_tcp_t tcp;
        uv_pipe_t pipe;
    } h;
    char path[4096]; /* unix: unlinked at the end */
};

static void on_unwanted_closed(uv_handle_t *h)
{
    free(h);
}

static void on_connection(uv_stream_t *listening, int status)
{
    struct listener *l = listening->data;
    if (status < 0) {
        l->take(l->owner, NULL, status);
        return;
    }
    bool tcp = listening->type == UV_TCP;
    uv_stream_t *h = calloc(1, tcp ? sizeof(uv_tcp_t) : sizeof(uv_pipe_t));
    if (!h)
        return; /* libuv leaves the connection waiting, and calls again after the next accept */
    if (tcp)
        uv_tcp_init(listening->loop, (uv_tcp_t *)h);
    else
        uv_pipe_init(listening->loop, (uv_pipe_t *)h, 0);
    int rc = uv_accept(listening, h);
    if (rc < 0)
        uv_close((uv_handle_t *)h, on_unwanted_closed);
    l->take(l->owner, rc < 0 ? NULL : h, rc);
}

static void on_listener_closed(uv_handle_t *h)
{
    struct listener *l = h->data;
    TAILQ_REMOVE(l->all, l, link);
    l->closed(l->owner);
    free(l);
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

int listen_open(struct listeners *all, uv_loop_t *loop, const char *addr, char *bound, size_t cap, listen_take *take,
                void (*closed)(void *owner), void *owner)
{
    struct addr a;
    if (addr_parse(&a, addr) < 0)
        return -EINVAL;
    struct listener *l = calloc(1, sizeof *l);
    if (!l)
        return -ENOMEM;
    l->all = all;
    l->take = take;
    l->closed = closed;
    l->owner = owner;
    snprintf(bound, cap, "%s", addr);
    if (a.is_unix)
        uv_pipe_init(loop, &l->h.pipe, 0);
    else
        uv_tcp_init(loop, &l->h.tcp);
    l->h.any.data = l;
    TAILQ_INSERT_TAIL(all, l, link);
    int rc = a.is_unix ? listen_unix(l, a.path) : listen_tcp(l, &a, bound, cap);
    if (!rc)
        rc = uv_listen(&l->h.stream, 128, on_connection);
    if (rc < 0)
        listener_close(l);
    return rc;
}

void listen_close(struct listeners *all)
{
    struct listener *l;
    TAILQ_FOREACH(l, all, link)
    listener_close(l);
}
