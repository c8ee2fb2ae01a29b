/* What round.c, send.c and compare.c share. */
#ifndef HUB_ROUND_H
#define HUB_ROUND_H

#include "agent/hub/inside.h"

enum job_kind { JOB_SAME, JOB_ADVANCE, JOB_CREATE, JOB_UNLINK };

/* One region to be looked at, or changed, at the target. */
struct job {
    enum job_kind kind;
    struct round *round;
    struct hub_name *name;
    struct id lineage, writer;
    struct source source;
    uint64_t epoch, size;           /* at the source */
    uint64_t base, base_size;       /* at the target */
    uint32_t pin, base_pin, handle; /* pin at the source, base_pin at the target; handle: of its look at the source */
};

/* Nodes or pages, in their order. */
struct nodes {
    uint64_t *at;
    size_t n, cap;
};

/* Comparing and copying one region: see compare.c. */
struct compare {
    struct job *job;
    bool copying, differs, failed;
    unsigned top, level;
    struct nodes tops, now, next;
    size_t tops_done, cursor; /* cursor: in now, or in pages when copying */
    uint64_t offset;          /* a new region: read up to here */
    unsigned asked;
};

enum round_phase {
    ROUND_LOOK,    /* leased names are attached at the target; no open epoch is too large to be kept */
    ROUND_DRAIN,   /* ENDs are held back; what the source has of them is answered */
    ROUND_LIST,    /* both say what they have */
    ROUND_PIN,     /* the source keeps it readable; then the cut: ENDs go on, live epochs are kept for the target */
    ROUND_PREPARE, /* the target's pins and leases, and what CREATE needs to know */
    ROUND_SAME,    /* regions at the same epoch: is their content? */
    ROUND_SEND,    /* an epoch for each writer */
    ROUND_COMMIT,  /* the target's answer to it */
    ROUND_FLUSH,   /* the kept epochs go to it */
};

struct listing {
    struct round *round;
    struct frame_entry *entries;
    size_t n, cap;
};

struct round {
    struct hub *hub;
    struct replica *source, *target;
    bool merge; /* opening: only what the source has more of; there is nothing live */
    enum round_phase phase;
    bool held, open, dead; /* dead: freed when the last answer has come */
    unsigned refs;         /* answers awaited, and one for being at work */
    uint64_t held_since, began;
    unsigned asked; /* answers awaited in this phase */
    char why[STORE_ERROR];
    struct listing here, there;
    struct job *jobs;
    size_t jobs_n, job, first; /* job: at work; first: of its writer's */
    uint64_t seq, frames, bytes;
    struct compare compare;
};

void round_drop(struct round *o); /* one answer less */
void round_fail(struct round *o, const char *format, ...) __attribute__((format(printf, 2, 3)));

/* send.c */
void round_send(struct round *o, uint8_t type, struct buf *b); /* one more frame of the open epoch */
/* Regions of one writer, one after the other. True while there is something left to do at once; the round may be gone
 * when it is false. */
bool round_send_step(struct round *o);

/* compare.c */
void compare_begin(struct round *o, struct job *job);
bool compare_step(struct round *o); /* true when it is done; differs then says of a JOB_SAME whether it is not */
void compare_free(struct compare *c);

#endif
