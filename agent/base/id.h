/* 16-byte identities (lineages of regions, agents' own) and the identity of a source file. */
#ifndef BASE_ID_H
#define BASE_ID_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

#define ID_TEXT 37 /* the 8-4-4-4-12 form with its terminator */

struct id {
    uint8_t b[16];
};

/* Which file a region's content came from: a path is renamed and reused, these stay. btime is the birth time in ns, 0
 * where the file system has none. */
struct source {
    uint64_t ino, btime;
};

void id_new(struct id *id); /* RFC 9562 version 4, from getrandom */
void id_text(const struct id *id, char text[ID_TEXT]);
bool id_parse(struct id *id, const char *text);

static inline bool id_same(const struct id *a, const struct id *b)
{
    return !memcmp(a, b, sizeof *a);
}

static inline bool id_none(const struct id *a)
{
    static const struct id none;
    return id_same(a, &none);
}

static inline bool source_same(const struct source *a, const struct source *b)
{
    return a->ino == b->ino && a->btime == b->btime;
}

#endif
