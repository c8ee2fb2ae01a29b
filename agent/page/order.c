#include "agent/page/order.h"

#include "agent/base/log.h"
#include "wire/name.h"

#include <errno.h>
#include <limits.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#define WHAT "memsync order 1 of "

static int path_of(char path[PATH_MAX], const char *state_dir, const char *remote, const char *name)
{
    XXH3_state_t *x = XXH3_createState();
    if (!x)
        return -ENOMEM;
    XXH3_128bits_reset(x);
    XXH3_128bits_update(x, remote, strlen(remote) + 1);
    XXH3_128bits_update(x, name, strlen(name));
    XXH128_hash_t h = XXH3_128bits_digest(x);
    XXH3_freeState(x);
    int n = snprintf(path, PATH_MAX, "%s/orders/%016llx%016llx", state_dir, (unsigned long long)h.high64,
                     (unsigned long long)h.low64);
    return n < PATH_MAX - 8 ? 0 : -ENAMETOOLONG;
}

static size_t take_lines(FILE *f, uint64_t *order, uint8_t *seen, uint64_t chunks)
{
    char line[32];
    size_t n = 0;
    while (n < ORDER_MAX && fgets(line, sizeof line, f)) {
        char *end;
        errno = 0;
        uint64_t chunk = strtoull(line, &end, 10);
        if (errno || end == line || *end != '\n' || chunk >= chunks || (seen[chunk / 8] & 1u << chunk % 8))
            continue;
        seen[chunk / 8] |= (uint8_t)(1u << chunk % 8);
        order[n++] = chunk;
    }
    return n;
}

uint64_t *order_load(const char *state_dir, const char *remote, const char *name, uint64_t chunks, size_t *n)
{
    char path[PATH_MAX], head[sizeof WHAT + NAME_CAP];
    *n = 0;
    FILE *f = path_of(path, state_dir, remote, name) ? NULL : fopen(path, "re");
    if (!f)
        return NULL;
    uint64_t *order = malloc(ORDER_MAX * sizeof *order);
    uint8_t *seen = calloc(1, (size_t)(chunks / 8 + 1));
    bool ours = fgets(head, sizeof head, f) && !strncmp(head, WHAT, strlen(WHAT)) &&
                !strncmp(head + strlen(WHAT), name, strlen(name)) && !strcmp(head + strlen(WHAT) + strlen(name), "\n");
    if (ours && order && seen)
        *n = take_lines(f, order, seen, chunks);
    fclose(f);
    free(seen);
    if (*n)
        return order;
    free(order);
    return NULL;
}

void order_save(const char *state_dir, const char *remote, const char *name, const uint64_t *order, size_t n)
{
    char path[PATH_MAX], beside[PATH_MAX];
    if (path_of(path, state_dir, remote, name))
        return;
    snprintf(beside, sizeof beside, "%s/orders", state_dir);
    mkdir(beside, 0700);
    snprintf(beside, sizeof beside, "%.4090s.new", path);
    FILE *f = fopen(beside, "we");
    bool good = f && fprintf(f, WHAT "%s\n", name) > 0;
    for (size_t i = 0; good && i < n; i++)
        good = fprintf(f, "%llu\n", (unsigned long long)order[i]) > 0;
    good = f && !fclose(f) && good;
    if (!good || rename(beside, path)) {
        log_info("%s: the order in which %s was read is not remembered: %s", path, name, strerror(errno));
        unlink(beside);
    }
}
