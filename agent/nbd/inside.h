/* What the parts of the block device server share.
 *
 *   server.c     listeners, the life of the whole      connection.c  bytes in and out, their bounds
 *   handshake.c  options                               request.c     commands
 *   read.c       READ, CACHE, BLOCK_STATUS             export.c      what is read of a region, and who may write it
 *   layer.c      what was written, on its way into epochs
 *
 * Reading. An export keeps a pin of the newest durable epoch (struct view). Each request asks the store, from memory,
 * whether there is a newer one, and if so a new view takes the old one's place; requests under way keep theirs. A view
 * that nobody reads goes after a second, so that an idle client costs the writer nothing. Of a store that has to ask
 * others (a hub) a view is good for NBD_FOLLOW_MS, unless what is written here ends it; requests that come while a new
 * one is asked for are parked, and a read that fails is tried once more with a new view, as the peer that the old one
 * was of may have gone.
 *
 * Writing. The first write takes the region's lease; one client at a time has it, all its connections together (that is
 * what MULTI_CONN promises). A client is known by its address, behind a unix socket by its process. Writes are answered
 * when they are in a layer: a store transaction and a list of what is in it, in the order of arrival.
 *
 *     open --full, FLUSH, FUA, 1 s old, last connection gone--> committing (NBD_LAYERS at most) --durable--> gone
 *                                                                   \__ failed: the export is broken
 *                                                                        (of a cause that may go: until tried again)
 *
 * A layer stays in the list, for reads, until a view is asked for that has it.
 * So every epoch is all that was written before some moment. The client's own reads are the view with layers laid over
 * it. If the process dies, layers that were not durable are lost, as a disk's cache is; FLUSH was not answered then.
 * A broken export answers writes and FLUSH with the error. Its layers are kept, and when the cause is one that may go
 * (a full disk, no replica) each write and FLUSH commits them again first: nothing is lost by it as long as the client
 * stays. With other causes it is broken until its client has gone; what is lost then was never flushed. */
#ifndef NBD_INSIDE_H
#define NBD_INSIDE_H

#include "agent/base/buf.h"
#include "agent/nbd/nbd.h"
#include "agent/net/listen.h"
#include "wire/nbd.h"

#include <sys/queue.h>

#define NBD_CONNECTIONS 256u
#define NBD_WRITTEN 16u        /* exports that are written at the same time */
#define NBD_INPUT (256u << 10) /* bytes taken of a connection before they are looked at */
#define NBD_PIECE (512u << 10) /* of a read: one job, one chunk */
#define NBD_PIECES (NBD_PAYLOAD_MAX / NBD_PIECE)
#define NBD_NOW (256u << 10)        /* of a read that the loop itself may answer, and */
#define NBD_TURN (1u << 20)         /* of all that it answers so before it looks at its other work */
#define NBD_BUDGET (16u << 20)      /* of answers under way on a connection before no more requests are taken */
#define NBD_BUDGET_ALL (256u << 20) /* and on all of them */
#define NBD_IN_FLIGHT 256u          /* requests likewise */
#define NBD_LAYER_BYTES (8u << 20)
#define NBD_LAYER_EXTENTS 4096u
#define NBD_LAYERS 4u /* on their way to the disk, an export */
#define NBD_LAYER_MS 1000u
#define NBD_FOLLOW_MS 100u
#define NBD_HANDSHAKE_MS 30000u
#define NBD_STUCK_MS 10000u /* without a byte taken, while others wait for memory */
#define NBD_PARTY 96u

struct nbd_conn;

struct view {
    unsigned refs;
    struct store_pin *pin;
    struct id lineage;
    uint64_t epoch, size;
    uint64_t seq;        /* layers up to it are in it */
    uint64_t came, used; /* ms */
};

struct layer_extent {
    uint64_t offset;
    uint32_t len;
    const uint8_t *data; /* in one of the bufs; NULL for zeros */
};

struct layer {
    TAILQ_ENTRY(layer) link;
    unsigned refs; /* the export's, and that of each read under way */
    struct export *export;
    struct store_txn *txn; /* while open */
    bool wanted;           /* is to be closed as soon as it can be */
    uint64_t seq, since;   /* since: ms */
    uint64_t epoch;
    uint64_t from, to; /* within these bytes of the region */
    size_t bytes, extents_len, extents_cap, bufs_len, bufs_cap;
    struct layer_extent *extents;
    struct buf **bufs;
};
TAILQ_HEAD(layers, layer);

/* One that waits for all layers up to seq. */
struct waiter {
    TAILQ_ENTRY(waiter) link;
    struct nbd_conn *conn;
    struct nbd_request request;
    uint64_t seq;
};
TAILQ_HEAD(waiters, waiter);

/* One that waits for a view. */
struct parked {
    TAILQ_ENTRY(parked) link;
    struct nbd_conn *conn;
    struct nbd_request request;
    bool again;
};
TAILQ_HEAD(parkeds, parked);

struct export
{
    TAILQ_ENTRY(export) link;
    struct nbd *nbd;
    unsigned conns, writers; /* connections that are on it, and those of them that have written */
    struct view *view;       /* NULL: none */
    bool asking, leasing;    /* the store is asked for a view, a lease */
    bool leased, broken;
    int err;               /* when broken */
    int said;              /* in the log, since something was durable */
    char party[NBD_PARTY]; /* who writes */
    struct id lineage;     /* of what is written */
    uint64_t epoch, fence, size;
    struct layers layers; /* oldest first; the last may be open */
    unsigned layers_n;
    struct layer *open;
    unsigned committing;
    uint64_t seq, durable; /* last given, and last on disk */
    struct waiters waiters;
    struct parkeds parked;
    char name[];
};
TAILQ_HEAD(exports, export);

struct out {
    TAILQ_ENTRY(out) link;
    struct buf *data; /* behind the head; NULL: nothing */
    uint32_t owed;    /* of the budget */
    uint32_t len;     /* of the head */
    uint8_t head[48];
};
TAILQ_HEAD(outs, out);

struct nbd_conn {
    TAILQ_ENTRY(nbd_conn) link;
    struct nbd *nbd;
    union {
        uv_handle_t any;
        uv_stream_t stream;
        uv_tcp_t tcp;
        uv_pipe_t pipe;
    } * h; /* the listener's gift */
    struct nbd_server proto;
    struct nbd_got got;
    char party[NBD_PARTY];
    uint8_t *in;
    size_t in_len;
    uint64_t since, moved; /* ms: made; the last time the peer took bytes */

    struct export *export;
    struct id lineage;
    uint64_t size;
    bool read_only, writer;

    struct nbd_request put; /* a write under way: offset and len are what is left of it */
    bool putting, zeros;    /* zeros: it has no payload */
    uint32_t drain;         /* payload of a refused write still to come */

    bool reading, blocked, leaving, closing, closed, flushing;
    bool asking;        /* an option of it waits for the store's answer */
    bool tried;         /* the write under way has had a broken export tried again */
    int lease_err;      /* the answer to its asking for the lease, once */
    nbd_served *served; /* of nbd_serve; and its arg */
    void *served_arg;
    unsigned refs; /* requests, writes of ours and waiters that still speak of it; the handle's */
    unsigned requests;
    uint64_t owed;
    struct outs outs;
};
TAILQ_HEAD(nbd_conns, nbd_conn);

struct nbd {
    uv_loop_t *loop;
    struct store *store;
    struct id identity;
    char host[256];
    struct listeners listeners;
    struct nbd_conns conns;
    struct exports exports;
    unsigned conns_n;
    uint64_t owed, turn;
    bool starved, stopping, ended;
    bool slow; /* the store has to ask others */
    uv_prepare_t flush;
    uv_timer_t timer;
    void (*done)(void *arg);
    void *arg;
};

/* server.c */
void nbd_look(struct nbd *n); /* whether a stopping one is at its end */

/* connection.c */
struct nbd_conn *conn_new(struct nbd *n, uv_stream_t *stream, const char *who); /* who: NULL: as the socket says */
void conn_greet(struct nbd_conn *c);
void conn_fail(struct nbd_conn *c, const char *why); /* closes it, saying so in the log */
void conn_leave(struct nbd_conn *c);                 /* closes it when all is answered */
void conn_pump(struct nbd_conn *c);
void conn_hold(struct nbd_conn *c);
void conn_drop(struct nbd_conn *c);
void conn_flush(struct nbd_conn *c);
void conn_tick(struct nbd_conn *c, uint64_t now);
/* A head of at most 48 bytes (head->len, head->head), and data behind it, which is the connection's then. False when
 * the connection is no more; the data is dropped then too. */
bool conn_out(struct nbd_conn *c, const void *head, size_t len, struct buf *data, uint32_t owed);
bool conn_out_bytes(struct nbd_conn *c, const void *head, size_t len, const void *more, size_t more_len);
void conn_owe(struct nbd_conn *c, uint64_t bytes);
void conn_paid(struct nbd_conn *c, uint64_t bytes);

/* handshake.c */
void handshake_option(struct nbd_conn *c);
void handshake_serve(struct nbd_conn *c, const char *name); /* this export, without a handshake */
void handshake_refuse(struct nbd_conn *c, uint32_t option, enum nbd_reply reply, const char *text);

/* request.c */
void request_begin(struct nbd_conn *c);
/* Takes on with a write: how many of the bytes were used; *more: whether it could go on with what there is. */
size_t request_put(struct nbd_conn *c, const uint8_t *at, size_t have, bool *more);
void request_answer(struct nbd_conn *c, const struct nbd_request *r, int err);

/* read.c */
void read_begin(struct nbd_conn *c, const struct nbd_request *r);
void status_begin(struct nbd_conn *c, const struct nbd_request *r);
void parked_resume(struct export *x, int err);

/* export.c */
struct export *export_get(struct nbd *n, const char *name); /* one connection more; NULL without memory */
void export_leave(struct nbd_conn *c);                      /* the connection is on its export no more */
/* 0: *v is held. -EINPROGRESS: the request is to be parked until the store has answered. Else an error. */
int export_view(struct export *x, const struct id *lineage, struct view **v);
void view_drop(struct nbd *n, struct view *v);
void view_forget(struct export *x); /* the next read takes a new one */
void export_tick(struct export *x, uint64_t now);
bool export_own(const struct nbd_conn *c); /* the connection is its export's writer's */
/* 0: the connection may write. -EAGAIN: later, and it is pumped then. -EPERM: another writes. */
int export_writer(struct nbd_conn *c);
void export_settle(struct export *x); /* gives the lease back, and goes, when it can */
void export_unblock(struct export *x);

/* layer.c */
/* A piece of a write: DATA of at most FRAME_DATA_MAX bytes, or zeros (data NULL). 0, -EAGAIN as above, or an error. */
int layer_put(struct nbd_conn *c, uint64_t offset, uint32_t len, const uint8_t *data);
void layer_want(struct export *x); /* closes the open one as soon as it can */
bool layer_wait(struct nbd_conn *c,
                const struct nbd_request *r); /* false: all is durable. Else the answer comes then */
size_t layers_hold(struct export *x, uint64_t seq, struct layer **to); /* those after seq */
void layer_drop(struct layer *l);
void layer_over(const struct layer *l, uint8_t *to, uint64_t offset, uint32_t len);
void layers_done(struct export *x);   /* drops those that are durable */
void layers_forget(struct export *x); /* all, of a broken one */

#endif
