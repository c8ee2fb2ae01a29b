/* Programs as the local agent sees them: life and death, what they use, and what they are told.
 *
 * A connection that ends after BYE was answered is a program that left in order. One that ends otherwise is a program
 * that died: its maps are gone with all that was stored since the last scan, so the bodies it had mapped, or was
 * writing by a call, become unknown, and nothing of them is published until somebody opens them again or asks by
 * `memsync sync`: the remote stays at its last epoch. */
#include "agent/sync/capture.h"
#include "agent/base/log.h"
#include "agent/page/page.h"
#include "agent/track/softdirty.h"

#include <errno.h>
#include <linux/futex.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

struct answer *answer_new(struct program *p, uint32_t slot)
{
    struct answer *a = calloc(1, sizeof *a);
    if (a) {
        *a = (struct answer){.refs = 1, .program = p, .slot = slot};
        program_hold(p);
    }
    return a;
}

static void slot_done(struct program *p, uint32_t slot, int result)
{
    if (!p->shared || slot >= SHARED_SLOTS)
        return;
    struct shared_slot *s = &p->shared->slots[slot];
    __atomic_store_n(&s->result, result, __ATOMIC_RELAXED);
    __atomic_store_n(&s->state, (uint32_t)SHARED_DONE, __ATOMIC_SEQ_CST);
    syscall(SYS_futex, &s->state, FUTEX_WAKE, INT32_MAX, NULL, NULL, 0);
}

void answer_drop(struct answer *a, int result)
{
    if (!a->result)
        a->result = result;
    if (--a->refs)
        return;
    struct program *p = a->program;
    if (!p->gone && p->tool)
        program_send_text(p, CONTROL_RESULT, a->result, "");
    else if (!p->gone)
        slot_done(p, a->slot, a->result);
    free(a);
    program_drop(p);
}

void program_send_text(struct program *p, uint8_t type, int code, const char *text)
{
    static uint8_t message[CONTROL_MAX];
    static struct control_text t;
    t.code = code;
    snprintf(t.text, sizeof t.text, "%s", text);
    size_t n = control_text_put(message, sizeof message, type, &t);
    if (n && p->fd >= 0 && send(p->fd, message, n, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
        log_debug("pid %u: %s", p->pid, strerror(errno));
}

static void notice_text(struct program *p, const char *text)
{
    if (p->gone || p->tool || !p->shared)
        return;
    program_send_text(p, CONTROL_NOTICE, 0, text);
    __atomic_fetch_add(&p->shared->notices, 1, __ATOMIC_SEQ_CST);
}

void program_notice(struct program *p, const char *format, ...)
{
    char text[1200];
    va_list ap;
    va_start(ap, format);
    vsnprintf(text, sizeof text, format, ap);
    va_end(ap);
    notice_text(p, text);
}

void group_notice(struct group *g, const char *format, ...)
{
    char text[1200];
    va_list ap;
    va_start(ap, format);
    vsnprintf(text, sizeof text, format, ap);
    va_end(ap);
    log_warn("%s", text);
    for (struct program *p = g->link->local->programs; p; p = p->next)
        for (struct use *u = p->uses; u; u = u->next_program)
            if (u->body->region && u->body->region->group == g) {
                notice_text(p, text);
                break;
            }
}

void region_notice(struct region *r, const char *format, ...)
{
    char text[1600];
    va_list ap;
    va_start(ap, format);
    vsnprintf(text, sizeof text, format, ap);
    va_end(ap);
    for (struct use *u = r->body ? r->body->uses : NULL; u; u = u->next_body)
        notice_text(u->program, text);
}

/* ---- life of a program ---- */

void program_hold(struct program *p)
{
    p->holds++;
}

static void use_free(struct use *u)
{
    if (u->marks)
        munmap(u->marks, sizeof *u->marks);
    body_drop(u->body);
    free(u->maps);
    free(u);
}

static void dead_uses_free(struct program *p)
{
    while (p->dead_uses) {
        struct use *u = p->dead_uses;
        p->dead_uses = u->next_program;
        use_free(u);
    }
}

void program_drop(struct program *p)
{
    if (--p->holds <= 1)
        dead_uses_free(p);
    if (p->holds || !p->gone)
        return;
    struct program **at = &p->local->programs;
    while (*at != p)
        at = &(*at)->next;
    *at = p->next;
    if (p->shared)
        munmap(p->shared, sizeof *p->shared);
    softdirty_free(p->soft);
    if (p->pagemap >= 0)
        close(p->pagemap);
    if (p->uffd >= 0)
        close(p->uffd);
    p->local->idle_since = uv_now(p->local->loop);
    free(p);
}

struct use *use_add(struct program *p, struct body *b, uint32_t number, uint8_t hashed)
{
    struct use *u = calloc(1, sizeof *u);
    if (!u)
        return NULL;
    *u = (struct use){
        .next_program = p->uses, .next_body = b->uses, .program = p, .body = b, .number = number, .hashed = hashed};
    p->uses = u;
    b->uses = u;
    body_hold(b);
    return u;
}

void use_end(struct use *u)
{
    struct program *p = u->program;
    struct use **at = &p->uses;
    while (*at != u)
        at = &(*at)->next_program;
    *at = u->next_program;
    at = &u->body->uses;
    while (*at != u)
        at = &(*at)->next_body;
    *at = u->next_body;
    for (size_t i = 0; i < u->nmaps; i++)
        if (u->maps[i].ops == &track_softdirty)
            softdirty_forget(u->maps[i].soft, u->maps[i].addr, u->maps[i].len);
    u->nmaps = 0;
    u->next_program = p->dead_uses;
    p->dead_uses = u; /* a capture may be looking at its marks */
    program_hold(p);
    program_drop(p);
}

void program_join(struct program *p, struct region *r, const char *group)
{
    if (*group) {
        struct group *named = group_of(p->link, group);
        if (!named)
            return;
        if (!r->group)
            group_add(named, r);
        else if (r->group != named)
            group_merge(named, r->group);
        return;
    }
    if (!p->group)
        p->group = r->group ? r->group : group_of(p->link, "");
    if (!p->group)
        return;
    if (!r->group)
        group_add(p->group, r);
    else if (r->group != p->group)
        group_merge(p->group, r->group);
}

/* Its pages can no longer be looked at through its memory map: it is going, or the registration was lost. */
void program_check(struct program *p)
{
    bool lost = false;
    for (struct use *u = p->uses; u; u = u->next_program)
        for (size_t i = 0; i < u->nmaps; i++) {
            struct track_map *m = &u->maps[i];
            if (m->ops != &track_uffd && m->ops != &track_softdirty)
                continue;
            u->body->unknown = true;
            if (m->ops->arm(m)) {
                u->body->killed = true;
                u->nmaps = 0;
                break;
            }
            m->ops = &track_hash;
            u->body->tracker = "hash";
            lost = true;
        }
    if (lost)
        program_notice(p, "page-table tracking was lost in %s (%u): its regions are found by hashing from now on",
                       p->name, p->pid);
}

static void program_closed(uv_handle_t *h)
{
    struct program *p = h->data;
    close(p->fd);
    p->fd = -1;
    program_drop(p);
}

/* What a dead program's page tables held is gone; what its marks hold is not. */
void program_gone(struct program *p)
{
    if (p->gone)
        return;
    p->gone = true;
    bool died = !p->bye && p->greeted && !p->tool;
    bool writing = p->shared && __atomic_load_n(&p->shared->calls, __ATOMIC_SEQ_CST);
    page_program_gone(p);
    if (p->link)
        naming_after_death(p);
    if (p->link)
        for (struct group *g = p->link->groups; g; g = g->next)
            group_forget_program(g, p);
    while (p->uses) {
        struct use *u = p->uses;
        struct body *b = u->body;
        if (u->marks)
            marks_collect(u->marks, b);
        if ((u->nmaps && !u->left) || (died && writing))
            b->unknown = b->killed = true;
        if (died && b->dirty.count)
            b->killed = true;
        if (b->killed && b->mount && b->region && b->joined) { /* no file will be found later */
            b->refetch = true;
            b->region->group->wanted = true;
        }
        if (b->killed)
            b->killed_at = (int64_t)time(NULL);
        use_end(u);
    }
    if (died)
        log_info("%s (%u) died", p->name, p->pid);
    if (p->polling) {
        p->polling = false;
        uv_poll_stop(&p->poll);
        uv_close((uv_handle_t *)&p->poll, program_closed);
    } else {
        program_drop(p);
    }
}
