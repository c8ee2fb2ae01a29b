/* Publishing and the wait for it. A second connection asks for the status meanwhile: for the progress line, and to tell
 * a long way from a standstill: what is behind gets less, or bytes leave for a remote that is up. */
#include "agent/cli/cli.h"
#include "agent/cli/local.h"
#include "shim/rules.h"

#include <errno.h>
#include <stdlib.h>

#define LOOK_MS 250
#define HEARTBEAT 4096u /* bytes that a connection may send without anything moving */

struct wait {
    const char *name;
    struct progress progress;
    uint64_t timeout_ms, behind, sent;
    int64_t moved; /* when */
};

static uint64_t sum(json_t *status, const char *list, const char *key, const char *name)
{
    uint64_t all = 0;
    size_t i;
    json_t *each;
    json_array_foreach(json_object_get(status, list), i, each)
    {
        const char *n = json_string_value(json_object_get(each, "name"));
        if (!*name || (n && !strcmp(name, n)))
            all += (uint64_t)json_integer_value(json_object_get(each, key));
    }
    return all;
}

static void look(struct wait *w, json_t *status)
{
    uint64_t behind = sum(status, "regions", "lag_bytes", w->name), sent = sum(status, "remotes", "bytes_out", "");
    if (behind < w->behind || sent > w->sent + HEARTBEAT)
        w->moved = cli_now();
    w->behind = behind;
    w->sent = sent;
    struct progress *p = &w->progress;
    if (behind > p->total - p->done)
        p->total = p->done + behind; /* more has come */
    progress_at(p, p->total - behind);
}

static void say_standstill(const struct wait *w, json_t *status)
{
    size_t i;
    json_t *each;
    char time[32];
    cli_say("%s is not at the remote yet: nothing has moved for %s; it stays here, and goes there when it can",
            *w->name ? w->name : "what is tracked here", cli_seconds((double)w->timeout_ms / 1000, time));
    json_array_foreach(json_object_get(status, "remotes"), i, each)
    {
        const char *address = json_string_value(json_object_get(each, "address"));
        const char *state = json_string_value(json_object_get(each, "state"));
        const char *reason = json_string_value(json_object_get(each, "reason"));
        cli_say("remote %s is %s%s%s", address ? address : "?", state ? state : "?", reason && *reason ? ": " : "",
                reason ? reason : "");
    }
}

/* RESULT, or -ETIMEDOUT at a standstill. What else went wrong, and a standstill, are said. */
static int await(struct wait *w, struct local_agent *l, struct local_agent *ask, struct control_text *r)
{
    int rc;
    while ((rc = local_result(l, r, LOOK_MS)) == -ETIMEDOUT) {
        json_t *status = local_status(ask);
        if (!status)
            return -EIO;
        look(w, status);
        bool stands = w->timeout_ms != UINT64_MAX && (uint64_t)(cli_now() - w->moved) > w->timeout_ms;
        if (stands) {
            progress_end(&w->progress);
            say_standstill(w, status);
        }
        json_decref(status);
        if (stands)
            break;
    }
    return rc;
}

int local_publish(struct local_agent *l, const char *name)
{
    static struct control_publish p;
    static struct control_text r;
    uint8_t message[CONTROL_MAX];
    struct wait w = {.name = name, .timeout_ms = 10000, .behind = UINT64_MAX, .moved = cli_now()};
    const char *timeout = getenv("MEMSYNC_TIMEOUT");
    if (timeout && *timeout && rules_time(timeout, &w.timeout_ms)) {
        cli_say("MEMSYNC_TIMEOUT=%s is no time such as 10s", timeout);
        return -EINVAL;
    }
    memcpy(p.name, name, strlen(name) + 1);
    struct local_agent ask;
    int rc = local_send(l, message, control_publish_put(message, sizeof message, &p)) ?: local_connect(&ask);
    if (rc)
        return rc;
    progress_start(&w.progress, *name ? name : "everything", 0);
    rc = await(&w, l, &ask, &r);
    progress_end(&w.progress);
    local_close(&ask);
    if (!rc && r.code) {
        const char *why = *r.text             ? r.text
                          : r.code == -ENOENT ? "no region of this name is tracked here"
                                              : strerror(-r.code);
        cli_say("%s could not be published: %s", *name ? name : "what is tracked here", why);
        rc = r.code;
    }
    return rc;
}
