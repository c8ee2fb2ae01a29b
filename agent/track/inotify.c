/* Tracking by the file's events (inotify(7)), paired with hashing.
 *
 * Every call that writes to the file makes an event, in whatever program: write, truncate, fallocate, splice, io_uring.
 * A store through a mapping makes none, nor does msync of it; not before the mapping and all descriptors of that open
 * file are gone does the close make one. So events cannot stand alone. A sync point's capture compares all of the map
 * by hash; events only tell the clock's captures whether a look is worth it. Stores without a sync point are published
 * by the next one, not by the clock.
 *
 * One instance in the agent, made with the first watch and kept; one kernel watch a file (an inode has at most one in
 * an instance), shared by all our watches of it. The queue is read by whoever takes next, as far as it went then. A
 * queue that ran over is an event of every file; a watch that the kernel took away has events for ever.
 *
 * IN_ATTRIB is left out: times, modes and links are not replicated, and truncation is IN_MODIFY. */
#include "agent/track/track.h"
#include "agent/track/watch.h"

#include <errno.h>
#include <pthread.h>
#include <stdalign.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/inotify.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define BUCKETS 256u

struct watch {
    struct watch *next; /* in its bucket */
    int wd;
    bool events, lost;
};

static struct {
    pthread_mutex_t lock;
    int fd;
    struct watch *at[BUCKETS]; /* by wd */
} all = {.lock = PTHREAD_MUTEX_INITIALIZER, .fd = -1};

static struct watch **bucket(int wd)
{
    return &all.at[(unsigned)wd % BUCKETS];
}

static void everybody(void)
{
    for (unsigned i = 0; i < BUCKETS; i++)
        for (struct watch *w = all.at[i]; w; w = w->next)
            w->events = true;
}

static void hear(const struct inotify_event *e)
{
    if (e->mask & IN_Q_OVERFLOW) {
        everybody();
        return;
    }
    for (struct watch *w = *bucket(e->wd); w; w = w->next)
        if (w->wd == e->wd) {
            w->events = true;
            w->lost |= (e->mask & IN_IGNORED) != 0;
        }
}

/* What is in the queue now; what comes meanwhile is the next one's. */
static void drain(void)
{
    alignas(struct inotify_event) char events[4096];
    int left = 0;
    if (ioctl(all.fd, FIONREAD, &left) < 0)
        everybody();
    while (left > 0) {
        ssize_t n = read(all.fd, events, sizeof events);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0) {
            everybody();
            return;
        }
        for (ssize_t at = 0; at < n;) {
            const struct inotify_event *e = (const void *)(events + at);
            hear(e);
            at += (ssize_t)(sizeof *e + e->len);
        }
        left -= (int)n;
    }
}

static int add(int fd)
{
    char path[64];
    if (all.fd < 0)
        all.fd = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
    if (all.fd < 0)
        return -errno;
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    int wd = inotify_add_watch(all.fd, path, IN_MODIFY | IN_CLOSE_WRITE);
    return wd < 0 ? -errno : wd;
}

int watch_open(int fd, struct watch **out)
{
    struct watch *w = calloc(1, sizeof *w);
    if (!w)
        return -ENOMEM;
    pthread_mutex_lock(&all.lock);
    int wd = add(fd);
    if (wd >= 0) {
        struct watch **at = bucket(wd);
        *w = (struct watch){.next = *at, .wd = wd, .events = true};
        *at = w;
    }
    pthread_mutex_unlock(&all.lock);
    if (wd < 0) {
        free(w);
        return wd;
    }
    *out = w;
    return 0;
}

bool watch_take(struct watch *w)
{
    pthread_mutex_lock(&all.lock);
    drain();
    bool events = w->events || w->lost;
    w->events = false;
    pthread_mutex_unlock(&all.lock);
    return events;
}

void watch_close(struct watch *w)
{
    bool shared = false;
    if (!w)
        return;
    pthread_mutex_lock(&all.lock);
    struct watch **at = bucket(w->wd);
    while (*at != w)
        at = &(*at)->next;
    *at = w->next;
    for (struct watch *other = *bucket(w->wd); other; other = other->next)
        shared |= other->wd == w->wd;
    if (!shared)
        inotify_rm_watch(all.fd, w->wd);
    pthread_mutex_unlock(&all.lock);
    free(w);
}

static int inotify_arm(const struct track_map *map)
{
    (void)map;
    return 0;
}

static int inotify_collect(const struct track_map *map, const struct track_file *file, struct extents *out)
{
    if (file->clock && !file->events)
        return 0;
    return track_within(file, map->offset, map->offset + map->len, out);
}

const struct track_ops track_inotify = {
    .name = "inotify", .arm = inotify_arm, .collect = inotify_collect, .reads_all = true};
