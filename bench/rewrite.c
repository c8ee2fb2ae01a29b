/* Rewrites every page of a mapped file in full, TIMES times between two sync points, ROUNDS rounds: says the medians of
 * the time for the stores and of the time for stores and sync point, in microseconds. */
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static uint64_t now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000u + (uint64_t)t.tv_nsec / 1000u;
}

static int by_number(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

int main(int argc, char **argv)
{
    if (argc != 6) {
        fprintf(stderr, "usage: rewrite FILE SIZE TIMES ROUNDS PAUSE\n");
        return 2;
    }
    size_t size = (size_t)atoll(argv[2]);
    int times = atoi(argv[3]), rounds = atoi(argv[4]), fd = open(argv[1], O_RDWR | O_CREAT, 0600);
    if (fd < 0 || rounds < 1 || ftruncate(fd, (off_t)size) != 0)
        return 3;
    char *map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    uint64_t *stores = calloc((size_t)rounds, sizeof *stores), *all = calloc((size_t)rounds, sizeof *all);
    if (map == MAP_FAILED || !stores || !all)
        return 3;
    useconds_t pause = (useconds_t)atoi(argv[5]) * 1000;
    for (int round = -1; round < rounds; round++) { /* the first warms up */
        uint64_t start = now_us();
        for (int i = 0; i < times; i++)
            for (size_t at = 0; at < size; at += 4096)
                memset(map + at, (int)(at / 4096) + i + round, 4096);
        uint64_t stored = now_us();
        if (msync(map, size, MS_SYNC) != 0)
            return 3;
        if (round >= 0) {
            stores[round] = stored - start;
            all[round] = now_us() - start;
        }
        usleep(pause);
    }
    qsort(stores, (size_t)rounds, sizeof *stores, by_number);
    qsort(all, (size_t)rounds, sizeof *all, by_number);
    printf("stores %llu\nall %llu\n", (unsigned long long)stores[rounds / 2], (unsigned long long)all[rounds / 2]);
    return 0;
}
