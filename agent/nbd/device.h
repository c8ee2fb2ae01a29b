/* The kernel devices of an agent: regions of its own store, or of a remote's, as /dev/nbdN of this machine. Loop thread
 * only.
 *
 * A device is a client of a block device server of this module's, over a socket pair whose other end the kernel gets
 * (kernel.h) from a thread of the pool. So what is said of NBD clients in inside.h holds for it: its first write takes
 * the lease, its flushes close epochs. A remote's regions are served over a hub with that one replica (hub/hub.h).
 *
 *     attach --the region looked up--> connecting --kernel has its size--> connected --detached by anybody--> gone
 *
 * An agent that ends in order writes back and disconnects its devices. If it is killed their sockets close: all I/O on
 * them fails (EIO), and the next agent that attaches a device, or `memsync detach`, disconnects them. What had been
 * flushed is in the store, what had not is lost, as with a disk that is unplugged. */
#ifndef NBD_DEVICE_H
#define NBD_DEVICE_H

#include "agent/base/id.h"
#include "agent/store/store.h"

#include <stdio.h>
#include <uv.h>

struct devices;

/* NULL without memory. */
struct devices *devices_new(uv_loop_t *loop, const struct id *identity, const char *host);
/* The agent's own store. It outlives the devices. */
void devices_store(struct devices *d, struct store *store);
/* remote: an agent's address, or "" for the own store. device: "/dev/nbdN" or "auto". done, once and never from within
 * this call: 0 and the device's path, or a negative errno and a line. 0; or a negative errno and perhaps a line, and no
 * call of done. */
typedef void devices_done(void *arg, int err, const char *text);
int devices_attach(struct devices *d, const char *remote, const char *region, const char *device, bool read_only,
                   devices_done *done, void *arg, char error[STORE_ERROR]);
bool devices_any(const struct devices *d);
void devices_tick(struct devices *d, uint64_t now); /* often */
void devices_status(const struct devices *d, FILE *f,
                    void (*text)(FILE *f, const char *s)); /* JSON, an array's items */
/* Disconnects all, then done, then it is gone. */
void devices_stop(struct devices *d, void (*done)(void *arg), void *arg);

#endif
