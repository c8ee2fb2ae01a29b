/* Pins that outlive their connection. A viewer of a region must go on at the epoch it began with, or not at all: so
 * what it has pinned is kept for STORE_LEASE_MS after its connection is lost, and its identity takes it over by naming
 * the epoch. The old connection need not have been noticed as lost by then: live pins of the identity are shared
 * likewise. At most
 * SERVER_KEPT are kept at a time; when the server stops, all are given back. */
#include "agent/net/server_private.h"

#include <stdlib.h>

struct pinned *pinned_find(struct server *s, const struct id *identity, const char *name, uint64_t epoch,
                           const struct id *lineage)
{
    struct pinned *p;
    TAILQ_FOREACH(p, &s->pinned, link)
    if (p->entry.epoch == epoch && id_same(&p->entry.lineage, lineage) && id_same(&p->identity, identity) &&
        !strcmp(p->entry.name, name))
        return p;
    return NULL;
}

void pinned_hold(struct server *s, struct pinned *p)
{
    p->refs++;
    s->kept_n -= p->kept;
    p->kept = false;
}

struct pinned *pinned_new(struct server *s, struct store_pin *pin, const struct frame_entry *e,
                          const struct id *identity, bool keep)
{
    struct pinned *p = keep ? pinned_find(s, identity, e->name, e->epoch, &e->lineage) : NULL;
    if (p) {
        store_unpin(pin);
        pinned_hold(s, p);
        return p;
    }
    p = calloc(1, sizeof *p);
    if (!p) {
        store_unpin(pin);
        return NULL;
    }
    *p = (struct pinned){.pin = pin, .refs = 1, .keep = keep, .identity = *identity, .entry = *e};
    if (keep)
        TAILQ_INSERT_HEAD(&s->pinned, p, link);
    return p;
}

static void pinned_free(struct server *s, struct pinned *p)
{
    if (p->keep)
        TAILQ_REMOVE(&s->pinned, p, link);
    s->kept_n -= p->kept;
    store_unpin(p->pin);
    free(p);
}

void pinned_drop(struct server *s, struct pinned *p, bool lost)
{
    if (--p->refs)
        return;
    if (!lost || !p->keep || s->stopping || s->kept_n >= SERVER_KEPT) {
        pinned_free(s, p);
        return;
    }
    p->kept = true;
    s->kept_n++;
    p->expires = uv_now(s->loop) + STORE_LEASE_MS;
}

void pinned_expire(struct server *s, bool all)
{
    for (struct pinned *p = TAILQ_FIRST(&s->pinned), *next; p; p = next) {
        next = TAILQ_NEXT(p, link);
        if (!p->refs && (all || uv_now(s->loop) >= p->expires))
            pinned_free(s, p);
    }
}
