/* What the parts of a store share. Nothing outside agent/store/ includes this, but tests of it do.
 *
 *   table.c    names, regions, leases         txn.c         frames into transactions
 *   spill.c    large ones                     copy.c        moved pages made plain
 *   commit.c   queue and batches              journal.c     records on disk
 *   verify.c   deltas against their bases     record.c      transactions <-> bytes of a record
 *   apply.c    a transaction into files       apply_job.c   the job that does so with committed ones
 *   pin.c      pre-images and reads           checkpoint.c  files and table synced
 *   extents.c  where a pinned region has data recover.c     the saved table; opening
 *   tree.c     hashes of regions              io.c          whole reads and writes
 *   store.c    the calls of store.h that answer from memory; opening
 *
 * Every name has two regions: `head` after all epochs handed in, against which the next is checked, and `durable` after
 * the last one that is on disk, which is what anybody is told. A failed epoch sets heads back to durable and checks
 * what waits anew.
 *
 * A region's content is a numbered file of the volume. Bindings of names to numbers and the regions' figures are stated
 * absolutely in the journal, never as "rename" or "remove", so that applying a record again changes nothing. A region
 * that lost its name is dead: its file goes as soon as that is durable, because recovery first looks which regions live
 * in the end, and leaves out what was written to the others.
 *
 * Threads: everything belongs to the loop thread but what a job was given for its time: a batch (the committing job),
 * the transactions at the head of the apply queue (the applying job), frames of one transaction (its spilling job), the
 * synced regions' list (the checkpoint job). A region's descriptor and content are guarded by its lock, held for at
 * most one frame or 16 MiB of zeros. */
#ifndef STORE_INSIDE_H
#define STORE_INSIDE_H

#include "agent/store/seam.h"
#include "agent/store/volume.h"

#include <pthread.h>

#define STORE_TABLE_ROOM (1u << 20) /* of the disk, not given to epochs: what the store itself needs to go on */

struct figures {
    uint64_t epoch, fence, size;
    struct id writer;
    int64_t committed_at;
};

struct region {
    unsigned refs;
    uint64_t file;
    struct id lineage;
    struct source source;
    struct figures head, durable;
    uint64_t applied;     /* number of the epoch that its file has */
    struct name *bound;   /* the name whose durable region it is */
    struct region *chain; /* of by_file */
    bool dirty;           /* on the store's dirty list */
    bool made;            /* recovery: the journal tells of its creation */
    struct store_pin *pins;
    pthread_rwlock_t lock; /* of what follows, and of the content */
    int fd;
    bool in_memory; /* its file is on tmpfs, which knows no RWF_NOWAIT and has no disk to wait for */
    bool gone;      /* its file was removed */
    struct tree *tree; /* its hashes; NULL: nobody has asked since it was made, or since they were in doubt */
};

struct holder {
    struct id identity;
    char host[256];
    uint64_t seen; /* ms */
    struct holder *next;
};

struct lease {
    struct holder *holder; /* NULL: nobody */
    uint64_t fence;
    uint64_t alias; /* a region renamed to this name goes on with the fence of its old one */
};

struct name {
    struct region *head, *durable;
    struct lease lease;
    unsigned users;   /* transactions that speak of it */
    unsigned pending; /* durable bindings not yet applied */
    uint64_t blocked; /* batch in which an epoch that must come first is not ready */
    char text[];
};

/* A region's part in a transaction. */
struct part {
    struct region *r; /* NULL in recovery: dead in the end, nothing to do */
    bool created;
    bool direct;        /* created, and its spilled pages are in its file already */
    bool stated;        /* by a REGION frame */
    struct name *from;  /* where it was found; NULL when created */
    struct name *under; /* whose name it had when its REGION came */
    uint64_t base;      /* its epoch before */
    uint64_t base_size; /* and size */
    uint64_t copies;    /* pages moved within it */
    uint64_t epoch, fence, min_size, size;
};

struct binding {
    struct name *name;
    int32_t part; /* -1: none */
    bool look;    /* the commit job has to look at its directories */
    bool fresh;   /* and to see that nothing stands there */
    struct region *before;
};

struct slot {
    uint32_t handle;
    int32_t part; /* -1: names nothing */
    struct name *name;
};

struct held {
    uint32_t part;
    uint32_t copies; /* COPY entries in it */
    struct buf *buf;
};

struct store_txn {
    struct store *s; /* first: see seam.h */
    struct store_txn *next;
    struct id holder, writer; /* whose leases count; as whose work it is recorded */
    struct store_names names;
    const void *chain;
    void (*spilled)(void *arg, size_t bytes);
    void *arg;

    struct slot *slots;
    struct part **parts;
    struct binding *bindings;
    struct held *held;
    size_t slots_len, parts_len, bindings_len, held_first, held_len, held_cap;

    size_t memory, withheld, credit;
    bool crediting; /* on the store's list of credits to give */
    struct store_txn *next_credit;
    bool waiting; /* on the store's list of those that cannot be spilled yet */
    struct store_txn *next_waiting;
    uint64_t data; /* bytes of pages, in memory and spilled */

    uint64_t spill; /* number of its spill file, 0: none */
    int spill_fd;
    uint64_t spill_len;
    uint64_t zeros; /* bytes of zeros extents */
    bool deltas;    /* some pages rest on what the epoch before left */
    bool spilling, large, ready, aborted, committed; /* committed: handed in */
    bool removing; /* by store_remove: no lease is asked for */
    int err;
    char error[STORE_ERROR];

    int64_t committed_at;
    uint64_t number; /* order of durable transactions */
    uint64_t seq;    /* of its journal record */
    struct region **dead;
    size_t dead_len;
    void (*durable)(void *arg, int err, const char *text);
    void *durable_arg;
};

struct txns {
    struct store_txn *first, **last;
};

/* Where the journal's live records end; see journal.c. */
struct mark {
    uint64_t seq, end, bytes;
};

struct journal {
    int fd;
    uint64_t size, head, tail, used, seq; /* seq: the next record's */
    struct id store;
    struct mark *marks;
    size_t marks_len, marks_cap;
};

struct pin_read;

struct store_pin {
    struct store *s; /* first: see seam.h */
    struct region *r;
    uint64_t size, barrier, epoch;
    bool live; /* as is durable, for */
    struct id owner;
    unsigned jobs; /* that look at it; freed after the last */
    bool dropped;
    struct store_pin *next;
    /* under the region's lock */
    uint8_t *saved; /* a bit a page; NULL: none yet */
    int side;
    uint64_t used;
    bool lost, behind; /* behind: a later epoch has touched the region */
    struct tree *tree; /* once it is not the region's any more, and somebody has asked */
};

struct limits {
    uint64_t journal;
    size_t txn_memory, all_memory;
    uint64_t pin_budget, lease_ms;
};

struct spill_mark {
    uint64_t number, seq;
    struct spill_mark *next;
};

struct waiter {
    void (*done)(void *arg);
    void *arg;
    struct waiter *next;
};

struct store {
    const struct store_ops *ops; /* first: see seam.h */
    uv_loop_t *loop;
    uv_async_t wake; /* callbacks that must not come from within a call */
    uv_timer_t retry;
    struct volume *volume;
    struct limits limits;
    struct journal journal;
    uint64_t generation, next_file, next_spill, fences;

    struct name **names; /* sorted */
    size_t names_len, names_cap, names_pruned;
    struct region *by_file[1024];
    struct holder *holders;

    struct txns queue, applying, refused;
    struct store_txn *credits;
    struct store_txn *waiting; /* for their bases to be in the files (copy.c) */
    size_t memory;
    uint64_t batch_no;
    bool committing, apply_busy, checkpointing, want_checkpoint;
    bool retrying; /* a full disk holds up applying */
    bool unsaved;  /* a full disk holds up the table */
    bool failed;
    char failure[STORE_ERROR];
    uint64_t durable_no, applied_no, applied_seq, unapplied, unapplied_memory;

    struct region **dirty;
    size_t dirty_len, dirty_cap;
    struct spill_mark *spills;
    struct waiter *checkpoint_waiters;
    struct pin_read *pin_waiting;
    unsigned spilling; /* jobs of spill.c under way */
    unsigned jobs; /* pin reads, spills, removals: nobody's turn but counted for closing */
    bool open, closing, finishing;
    unsigned handles;
    void (*closed)(void *arg);
    void *closed_arg;
};

int store_open_with(struct store **out, uv_loop_t *loop, const char *url, const struct limits *limits,
                    char error[STORE_ERROR]);
void *store_grow(void *array, size_t len, size_t *cap,
                 size_t size); /* room for one more, or NULL and the array as it was */
void store_wake(struct store *s);
void store_pump(struct store *s);
void store_woken(struct store *s);
void store_free(struct store *s);
void store_fail(struct store *s, const char *what, int err);
uint64_t store_now(void);

/* store.c, table.c, pin.c, checkpoint.c: what this store knows at once. */
/* -ENOENT, -EINVAL (bad name, or clash such as `a` and `a/b`: text in error when not NULL). State after the last
 * durable epoch. */
int store_lookup(struct store *s, const char *name, struct frame_entry *e, struct source *source,
                 char error[STORE_ERROR]);
int store_lease(struct store *s, const char *name, const struct id *identity, const char *host, uint64_t *fence,
                char holder[256]); /* -EBUSY: holder gets who */
void store_list(struct store *s, store_each *each, void *arg);
int store_pin(struct store *s, const char *name, struct store_pin **pin, struct frame_entry *e);
/* Everything durable by now is put into the plain files and synced; the journal is empty after it, if nothing is
 * committed meanwhile. */
void store_checkpoint(struct store *s, void (*done)(void *arg), void *arg);

/* The members of volume_store_ops that stand where the rest of their matter does. */
void volume_lease_drop(struct store *s, const char *name, const struct id *identity);
void volume_lease_seen(struct store *s, const struct id *identity);
struct store_txn *volume_txn_new(struct store *s, const struct id *holder, struct store_names names,
                                 void (*spilled)(void *arg, size_t bytes), void *arg);
void volume_txn_chain(struct store_txn *t, const void *chain);
void volume_txn_writer(struct store_txn *t, const struct id *writer);
int volume_txn_add(struct store_txn *t, uint8_t type, struct buf *payload, char error[STORE_ERROR]);
void volume_txn_commit(struct store_txn *t, void (*durable)(void *arg, int err, const char *text), void *arg);
void volume_txn_abort(struct store_txn *t);
int volume_pin_live(struct store_pin *pin, const struct id *owner);
int volume_pin_changed(struct store_pin *pin, struct store_pin *later,
                       void (*done)(void *arg, int err, struct buf *data), void *arg);
void volume_pin_read(struct store_pin *pin, uint64_t offset, uint32_t len, uint32_t room,
                     void (*done)(void *arg, int err, struct buf *data), void *arg);
struct buf *volume_pin_read_now(struct store_pin *pin, uint64_t offset, uint32_t len, uint32_t room);
void volume_pin_hash(struct store_pin *pin, unsigned level, uint64_t first, uint32_t count, bool fresh,
                     void (*done)(void *arg, int err, struct buf *data), void *arg);
int volume_pin_extents(struct store_pin *pin, uint64_t offset, uint32_t len,
                       void (*done)(void *arg, int err, struct buf *extents), void *arg);
void volume_unpin(struct store_pin *pin);

/* io.c */
int io_write(int fd, const void *data, size_t len, uint64_t offset);
int io_read(int fd, void *to, size_t len, uint64_t offset);

/* table.c */
struct name *name_find(const struct store *s, const char *text);
struct name *name_get(struct store *s, const char *text); /* makes it; NULL without memory */
void name_release(struct store *s, struct name *n);       /* one user less */
void names_prune(struct store *s);
enum side { SIDE_HEAD, SIDE_DURABLE, SIDE_DISK }; /* DISK: durable, or what is still to be applied */
const char *name_clash(const struct store *s, const char *text, enum side side); /* the other name, or NULL */
struct region *region_new(struct store *s, uint64_t file, const struct id *lineage, const struct source *source);
struct region *region_by_file(const struct store *s, uint64_t file);
struct region *region_hold(struct region *r);
void region_drop(struct store *s, struct region *r);
int region_open(struct store *s, struct region *r, bool create); /* under its write lock: fd or negative errno */
void region_dirty(struct store *s, struct region *r);
bool lease_stands(const struct store *s, const struct name *n, const struct id *identity);
bool lease_held(const struct store *s, const struct name *n);
void fd_close_later(struct store *s, int fd);

/* txn.c */
int txn_check(struct store_txn *t, char error[STORE_ERROR]); /* against the heads; sets them */
void txn_unhead(struct store_txn *t);
void txn_durable(struct store_txn *t); /* its bindings and figures become the durable ones */
void txn_free(struct store_txn *t);
void txn_unbind(struct store_txn *t, struct name *n); /* the whole of a removal; t->err without memory */
void txns_push(struct txns *q, struct store_txn *t);
struct store_txn *txns_pop(struct txns *q);
void store_credits(struct store *s);
/* Pages of a transaction in their order, spilled ones first; each extent clipped to the part's size. Stops at the first
 * non-zero return. */
/* RAW: deltas, too, as they came. Else they are given as the DATA that they change; CLIPPED: to the region's size. */
enum pages_view { PAGES_WHOLE, PAGES_CLIPPED, PAGES_RAW };
typedef int pages_each(void *arg, struct part *p, const struct frame_extent *e);
int txn_pages(struct store_txn *t, enum pages_view view, pages_each *each, void *arg);
int frame_extents(struct part *p, const void *payload, size_t len, enum pages_view view, pages_each *each, void *arg);

/* record.c */
uint64_t record_length(const struct store_txn *t);
int record_head(const struct store_txn *t, struct wr *w);
/* Reads one transaction. `regions`: parts get their region, which is made when it is not known; bindings get names. */
struct store_txn *record_get(struct store *s, struct rd *r);

/* journal.c */
#define JOURNAL_HEAD 64u
#define JOURNAL_ALIGN 4096u
uint64_t journal_length(uint64_t body);
bool journal_place(const struct journal *j, uint64_t len, uint64_t *pos);
int journal_write(const struct journal *j, uint64_t pos, struct store_txn *const *txns, size_t n, uint64_t *len,
                  bool *unsynced);
int journal_wrote(struct journal *j, uint64_t pos, uint64_t len);
void journal_trim(struct journal *j, uint64_t seq);
uint64_t journal_next(const struct journal *j, uint64_t seq); /* where the record after seq is or will be */
int journal_scan(struct journal *j, int (*each)(void *arg, uint64_t seq, struct rd *body, uint32_t epochs), void *arg,
                 char error[STORE_ERROR]);

/* apply.c */
struct pinned {
    struct store_pin **pins;
    size_t len;
};
int apply_reserve(struct store *s, struct store_txn *t, uint64_t unapplied, char error[STORE_ERROR]);
/* Deltas against their bases: what the files have, with the transactions of the batch before over it. One struct a batch, its transactions in their order. */
struct bases;
struct bases *bases_new(void);
void bases_free(struct bases *b);
bool bases_simple(const struct store_txn *t); /* it can be laid over a page: others must be in the files first */
int region_page(struct store *s, struct region *r, uint64_t page, uint8_t *to); /* filled up with zeros; -errno */
int apply_verify(struct store *s, struct bases *b, struct store_txn *t, bool more, char error[STORE_ERROR]);
int apply_txn(struct store *s, struct store_txn *t, const struct pinned *pinned);
int name_apply(struct store *s, const char *name, uint64_t file); /* file 0: the name is no more */
int file_zero(int fd, uint64_t len, uint64_t offset);
int apply_content(struct store *s, struct store_txn *t, const struct pinned *pinned);

/* apply_job.c */
void apply_start(struct store *s); /* the first of the apply queue; store_pump when done */

/* spill.c */
#define SPILL_HEAD 8u                               /* u32 part, u32 length, then a PAGES payload */
void txn_credit(struct store_txn *t, size_t bytes); /* tells `spilled`, from the loop */
void txn_uncredit(struct store_txn *t);
size_t txn_limit(const struct store_txn *t);
void spill_start(struct store_txn *t); /* if it is time */
void spill_unwait(struct store_txn *t);
void spills_resume(struct store *s); /* looks again at those that wait */

/* copy.c */
typedef int copies_put(void *arg, const uint8_t *payload, uint32_t len);
/* Gives the frame as PAGES payloads without COPY. -EBADMSG: a page is not what its COPY says. Pool thread. */
int copies_expand(struct store *s, struct part *p, const struct buf *b, copies_put *put, void *arg);
const char *copy_fault(const struct part *p, const struct frame_extent *e); /* why it cannot be taken; NULL: it can */

/* checkpoint.c */
void checkpoint_start(struct store *s, bool last);
int checkpoint_now(struct store *s); /* blocking, while opening */
void waiters_tell(struct waiter *w);

/* commit.c */
void store_finish(struct store *s);
void txn_discard(struct store_txn *t); /* frees it and what it left on disk */

/* pin.c */
int pin_save(struct store_pin *pin, int fd, uint64_t from, uint64_t to); /* under the write lock */
void pins_applied(struct store *s);
void pin_release(struct store_pin *pin);
bool pin_saved(const struct store_pin *pin, uint64_t page);
int pin_read(struct store_pin *pin, uint8_t *to, size_t len, uint64_t offset); /* under the read lock, its file open */

/* extents.c */
int pin_extents(struct store_pin *pin, uint64_t offset, uint64_t end, struct buf *to); /* likewise */

/* tree.c. All of a region's under its write lock. */
struct tree;
void tree_wrote(struct region *r, uint64_t from, uint64_t to); /* bytes from .. to are about to change */
void tree_zeroed(struct region *r, uint64_t from, uint64_t to);
void tree_sized(struct region *r, uint64_t size);
void tree_forget(struct region *r);
void tree_free(struct tree *t);

/* Nodes first .. first + count of a level, cut at the pinned size by tree_read_init, which says how many in count. */
struct tree_read {
    struct store_pin *pin;
    uint64_t size; /* of the region, as the pin sees it */
    unsigned level;
    uint64_t first;
    uint32_t count;
    bool fresh;            /* its pages have to be read again */
    uint64_t from, at, to; /* pages: at: those before were looked at */
};
void tree_read_init(struct tree_read *q, struct store_pin *pin, unsigned level, uint64_t first, uint32_t count,
                    bool fresh);
/* Pool thread: reads a slice of what is not known, at most. Once *done, `to` has the nodes (16 bytes each). */
int tree_read_slice(struct tree_read *q, uint8_t *to, bool *done);

/* recover.c */
void *meta_put(struct store *s, uint64_t seq, uint64_t pos, size_t *len);
int store_recover(struct store *s, char error[STORE_ERROR]);

#endif
