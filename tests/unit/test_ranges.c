/* The table of mapped ranges: cuts, joins, splits, and the same as a plain array of pages after random changes. */
#include "shim/ranges.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define PAGES 96

static struct range memory[PAGES * 2 + 4];
static struct ranges table;

static int fresh(void **state)
{
    (void)state;
    memset(memory, 0, sizeof memory);
    table = (struct ranges){.at = memory, .cap = sizeof memory / sizeof *memory};
    return 0;
}

static void put(uint64_t start, uint64_t end, uint64_t offset, uint32_t region)
{
    struct range r = {.start = start, .end = end, .offset = offset, .region = region};
    ranges_insert(&table, &r);
}

static void holds(size_t i, uint64_t start, uint64_t end, uint64_t offset)
{
    assert_true(i < table.count);
    assert_int_equal(table.at[i].start, start);
    assert_int_equal(table.at[i].end, end);
    assert_int_equal(table.at[i].offset, offset);
}

static void test_cut_in_the_middle(void **state)
{
    (void)state;
    put(100, 200, 1000, 1);
    ranges_cut(&table, 130, 150);
    assert_int_equal(table.count, 2);
    holds(0, 100, 130, 1000);
    holds(1, 150, 200, 1050);
}

static void test_cut_over_several(void **state)
{
    (void)state;
    put(100, 200, 0, 1);
    put(200, 300, 0, 2);
    put(400, 500, 0, 3);
    ranges_cut(&table, 150, 450);
    assert_int_equal(table.count, 2);
    holds(0, 100, 150, 0);
    holds(1, 450, 500, 50);
    ranges_cut(&table, 0, UINT64_MAX);
    assert_int_equal(table.count, 0);
}

static void test_neighbours_join(void **state)
{
    (void)state;
    put(100, 200, 0, 1);
    put(300, 400, 200, 1);
    put(200, 300, 100, 1);
    assert_int_equal(table.count, 1);
    holds(0, 100, 400, 0);
}

static void test_others_do_not_join(void **state)
{
    (void)state;
    put(100, 200, 0, 1);
    put(200, 300, 0, 1);   /* another offset */
    put(300, 400, 100, 2); /* another region */
    struct range armed = {.start = 400, .end = 500, .offset = 200, .region = 2, .state = RANGE_UFFD};
    ranges_insert(&table, &armed);
    assert_int_equal(table.count, 4);
}

static void test_find(void **state)
{
    (void)state;
    put(100, 200, 0, 1);
    assert_null(ranges_find(&table, 0, 100));
    assert_null(ranges_find(&table, 200, 300));
    assert_non_null(ranges_find(&table, 0, 101));
    assert_non_null(ranges_find(&table, 199, 300));
    assert_int_equal(ranges_of(&table, 1), 1);
    assert_int_equal(ranges_of(&table, 2), 0);
}

static void test_split_keeps_everything(void **state)
{
    (void)state;
    put(100, 200, 7, 1);
    ranges_split(&table, 120, 180);
    assert_int_equal(table.count, 3);
    holds(1, 120, 180, 27);
    ranges_split(&table, 120, 180);
    assert_int_equal(table.count, 3);
    ranges_split(&table, 100, 200);
    assert_int_equal(table.count, 3);
}

static void test_same_as_an_array(void **state)
{
    (void)state;
    int64_t model[PAGES]; /* the file page under an address page, -1 for none */
    memset(model, 0xff, sizeof model);
    srandom(7);
    for (int round = 0; round < 20000; round++) {
        uint64_t start = (uint64_t)random() % PAGES, len = 1 + (uint64_t)random() % (PAGES - start);
        uint64_t offset = (uint64_t)random() % 8;
        ranges_cut(&table, start, start + len);
        bool insert = random() & 1;
        if (insert)
            put(start, start + len, offset, 1);
        for (uint64_t p = start; p < start + len; p++)
            model[p] = insert ? (int64_t)(offset + p - start) : -1;
        for (uint64_t p = 0; p < PAGES; p++) {
            const struct range *r = ranges_find(&table, p, p + 1);
            int64_t is = r ? (int64_t)(r->offset + p - r->start) : -1;
            if (is != model[p])
                fail_msg("round %d page %d: %d instead of %d", round, (int)p, (int)is, (int)model[p]);
        }
        for (size_t i = 0; i + 1 < table.count; i++)
            assert_true(table.at[i].start < table.at[i].end && table.at[i].end <= table.at[i + 1].start);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(test_cut_in_the_middle, fresh),
        cmocka_unit_test_setup(test_cut_over_several, fresh),
        cmocka_unit_test_setup(test_neighbours_join, fresh),
        cmocka_unit_test_setup(test_others_do_not_join, fresh),
        cmocka_unit_test_setup(test_find, fresh),
        cmocka_unit_test_setup(test_split_keeps_everything, fresh),
        cmocka_unit_test_setup(test_same_as_an_array, fresh),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
