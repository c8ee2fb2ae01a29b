/* Comparing a body with the remote's region by hash trees, so that `published` ends as exactly what the remote has, and
 * the next capture reads only what may differ from it.
 *
 *     QUEUED -> [READING (jobs: the file is hashed into `published`)] -> PINNING (PIN sent) -> WALKING (HASH, from the
 *     root down, where nodes differ) -> done: the region is ATTACHED
 *
 * Why nothing is missed. Let F be the file, P `published`, R the remote's region; the next capture reads `dirty` and
 * what the trackers find, and compares it with P.
 *   1. While a body is not `unknown`, a page whose F is not P is in `dirty` or in a tracker: a capture sets P to what
 * it read, and each store after that is tracked. Whether the epoch arrives plays no part; what a capture that failed
 *      had taken from trackers it puts into `dirty`. So an epoch that was lost or refused, or a bulk that was cut off,
 *      needs no reading here: there P is not R.
 *   2. The walk finds every page whose P is not R, sets P to R and puts the page into `dirty`. Others stay under 1.
 *      After it P is R, and 1 holds.
 *   3. An `unknown` body comes to 1 by READING: `unknown` is cleared and all marks are taken before the first page is
 *      read, and from then on everything is tracked; pages are stored to before they are read (P has it) or after (the
 *      trackers have it). `dirty` and the lowest size until then say nothing more, since content is compared: the
 * lowest size has to go with them, or the next capture would cut off, and not send again, what a dead program stored
 * after that cut. Who cannot promise tracking (a program that died, a map that cannot be read, marks that overran)
 * makes the body unknown again: then P is R after the walk all the same, and the next capture reads all of the file.
 *   4. A block hash of 128 bytes belongs to the page's P: changing P forgets the page's. A refused delta may come from
 *      blocks that are other than their hashes say: then all are forgotten, and whole pages go (`base_doubted`).
 *   5. Beyond R's end P becomes zeros, as the region will be when it grows. Beyond F's end P is R's until the next
 *      capture, which announces the size, cuts both.
 *   `refetch` stands until the walk is through, so that whatever ends it (link lost, pin lost, file renamed, remote
 *   refusing) leads to another; P may be a mixture then, which is right by 2.
 *
 * The region is pinned: our own epochs wait for the end of the comparison, but another stream's may still be on their
 * way. Nobody else touches `published`: no capture of the group starts while a job reads, answers are kept (they are
 * bounded by what may be asked) while a capture has the body, and the region is not attached anew before a job of a
 * comparison that was given up is over.
 *
 * If we die nothing is lost: the next agent finds every body unknown. */
#include "agent/sync/reconcile.h"
#include "agent/sync/capture.h"
#include "agent/base/job.h"
#include "agent/base/log.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>

#define SLICE_PAGES ((16u << 20) / PAGE)
#define ASKED_AT_ONCE 8u
#define WALKS_AT_ONCE 24u /* of a link: with ASKED_AT_ONCE within the server's 256 requests, and its 64 pins */
#define RETRY_MS 1000u

enum phase { QUEUED, READING, PINNING, WALKING };

/* Nodes of one level that are to be asked for. */
struct nodes {
    unsigned level;
    uint64_t first, count;
};

struct asked {
    uint32_t request; /* 0: free */
    struct nodes nodes;
    struct buf *answer; /* kept while a capture has the body */
};

struct reconcile {
    struct reconcile *next;
    struct link *link;
    struct region *region;
    struct body *body; /* held */
    enum phase phase;
    bool job;  /* one is under way */
    bool over; /* given up: only its job is waited for */
    bool due;  /* it has its turn in steps() */
    /* reading */
    uint64_t at, to; /* pages */
    struct stat stat;
    int64_t seen;
    int err;
    /* the walk */
    uint32_t request, pin; /* request: of PIN */
    bool pinned;
    uint64_t pages;     /* of theirs */
    struct nodes *todo; /* a ring */
    size_t first, count, cap;
    struct asked asked[ASKED_AT_ONCE];
    uint64_t differ, out, in, since; /* bytes with their frames' heads; us */
};

static void step(struct reconcile *q);

static uint64_t now_us(void)
{
    return uv_hrtime() / 1000;
}

bool reconcile_reads(const struct link *k, const struct group *g)
{
    for (const struct reconcile *q = k->reconciles; q; q = q->next)
        if (q->job && q->body->region && q->body->region->group == g)
            return true;
    return false;
}

bool reconcile_has(const struct link *k, const struct body *b)
{
    for (const struct reconcile *q = k->reconciles; q; q = q->next)
        if (q->job && q->body == b)
            return true;
    return false;
}

/* ---- beginning and end ---- */

void reconcile_start(struct region *r)
{
    struct link *k = r->link;
    struct reconcile *q = calloc(1, sizeof *q), **at = &k->reconciles;
    r->attach = ATTACH_HASHING;
    r->body->refetch = true;
    if (!q) {
        r->attach = ATTACH_LOOSE;
        r->retry_at = uv_now(k->local->loop) + RETRY_MS;
        return;
    }
    *q = (struct reconcile){.link = k, .region = r, .body = r->body, .since = now_us()};
    body_hold(q->body);
    while (*at)
        at = &(*at)->next;
    *at = q;
    step(q);
}

static void send_own(struct reconcile *q, uint8_t type, struct buf *b)
{
    if (!b || !q->link->conn)
        return;
    q->out += FRAME_HEADER + b->len;
    conn_send(q->link->conn, LINK_STREAM, type, b);
}

static void release(struct reconcile *q)
{
    struct reconcile **at = &q->link->reconciles;
    while (*at != q)
        at = &(*at)->next;
    *at = q->next;
    for (unsigned i = 0; i < ASKED_AT_ONCE; i++)
        buf_drop(q->asked[i].answer);
    body_drop(q->body);
    free(q->todo);
    free(q);
}

/* What was read is of no use: the file has to be read again. */
static void give_up(struct reconcile *q)
{
    q->over = true;
    if (q->phase == READING)
        q->body->unknown = true;
    if (!q->job)
        release(q);
}

static void unpin(struct reconcile *q)
{
    struct buf *b = q->pinned ? buf_new(4) : NULL;
    if (b) {
        put_u32(b->data, q->pin);
        b->len = 4;
    }
    send_own(q, FRAME_UNPIN, b);
}

/* Each of a group, or each that is queued: a step may end others, and let captures run. */
static void steps(struct link *k, const struct group *g)
{
    for (struct reconcile *q = k->reconciles; q; q = q->next)
        q->due = !q->over && (g ? q->region->group == g : q->phase == QUEUED);
    for (struct reconcile *q = k->reconciles; q;) {
        if (!q->due) {
            q = q->next;
            continue;
        }
        q->due = false;
        step(q);
        q = k->reconciles;
    }
}

void reconciles_step(struct group *g)
{
    steps(g->link, g);
}

static void finish(struct reconcile *q, bool good)
{
    struct link *k = q->link;
    struct region *r = q->region;
    unpin(q);
    if (r->body == q->body && r->attach == ATTACH_HASHING) {
        r->attach = good ? ATTACH_DONE : ATTACH_LOOSE;
        r->retry_at = good ? 0 : uv_now(k->local->loop) + RETRY_MS;
        r->body->refetch = !good;
    } else if (r->attach == ATTACH_HASHING) {
        r->attach = ATTACH_LOOSE;
    }
    if (good)
        log_info("%s: reconciled %s: %llu of %llu pages differ, %llu bytes out, %llu bytes in, %.1f ms", k->address,
                 r->name, (unsigned long long)q->differ, (unsigned long long)q->pages, (unsigned long long)q->out,
                 (unsigned long long)q->in, (double)(now_us() - q->since) / 1000);
    give_up(q);
    group_check(r->group);
    steps(k, NULL);
}

void reconciles_drop(struct link *k)
{
    for (struct reconcile *q = k->reconciles, *next; q; q = next) {
        next = q->next;
        if (!q->over)
            give_up(q);
    }
}

/* ---- the file here ---- */

static void slice(void *arg)
{
    struct reconcile *q = arg;
    struct hashes *h = &q->body->published;
    uint64_t to = q->to - q->at < SLICE_PAGES ? q->to : q->at + SLICE_PAGES;
    uint8_t *scratch = malloc(HASH_SCRATCH);
    q->err = scratch ? hashes_read(h, q->body->fd, q->at, to, scratch) : -ENOMEM;
    q->at = to;
    if (q->at == q->to)
        hashes_clear(h, q->to, h->pages);
    free(scratch);
}

static void slice_done(void *arg)
{
    struct reconcile *q = arg;
    struct group *g = q->body->region ? q->body->region->group : NULL;
    q->job = false;
    if (q->over) {
        release(q);
    } else if (!g) {
        step(q);
    } else {
        group_kick(g); /* a scan that waited for us goes first */
        reconciles_step(g);
    }
}

/* Everything from now on is tracked, or makes the body unknown again. */
static void reading_begin(struct reconcile *q)
{
    struct body *b = q->body;
    struct timespec t;
    for (struct use *u = b->uses; u; u = u->next_body)
        if (u->marks)
            marks_collect(u->marks, b);
    b->unknown = b->dirty.lost = false;
    b->dirty.count = 0;
    b->min_size = UINT64_MAX;
    clock_gettime(CLOCK_REALTIME, &t);
    q->seen = (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
    q->phase = READING;
    if (fstat(b->fd, &q->stat) < 0)
        q->err = -errno;
    else
        q->to = ((uint64_t)q->stat.st_size + PAGE - 1) / PAGE;
}

static void pin(struct reconcile *q)
{
    struct buf *b = buf_new(NAME_CAP + 16);
    if (!b) {
        finish(q, false);
        return;
    }
    q->phase = PINNING;
    q->request = ++q->link->next_request;
    struct wr w = wr_over(b->data, b->cap);
    wr_u32(&w, q->request);
    wr_str(&w, q->region->name);
    b->len = (uint32_t)wr_len(&w);
    send_own(q, FRAME_PIN, b);
}

static void read_on(struct reconcile *q)
{
    struct body *b = q->body;
    if (!q->err && (q->at < q->to || (!q->to && b->published.pages))) {
        if (q->to) {
            int err = job_run(q->link->local->loop, slice, slice_done, q);
            q->job = !err;
            if (q->job)
                return; /* what it says of q->err is its own */
            q->err = err;
        } else {
            hashes_clear(&b->published, 0, b->published.pages);
        }
    }
    if (q->err) {
        log_info("%s: cannot be read for comparing: %s", q->region->name, strerror(-q->err));
        b->unknown = true; /* the next capture reads all of it, and meets the error */
    } else {
        b->stat_mtime = (int64_t)q->stat.st_mtim.tv_sec * 1000000000 + q->stat.st_mtim.tv_nsec;
        b->stat_ctime = (int64_t)q->stat.st_ctim.tv_sec * 1000000000 + q->stat.st_ctim.tv_nsec;
        b->stat_seen = q->seen;
    }
    pin(q);
}

/* ---- the walk ---- */

/* False without memory. Neighbours are asked for together. */
static bool add(struct reconcile *q, unsigned level, uint64_t first, uint64_t count)
{
    struct nodes *last = q->count ? &q->todo[(q->first + q->count - 1) % q->cap] : NULL;
    if (last && last->level == level && last->first + last->count == first) {
        last->count += count;
        return true;
    }
    if (q->count == q->cap) {
        size_t cap = q->cap ? q->cap * 2 : 32;
        struct nodes *more = malloc(cap * sizeof *more);
        if (!more)
            return false;
        for (size_t i = 0; i < q->count; i++)
            more[i] = q->todo[(q->first + i) % q->cap];
        free(q->todo);
        q->todo = more;
        q->cap = cap;
        q->first = 0;
    }
    q->todo[(q->first + q->count++) % q->cap] = (struct nodes){level, first, count};
    return true;
}

static void page_differs(struct reconcile *q, uint64_t page, struct page_hash theirs)
{
    struct body *b = q->body;
    hashes_forget_blocks(&b->published, page);
    hashes_set(&b->published, page, theirs);
    extents_add(&b->dirty, page * PAGE, (page + 1) * PAGE);
    q->differ++;
}

/* One answer: what differs is descended into; pages become theirs. */
static bool compare(struct reconcile *q, const struct nodes *n, const uint8_t *theirs)
{
    struct hashes *h = &q->body->published;
    for (uint64_t i = 0; i < n->count; i++, theirs += HASH_BYTES) {
        struct page_hash there = page_hash_from(theirs);
        uint64_t node = n->first + i, child = node * HASH_FAN;
        if (page_hash_same(hashes_node(h, n->level, node), there))
            continue;
        if (!n->level) {
            page_differs(q, node, there);
            continue;
        }
        uint64_t left = hashes_nodes(q->pages, n->level - 1) - child;
        if (!add(q, n->level - 1, child, left < HASH_FAN ? left : HASH_FAN))
            return false;
    }
    return true;
}

static bool walk_begin(struct reconcile *q)
{
    struct hashes *h = &q->body->published;
    if (hashes_room(h, q->pages))
        return false;
    for (uint64_t page = hashes_next(h, q->pages); page < h->pages; page = hashes_next(h, page + 1)) {
        extents_add(&q->body->dirty, page * PAGE, (page + 1) * PAGE);
        q->differ++;
    }
    hashes_clear(h, q->pages, h->pages);
    return !q->pages || add(q, hashes_top(q->pages), 0, 1);
}

static bool ask(struct reconcile *q, struct asked *a)
{
    struct nodes *n = &q->todo[q->first];
    struct frame_hash f = {.request = ++q->link->next_request, .pin = q->pin, .first = n->first};
    f.level = (uint8_t)n->level;
    f.count = n->count < FRAME_HASHES_MAX ? (uint32_t)n->count : FRAME_HASHES_MAX;
    struct buf *b = buf_new(32);
    if (!b)
        return false;
    b->len = (uint32_t)frame_hash_put(b->data, b->cap, &f);
    *a = (struct asked){f.request, {n->level, n->first, f.count}, NULL};
    n->first += f.count;
    n->count -= f.count;
    if (!n->count) {
        q->first = (q->first + 1) % q->cap;
        q->count--;
    }
    send_own(q, FRAME_HASH, b);
    return true;
}

static void walk_on(struct reconcile *q)
{
    bool good = true, waits = false;
    for (unsigned i = 0; i < ASKED_AT_ONCE && good; i++) {
        struct asked *a = &q->asked[i];
        if (!a->answer)
            continue;
        good = compare(q, &a->nodes, a->answer->data + 8);
        buf_drop(a->answer);
        *a = (struct asked){0};
    }
    for (unsigned i = 0; i < ASKED_AT_ONCE && good; i++) {
        struct asked *a = &q->asked[i];
        if (!a->request && q->count)
            good = ask(q, a);
        waits |= a->request != 0;
    }
    if (!good || !waits)
        finish(q, good);
}

static bool captured(const struct body *b)
{
    const struct capture *c = b->region && b->region->group ? b->region->group->capture : NULL;
    for (size_t i = 0; c && i < c->nparts; i++)
        if (c->parts[i].body == b)
            return true;
    return false;
}

static bool may_begin(const struct link *k)
{
    unsigned under_way = 0;
    for (const struct reconcile *q = k->reconciles; q; q = q->next)
        under_way += q->phase != QUEUED;
    return under_way < WALKS_AT_ONCE;
}

/* Goes on as far as it can. */
static void step(struct reconcile *q)
{
    struct body *b = q->body;
    if (q->over || q->job)
        return;
    if (q->region->body != b || q->region->attach != ATTACH_HASHING) {
        finish(q, false);
        return;
    }
    if (captured(b) || (q->phase == QUEUED && !may_begin(q->link)))
        return;
    if (q->phase == QUEUED && b->base_doubted) {
        hashes_forget_all_blocks(&b->published);
        b->base_doubted = false;
    }
    if (q->phase == QUEUED && b->unknown && b->fd >= 0)
        reading_begin(q);
    if (q->phase == READING)
        read_on(q);
    else if (q->phase == QUEUED)
        pin(q);
    else if (q->phase == WALKING)
        walk_on(q);
}

/* ---- answers ---- */

static const char *take_pinned(struct link *k, const struct buf *p)
{
    struct frame_entry *e = malloc(sizeof *e);
    uint32_t request = 0, number = 0;
    if (!e || frame_pinned_get(p->data, p->len, &request, &number, e)) {
        free(e);
        return "malformed PINNED";
    }
    struct reconcile *q = k->reconciles;
    while (q && (q->over || q->phase != PINNING || q->request != request))
        q = q->next;
    if (q) {
        struct body *b = q->body;
        q->pin = number;
        q->pinned = true;
        q->in += FRAME_HEADER + p->len;
        q->pages = e->size / PAGE + (e->size % PAGE != 0);
        q->phase = WALKING;
        bool same = id_same(&e->lineage, &b->lineage);
        if (same) {
            b->size = e->size;
            b->epoch = b->durable = e->epoch;
        }
        if (!same || !walk_begin(q))
            finish(q, false);
        else
            step(q);
    }
    free(e);
    return NULL;
}

static struct reconcile *asked_by(struct link *k, uint32_t request, struct asked **out)
{
    for (struct reconcile *q = k->reconciles; q; q = q->next)
        for (unsigned i = 0; i < ASKED_AT_ONCE && !q->over; i++)
            if (q->asked[i].request == request && !q->asked[i].answer) {
                *out = &q->asked[i];
                return q;
            }
    return NULL;
}

static const char *take_hashes(struct link *k, struct buf *p)
{
    struct rd r = rd_over(p->data, p->len);
    uint32_t request = rd_u32(&r), count = rd_u32(&r);
    struct asked *a = NULL;
    conn_credit(k->conn, LINK_STREAM, p->len);
    if (r.bad || rd_left(&r) != (size_t)count * HASH_BYTES)
        return "malformed HASHES";
    struct reconcile *q = request ? asked_by(k, request, &a) : NULL;
    if (!q)
        return NULL; /* of a comparison that was given up */
    if (count != a->nodes.count)
        return "HASHES of more or fewer nodes than there are";
    q->in += FRAME_HEADER + p->len;
    a->answer = buf_hold(p);
    step(q);
    return NULL;
}

const char *reconcile_take(struct link *k, uint8_t type, struct buf *payload)
{
    return type == FRAME_PINNED ? take_pinned(k, payload) : take_hashes(k, payload);
}

void reconcile_failed(struct link *k, uint32_t request, const char *text)
{
    struct asked *a = NULL;
    struct reconcile *q = request ? asked_by(k, request, &a) : NULL;
    for (struct reconcile *p = k->reconciles; p && !q; p = p->next)
        if (!p->over && p->phase == PINNING && p->request == request)
            q = p;
    if (!q)
        return;
    log_info("%s: %s cannot be compared: %s; trying again", k->address, q->region->name, text);
    finish(q, false);
}
