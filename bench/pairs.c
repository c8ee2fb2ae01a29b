/* What a pair of mmap and munmap costs, in ns: anonymous memory, and a file that no rule matches. Best of many short
 * runs, since noise only adds. */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAIRS 2000
#define RUNS 200

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static double best(int flags, int fd)
{
    double least = 1e18;
    for (int run = 0; run < RUNS; run++) {
        uint64_t start = now_ns();
        for (int i = 0; i < PAIRS; i++) {
            void *p = mmap(NULL, 65536, PROT_READ | PROT_WRITE, flags, fd, 0);
            if (p == MAP_FAILED || munmap(p, 65536) != 0)
                exit(1);
        }
        double each = (double)(now_ns() - start) / PAIRS;
        if (each < least)
            least = each;
    }
    return least;
}

int main(int argc, char **argv)
{
    int fd = argc == 2 ? open(argv[1], O_RDWR | O_CREAT, 0600) : -1;
    if (fd < 0 || ftruncate(fd, 65536) != 0) {
        fprintf(stderr, "usage: pairs FILE\n");
        return 2;
    }
    printf("anonymous %.1f\nfile %.1f\n", best(MAP_PRIVATE | MAP_ANONYMOUS, -1), best(MAP_SHARED, fd));
    return 0;
}
