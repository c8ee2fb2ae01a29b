/* Following: a mount whose views ask for it goes on to the region's newest epoch, one whole epoch at a time.
 *
 *               PIN epoch 0, every FOLLOW_MS
 *     at E ------------------------------------> PINNED at E, or of another lineage: UNPIN, still at E
 *      ^                                           \ PINNED at F > E: CHANGED (E's pin, F's)
 *      |                                             \
 *      +------- E becomes F <------- EXTENTS ---------+
 *
 * The change is made in one go on the loop thread, while view.punches is odd: answers that are under way are of no use
 * any more, all pages that differ are taken out of the memfd, its size is changed, view.size and view.epoch say so.
 * Meanwhile no fault is answered. So a thread that has seen a page of F never again sees one of E: the first page of F
 * comes when none of E's that differ is left. Calls see by the sequence that they have to begin again.
 *
 * - The pages that are the same stay. Which differ the remote knows, because it keeps aside for E's pin what later
 * epochs overwrite; a remote that does not (a hub; too much was overwritten) says that all may.
 * - E's pin is lost (its budget, a link that was down for too long): nothing fails. The newest epoch is pinned, and
 * everything is taken out.
 * - Another file took the region's name: it stays at E, which is said once. Removed: the same, and nothing is said.
 * - Pages of a private mapping that the program has stored to are its own, and stay.
 * - The agent dies in the middle: pages have gone, but none of F has come, and view.size and view.epoch are still E's.
 * The next one makes the memfd as long as view.size says, and finds holes. */
#include "agent/page/mount.h"

#include "agent/base/log.h"
#include "agent/page/uffd.h"

#include <errno.h>
#include <unistd.h>

#define FOLLOW_MS 200u
#define PATIENCE_MS 2000u /* for calls that wait for pages: where epochs come faster than they, none would ever end */

bool follow_is(const struct mount *m)
{
    return m->shared->moves & VIEW_FOLLOWS;
}

static void again_later(struct mount *m)
{
    m->follow.next_at = uv_now(m->pager->link->local->loop) + FOLLOW_MS;
}

void follow_tick(struct mount *m, uint64_t now)
{
    struct following *f = &m->follow;
    if (!follow_is(m) || m->state != MOUNT_PINNED || f->request || f->changed || now < f->next_at || !m->viewers)
        return;
    if (m->fetchings && now < f->next_at + PATIENCE_MS)
        return;
    f->request = ++m->pager->link->next_request;
    fetch_ask_newest(m->pager, f->request, m->name);
}

void follow_stop(struct mount *m, bool unpin)
{
    struct following *f = &m->follow;
    if (unpin && f->pin)
        fetch_unpin(m->pager, f->pin);
    f->request = f->changed = f->pin = 0;
}

static int take_out(struct mount *m, const struct frame_extents *e, uint64_t size)
{
    uint64_t count = m->pages.count, least = size < m->size ? size : m->size;
    if (!e || e->all)
        return mount_punch(m, 0, count);
    int rc = 0;
    for (uint32_t i = 0; i < e->count && !rc; i++) {
        uint64_t from, to;
        frame_extent(e, i, &from, &to);
        rc = mount_punch(m, from < count ? from : count, to < count ? to : count);
    }
    if (!rc && size != m->size) /* what is behind the shorter one's end */
        rc = mount_punch(m, least / PAGE_SIZE < count ? least / PAGE_SIZE : count, count);
    return rc;
}

static void wake_all(struct mount *m)
{
    for (struct viewer *v = m->viewers; v; v = v->next_mount)
        for (size_t i = 0; i < v->count; i++)
            page_wake(v->program->uffd, v->stretches[i].addr, v->stretches[i].len);
}

/* e NULL: everything may differ. The pin is the mount's from now on. */
static void go_on(struct mount *m, uint32_t pin, const struct later *to, const struct frame_extents *e)
{
    uint32_t old = m->state == MOUNT_PINNED ? m->pin : 0;
    view_punch_begin(m->shared);
    fetch_drop(m);
    int rc = take_out(m, e, to->size);
    if (!rc && to->size != m->size)
        rc = mount_resize(m, to->size);
    if (!rc) {
        m->epoch = to->epoch;
        m->mtime = to->mtime;
        m->base = m->size;
        __atomic_store_n(&m->shared->mtime_ns, to->mtime * 1000000000, __ATOMIC_SEQ_CST);
        __atomic_store_n(&m->shared->epoch, m->epoch, __ATOMIC_SEQ_CST);
    }
    view_punch_end(m->shared);
    m->pin = pin;
    m->state = MOUNT_PINNED;
    m->follow.lost = false;
    again_later(m);
    if (old)
        fetch_unpin(m->pager, old);
    if (rc)
        mount_fail(m, rc, "no memory to follow it to epoch %llu (%s)", (unsigned long long)to->epoch, strerror(-rc));
    log_debug("%s: epoch %llu", m->name, (unsigned long long)m->epoch);
    wake_all(m); /* who waited for a page of before faults again */
    fetch_cut(m);
    fetch_pump(m->pager);
}

static struct mount *of_request(struct pager *g, uint32_t request)
{
    for (struct mount *m = g->mounts; m; m = m->next)
        if (request && (m->follow.request == request || m->follow.changed == request))
            return m;
    return NULL;
}

static void say_other(struct mount *m)
{
    if (m->follow.said)
        return;
    m->follow.said = true;
    for (struct viewer *v = m->viewers; v; v = v->next_mount)
        program_notice(v->program, "%s: the remote has another file of that name now; this one stays at epoch %llu",
                       m->path, (unsigned long long)m->epoch);
}

bool follow_pinned(struct pager *g, uint32_t request, uint32_t pin, const struct frame_entry *e)
{
    struct mount *m = of_request(g, request);
    if (!m)
        return false;
    struct following *f = &m->follow;
    f->request = 0;
    again_later(m);
    bool other = !id_same(&e->lineage, &m->lineage);
    if (m->state != MOUNT_PINNED || other || e->epoch <= m->epoch) {
        fetch_unpin(g, pin);
        if (other)
            say_other(m);
        return true;
    }
    f->pin = pin;
    f->to = (struct later){.epoch = e->epoch, .size = e->size, .mtime = e->committed_at};
    f->changed = ++g->link->next_request;
    fetch_ask_changed(g, f->changed, m->pin, pin);
    return true;
}

bool follow_extents(struct pager *g, const struct frame_extents *e)
{
    struct mount *m = of_request(g, e->request);
    if (!m || m->follow.changed != e->request)
        return false;
    uint32_t pin = m->follow.pin;
    follow_stop(m, false);
    go_on(m, pin, &m->follow.to, e);
    return true;
}

bool follow_failed(struct pager *g, uint32_t request)
{
    struct mount *m = of_request(g, request);
    if (!m)
        return false;
    uint32_t pin = m->follow.pin;
    follow_stop(m, false);
    again_later(m);
    if (pin)
        go_on(m, pin, &m->follow.to, NULL);
    return true;
}

void follow_lost(struct mount *m)
{
    follow_stop(m, m->state == MOUNT_PINNED);
    if (m->state == MOUNT_PINNED)
        fetch_unpin(m->pager, m->pin);
    m->state = MOUNT_UNPINNED;
    m->follow.lost = true;
    fetch_drop(m);
    wake_all(m);
    fetch_pin(m);
}

bool follow_repinned(struct mount *m, uint32_t pin, const struct frame_entry *e)
{
    if (!m->follow.lost || !id_same(&e->lineage, &m->lineage))
        return false;
    m->state = MOUNT_ASKED; /* the pin is none yet */
    go_on(m, pin, &(struct later){.epoch = e->epoch, .size = e->size, .mtime = e->committed_at}, NULL);
    return true;
}
