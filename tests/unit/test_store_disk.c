/* What the disk and other people do to a file: store: full, locked, symlinks, strange files, limits. */
#include "tests/unit/test_store.h"

#include <sys/mount.h>
#include <sys/resource.h>

static int setup(void **state)
{
    struct kit *k = malloc(sizeof *k);
    kit_init(k, false);
    *state = k;
    return 0;
}

static int teardown(void **state)
{
    kit_end(*state);
    free(*state);
    return 0;
}

static void shell(struct kit *k, const char *command)
{
    char line[400];
    snprintf(line, sizeof line, "cd %s && %s", k->dir, command);
    assert_int_equal(system(line), 0);
}

static void one_agent_a_directory(void **state)
{
    struct kit *k = *state;
    kit_open(k);
    struct store *second;
    char pid[32];
    assert_int_equal(store_open_with(&second, &k->loop, k->url, &k->limits, k->error), -EBUSY);
    snprintf(pid, sizeof pid, "pid %d", getpid());
    assert_non_null(strstr(k->error, pid));
    kit_close(k);
    kit_open(k);
}

static void directory_is_made(void **state)
{
    struct kit *k = *state;
    snprintf(k->url + strlen(k->url), 16, "/x/y");
    kit_open(k);
    kit_attach(k, 0, "r");
    assert_int_equal(kit_write(k, 0, 1, 3, 'x'), 0);
    kit_close(k);
    assert_int_equal(kit_file_size(k, "x/y/r"), 3);
}

static void bad_stores_are_named(void **state)
{
    struct kit *k = *state;
    struct store *s;
    assert_int_equal(store_open(&s, &k->loop, "s3://bucket", k->error), -ENOTSUP);
    assert_non_null(strstr(k->error, "not built"));
    assert_int_equal(store_open(&s, &k->loop, "nonsense", k->error), -EINVAL);
    assert_int_equal(store_open(&s, &k->loop, "file:/proc/none", k->error), -ENOENT);
    assert_non_null(strstr(k->error, "/proc/none"));
}

static void nothing_leads_out(void **state)
{
    struct kit *k = *state;
    shell(k,
          "mkdir s outside && ln -s ../outside s/link && ln -s ../outside/file s/file && echo precious > outside/file");
    strcat(k->url, "/s");
    kit_open(k);
    kit_attach(k, 0, "link/file");
    kit_attach(k, 1, "file");
    assert_int_equal(kit_write(k, 0, 1, 3, 'x'), -EINVAL);
    assert_non_null(strstr(k->error, "symlink"));
    assert_int_equal(kit_write(k, 1, 1, 3, 'x'), -EINVAL);
    shell(k, "[ \"$(cat outside/file)\" = precious ] && [ $(ls outside | wc -l) = 1 ]");
    /* Set while we run, in place of a region's file and directory. */
    kit_attach(k, 2, "mine");
    kit_attach(k, 3, "dir/mine");
    assert_int_equal(kit_write(k, 2, 1, 3, 'x'), 0);
    assert_int_equal(kit_write(k, 3, 1, 3, 'x'), 0);
    assert_int_equal(kit_byte(k, "mine", 0), 'x');
    assert_int_equal(kit_byte(k, "dir/mine", 0), 'x');
    shell(k, "rm -r s/mine s/dir && ln -s ../outside/file s/mine && ln -s ../outside s/dir");
    assert_int_equal(kit_write(k, 2, 2, 4, 'y'), 0);
    assert_int_equal(kit_write(k, 3, 2, 4, 'y'), 0);
    assert_int_equal(kit_byte(k, "dir/mine", 0), 'y');
    kit_close(k);
    shell(k, "[ \"$(cat outside/file)\" = precious ] && [ $(ls outside | wc -l) = 1 ]");
    kit_open(k); /* content was kept, and the names are shown where that is possible */
    assert_int_equal(kit_byte(k, "mine", 3), 'y');
    assert_int_equal(kit_byte(k, "dir/mine", 3), 'y');
    kit_close(k);
    shell(k, "[ \"$(cat s/mine)\" = yyyy ]");
}

static void strange_files_are_left_alone(void **state)
{
    struct kit *k = *state;
    shell(k, "echo precious > there && mkdir dir && echo precious > dir/x");
    kit_open(k);
    kit_attach(k, 0, "there");
    kit_attach(k, 1, "dir");
    kit_attach(k, 2, "dir/y");
    assert_int_equal(kit_write(k, 0, 1, 3, 'x'), -EINVAL);
    assert_non_null(strstr(k->error, "no region of this store"));
    assert_int_equal(kit_write(k, 1, 1, 3, 'x'), -EINVAL);
    assert_int_equal(kit_write(k, 2, 1, 3, 'x'), 0);
    struct store_txn *t = kit_txn(k);
    assert_int_equal(kit_op(k, t, FRAME_OP_UNLINK, 2, 0), 0);
    assert_int_equal(kit_commit(k, t), 0);
    kit_close(k);
    shell(k, "[ $(cat there) = precious ] && [ $(cat dir/x) = precious ] && [ ! -e dir/y ]");
}

static void changed_at_rest(void **state)
{
    struct kit *k = *state;
    struct frame_entry before, after;
    kit_open(k);
    kit_attach(k, 0, "r");
    kit_attach(k, 1, "gone");
    assert_int_equal(kit_write(k, 0, 1, 3, 'x'), 0);
    assert_int_equal(kit_write(k, 1, 1, 3, 'x'), 0);
    store_lookup(k->s, "r", &before, NULL, NULL);
    kit_close(k);
    shell(k, "echo longer > r && rm gone");
    kit_open(k);
    assert_int_equal(store_lookup(k->s, "r", &after, NULL, NULL), 0);
    assert_int_equal(after.size, 7);
    assert_false(id_same(&before.lineage, &after.lineage));
    assert_int_equal(kit_size(k, "gone"), -ENOENT);
}

static void too_long_for_a_file(void **state)
{
    struct kit *k = *state;
    struct rlimit old;
    getrlimit(RLIMIT_FSIZE, &old);
    for (int limited = 0; limited < 2; limited++) {
        struct rlimit small = {.rlim_cur = 8u << 20, .rlim_max = old.rlim_max};
        if (limited)
            setrlimit(RLIMIT_FSIZE, &small);
        kit_open(k);
        kit_attach(k, 0, "r");
        kit_attach(k, 1, "q");
        int err = kit_write(k, 1, 1, limited ? 9u << 20 : INT64_MAX, 0);
        int good = limited ? kit_write(k, 1, 1, 7u << 20, 0) : kit_write(k, 0, 1, 1000, 'x');
        setrlimit(RLIMIT_FSIZE, &old);
        assert_int_equal(err, -ENOBUFS);
        assert_int_equal(good, 0);
        kit_close(k);
    }
    kit_open(k);
    assert_int_equal(kit_size(k, "q"), 7u << 20);
    assert_int_equal(kit_size(k, "r"), 1000);
}

static void on_small_disk(struct kit *k)
{
    if (geteuid() || mount("memsync-test", k->dir, "tmpfs", 0, "size=12m") < 0)
        skip(); /* needs root and CAP_SYS_ADMIN */
    kit_open(k);
}

#define GROW 800000

/* One epoch that adds GROW bytes at the end. */
static int grow(struct kit *k, uint64_t epoch, uint64_t size)
{
    struct store_txn *t = kit_txn(k);
    int err = kit_region(k, t, 0, epoch, UINT64_MAX, size + GROW);
    for (uint32_t at = 0; !err && at < GROW; at += 50000)
        err = kit_pages(k, t, 0, size + at, 50000, 'y');
    assert_int_equal(err, 0);
    return kit_commit(k, t);
}

static void full_disk_fails_one_epoch(void **state)
{
    struct kit *k = *state;
    on_small_disk(k);
    kit_attach(k, 0, "r");
    kit_attach(k, 1, "q");
    k->limits.txn_memory = k->s->limits.txn_memory = 900u << 10;
    assert_int_equal(kit_write(k, 0, 1, 200000, 'x'), 0);
    uint64_t size = 200000, epoch = 1;
    int err;
    while (!(err = grow(k, epoch + 1, size))) {
        size += GROW;
        epoch++;
        if (size > 12u << 20)
            fail_msg("more went in than there is room for");
    }
    assert_int_equal(err, -ENOSPC);
    assert_non_null(strstr(k->error, k->dir));
    assert_true(size > 4000000);
    assert_int_equal(kit_size(k, "r"), size);
    assert_int_equal(kit_byte(k, "r", size - 1), size > 200000 ? 'y' : 'x');
    assert_int_equal(kit_write(k, 1, 1, 800000, 'q'), -ENOSPC);
    assert_int_equal(kit_size(k, "q"), -ENOENT);
    struct store_txn *t = kit_txn(k); /* in place: needs no room */
    assert_int_equal(kit_region(k, t, 0, epoch + 1, UINT64_MAX, size), 0);
    assert_int_equal(kit_pages(k, t, 0, 0, 50000, 'z'), 0);
    assert_int_equal(kit_commit(k, t), 0);
    assert_int_equal(kit_write(k, 0, epoch + 2, 1000, 'z'), 0);
    assert_int_equal(kit_byte(k, "r", 0), 'z');
    assert_int_equal(kit_write(k, 1, 1, 800000, 'q'), 0);
    kit_close(k);
    kit_open(k);
    assert_int_equal(kit_byte(k, "q", 799999), 'q');
    kit_close(k);
    umount(k->dir);
}

/* Too large for memory and for the disk: refused, and nothing of it stays. */
static void full_disk_while_spilling(void **state)
{
    struct kit *k = *state;
    on_small_disk(k);
    kit_attach(k, 0, "r");
    kit_attach(k, 1, "big");
    assert_int_equal(kit_write(k, 0, 1, 2000, 'x'), 0);
    assert_int_equal(kit_write(k, 1, 1, 20u << 20, 'b'), -ENOSPC);
    while (k->s->jobs)
        uv_run(&k->loop, UV_RUN_ONCE);
    assert_int_equal(kit_size(k, "big"), -ENOENT);
    assert_int_equal(kit_write(k, 0, 2, 3000000, 'y'), 0);
    assert_int_equal(kit_byte(k, "r", 2999999), 'y');
    kit_close(k);
    umount(k->dir);
}

/* Room vanishes between the commit and the applying: the epoch stays, others are refused, and all goes on once there is
 * room. */
static void full_disk_while_applying(void **state)
{
    struct kit *k = *state;
    on_small_disk(k);
    kit_attach(k, 0, "r");
    assert_int_equal(kit_write(k, 0, 1, 2000, 'x'), 0);
    assert_int_equal(kit_byte(k, "r", 0), 'x'); /* applied */
    struct store_txn *t = kit_txn(k);
    assert_int_equal(kit_region(k, t, 0, 2, UINT64_MAX, 200000), 0);
    assert_int_equal(kit_pages(k, t, 0, 0, 50000, 'y'), 0);
    struct told told = {0};
    store_txn_commit(t, kit_durable, &told);
    k->s->apply_busy = true; /* holds the applying job back */
    assert_int_equal(kit_wait(k, &told), 0);
    shell(k,
          "fallocate -p -o 0 -l 52M .memsync/data/0000000000000001; truncate -s 2000 .memsync/data/0000000000000001; "
          "dd if=/dev/zero of=filler bs=64k status=none 2>/dev/null; [ -s filler ]");
    k->s->apply_busy = false;
    store_pump(k->s);
    while (!k->s->retrying)
        uv_run(&k->loop, UV_RUN_ONCE);
    assert_int_equal(kit_write(k, 0, 3, 1000, 'z'), -ENOSPC);
    assert_int_equal(kit_size(k, "r"), 200000);
    shell(k, "rm filler");
    while (k->s->retrying)
        uv_run(&k->loop, UV_RUN_ONCE);
    assert_int_equal(kit_byte(k, "r", 49999), 'y');
    assert_int_equal(kit_write(k, 0, 3, 1000, 'z'), 0);
    kit_close(k);
    umount(k->dir);
}

static void checkpointed(void *arg)
{
    *(bool *)arg = true;
}

static void checkpoint_makes_plain_files_exact(void **state)
{
    struct kit *k = *state;
    kit_open(k);
    kit_attach(k, 0, "r");
    bool done = false;
    assert_int_equal(kit_write(k, 0, 1, 30000, 'x'), 0);
    store_checkpoint(k->s, checkpointed, &done);
    assert_false(done);
    while (!done)
        uv_run(&k->loop, UV_RUN_ONCE);
    assert_int_equal(kit_file_byte(k, "r", 29999), 'x');
    assert_int_equal(k->s->journal.used, 0);
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(one_agent_a_directory),
        T(directory_is_made),
        T(bad_stores_are_named),
        T(nothing_leads_out),
        T(strange_files_are_left_alone),
        T(changed_at_rest),
        T(too_long_for_a_file),
        T(full_disk_fails_one_epoch),
        T(full_disk_while_spilling),
        T(full_disk_while_applying),
        T(checkpoint_makes_plain_files_exact),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
