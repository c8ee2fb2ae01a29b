/* What is said of a pulled file without reading it: a regular file of the region's size, of this user, that may be
 * read, and written if it is a mirror. Device and inode are the same before and after it is opened. */
#include "shim/real.h"
#include "shim/view.h"

#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#define BLOCK 4096u

static void describe(struct stat *st, uint64_t size, int64_t mtime_ns, uint64_t ino, bool writable)
{
    memset(st, 0, sizeof *st);
    st->st_dev = VIEW_DEV;
    st->st_ino = ino;
    st->st_mode = S_IFREG | (writable ? 0644 : 0444);
    st->st_nlink = 1;
    st->st_uid = geteuid();
    st->st_gid = getegid();
    st->st_size = (off_t)size;
    st->st_blksize = BLOCK;
    st->st_blocks = (blkcnt_t)((size + BLOCK - 1) / BLOCK * (BLOCK / 512));
    st->st_mtim.tv_sec = mtime_ns / 1000000000;
    st->st_mtim.tv_nsec = mtime_ns % 1000000000;
    if (st->st_mtim.tv_nsec < 0) {
        st->st_mtim.tv_sec--;
        st->st_mtim.tv_nsec += 1000000000;
    }
    st->st_atim = st->st_ctim = st->st_mtim;
}

static struct statx_timestamp stamp(struct timespec t)
{
    return (struct statx_timestamp){.tv_sec = t.tv_sec, .tv_nsec = (uint32_t)t.tv_nsec};
}

static void widen(struct statx *to, const struct stat *st)
{
    memset(to, 0, sizeof *to);
    to->stx_mask = STATX_BASIC_STATS;
    to->stx_blksize = (uint32_t)st->st_blksize;
    to->stx_nlink = (uint32_t)st->st_nlink;
    to->stx_uid = st->st_uid;
    to->stx_gid = st->st_gid;
    to->stx_mode = (uint16_t)st->st_mode;
    to->stx_ino = st->st_ino;
    to->stx_size = (uint64_t)st->st_size;
    to->stx_blocks = (uint64_t)st->st_blocks;
    to->stx_atime = to->stx_mtime = to->stx_ctime = stamp(st->st_mtim);
    to->stx_dev_major = major(st->st_dev);
    to->stx_dev_minor = minor(st->st_dev);
}

/* The two questions, each answered into *st: true when it is ours, with the result in *rc. */
static bool asked_fd(int fd, struct stat *st)
{
    struct open_file *f = view_maybe(fd) ? view_of(fd) : NULL;
    if (f)
        describe(st, view_file_size(f), view_file_mtime(f), view_ino(&f->held->lineage, f->held->mode, f->held->name),
                 f->held->mode == CONTROL_MIRROR);
    return f;
}

static bool asked_path(int dir, const char *path, bool follow, struct stat *st, int *rc)
{
    struct view_path *p = view_path_find(dir, path, follow);
    if (!p)
        return false;
    if (p->fd >= 0) {
        bool ours = asked_fd(p->fd, st);
        view_path_end(p);
        *rc = 0;
        return ours;
    }
    struct control_view v;
    char name[NAME_CAP] = "";
    *rc = view_look(p->rule, p->path, &v, name);
    uint8_t mode = p->rule->mode == RULE_MIRROR ? CONTROL_MIRROR : CONTROL_PULL;
    if (!*rc)
        describe(st, v.size, v.mtime_ns, view_ino(&v.lineage, mode, name), mode == CONTROL_MIRROR);
    view_path_end(p);
    return true;
}

static int result(int rc)
{
    if (!rc)
        return 0;
    errno = -rc;
    return -1;
}

static bool pulls(void)
{
    return __builtin_expect(view_pulls, false) && shim_active();
}

/* The kernel says EFAULT for a bad place to write to before it is written to by us. */
static bool place_good(const void *to, size_t len)
{
    return raw_readable(to, len);
}

static int stat_path(int dir, const char *path, struct stat *to, int flags)
{
    struct stat st;
    int rc;
    if (pulls() && asked_path(dir, path, !(flags & AT_SYMLINK_NOFOLLOW), &st, &rc)) {
        if (!rc && !place_good(to, sizeof *to))
            rc = -EFAULT;
        if (!rc)
            *to = st;
        return result(rc);
    }
    return (int)syscall(SYS_newfstatat, dir, path, to, flags);
}

static int stat_fd(int fd, struct stat *to)
{
    struct stat st;
    if (view_maybe(fd) && asked_fd(fd, &st)) {
        if (!place_good(to, sizeof *to))
            return result(-EFAULT);
        *to = st;
        return 0;
    }
    return raw_fstat(fd, to);
}

static int stat_at(int dir, const char *path, struct stat *to, int flags)
{
    if ((flags & AT_EMPTY_PATH) && view_maybe(dir) && raw_readable(path, 1) && !*path)
        return stat_fd(dir, to);
    return stat_path(dir, path, to, flags);
}

/* struct stat64 is struct stat where off_t has 64 bits. */
_Static_assert(sizeof(struct stat) == sizeof(struct stat64), "one struct stat");

SHIM_EXPORT int stat(const char *path, struct stat *to)
{
    return stat_path(AT_FDCWD, path, to, 0);
}

SHIM_EXPORT int stat64(const char *path, struct stat64 *to)
{
    return stat_path(AT_FDCWD, path, (struct stat *)to, 0);
}

SHIM_EXPORT int lstat(const char *path, struct stat *to)
{
    return stat_path(AT_FDCWD, path, to, AT_SYMLINK_NOFOLLOW);
}

SHIM_EXPORT int lstat64(const char *path, struct stat64 *to)
{
    return stat_path(AT_FDCWD, path, (struct stat *)to, AT_SYMLINK_NOFOLLOW);
}

SHIM_EXPORT int fstat(int fd, struct stat *to)
{
    return stat_fd(fd, to);
}

SHIM_EXPORT int fstat64(int fd, struct stat64 *to)
{
    return stat_fd(fd, (struct stat *)to);
}

SHIM_EXPORT int fstatat(int dir, const char *path, struct stat *to, int flags)
{
    return stat_at(dir, path, to, flags);
}

SHIM_EXPORT int fstatat64(int dir, const char *path, struct stat64 *to, int flags)
{
    return stat_at(dir, path, (struct stat *)to, flags);
}

SHIM_EXPORT int statx(int dir, const char *restrict path, int flags, unsigned mask, struct statx *restrict to)
{
    struct stat st;
    int rc = 0;
    bool ours = false;
    if ((flags & AT_EMPTY_PATH) && view_maybe(dir) && raw_readable(path, 1) && !*path)
        ours = asked_fd(dir, &st);
    else if (pulls())
        ours = asked_path(dir, path, !(flags & AT_SYMLINK_NOFOLLOW), &st, &rc);
    if (!ours)
        return raw_statx(dir, path, flags, mask, to);
    if (!rc && !place_good(to, sizeof *to))
        rc = -EFAULT;
    if (!rc)
        widen(to, &st);
    return result(rc);
}

/* What programs built against an older C library call; the version is always the one of this machine. */
SHIM_EXPORT int __xstat(int version, const char *path, struct stat *to)
{
    (void)version;
    return stat_path(AT_FDCWD, path, to, 0);
}

SHIM_EXPORT int __xstat64(int version, const char *path, struct stat64 *to)
{
    (void)version;
    return stat_path(AT_FDCWD, path, (struct stat *)to, 0);
}

SHIM_EXPORT int __lxstat(int version, const char *path, struct stat *to)
{
    (void)version;
    return stat_path(AT_FDCWD, path, to, AT_SYMLINK_NOFOLLOW);
}

SHIM_EXPORT int __lxstat64(int version, const char *path, struct stat64 *to)
{
    (void)version;
    return stat_path(AT_FDCWD, path, (struct stat *)to, AT_SYMLINK_NOFOLLOW);
}

SHIM_EXPORT int __fxstat(int version, int fd, struct stat *to)
{
    (void)version;
    return stat_fd(fd, to);
}

SHIM_EXPORT int __fxstat64(int version, int fd, struct stat64 *to)
{
    (void)version;
    return stat_fd(fd, (struct stat *)to);
}

SHIM_EXPORT int __fxstatat(int version, int dir, const char *path, struct stat *to, int flags)
{
    (void)version;
    return stat_at(dir, path, to, flags);
}

SHIM_EXPORT int __fxstatat64(int version, int dir, const char *path, struct stat64 *to, int flags)
{
    (void)version;
    return stat_at(dir, path, (struct stat *)to, flags);
}

/* ---- access */

/* 1 when it is not ours. */
static int may(int dir, const char *path, int how, bool follow)
{
    struct stat st;
    int rc;
    if (!pulls() || !asked_path(dir, path, follow, &st, &rc))
        return 1;
    if (!rc && (how & W_OK) && !(st.st_mode & S_IWUSR))
        rc = -EROFS;
    else if (!rc && (how & X_OK))
        rc = -EACCES;
    return result(rc);
}

SHIM_EXPORT int access(const char *path, int how)
{
    int rc = may(AT_FDCWD, path, how, true);
    return rc <= 0 ? rc : raw_access(path, how);
}

SHIM_EXPORT int faccessat(int dir, const char *path, int how, int flags)
{
    int rc = may(dir, path, how, !(flags & AT_SYMLINK_NOFOLLOW));
    return rc <= 0 ? rc : REAL(faccessat)(dir, path, how, flags);
}

SHIM_EXPORT int eaccess(const char *path, int how)
{
    int rc = may(AT_FDCWD, path, how, true);
    return rc <= 0 ? rc : REAL(eaccess)(path, how);
}

SHIM_EXPORT int euidaccess(const char *path, int how)
{
    int rc = may(AT_FDCWD, path, how, true);
    return rc <= 0 ? rc : REAL(euidaccess)(path, how);
}

/* ---- times: a mirror's are this process's own, what it says counts until it writes */

static void stamp_mount(struct mount *m, const struct timespec t[2])
{
    if (!t || t[1].tv_nsec == UTIME_NOW)
        mirror_touch(m);
    else if (t[1].tv_nsec != UTIME_OMIT)
        m->wrote_ns = (int64_t)t[1].tv_sec * 1000000000 + t[1].tv_nsec;
}

/* 1 when it is not ours. */
static int stamped_fd(int fd, const struct timespec t[2])
{
    struct open_file *f = view_maybe(fd) ? view_of(fd) : view_of_unknown(fd);
    if (!f)
        return 1;
    struct mount *m = f->held->mode == CONTROL_MIRROR ? view_mount(f) : NULL;
    if (m)
        stamp_mount(m, t);
    return m ? 0 : result(f->held->mode == CONTROL_MIRROR ? -errno : -EROFS);
}

static int stamped_path(int dir, const char *path, const struct timespec t[2], int flags)
{
    struct stat st;
    int rc;
    if (!pulls() || !asked_path(dir, path, !(flags & AT_SYMLINK_NOFOLLOW), &st, &rc))
        return 1;
    if (rc || !(st.st_mode & S_IWUSR))
        return result(rc ? rc : -EROFS);
    int fd = openat(dir, path, O_RDONLY | O_CLOEXEC); /* of the mount that others have, too */
    if (fd < 0)
        return -1;
    rc = stamped_fd(fd, t);
    close(fd);
    return rc;
}

SHIM_EXPORT int futimens(int fd, const struct timespec t[2])
{
    int rc = stamped_fd(fd, t);
    return rc <= 0 ? rc : REAL(futimens)(fd, t);
}

SHIM_EXPORT int utimensat(int dir, const char *path, const struct timespec t[2], int flags)
{
    int rc = raw_readable(path, 1) ? stamped_path(dir, path, t, flags) : stamped_fd(dir, t);
    return rc <= 0 ? rc : REAL(utimensat)(dir, path, t, flags);
}
