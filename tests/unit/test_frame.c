/* The codec of the protocol between agents: what is written is read, and nothing else is. */
#include "tests/unit/codec.h"
#include "wire/frame.h"

#include <xxhash.h>

static uint8_t frame[FRAME_HEADER + FRAME_PAYLOAD_MAX + 16];

static void id_fill(struct id *id, uint8_t from)
{
    for (size_t i = 0; i < sizeof id->b; i++)
        id->b[i] = (uint8_t)(from + i);
}

static void hello_fill(void *m)
{
    struct frame_hello *h = m;
    h->version = FRAME_VERSION;
    id_fill(&h->identity, 1);
    strcpy(h->host, "hosta");
    id_fill(&h->token, 2);
}

static void attach_fill(void *m)
{
    *(struct frame_attach *)m = (struct frame_attach){.handle = 0x01020304, .write = 1, .name = "data/x.mdb"};
}

static void attached_fill(void *m)
{
    struct frame_attached *a = m;
    *a = (struct frame_attached){.handle = 9,
                                 .status = FRAME_ATTACH_HELD,
                                 .epoch = 0x1122334455667788,
                                 .size = 1 << 30,
                                 .fence = 77,
                                 .source = {.ino = 123456789012, .btime = 1700000000000000000},
                                 .holder = "hostb, since a while"};
    id_fill(&a->lineage, 0x20);
    id_fill(&a->writer, 0x40);
}

static void op_fill(void *m)
{
    struct frame_op *o = m;
    *o = (struct frame_op){.kind = FRAME_OP_CREATE, .handle = 3, .to = 4, .source = {.ino = 5, .btime = 6}};
    id_fill(&o->lineage, 0x60);
}

static void region_fill(void *m)
{
    *(struct frame_region *)m =
        (struct frame_region){.handle = 8, .epoch = 9, .base = 7, .fence = 10, .min_size = 11, .size = 12};
}

static void begin_fill(void *m)
{
    *(struct frame_begin *)m = (struct frame_begin){.seq = 1ull << 62};
}

static void failed_fill(void *m)
{
    *(struct frame_failed *)m = (struct frame_failed){.seq = 1ull << 63, .code = FRAME_E_NOSPACE, .text = "disk full"};
}

static void entry_fill(void *m)
{
    struct frame_entry *e = m;
    *e = (struct frame_entry){.epoch = 3, .size = 4, .committed_at = -5, .leased = 1, .name = "a/b", .holder = "hostc"};
    id_fill(&e->lineage, 0x80);
    id_fill(&e->writer, 0x90);
}

static void pin_fill(void *m)
{
    struct frame_pin *p = m;
    *p = (struct frame_pin){.request = 3, .keep = 1, .epoch = 1ULL << 40, .head = FRAME_READ_MAX, .live = 1, .name = "data/x.mdb"};
    id_fill(&p->lineage, 0xa0);
}

static void read_fill(void *m)
{
    *(struct frame_read *)m = (struct frame_read){
        .request = 4, .pin = 5, .offset = 1ULL << 41, .len = FRAME_READ_MAX, .bulk = FRAME_READ_BULK};
}

static void hash_fill(void *m)
{
    *(struct frame_hash *)m =
        (struct frame_hash){.request = 5, .pin = 6, .first = 7, .count = FRAME_HASHES_MAX, .level = 3, .fresh = 1};
}

static size_t hello_put(void *to, size_t cap, const void *m)
{
    return frame_hello_put(to, cap, m);
}

/* Of another version only the beginning is looked at. */
static int hello_get(const void *p, size_t len, void *m)
{
    int rc = frame_hello_get(p, len, m);
    return !rc && ((struct frame_hello *)m)->version != FRAME_VERSION ? -EPROTO : rc;
}

CODEC_PLAIN(frame, attach)
CODEC_PLAIN(frame, attached)
CODEC_PLAIN(frame, op)
CODEC_PLAIN(frame, begin)
CODEC_PLAIN(frame, region)
CODEC_PLAIN(frame, failed)
CODEC_PLAIN(frame, hash)

/* These two have numbers beside the struct. */
static uint32_t last_request, last_pin;

static size_t entry_put(void *to, size_t cap, const void *m)
{
    return frame_entry_put(to, cap, last_request, m);
}

static int entry_get(const void *p, size_t len, void *m)
{
    return frame_entry_get(p, len, &last_request, m);
}

static size_t pinned_put(void *to, size_t cap, const void *m)
{
    return frame_pinned_put(to, cap, last_request, last_pin, m);
}

static int pinned_get(const void *p, size_t len, void *m)
{
    return frame_pinned_get(p, len, &last_request, &last_pin, m);
}

static const struct codec codecs[] = {
    {"hello", hello_fill, hello_put, hello_get, sizeof(struct frame_hello), true},
    CODEC(frame, attach),
    CODEC(frame, attached),
    CODEC(frame, op),
    CODEC(frame, begin),
    CODEC(frame, region),
    CODEC(frame, failed),
    CODEC(frame, hash),
    CODEC(frame, entry),
    {"pinned", entry_fill, pinned_put, pinned_get, sizeof(struct frame_entry), false},
};
#define CODECS (sizeof codecs / sizeof *codecs)

/* As asked by who does not wait for it, and has no epoch in mind; and nothing between the two forms. */
static void test_short_requests(void **state)
{
    (void)state;
    static struct frame_pin p, q;
    uint8_t bytes[NAME_CAP + 64];
    memset(&q, 0, sizeof q);
    pin_fill(&p);
    size_t whole = frame_pin_put(bytes, sizeof bytes, &p);
    assert_int_equal(frame_pin_get(bytes, whole, &q), 0);
    assert_memory_equal(&p, &q, sizeof p);
    p.keep = 0;
    size_t plain = frame_pin_put(bytes, sizeof bytes, &p);
    assert_int_equal(plain + 8 + 16 + 4 + 1, whole);
    for (size_t n = 0; n < whole; n++)
        assert_int_equal(frame_pin_get(bytes, n, &q), n == plain ? 0 : -EPROTO);
    assert_int_equal(frame_pin_get(bytes, plain, &q), 0);
    assert_true(!q.keep && !q.epoch && !q.head && !q.live && id_none(&q.lineage));
    p.keep = 1;
    p.live = 2;
    assert_int_equal(frame_pin_get(bytes, frame_pin_put(bytes, sizeof bytes, &p), &q), -EPROTO);
    p.live = 1;
    p.head = FRAME_READ_MAX + 1;
    assert_int_equal(frame_pin_get(bytes, frame_pin_put(bytes, sizeof bytes, &p), &q), -EPROTO);

    struct frame_read r, back;
    read_fill(&r);
    assert_int_equal(frame_read_put(bytes, sizeof bytes, &r), 21);
    assert_int_equal(frame_read_get(bytes, 21, &back), 0);
    assert_memory_equal(&r, &back, 21);
    r.bulk = FRAME_READ_PLAIN;
    assert_int_equal(frame_read_put(bytes, sizeof bytes, &r), 20);
    assert_int_equal(frame_read_get(bytes, 20, &back), 0);
    assert_int_equal(back.bulk, FRAME_READ_PLAIN);
    for (unsigned bulk = 0; bulk < 256; bulk++) {
        bytes[20] = (uint8_t)bulk;
        assert_int_equal(frame_read_get(bytes, 21, &back), bulk <= FRAME_READ_BULK ? 0 : -EPROTO);
    }
}

static int data_with(uint8_t kind, uint32_t len, size_t bytes)
{
    static uint8_t payload[FRAME_PAYLOAD_MAX + 16];
    struct frame_data d;
    frame_data_head(payload, 7, kind, len);
    uint8_t *copy = exact(payload, FRAME_DATA_HEAD + bytes);
    int rc = frame_data_get(copy, FRAME_DATA_HEAD + bytes, &d);
    if (!rc)
        assert_true(d.request == 7 && d.len == len && d.kind == kind &&
                    d.data == (kind & FRAME_DATA_ZEROS ? NULL : copy + FRAME_DATA_HEAD));
    free(copy);
    return rc;
}

static void test_data(void **state)
{
    (void)state;
    assert_int_equal(data_with(0, 0, 0), 0);
    assert_int_equal(data_with(FRAME_DATA_MORE, FRAME_DATA_MAX, FRAME_DATA_MAX), 0);
    assert_int_equal(data_with(0, FRAME_DATA_MAX + 1, FRAME_DATA_MAX + 1), -EPROTO);
    assert_int_equal(data_with(0, 5, 4), -EPROTO);
    assert_int_equal(data_with(0, 5, 6), -EPROTO);
    assert_int_equal(data_with(FRAME_DATA_ZEROS, FRAME_READ_MAX, 0), 0);
    assert_int_equal(data_with(FRAME_DATA_ZEROS | FRAME_DATA_MORE, 1, 0), 0);
    assert_int_equal(data_with(FRAME_DATA_ZEROS, FRAME_READ_MAX + 1, 0), -EPROTO);
    assert_int_equal(data_with(FRAME_DATA_ZEROS, 1, 1), -EPROTO);
    assert_int_equal(data_with(4, 0, 0), -EPROTO);
}

static void test_round_trips(void **state)
{
    (void)state;
    last_request = 0xdeadbeef;
    last_pin = 0xfeedface;
    for (size_t i = 0; i < CODECS; i++)
        codec_round_trip(&codecs[i]);
}

static void test_damage(void **state)
{
    (void)state;
    for (size_t i = 0; i < CODECS; i++)
        codec_damage(&codecs[i], 7 + (uint32_t)i, 20000);
}

/* The bytes themselves, once, so that both halves of a codec cannot be wrong alike. */
static void test_bytes(void **state)
{
    (void)state;
    static const uint8_t expected[] = {0, 0, 0, 8, 0, 0,  0, 0, 0, 0, 0, 9, 0, 0,  0, 0, 0, 0, 0, 7, 0, 0,
                                       0, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0, 0, 0, 11, 0, 0, 0, 0, 0, 0, 0, 12};
    struct frame_region r;
    region_fill(&r);
    uint8_t bytes[64];
    assert_int_equal(frame_region_put(bytes, sizeof bytes, &r), sizeof expected);
    assert_memory_equal(bytes, expected, sizeof expected);

    frame_header_put(frame, FRAME_LIST, 3, 258, 8, frame_payload_hash("12345678", 8));
    static const uint8_t header[] = {0x4d, 0x53, FRAME_LIST, 0, 0, 0, 0, 8, 0, 0, 0, 3, 0, 0, 1, 2};
    assert_memory_equal(frame, header, sizeof header);
}

static void refused_region(struct frame_region r)
{
    uint8_t bytes[64];
    size_t n = frame_region_put(bytes, sizeof bytes, &r);
    assert_int_equal(frame_region_get(bytes, n, &r), -EPROTO);
}

static void test_values(void **state)
{
    (void)state;
    uint8_t bytes[8192];
    struct frame_region r;
    region_fill(&r);
    r.min_size = UINT64_MAX;
    r.size = INT64_MAX;
    size_t n = frame_region_put(bytes, sizeof bytes, &r);
    assert_int_equal(frame_region_get(bytes, n, &r), 0);
    refused_region((struct frame_region){.epoch = 1, .size = (uint64_t)INT64_MAX + 1});
    refused_region((struct frame_region){.epoch = 0});
    refused_region((struct frame_region){.epoch = 5, .base = 5});

    struct frame_begin b = {.seq = 3}, is;
    id_fill(&b.writer, 9);
    n = frame_begin_put(bytes, sizeof bytes, &b);
    assert_int_equal(n, 24);
    assert_int_equal(frame_begin_get(bytes, n, &is), 0);
    assert_memory_equal(&is, &b, sizeof b);
    assert_int_equal(frame_begin_get(bytes, 23, &is), -EPROTO);
    memset(bytes + 8, 0, 16); /* a writer that is none is said by not saying it */
    assert_int_equal(frame_begin_get(bytes, 24, &is), -EPROTO);

    struct frame_op o;
    for (unsigned kind = 0; kind < 256; kind++) {
        op_fill(&o);
        o.kind = (uint8_t)kind;
        n = frame_op_put(bytes, sizeof bytes, &o);
        bool good = kind >= FRAME_OP_CREATE && kind <= FRAME_OP_UNLINK;
        assert_int_equal(frame_op_get(bytes, n, &o), good ? 0 : -EPROTO);
        memset(&o.lineage, 0, sizeof o.lineage);
        n = frame_op_put(bytes, sizeof bytes, &o);
        assert_int_equal(frame_op_get(bytes, n, &o), good && kind != FRAME_OP_CREATE ? 0 : -EPROTO);
    }

    struct frame_hash h = {.count = 0};
    n = frame_hash_put(bytes, sizeof bytes, &h);
    assert_int_equal(frame_hash_get(bytes, n, &h), -EPROTO);
    h.count = FRAME_HASHES_MAX + 1;
    n = frame_hash_put(bytes, sizeof bytes, &h);
    assert_int_equal(frame_hash_get(bytes, n, &h), -EPROTO);
    h.count = 1;
    h.first = (uint64_t)INT64_MAX / FRAME_PAGE + 1;
    n = frame_hash_put(bytes, sizeof bytes, &h);
    assert_int_equal(frame_hash_get(bytes, n, &h), -EPROTO);

    h = (struct frame_hash){.count = 1, .level = FRAME_HASH_LEVELS};
    n = frame_hash_put(bytes, sizeof bytes, &h);
    assert_int_equal(frame_hash_get(bytes, n, &h), -EPROTO);
    h = (struct frame_hash){.count = 1, .fresh = 2};
    n = frame_hash_put(bytes, sizeof bytes, &h);
    assert_int_equal(frame_hash_get(bytes, n, &h), -EPROTO);

    static const uint8_t packed[][6] = {{0, 0, 0, 9, 1, 1}, {0, 1, 0, 0, 1, 1}, {0, 1, 0, 1, 1, 1}};
    assert_int_equal(frame_packed_length(packed[0], 6), 9);
    assert_int_equal(frame_packed_length(packed[0], 4), 0);
    assert_int_equal(frame_packed_length(packed[1], 6), FRAME_PAYLOAD_MAX);
    assert_int_equal(frame_packed_length(packed[2], 6), 0);

    struct frame_attached a;
    attached_fill(&a);
    a.status = FRAME_ATTACH_BAD + 1;
    n = frame_attached_put(bytes, sizeof bytes, &a);
    assert_int_equal(frame_attached_get(bytes, n, &a), -EPROTO);
}

/* The longest names are taken, longer ones and ones with a NUL in them are not. */
static void test_strings(void **state)
{
    (void)state;
    static uint8_t bytes[8192];
    struct frame_attach a = {.handle = 1};
    memset(a.name, 'n', NAME_MAX_BYTES);
    size_t n = frame_attach_put(bytes, sizeof bytes, &a);
    assert_int_equal(n, 4 + 1 + 2 + NAME_MAX_BYTES);
    assert_int_equal(frame_attach_get(bytes, n, &a), 0);
    bytes[n] = 'n';
    put_u16(bytes + 5, NAME_MAX_BYTES + 1);
    assert_int_equal(frame_attach_get(bytes, n + 1, &a), -EPROTO);
    put_u16(bytes + 5, UINT16_MAX);
    assert_int_equal(frame_attach_get(bytes, n, &a), -EPROTO);
    put_u16(bytes + 5, NAME_MAX_BYTES);
    bytes[100] = 0;
    assert_int_equal(frame_attach_get(bytes, n, &a), -EPROTO);
}

static size_t frame_make(uint8_t type, uint32_t stream, size_t len, uint8_t seed)
{
    for (size_t i = 0; i < len; i++)
        frame[FRAME_HEADER + i] = (uint8_t)(seed + i * 7 + i / 251);
    frame_header_put(frame, type, stream, 0, (uint32_t)len, frame_payload_hash(frame + FRAME_HEADER, len));
    return FRAME_HEADER + len;
}

static int64_t step(const uint8_t *p, size_t have, struct frame_header *h)
{
    uint8_t *copy = exact(p, have);
    int64_t rc = frame_step(copy, have, h);
    free(copy);
    return rc;
}

static void test_step(void **state)
{
    (void)state;
    static const size_t lengths[] = {0, 1, 8, 100, 241, 5000};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        size_t n = frame_make(FRAME_PAGES, 0x01020304, lengths[i], 3);
        for (size_t have = 0; have < n; have++) {
            struct frame_header h = {0};
            assert_int_equal(step(frame, have, &h), 0);
            assert_int_equal(h.len, have < FRAME_HEADER ? 0 : lengths[i]);
        }
        for (size_t more = 0; more < 3; more++) { /* what follows is not looked at */
            struct frame_header h = {0};
            assert_int_equal(step(frame, n + more, &h), n);
            assert_int_equal(h.type, FRAME_PAGES);
            assert_int_equal(h.stream, 0x01020304);
            assert_int_equal(h.len, lengths[i]);
        }
    }
    struct frame_header h;
    assert_int_equal(step(frame, frame_make(FRAME_OK, 1, FRAME_PAYLOAD_MAX, 0), &h), FRAME_HEADER + FRAME_PAYLOAD_MAX);
}

/* A header with one byte changed, and the checksum right for it. */
static int64_t step_with(size_t at, uint8_t value)
{
    struct frame_header h;
    size_t n = frame_make(FRAME_DATA, 5, 64, 9);
    frame[at] = value;
    put_u64(frame + 16, XXH3_64bits_withSeed(frame, 16, frame_payload_hash(frame + FRAME_HEADER, 64)));
    return step(frame, n, &h);
}

static void test_step_refuses(void **state)
{
    (void)state;
    assert_int_equal(step_with(0, 'M'), FRAME_HEADER + 64);
    assert_int_equal(step_with(0, 'm'), -EPROTO);
    assert_int_equal(step_with(1, 's'), -EPROTO);
    for (unsigned type = 0; type < 256; type++)
        assert_true(step_with(2, (uint8_t)type) == (type && type < FRAME_TYPES ? (int64_t)FRAME_HEADER + 64 : -EPROTO));
    assert_int_equal(step_with(3, 1), -EPROTO);
    for (size_t at = 12; at < 16; at++) /* the order */
        assert_int_equal(step_with(at, 1), FRAME_HEADER + 64);

    frame_make(FRAME_PING, 0, 8, 0); /* which there is none of on stream 0 */
    put_u32(frame + 12, 1);
    put_u64(frame + 16, XXH3_64bits_withSeed(frame, 16, frame_payload_hash(frame + FRAME_HEADER, 8)));
    struct frame_header none;
    assert_int_equal(step(frame, FRAME_HEADER + 8, &none), -EPROTO);

    /* A length beyond the limit is refused before anybody waits for, or makes room for, so much. */
    struct frame_header h;
    frame_make(FRAME_DATA, 5, 0, 0);
    put_u32(frame + 4, FRAME_PAYLOAD_MAX + 1);
    assert_int_equal(step(frame, FRAME_HEADER, &h), -EPROTO);
    put_u32(frame + 4, UINT32_MAX);
    assert_int_equal(step(frame, FRAME_HEADER, &h), -EPROTO);
    put_u32(frame + 4, FRAME_PAYLOAD_MAX);
    assert_int_equal(step(frame, FRAME_HEADER, &h), 0);
}

static void test_bit_flips(void **state)
{
    (void)state;
    static const size_t lengths[] = {0, 1, 3, 8, 17, 130, 300, 4104};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        size_t n = frame_make(FRAME_PAGES, 2, lengths[i], (uint8_t)i);
        for (size_t bit = 0; bit < n * 8; bit++) {
            struct frame_header h;
            frame[bit / 8] ^= (uint8_t)(1u << bit % 8);
            if (frame_step(frame, n, &h) > 0)
                fail_msg("payload of %zu: bit %zu flipped, and accepted", lengths[i], bit);
            frame[bit / 8] ^= (uint8_t)(1u << bit % 8);
        }
    }
}

/* Random headers and payloads are never a frame, and random cuts of a good stream never lose step. */
static void test_random_streams(void **state)
{
    (void)state;
    uint32_t x = 12345;
    struct frame_header h;
    for (int i = 0; i < 50000; i++) {
        for (size_t k = 0; k < 96; k++)
            frame[k] = (uint8_t)chance(&x);
        if (i % 2) {
            put_u16(frame, 0x4d53);
            frame[2] = (uint8_t)(1 + chance(&x) % (FRAME_TYPES - 1));
            frame[3] = 0;
            put_u32(frame + 4, chance(&x) % 72);
            put_u32(frame + 12, 0);
        }
        int64_t rc = step(frame, 96, &h);
        if (rc != -EPROTO && rc != -EBADMSG)
            fail_msg("noise %d: %lld", i, (long long)rc);
    }

    static uint8_t stream[1 << 18];
    size_t all = 0, frames = 0;
    for (; all + 600 < sizeof stream; frames++) {
        size_t n =
            frame_make((uint8_t)(1 + frames % (FRAME_TYPES - 1)), (uint32_t)frames, chance(&x) % 500, (uint8_t)frames);
        memcpy(stream + all, frame, n);
        all += n;
    }
    size_t at = 0, have = 0, seen = 0;
    while (at < all) {
        have += chance(&x) % 700;
        have = have > all ? all : have;
        int64_t rc;
        while ((rc = step(stream + at, have - at, &h)) > 0) {
            assert_int_equal(h.stream, seen++);
            at += (size_t)rc;
        }
        assert_int_equal(rc, 0);
    }
    assert_int_equal(seen, frames);
}

/* ---- PAGES */

static uint8_t pages[FRAME_PAYLOAD_MAX + 64];

static size_t pages_make(const struct frame_extent *e, uint32_t count, size_t data)
{
    size_t n = frame_pages_put(pages, FRAME_PAYLOAD_MAX, 7, e, count);
    if (!n)
        fail_msg("%u entries do not fit", count);
    for (size_t i = 0; i < data; i++)
        pages[n + i] = (uint8_t)(i * 31 + i / 256);
    return n + data;
}

static int pages_get(size_t len, struct frame_pages *p)
{
    uint8_t *copy = exact(pages, len);
    int rc = frame_pages_get(copy, len, p);
    free(copy);
    return rc;
}

static void test_pages(void **state)
{
    (void)state;
    const struct frame_extent given[] = {
        {.offset = 4096, .len = 4096, .kind = FRAME_PAGES_DATA},
        {.offset = 1ull << 40, .len = UINT32_MAX, .kind = FRAME_PAGES_ZEROS},
        {.offset = 0, .len = 1, .kind = FRAME_PAGES_DATA},
        {.offset = (uint64_t)INT64_MAX - 9, .len = 9, .kind = FRAME_PAGES_DATA},
    };
    size_t n = pages_make(given, 4, 4096 + 1 + 9);
    struct frame_pages p;
    assert_int_equal(frame_pages_get(pages, n, &p), 0);
    assert_int_equal(p.handle, 7);
    assert_int_equal(p.count, 4);
    const uint8_t *data = pages + FRAME_PAGES_HEAD + 4 * FRAME_PAGES_ENTRY;
    for (size_t i = 0; i < 4; i++) {
        struct frame_extent e;
        assert_true(frame_pages_next(&p, &e));
        assert_int_equal(e.offset, given[i].offset);
        assert_int_equal(e.len, given[i].len);
        assert_int_equal(e.kind, given[i].kind);
        assert_ptr_equal(e.data, e.kind == FRAME_PAGES_DATA ? data : NULL);
        data += e.data ? e.len : 0;
    }
    struct frame_extent none;
    assert_false(frame_pages_next(&p, &none));

    for (size_t len = 0; len < n; len++)
        assert_int_equal(pages_get(len, &p), -EPROTO);
    assert_int_equal(pages_get(n + 1, &p), -EPROTO);
    for (size_t cap = 0; cap < FRAME_PAGES_HEAD + 4 * FRAME_PAGES_ENTRY; cap++)
        assert_int_equal(frame_pages_put(pages, cap, 7, given, 4), 0);
}

static int pages_one(uint64_t offset, uint32_t len, uint32_t kind, size_t data)
{
    struct frame_pages p;
    struct frame_extent e = {.offset = offset, .len = len, .kind = kind};
    return pages_get(pages_make(&e, 1, data), &p);
}

static void test_pages_refused(void **state)
{
    (void)state;
    assert_int_equal(pages_one(0, 5, FRAME_PAGES_DATA, 5), 0);
    assert_int_equal(pages_one(0, 5, FRAME_PAGES_DATA, 4), -EPROTO);
    assert_int_equal(pages_one(0, 5, FRAME_PAGES_DATA, 6), -EPROTO);
    assert_int_equal(pages_one(0, 0, FRAME_PAGES_DATA, 0), -EPROTO);
    assert_int_equal(pages_one(0, 0, FRAME_PAGES_ZEROS, 0), -EPROTO);
    assert_int_equal(pages_one(0, 5, FRAME_PAGES_ZEROS, 5), -EPROTO);
    assert_int_equal(pages_one(0, 5, FRAME_PAGES_KINDS, 0), -EPROTO);
    assert_int_equal(pages_one((uint64_t)INT64_MAX - 4, 5, FRAME_PAGES_ZEROS, 0), -EPROTO);
    assert_int_equal(pages_one(UINT64_MAX - 3, 5, FRAME_PAGES_ZEROS, 0), -EPROTO);
    assert_int_equal(pages_one(0, FRAME_DATA_MAX, FRAME_PAGES_DATA, FRAME_DATA_MAX), 0);
    assert_int_equal(pages_one(0, FRAME_DATA_MAX + 1, FRAME_PAGES_DATA, FRAME_DATA_MAX + 1), -EPROTO);

    static struct frame_extent many[FRAME_PAGES_ENTRIES + 1];
    struct frame_pages p;
    for (size_t i = 0; i <= FRAME_PAGES_ENTRIES; i++)
        many[i] = (struct frame_extent){.offset = i, .len = 1, .kind = FRAME_PAGES_DATA};
    assert_int_equal(pages_get(pages_make(many, FRAME_PAGES_ENTRIES, FRAME_PAGES_ENTRIES), &p), 0);
    assert_int_equal(pages_get(pages_make(many, FRAME_PAGES_ENTRIES + 1, FRAME_PAGES_ENTRIES + 1), &p), -EPROTO);
    assert_int_equal(pages_get(pages_make(many, 0, 0), &p), -EPROTO);
    put_u32(pages + 4, UINT32_MAX); /* 16 times as much is 0 in 32 bits */
    assert_int_equal(pages_get(FRAME_PAGES_HEAD, &p), -EPROTO);
    put_u32(pages + 4, 1u << 28);
    assert_int_equal(pages_get(FRAME_PAGES_HEAD, &p), -EPROTO);
}

static int delta_one(uint64_t offset, uint32_t len, uint32_t mask, size_t data)
{
    struct frame_pages p;
    struct frame_extent e = {.offset = offset, .len = len, .kind = FRAME_PAGES_DELTA};
    size_t n = pages_make(&e, 1, data);
    if (data >= FRAME_DELTA_HEAD)
        put_u32(pages + FRAME_PAGES_HEAD + FRAME_PAGES_ENTRY + 16, mask);
    return pages_get(n, &p);
}

static int copy_one(uint64_t offset, uint32_t len, uint64_t source, size_t data)
{
    struct frame_pages p;
    struct frame_extent e = {.offset = offset, .len = len, .kind = FRAME_PAGES_COPY};
    size_t n = pages_make(&e, 1, data);
    put_u64(pages + FRAME_PAGES_HEAD + FRAME_PAGES_ENTRY, source);
    return pages_get(n, &p);
}

static void test_copies(void **state)
{
    (void)state;
    assert_int_equal(copy_one(4096, 4096, 0, 24), 0);
    assert_int_equal(copy_one(4096, 4096, 8192, 23), -EPROTO);
    assert_int_equal(copy_one(4096, 4096, 8192, 25), -EPROTO);
    assert_int_equal(copy_one(4096, 4096, 8191, 24), -EPROTO);
    assert_int_equal(copy_one(4095, 4096, 8192, 24), -EPROTO);
    assert_int_equal(copy_one(4096, 8192, 8192, 24), -EPROTO);
    assert_int_equal(copy_one(4096, 4096, UINT64_MAX - 4095, 24), -EPROTO);

    struct frame_pages p;
    struct frame_extent e = {.offset = 8192, .len = 4096, .kind = FRAME_PAGES_COPY};
    size_t n = pages_make(&e, 1, 24);
    put_u64(pages + FRAME_PAGES_HEAD + FRAME_PAGES_ENTRY, 1u << 20);
    assert_int_equal(frame_pages_get(pages, n, &p), 0);
    assert_true(frame_pages_next(&p, &e));
    assert_int_equal(frame_copy_of(&e).source, 1u << 20);
    assert_ptr_equal(frame_copy_of(&e).hash, pages + FRAME_PAGES_HEAD + FRAME_PAGES_ENTRY + 8);
}

static void test_deltas(void **state)
{
    (void)state;
    assert_int_equal(delta_one(4096, 4096, 1, 20 + 128), 0);
    assert_int_equal(delta_one(4096, 4096, 0xffffffffu, 20 + 4096), 0);
    assert_int_equal(delta_one(4096, 4096, 0, 20), -EPROTO);
    assert_int_equal(delta_one(4096, 4096, 3, 20 + 128), -EPROTO);
    assert_int_equal(delta_one(4096, 4096, 1, 20 + 127), -EPROTO);
    assert_int_equal(delta_one(4096, 4096, 1, 20 + 129), -EPROTO);
    assert_int_equal(delta_one(4096, 4096, 1, 19), -EPROTO);
    assert_int_equal(delta_one(4095, 4096, 1, 20 + 128), -EPROTO);
    assert_int_equal(delta_one(4096, 128, 1, 20 + 128), -EPROTO);

    struct frame_pages p;
    struct frame_extent e = {.offset = 8192, .len = 4096, .kind = FRAME_PAGES_DELTA}, run;
    size_t n = pages_make(&e, 1, 20 + 4 * 128);
    put_u32(pages + FRAME_PAGES_HEAD + FRAME_PAGES_ENTRY + 16, 0x80000031u);
    assert_int_equal(frame_pages_get(pages, n, &p), 0);
    assert_true(frame_pages_next(&p, &e));
    static const struct frame_extent runs[] = {
        {.offset = 8192, .len = 128}, {.offset = 8192 + 512, .len = 256}, {.offset = 12288 - 128, .len = 128}};
    const uint8_t *data = e.data + FRAME_DELTA_HEAD;
    uint32_t at = 0;
    for (size_t i = 0; i < 3; i++) {
        assert_true(frame_delta_run(&e, &at, &run));
        assert_int_equal(run.offset, runs[i].offset);
        assert_int_equal(run.len, runs[i].len);
        assert_ptr_equal(run.data, data);
        data += run.len;
    }
    assert_false(frame_delta_run(&e, &at, &run));
}

/* Whatever is taken yields exactly its count of extents, in bounds, which use up all data. */
static void test_pages_damage(void **state)
{
    (void)state;
    uint32_t x = 99;
    for (int i = 0; i < 100000; i++) {
        struct frame_extent e[6];
        uint32_t count = 1 + chance(&x) % 6;
        size_t data = 0;
        for (uint32_t k = 0; k < count; k++) {
            e[k] = (struct frame_extent){.offset = chance(&x), .len = 1 + chance(&x) % 20, .kind = chance(&x) % 2};
            data += e[k].kind == FRAME_PAGES_DATA ? e[k].len : 0;
        }
        size_t n = pages_make(e, count, data), table = FRAME_PAGES_HEAD + count * FRAME_PAGES_ENTRY;
        for (uint32_t k = chance(&x) % 3; k; k--)
            pages[4 + chance(&x) % (table - 4)] ^= (uint8_t)(1u << chance(&x) % 8);
        uint8_t *copy = exact(pages, n);
        struct frame_pages p;
        int rc = frame_pages_get(copy, n, &p);
        if (rc && rc != -EPROTO)
            fail_msg("round %d: %d", i, rc);
        const uint8_t *at = rc ? NULL : p.data.at;
        struct frame_extent got;
        for (uint32_t k = 0; !rc && k < p.count; k++) {
            assert_true(frame_pages_next(&p, &got));
            assert_true(got.offset + got.len <= INT64_MAX);
            if (got.data) {
                assert_ptr_equal(got.data, at);
                at += got.len;
            }
        }
        if (!rc)
            assert_ptr_equal(at, copy + n);
        free(copy);
    }
}

static void test_codes(void **state)
{
    (void)state;
    for (uint16_t c = 1; c < FRAME_E_CODES; c++) {
        assert_true(frame_code_errno(c) < 0);
        assert_int_equal(frame_code_from(frame_code_errno(c)), c);
    }
    assert_int_equal(frame_code_errno(0), -EPROTO);
    assert_int_equal(frame_code_errno(FRAME_E_CODES), -EPROTO);
    assert_int_equal(frame_code_errno(UINT16_MAX), -EPROTO);
    assert_int_equal(frame_code_from(-EDQUOT), FRAME_E_NOSPACE);
    assert_int_equal(frame_code_from(-EROFS), FRAME_E_IO);
    assert_int_equal(frame_code_errno(FRAME_E_FENCED), -ESTALE);
}

static void test_extents(void **state)
{
    (void)state;
    static uint8_t p[FRAME_EXTENTS_HEAD + 16 * (FRAME_EXTENTS_MAX + 1)];
    struct frame_extents e;
    uint64_t from, to;
    for (uint64_t i = 0; i <= FRAME_EXTENTS_MAX; i++) {
        put_u64(p + FRAME_EXTENTS_HEAD + 16 * i, 3 * i);
        put_u64(p + FRAME_EXTENTS_HEAD + 16 * i + 8, 1 + i % 3);
    }
    frame_extents_head(p, 7, false, FRAME_EXTENTS_MAX);
    const size_t len = sizeof p - 16;
    assert_int_equal(frame_extents_get(p, len, &e), 0);
    assert_true(e.request == 7 && !e.all && e.count == FRAME_EXTENTS_MAX);
    frame_extent(&e, 4, &from, &to);
    assert_true(from == 12 && to == 14);
    assert_true(len <= FRAME_PAYLOAD_MAX);
    assert_int_equal(frame_extents_get(p, len - 1, &e), -EPROTO);
    assert_int_equal(frame_extents_get(p, FRAME_EXTENTS_HEAD - 1, &e), -EPROTO);
    frame_extents_head(p, 7, false, FRAME_EXTENTS_MAX + 1);
    assert_int_equal(frame_extents_get(p, sizeof p, &e), -EPROTO);
    frame_extents_head(p, 7, true, 1);
    assert_int_equal(frame_extents_get(p, FRAME_EXTENTS_HEAD + 16, &e), -EPROTO);
    frame_extents_head(p, 7, 2, 0);
    assert_int_equal(frame_extents_get(p, FRAME_EXTENTS_HEAD, &e), -EPROTO);
    frame_extents_head(p, 7, true, 0);
    assert_int_equal(frame_extents_get(p, FRAME_EXTENTS_HEAD, &e), 0);
    static const uint64_t bad[][4] = {{5, 0, 0, 0}, {5, 3, 7, 1}, {1ULL << 51, 1, 0, 0}, {2, UINT64_MAX, 0, 0}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        frame_extents_head(p, 7, false, bad[i][2] ? 2 : 1);
        for (size_t w = 0; w < 4; w++)
            put_u64(p + FRAME_EXTENTS_HEAD + 8 * w, bad[i][w]);
        assert_int_equal(frame_extents_get(p, FRAME_EXTENTS_HEAD + (bad[i][2] ? 32 : 16), &e), -EPROTO);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_short_requests), cmocka_unit_test(test_data),
        cmocka_unit_test(test_round_trips),    cmocka_unit_test(test_damage),
        cmocka_unit_test(test_bytes),          cmocka_unit_test(test_values),
        cmocka_unit_test(test_strings),        cmocka_unit_test(test_step),
        cmocka_unit_test(test_step_refuses),   cmocka_unit_test(test_bit_flips),
        cmocka_unit_test(test_random_streams), cmocka_unit_test(test_pages),
        cmocka_unit_test(test_pages_refused),  cmocka_unit_test(test_deltas),
        cmocka_unit_test(test_copies),         cmocka_unit_test(test_pages_damage),
        cmocka_unit_test(test_codes),          cmocka_unit_test(test_extents),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
