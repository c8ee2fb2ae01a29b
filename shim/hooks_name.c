/* rename and unlink of tracked names: told to the agent before and after the call, then a sync point. Only regular
 * files; a directory that moves with tracked files in it changes no region's name. */
#include "shim/real.h"
#include "shim/view.h"

#include <string.h>

/* Two paths, their names and the messages: too much for a small stack. */
struct scratch {
    struct control_name m;
    uint8_t message[CONTROL_MAX];
    char parent[CONTROL_PATH];
};

static const char *base_of(const char *path)
{
    const char *slash = strrchr(path, '/');
    const char *base = slash ? slash + 1 : path;
    return !*base || !strcmp(base, ".") || !strcmp(base, "..") ? NULL : base;
}

static bool may_match(const char *path)
{
    const char *base = raw_path(path) ? base_of(path) : NULL;
    return base && rules_may_match(&shim.rules, base);
}

/* The absolute path with the parent's symlinks resolved; the last component is not followed. */
static bool absolute(int dir, const char *path, char to[CONTROL_PATH], char parent[CONTROL_PATH])
{
    const char *base = raw_path(path) ? base_of(path) : NULL;
    size_t n = base ? (size_t)(base - path) : CONTROL_PATH;
    if (n >= CONTROL_PATH)
        return false;
    memcpy(parent, path, n);
    strcpy(parent + n, n ? "" : ".");
    int fd = raw_openat(dir, parent, O_PATH | O_DIRECTORY | O_CLOEXEC, 0);
    if (fd < 0)
        return false;
    char link[32];
    say_format(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t len = raw_readlink(AT_FDCWD, link, to, CONTROL_PATH - 1);
    raw_close(fd);
    if (len <= 0 || to[0] != '/' || (size_t)len + strlen(base) + 2 > CONTROL_PATH)
        return false;
    to[len] = 0;
    if (len > 1)
        to[len++] = '/';
    strcpy(to + len, base);
    return true;
}

/* The name under the rules, "" when none matches. */
static const struct rule *named(const char *path, char name[NAME_CAP])
{
    char error[RULES_ERROR];
    const struct rule *rule = rules_match(&shim.rules, path);
    name[0] = 0;
    if (!rule || rule->mode != RULE_PUSH || rules_name(rule, path, shim.host, name, error)) {
        name[0] = 0;
        return NULL;
    }
    return rule;
}

static bool tell(struct scratch *s, enum control_name_phase phase)
{
    s->m.phase = (uint8_t)phase;
    struct held h = shim_lock();
    bool up = client_up();
    if (up) {
        size_t n = control_name_put(s->message, sizeof s->message, &s->m);
        up = n && !client_send(s->message, n, NULL, 0);
    }
    if (phase == CONTROL_NAME_DONE && s->m.kind != CONTROL_NAME_UNLINK)
        files_renamed(s->m.dev, &s->m.source, s->m.new_path, s->m.new_name);
    shim_unlock(&h);
    return up;
}

static bool regular(int dir, const char *path, struct control_name *m)
{
    struct statx st;
    if (raw_statx(dir, path, AT_SYMLINK_NOFOLLOW, STATX_BASIC_STATS | STATX_BTIME, &st) || !S_ISREG(st.stx_mode))
        return false;
    files_source(&st, &m->dev, &m->source);
    return true;
}

static struct scratch *prepare(int dir, const char *path, enum control_name_kind kind)
{
    static uint32_t number;
    struct scratch *s = raw_memory(sizeof *s);
    if (!s)
        return NULL;
    s->m.kind = (uint8_t)kind;
    s->m.number = __atomic_add_fetch(&number, 1, __ATOMIC_RELAXED);
    if (regular(dir, path, &s->m) && absolute(dir, path, s->m.old_path, s->parent))
        return s;
    raw_munmap(s, sizeof *s);
    return NULL;
}

/* After BEGUN was told and the call made. */
static int finish(struct scratch *s, int rc)
{
    int saved = errno;
    tell(s, rc ? CONTROL_NAME_FAILED : CONTROL_NAME_DONE);
    raw_munmap(s, sizeof *s);
    if (!rc)
        sync_now(0);
    errno = saved;
    return rc;
}

static int move(int olddir, const char *old, int newdir, const char *new, unsigned flags)
{
    struct scratch *s = NULL;
    if (view_denied(olddir, old) || view_denied(newdir, new))
        return -1;
    int saved = errno;
    if (shim_active() && (may_match(old) || may_match(new)) && shim_mine())
        s = prepare(olddir, old, flags & RENAME_EXCHANGE ? CONTROL_NAME_EXCHANGE : CONTROL_NAME_RENAME);
    if (s) {
        const struct rule *from = named(s->m.old_path, s->m.old_name), *to = NULL;
        if (absolute(newdir, new, s->m.new_path, s->parent))
            to = named(s->m.new_path, s->m.new_name);
        if (to || from)
            s->m.terms = (to ? to : from)->terms;
        if ((!to && !from) || !tell(s, CONTROL_NAME_BEGUN)) {
            raw_munmap(s, sizeof *s);
            s = NULL;
        }
    }
    errno = saved;
    int rc = (int)syscall(SYS_renameat2, olddir, old, newdir, new, flags);
    return s ? finish(s, rc) : rc;
}

SHIM_EXPORT int rename(const char *old, const char *new)
{
    return move(AT_FDCWD, old, AT_FDCWD, new, 0);
}

SHIM_EXPORT int renameat(int olddir, const char *old, int newdir, const char *new)
{
    return move(olddir, old, newdir, new, 0);
}

SHIM_EXPORT int renameat2(int olddir, const char *old, int newdir, const char *new, unsigned flags)
{
    return move(olddir, old, newdir, new, flags);
}

static int removed(int dir, const char *path, int flags)
{
    struct scratch *s = NULL;
    int viewed = flags & AT_REMOVEDIR ? VIEW_NOT_OURS : view_unlink(dir, path);
    if (viewed != VIEW_NOT_OURS)
        return viewed;
    int saved = errno;
    if (shim_active() && !(flags & AT_REMOVEDIR) && may_match(path) && shim_mine())
        s = prepare(dir, path, CONTROL_NAME_UNLINK);
    if (s) {
        const struct rule *rule = named(s->m.old_path, s->m.old_name);
        if (rule)
            s->m.terms = rule->terms;
        if (!rule || !tell(s, CONTROL_NAME_BEGUN)) {
            raw_munmap(s, sizeof *s);
            s = NULL;
        }
    }
    errno = saved;
    int rc = (int)syscall(SYS_unlinkat, dir, path, flags);
    return s ? finish(s, rc) : rc;
}

SHIM_EXPORT int unlink(const char *path)
{
    return removed(AT_FDCWD, path, 0);
}

SHIM_EXPORT int unlinkat(int dir, const char *path, int flags)
{
    return removed(dir, path, flags);
}

SHIM_EXPORT int remove(const char *path)
{
    int rc = removed(AT_FDCWD, path, 0);
    if (rc && errno == EISDIR)
        rc = (int)syscall(SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR);
    return rc;
}

bool names_matched(const char *path)
{
    if (!may_match(path))
        return false;
    struct scratch *s = raw_memory(sizeof *s);
    if (!s)
        return false;
    bool matched = absolute(AT_FDCWD, path, s->m.old_path, s->parent) && named(s->m.old_path, s->m.old_name);
    raw_munmap(s, sizeof *s);
    return matched;
}
