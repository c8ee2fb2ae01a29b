/* Programs: who they are, what they have open and mapped, and what they ask for. One SOCK_SEQPACKET connection a
 * program (wire/control.h).
 *
 * A connection that ends after BYE was answered is a program that left in order. One that ends otherwise is a program
 * that died: its maps are gone with all that was stored since the last scan, so the bodies it had mapped, or was
 * writing by a call, become unknown, and nothing of them is published until somebody opens them again or asks by
 * `memsync sync`: the remote stays at its last epoch. */
#include "agent/sync/local.h"
#include "agent/sync/capture.h"
#include "agent/base/identity.h"
#include "agent/base/log.h"
#include "agent/net/server.h"
#include "agent/store/store.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <unistd.h>

#define TICK_MS 50u
#define LINGER_MS 3000u
#define DRAIN_MS 10000u
#define MESSAGES_A_TURN 64

static void program_gone(struct program *p);

/* ---- answers ---- */

struct answer *answer_new(struct program *p, uint32_t slot)
{
    struct answer *a = calloc(1, sizeof *a);
    if (a) {
        *a = (struct answer){.refs = 1, .program = p, .slot = slot};
        program_hold(p);
    }
    return a;
}

static void slot_done(struct program *p, uint32_t slot, int result)
{
    if (!p->shared || slot >= SHARED_SLOTS)
        return;
    struct shared_slot *s = &p->shared->slots[slot];
    __atomic_store_n(&s->result, result, __ATOMIC_RELAXED);
    __atomic_store_n(&s->state, (uint32_t)SHARED_DONE, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, &s->state, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

void answer_drop(struct answer *a, int result)
{
    if (!a->result)
        a->result = result;
    if (--a->refs)
        return;
    struct program *p = a->program;
    if (!p->gone && p->tool)
        program_send_text(p, CONTROL_RESULT, a->result, "");
    else if (!p->gone)
        slot_done(p, a->slot, a->result);
    free(a);
    program_drop(p);
}

void program_send_text(struct program *p, uint8_t type, int code, const char *text)
{
    static uint8_t message[CONTROL_MAX];
    static struct control_text t;
    t.code = code;
    snprintf(t.text, sizeof t.text, "%s", text);
    size_t n = control_text_put(message, sizeof message, type, &t);
    if (n && p->fd >= 0 && send(p->fd, message, n, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
        log_debug("pid %u: %s", p->pid, strerror(errno));
}

static void notice_text(struct program *p, const char *text)
{
    if (p->gone || p->tool || !p->shared)
        return;
    program_send_text(p, CONTROL_NOTICE, 0, text);
    __atomic_fetch_add(&p->shared->notices, 1, __ATOMIC_SEQ_CST);
}

void program_notice(struct program *p, const char *format, ...)
{
    char text[1200];
    va_list ap;
    va_start(ap, format);
    vsnprintf(text, sizeof text, format, ap);
    va_end(ap);
    notice_text(p, text);
}

void group_notice(struct group *g, const char *format, ...)
{
    char text[1200];
    va_list ap;
    va_start(ap, format);
    vsnprintf(text, sizeof text, format, ap);
    va_end(ap);
    log_warn("%s", text);
    for (struct program *p = g->link->local->programs; p; p = p->next)
        for (struct use *u = p->uses; u; u = u->next_program)
            if (u->body->region && u->body->region->group == g) {
                notice_text(p, text);
                break;
            }
}

void region_notice(struct region *r, const char *format, ...)
{
    char text[1600];
    va_list ap;
    va_start(ap, format);
    vsnprintf(text, sizeof text, format, ap);
    va_end(ap);
    for (struct use *u = r->body ? r->body->uses : NULL; u; u = u->next_body)
        notice_text(u->program, text);
}

/* ---- life of a program ---- */

void program_hold(struct program *p)
{
    p->holds++;
}

static void use_free(struct use *u)
{
    if (u->marks)
        munmap(u->marks, sizeof *u->marks);
    body_drop(u->body);
    free(u->maps);
    free(u);
}

static void dead_uses_free(struct program *p)
{
    while (p->dead_uses) {
        struct use *u = p->dead_uses;
        p->dead_uses = u->next_program;
        use_free(u);
    }
}

void program_drop(struct program *p)
{
    if (--p->holds <= 1)
        dead_uses_free(p);
    if (p->holds || !p->gone)
        return;
    struct program **at = &p->local->programs;
    while (*at != p)
        at = &(*at)->next;
    *at = p->next;
    if (p->shared)
        munmap(p->shared, sizeof *p->shared);
    if (p->pagemap >= 0)
        close(p->pagemap);
    if (p->uffd >= 0)
        close(p->uffd);
    local_kick_linger(p->local);
    free(p);
}

struct use *use_add(struct program *p, struct body *b, uint32_t number, uint8_t hashed)
{
    struct use *u = calloc(1, sizeof *u);
    if (!u)
        return NULL;
    *u = (struct use){
        .next_program = p->uses, .next_body = b->uses, .program = p, .body = b, .number = number, .hashed = hashed};
    p->uses = u;
    b->uses = u;
    body_hold(b);
    return u;
}

static void use_end(struct use *u)
{
    struct program *p = u->program;
    struct use **at = &p->uses;
    while (*at != u)
        at = &(*at)->next_program;
    *at = u->next_program;
    at = &u->body->uses;
    while (*at != u)
        at = &(*at)->next_body;
    *at = u->next_body;
    u->nmaps = 0;
    u->next_program = p->dead_uses;
    p->dead_uses = u; /* a capture may be looking at its marks */
    program_hold(p);
    program_drop(p);
}

void program_join(struct program *p, struct region *r, const char *group)
{
    if (*group) {
        struct group *named = group_of(p->link, group);
        if (!named)
            return;
        if (!r->group)
            group_add(named, r);
        else if (r->group != named)
            group_merge(named, r->group);
        return;
    }
    if (!p->group)
        p->group = r->group ? r->group : group_of(p->link, "");
    if (!p->group)
        return;
    if (!r->group)
        group_add(p->group, r);
    else if (r->group != p->group)
        group_merge(p->group, r->group);
}

/* Its pages can no longer be looked at through its memory map: it is going, or the registration was lost. */
void program_check(struct program *p)
{
    bool lost = false;
    for (struct use *u = p->uses; u; u = u->next_program)
        for (size_t i = 0; i < u->nmaps; i++) {
            struct track_map *m = &u->maps[i];
            if (m->ops != &track_uffd)
                continue;
            u->body->unknown = true;
            if (track_uffd.arm(m)) {
                u->body->killed = true;
                u->nmaps = 0;
                break;
            }
            m->ops = &track_hash;
            u->body->tracker = "hash";
            lost = true;
        }
    if (lost)
        program_notice(p, "page-table tracking was lost in %s (%u): its regions are found by hashing from now on",
                       p->name, p->pid);
}

/* ---- messages ---- */

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

static int on_region(struct program *p, struct message *msg)
{
    static struct control_region m;
    if (control_region_get(msg->data, msg->len, &m) || use_of(p, m.region))
        return -EPROTO;
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
    if (!use_add(p, b, m.region, m.hashed))
        return -ENOMEM;
    if (m.hashed)
        b->tracker = "hash";
    if (!region_takes_part(r)) { /* things may have changed since: the remote says it again */
        r->attach = ATTACH_LOOSE;
        r->reason[0] = 0;
    }
    if (b != before) {
        if (r->attach == ATTACH_DONE && r->vacant && r->group)
            region_create(r);
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

static int on_map(struct program *p, struct message *msg)
{
    struct control_map m;
    if (control_map_get(msg->data, msg->len, &m))
        return -EPROTO;
    struct use *u = use_of(p, m.region);
    if (!u)
        return 0;
    if (u->nmaps + 2 > u->maps_cap) {
        size_t cap = u->maps_cap ? u->maps_cap * 2 : 4;
        struct track_map *more = realloc(u->maps, cap * sizeof *more);
        if (!more)
            return -ENOMEM;
        u->maps = more;
        u->maps_cap = cap;
    }
    struct track_map map = {m.tracker == CONTROL_TRACK_UFFD ? &track_uffd : &track_hash, p->pagemap, m.addr, m.len,
                            m.offset};
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

static bool maps_in(const struct program *p, const struct group *g, uint64_t addr, uint64_t len)
{
    for (const struct use *u = p->uses; u; u = u->next_program)
        for (size_t i = 0; u->body->region && u->body->region->group == g && i < u->nmaps; i++)
            if (u->maps[i].addr < addr + len && addr < u->maps[i].addr + u->maps[i].len)
                return true;
    return false;
}

/* The strictest acknowledgement that the program's rules ask for in the group. */
static uint8_t ack_in(const struct program *p, const struct group *g)
{
    uint8_t ack = CONTROL_ACK_ASYNC;
    for (const struct use *u = p->uses; u; u = u->next_program)
        if (u->body->region && u->body->region->group == g && u->body->region->terms.ack < ack)
            ack = u->body->region->terms.ack;
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
            g->wanted = true;
            group_kick(g);
            continue;
        }
        a->refs++;
        uint8_t ack = ack_in(p, g);
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
    struct use *u = m.region ? use_of(p, m.region) : NULL;
    if (!m.region)
        return ask_groups(p, m.slot, WAIT_SYNC, false, 0, 0);
    struct group *g = u && u->body->region ? u->body->region->group : NULL;
    if (m.slot == CONTROL_NO_SLOT) {
        if (g) {
            g->wanted = true;
            group_kick(g);
        }
        return 0;
    }
    struct answer *a = answer_new(p, m.slot);
    if (!a)
        return -ENOMEM;
    if (g)
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

static int on_status(struct program *p)
{
    char *json = status_json(p->local);
    size_t len = json ? strlen(json) : 0;
    static char piece[8001];
    for (size_t at = 0; at < len; at += 8000) {
        snprintf(piece, sizeof piece, "%s", json + at);
        program_send_text(p, CONTROL_TEXT, 0, piece);
    }
    program_send_text(p, CONTROL_TEXT, 0, "");
    free(json);
    return 0;
}

static int on_publish(struct program *p, struct message *msg)
{
    static struct control_publish m;
    if (control_publish_get(msg->data, msg->len, &m))
        return -EPROTO;
    struct answer *a = answer_new(p, 0);
    bool any = false;
    if (!a)
        return -ENOMEM;
    for (struct link *k = p->local->links; k; k = k->next)
        for (struct group *g = k->groups, *next; g; g = next) {
            bool here = !*m.name;
            next = g->next;
            for (struct region *r = g->regions; r && !here; r = r->next_group)
                here = !strcmp(r->name, m.name);
            if (!here)
                continue;
            any = true;
            a->refs++;
            waiter_new(g, WAIT_TOOL, a, NULL, CONTROL_ACK_DURABLE, 0, 0, false);
        }
    answer_drop(a, any || !*m.name ? 0 : -ENOENT);
    return 0;
}

/* A watched file is a program that never leaves and is found by hashing. */
static int on_watch(struct program *p, struct message *msg)
{
    static struct control_watch m;
    if (control_watch_get(msg->data, msg->len, &m))
        return -EPROTO;
    struct link *k = link_find(p->local, m.remote);
    const char *fault = name_fault(m.name);
    if (!k || k->broken || fault) {
        program_send_text(p, CONTROL_RESULT, -EINVAL, fault ? fault : k ? k->reason : "no memory");
        return 0;
    }
    struct statx st;
    int fd = own_open(-1, m.path);
    if (fd < 0 || statx(fd, "", AT_EMPTY_PATH, STATX_BASIC_STATS | STATX_BTIME, &st) < 0) {
        program_send_text(p, CONTROL_RESULT, fd < 0 ? fd : -errno, "");
        if (fd >= 0)
            close(fd);
        return 0;
    }
    struct source s = {
        st.stx_ino, st.stx_mask & STATX_BTIME ? (uint64_t)st.stx_btime.tv_sec * 1000000000u + st.stx_btime.tv_nsec : 0};
    uint64_t dev = ((uint64_t)st.stx_dev_major << 32) | st.stx_dev_minor;
    struct region *r = region_get(k, m.name, m.path);
    struct program *w = calloc(1, sizeof *w);
    if (!r || !w)
        return -ENOMEM;
    *w = (struct program){.local = p->local,
                          .link = k,
                          .fd = -1,
                          .pagemap = -1,
                          .uffd = -1,
                          .greeted = true,
                          .watch = true,
                          .holds = 1,
                          .timeout_ms = 10000,
                          .next = p->local->programs,
                          .name = "watch"};
    p->local->programs = w;
    if (!r->body || !source_same(&r->body->source, &s)) {
        struct body *b = body_new(fd, dev, s);
        if (!b)
            return -ENOMEM;
        region_give_body(r, b);
        body_drop(b);
        r->attach = ATTACH_LOOSE;
    } else {
        close(fd);
    }
    r->terms = m.terms;
    r->body->tracker = "hash";
    program_join(w, r, m.terms.group);
    use_add(w, r->body, 1, 2);
    if (k->state == LINK_UP && r->attach == ATTACH_LOOSE)
        link_attach(r);
    program_send_text(p, CONTROL_RESULT, 0, "");
    return 0;
}

static int dispatch(struct program *p, struct message *m)
{
    uint8_t type = control_type_of(m->data, m->len);
    if (type == CONTROL_HELLO)
        return on_hello(p, m);
    if (!p->greeted || (!p->tool && (!p->link || p->link->broken)))
        return -EPROTO;
    if (p->tool) {
        switch (type) {
        case CONTROL_STATUS:
            return on_status(p);
        case CONTROL_PUBLISH:
            return on_publish(p, m);
        case CONTROL_WATCH:
            return on_watch(p, m);
        case CONTROL_STOP:
            agent_leave();
            return 0; /* answered when all is drained: the connection ends */
        default:
            return -EPROTO;
        }
    }
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
    default:
        return -EPROTO;
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
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&h); c; c = CMSG_NXTHDR(&h, c))
        if (c->cmsg_level == SOL_SOCKET && c->cmsg_type == SCM_RIGHTS) {
            m.nfds = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
            memcpy(m.fds, CMSG_DATA(c), m.nfds * sizeof(int));
        }
    int rc = !n ? -ECONNRESET : h.msg_flags & (MSG_TRUNC | MSG_CTRUNC) ? -EPROTO : dispatch(p, &m);
    for (size_t i = 0; i < m.nfds; i++)
        if (m.fds[i] >= 0)
            close(m.fds[i]);
    return rc == -EAGAIN ? -EPROTO : rc;
}

static void program_closed(uv_handle_t *h)
{
    struct program *p = h->data;
    close(p->fd);
    p->fd = -1;
    program_drop(p);
}

/* What a dead program's page tables held is gone; what its marks hold is not. */
static void program_gone(struct program *p)
{
    if (p->gone)
        return;
    p->gone = true;
    bool died = !p->bye && p->greeted && !p->tool;
    bool writing = p->shared && __atomic_load_n(&p->shared->calls, __ATOMIC_SEQ_CST);
    if (p->link)
        naming_after_death(p);
    if (p->link)
        for (struct group *g = p->link->groups; g; g = g->next)
            group_forget_program(g, p);
    while (p->uses) {
        struct use *u = p->uses;
        struct body *b = u->body;
        if (u->marks)
            marks_collect(u->marks, b);
        if ((u->nmaps && !u->left) || (died && writing))
            b->unknown = b->killed = true;
        if (died && b->dirty.count)
            b->killed = true;
        use_end(u);
    }
    if (died)
        log_info("%s (%u) died", p->name, p->pid);
    if (p->polling) {
        p->polling = false;
        uv_poll_stop(&p->poll);
        uv_close((uv_handle_t *)&p->poll, program_closed);
    } else {
        program_drop(p);
    }
}

static void program_readable(uv_poll_t *poll, int status, int events)
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

/* ---- the whole ---- */

bool local_all_acknowledged(const struct local *l)
{
    for (const struct link *k = l->links; k; k = k->next)
        for (const struct group *g = k->groups; g; g = g->next) {
            if (g->capture || g->queue || g->waiters || g->ops || g->degraded)
                return false;
            for (const struct region *r = g->regions; r; r = r->next_group)
                if (r->attach == ATTACH_ASKED || r->attach == ATTACH_HASHING ||
                    (r->body && !r->body->killed && r->body->dirty.count && region_takes_part(r)))
                    return false;
        }
    return true;
}

void local_kick_linger(struct local *l)
{
    if (!l->programs)
        l->idle_since = uv_now(l->loop);
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
    unlink(l->socket_path);
    close(l->listen_fd);
    close(l->lock_fd);
    free(l->socket_path);
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
        closed &= !k->conn && !k->server && !k->store;
        for (struct group *g = k->groups; g; g = g->next)
            closed &= !g->capture;
    }
    return closed;
}

static void stop_step(struct local *l, uint64_t now)
{
    if (l->phase == 0 && (local_all_acknowledged(l) || now >= l->stop_by))
        l->phase = 1;
    if (l->phase == 1 && links_closed(l)) {
        l->phase = 2;
        for (struct program *p = l->programs, *next; p; p = next) {
            next = p->next;
            if (p->tool)
                program_send_text(p, CONTROL_RESULT, 0, "");
            program_gone(p);
        }
    }
    if (l->phase == 2 && !l->programs) {
        l->phase = 3;
        uv_close((uv_handle_t *)&l->listener, handle_closed);
        uv_close((uv_handle_t *)&l->tick, handle_closed);
    }
}

static void tick(uv_timer_t *t)
{
    struct local *l = t->data;
    uint64_t now = uv_now(l->loop);
    for (struct link *k = l->links; k; k = k->next) {
        link_tick(k, now);
        for (struct group *g = k->groups, *next; g; g = next) {
            next = g->next;
            group_tick(g, now);
        }
    }
    if (l->stopping) {
        stop_step(l, now);
        return;
    }
    if (l->linger && !l->stopping && !l->programs && local_all_acknowledged(l) && now - l->idle_since > LINGER_MS) {
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
    l->lock_fd = open(lock, O_RDWR | O_CREAT | O_CLOEXEC, 0600);
    if (l->lock_fd < 0 || flock(l->lock_fd, LOCK_EX | LOCK_NB) < 0) {
        rc = errno == EWOULDBLOCK ? -EADDRINUSE : -errno;
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

int local_start(struct local **out, uv_loop_t *loop, const char *socket_path, bool linger, const char *state_dir,
                char error[512])
{
    struct local *l = calloc(1, sizeof *l);
    if (!l)
        return -ENOMEM;
    l->loop = loop;
    l->linger = linger;
    l->listen_fd = l->lock_fd = -1;
    l->socket_path = strdup(socket_path);
    gethostname(l->host, sizeof l->host - 1);
    error[0] = 0;
    int rc = listen_on(l, socket_path, error);
    if (!rc)
        rc = identity_load(state_dir, &l->identity, error);
    if (!rc)
        rc = records_open(&l->records, state_dir, error);
    if (rc) {
        if (l->listen_fd >= 0) {
            unlink(socket_path);
            close(l->listen_fd);
        }
        if (l->lock_fd >= 0)
            close(l->lock_fd);
        free(l->socket_path);
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
    l->handles_open = 2;
    *out = l;
    return 0;
}

void local_stop(struct local *l, void (*done)(void *arg), void *arg)
{
    l->stopped = done;
    l->stopped_arg = arg;
    l->stopping = true;
    l->stop_by = uv_now(l->loop) + DRAIN_MS;
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
