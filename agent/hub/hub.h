/* A store whose store is other agents: one stream in, a copy on every replica.
 *
 * It fills in the seam of store.h, so sessions serve it like any other. It keeps nothing on disk: what there is, is on
 * the replicas; leases and fences that it gives to its writers are its own, in memory, and on the replicas it holds
 * leases under its own identity. See inside.h for how. */
#ifndef HUB_HUB_H
#define HUB_HUB_H

#include "agent/base/id.h"
#include "agent/store/store.h"

#include <uv.h>

#define HUB_REPLICAS 16u
#define HUB_QUEUE (64u << 20) /* bytes that a replica may be behind the fastest */
#define HUB_WAIT_MS 1000u     /* and for how long it may keep waiting what another has acknowledged */

/* Whether url is of the form hub:..., right or wrong. */
bool hub_is(const char *url);
/* 0, or -EINVAL and what is wrong with it. */
int hub_check(const char *url, char error[STORE_ERROR]);
/* url: "hub:ADDR,ADDR...", each as one dials it. Never waits: replicas are dialled from the loop, for as long as it
 * takes. identity: under which leases are held at the replicas. 0, or a negative errno and what, why in error. */
int hub_open(struct store **out, uv_loop_t *loop, const char *url, const struct id *identity, const char *host,
             char error[STORE_ERROR]);

#endif
