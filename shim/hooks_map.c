/* The calls of the mmap family.
 *
 * A shared mapping of a tracked file is a range of the table in maps.c. One made with PROT_WRITE is armed before the
 * program learns its address, so nothing can have been stored in it unseen; one made without is remembered and armed
 * before an mprotect makes it writable. What is about to be unmapped, moved or mapped over is first retired. */
#include "shim/view.h"

#include <pthread.h>

#include "shim/real.h"

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
    bool over = (flags & MAP_FIXED) && maps_touched(at, len);
    struct mount *m = view_mount(f); /* asks, perhaps, so before the lock */
    if (!m)
        return MAP_FAILED;
    if (over)
        maps_retire(start, start + maps_pages(len), false);
    struct held h = shim_lock();
    void *got = view_mmap(f, at, len, prot, flags, offset);
    h.error = errno;
    if (got == MAP_FAILED && over)
        maps_restore(start, start + maps_pages(len));
    else if (over)
        maps_forget_tracked(start, start + maps_pages(len));
    start = (uint64_t)(uintptr_t)got;
    if (got != MAP_FAILED && m->region && view_mirror_range(start)) {
        struct range r = {
            .start = start, .end = start + maps_pages(len), .offset = (uint64_t)offset, .region = m->region};
        maps_enter(&r, true); /* whatever its protection: mprotect may come later */
    }
    shim_unlock(&h);
    return got;
}

static void *map(void *at, size_t len, int prot, int flags, int fd, off_t offset)
{
    bool over = (flags & MAP_FIXED) && maps_touched(at, len);
    struct open_file *viewed = flags & MAP_ANONYMOUS || !view_maybe(fd) ? NULL : view_of(fd);
    if (viewed)
        return map_view(viewed, at, len, prot, flags, offset);
    bool ours = relevant(flags, fd) && shim_mine();
    if (!over && !ours)
        return raw_mmap(at, len, prot, flags, fd, offset);
    uint64_t start = (uint64_t)(uintptr_t)at, end = start + maps_pages(len);
    if (over)
        maps_retire(start, end, false);
    struct held h = shim_lock();
    void *got = raw_mmap(at, len, prot, flags, fd, offset);
    h.error = errno;
    if (got == MAP_FAILED) {
        if (over)
            maps_restore(start, end);
    } else {
        start = (uint64_t)(uintptr_t)got;
        uint32_t region = ours ? region_of(fd) : 0;
        if (region)
            files_region(region)->fds++; /* keeps it while an older range of it goes */
        maps_forget(start, start + maps_pages(len));
        if (region) {
            struct range r = {
                .start = start, .end = start + maps_pages(len), .offset = (uint64_t)offset, .region = region};
            maps_enter(&r, prot & PROT_WRITE);
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
    uint64_t start = (uint64_t)(uintptr_t)at, end = start + maps_pages(len);
    if (!maps_touched(at, len) || start % shim_page || end < start)
        return raw_munmap(at, len);
    maps_retire(start, end, true);
    struct held h = shim_lock();
    int rc = raw_munmap(at, len);
    h.error = errno;
    if (rc)
        maps_restore(start, end);
    else
        maps_forget(start, end);
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
        maps_track(&tail);
        client_map(&tail, false);
    }
    maps_add(&tail);
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
            maps_forget_tracked(lo, hi);
        maps_forget_tracked(n.start, n.end);
        if (n.state != RANGE_IDLE) {
            maps_track(&n);
            client_map(&n, false);
        }
        maps_add(&n);
        files_region(n.region)->fds--;
        at = hi;
    }
    if (keep)
        maps_restore(start, end);
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
    size_t first = maps_pages((flags & MREMAP_FIXED) && old ? old : len);
    uint64_t start = (uint64_t)(uintptr_t)at, target = (uint64_t)(uintptr_t)to;
    bool sound = len && start % shim_page == 0 && (flags & MREMAP_MAYMOVE) && first < first + 2 * shim_page;
    if (flags & MREMAP_DONTUNMAP) /* kernels differ in what they take without a place */
        sound &= (flags & MREMAP_FIXED) != 0;
    if (flags & MREMAP_FIXED)
        sound &= target % shim_page == 0 && (target + maps_pages(len) <= start || start + maps_pages(old) <= target);
    if (!sound || !maps_touch(start, old ? old : 1))
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
    if (old && maps_touch(start, old))
        maps_retire(start, start + maps_pages(old), false);
    if ((flags & MREMAP_FIXED) && maps_touch(target, len))
        maps_retire(target, target + maps_pages(len), false);
    struct held h = shim_lock();
    void *got = move(at, old, len, flags, to, &space);
    h.error = errno;
    uint64_t now = (uint64_t)(uintptr_t)got;
    if (got == MAP_FAILED) {
        maps_restore(start, start + maps_pages(old));
        if (flags & MREMAP_FIXED)
            maps_restore(target, target + maps_pages(len));
    } else if (!old) {
        /* A second mapping of the same pages. */
        maps_forget(now, now + maps_pages(len));
        view_moved(start, shim_page, now, maps_pages(len), true, false);
        struct range *r = ranges_find(&maps, start, start + 1);
        if (r) {
            struct range n = *r;
            n.offset += start - r->start;
            n.start = now;
            n.end = now + maps_pages(len);
            files_region(n.region)->fds++;
            maps_enter(&n, n.state != RANGE_IDLE);
            files_region(n.region)->fds--;
        }
    } else if (maps_touch(start, old)) {
        /* A mirror's is in both tables; it is armed before the agent hears that it may look. */
        if (now != start)
            maps_forget(now, now + maps_pages(len));
        view_moved(start, maps_pages(old), now, maps_pages(len), keep, true);
        moved(start, maps_pages(old), now, maps_pages(len), keep);
    } else {
        maps_forget(now, now + maps_pages(len));
    }
    room_leave(&space);
    shim_unlock(&h);
    return got;
}

static void *remap(void *at, size_t old, size_t len, int flags, void *to)
{
    uint64_t start = (uint64_t)(uintptr_t)at, old_end = start + maps_pages(old), new_end = start + maps_pages(len);
    bool other = flags & (MREMAP_FIXED | MREMAP_DONTUNMAP);
    if (start % shim_page || !len || old_end < start || new_end < start || (flags & ~7) || !old || other)
        return remap_elsewhere(at, old, len, flags, to);
    if (new_end < old_end)
        maps_retire(new_end, old_end, false);
    /* In place first: there the registration stays, and only what is new has to be armed. */
    struct held h = shim_lock();
    void *got = raw_mremap(at, old, len, 0, NULL);
    h.error = errno;
    if (got != MAP_FAILED && new_end < old_end)
        maps_forget(new_end, old_end);
    else if (got != MAP_FAILED && new_end > old_end) {
        view_grown(old_end, new_end);
        grown(old_end, new_end);
    } else if (got == MAP_FAILED && new_end < old_end)
        maps_restore(new_end, old_end);
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
    bool ours = maps_touched(at, old ? old : 1) || ((flags & MREMAP_FIXED) && maps_touched(to, len));
    return ours ? remap(at, old, len, flags, to) : raw_mremap(at, old, len, flags, to);
}

/* ---- mprotect, madvise */

/* Idle ranges that become writable are armed first: no store can come before. */
static void arm_idle(uint64_t start, uint64_t end)
{
    struct held h = shim_lock();
    if (client_up() && maps_room(&maps)) {
        maps_change_begin();
        ranges_split(&maps, start, end);
        maps_change_end();
        for (size_t i = ranges_first(&maps, start); i < maps.count && maps.at[i].start < end; i++)
            if (maps.at[i].state == RANGE_IDLE) {
                maps_track(&maps.at[i]);
                client_map(&maps.at[i], false);
            }
    }
    shim_unlock(&h);
}

/* false, with errno, where that may not be: a shared mapping of what is only read. */
static bool may_protect(void *at, size_t len, int prot)
{
    uint64_t start = (uint64_t)(uintptr_t)at;
    if (!(prot & PROT_WRITE) || !maps_touched(at, len) || start % shim_page)
        return true;
    if (view_shared(start, start + maps_pages(len))) {
        errno = EACCES;
        return false;
    }
    arm_idle(start, start + maps_pages(len));
    return true;
}

SHIM_EXPORT int mprotect(void *at, size_t len, int prot)
{
    return may_protect(at, len, prot) ? (int)syscall(SYS_mprotect, at, len, prot) : -1;
}

SHIM_EXPORT int pkey_mprotect(void *at, size_t len, int prot, int key)
{
    if (!may_protect(at, len, prot))
        return -1;
    if (key == -1)
        return (int)syscall(SYS_mprotect, at, len, prot);
    return (int)syscall(SYS_pkey_mprotect, at, len, prot, key);
}

static void inherit(uint64_t start, uint64_t end, bool dontfork)
{
    struct held h = shim_lock();
    if (maps_room(&maps)) {
        maps_change_begin();
        ranges_split(&maps, start, end);
        for (size_t i = ranges_first(&maps, start); i < maps.count && maps.at[i].start < end; i++)
            maps.at[i].dontfork = dontfork;
        maps_change_end();
    }
    shim_unlock(&h);
}

/* MADV_REMOVE punches a hole into the file. Others take pages out of the page table, and their soft-dirty bits with
 * them. */
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
    uint64_t start = (uint64_t)(uintptr_t)at, end = start + maps_pages(len);
    bool hint = advice == MADV_NORMAL || advice == MADV_RANDOM || advice == MADV_SEQUENTIAL || advice == MADV_WILLNEED;
    bool zaps = advice == MADV_REMOVE || advice == MADV_DONTNEED || advice == MADV_DONTNEED_LOCKED ||
                advice == MADV_PAGEOUT || advice == MADV_COLLAPSE;
    bool ours = (hint || zaps || advice == MADV_DONTFORK || advice == MADV_DOFORK) && maps_touched(at, len);
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
    if (!valid || !maps_touched(at, len))
        return raw_msync(at, len, flags);
    uint32_t region = region_under(start, start + maps_pages(len));
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
