/* Open files of views, and the views behind them.
 *
 * The agent fills a view's memfd; we only read it. The program never gets a descriptor of it: what it holds is an
 * O_PATH descriptor of a small memfd of the open file (struct held_file), on which everything that goes around the
 * hooks fails with EBADF.
 *
 *   open:    OPEN -> VIEW with the memfd -> a mount (or the one that is there already, if the memfd is the same)
 *   read:    are the pages there (mincore on a mapping without access)? else FETCH; then pread from the memfd
 *   mmap:    view_map.c
 *   close:   the last descriptor and mapping of this process gone: CLOSE
 *   exec:    a program that starts with such a descriptor reads the small memfd and asks for the very epoch (RESUME)
 *   no agent: whoever needs one finds or starts it; each view is announced again with its memfd (RESUME)
 *
 * Tables change under the lock. A thread that uses an open file or a mount holds neither the lock nor a count: closing
 * it meanwhile is the program's race, and what is closed stays mapped a while (retired). */
#include "shim/view.h"

#include <linux/memfd.h>
#include <string.h>
#include <sys/sysmacros.h>

#define ASK_PATIENCE_MS 5000u

uint32_t view_count;
bool view_pulls;
struct mount view_mounts[VIEW_MOUNTS];
static struct open_file opens[SHIM_VIEWS];
static uint32_t numbers; /* the last number given to an agent */

/* An OPEN or RESUME on its way: the thread's own, in a list that view_arrived looks through. */
struct pending {
    struct pending *next;
    uint32_t number;
    bool arrived;
    int fds[2];
    struct control_view view;
    struct control_resume ask; /* OPEN sends its first part */
    bool resume;
};
static struct pending *pendings;

static void count(int by)
{
    __atomic_add_fetch(&view_count, (uint32_t)by, __ATOMIC_SEQ_CST);
}

/* A name that is remapped goes later: a thread may still be in it. */
static void retire(void *at, size_t len)
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
    return false;
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
}

int view_own_above(int from)
{
    int lowest = -1;
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
    struct pending *p = of;
    for (int i = 0; i < 2 && p->arrived; i++)
        if (p->fds[i] >= 0)
            raw_close(p->fds[i]); /* of an agent that died after all */
    p->arrived = false;
    p->ask.open.slot = slot;
    return p->resume ? control_resume_put(to, cap, &p->ask) : control_open_put(to, cap, &p->ask.open);
}

static void terms(struct control_open *o, const char *path, const char *name, uint8_t order, uint64_t timeout)
{
    o->mode = CONTROL_PULL;
    o->order = order;
    o->fetch_timeout_ms = timeout;
    strcpy(o->path, path);
    strcpy(o->name, name);
}

void view_arrived(const void *message, size_t len, const int *fds, unsigned n)
{
    static struct control_view v;
    struct pending *p = NULL;
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
static int ask(struct pending *p)
{
    struct held h = shim_lock();
    if (h.inside) {
        shim_unlock(&h);
        return -EDEADLK;
    }
    if (client_up())
        arm_can_miss(); /* the agent has the userfaultfd before it hears of a view */
    p->number = p->ask.open.view = ++numbers ? numbers : ++numbers;
    p->next = pendings;
    pendings = p;
    shim_unlock(&h);
    int rc = sync_ask(ask_put, p, patience());
    h = shim_lock();
    if (!rc && !p->arrived)
        client_read();
    for (struct pending **at = &pendings; *at; at = &(*at)->next)
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
    retire((void *)m->view, sizeof *m->view);
    if (m->window)
        retire(m->window, m->size);
    count(-1);
}

static uint32_t mount_same(uint64_t dev, uint64_t ino)
{
    for (uint32_t i = 0; i < VIEW_MOUNTS; i++)
        if (view_mounts[i].used && view_mounts[i].dev == dev && view_mounts[i].ino == ino)
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

static int mount_fill(struct mount *m, const struct pending *p, const struct stat *st)
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
                        .order = p->ask.open.order,
                        .fetch_timeout_ms = p->ask.open.fetch_timeout_ms};
    strcpy(m->path, p->ask.open.path);
    strcpy(m->name, p->ask.open.name);
    if ((uint64_t)st->st_size != m->size)
        return -EPROTO;
    m->view = raw_mmap(NULL, sizeof *m->view, PROT_READ, MAP_SHARED, m->meta, 0);
    if (m->view == MAP_FAILED)
        return -errno;
    if (m->view->version != SHARED_VERSION) {
        raw_munmap((void *)m->view, sizeof *m->view);
        return -EPROTO;
    }
    m->window = m->size ? raw_mmap(NULL, m->size, PROT_NONE, MAP_SHARED | MAP_NORESERVE, m->memory, 0) : MAP_FAILED;
    if (m->window == MAP_FAILED)
        m->window = NULL;
    m->used = true;
    count(1);
    return 0;
}

/* What an OPEN or RESUME brought becomes a mount, or is found to be one that is there. Index + 1 with opens raised, or
 * a negative errno. */
static int mount_made(struct pending *p)
{
    struct stat st;
    struct held h = shim_lock();
    int rc = raw_fstat(p->fds[0], &st) ? -EIO : 0;
    uint32_t n = rc ? 0 : mount_same(st.st_dev, st.st_ino);
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
        r = (struct control_resume){.epoch = m->epoch, .lineage = m->lineage, .size = m->size};
        terms(&r.open, m->path, m->name, m->order, m->fetch_timeout_ms);
        r.open.slot = sync_slot_unheard();
        r.open.view = m->number;
        int fds[2] = {m->memory, m->meta};
        client_send(client_buffer, control_resume_put(client_buffer, sizeof client_buffer, &r), fds, 2);
    }
    view_maps_announce();
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

static bool present(const struct mount *m, uint64_t offset, uint64_t len)
{
    unsigned char seen[256];
    uint64_t at = offset & ~(shim_page - 1), end = offset + len;
    while (m->window && at < end) {
        uint64_t n = end - at < sizeof seen * shim_page ? end - at : sizeof seen * shim_page;
        uint64_t pages = (n + shim_page - 1) / shim_page;
        if (syscall(SYS_mincore, m->window + at, n, seen))
            return false;
        for (uint64_t i = 0; i < pages; i++)
            if (!(seen[i] & 1))
                return false;
        at += pages * shim_page;
    }
    return m->window;
}

int view_need(struct mount *m, uint64_t offset, uint64_t len)
{
    int saved = errno, rc = 0;
    if (len && !present(m, offset, len)) {
        struct fetch f = {.number = m->number, .offset = offset, .len = len};
        rc = sync_ask(fetch_put, &f, m->fetch_timeout_ms);
    }
    errno = saved;
    return rc == -ENOTCONN ? -EIO : rc;
}

/* ---- open files */

struct open_file *view_of(int fd)
{
    struct stat st;
    uint32_t entry = files_entry(fd);
    if (!files_viewed(entry) || !shim_mine())
        return NULL;
    struct open_file *f = &opens[entry - FD_VIEW];
    int saved = errno;
    bool good = f->held && !raw_fstat(fd, &st) && st.st_ino == f->ino && st.st_dev == f->dev;
    errno = saved;
    return good ? f : NULL;
}

struct open_file *view_of_unknown(int fd)
{
    if (!view_pulls || files_entry(fd) != FD_UNKNOWN || !shim_mine())
        return NULL;
    int saved = errno;
    bool viewed = files_viewed(files_resolve(fd));
    errno = saved;
    return viewed ? view_of(fd) : NULL;
}

static void set(int fd, uint32_t entry)
{
    __atomic_store_n(&files_fd[fd], entry, __ATOMIC_RELAXED);
}

static uint32_t opens_free(void)
{
    for (uint32_t i = 0; i < SHIM_VIEWS; i++)
        if (!opens[i].held)
            return i + 1;
    return 0;
}

static size_t held_size(uint64_t size)
{
    return size > sizeof(struct held_file) ? size : sizeof(struct held_file);
}

/* The small memfd, filled, as an own descriptor that the caller closes. Negative errno. */
static int held_make(const struct held_file *from, struct held_file **at)
{
    int fd = (int)syscall(SYS_memfd_create, "memsync:file", MFD_CLOEXEC);
    if (fd < 0)
        return -errno;
    fd = own_keep(fd);
    struct held_file *h = MAP_FAILED;
    if (!syscall(SYS_ftruncate, fd, held_size(from->size)))
        h = raw_mmap(NULL, sizeof *h, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (h == MAP_FAILED) {
        int e = errno;
        raw_close(fd);
        return -e;
    }
    *h = *from;
    *at = h;
    return fd;
}

static void describe(struct held_file *h, const struct mount *m)
{
    *h = (struct held_file){.magic = VIEW_MAGIC,
                            .version = SHARED_VERSION,
                            .size = m->size,
                            .epoch = m->epoch,
                            .fetch_timeout_ms = m->fetch_timeout_ms,
                            .mtime_ns = m->mtime_ns,
                            .lineage = m->lineage,
                            .order = m->order};
    strcpy(h->path, m->path);
    strcpy(h->name, m->name);
}

/* A descriptor of the program for the mount, whose opens were raised for it. -1 with errno. Lock held. */
static int file_made(uint32_t mount, int flags)
{
    static struct held_file what;
    struct held_file *at = NULL;
    struct stat st;
    uint32_t n = opens_free();
    describe(&what, &view_mounts[mount - 1]);
    int held = n ? held_make(&what, &at) : -ENFILE, fd = -1, rc = held < 0 ? held : 0;
    if (!rc) {
        char link[32];
        say_format(link, sizeof link, "/proc/self/fd/%d", held);
        fd = raw_openat(AT_FDCWD, link, O_PATH | (flags & O_CLOEXEC), 0);
        if (fd < 0)
            rc = -errno;
        else if ((unsigned)fd >= SHIM_FDS || raw_fstat(fd, &st))
            rc = -EMFILE;
        raw_close(held);
    }
    if (rc) {
        if (fd >= 0)
            raw_close(fd);
        if (at)
            raw_munmap(at, sizeof *at);
        errno = -rc;
        return -1;
    }
    opens[n - 1] = (struct open_file){.held = at, .fds = 1, .mount = mount, .dev = st.st_dev, .ino = st.st_ino};
    count(1);
    uint32_t stale = files_entry(fd);
    set(fd, FD_VIEW + n - 1);
    view_closed(stale);
    return fd;
}

static int opened(struct pending *p, int flags)
{
    int n = mount_made(p);
    if (n < 0) {
        errno = -n;
        return -1;
    }
    struct held h = shim_lock();
    bool eager = !arm_can_miss();
    shim_unlock(&h);
    int rc = 0;
    if (eager) {
        say_once(SAY_WARN, "%s: %s; pulled regions are fetched whole before they open", p->ask.open.path, arm_reason());
        rc = view_need(&view_mounts[n - 1], 0, view_mounts[n - 1].size);
    }
    h = shim_lock();
    int fd = rc ? -1 : file_made((uint32_t)n, flags);
    int e = rc ? -rc : errno;
    if (fd < 0) {
        view_mounts[n - 1].opens--;
        view_release_idle((uint32_t)n - 1);
        h.error = e;
    }
    shim_unlock(&h);
    return fd;
}

/* A pending is too much for a small stack. */
static struct pending *pending_new(void)
{
    return raw_memory(sizeof(struct pending));
}

static int prepare(struct pending *p, const struct rule *rule, const char *path)
{
    char error[RULES_ERROR], name[NAME_CAP];
    if (rules_name(rule, path, shim.host, name, error)) {
        say(SAY_ERROR, "%s: %s", path, error);
        return -EINVAL;
    }
    terms(&p->ask.open, path, name, rule->order, shim.fetch_timeout_ms);
    return 0;
}

int view_open_region(const struct rule *rule, const char *path, int flags)
{
    struct pending *p = pending_new();
    int rc = p ? prepare(p, rule, path) : -ENOMEM, fd = -1;
    if (!rc)
        rc = ask(p);
    if (rc)
        errno = -rc;
    else
        fd = opened(p, flags);
    int saved = errno;
    if (p)
        raw_munmap(p, sizeof *p);
    if (fd >= 0)
        say(SAY_INFO, "%s is the remote's region", path);
    errno = saved;
    return fd;
}

int view_look(const struct rule *rule, const char *path, struct control_view *v)
{
    struct pending *p = pending_new();
    int rc = p ? prepare(p, rule, path) : -ENOMEM;
    if (!rc) {
        p->ask.open.look = 1;
        rc = ask(p);
        *v = p->view;
    }
    if (p)
        raw_munmap(p, sizeof *p);
    return rc;
}

/* The view of an open file that came by exec or a message: that very epoch. */
static int resume(struct open_file *f)
{
    struct pending *p = pending_new();
    if (!p)
        return -ENOMEM;
    terms(&p->ask.open, f->held->path, f->held->name, f->held->order, f->held->fetch_timeout_ms);
    p->ask.epoch = f->held->epoch;
    p->ask.lineage = f->held->lineage;
    p->ask.size = f->held->size;
    p->resume = true;
    int rc = ask(p);
    if (rc == -ESTALE)
        say_once(SAY_ERROR, "%s: the remote has gone on, and the epoch that was open is not kept any more",
                 f->held->path);
    if (!rc)
        rc = mount_made(p);
    raw_munmap(p, sizeof *p);
    struct held h = shim_lock();
    if (rc > 0 && !f->mount) {
        f->mount = (uint32_t)rc;
    } else if (rc > 0) { /* another thread was first */
        view_mounts[rc - 1].opens--;
        view_release_idle((uint32_t)rc - 1);
    }
    shim_unlock(&h);
    return rc < 0 ? rc : 0;
}

struct mount *view_mount(struct open_file *f)
{
    int saved = errno, rc = f->mount ? 0 : resume(f);
    errno = rc ? -rc : saved;
    return rc ? NULL : &view_mounts[f->mount - 1];
}

int view_open_again(struct open_file *f, int flags)
{
    struct mount *m = view_mount(f);
    if (!m)
        return -1;
    struct held h = shim_lock();
    m->opens++;
    int fd = file_made(f->mount, flags);
    h.error = errno;
    if (fd < 0)
        m->opens--;
    shim_unlock(&h);
    return fd;
}

void view_closed(uint32_t entry)
{
    if (!files_viewed(entry))
        return;
    struct open_file *f = &opens[entry - FD_VIEW];
    if (!f->held || --f->fds)
        return;
    uint32_t mount = f->mount;
    retire(f->held, sizeof *f->held);
    f->held = NULL;
    count(-1);
    if (mount) {
        view_mounts[mount - 1].opens--;
        view_release_idle(mount - 1);
    }
}

void view_copied(uint32_t entry, int newfd)
{
    if (!shim_mine() || (unsigned)newfd >= SHIM_FDS)
        return;
    struct held h = shim_lock();
    uint32_t stale = files_entry(newfd);
    opens[entry - FD_VIEW].fds++;
    set(newfd, entry);
    view_closed(stale);
    shim_unlock(&h);
}

static bool named_ours(int fd)
{
    static const char prefix[] = "/memfd:memsync:file";
    char link[32], name[64];
    say_format(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, name, sizeof name - 1);
    return n >= (ssize_t)sizeof prefix - 1 && !memcmp(name, prefix, sizeof prefix - 1);
}

static bool held_good(const struct held_file *h)
{
    return h->magic == VIEW_MAGIC && h->version == SHARED_VERSION && h->order <= CONTROL_ORDER_NONE &&
           h->size <= INT64_MAX && memchr(h->path, 0, sizeof h->path) && memchr(h->name, 0, sizeof h->name);
}

uint32_t view_adopt(int fd, const struct statx *st)
{
    if (!named_ours(fd))
        return 0;
    uint64_t dev = makedev(st->stx_dev_major, st->stx_dev_minor);
    for (uint32_t i = 0; i < SHIM_VIEWS; i++)
        if (opens[i].held && opens[i].ino == st->stx_ino && opens[i].dev == dev) {
            opens[i].fds++;
            return FD_VIEW + i;
        }
    uint32_t n = opens_free();
    char link[32];
    say_format(link, sizeof link, "/proc/self/fd/%d", fd);
    int held = n ? raw_openat(AT_FDCWD, link, O_RDWR | O_CLOEXEC, 0) : -1;
    if (held < 0)
        return 0;
    struct held_file *h = raw_mmap(NULL, sizeof *h, PROT_READ | PROT_WRITE, MAP_SHARED, held, 0);
    raw_close(held);
    if (h == MAP_FAILED)
        return 0;
    if (st->stx_size < sizeof *h || !held_good(h)) {
        raw_munmap(h, sizeof *h);
        return 0;
    }
    opens[n - 1] = (struct open_file){.held = h, .fds = 1, .dev = dev, .ino = st->stx_ino};
    count(1);
    return FD_VIEW + n - 1;
}

uint64_t view_ino(const struct id *lineage)
{
    uint64_t ino;
    memcpy(&ino, lineage->b, sizeof ino);
    return ino | 1;
}
