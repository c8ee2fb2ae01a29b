/* The serving side of the protocol: sessions over a store. Loop thread only; the store does its disk work on threads of its own.
 *
 * One session a connection. It knows its peer by HELLO's identity, maps handles to region names, opens one store transaction for each epoch under way on a
 * stream, and answers. Everything it holds for a peer is bounded: handles, streams, pins, memory of open epochs (by windows). When the connection ends,
 * open epochs are dropped, pins given back; leases live on for their time. */
#ifndef NET_SERVER_H
#define NET_SERVER_H

#include "agent/base/id.h"
#include "agent/store/store.h"

#include <uv.h>

struct grants;
struct server;
struct tls_config;

struct server *server_new(uv_loop_t *loop, struct store *store, const struct id *identity, const char *host);
/* addr "HOST:PORT" (port 0: any) or "unix:PATH". On success bound holds the address as one would dial it, for the "listening wire ..." line. Negative errno else. */
int server_listen(struct server *s, const char *addr, char *bound, size_t cap);
/* What TCP listeners want of those who dial from now on; grants: who may do what, by TLS's identities (agent/net/grants.h). Both
 * may be NULL, and outlive the server. */
void server_secure(struct server *s, struct tls_config *tls, struct grants *grants);
int server_take(struct server *s, uv_stream_t *stream); /* one more connection, e.g. our own end of a socket pair */
/* Stops listening, finishes epochs whose END came, says so to the peers, closes. `done` then. */
void server_stop(struct server *s, void (*done)(void *arg), void *arg);
unsigned server_peers(const struct server *s);

#endif
