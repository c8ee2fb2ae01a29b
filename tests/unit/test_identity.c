/* An agent's identity: made once, whoever starts at once. And addresses as users type them. */
#include "agent/base/identity.h"
#include "agent/net/addr.h"

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <cmocka.h>

static char root[64], dir[96];

static int set_up(void **state)
{
    (void)state;
    snprintf(root, sizeof root, "/tmp/test_identity.XXXXXX");
    if (!mkdtemp(root))
        return -1;
    snprintf(dir, sizeof dir, "%s/a/b", root);
    return 0;
}

static int tear_down(void **state)
{
    (void)state;
    char path[128];
    snprintf(path, sizeof path, "%s/identity", dir);
    unlink(path);
    rmdir(dir);
    *strrchr(dir, '/') = 0;
    rmdir(dir);
    return rmdir(root); /* fails when something was left beside the identity */
}

static void stays(void **state)
{
    (void)state;
    struct id first, again;
    struct stat st;
    char error[512];
    assert_int_equal(identity_load(dir, &first, error), 0);
    assert_int_equal(identity_load(dir, &again, error), 0);
    assert_false(id_none(&first));
    assert_true(id_same(&first, &again));
    assert_int_equal(stat(dir, &st), 0);
    assert_int_equal(st.st_mode & 0777, 0700);
}

static void one_for_all_starters(void **state)
{
    (void)state;
    int fds[2];
    assert_int_equal(pipe(fds), 0);
    for (int i = 0; i < 8; i++)
        if (!fork()) {
            struct id id;
            char error[512];
            int rc = identity_load(dir, &id, error);
            _exit(rc || write(fds[1], &id, sizeof id) != sizeof id);
        }
    for (int i = 0, status; i < 8; i++) {
        assert_true(wait(&status) > 0);
        assert_int_equal(status, 0);
    }
    struct id first, id;
    assert_int_equal(read(fds[0], &first, sizeof first), sizeof first);
    for (int i = 1; i < 8; i++) {
        assert_int_equal(read(fds[0], &id, sizeof id), sizeof id);
        assert_true(id_same(&id, &first));
    }
    close(fds[0]);
    close(fds[1]);
}

static void bad_ones_are_named(void **state)
{
    (void)state;
    struct id id;
    char error[512], path[128];
    assert_int_equal(identity_load(dir, &id, error), 0);
    snprintf(path, sizeof path, "%s/identity", dir);
    int fd = open(path, O_WRONLY | O_TRUNC);
    assert_int_equal(write(fd, "no uuid\n", 8), 8);
    close(fd);
    assert_int_equal(identity_load(dir, &id, error), -EBADMSG);
    assert_non_null(strstr(error, path));
    assert_int_equal(identity_load("/proc/nothing", &id, error), -ENOENT);
    assert_non_null(strstr(error, "/proc/nothing"));
    assert_int_equal(identity_load(path, &id, error), -ENOTDIR);
}

static void others_directories_are_refused(void **state)
{
    (void)state;
    if (geteuid())
        skip();
    struct id id;
    char error[512];
    assert_int_equal(identity_load(dir, &id, error), 0);
    pid_t child = fork();
    if (!child) {
        if (chmod(root, 0755) || setuid(65534))
            _exit(2);
        char up[128];
        snprintf(up, sizeof up, "%s/a", root); /* not theirs, not even readable */
        _exit(identity_load(up, &id, error) == -EPERM ? 0 : 1);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
}

static void default_directory(void **state)
{
    (void)state;
    char to[256];
    setenv("XDG_STATE_HOME", "/x", 1);
    setenv("HOME", "/h", 1);
    assert_int_equal(identity_default_dir(to, sizeof to), 0);
    assert_string_equal(to, "/x/memsync");
    setenv("XDG_STATE_HOME", "relative", 1);
    assert_int_equal(identity_default_dir(to, sizeof to), 0);
    assert_string_equal(to, "/h/.local/state/memsync");
    assert_int_equal(identity_default_dir(to, 10), -ENAMETOOLONG);
    unsetenv("HOME");
    assert_int_equal(identity_default_dir(to, sizeof to), 0);
    if (!geteuid())
        assert_string_equal(to, "/var/lib/memsync");
    else
        assert_non_null(strstr(to, "-state"));
}

static void addresses(void **state)
{
    (void)state;
    static const struct {
        const char *text, *host, *port;
        bool loopback;
    } good[] = {
        {"127.0.0.1:7070", "127.0.0.1", "7070", true}, {"localhost:0", "localhost", "0", true},
        {"[::1]:65535", "::1", "65535", true},         {"127.9.9.9:1", "127.9.9.9", "1", true},
        {"0.0.0.0:1", "0.0.0.0", "1", false},          {"[::]:1", "::", "1", false},
        {"10.0.0.1:1", "10.0.0.1", "1", false},
    };
    static const char *const bad[] = {"",        ":",     "host",  "host:", ":1",     "host:65536",
                                      "host:1x", "::1:1", "[::1]", "[]:1",  "[::1:1", "unix:"};
    struct addr a;
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        assert_int_equal(addr_parse(&a, good[i].text), 0);
        assert_string_equal(a.host, good[i].host);
        assert_string_equal(a.port, good[i].port);
        assert_int_equal(addr_loopback(&a), good[i].loopback);
    }
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        assert_int_equal(addr_parse(&a, bad[i]), -EINVAL);
    assert_int_equal(addr_parse(&a, "unix:/a:b"), 0);
    assert_true(a.is_unix && addr_loopback(&a));
    assert_string_equal(a.path, "/a:b");
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(stays, set_up, tear_down),
        cmocka_unit_test_setup_teardown(one_for_all_starters, set_up, tear_down),
        cmocka_unit_test_setup_teardown(bad_ones_are_named, set_up, tear_down),
        cmocka_unit_test_setup_teardown(others_directories_are_refused, set_up, tear_down),
        cmocka_unit_test(default_directory),
        cmocka_unit_test(addresses),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
