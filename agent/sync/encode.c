/* What of a capture goes out, as frames: pages that changed become extents of PAGES, as little of each as is enough, as
 * many in one frame as fit. On the thread that reads (capture.h). */
#include "agent/sync/encode.h"

#include <errno.h>
#include <stdlib.h>

#define DELTA_BLOCKS_MAX 20 /* of 32: beyond, a whole page is hardly longer */

#define TABLE_MAX (FRAME_PAGES_HEAD + FRAME_PAGES_ENTRIES * FRAME_PAGES_ENTRY)

struct encoder {
    struct capture *c;
    struct part *part;
    struct packer *packer; /* NULL: nothing is packed on this link */
    struct frame_extent e[FRAME_PAGES_ENTRIES];
    uint32_t count;
    uint32_t bytes;
    uint8_t room[TABLE_MAX + FRAME_DATA_MAX]; /* the table before the data, in one piece */
};

struct encoder *encoder_new(struct capture *c)
{
    struct encoder *b = malloc(sizeof *b);
    if (!b)
        return NULL;
    b->c = c;
    b->packer = NULL;
    if (c->group->link->packs && !(b->packer = packer_new())) {
        free(b);
        return NULL;
    }
    return b;
}

void encoder_free(struct encoder *b)
{
    if (b)
        packer_free(b->packer);
    free(b);
}

void encode_part(struct encoder *b, struct part *part)
{
    b->part = part;
    b->count = b->bytes = 0;
}

void encode_flush(struct encoder *b)
{
    if (!b->count)
        return;
    uint32_t table = FRAME_PAGES_HEAD + b->count * FRAME_PAGES_ENTRY, len = table + b->bytes, packed;
    uint8_t type = FRAME_PAGES;
    uint8_t *plain = b->room + TABLE_MAX - table;
    const uint8_t *payload = plain, *shorter = NULL;
    frame_pages_put(plain, table, b->part->handle, b->e, b->count);
    if (b->packer)
        shorter = pack(b->packer, &b->part->body->packing, plain, len, table, &packed);
    if (shorter) {
        type = FRAME_PACKED;
        payload = shorter;
        len = packed;
    }
    b->count = b->bytes = 0;
    struct buf *buf = buf_new(len);
    if (!buf) {
        b->c->err = -ENOMEM;
        return;
    }
    memcpy(buf->data, payload, len);
    buf->len = len;
    buf->hash = frame_payload_hash(buf->data, len);
    buf->hashed = 1;
    b->c->out_part[b->c->nout] = b->part;
    b->c->out[b->c->nout++] = (struct item){type, buf};
}

static void encoder_add(struct encoder *b, const struct frame_extent *e, const void *data, uint32_t bytes)
{
    size_t table = FRAME_PAGES_HEAD + (size_t)(b->count + 1) * FRAME_PAGES_ENTRY;
    if (b->count == FRAME_PAGES_ENTRIES || b->bytes + bytes > FRAME_DATA_MAX ||
        table + b->bytes + bytes > FRAME_PAYLOAD_MAX)
        encode_flush(b);
    b->e[b->count++] = *e;
    if (bytes)
        memcpy(b->room + TABLE_MAX + b->bytes, data, bytes);
    b->bytes += bytes;
}

static void encoder_page(struct encoder *b, uint64_t offset, uint32_t len, const uint8_t *page, bool zeros)
{
    uint32_t data = zeros ? 0 : len, kind = zeros ? FRAME_PAGES_ZEROS : FRAME_PAGES_DATA;
    struct frame_extent *last = b->count ? &b->e[b->count - 1] : NULL;
    if (last && last->offset + last->len == offset && last->kind == kind && last->len < (1u << 30) &&
        b->bytes + data <= FRAME_DATA_MAX) {
        last->len += len;
        if (data)
            memcpy(b->room + TABLE_MAX + b->bytes, page, data);
        b->bytes += data;
        return;
    }
    encoder_add(b, &(struct frame_extent){.offset = offset, .len = len, .kind = kind}, page, data);
}

/* A page of which few blocks changed since the last epoch. */
static bool encoder_delta(struct encoder *b, uint64_t offset, const uint8_t *page, struct page_hash h, uint32_t mask)
{
    uint8_t delta[FRAME_DELTA_HEAD + DELTA_BLOCKS_MAX * FRAME_DELTA_BLOCK];
    if (!mask || __builtin_popcount(mask) > DELTA_BLOCKS_MAX)
        return false;
    put_u64(delta, h.hi);
    put_u64(delta + 8, h.lo);
    put_u32(delta + 16, mask);
    uint32_t len = FRAME_DELTA_HEAD;
    for (; mask; mask &= mask - 1, len += FRAME_DELTA_BLOCK)
        memcpy(delta + len, page + (size_t)__builtin_ctz(mask) * FRAME_DELTA_BLOCK, FRAME_DELTA_BLOCK);
    encoder_add(b, &(struct frame_extent){.offset = offset, .len = PAGE, .kind = FRAME_PAGES_DELTA}, delta, len);
    return true;
}

/* A page that stood elsewhere in the region. */
static bool encoder_copy(struct encoder *b, uint64_t offset, struct page_hash h)
{
    struct part *p = b->part;
    uint64_t source;
    uint8_t copy[FRAME_COPY_BYTES];
    if (!p->movable)
        return false;
    if (!p->moves && !p->published.lost)
        p->moves = moves_new(&p->body->published, p->from_size / PAGE, &p->published);
    p->movable = p->moves;
    if (!p->moves || !moves_find(p->moves, h, &source))
        return false;
    put_u64(copy, source * PAGE);
    put_u64(copy + 8, h.hi);
    put_u64(copy + 16, h.lo);
    encoder_add(b, &(struct frame_extent){.offset = offset, .len = PAGE, .kind = FRAME_PAGES_COPY}, copy, sizeof copy);
    return true;
}

/* A delta's base is what the epoch before left: so not for a page that was nothing then, and not in an epoch's later
 * pass, where the page may have been sent already. */
void encode_page(struct encoder *b, uint64_t offset, const uint8_t *data, struct page_hash h)
{
    struct hashes *published = &b->part->body->published;
    uint64_t page = offset / PAGE, left = b->part->size - offset;
    struct page_hash old = hashes_get(published, page);
    bool zeros = !h.lo && !h.hi, based = (old.lo || old.hi) && !page_hash_same(old, HASH_UNKNOWN);
    uint32_t mask = 0;
    b->c->pages++;
    if (left >= PAGE && !zeros)
        mask = hashes_blocks(published, page, data);
    else
        hashes_forget_blocks(published, page);
    bool sent = based && b->c->pass == 1 && !b->part->plain && encoder_delta(b, offset, data, h, mask);
    if (!sent && left >= PAGE && !zeros)
        sent = encoder_copy(b, offset, h); /* before this page's hash is this epoch's */
    if (b->part->movable && !b->part->moves)
        extents_add(&b->part->published, offset, offset + PAGE);
    hashes_set(published, page, h);
    if (!sent)
        encoder_page(b, offset, left < PAGE ? (uint32_t)left : PAGE, data, zeros);
}
