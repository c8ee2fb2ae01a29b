#include "tests/fuzz/model.h"

#include <lz4.h>
#include <xxhash.h>

struct applying {
    struct model *m;
    struct model_region before[MODEL_NAMES];
    bool created[MODEL_NAMES], stated[MODEL_NAMES];
    uint64_t min_size[MODEL_NAMES], size[MODEL_NAMES], epoch[MODEL_NAMES];
    uint8_t touched[MODEL_NAMES][MODEL_PAGES];
    uint64_t rests[MODEL_NAMES]; /* pages that are deltas or references */
    const char *why;
};

void model_note(struct model_epoch *e, uint8_t type, const void *payload, size_t len)
{
    if (e->n == MODEL_FRAMES) {
        e->too_long = true;
        return;
    }
    struct model_frame *f = &e->frame[e->n++];
    *f = (struct model_frame){.type = type, .len = len, .payload = malloc(len ? len : 1)};
    memcpy(f->payload, payload, len);
}

void model_drop(struct model_epoch *e)
{
    for (size_t i = 0; i < e->n; i++)
        free(e->frame[i].payload);
    *e = (struct model_epoch){0};
}

void model_page_hash(uint8_t to[16], const uint8_t page[FRAME_PAGE])
{
    XXH128_canonical_t sum;
    XXH128_canonicalFromHash(&sum, XXH3_128bits(page, FRAME_PAGE));
    memcpy(to, &sum, 16);
}

/* Sets [offset, offset + len) as far as the model goes; NULL: zeros. */
static void put(struct model_region *r, uint64_t offset, uint64_t len, const uint8_t *from)
{
    if (offset >= MODEL_BYTES)
        return;
    if (len > MODEL_BYTES - offset)
        len = MODEL_BYTES - offset;
    if (from)
        memcpy(r->bytes + offset, from, len);
    else
        memset(r->bytes + offset, 0, len);
}

static void cut(struct model_region *r, uint64_t size)
{
    if (size < r->size) {
        put(r, size, UINT64_MAX - size, NULL);
        r->size = size;
    }
}

static void op(struct applying *a, const struct model_frame *f)
{
    struct frame_op o;
    if (frame_op_get(f->payload, f->len, &o)) {
        a->why = "a malformed OP";
        return;
    }
    if (o.handle >= MODEL_NAMES || o.kind == FRAME_OP_RENAME) {
        a->m->lost = true;
        return;
    }
    struct model_region *r = &a->m->region[o.handle];
    a->m->lost |= a->stated[o.handle]; /* the OP of a region comes before its REGION */
    *r = (struct model_region){.exists = o.kind == FRAME_OP_CREATE};
    a->before[o.handle] = *r;
    a->created[o.handle] = r->exists;
    a->stated[o.handle] = false;
}

static void region(struct applying *a, const struct model_frame *f)
{
    struct frame_region g;
    if (frame_region_get(f->payload, f->len, &g)) {
        a->why = "a malformed REGION";
        return;
    }
    uint32_t i = g.handle;
    if (i >= MODEL_NAMES)
        return;
    if (!a->m->region[i].exists)
        a->why = "a REGION of nothing";
    if (g.base != a->before[i].epoch || g.epoch <= g.base)
        a->why = "a REGION that does not continue what is there";
    if (!a->stated[i] || g.min_size < a->min_size[i])
        a->min_size[i] = g.min_size;
    a->stated[i] = true;
    a->size[i] = g.size;
    a->epoch[i] = g.epoch;
}

/* A page that is to come out as a hash says, from what the epoch before left. */
static void resting(struct applying *a, uint32_t i, const struct frame_extent *e)
{
    uint64_t page = e->offset / FRAME_PAGE;
    uint8_t bytes[FRAME_PAGE] = {0}, sum[16];
    const uint8_t *hash;
    const struct model_region *before = &a->before[i];
    if (a->created[i])
        a->why = "a page rests on a region that this epoch creates";
    if (a->min_size[i] < before->size && (e->kind == FRAME_PAGES_COPY || a->min_size[i] < e->offset + e->len))
        a->why = "a page rests on what this epoch cuts";
    if (page >= MODEL_PAGES)
        return;
    a->rests[i] |= 1ull << page;
    if (e->kind == FRAME_PAGES_DELTA) {
        struct frame_extent run;
        hash = frame_delta_of(e).hash;
        memcpy(bytes, before->bytes + e->offset, FRAME_PAGE);
        for (uint32_t at = 0; frame_delta_run(e, &at, &run);)
            memcpy(bytes + (run.offset - e->offset), run.data, run.len);
    } else {
        struct frame_copy c = frame_copy_of(e);
        hash = c.hash;
        if (c.source >= MODEL_BYTES || before->open >> c.source / FRAME_PAGE & 1) {
            a->m->region[i].open |= 1ull << page;
            return;
        }
        memcpy(bytes, before->bytes + c.source, FRAME_PAGE);
    }
    model_page_hash(sum, bytes);
    if (memcmp(sum, hash, 16) && !(before->open >> page & 1))
        a->why = "a page does not come out as it should";
    put(&a->m->region[i], e->offset, FRAME_PAGE, bytes);
}

static void pages(struct applying *a, const uint8_t *payload, size_t len)
{
    struct frame_pages all;
    if (frame_pages_get(payload, len, &all)) {
        a->why = "malformed PAGES";
        return;
    }
    uint32_t i = all.handle;
    if (i >= MODEL_NAMES)
        return;
    if (!a->stated[i])
        a->why = "PAGES before their REGION";
    for (struct frame_extent e; frame_pages_next(&all, &e);) {
        uint64_t last = (e.offset + e.len - 1) / FRAME_PAGE;
        for (uint64_t p = e.offset / FRAME_PAGE; p <= last && p < MODEL_PAGES; p++)
            a->touched[i][p] += a->touched[i][p] < 2;
        if (e.kind == FRAME_PAGES_DELTA || e.kind == FRAME_PAGES_COPY)
            resting(a, i, &e);
        else
            put(&a->m->region[i], e.offset, e.len, e.data);
    }
}

static void packed(struct applying *a, const struct model_frame *f)
{
    uint32_t length = frame_packed_length(f->payload, f->len);
    uint8_t *to = length ? malloc(length) : NULL;
    int n = to ? LZ4_decompress_safe((const char *)f->payload + FRAME_PACKED_HEAD, (char *)to,
                                     (int)(f->len - FRAME_PACKED_HEAD), (int)length)
               : -1;
    if (n > 0 && (uint32_t)n == length)
        pages(a, to, length);
    else
        a->why = "PACKED does not unpack";
    free(to);
}

/* Content of an epoch is laid over what its REGIONs cut, so these are gone through first. */
static void shape(struct applying *a, const struct model_epoch *e)
{
    for (size_t f = 0; f < e->n; f++)
        if (e->frame[f].type == FRAME_OP)
            op(a, &e->frame[f]);
        else if (e->frame[f].type == FRAME_REGION)
            region(a, &e->frame[f]);
    for (uint32_t i = 0; i < MODEL_NAMES; i++)
        if (a->stated[i])
            cut(&a->m->region[i], a->min_size[i]);
    memset(a->stated, 0, sizeof a->stated);
}

bool model_apply(struct model *m, const struct model_epoch *e, const char **why)
{
    static struct applying a;
    a = (struct applying){.m = m};
    m->lost |= e->too_long;
    memcpy(a.before, m->region, sizeof a.before);
    shape(&a, e);
    for (size_t f = 0; f < e->n; f++) {
        const struct model_frame *frame = &e->frame[f];
        if (frame->type == FRAME_PAGES)
            pages(&a, frame->payload, frame->len);
        else if (frame->type == FRAME_PACKED)
            packed(&a, frame);
        else if (frame->type == FRAME_REGION)
            region(&a, frame);
    }
    for (uint32_t i = 0; i < MODEL_NAMES; i++) {
        struct model_region *r = &m->region[i];
        if (a.created[i] && !a.stated[i])
            a.why = "CREATE without REGION";
        if (!a.stated[i])
            continue;
        r->epoch = a.epoch[i];
        cut(r, a.size[i]);
        r->size = a.size[i];
        put(r, r->size, UINT64_MAX - r->size, NULL);
        for (unsigned p = 0; p < MODEL_PAGES; p++)
            if (a.touched[i][p] > 1 && a.rests[i] >> p & 1)
                r->open |= 1ull << p;
    }
    *why = a.why;
    return !a.why;
}
