/* The codec of the protocol between shim and agent: what is written is read, and nothing else is. */
#include "tests/unit/codec.h"
#include "wire/control.h"

static void terms_fill(struct control_terms *t)
{
    *t = (struct control_terms){
        .ack = CONTROL_ACK_ASYNC, .initial = CONTROL_INITIAL_PULL, .interval_ms = 250, .group = "g"};
}

static void hello_fill(void *m)
{
    *(struct control_hello *)m = (struct control_hello){.version = CONTROL_VERSION,
                                                        .tool = 1,
                                                        .pid = 0x01020304,
                                                        .fds = CONTROL_FD_PAGEMAP | CONTROL_FD_UFFD,
                                                        .loss = CONTROL_LOSS_FAIL,
                                                        .timeout_ms = 10000,
                                                        .program = "app",
                                                        .remote = "hostb:7070"};
}

static void region_fill(void *m)
{
    struct control_region *r = m;
    *r = (struct control_region){.region = 9,
                                 .fresh = 1,
                                 .hashed = 2,
                                 .dev = 3,
                                 .source = {.ino = 4, .btime = 5},
                                 .path = "/data/x.mdb",
                                 .name = "data/x.mdb"};
    terms_fill(&r->terms);
}

static void marks_fill(void *m)
{
    ((struct control_marks *)m)->region = 0x0a0b0c0d;
}

static void map_fill(void *m)
{
    *(struct control_map *)m = (struct control_map){
        .region = 1, .tracker = CONTROL_TRACK_HASH, .dirty = 1, .addr = 0x7f0000000000, .len = 1 << 20, .offset = 4096};
}

static void retire_fill(void *m)
{
    *(struct control_retire *)m = (struct control_retire){.slot = 2, .publish = 1, .addr = 0x7f0000000000, .len = 4096};
}

static void release_fill(void *m)
{
    ((struct control_release *)m)->region = 77;
}

static void name_fill(void *m)
{
    struct control_name *n = m;
    *n = (struct control_name){.kind = CONTROL_NAME_EXCHANGE,
                               .phase = CONTROL_NAME_FAILED,
                               .number = 6,
                               .dev = 7,
                               .source = {.ino = 8, .btime = 9},
                               .old_path = "/d/new",
                               .old_name = "",
                               .new_path = "/d/doc",
                               .new_name = "d/doc"};
    terms_fill(&n->terms);
}

static void sync_fill(void *m)
{
    *(struct control_sync *)m = (struct control_sync){.slot = CONTROL_NO_SLOT, .region = 3};
}

static void bye_fill(void *m)
{
    ((struct control_bye *)m)->slot = 255;
}

static void publish_fill(void *m)
{
    strcpy(((struct control_publish *)m)->name, "data/x.mdb");
}

static void watch_fill(void *m)
{
    struct control_watch *w = m;
    *w = (struct control_watch){.path = "/d/static", .name = "d/static", .remote = "file:/backup"};
    terms_fill(&w->terms);
}

static void attach_fill(void *m)
{
    *(struct control_attach *)m = (struct control_attach){.read_only = 1, .device = "/dev/nbd12", .name = "vm/disk", .remote = "hostb:7070"};
}

static void welcome_fill(void *m)
{
    *(struct control_welcome *)m = (struct control_welcome){.version = CONTROL_VERSION, .pid = 4711};
}

static void text_fill(void *m)
{
    struct control_text *t = m;
    t->code = -EIO;
    strcpy(t->text, "region 'x': the remote's disk is full");
}

static void open_fill(void *m)
{
    *(struct control_open *)m = (struct control_open){.slot = 5,
                                                      .view = 6,
                                                      .mode = CONTROL_MIRROR,
                                                      .order = CONTROL_ORDER_NONE,
                                                      .follow = 1,
                                                      .look = 1,
                                                      .create = 1,
                                                      .resident = 1 << 30,
                                                      .fetch_timeout_ms = CONTROL_FOREVER,
                                                      .path = "/d/x.mdb",
                                                      .name = "d/x.mdb"};
}

static void resume_fill(void *m)
{
    struct control_resume *r = m;
    *r = (struct control_resume){.epoch = 7, .lineage = {{1, 2, 3, 4, 5, 6, 7, 8, 9}}, .size = INT64_MAX};
    open_fill(&r->open);
}

static void view_map_fill(void *m)
{
    *(struct control_view_map *)m =
        (struct control_view_map){.view = 1, .addr = 0x7f0000000000, .len = 1 << 20, .offset = 4096};
}

static void view_unmap_fill(void *m)
{
    *(struct control_view_unmap *)m = (struct control_view_unmap){.addr = 0x7f0000000000, .len = 4096};
}

static void advise_fill(void *m)
{
    *(struct control_advise *)m =
        (struct control_advise){.view = 1, .advice = CONTROL_ADVICE_MAX, .offset = 4096, .len = 1 << 20};
}

static void fetch_fill(void *m)
{
    *(struct control_fetch *)m = (struct control_fetch){.slot = 255, .view = 1, .offset = 0, .len = INT64_MAX};
}

static void close_fill(void *m)
{
    ((struct control_close *)m)->view = 9;
}

static void truncate_fill(void *m)
{
    *(struct control_truncate *)m = (struct control_truncate){.slot = 255, .view = 1, .size = INT64_MAX, .grow = 1};
}

static void view_fill(void *m)
{
    *(struct control_view *)m = (struct control_view){
        .view = 3, .size = 1 << 20, .mtime_ns = -1, .epoch = 12, .lineage = {{9, 8, 7, 6, 5, 4, 3, 2, 1}}};
}

CODEC_PLAIN(control, hello)
CODEC_PLAIN(control, region)
CODEC_PLAIN(control, marks)
CODEC_PLAIN(control, map)
CODEC_PLAIN(control, retire)
CODEC_PLAIN(control, release)
CODEC_PLAIN(control, name)
CODEC_PLAIN(control, sync)
CODEC_PLAIN(control, bye)
CODEC_PLAIN(control, publish)
CODEC_PLAIN(control, watch)
CODEC_PLAIN(control, attach)
CODEC_PLAIN(control, welcome)
CODEC_PLAIN(control, open)
CODEC_PLAIN(control, resume)
CODEC_PLAIN(control, view_map)
CODEC_PLAIN(control, view_unmap)
CODEC_PLAIN(control, advise)
CODEC_PLAIN(control, fetch)
CODEC_PLAIN(control, close)
CODEC_PLAIN(control, view)
CODEC_PLAIN(control, truncate)

static size_t text_put(void *to, size_t cap, const void *m)
{
    return control_text_put(to, cap, CONTROL_RESULT, m);
}

static int text_get(const void *p, size_t len, void *m)
{
    return control_text_get(p, len, m);
}

static const struct {
    struct codec codec;
    uint8_t type;
} codecs[] = {
    {CODEC(control, hello), CONTROL_HELLO},   {CODEC(control, region), CONTROL_REGION},
    {CODEC(control, marks), CONTROL_MARKS},   {CODEC(control, map), CONTROL_MAP},
    {CODEC(control, retire), CONTROL_RETIRE}, {CODEC(control, release), CONTROL_RELEASE},
    {CODEC(control, name), CONTROL_NAME},     {CODEC(control, sync), CONTROL_SYNC},
    {CODEC(control, bye), CONTROL_BYE},       {CODEC(control, publish), CONTROL_PUBLISH},
    {CODEC(control, watch), CONTROL_WATCH},   {CODEC(control, welcome), CONTROL_WELCOME},
    {CODEC(control, text), CONTROL_RESULT},   {CODEC(control, open), CONTROL_OPEN},
    {CODEC(control, resume), CONTROL_RESUME}, {CODEC(control, view_map), CONTROL_VIEW_MAP},
    {CODEC(control, advise), CONTROL_ADVISE}, {CODEC(control, view_unmap), CONTROL_VIEW_UNMAP},
    {CODEC(control, fetch), CONTROL_FETCH},   {CODEC(control, close), CONTROL_CLOSE},
    {CODEC(control, view), CONTROL_VIEW},     {CODEC(control, truncate), CONTROL_TRUNCATE},
    {CODEC(control, attach), CONTROL_ATTACH},
};
#define CODECS (sizeof codecs / sizeof *codecs)

static void test_round_trips(void **state)
{
    (void)state;
    for (size_t i = 0; i < CODECS; i++)
        codec_round_trip(&codecs[i].codec);
}

static void test_types(void **state)
{
    (void)state;
    static uint8_t bytes[CONTROL_MAX], message[65536];
    for (size_t i = 0; i < CODECS; i++) {
        codecs[i].codec.fill(memset(message, 0, sizeof message));
        size_t n = codecs[i].codec.put(bytes, sizeof bytes, message);
        assert_int_equal(control_type_of(bytes, n), codecs[i].type);
    }
    for (unsigned type = 0; type < 256; type++) {
        uint8_t b = (uint8_t)type;
        assert_int_equal(control_type_of(&b, 1), type < CONTROL_TYPES ? type : 0);
    }
    assert_int_equal(control_type_of(bytes, 0), 0);
    assert_int_equal(control_empty_put(bytes, 1, CONTROL_STATUS), 1);
    assert_int_equal(bytes[0], CONTROL_STATUS);
    assert_int_equal(control_empty_put(bytes, 0, CONTROL_STATUS), 0);
}

/* The type is the reader's to look at, and damage to it is no other form of the same message. */
static void test_damage(void **state)
{
    (void)state;
    for (size_t i = 0; i < CODECS; i++) {
        const struct codec *c = &codecs[i].codec;
        void *m = calloc(1, c->size);
        static uint8_t good[CONTROL_MAX], bad[CONTROL_MAX], again[CONTROL_MAX];
        c->fill(m);
        size_t n = c->put(good, sizeof good, m);
        uint32_t x = 100 + (uint32_t)i;
        for (int round = 0; round < 20000; round++) {
            memcpy(bad, good, n);
            for (uint32_t k = chance(&x) % 4 + 1; k; k--) {
                size_t at = 1 + chance(&x) % (n - 1);
                bad[at] = (uint8_t)(chance(&x) % 2 ? chance(&x) % 256 : chance(&x) % 2 * 255);
            }
            size_t len = chance(&x) % 8 ? n : chance(&x) % (n + 1);
            if (codec_get(c, bad, len, m))
                continue;
            bool other = codecs[i].type == CONTROL_HELLO && get_u16(bad + 1) != CONTROL_VERSION;
            size_t back = c->put(again, sizeof again, m);
            if (!other && (back != len || memcmp(bad, again, len)))
                fail_msg("%s: round %d: two forms of one message", c->name, round);
        }
        free(m);
    }
}

/* The bytes themselves, once, so that both halves of a codec cannot be wrong alike. */
static void test_bytes(void **state)
{
    (void)state;
    static const uint8_t expected[] = {CONTROL_RETIRE, 0, 0, 0, 2, 1, 0, 0, 0x7f, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                                       0x10,           0};
    struct control_retire r;
    retire_fill(&r);
    uint8_t bytes[64];
    assert_int_equal(control_retire_put(bytes, sizeof bytes, &r), sizeof expected);
    assert_memory_equal(bytes, expected, sizeof expected);
}

/* Another version's greeting is understood as far as its number, whatever follows. */
static void test_other_version(void **state)
{
    (void)state;
    static const uint8_t bytes[] = {CONTROL_HELLO, 0x02, 0x01, 0xff, 0xff, 0xff};
    struct control_hello h;
    assert_int_equal(control_hello_get(bytes, sizeof bytes, &h), 0);
    assert_int_equal(h.version, 0x0201);
    assert_int_equal(control_hello_get(bytes, 3, &h), 0);
    assert_int_equal(control_hello_get(bytes, 2, &h), -EPROTO);
}

static int map_with(uint64_t addr, uint64_t len, uint64_t offset, uint8_t tracker)
{
    uint8_t bytes[64];
    struct control_map m = {.region = 1, .tracker = tracker, .addr = addr, .len = len, .offset = offset};
    size_t n = control_map_put(bytes, sizeof bytes, &m);
    return control_map_get(bytes, n, &m);
}

static int retire_with(uint64_t addr, uint64_t len)
{
    uint8_t bytes[64];
    struct control_retire m = {.addr = addr, .len = len};
    size_t n = control_retire_put(bytes, sizeof bytes, &m);
    return control_retire_get(bytes, n, &m);
}

static void test_ranges(void **state)
{
    (void)state;
    assert_int_equal(map_with(0, 1, 0, 0), 0);
    assert_int_equal(map_with(0, 0, 0, 0), -EPROTO);
    assert_int_equal(map_with(UINT64_MAX - 1, 1, 0, 0), 0);
    assert_int_equal(map_with(UINT64_MAX, 1, 0, 0), -EPROTO);
    assert_int_equal(map_with(UINT64_MAX - 4095, 4096, 0, 0), -EPROTO);
    assert_int_equal(map_with(0, 4096, INT64_MAX - 4096, 0), 0);
    assert_int_equal(map_with(0, 4096, INT64_MAX - 4095, 0), -EPROTO);
    assert_int_equal(map_with(0, (uint64_t)INT64_MAX + 1, 0, 0), -EPROTO);
    assert_int_equal(map_with(0, UINT64_MAX, 1, 0), -EPROTO);
    assert_int_equal(map_with(0, 1, UINT64_MAX, 0), -EPROTO);
    assert_int_equal(map_with(0, 1, 0, CONTROL_TRACK_SOFTDIRTY), 0);
    assert_int_equal(map_with(0, 1, 0, CONTROL_TRACK_SOFTDIRTY + 1), -EPROTO);
    assert_int_equal(retire_with(0, 0), -EPROTO);
    assert_int_equal(retire_with(UINT64_MAX - 4095, 4096), -EPROTO);
    assert_int_equal(retire_with(4096, 4096), 0);
}

static int fetch_with(uint32_t view, uint64_t offset, uint64_t len)
{
    uint8_t bytes[64];
    struct control_fetch m = {.view = view, .offset = offset, .len = len};
    return control_fetch_get(bytes, control_fetch_put(bytes, sizeof bytes, &m), &m);
}

static void test_spans(void **state)
{
    (void)state;
    assert_int_equal(fetch_with(1, 0, 1), 0);
    assert_int_equal(fetch_with(0, 0, 1), -EPROTO);
    assert_int_equal(fetch_with(1, 0, 0), -EPROTO);
    assert_int_equal(fetch_with(1, INT64_MAX - 1, 1), 0);
    assert_int_equal(fetch_with(1, INT64_MAX, 1), -EPROTO);
    assert_int_equal(fetch_with(1, UINT64_MAX, 1), -EPROTO);
    assert_int_equal(fetch_with(1, 0, UINT64_MAX), -EPROTO);
}

static int open_with(uint32_t view, uint8_t mode, uint8_t order, uint8_t look, uint8_t create)
{
    static uint8_t bytes[CONTROL_MAX];
    static struct control_open m;
    open_fill(&m);
    m.view = view;
    m.mode = mode;
    m.order = order;
    m.look = look;
    m.create = create;
    return control_open_get(bytes, control_open_put(bytes, sizeof bytes, &m), &m);
}

static void test_opens(void **state)
{
    (void)state;
    assert_int_equal(open_with(1, CONTROL_PULL, CONTROL_ORDER_FAULT, 0, 0), 0);
    assert_int_equal(open_with(0, CONTROL_PULL, CONTROL_ORDER_FAULT, 0, 0), -EPROTO);
    assert_int_equal(open_with(1, CONTROL_MIRROR + 1, CONTROL_ORDER_FAULT, 0, 0), -EPROTO);
    assert_int_equal(open_with(1, CONTROL_PULL, CONTROL_ORDER_NONE + 1, 0, 0), -EPROTO);
    assert_int_equal(open_with(1, CONTROL_PULL, CONTROL_ORDER_NONE, 2, 0), -EPROTO);
    assert_int_equal(open_with(1, CONTROL_MIRROR, CONTROL_ORDER_NONE, 0, 1), 0);
    assert_int_equal(open_with(1, CONTROL_MIRROR, CONTROL_ORDER_NONE, 0, 2), -EPROTO);
    assert_int_equal(open_with(1, CONTROL_PULL, CONTROL_ORDER_NONE, 0, 1), -EPROTO);
}

static int truncate_with(uint32_t view, uint64_t size, uint8_t grow)
{
    uint8_t bytes[64];
    struct control_truncate m = {.view = view, .size = size, .grow = grow};
    return control_truncate_get(bytes, control_truncate_put(bytes, sizeof bytes, &m), &m);
}

static void test_truncates(void **state)
{
    (void)state;
    assert_int_equal(truncate_with(1, 0, 0), 0);
    assert_int_equal(truncate_with(1, INT64_MAX, 1), 0);
    assert_int_equal(truncate_with(0, 0, 0), -EPROTO);
    assert_int_equal(truncate_with(1, (uint64_t)INT64_MAX + 1, 0), -EPROTO);
    assert_int_equal(truncate_with(1, 0, 2), -EPROTO);
}

static int name_with(uint8_t kind, uint8_t phase, uint8_t ack, uint8_t initial)
{
    static uint8_t bytes[CONTROL_MAX];
    static struct control_name m;
    name_fill(&m);
    m.kind = kind;
    m.phase = phase;
    m.terms.ack = ack;
    m.terms.initial = initial;
    return control_name_get(bytes, control_name_put(bytes, sizeof bytes, &m), &m);
}

static void test_values(void **state)
{
    (void)state;
    assert_int_equal(name_with(CONTROL_NAME_RENAME, CONTROL_NAME_BEGUN, 0, 0), 0);
    assert_int_equal(name_with(CONTROL_NAME_UNLINK, CONTROL_NAME_DONE, 2, 2), 0);
    assert_int_equal(name_with(0, 0, 0, 0), -EPROTO);
    assert_int_equal(name_with(CONTROL_NAME_UNLINK + 1, 0, 0, 0), -EPROTO);
    assert_int_equal(name_with(1, CONTROL_NAME_FAILED + 1, 0, 0), -EPROTO);
    assert_int_equal(name_with(1, 0, CONTROL_ACK_ASYNC + 1, 0), -EPROTO);
    assert_int_equal(name_with(1, 0, 0, CONTROL_INITIAL_PULL + 1), -EPROTO);

    static uint8_t bytes[CONTROL_MAX];
    static struct control_region r;
    region_fill(&r);
    r.region = 0;
    assert_int_equal(control_region_get(bytes, control_region_put(bytes, sizeof bytes, &r), &r), -EPROTO);
    struct control_hello h;
    hello_fill(&h);
    h.loss = CONTROL_LOSS_FAIL + 1;
    assert_int_equal(control_hello_get(bytes, control_hello_put(bytes, sizeof bytes, &h), &h), -EPROTO);
}

/* The largest message there is goes through: four paths and names at their longest. */
static void test_largest(void **state)
{
    (void)state;
    static uint8_t bytes[CONTROL_MAX];
    static struct control_name m, back;
    name_fill(&m);
    memset(m.old_path, 'a', sizeof m.old_path - 1);
    memset(m.new_path, 'b', sizeof m.new_path - 1);
    memset(m.old_name, 'c', sizeof m.old_name - 1);
    memset(m.new_name, 'd', sizeof m.new_name - 1);
    memset(m.terms.group, 'e', sizeof m.terms.group - 1);
    size_t n = control_name_put(bytes, sizeof bytes, &m);
    assert_true(n > 4 * 4095 && n <= CONTROL_MAX);
    assert_int_equal(control_name_get(bytes, n, &back), 0);
    assert_string_equal(m.new_name, back.new_name);
    assert_string_equal(m.terms.group, back.terms.group);

    static struct control_text t;
    memset(t.text, 't', sizeof t.text - 1);
    n = control_text_put(bytes, sizeof bytes, CONTROL_TEXT, &t);
    assert_int_equal(n, 1 + 4 + 2 + sizeof t.text - 1);
    assert_int_equal(control_text_get(bytes, n, &t), 0);
    put_u16(bytes + 5, sizeof t.text);
    bytes[n] = 't';
    assert_int_equal(control_text_get(bytes, n + 1, &t), -EPROTO);
}

static void socket_is(const char *expected, const char *agent, const char *runtime, unsigned uid)
{
    char path[108];
    assert_int_equal(control_socket_path(path, sizeof path, agent, runtime, uid), 0);
    assert_string_equal(path, expected);
}

static void test_socket_path(void **state)
{
    (void)state;
    socket_is("/tmp/memsync-0/agent.sock", NULL, NULL, 0);
    socket_is("/tmp/memsync-4294967295/agent.sock", "auto", "", UINT32_MAX);
    socket_is("/tmp/memsync-1000/agent.sock", "", "run/user/1000", 1000);
    socket_is("/run/user/1000/memsync/agent.sock", "auto", "/run/user/1000", 1000);
    socket_is("/x/y.sock", "/x/y.sock", "/run/user/1000", 1000);
    char path[20];
    assert_int_equal(control_socket_path(path, 9, "/x/y.sock", NULL, 0), -ENAMETOOLONG);
    assert_int_equal(control_socket_path(path, 10, "/x/y.sock", NULL, 0), 0);
    assert_int_equal(control_socket_path(path, sizeof path, NULL, "/run/user/1000", 0), -ENAMETOOLONG);
    assert_int_equal(control_socket_path(path, sizeof path, NULL, NULL, 0), -ENAMETOOLONG);
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(test_round_trips),   cmocka_unit_test(test_types),   cmocka_unit_test(test_damage),
        cmocka_unit_test(test_bytes),         cmocka_unit_test(test_ranges),  cmocka_unit_test(test_values),
        cmocka_unit_test(test_other_version), cmocka_unit_test(test_largest), cmocka_unit_test(test_socket_path),
        cmocka_unit_test(test_spans),         cmocka_unit_test(test_opens),  cmocka_unit_test(test_truncates),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
