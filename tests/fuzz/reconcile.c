/* The client's comparison by hash trees against a server that answers as the input says. What was published here and
 * what the region is there are pages of the input's choosing; the server answers from its own tree, and where the input
 * wants it, with hashes, counts, sizes and requests that are something else.
 *
 * What must hold: nothing crashes; a page whose published hash has changed is marked to be read again; and when the
 * server has told no lie, the comparison ends, what is published is what the server has, and each page that differed is
 * marked. */
#include "tests/fuzz/world.h"

#include "agent/base/log.h"
#include "agent/net/conn.h"
#include "agent/sync/reconcile.h"

#include <sys/socket.h>
#include <unistd.h>

#define PAGES 600u /* two levels and a bit */
#define WAS 300u

static struct fixture {
    struct world world;
    struct peer server;
    struct in in;
    struct local local;
    struct link link;
    struct group group;
    struct region region;
    struct hashes theirs;
    struct page_hash before[PAGES];
    uint64_t pages, size;
    unsigned asked;
    bool lied, closed;
} x;

static const char *fault;

static void on_open(void *owner, const struct frame_hello *peer)
{
    (void)owner;
    (void)peer;
}

static void on_answer(void *owner, uint32_t stream, uint8_t type, struct buf *p)
{
    struct frame_failed f;
    (void)owner;
    (void)stream;
    if (type == FRAME_PINNED || type == FRAME_HASHES)
        fault = fault ? fault : reconcile_take(&x.link, type, p);
    else if (type == FRAME_FAILED && !frame_failed_get(p->data, p->len, &f))
        reconcile_failed(&x.link, (uint32_t)f.seq, f.text);
}

static void on_drained(void *owner, uint32_t stream)
{
    (void)owner;
    (void)stream;
}

static void on_closed(void *owner, int err, const char *why)
{
    (void)owner;
    (void)err;
    (void)why;
    x.closed = true;
}

static const struct conn_ops ops = {.open = on_open, .frame = on_answer, .drained = on_drained, .closed = on_closed};

/* ---- the server ---- */

static struct page_hash some_hash(void)
{
    uint8_t which = in_u8(&x.in) % 8;
    return which ? (struct page_hash){which, 77} : HASH_ZEROS;
}

static void lie(uint8_t *p, size_t *len, size_t cap)
{
    uint8_t how = in_u8(&x.in);
    if (how < 0xe0 || !*len)
        return;
    x.lied = true;
    size_t at = in_u16(&x.in) % *len;
    if (how & 1)
        p[at] ^= (uint8_t)(in_u8(&x.in) | 1);
    else if (how & 2)
        *len = at;
    else if (*len + 16 <= cap)
        *len += 16;
}

static void pinned(uint32_t request)
{
    static uint8_t p[2 * NAME_CAP];
    struct frame_entry e = {.lineage = {{1}}, .epoch = 5, .size = x.size, .name = "r"};
    uint8_t how = in_u8(&x.in);
    if (how >= 0xf0) {
        x.lied = true;
        e.size = how & 1 ? (uint64_t)INT64_MAX : in_u16(&x.in) * 65536ull;
        e.lineage.b[0] ^= how == 0xf2;
    }
    size_t len = frame_pinned_put(p, sizeof p, request, 3, &e);
    lie(p, &len, sizeof p);
    peer_send(&x.server, LINK_STREAM, FRAME_PINNED, p, len);
}

static void hashes(const uint8_t *payload, size_t size)
{
    static uint8_t p[FRAME_PAYLOAD_MAX];
    struct frame_hash h;
    MUST(!frame_hash_get(payload, size, &h), "a malformed HASH is sent");
    if (++x.asked > 4000)
        return; /* a liar need not be patient */
    uint64_t there = hashes_nodes(x.pages, h.level);
    uint32_t n = h.first >= there ? 0 : there - h.first < h.count ? (uint32_t)(there - h.first) : h.count;
    for (uint32_t i = 0; i < n; i++)
        page_hash_put(p + 8 + i * HASH_BYTES, hashes_node(&x.theirs, h.level, h.first + i));
    put_u32(p, h.request);
    put_u32(p + 4, n);
    size_t len = 8 + n * HASH_BYTES;
    lie(p, &len, sizeof p);
    peer_send(&x.server, LINK_STREAM, FRAME_HASHES, p, len);
}

static void on_request(void *arg, const struct frame_header *h, const uint8_t *p)
{
    uint8_t failed[64];
    (void)arg;
    if (h->type != FRAME_PIN && h->type != FRAME_HASH)
        return;
    if (in_u8(&x.in) == 0xff) {
        struct frame_failed f = {.seq = get_u32(p), .code = FRAME_E_LIMIT, .text = "no"};
        x.lied = true;
        peer_send(&x.server, LINK_STREAM, FRAME_FAILED, failed, frame_failed_put(failed, sizeof failed, &f));
    } else if (h->type == FRAME_PIN) {
        pinned(get_u32(p));
    } else {
        hashes(p, h->len);
    }
}

/* ---- */

static void connect_both(void)
{
    int fds[2];
    uint8_t p[512];
    struct frame_hello hello = {.version = FRAME_VERSION, .identity = {{4}}, .host = "peer"};
    uv_pipe_t *pipe = malloc(sizeof *pipe);
    MUST(pipe && !socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds), "no socket pair");
    MUST(!uv_loop_init(&x.world.loop), "no loop");
    uv_pipe_init(&x.world.loop, pipe, 0);
    MUST(!uv_pipe_open(pipe, fds[1]), "no pipe");
    x.link.conn = conn_take((uv_stream_t *)pipe, &hello, &ops, &x.link);
    x.server = (struct peer){.world = &x.world, .fd = fds[0], .frame = on_request};
    peer_send(&x.server, 0, FRAME_HELLO, p, frame_hello_put(p, sizeof p, &hello));
}

/* Some pages of each side; few differ, since that is what the walk is for. */
static void content(struct body *b)
{
    uint64_t was = in_u8(&x.in) % 2 ? in_u16(&x.in) % WAS : WAS;
    x.pages = in_u8(&x.in) % 2 ? in_u16(&x.in) % PAGES : WAS;
    x.size = x.pages * PAGE - (x.pages ? in_u8(&x.in) : 0);
    MUST(!hashes_room(&b->published, was) && !hashes_room(&x.theirs, x.pages), "no memory");
    for (uint64_t i = 0; i < was || i < x.pages; i++) {
        struct page_hash same = {i + 9, 5};
        if (i < was)
            hashes_set(&b->published, i, same);
        if (i < x.pages)
            hashes_set(&x.theirs, i, same);
    }
    for (unsigned n = in_u8(&x.in) % 16; n; n--) {
        uint64_t page = in_u16(&x.in) % PAGES;
        if (page < x.pages)
            hashes_set(&x.theirs, page, some_hash());
        else if (page < was)
            hashes_set(&b->published, page, some_hash());
    }
    for (uint64_t i = 0; i < PAGES; i++)
        x.before[i] = hashes_get(&b->published, i);
}

static bool marked(const struct body *b, uint64_t page)
{
    for (size_t i = 0; i < b->dirty.count; i++)
        if (b->dirty.at[i].start <= page * PAGE && page * PAGE < b->dirty.at[i].end)
            return true;
    return b->dirty.lost;
}

static void check(const struct body *b)
{
    MUST(!fault || x.lied, "%s", fault);
    MUST(x.lied || x.region.attach == ATTACH_DONE, "the comparison has not ended");
    for (uint64_t i = 0; i < PAGES; i++) {
        struct page_hash now = hashes_get(&b->published, i);
        MUST(page_hash_same(now, x.before[i]) || marked(b, i), "page %llu has another hash and is not marked",
             (unsigned long long)i);
        if (!x.lied)
            MUST(page_hash_same(now, hashes_get(&x.theirs, i)), "page %llu is not published as the server has it",
                 (unsigned long long)i);
    }
}

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    setenv("MEMSYNC_LOG", "off", 1);
    log_setup("fuzz");
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct peer *one[] = {&x.server};
    memset(&x, 0, sizeof x);
    fault = NULL;
    x.in = (struct in){data, data + size};
    x.theirs.bare = true;
    connect_both();
    struct body *b = body_new(-1, 0, (struct source){1, 1});
    x.local.loop = &x.world.loop;
    x.link.local = &x.local;
    x.link.address = (char[]){"server"};
    x.group.link = &x.link;
    x.group.regions = &x.region;
    x.region =
        (struct region){.link = &x.link, .group = &x.group, .name = (char[]){"r"}, .path = (char[]){"/r"}, .body = b};
    b->region = &x.region;
    b->unknown = false;
    b->lineage = (struct id){{1}};
    content(b);
    world_quiet(&x.world, one, 1);
    reconcile_start(&x.region);
    world_quiet(&x.world, one, 1);
    check(b);
    reconciles_drop(&x.link);
    if (!x.closed)
        conn_close(x.link.conn, false, 0, NULL);
    peer_close(&x.server);
    uv_run(&x.world.loop, UV_RUN_DEFAULT);
    MUST(x.closed && !uv_loop_close(&x.world.loop), "something is left in the loop");
    b->region = NULL;
    body_drop(b);
    hashes_free(&x.theirs);
    return 0;
}
