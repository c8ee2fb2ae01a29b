/* A connected socket given to the server of block devices: with the handshake, and without, as a kernel's device does.
 */
#include "agent/nbd/nbd.h"
#include "wire/nbd.h"

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#include <cmocka.h>

#define SIZE (1u << 20)

static struct world {
    uv_loop_t loop;
    struct store *store;
    struct nbd *nbd;
    struct id identity;
    bool durable, stopped, closed;
    int told, err;
    uint64_t size;
    uint16_t flags;
    int fd; /* our end */
} w;

static uint64_t now_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

#define UNTIL(cond)                                                                                                    \
    do {                                                                                                               \
        for (uint64_t end = now_ms() + 20000; !(cond) && now_ms() < end;)                                              \
            uv_run(&w.loop, UV_RUN_NOWAIT);                                                                            \
        assert_true(cond);                                                                                             \
    } while (0)

static const char *name_of(void *arg, uint32_t handle)
{
    (void)arg;
    return handle == 1 ? "disk" : NULL;
}

static void on_spilled(void *arg, size_t bytes)
{
    (void)arg;
    (void)bytes;
}

static void on_durable(void *arg, int err, const char *text)
{
    (void)arg;
    (void)text;
    assert_int_equal(err, 0);
    w.durable = true;
}

static void on_attached(void *arg, int err, const struct frame_attached *to)
{
    (void)arg;
    (void)err;
    (void)to;
    fail();
}

static void add(struct store_txn *t, uint8_t type, const void *bytes, size_t len)
{
    char error[STORE_ERROR];
    struct buf *b = buf_new(len);
    memcpy(b->data, bytes, len);
    b->len = (uint32_t)len;
    assert_int_equal(store_txn_add(t, type, b, error), 0);
    buf_drop(b);
}

static int world_begin(void **state)
{
    (void)state;
    char error[STORE_ERROR];
    uint8_t frame[64];
    memset(&w, 0, sizeof w);
    memset(w.identity.b, 7, sizeof w.identity.b);
    uv_loop_init(&w.loop);
    assert_int_equal(store_open(&w.store, &w.loop, "mem:", error), 0);
    struct frame_attached to = {0};
    struct store_attach ask = {.name = "disk", .host = "here", .identity = &w.identity, .write = true};
    assert_int_equal(store_attach(w.store, &ask, &to, on_attached, NULL), 0);
    struct store_txn *t =
        store_txn_new(w.store, &w.identity, (struct store_names){.name_of = name_of, .arg = &w}, on_spilled, NULL);
    struct frame_op o = {.kind = FRAME_OP_CREATE, .handle = 1, .lineage = w.identity};
    add(t, FRAME_OP, frame, frame_op_put(frame, sizeof frame, &o));
    struct frame_region g = {.handle = 1, .epoch = 1, .fence = to.fence, .min_size = UINT64_MAX, .size = SIZE};
    add(t, FRAME_REGION, frame, frame_region_put(frame, sizeof frame, &g));
    store_txn_commit(t, on_durable, NULL);
    UNTIL(w.durable);
    store_lease_drop(w.store, "disk", &w.identity);
    w.nbd = nbd_new(&w.loop, w.store, &w.identity, "here");
    w.fd = -1;
    return 0;
}

static void on_stopped(void *arg)
{
    *(bool *)arg = true;
}

static int world_end(void **state)
{
    (void)state;
    if (w.fd >= 0)
        close(w.fd);
    nbd_stop(w.nbd, on_stopped, &w.stopped);
    UNTIL(w.stopped);
    store_close(w.store, on_stopped, &w.closed);
    UNTIL(w.closed);
    while (uv_run(&w.loop, UV_RUN_NOWAIT))
        ;
    return uv_loop_close(&w.loop);
}

static void on_served(void *arg, int err, const char *text, uint64_t size, uint16_t flags)
{
    (void)arg;
    assert_true(!err == !text);
    w.told++;
    w.err = err;
    w.size = size;
    w.flags = flags;
}

static void serve(const char *name)
{
    int pair[2];
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
    w.fd = pair[0];
    assert_int_equal(nbd_serve(w.nbd, pair[1], name, "/dev/nbd0", on_served, NULL), 0);
    assert_int_equal(w.told, 0);
}

/* The next bytes of the server; fewer at its end. */
static size_t take(void *to, size_t len)
{
    size_t have = 0;
    ssize_t n = 1;
    for (uint64_t end = now_ms() + 20000; have < len && n && now_ms() < end;) {
        uv_run(&w.loop, UV_RUN_NOWAIT);
        n = recv(w.fd, (char *)to + have, len - have, MSG_DONTWAIT);
        if (n > 0)
            have += (size_t)n;
    }
    return have;
}

static void request(uint16_t command, uint64_t cookie, uint64_t offset, uint32_t len)
{
    uint8_t head[NBD_REQUEST];
    put_u32(head, 0x25609513);
    put_u16(head + 4, 0);
    put_u16(head + 6, command);
    put_u64(head + 8, cookie);
    put_u64(head + 16, offset);
    put_u32(head + 24, len);
    assert_int_equal(send(w.fd, head, sizeof head, 0), sizeof head);
}

static void answered(uint64_t cookie)
{
    uint8_t head[NBD_SIMPLE];
    assert_int_equal(take(head, sizeof head), sizeof head);
    assert_int_equal(get_u32(head), 0x67446698);
    assert_int_equal(get_u32(head + 4), 0);
    assert_int_equal(get_u64(head + 8), cookie);
}

static void device(void **state)
{
    (void)state;
    uint8_t page[4096], back[4096];
    serve("disk");
    request(NBD_CMD_READ, 1, 0, sizeof back); /* nothing is read before size and flags were told */
    UNTIL(w.told);
    assert_int_equal(w.err, 0);
    assert_int_equal(w.size, SIZE);
    assert_int_equal(w.flags & (NBD_FLAG_HAS_FLAGS | NBD_FLAG_FLUSH | NBD_FLAG_READ_ONLY | NBD_FLAG_DF),
                     NBD_FLAG_HAS_FLAGS | NBD_FLAG_FLUSH);
    answered(1);
    assert_int_equal(take(back, sizeof back), sizeof back);
    memset(page, 0x5a, sizeof page);
    request(NBD_CMD_WRITE, 2, SIZE - sizeof page, sizeof page);
    assert_int_equal(send(w.fd, page, sizeof page, 0), sizeof page);
    answered(2);
    request(NBD_CMD_FLUSH, 3, 0, 0);
    answered(3);
    request(NBD_CMD_READ, 4, SIZE - sizeof page, sizeof page);
    answered(4);
    assert_int_equal(take(back, sizeof back), sizeof back);
    assert_memory_equal(page, back, sizeof page);
    request(NBD_CMD_DISC, 5, 0, 0);
    assert_int_equal(take(back, 1), 0);
    assert_int_equal(w.told, 1);
}

static void unknown(void **state)
{
    (void)state;
    uint8_t byte;
    serve("none");
    UNTIL(w.told);
    assert_int_equal(w.err, -ENOENT);
    assert_int_equal(take(&byte, 1), 0);
    assert_int_equal(w.told, 1);
}

static void stopped(void **state)
{
    (void)state;
    serve("disk");
    nbd_stop(w.nbd, on_stopped, &w.stopped);
    UNTIL(w.stopped);
    assert_int_equal(w.told, 1);
    assert_int_equal(w.err, -ESHUTDOWN);
    w.stopped = false;
    w.nbd = nbd_new(&w.loop, w.store, &w.identity, "here"); /* for the end */
}

static void handshake(void **state)
{
    (void)state;
    uint8_t greeting[NBD_GREETING];
    serve(NULL);
    assert_int_equal(take(greeting, sizeof greeting), sizeof greeting);
    assert_memory_equal(greeting, "NBDMAGICIHAVEOPT", 16);
    assert_int_equal(w.told, 0);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(device, world_begin, world_end),
        cmocka_unit_test_setup_teardown(unknown, world_begin, world_end),
        cmocka_unit_test_setup_teardown(stopped, world_begin, world_end),
        cmocka_unit_test_setup_teardown(handshake, world_begin, world_end),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
