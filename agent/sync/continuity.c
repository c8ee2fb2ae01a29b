/* What becomes of a group when its link is lost, an epoch is refused, or the remote is not where we left it.
 *
 * Continuity: after a lost link the regions are attached again, and their epoch numbers tell which of the queue was
 * committed. If the rest fits on, it is sent again; if not (the remote lost epochs, or an epoch was too large to be
 * kept), the queue is dropped and every body is compared by hashes. */
#include "agent/sync/capture.h"
#include "agent/base/log.h"

#define RETRY_MS 500u
#define RETRY_MAX_MS 8000u

/* Nothing of the queue can be used: the remote is asked what it has, and all is compared. */
static void resync(struct group *g)
{
    for (struct epoch **at = &g->queue; *at;) {
        struct epoch *e = *at;
        if (g->capture && g->capture->epoch == e) {
            at = &e->next;
            continue;
        }
        *at = e->next;
        epoch_free(e);
    }
    for (struct waiter *w = g->waiters; w; w = w->next)
        if (w->captured)
            w->captured = w->assigned = false;
    for (struct region *r = g->regions; r; r = r->next_group) {
        if (!r->body || !region_takes_part(r))
            continue;
        r->body->refetch = true; /* what was captured and is lost shows as published, and not there */
        r->attach = r->attach == ATTACH_HASHING ? r->attach : ATTACH_LOOSE;
    }
    g->compare = false;
    g->wanted = true;
    if (g->capture)
        capture_abort(g->capture);
    if (g->link->state == LINK_UP)
        group_link_up(g);
}

static void send_again(struct group *g)
{
    bool whole = true;
    for (struct epoch *e = g->queue; e; e = e->next) {
        whole &= e->kept;
        e->begun = e->ended = e->received = false;
        e->sent = 0;
    }
    if (!whole)
        resync(g);
}

void group_link_lost(struct group *g)
{
    for (struct region *r = g->regions; r; r = r->next_group)
        if (r->attach != ATTACH_REFUSED && r->attach != ATTACH_FENCED)
            r->attach = ATTACH_LOOSE;
    g->compare = true;
    send_again(g);
}

void group_link_up(struct group *g)
{
    for (struct region *r = g->regions; r; r = r->next_group)
        if (r->attach == ATTACH_LOOSE && (r->body || r->held_before || r->doomed) &&
            uv_now(g->link->local->loop) >= r->retry_at)
            link_attach(r);
    group_check(g);
}

/* The remote's epoch of a body, by lineage; 0 when it has none. */
static uint64_t there_epoch(const struct group *g, const struct body *b)
{
    for (const struct region *r = g->regions; r; r = r->next_group)
        if (r->there.status == FRAME_ATTACH_EXISTS && id_same(&r->there.lineage, &b->lineage))
            return r->there.epoch;
    return 0;
}

static bool committed(const struct group *g, const struct epoch *e)
{
    if (!e->closed || !e->ntouched)
        return false;
    uint64_t there = there_epoch(g, e->touched[0].body);
    return e->touched[0].number ? there >= e->touched[0].number : !there;
}

static bool continues(const struct group *g)
{
    for (const struct region *r = g->regions; r; r = r->next_group) {
        if (!r->body || !region_takes_part(r) || r->body->refetch || id_none(&r->body->lineage))
            continue;
        uint64_t next = there_epoch(g, r->body);
        for (const struct epoch *e = g->queue; e; e = e->next)
            for (size_t i = 0; i < e->ntouched; i++)
                if (e->touched[i].body == r->body && e->touched[i].number && e->touched[i].number != ++next)
                    return false;
        if (next != r->body->epoch)
            return false;
    }
    return true;
}

void group_check(struct group *g)
{
    if (g->link->state != LINK_UP)
        return;
    for (struct region *r = g->regions; r; r = r->next_group)
        if (region_takes_part(r) && (r->attach == ATTACH_ASKED || (r->body && r->attach != ATTACH_DONE)))
            return;
    if (g->compare) {
        g->compare = false;
        while (g->queue && committed(g, g->queue))
            group_pop_durable(g);
        if (!continues(g)) {
            log_info("%s: the remote's epochs do not continue ours: comparing by hashes", g->link->address);
            resync(g);
            return;
        }
        for (struct region *r = g->regions; r; r = r->next_group)
            if (!r->body && r->there.status == FRAME_ATTACH_EXISTS && !id_none(&r->last) &&
                id_same(&r->there.lineage, &r->last) && !g->queue) {
                struct body *gone = body_new(-1, 0, (struct source){0, 0});
                if (gone) {
                    gone->lineage = r->last;
                    group_op(g, FRAME_OP_UNLINK, r, NULL, gone);
                    r->vacant = true;
                    body_drop(gone);
                }
            }
    }
    group_step(g);
}

static void again_later(struct group *g)
{
    g->retry_ms = !g->retry_ms ? RETRY_MS : g->retry_ms * 2 > RETRY_MAX_MS ? RETRY_MAX_MS : g->retry_ms * 2;
    g->retry_at = group_now(g) + g->retry_ms;
    conn_forget(g->link->conn, g->stream);
    g->stream = ++g->link->next_stream;
    for (struct region *r = g->regions; r; r = r->next_group)
        if (region_takes_part(r) && r->attach == ATTACH_DONE) {
            r->attach = ATTACH_LOOSE;
            r->retry_at = g->retry_at;
        }
    g->compare = true;
    g->wanted = true;
    send_again(g);
}

/* An epoch was refused. All after it on the stream are, too: their answers, of a stream we gave up, find no epoch. */
void group_failed(struct group *g, uint64_t seq, uint16_t code, const char *text)
{
    bool ours = false;
    for (struct epoch *e = g->queue; e; e = e->next)
        ours |= e->seq == seq && e->begun && e->stream == g->stream;
    if (!ours)
        return;
    log_info("%s: epoch %llu refused: %s", g->link->address, (unsigned long long)seq, text);
    if (code == FRAME_E_FENCED) {
        for (struct region *r = g->regions; r; r = r->next_group)
            if (r->body && region_takes_part(r)) {
                r->attach = ATTACH_LOOSE; /* asking again tells who holds it now */
                r->retry_at = 0;
            }
        again_later(g);
        return;
    }
    again_later(g);
    if (code == FRAME_E_DELTA) { /* the queue rests on a page that is not what we took it for */
        for (struct region *r = g->regions; r; r = r->next_group)
            if (r->body)
                r->body->plain = r->body->base_doubted = true;
        resync(g);
    } else if (code != FRAME_E_LINEAGE) {
        group_degrade(g, "the remote cannot commit: %s", text);
    }
}
