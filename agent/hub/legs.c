/* The ways of epochs to the replicas: lanes, frames, what is kept of open epochs for those who come in by a cut. See
 * txn.c. */
#include "agent/hub/txn.h"

#include <stdlib.h>
#include <string.h>

#define REGION_FENCE 20u /* where the fence stands in a REGION */

bool leg_live(const struct replica *r)
{
    return r->greeted && (r->state == REPLICA_IN || r->state == REPLICA_FOLLOWING);
}

/* Lanes */

struct lane *lane_of(struct hub *h, const void *chain)
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

void lanes_tick(struct hub *h)
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

void leg_end(struct hub_txn *t, struct replica *r)
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

void leg_abort(struct hub_txn *t, struct replica *r)
{
    uint8_t payload[8];
    put_u64(payload, t->seq);
    if (r->greeted)
        replica_send(r, t->lane->stream, FRAME_ABORT, payload, sizeof payload);
}

bool txn_queued(const struct hub_txn *t)
{
    bool any = false;
    for (unsigned i = 0; i < HUB_REPLICAS; i++)
        any |= t->leg[i] == LEG_QUEUED;
    return any;
}

void txn_items_drop(struct hub_txn *t)
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
    if (!t->blocked && (full || (!txn_queued(t) && !worth_keeping(h)))) {
        bool was = txn_queued(t);
        txn_items_drop(t);
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
bool txn_behind_held(const struct hub_txn *t)
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

void txn_begin(struct hub_txn *t)
{
    struct hub *h = hub_of(t->s);
    t->begun = true;
    t->whole = true;
    t->blocked = txn_behind_held(t);
    EACH_REPLICA(r, h)
    {
        if (leg_live(r) && !t->blocked)
            send_begin(t, r);
        else if (leg_live(r) || r->queueing)
            t->leg[r->index] = LEG_QUEUED;
    }
}

void leg_flush(struct hub_txn *t, struct replica *r)
{
    send_begin(t, r);
    for (size_t i = 0; i < t->items_n; i++)
        send_item(t, r, &t->items[i]);
    if (t->ended && !t->err)
        leg_end(t, r);
}

void txn_unblock(struct hub_txn *t)
{
    t->blocked = false;
    EACH_REPLICA(r, hub_of(t->s))
    if (leg_live(r) && t->leg[r->index] == LEG_QUEUED)
        leg_flush(t, r);
}

/* One more frame to all. */
void txn_frame(struct hub_txn *t, struct item i)
{
    struct hub *h = hub_of(t->s);
    t->frames++;
    EACH_REPLICA(r, h)
    if (t->leg[r->index] == LEG_OPEN)
        send_item(t, r, &i);
    item_keep(t, i);
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
    if (t->ended && leg_unanswered(t, r->index))
        return true;
    return false;
}

bool txns_late(const struct replica *r)
{
    const struct hub_txn *t;
    if (!r->greeted || conn_queued(r->conn, 0) > CONN_LOW)
        return true;
    TAILQ_FOREACH(t, &r->hub->txns, link)
    if (t->told && (t->leg[r->index] == LEG_QUEUED || leg_unanswered(t, r->index)) &&
        hub_now(r->hub) - t->told_at > HUB_WAIT_MS / 4)
        return true;
    return false;
}
