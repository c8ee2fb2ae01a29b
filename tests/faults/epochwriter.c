/* A program whose files say which epoch they are, and the check of that.
 *
 *   epochwriter write DIR WAYS    goes from epoch to epoch until DIR/../stop exists; says "pid P", then for each epoch
 * "acked N" or "failed N ERRNO" epochwriter check DIR         says the epoch that the files in DIR are at: one and the
 * same, with every byte as that epoch left it; 0 for none yet
 *   epochwriter file DIR NAME     the same of one file, for which the others need not be there
 *
 * Three files, two of them stored to through mappings and one by pwrite. An epoch rewrites some pages of each. Page 0
 * of a file holds the epoch's number and for each other page the epoch that wrote it last; the content of a page
 * follows from file, page and that number. So a page that is missing, stale, torn or of a later epoch shows, and so
 * does a file that is ahead of another. Each epoch ends with one sync point, by turns msync, fdatasync and fsync (WAYS:
 * a string of the letters m, d, f). */
#include "../programs/plain.h"

#include <inttypes.h>
#include <stddef.h>

#define FILES 3u
#define PAGES 48u /* and one more for the header */
#define LEN ((size_t)(PAGES + 1) * PAGE)

struct header {
    uint64_t epoch, stamp[PAGES], sum;
};

static const char *const names[FILES] = {"a", "b", "c"};

static uint64_t sum_of(const struct header *h)
{
    uint64_t x = 0x51ed270b;
    const unsigned char *p = (const unsigned char *)h;
    for (size_t i = 0; i < offsetof(struct header, sum); i++)
        x = (x ^ p[i]) * 0x100000001b3u;
    return x;
}

static uint64_t seed_of(unsigned file, unsigned page, uint64_t stamp)
{
    return stamp ? (stamp << 16) + file * 1000 + page + 1 : 0;
}

static void page_of(unsigned char *to, unsigned file, unsigned page, uint64_t stamp)
{
    if (stamp)
        fill(to, PAGE, seed_of(file, page, stamp));
    else
        memset(to, 0, PAGE);
}

/* Which pages an epoch rewrites: about one in five, never the same ones twice in a row. */
static int touches(unsigned file, unsigned page, uint64_t epoch)
{
    uint64_t x = (epoch * 0x9e3779b97f4a7c15u) ^ ((uint64_t)(file * 131 + page) * 0xbf58476d1ce4e5b9u);
    x ^= x >> 29;
    x *= 0x94d049bb133111ebu;
    return (x >> 32) % 5 == 0;
}

struct state {
    int fd[FILES];
    unsigned char *map[FILES]; /* NULL: written by calls */
    struct header header[FILES];
};

static void put(struct state *s, unsigned file, size_t at, const void *bytes, size_t len)
{
    if (s->map[file])
        memcpy(s->map[file] + at, bytes, len);
    else
        MUST(pwrite(s->fd[file], bytes, len, (off_t)at) == (ssize_t)len);
}

static void write_epoch(struct state *s, uint64_t epoch)
{
    unsigned char page[PAGE];
    for (unsigned f = 0; f < FILES; f++) {
        struct header *h = &s->header[f];
        h->epoch = epoch;
        for (unsigned p = 0; p < PAGES; p++)
            if (touches(f, p, epoch)) {
                h->stamp[p] = epoch;
                page_of(page, f, p, epoch);
                put(s, f, (size_t)(p + 1) * PAGE, page, PAGE);
            }
        h->sum = sum_of(h);
        put(s, f, 0, h, sizeof *h);
    }
}

static int sync_by(struct state *s, char way)
{
    switch (way) {
    case 'm':
        return msync(s->map[0], LEN, MS_SYNC);
    case 'd':
        return fdatasync(s->fd[2]);
    default:
        return fsync(s->fd[1]);
    }
}

static int write_epochs(const char *dir, const char *ways)
{
    struct state s = {0};
    char path[4096], stop[4096];
    uint64_t epoch = 0;
    in_dir(stop, dir, "../stop");
    for (unsigned f = 0; f < FILES; f++) {
        s.fd[f] = make_file(in_dir(path, dir, names[f]), (off_t)LEN);
        if (f < 2)
            s.map[f] = map_shared(s.fd[f], LEN, 0);
        MUST(pread(s.fd[f], &s.header[f], sizeof *s.header, 0) == sizeof *s.header);
        if (s.header[f].epoch > epoch)
            epoch = s.header[f].epoch;
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    printf("pid %d\n", (int)getpid());
    for (size_t i = 0; access(stop, F_OK) != 0; i++) {
        write_epoch(&s, ++epoch);
        if (sync_by(&s, ways[i % strlen(ways)]) == 0)
            printf("acked %" PRIu64 "\n", epoch);
        else
            printf("failed %" PRIu64 " %s\n", epoch, strerrorname_np(errno));
    }
    return 0;
}

/* The file's epoch, or ends the program saying what is wrong with it. */
static uint64_t check_file(const char *dir, unsigned f)
{
    static unsigned char file[LEN + 1];
    unsigned char want[PAGE];
    struct header h;
    char path[4096];
    int fd = open(in_dir(path, dir, names[f]), O_RDONLY);
    if (fd < 0 && errno == ENOENT)
        return 0;
    MUST(fd >= 0);
    ssize_t n = read(fd, file, sizeof file);
    MUST(n >= 0 && close(fd) == 0);
    memcpy(&h, file, sizeof h);
    if (n != (ssize_t)LEN) {
        if (!h.epoch)
            return 0; /* the first epoch has not come: its size may not have either */
        fprintf(stderr, "%s: %zd bytes instead of %zu\n", path, n, LEN);
        exit(1);
    }
    if (h.epoch && h.sum != sum_of(&h)) {
        fprintf(stderr, "%s: header of epoch %" PRIu64 " is torn\n", path, h.epoch);
        exit(1);
    }
    for (unsigned p = 0; p < PAGES; p++) {
        page_of(want, f, p, h.stamp[p]);
        if (memcmp(file + (size_t)(p + 1) * PAGE, want, PAGE) != 0) {
            fprintf(stderr, "%s: at epoch %" PRIu64 " page %u is not as epoch %" PRIu64 " left it\n", path, h.epoch,
                    p + 1, h.stamp[p]);
            exit(1);
        }
    }
    return h.epoch;
}

static int check(const char *dir)
{
    uint64_t epoch[FILES];
    for (unsigned f = 0; f < FILES; f++)
        epoch[f] = check_file(dir, f);
    if (epoch[0] != epoch[1] || epoch[0] != epoch[2]) {
        fprintf(stderr, "%s: files at epochs %" PRIu64 ", %" PRIu64 ", %" PRIu64 "\n", dir, epoch[0], epoch[1],
                epoch[2]);
        return 1;
    }
    printf("%" PRIu64 "\n", epoch[0]);
    return 0;
}

int main(int argc, char **argv)
{
    if (argc == 4 && !strcmp(argv[1], "write"))
        return write_epochs(argv[2], argv[3]);
    if (argc == 3 && !strcmp(argv[1], "check"))
        return check(argv[2]);
    for (unsigned f = 0; argc == 4 && f < FILES; f++)
        if (!strcmp(argv[1], "file") && !strcmp(argv[3], names[f])) {
            printf("%" PRIu64 "\n", check_file(argv[2], f));
            return 0;
        }
    fprintf(stderr, "usage: epochwriter write DIR WAYS | check DIR | file DIR NAME\n");
    return 2;
}
