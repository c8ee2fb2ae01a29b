/* What a program can do with a pulled file that no tool does.
 *
 *   pulled stdio FILE       prints what stdio says of it
 *   pulled stdin FILE       the same of the standard input, which the file is opened as
 *   pulled refused FILE     everything that must be refused is, as for a file on a read-only file system
 *   pulled maps FILE LOCAL  mappings in all forms, compared with the local file
 *   pulled fork FILE LOCAL  children, by fork, with pages nobody has touched
 *   pulled paths FILE       what is asked of a path and not of its contents
 *   pulled waits FILE       poll, select and epoll, with a pipe beside it
 *   pulled buffers FILE     pages nobody has touched as buffers of stdio, sockets and mlock
 *   pulled locked FILE LOCAL
 *                           mappings of a process that locks all its memory
 *   pulled without COMMAND...
 *                           a command that is refused userfaultfd
 *   pulled mapped|reads|threads|orphan FILE LOCAL
 *                           reads all, page by page in no order, through a mapping, by calls, through two mappings by
 *                           four threads, in a child whose parent has gone; says how far it is, in percent
 *   pulled failing FILE LOCAL
 *                           reads the second half when a line comes; says what it got: same, SIGBUS, an errno
 */
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <sys/xattr.h>
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
    MUST(freopen(path, "r", stdin) == stdin && fileno(stdin) == 0);
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
    MUST(freopen("/dev/null", "r", stdin) == stdin && fileno(stdin) == 0 && getchar() == EOF);
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

/* ---- what is asked beside the contents */

static void do_paths(const char *path)
{
    char buf[5000], link[32], none[5000];
    char *full = realpath(path, NULL);
    MUST(full && realpath(path, buf) == buf && !strcmp(buf, full));
    printf("%s\n", full);
    free(full);
    full = canonicalize_file_name(path);
    MUST(full && !strcmp(full, buf));
    free(full);
    REFUSED(readlink(path, buf, sizeof buf), EINVAL);
    REFUSED(readlinkat(AT_FDCWD, path, buf, sizeof buf), EINVAL);
    snprintf(none, sizeof none, "%s.none", path);
    REFUSED(readlink(none, buf, sizeof buf), ENOENT);
    MUST(!realpath(none, NULL) && errno == ENOENT);
    int fd = open(path, O_RDONLY);
    MUST(fd >= 0);
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, buf, sizeof buf);
    MUST(n > 0);
    printf("%.*s\n", (int)n, buf);
    MUST(readlink(link, buf, 5) == 5);
    printf("%.5s\n", buf);
    MUST(realpath(link, buf));
    printf("%s\n", buf);
    MUST(getxattr(path, "user.none", buf, 10) < 0 && (errno == ENODATA || errno == ENOTSUP));
    MUST(lgetxattr(path, "user.none", buf, 10) < 0 && (errno == ENODATA || errno == ENOTSUP));
    MUST(fgetxattr(fd, "user.none", buf, 10) < 0 && (errno == ENODATA || errno == ENOTSUP));
    MUST(!listxattr(path, buf, sizeof buf) && !llistxattr(path, buf, sizeof buf) && !flistxattr(fd, buf, sizeof buf));
}

static void polled(const struct pollfd *p, int n, int rc)
{
    printf("%d:", rc);
    for (int i = 0; i < n; i++)
        printf(" %x", (unsigned)p[i].revents);
    printf("\n");
}

static void do_polls(int fd, int empty, int full)
{
    struct timespec t = {.tv_nsec = 1000000};
    struct pollfd p[] = {{fd, POLLIN | POLLPRI, 0}, {empty, POLLIN, 0}, {full, POLLIN, 0}, {-1, POLLIN, 9}, {fd, 0, 9}};
    polled(p, 5, poll(p, 5, -1));
    polled(p, 2, poll(p, 2, -1));
    polled(p, 2, ppoll(p, 2, NULL, NULL));
    p[0].events = POLLPRI;
    polled(p, 2, poll(p, 2, 1));
    polled(p, 2, ppoll(p, 2, &t, NULL));
    polled(p, 3, poll(p, 3, -1));
    struct pollfd many[200];
    for (int i = 0; i < 200; i++)
        many[i] = (struct pollfd){i % 2 ? fd : empty, POLLIN | POLLOUT, 0};
    polled(many, 200, poll(many, 200, -1));
}

static void do_selects(int fd, int empty, int full)
{
    fd_set in, out, except;
    for (int with = 0; with < 8; with++) {
        FD_ZERO(&in);
        FD_ZERO(&out);
        FD_ZERO(&except);
        FD_SET(empty, &in);
        if (with & 1)
            FD_SET(full, &in);
        if (with & 2) {
            FD_SET(fd, &in);
            FD_SET(fd, &out);
        }
        if (with & 4)
            FD_SET(fd, &except);
        struct timeval t = {.tv_usec = 1000};
        struct timespec s = {.tv_nsec = 1000000};
        int most = (fd > full ? fd : full) + 1;
        int rc = with % 2 ? select(most, &in, &out, &except, &t) : pselect(most, &in, &out, &except, &s, NULL);
        printf("%d: %d %d %d %d %d\n", rc, !!FD_ISSET(empty, &in), !!FD_ISSET(full, &in), !!FD_ISSET(fd, &in),
               !!FD_ISSET(fd, &out), !!FD_ISSET(fd, &except));
    }
}

static void do_waits(const char *path)
{
    int fd = open(path, O_RDONLY), empty[2], full[2];
    MUST(fd >= 0 && !pipe(empty) && !pipe(full) && write(full[1], "x", 1) == 1);
    do_polls(fd, empty[0], full[0]);
    do_selects(fd, empty[0], full[0]);
    int e = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN};
    MUST(e >= 0 && !epoll_ctl(e, EPOLL_CTL_ADD, full[0], &event));
    REFUSED(epoll_ctl(e, EPOLL_CTL_ADD, fd, &event), EPERM);
}

static void do_buffers(const char *path)
{
    struct stat st;
    int fd = open(path, O_RDONLY), pair[2];
    MUST(fd >= 0 && !fstat(fd, &st) && !socketpair(AF_UNIX, SOCK_STREAM, 0, pair));
    size_t size = (size_t)st.st_size, far = size / 2 / PAGE * PAGE, n = 10 * PAGE;
    unsigned char *p = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0), *in = p + size / 4 / PAGE * PAGE;
    MUST(p != MAP_FAILED);
    FILE *f = tmpfile();
    MUST(f && fwrite(p + far, 1, n, f) == n && (fwrite_unlocked)(p + far + n, 1, n, f) == n && !fflush(f));
    rewind(f);
    MUST(fread(in, 1, n, f) == n && (fread_unlocked)(in + n, 1, n, f) == n);
    MUST(!memcmp(in, p + far, 2 * n));
    in += 20 * n;
    MUST(send(pair[0], p + far + 4 * n, PAGE, 0) == PAGE && recv(pair[1], in, PAGE, 0) == PAGE);
    MUST(!memcmp(in, p + far + 4 * n, PAGE));
    struct iovec from = {p + far + 5 * n, PAGE}, to = {in + n, PAGE};
    struct msghdr out = {.msg_iov = &from, .msg_iovlen = 1}, back = {.msg_iov = &to, .msg_iovlen = 1};
    MUST(sendmsg(pair[0], &out, 0) == PAGE && recvmsg(pair[1], &back, 0) == PAGE);
    MUST(!memcmp(in + n, p + far + 5 * n, PAGE));
    MUST(sendto(pair[0], p + far + 6 * n, PAGE, 0, NULL, 0) == PAGE);
    MUST(recvfrom(pair[1], in + 2 * n, PAGE, 0, NULL, NULL) == PAGE);
    MUST(!memcmp(in + 2 * n, p + far + 6 * n, PAGE));
    MUST(!mlock(p + far + 7 * n, PAGE) && !mlock2(p + far + 8 * n, PAGE, 0));
    printf("%lx\n", hash(p, size, 1));
}

/* ---- without userfaultfd */

#define USERFAULTFD_NEW 0xaa00u /* the ioctl of /dev/userfaultfd */

static void do_without(char **command)
{
    struct sock_filter rules[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_userfaultfd, 3, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_ioctl, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[1])),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, USERFAULTFD_NEW, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog filter = {sizeof rules / sizeof *rules, rules};
    MUST(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) && !prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter));
    REFUSED(syscall(SYS_userfaultfd, 0), EPERM);
    execvp(command[0], command);
    failed(command[0], __LINE__);
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

/* Memory that is locked as it is mapped: the kernel brings in what it can, and must bring in the region's bytes. */
static void do_locked(const char *path, const char *of)
{
    load(path, of);
    MUST(!mlockall(MCL_FUTURE));
    unsigned char *a = map(NULL, size, PROT_READ, MAP_SHARED, 0);
    unsigned char *b = map(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE, 0);
    unsigned char *c = map(NULL, size, PROT_READ, MAP_SHARED | MAP_LOCKED | MAP_POPULATE, 0);
    same(b, 0, size);
    same(a, 0, size);
    same(c, 0, size);
    MUST(!munlockall() && !mlockall(MCL_CURRENT));
    same(a, 0, size);
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
    void (*run)(const char *path);
} alone[] = {{"stdio", do_stdio}, {"stdin", do_stdin}, {"refused", do_refused},
             {"paths", do_paths}, {"waits", do_waits}, {"buffers", do_buffers}};

static const struct {
    const char *name;
    void (*run)(const char *path, const char *of);
} beside[] = {{"maps", do_maps}, {"fork", do_fork}, {"locked", do_locked}};

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
    if (!strcmp(what, "without"))
        do_without(argv + 2);
    for (size_t i = 0; argc == 3 && i < sizeof alone / sizeof *alone; i++)
        if (!strcmp(what, alone[i].name))
            return alone[i].run(argv[2]), 0;
    for (size_t i = 0; argc == 4 && i < sizeof beside / sizeof *beside; i++)
        if (!strcmp(what, beside[i].name))
            return beside[i].run(argv[2], argv[3]), 0;
    for (size_t i = 0; argc == 4 && i < sizeof whole / sizeof *whole; i++)
        if (!strcmp(what, whole[i].name)) {
            load(argv[2], argv[3]);
            whole[i].run();
            return printf("done\n"), 0;
        }
    fprintf(stderr, "pulled: no such command\n");
    return 2;
}
