/* A program that a test walks through, step by step: stepper FILE SIZE maps the file and does what lines on its
 * standard input say, answering each with "COMMAND RESULT MICROSECONDS", where RESULT is 0 or the errno's name.
 *
 *   s OFFSET LEN SEED   stores to the mapping      w OFFSET LEN SEED   writes by pwrite     z SIZE   ftruncate
 *   m [OFFSET LEN]      msync                      d                   fdatasync            a        msync(MS_ASYNC)
 *   r COUNT SEED        stores 64 bytes to each of COUNT pages at random
 *   n COUNT SEED        COUNT times: stores to one page and msyncs it; answers with the median
 *   u                   munmap and exit            q                   exit                 k        _exit without a
 * word
 */
#include "plain.h"

#include <inttypes.h>
#include <time.h>

static int fd;
static unsigned char *map;
static size_t size;

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

/* The median of single-page stores with a sync point after each. */
static int one_page_syncs(uint64_t count, uint64_t seed, uint64_t *median)
{
    uint64_t *took = calloc(count, sizeof *took);
    MUST(took && count);
    for (uint64_t i = 0; i < count; i++) {
        size_t at = (seed + i * 7919) % (size / PAGE) * PAGE;
        map[at + i % PAGE]++;
        uint64_t start = now_us();
        if (msync(map + at, PAGE, MS_SYNC) != 0)
            return -1;
        took[i] = now_us() - start;
    }
    qsort(took, count, sizeof *took, by_number);
    *median = took[count / 2];
    free(took);
    return 0;
}

static int step(char what, uint64_t a, uint64_t b, uint64_t c, uint64_t *took)
{
    unsigned char word[64];
    switch (what) {
    case 's':
        MUST(a + b <= size);
        fill(map + a, b, c);
        return 0;
    case 'r':
        for (uint64_t i = 0, x = 2 * b + 1; i < a; i++) {
            x = x * 6364136223846793005u + 1442695040888963407u;
            fill(word, sizeof word, x);
            memcpy(map + (x >> 20) % (size / PAGE) * PAGE + 128, word, sizeof word);
        }
        return 0;
    case 'w':
        write_at(fd, b, (off_t)a, c);
        return 0;
    case 'z':
        return ftruncate(fd, (off_t)a);
    case 'm':
        return msync(map + a, b ? b : size, MS_SYNC);
    case 'a':
        return msync(map, size, MS_ASYNC);
    case 'd':
        return fdatasync(fd);
    case 'n':
        return one_page_syncs(a, b, took);
    default:
        errno = EINVAL;
        return -1;
    }
}

int main(int argc, char **argv)
{
    char line[256];
    if (argc != 3)
        return 2;
    size = (size_t)atoll(argv[2]);
    fd = make_file(argv[1], (off_t)size);
    map = map_shared(fd, size, 0);
    setvbuf(stdout, NULL, _IOLBF, 0);
    printf("pid %d\n", (int)getpid());
    while (fgets(line, sizeof line, stdin)) {
        uint64_t a = 0, b = 0, c = 0, start = now_us(), took = 0;
        sscanf(line + 1, "%" SCNu64 " %" SCNu64 " %" SCNu64, &a, &b, &c);
        if (line[0] == 'q')
            return 0;
        if (line[0] == 'k')
            _exit(0);
        if (line[0] == 'u')
            return munmap(map, size) != 0;
        int rc = step(line[0], a, b, c, &took);
        int error = errno;
        if (!took)
            took = now_us() - start;
        printf("%c %s %" PRIu64 "\n", line[0], rc == 0 ? "0" : strerrorname_np(error), took);
    }
    return 0;
}
