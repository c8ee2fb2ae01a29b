/* What finding changes by hash costs: hashes [REGION-MIB [ROUNDS]] prints kind,name,at,value,unit.
 *
 *   speed      GB/s of an algorithm by block size in bytes, over the same warm MiB of memory
 *   collision  probability by digest bits and region size: that any two of its 4 KiB pages, all different, have the
 * same digest (birthday bound, n(n-1)/2^(bits+1)); missed: that of all its pages, each changed once, one has the digest
 * it had before (n/2^bits) full       CPU ms to read a region's file through the page cache and hash all of it detect
 * CPU ms by share of dirty pages in percent, spread evenly: PAGEMAP_SCAN; scan and hash, which reads and hashes what
 * the scan named; stores, to one byte of each such page, with and without write protection
 *
 * Medians of rounds in which all candidates take turns. Times are CPU time of the thread, so that other load on the
 * machine counts for little. */
#include "agent/track/kernel.h"

#include <errno.h>
#include <fcntl.h>
#include <nmmintrin.h>
#include <openssl/evp.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include <xxhash.h>

#define PAGE 4096u
#define WARM (1u << 20)
#define SIZES 15u /* 64 bytes .. 1 MiB */
#define SHARES 6u
#define ROUNDS_MAX 100u
#define SPEEDS 5u         /* speeds have so many times the rounds: each is short, and noise is not */
#define READ (512u << 10) /* as the agent reads */
#define SAMPLE 2e-3       /* seconds that a speed is measured at least */

static volatile uint64_t sink; /* keeps results from being optimised away */

static void die(const char *what)
{
    fprintf(stderr, "hashes: %s: %s\n", what, strerror(errno));
    exit(1);
}

static double cpu(void)
{
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

/* ---- algorithms */

struct algorithm {
    const char *name, *evp;
    uint64_t (*hash)(const struct algorithm *a, const void *data, size_t len);
    EVP_MD *md;
};

static EVP_MD_CTX *context;
static uint32_t crc_table[256];

static uint64_t xxh3_64(const struct algorithm *a, const void *data, size_t len)
{
    (void)a;
    return XXH3_64bits(data, len);
}

static uint64_t xxh3_128(const struct algorithm *a, const void *data, size_t len)
{
    (void)a;
    return XXH3_128bits(data, len).low64;
}

static uint64_t xxh64(const struct algorithm *a, const void *data, size_t len)
{
    (void)a;
    return XXH64(data, len, 0);
}

static uint64_t crc_by_table(const struct algorithm *a, const void *data, size_t len)
{
    (void)a;
    const uint8_t *p = data;
    uint32_t crc = UINT32_MAX;
    while (len--)
        crc = crc_table[(crc ^ *p++) & 255] ^ crc >> 8;
    return ~crc;
}

__attribute__((target("sse4.2"))) static uint64_t crc_by_cpu(const struct algorithm *a, const void *data, size_t len)
{
    (void)a;
    const uint8_t *p = data;
    uint64_t crc = UINT32_MAX, word;
    for (; len >= sizeof word; len -= sizeof word, p += sizeof word) {
        memcpy(&word, p, sizeof word);
        crc = _mm_crc32_u64(crc, word);
    }
    while (len--)
        crc = _mm_crc32_u8((uint32_t)crc, *p++);
    return ~(uint32_t)crc;
}

static uint64_t by_openssl(const struct algorithm *a, const void *data, size_t len)
{
    union {
        unsigned char bytes[EVP_MAX_MD_SIZE];
        uint64_t word;
    } digest;
    if (!EVP_DigestInit_ex2(context, a->md, NULL) || !EVP_DigestUpdate(context, data, len) ||
        !EVP_DigestFinal_ex(context, digest.bytes, NULL))
        die("a digest");
    return digest.word;
}

static struct algorithm algorithms[] = {
    {.name = "XXH3-64", .hash = xxh3_64},
    {.name = "XXH3-128", .hash = xxh3_128},
    {.name = "XXH64", .hash = xxh64},
    {.name = "CRC32C", .hash = crc_by_table},
    {.name = "MD5", .evp = "MD5", .hash = by_openssl},
    {.name = "SHA-1", .evp = "SHA1", .hash = by_openssl},
    {.name = "SHA-256", .evp = "SHA256", .hash = by_openssl},
    {.name = "BLAKE2b", .evp = "BLAKE2B-512", .hash = by_openssl},
};
#define ALGORITHMS (sizeof algorithms / sizeof *algorithms)

static void prepare(void)
{
    for (uint32_t i = 0; i < 256; i++) {
        uint32_t c = i;
        for (int bit = 0; bit < 8; bit++)
            c = c & 1 ? c >> 1 ^ 0x82f63b78u : c >> 1;
        crc_table[i] = c;
    }
    context = EVP_MD_CTX_new();
    for (size_t i = 0; i < ALGORITHMS; i++) {
        struct algorithm *a = &algorithms[i];
        if (a->evp && !(a->md = EVP_MD_fetch(NULL, a->evp, NULL)))
            die(a->name);
        if (a->hash == crc_by_table && __builtin_cpu_supports("sse4.2"))
            a->hash = crc_by_cpu;
        if (!strcmp(a->name, "CRC32C") && a->hash(a, "123456789", 9) != 0xe3069283)
            die("CRC32C computes something else");
    }
}

/* ---- medians */

static int by_number(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *of, unsigned count)
{
    qsort(of, count, sizeof *of, by_number);
    return count % 2 ? of[count / 2] : (of[count / 2 - 1] + of[count / 2]) / 2;
}

/* ---- speed */

static double speed(const struct algorithm *a, const uint8_t *memory, size_t block)
{
    double start = cpu(), took;
    uint64_t bytes = 0, sum = 0;
    do {
        for (size_t at = 0; at < WARM; at += block)
            sum += a->hash(a, memory + at, block);
        bytes += WARM;
        took = cpu() - start;
    } while (took < SAMPLE);
    sink += sum;
    return (double)bytes / took / 1e9;
}

static void speeds(unsigned rounds)
{
    static double seen[ALGORITHMS][SIZES][ROUNDS_MAX * SPEEDS];
    uint8_t *memory = aligned_alloc(PAGE, WARM);
    if (!memory)
        die("memory");
    for (size_t i = 0; i < WARM; i++)
        memory[i] = (uint8_t)(i * 2654435761u >> 13);
    for (unsigned r = 0; r < rounds; r++)
        for (unsigned s = 0; s < SIZES; s++)
            for (size_t a = 0; a < ALGORITHMS; a++)
                seen[a][s][r] = speed(&algorithms[a], memory, (size_t)64 << s);
    for (size_t a = 0; a < ALGORITHMS; a++)
        for (unsigned s = 0; s < SIZES; s++)
            printf("speed,%s,%zu,%.3f,GB/s\n", algorithms[a].name, (size_t)64 << s, median(seen[a][s], rounds));
    free(memory);
}

/* ---- collisions */

static void collisions(void)
{
    static const int bits[] = {32, 64, 128, 160, 256};
    for (unsigned b = 0; b < sizeof bits / sizeof *bits; b++)
        for (unsigned size = 30; size <= 40; size++) {
            double n = (double)((uint64_t)1 << size) / PAGE, space = 1;
            for (int i = 0; i < bits[b]; i++)
                space *= 2;
            double any = n * (n - 1) / 2 / space, missed = n / space;
            printf("collision,%d,%llu,%.3g,probability\n", bits[b], 1ULL << size, any < 1 ? any : 1);
            printf("missed,%d,%llu,%.3g,probability\n", bits[b], 1ULL << size, missed < 1 ? missed : 1);
        }
}

/* ---- detection */

struct region {
    int fd, uffd, pagemap;
    uint8_t *at, *scratch;
    uint64_t bytes;
};

static void read_and_hash(const struct region *r, const struct algorithm *a, uint64_t from, uint64_t to)
{
    while (from < to) {
        size_t len = to - from < READ ? (size_t)(to - from) : READ;
        if (pread(r->fd, r->scratch, len, (off_t)from) != (ssize_t)len)
            die("pread");
        for (size_t at = 0; at < len; at += PAGE)
            sink += a->hash(a, r->scratch + at, PAGE);
        from += len;
    }
}

/* One pass as the agent makes it; hashes what it finds if there is an algorithm. */
static uint64_t scan(const struct region *r, const struct algorithm *a)
{
    struct kernel_page_region found[512];
    uint64_t pages = 0, base = (uintptr_t)r->at;
    struct kernel_scan_arg arg = {
        .size = sizeof arg,
        .flags = KERNEL_SCAN_WP_MATCHING | KERNEL_SCAN_CHECK_WPASYNC,
        .start = base,
        .end = base + r->bytes,
        .vec = (uintptr_t)found,
        .vec_len = 512,
        .category_mask = KERNEL_PAGE_IS_WRITTEN,
        .return_mask = KERNEL_PAGE_IS_WRITTEN,
    };
    while (arg.start < arg.end) {
        int n = ioctl(r->pagemap, KERNEL_PAGEMAP_SCAN, &arg);
        if (n < 0)
            die("PAGEMAP_SCAN");
        for (int i = 0; i < n; i++) {
            pages += (found[i].end - found[i].start) / PAGE;
            if (a)
                read_and_hash(r, a, found[i].start - base, found[i].end - base);
        }
        arg.start = arg.walk_end;
    }
    return pages;
}

static bool region_make(struct region *r, uint64_t bytes)
{
    *r = (struct region){.bytes = bytes, .fd = memfd_create("region", MFD_CLOEXEC), .scratch = malloc(READ)};
    if (r->fd < 0 || !r->scratch || ftruncate(r->fd, (off_t)bytes))
        die("a file in memory");
    r->at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, r->fd, 0);
    if (r->at == MAP_FAILED)
        die("mmap");
    uint64_t word = 1;
    for (uint64_t i = 0; i < bytes; i += sizeof word) {
        word = word * 6364136223846793005u + 1442695040888963407u;
        memcpy(r->at + i, &word, sizeof word);
    }
    r->pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    r->uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    struct uffdio_api api = {.api = UFFD_API,
                             .features = KERNEL_UFFD_WP | KERNEL_UFFD_WP_FILE | KERNEL_UFFD_WP_UNPOPULATED |
                                         KERNEL_UFFD_WP_ASYNC};
    return r->uffd >= 0 && r->pagemap >= 0 && !ioctl(r->uffd, UFFDIO_API, &api);
}

/* Stores to k pages at even distances, from another start each time. */
static double stores(const struct region *r, uint64_t k, unsigned round)
{
    uint64_t pages = r->bytes / PAGE;
    double start = cpu();
    for (uint64_t i = 0; i < k; i++)
        r->at[(i * pages / k + round) % pages * PAGE + 8]++;
    return cpu() - start;
}

static void say(const char *name, double at, double *of, unsigned rounds)
{
    printf("detect,%s,%g,%.4f,ms\n", name, at, median(of, rounds) * 1000);
}

static const double shares[SHARES] = {0, 0.01, 0.1, 1, 10, 100};

static void detect(struct region *r, unsigned rounds)
{
    enum { PLAIN, ARMED, SCAN, BOTH, WHAT };
    static const char *const names[WHAT] = {"stores", "stores armed", "scan", "scan and hash"};
    static double seen[WHAT][SHARES][ROUNDS_MAX];
    struct uffdio_range range = {(uintptr_t)r->at, r->bytes};
    struct uffdio_register reg = {.range = range, .mode = UFFDIO_REGISTER_MODE_WP};
    const struct algorithm *xxh3 = &algorithms[1];
    for (unsigned round = 0; round < rounds; round++) {
        for (unsigned s = 0; s < SHARES; s++)
            seen[PLAIN][s][round] = stores(r, (uint64_t)((double)(r->bytes / PAGE) * shares[s] / 100), round);
        if (ioctl(r->uffd, UFFDIO_REGISTER, &reg))
            die("UFFDIO_REGISTER");
        scan(r, NULL);
        for (unsigned s = 0; s < SHARES; s++) {
            uint64_t k = (uint64_t)((double)(r->bytes / PAGE) * shares[s] / 100);
            seen[ARMED][s][round] = stores(r, k, round);
            double start = cpu();
            uint64_t found = scan(r, NULL);
            seen[SCAN][s][round] = cpu() - start;
            stores(r, k, round);
            start = cpu();
            found += scan(r, xxh3);
            seen[BOTH][s][round] = cpu() - start;
            if (found != 2 * k) {
                fprintf(stderr, "hashes: two scans found %llu pages, not twice %llu\n", (unsigned long long)found,
                        (unsigned long long)k);
                exit(1);
            }
        }
        if (ioctl(r->uffd, UFFDIO_UNREGISTER, &range))
            die("UFFDIO_UNREGISTER");
        stores(r, r->bytes / PAGE, 0); /* so that the next plain stores meet no fault */
    }
    for (unsigned w = 0; w < WHAT; w++)
        for (unsigned s = 0; s < SHARES; s++)
            say(names[w], shares[s], seen[w][s], rounds);
}

static void full(const struct region *r, unsigned rounds)
{
    static double seen[ALGORITHMS][ROUNDS_MAX];
    for (unsigned round = 0; round < rounds; round++)
        for (size_t a = 0; a < ALGORITHMS; a++) {
            double start = cpu();
            read_and_hash(r, &algorithms[a], 0, r->bytes);
            seen[a][round] = cpu() - start;
        }
    for (size_t a = 0; a < ALGORITHMS; a++)
        printf("full,%s,%llu,%.3f,ms\n", algorithms[a].name, (unsigned long long)r->bytes,
               median(seen[a], rounds) * 1000);
}

int main(int argc, char **argv)
{
    long mib = argc > 1 ? atol(argv[1]) : 1024, rounds = argc > 2 ? atol(argv[2]) : 9;
    struct region r;
    if (mib < 40 || mib > 1 << 20 || rounds < 1 || rounds > (long)ROUNDS_MAX) {
        fprintf(stderr, "usage: hashes [REGION-MIB [ROUNDS]]   (40 or more; 1 to %u)\n", ROUNDS_MAX);
        return 2;
    }
    prepare();
    printf("kind,name,at,value,unit\n");
    speeds((unsigned)rounds * SPEEDS);
    collisions();
    bool tracked = region_make(&r, (uint64_t)mib << 20);
    full(&r, (unsigned)rounds);
    if (tracked)
        detect(&r, (unsigned)rounds);
    else
        fprintf(stderr, "hashes: no asynchronous write protection here (Linux 6.7): PAGEMAP_SCAN is not measured\n");
    return 0;
}
