/* The local role: programs on one side (control socket), remotes on the other. Loop thread only. */
#ifndef SYNC_LOCAL_H
#define SYNC_LOCAL_H

#include <stdbool.h>
#include <uv.h>

struct local;
struct store;

/* Listens on socket_path (its directory is made 0700 when missing; one agent a socket: -EADDRINUSE). linger: call
 * agent_leave once no program is connected and all is acknowledged. 0, or a negative errno and a line in error. */
int local_start(struct local **out, uv_loop_t *loop, const char *socket_path, bool linger, const char *state_dir,
                char error[512]);
/* What the devices of this machine are made of: the agent's own store. It outlives the local role. */
void local_store(struct local *l, struct store *store);
/* Publishes what can be published within the programs' time-outs, then closes everything; done, then it is freed. */
void local_stop(struct local *l, void (*done)(void *arg), void *arg);

/* Given by the program that links this: end the loop in order. */
void agent_leave(void);

#endif
