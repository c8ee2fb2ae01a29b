/* The client's side of the block device protocol: what servers really say, byte by byte and at once, and what none
 * should. The exchanges are those of nbdkit and qemu-nbd, but for the sizes of what is read. */
#include "tests/unit/codec.h"
#include "wire/nbd_client.h"

#include <stdio.h>

struct bytes {
    const char *at;
    size_t len;
};
#define B(literal)                                                                                                     \
    {                                                                                                                  \
        literal, sizeof(literal) - 1                                                                                   \
    }

/* ---- the handshake ---- */

#define NEWSTYLE "NBDMAGICIHAVEOPT"
#define GREETING NEWSTYLE "\0\3"
#define REPLY(option, reply, len) "\0\3\xe8\x89\x04\x55\x65\xa9\0\0\0" option reply "\0\0\0" len
#define ACK(option) REPLY(option, "\0\0\0\1", "\0")
#define UNSUP(option) REPLY(option, "\x80\0\0\1", "\0")
#define INFO(len) REPLY("\7", "\0\0\0\3", len)
#define EXPORT INFO("\xc") "\0\0\0\0\0\0\0\1\0\0\xd\xed"
#define ALLOCATION(id) REPLY("\xa", "\0\0\0\4", "\x13") "\0\0\0" id "base:allocation"

#define OPTION(option, len) "IHAVEOPT\0\0\0" option "\0\0\0" len
#define STRUCTURED OPTION("\x8", "\0")
#define CONTEXT                                                                                                        \
    OPTION("\xa", "\x1c")                                                                                              \
    "\0\0\0\1r\0\0\0\1\0\0\0\xf"                                                                                       \
    "base:allocation"
#define GO OPTION("\7", "\x9") "\0\0\0\1r\0\1\0\3"
#define NAME OPTION("\1", "\1") "r"
#define FLAGS "\0\0\0\3"

#define ZEROS_4 "\0\0\0\0"
#define ZEROS_124                                                                                                      \
    ZEROS_4 ZEROS_4 ZEROS_4 ZEROS_4 ZEROS_4 ZEROS_4 ZEROS_4 ZEROS_4 ZEROS_4 ZEROS_4 ZEROS_4 ZEROS_4 ZEROS_4 ZEROS_4    \
        ZEROS_4 ZEROS_4 ZEROS_4 ZEROS_4 ZEROS_4 ZEROS_4 ZEROS_4 ZEROS_4 ZEROS_4 ZEROS_4 ZEROS_4 ZEROS_4 ZEROS_4        \
            ZEROS_4 ZEROS_4 ZEROS_4 ZEROS_4

/* One end of a handshake, and all that came of it. */
struct end {
    struct nbd_hello h;
    char sent[32768], listed[256];
    size_t sent_len, used;
};

static void hello_feed(struct end *e, const char *server, size_t have)
{
    for (;;) {
        uint8_t *in = exact(server + e->used, have - e->used), *out = malloc(NBD_HELLO_SEND);
        size_t sent = 77;
        int64_t n = nbd_hello_step(&e->h, in, have - e->used, out, &sent);
        assert_true(n <= (int64_t)(have - e->used) && sent <= NBD_HELLO_SEND && (n > 0 || !sent));
        assert_int_equal(n < 0, e->h.phase == NBD_REFUSED);
        memcpy(e->sent + e->sent_len, out, sent);
        e->sent_len += sent;
        if (e->h.listed) {
            size_t at = strlen(e->listed);
            snprintf(e->listed + at, sizeof e->listed - at, "%.*s,", (int)e->h.listed_len, (const char *)e->h.listed);
        }
        e->h.listed = NULL;
        free(in);
        free(out);
        if (n <= 0)
            return;
        e->used += (size_t)n;
    }
}

static void hello_run(struct end *e, const char *name, bool list, struct bytes server, bool at_once)
{
    memset(e, 0, sizeof *e);
    e->h.name = name;
    e->h.list = list;
    for (size_t have = at_once ? server.len : 0; have <= server.len; have++)
        hello_feed(e, server.at, have);
}

/* Both ways, with the same result, which is left in `e`. */
static void hello_both(struct end *e, const char *what, const char *name, bool list, struct bytes server)
{
    static struct end parts;
    hello_run(e, name, list, server, true);
    hello_run(&parts, name, list, server, false);
    if (memcmp(e, &parts, sizeof parts))
        fail_msg("%s: byte by byte it is another handshake", what);
}

static void test_handshakes(void **state)
{
    (void)state;
    static struct end e;
    static const struct {
        const char *what;
        bool list;
        struct bytes server, client;
        enum nbd_hello_phase phase;
        bool structured, allocation;
        uint32_t context;
        uint64_t size;
        uint16_t flags;
        uint32_t min, preferred, max;
        const char *listed;
    } table[] = {
        {"nbdkit", false, B(GREETING ACK("\x8") ALLOCATION("\1") ACK("\xa") EXPORT ACK("\7")),
         B(FLAGS STRUCTURED CONTEXT GO), NBD_GRANTED, true, true, 1, 65536, 0xded, 1, 4096, 32 << 20, ""},
        {"qemu-nbd, which tells its blocks", false,
         B(GREETING ACK("\x8") ALLOCATION("\0") ACK("\xa")
               INFO("\xe") "\0\3\0\0\2\0\0\0\x10\0\1\xff\xff\xff" EXPORT ACK("\7")),
         B(FLAGS STRUCTURED CONTEXT GO), NBD_GRANTED, true, true, 0, 65536, 0xded, 512, 4096, 0x1fffe00, ""},
        {"blocks without an end, other information", false,
         B(GREETING UNSUP("\x8")
               INFO("\xe") "\0\3\0\0\1\0\0\0\2\0\xff\xff\xff\xff" INFO("\3") "\0\1r" EXPORT ACK("\7")),
         B(FLAGS STRUCTURED GO), NBD_GRANTED, false, false, 0, 65536, 0xded, 256, 512, 32 << 20, ""},
        {"no structured replies", false, B(GREETING UNSUP("\x8") EXPORT ACK("\7")), B(FLAGS STRUCTURED GO), NBD_GRANTED,
         false, false, 0, 65536, 0xded, 1, 4096, 32 << 20, ""},
        {"no contexts", false, B(GREETING ACK("\x8") UNSUP("\xa") EXPORT ACK("\7")), B(FLAGS STRUCTURED CONTEXT GO),
         NBD_GRANTED, true, false, 0, 65536, 0xded, 1, 4096, 32 << 20, ""},
        {"no such context", false, B(GREETING ACK("\x8") ACK("\xa") EXPORT ACK("\7")), B(FLAGS STRUCTURED CONTEXT GO),
         NBD_GRANTED, true, false, 0, 65536, 0xded, 1, 4096, 32 << 20, ""},
        {"no GO", false, B(GREETING ACK("\x8") UNSUP("\xa") UNSUP("\7") "\0\0\0\0\0\2\0\0\0\5"),
         B(FLAGS STRUCTURED CONTEXT GO NAME), NBD_GRANTED, true, false, 0, 131072, 5, 1, 4096, 32 << 20, ""},
        {"no GO, zeroes", false, B(NEWSTYLE "\0\1" UNSUP("\x8") UNSUP("\7") "\0\0\0\0\0\2\0\0\0\5" ZEROS_124),
         B("\0\0\0\1" STRUCTURED GO NAME), NBD_GRANTED, false, false, 0, 131072, 5, 1, 4096, 32 << 20, ""},
        {"not fixed", false,
         B(NEWSTYLE "\0\0"
                    "\0\0\0\0\0\1\0\0\xd\x6d" ZEROS_124),
         B("\0\0\0\0" NAME), NBD_GRANTED, false, false, 0, 65536, 0xd6d, 1, 4096, 32 << 20, ""},
        {"not fixed, no zeroes, no flags", false,
         B(NEWSTYLE "\0\2"
                    "\0\0\0\0\0\1\0\0\xd\x6c"),
         B("\0\0\0\2" NAME), NBD_GRANTED, false, false, 0, 65536, 0, 1, 4096, 32 << 20, ""},
        {"unknown bits in the greeting", false, B(NEWSTYLE "\xff\xff" UNSUP("\x8") EXPORT ACK("\7")),
         B(FLAGS STRUCTURED GO), NBD_GRANTED, false, false, 0, 65536, 0xded, 1, 4096, 32 << 20, ""},
        {"a list", true,
         B(GREETING REPLY("\3", "\0\0\0\2", "\5") "\0\0\0\1r" REPLY("\3", "\0\0\0\2", "\4")
               ZEROS_4 REPLY("\3", "\0\0\0\2", "\xd") "\0\0\0\3d/e"
                                                      "a note"
                                                      "" ACK("\3")),
         B(FLAGS OPTION("\3", "\0") OPTION("\2", "\0")), NBD_LISTED, false, false, 0, 0, 0, 1, 4096, 32 << 20,
         "r,,d/e,"},
        {"only begun", false, B(GREETING ACK("\x8") ALLOCATION("\1") ACK("\xa") EXPORT), B(FLAGS STRUCTURED CONTEXT GO),
         NBD_GO_ASKED, true, true, 1, 65536, 0xded, 1, 4096, 32 << 20, ""},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        hello_both(&e, table[i].what, "r", table[i].list, table[i].server);
        if (e.h.phase != table[i].phase || e.h.structured != table[i].structured ||
            e.h.allocation != table[i].allocation || e.h.context != table[i].context || e.h.size != table[i].size ||
            e.h.flags != table[i].flags)
            fail_msg("%s: phase %d, structured %d, context %d: %u, %llu bytes, flags %#x: %s", table[i].what, e.h.phase,
                     e.h.structured, e.h.allocation, e.h.context, (unsigned long long)e.h.size, e.h.flags, e.h.text);
        if (e.h.block_min != table[i].min || e.h.block_preferred != table[i].preferred ||
            e.h.block_max != table[i].max || strcmp(e.listed, table[i].listed))
            fail_msg("%s: blocks %u, %u, %u; listed: %s", table[i].what, e.h.block_min, e.h.block_preferred,
                     e.h.block_max, e.listed);
        if (e.sent_len != table[i].client.len || memcmp(e.sent, table[i].client.at, e.sent_len))
            fail_msg("%s: the client sends something else", table[i].what);
        assert_int_equal(e.used, table[i].server.len);
    }
}

/* What comes before the answer to GO, and to SET_META_CONTEXT. */
#define TO_GO GREETING UNSUP("\x8")
#define TO_CONTEXT GREETING ACK("\x8")
#define BLOCKS(sizes) TO_GO INFO("\xe") "\0\3" sizes

static void test_handshakes_refused(void **state)
{
    (void)state;
    static struct end e;
    static char longest[NBD_NAME_MAX + 2];
    static const struct {
        const char *what;
        bool list;
        struct bytes server;
        int err;
        const char *text; /* that it has to hold */
    } table[] = {
        {"ssh", false, B("SSH-2.0-OpenSSH\r\n"), -EPROTO, "no block device server"},
        {"only the first magic", false, B("NBDMAGICIHAVEOPS\0\3"), -EPROTO, "no block device server"},
        {"oldstyle", false, B("NBDMAGIC\0\0\x42\2\x81\x86\x12\x53\0\0\0\0\0\1\0\0\0\0\xd\x6d" ZEROS_124), -ENOTSUP,
         "old style"},
        {"a list of one too old", true, B(NEWSTYLE "\0\2"), -ENOTSUP, "too old"},
        {"no such export", false, B(TO_GO REPLY("\7", "\x80\0\0\6", "\x16") "export 'q' not present"), -ENOENT,
         "no such export: export 'q' not present"},
        {"TLS", false, B(GREETING REPLY("\x8", "\x80\0\0\5", "\0") REPLY("\7", "\x80\0\0\5", "\0")), -EACCES, "TLS"},
        {"the list is nobody's", true, B(GREETING REPLY("\3", "\x80\0\0\2", "\0")), -EACCES, "not allow"},
        {"its end", false, B(TO_GO REPLY("\7", "\x80\0\0\7", "\0")), -ESHUTDOWN, "shutting down"},
        {"blocks that it insists on", false, B(TO_GO REPLY("\7", "\x80\0\0\x8", "\0")), -ENOTSUP, "block sizes"},
        {"words for the terminal", false, B(TO_GO REPLY("\7", "\x80\0\0\6", "\6") "\x1b[2J\n\xff"), -ENOENT,
         ": ?[2J??"},
        {"an error that nobody knows", false, B(TO_GO REPLY("\7", "\x80\0\xff\xff", "\2") "hm"), -EPROTO,
         "0x8000ffff: hm"},
        {"another magic of a reply", false, B(GREETING "\0\3\xe8\x89\x04\x55\x65\xaa\0\0\0\x8\0\0\0\1\0\0\0\0"),
         -EPROTO, "no option that was sent"},
        {"a reply to another option", false, B(GREETING ACK("\7")), -EPROTO, "no option that was sent"},
        {"a reply that is too long", false, B(GREETING "\0\3\xe8\x89\x04\x55\x65\xa9\0\0\0\x8\0\0\0\1\0\1\0\1"),
         -EPROTO, "too long: 65537"},
        {"the longest one", false, B(TO_GO "\0\3\xe8\x89\x04\x55\x65\xa9\0\0\0\7\x80\0\0\6\xff\xff\xff\xff"), -EPROTO,
         "too long"},
        {"information before it is asked for", false, B(GREETING REPLY("\x8", "\0\0\0\3", "\2") "\0\5"), -EPROTO,
         "not asked"},
        {"a reply of no kind", false, B(TO_GO REPLY("\7", ZEROS_4, "\0")), -EPROTO, "not asked"},
        {"granted without a size", false, B(TO_GO ACK("\7")), -EPROTO, "without telling its size"},
        {"information of one byte", false, B(TO_GO INFO("\1") "\0"), -EPROTO, "out of form"},
        {"half a size", false, B(TO_GO INFO("\6") "\0\0\0\0\0\0"), -EPROTO, "out of form"},
        {"a size and more", false, B(TO_GO INFO("\xd") "\0\0\0\0\0\0\0\1\0\0\xd\xed!"), -EPROTO, "out of form"},
        {"a size with the top bit", false, B(TO_GO INFO("\xc") "\0\0\x80\0\0\0\0\0\0\0\xd\xed"), -EPROTO,
         "makes no sense"},
        {"the same of EXPORT_NAME", false, B(NEWSTYLE "\0\2\xff\xff\xff\xff\xff\xff\xff\xff\0\1"), -EPROTO,
         "makes no sense"},
        {"smallest block 0", false, B(BLOCKS("\0\0\0\0\0\0\x10\0\0\1\0\0")), -EPROTO, "block sizes"},
        {"smallest block 3", false, B(BLOCKS("\0\0\0\3\0\0\x10\0\0\1\0\0")), -EPROTO, "block sizes"},
        {"smallest block 128 KiB", false, B(BLOCKS("\0\2\0\0\0\2\0\0\0\x10\0\0")), -EPROTO, "block sizes"},
        {"smallest beyond largest", false, B(BLOCKS("\0\0\x10\0\0\0\x10\0\0\0\2\0")), -EPROTO, "block sizes"},
        {"preferred block 4097", false, B(BLOCKS("\0\0\2\0\0\0\x10\1\0\1\0\0")), -EPROTO, "block sizes"},
        {"largest block 1", false, B(BLOCKS("\0\0\0\1\0\0\2\0\0\0\0\1")), -EPROTO, "block sizes"},
        {"two block sizes", false, B(TO_GO INFO("\xa") "\0\3\0\0\2\0\0\0\x10\0"), -EPROTO, "out of form"},
        {"another context", false, B(TO_CONTEXT REPLY("\xa", "\0\0\0\4", "\x13") "\0\0\0\1base:allocatiom"), -EPROTO,
         "context"},
        {"a longer context", false, B(TO_CONTEXT REPLY("\xa", "\0\0\0\4", "\x14") "\0\0\0\1base:allocations"), -EPROTO,
         "context"},
        {"a context of no name", false, B(TO_CONTEXT REPLY("\xa", "\0\0\0\4", "\2") "\0\0"), -EPROTO, "context"},
        {"the context twice", false, B(TO_CONTEXT ALLOCATION("\1") ALLOCATION("\2")), -EPROTO, "context"},
        {"a name longer than its reply", true, B(GREETING REPLY("\3", "\0\0\0\2", "\5") "\0\0\0\2r"), -EPROTO,
         "name is out of form"},
        {"a listed name of 4 GiB", true, B(GREETING REPLY("\3", "\0\0\0\2", "\5") "\xff\xff\xff\xffr"), -EPROTO,
         "name is out of form"},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        hello_both(&e, table[i].what, "r", table[i].list, table[i].server);
        if (e.h.phase != NBD_REFUSED || e.h.err != table[i].err || !strstr(e.h.text, table[i].text))
            fail_msg("%s: phase %d, %d: %s", table[i].what, e.h.phase, e.h.err, e.h.text);
    }
    memset(longest, 'n', sizeof longest - 1);
    hello_both(&e, "name", longest, false, (struct bytes)B(GREETING));
    assert_int_equal(e.h.err, -EINVAL);
    assert_non_null(strstr(e.h.text, "longer than 4096"));
    longest[NBD_NAME_MAX] = 0;
    hello_both(&e, "name", longest, false, (struct bytes)B(TO_CONTEXT UNSUP("\xa") UNSUP("\7")));
    assert_int_equal(e.h.phase, NBD_NAME_SENT);
}

/* An answer that has no end, and words that fill all that a reply may be. */
static void test_handshake_bounds(void **state)
{
    (void)state;
    static struct end e;
    static const char info[] = INFO("\2") "\0\x9", denied[] = REPLY("\7", "\x80\0\0\6", "\0");
    static uint8_t words[NBD_REPLY_HEAD + NBD_HELLO_REPLY];
    uint8_t to[NBD_HELLO_SEND];
    size_t sent;
    hello_run(&e, "r", false, (struct bytes)B(TO_GO), true);
    struct nbd_hello other = e.h;
    for (uint32_t i = 0; i < NBD_HELLO_REPLIES; i++)
        assert_int_equal(nbd_hello_step(&e.h, (const uint8_t *)info, sizeof info - 1, to, &sent), sizeof info - 1);
    assert_int_equal(nbd_hello_step(&e.h, (const uint8_t *)info, sizeof info - 1, to, &sent), -EPROTO);
    assert_string_equal(e.h.text, "the server's answer has no end");
    memset(words, 'w', sizeof words);
    memcpy(words, denied, NBD_REPLY_HEAD);
    put_u32(words + 16, NBD_HELLO_REPLY);
    assert_int_equal(nbd_hello_step(&other, words, sizeof words - 1, to, &sent), 0);
    assert_int_equal(nbd_hello_step(&other, words, sizeof words, to, &sent), -ENOENT);
    assert_in_range(strlen(other.text), 150, NBD_SAID - 1);
}

/* ---- answers ---- */

#define SIMPLE(error, cookie) "\x67\x44\x66\x98\0\0\0" error "\0\0\0\0\0\0\0" cookie
#define CHUNK(done, type, cookie, len) "\x66\x8e\x33\xef\0" done type "\0\0\0\0\0\0\0" cookie "\0\0\0" len
#define LAST "\1"
#define MORE "\0"
#define NONE "\0\0"
#define DATA "\0\1"
#define HOLE "\0\2"
#define STATUS "\0\5"
#define ERROR "\x80\1"
#define ERROR_AT "\x80\2"
#define AT(low) "\0\0\0\0\0\0" low

/* What is under way in every case; `buf` is what a READ is to fill. */
struct under_way {
    struct nbd_asked asked;
    uint8_t buf[16], guard;
};

static const struct nbd_asked requests[] = {
    {.command = NBD_CMD_READ, .cookie = 1, .offset = 4088, .len = 16},
    {.command = NBD_CMD_BLOCK_STATUS, .cookie = 2, .offset = 0, .len = 65536},
    {.command = NBD_CMD_WRITE, .cookie = 3, .offset = 0, .len = 4},
    {.command = NBD_CMD_FLUSH, .cookie = 4},
    {.command = NBD_CMD_READ, .flags = NBD_CMD_FLAG_DF, .cookie = 5, .offset = 0, .len = 8},
    {.command = NBD_CMD_READ, .cookie = 6, .offset = 65535, .len = 2},
};
#define REQUESTS (sizeof requests / sizeof *requests)

static struct {
    struct nbd_talk talk;
    struct under_way w[REQUESTS];
    char log[2048]; /* what was said, as text */
    size_t log_len, used;
    struct under_way *filling;
    uint32_t at, left;
    bool done;
} t;

static __attribute__((format(printf, 1, 2))) void note(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    t.log_len += (size_t)vsnprintf(t.log + t.log_len, sizeof t.log - t.log_len, format, args);
    va_end(args);
    assert_true(t.log_len < sizeof t.log);
}

static struct nbd_asked *under_way(void *arg, uint64_t cookie)
{
    assert_ptr_equal(arg, &t);
    return cookie && cookie <= REQUESTS && t.w[cookie - 1].asked.cookie ? &t.w[cookie - 1].asked : NULL;
}

static void ended(struct under_way *u)
{
    note("%llu=%d", (unsigned long long)u->asked.cookie, u->asked.err);
    if (u->asked.command == NBD_CMD_READ && !u->asked.err) {
        note(" ");
        for (uint32_t i = 0; i < u->asked.len; i++)
            note("%c", u->buf[i] ? u->buf[i] : '.');
    }
    note("; ");
    u->asked.cookie = 0;
}

static void take(const struct nbd_answer *a)
{
    struct under_way *u = (struct under_way *)(void *)a->asked;
    assert_non_null(u);
    if (a->kind == NBD_ANSWER_DATA) {
        t.filling = u;
        t.at = a->at;
        t.left = a->len;
        t.done = a->done;
        return;
    }
    if (a->kind == NBD_ANSWER_HOLE) {
        assert_true(a->at <= u->asked.len && a->len <= u->asked.len - a->at);
        memset(u->buf + a->at, 0, a->len);
        note("hole %u+%u; ", a->at, a->len);
    }
    for (uint32_t i = 0; i < a->n; i++)
        note("%u/%u ", get_u32(a->extents + i * 8), get_u32(a->extents + i * 8 + 4));
    if (*a->text)
        note("(%s) ", a->text);
    if (a->done)
        ended(u);
}

/* The first `have` bytes have come. */
static void talk_feed(const char *server, size_t have)
{
    struct nbd_answer a;
    while (!t.talk.dead) {
        if (t.filling) {
            for (; t.left && t.used < have; t.left--)
                t.filling->buf[t.at++] = (uint8_t)server[t.used++];
            if (t.left)
                return;
            if (t.done)
                ended(t.filling);
            t.filling = NULL;
        }
        uint8_t *in = exact(server + t.used, have - t.used);
        int64_t n = nbd_answer_step(&t.talk, in, have - t.used, &a, under_way, &t);
        assert_true(n <= (int64_t)(have - t.used));
        if (n > 0)
            take(&a);
        free(in);
        if (!n)
            return;
        if (n > 0) {
            t.used += (size_t)n;
            continue;
        }
        assert_int_equal(n, -EPROTO);
        assert_true(t.talk.dead);
        note("%s", a.text);
        assert_int_equal(nbd_answer_step(&t.talk, (const uint8_t *)SIMPLE("\0", "\3"), 16, &a, under_way, &t), -EPROTO);
        assert_int_not_equal(*a.text, 0);
    }
}

static void talk_run(bool structured, struct bytes server, bool at_once)
{
    memset(&t, 0, sizeof t);
    t.talk.structured = t.talk.allocation = structured;
    t.talk.context = 7;
    for (size_t i = 0; i < REQUESTS; i++) {
        t.w[i].asked = requests[i];
        memset(t.w[i].buf, '-', sizeof t.w[i].buf);
    }
    for (size_t have = at_once ? server.len : 0; have <= server.len; have++)
        talk_feed(server.at, have);
}

static const struct {
    const char *what;
    bool structured;
    struct bytes server;
    const char *log;
} answers[] = {
    {"nbdkit", true,
     B(CHUNK(LAST, DATA, "\1", "\x18") AT("\xf\xf8") "0123456789abcdef" CHUNK(
         LAST, STATUS, "\2", "\xc") "\0\0\0\7\0\1\0\0\0\0\0\3" SIMPLE("\0", "\3") SIMPLE("\0", "\4")
           CHUNK(LAST, ERROR, "\6", "\6") "\0\0\0\x16\0\0" CHUNK(LAST, DATA, "\5", "\x10") AT("\0\0") "ABCDEFGH"),
     "1=0 0123456789abcdef; 65536/3 2=0; 3=0; 4=0; 6=-22; 5=0 ABCDEFGH; "},
    {"qemu-nbd", true,
     B(CHUNK(MORE, DATA, "\1", "\x10") AT("\xf\xf8") "AAAAAAAA" CHUNK(LAST, HOLE, "\1", "\xc")
           AT("\x10\0") "\0\0\0\x8" CHUNK(
               LAST, STATUS, "\2",
               "\x14") "\0\0\0\7\0\0\x10\0\0\0\0\0\0\0\xf0\0\0\0\0\3" CHUNK(LAST, ERROR, "\6",
                                                                            "\x1c") "\0\0\0\x16\0\x16"
                                                                                    "operation past EOF; Fr"),
     "hole 8+8; 1=0 AAAAAAAA........; 4096/0 61440/3 2=0; (operation past EOF; Fr) 6=-22; "},
    {"no structured replies", false,
     B(SIMPLE("\0", "\1") "0123456789abcdef" SIMPLE("\x5f", "\2") SIMPLE("\0", "\3") SIMPLE("\x1c", "\4")
           SIMPLE("\x16", "\6") SIMPLE("\0", "\5") "ABCDEFGH"),
     "1=0 0123456789abcdef; 2=-95; 3=0; 4=-28; 6=-22; 5=0 ABCDEFGH; "},
    {"pieces between those of others, backwards", true,
     B(CHUNK(MORE, DATA, "\1", "\xc") AT("\x10\4") "cdef" CHUNK(MORE, HOLE, "\6", "\xc")
           AT("\xff\xff") "\0\0\0\1" CHUNK(MORE, DATA, "\1", "\xc") AT("\xf\xf8") "0123" CHUNK(MORE, DATA, "\1", "\x10")
               AT("\xf\xfc") "456789ab" CHUNK(LAST, DATA, "\6", "\x9") "\0\0\0\0\0\1\0\0"
                                                                       "Z" CHUNK(LAST, NONE, "\1", "\0")),
     "hole 0+1; 6=0 .Z; 1=0 0123456789abcdef; "},
    {"an error after a piece, at a place, and one more", true,
     B(CHUNK(MORE, DATA, "\1", "\xc") AT("\xf\xf8") "0123" CHUNK(MORE, ERROR_AT, "\1", "\x10") "\0\0\0\5\0\2no" AT(
         "\xf\xfc") CHUNK(MORE, ERROR, "\1", "\6") "\0\0\0\x1c\0\0" CHUNK(LAST, NONE, "\1", "\0")),
     "(no) 1=-5; "},
    {"an error of a kind to come", true, B(CHUNK(LAST, "\x80\x77", "\2", "\xc") "\0\0\0\x6c\0\2onward"),
     "(on) 2=-108; "},
    {"an error that nobody knows, of a WRITE in pieces", true,
     B(CHUNK(LAST, ERROR, "\3", "\x8") "\0\0\1\0\0\2\x1b\n" CHUNK(LAST, NONE, "\4", "\0")), "(\?\?) 3=-5; 4=0; "},
    {"simple errors among pieces", true, B(SIMPLE("\5", "\1") SIMPLE("\x16", "\2")), "1=-5; 2=-22; "},
    {"a status that ends behind the request", true,
     B(CHUNK(LAST, STATUS, "\2", "\x14") "\0\0\0\7\0\0\x80\0\0\0\0\0\xff\xff\xff\xff\0\0\0\0"),
     "32768/0 4294967295/0 2=0; "},

    {"no answer", true, B("HTTP/1.1 400"), "the server sends what is no answer (0x48545450)"},
    {"pieces that were not agreed on", false, B(CHUNK(LAST, NONE, "\3", "\0")),
     "the server sends what is no answer (0x668e33ef)"},
    {"an unknown cookie", true, B(SIMPLE("\0", "\x9")), "the server answers what was not asked (cookie 0x9)"},
    {"an unknown cookie of a piece", true, B(CHUNK(LAST, NONE, "\0", "\0")),
     "the server answers what was not asked (cookie 0)"},
    {"an answer twice", true, B(SIMPLE("\0", "\3") SIMPLE("\0", "\3")),
     "3=0; the server answers what was not asked (cookie 0x3)"},
    {"simple data among pieces", true, B(SIMPLE("\0", "\1")), "the server answers in a form that was not agreed on"},
    {"a simple error after a piece", true,
     B(CHUNK(MORE, HOLE, "\1", "\xc") AT("\xf\xf8") "\0\0\0\1" SIMPLE("\5", "\1")),
     "hole 0+1; the server answers in a form that was not agreed on"},
    {"a simple end after an error", true, B(CHUNK(MORE, ERROR, "\3", "\6") "\0\0\0\5\0\0" SIMPLE("\0", "\3")),
     "the server answers in a form that was not agreed on"},
    {"a status without one", false, B(SIMPLE("\0", "\2")), "the server's answer is not whole"},
    {"data before the request", true, B(CHUNK(MORE, DATA, "\1", "\x9") AT("\xf\xf7") "x"),
     "the server sends bytes that were not asked for"},
    {"data behind it", true, B(CHUNK(MORE, DATA, "\1", "\x9") AT("\x10\x8") "x"),
     "the server sends bytes that were not asked for"},
    {"data across its end", true, B(CHUNK(LAST, DATA, "\1", "\x19") AT("\xf\xf8") "0123456789abcdefg"),
     "the server sends bytes that were not asked for"},
    {"data of 4 GiB", true, B("\x66\x8e\x33\xef\0\0\0\1\0\0\0\0\0\0\0\1\xff\xff\xff\xff" AT("\xf\xf8")),
     "the server sends bytes that were not asked for"},
    {"data at the end of the world", true,
     B(CHUNK(MORE, DATA, "\1", "\x9") "\xff\xff\xff\xff\xff\xff\xff\xff"
                                      "x"),
     "the server sends bytes that were not asked for"},
    {"a hole across its end", true, B(CHUNK(MORE, HOLE, "\1", "\xc") AT("\x10\7") "\0\0\0\2"),
     "the server sends bytes that were not asked for"},
    {"a hole of 4 GiB", true, B(CHUNK(MORE, HOLE, "\1", "\xc") AT("\xf\xf9") "\xff\xff\xff\xff"),
     "the server sends bytes that were not asked for"},
    {"a hole of nothing", true, B(CHUNK(MORE, HOLE, "\1", "\xc") AT("\xf\xf8") ZEROS_4),
     "the server sends bytes that were not asked for"},
    {"data for a WRITE", true, B(CHUNK(MORE, DATA, "\3", "\x9") AT("\0\0") "x"),
     "the server sends bytes for a request that wants none"},
    {"a hole for a status", true, B(CHUNK(MORE, HOLE, "\2", "\xc") AT("\0\0") "\0\0\0\1"),
     "the server sends bytes for a request that wants none"},
    {"a byte twice", true,
     B(CHUNK(MORE, DATA, "\1", "\xc") AT("\xf\xf8") "0123" CHUNK(MORE, HOLE, "\1", "\xc") AT("\xf\xfb") "\0\0\0\2"),
     "the server sends the same bytes twice"},
    {"all of it twice", true,
     B(CHUNK(MORE, HOLE, "\1", "\xc") AT("\xf\xf8") "\0\0\0\x10" CHUNK(LAST, DATA, "\1", "\x18")
           AT("\xf\xf8") "0123456789abcdef"),
     "hole 0+16; the server sends the same bytes twice"},
    {"a byte missing at its end", true, B(CHUNK(LAST, DATA, "\1", "\x17") AT("\xf\xf8") "0123456789abcde"),
     "the server's answer is not whole"},
    {"a byte missing in its middle", true,
     B(CHUNK(MORE, HOLE, "\1", "\xc") AT("\xf\xf8") "\0\0\0\7" CHUNK(LAST, HOLE, "\1", "\xc") AT("\x10\0") "\0\0\0\x8"),
     "hole 0+7; the server's answer is not whole"},
    {"all missing", true, B(CHUNK(LAST, NONE, "\1", "\0")), "the server's answer is not whole"},
    {"the status missing", true, B(CHUNK(LAST, NONE, "\2", "\0")), "the server's answer is not whole"},
    {"two pieces where one was asked for", true,
     B(CHUNK(MORE, HOLE, "\5", "\xc") AT("\0\0") "\0\0\0\4" CHUNK(LAST, HOLE, "\5", "\xc") AT("\0\4") "\0\0\0\4"),
     "hole 0+4; the server sends a second piece where one was asked for"},
    {"a piece of nothing", true, B(CHUNK(MORE, NONE, "\1", "\0")), "the server sends a piece of nothing"},
    {"nothing with bytes", true, B(CHUNK(LAST, NONE, "\3", "\1") "x"),
     "the server sends a piece out of form (type 0, 1 bytes)"},
    {"data without a byte", true, B(CHUNK(MORE, DATA, "\1", "\x8") AT("\xf\xf8")),
     "the server sends a piece out of form (type 0x1, 8 bytes)"},
    {"a hole that is too short", true, B(CHUNK(MORE, HOLE, "\1", "\xb") AT("\xf\xf8") "\0\0\0"),
     "the server sends a piece out of form (type 0x2, 11 bytes)"},
    {"an unknown piece", true, B(CHUNK(MORE, "\0\3", "\1", "\x8") AT("\xf\xf8")),
     "the server sends a piece out of form (type 0x3, 8 bytes)"},
    {"a status of no extents", true, B(CHUNK(LAST, STATUS, "\2", "\4") "\0\0\0\7"),
     "the server sends a piece out of form (type 0x5, 4 bytes)"},
    {"a status of one and a half", true, B(CHUNK(LAST, STATUS, "\2", "\x10") "\0\0\0\7\0\1\0\0\0\0\0\3\0\0\0\0"),
     "the server sends a piece out of form (type 0x5, 16 bytes)"},
    {"a status of 4 GiB", true, B("\x66\x8e\x33\xef\0\1\0\5\0\0\0\0\0\0\0\2\xff\xff\xff\xfc\0\0\0\7"),
     "the server sends a piece out of form (type 0x5, 4294967292 bytes)"},
    {"a status of another context", true, B(CHUNK(LAST, STATUS, "\2", "\xc") "\0\0\0\x8\0\1\0\0\0\0\0\3"),
     "the server sends a status that was not asked for"},
    {"a status for a READ", true, B(CHUNK(LAST, STATUS, "\1", "\xc") "\0\0\0\7\0\1\0\0\0\0\0\3"),
     "the server sends a status that was not asked for"},
    {"an extent of no length", true, B(CHUNK(LAST, STATUS, "\2", "\x14") "\0\0\0\7\0\0\x10\0\0\0\0\0\0\0\0\0\0\0\0\3"),
     "the server sends an extent of no length"},
    {"an extent behind the request", true,
     B(CHUNK(LAST, STATUS, "\2", "\x14") "\0\0\0\7\0\1\0\0\0\0\0\0\0\0\0\1\0\0\0\3"),
     "the server sends extents that were not asked for"},
    {"the status twice", true,
     B(CHUNK(MORE, STATUS, "\2", "\xc") "\0\0\0\7\0\1\0\0\0\0\0\3" CHUNK(LAST, STATUS, "\2",
                                                                         "\xc") "\0\0\0\7\0\1\0\0\0\0\0\3"),
     "65536/3 the server sends the status twice"},
    {"an error without a text's length", true, B(CHUNK(LAST, ERROR, "\1", "\4") "\0\0\0\5"),
     "the server sends an error out of form"},
    {"an error of no bytes", true, B(CHUNK(LAST, ERROR, "\1", "\0")), "the server sends an error out of form"},
    {"an error that is none", true, B(CHUNK(LAST, ERROR, "\1", "\6") "\0\0\0\0\0\0"),
     "the server sends an error out of form"},
    {"a text longer than its piece", true, B(CHUNK(LAST, ERROR, "\1", "\x8") "\0\0\0\5\0\3no"),
     "the server sends an error out of form"},
    {"the same of a kind to come", true, B(CHUNK(LAST, "\x80\x77", "\1", "\x8") "\0\0\0\5\0\3no"),
     "the server sends an error out of form"},
    {"the longest text", true, B(CHUNK(LAST, "\xff\xff", "\1", "\x8") "\0\0\0\5\xff\xffno"),
     "the server sends an error out of form"},
    {"bytes behind a text", true, B(CHUNK(LAST, ERROR, "\1", "\x8") "\0\0\0\5\0\1no"),
     "the server sends an error out of form"},
    {"half a place of an error", true, B(CHUNK(LAST, ERROR_AT, "\1", "\xa") "\0\0\0\5\0\0\0\0\0\0"),
     "the server sends an error out of form"},
    {"an error of 4 GiB", true, B("\x66\x8e\x33\xef\0\1\x80\1\0\0\0\0\0\0\0\1\xff\xff\xff\xff\0\0\0\5\0\0"),
     "the server sends a piece out of form (type 0x8001, 4294967295 bytes)"},
};

static void test_answers(void **state)
{
    (void)state;
    for (size_t i = 0; i < sizeof answers / sizeof *answers; i++)
        for (int at_once = 0; at_once < 2; at_once++) {
            talk_run(answers[i].structured, answers[i].server, at_once);
            if (strcmp(t.log, answers[i].log))
                fail_msg("%s (%s): %s", answers[i].what, at_once ? "at once" : "byte by byte", t.log);
            if (!t.talk.dead)
                assert_int_equal(t.used, answers[i].server.len);
        }
}

static struct nbd_asked *the_one(void *arg, uint64_t cookie)
{
    (void)cookie;
    return arg;
}

static size_t hole_put(uint8_t to[NBD_CHUNK + 12], bool last, uint64_t offset, uint32_t len)
{
    memcpy(to, CHUNK(MORE, HOLE, "\1", "\xc"), NBD_CHUNK);
    to[5] = last;
    put_u64(to + NBD_CHUNK, offset);
    put_u32(to + NBD_CHUNK + 8, len);
    return NBD_CHUNK + 12;
}

#define LONG_READ 200u

/* The bytes of a READ that have come, one by one; the last of `have` stays false. */
struct model {
    bool have[LONG_READ + 1];
    uint32_t left;
    int whole, twice, many, missing; /* how often each was met */
};

/* What is to be said of a piece. */
static const char *model_take(struct model *m, uint32_t at, uint32_t len, bool last)
{
    uint32_t runs = 0;
    for (uint32_t i = at; i < at + len; i++)
        if (m->have[i])
            return m->twice++, "the server sends the same bytes twice";
    memset(m->have + at, true, len);
    m->left -= len;
    for (uint32_t i = 0; i < LONG_READ; i++)
        runs += m->have[i] && !m->have[i + 1];
    if (runs > NBD_PIECES_SEEN)
        return m->many++, "the server sends bytes in too many pieces";
    if (last && m->left)
        return m->missing++, "the server's answer is not whole";
    m->whole += last;
    return "";
}

/* Pieces of a long READ at random, held against a plain array: of up to 24 bytes wherever, or single ones that have not
 * come yet, which either touch others soon or (every other byte only) never do. */
static void test_pieces(void **state)
{
    (void)state;
    uint32_t x = 0x5eed;
    struct model m = {.whole = 0};
    for (int round = 0; round < 3000; round++) {
        struct nbd_talk talk = {.structured = true};
        struct nbd_asked q = {.command = NBD_CMD_READ, .offset = 1000, .len = LONG_READ};
        struct nbd_answer a = {.done = false};
        memset(m.have, false, sizeof m.have);
        m.left = LONG_READ;
        for (int i = 0; !talk.dead && !a.done; i++) {
            uint8_t hole[NBD_CHUNK + 12];
            uint32_t at = chance(&x) % LONG_READ, len = 1 + chance(&x) % 24;
            if (round % 3) {
                bool apart = round % 3 == 1 && i < 100;
                at &= apart ? ~1u : ~0u;
                for (len = 1; m.have[at];)
                    at = (at + (apart ? 2 : 1)) % LONG_READ;
            }
            len = len < LONG_READ - at ? len : LONG_READ - at;
            bool last = m.left == len || chance(&x) % 512 == 0;
            size_t n = hole_put(hole, last, 1000 + at, len);
            int64_t step = nbd_answer_step(&talk, hole, n, &a, the_one, &q);
            const char *wrong = model_take(&m, at, len, last);
            if (strcmp(a.text, wrong) || step != (*wrong ? -EPROTO : (int64_t)n))
                fail_msg("round %d: %u+%u, %u bytes left: \"%s\", not \"%s\"", round, at, len, m.left, a.text, wrong);
        }
    }
    if (m.whole < 10 || m.twice < 10 || m.many < 10 || m.missing < 10)
        fail_msg("%d whole, %d twice, %d in too many pieces, %d not whole", m.whole, m.twice, m.many, m.missing);
}

/* 64 pieces that do not touch are borne, and joined in any order. */
static void test_most_pieces(void **state)
{
    (void)state;
    struct nbd_talk talk = {.structured = true};
    struct nbd_asked q = {.command = NBD_CMD_READ, .len = 2 * NBD_PIECES_SEEN};
    struct nbd_answer a;
    for (uint32_t i = 0; i < q.len; i++) {
        uint32_t at = i < NBD_PIECES_SEEN ? 2 * i + 1 : 2 * (q.len - 1 - i);
        uint8_t hole[NBD_CHUNK + 12];
        size_t n = hole_put(hole, i == q.len - 1, at, 1);
        assert_int_equal(nbd_answer_step(&talk, hole, n, &a, the_one, &q), n);
    }
    assert_true(a.done && !q.err && q.seen_n == 1);
}

/* A status of more extents than are looked at: the first of them, and the rest is held against the rules all the same.
 */
static void test_long_status(void **state)
{
    (void)state;
    enum { EXTENTS = 3000 };
    struct nbd_talk talk = {.structured = true, .allocation = true, .context = 7};
    struct nbd_asked q = {.command = NBD_CMD_BLOCK_STATUS, .len = EXTENTS * 16};
    struct nbd_answer a;
    static uint8_t bytes[NBD_CHUNK + 4 + EXTENTS * 8];
    memcpy(bytes, CHUNK(LAST, STATUS, "\1", "\0"), NBD_CHUNK);
    put_u32(bytes + 16, sizeof bytes - NBD_CHUNK);
    put_u32(bytes + NBD_CHUNK, 7);
    for (uint32_t i = 0; i < EXTENTS; i++)
        put_u32(bytes + NBD_CHUNK + 4 + i * 8, 16);
    struct nbd_asked other = q;
    assert_int_equal(nbd_answer_step(&talk, bytes, sizeof bytes - 1, &a, the_one, &q), 0);
    assert_int_equal(nbd_answer_step(&talk, bytes, sizeof bytes, &a, the_one, &q), sizeof bytes);
    assert_true(a.done && a.kind == NBD_ANSWER_STATUS && a.n == NBD_STATUS_EXTENTS);
    put_u32(bytes + sizeof bytes - 8, 0);
    assert_int_equal(nbd_answer_step(&talk, bytes, sizeof bytes, &a, the_one, &other), -EPROTO);
}

static void test_requests(void **state)
{
    (void)state;
    uint8_t to[NBD_REQUEST];
    struct nbd_asked q = {.command = NBD_CMD_WRITE,
                          .flags = NBD_CMD_FLAG_FUA,
                          .cookie = 0x0102030405060708,
                          .offset = 0x1000,
                          .len = 512};
    assert_int_equal(nbd_ask(to, &q), NBD_REQUEST);
    assert_memory_equal(to, "\x25\x60\x95\x13\0\1\0\1\1\2\3\4\5\6\7\x8\0\0\0\0\0\0\x10\0\0\0\2", NBD_REQUEST);
    for (uint32_t error = 0; error < 200; error++) { /* there and back */
        int err = nbd_errno(error);
        assert_true(err <= 0 && !err == !error);
        assert_true(nbd_error_from(err) == error || err == -EIO);
    }
    assert_int_equal(nbd_errno(UINT32_MAX), -EIO);
    assert_int_equal(nbd_errno((uint32_t)INT32_MIN), -EIO);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_handshakes),       cmocka_unit_test(test_handshakes_refused),
        cmocka_unit_test(test_handshake_bounds), cmocka_unit_test(test_answers),
        cmocka_unit_test(test_pieces),           cmocka_unit_test(test_most_pieces),
        cmocka_unit_test(test_long_status),      cmocka_unit_test(test_requests),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
