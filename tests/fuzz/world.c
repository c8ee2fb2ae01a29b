#include "tests/fuzz/world.h"

#include <errno.h>
#include <sys/socket.h>
#include <unistd.h>

void world_open(struct world *w)
{
    char error[STORE_ERROR];
    struct id identity = {{0x5e}};
    *w = (struct world){0};
    MUST(!uv_loop_init(&w->loop), "no loop");
    MUST(!store_open(&w->store, &w->loop, "mem:", error), "%s", error);
    w->server = server_new(&w->loop, w->store, &identity, "server");
    MUST(w->server, "no server");
}

static void on_end(void *arg)
{
    ((struct world *)arg)->ended++;
}

void world_close(struct world *w)
{
    server_stop(w->server, on_end, w);
    while (w->ended < 1)
        uv_run(&w->loop, UV_RUN_ONCE);
    store_close(w->store, on_end, w);
    while (w->ended < 2)
        uv_run(&w->loop, UV_RUN_ONCE);
    uv_run(&w->loop, UV_RUN_DEFAULT);
    MUST(!uv_loop_close(&w->loop), "something is left in the loop");
}

void peer_open(struct world *w, struct peer *p, uint8_t identity, const struct id *join)
{
    int fds[2];
    uint8_t payload[512];
    struct frame_hello hello = {.version = FRAME_VERSION, .identity = {{identity, 1}}, .host = "peer"};
    uv_pipe_t *pipe = malloc(sizeof *pipe);
    MUST(pipe && !socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds), "no socket pair");
    p->world = w;
    p->fd = fds[0];
    p->out_len = p->in_len = 0;
    p->token = (struct id){{0}};
    memset(p->sent, 0, sizeof p->sent);
    uv_pipe_init(&w->loop, pipe, 0);
    MUST(!uv_pipe_open(pipe, fds[1]), "no pipe");
    MUST(!server_take(w->server, (uv_stream_t *)pipe), "not taken");
    if (join)
        peer_send(p, 0, FRAME_JOIN, join->b, sizeof join->b);
    else
        peer_send(p, 0, FRAME_HELLO, payload, frame_hello_put(payload, sizeof payload, &hello));
}

void peer_close(struct peer *p)
{
    if (p->fd >= 0)
        close(p->fd);
    p->fd = -1;
}

static void flush(struct peer *p)
{
    size_t at = 0;
    while (p->fd >= 0 && at < p->out_len) {
        ssize_t n = send(p->fd, p->out + at, p->out_len - at, MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN)
            break;
        if (n < 0)
            at = p->out_len; /* the end is heard by reading */
        else
            at += (size_t)n;
        p->world->moved = true;
    }
    p->out_len -= at;
    memmove(p->out, p->out + at, p->out_len);
}

static void greeted(struct peer *p, const struct frame_header *h, const uint8_t *payload)
{
    struct frame_hello hello;
    if (h->type == FRAME_HELLO) {
        MUST(!frame_hello_get(payload, h->len, &hello), "the server's HELLO");
        p->token = hello.token;
    }
}

static void take(struct peer *p)
{
    struct frame_header h;
    size_t at = 0;
    int64_t n;
    while ((n = frame_step(p->in + at, p->in_len - at, &h)) > 0) {
        greeted(p, &h, p->in + at + FRAME_HEADER);
        if (p->frame)
            p->frame(p->arg, &h, p->in + at + FRAME_HEADER);
        at += (size_t)n;
    }
    MUST(!n, "the server sends what is not a frame");
    p->in_len -= at;
    memmove(p->in, p->in + at, p->in_len);
}

static void hear(struct peer *p)
{
    while (p->fd >= 0) {
        ssize_t n = recv(p->fd, p->in + p->in_len, sizeof p->in - p->in_len, 0);
        if (n < 0 && errno == EAGAIN)
            return;
        p->world->moved = true;
        if (n <= 0) {
            peer_close(p);
            return;
        }
        p->in_len += (size_t)n;
        take(p);
    }
}

void world_quiet(struct world *w, struct peer *const *peers, size_t n)
{
    for (int idle = 0; idle < 3;) {
        w->moved = false;
        for (size_t i = 0; i < n; i++) {
            flush(peers[i]);
            hear(peers[i]);
        }
        /* A request that is under way is a job of the store's, or a write that a peer has to take first. */
        bool busy = w->loop.active_reqs.count;
        uv_run(&w->loop, busy && !w->moved ? UV_RUN_ONCE : UV_RUN_NOWAIT);
        idle = busy || w->moved ? 0 : idle + 1;
    }
}

void peer_bytes(struct peer *p, const void *bytes, size_t len)
{
    struct peer *one[] = {p};
    if (len > sizeof p->out - p->out_len)
        world_quiet(p->world, one, 1);
    if (p->fd < 0 || len > sizeof p->out - p->out_len)
        return;
    memcpy(p->out + p->out_len, bytes, len);
    p->out_len += len;
}

void peer_frame(struct peer *p, uint32_t stream, uint32_t order, uint8_t type, const void *payload, size_t len)
{
    uint8_t header[FRAME_HEADER];
    frame_header_put(header, type, stream, order, (uint32_t)len, frame_payload_hash(payload, len));
    peer_bytes(p, header, sizeof header);
    peer_bytes(p, payload, len);
}

void peer_send(struct peer *p, uint32_t stream, uint8_t type, const void *payload, size_t len)
{
    MUST(stream < PEER_STREAMS, "stream %u", stream);
    peer_frame(p, stream, stream ? p->sent[stream]++ : 0, type, payload, len);
}
