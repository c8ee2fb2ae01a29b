#include "agent/page/plan.h"

#include "agent/page/order.h"
#include "wire/control.h"

#include <stdlib.h>

void plan_init(struct plan *p, uint8_t order)
{
    *p = (struct plan){.order = order};
}

void plan_free(struct plan *p)
{
    free(p->recorded);
    free(p->known);
    p->recorded = NULL;
    p->known = NULL;
}

void plan_record(struct plan *p, uint64_t *recorded, size_t n, uint64_t chunks)
{
    p->recorded = recorded;
    p->recorded_n = n;
    p->recorded_cap = n; /* it may be larger: unused */
    p->learning = !n;
    p->known = calloc(1, (size_t)(chunks / 8 + 1));
    p->chunks = chunks;
    for (size_t i = 0; p->known && i < n; i++)
        p->known[recorded[i] / 8] |= (uint8_t)(1u << recorded[i] % 8);
}

static void record(struct plan *p, uint64_t page)
{
    uint64_t chunk = page / PLAN_CHUNK;
    if (!p->known || chunk >= p->chunks || p->known[chunk / 8] & 1u << chunk % 8 || p->recorded_n >= ORDER_MAX)
        return;
    if (p->recorded_n == p->recorded_cap) {
        size_t cap = p->recorded_cap ? p->recorded_cap * 2 : 64;
        uint64_t *more = realloc(p->recorded, cap * sizeof *more);
        if (!more)
            return;
        p->recorded = more;
        p->recorded_cap = cap;
    }
    p->known[chunk / 8] |= (uint8_t)(1u << chunk % 8);
    p->recorded[p->recorded_n++] = chunk;
}

static struct plan_walk *oldest(struct plan *p)
{
    struct plan_walk *w = &p->walks[0];
    for (size_t i = 1; i < PLAN_WALKS; i++)
        if (p->walks[i].used < w->used)
            w = &p->walks[i];
    return w;
}

static void grow(struct plan_walk *w)
{
    w->size = w->size * 2 < PLAN_WINDOW ? w->size * 2 : PLAN_WINDOW;
}

void plan_fault(struct plan *p, const struct pages *pages, uint64_t page, uint64_t *from, uint64_t *to)
{
    *from = page;
    *to = page + 1;
    p->faults++;
    record(p, page);
    if (p->order == CONTROL_ORDER_NONE || p->random)
        return;
    struct plan_walk *w = NULL;
    bool before = false;
    for (size_t i = 0; i < PLAN_WALKS && !w; i++) {
        struct plan_walk *k = &p->walks[i];
        if (!k->size)
            continue;
        before = page < k->from;
        if (page >= k->to ? page - k->to < k->size : before && k->from - page <= k->size)
            w = k;
    }
    if (w) {
        grow(w);
        *from = before ? (page + 1 > w->size ? page + 1 - w->size : 0) : page;
        *to = before ? page + 1 : page + w->size;
        p->backwards = before;
        p->cursor = before ? *from : *to;
    } else {
        w = oldest(p);
        w->size = PLAN_FIRST;
        *from = page / PLAN_FIRST * PLAN_FIRST;
        *to = *from + PLAN_FIRST;
        if (p->faults == 1)
            p->cursor = *to;
    }
    if (*to > pages->count)
        *to = pages->count;
    w->from = *from;
    w->to = *to;
    w->used = p->faults;
}

void plan_move(struct plan *p, uint64_t page)
{
    p->cursor = page;
    p->backwards = false;
}

bool plan_touch(struct plan *p, uint64_t from, uint64_t to)
{
    bool follows = !p->random && from + 1 >= p->touched && from <= p->touched;
    if (follows && p->cursor < to)
        plan_move(p, to);
    p->touched = to;
    for (uint64_t page = from; p->known && page < to; page += PLAN_CHUNK)
        record(p, page);
    return follows;
}

static bool run_in(const struct pages *pages, uint64_t lo, uint64_t hi, uint64_t *from, uint64_t *to)
{
    if (hi > pages->count)
        hi = pages->count;
    *from = lo < hi ? pages_gap(pages, lo, hi) : hi;
    if (*from >= hi)
        return false;
    uint64_t end = (*from / PLAN_WINDOW + 1) * PLAN_WINDOW;
    *to = pages_gap_end(pages, *from, end < hi ? end : hi);
    return true;
}

static bool recorded(struct plan *p, const struct pages *pages, uint64_t *from, uint64_t *to)
{
    for (; p->recorded_at < p->recorded_n; p->recorded_at++) {
        uint64_t lo = p->recorded[p->recorded_at] * PLAN_CHUNK;
        if (run_in(pages, lo, lo + PLAN_CHUNK, from, to))
            return true;
    }
    return false;
}

/* The nearest run before the cursor, a window's piece at a time. */
static bool backwards(struct plan *p, const struct pages *pages, uint64_t *from, uint64_t *to)
{
    while (p->cursor) {
        uint64_t lo = (p->cursor - 1) / PLAN_WINDOW * PLAN_WINDOW;
        if (run_in(pages, lo, p->cursor, from, to))
            return true;
        p->cursor = lo;
    }
    p->backwards = false;
    return false;
}

bool plan_next(struct plan *p, const struct pages *pages, uint64_t *from, uint64_t *to)
{
    if (p->order == CONTROL_ORDER_NONE || p->learning)
        return false;
    if (recorded(p, pages, from, to) || (p->backwards && backwards(p, pages, from, to)))
        return true;
    if (run_in(pages, p->cursor, pages->count, from, to) || run_in(pages, 0, p->cursor, from, to)) {
        p->cursor = *to;
        return true;
    }
    return false;
}
