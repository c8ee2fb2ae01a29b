/* The server over real stores, seen from the wire: every test runs against mem:, file: and hub:, a hub with
 * two replicas of mem: in this process. Every wait is a loop run
 * with a deadline. */
#include "agent/base/log.h"
#include "agent/hub/hub.h"
#include "agent/net/conn.h"
#include "agent/net/pack.h"
#include "agent/net/server.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <netinet/in.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>
#include <cmocka.h>

#define CLIENTS 4
#define GOT 70000
#define REPLICAS 2

struct got {
    uint32_t stream;
    uint8_t type;
    struct buf *payload;
};

struct client {
    struct conn *conn;
    bool opened, closed;
    int err;
    char why[1024];
    struct got got[GOT];
    size_t got_n, taken;
};

static struct world {
    uv_loop_t loop;
    struct store *store;
    struct server *server;
    struct replica {
        struct store *store;
        struct server *server;
        bool stopped, closed;
    } replicas[REPLICAS]; /* of a hub: */
    char dir[64], addr[128];
    struct client *clients[CLIENTS];
    bool stopped, store_closed;
} w;

static uint64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

static void on_wake(uv_timer_t *t)
{
    (void)t;
}

/* Runs the loop until cond, or fails after 20 s. */
#define UNTIL(cond)                                                                                                    \
    do {                                                                                                               \
        uint64_t deadline = now_ms() + 20000;                                                                          \
        uv_timer_t wake;                                                                                               \
        uv_timer_init(&w.loop, &wake);                                                                                 \
        uv_timer_start(&wake, on_wake, 20, 20);                                                                        \
        while (!(cond) && now_ms() < deadline)                                                                         \
            uv_run(&w.loop, UV_RUN_ONCE);                                                                              \
        uv_close((uv_handle_t *)&wake, NULL);                                                                          \
        uv_run(&w.loop, UV_RUN_NOWAIT);                                                                                \
        assert_true(cond);                                                                                             \
    } while (0)

/* Clients */

static void on_open(void *owner, const struct frame_hello *peer)
{
    struct client *c = owner;
    assert_string_equal(peer->host, "server");
    c->opened = true;
}

static void on_frame(void *owner, uint32_t stream, uint8_t type, struct buf *payload)
{
    struct client *c = owner;
    assert_true(c->got_n < GOT);
    c->got[c->got_n++] = (struct got){stream, type, buf_hold(payload)};
    if (type == FRAME_DATA || type == FRAME_HASHES)
        conn_credit(c->conn, stream, payload->len);
}

static void on_drained(void *owner, uint32_t stream)
{
    (void)owner;
    (void)stream;
}

static void on_closed(void *owner, int err, const char *why)
{
    struct client *c = owner;
    c->closed = true;
    c->err = err;
    snprintf(c->why, sizeof c->why, "%s", why);
}

static const struct conn_ops ops = {on_open, on_frame, on_drained, on_closed, NULL};

static struct client *client(const char *host)
{
    struct client *c = calloc(1, sizeof *c);
    struct frame_hello h = {.version = FRAME_VERSION};
    assert_non_null(c);
    memset(h.identity.b, host[0], sizeof h.identity.b); /* the same host: the same identity */
    snprintf(h.host, sizeof h.host, "%s", host);
    unsigned i = 0;
    while (w.clients[i])
        i++;
    assert_true(i < CLIENTS);
    w.clients[i] = c;
    c->conn = conn_dial(&w.loop, w.addr, &h, &ops, c);
    UNTIL(c->opened || c->closed);
    assert_true(c->opened);
    return c;
}

static void client_end(struct client *c)
{
    if (!c->closed)
        conn_close(c->conn, false, 0, NULL);
    UNTIL(c->closed);
    for (size_t i = 0; i < c->got_n; i++)
        buf_drop(c->got[i].payload);
    for (unsigned i = 0; i < CLIENTS; i++)
        if (w.clients[i] == c)
            w.clients[i] = NULL;
    free(c);
}

/* The next frame that has come on the stream; others are passed over. */
static struct got *next(struct client *c, uint32_t stream)
{
    for (;;) {
        UNTIL(c->got_n > c->taken || c->closed);
        assert_true(c->got_n > c->taken);
        struct got *g = &c->got[c->taken++];
        if (g->stream == stream)
            return g;
    }
}

static struct buf *expect(struct client *c, uint32_t stream, uint8_t type)
{
    struct got *g = next(c, stream);
    if (g->type == FRAME_FAILED && type != FRAME_FAILED) {
        struct frame_failed f;
        frame_failed_get(g->payload->data, g->payload->len, &f);
        print_error("FAILED %llu: code %u, %s\n", (unsigned long long)f.seq, f.code, f.text);
    }
    assert_int_equal(g->type, type);
    return g->payload;
}

static void expect_failed(struct client *c, uint32_t stream, uint64_t seq, uint16_t code)
{
    struct frame_failed f;
    struct buf *p = expect(c, stream, FRAME_FAILED);
    assert_int_equal(frame_failed_get(p->data, p->len, &f), 0);
    assert_int_equal(f.seq, seq);
    if (f.code != code)
        print_error("%s\n", f.text);
    assert_int_equal(f.code, code);
    assert_true(f.text[0]);
}

static void expect_seq(struct client *c, uint32_t stream, uint8_t type, uint64_t seq)
{
    struct buf *p = expect(c, stream, type);
    assert_int_equal(p->len, 8);
    assert_int_equal(get_u64(p->data), seq);
}

static void send_bytes(struct client *c, uint32_t stream, uint8_t type, const void *p, size_t len)
{
    struct buf *b = buf_new(len);
    memcpy(b->data, p, len);
    b->len = (uint32_t)len;
    conn_send(c->conn, stream, type, b);
}

static struct frame_attached attach(struct client *c, uint32_t handle, const char *name, bool write)
{
    uint8_t p[NAME_CAP + 16];
    struct frame_attach a = {.handle = handle, .write = write};
    struct frame_attached to;
    snprintf(a.name, sizeof a.name, "%s", name);
    send_bytes(c, 1, FRAME_ATTACH, p, frame_attach_put(p, sizeof p, &a));
    struct buf *b = expect(c, 1, FRAME_ATTACHED);
    assert_int_equal(frame_attached_get(b->data, b->len, &to), 0);
    assert_int_equal(to.handle, handle);
    return to;
}

static void begin(struct client *c, uint32_t stream, uint64_t seq)
{
    uint8_t p[8];
    put_u64(p, seq);
    send_bytes(c, stream, FRAME_BEGIN, p, 8);
}

static void end(struct client *c, uint32_t stream, uint64_t seq, uint64_t frames)
{
    uint8_t p[16];
    put_u64(p, seq);
    put_u64(p + 8, frames);
    send_bytes(c, stream, FRAME_END, p, 16);
}

static struct id lineage(int n)
{
    struct id id;
    memset(&id, n, sizeof id);
    return id;
}

static void op(struct client *c, uint32_t stream, uint8_t kind, uint32_t handle, uint32_t to, int line)
{
    uint8_t p[64];
    struct frame_op o = {.kind = kind, .handle = handle, .to = to};
    if (kind == FRAME_OP_CREATE)
        o.lineage = lineage(line);
    send_bytes(c, stream, FRAME_OP, p, frame_op_put(p, sizeof p, &o));
}

static void region(struct client *c, uint32_t stream, uint32_t handle, uint64_t epoch, uint64_t fence, uint64_t size)
{
    uint8_t p[64];
    struct frame_region r = {.handle = handle, .epoch = epoch, .base = epoch - 1, .fence = fence, .min_size = UINT64_MAX, .size = size};
    send_bytes(c, stream, FRAME_REGION, p, frame_region_put(p, sizeof p, &r));
}

static void fill(uint8_t *p, uint64_t offset, size_t len, unsigned salt)
{
    for (size_t i = 0; i < len; i += 8) {
        uint64_t v = (offset + i + salt) * 0x9e3779b97f4a7c15u;
        memcpy(p + i, &v, len - i < 8 ? len - i : 8);
    }
}

static void pages(struct client *c, uint32_t stream, uint32_t handle, uint64_t offset, uint32_t len, unsigned salt)
{
    struct frame_extent e = {.offset = offset, .len = len, .kind = FRAME_PAGES_DATA};
    struct buf *b = buf_new(64 + len);
    b->len = (uint32_t)frame_pages_put(b->data, 64, handle, &e, 1);
    fill(b->data + b->len, offset, len, salt);
    b->len += len;
    conn_send(c->conn, stream, FRAME_PAGES, b);
}

/* A region of 64 KiB, created whole in one epoch. */
static uint64_t created(struct client *c, uint32_t handle, const char *name, int line, unsigned salt)
{
    struct frame_attached a = attach(c, handle, name, true);
    assert_int_equal(a.status, FRAME_ATTACH_NONE);
    begin(c, 2, 1);
    op(c, 2, FRAME_OP_CREATE, handle, 0, line);
    region(c, 2, handle, 1, a.fence, 65536);
    pages(c, 2, handle, 0, 32768, salt);
    pages(c, 2, handle, 32768, 32768, salt);
    end(c, 2, 1, 4);
    expect_seq(c, 2, FRAME_RECEIVED, 1);
    expect_seq(c, 2, FRAME_DURABLE, 1);
    return a.fence;
}

/* Requests, on stream 9 */

static uint32_t request_no;

static void ask_name(struct client *c, uint8_t type, const char *name, int force)
{
    uint8_t p[NAME_CAP + 16];
    struct wr wr = wr_over(p, sizeof p);
    wr_u32(&wr, ++request_no);
    wr_str(&wr, name);
    if (force >= 0)
        wr_u8(&wr, (uint8_t)force);
    send_bytes(c, 9, type, p, wr_len(&wr));
}

static uint32_t pin(struct client *c, const char *name, struct frame_entry *e)
{
    uint32_t request, number;
    struct frame_entry entry;
    ask_name(c, FRAME_PIN, name, -1);
    struct buf *b = expect(c, 9, FRAME_PINNED);
    assert_int_equal(frame_pinned_get(b->data, b->len, &request, &number, e ? e : &entry), 0);
    assert_int_equal(request, request_no);
    return number;
}

static void ask_read(struct client *c, uint32_t number, uint64_t offset, uint32_t len)
{
    uint8_t p[20];
    put_u32(p, ++request_no);
    put_u32(p + 4, number);
    put_u64(p + 8, offset);
    put_u32(p + 16, len);
    send_bytes(c, 9, FRAME_READ, p, 20);
}

static void unpin(struct client *c, uint32_t number)
{
    uint8_t p[4];
    put_u32(p, number);
    send_bytes(c, 9, FRAME_UNPIN, p, 4);
}

/* [offset, offset + len) of a pin is as fill made it; salt -1: zeros. */
static void expect_read(struct client *c, uint32_t number, uint64_t offset, uint32_t len, int salt)
{
    uint8_t want[FRAME_DATA_MAX] = {0};
    if (salt >= 0)
        fill(want, offset, len, (unsigned)salt);
    ask_read(c, number, offset, len);
    struct buf *b = expect(c, 9, FRAME_DATA);
    assert_int_equal(get_u32(b->data), request_no);
    assert_int_equal(b->data[4], salt < 0);
    assert_int_equal(get_u32(b->data + 5), len);
    assert_int_equal(b->len, salt < 0 ? 9 : 9 + len);
    if (salt >= 0)
        assert_memory_equal(b->data + 9, want, len);
}

static void expect_hashes(struct client *c, uint32_t number, uint64_t first, uint32_t count, unsigned salt)
{
    uint8_t p[32], page[FRAME_PAGE];
    struct frame_hash h = {.request = ++request_no, .pin = number, .first = first, .count = count};
    send_bytes(c, 9, FRAME_HASH, p, frame_hash_put(p, sizeof p, &h));
    struct buf *b = expect(c, 9, FRAME_HASHES);
    assert_int_equal(get_u32(b->data), request_no);
    assert_int_equal(get_u32(b->data + 4), count);
    assert_int_equal(b->len, 8 + 16 * count);
    for (uint32_t i = 0; i < count; i++) {
        XXH128_canonical_t canonical;
        fill(page, (first + i) * FRAME_PAGE, FRAME_PAGE, salt);
        XXH128_canonicalFromHash(&canonical, XXH3_128bits(page, FRAME_PAGE));
        assert_memory_equal(b->data + 8 + 16 * i, &canonical, 16);
    }
}

static unsigned list(struct client *c, struct frame_entry *to, unsigned cap)
{
    uint8_t p[4];
    unsigned n = 0;
    uint32_t request;
    put_u32(p, ++request_no);
    send_bytes(c, 9, FRAME_LIST, p, 4);
    for (;;) {
        struct got *g = next(c, 9);
        if (g->type == FRAME_LIST_END)
            return n;
        assert_int_equal(g->type, FRAME_ENTRY);
        assert_true(n < cap);
        assert_int_equal(frame_entry_get(g->payload->data, g->payload->len, &request, &to[n++]), 0);
        assert_int_equal(request, request_no);
    }
}

/* The world */

static void on_stopped(void *arg)
{
    (void)arg;
    w.stopped = true;
}

static void on_store_closed(void *arg)
{
    (void)arg;
    w.store_closed = true;
}

static void on_replica_stopped(void *arg)
{
    ((struct replica *)arg)->stopped = true;
}

static void on_replica_closed(void *arg)
{
    ((struct replica *)arg)->closed = true;
}

/* Two replicas, and the hub over them. */
static int hub_up(const struct id *self, char error[STORE_ERROR])
{
    char url[512] = "hub:", addr[128], bound[128];
    for (unsigned i = 0; i < REPLICAS; i++) {
        struct replica *r = &w.replicas[i];
        struct id id = lineage(0x70 + (int)i);
        snprintf(addr, sizeof addr, "unix:%s/replica%u", w.dir, i);
        snprintf(url + strlen(url), sizeof url - strlen(url), "%s%s", i ? "," : "", addr);
        if (store_open(&r->store, &w.loop, "mem:", error) < 0)
            return -1;
        r->server = server_new(&w.loop, r->store, &id, "replica");
        if (server_listen(r->server, addr, bound, sizeof bound) < 0)
            return -1;
    }
    return hub_open(&w.store, &w.loop, url, self, "hub", error);
}

static int set_up(void **state)
{
    const char *kind = *state;
    char url[128], error[STORE_ERROR];
    struct id self = lineage(0x5e);
    memset(&w, 0, sizeof w);
    snprintf(w.dir, sizeof w.dir, "/tmp/test_server.XXXXXX");
    if (uv_loop_init(&w.loop) || !mkdtemp(w.dir))
        return -1;
    snprintf(url, sizeof url, "%s%s", kind, strcmp(kind, "mem:") ? w.dir : "");
    if ((hub_is(url) ? hub_up(&self, error) : store_open(&w.store, &w.loop, url, error)) < 0) {
        print_error("%s\n", error);
        return -1;
    }
    w.server = server_new(&w.loop, w.store, &self, "server");
    return server_listen(w.server, "127.0.0.1:0", w.addr, sizeof w.addr);
}

static int remove_one(const char *path, const struct stat *st, int type, struct FTW *ftw)
{
    (void)st;
    (void)type;
    (void)ftw;
    return remove(path);
}

static int tear_down(void **state)
{
    (void)state;
    for (unsigned i = 0; i < CLIENTS; i++)
        if (w.clients[i])
            client_end(w.clients[i]);
    if (!w.stopped)
        server_stop(w.server, on_stopped, NULL);
    UNTIL(w.stopped);
    store_close(w.store, on_store_closed, NULL);
    UNTIL(w.store_closed);
    for (unsigned i = 0; i < REPLICAS && w.replicas[i].server; i++) {
        struct replica *r = &w.replicas[i];
        server_stop(r->server, on_replica_stopped, r);
        UNTIL(r->stopped);
        store_close(r->store, on_replica_closed, r);
        UNTIL(r->closed);
    }
    uv_run(&w.loop, UV_RUN_DEFAULT);
    nftw(w.dir, remove_one, 16, FTW_DEPTH | FTW_PHYS);
    return uv_loop_close(&w.loop);
}

/* Tests */

static void epoch_commits(void **state)
{
    (void)state;
    struct client *a = client("a"), *b = client("b");
    struct frame_entry e, l[4];
    uint64_t fence = created(a, 1, "data/x", 1, 7);
    struct frame_attached seen = attach(b, 5, "data/x", false);
    assert_int_equal(seen.status, FRAME_ATTACH_EXISTS);
    assert_int_equal(seen.epoch, 1);
    assert_int_equal(seen.size, 65536);
    assert_int_equal(seen.lineage.b[0], 1);
    uint32_t p = pin(b, "data/x", &e);
    assert_int_equal(e.epoch, 1);
    expect_read(b, p, 0, 32768, 7);
    expect_read(b, p, 32768, 32768, 7);
    expect_hashes(b, p, 0, 16, 7);
    ask_read(b, p, 65000, 4096); /* short at the end */
    assert_int_equal(get_u32(expect(b, 9, FRAME_DATA)->data + 5), 536);
    assert_int_equal(list(b, l, 4), 1);
    assert_string_equal(l[0].name, "data/x");
    assert_string_equal(l[0].holder, "a");
    assert_true(l[0].leased);
    begin(a, 2, 2);
    region(a, 2, 1, 2, fence, 131072);
    end(a, 2, 2, 1);
    expect_seq(a, 2, FRAME_RECEIVED, 2);
    expect_seq(a, 2, FRAME_DURABLE, 2);
    p = pin(b, "data/x", &e);
    assert_int_equal(e.size, 131072);
    expect_read(b, p, 65536, 61440, -1);
}

/* After a failed epoch its rest is dropped (and credited: more comes than a window), and the next one that continues
 * the region is taken. */
/* A byte more in END: DURABLE is all the client hears of the epoch. Without it RECEIVED would be the next frame. */
static void quiet_end(void **state)
{
    (void)state;
    struct client *c = client("c");
    uint64_t fence = created(c, 1, "quiet", 1, 0);
    uint8_t p[17] = {0};
    begin(c, 2, 2);
    region(c, 2, 1, 2, fence, 65536);
    pages(c, 2, 1, 0, 4096, 7);
    put_u64(p, 2);
    put_u64(p + 8, 2);
    p[16] = 1;
    send_bytes(c, 2, FRAME_END, p, 17);
    expect_seq(c, 2, FRAME_DURABLE, 2);
    client_end(c);
}

static void failed_epoch_is_dropped(void **state)
{
    (void)state;
    struct client *a = client("a");
    uint64_t fence = created(a, 1, "x", 1, 7);
    begin(a, 2, 2);
    region(a, 2, 1, 3, fence, 65536);
    for (unsigned i = 0; i < 300; i++)
        pages(a, 2, 1, 0, 61440, i);
    end(a, 2, 2, 301);
    expect_failed(a, 2, 2, FRAME_E_LINEAGE);
    begin(a, 2, 3);
    region(a, 2, 1, 2, fence, 65536);
    pages(a, 2, 1, 0, 4096, 9);
    end(a, 2, 3, 2);
    expect_seq(a, 2, FRAME_RECEIVED, 3);
    expect_seq(a, 2, FRAME_DURABLE, 3);
    expect_read(a, pin(a, "x", NULL), 0, 4096, 9);
}

static void nothing_visible(struct client *c)
{
    struct frame_entry e;
    uint32_t p = pin(c, "x", &e);
    assert_int_equal(e.epoch, 1);
    expect_read(c, p, 0, 4096, 7);
    unpin(c, p);
}

static void counted_wrongly(void **state)
{
    (void)state;
    struct client *a = client("a");
    uint64_t fence = created(a, 1, "x", 1, 7);
    begin(a, 2, 2);
    region(a, 2, 1, 2, fence, 65536);
    pages(a, 2, 1, 0, 4096, 9);
    end(a, 2, 2, 3);
    expect_failed(a, 2, 2, FRAME_E_PROTOCOL);
    nothing_visible(a);
}

static void aborted(void **state)
{
    (void)state;
    uint8_t seq[8];
    struct client *a = client("a");
    uint64_t fence = created(a, 1, "x", 1, 7);
    for (uint64_t i = 2; i < 5; i++) {
        begin(a, 2, i);
        region(a, 2, 1, 2, fence, 65536);
        pages(a, 2, 1, 0, 4096, 9);
        put_u64(seq, i);
        send_bytes(a, 2, FRAME_ABORT, seq, 8);
    }
    nothing_visible(a);
}

static void cut_in_the_middle(void **state)
{
    (void)state;
    struct client *a = client("a");
    uint64_t fence = created(a, 1, "x", 1, 7);
    begin(a, 2, 2);
    region(a, 2, 1, 2, fence, 65536);
    pages(a, 2, 1, 0, 4096, 9);
    list(a, &(struct frame_entry){0}, 1); /* so much has arrived */
    begin(a, 3, 3);
    region(a, 3, 1, 2, fence, 65536);
    conn_forget(a->conn, 3);
    client_end(a);
    a = client("a");
    nothing_visible(a);
    assert_int_equal(attach(a, 1, "x", true).fence, fence); /* the same holder: the same lease */
    begin(a, 2, 2);
    region(a, 2, 1, 2, fence, 65536);
    pages(a, 2, 1, 0, 4096, 9);
    end(a, 2, 2, 2);
    expect_seq(a, 2, FRAME_RECEIVED, 2);
    expect_seq(a, 2, FRAME_DURABLE, 2);
}

static void one_writer(void **state)
{
    (void)state;
    struct client *a = client("a"), *b = client("b");
    uint8_t handle[4];
    uint64_t fence = created(a, 1, "x", 1, 7);
    struct frame_attached held = attach(b, 1, "x", true);
    assert_int_equal(held.status, FRAME_ATTACH_HELD);
    assert_non_null(strchr(held.holder, 'a'));
    put_u32(handle, 1);
    send_bytes(a, 1, FRAME_DETACH, handle, 4);
    assert_int_equal(attach(a, 1, "x", false).status, FRAME_ATTACH_EXISTS);
    struct frame_attached now = attach(b, 1, "x", true);
    assert_int_equal(now.status, FRAME_ATTACH_EXISTS);
    assert_true(now.fence > fence);
    begin(a, 2, 2);
    region(a, 2, 1, 2, fence, 65536);
    end(a, 2, 2, 1);
    expect_failed(a, 2, 2, FRAME_E_FENCED);
    begin(b, 2, 1);
    region(b, 2, 1, 2, now.fence, 65536);
    end(b, 2, 1, 1);
    expect_seq(b, 2, FRAME_RECEIVED, 1);
    expect_seq(b, 2, FRAME_DURABLE, 1);
}

static void two_handles_one_lease(void **state)
{
    (void)state;
    uint8_t handle[4];
    struct client *a = client("a"), *b = client("b");
    attach(a, 1, "x", true);
    attach(a, 2, "x", true);
    put_u32(handle, 1);
    send_bytes(a, 1, FRAME_DETACH, handle, 4);
    attach(a, 3, "y", false);
    assert_int_equal(attach(b, 1, "x", true).status, FRAME_ATTACH_HELD);
    put_u32(handle, 2);
    send_bytes(a, 1, FRAME_DETACH, handle, 4);
    attach(a, 3, "y", false);
    assert_int_equal(attach(b, 1, "x", true).status, FRAME_ATTACH_NONE);
}

static void bad_names(void **state)
{
    (void)state;
    struct client *a = client("a");
    static const char *const bad[] = {"../x", "x//y", "/x", "", ".memsync/x", "x/.", "x\ny"};
    created(a, 1, "d/x", 1, 7);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct frame_attached r = attach(a, 9, bad[i], true);
        assert_int_equal(r.status, FRAME_ATTACH_BAD);
        assert_true(r.holder[0]);
        ask_name(a, FRAME_PIN, bad[i], -1);
        expect_failed(a, 9, request_no, FRAME_E_NAME);
        ask_name(a, FRAME_REMOVE, bad[i], 1);
        expect_failed(a, 9, request_no, FRAME_E_NAME);
    }
    assert_int_equal(attach(a, 9, "d", true).status, FRAME_ATTACH_BAD);
    assert_int_equal(attach(a, 9, "d/x/y", true).status, FRAME_ATTACH_BAD);
    ask_name(a, FRAME_PIN, "nothing", -1);
    expect_failed(a, 9, request_no, FRAME_E_NOT_FOUND);
}

static void pins_keep_their_epoch(void **state)
{
    (void)state;
    struct client *a = client("a"), *b = client("b");
    uint64_t fence = created(a, 1, "x", 1, 0);
    uint32_t p = pin(b, "x", NULL);
    for (unsigned i = 1; i <= 20; i++) {
        begin(a, 2, i + 1);
        region(a, 2, 1, i + 1, fence, 65536);
        pages(a, 2, 1, 0, 32768, i);
        pages(a, 2, 1, 32768, 32768, i);
        end(a, 2, i + 1, 3);
        expect_seq(a, 2, FRAME_RECEIVED, i + 1);
        expect_seq(a, 2, FRAME_DURABLE, i + 1);
        expect_read(b, p, i * 1024, 32768, 0);
        expect_hashes(b, p, 0, 16, 0);
        uint32_t q = pin(b, "x", NULL);
        expect_read(b, q, 0, 61440, (int)i);
        unpin(b, q);
    }
    unpin(b, p);
    ask_read(b, p, 0, 100);
    expect_failed(b, 9, request_no, FRAME_E_NOT_FOUND);
}

static void ask_changed(struct client *c, uint32_t pin, uint32_t later)
{
    uint8_t p[12];
    put_u32(p, ++request_no);
    put_u32(p + 4, pin);
    put_u32(p + 8, later);
    send_bytes(c, 9, FRAME_CHANGED, p, sizeof p);
}

static void expect_extent(struct client *c, uint64_t page, uint64_t pages)
{
    struct buf *b = expect(c, 9, FRAME_EXTENTS);
    struct frame_extents e;
    uint64_t from = 0, to = 0;
    assert_int_equal(frame_extents_get(b->data, b->len, &e), 0);
    assert_int_equal(e.request, request_no);
    assert_false(e.all);
    assert_int_equal(e.count, pages != 0);
    if (pages)
        frame_extent(&e, 0, &from, &to);
    assert_true(!pages || (from == page && to == page + pages));
}

static void changes_between_pins(void **state)
{
    (void)state;
    struct client *a = client("a"), *b = client("b");
    uint64_t fence = created(a, 1, "x", 1, 0);
    uint32_t one = pin(b, "x", NULL);
    begin(a, 2, 2);
    region(a, 2, 1, 2, fence, 65536);
    pages(a, 2, 1, 8192, 12288, 5);
    end(a, 2, 2, 2);
    expect_seq(a, 2, FRAME_RECEIVED, 2);
    expect_seq(a, 2, FRAME_DURABLE, 2);
    uint32_t two = pin(b, "x", NULL);
    ask_changed(b, one, two);
    expect_extent(b, 2, 3);
    ask_changed(b, two, two);
    expect_extent(b, 0, 0);
    ask_changed(b, two, one);
    expect_failed(b, 9, request_no, FRAME_E_LINEAGE);
    ask_changed(b, one, 77);
    expect_failed(b, 9, request_no, FRAME_E_NOT_FOUND);
    created(a, 3, "y", 3, 0);
    ask_changed(b, one, pin(b, "y", NULL));
    expect_failed(b, 9, request_no, FRAME_E_LINEAGE);
}

/* A hub cannot tell: anything may have changed. */
static void a_hub_tells_no_changes(void **state)
{
    (void)state;
    struct client *a = client("a");
    struct frame_extents e;
    created(a, 1, "x", 1, 0);
    uint32_t one = pin(a, "x", NULL);
    ask_changed(a, one, pin(a, "x", NULL));
    struct buf *b = expect(a, 9, FRAME_EXTENTS);
    assert_int_equal(frame_extents_get(b->data, b->len, &e), 0);
    assert_true(e.all && !e.count);
}

/* One READ of much: DATA in order, zeros as one frame however many, the last one said to be. */
static void long_reads(void **state)
{
    (void)state;
    struct client *a = client("a");
    uint64_t fence = created(a, 1, "x", 1, 7);
    const uint64_t size = 900000, hole = 65536;
    begin(a, 2, 2);
    region(a, 2, 1, 2, fence, size);
    pages(a, 2, 1, 800000, 50000, 3);
    end(a, 2, 2, 2);
    expect_seq(a, 2, FRAME_RECEIVED, 2);
    expect_seq(a, 2, FRAME_DURABLE, 2);
    uint8_t *got = malloc(size), *want = calloc(1, size), p[32];
    fill(want, 0, (size_t)hole, 7);
    fill(want + 800000, 800000, 50000, 3);
    struct frame_read r = {.request = ++request_no, .pin = pin(a, "x", NULL), .len = FRAME_READ_MAX, .bulk = FRAME_READ_BULK};
    r.request = ++request_no;
    send_bytes(a, 9, FRAME_READ, p, frame_read_put(p, sizeof p, &r));
    struct frame_data d = {.kind = FRAME_DATA_MORE};
    size_t at = 0, frames = 0;
    for (; d.kind & FRAME_DATA_MORE; at += d.len, frames++) {
        struct buf *b = expect(a, 9, FRAME_DATA);
        assert_int_equal(frame_data_get(b->data, b->len, &d), 0);
        assert_true(d.request == r.request && d.len <= size - at);
        d.data ? memcpy(got + at, d.data, d.len) : memset(got + at, 0, d.len);
    }
    assert_int_equal(at, size);
    assert_memory_equal(got, want, size);
    assert_true(frames < 8); /* the hole of 12 frames' length is one */
    r = (struct frame_read){.request = ++request_no, .pin = r.pin, .offset = size, .len = 1, .bulk = FRAME_READ_DEMAND};
    send_bytes(a, 9, FRAME_READ, p, frame_read_put(p, sizeof p, &r));
    struct buf *b = expect(a, 9, FRAME_DATA);
    assert_true(!frame_data_get(b->data, b->len, &d) && !d.kind && !d.len);
    ask_read(a, r.pin, 0, FRAME_READ_MAX + 1);
    expect_failed(a, 9, request_no, FRAME_E_PROTOCOL);
    free(got);
    free(want);
}

static void ask_pin(struct client *c, const char *name, uint64_t epoch, int line, uint32_t head)
{
    static uint8_t bytes[NAME_CAP + 64];
    static struct frame_pin p;
    p = (struct frame_pin){.request = ++request_no, .keep = 1, .epoch = epoch, .head = head};
    if (epoch)
        p.lineage = lineage(line);
    snprintf(p.name, sizeof p.name, "%s", name);
    send_bytes(c, 9, FRAME_PIN, bytes, frame_pin_put(bytes, sizeof bytes, &p));
}

static uint32_t pinned_at(struct client *c, uint64_t epoch)
{
    struct frame_entry e;
    uint32_t request, number;
    struct buf *b = expect(c, 9, FRAME_PINNED);
    assert_int_equal(frame_pinned_get(b->data, b->len, &request, &number, &e), 0);
    assert_true(request == request_no && e.epoch == epoch);
    return number;
}

/* The beginning comes with the pin. */
static void pins_with_head(void **state)
{
    (void)state;
    struct client *a = client("a");
    uint64_t fence = created(a, 1, "x", 1, 7);
    uint8_t want[4096];
    ask_pin(a, "x", 0, 1, sizeof want);
    pinned_at(a, 1);
    struct frame_data d;
    struct buf *b = expect(a, 9, FRAME_DATA);
    fill(want, 0, sizeof want, 7);
    assert_true(!frame_data_get(b->data, b->len, &d) && d.request == request_no && d.len == sizeof want && !d.kind);
    assert_memory_equal(d.data, want, sizeof want);
    begin(a, 2, 2);
    region(a, 2, 1, 2, fence, 0);
    end(a, 2, 2, 1);
    expect_seq(a, 2, FRAME_RECEIVED, 2);
    expect_seq(a, 2, FRAME_DURABLE, 2);
    ask_pin(a, "x", 0, 1, 1);
    pinned_at(a, 2); /* nothing comes of an empty region */
    ask_pin(a, "y", 0, 1, 1);
    expect_failed(a, 9, request_no, FRAME_E_NOT_FOUND);
}

static void epoch_of(struct client *c, uint64_t epoch, uint64_t fence, unsigned what)
{
    begin(c, 2, epoch);
    region(c, 2, 1, epoch, fence, 65536);
    pages(c, 2, 1, 0, 32768, what);
    end(c, 2, epoch, 2);
    expect_seq(c, 2, FRAME_RECEIVED, epoch);
    expect_seq(c, 2, FRAME_DURABLE, epoch);
}

static void ask_live(struct client *c, uint64_t epoch)
{
    static uint8_t bytes[NAME_CAP + 64];
    struct frame_pin p = {.request = ++request_no, .keep = 1, .live = 1, .epoch = epoch, .name = "x"};
    if (epoch)
        p.lineage = lineage(1);
    send_bytes(c, 9, FRAME_PIN, bytes, frame_pin_put(bytes, sizeof bytes, &p));
}

/* A live pin is its own writer's, whatever epoch that has come to, and ends with another's. */
static void live_pins(void **state)
{
    (void)state;
    struct client *a = client("a"), *b = client("b");
    uint64_t fence = created(a, 1, "x", 1, 7);
    ask_live(b, 1);
    uint32_t theirs = pinned_at(b, 1);
    ask_live(a, 0);
    uint32_t own = pinned_at(a, 1);
    expect_read(b, theirs, 0, 4096, 7);
    epoch_of(a, 2, fence, 8);
    expect_read(a, own, 0, 32768, 8);
    expect_read(a, own, 1 << 20, 100, -1);
    ask_read(b, theirs, 0, 4096);
    expect_failed(b, 9, request_no, FRAME_E_LIMIT);
    ask_live(a, 1);
    pinned_at(a, 2);
    ask_live(b, 1);
    expect_failed(b, 9, request_no, FRAME_E_LIMIT);
    ask_live(b, 2);
    pinned_at(b, 2);
}

static void no_live_pins_of_a_hub(void **state)
{
    (void)state;
    struct client *a = client("a");
    created(a, 1, "x", 1, 7);
    ask_live(a, 0);
    expect_failed(a, 9, request_no, FRAME_E_IO);
}

/* What was pinned over a connection that is lost is had again by its epoch, by nobody else, and also while the old one is not known to be lost. */
static void pins_outlive_their_connection(void **state)
{
    (void)state;
    struct client *a = client("a"), *b = client("b"), *writer = client("w");
    uint64_t fence = created(writer, 1, "x", 1, 7);
    ask_pin(a, "x", 0, 1, 0);
    uint32_t first = pinned_at(a, 1);
    begin(writer, 2, 2);
    region(writer, 2, 1, 2, fence, 65536);
    pages(writer, 2, 1, 0, 32768, 9);
    end(writer, 2, 2, 2);
    expect_seq(writer, 2, FRAME_RECEIVED, 2);
    expect_seq(writer, 2, FRAME_DURABLE, 2);

    ask_pin(b, "x", 1, 1, 0); /* another identity */
    expect_failed(b, 9, request_no, FRAME_E_LIMIT);
    struct client *again = client("a");
    ask_pin(again, "x", 1, 2, 0); /* another lineage */
    expect_failed(again, 9, request_no, FRAME_E_LIMIT);
    ask_pin(again, "x", 1, 1, 0);
    expect_read(again, pinned_at(again, 1), 0, 4096, 7);
    expect_read(a, first, 4096, 4096, 7);
    client_end(a);
    client_end(again);
    a = client("a");
    ask_pin(a, "x", 1, 1, 0);
    first = pinned_at(a, 1);
    expect_read(a, first, 0, 4096, 7);
    unpin(a, first); /* given back: gone for good */
    ask_pin(a, "x", 1, 1, 0);
    expect_failed(a, 9, request_no, FRAME_E_LIMIT);
    ask_pin(a, "x", 2, 1, 0); /* the newest may be named */
    expect_read(a, pinned_at(a, 2), 0, 4096, 9);
}

static void pins_are_bounded(void **state)
{
    (void)state;
    struct client *a = client("a");
    created(a, 1, "x", 1, 7);
    uint32_t last = 0;
    for (unsigned i = 0; i < 1024; i++)
        last = pin(a, "x", NULL);
    ask_name(a, FRAME_PIN, "x", -1);
    expect_failed(a, 9, request_no, FRAME_E_LIMIT);
    ask_read(a, last, 0, 1000);
    unpin(a, last); /* while a read of it may run */
    expect(a, 9, FRAME_DATA);
    pin(a, "x", NULL);
}

static void handles_are_bounded(void **state)
{
    (void)state;
    struct client *a = client("a");
    uint8_t p[NAME_CAP + 16];
    struct frame_attach at = {.name = "x"};
    for (uint32_t i = 0; i <= 65536; i++) {
        at.handle = i;
        send_bytes(a, 1, FRAME_ATTACH, p, frame_attach_put(p, sizeof p, &at));
    }
    UNTIL(a->got_n == 65537);
    struct frame_attached r;
    assert_int_equal(frame_attached_get(a->got[65535].payload->data, a->got[65535].payload->len, &r), 0);
    assert_int_equal(r.status, FRAME_ATTACH_NONE);
    assert_int_equal(frame_attached_get(a->got[65536].payload->data, a->got[65536].payload->len, &r), 0);
    assert_int_equal(r.status, FRAME_ATTACH_BAD);
}

static void removes(void **state)
{
    (void)state;
    struct client *a = client("a"), *b = client("b");
    struct frame_entry l[2];
    created(a, 1, "x", 1, 7);
    ask_name(b, FRAME_REMOVE, "x", 0);
    expect_failed(b, 9, request_no, FRAME_E_FENCED);
    assert_int_equal(list(b, l, 2), 1);
    ask_name(b, FRAME_REMOVE, "x", 1);
    assert_int_equal(get_u32(expect(b, 9, FRAME_OK)->data), request_no);
    assert_int_equal(list(b, l, 2), 0);
    ask_name(b, FRAME_REMOVE, "x", 1);
    expect_failed(b, 9, request_no, FRAME_E_NOT_FOUND);
}

static void renames(void **state)
{
    (void)state;
    struct client *a = client("a");
    struct frame_entry l[4];
    uint64_t fence = created(a, 1, "new", 1, 7);
    struct frame_attached to = attach(a, 2, "file", true);
    begin(a, 2, 2);
    op(a, 2, FRAME_OP_RENAME, 1, 2, 0);
    region(a, 2, 1, 2, to.fence, 65536);
    end(a, 2, 2, 2);
    begin(a, 2, 3); /* not waiting for the answer */
    region(a, 2, 1, 3, to.fence, 65536);
    pages(a, 2, 1, 0, 4096, 9);
    end(a, 2, 3, 2);
    expect_seq(a, 2, FRAME_RECEIVED, 2);
    expect_seq(a, 2, FRAME_RECEIVED, 3);
    expect_seq(a, 2, FRAME_DURABLE, 2);
    expect_seq(a, 2, FRAME_DURABLE, 3);
    assert_int_equal(list(a, l, 4), 1);
    assert_string_equal(l[0].name, "file");
    assert_int_equal(l[0].epoch, 3);
    assert_int_equal(l[0].lineage.b[0], 1);
    expect_read(a, pin(a, "file", NULL), 0, 4096, 9);
    /* a rename that fails leaves the handle where it was */
    attach(a, 3, "third", true);
    begin(a, 2, 4);
    op(a, 2, FRAME_OP_RENAME, 1, 3, 0);
    region(a, 2, 1, 9, to.fence, 65536);
    end(a, 2, 4, 2);
    expect_failed(a, 2, 4, FRAME_E_LINEAGE);
    begin(a, 2, 5);
    region(a, 2, 1, 4, to.fence, 65536);
    end(a, 2, 5, 1);
    expect_seq(a, 2, FRAME_RECEIVED, 5);
    expect_seq(a, 2, FRAME_DURABLE, 5);
    (void)fence;
}

/* Larger than every buffer on the way: windows carry it, the store spills it. */
static void bulk(void **state)
{
    (void)state;
    const unsigned frames = 1600;
    struct client *a = client("a");
    struct frame_attached at = attach(a, 1, "big", true);
    conn_set_priority(a->conn, 2, CONN_BULK);
    begin(a, 2, 1);
    op(a, 2, FRAME_OP_CREATE, 1, 0, 1);
    region(a, 2, 1, 1, at.fence, (uint64_t)frames * 61440);
    for (unsigned i = 0; i < frames; i++) {
        pages(a, 2, 1, (uint64_t)i * 61440, 61440, 3);
        UNTIL(conn_queued(a->conn, 2) < CONN_LOW);
    }
    for (unsigned i = 0; i < 20; i++) /* a later round */
        pages(a, 2, 1, (uint64_t)i * 61440 * 80, 61440, 4);
    region(a, 2, 1, 1, at.fence, (uint64_t)frames * 61440);
    end(a, 2, 1, frames + 23);
    expect_seq(a, 2, FRAME_RECEIVED, 1);
    expect_seq(a, 2, FRAME_DURABLE, 1);
    assert_int_equal(conn_sockets(a->conn), 2);
    uint32_t p = pin(a, "big", NULL);
    for (unsigned i = 0; i < frames; i += 40)
        expect_hashes(a, p, (uint64_t)i * 15, 15, i % 80 ? 3 : 4);
    expect_hashes(a, p, (uint64_t)(frames - 1) * 15, 15, 3);
}

static void stop_finishes(void **state)
{
    (void)state;
    struct client *a = client("a"), *b = client("b");
    uint64_t fence = created(a, 1, "x", 1, 7);
    begin(b, 2, 1); /* never ends */
    for (uint64_t i = 2; i < 10; i++) {
        begin(a, 2, i);
        region(a, 2, 1, i, fence, 65536);
        pages(a, 2, 1, 0, 4096, 9);
        end(a, 2, i, 2);
        expect_seq(a, 2, FRAME_RECEIVED, i);
        if (i < 9)
            expect_seq(a, 2, FRAME_DURABLE, i);
    }
    server_stop(w.server, on_stopped, NULL);
    UNTIL(w.stopped && a->closed && b->closed);
    expect_seq(a, 2, FRAME_DURABLE, 9);
    assert_int_equal(a->err, 0);
    assert_int_equal(b->err, 0);
}

/* Hostile peers */

static int raw_dial(void)
{
    struct sockaddr_in sa = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    sa.sin_port = htons((uint16_t)atoi(strrchr(w.addr, ':') + 1));
    int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    assert_int_equal(connect(fd, (struct sockaddr *)&sa, sizeof sa), 0);
    fcntl(fd, F_SETFL, O_NONBLOCK);
    return fd;
}

static void raw_write(int fd, const void *p, size_t len)
{
    const uint8_t *at = p;
    for (uint64_t deadline = now_ms() + 10000; len && now_ms() < deadline;) {
        ssize_t n = send(fd, at, len, MSG_NOSIGNAL);
        if (n < 0 && errno != EAGAIN)
            return; /* hung up on, as it should be */
        if (n > 0) {
            at += n;
            len -= (size_t)n;
        }
        uv_run(&w.loop, UV_RUN_NOWAIT);
    }
}

static void raw_frame(int fd, uint8_t type, uint32_t stream, const void *payload, size_t len)
{
    uint8_t f[FRAME_HEADER + FRAME_PAYLOAD_MAX];
    frame_header_put(f, type, stream, 0, (uint32_t)len, frame_payload_hash(payload, len));
    memcpy(f + FRAME_HEADER, payload, len);
    raw_write(fd, f, FRAME_HEADER + len);
}

static void raw_hello(int fd)
{
    uint8_t p[512];
    struct frame_hello h = {.version = FRAME_VERSION, .identity = lineage(0x66), .host = "raw\n\x1b[31m"};
    raw_frame(fd, FRAME_HELLO, 0, p, frame_hello_put(p, sizeof p, &h));
}

static void raw_end(int fd, unsigned peers)
{
    close(fd);
    UNTIL(server_peers(w.server) == peers);
}

static void garbage_harms_nobody(void **state)
{
    (void)state;
    struct client *a = client("a");
    uint8_t junk[4096];
    created(a, 1, "x", 1, 7);
    srand(1);
    for (unsigned round = 0; round < 20; round++) {
        int fd = raw_dial();
        if (round % 2)
            raw_hello(fd);
        for (size_t i = 0; i < sizeof junk; i++)
            junk[i] = (uint8_t)rand();
        raw_write(fd, junk, sizeof junk);
        raw_end(fd, 1);
    }
    nothing_visible(a);
}

/* Well-formed frames of every type with every kind of payload, in no order. */
static void nonsense_harms_nobody(void **state)
{
    (void)state;
    struct client *a = client("a");
    uint8_t p[300];
    created(a, 1, "x", 1, 7);
    srand(2);
    for (unsigned round = 0; round < 300; round++) {
        int fd = raw_dial();
        raw_hello(fd);
        for (unsigned i = 0; i < 30; i++) {
            size_t len = (size_t)rand() % sizeof p;
            for (size_t k = 0; k < len; k++)
                p[k] = rand() % 3 ? 0 : (uint8_t)rand();
            static const uint8_t order[] = {FRAME_BEGIN, FRAME_ATTACH, FRAME_REGION,
                                            FRAME_PAGES, FRAME_END,    FRAME_ABORT};
            uint8_t type = (uint8_t)(round % 2 ? order[i % sizeof order] : 1 + rand() % (FRAME_TYPES - 1));
            if (type == FRAME_BEGIN || type == FRAME_ABORT)
                len = 8;
            if (type == FRAME_REMOVE)
                continue; /* it might guess the name */
            raw_frame(fd, type, rand() % 20 ? 1 + (uint32_t)rand() % 2 : 0, p, len);
        }
        raw_end(fd, 1);
    }
    nothing_visible(a);
}

static void order_is_kept(void **state)
{
    (void)state;
    static const struct {
        uint8_t first, second;
    } bad[] = {
        {FRAME_END, 0},          {FRAME_PAGES, 0},   {FRAME_OP, 0},       {FRAME_REGION, 0},
        {FRAME_ABORT, 0},        {FRAME_DURABLE, 0}, {FRAME_ATTACHED, 0}, {FRAME_BEGIN, FRAME_BEGIN},
        {FRAME_BEGIN, FRAME_OK}, {FRAME_READ, 0},    {FRAME_HASH, 0},     {FRAME_DETACH, 0},
    };
    uint8_t p[8] = {0};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct client *c = client("c");
        send_bytes(c, 4, bad[i].first, p, bad[i].first == FRAME_DETACH ? 3 : 8);
        if (bad[i].second)
            send_bytes(c, 4, bad[i].second, p, 8);
        UNTIL(c->closed);
        assert_int_equal(c->err, -EPROTO);
        client_end(c);
    }
}

static void malformed_fails_the_epoch(void **state)
{
    (void)state;
    struct client *a = client("a");
    uint64_t fence = created(a, 1, "x", 1, 7);
    static const uint8_t types[] = {FRAME_OP, FRAME_REGION, FRAME_PAGES};
    for (uint64_t i = 0; i < 3; i++) {
        begin(a, 2, i + 2);
        send_bytes(a, 2, types[i], "\0\0\0", 3);
        end(a, 2, i + 2, 1);
        expect_failed(a, 2, i + 2, FRAME_E_PROTOCOL);
    }
    begin(a, 2, 9);
    region(a, 2, 77, 2, fence, 65536);
    expect_failed(a, 2, 9, FRAME_E_NOT_FOUND);
    end(a, 2, 9, 1);
    nothing_visible(a);
}

/* A PAGES payload of `len` bytes that pack well, packed: `claimed` is the length it gives itself. */
static void send_packed(struct client *c, uint32_t stream, uint32_t handle, uint64_t offset, uint32_t len, uint32_t claimed, uint32_t more)
{
    static uint8_t payload[FRAME_PAYLOAD_MAX];
    struct frame_extent e = {.offset = offset, .len = len, .kind = FRAME_PAGES_DATA};
    struct packer *packer = packer_new();
    struct pack_sense sense = {0};
    uint32_t head = (uint32_t)frame_pages_put(payload, 64, handle, &e, 1), packed = 0;
    memset(payload + head, 'm', len);
    const uint8_t *p = pack(packer, &sense, payload, head + len, head, &packed);
    assert_non_null(p);
    struct buf *b = buf_new(packed + more);
    memcpy(b->data, p, packed);
    memset(b->data + packed, 0, more);
    put_u32(b->data, claimed ? claimed : head + len);
    b->len = packed + more;
    conn_send(c->conn, stream, FRAME_PACKED, b);
    packer_free(packer);
}

/* 300 frames, which unpack to 18 MB: the window, which counts what they unpack to, has to be given back several times. */
static void packed_pages(void **state)
{
    (void)state;
    struct client *a = client("a");
    uint64_t fence = created(a, 1, "x", 1, 7);
    uint8_t expected[4096];
    begin(a, 2, 2);
    region(a, 2, 1, 2, fence, 300 * 61440);
    for (uint64_t i = 0; i < 300; i++)
        send_packed(a, 2, 1, i * 61440, 61440, 0, 0);
    end(a, 2, 2, 301);
    expect_seq(a, 2, FRAME_RECEIVED, 2);
    expect_seq(a, 2, FRAME_DURABLE, 2);
    struct frame_entry e;
    uint32_t p = pin(a, "x", &e);
    assert_int_equal(e.size, 300 * 61440);
    memset(expected, 'm', sizeof expected);
    ask_read(a, p, 299 * 61440 + 4096, 4096);
    struct buf *b = expect(a, 9, FRAME_DATA);
    assert_int_equal(b->len, 9 + 4096);
    assert_memory_equal(b->data + 9, expected, 4096);
}

static void bad_packing_ends_the_connection(void **state)
{
    (void)state;
    static const uint32_t bad[][2] = {{1, 0}, {8192, 0}, {8000, 0}, {FRAME_PAYLOAD_MAX, 0}, {FRAME_PAYLOAD_MAX + 1, 0}, {UINT32_MAX, 0}, {0, 1}, {0, 30}};
    struct client *a = client("a");
    created(a, 1, "x", 1, 7);
    client_end(a);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        struct client *c = client("a");
        uint64_t fence = attach(c, 1, "x", true).fence;
        begin(c, 2, 2);
        region(c, 2, 1, 2, fence, 65536);
        send_packed(c, 2, 1, 0, 8192, bad[i][0], bad[i][1]);
        UNTIL(c->closed);
        assert_int_equal(c->err, -EPROTO);
        client_end(c);
    }
    nothing_visible(client("a"));
}

static void unix_listener(void **state)
{
    (void)state;
    char addr[128], bound[128], path[100];
    struct stat st;
    snprintf(path, sizeof path, "%s/sock", w.dir);
    snprintf(addr, sizeof addr, "unix:%s", path);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0); /* one that nobody listens on any more */
    struct sockaddr_un sa = {.sun_family = AF_UNIX};
    memcpy(sa.sun_path, path, strlen(path) + 1);
    assert_int_equal(bind(fd, (struct sockaddr *)&sa, sizeof sa), 0);
    close(fd);
    assert_int_equal(server_listen(w.server, addr, bound, sizeof bound), 0);
    assert_string_equal(bound, addr);
    assert_int_equal(stat(path, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0600);
    assert_int_equal(server_listen(w.server, addr, bound, sizeof bound), -EADDRINUSE);
    assert_int_equal(server_listen(w.server, "unix:/nonexistent/x", bound, sizeof bound), -ENOENT);
    assert_int_equal(server_listen(w.server, "nonsense", bound, sizeof bound), -EINVAL);
    assert_int_equal(server_listen(w.server, w.addr, bound, sizeof bound), -EADDRINUSE);
    snprintf(w.addr, sizeof w.addr, "%s", addr);
    created(client("a"), 1, "x", 1, 7);
    /* beyond what fits a socket address */
    char deep[200], name[300];
    snprintf(deep, sizeof deep, "%s/%0100d", w.dir, 1);
    assert_int_equal(mkdir(deep, 0700), 0);
    snprintf(name, sizeof name, "unix:%s/wire.sock", deep);
    assert_int_equal(server_listen(w.server, name, bound, sizeof bound), 0);
    struct client *c = calloc(1, sizeof *c);
    struct frame_hello h = {.version = FRAME_VERSION, .identity = lineage(3), .host = "c"};
    c->conn = conn_dial(&w.loop, name, &h, &ops, c);
    UNTIL(c->opened);
    client_end(c);
}

#define ON(test, kind)                                                                                                 \
    {                                                                                                                  \
#test " " kind, test, set_up, tear_down, (void *)kind                                                          \
    }
#define ALL(test) ON(test, "mem:"), ON(test, "file:"), ON(test, "hub:")

int main(void)
{
    const struct CMUnitTest tests[] = {
        ALL(epoch_commits),
        ALL(quiet_end),
        ALL(failed_epoch_is_dropped),
        ALL(counted_wrongly),
        ALL(aborted),
        ALL(cut_in_the_middle),
        ALL(one_writer),
        ALL(two_handles_one_lease),
        ALL(bad_names),
        ALL(pins_keep_their_epoch),
        ALL(long_reads),
        ALL(pins_with_head),
        ON(changes_between_pins, "mem:"), ON(changes_between_pins, "file:"), ON(a_hub_tells_no_changes, "hub:"),
        ON(live_pins, "mem:"), ON(live_pins, "file:"), ON(no_live_pins_of_a_hub, "hub:"),
        ALL(pins_outlive_their_connection),
        ALL(pins_are_bounded),
        ON(handles_are_bounded, "mem:"),
        ALL(removes),
        ALL(renames),
        ALL(bulk),
        ALL(stop_finishes),
        ALL(garbage_harms_nobody),
        ALL(nonsense_harms_nobody),
        ALL(order_is_kept),
        ALL(malformed_fails_the_epoch),
        ALL(packed_pages),
        ALL(bad_packing_ends_the_connection),
        ON(unix_listener, "mem:"),
    };
    signal(SIGPIPE, SIG_IGN);
    setenv("MEMSYNC_LOG", "off", 0); /* bad peers are its subject: what it says of them is for looking into failures */
    log_setup("test_server");
    return cmocka_run_group_tests(tests, NULL, NULL);
}
