/* Groups: when captures run, how their epochs travel, who waits for what, and what happens when the remote cannot be
 * had.
 *
 * A group is in order while its queue drains. It is `degraded` from the moment a sync point had to be let go without
 * its acknowledgement (time over, or the remote said no); then sync points are not held, dirty pages stay in the page
 * tables, and once the remote is back captures run in passes until one was not overtaken (capture.h). The first epoch
 * that becomes durable with nothing behind it ends the state. */
#include "agent/sync/capture.h"
#include "agent/sync/reconcile.h"
#include "agent/base/log.h"
#include "agent/page/page.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

uint64_t group_now(const struct group *g)
{
    return uv_now(g->link->local->loop);
}

struct group *group_of(struct link *k, const char *name)
{
    for (struct group *g = k->groups; g && *name; g = g->next)
        if (g->name && !g->merged && !strcmp(g->name, name))
            return g;
    struct group *g = calloc(1, sizeof *g);
    if (!g)
        return NULL;
    g->link = k;
    g->name = *name ? strdup(name) : NULL;
    g->stream = ++k->next_stream;
    g->last_sync = uv_now(k->local->loop);
    g->next = k->groups;
    k->groups = g;
    return g;
}

void group_add(struct group *g, struct region *r)
{
    r->group = g;
    r->next_group = g->regions;
    g->regions = r;
}

static void waiter_free(struct waiter **at, int result)
{
    struct waiter *w = *at;
    *at = w->next;
    if (w->answer)
        answer_drop(w->answer, result);
    free(w);
}

void group_free(struct group *g)
{
    while (g->queue) {
        struct epoch *e = g->queue;
        g->queue = e->next;
        epoch_free(e);
    }
    while (g->ops) {
        struct op *o = g->ops;
        g->ops = o->next;
        body_drop(o->body);
        free(o);
    }
    while (g->waiters)
        waiter_free(&g->waiters, 0);
    free(g->name);
    free(g);
}

/* ---- waiting ---- */

static bool seq_done(const struct group *g, uint64_t seq, uint8_t ack)
{
    for (const struct epoch *e = g->queue; e && e->seq <= seq && ack != CONTROL_ACK_ASYNC; e = e->next)
        if (ack == CONTROL_ACK_DURABLE || !e->received)
            return false;
    return true;
}

static bool takes_part(const struct group *g)
{
    for (const struct region *r = g->regions; r; r = r->next_group)
        if (r->body && region_takes_part(r))
            return true;
    return g->ops || g->queue;
}

static bool fenced(const struct group *g)
{
    for (const struct region *r = g->regions; r; r = r->next_group)
        if (r->attach == ATTACH_FENCED)
            return true;
    return false;
}

void group_settle(struct group *g)
{
    bool none = !takes_part(g) && !g->capture, bad = fenced(g);
    for (struct waiter **at = &g->waiters; *at;) {
        struct waiter *w = *at;
        int attached = w->kind == WAIT_ATTACH ? mirror_attached(w->region) : 1;
        if (attached <= 0) {
            waiter_free(at, attached);
            continue;
        }
        if (w->kind == WAIT_ATTACH) {
            at = &w->next;
            continue;
        }
        bool maps = w->kind == WAIT_RETIRE || w->kind == WAIT_BYE;
        if (bad && w->kind == WAIT_SYNC)
            waiter_free(at, -EIO);
        else if (w->captured && seq_done(g, w->seq, w->ack))
            waiter_free(at, 0);
        else if (w->scanned && (w->scan_only || (maps && g->degraded && w->loss != CONTROL_LOSS_BLOCK)))
            waiter_free(at, 0);
        else if (none && (!maps || w->scanned || !g->regions))
            waiter_free(at, 0);
        else
            at = &w->next;
    }
}

/* A sync point that returns without its acknowledgement lets the program store on: what is being read would be a
 * mixture. */
static void let_go(struct group *g, struct waiter **at)
{
    int result = (*at)->loss == CONTROL_LOSS_FAIL ? -EIO : 0;
    if (g->capture)
        g->tainted = true;
    g->wanted = true; /* a look as good as its own is owed */
    waiter_free(at, result);
}

/* What is left to read is little: one more wait of the programs ends their running ahead of the remote. */
static bool last_pass(const struct group *g)
{
    return g->capture && g->capture->final;
}

void waiter_new(struct group *g, enum waiter_kind kind, struct answer *a, const struct program *p, uint8_t ack,
                uint64_t addr, uint64_t len, bool scan_only)
{
    struct waiter *w = calloc(1, sizeof *w);
    if (!w) {
        if (a)
            answer_drop(a, -ENOMEM);
        return;
    }
    g->all_async = kind == WAIT_SYNC && ack == CONTROL_ACK_ASYNC;
    *w = (struct waiter){
        .kind = kind, .answer = a, .ack = ack, .scan_only = scan_only, .addr = addr, .len = len, .since = group_now(g)};
    w->loss = p ? p->loss : CONTROL_LOSS_CONTINUE;
    w->timeout_ms = p ? p->timeout_ms : UINT64_MAX;
    struct waiter **at = &g->waiters;
    while (*at)
        at = &(*at)->next;
    *at = w;
    g->last_sync = group_now(g);
    if (g->degraded && kind == WAIT_SYNC && w->loss != CONTROL_LOSS_BLOCK && !last_pass(g))
        let_go(g, at);
    group_kick(g);
}

void waiter_attach(struct group *g, struct answer *a, const struct program *p, const struct region *r)
{
    struct waiter *w = calloc(1, sizeof *w);
    if (!w) {
        answer_drop(a, -ENOMEM);
        return;
    }
    *w = (struct waiter){.kind = WAIT_ATTACH, .answer = a, .region = r, .next = g->waiters, .since = group_now(g)};
    w->scan_only = w->assigned = w->scanned = w->captured = true;
    w->loss = p->loss;
    w->timeout_ms = p->timeout_ms;
    g->waiters = w;
    group_settle(g);
}

void group_forget_program(struct group *g, const struct program *p)
{
    for (struct waiter *w = g->waiters; w; w = w->next)
        if (w->answer && w->answer->program == p) {
            answer_drop(w->answer, 0);
            w->answer = NULL;
        }
}

void group_degrade(struct group *g, const char *format, ...)
{
    va_list ap;
    va_start(ap, format);
    vsnprintf(g->reason, sizeof g->reason, format, ap);
    va_end(ap);
    if (!g->degraded) {
        g->degraded = true;
        g->degraded_since = group_now(g);
        g->degraded_at = (int64_t)time(NULL);
    }
    if (!g->said) {
        g->said = true;
        group_notice(g,
                     "%s: %s; the program runs on, its changes are kept here and sent when that is over (`memsync "
                     "status` tells)",
                     g->link->address, g->reason);
    }
    for (struct waiter **at = &g->waiters; *at;) {
        struct waiter *w = *at;
        if (w->kind == WAIT_SYNC && w->loss != CONTROL_LOSS_BLOCK)
            let_go(g, at);
        else
            at = &w->next;
    }
    group_kick(g);
}

void group_recover(struct group *g)
{
    if ((!g->degraded && !g->said) || g->queue || g->capture || g->link->state != LINK_UP || g->compare)
        return;
    bool all = true; /* not so when a region was refused or fenced meanwhile, which was said */
    for (struct region *r = g->regions; r; r = r->next_group) {
        if (r->body && region_takes_part(r) && (r->body->unknown || r->body->refetch || r->body->dirty.count))
            return;
        all &= !r->body || region_takes_part(r);
    }
    g->degraded = false;
    g->retry_ms = 0;
    if (g->said && all)
        group_notice(g, "%s: caught up: the remote has everything again", g->link->address);
    g->said = false;
    g->reason[0] = 0;
}

/* ---- captures ---- */

/* Ready: its epochs can be numbered, whether or not the remote can be had right now. */
static bool region_ready(const struct region *r)
{
    if (!region_takes_part(r) || (!r->body && r->attach != ATTACH_ASKED))
        return true;
    if (r->attach == ATTACH_DONE)
        return !r->body || !r->body->mount || !r->body->refetch;
    return r->link->state != LINK_UP && r->held_before && r->body && !r->body->refetch && !id_none(&r->body->lineage);
}

static bool ready(const struct group *g)
{
    for (const struct region *r = g->regions; r; r = r->next_group)
        if (!region_ready(r))
            return false;
    for (const struct op *o = g->ops; o; o = o->next)
        if (o->to && o->to->attach != ATTACH_DONE)
            return false;
    return true;
}

static bool wants(const struct group *g, bool *scan)
{
    bool publish = g->wanted || g->due;
    *scan = false;
    for (const struct waiter *w = g->waiters; w; w = w->next) {
        if (w->kind == WAIT_ATTACH)
            continue;
        publish |= !w->captured && !(w->scan_only && w->scanned);
        *scan |= !w->scanned && w->kind != WAIT_SYNC && w->kind != WAIT_TOOL;
    }
    return publish || *scan;
}

static bool merge_due(struct group *g)
{
    if (!g->merging)
        return false;
    struct group *other = g->merging;
    if (g->capture || other->capture)
        return true;
    g->merging = other->merging = NULL;
    group_merge(g, other);
    return true;
}

void group_kick(struct group *g)
{
    bool scan;
    if (merge_due(g) || g->capture || reconcile_reads(g->link, g))
        return;
    group_settle(g);
    if (!wants(g, &scan))
        return;
    bool can = ready(g) && !g->compare && group_now(g) >= g->retry_at && group_queue_bytes(g) <= GROUP_KEEP &&
               !(g->degraded && g->link->state != LINK_UP) && !g->link->broken;
    if (can) {
        enum capture_kind kind = g->wanted ? CAPTURE_PUBLISH : CAPTURE_CLOCK;
        g->wanted = g->due = false;
        capture_start(g, kind);
    } else if (scan || (g->due && g->degraded)) { /* by the clock: so that it can be said how much is behind */
        g->due = false;
        capture_start(g, CAPTURE_SCAN);
    }
}

void group_captured(struct group *g)
{
    for (struct waiter *w = g->waiters; w; w = w->next)
        if (!w->captured)
            w->assigned = false;
    group_pump(g);
    for (struct region *r = g->regions; r; r = r->next_group)
        if (r->body && r->body->mount)
            page_published(r->body, false);
    group_settle(g);
    group_recover(g);
    group_kick(g);
    reconciles_step(g);
}

/* Two groups that came to share a program become one, of the first's name and stream. The second's epochs stay in their
 * order; what was sent on its stream is awaited before anything goes out on the first's (group_pump). Waits for
 * captures under way. */
struct group *group_merge(struct group *a, struct group *b)
{
    if (a == b || a->merging || b->merging || a->merged || b->merged)
        return a;
    if (a->capture || b->capture) {
        a->merging = b;
        b->merging = a;
        return a;
    }
    while (b->regions) {
        struct region *r = b->regions;
        b->regions = r->next_group;
        group_add(a, r);
    }
    for (struct program *p = a->link->local->programs; p; p = p->next)
        if (p->group == b)
            p->group = a;
    struct epoch **at = &a->queue;
    while (b->queue) {
        while (*at && (*at)->seq < b->queue->seq)
            at = &(*at)->next;
        struct epoch *e = b->queue;
        b->queue = e->next;
        e->next = *at;
        *at = e;
    }
    struct op **op = &a->ops;
    while (*op)
        op = &(*op)->next;
    *op = b->ops;
    struct waiter **w = &a->waiters;
    while (*w)
        w = &(*w)->next;
    *w = b->waiters;
    a->wanted |= b->wanted;
    a->due |= b->due;
    a->compare |= b->compare;
    if (b->degraded && !a->degraded) {
        a->degraded = true;
        a->degraded_since = b->degraded_since;
        a->degraded_at = b->degraded_at;
        a->said = b->said;
        memcpy(a->reason, b->reason, sizeof a->reason);
    }
    b->ops = NULL;
    b->waiters = NULL;
    b->merged = true; /* freed by the clock: somebody may be walking along the groups */
    group_kick(a);
    return a;
}

void group_op(struct group *g, uint8_t kind, struct region *region, struct region *to, struct body *body)
{
    struct op *o = calloc(1, sizeof *o), **at = &g->ops;
    if (!o)
        return;
    body_hold(body);
    *o = (struct op){.kind = kind, .region = region, .to = to, .body = body};
    while (*at)
        at = &(*at)->next;
    *at = o;
    g->wanted = true;
}

void group_step(struct group *g)
{
    group_pump(g);
    group_settle(g);
    group_recover(g);
    if (g->capture)
        capture_resume(g->capture);
    group_kick(g);
}

/* ---- time ---- */

static uint64_t interval_of(const struct group *g)
{
    uint64_t least = 0;
    for (const struct region *r = g->regions; r; r = r->next_group)
        if (r->body && r->body->uses && region_takes_part(r) && r->terms.interval_ms &&
            (!least || r->terms.interval_ms < least))
            least = r->terms.interval_ms;
    return least;
}

static void time_over(struct group *g, uint64_t now)
{
    bool moving = g->link->state == LINK_UP && g->queue && !g->compare && g->queue->kept;
    for (struct waiter **at = &g->waiters; *at;) {
        struct waiter *w = *at;
        uint64_t base = w->since;
        if (moving && g->link->moved > base)
            base = g->link->moved;
        if (moving && g->last_ack > base)
            base = g->last_ack;
        if (w->timeout_ms == UINT64_MAX || now - base < w->timeout_ms) {
            at = &w->next;
            continue;
        }
        if (w->kind == WAIT_ATTACH) {
            waiter_free(at, -ETIMEDOUT);
            continue;
        }
        if (w->loss == CONTROL_LOSS_BLOCK) {
            if (!g->said)
                group_notice(
                    g, "%s: not acknowledged within %.3g s (%s); the program waits, as MEMSYNC_ON_LOSS=block says",
                    g->link->address, (double)w->timeout_ms / 1000, g->link->reason[0] ? g->link->reason : "no answer");
            g->said = true;
            at = &w->next;
            continue;
        }
        if (!g->degraded) {
            double s = (double)w->timeout_ms / 1000;
            if (g->link->state != LINK_UP)
                group_degrade(g, "no link for %.3g s (%s)", s, g->link->reason[0] ? g->link->reason : "not connected");
            else
                group_degrade(g, "not acknowledged within %.3g s", s);
            at = &g->waiters;
            continue;
        }
        if (w->kind == WAIT_RETIRE && !w->scanned) {
            at = &w->next; /* the scan is ours to do and short */
            continue;
        }
        let_go(g, at);
    }
}

/* Nobody waits, but the link has been down for as long as anybody would have. */
static void long_down(struct group *g, uint64_t now)
{
    uint64_t patience = UINT64_MAX;
    for (const struct region *r = g->regions; r; r = r->next_group)
        for (const struct use *u = r->body && region_takes_part(r) ? r->body->uses : NULL; u; u = u->next_body)
            if (u->program->timeout_ms < patience)
                patience = u->program->timeout_ms;
    if (patience != UINT64_MAX && !g->degraded && g->link->state != LINK_UP && now - g->link->down_since >= patience)
        group_degrade(g, "no link for %.3g s (%s)", (double)patience / 1000,
                      g->link->reason[0] ? g->link->reason : "not connected");
}

void group_tick(struct group *g, uint64_t now)
{
    time_over(g, now);
    long_down(g, now);
    for (struct region *r = g->regions; r; r = r->next_group)
        mirror_look(r);
    if (g->link->state == LINK_UP && now >= g->retry_at)
        for (struct region *r = g->regions; r; r = r->next_group)
            if (((r->attach == ATTACH_LOOSE && (r->body || r->held_before || r->doomed)) ||
                 (r->attach == ATTACH_REFUSED && r->retry_at)) &&
                now >= r->retry_at)
                link_attach(r);
    uint64_t interval = interval_of(g);
    if (interval && now - g->last_sync >= interval) {
        g->last_sync = now;
        g->due = true;
    }
    if (g->degraded && g->link->state == LINK_UP && now >= g->retry_at)
        g->wanted = true;
    if (!g->capture)
        group_kick(g);
}
