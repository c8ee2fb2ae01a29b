#include "agent/cli/peer.h"
#include "agent/cli/cli.h"
#include "agent/cli/dial.h"
#include "agent/net/conn.h"

#include <errno.h>
#include <poll.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

static int die(struct peer *p, int err, const char *format, ...) __attribute__((format(printf, 3, 4)));

static int die(struct peer *p, int err, const char *format, ...)
{
    if (p->dead)
        return p->dead;
    p->dead = err;
    va_list ap;
    va_start(ap, format);
    vsnprintf(p->error, sizeof p->error, format, ap);
    va_end(ap);
    return err;
}

/* Reads what there is, after waiting for it. */
static int fill(struct peer *p)
{
    if (p->in_start) {
        memmove(p->in, p->in + p->in_start, p->in_end - p->in_start);
        p->in_end -= p->in_start;
        p->in_start = 0;
    }
    if (p->tls) {
        ssize_t more = dial_tls_read(p, p->in + p->in_end, sizeof p->in - p->in_end);
        if (more < 0)
            return p->dead = (int)more;
        p->in_end += (size_t)more;
        return 0;
    }
    struct pollfd q = {.fd = p->fd, .events = POLLIN};
    int n;
    while ((n = poll(&q, 1, PEER_SILENCE_MS)) < 0 && errno == EINTR)
        ;
    if (n == 0)
        return die(p, -ETIMEDOUT, "%s has been silent for %d s", p->address, PEER_SILENCE_MS / 1000);
    ssize_t got = recv(p->fd, p->in + p->in_end, sizeof p->in - p->in_end, 0);
    if (got < 0 && errno == EINTR)
        return 0;
    if (got < 0)
        return die(p, -errno, "the connection to %s is lost: %m", p->address);
    if (got == 0)
        return die(p, -ECONNRESET, "%s has closed the connection", p->address);
    p->in_end += (size_t)got;
    return 0;
}

static int send_frame(struct peer *p, uint32_t stream, uint8_t type, const void *payload, size_t len)
{
    if (p->dead)
        return p->dead;
    uint8_t header[FRAME_HEADER];
    frame_header_put(header, type, stream, stream ? p->order++ : 0, (uint32_t)len, frame_payload_hash(payload, len));
    if (p->tls)
        return p->dead = dial_tls_write(p, header, sizeof header) ?: dial_tls_write(p, payload, len) ?: dial_tls_flush(p);
    struct iovec iov[2] = {{header, sizeof header}, {(void *)payload, len}};
    struct msghdr m = {.msg_iov = iov, .msg_iovlen = 2};
    while (iov[0].iov_len + iov[1].iov_len) {
        ssize_t n = sendmsg(p->fd, &m, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return die(p, -errno, errno == EAGAIN ? "%s takes no more bytes" : "the connection to %s is lost: %m",
                       p->address);
        for (int i = 0; i < 2; i++) {
            size_t k = (size_t)n < iov[i].iov_len ? (size_t)n : iov[i].iov_len;
            iov[i].iov_base = (uint8_t *)iov[i].iov_base + k;
            iov[i].iov_len -= k;
            n -= (ssize_t)k;
        }
    }
    return 0;
}

int peer_send(struct peer *p, uint8_t type, const void *payload, size_t len)
{
    p->window -= conn_window(type, payload, (uint32_t)len);
    return send_frame(p, PEER_STREAM, type, payload, len);
}

int peer_send_control(struct peer *p, uint8_t type, const void *payload, size_t len)
{
    return send_frame(p, 0, type, payload, len);
}

/* The frame handed out last is used up. */
static int used(struct peer *p)
{
    p->in_start += p->handed;
    p->handed = 0;
    p->owed += p->used;
    p->used = 0;
    if (p->owed < FRAME_WINDOW / 16)
        return 0;
    uint8_t more[8];
    put_u32(more, PEER_STREAM);
    put_u32(more + 4, p->owed);
    p->owed = 0;
    return peer_send_control(p, FRAME_WINDOW_MORE, more, sizeof more);
}

/* What the other side says goes to a terminal. */
static void printable(char *text)
{
    for (; *text; text++)
        if ((unsigned char)*text < ' ' || *text == 0x7f)
            *text = '?';
}

/* Stream 0. 1: it was the connection's own business. */
static int own_business(struct peer *p, const struct peer_frame *f)
{
    static struct frame_failed e;
    switch (f->type) {
    case FRAME_PING:
        return peer_send_control(p, FRAME_PONG, f->payload, f->len) ?: 1;
    case FRAME_PONG:
        return 1;
    case FRAME_WINDOW_MORE:
        if (f->len != 8)
            return peer_unexpected(p, f);
        if (get_u32(f->payload) == PEER_STREAM)
            p->window += get_u32(f->payload + 4);
        return 1;
    case FRAME_ERROR:
        if (frame_failed_get(f->payload, f->len, &e))
            return peer_unexpected(p, f);
        printable(e.text);
        return die(p, -ECONNABORTED, "%s ended the connection: %s", p->address, e.text);
    case FRAME_CLOSE:
        return die(p, -ECONNABORTED, "%s is stopping", p->address);
    }
    return 0;
}

/* One step: a frame looked at, or bytes waited for. 1: the frame in f is the caller's. 0: go on. Else p->dead. */
static int step(struct peer *p, struct peer_frame *f)
{
    struct frame_header h;
    if (p->dead || used(p))
        return p->dead;
    int64_t n = frame_step(p->in + p->in_start, p->in_end - p->in_start, &h);
    if (n < 0)
        return die(p, (int)n, "%s sends what is no frame of this protocol", p->address);
    if (n == 0)
        return fill(p);
    p->handed = (size_t)n;
    *f = (struct peer_frame){h.type, h.stream, h.len, p->in + p->in_start + FRAME_HEADER};
    if (h.type == FRAME_DATA || h.type == FRAME_HASHES)
        p->used = h.len;
    int rc = own_business(p, f);
    return rc < 0 ? rc : !rc;
}

int peer_next(struct peer *p, struct peer_frame *f)
{
    int rc;
    while ((rc = step(p, f)) == 0)
        ;
    return rc < 0 ? rc : 0;
}

int peer_window(struct peer *p, uint32_t bytes, struct peer_frame *f)
{
    int rc = p->dead;
    while (!rc && p->window < bytes)
        rc = step(p, f);
    return rc;
}

int peer_failed(struct peer *p, const struct peer_frame *f)
{
    static struct frame_failed e;
    if (frame_failed_get(f->payload, f->len, &e))
        return peer_unexpected(p, f);
    int err = frame_code_errno(e.code);
    printable(e.text);
    snprintf(p->error, sizeof p->error, "%s", *e.text ? e.text : strerror(-err));
    return err;
}

int peer_unexpected(struct peer *p, const struct peer_frame *f)
{
    return die(p, -EPROTO, "%s answers with a frame (type %u) that has no place here; is it of another version?",
               p->address, f->type);
}

static int greet(struct peer *p)
{
    uint8_t payload[FRAME_PAYLOAD_MAX];
    struct frame_hello h = {.version = FRAME_VERSION};
    id_new(&h.identity);
    if (gethostname(h.host, sizeof h.host - 16))
        h.host[0] = 0;
    h.host[sizeof h.host - 17] = 0;
    strcat(h.host, " (memsync)");
    struct peer_frame f;
    if (peer_send_control(p, FRAME_HELLO, payload, frame_hello_put(payload, sizeof payload, &h)) || peer_next(p, &f))
        return p->dead;
    if (f.type != FRAME_HELLO || frame_hello_get(f.payload, f.len, &h))
        return peer_unexpected(p, &f);
    if (h.version != FRAME_VERSION)
        return die(p, -EPROTONOSUPPORT,
                   "%s speaks version %u of the protocol, this program %u; use the same release on both", p->address,
                   h.version, FRAME_VERSION);
    memcpy(p->host, h.host, sizeof p->host);
    return 0;
}

struct peer *peer_open(const char *address, bool make_store)
{
    if (!address) {
        cli_say("no remote; give --remote ADDRESS or set MEMSYNC_REMOTE");
        return NULL;
    }
    struct peer *p = calloc(1, sizeof *p);
    if (!p) {
        cli_say("no memory");
        return NULL;
    }
    p->fd = -1;
    p->address = address;
    p->window = FRAME_WINDOW;
    if (dial(p, make_store) || greet(p)) {
        cli_say("%s", p->error);
        peer_close(p);
        return NULL;
    }
    return p;
}

void peer_close(struct peer *p)
{
    if (!p)
        return;
    if (p->tls && p->fd >= 0 && !p->dead) {
        tls_bye(p->tls);
        dial_tls_flush(p);
    }
    tls_free(p->tls);
    if (p->fd >= 0)
        close(p->fd);
    dial_end(p);
    free(p);
}

int peer_pin(struct peer *p, const char *name, uint32_t *pin, struct frame_entry *e)
{
    uint8_t payload[NAME_CAP + 16];
    struct wr w = wr_over(payload, sizeof payload);
    wr_u32(&w, 1);
    wr_str(&w, name);
    struct peer_frame f;
    uint32_t request;
    if (peer_send(p, FRAME_PIN, payload, wr_len(&w)) || peer_next(p, &f))
        return p->dead;
    if (f.type == FRAME_FAILED)
        return peer_failed(p, &f);
    if (f.type != FRAME_PINNED || frame_pinned_get(f.payload, f.len, &request, pin, e))
        return peer_unexpected(p, &f);
    return 0;
}

int peer_unpin(struct peer *p, uint32_t pin)
{
    uint8_t payload[4];
    put_u32(payload, pin);
    return peer_send(p, FRAME_UNPIN, payload, sizeof payload);
}
