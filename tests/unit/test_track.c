/* Extents, published hashes, and every tracker over real mappings: what is stored is found, once. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "agent/track/kernel.h"
#include "agent/track/softdirty.h"
#include "agent/track/track.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#include <xxhash.h>

#define PAGES 300u

static void extents_settle_sorts_joins_and_cuts(void **state)
{
    (void)state;
    struct extents e = {0};
    extents_add(&e, 20000, 20001);
    extents_add(&e, 100, 200);
    extents_add(&e, 4096, 8192);
    extents_add(&e, 5, 5);
    extents_add(&e, 1u << 20, 2u << 20);
    extents_settle(&e, 20481);
    assert_int_equal(e.count, 2);
    assert_int_equal(e.at[0].start, 0);
    assert_int_equal(e.at[0].end, 8192);
    assert_int_equal(e.at[1].start, 16384);
    assert_int_equal(e.at[1].end, 20480);
    assert_int_equal(extents_bytes(&e), 12288);
    extents_free(&e);
}

static void hashes_of_zeros_are_zero_and_cutting_forgets(void **state)
{
    (void)state;
    uint8_t page[PAGE] = {0};
    struct hashes h = {0};
    assert_true(page_hash_same(page_hash_of(page), (struct page_hash){0, 0}));
    page[PAGE - 1] = 1;
    struct page_hash one = page_hash_of(page);
    assert_false(page_hash_same(one, (struct page_hash){0, 0}));
    assert_int_equal(hashes_room(&h, 1000), 0);
    for (uint64_t p = 0; p < 1000; p++)
        hashes_set(&h, p, one);
    assert_int_equal(hashes_room(&h, 100000), 0);
    assert_true(page_hash_same(hashes_get(&h, 999), one));
    hashes_cut(&h, 10 * PAGE + 7);
    assert_true(page_hash_same(hashes_get(&h, 9), one));
    assert_true(page_hash_same(hashes_get(&h, 10), HASH_UNKNOWN));
    for (uint64_t p = 11; p < 1000; p++)
        assert_true(page_hash_same(hashes_get(&h, p), (struct page_hash){0, 0}));
    hashes_free(&h);
}

/* The tree, computed the plain way. */
static struct page_hash plain_node(const struct page_hash *leaf, uint64_t pages, unsigned level, uint64_t i)
{
    uint8_t of[HASH_FAN * HASH_BYTES], zeros[sizeof of] = {0};
    if (!level)
        return i < pages ? leaf[i] : HASH_ZEROS;
    for (unsigned k = 0; k < HASH_FAN; k++) {
        struct page_hash child = plain_node(leaf, pages, level - 1, i * HASH_FAN + k);
        if (page_hash_same(child, HASH_UNKNOWN))
            return HASH_UNKNOWN;
        page_hash_put(of + k * HASH_BYTES, child);
    }
    if (!memcmp(of, zeros, sizeof of))
        return HASH_ZEROS;
    XXH128_hash_t h = XXH3_128bits(of, sizeof of);
    return (struct page_hash){h.low64, h.high64};
}

#define LEAVES 9000u

/* Everything that changes pages, at random, nodes read in between at random; compared with the plain tree. */
static void the_tree_follows_every_change(void **state)
{
    (void)state;
    static struct page_hash leaf[LEAVES];
    struct hashes h = {.bare = true};
    uint64_t room = 300;
    assert_int_equal(hashes_room(&h, room), 0);
    srandom(5);
    for (unsigned round = 0; round < 1000; round++) {
        uint64_t at = (uint64_t)random() % room, to = at + (uint64_t)random() % (room - at + 1);
        struct page_hash v = {(uint64_t)random() + 2, (uint64_t)random()};
        switch (random() % 8) {
        case 0:
            hashes_clear(&h, at, to);
            for (uint64_t p = at; p < to; p++)
                leaf[p] = HASH_ZEROS;
            break;
        case 1:
            if (random() % 8)
                break;
            hashes_cut(&h, at * PAGE + (round & 1));
            if (round & 1)
                leaf[at++] = HASH_UNKNOWN;
            for (uint64_t p = at; p < LEAVES; p++)
                leaf[p] = HASH_ZEROS;
            break;
        case 2:
            if (room < LEAVES && !(random() % 40))
                room = room * 2 < LEAVES ? room * 2 : LEAVES;
            assert_int_equal(hashes_room(&h, room), 0);
            break;
        case 3:
            v = random() % 2 ? HASH_UNKNOWN : HASH_ZEROS; /* fall through */
        default:
            hashes_set(&h, at, v);
            leaf[at] = v;
        }
        unsigned level = (unsigned)random() % 6;
        uint64_t node = (uint64_t)random() % (hashes_nodes(room, level) + 1);
        struct page_hash want = plain_node(leaf, LEAVES, level, node);
        if (!page_hash_same(hashes_node(&h, level, node), want))
            fail_msg("round %u: level %u node %llu", round, level, (unsigned long long)node);
        uint64_t next = at;
        while (next < room && page_hash_same(leaf[next], HASH_ZEROS))
            next++;
        assert_int_equal(hashes_next(&h, at), next == room ? h.pages : next);
        for (next = at; next < room && !page_hash_same(leaf[next], HASH_UNKNOWN);)
            next++;
        assert_int_equal(hashes_next_unknown(&h, at), next == room ? h.pages : next);
    }
    hashes_free(&h);
}

/* Holes, data, an end within a page, and what it was before: the file's content is what counts. */
static void files_are_read_as_they_are(void **state)
{
    (void)state;
    FILE *f = tmpfile();
    int fd = fileno(f);
    struct hashes h = {.bare = true};
    uint8_t *scratch = malloc(HASH_SCRATCH), page[PAGE];
    const uint64_t pages = 5000;
    assert_int_equal(ftruncate(fd, (off_t)(pages * PAGE - 10)), 0);
    for (uint64_t p = 0; p < pages; p++)
        if (p % 1000 < 200 || p == pages - 1) {
            memset(page, (int)(p % 250) + 1, sizeof page);
            assert_int_equal(pwrite(fd, page, p == pages - 1 ? PAGE - 10 : PAGE, (off_t)(p * PAGE)),
                             p == pages - 1 ? PAGE - 10 : PAGE);
        }
    assert_int_equal(hashes_room(&h, pages + 5), 0);
    for (uint64_t p = 0; p < pages; p += 3)
        hashes_set(&h, p, HASH_UNKNOWN);
    assert_int_equal(hashes_read(&h, fd, 0, 1333, scratch), 0);
    assert_int_equal(hashes_read(&h, fd, 1333, pages, scratch), 0);
    for (uint64_t p = 0; p < pages; p++) {
        memset(page, 0, sizeof page);
        assert_true(pread(fd, page, PAGE, (off_t)(p * PAGE)) > 0);
        if (!page_hash_same(page_hash_of(page), hashes_get(&h, p)))
            fail_msg("page %llu", (unsigned long long)p);
    }
    hashes_free(&h);
    free(scratch);
    fclose(f);
}

struct mapped {
    int fd, pagemap, uffd;
    uint8_t *at;
};

static int file_of_pages(const char *dir)
{
    char name[200];
    snprintf(name, sizeof name, "%s/memsync-track-XXXXXX", dir);
    int fd = mkstemp(name);
    assert_true(fd >= 0);
    unlink(name);
    assert_int_equal(ftruncate(fd, PAGES * PAGE), 0);
    return fd;
}

static bool arm(struct mapped *m, const char *dir)
{
    m->fd = file_of_pages(dir);
    m->at = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, m->fd, 0);
    m->pagemap = open("/proc/self/pagemap", O_RDONLY);
    m->uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    struct uffdio_api api = {.api = UFFD_API, .features = KERNEL_UFFD_WP_ASYNC};
    if (m->uffd < 0 || ioctl(m->uffd, UFFDIO_API, &api) || !(api.features & KERNEL_UFFD_WP_ASYNC))
        return false;
    struct uffdio_register reg = {.range = {(uintptr_t)m->at, PAGES * PAGE}, .mode = UFFDIO_REGISTER_MODE_WP};
    struct uffdio_writeprotect wp = {.range = reg.range, .mode = UFFDIO_WRITEPROTECT_MODE_WP};
    return !ioctl(m->uffd, UFFDIO_REGISTER, &reg) && !ioctl(m->uffd, UFFDIO_WRITEPROTECT, &wp);
}

static void disarm(struct mapped *m)
{
    munmap(m->at, PAGES * PAGE);
    close(m->fd);
    close(m->pagemap);
    close(m->uffd);
}

/* The same fact for every tracker: pages 3 and 200 were stored to, and nothing else is said by those that are exact.
 */
static void stores_are_found_once(const struct track_ops *ops, const char *dir)
{
    struct mapped m;
    struct hashes none = {0};
    if (!arm(&m, dir))
        skip();
    struct track_map map = {ops, m.pagemap, (uintptr_t)m.at, PAGES * PAGE, 0, NULL};
    struct track_file file = {.fd = m.fd, .size = PAGES * PAGE, .published = &none};
    struct extents e = {0};
    assert_int_equal(ops->arm(&map), 0);
    m.at[3 * PAGE + 5] = 1;
    m.at[200 * PAGE] = 1;
    assert_int_equal(track_collect(&map, &file, &e), 0);
    extents_settle(&e, file.size);
    bool found3 = false, found200 = false;
    for (size_t i = 0; i < e.count; i++) {
        found3 |= e.at[i].start <= 3 * PAGE && 3 * PAGE < e.at[i].end;
        found200 |= e.at[i].start <= 200 * PAGE && 200 * PAGE < e.at[i].end;
    }
    assert_true(found3 && found200);
    if (!ops->reads_all) {
        assert_int_equal(extents_bytes(&e), 2 * PAGE);
        e.count = 0;
        assert_int_equal(track_collect(&map, &file, &e), 0);
        assert_int_equal(e.count, 0);
        m.at[200 * PAGE + 9] = 2;
        msync(m.at, PAGES * PAGE, MS_SYNC);
        madvise(m.at, PAGES * PAGE, MADV_DONTNEED);
        assert_int_equal(track_collect(&map, &file, &e), 0);
        assert_int_equal(extents_bytes(&e), PAGE);
    }
    extents_free(&e);
    disarm(&m);
}

static void uffd_on_disk(void **state)
{
    (void)state;
    stores_are_found_once(&track_uffd, "/var/tmp");
}

static void uffd_in_memory(void **state)
{
    (void)state;
    stores_are_found_once(&track_uffd, "/dev/shm");
}

static void hash_on_disk(void **state)
{
    (void)state;
    stores_are_found_once(&track_hash, "/var/tmp");
}

static void inotify_in_memory(void **state)
{
    (void)state;
    stores_are_found_once(&track_inotify, "/dev/shm");
}

static bool has_soft_bits(int pagemap, const void *at)
{
    uint64_t entry = 0;
    return pread(pagemap, &entry, sizeof entry, (off_t)((uintptr_t)at / PAGE * sizeof entry)) == sizeof entry &&
           entry >> 55 & 1;
}

struct storing {
    _Atomic uint8_t *at; /* a page each */
    _Atomic bool stop;
    _Atomic uint64_t stores;
};

static void *store_on(void *arg)
{
    struct storing *s = arg;
    for (unsigned seed = 1; !s->stop;) {
        uint64_t page = (uint64_t)rand_r(&seed) % PAGES;
        s->at[page * PAGE]++;
        s->stores++;
        if (!(seed % 64))
            sched_yield();
    }
    return NULL;
}

/* A thread stores all the time. What each collect leaves out is as the collects before had seen it: at the end, once
 * it stands still, a copy that was brought up to date by nothing but collects is the file. */
static void softdirty_loses_nothing_beside_stores(void **state)
{
    (void)state;
    struct hashes none = {0};
    int fd = file_of_pages("/dev/shm"), pagemap = open("/proc/self/pagemap", O_RDONLY);
    uint8_t *at = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    memset(at, 1, PAGES * PAGE);
    struct softdirty *s =
        softdirty_new(pagemap, open("/proc/self/clear_refs", O_WRONLY), open("/proc/self/stat", O_RDONLY));
    struct track_map map = {&track_softdirty, pagemap, (uintptr_t)at, PAGES * PAGE, 0, s};
    struct track_file file = {.fd = fd, .size = PAGES * PAGE, .published = &none};
    struct extents e = {0};
    uint8_t *copy = calloc(PAGES, PAGE);
    bool works = has_soft_bits(pagemap, at);
    if (works)
        assert_int_equal(track_softdirty.arm(&map), 0);
    struct storing stores = {.at = (_Atomic uint8_t *)at};
    pthread_t thread;
    uint64_t named = 0, rounds = works ? 1000 : 0;
    if (works)
        assert_int_equal(pthread_create(&thread, NULL, store_on, &stores), 0);
    for (uint64_t i = 0; i <= rounds && works; i++) {
        if (i == rounds) {
            stores.stop = true;
            pthread_join(thread, NULL);
        }
        assert_int_equal(track_collect(&map, &file, &e), 0);
        extents_settle(&e, file.size);
        for (size_t k = 0; k < e.count; k++)
            assert_int_equal(pread(fd, copy + e.at[k].start, e.at[k].end - e.at[k].start, (off_t)e.at[k].start),
                             e.at[k].end - e.at[k].start);
        named += extents_bytes(&e) / PAGE;
        e.count = 0;
        if (i < rounds && i % 2)
            usleep(200);
    }
    if (works) {
        print_message("%llu stores, %llu pages named in %llu looks\n", (unsigned long long)stores.stores,
                      (unsigned long long)named, (unsigned long long)rounds);
        assert_memory_equal(copy, at, PAGES * PAGE);
        softdirty_forget(s, map.addr, map.len);
        assert_int_equal(track_collect(&map, &file, &e), 0); /* not looked at any more: all of it */
        assert_int_equal(extents_bytes(&e), PAGES * PAGE);
    }
    softdirty_free(s);
    extents_free(&e);
    free(copy);
    munmap(at, PAGES * PAGE);
    close(fd);
    close(pagemap);
    if (!works)
        skip();
}

/* A process of its own, as a program is: what it stores to is named, and nothing else. */
static void softdirty_names_what_was_stored(void **state)
{
    (void)state;
    struct hashes none = {0};
    int fd = file_of_pages("/dev/shm"), to[2], from[2];
    char name[64], byte = 0;
    uint8_t page;
    uint8_t *at = mmap(NULL, PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    assert_int_equal(pipe(to) | pipe(from), 0);
    memset(at, 1, PAGES * PAGE);
    pid_t child = fork();
    if (!child) {
        memset(at, 1, PAGES * PAGE);
        for (close(to[1]); write(from[1], &byte, 1) == 1 && read(to[0], &page, 1) == 1;)
            at[page * PAGE]++;
        _exit(0);
    }
    assert_int_equal(read(from[0], &byte, 1), 1);
    snprintf(name, sizeof name, "/proc/%d/pagemap", child);
    int pagemap = open(name, O_RDONLY);
    bool works = has_soft_bits(pagemap, at);
    snprintf(name, sizeof name, "/proc/%d/clear_refs", child);
    int clear = open(name, O_WRONLY);
    snprintf(name, sizeof name, "/proc/%d/stat", child);
    struct softdirty *s = softdirty_new(pagemap, clear, open(name, O_RDONLY));
    struct track_map map = {&track_softdirty, pagemap, (uintptr_t)at, PAGES * PAGE, 0, s};
    struct track_file file = {.fd = fd, .size = PAGES * PAGE, .published = &none};
    struct extents e = {0};
    for (int i = 0; i < 20 && works; i++) {
        if (!i)
            assert_int_equal(track_softdirty.arm(&map), 0);
        e.count = 0;
        assert_int_equal(track_collect(&map, &file, &e), 0); /* the first time, and when the host moved pages, all */
        e.count = 0;
        assert_int_equal(track_collect(&map, &file, &e), 0);
        assert_int_equal(e.count, 0);
        for (uint8_t p = (uint8_t)i; p < 150; p = (uint8_t)(p + 99)) {
            assert_int_equal(write(to[1], &p, 1), 1);
            assert_int_equal(read(from[0], &byte, 1), 1);
        }
        assert_int_equal(track_collect(&map, &file, &e), 0);
        extents_settle(&e, file.size);
        assert_int_equal(e.count, 2);
        for (size_t k = 0; k < e.count; k++) {
            assert_int_equal(e.at[k].start, ((uint64_t)i + 99 * k) * PAGE);
            assert_int_equal(e.at[k].end, e.at[k].start + PAGE);
        }
    }
    close(to[1]);
    waitpid(child, NULL, 0);
    softdirty_free(s);
    extents_free(&e);
    munmap(at, PAGES * PAGE);
    close(fd);
    close(pagemap);
    close(to[0]);
    close(from[0]);
    close(from[1]);
    if (!works)
        skip();
}

/* A scan of a memory map whose program died finds nothing and says success: the tracker must not. */
static void a_dead_program_is_told(void **state)
{
    (void)state;
    struct mapped m;
    struct hashes none = {0};
    if (!arm(&m, "/dev/shm"))
        skip();
    int pipes[2];
    assert_int_equal(pipe(pipes), 0);
    pid_t child = fork();
    if (!child) {
        pause();
        _exit(0);
    }
    char name[64];
    snprintf(name, sizeof name, "/proc/%d/pagemap", child);
    int pagemap = open(name, O_RDONLY);
    assert_true(pagemap >= 0);
    struct track_map map = {&track_uffd, pagemap, (uintptr_t)m.at, PAGES * PAGE, 0, NULL};
    struct track_file file = {.fd = m.fd, .size = PAGES * PAGE, .published = &none};
    struct extents e = {0};
    kill(child, SIGKILL);
    assert_int_equal(waitpid(child, NULL, 0), child);
    assert_int_equal(track_collect(&map, &file, &e), -ESRCH);
    extents_free(&e);
    close(pagemap);
    disarm(&m);
}

/* Losing the registration must be an error, not a clean region. */
static void a_lost_registration_is_told(void **state)
{
    (void)state;
    struct mapped m;
    struct hashes none = {0};
    if (!arm(&m, "/dev/shm"))
        skip();
    struct track_map map = {&track_uffd, m.pagemap, (uintptr_t)m.at, PAGES * PAGE, 0, NULL};
    struct track_file file = {.fd = m.fd, .size = PAGES * PAGE, .published = &none};
    struct extents e = {0};
    close(m.uffd);
    m.uffd = -1;
    m.at[0] = 1;
    assert_int_equal(track_collect(&map, &file, &e), -EPERM);
    extents_free(&e);
    disarm(&m);
}

/* A hole where data was published is looked at; other holes are not. */
static void everything_passes_over_holes(void **state)
{
    (void)state;
    int fd = file_of_pages("/dev/shm");
    struct hashes h = {0};
    hashes_room(&h, PAGES);
    hashes_set(&h, 50, HASH_UNKNOWN);
    assert_int_equal(pwrite(fd, "x", 1, 7 * PAGE), 1);
    struct track_file file = {.fd = fd, .size = PAGES * PAGE, .published = &h};
    struct extents e = {0};
    assert_int_equal(track_everything(&file, &e), 0);
    extents_settle(&e, file.size);
    assert_int_equal(e.count, 2);
    assert_int_equal(e.at[0].start, 7 * PAGE);
    assert_int_equal(e.at[1].start, 50 * PAGE);
    assert_int_equal(extents_bytes(&e), 2 * PAGE);
    extents_free(&e);
    file.holes_from = 51 * PAGE; /* a hole that was not fetched says nothing */
    hashes_set(&h, 60, HASH_UNKNOWN);
    assert_int_equal(track_everything(&file, &e), 0);
    extents_settle(&e, file.size);
    assert_int_equal(e.count, 2);
    assert_int_equal(e.at[0].start, 7 * PAGE);
    assert_int_equal(e.at[1].start, 60 * PAGE);
    extents_free(&e);
    hashes_free(&h);
    close(fd);
}

/* Whether anything was known of the page. */
static bool blocks_known(struct hashes *h, uint64_t page, uint8_t fill)
{
    uint8_t data[PAGE];
    memset(data, fill, sizeof data);
    return hashes_blocks(h, page, data);
}

static void blocks_keep_to_their_bound(void **state)
{
    (void)state;
    struct hashes a = {0}, b = {0};
    const uint64_t before = hashes_blocks_most, step = 4096;
    assert_int_equal(hashes_blocks_all(), 0);
    hashes_blocks_most = 4 * step;
    assert_int_equal(hashes_room(&a, 1000), 0);
    assert_int_equal(hashes_room(&b, 1000), 0);
    for (uint64_t page = 0; page < 3 * BLOCKS_STEP; page++)
        assert_false(blocks_known(&a, page, 1));
    assert_int_equal(hashes_blocks_bytes(&a), 3 * step);
    assert_true(blocks_known(&a, 0, 2));
    assert_true(blocks_known(&a, 3 * BLOCKS_STEP - 1, 2));
    hashes_forget_blocks(&a, 500); /* of which nothing was known: costs nothing */
    assert_int_equal(hashes_blocks_bytes(&a), 3 * step);
    assert_int_equal(hashes_room(&a, 5000), 0);
    assert_true(blocks_known(&a, 1, 2));

    assert_false(blocks_known(&b, 0, 1)); /* the last that there is room for */
    assert_true(blocks_known(&b, 0, 2));
    assert_false(blocks_known(&b, 400, 1)); /* its own are let go for it */
    assert_int_equal(hashes_blocks_bytes(&b), step);
    assert_true(blocks_known(&b, 400, 2));
    assert_false(blocks_known(&b, 0, 3));
    assert_int_equal(hashes_blocks_all(), 4 * step);
    hashes_forget_all_blocks(&b);
    assert_int_equal(hashes_blocks_bytes(&b), 0);
    assert_false(blocks_known(&a, 999, 1));
    assert_false(blocks_known(&b, 7, 1)); /* all is the other's: nothing is kept */
    assert_false(blocks_known(&b, 7, 2));
    assert_int_equal(hashes_blocks_all(), 4 * step);

    assert_false(blocks_known(&a, 4000, 1)); /* anew */
    assert_int_equal(hashes_blocks_bytes(&a), step);
    assert_false(blocks_known(&a, 0, 3));
    hashes_free(&a);
    hashes_free(&b);
    assert_int_equal(hashes_blocks_all(), 0);
    hashes_blocks_most = before;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(extents_settle_sorts_joins_and_cuts),
        cmocka_unit_test(hashes_of_zeros_are_zero_and_cutting_forgets),
        cmocka_unit_test(the_tree_follows_every_change),
        cmocka_unit_test(files_are_read_as_they_are),
        cmocka_unit_test(uffd_on_disk),
        cmocka_unit_test(uffd_in_memory),
        cmocka_unit_test(hash_on_disk),
        cmocka_unit_test(inotify_in_memory),
        cmocka_unit_test(softdirty_loses_nothing_beside_stores),
        cmocka_unit_test(softdirty_names_what_was_stored),
        cmocka_unit_test(a_dead_program_is_told),
        cmocka_unit_test(a_lost_registration_is_told),
        cmocka_unit_test(everything_passes_over_holes),
        cmocka_unit_test(blocks_keep_to_their_bound),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
