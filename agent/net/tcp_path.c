/* See tcp_path.h. A file of its own because the C library's netinet/tcp.h, which libuv brings, has an older tcp_info. */
#include "agent/net/tcp_path.h"

#include <linux/tcp.h>
#include <netinet/in.h>
#include <sys/socket.h>

bool tcp_path(int fd, struct tcp_path *p)
{
    struct tcp_info t = {0};
    socklen_t len = sizeof t;
    if (getsockopt(fd, IPPROTO_TCP, TCP_INFO, &t, &len) < 0)
        return false;
    p->busy_us = t.tcpi_busy_time;
    p->limited_us = t.tcpi_rwnd_limited + t.tcpi_sndbuf_limited;
    p->acked = t.tcpi_bytes_acked;
    p->in_flight = t.tcpi_delivery_rate * t.tcpi_rtt / 1000000;
    return true;
}
