/* What conn.c (life, receiving) and conn_out.c (queues, sending) share. Not for owners of connections.
 *
 * Sending. Each stream has a FIFO; streams whose first frame may go now stand in the ready list of their priority, and
 * take turns. Stream 0 is apart: always first, and the only one served before the peer's HELLO is here. The pump runs
 * once a loop turn while there is something to send (idle handle), so that frames queued in one turn leave in one
 * system call. It offers the kernel a batch of up to CONN_AHEAD bytes; what the kernel does not take goes back to its
 * queues, except for the one frame it took a part of, or the next one: that is written by uv_write, whose callback
 * pumps on. So a frame that has become urgent never waits behind more of ours than that one. */
#ifndef NET_CONN_PRIVATE_H
#define NET_CONN_PRIVATE_H

#include "agent/net/conn.h"

#include <sys/queue.h>

#define CONN_BUCKETS 256u
#define CONN_CONTROL_MAX (1u << 20) /* bytes of answers on stream 0 that a peer may leave unread */
#define CONN_CREDIT_STEP (FRAME_WINDOW / 16)

enum conn_state {
    CONN_DIALLING,
    CONN_GREETING,
    CONN_OPEN,
    CONN_LEAVING, /* last frames on their way, then our end shut, then the peer's awaited: for at most CONN_LEAVE_MS */
    CONN_CLOSED   /* handles closing; `closed` is told when the last is */
};

struct out {
    TAILQ_ENTRY(out) link;
    struct buf *payload; /* NULL: none */
    uint32_t stream;
    uint8_t type;
    bool sealed; /* header is written */
    uint8_t header[FRAME_HEADER];
};
TAILQ_HEAD(out_queue, out);

struct stream {
    struct stream *next; /* in its bucket */
    uint32_t id;
    enum conn_priority priority;
    bool ready;      /* stands in conn.ready */
    bool high;       /* queue was above CONN_LOW: `drained` is owed */
    bool forgotten;  /* by us; its peer's CLOSE is awaited, what comes is dropped */
    uint32_t credit; /* given back by the owner, not yet told to the peer */
    uint32_t recv_window, send_window;
    uint32_t sealed; /* frames that have their number */
    size_t queued; /* bytes, headers included */
    struct out_queue queue;
    TAILQ_ENTRY(stream) turn;
};
TAILQ_HEAD(stream_list, stream);

struct conn {
    uv_loop_t *loop;
    enum conn_state state;
    struct frame_hello self;
    const struct conn_ops *ops;
    void *owner;
    char peer[320];
    unsigned handles; /* open handles and requests that name this struct: freed at 0 */

    uv_stream_t *socket; /* NULL while there is none */
    uv_timer_t timer;
    uv_idle_t pump;
    uv_write_t write;
    uv_shutdown_t shutdown;

    struct addrinfo *addresses, *address; /* dialling: all, and the next to try */
    uv_getaddrinfo_t resolve;
    uv_connect_t connect;
    int dial_err;

    uint8_t *in;
    size_t in_start, in_end;
    unsigned silence_ms, silent; /* ticks of silence_ms / 5 without a byte */
    bool heard;
    uint64_t bytes_in, bytes_out;

    struct stream control;
    struct stream *buckets[CONN_BUCKETS];
    unsigned streams;
    size_t queued; /* of all streams */
    struct stream_list ready[CONN_PRIORITIES];
    struct out *part; /* with the kernel, by uv_write */
    size_t part_at;
    bool control_only; /* leaving in a hurry: only stream 0 is sent, nothing is listened to */
    bool shut;
    int mute; /* not 0: writing failed so; what the peer said last is still read */

    int err;
    char why[FRAME_TEXT_MAX + 400];
};

static inline size_t out_size(const struct out *o)
{
    return FRAME_HEADER + (o->payload ? o->payload->len : 0);
}

static inline uint32_t out_window(const struct out *o)
{
    return o->payload ? conn_window(o->type, o->payload->data, o->payload->len) : 0;
}

/* conn.c */
/* Ends the connection: the reason is kept, unless one is; with a code the peer is told it by an ERROR frame. */
void conn_fault(struct conn *c, int err, uint16_t code, const char *format, ...) __attribute__((format(printf, 4, 5)));
void conn_destroy(struct conn *c);

/* conn_out.c */
void conn_out_init(struct conn *c);
void conn_out_free(struct conn *c);
struct stream *conn_stream(struct conn *c, uint32_t id);     /* NULL when there is none */
struct stream *conn_stream_new(struct conn *c, uint32_t id); /* NULL without memory */
void conn_stream_free(struct conn *c, struct stream *s);
void conn_stream_ready(struct conn *c, struct stream *s); /* looks again whether its first frame may go */
void conn_drop_queues(struct conn *c);
void conn_control(struct conn *c, uint8_t type, const void *payload, size_t len);
void conn_kick(struct conn *c); /* there may be something to send */

#endif
