/* What to fetch next. Faults widen into windows; the background goes through the rest in the order that the rule asks
 * for.
 *
 * A window begins small, around a page that nobody saw coming, and doubles each time the next fault falls right behind
 * (or before) it, up to PLAN_WINDOW: a program that walks through the region in either direction soon asks for large
 * pieces. A few windows are remembered, so that several threads may each walk their own way. The background follows the
 * one that moved last, and then takes what is left. No I/O; of the loop thread. */
#ifndef PAGE_PLAN_H
#define PAGE_PLAN_H

#include "agent/page/pages.h"

#include <stddef.h>

#define PLAN_WINDOW 256u /* pages: FRAME_READ_MAX */
#define PLAN_FIRST 8u
#define PLAN_WALKS 8u
#define PLAN_CHUNK 16u /* pages: what a recorded order counts in */

struct plan_walk {
    uint64_t from, to; /* the last window */
    uint32_t size;
    uint64_t used; /* when, by faults */
};

struct plan {
    uint8_t order; /* enum control_order */
    bool random;   /* madvise said so: no windows */
    bool backwards;
    uint64_t cursor;          /* where the background is */
    uint64_t faults, touched; /* touched: where the last call ended */
    struct plan_walk walks[PLAN_WALKS];
    bool learning;      /* order=recorded with nothing recorded: the background would hide what is touched */
    uint64_t *recorded; /* chunks, in the order in which they were first touched; malloc'ed. More come at the end */
    size_t recorded_n, recorded_cap, recorded_at;
    uint8_t *known; /* the set of them; NULL unless order=recorded */
    uint64_t chunks; /* it has room for; a region that grows is not recorded beyond */
};

void plan_init(struct plan *p, uint8_t order);
/* For order=recorded: what was recorded before (taken over; NULL: nothing), of a region of that many chunks. */
void plan_record(struct plan *p, uint64_t *recorded, size_t n, uint64_t chunks);
void plan_free(struct plan *p);
/* The window that a fault on `page` asks for; contains the page, and is within the region. */
void plan_fault(struct plan *p, const struct pages *pages, uint64_t page, uint64_t *from, uint64_t *to);
/* A call reads [from, to): the background goes on behind it when calls follow one another. True: this one did. */
bool plan_touch(struct plan *p, uint64_t from, uint64_t to);
/* The background goes on from there, forwards. */
void plan_move(struct plan *p, uint64_t page);
/* The next run, of at most PLAN_WINDOW pages, that is neither there nor asked for. False: nothing is left to be done.
 */
bool plan_next(struct plan *p, const struct pages *pages, uint64_t *from, uint64_t *to);

#endif
