/* Names, regions, leases. Loop thread, but region_open. Names are kept sorted: a store has thousands, not millions, and
 * lists and clashes come for free. */
#include "agent/store/inside.h"

#include "agent/base/job.h"

#include <errno.h>
#include <linux/magic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/vfs.h>
#include <time.h>
#include <unistd.h>

void *store_grow(void *array, size_t len, size_t *cap, size_t size)
{
    if (len < *cap)
        return array;
    size_t more = *cap ? *cap * 2 : 8;
    void *p = realloc(array, more * size);
    if (p)
        *cap = more;
    return p;
}

uint64_t store_now(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return (uint64_t)ts.tv_sec * 1000 + (uint64_t)ts.tv_nsec / 1000000;
}

/* Index of the first name not below text. */
static size_t lower_bound(const struct store *s, const char *text)
{
    size_t from = 0, to = s->names_len;
    while (from < to) {
        size_t mid = from + (to - from) / 2;
        if (strcmp(s->names[mid]->text, text) < 0)
            from = mid + 1;
        else
            to = mid;
    }
    return from;
}

struct name *name_find(const struct store *s, const char *text)
{
    size_t i = lower_bound(s, text);
    return i < s->names_len && !strcmp(s->names[i]->text, text) ? s->names[i] : NULL;
}

struct name *name_get(struct store *s, const char *text)
{
    size_t i = lower_bound(s, text);
    if (i < s->names_len && !strcmp(s->names[i]->text, text))
        return s->names[i];
    struct name **names = store_grow(s->names, s->names_len, &s->names_cap, sizeof *names);
    if (!names)
        return NULL;
    s->names = names;
    size_t len = strlen(text);
    struct name *n = calloc(1, sizeof *n + len + 1);
    if (!n)
        return NULL;
    memcpy(n->text, text, len + 1);
    memmove(names + i + 1, names + i, (s->names_len - i) * sizeof *names);
    names[i] = n;
    s->names_len++;
    return n;
}

void name_release(struct store *s, struct name *n)
{
    (void)s;
    n->users--;
}

static bool lease_alive(const struct store *s, const struct name *n)
{
    return n->lease.holder && store_now() - n->lease.holder->seen < s->limits.lease_ms;
}

/* Forgets names that nothing speaks of. Called when they have doubled since the last time. */
void names_prune(struct store *s)
{
    if (s->names_len < 2 * s->names_pruned + 1024)
        return;
    size_t kept = 0;
    for (size_t i = 0; i < s->names_len; i++) {
        struct name *n = s->names[i];
        if (n->head || n->durable || n->users || n->pending || lease_alive(s, n))
            s->names[kept++] = n;
        else
            free(n);
    }
    s->names_len = s->names_pruned = kept;
}

static bool on_side(const struct name *n, enum side side)
{
    return side == SIDE_HEAD ? n->head != NULL : n->durable || (side == SIDE_DISK && n->pending);
}

const char *name_clash(const struct store *s, const char *text, enum side side)
{
    char part[NAME_CAP + 1];
    size_t len = strlen(text);
    for (size_t i = 1; i < len; i++) {
        if (text[i] != '/')
            continue;
        memcpy(part, text, i);
        part[i] = 0;
        const struct name *n = name_find(s, part);
        if (n && on_side(n, side))
            return n->text;
    }
    memcpy(part, text, len);
    part[len] = '/';
    part[len + 1] = 0;
    for (size_t i = lower_bound(s, part); i < s->names_len && !strncmp(s->names[i]->text, part, len + 1); i++)
        if (on_side(s->names[i], side))
            return s->names[i]->text;
    return NULL;
}

struct region *region_new(struct store *s, uint64_t file, const struct id *lineage, const struct source *source)
{
    struct region *r = calloc(1, sizeof *r);
    if (!r)
        return NULL;
    *r = (struct region){.refs = 1, .file = file, .lineage = *lineage, .source = *source, .fd = -1};
    pthread_rwlock_init(&r->lock, NULL);
    struct region **bucket = &s->by_file[file % (sizeof s->by_file / sizeof *s->by_file)];
    r->chain = *bucket;
    *bucket = r;
    return r;
}

struct region *region_by_file(const struct store *s, uint64_t file)
{
    struct region *r = s->by_file[file % (sizeof s->by_file / sizeof *s->by_file)];
    while (r && r->file != file)
        r = r->chain;
    return r;
}

struct region *region_hold(struct region *r)
{
    r->refs++;
    return r;
}

void region_drop(struct store *s, struct region *r)
{
    if (!r || --r->refs)
        return;
    struct region **at = &s->by_file[r->file % (sizeof s->by_file / sizeof *s->by_file)];
    while (*at != r)
        at = &(*at)->chain;
    *at = r->chain;
    if (r->fd >= 0)
        fd_close_later(s, r->fd);
    tree_forget(r);
    pthread_rwlock_destroy(&r->lock);
    free(r);
}

int region_open(struct store *s, struct region *r, bool create)
{
    if (r->fd >= 0)
        return r->fd;
    if (r->gone)
        return -ENOENT;
    int fd = s->volume->ops->file_open(s->volume, r->file, create);
    struct statfs fs;
    if (fd >= 0) {
        r->fd = fd;
        r->in_memory = !fstatfs(fd, &fs) && fs.f_type == TMPFS_MAGIC;
    }
    return fd;
}

void region_dirty(struct store *s, struct region *r)
{
    if (r->dirty)
        return;
    struct region **dirty = store_grow(s->dirty, s->dirty_len, &s->dirty_cap, sizeof *dirty);
    if (!dirty) {
        store_fail(s, "no memory to remember what has to be synced", -ENOMEM);
        return;
    }
    s->dirty = dirty;
    dirty[s->dirty_len++] = region_hold(r);
    r->dirty = true;
}

struct closing {
    struct store *s;
    int fd;
};

static void close_work(void *arg)
{
    struct closing *c = arg;
    close(c->fd);
}

static void close_done(void *arg)
{
    struct closing *c = arg;
    struct store *s = c->s;
    free(c);
    s->jobs--;
    store_pump(s);
}

/* The last close of a removed file frees its blocks, which takes its time. */
void fd_close_later(struct store *s, int fd)
{
    struct closing *c = malloc(sizeof *c);
    if (c)
        *c = (struct closing){.s = s, .fd = fd};
    if (!c || !s->open || s->finishing || job_run(s->loop, close_work, close_done, c) < 0) {
        close(fd);
        free(c);
        return;
    }
    s->jobs++;
}

bool lease_held(const struct store *s, const struct name *n)
{
    return lease_alive(s, n);
}

/* A lease whose time is over still stands until somebody else asks for it. */
bool lease_stands(const struct store *s, const struct name *n, const struct id *identity)
{
    (void)s;
    return n->lease.holder && id_same(&n->lease.holder->identity, identity);
}

static struct holder *holder_find(const struct store *s, const struct id *identity)
{
    struct holder *h = s->holders;
    while (h && !id_same(&h->identity, identity))
        h = h->next;
    return h;
}

int store_lease(struct store *s, const char *name, const struct id *identity, const char *host, uint64_t *fence,
                char holder[256])
{
    if (name_fault(name))
        return -EINVAL;
    names_prune(s);
    struct name *n = name_get(s, name);
    if (!n)
        return -ENOMEM;
    bool same = lease_stands(s, n, identity);
    if (!same && lease_alive(s, n)) {
        snprintf(holder, 256, "%s", n->lease.holder->host);
        return -EBUSY;
    }
    struct holder *h = holder_find(s, identity);
    if (!h) {
        h = calloc(1, sizeof *h);
        if (!h)
            return -ENOMEM;
        h->identity = *identity;
        h->next = s->holders;
        s->holders = h;
    }
    snprintf(h->host, sizeof h->host, "%s", host);
    h->seen = store_now();
    if (!same)
        n->lease = (struct lease){.holder = h, .fence = (s->generation << 32) + ++s->fences};
    *fence = n->lease.fence;
    return 0;
}

void volume_lease_drop(struct store *s, const char *name, const struct id *identity)
{
    struct name *n = name_find(s, name);
    if (n && lease_stands(s, n, identity))
        n->lease = (struct lease){0};
}

void volume_lease_seen(struct store *s, const struct id *identity)
{
    struct holder *h = holder_find(s, identity);
    if (h)
        h->seen = store_now();
}
