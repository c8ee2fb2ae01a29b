/* Which paths name remote regions: by a pull or mirror rule, matched against the absolute path with symbolic links resolved, as
 * far as there is anything on the disk to resolve. A regular local file of that name is hidden by the rule; what is no
 * regular file (a directory above all) is left alone. */
#include "shim/view.h"

#include <string.h>

#define HOPS 40

static const char *base_of(const char *path)
{
    const char *slash = strrchr(path, '/');
    const char *base = slash ? slash + 1 : path;
    return !*base || !strcmp(base, ".") || !strcmp(base, "..") ? NULL : base;
}

/* /proc/self/fd/N and its like, when N is the descriptor of a view: -1 for none. */
static int descriptor_of(const char *base, const char *target)
{
    int fd = 0;
    if (strncmp(target, "/memfd:memsync:file", 19))
        return -1;
    for (; *base >= '0' && *base <= '9' && fd < SHIM_FDS; base++)
        fd = fd * 10 + (*base - '0');
    return *base ? -1 : fd;
}

/* Follows p->path while it is a symbolic link. false when it ends at a descriptor, or nowhere. */
static bool follow_links(struct view_path *p, int *dir)
{
    for (int hop = 0; hop < HOPS; hop++) {
        ssize_t n = raw_readlink(*dir, p->path, p->link, sizeof p->link - 1);
        if (n < 0)
            return true;
        p->link[n] = 0;
        const char *base = base_of(p->path);
        p->fd = base ? descriptor_of(base, p->link) : -1;
        size_t above = p->link[0] == '/' || !base ? 0 : (size_t)(base - p->path);
        if (p->fd >= 0 || above + (size_t)n >= sizeof p->path)
            return false;
        memcpy(p->path + above, p->link, (size_t)n + 1);
        if (p->link[0] == '/')
            *dir = AT_FDCWD;
    }
    return false;
}

/* p->path's parent, as the kernel names it, into p->link; what does not exist of it is taken as it is written. */
static bool parent_of(struct view_path *p, int dir, size_t len)
{
    char link[32];
    memcpy(p->other, p->path, len);
    strcpy(p->other + len, len ? "" : ".");
    size_t there = len;
    int fd;
    while ((fd = raw_openat(dir, p->other, O_PATH | O_DIRECTORY | O_CLOEXEC, 0)) < 0) {
        if (errno != ENOENT || !there)
            return false;
        while (there && p->other[there - 1] == '/')
            there--;
        while (there && p->other[there - 1] != '/')
            there--;
        strcpy(p->other + there, there ? "" : ".");
    }
    say_format(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = raw_readlink(AT_FDCWD, link, p->link, sizeof p->link - 1);
    raw_close(fd);
    if (n <= 0 || p->link[0] != '/' || (size_t)n + (len - there) + 2 > sizeof p->link)
        return false;
    if (n > 1)
        p->link[n++] = '/';
    memcpy(p->link + n, p->path + there, len - there);
    p->link[(size_t)n + len - there] = 0;
    return !strstr(p->link, "/../") && !strstr(p->link, "/./") && !strstr(p->link, "//");
}

static bool resolve(struct view_path *p, int dir, bool follow)
{
    struct statx st;
    if (follow && !follow_links(p, &dir))
        return p->fd >= 0;
    const char *base = base_of(p->path);
    if (!base || !rules_may_match(&shim.rules, base))
        return false;
    if (!raw_statx(dir, p->path, AT_SYMLINK_NOFOLLOW, STATX_TYPE, &st) && !S_ISREG(st.stx_mode))
        return false;
    size_t above = (size_t)(base - p->path);
    if (!parent_of(p, dir, above) || strlen(p->link) + strlen(base) >= sizeof p->link)
        return false;
    strcat(p->link, base);
    strcpy(p->path, p->link);
    p->rule = rules_match(&shim.rules, p->path);
    return p->rule && (p->rule->mode == RULE_PULL || p->rule->mode == RULE_MIRROR);
}

struct view_path *view_path_find(int dir, const char *path, bool follow)
{
    int saved = errno;
    char one[1];
    struct view_path *p = NULL;
    if (!shim_mine() || !raw_path(path))
        goto out;
    const char *base = base_of(path);
    /* Most paths are told apart here: no rule wants the name, and it is no symbolic link to another. */
    if (!base || (!rules_may_match(&shim.rules, base) && (!follow || raw_readlink(dir, path, one, 1) < 0)))
        goto out;
    p = raw_memory(sizeof *p);
    if (!p)
        goto out;
    strcpy(p->path, path);
    p->fd = -1;
    if (!resolve(p, dir, follow)) {
        view_path_end(p);
        p = NULL;
    }
out:
    errno = saved;
    return p;
}

void view_path_end(struct view_path *p)
{
    int saved = errno;
    raw_munmap(p, sizeof *p);
    errno = saved;
}

/* Whether the region is there: 0, or a negative errno. */
static int there(const struct view_path *p)
{
    struct control_view v;
    char name[NAME_CAP];
    return view_look(p->rule, p->path, &v, name);
}

static int open_found(const struct view_path *p, int flags)
{
    bool writes = (flags & O_ACCMODE) != O_RDONLY || (flags & O_TRUNC);
    bool mirror = p->rule && p->rule->mode == RULE_MIRROR;
    int e = 0;
    if (flags & O_DIRECTORY)
        e = ENOTDIR;
    else if ((flags & O_CREAT) && (flags & O_EXCL))
        e = !p->rule || !there(p) ? EEXIST : mirror ? 0 : EROFS;
    else if (writes && p->rule && !mirror)
        e = EROFS;
    if (e) {
        errno = e;
        return -1;
    }
    if (p->fd >= 0) {
        struct open_file *f = view_of(p->fd);
        if (!f)
            f = view_of_unknown(p->fd);
        errno = writes ? EROFS : EACCES;
        return f && (!writes || view_writable(f)) ? view_open_again(f, flags) : -1;
    }
    int fd = view_open_region(p->rule, p->path, flags);
    if (fd < 0 && errno == ENOENT && (flags & O_CREAT) && !mirror)
        errno = EROFS;
    return fd;
}

int view_open(int dir, const char *path, int flags)
{
    struct view_path *p = view_path_find(dir, path, !(flags & O_NOFOLLOW));
    if (!p)
        return VIEW_NOT_OURS;
    int fd = open_found(p, flags);
    view_path_end(p);
    return fd;
}

bool view_denied(int dir, const char *path)
{
    if (__builtin_expect(!view_pulls, true) || !shim_active())
        return false;
    struct view_path *p = view_path_find(dir, path, false);
    if (!p)
        return false;
    view_path_end(p);
    errno = EROFS;
    return true;
}

int view_unlink(int dir, const char *path)
{
    if (__builtin_expect(!view_pulls, true) || !shim_active())
        return VIEW_NOT_OURS;
    struct view_path *p = view_path_find(dir, path, false);
    if (!p)
        return VIEW_NOT_OURS;
    bool mirror = p->rule && p->rule->mode == RULE_MIRROR;
    int rc = mirror ? mirror_remove(p->rule, p->path) : -1;
    if (!mirror)
        errno = EROFS;
    view_path_end(p);
    return rc;
}

int view_truncate_path(const char *path, off_t size)
{
    if (__builtin_expect(!view_pulls, true) || !shim_active())
        return VIEW_NOT_OURS;
    struct view_path *p = view_path_find(AT_FDCWD, path, true);
    if (!p)
        return VIEW_NOT_OURS;
    errno = size < 0 ? EINVAL : 0;
    int fd = errno ? -1 : open_found(p, O_WRONLY | O_CLOEXEC), rc = -1;
    view_path_end(p);
    struct open_file *f = fd < 0 ? NULL : view_of(fd);
    if (f)
        rc = mirror_resize(f, (uint64_t)size);
    int saved = errno;
    if (fd >= 0)
        close(fd);
    errno = saved;
    return rc;
}
