#include "wire/nbd_uri.h"

#include <errno.h>

static int refuse(const char **why, int err, const char *text)
{
    *why = text;
    return err;
}

static bool starts(const char *text, const char *with)
{
    return !strncmp(text, with, strlen(with));
}

bool nbd_uri_is(const char *text)
{
    return starts(text, "nbd:") || starts(text, "nbds:") || starts(text, "nbd+") || starts(text, "nbds+");
}

static int digit(char c)
{
    return c >= '0' && c <= '9'   ? c - '0'
           : c >= 'a' && c <= 'f' ? c - 'a' + 10
           : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                  : -1;
}

/* [from, to) decoded; false when it does not fit, has control characters (a NUL among them), or a percent sign without
 * its two digits. */
static bool decode(char *out, size_t cap, const char *from, const char *to)
{
    size_t n = 0;
    while (from < to) {
        unsigned char c = (unsigned char)*from++;
        if (c == '%') {
            int high = to - from < 2 ? -1 : digit(from[0]), low = high < 0 ? -1 : digit(from[1]);
            if (low < 0)
                return false;
            c = (unsigned char)(high << 4 | low);
            from += 2;
        }
        if (c < 0x20 || c == 0x7f || n + 1 >= cap)
            return false;
        out[n++] = (char)c;
    }
    out[n] = 0;
    return true;
}

static bool port_take(struct nbd_uri *u, const char *from, const char *to)
{
    unsigned port = 0;
    if (from == to || to - from >= (ptrdiff_t)sizeof u->port)
        return false;
    for (const char *p = from; p < to; p++) {
        if (*p < '0' || *p > '9')
            return false;
        port = port * 10 + (unsigned)(*p - '0');
    }
    memcpy(u->port, from, (size_t)(to - from));
    u->port[to - from] = 0;
    return port > 0 && port <= 65535;
}

/* HOST[:PORT], or [V6][:PORT]. */
static int host_take(struct nbd_uri *u, const char *from, const char *to, const char **why)
{
    const char *host = from, *end = memchr(from, ':', (size_t)(to - from)), *rest;
    if (memchr(from, '@', (size_t)(to - from)))
        return refuse(why, -EINVAL, "a block device server takes no user name");
    if (from < to && *from == '[') {
        host++;
        end = memchr(from, ']', (size_t)(to - from));
        if (!end)
            return refuse(why, -EINVAL, "the bracket of the IPv6 address is not closed");
        rest = end + 1;
    } else {
        if (end && memchr(end + 1, ':', (size_t)(to - end - 1)))
            return refuse(why, -EINVAL, "an IPv6 address needs brackets");
        rest = end = end ? end : to;
    }
    if (!decode(u->host, sizeof u->host, host, end))
        return refuse(why, -EINVAL, "the host is out of form");
    if (host == end)
        return refuse(why, -EINVAL, "the host is missing");
    if (rest < to && *rest != ':')
        return refuse(why, -EINVAL, "there is something between the host and its port");
    if (rest < to && !port_take(u, rest + 1, to))
        return refuse(why, -EINVAL, "the port is not one of 1 to 65535");
    return 0;
}

static int query_take(struct nbd_uri *u, const char *query, const char **why)
{
    while (*query) {
        size_t n = strcspn(query, "&");
        if (!starts(query, "socket="))
            return refuse(why, -EINVAL, "only socket= can stand behind the question mark");
        if (!u->is_unix)
            return refuse(why, -EINVAL, "socket= is for nbd+unix:");
        if (*u->path)
            return refuse(why, -EINVAL, "socket= is given twice");
        if (!decode(u->path, sizeof u->path, query + 7, query + n))
            return refuse(why, -EINVAL, "the socket's path is out of form");
        query += n + (query[n] == '&');
    }
    return 0;
}

int nbd_uri_parse(struct nbd_uri *u, const char *text, const char **why)
{
    *why = "";
    memset(u, 0, sizeof *u);
    if (starts(text, "nbds"))
        return refuse(why, -EPROTONOSUPPORT,
                      "TLS (nbds) is not built: use nbd: over a tunnel, or on a trusted network");
    if (starts(text, "nbd+vsock"))
        return refuse(why, -EPROTONOSUPPORT, "vsock is not built: use nbd: or nbd+unix:");
    u->is_unix = starts(text, "nbd+unix://");
    if (!u->is_unix && !starts(text, "nbd://"))
        return refuse(why, -EINVAL, "it is none of nbd://HOST:PORT/EXPORT and nbd+unix:///EXPORT?socket=PATH");
    const char *host = strstr(text, "//") + 2, *slash = host + strcspn(host, "/?#"), *end = text + strcspn(text, "?#");
    memcpy(u->port, "10809", 6);
    if (*end == '#')
        return refuse(why, -EINVAL, "a # has to be written as %23");
    if (u->is_unix && slash != host)
        return refuse(why, -EINVAL, "nbd+unix: has no host: write nbd+unix:///EXPORT?socket=PATH");
    int rc = u->is_unix ? 0 : host_take(u, host, slash, why);
    if (rc)
        return rc;
    if (*slash == '/' && !decode(u->name, sizeof u->name, slash + 1, end))
        return refuse(why, -EINVAL, "the export's name is out of form, or longer than 4096 bytes");
    rc = *end ? query_take(u, end + 1, why) : 0;
    if (!rc && u->is_unix && !*u->path)
        return refuse(why, -EINVAL, "nbd+unix: needs ?socket=PATH");
    return rc;
}
