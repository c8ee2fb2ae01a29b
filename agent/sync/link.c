/* A link to one remote: dials, greets, attaches regions, hands answers to groups and comparisons, dials again with
 * back-off when it is lost.
 *
 * Stream 1 is the link's own (attaching, pins, hashes): urgent. Groups number theirs from 2. For a file:, hub: or
 * nbd:// URL the remote is a server of our own, over that store, at the other end of a socket pair: nothing else
 * differs. */
#include "agent/sync/reconcile.h"
#include "agent/base/log.h"
#include "agent/base/xxh3.h"
#include "agent/hub/hub.h"
#include "agent/nbd/store.h"
#include "agent/net/server.h"
#include "agent/page/page.h"
#include "agent/store/store.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#define BACKOFF_MIN_MS 100u
#define BACKOFF_MAX_MS 5000u

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
    k->foreign = nbd_store_is(address);
    k->packs = !k->foreign && pack_worth(address);
    k->next_stream = LINK_STREAM;
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

/* Our own server over file:DIR, a hub of our own or a block device server; then one end of a socket pair is a connection like any other. */
static int serve_ourselves(struct link *k)
{
    struct local *l = k->local;
    char error[STORE_ERROR], bound[200], sock[4200];
    if (k->server)
        return 0;
    int rc = hub_is(k->address)         ? hub_open(&k->store, l->loop, k->address, &l->identity, l->host, error)
             : nbd_store_is(k->address) ? nbd_store_open(&k->store, l->loop, k->address, &l->identity, error)
                                        : store_open(&k->store, l->loop, k->address, error);
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
    if (!strncmp(k->address, "file:", 5) || hub_is(k->address) || k->foreign) {
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
    char error[STORE_ERROR] = "";
    if (!strchr(k->address, ':') || !strncmp(k->address, "mem:", 4) ||
        (k->foreign ? nbd_store_check(k->address, error) : strstr(k->address, "://") != NULL) ||
        !strncmp(k->address, "dir:", 4) || (hub_is(k->address) && hub_check(k->address, error))) {
        if (!k->broken)
            link_broken(k, *error ? error
                                  : "MEMSYNC_REMOTE takes HOST:PORT, unix:PATH, file:DIR, hub:ADDR,ADDR... or nbd://HOST:PORT/EXPORT "
                                    "here; other stores are not built");
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
    conn_set_priority(k->conn, LINK_STREAM, CONN_URGENT);
    log_info("%s: connected (%s)", k->address, k->peer_host);
    for (struct group *g = k->groups, *next; g; g = next) {
        next = g->next;
        group_link_up(g);
    }
    page_link_up(k);
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
    reconciles_drop(k);
    for (struct group *g = k->groups, *next; g; g = next) {
        next = g->next;
        group_link_lost(g);
    }
    page_link_lost(k);
}

static void send_own(struct link *k, uint8_t type, struct buf *b)
{
    if (b)
        conn_send(k->conn, LINK_STREAM, type, b);
}

void link_attach(struct region *r)
{
    if (r->body && reconcile_has(r->link, r->body))
        return; /* a comparison that was given up is not done with it: asked again by the clock */
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
    if (stream == LINK_STREAM) {
        reconcile_failed(k, (uint32_t)f.seq, f.text);
        return;
    }
    struct group *g = group_by_epoch(k, stream, f.seq);
    if (g)
        group_failed(g, f.seq, f.code, f.text);
}

static void link_frame(void *owner, uint32_t stream, uint8_t type, struct buf *p)
{
    struct link *k = owner;
    if (page_frame(k, stream, type, p))
        return;
    uint64_t seq = (type == FRAME_RECEIVED || type == FRAME_DURABLE) && p->len == 8 ? get_u64(p->data) : 0;
    struct group *g = seq ? group_by_epoch(k, stream, seq) : NULL;
    const char *fault;
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
    case FRAME_HASHES:
        fault = reconcile_take(k, type, p);
        if (fault)
            conn_close(k->conn, false, FRAME_E_PROTOCOL, fault);
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
