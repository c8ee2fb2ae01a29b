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

/* Mirrors: a region whose file is a mount's memfd. */
struct mount *page_mount_of(struct link *k, int fd); /* NULL: it is none's */
/* The body is the mount's from now on. -EOPNOTSUPP where there is no userfaultfd, -EIO when it has failed. */
int page_adopt(struct mount *m, struct body *b);
/* Where it comes from; true: it was made here, and the remote has nothing of that name. */
bool page_made(const struct mount *m, struct id *lineage, uint64_t *epoch);
void page_joined(struct body *b);                /* the region is attached: it will be written to */
int page_writable(const struct body *b);         /* 0: now; 1: not yet; or a negative errno: never */
void page_durable(struct body *b);               /* b->durable has risen */
/* Epochs of its group have become durable, or a capture is over. want: a publication may be asked for. */
void page_published(struct body *b, bool want);
void page_captured(struct body *b, const struct extents *looked); /* of a mirror: a capture has read these */
void page_lost(struct body *b, const char *why); /* what is not here is not to be had any more */

/* The members of status's "views", each an object; *comma as it goes. text writes a JSON string. */
void page_status(FILE *f, struct link *k, bool *comma, void (*text)(FILE *f, const char *s));

#endif
