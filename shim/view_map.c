/* Mappings of views: the memfd, mapped where and as the program asks, registered for missing faults.
 *
 * No page may ever be touched through a mapping that is not registered: the kernel would put a page of zeros into the
 * memfd, for all who have it. So a mapping is made without access, registered, and only then given its protection. A
 * child of a raw clone does not get it (MADV_DONTFORK); fork lifts that for its moment, and the child registers what it
 * inherited before anything else of it runs: shared pages are the memfd's, private ones that were stored to are the
 * child's own copies, as the program expects. */
#include "shim/view.h"

#include <string.h>

/* MIRROR: shared, may be stored to, and a range of the region's as well (maps.c). */
enum { RANGE_VIEW_SHARED, RANGE_VIEW_PRIVATE, RANGE_VIEW_MIRROR };

struct ranges view_maps;
bool view_buffers;

static int advise(uint64_t start, uint64_t end, int advice)
{
    return (int)syscall(SYS_madvise, start, end - start, advice);
}

static void tell(const struct range *r)
{
    struct control_view_map m = {
        .view = view_mounts[r->region].number, .addr = r->start, .len = r->end - r->start, .offset = r->offset};
    if (client_up())
        client_send(client_buffer, control_view_map_put(client_buffer, sizeof client_buffer, &m), NULL, 0);
}

void view_maps_announce(void)
{
    for (size_t i = 0; i < view_maps.count; i++) {
        const struct range *r = &view_maps.at[i];
        struct control_view_map m = {
            .view = view_mounts[r->region].number, .addr = r->start, .len = r->end - r->start, .offset = r->offset};
        client_send(client_buffer, control_view_map_put(client_buffer, sizeof client_buffer, &m), NULL, 0);
    }
}

static bool add(const struct range *r)
{
    if (!maps_room(&view_maps))
        return false;
    maps_change_begin();
    ranges_insert(&view_maps, r);
    maps_change_end();
    view_buffers = arm_user_mode_only;
    return true;
}

static int arm(const struct range *r)
{
    uint64_t len = r->end - r->start;
    return r->state == RANGE_VIEW_MIRROR ? arm_mirror(r->start, len) : arm_missing(r->start, len);
}

/* Lock held. 0 or a negative errno. */
static int guard(const struct range *r)
{
    if (!arm_can_miss())
        return 0; /* it was fetched whole */
    int rc = arm(r);
    if (!rc)
        advise(r->start, r->end, MADV_DONTFORK);
    return rc;
}

static void *map_guarded(struct mount *m, uint8_t state, void *at, size_t len, int prot, int flags, off_t offset)
{
    int memory = view_memory(m);
    if (memory < 0 || !maps_room(&view_maps)) {
        errno = ENOMEM;
        return MAP_FAILED;
    }
    void *got = raw_mmap(at, len, PROT_NONE, flags & ~(MAP_POPULATE | MAP_LOCKED), memory, offset);
    if (got == MAP_FAILED)
        return got;
    struct range r = {.start = (uint64_t)(uintptr_t)got,
                      .end = (uint64_t)(uintptr_t)got + maps_pages(len),
                      .offset = (uint64_t)offset,
                      .region = (uint32_t)(m - view_mounts),
                      .state = state};
    int rc = guard(&r);
    if (!rc && syscall(SYS_mprotect, got, len, prot))
        rc = -errno;
    if (rc) {
        say_once(SAY_ERROR, "%s: a mapping cannot be registered: %e", m->path, rc);
        raw_munmap(got, len);
        errno = ENOMEM;
        return MAP_FAILED;
    }
    if (flags & MAP_FIXED)
        view_forget(r.start, r.end);
    add(&r);
    tell(&r);
    if (flags & MAP_POPULATE)
        view_advise(r.start, r.end, MADV_WILLNEED);
    return got;
}

void *view_mmap(struct open_file *f, void *at, size_t len, int prot, int flags, off_t offset)
{
    int type = flags & MAP_TYPE;
    struct mount *m = view_mount(f);
    if (!m)
        return MAP_FAILED;
    bool mirror = type != MAP_PRIVATE && view_writable(f) && m->region;
    errno = type != MAP_PRIVATE && (prot & PROT_WRITE) && !mirror    ? EACCES
            : (f->held->flags & O_ACCMODE) == O_WRONLY               ? EACCES
            : offset < 0 || (uint64_t)offset % shim_page || !len     ? EINVAL
            : (uint64_t)offset > INT64_MAX - len || maps_pages(len) < len ? EOVERFLOW
                                                                     : 0;
    if (errno)
        return MAP_FAILED;
    uint8_t state = type == MAP_PRIVATE ? RANGE_VIEW_PRIVATE : mirror ? RANGE_VIEW_MIRROR : RANGE_VIEW_SHARED;
    return map_guarded(m, state, at, len, prot, flags, offset);
}

bool view_mirror_range(uint64_t start)
{
    const struct range *r = ranges_find(&view_maps, start, start + 1);
    return r && r->state == RANGE_VIEW_MIRROR;
}

void view_forget(uint64_t start, uint64_t end)
{
    if (!ranges_find(&view_maps, start, end) || !maps_room(&view_maps))
        return;
    for (struct range *r; (r = ranges_find(&view_maps, start, end));) {
        uint32_t mount = r->region;
        uint64_t upto = r->end < end ? r->end : end;
        maps_change_begin();
        ranges_cut(&view_maps, start, upto);
        maps_change_end();
        view_release_idle(mount);
        if (!maps_room(&view_maps))
            break;
    }
    struct control_view_unmap m = {.addr = start, .len = end - start};
    if (client_connected())
        client_send(client_buffer, control_view_unmap_put(client_buffer, sizeof client_buffer, &m), NULL, 0);
}

/* A range that the kernel has made or moved. One that cannot be registered must not stay: it would read as zeros. */
static void enter(struct range *r)
{
    int rc = guard(r);
    if (rc) {
        raw_mmap((void *)(uintptr_t)r->start, r->end - r->start, PROT_NONE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
        say_once(SAY_ERROR, "%s: a mapping cannot be registered any more and is closed to access: %e",
                 view_mounts[r->region].path, rc);
        return;
    }
    add(r);
    tell(r);
}

void view_grown(uint64_t end, uint64_t new_end)
{
    struct range *last = ranges_find(&view_maps, end - 1, end);
    if (!last)
        return;
    struct range tail = *last;
    tail.offset += end - tail.start;
    tail.start = end;
    tail.end = new_end;
    enter(&tail);
}

void view_moved(uint64_t start, uint64_t old, uint64_t to, uint64_t len, bool keep, bool again)
{
    uint64_t end = start + old;
    for (uint64_t at = start; at < end;) {
        struct range *r = ranges_find(&view_maps, at, end);
        if (!r)
            break;
        struct range n = *r;
        uint64_t lo = r->start > start ? r->start : start, hi = r->end < end ? r->end : end;
        n.offset += lo - r->start;
        n.start = to + (lo - start);
        n.end = hi == end ? to + len : to + (hi - start);
        n.end = n.end > to + len ? to + len : n.end;
        view_mounts[n.region].opens++;
        if (!keep)
            view_forget(lo, hi);
        else if (again)
            arm(&(struct range){.start = lo, .end = hi, .state = n.state});
        view_forget(n.start, n.end);
        if (n.end > n.start)
            enter(&n);
        view_mounts[n.region].opens--;
        view_release_idle(n.region);
        at = hi;
    }
}

bool view_shared(uint64_t start, uint64_t end)
{
    bool any = false;
    struct held h = shim_lock();
    for (size_t i = ranges_first(&view_maps, start); i < view_maps.count && view_maps.at[i].start < end; i++)
        any |= view_maps.at[i].state == RANGE_VIEW_SHARED;
    shim_unlock(&h);
    return any;
}

bool view_mirrored(uint64_t start, uint64_t end)
{
    struct held h = shim_lock();
    const struct range *r = ranges_find(&view_maps, start, end);
    bool any = r && view_mounts[r->region].mode == CONTROL_MIRROR;
    shim_unlock(&h);
    return any;
}

bool view_shows(uint64_t start, uint64_t end)
{
    struct held h = shim_lock();
    bool any = ranges_find(&view_maps, start, end);
    shim_unlock(&h);
    return any;
}

static void tell_advice(const struct range *r, uint64_t lo, uint64_t hi, int advice)
{
    struct control_advise m = {.view = view_mounts[r->region].number,
                               .advice = (uint8_t)advice,
                               .offset = r->offset + (lo - r->start),
                               .len = hi - lo};
    if (client_up())
        client_send(client_buffer, control_advise_put(client_buffer, sizeof client_buffer, &m), NULL, 0);
}

void view_advise_file(const struct mount *m, uint64_t offset, uint64_t len, int advice)
{
    uint64_t size = view_size(m);
    if ((unsigned)advice > CONTROL_ADVICE_MAX || offset >= size)
        return;
    len = len && len < size - offset ? len : size - offset;
    struct range r = {.region = (uint32_t)(m - view_mounts), .end = len, .offset = offset};
    struct held h = shim_lock();
    tell_advice(&r, 0, len, advice);
    shim_unlock(&h);
}

void view_advise(uint64_t start, uint64_t end, int advice)
{
    struct held h = shim_lock();
    bool forks = advice == MADV_DOFORK || advice == MADV_DONTFORK;
    if (forks && maps_room(&view_maps)) {
        maps_change_begin();
        ranges_split(&view_maps, start, end);
        maps_change_end();
    }
    for (size_t i = ranges_first(&view_maps, start); i < view_maps.count && view_maps.at[i].start < end; i++) {
        struct range *r = &view_maps.at[i];
        uint64_t lo = r->start > start ? r->start : start, hi = r->end < end ? r->end : end;
        if (forks) {
            r->dontfork = advice == MADV_DONTFORK;
            advise(lo, hi, MADV_DONTFORK);
        } else if ((unsigned)advice <= CONTROL_ADVICE_MAX) {
            tell_advice(r, lo, hi, advice);
        }
    }
    shim_unlock(&h);
}

/* ---- buffers of calls */

/* The first piece of [start, end) that shows a view: its mount and place there. */
static struct mount *piece_of(uint64_t start, uint64_t end, uint64_t *at, uint64_t *offset, uint64_t *len)
{
    struct mount *m = NULL;
    struct held h = shim_lock();
    const struct range *r = h.inside ? NULL : ranges_find(&view_maps, start, end);
    if (r) {
        uint64_t lo = r->start > start ? r->start : start, hi = r->end < end ? r->end : end;
        m = &view_mounts[r->region];
        uint64_t size = view_size(m);
        *at = hi;
        *offset = r->offset + (lo - r->start);
        *len = *offset >= size ? 0 : hi - lo < size - *offset ? hi - lo : size - *offset;
    }
    shim_unlock(&h);
    return m;
}

void view_buffer(uint64_t start, uint64_t len)
{
    uint64_t end = start + len, offset, here;
    if (end < start || !shim_mine())
        return;
    for (struct mount *m; start < end && (m = piece_of(start, end, &start, &offset, &here));)
        view_need(m, offset, here, &(uint64_t){0});
}

void view_buffer_vector(const struct iovec *iov, int n)
{
    if (n <= 0 || n > 1024 || !raw_readable(iov, (size_t)n * sizeof *iov))
        return;
    for (int i = 0; i < n; i++)
        view_buffer((uint64_t)(uintptr_t)iov[i].iov_base, iov[i].iov_len);
}

/* ---- fork */

static void inherit(int advice)
{
    for (size_t i = 0; i < view_maps.count; i++)
        if (!view_maps.at[i].dontfork)
            advise(view_maps.at[i].start, view_maps.at[i].end, advice);
}

void view_fork_prepare(void)
{
    inherit(MADV_DOFORK);
}

void view_fork_parent(void)
{
    inherit(MADV_DONTFORK);
}

bool view_fork_child(void)
{
    view_watch_forget();
    for (size_t i = 0; i < view_maps.count;) {
        struct range r = view_maps.at[i];
        int rc = r.dontfork ? 0 : guard(&r);
        if (!r.dontfork && !rc) {
            i++;
            continue;
        }
        if (rc) {
            raw_munmap((void *)(uintptr_t)r.start, r.end - r.start);
            say(SAY_ERROR, "%s: a forked child cannot have the parent's mapping: %e", view_mounts[r.region].path, rc);
        }
        maps_change_begin();
        ranges_cut(&view_maps, r.start, r.end);
        maps_change_end();
        view_release_idle(r.region);
    }
    if (view_count)
        view_watch();
    return view_maps.count;
}
