/* Change detection: which pages of a region may have changed since the last look. One ops table a strategy, one file
 * each.
 *
 * A tracker may say too much (reading compares with what was published), never too little. It is asked by a capture, on
 * a pool thread; nothing else looks at the same map meanwhile. What it finds is the capture's to read after it returns:
 * a store in between shows in the next look. */
#ifndef TRACK_TRACK_H
#define TRACK_TRACK_H

#include "agent/track/extents.h"
#include "agent/track/hashes.h"

struct track_ops;
struct softdirty;

/* A writable shared mapping of a region in some program. */
struct track_map {
    const struct track_ops *ops;
    int pagemap; /* that program's; -1 when it could not be had */
    uint64_t addr, len, offset;
    struct softdirty *soft; /* of that program; only track_softdirty's */
};

/* What a capture knows of the file, and why it asks. */
struct track_file {
    int fd;
    uint64_t size;
    const struct hashes *published;
    uint64_t holes_from; /* holes before it say nothing of the content: a mirror's, which were not fetched */
    bool clock;  /* the clock wants to know, and no sync point waits for it: stores may be left to the next one */
    uint64_t began; /* CLOCK_MONOTONIC in ns: what one look found for several maps since then counts for all; 0: none */
    bool events; /* the file had events since the last look (watch.h) */
};

struct track_ops {
    const char *name;
    /* Whether the map can be tracked so: 0, or a negative errno. The program has armed its side already. */
    int (*arm)(const struct track_map *map);
    /* Adds what may have changed since the last collect, and re-arms it in the same step. A negative errno: the map can
     * no longer be seen through (-ESRCH: its program is gone); then nothing is known of what it missed. */
    int (*collect)(const struct track_map *map, const struct track_file *file, struct extents *out);
    /* What one collect costs an unchanged region: whether it reads all of it. */
    bool reads_all;
};

extern const struct track_ops track_uffd, track_softdirty, track_hash, track_inotify;

/* The seam all collects go through. */
int track_collect(const struct track_map *map, const struct track_file *file, struct extents *out);
/* Everything that is data in [start, end) of the file, and everything that was published as data: what an unknown
 * region may have changed. */
int track_within(const struct track_file *file, uint64_t start, uint64_t end, struct extents *out);
int track_everything(const struct track_file *file, struct extents *out);

#endif
