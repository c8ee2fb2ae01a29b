/* Files whose pages tell themselves what they are: the first word of each is a version, and the others follow from it
 * and from the page's place. What is read of one can be judged without another copy of it, and half a page, another
 * page, or zeros show.
 *
 *   paged make FILE PAGES [VERSION]    writes one, every page of that version (0)
 *   paged check FILE                   reads it from beginning to end: all of one version, which it prints
 *   paged random FILE OPS THREADS SEED random loads, reads and transfers, all of version 0; prints nothing
 *   paged transfers FILE OPS THREADS SEED  the same, half of it sendfile
 *   paged store FILE OPS THREADS SEED EXPECTED  random loads, stores, reads and writes; what the file must be then goes
 * to EXPECTED paged publish FILE EPOCHS MS           changes it, msync by msync, one every MS at most: page 0 always
 * and a quarter of the others, and its length by some pages paged follow FILE EPOCHS THREADS       reads it, through a
 * mapping and by calls, until it is at that epoch: always all of one epoch, never one before what was seen. Prints how
 * many it saw paged walk FILE                    through a mapping, forwards and then backwards
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define PAGE 4096u
#define WORDS (PAGE / 8)
#define LONGEST 48u /* pages of a call */

static void failed(const char *what, int line)
{
    fprintf(stderr, "paged.c:%d: %s: %s\n", line, what, strerror(errno));
    exit(1);
}
#define MUST(x)                                                                                                        \
    do {                                                                                                               \
        errno = 0;                                                                                                     \
        if (!(x))                                                                                                      \
            failed(#x, __LINE__);                                                                                      \
    } while (0)

static uint64_t mix(uint64_t x)
{
    x = (x ^ x >> 31) * 0x9e3779b97f4a7c15ULL;
    x = (x ^ x >> 29) * 0xbf58476d1ce4e5b9ULL;
    return x ^ x >> 32;
}

static uint64_t word(uint64_t page, uint64_t version, unsigned i)
{
    return i ? mix(page << 20 ^ version << 10 ^ i) : version;
}

static void fill(uint64_t *at, uint64_t page, uint64_t version)
{
    for (unsigned i = 0; i < WORDS; i++)
        at[i] = word(page, version, i);
}

/* The version of a whole page; anything else ends the program. */
static uint64_t version_of(const uint64_t *at, uint64_t page, const char *how)
{
    uint64_t version = at[0];
    for (unsigned i = 1; i < WORDS; i++) {
        uint64_t is = at[i];
        if (is != word(page, version, i)) {
            fprintf(stderr, "paged: %s: page %llu, word %u: %llx is not of version %llu%s\n", how,
                    (unsigned long long)page, i, (unsigned long long)is, (unsigned long long)version,
                    is || version ? "" : ": zeros");
            exit(1);
        }
    }
    return version;
}

static void must_be(uint64_t version, const uint64_t *at, uint64_t page, const char *how)
{
    uint64_t is = version_of(at, page, how);
    if (is != version) {
        fprintf(stderr, "paged: %s: page %llu has version %llu, not %llu\n", how, (unsigned long long)page,
                (unsigned long long)is, (unsigned long long)version);
        exit(1);
    }
}

static uint64_t pages_of(int fd)
{
    struct stat st;
    MUST(!fstat(fd, &st) && st.st_size && !(st.st_size % PAGE));
    return (uint64_t)st.st_size / PAGE;
}

static void make(const char *path, uint64_t pages, uint64_t version)
{
    static uint64_t page[WORDS];
    FILE *f = fopen(path, "w");
    MUST(f);
    for (uint64_t p = 0; p < pages; p++) {
        fill(page, p, version);
        MUST(fwrite(page, PAGE, 1, f) == 1);
    }
    MUST(!fclose(f));
}

static void check(const char *path)
{
    static uint64_t page[WORDS];
    FILE *f = fopen(path, "r");
    MUST(f);
    uint64_t version = 0, n = 0;
    for (; fread(page, PAGE, 1, f) == 1; n++) {
        if (!n)
            version = version_of(page, 0, path);
        must_be(version, page, n, path);
    }
    MUST(n);
    printf("%llu\n", (unsigned long long)version);
}

static void walk(const char *path)
{
    int fd = open(path, O_RDONLY);
    MUST(fd >= 0);
    uint64_t pages = pages_of(fd);
    const uint64_t *map = mmap(NULL, pages * PAGE, PROT_READ, MAP_SHARED, fd, 0);
    MUST(map != MAP_FAILED);
    for (uint64_t p = 0; p < pages; p++)
        must_be(0, map + p * WORDS, p, "forwards");
    for (uint64_t p = pages; p--;)
        must_be(0, map + p * WORDS, p, "backwards");
}

/* ---- random */

struct worker {
    pthread_t thread;
    const uint64_t *map, *private;
    int fd;
    uint64_t pages, ops, random;
    bool transfers; /* more of them than of anything else */
    uint64_t buffer[LONGEST * WORDS];
};

static uint64_t roll(struct worker *w, uint64_t below)
{
    w->random = mix(w->random + 0x2545f4914f6cdd1dULL);
    return w->random % below;
}

static void by_read(struct worker *w, uint64_t page, uint64_t n)
{
    for (uint64_t done = 0; done < n * PAGE;) {
        ssize_t got = pread(w->fd, (char *)w->buffer + done, n * PAGE - done, (off_t)(page * PAGE + done));
        MUST(got > 0);
        done += (uint64_t)got;
    }
    for (uint64_t i = 0; i < n; i++)
        must_be(0, w->buffer + i * WORDS, page + i, "read");
}

static void by_vector(struct worker *w, uint64_t page, uint64_t n)
{
    struct iovec iov[3] = {{w->buffer, 1000}, {(char *)w->buffer + 1000, 5096}, {(char *)w->buffer + 6096, n * PAGE}};
    ssize_t got = preadv(w->fd, iov, 3, (off_t)(page * PAGE));
    MUST(got >= 8192 || page + 1 == w->pages);
    for (uint64_t i = 0; i < (uint64_t)got / PAGE && i < n; i++)
        must_be(0, w->buffer + i * WORDS, page + i, "readv");
}

static void by_sendfile(struct worker *w, uint64_t page, uint64_t n)
{
    int to = memfd_create("sent", 0);
    off_t at = (off_t)(page * PAGE);
    MUST(to >= 0);
    for (uint64_t done = 0; done < n * PAGE;) {
        ssize_t got = sendfile(to, w->fd, &at, n * PAGE - done);
        MUST(got > 0);
        done += (uint64_t)got;
    }
    MUST(pread(to, w->buffer, n * PAGE, 0) == (ssize_t)(n * PAGE));
    for (uint64_t i = 0; i < n; i++)
        must_be(0, w->buffer + i * WORDS, page + i, "sendfile");
    close(to);
}

static void *work(void *arg)
{
    struct worker *w = arg;
    while (w->ops--) {
        uint64_t page = roll(w, w->pages), left = w->pages - page, n = 1 + roll(w, LONGEST - 2);
        n = n < left ? n : left;
        switch (w->transfers && roll(w, 2) ? 2 : roll(w, 16)) {
        case 0:
            by_read(w, page, n);
            break;
        case 1:
            by_vector(w, page, n);
            break;
        case 2:
            by_sendfile(w, page, n);
            break;
        case 3:
            must_be(0, w->private + page * WORDS, page, "private mapping");
            break;
        case 4:
            for (uint64_t i = 0; i < n; i++)
                must_be(0, w->map + (page + i) * WORDS, page + i, "run");
            break;
        default:
            must_be(0, w->map + page * WORDS, page, "mapping");
        }
    }
    return NULL;
}

static void at_random(const char *path, uint64_t ops, unsigned threads, uint64_t seed, bool transfers)
{
    int fd = open(path, O_RDONLY);
    MUST(fd >= 0);
    uint64_t pages = pages_of(fd);
    const uint64_t *map = mmap(NULL, pages * PAGE, PROT_READ, MAP_SHARED, fd, 0);
    const uint64_t *private = mmap(NULL, pages * PAGE, PROT_READ, MAP_PRIVATE, fd, 0);
    struct worker *w = calloc(threads, sizeof *w);
    MUST(w && map != MAP_FAILED && private != MAP_FAILED);
    for (unsigned i = 0; i < threads; i++) {
        w[i] = (struct worker){.map = map, .private = private, .fd = fd, .pages = pages, .ops = ops / threads};
        w[i].random = mix(seed * 1000 + i);
        w[i].transfers = transfers;
        MUST(!pthread_create(&w[i].thread, NULL, work, &w[i]));
    }
    for (unsigned i = 0; i < threads; i++)
        MUST(!pthread_join(w[i].thread, NULL));
}

/* ---- store */

/* Every thread has pages of its own, those in whose turn it is, and knows the version of each. */
struct writer {
    struct worker w;
    unsigned turn, turns;
    uint64_t *map, *versions;
};

static void *store_at_random(void *arg)
{
    struct writer *t = arg;
    while (t->w.ops--) {
        uint64_t page = roll(&t->w, t->w.pages / t->turns) * t->turns + t->turn, *at = t->map + page * WORDS;
        uint64_t *version = &t->versions[page];
        if (roll(&t->w, 2)) {
            must_be(*version, at, page, "mapping");
        } else {
            MUST(pread(t->w.fd, t->w.buffer, PAGE, (off_t)(page * PAGE)) == PAGE);
            must_be(*version, t->w.buffer, page, "read");
        }
        switch (roll(&t->w, 6)) {
        case 0:
            fill(at, page, ++*version);
            break;
        case 1:
            fill(t->w.buffer, page, ++*version);
            MUST(pwrite(t->w.fd, t->w.buffer, PAGE, (off_t)(page * PAGE)) == PAGE);
            break;
        case 2: /* a part of it, out of the mapping: what was there */
            MUST(pwrite(t->w.fd, at + 100, 1000, (off_t)(page * PAGE + 800)) == 1000);
            break;
        default:;
        }
        if (!roll(&t->w, 1000))
            MUST(!msync(at, PAGE, MS_SYNC));
    }
    return NULL;
}

static void store(const char *path, uint64_t ops, unsigned threads, uint64_t seed, const char *expected)
{
    static struct writer all[16];
    int fd = open(path, O_RDWR);
    MUST(fd >= 0 && threads && threads <= 16);
    uint64_t pages = pages_of(fd) / threads * threads, *versions = calloc(pages_of(fd), sizeof *versions);
    uint64_t *map = mmap(NULL, pages_of(fd) * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    MUST(versions && map != MAP_FAILED);
    for (unsigned i = 0; i < threads; i++) {
        all[i] = (struct writer){.w = {.fd = fd, .pages = pages, .ops = ops / threads, .random = mix(seed + i)},
                                 .turn = i,
                                 .turns = threads,
                                 .map = map,
                                 .versions = versions};
        MUST(!pthread_create(&all[i].w.thread, NULL, store_at_random, &all[i]));
    }
    for (unsigned i = 0; i < threads; i++)
        pthread_join(all[i].w.thread, NULL);
    MUST(!fsync(fd));
    FILE *f = fopen(expected, "w");
    MUST(f);
    for (uint64_t p = 0; p < pages_of(fd); p++) {
        fill(all[0].w.buffer, p, versions[p]);
        MUST(fwrite(all[0].w.buffer, PAGE, 1, f) == 1);
    }
    MUST(!fclose(f));
}

/* ---- epochs. An epoch is the version of page 0; what it is made of follows from its number. */

#define TAIL 5u

static bool changes(uint64_t page, uint64_t epoch)
{
    return !page || mix(page * 77 + epoch) % 4 == 0;
}

static uint64_t expected(uint64_t page, uint64_t epoch)
{
    while (epoch && !changes(page, epoch))
        epoch--;
    return epoch;
}

static uint64_t tail(uint64_t epoch)
{
    return epoch % 3 * TAIL;
}

static void publish(const char *path, uint64_t epochs, uint64_t ms)
{
    int fd = open(path, O_RDWR);
    MUST(fd >= 0);
    uint64_t pages = pages_of(fd);
    uint64_t *map = mmap(NULL, (pages + 2 * TAIL) * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    MUST(map != MAP_FAILED);
    for (uint64_t epoch = 1; epoch <= epochs; epoch++) {
        for (uint64_t p = 0; p < pages; p++)
            if (changes(p, epoch))
                fill(map + p * WORDS, p, epoch);
        MUST(!ftruncate(fd, (off_t)((pages + tail(epoch)) * PAGE)));
        for (uint64_t p = pages; p < pages + tail(epoch); p++)
            fill(map + p * WORDS, p, epoch);
        MUST(!msync(map, (pages + tail(epoch)) * PAGE, MS_SYNC));
        usleep((useconds_t)ms * 1000);
    }
}

struct reader {
    pthread_t thread;
    const uint64_t *map;
    int fd;
    uint64_t pages, epochs, random, seen, newest;
};

/* A page's version: looked at again when it went while its words were compared. */
static uint64_t stable(const uint64_t *at, uint64_t page)
{
    uint64_t copy[WORDS];
    for (;;) {
        uint64_t before = __atomic_load_n(at, __ATOMIC_ACQUIRE);
        memcpy(copy, at, PAGE);
        if (__atomic_load_n(at, __ATOMIC_ACQUIRE) == before && copy[0] == before)
            return version_of(copy, page, "mapping");
    }
}

static uint64_t epoch_now(struct reader *r)
{
    uint64_t epoch = stable(r->map, 0);
    if (epoch < r->newest) {
        fprintf(stderr, "paged: epoch %llu after %llu\n", (unsigned long long)epoch, (unsigned long long)r->newest);
        exit(1);
    }
    r->seen += epoch > r->newest;
    r->newest = epoch;
    return epoch;
}

static void look_at_pages(struct reader *r)
{
    uint64_t first = epoch_now(r), is[16], page[16];
    for (unsigned i = 0; i < 16; i++) {
        r->random = mix(r->random + 0x2545f4914f6cdd1dULL);
        page[i] = r->random % r->pages;
        is[i] = stable(r->map + page[i] * WORDS, page[i]);
    }
    uint64_t last = epoch_now(r), at = first;
    for (unsigned i = 0; i < 16; i++) {
        for (; at <= last && expected(page[i], at) != is[i]; at++)
            ; /* the next page is of this epoch or of a later one */
        if (at > last) {
            fprintf(stderr, "paged: page %llu is of epoch %llu, between %llu and %llu\n", (unsigned long long)page[i],
                    (unsigned long long)is[i], (unsigned long long)first, (unsigned long long)last);
            exit(1);
        }
    }
}

static void look_at_all(struct reader *r)
{
    uint64_t most = (r->pages + 2 * TAIL) * PAGE;
    uint64_t *buffer = malloc(most + PAGE);
    MUST(buffer);
    ssize_t got = pread(r->fd, buffer, most + PAGE, 0);
    MUST(got > 0 && !(got % PAGE));
    uint64_t epoch = version_of(buffer, 0, "read"), n = (uint64_t)got / PAGE;
    if (n != r->pages + tail(epoch)) {
        fprintf(stderr, "paged: %llu pages at epoch %llu\n", (unsigned long long)n, (unsigned long long)epoch);
        exit(1);
    }
    for (uint64_t p = 0; p < n; p++)
        must_be(p < r->pages ? expected(p, epoch) : epoch, buffer + p * WORDS, p, "one read");
    free(buffer);
    if (epoch_now(r) < epoch)
        failed("the mapping is behind the file", __LINE__);
}

static void *read_on(void *arg)
{
    struct reader *r = arg;
    for (unsigned turn = 0; r->newest < r->epochs; turn++)
        turn % 4 ? look_at_pages(r) : look_at_all(r);
    return NULL;
}

static void follow(const char *path, uint64_t epochs, unsigned threads)
{
    int fd = open(path, O_RDONLY);
    MUST(fd >= 0);
    uint64_t size = pages_of(fd);
    uint64_t *map = mmap(NULL, size * PAGE, PROT_READ, MAP_SHARED, fd, 0);
    struct reader *r = calloc(threads, sizeof *r);
    MUST(r && map != MAP_FAILED);
    for (unsigned i = 0; i < threads; i++) {
        r[i] = (struct reader){.map = map, .fd = fd, .epochs = epochs, .random = i};
        r[i].pages = size; /* opened at epoch 0 */
        MUST(!pthread_create(&r[i].thread, NULL, read_on, &r[i]));
    }
    for (unsigned i = 0; i < threads; i++) {
        MUST(!pthread_join(r[i].thread, NULL));
        printf("%llu\n", (unsigned long long)r[i].seen);
    }
    struct stat st;
    MUST(!fstat(fd, &st) && (uint64_t)st.st_size == (size + tail(epochs)) * PAGE);
}

static uint64_t number(const char *text)
{
    return strtoull(text, NULL, 0);
}

int main(int argc, char **argv)
{
    if (argc >= 4 && !strcmp(argv[1], "make"))
        make(argv[2], number(argv[3]), argc > 4 ? number(argv[4]) : 0);
    else if (argc == 3 && !strcmp(argv[1], "check"))
        check(argv[2]);
    else if (argc == 3 && !strcmp(argv[1], "walk"))
        walk(argv[2]);
    else if (argc == 6 && (!strcmp(argv[1], "random") || !strcmp(argv[1], "transfers")))
        at_random(argv[2], number(argv[3]), (unsigned)number(argv[4]), number(argv[5]), !strcmp(argv[1], "transfers"));
    else if (argc == 7 && !strcmp(argv[1], "store"))
        store(argv[2], number(argv[3]), (unsigned)number(argv[4]), number(argv[5]), argv[6]);
    else if (argc == 5 && !strcmp(argv[1], "publish"))
        publish(argv[2], number(argv[3]), number(argv[4]));
    else if (argc == 5 && !strcmp(argv[1], "follow"))
        follow(argv[2], number(argv[3]), (unsigned)number(argv[4]));
    else
        return 2;
    return 0;
}
