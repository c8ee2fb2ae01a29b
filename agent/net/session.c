/* One peer of a server: greeting, handles, and which part of the session a frame is for.
 *
 * A session lives from server_take until its connection's `closed`. leaving: the server stops; open epochs are dropped,
 * nothing new is taken, and when all that was handed in is answered, the connection is closed. */
#include "agent/net/server_private.h"

#include "agent/base/log.h"
#include "agent/base/xxh3.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

void session_reply(struct session *s, uint32_t stream, uint8_t type, const void *payload, size_t len)
{
    struct buf *b = stream ? buf_new(len) : NULL;
    if (!stream)
        return; /* closed meanwhile */
    if (!b) {
        session_violated(s, "no memory for an answer");
        return;
    }
    if (len)
        memcpy(b->data, payload, len);
    b->len = (uint32_t)len;
    conn_send(s->conn, stream, type, b);
}

void session_failed(struct session *s, uint32_t stream, uint64_t seq, uint16_t code, const char *text)
{
    struct frame_failed f = {.seq = seq, .code = code};
    snprintf(f.text, sizeof f.text, "%s", text);
    uint8_t payload[sizeof f + 16];
    session_reply(s, stream, FRAME_FAILED, payload, frame_failed_put(payload, sizeof payload, &f));
}

void session_violated(struct session *s, const char *what)
{
    log_warn("%s (%s): %s; connection closed", conn_peer(s->conn), s->peer.host, what);
    conn_close(s->conn, false, FRAME_E_PROTOCOL, what);
}

void session_end(struct session *s, int err, const char *why)
{
    log_warn("%s (%s): connection closed: %s", conn_peer(s->conn), s->peer.host, why);
    conn_close(s->conn, false, frame_code_from(err), why);
}

bool session_may(const struct session *s, const char *name, unsigned right)
{
    return s->local || !s->server->grants || grants_of(s->server->grants, conn_identity(s->conn), name) & right;
}

const char *session_denied(struct session *s, const char *name, unsigned right)
{
    if (session_may(s, name, right))
        return NULL;
    const char *who = conn_identity(s->conn);
    if (!s->told)
        log_warn("%s (%s) is refused to %s %s: not granted to %s", conn_peer(s->conn), s->peer.host,
                 right == GRANT_READ ? "read" : right == GRANT_WRITE ? "write" : "administer", name,
                 who ? who : "one without an identity");
    s->told = true;
    return right == GRANT_READ    ? "the server's grants do not let this peer read the region"
           : right == GRANT_WRITE ? "the server's grants do not let this peer write the region"
                                  : "the server's grants do not let this peer administer the region";
}

/* Handles */

static struct handle_list *id_bucket(struct session *s, uint32_t id)
{
    return &s->by_id[id % SESSION_BUCKETS];
}

static struct handle_list *name_bucket(struct session *s, const char *name)
{
    return &s->by_name[XXH3_64bits(name, strlen(name)) % SESSION_BUCKETS];
}

struct handle *session_handle(struct session *s, uint32_t id)
{
    struct handle *h;
    TAILQ_FOREACH(h, id_bucket(s, id), by_id)
    if (h->id == id)
        return h;
    return NULL;
}

bool session_handle_rename(struct session *s, struct handle *h, const char *name)
{
    char *copy = strdup(name);
    if (!copy)
        return false;
    TAILQ_REMOVE(name_bucket(s, h->name), h, by_name);
    free(h->name);
    h->name = copy;
    TAILQ_INSERT_TAIL(name_bucket(s, h->name), h, by_name);
    return true;
}

static void handle_free(struct session *s, struct handle *h)
{
    TAILQ_REMOVE(id_bucket(s, h->id), h, by_id);
    TAILQ_REMOVE(name_bucket(s, h->name), h, by_name);
    s->handles--;
    free(h->name);
    free(h);
}

/* NULL: too many, or no memory. A handle given anew stands for the new name. */
static struct handle *handle_put(struct session *s, uint32_t id, const char *name, bool write)
{
    struct handle *h = session_handle(s, id);
    if (h) {
        h->write = write;
        return session_handle_rename(s, h, name) ? h : NULL;
    }
    if (s->handles >= SESSION_HANDLES || !(h = calloc(1, sizeof *h)))
        return NULL;
    if (!(h->name = strdup(name))) {
        free(h);
        return NULL;
    }
    h->id = id;
    h->write = write;
    TAILQ_INSERT_TAIL(id_bucket(s, id), h, by_id);
    TAILQ_INSERT_TAIL(name_bucket(s, name), h, by_name);
    s->handles++;
    return h;
}

/* Attaching. The store may have to ask others first; until it answers, the handle means nothing. */

static void attach_answer(struct session *s, struct attaching *a, struct frame_attached *to)
{
    to->handle = a->handle;
    if (to->status <= FRAME_ATTACH_EXISTS && !handle_put(s, a->handle, a->name, a->write)) {
        to->status = FRAME_ATTACH_BAD;
        snprintf(to->holder, sizeof to->holder, "too many regions on one connection");
    }
    uint8_t payload[sizeof *to + 16];
    session_reply(s, a->stream, FRAME_ATTACHED, payload, frame_attached_put(payload, sizeof payload, to));
}

static void detach(struct session *s, uint32_t id);

static void attaching_free(struct attaching *a)
{
    struct server *server = a->server;
    free(a->name);
    free(a);
    server->work--;
    server_look(server);
}

static void on_attached(void *arg, int err, const struct frame_attached *to)
{
    struct attaching *a = arg;
    struct session *s = a->session;
    if (s) {
        TAILQ_REMOVE(&s->attaching, a, link);
        s->attaching_n--;
    }
    if (s && err < 0) {
        session_end(s, err, to->holder);
    } else if (s) {
        struct frame_attached answer = *to;
        attach_answer(s, a, &answer);
        if (a->detached)
            detach(s, a->handle);
    } else if (!err && a->write && to->status <= FRAME_ATTACH_EXISTS) {
        store_lease_seen(a->server->store, &a->identity); /* from now on its time runs */
    }
    attaching_free(a);
}

static void on_attach(struct session *s, uint32_t stream, const struct buf *p)
{
    struct frame_attach f;
    if (frame_attach_get(p->data, p->len, &f) < 0) {
        session_violated(s, "an ATTACH out of form");
        return;
    }
    if (s->attaching_n >= SESSION_HANDLES) {
        session_violated(s, "too many ATTACH at once");
        return;
    }
    struct attaching *a = calloc(1, sizeof *a);
    if (!a || !(a->name = strdup(f.name))) {
        free(a);
        session_violated(s, "no memory for a name");
        return;
    }
    a->session = s;
    a->server = s->server;
    a->server->work++;
    a->identity = s->peer.identity;
    a->stream = stream;
    a->handle = f.handle;
    a->write = f.write;
    struct store_attach ask = {.name = a->name, .host = s->peer.host, .identity = &a->identity, .write = f.write};
    struct frame_attached to = {0};
    const char *denied = session_denied(s, a->name, f.write ? GRANT_WRITE : GRANT_READ);
    if (denied) {
        to.status = FRAME_ATTACH_BAD;
        snprintf(to.holder, sizeof to.holder, "%s", denied);
    } else if (store_attach(s->server->store, &ask, &to, on_attached, a) == -EINPROGRESS) {
        TAILQ_INSERT_TAIL(&s->attaching, a, link);
        s->attaching_n++;
        return;
    }
    attach_answer(s, a, &to);
    attaching_free(a);
}

static void detach(struct session *s, uint32_t id)
{
    struct handle *h = session_handle(s, id), *other;
    if (!h)
        return;
    bool drop = h->write;
    TAILQ_FOREACH(other, name_bucket(s, h->name), by_name)
    if (other != h && other->write && !strcmp(other->name, h->name))
        drop = false;
    if (drop)
        store_lease_drop(s->server->store, h->name, &s->peer.identity);
    handle_free(s, h);
}

static void on_detach(struct session *s, const struct buf *p)
{
    if (p->len != 4) {
        session_violated(s, "a DETACH out of form");
        return;
    }
    struct attaching *a;
    TAILQ_FOREACH(a, &s->attaching, link)
    a->detached |= a->handle == get_u32(p->data);
    detach(s, get_u32(p->data));
}

/* The connection's calls */

static void on_open(void *owner, const struct frame_hello *peer)
{
    struct session *s = owner;
    s->peer = *peer;
    for (char *t = s->peer.host; *t; t++) /* shown to people as the holder of leases */
        if ((unsigned char)*t < ' ' || *t == 0x7f)
            *t = '?';
    if (id_none(&peer->identity)) {
        session_violated(s, "a HELLO without an identity");
        return;
    }
    s->open = true;
    const char *who = conn_identity(s->conn);
    log_info("%s (%s) connected%s%s", conn_peer(s->conn), s->peer.host, who ? ", proven to be " : "", who ? who : "");
}

static void on_frame(void *owner, uint32_t stream, uint8_t type, struct buf *p)
{
    struct session *s = owner;
    if (s->leaving)
        return;
    if (conn_queued(s->conn, 0) > SESSION_UNREAD) {
        session_violated(s, "asks, but reads no answers");
        return;
    }
    switch (type) {
    case FRAME_CLOSE:
        session_epoch_drop(s, get_u32(p->data));
        session_request_drop(s, get_u32(p->data));
        break;
    case FRAME_ATTACH:
        on_attach(s, stream, p);
        break;
    case FRAME_DETACH:
        on_detach(s, p);
        break;
    case FRAME_BEGIN:
    case FRAME_OP:
    case FRAME_REGION:
    case FRAME_PAGES:
    case FRAME_PACKED:
    case FRAME_END:
    case FRAME_ABORT:
        session_epoch_frame(s, stream, type, p);
        break;
    case FRAME_LIST:
    case FRAME_PIN:
    case FRAME_READ:
    case FRAME_HASH:
    case FRAME_CHANGED:
    case FRAME_UNPIN:
    case FRAME_REMOVE:
        session_request_frame(s, stream, type, p);
        break;
    default:
        session_violated(s, "a frame that only servers send");
    }
}

static void on_drained(void *owner, uint32_t stream)
{
    (void)stream;
    session_read_on(owner); /* other answers are bounded by what is asked */
}

static void session_free(struct session *s)
{
    free(s->by_id);
    free(s->by_name);
    free(s);
}

static void on_closed(void *owner, int err, const char *why)
{
    struct session *s = owner;
    struct server *server = s->server;
    bool hung_up = !err || err == -ECONNRESET || err == -EPIPE; /* tools do */
    log_at(hung_up ? LOG_INFO : LOG_WARN, "%s", why);
    session_epoch_orphan(s);
    session_request_orphan(s);
    for (struct attaching *a; (a = TAILQ_FIRST(&s->attaching));) {
        TAILQ_REMOVE(&s->attaching, a, link);
        a->session = NULL;
    }
    if (s->open)
        store_lease_seen(server->store, &s->peer.identity);
    for (unsigned b = 0; b < SESSION_BUCKETS; b++)
        while (!TAILQ_EMPTY(&s->by_id[b]))
            handle_free(s, TAILQ_FIRST(&s->by_id[b]));
    TAILQ_REMOVE(&server->sessions, s, link);
    server->peers--;
    session_free(s);
    server_look(server);
}

static struct conn *on_join(void *owner, const struct id *token)
{
    struct session *s = owner, *one;
    TAILQ_FOREACH(one, &s->server->sessions, link)
    if (one != s && conn_has_token(one->conn, token))
        return one->conn;
    return NULL;
}

static const struct conn_ops ops = {
    .open = on_open, .frame = on_frame, .drained = on_drained, .closed = on_closed, .join = on_join};

int session_new(struct server *server, uv_stream_t *stream)
{
    struct session *s = calloc(1, sizeof *s);
    if (!s)
        return -ENOMEM;
    s->server = server;
    s->by_id = malloc(SESSION_BUCKETS * sizeof *s->by_id);
    s->by_name = malloc(SESSION_BUCKETS * sizeof *s->by_name);
    if (!s->by_id || !s->by_name) {
        session_free(s);
        return -ENOMEM;
    }
    for (unsigned b = 0; b < SESSION_BUCKETS; b++) {
        TAILQ_INIT(&s->by_id[b]);
        TAILQ_INIT(&s->by_name[b]);
    }
    for (unsigned b = 0; b < SESSION_LANES; b++)
        TAILQ_INIT(&s->lanes[b]);
    TAILQ_INIT(&s->pending);
    TAILQ_INIT(&s->requests);
    TAILQ_INIT(&s->bulk);
    TAILQ_INIT(&s->attaching);
    s->local = stream->type != UV_TCP;
    s->conn = conn_take_tls(stream, s->local ? NULL : server->tls, &server->self, &ops, s);
    if (!s->conn) {
        session_free(s);
        return -ENOMEM;
    }
    TAILQ_INSERT_TAIL(&server->sessions, s, link);
    server->peers++;
    return 0;
}

void session_look(struct session *s)
{
    if (s->leaving && TAILQ_EMPTY(&s->pending) && TAILQ_EMPTY(&s->requests))
        conn_close(s->conn, true, 0, NULL);
}

void session_stop(struct session *s)
{
    s->leaving = true;
    session_epoch_drop_all(s);
    session_look(s);
}
