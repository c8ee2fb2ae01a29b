/* keygen and certs: what TLS shows (agent/net/tls.h). Files are made whole, under a name of their own, or not at all;
 * one that is there is never written over. Keys have mode 0600. */
#include "agent/cli/cli.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <openssl/bn.h>
#include <openssl/evp.h>
#include <openssl/pem.h>
#include <openssl/rand.h>
#include <openssl/x509v3.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define DAYS 3650L
#define SKEW 3600L /* clocks that are behind ours */
#define KEY_BYTES 32

int command_keygen(const struct args *a)
{
    const char *file = a->words[0], *name = a->name ? a->name : "memsync";
    unsigned char key[KEY_BYTES];
    char line[512];
    if (strlen(name) > 255 || !*name || strpbrk(name, " \t\r\n"))
        return cli_fail(CLI_USAGE, "--name is 1 to 255 bytes without blanks");
    if (RAND_bytes(key, sizeof key) != 1)
        return cli_fail(CLI_FAILED, "there are no random numbers");
    int n = snprintf(line, sizeof line, "%s:", name);
    for (size_t i = 0; i < sizeof key; i++)
        n += snprintf(line + n, sizeof line - (size_t)n, "%02x", key[i]);
    line[n++] = '\n';
    int fd = open(file, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0)
        return cli_fail(CLI_FAILED, "%s: %s", file, strerror(errno));
    bool good = write(fd, line, (size_t)n) == n && !fsync(fd);
    int err = errno;
    OPENSSL_cleanse(line, sizeof line);
    OPENSSL_cleanse(key, sizeof key);
    close(fd);
    if (!good) {
        unlink(file);
        return cli_fail(CLI_FAILED, "%s: %s", file, strerror(err));
    }
    printf("%s: a key for %s; both sides need a copy, and nobody else may have one\n", file, name);
    return CLI_DONE;
}

/* Certificates */

struct issuer {
    X509 *cert;
    EVP_PKEY *key;
};

static bool path_of(char to[4096], const char *dir, const char *what, const char *kind)
{
    return (size_t)snprintf(to, 4096, "%s/%s-%s.pem", dir, what, kind) < 4096;
}

static FILE *create(const char *path, mode_t mode)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
    return fd < 0 ? NULL : fdopen(fd, "w");
}

static bool put(FILE *f, const char *path, bool written)
{
    bool good = f && written && !fflush(f) && !fsync(fileno(f));
    if (f)
        fclose(f);
    if (f && !good)
        unlink(path);
    return good;
}

static bool pair_write(const char *dir, const char *what, const struct issuer *i)
{
    char key[4096], cert[4096];
    if (!path_of(key, dir, what, "key") || !path_of(cert, dir, what, "cert"))
        return false;
    FILE *f = create(key, 0600);
    if (!put(f, key, f && PEM_write_PrivateKey(f, i->key, NULL, NULL, 0, NULL, NULL)))
        return false;
    f = create(cert, 0644);
    if (put(f, cert, f && PEM_write_X509(f, i->cert)))
        return true;
    int err = errno;
    unlink(key);
    errno = err;
    return false;
}

static bool extend(X509 *cert, X509 *by, int nid, const char *value)
{
    X509V3_CTX ctx;
    X509V3_set_ctx_nodb(&ctx);
    X509V3_set_ctx(&ctx, by, cert, NULL, NULL, 0);
    X509_EXTENSION *e = X509V3_EXT_conf_nid(NULL, &ctx, nid, value);
    bool good = e && X509_add_ext(cert, e, -1);
    X509_EXTENSION_free(e);
    return good;
}

static bool serial_set(X509 *cert)
{
    BIGNUM *n = BN_new();
    bool good = n && BN_rand(n, 127, BN_RAND_TOP_ONE, BN_RAND_BOTTOM_ANY) &&
                BN_to_ASN1_INTEGER(n, X509_get_serialNumber(cert));
    BN_free(n);
    return good;
}

/* by NULL: it vouches for itself. */
static bool issue(struct issuer *to, const struct issuer *by, const char *name, const char *usage, const char *names)
{
    to->key = EVP_EC_gen("P-256");
    to->cert = X509_new();
    X509 *c = to->cert, *from = by ? by->cert : c;
    if (!to->key || !c)
        return false;
    X509_NAME *subject = X509_get_subject_name(c);
    return X509_set_version(c, X509_VERSION_3) && serial_set(c) && X509_gmtime_adj(X509_getm_notBefore(c), -SKEW) &&
           X509_time_adj_ex(X509_getm_notAfter(c), (int)DAYS, 0, NULL) && X509_set_pubkey(c, to->key) &&
           X509_NAME_add_entry_by_txt(subject, "CN", MBSTRING_UTF8, (const unsigned char *)name, -1, -1, 0) &&
           X509_set_issuer_name(c, X509_get_subject_name(from)) &&
           extend(c, from, NID_basic_constraints, by ? "critical,CA:FALSE" : "critical,CA:TRUE,pathlen:0") &&
           extend(c, from, NID_key_usage, by ? "critical,digitalSignature" : "critical,keyCertSign,cRLSign") &&
           extend(c, from, NID_subject_key_identifier, "hash") &&
           extend(c, from, NID_authority_key_identifier, "keyid:always") &&
           (!usage || extend(c, from, NID_ext_key_usage, usage)) &&
           (!names || extend(c, from, NID_subject_alt_name, names)) && X509_sign(c, by ? by->key : to->key, EVP_sha256());
}

static void issuer_free(struct issuer *i)
{
    X509_free(i->cert);
    EVP_PKEY_free(i->key);
    *i = (struct issuer){0};
}

static bool authority_read(const char *dir, struct issuer *to)
{
    char key[4096], cert[4096];
    path_of(key, dir, "ca", "key");
    path_of(cert, dir, "ca", "cert");
    FILE *k = fopen(key, "re"), *c = fopen(cert, "re");
    to->key = k ? PEM_read_PrivateKey(k, NULL, NULL, NULL) : NULL;
    to->cert = c ? PEM_read_X509(c, NULL, NULL, NULL) : NULL;
    if (k)
        fclose(k);
    if (c)
        fclose(c);
    return to->key && to->cert;
}

static bool is_there(const char *dir, const char *what, const char *kind)
{
    char path[4096];
    struct stat st;
    return path_of(path, dir, what, kind) && !lstat(path, &st);
}

static bool name_add(char *to, size_t cap, const char *name)
{
    struct in6_addr any;
    bool ip = inet_pton(AF_INET, name, &any) == 1 || inet_pton(AF_INET6, name, &any) == 1;
    size_t n = strlen(to);
    /* They go into OpenSSL's own syntax. */
    if (!*name || strspn(name, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_:*") != strlen(name) ||
        (!ip && strchr(name, ':')))
        return false;
    return (size_t)snprintf(to + n, cap - n, "%s%s:%s", n ? "," : "", ip ? "IP" : "DNS", name) < cap - n;
}

static int certs_failed(const char *dir, const char *what)
{
    return cli_fail(CLI_FAILED, "%s/%s-key.pem and %s-cert.pem cannot be made: %s", dir, what, what,
                    errno ? strerror(errno) : "OpenSSL does not do it");
}

static int leaf(const char *dir, const char *what, const struct issuer *ca, const char *name, const char *usage,
                const char *names)
{
    struct issuer one = {0};
    if (is_there(dir, what, "key") || is_there(dir, what, "cert"))
        return CLI_DONE;
    errno = 0;
    bool good = issue(&one, ca, name, usage, names) && pair_write(dir, what, &one);
    issuer_free(&one);
    if (!good)
        return certs_failed(dir, what);
    printf("%s/%s-cert.pem: %s%s%s\n", dir, what, name, names ? ", for " : "", names ? names : "");
    return CLI_DONE;
}

static int authority(const char *dir, struct issuer *ca)
{
    errno = 0;
    if (is_there(dir, "ca", "cert") || is_there(dir, "ca", "key"))
        return authority_read(dir, ca) ? CLI_DONE
                                       : cli_fail(CLI_FAILED, "%s: ca-key.pem and ca-cert.pem cannot both be read", dir);
    if (!issue(ca, NULL, "memsync authority", NULL, NULL) || !pair_write(dir, "ca", ca))
        return certs_failed(dir, "ca");
    printf("%s/ca-cert.pem: the authority; its key, ca-key.pem, is needed only to make more, and best kept elsewhere\n",
           dir);
    return CLI_DONE;
}

int command_certs(const struct args *a)
{
    const char *dir = a->words[0], *name = a->name ? a->name : "client";
    char host[256] = "", names[4096] = "";
    gethostname(host, sizeof host - 1);
    for (int i = 1; i < a->count; i++)
        if (!name_add(names, sizeof names, a->words[i]))
            return cli_fail(CLI_USAGE, "%s is no host name and no address", a->words[i]);
    if (a->count < 2) {
        name_add(names, sizeof names, host);
        name_add(names, sizeof names, "localhost");
        name_add(names, sizeof names, "127.0.0.1");
        name_add(names, sizeof names, "::1");
    }
    if (!*name || strlen(name) > 64 || strpbrk(name, " \t\r\n"))
        return cli_fail(CLI_USAGE, "--name is 1 to 64 bytes without blanks");
    if (strlen(dir) > 4000)
        return cli_fail(CLI_USAGE, "the path is too long");
    if (mkdir(dir, 0700) && errno != EEXIST)
        return cli_fail(CLI_FAILED, "%s: %s", dir, strerror(errno));
    const char *server = a->count > 1 ? a->words[1] : *host && strlen(host) <= 64 ? host : "localhost";
    struct issuer ca = {0};
    int code = authority(dir, &ca);
    if (!code)
        code = leaf(dir, "server", &ca, strlen(server) <= 64 ? server : "server", "serverAuth", names);
    if (!code)
        code = leaf(dir, "client", &ca, name, "clientAuth", NULL);
    issuer_free(&ca);
    return code;
}
