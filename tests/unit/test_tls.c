/* The steps of TLS, without sockets: two ends and the bytes between them. */
#include "agent/net/grants.h"
#include "agent/net/tls.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cmocka.h>

#define KEY "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"
#define OTHER "ff0102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"

static char dir[] = "/tmp/memsync-tls-XXXXXX";
static struct tls_config *server, *client, *other;

static const char *file(const char *name, const char *text)
{
    static char path[256];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "w");
    assert_non_null(f);
    fputs(text, f);
    fclose(f);
    chmod(path, 0600);
    return path;
}

static int setup(void **state)
{
    (void)state;
    char error[TLS_ERROR];
    assert_non_null(mkdtemp(dir));
    server = tls_config_load(true, NULL, file("server", "# two\nbob:" OTHER "\nalice:" KEY "\n"), error);
    client = tls_config_load(false, NULL, file("client", "alice:" KEY "\n"), error);
    other = tls_config_load(false, NULL, file("other", "alice:" OTHER "\n"), error);
    return !server || !client || !other;
}

static int teardown(void **state)
{
    (void)state;
    tls_config_free(server);
    tls_config_free(client);
    tls_config_free(other);
    char command[300];
    snprintf(command, sizeof command, "rm -r %s", dir);
    return system(command);
}

/* Moves what `from` has to send, in pieces of `step`; plaintext that comes out goes behind `to`. */
static size_t move(struct tls *from, struct tls *at, uint8_t *to, size_t cap, size_t step)
{
    const uint8_t *bytes;
    size_t got = 0;
    for (size_t len; (len = tls_out(from, &bytes));) {
        static uint8_t copy[1 << 20];
        size_t n = len < step ? len : step;
        memcpy(copy, bytes, n);
        tls_sent(from, n);
        if (tls_feed(at, copy, n))
            return got;
        for (ssize_t more; (more = tls_take(at, to + got, cap - got)) > 0;)
            got += (size_t)more;
    }
    return got;
}

static void shake(struct tls *c, struct tls *s, size_t step)
{
    uint8_t none[1];
    (void)tls_feed(c, NULL, 0);
    for (int i = 0; i < 4; i++) {
        move(c, s, none, 0, step);
        move(s, c, none, 0, step);
    }
}

static void carries(void **state)
{
    (void)state;
    static uint8_t in[3 << 18], out[3 << 18];
    for (size_t step = 1; step <= 100000; step *= 10) {
        struct tls *c = tls_new(client, "host"), *s = tls_new(server, NULL);
        assert_int_not_equal(tls_put(c, in, 1), 0); /* nobody is known yet */
        shake(c, s, step);
        assert_true(tls_ready(c) && tls_ready(s));
        assert_string_equal(tls_peer(s), "alice");
        size_t len = step == 1 ? 50000 : sizeof in, at = 0;
        for (size_t i = 0; i < len; i++)
            in[i] = (uint8_t)(i * 2654435761u >> 13);
        for (size_t n = 1; at < len; at += n, n = n * 3 % 40961 + 1) {
            n = n < len - at ? n : len - at;
            assert_int_equal(tls_put(c, in + at, n), 0);
        }
        assert_int_equal(tls_flush(c), 0);
        const uint8_t *bytes;
        size_t wire = tls_out(c, &bytes);
        assert_true(wire > len);
        assert_null(memmem(bytes, wire, in + 1000, 16));
        assert_int_equal(move(c, s, out, sizeof out, step), len);
        assert_memory_equal(in, out, len);
        assert_int_equal(tls_put(s, (const uint8_t *)"back", 4), 0);
        assert_int_equal(tls_flush(s), 0);
        assert_int_equal(move(s, c, out, sizeof out, step), 4);
        assert_false(tls_ended(s));
        tls_bye(c);
        move(c, s, out, sizeof out, step);
        assert_true(tls_ended(s) && !tls_failed(s));
        tls_free(c);
        tls_free(s);
    }
}

static void refuses_key(void **state)
{
    (void)state;
    struct tls *c = tls_new(other, "host"), *s = tls_new(server, NULL);
    shake(c, s, 1000);
    assert_true(tls_failed(s) && tls_failed(c)); /* an alert has told it */
    assert_false(tls_ready(s) || tls_ready(c));
    assert_null(tls_peer(s));
    tls_free(c);
    tls_free(s);
}

static void refuses_plain(void **state)
{
    (void)state;
    struct tls *s = tls_new(server, NULL);
    assert_int_not_equal(tls_feed(s, (const uint8_t *)"MS plain", 8), 0);
    assert_string_equal(tls_why(s), "it speaks no TLS");
    tls_free(s);
}

static void refuses_changed(void **state)
{
    (void)state;
    uint8_t out[64], copy[256];
    const uint8_t *bytes;
    for (size_t at = 0; at < 26; at++) { /* 5 + 4 + 1 + 16 */
        struct tls *c = tls_new(client, "host"), *s = tls_new(server, NULL);
        shake(c, s, 4096);
        assert_int_equal(tls_put(c, (const uint8_t *)"text", 4), 0);
        assert_int_equal(tls_flush(c), 0);
        size_t len = tls_out(c, &bytes);
        assert_int_equal(len, 26);
        memcpy(copy, bytes, len);
        copy[at] ^= 1;
        assert_true(tls_feed(s, copy, len) || tls_take(s, out, sizeof out) <= 0);
        assert_true(tls_failed(s) || at == 3 || at == 4); /* a longer record is waited for */
        tls_free(c);
        tls_free(s);
    }
}

static void refuses_replay(void **state)
{
    (void)state;
    static uint8_t recorded[1 << 16];
    uint8_t none[1];
    const uint8_t *bytes;
    struct tls *c = tls_new(client, "host"), *s = tls_new(server, NULL), *again = tls_new(server, NULL);
    assert_int_equal(tls_feed(c, NULL, 0), 0);
    size_t hello = tls_out(c, &bytes), len = hello;
    memcpy(recorded, bytes, hello);
    move(c, s, none, 0, 4096);
    move(s, c, none, 0, 4096);
    len += tls_out(c, &bytes);
    memcpy(recorded + hello, bytes, len - hello);
    move(c, s, none, 0, 4096);
    assert_true(tls_ready(s));
    assert_true(tls_feed(again, recorded, hello) == 0);
    (void)tls_feed(again, recorded + hello, len - hello);
    assert_true(tls_failed(again) && !tls_ready(again));
    tls_free(c);
    tls_free(s);
    tls_free(again);
}

static void reads_keys(void **state)
{
    (void)state;
    static const char *const bad[] = {"", "alice\n", "alice:\n", "alice:00\n", "alice:0x" KEY "\n", ":" KEY "\n",
                                      "a b:" KEY "\n", "alice:" KEY KEY KEY "\n", "alice:" KEY "0\n"};
    char error[TLS_ERROR];
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        *error = 0;
        assert_null(tls_config_load(true, NULL, file("bad", bad[i]), error));
        assert_true(*error);
    }
    chmod(file("open", "alice:" KEY "\n"), 0640);
    char path[300];
    snprintf(path, sizeof path, "%s/open", dir);
    assert_null(tls_config_load(true, NULL, path, error));
    assert_non_null(strstr(error, "chmod 600"));
}

static void globs(void **state)
{
    (void)state;
    static const struct {
        const char *glob, *name;
        bool fits;
    } all[] = {
        {"a", "a", true},       {"a", "ab", false},     {"*", "a", true},         {"*", "a/b", false},
        {"**", "a/b/c", true},  {"a/*", "a/b", true},   {"a/*", "a/b/c", false},  {"a/**", "a/b/c", true},
        {"a/**", "ab/c", false}, {"?", "/", false},     {"a?c", "abc", true},     {"**/x", "a/b/x", true},
        {"**/x", "a/b/y", false}, {"*.db", "a.db", true}, {"*b*d", "abcd", true}, {"a*/c", "abb/c", true},
        {"a*c", "a/c", false},  {"**b*d", "a/bcb/bd", true}, {"**/*.db", "a/b/c.db", true}, {"", "", true},
        {"a/**/c", "a/b/b/c", true}, {"*a", "aaa", true}, {"**a/b*", "xa/ya/bz", true}, {"a", "", false},
    };
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        if (grants_glob(all[i].glob, all[i].name) != all[i].fits)
            fail_msg("%s %s", all[i].glob, all[i].name);
}

static void grants(void **state)
{
    (void)state;
    char error[GRANTS_ERROR];
    struct grants *g = grants_load(file("grants", "# x\n\nalice a/** read,write\n* b read\nalice b admin\nanonymous c read\n"), error);
    assert_non_null(g);
    assert_int_equal(grants_of(g, "alice", "a/x"), GRANT_READ | GRANT_WRITE);
    assert_int_equal(grants_of(g, "alice", "b"), GRANT_READ | GRANT_ADMIN);
    assert_int_equal(grants_of(g, "bob", "b"), GRANT_READ);
    assert_int_equal(grants_of(g, "bob", "a/x"), 0);
    assert_int_equal(grants_of(g, NULL, "b"), 0);
    assert_int_equal(grants_of(g, NULL, "c"), GRANT_READ);
    assert_int_equal(grants_of(g, "alice", "c"), 0);
    file("grants", "alice a read\nalice b reed\n");
    assert_int_not_equal(grants_reload(g, error), 0);
    assert_non_null(strstr(error, "line 2"));
    assert_int_equal(grants_of(g, "bob", "b"), GRANT_READ);
    file("grants", "bob a read\n");
    assert_int_equal(grants_reload(g, error), 0);
    assert_int_equal(grants_of(g, "bob", "b"), 0);
    grants_free(g);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(carries),         cmocka_unit_test(refuses_key), cmocka_unit_test(refuses_plain),
        cmocka_unit_test(refuses_changed), cmocka_unit_test(refuses_replay), cmocka_unit_test(reads_keys),
        cmocka_unit_test(globs),           cmocka_unit_test(grants),
    };
    return cmocka_run_group_tests(tests, setup, teardown);
}
