#include "agent/net/pack.h"

#include <errno.h>
#include <lz4.h>
#include <stdlib.h>
#include <string.h>

struct packer {
    LZ4_stream_t state;
    uint8_t out[FRAME_PAYLOAD_MAX];
};

bool pack_worth(const char *address)
{
    return strncmp(address, "file:", 5) && strncmp(address, "unix:", 5);
}

struct packer *packer_new(void)
{
    return malloc(sizeof(struct packer));
}

void packer_free(struct packer *p)
{
    free(p);
}

/* Bytes that `len` ones become, 0 if that is not at least a sixteenth less. */
static int squeeze(struct packer *p, const uint8_t *from, uint32_t len, uint8_t *to)
{
    return LZ4_compress_fast_extState(&p->state, (const char *)from, (char *)to, (int)len, (int)(len - len / 16), 1);
}

/* Where it says no it has cost a fiftieth of what the whole payload may cost. */
static bool promises(struct packer *p, const uint8_t *data, uint32_t len)
{
    return len <= PACK_SAMPLE || squeeze(p, data + (len - PACK_SAMPLE) / 2, PACK_SAMPLE, p->out) > 0;
}

const uint8_t *pack(struct packer *p, struct pack_sense *sense, const uint8_t *payload, uint32_t len, uint32_t data,
                    uint32_t *packed)
{
    if (len < PACK_MIN)
        return NULL;
    if (sense->left) {
        sense->left--;
        return NULL;
    }
    int n = promises(p, payload + data, len - data) ? squeeze(p, payload, len, p->out + FRAME_PACKED_HEAD) : 0;
    if (n <= 0) {
        sense->pause = !sense->pause ? 1 : sense->pause < PACK_PAUSE_MAX ? (uint8_t)(sense->pause * 2) : PACK_PAUSE_MAX;
        sense->left = sense->pause;
        return NULL;
    }
    sense->pause = 0;
    put_u32(p->out, len);
    *packed = FRAME_PACKED_HEAD + (uint32_t)n;
    return p->out;
}

int unpack(const struct buf *packed, struct buf **payload)
{
    uint32_t len = frame_packed_length(packed->data, packed->len);
    if (!len)
        return -EPROTO;
    struct buf *b = buf_new(len);
    if (!b)
        return -ENOMEM;
    int n = LZ4_decompress_safe((const char *)packed->data + FRAME_PACKED_HEAD, (char *)b->data,
                                (int)(packed->len - FRAME_PACKED_HEAD), (int)len);
    if (n != (int)len) {
        buf_drop(b);
        return -EPROTO;
    }
    b->len = len;
    *payload = b;
    return 0;
}
