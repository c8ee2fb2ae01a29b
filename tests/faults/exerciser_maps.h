/* The exerciser's operations on mappings, and those by other threads and processes. */
#ifndef EXERCISER_MAPS_H
#define EXERCISER_MAPS_H

#include "tests/faults/exerciser_io.h"

#include <pthread.h>
#include <sys/wait.h>

/* Some mapping and a range of it that is in the file; false if there is none. */
static bool some_mapped(int prot, struct map **m, struct range *r)
{
    int i = some_map(prot);
    if (i < 0)
        return false;
    *m = &maps[i];
    *r = some_range(maps[i].offset, map_end(&maps[i]));
    return r->len > 0;
}

/* Through a pipe, so that it is the kernel that loads or stores. */
static void through_pipe(unsigned char *to, const unsigned char *from, size_t len)
{
    int p[2];
    REAL(pipe(p) == 0);
    while (!dry && len > 0) {
        size_t part = len < 32768 ? len : 32768;
        REAL(write(p[1], from, part) == (ssize_t)part);
        REAL(read(p[0], to, part) == (ssize_t)part);
        to += part;
        from += part;
        len -= part;
    }
    REAL(close(p[0]) == 0 && close(p[1]) == 0);
}

static void op_load(void)
{
    struct map *m;
    struct range r;
    if (!some_mapped(PROT_READ, &m, &r))
        return;
    if (draw(6)) {
        same_bytes("load", m->file, r.at, map_at(m, r.at), r.len);
        return;
    }
    through_pipe(buffer, map_at(m, r.at), r.len);
    same_bytes("write(2) of a mapping", m->file, r.at, buffer, r.len);
}

static void op_store(void)
{
    struct map *m;
    struct range r;
    if (!some_mapped(PROT_READ | PROT_WRITE, &m, &r))
        return;
    unsigned char *shadow = files[m->file].bytes + r.at;
    uint64_t how = draw(8);
    if (how == 0) { /* a byte here and there */
        uint64_t step = 1 + draw(3 * PAGE);
        note("scattered store", m->file, r.at, r.at + r.len);
        for (uint64_t i = 0; i < r.len; i += step) {
            shadow[i] ^= 0x55;
            if (!dry)
                *(volatile unsigned char *)map_at(m, r.at + i) ^= 0x55;
        }
        return;
    }
    some_content(buffer, r.len, m->file, r.at);
    memcpy(shadow, buffer, r.len);
    note(how == 1 ? "read(2) into the mapping" : "store", m->file, r.at, r.at + r.len);
    if (how == 1)
        through_pipe(map_at(m, r.at), buffer, r.len);
    else if (!dry)
        memcpy(map_at(m, r.at), buffer, r.len);
}

/* Whole pages to elsewhere in the mapping, as programs move what they have. */
static void op_move(void)
{
    struct map *m;
    struct range r;
    if (!some_mapped(PROT_READ | PROT_WRITE, &m, &r))
        return;
    struct range pages = some_pages(m->offset, page_down(map_end(m)));
    if (!pages.len)
        return;
    uint64_t to = m->offset + draw((page_down(map_end(m)) - m->offset - pages.len) / PAGE + 1) * PAGE;
    note("move", m->file, to, to + pages.len);
    memmove(files[m->file].bytes + to, files[m->file].bytes + pages.at, pages.len);
    if (!dry)
        memmove(map_at(m, to), map_at(m, pages.at), pages.len);
}

/* Stores of its own, in a private mapping: nobody else sees them. */
static void op_private(void)
{
    int file = (int)draw(FILES);
    struct slot *s = some_slot(file, O_RDONLY);
    uint64_t size = files[file].size;
    struct range r = some_pages(0, page_up(size)),
                 mine = some_range(0, r.at < size && r.at + r.len > size ? size - r.at : r.len);
    if (!s || !r.len)
        return;
    some_content(buffer, mine.len, file, r.at);
    if (dry)
        return;
    unsigned char *p = mmap(NULL, r.len, PROT_READ | PROT_WRITE, MAP_PRIVATE, s->fd, (off_t)r.at);
    REAL(p != MAP_FAILED);
    memcpy(p + mine.at, buffer, mine.len);
    REAL(!memcmp(p + mine.at, buffer, mine.len));
    size_t tail = mine.at + mine.len, end = size - r.at < r.len ? size - r.at : r.len;
    same_bytes("private mapping", file, r.at, p, mine.at);
    same_bytes("private mapping", file, r.at + tail, p + tail, end - tail);
    REAL(munmap(p, r.len) == 0);
}

static void op_map(void)
{
    int file = (int)draw(FILES), i = draw(4) ? -1 : some_map(0);
    struct range r = some_pages(0, page_up(draw(4) ? files[file].size + PAGE : max_size));
    bool writable = !read_only && draw(4) != 0;
    struct slot *s = some_slot(file, writable ? O_RDWR : O_RDONLY);
    int prot = writable ? PROT_READ | PROT_WRITE : PROT_READ, flags = MAP_SHARED | (draw(8) ? 0 : MAP_POPULATE);
    if (maps_used() + 2 >= MAPS || !s || (writable && (s->flags & O_ACCMODE) != O_RDWR))
        return;
    unsigned char *at = NULL;
    if (i >= 0) { /* in the place of a part of another, which goes */
        struct map *m = &maps[i];
        struct range part = some_pages(m->offset, m->offset + m->len);
        if (r.len > part.len)
            r.len = part.len;
        at = map_at(m, part.at);
        note("map over", m->file, part.at, part.at + r.len);
        cut_map(i, part.at, part.at + r.len);
        flags |= MAP_FIXED;
    }
    note("map", file, r.at, r.at + r.len);
    if (!dry)
        at = mmap(at, r.len, prot, flags, s->fd, (off_t)r.at);
    REAL(at != MAP_FAILED);
    point(false); /* what was mapped over */
    add_map((struct map){true, file, prot, (s->flags & O_ACCMODE) == O_RDWR, at, r.at, r.len});
}

static void op_unmap(void)
{
    int i = some_map(0);
    if (i < 0)
        return;
    struct map m = maps[i];
    bool whole = draw(2) || maps_used() + 4 >= MAPS;
    struct range r = whole ? (struct range){m.offset, m.len} : some_pages(m.offset, m.offset + m.len);
    note("unmap", m.file, r.at, r.at + r.len);
    cut_map(i, r.at, r.at + r.len);
    REAL(munmap(map_at(&m, r.at), r.len) == 0);
    point(false);
}

static void op_remap(void)
{
    int i = some_map(0);
    if (i < 0)
        return;
    struct map *m = &maps[i];
    uint64_t how = draw(4);
    size_t len = m->len;
    if (how == 0)
        len = PAGE * (1 + draw(m->len / PAGE));
    else if (how < 3)
        len = PAGE * (1 + draw(max_size / PAGE));
    if (how > 2 && maps_used() + 2 >= MAPS)
        return;
    unsigned char *at = m->at;
    note("remap", m->file, m->offset, m->offset + (len > m->len ? len : m->len));
    if (!dry && how == 2) {
        void *to = mmap(NULL, len, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        REAL(to != MAP_FAILED);
        at = mremap(m->at, m->len, len, MREMAP_MAYMOVE | MREMAP_FIXED, to);
    } else if (!dry && how == 3) {
        at = mremap(m->at, 0, len, MREMAP_MAYMOVE);
    } else if (!dry) {
        at = mremap(m->at, m->len, len, how ? MREMAP_MAYMOVE : 0);
    }
    REAL(at != MAP_FAILED);
    if (how > 2) /* a second mapping of the same */
        add_map((struct map){true, m->file, m->prot, m->may_write, at, m->offset, len});
    else
        m->at = at, m->len = len;
}

static void op_protect(void)
{
    static const int ways[] = {PROT_READ, PROT_READ | PROT_WRITE, PROT_READ | PROT_WRITE, PROT_NONE};
    int i = some_map(0), prot = ways[draw(4)];
    if (i < 0)
        return;
    struct map *m = &maps[i];
    if (prot & PROT_WRITE && !m->may_write)
        prot = PROT_READ;
    note("protect", m->file, m->offset, m->offset + m->len);
    m->prot = prot;
    REAL(mprotect(m->at, m->len, prot) == 0);
}

static void op_advise(void)
{
    static const int advice[] = {MADV_DONTNEED, MADV_DONTNEED, MADV_WILLNEED, MADV_NORMAL,        MADV_SEQUENTIAL,
                                 MADV_RANDOM,   MADV_COLD,     MADV_PAGEOUT,  MADV_POPULATE_READ, MADV_POPULATE_WRITE};
    struct map *m;
    struct range in;
    if (!some_mapped(PROT_READ, &m, &in))
        return;
    struct range r = some_pages(m->offset, page_down(map_end(m)));
    int what = advice[draw(10)];
    if (what == MADV_NORMAL || what == MADV_SEQUENTIAL || what == MADV_RANDOM)
        r = (struct range){m->offset, m->len}; /* a part would split the mapping, and mremap take only one half */
    if (!r.len || (what == MADV_POPULATE_WRITE && !(m->prot & PROT_WRITE)))
        return;
    note(what == MADV_DONTNEED  ? "advise DONTNEED"
         : what == MADV_PAGEOUT ? "advise PAGEOUT"
                                : "advise",
         m->file, r.at, r.at + r.len);
    REAL(madvise(map_at(m, r.at), r.len, what) == 0);
}

static void op_remove(void)
{
    struct map *m;
    struct range in;
    if (!some_mapped(PROT_READ | PROT_WRITE, &m, &in))
        return;
    struct range r = some_pages(m->offset, page_down(map_end(m)));
    if (!r.len)
        return;
    note("advise REMOVE", m->file, r.at, r.at + r.len);
    memset(files[m->file].bytes + r.at, 0, r.len);
    REAL(madvise(map_at(m, r.at), r.len, MADV_REMOVE) == 0);
}

static void op_msync(void)
{
    int i = some_map(PROT_READ | PROT_WRITE);
    if (i < 0)
        return;
    struct map *m = &maps[i];
    struct range r = draw(2) ? (struct range){m->offset, m->len} : some_pages(m->offset, m->offset + m->len);
    note("msync", -1, 0, 0);
    REAL(msync(map_at(m, r.at), r.len, MS_SYNC) == 0);
    point(true);
}
static void op_msync_async(void)
{
    int i = some_map(PROT_READ | PROT_WRITE);
    if (i < 0)
        return;
    note("msync MS_ASYNC", -1, 0, 0);
    REAL(msync(maps[i].at, maps[i].len, MS_ASYNC) == 0);
}

/* ---- other processes and threads */

/* A child that has inherited everything, and reads it. */
static void op_child_reads(void)
{
    struct map *m;
    struct range r;
    int file = (int)draw(FILES), status = 0;
    struct slot *s = some_slot(file, O_RDONLY);
    if (!some_mapped(PROT_READ, &m, &r) || !s)
        return;
    pid_t child = dry ? 1 : fork();
    REAL(child >= 0);
    if (child == 0) {
        same_bytes("load by a child", m->file, r.at, map_at(m, r.at), r.len);
        REAL(pread(s->fd, buffer, LARGEST, 0) == (ssize_t)files[file].size);
        same_bytes("read by a child", file, 0, buffer, files[file].size);
        _exit(0);
    }
    REAL(waitpid(child, &status, 0) == child && status == 0);
    note("a child's exit", -1, 0, 0);
    point(false);
}

/* A child that stores, and writes; then ends. */
static void op_child_writes(void)
{
    struct map *m;
    struct range r, w;
    int file = (int)draw(FILES);
    struct slot *s = some_slot(file, O_WRONLY);
    if (!some_mapped(PROT_READ | PROT_WRITE, &m, &r))
        return;
    struct file *f = &files[file];
    bool writes = s && draw(2) && !(s->flags & (O_APPEND | O_DSYNC));
    w = some_range(0, f->size);
    writes = writes && w.len;
    /* From before: what the shadow gets is the child's doing. */
    some_content(buffer, r.len, m->file, r.at);
    note("store by a child", m->file, r.at, r.at + r.len);
    memcpy(files[m->file].bytes + r.at, buffer, r.len);
    pid_t child = 1;
    if (!dry)
        child = fork();
    REAL(child >= 0);
    if (child == 0)
        memcpy(map_at(m, r.at), buffer, r.len);
    if (writes) {
        some_content(buffer, w.len, file, w.at);
        note("write by a child", file, w.at, w.at + w.len);
        memcpy(f->bytes + w.at, buffer, w.len);
        if (child == 0)
            REAL(pwrite(s->fd, buffer, w.len, (off_t)w.at) == (ssize_t)w.len);
    }
    if (child == 0)
        _exit(0);
    int status = 0;
    REAL(waitpid(child, &status, 0) == child && status == 0);
    point(false);
}

struct racer {
    unsigned char *to;
    size_t len;
};
static void *stores(void *arg)
{
    struct racer *r = arg;
    for (size_t i = 0; i < r->len; i += 256)
        memcpy(r->to + i, buffer + i, r->len - i < 256 ? r->len - i : 256);
    return NULL;
}

/* A thread stores while this one syncs. */
static void op_race(void)
{
    struct map *m;
    struct range r;
    struct slot *s = some_slot((int)draw(FILES), O_WRONLY);
    if (!some_mapped(PROT_READ | PROT_WRITE, &m, &r) || !s)
        return;
    uint64_t syncs = 1 + draw(3);
    some_content(buffer, r.len, m->file, r.at);
    memcpy(files[m->file].bytes + r.at, buffer, r.len);
    note("store by a thread while this one syncs", m->file, r.at, r.at + r.len);
    if (dry)
        return;
    pthread_t thread;
    struct racer racer = {map_at(m, r.at), r.len};
    REAL(pthread_create(&thread, NULL, stores, &racer) == 0);
    while (syncs-- > 0)
        REAL(fdatasync(s->fd) == 0);
    REAL(pthread_join(thread, NULL) == 0);
}

#endif
