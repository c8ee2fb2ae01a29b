/* What replicas answer to epochs, when that is an answer to the writer, and who has kept one waiting for too long. See
 * txn.c. */
#include "agent/hub/txn.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>

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

bool leg_unanswered(const struct hub_txn *t, unsigned i)
{
    return t->leg[i] == LEG_OPEN || t->leg[i] == LEG_ENDED || t->leg[i] == LEG_RECEIVED;
}

static void tell(struct hub_txn *t, int err, const char *text)
{
    t->told = true;
    t->taken = !err;
    t->told_at = hub_now(hub_of(t->s));
    txn_names_busy(t, -1);
    EACH_REPLICA(r, hub_of(t->s))
    for (size_t i = 0; leg_live(r) && t->leg[r->index] != LEG_NONE && i < t->left_n; i++) {
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
        if (r->state == REPLICA_IN && leg_unanswered(t, r->index))
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
        leg_abort(t, r);
    t->leg[r->index] = LEG_FAILED;
    if (t->taken) { /* one that follows answers later than those that are in */
        t->leg[r->index] = LEG_NONE;
        replica_drop(r, false, "it refused an epoch that another took: %s", text);
        return;
    }
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
    if (!t || !t->lane || t->lane->stream != stream || !leg_unanswered(t, r->index))
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

/* Windows: while the fastest has less than CONN_LOW before it. When nobody is left who takes it, its writer has to hear
 * so: it does when it goes on. */
static void credit(struct hub_txn *t)
{
    if (!t->withheld || !t->spilled)
        return;
    bool room = t->err != 0, taken = t->blocked;
    EACH_REPLICA(r, hub_of(t->s))
    if (r->state == REPLICA_IN && t->leg[r->index] == LEG_OPEN) {
        taken = true;
        room |= conn_queued(r->conn, t->lane->stream) < CONN_LOW;
    }
    if (!room && taken)
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
    if (!t->told || txn_queued(t))
        return false;
    for (unsigned i = 0; i < HUB_REPLICAS; i++)
        if (leg_unanswered(t, i))
            return false;
    return true;
}

void txns_tick(struct hub *h)
{
    struct hub_txn *t;
    bool slow[HUB_REPLICAS] = {false};
    TAILQ_FOREACH(t, &h->txns, link)
    for (unsigned i = 0;
         t->ended && !t->told && t->first_at && hub_now(h) - t->first_at >= HUB_WAIT_MS && i < h->replicas_n; i++)
        slow[i] |= leg_unanswered(t, i);
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
        if (t->blocked && !t->err && !txn_behind_held(t)) {
            txn_unblock(t);
            return true;
        }
        if (txn_may_end(t)) {
            txn_end(t);
            return true;
        }
        if (settle(t))
            return true;
        if (over(t)) {
            hub_txn_free(t);
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
