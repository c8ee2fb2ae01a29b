/* Credentials: from files to an SSL_CTX, which a reload replaces whole or not at all. */
#include "agent/net/tls_private.h"

#include <errno.h>
#include <openssl/err.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

static struct tls_config *dial_config;

const char *tls_reason(char *to, size_t cap)
{
    unsigned long e = ERR_peek_error();
    const char *text = ERR_reason_error_string(e);
    if (ERR_SYSTEM_ERROR(e))
        text = strerror(ERR_GET_REASON(e));
    snprintf(to, cap, "%s", text ? text : "no reason is given");
    ERR_clear_error();
    return to;
}

int tls_secret_check(const char *file, char error[TLS_ERROR])
{
    struct stat st;
    if (stat(file, &st) < 0)
        snprintf(error, TLS_ERROR, "%s: %m", file);
    else if (!S_ISREG(st.st_mode))
        snprintf(error, TLS_ERROR, "%s is no regular file", file);
    else if (st.st_mode & 077)
        snprintf(error, TLS_ERROR, "%s holds a secret that others can use: chmod 600 it", file);
    else
        return 0;
    return -EINVAL;
}

static int cert_fault(const char *file, char error[TLS_ERROR])
{
    char why[256];
    snprintf(error, TLS_ERROR, "%.240s: %s", file, tls_reason(why, sizeof why));
    return -EINVAL;
}

static int certs_use(SSL_CTX *ctx, const struct tls_config *c, char error[TLS_ERROR])
{
    char ca[4200], cert[4200], key[4200];
    const char *role = c->server ? "server" : "client";
    snprintf(ca, sizeof ca, "%.4096s/ca-cert.pem", c->cert_dir);
    snprintf(cert, sizeof cert, "%.4096s/%s-cert.pem", c->cert_dir, role);
    snprintf(key, sizeof key, "%.4096s/%s-key.pem", c->cert_dir, role);
    if (tls_secret_check(key, error))
        return -EINVAL;
    if (!SSL_CTX_load_verify_file(ctx, ca))
        return cert_fault(ca, error);
    if (SSL_CTX_use_certificate_chain_file(ctx, cert) != 1)
        return cert_fault(cert, error);
    if (SSL_CTX_use_PrivateKey_file(ctx, key, SSL_FILETYPE_PEM) != 1 || !SSL_CTX_check_private_key(ctx))
        return cert_fault(key, error);
    if (c->server) {
        STACK_OF(X509_NAME) *names = SSL_load_client_CA_file(ca);
        if (names)
            SSL_CTX_set_client_CA_list(ctx, names);
    }
    return 0;
}

static SSL_CTX *ctx_new(const struct tls_config *c, char error[TLS_ERROR])
{
    static const unsigned char own[] = "memsync";
    char why[256];
    struct tls_keys *keys = c->psk_file ? tls_keys_read(c->psk_file, error) : NULL;
    if (c->psk_file && !keys)
        return NULL;
    SSL_CTX *ctx = SSL_CTX_new(c->server ? TLS_server_method() : TLS_client_method());
    if (!ctx || !SSL_CTX_set_min_proto_version(ctx, TLS1_3_VERSION) ||
        !SSL_CTX_set_max_proto_version(ctx, TLS1_3_VERSION) ||
        !SSL_CTX_set_ciphersuites(ctx, "TLS_AES_128_GCM_SHA256:TLS_CHACHA20_POLY1305_SHA256:TLS_AES_256_GCM_SHA384") ||
        (c->server && !SSL_CTX_set_session_id_context(ctx, own, sizeof own - 1)) || !SSL_CTX_set_num_tickets(ctx, 0)) {
        snprintf(error, TLS_ERROR, "OpenSSL: %s", tls_reason(why, sizeof why));
        SSL_CTX_free(ctx);
        return NULL;
    }
    SSL_CTX_set_session_cache_mode(ctx, SSL_SESS_CACHE_OFF);
    SSL_CTX_set_options(ctx, SSL_OP_NO_TICKET | SSL_OP_NO_RENEGOTIATION | SSL_OP_CIPHER_SERVER_PREFERENCE);
    SSL_CTX_set_mode(ctx, SSL_MODE_RELEASE_BUFFERS);
    SSL_CTX_set_verify(ctx, SSL_VERIFY_PEER | SSL_VERIFY_FAIL_IF_NO_PEER_CERT, NULL);
    if (keys && !tls_keys_use(ctx, keys, c->server))
        snprintf(error, TLS_ERROR, "no memory");
    else if (!c->cert_dir || !certs_use(ctx, c, error))
        return ctx;
    SSL_CTX_free(ctx);
    return NULL;
}

/* A daemon's directory is not the one it was told the name in. */
static bool keep_path(char **to, const char *path, char error[TLS_ERROR])
{
    if (!path || (*to = realpath(path, NULL)))
        return true;
    snprintf(error, TLS_ERROR, "%s: %m", path);
    return false;
}

struct tls_config *tls_config_load(bool server, const char *cert_dir, const char *psk_file, char error[TLS_ERROR])
{
    struct tls_config *c = calloc(1, sizeof *c);
    if (!c) {
        snprintf(error, TLS_ERROR, "no memory");
        return NULL;
    }
    c->server = server;
    if (keep_path(&c->cert_dir, cert_dir, error) && keep_path(&c->psk_file, psk_file, error) &&
        (c->ctx = ctx_new(c, error)))
        return c;
    tls_config_free(c);
    return NULL;
}

int tls_config_reload(struct tls_config *c, char error[TLS_ERROR])
{
    SSL_CTX *ctx = ctx_new(c, error);
    if (!ctx)
        return -EINVAL;
    SSL_CTX_free(c->ctx);
    c->ctx = ctx;
    return 0;
}

void tls_config_free(struct tls_config *c)
{
    if (!c)
        return;
    SSL_CTX_free(c->ctx);
    free(c->cert_dir);
    free(c->psk_file);
    free(c);
}

void tls_dial_set(struct tls_config *c)
{
    dial_config = c;
}

struct tls_config *tls_dial_config(void)
{
    return dial_config;
}

static const char *variable(const char *given, const char *name)
{
    const char *value = given ? given : getenv(name);
    return value && *value ? value : NULL;
}

int tls_choose(struct tls_choice *c, char error[TLS_ERROR])
{
    c->mode = variable(c->mode, "MEMSYNC_TLS");
    c->cert_dir = variable(c->cert_dir, "MEMSYNC_CERT_DIR");
    c->psk_file = variable(c->psk_file, "MEMSYNC_PSK_FILE");
    bool off = c->mode && !strcmp(c->mode, "off"), require = c->mode && !strcmp(c->mode, "require");
    if (c->mode && !off && !require && strcmp(c->mode, "auto")) {
        snprintf(error, TLS_ERROR, "TLS is auto, require or off, not %s", c->mode);
        return -EINVAL;
    }
    if (off)
        c->cert_dir = c->psk_file = NULL;
    if (require && !c->cert_dir && !c->psk_file) {
        snprintf(error, TLS_ERROR,
                 "TLS is required, but there is nothing to show: set MEMSYNC_CERT_DIR or MEMSYNC_PSK_FILE "
                 "(memsync certs and memsync keygen make them)");
        return -EINVAL;
    }
    return 0;
}

int tls_dial_setup(const struct tls_choice *c, char error[TLS_ERROR])
{
    if (!c->cert_dir && !c->psk_file)
        return 0;
    struct tls_config *config = tls_config_load(false, c->cert_dir, c->psk_file, error);
    if (config)
        tls_dial_set(config);
    return config ? 0 : -EINVAL;
}
