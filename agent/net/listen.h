/* Listening sockets: where, and what comes in. Loop thread only. */
#ifndef NET_LISTEN_H
#define NET_LISTEN_H

#include <stddef.h>
#include <sys/queue.h>
#include <uv.h>

struct listener;
TAILQ_HEAD(listeners, listener);

/* What came in: a malloc'ed uv_tcp_t or uv_pipe_t, the callee's, closed and freed by it. Or stream NULL and a negative errno. */
typedef void listen_take(void *owner, uv_stream_t *stream, int err);

/* addr "HOST:PORT" (port 0: any) or "unix:PATH" (a socket nobody listens on any more is replaced; mode 0600). On success bound holds the address as
 * one would dial it. Negative errno else; the listener may be on the list then, closing. `closed` is called for each as it leaves the list. */
int listen_open(struct listeners *all, uv_loop_t *loop, const char *addr, char *bound, size_t cap, listen_take *take,
                void (*closed)(void *owner), void *owner);
void listen_close(struct listeners *all);

#endif
