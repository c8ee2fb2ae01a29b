/* Connections: pairs over a socket pair in one loop, and raw sockets that break the rules. */
#include "agent/net/addr.h"
#include "tests/unit/test_conn.h"

#include <signal.h>

static void pair_of(struct end *a, struct end *b, const struct frame_hello *ha)
{
    int fd = take(b);
    a->conn = conn_take(stream_of(fd), ha, &ops, a);
    assert_non_null(a->conn);
}

static void pair(struct end *a, struct end *b)
{
    struct frame_hello h = hello("a");
    pair_of(a, b, &h);
    UNTIL(a->opened && b->opened);
}

static void end_pair(struct end *a, struct end *b)
{
    if (!a->closed)
        conn_close(a->conn, false, 0, NULL);
    UNTIL(a->closed && b->closed);
}

static void greets(void **state)
{
    (void)state;
    struct end *e = ends();
    pair(&e[0], &e[1]);
    assert_string_equal(e[0].peer.host, "b");
    assert_string_equal(e[1].peer.host, "a");
    conn_send(e[0].conn, 7, FRAME_BEGIN, bytes(8, 3));
    conn_send(e[0].conn, 7, FRAME_LIST, NULL);
    UNTIL(e[1].frames == 2);
    assert_int_equal(e[1].seen[0].stream, 7);
    assert_int_equal(e[1].seen[0].type, FRAME_BEGIN);
    assert_int_equal(e[1].seen[0].len, 8);
    assert_int_equal(e[1].seen[0].first, 3);
    assert_int_equal(e[1].seen[1].type, FRAME_LIST);
    assert_int_equal(e[1].seen[1].len, 0);
    end_pair(&e[0], &e[1]);
    assert_int_equal(e[0].err, 0);
    assert_int_equal(e[1].err, 0);
    free(e);
}

static void tells_versions(void **state)
{
    (void)state;
    struct end *e = ends();
    struct frame_hello h = hello("old");
    h.version = 7;
    pair_of(&e[0], &e[1], &h);
    UNTIL(e[0].closed && e[1].closed);
    assert_int_equal(e[0].err, -EPROTONOSUPPORT);
    assert_int_equal(e[1].err, -EPROTONOSUPPORT);
    assert_non_null(strstr(e[1].why, "peer speaks version 7, this agent 3: upgrade the older one"));
    assert_false(e[0].opened || e[1].opened);
    free(e);
}

static void window_stops_sender(void **state)
{
    (void)state;
    struct end *e = ends();
    pair(&e[0], &e[1]);
    const unsigned all = FRAME_WINDOW / 61440 + 31;
    for (unsigned i = 0; i < all; i++)
        conn_send(e[0].conn, 1, FRAME_PAGES, bytes(61440, (int)(i & 255)));
    conn_send(e[0].conn, 2, FRAME_BEGIN, bytes(8, 1)); /* another stream has its own */
    UNTIL(e[1].frames == FRAME_WINDOW / 61440 + 1);
    for (int i = 0; i < 5; i++)
        uv_run(&loop, UV_RUN_NOWAIT);
    assert_int_equal(e[1].frames, FRAME_WINDOW / 61440 + 1);
    assert_int_equal(conn_queued(e[0].conn, 1), (all - FRAME_WINDOW / 61440) * (61440 + FRAME_HEADER));
    conn_credit(e[1].conn, 1, FRAME_WINDOW); /* more than it took is not given */
    e[1].credit = true;
    UNTIL(e[1].frames == all + 1);
    for (unsigned i = 0, stream1 = 0; i < all + 1; i++)
        if (e[1].seen[i].stream == 1)
            assert_int_equal(e[1].seen[i].first, stream1++ & 255);
    assert_int_equal(e[0].drained, 1);
    end_pair(&e[0], &e[1]);
    free(e);
}

/* With bulk in every queue, an urgent frame is behind no more than what the kernel has, and CONN_AHEAD. */
static void urgent_overtakes(void **state)
{
    (void)state;
    struct end *e = ends();
    pair(&e[0], &e[1]);
    conn_set_priority(e[0].conn, 1, CONN_BULK);
    conn_set_priority(e[0].conn, 3, CONN_URGENT);
    for (int i = 0; i < 200; i++) {
        conn_send(e[0].conn, 1, FRAME_PAGES, bytes(61440, i));
        conn_send(e[0].conn, 2, FRAME_PAGES, bytes(61440, i));
    }
    e[1].credit = true;
    UNTIL(e[1].frames >= 5);
    size_t before = e[1].bytes;
    uint64_t out = conn_bytes_out(e[0].conn);
    conn_send(e[0].conn, 3, FRAME_LIST, bytes(4, 9));
    UNTIL(e[1].frames == 401);
    size_t at = 0, sum = 0;
    while (e[1].seen[at].stream != 3)
        sum += e[1].seen[at++].len;
    assert_true(sum <= out + CONN_AHEAD);
    assert_true(sum <= before + (1u << 20));
    /* and normal goes before bulk: all of stream 2 is in before the last half of stream 1 */
    size_t last2 = 0;
    for (size_t i = 0; i < 401; i++)
        if (e[1].seen[i].stream == 2)
            last2 = i;
    assert_true(last2 < 230);
    end_pair(&e[0], &e[1]);
    free(e);
}

static void equals_take_turns(void **state)
{
    (void)state;
    struct end *e = ends();
    pair(&e[0], &e[1]);
    for (int i = 0; i < 60; i++)
        conn_send(e[0].conn, 1, FRAME_PAGES, bytes(61440, i));
    for (int i = 0; i < 60; i++)
        conn_send(e[0].conn, 2, FRAME_PAGES, bytes(61440, i));
    UNTIL(e[1].frames == 120);
    unsigned first20 = 0;
    for (unsigned i = 0; i < 20; i++)
        first20 += e[1].seen[i].stream == 2;
    assert_in_range(first20, 8, 12);
    end_pair(&e[0], &e[1]);
    free(e);
}

static void refuses_garbage(void **state)
{
    (void)state;
    struct end *e = ends();
    int fd = take(e);
    raw_write(fd, "GET / HTTP/1.1\r\nHost: example.org\r\n\r\n", 37);
    raw_fault(e, fd, -EPROTO, "not a frame");
    free(e);
}

static void refuses_flipped_bits(void **state)
{
    (void)state;
    for (size_t bit = 0; bit < 8 * (FRAME_HEADER + 40); bit += 7) {
        struct end *e = ends();
        int fd = take(e);
        raw_hello(fd);
        uint8_t f[FRAME_HEADER + 40] = {0};
        memset(f + FRAME_HEADER, 0x5a, 40);
        frame_header_put(f, FRAME_OP, 1, 0, 40, frame_payload_hash(f + FRAME_HEADER, 40));
        f[bit / 8] ^= (uint8_t)(1u << bit % 8);
        raw_write(fd, f, sizeof f);
        static const uint8_t more[FRAME_PAYLOAD_MAX]; /* for a length that became greater */
        raw_write(fd, more, sizeof more);
        char text[FRAME_TEXT_MAX];
        assert_true(raw_error(fd, text));
        close(fd);
        UNTIL(e->closed);
        assert_true(e->err == -EPROTO || e->err == -EBADMSG);
        assert_int_equal(e->frames, 0);
        free(e);
    }
}

static void wants_hello_first(void **state)
{
    (void)state;
    struct end *e = ends();
    int fd = take(e);
    raw_frame(fd, FRAME_LIST, 1, "abcd", 4);
    raw_fault(e, fd, -EPROTO, "without a HELLO");
    memset(e, 0, sizeof *e);
    fd = take(e);
    raw_hello(fd);
    raw_hello(fd);
    raw_fault(e, fd, -EPROTO, "HELLO out of place");
    memset(e, 0, sizeof *e);
    fd = take(e);
    raw_frame(fd, FRAME_HELLO, 0, "abcd", 4);
    raw_fault(e, fd, -EPROTO, "out of form");
    free(e);
}

static void closes_window_violator(void **state)
{
    (void)state;
    static const uint8_t page[61440];
    struct end *e = ends();
    int fd = take(e);
    raw_hello(fd);
    for (unsigned i = 0; i <= FRAME_WINDOW / sizeof page; i++)
        raw_frame(fd, FRAME_PAGES, 5, page, sizeof page);
    raw_fault(e, fd, -EPROTO, "beyond its window on stream 5");
    assert_int_equal(e->frames, FRAME_WINDOW / sizeof page);
    free(e);
}

static void refuses_window_never_taken(void **state)
{
    (void)state;
    struct end *e = ends();
    int fd = take(e);
    uint8_t more[8];
    put_u32(more, 3);
    put_u32(more + 4, 0xffffffffu);
    raw_hello(fd);
    raw_frame(fd, FRAME_BEGIN, 3, more, 8);
    raw_frame(fd, FRAME_WINDOW_MORE, 0, more, 8);
    raw_fault(e, fd, -EPROTO, "more window than it had");
    free(e);
}

static void bounds_streams(void **state)
{
    (void)state;
    struct end *e = ends();
    int fd = take(e);
    raw_hello(fd);
    for (uint32_t i = 1; i <= CONN_STREAMS_MAX + 1; i++)
        raw_frame(fd, FRAME_LIST, i, "abcd", 4);
    raw_fault(e, fd, -ENOBUFS, "more than 4096 streams");
    assert_int_equal(e->frames, CONN_STREAMS_MAX);
    free(e);
}

/* One that asks and never reads: the answers are bounded. */
static void bounds_answers(void **state)
{
    (void)state;
    struct end *e = ends();
    int fd = take(e);
    raw_hello(fd);
    UNTIL(e->opened);
    for (unsigned i = 0; i < 1000000 && !e->closed; i++)
        raw_frame(fd, FRAME_PING, 0, "12345678", 8);
    UNTIL(e->closed);
    assert_int_equal(e->err, -ENOBUFS);
    assert_non_null(strstr(e->why, "reads no answers"));
    close(fd);
    free(e);
}

static void notices_cut_frames(void **state)
{
    (void)state;
    struct end *e = ends();
    int fd = take(e);
    raw_hello(fd);
    uint8_t f[FRAME_HEADER];
    frame_header_put(f, FRAME_PAGES, 1, 0, 1000, 1);
    raw_write(fd, f, sizeof f);
    UNTIL(e->opened);
    close(fd);
    UNTIL(e->closed);
    assert_int_equal(e->err, -ECONNRESET);
    free(e);
}

/* It says why and hangs up, with what we sent unread: the reason arrives all the same. */
static void hears_last_words(void **state)
{
    (void)state;
    struct end *e = ends();
    int fd = take(e);
    raw_hello(fd);
    UNTIL(e->opened);
    uint8_t f[FRAME_HEADER + 600];
    struct frame_failed last = {.code = FRAME_E_LIMIT, .text = "enough of you"};
    size_t len = frame_failed_put(f + FRAME_HEADER, 600, &last);
    frame_header_put(f, FRAME_ERROR, 0, 0, (uint32_t)len, frame_payload_hash(f + FRAME_HEADER, len));
    assert_int_equal(write(fd, f, FRAME_HEADER + len), FRAME_HEADER + len);
    close(fd);
    conn_send(e->conn, 1, FRAME_LIST, bytes(4, 1));
    UNTIL(e->closed);
    assert_int_equal(e->err, -ENOBUFS);
    assert_non_null(strstr(e->why, "enough of you"));
    free(e);
}

/* A CLOSE is answered by one, whether or not the stream was known: only then can its sender forget it. */
static void answers_close(void **state)
{
    (void)state;
    struct end *e = ends();
    int fd = take(e);
    uint8_t id[4], f[FRAME_HEADER + 4];
    put_u32(id, 5);
    raw_hello(fd);
    UNTIL(e->opened);
    uint64_t before = 0;
    while (conn_queued(e->conn, 0) || conn_bytes_out(e->conn) != before) {
        before = conn_bytes_out(e->conn);
        uv_run(&loop, UV_RUN_NOWAIT);
    }
    raw_frame(fd, FRAME_LIST, 5, id, 4);
    raw_frame(fd, FRAME_CLOSE, 0, id, 4);
    raw_frame(fd, FRAME_CLOSE, 0, id, 4);
    UNTIL(conn_bytes_out(e->conn) == before + 2 * sizeof f);
    assert_int_equal(e->frames, 2);
    close(fd);
    UNTIL(e->closed);
    free(e);
}

static void notices_resets(void **state)
{
    (void)state;
    struct end *e = ends();
    int fd = take(e);
    raw_hello(fd);
    UNTIL(e->opened);
    for (int i = 0; i < 20; i++)
        conn_send(e->conn, 1, FRAME_PAGES, bytes(61440, i));
    uv_run(&loop, UV_RUN_NOWAIT);
    close(fd);
    UNTIL(e->closed);
    assert_true(e->err == -ECONNRESET || e->err == -EPIPE);
    free(e);
}

static void notices_silence(void **state)
{
    (void)state;
    struct end *e = ends();
    int fd = take(e);
    raw_hello(fd);
    UNTIL(e->opened);
    uint64_t from = now_ms();
    conn_set_silence(e->conn, 300);
    UNTIL(e->closed);
    assert_in_range(now_ms() - from, 200, 2000);
    assert_int_equal(e->err, -ETIMEDOUT);
    assert_non_null(strstr(e->why, "silent"));
    close(fd);
    free(e);
}

static void idle_pairs_live(void **state)
{
    (void)state;
    struct end *e = ends();
    pair(&e[0], &e[1]);
    conn_set_silence(e[0].conn, 100);
    conn_set_silence(e[1].conn, 100);
    uint64_t from = now_ms();
    UNTIL(now_ms() > from + 500);
    assert_false(e[0].closed || e[1].closed);
    end_pair(&e[0], &e[1]);
    free(e);
}

static void close_flushes(void **state)
{
    (void)state;
    struct end *e = ends();
    pair(&e[0], &e[1]);
    e[1].credit = true;
    for (int i = 0; i < 100; i++)
        conn_send(e[0].conn, 1, FRAME_PAGES, bytes(61440, i));
    conn_send(e[0].conn, 1, FRAME_END, bytes(16, 1));
    conn_close(e[0].conn, true, FRAME_E_LIMIT, NULL);
    conn_send(e[0].conn, 1, FRAME_END, bytes(16, 1)); /* dropped */
    UNTIL(e[0].closed && e[1].closed);
    assert_int_equal(e[1].frames, 101);
    assert_int_equal(e[0].err, 0);
    assert_int_equal(e[1].err, 0);
    free(e);
}

static void close_tells_why(void **state)
{
    (void)state;
    struct end *e = ends();
    pair(&e[0], &e[1]);
    for (int i = 0; i < 100; i++)
        conn_send(e[0].conn, 1, FRAME_PAGES, bytes(61440, i));
    conn_close(e[0].conn, false, FRAME_E_FENCED, "you are\x1b[2J not wanted");
    UNTIL(e[0].closed && e[1].closed);
    assert_true(e[1].frames < 100);
    assert_int_equal(e[0].err, 0);
    assert_int_equal(e[1].err, -ESTALE);
    assert_non_null(strstr(e[1].why, "you are?[2J not wanted"));
    free(e);
}

static void closes_within_calls(void **state)
{
    (void)state;
    struct end *e = ends();
    pair(&e[0], &e[1]);
    e[1].close_on = FRAME_LIST;
    for (int i = 0; i < 10; i++)
        conn_send(e[0].conn, 1, FRAME_LIST, bytes(4, 0));
    UNTIL(e[0].closed && e[1].closed);
    assert_int_equal(e[1].frames, 1);
    free(e);
}

static void streams_end(void **state)
{
    (void)state;
    struct end *e = ends();
    pair(&e[0], &e[1]);
    e[1].echo = FRAME_OK;
    /* many more in a row than may be at once: a closed one is forgotten at both ends */
    for (uint32_t i = 1; i <= 3 * CONN_STREAMS_MAX; i++) {
        size_t had = e[0].frames;
        conn_send(e[0].conn, i, FRAME_LIST, NULL);
        if (i % 2)
            UNTIL(e[0].frames > had);
        conn_forget(e[0].conn, i);
        assert_int_equal(conn_queued(e[0].conn, i), 0);
        conn_send(e[0].conn, i, FRAME_LIST, NULL); /* dropped */
    }
    UNTIL(e[1].seen[0].type == FRAME_LIST && conn_queued(e[0].conn, 0) == 0);
    size_t had = e[0].frames;
    conn_send(e[0].conn, 4 * CONN_STREAMS_MAX, FRAME_LIST, NULL);
    UNTIL(e[0].frames > had);
    assert_false(e[0].closed || e[1].closed);
    assert_int_equal(e[1].seen[1].type, FRAME_CLOSE);
    end_pair(&e[0], &e[1]);
    free(e);
}

static void dials(void **state)
{
    (void)state;
    static const struct {
        const char *addr;
        int err;
    } bad[] = {
        {"127.0.0.1:1", -ECONNREFUSED},
        {"localhost:1", -ECONNREFUSED},
        {"unix:/nonexistent/socket", -ENOENT},
        {"unix:", -EINVAL},
        {"7070", -EINVAL},
        {"::1:70", -EINVAL},
        {"host:70000", -EINVAL},
        {"host.invalid:7", -EHOSTUNREACH},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct end *e = ends();
        struct frame_hello h = hello("d");
        e->conn = conn_dial(&loop, bad[i].addr, &h, &ops, e);
        assert_false(e->closed);
        UNTIL(e->closed);
        assert_int_equal(e->err, bad[i].err);
        assert_non_null(strstr(e->why, bad[i].addr));
        free(e);
    }
    struct end *e = ends();
    struct frame_hello h = hello("d");
    e->conn = conn_dial(&loop, "localhost:1", &h, &ops, e);
    conn_close(e->conn, true, 0, NULL); /* while resolving */
    UNTIL(e->closed);
    assert_int_equal(e->err, 0);
    free(e);
}

/* Both ends, and both their checksums, on one core. Printed, not judged: machines differ. */
static void speed(void **state)
{
    (void)state;
    struct sockaddr_in sa = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t len = sizeof sa;
    int l = socket(AF_INET, SOCK_STREAM, 0);
    assert_int_equal(bind(l, (struct sockaddr *)&sa, sizeof sa), 0);
    assert_int_equal(listen(l, 1), 0);
    getsockname(l, (struct sockaddr *)&sa, &len);
    struct end *e = ends();
    struct frame_hello h = hello("a");
    char addr[64];
    addr_text((struct sockaddr *)&sa, addr, sizeof addr);
    e[0].conn = conn_dial(&loop, addr, &h, &ops, &e[0]);
    uv_run(&loop, UV_RUN_ONCE);
    uv_run(&loop, UV_RUN_ONCE);
    int fd = accept(l, NULL, NULL);
    uv_tcp_t *t = malloc(sizeof *t);
    uv_tcp_init(&loop, t);
    uv_tcp_open(t, fd);
    e[1].conn = conn_take((uv_stream_t *)t, &h, &ops, &e[1]);
    e[1].credit = true;
    UNTIL(e[0].opened && e[1].opened);
    struct buf *b[64];
    for (int i = 0; i < 64; i++)
        b[i] = bytes(61440, i);
    const size_t total = 20000;
    uint64_t from = uv_hrtime();
    size_t sent = 0;
    while (e[1].frames < total) {
        while (sent < total && conn_queued(e[0].conn, 1) < CONN_LOW)
            conn_send(e[0].conn, 1, FRAME_PAGES, buf_hold(b[sent++ % 64]));
        uv_run(&loop, UV_RUN_ONCE);
    }
    double seconds = (double)(uv_hrtime() - from) / 1e9;
    print_message("one stream, 60 KiB frames, both ends on one core: %.2f GB/s\n",
                  (double)total * 61440 / 1e9 / seconds);
    assert_int_equal(e[1].bytes, total * 61440);
    for (int i = 0; i < 64; i++)
        buf_drop(b[i]);
    close(l);
    end_pair(&e[0], &e[1]);
    free(e);
}

int main(void)
{
    signal(SIGPIPE, SIG_IGN);
    uv_loop_init(&loop);
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(greets),
        cmocka_unit_test(tells_versions),
        cmocka_unit_test(window_stops_sender),
        cmocka_unit_test(urgent_overtakes),
        cmocka_unit_test(equals_take_turns),
        cmocka_unit_test(refuses_garbage),
        cmocka_unit_test(refuses_flipped_bits),
        cmocka_unit_test(wants_hello_first),
        cmocka_unit_test(closes_window_violator),
        cmocka_unit_test(refuses_window_never_taken),
        cmocka_unit_test(bounds_streams),
        cmocka_unit_test(bounds_answers),
        cmocka_unit_test(notices_cut_frames),
        cmocka_unit_test(answers_close),
        cmocka_unit_test(hears_last_words),
        cmocka_unit_test(notices_resets),
        cmocka_unit_test(notices_silence),
        cmocka_unit_test(idle_pairs_live),
        cmocka_unit_test(close_flushes),
        cmocka_unit_test(close_tells_why),
        cmocka_unit_test(closes_within_calls),
        cmocka_unit_test(streams_end),
        cmocka_unit_test(dials),
        cmocka_unit_test(speed),
    };
    int rc = cmocka_run_group_tests(tests, NULL, NULL);
    uv_run(&loop, UV_RUN_DEFAULT);
    return uv_loop_close(&loop) ? 1 : rc;
}
