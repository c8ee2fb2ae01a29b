/* Comparing bodies with the remote's regions by hash trees; see reconcile.c. Loop thread. */
#ifndef SYNC_RECONCILE_H
#define SYNC_RECONCILE_H

#include "agent/sync/model.h"

/* The region's body, which is of the remote's lineage, is compared; the region is HASHING until that ends it. */
void reconcile_start(struct region *r);
void reconciles_step(struct group *g); /* a capture has ended: what waited for it goes on */
void reconciles_drop(struct link *k);  /* the link is lost */
/* A job has the `published` of the body, or of one of the group's. */
bool reconcile_has(const struct link *k, const struct body *b);
bool reconcile_reads(const struct link *k, const struct group *g);

/* Frames of the link's own stream: PINNED and HASHES. NULL, or why the connection has to end. */
const char *reconcile_take(struct link *k, uint8_t type, struct buf *payload);
void reconcile_failed(struct link *k, uint32_t request, const char *text);

#endif
