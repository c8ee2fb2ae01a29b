/* A link to one remote: dials, greets, attaches regions, fetches hashes, hands answers to groups, dials again with
 * back-off when it is lost.
 *
 * Stream 1 is the link's own (attaching, pins, hashes): urgent. Groups number theirs from 2. For a file: URL the remote
 * is a server of our own, over the store in that directory, at the other end of a socket pair: nothing else differs. */
#include "agent/sync/model.h"
#include "agent/base/log.h"
#include "agent/base/xxh3.h"
#include "agent/net/server.h"
#include "agent/store/store.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#define BACKOFF_MIN_MS 100u
#define BACKOFF_MAX_MS 5000u
#define OWN_STREAM 1u
#define ASKED_AT_ONCE 8u

/* The remote's hashes of one region on their way into its body's `published`. */
struct fetch {
    struct fetch *next;
    struct region *region;
    struct body *body; /* held */
    uint32_t request, pin;
    bool pinned;
    uint64_t pages, asked, have;
};

static const struct conn_ops link_ops;

struct link *link_find(struct local *l, const char *address)
{
    for (struct link *k = l->links; k; k = k->next)
        if (!strcmp(k->address, address))
            return k;
    struct link *k = calloc(1, sizeof *k);
    if (!k || !(k->address = strdup(address))) {
        free(k);
        return NULL;
    }
    k->local = l;
    k->packs = pack_worth(address);
    k->next_stream = OWN_STREAM;
    k->down_since = uv_now(l->loop);
    k->next = l->links;
    l->links = k;
    link_tick(k, uv_now(l->loop));
    return k;
}

static void link_broken(struct link *k, const char *why)
{
    k->broken = true;
    snprintf(k->reason, sizeof k->reason, "%s", why);
    log_error("%s: %s", k->address, why);
}

/* Our own server over file:DIR; then one end of a socket pair is a connection like any other. */
static int serve_ourselves(struct link *k)
{
    struct local *l = k->local;
    char error[STORE_ERROR], bound[200], sock[4200];
    if (k->server)
        return 0;
    int rc = store_open(&k->store, l->loop, k->address, error);
    if (rc) {
        snprintf(k->reason, sizeof k->reason, "%.500s", error);
        return rc;
    }
    k->server = server_new(l->loop, k->store, &l->identity, l->host);
    if (!k->server)
        return -ENOMEM;
    if (store_dir(k->store)) {
        snprintf(sock, sizeof sock, "unix:%s/.memsync/wire.sock", store_dir(k->store));
        if (server_listen(k->server, sock, bound, sizeof bound) < 0)
            log_info("%s: the store is not reachable for other tools: %s cannot be made", k->address, sock);
    }
    return 0;
}

static uv_stream_t *pipe_over(uv_loop_t *loop, int fd)
{
    uv_pipe_t *p = malloc(sizeof *p);
    if (!p)
        return NULL;
    uv_pipe_init(loop, p, 0);
    if (uv_pipe_open(p, fd) < 0) {
        uv_close((uv_handle_t *)p, (uv_close_cb)free);
        return NULL;
    }
    return (uv_stream_t *)p;
}

static int connect_to_self(struct link *k, const struct frame_hello *self)
{
    int fds[2], rc = serve_ourselves(k);
    if (rc)
        return rc;
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds) < 0)
        return -errno;
    uv_stream_t *theirs = pipe_over(k->local->loop, fds[0]), *ours = pipe_over(k->local->loop, fds[1]);
    if (!theirs || !ours || server_take(k->server, theirs) < 0)
        return -ENOMEM;
    k->conn = conn_take(ours, self, &link_ops, k);
    return k->conn ? 0 : -ENOMEM;
}

static void dial(struct link *k)
{
    struct frame_hello self = {.version = FRAME_VERSION, .identity = k->local->identity};
    snprintf(self.host, sizeof self.host, "%s", k->local->host);
    k->state = LINK_DIALLING;
    int rc = 0;
    if (!strncmp(k->address, "file:", 5)) {
        rc = connect_to_self(k, &self);
    } else {
        k->conn = conn_dial(k->local->loop, k->address, &self, &link_ops, k);
        rc = k->conn ? 0 : -ENOMEM;
    }
    if (rc) {
        k->state = LINK_DOWN;
        if (!k->reason[0])
            snprintf(k->reason, sizeof k->reason, "%s", strerror(-rc));
        k->backoff_ms =
            k->backoff_ms ? (k->backoff_ms * 2 > BACKOFF_MAX_MS ? BACKOFF_MAX_MS : k->backoff_ms * 2) : BACKOFF_MIN_MS;
        k->retry_at = uv_now(k->local->loop) + k->backoff_ms;
    }
}

void link_tick(struct link *k, uint64_t now)
{
    if (!strchr(k->address, ':') || !strncmp(k->address, "mem:", 4) || strstr(k->address, "://") ||
        !strncmp(k->address, "hub:", 4) || !strncmp(k->address, "dir:", 4)) {
        if (!k->broken)
            link_broken(k, "MEMSYNC_REMOTE takes HOST:PORT, unix:PATH or file:DIR here; other stores are not built");
        return;
    }
    if (k->state == LINK_DOWN && !k->local->phase && now >= k->retry_at)
        dial(k);
    if (k->conn) {
        uint64_t moved = conn_bytes_out(k->conn) + k->bytes_out;
        if (moved - k->moved_bytes > 1024)
            k->moved = now;
        k->moved_bytes = moved;
    }
}

static void link_open(void *owner, const struct frame_hello *peer)
{
    struct link *k = owner;
    k->state = LINK_UP;
    k->backoff_ms = 0;
    k->reason[0] = 0;
    k->moved = uv_now(k->local->loop);
    snprintf(k->peer_host, sizeof k->peer_host, "%s", peer->host);
    conn_set_priority(k->conn, OWN_STREAM, CONN_URGENT);
    log_info("%s: connected (%s)", k->address, k->peer_host);
    for (struct group *g = k->groups, *next; g; g = next) {
        next = g->next;
        group_link_up(g);
    }
}

static void fetches_drop(struct link *k)
{
    while (k->fetches) {
        struct fetch *f = k->fetches;
        k->fetches = f->next;
        f->body->refetch = true;
        body_drop(f->body);
        free(f);
    }
}

static void link_closed(void *owner, int err, const char *why)
{
    struct link *k = owner;
    bool was_up = k->state == LINK_UP;
    k->bytes_out += conn_bytes_out(k->conn);
    k->bytes_in += conn_bytes_in(k->conn);
    k->conn = NULL;
    k->state = LINK_DOWN;
    if (was_up)
        k->down_since = uv_now(k->local->loop);
    snprintf(k->reason, sizeof k->reason, "%s", why && *why ? why : err ? strerror(-err) : "closed by the remote");
    k->backoff_ms = !k->backoff_ms                       ? BACKOFF_MIN_MS
                    : k->backoff_ms * 2 > BACKOFF_MAX_MS ? BACKOFF_MAX_MS
                                                         : k->backoff_ms * 2;
    k->retry_at = uv_now(k->local->loop) + k->backoff_ms;
    log_info("%s: %s; trying again in %u ms", k->address, k->reason, k->backoff_ms);
    fetches_drop(k);
    for (struct group *g = k->groups, *next; g; g = next) {
        next = g->next;
        group_link_lost(g);
    }
}

static void send_own(struct link *k, uint8_t type, struct buf *b)
{
    if (b)
        conn_send(k->conn, OWN_STREAM, type, b);
}

void link_attach(struct region *r)
{
    struct frame_attach *a = malloc(sizeof *a);
    struct buf *b = buf_new(NAME_CAP + 16);
    if (!a || !b || r->link->state != LINK_UP) {
        free(a);
        buf_drop(b);
        return;
    }
    a->handle = r->handle;
    a->write = 1;
    snprintf(a->name, sizeof a->name, "%s", r->name);
    b->len = (uint32_t)frame_attach_put(b->data, b->cap, a);
    free(a);
    r->attach = ATTACH_ASKED;
    send_own(r->link, FRAME_ATTACH, b);
}

/* ---- fetching hashes ---- */

void link_fetch(struct region *r)
{
    struct link *k = r->link;
    struct fetch *f = calloc(1, sizeof *f);
    struct buf *b = buf_new(NAME_CAP + 16);
    if (!f || !b) {
        free(f);
        buf_drop(b);
        return;
    }
    *f = (struct fetch){.next = k->fetches, .region = r, .body = r->body, .request = ++k->next_request};
    body_hold(f->body);
    k->fetches = f;
    struct wr w = wr_over(b->data, b->cap);
    wr_u32(&w, f->request);
    wr_str(&w, r->name);
    b->len = (uint32_t)wr_len(&w);
    send_own(k, FRAME_PIN, b);
}

static void fetch_end(struct link *k, struct fetch *f, bool good)
{
    struct fetch **at = &k->fetches;
    while (*at != f)
        at = &(*at)->next;
    *at = f->next;
    if (f->pinned) {
        struct buf *b = buf_new(4);
        if (b) {
            put_u32(b->data, f->pin);
            b->len = 4;
        }
        send_own(k, FRAME_UNPIN, b);
    }
    struct region *r = f->region;
    if (r->body == f->body && r->attach == ATTACH_HASHING) {
        r->attach = good ? ATTACH_DONE : ATTACH_LOOSE;
        r->body->refetch = !good;
        r->retry_at = good ? 0 : uv_now(k->local->loop) + 1000;
    } else if (r->attach == ATTACH_HASHING) {
        r->attach = ATTACH_LOOSE;
    }
    body_drop(f->body);
    free(f);
    group_check(r->group);
}

static void fetch_ask(struct link *k, struct fetch *f)
{
    while (f->asked < f->pages && f->asked - f->have < ASKED_AT_ONCE * FRAME_HASHES_MAX) {
        uint64_t left = f->pages - f->asked;
        struct frame_hash h = {.request = f->request, .pin = f->pin, .first = f->asked};
        h.count = left < FRAME_HASHES_MAX ? (uint32_t)left : FRAME_HASHES_MAX;
        struct buf *b = buf_new(32);
        if (!b)
            return;
        b->len = (uint32_t)frame_hash_put(b->data, b->cap, &h);
        send_own(k, FRAME_HASH, b);
        f->asked += h.count;
    }
    if (f->have >= f->pages)
        fetch_end(k, f, true);
}

static struct fetch *fetch_of(struct link *k, uint32_t request)
{
    for (struct fetch *f = k->fetches; f; f = f->next)
        if (f->request == request)
            return f;
    return NULL;
}

static void take_pinned(struct link *k, const struct buf *p)
{
    struct frame_entry *e = malloc(sizeof *e);
    uint32_t request = 0, pin = 0;
    if (!e || frame_pinned_get(p->data, p->len, &request, &pin, e)) {
        free(e);
        conn_close(k->conn, false, FRAME_E_PROTOCOL, "malformed PINNED");
        return;
    }
    struct fetch *f = fetch_of(k, request);
    if (f) {
        f->pin = pin;
        f->pinned = true;
        f->pages = (e->size + PAGE - 1) / PAGE;
        f->body->size = e->size;
        f->body->epoch = f->body->durable = e->epoch;
        if (hashes_room(&f->body->published, f->pages))
            fetch_end(k, f, false);
        else
            fetch_ask(k, f);
    }
    free(e);
}

/* The wire's hash of a page of zeros, to be told from others: the table has 0 for it. */
static struct page_hash from_wire(const uint8_t *h)
{
    static const uint8_t zeros[PAGE];
    static XXH128_hash_t none;
    static bool known;
    if (!known) {
        none = XXH3_128bits(zeros, PAGE);
        known = true;
    }
    XXH128_canonical_t c;
    memcpy(&c, h, sizeof c);
    XXH128_hash_t v = XXH128_hashFromCanonical(&c);
    if (XXH128_isEqual(v, none))
        return (struct page_hash){0, 0};
    struct page_hash p = {v.low64, v.high64};
    if (!p.hi && p.lo <= 1)
        p.hi = 1;
    return p;
}

static void take_hashes(struct link *k, const struct buf *p)
{
    struct rd r = rd_over(p->data, p->len);
    uint32_t request = rd_u32(&r), count = rd_u32(&r);
    struct fetch *f = fetch_of(k, request);
    conn_credit(k->conn, OWN_STREAM, p->len);
    if (!f)
        return;
    if (r.bad || rd_left(&r) != (size_t)count * 16 || !count || count > f->asked - f->have) {
        conn_close(k->conn, false, FRAME_E_PROTOCOL, "malformed HASHES");
        return;
    }
    for (uint32_t i = 0; i < count; i++, f->have++) {
        const uint8_t *h = rd_take(&r, 16);
        bool whole = (f->have + 1) * PAGE <= f->body->size; /* a short last page was hashed short: ours is filled up */
        hashes_set(&f->body->published, f->have, whole ? from_wire(h) : HASH_UNKNOWN);
    }
    fetch_ask(k, f);
}

/* ---- answers ---- */

static struct group *group_by_epoch(struct link *k, uint32_t stream, uint64_t seq)
{
    for (struct group *g = k->groups; g; g = g->next)
        for (const struct epoch *e = g->queue; e; e = e->next)
            if (e->seq == seq && e->begun && e->stream == stream)
                return g;
    return NULL;
}

static void take_attached(struct link *k, const struct buf *p)
{
    struct frame_attached a;
    if (frame_attached_get(p->data, p->len, &a)) {
        conn_close(k->conn, false, FRAME_E_PROTOCOL, "malformed ATTACHED");
        return;
    }
    for (struct region *r = k->regions; r; r = r->next)
        if (r->handle == a.handle) {
            region_attached(r, &a);
            return;
        }
}

static void take_failed(struct link *k, uint32_t stream, const struct buf *p)
{
    struct frame_failed f;
    if (frame_failed_get(p->data, p->len, &f)) {
        conn_close(k->conn, false, FRAME_E_PROTOCOL, "malformed FAILED");
        return;
    }
    if (stream == OWN_STREAM) {
        struct fetch *fetch = fetch_of(k, (uint32_t)f.seq);
        if (fetch)
            fetch_end(k, fetch, false);
        return;
    }
    struct group *g = group_by_epoch(k, stream, f.seq);
    if (g)
        group_failed(g, f.seq, f.code, f.text);
}

static void link_frame(void *owner, uint32_t stream, uint8_t type, struct buf *p)
{
    struct link *k = owner;
    uint64_t seq = (type == FRAME_RECEIVED || type == FRAME_DURABLE) && p->len == 8 ? get_u64(p->data) : 0;
    struct group *g = seq ? group_by_epoch(k, stream, seq) : NULL;
    switch (type) {
    case FRAME_ATTACHED:
        take_attached(k, p);
        return;
    case FRAME_RECEIVED:
        if (g)
            group_received(g, seq);
        return;
    case FRAME_DURABLE:
        if (g)
            group_durable(g, seq);
        return;
    case FRAME_FAILED:
        take_failed(k, stream, p);
        return;
    case FRAME_PINNED:
        take_pinned(k, p);
        return;
    case FRAME_HASHES:
        take_hashes(k, p);
        return;
    case FRAME_OK:
    case FRAME_CLOSE:
        return;
    default:
        conn_close(k->conn, false, FRAME_E_PROTOCOL, "a frame that a server does not send");
    }
}

static void link_drained(void *owner, uint32_t stream)
{
    struct link *k = owner;
    for (struct group *g = k->groups; g; g = g->next)
        if (g->stream == stream) {
            group_drained(g);
            return;
        }
}

static const struct conn_ops link_ops = {
    .open = link_open, .frame = link_frame, .drained = link_drained, .closed = link_closed};

void link_stop(struct link *k)
{
    if (k->conn)
        conn_close(k->conn, true, 0, NULL);
}
