/* The views behind open files: what the agent fills, told apart by its memfd.
 *
 * An OPEN or RESUME (struct view_pending) is the thread's own while it waits for the VIEW; what comes is a new mount,
 * or the one that is there already. A mount goes with the last open file and mapping of this process. Its descriptors
 * evade the program's own; its memory stays mapped a while after it went (view_retire), for a thread that still is in
 * it. */
#include "shim/view.h"

#include <string.h>

#define ASK_PATIENCE_MS 5000u
#define NEED_TRIES 3u

uint32_t view_count;
struct mount view_mounts[VIEW_MOUNTS];
static uint32_t numbers; /* the last number given to an agent */
static struct view_pending *pendings;

void view_counted(int by)
{
    __atomic_add_fetch(&view_count, (uint32_t)by, __ATOMIC_SEQ_CST);
}

/* A name that is remapped goes later: a thread may still be in it. */
void view_retire(void *at, size_t len)
{
    static struct {
        void *at;
        size_t len;
    } going[64];
    static unsigned turn;
    unsigned i = turn++ % 64;
    if (going[i].at)
        raw_munmap(going[i].at, going[i].len);
    going[i].at = at;
    going[i].len = len;
}

/* ---- our own descriptors */

static int *own_of(struct mount *m, int fd)
{
    return !m->used ? NULL : m->memory == fd ? &m->memory : m->meta == fd ? &m->meta : NULL;
}

bool view_owns(int fd)
{
    for (uint32_t i = 0; i < VIEW_MOUNTS; i++)
        if (own_of(&view_mounts[i], fd))
            return true;
    return view_locking(fd);
}

void view_evade(int fd)
{
    for (uint32_t i = 0; i < VIEW_MOUNTS; i++) {
        int *kept = own_of(&view_mounts[i], fd);
        if (!kept)
            continue;
        int other = raw_fcntl(fd, F_DUPFD_CLOEXEC, fd + 1);
        *kept = other < 0 ? raw_fcntl(fd, F_DUPFD_CLOEXEC, 3) : other;
    }
    struct open_file *f = view_locking(fd);
    if (f)
        f->locking = raw_fcntl(fd, F_DUPFD_CLOEXEC, fd + 1);
}

int view_own_above(int from)
{
    int lowest = view_locking_above(from);
    for (uint32_t i = 0; i < VIEW_MOUNTS; i++) {
        const struct mount *m = &view_mounts[i];
        if (!m->used)
            continue;
        if (m->memory >= from && (lowest < 0 || m->memory < lowest))
            lowest = m->memory;
        if (m->meta >= from && (lowest < 0 || m->meta < lowest))
            lowest = m->meta;
    }
    return lowest;
}

int view_memory(const struct mount *m)
{
    struct stat st;
    int fd = __atomic_load_n(&m->memory, __ATOMIC_RELAXED);
    return !raw_fstat(fd, &st) && st.st_ino == m->ino && st.st_dev == m->dev ? fd : -1;
}

/* ---- asking the agent */

static size_t ask_put(void *to, size_t cap, uint32_t slot, void *of)
{
    struct view_pending *p = of;
    for (int i = 0; i < 2 && p->arrived; i++)
        if (p->fds[i] >= 0)
            raw_close(p->fds[i]); /* of an agent that died after all */
    p->arrived = false;
    p->ask.open.slot = slot;
    return p->resume ? control_resume_put(to, cap, &p->ask) : control_open_put(to, cap, &p->ask.open);
}

void view_terms(struct control_open *o, const char *path, const char *name, uint8_t mode, const struct view_how *how)
{
    o->mode = mode;
    o->order = how->order;
    o->follow = how->follow;
    o->resident = how->resident;
    o->fetch_timeout_ms = how->fetch_timeout_ms;
    strcpy(o->path, path);
    strcpy(o->name, name);
}

void view_arrived(const void *message, size_t len, const int *fds, unsigned n)
{
    static struct control_view v;
    struct view_pending *p = NULL;
    if (!control_view_get(message, len, &v))
        for (p = pendings; p && p->number != v.view; p = p->next)
            ;
    bool wanted = p && !p->arrived && n == (p->ask.open.look ? 0 : 2);
    for (unsigned i = 0; i < n && !wanted; i++)
        raw_close(fds[i]);
    if (!wanted)
        return;
    for (unsigned i = 0; i < 2; i++)
        p->fds[i] = i < n ? own_keep(fds[i]) : -1;
    p->view = v;
    p->arrived = true;
}

static uint64_t patience(void)
{
    return shim.fetch_timeout_ms < ASK_PATIENCE_MS ? shim.fetch_timeout_ms : ASK_PATIENCE_MS;
}

/* Sends the OPEN or RESUME and waits for its VIEW. 0, or a negative errno. */
int view_ask(struct view_pending *p)
{
    struct held h = shim_lock();
    if (h.inside) {
        shim_unlock(&h);
        return -EDEADLK;
    }
    if (client_up())
        arm_can_miss(); /* the agent has the userfaultfd before it hears of a view */
    if (arm_user_mode_only && p->ask.open.resident) { /* a buffer that is fetched for a call could go before it */
        say_once(SAY_WARN, "%s: resident= is not kept to: %s", p->ask.open.path,
                 "that needs a userfaultfd for faults of calls, too (memsync doctor tells what to change)");
        p->ask.open.resident = 0;
    }
    p->number = p->ask.open.view = ++numbers ? numbers : ++numbers;
    p->next = pendings;
    pendings = p;
    shim_unlock(&h);
    int rc = sync_ask(ask_put, p, patience());
    h = shim_lock();
    if (!rc && !p->arrived)
        client_read();
    for (struct view_pending **at = &pendings; *at; at = &(*at)->next)
        if (*at == p) {
            *at = p->next;
            break;
        }
    if (!rc && !p->arrived)
        rc = -EIO;
    for (int i = 0; i < 2 && rc && p->arrived; i++)
        if (p->fds[i] >= 0)
            raw_close(p->fds[i]);
    shim_unlock(&h);
    if (rc == -ENOTCONN)
        say_once(SAY_ERROR, "%s: no agent, so no remote region", p->ask.open.path);
    return rc == -ENOTCONN ? -EIO : rc;
}

/* ---- mounts */

static void tell_closed(uint32_t number)
{
    struct control_close c = {.view = number};
    if (client_connected())
        client_send(client_buffer, control_close_put(client_buffer, sizeof client_buffer, &c), NULL, 0);
}

void view_release_idle(uint32_t mount)
{
    struct mount *m = &view_mounts[mount];
    if (!m->used || m->opens || ranges_of(&view_maps, mount))
        return;
    tell_closed(m->number);
    m->used = false;
    raw_close(m->memory);
    raw_close(m->meta);
    m->memory = m->meta = -1;
    view_retire((void *)m->view, sizeof *m->view);
    if (m->window)
        view_retire(m->window, m->window_len);
    view_counted(-1);
}

/* One that writes and one that only reads are two, even of the same pages. */
static uint32_t mount_same(uint64_t dev, uint64_t ino, uint8_t mode)
{
    for (uint32_t i = 0; i < VIEW_MOUNTS; i++)
        if (view_mounts[i].used && view_mounts[i].dev == dev && view_mounts[i].ino == ino &&
            view_mounts[i].mode == mode)
            return i + 1;
    return 0;
}

static uint32_t mount_free(void)
{
    for (uint32_t i = 0; i < VIEW_MOUNTS; i++)
        if (!view_mounts[i].used)
            return i + 1;
    return 0;
}

static void window_make(struct mount *m, uint64_t len)
{
    uint8_t *at = len ? raw_mmap(NULL, len, PROT_NONE, MAP_SHARED | MAP_NORESERVE, m->memory, 0) : MAP_FAILED;
    __atomic_store_n(&m->window, at == MAP_FAILED ? NULL : at, __ATOMIC_RELEASE);
    __atomic_store_n(&m->window_len, at == MAP_FAILED ? 0 : len, __ATOMIC_RELEASE); /* never longer than what is there */
}

/* A mirror has grown beyond it. */
static void window_grow(struct mount *m)
{
    struct held h = shim_lock();
    uint64_t size = view_size(m);
    if (!h.inside && size > m->window_len) {
        if (m->window)
            view_retire(m->window, m->window_len);
        window_make(m, size + size / 2);
    }
    shim_unlock(&h);
}

static int mount_fill(struct mount *m, const struct view_pending *p, const struct stat *st)
{
    *m = (struct mount){.number = p->number,
                        .memory = p->fds[0],
                        .meta = p->fds[1],
                        .dev = st->st_dev,
                        .ino = st->st_ino,
                        .size = p->view.size,
                        .epoch = p->view.epoch,
                        .mtime_ns = p->view.mtime_ns,
                        .lineage = p->view.lineage,
                        .mode = p->ask.open.mode,
                        .how = {.order = p->ask.open.order,
                                .follow = p->ask.open.follow,
                                .resident = p->ask.open.resident,
                                .fetch_timeout_ms = p->ask.open.fetch_timeout_ms}};
    strcpy(m->path, p->ask.open.path);
    strcpy(m->name, p->ask.open.name);
    if (m->mode == CONTROL_PULL && (uint64_t)st->st_size != m->size)
        return -EPROTO;
    m->view = raw_mmap(NULL, sizeof *m->view, PROT_READ, MAP_SHARED, m->meta, 0);
    if (m->view == MAP_FAILED)
        return -errno;
    if (m->view->version != SHARED_VERSION) {
        raw_munmap((void *)m->view, sizeof *m->view);
        return -EPROTO;
    }
    window_make(m, m->size);
    m->used = true;
    view_counted(1);
    return 0;
}

/* What an OPEN or RESUME brought becomes a mount, or is found to be one that is there. Index + 1 with opens raised, or
 * a negative errno. */
int view_mount_made(struct view_pending *p)
{
    struct stat st;
    struct held h = shim_lock();
    int rc = raw_fstat(p->fds[0], &st) ? -EIO : 0;
    uint32_t n = rc ? 0 : mount_same(st.st_dev, st.st_ino, p->ask.open.mode);
    bool again = n;
    if (!rc && !n) {
        n = mount_free();
        rc = n ? mount_fill(&view_mounts[n - 1], p, &st) : -ENFILE;
    }
    if (again || rc) {
        tell_closed(p->number);
        raw_close(p->fds[0]);
        raw_close(p->fds[1]);
    }
    if (!rc) {
        view_mounts[n - 1].opens++;
        view_watch();
    }
    shim_unlock(&h);
    return rc ? rc : (int)n;
}

void view_announce(void)
{
    static struct control_resume r;
    for (uint32_t i = 0; i < VIEW_MOUNTS; i++) {
        const struct mount *m = &view_mounts[i];
        if (!m->used || view_memory(m) < 0)
            continue;
        r = (struct control_resume){.epoch = view_epoch(m), .lineage = m->lineage, .size = view_size(m)};
        view_terms(&r.open, m->path, m->name, m->mode, &m->how);
        r.open.slot = sync_slot_unheard();
        r.open.view = m->number;
        int fds[2] = {m->memory, m->meta};
        client_send(client_buffer, control_resume_put(client_buffer, sizeof client_buffer, &r), fds, 2);
    }
}

/* ---- what is there */

struct fetch {
    uint32_t number;
    uint64_t offset, len;
};

static size_t fetch_put(void *to, size_t cap, uint32_t slot, void *of)
{
    const struct fetch *f = of;
    struct control_fetch m = {.slot = slot, .view = f->number, .offset = f->offset, .len = f->len};
    return control_fetch_put(to, cap, &m);
}

bool view_present(const struct mount *m, uint64_t offset, uint64_t len)
{
    unsigned char seen[256];
    uint64_t at = offset & ~(shim_page - 1), end = offset + len;
    if (end > __atomic_load_n(&m->window_len, __ATOMIC_ACQUIRE))
        return false;
    const uint8_t *window = __atomic_load_n(&m->window, __ATOMIC_ACQUIRE);
    while (window && at < end) {
        uint64_t n = end - at < sizeof seen * shim_page ? end - at : sizeof seen * shim_page;
        uint64_t pages = (n + shim_page - 1) / shim_page;
        if (syscall(SYS_mincore, window + at, n, seen))
            return false;
        for (uint64_t i = 0; i < pages; i++)
            if (!(seen[i] & 1))
                return false;
        at += pages * shim_page;
    }
    return window;
}

/* What is fetched for a view with a bound makes others go: it is looked at again, so that the caller need not read
 * twice. Not for ever: the caller looks, too. */
int view_need(struct mount *m, uint64_t offset, uint64_t len, uint64_t *since)
{
    struct fetch f = {.number = m->number, .offset = offset, .len = len};
    int saved = errno, rc = 0;
    if (m->view->moves && offset + len > m->window_len)
        window_grow(m);
    for (unsigned tries = 0; tries < NEED_TRIES && !rc; tries++) {
        *since = __atomic_load_n(&m->view->punches, __ATOMIC_SEQ_CST);
        if (!len || (!(*since & 1) && view_present(m, offset, len)))
            break;
        rc = sync_ask(fetch_put, &f, m->how.fetch_timeout_ms);
        if (!m->view->moves)
            break;
    }
    errno = saved;
    return rc == -ENOTCONN ? -EIO : rc;
}

bool view_same(const struct mount *m, uint64_t since)
{
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
    return !(since & 1) && __atomic_load_n(&m->view->punches, __ATOMIC_SEQ_CST) == since;
}
