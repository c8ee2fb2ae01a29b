/* The pager's arithmetic: sets of pages against a table of booleans, plans against what they promise, kept orders
 * against damage. */
#include "agent/page/order.h"
#include "agent/page/plan.h"
#include "agent/page/uffd.h"
#include "wire/control.h"

#include <errno.h>
#include <fcntl.h>
#include <glob.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cmocka.h>

static uint32_t seed = 1;
static uint32_t chance(uint32_t below)
{
    seed ^= seed << 13;
    seed ^= seed >> 17;
    seed ^= seed << 5;
    return seed % below;
}

/* ---- sets ---- */

#define N 700u
static bool have[N], asked[N];

static uint64_t model(bool on, bool both, uint64_t from, uint64_t to)
{
    while (from < to && (have[from] || (both && asked[from])) != on)
        from++;
    return from;
}

static void test_sets(void **state)
{
    (void)state;
    struct pages p;
    assert_int_equal(pages_init(&p, N), 0);
    memset(have, 0, sizeof have);
    memset(asked, 0, sizeof asked);
    for (int round = 0; round < 30000; round++) {
        uint64_t from = chance(N), to = from + chance(4 + N / 8);
        to = to > N ? N : to;
        uint32_t what = chance(6);
        for (uint64_t i = from; i < to && what < 4; i++) {
            have[i] = what == 0 ? true : what == 3 ? false : have[i];
            asked[i] = what == 1;
        }
        what == 0   ? pages_came(&p, from, to)
        : what == 1 ? pages_ask(&p, from, to)
        : what == 2 ? pages_unask(&p, from, to)
        : what == 3 ? pages_lose(&p, from, to)
                    : (void)0;
        from = chance(N + 1);
        to = chance(N + 1);
        if (from > to)
            continue;
        assert_int_equal(pages_gap(&p, from, to), model(false, true, from, to));
        assert_int_equal(pages_gap_end(&p, from, to), model(true, true, from, to));
        assert_int_equal(pages_hole(&p, from, to), model(false, false, from, to));
        assert_int_equal(pages_hole_end(&p, from, to), model(true, false, from, to));
    }
    uint64_t n = 0;
    for (size_t i = 0; i < N; i++)
        n += have[i];
    assert_int_equal(p.have_n, n);
    pages_free(&p);
    assert_int_equal(pages_init(&p, 0), 0);
    assert_int_equal(pages_gap(&p, 0, 0), 0);
    pages_free(&p);
}

/* What lies beyond a new end is lost, and does not come back with it; what is before stays, wherever the bits are. */
static void test_resized_sets(void **state)
{
    (void)state;
    struct pages p;
    assert_int_equal(pages_init(&p, 100), 0);
    pages_came(&p, 0, 100);
    pages_ask(&p, 90, 100);
    static const uint64_t sizes[] = {60, 64, 63, 128, 5000, 4000, 100000, 1, 0, 1, 200};
    uint64_t least = 100, room = p.room;
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        assert_int_equal(pages_resize(&p, sizes[i]), 0);
        least = sizes[i] < least ? sizes[i] : least;
        assert_int_equal(p.count, sizes[i]);
        assert_true(p.room > p.count && p.room >= room);
        assert_int_equal(p.have_n, least);
        assert_int_equal(p.asked_n, 0);
        assert_int_equal(pages_hole(&p, 0, p.count), least);
        assert_int_equal(pages_gap_end(&p, least, p.count), p.count);
        room = p.room;
    }
    pages_came(&p, 190, 200);
    assert_int_equal(pages_hole_end(&p, 0, 200), 190);
    pages_free(&p);
}

/* ---- plans ---- */

static struct pages pages;

static void faults(struct plan *p, uint64_t page, uint64_t want_from, uint64_t want_to)
{
    uint64_t from, to;
    plan_fault(p, &pages, page, &from, &to);
    if (from != want_from || to != want_to)
        fail_msg("page %llu: window %llu..%llu, not %llu..%llu", (unsigned long long)page, (unsigned long long)from,
                 (unsigned long long)to, (unsigned long long)want_from, (unsigned long long)want_to);
}

static void test_windows(void **state)
{
    (void)state;
    struct plan p;
    assert_int_equal(pages_init(&pages, 100000), 0);
    plan_init(&p, CONTROL_ORDER_FAULT);
    faults(&p, 1003, 1000, 1008); /* nobody saw it coming */
    faults(&p, 1008, 1008, 1024); /* right behind: larger */
    faults(&p, 50001, 50000, 50008);
    faults(&p, 1024, 1024, 1056);    /* the first walk goes on */
    faults(&p, 49999, 49984, 50000); /* backwards */
    faults(&p, 49983, 49952, 49984);
    faults(&p, 1060, 1060, 1124); /* a few pages skipped */
    faults(&p, 1124, 1124, 1252);
    faults(&p, 1252, 1252, 1508);
    faults(&p, 1508, 1508, 1764); /* as large as they get */
    faults(&p, 99999, 99992, 100000);
    faults(&p, 3, 0, 8);
    plan_free(&p);

    plan_init(&p, CONTROL_ORDER_NONE);
    faults(&p, 1003, 1003, 1004);
    faults(&p, 1004, 1004, 1005);
    plan_init(&p, CONTROL_ORDER_LINEAR);
    p.random = true;
    faults(&p, 1004, 1004, 1005);
    pages_free(&pages);
}

/* Whatever is there and asked for, each page comes once, and all come. */
static void drains(struct plan *p)
{
    uint64_t from, to, n = 0, missing = 0;
    for (uint64_t i = 0; i < pages.count; i++)
        missing += pages_gap(&pages, i, i + 1) == i;
    while (plan_next(p, &pages, &from, &to)) {
        assert_true(from < to && to <= pages.count && to - from <= PLAN_WINDOW);
        assert_int_equal(pages_gap_end(&pages, from, to), to);
        pages_ask(&pages, from, to);
        n += to - from;
    }
    assert_int_equal(n, missing);
}

static void test_background(void **state)
{
    (void)state;
    for (int round = 0; round < 60; round++) {
        struct plan p;
        assert_int_equal(pages_init(&pages, 1 + chance(3000)), 0);
        plan_init(&p, (uint8_t)(round % 3));
        for (int i = 0; i < 20; i++) {
            uint64_t at = chance((uint32_t)pages.count), end = at + chance(200), from, to;
            pages_came(&pages, at, end < pages.count ? end : pages.count);
            plan_fault(&p, &pages, chance((uint32_t)pages.count), &from, &to);
            pages_ask(&pages, from, to);
        }
        if (round % 2) {
            p.backwards = true;
            p.cursor = chance((uint32_t)pages.count);
        }
        drains(&p);
        plan_free(&p);
        pages_free(&pages);
    }
}

static void next_is(struct plan *p, uint64_t want_from, uint64_t want_to)
{
    uint64_t from, to;
    assert_true(plan_next(p, &pages, &from, &to));
    assert_int_equal(from, want_from);
    assert_int_equal(to, want_to);
    pages_ask(&pages, from, to);
}

static void test_follows(void **state)
{
    (void)state;
    struct plan p;
    uint64_t from, to;
    assert_int_equal(pages_init(&pages, 10000), 0);
    plan_init(&p, CONTROL_ORDER_FAULT);
    next_is(&p, 0, 256);
    plan_fault(&p, &pages, 5000, &from, &to);
    pages_ask(&pages, from, to);
    plan_fault(&p, &pages, to, &from, &to);
    pages_ask(&pages, from, to);
    next_is(&p, to, 5120);
    plan_fault(&p, &pages, 8000, &from, &to);
    plan_fault(&p, &pages, 7999, &from, &to); /* goes backwards */
    assert_int_equal(from, 7984);
    pages_ask(&pages, from, 8008);
    next_is(&p, 7936, 7984);
    next_is(&p, 7680, 7936);
    plan_move(&p, 9000);
    next_is(&p, 9000, 9216);
    plan_touch(&p, 300, 310); /* calls that follow one another */
    next_is(&p, 9216, 9472);
    plan_touch(&p, 310, 9600);
    next_is(&p, 9600, 9728);
    plan_free(&p);
    plan_init(&p, CONTROL_ORDER_NONE);
    assert_false(plan_next(&p, &pages, &from, &to));
    pages_free(&pages);
}

static void test_recorded(void **state)
{
    (void)state;
    struct plan p;
    uint64_t from, to, *order = malloc(3 * sizeof *order);
    assert_int_equal(pages_init(&pages, 10000), 0);
    memcpy(order, (uint64_t[]){600, 2, 601}, 3 * sizeof *order);
    plan_init(&p, CONTROL_ORDER_RECORDED);
    plan_record(&p, order, 3, 10000 / PLAN_CHUNK + 1);
    plan_fault(&p, &pages, 2 * PLAN_CHUNK, &from, &to);  /* known */
    plan_fault(&p, &pages, 70 * PLAN_CHUNK, &from, &to); /* new: at the end */
    plan_touch(&p, 80 * PLAN_CHUNK + 5, 81 * PLAN_CHUNK + 1);
    assert_int_equal(p.recorded_n, 5);
    assert_int_equal(p.recorded[3], 70);
    assert_int_equal(p.recorded[4], 80);
    next_is(&p, 600 * PLAN_CHUNK, 601 * PLAN_CHUNK);
    next_is(&p, 2 * PLAN_CHUNK, 3 * PLAN_CHUNK);
    next_is(&p, 601 * PLAN_CHUNK, 602 * PLAN_CHUNK);
    drains(&p);
    plan_free(&p);
    plan_init(&p, CONTROL_ORDER_RECORDED);
    plan_record(&p, NULL, 0, 626);
    pages_lose(&pages, 0, 10000);
    assert_false(plan_next(&p, &pages, &from, &to)); /* learns first */
    p.learning = false;
    drains(&p);
    plan_free(&p);
    pages_free(&pages);
}

/* ---- kept orders ---- */

static char dir[] = "/tmp/memsync-order-XXXXXX";

static size_t loads(uint64_t chunks, uint64_t *first)
{
    size_t n;
    uint64_t *o = order_load(dir, "h:1", "a/b", chunks, &n);
    *first = n ? o[0] : 0;
    free(o);
    return n;
}

static void test_orders(void **state)
{
    (void)state;
    char path[300];
    uint64_t first;
    assert_non_null(mkdtemp(dir));
    assert_int_equal(loads(100, &first), 0);
    order_save(dir, "h:1", "a/b", (uint64_t[]){7, 3, 99, 4}, 4);
    order_save(dir, "h:2", "a/b", (uint64_t[]){1}, 1);
    assert_int_equal(loads(100, &first), 4);
    assert_int_equal(first, 7);
    assert_int_equal(loads(5, &first), 2); /* it is smaller now */
    assert_int_equal(first, 3);
    glob_t found;
    snprintf(path, sizeof path, "%s/orders/*", dir);
    assert_int_equal(glob(path, 0, NULL, &found), 0);
    assert_int_equal(found.gl_pathc, 2);
    for (int round = 0; round < 2000; round++) { /* whatever they hold: chunks that there are, each once */
        order_save(dir, "h:1", "a/b", (uint64_t[]){7, 3, 99, 4, 3}, 5);
        for (size_t i = 0; i < found.gl_pathc; i++) {
            int fd = open(found.gl_pathv[i], O_WRONLY);
            uint8_t byte = (uint8_t)chance(256);
            assert_int_equal(pwrite(fd, &byte, 1, chance(50)), 1);
            close(fd);
        }
        size_t n;
        uint64_t *o = order_load(dir, "h:1", "a/b", 100, &n);
        bool seen[100] = {false};
        for (size_t i = 0; i < n; i++) {
            assert_true(o[i] < 100 && !seen[o[i]]);
            seen[o[i]] = true;
        }
        free(o);
    }
    globfree(&found);
    snprintf(path, sizeof path, "rm -rf %s", dir);
    assert_int_equal(system(path), 0);
}

/* ---- userfaultfd ---- */

#define AREA (16 * PAGE_SIZE)

static void test_filling(void **state)
{
    (void)state;
    int uffd = page_uffd(), fd = memfd_create("t", MFD_CLOEXEC);
    if (uffd < 0)
        skip();
    assert_int_equal(ftruncate(fd, AREA), 0);
    uint8_t *window = mmap(NULL, AREA, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), *bytes = malloc(AREA + 1),
            back[PAGE_SIZE];
    memset(bytes, 'a', AREA + 1);
    assert_int_equal(page_uffd_watch(uffd, window, AREA), 0);
    assert_int_equal(page_copy(uffd, window + 2 * PAGE_SIZE, bytes + 1, PAGE_SIZE), 0);
    assert_int_equal(page_zero(uffd, window + 5 * PAGE_SIZE, PAGE_SIZE), 0);
    memset(bytes, 'b', AREA);
    assert_int_equal(page_copy(uffd, window, bytes, AREA), 0); /* over what is there: that stays */
    for (unsigned i = 0; i < 16; i++) {
        assert_int_equal(pread(fd, back, PAGE_SIZE, i * PAGE_SIZE), PAGE_SIZE);
        uint8_t want = i == 2 ? 'a' : i == 5 ? 0 : 'b';
        assert_true(back[0] == want && back[PAGE_SIZE - 1] == want);
    }
    assert_int_equal(page_zero(uffd, window, AREA), 0);
    assert_int_equal(page_copy(uffd, window, bytes, 0), 0);
    assert_int_equal(page_wake(uffd, (uintptr_t)window, AREA), 0);
    munmap(window, AREA);
    assert_int_equal(page_copy(uffd, window, bytes, PAGE_SIZE), -ENOENT); /* the mapping went */
    uint64_t addr[4];
    assert_int_equal(page_faults(uffd, addr, 4), -EAGAIN);
    close(fd);
    free(bytes);
}

static int watched(uint64_t features, void *at)
{
    int uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    struct uffdio_api api = {.api = UFFD_API, .features = features};
    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) || page_uffd_watch(uffd, at, AREA))
        return -1;
    return uffd;
}

static void *drop_first_page(void *at)
{
    madvise(at, PAGE_SIZE, MADV_DONTNEED); /* stands still until its event is read */
    return NULL;
}

static bool event_waits(int uffd)
{
    struct pollfd p = {.fd = uffd, .events = POLLIN};
    return poll(&p, 1, 10000) == 1;
}

/* EAGAIN: nothing is put into an address space that is changing; what was asked for stays to be done. */
static void test_changing(void **state)
{
    (void)state;
    uint8_t *at = mmap(NULL, AREA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), *bytes = malloc(AREA);
    int uffd = watched(UFFD_FEATURE_EVENT_REMOVE, at);
    if (uffd < 0)
        skip();
    memset(bytes, 'c', AREA);
    assert_int_equal(page_copy(uffd, at, bytes, PAGE_SIZE), 0);
    pthread_t t;
    assert_int_equal(pthread_create(&t, NULL, drop_first_page, at), 0);
    assert_true(event_waits(uffd));
    assert_int_equal(page_copy(uffd, at + PAGE_SIZE, bytes, PAGE_SIZE), -EAGAIN);
    assert_int_equal(page_zero(uffd, at + PAGE_SIZE, PAGE_SIZE), -EAGAIN);
    uint64_t addr[4];
    assert_int_equal(page_faults(uffd, addr, 4), 0); /* the event, which is no fault */
    assert_int_equal(pthread_join(t, NULL), 0);
    assert_int_equal(page_copy(uffd, at, bytes, AREA), 0);
    assert_int_equal(at[0] + at[AREA - 1], 2 * 'c');
    close(uffd);
    munmap(at, AREA);
    free(bytes);
}

/* ESRCH: the process is gone, its descriptor is not. */
static void test_gone(void **state)
{
    (void)state;
    struct shared {
        int uffd; /* the child's number of it */
    } *s = mmap(NULL, PAGE_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    uint8_t *at = mmap(NULL, AREA, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), *bytes = malloc(AREA);
    s->uffd = -2;
    pid_t child = fork();
    assert_true(child >= 0);
    if (!child) {
        __atomic_store_n(&s->uffd, watched(0, at), __ATOMIC_SEQ_CST);
        for (;;)
            pause();
    }
    while (__atomic_load_n(&s->uffd, __ATOMIC_SEQ_CST) == -2)
        sched_yield();
    int process = (int)syscall(SYS_pidfd_open, child, 0);
    int uffd = s->uffd < 0 || process < 0 ? -1 : (int)syscall(SYS_pidfd_getfd, process, s->uffd, 0);
    if (uffd >= 0)
        assert_int_equal(page_copy(uffd, at, bytes, PAGE_SIZE), 0);
    assert_true(!kill(child, SIGKILL) && waitpid(child, NULL, 0) == child);
    if (uffd < 0)
        skip();
    assert_int_equal(page_copy(uffd, at + PAGE_SIZE, bytes, PAGE_SIZE), -ESRCH);
    assert_int_equal(page_zero(uffd, at + PAGE_SIZE, PAGE_SIZE), -ESRCH);
    int rc = page_poison(uffd, (uintptr_t)at + PAGE_SIZE, PAGE_SIZE);
    assert_true(rc == -ESRCH || rc == -EOPNOTSUPP);
    assert_int_equal(page_wake(uffd, (uintptr_t)at, AREA), 0);
    close(uffd);
    close(process);
    munmap(at, AREA);
    munmap(s, PAGE_SIZE);
    free(bytes);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_sets),    cmocka_unit_test(test_windows),  cmocka_unit_test(test_background),
        cmocka_unit_test(test_follows), cmocka_unit_test(test_recorded), cmocka_unit_test(test_orders),
        cmocka_unit_test(test_filling), cmocka_unit_test(test_changing), cmocka_unit_test(test_gone),
        cmocka_unit_test(test_resized_sets),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
