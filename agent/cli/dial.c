#include "agent/cli/dial.h"
#include "agent/cli/cli.h"
#include "agent/hub/hub.h"
#include "agent/nbd/store.h"
#include "agent/net/addr.h"

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define CONNECT_MS 10000
#define START_MS 30000 /* recovery of a large journal comes before "listening" */

static int failed(struct peer *p, int err, const char *format, ...) __attribute__((format(printf, 3, 4)));

static int failed(struct peer *p, int err, const char *format, ...)
{
    va_list ap;
    va_start(ap, format);
    vsnprintf(p->error, sizeof p->error, format, ap);
    va_end(ap);
    return err;
}

/* connect() with a limit; the socket blocks again afterwards. */
static int connect_within(int fd, const struct sockaddr *to, socklen_t len)
{
    int err = 0;
    socklen_t size = sizeof err;
    struct pollfd q = {.fd = fd, .events = POLLOUT};
    if (fcntl(fd, F_SETFL, O_NONBLOCK) < 0)
        return -errno;
    if (connect(fd, to, len) < 0) {
        if (errno != EINPROGRESS)
            return -errno;
        int n;
        while ((n = poll(&q, 1, CONNECT_MS)) < 0 && errno == EINTR)
            ;
        if (n <= 0)
            return n ? -errno : -ETIMEDOUT;
        if (getsockopt(fd, SOL_SOCKET, SO_ERROR, &err, &size) < 0 || err)
            return err ? -err : -errno;
    }
    struct timeval limit = {.tv_sec = PEER_SILENCE_MS / 1000};
    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
    return fcntl(fd, F_SETFL, 0) < 0 ? -errno : 0;
}

static int tls_failed_text(struct peer *p)
{
    return failed(p, -EACCES, "%s: TLS: %s", p->address, tls_why(p->tls));
}

static int tls_send(struct peer *p)
{
    const uint8_t *bytes;
    for (size_t len; (len = tls_out(p->tls, &bytes));) {
        ssize_t n = send(p->fd, bytes, len, MSG_NOSIGNAL);
        if (n < 0 && errno != EINTR)
            return failed(p, -errno, "the connection to %s is lost: %m", p->address);
        if (n > 0)
            tls_sent(p->tls, (size_t)n);
    }
    return 0;
}

static uint8_t cipher[64 << 10]; /* one peer at a time */

/* Waits, reads once, and hands it over. */
static int tls_receive(struct peer *p)
{
    struct pollfd q = {.fd = p->fd, .events = POLLIN};
    int n;
    while ((n = poll(&q, 1, PEER_SILENCE_MS)) < 0 && errno == EINTR)
        ;
    if (!n)
        return failed(p, -ETIMEDOUT, "%s has been silent for %d s", p->address, PEER_SILENCE_MS / 1000);
    ssize_t got = recv(p->fd, cipher, sizeof cipher, 0);
    if (got < 0)
        return errno == EINTR ? 0 : failed(p, -errno, "the connection to %s is lost: %m", p->address);
    if (!got)
        return failed(p, -ECONNRESET, "%s has closed the connection", p->address);
    if (tls_feed(p->tls, cipher, (size_t)got)) {
        (void)tls_send(p); /* why */
        return tls_failed_text(p);
    }
    return tls_send(p);
}

ssize_t dial_tls_read(struct peer *p, uint8_t *to, size_t cap)
{
    ssize_t n = tls_take(p->tls, to, cap);
    if (!n) {
        int rc = tls_receive(p);
        if (rc)
            return rc;
        n = tls_take(p->tls, to, cap);
    }
    return n < 0 ? tls_failed_text(p) : n;
}

int dial_tls_write(struct peer *p, const void *bytes, size_t len)
{
    return tls_put(p->tls, bytes, len) ? tls_failed_text(p) : tls_send(p);
}

int dial_tls_flush(struct peer *p)
{
    return tls_flush(p->tls) ? tls_failed_text(p) : tls_send(p);
}

/* Who is there has to be known before anything is said. */
static int secure(struct peer *p, const struct addr *a)
{
    struct tls_config *config = tls_dial_config();
    if (a->tls && !config)
        return failed(p, -EACCES, "%s: TLS is asked for, but there is nothing to show: set MEMSYNC_CERT_DIR or MEMSYNC_PSK_FILE",
                      p->address);
    if (!config)
        return 0;
    if (!(p->tls = tls_new(config, a->host)))
        return failed(p, -ENOMEM, "%s: TLS: no memory, or this is no name", p->address);
    int rc = tls_feed(p->tls, NULL, 0) ? tls_failed_text(p) : tls_send(p);
    while (!rc && !tls_ready(p->tls))
        rc = tls_receive(p);
    return rc;
}

static int dial_tcp(struct peer *p, const struct addr *a)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *all;
    int rc = getaddrinfo(a->host, a->port, &hints, &all);
    if (rc)
        return failed(p, -EHOSTUNREACH, "%s cannot be looked up: %s", a->host, gai_strerror(rc));
    rc = -EHOSTUNREACH;
    for (struct addrinfo *ai = all; ai && p->fd < 0; ai = ai->ai_next) {
        int fd = socket(ai->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0), one = 1;
        if (fd < 0) {
            rc = -errno;
            continue;
        }
        rc = connect_within(fd, ai->ai_addr, ai->ai_addrlen);
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        if (rc)
            close(fd);
        else
            p->fd = fd;
    }
    freeaddrinfo(all);
    if (rc)
        return failed(p, rc, "%s cannot be reached: %s; is memsync-agent --listen running there?", p->address,
                      strerror(-rc));
    return secure(p, a);
}

static int dial_unix(struct peer *p, const char *path)
{
    struct sockaddr_un to;
    int dir, rc = addr_unix(path, &to, &dir);
    if (!rc) {
        p->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
        rc = p->fd < 0 ? -errno : connect_within(p->fd, (struct sockaddr *)&to, sizeof to);
        if (dir >= 0)
            close(dir);
    }
    if (rc && p->fd >= 0) {
        close(p->fd);
        p->fd = -1;
    }
    if (rc)
        return failed(p, rc, "%s cannot be reached: %s", path, strerror(-rc));
    return 0;
}

/* state: NULL for the usual one. */
static void become_agent(const char *program, const char *store, const char *listen, const char *state, int out)
{
    /* It ends when we do, however we end. */
    if (prctl(PR_SET_PDEATHSIG, SIGTERM) || getppid() == 1 || dup2(out, STDOUT_FILENO) < 0)
        _exit(127);
    setpgid(0, 0); /* an interrupt at the terminal is ours alone: the agent is stopped in order */
    unsetenv("LD_PRELOAD");
    execl(program, "memsync-agent", "--store", store, "--listen", listen, state ? "--state" : NULL, state,
          (char *)NULL);
    fprintf(stderr, "memsync: %s cannot be run: %s\n", program, strerror(errno));
    _exit(127);
}

/* The child says where it listens once it does, or ends. */
static int await_listening(int from)
{
    char said[512];
    size_t have = 0;
    for (int64_t until = cli_now() + START_MS, now; (now = cli_now()) < until && have < sizeof said - 1;) {
        struct pollfd q = {.fd = from, .events = POLLIN};
        if (poll(&q, 1, (int)(until - now)) <= 0)
            continue;
        ssize_t n = read(from, said + have, sizeof said - 1 - have);
        if (n <= 0)
            return -ECHILD;
        have += (size_t)n;
        said[have] = 0;
        if (strstr(said, "listening wire ") && said[have - 1] == '\n')
            return 0;
    }
    return -ETIMEDOUT;
}

/* A hub of the tool's own must not be taken for one that writes under this user's identity: it gets another. */
static int start_agent(struct peer *p, const char *store)
{
    char program[4096], listen[sizeof p->temporary + 16], path[sizeof p->temporary + 8];
    if (cli_part("memsync-agent", program, sizeof program))
        return failed(p, -ENOENT,
                      "memsync-agent is neither beside this program nor in " MEMSYNC_PREFIX
                      "/bin; build or install it");
    int out[2];
    strcpy(p->temporary, "/tmp/memsync-tool-XXXXXX");
    if (!mkdtemp(p->temporary) || pipe2(out, O_CLOEXEC)) {
        int err = -errno;
        return failed(p, err, "an agent for %s cannot be started: %s", p->address, strerror(-err));
    }
    snprintf(path, sizeof path, "%s/wire", p->temporary);
    snprintf(listen, sizeof listen, "unix:%s", path);
    fflush(NULL);
    p->child = fork();
    if (p->child == 0)
        become_agent(program, store, listen, hub_is(store) || nbd_store_is(store) ? p->temporary : NULL, out[1]);
    int rc = p->child < 0 ? -errno : 0;
    close(out[1]);
    if (!rc)
        rc = await_listening(out[0]);
    close(out[0]);
    if (rc)
        return failed(p, rc, "no agent could be started for %s: %s", p->address,
                      rc == -ECHILD ? "it ended at once, see above" : strerror(-rc));
    return dial_unix(p, path);
}

static int dial_store(struct peer *p, const char *dir, bool make_store)
{
    char path[4096];
    struct stat st;
    if ((size_t)snprintf(path, sizeof path, "%s/.memsync/wire.sock", dir) >= sizeof path)
        return failed(p, -ENAMETOOLONG, "%s: the path is too long", p->address);
    int rc = dial_unix(p, path);
    if (!rc)
        return 0;
    if (rc != -ENOENT && rc != -ECONNREFUSED)
        return rc;
    if (!make_store && (stat(dir, &st) || !S_ISDIR(st.st_mode)))
        return failed(p, -ENOENT, "there is no store at %s: it is no directory; is the path right?", dir);
    return start_agent(p, p->address);
}

int dial(struct peer *p, bool make_store)
{
    struct addr a;
    char hub_error[STORE_ERROR];
    if (!strncmp(p->address, "file:", 5))
        return dial_store(p, p->address + 5, make_store);
    if (hub_is(p->address))
        return hub_check(p->address, hub_error) ? failed(p, -EINVAL, "%s", hub_error) : start_agent(p, p->address);
    if (nbd_store_is(p->address))
        return nbd_store_check(p->address, hub_error) ? failed(p, -EINVAL, "%s", hub_error) : start_agent(p, p->address);
    if (addr_parse(&a, p->address))
        return failed(p, -EINVAL,
                      "%s is no address that this program can reach: give HOST:PORT, unix:PATH, "
                      "file:DIRECTORY, hub:ADDRESS,ADDRESS... or nbd://HOST:PORT/EXPORT",
                      p->address);
    return a.is_unix ? dial_unix(p, a.path) : dial_tcp(p, &a);
}

void dial_end(struct peer *p)
{
    int status;
    if (p->child > 0) {
        kill(p->child, SIGTERM);
        while (waitpid(p->child, &status, 0) < 0 && errno == EINTR)
            ;
        p->child = 0;
    }
    if (*p->temporary) {
        char path[sizeof p->temporary + 16];
        snprintf(path, sizeof path, "%s/wire", p->temporary);
        unlink(path);
        snprintf(path, sizeof path, "%s/identity", p->temporary);
        unlink(path);
        rmdir(p->temporary);
    }
}
