/* Which region names are good, and what is said of those that are not. */
#include "wire/name.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#include <cmocka.h>

static char *parts(char *to, size_t part, size_t all)
{
    for (size_t i = 0; i < all; i++)
        to[i] = i % (part + 1) == part ? '/' : 'x';
    to[all] = 0;
    return to;
}

static void test_table(void **state)
{
    (void)state;
    static char longest[NAME_CAP + 8], longer[NAME_CAP + 8], part255[256], part256[300], inner256[300];
    parts(longest, 255, NAME_MAX_BYTES - 1);
    parts(longer, 100, NAME_MAX_BYTES + 1);
    parts(part255, 255, 255);
    parts(part256, 256, 256);
    strcpy(inner256, "a/");
    strcat(inner256, part256);
    const struct {
        const char *name, *fault; /* NULL: good */
    } table[] = {
        {"a", NULL},
        {"a/b", NULL},
        {"data/x.mdb", NULL},
        {".hidden", NULL},
        {"...", NULL},
        {"a..b", NULL},
        {"..a", NULL},
        {"a./.b", NULL},
        {"a b", NULL},
        {"\xc3\xa9\xff", NULL},
        {".memsyncs", NULL},
        {".memsyn", NULL},
        {"a/.memsync", NULL},
        {"memsync", NULL},
        {part255, NULL},
        {longest, NULL},
        {"", "empty"},
        {"/a", "empty part"},
        {"a/", "empty part"},
        {"a//b", "empty part"},
        {"/", "empty part"},
        {".", "\"..\""},
        {"..", "\"..\""},
        {"../a", "\"..\""},
        {"a/../b", "\"..\""},
        {"a/..", "\"..\""},
        {"a/./b", "\".\""},
        {".memsync", "reserved"},
        {".memsync/journal", "reserved"},
        {"a\nb", "control"},
        {"a\x7f", "control"},
        {"a\x01/b", "control"},
        {part256, "255"},
        {inner256, "255"},
        {longer, "4096"},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        const char *fault = name_fault(table[i].name);
        if (!fault != !table[i].fault || (fault && !strstr(fault, table[i].fault)))
            fail_msg("'%.80s': %s", table[i].name, fault ? fault : "good");
    }
}

/* Of exactly 4096 bytes, the longest that NAME_CAP holds. */
static void test_longest(void **state)
{
    (void)state;
    static char name[NAME_CAP + 1];
    parts(name, 200, NAME_MAX_BYTES);
    assert_null(name_fault(name));
    name[NAME_MAX_BYTES] = 'x';
    assert_non_null(name_fault(name));
}

int main(void)
{
    const struct CMUnitTest tests[] = {cmocka_unit_test(test_table), cmocka_unit_test(test_longest)};
    return cmocka_run_group_tests(tests, NULL, NULL);
}
