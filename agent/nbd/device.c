#include "agent/nbd/device.h"

#include "agent/base/job.h"
#include "agent/base/log.h"
#include "agent/nbd/kernel.h"
#include "agent/nbd/nbd.h"
#include "agent/net/addr.h"
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
#define HANDSHAKE_S 20 /* until the server answers */
#define GRANT 10u      /* u64 size, u16 flags: EXPORT_NAME's answer */

struct device {
    TAILQ_ENTRY(device) link;
    struct devices *all;
    int index;
    bool read_only, asked; /* asked: connecting; no device yet */
    uint64_t size;
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
    struct nbd *nbd;
    struct id identity;
    struct device_list list;
    unsigned busy; /* jobs and questions under way */
    bool stopping, ending;
    uint64_t looked;
    void (*done)(void *arg);
    void *arg;
    char host[256], path[];
};

struct devices *devices_new(uv_loop_t *loop, const char *path, const struct id *identity, const char *host)
{
    size_t len = strlen(path) + 1;
    struct devices *d = calloc(1, sizeof *d + len);
    if (!d)
        return NULL;
    d->loop = loop;
    d->identity = *identity;
    snprintf(d->host, sizeof d->host, "%s", host);
    memcpy(d->path, path, len);
    TAILQ_INIT(&d->list);
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

static int all_of(int fd, void *to, size_t len)
{
    ssize_t n = recv(fd, to, len, MSG_WAITALL);
    return n == (ssize_t)len ? 0 : n < 0 ? -errno : -ECONNRESET;
}

static int shake_hands(int fd, struct device *v, uint16_t *flags)
{
    uint8_t greeting[NBD_GREETING], grant[GRANT], ask[4 + NBD_OPTION_HEAD + NBD_NAME_MAX];
    struct wr w = wr_over(ask, sizeof ask);
    wr_u32(&w, 3); /* fixed newstyle, no zeroes behind the answer */
    wr_u64(&w, 0x49484156454f5054u);
    wr_u32(&w, NBD_OPT_EXPORT_NAME);
    wr_u32(&w, (uint32_t)strlen(v->region));
    wr_copy(&w, v->region, strlen(v->region));
    int rc = all_of(fd, greeting, sizeof greeting);
    if (!rc && send(fd, ask, wr_len(&w), MSG_NOSIGNAL) != (ssize_t)wr_len(&w))
        rc = -EPIPE;
    rc = rc ?: all_of(fd, grant, sizeof grant);
    v->size = get_u64(grant);
    *flags = get_u16(grant + 8);
    return rc;
}

/* A socket to our own server, for as long as its greeting may take. */
static int dial(const char *path)
{
    struct sockaddr_un to;
    struct timeval limit = {.tv_sec = HANDSHAKE_S};
    int dir, rc = addr_unix(path, &to, &dir);
    if (rc < 0)
        return rc;
    int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    rc = fd < 0 || connect(fd, (struct sockaddr *)&to, sizeof to) < 0 ? -errno : 0;
    if (dir >= 0)
        close(dir);
    if (!rc)
        setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    if (rc && fd >= 0)
        close(fd);
    return rc ? rc : fd;
}

static void connect_work(void *arg)
{
    struct device *v = arg;
    struct timeval none = {0};
    uint16_t flags = 0;
    kernel_sweep();
    int fd = dial(v->all->path);
    v->err = fd < 0 ? fd : shake_hands(fd, v, &flags);
    if (v->err || v->size < 512) {
        snprintf(v->text, sizeof v->text, "%.300s: %s", v->region,
                 v->err ? strerror(-v->err) : "it is smaller than 512 bytes, which no device can be");
        v->err = v->err ?: -EINVAL;
        if (fd >= 0)
            close(fd);
        return;
    }
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &none, sizeof none);
    if (v->read_only)
        flags |= NBD_FLAG_READ_ONLY;
    v->read_only = flags & NBD_FLAG_READ_ONLY;
    v->err = kernel_connect(&v->index, fd, v->size, flags, v->region, v->text);
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

static void on_pinned(void *arg, int err, struct store_pin *pin, const struct frame_entry *e, const char *text)
{
    struct device *v = arg;
    char line[KERNEL_ERROR];
    if (err == -ENOENT)
        snprintf(line, sizeof line, "%.300s: no such region here; memsync ls tells which there are", v->region);
    else if (err)
        snprintf(line, sizeof line, "%.200s: %.200s", v->region, text && *text ? text : strerror(-err));
    else if (others_write(v, e))
        snprintf(line, sizeof line, "%.200s is being written by %.200s: attach it with --read-only", v->region,
                 e->holder);
    else
        line[0] = 0;
    if (pin)
        store_unpin(pin);
    if (line[0]) {
        answer(v, err ? err : -EBUSY, line);
        return;
    }
    int rc = job_run(v->all->loop, connect_work, connect_done, v);
    if (rc)
        answer(v, rc, strerror(-rc));
}

static int serve(struct devices *d)
{
    char address[4200], bound[4200];
    if (d->nbd)
        return 0;
    d->nbd = nbd_new(d->loop, d->store, &d->identity, d->host);
    if (!d->nbd)
        return -ENOMEM;
    /* Our memory is what the kernel writes dirty pages back through: it must not wait for that itself (prctl(2)). */
    if (prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) < 0)
        log_info("devices: no PR_SET_IO_FLUSHER: %s", strerror(errno));
    snprintf(address, sizeof address, "unix:%s", d->path);
    return nbd_listen(d->nbd, address, bound, sizeof bound);
}

int devices_attach(struct devices *d, const char *region, const char *device, bool read_only, devices_done *done,
                   void *arg)
{
    int index, rc = kernel_device(device, &index);
    size_t len = strlen(region) + 1;
    if (rc || d->stopping || !d->store)
        return rc ? rc : d->stopping ? -ESHUTDOWN : -ENOTSUP;
    struct device *v = calloc(1, sizeof *v + len);
    if (!v)
        return -ENOMEM;
    rc = serve(d);
    if (rc) {
        free(v);
        return rc;
    }
    v->all = d;
    v->index = index;
    v->read_only = read_only;
    v->asked = true;
    v->done = done;
    v->arg = arg;
    memcpy(v->region, region, len);
    TAILQ_INSERT_TAIL(&d->list, v, link);
    d->busy++;
    struct store_pin *pin = NULL;
    static struct frame_entry e;
    rc = store_ask_pin(d->store, region, &pin, &e, on_pinned, v);
    if (rc != -EINPROGRESS)
        on_pinned(v, rc, pin, &e, "");
    return 0;
}

void devices_tick(struct devices *d, uint64_t now)
{
    if (now - d->looked < TICK_MS || d->stopping)
        return;
    d->looked = now;
    for (struct device *v = TAILQ_FIRST(&d->list), *next; v; v = next) {
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

static void on_nbd_stopped(void *arg)
{
    struct devices *d = arg;
    void (*done)(void *) = d->done;
    void *done_arg = d->arg;
    free(d);
    done(done_arg);
}

/* Devices go before their server does. */
static void look(struct devices *d)
{
    if (!d->stopping || d->busy || d->ending)
        return;
    struct device *v, *next;
    for (v = TAILQ_FIRST(&d->list); v; v = next) {
        next = TAILQ_NEXT(v, link);
        if (!job_run(d->loop, disconnect_work, disconnect_done, v))
            d->busy++;
        else
            forget(v);
    }
    if (d->busy)
        return;
    d->ending = true;
    if (d->nbd)
        nbd_stop(d->nbd, on_nbd_stopped, d);
    else
        on_nbd_stopped(d);
}

void devices_stop(struct devices *d, void (*done)(void *arg), void *arg)
{
    d->stopping = true;
    d->done = done;
    d->arg = arg;
    look(d);
}
