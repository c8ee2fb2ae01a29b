/* Names: their leases at this hub, and at the replicas; and lineages, which tell an older copy of ours from a stranger.
 *
 * A client's ATTACH goes to every replica that is in, and is answered when all have. What they say of the region must
 * agree: epochs that are on their way are waited for first. One that says less than another is out of step, and
 * dropped.
 *
 * The handle of a name is the same number at every replica. A RENAME takes it along to another name, so the old name
 * gets a new one. */
#include "agent/hub/inside.h"

#include "agent/base/log.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

struct hub_name *name_of(struct hub *h, const char *text)
{
    size_t len = strlen(text);
    struct hub_name **bucket = &h->names[XXH3_64bits(text, len) % HUB_BUCKETS];
    for (struct hub_name *n = *bucket; n; n = n->next)
        if (!strcmp(n->text, text))
            return n;
    struct hub_name *n = calloc(1, sizeof *n + len + 1);
    if (!n)
        return NULL;
    memcpy(n->text, text, len + 1);
    n->handle = ++h->next_handle;
    n->next = *bucket;
    return *bucket = n;
}

bool name_leased(const struct hub *h, const struct hub_name *n)
{
    return n->holder && hub_now(h) - n->holder->seen < STORE_LEASE_MS;
}

bool name_lease_good(const struct hub *h, const struct hub_name *n, const struct id *identity)
{
    (void)h; /* one whose time is over still stands until somebody else asks for it, or the hub gives it back */
    return n->holder && id_same(&n->holder->identity, identity);
}

static void on_name_attached(void *arg, struct replica *r, uint8_t type, const struct buf *p)
{
    struct hub_name *n = arg;
    struct frame_attached a;
    if (!type)
        return;
    if (frame_attached_get(p->data, p->len, &a) < 0 || a.handle != n->handle)
        return;
    struct there *t = &n->there[r->index];
    t->asked = false;
    t->attached = a.status <= FRAME_ATTACH_EXISTS;
    t->fence = a.fence;
    if (!t->attached)
        replica_drop(r, false, "it does not let this hub write %s: %s%s", n->text,
                     a.status == FRAME_ATTACH_HELD ? "it is written by " : "", a.holder);
}

void name_attach(struct hub_name *n, struct replica *r, uint32_t stream)
{
    struct there *t = &n->there[r->index];
    if (t->asked || t->attached || !r->greeted)
        return;
    t->asked = true;
    replica_ask_attach(r, stream, n->handle, n->text, true, on_name_attached, n);
}

void name_detach(struct hub_name *n, struct replica *r)
{
    struct there *t = &n->there[r->index];
    uint8_t payload[4];
    put_u32(payload, n->handle);
    if (r->greeted && (t->attached || t->asked))
        replica_send(r, STREAM_OWN, FRAME_DETACH, payload, sizeof payload);
    *t = (struct there){0};
}

/* On the stream of the rename: what comes there after it may use the new handle at once, with the fence there was. */
void name_attach_as(struct hub_name *n, struct replica *r, uint32_t stream, uint32_t handle)
{
    replica_ask_attach(r, stream, handle, n->text, true, on_name_attached, n);
}

void names_give_back(struct replica *r)
{
    for (unsigned i = 0; i < HUB_BUCKETS; i++)
        for (struct hub_name *n = r->hub->names[i]; n; n = n->next)
            name_detach(n, r);
}

void names_lost(struct replica *r)
{
    for (unsigned i = 0; i < HUB_BUCKETS; i++)
        for (struct hub_name *n = r->hub->names[i]; n; n = n->next)
            n->there[r->index] = (struct there){0};
}

bool names_attached(struct replica *r)
{
    bool all = true;
    for (unsigned i = 0; i < HUB_BUCKETS; i++)
        for (struct hub_name *n = r->hub->names[i]; n; n = n->next)
            if (n->holder && !n->there[r->index].attached) {
                name_attach(n, r, STREAM_OWN);
                all = false;
            }
    return all;
}

static void lease_end(struct hub *h, struct hub_name *n)
{
    n->holder = NULL;
    EACH_REPLICA(r, h)
    if (!r->round) /* else the round has its own need of it, and gives it back */
        name_detach(n, r);
}

static bool wanted(const struct hub *h, const struct hub_name *n)
{
    const struct attach *a;
    TAILQ_FOREACH(a, &h->attaches, link)
    if (a->name == n)
        return true;
    return n->holder;
}

void names_unwanted(struct replica *r)
{
    for (unsigned i = 0; i < HUB_BUCKETS; i++)
        for (struct hub_name *n = r->hub->names[i]; n; n = n->next)
            if (n->there[r->index].attached && !wanted(r->hub, n))
                name_detach(n, r);
}

/* A lease whose writer stays away is given back to the replicas, or no other hub could ever have it. */
void names_tick(struct hub *h)
{
    for (unsigned i = 0; i < HUB_BUCKETS; i++)
        for (struct hub_name *n = h->names[i]; n; n = n->next)
            if (n->holder && !name_leased(h, n) && !n->busy)
                lease_end(h, n);
}

void names_free(struct hub *h)
{
    for (unsigned i = 0; i < HUB_BUCKETS; i++) {
        for (struct hub_name *n = h->names[i], *next; n; n = next) {
            next = n->next;
            free(n);
        }
        for (struct lineage *l = h->lineages[i], *next; l; l = next) {
            next = l->next;
            free(l);
        }
    }
    for (struct holder *o = h->holders, *next; o; o = next) {
        next = o->next;
        free(o);
    }
}

static struct holder *holder_of(struct hub *h, const struct id *identity)
{
    struct holder *o = h->holders;
    while (o && !id_same(&o->identity, identity))
        o = o->next;
    return o;
}

void hub_lease_drop(struct store *s, const char *name, const struct id *identity)
{
    struct hub *h = hub_of(s);
    struct hub_name *n = name_of(h, name);
    if (n && name_lease_good(h, n, identity))
        lease_end(h, n);
}

void hub_lease_seen(struct store *s, const struct id *identity)
{
    struct holder *o = holder_of(hub_of(s), identity);
    if (o)
        o->seen = hub_now(hub_of(s));
}

/* Lineages */

struct lineage *lineage_find(const struct hub *h, const struct id *id)
{
    struct lineage *l = h->lineages[get_u32(id->b) % HUB_BUCKETS];
    while (l && !id_same(&l->id, id))
        l = l->next;
    return l;
}

void lineage_note(struct hub *h, const struct id *id, uint64_t epoch, bool gone)
{
    struct lineage *l = lineage_find(h, id);
    if (!l) {
        if (h->lineages_n >= HUB_LINEAGES || !(l = calloc(1, sizeof *l)))
            return;
        struct lineage **bucket = &h->lineages[get_u32(id->b) % HUB_BUCKETS];
        *l = (struct lineage){.next = *bucket, .id = *id};
        *bucket = l;
        h->lineages_n++;
    }
    if (epoch > l->epoch)
        l->epoch = epoch;
    l->gone = gone;
}

void names_learn(struct hub *h, const struct frame_entry *list, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        struct hub_name *name = name_of(h, list[i].name);
        lineage_note(h, &list[i].lineage, list[i].epoch, false);
        if (name)
            name->lineage = list[i].lineage;
    }
}

/* ATTACH */

static void attach_done(struct attach *a, int err, const struct frame_attached *to)
{
    TAILQ_REMOVE(&a->hub->attaches, a, link);
    EACH_REPLICA(r, a->hub)
    replica_forget(r, a);
    a->done(a->arg, err, to);
    free(a);
}

static void on_answer(void *arg, struct replica *r, uint8_t type, const struct buf *p)
{
    struct attach *a = arg;
    unsigned i = r->index;
    if (!type || frame_attached_get(p->data, p->len, &a->answer[i]) < 0) {
        a->wait[i] = 0;
        return;
    }
    a->wait[i] = 2;
    if (!a->first)
        a->first = hub_now(a->hub);
    if (a->write && a->handle == a->name->handle) {
        bool good = a->answer[i].status <= FRAME_ATTACH_EXISTS;
        a->name->there[i] = (struct there){.attached = good, .fence = a->answer[i].fence};
    }
    if (!a->write && a->answer[i].status <= FRAME_ATTACH_EXISTS) {
        uint8_t payload[4];
        put_u32(payload, a->handle);
        replica_send(r, STREAM_OWN, FRAME_DETACH, payload, sizeof payload);
    }
}

static void attach_ask(struct attach *a)
{
    struct hub *h = a->hub;
    a->asked = true;
    a->first = 0;
    a->handle = a->write ? a->name->handle : ++h->next_handle;
    EACH_REPLICA(r, h)
    {
        a->wait[r->index] = 0;
        bool live =
            r->state == REPLICA_IN || (a->write && r->greeted && (r->queueing || r->state == REPLICA_FOLLOWING));
        if (!live || (!a->write && r != replica_source(h)))
            continue;
        a->wait[r->index] = 1;
        replica_ask_attach(r, STREAM_OWN, a->handle, a->name->text, a->write, on_answer, a);
    }
}

/* Those that are in and answered: the best of them. Who knows of less is out of step. */
static struct frame_attached *agree(struct attach *a)
{
    struct frame_attached *best = NULL;
    struct replica *whose = NULL;
    EACH_REPLICA(r, a->hub)
    {
        struct frame_attached *one = &a->answer[r->index];
        if (a->wait[r->index] != 2 || r->state != REPLICA_IN)
            continue;
        if (one->status >= FRAME_ATTACH_HELD)
            return one;
        if (!best || one->epoch > best->epoch) {
            best = one;
            whose = r;
        }
    }
    EACH_REPLICA(r, a->hub)
    {
        const struct frame_attached *one = &a->answer[r->index];
        if (a->wait[r->index] == 2 && r->state == REPLICA_IN && r != whose &&
            (one->epoch != best->epoch || !id_same(&one->lineage, &best->lineage)))
            replica_drop(r, false, "it has %s at epoch %llu, %s has it at %llu", a->name->text,
                         (unsigned long long)one->epoch, whose->address, (unsigned long long)best->epoch);
    }
    return best;
}

static bool lease_take(struct attach *a)
{
    struct hub *h = a->hub;
    struct hub_name *n = a->name;
    struct holder *o = holder_of(h, &a->identity);
    if (!o) {
        if (!(o = calloc(1, sizeof *o)))
            return false;
        o->identity = a->identity;
        o->next = h->holders;
        h->holders = o;
    }
    snprintf(o->host, sizeof o->host, "%s", a->host);
    o->seen = hub_now(h);
    if (n->holder != o) {
        n->holder = o;
        n->fence = ++h->fences;
        n->alias = 0;
    }
    return true;
}

/* Refused by one: the others, which gave their lease, have it back, unless a writer of ours has it. */
static void give_back(struct attach *a)
{
    EACH_REPLICA(r, a->hub)
    if (a->write && !a->name->holder)
        name_detach(a->name, r);
}

static void attach_finish(struct attach *a)
{
    struct frame_attached to, *best = agree(a);
    if (!best) { /* those that were asked are gone */
        a->asked = false;
        return;
    }
    to = *best;
    if (to.status >= FRAME_ATTACH_HELD) {
        give_back(a);
    } else if (a->write) {
        if (to.status == FRAME_ATTACH_EXISTS)
            lineage_note(a->hub, &to.lineage, to.epoch, false);
        a->name->lineage = to.lineage;
        if (!lease_take(a)) {
            to.status = FRAME_ATTACH_BAD;
            snprintf(to.holder, sizeof to.holder, "no memory for a lease");
        }
        to.fence = a->name->fence;
    }
    attach_done(a, 0, &to);
}

bool hub_complete(const struct hub *h)
{
    bool all = true;
    EACH_REPLICA(r, h)
    all &= r->state == REPLICA_IN || r->state == REPLICA_REFUSED || (r->state == REPLICA_DOWN && r->looked);
    return all;
}

/* Frees it when it is over. */
static void attach_try(struct attach *a)
{
    struct hub *h = a->hub;
    struct frame_attached to = {0};
    if (a->write && a->name->holder && !id_same(&a->name->holder->identity, &a->identity) && name_leased(h, a->name)) {
        to.status = FRAME_ATTACH_HELD;
        snprintf(to.holder, sizeof to.holder, "%s", a->name->holder->host);
        attach_done(a, 0, &to);
        return;
    }
    if (h->opening) {
        bool merging = false;
        EACH_REPLICA(r, h)
        merging |= r->round != NULL;
        if (!merging && hub_now(h) - a->since > HUB_OPEN_MS + 500 &&
            hub_now(h) - h->opening_since > HUB_OPEN_MS + 500) {
            hub_why_none(h, to.holder, sizeof to.holder);
            attach_done(a, -ENOTCONN, &to);
            return;
        }
        return;
    }
    if (!a->asked && (a->name->busy || (!hub_complete(h) && hub_now(h) - h->opened_at < HUB_OPEN_MS)))
        return;
    if (!a->asked)
        attach_ask(a);
    bool waiting = false;
    EACH_REPLICA(r, h)
    {
        bool late = a->wait[r->index] == 1 && a->first && hub_now(h) - a->first > HUB_WAIT_MS;
        if (late)
            replica_drop(r, true, "no answer to ATTACH within %u ms of another's", HUB_WAIT_MS);
        waiting |= a->wait[r->index] == 1;
    }
    if (waiting)
        return;
    attach_finish(a);
}

void attach_step(struct hub *h)
{
    for (struct attach *a = TAILQ_FIRST(&h->attaches), *next; a; a = next) {
        next = TAILQ_NEXT(a, link);
        attach_try(a);
    }
}

int hub_attach(struct store *s, const struct store_attach *ask, struct frame_attached *to, store_attach_done *done,
               void *arg)
{
    struct hub *h = hub_of(s);
    const char *fault = name_fault(ask->name);
    struct hub_name *n = fault ? NULL : name_of(h, ask->name);
    struct attach *a = n ? calloc(1, sizeof *a) : NULL;
    if (!a) {
        to->status = FRAME_ATTACH_BAD;
        snprintf(to->holder, sizeof to->holder, "%s", fault ? fault : "no memory for a name");
        return 0;
    }
    *a = (struct attach){.hub = h,
                         .name = n,
                         .identity = *ask->identity,
                         .write = ask->write,
                         .since = hub_now(h),
                         .done = done,
                         .arg = arg};
    snprintf(a->host, sizeof a->host, "%s", ask->host);
    TAILQ_INSERT_TAIL(&h->attaches, a, link);
    hub_soon(h);
    return -EINPROGRESS;
}
