/* Block device URIs: what is taken as what, and what is refused and why. */
#include "wire/nbd_uri.h"

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <cmocka.h>

static const char *host, *port, *path, *name;

static void good(const char *text)
{
    static struct nbd_uri u;
    const char *why;
    if (nbd_uri_parse(&u, text, &why))
        fail_msg("%s: %s", text, why);
    assert_true(nbd_uri_is(text));
    assert_string_equal(u.host, host);
    assert_string_equal(u.port, port);
    assert_string_equal(u.path, path);
    assert_string_equal(u.name, name);
    assert_int_equal(u.is_unix, *path != 0);
}

static void test_taken(void **state)
{
    (void)state;
    static const struct {
        const char *text, *host, *port, *path, *name;
    } table[] = {
        {"nbd://h", "h", "10809", "", ""},
        {"nbd://h/", "h", "10809", "", ""},
        {"nbd://10.0.0.1:7/disk", "10.0.0.1", "7", "", "disk"},
        {"nbd://h:65535/a/b//c", "h", "65535", "", "a/b//c"},
        {"nbd://[::1]/x", "::1", "10809", "", "x"},
        {"nbd://[fe80::1%25eth0]:9/x", "fe80::1%eth0", "9", "", "x"},
        {"nbd://h/%C3%a9%20%3F%2f%23x", "h", "10809", "", "\xc3\xa9 ?/#x"},
        {"nbd+unix:///?socket=/tmp/s", "", "10809", "/tmp/s", ""},
        {"nbd+unix://?socket=rel", "", "10809", "rel", ""},
        {"nbd+unix:///a%3Fb?socket=/tmp/a%26b", "", "10809", "/tmp/a&b", "a?b"},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        host = table[i].host, port = table[i].port, path = table[i].path, name = table[i].name;
        good(table[i].text);
    }
}

static void test_refused(void **state)
{
    (void)state;
    static struct nbd_uri u;
    static const struct {
        const char *text, *why;
        int err;
    } table[] = {
        {"nbds://h/x", "TLS", -EPROTONOSUPPORT},
        {"nbds+unix:///x?socket=s", "TLS", -EPROTONOSUPPORT},
        {"nbd+vsock://1/x", "vsock", -EPROTONOSUPPORT},
        {"", "none of", -EINVAL},
        {"h:10809", "none of", -EINVAL},
        {"nbd:h:10809", "none of", -EINVAL},
        {"nbd:/h/x", "none of", -EINVAL},
        {"NBD://h/x", "none of", -EINVAL},
        {"nbd://", "host is missing", -EINVAL},
        {"nbd:///x", "host is missing", -EINVAL},
        {"nbd://:5/x", "host is missing", -EINVAL},
        {"nbd://[]:5/x", "host is missing", -EINVAL},
        {"nbd://[::1/x", "bracket", -EINVAL},
        {"nbd://[::1]5/x", "between", -EINVAL},
        {"nbd://::1/x", "brackets", -EINVAL},
        {"nbd://h:/x", "port", -EINVAL},
        {"nbd://h:0/x", "port", -EINVAL},
        {"nbd://h:65536/x", "port", -EINVAL},
        {"nbd://h:123456/x", "port", -EINVAL},
        {"nbd://h:-1/x", "port", -EINVAL},
        {"nbd://h:1x/x", "port", -EINVAL},
        {"nbd://me@h/x", "user", -EINVAL},
        {"nbd://h%/x", "host is out", -EINVAL},
        {"nbd://h%00/x", "host is out", -EINVAL},
        {"nbd://h/%", "name is out", -EINVAL},
        {"nbd://h/%2", "name is out", -EINVAL},
        {"nbd://h/%g0", "name is out", -EINVAL},
        {"nbd://h/a%00b", "name is out", -EINVAL},
        {"nbd://h/a%0ab", "name is out", -EINVAL},
        {"nbd://h/x#y", "%23", -EINVAL},
        {"nbd://h/x?socket=s", "is for nbd+unix", -EINVAL},
        {"nbd://h/x?tls-certificates=d", "only socket=", -EINVAL},
        {"nbd+unix:///x", "needs", -EINVAL},
        {"nbd+unix:///x?", "needs", -EINVAL},
        {"nbd+unix:///x?socket=", "needs", -EINVAL},
        {"nbd+unix:///x?socket=a&socket=b", "twice", -EINVAL},
        {"nbd+unix:///x?socket=%0", "path is out", -EINVAL},
        {"nbd+unix://h/x?socket=s", "no host", -EINVAL},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        const char *why = NULL;
        int err = nbd_uri_parse(&u, table[i].text, &why);
        if (err != table[i].err || !strstr(why, table[i].why))
            fail_msg("%s: %d, %s", table[i].text, err, why);
    }
    assert_true(nbd_uri_is("nbds://h") && nbd_uri_is("nbd+vsock://1") && nbd_uri_is("nbd:h"));
    assert_false(nbd_uri_is("h:10809") || nbd_uri_is("mem:") || nbd_uri_is("nbdhost:5"));
}

/* The longest of each, and one more; every beginning of a text, in memory of just its size. */
static void test_lengths(void **state)
{
    (void)state;
    static struct nbd_uri u;
    static char text[20000];
    const char *why;
    for (int more = 0; more < 2; more++) {
        snprintf(text, sizeof text, "nbd://%0*d/x", 255 + more, 7);
        assert_int_equal(nbd_uri_parse(&u, text, &why), more ? -EINVAL : 0);
        snprintf(text, sizeof text, "nbd://h/%0*d", (int)NBD_NAME_MAX + more, 7);
        assert_int_equal(nbd_uri_parse(&u, text, &why), more ? -EINVAL : 0);
        snprintf(text, sizeof text, "nbd+unix:///x?socket=%0*d", (int)NBD_URI_PATH - 1 + more, 7);
        assert_int_equal(nbd_uri_parse(&u, text, &why), more ? -EINVAL : 0);
    }
    static const char *const whole[] = {"nbd://[fe80::1%25e]:109/a%20b%", "nbd+unix:///a%41?socket=%2ftmp%"};
    for (size_t i = 0; i < 2; i++) {
        for (size_t n = 0; n <= strlen(whole[i]); n++) {
            char *cut = strndup(whole[i], n);
            (void)nbd_uri_parse(&u, cut, &why);
            free(cut);
        }
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_taken),
        cmocka_unit_test(test_refused),
        cmocka_unit_test(test_lengths),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
