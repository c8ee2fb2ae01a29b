/* Demand reads against a server, one after the other, as a faulting program would make them:  reads ADDRESS REGION
 *
 * Says "pinned", then reads pages of the region at random, a millisecond apart, until its standard input ends; then
 * their number and the median, 99th percentile and worst of what they took, in microseconds. */
#include "agent/base/id.h"
#include "wire/frame.h"

#include <errno.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define STREAM 1u
#define READS_MAX 1000000u

static int fd;
static uint32_t order, taken; /* frames sent; bytes of answers not yet given back */
static uint8_t in[FRAME_HEADER + FRAME_PAYLOAD_MAX];

static void die(const char *what)
{
    fprintf(stderr, "reads: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000u + (uint64_t)t.tv_nsec / 1000u;
}

static void dial(const char *address)
{
    char host[256];
    snprintf(host, sizeof host, "%s", address);
    char *port = strrchr(host, ':');
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *a;
    int on = 1;
    if (!port)
        die("no HOST:PORT");
    *port++ = 0;
    if (getaddrinfo(host, port, &hints, &a))
        die("the address");
    fd = socket(a->ai_family, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, a->ai_addr, a->ai_addrlen) || setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on))
        die(address);
    freeaddrinfo(a);
}

static void say(uint32_t stream, uint8_t type, const void *payload, size_t len)
{
    uint8_t out[FRAME_HEADER + NAME_CAP + 64];
    frame_header_put(out, type, stream, stream ? order++ : 0, (uint32_t)len, frame_payload_hash(payload, len));
    if (len)
        memcpy(out + FRAME_HEADER, payload, len);
    if (write(fd, out, FRAME_HEADER + len) != (ssize_t)(FRAME_HEADER + len))
        die("write");
}

static void need(uint8_t *to, size_t len)
{
    for (size_t have = 0; have < len;) {
        ssize_t n = read(fd, to + have, len - have);
        if (n <= 0)
            die("the server hung up");
        have += (size_t)n;
    }
}

/* The next frame on the stream; pings are answered. */
static struct frame_header hear(void)
{
    for (;;) {
        struct frame_header h;
        need(in, FRAME_HEADER);
        if (frame_step(in, FRAME_HEADER, &h) < 0)
            die("not a frame");
        need(in + FRAME_HEADER, h.len);
        if (frame_step(in, FRAME_HEADER + h.len, &h) <= 0)
            die("a damaged frame");
        if (h.type == FRAME_ERROR || h.type == FRAME_FAILED) {
            struct frame_failed f;
            errno = 0;
            die(frame_failed_get(in + FRAME_HEADER, h.len, &f) ? "refused" : f.text);
        }
        if (h.type == FRAME_PING)
            say(0, FRAME_PONG, in + FRAME_HEADER, h.len);
        else if (h.stream)
            return h;
    }
}

static int by_number(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static void one_read(uint32_t pin, uint64_t page)
{
    uint8_t p[20];
    put_u32(p, 2);
    put_u32(p + 4, pin);
    put_u64(p + 8, page * FRAME_PAGE);
    put_u32(p + 16, FRAME_PAGE);
    say(STREAM, FRAME_READ, p, sizeof p);
    struct frame_header h = hear();
    if (h.type != FRAME_DATA)
        die("no DATA");
    taken += h.len;
    if (taken >= FRAME_WINDOW / 4) {
        put_u32(p, STREAM);
        put_u32(p + 4, taken);
        say(0, FRAME_WINDOW_MORE, p, 8);
        taken = 0;
    }
}

int main(int argc, char **argv)
{
    uint8_t p[NAME_CAP + 512];
    static uint32_t took[READS_MAX];
    struct frame_hello hello = {.version = FRAME_VERSION, .host = "reads"};
    struct frame_entry e;
    uint32_t request, pin, n = 0;
    if (argc != 3) {
        fprintf(stderr, "usage: reads HOST:PORT REGION\n");
        return 2;
    }
    dial(argv[1]);
    id_new(&hello.identity);
    say(0, FRAME_HELLO, p, frame_hello_put(p, sizeof p, &hello));
    struct wr w = wr_over(p, sizeof p);
    wr_u32(&w, 1);
    wr_str(&w, argv[2]);
    say(STREAM, FRAME_PIN, p, wr_len(&w));
    struct frame_header h = hear();
    if (h.type != FRAME_PINNED || frame_pinned_get(in + FRAME_HEADER, h.len, &request, &pin, &e) || e.size < FRAME_PAGE)
        die("no pin of a page");
    printf("pinned\n");
    fflush(stdout);
    srandom(1);
    for (struct pollfd end = {.fd = 0, .events = POLLIN}; n < READS_MAX && !poll(&end, 1, 1);) {
        uint64_t start = now_us();
        one_read(pin, (uint64_t)random() % (e.size / FRAME_PAGE));
        took[n++] = (uint32_t)(now_us() - start);
    }
    if (!n)
        die("nothing was read");
    qsort(took, n, sizeof took[0], by_number);
    printf("%u %u %u %u\n", n, took[n / 2], took[n - 1 - n / 100], took[n - 1]);
    return 0;
}
