#include "agent/net/addr.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static bool port_good(const char *port)
{
    size_t n = strspn(port, "0123456789");
    return n && n <= 5 && !port[n] && atoi(port) <= 65535;
}

int addr_parse(struct addr *a, const char *text)
{
    memset(a, 0, sizeof *a);
    if (!strncmp(text, "unix:", 5)) {
        a->is_unix = true;
        size_t n = strlen(text + 5);
        if (!n || n >= sizeof a->path)
            return -EINVAL;
        memcpy(a->path, text + 5, n + 1);
        return 0;
    }
    if (!strncmp(text, "tls:", 4)) {
        a->tls = true;
        text += 4;
    }
    const char *colon = strrchr(text, ':');
    if (!colon || !port_good(colon + 1))
        return -EINVAL;
    const char *from = text, *to = colon;
    if (*text == '[') {
        if (to - from < 3 || to[-1] != ']')
            return -EINVAL;
        from++;
        to--;
    } else if (memchr(text, ':', (size_t)(colon - text))) {
        return -EINVAL; /* an IPv6 address without its brackets: which colon is the port's? */
    }
    size_t n = (size_t)(to - from);
    if (!n || n >= sizeof a->host)
        return -EINVAL;
    memcpy(a->host, from, n);
    memcpy(a->port, colon + 1, strlen(colon + 1) + 1);
    return 0;
}

int addr_unix(const char *path, struct sockaddr_un *to, int *dir)
{
    *dir = -1;
    *to = (struct sockaddr_un){.sun_family = AF_UNIX};
    size_t n = strlen(path);
    if (n < sizeof to->sun_path) {
        memcpy(to->sun_path, path, n + 1);
        return 0;
    }
    char parent[4096];
    const char *slash = strrchr(path, '/');
    if (!slash || (size_t)(slash - path) >= sizeof parent || strlen(slash + 1) > 64)
        return -ENAMETOOLONG;
    memcpy(parent, path, (size_t)(slash - path));
    parent[slash - path] = 0;
    *dir = open(parent, O_PATH | O_DIRECTORY | O_CLOEXEC);
    if (*dir < 0)
        return -errno;
    snprintf(to->sun_path, sizeof to->sun_path, "/proc/self/fd/%d/%.64s", *dir, slash + 1);
    return 0;
}

void addr_text(const struct sockaddr *sa, char *to, size_t cap)
{
    char host[INET6_ADDRSTRLEN] = "";
    if (sa->sa_family == AF_INET) {
        const struct sockaddr_in *in = (const void *)sa;
        inet_ntop(AF_INET, &in->sin_addr, host, sizeof host);
        snprintf(to, cap, "%s:%u", host, ntohs(in->sin_port));
    } else if (sa->sa_family == AF_INET6) {
        const struct sockaddr_in6 *in = (const void *)sa;
        inet_ntop(AF_INET6, &in->sin6_addr, host, sizeof host);
        snprintf(to, cap, "[%s]:%u", host, ntohs(in->sin6_port));
    } else if (cap) {
        to[0] = 0;
    }
}

static bool one_loopback(const struct sockaddr *sa)
{
    if (sa->sa_family == AF_INET)
        return ntohl(((const struct sockaddr_in *)(const void *)sa)->sin_addr.s_addr) >> 24 == 127;
    return sa->sa_family == AF_INET6 &&
           IN6_IS_ADDR_LOOPBACK(&((const struct sockaddr_in6 *)(const void *)sa)->sin6_addr);
}

bool addr_loopback(const struct addr *a)
{
    if (a->is_unix)
        return true;
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM}, *all;
    if (getaddrinfo(a->host, a->port, &hints, &all))
        return false;
    bool every = true;
    for (struct addrinfo *ai = all; ai; ai = ai->ai_next)
        every = every && one_loopback(ai->ai_addr);
    freeaddrinfo(all);
    return every;
}
