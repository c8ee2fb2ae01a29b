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
 * The client's window is given back while the fastest replica has less than CONN_LOW of the stream before it. */
#include "agent/hub/inside.h"

#include "agent/base/log.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define REGION_FENCE 20u /* where the fence stands in a REGION */

static struct hub_txn *txn_of(struct store_txn *t)
{
    return (struct hub_txn *)(void *)t;
}

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

static bool live(const struct replica *r)
{
    return r->greeted && (r->state == REPLICA_IN || r->state == REPLICA_FOLLOWING);
}

/* Lanes */

static struct lane *lane_of(struct hub *h, const void *chain)
{
    struct lane *l;
    TAILQ_FOREACH(l, &h->lanes, link)
    if (l->chain == chain)
        return l;
    if (!(l = calloc(1, sizeof *l)))
        return NULL;
    l->chain = chain;
    l->stream = h->next_stream++;
    TAILQ_INSERT_HEAD(&h->lanes, l, link);
    return l;
}

static void lanes_tick(struct hub *h)
{
    for (struct lane *l = TAILQ_FIRST(&h->lanes), *next; l; l = next) {
        next = TAILQ_NEXT(l, link);
        if (l->txns || hub_now(h) - l->idle_since < HUB_LANE_IDLE_MS)
            continue;
        EACH_REPLICA(r, h)
        if (r->greeted)
            conn_forget(r->conn, l->stream);
        TAILQ_REMOVE(&h->lanes, l, link);
        free(l);
    }
}

void lanes_free(struct hub *h)
{
    for (struct lane *l; (l = TAILQ_FIRST(&h->lanes));) {
        TAILQ_REMOVE(&h->lanes, l, link);
        free(l);
    }
}

/* Legs */

static void send_begin(struct hub_txn *t, struct replica *r)
{
    struct frame_begin b = {.seq = t->seq, .writer = t->writer};
    uint8_t payload[64];
    replica_send(r, t->lane->stream, FRAME_BEGIN, payload, frame_begin_put(payload, sizeof payload, &b));
    t->leg[r->index] = LEG_OPEN;
}

static void send_end(struct hub_txn *t, struct replica *r)
{
    uint8_t payload[17];
    put_u64(payload, t->seq);
    put_u64(payload + 8, t->frames);
    payload[16] = 1;
    replica_send(r, t->lane->stream, FRAME_END, payload, t->received ? 16 : 17);
    t->leg[r->index] = LEG_ENDED;
}

static void send_item(struct hub_txn *t, struct replica *r, const struct item *i)
{
    if (i->type != FRAME_REGION) {
        conn_send(r->conn, t->lane->stream, i->type, buf_hold(i->payload));
        return;
    }
    uint8_t payload[64];
    memcpy(payload, i->payload->data, i->payload->len);
    put_u64(payload + REGION_FENCE, i->name->there[r->index].fence);
    replica_send(r, t->lane->stream, FRAME_REGION, payload, i->payload->len);
}

static void send_abort(struct hub_txn *t, struct replica *r)
{
    uint8_t payload[8];
    put_u64(payload, t->seq);
    if (r->greeted)
        replica_send(r, t->lane->stream, FRAME_ABORT, payload, sizeof payload);
}

static bool queued(const struct hub_txn *t)
{
    bool any = false;
    for (unsigned i = 0; i < HUB_REPLICAS; i++)
        any |= t->leg[i] == LEG_QUEUED;
    return any;
}

static void items_drop(struct hub_txn *t)
{
    for (size_t i = 0; i < t->items_n; i++)
        buf_drop(t->items[i].payload);
    hub_of(t->s)->kept -= t->kept;
    t->items_n = t->kept = 0;
    t->whole = false;
}

static bool worth_keeping(const struct hub *h)
{
    EACH_REPLICA(r, h)
    if (r->greeted && r->state == REPLICA_BEHIND)
        return true;
    return false;
}

/* The frame is kept for those who come later, if there may be some and there is room. */
static void item_keep(struct hub_txn *t, struct item i)
{
    struct hub *h = hub_of(t->s);
    size_t bytes = i.payload->len + sizeof i + 64;
    if (!t->whole)
        return;
    struct item *items = hub_room(t->items, t->items_n, &t->items_cap, sizeof *items);
    if (!items)
        abort(); /* a blocked one could not be sent any more */
    t->items = items;
    bool full = h->kept + bytes > HUB_QUEUE;
    h->crowded |= full && h->holding;
    if (!t->blocked && (full || (!queued(t) && !worth_keeping(h)))) {
        bool was = queued(t);
        items_drop(t);
        EACH_REPLICA(r, h)
        if (was && t->leg[r->index] == LEG_QUEUED)
            txns_unqueue(r); /* it needs another round */
        return;
    }
    i.payload = buf_hold(i.payload);
    items[t->items_n++] = i;
    t->kept += bytes;
    h->kept += bytes;
}

/* One before it on its lane has no END yet, so that it cannot BEGIN. */
static bool behind_held(const struct hub_txn *t)
{
    const struct hub_txn *o;
    TAILQ_FOREACH(o, &hub_of(t->s)->txns, link)
    {
        if (o == t)
            return false;
        if (o->lane == t->lane && !o->ended)
            return true;
    }
    return false;
}

static void txn_begin(struct hub_txn *t)
{
    struct hub *h = hub_of(t->s);
    t->begun = true;
    t->whole = true;
    t->blocked = behind_held(t);
    EACH_REPLICA(r, h)
    {
        if (live(r) && !t->blocked)
            send_begin(t, r);
        else if (live(r) || r->queueing)
            t->leg[r->index] = LEG_QUEUED;
    }
}

static void leg_flush(struct hub_txn *t, struct replica *r)
{
    send_begin(t, r);
    for (size_t i = 0; i < t->items_n; i++)
        send_item(t, r, &t->items[i]);
    if (t->ended && !t->err)
        send_end(t, r);
}

static void unblock(struct hub_txn *t)
{
    t->blocked = false;
    EACH_REPLICA(r, hub_of(t->s))
    if (live(r) && t->leg[r->index] == LEG_QUEUED)
        leg_flush(t, r);
}

/* One more frame to all. */
static void txn_frame(struct hub_txn *t, struct item i)
{
    struct hub *h = hub_of(t->s);
    t->frames++;
    EACH_REPLICA(r, h)
    if (t->leg[r->index] == LEG_OPEN)
        send_item(t, r, &i);
    item_keep(t, i);
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
    if (live(r) && least != SIZE_MAX && conn_queued(r->conn, 0) > least + HUB_QUEUE)
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

static void names_busy(struct hub_txn *t, int by)
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

static bool may_end(const struct hub_txn *t)
{
    const struct hub *h = hub_of(t->s);
    return t->handed && !t->ended && (t->err || (!t->blocked && (!h->holding || !t->whole)));
}

static void txn_end(struct hub_txn *t)
{
    t->ended = true;
    EACH_REPLICA(r, hub_of(t->s))
    {
        uint8_t *leg = &t->leg[r->index];
        if (*leg == LEG_OPEN && t->err)
            send_abort(t, r);
        else if (*leg == LEG_OPEN)
            send_end(t, r);
        if (t->err)
            *leg = LEG_NONE;
        for (size_t i = 0; *leg == LEG_ENDED && i < t->left_n; i++)
            name_attach_as(t->left[i].name, r, t->lane->stream, t->left[i].handle);
    }
    if (!queued(t))
        items_drop(t);
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
    names_busy(t, 1);
    if (may_end(t))
        txn_end(t);
    hub_soon(h);
}

static void txn_free(struct hub_txn *t)
{
    struct hub *h = hub_of(t->s);
    items_drop(t);
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
        send_abort(t, r);
    txn_free(t);
}

/* Answers */

static void lineages_note(struct hub_txn *t)
{
    struct hub *h = hub_of(t->s);
    for (size_t i = 0; i < t->slots_n; i++) {
        const struct slot *slot = &t->slots[i];
        if (!id_none(&slot->replaced) && lineage_find(h, &slot->replaced))
            lineage_note(h, &slot->replaced, 0, true);
    }
    for (size_t i = 0; i < t->slots_n; i++) {
        const struct slot *slot = &t->slots[i];
        if (slot->stated && !slot->unlinked)
            lineage_note(h, &slot->lineage, slot->epoch, false);
    }
}

static bool unanswered(const struct hub_txn *t, unsigned i)
{
    return t->leg[i] == LEG_OPEN || t->leg[i] == LEG_ENDED || t->leg[i] == LEG_RECEIVED;
}

static void tell(struct hub_txn *t, int err, const char *text)
{
    t->told = true;
    t->told_at = hub_now(hub_of(t->s));
    names_busy(t, -1);
    EACH_REPLICA(r, hub_of(t->s))
    for (size_t i = 0; live(r) && t->leg[r->index] != LEG_NONE && i < t->left_n; i++) {
        uint8_t old[4]; /* both handles name what it was renamed to, or did: the lease stays with the other */
        put_u32(old, t->left[i].old);
        replica_send(r, STREAM_OWN, FRAME_DETACH, old, sizeof old);
    }
    void (*durable)(void *, int, const char *) = t->durable;
    if (durable)
        durable(t->durable_arg, err, text);
}

/* Who refused what another has taken is not where that one is. */
static void drop_refusers(struct hub_txn *t)
{
    EACH_REPLICA(r, hub_of(t->s))
    if (t->leg[r->index] == LEG_FAILED && r->state != REPLICA_DOWN) {
        t->leg[r->index] = LEG_NONE;
        replica_drop(r, false, "it refused an epoch that another took: %s", t->error);
    }
}

/* Whether all who count have answered; then it is told. */
static bool settle(struct hub_txn *t)
{
    struct hub *h = hub_of(t->s);
    bool durable = false, failed = false;
    if (t->told || !t->ended)
        return false;
    if (t->err) {
        tell(t, t->err, t->error);
        return true;
    }
    EACH_REPLICA(r, h)
    {
        if (r->state == REPLICA_IN && unanswered(t, r->index))
            return false;
        durable |= t->leg[r->index] == LEG_DURABLE && r->state == REPLICA_IN;
        failed |= t->leg[r->index] == LEG_FAILED;
    }
    if (durable) {
        drop_refusers(t);
        lineages_note(t);
        tell(t, 0, "");
    } else if (failed) {
        tell(t, t->refusal, t->error);
    } else {
        char why[STORE_ERROR];
        hub_why_none(h, why, sizeof why);
        tell(t, -ENOTCONN, why);
    }
    return true;
}

static void tell_received(struct hub_txn *t)
{
    if (!t->received || t->told)
        return;
    bool some = false;
    EACH_REPLICA(r, hub_of(t->s))
    {
        uint8_t leg = t->leg[r->index];
        if (r->state == REPLICA_IN && (leg == LEG_OPEN || leg == LEG_ENDED))
            return;
        some |= leg == LEG_RECEIVED || leg == LEG_DURABLE;
    }
    void (*received)(void *) = some ? t->received : NULL;
    if (!received)
        return;
    t->received = NULL;
    received(t->durable_arg);
}

static struct hub_txn *txn_by_seq(struct hub *h, uint64_t seq)
{
    struct hub_txn *t;
    TAILQ_FOREACH(t, &h->by_seq[seq % HUB_BUCKETS], by_seq)
    if (t->seq == seq)
        return t;
    return NULL;
}

static void leg_failed(struct hub_txn *t, struct replica *r, const struct buf *p)
{
    char text[FRAME_TEXT_MAX];
    int err = replica_failed(p, text, sizeof text);
    if (t->leg[r->index] == LEG_OPEN) /* it drops what comes for it up to its end, which this is */
        send_abort(t, r);
    t->leg[r->index] = LEG_FAILED;
    if (!t->refusal) {
        snprintf(t->error, sizeof t->error, "%s", text);
        t->refusal = err;
    }
    bool left = false;
    EACH_REPLICA(o, hub_of(t->s))
    left |= o->state == REPLICA_IN && t->leg[o->index] != LEG_FAILED && t->leg[o->index] != LEG_NONE;
    if (!left && !t->told && !t->ended) { /* no need to wait for its END */
        t->err = err;
        hub_soon(hub_of(t->s));
    }
}

void txn_answer(struct replica *r, uint32_t stream, uint8_t type, const struct buf *p)
{
    struct hub_txn *t = p->len >= 8 ? txn_by_seq(r->hub, get_u64(p->data)) : NULL;
    if (!t || !t->lane || t->lane->stream != stream || !unanswered(t, r->index))
        return;
    if (type == FRAME_FAILED) {
        leg_failed(t, r, p);
    } else if (type == FRAME_RECEIVED) {
        t->leg[r->index] = LEG_RECEIVED;
        tell_received(t);
        return;
    } else {
        t->leg[r->index] = LEG_DURABLE;
        tell_received(t);
    }
    if (!t->first_at)
        t->first_at = hub_now(r->hub);
    settle(t);
}

void txns_lost(struct replica *r)
{
    struct hub_txn *t;
    TAILQ_FOREACH(t, &r->hub->txns, link)
    if (t->leg[r->index] != LEG_DURABLE)
        t->leg[r->index] = LEG_NONE;
    hub_soon(r->hub);
}

/* Windows: while the fastest has less than CONN_LOW before it. */
static void credit(struct hub_txn *t)
{
    if (!t->withheld || !t->spilled)
        return;
    bool room = t->err != 0;
    EACH_REPLICA(r, hub_of(t->s))
    room |= r->state == REPLICA_IN && t->leg[r->index] == LEG_OPEN && conn_queued(r->conn, t->lane->stream) < CONN_LOW;
    if (!room)
        return;
    size_t bytes = t->withheld;
    t->withheld = 0;
    t->spilled(t->arg, bytes);
}

void txns_drained(struct replica *r, uint32_t stream)
{
    struct hub_txn *t;
    TAILQ_FOREACH(t, &r->hub->txns, link)
    if (t->lane && t->lane->stream == stream && !t->handed)
        break;
    if (t)
        credit(t);
}

static bool over(const struct hub_txn *t)
{
    if (!t->told || queued(t))
        return false;
    for (unsigned i = 0; i < HUB_REPLICAS; i++)
        if (unanswered(t, i))
            return false;
    return true;
}

/* The cut: what is open now, and all that comes, is for r too. */
void txns_queue(struct replica *r)
{
    struct hub_txn *t;
    r->queueing = true;
    TAILQ_FOREACH(t, &r->hub->txns, link)
    if (t->begun && !t->ended)
        t->leg[r->index] = LEG_QUEUED;
}

bool txns_whole(const struct hub *h)
{
    const struct hub_txn *t;
    TAILQ_FOREACH(t, &h->txns, link)
    if (t->begun && !t->ended && !t->whole)
        return false;
    return true;
}

void txns_unqueue(struct replica *r)
{
    struct hub_txn *t;
    r->queueing = false;
    TAILQ_FOREACH(t, &r->hub->txns, link)
    if (t->leg[r->index] == LEG_QUEUED)
        t->leg[r->index] = LEG_NONE;
    hub_soon(r->hub);
}

bool txns_flush(struct replica *r)
{
    struct hub_txn *t;
    bool ready = true;
    TAILQ_FOREACH(t, &r->hub->txns, link)
    for (size_t i = 0; t->leg[r->index] == LEG_QUEUED && i < t->slots_n; i++)
        if (!t->slots[i].name->there[r->index].attached) {
            name_attach(t->slots[i].name, r, STREAM_OWN);
            ready = false;
        }
    if (!ready)
        return false;
    TAILQ_FOREACH(t, &r->hub->txns, link)
    if (t->leg[r->index] == LEG_QUEUED && !t->blocked) {
        leg_flush(t, r);
        for (size_t i = 0; t->ended && i < t->left_n; i++)
            name_attach_as(t->left[i].name, r, t->lane->stream, t->left[i].handle);
    }
    return true;
}

bool txns_pending(const struct replica *r)
{
    const struct hub_txn *t;
    TAILQ_FOREACH(t, &r->hub->txns, link)
    if (t->ended && unanswered(t, r->index))
        return true;
    return false;
}

bool txns_late(const struct replica *r)
{
    const struct hub_txn *t;
    if (!r->greeted || conn_queued(r->conn, 0) > CONN_LOW)
        return true;
    TAILQ_FOREACH(t, &r->hub->txns, link)
    if (t->told && (t->leg[r->index] == LEG_QUEUED || unanswered(t, r->index)) &&
        hub_now(r->hub) - t->told_at > HUB_WAIT_MS / 4)
        return true;
    return false;
}

void txns_tick(struct hub *h)
{
    struct hub_txn *t;
    bool slow[HUB_REPLICAS] = {false};
    TAILQ_FOREACH(t, &h->txns, link)
    for (unsigned i = 0;
         t->ended && !t->told && t->first_at && hub_now(h) - t->first_at >= HUB_WAIT_MS && i < h->replicas_n; i++)
        slow[i] |= unanswered(t, i);
    EACH_REPLICA(r, h)
    if (slow[r->index] && r->state == REPLICA_IN)
        replica_drop(r, true, "an epoch was not acknowledged within %u ms of another replica's acknowledgement",
                     HUB_WAIT_MS);
    lanes_tick(h);
}

/* One thing to do; false when there is none. Callbacks may change the list. */
static bool step_one(struct hub *h)
{
    struct hub_txn *t;
    TAILQ_FOREACH(t, &h->txns, link)
    {
        if (t->blocked && !t->err && !behind_held(t)) {
            unblock(t);
            return true;
        }
        if (may_end(t)) {
            txn_end(t);
            return true;
        }
        if (settle(t))
            return true;
        if (over(t)) {
            txn_free(t);
            return true;
        }
    }
    return false;
}

void txns_step(struct hub *h)
{
    struct hub_txn *t;
    TAILQ_FOREACH(t, &h->txns, link)
    credit(t);
    while (step_one(h))
        ;
}
