/* What is asked of a path beside its contents: where a link leads, the path in full, extended attributes. A pulled
 * region's path is no link and has no attributes; the descriptor's entry in /proc is a link to the path.
 *
 * The kernel is asked first where it cannot know better: only what it does not find may be ours. */
#include "shim/real.h"
#include "shim/view.h"

#include <limits.h>
#include <string.h>

static bool pulls(void)
{
    return __builtin_expect(view_pulls, false) && shim_active();
}

/* ---- readlink */

static bool named_file(const char *link, ssize_t n)
{
    static const char name[] = "/memfd:memsync:file";
    return n >= (ssize_t)sizeof name - 1 && !memcmp(link, name, sizeof name - 1);
}

/* 0 when the path is a region's that is there, or that of an open file: in full in (*p)->path, and the caller gives *p
 * back. */
static int region_at(int dir, const char *path, bool follow, struct view_path **p)
{
    struct control_view v;
    char name[NAME_CAP];
    *p = view_path_find(dir, path, follow);
    if (!*p)
        return -ENOENT;
    const struct open_file *f = (*p)->fd >= 0 ? view_of((*p)->fd) : NULL;
    int rc = f ? 0 : (*p)->fd >= 0 ? -ENOENT : view_look((*p)->rule, (*p)->path, &v, name);
    if (f)
        strcpy((*p)->path, f->held->path);
    if (!rc)
        return 0;
    view_path_end(*p);
    return rc;
}

/* An entry of /proc leads to the path, and not to our memfd. */
static ssize_t entry_link(int dir, const char *path, char *to, size_t cap)
{
    char link[32];
    struct view_path *p;
    ssize_t n = view_count ? raw_readlink(dir, path, link, sizeof link) : -1;
    if (!named_file(link, n) || region_at(dir, path, true, &p))
        return -1;
    size_t len = strlen(p->path);
    len = len < cap ? len : cap;
    memcpy(to, p->path, len);
    view_path_end(p);
    return (ssize_t)len;
}

static ssize_t read_link(int dir, const char *path, char *to, size_t cap)
{
    ssize_t n = raw_readlink(dir, path, to, cap);
    if (!pulls())
        return n;
    int saved = errno;
    struct view_path *p;
    if (n > 0) {
        ssize_t ours = entry_link(dir, path, to, cap);
        n = ours < 0 ? n : ours;
    } else if (saved == ENOENT && !region_at(dir, path, false, &p)) {
        view_path_end(p);
        saved = EINVAL; /* it is there, and no link */
    }
    errno = saved;
    return n;
}

SHIM_EXPORT ssize_t readlink(const char *restrict path, char *restrict to, size_t cap)
{
    return read_link(AT_FDCWD, path, to, cap);
}

SHIM_EXPORT ssize_t readlinkat(int dir, const char *restrict path, char *restrict to, size_t cap)
{
    return read_link(dir, path, to, cap);
}

/* The forms that fortified programs call. A length beyond the buffer is theirs to die of. */
SHIM_EXPORT ssize_t __readlink_chk(const char *path, char *to, size_t cap, size_t room)
{
    return cap > room ? REAL(__readlink_chk)(path, to, cap, room) : read_link(AT_FDCWD, path, to, cap);
}

SHIM_EXPORT ssize_t __readlinkat_chk(int dir, const char *path, char *to, size_t cap, size_t room)
{
    return cap > room ? REAL(__readlinkat_chk)(dir, path, to, cap, room) : read_link(dir, path, to, cap);
}

/* ---- realpath */

/* After libc found nothing there. */
static char *full_path(const char *path, char *to)
{
    struct view_path *p;
    if (!pulls() || region_at(AT_FDCWD, path, true, &p)) {
        errno = ENOENT;
        return NULL;
    }
    size_t n = strlen(p->path) + 1;
    if (!to)
        to = malloc(n);
    if (to)
        memcpy(to, p->path, n);
    view_path_end(p);
    return to;
}

SHIM_EXPORT char *realpath(const char *restrict path, char *restrict to)
{
    char *got = REAL(realpath)(path, to);
    return got || errno != ENOENT ? got : full_path(path, to);
}

SHIM_EXPORT char *__realpath_chk(const char *path, char *to, size_t room)
{
    return room < PATH_MAX ? REAL(__realpath_chk)(path, to, room) : realpath(path, to);
}

SHIM_EXPORT char *canonicalize_file_name(const char *path)
{
    return realpath(path, NULL);
}

/* ---- extended attributes */

static bool plain(const char *path, bool follow)
{
    struct view_path *p = pulls() ? view_path_find(AT_FDCWD, path, follow) : NULL;
    if (p)
        view_path_end(p);
    return p;
}

static ssize_t none(void)
{
    errno = ENOTSUP;
    return -1;
}

SHIM_EXPORT ssize_t getxattr(const char *path, const char *name, void *to, size_t cap)
{
    return plain(path, true) ? none() : syscall(SYS_getxattr, path, name, to, cap);
}

SHIM_EXPORT ssize_t lgetxattr(const char *path, const char *name, void *to, size_t cap)
{
    return plain(path, false) ? none() : syscall(SYS_lgetxattr, path, name, to, cap);
}

SHIM_EXPORT ssize_t fgetxattr(int fd, const char *name, void *to, size_t cap)
{
    return view_maybe(fd) && view_of(fd) ? none() : syscall(SYS_fgetxattr, fd, name, to, cap);
}

SHIM_EXPORT ssize_t listxattr(const char *path, char *to, size_t cap)
{
    return plain(path, true) ? 0 : syscall(SYS_listxattr, path, to, cap);
}

SHIM_EXPORT ssize_t llistxattr(const char *path, char *to, size_t cap)
{
    return plain(path, false) ? 0 : syscall(SYS_llistxattr, path, to, cap);
}

SHIM_EXPORT ssize_t flistxattr(int fd, char *to, size_t cap)
{
    return view_maybe(fd) && view_of(fd) ? 0 : syscall(SYS_flistxattr, fd, to, cap);
}
