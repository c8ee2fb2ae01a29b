/* pread and pwrite of all bytes. 0 or negative errno; -EIO at an early end. Any thread. */
#include "agent/store/inside.h"

#include <errno.h>
#include <unistd.h>

int io_write(int fd, const void *data, size_t len, uint64_t offset)
{
    for (const uint8_t *p = data; len;) {
        ssize_t n = pwrite(fd, p, len, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -EIO;
        p += n;
        len -= (size_t)n;
        offset += (size_t)n;
    }
    return 0;
}

int io_read(int fd, void *to, size_t len, uint64_t offset)
{
    for (uint8_t *p = to; len;) {
        ssize_t n = pread(fd, p, len, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -EIO;
        p += n;
        len -= (size_t)n;
        offset += (size_t)n;
    }
    return 0;
}
