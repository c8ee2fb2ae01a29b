/* What regions ought to hold: the protocol's rules for epochs, done once more, simply. Content is kept for the first
 * MODEL_PAGES pages; what is behind them has a size and nothing else. A page of which the protocol leaves open how it
 * comes out (a delta and other bytes for it in one epoch) is `open`, and not compared. */
#ifndef TESTS_FUZZ_MODEL_H
#define TESTS_FUZZ_MODEL_H

#include "tests/fuzz/fuzz.h"
#include "wire/frame.h"

#define MODEL_NAMES 4u
#define MODEL_PAGES 20u
#define MODEL_BYTES (MODEL_PAGES * FRAME_PAGE)
#define MODEL_FRAMES 48u

struct model_region {
    bool exists;
    uint64_t epoch, size, open; /* a bit a page */
    uint8_t bytes[MODEL_BYTES];
};

struct model {
    struct model_region region[MODEL_NAMES];
    bool lost; /* something was done that is not foretold: nothing is compared any more */
};

struct model_frame {
    uint8_t type;
    size_t len;
    uint8_t *payload;
};

/* An epoch as it was sent, well-formed or not. */
struct model_epoch {
    uint64_t seq;
    size_t n;
    struct model_frame frame[MODEL_FRAMES];
    bool too_long; /* more than that: what comes of it is not foretold */
    bool ended;
};

void model_note(struct model_epoch *e, uint8_t type, const void *payload, size_t len);
void model_drop(struct model_epoch *e); /* its frames */
/* Applies the epoch. False: the protocol does not allow that it is committed, and why says by what. A server that
 * refuses an allowed one is within its rights. */
bool model_apply(struct model *m, const struct model_epoch *e, const char **why);
void model_page_hash(uint8_t to[16], const uint8_t page[FRAME_PAGE]);

#endif
