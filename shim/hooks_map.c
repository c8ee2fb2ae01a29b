/* The mmap family.
 *
 * A shared mapping of a tracked file is a range. One made with PROT_WRITE is armed before the program learns its
 * address, so nothing can have been stored in it unseen; one made without is remembered and armed before an mprotect
 * makes it writable. What is about to be unmapped, moved or mapped over is first retired: the agent collects it one
 * last time. The raw call and the change of the table then happen under the lock, because the kernel may give the
 * address away at once.
 *
 * Calls that touch no range of ours are told apart without the lock: by the hull, and inside it by a search that is
 * repeated when the table's sequence moved meanwhile. Tables that were outgrown stay mapped for such readers. */
#include "shim/view.h"

#include <pthread.h>
#include <string.h>

#include "shim/real.h"

struct ranges maps;
static uint32_t sequence; /* odd while the table changes */
static uint64_t hull_low = UINT64_MAX, hull_high;

/* ---- the table under its sequence */

bool maps_room(struct ranges *t)
{
    if (t->count + 2 <= t->cap)
        return true;
    size_t cap = t->cap ? t->cap * 2 : 512;
    struct range *at = raw_memory(cap * sizeof *at);
    if (!at)
        return false;
    memcpy(at, t->at, t->count * sizeof *at);
    __atomic_store_n(&t->at, at, __ATOMIC_RELEASE);
    t->cap = cap;
    return true;
}

static bool room(void)
{
    return maps_room(&maps);
}

void maps_change_begin(void)
{
    __atomic_add_fetch(&sequence, 1, __ATOMIC_SEQ_CST);
}

/* One hull around both tables: what lies outside is told apart by it alone. */
void maps_change_end(void)
{
    uint64_t low = UINT64_MAX, high = 0;
    const struct ranges *const tables[] = {&maps, &view_maps};
    for (int i = 0; i < 2; i++) {
        const struct ranges *t = tables[i];
        if (t->count && t->at[0].start < low)
            low = t->at[0].start;
        if (t->count && t->at[t->count - 1].end > high)
            high = t->at[t->count - 1].end;
    }
    __atomic_store_n(&hull_low, low, __ATOMIC_RELAXED);
    __atomic_store_n(&hull_high, high, __ATOMIC_RELAXED);
    __atomic_add_fetch(&sequence, 1, __ATOMIC_SEQ_CST);
}

static uint64_t pages(uint64_t len)
{
    return (len + shim_page - 1) & ~(shim_page - 1);
}

static bool shows(const struct ranges *t, uint64_t start, uint64_t end)
{
    struct ranges now = {.at = __atomic_load_n(&t->at, __ATOMIC_RELAXED), .count = t->count};
    return ranges_find(&now, start, end) != NULL;
}

/* Whether [start, start + len) touches a range of either table, without the lock. */
static bool touches(uint64_t start, uint64_t len)
{
    uint64_t end = start + pages(len) < start ? UINT64_MAX : start + pages(len);
    if (start >= __atomic_load_n(&hull_high, __ATOMIC_RELAXED) || end <= __atomic_load_n(&hull_low, __ATOMIC_RELAXED))
        return false;
    for (;;) {
        uint32_t seen = __atomic_load_n(&sequence, __ATOMIC_ACQUIRE);
        if (seen & 1)
            return true; /* the slow path will see */
        bool hit = shows(&maps, start, end) || shows(&view_maps, start, end);
        __atomic_thread_fence(__ATOMIC_ACQUIRE);
        if (seen == __atomic_load_n(&sequence, __ATOMIC_RELAXED))
            return hit;
    }
}

static bool touched(const void *at, size_t len)
{
    return shim_active() && len && touches((uint64_t)(uintptr_t)at, len) && shim_mine();
}

/* Removes [start, end); regions left with nothing are released. Lock held. */
static void forget_tracked(uint64_t start, uint64_t end)
{
    if (!room())
        return;
    for (;;) {
        struct range *r = ranges_find(&maps, start, end);
        if (!r)
            return;
        uint32_t region = r->region;
        uint64_t upto = r->end < end ? r->end : end;
        maps_change_begin();
        ranges_cut(&maps, start, upto);
        maps_change_end();
        files_release_idle(region);
        if (!room())
            return;
    }
}

static void forget(uint64_t start, uint64_t end)
{
    forget_tracked(start, end);
    view_forget(start, end);
}

/* Announced pieces of [start, end): to be retired before they change. Lock held. */
static bool announced(uint64_t start, uint64_t end)
{
    for (size_t i = ranges_first(&maps, start); i < maps.count && maps.at[i].start < end; i++)
        if (maps.at[i].state != RANGE_IDLE)
            return true;
    return false;
}

/* Asks the agent for a last look at [start, end) and waits for it. */
static void retire(uint64_t start, uint64_t end, bool publish)
{
    struct held h = shim_lock();
    bool any = announced(start, end);
    shim_unlock(&h);
    if (!any)
        return;
    struct ticket t;
    sync_begin_retire(&t, start, end - start, publish);
    sync_end(&t);
}

/* The raw call failed after all: [start, end) is still mapped, armed where it was, and only the agent has to hear of it
 * again. Lock held. */
static void restore(uint64_t start, uint64_t end)
{
    for (size_t i = ranges_first(&maps, start); i < maps.count && maps.at[i].start < end; i++) {
        struct range r = maps.at[i];
        if (r.state == RANGE_IDLE)
            continue;
        uint64_t lo = r.start > start ? r.start : start, hi = r.end < end ? r.end : end;
        r.offset += lo - r.start;
        r.start = lo;
        r.end = hi;
        client_map(&r, false);
    }
}

/* ---- arming */

/* How a range is to be tracked from now on; says so. Lock held. */
static void track(struct range *r)
{
    const struct region *g = files_region(r->region);
    if (g->mirror) { /* armed already (view_map.c) */
        r->state = RANGE_UFFD;
        return;
    }
    if (g->strategy == RULE_HASH || g->strategy == RULE_INOTIFY) {
        r->state = RANGE_HASHED;
        return;
    }
    if (g->strategy != RULE_SOFTDIRTY && !arm_range(r->start, r->end - r->start)) {
        r->state = RANGE_UFFD;
        return;
    }
    if (g->strategy != RULE_UFFD && !arm_soft()) {
        r->state = RANGE_SOFT;
        return;
    }
    r->state = RANGE_HASHED;
    if (g->strategy == RULE_SOFTDIRTY)
        say_once(SAY_WARN,
                 "%s: strategy softdirty is asked for but not possible here: %s; stores are found by hashing", g->path,
                 arm_soft_reason());
    else if (g->strategy == RULE_UFFD)
        say_once(SAY_WARN, "%s: strategy uffd is asked for but not possible here: %s; stores are found by hashing",
                 g->path, arm_reason());
    else
        say_once(SAY_INFO, "%s: stores are found by hashing: %s; %s", g->path, arm_reason(), arm_soft_reason());
}

static void add(const struct range *r)
{
    if (!room()) {
        say_once(SAY_WARN, "no memory for the table of mappings; a mapping of %s is not tracked",
                 files_region(r->region)->path);
        return;
    }
    maps_change_begin();
    ranges_insert(&maps, r);
    maps_change_end();
}

/* A new mapping. Lock held. */
static void enter(struct range *r, bool writable)
{
    if (writable && client_up()) {
        track(r);
        client_map(r, false);
        say(SAY_INFO, "%s: %l bytes mapped for writing, tracked by %s", files_region(r->region)->path,
            r->end - r->start,
            r->state == RANGE_UFFD                              ? "page-table bits (uffd)"
            : r->state == RANGE_SOFT                            ? "page-table bits (softdirty)"
            : files_region(r->region)->strategy == RULE_INOTIFY ? "hashing at sync points"
                                                                : "hashing");
    }
    add(r);
}

/* ---- mmap */

static bool relevant(int flags, int fd)
{
    int type = flags & MAP_TYPE;
    if ((flags & MAP_ANONYMOUS) || fd < 0 || (type != MAP_SHARED && type != MAP_SHARED_VALIDATE))
        return false;
    uint32_t entry = files_entry(fd);
    if (entry == FD_UNKNOWN)
        entry = files_resolve(fd);
    return files_tracked(entry);
}

/* The table may be stale: only what fd is now counts. */
static uint32_t region_of(int fd)
{
    uint32_t entry = files_entry(fd);
    if (!files_tracked(entry))
        return 0;
    const struct region *g = files_region(files_number(entry));
    struct statx st;
    uint64_t dev;
    struct source s;
    if (!g->used || !files_identify(fd, &st))
        return 0;
    files_source(&st, &dev, &s);
    return dev == g->dev && source_same(&s, &g->source) ? files_number(entry) : 0;
}

static void *map_view(struct open_file *f, void *at, size_t len, int prot, int flags, off_t offset)
{
    uint64_t start = (uint64_t)(uintptr_t)at;
    bool over = (flags & MAP_FIXED) && touched(at, len);
    struct mount *m = view_mount(f); /* asks, perhaps, so before the lock */
    if (!m)
        return MAP_FAILED;
    if (over)
        retire(start, start + pages(len), false);
    struct held h = shim_lock();
    void *got = view_mmap(f, at, len, prot, flags, offset);
    h.error = errno;
    if (got == MAP_FAILED && over)
        restore(start, start + pages(len));
    else if (over)
        forget_tracked(start, start + pages(len));
    start = (uint64_t)(uintptr_t)got;
    if (got != MAP_FAILED && m->region && view_mirror_range(start)) {
        struct range r = {
            .start = start, .end = start + pages(len), .offset = (uint64_t)offset, .region = m->region};
        enter(&r, true); /* whatever its protection: mprotect may come later */
    }
    shim_unlock(&h);
    return got;
}

static void *map(void *at, size_t len, int prot, int flags, int fd, off_t offset)
{
    bool over = (flags & MAP_FIXED) && touched(at, len);
    struct open_file *viewed = flags & MAP_ANONYMOUS || !view_maybe(fd) ? NULL : view_of(fd);
    if (viewed)
        return map_view(viewed, at, len, prot, flags, offset);
    bool ours = relevant(flags, fd) && shim_mine();
    if (!over && !ours)
        return raw_mmap(at, len, prot, flags, fd, offset);
    uint64_t start = (uint64_t)(uintptr_t)at, end = start + pages(len);
    if (over)
        retire(start, end, false);
    struct held h = shim_lock();
    void *got = raw_mmap(at, len, prot, flags, fd, offset);
    h.error = errno;
    if (got == MAP_FAILED) {
        if (over)
            restore(start, end);
    } else {
        start = (uint64_t)(uintptr_t)got;
        uint32_t region = ours ? region_of(fd) : 0;
        if (region)
            files_region(region)->fds++; /* keeps it while an older range of it goes */
        forget(start, start + pages(len));
        if (region) {
            struct range r = {.start = start, .end = start + pages(len), .offset = (uint64_t)offset, .region = region};
            enter(&r, prot & PROT_WRITE);
            files_region(region)->fds--;
        }
    }
    shim_unlock(&h);
    return got;
}

SHIM_EXPORT void *mmap(void *at, size_t len, int prot, int flags, int fd, off_t offset)
{
    if (!shim_active())
        return raw_mmap(at, len, prot, flags, fd, offset);
    return map(at, len, prot, flags, fd, offset);
}

SHIM_EXPORT void *mmap64(void *at, size_t len, int prot, int flags, int fd, off64_t offset)
{
    if (!shim_active())
        return raw_mmap(at, len, prot, flags, fd, offset);
    return map(at, len, prot, flags, fd, offset);
}

SHIM_EXPORT int munmap(void *at, size_t len)
{
    uint64_t start = (uint64_t)(uintptr_t)at, end = start + pages(len);
    if (!touched(at, len) || start % shim_page || end < start)
        return raw_munmap(at, len);
    retire(start, end, true);
    struct held h = shim_lock();
    int rc = raw_munmap(at, len);
    h.error = errno;
    if (rc)
        restore(start, end);
    else
        forget(start, end);
    shim_unlock(&h);
    return rc;
}

/* ---- mremap */

static void *raw_mremap(void *at, size_t old, size_t len, int flags, void *to)
{
    return (void *)syscall(SYS_mremap, at, old, len, flags, to);
}

/* The range whose last byte lies at end - 1 grew to new_end in place. Lock held. */
static void grown(uint64_t end, uint64_t new_end)
{
    struct range *last = ranges_find(&maps, end - 1, end);
    if (!last)
        return;
    struct range tail = *last;
    tail.offset += end - tail.start;
    tail.start = end;
    tail.end = new_end;
    if (tail.state != RANGE_IDLE) {
        track(&tail);
        client_map(&tail, false);
    }
    add(&tail);
}

/* [start, start + old) became [to, to + len): its ranges move along, the last one takes the new length. Lock held. */
static void moved(uint64_t start, uint64_t old, uint64_t to, uint64_t len, bool keep)
{
    uint64_t end = start + old;
    for (uint64_t at = start; at < end;) {
        struct range *r = ranges_find(&maps, at, end);
        if (!r)
            break;
        struct range n = *r;
        uint64_t lo = r->start > start ? r->start : start, hi = r->end < end ? r->end : end;
        n.offset += lo - r->start;
        n.start = to + (lo - start);
        n.end = hi == end ? to + len : to + (hi - start);
        files_region(n.region)->fds++;
        if (!keep)
            forget_tracked(lo, hi);
        forget_tracked(n.start, n.end);
        if (n.state != RANGE_IDLE) {
            track(&n);
            client_map(&n, false);
        }
        add(&n);
        files_region(n.region)->fds--;
        at = hi;
    }
    if (keep)
        restore(start, end);
}

/* A page on each side of where something is moved to, that nobody else gets meanwhile. */
struct room {
    char *at; /* NULL: none */
    size_t len;
};

static void room_leave(const struct room *r)
{
    if (!r->at)
        return;
    raw_munmap(r->at, shim_page);
    raw_munmap(r->at + shim_page + r->len, shim_page);
}

/* mremap takes the registration off what it moved, but only after it has joined that with a neighbour in the new place
 * which continues it in the file: the neighbour loses its own too, without a word, and is stored to unseen, or reads
 * zeros. So things are moved to a place without neighbours. What has no registration any more is not joined with what
 * has one, and may go on from there to the place that the program asks for. The caller leaves the room when the
 * mapping is registered anew. */
static void *move(void *at, size_t old, size_t len, int flags, void *to, struct room *room)
{
    size_t first = pages((flags & MREMAP_FIXED) && old ? old : len);
    uint64_t start = (uint64_t)(uintptr_t)at, target = (uint64_t)(uintptr_t)to;
    bool sound = len && start % shim_page == 0 && (flags & MREMAP_MAYMOVE) && first < first + 2 * shim_page;
    if (flags & MREMAP_DONTUNMAP) /* kernels differ in what they take without a place */
        sound &= (flags & MREMAP_FIXED) != 0;
    if (flags & MREMAP_FIXED)
        sound &= target % shim_page == 0 && (target + pages(len) <= start || start + pages(old) <= target);
    if (!sound || !touches(start, old ? old : 1))
        return raw_mremap(at, old, len, flags, to);
    char *got = raw_mmap(NULL, first + 2 * shim_page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (got == MAP_FAILED)
        return raw_mremap(at, old, len, flags, to);
    *room = (struct room){got, first};
    char *apart = raw_mremap(at, old, first, flags | MREMAP_FIXED, got + shim_page);
    if (apart == MAP_FAILED || !(flags & MREMAP_FIXED))
        return apart;
    char *there = raw_mremap(apart, first, len, MREMAP_MAYMOVE | MREMAP_FIXED, to);
    if (there == MAP_FAILED && !old) {
        int error = errno;
        raw_munmap(apart, first);
        errno = error;
    } else if (there == MAP_FAILED) { /* back, to be registered there */
        int error = errno;
        raw_mremap(apart, first, first, MREMAP_MAYMOVE | MREMAP_FIXED, at);
        view_moved(start, first, start, first, false, true);
        moved(start, first, start, first, false);
        errno = error;
    }
    return there;
}

static void *remap_elsewhere(void *at, size_t old, size_t len, int flags, void *to)
{
    struct room space = {0};
    uint64_t start = (uint64_t)(uintptr_t)at, target = (uint64_t)(uintptr_t)to;
    bool keep = flags & MREMAP_DONTUNMAP;
    if (old && touches(start, old))
        retire(start, start + pages(old), false);
    if ((flags & MREMAP_FIXED) && touches(target, len))
        retire(target, target + pages(len), false);
    struct held h = shim_lock();
    void *got = move(at, old, len, flags, to, &space);
    h.error = errno;
    uint64_t now = (uint64_t)(uintptr_t)got;
    if (got == MAP_FAILED) {
        restore(start, start + pages(old));
        if (flags & MREMAP_FIXED)
            restore(target, target + pages(len));
    } else if (!old) {
        /* A second mapping of the same pages. */
        forget(now, now + pages(len));
        view_moved(start, shim_page, now, pages(len), true, false);
        struct range *r = ranges_find(&maps, start, start + 1);
        if (r) {
            struct range n = *r;
            n.offset += start - r->start;
            n.start = now;
            n.end = now + pages(len);
            files_region(n.region)->fds++;
            enter(&n, n.state != RANGE_IDLE);
            files_region(n.region)->fds--;
        }
    } else if (touches(start, old)) {
        /* A mirror's is in both tables; it is armed before the agent hears that it may look. */
        if (now != start)
            forget(now, now + pages(len));
        view_moved(start, pages(old), now, pages(len), keep, true);
        moved(start, pages(old), now, pages(len), keep);
    } else {
        forget(now, now + pages(len));
    }
    room_leave(&space);
    shim_unlock(&h);
    return got;
}

static void *remap(void *at, size_t old, size_t len, int flags, void *to)
{
    uint64_t start = (uint64_t)(uintptr_t)at, old_end = start + pages(old), new_end = start + pages(len);
    bool other = flags & (MREMAP_FIXED | MREMAP_DONTUNMAP);
    if (start % shim_page || !len || old_end < start || new_end < start || (flags & ~7) || !old || other)
        return remap_elsewhere(at, old, len, flags, to);
    if (new_end < old_end)
        retire(new_end, old_end, false);
    /* In place first: there the registration stays, and only what is new has to be armed. */
    struct held h = shim_lock();
    void *got = raw_mremap(at, old, len, 0, NULL);
    h.error = errno;
    if (got != MAP_FAILED && new_end < old_end)
        forget(new_end, old_end);
    else if (got != MAP_FAILED && new_end > old_end) {
        view_grown(old_end, new_end);
        grown(old_end, new_end);
    }
    else if (got == MAP_FAILED && new_end < old_end)
        restore(new_end, old_end);
    shim_unlock(&h);
    if (got == MAP_FAILED && h.error == ENOMEM && (flags & MREMAP_MAYMOVE) && new_end > old_end)
        return remap_elsewhere(at, old, len, flags, to);
    return got;
}

SHIM_EXPORT void *mremap(void *at, size_t old, size_t len, int flags, ...)
{
    void *to = NULL;
    if (flags & (MREMAP_FIXED | MREMAP_DONTUNMAP)) {
        va_list args;
        va_start(args, flags);
        to = va_arg(args, void *);
        va_end(args);
    }
    bool ours = touched(at, old ? old : 1) || ((flags & MREMAP_FIXED) && touched(to, len));
    return ours ? remap(at, old, len, flags, to) : raw_mremap(at, old, len, flags, to);
}

/* ---- mprotect, madvise */

/* Idle ranges that become writable are armed first: no store can come before. */
static void arm_idle(uint64_t start, uint64_t end)
{
    struct held h = shim_lock();
    if (client_up() && room()) {
        maps_change_begin();
        ranges_split(&maps, start, end);
        maps_change_end();
        for (size_t i = ranges_first(&maps, start); i < maps.count && maps.at[i].start < end; i++)
            if (maps.at[i].state == RANGE_IDLE) {
                track(&maps.at[i]);
                client_map(&maps.at[i], false);
            }
    }
    shim_unlock(&h);
}

/* false, with errno, where that may not be: a shared mapping of what is only read. */
static bool becomes_writable(uint64_t start, size_t len)
{
    if (view_shared(start, start + pages(len))) {
        errno = EACCES;
        return false;
    }
    arm_idle(start, start + pages(len));
    return true;
}

SHIM_EXPORT int mprotect(void *at, size_t len, int prot)
{
    uint64_t start = (uint64_t)(uintptr_t)at;
    if ((prot & PROT_WRITE) && touched(at, len) && start % shim_page == 0 && !becomes_writable(start, len))
        return -1;
    return (int)syscall(SYS_mprotect, at, len, prot);
}

SHIM_EXPORT int pkey_mprotect(void *at, size_t len, int prot, int key)
{
    uint64_t start = (uint64_t)(uintptr_t)at;
    if ((prot & PROT_WRITE) && touched(at, len) && start % shim_page == 0 && !becomes_writable(start, len))
        return -1;
    if (key == -1)
        return (int)syscall(SYS_mprotect, at, len, prot);
    return (int)syscall(SYS_pkey_mprotect, at, len, prot, key);
}

static void inherit(uint64_t start, uint64_t end, bool dontfork)
{
    struct held h = shim_lock();
    if (room()) {
        maps_change_begin();
        ranges_split(&maps, start, end);
        for (size_t i = ranges_first(&maps, start); i < maps.count && maps.at[i].start < end; i++)
            maps.at[i].dontfork = dontfork;
        maps_change_end();
    }
    shim_unlock(&h);
}

/* MADV_REMOVE punches a hole into the file. Others take pages out of the page table, and their soft-dirty bits with them. */
static void mark_range(uint64_t start, uint64_t end, bool soft)
{
    for (uint64_t at = start; at < end;) {
        struct held h = shim_lock();
        struct range *r = ranges_find(&maps, at, end), found = r ? *r : (struct range){0};
        shim_unlock(&h);
        if (!r)
            return;
        uint64_t lo = found.start > at ? found.start : at, hi = found.end < end ? found.end : end;
        if (!soft || found.state == RANGE_SOFT)
            files_mark(found.region, found.offset + (lo - found.start), hi - lo);
        at = hi;
    }
}

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif

SHIM_EXPORT int madvise(void *at, size_t len, int advice)
{
    uint64_t start = (uint64_t)(uintptr_t)at, end = start + pages(len);
    bool hint = advice == MADV_NORMAL || advice == MADV_RANDOM || advice == MADV_SEQUENTIAL || advice == MADV_WILLNEED;
    bool zaps = advice == MADV_REMOVE || advice == MADV_DONTNEED || advice == MADV_DONTNEED_LOCKED ||
                advice == MADV_PAGEOUT || advice == MADV_COLLAPSE;
    bool ours =
        (hint || zaps || advice == MADV_DONTFORK || advice == MADV_DOFORK) && touched(at, len);
    if (ours && advice == MADV_REMOVE && view_shows(start, end)) {
        errno = view_mirrored(start, end) ? EOPNOTSUPP : EACCES;
        return -1;
    }
    if (ours && zaps)
        mark_range(start, end, advice != MADV_REMOVE);
    int rc = (int)syscall(SYS_madvise, at, len, advice);
    int saved = errno;
    if (ours && zaps)
        mark_range(start, end, advice != MADV_REMOVE);
    else if (ours && !rc && !hint)
        inherit(start, end, advice == MADV_DONTFORK);
    if (ours && !rc)
        view_advise(start, end, advice);
    errno = saved;
    return rc;
}

/* ---- msync */

/* The one region of [start, end), 0 for several, UINT32_MAX for none. */
static uint32_t region_under(uint64_t start, uint64_t end)
{
    uint32_t found = UINT32_MAX;
    struct held h = shim_lock();
    for (size_t i = ranges_first(&maps, start); i < maps.count && maps.at[i].start < end; i++) {
        if (found != UINT32_MAX && found != maps.at[i].region) {
            found = 0;
            break;
        }
        found = maps.at[i].region;
    }
    shim_unlock(&h);
    return found;
}

static int raw_msync(void *at, size_t len, int flags)
{
    return real.msync ? real.msync(at, len, flags) : (int)syscall(SYS_msync, at, len, flags);
}

SHIM_EXPORT int msync(void *at, size_t len, int flags)
{
    uint64_t start = (uint64_t)(uintptr_t)at;
    bool valid = start % shim_page == 0 && !(flags & ~(MS_SYNC | MS_ASYNC | MS_INVALIDATE)) &&
                 (flags & (MS_SYNC | MS_ASYNC)) != (MS_SYNC | MS_ASYNC);
    if (!valid || !touched(at, len))
        return raw_msync(at, len, flags);
    uint32_t region = region_under(start, start + pages(len));
    if (region == UINT32_MAX)
        return raw_msync(at, len, flags);
    if (!(flags & MS_SYNC)) {
        sync_async(region);
        return raw_msync(at, len, flags);
    }
    struct ticket t;
    int rc;
    sync_begin(&t, region);
    pthread_cleanup_push(sync_abandon, &t);
    rc = raw_msync(at, len, flags);
    pthread_cleanup_pop(0);
    return sync_result(rc, sync_end(&t));
}

/* ---- over fork and re-attachment */

void maps_announce_all(bool dirty)
{
    for (size_t i = 0; i < maps.count; i++)
        if (maps.at[i].state != RANGE_IDLE)
            client_map(&maps.at[i], dirty);
}

/* The child's copy of a mapping has no registration. Nothing was stored in it yet, so arming here is exact. */
void maps_fork_child(void)
{
    for (size_t i = 0; i < maps.count;) {
        struct range *r = &maps.at[i];
        if (r->dontfork) {
            forget(r->start, r->end);
            continue;
        }
        if (r->state == RANGE_UFFD)
            track(r);
        i++;
    }
    maps_change_begin();
    maps_change_end();
}
