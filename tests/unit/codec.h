/* What every message of a codec has to stand, by table: there and back, every cap too small, every prefix, a byte too
 * many, and random damage. Bytes are handed over in allocations of their exact size, so that a sanitizer sees a read
 * beyond. */
#ifndef TESTS_CODEC_H
#define TESTS_CODEC_H

#include <errno.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <cmocka.h>

#define CODEC_BYTES 65536u

struct codec {
    const char *name;
    void (*fill)(void *m); /* every field with a value of its own, strings too */
    size_t (*put)(void *to, size_t cap, const void *m);
    int (*get)(const void *p, size_t len, void *m);
    size_t size;
    bool open_end; /* more bytes at the end are passed over */
};

/* For codecs whose functions take the message and nothing else. */
#define CODEC_PLAIN(prefix, what)                                                                                      \
    static size_t what##_put(void *to, size_t cap, const void *m)                                                      \
    {                                                                                                                  \
        return prefix##_##what##_put(to, cap, m);                                                                      \
    }                                                                                                                  \
    static int what##_get(const void *p, size_t len, void *m)                                                          \
    {                                                                                                                  \
        return prefix##_##what##_get(p, len, m);                                                                       \
    }
#define CODEC(prefix, what)                                                                                            \
    {                                                                                                                  \
#what, what##_fill, what##_put, what##_get, sizeof(struct prefix##_##what), false                              \
    }

static inline uint32_t chance(uint32_t *x)
{
    *x ^= *x << 13;
    *x ^= *x >> 17;
    return *x ^= *x << 5;
}

static inline uint8_t *exact(const void *p, size_t len)
{
    uint8_t *copy = malloc(len ? len : 1);
    assert_non_null(copy);
    if (len)
        memcpy(copy, p, len);
    return copy;
}

static inline int codec_get(const struct codec *c, const void *p, size_t len, void *m)
{
    uint8_t *copy = exact(p, len);
    memset(m, 0xa5, c->size);
    int rc = c->get(copy, len, m);
    free(copy);
    if (rc && rc != -EPROTO)
        fail_msg("%s: get returned %d", c->name, rc);
    return rc;
}

static inline void codec_round_trip(const struct codec *c)
{
    void *m = calloc(1, c->size), *back = malloc(c->size);
    static uint8_t bytes[CODEC_BYTES], again[CODEC_BYTES];
    c->fill(m);
    size_t n = c->put(bytes, sizeof bytes, m);
    if (!n || codec_get(c, bytes, n, back))
        fail_msg("%s: %zu bytes do not come back", c->name, n);
    if (c->put(again, sizeof again, back) != n || memcmp(bytes, again, n))
        fail_msg("%s: comes back as something else", c->name);

    for (size_t cap = 0; cap < n; cap++) {
        uint8_t *small = exact(bytes, cap);
        if (c->put(small, cap, m))
            fail_msg("%s: written into %zu bytes of %zu", c->name, cap, n);
        free(small);
        if (codec_get(c, bytes, cap, back) != -EPROTO)
            fail_msg("%s: %zu bytes of %zu were taken", c->name, cap, n);
    }
    bytes[n] = 0;
    if (codec_get(c, bytes, n + 1, back) != (c->open_end ? 0 : -EPROTO))
        fail_msg("%s: a byte too many", c->name);
    free(m);
    free(back);
}

/* Damaged bytes are refused, or they are the one and only form of another message. */
static inline void codec_damage(const struct codec *c, uint32_t seed, int rounds)
{
    void *m = calloc(1, c->size);
    static uint8_t good[CODEC_BYTES], bad[CODEC_BYTES], again[CODEC_BYTES];
    c->fill(m);
    size_t n = c->put(good, sizeof good, m);
    for (int i = 0; i < rounds; i++) {
        size_t len = n;
        memcpy(bad, good, n);
        for (uint32_t k = chance(&seed) % 4 + 1; k; k--) {
            uint32_t r = chance(&seed);
            size_t at = chance(&seed) % len;
            unsigned byte = r & 256 ? bad[at] ^ 1u << r % 8 : r & 512 ? r % 256 : r & 1024 ? 0xff : 0;
            bad[at] = (uint8_t)byte;
        }
        if (chance(&seed) % 8 == 0)
            len = chance(&seed) % (n + 1);
        if (codec_get(c, bad, len, m))
            continue;
        size_t back = c->put(again, sizeof again, m);
        if (memcmp(bad, again, back) || (c->open_end ? back > len : back != len))
            fail_msg("%s: round %d: two forms of one message", c->name, i);
    }
    free(m);
}

#endif
