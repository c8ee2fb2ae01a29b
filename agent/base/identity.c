#include "agent/base/identity.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#define PATH_CAP 4096

static int make_dirs(const char *dir)
{
    char path[PATH_CAP];
    int n = snprintf(path, sizeof path, "%s", dir);
    if (n < 0 || (size_t)n >= sizeof path)
        return -ENAMETOOLONG;
    for (char *p = path + 1; *p; p++) {
        if (*p != '/')
            continue;
        *p = 0;
        if (mkdir(path, 0700) < 0 && errno != EEXIST)
            return -errno;
        *p = '/';
    }
    return mkdir(path, 0700) < 0 && errno != EEXIST ? -errno : 0;
}

/* In a directory that somebody else owns (think of /tmp), an identity could be theirs. */
static int check_owner(const char *dir)
{
    struct stat st;
    if (stat(dir, &st) < 0)
        return -errno;
    if (!S_ISDIR(st.st_mode))
        return -ENOTDIR;
    return st.st_uid == geteuid() || !geteuid() ? 0 : -EPERM;
}

/* 0, -ENOENT, -EBADMSG (not a UUID), or another negative errno. */
static int identity_read(const char *path, struct id *id)
{
    char text[ID_TEXT + 1] = "";
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    ssize_t n = read(fd, text, sizeof text - 1);
    int rc = n < 0 ? -errno : 0;
    close(fd);
    text[strcspn(text, "\n")] = 0;
    return rc ? rc : id_parse(id, text) && !id_none(id) ? 0 : -EBADMSG;
}

/* Written whole beside, then linked: whoever links first has made it, and nobody sees half of one. */
static int identity_make(const char *dir, const char *path)
{
    char temp[PATH_CAP + 32], text[ID_TEXT + 1];
    struct id id;
    id_new(&id);
    id_text(&id, text);
    text[ID_TEXT - 1] = '\n';
    snprintf(temp, sizeof temp, "%s/identity.XXXXXX", dir);
    int fd = mkostemp(temp, O_CLOEXEC);
    if (fd < 0)
        return -errno;
    ssize_t n = write(fd, text, ID_TEXT);
    int rc = n < 0 ? -errno : n != ID_TEXT ? -ENOSPC : fsync(fd) < 0 ? -errno : 0;
    close(fd);
    if (!rc && link(temp, path) < 0 && errno != EEXIST)
        rc = -errno;
    unlink(temp);
    return rc;
}

int identity_load(const char *state_dir, struct id *id, char error[512])
{
    char path[PATH_CAP + 16];
    int rc = make_dirs(state_dir);
    if (!rc)
        rc = check_owner(state_dir);
    if (rc < 0) {
        snprintf(error, 512, "the state directory %.300s cannot be used: %s; give another by --state", state_dir,
                 strerror(-rc));
        return rc;
    }
    snprintf(path, sizeof path, "%s/identity", state_dir);
    rc = identity_read(path, id);
    if (rc == -ENOENT && !(rc = identity_make(state_dir, path)))
        rc = identity_read(path, id);
    if (rc == -EBADMSG)
        snprintf(error, 512, "%.300s does not hold a UUID; remove it, and a new identity is made", path);
    else if (rc < 0)
        snprintf(error, 512, "the identity in %.300s cannot be read or made: %s", path, strerror(-rc));
    return rc;
}

int identity_default_dir(char *to, size_t cap)
{
    const char *state = getenv("XDG_STATE_HOME"), *home = getenv("HOME");
    int n;
    if (state && *state == '/')
        n = snprintf(to, cap, "%s/memsync", state);
    else if (home && *home == '/')
        n = snprintf(to, cap, "%s/.local/state/memsync", home);
    else if (!geteuid())
        n = snprintf(to, cap, "/var/lib/memsync");
    else
        n = snprintf(to, cap, "/tmp/memsync-%u-state", (unsigned)geteuid());
    return n < 0 || (size_t)n >= cap ? -ENAMETOOLONG : 0;
}
