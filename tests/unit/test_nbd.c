/* The block device protocol's steps and answers. */
#include "tests/unit/codec.h"
#include "wire/nbd.h"

#include <errno.h>

static struct nbd_server server;
static struct nbd_got got;
static uint8_t sent[256 << 10];
static size_t sent_len;

static int fresh(void **state)
{
    (void)state;
    memset(&server, 0, sizeof server);
    sent_len = 0;
    return 0;
}

static void raw(const void *bytes, size_t len)
{
    memcpy(sent + sent_len, bytes, len);
    sent_len += len;
}

static void option(uint32_t number, const void *data, uint32_t len)
{
    uint8_t head[NBD_OPTION_HEAD];
    memcpy(head, "IHAVEOPT", 8);
    put_u32(head + 8, number);
    put_u32(head + 12, len);
    raw(head, sizeof head);
    raw(data, len);
}

static int64_t step(void)
{
    int64_t n = nbd_server_step(&server, sent, sent_len, &got);
    if (n > 0) {
        sent_len -= (size_t)n;
        memmove(sent, sent + n, sent_len);
    }
    return n;
}

static void enter(uint32_t flags)
{
    uint8_t bytes[4];
    put_u32(bytes, flags);
    raw(bytes, 4);
    assert_int_equal(step(), 4);
    assert_int_equal(got.kind, NBD_GOT_NOTHING);
    assert_int_equal(server.phase, NBD_OPTIONS);
}

static void expect_refused(enum nbd_reply reply)
{
    assert_true(step() > 0);
    assert_int_equal(got.kind, NBD_GOT_REFUSED);
    assert_int_equal(got.reply, reply);
    assert_non_null(got.text);
    assert_int_equal(server.phase, NBD_OPTIONS);
}

static void test_greeting(void **state)
{
    (void)state;
    uint8_t to[NBD_GREETING];
    assert_int_equal(nbd_greeting(to), 18);
    assert_memory_equal(to, "NBDMAGICIHAVEOPT\0\3", 18);
    uint8_t unknown[] = {0, 0, 0, 4};
    raw(unknown, 4);
    assert_int_equal(step(), -EPROTO);
    assert_int_equal(server.phase, NBD_DEAD);
    assert_int_equal(step(), -EPROTO);
}

static void test_go(void **state)
{
    (void)state;
    enter(3);
    static const uint8_t go[] = {0, 0, 0, 3, 'a', '/', 'b', 0, 2, 0, 1, 0, 3};
    option(NBD_OPT_GO, go, sizeof go);
    assert_int_equal(nbd_server_step(&server, sent, sent_len - 1, &got), 0);
    assert_int_equal(step(), NBD_OPTION_HEAD + sizeof go);
    assert_int_equal(got.kind, NBD_GOT_OPTION);
    assert_int_equal(got.option, NBD_OPT_GO);
    assert_string_equal(got.name, "a/b");
    assert_int_equal(got.infos, 1 << NBD_INFO_NAME | 1 << NBD_INFO_BLOCK_SIZE);
    assert_int_equal(server.phase, NBD_OPTIONS); /* until it is granted */
    nbd_server_begin(&server, got.name);
    static const uint8_t request[NBD_REQUEST] = {0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1, 1,    2, 3, 4, 5, 6,
                                                 7,    8,    0,    0,    0, 0, 0, 0, 0x10, 0, 0, 0, 2, 0};
    raw(request, sizeof request);
    assert_int_equal(step(), NBD_REQUEST);
    assert_int_equal(got.kind, NBD_GOT_REQUEST);
    assert_int_equal(got.request.flags, 1);
    assert_int_equal(got.request.command, NBD_CMD_WRITE);
    assert_int_equal(got.request.cookie, 0x0102030405060708);
    assert_int_equal(got.request.offset, 0x1000);
    assert_int_equal(got.request.len, 512);
    raw(request + 1, sizeof request - 1);
    raw(request, 1);
    assert_int_equal(step(), -EPROTO);
}

static void test_refused(void **state)
{
    (void)state;
    static const uint8_t nul[] = {0, 0, 0, 2, 'a', 0, 0, 0}, cut[] = {0, 0, 0, 9, 'a', 0, 0};
    static uint8_t longest[4 + NBD_NAME_MAX + 1 + 2];
    enter(3);
    option(NBD_OPT_STARTTLS, "", 0);
    expect_refused(NBD_REP_ERR_UNSUP);
    option(77, "x", 1);
    expect_refused(NBD_REP_ERR_UNSUP);
    option(NBD_OPT_LIST, "x", 1);
    expect_refused(NBD_REP_ERR_INVALID);
    option(NBD_OPT_GO, nul, sizeof nul);
    expect_refused(NBD_REP_ERR_INVALID);
    option(NBD_OPT_INFO, cut, sizeof cut);
    expect_refused(NBD_REP_ERR_INVALID);
    memset(longest, 'n', sizeof longest);
    put_u32(longest, NBD_NAME_MAX + 1);
    option(NBD_OPT_INFO, longest, sizeof longest);
    expect_refused(NBD_REP_ERR_INVALID);
    option(NBD_OPT_SET_META_CONTEXT, nul, sizeof nul);
    expect_refused(NBD_REP_ERR_INVALID); /* no structured replies */
}

static void test_too_long(void **state)
{
    (void)state;
    enter(3);
    option(NBD_OPT_GO, sent, NBD_OPTION_MAX + 1); /* whatever it says */
    expect_refused(NBD_REP_ERR_TOO_BIG);
    option(NBD_OPT_ABORT, "", 0);
    assert_int_equal(step(), NBD_OPTION_MAX + 1); /* skipped */
    assert_int_equal(got.kind, NBD_GOT_NOTHING);
    assert_true(step() > 0);
    assert_int_equal(got.option, NBD_OPT_ABORT);
    uint8_t head[NBD_OPTION_HEAD] = "IHAVEOPT";
    put_u32(head + 8, NBD_OPT_INFO);
    put_u32(head + 12, NBD_OPTION_DRAIN + 1);
    raw(head, sizeof head);
    assert_int_equal(step(), -EPROTO);
}

static void test_contexts(void **state)
{
    (void)state;
    static const uint8_t set[] = "\0\0\0\1r\0\0\0\2\0\0\0\3x:y\0\0\0\17base:allocation";
    static const uint8_t none[] = "\0\0\0\1r\0\0\0\0";
    enter(3);
    option(NBD_OPT_STRUCTURED_REPLY, "", 0);
    assert_true(step() > 0);
    option(NBD_OPT_SET_META_CONTEXT, set, sizeof set - 1);
    assert_true(step() > 0);
    assert_int_equal(got.kind, NBD_GOT_OPTION);
    assert_true(got.allocation && server.allocation);
    option(NBD_OPT_LIST_META_CONTEXT, none, sizeof none - 1);
    assert_true(step() > 0);
    assert_true(got.allocation); /* no query: all there are */
    assert_true(server.allocation);
    struct nbd_server other = server;
    nbd_server_begin(&server, "r");
    assert_true(server.allocation);
    nbd_server_begin(&other, "s"); /* was chosen for another */
    assert_false(other.allocation);
}

static void test_requests(void **state)
{
    (void)state;
    const uint64_t size = 1 << 30;
    static const struct {
        struct nbd_request r;
        int verdict;
    } table[] = {
        {{.command = NBD_CMD_READ, .len = 512}, 0},
        {{.command = NBD_CMD_READ}, -EINVAL},
        {{.command = NBD_CMD_READ, .offset = (1 << 30) - 1, .len = 1}, 0},
        {{.command = NBD_CMD_READ, .offset = (1 << 30) - 1, .len = 2}, -EINVAL},
        {{.command = NBD_CMD_READ, .offset = UINT64_MAX, .len = 2}, -EINVAL},
        {{.command = NBD_CMD_READ, .len = NBD_PAYLOAD_MAX}, 0},
        {{.command = NBD_CMD_READ, .len = NBD_PAYLOAD_MAX + 1}, -EINVAL},
        {{.command = NBD_CMD_READ, .len = 1, .flags = NBD_CMD_FLAG_DF}, -EINVAL}, /* without chunks */
        {{.command = NBD_CMD_READ, .len = 1, .flags = NBD_CMD_FLAG_NO_HOLE}, -EINVAL},
        {{.command = NBD_CMD_WRITE, .len = 1, .flags = NBD_CMD_FLAG_FUA}, 0},
        {{.command = NBD_CMD_WRITE, .offset = 1 << 30, .len = 1}, -ENOSPC},
        {{.command = NBD_CMD_WRITE, .len = NBD_PAYLOAD_MAX + 1}, -EINVAL},
        {{.command = NBD_CMD_WRITE_ZEROES, .len = 1 << 30, .flags = NBD_CMD_FLAG_NO_HOLE}, 0},
        {{.command = NBD_CMD_WRITE_ZEROES, .offset = 1, .len = 1 << 30}, -ENOSPC},
        {{.command = NBD_CMD_TRIM, .len = 1 << 30}, 0},
        {{.command = NBD_CMD_TRIM, .offset = 1, .len = 1 << 30}, -EINVAL},
        {{.command = NBD_CMD_FLUSH}, 0},
        {{.command = NBD_CMD_FLUSH, .len = 1}, -EINVAL},
        {{.command = NBD_CMD_BLOCK_STATUS, .len = 1}, -EINVAL}, /* no context was chosen */
        {{.command = 8, .len = 1}, -EINVAL},
        {{.command = 0xffff}, -EINVAL},
    };
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        int verdict = nbd_request_check(&server, &table[i].r, size, false);
        if (verdict != table[i].verdict)
            fail_msg("request %zu: %d", i, verdict);
    }
    assert_int_equal(nbd_request_check(&server, &table[9].r, size, true), -EPERM);
    assert_int_equal(nbd_request_check(&server, &table[0].r, size, true), 0);
    server.structured = server.allocation = true;
    assert_int_equal(nbd_request_check(&server, &table[7].r, size, false), 0);
    assert_int_equal(nbd_request_check(&server, &table[18].r, size, false), 0);
}

static void test_answers(void **state)
{
    (void)state;
    uint8_t to[NBD_EXPORT_REPLY];
    assert_int_equal(nbd_simple(to, 0x0102030405060708, 5), NBD_SIMPLE);
    assert_memory_equal(to, "\x67\x44\x66\x98\0\0\0\5\1\2\3\4\5\6\7\x8", NBD_SIMPLE);
    assert_int_equal(nbd_chunk_head(to, NBD_CHUNK_DONE, NBD_CHUNK_ERROR, 1, 6), NBD_CHUNK);
    assert_memory_equal(to, "\x66\x8e\x33\xef\0\1\x80\1\0\0\0\0\0\0\0\1\0\0\0\6", NBD_CHUNK);
    assert_int_equal(nbd_option_reply(to, NBD_OPT_GO, NBD_REP_ERR_UNKNOWN, 3), NBD_REPLY_HEAD);
    assert_memory_equal(to, "\0\3\xe8\x89\x04\x55\x65\xa9\0\0\0\7\x80\0\0\6\0\0\0\3", NBD_REPLY_HEAD);
    assert_int_equal(nbd_export_reply(to, &server, 4096, NBD_FLAG_HAS_FLAGS), NBD_EXPORT_REPLY);
    assert_memory_equal(to, "\0\0\0\0\0\0\x10\0\0\1\0", 11);
    server.no_zeroes = true;
    assert_int_equal(nbd_export_reply(to, &server, 4096, NBD_FLAG_HAS_FLAGS), 10);
    static const int known[] = {0, 1, 5, 12, 22, 28, 75, 95, 108};
    for (int err = 0; err < 200; err++) {
        uint32_t wire = nbd_error_from(-err);
        bool good = false;
        for (size_t i = 0; i < sizeof known / sizeof *known; i++)
            good |= wire == (uint32_t)known[i];
        assert_true(good && !wire == !err);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup(test_greeting, fresh), cmocka_unit_test_setup(test_go, fresh),
        cmocka_unit_test_setup(test_refused, fresh),  cmocka_unit_test_setup(test_too_long, fresh),
        cmocka_unit_test_setup(test_contexts, fresh), cmocka_unit_test_setup(test_requests, fresh),
        cmocka_unit_test_setup(test_answers, fresh),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
