/* What txn.c (adding, handing in), legs.c (the ways to the replicas) and settle.c (their answers) share. txn.c tells
 * the story. */
#ifndef HUB_TXN_H
#define HUB_TXN_H

#include "agent/hub/inside.h"

static inline struct hub_txn *txn_of(struct store_txn *t)
{
    return (struct hub_txn *)(void *)t;
}

/* legs.c */
struct lane *lane_of(struct hub *h, const void *chain);
void lanes_tick(struct hub *h);
bool leg_live(const struct replica *r); /* epochs go to it as they come */
void leg_end(struct hub_txn *t, struct replica *r);
void leg_abort(struct hub_txn *t, struct replica *r);
void leg_flush(struct hub_txn *t, struct replica *r); /* all that is kept, and END if there was one */
bool txn_queued(const struct hub_txn *t);
void txn_items_drop(struct hub_txn *t);
bool txn_behind_held(const struct hub_txn *t);
void txn_begin(struct hub_txn *t);
void txn_unblock(struct hub_txn *t);
void txn_frame(struct hub_txn *t, struct item i); /* one more, to all */

/* txn.c */
void txn_names_busy(struct hub_txn *t, int by);
bool txn_may_end(const struct hub_txn *t);
void txn_end(struct hub_txn *t);
void hub_txn_free(struct hub_txn *t);

/* settle.c */
bool leg_unanswered(const struct hub_txn *t, unsigned replica);

#endif
