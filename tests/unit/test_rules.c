/* MEMSYNC_REGIONS: what parses into what, what is refused and how it is said, what matches, and what the regions are
 * called. */
#include "shim/rules.h"

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>

#include <cmocka.h>

static const struct rules_defaults defaults = {.strategy = RULE_AUTO, .ack = CONTROL_ACK_DURABLE, .interval_ms = 1000};
static struct rules rules;

static void must_parse(const char *text)
{
    char error[RULES_ERROR] = "";
    if (rules_parse(&rules, text, &defaults, error))
        fail_msg("'%s' refused: %s", text, error);
}

static void refused(const char *text, const char *part, const char *allowed)
{
    char error[RULES_ERROR] = "";
    must_parse("/before");
    if (rules_parse(&rules, text, &defaults, error) != -EINVAL)
        fail_msg("'%s' was taken", text);
    assert_int_equal(rules.count, 0);
    if (!strstr(error, part) || !strstr(error, allowed) || strchr(error, '\n'))
        fail_msg("'%s': '%s' says nothing of '%s' or '%s'", text, error, part, allowed);
}

static void test_defaults(void **state)
{
    (void)state;
    must_parse("/data/*.mdb");
    assert_int_equal(rules.count, 1);
    const struct rule *r = &rules.rule[0];
    assert_string_equal(r->glob, "/data/*.mdb");
    assert_null(r->name);
    assert_int_equal(r->mode, RULE_PUSH);
    assert_int_equal(r->strategy, RULE_AUTO);
    assert_int_equal(r->terms.ack, CONTROL_ACK_DURABLE);
    assert_int_equal(r->terms.initial, CONTROL_INITIAL_SAFE);
    assert_int_equal(r->terms.interval_ms, 1000);
    assert_string_equal(r->terms.group, "");
    assert_null(r->not_built);
}

static void test_keys(void **state)
{
    (void)state;
    must_parse(" ;/a=push,name=x/%b,strategy=hash,ack=async,interval=250ms,group=g\\,h,initial=pull ;\n/b=none;");
    assert_int_equal(rules.count, 2);
    const struct rule *r = &rules.rule[0];
    assert_string_equal(r->glob, "/a");
    assert_string_equal(r->name, "x/%b");
    assert_int_equal(r->strategy, RULE_HASH);
    assert_int_equal(r->terms.ack, CONTROL_ACK_ASYNC);
    assert_int_equal(r->terms.interval_ms, 250);
    assert_string_equal(r->terms.group, "g,h");
    assert_int_equal(r->terms.initial, CONTROL_INITIAL_PULL);
    assert_int_equal(rules.rule[1].mode, RULE_NONE);
    assert_string_equal(rules.rule[1].glob, "/b");
}

static void test_not_built(void **state)
{
    (void)state;
    static const struct {
        const char *rule, *says;
    } table[] = {
        {"/a=pull", NULL},
        {"/a=pull,order=recorded", NULL},
        {"/a=pull,resident=512M", NULL},
        {"/a=mirror,order=linear", NULL},
        {"/a,strategy=softdirty", NULL},
        {"/a,strategy=kmod", "strategy=kmod"},
        {"/a,strategy=uffd", NULL},
        {"/a,strategy=hash", NULL},
        {"/a,strategy=inotify", NULL},
        {"/a=none,order=none", NULL},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        must_parse(table[i].rule);
        const char *says = rules.rule[0].not_built;
        if (says && table[i].says)
            assert_string_equal(says, table[i].says);
        else
            assert_ptr_equal(says, table[i].says);
    }
}

static void test_resident(void **state)
{
    (void)state;
    static const struct {
        const char *rule;
        uint64_t size;
    } table[] = {
        {"/a=pull", 0},
        {"/a=pull,resident=1", 1},
        {"/a=pull,resident=16K", 16384},
        {"/a=mirror,resident=512M", 512ull << 20},
        {"/a=pull,resident=4G,order=none", 4ull << 30},
        {"/a=pull,resident=16777215T", 16777215ull << 40},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        must_parse(table[i].rule);
        assert_int_equal(rules.rule[0].resident, table[i].size);
        assert_false(rules.rule[0].follow);
    }
    must_parse("/a=pull,follow");
    assert_true(rules.rule[0].follow);
}

static void test_refused(void **state)
{
    (void)state;
    refused("/a=pusj", "'pusj'", "push, pull, mirror, none");
    refused("/ok;/a=", "'/a='", "push, pull, mirror, none");
    refused("data/*.mdb", "'data/*.mdb'", "begin it with '/' or '**'");
    refused("*/x", "'*/x'", "'**'");
    refused("/data/", "'/data/'", "DIR/**");
    refused(",ack=async", "',ack=async'", "begin it with");
    refused("/a,speed=9", "'speed'", "name, strategy, ack, interval, group, initial, resident, order, follow");
    refused("/a,", "''", "keys are");
    refused("/a,ack=sync", "'sync'", "durable, received or async");
    refused("/a,ack", "ack=", "no value");
    refused("/a,ack=", "ack=", "no value");
    refused("/a,ack=async,ack=async", "ack=", "twice");
    refused("/a,strategy=magic", "'magic'", "auto, uffd, softdirty, hash, inotify, fuse, nbd, ublk, cuse, kmod");
    refused("/a,interval=soon", "'soon'", "off or a time");
    refused("/a,interval=forever", "'forever'", "off or a time");
    refused("/a,initial=safe", "'safe'", "push or pull");
    refused("/a=pull,resident=lots", "'lots'", "512M");
    refused("/a=pull,resident=0", "'0'", "512M");
    refused("/a=pull,resident=16777216T", "'16777216T'", "512M");
    refused("/a=pull,resident=4GB", "'4GB'", "512M");
    refused("/a,resident=512M", "resident=", "pull and mirror");
    refused("/a,follow", "follow", "pull");
    refused("/a=mirror,follow", "follow", "pull");
    refused("/a,order=none", "order=", "pull and mirror");
    refused("/a=pull,order=random", "'random'", "fault, linear, recorded or none");
    refused("/a,follow=yes", "follow", "no value");
    refused("/a,name=%q", "'%q'", "%p is the path");
    refused("/a,name=x%", "'%'", "%p is the path");
    refused("/a\\", "'/a\\'", "escapes nothing");
    refused("/a=pu\nsh", "'pu?sh'", "push");
}

static void test_limits(void **state)
{
    (void)state;
    static char text[RULES_TEXT + 8];
    for (unsigned i = 0; i < RULES_MAX; i++)
        memcpy(text + i * 3, "/a;", 4);
    must_parse(text);
    assert_int_equal(rules.count, RULES_MAX);
    memcpy(text + RULES_MAX * 3, "/b", 3);
    refused(text, "'/b'", "64 rules");

    memset(text, 'x', RULES_TEXT);
    text[0] = '/';
    text[RULES_TEXT] = 0;
    refused(text, "16383", "longer");
    text[RULES_TEXT - 1] = 0;
    must_parse(text);

    memcpy(text, "/a,group=", 9);
    refused(text, "group=", "255");
    text[9 + 255] = 0;
    must_parse(text);
    memset(text, 'x', 1000);
    text[1000] = 0;
    refused(text, "...", "begin it with");
}

static void test_globs(void **state)
{
    (void)state;
    static const struct {
        const char *glob, *path;
        bool matches;
    } table[] = {
        {"/data/*.mdb", "/data/x.mdb", true},
        {"/data/*.mdb", "/data/.mdb", true},
        {"/data/*.mdb", "/data/x.mdbx", false},
        {"/data/*.mdb", "/data/sub/x.mdb", false},
        {"/data/*", "/data/x", true},
        {"/data/*", "/data/x/y", false},
        {"/*/x", "/a/x", true},
        {"/*/x", "/a/b/x", false},
        {"/a*b*c", "/aXbYbZc", true},
        {"/a*b*c", "/aXbYbZ", false},
        {"/a?c", "/abc", true},
        {"/a?c", "/a/c", false},
        {"/a?", "/a", false},
        {"/data/**", "/data/x", true},
        {"/data/**", "/data/x/y/z", true},
        {"/data/**", "/data", false},
        {"/data/**", "/database", false},
        {"/data/**/x", "/data/x", true},
        {"/data/**/x", "/data/a/x", true},
        {"/data/**/x", "/data/a/b/x", true},
        {"/data/**/x", "/data/a/bx", false},
        {"/data/**/a*/x", "/data/b/a1/c/x", false},
        {"/data/**/a*/x", "/data/b/a1/c/a2/x", true},
        {"/a/**/m/**/z", "/a/m/m/q/z", true},
        {"/a/**/m/**/z", "/a/q/z", false},
        {"/a/x**y", "/a/xy", true},
        {"/a/x**y", "/a/x/b/y", true},
        {"/a/x**y", "/a/x/b/yz", false},
        {"**/*.npy", "/x.npy", true},
        {"**/*.npy", "/a/b/x.npy", true},
        {"**/*.npy", "/a/b/x.npz", false},
        {"**", "/anything/at/all", true},
        {"/**", "/anything/at/all", true},
        {"/a/***/b", "/a/c/d/b", true},
        {"/**/*a*/**b", "/q/xax/y/zb", true},
        {"/**/*a*/**b", "/q/xax/y/zc", false},
        {"/a\\*b", "/a*b", true},
        {"/a\\*b", "/aXb", false},
        {"/a\\?", "/a?", true},
        {"/a\\?", "/ab", false},
        {"/a\\\\b", "/a\\b", true},
        {"/a\\;b\\,c\\=d", "/a;b,c=d", true},
        {"/a b", "/a b", true},
        {"/a\\ ", "/a ", true},
        {" /a ", "/a", true},
        {"/[ab]", "/a", false},
        {"/[ab]", "/[ab]", true},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        must_parse(table[i].glob);
        if (!!rules_match(&rules, table[i].path) != table[i].matches)
            fail_msg("'%s' and '%s': not %d", table[i].glob, table[i].path, table[i].matches);
        const char *base = strrchr(table[i].path, '/') + 1;
        if (table[i].matches && !rules_may_match(&rules, base))
            fail_msg("'%s' may match nothing called '%s', but does match '%s'", table[i].glob, base, table[i].path);
    }
}

static void test_may_match(void **state)
{
    (void)state;
    static const struct {
        const char *glob, *base;
        bool may;
    } table[] = {
        {"/data/*.mdb", "x.mdb", true},     {"/data/*.mdb", "x.txt", false},
        {"/data/*.mdb", "x.mdb-wal", true}, {"/data/*.mdb", "x.txt-wal", false},
        {"/data/**", "libc.so.6", true},    {"/data/**/x", "x", true},
        {"/data/**/x", "y", false},         {"/data/a**z", "z", true},
        {"/data/a**z", "y", false},         {"/d/x\\*", "x*", true},
        {"/d/x\\*", "xy", false},           {"/d/a\\**", "a*b", true},
        {"/d/a\\**", "ab", false},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        must_parse(table[i].glob);
        if (rules_may_match(&rules, table[i].base) != table[i].may)
            fail_msg("'%s' and '%s': not %d", table[i].glob, table[i].base, table[i].may);
    }
    must_parse("");
    assert_false(rules_may_match(&rules, "x"));
}

static void matches_rule(const char *path, int index)
{
    const struct rule *r = rules_match(&rules, path);
    int got = r ? (int)(r - rules.rule) : -1;
    if (got != index)
        fail_msg("'%s' matched rule %d, not %d", path, got, index);
}

static void test_companions(void **state)
{
    (void)state;
    must_parse("/d/*.db;/d/**=none;/e/lock.mdb;/e/**;/f/\\*-shm;/f/*");
    matches_rule("/d/x.db", 0);
    matches_rule("/d/x.db-wal", 0);
    matches_rule("/d/x.db-journal", 0);
    matches_rule("/d/x.db-walrus", 1);
    matches_rule("/d/x.db-shm", -1);
    matches_rule("/d/-wal", 1);
    matches_rule("/e/lock.mdb", 2);
    matches_rule("/e/sub/lock.mdb", -1);
    matches_rule("/e/data.mdb", 3);
    matches_rule("/e/data.mdb-lock", -1);
    matches_rule("/f/*-shm", 4);
    matches_rule("/f/x-shm", -1);
    matches_rule("/g", -1);
}

static void named(const char *rule, const char *path, const char *expected)
{
    char name[NAME_CAP], error[RULES_ERROR] = "";
    must_parse(rule);
    const struct rule *r = rules_match(&rules, path);
    assert_non_null(r);
    if (rules_name(r, path, "hosta", name, error))
        fail_msg("'%s' of '%s': %s", path, rule, error);
    assert_string_equal(name, expected);
}

static void unnamed(const char *rule, const char *path, const char *why)
{
    char name[NAME_CAP], error[RULES_ERROR] = "";
    must_parse(rule);
    assert_int_equal(rules_name(&rules.rule[0], path, "hosta", name, error), -EINVAL);
    if (!strstr(error, why))
        fail_msg("'%s' of '%s': '%s' says nothing of '%s'", path, rule, error, why);
}

static void test_names(void **state)
{
    (void)state;
    named("/d/*", "/d/x.db", "d/x.db");
    named("/d/*,name=%h/%b", "/d/x.db", "hosta/x.db");
    named("/d/*,name=all/%p.%h.100%%", "/d/x.db", "all/d/x.db.hosta.100%");
    named("/d/x.db,name=main", "/d/x.db", "main");
    named("/d/x.db,name=main", "/d/x.db-wal", "main-wal");
    named("/d/*,name=%b", "/d/x.db-journal", "x.db-journal");
    named("/d/x.db-wal,name=log", "/d/x.db-wal", "log");
    named("/d/*,name=a\\,b\\\\c", "/d/x", "a,b\\c");
    unnamed("/d/*,name=../%b", "/d/x", "\"..\"");
    unnamed("/d/*,name=/%b", "/d/x", "an empty part");
    unnamed("/d/*,name=.memsync/%b", "/d/x", "reserved");
    unnamed("/d/*", "/d/x\ny", "control character");

    static char path[CONTROL_PATH];
    for (size_t i = 0; i + 1 < sizeof path; i++)
        path[i] = i % 200 ? 'x' : '/';
    unnamed("/**,name=%p/%p", path, "longer than 4096");
    unnamed("/**,name=%h%p", path, "is longer than");
}

static void test_times(void **state)
{
    (void)state;
    static const struct {
        const char *text;
        uint64_t ms;
        int rc;
    } table[] = {
        {"10s", 10000, 0},
        {"250ms", 250, 0},
        {"2m", 120000, 0},
        {"1h", 3600000, 0},
        {"7", 7000, 0},
        {"0", 0, 0},
        {"off", 0, 0},
        {"forever", UINT64_MAX, 0},
        {"", 0, -EINVAL},
        {"s", 0, -EINVAL},
        {"-1s", 0, -EINVAL},
        {"1.5s", 0, -EINVAL},
        {"1 s", 0, -EINVAL},
        {"1d", 0, -EINVAL},
        {"1sx", 0, -EINVAL},
        {"Off", 0, -EINVAL},
        {"18446744073709551616", 0, -EINVAL},
        {"18446744073709551615ms", 0, -EINVAL},
        {"18446744073709551614ms", UINT64_MAX - 1, 0},
        {"18446744073709551s", 18446744073709551000u, 0},
        {"18446744073709552s", 0, -EINVAL},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        uint64_t ms = 1;
        int rc = rules_time(table[i].text, &ms);
        if (rc != table[i].rc || (!rc && ms != table[i].ms))
            fail_msg("'%s': %d, %llu", table[i].text, rc, (unsigned long long)ms);
    }
}

static void test_words(void **state)
{
    (void)state;
    enum rule_strategy s;
    uint8_t ack;
    assert_int_equal(rules_strategy("kmod", &s), 0);
    assert_int_equal(s, RULE_KMOD);
    assert_int_equal(rules_strategy("uffd ", &s), -EINVAL);
    assert_int_equal(rules_ack("received", &ack), 0);
    assert_int_equal(ack, CONTROL_ACK_RECEIVED);
    assert_int_equal(rules_ack("", &ack), -EINVAL);
}

/* Against the plainest matcher that can be written, over all that a small alphabet makes. */
static bool plain_match(const char *g, const char *t)
{
    if (!*g)
        return !*t;
    if (g[0] == '*' && g[1] == '*') {
        const char *rest = g + 2 + strspn(g + 2, "*");
        for (const char *at = t;; at++) {
            if (plain_match(rest, at))
                return true;
            if (!*at)
                return false;
        }
    }
    if (*g == '*') {
        for (const char *at = t;; at++) {
            if (plain_match(g + 1, at))
                return true;
            if (!*at || *at == '/')
                return false;
        }
    }
    if (g[0] == '/' && g[1] == '*' && g[2] == '*') {
        const char *rest = g + 1 + strspn(g + 1, "*");
        if (*rest == '/' && plain_match(rest, t))
            return true;
    }
    return *t && (*g == '?' ? *t != '/' : *g == *t) && plain_match(g + 1, t + 1);
}

static void test_globs_plain(void **state)
{
    (void)state;
    uint32_t x = 20;
    for (int i = 0; i < 400000; i++) {
        char glob[12] = "/", path[12] = "/";
        for (size_t n = 1 + (x = x * 1664525u + 1013904223u) / (UINT32_MAX / 9), k = 1; k < n; k++)
            glob[k] = "ab/**?"[(x = x * 1664525u + 1013904223u) / (UINT32_MAX / 6 + 1)];
        for (size_t n = 1 + (x = x * 1664525u + 1013904223u) / (UINT32_MAX / 9), k = 1; k < n; k++)
            path[k] = "ab/"[(x = x * 1664525u + 1013904223u) / (UINT32_MAX / 3 + 1)];
        if (glob[strlen(glob) - 1] == '/')
            continue;
        must_parse(glob);
        bool matches = rules_match(&rules, path);
        if (matches != plain_match(glob, path))
            fail_msg("'%s' and '%s': %d", glob, path, matches);
        if (matches && !rules_may_match(&rules, strrchr(path, '/') + 1))
            fail_msg("'%s' and '%s': matched although it may not", glob, path);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_defaults),  cmocka_unit_test(test_keys),       cmocka_unit_test(test_not_built), cmocka_unit_test(test_resident),
        cmocka_unit_test(test_refused),   cmocka_unit_test(test_limits),     cmocka_unit_test(test_globs),
        cmocka_unit_test(test_may_match), cmocka_unit_test(test_companions), cmocka_unit_test(test_names),
        cmocka_unit_test(test_times),     cmocka_unit_test(test_words),      cmocka_unit_test(test_globs_plain),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
