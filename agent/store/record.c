/* Bytes of one epoch in a journal record, all integers big-endian:
 *
 *     id   writer
 *     i64  seconds since 1970, when it was committed
 *     u64  number and u64 length of its spill file; number 0: none
 *     u32  parts: each {u64 file, u8 flags (1 created, 2 direct, 4 stated), id lineage, u64 ino, u64 btime, u64 epoch,
 * fence, min_size, size} u32  bindings: each {u64 file, 0 for none; str name} u32  frames: each {u32 part, u32 length,
 * a PAGES payload as it came}
 *
 * Everything is stated as it will be, so that applying a record twice, or after a later one, does no harm once the
 * later ones are applied again as well. */
#include "agent/store/inside.h"

#include <errno.h>
#include <stdlib.h>

#define PART_BYTES (8u + 1 + 16 + 16 + 32)
#define FLAG_CREATED 1u
#define FLAG_DIRECT 2u
#define FLAG_STATED 4u

static uint64_t head_length(const struct store_txn *t)
{
    uint64_t len = 16 + 8 + 16 + 3 * 4 + t->parts_len * PART_BYTES;
    for (size_t i = 0; i < t->bindings_len; i++)
        len += 8 + 2 + strlen(t->bindings[i].name->text);
    return len;
}

uint64_t record_length(const struct store_txn *t)
{
    uint64_t len = head_length(t);
    for (size_t i = t->held_first; i < t->held_len; i++)
        len += 8 + t->held[i].buf->len;
    return len;
}

static void part_put(struct wr *w, const struct part *p)
{
    wr_u64(w, p->r->file);
    wr_u8(w,
          (uint8_t)((p->created ? FLAG_CREATED : 0) | (p->direct ? FLAG_DIRECT : 0) | (p->stated ? FLAG_STATED : 0)));
    wr_copy(w, p->r->lineage.b, 16);
    wr_u64(w, p->r->source.ino);
    wr_u64(w, p->r->source.btime);
    wr_u64(w, p->epoch);
    wr_u64(w, p->fence);
    wr_u64(w, p->min_size);
    wr_u64(w, p->size);
}

/* All but the frames. w->start is malloc'ed here. */
int record_head(const struct store_txn *t, struct wr *w)
{
    size_t len = (size_t)head_length(t);
    void *bytes = malloc(len);
    if (!bytes)
        return -ENOMEM;
    *w = wr_over(bytes, len);
    wr_copy(w, t->writer.b, 16);
    wr_u64(w, (uint64_t)t->committed_at);
    wr_u64(w, t->spill_len ? t->spill : 0);
    wr_u64(w, t->spill_len);
    wr_u32(w, (uint32_t)t->parts_len);
    for (size_t i = 0; i < t->parts_len; i++)
        part_put(w, t->parts[i]);
    wr_u32(w, (uint32_t)t->bindings_len);
    for (size_t i = 0; i < t->bindings_len; i++) {
        const struct binding *b = &t->bindings[i];
        wr_u64(w, b->part < 0 ? 0 : t->parts[b->part]->r->file);
        wr_str(w, b->name->text);
    }
    wr_u32(w, (uint32_t)(t->held_len - t->held_first));
    return w->bad ? -EINVAL : 0;
}

static int part_get(struct store *s, struct store_txn *t, struct rd *r)
{
    struct part *p = calloc(1, sizeof *p);
    if (!p)
        return -ENOMEM;
    t->parts[t->parts_len++] = p;
    uint64_t file = rd_u64(r);
    uint8_t flags = rd_u8(r);
    struct id lineage;
    rd_copy(r, lineage.b, 16);
    struct source source;
    source.ino = rd_u64(r);
    source.btime = rd_u64(r);
    p->created = flags & FLAG_CREATED;
    p->direct = flags & FLAG_DIRECT;
    p->stated = flags & FLAG_STATED;
    p->epoch = rd_u64(r);
    p->fence = rd_u64(r);
    p->min_size = rd_u64(r);
    p->size = rd_u64(r);
    if (r->bad || !file)
        return -EBADMSG;
    p->r = region_by_file(s, file);
    if (p->r) {
        region_hold(p->r);
        return 0;
    }
    p->r = region_new(s, file, &lineage, &source);
    return p->r ? 0 : -ENOMEM;
}

static int binding_get(struct store *s, struct store_txn *t, struct rd *r)
{
    char text[NAME_CAP];
    uint64_t file = rd_u64(r);
    rd_str(r, text, sizeof text);
    if (r->bad || name_fault(text))
        return -EBADMSG;
    struct binding *b = &t->bindings[t->bindings_len];
    *b = (struct binding){.name = name_get(s, text), .part = -1};
    if (!b->name)
        return -ENOMEM;
    b->name->users++;
    t->bindings_len++;
    for (size_t i = 0; file && i < t->parts_len; i++)
        if (t->parts[i]->r->file == file)
            b->part = (int32_t)i;
    return file && b->part < 0 ? -EBADMSG : 0;
}

static int held_get(struct store_txn *t, struct rd *r)
{
    uint32_t part = rd_u32(r), len = rd_u32(r);
    const uint8_t *payload = rd_take(r, len);
    if (!payload || part >= t->parts_len)
        return -EBADMSG;
    struct buf *b = buf_new(len);
    if (!b)
        return -ENOMEM;
    memcpy(b->data, payload, len);
    b->len = len;
    t->held[t->held_len++] = (struct held){.part = part, .buf = b};
    t->memory += len;
    t->s->memory += len;
    return 0;
}

/* Reads a count and makes room for it; what cannot be in the bytes left is refused before memory is taken. */
static int count_get(struct rd *r, size_t least, void **array, size_t size, uint32_t *count)
{
    *count = rd_u32(r);
    if (r->bad || *count > rd_left(r) / least)
        return -EBADMSG;
    *array = malloc(*count * size + 1);
    return *array ? 0 : -ENOMEM;
}

static int txn_get(struct store *s, struct store_txn *t, struct rd *r)
{
    rd_copy(r, t->writer.b, 16);
    t->committed_at = (int64_t)rd_u64(r);
    t->spill = rd_u64(r);
    t->spill_len = rd_u64(r);
    uint32_t n;
    int err = count_get(r, PART_BYTES, (void **)&t->parts, sizeof *t->parts, &n);
    while (!err && n--)
        err = part_get(s, t, r);
    if (!err)
        err = count_get(r, 10, (void **)&t->bindings, sizeof *t->bindings, &n);
    while (!err && n--)
        err = binding_get(s, t, r);
    if (!err)
        err = count_get(r, 8, (void **)&t->held, sizeof *t->held, &n);
    while (!err && n--)
        err = held_get(t, r);
    return err;
}

struct store_txn *record_get(struct store *s, struct rd *r)
{
    struct store_txn *t = calloc(1, sizeof *t);
    if (!t) {
        errno = ENOMEM;
        return NULL;
    }
    t->s = s;
    t->spill_fd = -1;
    int err = txn_get(s, t, r);
    if (!err)
        return t;
    txn_free(t);
    errno = -err;
    return NULL;
}
