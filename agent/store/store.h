/* A store: the regions of one replica, changed by epochs only. This is the seam between sessions and the disk.
 *
 * Everything here is called, and every callback made, on the loop thread; callbacks never from within the call that takes them. Disk work is done on pool
 * threads inside. Lookups answer from memory at once.
 *
 * Life of an epoch: store_txn_new, store_txn_add for each of its frames (OP, REGION, PAGES as they came; payloads held, not copied), store_txn_commit.
 *   - Adding checks each frame against the state that the epochs committed before it will have left: lineage, epoch + 1, fence, name, sizes.
 *   - Memory: a transaction that grows beyond STORE_TXN_MEMORY is spilled to disk in the background: pages of regions that it creates go straight into their
 *     new file, others into a spill file that the journal record names; at the commit the rest of it, too. `spilled` is called as memory is freed, which is what windows are opened by.
 *   - Commit: one checksummed record in the journal, fdatasync (one for all epochs that wait: group commit), then durable(0). Then it is applied to the
 *     regions' files. Epochs commit in the order of store_txn_commit.
 *   - Killed before the record is whole on disk: the epoch is not there. After: it is, and recovery applies it again; applying twice is the same as once.
 *   - A failing write or fdatasync of the journal: durable(err), and for a failing sync nothing more is acknowledged until reopened (what the kernel has
 *     dropped cannot be known). A full disk fails that epoch only.
 *
 * Implementations fill in the ops of seam.h: the one in this folder, and agent/hub/, whose store is other agents (what is said here of journal and disk, they do).
 * Two backends of this one, file: and mem:, differ in struct volume (store/volume.h): what a region's file is, and whether there is a journal. */
#ifndef STORE_STORE_H
#define STORE_STORE_H

#include "agent/base/buf.h"
#include "agent/base/id.h"
#include "wire/frame.h"

#include <uv.h>

#define STORE_TXN_MEMORY (16u << 20)
#define STORE_LEASE_MS 10000u
#define STORE_ERROR 512u

struct store;
struct store_txn;
struct store_pin;

/* url: "file:DIR" (made when it is not there; locked: one agent a directory) or "mem:". Recovers the journal before it returns (blocking: called at start).
 * 0, or a negative errno and what, where, why, what to try in error. */
int store_open(struct store **out, uv_loop_t *loop, const char *url, char error[STORE_ERROR]);
/* Finishes the commits handed in, applies everything, syncs the files and empties the journal, so that the plain files are exact. Then done, then freed. */
void store_close(struct store *s, void (*done)(void *arg), void *arg);
/* DIR of a file: store, NULL for others. */
const char *store_dir(const struct store *s);

/* What is there under a name, after the last durable epoch; and, for `write`, the writer's lease on the name, whether a region has it or not. A lease is held by
 * an identity, which gets it again at once, until STORE_LEASE_MS after its last connection's end (store_lease_seen keeps it alive). The fence rises with each
 * change of holder, persistently. All that an ATTACHED says but the handle goes to `to`, a bad name too (FRAME_ATTACH_BAD).
 * 0: `to` is filled. -EINPROGRESS: others have to be asked first, and `done` is called with the answer; or with a negative errno and a text in to->holder:
 * nobody there to ask, and no other answer will come. `arg` may be called after the connection of the one who asks has ended. */
struct store_attach {
    const char *name, *host; /* host: of the one who asks, for people */
    const struct id *identity;
    bool write;
};
typedef void store_attach_done(void *arg, int err, const struct frame_attached *to);
int store_attach(struct store *s, const struct store_attach *a, struct frame_attached *to, store_attach_done *done,
                 void *arg);
void store_lease_drop(struct store *s, const char *name, const struct id *identity);
void store_lease_seen(struct store *s, const struct id *identity); /* its connection lives: called every few seconds, and when it ends */

/* What an epoch's handles mean: the session's names. NULL for an unknown handle. */
struct store_names {
    const char *(*name_of)(void *arg, uint32_t handle);
    void *arg;
};

/* holder: whose leases count. Error texts of add and commit go to the peer. -ENOTCONN: this store has nobody left to keep epochs, and the peer is better off
 * without a connection. */
struct store_txn *store_txn_new(struct store *s, const struct id *holder, struct store_names names, void (*spilled)(void *arg, size_t bytes), void *arg);
/* Epochs of one chain (a stream of a session) commit in their order, and once one has failed, those handed in after it until its callback fail too. Without
 * this call the chain is the session: names.arg. */
void store_txn_chain(struct store_txn *t, const void *chain);
/* The epoch is recorded as written by this identity (a hub passes it through) instead of the holder's. Before anything is added. */
void store_txn_writer(struct store_txn *t, const struct id *writer);
/* type is FRAME_OP, FRAME_REGION or FRAME_PAGES; the payload is held as needed. A negative errno (frame_code_from's) spoils the transaction: it can only be
 * aborted. PAGES bytes are told to `spilled` once they no longer are in memory, or at once (from the loop) while the transaction is small; never after
 * store_txn_abort or `durable`. */
int store_txn_add(struct store_txn *t, uint8_t type, struct buf *payload, char error[STORE_ERROR]);
/* Whether all of it is in the memory of whoever keeps it, now, before the commit. If not, `received` is called with the commit's arg when it is, and not after
 * `durable`. */
bool store_txn_received(struct store_txn *t, void (*received)(void *arg));
/* The transaction is the store's now. durable(arg, 0 or negative errno, text). */
void store_txn_commit(struct store_txn *t, void (*durable)(void *arg, int err, const char *text), void *arg);
void store_txn_abort(struct store_txn *t);

/* Every region once, in the order of names. 0: all were told. -EINPROGRESS: they will be, and then `done`. */
typedef void store_each(void *arg, const struct frame_entry *e);
int store_ask_list(struct store *s, store_each *each, void (*done)(void *arg, int err, const char *text), void *arg);

/* A pinned region reads as its last committed epoch was when pinned, while epochs keep coming: pages about to be overwritten are kept aside, up to a budget
 * (STORE_PIN_BUDGET a pin); beyond it reads answer -ENOBUFS, never a mix. */
#define STORE_PIN_BUDGET (256u << 20)
/* 0, or -ENOENT, -EINVAL; or -EINPROGRESS, and done(arg, err, pin, e, text) later. */
typedef void store_pin_done(void *arg, int err, struct store_pin *pin, const struct frame_entry *e, const char *text);
int store_ask_pin(struct store *s, const char *name, struct store_pin **pin, struct frame_entry *e, store_pin_done *done, void *arg);
/* A pin just made is live from now on: what is asked of it sees what is durable then, and nothing is kept aside for it. That holds as long as the region is
 * there and nobody but `owner` has committed an epoch of it since the pin was made; later answers are -ESTALE. Reads are never short: zeros lie beyond the
 * region's end. -EOPNOTSUPP: this store cannot. */
int store_pin_live(struct store_pin *pin, const struct id *owner);
/* Reads up to the pinned size: short at its end. done(arg, 0 or negative errno, data or NULL); the buf is the callee's, and begins with `room` bytes that are
 * the callee's to fill: so that what is read need not be copied to be sent. */
void store_pin_read(struct store_pin *pin, uint64_t offset, uint32_t len, uint32_t room, void (*done)(void *arg, int err, struct buf *data), void *arg);
/* The same, answered here and now, when nothing has to be waited for: what is not much and in memory. NULL: read it the other way. */
struct buf *store_pin_read_now(struct store_pin *pin, uint64_t offset, uint32_t len, uint32_t room);
/* Nodes first .. first + count of a level of the region's hash tree (wire/frame.md), fewer at its end; level 0 are its pages. data is 16 bytes a node. The
 * tree is kept from then on, 17 bytes for each page with data; `fresh`: all pages below these nodes are read again. */
void store_pin_hash(struct store_pin *pin, unsigned level, uint64_t first, uint32_t count, bool fresh, void (*done)(void *arg, int err, struct buf *data), void *arg);
/* Where data and holes are, from offset on: done(arg, 0 or negative errno, array of struct store_extent or NULL), in order, STORE_EXTENTS at most, so that
 * they may end early; what is no hole may be zeros all the same. -ENOTSUP at once, and no call of `done`: this store does not know. */
#define STORE_EXTENTS 1024u
struct store_extent {
    uint64_t end;
    bool hole;
};
int store_pin_extents(struct store_pin *pin, uint64_t offset, uint32_t len, void (*done)(void *arg, int err, struct buf *extents), void *arg);
/* Which pages differ between two pins of one region, the second of a later epoch: done(arg, 0, an EXTENTS payload whose request is 0). -ESTALE, and no done:
 * they are not of one region; -EOPNOTSUPP: this store cannot tell. */
int store_pin_changed(struct store_pin *pin, struct store_pin *later, void (*done)(void *arg, int err, struct buf *data), void *arg);
void store_unpin(struct store_pin *pin);

/* Removes a region, its lease too. Refused with -EBUSY while another than `identity` holds the lease, unless forced. */
void store_remove(struct store *s, const char *name, const struct id *identity, bool force, void (*done)(void *arg, int err, const char *text), void *arg);

#endif
