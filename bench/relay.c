/* A TCP relay that is as bad as wanted: slow, far, narrow, cut.
 *
 *   relay TARGET [--delay MS] [--rate BYTES]        TARGET is HOST:PORT
 *
 * Says "listening HOST:PORT". Every byte is handed on MS milliseconds after it came, at most BYTES a second in each
 * direction. Lines on its standard input change it while it runs:
 *
 *   cut N      after N more bytes, counted over both directions, every connection ends in the middle of what it was
 * saying down | up  down: all connections end, new ones are refused; up: as before hang | go  hang: nothing is handed
 * on, nothing ends; go: as before count      says "bytes UP DOWN": what was handed on to the target, and back to TARGET
 * where connections made from now on go
 *
 * One thread, one poll loop. A connection is two lanes (there, and back), each a ring of chunks with the time at which
 * they are due. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define CONNECTIONS 64
#define CHUNK 65536u
#define CHUNKS 256u /* of a lane: what may be on its way */
#define IN_TURN 2u  /* chunks of a lane, then the others have theirs: a short message must not wait for a full lane */

struct chunk {
    uint64_t due; /* ns */
    size_t at, len;
    unsigned char bytes[CHUNK];
};

struct lane {
    int from, to;
    struct chunk *ring;
    unsigned first, count;
    uint64_t free_at; /* when the narrow line has room again */
    bool ended;       /* no more comes in */
    bool shut;        /* and that was told */
};

struct connection {
    bool used;
    struct lane lane[2];
};

static struct connection connections[CONNECTIONS];
static char target[256];
static uint64_t delay_ns, rate, moved[2];
static int64_t cut_after = -1;
static bool down, hung;
static int listener;

static void die(const char *what)
{
    fprintf(stderr, "relay: %s: %s\n", what, strerror(errno));
    exit(3);
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static struct addrinfo *resolve(const char *text, int flags)
{
    char host[256];
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = flags}, *found = NULL;
    snprintf(host, sizeof host, "%s", text);
    char *colon = strrchr(host, ':');
    if (!colon)
        return NULL;
    *colon = 0;
    return getaddrinfo(host, colon + 1, &hints, &found) == 0 ? found : NULL;
}

/* Ended with a reset, as a cut is: what the kernel still holds is lost too. */
static void end_connection(struct connection *c)
{
    struct linger hard = {1, 0};
    for (int i = 0; i < 2; i++) {
        setsockopt(c->lane[i].from, SOL_SOCKET, SO_LINGER, &hard, sizeof hard);
        close(c->lane[i].from);
        free(c->lane[i].ring);
    }
    memset(c, 0, sizeof *c);
}

static void end_all(void)
{
    for (int i = 0; i < CONNECTIONS; i++)
        if (connections[i].used)
            end_connection(&connections[i]);
}

static void accept_one(void)
{
    int one = 1, near = accept4(listener, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (near < 0)
        return;
    struct connection *c = connections;
    while (c < connections + CONNECTIONS && c->used)
        c++;
    struct addrinfo *a = down || c == connections + CONNECTIONS ? NULL : resolve(target, 0);
    int far = a ? socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0) : -1;
    if (far < 0 || connect(far, a->ai_addr, a->ai_addrlen) != 0) {
        struct linger hard = {1, 0};
        setsockopt(near, SOL_SOCKET, SO_LINGER, &hard, sizeof hard);
        close(near);
        if (far >= 0)
            close(far);
        if (a)
            freeaddrinfo(a);
        return;
    }
    freeaddrinfo(a);
    fcntl(far, F_SETFL, O_NONBLOCK);
    setsockopt(near, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    setsockopt(far, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    *c = (struct connection){.used = true, .lane = {{.from = near, .to = far}, {.from = far, .to = near}}};
    for (int i = 0; i < 2; i++)
        if (!(c->lane[i].ring = malloc(CHUNKS * sizeof(struct chunk))))
            die("memory");
}

/* False when the connection is over. */
static bool take_in(struct lane *l)
{
    struct chunk *k = &l->ring[(l->first + l->count) % CHUNKS];
    ssize_t n = read(l->from, k->bytes, rate && rate / 50 < CHUNK ? rate / 50 + 1 : CHUNK);
    if (n < 0)
        return errno == EAGAIN || errno == EINTR;
    if (n == 0) {
        l->ended = true;
        return true;
    }
    uint64_t now = now_ns(), start = l->free_at > now ? l->free_at : now;
    if (rate)
        l->free_at = start + (uint64_t)n * 1000000000u / rate;
    k->at = 0;
    k->len = (size_t)n;
    k->due = (rate ? l->free_at : now) + delay_ns;
    l->count++;
    return true;
}

static bool hand_on(struct lane *l, int which)
{
    struct chunk *k = &l->ring[l->first];
    size_t want = k->len - k->at;
    if (cut_after >= 0 && (uint64_t)cut_after < want)
        want = (size_t)cut_after;
    ssize_t n = want ? send(l->to, k->bytes + k->at, want, MSG_NOSIGNAL) : 0;
    if (n < 0)
        return errno == EAGAIN || errno == EINTR;
    k->at += (size_t)n;
    moved[which] += (uint64_t)n;
    if (cut_after >= 0 && (cut_after -= n) == 0) {
        cut_after = -1;
        end_all();
        printf("cut\n");
        return true;
    }
    if (k->at == k->len) {
        l->first = (l->first + 1) % CHUNKS;
        l->count--;
    }
    return true;
}

static void command(char *line)
{
    line[strcspn(line, "\n")] = 0;
    if (!strncmp(line, "cut ", 4)) {
        cut_after = atoll(line + 4);
    } else if (!strcmp(line, "down")) {
        down = true;
        end_all();
    } else if (!strcmp(line, "up")) {
        down = false;
    } else if (!strcmp(line, "hang") || !strcmp(line, "go")) {
        hung = line[0] == 'h';
    } else if (!strcmp(line, "count")) {
        printf("bytes %llu %llu\n", (unsigned long long)moved[0], (unsigned long long)moved[1]);
    } else if (!strncmp(line, "to ", 3)) {
        snprintf(target, sizeof target, "%s", line + 3);
    } else {
        fprintf(stderr, "relay: not a command: %s\n", line);
    }
}

/* One look at a connection: what to wait for, and until when. */
static void ask_for(struct connection *c, struct pollfd p[2], uint64_t now, uint64_t *wake)
{
    p[0] = (struct pollfd){.fd = c->lane[0].from};
    p[1] = (struct pollfd){.fd = c->lane[1].from};
    for (int i = 0; i < 2 && !hung; i++) {
        struct lane *l = &c->lane[i];
        if (!l->ended && l->count < CHUNKS)
            p[i].events |= POLLIN;
        if (!l->count)
            continue;
        if (l->ring[l->first].due <= now)
            p[!i].events |= POLLOUT;
        else if (l->ring[l->first].due < *wake)
            *wake = l->ring[l->first].due;
    }
    for (int i = 0; i < 2; i++)
        if (!p[i].events)
            p[i].fd = -1; /* else a peer that closed makes the poll spin */
}

static void serve(struct connection *c, const struct pollfd p[2])
{
    for (int i = 0; i < 2 && c->used && !hung; i++) {
        struct lane *l = &c->lane[i];
        if (p[i].fd >= 0 && p[i].revents && (p[i].events & POLLIN) && !take_in(l)) {
            end_connection(c);
            return;
        }
        uint64_t now = now_ns();
        for (unsigned n = 0; n < IN_TURN && c->used && l->count && l->ring[l->first].due <= now; n++) {
            size_t before = l->ring[l->first].at;
            unsigned count = l->count;
            if (!hand_on(l, i)) {
                end_connection(c);
                return;
            }
            if (!c->used || (l->count == count && l->ring[l->first].at == before))
                break;
        }
        if (c->used && l->ended && !l->count && !l->shut) {
            shutdown(l->to, SHUT_WR);
            l->shut = true;
        }
    }
    if (c->used && c->lane[0].shut && c->lane[1].shut) {
        close(c->lane[0].from);
        close(c->lane[1].from);
        free(c->lane[0].ring);
        free(c->lane[1].ring);
        memset(c, 0, sizeof *c);
    }
}

static void start_listening(void)
{
    struct addrinfo *a = resolve("127.0.0.1:0", AI_PASSIVE);
    struct sockaddr_in bound;
    socklen_t len = sizeof bound;
    listener = a ? socket(a->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0) : -1;
    if (listener < 0 || bind(listener, a->ai_addr, a->ai_addrlen) != 0 || listen(listener, 64) != 0 ||
        getsockname(listener, (struct sockaddr *)&bound, &len) != 0)
        die("listen");
    freeaddrinfo(a);
    setvbuf(stdout, NULL, _IOLBF, 0);
    printf("listening 127.0.0.1:%u\n", ntohs(bound.sin_port));
}

int main(int argc, char **argv)
{
    if (argc < 2 || !strchr(argv[1], ':')) {
        fprintf(stderr, "usage: relay HOST:PORT [--delay MS] [--rate BYTES]\n");
        return 2;
    }
    snprintf(target, sizeof target, "%s", argv[1]);
    for (int i = 2; i + 1 < argc; i += 2) {
        if (!strcmp(argv[i], "--delay"))
            delay_ns = (uint64_t)(atof(argv[i + 1]) * 1e6);
        else if (!strcmp(argv[i], "--rate"))
            rate = (uint64_t)atoll(argv[i + 1]);
    }
    start_listening();
    for (bool talk = true;;) {
        struct pollfd p[2 + 2 * CONNECTIONS];
        struct connection *who[CONNECTIONS];
        nfds_t n = 2;
        uint64_t now = now_ns(), wake = UINT64_MAX;
        p[0] = (struct pollfd){.fd = talk ? 0 : -1, .events = POLLIN};
        p[1] = (struct pollfd){.fd = listener, .events = POLLIN};
        for (int i = 0; i < CONNECTIONS; i++)
            if (connections[i].used) {
                who[(n - 2) / 2] = &connections[i];
                ask_for(&connections[i], p + n, now, &wake);
                n += 2;
            }
        struct timespec t = {(time_t)((wake - now) / 1000000000u), (long)((wake - now) % 1000000000u)};
        if (ppoll(p, n, wake == UINT64_MAX ? NULL : &t, NULL) < 0 && errno != EINTR)
            die("poll");
        for (nfds_t i = 2; i < n; i += 2)
            if (who[(i - 2) / 2]->used)
                serve(who[(i - 2) / 2], p + i);
        if (p[1].revents)
            accept_one();
        if (p[0].revents) {
            char lines[1024];
            ssize_t got = read(0, lines, sizeof lines - 1);
            talk = got > 0;
            lines[got > 0 ? got : 0] = 0;
            for (char *next, *line = strtok_r(lines, "\n", &next); line; line = strtok_r(NULL, "\n", &next))
                command(line);
        }
    }
}
