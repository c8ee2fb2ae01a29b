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
    view_counted(1);
    uint32_t stale = files_entry(fd);
    set(fd, FD_VIEW + n - 1);
    view_closed(stale);
    return fd;
}

static int opened(struct view_pending *p, int flags)
{
    int n = view_mount_made(p);
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
    view_terms(&p->ask.open, path, name, rule->order, shim.fetch_timeout_ms);
    return 0;
}

int view_open_region(const struct rule *rule, const char *path, int flags)
{
    struct view_pending *p = pending_new();
    int rc = p ? prepare(p, rule, path) : -ENOMEM, fd = -1;
    if (!rc)
        rc = view_ask(p);
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
    struct view_pending *p = pending_new();
    int rc = p ? prepare(p, rule, path) : -ENOMEM;
    if (!rc) {
        p->ask.open.look = 1;
        rc = view_ask(p);
        *v = p->view;
    }
    if (p)
        raw_munmap(p, sizeof *p);
    return rc;
}

/* The view of an open file that came by exec or a message: that very epoch. */
static int resume(struct open_file *f)
{
    struct view_pending *p = pending_new();
    if (!p)
        return -ENOMEM;
    view_terms(&p->ask.open, f->held->path, f->held->name, f->held->order, f->held->fetch_timeout_ms);
    p->ask.epoch = f->held->epoch;
    p->ask.lineage = f->held->lineage;
    p->ask.size = f->held->size;
    p->resume = true;
    int rc = view_ask(p);
    if (rc == -ESTALE)
        say_once(SAY_ERROR, "%s: the remote has gone on, and the epoch that was open is not kept any more",
                 f->held->path);
    if (!rc)
        rc = view_mount_made(p);
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
    view_retire(f->held, sizeof *f->held);
    f->held = NULL;
    view_counted(-1);
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
    view_counted(1);
    return FD_VIEW + n - 1;
}

uint64_t view_ino(const struct id *lineage)
{
    uint64_t ino;
    memcpy(&ino, lineage->b, sizeof ino);
    return ino | 1;
}
