/* What tls.c (steps), tls_config.c (credentials) and tls_psk.c (pre-shared keys) share. */
#ifndef NET_TLS_PRIVATE_H
#define NET_TLS_PRIVATE_H

#include "agent/net/tls.h"

#include <openssl/ssl.h>

#define TLS_KEY_MAX 64u /* bytes of a pre-shared key */
#define TLS_KEY_MIN 16u

struct tls_key {
    char identity[TLS_PEER];
    uint8_t key[TLS_KEY_MAX];
    size_t len;
};

struct tls_keys {
    size_t n;
    struct tls_key key[];
};

struct tls_config {
    bool server;
    char *cert_dir, *psk_file; /* absolute; NULL: none */
    SSL_CTX *ctx;              /* objects hold one of their own: a reload leaves them be */
};

/* tls_psk.c. Keys belong to the SSL_CTX they are set in. */
struct tls_keys *tls_keys_read(const char *file, char error[TLS_ERROR]);
bool tls_keys_use(SSL_CTX *ctx, struct tls_keys *keys, bool server); /* takes them over in either case */

/* tls_config.c: 0, or -EINVAL and error: it is not there, or others can read it. */
int tls_secret_check(const char *file, char error[TLS_ERROR]);
/* The first of OpenSSL's errors in words, and none is left. */
const char *tls_reason(char *to, size_t cap);

#endif
