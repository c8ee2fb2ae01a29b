/* The pager: remote regions presented to programs here. What the rest of the local agent calls. Loop thread only.
 *
 * Names inside: a *mount* is one region at one pinned epoch, in this agent, with the memfd that shows it; a *viewer* is
 * one program's view of it (wire/control.h); a *stretch* a mapping of a viewer. mount.h tells the states. */
#ifndef PAGE_PAGE_H
#define PAGE_PAGE_H

#include "agent/sync/model.h"

#include <stdio.h>

/* A program's message of the kinds OPEN to CLOSE. Descriptors that are kept are replaced by -1 in fds. 0, or a negative
 * errno that ends its connection. */
int page_message(struct program *p, uint8_t type, const void *data, size_t len, int *fds, size_t nfds);
void page_program_gone(struct program *p);

/* The link's connection is open, or lost; a frame on one of the pager's streams (false: it is none of its); the clock.
 */
void page_link_up(struct link *k);
void page_link_lost(struct link *k);
bool page_frame(struct link *k, uint32_t stream, uint8_t type, struct buf *payload);
void page_tick(struct link *k, uint64_t now);
void page_link_free(struct link *k);

/* The members of status's "views", each an object; *comma as it goes. text writes a JSON string. */
void page_status(FILE *f, struct link *k, bool *comma, void (*text)(FILE *f, const char *s));

#endif
