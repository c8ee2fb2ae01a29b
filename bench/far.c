/* A long line between two network namespaces, under TCP rather than in it as relay.c is: the kernels at both ends see
 * the round trip.
 *
 *   far PID MS [MTU]
 *
 * Makes a device far0 (10.77.0.1/24) in this namespace and one (10.77.0.2/24) in that of process PID, says "ready", and
 * hands each packet on MS milliseconds after it came. As root of a user namespace (unshare -rn). Ends with its standard
 * input. */
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/if.h>
#include <linux/if_tun.h>
#include <poll.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define RING (64u << 20)
#define PACKET_MAX 65536u

/* Packets one behind the other, each with when it is due; a length of 0 ends the ring before its end. */
struct packet {
    uint64_t due;
    uint32_t len;
};

struct lane {
    int from, to;
    unsigned char *ring;
    size_t first, last, used; /* bytes */
    uint64_t lost;
};

static uint64_t delay_ns;

static void die(const char *what)
{
    fprintf(stderr, "far: %s: %s\n", what, strerror(errno));
    exit(3);
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static int device(const char *address, int mtu)
{
    struct ifreq r = {.ifr_flags = IFF_TUN | IFF_NO_PI};
    int s = socket(AF_INET, SOCK_DGRAM, 0), fd = open("/dev/net/tun", O_RDWR | O_NONBLOCK);
    snprintf(r.ifr_name, sizeof r.ifr_name, "far0");
    if (s < 0 || fd < 0 || ioctl(fd, TUNSETIFF, &r) < 0)
        die("/dev/net/tun");
    struct sockaddr_in *in = (struct sockaddr_in *)&r.ifr_addr;
    *in = (struct sockaddr_in){.sin_family = AF_INET};
    inet_pton(AF_INET, address, &in->sin_addr);
    if (ioctl(s, SIOCSIFADDR, &r) < 0)
        die("address");
    inet_pton(AF_INET, "255.255.255.0", &in->sin_addr);
    if (ioctl(s, SIOCSIFNETMASK, &r) < 0)
        die("netmask");
    r.ifr_mtu = mtu;
    if (ioctl(s, SIOCSIFMTU, &r) < 0)
        die("mtu");
    r.ifr_qlen = 10000;
    ioctl(s, SIOCSIFTXQLEN, &r);
    r.ifr_flags = IFF_UP | IFF_RUNNING;
    if (ioctl(s, SIOCSIFFLAGS, &r) < 0)
        die("up");
    close(s);
    return fd;
}

/* Where a packet fits, or NULL. */
static struct packet *room(struct lane *l)
{
    size_t want = sizeof(struct packet) + PACKET_MAX;
    if (RING - l->used < 2 * want)
        return NULL;
    if (RING - l->last < want) {
        if (RING - l->last >= sizeof(struct packet))
            ((struct packet *)(l->ring + l->last))->len = 0;
        l->used += RING - l->last;
        l->last = 0;
    }
    return (struct packet *)(l->ring + l->last);
}

static size_t step_of(uint32_t len)
{
    return (sizeof(struct packet) + len + 7) / 8 * 8;
}

static void take_in(struct lane *l)
{
    unsigned char lost[PACKET_MAX];
    for (int i = 0; i < 64; i++) {
        struct packet *p = room(l);
        ssize_t n = read(l->from, p ? (unsigned char *)(p + 1) : lost, PACKET_MAX);
        if (n <= 0)
            return;
        l->lost += !p;
        if (!p)
            continue;
        *p = (struct packet){.due = now_ns() + delay_ns, .len = (uint32_t)n};
        l->last += step_of(p->len);
        l->used += step_of(p->len);
    }
}

/* Until when nothing is due. */
static uint64_t hand_on(struct lane *l)
{
    while (l->used) {
        struct packet *p = (struct packet *)(l->ring + l->first);
        if (RING - l->first < sizeof *p || !p->len) {
            l->used -= RING - l->first;
            l->first = 0;
            continue;
        }
        if (p->due > now_ns())
            return p->due;
        if (write(l->to, p + 1, p->len) < 0)
            l->lost++;
        l->first += step_of(p->len);
        l->used -= step_of(p->len);
    }
    return UINT64_MAX;
}

int main(int argc, char **argv)
{
    if (argc < 3) {
        fprintf(stderr, "usage: far PID MS [MTU]\n");
        return 2;
    }
    char path[64];
    snprintf(path, sizeof path, "/proc/%d/ns/net", atoi(argv[1]));
    delay_ns = (uint64_t)(atof(argv[2]) * 1e6);
    int mtu = argc > 3 ? atoi(argv[3]) : 9000, there = open(path, O_RDONLY);
    int near = device("10.77.0.1", mtu);
    if (there < 0 || setns(there, CLONE_NEWNET) < 0)
        die(path);
    int away = device("10.77.0.2", mtu);
    struct lane lanes[2] = {{.from = near, .to = away}, {.from = away, .to = near}};
    for (int i = 0; i < 2; i++)
        if (!(lanes[i].ring = malloc(RING)))
            die("memory");
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("ready");
    for (;;) {
        uint64_t a = hand_on(&lanes[0]), b = hand_on(&lanes[1]), due = a < b ? a : b, now = now_ns();
        struct timespec t = {(time_t)((due - now) / 1000000000u), (long)((due - now) % 1000000000u)};
        if (due <= now)
            t = (struct timespec){0};
        struct pollfd p[3] = {{near, POLLIN, 0}, {away, POLLIN, 0}, {0, POLLIN, 0}};
        if (ppoll(p, 3, due == UINT64_MAX ? NULL : &t, NULL) < 0 && errno != EINTR)
            die("poll");
        if (p[0].revents)
            take_in(&lanes[0]);
        if (p[1].revents)
            take_in(&lanes[1]);
        char c;
        if (p[2].revents && read(0, &c, 1) <= 0)
            break;
    }
    fprintf(stderr, "far: %llu and %llu packets lost\n", (unsigned long long)lanes[0].lost,
            (unsigned long long)lanes[1].lost);
    return 0;
}
