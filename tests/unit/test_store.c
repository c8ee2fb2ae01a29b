/* The store's promises, on both volumes: what is committed is there, names behave, refused epochs leave nothing. */
#include "tests/unit/test_store.h"

#include <xxhash.h>

static int setup_mem(void **state)
{
    struct kit *k = malloc(sizeof *k);
    kit_init(k, true);
    kit_open(k);
    *state = k;
    return 0;
}

static int setup_file(void **state)
{
    struct kit *k = malloc(sizeof *k);
    kit_init(k, false);
    kit_open(k);
    *state = k;
    return 0;
}

static int teardown(void **state)
{
    kit_end(*state);
    free(*state);
    return 0;
}

/* A file: store is closed and opened anew, so that what follows is read from the disk; leases are taken again. */
static void again(struct kit *k)
{
    if (k->mem)
        return;
    kit_close(k);
    kit_open(k);
    for (uint32_t h = 0; h < HANDLES; h++)
        if (*k->names[h]) {
            char name[64];
            snprintf(name, sizeof name, "%s", k->names[h]);
            kit_attach(k, h, name);
        }
}

static void round_trip(void **state)
{
    struct kit *k = *state;
    kit_attach(k, 0, "a/b/c");
    assert_int_equal(kit_write(k, 0, 1, 10000, 'x'), 0);
    assert_int_equal(kit_write(k, 0, 2, 20000, 'y'), 0);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(kit_size(k, "a/b/c"), 20000);
        assert_int_equal(kit_byte(k, "a/b/c", 0), 'y');
        assert_int_equal(kit_byte(k, "a/b/c", 19999), 'y');
        assert_int_equal(kit_byte(k, "a/b/c", 20000), -2);
        again(k);
    }
    struct frame_entry e;
    struct source source;
    assert_int_equal(store_lookup(k->s, "a/b/c", &e, &source, NULL), 0);
    assert_int_equal(e.epoch, 2);
    assert_int_equal(e.leased, 1);
    assert_true(id_same(&e.writer, &k->me));
    assert_int_equal(source.ino, 7);
    assert_int_equal(kit_write(k, 0, 3, 5, 'z'), 0);
    assert_int_equal(kit_size(k, "a/b/c"), 5);
}

static void plain_file_is_exact_after_close(void **state)
{
    struct kit *k = *state;
    kit_attach(k, 0, "d/e");
    assert_int_equal(kit_write(k, 0, 1, 9000, 'q'), 0);
    kit_close(k);
    assert_int_equal(kit_file_size(k, "d/e"), 9000);
    assert_int_equal(kit_file_byte(k, "d/e", 8999), 'q');
    assert_int_equal(kit_file_size(k, ".memsync/data/0000000000000001"), -ENOENT);
    kit_open(k);
}

/* 8K -> 0 -> 8K without pages: the old bytes are gone. Without the cut they would still be there. */
static void lowest_size_cuts(void **state)
{
    struct kit *k = *state;
    kit_attach(k, 0, "r");
    assert_int_equal(kit_write(k, 0, 1, 8192, 'x'), 0);
    struct store_txn *t = kit_txn(k);
    assert_int_equal(kit_region(k, t, 0, 2, UINT64_MAX, 8192), 0);
    assert_int_equal(kit_commit(k, t), 0);
    assert_int_equal(kit_byte(k, "r", 100), 'x');
    t = kit_txn(k);
    assert_int_equal(kit_region(k, t, 0, 3, 100, 8192), 0);
    assert_int_equal(kit_region(k, t, 0, 3, 4096, 12288), 0); /* stated again: lowest and last count */
    assert_int_equal(kit_commit(k, t), 0);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(kit_byte(k, "r", 99), 'x');
        assert_int_equal(kit_byte(k, "r", 100), 0);
        assert_int_equal(kit_byte(k, "r", 8000), 0);
        assert_int_equal(kit_size(k, "r"), 12288);
        again(k);
    }
}

static void zeros_and_clipping(void **state)
{
    struct kit *k = *state;
    kit_attach(k, 0, "r");
    assert_int_equal(kit_write(k, 0, 1, 300000, 'x'), 0);
    struct store_txn *t = kit_txn(k);
    assert_int_equal(kit_region(k, t, 0, 2, UINT64_MAX, 200000), 0);
    assert_int_equal(kit_pages(k, t, 0, 4096, 120000, 0), 0);
    assert_int_equal(kit_pages(k, t, 0, 8192, 10, 'y'), 0);
    assert_int_equal(kit_pages(k, t, 0, 199999, 5000, 'e'), 0);
    assert_int_equal(kit_pages(k, t, 0, 250000, 5000, 'e'), 0);
    assert_int_equal(kit_commit(k, t), 0);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(kit_byte(k, "r", 4095), 'x');
        assert_int_equal(kit_byte(k, "r", 4096), 0);
        assert_int_equal(kit_byte(k, "r", 8200), 'y');
        assert_int_equal(kit_byte(k, "r", 124095), 0);
        assert_int_equal(kit_byte(k, "r", 124096), 'x');
        assert_int_equal(kit_byte(k, "r", 199999), 'e');
        assert_int_equal(kit_byte(k, "r", 200000), -2);
        again(k);
    }
}

static int kit_delta(struct kit *k, struct store_txn *t, uint32_t handle, uint64_t page, uint32_t mask, uint8_t with,
                     const uint8_t *whole)
{
    uint8_t delta[FRAME_DELTA_HEAD + FRAME_PAGE];
    XXH128_canonical_t sum;
    XXH128_canonicalFromHash(&sum, XXH3_128bits(whole, FRAME_PAGE));
    memcpy(delta, &sum, 16);
    put_u32(delta + 16, mask);
    size_t len = FRAME_DELTA_HEAD + (size_t)__builtin_popcount(mask) * FRAME_DELTA_BLOCK;
    memset(delta + FRAME_DELTA_HEAD, with, len - FRAME_DELTA_HEAD);
    struct frame_extent e = {.offset = page * FRAME_PAGE, .len = FRAME_PAGE, .kind = FRAME_PAGES_DELTA};
    struct buf *b = buf_new(FRAME_PAYLOAD_MAX);
    size_t head = frame_pages_put(b->data, FRAME_PAYLOAD_MAX, handle, &e, 1);
    memcpy(b->data + head, delta, len);
    b->len = (uint32_t)(head + len);
    int rc = store_txn_add(t, FRAME_PAGES, b, k->error);
    buf_drop(b);
    return rc;
}

/* Two epochs of deltas in a row, the second handed in before the first is durable; then one whose page comes out
 * otherwise: it is refused, nothing of it shows, and what comes after it is right again. */
static void deltas_are_checked_before_they_count(void **state)
{
    struct kit *k = *state;
    uint8_t page[FRAME_PAGE];
    kit_attach(k, 0, "r");
    assert_int_equal(kit_write(k, 0, 1, 3 * FRAME_PAGE, 'x'), 0);
    memset(page, 'x', sizeof page);
    memset(page + 128, 'y', 256);
    struct store_txn *t = kit_txn(k);
    assert_int_equal(kit_region(k, t, 0, 2, UINT64_MAX, 3 * FRAME_PAGE), 0);
    assert_int_equal(kit_delta(k, t, 0, 1, 0x6, 'y', page), 0);
    struct told first = {0}, second = {0};
    store_txn_commit(t, kit_durable, &first);
    memset(page + 31 * 128, 'z', 128);
    t = kit_txn(k);
    assert_int_equal(kit_region(k, t, 0, 3, UINT64_MAX, 3 * FRAME_PAGE), 0);
    assert_int_equal(kit_delta(k, t, 0, 1, 1u << 31, 'z', page), 0);
    store_txn_commit(t, kit_durable, &second);
    while (!first.calls || !second.calls)
        uv_run(&k->loop, UV_RUN_ONCE);
    assert_int_equal(first.err, 0);
    assert_int_equal(second.err, 0);
    t = kit_txn(k);
    assert_int_equal(kit_region(k, t, 0, 4, UINT64_MAX, 3 * FRAME_PAGE), 0);
    assert_int_equal(kit_delta(k, t, 0, 2, 1, 'q', page), 0);
    assert_int_equal(kit_commit(k, t), -EBADMSG);
    for (int i = 0; i < 2; i++) {
        assert_int_equal(kit_byte(k, "r", FRAME_PAGE + 127), 'x');
        assert_int_equal(kit_byte(k, "r", FRAME_PAGE + 128), 'y');
        assert_int_equal(kit_byte(k, "r", FRAME_PAGE + 383), 'y');
        assert_int_equal(kit_byte(k, "r", FRAME_PAGE + 384), 'x');
        assert_int_equal(kit_byte(k, "r", 2 * FRAME_PAGE - 1), 'z');
        assert_int_equal(kit_byte(k, "r", 2 * FRAME_PAGE), 'x');
        again(k);
    }
    assert_int_equal(kit_write(k, 0, 4, 3 * FRAME_PAGE, 'w'), 0);
}

/* What is cut first is no base any more, although the page in the file would come out right. */
static void a_page_that_is_cut_is_no_base(void **state)
{
    struct kit *k = *state;
    uint8_t page[FRAME_PAGE];
    kit_attach(k, 0, "r");
    assert_int_equal(kit_write(k, 0, 1, 3 * FRAME_PAGE, 'x'), 0);
    memset(page, 'x', sizeof page);
    memset(page, 'y', 128);
    for (uint64_t min = FRAME_PAGE; min <= 2 * FRAME_PAGE; min += FRAME_PAGE / 2) {
        struct store_txn *t = kit_txn(k);
        assert_int_equal(kit_region(k, t, 0, 2, min, 3 * FRAME_PAGE), 0);
        assert_int_equal(kit_delta(k, t, 0, 1, 1, 'y', page), 0);
        assert_int_equal(kit_commit(k, t), min < 2 * FRAME_PAGE ? -EBADMSG : 0);
    }
    for (int i = 0; i < 2; i++) {
        assert_int_equal(kit_byte(k, "r", FRAME_PAGE), 'y');
        assert_int_equal(kit_byte(k, "r", FRAME_PAGE + 128), 'x');
        assert_int_equal(kit_byte(k, "r", 2 * FRAME_PAGE), 0);
        again(k);
    }
}

/* Epochs that come while one is being committed go together: each delta's base is then in memory only. The last one is
 * wrong and fails alone. */
static void deltas_of_one_batch_build_on_each_other(void **state)
{
    struct kit *k = *state;
    uint8_t page[FRAME_PAGE];
    struct told told[5] = {0};
    kit_attach(k, 0, "r");
    assert_int_equal(kit_write(k, 0, 1, 2 * FRAME_PAGE, 'x'), 0);
    memset(page, 'x', sizeof page);
    for (int i = 0; i < 5; i++) {
        struct store_txn *t = kit_txn(k);
        uint64_t at = (uint64_t)i * FRAME_DELTA_BLOCK;
        assert_int_equal(kit_region(k, t, 0, (uint64_t)i + 2, UINT64_MAX, 2 * FRAME_PAGE), 0);
        if (i < 4)
            memset(page + at, 'a' + i, FRAME_DELTA_BLOCK);
        if (i == 2)
            assert_int_equal(kit_pages(k, t, 0, at, FRAME_DELTA_BLOCK, 'a' + i), 0);
        else
            assert_int_equal(kit_delta(k, t, 0, 0, 1u << i, (uint8_t)('a' + i), page), 0);
        store_txn_commit(t, kit_durable, &told[i]);
    }
    while (!told[4].calls || !told[3].calls)
        uv_run(&k->loop, UV_RUN_ONCE);
    for (int i = 0; i < 4; i++)
        assert_int_equal(told[i].err, 0);
    assert_int_equal(told[4].err, -EBADMSG);
    for (int i = 0; i < 2; i++) {
        for (int b = 0; b < 4; b++)
            assert_int_equal(kit_byte(k, "r", (uint64_t)b * FRAME_DELTA_BLOCK + 5), 'a' + b);
        assert_int_equal(kit_byte(k, "r", 4 * FRAME_DELTA_BLOCK), 'x');
        again(k);
    }
}

#define MOVED 64u

/* Region r: page i full of fills[i], in one epoch of whole pages. */
static void moved_start(struct kit *k, int fills[MOVED])
{
    kit_attach(k, 0, "r");
    struct store_txn *t = kit_txn(k);
    assert_int_equal(kit_op(k, t, FRAME_OP_CREATE, 0, 0), 0);
    assert_int_equal(kit_region(k, t, 0, 1, UINT64_MAX, MOVED * FRAME_PAGE), 0);
    for (uint32_t i = 0; i < MOVED; i++)
        assert_int_equal(kit_pages(k, t, 0, i * FRAME_PAGE, FRAME_PAGE, fills[i] = (int)i + 1), 0);
    assert_int_equal(kit_commit(k, t), 0);
}

static void moved_expect(struct kit *k, const int fills[MOVED])
{
    for (uint64_t i = 0; i < MOVED; i++) {
        assert_int_equal(kit_byte(k, "r", i * FRAME_PAGE), fills[i]);
        assert_int_equal(kit_byte(k, "r", (i + 1) * FRAME_PAGE - 1), fills[i]);
    }
}

/* An epoch that has all pages from those `by` before them, around; new ones: the first gets `first` over it. */
static struct store_txn *moved_epoch(struct kit *k, uint64_t epoch, uint32_t by, int first, int fills[MOVED])
{
    struct moved m[MOVED];
    int old[MOVED];
    memcpy(old, fills, sizeof old);
    struct store_txn *t = kit_txn(k);
    assert_int_equal(kit_region(k, t, 0, epoch, UINT64_MAX, MOVED * FRAME_PAGE), 0);
    for (uint32_t i = 0; i < MOVED; i++) {
        uint32_t source = (i + MOVED - by) % MOVED;
        m[i] = (struct moved){.page = i, .source = source, .fill = old[source]};
        fills[i] = old[source];
    }
    assert_int_equal(kit_copies(k, t, 0, m, 40), 0); /* more than one frame of plain pages, and two of moved ones */
    assert_int_equal(kit_copies(k, t, 0, m + 40, MOVED - 40), 0);
    if (first)
        assert_int_equal(kit_pages(k, t, 0, 0, FRAME_PAGE, fills[0] = first), 0);
    return t;
}

/* Up, down, and halves swapped: sources are overwritten by the same epoch each time. */
static void pages_move(void **state)
{
    struct kit *k = *state;
    int fills[MOVED];
    moved_start(k, fills);
    static const uint32_t by[] = {1, MOVED - 1, MOVED / 2, 7};
    for (uint64_t i = 0; i < sizeof by / sizeof *by; i++) {
        assert_int_equal(kit_commit(k, moved_epoch(k, i + 2, by[i], (int)(100 + i), fills)), 0);
        moved_expect(k, fills);
        again(k);
        moved_expect(k, fills);
    }
}

/* Handed in without waiting: each one's base is not in the file yet when it comes. */
static void moves_wait_for_their_base(void **state)
{
    struct kit *k = *state;
    int fills[MOVED];
    struct told told[12] = {0};
    moved_start(k, fills);
    for (uint64_t i = 0; i < 12; i++) {
        struct store_txn *t = kit_txn(k);
        if (i % 3 == 2) {
            assert_int_equal(kit_region(k, t, 0, i + 2, UINT64_MAX, MOVED * FRAME_PAGE), 0);
            assert_int_equal(kit_pages(k, t, 0, 5 * FRAME_PAGE, FRAME_PAGE, fills[5] = (int)(200 + i)), 0);
        } else {
            store_txn_abort(t);
            t = moved_epoch(k, i + 2, i % 2 ? 1 : MOVED - 1, (int)(100 + i), fills);
        }
        store_txn_commit(t, kit_durable, &told[i]);
    }
    for (int i = 0; i < 12; i++)
        assert_int_equal(kit_wait(k, &told[i]), 0);
    moved_expect(k, fills);
    again(k);
    moved_expect(k, fills);
}

/* While it is open, one of more than stays in memory waits for its base, then goes to the disk; aborted, it leaves the
 * line. */
static void open_moves_wait_too(void **state)
{
    struct kit *k = *state;
    int fills[MOVED], aborted[MOVED];
    struct told told = {0};
    moved_start(k, fills);
    k->s->limits.txn_memory = 1000;
    store_txn_commit(moved_epoch(k, 2, 1, 100, fills), kit_durable, &told);
    memcpy(aborted, fills, sizeof fills);
    struct store_txn *gone = moved_epoch(k, 3, 1, 0, aborted), *t = moved_epoch(k, 3, 2, 0, fills);
    assert_true(gone->waiting && t->waiting);
    store_txn_abort(gone);
    for (struct store_txn *w = k->s->waiting; w; w = w->next_waiting)
        assert_ptr_not_equal(w, gone);
    assert_int_equal(kit_wait(k, &told), 0);
    while (t->memory > 1000 || t->spilling)
        uv_run(&k->loop, UV_RUN_ONCE);
    assert_null(k->s->waiting);
    assert_true(t->spill_len > 40 * FRAME_PAGE);
    assert_int_equal(kit_commit(k, t), 0);
    moved_expect(k, fills);
    again(k);
    moved_expect(k, fills);
}

/* A page that is not what its move says refuses the epoch, and with it those that continue it. */
static void moves_are_checked(void **state)
{
    struct kit *k = *state;
    int fills[MOVED], other[MOVED];
    struct told first = {0}, second = {0};
    moved_start(k, fills);
    memcpy(other, fills, sizeof fills);
    other[63] = 99;
    store_txn_commit(moved_epoch(k, 2, 1, 0, other), kit_durable, &first);
    store_txn_commit(moved_epoch(k, 3, 1, 0, other), kit_durable, &second);
    assert_int_equal(kit_wait(k, &first), -EBADMSG);
    assert_int_equal(kit_wait(k, &second), -EEXIST);
    assert_null(k->s->waiting);
    moved_expect(k, fills);
    again(k);
    moved_expect(k, fills);
    assert_int_equal(kit_commit(k, moved_epoch(k, 2, 1, 0, fills)), 0);
    moved_expect(k, fills);
}

static void moved_refused(struct kit *k, uint64_t min, uint64_t size, const struct moved *m, uint32_t n)
{
    struct store_txn *t = kit_txn(k);
    assert_int_equal(kit_region(k, t, 0, 2, min, size), 0);
    assert_int_equal(kit_copies(k, t, 0, m, n), -EPROTO);
    assert_true(k->error[0]);
    store_txn_abort(t);
}

static void moves_from_nowhere(void **state)
{
    struct kit *k = *state;
    int fills[MOVED];
    struct moved m[MOVED + 2];
    const uint64_t size = MOVED * FRAME_PAGE;
    moved_start(k, fills);
    moved_refused(k, UINT64_MAX, size, &(struct moved){.page = 1, .source = MOVED}, 1);
    moved_refused(k, UINT64_MAX, size * 2, &(struct moved){.page = 1, .source = MOVED}, 1); /* it was not that long */
    moved_refused(k, UINT64_MAX, size, &(struct moved){.page = 1, .source = (uint64_t)INT64_MAX / FRAME_PAGE - 1}, 1);
    moved_refused(k, 4096, size, &(struct moved){.page = 1, .source = 0, .fill = 1}, 1);
    for (uint32_t i = 0; i < MOVED + 2; i++)
        m[i] = (struct moved){.page = 1, .source = 0, .fill = 1};
    moved_refused(k, UINT64_MAX, size, m, MOVED + 2);
    struct store_txn *t = kit_txn(k);
    assert_int_equal(kit_op(k, t, FRAME_OP_CREATE, 0, 0), 0);
    assert_int_equal(kit_region(k, t, 0, 1, UINT64_MAX, size), 0);
    assert_int_equal(kit_copies(k, t, 0, m, 1), -EPROTO);
    store_txn_abort(t);
    moved_expect(k, fills);
    assert_int_equal(kit_size(k, "r"), size);
}

static void rename_replaces(void **state)
{
    struct kit *k = *state;
    kit_attach(k, 0, "doc");
    kit_attach(k, 1, "doc.new");
    assert_int_equal(kit_write(k, 0, 1, 5000, 'o'), 0);
    assert_int_equal(kit_write(k, 1, 1, 6000, 'n'), 0);
    struct store_txn *t = kit_txn(k);
    assert_int_equal(kit_op(k, t, FRAME_OP_RENAME, 1, 0), 0);
    assert_int_equal(kit_region(k, t, 1, 2, UINT64_MAX, 6000), 0);
    assert_int_equal(kit_pages(k, t, 1, 0, 10, 'm'), 0);
    assert_int_equal(kit_commit(k, t), 0);
    strcpy(k->names[1], "doc");
    strcpy(k->names[0], "");
    for (int i = 0; i < 2; i++) {
        assert_int_equal(kit_size(k, "doc"), 6000);
        assert_int_equal(kit_size(k, "doc.new"), -ENOENT);
        assert_int_equal(kit_byte(k, "doc", 0), 'm');
        assert_int_equal(kit_byte(k, "doc", 10), 'n');
        if (!i) /* the fence of its old name still is good for the region */
            assert_int_equal(kit_write(k, 1, 3, 6000, 0), 0);
        again(k);
    }
}

static void unlink_and_create_anew(void **state)
{
    struct kit *k = *state;
    kit_attach(k, 0, "j/journal");
    for (int round = 0; round < 20; round++) {
        assert_int_equal(kit_write(k, 0, 1, 3000, 'a' + round), 0);
        assert_int_equal(kit_byte(k, "j/journal", 1), 'a' + round);
        struct store_txn *t = kit_txn(k);
        assert_int_equal(kit_op(k, t, FRAME_OP_UNLINK, 0, 0), 0);
        assert_int_equal(kit_commit(k, t), 0);
        assert_int_equal(kit_size(k, "j/journal"), -ENOENT);
    }
    kit_attach(k, 1, "j");
    assert_int_equal(kit_write(k, 1, 1, 10, 'f'), 0); /* the directory went with its last file */
    again(k);
    assert_int_equal(kit_byte(k, "j", 9), 'f');
}

static void created_and_gone_in_one_epoch(void **state)
{
    struct kit *k = *state;
    kit_attach(k, 0, "tmp");
    struct store_txn *t = kit_txn(k);
    assert_int_equal(kit_op(k, t, FRAME_OP_CREATE, 0, 0), 0);
    assert_int_equal(kit_op(k, t, FRAME_OP_UNLINK, 0, 0), 0);
    assert_int_equal(kit_op(k, t, FRAME_OP_CREATE, 0, 0), 0);
    assert_int_equal(kit_region(k, t, 0, 1, UINT64_MAX, 4), 0);
    assert_int_equal(kit_pages(k, t, 0, 0, 4, 'k'), 0);
    assert_int_equal(kit_commit(k, t), 0);
    assert_int_equal(kit_byte(k, "tmp", 3), 'k');
}

static void wrong_epochs_are_refused(void **state)
{
    struct kit *k = *state;
    kit_attach(k, 0, "r");
    struct store_txn *t = kit_txn(k);
    assert_int_equal(kit_region(k, t, 0, 1, UINT64_MAX, 10), -ENOENT);
    assert_int_equal(kit_region(k, t, 0, 1, UINT64_MAX, 10), -ENOENT); /* spoiled */
    store_txn_abort(t);
    assert_int_equal(kit_write(k, 0, 1, 10, 'x'), 0);
    assert_int_equal(kit_write(k, 0, 3, 10, 'x'), -EEXIST);
    assert_int_equal(kit_write(k, 0, 4, 10, 'x'), -EEXIST);
    t = kit_txn(k);
    assert_int_equal(kit_pages(k, t, 0, 0, 10, 'x'), -EPROTO);
    store_txn_abort(t);
    t = kit_txn(k);
    assert_int_equal(kit_region(k, t, 9, 2, UINT64_MAX, 10), -ENOENT);
    store_txn_abort(t);
    t = kit_txn(k);
    assert_int_equal(kit_op(k, t, FRAME_OP_CREATE, 0, 0), 0);
    assert_int_equal(kit_commit(k, t), -EPROTO);
    /* Two epochs that both continue the first: the second is refused when it comes to be committed. */
    struct store_txn *one = kit_txn(k), *two = kit_txn(k);
    assert_int_equal(kit_region(k, one, 0, 2, UINT64_MAX, 10), 0);
    assert_int_equal(kit_region(k, two, 0, 2, UINT64_MAX, 20), 0);
    assert_int_equal(kit_commit(k, one), 0);
    assert_int_equal(kit_commit(k, two), -EEXIST);
    assert_int_equal(kit_size(k, "r"), 10);
}

/* Epochs handed in one after the other without waiting: each continues the one before. */
static void epochs_in_a_row(void **state)
{
    struct kit *k = *state;
    kit_attach(k, 0, "r");
    struct told told[50] = {0};
    for (int i = 0; i < 50; i++) {
        struct store_txn *t = kit_txn(k);
        if (!i)
            assert_int_equal(kit_op(k, t, FRAME_OP_CREATE, 0, 0), 0);
        assert_int_equal(kit_region(k, t, 0, (uint64_t)i + 1, UINT64_MAX, 60000), 0);
        assert_int_equal(kit_pages(k, t, 0, 0, 60000, i + 1), 0);
        store_txn_commit(t, kit_durable, &told[i]);
    }
    for (int i = 0; i < 50; i++)
        assert_int_equal(kit_wait(k, &told[i]), 0);
    assert_int_equal(kit_byte(k, "r", 59999), 50);
    again(k);
    assert_int_equal(kit_byte(k, "r", 59999), 50);
}

static void leases(void **state)
{
    struct kit *k = *state;
    uint64_t fence, fence2;
    char holder[256];
    kit_attach(k, 0, "r");
    assert_int_equal(kit_write(k, 0, 1, 10, 'x'), 0);
    assert_int_equal(store_lease(k->s, "r", &k->other, "there", &fence, holder), -EBUSY);
    assert_string_equal(holder, "here");
    assert_int_equal(store_lease(k->s, "r", &k->me, "here", &fence2, holder), 0);
    assert_int_equal(fence2, k->fences[0]);
    struct store_txn *t = kit_txn(k);
    assert_int_equal(kit_region(k, t, 0, 2, UINT64_MAX, 10), 0);
    k->s->limits.lease_ms = 0; /* time is over: still ours until somebody asks */
    assert_int_equal(kit_commit(k, t), 0);
    t = kit_txn(k);
    assert_int_equal(kit_region(k, t, 0, 3, UINT64_MAX, 10), 0);
    assert_int_equal(store_lease(k->s, "r", &k->other, "there", &fence, holder), 0);
    assert_true(fence > fence2);
    k->s->limits.lease_ms = 10000;
    assert_int_equal(kit_commit(k, t), -ESTALE);
    assert_int_equal(kit_write(k, 0, 3, 10, 'y'), -ESTALE);
    store_lease_drop(k->s, "r", &k->me);
    assert_int_equal(store_lease(k->s, "r", &k->me, "here", &fence2, holder), -EBUSY);
    store_lease_drop(k->s, "r", &k->other);
    assert_int_equal(kit_write(k, 0, 3, 10, 'y'), -ESTALE);
    assert_int_equal(store_lease(k->s, "r", &k->me, "here", &fence2, holder), 0);
    assert_int_equal(kit_write(k, 0, 3, 10, 'y'), -ESTALE); /* the right holder, but an old number */
    assert_true(fence2 > fence);
    k->fences[0] = fence2;
    assert_int_equal(kit_write(k, 0, 3, 10, 'y'), 0);
    again(k);
    assert_true(k->mem || k->fences[0] > fence2);
}

static void removal(void **state)
{
    struct kit *k = *state;
    kit_attach(k, 0, "r");
    assert_int_equal(kit_write(k, 0, 1, 10, 'x'), 0);
    struct told told = {0};
    store_remove(k->s, "r", &k->other, false, kit_durable, &told);
    assert_int_equal(kit_wait(k, &told), -EBUSY);
    told = (struct told){0};
    store_remove(k->s, "none", &k->other, false, kit_durable, &told);
    assert_int_equal(kit_wait(k, &told), -ENOENT);
    told = (struct told){0};
    store_remove(k->s, "r", &k->other, true, kit_durable, &told);
    assert_int_equal(kit_wait(k, &told), 0);
    assert_int_equal(kit_size(k, "r"), -ENOENT);
    assert_int_equal(kit_write(k, 0, 1, 10, 'x'), -ESTALE);
    again(k);
    assert_int_equal(kit_size(k, "r"), -ENOENT);
}

static void clashes_and_bad_names(void **state)
{
    static const char *const bad[] = {"",  "/a",  "a/",       "a//b",          "..",  "a/../b",
                                      ".", "./a", ".memsync", ".memsync/meta", "a\nb"};
    struct kit *k = *state;
    struct frame_entry e;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        uint64_t fence;
        char holder[256];
        assert_int_equal(store_lookup(k->s, bad[i], &e, NULL, k->error), -EINVAL);
        assert_int_equal(store_lease(k->s, bad[i], &k->me, "here", &fence, holder), -EINVAL);
    }
    kit_attach(k, 0, "a");
    kit_attach(k, 1, "a/b");
    kit_attach(k, 2, "a.b");
    assert_int_equal(kit_write(k, 0, 1, 10, 'x'), 0);
    assert_int_equal(kit_write(k, 2, 1, 10, 'x'), 0);
    assert_int_equal(store_lookup(k->s, "a/b", &e, NULL, k->error), -EINVAL);
    assert_int_equal(kit_write(k, 1, 1, 10, 'x'), -EINVAL);
    struct store_txn *t = kit_txn(k);
    assert_int_equal(kit_op(k, t, FRAME_OP_UNLINK, 0, 0), 0);
    assert_int_equal(kit_op(k, t, FRAME_OP_CREATE, 1, 0), 0);
    assert_int_equal(kit_region(k, t, 1, 1, UINT64_MAX, 10), 0);
    assert_int_equal(kit_commit(k, t), 0);
    assert_int_equal(store_lookup(k->s, "a", &e, NULL, k->error), -EINVAL);
    assert_int_equal(kit_write(k, 0, 1, 10, 'x'), -EINVAL);
    again(k);
    assert_int_equal(kit_size(k, "a/b"), 10);
}

static void count_entry(void *arg, const struct frame_entry *e)
{
    char *all = arg;
    strcat(all, e->name);
    strcat(all, " ");
}

static void listing_is_sorted(void **state)
{
    struct kit *k = *state;
    static const char *const names[] = {"m", "b/c", "z", "b/a", "a"};
    for (uint32_t i = 0; i < 5; i++) {
        kit_attach(k, i, names[i]);
        assert_int_equal(kit_write(k, i, 1, 1, 'x'), 0);
    }
    char all[64] = "";
    store_list(k->s, count_entry, all);
    assert_string_equal(all, "a b/a b/c m z ");
}

/* Far beyond txn_memory: into its own file when created, through a spill file when not, and none of it through the
 * journal; later pages win. */
static void large_epochs(void **state)
{
    struct kit *k = *state;
    const uint64_t size = 3u << 20;
    kit_attach(k, 0, "big");
    k->credited = 0;
    for (uint64_t epoch = 1; epoch <= 2; epoch++) {
        struct store_txn *t = kit_txn(k);
        if (epoch == 1)
            assert_int_equal(kit_op(k, t, FRAME_OP_CREATE, 0, 0), 0);
        assert_int_equal(kit_region(k, t, 0, epoch, UINT64_MAX, size), 0);
        for (int round = 0; round < 2; round++)
            for (uint64_t at = 0; at < size; at += 32768) {
                assert_int_equal(kit_pages(k, t, 0, at, 32768, (int)epoch * 10 + round), 0);
                uv_run(&k->loop, UV_RUN_NOWAIT);
                while (t->memory > k->limits.txn_memory * 2)
                    uv_run(&k->loop, UV_RUN_ONCE);
            }
        assert_int_equal(kit_pages(k, t, 0, 65536, 65536, 0), 0);
        assert_int_equal(kit_pages(k, t, 0, 131072, 4096, 'l'), 0);
        uint64_t tail = k->s->journal.tail;
        assert_int_equal(kit_commit(k, t), 0);
        assert_true(k->s->journal.tail - tail <= JOURNAL_ALIGN);
        for (int i = 0; i < 2; i++) {
            assert_int_equal(kit_byte(k, "big", 0), (int)epoch * 10 + 1);
            assert_int_equal(kit_byte(k, "big", 65536), 0);
            assert_int_equal(kit_byte(k, "big", 131072), 'l');
            assert_int_equal(kit_byte(k, "big", size - 1), (int)epoch * 10 + 1);
            assert_int_equal(kit_size(k, "big"), size);
            again(k);
        }
    }
}

/* More of them at a time than may write: each gets its turn, and a thread stays free. */
static void many_large_epochs(void **state)
{
    struct kit *k = *state;
    const uint64_t size = 1u << 20;
    struct store_txn *t[12];
    char name[12][8];
    for (uint32_t i = 0; i < 12; i++) {
        snprintf(name[i], sizeof name[i], "r%u", i);
        kit_attach(k, i, name[i]);
        t[i] = kit_txn(k);
        assert_int_equal(kit_op(k, t[i], FRAME_OP_CREATE, i, 0), 0);
        assert_int_equal(kit_region(k, t[i], i, 1, UINT64_MAX, size), 0);
    }
    unsigned most = 0, waited = 0;
    for (uint64_t at = 0; at < size; at += 32768)
        for (uint32_t i = 0; i < 12; i++) {
            assert_int_equal(kit_pages(k, t[i], i, at, 32768, (int)i + 1), 0);
            most = k->s->spilling > most ? k->s->spilling : most;
            waited += t[i]->waiting;
        }
    assert_int_equal(most, 4);
    assert_true(waited);
    store_txn_abort(t[11]);
    for (uint32_t i = 0; i < 11; i++)
        assert_int_equal(kit_commit(k, t[i]), 0);
    for (uint32_t i = 0; i < 11; i++)
        assert_int_equal(kit_byte(k, name[i], size - 1), (int)i + 1);
    assert_int_equal(kit_size(k, "r11"), -ENOENT);
}

static void small_ones_are_credited_at_once(void **state)
{
    struct kit *k = *state;
    kit_attach(k, 0, "r");
    struct store_txn *t = kit_txn(k);
    assert_int_equal(kit_op(k, t, FRAME_OP_CREATE, 0, 0), 0);
    assert_int_equal(kit_region(k, t, 0, 1, UINT64_MAX, 4096), 0);
    assert_int_equal(kit_pages(k, t, 0, 0, 4096, 'x'), 0);
    assert_int_equal(k->credited, 0);
    while (!k->credited)
        uv_run(&k->loop, UV_RUN_ONCE);
    assert_int_equal(k->credited, 4096 + FRAME_PAGES_HEAD + FRAME_PAGES_ENTRY);
    store_txn_abort(t);
    assert_int_equal(kit_size(k, "r"), -ENOENT);
}

static void large_abort_leaves_nothing(void **state)
{
    struct kit *k = *state;
    kit_attach(k, 0, "big");
    struct store_txn *t = kit_txn(k);
    assert_int_equal(kit_op(k, t, FRAME_OP_CREATE, 0, 0), 0);
    assert_int_equal(kit_region(k, t, 0, 1, UINT64_MAX, 1u << 20), 0);
    for (uint32_t at = 0; at < 1u << 20; at += 32768)
        assert_int_equal(kit_pages(k, t, 0, at, 32768, 'x'), 0);
    store_txn_abort(t);
    while (k->s->jobs)
        uv_run(&k->loop, UV_RUN_ONCE);
    assert_int_equal(k->s->memory, 0);
    if (!k->mem)
        assert_int_equal(kit_file_size(k, ".memsync/data/0000000000000001"), -ENOENT);
}

#define BOTH(f)                                                                                                        \
    cmocka_unit_test_setup_teardown(f, setup_file, teardown), cmocka_unit_test_setup_teardown(f, setup_mem, teardown)
#define DISK(f) cmocka_unit_test_setup_teardown(f, setup_file, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        BOTH(round_trip),
        DISK(plain_file_is_exact_after_close),
        BOTH(lowest_size_cuts),
        BOTH(zeros_and_clipping),
        BOTH(deltas_are_checked_before_they_count),
        BOTH(a_page_that_is_cut_is_no_base),
        BOTH(deltas_of_one_batch_build_on_each_other),
        BOTH(pages_move),
        BOTH(moves_wait_for_their_base),
        BOTH(open_moves_wait_too),
        BOTH(moves_are_checked),
        BOTH(moves_from_nowhere),
        BOTH(rename_replaces),
        BOTH(unlink_and_create_anew),
        BOTH(created_and_gone_in_one_epoch),
        BOTH(wrong_epochs_are_refused),
        BOTH(epochs_in_a_row),
        BOTH(leases),
        BOTH(removal),
        BOTH(clashes_and_bad_names),
        BOTH(listing_is_sorted),
        BOTH(large_epochs),
        BOTH(many_large_epochs),
        BOTH(small_ones_are_credited_at_once),
        BOTH(large_abort_leaves_nothing),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
