/* A peer that says what it likes: frames over a plain socket, and what the agent answers. Waits have a deadline; an
 * agent that says nothing by then fails the test. */
#ifndef TESTS_RAWPEER_H
#define TESTS_RAWPEER_H

#include "wire/frame.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <cmocka.h>

#define RAW_WAIT_S 10
#define RAW_STREAMS 16u

struct raw {
    int fd;
    uint32_t sent[RAW_STREAMS];
    struct frame_header h; /* of the last frame heard */
    uint8_t frame[FRAME_HEADER + FRAME_PAYLOAD_MAX];
    const uint8_t *p;
};

static inline void raw_take(struct raw *r, int fd)
{
    struct timeval t = {.tv_sec = RAW_WAIT_S};
    int on = 1;
    memset(r, 0, sizeof *r);
    r->fd = fd;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    r->p = r->frame + FRAME_HEADER;
    assert_int_equal(setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t), 0);
}

static inline void raw_dial(struct raw *r, unsigned port)
{
    struct sockaddr_in sa = {
        .sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&sa, sizeof sa), 0);
    raw_take(r, fd);
}

static inline void raw_bytes(struct raw *r, const void *p, size_t len)
{
    while (len) {
        ssize_t n = send(r->fd, p, len, MSG_NOSIGNAL);
        if (n <= 0)
            return; /* it has hung up: what it said is heard by reading */
        p = (const uint8_t *)p + n;
        len -= (size_t)n;
    }
}

static inline void raw_frame(struct raw *r, uint32_t stream, uint32_t order, uint8_t type, const void *p, size_t len)
{
    uint8_t header[FRAME_HEADER];
    frame_header_put(header, type, stream, order, (uint32_t)len, frame_payload_hash(p, len));
    raw_bytes(r, header, sizeof header);
    raw_bytes(r, p, len);
}

static inline void raw_say(struct raw *r, uint32_t stream, uint8_t type, const void *p, size_t len)
{
    raw_frame(r, stream, stream ? r->sent[stream]++ : 0, type, p, len);
}

static inline bool raw_need(struct raw *r, uint8_t *to, size_t len)
{
    for (size_t have = 0; have < len;) {
        ssize_t n = recv(r->fd, to + have, len - have, 0);
        if (n < 0 && errno == EAGAIN)
            fail_msg("nothing is heard for %d s", RAW_WAIT_S);
        if (n <= 0)
            return false;
        have += (size_t)n;
    }
    return true;
}

/* The next frame; false at the end of the connection. Pings are answered. */
static inline bool raw_hear(struct raw *r)
{
    do {
        if (!raw_need(r, r->frame, FRAME_HEADER))
            return false;
        assert_true(frame_step(r->frame, FRAME_HEADER, &r->h) >= 0);
        if (!raw_need(r, r->frame + FRAME_HEADER, r->h.len))
            return false;
        assert_true(frame_step(r->frame, FRAME_HEADER + r->h.len, &r->h) > 0);
        if (r->h.type == FRAME_PING)
            raw_say(r, 0, FRAME_PONG, r->p, r->h.len);
    } while (r->h.type == FRAME_PING || r->h.type == FRAME_PONG || r->h.type == FRAME_WINDOW_MORE);
    return true;
}

static inline void raw_end(struct raw *r)
{
    close(r->fd);
    r->fd = -1;
}

#endif
