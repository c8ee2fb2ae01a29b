/* The table of mappings that may be stored to, and what becomes of the ranges in it.
 *
 * A range is entered when its file is mapped: armed at once where it may be stored to (maps_enter), else idle until it
 * may (maps_track). What is about to go is first retired: the agent collects it one last time. Then it is forgotten, or
 * restored when the kernel refused. The raw call and the change of the table happen under one hold of the lock, because
 * the kernel may give the address away at once.
 *
 * Calls that touch no range of ours are told apart without the lock: by the hull, and inside it by a search that is
 * repeated when the table's sequence moved meanwhile. Tables that were outgrown stay mapped for such readers. */
#include "shim/view.h"

#include <string.h>

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

static bool shows(const struct ranges *t, uint64_t start, uint64_t end)
{
    struct ranges now = {.at = __atomic_load_n(&t->at, __ATOMIC_RELAXED), .count = t->count};
    return ranges_find(&now, start, end) != NULL;
}

bool maps_touch(uint64_t start, uint64_t len)
{
    uint64_t end = start + maps_pages(len) < start ? UINT64_MAX : start + maps_pages(len);
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

bool maps_touched(const void *at, size_t len)
{
    return shim_active() && len && maps_touch((uint64_t)(uintptr_t)at, len) && shim_mine();
}

void maps_forget_tracked(uint64_t start, uint64_t end)
{
    if (!maps_room(&maps))
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
        if (!maps_room(&maps))
            return;
    }
}

void maps_forget(uint64_t start, uint64_t end)
{
    maps_forget_tracked(start, end);
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

void maps_retire(uint64_t start, uint64_t end, bool publish)
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

void maps_restore(uint64_t start, uint64_t end)
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

void maps_track(struct range *r)
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
        say_once(SAY_WARN, "%s: strategy softdirty is asked for but not possible here: %s; stores are found by hashing",
                 g->path, arm_soft_reason());
    else if (g->strategy == RULE_UFFD)
        say_once(SAY_WARN, "%s: strategy uffd is asked for but not possible here: %s; stores are found by hashing",
                 g->path, arm_reason());
    else
        say_once(SAY_INFO, "%s: stores are found by hashing: %s; %s", g->path, arm_reason(), arm_soft_reason());
}

void maps_add(const struct range *r)
{
    if (!maps_room(&maps)) {
        say_once(SAY_WARN, "no memory for the table of mappings; a mapping of %s is not tracked",
                 files_region(r->region)->path);
        return;
    }
    maps_change_begin();
    ranges_insert(&maps, r);
    maps_change_end();
}

void maps_enter(struct range *r, bool writable)
{
    if (writable && client_up()) {
        maps_track(r);
        client_map(r, false);
        say(SAY_INFO, "%s: %l bytes mapped for writing, tracked by %s", files_region(r->region)->path,
            r->end - r->start,
            r->state == RANGE_UFFD                              ? "page-table bits (uffd)"
            : r->state == RANGE_SOFT                            ? "page-table bits (softdirty)"
            : files_region(r->region)->strategy == RULE_INOTIFY ? "hashing at sync points"
                                                                : "hashing");
    }
    maps_add(r);
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
            maps_forget(r->start, r->end);
            continue;
        }
        if (r->state == RANGE_UFFD)
            maps_track(r);
        i++;
    }
    maps_change_begin();
    maps_change_end();
}
