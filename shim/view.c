/* Open files of views (view_mount.c has the views behind them).
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

#include <string.h>
#include <sys/sysmacros.h>

bool view_pulls;
static struct open_file opens[SHIM_VIEWS];
uint32_t view_lockings;

#define OPEN_TRIES 3

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
    if ((unsigned)fd < SHIM_FDS)
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
    int fd = (int)syscall(SYS_memfd_create, "memsync:file", MFD_CLOEXEC | MFD_ALLOW_SEALING);
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
    raw_fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW); /* who opens it by /proc cannot cut it under us */
    *h = *from;
    *at = h;
    return fd;
}

static void describe(struct held_file *h, const struct mount *m)
{
    *h = (struct held_file){.magic = VIEW_MAGIC,
                            .version = SHARED_VERSION,
                            .size = view_size(m),
                            .epoch = view_epoch(m),
                            .mtime_ns = m->mtime_ns,
                            .lineage = m->lineage,
                            .how = m->how,
                            .mode = m->mode};
    strcpy(h->path, m->path);
    strcpy(h->name, m->name);
}

/* What of open's flags F_GETFL tells again. */
#define KEPT_FLAGS (O_ACCMODE | O_APPEND | O_NONBLOCK | O_SYNC | O_DSYNC | O_DIRECT | O_NOATIME)

/* A descriptor of the program for the mount, whose opens were raised for it, and the region's `fds` if it writes. -1
 * with errno. Lock held. */
static int file_made(uint32_t mount, int flags, bool writes, const struct control_terms *terms)
{
    static struct held_file what;
    struct held_file *at = NULL;
    struct stat st;
    uint32_t n = opens_free();
    describe(&what, &view_mounts[mount - 1]);
    what.flags = (uint32_t)(flags & KEPT_FLAGS);
    if (terms)
        what.terms = *terms;
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
    opens[n - 1] = (struct open_file){
        .held = at, .fds = 1, .mount = mount, .dev = st.st_dev, .ino = st.st_ino, .writes = writes};
    view_counted(1);
    uint32_t stale = files_entry(fd);
    set(fd, FD_VIEW + n - 1);
    view_closed(stale);
    return fd;
}

static bool wants_write(int flags)
{
    return (flags & O_ACCMODE) != O_RDONLY || (flags & O_TRUNC);
}

/* The mount, whose opens were raised for it, gets a descriptor: the number, or a negative errno. */
static int opened(uint32_t n, int flags, const struct control_terms *terms)
{
    struct mount *m = &view_mounts[n - 1];
    bool writes = m->mode == CONTROL_MIRROR && wants_write(flags);
    struct held h = shim_lock();
    bool eager = !arm_can_miss();
    shim_unlock(&h);
    uint64_t since;
    int rc = eager ? view_need(m, 0, view_size(m), &since) : 0; /* the agent says so to people */
    if (!rc && writes)
        rc = mirror_attach(n, terms);
    bool attached = writes && !rc;
    h = shim_lock();
    int fd = rc ? -1 : file_made(n, flags, writes, terms);
    if (fd < 0) {
        rc = rc ? rc : -errno;
        if (attached)
            mirror_let_go(n - 1);
        m->opens--;
        view_release_idle(n - 1);
    }
    shim_unlock(&h);
    streams_standard(fd);
    if (fd >= 0 && writes && (flags & O_TRUNC) && mirror_resize(&opens[files_entry(fd) - FD_VIEW], 0)) {
        rc = -errno;
        close(fd);
        fd = -1;
    }
    return fd < 0 ? rc : fd;
}

/* A pending is too much for a small stack. */
static struct view_pending *pending_new(void)
{
    return raw_memory(sizeof(struct view_pending));
}

static int prepare(struct view_pending *p, const struct rule *rule, const char *path)
{
    char error[RULES_ERROR], name[NAME_CAP];
    if (rules_name(rule, path, shim.host, name, error)) {
        say(SAY_ERROR, "%s: %s", path, error);
        return -EINVAL;
    }
    struct view_how how = {.order = rule->order,
                           .follow = rule->follow,
                           .resident = rule->resident,
                           .fetch_timeout_ms = shim.fetch_timeout_ms};
    view_terms(&p->ask.open, path, name, rule->mode == RULE_MIRROR ? CONTROL_MIRROR : CONTROL_PULL, &how);
    return 0;
}

/* Asks for the region and opens it. Somebody may write it between the two; then both are done again. */
static int ask_and_open(struct view_pending *p, const struct rule *rule, int flags)
{
    int rc = -ESTALE;
    p->ask.open.create = rule->mode == RULE_MIRROR && (flags & O_CREAT);
    for (int tries = 0; tries < OPEN_TRIES && rc == -ESTALE; tries++) {
        struct held h = shim_lock();
        uint32_t known = rule->mode == RULE_MIRROR ? mirror_known(p->ask.open.name, !tries) : 0;
        shim_unlock(&h);
        rc = known ? (int)known : view_ask(p);
        if (!rc)
            rc = view_mount_made(p);
        if (rc > 0)
            rc = opened((uint32_t)rc, flags, &rule->terms);
    }
    return rc;
}

int view_open_region(const struct rule *rule, const char *path, int flags)
{
    struct view_pending *p = pending_new();
    int rc = p ? prepare(p, rule, path) : -ENOMEM, saved = errno;
    if (!rc && wants_write(flags) && !mirror_possible(rule, path))
        rc = -EOPNOTSUPP;
    if (!rc)
        rc = ask_and_open(p, rule, flags);
    if (p)
        raw_munmap(p, sizeof *p);
    if (rc >= 0)
        say(SAY_INFO, "%s is the remote's region", path);
    errno = rc < 0 ? -rc : saved;
    return rc < 0 ? -1 : rc;
}

/* What this process writes to it knows itself. */
static bool known_here(const char *name, struct control_view *v)
{
    struct held h = shim_lock();
    uint32_t n = mirror_known(name, true);
    if (n) {
        struct mount *m = &view_mounts[n - 1];
        *v = (struct control_view){.size = view_size(m),
                                   .mtime_ns = m->wrote_ns ? m->wrote_ns : m->mtime_ns,
                                   .lineage = m->lineage};
        m->opens--;
    }
    shim_unlock(&h);
    return n;
}

int view_look(const struct rule *rule, const char *path, struct control_view *v, char name[NAME_CAP])
{
    struct view_pending *p = pending_new();
    int rc = p ? prepare(p, rule, path) : -ENOMEM;
    if (p)
        strcpy(name, p->ask.open.name);
    if (!rc && !(rule->mode == RULE_MIRROR && known_here(name, v))) {
        p->ask.open.look = 1;
        rc = view_ask(p);
        *v = p->view;
    }
    if (p)
        raw_munmap(p, sizeof *p);
    return rc;
}

/* The view of an open file that came by exec or a message: that very epoch, or the mirror that it is of. */
static int resume(struct open_file *f)
{
    struct view_pending *p = pending_new();
    if (!p)
        return -ENOMEM;
    view_terms(&p->ask.open, f->held->path, f->held->name, f->held->mode, &f->held->how);
    p->ask.epoch = f->held->epoch;
    p->ask.lineage = f->held->lineage;
    p->ask.size = f->held->size;
    p->resume = f->held->mode == CONTROL_PULL;
    struct held h = shim_lock();
    int rc = p->resume ? 0 : (int)mirror_known(f->held->name, true);
    shim_unlock(&h);
    if (!rc)
        rc = view_ask(p);
    if (rc == -ESTALE)
        say_once(SAY_ERROR, "%s: the remote has gone on, and the epoch that was open is not kept any more",
                 f->held->path);
    if (!rc)
        rc = view_mount_made(p);
    raw_munmap(p, sizeof *p);
    bool writes = rc > 0 && view_writable(f);
    int bad = writes ? mirror_attach((uint32_t)rc, &f->held->terms) : 0;
    h = shim_lock();
    if (rc > 0 && !bad && !f->mount) {
        f->mount = (uint32_t)rc;
        f->writes = writes;
    } else if (rc > 0) { /* another thread was first */
        if (writes && !bad)
            mirror_let_go((uint32_t)rc - 1);
        view_mounts[rc - 1].opens--;
        view_release_idle((uint32_t)rc - 1);
        rc = bad;
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
    shim_unlock(&h);
    int fd = opened(f->mount, flags, &f->held->terms);
    if (fd < 0)
        errno = -fd;
    return fd < 0 ? -1 : fd;
}

void view_closed(uint32_t entry)
{
    if (!files_viewed(entry))
        return;
    struct open_file *f = &opens[entry - FD_VIEW];
    if (!f->held)
        return;
    uint32_t mount = f->mount;
    if (mount)
        mirror_unlock(&view_mounts[mount - 1]);
    if (--f->fds)
        return;
    view_retire(f->held, sizeof *f->held);
    f->held = NULL;
    if (f->locking) {
        raw_close(f->locking);
        view_lockings--;
    }
    view_counted(-1);
    if (mount) {
        if (f->writes)
            mirror_let_go(mount - 1);
        view_mounts[mount - 1].opens--;
        view_release_idle(mount - 1);
    }
}

uint32_t view_closing(uint32_t entry)
{
    struct open_file *f = &opens[entry - FD_VIEW];
    if (!f->held || f->fds != 1 || !f->writes)
        return 0;
    f->writes = false;
    uint32_t number = view_mounts[f->mount - 1].region;
    files_region(number)->fds--;
    return number;
}

struct open_file *view_locking(int fd)
{
    for (uint32_t i = 0; view_lockings && i < SHIM_VIEWS; i++)
        if (opens[i].held && opens[i].locking == fd)
            return &opens[i];
    return NULL;
}

int view_locking_above(int from)
{
    int lowest = -1;
    for (uint32_t i = 0; view_lockings && i < SHIM_VIEWS; i++)
        if (opens[i].held && opens[i].locking >= from && opens[i].locking && (lowest < 0 || opens[i].locking < lowest))
            lowest = opens[i].locking;
    return lowest;
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
    ssize_t n = raw_readlink(AT_FDCWD, link, name, sizeof name - 1);
    return n >= (ssize_t)sizeof prefix - 1 && !memcmp(name, prefix, sizeof prefix - 1);
}

static bool held_good(const struct held_file *h)
{
    return h->magic == VIEW_MAGIC && h->version == SHARED_VERSION && h->how.order <= CONTROL_ORDER_NONE &&
           h->mode <= CONTROL_MIRROR && h->size <= INT64_MAX && memchr(h->path, 0, sizeof h->path) &&
           memchr(h->name, 0, sizeof h->name);
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
    view_counted(1);
    return FD_VIEW + n - 1;
}

/* A mirror's is of its name: it gets its lineage only when it is first published, and is the same file before. */
uint64_t view_ino(const struct id *lineage, uint8_t mode, const char *name)
{
    uint64_t ino = 0xcbf29ce484222325u;
    if (mode == CONTROL_MIRROR)
        for (; *name; name++)
            ino = (ino ^ (uint8_t)*name) * 0x100000001b3u;
    else
        memcpy(&ino, lineage->b, sizeof ino);
    return ino | 1;
}

uint64_t view_file_size(struct open_file *f)
{
    const struct mount *m = f->held->mode == CONTROL_MIRROR || f->held->how.follow ? view_mount(f)
                            : f->mount                                     ? &view_mounts[f->mount - 1]
                                                                           : NULL;
    return m ? view_size(m) : f->held->size;
}

int64_t view_file_mtime(struct open_file *f)
{
    const struct mount *m = f->mount ? &view_mounts[f->mount - 1] : NULL;
    return m && m->wrote_ns       ? m->wrote_ns
           : m && m->how.follow   ? __atomic_load_n(&m->view->mtime_ns, __ATOMIC_ACQUIRE)
                                  : f->held->mtime_ns;
}
