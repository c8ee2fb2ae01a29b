/* A transaction: frames of one epoch, checked as they come, held in memory or spilled, until it is committed or
 * aborted. Loop thread, but spill_work.
 *
 * Handles are asked of the session once each and then kept, so that renames inside the epoch are seen in their order.
 *
 * Spilling: once `memory` passes the limit the oldest frames go to disk, 4 MiB a job, one job at a time. Windows are
 * opened (spilled) at once while the transaction is small, and beyond that only as memory is freed. What is in memory
 * at the commit goes into the journal record; its spilled pages come before. */
#include "agent/store/inside.h"

#include "agent/base/job.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define SPILL_CHUNK (4u << 20)
#define SPILL_HEAD 8u /* u32 part, u32 length, then a PAGES payload */

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

struct store_txn *store_txn_new(struct store *s, const struct id *writer, struct store_names names,
                                void (*spilled)(void *arg, size_t bytes), void *arg)
{
    struct store_txn *t = calloc(1, sizeof *t);
    if (!t)
        return NULL;
    *t = (struct store_txn){
        .s = s, .writer = *writer, .names = names, .chain = names.arg, .spilled = spilled, .arg = arg, .spill_fd = -1};
    return t;
}

void store_txn_chain(struct store_txn *t, const void *chain)
{
    t->chain = chain;
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
    *p = (struct part){
        .r = region_hold(r), .created = !from, .from = from, .base = from ? r->head.epoch : 0, .min_size = UINT64_MAX};
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
    if (lease_stands(t->s, n, &t->writer))
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
    return n && lease_stands(t->s, n, &t->writer) &&
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
    if (g.epoch != p->base + 1)
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

static void credit(struct store_txn *t, size_t bytes)
{
    t->credit += bytes;
    if (!t->crediting && t->credit) {
        t->crediting = true;
        t->next_credit = t->s->credits;
        t->s->credits = t;
        store_wake(t->s);
    }
}

/* From the loop: gives back windows. A callback may abort its transaction, or others: the list is taken anew each time.
 */
void store_credits(struct store *s)
{
    for (struct store_txn *t; (t = s->credits);) {
        s->credits = t->next_credit;
        t->crediting = false;
        size_t bytes = t->credit;
        t->credit = 0;
        if (t->spilled && !t->aborted)
            t->spilled(t->arg, bytes);
    }
}

static void uncredit(struct store_txn *t)
{
    for (struct store_txn **at = &t->s->credits; t->crediting && *at; at = &(*at)->next_credit)
        if (*at == t) {
            *at = t->next_credit;
            t->crediting = false;
            return;
        }
}

static size_t txn_limit(const struct store_txn *t)
{
    const struct limits *l = &t->s->limits;
    return t->s->memory > l->all_memory && l->txn_memory > 1u << 20 ? 1u << 20 : l->txn_memory;
}

struct spill_job {
    struct store_txn *t;
    struct part **parts;
    struct held *held;
    size_t len, bytes;
    uint64_t spilled; /* bytes appended to the spill file */
    int err;
};

static int write_at(int fd, const void *data, size_t len, uint64_t offset)
{
    for (const uint8_t *p = data; len;) {
        ssize_t n = pwrite(fd, p, len, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        p += n;
        len -= (size_t)n;
        offset += (size_t)n;
    }
    return 0;
}

struct span {
    int fd;
    uint64_t from, to;
};

static int direct_extent(void *arg, struct part *p, const struct frame_extent *e)
{
    struct span *span = arg;
    (void)p;
    if (!e->data) /* what is not there reads as zeros; what an earlier round put there has to go */
        return file_zero(span->fd, e->len, e->offset);
    if (e->offset < span->from)
        span->from = e->offset;
    if (e->offset + e->len > span->to)
        span->to = e->offset + e->len;
    return write_at(span->fd, e->data, e->len, e->offset);
}

static int spill_direct(struct store *s, struct part *p, const struct buf *b, struct span *span)
{
    pthread_rwlock_wrlock(&p->r->lock);
    int fd = region_open(s, p->r, true);
    pthread_rwlock_unlock(&p->r->lock);
    if (fd < 0)
        return fd;
    if (span->fd != fd) {
        if (span->to > span->from)
            sync_file_range(span->fd, (off_t)span->from, (off_t)(span->to - span->from), SYNC_FILE_RANGE_WRITE);
        *span = (struct span){.fd = fd, .from = UINT64_MAX};
    }
    return frame_extents(p, b->data, b->len, false, direct_extent, span);
}

static void spill_work(void *arg)
{
    struct spill_job *j = arg;
    struct store_txn *t = j->t;
    struct store *s = t->s;
    struct span span = {.fd = -1};
    if (s->volume->ops->space(s->volume) < j->bytes + STORE_TABLE_ROOM)
        j->err = -ENOSPC;
    for (size_t i = 0; i < j->len && !j->err; i++) {
        struct part *p = j->parts[i];
        const struct buf *b = j->held[i].buf;
        if (p->created) {
            j->err = spill_direct(s, p, b, &span);
            continue;
        }
        if (t->spill_fd < 0 && (t->spill_fd = s->volume->ops->spill_open(s->volume, t->spill, true)) < 0) {
            j->err = t->spill_fd;
            break;
        }
        uint8_t head[SPILL_HEAD];
        put_u32(head, j->held[i].part);
        put_u32(head + 4, b->len);
        uint64_t at = t->spill_len + j->spilled;
        j->err = write_at(t->spill_fd, head, SPILL_HEAD, at);
        if (!j->err)
            j->err = write_at(t->spill_fd, b->data, b->len, at + SPILL_HEAD);
        j->spilled += SPILL_HEAD + b->len;
    }
    if (span.to > span.from) /* start it now, so that the sync at the end finds little left to do */
        sync_file_range(span.fd, (off_t)span.from, (off_t)(span.to - span.from), SYNC_FILE_RANGE_WRITE);
    if (j->spilled && t->spill_fd >= 0)
        sync_file_range(t->spill_fd, (off_t)t->spill_len, (off_t)j->spilled, SYNC_FILE_RANGE_WRITE);
    store_step("spill");
}

static void spill_start(struct store_txn *t);

static void spill_done(void *arg)
{
    struct spill_job *j = arg;
    struct store_txn *t = j->t;
    struct store *s = t->s;
    for (size_t i = 0; i < j->len; i++)
        buf_drop(j->held[i].buf);
    t->memory -= j->bytes;
    s->memory -= j->bytes;
    t->spill_len += j->spilled;
    t->spilling = false;
    s->jobs--;
    if (j->err && !t->err) {
        t->err = j->err;
        const char *dir = s->volume->ops->dir(s->volume);
        snprintf(t->error, STORE_ERROR, "%.250s cannot take a large epoch: %s", dir ? dir : "mem:", strerror(-j->err));
    }
    free(j->parts);
    free(j->held);
    free(j);
    if (t->aborted) {
        txn_discard(t);
        store_pump(s);
        return;
    }
    if (t->memory <= txn_limit(t)) {
        credit(t, t->withheld);
        t->withheld = 0;
    }
    spill_start(t);
    store_pump(s);
}

static void spill_start(struct store_txn *t)
{
    size_t limit = txn_limit(t);
    if (t->spilling || t->aborted || t->err || t->memory <= (t->large && !t->durable ? limit - limit / 4 : limit))
        return;
    struct spill_job *j = calloc(1, sizeof *j);
    size_t most = t->held_len - t->held_first, n = 0;
    if (j) {
        j->t = t;
        j->parts = malloc(most * sizeof *j->parts);
        j->held = malloc(most * sizeof *j->held);
    }
    if (!j || !j->parts || !j->held)
        goto out;
    for (; n < most && j->bytes < SPILL_CHUNK; n++) {
        j->held[n] = t->held[t->held_first + n];
        struct part *p = j->parts[n] = t->parts[j->held[n].part];
        j->bytes += j->held[n].buf->len;
        if (p->created)
            p->direct = true;
        else if (!t->spill)
            t->spill = t->s->next_spill++;
    }
    j->len = n;
    if (job_run(t->s->loop, spill_work, spill_done, j) < 0)
        goto out;
    t->held_first += n;
    t->spilling = t->large = true;
    t->s->jobs++;
    return;
out:
    if (j) {
        free(j->parts);
        free(j->held);
    }
    free(j);
    t->err = -ENOMEM;
    snprintf(t->error, STORE_ERROR, "no memory to spill a large epoch");
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
    if (t->held_len == t->held_cap && t->held_first > t->held_len / 2) {
        t->held_len -= t->held_first;
        memmove(t->held, t->held + t->held_first, t->held_len * sizeof *t->held);
        t->held_first = 0;
    }
    struct held *held = store_grow(t->held, t->held_len, &t->held_cap, sizeof *held);
    if (!held)
        return refuse(t, -ENOMEM, error, "no memory for the epoch's pages");
    t->held = held;
    held[t->held_len++] = (struct held){.part = (uint32_t)t->slots[i].part, .buf = buf_hold(b)};
    t->memory += b->len;
    t->s->memory += b->len;
    t->data += rd_left(&pages.data);
    if (t->memory <= txn_limit(t))
        credit(t, b->len);
    else
        t->withheld += b->len;
    spill_start(t);
    return 0;
}

int store_txn_add(struct store_txn *t, uint8_t type, struct buf *payload, char error[STORE_ERROR])
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

int frame_extents(struct part *p, const void *payload, size_t len, bool clip, pages_each *each, void *arg)
{
    struct frame_pages pages;
    struct frame_extent e;
    int err = frame_pages_get(payload, len, &pages);
    while (!err && frame_pages_next(&pages, &e)) {
        if (clip && e.offset >= p->size)
            continue;
        if (clip && e.len > p->size - e.offset)
            e.len = (uint32_t)(p->size - e.offset);
        err = each(arg, p, &e);
    }
    return err;
}

static int read_at(int fd, void *to, size_t len, uint64_t offset)
{
    for (uint8_t *p = to; len;) {
        ssize_t n = pread(fd, p, len, (off_t)offset);
        if (n < 0 && errno == EINTR)
            continue;
        if (n <= 0)
            return n < 0 ? -errno : -EIO;
        p += n;
        len -= (size_t)n;
        offset += (size_t)n;
    }
    return 0;
}

static int spilled_pages(struct store_txn *t, pages_each *each, void *arg)
{
    uint8_t head[SPILL_HEAD], *payload = malloc(FRAME_PAYLOAD_MAX);
    int err = payload ? 0 : -ENOMEM;
    for (uint64_t at = 0; !err && at < t->spill_len;) {
        if ((err = read_at(t->spill_fd, head, SPILL_HEAD, at)))
            break;
        uint32_t part = get_u32(head), len = get_u32(head + 4);
        if (part >= t->parts_len || len > FRAME_PAYLOAD_MAX)
            err = -EIO;
        else if (!(err = read_at(t->spill_fd, payload, len, at + SPILL_HEAD)) && t->parts[part]->r)
            err = frame_extents(t->parts[part], payload, len, true, each, arg);
        at += SPILL_HEAD + len;
    }
    free(payload);
    return err == -EPROTO ? -EIO : err;
}

int txn_pages(struct store_txn *t, pages_each *each, void *arg)
{
    int err = t->spill_len ? spilled_pages(t, each, arg) : 0;
    for (size_t i = t->held_first; !err && i < t->held_len; i++) {
        struct part *p = t->parts[t->held[i].part];
        if (p->r)
            err = frame_extents(p, t->held[i].buf->data, t->held[i].buf->len, true, each, arg);
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
    uncredit(t);
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
