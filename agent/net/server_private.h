/* What server.c (listeners, start and stop), session.c (one peer: handles, frames), session_epoch.c (its epochs) and
 * session_read.c (its requests), session_data.c (READ), session_pin.c (pins that outlive a session) share.
 *
 * Whatever the store will call back about (an epoch handed in, a request) is in a list of its session. When the session
 * ends first, those left get session = NULL, and their callbacks only clean up. server_stop is done when no listener,
 * no session and no request is left; epochs handed in may outlive the server, since they name nothing of it. */
#ifndef NET_SERVER_PRIVATE_H
#define NET_SERVER_PRIVATE_H

#include "agent/net/conn.h"
#include "agent/net/grants.h"
#include "agent/net/listen.h"
#include "agent/net/server.h"

#include <sys/queue.h>

#define SESSION_HANDLES 65536u
#define SESSION_PINS 1024u /* a hub pins every region for its consistent cut */
#define SESSION_REQUESTS 256u
#define SESSION_PIECES 8u
#define SESSION_AT_ONCE 4u /* and of those that are in memory, in a turn */
#define SESSION_PENDING 16384u
#define SESSION_UNREAD (64u << 20)  /* bytes of answers a peer may leave unread */
#define SESSION_EPOCH_NOTES 262144u /* OP and REGION frames in one epoch: they are not under the window */
#define SESSION_BUCKETS 1024u
#define SESSION_LANES 64u
#define SERVER_PEERS 1024u
#define SERVER_KEPT 256u /* pins without a connection */

struct handle {
    TAILQ_ENTRY(handle) by_id, by_name;
    uint32_t id;
    bool write;
    char *name;
};
TAILQ_HEAD(handle_list, handle);

struct rename {
    uint32_t handle, to;
    char *old; /* the handle's name before; NULL: was not done */
};

/* A stream on which there are epochs: one open, and those handed in. Lives until closed and answered. */
struct lane {
    TAILQ_ENTRY(lane) link;
    uint32_t stream; /* 0: closed meanwhile, nobody to tell */
    unsigned refs;   /* its epochs, and the session's table */
    struct epoch *open;
};
TAILQ_HEAD(lane_list, lane);

/* lane.open from BEGIN until END or ABORT; failed: its txn is gone and what comes for it is dropped. Then pending,
 * until the store says durable. */
struct epoch {
    TAILQ_ENTRY(epoch) link; /* session.pending */
    struct session *session;
    struct lane *lane;
    uint64_t seq, frames, notes;
    struct store_txn *txn;
    bool failed;
    size_t owed; /* PAGES bytes not yet credited */
    struct rename *renames;
    size_t renames_n;
};
TAILQ_HEAD(epoch_list, epoch);

/* What pins stand for: one region at one epoch, shared by the pins of one identity when it is kept. refs 0: the connection of its last pin is lost, and
 * until `expires` the same identity may pin it again. */
struct pinned {
    TAILQ_ENTRY(pinned) link; /* server.pinned, when kept */
    struct store_pin *pin;
    unsigned refs;
    bool keep, kept; /* kept: refs is 0 */
    bool live;
    uint64_t expires;
    struct id identity;
    struct frame_entry entry;
};
TAILQ_HEAD(pinned_list, pinned);

struct pin {
    uint32_t id;
    struct pinned *of;
    unsigned running;
    bool doomed; /* given back by the peer: unpinned when nothing runs on it */
    bool lost;   /* with its connection */
};

struct request {
    TAILQ_ENTRY(request) link;
    struct session *session;
    struct server *server;
    struct pin *pin;
    uint32_t stream, number; /* stream 0: closed meanwhile */
    bool keep, live;         /* PIN, as the next */
    struct id lineage;
    uint32_t head;
    uint64_t epoch;
    /* READ: [offset, offset + len) of what is there, in `count` pieces, of which the first `started` were asked for and the first `gone` are through. */
    TAILQ_ENTRY(request) turn; /* session.bulk, while waiting */
    struct piece *pieces;
    uint64_t offset;
    uint32_t len, sent, zeros; /* sent: bytes; zeros: behind them, not said yet */
    uint32_t count, started, gone, running;
    bool bulk, waiting, failed;
};
TAILQ_HEAD(request_list, request);

/* An ATTACH that the store has not answered yet. */
struct attaching {
    TAILQ_ENTRY(attaching) link;
    struct session *session; /* NULL: it has ended */
    struct server *server;
    struct id identity;
    uint32_t stream, handle;
    bool write, detached; /* detached: by the peer, meanwhile */
    char *name;
};
TAILQ_HEAD(attaching_list, attaching);

struct session {
    TAILQ_ENTRY(session) link;
    struct server *server;
    struct conn *conn;
    bool open, leaving;
    bool local;      /* by a unix socket: this user, or root */
    bool told;       /* that it was refused something, in the log */
    struct frame_hello peer;
    struct handle_list *by_id, *by_name; /* SESSION_BUCKETS each */
    unsigned handles;
    struct lane_list lanes[SESSION_LANES];
    struct epoch_list pending;
    unsigned pending_n;
    struct attaching_list attaching;
    unsigned attaching_n;
    struct request_list requests, bulk; /* bulk: READs of which pieces wait to be started */
    unsigned requests_n, pieces;        /* pieces: of bulk, being read */
    struct pin *pins[SESSION_PINS];
    uint32_t last_pin;
};
TAILQ_HEAD(session_list, session);

struct server {
    uv_loop_t *loop;
    struct store *store;
    struct tls_config *tls;
    struct grants *grants;
    struct frame_hello self;
    struct listeners listeners;
    struct session_list sessions;
    struct pinned_list pinned; /* those to be kept, with pins or without */
    unsigned kept_n;
    unsigned peers, work; /* sessions; requests under way in the store */
    uv_timer_t timer;
    uv_idle_t reader; /* runs while pieces of bulk can be started */
    bool stopping, ended;
    void (*done)(void *arg);
    void *arg;
};

/* server.c */
void server_look(struct server *s); /* stopping: is that all? */

/* session.c */
int session_new(struct server *server, uv_stream_t *stream);
void session_stop(struct session *s);
void session_look(struct session *s); /* leaving: is all answered? */
struct handle *session_handle(struct session *s, uint32_t id);
bool session_handle_rename(struct session *s, struct handle *h, const char *name);
void session_reply(struct session *s, uint32_t stream, uint8_t type, const void *payload, size_t len);
void session_failed(struct session *s, uint32_t stream, uint64_t seq, uint16_t code, const char *text);
void session_end(struct session *s, int err, const char *why); /* this peer is better off without a connection */
void session_violated(struct session *s, const char *what); /* malformed or out of order: the connection ends */

/* NULL, or why the peer may not do that with the region; logged the first time. */
const char *session_denied(struct session *s, const char *name, unsigned right);
bool session_may(const struct session *s, const char *name, unsigned right);

/* session_epoch.c */
void session_epoch_frame(struct session *s, uint32_t stream, uint8_t type, struct buf *payload);
void session_epoch_drop(struct session *s, uint32_t stream); /* the stream was closed */
void session_epoch_drop_all(struct session *s);              /* those open */
void session_epoch_orphan(struct session *s);                /* the session ends */

/* session_pin.c */
struct pinned *pinned_find(struct server *s, const struct id *identity, const char *name, uint64_t epoch, const struct id *lineage);
/* For a pin of the store, which is taken over (given back when there is no memory). One reference. */
struct pinned *pinned_new(struct server *s, struct store_pin *pin, const struct frame_entry *e, const struct id *identity, bool keep);
void pinned_hold(struct server *s, struct pinned *p);
void pinned_drop(struct server *s, struct pinned *p, bool lost); /* lost: with its connection, not given back */
void pinned_expire(struct server *s, bool all);

/* session_data.c */
void session_read_frame(struct session *s, uint32_t stream, const struct buf *payload);
void session_read(struct session *s, uint32_t stream, struct pin *pin, const struct frame_read *f);
void session_read_orphan(struct session *s);
void session_read_on(struct session *s); /* bulk may go on */
void server_read_on(uv_idle_t *idle);

/* session_read.c */
struct request *session_request_new(struct session *s, uint32_t stream, uint32_t number, struct pin *pin);
void session_request_free(struct request *r);
void session_refuse(struct session *s, uint32_t stream, uint32_t number, int err, const char *text);
void session_refuse_read(struct session *s, uint32_t stream, uint32_t number, int err); /* what is pinned cannot be read */
struct pin **session_pin_slot(struct session *s, uint32_t id); /* 0: a free one. NULL: none */
void session_request_frame(struct session *s, uint32_t stream, uint8_t type, struct buf *payload);
void session_request_drop(struct session *s, uint32_t stream); /* it was closed: nobody to answer */
void session_request_orphan(struct session *s);

#endif
