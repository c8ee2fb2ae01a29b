/* What the local agent remembers of regions: the last line counts, a torn one does not, and the file does not grow for
 * ever. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "agent/sync/record.h"

#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

static char dir[64];

static int fresh_dir(void **state)
{
    (void)state;
    snprintf(dir, sizeof dir, "/tmp/memsync-record-XXXXXX");
    return mkdtemp(dir) ? 0 : -1;
}

static int remove_dir(void **state)
{
    (void)state;
    char name[100];
    snprintf(name, sizeof name, "%s/regions", dir);
    unlink(name);
    return rmdir(dir);
}

static void the_last_line_counts(void **state)
{
    (void)state;
    struct records r;
    struct id a, b;
    char error[512];
    id_new(&a);
    id_new(&b);
    assert_int_equal(records_open(&r, dir, error), 0);
    records_put(&r, "h:1", "x y/z", &a, &(struct source){5, 6}, 10);
    records_put(&r, "h:2", "x y/z", &b, &(struct source){7, 8}, 20);
    records_put(&r, "h:1", "x y/z", &a, &(struct source){5, 6}, 30);
    records_close(&r);
    assert_int_equal(records_open(&r, dir, error), 0);
    const struct record *rec = records_find(&r, "h:1", "x y/z");
    assert_non_null(rec);
    assert_true(id_same(&rec->lineage, &a));
    assert_int_equal(rec->reserved, 30);
    assert_int_equal(rec->source.ino, 5);
    assert_int_equal(records_find(&r, "h:2", "x y/z")->reserved, 20);
    assert_null(records_find(&r, "h:3", "x y/z"));
    records_close(&r);
}

static void a_torn_line_is_passed_over(void **state)
{
    (void)state;
    struct records r;
    struct id a;
    char error[512], name[100];
    id_new(&a);
    assert_int_equal(records_open(&r, dir, error), 0);
    records_put(&r, "h:1", "n", &a, &(struct source){1, 2}, 3);
    records_close(&r);
    snprintf(name, sizeof name, "%s/regions", dir);
    int fd = open(name, O_WRONLY | O_APPEND);
    assert_int_equal(write(fd, "0123-nonsense 5", 15), 15);
    close(fd);
    assert_int_equal(records_open(&r, dir, error), 0);
    assert_int_equal(records_find(&r, "h:1", "n")->reserved, 3);
    records_close(&r);
}

static void the_file_stays_small(void **state)
{
    (void)state;
    struct records r;
    struct id a;
    char error[512], name[100];
    struct stat st;
    id_new(&a);
    assert_int_equal(records_open(&r, dir, error), 0);
    for (uint64_t i = 0; i < 30000; i++)
        assert_int_equal(records_put(&r, "h:1", "n", &a, &(struct source){1, 2}, i), 0);
    records_close(&r);
    snprintf(name, sizeof name, "%s/regions", dir);
    assert_int_equal(stat(name, &st), 0);
    assert_true(st.st_size < 1 << 20);
    assert_int_equal(records_open(&r, dir, error), 0);
    assert_int_equal(records_find(&r, "h:1", "n")->reserved, 29999);
    records_close(&r);
}

static void an_unusable_directory_is_told(void **state)
{
    (void)state;
    struct records r;
    char error[512] = "";
    assert_true(records_open(&r, "/nonexistent/dir", error) < 0);
    assert_non_null(strstr(error, "/nonexistent/dir"));
    records_close(&r);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(the_last_line_counts, fresh_dir, remove_dir),
        cmocka_unit_test_setup_teardown(a_torn_line_is_passed_over, fresh_dir, remove_dir),
        cmocka_unit_test_setup_teardown(the_file_stays_small, fresh_dir, remove_dir),
        cmocka_unit_test(an_unusable_directory_is_told),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
