/* Every hooked call that takes memory, with good and bad arguments, and what came of each. Addresses differ from run to
 * run and are not told; whether a call moved a mapping is. */
#include "semantics.h"

#define PAGES(n) ((size_t)(n)*PAGE)

static int fd, reader, writer;
static unsigned char *at, *other; /* the mappings under test */
static volatile size_t endless = SIZE_MAX;

/* Room where the kernel puts nothing by itself, and nothing near it: what is unmapped there stays unmapped. */
static unsigned char *room(void)
{
    static uintptr_t next = 0x200000000000;
    return (unsigned char *)(next += 1 << 20);
}

static unsigned char *map_here(size_t n)
{
    unsigned char *p = mmap(room(), PAGES(n), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED_NOREPLACE, fd, 0);
    MUST(p != MAP_FAILED);
    return p;
}

static void mapping(void)
{
    POINTER(at, mmap(NULL, PAGES(4), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0));
    TOUCH(at[0] = 1);
    TOUCH(memset(at + PAGES(3), 2, 100));
    CALL(msync(at, PAGES(4), MS_SYNC));
    CALL(munmap(at, PAGES(4)));
    POINTER(other, mmap(NULL, 0, PROT_READ, MAP_SHARED, fd, 0));
    POINTER(other, mmap(NULL, endless, PROT_READ, MAP_SHARED, fd, 0));
    POINTER(other, mmap(NULL, endless - PAGE, PROT_READ, MAP_SHARED, fd, 0));
    POINTER(other, mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 100));
    POINTER(other, mmap(NULL, PAGE, PROT_READ, 0, fd, 0));
    POINTER(other, mmap(NULL, PAGE, PROT_READ, MAP_SHARED, -1, 0));
    POINTER(other, mmap(NULL, PAGE, PROT_READ, MAP_SHARED, 9999, 0));
    POINTER(other, mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, reader, 0));
    POINTER(other, mmap(NULL, PAGE, PROT_WRITE, MAP_SHARED, writer, 0));
    POINTER(other, mmap(NULL, PAGE, PROT_READ, MAP_SHARED_VALIDATE | 0x40000000, fd, 0));
    POINTER(other, mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, -(off_t)PAGE));
    int dir = open("sub", O_RDONLY), pipes[2];
    MUST(!pipe(pipes));
    POINTER(other, mmap(NULL, PAGE, PROT_READ, MAP_SHARED, dir, 0));
    POINTER(other, mmap(NULL, PAGE, PROT_READ, MAP_SHARED, pipes[0], 0));
    MUST(!close(dir) && !close(pipes[0]) && !close(pipes[1]));
    POINTER(other, mmap64(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED_VALIDATE | MAP_POPULATE, fd, PAGE));
    TOUCH(other[7] = 7);
    CALL(munmap(other, PAGE));
    POINTER(other, mmap(NULL, PAGE, PROT_READ, MAP_SHARED, reader, 0));
    TOUCH(other[0] = 1);
    CALL(munmap(other, PAGE));
    POINTER(other, mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0));
    TOUCH(other[0] = 99);
    CALL(msync(other, PAGE, MS_SYNC));
    CALL(munmap(other, PAGE));
    POINTER(other, mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    TOUCH(other[0] = 99);
    CALL(munmap(other, PAGE));
    POINTER(other, mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, PAGES(100))); /* wholly behind the end */
    TOUCH(other[0] = 1);
    CALL(munmap(other, PAGE));

    at = room();
    POINTER(other, mmap(at, PAGES(4), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0));
    CALL(other == at);
    POINTER(other, mmap(at + PAGE, PAGE, PROT_READ, MAP_SHARED | MAP_FIXED_NOREPLACE, fd, 0));
    POINTER(other, mmap(at + 1, PAGE, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0));
    TOUCH(memset(at, 3, PAGES(4)));
    POINTER(other,
            mmap(at + PAGE, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, PAGES(3))); /* over a part */
    TOUCH(at[PAGE] = 4);
    POINTER(other, mmap(at + PAGES(2), PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0));
    TOUCH(at[PAGES(2)] = 5);
    CALL(at[PAGES(3)] == 4);
    CALL(msync(at, PAGES(4), MS_SYNC));
    CALL(munmap(at, PAGES(4)));
}

static void syncing(void)
{
    at = map_here(4);
    TOUCH(at[10] = 10);
    CALL(msync(at, PAGES(4), MS_SYNC));
    TOUCH(at[11] = 11);
    CALL(msync(at, PAGES(4), MS_ASYNC));
    CALL(msync(at, PAGES(4), 0));
    CALL(msync(at, PAGES(4), MS_SYNC | MS_INVALIDATE));
    CALL(msync(at, PAGES(4), MS_SYNC | MS_ASYNC));
    CALL(msync(at, PAGES(4), 0x80));
    CALL(msync(at + 1, 100, MS_SYNC));
    CALL(msync(at + PAGE, 100, MS_SYNC));
    CALL(msync(at, 0, MS_SYNC));
    CALL(msync(at, endless, MS_SYNC));
    CALL(msync(at, endless - PAGE, MS_SYNC));
    CALL(munmap(at + PAGE, PAGE));
    TOUCH(at[12] = 12);
    CALL(msync(at, PAGES(4), MS_SYNC)); /* over a gap */
    CALL(msync(at + PAGE, PAGE, MS_SYNC));
    CALL(msync(at, PAGE, MS_SYNC));
    CALL(munmap(at, PAGES(4)));
    CALL(msync(at, PAGES(4), MS_SYNC));
    CALL(msync(NULL, PAGE, MS_SYNC));
    CALL(msync(NULL, 0, MS_SYNC));
}

static void unmapping(void)
{
    at = map_here(6);
    TOUCH(memset(at, 6, PAGES(6)));
    CALL(munmap(at + 1, PAGE));
    CALL(munmap(at, 0));
    CALL(munmap(at, endless));
    CALL(munmap((void *)~(uintptr_t)(PAGE - 1), PAGES(2)));
    CALL(munmap(at + PAGES(2), 1)); /* a whole page goes */
    TOUCH(at[PAGES(2)] = 1);
    TOUCH(at[PAGES(3)] = 7);
    CALL(munmap(at + PAGES(2), PAGE));
    CALL(munmap(at, PAGE));
    TOUCH(at[PAGE] = 8);
    CALL(munmap(at + PAGES(5), PAGE));
    TOUCH(at[PAGES(4)] = 9);
    CALL(msync(at + PAGES(3), PAGES(2), MS_SYNC));
    CALL(munmap(at, PAGES(6)));
    CALL(munmap(at, PAGES(6)));
}

static void moving(void)
{
    at = map_here(4);
    TOUCH(memset(at, 10, PAGES(4)));
    POINTER(other, mremap(at, PAGES(4), PAGES(2), 0));
    CALL(other == at);
    TOUCH(at[PAGES(2)] = 1);
    POINTER(other, mremap(at, PAGES(2), PAGES(4), MREMAP_MAYMOVE));
    at = other;
    TOUCH(at[PAGES(3) + 1] = 11);
    POINTER(other, mremap(at + 1, PAGE, PAGE, 0));
    POINTER(other, mremap(at, PAGES(4), 0, 0));
    POINTER(other, mremap(at, PAGES(4), PAGES(4), 0x80));
    POINTER(other, mremap(at, PAGES(4), PAGES(4), MREMAP_FIXED, at + PAGES(64)));
    POINTER(other, mremap(at, PAGES(4), endless - PAGE, MREMAP_MAYMOVE));
    POINTER(other, mremap(room(), PAGES(4), PAGES(5), MREMAP_MAYMOVE));
    POINTER(other, mremap(at, PAGES(4), PAGES(4), MREMAP_MAYMOVE | MREMAP_FIXED, at + 1));
    POINTER(other, mremap(at, PAGES(4), PAGES(4), MREMAP_MAYMOVE | MREMAP_FIXED, at + PAGE)); /* onto itself */

    unsigned char *target = room();
    POINTER(other, mremap(at, PAGES(4), PAGES(4), MREMAP_MAYMOVE | MREMAP_FIXED, target));
    CALL(other == target);
    TOUCH(at[0] = 1);
    at = target;
    TOUCH(at[1] = 12);
    POINTER(other, mmap(at + PAGES(4), PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0));
    POINTER(other, mremap(at, PAGES(4), PAGES(5), 0)); /* no room */
    TOUCH(at[2] = 13);
    CALL(munmap(at + PAGES(4), PAGE));
    POINTER(other, mremap(at, PAGES(4), PAGES(5), 0));
    TOUCH(at[PAGES(4)] = 14);
    POINTER(other, mremap(at, 0, PAGES(2), MREMAP_MAYMOVE)); /* a second view */
    TOUCH(other[3] = 15);
    CALL(at[3] == 15);
    CALL(munmap(other, PAGES(2)));
    unsigned char *away = room();
    POINTER(other,
            mremap(at + PAGE, PAGES(2), PAGES(2), MREMAP_MAYMOVE | MREMAP_FIXED, away)); /* the middle goes elsewhere */
    TOUCH(at[PAGE] = 1);
    TOUCH(away[0] = 16);
    TOUCH(at[PAGES(3)] = 17);
    POINTER(other, mremap(at, PAGES(5), PAGES(6), MREMAP_MAYMOVE)); /* over the gap */
    POINTER(other, mremap(away, PAGES(2), PAGES(2), MREMAP_MAYMOVE | MREMAP_DONTUNMAP, NULL));
    if (other != MAP_FAILED) {
        TOUCH(other[1] = 18);
        TOUCH(away[2] = 19);
        CALL(munmap(other, PAGES(2)));
    }
    CALL(msync(away, PAGES(2), MS_SYNC));
    CALL(munmap(away, PAGES(2)));
    CALL(munmap(at, PAGES(6)));
}

static void protecting(void)
{
    at = map_here(4);
    CALL(mprotect(at + PAGE, PAGE, PROT_READ));
    TOUCH(at[PAGE] = 1);
    TOUCH(at[PAGES(2)] = 20);
    CALL(mprotect(at, PAGES(4), PROT_NONE));
    TOUCH(at[0] = 1);
    CALL(msync(at, PAGES(4), MS_SYNC));
    CALL(mprotect(at, PAGES(4), PROT_READ | PROT_WRITE));
    TOUCH(at[PAGE] = 21);
    CALL(mprotect(at + 1, PAGE, PROT_READ));
    CALL(mprotect(at, 0, PROT_READ));
    CALL(mprotect(at, PAGE, 0x100));
    CALL(mprotect(at, endless, PROT_READ));
    CALL(mprotect(room(), PAGE, PROT_READ));
    POINTER(other, mmap(NULL, PAGE, PROT_READ, MAP_SHARED, reader, 0));
    CALL(mprotect(other, PAGE, PROT_READ | PROT_WRITE));
    CALL(munmap(other, PAGE));
    POINTER(other, mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0)); /* made writable later */
    CALL(mprotect(other, PAGE, PROT_READ | PROT_WRITE));
    TOUCH(other[5] = 22);
    CALL(msync(other, PAGE, MS_SYNC));
    CALL(munmap(other, PAGE));
    CALL(munmap(at, PAGES(4)));
}

static void advising(void)
{
    at = map_here(4);
    TOUCH(memset(at, 23, PAGES(4)));
    CALL(madvise(at, PAGES(4), MADV_NORMAL));
    CALL(madvise(at, PAGES(4), MADV_WILLNEED));
    CALL(madvise(at, PAGE, MADV_DONTNEED));
    CALL(at[0] == 23);
    CALL(madvise(at, PAGES(4), MADV_FREE));
    CALL(madvise(at, PAGES(4), 12345));
    CALL(madvise(at + 1, PAGE, MADV_DONTNEED));
    CALL(madvise(at, 0, MADV_DONTNEED));
    CALL(madvise(at, endless, MADV_DONTNEED));
    CALL(madvise(room(), PAGE, MADV_DONTNEED));
    CALL(madvise(at + PAGE, PAGE, MADV_REMOVE)); /* a hole in the file */
    CALL(at[PAGE] == 0);
    CALL(madvise(at, PAGES(4), MADV_DONTFORK));
    CALL(madvise(at, PAGES(4), MADV_DOFORK));
    CALL(madvise(at, PAGES(4), MADV_PAGEOUT));
    CALL(madvise(at, PAGES(4), MADV_COLD));
    CALL(madvise(at, PAGES(4), MADV_POPULATE_WRITE));
    CALL(msync(at, PAGES(4), MS_SYNC));
    CALL(munmap(at, PAGES(4)));
    POINTER(other, mmap(NULL, PAGE, PROT_READ, MAP_SHARED, reader, 0));
    CALL(madvise(other, PAGE, MADV_REMOVE));
    CALL(munmap(other, PAGE));
}

/* A mapping outlives its descriptor, its file's size and its file's name. */
static void outliving(void)
{
    int mine = make_file("b", (off_t)PAGES(4));
    at = map_shared(mine, PAGES(4), 0);
    TOUCH(memset(at, 24, PAGES(4)));
    CALL(close(mine));
    TOUCH(at[1] = 25);
    CALL(msync(at, PAGES(4), MS_SYNC));
    CALL(truncate("b", PAGE + 10));
    TOUCH(at[PAGE + 5] = 26);
    TOUCH(at[PAGES(2)] = 1);
    CALL(msync(at, PAGES(4), MS_SYNC));
    CALL(truncate("b", (off_t)PAGES(4)));
    TOUCH(at[PAGES(2)] = 27);
    CALL(rename("b", "c"));
    TOUCH(at[2] = 28);
    CALL(msync(at, PAGES(4), MS_SYNC));
    CALL(unlink("c"));
    TOUCH(at[3] = 29);
    CALL(msync(at, PAGES(4), MS_SYNC));
    CALL(munmap(at, PAGES(4)));
    mine = make_file("b", (off_t)PAGE); /* the name again, another file */
    at = map_shared(mine, PAGE, 0);
    TOUCH(at[0] = 30);
    CALL(close(mine));
    CALL(munmap(at, PAGE));
}

int main(int argc, char **argv)
{
    semantics_start(argc, argv);
    fd = make_file("a", (off_t)PAGES(8));
    write_at(fd, PAGES(8), 0, 2);
    reader = open("a", O_RDONLY);
    writer = open("a", O_WRONLY);
    MUST(reader >= 0 && writer >= 0);
    mapping();
    syncing();
    unmapping();
    moving();
    protecting();
    advising();
    outliving();
    CALL(close(writer));
    CALL(close(reader));
    CALL(close(fd));
    return 0;
}
