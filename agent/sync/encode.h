/* Turns pages that differ from what was published into the frames of an epoch; see encode.c. Pool thread, as the job
 * that reads; the frames go into the capture's `out`, an error into its `err`. */
#ifndef SYNC_ENCODE_H
#define SYNC_ENCODE_H

#include "agent/sync/capture.h"

struct encoder;

struct encoder *encoder_new(struct capture *c); /* NULL without memory */
void encoder_free(struct encoder *b);
void encode_part(struct encoder *b, struct part *part); /* what follows is of this one; nothing may wait for a flush */
/* The page at offset, filled up with zeros, whose hash h is not the published one; published it counts from now on. */
void encode_page(struct encoder *b, uint64_t offset, const uint8_t *data, struct page_hash h);
void encode_flush(struct encoder *b); /* what waits for more becomes a frame */

#endif
