/* Every region of a store as a network block device. Loop thread only.
 *
 * An export is a region under its name; the empty name is the store's only region. What a client reads is the newest
 * durable epoch, at every request anew. What it writes is gathered into epochs of the region, which FLUSH and FUA close
 * and wait for. See inside.h for how, wire/nbd.md for what is spoken. */
#ifndef NBD_NBD_H
#define NBD_NBD_H

#include "agent/base/id.h"
#include "agent/store/store.h"

#include <uv.h>

struct nbd;

/* identity: the agent's; what is written is written by one derived from
 * it, so that its leases are not those of the agent's own programs. NULL without memory. */
struct nbd *nbd_new(uv_loop_t *loop, struct store *store, const struct id *identity, const char *host);
/* As server_listen (agent/net/server.h). */
int nbd_listen(struct nbd *n, const char *addr, char *bound, size_t cap);
/* Serves one end of a connected socket, which is the server's from now on, whatever is returned. name NULL: by the usual
 * handshake. Else the export of this name, from the first byte as after a handshake, with replies that are not in chunks:
 * what a kernel's device speaks. `done` then tells, once and never from within this call, the size and the flags
 * (NBD_FLAG_*, wire/nbd.h) that the other end has to know, before anything is read of the socket; or a negative errno
 * and why, and the socket is closed. who: the client, in log and lease; sockets of one `who` write together. 0 or a
 * negative errno, and no call of `done`. */
typedef void nbd_served(void *arg, int err, const char *text, uint64_t size, uint16_t flags);
int nbd_serve(struct nbd *n, int fd, const char *name, const char *who, nbd_served *done, void *arg);
/* Stops listening, closes every connection, commits what was gathered, gives leases back. `done` then, and it is gone.
 */
void nbd_stop(struct nbd *n, void (*done)(void *arg), void *arg);

#endif
