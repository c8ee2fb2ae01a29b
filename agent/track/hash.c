/* Tracking by content: everything may have changed, and the capture's reading tells by the published hashes. Sees every
 * writer; reads the whole region. */
#include "agent/track/track.h"

#include <errno.h>
#include <unistd.h>

/* Pages of [start, end) that were published as anything but zeros, although the file has a hole there now. */
static void hole(const struct track_file *file, uint64_t start, uint64_t end, struct extents *out)
{
    const struct hashes *h = file->published;
    start = start > file->holes_from ? start : file->holes_from;
    for (uint64_t p = hashes_next(h, start / PAGE); p < h->pages && p * PAGE < end; p = hashes_next(h, p + 1))
        extents_add(out, p * PAGE, (p + 1) * PAGE);
}

int track_within(const struct track_file *file, uint64_t start, uint64_t end, struct extents *out)
{
    if (end > file->size)
        end = file->size;
    while (start < end) {
        off_t data = lseek(file->fd, (off_t)start, SEEK_DATA);
        if (data < 0 && errno != ENXIO) {
            extents_add(out, start, end); /* a file system without SEEK_DATA: all of it is data */
            return 0;
        }
        uint64_t from = data < 0 || (uint64_t)data > end ? end : (uint64_t)data;
        hole(file, start, from, out);
        if (from == end)
            return 0;
        off_t past = lseek(file->fd, (off_t)from, SEEK_HOLE);
        uint64_t to = past < 0 || (uint64_t)past > end ? end : (uint64_t)past;
        extents_add(out, from, to);
        start = to;
    }
    return 0;
}

int track_everything(const struct track_file *file, struct extents *out)
{
    return track_within(file, 0, file->size, out);
}

static int hash_arm(const struct track_map *map)
{
    (void)map;
    return 0;
}

static int hash_collect(const struct track_map *map, const struct track_file *file, struct extents *out)
{
    return track_within(file, map->offset, map->offset + map->len, out);
}

const struct track_ops track_hash = {.name = "hash", .arm = hash_arm, .collect = hash_collect, .reads_all = true};

int track_collect(const struct track_map *map, const struct track_file *file, struct extents *out)
{
    if (!map->len || map->addr % PAGE || map->offset % PAGE)
        return -EINVAL;
    return map->ops->collect(map, file, out);
}
