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
 * Two backends, file: and mem:, differ in struct volume (store/volume.h): what a region's file is, and whether there is a journal. */
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
/* Everything durable by now is put into the plain files and synced; the journal is empty after it, if nothing is committed meanwhile. */
void store_checkpoint(struct store *s, void (*done)(void *arg), void *arg);
/* DIR of a file: store, NULL for mem:. */
const char *store_dir(const struct store *s);

/* -ENOENT, -EINVAL (bad name, or clash such as `a` and `a/b`: text in error when not NULL). State after the last durable epoch. */
int store_lookup(struct store *s, const char *name, struct frame_entry *e, struct source *source, char error[STORE_ERROR]);
/* Every region once, in the order of names. */
void store_list(struct store *s, void (*each)(void *arg, const struct frame_entry *e), void *arg);

/* The writer's lease on a name, whether a region has it or not. Held by an identity, which gets it again at once, until STORE_LEASE_MS after its last
 * connection's end (store_lease_seen keeps it alive). The fence rises with each change of holder, persistently. -EBUSY: holder gets who. */
int store_lease(struct store *s, const char *name, const struct id *identity, const char *host, uint64_t *fence, char holder[256]);
void store_lease_drop(struct store *s, const char *name, const struct id *identity);
void store_lease_seen(struct store *s, const struct id *identity); /* its connection lives: called every few seconds, and when it ends */

/* What an epoch's handles mean: the session's names. NULL for an unknown handle. */
struct store_names {
    const char *(*name_of)(void *arg, uint32_t handle);
    void *arg;
};

/* error texts of add and commit go to the peer. */
struct store_txn *store_txn_new(struct store *s, const struct id *writer, struct store_names names, void (*spilled)(void *arg, size_t bytes), void *arg);
/* Epochs of one chain (a stream of a session) commit in their order, and once one has failed, those handed in after it until its callback fail too. Without
 * this call the chain is the session: names.arg. */
void store_txn_chain(struct store_txn *t, const void *chain);
/* type is FRAME_OP, FRAME_REGION or FRAME_PAGES; the payload is held as needed. A negative errno (frame_code_from's) spoils the transaction: it can only be
 * aborted. PAGES bytes are told to `spilled` once they no longer are in memory, or at once (from the loop) while the transaction is small; never after
 * store_txn_abort or `durable`. */
int store_txn_add(struct store_txn *t, uint8_t type, struct buf *payload, char error[STORE_ERROR]);
/* The transaction is the store's now. durable(arg, 0 or negative errno, text). */
void store_txn_commit(struct store_txn *t, void (*durable)(void *arg, int err, const char *text), void *arg);
void store_txn_abort(struct store_txn *t);

/* A pinned region reads as its last committed epoch was when pinned, while epochs keep coming: pages about to be overwritten are kept aside, up to a budget
 * (STORE_PIN_BUDGET a pin); beyond it reads answer -ENOBUFS, never a mix. */
#define STORE_PIN_BUDGET (256u << 20)
int store_pin(struct store *s, const char *name, struct store_pin **pin, struct frame_entry *e);
/* Reads up to the pinned size: short at its end. done(arg, 0 or negative errno, data or NULL); the buf is the callee's. */
void store_pin_read(struct store_pin *pin, uint64_t offset, uint32_t len, void (*done)(void *arg, int err, struct buf *data), void *arg);
/* XXH3-128 in canonical form of `count` pages of FRAME_PAGE from page `first` on; fewer at the region's end. data is 16 bytes a page. */
void store_pin_hash(struct store_pin *pin, uint64_t first, uint32_t count, void (*done)(void *arg, int err, struct buf *data), void *arg);
void store_unpin(struct store_pin *pin);

/* Removes a region, its lease too. Refused with -EBUSY while another than `identity` holds the lease, unless forced. */
void store_remove(struct store *s, const char *name, const struct id *identity, bool force, void (*done)(void *arg, int err, const char *text), void *arg);

#endif
