/* PACKED payloads: what is packed comes out as it was, what does not pay is left alone, and nothing hostile is
 * believed. */
#include "agent/net/pack.h"

#include <errno.h>
#include <lz4.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <cmocka.h>

#define TABLE (FRAME_PAGES_HEAD + FRAME_PAGES_ENTRY)

static uint8_t payload[FRAME_PAYLOAD_MAX];
static struct packer *packer;

static void random_fill(uint8_t *to, size_t len, uint64_t seed)
{
    uint64_t x = seed * 0x9e3779b97f4a7c15u + 1;
    for (size_t i = 0; i < len; i++) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        to[i] = (uint8_t)(x >> 32);
    }
}

static void text_fill(uint8_t *to, size_t len, uint64_t seed)
{
    static const char *const words[] = {"the ",   "page ", "of ",     "a ",   "region ",
                                        "moves ", "to ",   "remote ", "and ", "\n"};
    uint8_t dice[64];
    for (size_t i = 0, d = 0; i < len; d++) {
        if (!(d % sizeof dice))
            random_fill(dice, sizeof dice, seed + d);
        for (const char *w = words[dice[d % sizeof dice] % 10]; *w && i < len; w++)
            to[i++] = (uint8_t)*w;
    }
}

static struct buf *held(const uint8_t *from, uint32_t len)
{
    struct buf *b = buf_new(len);
    memcpy(b->data, from, len);
    b->len = len;
    return b;
}

static int set_up(void **state)
{
    (void)state;
    packer = packer_new();
    return packer ? 0 : -1;
}

static int tear_down(void **state)
{
    (void)state;
    packer_free(packer);
    return 0;
}

static void round_trip(void **state)
{
    (void)state;
    static const uint32_t lengths[] = {PACK_MIN, PACK_MIN + 1,           PACK_SAMPLE,      PACK_SAMPLE + TABLE + 1,
                                       30000,    FRAME_DATA_MAX + TABLE, FRAME_PAYLOAD_MAX};
    struct pack_sense sense = {0};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        uint32_t len = lengths[i], packed = 0;
        text_fill(payload, len, i);
        const uint8_t *p = pack(packer, &sense, payload, len, TABLE, &packed);
        assert_non_null(p);
        assert_true(packed < len - len / 16 + FRAME_PACKED_HEAD + 1);
        struct buf *b = held(p, packed), *out = NULL;
        assert_int_equal(unpack(b, &out), 0);
        assert_int_equal(out->len, len);
        assert_memory_equal(out->data, payload, len);
        buf_drop(out);
        buf_drop(b);
    }
}

/* As far as the library itself gets with the whole block. */
static void packs_well(void **state)
{
    (void)state;
    static uint8_t other[FRAME_PAYLOAD_MAX * 2];
    struct pack_sense sense = {0};
    for (uint64_t i = 0; i < 20; i++) {
        uint32_t packed = 0;
        text_fill(payload + TABLE, FRAME_DATA_MAX, i);
        memset(payload, 0, TABLE);
        int best = LZ4_compress_default((const char *)payload + TABLE, (char *)other, FRAME_DATA_MAX, sizeof other);
        assert_non_null(pack(packer, &sense, payload, TABLE + FRAME_DATA_MAX, TABLE, &packed));
        assert_true(packed <= (uint32_t)best + 2 * TABLE);
    }
}

static void leaves_alone(void **state)
{
    (void)state;
    struct pack_sense sense = {0};
    uint32_t packed;
    text_fill(payload, PACK_MIN - 1, 1);
    assert_null(pack(packer, &sense, payload, PACK_MIN - 1, TABLE, &packed));
    assert_int_equal(sense.pause, 0); /* nothing learned */

    unsigned tried = 0;
    for (uint64_t i = 0; i < 1000; i++) {
        unsigned before = sense.left;
        random_fill(payload, FRAME_DATA_MAX + TABLE, i + 1);
        assert_null(pack(packer, &sense, payload, FRAME_DATA_MAX + TABLE, TABLE, &packed));
        tried += sense.left >= before && !before;
    }
    assert_in_range(tried, 1000 / (PACK_PAUSE_MAX + 1), 1000 / (PACK_PAUSE_MAX + 1) + 4);

    unsigned missed = 0;
    text_fill(payload, FRAME_DATA_MAX + TABLE, 1);
    while (!pack(packer, &sense, payload, FRAME_DATA_MAX + TABLE, TABLE, &packed))
        missed++;
    assert_true(missed <= PACK_PAUSE_MAX);
    assert_non_null(pack(packer, &sense, payload, FRAME_DATA_MAX + TABLE, TABLE, &packed));
}

static int unpacked(const uint8_t *p, uint32_t len)
{
    struct buf *b = held(p, len), *out = NULL;
    int rc = unpack(b, &out);
    assert_true(rc == 0 ? !!out : !out);
    buf_drop(out);
    buf_drop(b);
    return rc;
}

static void hostile(void **state)
{
    (void)state;
    static uint8_t bad[FRAME_PAYLOAD_MAX];
    struct pack_sense sense = {0};
    uint32_t packed;
    text_fill(payload, 20000, 1);
    const uint8_t *p = pack(packer, &sense, payload, 20000, TABLE, &packed);
    assert_non_null(p);
    memcpy(bad, p, packed);
    static const uint32_t lies[] = {0, 1, 19999, 20001, FRAME_PAYLOAD_MAX, FRAME_PAYLOAD_MAX + 1, UINT32_MAX};
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        put_u32(bad, lies[i]);
        assert_int_equal(unpacked(bad, packed), -EPROTO);
    }
    put_u32(bad, 20000);
    assert_int_equal(unpacked(bad, packed), 0);
    for (uint32_t len = 0; len < packed; len += len < 10 ? 1 : 97) /* cut */
        assert_int_equal(unpacked(bad, len), -EPROTO);
    for (uint32_t more = 1; more < 40; more++) { /* trailing */
        bad[packed + more - 1] = (uint8_t)(more * 7);
        assert_int_equal(unpacked(bad, packed + more), -EPROTO);
    }
    for (uint64_t i = 0; i < 5000; i++) { /* damaged, or nothing of the kind: no more is asked than that it ends well */
        memcpy(bad, p, packed);
        random_fill(bad + 4 + i % (packed - 12), 8, i + 1);
        unpacked(bad, packed);
        random_fill(bad + 4, 500, i + 1);
        unpacked(bad, 504);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test_setup_teardown(round_trip, set_up, tear_down),
        cmocka_unit_test_setup_teardown(packs_well, set_up, tear_down),
        cmocka_unit_test_setup_teardown(leaves_alone, set_up, tear_down),
        cmocka_unit_test_setup_teardown(hostile, set_up, tear_down),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
