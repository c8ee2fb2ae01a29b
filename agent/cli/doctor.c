/* memsync doctor: each check is tried out, says what it found, and, where something can be had that is not there, what
 * to change. */
#include "agent/cli/cli.h"
#include "agent/cli/local.h"
#include "agent/cli/peer.h"
#include "agent/cli/probe.h"
#include "agent/track/kernel.h"

#include <errno.h>
#include <fcntl.h>
#include <jansson.h>
#include <linux/magic.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/utsname.h>
#include <sys/vfs.h>
#include <unistd.h>

#define FILES_WANTED 4096u

enum verdict { GOOD, NOTE, BAD };

struct report {
    bool json, bad;
    json_t *checks;
};

static void say(struct report *r, enum verdict v, const char *advice, const char *check, const char *format, ...)
    __attribute__((format(printf, 5, 6)));

static void say(struct report *r, enum verdict v, const char *advice, const char *check, const char *format, ...)
{
    static const char *const words[] = {"good", "note", "bad"};
    char detail[2048];
    va_list ap;
    va_start(ap, format);
    vsnprintf(detail, sizeof detail, format, ap);
    va_end(ap);
    r->bad = r->bad || v == BAD;
    if (r->json)
        json_array_append_new(r->checks, json_pack("{s:s, s:s, s:s, s:s}", "check", check, "verdict", words[v], "found",
                                                   detail, "advice", advice ? advice : ""));
    else
        printf("%-4s  %-22s %s%s%s\n", words[v], check, detail, advice ? "\n      -> " : "", advice ? advice : "");
}

static void check_kernel(struct report *r)
{
    struct utsname u;
    if (uname(&u))
        return;
    int major = 0, minor = 0;
    bool known = sscanf(u.release, "%d.%d", &major, &minor) == 2;
    bool young = known && (major > 6 || (major == 6 && minor >= 7));
    say(r, young ? GOOD : NOTE,
        young ? NULL : "page-table tracking by userfaultfd needs Linux 6.7 or later; see strategy auto below", "kernel",
        "%s %s", u.sysname, u.release);
}

static void check_userfaultfd(struct report *r)
{
    static const char *const names[PROBE_WAYS] = {"/dev/userfaultfd", "userfaultfd(0)", "userfaultfd(user mode)"};
    bool any = false;
    for (int way = 0; way < PROBE_WAYS; way++) {
        int fd = probe_uffd((enum probe_way)way);
        if (fd >= 0) {
            say(r, GOOD, NULL, names[way], "works");
            any = true;
            close(fd);
        } else {
            say(r, NOTE, NULL, names[way], "%s", strerror(-fd));
        }
    }
    int fd = open("/proc/sys/vm/unprivileged_userfaultfd", O_RDONLY | O_CLOEXEC);
    char value[8] = "?";
    if (fd >= 0 && read(fd, value, 1) == 1)
        value[1] = 0;
    if (fd >= 0)
        close(fd);
    say(r, GOOD, NULL, "sysctl", "vm.unprivileged_userfaultfd=%s (either value will do: user mode is enough)", value);
    if (!any)
        say(r, BAD,
            "in a container, allow the userfaultfd system call in its seccomp profile, or give it /dev/userfaultfd; "
            "else files are compared by hash",
            "userfaultfd", "no way of opening one works");
}

static void check_features(struct report *r)
{
    unsigned long long features = probe_features();
    bool async = features & KERNEL_UFFD_WP_ASYNC, unpopulated = features & KERNEL_UFFD_WP_UNPOPULATED;
    say(r, async && unpopulated ? GOOD : NOTE, NULL, "userfaultfd features", "WP_ASYNC %s, WP_UNPOPULATED %s",
        async ? "yes" : "no", unpopulated ? "yes" : "no");
}

static void check_pull(struct report *r)
{
    char why[512];
    bool poison = probe_features() & KERNEL_UFFD_POISON;
    if (probe_filling(why, sizeof why)) {
        say(r, NOTE, "pulled regions are fetched whole before they open", "pull", "%s", why);
        return;
    }
    say(r, poison ? GOOD : NOTE,
        poison
            ? NULL
            : "on Linux before 6.6 a page that cannot be fetched any more keeps its threads waiting instead of raising "
              "SIGBUS",
        "pull", "a missing page of shared memory was waited for and filled; POISON %s", poison ? "yes" : "no");
}

static const char *file_system(const char *dir)
{
    static const struct {
        unsigned long magic;
        const char *name;
    } known[] = {{EXT4_SUPER_MAGIC, "ext4"},
                 {TMPFS_MAGIC, "tmpfs"},
                 {XFS_SUPER_MAGIC, "xfs"},
                 {BTRFS_SUPER_MAGIC, "btrfs"},
                 {OVERLAYFS_SUPER_MAGIC, "overlay"},
                 {NFS_SUPER_MAGIC, "nfs"},
                 {0x65735546, "fuse"},
                 {0x2fc12fc1, "zfs"}};
    static char other[32];
    struct statfs s;
    if (statfs(dir, &s))
        return "?";
    for (size_t i = 0; i < sizeof known / sizeof *known; i++)
        if (known[i].magic == (unsigned long)s.f_type)
            return known[i].name;
    snprintf(other, sizeof other, "file system %#lx", (unsigned long)s.f_type);
    return other;
}

static bool check_directory(struct report *r, const char *dir)
{
    char why[512];
    int rc = probe_tracking(dir, why, sizeof why);
    if (rc)
        say(r, BAD,
            rc == -EACCES || rc == -ENOENT || rc == -EROFS ? "name a directory that you can write to"
                                                           : "see strategy auto below",
            "tracking", "%s (%s): %s", dir, file_system(dir), why);
    else
        say(r, GOOD, NULL, "tracking", "%s (%s): armed, stored to, scanned: exactly the page stored to was found", dir,
            file_system(dir));
    return !rc;
}

static void check_strategies(struct report *r, bool uffd)
{
    bool soft = probe_softdirty();
    say(r, uffd ? GOOD : soft ? NOTE : BAD, NULL, "strategy auto", "%s",
        uffd   ? "uses uffd: page tables say which pages were stored to"
        : soft ? "uses softdirty: page tables say which pages were stored to; clearing their bits takes the whole process"
               : "uses hash: all of a file is read at each sync point");
    say(r, GOOD, NULL, "strategy hash", "works everywhere");
    say(r, GOOD, NULL, "strategy inotify", "works where the file's writers are on this host");
    say(r, soft ? GOOD : NOTE, NULL, "strategy softdirty", "%s",
        soft ? "tried out: works" : "tried out: this kernel has no soft-dirty bits");
    say(r, NOTE, NULL, "other strategies", "fuse, nbd, ublk, cuse, kmod: not built");
}

static void check_limits(struct report *r)
{
    struct rlimit l;
    if (getrlimit(RLIMIT_NOFILE, &l))
        return;
    bool few = l.rlim_cur < FILES_WANTED && l.rlim_max < FILES_WANTED;
    say(r, few ? NOTE : GOOD, few ? "raise it (ulimit -n, LimitNOFILE=) when many files are tracked at once" : NULL,
        "open files", "%llu, at most %llu", (unsigned long long)l.rlim_cur, (unsigned long long)l.rlim_max);
}

static void check_parts(struct report *r)
{
    static const char *const parts[] = {"libmemsync_preload.so", "memsync-agent"};
    char path[4096];
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        if (cli_part(parts[i], path, sizeof path))
            say(r, BAD, "build it with make, or install it with make install", parts[i],
                "neither beside this program nor under " MEMSYNC_PREFIX);
        else
            say(r, GOOD, NULL, parts[i], "%s", path);
}

static void check_agent(struct report *r)
{
    struct local_agent l;
    int rc = local_connect(&l);
    if (!rc)
        say(r, GOOD, NULL, "local agent", "process %u on %s", l.pid, l.socket);
    else if (rc == -ENOENT)
        say(r, GOOD, NULL, "local agent", "none on %s; the first program that needs one starts it", l.socket);
    else
        say(r, BAD, "see the line above; MEMSYNC_AGENT says where its socket is", "local agent", "%s: %s", l.socket,
            strerror(-rc));
    local_close(&l);
}

static void check_remote(struct report *r, const char *remote)
{
    if (!remote) {
        say(r, NOTE, NULL, "remote", "none asked for (--remote ADDRESS or MEMSYNC_REMOTE)");
        return;
    }
    struct peer *p = peer_open(remote, false);
    if (p)
        say(r, GOOD, NULL, "remote", "%s answers (%s), same protocol version", remote, p->host);
    else
        say(r, BAD, "see the line above", "remote", "%s cannot be used", remote);
    peer_close(p);
}

int command_doctor(const struct args *a)
{
    struct report r = {.json = a->json, .checks = json_array()};
    bool uffd = true;
    check_kernel(&r);
    check_userfaultfd(&r);
    check_features(&r);
    check_pull(&r);
    for (int i = 0; i < a->count; i++)
        uffd = check_directory(&r, a->words[i]) && uffd;
    if (!a->count)
        uffd = check_directory(&r, ".");
    check_strategies(&r, uffd);
    check_limits(&r);
    check_parts(&r);
    check_agent(&r);
    check_remote(&r, a->remote);
    if (a->json) {
        json_dumpf(r.checks, stdout, JSON_INDENT(2));
        putchar('\n');
    }
    json_decref(r.checks);
    return r.bad ? CLI_NOT_SO : CLI_DONE;
}
