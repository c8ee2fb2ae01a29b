/* Connections of several sockets: what goes over which, order, joining, and that all of them end together. Pairs over
 * TCP and unix sockets in one loop, and raw peers that hold one socket back, or break the rules. */
#include "agent/net/addr.h"
#include "tests/unit/test_conn.h"

#include <signal.h>

#define STREAMS 512

/* An end that checks that each stream's frames come in order: their payloads begin with their number. */
struct side {
    struct end e;
    uint32_t next[STREAMS];
    uint8_t closed[STREAMS]; /* CLOSE was told */
};

static struct side *taken; /* the listener's next connection is this one's */
static struct conn *known; /* what can be joined */
static unsigned turned_away;
static uv_tcp_t tcp_listener;
static uv_pipe_t pipe_listener;
static char tcp_addr[64], pipe_addr[128];

static void on_numbered(void *owner, uint32_t stream, uint8_t type, struct buf *payload)
{
    struct side *s = owner;
    if (stream && stream < STREAMS && payload->len >= 4) {
        assert_int_equal(get_u32(payload->data), s->next[stream]++);
        assert_false(s->closed[stream]);
    } else if (!stream) {
        s->closed[get_u32(payload->data) % STREAMS]++;
    }
    on_frame(owner, stream, type, payload);
}

static void on_side_closed(void *owner, int err, const char *why)
{
    struct side *s = owner;
    if (known == s->e.conn)
        known = NULL;
    on_closed(owner, err, why);
}

static struct conn *on_join(void *owner, const struct id *token)
{
    (void)owner;
    return known && conn_has_token(known, token) ? known : NULL;
}

static const struct conn_ops client_ops = {on_open, on_numbered, on_drained, on_side_closed, NULL};
static const struct conn_ops server_ops = {on_open, on_numbered, on_drained, on_side_closed, on_join};

static void on_newcomer_closed(void *owner, int err, const char *why)
{
    (void)why;
    turned_away += err < 0;
    free(owner);
}

static const struct conn_ops newcomer_ops = {on_open, on_numbered, on_drained, on_newcomer_closed, on_join};

static void on_connection(uv_stream_t *l, int status)
{
    assert_int_equal(status, 0);
    bool tcp = l->type == UV_TCP;
    uv_stream_t *h = malloc(tcp ? sizeof(uv_tcp_t) : sizeof(uv_pipe_t));
    if (tcp)
        uv_tcp_init(&loop, (uv_tcp_t *)h);
    else
        uv_pipe_init(&loop, (uv_pipe_t *)h, 0);
    assert_int_equal(uv_accept(l, h), 0);
    struct frame_hello self = hello("server");
    memset(&self.identity, 7, sizeof self.identity);
    struct side *s = taken ? taken : calloc(1, sizeof *s);
    struct conn *c = conn_take(h, &self, taken ? &server_ops : &newcomer_ops, s);
    assert_non_null(c);
    s->e.conn = c;
    if (taken)
        known = c;
    taken = NULL;
}

static void listen_on_both(void)
{
    struct sockaddr_in sa = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int len = sizeof sa;
    uv_tcp_init(&loop, &tcp_listener);
    assert_int_equal(uv_tcp_bind(&tcp_listener, (struct sockaddr *)&sa, 0), 0);
    assert_int_equal(uv_listen((uv_stream_t *)&tcp_listener, 16, on_connection), 0);
    uv_tcp_getsockname(&tcp_listener, (struct sockaddr *)&sa, &len);
    addr_text((struct sockaddr *)&sa, tcp_addr, sizeof tcp_addr);
    snprintf(pipe_addr, sizeof pipe_addr, "unix:/tmp/memsync-bundle.%d", (int)getpid());
    uv_pipe_init(&loop, &pipe_listener, 0);
    assert_int_equal(uv_pipe_bind(&pipe_listener, pipe_addr + 5), 0);
    assert_int_equal(uv_listen((uv_stream_t *)&pipe_listener, 16, on_connection), 0);
}

static void both(const char *addr, struct side **a, struct side **b)
{
    *a = calloc(1, sizeof **a);
    taken = *b = calloc(1, sizeof **b);
    struct frame_hello h = hello("client");
    (*a)->e.conn = conn_dial(&loop, addr, &h, &client_ops, *a);
    UNTIL((*a)->e.opened && (*b)->e.opened);
    (*a)->e.credit = (*b)->e.credit = true;
}

static void spread(struct side *a, struct side *b)
{
    conn_set_priority(a->e.conn, 1, CONN_BULK);
    UNTIL(conn_sockets(a->e.conn) == 2 && conn_sockets(b->e.conn) == 2);
}

static void end_both(struct side *a, struct side *b)
{
    if (!a->e.closed)
        conn_close(a->e.conn, false, 0, NULL);
    UNTIL(a->e.closed && b->e.closed);
    free(a);
    free(b);
}

static struct buf *numbered(uint32_t n, size_t len)
{
    struct buf *b = bytes(len, 5);
    put_u32(b->data, n);
    return b;
}

/* Streams that go from one priority to another in the middle, over sockets of very different depth. */
static void keeps_order(const char *addr)
{
    struct side *a, *b;
    uint32_t sent[8] = {0};
    unsigned rnd = 1;
    both(addr, &a, &b);
    conn_set_priority(a->e.conn, 1, CONN_BULK);
    for (unsigned n = 0; n < 6000; n++) {
        uint32_t s = 1 + (rnd = rnd * 1103515245 + 12345) / 65536 % 6;
        if (rnd / 65536 % 50 == 0)
            conn_set_priority(a->e.conn, s, (enum conn_priority)(rnd / 65536 % 3));
        bool data = rnd / 65536 % 3;
        conn_send(a->e.conn, s, data ? FRAME_PAGES : FRAME_BEGIN, numbered(sent[s]++, data ? 61440 : 8));
        if (n % 40 == 0)
            UNTIL(conn_queued(a->e.conn, 0) < 4 * CONN_LOW);
    }
    UNTIL(b->e.frames == 6000);
    assert_int_equal(conn_sockets(a->e.conn), 2);
    assert_int_equal(conn_sockets(b->e.conn), 2);
    for (uint32_t s = 1; s < 8; s++)
        assert_int_equal(b->next[s], sent[s]);
    end_both(a, b);
}

static void keeps_order_tcp(void **state)
{
    (void)state;
    keeps_order(tcp_addr);
}

static void keeps_order_unix(void **state)
{
    (void)state;
    keeps_order(pipe_addr);
}

/* The server's bulk uses the sockets that the client has opened. */
static void answers_in_bulk(void **state)
{
    (void)state;
    struct side *a, *b;
    both(tcp_addr, &a, &b);
    spread(a, b);
    conn_set_priority(b->e.conn, 2, CONN_BULK);
    for (uint32_t n = 0; n < 2000; n++) {
        conn_send(b->e.conn, 2, FRAME_DATA, numbered(n, 61440));
        conn_send(b->e.conn, 3, FRAME_OK, numbered(n, 8));
        if (n % 40 == 0)
            UNTIL(conn_queued(b->e.conn, 0) < CONN_LOW || a->e.closed);
        if (a->next[2] && n % 10 == 0)
            conn_credit(a->e.conn, 2, FRAME_WINDOW);
    }
    uint64_t deadline = now_ms() + 10000;
    while (a->e.frames < 4000 && now_ms() < deadline) {
        conn_credit(a->e.conn, 2, FRAME_WINDOW);
        uv_run(&loop, UV_RUN_NOWAIT);
    }
    assert_int_equal(a->next[2], 2000);
    assert_int_equal(a->next[3], 2000);
    end_both(a, b);
}

/* Half a second of silence, and nothing is lost or held: PINGs keep each socket alive. */
static void idle_bundles_live(void **state)
{
    (void)state;
    struct side *a, *b;
    both(tcp_addr, &a, &b);
    spread(a, b);
    conn_set_silence(a->e.conn, 100);
    conn_set_silence(b->e.conn, 100);
    uint64_t from = now_ms();
    UNTIL(now_ms() > from + 500);
    assert_false(a->e.closed || b->e.closed);
    end_both(a, b);
}

static void close_flushes_all(void **state)
{
    (void)state;
    struct side *a, *b;
    both(tcp_addr, &a, &b);
    spread(a, b);
    for (uint32_t n = 0; n < 1000; n++) {
        conn_send(a->e.conn, 1, FRAME_PAGES, numbered(n, 61440));
        conn_send(a->e.conn, 2, FRAME_BEGIN, numbered(n, 8));
    }
    conn_close(a->e.conn, true, FRAME_E_LIMIT, NULL);
    UNTIL(a->e.closed && b->e.closed);
    assert_int_equal(b->e.frames, 2000);
    assert_int_equal(a->e.err, 0);
    assert_int_equal(b->e.err, 0);
    end_both(a, b);
}

static void close_tells_why(void **state)
{
    (void)state;
    for (int i = 0; i < 20; i++) { /* whichever socket's end is seen first */
        struct side *a, *b;
        both(tcp_addr, &a, &b);
        spread(a, b);
        for (uint32_t n = 0; n < 200; n++)
            conn_send(b->e.conn, 1, FRAME_DATA, numbered(n, 61440));
        for (uint32_t n = 0; n < 100; n++)
            conn_send(a->e.conn, 1, FRAME_PAGES, numbered(n, 61440));
        for (int turn = 0; turn < i; turn++)
            uv_run(&loop, UV_RUN_NOWAIT);
        conn_close(b->e.conn, false, FRAME_E_FENCED, "not wanted");
        UNTIL(a->e.closed && b->e.closed);
        assert_int_equal(a->e.err, -ESTALE);
        assert_non_null(strstr(a->e.why, "not wanted"));
        end_both(a, b);
    }
}

/* Of those of which something came. */
static unsigned open_streams(const struct side *b)
{
    unsigned n = 0;
    for (uint32_t s = 2; s < STREAMS; s++) {
        assert_true(b->closed[s] <= (b->next[s] > 0));
        n += b->next[s] && !b->closed[s];
    }
    return n;
}

/* CLOSE goes over the first socket, and yet never before frames of its stream on another. */
static void close_waits_for_bulk(void **state)
{
    (void)state;
    struct side *a, *b;
    both(tcp_addr, &a, &b);
    spread(a, b);
    for (uint32_t s = 2; s < 400; s++) {
        conn_set_priority(a->e.conn, s, CONN_BULK);
        for (uint32_t n = 0; n < 12; n++)
            conn_send(a->e.conn, s, FRAME_PAGES, numbered(n, 61440));
        uv_run(&loop, UV_RUN_NOWAIT);
        conn_forget(a->e.conn, s);
        assert_int_equal(conn_queued(a->e.conn, s), 0);
        conn_send(a->e.conn, s, FRAME_PAGES, numbered(99, 61440)); /* dropped */
    }
    conn_send(a->e.conn, 1, FRAME_BEGIN, numbered(0, 8));
    UNTIL(b->next[1] && !open_streams(b));
    assert_true(b->e.frames > 400);
    assert_false(a->e.closed || b->e.closed);
    end_both(a, b);
}

/* Both at once, with bulk both ways. */
static void closes_cross(void **state)
{
    (void)state;
    struct side *a, *b;
    both(tcp_addr, &a, &b);
    spread(a, b);
    for (uint32_t s = 2; s < 200; s++) {
        conn_set_priority(a->e.conn, s, CONN_BULK);
        conn_set_priority(b->e.conn, s, CONN_BULK);
        for (uint32_t n = 0; n < 4; n++) {
            conn_send(a->e.conn, s, FRAME_PAGES, numbered(n, 61440));
            conn_send(b->e.conn, s, FRAME_DATA, numbered(n, 61440));
        }
        uv_run(&loop, UV_RUN_NOWAIT);
        conn_forget(a->e.conn, s);
        if (s % 2)
            conn_forget(b->e.conn, s);
    }
    conn_send(a->e.conn, 1, FRAME_BEGIN, numbered(0, 8));
    conn_send(b->e.conn, 1, FRAME_BEGIN, numbered(0, 8));
    UNTIL(a->next[1] && b->next[1]);
    /* and all of them are gone at both ends: there is room for as many streams as ever */
    for (uint32_t s = 1000; s < 1000 + CONN_STREAMS_MAX - 1; s++)
        conn_send(a->e.conn, s, FRAME_LIST, NULL);
    size_t had = b->e.frames;
    UNTIL(b->e.closed || b->e.frames >= had + CONN_STREAMS_MAX - 1);
    assert_false(a->e.closed || b->e.closed);
    end_both(a, b);
}

/* Raw clients: sockets 0 and 1 of one connection in our hands. */

static int raw_dial(void)
{
    struct sockaddr_in sa;
    int len = sizeof sa, fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    uv_tcp_getsockname(&tcp_listener, (struct sockaddr *)&sa, &len);
    assert_int_equal(connect(fd, (struct sockaddr *)&sa, sizeof sa), 0);
    fcntl(fd, F_SETFL, O_NONBLOCK);
    return fd;
}

/* Reads one frame; its payload is in `to`. */
static struct frame_header raw_read(int fd, uint8_t to[FRAME_PAYLOAD_MAX])
{
    uint8_t in[FRAME_HEADER + FRAME_PAYLOAD_MAX];
    struct frame_header h = {0};
    size_t have = 0, want = FRAME_HEADER;
    for (uint64_t deadline = now_ms() + 10000; now_ms() < deadline;) {
        ssize_t n = read(fd, in + have, want - have);
        have += n > 0 ? (size_t)n : 0;
        assert_false(n == 0 || (n < 0 && errno != EAGAIN));
        if (have == FRAME_HEADER && want == FRAME_HEADER)
            frame_step(in, have, &h);
        want = have >= FRAME_HEADER ? FRAME_HEADER + h.len : want;
        if (have == want)
            break;
        uv_run(&loop, UV_RUN_NOWAIT);
    }
    assert_int_equal(frame_step(in, have, &h), have);
    memcpy(to, in + FRAME_HEADER, h.len);
    return h;
}

static void raw_numbered(int fd, uint8_t type, uint32_t stream, uint32_t order, size_t len)
{
    uint8_t f[FRAME_HEADER + FRAME_PAYLOAD_MAX] = {0};
    put_u32(f + FRAME_HEADER, order);
    frame_header_put(f, type, stream, order, (uint32_t)len, frame_payload_hash(f + FRAME_HEADER, len));
    raw_write(fd, f, FRAME_HEADER + len);
}

struct raw {
    struct side *b;
    int fd[2];
    struct id token;
};

static void raw_join(struct raw *r, int fd)
{
    raw_frame(fd, FRAME_JOIN, 0, r->token.b, sizeof r->token.b);
}

static struct raw raw_open(void)
{
    struct raw r = {.b = calloc(1, sizeof *r.b)};
    uint8_t payload[FRAME_PAYLOAD_MAX];
    struct frame_hello h;
    taken = r.b;
    r.b->e.credit = true;
    r.fd[0] = raw_dial();
    raw_hello(r.fd[0]);
    assert_int_equal(raw_read(r.fd[0], payload).type, FRAME_HELLO);
    assert_int_equal(frame_hello_get(payload, 512, &h), 0);
    UNTIL(r.b->e.opened);
    r.token = h.token;
    assert_false(id_none(&r.token));
    r.fd[1] = raw_dial();
    raw_join(&r, r.fd[1]);
    UNTIL(conn_sockets(r.b->e.conn) == 2);
    assert_int_equal(raw_read(r.fd[1], payload).type, FRAME_HELLO);
    return r;
}

static void raw_end(struct raw *r)
{
    close(r->fd[0]);
    close(r->fd[1]);
    UNTIL(r->b->e.closed);
    free(r->b);
}

/* The connection was ended for what the peer did, and said so. */
static void refused(struct raw *r, int err, const char *why)
{
    char text[FRAME_TEXT_MAX];
    assert_true(raw_error(r->fd[0], text));
    assert_non_null(strstr(text, why));
    close(r->fd[0]);
    close(r->fd[1]);
    UNTIL(r->b->e.closed);
    assert_int_equal(r->b->e.err, err);
    assert_non_null(strstr(r->b->e.why, why));
    free(r->b);
}

static void turns(int n)
{
    while (n--)
        uv_run(&loop, UV_RUN_NOWAIT);
}

static void early_frames_wait(void **state)
{
    (void)state;
    struct raw r = raw_open();
    raw_numbered(r.fd[1], FRAME_PAGES, 1, 1, 5000);
    raw_numbered(r.fd[1], FRAME_PAGES, 1, 2, 5000);
    raw_numbered(r.fd[1], FRAME_BEGIN, 1, 4, 8);
    raw_numbered(r.fd[1], FRAME_BEGIN, 2, 0, 8); /* another stream's do not */
    UNTIL(r.b->next[2] == 1);
    assert_int_equal(r.b->next[1], 0);
    raw_numbered(r.fd[0], FRAME_BEGIN, 1, 0, 8);
    UNTIL(r.b->next[1] == 3);
    raw_numbered(r.fd[0], FRAME_BEGIN, 1, 5, 8);
    turns(5);
    assert_int_equal(r.b->next[1], 3);
    raw_numbered(r.fd[0], FRAME_BEGIN, 1, 6, 8);
    raw_numbered(r.fd[1], FRAME_BEGIN, 1, 7, 8);
    raw_numbered(r.fd[1], FRAME_BEGIN, 2, 1, 8);
    UNTIL(r.b->next[2] == 2);
    assert_int_equal(r.b->next[1], 3);
    close(r.fd[0]); /* with a gap: what was held is not the end of a stream */
    close(r.fd[1]);
    UNTIL(r.b->e.closed);
    assert_int_equal(r.b->e.err, -ECONNRESET);
    free(r.b);
}

static void orders_wrap(void **state)
{
    (void)state;
    struct raw r = raw_open();
    /* so far ahead that it is behind */
    raw_numbered(r.fd[0], FRAME_BEGIN, 1, 0xffffffffu, 8);
    refused(&r, -EPROTO, "out of order on stream 1");
}

static void refuses_orders_that_fall(void **state)
{
    (void)state;
    static const uint32_t bad[][3] = {{0, 0, 0}, {0, 1, 1}, {0, 1, 0}, {3, 3, 3}, {3, 2, 2}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct raw r = raw_open();
        for (int n = 0; n < 3; n++)
            raw_numbered(r.fd[1], FRAME_BEGIN, 1, bad[i][n], 8);
        refused(&r, -EPROTO, "out of order on stream 1");
    }
}

static void bounds_what_is_early(void **state)
{
    (void)state;
    struct raw r = raw_open();
    for (uint32_t n = 1; n <= CONN_EARLY_MAX / (60000 + 128) + 1 && !r.b->e.closed; n++) {
        assert_false(r.b->e.closed);
        raw_numbered(r.fd[1], FRAME_OP, 1, n, 60000);
    }
    assert_int_equal(r.b->e.frames, 0);
    refused(&r, -ENOBUFS, "too far ahead");
}

static void early_pages_use_the_window(void **state)
{
    (void)state;
    struct raw r = raw_open();
    for (uint32_t n = 1; n <= FRAME_WINDOW / 61440 + 1; n++)
        raw_numbered(r.fd[1], FRAME_PAGES, 1, n, 61440);
    refused(&r, -EPROTO, "beyond its window on stream 1");
}

static void packed_counts_unpacked(void **state)
{
    (void)state;
    uint8_t p[100] = {0};
    struct raw r = raw_open();
    r.b->e.credit = false;
    put_u32(p, FRAME_PAYLOAD_MAX);
    for (uint32_t n = 0; n <= FRAME_WINDOW / FRAME_PAYLOAD_MAX; n++) {
        uint8_t f[FRAME_HEADER + sizeof p];
        frame_header_put(f, FRAME_PACKED, 600, n, sizeof p, frame_payload_hash(p, sizeof p));
        memcpy(f + FRAME_HEADER, p, sizeof p);
        raw_write(r.fd[1], f, sizeof f);
    }
    UNTIL(r.b->e.frames == FRAME_WINDOW / FRAME_PAYLOAD_MAX);
    refused(&r, -EPROTO, "beyond its window on stream 600");
}

/* A socket that may not join is closed, and told why; the connection lives. */
static void turned_away_says(struct raw *r, int fd, const char *why)
{
    char text[FRAME_TEXT_MAX];
    unsigned before = turned_away;
    assert_true(raw_error(fd, text));
    assert_non_null(strstr(text, why));
    close(fd);
    UNTIL(turned_away == before + 1);
    assert_false(r->b->e.closed);
}

static void joins_by_token_only(void **state)
{
    (void)state;
    struct raw r = raw_open();
    struct id wrong = r.token, none = {{0}};
    wrong.b[15] ^= 1;
    int fd = raw_dial();
    raw_frame(fd, FRAME_JOIN, 0, wrong.b, 16);
    turned_away_says(&r, fd, "JOIN of no connection");
    fd = raw_dial();
    raw_frame(fd, FRAME_JOIN, 0, none.b, 16);
    turned_away_says(&r, fd, "JOIN of no connection");
    fd = raw_dial();
    raw_frame(fd, FRAME_JOIN, 0, r.token.b, 15);
    turned_away_says(&r, fd, "out of form");
    fd = raw_dial(); /* not after a HELLO */
    raw_hello(fd);
    raw_join(&r, fd);
    turned_away_says(&r, fd, "out of place");
    raw_numbered(r.fd[1], FRAME_BEGIN, 1, 0, 8);
    UNTIL(r.b->next[1] == 1);
    raw_end(&r);
}

static void joins_so_often_only(void **state)
{
    (void)state;
    struct raw r = raw_open();
    int more[CONN_SOCKETS];
    for (unsigned i = 0; i < CONN_SOCKETS - 2; i++) {
        more[i] = raw_dial();
        raw_join(&r, more[i]);
        UNTIL(conn_sockets(r.b->e.conn) == 3 + i);
        raw_numbered(more[i], FRAME_BEGIN, 1, i, 8);
        UNTIL(r.b->next[1] == i + 1);
    }
    int fd = raw_dial();
    raw_join(&r, fd);
    turned_away_says(&r, fd, "that has 5 sockets");
    raw_join(&r, more[0]); /* once more on one that has */
    refused(&r, -EPROTO, "JOIN out of place");
    for (unsigned i = 0; i < CONN_SOCKETS - 2; i++)
        close(more[i]);
}

static void joins_nothing_that_is_gone(void **state)
{
    (void)state;
    struct raw r = raw_open(), other = raw_open();
    conn_close(r.b->e.conn, true, 0, NULL);
    known = r.b->e.conn;
    int fd = raw_dial();
    raw_join(&r, fd); /* leaving */
    turned_away_says(&other, fd, "JOIN of no connection");
    raw_end(&r);
    fd = raw_dial();
    raw_join(&r, fd); /* gone */
    turned_away_says(&other, fd, "JOIN of no connection");
    raw_end(&other);
}

/* Frames that come at once with the JOIN, before the server has looked at it. */
static void joins_and_speaks_at_once(void **state)
{
    (void)state;
    struct raw r = raw_open();
    int fd = raw_dial();
    raw_join(&r, fd);
    for (uint32_t n = 0; n < 5; n++)
        raw_numbered(fd, FRAME_BEGIN, 1, n, 8);
    UNTIL(r.b->next[1] == 5);
    close(fd);
    raw_end(&r);
}

static void keeps_control_on_the_first(void **state)
{
    (void)state;
    static const uint8_t types[] = {FRAME_CLOSE, FRAME_WINDOW_MORE, FRAME_HELLO, FRAME_JOIN};
    uint8_t p[64] = {0};
    for (size_t i = 0; i < sizeof types; i++) {
        struct raw r = raw_open();
        raw_frame(r.fd[1], types[i], 0, p, 4);
        refused(&r, -EPROTO, i < 2 ? "of a further socket" : "of place");
    }
}

static void one_end_ends_all(void **state)
{
    (void)state;
    for (int i = 0; i < 4; i++) {
        struct raw r = raw_open();
        struct linger hard = {1, 0};
        if (i / 2)
            setsockopt(r.fd[i % 2], SOL_SOCKET, SO_LINGER, &hard, sizeof hard);
        uint64_t from = now_ms();
        close(r.fd[i % 2]);
        UNTIL(r.b->e.closed);
        assert_true(now_ms() - from < 3000);
        assert_int_equal(r.b->e.err, -ECONNRESET);
        assert_non_null(strstr(r.b->e.why, "one of its 2 sockets is lost"));
        r.fd[i % 2] = dup(r.fd[!(i % 2)]);
        raw_end(&r);
    }
    struct raw r = raw_open();
    close(r.fd[0]);
    close(r.fd[1]);
    UNTIL(r.b->e.closed);
    assert_int_equal(r.b->e.err, 0);
    free(r.b);
}

/* One socket is answered on, the other is not. */
static void notices_one_silent_socket(void **state)
{
    (void)state;
    for (int silent = 0; silent < 2; silent++) {
        struct raw r = raw_open();
        conn_set_silence(r.b->e.conn, 300);
        uint64_t from = now_ms();
        while (!r.b->e.closed && now_ms() < from + 10000) {
            raw_frame(r.fd[!silent], FRAME_PONG, 0, "12345678", 8);
            uint64_t until = now_ms() + 20;
            UNTIL(r.b->e.closed || now_ms() >= until);
        }
        assert_true(r.b->e.closed);
        assert_int_equal(r.b->e.err, -ETIMEDOUT);
        raw_end(&r);
    }
}

/* Raw servers */

struct raw_server {
    int l, fd[2];
    char addr[64];
    struct side *a;
};

static int raw_accept(struct raw_server *r)
{
    int fd = -1;
    UNTIL(fd >= 0 || (fd = accept4(r->l, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC)) >= 0);
    return fd;
}

static void raw_greet(int fd, uint8_t identity)
{
    uint8_t p[512];
    struct frame_hello h = hello("raw");
    memset(&h.identity, identity, sizeof h.identity);
    memset(&h.token, 9, sizeof h.token);
    raw_frame(fd, FRAME_HELLO, 0, p, frame_hello_put(p, sizeof p, &h));
}

static struct raw_server raw_serve(void)
{
    struct raw_server r = {.a = calloc(1, sizeof *r.a)};
    struct sockaddr_in sa = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof sa;
    uint8_t p[FRAME_PAYLOAD_MAX];
    struct frame_hello h = hello("client");
    r.l = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    assert_int_equal(bind(r.l, (struct sockaddr *)&sa, sizeof sa), 0);
    assert_int_equal(listen(r.l, 5), 0);
    getsockname(r.l, (struct sockaddr *)&sa, &len);
    addr_text((struct sockaddr *)&sa, r.addr, sizeof r.addr);
    r.a->e.conn = conn_dial(&loop, r.addr, &h, &client_ops, r.a);
    r.fd[0] = raw_accept(&r);
    raw_greet(r.fd[0], 3);
    assert_int_equal(raw_read(r.fd[0], p).type, FRAME_HELLO);
    UNTIL(r.a->e.opened);
    return r;
}

static void raw_serve_end(struct raw_server *r)
{
    conn_close(r->a->e.conn, false, 0, NULL);
    UNTIL(r->a->e.closed);
    close(r->fd[0]);
    close(r->l);
    free(r->a);
}

/* What goes over which socket, and when: bulk over the first until the server has greeted on a further one. */
static void bulk_goes_apart(void **state)
{
    (void)state;
    uint8_t p[FRAME_PAYLOAD_MAX];
    struct raw_server r = raw_serve();
    conn_set_priority(r.a->e.conn, 1, CONN_BULK);
    conn_send(r.a->e.conn, 1, FRAME_PAGES, numbered(0, 100));
    assert_int_equal(raw_read(r.fd[0], p).order, 0);
    r.fd[1] = raw_accept(&r);
    assert_int_equal(raw_read(r.fd[1], p).type, FRAME_JOIN);
    assert_int_equal(p[0], 9);
    conn_send(r.a->e.conn, 1, FRAME_PAGES, numbered(1, 100));
    assert_int_equal(raw_read(r.fd[0], p).order, 1);
    raw_greet(r.fd[1], 3);
    UNTIL(conn_sockets(r.a->e.conn) == 2);
    conn_send(r.a->e.conn, 1, FRAME_PAGES, numbered(2, 100));
    conn_send(r.a->e.conn, 2, FRAME_PAGES, numbered(0, 100));
    struct frame_header h = raw_read(r.fd[1], p);
    assert_int_equal(h.stream, 1);
    assert_int_equal(h.order, 2);
    assert_int_equal(raw_read(r.fd[0], p).stream, 2);
    conn_set_priority(r.a->e.conn, 1, CONN_NORMAL);
    conn_set_priority(r.a->e.conn, 2, CONN_BULK);
    conn_send(r.a->e.conn, 1, FRAME_PAGES, numbered(3, 100));
    conn_send(r.a->e.conn, 2, FRAME_PAGES, numbered(1, 100));
    assert_int_equal(raw_read(r.fd[0], p).order, 3);
    assert_int_equal(raw_read(r.fd[1], p).stream, 2);
    close(r.fd[1]);
    raw_serve_end(&r);
}

/* A further socket that cannot be had, or leads to somebody else, is done without. */
static void does_without(void **state)
{
    (void)state;
    uint8_t p[FRAME_PAYLOAD_MAX];
    for (int how = 0; how < 3; how++) {
        struct raw_server r = raw_serve();
        if (!how)
            close(r.l); /* refused */
        conn_set_priority(r.a->e.conn, 1, CONN_BULK);
        int fd = how ? raw_accept(&r) : -1;
        if (how == 1)
            close(fd);
        else if (how == 2)
            raw_greet(fd, 4);
        if (how == 2) {
            assert_int_equal(raw_read(fd, p).type, FRAME_JOIN);
            ssize_t n = -1;
            UNTIL(n >= 0 || (n = read(fd, p, 1)) >= 0);
            assert_int_equal(n, 0);
            close(fd);
        }
        for (uint32_t n = 0; n < 50; n++) {
            conn_send(r.a->e.conn, 1, FRAME_PAGES, numbered(n, 100));
            assert_int_equal(raw_read(r.fd[0], p).order, n);
        }
        assert_false(r.a->e.closed);
        if (!how)
            r.l = dup(r.fd[0]);
        raw_serve_end(&r);
    }
}

/* CLOSE, on the first socket, comes when the peer has said on each that all before is there; also as an answer. */
static void close_waits_for_pongs(void **state)
{
    (void)state;
    uint8_t p[FRAME_PAYLOAD_MAX], id[4];
    for (int theirs = 0; theirs < 2; theirs++) {
        struct raw_server r = raw_serve();
        conn_set_priority(r.a->e.conn, 5, CONN_BULK);
        r.fd[1] = raw_accept(&r);
        assert_int_equal(raw_read(r.fd[1], p).type, FRAME_JOIN);
        raw_greet(r.fd[1], 3);
        UNTIL(conn_sockets(r.a->e.conn) == 2);
        conn_send(r.a->e.conn, 5, FRAME_PAGES, numbered(0, 100));
        assert_int_equal(raw_read(r.fd[1], p).stream, 5);
        put_u32(id, 5);
        if (theirs)
            raw_frame(r.fd[0], FRAME_CLOSE, 0, id, 4);
        else
            conn_forget(r.a->e.conn, 5);
        for (int i = 0; i < 2; i++) {
            assert_int_equal(raw_read(r.fd[i], p).type, FRAME_PING);
            raw_frame(r.fd[i], FRAME_PONG, 0, p, 8);
        }
        assert_int_equal(raw_read(r.fd[0], p).type, FRAME_CLOSE);
        assert_int_equal(get_u32(p), 5);
        assert_int_equal(r.a->closed[5], theirs);
        close(r.fd[1]);
        raw_serve_end(&r);
    }
}

/* Without PONGs for a round the sender stops where the receiver might have to refuse. */
static void sends_so_far_ahead_only(void **state)
{
    (void)state;
    static uint8_t p[FRAME_PAYLOAD_MAX];
    struct raw_server r = raw_serve();
    conn_set_priority(r.a->e.conn, 1, CONN_BULK);
    r.fd[1] = raw_accept(&r);
    raw_greet(r.fd[1], 3);
    UNTIL(conn_sockets(r.a->e.conn) == 2);
    struct buf *b = bytes(60000, 1);
    for (unsigned n = 0; n < CONN_EARLY_MAX / 60000 + 500; n++)
        conn_send(r.a->e.conn, 1, FRAME_OP, buf_hold(b));
    uint64_t got = 0, quiet = now_ms();
    while (now_ms() < quiet + 300) {
        ssize_t n = read(r.fd[1], p, sizeof p);
        got += n > 0 ? (uint64_t)n : 0;
        quiet = n > 0 ? now_ms() : quiet;
        uv_run(&loop, UV_RUN_NOWAIT);
    }
    assert_in_range(got, CONN_EARLY_MAX - 200000, CONN_EARLY_MAX + 100000);
    assert_true(conn_queued(r.a->e.conn, 1) > 400 * 60000);
    uint8_t token[8]; /* the round's: number 1 */
    put_u64(token, 0x100000001u);
    raw_frame(r.fd[0], FRAME_PONG, 0, token, 8);
    raw_frame(r.fd[1], FRAME_PONG, 0, token, 8);
    uint64_t before = got;
    for (uint64_t deadline = now_ms() + 10000; got < before + 10000000 && now_ms() < deadline;) {
        ssize_t n = read(r.fd[1], p, sizeof p);
        got += n > 0 ? (uint64_t)n : 0;
        uv_run(&loop, UV_RUN_NOWAIT);
    }
    assert_true(got >= before + 10000000);
    buf_drop(b);
    close(r.fd[1]);
    raw_serve_end(&r);
}

int main(void)
{
    signal(SIGPIPE, SIG_IGN);
    uv_loop_init(&loop);
    listen_on_both();
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(keeps_order_tcp),
        cmocka_unit_test(keeps_order_unix),
        cmocka_unit_test(answers_in_bulk),
        cmocka_unit_test(idle_bundles_live),
        cmocka_unit_test(close_flushes_all),
        cmocka_unit_test(close_tells_why),
        cmocka_unit_test(close_waits_for_bulk),
        cmocka_unit_test(closes_cross),
        cmocka_unit_test(early_frames_wait),
        cmocka_unit_test(orders_wrap),
        cmocka_unit_test(refuses_orders_that_fall),
        cmocka_unit_test(bounds_what_is_early),
        cmocka_unit_test(early_pages_use_the_window),
        cmocka_unit_test(packed_counts_unpacked),
        cmocka_unit_test(joins_by_token_only),
        cmocka_unit_test(joins_so_often_only),
        cmocka_unit_test(joins_nothing_that_is_gone),
        cmocka_unit_test(joins_and_speaks_at_once),
        cmocka_unit_test(keeps_control_on_the_first),
        cmocka_unit_test(one_end_ends_all),
        cmocka_unit_test(notices_one_silent_socket),
        cmocka_unit_test(bulk_goes_apart),
        cmocka_unit_test(does_without),
        cmocka_unit_test(close_waits_for_pongs),
        cmocka_unit_test(sends_so_far_ahead_only),
    };
    int rc = cmocka_run_group_tests(tests, NULL, NULL);
    unlink(pipe_addr + 5);
    if (rc)
        return rc; /* what a failed test has left open would go on */
    uv_close((uv_handle_t *)&tcp_listener, NULL);
    uv_close((uv_handle_t *)&pipe_listener, NULL);
    uv_run(&loop, UV_RUN_DEFAULT);
    return uv_loop_close(&loop) ? 1 : rc;
}
