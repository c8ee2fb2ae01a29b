/* Addresses as users type them: "HOST:PORT", "[V6]:PORT", either after "tls:", "unix:PATH". Pure, but for addr_unix, which may open a
 * directory. */
#ifndef NET_ADDR_H
#define NET_ADDR_H

#include <stdbool.h>
#include <stddef.h>
#include <sys/socket.h>
#include <sys/un.h>

#define ADDR_TEXT 4200u

struct addr {
    bool is_unix, tls; /* tls: never without */
    char host[256], port[6];
    char path[4096];
};

/* 0, or -EINVAL: not of these forms, port not 0..65535. */
int addr_parse(struct addr *a, const char *text);
/* The socket address of a path. One too long for sockaddr_un is reached through its directory: *dir is then a
 * descriptor to keep open while `to` is used, else -1. 0 or a negative errno. */
int addr_unix(const char *path, struct sockaddr_un *to, int *dir);
/* "HOST:PORT" of an IP address; "" for another family. */
void addr_text(const struct sockaddr *sa, char *to, size_t cap);
/* Every address the host can be bound to or dialled at is 127.0.0.0/8 or ::1 (or the address is a unix one);
 * unresolvable counts as not. Blocks: for start-up. */
bool addr_loopback(const struct addr *a);

#endif
