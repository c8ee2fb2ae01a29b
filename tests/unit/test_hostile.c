/* A client that lies, to a real agent with either store. Each case is a connection of its own that has attached a
 * region of four pages for writing; what it does must be refused as the table says. After each, its region is what it
 * was, another client has lost nothing and goes on writing, and not a byte of that one's region has come to the liar.
 *
 * What a liar can learn: whether a page of its own region has the hash that it names, by DURABLE or FAILED of a
 * reference or delta. It may read that region anyway. A reference is resolved within the one region that the epoch's
 * handle names and for which it has the lease, so that a hash of somebody else's page, however come by, is refused like
 * any wrong one. */
#include "tests/unit/rawpeer.h"

#include <fcntl.h>
#include <ftw.h>
#include <lz4.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <xxhash.h>

#define OWN 4u /* pages of the liar's region */
#define EPOCH_STREAM 2u
#define ASK 9u
#define FROM_OTHER 0xe7

static struct world {
    pid_t agent;
    unsigned port;
    char dir[64];
    struct raw other, liar;
    uint64_t other_epoch, other_fence, epoch, fence, seq;
    struct id token;
    uint32_t pin;
} w;

static void greet(struct raw *r, uint8_t identity)
{
    uint8_t p[512];
    struct frame_hello hello = {.version = FRAME_VERSION, .identity = {{identity, 1}}, .host = "test"}, server;
    raw_dial(r, w.port);
    raw_say(r, 0, FRAME_HELLO, p, frame_hello_put(p, sizeof p, &hello));
    assert_true(raw_hear(r));
    assert_int_equal(r->h.type, FRAME_HELLO);
    assert_int_equal(frame_hello_get(r->p, r->h.len, &server), 0);
    w.token = server.token;
}

static struct frame_attached attach(struct raw *r, uint32_t handle, const char *name, bool write)
{
    uint8_t p[NAME_CAP + 16];
    struct frame_attach a = {.handle = handle, .write = write};
    struct frame_attached to;
    snprintf(a.name, sizeof a.name, "%s", name);
    raw_say(r, 1, FRAME_ATTACH, p, frame_attach_put(p, sizeof p, &a));
    assert_true(raw_hear(r));
    assert_int_equal(r->h.type, FRAME_ATTACHED);
    assert_int_equal(frame_attached_get(r->p, r->h.len, &to), 0);
    return to;
}

/* Parts of epochs */

static void begin(struct raw *r)
{
    uint8_t p[8];
    put_u64(p, ++w.seq);
    raw_say(r, EPOCH_STREAM, FRAME_BEGIN, p, 8);
}

static void end(struct raw *r, uint64_t count)
{
    uint8_t p[16];
    put_u64(p, w.seq);
    put_u64(p + 8, count);
    raw_say(r, EPOCH_STREAM, FRAME_END, p, 16);
}

static void create(struct raw *r, uint32_t handle)
{
    uint8_t p[64];
    struct frame_op o = {.kind = FRAME_OP_CREATE, .handle = handle, .lineage = {{(uint8_t)handle, 5}}};
    raw_say(r, EPOCH_STREAM, FRAME_OP, p, frame_op_put(p, sizeof p, &o));
}

static void region(struct raw *r, struct frame_region g)
{
    uint8_t p[64];
    g.min_size = g.min_size ? g.min_size : UINT64_MAX;
    raw_say(r, EPOCH_STREAM, FRAME_REGION, p, frame_region_put(p, sizeof p, &g));
}

static void pages(struct raw *r, uint32_t handle, struct frame_extent e, const void *data, size_t len)
{
    static uint8_t p[FRAME_PAYLOAD_MAX];
    size_t head = frame_pages_put(p, sizeof p, handle, &e, 1);
    memcpy(p + head, data, len);
    raw_say(r, EPOCH_STREAM, FRAME_PAGES, p, head + len);
}

static void fill(uint8_t *to, uint32_t count, int with)
{
    for (uint32_t i = 0; i < count; i++)
        memset(to + i * FRAME_PAGE, with + (int)i, FRAME_PAGE);
}

/* Pages of the region: bytes 1, 2, 3 and so on for the liar's, FROM_OTHER in all of the other's. */
static void whole(struct raw *r, uint32_t handle, uint64_t epoch, uint64_t fence, int with)
{
    static uint8_t data[OWN * FRAME_PAGE];
    fill(data, OWN, with);
    if (with == FROM_OTHER)
        memset(data, with, sizeof data);
    begin(r);
    if (epoch == 1)
        create(r, handle);
    region(r, (struct frame_region){
                  .handle = handle, .epoch = epoch, .base = epoch - 1, .fence = fence, .size = sizeof data});
    pages(r, handle, (struct frame_extent){.len = sizeof data}, data, sizeof data);
    end(r, epoch == 1 ? 3 : 2);
    for (int i = 0; i < 2; i++) {
        struct frame_failed f;
        assert_true(raw_hear(r));
        if (r->h.type == FRAME_FAILED && !frame_failed_get(r->p, r->h.len, &f))
            fail_msg("an epoch that is good: %s", f.text);
        assert_int_equal(r->h.type, i ? FRAME_DURABLE : FRAME_RECEIVED);
    }
}

static void page_hash(uint8_t to[16], int byte)
{
    uint8_t page[FRAME_PAGE];
    XXH128_canonical_t sum;
    memset(page, byte, sizeof page);
    XXH128_canonicalFromHash(&sum, XXH3_128bits(page, sizeof page));
    memcpy(to, &sum, 16);
}

/* Epochs of the liar's, whose one PAGES is to be refused */

static void own_region(uint64_t size, uint64_t min)
{
    begin(&w.liar);
    region(&w.liar,
           (struct frame_region){
               .handle = 1, .epoch = w.epoch + 1, .base = w.epoch, .fence = w.fence, .size = size, .min_size = min});
}

static void copy_page(uint64_t to, uint64_t source, int byte)
{
    uint8_t data[FRAME_COPY_BYTES];
    put_u64(data, source);
    page_hash(data + 8, byte);
    pages(&w.liar, 1, (struct frame_extent){.offset = to, .len = FRAME_PAGE, .kind = FRAME_PAGES_COPY}, data,
          sizeof data);
}

static void copy_with(uint64_t source, int byte)
{
    own_region(OWN * FRAME_PAGE, 0);
    copy_page(0, source, byte);
    end(&w.liar, 2);
}

static void delta_page(uint64_t offset, int byte)
{
    uint8_t data[FRAME_DELTA_HEAD + FRAME_DELTA_BLOCK];
    page_hash(data, byte);
    put_u32(data + 16, 1);
    memset(data + FRAME_DELTA_HEAD, byte, FRAME_DELTA_BLOCK);
    pages(&w.liar, 1, (struct frame_extent){.offset = offset, .len = FRAME_PAGE, .kind = FRAME_PAGES_DELTA}, data,
          sizeof data);
}

static void copy_of_others_hash(void)
{
    copy_with(FRAME_PAGE, FROM_OTHER);
}
static void copy_beyond_the_end(void)
{
    copy_with(OWN * FRAME_PAGE, FROM_OTHER);
}
static void copy_far_beyond(void)
{
    copy_with(((uint64_t)INT64_MAX >> 12 << 12) - FRAME_PAGE, FROM_OTHER);
}
static void copy_from_two_to_the_64(void)
{
    copy_with(UINT64_MAX, FROM_OTHER);
}
static void copy_of_no_whole_page(void)
{
    copy_with(128, 1);
}

static void copy_of_what_was_never_written(void)
{
    own_region(64 * FRAME_PAGE, 0);
    copy_page(0, 32 * FRAME_PAGE, FROM_OTHER);
    end(&w.liar, 2);
}

static void copy_into_new_region(void)
{
    begin(&w.liar);
    create(&w.liar, 1);
    region(&w.liar, (struct frame_region){.handle = 1, .epoch = 1, .fence = w.fence, .size = OWN * FRAME_PAGE});
    copy_page(0, FRAME_PAGE, 2);
    end(&w.liar, 3);
}

static void copy_of_what_is_cut(void)
{
    own_region(OWN * FRAME_PAGE, FRAME_PAGE);
    copy_page(0, FRAME_PAGE, FROM_OTHER);
    end(&w.liar, 2);
}

static void delta_with_wrong_hash(void)
{
    own_region(OWN * FRAME_PAGE, 0);
    delta_page(FRAME_PAGE, FROM_OTHER);
    end(&w.liar, 2);
}

static void delta_beyond_the_end(void)
{
    own_region(OWN * FRAME_PAGE, 0);
    delta_page(OWN * FRAME_PAGE, FROM_OTHER);
    end(&w.liar, 2);
}

static void delta_of_what_is_cut(void)
{
    own_region(OWN * FRAME_PAGE, FRAME_PAGE);
    delta_page(FRAME_PAGE, 2);
    end(&w.liar, 2);
}

static void pages_at_two_to_the_64(void)
{
    uint8_t byte[8] = {0};
    own_region(OWN * FRAME_PAGE, 0);
    pages(&w.liar, 1, (struct frame_extent){.offset = UINT64_MAX - 7, .len = 8}, byte, 8);
    end(&w.liar, 2);
}

static void pages_that_promise_more(void)
{
    uint8_t byte[8] = {0};
    own_region(OWN * FRAME_PAGE, 0);
    pages(&w.liar, 1, (struct frame_extent){.len = FRAME_PAGE}, byte, 8);
    end(&w.liar, 2);
}

static void pages_of_too_many_entries(void)
{
    uint8_t p[FRAME_PAGES_HEAD];
    own_region(OWN * FRAME_PAGE, 0);
    put_u32(p, 1);
    put_u32(p + 4, UINT32_MAX);
    raw_say(&w.liar, EPOCH_STREAM, FRAME_PAGES, p, sizeof p);
    end(&w.liar, 2);
}

static void pages_of_others_handle(void)
{
    uint8_t byte[8] = {0};
    own_region(OWN * FRAME_PAGE, 0);
    pages(&w.liar, 2, (struct frame_extent){.len = 8}, byte, 8);
    end(&w.liar, 2);
}

static void region_of_others(void)
{
    begin(&w.liar);
    region(&w.liar,
           (struct frame_region){
               .handle = 2, .epoch = w.other_epoch + 1, .base = w.other_epoch, .fence = w.other_fence, .size = 1});
    end(&w.liar, 1);
}

static void region_with_wrong_fence(void)
{
    begin(&w.liar);
    region(&w.liar,
           (struct frame_region){.handle = 1, .epoch = w.epoch + 1, .base = w.epoch, .fence = w.fence + 1, .size = 1});
    end(&w.liar, 1);
}

static void region_from_another_epoch(void)
{
    begin(&w.liar);
    region(&w.liar,
           (struct frame_region){.handle = 1, .epoch = w.epoch + 2, .base = w.epoch + 1, .fence = w.fence, .size = 1});
    end(&w.liar, 1);
}

static void region_of_two_to_the_64(void)
{
    own_region(UINT64_MAX, 0), end(&w.liar, 1);
}
static void end_that_counts_wrongly(void)
{
    own_region(OWN * FRAME_PAGE, 0), end(&w.liar, UINT64_MAX);
}

static void packed(uint32_t length, const void *block, size_t len)
{
    uint8_t p[64];
    own_region(OWN * FRAME_PAGE, 0);
    put_u32(p, length);
    memcpy(p + FRAME_PACKED_HEAD, block, len);
    raw_say(&w.liar, EPOCH_STREAM, FRAME_PACKED, p, FRAME_PACKED_HEAD + len);
    end(&w.liar, 2);
}

static void packed_that_is_less(void)
{
    char block[64] = {0};
    uint8_t out[48];
    packed(FRAME_PAYLOAD_MAX, out, (size_t)LZ4_compress_default(block, (char *)out, sizeof block, sizeof out));
}

static void packed_that_is_more(void)
{
    static char block[32768];
    uint8_t out[48];
    static char all[32768];
    int n = LZ4_compress_default(block, all, sizeof block, sizeof all);
    memcpy(out, all, 48); /* of a block that goes on */
    packed(64, out, n < 48 ? (size_t)n : 48);
}

static void packed_bomb(void)
{
    packed(UINT32_MAX, "\x1f\x00\x01\x00\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff", 14);
}
static void packed_rubbish(void)
{
    packed(4096, "\xf0\xff\xff\xff\xff\xff\xff", 7);
}

/* Requests */

static void ask_name(uint8_t type, const char *name, int force)
{
    uint8_t p[NAME_CAP + 16];
    struct wr to = wr_over(p, sizeof p);
    wr_u32(&to, 77);
    wr_str(&to, name);
    if (force >= 0)
        wr_u8(&to, (uint8_t)force);
    raw_say(&w.liar, ASK, type, p, wr_len(&to));
}

static void read_at(uint32_t pin, uint64_t offset, uint32_t len)
{
    uint8_t p[20];
    put_u32(p, 77);
    put_u32(p + 4, pin);
    put_u64(p + 8, offset);
    put_u32(p + 16, len);
    raw_say(&w.liar, ASK, FRAME_READ, p, sizeof p);
}

static void hash_of(uint32_t pin, uint64_t first, uint32_t count, uint8_t level, uint8_t fresh)
{
    uint8_t p[32];
    struct frame_hash h = {.request = 77, .pin = pin, .first = first, .count = count, .level = level, .fresh = fresh};
    raw_say(&w.liar, ASK, FRAME_HASH, p, frame_hash_put(p, sizeof p, &h));
}

static void pin_own(void)
{
    uint32_t request;
    struct frame_entry e;
    ask_name(FRAME_PIN, "own", -1);
    assert_true(raw_hear(&w.liar));
    assert_int_equal(frame_pinned_get(w.liar.p, w.liar.h.len, &request, &w.pin, &e), 0);
}

/* The other has pinned its region; pins are of one connection. */
static void read_others_pin(void)
{
    read_at(1, 0, FRAME_PAGE);
}
static void read_no_pin(void)
{
    read_at(0, 0, FRAME_PAGE);
}
static void read_from_two_to_the_64(void)
{
    pin_own(), read_at(w.pin, UINT64_MAX, FRAME_PAGE);
}
static void read_nothing(void)
{
    pin_own(), read_at(w.pin, 0, 0);
}
static void read_too_much(void)
{
    pin_own(), read_at(w.pin, 0, UINT32_MAX);
}
static void read_what_is_given_back(void)
{
    uint8_t p[4];
    pin_own();
    put_u32(p, w.pin);
    raw_say(&w.liar, ASK, FRAME_UNPIN, p, 4);
    read_at(w.pin, 0, FRAME_PAGE);
}
static void hash_others_pin(void)
{
    hash_of(1, 0, 1, 0, 0);
}
static void hash_of_no_level(void)
{
    pin_own(), hash_of(w.pin, 0, 1, FRAME_HASH_LEVELS, 0);
}
static void hash_of_level_255(void)
{
    pin_own(), hash_of(w.pin, 0, 1, 255, 0);
}
static void hash_neither_fresh_nor_not(void)
{
    pin_own(), hash_of(w.pin, 0, 1, 0, 2);
}
static void hash_from_two_to_the_64(void)
{
    pin_own(), hash_of(w.pin, UINT64_MAX, 1, 0, 0);
}
static void hash_too_many(void)
{
    pin_own(), hash_of(w.pin, 0, UINT32_MAX, 0, 0);
}
static void remove_others(void)
{
    ask_name(FRAME_REMOVE, "other", 0);
}
static void pin_above(void)
{
    ask_name(FRAME_PIN, "../other", -1);
}

/* The connection itself */

static void join(const struct id *token)
{
    raw_end(&w.liar);
    raw_dial(&w.liar, w.port);
    raw_say(&w.liar, 0, FRAME_JOIN, token->b, sizeof token->b);
    assert_true(raw_hear(&w.liar)); /* the greeting, which each side sends unasked */
}

static void join_with_zeros(void)
{
    join(&(struct id){{0}});
}
static void join_with_a_guess(void)
{
    w.token.b[15] ^= 1;
    join(&w.token);
}
static void join_what_has_ended(void)
{
    struct id token = w.token;
    raw_end(&w.liar);
    raw_dial(&w.liar, w.port); /* a new one, by whose greeting the end of the last has been seen */
    assert_true(raw_hear(&w.liar));
    join(&token);
}
static void join_within(void)
{
    raw_say(&w.liar, 0, FRAME_JOIN, w.token.b, sizeof w.token.b);
}
static void greet_twice(void)
{
    uint8_t p[512];
    struct frame_hello hello = {.version = FRAME_VERSION, .identity = {{9}}, .host = "test"};
    raw_say(&w.liar, 0, FRAME_HELLO, p, frame_hello_put(p, sizeof p, &hello));
}
static void header_of_four_gigabytes(void)
{
    uint8_t header[FRAME_HEADER];
    frame_header_put(header, FRAME_PAGES, EPOCH_STREAM, 0, UINT32_MAX, 0);
    raw_bytes(&w.liar, header, sizeof header);
}
static void wrong_checksum(void)
{
    uint8_t frame[FRAME_HEADER + 8] = {0};
    frame_header_put(frame, FRAME_BEGIN, EPOCH_STREAM, 0, 8, 0);
    raw_bytes(&w.liar, frame, sizeof frame);
}
static void more_window_than_was_taken(void)
{
    uint8_t p[8];
    put_u32(p, 1);
    put_u32(p + 4, UINT32_MAX);
    raw_say(&w.liar, 0, FRAME_WINDOW_MORE, p, 8);
}
/* Frames of which the first never comes wait for it, up to 64 MiB of them (CONN_EARLY_MAX). */
static void order_with_a_hole(void)
{
    static uint8_t p[FRAME_PAYLOAD_MAX];
    for (uint32_t i = 1; i < 1200; i++)
        raw_frame(&w.liar, EPOCH_STREAM, i, FRAME_PAGES, p, sizeof p);
}
static void begin_within(void)
{
    begin(&w.liar), begin(&w.liar);
}
static void what_servers_say(void)
{
    uint8_t p[8] = {0};
    raw_say(&w.liar, EPOCH_STREAM, FRAME_DURABLE, p, 8);
}

enum { ENDS = 1000 }; /* ERROR, and the connection ends; else the code of FAILED */
static const struct hostile {
    const char *name;
    void (*act)(void);
    unsigned answer;
} cases[] = {
#define CASE(name, answer)                                                                                             \
    {                                                                                                                  \
#name, name, answer                                                                                            \
    }
    CASE(copy_of_others_hash, FRAME_E_DELTA),
    CASE(copy_beyond_the_end, FRAME_E_PROTOCOL),
    CASE(copy_far_beyond, FRAME_E_PROTOCOL),
    CASE(copy_from_two_to_the_64, FRAME_E_PROTOCOL),
    CASE(copy_of_no_whole_page, FRAME_E_PROTOCOL),
    CASE(copy_of_what_was_never_written, FRAME_E_PROTOCOL),
    CASE(copy_into_new_region, FRAME_E_PROTOCOL),
    CASE(copy_of_what_is_cut, FRAME_E_PROTOCOL),
    CASE(delta_with_wrong_hash, FRAME_E_DELTA),
    CASE(delta_beyond_the_end, FRAME_E_DELTA),
    CASE(delta_of_what_is_cut, FRAME_E_DELTA),
    CASE(pages_at_two_to_the_64, FRAME_E_PROTOCOL),
    CASE(pages_that_promise_more, FRAME_E_PROTOCOL),
    CASE(pages_of_too_many_entries, FRAME_E_PROTOCOL),
    CASE(pages_of_others_handle, FRAME_E_PROTOCOL),
    CASE(region_of_others, FRAME_E_FENCED),
    CASE(region_with_wrong_fence, FRAME_E_FENCED),
    CASE(region_from_another_epoch, FRAME_E_LINEAGE),
    CASE(region_of_two_to_the_64, FRAME_E_PROTOCOL),
    CASE(end_that_counts_wrongly, FRAME_E_PROTOCOL),
    CASE(packed_that_is_less, ENDS),
    CASE(packed_that_is_more, ENDS),
    CASE(packed_bomb, ENDS),
    CASE(packed_rubbish, ENDS),
    CASE(read_others_pin, FRAME_E_NOT_FOUND),
    CASE(read_no_pin, FRAME_E_NOT_FOUND),
    CASE(read_from_two_to_the_64, FRAME_E_PROTOCOL),
    CASE(read_nothing, FRAME_E_PROTOCOL),
    CASE(read_too_much, FRAME_E_PROTOCOL),
    CASE(read_what_is_given_back, FRAME_E_NOT_FOUND),
    CASE(hash_others_pin, FRAME_E_NOT_FOUND),
    CASE(hash_of_no_level, ENDS),
    CASE(hash_of_level_255, ENDS),
    CASE(hash_neither_fresh_nor_not, ENDS),
    CASE(hash_from_two_to_the_64, ENDS),
    CASE(hash_too_many, ENDS),
    CASE(remove_others, FRAME_E_FENCED),
    CASE(pin_above, FRAME_E_NAME),
    CASE(join_with_zeros, ENDS),
    CASE(join_with_a_guess, ENDS),
    CASE(join_what_has_ended, ENDS),
    CASE(join_within, ENDS),
    CASE(greet_twice, ENDS),
    CASE(header_of_four_gigabytes, ENDS),
    CASE(wrong_checksum, ENDS),
    CASE(more_window_than_was_taken, ENDS),
    CASE(order_with_a_hole, ENDS),
    CASE(begin_within, ENDS),
    CASE(what_servers_say, ENDS),
};

/* Nothing that the agent says to the liar has as much as four bytes of the other's in a row. */
static void learns_nothing(void)
{
    static const uint8_t four[4] = {FROM_OTHER, FROM_OTHER, FROM_OTHER, FROM_OTHER};
    if (memmem(w.liar.p, w.liar.h.len, four, sizeof four))
        fail_msg("an answer of type %u shows the other's bytes", w.liar.h.type);
}

static void refused(const struct hostile *c)
{
    struct frame_failed f;
    bool open;
    while ((open = raw_hear(&w.liar))) {
        learns_nothing();
        if (w.liar.h.type == FRAME_FAILED || w.liar.h.type == FRAME_ERROR)
            break;
        if (w.liar.h.type != FRAME_RECEIVED && w.liar.h.type != FRAME_HELLO)
            fail_msg("%s: an answer of type %u", c->name, w.liar.h.type);
    }
    if (!open)
        fail_msg("%s: hung up on without a word", c->name);
    assert_int_equal(frame_failed_get(w.liar.p, w.liar.h.len, &f), 0);
    if (c->answer == ENDS ? w.liar.h.type != FRAME_ERROR : w.liar.h.type != FRAME_FAILED || f.code != c->answer)
        fail_msg("%s: type %u, code %u instead of %u: %s", c->name, w.liar.h.type, f.code, c->answer, f.text);
    assert_true(f.text[0]);
    if (c->answer == ENDS) {
        shutdown(w.liar.fd, SHUT_WR); /* or it would give us a second to do so */
        assert_false(raw_hear(&w.liar));
    }
}

/* Seen by a third: the liar's region is as it was. */
static void unharmed(const char *name)
{
    uint8_t p[64];
    struct raw reader;
    uint32_t request, pin;
    struct frame_entry e;
    struct wr to = wr_over(p, sizeof p);
    greet(&reader, 3);
    wr_u32(&to, 1);
    wr_str(&to, "own");
    raw_say(&reader, ASK, FRAME_PIN, p, wr_len(&to));
    assert_true(raw_hear(&reader));
    assert_int_equal(frame_pinned_get(reader.p, reader.h.len, &request, &pin, &e), 0);
    if (e.epoch != w.epoch || e.size != OWN * FRAME_PAGE)
        fail_msg("%s: the region is at epoch %llu now", name, (unsigned long long)e.epoch);
    put_u32(p, 2);
    put_u32(p + 4, pin);
    put_u64(p + 8, 0);
    put_u32(p + 16, OWN * FRAME_PAGE);
    raw_say(&reader, ASK, FRAME_READ, p, 20);
    assert_true(raw_hear(&reader));
    static uint8_t want[OWN * FRAME_PAGE];
    fill(want, OWN, 1);
    assert_int_equal(reader.h.len, 9 + sizeof want);
    if (memcmp(reader.p + 9, want, sizeof want))
        fail_msg("%s: the region was changed", name);
    raw_end(&reader);
}

static void liars_are_refused(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        greet(&w.liar, 2);
        struct frame_attached a = attach(&w.liar, 1, "own", true);
        assert_true(a.status <= FRAME_ATTACH_EXISTS);
        w.fence = a.fence;
        assert_int_equal(attach(&w.liar, 2, "other", true).status, FRAME_ATTACH_HELD);
        assert_int_equal(attach(&w.liar, 2, "other", false).status, FRAME_ATTACH_EXISTS);
        if (a.status == FRAME_ATTACH_NONE) {
            whole(&w.liar, 1, 1, w.fence, 1);
            w.epoch = 1;
        }
        cases[i].act();
        refused(&cases[i]);
        raw_end(&w.liar);
        unharmed(cases[i].name);
        whole(&w.other, 1, ++w.other_epoch, w.other_fence, FROM_OTHER);
    }
}

/* An agent of its own for each store */

static int start(void **state)
{
    char line[256] = "", store[128], path[512];
    int out[2];
    memset(&w, 0, sizeof w);
    snprintf(w.dir, sizeof w.dir, "/tmp/memsync-hostile.XXXXXX");
    assert_non_null(mkdtemp(w.dir));
    snprintf(store, sizeof store, strcmp(*state, "file:") ? "%s" : "%s%s/store", (const char *)*state, w.dir);
    snprintf(path, sizeof path, "%s/memsync-agent", getenv("BUILD") ? getenv("BUILD") : "build");
    assert_int_equal(pipe(out), 0);
    w.agent = fork();
    if (!w.agent) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        dup2(out[1], 1);
        close(out[0]);
        close(out[1]);
        setenv("XDG_STATE_HOME", w.dir, 1);
        setenv("MEMSYNC_LOG", "off", 1);
        execl(path, path, "--listen", "127.0.0.1:0", "--store", store, NULL);
        _exit(127);
    }
    close(out[1]);
    FILE *f = fdopen(out[0], "r");
    assert_non_null(fgets(line, sizeof line, f));
    assert_int_equal(sscanf(line, "listening wire 127.0.0.1:%u", &w.port), 1);
    fclose(f);
    uint8_t p[64];
    greet(&w.other, 7);
    w.other_fence = attach(&w.other, 1, "other", true).fence;
    whole(&w.other, 1, ++w.other_epoch, w.other_fence, FROM_OTHER);
    struct wr to = wr_over(p, sizeof p);
    wr_u32(&to, 1);
    wr_str(&to, "other");
    raw_say(&w.other, ASK, FRAME_PIN, p, wr_len(&to));
    return raw_hear(&w.other) && w.other.h.type == FRAME_PINNED ? 0 : -1;
}

static int remove_one(const char *path, const struct stat *st, int kind, struct FTW *at)
{
    (void)st;
    (void)kind;
    (void)at;
    return remove(path);
}

static int stop(void **state)
{
    int status = 0;
    (void)state;
    raw_end(&w.other);
    kill(w.agent, SIGTERM);
    waitpid(w.agent, &status, 0);
    nftw(w.dir, remove_one, 16, FTW_DEPTH | FTW_PHYS);
    return WIFEXITED(status) && !WEXITSTATUS(status) ? 0 : -1;
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        {"mem: liars are refused", liars_are_refused, start, stop, "mem:"},
        {"file: liars are refused", liars_are_refused, start, stop, "file:"},
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
