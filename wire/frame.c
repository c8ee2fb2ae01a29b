#include "wire/frame.h"
#include "agent/base/xxh3.h"

#include <errno.h>

#define MAGIC 0x4d53u

static const int code_errno[FRAME_E_CODES] = {
    [FRAME_E_PROTOCOL] = -EPROTO, [FRAME_E_VERSION] = -EPROTONOSUPPORT, [FRAME_E_NOSPACE] = -ENOSPC,
    [FRAME_E_IO] = -EIO,          [FRAME_E_FENCED] = -ESTALE,           [FRAME_E_LINEAGE] = -EEXIST,
    [FRAME_E_NAME] = -EINVAL,     [FRAME_E_NOT_FOUND] = -ENOENT,        [FRAME_E_LIMIT] = -ENOBUFS, [FRAME_E_DELTA] = -EBADMSG,
};

int frame_code_errno(uint16_t code)
{
    return code && code < FRAME_E_CODES ? code_errno[code] : -EPROTO;
}

uint16_t frame_code_from(int err)
{
    if (err == -EDQUOT)
        return FRAME_E_NOSPACE;
    for (uint16_t c = 1; c < FRAME_E_CODES; c++)
        if (code_errno[c] == err)
            return c;
    return FRAME_E_IO;
}

uint64_t frame_payload_hash(const void *payload, size_t len)
{
    return XXH3_64bits(payload, len);
}

void frame_header_put(uint8_t *to, uint8_t type, uint32_t stream, uint32_t order, uint32_t len, uint64_t hash)
{
    put_u16(to, MAGIC);
    to[2] = type;
    to[3] = 0;
    put_u32(to + 4, len);
    put_u32(to + 8, stream);
    put_u32(to + 12, order);
    put_u64(to + 16, XXH3_64bits_withSeed(to, 16, hash));
}

int64_t frame_step(const uint8_t *at, size_t have, struct frame_header *h)
{
    if (have < FRAME_HEADER)
        return 0;
    *h = (struct frame_header){.type = at[2], .len = get_u32(at + 4), .stream = get_u32(at + 8), .order = get_u32(at + 12), .checksum = get_u64(at + 16)};
    if (get_u16(at) != MAGIC || !h->type || h->type >= FRAME_TYPES || at[3] || h->len > FRAME_PAYLOAD_MAX || (!h->stream && h->order))
        return -EPROTO;
    if (have - FRAME_HEADER < h->len)
        return 0;
    if (XXH3_64bits_withSeed(at, 16, frame_payload_hash(at + FRAME_HEADER, h->len)) != h->checksum)
        return -EBADMSG;
    return FRAME_HEADER + (int64_t)h->len;
}

static size_t put_end(const struct wr *w)
{
    return w->bad ? 0 : wr_len(w);
}

static int get_end(const struct rd *r)
{
    return r->bad || rd_left(r) ? -EPROTO : 0;
}

size_t frame_hello_put(void *to, size_t cap, const struct frame_hello *h)
{
    struct wr w = wr_over(to, cap);
    wr_u16(&w, h->version);
    wr_copy(&w, h->identity.b, 16);
    wr_str(&w, h->host);
    wr_copy(&w, h->token.b, 16);
    return put_end(&w);
}

/* Of other versions only what has always been there is looked at, so that both can tell the other which version they speak. */
int frame_hello_get(const void *p, size_t len, struct frame_hello *h)
{
    struct rd r = rd_over(p, len);
    h->version = rd_u16(&r);
    rd_copy(&r, h->identity.b, 16);
    rd_str(&r, h->host, sizeof h->host);
    h->token = (struct id){{0}};
    if (h->version == FRAME_VERSION)
        rd_copy(&r, h->token.b, 16);
    return r.bad ? -EPROTO : 0;
}

size_t frame_attach_put(void *to, size_t cap, const struct frame_attach *a)
{
    struct wr w = wr_over(to, cap);
    wr_u32(&w, a->handle);
    wr_u8(&w, a->write);
    wr_str(&w, a->name);
    return put_end(&w);
}

int frame_attach_get(const void *p, size_t len, struct frame_attach *a)
{
    struct rd r = rd_over(p, len);
    a->handle = rd_u32(&r);
    a->write = rd_u8(&r);
    rd_str(&r, a->name, sizeof a->name);
    return a->write > 1 ? -EPROTO : get_end(&r);
}

static void source_put(struct wr *w, const struct source *s)
{
    wr_u64(w, s->ino);
    wr_u64(w, s->btime);
}

static struct source source_get(struct rd *r)
{
    struct source s;
    s.ino = rd_u64(r);
    s.btime = rd_u64(r);
    return s;
}

size_t frame_attached_put(void *to, size_t cap, const struct frame_attached *a)
{
    struct wr w = wr_over(to, cap);
    wr_u32(&w, a->handle);
    wr_u8(&w, a->status);
    wr_copy(&w, a->lineage.b, 16);
    wr_u64(&w, a->epoch);
    wr_u64(&w, a->size);
    wr_u64(&w, a->fence);
    wr_copy(&w, a->writer.b, 16);
    source_put(&w, &a->source);
    wr_str(&w, a->holder);
    return put_end(&w);
}

int frame_attached_get(const void *p, size_t len, struct frame_attached *a)
{
    struct rd r = rd_over(p, len);
    a->handle = rd_u32(&r);
    a->status = rd_u8(&r);
    rd_copy(&r, a->lineage.b, 16);
    a->epoch = rd_u64(&r);
    a->size = rd_u64(&r);
    a->fence = rd_u64(&r);
    rd_copy(&r, a->writer.b, 16);
    a->source = source_get(&r);
    rd_str(&r, a->holder, sizeof a->holder);
    return a->status > FRAME_ATTACH_BAD ? -EPROTO : get_end(&r);
}

size_t frame_op_put(void *to, size_t cap, const struct frame_op *o)
{
    struct wr w = wr_over(to, cap);
    wr_u8(&w, o->kind);
    wr_u32(&w, o->handle);
    wr_u32(&w, o->to);
    wr_copy(&w, o->lineage.b, 16);
    source_put(&w, &o->source);
    return put_end(&w);
}

int frame_op_get(const void *p, size_t len, struct frame_op *o)
{
    struct rd r = rd_over(p, len);
    o->kind = rd_u8(&r);
    o->handle = rd_u32(&r);
    o->to = rd_u32(&r);
    rd_copy(&r, o->lineage.b, 16);
    o->source = source_get(&r);
    if (o->kind < FRAME_OP_CREATE || o->kind > FRAME_OP_UNLINK || (o->kind == FRAME_OP_CREATE && id_none(&o->lineage)))
        return -EPROTO;
    return get_end(&r);
}

size_t frame_begin_put(void *to, size_t cap, const struct frame_begin *b)
{
    struct wr w = wr_over(to, cap);
    wr_u64(&w, b->seq);
    if (!id_none(&b->writer))
        wr_copy(&w, b->writer.b, 16);
    return put_end(&w);
}

int frame_begin_get(const void *p, size_t len, struct frame_begin *b)
{
    struct rd r = rd_over(p, len);
    b->seq = rd_u64(&r);
    b->writer = (struct id){{0}};
    if (!rd_left(&r))
        return get_end(&r);
    rd_copy(&r, b->writer.b, 16);
    return id_none(&b->writer) ? -EPROTO : get_end(&r); /* no writer is said by saying none */
}

size_t frame_region_put(void *to, size_t cap, const struct frame_region *g)
{
    struct wr w = wr_over(to, cap);
    wr_u32(&w, g->handle);
    wr_u64(&w, g->epoch);
    wr_u64(&w, g->base);
    wr_u64(&w, g->fence);
    wr_u64(&w, g->min_size);
    wr_u64(&w, g->size);
    return put_end(&w);
}

int frame_region_get(const void *p, size_t len, struct frame_region *g)
{
    struct rd r = rd_over(p, len);
    g->handle = rd_u32(&r);
    g->epoch = rd_u64(&r);
    g->base = rd_u64(&r);
    g->fence = rd_u64(&r);
    g->min_size = rd_u64(&r);
    g->size = rd_u64(&r);
    return g->size > INT64_MAX || g->epoch <= g->base ? -EPROTO : get_end(&r);
}

int frame_pages_get(const void *p, size_t len, struct frame_pages *pages)
{
    struct rd r = rd_over(p, len);
    pages->handle = rd_u32(&r);
    pages->count = rd_u32(&r);
    if (!pages->count || pages->count > FRAME_PAGES_ENTRIES)
        return -EPROTO;
    const uint8_t *table = rd_take(&r, (size_t)pages->count * FRAME_PAGES_ENTRY);
    if (!table)
        return -EPROTO;
    pages->entries = rd_over(table, (size_t)pages->count * FRAME_PAGES_ENTRY);
    pages->data = r;
    struct frame_pages all = *pages;
    struct frame_extent e;
    for (uint32_t i = 0; i < pages->count; i++)
        if (!frame_pages_next(&all, &e))
            return -EPROTO;
    return rd_left(&all.data) || (size_t)(r.end - r.at) > FRAME_DATA_MAX ? -EPROTO : 0;
}

static const uint8_t *delta_take(struct rd *r)
{
    if (rd_left(r) < FRAME_DELTA_HEAD)
        return NULL;
    uint32_t mask = get_u32(r->at + 16);
    return mask ? rd_take(r, FRAME_DELTA_HEAD + (size_t)__builtin_popcount(mask) * FRAME_DELTA_BLOCK) : NULL;
}

static const uint8_t *copy_take(struct rd *r)
{
    if (rd_left(r) < FRAME_COPY_BYTES)
        return NULL;
    uint64_t source = get_u64(r->at);
    return source % FRAME_PAGE || source > (uint64_t)INT64_MAX - FRAME_PAGE ? NULL : rd_take(r, FRAME_COPY_BYTES);
}

bool frame_pages_next(struct frame_pages *pages, struct frame_extent *e)
{
    if (!rd_left(&pages->entries))
        return false;
    e->offset = rd_u64(&pages->entries);
    e->len = rd_u32(&pages->entries);
    e->kind = rd_u32(&pages->entries);
    e->data = NULL;
    if (!e->len || e->offset > (uint64_t)INT64_MAX - e->len)
        return false;
    switch (e->kind) {
    case FRAME_PAGES_DATA:
        e->data = rd_take(&pages->data, e->len);
        return e->data;
    case FRAME_PAGES_ZEROS:
        return true;
    case FRAME_PAGES_DELTA:
        e->data = e->len == FRAME_PAGE && !(e->offset % FRAME_PAGE) ? delta_take(&pages->data) : NULL;
        return e->data;
    case FRAME_PAGES_COPY:
        e->data = e->len == FRAME_PAGE && !(e->offset % FRAME_PAGE) ? copy_take(&pages->data) : NULL;
        return e->data;
    default:
        return false;
    }
}

struct frame_delta frame_delta_of(const struct frame_extent *e)
{
    return (struct frame_delta){.hash = e->data, .mask = get_u32(e->data + 16), .blocks = e->data + FRAME_DELTA_HEAD};
}

struct frame_copy frame_copy_of(const struct frame_extent *e)
{
    return (struct frame_copy){.source = get_u64(e->data), .hash = e->data + 8};
}

uint32_t frame_packed_length(const void *p, size_t len)
{
    if (len <= FRAME_PACKED_HEAD)
        return 0;
    uint32_t length = get_u32(p);
    return length > FRAME_PAYLOAD_MAX ? 0 : length;
}

bool frame_delta_run(const struct frame_extent *e, uint32_t *at, struct frame_extent *run)
{
    struct frame_delta d = frame_delta_of(e);
    uint32_t from = *at;
    while (from < FRAME_DELTA_BLOCKS && !(d.mask >> from & 1))
        from++;
    if (from >= FRAME_DELTA_BLOCKS)
        return false;
    uint32_t to = from;
    while (to < FRAME_DELTA_BLOCKS && (d.mask >> to & 1))
        to++;
    uint32_t before = (uint32_t)__builtin_popcount(d.mask & ((1u << from) - 1));
    *run = (struct frame_extent){.offset = e->offset + from * FRAME_DELTA_BLOCK,
                                 .len = (to - from) * FRAME_DELTA_BLOCK,
                                 .kind = FRAME_PAGES_DATA,
                                 .data = d.blocks + before * FRAME_DELTA_BLOCK};
    *at = to;
    return true;
}

size_t frame_pages_put(void *to, size_t cap, uint32_t handle, const struct frame_extent *e, uint32_t count)
{
    struct wr w = wr_over(to, cap);
    wr_u32(&w, handle);
    wr_u32(&w, count);
    for (uint32_t i = 0; i < count; i++) {
        wr_u64(&w, e[i].offset);
        wr_u32(&w, e[i].len);
        wr_u32(&w, e[i].kind);
    }
    return put_end(&w);
}

size_t frame_failed_put(void *to, size_t cap, const struct frame_failed *f)
{
    struct wr w = wr_over(to, cap);
    wr_u64(&w, f->seq);
    wr_u16(&w, f->code);
    wr_str(&w, f->text);
    return put_end(&w);
}

int frame_failed_get(const void *p, size_t len, struct frame_failed *f)
{
    struct rd r = rd_over(p, len);
    f->seq = rd_u64(&r);
    f->code = rd_u16(&r);
    rd_str(&r, f->text, sizeof f->text);
    return get_end(&r);
}

static void entry_put(struct wr *w, const struct frame_entry *e)
{
    wr_copy(w, e->lineage.b, 16);
    wr_copy(w, e->writer.b, 16);
    wr_u64(w, e->epoch);
    wr_u64(w, e->size);
    wr_u64(w, (uint64_t)e->committed_at);
    wr_u8(w, e->leased);
    wr_str(w, e->name);
    wr_str(w, e->holder);
}

static void entry_get(struct rd *r, struct frame_entry *e)
{
    rd_copy(r, e->lineage.b, 16);
    rd_copy(r, e->writer.b, 16);
    e->epoch = rd_u64(r);
    e->size = rd_u64(r);
    e->committed_at = (int64_t)rd_u64(r);
    e->leased = rd_u8(r);
    rd_str(r, e->name, sizeof e->name);
    rd_str(r, e->holder, sizeof e->holder);
}

size_t frame_entry_put(void *to, size_t cap, uint32_t request, const struct frame_entry *e)
{
    struct wr w = wr_over(to, cap);
    wr_u32(&w, request);
    entry_put(&w, e);
    return put_end(&w);
}

int frame_entry_get(const void *p, size_t len, uint32_t *request, struct frame_entry *e)
{
    struct rd r = rd_over(p, len);
    *request = rd_u32(&r);
    entry_get(&r, e);
    return get_end(&r);
}

size_t frame_pinned_put(void *to, size_t cap, uint32_t request, uint32_t pin, const struct frame_entry *e)
{
    struct wr w = wr_over(to, cap);
    wr_u32(&w, request);
    wr_u32(&w, pin);
    entry_put(&w, e);
    return put_end(&w);
}

int frame_pinned_get(const void *p, size_t len, uint32_t *request, uint32_t *pin, struct frame_entry *e)
{
    struct rd r = rd_over(p, len);
    *request = rd_u32(&r);
    *pin = rd_u32(&r);
    entry_get(&r, e);
    return get_end(&r);
}

void frame_extents_head(uint8_t *to, uint32_t request, uint8_t all, uint32_t count)
{
    put_u32(to, request);
    to[4] = all;
    put_u32(to + 5, count);
}

void frame_extent(const struct frame_extents *e, uint32_t i, uint64_t *from, uint64_t *to)
{
    *from = get_u64(e->at + 16 * (size_t)i);
    *to = *from + get_u64(e->at + 16 * (size_t)i + 8);
}

int frame_extents_get(const void *p, size_t len, struct frame_extents *e)
{
    const uint8_t *bytes = p;
    if (len < FRAME_EXTENTS_HEAD)
        return -EPROTO;
    *e = (struct frame_extents){.request = get_u32(bytes), .all = bytes[4], .count = get_u32(bytes + 5)};
    e->at = bytes + FRAME_EXTENTS_HEAD;
    if (e->all > 1 || e->count > FRAME_EXTENTS_MAX || (e->all && e->count) ||
        len != FRAME_EXTENTS_HEAD + 16 * (size_t)e->count)
        return -EPROTO;
    const uint64_t most = (uint64_t)INT64_MAX / FRAME_PAGE + 1;
    for (uint64_t i = 0, behind = 0; i < e->count; i++) {
        uint64_t page = get_u64(e->at + 16 * i), pages = get_u64(e->at + 16 * i + 8);
        if (page < behind || !pages || page > most || pages > most - page)
            return -EPROTO;
        behind = page + pages;
    }
    return 0;
}

size_t frame_hash_put(void *to, size_t cap, const struct frame_hash *h)
{
    struct wr w = wr_over(to, cap);
    wr_u32(&w, h->request);
    wr_u32(&w, h->pin);
    wr_u64(&w, h->first);
    wr_u32(&w, h->count);
    wr_u8(&w, h->level);
    wr_u8(&w, h->fresh);
    return put_end(&w);
}

int frame_hash_get(const void *p, size_t len, struct frame_hash *h)
{
    struct rd r = rd_over(p, len);
    h->request = rd_u32(&r);
    h->pin = rd_u32(&r);
    h->first = rd_u64(&r);
    h->count = rd_u32(&r);
    h->level = rd_u8(&r);
    h->fresh = rd_u8(&r);
    if (h->level >= FRAME_HASH_LEVELS || h->fresh > 1)
        return -EPROTO;
    if (!h->count || h->count > FRAME_HASHES_MAX || h->first > (uint64_t)INT64_MAX / FRAME_PAGE)
        return -EPROTO;
    return get_end(&r);
}

size_t frame_pin_put(void *to, size_t cap, const struct frame_pin *p)
{
    struct wr w = wr_over(to, cap);
    wr_u32(&w, p->request);
    wr_str(&w, p->name);
    if (p->keep) {
        wr_u64(&w, p->epoch);
        wr_copy(&w, p->lineage.b, sizeof p->lineage.b);
        wr_u32(&w, p->head);
        wr_u8(&w, p->live);
    }
    return put_end(&w);
}

int frame_pin_get(const void *p, size_t len, struct frame_pin *pin)
{
    struct rd r = rd_over(p, len);
    pin->request = rd_u32(&r);
    rd_str(&r, pin->name, sizeof pin->name);
    pin->keep = rd_left(&r) != 0;
    pin->epoch = 0;
    pin->lineage = (struct id){{0}};
    pin->head = 0;
    pin->live = 0;
    if (pin->keep) {
        pin->epoch = rd_u64(&r);
        rd_copy(&r, pin->lineage.b, sizeof pin->lineage.b);
        pin->head = rd_u32(&r);
        pin->live = rd_u8(&r);
    }
    return pin->head <= FRAME_READ_MAX && pin->live <= 1 ? get_end(&r) : -EPROTO;
}

size_t frame_read_put(void *to, size_t cap, const struct frame_read *f)
{
    struct wr w = wr_over(to, cap);
    wr_u32(&w, f->request);
    wr_u32(&w, f->pin);
    wr_u64(&w, f->offset);
    wr_u32(&w, f->len);
    if (f->bulk != FRAME_READ_PLAIN)
        wr_u8(&w, f->bulk);
    return put_end(&w);
}

int frame_read_get(const void *p, size_t len, struct frame_read *f)
{
    struct rd r = rd_over(p, len);
    f->request = rd_u32(&r);
    f->pin = rd_u32(&r);
    f->offset = rd_u64(&r);
    f->len = rd_u32(&r);
    bool plain = !rd_left(&r);
    f->bulk = plain ? FRAME_READ_PLAIN : rd_u8(&r);
    return plain || f->bulk <= FRAME_READ_BULK ? get_end(&r) : -EPROTO;
}

void frame_data_head(uint8_t *to, uint32_t request, uint8_t kind, uint32_t len)
{
    put_u32(to, request);
    to[4] = kind;
    put_u32(to + 5, len);
}

int frame_data_get(const void *p, size_t len, struct frame_data *d)
{
    struct rd r = rd_over(p, len);
    d->request = rd_u32(&r);
    d->kind = rd_u8(&r);
    d->len = rd_u32(&r);
    bool zeros = d->kind & FRAME_DATA_ZEROS;
    d->data = zeros ? NULL : rd_take(&r, d->len);
    if (d->kind > (FRAME_DATA_ZEROS | FRAME_DATA_MORE) || d->len > (zeros ? FRAME_READ_MAX : FRAME_DATA_MAX))
        return -EPROTO;
    return get_end(&r);
}
