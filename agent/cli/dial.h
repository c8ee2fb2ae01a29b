/* How a peer's socket comes about: an address dialled, an agent started beside a store. */
#ifndef CLI_DIAL_H
#define CLI_DIAL_H

#include "agent/cli/peer.h"

/* Sets p->fd, and p->child when one was started. 0, or a negative errno with p->error. */
int dial(struct peer *p, bool make_store);
/* Stops the child, if any, waits for it (its store is closed then) and removes what was made for it. */
void dial_end(struct peer *p);

#endif
