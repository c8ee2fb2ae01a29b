/* Reference-counted byte buffers: one payload travels from the reader of a page to the socket, or from the socket to
 * the journal, uncopied.
 *
 * Contents are written by the one who made it and only read once a second holder exists. Counting is atomic: any thread
 * may hold or drop. */
#ifndef BASE_BUF_H
#define BASE_BUF_H

#include <stddef.h>
#include <stdint.h>

struct buf {
    uint32_t refs;
    uint32_t len; /* bytes in use */
    uint32_t cap;
    uint32_t hashed; /* not 0: `hash` is the payload's, so that workers hash and the loop thread need not */
    uint64_t hash;   /* frame_payload_hash(data, len) */
    uint8_t data[];
};

struct buf *buf_new(size_t cap); /* one reference, len 0; NULL without memory */
struct buf *buf_hold(struct buf *b);
void buf_drop(struct buf *b); /* NULL allowed */

#endif
