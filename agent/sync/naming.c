/* Renames and unlinks of tracked names, told by the shim before and after the call.
 *
 * A body that is attached and goes to a name that is attached travels as RENAME: nothing of its content is sent. Any
 * other file that comes to a name is a new body, created there in place of what the remote has; a body that leaves for
 * a name outside the rules is unlinked at the remote. When a program dies between the two messages, the paths
 * themselves tell whether the call was made. */
#include "agent/sync/model.h"
#include "agent/base/log.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

void file_identity(const struct statx *st, uint64_t *dev, struct source *s)
{
    *dev = ((uint64_t)st->stx_dev_major << 32) | st->stx_dev_minor;
    s->ino = st->stx_ino;
    s->btime = st->stx_mask & STATX_BTIME ? (uint64_t)st->stx_btime.tv_sec * 1000000000u + st->stx_btime.tv_nsec : 0;
}

static bool path_is(const char *path, const struct source *s)
{
    struct statx st;
    struct source there;
    uint64_t dev;
    if (statx(AT_FDCWD, path, AT_SYMLINK_NOFOLLOW, STATX_BASIC_STATS | STATX_BTIME, &st) < 0)
        return false;
    file_identity(&st, &dev, &there);
    return source_same(&there, s);
}

static struct op **pending_create(struct group *g, const struct body *b)
{
    for (struct op **at = &g->ops; *at; at = &(*at)->next)
        if ((*at)->kind == FRAME_OP_CREATE && (*at)->body == b)
            return at;
    return NULL;
}

static struct region *with_body(struct link *k, const char *name, const struct source *s)
{
    struct region *r = *name ? region_find(k, name) : NULL;
    return r && r->body && (!s || source_same(&r->body->source, s)) ? r : NULL;
}

/* The region's file is gone from its name: the remote's goes too. */
static void leave(struct region *r)
{
    struct body *b = r->body;
    struct op **create = pending_create(r->group, b);
    if (create) {
        struct op *o = *create;
        *create = o->next;
        body_drop(o->body);
        free(o);
        r->vacant = true;
    } else if (!id_none(&b->lineage) && region_takes_part(r)) {
        group_op(r->group, FRAME_OP_UNLINK, r, NULL, b);
        r->vacant = true;
    } else if (region_takes_part(r)) {
        r->doomed = true;
        r->doomed_source = b->source;
    }
    r->replace = true; /* what comes to this name now, came in our sight */
    region_give_body(r, NULL);
    if (r->attach == ATTACH_REFUSED)
        r->attach = ATTACH_LOOSE;
}

static void doom(struct program *p, const char *name, const char *path, const struct source *s)
{
    struct region *r = *name ? region_get(p->link, name, path) : NULL;
    if (!r || r->body || (r->held_before && r->vacant))
        return;
    program_join(p, r, "");
    r->doomed = true;
    r->doomed_source = *s;
    if (r->attach == ATTACH_DONE)
        r->attach = ATTACH_LOOSE;
    if (p->link->state == LINK_UP && r->attach == ATTACH_LOOSE)
        link_attach(r);
}

/* A file that we did not follow, or cannot say RENAME of, has come to a matching name. */
static void arrive(struct program *p, const struct control_name *m, const char *name, const char *path,
                   const struct source *s)
{
    struct region *r = region_get(p->link, name, path);
    int fd = own_open(-1, path);
    struct body *b = r && fd >= 0 ? body_new(fd, m->dev, *s) : NULL;
    if (!b || !path_is(path, s)) {
        log_info("%s: changed again before it could be opened", path);
        if (b)
            body_drop(b);
        else if (fd >= 0)
            close(fd);
        return;
    }
    region_give_body(r, b);
    body_drop(b);
    r->terms = m->terms;
    r->replace = true;
    program_join(p, r, m->terms.group);
    if (r->attach == ATTACH_DONE) {
        region_create(r);
        return;
    }
    if (r->attach == ATTACH_REFUSED || r->attach == ATTACH_HASHING)
        r->attach = ATTACH_LOOSE;
    r->group->wanted = true;
    if (r->link->state == LINK_UP && r->attach == ATTACH_LOOSE)
        link_attach(r);
}

/* Those who have the file open go on with the body that now has its name. */
static void move_uses(struct body *from, struct body *to)
{
    while (from->uses) {
        struct use *u = from->uses;
        from->uses = u->next_body;
        u->next_body = to->uses;
        to->uses = u;
        u->body = to;
        body_hold(to);
        body_drop(from);
    }
}

static void move(struct program *p, struct region *from, const struct control_name *m)
{
    struct region *to = region_get(p->link, m->new_name, m->new_path);
    struct body *b = from->body;
    if (!to || to == from)
        return;
    program_join(p, to, m->terms.group);
    program_join(p, from, "");
    struct op **create = pending_create(from->group, b);
    if (from->group == to->group && to->attach == ATTACH_DONE && from->attach == ATTACH_DONE && b->region == from) {
        if (create)
            (*create)->region = to;
        else
            group_op(from->group, FRAME_OP_RENAME, from, to, b);
        body_hold(b);
        region_give_body(from, NULL);
        from->vacant = from->replace = true;
        region_give_body(to, b);
        body_drop(b);
        b->moved = !create;
        to->terms = m->terms;
        to->vacant = false;
        return;
    }
    body_hold(b);
    leave(from);
    arrive(p, m, m->new_name, m->new_path, &m->source);
    if (to->body && to->body != b)
        move_uses(b, to->body);
    body_drop(b);
}

static void apply(struct program *p, const struct control_name *m)
{
    struct region *old = with_body(p->link, m->old_name, &m->source);
    if (m->kind == CONTROL_NAME_UNLINK) {
        if (old)
            leave(old);
        else
            doom(p, m->old_name, m->old_path, &m->source);
        return;
    }
    if (m->kind == CONTROL_NAME_EXCHANGE) { /* each name has another file now */
        struct statx st;
        struct source back;
        uint64_t dev;
        if (*m->old_name && !statx(AT_FDCWD, m->old_path, AT_SYMLINK_NOFOLLOW, STATX_BASIC_STATS | STATX_BTIME, &st)) {
            file_identity(&st, &dev, &back);
            arrive(p, m, m->old_name, m->old_path, &back);
        }
        if (*m->new_name)
            arrive(p, m, m->new_name, m->new_path, &m->source);
        return;
    }
    if (old && *m->new_name) {
        move(p, old, m);
        return;
    }
    if (old)
        leave(old);
    else if (*m->old_name)
        doom(p, m->old_name, m->old_path, &m->source);
    if (*m->new_name)
        arrive(p, m, m->new_name, m->new_path, &m->source);
}

static void kick_all(struct link *k)
{
    for (struct group *g = k->groups, *next; g; g = next) {
        next = g->next;
        group_kick(g);
    }
}

void naming_take(struct program *p, const struct control_name *m)
{
    if (m->phase == CONTROL_NAME_BEGUN) {
        struct naming *n = malloc(sizeof *n);
        if (n) {
            n->m = *m;
            n->next = p->namings;
            p->namings = n;
        }
        return;
    }
    for (struct naming **at = &p->namings; *at; at = &(*at)->next)
        if ((*at)->m.number == m->number) {
            struct naming *n = *at;
            *at = n->next;
            if (m->phase == CONTROL_NAME_DONE) {
                apply(p, &n->m);
                kick_all(p->link);
            }
            free(n);
            return;
        }
}

void naming_after_death(struct program *p)
{
    while (p->namings) {
        struct naming *n = p->namings;
        p->namings = n->next;
        bool unlink = n->m.kind == CONTROL_NAME_UNLINK;
        if (unlink ? !path_is(n->m.old_path, &n->m.source) : path_is(n->m.new_path, &n->m.source))
            apply(p, &n->m);
        free(n);
    }
}
