/* The journal of a file: store: a file of fixed length, written round and round.
 *
 * A record is a batch of epochs that became durable by one fdatasync. It starts at a multiple of JOURNAL_ALIGN and
 * never wraps: one that does not fit before the end starts at 0. All integers big-endian:
 *
 *     0   u32  magic "MSJR"
 *     4   u32  version
 *     8   id   of the store, so that no other journal's remains are taken for ours
 *     24  u64  sequence, one more than the record's before
 *     32  u64  length, head included
 *     40  u32  epochs
 *     44  u32  zero
 *     48  16   XXH3-128, canonical, of bytes 0..47 and the body
 *     64       the body: see record.c
 *
 * The saved table (recover.c) says with which sequence replay starts, and where. Replay takes that record there, or at
 * 0, then the next behind it or at 0, and ends where there is no whole one. A later record is written only after the
 * one before is on disk, so a broken record with a whole one of a higher sequence anywhere means that the disk lost
 * what had been acknowledged: that is an error, a torn end is not.
 *
 * Writing into blocks that were written before changes no metadata, so the fdatasync writes data only. */
#include "agent/store/inside.h"
#include "agent/base/xxh3.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <unistd.h>

#define MAGIC 0x4d534a52u
#define VERSION 1u
#define CHECKED 48u

uint64_t journal_length(uint64_t body)
{
    return (JOURNAL_HEAD + body + JOURNAL_ALIGN - 1) / JOURNAL_ALIGN * JOURNAL_ALIGN;
}

bool journal_place(const struct journal *j, uint64_t len, uint64_t *pos)
{
    if (!j->used || j->tail > j->head) {
        if (len <= j->size - j->tail) {
            *pos = j->tail;
            return true;
        }
        *pos = 0;
        return len <= (j->used ? j->head : j->size);
    }
    *pos = j->tail;
    return j->tail < j->head && len <= j->head - j->tail;
}

int journal_wrote(struct journal *j, uint64_t pos, uint64_t len)
{
    struct mark *marks = store_grow(j->marks, j->marks_len, &j->marks_cap, sizeof *marks);
    if (!marks)
        return -ENOMEM;
    j->marks = marks;
    uint64_t bytes = pos == j->tail ? len : j->size - j->tail + len;
    if (!j->used) {
        j->head = pos;
        bytes = len;
    }
    j->used += bytes;
    j->tail = pos + len;
    marks[j->marks_len++] = (struct mark){.seq = j->seq++, .end = j->tail, .bytes = bytes};
    return 0;
}

void journal_trim(struct journal *j, uint64_t seq)
{
    size_t n = 0;
    while (n < j->marks_len && j->marks[n].seq <= seq) {
        j->used -= j->marks[n].bytes;
        j->head = j->marks[n++].end;
    }
    j->marks_len -= n;
    if (j->marks_len)
        memmove(j->marks, j->marks + n, j->marks_len * sizeof *j->marks);
}

uint64_t journal_next(const struct journal *j, uint64_t seq)
{
    uint64_t at = j->used ? j->head : j->tail;
    for (size_t i = 0; i < j->marks_len && j->marks[i].seq <= seq; i++)
        at = j->marks[i].end;
    return at;
}

struct gather {
    struct iovec *iov;
    size_t len;
    uint64_t bytes;
    XXH3_state_t *hash;
};

static void gather(struct gather *g, const void *bytes, size_t len)
{
    g->iov[g->len++] = (struct iovec){.iov_base = (void *)(uintptr_t)bytes, .iov_len = len};
    g->bytes += len;
    XXH3_128bits_update(g->hash, bytes, len);
}

static int write_gathered(int fd, struct iovec *iov, size_t len, uint64_t pos)
{
    while (len) {
        ssize_t n = pwritev(fd, iov, len < IOV_MAX ? (int)len : IOV_MAX, (off_t)pos);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -EIO;
        pos += (size_t)n;
        while (len && (size_t)n >= iov->iov_len) {
            n -= (ssize_t)iov->iov_len;
            iov++;
            len--;
        }
        if (n) {
            iov->iov_base = (char *)iov->iov_base + n;
            iov->iov_len -= (size_t)n;
        }
    }
    return 0;
}

static void head_put(const struct journal *j, uint8_t head[JOURNAL_HEAD], uint64_t len, size_t epochs)
{
    struct wr w = wr_over(head, JOURNAL_HEAD);
    wr_u32(&w, MAGIC);
    wr_u32(&w, VERSION);
    wr_copy(&w, j->store.b, 16);
    wr_u64(&w, j->seq);
    wr_u64(&w, len);
    wr_u32(&w, (uint32_t)epochs);
    wr_u32(&w, 0);
}

/* Bytes of all bodies, and in tables[] their heads' bytes and the frames' little heads. */
static int bodies_gather(struct gather *g, struct store_txn *const *txns, size_t n, struct wr *heads,
                         uint8_t *frame_heads)
{
    for (size_t i = 0; i < n; i++) {
        const struct store_txn *t = txns[i];
        int err = record_head(t, &heads[i]);
        if (err)
            return err;
        gather(g, heads[i].start, wr_len(&heads[i]));
        for (size_t k = t->held_first; k < t->held_len; k++) {
            put_u32(frame_heads, t->held[k].part);
            put_u32(frame_heads + 4, t->held[k].buf->len);
            gather(g, frame_heads, 8);
            gather(g, t->held[k].buf->data, t->held[k].buf->len);
            frame_heads += 8;
        }
    }
    return 0;
}

/* On a worker. *unsynced: written, but whether it is on disk is not known. */
int journal_write(const struct journal *j, uint64_t pos, struct store_txn *const *txns, size_t n, uint64_t *len,
                  bool *unsynced)
{
    static const uint8_t zeros[JOURNAL_ALIGN];
    uint8_t head[JOURNAL_HEAD];
    uint64_t body = 0;
    size_t frames = 0;
    *unsynced = false;
    for (size_t i = 0; i < n; i++) {
        body += record_length(txns[i]);
        frames += txns[i]->held_len - txns[i]->held_first;
    }
    struct gather g = {.iov = malloc((frames * 2 + n + 2) * sizeof *g.iov), .hash = XXH3_createState()};
    uint8_t *frame_heads = malloc(frames * 8 + 1);
    struct wr *heads = calloc(n, sizeof *heads);
    int err = g.iov && g.hash && frame_heads && heads ? 0 : -ENOMEM;
    if (!err) {
        XXH3_128bits_reset(g.hash);
        head_put(j, head, JOURNAL_HEAD + body, n);
        gather(&g, head, CHECKED);
        err = bodies_gather(&g, txns, n, heads, frame_heads);
    }
    if (!err) {
        XXH128_canonicalFromHash((XXH128_canonical_t *)(head + CHECKED), XXH3_128bits_digest(g.hash));
        g.iov[0].iov_len = JOURNAL_HEAD;
        *len = journal_length(body);
        if (*len > JOURNAL_HEAD + body)
            gather(&g, zeros, (size_t)(*len - JOURNAL_HEAD - body));
        err = write_gathered(j->fd, g.iov, g.len, pos);
        store_step("write the journal");
    }
    if (!err && fdatasync(j->fd) < 0) {
        err = -errno;
        *unsynced = true;
    }
    store_step("sync the journal");
    for (size_t i = 0; heads && i < n; i++)
        free(heads[i].start);
    free(heads);
    free(frame_heads);
    free(g.iov);
    XXH3_freeState(g.hash);
    return err;
}

struct head {
    uint64_t seq, len;
    uint32_t epochs;
    uint8_t sum[16];
};

static bool head_get(const struct journal *j, uint64_t pos, const uint8_t bytes[JOURNAL_HEAD], struct head *h)
{
    struct rd r = rd_over(bytes, JOURNAL_HEAD);
    uint32_t magic = rd_u32(&r), version = rd_u32(&r);
    struct id store;
    rd_copy(&r, store.b, 16);
    h->seq = rd_u64(&r);
    h->len = rd_u64(&r);
    h->epochs = rd_u32(&r);
    uint32_t zero = rd_u32(&r);
    rd_copy(&r, h->sum, 16);
    return magic == MAGIC && version == VERSION && id_same(&store, &j->store) && !zero && h->len >= JOURNAL_HEAD &&
           h->len <= j->size - pos;
}

/* The whole record at pos, when its sequence is at least `least`: malloc'ed. 0, -EBADMSG when there is none, or a
 * read's error. */
static int record_read(const struct journal *j, uint64_t pos, uint64_t least, struct head *h, uint8_t **record)
{
    uint8_t bytes[JOURNAL_HEAD];
    *record = NULL;
    if (pos > j->size - JOURNAL_HEAD)
        return -EBADMSG;
    int err = io_read(j->fd, bytes, JOURNAL_HEAD, pos);
    if (err)
        return err;
    if (!head_get(j, pos, bytes, h) || h->seq < least)
        return -EBADMSG;
    uint8_t *whole = malloc((size_t)h->len);
    if (!whole)
        return -ENOMEM;
    err = io_read(j->fd, whole, (size_t)h->len, pos);
    XXH3_state_t *hash = XXH3_createState();
    if (!err && hash) {
        XXH128_canonical_t sum;
        XXH3_128bits_reset(hash);
        XXH3_128bits_update(hash, whole, CHECKED);
        XXH3_128bits_update(hash, whole + JOURNAL_HEAD, (size_t)h->len - JOURNAL_HEAD);
        XXH128_canonicalFromHash(&sum, XXH3_128bits_digest(hash));
        err = memcmp(&sum, h->sum, sizeof sum) ? -EBADMSG : 0;
    } else if (!err)
        err = -ENOMEM;
    XXH3_freeState(hash);
    if (err)
        free(whole);
    else
        *record = whole;
    return err;
}

static int later_record(const struct journal *j, char error[STORE_ERROR])
{
    for (uint64_t pos = 0; pos < j->size; pos += JOURNAL_ALIGN) {
        struct head h;
        uint8_t *record;
        int err = record_read(j, pos, j->seq, &h, &record);
        free(record);
        if (err == -EBADMSG)
            continue;
        if (err)
            return err;
        snprintf(error, STORE_ERROR,
                 "the journal is damaged: record %llu is broken, but record %llu behind it is whole. Acknowledged "
                 "epochs are lost; "
                 "restore the directory from a copy",
                 (unsigned long long)j->seq, (unsigned long long)h.seq);
        return -EUCLEAN;
    }
    return 0;
}

/* From j->tail and j->seq on, both of which are then where the next record goes. each gets every record's body. */
int journal_scan(struct journal *j, int (*each)(void *arg, uint64_t seq, struct rd *body, uint32_t epochs), void *arg,
                 char error[STORE_ERROR])
{
    for (;;) {
        struct head h;
        uint8_t *record;
        uint64_t pos = j->tail;
        int err = record_read(j, pos, j->seq, &h, &record);
        if ((err == -EBADMSG || (!err && h.seq != j->seq)) && pos) {
            free(record);
            pos = 0;
            err = record_read(j, pos, j->seq, &h, &record);
        }
        if (err == -EBADMSG || (!err && h.seq != j->seq)) {
            free(record);
            return later_record(j, error);
        }
        if (err)
            return err;
        struct rd body = rd_over(record + JOURNAL_HEAD, (size_t)h.len - JOURNAL_HEAD);
        err = each(arg, h.seq, &body, h.epochs);
        free(record);
        if (err)
            return err;
        j->seq++;
        j->tail = pos + journal_length(h.len - JOURNAL_HEAD);
    }
}
