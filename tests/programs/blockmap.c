/* blockmap DEVICE OFFSET [TEXT]: maps a block device (or file) as a whole. With TEXT: stores it there, and msyncs; else prints the 16 bytes that are there.
 * Exit code 0; the errno of what failed; 99: SIGBUS. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

static void on_bus(int number)
{
    (void)number;
    _exit(99);
}

int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    signal(SIGBUS, on_bus);
    size_t offset = strtoul(argv[2], NULL, 0);
    int fd = open(argv[1], argc > 3 ? O_RDWR : O_RDONLY);
    off_t size = fd < 0 ? -1 : lseek(fd, 0, SEEK_END);
    if (size < 0)
        return errno;
    if (offset + 16 > (size_t)size)
        return ERANGE;
    char *map = mmap(NULL, (size_t)size, argc > 3 ? PROT_READ | PROT_WRITE : PROT_READ, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED)
        return errno;
    if (argc == 3)
        return write(1, map + offset, 16) != 16;
    memcpy(map + offset, argv[3], strlen(argv[3]));
    return msync(map, (size_t)size, MS_SYNC) ? errno : 0;
}
