#include "agent/sync/capture.h"

#include <errno.h>
#include <stdlib.h>

struct epoch *epoch_new(uint64_t seq)
{
    struct epoch *e = calloc(1, sizeof *e);
    if (e) {
        e->seq = seq;
        e->kept = true;
    }
    return e;
}

int epoch_add(struct epoch *e, uint8_t type, struct buf *payload)
{
    if (!payload)
        return -ENOMEM;
    if (e->count == e->cap) {
        size_t cap = e->cap ? e->cap * 2 : 8;
        struct item *more = realloc(e->items, cap * sizeof *more);
        if (!more) {
            buf_drop(payload);
            return -ENOMEM;
        }
        e->items = more;
        e->cap = cap;
    }
    e->items[e->count++] = (struct item){type, payload};
    e->bytes += payload->len;
    return 0;
}

struct touched *epoch_touched(struct epoch *e, const struct body *b)
{
    for (size_t i = 0; i < e->ntouched; i++)
        if (e->touched[i].body == b)
            return &e->touched[i];
    return NULL;
}

int epoch_touch(struct epoch *e, struct region *r, struct body *b, uint64_t number)
{
    if (e->ntouched == e->touched_cap) {
        size_t cap = e->touched_cap ? e->touched_cap * 2 : 4;
        struct touched *more = realloc(e->touched, cap * sizeof *more);
        if (!more)
            return -ENOMEM;
        e->touched = more;
        e->touched_cap = cap;
    }
    body_hold(b);
    e->touched[e->ntouched++] = (struct touched){r, b, number};
    return 0;
}

void epoch_free(struct epoch *e)
{
    for (size_t i = 0; i < e->count; i++)
        buf_drop(e->items[i].payload);
    for (size_t i = 0; i < e->ntouched; i++)
        body_drop(e->touched[i].body);
    free(e->items);
    free(e->touched);
    free(e);
}
