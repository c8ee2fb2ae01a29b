/* Regions whose file is a mirror's memfd (agent/page/mirror.c tells of that).
 *
 * What ATTACH's answer leads to, when the body was made for a program that opened the view just now:
 *
 *     the remote has                            the view is of                    then
 *     the view's lineage, the view's epoch      that                              joined: nothing is compared
 *     anything else, or another lease           -                                 refused (-ESTALE, -EBUSY), and let go
 *     nothing                                   nothing (OPEN with create)        CREATE
 *
 * and when it was taken over from an agent that died, with stores that nobody counted (`unknown`):
 *
 *     the view's lineage, ours or unchanged     that                              compared by hashes (reconcile.c)
 *     anything else                             -                                 FENCED: what is stored goes nowhere
 *
 * Of what the remote has, only a hash that was compared is known: `published` begins as UNKNOWN everywhere, so that
 * each page goes out once it was written. Pages that are holes are left out wherever the file is read; but from `base`
 * on they are zeros like any (capture_job.c, track_everything).
 *
 * A program that was killed leaves the memfd, which no file on a disk stands for: it is compared and published at once,
 * when what was on its way is through, and only then may the mount go (body_held). */
#include "agent/sync/reconcile.h"
#include "agent/base/log.h"
#include "agent/page/page.h"

#include <errno.h>
#include <sys/stat.h>
#include <unistd.h>

bool body_held(const struct body *b)
{
    const struct region *r = b->region;
    if (!r || !b->joined || !region_takes_part(r))
        return false;
    return r->attach != ATTACH_DONE || !b->created || b->unknown || b->refetch || b->dirty.count ||
           b->durable != b->epoch || b->min_size != UINT64_MAX || (r->group && r->group->capture);
}

void region_let_go(struct region *r)
{
    struct body *b = r->body;
    struct buf *detach = r->link->conn ? buf_new(4) : NULL;
    if (detach) {
        put_u32(detach->data, r->handle);
        detach->len = 4;
        conn_send(r->link->conn, LINK_STREAM, FRAME_DETACH, detach);
    }
    r->body = NULL;
    r->last = (struct id){{0}};
    r->handle = ++r->link->next_handle;
    r->attach = ATTACH_LOOSE;
    r->held_before = r->vacant = r->replace = false;
    r->refusal = 0;
    r->reason[0] = 0;
    if (b) {
        b->region = NULL;
        body_drop(b);
    }
}

static int body_open(struct region *r, const struct control_region *m, int passed, struct mount *t)
{
    int fd = own_open(passed, m->path);
    struct stat st;
    if (fd < 0)
        return fd;
    struct body *b = fstat(fd, &st) || st.st_ino != m->source.ino ? NULL : body_new(fd, m->dev, m->source);
    if (!b) {
        close(fd);
        return -ENOMEM;
    }
    int rc = page_adopt(t, b);
    if (!rc) {
        b->unknown = !m->fresh;
        region_give_body(r, b);
    }
    body_drop(b);
    return rc;
}

int mirror_body(struct program *p, struct region *r, const struct control_region *m, int passed, struct mount *t)
{
    struct body *b = r->body;
    if (!t) {
        program_notice(p, "%s: not replicated: region %s is being written as a mirror", m->path, r->name);
        return -EBUSY;
    }
    if (b && b->mount == t) {
        b->unknown |= !m->fresh;
        b->refetch |= !m->fresh && b->joined;
        return 0;
    }
    if (b && region_takes_part(r) && (b->uses || body_held(b))) {
        program_notice(p, "%s: cannot be written to: region %s is already written by a program here", m->path, r->name);
        return -EBUSY;
    }
    if (b)
        region_let_go(r);
    int rc = body_open(r, m, passed, t);
    if (rc)
        program_notice(p, "%s: cannot be written to: %s", m->path,
                       rc == -EOPNOTSUPP ? "userfaultfd cannot be used (memsync doctor tells what to change)"
                                         : strerror(-rc));
    return rc;
}

/* ---- attaching ---- */

static void refuse(struct region *r, int err)
{
    r->attach = ATTACH_REFUSED;
    r->refusal = err;
    r->retry_at = 0;
    log_info("%s: %s", r->name, r->reason);
}

void mirror_fenced(struct region *r, const char *why)
{
    r->attach = ATTACH_FENCED;
    region_reason(r, "fenced: region %s at %s %s; what this program stores goes nowhere", r->name, r->link->address,
                  why);
    region_notice(r, "%s: %s", r->path, r->reason);
    log_warn("%s: %s", r->path, r->reason);
    page_lost(r->body, why);
}

void mirror_held(struct region *r, const char *holder)
{
    region_reason(r, "region %s at %s is being written by %s", r->name, r->link->address, holder);
    region_notice(r, "%s: cannot be opened for writing: %s", r->path, r->reason);
    refuse(r, -EBUSY);
}

void mirror_make(struct region *r)
{
    region_create(r);
    r->body->joined = true;
    page_joined(r->body);
}

/* The remote is what the view began with, and everything since is tracked. */
static void join(struct region *r)
{
    struct body *b = r->body;
    uint64_t pages = (r->there.size + PAGE - 1) / PAGE;
    if (hashes_room(&b->published, pages)) {
        region_reason(r, "no memory for the hashes of its pages");
        refuse(r, -ENOMEM);
        return;
    }
    hashes_doubt(&b->published, 0, pages);
    b->size = r->there.size;
    b->refetch = false;
    r->attach = ATTACH_DONE;
}

void mirror_answer(struct region *r)
{
    struct body *b = r->body;
    struct id lineage;
    uint64_t epoch;
    bool made = page_made(b->mount, &lineage, &epoch), taken = b->unknown;
    bool exists = r->there.status == FRAME_ATTACH_EXISTS, ours = id_same(&r->there.writer, &r->link->local->identity);
    bool same = exists && id_same(&lineage, &r->there.lineage);
    bool own = exists && ours && id_none(&lineage) && source_same(&r->there.source, &b->source);
    if (!exists && made) {
        mirror_make(r);
        return;
    }
    if (!(same && r->there.epoch == epoch) && !(taken && ((same && ours) || own))) {
        if (taken) {
            b->joined = true;
            mirror_fenced(r, exists ? "was written by another host meanwhile" : "is not there any more");
            return;
        }
        region_reason(r, "region %s at %s has another epoch now than when it was opened", r->name, r->link->address);
        refuse(r, -ESTALE);
        return;
    }
    b->lineage = r->there.lineage;
    b->epoch = b->durable = r->there.epoch;
    b->created = true;
    region_reserve(r);
    if (taken)
        region_compare(r);
    else
        join(r);
    b->joined = region_takes_part(r);
    if (b->joined)
        page_joined(b);
}

int mirror_attached(const struct region *r)
{
    const struct body *b = r->body;
    if (!b || !b->mount || r->attach == ATTACH_FENCED)
        return -EIO;
    if (r->attach == ATTACH_REFUSED)
        return r->refusal ? r->refusal : -EIO;
    return b->joined ? page_writable(b) : 1;
}

/* What a killed program stored, or somebody whom nobody watched, is compared once nothing is on its way. */
void mirror_look(struct region *r)
{
    struct body *b = r->body;
    if (!b || !b->mount || !b->refetch || r->attach != ATTACH_DONE || r->group->queue || r->group->capture)
        return;
    r->attach = ATTACH_LOOSE;
    r->retry_at = 0;
    if (r->link->state == LINK_UP)
        link_attach(r);
}
