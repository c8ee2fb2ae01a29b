/* One capture of a group: scan everything, then read what may have changed, into an epoch. At most one a group at a
 * time.
 *
 * Content: everything stored or written before the capture began, and any subset of what was stored while it ran. No
 * sync point of the group is answered in between, so that is a state which the local disk, too, could have shown after
 * a power cut. Where a sync point had to be let go (the group was degraded, or its time was over) the pass is
 * `tainted`, and the same epoch gets another pass: scan, read. Passes end when one was not tainted.
 *
 *     SCANNING (job: all maps and marks) -> READING (jobs: slices of at most SLICE bytes) -> next pass, or the epoch is
 * closed
 *
 * A job borrows: bodies' descriptors and published hashes, programs' pagemaps and marks, by holds taken before it
 * starts; maps are copied. The loop thread touches none of a body's `published` while its group has a capture.
 *
 * A capture that is sure to be short (AT_ONCE_*) is made on the loop thread at once: two changes of thread cost more
 * than it does, and a sync point that changed a page or two waits for nothing else.
 *
 * If the program dies before the scan is over: nothing of the capture is sent, its bodies become unknown. If it dies
 * after: the capture goes on, since the files still have the bytes. If we die: the remote drops the open epoch; the
 * next agent finds every body unknown. */
#ifndef SYNC_CAPTURE_H
#define SYNC_CAPTURE_H

#include "agent/sync/model.h"
#include "agent/sync/moves.h"

struct part {
    struct region *region;
    struct body *body; /* held */
    uint32_t handle;
    struct track_map *maps; /* copies */
    struct program **owners;
    size_t nmaps;
    struct marks **marks;
    size_t nmarks;
    bool by_hash, everything;
    struct watch *watch; /* the body's, if it is to be heard */
    bool glance;         /* the clock's look at a file that is looked into only after events */
    /* the scan's results */
    struct extents found;
    uint64_t size, min_size;
    int64_t mtime, ctime, seen;
    struct program *failed; /* whose map could not be looked at */
    int err;                /* negative errno of the first map or file that could not be looked at */
    /* the reading */
    struct extents todo;
    size_t extent;
    uint64_t at, from_size, cut;
    uint64_t todo_bytes, looked; /* looked: of these, so far; written by the job, atomically */
    bool prepared, announce;
    bool plain, movable; /* neither deltas nor moves; moves are looked for */
    struct moves *moves;      /* once a page was to go whole */
    struct extents published; /* pages sent before that, whose hashes are this epoch's */
};

enum capture_phase { CAPTURE_SCANNING, CAPTURE_READING, CAPTURE_PAUSED };

struct capture {
    struct group *group;
    enum capture_phase phase;
    bool scan_only, clock, aborted, final, at_once; /* clock: nothing but the time asked for it */
    unsigned pass;
    struct part *parts;
    size_t nparts, part; /* part: being read */
    struct program **held;
    size_t nheld;
    struct item out[64];
    struct part *out_part[64];
    size_t nout;
    int err;
    struct epoch *epoch;
    struct op *ops; /* the group's, as of the first scan */
    uint64_t scan_us, read_us, pages, bytes;
};

enum capture_kind { CAPTURE_PUBLISH, CAPTURE_CLOCK, CAPTURE_SCAN };
/* Starts one; the group has none. 0, or a negative errno. */
int capture_start(struct group *g, enum capture_kind kind);
void capture_resume(struct capture *c); /* after PAUSED */
/* The epoch it writes will not be: stop at the next step. */
void capture_abort(struct capture *c);

/* capture_job.c. Pool threads; arg is the capture. */
void capture_scan(void *arg);
void capture_read(void *arg);
void marks_collect(struct marks *m, struct body *b); /* a program's last marks, as it goes */

/* epoch.c */
struct epoch *epoch_new(uint64_t seq);
int epoch_add(struct epoch *e, uint8_t type, struct buf *payload); /* takes the reference over, in any case */
struct touched *epoch_touched(struct epoch *e, const struct body *b);
int epoch_touch(struct epoch *e, struct region *r, struct body *b, uint64_t number);
void epoch_free(struct epoch *e);

#endif
