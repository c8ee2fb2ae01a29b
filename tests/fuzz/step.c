/* frame_step over a stream that arrives in arbitrary pieces: the same frames, and the same end, whatever the cuts. The
 * input is a list of frames, each sealed as it should be, then damaged where it says so; what is left over follows as
 * raw bytes. */
#include "tests/fuzz/fuzz.h"
#include "wire/frame.h"

#define STREAM_MAX 65536u

struct seen {
    uint64_t frames, digest;
    size_t used;
    int64_t end; /* 0 or the error */
};

static uint8_t stream[STREAM_MAX];

/* What a receiver does with the first `have` bytes: all of its frames, one after the other. The bytes are handed over
 * in a block of just that size. */
static void receive(struct seen *seen, size_t have)
{
    while (!seen->end) {
        size_t n = have - seen->used;
        uint8_t *exact = malloc(n ? n : 1);
        struct frame_header h = {0};
        memcpy(exact, stream + seen->used, n);
        int64_t step = frame_step(exact, n, &h);
        if (step > 0) {
            MUST((size_t)step == FRAME_HEADER + h.len && (size_t)step <= n, "a step of %lld in %zu bytes",
                 (long long)step, n);
            MUST(h.type && h.type < FRAME_TYPES && h.len <= FRAME_PAYLOAD_MAX, "type %u, %u bytes", h.type, h.len);
            seen->digest =
                seen->digest * 31 + frame_payload_hash(exact + FRAME_HEADER, h.len) + h.type + h.stream + h.order;
            seen->frames++;
            seen->used += (size_t)step;
        }
        if (step < 0)
            seen->end = step;
        free(exact);
        if (!step)
            return;
    }
}

static size_t build(struct in *in)
{
    size_t len = 0;
    for (uint8_t frames = in_u8(in) % 16; frames && in_left(in); frames--) {
        uint8_t type = in_u8(in), number = in_u8(in), damage = in_u8(in);
        size_t n = in_u8(in);
        const uint8_t *payload = in_take(in, &n);
        uint8_t *at = stream + len;
        memcpy(at + FRAME_HEADER, payload, n);
        frame_header_put(at, type, number, number ? damage : 0, (uint32_t)n, frame_payload_hash(payload, n));
        if (damage >= 0xf0)
            at[in_u8(in) % (FRAME_HEADER + n)] ^= (uint8_t)(damage + 1);
        len += FRAME_HEADER + n;
    }
    size_t rest = in_left(in);
    if (rest > STREAM_MAX - len)
        rest = STREAM_MAX - len;
    memcpy(stream + len, in_take(in, &rest), rest);
    return len + rest;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct in in = {data, data + size};
    if (size < 2 || size > 8192)
        return 0;
    struct in cuts = {data, data + size}; /* the same bytes say where the pieces end */
    size_t len = build(&in), have = 0;
    struct seen whole = {0}, pieces = {0};
    receive(&whole, len);
    while (have < len) {
        size_t piece = 1u + in_u8(&cuts) % 61u;
        have += piece < len - have ? piece : len - have;
        receive(&pieces, have);
    }
    MUST(whole.frames == pieces.frames && whole.digest == pieces.digest && whole.used == pieces.used &&
             whole.end == pieces.end,
         "%llu frames and %lld at once, %llu and %lld in pieces", (unsigned long long)whole.frames,
         (long long)whole.end, (unsigned long long)pieces.frames, (long long)pieces.end);
    return 0;
}
