/* One region at two replicas: where it differs, and the pages that the source has there.
 *
 * The hash trees of both (frame.md) are walked from a level of few nodes down, as far as they differ; then the pages
 * are read from the source and go on to the target as part of the round's epoch. A large region is done in pieces of
 * 65536 pages, so that neither the lists nor the answers grow with it. Beyond a region's end all hashes are zeros:
 * sizes may differ. What the target has of a page behind its own end reads as zeros, as in the tree.
 *
 * A new region is read as a whole, and zeros of it are not sent. */
#include "agent/hub/round.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define TOP_LEVEL 4u
#define TOP_NODES 256u
#define PIECE 65536u
#define ASKED 24u
#define AHEAD (4u << 20) /* bytes queued for the target */

static bool push(struct nodes *v, uint64_t x)
{
    uint64_t *at = hub_room(v->at, v->n, &v->cap, sizeof *at);
    if (!at)
        return false;
    v->at = at;
    at[v->n++] = x;
    return true;
}

static uint64_t pages_of(uint64_t size)
{
    return size / FRAME_PAGE + (size % FRAME_PAGE != 0);
}

static uint64_t nodes_at(uint64_t pages, unsigned level)
{
    unsigned bits = 4 * level;
    return (pages >> bits) + ((pages & ((1ull << bits) - 1)) != 0);
}

void compare_free(struct compare *c)
{
    free(c->tops.at);
    free(c->now.at);
    free(c->next.at);
    *c = (struct compare){0};
}

/* The same nodes of both, each in its answer. */
struct pair {
    struct round *round;
    unsigned level, answers;
    uint64_t first;
    uint32_t count;
    struct buf *hash[2];
};

static const uint8_t *hash_at(const struct buf *b, uint32_t i)
{
    static const uint8_t none[FRAME_HASH_BYTES];
    return 8 + (size_t)(i + 1) * FRAME_HASH_BYTES <= b->len ? b->data + 8 + (size_t)i * FRAME_HASH_BYTES : none;
}

static int by_number(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static void pair_compare(const struct pair *p)
{
    struct compare *c = &p->round->compare;
    struct nodes *to = p->level == c->top && c->top ? &c->tops : &c->next;
    for (uint32_t i = 0; i < p->count; i++)
        if (memcmp(hash_at(p->hash[0], i), hash_at(p->hash[1], i), FRAME_HASH_BYTES) && !push(to, p->first + i))
            c->failed = true;
}

static void on_hashes(void *arg, struct replica *r, uint8_t type, const struct buf *p)
{
    struct pair *pair = arg;
    struct round *o = pair->round;
    if (type == FRAME_HASHES && p->len >= 8 && p->len <= 8 + (size_t)pair->count * FRAME_HASH_BYTES) {
        struct buf *copy = buf_new(p->len);
        if (copy) {
            memcpy(copy->data, p->data, p->len);
            copy->len = p->len;
        }
        pair->hash[r == o->target] = copy;
    } else if (type == FRAME_FAILED) {
        replica_failed(p, o->why, sizeof o->why);
    }
    if (++pair->answers < 2)
        return;
    if (!o->dead) {
        o->compare.asked--;
        if (pair->hash[0] && pair->hash[1])
            pair_compare(pair);
        else
            o->compare.failed = true;
    }
    buf_drop(pair->hash[0]);
    buf_drop(pair->hash[1]);
    free(pair);
    round_drop(o);
}

static void ask_hash(struct replica *r, uint32_t pin, struct pair *p)
{
    struct frame_hash h = {.pin = pin, .first = p->first, .count = p->count, .level = (uint8_t)p->level};
    uint8_t payload[64];
    size_t len = frame_hash_put(payload, sizeof payload, &h);
    replica_ask(r, STREAM_ROUND, FRAME_HASH, payload, len, on_hashes, p);
}

static void ask_pair(struct round *o, unsigned level, uint64_t first, uint32_t count)
{
    struct pair *p = calloc(1, sizeof *p);
    if (!p) {
        o->compare.failed = true;
        return;
    }
    *p = (struct pair){.round = o, .level = level, .first = first, .count = count};
    o->compare.asked++;
    o->refs++;
    ask_hash(o->source, o->compare.job->pin, p);
    ask_hash(o->target, o->compare.job->base_pin, p);
}

void compare_begin(struct round *o, struct job *job)
{
    struct compare *c = &o->compare;
    compare_free(c);
    c->job = job;
    uint64_t pages = pages_of(job->size);
    if (job->kind == JOB_CREATE) {
        c->copying = true;
        return;
    }
    while (c->top < TOP_LEVEL && nodes_at(pages, c->top) > TOP_NODES)
        c->top++;
    c->level = c->top;
    for (uint64_t i = 0, n = nodes_at(pages, c->top); i < n; i += FRAME_HASHES_MAX)
        ask_pair(o, c->top, i, (uint32_t)(n - i < FRAME_HASHES_MAX ? n - i : FRAME_HASHES_MAX));
}

/* Reading, and on to the target. */

struct reading {
    struct round *round;
    uint64_t offset;
    uint32_t len;
};

static void send_pages(struct round *o, const struct reading *q, uint8_t kind, const uint8_t *data)
{
    struct frame_extent e = {.offset = q->offset, .len = q->len, .kind = kind ? FRAME_PAGES_ZEROS : FRAME_PAGES_DATA};
    struct buf *b = buf_new(FRAME_PAGES_HEAD + FRAME_PAGES_ENTRY + (kind ? 0 : q->len));
    size_t head = b ? frame_pages_put(b->data, b->cap, o->compare.job->name->handle, &e, 1) : 0;
    if (!b) {
        o->compare.failed = true;
        return;
    }
    if (!kind)
        memcpy(b->data + head, data, q->len);
    b->len = (uint32_t)head + (kind ? 0 : q->len);
    round_send(o, FRAME_PAGES, b);
}

static void on_data(void *arg, struct replica *r, uint8_t type, const struct buf *p)
{
    struct reading *q = arg;
    struct round *o = q->round;
    (void)r;
    if (!o->dead) {
        struct compare *c = &o->compare;
        c->asked--;
        uint8_t kind = type == FRAME_DATA && p->len >= 9 ? p->data[4] : 2;
        bool good = kind < 2 && get_u32(p->data + 5) == q->len && p->len == 9 + (kind ? 0 : q->len);
        if (type == FRAME_FAILED)
            replica_failed(p, o->why, sizeof o->why);
        if (!good)
            c->failed = true;
        else if (!kind || c->job->kind != JOB_CREATE)
            send_pages(o, q, kind, p->data + 9);
    }
    free(q);
    round_drop(o);
}

static void read_from(struct round *o, uint64_t offset, uint64_t len)
{
    struct compare *c = &o->compare;
    struct reading *q = malloc(sizeof *q);
    uint64_t left = c->job->size - offset;
    if (!q) {
        c->failed = true;
        return;
    }
    *q = (struct reading){.round = o, .offset = offset, .len = (uint32_t)(len < left ? len : left)};
    uint8_t payload[20];
    put_u32(payload + 4, c->job->pin);
    put_u64(payload + 8, offset);
    put_u32(payload + 16, q->len);
    c->asked++;
    o->refs++;
    replica_ask(o->source, STREAM_ROUND, FRAME_READ, payload, sizeof payload, on_data, q);
}

static bool may_ask(const struct round *o)
{
    return o->compare.asked < ASKED && conn_queued(o->target->conn, STREAM_ROUND) < AHEAD;
}

/* True when all is asked for. */
static bool copy_new(struct round *o)
{
    struct compare *c = &o->compare;
    for (; c->offset < c->job->size; c->offset += FRAME_DATA_MAX) {
        if (!may_ask(o))
            return false;
        read_from(o, c->offset, FRAME_DATA_MAX);
    }
    return true;
}

static bool copy_pages(struct round *o)
{
    struct compare *c = &o->compare;
    while (c->cursor < c->now.n) {
        if (!may_ask(o))
            return false;
        uint64_t from = c->now.at[c->cursor++], n = 1;
        while (c->cursor < c->now.n && c->now.at[c->cursor] == from + n && n < FRAME_DATA_MAX / FRAME_PAGE) {
            n++;
            c->cursor++;
        }
        read_from(o, from * FRAME_PAGE, n * FRAME_PAGE);
    }
    return true;
}

/* The next nodes to be looked into: as many tops as cover a piece. */
static bool next_piece(struct compare *c)
{
    c->now.n = c->cursor = 0;
    size_t most = PIECE >> (4 * c->top);
    for (size_t i = 0; i < most && c->tops_done < c->tops.n; i++)
        if (!push(&c->now, c->tops.at[c->tops_done++]))
            c->failed = true;
    c->level = c->top;
    return c->now.n;
}

/* The children of all nodes of this level are asked for, and then are the level. */
static bool descend(struct round *o)
{
    struct compare *c = &o->compare;
    unsigned below = c->level - 1;
    uint64_t most = nodes_at(pages_of(c->job->size), below);
    while (c->cursor < c->now.n) {
        if (c->asked >= ASKED)
            return false;
        uint64_t first = c->now.at[c->cursor++], n = 1;
        while (c->cursor < c->now.n && c->now.at[c->cursor] == first + n &&
               (n + 1) * FRAME_HASH_FANOUT <= FRAME_HASHES_MAX) {
            n++;
            c->cursor++;
        }
        uint64_t from = first * FRAME_HASH_FANOUT, to = from + n * FRAME_HASH_FANOUT;
        if (to > most)
            to = most;
        if (from < to)
            ask_pair(o, below, from, (uint32_t)(to - from));
    }
    if (c->asked)
        return false;
    struct nodes was = c->now;
    c->now = c->next;
    c->next = was;
    c->next.n = c->cursor = 0;
    c->level = below;
    if (c->now.n)
        qsort(c->now.at, c->now.n, sizeof *c->now.at, by_number);
    return true;
}

/* True when the whole region is through. */
bool compare_step(struct round *o)
{
    struct compare *c = &o->compare;
    if (c->failed)
        return c->asked == 0;
    if (c->job->kind == JOB_CREATE)
        return copy_new(o) && !c->asked;
    if (!c->copying && !c->now.n && c->asked) /* the tops */
        return false;
    for (;;) {
        if (c->copying) {
            if (!copy_pages(o) || c->asked)
                return false;
            c->copying = false;
            c->now.n = 0;
        }
        if (!c->now.n) {
            if (!c->top) { /* pages were compared at once */
                struct nodes pages = c->next;
                c->next = c->now;
                c->now = pages;
                c->next.n = c->cursor = 0;
                if (c->now.n)
                    qsort(c->now.at, c->now.n, sizeof *c->now.at, by_number);
            } else if (c->tops.n && !c->tops_done) {
                qsort(c->tops.at, c->tops.n, sizeof *c->tops.at, by_number);
            }
            if (c->top && !next_piece(c))
                return true;
            if (!c->now.n)
                return true;
            c->differs = true;
        }
        if (c->job->kind == JOB_SAME)
            return true; /* that they differ is all that matters */
        while (c->level)
            if (!descend(o))
                return false;
        c->copying = true;
    }
}
