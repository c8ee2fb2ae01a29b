/* Built as a shared library by the test, opened late by mapops. */
#include "../plain.h"

int maps_and_stores(const char *path)
{
    int fd = make_file(path, 16 * PAGE);
    unsigned char *p = map_shared(fd, 16 * PAGE, 0);
    fill(p, 5 * PAGE, 1);
    if (msync(p, 16 * PAGE, MS_SYNC) != 0)
        return -1;
    fill(p + 8 * PAGE, PAGE, 2);
    write_at(fd, 100, 12 * PAGE, 3);
    return close(fd);
}
