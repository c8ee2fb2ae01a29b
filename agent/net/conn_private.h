/* What the files of a connection share: conn.c (life), conn_socket.c (its sockets), conn_in.c (frames that come),
 * conn_out.c (queues of frames to go), conn_pump.c (sending), conn_grow.c (how many sockets), conn_tls.c (encryption). Not for owners.
 *
 * A connection is a bundle of sockets. Socket 0 is there from the beginning, and carries HELLO, stream 0 and all of the
 * urgent and normal streams; further ones, dialled by the client when a stream is first set to CONN_BULK and JOINed to
 * the bundle at the server, carry the bulk streams: what is urgent never stands behind bulk in a socket's buffers. On
 * further sockets stream 0 is for JOIN, HELLO, PING, PONG and ERROR only. All of a bundle live and end together, except
 * that one which the server has not greeted on yet may fail: the bundle then stays as it is.
 *
 * Sending. Each stream has a FIFO; streams whose first frame may go now stand in the ready list of their priority, and
 * take turns. A socket's own stream 0 goes first. The pump runs once a loop turn while there is something to send (idle
 * handle), so that frames queued in one turn leave in one system call. It offers each socket's kernel a batch of up to
 * `ahead` bytes; what is not taken goes back to its queues, except for the one frame a part of which was taken, or the
 * next one: that is written by uv_write, whose callback pumps on. So a frame that has become urgent never waits behind
 * more of ours than that one. A frame is numbered when it is first taken for a socket.
 *
 * Order. Frames of one stream may overtake each other on different sockets; early ones are held until the ones before
 * are there. On one socket a stream's numbers rise. What is held is bounded by CONN_EARLY_MAX for the connection, and
 * the sender keeps to that by rounds: a PING on every socket, whose PONGs say that all that was sent before the round
 * has arrived, and so is held no more. A CLOSE (on socket 0) must not overtake frames of its stream: for a stream that
 * has used further sockets it is sent when such a round is complete. */
#ifndef NET_CONN_PRIVATE_H
#define NET_CONN_PRIVATE_H

#include "agent/net/conn.h"
#include "agent/net/tcp_path.h"
#include "agent/net/tls.h"

#include <sys/queue.h>

#define CONN_BUCKETS 256u
#define CONN_CONTROL_MAX (1u << 20) /* bytes of answers on stream 0 that a peer may leave unread */
#define CONN_CREDIT_STEP (FRAME_WINDOW / 16)
#define CONN_HELLO_MS 5000u
#define CONN_LEAVE_MS 1000u
#define SOCK_IN_CAP (512u << 10)
#define CONN_ROUND 0x100000000u /* + its number: the token of a round's PINGs; below: those that ask who is alive */

enum conn_state {
    CONN_DIALLING,
    CONN_GREETING,
    CONN_OPEN,
    CONN_LEAVING, /* last frames on their way, then our ends shut, then the peer's awaited: for at most CONN_LEAVE_MS */
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

/* A frame that came before its turn. */
struct held {
    TAILQ_ENTRY(held) link;
    struct buf *payload;
    uint32_t order;
    uint8_t type;
};
TAILQ_HEAD(held_queue, held);

struct stream {
    struct stream *next; /* in its bucket */
    uint32_t id;
    enum conn_priority priority;
    bool ready;      /* stands in conn.ready */
    bool high;       /* queue was above CONN_LOW: `drained` is owed */
    bool spread;     /* frames of ours have gone over further sockets */
    bool forgotten;  /* closed by us, or by the peer and to be answered: what comes is dropped, what is to go too */
    bool told;       /* our CLOSE is out */
    bool heard;      /* the peer's CLOSE is here */
    uint64_t round;  /* forgotten, not told: CLOSE goes when this round is complete */
    uint32_t credit; /* given back by the owner, not yet told to the peer */
    uint32_t recv_window, send_window;
    uint32_t recv_next, send_next; /* orders */
    size_t queued;                 /* bytes, headers included */
    struct out_queue queue;
    struct held_queue *held; /* one for each socket, rising; NULL while none was needed */
    TAILQ_ENTRY(stream) turn;
};
TAILQ_HEAD(stream_list, stream);

enum sock_state {
    SOCK_DIALLING,
    SOCK_GREETING, /* ours is out, the peer's HELLO awaited */
    SOCK_OPEN
};

struct sock {
    struct conn *conn;
    unsigned index; /* 0: the first */
    enum sock_state state;
    uv_stream_t *stream; /* NULL while there is none */
    uv_connect_t connect;
    uv_write_t write;
    uv_shutdown_t shutdown;
    size_t ahead; /* bytes to offer the kernel at a time */
    uint8_t *in;
    size_t in_start, in_end, in_turn; /* in_turn: bytes read since the loop last went on to others */
    bool heard;
    unsigned silent;          /* ticks of silence_ms / 5 without a byte */
    struct out_queue control; /* its stream 0 */
    size_t control_queued;
    struct out *part; /* with the kernel, by uv_write */
    size_t part_at;
    bool shut, ended;                    /* our end; the peer's */
    bool awaited;                        /* its PONG of the round */
    struct tls *tls;                     /* conn_tls.c; NULL: frames go as they are */
    bool greeted;                        /* likewise: the first frame is out */
    uint8_t *sealed;                     /* records that are with the kernel, by uv_write */
    struct tcp_path path; /* conn_grow.c: as it was at the last look */
};

struct conn {
    uv_loop_t *loop;
    enum conn_state state;
    struct frame_hello self;
    const struct conn_ops *ops;
    void *owner;
    char peer[320];
    unsigned handles; /* open handles and requests that name this struct: freed at 0 */

    struct sock *socks[CONN_SOCKETS];
    uv_timer_t timer;
    uv_idle_t pump;

    struct addrinfo *addresses, *address; /* dialling: all, and the next to try */
    uv_getaddrinfo_t resolve;
    int dial_err;
    char *path;                      /* dialled: unix path */
    struct tls_config *tls;          /* of its TCP sockets; NULL: none */
    char *tls_host;                  /* dialled: whose certificate it is to be */
    struct sockaddr_storage dialled; /* or the address that answered; AF_UNSPEC: none */
    struct id identity, token;       /* the peer's; a client's further sockets join by the token */

    unsigned silence_ms;
    uint64_t bytes_in, bytes_out;

    struct stream *buckets[CONN_BUCKETS];
    unsigned streams;
    size_t queued; /* of all streams but 0 */
    struct stream_list ready[CONN_PRIORITIES];
    bool control_only; /* leaving in a hurry: only stream 0 is sent, nothing is listened to */
    bool ending;       /* the peer has shut a socket: the others' ends are awaited */
    int mute;          /* not 0: a socket failed so; what the peer said last is still read */

    size_t held; /* cost of the early frames here */
    bool spread; /* frames of ours have gone over further sockets: rounds are needed */
    uint64_t round;
    bool round_on;
    size_t early_old, early_new; /* cost of frames not known to have arrived: sent before the round, and since */
    unsigned closing;            /* streams forgotten and not told */

    bool bulk;       /* a stream was set to CONN_BULK */
    bool enough;     /* no more sockets */
    unsigned wanted; /* conn_want */
    uint64_t looked; /* conn_grow.c: loop time, and the bundle's bytes a second before it last grew */
    double rate;
    bool grown;

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

/* What a frame counts for among those that may be early: about the memory that it takes. */
static inline size_t early_cost(const struct buf *payload)
{
    return 128 + (payload ? payload->len : 0);
}

/* conn.c */
/* Ends the connection: the reason is kept, unless one is; with a code the peer is told it by an ERROR frame. */
void conn_fault(struct conn *c, int err, uint16_t code, const char *format, ...) __attribute__((format(printf, 4, 5)));
void conn_destroy(struct conn *c);
void conn_on_timer(uv_timer_t *t);
void conn_handle_gone(struct conn *c);

/* conn_socket.c */
struct sock *sock_new(struct conn *c, unsigned index); /* NULL without memory */
void sock_close(struct sock *k);                       /* freed when libuv is done with it */
void sock_stream_close(struct sock *k);                /* only the stream, for another to be tried */
bool sock_stream_new(struct sock *k, bool tcp);
int sock_dial_unix(struct sock *k, const char *path, uv_connect_cb done);
void sock_room(struct sock *k);  /* makes some in k->in, when it is short */
void sock_greet(struct sock *k); /* the first frame */
void sock_begin(struct sock *k); /* connected: options are set, reading starts, the first frame goes */
void sock_failed(struct sock *k, int err);
/* A server's accepted socket turns out to be one of another connection's: moves there. */
int sock_join(struct sock *k, struct conn *to);

/* conn_in.c */
bool conn_step(struct sock *k); /* takes one whole frame off the input; false: there is none, or no more is wanted */
bool conn_deaf(const struct conn *c);
void stream_drop_held(struct conn *c, struct stream *s);

/* conn_out.c */
void conn_out_init(struct conn *c);
void conn_out_free(struct conn *c);
struct stream *conn_stream(struct conn *c, uint32_t id);     /* NULL when there is none */
struct stream *conn_stream_new(struct conn *c, uint32_t id); /* NULL without memory */
void conn_stream_free(struct conn *c, struct stream *s);
void conn_stream_ready(struct conn *c, struct stream *s); /* looks again whether its first frame may go */
void conn_drop_queues(struct conn *c);
void conn_stream_drop(struct conn *c, struct stream *s); /* forgotten: queue and held frames go, CLOSE is sent or due */
void conn_closings(struct conn *c);                      /* a round is complete: CLOSEs that are due */
void conn_control(struct sock *k, uint8_t type, const void *payload, size_t len);
void out_free(struct out *o);
void out_queue_free(struct out_queue *q);

/* conn_pump.c */
void conn_kick(struct conn *c); /* there may be something to send */
void conn_round_pong(struct sock *k, uint64_t token);
#define CONN_BATCH 64
struct out *conn_next_out(struct sock *k); /* taken off its queue; NULL: nothing may go on this socket */
unsigned conn_pieces(const struct out *o, size_t at, uv_buf_t *to); /* what of it is beyond byte `at`: 0 to 2 */
void conn_write_failed(struct sock *k, int err);

/* conn_tls.c: a socket's records between its frames and the kernel. */
void conn_tls_begin(struct sock *k); /* greets when the peer is known */
void conn_tls_in(struct sock *k, const uint8_t *bytes, size_t len); /* what came: turned into k->in, and stepped */
uint8_t *conn_tls_room(size_t *cap);                                /* where to read to, until conn_tls_in */
bool conn_tls_pump(struct sock *k, uint32_t *streams, unsigned *n); /* a batch; true: more may go at once */
void conn_tls_bye(struct sock *k);                                  /* the last of it, before its end is shut */

/* conn_grow.c */
void conn_grow(struct conn *c); /* opens a further socket, if that is possible and there is none on its way */
void conn_grow_on(struct conn *c); /* a further one is open: the next that conn_want asked for */
void conn_grow_look(struct conn *c);

#endif
