/* What programs say about views (wire/control.h), and their faults. */
#include "agent/page/mount.h"

#include "agent/base/log.h"
#include "agent/page/uffd.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <unistd.h>

#define FAULTS_A_TURN 64u

/* A program's userfaultfd, watched by the loop through a descriptor of our own. */
struct fault_watch {
    uv_poll_t poll;
    struct program *program; /* NULL once it is gone */
    int fd;
};

static const struct stretch *stretch_at(struct program *p, uint64_t addr, struct viewer **of)
{
    for (struct viewer *v = p->viewers; v; v = v->next_program)
        for (size_t i = 0; i < v->count; i++)
            if (addr - v->stretches[i].addr < v->stretches[i].len) {
                *of = v;
                return &v->stretches[i];
            }
    return NULL;
}

static void watch_closed(uv_handle_t *h)
{
    struct fault_watch *w = h->data;
    close(w->fd);
    free(w);
}

static void watch_end(struct program *p)
{
    struct fault_watch *w = p->faults;
    if (!w)
        return;
    p->faults = NULL;
    w->program = NULL;
    uv_poll_stop(&w->poll);
    uv_close((uv_handle_t *)&w->poll, watch_closed);
}

/* An address in no stretch was mapped by a message that is not read yet: it wakes what waits there, which then faults
 * again. */
static void on_faults(uv_poll_t *poll, int status, int events)
{
    struct fault_watch *w = poll->data;
    struct program *p = w->program;
    uint64_t addr[FAULTS_A_TURN];
    (void)events;
    int n = !p ? -ESRCH : status < 0 ? status : page_faults(w->fd, addr, FAULTS_A_TURN);
    if (n < 0) {
        if (n != -EAGAIN && p)
            watch_end(p);
        return;
    }
    for (int i = 0; i < n; i++) {
        struct viewer *v = NULL;
        const struct stretch *s = stretch_at(p, addr[i], &v);
        if (s)
            mount_fault(v->mount, v, s, (s->offset + (addr[i] - s->addr)) / PAGE_SIZE);
    }
}

static int watch(struct program *p)
{
    if (p->faults || p->uffd < 0)
        return 0;
    struct fault_watch *w = calloc(1, sizeof *w);
    int fd = w ? fcntl(p->uffd, F_DUPFD_CLOEXEC, 0) : -1;
    if (fd < 0) {
        free(w);
        return -ENOMEM;
    }
    *w = (struct fault_watch){.program = p, .fd = fd};
    fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK);
    int rc = uv_poll_init(p->local->loop, &w->poll, fd);
    if (rc) {
        close(fd);
        free(w);
        return rc;
    }
    w->poll.data = w;
    p->faults = w;
    uv_poll_start(&w->poll, UV_READABLE, on_faults);
    return 0;
}

/* ---- OPEN ---- */

static int send_view(struct program *p, uint32_t number, const struct mount *m, const struct frame_entry *e, bool fds)
{
    uint8_t bytes[64];
    struct control_view v = {.view = number,
                             .size = e->size,
                             .mtime_ns = e->committed_at * 1000000000,
                             .epoch = e->epoch,
                             .lineage = e->lineage};
    struct iovec iov = {bytes, control_view_put(bytes, sizeof bytes, &v)};
    union {
        struct cmsghdr head;
        char room[CMSG_SPACE(2 * sizeof(int))];
    } control = {0};
    struct msghdr h = {.msg_iov = &iov, .msg_iovlen = 1};
    if (fds) {
        int pass[2] = {m->memfd, m->shared_fd};
        h.msg_control = &control;
        h.msg_controllen = sizeof control;
        control.head =
            (struct cmsghdr){.cmsg_len = CMSG_LEN(sizeof pass), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
        memcpy(CMSG_DATA(&control.head), pass, sizeof pass);
    }
    return sendmsg(p->fd, &h, MSG_DONTWAIT | MSG_NOSIGNAL) < 0 ? -errno : 0;
}

void opening_end(struct pager *g, struct opening *o, int result)
{
    if (o->answer)
        answer_drop(o->answer, result);
    o->answer = NULL;
    o->program = NULL;
    if (o->request) /* its answer is on its way */
        return;
    struct opening **at = &g->openings;
    while (*at != o)
        at = &(*at)->next;
    *at = o->next;
    free(o);
}

static void opening_over(struct pager *g, struct opening *o, int result)
{
    o->request = 0;
    opening_end(g, o, result);
}

static struct viewer *viewer_of(const struct program *p, uint32_t number)
{
    for (struct viewer *v = p->viewers; v; v = v->next_program)
        if (v->number == number)
            return v;
    return NULL;
}

/* The mount is ready to be shown. */
static int present(struct opening *o, struct mount *m)
{
    struct frame_entry e = {.size = m->size, .committed_at = m->mtime, .epoch = m->epoch, .lineage = m->lineage};
    if (o->program->gone)
        return -ECONNRESET;
    if (viewer_of(o->program, o->how.view))
        return -EEXIST;
    int rc = watch(o->program);
    if (!rc)
        rc = viewer_add(m, o->program, &o->how) ? 0 : -ENOMEM;
    if (!rc && (rc = send_view(o->program, o->how.view, m, &e, true)))
        viewer_end(viewer_of(o->program, o->how.view));
    return rc;
}

static bool must_be_eager(const struct program *p)
{
    return p->uffd < 0 || page_uffd() < 0;
}

static void say_eager(struct program *p)
{
    if (p->eager_said)
        return;
    p->eager_said = true;
    program_notice(p,
                   "userfaultfd cannot be used %s: remote regions are fetched whole before they open (memsync doctor "
                   "tells what to change)",
                   p->uffd < 0 ? "by this program" : "by the agent");
}

/* Removed here, which the remote may not know yet. */
static bool is_unlinked(const struct pager *g, const char *name, const struct id *lineage)
{
    for (const struct mount *m = g->mounts; m; m = m->next)
        if (m->body && !m->body->region && m->body->joined && !strcmp(m->name, name) &&
            id_same(mount_lineage(m), lineage))
            return true;
    return false;
}

/* What is written to here is what it is here. */
static int show_look(struct opening *o, const struct frame_entry *e)
{
    const struct pager *g = pager_of(o->program->link);
    static struct frame_entry own;
    own = *e;
    for (const struct mount *m = g ? g->mounts : NULL; m; m = m->next)
        if (m->body && m->body->region && !strcmp(m->name, o->how.name)) {
            own.size = m->size;
            own.committed_at = m->mtime;
        }
    return send_view(o->program, o->how.view, NULL, &own, false);
}

/* The remote has no such region. One that was made here, or is to be made, is presented; true: `o` is over. */
bool opening_absent(struct pager *g, struct opening *o)
{
    static const struct frame_entry none;
    struct mount *m = mount_made(g, o->how.name);
    o->request = 0;
    if (!o->program || o->program->gone || (!m && (!o->how.create || o->how.look)))
        return false;
    if (o->how.look) {
        opening_end(g, o, m->body ? show_look(o, &none) : -ENOENT);
        return true;
    }
    if (!m && !must_be_eager(o->program))
        m = mount_new(g, &o->how, &none, -1, -1, false);
    opening_end(g, o, m ? present(o, m) : must_be_eager(o->program) ? -EOPNOTSUPP : -ENOMEM);
    return true;
}

struct mount *opening_pinned(struct pager *g, struct opening *o, uint32_t pin, const struct frame_entry *e)
{
    struct program *p = o->program;
    if (!p || p->gone || o->how.look) {
        int rc = p && !p->gone ? show_look(o, e) : -ECONNRESET;
        fetch_unpin(g, pin);
        opening_over(g, o, rc);
        return NULL;
    }
    if (!id_none(&o->lineage) && !id_same(&o->lineage, &e->lineage)) {
        fetch_unpin(g, pin);
        opening_over(g, o, -ESTALE);
        return NULL;
    }
    if (is_unlinked(g, o->how.name, &e->lineage)) {
        fetch_unpin(g, pin);
        if (!opening_absent(g, o))
            opening_over(g, o, -ENOENT);
        return NULL;
    }
    bool eager = must_be_eager(p);
    struct mount *m = mount_find(g, &o->how, &e->lineage, e->epoch, eager);
    if (m) {
        fetch_unpin(g, pin);
    } else {
        m = mount_new(g, &o->how, e, -1, -1, eager);
        if (!m) {
            fetch_unpin(g, pin);
            program_notice(p, "%s: no memory or descriptors to present it", o->how.path);
            opening_over(g, o, -ENOMEM);
            return NULL;
        }
        m->pin = pin;
        m->state = MOUNT_PINNED;
        if (!eager)
            fetch_opened(m);
    }
    mount_order(m, o->how.order);
    o->request = 0;
    if (m->eager && o->how.follow)
        program_notice(p, "%s: it is not followed: that needs userfaultfd", o->how.path);
    if (m->eager && !mount_complete(m)) {
        say_eager(p);
        o->mount = m;
        return m;
    }
    int rc = present(o, m);
    opening_over(g, o, rc);
    return m;
}

void openings_look(struct mount *m)
{
    struct pager *g = m->pager;
    for (struct opening *o = g->openings, *next; o; o = next) {
        next = o->next;
        if (o->mount != m)
            continue;
        int rc = m->state == MOUNT_FAILED ? -EIO : mount_complete(m) ? present(o, m) : 1;
        if (rc <= 0)
            opening_over(g, o, rc);
    }
}

static bool good(const struct program *p, const struct control_open *m)
{
    return m->slot < SHARED_SLOTS && !name_fault(m->name) && !viewer_of(p, m->view);
}

static int opening_new(struct program *p, const struct control_open *m, uint64_t epoch, const struct id *lineage)
{
    struct pager *g = pager_of(p->link);
    struct opening *o = calloc(1, sizeof *o);
    struct answer *a = g && o ? answer_new(p, m->slot) : NULL;
    if (!a) {
        free(o);
        return -ENOMEM;
    }
    *o = (struct opening){
        .next = g->openings, .program = p, .answer = a, .epoch = epoch, .since = uv_now(p->local->loop), .how = *m};
    if (lineage)
        o->lineage = *lineage;
    g->openings = o;
    opening_ask(g, o);
    return 0;
}

static int on_open(struct program *p, const void *data, size_t len)
{
    static struct control_open m;
    if (control_open_get(data, len, &m) || !good(p, &m))
        return -EPROTO;
    return opening_new(p, &m, 0, NULL);
}

/* ---- RESUME ---- */

static struct mount *mount_of_memfd(struct pager *g, int fd)
{
    struct stat st;
    if (fstat(fd, &st))
        return NULL;
    for (struct mount *m = g->mounts; m; m = m->next)
        if (m->dev == st.st_dev && m->ino == st.st_ino)
            return m;
    return NULL;
}

static struct mount *take_over(struct pager *g, const struct control_resume *m, int *fds)
{
    static struct frame_entry e;
    e = (struct frame_entry){.lineage = m->lineage, .epoch = m->epoch, .size = m->size};
    struct stat st;
    if (m->open.mode == CONTROL_MIRROR && !fstat(fds[0], &st))
        e.size = (uint64_t)st.st_size; /* as another program, or the agent that is gone, has left it */
    if (m->open.follow && ftruncate(fds[0], (off_t)e.size)) /* it died while it changed it (follow.c) */
        log_warn("%s: %s", m->open.name, strerror(errno));
    struct mount *t = mount_new(g, &m->open, &e, fds[0], fds[1], false);
    fds[0] = fds[1] = -1;
    if (t && t->shared->mirror && t->shared->epoch)
        t->epoch = t->shared->epoch;
    if (t && t->shared->failed)
        mount_fail(t, t->shared->failed, "it had failed before");
    return t;
}

/* With a memfd it is answered at once: whether the epoch is still to be had is found out meanwhile. */
static int on_resume(struct program *p, const void *data, size_t len, int *fds, size_t nfds)
{
    static struct control_resume m;
    if (control_resume_get(data, len, &m) || nfds == 1 || (!m.epoch && m.open.mode == CONTROL_PULL) || !good(p, &m.open))
        return -EPROTO;
    struct pager *g = pager_of(p->link);
    if (!g)
        return -ENOMEM;
    struct mount *t = nfds ? mount_of_memfd(g, fds[0])
                           : mount_find(g, &m.open, &m.lineage, m.epoch, p->uffd < 0);
    if (!t && (!nfds || p->uffd < 0))
        return opening_new(p, &m.open, m.open.follow ? 0 : m.epoch, &m.lineage);
    struct opening o = {.program = p, .answer = answer_new(p, m.open.slot), .how = m.open};
    if (!o.answer)
        return -ENOMEM;
    if (!t)
        t = take_over(g, &m, fds);
    int rc = t ? present(&o, t) : -ENOMEM;
    if (t)
        fetch_pin(t);
    answer_drop(o.answer, rc);
    return 0;
}

/* ---- the rest ---- */

static int on_view_map(struct program *p, const void *data, size_t len)
{
    struct control_view_map m;
    if (control_view_map_get(data, len, &m) || m.addr % PAGE_SIZE || m.offset % PAGE_SIZE)
        return -EPROTO;
    m.len = (m.len + PAGE_SIZE - 1) & ~(uint64_t)(PAGE_SIZE - 1);
    struct viewer *v = viewer_of(p, m.view);
    for (struct viewer *o = p->viewers; o; o = o->next_program)
        viewer_unmap(o, m.addr, m.len);
    return v ? viewer_map(v, m.addr, m.len, m.offset) : 0;
}

static int on_view_unmap(struct program *p, const void *data, size_t len)
{
    struct control_view_unmap m;
    if (control_view_unmap_get(data, len, &m))
        return -EPROTO;
    for (struct viewer *v = p->viewers; v; v = v->next_program)
        viewer_unmap(v, m.addr, m.len);
    return 0;
}

static int on_advise(struct program *p, const void *data, size_t len)
{
    struct control_advise m;
    if (control_advise_get(data, len, &m))
        return -EPROTO;
    struct viewer *v = viewer_of(p, m.view);
    if (v)
        mount_advise(v->mount, m.advice, m.offset, m.len);
    return 0;
}

static int on_fetch(struct program *p, const void *data, size_t len)
{
    struct control_fetch m;
    if (control_fetch_get(data, len, &m) || m.slot >= SHARED_SLOTS)
        return -EPROTO;
    struct viewer *v = viewer_of(p, m.view);
    struct answer *a = answer_new(p, m.slot);
    if (!a)
        return -ENOMEM;
    if (v)
        fetch_range(v->mount, a, m.offset, m.len);
    else
        answer_drop(a, -EBADF);
    return 0;
}

static int on_truncate(struct program *p, const void *data, size_t len)
{
    struct control_truncate m;
    if (control_truncate_get(data, len, &m) || m.slot >= SHARED_SLOTS)
        return -EPROTO;
    struct viewer *v = viewer_of(p, m.view);
    struct answer *a = answer_new(p, m.slot);
    if (!a)
        return -ENOMEM;
    answer_drop(a, v ? mount_truncate(v->mount, m.size, m.grow) : -EBADF);
    return 0;
}

static int on_close(struct program *p, const void *data, size_t len)
{
    struct control_close m;
    if (control_close_get(data, len, &m))
        return -EPROTO;
    struct viewer *v = viewer_of(p, m.view);
    if (v)
        viewer_end(v);
    return 0;
}

int page_message(struct program *p, uint8_t type, const void *data, size_t len, int *fds, size_t nfds)
{
    switch (type) {
    case CONTROL_OPEN:
        return on_open(p, data, len);
    case CONTROL_RESUME:
        return on_resume(p, data, len, fds, nfds);
    case CONTROL_VIEW_MAP:
        return on_view_map(p, data, len);
    case CONTROL_VIEW_UNMAP:
        return on_view_unmap(p, data, len);
    case CONTROL_ADVISE:
        return on_advise(p, data, len);
    case CONTROL_FETCH:
        return on_fetch(p, data, len);
    case CONTROL_CLOSE:
        return on_close(p, data, len);
    case CONTROL_TRUNCATE:
        return on_truncate(p, data, len);
    default:
        return -EPROTO;
    }
}

void page_program_gone(struct program *p)
{
    struct pager *g = p->link ? p->link->pager : NULL;
    watch_end(p);
    for (struct opening *o = g ? g->openings : NULL, *next; o; o = next) {
        next = o->next;
        if (o->program == p)
            opening_end(g, o, -ECONNRESET);
    }
    for (struct mount *m = g ? g->mounts : NULL; m; m = m->next)
        fetch_forget_program(m, p);
    while (p->viewers)
        viewer_end(p->viewers);
}

/* ---- status ---- */

static unsigned viewers_of(const struct mount *m)
{
    unsigned n = 0;
    for (const struct viewer *v = m->viewers; v; v = v->next_mount)
        n++;
    return n;
}

static uint64_t resident(const struct mount *m)
{
    uint64_t bytes = m->pages.have_n * PAGE_SIZE;
    return bytes < m->size ? bytes : m->size;
}

static uint64_t in_flight(const struct mount *m)
{
    uint64_t bytes = 0;
    for (const struct read *r = m->pager->reads; r; r = r->next)
        if (r->mount == m)
            bytes += r->len - r->got;
    return bytes;
}

void page_status(FILE *f, struct link *k, bool *comma, void (*text)(FILE *f, const char *s))
{
    static const char *const states[] = {"waiting", "waiting", "pinned", "failed"};
    static const char *const orders[] = {"fault", "linear", "recorded", "none"};
    for (const struct mount *m = k->pager ? k->pager->mounts : NULL; m; m = m->next) {
        char lineage[ID_TEXT];
        id_text(&m->lineage, lineage);
        fputs(*comma ? ",{\"name\":" : "{\"name\":", f);
        text(f, m->name);
        fputs(",\"path\":", f);
        text(f, m->path);
        fputs(",\"remote\":", f);
        text(f, k->address);
        fputs(",\"reason\":", f);
        text(f, m->state == MOUNT_FAILED ? m->reason : m->state == MOUNT_PINNED ? "" : k->reason);
        fprintf(f,
                ",\"mode\":\"%s\",\"state\":\"%s\",\"order\":\"%s\",\"lineage\":\"%s\",\"epoch\":%llu,\"size\":%llu,\"resident\":%llu,"
                "\"bound\":%llu,\"evicted\":%llu,\"fetched\":%llu,\"in_flight\":%llu,\"faults\":%llu,\"programs\":%u,\"follows\":%s}",
                m->body ? "mirror" : "pull", states[m->state], orders[m->plan.order], lineage, (unsigned long long)m->epoch,
                (unsigned long long)m->size, (unsigned long long)resident(m),
                (unsigned long long)(m->evict.bound * PAGE_SIZE), (unsigned long long)m->evict.evicted, (unsigned long long)m->bytes_in,
                (unsigned long long)in_flight(m), (unsigned long long)m->plan.faults, viewers_of(m), follow_is(m) ? "true" : "false");
        *comma = true;
    }
}
