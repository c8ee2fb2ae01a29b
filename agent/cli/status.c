/* What is asked of the local agent: status, sync, watch, stop. */
#include "agent/cli/cli.h"
#include "agent/cli/local.h"
#include "shim/rules.h"
#include "wire/nbd_uri.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static const char *text_of(json_t *object, const char *key)
{
    const char *s = json_string_value(json_object_get(object, key));
    return s ? s : "";
}

static json_int_t number_of(json_t *object, const char *key)
{
    return json_integer_value(json_object_get(object, key));
}

static bool is_wrong(const char *state)
{
    static const char *const wrong[] = {"degraded", "diverged", "fenced", "refused", "failed"};
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++)
        if (!strcmp(state, wrong[i]))
            return true;
    return false;
}

static bool any_wrong(json_t *status)
{
    size_t i;
    json_t *region;
    json_array_foreach(json_object_get(status, "regions"), i,
                       region) if (is_wrong(text_of(region, "state"))) return true;
    json_array_foreach(json_object_get(status, "views"), i, region) if (is_wrong(text_of(region, "state"))) return true;
    return false;
}

static void print_region(json_t *region)
{
    char bytes[32], seconds[32], lag[96] = "-";
    json_int_t epochs = number_of(region, "lag_epochs"), n = number_of(region, "lag_bytes");
    if (epochs || n)
        snprintf(lag, sizeof lag, "%lld epochs, %s, %s", (long long)epochs, cli_bytes((uint64_t)n, bytes),
                 cli_seconds(json_number_value(json_object_get(region, "lag_seconds")), seconds));
    char hashes[32], blocks[32], memory[80];
    snprintf(memory, sizeof memory, "%s + %s", cli_bytes((uint64_t)number_of(region, "hash_bytes"), hashes),
             cli_bytes((uint64_t)number_of(region, "block_bytes"), blocks));
    printf("%-32s %-9s %7lld  %-24s %-19s %-7s %s\n", text_of(region, "name"), text_of(region, "state"),
           (long long)number_of(region, "epoch"), lag, memory, text_of(region, "tracker"), text_of(region, "remote"));
}

static void print_reason(json_t *region)
{
    const char *reason = text_of(region, "reason"), *state = text_of(region, "state");
    if (!*reason && !is_wrong(state))
        return;
    char since[64] = "";
    time_t t = (time_t)number_of(region, "since");
    struct tm tm;
    if (t > 0 && localtime_r(&t, &tm))
        strftime(since, sizeof since, " since %Y-%m-%d %H:%M:%S", &tm);
    printf("%s: %s%s%s%s\n", text_of(region, "name"), state, since, *reason ? ": " : "", reason);
}

static void print_view(json_t *view)
{
    char resident[32], size[32], bound[32], both[80], flight[32];
    snprintf(both, sizeof both, "%s of %s", cli_bytes((uint64_t)number_of(view, "resident"), resident),
             cli_bytes((uint64_t)number_of(view, "size"), size));
    size_t used = strlen(both);
    if (number_of(view, "bound"))
        snprintf(both + used, sizeof both - used, ", %s at most", cli_bytes((uint64_t)number_of(view, "bound"), bound));
    printf("%-32s %-6s %-9s %7lld  %-24s %-9s %8lld %-8s %s\n", text_of(view, "name"), text_of(view, "mode"),
           text_of(view, "state"), (long long)number_of(view, "epoch"), both,
           cli_bytes((uint64_t)number_of(view, "in_flight"), flight), (long long)number_of(view, "programs"),
           text_of(view, "order"), text_of(view, "remote"));
}

static void print_views(json_t *views)
{
    size_t i;
    json_t *each;
    if (!json_array_size(views))
        return;
    printf("\n%-32s %-6s %-9s %7s  %-24s %-9s %8s %-8s %s\n", "PULLED", "MODE", "STATE", "EPOCH", "HERE", "COMING",
           "PROGRAMS", "ORDER", "REMOTE");
    json_array_foreach(views, i, each) print_view(each);
    json_array_foreach(views, i, each) print_reason(each);
}

static void print_devices(json_t *devices)
{
    size_t i;
    json_t *each;
    char size[32];
    if (!json_array_size(devices))
        return;
    printf("\n%-12s %10s  %-9s %-32s %s\n", "DEVICE", "SIZE", "", "REGION", "REMOTE");
    json_array_foreach(devices, i, each) printf("%-12s %10s  %-9s %-32s %s\n", text_of(each, "device"),
                                                cli_bytes((uint64_t)number_of(each, "size"), size),
                                                json_is_true(json_object_get(each, "read_only")) ? "read-only" : "",
                                                text_of(each, "region"), text_of(each, "remote"));
}

static void print_status(json_t *status)
{
    size_t i;
    json_t *each, *regions = json_object_get(status, "regions"), *programs = json_object_get(status, "programs");
    printf("agent %lld; programs: %zu; regions: %zu\n", (long long)number_of(status, "pid"), json_array_size(programs),
           json_array_size(regions));
    json_array_foreach(json_object_get(status, "remotes"), i, each)
    {
        char out[32], in[32];
        const char *reason = text_of(each, "reason");
        printf("remote %s is %s%s%s, %s sent, %s received%s\n", text_of(each, "address"), text_of(each, "state"),
               *reason ? ": " : "", reason, cli_bytes((uint64_t)number_of(each, "bytes_out"), out),
               cli_bytes((uint64_t)number_of(each, "bytes_in"), in),
               nbd_uri_is(text_of(each, "address")) ? "; a foreign server: no atomic epochs" : "");
    }
    print_views(json_object_get(status, "views"));
    print_devices(json_object_get(status, "devices"));
    if (!json_array_size(regions))
        return;
    printf("\n%-32s %-9s %7s  %-24s %-19s %-7s %s\n", "REGION", "STATE", "EPOCH", "BEHIND", "MEMORY", "TRACKER",
           "REMOTE");
    json_array_foreach(regions, i, each) print_region(each);
    json_array_foreach(regions, i, each) print_reason(each);
}

int command_status(const struct args *a)
{
    struct local_agent l;
    int rc = local_connect(&l);
    if (rc == -ENOENT) {
        if (a->json)
            puts("{\"pid\": 0, \"regions\": [], \"views\": [], \"programs\": [], \"remotes\": []}");
        else
            printf("no agent is running on %s: nothing is tracked\n", l.socket);
        return CLI_DONE;
    }
    json_t *status = rc ? NULL : local_status(&l);
    local_close(&l);
    if (!status)
        return CLI_FAILED;
    if (a->json) {
        json_dumpf(status, stdout, JSON_INDENT(2));
        putchar('\n');
    } else {
        print_status(status);
    }
    int code = any_wrong(status) ? CLI_NOT_SO : CLI_DONE;
    json_decref(status);
    return code;
}

static int request(struct local_agent *l, const void *message, size_t len, const char *failed)
{
    static struct control_text r;
    int rc = local_send(l, message, len);
    if (!rc)
        rc = local_result(l, &r, -1);
    if (!rc && r.code)
        cli_say("%s: %s", failed, *r.text ? r.text : strerror(-r.code));
    return rc || r.code ? CLI_FAILED : CLI_DONE;
}

int command_sync(const struct args *a)
{
    const char *name = a->count ? a->words[0] : "", *fault = a->count ? name_fault(name) : NULL;
    if (fault)
        return cli_fail(CLI_USAGE, "%s is no name of a region: %s", name, fault);
    struct local_agent l;
    int rc = local_connect(&l);
    if (rc == -ENOENT)
        return cli_fail(CLI_FAILED, "no agent is running on %s: nothing is tracked", l.socket);
    if (!rc)
        rc = local_publish(&l, name);
    local_close(&l);
    return rc ? CLI_FAILED : CLI_DONE;
}

/* The interval is the variable's, as for programs. */
static int watch_terms(struct control_terms *t)
{
    const char *interval = getenv("MEMSYNC_INTERVAL");
    t->interval_ms = 1000;
    if (interval && *interval && rules_time(interval, &t->interval_ms))
        return cli_fail(CLI_USAGE, "MEMSYNC_INTERVAL=%s is no time such as 1s or 250ms", interval);
    if (!t->interval_ms || t->interval_ms == UINT64_MAX)
        return cli_fail(CLI_USAGE,
                        "MEMSYNC_INTERVAL=%s: a watched file is looked at once in an interval; give a time such as 1s",
                        interval);
    return 0;
}

int command_watch(const struct args *a)
{
    static struct control_watch w;
    int code = watch_terms(&w.terms);
    if (code)
        return code;
    char path[PATH_MAX];
    struct stat st;
    if (!realpath(a->words[0], path) || stat(path, &st))
        return cli_fail(CLI_FAILED, "%s cannot be watched: %m", a->words[0]);
    if (!S_ISREG(st.st_mode))
        return cli_fail(CLI_FAILED, "%s cannot be watched: it is no regular file", path);
    const char *name = a->name ? a->name : path + 1, *fault = name_fault(name);
    if (fault)
        return cli_fail(CLI_USAGE, "%s is no name for a region: %s; give another one with --name", name, fault);
    if (strlen(a->remote) >= sizeof w.remote)
        return cli_fail(CLI_USAGE, "the remote's address is too long");
    snprintf(w.path, sizeof w.path, "%s", path);
    snprintf(w.name, sizeof w.name, "%s", name);
    snprintf(w.remote, sizeof w.remote, "%s", a->remote);
    struct local_agent l;
    if (local_connect_or_start(&l))
        return CLI_FAILED;
    uint8_t message[CONTROL_MAX];
    code = request(&l, message, control_watch_put(message, sizeof message, &w), path);
    local_close(&l);
    if (code == CLI_DONE)
        printf("watching %s as %s at %s\n", path, name, a->remote);
    return code;
}

int command_stop(const struct args *a)
{
    (void)a;
    struct local_agent l;
    int rc = local_connect(&l);
    if (rc == -ENOENT) {
        printf("no agent is running on %s\n", l.socket);
        return CLI_DONE;
    }
    if (rc)
        return CLI_FAILED;
    uint8_t message[CONTROL_MAX];
    rc = local_send(&l, message, control_empty_put(message, sizeof message, CONTROL_STOP)) ?: local_ended(&l);
    local_close(&l);
    if (!rc)
        printf("agent %u has stopped\n", l.pid);
    return rc ? CLI_FAILED : CLI_DONE;
}
