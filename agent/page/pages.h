/* Which pages of a view are there, and which have been asked for: two bits a page, and arithmetic over runs of them. No
 * I/O, no locks. Bits are of the loop thread. */
#ifndef PAGE_PAGES_H
#define PAGE_PAGES_H

#include <stdbool.h>
#include <stdint.h>

#define PAGE_SIZE 4096u

struct pages {
    uint64_t count, room; /* room: pages that there are bits for */
    uint64_t *have;  /* the page is in the memfd */
    uint64_t *asked; /* a read for it is under way, and it has not come */
    uint64_t have_n, asked_n;
};

int pages_init(struct pages *p, uint64_t count); /* 0 or -ENOMEM */
void pages_free(struct pages *p);
/* So many pages from now on: those beyond are lost, new ones are neither there nor asked for. 0 or -ENOMEM. */
int pages_resize(struct pages *p, uint64_t count);

static inline bool pages_bit(const uint64_t *bits, uint64_t page)
{
    return bits[page / 64] >> page % 64 & 1;
}

/* [from, to) */
void pages_came(struct pages *p, uint64_t from, uint64_t to); /* have, no longer asked */
void pages_ask(struct pages *p, uint64_t from, uint64_t to);
void pages_unask(struct pages *p, uint64_t from, uint64_t to);
void pages_lose(struct pages *p, uint64_t from, uint64_t to); /* neither */

/* The first page of [from, to) that is neither there nor asked for; `to` when there is none. */
uint64_t pages_gap(const struct pages *p, uint64_t from, uint64_t to);
/* The first of [from, to) that is there or asked for. */
uint64_t pages_gap_end(const struct pages *p, uint64_t from, uint64_t to);
/* The same of pages that are not there, asked for or not. */
uint64_t pages_hole(const struct pages *p, uint64_t from, uint64_t to);
uint64_t pages_hole_end(const struct pages *p, uint64_t from, uint64_t to);

#endif
