/* TLS 1.3 as steps over bytes, by OpenSSL: ciphertext in, plaintext out, and the other way. No I/O and no waiting.
 *
 * What a side shows and asks for is a tls_config: a directory of certificates (ca-cert.pem, and server-cert.pem and
 * server-key.pem, or client-...), a file of pre-shared keys (`IDENTITY:HEXKEY` lines, as GnuTLS's psktool writes them; a
 * client shows the first), or both: the key is tried first. Both sides prove who they are, always: there is no way to
 * be let in without a certificate of that authority or one of the keys. Pre-shared keys are used together with an
 * ephemeral exchange only, so that a key that becomes known later opens no old recordings. There are no session
 * tickets, no early data and no renegotiation, and nothing older than TLS 1.3.
 *
 * States of a struct tls: handshake -> ready -> ended (the peer said close_notify) or failed. A failed one takes
 * nothing more, but may still have an alert to send (tls_out): the peer is owed the reason. It becomes ready only when
 * the peer has been verified: for a client the authority, the host's name and the dates; for a server the authority,
 * the dates, and that it is a client's certificate.
 *
 * Loop thread only, as are configs; each object for itself may be anywhere. A config lives as long as its process. */
#ifndef NET_TLS_H
#define NET_TLS_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define TLS_ERROR 512u
#define TLS_PEER 256u
#define TLS_RECORD 16384u

struct tls_config;
struct tls;

/* Either may be NULL, not both. NULL: error says what is wrong with which file. Key files that others can read are
 * refused. */
struct tls_config *tls_config_load(bool server, const char *cert_dir, const char *psk_file, char error[TLS_ERROR]);
/* Reads the files anew, for what begins from now on. When one is wrong all stays as it was: -EINVAL and error. */
int tls_config_reload(struct tls_config *c, char error[TLS_ERROR]);
void tls_config_free(struct tls_config *c); /* NULL allowed */

/* What this process shows where it dials; NULL: it dials without TLS. */
void tls_dial_set(struct tls_config *c);
struct tls_config *tls_dial_config(void);
/* From MEMSYNC_TLS (auto, require, off), MEMSYNC_CERT_DIR and MEMSYNC_PSK_FILE; options of the command line, when not
 * NULL, come before them. Sets tls_dial_set when there is anything, and says the values used. 0, or -EINVAL and error.
 */
struct tls_choice {
    const char *mode, *cert_dir, *psk_file;
};
int tls_choose(struct tls_choice *c, char error[TLS_ERROR]);
int tls_dial_setup(const struct tls_choice *c, char error[TLS_ERROR]);

/* host: a client's: the name or address that the certificate of the server has to be of. NULL without memory. */
struct tls *tls_new(struct tls_config *c, const char *host);
void tls_free(struct tls *t); /* NULL allowed */

/* Ciphertext that came; it is not copied, and has to stay until tls_take has answered 0 or less. Len 0 begins a client's
 * handshake. 0, or a negative errno: failed, see tls_why. */
int tls_feed(struct tls *t, const uint8_t *bytes, size_t len);
/* Plaintext of at most a record: how much; 0: no more of what was fed; negative errno: failed. */
ssize_t tls_take(struct tls *t, uint8_t *to, size_t cap);
/* Plaintext to go, when ready. Gathered into whole records; tls_flush ends the last one. 0 or a negative errno. */
int tls_put(struct tls *t, const uint8_t *bytes, size_t len);
int tls_flush(struct tls *t);
void tls_bye(struct tls *t); /* close_notify: nothing more is put */
/* Ciphertext to send; tls_sent takes it off. Bytes stay where they are until the next tls_ call. */
size_t tls_out(struct tls *t, const uint8_t **bytes);
void tls_sent(struct tls *t, size_t len);
/* The same, off for good: bytes [*at, *at + *len) of what is returned, which is the caller's to free. */
uint8_t *tls_out_take(struct tls *t, size_t *at, size_t *len);

bool tls_begun(const struct tls *t); /* something came */
bool tls_ready(const struct tls *t);
bool tls_ended(const struct tls *t);
bool tls_failed(const struct tls *t);
const char *tls_why(const struct tls *t);  /* of a failed one */
const char *tls_peer(const struct tls *t); /* of a ready one: the certificate's name (CN, else its first DNS name), or the
                                              key's identity */

#endif
