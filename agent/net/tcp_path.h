/* What the kernel knows of the path under a TCP socket. */
#ifndef NET_TCP_PATH_H
#define NET_TCP_PATH_H

#include <stdbool.h>
#include <stdint.h>

struct tcp_path {
    uint64_t busy_us;    /* had something to send, since it was made */
    uint64_t limited_us; /* and waited for room in our buffer or the peer's */
    uint64_t acked;      /* bytes */
    uint64_t in_flight;  /* bytes that it delivers in a round trip */
};

bool tcp_path(int fd, struct tcp_path *p); /* what the kernel is too old to tell is 0; false: no TCP socket */

#endif
