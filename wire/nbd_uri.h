/* Where a block device server and its export are, as users type it: the form of the NBD project's doc/uri.md.
 *
 *     nbd://HOST[:PORT][/EXPORT]               HOST may be an IPv6 address in brackets; the port is 10809 unless given
 *     nbd+unix:///[EXPORT]?socket=PATH
 *
 * Parts are percent-decoded. An export's name is all behind the first slash, further slashes included; none: the
 * server's default one. Bytes in, a struct out: no memory, no look-ups. */
#ifndef WIRE_NBD_URI_H
#define WIRE_NBD_URI_H

#include "wire/nbd.h"

#define NBD_URI_PATH 4096u

struct nbd_uri {
    bool is_unix;
    char host[256], port[6];
    char path[NBD_URI_PATH]; /* of the socket */
    char name[NBD_NAME_MAX + 1];
};

/* Whether the text means to be one of these (also those that are refused, as nbds). */
bool nbd_uri_is(const char *text);
/* 0; -EPROTONOSUPPORT for nbds and nbd+vsock; -EINVAL. *why then tells why. */
int nbd_uri_parse(struct nbd_uri *u, const char *text, const char **why);

#endif
