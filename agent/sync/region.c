/* Regions and bodies: which file has which name, and whether the remote's region of that name is this file's own past.
 *
 * What an answer to ATTACH leads to (region_attached):
 *
 *     the remote has      this file is                                   then
 *     nothing             any                                            CREATE under a new lineage, all of it is sent
 *     a region            the one recorded for it, remote not ahead      HASHING, then compared
 *     a region we wrote   its source, our record of it lost              the same
 *     a region            what replaced the recorded file in our sight   CREATE (the old content goes)
 *     a region            anything, with initial=push                    CREATE, or compared when it is its own
 *     a region            anything else                                  REFUSED, both named: nothing is sent
 *     a lease held        -                                              asked again every few seconds; FENCED when we
 * had it before */
#include "agent/sync/reconcile.h"
#include "agent/base/log.h"
#include "agent/track/softdirty.h"
#include "agent/page/page.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define RESERVE 4096u /* epochs that one line in the records allows for */
#define HELD_RETRY_MS 2000u

struct region *region_find(struct link *k, const char *name)
{
    for (struct region *r = k->regions; r; r = r->next)
        if (!strcmp(r->name, name))
            return r;
    return NULL;
}

struct region *region_get(struct link *k, const char *name, const char *path)
{
    struct region *r = region_find(k, name);
    if (!r) {
        r = calloc(1, sizeof *r);
        if (!r)
            return NULL;
        r->link = k;
        r->name = strdup(name);
        r->handle = ++k->next_handle;
        r->next = k->regions;
        k->regions = r;
    }
    if (!r->path || strcmp(r->path, path)) {
        free(r->path);
        r->path = strdup(path);
    }
    return r->name && r->path ? r : NULL;
}

struct body *body_new(int fd, uint64_t dev, struct source source)
{
    struct body *b = calloc(1, sizeof *b);
    if (!b)
        return NULL;
    *b = (struct body){
        .refs = 1, .fd = fd, .dev = dev, .source = source, .min_size = UINT64_MAX, .unknown = true, .tracker = "marks"};
    return b;
}

void body_hold(struct body *b)
{
    b->refs++;
}

void body_drop(struct body *b)
{
    if (!b || --b->refs)
        return;
    if (b->fd >= 0)
        close(b->fd);
    watch_close(b->watch);
    hashes_free(&b->published);
    extents_free(&b->dirty);
    free(b);
}

/* The region's reference to its body moves from the old to the new one. */
void region_give_body(struct region *r, struct body *b)
{
    if (r->body) {
        r->last = r->body->lineage;
        r->body->region = NULL;
        body_drop(r->body);
    }
    r->body = b;
    if (b) {
        body_hold(b);
        b->region = r;
    }
}

bool region_takes_part(const struct region *r)
{
    return r->attach != ATTACH_REFUSED && r->attach != ATTACH_FENCED;
}

void region_reason(struct region *r, const char *format, ...)
{
    va_list ap;
    va_start(ap, format);
    vsnprintf(r->reason, sizeof r->reason, format, ap);
    va_end(ap);
    r->since = (int64_t)time(NULL);
}

static void refuse(struct region *r, enum attach as)
{
    r->attach = as;
    region_notice(r, "%s: %s", r->path, r->reason);
    log_warn("%s: %s", r->path, r->reason);
}

static struct track_map map_after(const struct track_map *old, uint64_t start)
{
    struct track_map m = *old;
    m.addr = start;
    m.len = old->addr + old->len - start;
    m.offset = old->offset + (start - old->addr);
    return m;
}

void use_retire(struct use *u, uint64_t addr, uint64_t len)
{
    uint64_t end = (addr + len + PAGE - 1) & ~(uint64_t)(PAGE - 1); /* a call takes the whole of the last page */
    for (size_t i = 0; i < u->nmaps; i++) {
        struct track_map *m = &u->maps[i], old = *m;
        uint64_t last = old.addr + old.len;
        if (last <= addr || old.addr >= end)
            continue;
        if (old.ops == &track_softdirty)
            softdirty_forget(old.soft, addr, end - addr);
        if (old.addr < addr) {
            m->len = addr - old.addr;
            if (last > end && u->nmaps < u->maps_cap) /* room is kept for one split more than there are maps */
                u->maps[u->nmaps++] = map_after(&old, end);
        } else if (last > end) {
            *m = map_after(&old, end);
        } else {
            u->maps[i--] = u->maps[--u->nmaps];
        }
    }
}

void region_reserve(struct region *r)
{
    struct local *l = r->link->local;
    const struct record *rec = records_find(&l->records, r->link->address, r->name);
    struct body *b = r->body;
    if (!b || (rec && id_same(&rec->lineage, &b->lineage) && source_same(&rec->source, &b->source) &&
               rec->reserved >= b->epoch))
        return;
    int rc = records_put(&l->records, r->link->address, r->name, &b->lineage, &b->source, b->epoch + RESERVE);
    if (rc)
        log_error("%s: %s: %s; after a restart of this agent the region may be refused", l->records.path, r->name,
                  strerror(-rc));
}

static bool op_pending(const struct group *g, const struct body *b, uint8_t kind)
{
    for (const struct op *o = g->ops; o; o = o->next)
        if (o->body == b && o->kind == kind)
            return true;
    return false;
}

void region_create(struct region *r)
{
    struct body *b = r->body;
    id_new(&b->lineage);
    b->epoch = b->durable = b->size = 0;
    b->created = false;
    b->unknown = true;
    b->refetch = false;
    hashes_free(&b->published);
    r->replace = r->vacant = false;
    r->attach = ATTACH_DONE;
    if (!op_pending(r->group, b, FRAME_OP_CREATE))
        group_op(r->group, FRAME_OP_CREATE, r, NULL, b);
}

void region_compare(struct region *r)
{
    struct body *b = r->body;
    b->lineage = r->there.lineage;
    b->epoch = b->durable = r->there.epoch;
    b->size = r->there.size;
    b->created = true;
    region_reserve(r);
    reconcile_start(r);
}

/* Is the remote's region this file's past, as far as anybody can tell? NULL, or why it is not. */
static const char *foreign(const struct region *r, const struct source *from)
{
    struct local *l = r->link->local;
    const struct record *rec = records_find(&l->records, r->link->address, r->name);
    bool source = source_same(&r->there.source, from);
    bool ours = id_same(&r->there.writer, &l->identity);
    if (rec && id_same(&rec->lineage, &r->there.lineage) && source_same(&rec->source, from) && !ours)
        return "another host has written it since";
    if (rec && id_same(&rec->lineage, &r->there.lineage) && source_same(&rec->source, from))
        return r->there.epoch > rec->reserved ? "the remote is ahead of what this host ever sent" : NULL;
    if (ours && source && (!rec || !id_same(&rec->lineage, &r->there.lineage)))
        return NULL;
    if (rec && id_same(&rec->lineage, &r->there.lineage))
        return "the file here is not the one it was made from";
    return "it has another lineage";
}

static void first_answer(struct region *r)
{
    struct body *b = r->body;
    const char *why = foreign(r, &b->source);
    if (!why) {
        region_compare(r);
        return;
    }
    bool ours = id_same(&r->there.writer, &r->link->local->identity);
    if ((r->replace && ours) || r->terms.initial == CONTROL_INITIAL_PUSH) {
        region_create(r);
        return;
    }
    char there[ID_TEXT], here[ID_TEXT];
    const struct record *rec = records_find(&r->link->local->records, r->link->address, r->name);
    id_text(&r->there.lineage, there);
    if (rec)
        id_text(&rec->lineage, here);
    else
        snprintf(here, sizeof here, "none");
    region_reason(r,
                  "refused: %s already has a region %s (lineage %s, epoch %llu, %llu bytes) and %s (recorded here: %s; "
                  "this file is inode %llu). "
                  "Nothing was sent. To replace the remote's copy by this file add initial=push to the rule; to keep "
                  "it, `memsync export`",
                  r->link->address, r->name, there, (unsigned long long)r->there.epoch,
                  (unsigned long long)r->there.size, why, here, (unsigned long long)b->source.ino);
    refuse(r, ATTACH_REFUSED);
}

/* Asked again after a lost link: the queue decides, unless it was dropped. */
static void later_answer(struct region *r)
{
    struct body *b = r->body;
    bool exists = r->there.status == FRAME_ATTACH_EXISTS, ours = id_same(&r->there.writer, &r->link->local->identity);
    if (!b->refetch) {
        r->attach = ATTACH_DONE;
    } else if (b->mount && (!exists || (!ours && r->there.epoch != b->durable) || !id_same(&r->there.lineage, &b->lineage))) {
        mirror_fenced(r, exists ? "was written by another host meanwhile" : "is not there any more");
    } else if (exists && !ours && !b->mount) {
        region_reason(r,
                      "fenced: region %s at %s was written by another host meanwhile; what this program stores is no "
                      "longer replicated",
                      r->name, r->link->address);
        refuse(r, ATTACH_FENCED);
    } else if (exists && id_same(&r->there.lineage, &b->lineage)) {
        region_compare(r);
    } else {
        region_create(r);
    }
}

static void nobody_here(struct region *r)
{
    r->attach = ATTACH_DONE;
    if (r->doomed && !r->vacant && !foreign(r, &r->doomed_source)) {
        struct body *gone = body_new(-1, 0, r->doomed_source);
        if (gone) {
            gone->lineage = r->there.lineage;
            group_op(r->group, FRAME_OP_UNLINK, r, NULL, gone);
            body_drop(gone);
            r->vacant = true;
        }
    }
    r->doomed = false;
}

void region_attached(struct region *r, const struct frame_attached *a)
{
    if (r->attach != ATTACH_ASKED)
        return;
    r->there = *a;
    r->fence = a->fence;
    r->attach = ATTACH_LOOSE;
    if (a->status == FRAME_ATTACH_HELD && r->body && r->body->mount && !r->body->joined) {
        mirror_held(r, a->holder);
    } else if (a->status == FRAME_ATTACH_HELD && r->held_before) {
        region_reason(r, "fenced: %s now writes region %s at %s; what this program stores is no longer replicated",
                      a->holder, r->name, r->link->address);
        refuse(r, ATTACH_FENCED);
        if (r->body)
            page_lost(r->body, "another host writes it now");
    } else if (a->status == FRAME_ATTACH_HELD) {
        r->retry_at = uv_now(r->link->local->loop) + HELD_RETRY_MS;
        r->attach = ATTACH_REFUSED;
        bool said = r->reason[0];
        region_reason(r,
                      "not replicated: region %s at %s is being written by %s; it is taken over when that writer has "
                      "left for 10 s",
                      r->name, r->link->address, a->holder);
        if (!said)
            refuse(r, ATTACH_REFUSED);
    } else if (a->status == FRAME_ATTACH_BAD) {
        region_reason(r, "refused: %s does not take region %s: %s; give it another name by name=", r->link->address,
                      r->name, a->holder);
        refuse(r, ATTACH_REFUSED);
    } else {
        r->held_before = true;
        r->reason[0] = 0;
        r->retry_at = 0;
        r->vacant = a->status == FRAME_ATTACH_NONE;
        if (!r->body)
            nobody_here(r);
        else if (r->body->mount && !r->body->joined)
            mirror_answer(r);
        else if (!id_none(&r->body->lineage))
            later_answer(r);
        else if (a->status == FRAME_ATTACH_NONE)
            region_create(r);
        else
            first_answer(r);
    }
    group_check(r->group);
}

const char *region_state(const struct region *r)
{
    const struct group *g = r->group;
    const struct body *b = r->body;
    if (r->attach == ATTACH_FENCED)
        return "fenced";
    if (r->attach == ATTACH_REFUSED)
        return "refused";
    if (g->degraded)
        return "degraded";
    if (b && b->killed && !b->uses)
        return "diverged";
    if (r->attach != ATTACH_DONE || (b && !b->durable))
        return r->attach == ATTACH_DONE && b && !b->durable && !b->epoch ? "attaching"
               : b && b->durable                                         ? "dirty"
                                                                         : "attaching";
    if (b && (b->durable != b->epoch || b->dirty.count || b->unknown))
        return "dirty";
    return "synced";
}

/* The body whose blocks are the longest unused, and nobody's now. */
static struct body *at_rest(struct local *l)
{
    struct body *oldest = NULL;
    for (struct link *k = l->links; k; k = k->next)
        for (struct region *r = k->regions; r; r = r->next) {
            struct body *b = r->body;
            if (!b || !r->group || r->group->capture || reconcile_has(k, b) || !hashes_blocks_bytes(&b->published))
                continue;
            if (!oldest || b->captured_at < oldest->captured_at)
                oldest = b;
        }
    return oldest;
}

void bodies_trim(struct local *l)
{
    while (hashes_blocks_all() > hashes_blocks_most - hashes_blocks_most / 8) {
        struct body *b = at_rest(l);
        if (!b)
            return; /* those at work see to their own */
        hashes_forget_all_blocks(&b->published);
    }
}
