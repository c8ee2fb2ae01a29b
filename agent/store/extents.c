/* Where a pinned region has data and where holes: of pages saved aside the side file tells, of others the region's own.
 */
#include "agent/store/inside.h"

#include <errno.h>
#include <unistd.h>

/* The end of what begins at `at` in a file, `end` at most. Behind the file's end there is nothing but a hole. */
static int file_extent(int fd, uint64_t at, uint64_t end, struct store_extent *e)
{
    *e = (struct store_extent){.end = end, .hole = true};
    off_t data = lseek(fd, (off_t)at, SEEK_DATA);
    if (data < 0 && errno == ENXIO)
        return 0;
    if (data >= 0 && (uint64_t)data > at) {
        e->end = (uint64_t)data < end ? (uint64_t)data : end;
        return 0;
    }
    e->hole = false;
    off_t hole = data < 0 ? -1 : lseek(fd, (off_t)at, SEEK_HOLE);
    if (hole > (off_t)at && (uint64_t)hole < end)
        e->end = (uint64_t)hole;
    return data < 0 && errno != EINVAL ? -errno : 0; /* a file system without holes: data */
}

/* Adds it to the last one when it goes on with that. False: no more fit. */
static bool extent_add(struct buf *to, const struct store_extent *e)
{
    struct store_extent *all = (void *)to->data;
    size_t n = to->len / sizeof *all;
    if (n && all[n - 1].hole == e->hole) {
        all[n - 1].end = e->end;
        return true;
    }
    if (n == STORE_EXTENTS)
        return false;
    all[n] = *e;
    to->len += (uint32_t)sizeof *all;
    return true;
}

int pin_extents(struct store_pin *pin, uint64_t offset, uint64_t end, struct buf *to)
{
    int err = 0;
    struct store_extent e;
    for (uint64_t at = offset; !err && at < end; at = e.end) {
        uint64_t page = at / FRAME_PAGE, stop = page + 1;
        bool saved = pin_saved(pin, page);
        while (pin->saved && stop * FRAME_PAGE < end && pin_saved(pin, stop) == saved)
            stop++;
        uint64_t same = pin->saved && stop * FRAME_PAGE < end ? stop * FRAME_PAGE : end;
        err = file_extent(saved ? pin->side : pin->r->fd, at, same, &e);
        if (!err && !extent_add(to, &e))
            break;
    }
    return err;
}
