/* No replica is in: which one is right? At the start of a hub, and whenever it has lost all of them.
 *
 * All that can be reached within HUB_OPEN_MS say what they have (LIST). Of a name, the lineage that most of them have
 * is the right one, and where they are even the later one, if the same writer wrote both; who has another is refused.
 * Even and of different writers: all who have it are refused, and a person decides. Of a lineage, the highest epoch is
 * the right one: a hub killed in the middle of an epoch leaves it on some replicas and not on others, and groups of
 * regions are independent, so any of them may be ahead in one and behind in another. What others have more of is
 * brought to one replica by rounds; then that one is in, and the rest catch up with it.
 *
 * A hub that has acknowledged epochs before waits, longer than that, for a replica that has them. */
#include "agent/hub/inside.h"

#include "agent/base/log.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void opening_begin(struct hub *h)
{
    h->opening = true;
    h->told_waiting = false;
    h->opening_since = hub_now(h);
    EACH_REPLICA(r, h)
    {
        r->looked = false;
        if (r->greeted && r->state != REPLICA_BEHIND && r->state != REPLICA_REFUSED) {
            txns_unqueue(r);
            replica_enter(r, REPLICA_BEHIND, "no replica is in");
        }
        if (r->greeted)
            opening_list(r);
        else if (!r->conn && r->retry_at > hub_now(h))
            r->retry_at = hub_now(h); /* no back-off: somebody is waited for */
    }
    hub_soon(h);
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const struct frame_entry *)a)->name, ((const struct frame_entry *)b)->name);
}

static void on_list(void *arg, struct replica *r, uint8_t type, const struct buf *p)
{
    uint32_t request;
    (void)arg;
    if (type == FRAME_ENTRY) {
        struct frame_entry *list = hub_room(r->list, r->list_n, &r->list_cap, sizeof *list);
        if (list && !frame_entry_get(p->data, p->len, &request, &list[r->list_n]))
            r->list_n++;
        r->list = list ? list : r->list;
        return;
    }
    r->listing = false;
    if (type == FRAME_LIST_END) {
        r->listed = r->looked = true;
        if (r->list_n)
            qsort(r->list, r->list_n, sizeof *r->list, by_name);
    } else if (type) {
        replica_drop(r, false, "it does not list its regions");
    }
    hub_soon(r->hub);
}

void opening_list(struct replica *r)
{
    uint8_t payload[4];
    if (r->listing)
        return;
    r->listing = true;
    r->listed = false;
    r->list_n = 0;
    replica_ask(r, STREAM_OWN, FRAME_LIST, payload, sizeof payload, on_list, r->hub);
}

static bool candidate(const struct replica *r)
{
    return r->state == REPLICA_BEHIND && r->greeted && r->listed;
}

static const struct frame_entry *entry_of(const struct replica *r, const char *name)
{
    struct frame_entry *key = malloc(sizeof *key);
    if (!key || !r->list_n) {
        free(key);
        return NULL;
    }
    snprintf(key->name, sizeof key->name, "%s", name);
    const struct frame_entry *e = bsearch(key, r->list, r->list_n, sizeof *r->list, by_name);
    free(key);
    return e;
}

static bool is_gone(const struct hub *h, const struct frame_entry *e)
{
    const struct lineage *l = lineage_find(h, &e->lineage);
    return l && l->gone && e->epoch <= l->epoch;
}

static unsigned votes(const struct hub *h, const struct frame_entry *e)
{
    unsigned n = 0;
    EACH_REPLICA(r, h)
    {
        const struct frame_entry *other = candidate(r) ? entry_of(r, e->name) : NULL;
        n += other && id_same(&other->lineage, &e->lineage);
    }
    return n;
}

/* The names that replicas have under different lineages: the fewer are refused. True if some were. */
static bool conflicts(struct hub *h)
{
    EACH_REPLICA(a, h)
    for (size_t i = 0; candidate(a) && i < a->list_n; i++)
        EACH_REPLICA(b, h)
        {
            const struct frame_entry *mine = &a->list[i];
            const struct frame_entry *other = b != a && candidate(b) ? entry_of(b, mine->name) : NULL;
            if (!other || id_same(&other->lineage, &mine->lineage) || is_gone(h, mine) || is_gone(h, other))
                continue;
            unsigned for_a = votes(h, mine), for_b = votes(h, other);
            if (for_a == for_b && id_same(&mine->writer, &other->writer)) { /* one file took the other's place */
                for_a += mine->committed_at >= other->committed_at;
                for_b += mine->committed_at < other->committed_at;
            }
            char name[NAME_CAP], one[ID_TEXT], two[ID_TEXT];
            snprintf(name, sizeof name, "%s", mine->name);
            id_text(&mine->lineage, one);
            id_text(&other->lineage, two);
            if (for_a <= for_b)
                replica_refuse(a,
                               "it has %.300s as lineage %s, %s has it as %s; nothing of it was touched. Which one "
                               "is right is yours to say: `memsync rm %.300s --remote` the wrong one",
                               name, one, b->address, two, name);
            if (for_b <= for_a)
                replica_refuse(b,
                               "it has %.300s as lineage %s, %s has it as %s; nothing of it was touched. Which one "
                               "is right is yours to say: `memsync rm %.300s --remote` the wrong one",
                               name, two, a->address, one, name);
            return true;
        }
    return false;
}

/* Something that this hub has seen in, and that no candidate has. NULL when all is there. */
static const struct lineage *missing(const struct hub *h)
{
    for (unsigned b = 0; b < HUB_BUCKETS; b++)
        for (const struct lineage *l = h->lineages[b]; l; l = l->next) {
            bool found = l->gone;
            EACH_REPLICA(r, h)
            for (size_t i = 0; !found && candidate(r) && i < r->list_n; i++)
                found = id_same(&r->list[i].lineage, &l->id) && r->list[i].epoch >= l->epoch;
            if (!found)
                return l;
        }
    return NULL;
}

static struct replica *best(const struct hub *h)
{
    struct replica *best = NULL;
    uint64_t most = 0;
    EACH_REPLICA(r, h)
    {
        uint64_t sum = 0;
        for (size_t i = 0; candidate(r) && i < r->list_n; i++)
            sum += r->list[i].epoch;
        if (candidate(r) && (!best || sum > most)) {
            best = r;
            most = sum;
        }
    }
    return best;
}

static bool ahead(const struct hub *h, const struct replica *of, const struct replica *than)
{
    for (size_t i = 0; i < of->list_n; i++) {
        const struct frame_entry *e = &of->list[i], *other = entry_of(than, e->name);
        if (!is_gone(h, e) && (!other || (id_same(&e->lineage, &other->lineage) && e->epoch > other->epoch)))
            return true;
    }
    return false;
}

static bool waits(const struct hub *h)
{
    bool some = false, all = true;
    EACH_REPLICA(r, h)
    {
        some |= candidate(r);
        all &= r->looked && !r->listing;
        if (r->round)
            return true;
    }
    return !some || (!all && hub_now(h) - h->opening_since < HUB_OPEN_MS);
}

void opening_step(struct hub *h)
{
    if (h->closing || waits(h))
        return;
    if (conflicts(h))
        return; /* others are looked at in the next step */
    struct replica *to = best(h);
    if (!to)
        return;
    const struct lineage *l = missing(h);
    if (l) {
        if (!h->told_waiting)
            log_warn("hub: the replicas that can be reached do not have all that was acknowledged: waiting for one "
                     "that has");
        h->told_waiting = true;
        return;
    }
    EACH_REPLICA(r, h)
    if (r != to && candidate(r) && ahead(h, r, to)) {
        log_info("hub: %s has epochs that %s has not: they are brought there first", r->address, to->address);
        round_start(r, to, true);
        to->listed = false; /* until it is asked again, after the round */
        return;
    }
    names_learn(h, to->list, to->list_n);
    h->opening = false;
    h->opened_at = hub_now(h);
    replica_enter(to, REPLICA_IN, "it has the newest epochs");
    EACH_REPLICA(r, h)
    {
        free(r->list);
        r->list = NULL;
        r->list_n = r->list_cap = 0;
        r->listed = false;
    }
}
