/* Memory that a program's shim and its local agent share. Host byte order: it never leaves the machine. Three kinds of memfd, handed
 * over the control socket; the first two are made by the shim, the last by the agent:
 *
 * - struct shared, one a process: where its threads wait for the agent's answers, without a lock and without reading the socket.
 * - struct marks, one for each file the process writes by calls: which pages, how small it was cut. Made at the first such call.
 * - struct view, one for each view of a pulled region: what all processes that have it must know of its pages.
 *
 * Marks and captures. A writing call marks its pages before the raw call and again after it, then leaves `calls`. The agent takes marks by exchanging
 * words with 0, summary first, and reads the file after. So a mark taken while the call copies comes back when it ends; and a process killed in between is
 * seen by its `calls` not being 0, whereupon the agent hashes what it had open. */
#ifndef WIRE_SHARED_H
#define WIRE_SHARED_H

#include <stddef.h>
#include <stdint.h>

#define SHARED_VERSION 3u
#define SHARED_SLOTS 256u

/* A slot: the shim takes a free one (FREE -> WAITING by compare and exchange), sends a request that names it, waits on `state` as a futex. The agent stores
 * `result`, then DONE, then wakes. The shim reads the result and stores FREE. */
enum shared_slot_state { SHARED_FREE, SHARED_WAITING, SHARED_DONE };

struct shared_slot {
    uint32_t state;
    int32_t result; /* 0 or a negative errno */
};

struct shared {
    uint32_t version;
    uint32_t notices;  /* NOTICE messages the agent has sent over the socket: when it moved, there is one to read and print */
    uint32_t calls;    /* writing calls under way (between begin and end marks), over all threads */
    uint32_t beats;    /* the agent adds one at least every second while it lives: the shim's own limit for a stuck agent counts from the last */
    struct shared_slot slots[SHARED_SLOTS];
};

#define MARKS_PAGE 4096u
#define MARKS_WORDS 262144u /* of 64 pages each: 64 GiB of file; beyond, `beyond` is set */
#define MARKS_SUMMARY (MARKS_WORDS / 64u)

struct marks {
    uint64_t min_size; /* lowest size by truncation since taken; UINT64_MAX when it never shrank */
    uint32_t beyond;   /* something past the bitmap was written */
    uint32_t all;      /* anything may have been (content moved: collapse, insert) */
    uint64_t summary[MARKS_SUMMARY]; /* bit i: word i of pages may have bits */
    uint64_t pages[MARKS_WORDS];
};

/* Beside the memfd that holds a view's pages; only the agent writes it.
 *
 * Pages may be taken out of the memfd again: evicted, or because another epoch has come (follow). `punches` is the sequence of that, odd while it is done.
 * Who reads the memfd by calls notes it, makes sure that the pages are there (when it is odd: by FETCH, which is answered when it is even), reads, and
 * begins again when it moved. Size and epoch change only while it is odd. Who writes by calls raises `calls` of its struct shared first, and only then
 * looks at it; the agent makes it odd first, and only then looks at `calls`: one of the two sees the other and lets it pass. Threads in mappings need none
 * of it: they fault. */
#define VIEW_MOVES 1u
#define VIEW_FOLLOWS 2u /* and the epoch may change */

struct view {
    uint32_t version; /* SHARED_VERSION */
    int32_t failed;   /* a negative errno once pages cannot be had any more: those that are missing are poisoned */
    uint64_t size;
    uint64_t punches;
    uint64_t epoch;  /* that its pages are of */
    int64_t mtime_ns;
    uint32_t mirror; /* 1: programs may write it */
    uint32_t moves;  /* VIEW_MOVES: pages may be taken out at any time; else never, once they are there. Fixed */
    uint64_t base;   /* a mirror's: a hole at or beyond it is zeros, whatever the remote has there; the others are what the remote has */
};

/* The agent's. Between the two, pages go. */
static inline void view_punch_begin(struct view *v)
{
    __atomic_store_n(&v->punches, v->punches + 1, __ATOMIC_SEQ_CST);
    __atomic_thread_fence(__ATOMIC_SEQ_CST);
}

static inline void view_punch_end(struct view *v)
{
    __atomic_store_n(&v->punches, v->punches + 1, __ATOMIC_SEQ_CST);
}

static inline void marks_min_size(struct marks *m, uint64_t size)
{
    uint64_t old = __atomic_load_n(&m->min_size, __ATOMIC_RELAXED);
    while (size < old && !__atomic_compare_exchange_n(&m->min_size, &old, size, 0, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
        ;
}

/* Pages of [offset, offset + len) are dirty. Async-signal-safe, any thread. */
static inline void marks_add(struct marks *m, uint64_t offset, uint64_t len)
{
    if (!len)
        return;
    uint64_t last = offset + len - 1 < offset ? UINT64_MAX : offset + len - 1;
    uint64_t from = offset / MARKS_PAGE, to = last / MARKS_PAGE;
    if (to >= (uint64_t)MARKS_WORDS * 64) {
        __atomic_store_n(&m->beyond, 1u, __ATOMIC_SEQ_CST);
        to = (uint64_t)MARKS_WORDS * 64 - 1;
    }
    for (uint64_t p = from; p <= to;) {
        uint64_t word = p / 64, lo = p % 64, hi = to / 64 == word ? to % 64 : 63;
        uint64_t bits = (~0ULL >> (63 - hi)) & (~0ULL << lo);
        __atomic_fetch_or(&m->pages[word], bits, __ATOMIC_SEQ_CST);
        __atomic_fetch_or(&m->summary[word / 64], 1ULL << (word % 64), __ATOMIC_SEQ_CST);
        p = (word + 1) * 64;
    }
}

#endif
