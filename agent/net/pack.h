/* PACKED frames: PAGES payloads made shorter by LZ4, where that pays. Any thread; a packer is one thread's at a time.
 *
 * Trying costs, so it is first tried on a sample from the middle of the page bytes, and after samples that did not pay
 * it is left alone for 1, 2, 4 .. PACK_PAUSE_MAX payloads: random data then costs less than a thousandth of what
 * reading, hashing and sending it does. Neighbours are much alike, so what was learned is kept with the file (struct
 * pack_sense). */
#ifndef NET_PACK_H
#define NET_PACK_H

#include "agent/base/buf.h"
#include "wire/frame.h"

#define PACK_MIN 1400u /* shorter ones make one packet of a network anyway */
#define PACK_SAMPLE 4096u
#define PACK_PAUSE_MAX 8u /* half a MiB: not much is missed where the kind of data changes */

struct pack_sense {
    uint8_t pause, left; /* payloads to be left alone after the next failure; and now */
};

struct packer;

bool pack_worth(const char *address); /* whether bytes to it may leave this host: else only time would be spent */
struct packer *packer_new(void);      /* NULL without memory */
void packer_free(struct packer *p);
/* The PACKED payload of a PAGES payload whose page bytes begin at `data`; good until the next call. NULL: it does not
 * save a sixteenth, or was not tried. */
const uint8_t *pack(struct packer *p, struct pack_sense *sense, const uint8_t *payload, uint32_t len, uint32_t data,
                    uint32_t *packed);
/* The PAGES payload in a PACKED one: 0, -EPROTO (nothing was believed that it says), -ENOMEM. */
int unpack(const struct buf *packed, struct buf **payload);

#endif
