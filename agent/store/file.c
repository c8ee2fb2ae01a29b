/* file:DIR. Under DIR/.memsync (0700):
 *
 *   lock     flock'ed while an agent has the directory; holds its pid for the message to the next one
 *   meta     the saved table, replaced by rename
 *   journal  see journal.c
 *   data/    NUMBER in 16 hex digits: the files. DIR/NAME is a hard link to one of them
 *   spill/   NUMBER likewise: parts of large epochs that are not in the journal
 *   probe    an empty file whose length tells how long a file can be here
 *
 * While the agent runs, data/ is what counts, and names can be shown again at any time from the table. At rest names
 * are what counts, and data/ is empty. That lets people copy or move DIR with the usual tools after a clean stop.
 *
 * Paths are walked part by part with O_NOFOLLOW, so nothing that somebody puts into DIR leads out of it. */
#include "agent/store/volume.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#define DIRS_MAX 256 /* changed directories remembered for names_sync; beyond, the whole file system is synced */
#define NUMBER_TEXT 17

static void no_step(const char *where)
{
    (void)where;
}
void (*store_step)(const char *where) = no_step;

struct file_volume {
    struct volume v;
    char *dir;
    int root, own, files, spills, lock;
    pthread_mutex_t mutex; /* of what follows */
    char *dirs[DIRS_MAX];
    size_t dirs_len;
    bool dirs_more;
    int probe;
    uint64_t fits;
};

static struct file_volume *of(const struct volume *v)
{
    return (struct file_volume *)(uintptr_t)v;
}

static const char *number_text(uint64_t number, char text[NUMBER_TEXT])
{
    snprintf(text, NUMBER_TEXT, "%016" PRIx64, number);
    return text;
}

static const char *file_dir(const struct volume *v)
{
    return of(v)->dir;
}

static void file_close(struct volume *v)
{
    struct file_volume *f = of(v);
    int fds[] = {f->probe, f->spills, f->files, f->own, f->root, f->lock}; /* the lock last */
    for (size_t i = 0; i < sizeof fds / sizeof *fds; i++)
        if (fds[i] >= 0)
            close(fds[i]);
    for (size_t i = 0; i < f->dirs_len; i++)
        free(f->dirs[i]);
    pthread_mutex_destroy(&f->mutex);
    free(f->dir);
    free(f);
}

static int number_open(int dir, uint64_t number, bool create)
{
    char text[NUMBER_TEXT];
    int fd = openat(dir, number_text(number, text), O_RDWR | O_CLOEXEC | O_NOFOLLOW | (create ? O_CREAT : 0), 0600);
    return fd < 0 ? -errno : fd;
}

static int number_remove(int dir, uint64_t number)
{
    char text[NUMBER_TEXT];
    return unlinkat(dir, number_text(number, text), 0) < 0 && errno != ENOENT ? -errno : 0;
}

static int file_open(struct volume *v, uint64_t file, bool create)
{
    return number_open(of(v)->files, file, create);
}

static int file_remove(struct volume *v, uint64_t file)
{
    store_step("remove a file");
    return number_remove(of(v)->files, file);
}

static int files_sync(struct volume *v)
{
    store_step("sync the directory of files");
    return fsync(of(v)->files) < 0 || fsync(of(v)->spills) < 0 ? -errno : 0;
}

static int spill_open(struct volume *v, uint64_t number, bool create)
{
    return number_open(of(v)->spills, number, create);
}

static int spill_remove(struct volume *v, uint64_t number)
{
    store_step("remove a spill");
    return number_remove(of(v)->spills, number);
}

static int each_number(int dir, void (*each)(void *arg, uint64_t number), void *arg)
{
    int fd = openat(dir, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *d = fd < 0 ? NULL : fdopendir(fd);
    if (!d) {
        int err = -errno;
        if (fd >= 0)
            close(fd);
        return err;
    }
    for (struct dirent *e; (e = readdir(d));) {
        char *end;
        uint64_t number = strtoull(e->d_name, &end, 16);
        if (strlen(e->d_name) == NUMBER_TEXT - 1 && !*end)
            each(arg, number);
    }
    closedir(d);
    return 0;
}

static int file_each(struct volume *v, void (*file)(void *, uint64_t), void (*spill)(void *, uint64_t), void *arg)
{
    int err = each_number(of(v)->files, file, arg);
    return err ? err : each_number(of(v)->spills, spill, arg);
}

/* Opens the directory that holds the last part of name, which `last` then points at; makes missing directories when
 * asked. */
static int parent_open(const struct file_volume *f, const char *name, bool make, const char **last)
{
    int at = dup(f->root);
    if (at < 0)
        return -errno;
    for (const char *slash; (slash = strchr(name, '/')); name = slash + 1) {
        char part[256];
        memcpy(part, name, (size_t)(slash - name));
        part[slash - name] = 0;
        if (make && mkdirat(at, part, 0777) == 0)
            store_step("make a directory");
        int next = openat(at, part, O_PATH | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        int err = -errno;
        close(at);
        if (next < 0)
            return err;
        at = next;
    }
    *last = name;
    return at;
}

static void changed_dir(struct file_volume *f, const char *name)
{
    const char *slash = strrchr(name, '/');
    size_t len = slash ? (size_t)(slash - name) : 0;
    pthread_mutex_lock(&f->mutex);
    bool known = f->dirs_more;
    for (size_t i = 0; i < f->dirs_len && !known; i++)
        known = strlen(f->dirs[i]) == len && !memcmp(f->dirs[i], name, len);
    if (!known) {
        char *dir = f->dirs_len < DIRS_MAX ? strndup(name, len) : NULL;
        if (dir)
            f->dirs[f->dirs_len++] = dir;
        else
            f->dirs_more = true;
    }
    pthread_mutex_unlock(&f->mutex);
}

/* Makes nothing: a directory made for an epoch that then fails would stay. */
static int file_vacant(struct volume *v, const char *name, bool fresh, char error[STORE_ERROR])
{
    struct file_volume *f = of(v);
    const char *last;
    int at = parent_open(f, name, false, &last);
    if (at == -ENOENT)
        return 0;
    struct stat st;
    int err = at < 0 ? at : fstatat(at, last, &st, AT_SYMLINK_NOFOLLOW) < 0 ? -errno : 0;
    if (at >= 0)
        close(at);
    if (err && err != -ENOENT) {
        snprintf(error, STORE_ERROR, "%.200s cannot be a region in %.150s: %s", name, f->dir,
                 err == -ELOOP || err == -ENOTDIR ? "a file or a symlink stands where its directory would be"
                                                  : strerror(-err));
        return -EINVAL;
    }
    if (!err && fresh) {
        snprintf(error, STORE_ERROR,
                 "%.200s is in %.150s already and is no region of this store: move it away, or choose another name",
                 name, f->dir);
        return -EINVAL;
    }
    return 0;
}

static int file_show(struct volume *v, const char *name, uint64_t file)
{
    struct file_volume *f = of(v);
    char number[NUMBER_TEXT];
    number_text(file, number);
    struct stat ours, there;
    const char *last;
    int at = parent_open(f, name, true, &last);
    if (at < 0)
        return at;
    int err = 0;
    if (fstatat(f->files, number, &ours, AT_SYMLINK_NOFOLLOW) < 0)
        err = -errno;
    else if (fstatat(at, last, &there, AT_SYMLINK_NOFOLLOW) < 0)
        err = errno != ENOENT || linkat(f->files, number, at, last, 0) < 0 ? -errno : 0;
    else if (there.st_ino != ours.st_ino || there.st_dev != ours.st_dev) {
        unlinkat(f->own, "shown", 0);
        if (linkat(f->files, number, f->own, "shown", 0) < 0 || renameat(f->own, "shown", at, last) < 0)
            err = -errno;
    }
    close(at);
    changed_dir(f, name);
    store_step("show a name");
    return err;
}

/* Removes the directories above a removed name for as long as they are empty. */
static void prune(struct file_volume *f, const char *name)
{
    char *path = strdup(name);
    for (char *slash; path && (slash = strrchr(path, '/'));) {
        *slash = 0;
        const char *last;
        int at = parent_open(f, path, false, &last);
        if (at == -ENOENT)
            continue;
        if (at < 0)
            break;
        int rc = unlinkat(at, last, AT_REMOVEDIR);
        close(at);
        if (rc < 0)
            break;
        changed_dir(f, path);
        store_step("remove a directory");
    }
    free(path);
}

static int file_hide(struct volume *v, const char *name)
{
    struct file_volume *f = of(v);
    const char *last;
    int at = parent_open(f, name, false, &last);
    if (at < 0 && at != -ENOENT)
        return at == -ENOTDIR ? 0 : at;
    int err = at >= 0 && unlinkat(at, last, 0) < 0 && errno != ENOENT ? -errno : 0;
    if (at >= 0)
        close(at);
    changed_dir(f, name);
    store_step("hide a name");
    prune(f, name);
    return err;
}

static int file_adopt(struct volume *v, const char *name, uint64_t file)
{
    struct file_volume *f = of(v);
    char number[NUMBER_TEXT];
    number_text(file, number);
    if (faccessat(f->files, number, F_OK, AT_SYMLINK_NOFOLLOW) == 0)
        return 0;
    const char *last;
    int at = parent_open(f, name, false, &last);
    if (at < 0)
        return at == -ENOTDIR || at == -ELOOP ? -ENOENT : at;
    struct stat st;
    int err = 0;
    if (fstatat(at, last, &st, AT_SYMLINK_NOFOLLOW) < 0)
        err = -errno;
    else if (!S_ISREG(st.st_mode))
        err = -ENOENT;
    else if (linkat(at, last, f->files, number, 0) < 0)
        err = -errno;
    close(at);
    store_step("adopt a name");
    return err;
}

static int file_rest(struct volume *v, const char *name, uint64_t file)
{
    struct file_volume *f = of(v);
    char number[NUMBER_TEXT];
    number_text(file, number);
    struct stat ours, there;
    const char *last;
    int at = parent_open(f, name, false, &last);
    if (at < 0)
        return at;
    int rc = fstatat(at, last, &there, AT_SYMLINK_NOFOLLOW);
    close(at);
    if (rc < 0 || fstatat(f->files, number, &ours, AT_SYMLINK_NOFOLLOW) < 0 || there.st_ino != ours.st_ino ||
        there.st_dev != ours.st_dev)
        return -ENOENT;
    store_step("let a file rest");
    return number_remove(f->files, file);
}

static int dir_sync(struct file_volume *f, const char *dir)
{
    char inside[NAME_CAP + 2];
    snprintf(inside, sizeof inside, "%s%s.", dir, *dir ? "/" : "");
    const char *last;
    int at = parent_open(f, inside, false, &last);
    if (at < 0)
        return at == -ENOENT || at == -ENOTDIR ? 0 : at; /* it has gone since, and its parent is on the list too */
    int fd = openat(at, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int err = fd < 0 || fsync(fd) < 0 ? -errno : 0;
    if (fd >= 0)
        close(fd);
    close(at);
    return err;
}

static int names_sync(struct volume *v)
{
    struct file_volume *f = of(v);
    pthread_mutex_lock(&f->mutex);
    char *dirs[DIRS_MAX];
    size_t len = f->dirs_len;
    memcpy(dirs, f->dirs, len * sizeof *dirs);
    bool more = f->dirs_more;
    f->dirs_len = 0;
    f->dirs_more = false;
    pthread_mutex_unlock(&f->mutex);
    int err = more && syncfs(f->files) < 0 ? -errno : 0;
    for (size_t i = 0; i < len; i++) {
        int rc = more ? 0 : dir_sync(f, dirs[i]);
        err = err ? err : rc;
        free(dirs[i]);
    }
    return err;
}

static int file_fits(struct volume *v, uint64_t size)
{
    struct file_volume *f = of(v);
    pthread_mutex_lock(&f->mutex);
    int err = 0;
    if (size > f->fits) {
        uint64_t step = 1ull << 30;
        while (step < size && step < 1ull << 62)
            step <<= 1;
        if (ftruncate(f->probe, (off_t)step) == 0)
            f->fits = step;
        else if (size <= INT64_MAX && ftruncate(f->probe, (off_t)size) == 0)
            f->fits = size;
        else
            err = -EFBIG;
        if (ftruncate(f->probe, 0) < 0 && !err)
            err = -errno;
    }
    pthread_mutex_unlock(&f->mutex);
    return err;
}

static uint64_t file_space(struct volume *v)
{
    struct statvfs st;
    if (fstatvfs(of(v)->own, &st) < 0)
        return UINT64_MAX;
    return (uint64_t)st.f_bavail * st.f_frsize;
}

static int file_load(struct volume *v, void **bytes, size_t *len)
{
    int fd = openat(of(v)->own, "meta", O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0)
        return -errno;
    struct stat st;
    int err = fstat(fd, &st) < 0 ? -errno : 0;
    size_t want = err ? 0 : (size_t)st.st_size;
    uint8_t *p = malloc(want + 1);
    if (!p)
        err = -ENOMEM;
    for (size_t have = 0; !err && have < want;) {
        ssize_t n = read(fd, p + have, want - have);
        if (n <= 0)
            err = n < 0 ? -errno : -EIO;
        else
            have += (size_t)n;
    }
    close(fd);
    if (err) {
        free(p);
        return err;
    }
    *bytes = p;
    *len = want;
    return 0;
}

static int write_all(int fd, const void *bytes, size_t len)
{
    for (const uint8_t *p = bytes; len;) {
        ssize_t n = write(fd, p, len);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        p += n;
        len -= (size_t)n;
    }
    return 0;
}

static int file_save(struct volume *v, const void *bytes, size_t len)
{
    struct file_volume *f = of(v);
    int fd = openat(f->own, "meta.new", O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0)
        return -errno;
    int err = write_all(fd, bytes, len);
    store_step("write the table");
    if (!err && fsync(fd) < 0)
        err = -errno;
    store_step("sync the table");
    close(fd);
    if (!err && renameat(f->own, "meta.new", f->own, "meta") < 0)
        err = -errno;
    store_step("replace the table");
    if (!err && fsync(f->own) < 0)
        err = -errno;
    store_step("sync its directory");
    return err;
}

static int zeros_fill(int fd, uint64_t size)
{
    static const uint8_t zeros[1 << 16];
    if (ftruncate(fd, 0) < 0 || lseek(fd, 0, SEEK_SET) < 0)
        return -errno;
    for (uint64_t done = 0; done < size; done += sizeof zeros) {
        int err = write_all(fd, zeros, size - done < sizeof zeros ? (size_t)(size - done) : sizeof zeros);
        if (err)
            return err;
    }
    return fsync(fd) < 0 ? -errno : 0;
}

static int file_journal(struct volume *v, uint64_t size)
{
    struct file_volume *f = of(v);
    int fd = openat(f->own, "journal", O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (fd < 0)
        return -errno;
    struct stat st;
    int err = fstat(fd, &st) < 0 ? -errno : 0;
    if (!err && (uint64_t)st.st_size != size) {
        err = zeros_fill(fd, size);
        if (!err && fsync(f->own) < 0)
            err = -errno;
        store_step("fill the journal");
    }
    if (err) {
        close(fd);
        return err;
    }
    return fd;
}

static const struct volume_ops file_ops = {
    .lasting = true,
    .dir = file_dir,
    .close = file_close,
    .file_open = file_open,
    .file_remove = file_remove,
    .files_sync = files_sync,
    .spill_open = spill_open,
    .spill_remove = spill_remove,
    .each = file_each,
    .vacant = file_vacant,
    .show = file_show,
    .hide = file_hide,
    .adopt = file_adopt,
    .rest = file_rest,
    .names_sync = names_sync,
    .fits = file_fits,
    .space = file_space,
    .load = file_load,
    .save = file_save,
    .journal = file_journal,
};

/* mkdir -p, for the directory the user named; symlinks on the way to it are the user's own. */
static int make_dirs(const char *dir)
{
    char *path = strdup(dir);
    if (!path)
        return -ENOMEM;
    for (char *at = path + 1; (at = strchr(at, '/')); at++) {
        *at = 0;
        mkdir(path, 0777);
        *at = '/';
    }
    int err = mkdir(path, 0777) < 0 && errno != EEXIST ? -errno : 0;
    free(path);
    return err;
}

static int own_dir(int at, const char *name)
{
    if (mkdirat(at, name, 0700) < 0 && errno != EEXIST)
        return -errno;
    int fd = openat(at, name, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    return fd < 0 ? -errno : fd;
}

static int take_lock(struct file_volume *f, char error[STORE_ERROR])
{
    f->lock = openat(f->own, "lock", O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (f->lock < 0)
        return -errno;
    char pid[32];
    if (flock(f->lock, LOCK_EX | LOCK_NB) < 0) {
        if (errno != EWOULDBLOCK)
            return -errno;
        ssize_t n = pread(f->lock, pid, sizeof pid - 1, 0);
        pid[n > 0 ? n : 0] = 0;
        pid[strcspn(pid, "\n")] = 0;
        snprintf(error, STORE_ERROR,
                 "file:%.300s is in use by another agent (pid %s): stop it, or give that agent's address instead of "
                 "the directory",
                 f->dir, *pid ? pid : "unknown");
        return -EBUSY;
    }
    int len = snprintf(pid, sizeof pid, "%d\n", getpid());
    if (ftruncate(f->lock, 0) < 0 || pwrite(f->lock, pid, (size_t)len, 0) != len)
        return -errno;
    return 0;
}

static int open_inside(struct file_volume *f, char error[STORE_ERROR])
{
    int err = make_dirs(f->dir);
    if (err)
        return err;
    f->root = open(f->dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (f->root < 0)
        return -errno;
    if ((f->own = own_dir(f->root, ".memsync")) < 0)
        return f->own;
    if ((err = take_lock(f, error)))
        return err;
    if ((f->files = own_dir(f->own, "data")) < 0)
        return f->files;
    if ((f->spills = own_dir(f->own, "spill")) < 0)
        return f->spills;
    f->probe = openat(f->own, "probe", O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600);
    return f->probe < 0 ? -errno : 0;
}

int volume_file_open(struct volume **out, const char *dir, char error[STORE_ERROR])
{
    struct file_volume *f = malloc(sizeof *f);
    char *copy = strdup(dir);
    if (!f || !copy) {
        free(f);
        free(copy);
        return -ENOMEM;
    }
    *f = (struct file_volume){
        .v.ops = &file_ops, .dir = copy, .root = -1, .own = -1, .files = -1, .spills = -1, .lock = -1, .probe = -1};
    pthread_mutex_init(&f->mutex, NULL);
    signal(SIGXFSZ, SIG_IGN); /* a file beyond the limit is an error to report, not the agent's end */
    *error = 0;
    int err = *dir ? open_inside(f, error) : -ENOENT;
    if (err) {
        if (!*error)
            snprintf(error, STORE_ERROR, "file:%.300s cannot be opened as a store: %s", dir, strerror(-err));
        file_close(&f->v);
        return err;
    }
    *out = &f->v;
    return 0;
}
