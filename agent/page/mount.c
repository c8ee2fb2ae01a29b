#include "agent/page/mount.h"

#include "agent/base/log.h"
#include "agent/page/order.h"
#include "agent/page/uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

struct mount *mount_find(struct pager *g, const struct control_open *how, const struct id *lineage, uint64_t epoch,
                         bool eager)
{
    for (struct mount *m = g->mounts; m; m = m->next)
        if (m->state != MOUNT_FAILED && (!m->eager || eager) && id_same(mount_lineage(m), lineage) &&
            !strcmp(m->name, how->name) &&
            (m->body ? m->body->region != NULL
                     : m->epoch == epoch && m->shared->moves == evict_moves(how, m->eager) &&
                           m->timeout_ms == (how->fetch_timeout_ms == CONTROL_FOREVER ? 0 : how->fetch_timeout_ms)))
            return m;
    return NULL;
}

static uint64_t pages_in(uint64_t bytes)
{
    return bytes / PAGE_SIZE + (bytes % PAGE_SIZE != 0);
}

/* An agent that died between changing the memfd's size and saying so had the memfd right, and `base`. */
static void taken_base(struct mount *m)
{
    if (!m->shared->mirror)
        return;
    m->base = m->shared->base < m->size ? m->shared->base : m->size;
    m->shared->size = m->size;
}

static int make_shared(struct mount *m, uint32_t moves)
{
    bool taken = m->shared_fd >= 0;
    if (!taken)
        m->shared_fd = memfd_create("memsync-view", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    struct stat st;
    if (m->shared_fd < 0 || (!taken && ftruncate(m->shared_fd, sizeof *m->shared)) || fstat(m->shared_fd, &st) ||
        (size_t)st.st_size < sizeof *m->shared)
        return -EINVAL;
    if (!taken)
        fcntl(m->shared_fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW);
    void *at = mmap(NULL, sizeof *m->shared, PROT_READ | PROT_WRITE, MAP_SHARED, m->shared_fd, 0);
    if (at == MAP_FAILED)
        return -errno;
    m->shared = at;
    if (!taken)
        *m->shared = (struct view){.version = SHARED_VERSION, .size = m->size, .epoch = m->epoch, .moves = moves, .mtime_ns = m->mtime * 1000000000};
    else
        taken_base(m);
    if (m->shared->punches & 1) /* it died between the two */
        view_punch_end(m->shared);
    return m->shared->version == SHARED_VERSION && m->shared->size == m->size ? 0 : -EINVAL;
}

/* The name is what a program's /proc/PID/fd shows, and what its library knows an inherited view by. */
static int make_memfd(struct mount *m)
{
    char label[240];
    bool taken = m->memfd >= 0;
    const char *base = strrchr(m->name, '/');
    snprintf(label, sizeof label, "memsync:%.200s", base ? base + 1 : m->name);
    if (!taken)
        m->memfd = memfd_create(label, MFD_CLOEXEC | MFD_ALLOW_SEALING);
    struct stat st;
    if (m->memfd < 0 || (!taken && ftruncate(m->memfd, (off_t)m->size)) || fstat(m->memfd, &st))
        return -errno;
    if ((uint64_t)st.st_size != m->size)
        return -EINVAL;
    if (!taken)
        fcntl(m->memfd, F_ADD_SEALS, F_SEAL_SEAL); /* its size changes when it is written to */
    m->dev = st.st_dev;
    m->ino = st.st_ino;
    return 0;
}

int mount_window(struct mount *m)
{
    size_t len = (size_t)(m->pages.room * PAGE_SIZE);
    if (m->eager || len <= m->window_len)
        return 0;
    int uffd = page_uffd();
    if (uffd < 0)
        return uffd;
    void *at = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, m->memfd, 0);
    if (at == MAP_FAILED)
        return -errno;
    madvise(at, len, MADV_DONTFORK);
    madvise(at, len, MADV_DONTDUMP);
    madvise(at, len, MADV_NOHUGEPAGE); /* a part of a huge page cannot be taken out (evict_written.c) */
    int rc = page_uffd_watch(uffd, at, len);
    if (rc) {
        munmap(at, len);
        return rc;
    }
    if (m->window)
        munmap(m->window, m->window_len);
    m->window = at;
    m->window_len = len;
    return 0;
}

/* What a memfd that was filled by another agent has. */
static int find_data(struct mount *m)
{
    uint64_t end = m->size;
    for (uint64_t at = 0; at < end;) {
        off_t data = lseek(m->memfd, (off_t)at, SEEK_DATA);
        if (data < 0)
            return errno == ENXIO ? 0 : -errno;
        off_t hole = lseek(m->memfd, data, SEEK_HOLE);
        if (hole < 0)
            return -errno;
        pages_came(&m->pages, (uint64_t)data / PAGE_SIZE, pages_in((uint64_t)hole));
        at = (uint64_t)hole;
    }
    return 0;
}

static uint64_t chunks_of(const struct mount *m)
{
    return m->pages.count / PLAN_CHUNK + 1;
}

static void recall(struct mount *m)
{
    size_t n;
    if (m->plan.order != CONTROL_ORDER_RECORDED)
        return;
    uint64_t *order = order_load(m->pager->link->local->state_dir, m->pager->link->address, m->name, chunks_of(m), &n);
    plan_record(&m->plan, order, n, chunks_of(m));
}

void mount_order(struct mount *m, uint8_t order)
{
    if (m->plan.order != CONTROL_ORDER_NONE || order == CONTROL_ORDER_NONE)
        return;
    m->plan.order = order;
    recall(m);
}

static void remember(const struct mount *m)
{
    if (m->plan.known && m->plan.recorded_n)
        order_save(m->pager->link->local->state_dir, m->pager->link->address, m->name, m->plan.recorded,
                   m->plan.recorded_n);
}

struct mount *mount_new(struct pager *g, const struct control_open *how, const struct frame_entry *e, int memfd,
                        int shared_fd, bool eager)
{
    struct mount *m = calloc(1, sizeof *m);
    if (!m) {
        close(memfd);
        close(shared_fd);
        return NULL;
    }
    *m = (struct mount){.next = g->mounts,
                        .pager = g,
                        .name = strdup(how->name),
                        .path = strdup(how->path),
                        .lineage = e->lineage,
                        .epoch = e->epoch,
                        .size = e->size,
                        .base = e->size,
                        .mtime = e->committed_at,
                        .idle_since = uv_now(g->link->local->loop),
                        .made_at = uv_now(g->link->local->loop),
                        .timeout_ms = how->fetch_timeout_ms == CONTROL_FOREVER ? 0 : how->fetch_timeout_ms,
                        .memfd = memfd,
                        .shared_fd = shared_fd,
                        .eager = eager};
    g->mounts = m;
    plan_init(&m->plan, eager ? CONTROL_ORDER_LINEAR : how->order);
    int rc = !m->name || !m->path ? -ENOMEM : e->size > MOUNT_SIZE_MAX ? -EFBIG : 0;
    rc = rc ? rc : pages_init(&m->pages, pages_in(e->size));
    rc = rc ? rc : make_memfd(m);
    rc = rc ? rc : make_shared(m, evict_moves(how, eager));
    rc = rc ? rc : mount_window(m);
    rc = rc ? rc : memfd >= 0 ? find_data(m) : 0;
    if (!rc) {
        recall(m);
        return m;
    }
    log_error("%s: %s cannot be presented: %s", g->link->address, how->name, strerror(-rc));
    mount_free(m);
    return NULL;
}

void mount_free(struct mount *m)
{
    struct pager *g = m->pager;
    fetch_forget(m);
    if (m->state == MOUNT_PINNED)
        fetch_unpin(g, m->pin);
    if (m->old_pin)
        fetch_unpin(g, m->old_pin);
    follow_stop(m, m->state == MOUNT_PINNED);
    mount_unwritten(m);
    struct mount **at = &g->mounts;
    while (*at != m)
        at = &(*at)->next;
    *at = m->next;
    if (g->turn == m)
        g->turn = NULL;
    if (m->window)
        munmap(m->window, m->window_len);
    if (m->shared)
        munmap(m->shared, sizeof *m->shared);
    if (m->memfd >= 0)
        close(m->memfd);
    if (m->shared_fd >= 0)
        close(m->shared_fd);
    evict_free(m);
    pages_free(&m->pages);
    plan_free(&m->plan);
    free(m->wanted);
    free(m->name);
    free(m->path);
    free(m);
}

bool mount_complete(const struct mount *m)
{
    return m->pages.have_n == m->pages.count;
}

/* ---- viewers ---- */

struct viewer *viewer_add(struct mount *m, struct program *p, const struct control_open *how)
{
    struct viewer *v = calloc(1, sizeof *v);
    if (!v)
        return NULL;
    *v = (struct viewer){.next_mount = m->viewers,
                         .next_program = p->viewers,
                         .mount = m,
                         .program = p,
                         .number = how->view,
                         .resident = how->resident};
    m->viewers = v;
    p->viewers = v;
    evict_bound(m);
    return v;
}

void viewer_end(struct viewer *v)
{
    struct mount *m = v->mount;
    struct viewer **at = &m->viewers;
    while (*at != v)
        at = &(*at)->next_mount;
    *at = v->next_mount;
    at = &v->program->viewers;
    while (*at != v)
        at = &(*at)->next_program;
    *at = v->next_program;
    free(v->stretches);
    free(v);
    m->idle_since = uv_now(m->pager->link->local->loop);
    evict_bound(m);
    if (!m->viewers)
        remember(m);
}

static int stretch_add(struct viewer *v, uint64_t addr, uint64_t len, uint64_t offset)
{
    if (v->count == v->cap) {
        size_t cap = v->cap ? v->cap * 2 : 4;
        struct stretch *more = cap > STRETCHES_MAX ? NULL : realloc(v->stretches, cap * sizeof *more);
        if (!more)
            return -ENOMEM;
        v->stretches = more;
        v->cap = cap;
    }
    v->stretches[v->count++] = (struct stretch){addr, len, offset};
    return 0;
}

int viewer_map(struct viewer *v, uint64_t addr, uint64_t len, uint64_t offset)
{
    int rc = stretch_add(v, addr, len, offset);
    if (rc)
        return rc;
    /* Whoever faulted before this was known, or was in the care of an agent that is gone, faults again. */
    page_wake(v->program->uffd, addr, len);
    if (v->mount->state == MOUNT_FAILED)
        mount_poison(v->mount, v, &v->stretches[v->count - 1]);
    fetch_begun(v->mount);
    return 0;
}

void viewer_unmap(struct viewer *v, uint64_t addr, uint64_t len)
{
    uint64_t end = addr + len;
    for (size_t i = v->count; i--;) {
        struct stretch s = v->stretches[i];
        if (s.addr >= end || s.addr + s.len <= addr)
            continue;
        v->stretches[i] = v->stretches[--v->count];
        if (s.addr < addr)
            stretch_add(v, s.addr, addr - s.addr, s.offset); /* there is room: one was taken out */
        if (s.addr + s.len > end)
            stretch_add(v, end, s.addr + s.len - end, s.offset + (end - s.addr));
    }
}

void mount_wake(struct mount *m, uint64_t from, uint64_t to)
{
    uint64_t lo = from * PAGE_SIZE, hi = to * PAGE_SIZE;
    for (struct viewer *v = m->viewers; v; v = v->next_mount)
        for (size_t i = 0; i < v->count; i++) {
            const struct stretch *s = &v->stretches[i];
            uint64_t a = s->offset > lo ? s->offset : lo, b = s->offset + s->len < hi ? s->offset + s->len : hi;
            if (a < b)
                page_wake(v->program->uffd, s->addr + (a - s->offset), b - a);
        }
}

/* ---- pages ---- */

static int put_at(struct mount *m, uint64_t offset, const uint8_t *data, uint64_t len)
{
    if (!m->eager) {
        uint8_t *to = m->window + offset;
        return data ? page_copy(page_uffd(), to, data, (size_t)len) : page_zero(page_uffd(), to, (size_t)len);
    }
    static const uint8_t zeros[65536];
    while (len) {
        size_t n = data || len < sizeof zeros ? (size_t)len : sizeof zeros;
        ssize_t put = pwrite(m->memfd, data ? data : zeros, n, (off_t)offset);
        if (put <= 0)
            return put < 0 && errno != EINTR ? -errno : -EIO;
        data = data ? data + put : NULL;
        offset += (uint64_t)put;
        len -= (uint64_t)put;
    }
    return 0;
}

int mount_put(struct mount *m, uint64_t offset, const uint8_t *data, uint64_t len)
{
    uint64_t whole = len / PAGE_SIZE * PAGE_SIZE, rest = len - whole, from = offset / PAGE_SIZE;
    int rc = put_at(m, offset, data, m->eager ? len : whole);
    evict_came(m, from, data, whole);
    if (!rc && rest && !m->eager) { /* the last page of all */
        static uint8_t last[PAGE_SIZE] __attribute__((aligned(PAGE_SIZE)));
        memset(last, 0, sizeof last);
        if (data)
            memcpy(last, data + whole, (size_t)rest);
        rc = put_at(m, offset + whole, last, PAGE_SIZE);
        evict_came(m, from + whole / PAGE_SIZE, last, PAGE_SIZE);
    }
    if (rc)
        return rc;
    pages_came(&m->pages, from, from + pages_in(len));
    m->bytes_in += len;
    mount_wake(m, from, from + pages_in(len));
    evict_filled(m, from, from + pages_in(len));
    return 0;
}

void mount_poison(struct mount *m, const struct viewer *v, const struct stretch *s)
{
    uint64_t from = s->offset / PAGE_SIZE, to = (s->offset + s->len) / PAGE_SIZE;
    if (to > mount_pages(m))
        to = mount_pages(m);
    while (from < to) {
        uint64_t a = pages_hole(&m->pages, from, to), b = pages_hole_end(&m->pages, a, to);
        if (a < b && page_poison(v->program->uffd, s->addr + (a * PAGE_SIZE - s->offset), (b - a) * PAGE_SIZE))
            return;
        from = b;
    }
}

void mount_fail(struct mount *m, int err, const char *format, ...)
{
    if (m->state == MOUNT_FAILED)
        return;
    va_list ap;
    va_start(ap, format);
    vsnprintf(m->reason, sizeof m->reason, format, ap);
    va_end(ap);
    if (m->state == MOUNT_PINNED)
        fetch_unpin(m->pager, m->pin);
    m->state = MOUNT_FAILED;
    fetch_forget(m);
    __atomic_store_n(&m->shared->failed, err, __ATOMIC_SEQ_CST);
    bool removed = m->body && m->body->joined && !m->body->region; /* by a program here: no news to anybody */
    if (!removed)
        log_warn("%s: epoch %llu: %s", m->name, (unsigned long long)m->epoch, m->reason);
    for (struct viewer *v = m->viewers; v; v = v->next_mount) {
        if (!removed)
            program_notice(v->program, "%s: %s; its pages that were not fetched cannot be read any more", m->path,
                       m->reason);
        for (size_t i = 0; i < v->count; i++)
            mount_poison(m, v, &v->stretches[i]);
    }
    openings_look(m);
}

static bool is_data(const struct mount *m, uint64_t page)
{
    off_t at = (off_t)(page * PAGE_SIZE);
    return lseek(m->memfd, at, SEEK_DATA) == at;
}

/* Beyond the base, a few pages at a time: who writes there goes on. */
static void put_zeros(struct mount *m, uint64_t page)
{
    uint64_t to = page + PLAN_FIRST < m->pages.count ? page + PLAN_FIRST : m->pages.count;
    int rc = page_zero(page_uffd(), m->window + page * PAGE_SIZE, (size_t)((to - page) * PAGE_SIZE));
    if (rc) {
        mount_fail(m, rc, "no memory for its pages here (%s)", strerror(-rc));
        return;
    }
    pages_came(&m->pages, page, to);
    mount_wake(m, page, to);
    evict_filled(m, page, to);
}

void mount_fault(struct mount *m, struct viewer *v, const struct stretch *s, uint64_t page)
{
    if (page >= m->pages.count) { /* cut off while it was on its way: it faults again, and gets SIGBUS */
        mount_wake(m, page, page + 1);
        return;
    }
    if (page >= mount_pages(m)) {
        put_zeros(m, page);
        return;
    }
    if (m->state == MOUNT_FAILED) {
        mount_poison(m, v, s);
        return;
    }
    if (pages_bit(m->pages.have, page)) {
        if (is_data(m, page)) {
            mount_wake(m, page, page + 1);
            return;
        }
        pages_lose(&m->pages, page, page + 1);
    }
    if (fetch_demanded(m, page))
        return;
    uint64_t from, to;
    struct pages theirs = mount_theirs(m);
    plan_fault(&m->plan, &theirs, page, &from, &to);
    if (pages_bit(m->pages.asked, page)) { /* the background has: a little of it, now, unless it is about to come */
        if (!fetch_is_far(m, page))
            return;
        from = page;
        to = pages_hole_end(&m->pages, page, to < page + PLAN_FIRST ? to : page + PLAN_FIRST);
    } else { /* the run around the page that nobody has asked for */
        to = pages_gap_end(&m->pages, page, to);
        for (uint64_t p = page; p > from; p--)
            if (pages_bit(m->pages.have, p - 1) || pages_bit(m->pages.asked, p - 1))
                from = p;
    }
    if (to - from >= PLAN_WINDOW / 2 && to > page + 1)
        evict_walk(m, to);
    m->opened = false;
    fetch_want(m, from, to, uv_now(m->pager->link->local->loop));
}

void mount_advise(struct mount *m, uint8_t advice, uint64_t offset, uint64_t len)
{
    uint64_t from = offset / PAGE_SIZE, to = pages_in(offset + len);
    if (to > mount_pages(m))
        to = mount_pages(m);
    if (m->state == MOUNT_FAILED || from >= to)
        return;
    m->opened = false;
    m->plan.random = advice == MADV_RANDOM || (m->plan.random && advice == MADV_WILLNEED);
    if (advice == MADV_WILLNEED || advice == MADV_SEQUENTIAL)
        plan_move(&m->plan, from);
    if (advice == MADV_WILLNEED)
        evict_lead(m, from, to);
    fetch_pump(m->pager);
}
