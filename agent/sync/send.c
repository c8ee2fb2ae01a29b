/* How a group's epochs travel: in the order of their numbers, each as a whole, the one that is still being captured as
 * it grows; and what the remote's answers do to the queue. */
#include "agent/sync/capture.h"
#include "agent/page/page.h"

#include <errno.h>
#include <stdlib.h>

#define GATHER_BYTES (256u << 10)

uint64_t group_queue_bytes(const struct group *g)
{
    uint64_t all = 0;
    for (const struct epoch *e = g->queue; e; e = e->next)
        all += e->kept ? e->bytes : 0;
    return all;
}

static void send_begin(struct group *g, const struct epoch *e)
{
    struct buf *buf = buf_new(8);
    if (!buf)
        return;
    put_u64(buf->data, e->seq);
    buf->len = 8;
    conn_send(g->link->conn, e->stream, FRAME_BEGIN, buf);
}

/* Whether somebody goes on when the epoch has been received: else it is not worth an answer. */
static bool received_matters(const struct group *g)
{
    for (const struct waiter *w = g->waiters; w; w = w->next)
        if (w->ack == CONTROL_ACK_RECEIVED)
            return true;
    return false;
}

static void send_end(struct group *g, const struct epoch *e)
{
    struct buf *buf = buf_new(17);
    if (!buf)
        return;
    put_u64(buf->data, e->seq);
    put_u64(buf->data + 8, e->count);
    buf->data[16] = 1;
    buf->len = received_matters(g) ? 16 : 17;
    conn_send(g->link->conn, e->stream, FRAME_END, buf);
}

/* Its fence may have changed since the frame was made: the lease was given anew. */
static struct buf *fenced_now(const struct epoch *e, struct buf *old)
{
    struct frame_region f;
    if (frame_region_get(old->data, old->len, &f))
        return old;
    for (size_t i = 0; i < e->ntouched; i++)
        if (e->touched[i].region->handle == f.handle)
            f.fence = e->touched[i].region->fence;
    struct buf *b = buf_new(64);
    if (!b)
        return old;
    b->len = (uint32_t)frame_region_put(b->data, b->cap, &f);
    buf_drop(old);
    return b;
}

static void epoch_send(struct group *g, struct epoch *e)
{
    struct conn *c = g->link->conn;
    if (!e->count)
        return; /* nothing has changed yet, and perhaps nothing will have */
    if (!e->begun) {
        e->begun = true;
        e->stream = g->stream;
        send_begin(g, e);
    }
    conn_set_priority(c, e->stream, e->bytes > (1u << 20) ? CONN_BULK : CONN_NORMAL);
    for (; e->sent < e->count; e->sent++) {
        struct item *i = &e->items[e->sent];
        if (i->type == FRAME_REGION)
            i->payload = fenced_now(e, i->payload);
        conn_send(c, e->stream, i->type, buf_hold(i->payload));
    }
    for (size_t n = e->count; !e->kept && n && e->items[n - 1].payload; n--) {
        buf_drop(e->items[n - 1].payload);
        e->items[n - 1].payload = NULL;
    }
    if (e->closed) {
        e->ended = true;
        send_end(g, e);
    }
}

/* While all sync points go on as soon as their bytes are copied here, whole small epochs may wait a moment for more:
 * the remote then takes several at the price of one. */
static bool can_gather(const struct group *g)
{
    uint64_t bytes = 0;
    for (const struct waiter *w = g->waiters; w; w = w->next)
        if (w->ack != CONTROL_ACK_ASYNC || w->kind != WAIT_SYNC)
            return false;
    for (const struct epoch *e = g->queue; e; e = e->next) {
        if (e->begun && !e->ended)
            return false;
        bytes += e->ended ? 0 : e->bytes;
    }
    return bytes && bytes < GATHER_BYTES;
}

void group_pump(struct group *g)
{
    if (g->link->state != LINK_UP || g->compare || group_now(g) < g->retry_at)
        return;
    if (g->all_async && !g->gathered && can_gather(g)) {
        local_gather(g->link->local);
        return;
    }
    g->gathered = false;
    for (struct epoch *e = g->queue; e; e = e->next) {
        if (e->ended && e->stream != g->stream)
            return; /* from before a merge: its acknowledgement first */
        if (!e->ended && !(g->capture && g->capture->aborted && g->capture->epoch == e))
            epoch_send(g, e);
        if (!e->ended)
            return;
    }
}

void group_drained(struct group *g)
{
    group_pump(g);
    if (g->capture)
        capture_resume(g->capture);
}

void group_received(struct group *g, uint64_t seq)
{
    for (struct epoch *e = g->queue; e; e = e->next)
        if (e->seq == seq)
            e->received = true;
    g->last_ack = group_now(g);
    group_settle(g);
}

void group_pop_durable(struct group *g)
{
    struct epoch *e = g->queue;
    g->queue = e->next;
    for (size_t i = 0; i < e->ntouched; i++) {
        struct body *b = e->touched[i].body;
        b->plain = false;
        if (e->touched[i].number > b->durable)
            b->durable = e->touched[i].number;
        if (b->mount)
            page_durable(b);
    }
    epoch_free(e);
}

void group_durable(struct group *g, uint64_t seq)
{
    while (g->queue && g->queue->seq <= seq && g->queue->closed)
        group_pop_durable(g);
    g->last_ack = group_now(g);
    g->retry_ms = 0;
    for (struct region *r = g->regions; r; r = r->next_group)
        if (r->body && r->body->mount)
            page_published(r->body, true);
    group_step(g);
}
