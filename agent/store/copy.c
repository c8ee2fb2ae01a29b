/* Moved pages: COPY entries made plain DATA before their epoch can be committed, on a spilling job's thread.
 *
 * A COPY names a page as the epoch before left it. Epochs are applied again after a crash, and this one may overwrite
 * what its own entries name, so nothing of the kind may stand in the journal or in a spill file: a transaction with
 * COPY frames is a large one, whatever its size, and each of its frames is expanded as it goes to the spill file, which
 * is on disk before the record that names it. Dying before that record is whole leaves a spill file that nothing names;
 * after it, recovery finds DATA only.
 *
 * The region's file is the base, and it holds still while it is read:
 *   - Spilling waits until the file has the epoch that the transaction continues (region.applied is its base):
 *     predecessors are on their way in the queue, being committed, or being applied, none of which waits for this one.
 *   - Nobody else changes the file before this epoch is applied. An epoch that continues the same base is refused when
 *     it is handed in after this one, and makes this one fail at its own check when it is handed in before; later ones
 *     are applied later. A predecessor that fails leaves this one without its base: it waits, and is refused when it
 *     is handed in, or aborted. An aborted one never touches the file.
 *   - Pins read around the file's changes and make none.
 * Were all this wrong, the page's hash would tell: what is written is checked, page for page, to be what the writer
 * has. A page that is not fails the epoch with -EBADMSG, as a delta does that does not come out.
 *
 * 40 bytes of COPY make 4096: frame by frame they go straight to the file, never into memory as a whole, and no more of
 * them are taken than the region has pages. */
#include "agent/store/inside.h"

#include "agent/base/xxh3.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define TABLE_MAX (FRAME_PAGES_HEAD + FRAME_PAGES_ENTRIES * FRAME_PAGES_ENTRY)

struct plain {
    struct store *s;
    copies_put *put;
    void *arg;
    struct frame_extent e[FRAME_PAGES_ENTRIES];
    uint32_t count, bytes;
    uint8_t room[TABLE_MAX + FRAME_DATA_MAX]; /* the table before the data, in one piece */
};

static int plain_flush(struct plain *f)
{
    uint32_t table = FRAME_PAGES_HEAD + f->count * FRAME_PAGES_ENTRY;
    uint8_t *payload = f->room + TABLE_MAX - table;
    if (!f->count)
        return 0;
    frame_pages_put(payload, table, 0, f->e, f->count);
    int err = f->put(f->arg, payload, table + f->bytes);
    f->count = f->bytes = 0;
    return err;
}

static uint32_t data_bytes(const struct frame_extent *e)
{
    switch (e->kind) {
    case FRAME_PAGES_ZEROS:
        return 0;
    case FRAME_PAGES_DELTA:
        return FRAME_DELTA_HEAD + (uint32_t)__builtin_popcount(frame_delta_of(e).mask) * FRAME_DELTA_BLOCK;
    default:
        return e->len;
    }
}

static int plain_add(struct plain *f, const struct frame_extent *e)
{
    uint32_t bytes = data_bytes(e);
    uint32_t table = FRAME_PAGES_HEAD + (f->count + 1) * FRAME_PAGES_ENTRY;
    if (f->count == FRAME_PAGES_ENTRIES || f->bytes + bytes > FRAME_DATA_MAX ||
        table + f->bytes + bytes > FRAME_PAYLOAD_MAX) {
        int err = plain_flush(f);
        if (err)
            return err;
    }
    f->e[f->count++] = *e;
    if (bytes)
        memcpy(f->room + TABLE_MAX + f->bytes, e->data, bytes);
    f->bytes += bytes;
    return 0;
}

static int extent_plain(void *arg, struct part *p, const struct frame_extent *e)
{
    struct plain *f = arg;
    if (e->kind != FRAME_PAGES_COPY)
        return plain_add(f, e);
    struct frame_copy copy = frame_copy_of(e);
    XXH128_canonical_t sum;
    uint8_t page[FRAME_PAGE];
    int err = region_page(f->s, p->r, copy.source / FRAME_PAGE, page);
    if (err)
        return err;
    XXH128_canonicalFromHash(&sum, XXH3_128bits(page, FRAME_PAGE));
    if (memcmp(&sum, copy.hash, sizeof sum))
        return -EBADMSG;
    return plain_add(
        f, &(struct frame_extent){.offset = e->offset, .len = FRAME_PAGE, .kind = FRAME_PAGES_DATA, .data = page});
}

int copies_expand(struct store *s, struct part *p, const struct buf *b, copies_put *put, void *arg)
{
    struct plain *f = malloc(sizeof *f);
    if (!f)
        return -ENOMEM;
    f->s = s;
    f->put = put;
    f->arg = arg;
    f->count = f->bytes = 0;
    int err = frame_extents(p, b->data, b->len, PAGES_RAW, extent_plain, f);
    if (!err)
        err = plain_flush(f);
    free(f);
    return err;
}

const char *copy_fault(const struct part *p, const struct frame_extent *e)
{
    if (p->created || p->min_size != UINT64_MAX)
        return "moved pages in an epoch that creates or cuts the region";
    uint64_t source = frame_copy_of(e).source;
    if (source > p->base_size || p->base_size - source < FRAME_PAGE)
        return "a moved page from beyond the region's end";
    if (p->copies >= p->size / FRAME_PAGE + 1)
        return "more moved pages than the region has";
    return NULL;
}
