/* What the parts of a hub share. Loop thread only.
 *
 *   hub.c      opening, closing, the clock          replica.c  a replica's connection: states, requests
 *   names.c    names, leases, ATTACH, lineages      txn.c      live epochs: adding, handing in
 *   legs.c     their ways to the replicas           settle.c   the replicas' answers to them
 *   opening.c  which replica is right, at first     round.c    catching up: the cut, the plan, the queue
 *   compare.c  catching up: hashes and pages        send.c     catching up: the difference as epochs
 *   read.c     LIST, PIN, READ, HASH, REMOVE
 *
 * A replica's states:
 *
 *   DOWN -> DIALLING -> BEHIND -> FOLLOWING -> IN      any of them -> DOWN when its connection ends
 *                         |
 *                         v
 *                      REFUSED: it has what no older copy of ours can be; looked at again every HUB_RETRY_MS
 *
 * - BEHIND: connected; a round (round.c) brings it the difference to one that is in. Live epochs are kept for it from
 *   the round's cut on, up to HUB_QUEUE.
 * - FOLLOWING: it has had the difference, live epochs go to it as they come, nobody waits for it.
 * - IN: an epoch is durable when every replica that is in has said so.
 *
 * A replica that is too slow (HUB_QUEUE, HUB_WAIT_MS) or refuses what another takes loses its connection: so everything
 * on its way there is gone, and it comes back as one that is BEHIND.
 *
 * None in: peers' connections are closed with the reason, so that they see what they see when a remote is dead, and
 * opening.c decides anew who is right.
 *
 * What dies, and what becomes of the bytes:
 *
 * - A replica: others go on; it is brought up to date when it is back.
 * - The hub: nothing is lost with it. What was acknowledged is on all that were in; what was not is kept by its writer,
 *   which asks the next hub what there is. Replicas drop open epochs, and those that some took and others did not are
 *   evened out by the next hub.
 * - The hub, and the newest replica: the next hub starts from the newest it finds. The one that comes back has epochs
 *   that the others have not: it is refused, named, and left as it is.
 * - A replica during a round: the round's epochs are atomic, so it is at the old epoch or at the new one.
 * - All replicas: nothing is acknowledged; see above.
 *
 * Whoever may be called back from a call of ours only marks what is to be done; hub_soon() does it from the loop. */
#ifndef HUB_INSIDE_H
#define HUB_INSIDE_H

#include "agent/hub/hub.h"
#include "agent/net/conn.h"
#include "agent/store/seam.h"
#include "wire/frame.h"

#include <sys/queue.h>

#define HUB_OPEN_MS 2000u   /* for replicas to be reached, before one of them is taken at its word */
#define HUB_HOLD_MS 250u    /* at most, for which ENDs are held back for a cut */
#define HUB_RETRY_MS 5000u  /* a refused replica is looked at again */
#define HUB_TICK_MS 20u     /* while something is going on */
#define HUB_IDLE_MS 500u    /* while nothing is */
#define HUB_LINEAGES 65536u /* known ones; those of later regions, once gone, count as foreign */
#define HUB_BUCKETS 4096u
#define HUB_LANE_IDLE_MS 10000u

/* Streams of a connection to a replica. */
#define STREAM_OWN 1u   /* ATTACH and requests */
#define STREAM_READ 2u  /* clients' READ and HASH */
#define STREAM_ROUND 3u /* what rounds read and send */
#define STREAM_LANES 16u

enum replica_state { REPLICA_DOWN, REPLICA_DIALLING, REPLICA_BEHIND, REPLICA_FOLLOWING, REPLICA_IN, REPLICA_REFUSED };

/* Something asked of a replica. `answer` gets each frame of the answer, or type 0 and NULL when there will be none. */
struct ask;
struct replica;
typedef void ask_answer(void *arg, struct replica *r, uint8_t type, const struct buf *p);
struct replica;

struct ask {
    TAILQ_ENTRY(ask) link;
    bool attach; /* then number is the handle */
    uint32_t number, stream;
    ask_answer *answer;
    void *arg;
};
TAILQ_HEAD(ask_list, ask);

struct replica {
    struct hub *hub;
    unsigned index;
    char *address;
    enum replica_state state;
    struct conn *conn;
    bool greeted;  /* the connection is open */
    bool looked;   /* since the hub began to open: it has answered, or could not be reached */
    bool queueing; /* live epochs are kept for it, or go to it: a round has made its cut */
    uint64_t life; /* number of its connection */
    uint32_t backoff_ms, next_request;
    uint64_t retry_at, since; /* ms of the loop's clock; since: of the state */
    char reason[FRAME_TEXT_MAX + 400];
    char said[FRAME_TEXT_MAX + 400]; /* of being refused, so that it is said once */
    bool told_down;
    struct ask_list asks;
    struct round *round;
    struct frame_entry *list; /* opening: what it has */
    size_t list_n, list_cap;
    bool listing, listed;
    unsigned drops;     /* for being slow, since it last kept up for a while */
    uint64_t steady_at; /* following: not in before */
};

struct there {
    bool asked, attached;
    uint64_t fence;
};

struct holder {
    struct holder *next;
    struct id identity;
    char host[256];
    uint64_t seen;
};

struct hub_name {
    struct hub_name *next; /* in its bucket */
    uint32_t handle;       /* at every replica */
    struct there there[HUB_REPLICAS];
    struct holder *holder; /* of the lease at this hub */
    uint64_t fence, alias; /* alias: of a region that was renamed to this name */
    struct id lineage;     /* of what is there, as far as known; none: nothing */
    unsigned busy;         /* epochs handed in that touch it, not yet answered */
    char text[];
};

struct lineage {
    struct lineage *next;
    struct id id;
    uint64_t epoch; /* newest known */
    bool gone;      /* no name has it any more */
};

/* An ATTACH that a client waits for. */
struct attach {
    TAILQ_ENTRY(attach) link;
    struct hub *hub;
    struct hub_name *name;
    struct id identity;
    char host[256];
    bool write, asked;
    uint64_t since, first;      /* first: when the first replica answered */
    uint32_t handle;            /* looking only: of its own */
    uint8_t wait[HUB_REPLICAS]; /* 1: asked, 2: answered */
    struct frame_attached answer[HUB_REPLICAS];
    store_attach_done *done;
    void *arg;
};
TAILQ_HEAD(attach_list, attach);

/* A chain of epochs: one stream, the same at every replica. */
struct lane {
    TAILQ_ENTRY(lane) link;
    const void *chain;
    uint32_t stream;
    unsigned txns;
    uint64_t idle_since;
};
TAILQ_HEAD(lane_list, lane);

enum leg { LEG_NONE, LEG_QUEUED, LEG_OPEN, LEG_ENDED, LEG_RECEIVED, LEG_DURABLE, LEG_FAILED };

struct slot {
    uint32_t client, handle;
    struct hub_name *name, *first; /* first: before a rename in this epoch */
    struct id lineage, replaced;   /* replaced: of what it was in the way of */
    uint64_t epoch;
    bool unlinked, stated, touched;
};

struct item {
    uint8_t type;
    struct buf *payload;
    struct hub_name *name; /* REGION: whose fence it carries */
};

/* A rename took the handle along: the name goes on under another. */
struct left {
    struct hub_name *name;
    uint32_t old, handle;
};

struct hub_txn {
    struct store *s; /* first: see seam.h */
    TAILQ_ENTRY(hub_txn) link, by_seq;
    struct lane *lane;
    uint64_t seq, frames;
    struct id holder, writer;
    struct store_names names;
    void (*spilled)(void *arg, size_t bytes);
    void (*received)(void *arg);
    void (*durable)(void *arg, int err, const char *text);
    void *arg, *durable_arg;
    struct slot *slots;
    size_t slots_n, slots_cap;
    struct left *left; /* names that a rename has left */
    size_t left_n;
    struct item *items;
    size_t items_n, items_cap, kept; /* kept: bytes of items */
    bool begun, whole;               /* whole: every frame is in items */
    bool blocked;                    /* begun, but nothing is sent: the END before it on its lane is held back */
    bool handed, ended, told;        /* handed in; END is out; durable was called */
    bool taken;                      /* told that it is durable */
    size_t withheld;                 /* bytes of the client's window not given back yet */
    uint64_t first_at, told_at;      /* first_at: of the first replica that settled it */
    uint8_t leg[HUB_REPLICAS];
    int err, refusal; /* refusal: of the first replica that said FAILED */
    char error[STORE_ERROR];
};
TAILQ_HEAD(txn_list, hub_txn);

struct hub {
    const struct store_ops *ops; /* first: see seam.h */
    uv_loop_t *loop;
    uv_timer_t tick, soon;
    struct id identity;
    char host[256];
    struct replica *replicas[HUB_REPLICAS];
    unsigned replicas_n;
    struct hub_name *names[HUB_BUCKETS];
    struct lineage *lineages[HUB_BUCKETS];
    size_t lineages_n;
    struct holder *holders;
    struct attach_list attaches;
    struct lane_list lanes;
    struct txn_list txns, by_seq[HUB_BUCKETS];
    size_t kept; /* bytes of all items */
    uint32_t next_handle, next_stream;
    uint64_t next_seq, fences, lives;
    bool opening, told_waiting;
    uint64_t opening_since, opened_at;
    unsigned holding; /* rounds that hold back ENDs */
    bool crowded;     /* too much is held back: rounds are to let go */
    unsigned reads;   /* clients' requests under way */
    bool closing;
    uint64_t closing_since;
    unsigned handles;
    void (*closed)(void *arg);
    void *closed_arg;
};

static inline struct hub *hub_of(struct store *s)
{
    return (struct hub *)(void *)s;
}

static inline uint64_t hub_now(const struct hub *h)
{
    return uv_now(h->loop);
}

#define EACH_REPLICA(r, hub)                                                                                           \
    for (unsigned i_##r = 0; i_##r < (hub)->replicas_n; i_##r++)                                                       \
        for (struct replica *r = (hub)->replicas[i_##r]; r; r = NULL)

/* hub.c */
void hub_soon(struct hub *h);                                    /* hub_step from the loop */
void *hub_room(void *array, size_t n, size_t *cap, size_t size); /* room for one more; NULL without memory */
void hub_why_none(const struct hub *h, char *text, size_t cap);  /* why no replica is in */

/* replica.c */
void replica_tick(struct replica *r);
void replica_drop(struct replica *r, bool slow, const char *format, ...) __attribute__((format(printf, 3, 4)));
void replica_refuse(struct replica *r, const char *format, ...) __attribute__((format(printf, 2, 3)));
void replica_enter(struct replica *r, enum replica_state state, const char *why);
struct replica *replica_source(const struct hub *h); /* one that is in, or NULL */
const char *replica_state_text(const struct replica *r);
void replica_send(struct replica *r, uint32_t stream, uint8_t type, const void *payload, size_t len);
/* A request whose payload begins with its number, which is filled in. */
void replica_ask(struct replica *r, uint32_t stream, uint8_t type, void *payload, size_t len, ask_answer *answer,
                 void *arg);
void replica_ask_attach(struct replica *r, uint32_t stream, uint32_t handle, const char *name, bool write,
                        ask_answer *answer, void *arg);
void replica_ask_name(struct replica *r, uint8_t type, const char *name, int force, ask_answer *answer, void *arg);
void replica_forget(struct replica *r, const void *arg);         /* nobody waits for these answers any more */
int replica_failed(const struct buf *p, char *text, size_t cap); /* what a FAILED says */

/* names.c */
struct hub_name *name_of(struct hub *h, const char *text); /* made if new; NULL without memory */
bool name_leased(const struct hub *h, const struct hub_name *n);
void name_attach(struct hub_name *n, struct replica *r, uint32_t stream);
void name_detach(struct hub_name *n, struct replica *r);
void name_attach_as(struct hub_name *n, struct replica *r, uint32_t stream, uint32_t handle);
bool name_lease_good(const struct hub *h, const struct hub_name *n, const struct id *identity);
void names_lost(struct replica *r);
void names_give_back(struct replica *r);
void names_unwanted(struct replica *r); /* attached there for a round only */
void names_tick(struct hub *h);
bool names_attached(struct replica *r); /* all leased ones, there */
void names_free(struct hub *h);
void attach_step(struct hub *h);
bool hub_complete(const struct hub *h); /* nobody is about to come in */
int hub_attach(struct store *s, const struct store_attach *a, struct frame_attached *to, store_attach_done *done,
               void *arg);
void hub_lease_drop(struct store *s, const char *name, const struct id *identity);
void hub_lease_seen(struct store *s, const struct id *identity);
struct lineage *lineage_find(const struct hub *h, const struct id *id);
void lineage_note(struct hub *h, const struct id *id, uint64_t epoch, bool gone);
void names_learn(struct hub *h, const struct frame_entry *list, size_t n); /* what one that is in has */

/* txn.c */
struct store_txn *hub_txn_new(struct store *s, const struct id *holder, struct store_names names,
                              void (*spilled)(void *arg, size_t bytes), void *arg);
void hub_txn_chain(struct store_txn *t, const void *chain);
void hub_txn_writer(struct store_txn *t, const struct id *writer);
int hub_txn_add(struct store_txn *t, uint8_t type, struct buf *payload, char error[STORE_ERROR]);
bool hub_txn_received(struct store_txn *t, void (*received)(void *arg));
void hub_txn_commit(struct store_txn *t, void (*durable)(void *arg, int err, const char *text), void *arg);
void hub_txn_abort(struct store_txn *t);
void txn_answer(struct replica *r, uint32_t stream, uint8_t type, const struct buf *p);
void txns_lost(struct replica *r); /* its legs are no more */
void txns_drained(struct replica *r, uint32_t stream);
void txns_tick(struct hub *h);
void lanes_free(struct hub *h);
void txns_step(struct hub *h);        /* ENDs that may go, windows, answers */
void txns_queue(struct replica *r);   /* the cut: from now on they are kept for it */
bool txns_whole(const struct hub *h); /* all that are open are kept as a whole */
bool txns_flush(struct replica *r);   /* sends it what was kept; false: a name is not attached there yet */
void txns_unqueue(struct replica *r);
bool txns_pending(const struct replica *r); /* some handed in are not answered by it */
bool txns_late(const struct replica *r);    /* some were answered to the writer a while ago, but not by it */

/* opening.c */
void opening_begin(struct hub *h);
void opening_step(struct hub *h);
void opening_list(struct replica *r); /* asks what it has */

/* round.c */
struct round;
void round_start(struct replica *source, struct replica *target, bool merge);
void round_step(struct round *o);
void round_free(struct round *o); /* as it is: its target or its source is lost, or it is done */
bool round_uses(const struct round *o, const struct replica *r);
void round_answer(struct round *o, uint8_t type, const struct buf *p); /* to an epoch of it */

/* read.c */
int hub_ask_list(struct store *s, store_each *each, void (*done)(void *arg, int err, const char *text), void *arg);
int hub_ask_pin(struct store *s, const char *name, struct store_pin **pin, struct frame_entry *e, store_pin_done *done,
                void *arg);
int hub_pin_live(struct store_pin *pin, const struct id *owner);
int hub_pin_changed(struct store_pin *pin, struct store_pin *later,
                    void (*done)(void *arg, int err, struct buf *data), void *arg);
void hub_pin_read(struct store_pin *pin, uint64_t offset, uint32_t len, uint32_t room,
                  void (*done)(void *arg, int err, struct buf *data), void *arg);
struct buf *hub_pin_read_now(struct store_pin *pin, uint64_t offset, uint32_t len, uint32_t room);
void hub_pin_hash(struct store_pin *pin, unsigned level, uint64_t first, uint32_t count, bool fresh,
                  void (*done)(void *arg, int err, struct buf *data), void *arg);
int hub_pin_extents(struct store_pin *pin, uint64_t offset, uint32_t len,
                    void (*done)(void *arg, int err, struct buf *extents), void *arg);
void hub_unpin(struct store_pin *pin);
void hub_remove(struct store *s, const char *name, const struct id *identity, bool force,
                void (*done)(void *arg, int err, const char *text), void *arg);

#endif
