#include "agent/base/buf.h"

#include <stdlib.h>

struct buf *buf_new(size_t cap)
{
    if (cap > UINT32_MAX)
        return NULL;
    struct buf *b = malloc(sizeof *b + cap);
    if (b)
        *b = (struct buf){.refs = 1, .cap = (uint32_t)cap};
    return b;
}

struct buf *buf_hold(struct buf *b)
{
    __atomic_fetch_add(&b->refs, 1, __ATOMIC_RELAXED);
    return b;
}

void buf_drop(struct buf *b)
{
    if (b && __atomic_fetch_sub(&b->refs, 1, __ATOMIC_ACQ_REL) == 1)
        free(b);
}
