/* What a program does to a file that it may write, told in lines that must be the same for a local file and a mirrored
 * one: mirrored CASE FILE. The file is of any size and content; what is left of it is compared by the caller. */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096

static char buffer[1 << 20];

static const char *text(long rc)
{
    static char t[4][64];
    static int turn;
    char *to = t[turn++ % 4];
    snprintf(to, 64, rc < 0 ? "%ld %s" : "%ld", rc, strerrorname_np(errno));
    return to;
}

#define SAY(call) printf("%s: %s\n", #call, text((long)(call)))

static void fill(char *to, size_t n, unsigned seed)
{
    for (size_t i = 0; i < n; i++)
        to[i] = (char)((seed = seed * 1103515245 + 12345) >> 16);
}

static off_t size_of(int fd)
{
    struct stat st;
    return fstat(fd, &st) ? -1 : st.st_size;
}

/* Size, offset and a sum of all bytes. */
static void tell(const char *what, int fd)
{
    uint64_t sum = 0xcbf29ce484222325u;
    off_t at = 0;
    ssize_t n;
    while ((n = pread(fd, buffer, sizeof buffer, at)) > 0) {
        for (ssize_t i = 0; i < n; i++)
            sum = (sum ^ (uint8_t)buffer[i]) * 0x100000001b3u;
        at += n;
    }
    printf("%s: %ld bytes, read %ld, at %ld, sum %016lx\n", what, (long)size_of(fd), (long)at,
           (long)lseek(fd, 0, SEEK_CUR), (unsigned long)sum);
}

static int opened(const char *path, int flags)
{
    int fd = open(path, flags, 0644);
    if (fd < 0) {
        fprintf(stderr, "%s: %s\n", path, strerror(errno));
        exit(1);
    }
    return fd;
}

/* Nothing is read before it is written next to: what was not fetched yet has to come first. */
static void calls(const char *path)
{
    static char some[40000];
    int fd = opened(path, O_RDWR);
    off_t size = size_of(fd);
    fill(some, sizeof some, 1);
    SAY(write(fd, some, 10));
    SAY(pwrite(fd, some, 5000, 3));
    SAY(pwrite(fd, some, PAGE, 2 * PAGE));
    SAY(pwrite(fd, some, 3 * PAGE, 5 * PAGE - 1));
    SAY(pwrite(fd, some, 1, size / 2));
    SAY(pwrite(fd, some, 40000, size / 3));
    tell("overwritten", fd);
    struct iovec v[3] = {{some, 100}, {some + 1000, 0}, {some + 2000, 5000}};
    SAY(writev(fd, v, 3));
    SAY(pwritev(fd, v, 3, size - 50));
    SAY(pwritev2(fd, v, 3, -1, RWF_DSYNC));
    SAY(pwritev2(fd, v, 1, 7, RWF_APPEND));
    tell("by vectors", fd);
    SAY(lseek(fd, 0, SEEK_END) > size);
    SAY(write(fd, some, 12345));
    SAY(pwrite(fd, some, 10, size_of(fd) + 100000));
    tell("longer", fd);
    SAY(ftruncate(fd, size / 2 + 1));
    tell("cut", fd);
    SAY(ftruncate(fd, size + 5));
    tell("longer again", fd);
    SAY(pwrite(fd, some, 10, size));
    SAY(ftruncate(fd, 4097));
    SAY(pwrite(fd, some, 3, 3 * PAGE + 1));
    tell("cut in a page", fd);
    SAY(ftruncate(fd, 0));
    SAY(ftruncate(fd, 10 * PAGE));
    SAY(pwrite(fd, some, 3, PAGE));
    tell("from nothing", fd);
    SAY(fallocate(fd, 0, 0, 20 * PAGE + 7));
    SAY(fallocate(fd, FALLOC_FL_KEEP_SIZE, 0, 40 * PAGE));
    SAY(pwrite(fd, some, 40000, 100));
    SAY(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 1000, 10000));
    tell("allocated", fd);
    printf("posix_fallocate: %d\n", posix_fallocate(fd, 30 * PAGE, 10));
    SAY(fsync(fd));
    SAY(fdatasync(fd));
    SAY(syncfs(fd));
    tell("synced", fd);
    SAY(close(fd));
    SAY(truncate(path, 10000));
    fd = opened(path, O_RDONLY);
    tell("cut by path", fd);
    SAY(close(fd));
    fd = opened(path, O_WRONLY | O_TRUNC);
    SAY(write(fd, some, 30001));
    SAY(read(fd, some, 1));
    SAY(close(fd));
    fd = opened(path, O_RDWR | O_CREAT);
    tell("after O_TRUNC", fd);
    close(fd);
}

static void errors(const char *path)
{
    char c = 'x';
    int in = opened(path, O_RDONLY), out = opened(path, O_WRONLY), both = opened(path, O_RDWR);
    char *nothing = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    munmap(nothing + PAGE, PAGE);
    memset(nothing, 'y', PAGE);
    SAY(open(path, O_RDWR | O_CREAT | O_EXCL, 0644));
    SAY(open(path, O_RDWR | O_DIRECTORY));
    SAY(write(in, &c, 1));
    SAY(pwrite(in, &c, 1, 0));
    SAY(ftruncate(in, 1));
    SAY(fallocate(in, 0, 0, 1));
    SAY(read(out, &c, 1));
    SAY(pread(out, &c, 1, 0));
    SAY(write(both, nothing + PAGE, 1));
    SAY(pwrite(both, &c, 1, -1));
    SAY(pwrite(both, nothing, 2 * PAGE, 309 * PAGE) == PAGE);
    SAY(pwrite(both, nothing + PAGE, PAGE, 320 * PAGE));
    SAY(pwrite(both, nothing + PAGE - 10, PAGE, 330 * PAGE));
    SAY(ftruncate(both, -1));
    SAY(fallocate(both, 0, -1, 1));
    SAY(fallocate(both, 0, 0, 0));
    SAY(mmap(NULL, PAGE, PROT_READ, MAP_SHARED, out, 0) == MAP_FAILED);
    printf("%s\n", strerrorname_np(errno));
    SAY(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, in, 0) == MAP_FAILED);
    printf("%s\n", strerrorname_np(errno));
    char *map = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, in, 0);
    SAY(mprotect(map, PAGE, PROT_READ | PROT_WRITE));
    SAY(fcntl(in, F_GETFL) & O_ACCMODE);
    SAY(fcntl(out, F_GETFL) & (O_ACCMODE | O_APPEND));
    SAY(fcntl(both, F_GETFL) & O_ACCMODE);
    SAY(isatty(both));
    SAY(access(path, R_OK | W_OK));
    SAY(access(path, X_OK) == 0 && geteuid() != 0);
    tell("at last", both);
}

static void maps(const char *path)
{
    int fd = opened(path, O_RDWR);
    size_t size = (size_t)size_of(fd);
    char *map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    char *second = mmap(NULL, 10 * PAGE, PROT_READ, MAP_SHARED, fd, 2 * PAGE);
    char *own = mmap(NULL, 10 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    fill(map + PAGE, 100, 2); /* unfetched or not */
    map[size - 1] = map[5] + 1;
    for (size_t at = 0; at < size; at += 37 * PAGE)
        map[at] = (char)at;
    own[3] = 'o';
    own[PAGE * 3] = 'p';
    printf("private %d %d shared %d\n", own[3], own[PAGE * 3], map[3] == own[3]);
    SAY(msync(map, size, MS_SYNC));
    tell("stored", fd);
    SAY(mprotect(second, 10 * PAGE, PROT_READ | PROT_WRITE));
    fill(second + 3 * PAGE - 50, 100, 3);
    printf("one file: %d\n", !memcmp(second, map + 2 * PAGE, 10 * PAGE));
    SAY(pwrite(fd, "hello", 5, 2 * PAGE));
    printf("written under a mapping: %.5s\n", second);
    SAY(madvise(map, 20 * PAGE, MADV_DONTNEED));
    tell("after DONTNEED", fd);
    SAY(munmap(map + 4 * PAGE, 2 * PAGE));
    map[6 * PAGE] = 'm';
    map[4 * PAGE - 1] = 'n';
    void *got = mmap(map + 8 * PAGE, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    printf("over: %d\n", got == map + 8 * PAGE);
    map[8 * PAGE] = 'q'; /* is not the file's */
    tell("in pieces", fd);
    got = mmap(map + 8 * PAGE, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 3 * PAGE);
    printf("another place: %d\n", got == map + 8 * PAGE);
    map[9 * PAGE] = 'r';
    tell("fixed", fd);
    /* Longer, and moved. */
    SAY(ftruncate(fd, (off_t)size + 30 * PAGE));
    second = mremap(second, 10 * PAGE, 200 * PAGE, MREMAP_MAYMOVE);
    SAY(second == MAP_FAILED);
    fill(second + 150 * PAGE, 3 * PAGE, 4);
    second[0] = 's';
    char *room = mmap(NULL, 300 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    second = mremap(second, 200 * PAGE, 100 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, room);
    SAY(second == room);
    second[99 * PAGE] = 't';
    second = mremap(second, 100 * PAGE, 50 * PAGE, 0);
    second[49 * PAGE] = 'u';
    SAY(msync(second, 50 * PAGE, MS_ASYNC));
    tell("moved", fd);
    SAY(close(fd));
    second[10 * PAGE + 1] = 'v'; /* the descriptor is gone, the mapping is not */
    SAY(munmap(second, 50 * PAGE));
    fd = opened(path, O_RDONLY);
    tell("unmapped", fd);
    close(fd);
}

/* What is written comes out of mappings of the same file, and nothing of it has been touched before. */
static void sources(const char *path)
{
    int fd = opened(path, O_RDWR);
    off_t size = size_of(fd), whole = (size + PAGE - 1) / PAGE * PAGE;
    SAY(ftruncate(fd, whole + 40 * PAGE));
    char *map = mmap(NULL, (size_t)whole + 50 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    char *own = mmap(NULL, (size_t)whole, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    SAY(pwrite(fd, "here", 4, 0));
    SAY(pwrite(fd, map + whole + 3 * PAGE, PAGE, 0));
    SAY(pwrite(fd, map + 20 * PAGE, PAGE, 0));
    SAY(pwrite(fd, map + 30 * PAGE + 1, 20 * PAGE, 25 * PAGE + 7));
    SAY(pwrite(fd, own + 60 * PAGE, 3 * PAGE, PAGE));
    struct iovec v[3] = {{map + 70 * PAGE, 100}, {(char[]){"between"}, 7}, {own + 80 * PAGE + 9, 5000}};
    SAY(pwritev(fd, v, 3, 90 * PAGE));
    SAY(write(fd, map + whole + 10 * PAGE, 5));
    tell("from mappings", fd);
    mprotect(map + 100 * PAGE, PAGE, PROT_NONE);
    SAY(pwrite(fd, map + 99 * PAGE, 2 * PAGE, 5 * PAGE));
    SAY(pwrite(fd, map + 100 * PAGE, PAGE, 5 * PAGE));
    tell("as far as it can be read", fd);
    close(fd);
}

static void wait_all(int n)
{
    int status;
    while (n-- > 0 && wait(&status) > 0)
        if (status)
            printf("a child ended with %d\n", status);
}

static void forks(const char *path)
{
    int fd = opened(path, O_RDWR);
    size_t size = (size_t)size_of(fd);
    char *map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    char *own = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
    map[1] = 'a';
    own[2] = 'b';
    fflush(stdout);
    if (!fork()) {
        map[20 * PAGE] = map[1] + 1; /* an unfetched page */
        own[2] = 'c';
        own[30 * PAGE] = 'd';
        if (pwrite(fd, "child", 5, 40 * PAGE) != 5 || lseek(fd, 777, SEEK_SET) != 777)
            _exit(1);
        _exit(map[2] != own[2] && own[1] == 'a' ? 0 : 2);
    }
    wait_all(1);
    printf("%c %c %.5s\n", map[20 * PAGE], own[2], map + 40 * PAGE);
    printf("private stays: %d\n", own[30 * PAGE] == map[30 * PAGE]);
    tell("after the child", fd);
    for (int i = 0; i < 3; i++)
        if (!fork()) {
            for (int k = 0; k < 50; k++) {
                map[(size_t)(k * 3 + i) * PAGE + 7] = (char)('A' + i);
                if (k % 16 == 0 && msync(map, size, MS_SYNC))
                    _exit(3);
            }
            _exit(0);
        }
    wait_all(3);
    tell("after three", fd);
    munmap(map, size);
    close(fd);
}

/* A program that gets the descriptor by exec, and by nothing else. */
static void execs(const char *path)
{
    char number[16];
    int fd = opened(path, O_RDWR | O_APPEND), twice = dup(fd);
    SAY(lseek(twice, 100, SEEK_SET));
    snprintf(number, sizeof number, "%d", twice);
    fflush(stdout);
    if (!fork()) {
        execl(program_invocation_name, program_invocation_name, "inherited", number, (char *)NULL);
        _exit(9);
    }
    wait_all(1);
    tell("after the other", fd);
    SAY(write(fd, "here", 4));
    tell("at last", fd);
    close(fd);
    close(twice);
}

static void inherited(const char *number)
{
    int fd = atoi(number);
    SAY(fcntl(fd, F_GETFL) & (O_ACCMODE | O_APPEND));
    SAY(write(fd, "there", 5));
    SAY(pwrite(fd, "appended too", 12, 5));
    SAY(fcntl(fd, F_SETFL, 0));
    SAY(pwrite(fd, "not this", 8, 5));
    char *map = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    map[0] = 'i';
    SAY(fcntl(fd, F_SETFL, O_APPEND));
    SAY(fsync(fd));
}

static void say_lock(int fd, int command, short type, off_t from, off_t len)
{
    struct flock l = {.l_type = type, .l_whence = SEEK_SET, .l_start = from, .l_len = len};
    int rc = fcntl(fd, command, &l);
    bool asks = command == F_GETLK || command == F_OFD_GETLK;
    printf("lock %d %d %ld %ld: %s", command, type, (long)from, (long)len, text(rc));
    if (asks && !rc)
        printf(" type %d from %ld len %ld by %s", l.l_type, (long)l.l_start, (long)l.l_len,
               l.l_type == F_UNLCK    ? "none"
               : l.l_pid == getppid() ? "parent"
               : l.l_pid == getpid()  ? "self"
                                      : "another");
    printf("\n");
}

static void in_child(void (*call)(const char *), const char *path)
{
    fflush(stdout);
    if (!fork()) {
        call(path);
        fflush(stdout);
        _exit(0);
    }
    wait_all(1);
}

static void try_locks(const char *path)
{
    int fd = opened(path, O_RDWR), in = opened(path, O_RDONLY);
    say_lock(fd, F_GETLK, F_WRLCK, 0, 0);
    say_lock(fd, F_SETLK, F_WRLCK, 10, 1);
    say_lock(fd, F_SETLK, F_RDLCK, 0, 5);
    say_lock(fd, F_SETLK, F_WRLCK, 200, 1);
    say_lock(in, F_SETLK, F_WRLCK, 300, 1);
    say_lock(in, F_SETLK, F_RDLCK, 300, 1);
    say_lock(fd, F_OFD_SETLK, F_WRLCK, 12, 1);
    say_lock(fd, F_OFD_SETLK, F_WRLCK, 400, 1);
    SAY(flock(fd, LOCK_EX | LOCK_NB));
}

static void inherited_lock(const char *number)
{
    SAY(flock(atoi(number), LOCK_UN));
}

static void locks(const char *path)
{
    int fd = opened(path, O_RDWR);
    say_lock(fd, F_SETLK, F_WRLCK, 10, 20);
    in_child(try_locks, path);
    printf("a lock and another open\n");
    int other = opened(path, O_RDWR);
    in_child(try_locks, path);
    close(other); /* drops all of this process's */
    printf("dropped by close\n");
    in_child(try_locks, path);
    say_lock(fd, F_SETLK, F_WRLCK, 10, 20);
    other = opened(path, O_RDWR);
    SAY(flock(other, LOCK_SH)); /* of another kind: the first stays */
    in_child(try_locks, path);
    close(other);
    SAY(flock(fd, LOCK_EX));
    printf("flock\n");
    in_child(try_locks, path);
    char number[16];
    snprintf(number, sizeof number, "%d", fd);
    in_child(inherited_lock, number); /* the open file's, whoever has it */
    in_child(try_locks, path);
    say_lock(fd, F_OFD_SETLK, F_WRLCK, 400, 1);
    other = opened(path, O_RDWR);
    say_lock(other, F_OFD_SETLK, F_WRLCK, 400, 1);
    say_lock(other, F_OFD_SETLK, F_RDLCK, 401, 1);
    say_lock(fd, F_SETLK, F_RDLCK, 401, 1);
    SAY(lockf(fd, F_TEST, 10));
    close(fd);
    say_lock(other, F_OFD_SETLK, F_WRLCK, 400, 1);
    close(other);
}

static void streams(const char *path)
{
    char line[200];
    FILE *f = fopen(path, "r+");
    printf("first: %zu\n", fread(line, 1, 100, f));
    SAY(fseek(f, 50, SEEK_SET));
    SAY(fputs("in the middle", f));
    SAY(fseek(f, 0, SEEK_END));
    fprintf(f, "%d lines\n", 7);
    SAY(fflush(f));
    SAY(fseek(f, 48, SEEK_SET));
    printf("second: %zu\n", fread(line, 1, 20, f));
    printf("%.13s\n", line + 2);
    SAY(fileno(f) > 2);
    SAY(ftruncate(fileno(f), 5000));
    SAY(fclose(f));
    f = fopen(path, "a+");
    fprintf(f, "appended");
    rewind(f);
    printf("third: %zu\n", fread(line, 1, 10, f));
    SAY(fclose(f));
    int fd = opened(path, O_RDWR);
    tell("r+ and a", fd);
    f = fdopen(fd, "w");
    for (int i = 0; i < 10000; i++)
        fprintf(f, "line %d\n", i);
    SAY(fclose(f));
    fd = opened(path, O_RDONLY);
    tell("fdopen", fd);
    close(fd);
    f = fopen(path, "w");
    for (int i = 0; i < 3000; i++)
        fprintf(f, "row %d\n", i);
    SAY(fclose(f));
    f = fopen(path, "a");
    fprintf(f, "and what exit has to flush");
}

#define APPENDERS 4
#define APPENDS 200

static void appends(const char *path)
{
    int fd = opened(path, O_RDWR | O_TRUNC);
    fflush(stdout);
    for (int i = 0; i < APPENDERS; i++)
        if (!fork()) {
            char record[101];
            int own = i & 1 ? fd : opened(path, O_WRONLY | O_APPEND);
            fcntl(own, F_SETFL, O_APPEND);
            for (int k = 0; k < APPENDS; k++) {
                memset(record, 'a' + i, sizeof record);
                snprintf(record, sizeof record, "%d:%d", i, k);
                record[strlen(record)] = ' ';
                record[100] = '\n';
                if (write(own, record, sizeof record) != sizeof record)
                    _exit(1);
            }
            _exit(0);
        }
    wait_all(APPENDERS);
    int next[APPENDERS] = {0}, wrong = 0;
    for (int n = 0; n < APPENDERS * APPENDS; n++) {
        char record[102] = "";
        int i = -1, k = -1;
        if (pread(fd, record, 101, n * 101) != 101 || sscanf(record, "%d:%d", &i, &k) != 2 || i < 0 || i >= APPENDERS ||
            k != next[i]++ || record[100] != '\n' || record[99] != 'a' + i)
            wrong++;
    }
    printf("%ld bytes, %d wrong\n", (long)size_of(fd), wrong);
    SAY(ftruncate(fd, 0)); /* the order is no two runs' */
    close(fd);
}

struct share {
    int fd, number;
};

static void *write_here(void *of)
{
    const struct share *s = of;
    char block[1000];
    memset(block, 'a' + s->number, sizeof block);
    for (int i = 0; i < 100; i++)
        if (write(s->fd, block, sizeof block) != sizeof block)
            return "failed";
    return NULL;
}

/* Threads that share an offset: no block lies in another. */
static void threads(const char *path)
{
    pthread_t all[4];
    struct share shares[4];
    int fd = opened(path, O_RDWR | O_TRUNC);
    for (int i = 0; i < 4; i++) {
        shares[i] = (struct share){fd, i};
        pthread_create(&all[i], NULL, write_here, &shares[i]);
    }
    for (int i = 0; i < 4; i++) {
        void *failed;
        pthread_join(all[i], &failed);
        printf("thread %d: %s\n", i, failed ? "failed" : "done");
    }
    int count[26] = {0}, wrong = 0;
    for (int n = 0; n < 400; n++) {
        char block[1000];
        wrong += pread(fd, block, 1000, n * 1000) != 1000 || memcmp(block, block + 1, 999);
        count[(block[0] - 'a') & 15]++;
    }
    printf("%d wrong; %d %d %d %d\n", wrong, count[0], count[1], count[2], count[3]);
    SAY(lseek(fd, 0, SEEK_CUR));
    SAY(ftruncate(fd, 0));
    close(fd);
}

static void transfers(const char *path)
{
    char local[] = "/tmp/mirrored.XXXXXX";
    int from = mkstemp(local), fd = opened(path, O_RDWR);
    unlink(local);
    fill(buffer, 300000, 9);
    SAY(write(from, buffer, 300000));
    off_t at = 100;
    SAY(sendfile(fd, from, &at, 200000));
    printf("%ld\n", (long)at);
    tell("sent", fd);
    at = 0;
    SAY(lseek(from, 0, SEEK_SET));
    SAY(sendfile(from, fd, &at, 5000));
    tell("and back", fd);
    tell("there", from);
}

/* Stores, says so, and waits to be killed. */
static void stores(const char *path)
{
    int fd = opened(path, O_RDWR);
    size_t size = (size_t)size_of(fd);
    char *map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    for (size_t at = 0; at < size; at += 5 * PAGE)
        memset(map + at, 's', 10);
    if (pwrite(fd, "written", 7, 3 * PAGE + 100) != 7)
        exit(1);
    printf("stored\n");
    fflush(stdout);
    for (;;)
        pause();
}

/* Stores and syncs for each line of the input: says the round when it is done. "q" ends it. */
static void rounds(const char *path)
{
    char line[20];
    int fd = opened(path, O_RDWR);
    size_t size = (size_t)size_of(fd);
    char *map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    printf("ready\n");
    fflush(stdout);
    for (unsigned n = 1; fgets(line, sizeof line, stdin) && line[0] != 'q'; n++) {
        for (size_t page = n % 7; page < size / PAGE; page += 7)
            fill(map + page * PAGE + n % 4000, 20, n);
        char block[6000];
        fill(block, sizeof block, n * 31);
        if (pwrite(fd, block, sizeof block, (off_t)(n * 777777 % (size - 6000))) != sizeof block)
            printf("pwrite %s\n", strerrorname_np(errno));
        int rc = msync(map, size, MS_SYNC);
        printf("%u %s\n", n, text(rc));
        fflush(stdout);
    }
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*run)(const char *);
    } table[] = {{"calls", calls},        {"sources", sources}, {"errors", errors},   {"maps", maps},
                 {"forks", forks},        {"locks", locks},     {"streams", streams}, {"appends", appends},
                 {"threads", threads},    {"stores", stores},   {"rounds", rounds},   {"transfers", transfers},
                 {"execs", execs},        {"inherited", inherited}};
    for (size_t i = 0; argc == 3 && i < sizeof table / sizeof *table; i++)
        if (!strcmp(argv[1], table[i].name)) {
            table[i].run(argv[2]);
            return 0;
        }
    fprintf(stderr, "usage: mirrored CASE FILE\n");
    return 2;
}
