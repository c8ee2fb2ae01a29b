/* Comparing with a remote that answers from a table of its own, rightly or not. */
#include "tests/unit/test_conn.h"

#include "agent/sync/reconcile.h"

#include <sys/stat.h>

#define FILE_PAGES 3000u

enum lie { HONEST, MORE, FEWER, TORN, WRONG, REFUSES, OTHER_LINEAGE, TORN_PIN, HUGE_REGION, TWICE };

struct kit {
    struct local local;
    struct link link;
    struct group group;
    struct region region;
    struct body *body;
    struct conn *server;
    enum lie lie;
    bool open, closed, pinned;
    const char *fault;
    uint64_t size; /* theirs */
    struct hashes theirs;
    unsigned asked, unpinned;
};

/* ---- the remote ---- */

static void answer(struct kit *k, uint8_t type, const void *payload, size_t len)
{
    struct buf *b = buf_new(len);
    memcpy(b->data, payload, len);
    b->len = (uint32_t)len;
    conn_send(k->server, LINK_STREAM, type, b);
}

static void answer_pin(struct kit *k, uint32_t request)
{
    static uint8_t out[8192];
    static struct frame_entry e;
    e = (struct frame_entry){.lineage = k->body->lineage, .epoch = 9, .size = k->size, .name = "r"};
    if (k->lie == OTHER_LINEAGE)
        id_new(&e.lineage);
    if (k->lie == HUGE_REGION)
        e.size = INT64_MAX;
    k->pinned = true;
    size_t len = frame_pinned_put(out, sizeof out, request, 5, &e);
    answer(k, FRAME_PINNED, out, k->lie == TORN_PIN ? len - 1 : len);
}

static void answer_failed(struct kit *k, uint32_t request)
{
    uint8_t out[600];
    struct frame_failed f = {.seq = request, .code = FRAME_E_LIMIT, .text = "the pinned epoch could not be kept"};
    answer(k, FRAME_FAILED, out, frame_failed_put(out, sizeof out, &f));
}

static void answer_hash(struct kit *k, const struct frame_hash *h)
{
    static uint8_t out[8 + (FRAME_HASHES_MAX + 1) * HASH_BYTES];
    uint64_t pages = (k->size + PAGE - 1) / PAGE, nodes = hashes_nodes(pages, h->level);
    assert_int_equal(h->pin, 5);
    assert_int_equal(h->fresh, 0);
    assert_true(h->first < nodes && h->count <= nodes - h->first); /* it asks for nothing that there is not */
    uint32_t count = h->count;
    for (uint32_t i = 0; i < count; i++) {
        struct page_hash v = hashes_node(&k->theirs, h->level, h->first + i);
        if (k->lie == WRONG)
            v.hi ^= 0x55;
        page_hash_put(out + 8 + i * HASH_BYTES, v);
    }
    put_u32(out, h->request);
    put_u32(out + 4, k->lie == MORE ? ++count : k->lie == FEWER ? --count : count);
    if (k->asked++ > 2 && k->lie == REFUSES)
        answer_failed(k, h->request);
    else
        answer(k, FRAME_HASHES, out, 8 + count * HASH_BYTES - (k->lie == TORN));
    if (k->lie == TWICE)
        answer(k, FRAME_HASHES, out, 8 + count * HASH_BYTES);
}

static void server_frame(void *owner, uint32_t stream, uint8_t type, struct buf *p)
{
    struct kit *k = owner;
    struct frame_hash h;
    assert_int_equal(stream, LINK_STREAM);
    if (type == FRAME_PIN) {
        answer_pin(k, get_u32(p->data));
    } else if (type == FRAME_HASH) {
        assert_int_equal(frame_hash_get(p->data, p->len, &h), 0);
        answer_hash(k, &h);
    } else {
        assert_int_equal(type, FRAME_UNPIN);
        k->unpinned++;
    }
}

static void server_open(void *owner, const struct frame_hello *peer)
{
    (void)owner;
    (void)peer;
}

static void server_closed(void *owner, int err, const char *why)
{
    struct kit *k = owner;
    (void)err;
    (void)why;
    k->server = NULL;
}

static void nothing(void *owner, uint32_t stream)
{
    (void)owner;
    (void)stream;
}

static const struct conn_ops server_ops = {server_open, server_frame, nothing, server_closed, NULL};

/* ---- the link ---- */

static void client_open(void *owner, const struct frame_hello *peer)
{
    struct kit *k = owner;
    (void)peer;
    k->open = true;
}

static void client_frame(void *owner, uint32_t stream, uint8_t type, struct buf *p)
{
    struct kit *k = owner;
    struct frame_failed f;
    (void)stream;
    if (type == FRAME_FAILED) {
        assert_int_equal(frame_failed_get(p->data, p->len, &f), 0);
        reconcile_failed(&k->link, (uint32_t)f.seq, f.text);
        return;
    }
    const char *fault = reconcile_take(&k->link, type, p);
    if (fault) {
        k->fault = fault;
        conn_close(k->link.conn, false, FRAME_E_PROTOCOL, fault);
    }
}

static void client_closed(void *owner, int err, const char *why)
{
    struct kit *k = owner;
    (void)err;
    (void)why;
    k->link.conn = NULL;
    k->link.state = LINK_DOWN;
    k->closed = true;
    reconciles_drop(&k->link);
}

static const struct conn_ops client_ops = {client_open, client_frame, nothing, client_closed, NULL};

static void connect_both(struct kit *k)
{
    int fds[2];
    struct frame_hello a = hello("a"), b = hello("b");
    assert_int_equal(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
    k->server = conn_take(stream_of(fds[0]), &a, &server_ops, k);
    k->link.conn = conn_take(stream_of(fds[1]), &b, &client_ops, k);
    k->link.state = LINK_UP;
    k->open = k->closed = false;
    UNTIL(k->open);
}

/* ---- the file here ---- */

static void put_page(int fd, uint64_t page, unsigned content)
{
    uint8_t data[PAGE];
    for (unsigned i = 0; i < PAGE; i++)
        data[i] = content ? (uint8_t)(content + i / 7) : 0;
    assert_int_equal(pwrite(fd, data, PAGE, (off_t)(page * PAGE)), PAGE);
}

static struct page_hash hash_here(int fd, uint64_t page)
{
    uint8_t data[PAGE] = {0};
    assert_true(pread(fd, data, PAGE, (off_t)(page * PAGE)) >= 0);
    return page_hash_of(data);
}

static struct kit *kit_new(void)
{
    struct kit *k = calloc(1, sizeof *k);
    FILE *f = tmpfile();
    k->local.loop = &loop;
    k->link.local = &k->local;
    k->link.address = strdup("remote");
    k->link.groups = &k->group;
    k->link.regions = &k->region;
    k->group.link = &k->link;
    k->region = (struct region){.link = &k->link, .name = strdup("r"), .path = strdup("/r")};
    group_add(&k->group, &k->region);
    k->body = body_new(dup(fileno(f)), 1, (struct source){1, 1});
    fclose(f);
    id_new(&k->body->lineage);
    region_give_body(&k->region, k->body);
    k->theirs.bare = true;
    connect_both(k);
    return k;
}

static void kit_free(struct kit *k)
{
    if (k->link.conn)
        conn_close(k->link.conn, false, 0, NULL);
    UNTIL(k->closed && !k->server && !k->link.reconciles);
    hashes_free(&k->theirs);
    region_give_body(&k->region, NULL);
    body_drop(k->body);
    free(k->region.name);
    free(k->region.path);
    free(k->link.address);
    free(k);
}

/* A file of FILE_PAGES pages; theirs and what was published are the same, if `published`. */
static void fill(struct kit *k, bool published)
{
    for (uint64_t p = 0; p < FILE_PAGES; p++)
        if (p % 50)
            put_page(k->body->fd, p, 1 + (unsigned)p % 200);
    k->size = FILE_PAGES * PAGE;
    assert_int_equal(hashes_room(&k->theirs, FILE_PAGES), 0);
    assert_int_equal(hashes_room(&k->body->published, FILE_PAGES), 0);
    for (uint64_t p = 0; p < FILE_PAGES; p++) {
        hashes_set(&k->theirs, p, hash_here(k->body->fd, p));
        if (published)
            hashes_set(&k->body->published, p, hash_here(k->body->fd, p));
    }
    k->body->unknown = !published;
}

static bool is_dirty(struct extents *e, uint64_t page)
{
    for (size_t i = 0; i < e->count; i++)
        if (e->at[i].start <= page * PAGE && page * PAGE < e->at[i].end)
            return true;
    return false;
}

static void run(struct kit *k)
{
    k->region.retry_at = 0;
    k->unpinned = k->asked = 0;
    reconcile_start(&k->region);
    UNTIL(k->region.attach != ATTACH_HASHING || k->closed);
}

/* What holds after a comparison that came to its end: published is what they have, and what differs here is dirty. */
static void holds(struct kit *k)
{
    struct body *b = k->body;
    uint64_t pages = b->published.pages > FILE_PAGES ? b->published.pages : FILE_PAGES;
    extents_settle(&b->dirty, INT64_MAX);
    assert_int_equal(k->region.attach, ATTACH_DONE);
    assert_false(b->refetch);
    assert_int_equal(b->epoch, 9);
    assert_int_equal(b->size, k->size);
    for (uint64_t p = 0; p < pages; p++) {
        struct page_hash there = hashes_get(&k->theirs, p);
        if (!page_hash_same(hashes_get(&b->published, p), there))
            fail_msg("page %llu: published is not what they have", (unsigned long long)p);
        if (!b->unknown && !page_hash_same(hash_here(b->fd, p), there) && !is_dirty(&b->dirty, p))
            fail_msg("page %llu differs and is not dirty", (unsigned long long)p);
    }
    UNTIL(k->unpinned == 1);
}

/* Random files, random remotes, with and without doubt about the file. */
static void any_two_become_known(void **state)
{
    (void)state;
    srandom(11);
    for (unsigned round = 0; round < 40; round++) {
        struct kit *k = kit_new();
        struct body *b = k->body;
        fill(k, round % 4);
        b->unknown |= round % 4 == 2; /* a program died: what was published once says nothing about the file */
        unsigned many = (unsigned)random() % 3 ? 20 : 2000;
        for (unsigned i = 0; i < many; i++) { /* stored since, known to be so, or lost with a program */
            uint64_t p = (uint64_t)random() % FILE_PAGES;
            put_page(b->fd, p, (unsigned)random() % 256);
            if (!b->unknown)
                extents_add(&b->dirty, p * PAGE, (p + 1) * PAGE);
        }
        for (unsigned i = 0; i < many; i++) /* epochs that they lost */
            hashes_set(&k->theirs, (uint64_t)random() % FILE_PAGES, (struct page_hash){(uint64_t)random() + 2, 3});
        if (!(random() % 3)) {
            k->size = (uint64_t)random() % (FILE_PAGES * PAGE);
            hashes_clear(&k->theirs, (k->size + PAGE - 1) / PAGE, k->theirs.pages);
        } else if (!(random() % 3)) {
            k->size = 3 * FILE_PAGES * PAGE + 100;
            assert_int_equal(hashes_room(&k->theirs, k->size / PAGE + 1), 0);
            hashes_set(&k->theirs, 2 * FILE_PAGES, (struct page_hash){5, 5});
        }
        if (!(random() % 4))
            assert_int_equal(ftruncate(b->fd, random() % (long)(FILE_PAGES * PAGE)), 0);
        if (!b->unknown) { /* as a capture's marks would say */
            struct stat st;
            fstat(b->fd, &st);
            if (st.st_size < (long)(FILE_PAGES * PAGE))
                extents_add(&b->dirty, (uint64_t)st.st_size, FILE_PAGES * PAGE);
        }
        b->min_size = b->unknown ? 4096 : UINT64_MAX;
        run(k);
        assert_false(b->unknown);
        assert_true(b->min_size == UINT64_MAX); /* content was compared: nothing is to be cut off */
        holds(k);
        kit_free(k);
    }
}

static void equal_ones_cost_one_node(void **state)
{
    (void)state;
    struct kit *k = kit_new();
    fill(k, true);
    hashes_set(&k->body->published, 7, hash_here(k->body->fd, 7));
    run(k);
    holds(k);
    assert_int_equal(k->asked, 1);
    assert_int_equal(k->body->dirty.count, 0);
    kit_free(k);
}

static void an_empty_one_is_compared(void **state)
{
    (void)state;
    struct kit *k = kit_new();
    fill(k, true);
    k->size = 0;
    hashes_clear(&k->theirs, 0, k->theirs.pages);
    run(k);
    holds(k);
    assert_int_equal(k->asked, 0);
    kit_free(k);
}

static void lies_end_the_connection(void **state)
{
    (void)state;
    static const enum lie lies[] = {MORE, FEWER, TORN, TORN_PIN};
    for (unsigned i = 0; i < sizeof lies / sizeof *lies; i++) {
        struct kit *k = kit_new();
        fill(k, true);
        put_page(k->body->fd, 77, 3);
        extents_add(&k->body->dirty, 77 * PAGE, 78 * PAGE);
        hashes_set(&k->theirs, 1234, (struct page_hash){9, 9});
        k->lie = lies[i];
        run(k);
        UNTIL(k->closed);
        assert_non_null(k->fault);
        assert_true(k->body->refetch); /* and another comparison makes it right */
        assert_false(k->body->unknown);
        UNTIL(!k->server);
        k->lie = HONEST;
        connect_both(k);
        run(k);
        holds(k);
        kit_free(k);
    }
}

static void what_is_refused_is_tried_again(void **state)
{
    (void)state;
    static const enum lie lies[] = {REFUSES, OTHER_LINEAGE, HUGE_REGION};
    for (unsigned i = 0; i < sizeof lies / sizeof *lies; i++) {
        struct kit *k = kit_new();
        fill(k, true);
        for (uint64_t p = 0; p < FILE_PAGES; p += 97)
            hashes_set(&k->theirs, p, (struct page_hash){9, p});
        k->lie = lies[i];
        run(k);
        assert_false(k->closed);
        assert_int_equal(k->region.attach, ATTACH_LOOSE);
        assert_true(k->region.retry_at > 0);
        assert_true(k->body->refetch);
        UNTIL(k->unpinned == 1);
        k->lie = HONEST;
        run(k);
        holds(k);
        kit_free(k);
    }
}

/* Hashes of nothing that there is: all is taken to differ, and the next comparison with an honest remote is right. */
static void wrong_hashes_cost_only_work(void **state)
{
    (void)state;
    struct kit *k = kit_new();
    fill(k, true);
    k->lie = WRONG;
    run(k);
    assert_int_equal(k->region.attach, ATTACH_DONE);
    for (uint64_t p = 0; p < FILE_PAGES; p++)
        assert_true(is_dirty(&k->body->dirty, p));
    UNTIL(k->unpinned == 1);
    k->lie = HONEST;
    run(k);
    holds(k);
    kit_free(k);
}

static void answers_that_nobody_asked_for_are_passed_over(void **state)
{
    (void)state;
    struct kit *k = kit_new();
    fill(k, true);
    hashes_set(&k->theirs, 1234, (struct page_hash){9, 9});
    k->lie = TWICE;
    run(k);
    holds(k);
    assert_false(k->closed);
    kit_free(k);
}

/* The link goes, or the file gets another, while the file is read: what was read counts for nothing. */
static void given_up_while_reading(void **state)
{
    (void)state;
    for (unsigned how = 0; how < 2; how++) {
        struct kit *k = kit_new();
        fill(k, false);
        assert_int_equal(ftruncate(k->body->fd, 200L << 20), 0);
        put_page(k->body->fd, (150u << 20) / PAGE, 5);
        reconcile_start(&k->region);
        assert_int_equal(k->region.attach, ATTACH_HASHING);
        assert_true(reconcile_has(&k->link, k->body));
        assert_true(reconcile_reads(&k->link, &k->group));
        assert_false(k->body->unknown);
        if (how) {
            struct body *other = body_new(-1, 1, (struct source){2, 2});
            region_give_body(&k->region, other);
            body_drop(other);
            UNTIL(!k->link.reconciles);
            assert_int_equal(k->region.attach, ATTACH_LOOSE);
        } else {
            conn_close(k->link.conn, false, 0, NULL);
            UNTIL(k->closed && !k->link.reconciles);
        }
        assert_true(k->body->unknown);
        assert_true(k->body->refetch);
        assert_false(k->pinned);
        kit_free(k);
    }
}

/* After a refused delta no block is a base any more. */
static void doubted_blocks_are_forgotten(void **state)
{
    (void)state;
    struct kit *k = kit_new();
    uint8_t page[PAGE] = {1};
    fill(k, true);
    hashes_blocks(&k->body->published, 5, page);
    page[0] = 2;
    assert_int_equal(hashes_blocks(&k->body->published, 5, page), 1);
    k->body->base_doubted = true;
    run(k);
    holds(k);
    page[0] = 3;
    assert_int_equal(hashes_blocks(&k->body->published, 5, page), 0);
    assert_false(k->body->base_doubted);
    kit_free(k);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(any_two_become_known),
        cmocka_unit_test(equal_ones_cost_one_node),
        cmocka_unit_test(an_empty_one_is_compared),
        cmocka_unit_test(lies_end_the_connection),
        cmocka_unit_test(what_is_refused_is_tried_again),
        cmocka_unit_test(wrong_hashes_cost_only_work),
        cmocka_unit_test(answers_that_nobody_asked_for_are_passed_over),
        cmocka_unit_test(given_up_while_reading),
        cmocka_unit_test(doubted_blocks_are_forgotten),
    };
    uv_loop_init(&loop);
    int failed = cmocka_run_group_tests(tests, NULL, NULL);
    return failed || uv_run(&loop, UV_RUN_DEFAULT) || uv_loop_close(&loop);
}
