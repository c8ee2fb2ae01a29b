/* Eviction: a mount whose viewers set a bound (resident=) has no more than that here and under way.
 *
 * Whenever pages are asked for, as many of those that came first are taken out before, some more at a time than needed,
 * so that it is not done for every fault. A page that is taken out is a hole again, as if it had never come: the
 * next fault or call asks for it. Nothing waits for it: of a pull it holds what the remote has.
 *
 *     missing --asked--> asked --DATA--> here (in the queue) --evicted--> missing
 *
 * - Threads in mappings need no care. The kernel takes the page out of every page table before it goes, and who touches
 * it next faults.
 * - Calls read the memfd itself, where a hole reads as zeros. They look at view.punches before and after
 * (wire/shared.h), which is odd as long as pages go.
 * - The background stops where the bound is reached for the first time: what it brought would push out what is used.
 * From then on only who walks through the region, by faults or calls, or asks for it (MADV_WILLNEED) is read ahead for,
 * by up to a quarter of the bound.
 * - When the remote's epoch is lost, what was evicted cannot be had again: it is poisoned like what never came.
 *
 * What is written to may be nowhere else: evict_written.c.
 *
 * The queue is only an order. If it cannot grow, or a view that was unbounded or another agent's gets a bound, it is
 * made anew from what is here. */
#include "agent/page/mount.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>

#define BOUND_MIN (4u << 20) /* the windows of a few threads, and what a call reads at a time */

uint32_t evict_moves(const struct control_open *how, bool eager)
{
    uint32_t follows = how->follow ? VIEW_MOVES | VIEW_FOLLOWS : 0;
    return eager ? 0 : follows | (how->resident || how->mode == CONTROL_MIRROR ? VIEW_MOVES : 0);
}

void evict_free(struct mount *m)
{
    free(m->evict.queue);
    m->evict.queue = NULL;
    hashes_free(&m->evict.came);
}

void evict_bound(struct mount *m)
{
    uint64_t least = 0;
    for (const struct viewer *v = m->viewers; v; v = v->next_mount)
        if (v->resident && (!least || v->resident < least))
            least = v->resident;
    if (!m->viewers || m->eager || !m->shared->moves || m->evict.huge)
        return;
    least = least && least < BOUND_MIN ? BOUND_MIN : least;
    m->evict.bound = least / PAGE_SIZE;
    m->evict.full = m->evict.pressed = false;
    evict_room(m, 0);
}

void evict_queue(struct eviction *e, struct filled f)
{
    struct filled *last = e->n ? &e->queue[(e->first + e->n - 1) % e->cap] : NULL;
    if (last && last->to == f.from && f.to - last->from <= PLAN_WINDOW) {
        last->to = f.to;
        return;
    }
    if (e->n == e->cap) {
        size_t cap = e->cap ? e->cap * 2 : 64;
        struct filled *more = malloc(cap * sizeof *more);
        if (!more) {
            e->anew = true;
            return;
        }
        for (size_t i = 0; i < e->n; i++)
            more[i] = e->queue[(e->first + i) % e->cap];
        free(e->queue);
        e->queue = more;
        e->first = 0;
        e->cap = cap;
    }
    e->queue[(e->first + e->n++) % e->cap] = f;
}

static struct filled queue_take(struct eviction *e)
{
    struct filled f = e->queue[e->first];
    e->first = (e->first + 1) % e->cap;
    e->n--;
    return f;
}

void evict_filled(struct mount *m, uint64_t from, uint64_t to)
{
    if (!m->evict.bound)
        return;
    evict_queue(&m->evict, (struct filled){from, to});
    evict_room(m, 0);
}

static void queue_anew(struct mount *m)
{
    m->evict.n = 0;
    m->evict.anew = false;
    for (uint64_t at = 0; (at = pages_hole_end(&m->pages, at, m->pages.count)) < m->pages.count;) {
        uint64_t end = pages_hole(&m->pages, at, at + PLAN_WINDOW < m->pages.count ? at + PLAN_WINDOW : m->pages.count);
        evict_queue(&m->evict, (struct filled){at, end});
        at = end;
    }
}

void evict_keep(struct mount *m, uint64_t from, uint64_t to)
{
    struct eviction *e = &m->evict;
    uint64_t most = e->bound / 8; /* all of them no more than half of it */
    if (e->bound && from < to)
        e->kept[e->kept_turn++ % 4] = (struct filled){from, to - from < most ? to : from + most};
}

static bool is_kept(const struct eviction *e, struct filled f)
{
    for (size_t i = 0; i < 4; i++)
        if (f.from < e->kept[i].to && e->kept[i].from < f.to)
            return true;
    return false;
}

int mount_punch(struct mount *m, uint64_t from, uint64_t to)
{
    for (uint64_t end; (from = pages_hole_end(&m->pages, from, to)) < to; from = end) {
        end = pages_hole(&m->pages, from, to);
        off_t at = (off_t)(from * PAGE_SIZE), len = (off_t)((end - from) * PAGE_SIZE);
        if (fallocate(m->memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, at, len))
            return -errno;
        pages_lose(&m->pages, from, end);
    }
    return 0;
}

void evict_room(struct mount *m, uint64_t pages)
{
    struct eviction *e = &m->evict;
    if (!e->bound || m->state == MOUNT_FAILED || m->pages.have_n + m->pages.asked_n + pages <= e->bound)
        return;
    uint64_t before = m->pages.have_n, over = m->pages.have_n + m->pages.asked_n + pages - e->bound;
    over += e->bound / 16 < EVICT_MORE ? e->bound / 16 : EVICT_MORE; /* so that it is not one by one */
    e->full = true;
    if (m->body && e->pressed)
        return;
    if (e->anew || !e->n)
        queue_anew(m);
    view_punch_begin(m->shared);
    uint64_t spared = 0;
    bool can = !m->body || evict_written_can(m);
    for (size_t left = e->n; can && left && before - m->pages.have_n < over; left--) {
        struct filled f = queue_take(e);
        if (is_kept(e, f) && spared + (f.to - f.from) <= e->bound / 2) {
            spared += f.to - f.from;
            evict_queue(e, f);
        } else if (m->body) {
            evict_written(m, f);
        } else {
            mount_punch(m, f.from, f.to);
        }
    }
    view_punch_end(m->shared);
    e->evicted += (before - m->pages.have_n) * PAGE_SIZE;
    e->pressed = m->body && before - m->pages.have_n < over;
}

void evict_lead(struct mount *m, uint64_t from, uint64_t to)
{
    struct eviction *e = &m->evict;
    uint64_t most = to - from < e->bound / 4 ? to - from : e->bound / 4;
    e->lead = from;
    e->lead_to = from + most < mount_pages(m) ? from + most : mount_pages(m);
    e->walked = from;
}

void evict_walk(struct mount *m, uint64_t at)
{
    struct eviction *e = &m->evict;
    bool on = at > e->walked && at - e->walked <= 2 * PLAN_WINDOW;
    e->ahead = !on ? 0 : e->ahead ? e->ahead * 2 : PLAN_WINDOW;
    e->ahead = e->ahead < e->bound / 4 ? e->ahead : e->bound / 4;
    evict_lead(m, at, at + e->ahead < m->pages.count ? at + e->ahead : m->pages.count);
}

/* What is asked for goes before what is here: never more than half, or pages would go as they come. */
bool evict_can_ask(const struct mount *m)
{
    const struct eviction *e = &m->evict;
    if (!e->bound)
        return true;
    if (m->body && evict_written_must(m))
        return false;
    return m->pages.asked_n <= e->bound / 2;
}

bool evict_next(struct mount *m, uint64_t *from, uint64_t *to)
{
    struct eviction *e = &m->evict;
    e->full |= e->bound && m->pages.have_n + m->pages.asked_n + PLAN_WINDOW > e->bound;
    struct pages theirs = mount_theirs(m);
    if (!e->full)
        return plan_next(&m->plan, &theirs, from, to);
    e->lead_to = e->lead_to < mount_pages(m) ? e->lead_to : mount_pages(m); /* it may have been cut */
    *from = e->lead < e->lead_to ? pages_gap(&m->pages, e->lead, e->lead_to) : e->lead_to;
    if (*from >= e->lead_to || m->pages.asked_n > e->bound / 4)
        return false;
    uint64_t end = *from + PLAN_WINDOW < e->lead_to ? *from + PLAN_WINDOW : e->lead_to;
    *to = pages_gap_end(&m->pages, *from, end);
    e->lead = *to; /* once: what has gone again was not wanted */
    return true;
}
