/* Pre-shared keys: the file, and OpenSSL's calls back for them. RFC 8446, section 4.2.11: external keys, SHA-256. */
#include "agent/net/tls_private.h"

#include <openssl/crypto.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define KEYS_MAX 4096u

static int nibble(char c)
{
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
}

/* IDENTITY:HEXKEY. The identity may hold colons. */
static bool key_parse(struct tls_key *k, const char *line)
{
    const char *colon = strrchr(line, ':');
    size_t name = colon ? (size_t)(colon - line) : 0, hex = colon ? strlen(colon + 1) : 0;
    if (!name || name >= sizeof k->identity || hex % 2 || hex / 2 < TLS_KEY_MIN || hex / 2 > TLS_KEY_MAX)
        return false;
    memset(k, 0, sizeof *k);
    memcpy(k->identity, line, name);
    k->len = hex / 2;
    for (size_t i = 0; i < hex; i++) {
        int v = nibble(colon[1 + i]);
        if (v < 0)
            return false;
        k->key[i / 2] = (uint8_t)(k->key[i / 2] << 4 | v);
    }
    for (const char *c = k->identity; *c; c++)
        if ((unsigned char)*c <= ' ' || *c == 0x7f)
            return false;
    return true;
}

static void keys_free(struct tls_keys *keys)
{
    if (keys)
        OPENSSL_clear_free(keys, sizeof *keys + keys->n * sizeof *keys->key);
}

static struct tls_keys *keys_more(struct tls_keys *keys)
{
    size_t n = keys ? keys->n : 0, size = sizeof *keys + n * sizeof *keys->key;
    struct tls_keys *more = keys ? OPENSSL_clear_realloc(keys, size, size + sizeof *keys->key)
                                 : OPENSSL_zalloc(size + sizeof *keys->key);
    if (!more)
        keys_free(keys);
    return more;
}

struct tls_keys *tls_keys_read(const char *file, char error[TLS_ERROR])
{
    if (tls_secret_check(file, error))
        return NULL;
    FILE *f = fopen(file, "re");
    struct tls_keys *keys = NULL;
    char line[TLS_PEER + 2 * TLS_KEY_MAX + 8];
    unsigned number = 0;
    bool bad = false;
    while (f && !bad && fgets(line, sizeof line, f)) {
        number++;
        line[strcspn(line, "\r\n")] = 0;
        if (!*line || *line == '#')
            continue;
        if (!(keys = keys_more(keys)))
            break;
        bad = keys->n == KEYS_MAX || !key_parse(&keys->key[keys->n], line);
        keys->n += !bad;
    }
    OPENSSL_cleanse(line, sizeof line);
    if (!f)
        snprintf(error, TLS_ERROR, "%s: %m", file);
    else if (bad)
        snprintf(error, TLS_ERROR, "%s, line %u is not IDENTITY:HEXKEY with a key of %u to %u bytes", file, number,
                 TLS_KEY_MIN, TLS_KEY_MAX);
    else if (!keys)
        snprintf(error, TLS_ERROR, "%s holds no key: memsync keygen makes one", file);
    if (f)
        fclose(f);
    if (bad) {
        keys_free(keys);
        keys = NULL;
    }
    return keys;
}

static SSL_SESSION *session_of(SSL *ssl, const struct tls_key *k)
{
    static const unsigned char aes128[] = {0x13, 0x01};
    SSL_SESSION *s = SSL_SESSION_new();
    const SSL_CIPHER *cipher = SSL_CIPHER_find(ssl, aes128);
    if (s && cipher && SSL_SESSION_set1_master_key(s, k->key, k->len) && SSL_SESSION_set_cipher(s, cipher) &&
        SSL_SESSION_set_protocol_version(s, TLS1_3_VERSION))
        return s;
    SSL_SESSION_free(s);
    return NULL;
}

static int keys_index(void);

/* Server: the key of an identity; none: no session, and certificates may yet do. */
static int on_find(SSL *ssl, const unsigned char *identity, size_t len, SSL_SESSION **to)
{
    const struct tls_keys *keys = SSL_CTX_get_ex_data(SSL_get_SSL_CTX(ssl), keys_index());
    *to = NULL;
    for (size_t i = 0; keys && i < keys->n; i++)
        if (strlen(keys->key[i].identity) == len && !memcmp(keys->key[i].identity, identity, len)) {
            if (!(*to = session_of(ssl, &keys->key[i])))
                return 0;
            SSL_set_ex_data(ssl, 0, (void *)keys->key[i].identity);
            return 1;
        }
    return 1;
}

/* Client: the first of the file. */
static int on_use(SSL *ssl, const EVP_MD *md, const unsigned char **identity, size_t *len, SSL_SESSION **to)
{
    const struct tls_keys *keys = SSL_CTX_get_ex_data(SSL_get_SSL_CTX(ssl), keys_index());
    *to = NULL;
    if (!keys || (md && EVP_MD_get_type(md) != NID_sha256))
        return 1;
    *identity = (const unsigned char *)keys->key[0].identity;
    *len = strlen(keys->key[0].identity);
    SSL_set_ex_data(ssl, 0, (void *)keys->key[0].identity);
    *to = session_of(ssl, &keys->key[0]);
    return *to != NULL;
}

static void on_ctx_free(void *parent, void *p, CRYPTO_EX_DATA *all, int index, long arg, void *more)
{
    (void)parent;
    (void)all;
    (void)index;
    (void)arg;
    (void)more;
    keys_free(p);
}

static int keys_index(void)
{
    static int index = -1;
    if (index < 0)
        index = SSL_CTX_get_ex_new_index(0, NULL, NULL, NULL, on_ctx_free);
    return index;
}

bool tls_keys_use(SSL_CTX *ctx, struct tls_keys *keys, bool server)
{
    if (!SSL_CTX_set_ex_data(ctx, keys_index(), keys)) {
        keys_free(keys);
        return false;
    }
    if (server)
        SSL_CTX_set_psk_find_session_callback(ctx, on_find);
    else
        SSL_CTX_set_psk_use_session_callback(ctx, on_use);
    return true;
}
