/* A transaction: frames of one epoch, checked as they come, held in memory or spilled (spill.c), until it is committed
 * or aborted. Loop thread.
 *
 * Handles are asked of the session once each and then kept, so that renames inside the epoch are seen in their order.
 */
#include "agent/store/inside.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

void txns_push(struct txns *q, struct store_txn *t)
{
    t->next = NULL;
    *(q->first ? q->last : &q->first) = t;
    q->last = &t->next;
}

struct store_txn *txns_pop(struct txns *q)
{
    struct store_txn *t = q->first;
    if (t)
        q->first = t->next;
    return t;
}

static int refuse(struct store_txn *t, int err, char error[STORE_ERROR], const char *format, ...)
    __attribute__((format(printf, 4, 5)));
static int refuse(struct store_txn *t, int err, char error[STORE_ERROR], const char *format, ...)
{
    va_list ap;
    va_start(ap, format);
    vsnprintf(error, STORE_ERROR, format, ap);
    va_end(ap);
    if (!t->err) {
        t->err = err;
        snprintf(t->error, STORE_ERROR, "%s", error);
    }
    return err;
}

struct store_txn *volume_txn_new(struct store *s, const struct id *holder, struct store_names names,
                                 void (*spilled)(void *arg, size_t bytes), void *arg)
{
    struct store_txn *t = calloc(1, sizeof *t);
    if (!t)
        return NULL;
    *t = (struct store_txn){
        .s = s, .holder = *holder, .writer = *holder, .names = names, .chain = names.arg, .spilled = spilled, .arg = arg, .spill_fd = -1};
    return t;
}

void volume_txn_chain(struct store_txn *t, const void *chain)
{
    t->chain = chain;
}

void volume_txn_writer(struct store_txn *t, const struct id *writer)
{
    t->writer = *writer;
}

static int slot_at(const struct store_txn *t, uint32_t handle)
{
    size_t from = 0, to = t->slots_len;
    while (from < to) {
        size_t mid = from + (to - from) / 2;
        if (t->slots[mid].handle < handle)
            from = mid + 1;
        else
            to = mid;
    }
    return (int)from;
}

/* Arrays below grow by one at a time from small sizes; doubling at powers of two needs no capacity beside the length.
 */
static void *array_grow(void *array, size_t len, size_t size)
{
    if (len & (len - 1) || (len && len < 8))
        return array;
    return realloc(array, (len < 8 ? 8 : len * 2) * size);
}

static struct binding *binding_find(const struct store_txn *t, const struct name *n)
{
    for (size_t i = t->bindings_len; i-- > 0;)
        if (t->bindings[i].name == n)
            return &t->bindings[i];
    return NULL;
}

static int part_add(struct store_txn *t, struct region *r, struct name *from)
{
    for (size_t i = 0; from && i < t->parts_len; i++)
        if (t->parts[i]->r == r)
            return (int)i;
    struct part **parts = array_grow(t->parts, t->parts_len, sizeof *parts);
    if (!parts)
        return -ENOMEM;
    t->parts = parts;
    struct part *p = malloc(sizeof *p);
    if (!p)
        return -ENOMEM;
    *p = (struct part){.r = region_hold(r),
                       .created = !from,
                       .from = from,
                       .base = from ? r->head.epoch : 0,
                       .base_size = from ? r->head.size : 0,
                       .min_size = UINT64_MAX};
    parts[t->parts_len] = p;
    return (int)t->parts_len++;
}

/* The slot of a handle, asked of the session on first sight. */
static struct slot *slot_get(struct store_txn *t, uint32_t handle, char error[STORE_ERROR], int *err)
{
    int i = slot_at(t, handle);
    if ((size_t)i < t->slots_len && t->slots[i].handle == handle)
        return &t->slots[i];
    const char *text = t->names.name_of(t->names.arg, handle);
    if (!text) {
        *err = refuse(t, -ENOENT, error, "handle %u is not attached", handle);
        return NULL;
    }
    const char *fault = name_fault(text);
    if (fault) {
        *err = refuse(t, -EINVAL, error, "the name %.200s %s", text, fault);
        return NULL;
    }
    struct name *n = name_get(t->s, text);
    struct slot *slots = array_grow(t->slots, t->slots_len, sizeof *slots);
    if (slots)
        t->slots = slots;
    if (!n || !slots)
        goto no_memory;
    const struct binding *b = binding_find(t, n);
    int part = b ? b->part : -1;
    if (!b && n->head && (part = part_add(t, n->head, n)) < 0)
        goto no_memory;
    memmove(slots + i + 1, slots + i, (t->slots_len - (size_t)i) * sizeof *slots);
    slots[i] = (struct slot){.handle = handle, .part = part, .name = n};
    t->slots_len++;
    n->users++;
    return &slots[i];
no_memory:
    *err = refuse(t, -ENOMEM, error, "no memory for another region in this epoch");
    return NULL;
}

static int lease_check(struct store_txn *t, const struct name *n, char error[STORE_ERROR])
{
    if (lease_stands(t->s, n, &t->holder))
        return 0;
    return refuse(t, -ESTALE, error,
                  n->lease.holder ? "%.300s is written by %.100s now" : "%.300s is not leased to this writer%.0s",
                  n->text, n->lease.holder ? n->lease.holder->host : "");
}

static int name_bind(struct store_txn *t, struct name *n, int part, char error[STORE_ERROR])
{
    struct binding *b = binding_find(t, n);
    if (!b) {
        struct binding *bindings = array_grow(t->bindings, t->bindings_len, sizeof *bindings);
        if (!bindings)
            return refuse(t, -ENOMEM, error, "no memory for another name in this epoch");
        t->bindings = bindings;
        b = &bindings[t->bindings_len++];
        *b = (struct binding){.name = n};
        n->users++;
    }
    b->part = part;
    return 0;
}

void txn_unbind(struct store_txn *t, struct name *n)
{
    char error[STORE_ERROR];
    name_bind(t, n, -1, error);
}

static int op_create(struct store_txn *t, struct slot *slot, const struct frame_op *o, char error[STORE_ERROR])
{
    struct region *r = region_new(t->s, t->s->next_file++, &o->lineage, &o->source);
    int part = r ? part_add(t, r, NULL) : -ENOMEM;
    region_drop(t->s, r);
    if (part < 0)
        return refuse(t, -ENOMEM, error, "no memory for another region in this epoch");
    slot->part = part;
    return name_bind(t, slot->name, part, error);
}

static int op_rename(struct store_txn *t, struct slot *slot, uint32_t to, char error[STORE_ERROR])
{
    uint32_t handle = slot->handle;
    int err = 0;
    struct slot *target = slot_get(t, to, error, &err);
    if (!target)
        return err;
    slot = &t->slots[slot_at(t, handle)];
    if (target->name == slot->name)
        return refuse(t, -EPROTO, error, "%.300s cannot be renamed to itself", slot->name->text);
    if ((err = lease_check(t, target->name, error)) || (err = name_bind(t, slot->name, -1, error)) ||
        (err = name_bind(t, target->name, slot->part, error)))
        return err;
    slot->name->users--;
    target->name->users++;
    slot->name = target->name;
    target->part = -1;
    return 0;
}

static int add_op(struct store_txn *t, const struct buf *b, char error[STORE_ERROR])
{
    struct frame_op o;
    if (frame_op_get(b->data, b->len, &o))
        return refuse(t, -EPROTO, error, "malformed OP");
    int err = 0;
    struct slot *slot = slot_get(t, o.handle, error, &err);
    if (!slot || (err = lease_check(t, slot->name, error)))
        return err;
    if (o.kind == FRAME_OP_CREATE)
        return op_create(t, slot, &o, error);
    if (slot->part < 0)
        return refuse(t, -ENOENT, error, "there is no region %.300s to rename or remove", slot->name->text);
    if (o.kind == FRAME_OP_RENAME)
        return op_rename(t, slot, o.to, error);
    err = name_bind(t, slot->name, -1, error);
    slot->part = -1;
    return err;
}

static bool lease_fence(const struct store_txn *t, const struct name *n, uint64_t fence)
{
    return n && lease_stands(t->s, n, &t->holder) &&
           (fence == n->lease.fence || (n->lease.alias && fence == n->lease.alias));
}

/* A renamed region may carry the fence of either name: both are this writer's. */
static bool fence_good(const struct store_txn *t, const struct part *p, uint64_t fence)
{
    return lease_fence(t, p->under, fence) || lease_fence(t, p->from, fence);
}

static int add_region(struct store_txn *t, const struct buf *b, char error[STORE_ERROR])
{
    struct frame_region g;
    if (frame_region_get(b->data, b->len, &g))
        return refuse(t, -EPROTO, error, "malformed REGION");
    int err = 0;
    struct slot *slot = slot_get(t, g.handle, error, &err);
    if (!slot || (err = lease_check(t, slot->name, error)))
        return err;
    if (slot->part < 0)
        return refuse(t, -ENOENT, error, "there is no region %.300s", slot->name->text);
    struct part *p = t->parts[slot->part];
    if (g.base != p->base)
        return refuse(t, -EEXIST, error, "%.300s is at epoch %llu, which epoch %llu does not continue",
                      slot->name->text, (unsigned long long)p->base, (unsigned long long)g.epoch);
    p->under = slot->name;
    if (!fence_good(t, p, g.fence))
        return refuse(t, -ESTALE, error, "%.300s is fenced: its lease has number %llu now, not %llu", slot->name->text,
                      (unsigned long long)slot->name->lease.fence, (unsigned long long)g.fence);
    p->stated = true;
    p->epoch = g.epoch;
    p->fence = g.fence;
    p->size = g.size;
    if (g.min_size < p->min_size)
        p->min_size = g.min_size;
    return 0;
}

/* What kinds of entries the frame has, before anything is held of it. */
static int pages_look(struct store_txn *t, struct part *p, struct frame_pages pages, uint32_t *copies,
                      char error[STORE_ERROR])
{
    for (struct frame_extent e; frame_pages_next(&pages, &e);) {
        t->deltas |= e.kind == FRAME_PAGES_DELTA;
        t->zeros += e.kind == FRAME_PAGES_ZEROS ? e.len : 0;
        if (e.kind != FRAME_PAGES_COPY)
            continue;
        const char *fault = copy_fault(p, &e);
        if (fault)
            return refuse(t, -EPROTO, error, "%s", fault);
        p->copies++;
        *copies += 1;
        t->large = true;
        t->data += FRAME_PAGE;
    }
    return 0;
}

static int add_pages(struct store_txn *t, struct buf *b, char error[STORE_ERROR])
{
    struct frame_pages pages;
    if (frame_pages_get(b->data, b->len, &pages))
        return refuse(t, -EPROTO, error, "malformed PAGES");
    int i = slot_at(t, pages.handle);
    if ((size_t)i >= t->slots_len || t->slots[i].handle != pages.handle || t->slots[i].part < 0 ||
        !t->parts[t->slots[i].part]->stated)
        return refuse(t, -EPROTO, error, "PAGES of handle %u before its REGION", pages.handle);
    uint32_t copies = 0;
    int err = pages_look(t, t->parts[t->slots[i].part], pages, &copies, error);
    if (err)
        return err;
    if (t->held_len == t->held_cap && t->held_first > t->held_len / 2) {
        t->held_len -= t->held_first;
        memmove(t->held, t->held + t->held_first, t->held_len * sizeof *t->held);
        t->held_first = 0;
    }
    struct held *held = store_grow(t->held, t->held_len, &t->held_cap, sizeof *held);
    if (!held)
        return refuse(t, -ENOMEM, error, "no memory for the epoch's pages");
    t->held = held;
    held[t->held_len++] = (struct held){.part = (uint32_t)t->slots[i].part, .copies = copies, .buf = buf_hold(b)};
    t->memory += b->len;
    t->s->memory += b->len;
    t->data += rd_left(&pages.data);
    if (t->memory <= txn_limit(t))
        txn_credit(t, b->len);
    else
        t->withheld += b->len;
    spill_start(t);
    return 0;
}

int volume_txn_add(struct store_txn *t, uint8_t type, struct buf *payload, char error[STORE_ERROR])
{
    if (t->err) {
        snprintf(error, STORE_ERROR, "%s", t->error);
        return t->err;
    }
    switch (type) {
    case FRAME_OP:
        return add_op(t, payload, error);
    case FRAME_REGION:
        return add_region(t, payload, error);
    case FRAME_PAGES:
        return add_pages(t, payload, error);
    default:
        return refuse(t, -EPROTO, error, "frame type %u has no place in an epoch", type);
    }
}

static int clipped(struct part *p, struct frame_extent *e, bool clip, pages_each *each, void *arg)
{
    if (clip && e->offset >= p->size)
        return 0;
    if (clip && e->len > p->size - e->offset)
        e->len = (uint32_t)(p->size - e->offset);
    return each(arg, p, e);
}

int frame_extents(struct part *p, const void *payload, size_t len, enum pages_view view, pages_each *each, void *arg)
{
    struct frame_pages pages;
    struct frame_extent e, run;
    int err = frame_pages_get(payload, len, &pages);
    while (!err && frame_pages_next(&pages, &e)) {
        if (e.kind == FRAME_PAGES_COPY && view != PAGES_RAW)
            return -EIO; /* made plain before anything is done with it */
        bool delta = e.kind == FRAME_PAGES_DELTA;
        uint32_t at = 0;
        if (view == PAGES_RAW)
            err = each(arg, p, &e);
        else if (!delta)
            err = clipped(p, &e, view == PAGES_CLIPPED, each, arg);
        else
            while (!err && frame_delta_run(&e, &at, &run))
                err = clipped(p, &run, view == PAGES_CLIPPED, each, arg);
    }
    return err;
}

static int spilled_pages(struct store_txn *t, enum pages_view view, pages_each *each, void *arg)
{
    uint8_t head[SPILL_HEAD], *payload = malloc(FRAME_PAYLOAD_MAX);
    int err = payload ? 0 : -ENOMEM;
    for (uint64_t at = 0; !err && at < t->spill_len;) {
        if ((err = io_read(t->spill_fd, head, SPILL_HEAD, at)))
            break;
        uint32_t part = get_u32(head), len = get_u32(head + 4);
        if (part >= t->parts_len || len > FRAME_PAYLOAD_MAX)
            err = -EIO;
        else if (!(err = io_read(t->spill_fd, payload, len, at + SPILL_HEAD)) && t->parts[part]->r)
            err = frame_extents(t->parts[part], payload, len, view, each, arg);
        at += SPILL_HEAD + len;
    }
    free(payload);
    return err == -EPROTO ? -EIO : err;
}

int txn_pages(struct store_txn *t, enum pages_view view, pages_each *each, void *arg)
{
    int err = t->spill_len ? spilled_pages(t, view, each, arg) : 0;
    for (size_t i = t->held_first; !err && i < t->held_len; i++) {
        struct part *p = t->parts[t->held[i].part];
        if (p->r)
            err = frame_extents(p, t->held[i].buf->data, t->held[i].buf->len, view, each, arg);
    }
    return err;
}

static bool is_bound(const struct store_txn *t, int32_t part)
{
    for (size_t i = 0; i < t->bindings_len; i++)
        if (t->bindings[i].part == part)
            return true;
    return false;
}

/* Everything that could have changed since the frames were added; then this transaction is the head. */
static int parts_check(struct store_txn *t, char error[STORE_ERROR])
{
    for (size_t i = 0; i < t->parts_len; i++) {
        const struct part *p = t->parts[i];
        if (p->created && !p->stated && is_bound(t, (int32_t)i))
            return refuse(t, -EPROTO, error, "CREATE without REGION");
        if (p->from && (p->from->head != p->r || p->r->head.epoch != p->base))
            return refuse(t, -EEXIST, error, "%.300s is no longer what this epoch continues (epoch %llu)",
                          p->from->text, (unsigned long long)p->base);
    }
    for (size_t i = 0; !t->removing && i < t->bindings_len; i++) {
        int err = lease_check(t, t->bindings[i].name, error);
        if (err)
            return err;
    }
    for (size_t i = 0; i < t->slots_len; i++) {
        const struct slot *slot = &t->slots[i];
        const struct part *p = slot->part >= 0 ? t->parts[slot->part] : NULL;
        int err = lease_check(t, slot->name, error);
        if (err)
            return err;
        if (p && p->stated && !fence_good(t, p, p->fence))
            return refuse(t, -ESTALE, error, "%.300s is fenced: another writer has had it since", slot->name->text);
    }
    return 0;
}

/* Swaps the bindings into the heads; binding.before takes what was there, which is what txn_unhead puts back. */
static void bindings_swap(struct store_txn *t)
{
    for (size_t i = 0; i < t->bindings_len; i++) {
        struct binding *b = &t->bindings[i];
        b->before = b->name->head;
        b->name->head = b->part >= 0 ? t->parts[b->part]->r : NULL;
    }
}

void txn_unhead(struct store_txn *t)
{
    for (size_t i = t->bindings_len; i-- > 0;)
        t->bindings[i].name->head = t->bindings[i].before;
}

int txn_check(struct store_txn *t, char error[STORE_ERROR])
{
    int err = parts_check(t, error);
    if (err)
        return err;
    bindings_swap(t);
    for (size_t i = 0; i < t->bindings_len; i++) {
        const struct name *n = t->bindings[i].name;
        const char *other = n->head ? name_clash(t->s, n->text, SIDE_HEAD) : NULL;
        if (other) {
            txn_unhead(t);
            return refuse(t, -EINVAL, error, "%.200s and %.200s cannot both be regions: one is inside the other",
                          n->text, other);
        }
    }
    for (size_t i = 0; i < t->parts_len; i++) {
        struct part *p = t->parts[i];
        if (p->stated)
            p->r->head = (struct figures){.epoch = p->epoch,
                                          .fence = p->fence,
                                          .size = p->size,
                                          .writer = t->writer,
                                          .committed_at = t->committed_at};
    }
    for (size_t i = 0; i < t->slots_len; i++) { /* the fence goes with the renamed region */
        const struct slot *slot = &t->slots[i];
        const struct part *p = slot->part >= 0 ? t->parts[slot->part] : NULL;
        if (p && p->stated && p->fence != slot->name->lease.fence)
            slot->name->lease.alias = p->fence;
        else if (p && !p->stated && p->from != slot->name)
            slot->name->lease.alias = p->from->lease.alias ? p->from->lease.alias : p->from->lease.fence;
    }
    return 0;
}

static bool dead_add(struct store_txn *t, struct region *r)
{
    for (size_t i = 0; i < t->dead_len; i++)
        if (t->dead[i] == r)
            return true;
    struct region **dead = array_grow(t->dead, t->dead_len, sizeof *dead);
    if (!dead)
        return false; /* its file stays until the next start, which removes what no name has */
    t->dead = dead;
    dead[t->dead_len++] = region_hold(r);
    return true;
}

/* A name's durable region holds a reference; heads do not: a queued transaction's parts do. */
void txn_durable(struct store_txn *t)
{
    struct store *s = t->s;
    for (size_t i = 0; i < t->parts_len; i++) {
        struct part *p = t->parts[i];
        if (p->r && p->stated)
            p->r->durable = (struct figures){.epoch = p->epoch,
                                             .fence = p->fence,
                                             .size = p->size,
                                             .writer = t->writer,
                                             .committed_at = t->committed_at};
    }
    for (size_t i = 0; i < t->bindings_len; i++) {
        struct name *n = t->bindings[i].name;
        struct region *old = n->durable;
        n->durable = NULL;
        if (old && old->bound == n)
            old->bound = NULL;
        t->bindings[i].before = old;
    }
    for (size_t i = 0; i < t->bindings_len; i++) {
        const struct binding *b = &t->bindings[i];
        struct region *r = b->part >= 0 ? t->parts[b->part]->r : NULL;
        if (r) {
            b->name->durable = region_hold(r);
            r->bound = b->name;
        }
    }
    for (size_t i = 0; i < t->bindings_len; i++) {
        struct region *old = t->bindings[i].before;
        t->bindings[i].before = NULL;
        if (old && !old->bound)
            dead_add(t, old);
        region_drop(s, old);
    }
    for (size_t i = 0; i < t->parts_len; i++)
        if (t->parts[i]->r && t->parts[i]->created && !t->parts[i]->r->bound)
            dead_add(t, t->parts[i]->r);
}

void txn_free(struct store_txn *t)
{
    struct store *s = t->s;
    txn_uncredit(t);
    spill_unwait(t);
    for (size_t i = t->held_first; i < t->held_len; i++)
        buf_drop(t->held[i].buf);
    s->memory -= t->memory;
    for (size_t i = 0; i < t->slots_len; i++)
        name_release(s, t->slots[i].name);
    for (size_t i = 0; i < t->bindings_len; i++)
        name_release(s, t->bindings[i].name);
    for (size_t i = 0; i < t->parts_len; i++) {
        region_drop(s, t->parts[i]->r);
        free(t->parts[i]);
    }
    for (size_t i = 0; i < t->dead_len; i++)
        region_drop(s, t->dead[i]);
    if (t->spill_fd >= 0)
        fd_close_later(s, t->spill_fd);
    free(t->slots);
    free(t->parts);
    free(t->bindings);
    free(t->held);
    free(t->dead);
    free(t);
}
