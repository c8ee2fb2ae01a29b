/* Every hooked call that takes descriptors and paths, with good and bad arguments, and what came of each. */
#include "semantics.h"

#include <sys/file.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/uio.h>

/* Pointers that no call can use; behind volatile, so that no compiler reasons about them. */
static void *volatile const nowhere = (void *)16;
static char *volatile const no_path = (char *)16;
static volatile int minus_one = -1, too_many = 1025;
static volatile size_t endless = SIZE_MAX;
static int pipes[2];
static char text[20000];

static void opening(void)
{
    int fd;
    CALL(fd = open("a", O_RDWR | O_CREAT, 0644));
    CALL(write(fd, text, 5000));
    CALL(close(fd));
    CALL(close(fd));
    CALL(open("a", O_RDWR | O_CREAT | O_EXCL, 0644));
    CALL(open("missing", O_RDWR));
    CALL(open("", O_RDWR));
    CALL(open(no_path, O_RDWR));
    CALL(open("a/x", O_RDWR | O_CREAT, 0644));
    CALL(open("sub", O_RDWR));
    CALL(open("sub", O_WRONLY | O_CREAT, 0644));
    CALL(open("a", O_RDONLY | O_DIRECTORY));
    CALL(open("a", O_RDWR | 0x40000000));
    CALL(symlink("a", "s"));
    CALL(open("s", O_RDWR | O_NOFOLLOW));
    CALL(fd = open("s", O_RDWR));
    CALL(pwrite(fd, "by link", 7, 100));
    CALL(close(fd));
    CALL(unlink("s"));
    CALL(fd = open("a", O_RDWR | O_APPEND));
    CALL(write(fd, "tail", 4));
    CALL(pwrite(fd, "pwrite appends", 14, 0));
    CALL(close(fd));
    CALL(fd = open("a", O_WRONLY));
    CALL(read(fd, text, 1));
    CALL(close(fd));
    CALL(fd = open("a", O_RDONLY));
    CALL(write(fd, text, 1));
    CALL(close(fd));
    CALL(fd = open("a", O_PATH));
    CALL(write(fd, text, 1));
    CALL(close(fd));
    CALL(fd = open("a", O_RDWR | O_TRUNC));
    CALL(close(fd));
    CALL(fd = creat("b", 0600));
    CALL(write(fd, text, 300));
    CALL(close(fd));
    CALL(creat("sub", 0600));
    CALL(fd = open("name with spaces", O_RDWR | O_CREAT | O_CLOEXEC, 0644));
    CALL(fcntl(fd, F_GETFD));
    CALL(write(fd, text, 10));
    CALL(close(fd));
    CALL(unlink("name with spaces"));
    CALL(fd = open(".", O_RDWR | O_TMPFILE, 0600));
    CALL(write(fd, text, 10));
    CALL(close(fd));

    int dir;
    CALL(dir = open("sub", O_RDONLY | O_DIRECTORY));
    CALL(fd = openat(dir, "f", O_RDWR | O_CREAT, 0644));
    CALL(write(fd, text, 77));
    CALL(close(fd));
    CALL(openat(-1, "f", O_RDWR));
    CALL(openat(9999, "f", O_RDWR));
    CALL(openat(dir, no_path, O_RDWR));
    CALL(fd = openat(dir, "../a", O_RDWR));
    CALL(close(fd));
    CALL(write(dir, text, 1));
    CALL(fsync(dir));
    CALL(fdatasync(dir));
    CALL(ftruncate(dir, 0));
    CALL(close(dir));
    CALL(openat(dir, "f", O_RDWR));
    static char longest[5000];
    memset(longest, 'n', sizeof longest - 1);
    CALL(open(longest, O_RDWR | O_CREAT, 0644));
    longest[300] = 0;
    CALL(open(longest, O_RDWR | O_CREAT, 0644));
}

static void copying(void)
{
    int fd = open("a", O_RDWR | O_CREAT, 0644), fd2;
    CALL(fd2 = dup(fd));
    CALL(write(fd2, "one", 3));
    CALL(write(fd, "two", 3));
    CALL(close(fd));
    CALL(write(fd2, "three", 5));
    CALL(dup2(fd2, fd2));
    CALL(dup2(fd2, 30));
    CALL(write(30, "four", 4));
    CALL(dup2(9999, 30));
    CALL(dup2(fd2, -1));
    CALL(dup2(fd2, 1 << 30));
    CALL(dup(-1));
    CALL(dup3(fd2, fd2, 0));
    CALL(dup3(fd2, 31, O_CLOEXEC));
    CALL(dup3(fd2, 31, O_APPEND));
    CALL(fcntl(31, F_GETFD));
    CALL(fd = fcntl(fd2, F_DUPFD, 32));
    CALL(write(fd, "five", 4));
    CALL(fcntl(fd2, F_DUPFD, -1));
    CALL(fcntl(fd2, F_DUPFD, 1 << 30));
    CALL(fcntl(fd2, F_DUPFD_CLOEXEC, 40));
    CALL(fcntl(40, F_GETFD));
    CALL(fcntl(40, F_SETFD, 0));
    CALL(fcntl(40, F_GETFD));
    CALL(fcntl(fd2, F_GETFL) & ~O_LARGEFILE);
    CALL(fcntl(fd2, F_SETFL, O_APPEND));
    CALL(fcntl(fd2, F_GETFL) & ~O_LARGEFILE);
    CALL(lseek(fd2, 0, SEEK_SET));
    CALL(write(fd2, "appended", 8));
    CALL(fcntl(fd2, F_SETFL, 0));
    CALL(fcntl(fd2, 12345, 0));
    CALL(fcntl(-1, F_GETFD));
    CALL(fcntl(fd2, F_SETLK, nowhere));
    struct flock lock = {.l_type = F_WRLCK, .l_whence = SEEK_SET};
    CALL(fcntl(fd2, F_SETLK, &lock));
    CALL(fcntl(fd2, F_GETLK, &lock));
    CALL(lock.l_type == F_UNLCK);
    CALL(flock(fd2, LOCK_EX | LOCK_NB));
    int other = open("b", O_RDWR | O_CREAT, 0644);
    CALL(dup2(other, fd2)); /* over the last but some of a */
    CALL(write(fd2, "now b", 5));
    CALL(close_range(30, 50, CLOSE_RANGE_CLOEXEC));
    CALL(fcntl(30, F_GETFD));
    CALL(close_range(30, 50, 0));
    CALL(write(30, "x", 1));
    CALL(close_range(50, 30, 0));
    CALL(close_range(30, 50, 0x80));
    CALL(close(other));
    CALL(write(other, "x", 1));
    CALL(close(fd2));
    fd = open("b", O_RDWR);
    fd2 = dup(fd);
    NOTHING(closefrom(fd));
    CALL(write(fd, "x", 1));
    CALL(write(fd2, "x", 1));
    MUST(!pipe(pipes));
    CALL(pipes[0]);
}

static void writing(void)
{
    int fd = open("c", O_RDWR | O_CREAT | O_TRUNC, 0644), reader = open("c", O_RDONLY);
    CALL(write(fd, text, 0));
    CALL(write(fd, nowhere, 0));
    CALL(write(fd, nowhere, 10));
    CALL(write(fd, text, 5000));
    CALL(write(-1, text, 1));
    CALL(write(reader, text, 1));
    CALL(write(fd, nowhere, endless));
    CALL(lseek(fd, 0, SEEK_CUR));
    CALL(lseek(fd, 9000, SEEK_SET));
    CALL(write(fd, "after a hole", 12));
    CALL(pwrite(fd, "p", 1, 4095));
    CALL(pwrite(fd, "p", 1, -1));
    CALL(pwrite(fd, nowhere, 9, 5));
    CALL(pwrite(fd, text, 0, 1 << 20));
    CALL(pwrite(pipes[1], "p", 1, 0));
    CALL(pwrite(fd, "p", 1, INT64_MAX));
    CALL(pwrite64(fd, "64", 2, 60));
    struct iovec v[3] = {{"one ", 4}, {"two ", 4}, {"three", 5}};
    CALL(writev(fd, v, 3));
    CALL(writev(fd, v, 0));
    CALL(writev(fd, v, minus_one));
    CALL(writev(fd, v, too_many));
    CALL(writev(fd, nowhere, 2));
    CALL(writev(reader, v, 3));
    struct iovec bad[2] = {{"good", 4}, {nowhere, 4}};
    CALL(writev(fd, bad, 2));
    struct iovec huge[2] = {{text, 1}, {text, endless}};
    CALL(writev(fd, huge, 2));
    CALL(pwritev(fd, v, 3, 200));
    CALL(pwritev(fd, v, 3, -1));
    CALL(pwritev(fd, v, minus_one, 0));
    CALL(pwritev64(fd, v, 2, 300));
    CALL(pwritev2(fd, v, 3, 400, 0));
    CALL(pwritev2(fd, v, 3, 500, RWF_DSYNC));
    CALL(pwritev2(fd, v, 3, 600, RWF_SYNC));
    CALL(pwritev2(fd, v, 3, 0, RWF_APPEND));
    CALL(pwritev2(fd, v, 3, -1, 0));
    CALL(lseek(fd, 0, SEEK_CUR));
    CALL(pwritev2(fd, v, 3, -2, 0));
    CALL(pwritev2(fd, v, 3, 0, 0x4000));
    int synced = open("c", O_RDWR | O_SYNC), dsynced = open("c", O_WRONLY | O_DSYNC | O_APPEND);
    CALL(write(synced, "O_SYNC", 6));
    CALL(write(dsynced, "O_DSYNC", 7));
    CALL(pwrite(synced, "x", 1, 1));
    CALL(close(synced));
    CALL(close(dsynced));

    struct rlimit old, limit;
    MUST(!getrlimit(RLIMIT_FSIZE, &old));
    limit = (struct rlimit){10000, old.rlim_max};
    MUST(!setrlimit(RLIMIT_FSIZE, &limit));
    CALL(pwrite(fd, text, 3000, 8000));
    CALL(pwrite(fd, text, 3000, 10000));
    CALL(ftruncate(fd, 10001));
    MUST(!setrlimit(RLIMIT_FSIZE, &old));
    CALL(close(fd));
    CALL(close(reader));
    CALL(pwrite(fd, "x", 1, 0));
}

static void sizing(void)
{
    int fd = open("c", O_RDWR), reader = open("c", O_RDONLY);
    CALL(ftruncate(fd, 4097));
    CALL(ftruncate(fd, -1));
    CALL(ftruncate(-1, 0));
    CALL(ftruncate(reader, 0));
    CALL(ftruncate(pipes[1], 0));
    CALL(ftruncate64(fd, 20000));
    CALL(ftruncate(fd, 100));
    CALL(ftruncate(fd, 9000));
    CALL(truncate("c", 8192));
    CALL(truncate("c", -1));
    CALL(truncate("missing", 0));
    CALL(truncate("sub", 0));
    CALL(truncate(no_path, 0));
    CALL(truncate("", 0));
    CALL(truncate64("c", 12288));
    CALL(pwrite(fd, text, 12288, 0));
    CALL(fallocate(fd, 0, 0, 16384));
    CALL(fallocate(fd, FALLOC_FL_KEEP_SIZE, 16384, 4096));
    CALL(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 100, 5000));
    CALL(fallocate(fd, FALLOC_FL_PUNCH_HOLE, 100, 5000));
    CALL(fallocate(fd, FALLOC_FL_ZERO_RANGE, 6000, 3000));
    CALL(fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, 16000, 3000));
    CALL(fallocate(fd, FALLOC_FL_COLLAPSE_RANGE, 4096, 4096));
    CALL(fallocate(fd, FALLOC_FL_INSERT_RANGE, 4096, 4096));
    CALL(fallocate(fd, FALLOC_FL_COLLAPSE_RANGE, 100, 4096));
    CALL(fallocate(fd, 0, -1, 10));
    CALL(fallocate(fd, 0, 0, 0));
    CALL(fallocate(fd, 0, 10, -10));
    CALL(fallocate(fd, 0, INT64_MAX, 10));
    CALL(fallocate(fd, 0x800, 0, 10));
    CALL(fallocate(reader, 0, 0, 10));
    CALL(fallocate(pipes[1], 0, 0, 10));
    CALL(fallocate(-1, 0, 0, 10));
    CALL(fallocate64(fd, 0, 0, 17000));
    CALL(posix_fallocate(fd, 0, 18000));
    CALL(posix_fallocate(fd, 0, 0));
    CALL(posix_fallocate(fd, -1, 10));
    CALL(posix_fallocate(-1, 0, 10));
    CALL(posix_fallocate(reader, 0, 10));
    CALL(posix_fallocate(pipes[1], 0, 10));
    CALL(close(fd));
    CALL(close(reader));
}

static void moving(void)
{
    int in = open("c", O_RDWR), out = open("d", O_RDWR | O_CREAT | O_TRUNC, 0644), reader = open("d", O_RDONLY);
    int appender = open("d", O_WRONLY | O_APPEND), dir = open("sub", O_RDONLY);
    MUST(pwrite(in, text, 12000, 0) == 12000);
    off_t from = 100, to = 50;
    CALL(copy_file_range(in, &from, out, &to, 5000, 0));
    CALL(from * 100000 + to);
    CALL(copy_file_range(in, NULL, out, NULL, 700, 0));
    CALL(copy_file_range(in, NULL, out, NULL, 0, 0));
    CALL(copy_file_range(in, NULL, reader, NULL, 10, 0));
    CALL(copy_file_range(in, NULL, appender, NULL, 10, 0));
    CALL(copy_file_range(in, NULL, out, NULL, 10, 1));
    CALL(copy_file_range(-1, NULL, out, NULL, 10, 0));
    CALL(copy_file_range(in, NULL, -1, NULL, 10, 0));
    CALL(copy_file_range(in, NULL, dir, NULL, 10, 0));
    CALL(copy_file_range(in, NULL, pipes[1], NULL, 10, 0));
    CALL(copy_file_range(in, nowhere, out, NULL, 10, 0));
    from = 0, to = 10;
    CALL(copy_file_range(out, &from, out, &to, 100, 0));
    from = 1 << 20;
    CALL(copy_file_range(in, &from, out, NULL, 100, 0));
    from = -1;
    CALL(copy_file_range(in, &from, out, NULL, 100, 0));

    from = 2000;
    CALL(sendfile(out, in, &from, 3000));
    CALL(from);
    CALL(sendfile(out, in, NULL, 100));
    CALL(sendfile64(out, in, NULL, 0));
    CALL(sendfile(reader, in, NULL, 10));
    CALL(sendfile(appender, in, NULL, 10));
    CALL(sendfile(out, -1, NULL, 10));
    CALL(sendfile(-1, in, NULL, 10));
    CALL(sendfile(out, pipes[0], NULL, 10));
    CALL(sendfile(out, in, nowhere, 10));
    CALL(lseek(out, 0, SEEK_CUR));

    MUST(write(pipes[1], text, 3000) == 3000);
    to = 9000;
    CALL(splice(pipes[0], NULL, out, &to, 1000, 0));
    CALL(to);
    CALL(splice(pipes[0], NULL, out, NULL, 2000, SPLICE_F_MOVE));
    CALL(splice(pipes[0], NULL, out, NULL, 10, SPLICE_F_NONBLOCK));
    CALL(splice(in, NULL, out, NULL, 10, 0));
    CALL(splice(pipes[0], &to, out, NULL, 10, 0));
    CALL(splice(pipes[0], NULL, out, NULL, 10, 0x100));
    CALL(splice(pipes[0], NULL, out, NULL, 0, 0));
    CALL(splice(pipes[0], NULL, reader, NULL, 10, SPLICE_F_NONBLOCK));
    CALL(splice(pipes[0], NULL, -1, NULL, 10, 0));
    CALL(splice(pipes[0], NULL, out, nowhere, 10, 0));
    CALL(splice(in, NULL, pipes[1], NULL, 500, 0));
    CALL(read(pipes[0], text, 500));
    CALL(close(in));
    CALL(close(out));
    CALL(close(reader));
    CALL(close(appender));
    CALL(close(dir));
}

static void naming(void)
{
    int fd = open("d", O_RDWR), dir = open("sub", O_RDONLY | O_DIRECTORY);
    CALL(rename("d", "e"));
    CALL(pwrite(fd, "renamed", 7, 0));
    CALL(rename("d", "e"));
    CALL(rename("missing", "a"));
    CALL(rename(no_path, "a"));
    CALL(rename("e", no_path));
    CALL(rename("e", ""));
    CALL(rename("e", "sub"));
    CALL(rename("sub", "e"));
    CALL(rename("sub", "sub/below"));
    CALL(rename("e", "e/x"));
    CALL(rename("e", "e"));
    CALL(rename("e", "a")); /* over another */
    CALL(pwrite(fd, "over a", 6, 10));
    CALL(renameat(AT_FDCWD, "a", dir, "f"));
    CALL(renameat(dir, "f", AT_FDCWD, "a"));
    CALL(renameat(-1, "f", AT_FDCWD, "a"));
    CALL(renameat(dir, "missing", AT_FDCWD, "a"));
    CALL(renameat2(AT_FDCWD, "a", AT_FDCWD, "b", RENAME_NOREPLACE));
    CALL(renameat2(AT_FDCWD, "a", AT_FDCWD, "d", RENAME_NOREPLACE));
    CALL(renameat2(AT_FDCWD, "d", AT_FDCWD, "b", RENAME_EXCHANGE));
    CALL(renameat2(AT_FDCWD, "d", AT_FDCWD, "missing", RENAME_EXCHANGE));
    CALL(renameat2(AT_FDCWD, "d", AT_FDCWD, "b", RENAME_EXCHANGE | RENAME_NOREPLACE));
    CALL(renameat2(AT_FDCWD, "d", AT_FDCWD, "b", 0x80));
    CALL(pwrite(fd, "exchanged", 9, 20));
    CALL(link("b", "t"));
    CALL(pwrite(fd, "linked", 6, 30));
    CALL(rename("b", "t")); /* two names of one file: nothing happens */
    CALL(unlink("b"));
    CALL(pwrite(fd, "half unlinked", 13, 40));
    CALL(unlink("t"));
    CALL(pwrite(fd, "unlinked", 8, 50));
    CALL(fsync(fd));
    CALL(close(fd));
    CALL(unlink("t"));
    CALL(unlink(no_path));
    CALL(unlink(""));
    CALL(unlink("sub"));
    CALL(unlink("d/x"));
    CALL(fd = openat(dir, "f", O_RDWR | O_CREAT, 0644));
    CALL(close(fd));
    CALL(unlinkat(dir, "f", AT_REMOVEDIR));
    CALL(unlinkat(dir, "f", 0x4));
    CALL(unlinkat(dir, "f", 0));
    CALL(unlinkat(dir, "f", 0));
    CALL(unlinkat(-1, "f", 0));
    CALL(mkdir("empty", 0755));
    CALL(unlinkat(AT_FDCWD, "empty", AT_REMOVEDIR));
    CALL(remove("missing"));
    CALL(remove("d"));
    CALL(mkdir("empty", 0755));
    CALL(remove("empty"));
    CALL(close(dir));
}

static void syncing(void)
{
    int fd = open("a", O_RDWR | O_CREAT, 0644), reader = open("a", O_RDONLY);
    CALL(write(fd, text, 3000));
    CALL(fsync(fd));
    CALL(fdatasync(fd));
    CALL(fsync(reader));
    CALL(fdatasync(reader));
    CALL(fsync(-1));
    CALL(fdatasync(9999));
    CALL(fsync(pipes[0]));
    CALL(fdatasync(pipes[1]));
    CALL(syncfs(fd));
    CALL(syncfs(-1));
    NOTHING(sync());
    CALL(sync_file_range(fd, 0, 0, SYNC_FILE_RANGE_WRITE));
    CALL(sync_file_range(fd, -1, 0, SYNC_FILE_RANGE_WRITE));
    CALL(sync_file_range(fd, 0, 0, 0x100));
    CALL(sync_file_range(pipes[0], 0, 0, SYNC_FILE_RANGE_WRITE));
    CALL(close(fd));
    CALL(fsync(fd));
    CALL(close(reader));
}

static void streaming(void)
{
    FILE *f;
    POINTER(f, fopen("e", "w+"));
    CALL(fwrite(text, 1, 6000, f));
    CALL(fflush(f));
    CALL(fsync(fileno(f)));
    CALL(fprintf(f, "line %d\n", 7));
    CALL(fseek(f, 100, SEEK_SET));
    CALL(fputs("in between", f));
    CALL(ftell(f));
    CALL(fclose(f));
    POINTER(f, fopen("e", "a"));
    CALL(fputs("at the end", f));
    CALL(fclose(f));
    POINTER(f, fopen("e", "r"));
    CALL(fputs("x", f));
    CALL(ferror(f) != 0);
    CALL(fclose(f));
    POINTER(f, fopen("e", "wx"));
    POINTER(f, fopen("missing", "r"));
    POINTER(f, fopen("missing/x", "w"));
    POINTER(f, fopen("sub", "w"));
    POINTER(f, fopen("e", "q"));
    POINTER(f, fopen64("e", "r+"));
    CALL(fputc('x', f));
    CALL(setvbuf(f, NULL, _IONBF, 0));
    POINTER(f, freopen("a", "r+", f));
    CALL(fputs("reopened", f));
    POINTER(f, freopen("missing", "r", f));
    int fd = open("b", O_RDWR | O_CREAT, 0644);
    POINTER(f, fdopen(fd, "w"));
    CALL(fputs("by fdopen", f));
    CALL(fclose(f));
    CALL(close(fd));
    POINTER(f, fdopen(-1, "w"));
    POINTER(f, fdopen(pipes[0], "q"));
    fd = open("a", O_RDONLY);
    POINTER(f, fdopen(fd, "w"));
    CALL(close(fd));
    POINTER(f, tmpfile());
    CALL(fputs("temporary", f));
    CALL(fclose(f));
}

int main(int argc, char **argv)
{
    semantics_start(argc, argv);
    fill(text, sizeof text, 1);
    opening();
    copying();
    writing();
    sizing();
    moving();
    naming();
    syncing();
    streaming();
    return 0;
}
