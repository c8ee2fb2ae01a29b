/* Tracking by soft-dirty bits (Documentation/admin-guide/mm/soft-dirty.rst): bit 55 of /proc/PID/pagemap says that a
 * page was stored to since somebody wrote 4 to /proc/PID/clear_refs. For kernels whose userfaultfd cannot do better.
 *
 * Three things make these bits less than they seem, and are dealt with here.
 *
 * 1. Clearing takes the whole process. So one look reads the bits of all mappings that are tracked of the program, and
 *    what is not of the map asked about waits for its own collect.
 *
 * 2. Reading and clearing are two steps, and a store in between would be lost. But a bit that is clear becomes set by a
 *    page fault alone, and a fault is counted (/proc/PID/stat) before it lets go of the lock that clearing takes. So
 *    when the count before the reading is the count after the clearing, no bit was set between. That is so for a
 *    program that stands still while it syncs. When the count moved during the reading, the bits are taken and not
 *    cleared: the same pages are named again the next time, which costs their comparison and loses nothing. Only when
 *    these have become half of what is mapped they are cleared in spite of it. When the count moved up to the clearing
 *    all of the program's mappings are doubted: compared by hash, once. The program is never stopped.
 *
 * 3. What is not in the page table has no bit: a page that was stored to and then reclaimed looks as if it never had
 *    been there. Reclaim is counted for the whole host (/proc/vmstat). When it ran since the last look, pages that are
 *    not in the page table are doubted. Migration of pages is counted, too: one that was under way while bits were
 *    cleared leaves a page that is stored to without a fault; so after it all is doubted. (These counters are of
 *    batches, so that a look in the middle of one may learn of it one look late.) madvise is the library's to watch.
 *
 * What is doubted and a new mapping, whose pages all count as stored to, is compared as strategy hash does.
 *
 * Lock: one a program, held over a look, which is made on pool threads and on the loop's. */
#include "agent/track/softdirty.h"
#include "agent/track/track.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define ENTRIES 2048u /* page-table entries read at a time */
#define SOFT_DIRTY (1ULL << 55)
#define THERE (3ULL << 62) /* present, or swapped or on its way */
#define TRIES 2

struct span {
    struct span *next;
    uint64_t addr, end;
    bool doubted; /* all of it */
};

struct softdirty {
    pthread_mutex_t lock;
    int pagemap, clear_refs, stat;
    struct span *spans;
    struct extents dirty, doubted; /* addresses: found, and not collected yet */
    bool counted;                  /* the two below are of the last look */
    uint64_t reclaimed, migrated;
    uint64_t looked; /* when the last look began, ns */
};

struct softdirty *softdirty_new(int pagemap, int clear_refs, int stat)
{
    struct softdirty *s = calloc(1, sizeof *s);
    if (!s) {
        close(clear_refs);
        close(stat);
        return NULL;
    }
    *s = (struct softdirty){.pagemap = pagemap, .clear_refs = clear_refs, .stat = stat};
    pthread_mutex_init(&s->lock, NULL);
    return s;
}

void softdirty_free(struct softdirty *s)
{
    if (!s)
        return;
    for (struct span *next; s->spans; s->spans = next) {
        next = s->spans->next;
        free(s->spans);
    }
    extents_free(&s->dirty);
    extents_free(&s->doubted);
    close(s->clear_refs);
    close(s->stat);
    pthread_mutex_destroy(&s->lock);
    free(s);
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* ---- the program's mappings ---- */

static void doubt_all(struct softdirty *s)
{
    for (struct span *p = s->spans; p; p = p->next)
        p->doubted = true;
}

/* Takes [start, end) out of the set, into `taken` unless NULL. */
static void cut(struct softdirty *s, struct extents *e, uint64_t start, uint64_t end, struct extents *taken)
{
    struct extents rest = {0};
    for (size_t i = 0; i < e->count; i++) {
        uint64_t lo = e->at[i].start > start ? e->at[i].start : start, hi = e->at[i].end < end ? e->at[i].end : end;
        if (lo >= hi) {
            extents_add(&rest, e->at[i].start, e->at[i].end);
            continue;
        }
        extents_add(&rest, e->at[i].start, lo);
        extents_add(&rest, hi, e->at[i].end);
        if (taken)
            extents_add(taken, lo, hi);
    }
    if (e->lost || rest.lost || (taken && taken->lost))
        doubt_all(s);
    rest.lost = false;
    extents_free(e);
    *e = rest;
}

static int add_span(struct softdirty *s, uint64_t addr, uint64_t end)
{
    struct span *p = malloc(sizeof *p);
    if (!p)
        return -ENOMEM;
    *p = (struct span){s->spans, addr, end, true};
    s->spans = p;
    return 0;
}

/* Where memory for the second half of a split is missing, the span stays as it is: then too much is looked at. */
static void forget_span(struct softdirty *s, uint64_t start, uint64_t end)
{
    for (struct span **at = &s->spans, *p; (p = *at);) {
        if (p->end <= start || p->addr >= end) {
            at = &p->next;
        } else if (p->addr < start) {
            if (p->end <= end || !add_span(s, end, p->end))
                p->end = start;
            at = &p->next;
        } else if (p->end > end) {
            p->addr = end;
            at = &p->next;
        } else {
            *at = p->next;
            free(p);
        }
    }
}

void softdirty_forget(struct softdirty *s, uint64_t addr, uint64_t len)
{
    pthread_mutex_lock(&s->lock);
    forget_span(s, addr, addr + len);
    cut(s, &s->dirty, addr, addr + len, NULL);
    cut(s, &s->doubted, addr, addr + len, NULL);
    pthread_mutex_unlock(&s->lock);
}

static int soft_arm(const struct track_map *map)
{
    struct softdirty *s = map->soft;
    uint64_t entry;
    if (!s || map->pagemap < 0)
        return -ENOENT;
    ssize_t n = pread(map->pagemap, &entry, sizeof entry, (off_t)(map->addr / PAGE * sizeof entry));
    if (n != sizeof entry)
        return n < 0 ? -errno : -ESRCH;
    pthread_mutex_lock(&s->lock);
    struct span *p = s->spans;
    while (p && (p->addr > map->addr || p->end < map->addr + map->len))
        p = p->next;
    int rc = p ? 0 : add_span(s, map->addr, map->addr + map->len);
    pthread_mutex_unlock(&s->lock);
    return rc;
}

/* ---- what the kernel counts ---- */

/* The program's page faults, those of its ended threads too. */
static int faults(const struct softdirty *s, uint64_t *count)
{
    char text[1024];
    ssize_t n = pread(s->stat, text, sizeof text - 1, 0);
    if (n <= 0)
        return n < 0 ? -errno : -ESRCH;
    text[n] = 0;
    const char *at = strrchr(text, ')'); /* the name before it may hold anything */
    unsigned long long minor, major;
    if (!at || sscanf(at + 1, " %*c %*d %*d %*d %*d %*d %*u %llu %*u %llu", &minor, &major) != 2)
        return -EIO;
    *count = minor + major;
    return 0;
}

static bool starts(const char *line, const char *const *names)
{
    for (; *names; names++)
        if (!strncmp(line, *names, strlen(*names)))
            return true;
    return false;
}

static int host_counts(uint64_t *reclaimed, uint64_t *migrated)
{
    static const char *const reclaims[] = {"pgscan_", "pgsteal_", NULL};
    static const char *const migrations[] = {"pgmigrate_", "numa_pages_migrated", "thp_collapse_alloc",
                                             "thp_split_pmd", "thp_file_mapped", NULL};
    FILE *f = fopen("/proc/vmstat", "re");
    char line[128];
    if (!f)
        return -errno;
    *reclaimed = *migrated = 0;
    while (fgets(line, sizeof line, f)) {
        const char *value = strchr(line, ' ');
        if (value && starts(line, reclaims))
            *reclaimed += strtoull(value, NULL, 10);
        else if (value && starts(line, migrations))
            *migrated += strtoull(value, NULL, 10);
    }
    fclose(f);
    return 0;
}

/* ---- the look ---- */

static int read_bits(struct softdirty *s, const struct span *p, bool reclaim, uint64_t *dirty)
{
    uint64_t entries[ENTRIES];
    for (uint64_t at = p->addr; at < p->end;) {
        uint64_t want = (p->end - at) / PAGE < ENTRIES ? (p->end - at) / PAGE : ENTRIES;
        ssize_t n = pread(s->pagemap, entries, want * sizeof *entries, (off_t)(at / PAGE * sizeof *entries));
        if (n < 0 && errno == EINTR)
            continue;
        if (n < (ssize_t)sizeof *entries)
            return n < 0 ? -errno : -ESRCH;
        for (size_t i = 0; i < (size_t)n / sizeof *entries; i++, at += PAGE) {
            *dirty += entries[i] & SOFT_DIRTY ? PAGE : 0;
            if (p->doubted)
                continue;
            if (entries[i] & SOFT_DIRTY)
                extents_add(&s->dirty, at, at + PAGE);
            else if (reclaim && !(entries[i] & THERE))
                extents_add(&s->doubted, at, at + PAGE);
        }
    }
    return 0;
}

/* *moved: faults were counted meanwhile. */
static int read_all(struct softdirty *s, bool reclaim, uint64_t *count, bool *moved, uint64_t *dirty)
{
    uint64_t after;
    *dirty = 0;
    int rc = faults(s, count);
    for (const struct span *p = s->spans; p && !rc; p = p->next)
        rc = read_bits(s, p, reclaim, dirty);
    if (!rc)
        rc = faults(s, &after);
    *moved = !rc && after != *count;
    return rc;
}

static int clear(struct softdirty *s)
{
    while (pwrite(s->clear_refs, "4", 1, 0) < 0)
        if (errno != EINTR)
            return -errno;
    return 0;
}

static int look(struct softdirty *s)
{
    uint64_t reclaimed = 0, migrated = 0, before = 0, after, mapped = 0, dirty;
    bool counted = !host_counts(&reclaimed, &migrated), moved = true;
    s->looked = now_ns();
    if (!counted || !s->counted || migrated != s->migrated)
        doubt_all(s);
    bool reclaim = reclaimed != s->reclaimed;
    s->counted = counted;
    s->reclaimed = reclaimed;
    s->migrated = migrated;
    for (int i = 0; moved && i < TRIES; i++) {
        int rc = read_all(s, reclaim, &before, &moved, &dirty);
        if (rc)
            return rc;
    }
    extents_settle(&s->dirty, INT64_MAX);
    extents_settle(&s->doubted, INT64_MAX);
    if (s->dirty.lost || s->doubted.lost)
        doubt_all(s);
    s->dirty.lost = s->doubted.lost = false;
    for (const struct span *p = s->spans; p; p = p->next)
        mapped += p->end - p->addr;
    if (!dirty || (moved && dirty < mapped / 2))
        return 0;
    int rc = clear(s);
    if (!rc)
        rc = faults(s, &after);
    if (rc || after != before)
        doubt_all(s);
    return rc;
}

static int collect_map(struct softdirty *s, const struct track_map *map, const struct track_file *file,
                       struct extents *out)
{
    uint64_t start = map->addr, end = start + map->len;
    struct extents dirty = {0}, doubted = {0};
    bool known = false;
    int rc = 0;
    cut(s, &s->dirty, start, end, &dirty);
    cut(s, &s->doubted, start, end, &doubted);
    for (size_t i = 0; i < dirty.count; i++)
        extents_add(out, map->offset + (dirty.at[i].start - start), map->offset + (dirty.at[i].end - start));
    for (size_t i = 0; i < doubted.count && !rc; i++)
        rc = track_within(file, map->offset + (doubted.at[i].start - start),
                          map->offset + (doubted.at[i].end - start), out);
    for (struct span *p = s->spans; p && !rc; p = p->next) {
        uint64_t lo = p->addr > start ? p->addr : start, hi = p->end < end ? p->end : end;
        if (lo >= hi)
            continue;
        known = true;
        if (!p->doubted)
            continue;
        rc = track_within(file, map->offset + (lo - start), map->offset + (hi - start), out);
        p->doubted = rc || lo != p->addr || hi != p->end;
    }
    if (!rc && !known) /* a map that is being retired */
        rc = track_within(file, map->offset, map->offset + map->len, out);
    extents_free(&dirty);
    extents_free(&doubted);
    return rc;
}

static int soft_collect(const struct track_map *map, const struct track_file *file, struct extents *out)
{
    struct softdirty *s = map->soft;
    pthread_mutex_lock(&s->lock);
    /* One look tells of all the program's mappings. */
    int rc = file->began && s->looked > file->began ? 0 : look(s);
    if (!rc)
        rc = collect_map(s, map, file, out);
    else
        doubt_all(s);
    pthread_mutex_unlock(&s->lock);
    return rc;
}

const struct track_ops track_softdirty = {.name = "softdirty", .arm = soft_arm, .collect = soft_collect};
