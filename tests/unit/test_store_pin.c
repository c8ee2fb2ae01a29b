/* A pinned region reads as it was, whatever comes after. Over both volumes. */
#include "tests/unit/test_store.h"

#include <xxhash.h>

static int setup_mem(void **state)
{
    struct kit *k = malloc(sizeof *k);
    kit_init(k, true);
    kit_open(k);
    kit_attach(k, 0, "r");
    *state = k;
    return 0;
}

static int setup_file(void **state)
{
    struct kit *k = malloc(sizeof *k);
    kit_init(k, false);
    kit_open(k);
    kit_attach(k, 0, "r");
    *state = k;
    return 0;
}

static int teardown(void **state)
{
    kit_end(*state);
    free(*state);
    return 0;
}

static struct store_pin *pin_it(struct kit *k, uint64_t epoch, uint64_t size)
{
    struct store_pin *pin;
    struct frame_entry e;
    assert_int_equal(store_pin(k->s, "r", &pin, &e), 0);
    assert_int_equal(e.epoch, epoch);
    assert_int_equal(e.size, size);
    return pin;
}

/* The pinned bytes from..to are all fill. */
static void expect_pinned(struct kit *k, struct store_pin *pin, uint64_t from, uint64_t to, int fill)
{
    int err;
    struct buf *b = kit_pin_read(k, pin, from, (uint32_t)(to - from), &err);
    assert_int_equal(err, 0);
    assert_int_equal(b->len, to - from);
    for (uint32_t i = 0; i < b->len; i++)
        if (b->data[i] != fill)
            fail_msg("byte %llu is %u, not %d", (unsigned long long)from + i, b->data[i], fill);
    buf_drop(b);
}

static void survives_changes(void **state)
{
    struct kit *k = *state;
    assert_int_equal(kit_write(k, 0, 1, 100000, 'a'), 0);
    struct store_pin *one = pin_it(k, 1, 100000);
    struct store_txn *t = kit_txn(k);
    assert_int_equal(kit_region(k, t, 0, 2, UINT64_MAX, 100000), 0);
    assert_int_equal(kit_pages(k, t, 0, 5000, 20000, 'b'), 0);
    assert_int_equal(kit_pages(k, t, 0, 60000, 10000, 0), 0);
    assert_int_equal(kit_commit(k, t), 0);
    struct store_pin *two = pin_it(k, 2, 100000);
    assert_int_equal(kit_write(k, 0, 3, 200000, 'c'), 0);
    expect_pinned(k, one, 0, 100000, 'a');
    expect_pinned(k, two, 0, 5000, 'a');
    expect_pinned(k, two, 5000, 25000, 'b');
    expect_pinned(k, two, 60000, 70000, 0);
    expect_pinned(k, two, 70000, 100000, 'a');
    int err;
    struct buf *b = kit_pin_read(k, one, 99990, 100, &err);
    assert_int_equal(b->len, 10);
    buf_drop(b);
    b = kit_pin_read(k, one, 100000, 100, &err);
    assert_int_equal(b->len, 0);
    buf_drop(b);
    store_unpin(one);
    expect_pinned(k, two, 5000, 25000, 'b');
    store_unpin(two);
    assert_int_equal(kit_byte(k, "r", 0), 'c');
}

static void survives_truncation_and_removal(void **state)
{
    struct kit *k = *state;
    assert_int_equal(kit_write(k, 0, 1, 50001, 'a'), 0);
    struct store_pin *one = pin_it(k, 1, 50001);
    struct store_txn *t = kit_txn(k);
    assert_int_equal(kit_region(k, t, 0, 2, 10, 60000), 0);
    assert_int_equal(kit_commit(k, t), 0);
    expect_pinned(k, one, 0, 50001, 'a');
    struct store_pin *two = pin_it(k, 2, 60000);
    t = kit_txn(k);
    assert_int_equal(kit_op(k, t, FRAME_OP_UNLINK, 0, 0), 0);
    assert_int_equal(kit_commit(k, t), 0);
    assert_int_equal(kit_write(k, 0, 1, 70000, 'z'), 0);
    expect_pinned(k, one, 0, 50001, 'a');
    expect_pinned(k, two, 0, 10, 'a');
    expect_pinned(k, two, 10, 60000, 0);
    store_unpin(one);
    store_unpin(two);
    assert_int_equal(kit_byte(k, "r", 0), 'z');
}

/* Pinned while epochs are durable but not in the file yet, and others on their way. */
static void pins_in_a_row_of_epochs(void **state)
{
    struct kit *k = *state;
    struct told told[30] = {0};
    struct store_pin *pins[30] = {0};
    uint64_t epochs[30];
    for (int i = 0; i < 30; i++) {
        struct store_txn *t = kit_txn(k);
        if (!i)
            assert_int_equal(kit_op(k, t, FRAME_OP_CREATE, 0, 0), 0);
        assert_int_equal(kit_region(k, t, 0, (uint64_t)i + 1, UINT64_MAX, 50000), 0);
        assert_int_equal(kit_pages(k, t, 0, 0, 50000, i + 1), 0);
        store_txn_commit(t, kit_durable, &told[i]);
    }
    for (int i = 0; i < 30; i++) {
        assert_int_equal(kit_wait(k, &told[i]), 0);
        struct frame_entry e;
        assert_int_equal(store_pin(k->s, "r", &pins[i], &e), 0);
        assert_true(e.epoch > (uint64_t)i);
        epochs[i] = e.epoch;
    }
    for (int i = 0; i < 30; i++) {
        expect_pinned(k, pins[i], 0, 50000, (int)epochs[i]);
        store_unpin(pins[i]);
    }
}

static void beyond_the_budget_says_so(void **state)
{
    struct kit *k = *state;
    k->s->limits.pin_budget = 100 << 10;
    assert_int_equal(kit_write(k, 0, 1, 300000, 'a'), 0);
    struct store_pin *pin = pin_it(k, 1, 300000);
    struct store_txn *t = kit_txn(k);
    assert_int_equal(kit_region(k, t, 0, 2, UINT64_MAX, 300000), 0);
    assert_int_equal(kit_pages(k, t, 0, 0, 50000, 'b'), 0);
    assert_int_equal(kit_commit(k, t), 0);
    expect_pinned(k, pin, 0, 300000, 'a');
    assert_int_equal(kit_write(k, 0, 3, 300000, 'c'), 0);
    assert_int_equal(kit_byte(k, "r", 0), 'c'); /* applied */
    int err;
    assert_null(kit_pin_read(k, pin, 0, 10, &err));
    assert_int_equal(err, -ENOBUFS);
    store_unpin(pin);
}

static void holes_cost_no_budget(void **state)
{
    struct kit *k = *state;
    struct store_txn *t = kit_txn(k);
    assert_int_equal(kit_op(k, t, FRAME_OP_CREATE, 0, 0), 0);
    assert_int_equal(kit_region(k, t, 0, 1, UINT64_MAX, 1ull << 33), 0);
    assert_int_equal(kit_pages(k, t, 0, (1ull << 32) + 4096, 4096, 'h'), 0);
    assert_int_equal(kit_commit(k, t), 0);
    struct store_pin *pin = pin_it(k, 1, 1ull << 33);
    t = kit_txn(k);
    assert_int_equal(kit_region(k, t, 0, 2, 0, 4096), 0);
    assert_int_equal(kit_commit(k, t), 0);
    assert_int_equal(kit_size(k, "r"), 4096);
    assert_int_equal(kit_byte(k, "r", 0), 0);
    expect_pinned(k, pin, 1ull << 32, (1ull << 32) + 4096, 0);
    expect_pinned(k, pin, (1ull << 32) + 4096, (1ull << 32) + 8192, 'h');
    expect_pinned(k, pin, (1ull << 33) - 100, 1ull << 33, 0);
    store_unpin(pin);
}

static void hashes(void **state)
{
    struct kit *k = *state;
    assert_int_equal(kit_write(k, 0, 1, 3 * 4096 + 100, 'a'), 0);
    struct store_pin *pin = pin_it(k, 1, 3 * 4096 + 100);
    assert_int_equal(kit_write(k, 0, 2, 3 * 4096 + 100, 'b'), 0);
    struct told told = {0};
    store_pin_hash(pin, 1, 100, kit_read_done, &told);
    assert_int_equal(kit_wait(k, &told), 0);
    assert_int_equal(told.data->len, 3 * 16);
    uint8_t page[4096];
    memset(page, 'a', sizeof page);
    XXH128_canonical_t whole, end;
    XXH128_canonicalFromHash(&whole, XXH3_128bits(page, sizeof page));
    XXH128_canonicalFromHash(&end, XXH3_128bits(page, 100));
    assert_memory_equal(told.data->data, &whole, 16);
    assert_memory_equal(told.data->data + 16, &whole, 16);
    assert_memory_equal(told.data->data + 32, &end, 16);
    buf_drop(told.data);
    told = (struct told){0};
    store_pin_hash(pin, 100, 5, kit_read_done, &told);
    assert_int_equal(kit_wait(k, &told), 0);
    assert_int_equal(told.data->len, 0);
    buf_drop(told.data);
    store_unpin(pin);
}

static void no_region_no_pin(void **state)
{
    struct kit *k = *state;
    struct store_pin *pin;
    struct frame_entry e;
    assert_int_equal(store_pin(k->s, "none", &pin, &e), -ENOENT);
    assert_int_equal(store_pin(k->s, "../none", &pin, &e), -EINVAL);
}

#define BOTH(f)                                                                                                        \
    cmocka_unit_test_setup_teardown(f, setup_file, teardown), cmocka_unit_test_setup_teardown(f, setup_mem, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        BOTH(survives_changes),        BOTH(survives_truncation_and_removal),
        BOTH(pins_in_a_row_of_epochs), BOTH(beyond_the_budget_says_so),
        BOTH(holes_cost_no_budget),    BOTH(hashes),
        BOTH(no_region_no_pin),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
