/* Every message of the agents' protocol, from arbitrary bytes: the first byte is a frame's type, the rest its payload.
 * What is taken must be the one form of what it says (put gives the same bytes again), and of PAGES every extent, run
 * and reference must lie within the payload. */
#include "tests/fuzz/fuzz.h"
#include "wire/frame.h"

#include <lz4.h>

static union {
    struct frame_hello hello;
    struct frame_attach attach;
    struct frame_attached attached;
    struct frame_begin begin;
    struct frame_op op;
    struct frame_region region;
    struct frame_failed failed;
    struct frame_entry entry;
    struct frame_hash hash;
} m;
static uint8_t again[FRAME_PAYLOAD_MAX];

/* The length of what put makes of what get took; -1 when it was not taken. */
#define THERE_AND_BACK(what)                                                                                           \
    (frame_##what##_get(p, len, &m.what) ? -1 : (int64_t)frame_##what##_put(again, sizeof again, &m.what))

static int64_t entry(const uint8_t *p, size_t len)
{
    uint32_t request;
    return frame_entry_get(p, len, &request, &m.entry)
               ? -1
               : (int64_t)frame_entry_put(again, sizeof again, request, &m.entry);
}

static int64_t pinned(const uint8_t *p, size_t len)
{
    uint32_t request, pin;
    return frame_pinned_get(p, len, &request, &pin, &m.entry)
               ? -1
               : (int64_t)frame_pinned_put(again, sizeof again, request, pin, &m.entry);
}

static void within(const uint8_t *p, size_t len, const uint8_t *at, size_t n)
{
    MUST(at >= p && n <= len && (size_t)(at - p) <= len - n, "%zu bytes at %td of %zu", n, at - p, len);
}

static size_t delta(const uint8_t *p, size_t len, const struct frame_extent *e)
{
    struct frame_delta d = frame_delta_of(e);
    struct frame_extent run;
    size_t sum = 0;
    uint64_t last = e->offset;
    within(p, len, d.hash, 16);
    MUST(d.mask && e->len == FRAME_PAGE && !(e->offset % FRAME_PAGE), "a delta of no blocks, or of no page");
    for (uint32_t at = 0; frame_delta_run(e, &at, &run);) {
        within(p, len, run.data, run.len);
        MUST(run.kind == FRAME_PAGES_DATA && run.len && !(run.len % FRAME_DELTA_BLOCK), "a run of %u bytes", run.len);
        MUST(run.offset >= last && run.offset + run.len <= e->offset + e->len, "a run outside its page");
        MUST(run.data == d.blocks + sum, "a run's bytes are not where those before end");
        last = run.offset + run.len;
        sum += run.len;
    }
    MUST(sum == (size_t)__builtin_popcount(d.mask) * FRAME_DELTA_BLOCK, "runs of %zu bytes for mask %x", sum, d.mask);
    return FRAME_DELTA_HEAD + sum;
}

static size_t copy(const uint8_t *p, size_t len, const struct frame_extent *e)
{
    struct frame_copy c = frame_copy_of(e);
    within(p, len, c.hash, 16);
    MUST(e->len == FRAME_PAGE && !(e->offset % FRAME_PAGE) && !(c.source % FRAME_PAGE),
         "a reference that is not of pages");
    MUST(c.source <= (uint64_t)INT64_MAX - FRAME_PAGE, "a reference beyond any region");
    return FRAME_COPY_BYTES;
}

static int64_t pages(const uint8_t *p, size_t len)
{
    struct frame_pages all;
    static struct frame_extent e[FRAME_PAGES_ENTRIES];
    uint32_t n = 0;
    size_t data = 0;
    if (frame_pages_get(p, len, &all))
        return -1;
    uint32_t handle = all.handle, count = all.count;
    for (; n < FRAME_PAGES_ENTRIES && frame_pages_next(&all, &e[n]); n++) {
        MUST(e[n].len && e[n].offset <= (uint64_t)INT64_MAX - e[n].len, "an extent without end");
        if (e[n].kind == FRAME_PAGES_ZEROS) {
            MUST(!e[n].data, "zeros with bytes");
            continue;
        }
        size_t bytes = e[n].kind == FRAME_PAGES_DATA    ? e[n].len
                       : e[n].kind == FRAME_PAGES_DELTA ? delta(p, len, &e[n])
                                                        : copy(p, len, &e[n]);
        within(p, len, e[n].data, bytes);
        MUST(e[n].data == p + FRAME_PAGES_HEAD + (size_t)count * FRAME_PAGES_ENTRY + data, "bytes out of their order");
        data += bytes;
    }
    MUST(n == count && data <= FRAME_DATA_MAX, "%u extents of %u, %zu bytes", n, count, data);
    size_t head = frame_pages_put(again, sizeof again, handle, e, count);
    MUST(head + data == len, "%zu and %zu bytes of %zu", head, data, len);
    memcpy(again + head, p + head, data);
    return (int64_t)len;
}

/* Unpacked by the rule of the protocol, and then a PAGES payload like any other. */
static void packed(const uint8_t *p, size_t len)
{
    uint32_t length = frame_packed_length(p, len);
    MUST(length <= FRAME_PAYLOAD_MAX && (!length || len > FRAME_PACKED_HEAD), "%u bytes packed in %zu", length, len);
    if (!length)
        return;
    uint8_t *to = malloc(length);
    int n = LZ4_decompress_safe((const char *)p + FRAME_PACKED_HEAD, (char *)to, (int)(len - FRAME_PACKED_HEAD),
                                (int)length);
    if (n == (int)length)
        pages(to, length);
    free(to);
}

static int64_t extents(const uint8_t *p, size_t len)
{
    struct frame_extents e;
    if (frame_extents_get(p, len, &e))
        return -1;
    frame_extents_head(again, e.request, e.all, e.count);
    for (uint64_t i = 0, behind = 0, from, to; i < e.count; i++, behind = to) {
        frame_extent(&e, (uint32_t)i, &from, &to);
        MUST(behind <= from && from < to, "stretch %llu to %llu", (unsigned long long)from, (unsigned long long)to);
        put_u64(again + FRAME_EXTENTS_HEAD + 16 * i, from);
        put_u64(again + FRAME_EXTENTS_HEAD + 16 * i + 8, to - from);
    }
    return FRAME_EXTENTS_HEAD + 16 * (int64_t)e.count;
}

static int64_t message(uint8_t type, const uint8_t *p, size_t len)
{
    switch (type) {
    case FRAME_HELLO:
        return THERE_AND_BACK(hello);
    case FRAME_ERROR:
    case FRAME_FAILED:
        return THERE_AND_BACK(failed);
    case FRAME_ATTACH:
        return THERE_AND_BACK(attach);
    case FRAME_ATTACHED:
        return THERE_AND_BACK(attached);
    case FRAME_BEGIN:
        return THERE_AND_BACK(begin);
    case FRAME_OP:
        return THERE_AND_BACK(op);
    case FRAME_REGION:
        return THERE_AND_BACK(region);
    case FRAME_PAGES:
        return pages(p, len);
    case FRAME_ENTRY:
        return entry(p, len);
    case FRAME_PINNED:
        return pinned(p, len);
    case FRAME_HASH:
        return THERE_AND_BACK(hash);
    case FRAME_EXTENTS:
        return extents(p, len);
    case FRAME_PACKED:
        packed(p, len);
        return -1;
    default:
        return -1;
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (!size || size > FRAME_PAYLOAD_MAX)
        return 0;
    uint8_t type = data[0];
    const uint8_t *p = data + 1;
    size_t len = size - 1;
    int64_t back = message(type, p, len);
    bool more = type == FRAME_HELLO && m.hello.version != FRAME_VERSION; /* a later version may say more */
    if (back >= 0 && !more)
        MUST((size_t)back <= len && (back == (int64_t)len || type == FRAME_HELLO) && !memcmp(again, p, (size_t)back),
             "type %u: %lld bytes of %zu come back, or others", type, (long long)back, len);
    return 0;
}
