/* Which descriptor belongs to which tracked file.
 *
 * The fd table is a word a number: unknown (not looked at yet), unmatched, reader (opened read-only: cannot change
 * anything, but may be synced), or the number of a region. A region is one (device, inode) that this process has open
 * for writing or mapped from a writable descriptor. It begins with the first of these and ends, by RELEASE, with the
 * last.
 *
 * No descriptor of a tracked file is ever duplicated, opened or closed here: closing any descriptor of a file drops the
 * process's POSIX locks on it. The agent gets its own by SCM_RIGHTS, in another process, where that does no harm. */
#include "shim/view.h"

#include <string.h>
#include <sys/sysmacros.h>

#define CHUNK 16u

uint32_t files_fd[SHIM_FDS];
uint32_t files_open, files_streams;
static struct region *chunks[SHIM_REGIONS / CHUNK];
static uint32_t chunks_made;

struct region *files_region(uint32_t number)
{
    uint32_t i = number - 1;
    if (i >= SHIM_REGIONS)
        return NULL;
    struct region *chunk = __atomic_load_n(&chunks[i / CHUNK], __ATOMIC_ACQUIRE);
    return chunk ? &chunk[i % CHUNK] : NULL;
}

static void set(int fd, uint32_t entry)
{
    if ((unsigned)fd < SHIM_FDS)
        __atomic_store_n(&files_fd[fd], entry, __ATOMIC_RELAXED);
}

bool files_identify(int fd, struct statx *st)
{
    return !raw_statx(fd, "", AT_EMPTY_PATH | AT_STATX_SYNC_AS_STAT, STATX_BASIC_STATS | STATX_BTIME, st);
}

void files_source(const struct statx *st, uint64_t *dev, struct source *s)
{
    *dev = makedev(st->stx_dev_major, st->stx_dev_minor);
    s->ino = st->stx_ino;
    s->btime =
        st->stx_mask & STATX_BTIME ? (uint64_t)st->stx_btime.tv_sec * 1000000000u + (uint64_t)st->stx_btime.tv_nsec : 0;
}

static uint32_t find(const struct statx *st)
{
    if (!files_open)
        return 0;
    uint64_t dev;
    struct source s;
    files_source(st, &dev, &s);
    for (uint32_t n = 1; n <= chunks_made * CHUNK; n++) {
        struct region *r = files_region(n);
        if (r->used && r->dev == dev && source_same(&r->source, &s))
            return n;
    }
    return 0;
}

static uint32_t take_number(void)
{
    for (uint32_t n = 1; n <= SHIM_REGIONS; n++) {
        struct region *r = files_region(n);
        if (r && !r->used)
            return n;
        if (!r) {
            struct region *chunk = raw_memory(CHUNK * sizeof *chunk);
            if (!chunk)
                return 0;
            __atomic_store_n(&chunks[chunks_made++], chunk, __ATOMIC_RELEASE);
            return n;
        }
    }
    return 0;
}

/* The path as the kernel knows it; false when it has none any more. */
static bool path_of(int fd, char path[CONTROL_PATH])
{
    char link[32];
    say_format(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = raw_readlink(AT_FDCWD, link, path, CONTROL_PATH - 1);
    if (n <= 0 || n >= CONTROL_PATH - 1 || path[0] != '/')
        return false;
    path[n] = 0;
    return true;
}

static uint32_t new_region(const struct statx *st, const struct rule *rule, const char *path, int fd, int how)
{
    char error[RULES_ERROR];
    uint32_t n = take_number();
    if (!n) {
        say_once(SAY_WARN, "%s: too many tracked files are open at once; this one is not tracked", path);
        return 0;
    }
    struct region *r = files_region(n);
    if (rules_name(rule, path, shim.host, r->name, error)) {
        say(SAY_ERROR, "%s: %s; the file is not tracked", path, error);
        return 0;
    }
    strcpy(r->path, path);
    files_source(st, &r->dev, &r->source);
    r->terms = rule->terms;
    r->strategy = rule->strategy;
    r->hashed = rule->strategy == RULE_INOTIFY                        ? CONTROL_HASHED_EVENTS
                : rule->strategy == RULE_HASH || (how & FILES_STREAM) ? CONTROL_HASHED_ALL
                                                                      : CONTROL_HASHED_NEVER;
    r->fresh = how & FILES_FRESH;
    r->fds = r->streams = r->mirror = 0;
    r->marks = NULL;
    r->used = true;
    __atomic_add_fetch(&files_open, 1, __ATOMIC_RELAXED);
    say(SAY_INFO, "%s matches the rule %s: region %s, written by %s", path, rule->glob, r->name,
        r->hashed == CONTROL_HASHED_EVENTS ? "calls and stores, found by events (inotify) and by hashing at sync points"
        : how & FILES_STREAM               ? "stdio, found by hashing"
        : r->hashed                        ? "calls and stores, found by hashing"
                                           : "calls (marked) and stores (tracked per mapping)");
    client_region(n, fd);
    return n;
}

uint32_t files_mirror(uint32_t mount, const struct control_terms *terms)
{
    const struct mount *m = &view_mounts[mount - 1];
    uint32_t n = take_number();
    if (!n)
        return 0;
    struct region *r = files_region(n);
    *r = (struct region){.used = true,
                         .fresh = true,
                         .hashed = CONTROL_HASHED_NEVER,
                         .strategy = RULE_UFFD,
                         .fds = 1,
                         .mirror = mount,
                         .dev = m->dev,
                         .source = {.ino = m->ino},
                         .terms = *terms};
    strcpy(r->path, m->path);
    strcpy(r->name, m->name);
    __atomic_add_fetch(&files_open, 1, __ATOMIC_RELAXED);
    client_region(n, view_memory(m));
    return n;
}

/* Lock held. */
static uint32_t resolve(int fd, int how)
{
    static char path[CONTROL_PATH];
    struct statx st;
    if (!files_identify(fd, &st))
        return FD_UNMATCHED; /* not kept: the number is not open */
    if (!S_ISREG(st.stx_mode)) {
        set(fd, FD_UNMATCHED);
        return FD_UNMATCHED;
    }
    int flags = raw_fcntl(fd, F_GETFL, 0);
    if (flags >= 0 && (flags & O_PATH)) {
        uint32_t kept = view_adopt(fd, &st);
        set(fd, kept ? kept : FD_READER);
        return kept ? kept : FD_READER;
    }
    if (flags < 0 || (flags & O_ACCMODE) == O_RDONLY) {
        set(fd, FD_READER);
        return FD_READER;
    }
    uint32_t n = find(&st), entry = FD_UNMATCHED;
    if (!n && st.stx_nlink && path_of(fd, path)) {
        const struct rule *rule = rules_match(&shim.rules, path);
        if (rule && rule->mode == RULE_PUSH && client_up())
            n = new_region(&st, rule, path, fd, how);
        else if (!rule)
            say(SAY_DEBUG, "%s matches no rule", path);
    } else if (n && (how & FILES_STREAM) && !files_region(n)->hashed) {
        files_region(n)->streams++;
        files_streams++;
    }
    if (n) {
        files_region(n)->fds++;
        entry = FD_TRACKED - 1 + n;
    }
    set(fd, entry);
    return entry;
}

uint32_t files_resolve(int fd)
{
    uint32_t entry = files_entry(fd);
    if (entry != FD_UNKNOWN || !shim_mine())
        return entry;
    struct held h = shim_lock();
    if (!h.inside) {
        entry = files_entry(fd);
        if (entry == FD_UNKNOWN)
            entry = resolve(fd, 0);
    }
    shim_unlock(&h);
    return entry;
}

void files_opened(int fd, int how)
{
    if ((unsigned)fd >= SHIM_FDS) {
        say_once(SAY_WARN, "descriptors from %d on are not looked at: files opened there are not tracked", SHIM_FDS);
        return;
    }
    if (!shim_mine())
        return;
    struct held h = shim_lock();
    uint32_t stale = files_entry(fd), entry = FD_UNMATCHED;
    view_closed(stale);
    set(fd, FD_UNKNOWN);
    if (files_tracked(stale)) { /* closed behind our back */
        files_region(files_number(stale))->fds--;
        files_release_idle(files_number(stale));
    }
    if (!h.inside)
        entry = resolve(fd, how);
    shim_unlock(&h);
    if ((how & FILES_TRUNCATED) && files_tracked(entry))
        files_mark_size(files_number(entry), 0);
}

void files_renewed(int fd)
{
    uint32_t stale = files_entry(fd);
    if (!files_tracked(stale) && !files_viewed(stale)) {
        set(fd, FD_UNKNOWN);
        return;
    }
    if (!shim_mine())
        return;
    struct held h = shim_lock();
    set(fd, FD_UNKNOWN);
    view_closed(stale);
    if (files_tracked(stale)) {
        files_region(files_number(stale))->fds--;
        files_release_idle(files_number(stale));
    }
    shim_unlock(&h);
}

void files_copied(int oldfd, int newfd)
{
    uint32_t entry = files_entry(oldfd);
    if (files_viewed(entry)) {
        view_copied(entry, newfd);
        return;
    }
    if (!files_tracked(entry)) {
        /* Unknown, not copied: a vfork child changes its parent's table here, and unknown is never wrong. */
        if (!files_tracked(files_entry(newfd)) && !files_viewed(files_entry(newfd)))
            set(newfd, FD_UNKNOWN);
        return;
    }
    if (!shim_mine() || (unsigned)newfd >= SHIM_FDS)
        return;
    struct held h = shim_lock();
    struct region *r = files_region(files_number(entry));
    r->fds++;
    set(newfd, entry);
    if (newfd <= 2 && !r->hashed) { /* the standard streams may write to it now */
        r->streams++;
        files_streams++;
    }
    shim_unlock(&h);
}

void files_streamed(int fd)
{
    uint32_t entry = files_resolve(fd);
    if (!files_tracked(entry) || !shim_mine())
        return;
    struct held h = shim_lock();
    struct region *r = files_region(files_number(entry));
    if (!r->hashed) {
        r->streams++;
        files_streams++;
    }
    shim_unlock(&h);
}

uint32_t files_lookup(int fd)
{
    uint32_t entry = files_resolve(fd);
    if (files_tracked(entry))
        return files_number(entry);
    if (entry != FD_READER || !__atomic_load_n(&files_open, __ATOMIC_RELAXED) || !shim_mine())
        return 0;
    struct statx st;
    if (!files_identify(fd, &st))
        return 0;
    struct held h = shim_lock();
    uint32_t n = find(&st);
    shim_unlock(&h);
    return n;
}

uint32_t files_lookup_stat(const struct statx *st)
{
    struct held h = shim_lock();
    uint32_t n = find(st);
    shim_unlock(&h);
    return n;
}

int files_descriptor(uint32_t number)
{
    const struct region *r = files_region(number);
    if (r->mirror)
        return view_memory(&view_mounts[r->mirror - 1]);
    for (int fd = 0; r->fds && fd < SHIM_FDS; fd++) {
        struct statx st;
        uint64_t dev;
        struct source s;
        if (files_entry(fd) != FD_TRACKED - 1 + number || !files_identify(fd, &st))
            continue;
        files_source(&st, &dev, &s);
        if (dev == r->dev && source_same(&s, &r->source))
            return fd;
    }
    return -1;
}

void files_renamed(uint64_t dev, const struct source *s, const char *path, const char *name)
{
    for (uint32_t n = 1; files_open && n <= chunks_made * CHUNK; n++) {
        struct region *r = files_region(n);
        if (!r->used || r->dev != dev || !source_same(&r->source, s))
            continue;
        strcpy(r->path, path);
        if (*name)
            strcpy(r->name, name);
    }
}

/* ---- marks */

static struct marks *marks_of(uint32_t number)
{
    struct region *r = files_region(number);
    struct marks *m = __atomic_load_n(&r->marks, __ATOMIC_SEQ_CST);
    if (m || !shim_mine())
        return m;
    struct held h = shim_lock();
    if (!h.inside) {
        client_up();
        if (r->used && !r->marks)
            client_marks(number);
    }
    m = r->marks;
    shim_unlock(&h);
    return m;
}

/* Marks, and again when the marks were replaced meanwhile (client_marks). */
#define MARK(number, statement)                                                                                        \
    do {                                                                                                               \
        for (struct marks *m = marks_of(number), *seen = NULL; m && m != seen; m = marks_of(number)) {                 \
            statement;                                                                                                 \
            seen = m;                                                                                                  \
        }                                                                                                              \
    } while (0)

void files_mark(uint32_t number, uint64_t offset, uint64_t len)
{
    MARK(number, marks_add(m, offset, len));
}

void files_mark_size(uint32_t number, uint64_t size)
{
    /* The page that holds the new end is cut, too. */
    MARK(number, (marks_min_size(m, size), marks_add(m, size, 1)));
}

/* Lower sizes are noted before and after the call, so that what stood beyond is dropped whenever the agent looks;
 * higher ones make the region dirty. */
void files_mark_resize(uint32_t number, uint64_t before, uint64_t size)
{
    if (size < before)
        files_mark_size(number, size);
    else if (size > before)
        files_mark(number, size - 1, 1);
}

void files_mark_all(uint32_t number)
{
    MARK(number, __atomic_store_n(&m->all, 1u, __ATOMIC_SEQ_CST));
}

void files_mark_streams(uint32_t number)
{
    if (!__atomic_load_n(&files_streams, __ATOMIC_RELAXED))
        return;
    for (uint32_t n = number ? number : 1; n <= (number ? number : chunks_made * CHUNK); n++) {
        struct region *r = files_region(n);
        if (r && r->used && r->streams)
            files_mark_all(n);
    }
}

/* A call of another thread may still be about to mark: the memory goes only after many more regions went. */
static void marks_retire(struct region *r)
{
    static struct marks *going[64];
    static unsigned at;
    if (!r->marks)
        return;
    struct marks **place = &going[at++ % 64];
    if (*place)
        raw_munmap(*place, sizeof **place);
    *place = r->marks;
    __atomic_store_n(&r->marks, NULL, __ATOMIC_SEQ_CST);
}

/* ---- closing */

bool files_unused(uint32_t number)
{
    return !files_region(number)->fds && !ranges_of(&maps, number);
}

void files_release_idle(uint32_t number)
{
    struct region *r = files_region(number);
    if (!r->used || !files_unused(number))
        return;
    if (client_connected())
        client_release(number);
    r->used = false;
    __atomic_sub_fetch(&files_streams, r->streams, __ATOMIC_RELAXED);
    r->streams = 0;
    marks_retire(r);
    __atomic_sub_fetch(&files_open, 1, __ATOMIC_RELAXED);
    if (r->mirror)
        mirror_released(r->mirror - 1);
}

struct closing files_close_begin(int fd)
{
    struct closing c = {0};
    uint32_t entry = files_entry(fd);
    if (!files_tracked(entry) && !files_viewed(entry)) {
        set(fd, FD_UNKNOWN);
        return c;
    }
    if (!shim_mine())
        return c;
    struct held h = shim_lock();
    entry = files_entry(fd);
    if (files_viewed(entry)) {
        c.number = view_closing(entry);
        c.last = c.number && files_unused(c.number);
        set(fd, FD_UNKNOWN);
        view_closed(entry);
    }
    if (files_tracked(entry)) {
        c.number = files_number(entry);
        files_region(c.number)->fds--;
        set(fd, FD_UNKNOWN);
        c.last = files_unused(c.number);
    }
    shim_unlock(&h);
    return c;
}

void files_close_undo(int fd, const struct closing *c)
{
    if (!c->number)
        return;
    struct held h = shim_lock();
    files_region(c->number)->fds++;
    set(fd, FD_TRACKED - 1 + c->number);
    shim_unlock(&h);
}

void files_close_end(const struct closing *c)
{
    if (!c->last)
        return;
    struct held h = shim_lock();
    files_release_idle(c->number);
    shim_unlock(&h);
}

/* ---- over exec and fork */

void files_inherited(void)
{
    int dir = raw_openat(AT_FDCWD, "/proc/self/fd", O_RDONLY | O_DIRECTORY | O_CLOEXEC, 0);
    if (dir < 0)
        return;
    static char entries[8192];
    static uint8_t open_now[SHIM_FDS / 8];
    for (long n; (n = syscall(SYS_getdents64, dir, entries, sizeof entries)) > 0;)
        for (long at = 0; at < n;) {
            struct {
                uint64_t ino, off;
                uint16_t reclen;
                uint8_t type;
                char name[];
            } *d = (void *)(entries + at);
            at += d->reclen;
            unsigned fd = 0;
            const char *digit = (const char *)d + 19;
            if (*digit < '0' || *digit > '9')
                continue;
            for (; *digit; digit++)
                fd = fd * 10 + (unsigned)(*digit - '0');
            if (fd < SHIM_FDS && (int)fd != dir)
                open_now[fd / 8] |= (uint8_t)(1u << fd % 8);
        }
    raw_close(dir);
    struct held h = shim_lock();
    for (int fd = 0; fd < SHIM_FDS; fd++)
        if (open_now[fd / 8] >> fd % 8 & 1)
            resolve(fd, fd <= 2 ? FILES_STREAM : 0);
    shim_unlock(&h);
}

/* The child's regions are its own: what it writes is in its own marks, and nothing was written in it yet. */
void files_fork_child(void)
{
    for (uint32_t n = 1; files_open && n <= chunks_made * CHUNK; n++) {
        struct region *r = files_region(n);
        if (r->used && r->marks)
            raw_munmap(r->marks, sizeof *r->marks);
        r->marks = NULL;
        r->fresh = true;
    }
}
