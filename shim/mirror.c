/* Mirrors: remote regions that programs write to.
 *
 * A mirror is a view whose memfd is, at the same time, the file of a region (files.c): pages come as any view's, and
 * what the program changes is found and published as any tracked file's. The two halves hang together by numbers:
 * mount.region, region.mirror.
 *
 *   reading only --first open for writing: REGION, SYNC--> attached --last writer and mapping gone: SYNC, RELEASE-->
 *
 * - A region of a mirror holds one of its mount's `opens`, each open file that writes one of the region's `fds`.
 * - The region is announced only once the view is: the agent knows the memfd by then.
 * - The memfd's size is the agent's to change (TRUNCATE), so that it knows what of the remote's pages is cut off.
 *   Growing is "at least", hence needs no lock; appends take turns, by a lock on the struct view's memfd, which all
 *   programs that have the mirror share and the kernel gives back when one dies.
 * - Locks of the program, which it can no more take on its O_PATH descriptor than anything else, are taken on the
 * memfd: POSIX locks on our descriptor of it, which belong to the process as they should; flock and OFD locks on a
 *   description of the open file's own. They hold between the programs of one agent. The kernel drops a process's POSIX
 *   locks when any descriptor of the inode is closed, so no second one comes while there may be any, and they are
 *   dropped where a local file's would be: when the program closes a descriptor.
 *
 * If the process dies: what it stored and wrote is in the memfd, which the agent holds too and publishes. If the agent
 * dies: the next one gets the memfd (RESUME) and the region over it (REGION), before any thread of ours goes on. */
#include "shim/real.h"
#include "shim/view.h"

#include <signal.h>
#include <string.h>
#include <sys/file.h>

#define ASK_PATIENCE_MS 5000u

bool mirror_possible(const struct rule *rule, const char *path)
{
    if (rule->strategy != RULE_AUTO && rule->strategy != RULE_UFFD) {
        say_once(SAY_ERROR, "%s: a mirror cannot be written under strategy softdirty, hash or inotify, only under uffd",
                 path);
        return false;
    }
    struct held h = shim_lock();
    bool can = arm_can_mirror();
    shim_unlock(&h);
    if (!can)
        say_once(SAY_ERROR,
                 "%s: cannot be opened for writing: a mirror needs userfaultfd with asynchronous write protection and "
                 "missing faults for shared memory (Linux 6.7 or later, and leave to use it): %s; reading works",
                 path, arm_reason());
    return can;
}

uint32_t mirror_known(const char *name, bool locked)
{
    for (uint32_t i = 0; i < VIEW_MOUNTS; i++) {
        struct mount *m = &view_mounts[i];
        if (!m->used || m->mode != CONTROL_MIRROR || m->unlinked || !(m->attached || (locked && m->locked)) ||
            strcmp(m->name, name) != 0)
            continue;
        m->opens++;
        return i + 1;
    }
    return 0;
}

/* ---- attaching */

static size_t sync_put_region(void *to, size_t cap, uint32_t slot, void *of)
{
    struct control_sync m = {.slot = slot, .region = *(const uint32_t *)of};
    return control_sync_put(to, cap, &m);
}

int mirror_attach(uint32_t mount, const struct control_terms *terms)
{
    struct mount *m = &view_mounts[mount - 1];
    struct held h = shim_lock();
    if (m->region) {
        files_region(m->region)->fds++;
    } else if (client_up() && (m->region = files_mirror(mount, terms))) {
        m->opens++;
    } else {
        shim_unlock(&h);
        return -EIO;
    }
    uint32_t number = m->region;
    bool there = m->attached;
    shim_unlock(&h);
    int rc = there ? 0 : sync_ask(sync_put_region, &number, ASK_PATIENCE_MS);
    h = shim_lock();
    if (!rc)
        m->attached = true;
    else
        mirror_let_go(mount - 1);
    shim_unlock(&h);
    return rc == -ENOTCONN ? -EIO : rc;
}

void mirror_let_go(uint32_t mount)
{
    uint32_t number = view_mounts[mount].region;
    files_region(number)->fds--;
    files_release_idle(number);
}

void mirror_released(uint32_t mount)
{
    struct mount *m = &view_mounts[mount];
    m->region = 0;
    m->attached = false;
    m->opens--;
    view_release_idle(mount);
}

/* ---- what a writing call needs */

struct shared *mirror_enter(struct mount *m)
{
    files_mark(m->region, 0, 0); /* the memory, and with it the connection */
    struct shared *s = client_shared();
    if (s)
        __atomic_add_fetch(&s->calls, 1, __ATOMIC_SEQ_CST);
    return s;
}

void mirror_leave(struct shared *s)
{
    if (s)
        __atomic_sub_fetch(&s->calls, 1, __ATOMIC_SEQ_CST);
}

void mirror_touch(struct mount *m)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    __atomic_store_n(&m->wrote_ns, (int64_t)t.tv_sec * 1000000000 + t.tv_nsec, __ATOMIC_RELAXED);
}

static size_t truncate_put(void *to, size_t cap, uint32_t slot, void *of)
{
    struct control_truncate *m = of;
    m->slot = slot;
    return control_truncate_put(to, cap, m);
}

static int size_asked(struct mount *m, uint64_t size, bool grow)
{
    struct control_truncate t = {.view = m->number, .size = size, .grow = grow};
    int rc = size > INT64_MAX ? -EFBIG : sync_ask(truncate_put, &t, m->how.fetch_timeout_ms);
    return rc == -ENOTCONN ? -EIO : rc;
}

int mirror_grow(struct mount *m, uint64_t size)
{
    if (size <= view_size(m))
        return 0;
    files_mark(m->region, size - 1, 1);
    int rc = size_asked(m, size, true);
    files_mark(m->region, size - 1, 1);
    return rc;
}

int mirror_resize(struct open_file *f, uint64_t size)
{
    struct mount *m = view_mount(f);
    if (!m)
        return -1;
    if (!m->region) {
        errno = EINVAL;
        return -1;
    }
    int saved = errno;
    struct shared *s = mirror_enter(m);
    uint64_t before = view_size(m);
    files_mark_resize(m->region, before, size);
    int rc = size_asked(m, size, false);
    files_mark_resize(m->region, before, size);
    mirror_leave(s);
    mirror_touch(m);
    errno = rc ? -rc : saved;
    return rc ? -1 : 0;
}

int mirror_sync(struct open_file *f)
{
    struct mount *m = f->writes ? view_mount(f) : NULL;
    struct ticket t;
    if (!m || !m->region)
        return 0; /* nothing of it can be unwritten */
    sync_begin(&t, m->region);
    return sync_result(0, sync_end(&t));
}

/* An open file of the memfd that no one else has, and with it a number that we keep. Unless POSIX locks may be held
 * there: those would go when the first number is closed. */
static int opened_anew(const struct mount *m)
{
    char link[32];
    say_format(link, sizeof link, "/proc/self/fd/%d", view_memory(m));
    int fd = raw_openat(AT_FDCWD, link, O_RDWR | O_CLOEXEC, 0);
    return m->locked ? fd : own_keep(fd);
}

/* ---- appending */

int mirror_append_begin(const struct mount *m, struct appending *a)
{
    char link[32];
    uint64_t all = ~0ULL; /* a handler that appends, too, would wait for its own thread */
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &all, &a->mask, 8);
    say_format(link, sizeof link, "/proc/self/fd/%d", m->meta);
    a->fd = raw_openat(AT_FDCWD, link, O_RDONLY | O_CLOEXEC, 0);
    int rc = a->fd < 0 ? -errno : 0;
    while (!rc && syscall(SYS_flock, a->fd, LOCK_EX))
        rc = errno == EINTR ? 0 : -errno;
    if (rc)
        mirror_append_end(a);
    return rc;
}

void mirror_append_end(const struct appending *a)
{
    int saved = errno;
    if (a->fd >= 0)
        raw_close(a->fd);
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &a->mask, NULL, 8);
    errno = saved;
}

/* ---- the program's locks */

static int locking_of(struct open_file *f, const struct mount *m)
{
    struct held h = shim_lock();
    if (!f->locking) {
        int fd = opened_anew(m);
        h.error = fd < 0 ? errno : h.error;
        f->locking = fd > 0 ? fd : 0;
        view_lockings += fd > 0;
    }
    int fd = f->locking;
    shim_unlock(&h);
    return fd ? fd : -1;
}

int mirror_flock(struct open_file *f, int operation)
{
    struct mount *m = view_mount(f);
    int fd = m ? locking_of(f, m) : -1;
    return fd < 0 ? -1 : (int)syscall(SYS_flock, fd, operation);
}

int mirror_fcntl(struct open_file *f, int command, struct flock *lock, __typeof__(&fcntl) call)
{
    bool asks = command == F_GETLK || command == F_OFD_GETLK;
    bool posix = command == F_GETLK || command == F_SETLK || command == F_SETLKW;
    int access = (int)(f->held->flags & O_ACCMODE);
    struct mount *m = view_mount(f);
    if (!m)
        return -1;
    if (!raw_readable(lock, sizeof *lock)) {
        errno = EFAULT;
        return -1;
    }
    if (!asks && ((lock->l_type == F_WRLCK && access == O_RDONLY) || (lock->l_type == F_RDLCK && access == O_WRONLY))) {
        errno = EBADF;
        return -1;
    }
    struct flock l = *lock;
    if (l.l_whence == SEEK_CUR) { /* the descriptor that is locked has another file offset */
        l.l_whence = SEEK_SET;
        l.l_start += (off_t)__atomic_load_n(&f->held->offset, __ATOMIC_SEQ_CST);
    }
    if (posix)
        __atomic_store_n(&m->locked, true, __ATOMIC_SEQ_CST);
    int fd = posix ? view_memory(m) : locking_of(f, m);
    if (fd < 0)
        return -1;
    int rc = call ? call(fd, command, &l) : raw_fcntl(fd, command, (long)&l);
    if (!rc && asks)
        *lock = l;
    return rc;
}

void mirror_unlock(struct mount *m)
{
    struct flock all = {.l_type = F_UNLCK, .l_whence = SEEK_SET};
    int fd = m->locked ? view_memory(m) : -1;
    if (fd >= 0)
        raw_fcntl(fd, F_SETLK, (long)&all);
}

/* ---- removing */

/* NAME and its message: too much for a small stack. */
struct removal {
    struct control_name m;
    uint8_t message[CONTROL_MAX];
};

static bool tell(struct removal *r, enum control_name_phase phase)
{
    r->m.phase = (uint8_t)phase;
    struct held h = shim_lock();
    size_t n = control_name_put(r->message, sizeof r->message, &r->m);
    bool told = client_up() && n && !client_send(r->message, n, NULL, 0);
    shim_unlock(&h);
    return told;
}

/* The name goes, from here and from the remote; who has it open keeps the pages. */
static int unlinked(struct mount *m, const struct control_terms *terms)
{
    static uint32_t number = 1u << 31; /* apart from those of hooks_name.c */
    struct removal *r = raw_memory(sizeof *r);
    if (!r) {
        errno = ENOMEM;
        return -1;
    }
    r->m.kind = CONTROL_NAME_UNLINK;
    r->m.number = __atomic_add_fetch(&number, 1, __ATOMIC_RELAXED);
    r->m.dev = m->dev;
    r->m.source.ino = m->ino;
    r->m.terms = *terms;
    strcpy(r->m.old_path, m->path);
    strcpy(r->m.old_name, m->name);
    bool told = tell(r, CONTROL_NAME_BEGUN) && tell(r, CONTROL_NAME_DONE);
    raw_munmap(r, sizeof *r);
    if (!told) {
        errno = EIO;
        return -1;
    }
    __atomic_store_n(&m->unlinked, true, __ATOMIC_SEQ_CST);
    sync_now(0);
    return 0;
}

int mirror_remove(const struct rule *rule, const char *path)
{
    int fd = view_open_region(rule, path, O_RDWR | O_CLOEXEC);
    if (fd < 0)
        return -1;
    struct open_file *f = view_of(fd);
    struct mount *m = f ? view_mount(f) : NULL;
    uint64_t since;
    int rc = m ? 0 : -EIO;
    /* Who has it open keeps the pages, and nobody can be asked for them afterwards. Two opens are this one and the
     * region. */
    if (m && (m->opens > 2 || ranges_of(&view_maps, (uint32_t)(m - view_mounts))))
        rc = view_need(m, 0, view_size(m), &since);
    if (rc)
        errno = -rc;
    else
        rc = unlinked(m, &rule->terms);
    int saved = errno;
    close(fd);
    errno = saved;
    return rc ? -1 : 0;
}
