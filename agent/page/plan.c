#include "agent/page/plan.h"

#include "wire/control.h"

#include <stdlib.h>

void plan_init(struct plan *p, uint8_t order)
{
    *p = (struct plan){.order = order};
}

void plan_free(struct plan *p)
{
    free(p->recorded);
    p->recorded = NULL;
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

void plan_touch(struct plan *p, uint64_t from, uint64_t to)
{
    if (!p->random && from + 1 >= p->touched && from <= p->touched && p->cursor < to)
        plan_move(p, to);
    p->touched = to;
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
    if (p->order == CONTROL_ORDER_NONE)
        return false;
    if (recorded(p, pages, from, to) || (p->backwards && backwards(p, pages, from, to)))
        return true;
    if (run_in(pages, p->cursor, pages->count, from, to) || run_in(pages, 0, p->cursor, from, to)) {
        p->cursor = *to;
        return true;
    }
    return false;
}
