/* What the parts of the store over a foreign block device server share.
 *
 *   disk.c  exports as regions, leases      disk_txn.c   epochs into writes
 *   disk_read.c  pins, reads, read-ahead    disk_hash.c  hashes of what is read
 *
 * A disk is one export, asked for under a name: the URI's export is the region whatever its name; where the URI has
 * none, the export has the region's name.
 *
 *     closed ---asked for---> opening ---opened---> up
 *        ^_______refused, unreachable_____/         |
 *        ^______________broken, not pinned__________/
 *
 * A server knows of bytes and of nothing else. Lineage and epoch are made up here: the lineage out of address, export
 * and size, so that it is the same at the next start; the epoch begins at 1 with each opening and counts what is
 * committed through this store. A size below the export's is remembered as long as the disk is up. One writer at a time
 * is seen to among those who use this store, not among those who use the server.
 *
 * An epoch is kept in memory until it is committed (beyond STORE_TXN_MEMORY it is written as it comes), then written,
 * many requests at a time, then flushed, then durable. Epochs on their way are written at once, and flushed in order;
 * one flush is for all that are written.
 *
 *     this process dies                          at the server is                   and then
 *     before the commit                          nothing of the epoch, or some      the writer's bytes are compared by
 *                                                pages of one that was too large    hashes when it comes again
 *     after it, before the flush was answered    any of its pages, in any order     the same
 *     after that                                 all of it
 *
 *     the server dies, and comes again           the client repeats what was answered and not flushed (client.h)
 *     the server answers a write with an error   that epoch fails with it, and those handed in behind it; its other pages
 *     (ENOSPC, EIO)                              may be there; the writer sends the epoch again
 *     the client gives up (size changed, ...)    everything fails with its text until no pin is left; then anew
 *
 * A pin is the server's bytes, not an epoch of them. Pre-images are not kept: of one that is not live, pages that were
 * written here since it was made read as -ENOBUFS, never as a mix. (A mirror has what it writes, and asks for the
 * others.) What others write at the server meanwhile nobody tells us. */
#ifndef NBD_DISK_H
#define NBD_DISK_H

#include "agent/nbd/client.h"
#include "agent/nbd/store.h"
#include "agent/store/seam.h"
#include "agent/track/hashes.h"

#define DISKS_MAX 1024u
#define AHEAD_BLOCK (512u << 10)
#define AHEAD_BLOCKS 96u /* of one disk: 48 MiB */
#define AHEAD_MOST 64u   /* of them asked for ahead of one reader */
#define AHEAD_READERS 8u
#define HOLE_BITS (1u << 24) /* at most, of a disk's map of holes */

struct want; /* somebody who waits for a disk to open */

/* Bytes read ahead. From `asked` until `here` the client fills them. */
struct block {
    uint64_t at; /* offset; UINT64_MAX: free */
    uint32_t len;
    uint64_t used; /* for the least recent one */
    bool here, stale; /* stale: written to since it was asked for */
    uint8_t *bytes;
    struct reader_wait *waits;
    struct disk *disk;
};

/* Reads that follow each other. */
struct reader {
    uint64_t next, ahead; /* where the next one begins; up to where blocks were asked for */
    uint32_t blocks;      /* to ask for */
    uint64_t used;
};

enum disk_state { DISK_CLOSED, DISK_OPENING, DISK_UP, DISK_CLOSING };

struct disk {
    struct store *s;
    struct disk *next;
    char *name; /* of the region; NULL: of none yet */
    struct nbd_uri uri;
    enum disk_state state;
    struct nbd_client *client;
    struct nbd_traits traits;
    struct want *wants;
    unsigned busy; /* requests at the client, transactions, pins: it is not closed while there are any */

    struct id lineage, writer;
    uint64_t epoch, size, head_epoch, head_size;
    int64_t committed_at;
    bool vacant; /* the region was removed; the bytes were not */
    bool told;   /* that there are no epochs */
    uint64_t written; /* counts what was written */
    struct store_pin *pins;

    bool leased;
    struct id holder;
    char holder_host[256];
    uint64_t fence, seen;

    struct store_txn *queue, **queue_end; /* handed in */
    bool flushing;

    struct block blocks[AHEAD_BLOCKS];
    struct reader readers[AHEAD_READERS];
    uint64_t clock;
    uint8_t *holes; /* a bit for each stretch of hole_step bytes that is one */
    uint64_t hole_step, hole_at, hole_round;
    bool hole_asking;
    struct nbd_extents *hole_answer;
    struct hashes hashes;
};

struct store {
    const struct store_ops *ops; /* first: see seam.h */
    uv_loop_t *loop;
    uv_async_t wake;
    struct nbd_uri uri;
    char *url;
    struct id self;
    struct disk *disks;
    unsigned ndisks;
    struct later *later, **later_end; /* calls back that must not come from within a call */
    bool closing;
    void (*closed)(void *arg);
    void *closed_arg;
};

struct store_pin {
    struct store *s; /* first */
    struct disk *d;
    struct store_pin *next;
    uint64_t size, epoch;
    struct id lineage, owner;
    bool live, lost; /* lost: no memory to remember what was written */
    uint8_t *written; /* a bit a page that was written since; NULL: none was */
    unsigned jobs;
    bool dropped;
};

/* disk.c */
int disk_later(struct store *s, void (*call)(void *arg), void *arg);
void disk_entry(const struct disk *d, struct frame_entry *e);
bool disk_lease_held(const struct disk *d);
void disk_release(struct disk *d); /* one that is busy with it less */
struct disk *disk_named(struct store *s, const char *name, bool make, int *err);
void store_look(struct store *s);

/* disk_txn.c */
struct store_txn *disk_txn_new(struct store *s, const struct id *holder, struct store_names names,
                               void (*spilled)(void *arg, size_t bytes), void *arg);
void disk_txn_chain(struct store_txn *t, const void *chain);
void disk_txn_writer(struct store_txn *t, const struct id *writer);
int disk_txn_add(struct store_txn *t, uint8_t type, struct buf *payload, char error[STORE_ERROR]);
bool disk_txn_received(struct store_txn *t, void (*received)(void *arg));
void disk_txn_commit(struct store_txn *t, void (*durable)(void *arg, int err, const char *text), void *arg);
void disk_txn_abort(struct store_txn *t);

/* disk_read.c */
struct store_pin *disk_pin(struct disk *d);
void disk_read_open(struct disk *d);
void disk_read_forget(struct disk *d);
void disk_changing(struct disk *d, uint64_t from, uint64_t to); /* about to be written */
/* Reads what is there. done as nbd_client_read's. */
int disk_read(struct disk *d, uint64_t offset, uint32_t len, uint8_t *to, nbd_client_done *done, void *arg);
int disk_pin_live(struct store_pin *pin, const struct id *owner);
/* Why these bytes cannot be read any more as they were, or 0. */
int disk_pin_fault(const struct store_pin *pin, uint64_t from, uint64_t to);
void disk_pin_read(struct store_pin *pin, uint64_t offset, uint32_t len, uint32_t room,
                   void (*done)(void *arg, int err, struct buf *data), void *arg);
struct buf *disk_pin_read_now(struct store_pin *pin, uint64_t offset, uint32_t len, uint32_t room);
int disk_pin_extents(struct store_pin *pin, uint64_t offset, uint32_t len,
                     void (*done)(void *arg, int err, struct buf *extents), void *arg);
int disk_pin_changed(struct store_pin *pin, struct store_pin *later,
                     void (*done)(void *arg, int err, struct buf *data), void *arg);
void disk_unpin(struct store_pin *pin);
void disk_pin_job_done(struct store_pin *pin);

/* disk_hash.c */
void disk_pin_hash(struct store_pin *pin, unsigned level, uint64_t first, uint32_t count, bool fresh,
                   void (*done)(void *arg, int err, struct buf *data), void *arg);

#endif
