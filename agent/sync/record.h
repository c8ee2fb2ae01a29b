/* What the local agent remembers of regions between its lives: which lineage a remote's name had for which file, and up
 * to which epoch we may have gone.
 *
 * One append-only text file, `regions` in the state directory; the last line about a name counts. A line is written
 * before an epoch beyond its `reserved` number is sent, so a remote whose epoch is higher was written by somebody else,
 * or our memory of it is from before: both are refused. Lines outlive our process at once and the host's power after
 * the next write-back; a lost one is made good by the source file's identity, which the remote keeps too. */
#ifndef SYNC_RECORD_H
#define SYNC_RECORD_H

#include "agent/base/id.h"

#include <stddef.h>

struct record {
    char *remote, *name;
    struct id lineage;
    struct source source;
    uint64_t reserved;
};

struct records {
    int fd;
    char *path;
    struct record *at;
    size_t count, cap, lines;
};

int records_open(struct records *r, const char *state_dir, char error[512]);
const struct record *records_find(const struct records *r, const char *remote, const char *name);
/* 0 or a negative errno; the memory is updated in any case. */
int records_put(struct records *r, const char *remote, const char *name, const struct id *lineage,
                const struct source *source, uint64_t reserved);
void records_close(struct records *r);

#endif
