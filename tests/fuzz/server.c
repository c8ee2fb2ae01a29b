/* A real server over a mem: store, and a client that does what the input says: it attaches, writes epochs, pins, reads
 * and asks for hashes, rightly and wrongly, with any frame damaged, sent in any order over one or two sockets, or cut
 * off in the middle.
 *
 * What must hold: nothing crashes or leaks; no answer shows bytes of a region that was not asked for; an epoch is
 * committed only if the protocol allows it; the regions are at last as the committed epochs leave them (for those whose
 * answers were cut off: after some of them, in their order); and another client, which has had a region there all the
 * time, finds it as it was and goes on writing. */
#include "tests/fuzz/model.h"
#include "tests/fuzz/world.h"

#include "agent/base/log.h"

#include <lz4.h>
#include <signal.h>
#include <xxhash.h>

#define OURS 3u    /* regions of the fuzzed client; the name after them is the other's */
#define MAIN 2u    /* stream of the epochs that the model follows */
#define ASK 9u     /* stream of requests */
#define EPOCHS 24u /* sent and not answered */
#define PINS 64u
#define OPS 96u
#define SIZE (8u * FRAME_PAGE) /* of a region at first */

static const char *const names[MODEL_NAMES] = {"a", "b", "d/e", "v/secret"};

static struct run {
    struct world world;
    struct peer client, second,
        other; /* the fuzzed client and its second socket or connection; the one who has to be left alone */
    struct in in;
    struct model model, ahead; /* as committed; as it will be if all that was sent comes true */
    struct model_epoch open, sent[EPOCHS];
    struct answer {
        uint32_t order;
        uint64_t seq;
        bool durable;
    } answers[EPOCHS * 2];
    size_t sent_n, answers_n;
    bool opened, failed, fresh[MODEL_NAMES];
    uint64_t seq, fence[MODEL_NAMES];
    uint32_t request, pin;
    uint8_t pins[PINS], reads[256]; /* sets of names: what a pin is of, what a request may show */
    enum { ALONE, JOINED, APART } second_is;
    bool damage, removed; /* removed: the other's region, as anybody may with force */
} r;

/* The other's bytes: a word again and again. Where it would show it is looked for by its hash, so that the fuzzer does
 * not learn it from a comparison. */
static uint64_t secret_word(void)
{
    static uint64_t word;
    if (!word)
        word = XXH3_64bits("the other's", 11);
    return word;
}

static bool secret(const uint8_t *p, size_t len)
{
    uint64_t word = secret_word(), sum = XXH3_64bits(&word, sizeof word);
    for (size_t step = 0; step + 16 <= len; step += 512)
        for (size_t at = step; at < step + 8; at++)
            if (XXH3_64bits(p + at, 8) == sum)
                return true;
    return false;
}

static void secret_fill(uint8_t *to, size_t len)
{
    uint64_t word = secret_word();
    for (size_t at = 0; at < len; at += sizeof word)
        memcpy(to + at, &word, sizeof word);
}

/* Answers */

static uint32_t name_bit(const char *name)
{
    for (uint32_t i = 0; i < MODEL_NAMES; i++)
        if (!strcmp(name, names[i]))
            return 1u << i;
    return 1u << MODEL_NAMES;
}

static void on_frame(void *arg, const struct frame_header *h, const uint8_t *p)
{
    const struct peer *from = arg;
    struct frame_attached a;
    struct frame_entry e;
    struct frame_failed f = {0};
    uint32_t request, pin;
    if (h->type == FRAME_ATTACHED && !frame_attached_get(p, h->len, &a)) {
        if (from != &r.second && a.handle < MODEL_NAMES && a.status <= FRAME_ATTACH_EXISTS)
            r.fence[a.handle] = a.fence;
    } else if (h->type == FRAME_PINNED && !frame_pinned_get(p, h->len, &request, &pin, &e)) {
        r.pin = pin;
        r.pins[pin % PINS] |= (uint8_t)name_bit(e.name);
    } else if (h->type == FRAME_DATA) {
        MUST(h->len >= 9, "DATA of %u bytes", h->len);
        MUST(r.reads[get_u32(p) % 256] >> OURS & 1 || !secret(p + 9, h->len - 9),
             "a read shows what it was not asked for");
    } else if (h->stream == MAIN && (h->type == FRAME_DURABLE || h->type == FRAME_FAILED) &&
               !(from == &r.second && r.second_is == APART)) {
        if (h->type == FRAME_FAILED)
            MUST(!frame_failed_get(p, h->len, &f), "a malformed FAILED");
        else
            f.seq = get_u64(p);
        if (r.answers_n < EPOCHS * 2)
            r.answers[r.answers_n++] = (struct answer){h->order, f.seq, h->type == FRAME_DURABLE};
        else
            r.model.lost = true;
    }
}

static void answered(const struct answer *a)
{
    const char *why = NULL;
    if (r.opened && r.open.seq == a->seq && !a->durable && !r.failed) { /* before its END */
        r.failed = true;
        return;
    }
    for (size_t i = 0; i < r.sent_n; i++) {
        if (r.sent[i].seq != a->seq)
            continue;
        bool allowed = !a->durable || model_apply(&r.model, &r.sent[i], &why);
        MUST(allowed || r.model.lost, "epoch %llu was committed: %s", (unsigned long long)a->seq, why);
        model_drop(&r.sent[i]);
        memmove(&r.sent[i], &r.sent[i + 1], (--r.sent_n - i) * sizeof r.sent[0]);
        return;
    }
}

/* Answers on a stream are in order, but come over two sockets. */
static int by_order(const void *a, const void *b)
{
    const struct answer *x = a, *y = b;
    return (x->order > y->order) - (x->order < y->order);
}

static void quiet(void)
{
    struct peer *all[] = {&r.client, &r.second, &r.other};
    world_quiet(&r.world, all, 3);
    qsort(r.answers, r.answers_n, sizeof r.answers[0], by_order);
    for (size_t i = 0; i < r.answers_n; i++)
        answered(&r.answers[i]);
    r.answers_n = 0;
    if (!r.sent_n)
        r.ahead = r.model;
}

/* Frames. What was made of the damage is what the model is told. */

static void ended(const uint8_t *p, size_t len)
{
    const char *why;
    if (!r.opened)
        return;
    bool counts = !r.failed && len >= 16 && get_u64(p) == r.open.seq;
    if (counts && r.sent_n < EPOCHS) {
        model_apply(&r.ahead, &r.open, &why);
        r.sent[r.sent_n++] = r.open;
        r.open = (struct model_epoch){0};
    } else {
        r.model.lost |= counts;
        model_drop(&r.open);
    }
    r.opened = r.failed = false;
    memset(r.fresh, 0, sizeof r.fresh);
}

static void epoch_told(uint8_t type, const uint8_t *p, size_t len)
{
    struct frame_begin b;
    if (type == FRAME_BEGIN && !r.opened && !frame_begin_get(p, len, &b)) {
        r.open = (struct model_epoch){.seq = b.seq};
        r.opened = true;
    } else if (type == FRAME_END) {
        ended(p, len);
    } else if (type == FRAME_ABORT) {
        model_drop(&r.open);
        r.opened = r.failed = false;
        memset(r.fresh, 0, sizeof r.fresh);
    } else if (r.opened && !r.failed &&
               (type == FRAME_OP || type == FRAME_REGION || type == FRAME_PAGES || type == FRAME_PACKED)) {
        model_note(&r.open, type, p, len);
    }
}

static void request_told(uint8_t type, const uint8_t *p, size_t len)
{
    char name[NAME_CAP];
    struct rd rd = rd_over(p, len);
    uint32_t number = rd_u32(&rd);
    if (type == FRAME_READ) {
        r.reads[number % 256] |= r.pins[rd_u32(&rd) % PINS];
    } else if (type == FRAME_PIN) { /* its beginning may come with it */
        rd_str(&rd, name, sizeof name);
        r.reads[number % 256] |= rd_left(&rd) ? (uint8_t)name_bit(name) : 0;
    } else if (type == FRAME_REMOVE) {
        rd_str(&rd, name, sizeof name);
        r.removed |= rd_u8(&rd) && !rd.bad && !strcmp(name, names[OURS]);
        r.model.lost |= !rd.bad && name_bit(name) < 1u << OURS;
    }
}

static void told(const struct peer *by, uint32_t stream, uint8_t type, const uint8_t *p, size_t len)
{
    struct frame_attach a;
    bool apart = by == &r.second && r.second_is == APART;
    if (type == FRAME_ATTACH && !apart && !frame_attach_get(p, len, &a))
        r.model.lost |= a.handle < MODEL_NAMES ? !!strcmp(a.name, names[a.handle]) : name_bit(a.name) <= 1u << OURS;
    else if ((type == FRAME_REGION || type == FRAME_OP) && (apart || stream != MAIN))
        r.model.lost = true;
    else if (type == FRAME_CLOSE && len == 4 && get_u32(p) == MAIN && !apart)
        r.model.lost = true;
    else if (stream == MAIN && !apart)
        epoch_told(type, p, len);
    request_told(type, p, len);
}

static void emit(uint32_t stream, uint8_t type, const void *payload, size_t len)
{
    static uint8_t frame[FRAME_PAYLOAD_MAX + 512];
    struct peer *by = r.second.fd >= 0 && in_u8(&r.in) % 4 == 3 ? &r.second : &r.client;
    struct peer *counter = by == &r.second && r.second_is == JOINED ? &r.client : by;
    if (len)
        memcpy(frame, payload, len);
    uint32_t order = stream ? counter->sent[stream]++ : 0;
    if (r.damage) {
        size_t at = in_u16(&r.in);
        uint8_t change = in_u8(&r.in);
        if (change && len)
            frame[at % len] ^= change;
        else if (len)
            len = at % len;
        else
            order += (uint32_t)at;
    }
    told(by, stream, type, frame, len);
    peer_frame(by, stream, order, type, frame, len);
}

static uint64_t some_offset(void)
{
    static const uint64_t far[] = {1ull << 40, (uint64_t)INT64_MAX - 4095, (uint64_t)INT64_MAX,
                                   1ull << 63, UINT64_MAX - 4095,          UINT64_MAX};
    uint8_t which = in_u8(&r.in);
    return which >= 0xf8   ? far[which % 6]
           : which >= 0xc0 ? (uint64_t)which * 1031
                           : which % MODEL_PAGES * (uint64_t)FRAME_PAGE;
}

static void some_epoch_end(uint64_t seq, uint8_t how)
{
    uint8_t p[17];
    put_u64(p, seq);
    put_u64(p + 8, r.open.n + (how >> 6 == 3));
    p[16] = 1;
    emit(MAIN, FRAME_END, p, how & 1 ? 17 : 16);
}

static void some_region(uint32_t handle)
{
    uint8_t p[64], how = in_u8(&r.in);
    const struct model_region *ahead = &r.ahead.region[handle % MODEL_NAMES];
    struct frame_region g = {.handle = handle,
                             .base = r.fresh[handle % MODEL_NAMES] ? 0 : ahead->epoch,
                             .fence = r.fence[handle % MODEL_NAMES],
                             .min_size = UINT64_MAX};
    g.epoch = g.base + 1 + (how & 1 ? in_u8(&r.in) : 0);
    g.base += how & 2 && how & 4;
    g.fence += how & 8 && how & 4;
    if (how & 16)
        g.min_size = some_offset();
    g.size = how & 32 ? some_offset() : SIZE;
    if (how & 64)
        g.size += in_u8(&r.in);
    emit(how & 128 && how & 4 ? 3 : MAIN, FRAME_REGION, p, frame_region_put(p, sizeof p, &g));
}

/* PAGES in the making. */
struct pages {
    struct frame_extent e[4];
    uint32_t n;
    size_t len;
    uint8_t data[4 * (FRAME_PAGE + FRAME_DELTA_HEAD) + 8192];
};

static void some_delta(struct pages *to, uint32_t handle, struct frame_extent *e)
{
    uint8_t page[FRAME_PAGE] = {0}, *data = to->data + to->len, fill = in_u8(&r.in);
    uint32_t mask = in_u16(&r.in), at = 0;
    mask |= mask << 16 & (fill % 2 ? 0xffff0000u : 0);
    size_t len = FRAME_DELTA_HEAD + (size_t)__builtin_popcount(mask) * FRAME_DELTA_BLOCK;
    if (e->offset < MODEL_BYTES)
        memcpy(page, r.ahead.region[handle].bytes + e->offset / FRAME_PAGE * FRAME_PAGE, FRAME_PAGE);
    memset(data, fill, len);
    put_u32(data + 16, mask);
    for (uint32_t b = 0; b < FRAME_DELTA_BLOCKS; b++)
        if (mask >> b & 1)
            memset(page + b * FRAME_DELTA_BLOCK, fill, FRAME_DELTA_BLOCK), at++;
    model_page_hash(data, page);
    e->len = FRAME_PAGE;
    to->len += len;
}

static void some_copy(struct pages *to, uint32_t handle, struct frame_extent *e)
{
    uint8_t page[FRAME_PAGE] = {0}, *data = to->data + to->len;
    uint64_t source = some_offset();
    if (in_u8(&r.in) >= 0xc0)
        secret_fill(page, sizeof page); /* a hash that it could have from elsewhere */
    else if (source < MODEL_BYTES)
        memcpy(page, r.ahead.region[handle].bytes + source / FRAME_PAGE * FRAME_PAGE, FRAME_PAGE);
    put_u64(data, source);
    model_page_hash(data + 8, page);
    e->len = FRAME_PAGE;
    to->len += FRAME_COPY_BYTES;
}

static void some_extent(struct pages *to, uint32_t handle)
{
    struct frame_extent *e = &to->e[to->n++];
    uint8_t kind = in_u8(&r.in);
    *e = (struct frame_extent){.offset = some_offset(), .kind = kind % FRAME_PAGES_KINDS};
    switch (e->kind) {
    case FRAME_PAGES_DATA:
        e->len = kind & 64 ? 1u + in_u16(&r.in) % (FRAME_PAGE + 200) : FRAME_PAGE;
        memset(to->data + to->len, in_u8(&r.in), e->len);
        to->len += e->len;
        break;
    case FRAME_PAGES_ZEROS:
        e->len = kind & 128 ? UINT32_MAX - kind : kind & 64 ? in_u16(&r.in) : FRAME_PAGE;
        break;
    case FRAME_PAGES_DELTA:
        some_delta(to, handle, e);
        break;
    default:
        some_copy(to, handle, e);
    }
}

static void some_pages(uint32_t handle)
{
    static struct pages to;
    static uint8_t p[FRAME_PAYLOAD_MAX], packed[FRAME_PAYLOAD_MAX];
    uint8_t how = in_u8(&r.in);
    to.n = 0;
    to.len = 0;
    for (unsigned n = 1 + how % 4; n; n--)
        some_extent(&to, handle % MODEL_NAMES);
    size_t len = frame_pages_put(p, sizeof p, handle, to.e, to.n);
    memcpy(p + len, to.data, to.len);
    len += to.len;
    int n = how & 128 ? LZ4_compress_default((const char *)p, (char *)packed + FRAME_PACKED_HEAD, (int)len,
                                             (int)(sizeof packed - FRAME_PACKED_HEAD))
                      : 0;
    if (n > 0) {
        put_u32(packed, how & 64 && how & 32 ? in_u16(&r.in) : (uint32_t)len);
        emit(MAIN, FRAME_PACKED, packed, FRAME_PACKED_HEAD + (size_t)n);
    } else {
        emit(MAIN, FRAME_PAGES, p, len);
    }
}

static void some_op(uint32_t handle)
{
    uint8_t p[64], kind = in_u8(&r.in);
    struct frame_op o = {.kind = kind & 128 ? FRAME_OP_RENAME
                                 : kind & 1 ? FRAME_OP_UNLINK
                                            : FRAME_OP_CREATE,
                         .handle = handle,
                         .to = kind % 5,
                         .lineage = {{kind, 1}}};
    r.fresh[handle % MODEL_NAMES] = o.kind == FRAME_OP_CREATE;
    emit(MAIN, FRAME_OP, p, frame_op_put(p, sizeof p, &o));
}

static void attach(uint32_t handle, bool write)
{
    uint8_t p[NAME_CAP + 16];
    struct frame_attach a = {.handle = handle, .write = write};
    snprintf(a.name, sizeof a.name, "%s", names[handle % MODEL_NAMES]);
    emit(1, FRAME_ATTACH, p, frame_attach_put(p, sizeof p, &a));
}

static void some_request(uint8_t type)
{
    uint8_t p[NAME_CAP + 16], how = in_u8(&r.in);
    struct wr w = wr_over(p, sizeof p);
    wr_u32(&w, type == FRAME_UNPIN ? r.pin : ++r.request);
    if (type == FRAME_PIN || type == FRAME_REMOVE)
        wr_str(&w, names[how % MODEL_NAMES]);
    if (type == FRAME_REMOVE)
        wr_u8(&w, how >= 0xc0);
    if (type == FRAME_PIN && how & 0x80) {
        struct id some = {{how & 0x40}};
        wr_u64(&w, in_u8(&r.in) % 4);
        wr_copy(&w, some.b, sizeof some.b);
        wr_u32(&w, how & 0x20 ? FRAME_READ_MAX : in_u16(&r.in));
    }
    if (type == FRAME_READ || type == FRAME_HASH)
        wr_u32(&w, how & 1 ? r.pin : how & 2 ? r.pin - 1 : how);
    if (type == FRAME_READ) {
        wr_u64(&w, some_offset());
        wr_u32(&w, how & 4 ? FRAME_DATA_MAX : how & 8 ? in_u16(&r.in) : how & 0x40 ? FRAME_READ_MAX : FRAME_PAGE);
        if (how & 0x80)
            wr_u8(&w, how >> 4 & 1);
    }
    if (type == FRAME_HASH) {
        wr_u64(&w, how & 4 ? some_offset() : how & 8 ? in_u8(&r.in) : 0);
        wr_u32(&w, how & 16 ? FRAME_HASHES_MAX : 1u + in_u8(&r.in));
        wr_u8(&w, in_u8(&r.in) % (FRAME_HASH_LEVELS + 1));
        wr_u8(&w, how & 32 ? 1 : 0);
    }
    emit(ASK, type, p, wr_len(&w));
}

static void some_control(uint8_t type)
{
    uint8_t p[8], stream = in_u8(&r.in) % PEER_STREAMS;
    put_u32(p, stream);
    put_u32(p + 4, in_u16(&r.in));
    emit(0, type, p, type == FRAME_CLOSE ? 4 : 8);
}

static void some_bytes(bool framed)
{
    uint8_t type = framed ? in_u8(&r.in) : 0, stream = framed ? in_u8(&r.in) % PEER_STREAMS : 0;
    size_t n = in_u8(&r.in);
    const uint8_t *p = in_take(&r.in, &n);
    if (framed)
        emit(stream, type, p, n);
    else
        peer_bytes(&r.client, p, n);
}

/* What is there in the end, seen by somebody who only reads. */

struct found {
    struct peer peer;
    struct model model;
    uint32_t pin, name;
    uint8_t hashes[3][MODEL_PAGES * FRAME_HASH_BYTES];
    uint32_t count[3];
    unsigned answers;
};
static struct found found;

static void on_found(void *arg, const struct frame_header *h, const uint8_t *p)
{
    struct model_region *m = &found.model.region[found.name];
    struct frame_entry e;
    uint32_t request;
    (void)arg;
    found.answers += h->stream == ASK;
    if (h->type == FRAME_PINNED) {
        MUST(!frame_pinned_get(p, h->len, &request, &found.pin, &e), "a malformed PINNED");
        *m = (struct model_region){.exists = true, .epoch = e.epoch, .size = e.size};
    } else if (h->type == FRAME_DATA) {
        uint32_t at = get_u32(p), len = get_u32(p + 5);
        MUST(at <= MODEL_BYTES && len <= MODEL_BYTES - at && h->len == 9 + (p[4] ? 0 : len), "DATA of %u bytes", len);
        if (!p[4])
            memcpy(m->bytes + at, p + 9, len);
    } else if (h->type == FRAME_HASHES) {
        uint32_t level = get_u32(p) % 3, count = get_u32(p + 4);
        MUST(count <= MODEL_PAGES && h->len == 8 + count * FRAME_HASH_BYTES, "HASHES of %u", count);
        memcpy(found.hashes[level], p + 8, count * FRAME_HASH_BYTES);
        found.count[level] = count;
    } else if (h->stream == ASK) {
        struct frame_failed f;
        MUST(h->type == FRAME_FAILED && !frame_failed_get(p, h->len, &f), "an answer of type %u", h->type);
        MUST(f.code == FRAME_E_NOT_FOUND, "%s", f.text);
    }
}

static void ask(uint8_t type, const void *p, size_t len)
{
    struct peer *all[] = {&found.peer, &r.other};
    unsigned had = found.answers;
    peer_send(&found.peer, ASK, type, p, len);
    world_quiet(&r.world, all, 2);
    MUST(type == FRAME_UNPIN || found.answers > had, "a request of type %u has no answer", type);
}

static void hash_nodes(const struct model_region *m, bool fresh)
{
    uint8_t p[64], want[3][MODEL_PAGES * FRAME_HASH_BYTES] = {{0}}, none[256] = {0}, children[256];
    uint32_t n = (uint32_t)((m->size + FRAME_PAGE - 1) / FRAME_PAGE);
    for (uint32_t i = 0; i < n; i++)
        if (memcmp(m->bytes + i * FRAME_PAGE, none, 256) ||
            memcmp(m->bytes + i * FRAME_PAGE, m->bytes + i * FRAME_PAGE + 256, FRAME_PAGE - 256))
            model_page_hash(want[0] + i * 16, m->bytes + i * FRAME_PAGE);
    for (uint8_t level = 0; level < 3; level++) {
        struct frame_hash h = {
            .request = level, .pin = found.pin, .count = FRAME_HASHES_MAX, .level = level, .fresh = fresh};
        ask(FRAME_HASH, p, frame_hash_put(p, sizeof p, &h));
        MUST(found.count[level] == n && !memcmp(found.hashes[level], want[level], n * 16),
             "hashes of level %u, fresh %u: %u of %u, or others", level, fresh, found.count[level], n);
        uint32_t up = (n + FRAME_HASH_FANOUT - 1) / FRAME_HASH_FANOUT;
        for (uint32_t i = 0; level < 2 && i < up; i++) {
            XXH128_canonical_t sum;
            memset(children, 0, sizeof children);
            memcpy(children, want[level] + i * 256, i == up - 1 ? (n - i * 16) * 16 : 256);
            XXH128_canonicalFromHash(&sum, XXH3_128bits(children, sizeof children));
            if (memcmp(children, none, 256))
                memcpy(want[level + 1] + i * 16, &sum, 16);
        }
        n = up;
    }
}

static void look_at(uint32_t name)
{
    uint8_t p[64];
    struct wr w = wr_over(p, sizeof p);
    struct model_region *m = &found.model.region[name];
    found.name = name;
    *m = (struct model_region){0};
    wr_u32(&w, 0);
    wr_str(&w, names[name]);
    ask(FRAME_PIN, p, wr_len(&w));
    if (!m->exists)
        return;
    for (uint32_t at = 0; at < MODEL_BYTES && at < m->size; at += FRAME_DATA_MAX) {
        w = wr_over(p, sizeof p);
        wr_u32(&w, at);
        wr_u32(&w, found.pin);
        wr_u64(&w, at);
        wr_u32(&w, MODEL_BYTES - at < FRAME_DATA_MAX ? MODEL_BYTES - at : FRAME_DATA_MAX);
        ask(FRAME_READ, p, wr_len(&w));
    }
    if (m->size <= MODEL_BYTES) {
        hash_nodes(m, false);
        hash_nodes(m, true);
    }
    put_u32(p, found.pin);
    ask(FRAME_UNPIN, p, 4);
}

static bool as_foretold(const struct model *m)
{
    for (uint32_t i = 0; i < OURS; i++) {
        const struct model_region *want = &m->region[i], *is = &found.model.region[i];
        if (want->exists != is->exists || (is->exists && (want->epoch != is->epoch || want->size != is->size)))
            return false;
        for (uint32_t page = 0; is->exists && page < MODEL_PAGES; page++)
            if (!(want->open >> page & 1) &&
                memcmp(want->bytes + page * FRAME_PAGE, is->bytes + page * FRAME_PAGE, FRAME_PAGE))
                return false;
    }
    return true;
}

/* Compares, and goes on from what was found: epochs whose answers were cut off may or may not have come to be, in their
 * order. */
static void check(void)
{
    const char *why;
    struct peer *one[] = {&found.peer};
    found.peer.frame = on_found;
    peer_open(&r.world, &found.peer, 9, NULL);
    for (uint32_t i = 0; i < MODEL_NAMES; i++)
        look_at(i);
    MUST(found.peer.fd >= 0, "a reader was hung up on");
    peer_close(&found.peer);
    world_quiet(&r.world, one, 1);
    bool good = r.model.lost || as_foretold(&r.model);
    for (size_t i = 0; i < r.sent_n; i++) {
        if (!good) {
            struct model before = r.model;
            if (!model_apply(&r.model, &r.sent[i], &why) && !r.model.lost)
                r.model = before;
            good = r.model.lost || as_foretold(&r.model);
        }
        model_drop(&r.sent[i]);
    }
    r.sent_n = 0;
    MUST(good, "the regions are not as the committed epochs leave them");
    r.ahead = r.model;
}

static void check_other(void)
{
    const struct model_region *m = &found.model.region[OURS];
    static uint8_t want[2 * FRAME_PAGE];
    secret_fill(want, sizeof want);
    MUST(r.other.fd >= 0, "one who did nothing wrong was hung up on");
    MUST(r.removed || (m->exists && m->epoch == 1 && m->size == sizeof want && !memcmp(m->bytes, want, sizeof want)),
         "another's region was changed");
}

/* Beginning */

static void other_begins(void)
{
    uint8_t p[NAME_CAP + 16];
    static uint8_t pages[64 + 2 * FRAME_PAGE];
    struct frame_attach a = {.handle = OURS, .write = 1};
    struct frame_op o = {.kind = FRAME_OP_CREATE, .handle = OURS, .lineage = {{7}}};
    struct frame_region g = {.handle = OURS, .epoch = 1, .fence = 1, .min_size = UINT64_MAX, .size = 2 * FRAME_PAGE};
    struct frame_extent e = {.len = 2 * FRAME_PAGE};
    struct peer *one[] = {&r.other};
    snprintf(a.name, sizeof a.name, "%s", names[OURS]);
    peer_open(&r.world, &r.other, 7, NULL);
    peer_send(&r.other, 1, FRAME_ATTACH, p, frame_attach_put(p, sizeof p, &a));
    put_u64(p, 1);
    peer_send(&r.other, MAIN, FRAME_BEGIN, p, 8);
    peer_send(&r.other, MAIN, FRAME_OP, p, frame_op_put(p, sizeof p, &o));
    peer_send(&r.other, MAIN, FRAME_REGION, p, frame_region_put(p, sizeof p, &g));
    size_t head = frame_pages_put(pages, sizeof pages, OURS, &e, 1);
    secret_fill(pages + head, 2 * FRAME_PAGE);
    peer_send(&r.other, MAIN, FRAME_PAGES, pages, head + 2 * FRAME_PAGE);
    put_u64(p, 1);
    put_u64(p + 8, 3);
    peer_send(&r.other, MAIN, FRAME_END, p, 16);
    world_quiet(&r.world, one, 1);
}

static void begin(void)
{
    peer_open(&r.world, &r.client, 1, NULL);
    r.damage = false;
    for (uint32_t i = 0; i < OURS; i++)
        attach(i, true);
    quiet();
    r.opened = r.failed = false;
    model_drop(&r.open);
    memset(r.fresh, 0, sizeof r.fresh);
    memset(r.pins, 0, sizeof r.pins);
}

/* One more socket of the same connection, or somebody else. */
static void second_begins(void)
{
    struct id token = r.client.token;
    if (r.second_is != ALONE)
        peer_open(&r.world, &r.second, 2, r.second_is == JOINED ? &token : NULL);
}

/* A first region, of some pages that differ, so that there is something to rest on. */
static void first_epoch(void)
{
    uint8_t p[64];
    static uint8_t pages[64 + SIZE];
    struct frame_op o = {.kind = FRAME_OP_CREATE, .handle = 0, .lineage = {{3}}};
    struct frame_region g = {.handle = 0, .epoch = 1, .fence = r.fence[0], .min_size = UINT64_MAX, .size = SIZE};
    struct frame_extent e = {.len = SIZE};
    put_u64(p, ++r.seq);
    emit(MAIN, FRAME_BEGIN, p, 8);
    emit(MAIN, FRAME_OP, p, frame_op_put(p, sizeof p, &o));
    emit(MAIN, FRAME_REGION, p, frame_region_put(p, sizeof p, &g));
    size_t head = frame_pages_put(pages, sizeof pages, 0, &e, 1);
    for (uint32_t at = 0; at < SIZE; at += 64)
        memset(pages + head + at, (int)(at / 64 * 7 + at / FRAME_PAGE), 64);
    emit(MAIN, FRAME_PAGES, pages, head + SIZE);
    put_u64(p, r.seq);
    put_u64(p + 8, 3);
    emit(MAIN, FRAME_END, p, 16);
    quiet();
    MUST(r.model.region[0].epoch == 1, "the first epoch failed");
}

static void hang_up(void)
{
    peer_close(&r.client);
    peer_close(&r.second);
    quiet();
    check();
}

static void step(void)
{
    uint8_t p[8], what = in_u8(&r.in), handle = in_u8(&r.in) % 5;
    r.damage = what >= 0xf0;
    switch (what % 24) {
    case 0:
    case 1:
        put_u64(p, ++r.seq);
        emit(MAIN, FRAME_BEGIN, p, 8);
        break;
    case 2:
        some_op(handle);
        break;
    case 3:
    case 4:
        some_region(handle);
        break;
    case 5:
    case 6:
    case 7:
        some_pages(handle);
        break;
    case 8:
    case 9:
        some_epoch_end(r.seq, in_u8(&r.in));
        break;
    case 10:
        put_u64(p, r.seq);
        emit(MAIN, FRAME_ABORT, p, 8);
        break;
    case 11:
        attach(handle, in_u8(&r.in) & 1);
        break;
    case 12:
        put_u32(p, handle);
        emit(1, FRAME_DETACH, p, 4);
        break;
    case 13:
        some_request(FRAME_PIN);
        break;
    case 14:
        some_request(FRAME_READ);
        break;
    case 15:
        some_request(FRAME_HASH);
        break;
    case 16:
        some_request(FRAME_UNPIN);
        break;
    case 17:
        some_request(handle ? FRAME_LIST : FRAME_REMOVE);
        break;
    case 18:
        some_control(FRAME_CLOSE);
        break;
    case 19:
        some_control(handle & 1 ? FRAME_PING : FRAME_WINDOW_MORE);
        break;
    case 20:
        some_bytes(true);
        break;
    case 21:
        if (!handle)
            some_bytes(false);
        break;
    case 22:
        quiet();
        break;
    default:
        if (!handle) {
            hang_up();
            begin();
            second_begins();
        }
    }
}

int LLVMFuzzerInitialize(int *argc, char ***argv);
int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc;
    (void)argv;
    setenv("MEMSYNC_LOG", "off", 1);
    log_setup("fuzz");
    signal(SIGPIPE, SIG_IGN);
    return 0;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    if (size < 2 || size > 4096)
        return 0;
    for (size_t i = 0; i < r.sent_n; i++)
        model_drop(&r.sent[i]);
    memset(&r, 0, sizeof r);
    r.in = (struct in){data, data + size};
    r.client = (struct peer){.fd = -1, .frame = on_frame, .arg = &r.client};
    r.second = (struct peer){.fd = -1, .frame = on_frame, .arg = &r.second};
    world_open(&r.world);
    other_begins();
    r.second_is = in_u8(&r.in) % 3;
    begin();
    first_epoch();
    second_begins();
    for (unsigned n = 0; n < OPS && in_left(&r.in) && r.client.fd >= 0; n++)
        step();
    quiet();
    hang_up();
    check_other();
    peer_close(&r.other);
    world_close(&r.world);
    model_drop(&r.open);
    return 0;
}
