/* What the command-line tool says over the control socket (wire/control.h), one function a message: it asks how things
 * are, has something published now, a file watched, or a block device brought up.
 *
 * Answers are texts, a RESULT last but for STATUS, whose end is an empty TEXT. One that takes its time is given later,
 * to a program that is held meanwhile and may be gone by then. */
#include "agent/sync/local.h"
#include "agent/sync/model.h"
#include "agent/nbd/device.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

static int on_status(struct program *p)
{
    char *json = status_json(p->local);
    size_t len = json ? strlen(json) : 0;
    static char piece[8001];
    for (size_t at = 0; at < len; at += 8000) {
        snprintf(piece, sizeof piece, "%s", json + at);
        program_send_text(p, CONTROL_TEXT, 0, piece);
    }
    program_send_text(p, CONTROL_TEXT, 0, "");
    free(json);
    return 0;
}

static int on_publish(struct program *p, const void *data, size_t len)
{
    static struct control_publish m;
    if (control_publish_get(data, len, &m))
        return -EPROTO;
    struct answer *a = answer_new(p, 0);
    bool any = false;
    if (!a)
        return -ENOMEM;
    for (struct link *k = p->local->links; k; k = k->next)
        for (struct group *g = k->groups, *next; g; g = next) {
            bool here = !*m.name;
            next = g->next;
            for (struct region *r = g->regions; r && !here; r = r->next_group)
                here = !strcmp(r->name, m.name);
            if (!here)
                continue;
            any = true;
            a->refs++;
            waiter_new(g, WAIT_TOOL, a, NULL, CONTROL_ACK_DURABLE, 0, 0, false);
        }
    answer_drop(a, any || !*m.name ? 0 : -ENOENT);
    return 0;
}

/* A watched file is a program that never leaves and is found by hashing. */
static int on_watch(struct program *p, const void *data, size_t len)
{
    static struct control_watch m;
    if (control_watch_get(data, len, &m))
        return -EPROTO;
    struct link *k = link_find(p->local, m.remote);
    const char *fault = name_fault(m.name);
    if (!k || k->broken || fault) {
        program_send_text(p, CONTROL_RESULT, -EINVAL, fault ? fault : k ? k->reason : "no memory");
        return 0;
    }
    struct statx st;
    int fd = own_open(-1, m.path);
    if (fd < 0 || statx(fd, "", AT_EMPTY_PATH, STATX_BASIC_STATS | STATX_BTIME, &st) < 0) {
        program_send_text(p, CONTROL_RESULT, fd < 0 ? fd : -errno, "");
        if (fd >= 0)
            close(fd);
        return 0;
    }
    uint64_t dev;
    struct source s;
    file_identity(&st, &dev, &s);
    struct region *r = region_get(k, m.name, m.path);
    struct program *w = calloc(1, sizeof *w);
    if (!r || !w)
        return -ENOMEM;
    *w = (struct program){.local = p->local,
                          .link = k,
                          .fd = -1,
                          .pagemap = -1,
                          .uffd = -1,
                          .greeted = true,
                          .watch = true,
                          .holds = 1,
                          .timeout_ms = 10000,
                          .next = p->local->programs,
                          .name = "watch"};
    p->local->programs = w;
    if (!r->body || !source_same(&r->body->source, &s)) {
        struct body *b = body_new(fd, dev, s);
        if (!b)
            return -ENOMEM;
        region_give_body(r, b);
        body_drop(b);
        r->attach = ATTACH_LOOSE;
    } else {
        close(fd);
    }
    r->terms = m.terms;
    r->body->tracker = "hash";
    program_join(w, r, m.terms.group);
    use_add(w, r->body, 1, CONTROL_HASHED_ALL);
    if (k->state == LINK_UP && r->attach == ATTACH_LOOSE)
        link_attach(r);
    program_send_text(p, CONTROL_RESULT, 0, "");
    return 0;
}

static void attached(void *arg, int err, const char *text)
{
    struct program *p = arg;
    if (!p->gone)
        program_send_text(p, CONTROL_RESULT, err, text);
    program_drop(p);
}

static int on_attach(struct program *p, const void *data, size_t len)
{
    static struct control_attach m;
    if (control_attach_get(data, len, &m))
        return -EPROTO;
    char error[STORE_ERROR] = "";
    program_hold(p);
    int rc = !p->local->devices
                 ? -ESHUTDOWN
                 : devices_attach(p->local->devices, m.remote, m.name, m.device, m.read_only, attached, p, error);
    if (rc)
        attached(p, rc, error[0] ? error : strerror(-rc));
    return 0;
}

int tool_message(struct program *p, uint8_t type, const void *data, size_t len)
{
    switch (type) {
    case CONTROL_STATUS:
        return on_status(p);
    case CONTROL_PUBLISH:
        return on_publish(p, data, len);
    case CONTROL_WATCH:
        return on_watch(p, data, len);
    case CONTROL_ATTACH:
        return on_attach(p, data, len);
    case CONTROL_STOP:
        agent_leave();
        return 0; /* answered when all is drained: the connection ends */
    default:
        return -EPROTO;
    }
}
