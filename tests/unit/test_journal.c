/* Killed anywhere, torn anywhere: what is there after the next opening is exactly one epoch, and not older than the
 * last that was called durable.
 *
 * A child commits epochs of a known history (see `expect`) and writes each durable number into a pipe; it dies at a
 * chosen step of the store, or is killed. */
#include "tests/unit/test_store.h"

#include <signal.h>
#include <sys/wait.h>
#include <time.h>

#define EPOCHS 12
#define BIG 100000

static struct kit kit;
static int report;
static unsigned steps, die_at;
static const char *die_where;

static void step(const char *where)
{
    if (die_where && strcmp(where, die_where))
        return;
    if (__atomic_add_fetch(&steps, 1, __ATOMIC_RELAXED) == die_at)
        _exit(3);
}

enum { A, JOURNAL, NEW, DOC, CUT, LARGE, MOVED };
#define MOVED_PAGES 20

static void attach_all(struct kit *k)
{
    static const char *const names[] = {"a", "j/journal", "d/new", "d/doc", "cut", "large", "moved"};
    for (uint32_t i = 0; i < 7; i++)
        kit_attach(k, i, names[i]);
}

static uint64_t next_of(struct kit *k, uint32_t handle)
{
    struct frame_entry e;
    return store_lookup(k->s, k->names[handle], &e, NULL, NULL) ? 1 : e.epoch + 1;
}

static void pages(struct kit *k, struct store_txn *t, uint32_t handle, uint32_t from, uint32_t to, uint64_t n)
{
    for (uint32_t step; from < to; from += step) {
        step = to - from < 8192 ? to - from : 8192;
        assert_int_equal(kit_pages(k, t, handle, from, step, (int)(n % 250 + 1)), 0);
    }
}

static void part(struct kit *k, struct store_txn *t, uint32_t handle, bool create, uint64_t min, uint64_t size)
{
    if (create)
        assert_int_equal(kit_op(k, t, FRAME_OP_CREATE, handle, 0), 0);
    assert_int_equal(kit_region(k, t, handle, create ? 1 : next_of(k, handle), min, size), 0);
}

static int moved_fill(uint64_t n, uint64_t page)
{
    n = n / 4 * 4;
    return n > page * 4 ? (int)((n - page * 4) % 250 + 1) : 0;
}

static void moved(struct kit *k, struct store_txn *t, uint64_t n)
{
    struct moved m[MOVED_PAGES];
    part(k, t, MOVED, n == 4, UINT64_MAX, MOVED_PAGES * FRAME_PAGE);
    for (uint64_t i = 1; i < MOVED_PAGES; i++)
        m[i] = (struct moved){.page = i, .source = i - 1, .fill = moved_fill(n - 4, i - 1)};
    if (n > 4)
        assert_int_equal(kit_copies(k, t, MOVED, m + 1, MOVED_PAGES - 1), 0);
    pages(k, t, MOVED, 0, FRAME_PAGE, n);
}

/* Epoch n of the history:
 *   a          page n % 16 is n's
 *   j/journal  made by odd ones, removed by even ones
 *   d/doc      every third one writes d/new and renames it
 *   cut        cut to nothing, then n * 7919 % 50000 bytes
 *   large      every fifth one writes it whole, more than a transaction keeps in memory
 *   moved      every fourth one moves its pages up by one, and writes the first */
static struct store_txn *epoch(struct kit *k, uint64_t n)
{
    struct store_txn *t = kit_txn(k);
    part(k, t, A, n == 1, UINT64_MAX, 16 * 4096);
    pages(k, t, A, (uint32_t)(n % 16) * 4096, (uint32_t)(n % 16 + 1) * 4096, n);
    if (n % 2) {
        part(k, t, JOURNAL, true, UINT64_MAX, 100);
        pages(k, t, JOURNAL, 0, 100, n);
    } else
        assert_int_equal(kit_op(k, t, FRAME_OP_UNLINK, JOURNAL, 0), 0);
    part(k, t, CUT, n == 1, 0, n * 7919 % 50000);
    pages(k, t, CUT, 0, (uint32_t)(n * 7919 % 50000), n);
    if (n % 3 == 0) {
        part(k, t, NEW, true, UINT64_MAX, 5000);
        pages(k, t, NEW, 0, 5000, n);
        assert_int_equal(kit_op(k, t, FRAME_OP_RENAME, NEW, DOC), 0);
    }
    if (n % 5 == 0) {
        part(k, t, LARGE, n == 5, UINT64_MAX, BIG);
        pages(k, t, LARGE, 0, BIG, n);
    }
    if (n % 4 == 0)
        moved(k, t, n);
    return t;
}

static void told_number(void *arg, int err, const char *text)
{
    uint64_t *n = arg;
    if (err) {
        fprintf(stderr, "epoch %llu: %s\n", (unsigned long long)*n, text);
        _exit(4);
    }
    if (write(report, n, sizeof *n) != sizeof *n)
        _exit(5);
    *n = 0;
}

static void child(const char *url, const struct limits *limits, uint64_t count)
{
    struct kit k = {.limits = *limits};
    snprintf(k.url, sizeof k.url, "%s", url);
    memset(&k.me, 7, sizeof k.me);
    uv_loop_init(&k.loop);
    store_step = step;
    kit_open(&k);
    attach_all(&k);
    uint64_t n = next_of(&k, A);
    for (uint64_t last = n + count; n < last; n++) {
        uint64_t waiting = n;
        store_txn_commit(epoch(&k, n), told_number, &waiting);
        while (waiting)
            uv_run(&k.loop, UV_RUN_ONCE);
    }
    kit_close(&k);
    _exit(0);
}

/* Runs a child; returns its status and the last number it reported. kill_us: when to kill it; 0: not. */
static int run(struct kit *k, uint64_t count, unsigned kill_us, uint64_t *reported)
{
    int fds[2];
    assert_int_equal(pipe2(fds, O_CLOEXEC), 0);
    pid_t pid = fork();
    if (!pid) {
        report = fds[1];
        child(k->url, &k->limits, count);
    }
    close(fds[1]);
    if (kill_us) {
        nanosleep(&(struct timespec){.tv_nsec = kill_us * 1000L},
                  NULL); /* the moment is what is random here, nothing is waited for */
        kill(pid, SIGKILL);
    }
    for (uint64_t n; read(fds[0], &n, sizeof n) == sizeof n;)
        *reported = n;
    close(fds[0]);
    int status;
    waitpid(pid, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}

static void expect_fill(struct kit *k, const char *name, int64_t from, int64_t to, uint64_t n)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", k->dir, name);
    uint8_t bytes[BIG];
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    assert_true(fd >= 0);
    assert_int_equal(pread(fd, bytes, (size_t)(to - from), from), to - from);
    close(fd);
    for (int64_t i = 0; i < to - from; i++)
        if (bytes[i] != (n ? n % 250 + 1 : 0))
            fail_msg("%s, byte %lld: %u is not of epoch %llu", name, (long long)(from + i), bytes[i],
                     (unsigned long long)n);
}

/* Zeros where the fill is 0. */
static void expect_moved(struct kit *k, uint64_t n)
{
    assert_int_equal(kit_file_size(k, "moved"), n >= 4 ? MOVED_PAGES * (int64_t)FRAME_PAGE : -ENOENT);
    for (uint64_t page = 0; n >= 4 && page < MOVED_PAGES; page++)
        for (uint64_t at = page * FRAME_PAGE; at < (page + 1) * FRAME_PAGE; at += FRAME_PAGE - 1)
            assert_int_equal(kit_file_byte(k, "moved", (off_t)at), moved_fill(n, page));
}

/* The plain files are what epoch n left. */
static void expect(struct kit *k, uint64_t n)
{
    for (uint64_t page = 0; n && page < 16; page++) {
        uint64_t last = n;
        while (last && last % 16 != page)
            last--;
        expect_fill(k, "a", (int64_t)page * 4096, (int64_t)page * 4096 + 4096, last);
    }
    assert_int_equal(kit_file_size(k, "a"), n ? 16 * 4096 : -ENOENT);
    assert_int_equal(kit_file_size(k, "j/journal"), n % 2 ? 100 : -ENOENT);
    if (n % 2)
        expect_fill(k, "j/journal", 0, 100, n);
    else
        assert_int_equal(kit_file_size(k, "j"), -ENOENT);
    assert_int_equal(kit_file_size(k, "d/new"), -ENOENT);
    assert_int_equal(kit_file_size(k, "d/doc"), n >= 3 ? 5000 : -ENOENT);
    if (n >= 3)
        expect_fill(k, "d/doc", 0, 5000, n / 3 * 3);
    assert_int_equal(kit_file_size(k, "cut"), n ? (int64_t)(n * 7919 % 50000) : -ENOENT);
    if (n)
        expect_fill(k, "cut", 0, (int64_t)(n * 7919 % 50000), n);
    assert_int_equal(kit_file_size(k, "large"), n >= 5 ? BIG : -ENOENT);
    if (n >= 5)
        expect_fill(k, "large", 0, BIG, n / 5 * 5);
    expect_moved(k, n);
}

/* Opens and closes what a child left, and returns the epoch that is there; nothing is left over in the store's own
 * directories. */
static uint64_t recovered(struct kit *k)
{
    kit_open(k);
    strcpy(k->names[A], "a");
    uint64_t n = next_of(k, A) - 1;
    kit_close(k);
    expect(k, n);
    char command[200];
    snprintf(command, sizeof command, "[ -z \"$(ls %s/.memsync/data %s/.memsync/spill | grep -v :)\" ]", k->dir,
             k->dir);
    assert_int_equal(system(command), 0);
    return n;
}

static int setup(void **state)
{
    kit_init(&kit, false);
    kit.limits.journal = 256u << 10;
    kit.limits.txn_memory = 64u << 10;
    die_where = NULL;
    die_at = steps = 0;
    *state = &kit;
    return 0;
}

static int teardown(void **state)
{
    kit_end(*state);
    return 0;
}

static void history_without_accident(void **state)
{
    struct kit *k = *state;
    uint64_t reported = 0;
    assert_int_equal(run(k, 40, 0, &reported), 0);
    assert_int_equal(reported, 40);
    assert_int_equal(recovered(k), 40);
}

static void dies_at_every_step(void **state)
{
    struct kit *k = *state;
    uint64_t reported = 0;
    for (die_at = 1;; die_at++) {
        int status = run(k, EPOCHS, 0, &reported);
        uint64_t n = recovered(k);
        if (n < reported || n > reported + 1)
            fail_msg("died at step %u: epoch %llu was durable, %llu is there", die_at, (unsigned long long)reported,
                     (unsigned long long)n);
        reported = n;
        if (status == 0)
            break;
        assert_int_equal(status, 3);
    }
    print_message("%u steps, %llu epochs\n", die_at, (unsigned long long)reported);
    assert_true(die_at > 100);
}

/* The opening after a death dies too, at every one of its steps. */
static void dies_while_recovering(void **state)
{
    struct kit *k = *state;
    uint64_t reported = 0;
    for (unsigned at = 1;; at++) {
        die_where = "apply a size";
        die_at = 23;
        assert_int_equal(run(k, EPOCHS, 0, &reported), 3);
        die_where = NULL;
        die_at = at;
        int status = run(k, 0, 0, &reported);
        uint64_t n = recovered(k);
        assert_true(n >= reported && n <= reported + 1);
        reported = n;
        if (status == 0)
            break;
    }
    assert_true(reported > 100);
}

static void killed_at_random(void **state)
{
    struct kit *k = *state;
    uint64_t reported = 0;
    unsigned seed = (unsigned)time(NULL);
    print_message("seed %u\n", seed);
    for (int round = 0; round < 30; round++) {
        run(k, 1000, 2000 + (unsigned)rand_r(&seed) % 60000, &reported);
        uint64_t n = recovered(k);
        if (n < reported || n > reported + 1)
            fail_msg("round %d: epoch %llu was durable, %llu is there", round, (unsigned long long)reported,
                     (unsigned long long)n);
        reported = n;
    }
    print_message("%llu epochs\n", (unsigned long long)reported);
    assert_true(reported > 30);
}

static void damage(struct kit *k, off_t at, uint8_t by)
{
    char path[128];
    snprintf(path, sizeof path, "%s/.memsync/journal", k->dir);
    int fd = open(path, O_RDWR | O_CLOEXEC);
    uint8_t byte;
    assert_int_equal(pread(fd, &byte, 1, at), 1);
    byte ^= by;
    assert_int_equal(pwrite(fd, &byte, 1, at), 1);
    close(fd);
}

/* Where the n-th record (from 0) begins and ends, by its head. */
static off_t record_at(struct kit *k, int n, uint64_t *len)
{
    char path[128];
    off_t at = 0;
    snprintf(path, sizeof path, "%s/.memsync/journal", k->dir);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    for (;; n--) {
        uint8_t head[JOURNAL_HEAD];
        assert_int_equal(pread(fd, head, sizeof head, at), sizeof head);
        *len = get_u64(head + 32);
        if (!n)
            break;
        at += (off_t)journal_length(*len - JOURNAL_HEAD);
    }
    close(fd);
    return at;
}

/* A store whose journal holds `records` records, the last of them whole but neither acknowledged nor applied. */
static void full_journal(struct kit *k, unsigned records)
{
    uint64_t reported = 0;
    k->limits.journal = 4u << 20;
    k->limits.txn_memory = 1u << 20;
    die_where = "sync the journal";
    die_at = records;
    assert_int_equal(run(k, 1000, 0, &reported), 3);
    assert_int_equal(reported, records - 1);
}

static void torn_end_is_the_epoch_before(void **state)
{
    struct kit *k = *state;
    unsigned seed = (unsigned)time(NULL);
    print_message("seed %u\n", seed);
    full_journal(k, 9);
    uint64_t len;
    off_t at = record_at(k, 8, &len);
    damage(k, at + (off_t)((uint64_t)rand_r(&seed) % len), 0x40);
    assert_int_equal(recovered(k), 8);
    uint64_t reported = 0;
    die_where = NULL;
    die_at = 0;
    assert_int_equal(run(k, 5, 0, &reported), 0);
    assert_int_equal(recovered(k), 13);
}

static void whole_end_is_taken(void **state)
{
    struct kit *k = *state;
    full_journal(k, 9);
    assert_int_equal(recovered(k), 9);
}

static void damage_in_the_middle_is_an_error(void **state)
{
    struct kit *k = *state;
    unsigned seed = (unsigned)time(NULL);
    full_journal(k, 9);
    for (int i = 0; i < 30; i++) {
        uint64_t len;
        off_t at = record_at(k, rand_r(&seed) % 8, &len);
        at += (off_t)((uint64_t)rand_r(&seed) % len);
        damage(k, at, 0x01);
        assert_int_equal(store_open_with(&k->s, &k->loop, k->url, &k->limits, k->error), -EUCLEAN);
        assert_non_null(strstr(k->error, "damaged"));
        damage(k, at, 0x01);
    }
    k->s = NULL;
    assert_int_equal(recovered(k), 9);
}

/* The head's other bytes, and a journal of zeros, or gone. */
static void lost_journal(void **state)
{
    struct kit *k = *state;
    uint64_t reported = 0;
    assert_int_equal(run(k, 7, 0, &reported), 0);
    char command[128];
    snprintf(command, sizeof command, "rm %s/.memsync/journal", k->dir);
    assert_int_equal(system(command), 0);
    assert_int_equal(recovered(k), 7);
}

static void damaged_table_is_an_error(void **state)
{
    struct kit *k = *state;
    uint64_t reported = 0;
    assert_int_equal(run(k, 7, 0, &reported), 0);
    char command[160];
    snprintf(command, sizeof command, "printf x | dd of=%s/.memsync/meta bs=1 seek=70 conv=notrunc status=none",
             k->dir);
    assert_int_equal(system(command), 0);
    assert_int_equal(store_open_with(&k->s, &k->loop, k->url, &k->limits, k->error), -EBADMSG);
    assert_non_null(strstr(k->error, "meta"));
    k->s = NULL;
}

#define T(f) cmocka_unit_test_setup_teardown(f, setup, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        T(history_without_accident),
        T(dies_at_every_step),
        T(dies_while_recovering),
        T(killed_at_random),
        T(torn_end_is_the_epoch_before),
        T(whole_end_is_taken),
        T(damage_in_the_middle_is_an_error),
        T(lost_journal),
        T(damaged_table_is_an_error),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
