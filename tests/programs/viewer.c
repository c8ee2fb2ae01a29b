/* What a preload library does about views (wire/control.md, section 7), driven by lines on stdin, so that the agent's half can be tested alone. It keeps
 * the rules by itself: everything is registered before it is announced, and when the agent dies a second thread finds the next one and hands all over.
 *
 *   viewer SOCKET REMOTE [no-uffd]
 *
 *   open V ORDER NAME [MS [FLAGS]]  look NAME    close V        exact V NAME FROM (RESUME without memfd: what view FROM has)
 *   map M V OFFSET LENGTH shared|private         unmap M OFFSET LENGTH
 *   check M FILE OFFSET forward|backward|random:SEED|threads:N   every page of the mapping against FILE from OFFSET on
 *   fetch V OFFSET LENGTH FILE                    by FETCH and pread
 *   peek M OFFSET      a byte, or SIGBUS          punch V OFFSET LENGTH      advise V ADVICE OFFSET LENGTH    data V (bytes that are data)
 *   has V OFFSET       1 when the byte's page is data
 *   time M             touches every page, one after the other: microseconds
 *   lat M COUNT SEED   touches pages at random, a thread: microseconds at 50, 99 and 100 of a hundred
 *   fork M FILE        a child without a registration must not read zeros (MADV_DONTFORK: SIGSEGV)
 *
 * Each is answered by a line: its result (0, a negative errno), then more. */
#include "wire/control.c"
#include "wire/shared.h"
#include "agent/track/kernel.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096ul
#define MANY 64u

static struct {
    int memfd, shared_fd;
    const struct view *shared;
    struct control_open how;
    struct control_view is;
} views[MANY];
static struct {
    unsigned view;
    uint8_t *at;
    size_t len;
    uint64_t offset;
} maps[MANY];

static const char *socket_path, *remote;
static int sock = -1, uffd = -1;
static struct shared *shared;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint8_t message[CONTROL_MAX];

static void die(const char *what)
{
    fprintf(stderr, "viewer: %s: %m\n", what);
    exit(3);
}

static int send_with(size_t len, const int *fds, size_t n)
{
    union {
        struct cmsghdr head;
        char room[CMSG_SPACE(3 * sizeof(int))];
    } c = {0};
    struct iovec iov = {message, len};
    struct msghdr h = {.msg_iov = &iov, .msg_iovlen = 1};
    if (n) {
        h.msg_control = &c;
        h.msg_controllen = CMSG_SPACE(n * sizeof(int));
        c.head = (struct cmsghdr){
            .cmsg_len = CMSG_LEN(n * sizeof(int)), .cmsg_level = SOL_SOCKET, .cmsg_type = SCM_RIGHTS};
        memcpy(CMSG_DATA(&c.head), fds, n * sizeof(int));
    }
    return sendmsg(sock, &h, MSG_NOSIGNAL) < 0 ? -errno : 0;
}

/* The next message that is no NOTICE; descriptors in fds. Its length. */
static ssize_t receive(int fds[3])
{
    for (;;) {
        union {
            struct cmsghdr head;
            char room[CMSG_SPACE(3 * sizeof(int))];
        } c;
        struct iovec iov = {message, sizeof message};
        struct msghdr h = {.msg_iov = &iov, .msg_iovlen = 1, .msg_control = &c, .msg_controllen = sizeof c};
        ssize_t n = recvmsg(sock, &h, MSG_CMSG_CLOEXEC);
        if (n <= 0)
            return -1;
        fds[0] = fds[1] = -1;
        struct cmsghdr *m = CMSG_FIRSTHDR(&h);
        if (m && m->cmsg_type == SCM_RIGHTS)
            memcpy(fds, CMSG_DATA(m), m->cmsg_len - CMSG_LEN(0));
        if (control_type_of(message, (size_t)n) != CONTROL_NOTICE)
            return n;
        static struct control_text t;
        if (!control_text_get(message, (size_t)n, &t))
            fprintf(stderr, "notice: %s\n", t.text);
    }
}

static uint32_t slot_take(void)
{
    for (uint32_t i = 0;; i = (i + 1) % SHARED_SLOTS) {
        uint32_t none = SHARED_FREE;
        if (__atomic_compare_exchange_n(&shared->slots[i].state, &none, SHARED_WAITING, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
            return i;
    }
}

static int slot_wait(uint32_t i)
{
    struct shared_slot *s = &shared->slots[i];
    uint32_t state;
    while ((state = __atomic_load_n(&s->state, __ATOMIC_SEQ_CST)) != SHARED_DONE)
        syscall(SYS_futex, &s->state, FUTEX_WAIT, state, NULL, NULL, 0);
    int rc = s->result;
    __atomic_store_n(&s->state, (uint32_t)SHARED_FREE, __ATOMIC_SEQ_CST);
    return rc;
}

static bool greet(void)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    snprintf(a.sun_path, sizeof a.sun_path, "%s", socket_path);
    sock = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (connect(sock, (struct sockaddr *)&a, sizeof a)) {
        close(sock);
        sock = -1;
        return false;
    }
    int fd = memfd_create("shared", MFD_CLOEXEC), none[3];
    if (ftruncate(fd, sizeof *shared))
        die("ftruncate");
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    shared->version = SHARED_VERSION;
    struct control_hello h = {.version = CONTROL_VERSION, .pid = (uint32_t)getpid(), .timeout_ms = 10000, .program = "viewer"};
    snprintf(h.remote, sizeof h.remote, "%s", remote);
    bool welcome = !send_with(control_hello_put(message, sizeof message, &h), &fd, 1) && receive(none) >= 0;
    close(fd);
    if (!welcome) { /* it died at once */
        close(sock);
        return false;
    }
    if (control_type_of(message, 8) != CONTROL_WELCOME)
        die("HELLO");
    if (uffd >= 0)
        send_with(control_empty_put(message, sizeof message, CONTROL_UFFD), &uffd, 1);
    return true;
}

static void announce(unsigned m)
{
    struct control_view_map k = {maps[m].view, (uintptr_t)maps[m].at, maps[m].len, maps[m].offset};
    send_with(control_view_map_put(message, sizeof message, &k), NULL, 0);
}

static int take_view(unsigned v, bool look)
{
    int fds[3];
    ssize_t n = receive(fds);
    if (n < 0 || control_view_get(message, (size_t)n, &views[v].is))
        die("VIEW");
    if (look)
        return fds[0] < 0 ? 0 : -EINVAL;
    if (views[v].memfd > 0) { /* resumed: has it */
        close(fds[0]);
        close(fds[1]);
        return 0;
    }
    views[v].memfd = fds[0];
    views[v].shared_fd = fds[1];
    views[v].shared = mmap(NULL, sizeof *views[v].shared, PROT_READ, MAP_SHARED, fds[1], 0);
    return 0;
}

static int resume(unsigned v, bool memfd)
{
    static struct control_resume r;
    r = (struct control_resume){
        .open = views[v].how, .epoch = views[v].is.epoch, .lineage = views[v].is.lineage, .size = views[v].is.size};
    r.open.slot = slot_take();
    r.open.view = v;
    int fds[2] = {views[v].memfd, views[v].shared_fd};
    send_with(control_resume_put(message, sizeof message, &r), fds, memfd ? 2 : 0);
    int rc = slot_wait(r.open.slot);
    return rc ? rc : take_view(v, false);
}

/* The agent's death is nobody's business but this thread's. */
static __attribute__((noreturn)) void *watcher(void *arg)
{
    (void)arg;
    for (;;) {
        struct pollfd p = {.fd = sock, .events = 0};
        poll(&p, 1, -1);
        if (!(p.revents & (POLLHUP | POLLERR)))
            continue;
        pthread_mutex_lock(&lock);
        close(sock);
        for (struct timespec wait = {0, 5000000}; !greet(); nanosleep(&wait, NULL))
            ;
        for (unsigned v = 1; v < MANY; v++)
            if (views[v].memfd > 0 && resume(v, true))
                die("RESUME");
        for (unsigned m = 0; m < MANY; m++)
            if (maps[m].at)
                announce(m);
        fprintf(stderr, "resumed\n");
        pthread_mutex_unlock(&lock);
    }
}

static void open_uffd(void)
{
    uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
    if (uffd < 0)
        uffd = (int)syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK | UFFD_USER_MODE_ONLY);
    struct uffdio_api api = {.api = UFFD_API};
    if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api)) {
        printf("none\n");
        exit(77);
    }
}

static int do_open(unsigned v, const char *order, const char *name, uint64_t ms, unsigned flags, bool look)
{
    static const char *const orders[] = {"fault", "linear", "recorded", "none"};
    static struct control_open o;
    o = (struct control_open){.slot = slot_take(), .view = v, .look = look, .fetch_timeout_ms = ms ? ms : CONTROL_FOREVER};
    o.mode = flags & 1 ? CONTROL_MIRROR : CONTROL_PULL;
    o.follow = flags >> 1 & 1;
    o.resident = flags >> 2 & 1;
    while (o.order < 4 && strcmp(orders[o.order], order))
        o.order++;
    snprintf(o.name, sizeof o.name, "%s", name);
    snprintf(o.path, sizeof o.path, "/%s", name);
    send_with(control_open_put(message, sizeof message, &o), NULL, 0);
    int rc = slot_wait(o.slot);
    if (!rc) {
        rc = take_view(v, look);
        if (!look)
            views[v].how = o;
    }
    return rc;
}

static int do_map(unsigned m, unsigned v, uint64_t offset, size_t len, const char *how)
{
    bool private = !strcmp(how, "private");
    void *at = mmap(NULL, len, PROT_READ | (private ? PROT_WRITE : 0), (private ? MAP_PRIVATE : MAP_SHARED) | MAP_NORESERVE,
                    views[v].memfd, (off_t)offset);
    if (at == MAP_FAILED)
        return -errno;
    len = (len + PAGE - 1) & ~(PAGE - 1);
    struct uffdio_register r = {.range = {(uintptr_t)at, len}, .mode = UFFDIO_REGISTER_MODE_MISSING};
    if ((uffd >= 0 && ioctl(uffd, UFFDIO_REGISTER, &r)) || madvise(at, len, MADV_DONTFORK))
        return -errno;
    maps[m].view = v;
    maps[m].at = at;
    maps[m].len = len;
    maps[m].offset = offset;
    if (uffd >= 0)
        announce(m);
    return 0;
}

/* The first page of the mapping that is not the file's; -1 when none is. */
struct checking {
    const uint8_t *at, *file;
    size_t len;
    uint64_t first, step;
    long wrong;
};

static bool page_right(const struct checking *c, size_t page)
{
    size_t off = page * PAGE, n = c->len - off < PAGE ? c->len - off : PAGE;
    return !memcmp(c->at + off, c->file + off, n);
}

static void *check_strip(void *arg)
{
    struct checking *c = arg;
    size_t pages = (c->len + PAGE - 1) / PAGE;
    for (size_t i = c->first; i < pages && c->wrong < 0; i += c->step)
        if (!page_right(c, i))
            c->wrong = (long)i;
    return NULL;
}

static long do_check(unsigned m, const char *file, uint64_t offset, const char *how)
{
    int fd = open(file, O_RDONLY | O_CLOEXEC);
    struct stat st;
    if (fd < 0 || fstat(fd, &st))
        die(file);
    size_t len = (size_t)st.st_size - (size_t)offset < maps[m].len ? (size_t)st.st_size - (size_t)offset : maps[m].len;
    const uint8_t *bytes = mmap(NULL, len, PROT_READ, MAP_SHARED, fd, (off_t)offset);
    close(fd);
    struct checking c = {.at = maps[m].at, .file = bytes, .len = len, .step = 1, .wrong = -1};
    size_t pages = (len + PAGE - 1) / PAGE;
    if (!strncmp(how, "threads:", 8)) {
        unsigned n = (unsigned)atoi(how + 8);
        pthread_t t[MANY];
        struct checking each[MANY];
        for (unsigned i = 0; i < n; i++) {
            each[i] = c;
            each[i].first = i;
            each[i].step = n;
            pthread_create(&t[i], NULL, check_strip, &each[i]);
        }
        for (unsigned i = 0; i < n; i++) {
            pthread_join(t[i], NULL);
            c.wrong = each[i].wrong >= 0 ? each[i].wrong : c.wrong;
        }
    } else if (!strcmp(how, "backward")) {
        for (size_t i = pages; i-- && c.wrong < 0;)
            c.wrong = page_right(&c, i) ? -1 : (long)i;
    } else if (!strncmp(how, "random:", 7)) {
        uint64_t x = strtoull(how + 7, NULL, 0) * 2 + 1;
        for (size_t i = 0; i < pages && c.wrong < 0; i++) {
            x = x * 6364136223846793005u + 1442695040888963407u;
            size_t page = (size_t)((x >> 33) % pages);
            c.wrong = page_right(&c, page) ? -1 : (long)page;
        }
    } else {
        check_strip(&c);
    }
    munmap((void *)bytes, len);
    return c.wrong;
}

static int do_fetch(unsigned v, uint64_t offset, uint64_t len, const char *file)
{
    struct control_fetch f = {slot_take(), v, offset, len};
    send_with(control_fetch_put(message, sizeof message, &f), NULL, 0);
    int rc = slot_wait(f.slot), fd = open(file, O_RDONLY | O_CLOEXEC);
    uint8_t a[65536], b[65536];
    while (!rc && len) {
        size_t n = len < sizeof a ? len : sizeof a;
        ssize_t got = pread(views[v].memfd, a, n, (off_t)offset), has = pread(fd, b, n, (off_t)offset);
        if (got != has || memcmp(a, b, (size_t)(got < 0 ? 0 : got)))
            rc = -EILSEQ;
        if (got <= 0)
            break;
        offset += (uint64_t)got;
        len -= (uint64_t)got;
    }
    close(fd);
    return rc;
}

static sigjmp_buf out;
static void on_bus(int sig)
{
    (void)sig;
    siglongjmp(out, 1);
}

static int do_peek(unsigned m, uint64_t offset)
{
    signal(SIGBUS, on_bus);
    if (sigsetjmp(out, 1))
        return -EFAULT;
    return *(volatile uint8_t *)(maps[m].at + offset);
}

static int do_fork(unsigned m)
{
    pid_t pid = fork();
    if (!pid) {
        signal(SIGSEGV, SIG_DFL);
        _exit(*(volatile uint8_t *)maps[m].at ? 1 : 0);
    }
    int status;
    waitpid(pid, &status, 0);
    return WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV ? 0 : -EINVAL;
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t do_time(unsigned m)
{
    uint64_t start = now_ns();
    for (size_t at = 0; at < maps[m].len; at += PAGE)
        (void)*(volatile uint8_t *)(maps[m].at + at);
    return (now_ns() - start) / 1000;
}

static int by_size(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

static void do_lat(unsigned m, size_t count, uint64_t seed)
{
    uint64_t *took = calloc(count, sizeof *took), x = seed * 2 + 1, pages = maps[m].len / PAGE;
    for (size_t i = 0; i < count; i++) {
        x = x * 6364136223846793005u + 1442695040888963407u;
        uint64_t start = now_ns();
        (void)*(volatile uint8_t *)(maps[m].at + (x >> 33) % pages * PAGE);
        took[i] = now_ns() - start;
    }
    qsort(took, count, sizeof *took, by_size);
    printf("0 %.1f %.1f %.1f\n", (double)took[count / 2] / 1000, (double)took[count * 99 / 100] / 1000,
           (double)took[count - 1] / 1000);
    free(took);
}

static uint64_t data_of(unsigned v)
{
    uint64_t sum = 0;
    for (off_t at = 0, hole; (at = lseek(views[v].memfd, at, SEEK_DATA)) >= 0; at = hole) {
        hole = lseek(views[v].memfd, at, SEEK_HOLE);
        sum += (uint64_t)(hole - at);
    }
    return sum;
}

static void command(char *line)
{
    char what[32], name[4096], how[64] = "";
    unsigned a = 0, b = 0;
    unsigned long long x = 0, y = 0;
    unsigned flags = 0;
    if (sscanf(line, "open %u %31s %4095s %llu %u", &a, how, name, &x, &flags) >= 3) {
        int rc = do_open(a, how, name, x, flags, false);
        printf("%d %llu %llu\n", rc, (unsigned long long)views[a].is.size, (unsigned long long)views[a].is.epoch);
    } else if (sscanf(line, "look %4095s", name) == 1) {
        int rc = do_open(MANY - 1, "fault", name, 0, 0, true);
        printf("%d %llu\n", rc, (unsigned long long)views[MANY - 1].is.size);
    } else if (sscanf(line, "exact %u %u", &a, &b) == 2) {
        views[a].how = views[b].how;
        views[a].is = views[b].is;
        printf("%d\n", resume(a, false));
    } else if (sscanf(line, "close %u", &a) == 1) {
        struct control_close c = {a};
        send_with(control_close_put(message, sizeof message, &c), NULL, 0);
        close(views[a].memfd);
        close(views[a].shared_fd);
        views[a].memfd = 0;
        printf("0\n");
    } else if (sscanf(line, "map %u %u %llu %llu %31s", &a, &b, &x, &y, how) == 5) {
        printf("%d\n", do_map(a, b, x, (size_t)y, how));
    } else if (sscanf(line, "unmap %u %llu %llu", &a, &x, &y) == 3) {
        struct control_view_unmap u = {(uintptr_t)maps[a].at + x, y};
        munmap(maps[a].at + x, (size_t)y);
        send_with(control_view_unmap_put(message, sizeof message, &u), NULL, 0);
        maps[a].len = (size_t)x; /* the tests cut tails */
        printf("0\n");
    } else if (sscanf(line, "check %u %4095s %llu %31s", &a, name, &x, how) == 4) {
        pthread_mutex_unlock(&lock);
        long wrong = do_check(a, name, x, how);
        pthread_mutex_lock(&lock);
        printf("%d %ld\n", wrong < 0 ? 0 : -EILSEQ, wrong);
    } else if (sscanf(line, "fetch %u %llu %llu %4095s", &a, &x, &y, name) == 4) {
        printf("%d\n", do_fetch(a, x, y, name));
    } else if (sscanf(line, "peek %u %llu", &a, &x) == 2) {
        pthread_mutex_unlock(&lock);
        int byte = do_peek(a, x);
        pthread_mutex_lock(&lock);
        printf("%d\n", byte);
    } else if (sscanf(line, "punch %u %llu %llu", &a, &x, &y) == 3) {
        printf("%d\n", fallocate(views[a].memfd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)x, (off_t)y));
    } else if (sscanf(line, "advise %u %u %llu %llu", &a, &b, &x, &y) == 4) {
        struct control_advise v = {a, (uint8_t)b, x, y};
        send_with(control_advise_put(message, sizeof message, &v), NULL, 0);
        printf("0\n");
    } else if (sscanf(line, "has %u %llu", &a, &x) == 2) {
        printf("%d\n", lseek(views[a].memfd, (off_t)x, SEEK_DATA) == (off_t)x);
    } else if (sscanf(line, "time %u", &a) == 1) {
        printf("0 %llu\n", (unsigned long long)do_time(a));
    } else if (sscanf(line, "lat %u %llu %llu", &a, &x, &y) == 3) {
        do_lat(a, (size_t)x, y);
    } else if (sscanf(line, "fork %u", &a) == 1) {
        printf("%d\n", do_fork(a));
    } else if (sscanf(line, "data %u", &a) == 1) {
        printf("0 %llu %d\n", (unsigned long long)data_of(a), views[a].shared->failed);
    } else {
        sscanf(line, "%31s", what);
        fprintf(stderr, "viewer: what is %s?\n", what);
        exit(2);
    }
}

int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    socket_path = argv[1];
    remote = argv[2];
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc == 3)
        open_uffd();
    for (int i = 0; !greet() && i < 1000; i++) {
        struct timespec wait = {0, 10000000};
        nanosleep(&wait, NULL);
    }
    printf("ready %d\n", (int)getpid());
    pthread_t t;
    pthread_create(&t, NULL, watcher, NULL);
    char line[8192];
    while (fgets(line, sizeof line, stdin)) {
        pthread_mutex_lock(&lock);
        command(line);
        pthread_mutex_unlock(&lock);
    }
    return 0;
}
