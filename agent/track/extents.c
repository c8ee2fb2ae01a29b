#include "agent/track/extents.h"

#include <stdlib.h>

void extents_add(struct extents *e, uint64_t start, uint64_t end)
{
    if (start >= end)
        return;
    if (e->count && e->at[e->count - 1].end == start) { /* scans arrive in order: most ranges continue the last */
        e->at[e->count - 1].end = end;
        return;
    }
    if (e->count == e->cap) {
        size_t cap = e->cap ? e->cap * 2 : 64;
        struct extent *more = realloc(e->at, cap * sizeof *more);
        if (!more) {
            e->lost = true;
            return;
        }
        e->at = more;
        e->cap = cap;
    }
    e->at[e->count++] = (struct extent){start, end};
}

static int by_start(const void *a, const void *b)
{
    const struct extent *x = a, *y = b;
    return (x->start > y->start) - (x->start < y->start);
}

void extents_settle(struct extents *e, uint64_t size)
{
    uint64_t limit =
        size > UINT64_MAX - PAGE ? UINT64_MAX & ~(uint64_t)(PAGE - 1) : (size + PAGE - 1) & ~(uint64_t)(PAGE - 1);
    bool sorted = true;
    for (size_t i = 1; i < e->count && sorted; i++)
        sorted = e->at[i - 1].start <= e->at[i].start;
    if (!sorted)
        qsort(e->at, e->count, sizeof *e->at, by_start);
    size_t n = 0;
    for (size_t i = 0; i < e->count; i++) {
        uint64_t start = e->at[i].start & ~(uint64_t)(PAGE - 1);
        uint64_t end = e->at[i].end > limit ? limit : (e->at[i].end + PAGE - 1) & ~(uint64_t)(PAGE - 1);
        if (start >= end)
            continue;
        if (n && start <= e->at[n - 1].end) {
            if (end > e->at[n - 1].end)
                e->at[n - 1].end = end;
        } else {
            e->at[n++] = (struct extent){start, end};
        }
    }
    e->count = n;
}

uint64_t extents_bytes(const struct extents *e)
{
    uint64_t all = 0;
    for (size_t i = 0; i < e->count; i++)
        all += e->at[i].end - e->at[i].start;
    return all;
}

void extents_move(struct extents *to, struct extents *from)
{
    if (!to->count) {
        struct extents empty = *to;
        bool lost = to->lost | from->lost;
        *to = *from;
        to->lost = lost;
        empty.lost = false;
        *from = empty;
        return;
    }
    for (size_t i = 0; i < from->count; i++)
        extents_add(to, from->at[i].start, from->at[i].end);
    to->lost |= from->lost;
    from->count = 0;
    from->lost = false;
}

void extents_free(struct extents *e)
{
    free(e->at);
    *e = (struct extents){0};
}
