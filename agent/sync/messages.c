/* The control socket (wire/control.h): receiving, and what programs say over it, one function a message. The tool's
 * messages are in tool.c, those about views in agent/page/.
 *
 * A message out of form ends the connection, which counts as the end of the program (program.c). */
#include "agent/sync/local.h"
#include "agent/sync/capture.h"
#include "agent/base/log.h"
#include "agent/track/softdirty.h"
#include "agent/page/page.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define MESSAGES_A_TURN 64

struct message {
    uint8_t *data;
    size_t len;
    int fds[CONTROL_FDS];
    size_t nfds;
};

static int take_fd(struct message *m, size_t i)
{
    if (i >= m->nfds)
        return -1;
    int fd = m->fds[i];
    m->fds[i] = -1;
    return fd;
}

static void *map_shared(int fd, size_t len)
{
    struct stat st;
    if (fd < 0 || fstat(fd, &st) < 0 || (size_t)st.st_size < len)
        return NULL;
    void *at = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    return at == MAP_FAILED ? NULL : at;
}

static int on_hello(struct program *p, struct message *m)
{
    static struct control_hello h;
    static uint8_t out[64];
    if (p->greeted || control_hello_get(m->data, m->len, &h))
        return -EPROTO;
    if (h.version != CONTROL_VERSION) {
        char text[200];
        snprintf(text, sizeof text,
                 "the agent speaks version %u of the control protocol, this program's library %u: `memsync stop` and "
                 "start again",
                 CONTROL_VERSION, h.version);
        program_send_text(p, CONTROL_REFUSED, 0, text);
        return -EPROTO;
    }
    p->greeted = true;
    p->tool = h.tool;
    p->pid = h.pid;
    p->loss = h.loss;
    p->timeout_ms = h.timeout_ms;
    snprintf(p->name, sizeof p->name, "%s", h.program);
    size_t next = 1;
    if (!p->tool) {
        int fd = take_fd(m, 0);
        p->shared = map_shared(fd, sizeof *p->shared);
        if (fd >= 0)
            close(fd);
        if (!p->shared || p->shared->version != SHARED_VERSION)
            return -EPROTO;
        if (h.fds & CONTROL_FD_PAGEMAP)
            p->pagemap = take_fd(m, next++);
        if (h.fds & CONTROL_FD_UFFD)
            p->uffd = take_fd(m, next);
        p->link = link_find(p->local, h.remote);
        if (!p->link)
            return -ENOMEM;
        if (p->link->broken) {
            char text[1700];
            snprintf(text, sizeof text, "MEMSYNC_REMOTE=%s: %s", h.remote, p->link->reason);
            program_send_text(p, CONTROL_REFUSED, 0, text);
            return 0;
        }
    }
    struct control_welcome w = {CONTROL_VERSION, (uint32_t)getpid()};
    size_t n = control_welcome_put(out, sizeof out, &w);
    return send(p->fd, out, n, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 ? -errno : 0;
}

static struct use *use_of(struct program *p, uint32_t number)
{
    for (struct use *u = p->uses; u; u = u->next_program)
        if (u->number == number)
            return u;
    return NULL;
}

int own_open(int fd, const char *path)
{
    char self[64];
    int own = -1;
    if (fd >= 0) {
        snprintf(self, sizeof self, "/proc/self/fd/%d", fd);
        own = open(self, O_RDONLY | O_CLOEXEC | O_NOATIME);
        if (own < 0)
            own = open(self, O_RDONLY | O_CLOEXEC);
    }
    if (own < 0)
        own = open(path, O_RDONLY | O_CLOEXEC);
    return own < 0 ? -errno : own;
}

static bool changed_since(const struct body *b)
{
    struct stat st;
    if (fstat(b->fd, &st) < 0)
        return true;
    int64_t mtime = (int64_t)st.st_mtim.tv_sec * 1000000000 + st.st_mtim.tv_nsec,
            ctime = (int64_t)st.st_ctim.tv_sec * 1000000000 + st.st_ctim.tv_nsec;
    return mtime != b->stat_mtime || ctime != b->stat_ctime || (uint64_t)st.st_size != b->size ||
           b->stat_seen - ctime < 50000000;
}

static struct body *body_for(struct program *p, struct region *r, const struct control_region *m, int passed)
{
    struct mount *t = passed >= 0 ? page_mount_of(p->link, passed) : NULL;
    if (t || (r->body && r->body->mount && region_takes_part(r))) {
        int rc = mirror_body(p, r, m, passed, t);
        p->refused = rc ? m->region : p->refused;
        p->refusal = rc ? rc : p->refusal;
        return rc ? NULL : r->body;
    }
    if (r->body && r->body->dev == m->dev && source_same(&r->body->source, &m->source)) {
        if (!m->fresh || (!r->body->uses && changed_since(r->body)))
            r->body->unknown = true;
        return r->body;
    }
    int fd = own_open(passed, m->path);
    struct stat st;
    if (fd < 0) {
        program_notice(p, "%s: cannot be read by the agent (%s): not replicated; allow uid %u to read it", m->path,
                       strerror(-fd), (unsigned)getuid());
        return NULL;
    }
    if (fstat(fd, &st) < 0 || st.st_ino != m->source.ino) {
        close(fd);
        log_info("%s: another file now", m->path);
        return NULL;
    }
    struct body *b = body_new(fd, m->dev, m->source);
    if (!b) {
        close(fd);
        return NULL;
    }
    region_give_body(r, b);
    body_drop(b);
    return r->body;
}

/* Events of the use's file, or hashing where they cannot be had. */
static void watch_for(struct use *u)
{
    struct body *b = u->body;
    struct program *p = u->program;
    int rc = b->watch ? 0 : watch_open(b->fd, &b->watch);
    if (!rc)
        return;
    u->hashed = CONTROL_HASHED_ALL;
    if (p->unwatched)
        return;
    p->unwatched = true;
    program_notice(p, "%s: strategy inotify is asked for but not possible here: %s; found by hashing", b->region->path,
                   rc == -ENOSPC   ? "no watch is left (raise fs.inotify.max_user_watches)"
                   : rc == -EMFILE ? "no instance is left (raise fs.inotify.max_user_instances)"
                                   : strerror(-rc));
}

static int on_region(struct program *p, struct message *msg)
{
    static struct control_region m;
    if (control_region_get(msg->data, msg->len, &m) || use_of(p, m.region))
        return -EPROTO;
    struct id lineage;
    uint64_t epoch;
    const char *fault = name_fault(m.name);
    if (fault) {
        program_notice(p, "%s: its region name \"%s\" %s: not replicated", m.path, m.name, fault);
        return 0;
    }
    struct region *r = region_get(p->link, m.name, m.path);
    if (!r)
        return -ENOMEM;
    struct body *before = r->body, *b = body_for(p, r, &m, msg->nfds ? msg->fds[0] : -1);
    if (!b)
        return 0;
    r->terms = m.terms;
    program_join(p, r, m.terms.group);
    struct use *u = use_add(p, b, m.region, m.hashed);
    if (!u)
        return -ENOMEM;
    if (m.hashed == CONTROL_HASHED_EVENTS)
        watch_for(u);
    if (u->hashed)
        b->tracker = u->hashed == CONTROL_HASHED_EVENTS ? track_inotify.name : track_hash.name;
    if (!region_takes_part(r)) { /* things may have changed since: the remote says it again */
        r->attach = ATTACH_LOOSE;
        r->reason[0] = 0;
    }
    if (b != before) {
        bool vacant = r->attach == ATTACH_DONE && r->vacant && r->group;
        if (vacant && !b->mount)
            region_create(r);
        else if (vacant && page_made(b->mount, &lineage, &epoch))
            mirror_make(r);
        else if (r->attach != ATTACH_ASKED)
            r->attach = ATTACH_LOOSE;
    }
    if (p->link->state == LINK_UP && r->attach == ATTACH_LOOSE)
        link_attach(r);
    return 0;
}

static int on_marks(struct program *p, struct message *msg)
{
    struct control_marks m;
    if (control_marks_get(msg->data, msg->len, &m) || !msg->nfds)
        return -EPROTO;
    struct use *u = use_of(p, m.region);
    if (u && !u->marks)
        u->marks = map_shared(msg->fds[0], sizeof *u->marks);
    return 0;
}

static const struct track_ops *tracker_for(const struct use *u, uint8_t asked)
{
    if (asked == CONTROL_TRACK_UFFD)
        return &track_uffd;
    if (asked == CONTROL_TRACK_SOFTDIRTY)
        return &track_softdirty;
    return asked == CONTROL_TRACK_INOTIFY && u->hashed == CONTROL_HASHED_EVENTS ? &track_inotify : &track_hash;
}

static int on_map(struct program *p, struct message *msg)
{
    struct control_map m;
    if (control_map_get(msg->data, msg->len, &m))
        return -EPROTO;
    struct use *u = use_of(p, m.region);
    m.len = (m.len + PAGE - 1) & ~(uint64_t)(PAGE - 1);
    if (!u)
        return 0;
    if (m.addr % PAGE || m.offset % PAGE || !m.len)
        return -EPROTO;
    if (u->nmaps + 2 > u->maps_cap) {
        size_t cap = u->maps_cap ? u->maps_cap * 2 : 4;
        struct track_map *more = realloc(u->maps, cap * sizeof *more);
        if (!more)
            return -ENOMEM;
        u->maps = more;
        u->maps_cap = cap;
    }
    struct track_map map = {tracker_for(u, m.tracker), p->pagemap, m.addr, m.len, m.offset, p->soft};
    int rc = map.ops->arm(&map);
    if (rc) {
        program_notice(p, "%s: the page table of %s (%u) cannot be read (%s): found by hashing",
                       u->body->region ? u->body->region->path : "?", p->name, p->pid, strerror(-rc));
        map.ops = &track_hash;
        u->body->unknown = true;
    }
    if (m.dirty)
        extents_add(&u->body->dirty, m.offset, m.offset + m.len);
    u->body->tracker = map.ops->name;
    u->maps[u->nmaps++] = map;
    return 0;
}

static int on_softdirty(struct program *p, struct message *m)
{
    if (m->nfds != 2)
        return -EPROTO;
    int clear_refs = take_fd(m, 0), stat = take_fd(m, 1);
    if (p->soft || p->pagemap < 0) {
        close(clear_refs);
        close(stat);
        return 0;
    }
    p->soft = softdirty_new(p->pagemap, clear_refs, stat);
    return p->soft ? 0 : -ENOMEM;
}

static bool maps_in(const struct program *p, const struct group *g, uint64_t addr, uint64_t len)
{
    for (const struct use *u = p->uses; u; u = u->next_program)
        for (size_t i = 0; u->body->region && u->body->region->group == g && i < u->nmaps; i++)
            if (u->maps[i].addr < addr + len && addr < u->maps[i].addr + u->maps[i].len)
                return true;
    return false;
}

/* The strictest acknowledgement that rules ask for in the group: what a rename, sync() or the exit concerns need not be
 * open any more. */
static uint8_t ack_in(const struct group *g)
{
    uint8_t ack = CONTROL_ACK_ASYNC;
    for (const struct region *r = g->regions; r; r = r->next_group)
        if (r->terms.ack < ack)
            ack = r->terms.ack;
    return ack;
}

static bool in_group(const struct program *p, const struct group *g)
{
    if (g == p->group)
        return true;
    for (const struct use *u = p->uses; u; u = u->next_program)
        if (u->body->region && u->body->region->group == g)
            return true;
    return false;
}

/* A capture is due, and nobody waits for it. */
static void want(struct group *g)
{
    g->wanted = true;
    group_kick(g);
}

/* One waiter in each of the program's groups that `which` lets through. */
static int ask_groups(struct program *p, uint32_t slot, enum waiter_kind kind, bool scan_only, uint64_t addr,
                      uint64_t len)
{
    struct answer *a = slot == CONTROL_NO_SLOT ? NULL : answer_new(p, slot);
    if (slot != CONTROL_NO_SLOT && !a)
        return -ENOMEM;
    for (struct group *g = p->link->groups, *next; g; g = next) {
        next = g->next;
        if (!in_group(p, g) || (kind == WAIT_RETIRE && !maps_in(p, g, addr, len)))
            continue;
        if (!a) {
            want(g);
            continue;
        }
        a->refs++;
        uint8_t ack = ack_in(g);
        waiter_new(g, kind, a, p, ack, addr, len, scan_only);
    }
    if (a)
        answer_drop(a, 0);
    return 0;
}

static int on_retire(struct program *p, struct message *msg)
{
    struct control_retire m;
    if (control_retire_get(msg->data, msg->len, &m))
        return -EPROTO;
    /* Maps of files that have no name any more are in no group. */
    for (struct use *u = p->uses; u; u = u->next_program)
        if (!u->body->region)
            use_retire(u, m.addr, m.len);
    return ask_groups(p, m.slot, WAIT_RETIRE, !m.publish, m.addr, m.len);
}

/* The exec that BYE announced failed. */
static void stays(struct program *p)
{
    p->bye = false;
    for (struct use *u = p->uses; u; u = u->next_program)
        u->left = false;
}

static int on_sync(struct program *p, struct message *msg)
{
    struct control_sync m;
    if (control_sync_get(msg->data, msg->len, &m))
        return -EPROTO;
    if (p->bye)
        stays(p);
    if (!m.region)
        return ask_groups(p, m.slot, WAIT_SYNC, false, 0, 0);
    struct use *u = use_of(p, m.region);
    struct group *g = u && u->body->region ? u->body->region->group : NULL;
    if (m.slot == CONTROL_NO_SLOT) {
        if (g)
            want(g);
        return 0;
    }
    struct answer *a = answer_new(p, m.slot);
    if (!a)
        return -ENOMEM;
    if (g && u->body->mount && mirror_attached(u->body->region) &&
        !(u->body->joined && u->body->region->attach == ATTACH_DONE && !page_writable(u->body)))
        waiter_attach(g, a, p, u->body->region);
    else if (!u && m.region == p->refused)
        answer_drop(a, p->refusal);
    else if (g)
        waiter_new(g, WAIT_SYNC, a, p, u->body->region->terms.ack, 0, 0, false);
    else
        answer_drop(a, 0);
    return 0;
}

static int on_release(struct program *p, struct message *msg)
{
    struct control_release m;
    if (control_release_get(msg->data, msg->len, &m))
        return -EPROTO;
    struct use *u = use_of(p, m.region);
    if (!u)
        return 0;
    struct body *b = u->body;
    body_hold(b);
    if (u->marks)
        marks_collect(u->marks, b);
    use_end(u);
    if (b->mount && b->region && !b->uses && !b->joined)
        region_let_go(b->region);
    body_drop(b);
    return 0;
}

static int on_bye(struct program *p, struct message *msg)
{
    struct control_bye m;
    if (control_bye_get(msg->data, msg->len, &m))
        return -EPROTO;
    p->bye = true;
    return ask_groups(p, m.slot, WAIT_BYE, false, 0, 0);
}

static int on_name(struct program *p, struct message *msg)
{
    static struct control_name m;
    if (control_name_get(msg->data, msg->len, &m))
        return -EPROTO;
    naming_take(p, &m);
    return 0;
}

static int dispatch(struct program *p, struct message *m)
{
    uint8_t type = control_type_of(m->data, m->len);
    if (type == CONTROL_HELLO)
        return on_hello(p, m);
    if (!p->greeted || (!p->tool && (!p->link || p->link->broken)))
        return -EPROTO;
    if (p->tool)
        return tool_message(p, type, m->data, m->len);
    switch (type) {
    case CONTROL_REGION:
        return on_region(p, m);
    case CONTROL_MARKS:
        return on_marks(p, m);
    case CONTROL_MAP:
        return on_map(p, m);
    case CONTROL_RETIRE:
        return on_retire(p, m);
    case CONTROL_RELEASE:
        return on_release(p, m);
    case CONTROL_NAME:
        return on_name(p, m);
    case CONTROL_SYNC:
        return on_sync(p, m);
    case CONTROL_BYE:
        return on_bye(p, m);
    case CONTROL_UFFD:
        if (p->uffd < 0)
            p->uffd = take_fd(m, 0);
        return 0;
    case CONTROL_SOFTDIRTY:
        return on_softdirty(p, m);
    default:
        return page_message(p, type, m->data, m->len, m->fds, m->nfds);
    }
}

/* One message. 0 when there was one, -EAGAIN when there is none, else the end. */
static int receive(struct program *p)
{
    static uint8_t data[CONTROL_MAX];
    union {
        struct cmsghdr head;
        char room[CMSG_SPACE(CONTROL_FDS * sizeof(int))];
    } control;
    struct iovec iov = {data, sizeof data};
    struct msghdr h = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control};
    ssize_t n = recvmsg(p->fd, &h, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    if (n < 0)
        return errno == EINTR ? 0 : -errno;
    struct message m = {.data = data, .len = (size_t)n};
    int passed[sizeof control / sizeof(int)];
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&h); c; c = CMSG_NXTHDR(&h, c))
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
            size_t came = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
            memcpy(passed, CMSG_DATA(c), came * sizeof(int)); /* `control` has room for no more */
            for (; came > CONTROL_FDS; came--)
                close(passed[came - 1]);
            memcpy(m.fds, passed, came * sizeof(int));
            m.nfds = came;
        }
    int rc = !n ? -ECONNRESET : h.msg_flags & (MSG_TRUNC | MSG_CTRUNC) ? -EPROTO : dispatch(p, &m);
    for (size_t i = 0; i < m.nfds; i++)
        if (m.fds[i] >= 0)
            close(m.fds[i]);
    return rc == -EAGAIN ? -EPROTO : rc;
}

void program_readable(uv_poll_t *poll, int status, int events)
{
    struct program *p = poll->data;
    (void)events;
    int rc = status < 0 ? status : 0;
    program_hold(p);
    for (int i = 0; i < MESSAGES_A_TURN && !rc && !p->gone; i++)
        rc = receive(p);
    if (rc && rc != -EAGAIN) {
        if (rc == -EPROTO)
            log_warn("pid %u: a message out of form: connection closed", p->pid);
        program_gone(p);
    }
    program_drop(p);
}
