/* What trying to pack random data costs beside what is done with it anyway: pages hashed, copied into a frame, the
 * frame hashed.  packing MIB  says milliseconds of CPU a GiB for "plain" and "packing", taken by turns. */
#include "agent/net/pack.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <xxhash.h>

#define TABLE (FRAME_PAGES_HEAD + FRAME_PAGES_ENTRY)
#define TURN 256u /* frames */

static double cpu_ms(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec * 1e3 + (double)t.tv_nsec / 1e6;
}

/* TURN frames from `from`; the sum keeps the work from being left out. */
static uint64_t frames(const uint8_t *from, struct packer *packer, struct pack_sense *sense)
{
    static uint8_t payload[TABLE + FRAME_DATA_MAX], out[FRAME_PAYLOAD_MAX];
    uint64_t sum = 0;
    for (uint32_t i = 0; i < TURN; i++, from += FRAME_DATA_MAX) {
        uint32_t len = sizeof payload, packed;
        struct frame_extent e = {.offset = (uint64_t)i * FRAME_DATA_MAX, .len = FRAME_DATA_MAX};
        for (uint32_t at = 0; at < FRAME_DATA_MAX; at += FRAME_PAGE) {
            sum += XXH3_128bits(from + at, FRAME_PAGE).low64;
            memcpy(payload + TABLE + at, from + at, FRAME_PAGE);
        }
        frame_pages_put(payload, TABLE, 1, &e, 1);
        const uint8_t *shorter = packer ? pack(packer, sense, payload, len, TABLE, &packed) : NULL;
        memcpy(out, shorter ? shorter : payload, shorter ? packed : len);
        sum += frame_payload_hash(out, shorter ? packed : len);
    }
    return sum;
}

int main(int argc, char **argv)
{
    size_t turns = (size_t)(argc == 2 ? atoi(argv[1]) : 0) * 1048576 / (TURN * FRAME_DATA_MAX),
           size = (size_t)TURN * FRAME_DATA_MAX;
    uint8_t *data = malloc(size);
    struct packer *packer = packer_new();
    struct pack_sense sense = {0};
    double ms[2] = {0};
    uint64_t sum = 0, x = 88172645463325252u;
    if (!turns || !data || !packer) {
        fprintf(stderr, "usage: packing MIB\n");
        return 2;
    }
    for (size_t at = 0; at + 8 <= size; at += 8) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        memcpy(data + at, &x, 8);
    }
    for (size_t turn = 0; turn <= turns; turn++) /* the first warms up */
        for (int with = 0; with < 2; with++) {
            double start = cpu_ms();
            sum += frames(data, with ? packer : NULL, &sense);
            ms[with] += turn ? cpu_ms() - start : 0;
        }
    double gib = (double)turns * (double)size / (1 << 30);
    printf("plain %.2f\npacking %.2f\n", ms[0] / gib, ms[1] / gib);
    packer_free(packer);
    free(data);
    return sum == 1; /* never */
}
