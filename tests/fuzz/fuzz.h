/* What the fuzz targets share. A target is LLVMFuzzerTestOneInput of libFuzzer over bytes that somebody else may
 * choose; what has to hold for all of them is said by MUST, which ends the run as a sanitizer's finding does. */
#ifndef TESTS_FUZZ_H
#define TESTS_FUZZ_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define MUST(cond, ...)                                                                                                \
    do {                                                                                                               \
        if (!(cond)) {                                                                                                 \
            fprintf(stderr, "%s:%d: not so: %s: ", __FILE__, __LINE__, #cond);                                         \
            fprintf(stderr, __VA_ARGS__);                                                                              \
            fputc('\n', stderr);                                                                                       \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

/* The input as a supply of decisions; an exhausted one yields zeros. */
struct in {
    const uint8_t *at, *end;
};

static inline size_t in_left(const struct in *in)
{
    return (size_t)(in->end - in->at);
}

static inline uint8_t in_u8(struct in *in)
{
    return in_left(in) ? *in->at++ : 0;
}

static inline uint16_t in_u16(struct in *in)
{
    uint16_t high = in_u8(in);
    return (uint16_t)(high << 8 | in_u8(in));
}

static inline uint64_t in_u64(struct in *in)
{
    uint64_t v = 0;
    for (int i = 0; i < 8; i++)
        v = v << 8 | in_u8(in);
    return v;
}

/* Up to n bytes as they are. */
static inline const uint8_t *in_take(struct in *in, size_t *n)
{
    const uint8_t *p = in->at;
    if (*n > in_left(in))
        *n = in_left(in);
    in->at += *n;
    return p;
}

#endif
