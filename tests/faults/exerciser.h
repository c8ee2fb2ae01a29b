/* What the exerciser knows: a copy of each file as it has to be (the shadow), the mappings and descriptors that the
 * program has, and which operation touched what.
 *
 * Every decision comes from the seed, the number of the operation and the shadow, never from what a call returned. So
 * the same seed gives the same states again: a run can be repeated, operations can be left out of it, and a dry run
 * (`dry`), which makes no calls at all, finds which state a replica has. */
#ifndef EXERCISER_H
#define EXERCISER_H

#include "../programs/plain.h"

#include <signal.h>
#include <stdbool.h>

enum { FILES = 2, SLOTS = 3, MAPS = 12, TOLD = 20, LARGEST = 8 << 20 };

struct slot { /* a descriptor */
    int fd, flags;
    bool open;
};
struct file {
    char path[4096];
    unsigned char *bytes; /* zeros from size on */
    uint64_t size;
    struct slot slots[SLOTS];
};
struct map {
    bool used;
    int file, prot;
    bool may_write;    /* as its descriptor did */
    unsigned char *at; /* NULL in a dry run */
    uint64_t offset;
    size_t len;
};
/* What an operation did to a range of a file. */
struct entry {
    uint32_t op;
    int file; /* -1: all */
    const char *what;
    uint64_t from, to;
};

static struct file files[FILES];
static struct map maps[MAPS];
static uint64_t max_size = 2 << 20;
static bool dry, read_only, mirrored;
static uint64_t seed;
static uint32_t op; /* the one being done; 0: opening the files */
static const char *op_name = "setup";

/* ---- chance */

static uint64_t chance;

static inline uint64_t scramble(uint64_t x)
{
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}
/* 0 <= result < n */
static inline uint64_t draw(uint64_t n)
{
    chance += 0x9e3779b97f4a7c15u;
    return n ? scramble(chance) % n : 0;
}

/* ---- what was done */

static struct entry *entries;
static size_t entry_count, entry_cap;

static inline void note(const char *what, int file, uint64_t from, uint64_t to)
{
    if (entry_count == entry_cap) {
        entry_cap = entry_cap ? entry_cap * 2 : 4096;
        MUST(entries = realloc(entries, entry_cap * sizeof *entries));
    }
    entries[entry_count++] = (struct entry){op, file, what, from, to};
}

/* The last operations up to `last` that touched the page, and the sync points between them. */
static inline void tell_page(int file, uint64_t page, uint32_t last)
{
    size_t first = entry_count, told = 0;
    while (first > 0 && entries[first - 1].op > last)
        first--;
    size_t end = first;
    while (first > 0 && told < TOLD) {
        const struct entry *e = &entries[--first];
        told += e->file == file && e->from < page + PAGE && e->to > page;
    }
    for (size_t i = first; i < end; i++) {
        const struct entry *e = &entries[i];
        if (e->file == -1)
            fprintf(stderr, "  #%u %s\n", e->op, e->what);
        else if (e->file == file && e->from < page + PAGE && e->to > page)
            fprintf(stderr, "  #%u %s [%#llx, %#llx)\n", e->op, e->what, (unsigned long long)e->from,
                    (unsigned long long)e->to);
    }
}

static inline uint64_t first_difference(const unsigned char *a, const unsigned char *b, uint64_t len)
{
    uint64_t at = 0;
    while (at < len && !memcmp(a + at, b + at, len - at < PAGE ? len - at : PAGE))
        at += PAGE;
    while (at < len && a[at] == b[at])
        at++;
    return at < len ? at : len;
}

/* The bytes at `at` of the file must be the shadow's; `how` they were got. Ends the program if they are not. */
static inline void same_bytes(const char *how, int file, uint64_t at, const unsigned char *got, uint64_t len)
{
    const unsigned char *want = files[file].bytes + at;
    if (dry || !memcmp(got, want, len))
        return;
    uint64_t where = first_difference(got, want, len), pages = 0;
    for (uint64_t i = 0; i < len; i += PAGE)
        pages += memcmp(got + i, want + i, len - i < PAGE ? len - i : PAGE) != 0;
    fprintf(stderr,
            "seed %llu, operation %u (%s): %s: file %d differs at %#llx (%02x, not %02x), in %llu pages of [%#llx, "
            "%#llx)\n",
            (unsigned long long)seed, op, op_name, how, file, (unsigned long long)(at + where), got[where], want[where],
            (unsigned long long)pages, (unsigned long long)at, (unsigned long long)(at + len));
    fprintf(stderr, "the file has %llu bytes; last to touch the page:\n", (unsigned long long)files[file].size);
    tell_page(file, (at + where) / PAGE * PAGE, op);
    _exit(1);
}

static inline void same_size(const char *how, int file, uint64_t size)
{
    if (dry || size == files[file].size)
        return;
    fprintf(stderr, "seed %llu, operation %u (%s): %s: file %d has %llu bytes, not %llu; last to touch its end:\n",
            (unsigned long long)seed, op, op_name, how, file, (unsigned long long)size,
            (unsigned long long)files[file].size);
    tell_page(file, (size < files[file].size ? size : files[file].size) / PAGE * PAGE, op);
    _exit(1);
}

/* A call that the program makes: it must succeed, and a dry run leaves it out. */
#define REAL(call)                                                                                                     \
    do {                                                                                                               \
        if (!dry && !(call)) {                                                                                         \
            fprintf(stderr, "seed %llu, operation %u (%s): %s: %s\n", (unsigned long long)seed, op, op_name, #call,    \
                    strerror(errno));                                                                                  \
            _exit(1);                                                                                                  \
        }                                                                                                              \
    } while (0)

/* ---- ranges */

struct range {
    uint64_t at;
    size_t len; /* 0: there is none */
};

static inline uint64_t page_down(uint64_t x)
{
    return x / PAGE * PAGE;
}
static inline uint64_t page_up(uint64_t x)
{
    return page_down(x + PAGE - 1);
}

/* Within [from, to): mostly small, at times over many pages; often at the ends, or at a page's. */
static inline struct range some_range(uint64_t from, uint64_t to)
{
    static const uint32_t lengths[] = {16, 16, 256, 256, 2000, 8192, 8192, 40000, 131072, LARGEST};
    if (from >= to)
        return (struct range){from, 0};
    uint64_t space = to - from, len = 1 + draw(lengths[draw(10)]);
    if (len > space)
        len = 1 + draw(space);
    uint64_t at = from + draw(space - len + 1);
    switch (draw(6)) {
    case 0:
        at = to - len;
        break;
    case 1:
        at = page_down(at) < from ? from : page_down(at);
        break;
    case 2: /* whole pages, if there are */
        if (page_up(from) + PAGE > to)
            break;
        at = page_up(from) + page_down(draw(page_down(to) - page_up(from)));
        len = page_up(len) > page_down(to) - at ? page_down(to) - at : page_up(len);
        break;
    default:
        break;
    }
    return (struct range){at, len};
}
/* Of whole pages within [from, to), which are pages' ends. */
static inline struct range some_pages(uint64_t from, uint64_t to)
{
    if (from >= to)
        return (struct range){from, 0};
    uint64_t count = (to - from) / PAGE, len = 1 + draw(draw(3) ? (count < 8 ? count : 8) : count);
    return (struct range){from + draw(count - len + 1) * PAGE, len * PAGE};
}

/* ---- mappings and descriptors */

static inline int some_map(int prot)
{
    int found = -1;
    uint64_t seen = 0;
    for (int i = 0; i < MAPS; i++)
        if (maps[i].used && (maps[i].prot & prot) == prot && !draw(++seen))
            found = i;
    return found;
}
static inline int free_map(void)
{
    for (int i = 0; i < MAPS; i++)
        if (!maps[i].used)
            return i;
    return -1;
}
static inline int maps_used(void)
{
    int count = 0;
    for (int i = 0; i < MAPS; i++)
        count += maps[i].used;
    return count;
}
/* The part of the mapping that is in the file. */
static inline uint64_t map_end(const struct map *m)
{
    uint64_t end = m->offset + m->len;
    return end < files[m->file].size ? end : files[m->file].size;
}
static inline unsigned char *map_at(const struct map *m, uint64_t offset)
{
    return m->at ? m->at + (offset - m->offset) : NULL;
}
static inline int add_map(struct map m)
{
    int i = free_map();
    MUST(i >= 0);
    m.used = true;
    maps[i] = m;
    return i;
}
/* Takes a part out of a mapping, which may leave two: one has to be free. */
static inline void cut_map(int i, uint64_t from, uint64_t to)
{
    struct map *m = &maps[i], whole = *m;
    m->used = false;
    if (from > whole.offset)
        add_map(
            (struct map){true, whole.file, whole.prot, whole.may_write, whole.at, whole.offset, from - whole.offset});
    if (to < whole.offset + whole.len)
        add_map((struct map){true, whole.file, whole.prot, whole.may_write, map_at(&whole, to), to,
                             whole.offset + whole.len - to});
}

/* A descriptor that was opened with `access` or for both, or NULL. */
static inline struct slot *some_slot(int file, int access)
{
    struct slot *found = NULL;
    uint64_t seen = 0;
    for (int i = 0; i < SLOTS; i++) {
        struct slot *s = &files[file].slots[i];
        int mode = s->flags & O_ACCMODE;
        if (s->open && (mode == access || mode == O_RDWR) && !draw(++seen))
            found = s;
    }
    return found;
}

/* The shadow's size changes: what is cut off is zeros when it comes back. */
static inline void set_size(int file, uint64_t size)
{
    struct file *f = &files[file];
    if (size < f->size)
        memset(f->bytes + size, 0, f->size - size);
    f->size = size;
}
static inline void grow_to(int file, uint64_t size)
{
    if (size > files[file].size)
        files[file].size = size;
}

#endif
