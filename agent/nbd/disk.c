/* Exports as regions: opening them, what is told of them, leases. See disk.h. */
#include "agent/nbd/disk.h"

#include "agent/base/log.h"
#include "agent/base/xxh3.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct want {
    struct want *next;
    struct disk *d;
    struct store_attach ask; /* name NULL: a pin */
    struct id identity;
    char *name, *host;
    store_attach_done *attached;
    store_pin_done *pinned;
    void *arg;
};

struct later {
    struct later *next;
    void (*call)(void *arg);
    void *arg;
};

/* ---- calls back from the loop ---- */

static void woken(uv_async_t *async)
{
    struct store *s = async->data;
    uv_unref((uv_handle_t *)async);
    struct later *all = s->later;
    s->later = NULL;
    s->later_end = &s->later;
    while (all) {
        struct later *one = all;
        all = one->next;
        one->call(one->arg);
        free(one);
    }
    store_look(s);
}

int disk_later(struct store *s, void (*call)(void *arg), void *arg)
{
    struct later *one = malloc(sizeof *one);
    if (!one)
        return -ENOMEM;
    *one = (struct later){.call = call, .arg = arg};
    *s->later_end = one;
    s->later_end = &one->next;
    uv_ref((uv_handle_t *)&s->wake);
    uv_async_send(&s->wake);
    return 0;
}

/* ---- what is told ---- */

static uint64_t now_ms(const struct store *s)
{
    return uv_now(s->loop);
}

bool disk_lease_held(const struct disk *d)
{
    return d->leased && now_ms(d->s) - d->seen < STORE_LEASE_MS;
}

void disk_entry(const struct disk *d, struct frame_entry *e)
{
    *e = (struct frame_entry){.lineage = d->lineage,
                              .writer = d->writer,
                              .epoch = d->epoch,
                              .size = d->size,
                              .committed_at = d->committed_at,
                              .leased = disk_lease_held(d)};
    snprintf(e->name, sizeof e->name, "%s", d->name ? d->name : name_fault(d->uri.name) ? "export" : d->uri.name);
    if (e->leased)
        snprintf(e->holder, sizeof e->holder, "%s", d->holder_host);
}

struct disk *disk_named(struct store *s, const char *name, bool make, int *err)
{
    bool fixed = *s->uri.name;
    for (struct disk *d = s->disks; d; d = d->next)
        if (fixed || !strcmp(d->name, name))
            return d;
    *err = -ENOENT;
    if (!make)
        return NULL;
    *err = -ENOBUFS;
    struct disk *d = s->ndisks < DISKS_MAX ? calloc(1, sizeof *d) : NULL;
    if (!d || (!fixed && !(d->name = strdup(name)))) {
        free(d);
        return NULL;
    }
    d->s = s;
    d->uri = s->uri;
    if (!fixed)
        snprintf(d->uri.name, sizeof d->uri.name, "%s", name);
    d->queue_end = &d->queue;
    for (unsigned i = 0; i < AHEAD_BLOCKS; i++)
        d->blocks[i].at = UINT64_MAX;
    d->next = s->disks;
    s->disks = d;
    s->ndisks++;
    return d;
}

/* The same at each start, as long as it is the same export of the same size. */
static struct id lineage_of(const struct disk *d)
{
    char text[sizeof d->uri.host + sizeof d->uri.port + sizeof d->uri.path + sizeof d->uri.name + 40];
    int n = snprintf(text, sizeof text, "%s\n%s\n%s\n%s\n%llu", d->uri.host, d->uri.port, d->uri.path, d->uri.name,
                     (unsigned long long)d->traits.size);
    XXH128_canonical_t hash;
    XXH128_canonicalFromHash(&hash, XXH3_128bits(text, (size_t)n));
    struct id id;
    _Static_assert(sizeof id == sizeof hash, "a lineage is 16 bytes");
    memcpy(&id, &hash, sizeof id);
    return id;
}

/* ---- opening ---- */

static void attach_bad(struct frame_attached *to, const char *format, const char *a)
{
    to->status = FRAME_ATTACH_BAD;
    snprintf(to->holder, sizeof to->holder, format, a);
}

static void lease_take(struct disk *d, const struct store_attach *a, struct frame_attached *to)
{
    if (disk_lease_held(d) && !id_same(&d->holder, a->identity)) {
        to->status = FRAME_ATTACH_HELD;
        snprintf(to->holder, sizeof to->holder, "%s", d->holder_host);
        return;
    }
    if (!d->leased || !id_same(&d->holder, a->identity))
        d->fence++;
    d->leased = true;
    d->seen = now_ms(d->s);
    d->holder = *a->identity;
    snprintf(d->holder_host, sizeof d->holder_host, "%s", a->host);
    to->fence = d->fence;
}

static void attach_up(struct disk *d, const struct store_attach *a, struct frame_attached *to)
{
    *to = (struct frame_attached){.status = d->vacant ? FRAME_ATTACH_NONE : FRAME_ATTACH_EXISTS};
    if (!d->vacant) {
        to->lineage = d->lineage;
        to->writer = d->writer;
        to->epoch = d->epoch;
        to->size = d->size;
    }
    if (!a->write)
        return;
    if (d->traits.read_only) {
        attach_bad(to, "%.200s: the server offers this export for reading only", d->s->url);
        return;
    }
    bool fixed = *d->s->uri.name;
    if (fixed && d->name && strcmp(d->name, a->name)) {
        if (disk_lease_held(d)) {
            attach_bad(to, "this export is being written as region %.120s: one export, one region", d->name);
            return;
        }
        free(d->name);
        d->name = NULL;
    }
    if (!d->name && !(d->name = strdup(a->name))) {
        attach_bad(to, "%s", "no memory for a name");
        return;
    }
    lease_take(d, a, to);
    if (d->told)
        return;
    d->told = true;
    log_warn("%s: a foreign block device server has no atomic epochs: if this agent or the server dies before a sync "
             "point is through, any part of what was being written may be there%s",
             d->s->url, d->traits.flush ? "" : "; and it offers no FLUSH: what it answers may not be on a disk");
}

static void want_free(struct want *w)
{
    free(w->name);
    free(w->host);
    free(w);
}

static void want_answer(struct want *w, int err, const char *text)
{
    struct disk *d = w->d;
    struct frame_attached to = {.status = FRAME_ATTACH_BAD};
    struct frame_entry e = {0};
    if (w->attached) {
        if (err)
            snprintf(to.holder, sizeof to.holder, "%.255s", text);
        else
            attach_up(d, &w->ask, &to);
        w->attached(w->arg, err, &to);
    } else {
        struct store_pin *pin = err || d->vacant ? NULL : disk_pin(d);
        if (!err && !pin) {
            err = d->vacant ? -ENOENT : -ENOMEM;
            text = d->vacant ? "no such region" : "no memory for a pin";
        }
        disk_entry(d, &e);
        if (w->name)
            snprintf(e.name, sizeof e.name, "%s", w->name);
        w->pinned(w->arg, err, pin, &e, text);
    }
    want_free(w);
}

static void wants_answer(struct disk *d, int err, const char *text)
{
    struct want *all = d->wants;
    d->wants = NULL;
    d->busy++;
    while (all) {
        struct want *w = all;
        all = w->next;
        want_answer(w, err, text);
    }
    disk_release(d);
}

static void disk_open(struct disk *d);

static void on_client_closed(void *arg)
{
    struct disk *d = arg;
    d->client = NULL;
    d->state = DISK_CLOSED;
    if (d->wants && !d->s->closing)
        disk_open(d);
    store_look(d->s);
}

static void disk_close(struct disk *d)
{
    d->state = DISK_CLOSING;
    disk_read_forget(d);
    nbd_client_close(d->client, on_client_closed, d);
}

void disk_release(struct disk *d)
{
    if (--d->busy || d->state != DISK_UP)
        return;
    if (d->s->closing || nbd_client_broken(d->client))
        disk_close(d);
}

static void on_opened(void *arg, int err, const char *text)
{
    struct disk *d = arg;
    char line[STORE_ERROR];
    if (err) {
        snprintf(line, sizeof line, "%.200s: %.250s", d->s->url, *text ? text : strerror(-err));
        log_info("%s", line);
        d->state = DISK_CLOSING; /* those who ask meanwhile are answered by the next opening */
        struct want *all = d->wants;
        d->wants = NULL;
        while (all) {
            struct want *w = all;
            all = w->next;
            want_answer(w, err, line);
        }
        nbd_client_close(d->client, on_client_closed, d);
        return;
    }
    d->state = DISK_UP;
    d->traits = *nbd_client_traits(d->client);
    d->lineage = lineage_of(d);
    d->writer = d->s->self;
    d->epoch = d->head_epoch = 1;
    d->size = d->head_size = d->traits.size;
    d->vacant = false;
    log_info("%s: export \"%s\", %llu bytes%s", d->s->url, d->uri.name, (unsigned long long)d->size,
             d->traits.read_only ? ", read-only" : "");
    disk_read_open(d);
    wants_answer(d, 0, "");
}

static void on_changed(void *arg, bool up, const char *text)
{
    struct disk *d = arg;
    if (nbd_client_broken(d->client))
        log_error("%s: given up: %s", d->s->url, text);
    else
        log_at(up ? LOG_INFO : LOG_WARN, "%s: %s%s%s", d->s->url, up ? "connected again" : "connection lost",
               *text ? ": " : "", text);
    if (d->state == DISK_UP && nbd_client_broken(d->client) && !d->busy)
        disk_close(d);
}

static void disk_open(struct disk *d)
{
    struct nbd_client_watch watch = {.opened = on_opened, .changed = on_changed, .arg = d};
    d->state = DISK_OPENING;
    int err = nbd_client_open(&d->client, d->s->loop, &d->uri, &watch);
    if (err) {
        d->state = DISK_CLOSED;
        wants_answer(d, err, strerror(-err));
    }
}

/* Takes the want over. It is answered from the loop. */
static void open_later(void *arg)
{
    struct disk *d = arg;
    if (d->state == DISK_CLOSED && d->wants)
        disk_open(d);
    else if (d->state == DISK_UP && d->wants)
        wants_answer(d, nbd_client_broken(d->client), "the server was given up; it is tried again once nobody uses it");
}

static int want_new(struct disk *d, struct want *w)
{
    int err = disk_later(d->s, open_later, d);
    if (err) {
        want_free(w);
        return err;
    }
    w->d = d;
    struct want **end = &d->wants;
    while (*end)
        end = &(*end)->next;
    *end = w;
    return -EINPROGRESS;
}

static int disk_attach(struct store *s, const struct store_attach *a, struct frame_attached *to,
                       store_attach_done *done, void *arg)
{
    int err = 0;
    *to = (struct frame_attached){0};
    const char *fault = name_fault(a->name);
    if (fault) {
        attach_bad(to, "the name %s", fault);
        return 0;
    }
    struct disk *d = disk_named(s, a->name, true, &err);
    struct want *w = d ? calloc(1, sizeof *w) : NULL;
    if (!w) {
        attach_bad(to, "%s", "too many regions, or no memory");
        return 0;
    }
    *w = (struct want){.ask = *a, .identity = *a->identity, .attached = done, .arg = arg};
    w->name = strdup(a->name);
    w->host = strdup(a->host);
    if (!w->name || !w->host) {
        want_free(w);
        attach_bad(to, "%s", "no memory for a name");
        return 0;
    }
    w->ask.name = w->name;
    w->ask.host = w->host;
    w->ask.identity = &w->identity;
    if (want_new(d, w) == -EINPROGRESS)
        return -EINPROGRESS;
    attach_bad(to, "%s", "no memory");
    return 0;
}

static int disk_ask_pin(struct store *s, const char *name, struct store_pin **pin, struct frame_entry *e,
                        store_pin_done *done, void *arg)
{
    int err = 0;
    (void)pin;
    (void)e;
    struct disk *d = disk_named(s, name, true, &err);
    if (!d)
        return err;
    struct want *w = calloc(1, sizeof *w);
    if (!w)
        return -ENOMEM;
    *w = (struct want){.pinned = done, .arg = arg, .name = strdup(name)};
    return want_new(d, w);
}

/* ---- leases, list, removal ---- */

static void disk_lease_drop(struct store *s, const char *name, const struct id *identity)
{
    int err;
    struct disk *d = disk_named(s, name, false, &err);
    if (d && d->leased && id_same(&d->holder, identity) && (!d->name || !strcmp(d->name, name)))
        d->leased = false;
}

static void disk_lease_seen(struct store *s, const struct id *identity)
{
    for (struct disk *d = s->disks; d; d = d->next)
        if (d->leased && id_same(&d->holder, identity))
            d->seen = now_ms(s);
}

struct listing {
    struct store *s;
    store_each *each;
    void (*done)(void *arg, int err, const char *text);
    void *arg;
};

static void list_tell(void *arg, int err, struct store_pin *pin, const struct frame_entry *e, const char *text)
{
    struct listing *l = arg;
    if (!err) {
        l->each(l->arg, e);
        store_unpin(pin);
    }
    l->done(l->arg, err == -ENOENT ? 0 : err, text);
    free(l);
}

/* Of a URI without an export, those that were asked for by name: a server need not tell what it has. */
static int disk_ask_list(struct store *s, store_each *each, void (*done)(void *arg, int err, const char *text),
                         void *arg)
{
    struct frame_entry e;
    if (!*s->uri.name) {
        for (struct disk *d = s->disks; d; d = d->next)
            if (d->state == DISK_UP && !d->vacant) {
                disk_entry(d, &e);
                each(arg, &e);
            }
        return 0;
    }
    struct listing *l = malloc(sizeof *l);
    int err = 0;
    struct disk *d = disk_named(s, s->uri.name, true, &err);
    if (!l || !d) {
        free(l);
        return -ENOMEM;
    }
    *l = (struct listing){.s = s, .each = each, .done = done, .arg = arg};
    const char *name = d->name ? d->name : name_fault(s->uri.name) ? "export" : s->uri.name;
    err = disk_ask_pin(s, name, NULL, NULL, list_tell, l);
    if (err != -EINPROGRESS)
        free(l);
    return err;
}

struct removal {
    void (*done)(void *arg, int err, const char *text);
    void *arg;
};

static void removal_tell(void *arg)
{
    struct removal *r = arg;
    r->done(r->arg, -EOPNOTSUPP, "an export of a foreign server cannot be removed from here");
    free(r);
}

static void disk_remove(struct store *s, const char *name, const struct id *identity, bool force,
                        void (*done)(void *arg, int err, const char *text), void *arg)
{
    struct removal *r = malloc(sizeof *r);
    (void)name;
    (void)identity;
    (void)force;
    if (!r)
        abort(); /* as store/pin.c does: nobody to tell */
    *r = (struct removal){done, arg};
    if (disk_later(s, removal_tell, r))
        abort();
}

/* ---- the store ---- */

static void on_wake_closed(uv_handle_t *h)
{
    struct store *s = h->data;
    void (*done)(void *) = s->closed;
    void *arg = s->closed_arg;
    while (s->disks) {
        struct disk *d = s->disks;
        s->disks = d->next;
        hashes_free(&d->hashes);
        free(d->name);
        free(d);
    }
    free(s->url);
    free(s);
    done(arg);
}

void store_look(struct store *s)
{
    if (!s->closing || s->later || uv_is_closing((uv_handle_t *)&s->wake))
        return;
    bool all = true;
    for (struct disk *d = s->disks; d; d = d->next) {
        if (d->state == DISK_UP && !d->busy)
            disk_close(d);
        all &= d->state == DISK_CLOSED;
    }
    if (all)
        uv_close((uv_handle_t *)&s->wake, on_wake_closed);
}

static void nothing(void *arg)
{
    (void)arg;
}

static void disk_store_close(struct store *s, void (*done)(void *arg), void *arg)
{
    s->closing = true;
    s->closed = done;
    s->closed_arg = arg;
    if (disk_later(s, nothing, NULL))
        abort();
}

static const char *no_dir(const struct store *s)
{
    (void)s;
    return NULL;
}

static const struct store_ops disk_store_ops = {
    .close = disk_store_close,
    .dir = no_dir,
    .attach = disk_attach,
    .lease_drop = disk_lease_drop,
    .lease_seen = disk_lease_seen,
    .txn_new = disk_txn_new,
    .txn_chain = disk_txn_chain,
    .txn_writer = disk_txn_writer,
    .txn_add = disk_txn_add,
    .txn_received = disk_txn_received,
    .txn_commit = disk_txn_commit,
    .txn_abort = disk_txn_abort,
    .ask_list = disk_ask_list,
    .ask_pin = disk_ask_pin,
    .pin_live = disk_pin_live,
    .pin_read = disk_pin_read,
    .pin_read_now = disk_pin_read_now,
    .pin_hash = disk_pin_hash,
    .pin_extents = disk_pin_extents,
    .pin_changed = disk_pin_changed,
    .unpin = disk_unpin,
    .remove = disk_remove,
};

bool nbd_store_is(const char *url)
{
    return nbd_uri_is(url);
}

int nbd_store_check(const char *url, char error[STORE_ERROR])
{
    static struct nbd_uri uri;
    const char *why = "";
    int err = nbd_uri_parse(&uri, url, &why);
    if (err)
        snprintf(error, STORE_ERROR, "%.300s: %s", url, why);
    return err;
}

int nbd_store_open(struct store **out, uv_loop_t *loop, const char *url, const struct id *self,
                   char error[STORE_ERROR])
{
    int err = nbd_store_check(url, error);
    struct store *s = err ? NULL : calloc(1, sizeof *s);
    const char *why;
    if (!err && (!s || !(s->url = strdup(url)))) {
        snprintf(error, STORE_ERROR, "no memory");
        err = -ENOMEM;
    }
    if (!err)
        err = uv_async_init(loop, &s->wake, woken);
    if (err) {
        if (s)
            free(s->url);
        free(s);
        return err;
    }
    nbd_uri_parse(&s->uri, url, &why);
    s->ops = &disk_store_ops;
    s->loop = loop;
    s->self = *self;
    s->later_end = &s->later;
    s->wake.data = s;
    uv_unref((uv_handle_t *)&s->wake);
    *out = s;
    return 0;
}
