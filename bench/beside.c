/* How long demand reads and small sync points take beside bulk, on one connection.
 *
 *   beside HOST:PORT SECONDS [one]
 *
 * One connection to an agent, as a local agent has it: bulk epochs on one stream (CONN_BULK), READs of 4 KiB from a
 * pinned region on another (CONN_URGENT), epochs of one page on a third (CONN_NORMAL, as a group of another program
 * has it), each of these one at a time with a pause between. Measured for SECONDS with the bulk, then for SECONDS
 * without. `one`: the connection keeps to one socket, for comparison.
 *
 * Prints lines of "WHAT METRIC VALUE": read and sync (until RECEIVED), idle and busy, median and 99th percentile in
 * microseconds; bulk in MB/s; sockets. Needs regions beside-bulk, beside-small and beside-other to be its own. */
#include "agent/net/addr.h"
#include "agent/net/conn.h"

#include <errno.h>
#include <netdb.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>

#define DATA 61440u
#define FRAMES 4096u /* in a bulk epoch: 240 MiB */
#define BUFFERS 64u
#define PAUSE_MS 2
#define SAMPLES 65536u

enum { BULK = 1, SMALL, OTHER, REGIONS }; /* handles, and streams */

struct series {
    uint64_t from; /* not 0: one is on its way */
    bool skip;     /* it is not to be counted */
    size_t len;
    uint32_t us[SAMPLES];
};

static uv_loop_t loop;
static uv_timer_t timer;
static struct conn *conn;
static uint64_t fence[REGIONS], epoch[REGIONS];
static struct id lineage[REGIONS];
static unsigned attached, seconds;
static uint32_t pin;
static bool one;
static enum { SETTING_UP, BUSY, IDLE, DONE } phase;
static struct series reads, syncs;
static struct buf *bulk[BUFFERS];
static uint64_t bulk_frames, bulk_from, counted;

static void die(const char *what)
{
    fprintf(stderr, "beside: %s\n", what);
    exit(3);
}

static struct buf *buf(size_t len)
{
    struct buf *b = buf_new(len);
    if (!b)
        die("no memory");
    b->len = (uint32_t)len;
    return b;
}

static void send_payload(uint32_t stream, uint8_t type, const void *payload, size_t len)
{
    struct buf *b = buf(len);
    memcpy(b->data, payload, len);
    conn_send(conn, stream, type, b);
}

static void attach(uint32_t handle, const char *name)
{
    struct frame_attach a = {.handle = handle, .write = 1};
    uint8_t p[128];
    snprintf(a.name, sizeof a.name, "%s", name);
    send_payload(handle, FRAME_ATTACH, p, frame_attach_put(p, sizeof p, &a));
}

static struct buf *pages(uint32_t handle, uint64_t offset, uint32_t len)
{
    struct frame_extent e = {.offset = offset, .len = len};
    struct buf *b = buf(FRAME_PAYLOAD_MAX);
    size_t head = frame_pages_put(b->data, b->cap, handle, &e, 1);
    for (uint32_t i = 0; i < len; i += 4) {
        uint32_t word = (uint32_t)random();
        memcpy(b->data + head + i, &word, 4);
    }
    b->len = (uint32_t)(head + len);
    return b;
}

static void begin(uint32_t h, uint64_t size)
{
    uint8_t p[128];
    put_u64(p, ++epoch[h]);
    send_payload(h, FRAME_BEGIN, p, 8);
    if (epoch[h] == 1) {
        id_new(&lineage[h]);
        struct frame_op op = {.kind = FRAME_OP_CREATE, .handle = h, .lineage = lineage[h]};
        send_payload(h, FRAME_OP, p, frame_op_put(p, sizeof p, &op));
    }
    struct frame_region r = {
        .handle = h, .epoch = epoch[h], .base = epoch[h] - 1, .fence = fence[h], .min_size = UINT64_MAX, .size = size};
    send_payload(h, FRAME_REGION, p, frame_region_put(p, sizeof p, &r));
}

static void end(uint32_t h, uint64_t frames)
{
    uint8_t p[16];
    put_u64(p, epoch[h]);
    put_u64(p + 8, frames + 1 + (epoch[h] == 1));
    send_payload(h, FRAME_END, p, sizeof p);
}

static void sync_now(uint32_t h)
{
    struct buf *b = pages(h, 0, FRAME_PAGE);
    syncs.from = uv_hrtime();
    begin(h, 1u << 20);
    conn_send(conn, h, FRAME_PAGES, b);
    end(h, 1);
}

static void read_now(void)
{
    uint8_t p[20];
    put_u32(p, 2);
    put_u32(p + 4, pin);
    put_u64(p + 8, 0);
    put_u32(p + 16, FRAME_PAGE);
    reads.from = uv_hrtime();
    send_payload(SMALL, FRAME_READ, p, sizeof p);
}

static void note(struct series *s)
{
    if (s->from && !s->skip && s->len < SAMPLES)
        s->us[s->len++] = (uint32_t)((uv_hrtime() - s->from) / 1000);
    s->from = 0;
    s->skip = false;
}

static void start_over(struct series *s)
{
    s->len = 0;
    s->skip = s->from;
}

/* Fills the queue of bulk: 240 MiB, END, and so on. */
static void more_bulk(void)
{
    while (phase == BUSY && conn_queued(conn, BULK) < 2 * CONN_LOW) {
        uint64_t at = bulk_frames % FRAMES;
        if (!at)
            begin(BULK, (uint64_t)FRAMES * DATA);
        struct buf *b = bulk[bulk_frames % BUFFERS];
        conn_send(conn, BULK, FRAME_PAGES, buf_hold(b));
        bulk_frames++;
        counted++;
        if (at == FRAMES - 1)
            end(BULK, FRAMES);
    }
}

static int order(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static void tell(struct series *s, const char *what, const char *state)
{
    if (!s->len)
        die("nothing was measured");
    qsort(s->us, s->len, sizeof *s->us, order);
    printf("%s_%s p50_us %u\n%s_%s p99_us %u\n%s_%s max_us %u\n%s_%s samples %zu\n", what, state, s->us[s->len / 2],
           what, state, s->us[s->len * 99 / 100], what, state, s->us[s->len - 1], what, state, s->len);
}

static void next_phase(void)
{
    if (phase == BUSY) {
        double s = (double)(uv_hrtime() - bulk_from) / 1e9;
        uint64_t sent = counted * (DATA + 48) - conn_queued(conn, BULK);
        printf("bulk MB_s %.1f\nsockets count %u\n", (double)sent / 1e6 / s, conn_sockets(conn));
    }
    if (phase == BUSY || phase == IDLE) {
        tell(&reads, "read", phase == BUSY ? "busy" : "idle");
        tell(&syncs, "sync", phase == BUSY ? "busy" : "idle");
    }
    phase++;
    if (phase == DONE) {
        conn_close(conn, false, 0, NULL);
        return;
    }
    if (phase == BUSY) {
        bulk_from = uv_hrtime();
        conn_set_priority(conn, BULK, CONN_BULK);
        more_bulk();
    } else {
        conn_forget(conn, BULK);
    }
}

/* Every PAUSE_MS: the next of each that has been answered. The first tenth of a phase is not counted. */
static void on_timer(uv_timer_t *t)
{
    static uint64_t phase_from;
    static bool warm;
    (void)t;
    uint64_t now = uv_hrtime();
    if (!phase_from || now - phase_from > (uint64_t)seconds * 1100000000u) {
        next_phase();
        phase_from = now;
        warm = false;
    }
    if (phase == DONE)
        return;
    if (!warm && now - phase_from > (uint64_t)seconds * 100000000u) {
        warm = true;
        start_over(&reads);
        start_over(&syncs);
        counted = 0;
        bulk_from = now;
    }
    if (!reads.from)
        read_now();
    if (!syncs.from)
        sync_now(OTHER);
}

static void on_open(void *owner, const struct frame_hello *peer)
{
    (void)owner;
    (void)peer;
    conn_set_priority(conn, SMALL, CONN_URGENT);
    attach(BULK, "beside-bulk");
    attach(SMALL, "beside-small");
    attach(OTHER, "beside-other");
}

static void on_attached(const struct buf *p)
{
    struct frame_attached a;
    if (frame_attached_get(p->data, p->len, &a) || a.status > FRAME_ATTACH_EXISTS || a.handle >= REGIONS)
        die("a region cannot be attached");
    fence[a.handle] = a.fence;
    epoch[a.handle] = a.status == FRAME_ATTACH_EXISTS ? a.epoch : 0;
    if (++attached == REGIONS - 1) {
        sync_now(SMALL);
        syncs.from = 0;
    }
}

static void on_durable(uint32_t stream)
{
    if (stream != SMALL || pin)
        return;
    uint8_t p[64];
    struct wr w = wr_over(p, sizeof p);
    wr_u32(&w, 1);
    wr_str(&w, "beside-small");
    send_payload(SMALL, FRAME_PIN, p, wr_len(&w));
}

static void on_frame(void *owner, uint32_t stream, uint8_t type, struct buf *p)
{
    (void)owner;
    if (type == FRAME_ATTACHED)
        on_attached(p);
    else if (type == FRAME_RECEIVED && stream == OTHER)
        note(&syncs);
    else if (type == FRAME_DURABLE)
        on_durable(stream);
    else if (type == FRAME_DATA) {
        conn_credit(conn, stream, conn_window(type, p->data, p->len));
        note(&reads);
    } else if (type == FRAME_PINNED) {
        pin = get_u32(p->data + 4);
        uv_timer_start(&timer, on_timer, 0, PAUSE_MS);
    } else if (type == FRAME_FAILED) {
        fprintf(stderr, "beside: refused: %.*s\n", (int)p->len - 12, p->data + 12);
        exit(3);
    }
}

static void on_drained(void *owner, uint32_t stream)
{
    (void)owner;
    if (stream == BULK)
        more_bulk();
}

static void on_closed(void *owner, int err, const char *why)
{
    (void)owner;
    if (err < 0 || phase != DONE)
        die(why);
    uv_close((uv_handle_t *)&timer, NULL);
}

static const struct conn_ops ops = {.open = on_open, .frame = on_frame, .drained = on_drained, .closed = on_closed};

/* Dialled by ourselves, so that the connection cannot dial again. */
static uv_stream_t *dial(const char *addr)
{
    struct addr a;
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *all = NULL;
    uv_tcp_t *t = malloc(sizeof *t);
    if (!t || addr_parse(&a, addr) || a.is_unix || getaddrinfo(a.host, a.port, &hints, &all))
        die("HOST:PORT");
    int fd = socket(all->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (fd < 0 || connect(fd, all->ai_addr, all->ai_addrlen) < 0)
        die("cannot connect");
    freeaddrinfo(all);
    uv_tcp_init(&loop, t);
    uv_tcp_open(t, fd);
    return (uv_stream_t *)t;
}

int main(int argc, char **argv)
{
    if (argc < 3 || !(seconds = (unsigned)atoi(argv[2]))) {
        fprintf(stderr, "usage: beside HOST:PORT SECONDS [one]\n");
        return 2;
    }
    one = argc > 3 && !strcmp(argv[3], "one");
    signal(SIGPIPE, SIG_IGN);
    uv_loop_init(&loop);
    uv_timer_init(&loop, &timer);
    for (unsigned i = 0; i < BUFFERS; i++) {
        bulk[i] = pages(BULK, (uint64_t)i * DATA, DATA);
        bulk[i]->hash = frame_payload_hash(bulk[i]->data, bulk[i]->len);
        bulk[i]->hashed = 1;
    }
    struct frame_hello self = {.version = FRAME_VERSION, .host = "beside"};
    id_new(&self.identity);
    conn = one ? conn_take(dial(argv[1]), &self, &ops, NULL) : conn_dial(&loop, argv[1], &self, &ops, NULL);
    if (!conn)
        die("no memory");
    uv_run(&loop, UV_RUN_DEFAULT);
    return 0;
}
