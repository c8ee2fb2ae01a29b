/* The steps: see tls.h. OpenSSL reads from the span that was fed, and writes to a buffer that grows to what is put
 * between two tls_sent. */
#include "agent/net/tls_private.h"

#include <arpa/inet.h>
#include <errno.h>
#include <openssl/err.h>
#include <openssl/x509v3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define KEY_BYTES (64ull << 30) /* under one key: well below what AES-GCM is good for (RFC 8446, section 5.5) */
#define OUT_MIN (32u << 10)

struct tls {
    SSL *ssl;
    bool server, ready, ended, failed, begun;
    const uint8_t *in;
    size_t in_len;
    uint8_t *out;
    size_t out_start, out_end, out_cap;
    uint64_t keyed; /* bytes put under the present key */
    size_t gathered;
    char peer[TLS_PEER];
    char why[TLS_ERROR];
    uint8_t gather[TLS_RECORD];
};

/* The BIO */

static int bio_read(BIO *b, char *to, int cap)
{
    struct tls *t = BIO_get_data(b);
    size_t n = t->in_len < (size_t)cap ? t->in_len : (size_t)cap;
    BIO_clear_retry_flags(b);
    if (!n) {
        BIO_set_retry_read(b);
        return -1;
    }
    memcpy(to, t->in, n);
    t->in += n;
    t->in_len -= n;
    return (int)n;
}

static int bio_write(BIO *b, const char *from, int len)
{
    struct tls *t = BIO_get_data(b);
    size_t n = (size_t)len;
    if (t->out_start == t->out_end)
        t->out_start = t->out_end = 0;
    if (t->out_end + n > t->out_cap) {
        size_t cap = t->out_cap ? t->out_cap : OUT_MIN;
        while (cap < t->out_end + n)
            cap *= 2;
        uint8_t *more = realloc(t->out, cap);
        if (!more)
            return -1;
        t->out = more;
        t->out_cap = cap;
    }
    memcpy(t->out + t->out_end, from, n);
    t->out_end += n;
    return len;
}

static long bio_ctrl(BIO *b, int what, long arg, void *more)
{
    (void)b;
    (void)arg;
    (void)more;
    return what == BIO_CTRL_FLUSH;
}

static BIO *bio_new(struct tls *t)
{
    static BIO_METHOD *method;
    if (!method && (method = BIO_meth_new(BIO_get_new_index() | BIO_TYPE_SOURCE_SINK, "memsync"))) {
        BIO_meth_set_read(method, bio_read);
        BIO_meth_set_write(method, bio_write);
        BIO_meth_set_ctrl(method, bio_ctrl);
    }
    BIO *b = method ? BIO_new(method) : NULL;
    if (b) {
        BIO_set_data(b, t);
        BIO_set_init(b, 1);
    }
    return b;
}

/* Beginning and end */

static bool want_host(SSL *ssl, const char *host)
{
    struct in6_addr any;
    if (inet_pton(AF_INET, host, &any) == 1 || inet_pton(AF_INET6, host, &any) == 1)
        return X509_VERIFY_PARAM_set1_ip_asc(SSL_get0_param(ssl), host);
    SSL_set_hostflags(ssl, X509_CHECK_FLAG_NO_PARTIAL_WILDCARDS);
    return SSL_set1_host(ssl, host) && SSL_set_tlsext_host_name(ssl, host);
}

struct tls *tls_new(struct tls_config *c, const char *host)
{
    struct tls *t = calloc(1, sizeof *t);
    if (!t || !(t->ssl = SSL_new(c->ctx))) {
        free(t);
        return NULL;
    }
    t->server = c->server;
    BIO *b = bio_new(t);
    if (!b || (host && !c->server && !want_host(t->ssl, host))) {
        BIO_free(b);
        tls_free(t);
        return NULL;
    }
    SSL_set_bio(t->ssl, b, b);
    if (c->server)
        SSL_set_accept_state(t->ssl);
    else
        SSL_set_connect_state(t->ssl);
    return t;
}

void tls_free(struct tls *t)
{
    if (!t)
        return;
    SSL_free(t->ssl);
    OPENSSL_cleanse(t->gather, sizeof t->gather);
    free(t->out);
    free(t);
}

static int fail(struct tls *t, const char *why)
{
    if (!t->failed)
        snprintf(t->why, sizeof t->why, "%s", why);
    t->failed = true;
    t->in_len = 0;
    ERR_clear_error();
    return -EACCES;
}

/* In OpenSSL's words, with what the certificate lacks before what followed from that. */
static int fail_ssl(struct tls *t)
{
    char why[256];
    long verdict = SSL_get_verify_result(t->ssl);
    if (!t->ready && verdict != X509_V_OK && verdict != X509_V_ERR_UNSPECIFIED) {
        char text[400];
        snprintf(text, sizeof text, "its certificate is refused: %s", X509_verify_cert_error_string(verdict));
        return fail(t, text);
    }
    return fail(t, tls_reason(why, sizeof why));
}

/* Who it is */

static bool name_good(const char *name, size_t len)
{
    bool good = len && len < TLS_PEER;
    for (size_t i = 0; good && i < len; i++)
        good = (unsigned char)name[i] > ' ' && name[i] != 0x7f;
    return good;
}

static bool name_take(struct tls *t, const ASN1_STRING *s)
{
    unsigned char *text = NULL;
    int len = s ? ASN1_STRING_to_UTF8(&text, s) : -1;
    bool good = len > 0 && name_good((char *)text, (size_t)len);
    if (good) {
        memcpy(t->peer, text, (size_t)len);
        t->peer[len] = 0;
    }
    OPENSSL_free(text);
    return good;
}

static bool cert_name(struct tls *t, X509 *cert)
{
    X509_NAME *subject = X509_get_subject_name(cert);
    int at = X509_NAME_get_index_by_NID(subject, NID_commonName, -1);
    if (at >= 0)
        return name_take(t, X509_NAME_ENTRY_get_data(X509_NAME_get_entry(subject, at)));
    GENERAL_NAMES *names = X509_get_ext_d2i(cert, NID_subject_alt_name, NULL, NULL);
    bool found = false;
    for (int i = 0; !found && i < sk_GENERAL_NAME_num(names); i++) {
        const GENERAL_NAME *n = sk_GENERAL_NAME_value(names, i);
        found = n->type == GEN_DNS && name_take(t, n->d.dNSName);
    }
    GENERAL_NAMES_free(names);
    return found;
}

/* A key that was used, or a certificate that was verified: nothing else is let in. */
static int become_ready(struct tls *t)
{
    X509 *cert = SSL_get0_peer_certificate(t->ssl);
    const char *identity = SSL_get_ex_data(t->ssl, 0);
    if (SSL_version(t->ssl) != TLS1_3_VERSION)
        return fail(t, "it speaks no TLS 1.3");
    if (SSL_session_reused(t->ssl) && identity)
        snprintf(t->peer, sizeof t->peer, "%s", identity);
    else if (!cert || SSL_get_verify_result(t->ssl) != X509_V_OK)
        return fail(t, "it has shown neither a certificate nor a key");
    else if (!cert_name(t, cert))
        return fail(t, "its certificate has no usable name");
    t->ready = true;
    return 0;
}

/* Steps */

static int step_handshake(struct tls *t)
{
    ERR_clear_error();
    int rc = SSL_do_handshake(t->ssl);
    if (rc == 1)
        return become_ready(t);
    return SSL_get_error(t->ssl, rc) == SSL_ERROR_WANT_READ ? 0 : fail_ssl(t);
}

int tls_feed(struct tls *t, const uint8_t *bytes, size_t len)
{
    if (t->failed)
        return -EACCES;
    if (len && !t->begun && *bytes != SSL3_RT_HANDSHAKE && *bytes != SSL3_RT_ALERT)
        return fail(t, "it speaks no TLS");
    t->begun = t->begun || len;
    t->in = bytes;
    t->in_len = len;
    return t->ready ? 0 : step_handshake(t);
}

ssize_t tls_take(struct tls *t, uint8_t *to, size_t cap)
{
    if (t->failed)
        return -EACCES;
    if (!t->ready || t->ended || !cap)
        return 0;
    ERR_clear_error();
    int n = SSL_read(t->ssl, to, cap < TLS_RECORD ? (int)cap : (int)TLS_RECORD);
    if (n > 0)
        return n;
    int what = SSL_get_error(t->ssl, n);
    t->ended = what == SSL_ERROR_ZERO_RETURN;
    return t->ended || what == SSL_ERROR_WANT_READ ? 0 : fail_ssl(t);
}

static int record_put(struct tls *t, const uint8_t *bytes, size_t len)
{
    if (t->keyed > KEY_BYTES) {
        t->keyed = 0;
        SSL_key_update(t->ssl, SSL_KEY_UPDATE_NOT_REQUESTED);
    }
    t->keyed += len;
    ERR_clear_error();
    return SSL_write(t->ssl, bytes, (int)len) == (int)len ? 0 : fail_ssl(t);
}

int tls_flush(struct tls *t)
{
    size_t len = t->gathered;
    t->gathered = 0;
    return t->failed ? -EACCES : len ? record_put(t, t->gather, len) : 0;
}

int tls_put(struct tls *t, const uint8_t *bytes, size_t len)
{
    int rc = t->failed || !t->ready ? -EACCES : 0;
    while (!rc && len) {
        if (!t->gathered && len >= TLS_RECORD) {
            rc = record_put(t, bytes, TLS_RECORD);
            bytes += TLS_RECORD;
            len -= TLS_RECORD;
            continue;
        }
        size_t n = TLS_RECORD - t->gathered < len ? TLS_RECORD - t->gathered : len;
        memcpy(t->gather + t->gathered, bytes, n);
        t->gathered += n;
        bytes += n;
        len -= n;
        if (t->gathered == TLS_RECORD)
            rc = tls_flush(t);
    }
    return rc;
}

void tls_bye(struct tls *t)
{
    if (t->ready && !t->failed)
        SSL_shutdown(t->ssl);
    ERR_clear_error();
}

size_t tls_out(struct tls *t, const uint8_t **bytes)
{
    *bytes = t->out + t->out_start;
    return t->out_end - t->out_start;
}

void tls_sent(struct tls *t, size_t len)
{
    t->out_start += len;
    if (t->out_start == t->out_end && t->out_cap > 8 * OUT_MIN) { /* a burst is over */
        free(t->out);
        t->out = NULL;
        t->out_start = t->out_end = t->out_cap = 0;
    }
}

uint8_t *tls_out_take(struct tls *t, size_t *at, size_t *len)
{
    uint8_t *all = t->out;
    *at = t->out_start;
    *len = t->out_end - t->out_start;
    t->out = NULL;
    t->out_start = t->out_end = t->out_cap = 0;
    return all;
}

bool tls_begun(const struct tls *t)
{
    return t->begun;
}

bool tls_ready(const struct tls *t)
{
    return t->ready;
}

bool tls_ended(const struct tls *t)
{
    return t->ended;
}

bool tls_failed(const struct tls *t)
{
    return t->failed;
}

const char *tls_why(const struct tls *t)
{
    return t->why;
}

const char *tls_peer(const struct tls *t)
{
    return t->ready ? t->peer : NULL;
}
