/* How a peer's socket comes about: an address dialled, an agent started beside a store. */
#ifndef CLI_DIAL_H
#define CLI_DIAL_H

#include "agent/cli/peer.h"

/* Sets p->fd, and p->child when one was started. 0, or a negative errno with p->error. */
int dial(struct peer *p, bool make_store);
/* With TLS, over p->tls: what came (0: there was none yet) or what is to go. 0, or a negative errno with p->error. */
ssize_t dial_tls_read(struct peer *p, uint8_t *to, size_t cap);
int dial_tls_write(struct peer *p, const void *bytes, size_t len);
int dial_tls_flush(struct peer *p);
/* Stops the child, if any, waits for it (its store is closed then) and removes what was made for it. */
void dial_end(struct peer *p);

#endif
