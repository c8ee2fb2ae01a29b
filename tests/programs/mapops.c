/* What programs do to their mappings: over, apart, bigger, elsewhere, late, from handlers and libraries. */
#include "plain.h"

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>
#include <sys/time.h>
#include <sys/wait.h>

#define PAGES 32u
#define LEN (PAGES * PAGE)

static int data_fd;

static unsigned char *data_map(const char *dir)
{
    char path[4096];
    data_fd = make_file(in_dir(path, dir, "data"), LEN);
    return map_shared(data_fd, LEN, 0);
}

static void store(unsigned char *map, unsigned page, unsigned count, unsigned seed)
{
    fill(map + page * PAGE, count * PAGE, seed);
}

static void sync_all(unsigned char *map)
{
    MUST(msync(map, LEN, MS_SYNC) == 0);
}

/* Anonymous memory over the middle, on stores that were never synced: those count, what is stored there after does not.
 */
static void over(const char *dir)
{
    unsigned char *p = data_map(dir);
    store(p, 0, PAGES, 1);
    void *q = mmap(p + 8 * PAGE, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    MUST(q == p + 8 * PAGE);
    store(p, 4, 12, 2);
    sync_all(p);
    store(p, 11, 2, 3);
}

static void over_file(const char *dir)
{
    char path[4096];
    unsigned char *p = data_map(dir);
    store(p, 0, PAGES, 1);
    int other = make_file(in_dir(path, dir, "other"), LEN);
    void *q = mmap(p + 8 * PAGE, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, other, 2 * PAGE);
    MUST(q == p + 8 * PAGE);
    store(p, 6, 6, 2);
    sync_all(p);
    q = mmap(p + 10 * PAGE, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, data_fd, 20 * PAGE);
    MUST(q == p + 10 * PAGE);
    store(p, 9, 4, 3);
}

static void partial(const char *dir)
{
    unsigned char *p = data_map(dir);
    store(p, 0, PAGES, 1);
    MUST(munmap(p + 4 * PAGE, 4 * PAGE) == 0);
    store(p, 0, 4, 2);
    store(p, 8, 4, 3);
    MUST(munmap(p, 2 * PAGE) == 0);
    MUST(munmap(p + 30 * PAGE, 2 * PAGE) == 0);
    store(p, 2, 2, 4);
    store(p, 20, 10, 5);
    MUST(munmap(p, LEN) == 0); /* holes and all */
}

static void grow(const char *dir)
{
    unsigned char *p = data_map(dir);
    store(p, 0, PAGES, 1);
    MUST(ftruncate(data_fd, 4 * LEN) == 0);
    p = mremap(p, LEN, 4 * LEN, MREMAP_MAYMOVE);
    MUST(p != MAP_FAILED);
    store(p, 4 * PAGES - 5, 5, 2);
    store(p, 3, 1, 3);
    MUST(msync(p, 4 * LEN, MS_SYNC) == 0);
    store(p, PAGES - 1, 2, 4);
}

static void shrink(const char *dir)
{
    unsigned char *p = data_map(dir);
    store(p, 0, PAGES, 1);
    p = mremap(p, LEN, LEN / 2, 0);
    MUST(p != MAP_FAILED);
    store(p, 2, 3, 2);
}

static void move(const char *dir)
{
    unsigned char *p = data_map(dir);
    unsigned char *room = mmap(NULL, 2 * LEN, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    MUST(room != MAP_FAILED);
    store(p, 0, PAGES, 1);
    unsigned char *q = mremap(p, LEN, LEN, MREMAP_MAYMOVE | MREMAP_FIXED, room);
    MUST(q == room);
    store(q, 5, 5, 2);
    sync_all(q);
    /* and a part of it elsewhere */
    unsigned char *r = mremap(q + 8 * PAGE, 8 * PAGE, 8 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, room + LEN);
    MUST(r == room + LEN);
    fill(r + PAGE, 2 * PAGE, 3);
    store(q, 0, 8, 4);
    MUST(msync(r, 8 * PAGE, MS_SYNC) == 0);
    fill(r + 3 * PAGE, 2 * PAGE, 5);
}

/* An old length of 0 makes a second mapping of the same pages. */
static void twice(const char *dir)
{
    unsigned char *p = data_map(dir);
    store(p, 0, PAGES, 1);
    unsigned char *q = mremap(p, 0, LEN, MREMAP_MAYMOVE);
    MUST(q != MAP_FAILED);
    store(q, 4, 4, 2);
    store(p, 10, 4, 3);
    MUST(msync(q, LEN, MS_SYNC) == 0);
    store(q, 20, 1, 4);
    MUST(munmap(p, LEN) == 0);
    store(q, 21, 1, 5);
}

static void keep_old(const char *dir)
{
    unsigned char *p = data_map(dir);
    store(p, 0, PAGES, 1);
    unsigned char *q = mremap(p, LEN, LEN, MREMAP_MAYMOVE | MREMAP_DONTUNMAP);
    if (q == MAP_FAILED) {
        MUST(errno == EINVAL); /* kernels before 5.13 */
        return;
    }
    store(q, 4, 4, 2);
    store(p, 10, 4, 3);
    sync_all(p);
    store(q, 20, 1, 4);
}

static void mremap_failed(const char *dir)
{
    unsigned char *p = data_map(dir);
    store(p, 0, PAGES, 1);
    MUST(mremap(p, LEN, SIZE_MAX / 2, MREMAP_MAYMOVE) == MAP_FAILED);
    store(p, 3, 3, 2);
    MUST(munmap(p + 1, PAGE) == -1 && errno == EINVAL);
    store(p, 6, 3, 3);
    MUST(mmap(p, LEN, PROT_READ, MAP_SHARED | MAP_FIXED, -1, 0) == MAP_FAILED && errno == EBADF);
    store(p, 9, 3, 4);
}

static void made_writable(const char *dir)
{
    char path[4096];
    int fd = make_file(in_dir(path, dir, "data"), LEN);
    unsigned char *p = mmap(NULL, LEN, PROT_READ, MAP_SHARED, fd, 0);
    MUST(p != MAP_FAILED && close(fd) == 0);
    MUST(mprotect(p + 4 * PAGE, 8 * PAGE, PROT_READ | PROT_WRITE) == 0);
    store(p, 4, 8, 1);
    sync_all(p);
    MUST(mprotect(p + 4 * PAGE, 2 * PAGE, PROT_READ) == 0);
    store(p, 6, 2, 2);
    MUST(mprotect(p, LEN, PROT_READ | PROT_WRITE) == 0);
    store(p, 0, 4, 3);
    store(p, 30, 2, 4);
}

static void closed(const char *dir)
{
    unsigned char *p = data_map(dir);
    MUST(close(data_fd) == 0);
    store(p, 0, 4, 1);
    sync_all(p);
    store(p, 8, 4, 2);
}

static void all_closed(const char *dir)
{
    unsigned char *p = data_map(dir);
    store(p, 0, 4, 1);
    closefrom(3);
    store(p, 8, 4, 2);
    sync_all(p);
    MUST(close_range(3, ~0u, 0) == 0);
    for (int fd = 3; fd < 1024; fd++)
        close(fd);
    store(p, 16, 4, 3);
    sync_all(p);
    store(p, 24, 4, 4);
}

/* The file is opened again where our own descriptors might have been. */
static void low_numbers(const char *dir)
{
    char path[4096];
    unsigned char *p = data_map(dir);
    store(p, 0, 4, 1);
    int fd = open(in_dir(path, dir, "other"), O_RDWR | O_CREAT, 0644);
    MUST(fd >= 0);
    for (int to = 3; to < 1024; to++)
        MUST(to == fd || dup2(fd, to) == to);
    write_at(1000, 5000, 0, 2);
    store(p, 8, 4, 3);
    sync_all(p);
    write_at(500, 5000, 9000, 4);
    MUST(fsync(700) == 0);
}

static void fork_exec(const char *dir)
{
    unsigned char *p = data_map(dir);
    int status;
    store(p, 0, 4, 1);
    pid_t child = fork();
    MUST(child >= 0);
    if (!child) {
        store(p, 4, 4, 2);
        execl("/proc/self/exe", "mapops", "part", dir, NULL);
        _exit(1);
    }
    store(p, 12, 4, 3);
    MUST(waitpid(child, &status, 0) == child && status == 0);
    store(p, 20, 4, 4);
    sync_all(p);
}

static void part(const char *dir)
{
    unsigned char *p = data_map(dir);
    store(p, 8, 4, 5);
    sync_all(p);
    store(p, 28, 2, 6);
}

static void vfork_exec(const char *dir)
{
    unsigned char *p = data_map(dir);
    int status;
    for (unsigned i = 0; i < 4; i++) {
        store(p, 4 * i, 4, i);
        pid_t child = vfork();
        MUST(child >= 0);
        if (!child) {
            execl("/bin/true", "true", NULL);
            _exit(1);
        }
        MUST(waitpid(child, &status, 0) == child && status == 0);
        sync_all(p);
    }
}

/* A library that was not there at the start maps the file (made by the test from mapslib.c, named by the environment).
 */
static void library(const char *dir)
{
    char path[4096];
    void *lib = dlopen(getenv("MAPSLIB"), RTLD_NOW | RTLD_LOCAL);
    if (!lib) {
        fprintf(stderr, "%s\n", dlerror());
        exit(1);
    }
    int (*store_by_library)(const char *) = (int (*)(const char *))dlsym(lib, "maps_and_stores");
    MUST(store_by_library && store_by_library(in_dir(path, dir, "data")) == 0);
    MUST(dlclose(lib) == 0);
}

static unsigned char *signalled;
static volatile sig_atomic_t signals;

static void on_signal(int sig)
{
    (void)sig;
    int saved = errno;
    unsigned at = (unsigned)signals % 16;
    signalled[at * PAGE + (unsigned)signals % PAGE]++;
    if (msync(signalled + at * PAGE, PAGE, MS_SYNC) != 0)
        _exit(3);
    signals++;
    errno = saved;
}

/* A handler stores and syncs while the program itself is within msync, munmap and mmap. */
static void handler(const char *dir)
{
    struct sigaction act = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    struct itimerval every = {{0, 4000}, {0, 4000}};
    char path[4096];
    unsigned char *p = signalled = data_map(dir);
    MUST(sigaction(SIGALRM, &act, NULL) == 0 && setitimer(ITIMER_REAL, &every, NULL) == 0);
    int fd = make_file(in_dir(path, dir, "other"), LEN);
    for (unsigned i = 0; signals < 100; i++) {
        store(p, 16 + i % 16, 1, i);
        while (msync(p + 16 * PAGE, 16 * PAGE, MS_SYNC) != 0)
            MUST(errno == EINTR);
        unsigned char *q = map_shared(fd, LEN, 0);
        store(q, i % PAGES, 1, i);
        MUST(munmap(q, LEN) == 0);
    }
    every = (struct itimerval){{0, 0}, {0, 0}};
    MUST(setitimer(ITIMER_REAL, &every, NULL) == 0);
}

/* Two mappings of one file that overlap, at other offsets. */
static void overlap(const char *dir)
{
    unsigned char *p = data_map(dir), *q = map_shared(data_fd, 16 * PAGE, 12 * PAGE);
    store(p, 0, 14, 1);
    fill(q, 4 * PAGE, 2);
    MUST(msync(q, PAGE, MS_SYNC) == 0);
    store(p, 14, 1, 3);
    fill(q + 10 * PAGE, 2 * PAGE, 4);
    sync_all(p);
    fill(q + 2 * PAGE, PAGE, 5);
    MUST(munmap(p, LEN) == 0);
    fill(q + 3 * PAGE, PAGE, 6);
}

/* Stores to private memory are nobody else's business. */
static void private(const char *dir)
{
    unsigned char *p = data_map(dir);
    store(p, 0, 4, 1);
    unsigned char *q = mmap(NULL, LEN, PROT_READ | PROT_WRITE, MAP_PRIVATE, data_fd, 0);
    MUST(q != MAP_FAILED);
    store(q, 0, PAGES, 2);
    sync_all(p);
    store(q, 4, 8, 3);
}

static void dontneed(const char *dir)
{
    unsigned char *p = data_map(dir);
    store(p, 0, 8, 1);
    MUST(madvise(p, LEN, MADV_DONTNEED) == 0);
    store(p, 4, 1, 2);
    MUST(madvise(p, LEN, MADV_PAGEOUT) == 0);
    sync_all(p);
    store(p, 20, 1, 3);
    MUST(madvise(p, LEN, MADV_DONTNEED) == 0);
}

/* MADV_REMOVE punches a hole in the file. */
static void removed(const char *dir)
{
    unsigned char *p = data_map(dir);
    store(p, 0, PAGES, 1);
    sync_all(p);
    MUST(madvise(p + 4 * PAGE, 8 * PAGE, MADV_REMOVE) == 0);
    store(p, 5, 1, 2);
    sync_all(p);
    MUST(madvise(p + 20 * PAGE, PAGE, MADV_REMOVE) == 0);
}

static void not_waiting(const char *dir)
{
    unsigned char *p = data_map(dir);
    for (unsigned i = 0; i < 50; i++) {
        store(p, i % PAGES, 1, i);
        MUST(msync(p, LEN, i % 2 ? MS_ASYNC : 0) == 0);
    }
}

static void *maps_in_thread(void *arg)
{
    unsigned char *p = map_shared(data_fd, LEN, 0);
    store(p, *(unsigned *)arg, 1, *(unsigned *)arg);
    return p;
}

/* Mappings outlive the threads that made them. */
static void threads(const char *dir)
{
    pthread_t t[8];
    unsigned index[8];
    void *map[8];
    data_map(dir);
    for (unsigned i = 0; i < 8; i++) {
        index[i] = i;
        MUST(pthread_create(&t[i], NULL, maps_in_thread, &index[i]) == 0);
    }
    for (unsigned i = 0; i < 8; i++) {
        MUST(pthread_join(t[i], &map[i]) == 0);
        store(map[i], 10 + i, 1, 100 + i);
    }
    sync_all(map[3]);
    for (unsigned i = 0; i < 8; i++)
        store(map[i], 20 + i, 1, 200 + i);
}

/* Longer than the file, not a whole number of pages. */
static void odd_sizes(const char *dir)
{
    char path[4096];
    int fd = make_file(in_dir(path, dir, "data"), 3 * PAGE + 123);
    unsigned char *p = map_shared(fd, 10000, PAGE);
    fill(p, 2 * PAGE + 123, 1);
    MUST(msync(p, 10000, MS_SYNC) == 0);
    p[2 * PAGE + 122] = 42;
    p[2 * PAGE + 200] = 43; /* beyond the end: nobody's */
}

int main(int argc, char **argv)
{
    static const struct plain_case cases[] = {
        {"over", over},
        {"over-file", over_file},
        {"partial", partial},
        {"grow", grow},
        {"shrink", shrink},
        {"move", move},
        {"twice", twice},
        {"keep-old", keep_old},
        {"failed", mremap_failed},
        {"mprotect", made_writable},
        {"closed", closed},
        {"closefrom", all_closed},
        {"low-numbers", low_numbers},
        {"fork-exec", fork_exec},
        {"part", part},
        {"vfork", vfork_exec},
        {"library", library},
        {"handler", handler},
        {"overlap", overlap},
        {"private", private},
        {"dontneed", dontneed},
        {"removed", removed},
        {"async", not_waiting},
        {"threads", threads},
        {"odd-sizes", odd_sizes},
    };
    return run_case(cases, sizeof cases / sizeof *cases, argc, argv);
}
