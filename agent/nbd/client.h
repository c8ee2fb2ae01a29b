/* A foreign block device server as the agent uses it: requests over up to NBD_CLIENT_CONNS connections. On the loop's
 * thread only; `done` is always called from the loop, never from within the call that asked.
 *
 *     opening ---handshake---> up <--lost, reconnected--> down
 *        \______ refused, size changed, read-only now ______\____> broken: everything is answered with the error
 *
 * Order. Requests may be done in any order, but writes (WRITE, ZEROES) that overlap are done in the order asked:
 * they are never under way at once. A read sees what was answered before it was asked. A flush that is answered with 0
 * has made all durable that was asked for before it and answered with 0, whether the caller had seen the answer or not.
 *
 * Loss. When a connection is lost (or the server says that it shuts down), all are made anew, with back-off, until
 * nbd_client_close; requests wait. A write is kept (its buf is held) until a FLUSH that was sent after its answer is
 * answered; after a reconnect the kept ones are sent again in order, before anything else. So nothing that was answered
 * is missing when the server died with it in its cache. Kept are at most NBD_CLIENT_KEPT bytes: at half of that the
 * client flushes by itself. A write that was answered and cannot be repeated breaks the client, with a line in the log.
 * When the server has no FLUSH, answered writes are not kept, and a flush is answered when all writes before it are.
 * What no client can help: a server that lives on may carry out a write of a lost connection late.
 *
 * Sizes. Any offset and length is right: requests are cut to the server's largest block, and made of whole smallest
 * blocks (by reading, changing and writing what is not whole).
 *
 * Bounds. At most NBD_CLIENT_CALLS requests at once (-ENOBUFS beyond). Of these NBD_CLIENT_IN_FLIGHT and
 * NBD_CLIENT_BYTES a connection are with the server, the others wait here.
 *
 * If the process dies, what was not flushed may be missing at the server, in any selection: a foreign server has no
 * epochs. */
#ifndef NBD_CLIENT_H
#define NBD_CLIENT_H

#include "agent/base/buf.h"
#include "wire/nbd_uri.h"

#include <uv.h>

#define NBD_CLIENT_CONNS 4u
#define NBD_CLIENT_CALLS 8192u
#define NBD_CLIENT_IN_FLIGHT 64u     /* a connection */
#define NBD_CLIENT_BYTES (16u << 20) /* likewise; one request may go beyond */
#define NBD_CLIENT_KEPT (128u << 20) /* of writes that are not known to be durable */
#define NBD_CLIENT_TEXT 512u

struct nbd_client;

/* What the server offered. Valid from `opened` on; nothing of it changes later. */
struct nbd_traits {
    uint64_t size; /* in whole smallest blocks */
    uint32_t block_min, block_max;
    bool read_only, flush, zeroes, multi_conn;
    bool allocation; /* block status is to be had */
};

struct nbd_client_watch {
    /* Once: err 0, or why not (text: one line, without the URI). After an error only nbd_client_close is of use; to try
     * again, open anew. */
    void (*opened)(void *arg, int err, const char *text);
    /* Later: up again (true), or down, or broken for good (see nbd_client_broken). */
    void (*changed)(void *arg, bool up, const char *text);
    void *arg;
};

/* Begins to connect. 0 or -ENOMEM or such; `opened` tells the rest. The URI is copied. */
int nbd_client_open(struct nbd_client **c, uv_loop_t *loop, const struct nbd_uri *uri,
                    const struct nbd_client_watch *watch);
/* Everything still asked is answered with -ECANCELED (from the loop), then `closed` is called, and the client is gone.
 * Nothing is flushed: flush before. */
void nbd_client_close(struct nbd_client *c, void (*closed)(void *arg), void *arg);

const struct nbd_traits *nbd_client_traits(const struct nbd_client *c);
int nbd_client_broken(const struct nbd_client *c);     /* 0, or the errno that everything is answered with */
unsigned nbd_client_conns(const struct nbd_client *c); /* that are up */

/* err: 0, or a negative errno: the server's for this request, or the broken client's. text: never NULL; what the server
 * said of it, or "". */
typedef void nbd_client_done(void *arg, int err, const char *text);

/* All of these: 0, and done comes. -EINVAL: beyond the end, or no length (flush has none). -EROFS: a write to a
 * read-only export. -ENOBUFS: too many at once. -ENOMEM. The range must lie within the size. */

/* `to` is the caller's until done, and all of it is filled then when err is 0 (with an error it holds anything). */
int nbd_client_read(struct nbd_client *c, uint64_t offset, uint32_t len, void *to, nbd_client_done *done, void *arg);
/* data->data + from, len bytes. The buf is held until it is durable; its bytes must not change from now on. */
int nbd_client_write(struct nbd_client *c, uint64_t offset, uint32_t len, struct buf *data, uint32_t from,
                     nbd_client_done *done, void *arg);
/* Reads as zeros afterwards; the server may give the space back. One without WRITE_ZEROES is sent zeros. */
int nbd_client_zeroes(struct nbd_client *c, uint64_t offset, uint64_t len, nbd_client_done *done, void *arg);
int nbd_client_flush(struct nbd_client *c, nbd_client_done *done, void *arg);

struct nbd_extent {
    uint64_t len;
    uint32_t state; /* NBD_STATE_* */
};
struct nbd_extents {
    uint32_t n, cap;
    struct nbd_extent at[];
};
/* What the bytes from `offset` on are: in order and without gaps, at least the first extent of [offset, offset + len),
 * as far as the server told and `cap` (>= 1) has room; ask again behind them. Neighbours differ in state. -ENOTSUP
 * without `allocation` among the traits. `to` is the caller's until done. */
int nbd_client_status(struct nbd_client *c, uint64_t offset, uint64_t len, struct nbd_extents *to,
                      nbd_client_done *done, void *arg);

#endif
