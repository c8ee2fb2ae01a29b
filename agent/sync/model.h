/* What the local agent knows, in one place. All of it belongs to the loop thread, but for what a capture's job borrows
 * (capture.h).
 *
 *     program --< use >-- body --1 region >-- link (a remote)
 *                                   |
 *                                 group --< epoch
 *
 * - region: a name at a remote. Lives as long as the agent; has a body while a file has that name here.
 * - body: one file's content under one lineage. A rename moves the body to another region; a new file at the path is a
 * new body.
 * - use: a program that has the body open or mapped for writing; its maps and marks are where changes are found.
 * - group: regions whose changes are published together. Merges as programs share regions; never splits while it lives.
 * - epoch: one capture, as the remote commits it; kept until it is durable there, as far as EPOCH_KEEP and GROUP_KEEP
 * allow.
 *
 * A region's way to the remote (enum attach): LOOSE -> ASKED (ATTACH sent) -> [HASHING (compared with the remote's, see
 * reconcile.c)] -> ATTACHED; a lost link makes it LOOSE; REFUSED and FENCED are left only by a person. Its body is
 * `unknown` when what changed since its hashes were published is not known (first attach, killed programs, lost agents):
 * the next capture, or comparison, reads all of it. It is `refetch` when what was published may not be what the remote
 * has (reconnect without continuity, a refused delta): the next ATTACH leads to a comparison. */
#ifndef SYNC_MODEL_H
#define SYNC_MODEL_H

#include "agent/base/buf.h"
#include "agent/base/id.h"
#include "agent/net/conn.h"
#include "agent/net/pack.h"
#include "agent/sync/record.h"
#include "agent/track/track.h"
#include "agent/track/watch.h"
#include "wire/control.h"
#include "wire/frame.h"
#include "wire/shared.h"

#include <uv.h>

#define EPOCH_KEEP                                                                                                     \
    (64u                                                                                                               \
     << 20) /* an epoch larger than this is streamed and not kept: after a lost link its regions are compared anew */
#define GROUP_KEEP (256u << 20) /* bytes of epochs that wait for a remote; beyond, dirty pages stay where they are */

struct local {
    uv_loop_t *loop;
    uv_poll_t listener;
    uv_timer_t tick, gather;
    int listen_fd, lock_fd;
    unsigned handles_open; /* of the loop, ours, to wait for when closing */
    bool linger, stopping;
    int phase;   /* of stopping */
    bool behind; /* the time for it was not enough */
    uint64_t idle_since, stop_by;
    char *socket_path, *state_dir;
    char host[256];
    struct id identity;
    struct records records;
    struct program *programs;
    struct link *links;
    struct devices *devices;
    void (*stopped)(void *);
    void *stopped_arg;
};

#define LINK_STREAM 1u /* the link's own: attaching, comparing */

enum link_state { LINK_DOWN, LINK_DIALLING, LINK_UP };

/* A remote. file:, hub: and nbd:// URLs are served by a server of our own over a socket pair. */
struct link {
    struct link *next;
    struct local *local;
    char *address;
    enum link_state state;
    struct conn *conn;
    bool foreign;        /* a block device server: has no epochs, takes plain pages only */
    struct store *store; /* for file:, hub: and nbd:// */
    struct server *server;
    uint64_t retry_at, down_since; /* uv_now */
    uint32_t backoff_ms;
    char reason[512]; /* why it is down */
    char peer_host[256];
    uint32_t next_handle, next_stream, next_request;
    uint64_t next_seq;
    uint64_t bytes_out, bytes_in; /* of connections before this one */
    uint64_t moved, moved_bytes;  /* when bytes last moved, and how many had */
    struct region *regions;
    struct group *groups;
    struct reconcile *reconciles; /* reconcile.c */
    struct pager *pager; /* of what is presented from there; NULL: nothing ever was */
    bool stopping, stopping_server;
    bool packs;  /* its bytes leave this host: saving some is worth the time */
    bool broken; /* can never work (bad URL, not built): reason says why */
};

enum attach { ATTACH_LOOSE, ATTACH_ASKED, ATTACH_HASHING, ATTACH_DONE, ATTACH_REFUSED, ATTACH_FENCED };

struct region {
    struct region *next;       /* of the link */
    struct region *next_group; /* of the group */
    struct link *link;
    struct group *group;
    char *name, *path;
    uint32_t handle;
    enum attach attach;
    bool held_before; /* attached once: a holder of the lease that is not us has fenced us out */
    bool vacant;      /* the remote has nothing of this name, or will have when the queue is through */
    bool doomed;      /* unlinked here before it was attached: goes at the remote too, if it is ours */
    struct source doomed_source;
    bool replace;   /* the name was taken over by a new file in our sight: the remote's old content may go */
    struct id last; /* lineage of the body that was unlinked here */
    uint64_t fence, retry_at;
    struct frame_attached there; /* what the remote said last */
    struct control_terms terms;
    struct body *body;
    char reason[640];
    int64_t since; /* of the reason, seconds since 1970 */
    int refusal;   /* REFUSED, of a mirror: what its opening is answered */
};

struct body {
    unsigned refs;
    struct region *region; /* NULL when unlinked */
    struct use *uses;
    int fd; /* our own open file: its offset is nobody else's */
    uint64_t dev;
    struct source source;
    struct id lineage; /* none until the remote was asked */
    uint64_t epoch;    /* number of the last epoch captured */
    uint64_t durable;  /* and of the last one committed there */
    bool created;      /* the remote has it, or an epoch in the queue makes it */
    bool moved;        /* renamed since the last capture: its number goes up with the name */
    bool unknown, refetch, killed; /* unknown: stores may be untracked. refetch: the published hashes may not be what the
                                      remote has. killed: a program died with stores unseen */
    bool base_doubted;             /* the published blocks may not be what their hashes say */
    bool plain; /* the remote's page was not what a delta or a move rests on: whole pages until an epoch is durable */
    uint64_t size, min_size; /* size: as last captured. min_size: lowest since */
    struct extents dirty;
    struct hashes published;
    uint64_t captured_at; /* uv_now */
    struct pack_sense packing; /* the running capture's, as `published` is */
    int64_t stat_mtime, stat_ctime, stat_seen; /* ns; of the last look at a file found by hashing */
    struct watch *watch; /* once a use was found by events; NULL before, and where there can be none */
    int64_t killed_at;   /* seconds since 1970 */
    const char *tracker;
    struct mount *mount; /* its file is that one's memfd: a mirror; NULL: an ordinary file */
    bool mirror;         /* stays, when the mount goes */
    uint64_t base;       /* of a mirror: holes before it are not ours to publish. Jobs read it, atomically */
    bool joined;         /* of a mirror: was attached once */
};

struct use {
    struct use *next_program, *next_body;
    struct program *program;
    struct body *body;
    uint32_t number;
    uint8_t hashed; /* enum control_hashed */
    bool left;      /* its program said goodbye, and its maps were looked at after */
    struct marks *marks;
    struct track_map *maps;
    size_t nmaps, maps_cap;
};

enum waiter_kind { WAIT_SYNC, WAIT_RETIRE, WAIT_BYE, WAIT_TOOL, WAIT_ATTACH /* for a mirror, by its first SYNC */ };

/* A slot to be answered once all that was asked for it is done. */
struct answer {
    unsigned refs;
    struct program *program; /* held; NULL for none */
    uint32_t slot;
    int result;
};

/* Somebody who waits: for a capture that begins after now, then for its acknowledgement. */
struct waiter {
    struct waiter *next;
    enum waiter_kind kind;
    struct answer *answer; /* NULL: nobody any more */
    uint8_t ack, loss;
    uint64_t timeout_ms;
    bool scan_only; /* content need not be published before it is answered (mremap) */
    bool assigned, scanned, captured;
    uint64_t seq, since;
    uint64_t addr, len; /* RETIRE */
    const struct region *region; /* ATTACH */
};

struct program {
    struct program *next;
    struct local *local;
    struct link *link;
    struct group *group; /* of its regions without group= */
    int fd, pagemap, uffd;
    struct softdirty *soft; /* NULL unless it has mappings that are tracked so */
    uv_poll_t poll;
    bool polling, tool, greeted, bye, gone;
    unsigned holds;
    uint32_t pid;
    char name[256];
    uint8_t loss;
    uint64_t timeout_ms;
    struct shared *shared;
    struct use *uses, *dead_uses; /* dead: freed when nobody holds the program */
    struct naming *namings;       /* renames and unlinks begun */
    struct viewer *viewers;       /* agent/page: what is presented to it */
    struct fault_watch *faults;
    bool eager_said;
    bool watch;                   /* stands for `memsync watch`: no socket */
    bool unwatched;               /* it was told that its files' events cannot be had */
    uint32_t refused;             /* its last mirror that could not be opened for writing; and why */
    int refusal;
};

struct item {
    uint8_t type;
    struct buf *payload; /* NULL once sent and not kept */
};

struct touched {
    struct region *region;
    struct body *body; /* held */
    uint64_t number;
};

struct epoch {
    struct epoch *next;
    uint64_t seq;
    uint32_t stream; /* it was sent on */
    struct item *items;
    size_t count, cap, sent;
    uint64_t bytes;
    bool begun, closed, ended, kept,
        received; /* BEGIN sent; all captured; END sent; all items still here; RECEIVED came */
    struct touched *touched;
    size_t ntouched, touched_cap;
    uint64_t captured_at;
};

struct op {
    struct op *next;
    uint8_t kind;
    struct region *region, *to;
    struct body *body; /* held */
};

struct group {
    struct group *next; /* of the link */
    struct group *merging;
    bool merged; /* into another: empty */
    struct link *link;
    struct region *regions;
    char *name; /* of group=, or NULL */
    uint32_t stream;
    struct capture *capture; /* the one under way */
    struct epoch *queue;     /* oldest first; the last may be open */
    bool compare;            /* the link was lost: what of the queue was committed is to be found out */
    struct op *ops;
    struct waiter *waiters;
    bool all_async; /* the last sync point asked for no more than a copy here */
    bool gathered;  /* the moment for more epochs to come together is over */
    bool wanted;    /* a capture without a waiter is due */
    bool due;       /* one is due by the clock alone */
    bool tainted;   /* a sync point was let go while content was read: look once more before the commit */
    bool degraded;  /* sync points are not held */
    bool said;      /* the line about it went out */
    uint64_t degraded_since, last_sync, retry_at, last_ack;
    uint32_t retry_ms;
    int64_t degraded_at; /* seconds since 1970 */
    char reason[640];
};

/* program.c */
void program_gone(struct program *p); /* its connection ended */
void program_notice(struct program *p, const char *format, ...) __attribute__((format(printf, 2, 3)));
void group_notice(struct group *g, const char *format, ...)
    __attribute__((format(printf, 2, 3))); /* to each of its programs once */
void region_notice(struct region *r, const char *format, ...) __attribute__((format(printf, 2, 3)));
struct answer *answer_new(struct program *p, uint32_t slot); /* one reference */
void answer_drop(struct answer *a, int result); /* the last one answers; the first result that is not 0 counts */
void program_hold(struct program *p);
void program_drop(struct program *p);
void program_check(struct program *p); /* its memory map may be gone: if so, look at it no more */

void use_end(struct use *u);
struct use *use_add(struct program *p, struct body *b, uint32_t number, uint8_t hashed);
void program_join(struct program *p, struct region *r, const char *group); /* p and r are of one group from now on */

/* messages.c */
void program_readable(uv_poll_t *poll, int status, int events);
int own_open(
    int fd,
    const char *path); /* a descriptor of our own for reading, from a passed one (or -1) or the path; negative errno */
void program_send_text(struct program *p, uint8_t type, int code, const char *text);

/* tool.c */
int tool_message(struct program *p, uint8_t type, const void *data, size_t len); /* negative: the connection ends */

/* naming.c */
struct naming {
    struct naming *next;
    struct control_name m;
};
void naming_take(struct program *p, const struct control_name *m);
void naming_after_death(struct program *p);
struct statx;
void file_identity(const struct statx *st, uint64_t *dev, struct source *s); /* of STATX_BASIC_STATS | STATX_BTIME */

/* local.c */
void local_gather(struct local *l); /* groups hold epochs back for a moment (group_pump) */

/* region.c */
struct link *link_find(struct local *l, const char *address);
struct region *region_find(struct link *k, const char *name);
struct region *region_get(struct link *k, const char *name, const char *path);
struct body *body_new(int fd, uint64_t dev, struct source source);
void body_hold(struct body *b);
void body_drop(struct body *b);
void use_retire(struct use *u, uint64_t addr, uint64_t len); /* forgets the range, splitting maps */
void region_reserve(struct region *r);                       /* writes down how far its epochs may go */
void region_give_body(struct region *r, struct body *b);
void region_create(struct region *r); /* its body comes to be at the remote under a new lineage */
void region_reason(struct region *r, const char *format, ...) __attribute__((format(printf, 2, 3)));
void region_attached(struct region *r, const struct frame_attached *a);
bool region_takes_part(const struct region *r); /* neither refused nor fenced */
void region_compare(struct region *r);          /* with what the remote has, by hashes */
const char *region_state(const struct region *r);
void bodies_trim(struct local *l); /* keeps block hashes within bounds: of those at rest the oldest are let go */

/* mirror.c */
/* REGION: the body of r is t's memfd from now on. 0, or a negative errno, and the program was told. */
int mirror_body(struct program *p, struct region *r, const struct control_region *m, int passed, struct mount *t);
void mirror_answer(struct region *r);                     /* ATTACHED, for a body that has not joined */
void mirror_held(struct region *r, const char *holder);   /* likewise */
void mirror_fenced(struct region *r, const char *why);
void mirror_make(struct region *r);                       /* it comes to be at the remote */
int mirror_attached(const struct region *r);              /* 0; 1: not yet; or a negative errno */
void mirror_look(struct region *r);
bool body_held(const struct body *b);     /* a mirror's: the remote has not got all of it */
void region_let_go(struct region *r);     /* its body goes, the region stays as it is at the remote; gives up the lease */

/* link.c */
void link_tick(struct link *k, uint64_t now);
void link_attach(struct region *r);
void link_stop(struct link *k);

/* group.c */
uint64_t group_now(const struct group *g);
void group_settle(struct group *g);  /* answers whom it can */
void group_recover(struct group *g); /* ends the degraded state when nothing is behind */
void group_step(struct group *g);    /* something has changed: whatever can go on goes on */
struct group *group_of(struct link *k, const char *name);
void group_add(struct group *g, struct region *r);
struct group *group_merge(struct group *a, struct group *b);
void group_kick(struct group *g);
void group_tick(struct group *g, uint64_t now);
void group_op(struct group *g, uint8_t kind, struct region *region, struct region *to, struct body *body);
void group_degrade(struct group *g, const char *format, ...) __attribute__((format(printf, 2, 3)));
void group_forget_program(struct group *g, const struct program *p);
void waiter_new(struct group *g, enum waiter_kind kind, struct answer *a, const struct program *p, uint8_t ack,
                uint64_t addr, uint64_t len, bool scan_only);
void waiter_attach(struct group *g, struct answer *a, const struct program *p, const struct region *r);
void group_free(struct group *g); /* at the very end */
void group_captured(struct group *g);

/* send.c */
void group_pump(struct group *g); /* gives the connection what can go now */
void group_drained(struct group *g);
void group_received(struct group *g, uint64_t seq);
void group_durable(struct group *g, uint64_t seq);
void group_pop_durable(struct group *g);
uint64_t group_queue_bytes(const struct group *g); /* kept in memory */

/* continuity.c */
void group_link_up(struct group *g);
void group_link_lost(struct group *g);
void group_check(struct group *g); /* a region's way to the remote has gone a step */
void group_failed(struct group *g, uint64_t seq, uint16_t code, const char *text);

/* status.c: a JSON text, malloc'ed */
char *status_json(struct local *l);

#endif
