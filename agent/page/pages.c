#include "agent/page/pages.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

int pages_init(struct pages *p, uint64_t count)
{
    size_t words = (size_t)(count / 64 + 1);
    *p = (struct pages){.count = count, .room = words * 64, .have = calloc(words, 8), .asked = calloc(words, 8)};
    if (p->have && p->asked)
        return 0;
    pages_free(p);
    return -ENOMEM;
}

void pages_free(struct pages *p)
{
    free(p->have);
    free(p->asked);
    *p = (struct pages){0};
}

/* The bits of word `from / 64` that lie in [from, to); *next is where the next word begins. */
static uint64_t mask(uint64_t from, uint64_t to, uint64_t *next)
{
    uint64_t end = (from / 64 + 1) * 64;
    *next = end;
    uint64_t m = ~0ULL << from % 64;
    return to < end ? m & ~(~0ULL << to % 64) : m;
}

static void set(uint64_t *bits, uint64_t from, uint64_t to, bool on, uint64_t *changed)
{
    for (uint64_t next; from < to; from = next) {
        uint64_t m = mask(from, to, &next), *word = &bits[from / 64], old = *word;
        *word = on ? old | m : old & ~m;
        if (changed)
            *changed += (uint64_t)__builtin_popcountll(old ^ *word);
    }
}

void pages_came(struct pages *p, uint64_t from, uint64_t to)
{
    set(p->have, from, to, true, &p->have_n);
    pages_unask(p, from, to);
}

void pages_ask(struct pages *p, uint64_t from, uint64_t to)
{
    set(p->asked, from, to, true, &p->asked_n);
}

void pages_unask(struct pages *p, uint64_t from, uint64_t to)
{
    uint64_t answered = 0;
    set(p->asked, from, to, false, &answered);
    p->asked_n -= answered;
}

void pages_lose(struct pages *p, uint64_t from, uint64_t to)
{
    uint64_t lost = 0;
    set(p->have, from, to, false, &lost);
    p->have_n -= lost;
    pages_unask(p, from, to);
}

/* The first page of [from, to) whose bit in the union of a and b is `on`. */
static uint64_t find(const uint64_t *a, const uint64_t *b, bool on, uint64_t from, uint64_t to)
{
    for (uint64_t next; from < to; from = next) {
        uint64_t m = mask(from, to, &next), word = a[from / 64] | (b ? b[from / 64] : 0);
        uint64_t hit = (on ? word : ~word) & m;
        if (hit)
            return from / 64 * 64 + (uint64_t)__builtin_ctzll(hit);
    }
    return to;
}

uint64_t pages_gap(const struct pages *p, uint64_t from, uint64_t to)
{
    return find(p->have, p->asked, false, from, to);
}

uint64_t pages_gap_end(const struct pages *p, uint64_t from, uint64_t to)
{
    return find(p->have, p->asked, true, from, to);
}

uint64_t pages_hole(const struct pages *p, uint64_t from, uint64_t to)
{
    return find(p->have, NULL, false, from, to);
}

uint64_t pages_hole_end(const struct pages *p, uint64_t from, uint64_t to)
{
    return find(p->have, NULL, true, from, to);
}

static uint64_t *longer(const uint64_t *old, uint64_t room, uint64_t more)
{
    uint64_t *bits = calloc((size_t)(more / 64), 8);
    if (bits)
        memcpy(bits, old, (size_t)(room / 8));
    return bits;
}

int pages_resize(struct pages *p, uint64_t count)
{
    if (count < p->count)
        pages_lose(p, count, p->count);
    if (count >= p->room) {
        uint64_t room = (count + count / 2) / 64 * 64 + 64;
        uint64_t *have = longer(p->have, p->room, room), *asked = longer(p->asked, p->room, room);
        if (!have || !asked) {
            free(have);
            free(asked);
            return -ENOMEM;
        }
        free(p->have);
        free(p->asked);
        p->have = have;
        p->asked = asked;
        p->room = room;
    }
    p->count = count;
    return 0;
}
