/* What a program can do with a pulled file that no tool does.
 *
 *   pulled stdio FILE       prints what stdio says of it
 *   pulled stdin FILE       the same of the standard input, which the file is opened as
 *   pulled refused FILE     everything that must be refused is, as for a file on a read-only file system
 *   pulled maps FILE LOCAL  mappings in all forms, compared with the local file
 *   pulled fork FILE LOCAL  children, by fork, with pages nobody has touched
 *   pulled mapped|reads|threads|orphan FILE LOCAL
 *                           reads all, page by page in no order, through a mapping, by calls, through two mappings by
 *                           four threads, in a child whose parent has gone; says how far it is, in percent
 *   pulled failing FILE LOCAL
 *                           reads the second half when a line comes; says what it got: same, SIGBUS, an errno
 */
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096u

static void failed(const char *what, int line)
{
    fprintf(stderr, "pulled.c:%d: %s: %s\n", line, what, strerror(errno));
    exit(1);
}
#define MUST(x)                                                                                                        \
    do {                                                                                                               \
        errno = 0;                                                                                                     \
        if (!(x))                                                                                                      \
            failed(#x, __LINE__);                                                                                      \
    } while (0)
#define REFUSED(x, with)                                                                                               \
    do {                                                                                                               \
        errno = 0;                                                                                                     \
        if ((long)(x) != -1 || errno != (with))                                                                        \
            failed(#x " is not refused with " #with, __LINE__);                                                        \
    } while (0)

static unsigned long hash(const unsigned char *p, size_t n, unsigned long h)
{
    while (n--)
        h = (h ^ *p++) * 0x100000001b3UL;
    return h;
}

static void stream(FILE *f)
{
    unsigned char buf[1000];
    size_t n;
    unsigned long h = 1;
    printf("byte %d\n", fgetc(f));
    while ((n = fread(buf, 1, sizeof buf, f)))
        h = hash(buf, n, h);
    printf("hash %lx eof %d error %d at %ld\n", h, !!feof(f), !!ferror(f), ftell(f));
    printf("seek %d", fseek(f, -100, SEEK_END));
    printf(" at %ld next %d\n", ftell(f), fgetc(f));
    printf("unget %d", ungetc('x', f));
    printf(" %d\n", fgetc(f));
    rewind(f);
    char line[100];
    printf("line %d", fgets(line, sizeof line, f) ? (int)strlen(line) : -1);
    printf(" at %ld\n", ftell(f));
    printf("write %d\n", fputc('x', f) == EOF);
    clearerr(f);
    char *whole = NULL;
    size_t cap = 0;
    fseek(f, 5, SEEK_SET);
    ssize_t got = getline(&whole, &cap, f);
    printf("getline %zd %lx\n", got, got > 0 ? hash((unsigned char *)whole, (size_t)got, 1) : 0);
    free(whole);
}

static void do_stdio(const char *path)
{
    FILE *f = fopen(path, "r");
    MUST(f);
    struct stat st;
    MUST(fileno(f) > 2 && !fstat(fileno(f), &st));
    printf("size %ld\n", (long)st.st_size);
    stream(f);
    MUST(!fclose(f));
    int fd = open(path, O_RDONLY);
    MUST(fd >= 0 && (f = fdopen(fd, "rb")) && fileno(f) == fd);
    stream(f);
    MUST(!fclose(f) && fcntl(fd, F_GETFD) < 0);
    MUST(freopen(path, "r", stdin) == stdin);
    stream(stdin);
    errno = 0;
    printf("w %d\n", fopen("/", "w") == NULL);
}

static void do_stdin(const char *path)
{
    MUST(freopen(path, "r", stdin));
    int n;
    MUST(scanf("%d", &n) == 1);
    printf("%d %d\n", n, getchar());
    stream(stdin);
}

static void do_refused(const char *path)
{
    struct stat st;
    REFUSED(open(path, O_RDWR), EROFS);
    REFUSED(open(path, O_WRONLY | O_TRUNC), EROFS);
    REFUSED(open(path, O_RDONLY | O_TRUNC), EROFS);
    REFUSED(open(path, O_CREAT | O_EXCL | O_RDWR, 0600), EEXIST);
    REFUSED(open(path, O_DIRECTORY), ENOTDIR);
    REFUSED(access(path, W_OK), EROFS);
    REFUSED(access(path, X_OK), EACCES);
    REFUSED(truncate(path, 0), EROFS);
    REFUSED(unlink(path), EROFS);
    MUST(!fopen(path, "w") && errno == EROFS);
    MUST(!fopen(path, "r+") && errno == EROFS);
    int fd = open(path, O_RDONLY);
    MUST(fd >= 0 && !fstat(fd, &st));
    MUST((fcntl(fd, F_GETFL) & (O_ACCMODE | O_PATH)) == O_RDONLY);
    REFUSED(write(fd, "x", 1), EBADF);
    REFUSED(pwrite(fd, "x", 1, 0), EBADF);
    void *nowhere = mmap(NULL, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    REFUSED(read(fd, nowhere, 10), EFAULT);
    REFUSED(pread(fd, &st, 1, -1), EINVAL);
    REFUSED(lseek(fd, -1, SEEK_SET), EINVAL);
    REFUSED(lseek(fd, 0, 99), EINVAL);
    REFUSED(lseek(fd, st.st_size, SEEK_DATA), ENXIO);
    REFUSED(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), EACCES);
    REFUSED(mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 1), EINVAL);
    REFUSED(mmap(NULL, 0, PROT_READ, MAP_SHARED, fd, 0), EINVAL);
    void *p = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0);
    MUST(p != MAP_FAILED);
    REFUSED(mprotect(p, PAGE, PROT_READ | PROT_WRITE), EACCES);
    REFUSED(madvise(p, PAGE, MADV_REMOVE), EACCES);
    MUST(!fsync(fd) && !fdatasync(fd));
    struct flock lock = {.l_type = F_RDLCK, .l_whence = SEEK_SET};
    MUST(!fcntl(fd, F_SETLK, &lock));
    lock.l_type = F_WRLCK;
    REFUSED(fcntl(fd, F_SETLK, &lock), EBADF);
    MUST(!close(fd));
    REFUSED(read(fd, &st, 1), EBADF);
    /* What goes around the library gets an error, never a hole's zeros. */
    MUST((fd = open(path, O_RDONLY)) >= 0);
    REFUSED(syscall(SYS_read, fd, &st, sizeof st), EBADF);
    REFUSED(syscall(SYS_mmap, NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0), EBADF);
    MUST(!close(fd));
}

/* ---- mappings */

static unsigned char *local;
static size_t size;
static int fd;

static void load(const char *path, const char *of)
{
    struct stat st;
    int l = open(of, O_RDONLY);
    MUST(l >= 0 && !fstat(l, &st));
    size = (size_t)st.st_size;
    local = mmap(NULL, size, PROT_READ, MAP_PRIVATE, l, 0);
    MUST(local != MAP_FAILED);
    fd = open(path, O_RDONLY);
    MUST(fd >= 0);
}

static unsigned char *map(void *at, size_t len, int prot, int flags, size_t offset)
{
    unsigned char *p = mmap(at, len, prot, flags, fd, (off_t)offset);
    MUST(p != MAP_FAILED);
    return p;
}

static void same(const unsigned char *p, size_t offset, size_t len)
{
    for (size_t i = 0; i < len; i++)
        if (p[i] != local[offset + i]) {
            fprintf(stderr, "pulled.c: byte %zu of the file is %02x, not %02x\n", offset + i, p[i], local[offset + i]);
            exit(1);
        }
}

static void do_maps(const char *path, const char *of)
{
    load(path, of);
    size_t mid = size / 2 / PAGE * PAGE, far = size / PAGE * PAGE - 40 * PAGE;
    unsigned char *a = map(NULL, size, PROT_READ, MAP_SHARED, 0);
    same(a + mid, mid, 5000);

    unsigned char *b = map(NULL, 10 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, far);
    b[PAGE + 5] = 'x';
    same(b, far, PAGE);
    MUST(b[PAGE + 5] == 'x' && a[far + PAGE + 5] == local[far + PAGE + 5]);
    MUST(!madvise(b, 10 * PAGE, MADV_DONTNEED));
    same(b, far, 10 * PAGE);

    /* Over a part of another, and of something that is none of it. */
    unsigned char *c = map(a + 8 * PAGE, 2 * PAGE, PROT_READ, MAP_SHARED | MAP_FIXED, far + 20 * PAGE);
    same(c, far + 20 * PAGE, 2 * PAGE);
    same(a, 0, 8 * PAGE);
    same(a + 10 * PAGE, 10 * PAGE, PAGE);
    unsigned char *d = mmap(NULL, 4 * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    MUST(d != MAP_FAILED && map(d + PAGE, PAGE, PROT_READ, MAP_PRIVATE | MAP_FIXED, mid + PAGE) == d + PAGE);
    same(d + PAGE, mid + PAGE, PAGE);
    MUST(d[0] == 0 && d[2 * PAGE] == 0);
    MUST(mmap(a + 12 * PAGE, PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == a + 12 * PAGE);
    MUST(a[12 * PAGE] == 0);
    same(a + 13 * PAGE, 13 * PAGE, PAGE);
    MUST(!munmap(a + 14 * PAGE, 2 * PAGE));
    same(a + 16 * PAGE, 16 * PAGE, PAGE);

    /* Growing in place or elsewhere, moving to where something was, shrinking, a second copy. */
    unsigned char *e = map(NULL, 4 * PAGE, PROT_READ, MAP_SHARED, mid + 100 * PAGE);
    same(e, mid + 100 * PAGE, 10);
    MUST((e = mremap(e, 4 * PAGE, 600 * PAGE, MREMAP_MAYMOVE)) != MAP_FAILED);
    same(e, mid + 100 * PAGE, 600 * PAGE);
    unsigned char *to = mmap(NULL, 800 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    MUST(to != MAP_FAILED);
    MUST(mremap(e, 600 * PAGE, 700 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to);
    same(to, mid + 100 * PAGE, 700 * PAGE);
    MUST(mremap(to, 700 * PAGE, 3 * PAGE, 0) == to);
    unsigned char *f = mremap(to, 0, 50 * PAGE, MREMAP_MAYMOVE);
    MUST(f != MAP_FAILED);
    same(f, mid + 100 * PAGE, 50 * PAGE);

    /* A protection that comes late, hints, and all of it at last. */
    unsigned char *g = map(NULL, 20 * PAGE, PROT_NONE, MAP_PRIVATE, far - 100 * PAGE);
    MUST(!mprotect(g + PAGE, 2 * PAGE, PROT_READ | PROT_WRITE));
    g[PAGE] = 'y';
    same(g + PAGE + 1, far - 99 * PAGE + 1, PAGE);
    MUST(!madvise(a, 8 * PAGE, MADV_WILLNEED) && !madvise(a, 8 * PAGE, MADV_SEQUENTIAL));
    MUST(!madvise(a + 16 * PAGE, size - 16 * PAGE, MADV_RANDOM) && !madvise(a, 8 * PAGE, MADV_DONTNEED));
    MUST(!posix_fadvise(fd, 0, 0, POSIX_FADV_SEQUENTIAL));
    same(a, 0, 8 * PAGE);
    same(a + 16 * PAGE, 16 * PAGE, size - 16 * PAGE);
    MUST(!close(fd));
    same(a + 16 * PAGE, 16 * PAGE, size - 16 * PAGE);
    MUST(a[size] == 0 || size % PAGE == 0);
}

/* ---- fork */

static void in_child(void (*what)(void))
{
    pid_t child = fork();
    MUST(child >= 0);
    if (!child) {
        what();
        _exit(0);
    }
    int status;
    MUST(waitpid(child, &status, 0) == child && WIFEXITED(status) && !WEXITSTATUS(status));
}

static unsigned char *shared, *own, *gone, *again;
static size_t third;

static void read_untouched(void)
{
    same(shared, 0, third);
    MUST(own[third] == 'p');
    same(own + third + 1, third + 1, third);
    own[third + 1] = 'c';
    unsigned char buf[100];
    MUST(pread(fd, buf, sizeof buf, (off_t)(size - 100)) == 100 && !memcmp(buf, local + size - 100, 100));
    MUST(read(fd, buf, sizeof buf) == 100 && !memcmp(buf, local, 100));
    again = map(NULL, PAGE, PROT_READ, MAP_SHARED, 0);
    same(again, 0, PAGE);
}

static void grandchild(void)
{
    same(shared + third, third, PAGE);
    in_child(read_untouched);
}

static void do_fork(const char *path, const char *of)
{
    load(path, of);
    third = size / 3 / PAGE * PAGE;
    shared = map(NULL, size, PROT_READ, MAP_SHARED, 0);
    own = map(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, 0);
    gone = map(NULL, PAGE, PROT_READ, MAP_SHARED, 0);
    MUST(!madvise(gone, PAGE, MADV_DONTFORK));
    own[third] = 'p';
    in_child(read_untouched);
    MUST(own[third] == 'p' && own[third + 1] == local[third + 1]);
    /* The child has read on, in the open file that both have. */
    MUST(lseek(fd, 0, SEEK_CUR) == 100 && lseek(fd, 0, SEEK_SET) == 0);
    in_child(grandchild);
    same(shared + 2 * third, 2 * third, size - 2 * third);
    same(own + 2 * third, 2 * third, size - 2 * third);
    same(gone, 0, PAGE);
}

/* ---- all of it */

static size_t done;

static size_t scattered(size_t i, size_t pages)
{
    return i * 7919 % pages; /* a prime: every page once, unless it divides their number */
}

static void progress(void)
{
    size_t pages = (size + PAGE - 1) / PAGE, now = __atomic_add_fetch(&done, 1, __ATOMIC_RELAXED);
    if (now * 100 / pages != (now - 1) * 100 / pages)
        dprintf(1, "%zu\n", now * 100 / pages);
}

static void *read_mapped(void *arg)
{
    size_t pages = (size + PAGE - 1) / PAGE, part = (size_t)arg;
    unsigned char *p = map(NULL, size, PROT_READ, part % 2 ? MAP_PRIVATE : MAP_SHARED, 0);
    for (size_t i = part; i < pages; i += 4) {
        size_t at = scattered(i, pages) * PAGE;
        same(p + at, at, size - at < PAGE ? size - at : PAGE);
        progress();
    }
    return NULL;
}

static void do_mapped(void)
{
    for (size_t part = 0; part < 4; part++)
        read_mapped((void *)part);
}

static void do_threads(void)
{
    pthread_t t[4];
    for (size_t part = 0; part < 4; part++)
        MUST(!pthread_create(&t[part], NULL, read_mapped, (void *)part));
    for (int i = 0; i < 4; i++)
        MUST(!pthread_join(t[i], NULL));
}

static void do_reads(void)
{
    static unsigned char buf[PAGE];
    size_t pages = (size + PAGE - 1) / PAGE;
    for (size_t i = 0; i < pages; i++) {
        size_t at = scattered(i, pages) * PAGE, n = size - at < PAGE ? size - at : PAGE;
        MUST(pread(fd, buf, PAGE, (off_t)at) == (ssize_t)n);
        MUST(!memcmp(buf, local + at, n));
        progress();
    }
}

static void do_orphan(void)
{
    shared = map(NULL, size, PROT_READ, MAP_SHARED, 0);
    pid_t child = fork();
    MUST(child >= 0);
    if (child)
        _exit(0);
    do_mapped();
}

static sigjmp_buf out;

static void jump(int sig)
{
    siglongjmp(out, sig);
}

static void do_failing(void)
{
    static unsigned char buf[PAGE];
    size_t half = size / 2 / PAGE * PAGE;
    unsigned char *p = map(NULL, size, PROT_READ, MAP_SHARED, 0);
    same(p, 0, PAGE);
    dprintf(1, "ready\n");
    MUST(read(0, buf, 1) == 1);
    MUST(signal(SIGBUS, jump) != SIG_ERR);
    errno = 0;
    ssize_t got = pread(fd, buf, PAGE, (off_t)half);
    printf("pread %s\n", got < 0                                           ? strerrorname_np(errno)
                         : got == PAGE && !memcmp(buf, local + half, PAGE) ? "same"
                                                                           : "else");
    int sig = sigsetjmp(out, 1);
    if (!sig)
        same(p + half + PAGE, half + PAGE, PAGE);
    printf("load %s\n", sig ? sigabbrev_np(sig) : "same");
    same(p, 0, PAGE);
    MUST(pread(fd, buf, PAGE, 0) == PAGE && !memcmp(buf, local, PAGE));
}

static const struct {
    const char *name;
    void (*run)(void);
} whole[] = {{"mapped", do_mapped},
             {"reads", do_reads},
             {"threads", do_threads},
             {"orphan", do_orphan},
             {"failing", do_failing}};

int main(int argc, char **argv)
{
    const char *what = argc > 2 ? argv[1] : "";
    if (!strcmp(what, "stdio"))
        do_stdio(argv[2]);
    else if (!strcmp(what, "stdin"))
        do_stdin(argv[2]);
    else if (!strcmp(what, "refused"))
        do_refused(argv[2]);
    else if (!strcmp(what, "maps") && argc == 4)
        do_maps(argv[2], argv[3]);
    else if (!strcmp(what, "fork") && argc == 4)
        do_fork(argv[2], argv[3]);
    for (size_t i = 0; argc == 4 && i < sizeof whole / sizeof *whole; i++)
        if (!strcmp(what, whole[i].name)) {
            load(argv[2], argv[3]);
            whole[i].run();
            printf("done\n");
        }
    return 0;
}
