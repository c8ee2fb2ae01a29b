/* What a program sees of a file that it maps, wherever the file's bytes are; and what it is measured against.
 *
 *   mapped seq FILE BYTES SECONDS [WARM]      reads it from its beginning through a mapping: at most so many bytes, for
 *                                             at most so long. Says microseconds to the first byte after open, bytes,
 *                                             microseconds in all, and a sum over what was read
 *   mapped touch FILE COUNT SEED random|normal [WARM]     touches pages at random, no page twice (with that advice):
 *                                             microseconds at 50 and 99 of a hundred
 *   mapped beside FILE SECONDS SEED [WARM]    touches pages at random that are not here yet, a pause after each, until
 *                                             all are: how many, microseconds at 50 and 99 of a hundred, and in all
 *   mapped open WARM FILE...                  open, map, first byte, of each: microseconds at 50 and 99 of a hundred
 *   mapped store FILE|- BYTES ROUNDS          makes all pages resident; then rounds of: a store to every page (the first
 *                                             after a sync point), another one, and, all of it rewritten with what
 *                                             cannot be packed, msync: medians of the three, microseconds. -: a memfd
 *   mapped fault COUNT                        a userfault served by a thread: microseconds at 50 and 99 of a hundred
 *   mapped serve                              a server for the two below; says its address
 *   mapped trips ADDRESS COUNT                round trips with 4 KiB: microseconds at 50 and 99 of a hundred
 *   mapped stream ADDRESS BYTES               says microseconds
 *
 * WARM is a file that is opened, and read a byte of, before anything is timed: whoever serves files is up then. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul
#define PIECE (256ul << 10)
#define SAMPLES 100000u

static double samples[SAMPLES];
static size_t sampled;

static void die(const char *what)
{
    fprintf(stderr, "mapped: %s: %s\n", what, strerror(errno));
    exit(3);
}

static double now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

static void sample(double us)
{
    if (sampled < SAMPLES)
        samples[sampled++] = us;
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double at_share(unsigned of_hundred)
{
    qsort(samples, sampled, sizeof *samples, by_size);
    return sampled ? samples[(sampled - 1) * of_hundred / 100] : 0;
}

static const uint8_t *map(const char *path, size_t *len)
{
    int fd = open(path, O_RDONLY);
    struct stat st;
    if (fd < 0 || fstat(fd, &st))
        die(path);
    const uint8_t *at = mmap(NULL, (size_t)st.st_size, PROT_READ, MAP_SHARED, fd, 0);
    if (at == MAP_FAILED)
        die(path);
    close(fd);
    *len = (size_t)st.st_size;
    return at;
}

static uint8_t look(const volatile uint8_t *at)
{
    return *at;
}

static void warm(const char *path)
{
    size_t len;
    if (!path)
        return;
    look(map(path, &len));
    usleep(300000); /* what serves it may have connections to make */
}

static int seq(const char *path, size_t bytes, double seconds)
{
    size_t len, at = 0;
    double start = now_us(), first;
    const uint8_t *from = map(path, &len);
    look(from);
    first = now_us() - start;
    uint64_t sum = 0;
    if (len > bytes)
        len = bytes;
    for (; at < len && now_us() - start < seconds * 1e6; at += PIECE) {
        const uint64_t *words = (const uint64_t *)(from + at);
        for (size_t i = 0, n = (len - at < PIECE ? len - at : PIECE) / 8; i < n; i++)
            sum += words[i] ^ sum >> 7;
    }
    printf("%.1f %zu %.1f %016llx\n", first, at < len ? at : len, now_us() - start, (unsigned long long)sum);
    return 0;
}

static size_t somewhere(size_t pages)
{
    return (size_t)(((uint64_t)random() << 31 | (uint64_t)random()) % pages);
}

static int touch(const char *path, unsigned count, unsigned seed, bool at_random)
{
    size_t len;
    const uint8_t *at = map(path, &len);
    uint8_t *seen = calloc(len / PAGE + 1, 1);
    if (!seen || (at_random && madvise((void *)at, len, MADV_RANDOM)))
        die("madvise");
    srandom(seed);
    for (unsigned i = 0; i < count; i++) {
        size_t page = somewhere(len / PAGE);
        if (seen[page]++)
            continue;
        double start = now_us();
        look(at + page * PAGE);
        sample(now_us() - start);
    }
    printf("%.1f %.1f\n", at_share(50), at_share(99));
    return 0;
}

static int beside(const char *path, double seconds, unsigned seed)
{
    size_t len;
    const uint8_t *at = map(path, &len);
    double start = now_us();
    unsigned char here;
    srandom(seed);
    for (unsigned hits = 0; hits < 1000 && now_us() - start < seconds * 1e6;) {
        size_t page = somewhere(len / PAGE);
        if (mincore((void *)(at + page * PAGE), PAGE, &here))
            die("mincore");
        if (here & 1) {
            hits++;
            continue;
        }
        hits = 0;
        double before = now_us();
        look(at + page * PAGE);
        sample(now_us() - before);
        usleep(500);
    }
    printf("%zu %.1f %.1f %.1f\n", sampled, at_share(50), at_share(99), now_us() - start);
    return 0;
}

static int open_all(char **paths)
{
    for (; *paths; paths++) {
        size_t len;
        double start = now_us();
        look(map(*paths, &len));
        sample(now_us() - start);
        usleep(100000); /* the rest of it comes meanwhile, over a long path too */
    }
    printf("%.1f %.1f\n", at_share(50), at_share(99));
    return 0;
}

static int store(const char *path, size_t bytes, unsigned rounds)
{
    int fd = strcmp(path, "-") ? open(path, O_RDWR) : memfd_create("mapped", MFD_CLOEXEC);
    if (fd < 0 || (!strcmp(path, "-") && ftruncate(fd, (off_t)bytes)))
        die(path);
    volatile uint8_t *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    double *took[3];
    for (int k = 0; k < 3; k++)
        took[k] = calloc(rounds, sizeof **took);
    if (at == MAP_FAILED || !took[0] || !took[1] || !took[2])
        die(path);
    for (size_t i = 0; i < bytes; i += PAGE)
        at[i] = at[i];
    if (msync((void *)at, bytes, MS_SYNC))
        die("msync");
    for (unsigned r = 0; r < rounds; r++) {
        for (int k = 0; k < 2; k++) {
            double start = now_us();
            for (size_t i = 0; i < bytes; i += PAGE)
                at[i + 64 * r % PAGE] = (uint8_t)(i / PAGE + r + (unsigned)k);
            took[k][r] = now_us() - start;
        }
        for (uint64_t x = 88172645463325252u + r, i = 0; i < bytes / 8; i++) {
            x ^= x << 13;
            x ^= x >> 7;
            ((volatile uint64_t *)(void *)at)[i] = x ^= x << 17;
        }
        double start = now_us();
        if (msync((void *)at, bytes, MS_SYNC))
            die("msync");
        took[2][r] = now_us() - start;
    }
    for (int k = 0; k < 3; k++) {
        qsort(took[k], rounds, sizeof **took, by_size);
        printf("%.1f%c", took[k][rounds / 2], k < 2 ? ' ' : '\n');
    }
    return 0;
}

static void *serve_faults(void *arg)
{
    static uint8_t page[PAGE] __attribute__((aligned(PAGE)));
    int fd = *(int *)arg;
    struct uffd_msg m;
    while (read(fd, &m, sizeof m) == sizeof m) {
        struct uffdio_copy c = {
            .dst = m.arg.pagefault.address & ~(PAGE - 1), .src = (uintptr_t)page, .len = PAGE};
        if (ioctl(fd, UFFDIO_COPY, &c) && errno != EEXIST)
            die("UFFDIO_COPY");
    }
    return NULL;
}

static int fault(unsigned count)
{
    size_t len = 1ul << 30;
    int fd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | UFFD_USER_MODE_ONLY), memory = memfd_create("fault", 0);
    struct uffdio_api api = {.api = UFFD_API};
    if (fd < 0 || memory < 0 || ioctl(fd, UFFDIO_API, &api) || ftruncate(memory, (off_t)len))
        die("userfaultfd");
    uint8_t *at = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, memory, 0);
    struct uffdio_register r = {.range = {(uintptr_t)at, len}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    pthread_t t;
    if (at == MAP_FAILED || ioctl(fd, UFFDIO_REGISTER, &r) || pthread_create(&t, NULL, serve_faults, &fd))
        die("userfaultfd");
    for (unsigned i = 0; i < count; i++) {
        size_t page = somewhere(len / PAGE);
        double start = now_us();
        look(at + page * PAGE);
        sample(now_us() - start);
    }
    printf("%.1f %.1f\n", at_share(50), at_share(99));
    return 0;
}

/* ---- TCP ---- */

static void all_of(int fd, void *to, size_t len, bool out)
{
    for (size_t done = 0; done < len;) {
        ssize_t n = out ? send(fd, (char *)to + done, len - done, MSG_NOSIGNAL) : read(fd, (char *)to + done, len - done);
        if (n <= 0)
            exit(out ? 0 : 3);
        done += (size_t)n;
    }
}

/* A request is a length, which is answered by so many bytes. */
static void answer(int fd)
{
    static uint8_t bytes[PIECE];
    uint64_t want;
    while (read(fd, &want, sizeof want) == sizeof want)
        for (size_t n; want; want -= n) {
            n = want < PIECE ? (size_t)want : PIECE;
            all_of(fd, bytes, n, true);
        }
}

static int serve(void)
{
    struct sockaddr_in sa = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t len = sizeof sa;
    int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    if (fd < 0 || bind(fd, (struct sockaddr *)&sa, len) || listen(fd, 8) || getsockname(fd, (struct sockaddr *)&sa, &len))
        die("listen");
    printf("listening 127.0.0.1:%u\n", ntohs(sa.sin_port));
    fflush(stdout);
    signal(SIGCHLD, SIG_IGN);
    for (;;) {
        int got = accept(fd, NULL, NULL);
        if (got < 0)
            die("accept");
        setsockopt(got, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        if (!fork()) {
            answer(got);
            exit(0);
        }
        close(got);
    }
}

static int dial(const char *address)
{
    struct sockaddr_in sa = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    const char *port = strrchr(address, ':');
    int fd = socket(AF_INET, SOCK_STREAM, 0), on = 1;
    sa.sin_port = htons((uint16_t)atoi(port ? port + 1 : address));
    if (fd < 0 || connect(fd, (struct sockaddr *)&sa, sizeof sa) || setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on))
        die(address);
    return fd;
}

static int trips(const char *address, unsigned count)
{
    static uint8_t page[PAGE];
    int fd = dial(address);
    for (unsigned i = 0; i < count; i++) {
        uint64_t want = PAGE;
        double start = now_us();
        all_of(fd, &want, sizeof want, true);
        all_of(fd, page, PAGE, false);
        sample(now_us() - start);
    }
    printf("%.1f %.1f\n", at_share(50), at_share(99));
    return 0;
}

static int stream(const char *address, uint64_t bytes)
{
    static uint8_t to[PIECE];
    int fd = dial(address);
    double start = now_us();
    all_of(fd, &bytes, sizeof bytes, true);
    for (size_t n; bytes; bytes -= n) {
        n = bytes < PIECE ? (size_t)bytes : PIECE;
        all_of(fd, to, n, false);
    }
    printf("%.1f\n", now_us() - start);
    return 0;
}

int main(int argc, char **argv)
{
    const char *what = argc > 1 ? argv[1] : "";
    if (!strcmp(what, "seq") && argc >= 5) {
        warm(argv[5]);
        return seq(argv[2], strtoull(argv[3], NULL, 10), atof(argv[4]));
    }
    if (!strcmp(what, "touch") && argc >= 6) {
        warm(argv[6]);
        return touch(argv[2], (unsigned)atoi(argv[3]), (unsigned)atoi(argv[4]), !strcmp(argv[5], "random"));
    }
    if (!strcmp(what, "beside") && argc >= 5) {
        warm(argv[5]);
        return beside(argv[2], atof(argv[3]), (unsigned)atoi(argv[4]));
    }
    if (!strcmp(what, "open") && argc >= 4) {
        warm(argv[2]);
        return open_all(argv + 3);
    }
    if (!strcmp(what, "store") && argc == 5)
        return store(argv[2], strtoull(argv[3], NULL, 10), (unsigned)atoi(argv[4]));
    if (!strcmp(what, "fault") && argc == 3)
        return fault((unsigned)atoi(argv[2]));
    if (!strcmp(what, "serve"))
        return serve();
    if (!strcmp(what, "trips") && argc == 4)
        return trips(argv[2], (unsigned)atoi(argv[3]));
    if (!strcmp(what, "stream") && argc == 4)
        return stream(argv[2], strtoull(argv[3], NULL, 10));
    fprintf(stderr, "usage: mapped seq|touch|beside|open|store|fault|serve|trips|stream ... (see its source)\n");
    return 2;
}
