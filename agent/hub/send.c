/* Catching up: the difference, sent. One epoch for each writer (groups never span writers), from the target's number to
 * the source's pinned one: its creations and removals first, then the pages of one region after the other (compare.c).
 * An epoch is answered before the next begins. If the target, the source or the hub dies in between, the target has had
 * some writers' epochs as a whole and nothing of the others', and the next round finds the rest. */
#include "agent/hub/round.h"

#include <stdlib.h>

void round_send(struct round *o, uint8_t type, struct buf *b)
{
    o->frames++;
    o->bytes += b->len;
    conn_send(o->target->conn, STREAM_ROUND, type, b);
}

static void send_op(struct round *o, const struct job *j)
{
    struct frame_op op = {.handle = j->name->handle,
                          .kind = j->kind == JOB_UNLINK ? FRAME_OP_UNLINK : FRAME_OP_CREATE,
                          .lineage = j->lineage,
                          .source = j->source};
    struct buf *b = buf_new(64);
    if (!b)
        abort();
    b->len = (uint32_t)frame_op_put(b->data, b->cap, &op);
    round_send(o, FRAME_OP, b);
}

static void send_region(struct round *o, const struct job *j)
{
    struct frame_region g = {.handle = j->name->handle,
                             .epoch = j->epoch,
                             .base = j->kind == JOB_CREATE ? 0 : j->base,
                             .fence = j->name->there[o->target->index].fence,
                             .min_size = j->kind == JOB_ADVANCE && j->size < j->base_size ? j->size : UINT64_MAX,
                             .size = j->size};
    struct buf *b = buf_new(64);
    if (!b)
        abort();
    b->len = (uint32_t)frame_region_put(b->data, b->cap, &g);
    round_send(o, FRAME_REGION, b);
}

static void epoch_begin(struct round *o)
{
    const struct job *first = &o->jobs[o->job];
    struct frame_begin b = {.seq = (1ull << 32) + ++o->hub->next_seq, .writer = first->writer};
    uint8_t payload[64];
    o->first = o->job;
    o->seq = b.seq;
    o->open = true;
    o->frames = 0;
    replica_send(o->target, STREAM_ROUND, FRAME_BEGIN, payload, frame_begin_put(payload, sizeof payload, &b));
    for (size_t i = o->job; i < o->jobs_n && id_same(&o->jobs[i].writer, &first->writer); i++)
        if (o->jobs[i].kind == JOB_CREATE || o->jobs[i].kind == JOB_UNLINK)
            send_op(o, &o->jobs[i]);
}

static void epoch_end(struct round *o)
{
    uint8_t payload[17];
    put_u64(payload, o->seq);
    put_u64(payload + 8, o->frames);
    payload[16] = 1;
    replica_send(o->target, STREAM_ROUND, FRAME_END, payload, sizeof payload);
    o->open = false;
    o->phase = ROUND_COMMIT;
}

bool round_send_step(struct round *o)
{
    struct compare *c = &o->compare;
    if (c->job) {
        if (!compare_step(o))
            return false;
        if (c->failed) {
            round_fail(o, "%s cannot be copied: %s", c->job->name->text, o->why[0] ? o->why : "no answer");
            return false;
        }
        compare_free(c);
        o->job++;
        return true;
    }
    while (o->job < o->jobs_n && o->jobs[o->job].kind == JOB_SAME)
        o->job++;
    bool more = o->job < o->jobs_n;
    if (o->open && (!more || !id_same(&o->jobs[o->job].writer, &o->jobs[o->first].writer))) {
        epoch_end(o);
        return false;
    }
    if (!more) {
        o->phase = ROUND_FLUSH;
        return true;
    }
    if (!o->open)
        epoch_begin(o);
    struct job *j = &o->jobs[o->job];
    if (j->kind == JOB_UNLINK) {
        o->job++;
        return true;
    }
    send_region(o, j);
    compare_begin(o, j);
    return true;
}
