/* What the tests of connections share: ends that note what they see, and raw peers that speak by hand. Every wait is a
 * loop run with a deadline. */
#ifndef TEST_CONN_H
#define TEST_CONN_H

#include "agent/net/conn.h"

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#include <cmocka.h>

#define SEEN 4096

struct end {
    struct conn *conn;
    bool opened, closed;
    int err;
    char why[1024];
    struct frame_hello peer;
    size_t frames, bytes, drained;
    struct {
        uint32_t stream;
        uint8_t type;
        uint32_t len;
        uint8_t first;
    } seen[SEEN];
    bool credit;      /* give windows back at once */
    uint8_t close_on; /* frame type on which to conn_close from within the callback */
    uint8_t echo;     /* answer every frame by one of this type */
    bool in_call;
};

static uv_loop_t loop;

static inline void on_open(void *owner, const struct frame_hello *peer)
{
    struct end *e = owner;
    assert_false(e->opened);
    e->opened = true;
    e->peer = *peer;
}

static inline void on_frame(void *owner, uint32_t stream, uint8_t type, struct buf *payload)
{
    struct end *e = owner;
    assert_true(e->opened);
    assert_false(e->closed);
    if (e->frames < SEEN) {
        e->seen[e->frames].stream = stream;
        e->seen[e->frames].type = type;
        e->seen[e->frames].len = payload->len;
        e->seen[e->frames].first = payload->len ? payload->data[0] : 0;
    }
    e->frames++;
    e->bytes += payload->len;
    if (e->credit && type == FRAME_PAGES)
        conn_credit(e->conn, stream, payload->len);
    if (e->echo && stream)
        conn_send(e->conn, stream, e->echo, NULL);
    if (e->close_on == type) {
        e->in_call = true;
        conn_close(e->conn, false, 0, NULL);
        conn_send(e->conn, 1, FRAME_BEGIN, NULL);
        e->in_call = false;
    }
}

static inline void on_drained(void *owner, uint32_t stream)
{
    struct end *e = owner;
    (void)stream;
    e->drained++;
}

static inline void on_closed(void *owner, int err, const char *why)
{
    struct end *e = owner;
    assert_false(e->closed);
    assert_false(e->in_call);
    e->closed = true;
    e->err = err;
    snprintf(e->why, sizeof e->why, "%s", why);
}

static const struct conn_ops ops = {on_open, on_frame, on_drained, on_closed, NULL};

static uint64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

static inline void on_wake(uv_timer_t *t)
{
    (void)t;
}

/* Runs the loop until cond, or fails after 10 s. */
#define UNTIL(cond)                                                                                                    \
    do {                                                                                                               \
        uint64_t deadline = now_ms() + 10000;                                                                          \
        uv_timer_t wake;                                                                                               \
        uv_timer_init(&loop, &wake);                                                                                   \
        uv_timer_start(&wake, on_wake, 20, 20);                                                                        \
        while (!(cond) && now_ms() < deadline)                                                                         \
            uv_run(&loop, UV_RUN_ONCE);                                                                                \
        uv_close((uv_handle_t *)&wake, NULL);                                                                          \
        uv_run(&loop, UV_RUN_NOWAIT);                                                                                  \
        assert_true(cond);                                                                                             \
    } while (0)

static inline struct frame_hello hello(const char *host)
{
    struct frame_hello h = {.version = FRAME_VERSION};
    id_new(&h.identity);
    snprintf(h.host, sizeof h.host, "%s", host);
    return h;
}

static inline uv_stream_t *stream_of(int fd)
{
    uv_pipe_t *p = malloc(sizeof *p);
    uv_pipe_init(&loop, p, 0);
    assert_int_equal(uv_pipe_open(p, fd), 0);
    return (uv_stream_t *)p;
}

static uint32_t raw_orders[16]; /* of the raw peer's first streams */

static inline int take(struct end *e)
{
    int fds[2];
    memset(raw_orders, 0, sizeof raw_orders);
    struct frame_hello h = hello("b");
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
    e->conn = conn_take(stream_of(fds[0]), &h, &ops, e);
    assert_non_null(e->conn);
    return fds[1];
}

static inline struct end *ends(void)
{
    struct end *e = calloc(2, sizeof *e);
    assert_non_null(e);
    return e;
}

static inline struct buf *bytes(size_t len, int fill)
{
    struct buf *b = buf_new(len);
    assert_non_null(b);
    memset(b->data, fill, len);
    b->len = (uint32_t)len;
    return b;
}

/* Raw peers */

static inline void raw_write(int fd, const void *p, size_t len)
{
    const uint8_t *at = p;
    uint64_t deadline = now_ms() + 10000;
    fcntl(fd, F_SETFL, O_NONBLOCK);
    while (len && now_ms() < deadline) {
        ssize_t n = send(fd, at, len, MSG_NOSIGNAL);
        if (n > 0) {
            at += n;
            len -= (size_t)n;
        } else if (errno != EAGAIN) {
            return; /* it hung up on us, as it may */
        }
        uv_run(&loop, UV_RUN_NOWAIT);
    }
    assert_int_equal(len, 0);
}

static inline void raw_frame(int fd, uint8_t type, uint32_t stream, const void *payload, size_t len)
{
    uint8_t f[FRAME_HEADER + FRAME_PAYLOAD_MAX];
    uint32_t order = stream && stream < 16 ? raw_orders[stream]++ : 0;
    frame_header_put(f, type, stream, order, (uint32_t)len, frame_payload_hash(payload, len));
    memcpy(f + FRAME_HEADER, payload, len);
    raw_write(fd, f, FRAME_HEADER + len);
}

static inline void raw_hello(int fd)
{
    uint8_t p[512];
    struct frame_hello h = hello("raw");
    raw_frame(fd, FRAME_HELLO, 0, p, frame_hello_put(p, sizeof p, &h));
}

/* Reads until end of file what the connection said; returns whether an ERROR was in it. */
static inline bool raw_error(int fd, char text[FRAME_TEXT_MAX])
{
    static uint8_t in[1 << 20];
    size_t have = 0;
    for (uint64_t deadline = now_ms() + 10000; now_ms() < deadline;) {
        ssize_t n = read(fd, in + have, sizeof in - have);
        if (n > 0)
            have += (size_t)n;
        if (!n || (n < 0 && errno != EAGAIN))
            break;
        uv_run(&loop, UV_RUN_NOWAIT);
    }
    for (size_t at = 0; at < have;) {
        struct frame_header h;
        struct frame_failed f;
        int64_t n = frame_step(in + at, have - at, &h);
        if (n <= 0)
            return false;
        if (h.type == FRAME_ERROR && !frame_failed_get(in + at + FRAME_HEADER, h.len, &f)) {
            memcpy(text, f.text, FRAME_TEXT_MAX);
            return true;
        }
        at += (size_t)n;
    }
    return false;
}

static inline void raw_fault(struct end *e, int fd, int err, const char *why)
{
    char text[FRAME_TEXT_MAX];
    assert_true(raw_error(fd, text));
    close(fd);
    UNTIL(e->closed);
    assert_int_equal(e->err, err);
    assert_non_null(strstr(e->why, why));
    assert_non_null(strstr(text, why));
}

#endif
