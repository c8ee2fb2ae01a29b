/* The connection to the local agent.
 *
 *   NEVER --first need--> UP --hang-up, send error--> LOST --next need, after a pause--> UP
 *     \--no agent, refused--> OFF (for good: the program runs on untracked)
 *
 * In a forked child the state is NEVER again, with regions in the table: whatever stands there is announced on
 * connecting. Each connection has its own struct shared; those of lost ones stay mapped for threads that still look at
 * them. All functions but client_notices need the lock. */
#include "shim/shim.h"

#include <poll.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>

#define CONNECT_MS 5000u
#define RETRY_MS 1000u
#define ATTACH_TRIES 5

enum client_state { CLIENT_NEVER, CLIENT_UP, CLIENT_LOST, CLIENT_OFF };

int client_fd = -1;
uint32_t client_generation;
uint8_t client_buffer[CONTROL_MAX];
static enum client_state state;
static uint64_t retry_at, socket_ino;
static struct shared *shared;
static uint32_t notices_seen;

struct shared *client_shared(void)
{
    return __atomic_load_n(&shared, __ATOMIC_ACQUIRE);
}

bool client_connected(void)
{
    return __atomic_load_n(&state, __ATOMIC_RELAXED) == CLIENT_UP;
}

/* A program may close numbers by raw calls and reuse them: ours is ours only while it is the same socket. */
static bool still_ours(void)
{
    struct stat st;
    return client_fd >= 0 && !raw_fstat(client_fd, &st) && S_ISSOCK(st.st_mode) && st.st_ino == socket_ino;
}

static void lost(void)
{
    if (still_ours()) {
        syscall(SYS_shutdown, client_fd, SHUT_RDWR); /* whoever polls it must see */
        raw_close(client_fd);
    }
    client_fd = -1;
    if (state == CLIENT_UP) {
        state = CLIENT_LOST;
        __atomic_add_fetch(&client_generation, 1, __ATOMIC_SEQ_CST);
    }
}

void client_lost(uint32_t generation)
{
    if (generation == client_generation)
        lost();
}

static int wait_ready(short events, uint64_t until)
{
    for (;;) {
        uint64_t now = raw_now_ms();
        if (now >= until)
            return -ETIMEDOUT;
        struct pollfd p = {.fd = client_fd, .events = events};
        uint64_t ms = until - now < 100000 ? until - now : 100000;
        struct timespec t = {.tv_sec = (time_t)(ms / 1000), .tv_nsec = (long)(ms % 1000) * 1000000};
        if (syscall(SYS_ppoll, &p, 1, &t, NULL, 8) > 0)
            return 0;
    }
}

static int send_message(const void *message, size_t len, const int *fds, unsigned nfds, uint64_t until)
{
    union {
        struct cmsghdr head;
        char space[CMSG_SPACE(CONTROL_FDS * sizeof(int))];
    } control = {0};
    struct iovec iov = {.iov_base = (void *)message, .iov_len = len};
    struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1};
    if (nfds) {
        m.msg_control = &control;
        m.msg_controllen = CMSG_SPACE(nfds * sizeof(int));
        struct cmsghdr *c = CMSG_FIRSTHDR(&m);
        c->cmsg_level = SOL_SOCKET;
        c->cmsg_type = SCM_RIGHTS;
        c->cmsg_len = CMSG_LEN(nfds * sizeof(int));
        memcpy(CMSG_DATA(c), fds, nfds * sizeof(int));
    }
    while (syscall(SYS_sendmsg, client_fd, &m, MSG_NOSIGNAL | MSG_DONTWAIT) < 0) {
        if (errno == EINTR)
            continue;
        /* Too many descriptors in flight is a matter of waiting, like a full socket. */
        if (errno != EAGAIN && errno != ETOOMANYREFS)
            return -errno;
        if (errno == ETOOMANYREFS)
            raw_sleep_ms(1);
        int rc = wait_ready(POLLOUT, until);
        if (rc)
            return rc;
    }
    return 0;
}

int client_send(const void *message, size_t len, const int *fds, unsigned nfds)
{
    if (state != CLIENT_UP || !len)
        return -ENOTCONN;
    uint64_t patience = shim.timeout_ms < 1000000000 ? shim.timeout_ms + 2000 : 1000000000;
    int rc = still_ours() ? send_message(message, len, fds, nfds, raw_now_ms() + patience) : -EPIPE;
    if (rc)
        lost();
    return rc;
}

/* fds has room for CONTROL_FDS; NULL: a descriptor sent to us is dropped by the kernel. */
static long receive(void *to, size_t cap, int *fds, unsigned *nfds)
{
    union {
        struct cmsghdr head;
        char space[CMSG_SPACE(CONTROL_FDS * sizeof(int))];
    } control;
    struct iovec iov = {.iov_base = to, .iov_len = cap};
    struct msghdr m = {.msg_iov = &iov, .msg_iovlen = 1};
    if (fds) {
        m.msg_control = &control;
        m.msg_controllen = sizeof control;
    }
    long n;
    do
        n = syscall(SYS_recvmsg, client_fd, &m, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
    while (n < 0 && errno == EINTR);
    if (n < 0 || !fds)
        return n;
    *nfds = 0;
    for (struct cmsghdr *c = CMSG_FIRSTHDR(&m); c; c = CMSG_NXTHDR(&m, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS)
            continue;
        unsigned got = (unsigned)((c->cmsg_len - CMSG_LEN(0)) / sizeof(int));
        memcpy(fds + *nfds, CMSG_DATA(c), got * sizeof(int));
        *nfds += got;
    }
    return n;
}

static int connect_once(const struct sockaddr_un *to)
{
    int fd = (int)syscall(SYS_socket, AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    if (fd < 0)
        return -errno;
    fd = own_keep(fd);
    struct timeval patience = {.tv_sec = CONNECT_MS / 1000};
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &patience, sizeof patience);
    if (syscall(SYS_connect, fd, to, sizeof *to) < 0) {
        int e = errno;
        raw_close(fd);
        return -e;
    }
    struct ucred peer;
    socklen_t len = sizeof peer;
    if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &len) || (peer.uid != geteuid() && peer.uid != 0)) {
        raw_close(fd);
        return -EACCES;
    }
    struct stat st;
    if (raw_fstat(fd, &st)) {
        raw_close(fd);
        return -EIO;
    }
    socket_ino = st.st_ino;
    client_fd = fd;
    return 0;
}

static int connect_or_start(void)
{
    struct sockaddr_un to = {.sun_family = AF_UNIX};
    strcpy(to.sun_path, shim.socket);
    int rc = connect_once(&to);
    if (rc != -ENOENT && rc != -ECONNREFUSED)
        return rc;
    rc = start_agent(shim.socket);
    if (rc)
        return rc;
    for (uint64_t until = raw_now_ms() + CONNECT_MS; raw_now_ms() < until; raw_sleep_ms(2)) {
        rc = connect_once(&to);
        if (rc != -ENOENT && rc != -ECONNREFUSED && rc != -EAGAIN)
            return rc;
    }
    return rc;
}

static int hello_send(int shared_fd, int pagemap)
{
    static struct control_hello hello;
    hello = (struct control_hello){.version = CONTROL_VERSION,
                                   .pid = (uint32_t)shim_pid,
                                   .fds = pagemap >= 0 ? CONTROL_FD_PAGEMAP : 0,
                                   .loss = shim.loss,
                                   .timeout_ms = shim.timeout_ms};
    strcpy(hello.program, shim.program);
    strcpy(hello.remote, shim.remote);
    size_t n = control_hello_put(client_buffer, sizeof client_buffer, &hello);
    int fds[2] = {shared_fd, pagemap};
    return send_message(client_buffer, n, fds, pagemap >= 0 ? 2 : 1, raw_now_ms() + CONNECT_MS);
}

/* 0, or a negative errno; -EKEYREJECTED after all was said in the agent's own words. */
static int hello_answer(void)
{
    int rc = wait_ready(POLLIN, raw_now_ms() + CONNECT_MS);
    if (rc)
        return rc;
    long n = receive(client_buffer, sizeof client_buffer, NULL, NULL);
    if (n <= 0)
        return n ? -errno : -EPIPE;
    static struct control_text text;
    static struct control_welcome welcome;
    switch (control_type_of(client_buffer, (size_t)n)) {
    case CONTROL_WELCOME:
        if (control_welcome_get(client_buffer, (size_t)n, &welcome))
            return -EPROTO;
        return welcome.version == CONTROL_VERSION ? 0 : -EPROTO;
    case CONTROL_REFUSED:
        if (control_text_get(client_buffer, (size_t)n, &text))
            return -EPROTO;
        say(SAY_ERROR, "%s", text.text);
        return -EKEYREJECTED;
    default:
        return -EPROTO;
    }
}

static int greet(void)
{
    int fd = (int)syscall(SYS_memfd_create, "memsync-shared", MFD_CLOEXEC);
    if (fd < 0)
        return -errno;
    int rc = 0, pagemap = -1;
    struct shared *s = MAP_FAILED;
    if (syscall(SYS_ftruncate, fd, sizeof *s) ||
        (s = raw_mmap(NULL, sizeof *s, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0)) == MAP_FAILED)
        rc = -errno;
    if (!rc) {
        s->version = SHARED_VERSION;
        pagemap = raw_openat(AT_FDCWD, "/proc/self/pagemap", O_RDONLY | O_CLOEXEC, 0);
        rc = hello_send(fd, pagemap);
    }
    if (!rc)
        rc = hello_answer();
    if (pagemap >= 0)
        raw_close(pagemap);
    raw_close(fd);
    if (!rc) {
        notices_seen = 0;
        __atomic_store_n(&shared, s, __ATOMIC_RELEASE);
    } else if (s != MAP_FAILED) {
        raw_munmap(s, sizeof *s);
    }
    return rc;
}

bool client_used(void)
{
    return state == CLIENT_UP || state == CLIENT_LOST;
}

static void announce(bool taken_over)
{
    if (arm_kept >= 0)
        client_uffd(arm_kept);
    view_announce();
    for (uint32_t n = 1; n <= SHIM_REGIONS && state == CLIENT_UP; n++) {
        struct region *r = files_region(n);
        if (!r)
            break;
        if (!r->used)
            continue;
        if (taken_over)
            r->fresh = false;
        client_region(n, files_descriptor(n));
        if (r->marks)
            client_marks(n);
    }
    view_maps_announce();
    maps_announce_all(taken_over);
}

static bool attach(void)
{
    int rc;
    for (int tries = 0; tries < ATTACH_TRIES; tries++) { /* an agent that is just leaving hangs up on us */
        rc = connect_or_start();
        if (!rc && (rc = greet())) {
            raw_close(client_fd);
            client_fd = -1;
        }
        if (rc != -EPIPE && rc != -ECONNRESET)
            break;
    }
    if (!rc) {
        bool taken_over = state == CLIENT_LOST;
        if (taken_over)
            say(SAY_INFO, "found an agent again at %s", shim.socket);
        state = CLIENT_UP;
        __atomic_add_fetch(&client_generation, 1, __ATOMIC_SEQ_CST);
        announce(taken_over);
        return state == CLIENT_UP;
    }
    if (state == CLIENT_LOST) {
        say_once(SAY_WARN, "the agent at %s is gone and no other can be reached: %e", shim.socket, rc);
        retry_at = raw_now_ms() + RETRY_MS;
        return false;
    }
    if (rc != -EKEYREJECTED)
        say(SAY_ERROR, "no agent at %s: %e; nothing of %s is tracked", shim.socket, rc, shim.program);
    state = CLIENT_OFF;
    return false;
}

bool client_up(void)
{
    if (state == CLIENT_UP && !still_ours())
        lost();
    if (state == CLIENT_UP)
        return true;
    if (state == CLIENT_OFF || (state == CLIENT_LOST && raw_now_ms() < retry_at))
        return false;
    return attach();
}

void client_forget(void)
{
    if (still_ours())
        raw_close(client_fd);
    client_fd = -1;
    state = state == CLIENT_OFF ? CLIENT_OFF : CLIENT_NEVER;
    retry_at = 0;
    shared = NULL;
    client_generation++;
}

void client_region(uint32_t number, int fd)
{
    static struct control_region m;
    const struct region *r = files_region(number);
    m.region = number;
    m.fresh = r->fresh;
    m.hashed = r->hashed;
    m.dev = r->dev;
    m.source = r->source;
    m.terms = r->terms;
    strcpy(m.path, r->path);
    strcpy(m.name, r->name);
    size_t n = control_region_put(client_buffer, sizeof client_buffer, &m);
    client_send(client_buffer, n, &fd, fd >= 0);
}

/* New shared memory for the region's marks; what the old one holds moves over. A thread that marks at this moment looks
 * at r->marks again after it marked (files_mark), so that nothing stays behind in the old one, which is left mapped for
 * it. */
void client_marks(uint32_t number)
{
    struct region *r = files_region(number);
    int fd = (int)syscall(SYS_memfd_create, "memsync-marks", MFD_CLOEXEC);
    if (fd < 0)
        return;
    struct marks *m = MAP_FAILED;
    if (!syscall(SYS_ftruncate, fd, sizeof *m))
        m = raw_mmap(NULL, sizeof *m, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (m != MAP_FAILED) {
        m->min_size = UINT64_MAX;
        struct marks *old = r->marks;
        __atomic_store_n(&r->marks, m, __ATOMIC_SEQ_CST);
        if (old) {
            marks_min_size(m, __atomic_load_n(&old->min_size, __ATOMIC_SEQ_CST));
            if (__atomic_load_n(&old->beyond, __ATOMIC_SEQ_CST))
                __atomic_store_n(&m->beyond, 1u, __ATOMIC_SEQ_CST);
            if (__atomic_load_n(&old->all, __ATOMIC_SEQ_CST))
                __atomic_store_n(&m->all, 1u, __ATOMIC_SEQ_CST);
            for (uint64_t s = 0; s < MARKS_SUMMARY; s++)
                for (uint64_t bits = old->summary[s]; bits; bits &= bits - 1) {
                    uint64_t w = s * 64 + (uint64_t)__builtin_ctzll(bits);
                    __atomic_fetch_or(&m->pages[w], old->pages[w], __ATOMIC_SEQ_CST);
                    __atomic_fetch_or(&m->summary[s], 1ULL << (w % 64), __ATOMIC_SEQ_CST);
                }
        }
        struct control_marks message = {.region = number};
        client_send(client_buffer, control_marks_put(client_buffer, sizeof client_buffer, &message), &fd, 1);
    }
    raw_close(fd);
}

void client_release(uint32_t number)
{
    struct control_release m = {.region = number};
    client_send(client_buffer, control_release_put(client_buffer, sizeof client_buffer, &m), NULL, 0);
}

/* Once a connection: what the agent needs for soft-dirty bits. Without it the agent says that it compares by hash. */
static void client_soft(void)
{
    static uint32_t sent;
    if (sent == client_generation)
        return;
    int fds[2] = {raw_openat(AT_FDCWD, "/proc/self/clear_refs", O_WRONLY | O_CLOEXEC, 0),
                  raw_openat(AT_FDCWD, "/proc/self/stat", O_RDONLY | O_CLOEXEC, 0)};
    if (fds[0] >= 0 && fds[1] >= 0 &&
        !client_send(client_buffer, control_empty_put(client_buffer, sizeof client_buffer, CONTROL_SOFTDIRTY), fds, 2))
        sent = client_generation;
    for (int i = 0; i < 2; i++)
        if (fds[i] >= 0)
            raw_close(fds[i]);
}

void client_map(const struct range *r, bool dirty)
{
    bool events = files_region(r->region)->strategy == RULE_INOTIFY;
    struct control_map m = {.region = r->region,
                            .tracker = r->state == RANGE_UFFD   ? CONTROL_TRACK_UFFD
                                       : r->state == RANGE_SOFT ? CONTROL_TRACK_SOFTDIRTY
                                       : events               ? CONTROL_TRACK_INOTIFY
                                                              : CONTROL_TRACK_HASH,
                            .dirty = dirty,
                            .addr = r->start,
                            .len = r->end - r->start,
                            .offset = r->offset};
    if (r->state == RANGE_SOFT)
        client_soft();
    client_send(client_buffer, control_map_put(client_buffer, sizeof client_buffer, &m), NULL, 0);
}

void client_uffd(int fd)
{
    client_send(client_buffer, control_empty_put(client_buffer, sizeof client_buffer, CONTROL_UFFD), &fd, 1);
}

bool client_hung_up(void)
{
    struct pollfd p = {.fd = client_fd, .events = 0};
    struct timespec now = {0};
    return syscall(SYS_ppoll, &p, 1, &now, NULL, 8) > 0 && (p.revents & (POLLHUP | POLLERR | POLLNVAL));
}

void client_notices(void)
{
    struct shared *s = client_shared();
    if (!s || __atomic_load_n(&s->notices, __ATOMIC_ACQUIRE) == __atomic_load_n(&notices_seen, __ATOMIC_RELAXED))
        return;
    struct held h = shim_lock();
    client_read();
    shim_unlock(&h);
}

void client_read(void)
{
    static struct control_text text;
    while (state == CLIENT_UP && still_ours()) {
        int fds[CONTROL_FDS];
        unsigned nfds = 0;
        long n = receive(client_buffer, sizeof client_buffer, fds, &nfds);
        if (n <= 0)
            break;
        uint8_t type = control_type_of(client_buffer, (size_t)n);
        if (type == CONTROL_VIEW) {
            view_arrived(client_buffer, (size_t)n, fds, nfds);
            continue;
        }
        for (unsigned i = 0; i < nfds; i++)
            raw_close(fds[i]);
        if (type != CONTROL_NOTICE || control_text_get(client_buffer, (size_t)n, &text))
            continue;
        __atomic_add_fetch(&notices_seen, 1, __ATOMIC_RELAXED);
        say(SAY_WARN, "%s", text.text);
    }
}
