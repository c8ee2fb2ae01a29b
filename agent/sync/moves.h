/* Which page had a content: an index of what was published when an epoch began, by hash, for finding content that moved
 * by whole pages. Made by a capture's first pass when so much may have changed that looking at all hashes costs no more
 * than that, and gone with it. Pool thread. */
#ifndef SYNC_MOVES_H
#define SYNC_MOVES_H

#include "agent/track/extents.h"
#include "agent/track/hashes.h"

#define MOVES_MEMORY (64u << 20) /* of one index: 2.7 million pages, 10 GiB; longer regions are sent without */
#define MOVES_LEAST 64u          /* pages to be looked at, and */
#define MOVES_SHARE 64u          /* one of as many of the region's: then an index is worth it */

struct moves;

/* Of the first `pages` pages, but for those of `not`, in ascending order. NULL: too many, or no memory. */
struct moves *moves_new(const struct hashes *published, uint64_t pages, const struct extents * not );
bool moves_find(const struct moves *m, struct page_hash h, uint64_t *page);
void moves_free(struct moves *m);

#endif
