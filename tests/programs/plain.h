/* For the plain programs that the tests run under the shim. They are ordinary programs: nothing of memsync is in them.
 */
#ifndef PLAIN_H
#define PLAIN_H

#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define PAGE 4096u

/* Ends the program with a line that says which call failed, unless it returned what it should. */
#define MUST(call)                                                                                                     \
    do {                                                                                                               \
        if (!(call)) {                                                                                                 \
            fprintf(stderr, "%s:%d: %s: %s\n", __FILE__, __LINE__, #call, strerror(errno));                            \
            _exit(1);                                                                                                  \
        }                                                                                                              \
    } while (0)

/* Bytes that only this seed makes: a page that is lost, stale or misplaced cannot look right. */
static inline void fill(void *to, size_t len, uint64_t seed)
{
    unsigned char *p = to;
    uint64_t x = seed * 0x9e3779b97f4a7c15u + 0x2545f4914f6cdd1du;
    for (size_t i = 0; i < len; i++) {
        if (i % 8 == 0) {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
        }
        p[i] = (unsigned char)(x >> (i % 8 * 8));
    }
}

static inline int make_file(const char *path, off_t size)
{
    int fd = open(path, O_RDWR | O_CREAT, 0644);
    MUST(fd >= 0);
    MUST(ftruncate(fd, size) == 0);
    return fd;
}

static inline unsigned char *map_shared(int fd, size_t len, off_t at)
{
    void *p = mmap(NULL, len, PROT_READ | PROT_WRITE, MAP_SHARED, fd, at);
    MUST(p != MAP_FAILED);
    return p;
}

static inline void write_at(int fd, size_t len, off_t at, uint64_t seed)
{
    unsigned char *p = malloc(len);
    MUST(p);
    fill(p, len, seed);
    MUST(pwrite(fd, p, len, at) == (ssize_t)len);
    free(p);
}

/* Files are named in the directory given as argument; the buffer is the caller's. */
static inline const char *in_dir(char path[4096], const char *dir, const char *name)
{
    snprintf(path, 4096, "%s/%s", dir, name);
    return path;
}

/* A table of cases: the program runs the one named on its command line. */
struct plain_case {
    const char *name;
    void (*run)(const char *dir);
};

static inline int run_case(const struct plain_case *cases, size_t count, int argc, char **argv)
{
    if (argc == 2 && !strcmp(argv[1], "list")) {
        for (size_t i = 0; i < count; i++)
            puts(cases[i].name);
        return 0;
    }
    for (size_t i = 0; argc >= 3 && i < count; i++)
        if (!strcmp(argv[1], cases[i].name)) {
            cases[i].run(argv[2]);
            return 0;
        }
    fprintf(stderr, "usage: %s list | CASE DIRECTORY\n", argv[0]);
    return 2;
}

#endif
