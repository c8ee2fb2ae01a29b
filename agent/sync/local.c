/* The local role's frame: its socket, its clock, and how it leaves. */
#include "agent/sync/local.h"
#include "agent/sync/model.h"
#include "agent/base/identity.h"
#include "agent/nbd/device.h"
#include "agent/net/server.h"
#include "agent/page/page.h"
#include "agent/store/store.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#define TICK_MS 50u
#define GATHER_MS 2u
#define LINGER_MS 3000u
#define DRAIN_MS 10000u
#define BLOCKS_MOST (256u << 20)
#define LOCK_WAIT_NS 4000000000ULL /* less than a program waits for an agent that it started */

static void accept_one(uv_poll_t *poll, int status, int events)
{
    struct local *l = poll->data;
    (void)events;
    int fd = status < 0 ? -1 : accept4(l->listen_fd, NULL, NULL, SOCK_CLOEXEC | SOCK_NONBLOCK);
    struct ucred cred;
    socklen_t len = sizeof cred;
    if (fd < 0)
        return;
    struct program *p = NULL;
    if (!getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &len) && (cred.uid == getuid() || cred.uid == 0))
        p = calloc(1, sizeof *p);
    if (!p || l->stopping) {
        close(fd);
        free(p);
        return;
    }
    *p = (struct program){.next = l->programs,
                          .local = l,
                          .fd = fd,
                          .pagemap = -1,
                          .uffd = -1,
                          .holds = 1,
                          .polling = true,
                          .pid = (uint32_t)cred.pid};
    l->programs = p;
    uv_poll_init(l->loop, &p->poll, fd);
    p->poll.data = p;
    uv_poll_start(&p->poll, UV_READABLE | UV_DISCONNECT, program_readable);
}

static bool all_acknowledged(const struct local *l)
{
    for (const struct link *k = l->links; k; k = k->next)
        for (const struct group *g = k->groups; g; g = g->next) {
            if (g->capture || g->queue || g->waiters || g->ops || g->degraded)
                return false;
            for (const struct region *r = g->regions; r; r = r->next_group)
                if (r->attach == ATTACH_ASKED || r->attach == ATTACH_HASHING ||
                    (r->body && r->body->mount && body_held(r->body)) ||
                    (r->body && !r->body->killed && r->body->dirty.count && region_takes_part(r)))
                    return false;
        }
    return true;
}

/* Leaving, in order: everything acknowledged (or DRAIN_MS over), links closed, own servers and stores closed, programs
 * let go, our handles closed. */
static void local_free(struct local *l)
{
    void (*done)(void *) = l->stopped;
    void *arg = l->stopped_arg;
    while (l->links) {
        struct link *k = l->links;
        l->links = k->next;
        page_link_free(k);
        while (k->groups) {
            struct group *g = k->groups;
            k->groups = g->next;
            group_free(g);
        }
        while (k->regions) {
            struct region *r = k->regions;
            k->regions = r->next;
            body_drop(r->body);
            free(r->name);
            free(r->path);
            free(r);
        }
        free(k->address);
        free(k);
    }
    records_close(&l->records);
    free(l->socket_path);
    free(l->state_dir);
    free(l);
    done(arg);
}

static void handle_closed(uv_handle_t *h)
{
    struct local *l = h->data;
    if (!--l->handles_open)
        local_free(l);
}

static void store_closed(void *arg)
{
    struct link *k = arg;
    k->store = NULL;
}

static void server_stopped(void *arg)
{
    struct link *k = arg;
    k->server = NULL;
    store_close(k->store, store_closed, k);
}

static bool links_closed(struct local *l)
{
    bool closed = true;
    for (struct link *k = l->links; k; k = k->next) {
        if (k->conn && !k->stopping)
            link_stop(k);
        else if (!k->conn && k->server && !k->stopping_server) {
            k->stopping_server = true;
            server_stop(k->server, server_stopped, k);
        }
        k->stopping = true;
        closed &= !k->conn && !k->server && !k->store && !k->reconciles;
        for (struct group *g = k->groups; g; g = g->next)
            closed &= !g->capture;
    }
    return closed;
}

static void stop_step(struct local *l, uint64_t now)
{
    if (l->phase == 0 && (all_acknowledged(l) || now >= l->stop_by)) {
        l->phase = 1;
        l->behind = !all_acknowledged(l);
    }
    if (l->phase == 1 && links_closed(l) && !l->devices) {
        l->phase = 2;
        for (struct program *p = l->programs, *next; p; p = next) {
            next = p->next;
            if (p->tool)
                program_send_text(
                    p, CONTROL_RESULT, l->behind ? -EAGAIN : 0,
                    "it leaves with changes that a remote has not acknowledged; they stay in the files, and are "
                    "compared and sent when a program opens those again; those of mirrors stay only as long as a "
                    "program has them open");
            program_gone(p);
        }
    }
    if (l->phase == 2 && !l->programs) {
        l->phase = 3;
        uv_close((uv_handle_t *)&l->listener, handle_closed);
        uv_close((uv_handle_t *)&l->tick, handle_closed);
        uv_close((uv_handle_t *)&l->gather, handle_closed);
    }
}

static void gather_over(uv_timer_t *t)
{
    struct local *l = t->data;
    for (struct link *k = l->links; k; k = k->next)
        for (struct group *g = k->groups; g; g = g->next) {
            g->gathered = true;
            group_pump(g);
        }
}

void local_gather(struct local *l)
{
    if (!uv_is_active((uv_handle_t *)&l->gather))
        uv_timer_start(&l->gather, gather_over, GATHER_MS, 0);
}

static void tick(uv_timer_t *t)
{
    struct local *l = t->data;
    uint64_t now = uv_now(l->loop);
    for (struct program *p = l->programs; p; p = p->next)
        if (p->shared)
            __atomic_fetch_add(&p->shared->beats, 1, __ATOMIC_RELAXED);
    for (struct link *k = l->links; k; k = k->next) {
        link_tick(k, now);
        page_tick(k, now);
        for (struct group **at = &k->groups; *at;) {
            struct group *g = *at;
            group_tick(g, now);
            if (!g->merged) {
                at = &g->next;
                continue;
            }
            *at = g->next;
            group_free(g);
        }
    }
    if (l->stopping) {
        stop_step(l, now);
        return;
    }
    devices_tick(l->devices, now);
    if (l->linger && !l->stopping && !l->programs && !devices_any(l->devices) && all_acknowledged(l) &&
        now - l->idle_since > LINGER_MS) {
        l->linger = false;
        agent_leave();
    }
}

static int make_directory(const char *socket_path, char error[512])
{
    char dir[200];
    struct stat st;
    snprintf(dir, sizeof dir, "%s", socket_path);
    char *slash = strrchr(dir, '/');
    if (!slash || slash == dir)
        return 0;
    *slash = 0;
    if (!mkdir(dir, 0700) || errno != EEXIST || stat(dir, &st) < 0)
        return 0;
    if (st.st_uid != getuid() && st.st_uid != 0) {
        snprintf(error, 512,
                 "%s belongs to uid %u, not to us: set MEMSYNC_AGENT to a socket in a directory of your own", dir,
                 (unsigned)st.st_uid);
        return -EACCES;
    }
    return 0;
}

static bool served(const struct sockaddr_un *a)
{
    int fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    bool yes = fd >= 0 && (!connect(fd, (const struct sockaddr *)a, sizeof *a) || errno == EAGAIN);
    close(fd);
    return yes;
}

/* An agent that was killed hangs up on its programs before the kernel has let go of its lock: who follows it waits for
 * that, and only gives way to one that answers. */
static int lock_socket(struct local *l, const char *lock, const struct sockaddr_un *a)
{
    uint64_t until = uv_hrtime() + LOCK_WAIT_NS;
    l->lock_fd = open(lock, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (l->lock_fd < 0)
        return -errno;
    while (flock(l->lock_fd, LOCK_EX | LOCK_NB) < 0) {
        if (errno != EWOULDBLOCK)
            return -errno;
        if (served(a) || uv_hrtime() > until)
            return -EADDRINUSE;
        usleep(5000);
    }
    return 0;
}

static int listen_on(struct local *l, const char *path, char error[512])
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    char lock[220];
    if (strlen(path) >= sizeof a.sun_path) {
        snprintf(error, 512, "%s: a socket's path has at most %zu bytes; set MEMSYNC_AGENT to a shorter one", path,
                 sizeof a.sun_path - 1);
        return -ENAMETOOLONG;
    }
    int rc = make_directory(path, error);
    if (rc)
        return rc;
    snprintf(a.sun_path, sizeof a.sun_path, "%.107s", path);
    snprintf(lock, sizeof lock, "%s.lock", path);
    rc = lock_socket(l, lock, &a);
    if (rc) {
        snprintf(error, 512, "%s: %s", path, rc == -EADDRINUSE ? "another agent serves it" : strerror(-rc));
        return rc;
    }
    unlink(path);
    l->listen_fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    mode_t old = umask(0177);
    rc = l->listen_fd < 0 || bind(l->listen_fd, (struct sockaddr *)&a, sizeof a) < 0 || listen(l->listen_fd, 128) < 0
             ? -errno
             : 0;
    umask(old);
    if (rc)
        snprintf(error, 512, "%s cannot be listened on: %s", path, strerror(-rc));
    return rc;
}

/* A table of block hashes is a thirty-second of what it describes, and more than fits into memory is not changed
 * between two sync points often. Beyond 256 MiB, which stand for 8 GiB of changed pages, whole pages are the better
 * bargain. */
static void limit_blocks(void)
{
    long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
    uint64_t share = pages > 0 && size > 0 ? (uint64_t)pages * (uint64_t)size / 32 : BLOCKS_MOST;
    hashes_blocks_most = share < BLOCKS_MOST ? share : BLOCKS_MOST;
}

int local_start(struct local **out, uv_loop_t *loop, const char *socket_path, bool linger, const char *state_dir,
                char error[512])
{
    struct local *l = calloc(1, sizeof *l);
    if (!l)
        return -ENOMEM;
    l->loop = loop;
    l->linger = linger;
    limit_blocks();
    l->listen_fd = l->lock_fd = -1;
    l->socket_path = strdup(socket_path);
    l->state_dir = strdup(state_dir);
    gethostname(l->host, sizeof l->host - 1);
    error[0] = 0;
    int rc = listen_on(l, socket_path, error);
    if (!rc)
        rc = identity_load(state_dir, &l->identity, error);
    if (!rc)
        rc = records_open(&l->records, state_dir, error);
    if (!rc && !(l->devices = devices_new(loop, &l->identity, l->host)))
        rc = -ENOMEM;
    if (rc) {
        if (l->listen_fd >= 0) {
            unlink(socket_path);
            close(l->listen_fd);
        }
        if (l->lock_fd >= 0)
            close(l->lock_fd);
        free(l->socket_path);
        free(l->state_dir);
        free(l);
        return rc;
    }
    l->idle_since = uv_now(loop);
    uv_poll_init(loop, &l->listener, l->listen_fd);
    l->listener.data = l;
    uv_poll_start(&l->listener, UV_READABLE, accept_one);
    uv_timer_init(loop, &l->tick);
    l->tick.data = l;
    uv_timer_start(&l->tick, tick, TICK_MS, TICK_MS);
    uv_timer_init(loop, &l->gather);
    l->gather.data = l;
    l->handles_open = 3;
    *out = l;
    return 0;
}

static void devices_stopped(void *arg)
{
    struct local *l = arg;
    l->devices = NULL;
}

void local_store(struct local *l, struct store *store)
{
    devices_store(l->devices, store);
}

void local_stop(struct local *l, void (*done)(void *arg), void *arg)
{
    l->stopped = done;
    l->stopped_arg = arg;
    l->stopping = true;
    /* Whoever comes now finds no agent and starts the next one, beside which we finish. */
    unlink(l->socket_path);
    uv_poll_stop(&l->listener);
    close(l->listen_fd);
    close(l->lock_fd);
    l->stop_by = uv_now(l->loop) + DRAIN_MS;
    devices_stop(l->devices, devices_stopped, l);
    for (struct link *k = l->links; k; k = k->next)
        for (struct group *g = k->groups, *next; g; g = next) {
            next = g->next;
            bool live = false;
            for (struct region *r = g->regions; r; r = r->next_group)
                live |= r->body && r->body->uses;
            g->wanted |= live;
            group_kick(g);
        }
}
