/* A connection between agents: frames of many streams over a bundle of sockets, with priorities, windows, heartbeats
 * and checksums. Loop thread only.
 *
 * States: dialling (client only) -> greeting (our HELLO is out, theirs awaited) -> open -> closed. `closed` is told
 * exactly once, from the loop, never from within a call to this module; the conn is freed after it. A connection that
 * is silent for CONN_SILENCE_MS (PINGs go out in between) is closed with -ETIMEDOUT, and so
 * is one of whose sockets one is. It never reconnects: that is its owner's decision.
 *
 * Sending: each stream has a queue of frames; the next frame to go is of the most urgent stream that has one and whose
 * window lets it go (round-robin among equals). Only a little is given to the kernel at a time, so that an urgent frame
 * waits behind at most CONN_AHEAD bytes. Bulk streams go over further sockets once there are some: a dialled connection
 * opens one when a stream is first set to CONN_BULK, and more when the path is too long for one socket's buffers. A
 * stream's frames arrive in their order whatever they go over. Payloads are not copied.
 *
 * Receiving: a data-bearing frame (PAGES, DATA, HASHES) uses up the peer's window on its stream; the owner gives it
 * back with conn_credit once it has put the bytes somewhere. A peer that sends beyond its window is closed with
 * -EPROTO. */
#ifndef NET_CONN_H
#define NET_CONN_H

#include "agent/base/buf.h"
#include "agent/base/id.h"
#include "wire/frame.h"

#include <uv.h>

#define CONN_SILENCE_MS 10000u
#define CONN_AHEAD (64u << 10)
#define CONN_STREAMS_MAX 4096u
#define CONN_SOCKETS 5u            /* of one connection */
#define CONN_EARLY_MAX (64u << 20) /* bytes of frames that may wait here for those before them, and 128 for each */

enum conn_priority {
    CONN_URGENT,
    CONN_NORMAL,
    CONN_BULK,
    CONN_PRIORITIES
}; /* control and demand reads; epochs; bulk */

/* How much of the window a frame uses: PACKED as much as it unpacks to, and no less than it brings. */
static inline uint32_t conn_window(uint8_t type, const uint8_t *payload, uint32_t len)
{
    size_t whole = type == FRAME_PACKED ? frame_packed_length(payload, len) : 0;
    return whole > len ? (uint32_t)whole
           : type == FRAME_PAGES || type == FRAME_DATA || type == FRAME_HASHES || type == FRAME_PACKED ? len
                                                                                                       : 0;
}

struct conn;
struct tls_config;

struct conn_ops {
    void (*open)(void *owner, const struct frame_hello *peer);
    /* One frame on stream > 0; for stream 0 CLOSE only (payload names the stream). The payload is held only for the
     * call: buf_hold to keep it. */
    void (*frame)(void *owner, uint32_t stream, uint8_t type, struct buf *payload);
    void (*drained)(void *owner,
                    uint32_t stream); /* the stream's queue fell under CONN_LOW bytes after having been above */
    void (*closed)(void *owner, int err,
                   const char *why); /* err negative errno; 0: conn_close was called, or the peer closed in order */
    /* Servers: the connection that the token names (conn_has_token), or NULL: a socket just taken is to JOIN it. This
     * conn is then closed with 0. NULL where none can join. */
    struct conn *(*join)(void *owner, const struct id *token);
};
#define CONN_LOW (1u << 20)

/* addr is "HOST:PORT" ([v6]:PORT too), with "tls:" before it or not, or "unix:PATH". A host is dialled with TLS when
 * tls_dial_config() is set, and with "tls:" never without. NULL only without memory: whatever else fails is told by
 * `closed`. */
struct conn *conn_dial(uv_loop_t *loop, const char *addr, const struct frame_hello *self, const struct conn_ops *ops,
                       void *owner);
/* Takes over an accepted stream handle (uv_tcp_t or uv_pipe_t, heap-allocated, freed by conn). Both sides greet. */
struct conn *conn_take(uv_stream_t *stream, const struct frame_hello *self, const struct conn_ops *ops, void *owner);

/* The same over TLS: nothing is said or listened to before the peer is known. */
struct conn *conn_take_tls(uv_stream_t *stream, struct tls_config *tls, const struct frame_hello *self,
                           const struct conn_ops *ops, void *owner);

/* Queues a frame: the payload's reference is taken over (NULL payload: none). Never fails visibly: on a closing
 * connection the frame is dropped. */
void conn_send(struct conn *c, uint32_t stream, uint8_t type, struct buf *payload);
void conn_set_priority(struct conn *c, uint32_t stream,
                       enum conn_priority p);              /* default CONN_NORMAL; stream 0 is always urgent */
/* Dials until there are that many sockets: for one who is sent bulk over a long path. The bundle grows by itself only for
 * what this end sends. */
void conn_want(struct conn *c, unsigned sockets);
size_t conn_queued(const struct conn *c, uint32_t stream); /* bytes not yet given to the kernel; stream 0: of all */
void conn_credit(struct conn *c, uint32_t stream, uint32_t bytes);
void conn_forget(struct conn *c, uint32_t stream); /* sends CLOSE, drops the queue */
/* Sends what is queued for at most a second when `flush`, then closes. With text: an ERROR frame of that code goes
 * first. */
void conn_close(struct conn *c, bool flush, uint16_t code, const char *text);
void conn_set_silence(struct conn *c, unsigned ms); /* instead of CONN_SILENCE_MS; tests are in a hurry */
const char *conn_peer(const struct conn *c);        /* "host:port", "unix:..." for messages */
const char *conn_identity(const struct conn *c);    /* whom TLS proved the peer to be; NULL: without TLS */
bool conn_has_token(const struct conn *c,
                    const struct id *token); /* the one our HELLO told; takes equally long for any */
unsigned conn_sockets(const struct conn *c); /* open ones */
uint64_t conn_bytes_out(const struct conn *c);
uint64_t conn_bytes_in(const struct conn *c);

#endif
