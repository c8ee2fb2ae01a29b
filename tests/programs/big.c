/* A sparse file of 6 GiB with stores and writes at both ends and around 4 GiB. */
#include "plain.h"

#define GIB ((off_t)1 << 30)

int main(int argc, char **argv)
{
    char path[4096];
    if (argc != 2)
        return 2;
    off_t size = 6 * GIB + 1234;
    int fd = make_file(in_dir(path, argv[1], "big"), size);
    unsigned char *p = map_shared(fd, (size_t)size, 0);
    fill(p, 3 * PAGE, 1);
    fill(p + 4 * GIB - PAGE, 2 * PAGE, 2);
    fill(p + size - 5000, 5000, 3);
    MUST(msync(p, (size_t)size, MS_SYNC) == 0);
    fill(p + PAGE, PAGE, 4);
    fill(p + 4 * GIB + 100, 10, 5);
    write_at(fd, 3 * PAGE, 5 * GIB - 77, 6);
    p[size - 1] = 99;
    MUST(fdatasync(fd) == 0);
    p[3 * GIB] = 1;
    return 0;
}
