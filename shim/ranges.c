#include "shim/ranges.h"

#include <string.h>

size_t ranges_first(const struct ranges *t, uint64_t addr)
{
    size_t lo = 0, hi = t->count;
    while (lo < hi) {
        size_t mid = lo + (hi - lo) / 2;
        if (t->at[mid].end > addr)
            hi = mid;
        else
            lo = mid + 1;
    }
    return lo;
}

struct range *ranges_find(const struct ranges *t, uint64_t start, uint64_t end)
{
    size_t i = ranges_first(t, start);
    return i < t->count && t->at[i].start < end ? &t->at[i] : NULL;
}

static void open_gap(struct ranges *t, size_t i)
{
    memmove(&t->at[i + 1], &t->at[i], (t->count - i) * sizeof *t->at);
    t->count++;
}

static void close_gap(struct ranges *t, size_t i, size_t n)
{
    memmove(&t->at[i], &t->at[i + n], (t->count - i - n) * sizeof *t->at);
    t->count -= n;
}

static void split_at(struct ranges *t, uint64_t addr)
{
    size_t i = ranges_first(t, addr);
    if (i == t->count || t->at[i].start >= addr)
        return;
    open_gap(t, i);
    struct range *low = &t->at[i], *high = low + 1;
    high->offset += addr - low->start;
    high->start = low->end = addr;
}

void ranges_split(struct ranges *t, uint64_t start, uint64_t end)
{
    split_at(t, start);
    split_at(t, end);
}

static bool continues(const struct range *a, const struct range *b)
{
    return a->end == b->start && a->region == b->region && a->state == b->state && a->dontfork == b->dontfork &&
           a->offset + (a->end - a->start) == b->offset;
}

void ranges_insert(struct ranges *t, const struct range *r)
{
    size_t i = ranges_first(t, r->start);
    open_gap(t, i);
    t->at[i] = *r;
    if (i + 1 < t->count && continues(&t->at[i], &t->at[i + 1])) {
        t->at[i].end = t->at[i + 1].end;
        close_gap(t, i + 1, 1);
    }
    if (i > 0 && continues(&t->at[i - 1], &t->at[i])) {
        t->at[i - 1].end = t->at[i].end;
        close_gap(t, i, 1);
    }
}

void ranges_cut(struct ranges *t, uint64_t start, uint64_t end)
{
    ranges_split(t, start, end);
    size_t i = ranges_first(t, start), n = 0;
    while (i + n < t->count && t->at[i + n].start < end)
        n++;
    if (n)
        close_gap(t, i, n);
}

size_t ranges_of(const struct ranges *t, uint32_t region)
{
    size_t n = 0;
    for (size_t i = 0; i < t->count; i++)
        n += t->at[i].region == region;
    return n;
}
