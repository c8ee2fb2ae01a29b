/* What a file's events tell and what they do not, asked of the kernel itself; then our watch, and the tracker that
 * pairs it with hashing.
 *
 * That there is no event is seen without waiting for one: events queue in order, so a write to a second file, watched
 * by the same descriptor, has to come first in the queue. */
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <cmocka.h>

#include "agent/track/track.h"
#include "agent/track/watch.h"

#include <errno.h>
#include <fcntl.h>
#include <stdalign.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/inotify.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGES 16u
#define SIZE (PAGES * PAGE)

struct bed {
    char name[200], other[200];
    int fd, marker, events, wd, marker_wd;
    uint8_t *at;
};

static int made(char *name, size_t cap, const char *dir)
{
    snprintf(name, cap, "%s/memsync-inotify-XXXXXX", dir);
    int fd = mkstemp(name);
    assert_true(fd >= 0);
    assert_int_equal(ftruncate(fd, SIZE), 0);
    return fd;
}

static int watched(const struct bed *b, int fd)
{
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    int wd = inotify_add_watch(b->events, path, IN_MODIFY | IN_ATTRIB | IN_CLOSE_WRITE);
    assert_true(wd >= 0);
    return wd;
}

static void lay(struct bed *b, const char *dir)
{
    b->fd = made(b->name, sizeof b->name, dir);
    b->marker = made(b->other, sizeof b->other, dir);
    b->at = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, b->fd, 0);
    assert_true(b->at != MAP_FAILED);
    b->events = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
    assert_true(b->events >= 0);
    b->wd = watched(b, b->fd);
    b->marker_wd = watched(b, b->marker);
}

static void clear(struct bed *b)
{
    if (b->at)
        munmap(b->at, SIZE);
    if (b->fd >= 0)
        close(b->fd);
    close(b->marker);
    close(b->events);
    unlink(b->name);
    unlink(b->other);
}

/* The events of the file until the marker's, as one mask. */
static uint32_t seen(const struct bed *b)
{
    alignas(struct inotify_event) char queue[65536];
    uint32_t mask = 0;
    bool marked = false;
    assert_int_equal(pwrite(b->marker, "m", 1, 0), 1);
    ssize_t n = read(b->events, queue, sizeof queue);
    assert_true(n > 0);
    for (ssize_t at = 0; at < n;) {
        const struct inotify_event *e = (const void *)(queue + at);
        assert_false(marked && e->wd == b->wd);
        marked |= e->wd == b->marker_wd;
        mask |= e->wd == b->wd ? e->mask : 0;
        at += (ssize_t)(sizeof *e + e->len);
    }
    assert_true(marked);
    return mask;
}

/* ---- the kernel's facts */

static void stores_make_no_event(const char *dir)
{
    struct bed b;
    lay(&b, dir);
    b.at[0] = 1;
    memset(b.at + 3 * PAGE, 7, 5 * PAGE);
    assert_int_equal(seen(&b), 0);
    assert_int_equal(msync(b.at, SIZE, MS_ASYNC), 0);
    assert_int_equal(seen(&b), 0);
    assert_int_equal(msync(b.at, SIZE, MS_SYNC), 0);
    assert_int_equal(seen(&b), 0);
    b.at[PAGE] = 2; /* the first store after write-back */
    assert_int_equal(msync(b.at, SIZE, MS_SYNC | MS_INVALIDATE), 0);
    assert_int_equal(fsync(b.fd), 0);
    assert_int_equal(madvise(b.at, SIZE, MADV_DONTNEED), 0);
    assert_int_equal(seen(&b), 0);
    b.at[2 * PAGE] = 3;
    munmap(b.at, SIZE);
    b.at = NULL;
    assert_int_equal(seen(&b), 0);
    uint8_t byte = 0; /* and yet it is in the file */
    assert_int_equal(pread(b.fd, &byte, 1, 2 * PAGE), 1);
    assert_int_equal(byte, 3);
    clear(&b);
}

static void stores_in_memory_make_no_event(void **state)
{
    (void)state;
    stores_make_no_event("/dev/shm");
}

static void stores_on_disk_make_no_event(void **state)
{
    (void)state;
    stores_make_no_event("/var/tmp");
}

static void calls_make_events(void **state)
{
    (void)state;
    struct bed b;
    loff_t from = 0;
    lay(&b, "/var/tmp");
    assert_int_equal(write(b.fd, "w", 1), 1);
    assert_true(seen(&b) & IN_MODIFY);
    assert_int_equal(pwrite(b.fd, "w", 1, PAGE), 1);
    assert_true(seen(&b) & IN_MODIFY);
    assert_int_equal(ftruncate(b.fd, SIZE + 1), 0);
    assert_true(seen(&b) & IN_MODIFY);
    assert_int_equal(truncate(b.name, SIZE), 0);
    assert_true(seen(&b) & IN_MODIFY);
    assert_int_equal(fallocate(b.fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, PAGE, PAGE), 0);
    assert_true(seen(&b) & IN_MODIFY);
    assert_int_equal(copy_file_range(b.marker, &from, b.fd, NULL, 10, 0), 10);
    assert_true(seen(&b) & IN_MODIFY);
    assert_int_equal(sendfile(b.fd, b.marker, NULL, 10), 10);
    assert_true(seen(&b) & IN_MODIFY);
    clear(&b);
}

/* A mapping keeps its open file: the last close comes with munmap. */
static void letting_go_makes_an_event(void **state)
{
    (void)state;
    struct bed b;
    lay(&b, "/dev/shm");
    b.at[0] = 1;
    close(b.fd);
    b.fd = -1;
    assert_int_equal(seen(&b), 0);
    munmap(b.at, SIZE);
    b.at = NULL;
    assert_int_equal(seen(&b), IN_CLOSE_WRITE);
    clear(&b);
}

/* ---- our watch */

static void a_watch_tells_of_events_once(void **state)
{
    (void)state;
    struct bed b;
    struct watch *w, *twin, *other;
    lay(&b, "/dev/shm");
    assert_int_equal(watch_open(b.fd, &w), 0);
    assert_int_equal(watch_open(b.fd, &twin), 0);
    assert_int_equal(watch_open(b.marker, &other), 0);
    assert_true(watch_take(w) && watch_take(twin) && watch_take(other)); /* of before, nothing is known */
    assert_false(watch_take(w) || watch_take(twin) || watch_take(other));
    b.at[0] = 1;
    assert_false(watch_take(w));
    assert_int_equal(pwrite(b.fd, "w", 1, 0), 1);
    assert_true(watch_take(w));
    assert_false(watch_take(w));
    assert_true(watch_take(twin));
    assert_false(watch_take(other));
    watch_close(w);
    assert_int_equal(pwrite(b.fd, "w", 1, 0), 1);
    assert_true(watch_take(twin)); /* they shared one of the kernel's */
    assert_false(watch_take(twin));
    watch_close(twin);
    assert_int_equal(watch_open(b.fd, &w), 0);
    assert_true(watch_take(w));
    assert_int_equal(pwrite(b.fd, "w", 1, 0), 1);
    assert_true(watch_take(w));
    watch_close(w);
    watch_close(other);
    watch_close(NULL);
    clear(&b);
}

static unsigned queue_length(void)
{
    unsigned length = 0;
    FILE *f = fopen("/proc/sys/fs/inotify/max_queued_events", "r");
    if (f) {
        assert_int_equal(fscanf(f, "%u", &length), 1);
        fclose(f);
    }
    return length;
}

/* Equal events in a row are joined by the kernel: two files by turns fill the queue. Then events of a third are lost.
 */
static void a_full_queue_is_an_event_of_all(void **state)
{
    (void)state;
    struct bed b, c;
    struct watch *w, *other, *third;
    unsigned length = queue_length();
    if (!length || length > 1u << 20)
        skip();
    lay(&b, "/dev/shm");
    lay(&c, "/dev/shm");
    assert_int_equal(watch_open(b.fd, &w), 0);
    assert_int_equal(watch_open(b.marker, &other), 0);
    assert_int_equal(watch_open(c.fd, &third), 0);
    watch_take(w);
    watch_take(other);
    watch_take(third);
    for (unsigned i = 0; i <= length / 2; i++) {
        assert_int_equal(pwrite(b.fd, "w", 1, 0), 1);
        assert_int_equal(pwrite(b.marker, "w", 1, 0), 1);
    }
    assert_int_equal(pwrite(c.fd, "w", 1, 0), 1);
    assert_true(watch_take(third));
    assert_true(watch_take(w) && watch_take(other));
    assert_false(watch_take(w) || watch_take(other) || watch_take(third));
    watch_close(w);
    watch_close(other);
    watch_close(third);
    clear(&b);
    clear(&c);
}

/* In a child, as the instance is made once: here it cannot be, since no descriptor is left. */
static void no_instance_is_an_error(void **state)
{
    (void)state;
    pid_t child = fork();
    if (!child) {
        struct watch *w = NULL;
        int fd = open("/dev/null", O_RDWR);
        struct rlimit none = {(rlim_t)fd + 1, (rlim_t)fd + 1};
        setrlimit(RLIMIT_NOFILE, &none);
        _exit(watch_open(fd, &w) == -EMFILE && !w ? 0 : 1);
    }
    int status;
    assert_int_equal(waitpid(child, &status, 0), child);
    assert_int_equal(status, 0);
}

/* ---- the pair */

static uint64_t found(const struct track_map *map, int fd, struct watch *w, bool clock)
{
    struct hashes none = {0};
    struct extents e = {0};
    struct track_file file = {.fd = fd, .size = SIZE, .published = &none, .clock = clock, .events = watch_take(w)};
    assert_int_equal(track_collect(map, &file, &e), 0);
    extents_settle(&e, SIZE);
    uint64_t bytes = extents_bytes(&e);
    extents_free(&e);
    return bytes;
}

static void a_sync_point_finds_what_events_do_not_tell(void **state)
{
    (void)state;
    struct bed b;
    struct watch *w;
    lay(&b, "/dev/shm");
    struct track_map map = {&track_inotify, -1, (uintptr_t)b.at, SIZE, 0, NULL};
    assert_int_equal(watch_open(b.fd, &w), 0);
    watch_take(w);
    assert_int_equal(map.ops->arm(&map), 0);
    b.at[5 * PAGE] = 1;
    assert_int_equal(found(&map, b.fd, w, true), 0);
    assert_int_equal(found(&map, b.fd, w, false), PAGE);
    assert_int_equal(found(&map, b.fd, w, true), 0);
    assert_int_equal(pwrite(b.fd, "w", 1, 9 * PAGE), 1);
    assert_int_equal(found(&map, b.fd, w, true), 2 * PAGE);
    assert_int_equal(found(&map, b.fd, w, true), 0);
    watch_close(w);
    clear(&b);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(no_instance_is_an_error),         cmocka_unit_test(stores_in_memory_make_no_event),
        cmocka_unit_test(stores_on_disk_make_no_event),    cmocka_unit_test(calls_make_events),
        cmocka_unit_test(letting_go_makes_an_event),       cmocka_unit_test(a_watch_tells_of_events_once),
        cmocka_unit_test(a_full_queue_is_an_event_of_all), cmocka_unit_test(a_sync_point_finds_what_events_do_not_tell),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
