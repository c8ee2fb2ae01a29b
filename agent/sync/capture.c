#include "agent/sync/capture.h"
#include "agent/base/job.h"
#include "agent/base/log.h"
#include "agent/page/page.h"

#include <errno.h>
#include <stdlib.h>

#define SMALL_PASS (16u << 20) /* what is read while degraded programs are made to wait once */
#define EXTENTS_MANY 4096u
#define SCAN_RETRY_MS 20u           /* a dying program is soon seen to be gone */
#define AT_ONCE_MAPPED (128u << 20) /* scanned in some 60 us, and */
#define AT_ONCE_READ (128u << 10)   /* read in as much: then the loop does it itself */
#define AT_ONCE_PARTS 16u
#define QUEUED_HIGH (2u << 20) /* given to the connection and not yet gone: reading waits */

static void read_done(void *arg);
static void scan_done(void *arg);

static void hold_program(struct capture *c, struct program *p)
{
    program_hold(p);
    c->held[c->nheld++] = p;
}

static int part_fill(struct capture *c, struct part *p, struct region *r)
{
    struct body *b = r->body;
    size_t maps = 0, marks = 0;
    for (struct use *u = b->uses; u; u = u->next_body) {
        maps += u->nmaps;
        marks += u->marks != NULL;
    }
    *p = (struct part){.region = r, .body = b, .handle = r->handle, .min_size = UINT64_MAX};
    body_hold(b);
    p->maps = calloc(maps + 1, sizeof *p->maps);
    p->owners = calloc(maps + 1, sizeof(struct program *));
    p->marks = calloc(marks + 1, sizeof(struct marks *));
    if (!p->maps || !p->owners || !p->marks)
        return -ENOMEM;
    for (struct use *u = b->uses; u; u = u->next_body) {
        if (u->marks)
            p->marks[p->nmarks++] = u->marks;
        for (size_t i = 0; i < u->nmaps; i++) {
            p->owners[p->nmaps] = u->program;
            p->maps[p->nmaps++] = u->maps[i];
        }
        if (c->scan_only)
            continue;
        p->by_hash |= u->hashed == CONTROL_HASHED_ALL || (u->hashed == CONTROL_HASHED_EVENTS && !c->clock);
        p->glance |= u->hashed == CONTROL_HASHED_EVENTS && c->clock;
        p->everything |= u->program->watch;
    }
    if (!c->scan_only) {
        p->watch = b->watch;
        p->everything |= b->unknown; /* a program that dies from now on makes it unknown again */
        b->unknown = false;
    }
    return 0;
}

static void parts_free(struct capture *c)
{
    for (size_t i = 0; i < c->nparts; i++) {
        struct part *p = &c->parts[i];
        free(p->maps);
        free(p->owners);
        free(p->marks);
        extents_free(&p->found);
        extents_free(&p->todo);
        extents_free(&p->published);
        moves_free(p->moves);
        body_drop(p->body);
    }
    free(c->parts);
    c->parts = NULL;
    c->nparts = c->part = 0;
    for (size_t i = 0; i < c->nheld; i++)
        program_drop(c->held[i]);
    free(c->held);
    c->held = NULL;
    c->nheld = 0;
}

/* A later pass leaves out what came, or was renamed, after the epoch was opened. */
static bool joins_pass(const struct capture *c, const struct region *r)
{
    if (c->pass == 1)
        return true;
    return r->attach == ATTACH_DONE && r->body->created && (!r->body->moved || epoch_touched(c->epoch, r->body));
}

static bool short_scan(const struct capture *c)
{
    uint64_t mapped = 0;
    for (size_t i = 0; i < c->nparts; i++) {
        const struct part *p = &c->parts[i];
        if (p->everything || p->by_hash)
            return false;
        for (size_t m = 0; m < p->nmaps; m++)
            mapped += p->maps[m].ops->reads_all ? AT_ONCE_MAPPED + 1 : p->maps[m].len;
    }
    return c->nparts <= AT_ONCE_PARTS && mapped <= AT_ONCE_MAPPED;
}

/* One pass: everything that the group now has. */
static int pass_start(struct capture *c)
{
    struct group *g = c->group;
    size_t regions = 0, programs = 0;
    for (struct region *r = g->regions; r; r = r->next_group)
        regions += r->body && region_takes_part(r);
    for (struct program *p = g->link->local->programs; p; p = p->next)
        programs++;
    c->parts = calloc(regions + 1, sizeof *c->parts);
    c->held = calloc(programs + 1, sizeof(struct program *));
    int rc = c->parts && c->held ? 0 : -ENOMEM;
    for (struct program *p = g->link->local->programs; p && !rc; p = p->next)
        hold_program(c, p);
    c->pass++;
    c->clock &= c->pass == 1;
    for (const struct waiter *w = g->waiters; w; w = w->next)
        c->clock &= w->captured;
    if (c->pass == 1 && !c->scan_only) {
        c->ops = g->ops;
        g->ops = NULL;
    }
    for (struct region *r = g->regions; r && !rc; r = r->next_group)
        if (r->body && region_takes_part(r) && joins_pass(c, r))
            rc = part_fill(c, &c->parts[c->nparts++], r);
    c->phase = CAPTURE_SCANNING;
    g->tainted = false;
    for (struct waiter *w = g->waiters; w; w = w->next)
        if (!w->captured && !(c->scan_only && w->kind == WAIT_SYNC))
            w->assigned = true;
    if (rc)
        return rc;
    c->at_once = short_scan(c);
    if (!c->at_once)
        return job_run(g->link->local->loop, capture_scan, scan_done, c);
    capture_scan(c);
    scan_done(c);
    return 0;
}

static void capture_end(struct capture *c)
{
    struct group *g = c->group;
    parts_free(c);
    if (!c->scan_only && !c->aborted)
        log_debug("capture %s regions=%zu scan=%llu us read=%llu us pages=%llu bytes=%llu passes=%u", g->link->address,
                  c->nparts, (unsigned long long)c->scan_us, (unsigned long long)c->read_us,
                  (unsigned long long)c->pages, (unsigned long long)c->bytes, c->pass);
    g->capture = NULL;
    free(c);
    group_captured(g);
}

int capture_start(struct group *g, enum capture_kind kind)
{
    struct capture *c = calloc(1, sizeof *c);
    if (!c)
        return -ENOMEM;
    c->group = g;
    c->scan_only = kind == CAPTURE_SCAN;
    c->clock = kind == CAPTURE_CLOCK;
    g->capture = c;
    bodies_trim(g->link->local);
    int rc = pass_start(c);
    if (rc) {
        log_error("capture: %s", strerror(-rc));
        parts_free(c);
        g->capture = NULL;
        free(c);
        for (struct waiter *w = g->waiters; w; w = w->next)
            w->assigned = w->captured;
    }
    return rc;
}

/* What was taken out of page tables and marks, and will not be sent now, stays with the bodies. */
static void give_back(struct capture *c, bool hashes_wrong)
{
    for (size_t i = 0; i < c->nparts; i++) {
        struct part *p = &c->parts[i];
        extents_move(&p->body->dirty, &p->found);
        extents_move(&p->body->dirty, &p->todo);
        if (p->body->dirty.count > EXTENTS_MANY) /* looked at again and again while the remote is away */
            extents_settle(&p->body->dirty, INT64_MAX);
        if (p->min_size < p->body->min_size)
            p->body->min_size = p->min_size;
        if (p->cut < p->from_size && p->cut < p->body->min_size)
            p->body->min_size = p->cut;
        p->body->unknown |= p->everything;
        if (p->body->dirty.lost)
            p->body->unknown = true;
        p->body->dirty.lost = false;
        if (hashes_wrong) {
            p->body->refetch = true;
            p->region->attach = p->region->attach == ATTACH_DONE ? ATTACH_LOOSE : p->region->attach;
        }
    }
}

static void capture_fail(struct capture *c)
{
    struct group *g = c->group;
    c->aborted = true;
    bool sent = c->epoch != NULL;
    give_back(c, sent);
    if (c->ops) {
        struct op **at = &c->ops;
        while (*at)
            at = &(*at)->next;
        *at = g->ops;
        g->ops = c->ops;
        c->ops = NULL;
    }
    if (sent) { /* the queue's last is ours: it will never be whole */
        struct epoch **at = &g->queue;
        while (*at != c->epoch)
            at = &(*at)->next;
        *at = NULL;
        if (c->epoch->begun && g->link->conn) {
            struct buf *b = buf_new(8);
            if (b) {
                put_u64(b->data, c->epoch->seq);
                b->len = 8;
                conn_send(g->link->conn, c->epoch->stream, FRAME_ABORT, b);
            }
        }
        for (size_t i = 0; i < c->epoch->ntouched; i++) {
            struct body *b = c->epoch->touched[i].body;
            b->refetch = true;
            if (b->region && b->region->attach == ATTACH_DONE)
                b->region->attach = ATTACH_LOOSE;
        }
        epoch_free(c->epoch);
    }
    for (struct waiter *w = g->waiters; w; w = w->next)
        w->assigned = w->captured;
    capture_end(c);
}

static void retire_maps(struct group *g)
{
    for (struct waiter *w = g->waiters; w; w = w->next) {
        if (!w->assigned || w->scanned)
            continue;
        w->scanned = true;
        if ((w->kind != WAIT_RETIRE && w->kind != WAIT_BYE) || !w->answer)
            continue;
        for (struct use *u = w->answer->program->uses; u; u = u->next_program) {
            if (!u->body->region || u->body->region->group != g)
                continue;
            if (w->kind == WAIT_RETIRE)
                use_retire(u, w->addr, w->len);
            else
                u->left = true;
        }
    }
}

/* Into the epoch's head go the names' changes; each one that concerns a body counts as touching it. */
static int take_ops(struct capture *c)
{
    struct group *g = c->group;
    int rc = 0;
    while (c->ops && !rc) {
        struct op *o = c->ops;
        struct frame_op f = {.kind = o->kind, .handle = o->region->handle, .to = o->to ? o->to->handle : 0};
        f.lineage = o->body->lineage;
        f.source = o->body->source;
        if (o->kind == FRAME_OP_CREATE) {
            o->body->epoch = 0;
            o->body->created = true;
        }
        struct buf *b = buf_new(64);
        if (b)
            b->len = (uint32_t)frame_op_put(b->data, b->cap, &f);
        rc = epoch_add(c->epoch, FRAME_OP, b);
        if (!rc && o->kind == FRAME_OP_UNLINK)
            rc = epoch_touch(c->epoch, o->region, o->body, 0);
        if (o->kind == FRAME_OP_RENAME) { /* the handle follows the region: the names swap theirs */
            uint32_t handle = o->region->handle;
            o->region->handle = ++g->link->next_handle;
            o->region->attach = ATTACH_LOOSE;
            o->to->handle = handle;
        }
        c->ops = o->next;
        body_drop(o->body);
        free(o);
    }
    return rc;
}

static int epoch_open(struct capture *c)
{
    struct group *g = c->group;
    c->epoch = epoch_new(++g->link->next_seq);
    if (!c->epoch)
        return -ENOMEM;
    struct epoch **at = &g->queue;
    while (*at)
        at = &(*at)->next;
    *at = c->epoch;
    return take_ops(c);
}

/* States the region's number and sizes, before its first pages and again when a later pass found another size. */
static int announce(struct capture *c, struct part *p)
{
    struct body *b = p->body;
    struct touched *t = epoch_touched(c->epoch, b);
    p->announce = false;
    if (!t) {
        b->epoch++;
        int rc = epoch_touch(c->epoch, p->region, b, b->epoch);
        if (rc)
            return rc;
        region_reserve(p->region);
    }
    struct frame_region f = {
        .handle = p->handle, .epoch = b->epoch, .base = b->epoch - 1, .fence = p->region->fence, .min_size = p->cut, .size = p->size};
    struct buf *buf = buf_new(64);
    if (buf)
        buf->len = (uint32_t)frame_region_put(buf->data, buf->cap, &f);
    return epoch_add(c->epoch, FRAME_REGION, buf);
}

static void read_next(struct capture *c)
{
    c->phase = CAPTURE_READING;
    if (c->at_once) {
        capture_read(c);
        read_done(c);
    } else if (job_run(c->group->link->local->loop, capture_read, read_done, c)) {
        c->err = -ENOMEM;
        capture_fail(c);
    }
}

static bool begin_reading(struct capture *c)
{
    uint64_t todo = 0;
    if (c->pass == 1 && (c->err = epoch_open(c)))
        return false;
    for (size_t i = 0; i < c->nparts; i++) {
        struct part *p = &c->parts[i];
        struct body *b = p->body;
        struct touched *t = epoch_touched(c->epoch, b);
        p->handle = t ? t->region->handle : p->region->handle;
        extents_move(&p->todo, &b->dirty);
        extents_move(&p->todo, &p->found);
        p->from_size = b->size;
        p->cut = p->min_size < b->min_size ? p->min_size : b->min_size;
        if (p->size < p->cut)
            p->cut = p->size;
        if (p->cut >= b->size)
            p->cut = UINT64_MAX; /* it never was smaller than it is there */
        p->announce = p->cut != UINT64_MAX || p->size != b->size || (b->created && !b->epoch) || b->moved;
        p->plain = b->plain || c->group->link->foreign;
        b->captured_at = uv_now(c->group->link->local->loop);
        b->moved = false;
        b->min_size = UINT64_MAX;
        b->size = p->size;
        b->killed &= b->unknown;
        if (p->everything || (!p->glance && (p->by_hash || p->nmaps || p->nmarks))) { /* its stamps stand for its content */
            b->stat_mtime = p->mtime;
            b->stat_ctime = p->ctime;
            b->stat_seen = p->seen;
        }
        p->todo_bytes = extents_bytes(&p->todo);
        todo += p->todo_bytes;
    }
    c->final = todo <= SMALL_PASS;
    c->at_once &= todo <= AT_ONCE_READ;
    return true;
}

static void scan_done(void *arg)
{
    struct capture *c = arg;
    int err = 0;
    for (size_t i = 0; i < c->nparts; i++) {
        struct part *p = &c->parts[i];
        if (!p->err)
            continue;
        err = p->err;
        log_info("%s: scan: %s", p->region->name, strerror(-p->err));
        p->body->unknown = p->body->killed = true;
        if (p->failed)
            program_check(p->failed);
    }
    if (err && (!c->scan_only || c->aborted)) {
        c->group->retry_at = uv_now(c->group->link->local->loop) + SCAN_RETRY_MS;
        capture_fail(c);
        return;
    }
    retire_maps(c->group);
    if (c->scan_only || c->aborted) {
        give_back(c, false);
        if (c->aborted && c->epoch)
            capture_fail(c);
        else
            capture_end(c);
        return;
    }
    if (!begin_reading(c)) {
        capture_fail(c);
        return;
    }
    read_next(c);
}

/* The pages of a slice into the epoch. */
static int take_out(struct capture *c)
{
    int rc = 0;
    for (size_t i = 0; i < c->nout; i++) {
        if (!rc && (!epoch_touched(c->epoch, c->out_part[i]->body) || c->out_part[i]->announce))
            rc = announce(c, c->out_part[i]);
        if (rc) {
            buf_drop(c->out[i].payload);
            continue;
        }
        c->bytes += c->out[i].payload->len;
        rc = epoch_add(c->epoch, c->out[i].type, c->out[i].payload);
    }
    c->nout = 0;
    if (c->epoch->bytes > EPOCH_KEEP)
        c->epoch->kept = false;
    return rc;
}

static void capture_finish(struct capture *c)
{
    struct group *g = c->group;
    for (size_t i = 0; i < c->nparts; i++)
        if (c->parts[i].body->mount)
            page_captured(c->parts[i].body, &c->parts[i].todo);
    for (size_t i = 0; i < c->nparts; i++)
        if (c->parts[i].announce && (c->err = announce(c, &c->parts[i]))) {
            capture_fail(c);
            return;
        }
    if (g->tainted && c->epoch->count) {
        parts_free(c);
        int rc = pass_start(c);
        if (rc)
            capture_fail(c);
        return;
    }
    struct epoch *e = c->epoch;
    e->closed = true;
    e->captured_at = uv_now(g->link->local->loop);
    uint64_t seq = e->seq;
    if (!e->count) {
        struct epoch **at = &g->queue;
        seq = 0;
        while (*at != e) {
            seq = (*at)->seq;
            at = &(*at)->next;
        }
        *at = NULL;
        epoch_free(e);
    }
    c->epoch = NULL;
    for (struct waiter *w = g->waiters; w; w = w->next)
        if (w->assigned && !w->captured) {
            w->captured = true;
            w->seq = seq;
        }
    capture_end(c);
}

/* Whether reading should wait: for the connection to take what it has, or for room. */
static bool must_pause(const struct capture *c)
{
    const struct group *g = c->group;
    const struct link *k = g->link;
    if (k->state == LINK_UP && c->epoch->begun)
        return conn_queued(k->conn, c->epoch->stream) > QUEUED_HIGH;
    return group_queue_bytes(g) > GROUP_KEEP || (!c->epoch->kept && !c->epoch->begun);
}

static void go_on(struct capture *c)
{
    if (c->aborted) {
        capture_fail(c);
    } else if (c->part >= c->nparts) {
        capture_finish(c);
    } else if (must_pause(c)) {
        c->phase = CAPTURE_PAUSED;
    } else {
        read_next(c);
    }
}

static void read_done(void *arg)
{
    struct capture *c = arg;
    int rc = c->err;
    if (!rc)
        rc = take_out(c);
    else
        for (size_t i = 0; i < c->nout; i++)
            buf_drop(c->out[i].payload);
    if (rc) {
        group_degrade(c->group, "the region cannot be read: %s", strerror(-rc));
        capture_fail(c);
        return;
    }
    group_pump(c->group);
    go_on(c);
}

void capture_resume(struct capture *c)
{
    if (c->phase == CAPTURE_PAUSED && (c->aborted || !must_pause(c)))
        go_on(c);
}

void capture_abort(struct capture *c)
{
    c->aborted = true;
    capture_resume(c);
}
