/* Live epochs: one stream in, several out.
 *
 * A frame that comes goes on to each replica that is in, at once: PAGES as they are, but for the handle, which is the
 * hub's for that name at all of them; REGION with the fence that each of them gave. Nothing is kept once it is with a
 * connection, unless a replica may come in soon: then frames of open epochs are, up to HUB_QUEUE in all, so that what
 * straddles a cut can be given to it as a whole (legs QUEUED).
 *
 * A leg is an epoch's way to one replica: [QUEUED ->] OPEN -> ENDED [-> RECEIVED] -> DURABLE or FAILED, NONE when the
 * replica is lost. An epoch is settled when no leg to a replica that is in is unanswered. It is durable if one of those
 * took it; who refused it then is out of step and dropped. All refused it: so does the hub. None is left: -ENOTCONN.
 *
 * The client's window is given back while the fastest replica has less than CONN_LOW of the stream before it, or none
 * takes the epoch any more. */
#include "agent/hub/txn.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int refuse(struct hub_txn *t, int err, char error[STORE_ERROR], const char *format, ...)
    __attribute__((format(printf, 4, 5)));
static int refuse(struct hub_txn *t, int err, char error[STORE_ERROR], const char *format, ...)
{
    va_list ap;
    va_start(ap, format);
    vsnprintf(error, STORE_ERROR, format, ap);
    va_end(ap);
    if (!t->err) {
        t->err = err;
        snprintf(t->error, sizeof t->error, "%s", error);
    }
    return err;
}

/* Adding */

struct store_txn *hub_txn_new(struct store *s, const struct id *holder, struct store_names names,
                              void (*spilled)(void *arg, size_t bytes), void *arg)
{
    struct hub *h = hub_of(s);
    struct hub_txn *t = calloc(1, sizeof *t);
    if (!t)
        return NULL;
    *t = (struct hub_txn){.s = s,
                          .seq = ++h->next_seq,
                          .holder = *holder,
                          .writer = *holder,
                          .names = names,
                          .spilled = spilled,
                          .arg = arg};
    TAILQ_INSERT_TAIL(&h->txns, t, link);
    TAILQ_INSERT_TAIL(&h->by_seq[t->seq % HUB_BUCKETS], t, by_seq);
    return (struct store_txn *)(void *)t;
}

void hub_txn_chain(struct store_txn *store_txn, const void *chain)
{
    struct hub_txn *t = txn_of(store_txn);
    t->lane = lane_of(hub_of(t->s), chain);
    if (t->lane)
        t->lane->txns++;
}

void hub_txn_writer(struct store_txn *store_txn, const struct id *writer)
{
    txn_of(store_txn)->writer = *writer;
}

static int lease_check(struct hub_txn *t, const struct hub_name *n, char error[STORE_ERROR])
{
    if (name_lease_good(hub_of(t->s), n, &t->holder))
        return 0;
    return refuse(t, -ESTALE, error,
                  n->holder ? "%.300s is written by %.100s now" : "%.300s is not leased to this writer%.0s", n->text,
                  n->holder ? n->holder->host : "");
}

/* The slot of a client's handle: asked of the session on first sight, so that renames within the epoch are followed. */
static int slot_of(struct hub_txn *t, uint32_t client, char error[STORE_ERROR])
{
    for (size_t i = t->slots_n; i-- > 0;)
        if (t->slots[i].client == client)
            return (int)i;
    const char *text = t->names.name_of(t->names.arg, client);
    if (!text)
        return refuse(t, -ENOENT, error, "handle %u is not attached", client);
    struct hub_name *n = name_of(hub_of(t->s), text);
    struct slot *slots = hub_room(t->slots, t->slots_n, &t->slots_cap, sizeof *slots);
    if (slots)
        t->slots = slots;
    if (!slots || !n)
        return refuse(t, -ENOMEM, error, "no memory for another region in this epoch");
    EACH_REPLICA(r, hub_of(t->s))
    if (t->leg[r->index] == LEG_OPEN && !n->there[r->index].attached)
        return refuse(t, -ENOENT, error, "%.300s is not attached at %.100s", text, r->address);
    slots[t->slots_n] =
        (struct slot){.client = client, .handle = n->handle, .name = n, .first = n, .lineage = n->lineage};
    return (int)t->slots_n++;
}

static int note_rename(struct hub_txn *t, struct slot *slot)
{
    struct left *more = reallocarray(t->left, t->left_n + 1, sizeof *more);
    if (!more)
        return -ENOMEM;
    t->left = more;
    more[t->left_n++] = (struct left){.name = slot->name, .old = slot->handle};
    return 0;
}

static int add_op(struct hub_txn *t, const struct buf *b, char error[STORE_ERROR])
{
    struct frame_op o;
    if (frame_op_get(b->data, b->len, &o))
        return refuse(t, -EPROTO, error, "malformed OP");
    int at = slot_of(t, o.handle, error), to = 0;
    if (at < 0)
        return at;
    int err = lease_check(t, t->slots[at].name, error);
    if (!err && o.kind == FRAME_OP_RENAME)
        err = (to = slot_of(t, o.to, error)) < 0 ? to : lease_check(t, t->slots[to].name, error);
    if (err)
        return err;
    struct slot *slot = &t->slots[at];
    slot->touched = true;
    slot->unlinked = o.kind == FRAME_OP_UNLINK;
    if (o.kind != FRAME_OP_RENAME)
        slot->replaced = slot->lineage;
    if (o.kind == FRAME_OP_CREATE) {
        slot->lineage = o.lineage;
        slot->epoch = 0;
    } else if (o.kind == FRAME_OP_RENAME) {
        if (note_rename(t, slot))
            return refuse(t, -ENOMEM, error, "no memory for a name");
        slot->name = t->slots[to].name;
        t->slots[to].touched = t->slots[to].unlinked = true; /* until a CREATE */
        t->slots[to].replaced = t->slots[to].lineage;
        t->slots[to].lineage = (struct id){{0}};
        o.to = t->slots[to].handle;
    }
    o.handle = slot->handle;
    struct buf *buf = buf_new(64);
    if (!buf)
        return refuse(t, -ENOMEM, error, "no memory for a frame");
    buf->len = (uint32_t)frame_op_put(buf->data, buf->cap, &o);
    txn_frame(t, (struct item){.type = FRAME_OP, .payload = buf});
    buf_drop(buf);
    return 0;
}

static bool fence_good(const struct hub_txn *t, const struct hub_name *n, uint64_t fence)
{
    return name_lease_good(hub_of(t->s), n, &t->holder) && (fence == n->fence || (n->alias && fence == n->alias));
}

static int add_region(struct hub_txn *t, const struct buf *b, char error[STORE_ERROR])
{
    struct frame_region g;
    if (frame_region_get(b->data, b->len, &g))
        return refuse(t, -EPROTO, error, "malformed REGION");
    int at = slot_of(t, g.handle, error);
    int err = at < 0 ? at : lease_check(t, t->slots[at].name, error);
    if (err)
        return err;
    struct slot *slot = &t->slots[at];
    if (!fence_good(t, slot->name, g.fence) && !fence_good(t, slot->first, g.fence))
        return refuse(t, -ESTALE, error, "%.300s is fenced: its lease has number %llu now, not %llu", slot->name->text,
                      (unsigned long long)slot->name->fence, (unsigned long long)g.fence);
    slot->stated = slot->touched = true;
    slot->epoch = g.epoch;
    g.handle = slot->handle;
    struct buf *buf = buf_new(64);
    if (!buf)
        return refuse(t, -ENOMEM, error, "no memory for a frame");
    buf->len = (uint32_t)frame_region_put(buf->data, buf->cap, &g);
    txn_frame(t, (struct item){.type = FRAME_REGION, .payload = buf, .name = slot->name});
    buf_drop(buf);
    return 0;
}

/* The same bytes for all replicas; hashed once, not for each. */
static struct buf *pages_for(struct buf *b, uint32_t handle)
{
    if (get_u32(b->data) != handle || !b->hashed) {
        if (__atomic_load_n(&b->refs, __ATOMIC_ACQUIRE) > 1) {
            struct buf *copy = buf_new(b->len);
            if (!copy)
                return NULL;
            memcpy(copy->data, b->data, b->len);
            copy->len = b->len;
            b = copy;
        } else {
            buf_hold(b);
        }
        put_u32(b->data, handle);
        b->hash = frame_payload_hash(b->data, b->len);
        b->hashed = 1;
        return b;
    }
    return buf_hold(b);
}

static int add_pages(struct hub_txn *t, struct buf *b, char error[STORE_ERROR])
{
    struct frame_pages pages;
    if (frame_pages_get(b->data, b->len, &pages))
        return refuse(t, -EPROTO, error, "malformed PAGES");
    int at = slot_of(t, pages.handle, error);
    if (at < 0)
        return at;
    if (!t->slots[at].stated)
        return refuse(t, -EPROTO, error, "PAGES of handle %u before its REGION", pages.handle);
    uint32_t len = b->len;
    struct buf *buf = pages_for(b, t->slots[at].handle);
    if (!buf)
        return refuse(t, -ENOMEM, error, "no memory for a frame");
    txn_frame(t, (struct item){.type = FRAME_PAGES, .payload = buf});
    buf_drop(buf);
    t->withheld += len;
    hub_soon(hub_of(t->s));
    return 0;
}

/* Who is far behind the fastest is left to catch up: or its queue would be without a bound. */
static void queues_check(struct hub *h)
{
    size_t least = SIZE_MAX;
    EACH_REPLICA(r, h)
    if (r->state == REPLICA_IN && conn_queued(r->conn, 0) < least)
        least = conn_queued(r->conn, 0);
    EACH_REPLICA(r, h)
    if (leg_live(r) && least != SIZE_MAX && conn_queued(r->conn, 0) > least + HUB_QUEUE)
        replica_drop(r, true, "it is %u MiB behind the fastest", HUB_QUEUE >> 20);
}

int hub_txn_add(struct store_txn *store_txn, uint8_t type, struct buf *payload, char error[STORE_ERROR])
{
    struct hub_txn *t = txn_of(store_txn);
    struct hub *h = hub_of(t->s);
    if (t->err) {
        snprintf(error, STORE_ERROR, "%s", t->error);
        return t->err;
    }
    if (!t->lane)
        return refuse(t, -ENOMEM, error, "no memory for an epoch");
    if (!replica_source(h)) {
        char why[STORE_ERROR];
        hub_why_none(h, why, sizeof why);
        return refuse(t, -ENOTCONN, error, "%s", why);
    }
    if (!t->begun)
        txn_begin(t);
    int err;
    switch (type) {
    case FRAME_OP:
        return add_op(t, payload, error);
    case FRAME_REGION:
        return add_region(t, payload, error);
    case FRAME_PAGES:
        err = add_pages(t, payload, error);
        queues_check(h);
        return err;
    default:
        return refuse(t, -EPROTO, error, "frame type %u has no place in an epoch", type);
    }
}

/* Commit */

bool hub_txn_received(struct store_txn *store_txn, void (*received)(void *arg))
{
    txn_of(store_txn)->received = received;
    return false;
}

void txn_names_busy(struct hub_txn *t, int by)
{
    for (size_t i = 0; i < t->slots_n; i++) {
        t->slots[i].name->busy += (unsigned)by;
        t->slots[i].first->busy += (unsigned)by;
    }
}

/* The lineages that its names have from now on, for those who ask before the replicas have answered. */
static void names_after(struct hub_txn *t)
{
    struct hub *h = hub_of(t->s);
    for (size_t i = 0; i < t->slots_n; i++) {
        struct slot *slot = &t->slots[i];
        if (slot->unlinked)
            slot->name->lineage = (struct id){{0}};
    }
    for (size_t i = 0; i < t->slots_n; i++) {
        struct slot *slot = &t->slots[i];
        if (!slot->unlinked && slot->touched)
            slot->name->lineage = slot->lineage;
        if (slot->name != slot->first) /* the fence goes with the renamed region */
            slot->name->alias = slot->first->alias ? slot->first->alias : slot->first->fence;
    }
    for (size_t i = 0; i < t->left_n; i++)
        t->left[i].handle = t->left[i].name->handle = ++h->next_handle;
}

bool txn_may_end(const struct hub_txn *t)
{
    const struct hub *h = hub_of(t->s);
    return t->handed && !t->ended && (t->err || (!t->blocked && (!h->holding || !t->whole)));
}

void txn_end(struct hub_txn *t)
{
    t->ended = true;
    EACH_REPLICA(r, hub_of(t->s))
    {
        uint8_t *leg = &t->leg[r->index];
        if (*leg == LEG_OPEN && t->err)
            leg_abort(t, r);
        else if (*leg == LEG_OPEN)
            leg_end(t, r);
        if (t->err)
            *leg = LEG_NONE;
        for (size_t i = 0; *leg == LEG_ENDED && i < t->left_n; i++)
            name_attach_as(t->left[i].name, r, t->lane->stream, t->left[i].handle);
    }
    if (!txn_queued(t))
        txn_items_drop(t);
}

void hub_txn_commit(struct store_txn *store_txn, void (*durable)(void *arg, int err, const char *text), void *arg)
{
    struct hub_txn *t = txn_of(store_txn);
    struct hub *h = hub_of(t->s);
    char error[STORE_ERROR];
    t->durable = durable;
    t->durable_arg = arg;
    t->handed = true;
    t->spilled = NULL;
    if (!t->err && !t->lane)
        refuse(t, -ENOMEM, error, "no memory for an epoch");
    if (!t->err && !replica_source(h)) {
        hub_why_none(h, t->error, sizeof t->error);
        t->err = -ENOTCONN;
    }
    if (!t->err && !t->begun)
        txn_begin(t);
    if (!t->err)
        names_after(t);
    txn_names_busy(t, 1);
    if (txn_may_end(t))
        txn_end(t);
    hub_soon(h);
}

void hub_txn_free(struct hub_txn *t)
{
    struct hub *h = hub_of(t->s);
    txn_items_drop(t);
    if (t->lane && !--t->lane->txns)
        t->lane->idle_since = hub_now(h);
    TAILQ_REMOVE(&h->txns, t, link);
    TAILQ_REMOVE(&h->by_seq[t->seq % HUB_BUCKETS], t, by_seq);
    free(t->slots);
    free(t->left);
    free(t->items);
    free(t);
}

void hub_txn_abort(struct store_txn *store_txn)
{
    struct hub_txn *t = txn_of(store_txn);
    EACH_REPLICA(r, hub_of(t->s))
    if (t->leg[r->index] == LEG_OPEN)
        leg_abort(t, r);
    hub_txn_free(t);
}
