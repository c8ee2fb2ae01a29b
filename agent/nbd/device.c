#include "agent/nbd/device.h"

#include "agent/base/job.h"
#include "agent/base/log.h"
#include "agent/hub/hub.h"
#include "agent/nbd/kernel.h"
#include "agent/nbd/nbd.h"
#include "wire/nbd.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/queue.h>
#include <sys/socket.h>
#include <unistd.h>

#ifndef PR_SET_IO_FLUSHER
#define PR_SET_IO_FLUSHER 57
#endif

#define TICK_MS 500u
#define REACH_MS 10000u /* for a remote to be connected to */

/* Where regions are: the agent's own store (address ""), or a remote's, seen through a hub of one. */
struct origin {
    SLIST_ENTRY(origin) link;
    struct devices *all;
    struct store *store;
    struct nbd *nbd;
    char address[];
};
SLIST_HEAD(origin_list, origin);

struct device {
    TAILQ_ENTRY(device) link;
    struct devices *all;
    struct origin *origin;
    int index, fd;                   /* fd: the kernel's end of the socket pair */
    bool read_only, asked, retrying; /* asked: connecting; no device yet */
    uint64_t size, give_up;          /* give_up: ms */
    uint16_t flags;
    devices_done *done; /* of devices_attach */
    void *arg;
    int err;
    char text[KERNEL_ERROR];
    char region[];
};
TAILQ_HEAD(device_list, device);

struct devices {
    uv_loop_t *loop;
    struct store *store;
    struct id identity;
    struct device_list list;
    struct origin_list origins;
    unsigned busy;    /* jobs and questions under way */
    unsigned serial;  /* of attaching */
    unsigned closing; /* origins */
    bool stopping, ending;
    uint64_t looked;
    void (*done)(void *arg);
    void *arg;
    char host[256];
};

struct devices *devices_new(uv_loop_t *loop, const struct id *identity, const char *host)
{
    struct devices *d = calloc(1, sizeof *d);
    if (!d)
        return NULL;
    d->loop = loop;
    d->identity = *identity;
    d->identity.b[14] ^= 0x6b; /* not that of the agent's own programs */
    snprintf(d->host, sizeof d->host, "%s", host);
    TAILQ_INIT(&d->list);
    SLIST_INIT(&d->origins);
    return d;
}

void devices_store(struct devices *d, struct store *store)
{
    d->store = store;
}

bool devices_any(const struct devices *d)
{
    return !TAILQ_EMPTY(&d->list);
}

static void look(struct devices *d);

static void forget(struct device *v)
{
    TAILQ_REMOVE(&v->all->list, v, link);
    free(v);
}

static void answer(struct device *v, int err, const char *text)
{
    struct devices *d = v->all;
    v->done(v->arg, err, text);
    if (err)
        forget(v);
    d->busy--;
    look(d);
}

static void connect_work(void *arg)
{
    struct device *v = arg;
    kernel_sweep();
    v->err = kernel_connect(&v->index, v->fd, v->size, v->flags, v->region, v->text);
}

static void connect_done(void *arg)
{
    struct device *v = arg;
    char path[32];
    v->asked = false;
    snprintf(path, sizeof path, "/dev/nbd%d", v->index);
    if (!v->err)
        log_info("%s is %s now", path, v->region);
    answer(v, v->err, v->err ? v->text : path);
}

/* Our own host's lease is a device's of before, or will be refused at the first write. */
static bool others_write(const struct device *v, const struct frame_entry *e)
{
    return e->leased && !v->read_only && strncmp(e->holder, v->all->host, strlen(v->all->host));
}

static void on_served(void *arg, int err, const char *text, uint64_t size, uint16_t flags)
{
    struct device *v = arg;
    char line[KERNEL_ERROR];
    if (!err && size < 512) {
        err = -EINVAL;
        text = "it is smaller than 512 bytes, which no device can be";
    }
    v->size = size;
    v->flags = v->read_only ? flags | NBD_FLAG_READ_ONLY : flags;
    v->read_only = v->flags & NBD_FLAG_READ_ONLY;
    if (!err)
        err = job_run(v->all->loop, connect_work, connect_done, v);
    if (!err)
        return;
    close(v->fd);
    snprintf(line, sizeof line, "%.200s: %.200s", v->region, text && *text ? text : strerror(-err));
    answer(v, err, line);
}

static int hand_over(struct device *v)
{
    int fds[2];
    char who[64];
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) < 0)
        return -errno;
    v->fd = fds[1];
    snprintf(who, sizeof who, "kernel device %u of %.24s", ++v->all->serial, v->all->host);
    int rc = nbd_serve(v->origin->nbd, fds[0], v->region, who, on_served, v);
    if (rc)
        close(fds[1]);
    return rc;
}

/* A remote that was dialled just now answers as if it were not there. */
static bool may_come(struct device *v, int err)
{
    if (!err || err == -ENOENT || err == -EINVAL || !v->origin->address[0] || v->all->stopping ||
        uv_now(v->all->loop) > v->give_up)
        return false;
    v->retrying = true;
    return true;
}

static void on_pinned(void *arg, int err, struct store_pin *pin, const struct frame_entry *e, const char *text)
{
    struct device *v = arg;
    char line[KERNEL_ERROR] = "";
    if (may_come(v, err))
        return;
    if (err == -ENOENT)
        snprintf(line, sizeof line, "%.300s: no such region %s%.100s; memsync ls tells which there are", v->region,
                 v->origin->address[0] ? "at " : "here", v->origin->address);
    else if (err)
        snprintf(line, sizeof line, "%.200s: %.200s", v->region, text && *text ? text : strerror(-err));
    else if (others_write(v, e))
        snprintf(line, sizeof line, "%.200s is being written by %.200s: attach it with --read-only", v->region,
                 e->holder);
    if (pin)
        store_unpin(pin);
    int rc = line[0] ? err ? err : -EBUSY : hand_over(v);
    if (rc)
        answer(v, rc, line[0] ? line : strerror(-rc));
}

static void ask(struct device *v)
{
    struct store_pin *pin = NULL;
    static struct frame_entry e;
    v->retrying = false;
    int rc = store_ask_pin(v->origin->store, v->region, &pin, &e, on_pinned, v);
    if (rc != -EINPROGRESS)
        on_pinned(v, rc, pin, &e, "");
}

static int origin_open(struct origin *s, char error[STORE_ERROR])
{
    struct devices *d = s->all;
    char url[1100];
    snprintf(url, sizeof url, "%s%s", hub_is(s->address) ? "" : "hub:", s->address);
    int rc = s->address[0] ? hub_check(url, error) : 0;
    if (s->address[0] && !rc)
        rc = hub_open(&s->store, d->loop, url, &d->identity, d->host, error);
    else if (!rc)
        s->store = d->store;
    if (rc)
        return rc;
    s->nbd = nbd_new(d->loop, s->store, &d->identity, d->host);
    return s->nbd ? 0 : -ENOMEM;
}

static struct origin *origin_get(struct devices *d, const char *address, char error[STORE_ERROR])
{
    struct origin *s;
    size_t len = strlen(address) + 1;
    SLIST_FOREACH(s, &d->origins, link)
    if (!strcmp(s->address, address))
        return s;
    s = calloc(1, sizeof *s + len);
    if (!s)
        return NULL;
    s->all = d;
    memcpy(s->address, address, len);
    if (origin_open(s, error)) {
        free(s); /* without memory its store stays: nobody can wait for its end now */
        return NULL;
    }
    /* Our memory is what the kernel writes dirty pages back through: it must not wait for that itself (prctl(2)). */
    if (prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) < 0)
        log_info("devices: no PR_SET_IO_FLUSHER: %s", strerror(errno));
    SLIST_INSERT_HEAD(&d->origins, s, link);
    return s;
}

int devices_attach(struct devices *d, const char *remote, const char *region, const char *device, bool read_only,
                   devices_done *done, void *arg, char error[STORE_ERROR])
{
    int index, rc = kernel_device(device, &index);
    size_t len = strlen(region) + 1;
    error[0] = 0;
    if (rc)
        snprintf(error, STORE_ERROR, "no such device can be: /dev/nbdN, or auto");
    else if (!*remote && !d->store)
        snprintf(error, STORE_ERROR,
                 "this agent has no store of its own: name the region's agent by --remote, or start one with --store "
                 "and --socket");
    if (error[0] || d->stopping)
        return error[0] ? -EINVAL : -ESHUTDOWN;
    struct device *v = calloc(1, sizeof *v + len);
    struct origin *s = v ? origin_get(d, remote, error) : NULL;
    if (!s) {
        free(v);
        return error[0] ? -EINVAL : -ENOMEM;
    }
    v->all = d;
    v->origin = s;
    v->index = index;
    v->read_only = read_only;
    v->asked = true;
    v->give_up = uv_now(d->loop) + REACH_MS;
    v->done = done;
    v->arg = arg;
    memcpy(v->region, region, len);
    TAILQ_INSERT_TAIL(&d->list, v, link);
    d->busy++;
    v->retrying = true; /* asked for the first time by the next tick */
    return 0;
}

void devices_tick(struct devices *d, uint64_t now)
{
    struct device *v, *next;
    for (v = TAILQ_FIRST(&d->list); v; v = next) {
        next = TAILQ_NEXT(v, link);
        if (v->retrying)
            ask(v);
    }
    if (now - d->looked < TICK_MS || d->stopping)
        return;
    d->looked = now;
    for (v = TAILQ_FIRST(&d->list); v; v = next) {
        next = TAILQ_NEXT(v, link);
        if (v->asked || kernel_connected(v->index))
            continue;
        log_info("/dev/nbd%d is not %s any more", v->index, v->region);
        forget(v);
    }
}

void devices_status(const struct devices *d, FILE *f, void (*text)(FILE *f, const char *s))
{
    const struct device *v;
    const char *comma = "";
    TAILQ_FOREACH(v, &d->list, link)
    {
        if (v->asked)
            continue;
        fprintf(f, "%s{\"device\":\"/dev/nbd%d\",\"read_only\":%s,\"size\":%llu,\"region\":", comma, v->index,
                v->read_only ? "true" : "false", (unsigned long long)v->size);
        text(f, v->region);
        fputs(",\"remote\":", f);
        text(f, v->origin->address);
        fputc('}', f);
        comma = ",";
    }
}

static void disconnect_work(void *arg)
{
    struct device *v = arg;
    v->err = kernel_connected(v->index) ? kernel_disconnect(v->index, true, v->text) : 0;
}

static void disconnect_done(void *arg)
{
    struct device *v = arg;
    struct devices *d = v->all;
    if (v->err)
        log_warn("%s: %s", v->region, v->text);
    forget(v);
    d->busy--;
    look(d);
}

static void on_origin_closed(void *arg)
{
    struct origin *s = arg;
    struct devices *d = s->all;
    SLIST_REMOVE(&d->origins, s, origin, link);
    free(s);
    d->closing--;
    look(d);
}

static void on_nbd_stopped(void *arg)
{
    struct origin *s = arg;
    if (s->address[0])
        store_close(s->store, on_origin_closed, s);
    else
        on_origin_closed(s);
}

/* Devices go before their servers do, those before their stores. */
static void look(struct devices *d)
{
    struct device *v, *next;
    if (!d->stopping || d->busy || d->closing)
        return;
    for (v = d->ending ? NULL : TAILQ_FIRST(&d->list); v; v = next) {
        next = TAILQ_NEXT(v, link);
        if (!job_run(d->loop, disconnect_work, disconnect_done, v))
            d->busy++;
        else
            forget(v);
    }
    if (d->busy)
        return;
    if (!d->ending) {
        struct origin *s;
        d->ending = true;
        SLIST_FOREACH(s, &d->origins, link)
        d->closing++;
        if (d->closing) {
            SLIST_FOREACH(s, &d->origins, link)
            nbd_stop(s->nbd, on_nbd_stopped, s);
            return;
        }
    }
    void (*done)(void *) = d->done;
    void *arg = d->arg;
    free(d);
    done(arg);
}

void devices_stop(struct devices *d, void (*done)(void *arg), void *arg)
{
    struct device *v, *next;
    d->stopping = true;
    d->done = done;
    d->arg = arg;
    d->busy++;
    for (v = TAILQ_FIRST(&d->list); v; v = next) {
        next = TAILQ_NEXT(v, link);
        if (v->retrying)
            answer(v, -ESHUTDOWN, "the agent ends");
    }
    d->busy--;
    look(d);
}
