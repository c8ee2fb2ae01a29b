/* Catching up: what one replica lacks of another, while epochs go on.
 *
 * The cut. ENDs are held back for a moment (at most HUB_HOLD_MS, mostly a few ms), until the source has answered all it
 * was given; then it pins every region. From here on live epochs are kept for the target, beginning with those that
 * were open, and everybody else goes on. So the pins are one state of all regions, and what is kept continues exactly
 * it. An epoch too large to be kept passes first: a round waits until none is open.
 *
 * The plan. By name and lineage: the same epoch is compared and must be the same; an older one is compared and gets the
 * pages that differ; a name that is not there is created. What the target has and the source has not, or under another
 * lineage, is removed when it is known as an older copy of ours; else the target is refused, as it is when it is
 * ahead: nobody here may remove the only good copy of something.
 *
 * Sending (send.c). One epoch for each writer, from the target's number to the pinned one. Then the kept epochs, and
 * the target follows. If more had to be kept than HUB_QUEUE, another round is needed.
 *
 * At an opening (merge) the same brings the source's newer epochs to the target; there is nothing live then. */
#include "agent/hub/round.h"

#include "agent/base/log.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define REGIONS_MAX 1000u /* below what a connection may pin */
#define AGAIN_MS 250u
#define FAILED_MS 1000u
#define STEADY_MS 1000u /* after the first time of being too slow; twice that after the next, and so on */
#define STEADY_MAX_MS 60000u

static void let_go(struct round *o)
{
    if (o->held)
        o->hub->holding--;
    o->held = false;
    if (!o->hub->holding)
        o->hub->crowded = false;
    hub_soon(o->hub);
}

void round_drop(struct round *o)
{
    if (--o->refs)
        return;
    free(o->here.entries);
    free(o->there.entries);
    free(o->jobs);
    free(o);
}

static void unpin(struct replica *r, uint32_t pin)
{
    uint8_t payload[4];
    put_u32(payload, pin);
    if (pin && r->greeted)
        replica_send(r, STREAM_OWN, FRAME_UNPIN, payload, sizeof payload);
}

static void jobs_end(struct round *o)
{
    for (size_t i = 0; i < o->jobs_n; i++) {
        unpin(o->source, o->jobs[i].pin);
        unpin(o->target, o->jobs[i].base_pin);
    }
    o->jobs_n = 0;
    names_unwanted(o->target);
}

void round_free(struct round *o)
{
    uint8_t seq[8];
    put_u64(seq, o->seq);
    if (o->open && o->target->greeted)
        replica_send(o->target, STREAM_ROUND, FRAME_ABORT, seq, sizeof seq);
    jobs_end(o);
    compare_free(&o->compare);
    let_go(o);
    if (o->target->queueing && o->target->state == REPLICA_BEHIND)
        txns_unqueue(o->target);
    o->target->round = NULL;
    o->dead = true;
    round_drop(o);
}

bool round_uses(const struct round *o, const struct replica *r)
{
    return o->source == r || o->target == r;
}

void round_fail(struct round *o, const char *format, ...)
{
    char why[FRAME_TEXT_MAX + 400];
    struct replica *r = o->target;
    va_list ap;
    va_start(ap, format);
    vsnprintf(why, sizeof why, format, ap);
    va_end(ap);
    bool news = strcmp(why, r->said);
    log_at(news ? LOG_WARN : LOG_INFO, "hub: %s cannot be brought up to date: %s; tried again", r->address, why);
    snprintf(r->said, sizeof r->said, "%s", why);
    snprintf(r->reason, sizeof r->reason, "%s", why);
    r->retry_at = hub_now(r->hub) + FAILED_MS;
    round_free(o);
    if (r->hub->opening && r->greeted)
        opening_list(r);
}

void round_start(struct replica *source, struct replica *target, bool merge)
{
    struct round *o = calloc(1, sizeof *o);
    if (!o)
        return;
    *o = (struct round){.hub = target->hub,
                        .source = source,
                        .target = target,
                        .merge = merge,
                        .refs = 1,
                        .began = hub_now(target->hub)};
    o->here.round = o->there.round = o;
    target->round = o;
    hub_soon(o->hub);
}

/* What both have */

static void on_list(void *arg, struct replica *r, uint8_t type, const struct buf *p)
{
    struct listing *l = arg;
    struct round *o = l->round;
    uint32_t request;
    (void)r;
    if (type == FRAME_ENTRY && !o->dead) {
        struct frame_entry *entries = hub_room(l->entries, l->n, &l->cap, sizeof *entries);
        if (entries && !frame_entry_get(p->data, p->len, &request, &entries[l->n]))
            l->n++;
        l->entries = entries ? entries : l->entries;
    }
    if (type == FRAME_ENTRY)
        return;
    if (!o->dead) {
        o->asked--;
        if (type != FRAME_LIST_END && !o->why[0])
            snprintf(o->why, sizeof o->why, "its regions cannot be listed");
    }
    round_drop(o);
}

static void ask_list(struct round *o, struct replica *r, struct listing *l)
{
    uint8_t payload[4];
    o->asked++;
    o->refs++;
    replica_ask(r, STREAM_OWN, FRAME_LIST, payload, sizeof payload, on_list, l);
}

static void on_pinned(void *arg, struct replica *r, uint8_t type, const struct buf *p)
{
    struct job *j = arg;
    struct round *o = j->round;
    uint32_t request, pin = 0;
    struct frame_entry e;
    bool good = type == FRAME_PINNED && !frame_pinned_get(p->data, p->len, &request, &pin, &e);
    if (o->dead) {
        unpin(r, pin);
    } else {
        o->asked--;
        if (type == FRAME_FAILED)
            replica_failed(p, o->why, sizeof o->why);
        else if (!good)
            snprintf(o->why, sizeof o->why, "no pin");
        if (good && r == o->source) {
            j->pin = pin;
            j->lineage = e.lineage;
            j->writer = e.writer;
            j->epoch = e.epoch;
            j->size = e.size;
        } else if (good) {
            j->base_pin = pin;
            if (!id_same(&e.lineage, &j->lineage) || e.epoch != j->base)
                snprintf(o->why, sizeof o->why, "%s has just changed there", j->name->text);
        }
    }
    round_drop(o);
}

static void ask_pin(struct round *o, struct replica *r, struct job *j)
{
    o->asked++;
    o->refs++;
    replica_ask_name(r, FRAME_PIN, j->name->text, -1, on_pinned, j);
}

/* Every region of the source gets a job, whatever comes of it, and is pinned. */
static bool pin_all(struct round *o)
{
    if (o->here.n > REGIONS_MAX) {
        snprintf(o->why, sizeof o->why, "%zu regions are more than the %u that can be kept still at once", o->here.n,
                 REGIONS_MAX);
        return false;
    }
    o->jobs = calloc(o->here.n + o->there.n + 1, sizeof *o->jobs); /* not moved: answers point into it */
    for (size_t i = 0; o->jobs && i < o->here.n; i++) {
        struct job *j = &o->jobs[o->jobs_n];
        *j = (struct job){.round = o, .kind = JOB_CREATE, .name = name_of(o->hub, o->here.entries[i].name)};
        if (!j->name)
            return false;
        o->jobs_n++;
        ask_pin(o, o->source, j);
    }
    return o->jobs;
}

/* The plan */

static bool older_copy(const struct hub *h, const struct frame_entry *e)
{
    const struct lineage *l = lineage_find(h, &e->lineage);
    return l && e->epoch <= l->epoch;
}

static void refuse(struct round *o, const struct frame_entry *e, const char *why)
{
    struct replica *r = o->target, *source = o->source;
    char name[NAME_CAP], lineage[ID_TEXT];
    unsigned long long epoch = e->epoch;
    snprintf(name, sizeof name, "%s", e->name);
    id_text(&e->lineage, lineage);
    replica_refuse(r,
                   "%.300s there (lineage %s, epoch %llu) %s %s; nothing of it was touched. If it can go: `memsync rm "
                   "%.300s --remote %s`, then it is brought up to date",
                   name, lineage, epoch, why, source->address, name, r->address);
}

static struct job *job_named(struct round *o, const char *name)
{
    for (size_t i = 0; i < o->jobs_n; i++)
        if (!strcmp(o->jobs[i].name->text, name))
            return &o->jobs[i];
    return NULL;
}

/* What becomes of a region that the target has. False: refused, and the round is gone. */
static bool plan_one(struct round *o, const struct frame_entry *e)
{
    struct job *j = job_named(o, e->name);
    if (j && id_same(&j->lineage, &e->lineage)) {
        j->base = e->epoch;
        j->base_size = e->size;
        j->kind = e->epoch < j->epoch ? JOB_ADVANCE : JOB_SAME;
        if (e->epoch > j->epoch && !o->merge) {
            refuse(o, e, "is ahead of the one at");
            return false;
        }
        return true;
    }
    if (o->merge)
        return true;
    if (!older_copy(o->hub, e)) {
        refuse(o, e, j ? "has not the lineage of the one at" : "is not known, and not at");
        return false;
    }
    if (!j) {
        o->jobs[o->jobs_n++] = (struct job){.round = o,
                                            .kind = JOB_UNLINK,
                                            .name = name_of(o->hub, e->name),
                                            .writer = e->writer,
                                            .lineage = e->lineage,
                                            .base = e->epoch};
    }
    return true;
}

/* Merging: only what the source has more of. */
static bool left_out(const struct round *o, const struct job *j)
{
    const struct lineage *l = lineage_find(o->hub, &j->lineage);
    bool gone = l && l->gone && j->epoch <= l->epoch;
    for (size_t i = 0; i < o->there.n; i++)
        if (!strcmp(o->there.entries[i].name, j->name->text) && !id_same(&o->there.entries[i].lineage, &j->lineage))
            return true; /* opening.c has seen to it */
    return gone || j->kind == JOB_SAME;
}

static int by_writer(const void *a, const void *b)
{
    const struct job *x = a, *y = b;
    int order = memcmp(&x->writer, &y->writer, sizeof x->writer);
    return order ? order : (y->kind == JOB_UNLINK) - (x->kind == JOB_UNLINK);
}

static bool plan(struct round *o)
{
    for (size_t i = 0; i < o->there.n; i++)
        if (!plan_one(o, &o->there.entries[i]))
            return false;
    size_t kept = 0;
    for (size_t i = 0; i < o->jobs_n; i++) {
        if (o->merge && left_out(o, &o->jobs[i]))
            unpin(o->source, o->jobs[i].pin);
        else
            o->jobs[kept++] = o->jobs[i];
    }
    o->jobs_n = kept;
    if (kept)
        qsort(o->jobs, kept, sizeof *o->jobs, by_writer);
    return true;
}

/* Leases, pins, and the files that regions were made from */

static void on_source(void *arg, struct replica *r, uint8_t type, const struct buf *p)
{
    struct job *j = arg;
    struct round *o = j->round;
    struct frame_attached a;
    bool good = type == FRAME_ATTACHED && !frame_attached_get(p->data, p->len, &a);
    if (!o->dead) {
        o->asked--;
        if (good)
            j->source = a.source;
    }
    if (good && a.status <= FRAME_ATTACH_EXISTS) {
        uint8_t handle[4];
        put_u32(handle, a.handle);
        replica_send(r, STREAM_OWN, FRAME_DETACH, handle, sizeof handle);
    }
    round_drop(o);
}

static void prepare(struct round *o)
{
    for (size_t i = 0; i < o->jobs_n; i++) {
        struct job *j = &o->jobs[i];
        if (j->kind == JOB_SAME || j->kind == JOB_ADVANCE)
            ask_pin(o, o->target, j);
        if (j->kind != JOB_SAME)
            name_attach(j->name, o->target, STREAM_OWN);
        if (j->kind != JOB_CREATE)
            continue;
        j->handle = ++o->hub->next_handle;
        o->asked++;
        o->refs++;
        replica_ask_attach(o->source, STREAM_OWN, j->handle, j->name->text, false, on_source, j);
    }
}

static bool prepared(const struct round *o)
{
    for (size_t i = 0; i < o->jobs_n; i++)
        if (o->jobs[i].kind != JOB_SAME && !o->jobs[i].name->there[o->target->index].attached)
            return false;
    return !o->asked;
}

/* Nothing is wrong, but it did not work out: another round is tried. */
static void again(struct round *o)
{
    struct replica *r = o->target;
    r->retry_at = hub_now(o->hub) + AGAIN_MS;
    round_free(o);
}

void round_answer(struct round *o, uint8_t type, const struct buf *p)
{
    struct frame_failed f = {.seq = 0};
    uint64_t seq = type == FRAME_FAILED ? 0 : p->len >= 8 ? get_u64(p->data) : 0;
    if (type == FRAME_FAILED && !frame_failed_get(p->data, p->len, &f))
        seq = f.seq;
    if (seq != o->seq || type == FRAME_RECEIVED)
        return;
    if (type == FRAME_FAILED && f.code == FRAME_E_LINEAGE) {
        again(o); /* what it still had to commit of its last connection came in between */
    } else if (type == FRAME_FAILED) {
        round_fail(o, "it refuses the difference: %s", f.text);
    } else if (o->phase == ROUND_COMMIT) {
        o->phase = ROUND_SEND;
    }
}

/* Regions at the same epoch must be the same. */
static bool same_step(struct round *o)
{
    struct compare *c = &o->compare;
    if (!c->job) {
        while (o->job < o->jobs_n && o->jobs[o->job].kind != JOB_SAME)
            o->job++;
        if (o->job == o->jobs_n) {
            o->job = 0;
            o->phase = ROUND_SEND;
            return true;
        }
        if (o->jobs[o->job].size == o->jobs[o->job].base_size)
            compare_begin(o, &o->jobs[o->job]);
        else
            *c = (struct compare){.job = &o->jobs[o->job], .differs = true, .copying = true};
    }
    if (!compare_step(o))
        return false;
    if (c->failed) {
        round_fail(o, "%s cannot be compared: %s", c->job->name->text, o->why[0] ? o->why : "no answer");
        return false;
    }
    if (c->differs) {
        struct frame_entry e = {.lineage = c->job->lineage, .epoch = c->job->epoch};
        snprintf(e.name, sizeof e.name, "%s", c->job->name->text);
        refuse(o, &e, "is at the epoch of, but has other content than, the one at");
        return false;
    }
    compare_free(c);
    o->job++;
    return true;
}

static void flush(struct round *o)
{
    struct replica *r = o->target;
    struct hub *h = o->hub;
    if (o->merge) {
        round_free(o);
        opening_list(r);
        return;
    }
    if (!r->queueing) { /* more came meanwhile than could be kept: the next round has less to do */
        round_free(o);
        return;
    }
    if (!names_attached(r) || !txns_flush(r))
        return;
    uint64_t steady = r->drops ? (uint64_t)STEADY_MS << (r->drops > 6 ? 6 : r->drops - 1) : 0;
    r->steady_at = hub_now(h) + (steady > STEADY_MAX_MS ? STEADY_MAX_MS : steady);
    r->said[0] = 0;
    log_info("hub: %s: brought up to date in %llu ms, %llu bytes", r->address,
             (unsigned long long)(hub_now(h) - o->began), (unsigned long long)o->bytes);
    replica_enter(r, REPLICA_FOLLOWING, "has the difference");
    round_free(o);
}

static bool look(struct round *o)
{
    if (!o->merge && (!names_attached(o->target) || !txns_whole(o->hub)))
        return false;
    if (!o->merge) {
        o->hub->holding++;
        o->held = true;
    }
    o->held_since = hub_now(o->hub);
    o->phase = ROUND_DRAIN;
    return true;
}

static bool drain(struct round *o)
{
    if (!o->merge && txns_pending(o->source))
        return false;
    ask_list(o, o->source, &o->here);
    ask_list(o, o->target, &o->there);
    o->phase = ROUND_LIST;
    return false;
}

/* One step; true when the next can be taken at once. The round may be gone when it is false. */
static bool step(struct round *o)
{
    if (o->held && (o->hub->crowded || hub_now(o->hub) - o->held_since > HUB_HOLD_MS)) {
        again(o);
        return false;
    }
    switch (o->phase) {
    case ROUND_LOOK:
        return look(o);
    case ROUND_DRAIN:
        return drain(o);
    case ROUND_LIST:
        if (o->asked)
            return false;
        if (!o->why[0] && pin_all(o)) {
            o->phase = ROUND_PIN;
            return true;
        }
        break;
    case ROUND_PIN:
        if (o->asked)
            return false;
        if (o->why[0])
            break;
        if (!o->merge && !txns_whole(o->hub)) {
            again(o);
            return false;
        }
        if (!o->merge)
            txns_queue(o->target);
        let_go(o);
        if (!plan(o))
            return false;
        prepare(o);
        o->phase = ROUND_PREPARE;
        return true;
    case ROUND_PREPARE:
        if (o->why[0] && !o->asked)
            break;
        if (!prepared(o))
            return false;
        o->phase = o->merge ? ROUND_SEND : ROUND_SAME;
        return true;
    case ROUND_SAME:
        return same_step(o);
    case ROUND_SEND:
        return round_send_step(o);
    case ROUND_COMMIT:
        return false;
    case ROUND_FLUSH:
        flush(o);
        return false;
    }
    round_fail(o, "%s", o->why[0] ? o->why : "no memory");
    return false;
}

void round_step(struct round *o)
{
    while (step(o))
        ;
}
