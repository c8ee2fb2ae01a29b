/* Everything that changes a file's size or content without a store to a mapping, and mixtures of both. */
#include "plain.h"

#include <linux/falloc.h>
#include <sys/sendfile.h>
#include <sys/uio.h>

static int open_data(const char *dir, int flags)
{
    char path[4096];
    int fd = open(in_dir(path, dir, "data"), flags | O_CREAT, 0644);
    MUST(fd >= 0);
    return fd;
}

/* 8K -> 0 -> 8K: the second 8K are zeros, and must be zeros there. */
static void shrink_grow(const char *dir)
{
    int fd = open_data(dir, O_RDWR);
    write_at(fd, 8192, 0, 1);
    MUST(fsync(fd) == 0);
    MUST(ftruncate(fd, 0) == 0);
    MUST(ftruncate(fd, 8192) == 0);
    MUST(fsync(fd) == 0);
}

static void shrink_grow_synced(const char *dir)
{
    int fd = open_data(dir, O_RDWR);
    write_at(fd, 8192, 0, 1);
    MUST(fsync(fd) == 0);
    MUST(ftruncate(fd, 100) == 0 && fsync(fd) == 0);
    MUST(ftruncate(fd, 8192) == 0);
    write_at(fd, 10, 5000, 2);
    MUST(fsync(fd) == 0);
}

static void shrink_grow_mapped(const char *dir)
{
    int fd = open_data(dir, O_RDWR);
    MUST(ftruncate(fd, 8192) == 0);
    unsigned char *p = map_shared(fd, 8192, 0);
    fill(p, 8192, 1);
    MUST(msync(p, 8192, MS_SYNC) == 0);
    MUST(ftruncate(fd, 0) == 0);
    MUST(ftruncate(fd, 8192) == 0);
    p[4096] = 7;
    MUST(msync(p, 8192, MS_SYNC) == 0);
    MUST(munmap(p, 8192) == 0 && close(fd) == 0);
}

static void truncate_path(const char *dir)
{
    char path[4096];
    int fd = open_data(dir, O_RDWR);
    write_at(fd, 30000, 0, 1);
    MUST(fsync(fd) == 0);
    MUST(truncate(in_dir(path, dir, "data"), 12345) == 0);
    MUST(fsync(fd) == 0);
    MUST(truncate(path, 20000) == 0);
    MUST(close(fd) == 0);
}

/* Opened anew with O_TRUNC while another descriptor stays open. */
static void truncate_open(const char *dir)
{
    int first = open_data(dir, O_RDWR);
    write_at(first, 30000, 0, 1);
    MUST(fsync(first) == 0);
    int second = open_data(dir, O_WRONLY | O_TRUNC);
    write_at(second, 500, 0, 2);
    MUST(close(second) == 0);
    write_at(first, 500, 9000, 3);
    MUST(close(first) == 0);
}

static void creat_again(const char *dir)
{
    char path[4096];
    in_dir(path, dir, "data");
    for (unsigned i = 0; i < 3; i++) {
        int fd = creat(path, 0644);
        MUST(fd >= 0);
        write_at(fd, 20000 - 9000 * (size_t)i, 0, i);
        MUST(close(fd) == 0);
    }
}

static void allocate_in(const char *dir, int mode, off_t at, off_t len)
{
    int fd = open_data(dir, O_RDWR);
    write_at(fd, 16 * PAGE, 0, 1);
    MUST(fsync(fd) == 0);
    if (fallocate(fd, mode, at, len) != 0)
        MUST(errno == EOPNOTSUPP); /* not on tmpfs: nothing happened then, and nothing is what is compared */
    MUST(fsync(fd) == 0);
    write_at(fd, 100, 40, 2);
    MUST(close(fd) == 0);
}

static void punch(const char *dir)
{
    allocate_in(dir, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, PAGE + 100, 5 * PAGE);
}

static void zero_range(const char *dir)
{
    allocate_in(dir, FALLOC_FL_ZERO_RANGE, 2 * PAGE, 30 * PAGE);
}

static void collapse(const char *dir)
{
    allocate_in(dir, FALLOC_FL_COLLAPSE_RANGE, PAGE, 3 * PAGE);
}

static void insert(const char *dir)
{
    allocate_in(dir, FALLOC_FL_INSERT_RANGE, PAGE, 3 * PAGE);
}

static void allocate(const char *dir)
{
    allocate_in(dir, 0, 10 * PAGE, 20 * PAGE + 77);
}

static void allocate_posix(const char *dir)
{
    int fd = open_data(dir, O_RDWR);
    write_at(fd, 1000, 0, 1);
    MUST(posix_fallocate(fd, 0, 50000) == 0);
    MUST(close(fd) == 0);
}

/* A source that no rule matches, beside the directory. */
static int source(const char *dir)
{
    char path[4096];
    int fd = open(in_dir(path, dir, "../source"), O_RDWR | O_CREAT | O_TRUNC, 0644);
    MUST(fd >= 0);
    write_at(fd, 100000, 0, 9);
    return fd;
}

static void copy_range(const char *dir)
{
    int from = source(dir), to = open_data(dir, O_RDWR);
    off_t in = 5000, out = 3000;
    MUST(copy_file_range(from, &in, to, &out, 60000, 0) == 60000);
    MUST(lseek(from, 0, SEEK_SET) == 0 && lseek(to, 70000, SEEK_SET) == 70000);
    MUST(copy_file_range(from, NULL, to, NULL, 9000, 0) == 9000);
    MUST(fsync(to) == 0 && close(to) == 0 && close(from) == 0);
}

static void send_file(const char *dir)
{
    int from = source(dir), to = open_data(dir, O_RDWR);
    off_t at = 1000;
    MUST(lseek(to, 2000, SEEK_SET) == 2000);
    MUST(sendfile(to, from, &at, 40000) == 40000);
    MUST(close(to) == 0 && close(from) == 0);
}

static void splice_in(const char *dir)
{
    int from = source(dir), to = open_data(dir, O_RDWR), ends[2];
    loff_t at = 8000, in = 0;
    MUST(pipe(ends) == 0);
    MUST(splice(from, &in, ends[1], NULL, 30000, 0) == 30000);
    for (ssize_t left = 30000, n; left; left -= n) {
        n = splice(ends[0], NULL, to, &at, (size_t)left, 0);
        MUST(n > 0);
    }
    MUST(fdatasync(to) == 0 && close(to) == 0 && close(from) == 0);
}

static void append(const char *dir)
{
    int fd = open_data(dir, O_WRONLY | O_APPEND);
    unsigned char piece[3000];
    for (unsigned i = 0; i < 20; i++) {
        fill(piece, sizeof piece, i);
        MUST(write(fd, piece, sizeof piece) == sizeof piece);
        MUST(pwrite(fd, piece, 10, 5) == 10); /* appends too: the kernel's own rule */
        if (i % 7 == 0)
            MUST(fsync(fd) == 0);
    }
    MUST(close(fd) == 0);
}

static void vectors(const char *dir)
{
    int fd = open_data(dir, O_RDWR);
    unsigned char a[5000], b[100], c[9000];
    fill(a, sizeof a, 1);
    fill(b, sizeof b, 2);
    fill(c, sizeof c, 3);
    struct iovec v[] = {{a, sizeof a}, {b, sizeof b}, {c, sizeof c}};
    MUST(writev(fd, v, 3) == 14100);
    MUST(pwritev(fd, v, 3, 20001) == 14100);
    MUST(pwritev2(fd, v, 2, 50000, RWF_DSYNC) == 5100);
    MUST(pwritev2(fd, v, 3, -1, 0) == 14100); /* at the descriptor's own place */
    MUST(close(fd) == 0);
}

static void written_through(const char *dir, int flag)
{
    int fd = open_data(dir, O_RDWR | flag);
    for (unsigned i = 0; i < 10; i++)
        write_at(fd, 2500, 2000 * (off_t)i, i);
    MUST(close(fd) == 0);
}

static void dsync(const char *dir)
{
    written_through(dir, O_DSYNC);
}

static void osync(const char *dir)
{
    written_through(dir, O_SYNC);
}

static void sparse(const char *dir)
{
    int fd = open_data(dir, O_RDWR);
    unsigned char piece[10];
    fill(piece, sizeof piece, 1);
    for (unsigned i = 0; i < 10; i++) {
        MUST(lseek(fd, (off_t)i * 1000003, SEEK_SET) >= 0);
        MUST(write(fd, piece, sizeof piece) == sizeof piece);
    }
    MUST(close(fd) == 0);
}

/* Calls and stores to the same pages, by turns, and a file that grows under its mapping. */
static void mixed(const char *dir)
{
    int fd = open_data(dir, O_RDWR);
    MUST(ftruncate(fd, 4 * PAGE) == 0);
    unsigned char *p = map_shared(fd, 64 * PAGE, 0);
    fill(p, PAGE, 1);
    write_at(fd, PAGE, PAGE / 2, 2);
    MUST(msync(p, PAGE, MS_SYNC) == 0);
    MUST(ftruncate(fd, 64 * PAGE - 1000) == 0);
    fill(p + 50 * PAGE, 2 * PAGE, 3);
    write_at(fd, 100, 50 * PAGE + 10, 4);
    MUST(fdatasync(fd) == 0);
    p[64 * PAGE - 1001] = 9; /* the last byte */
    write_at(fd, 5000, 30 * PAGE, 5);
}

/* Duplicated descriptors are the same file. */
static void duplicated(const char *dir)
{
    int fd = open_data(dir, O_RDWR);
    int other = dup(fd), third = fcntl(fd, F_DUPFD, 40), fourth = dup2(fd, 77), fifth = dup3(fd, 78, O_CLOEXEC);
    MUST(other >= 0 && third >= 40 && fourth == 77 && fifth == 78 && close(fd) == 0);
    write_at(other, 5000, 0, 1);
    MUST(close(other) == 0);
    write_at(third, 5000, 10000, 2);
    MUST(close(third) == 0);
    write_at(fourth, 5000, 20000, 3);
    MUST(fsync(fourth) == 0 && close(fourth) == 0);
    write_at(fifth, 5000, 30000, 4);
    MUST(close(fifth) == 0);
}

static void by_directory(const char *dir)
{
    int at = open(dir, O_RDONLY | O_DIRECTORY);
    MUST(at >= 0);
    MUST(mkdirat(at, "sub", 0755) == 0);
    int fd = openat(at, "sub/data", O_RDWR | O_CREAT, 0644);
    MUST(fd >= 0);
    write_at(fd, 9000, 0, 1);
    MUST(close(fd) == 0);
    MUST(chdir(dir) == 0);
    MUST(symlink("sub", "link") == 0);
    fd = open("link/../sub/./data2", O_RDWR | O_CREAT, 0644);
    MUST(fd >= 0);
    write_at(fd, 9000, 0, 2);
    MUST(close(fd) == 0);
    MUST(unlink("link") == 0);
    MUST(renameat(at, "sub/data2", at, "data2") == 0);
    MUST(unlinkat(at, "sub/data", 0) == 0);
}

static void global_sync(const char *dir)
{
    int fd = open_data(dir, O_RDWR);
    write_at(fd, 9000, 0, 1);
    sync();
    write_at(fd, 9000, 5000, 2);
    MUST(syncfs(fd) == 0);
    write_at(fd, 90, 50000, 3);
}

static void empty(const char *dir)
{
    MUST(close(open_data(dir, O_RDWR)) == 0);
}

int main(int argc, char **argv)
{
    static const struct plain_case cases[] = {
        {"shrink-grow", shrink_grow},
        {"shrink-grow-synced", shrink_grow_synced},
        {"shrink-grow-mapped", shrink_grow_mapped},
        {"truncate", truncate_path},
        {"open-trunc", truncate_open},
        {"creat", creat_again},
        {"punch", punch},
        {"zero-range", zero_range},
        {"collapse", collapse},
        {"insert", insert},
        {"allocate", allocate},
        {"posix-fallocate", allocate_posix},
        {"copy-file-range", copy_range},
        {"sendfile", send_file},
        {"splice", splice_in},
        {"append", append},
        {"vectors", vectors},
        {"dsync", dsync},
        {"sync", osync},
        {"sparse", sparse},
        {"mixed", mixed},
        {"dup", duplicated},
        {"openat", by_directory},
        {"global-sync", global_sync},
        {"empty", empty},
    };
    return run_case(cases, sizeof cases / sizeof *cases, argc, argv);
}
