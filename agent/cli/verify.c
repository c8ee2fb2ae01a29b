/* memsync verify: both ends' hash trees (wire/frame.md, track/hashes.h), from the top down.
 *
 * Every byte is read at both ends, once: the first nodes are asked for `fresh`, at a level low enough that some hundred
 * of them cover the region (so that both ends read at the same time, and it shows how far they are), high enough that
 * these are all that travels when nothing differs. Where they differ their children are asked for, and so on to the
 * pages.
 *
 * A region that the local agent tracks is published before the remote's epoch is pinned. What a program stores between
 * that publication and our own reading makes pages differ that are right; so those that differ are looked at again,
 * each time against an epoch published after the look before, and only what differs every time is reported. The fewer
 * there are, the shorter the time in which a program can come in between. */
#include "agent/cli/cli.h"
#include "agent/base/xxh3.h"
#include "agent/cli/local.h"
#include "agent/cli/peer.h"
#include "agent/track/hashes.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define OUTSTANDING 16u
#define NODES_AT_FIRST 256u
#define PAGES_A_REQUEST ((64u << 20) / FRAME_PAGE) /* read for one answer, if that is more than a node */
#define LOOKS 10u                                  /* at most, at what differs in a tracked file */
#define SHOWN 16u                                  /* differing runs that are named */

struct pages {
    uint64_t *page;
    size_t count, cap;
};

/* Nodes to be asked for, and compared. fresh: their pages have not been read yet, neither here nor there. */
struct nodes {
    unsigned level;
    uint64_t first, count;
    bool fresh;
    uint32_t request; /* once asked; 0: free */
};

struct verify {
    struct peer *peer;
    struct local_agent local;
    bool live; /* tracked by the local agent */
    const char *name, *remote;
    char path[PATH_MAX];
    int fd;
    uint64_t size; /* of the file here, at this look */
    uint32_t pin;
    struct frame_entry entry;
    struct hashes here;
    struct nodes *todo; /* from the first one that was not asked for on */
    size_t next, count, cap;
    struct nodes asked[OUTSTANDING];
    unsigned outstanding;
    uint32_t requests;
    uint64_t pages, read; /* pages: compared, up to the shorter end */
    uint8_t *scratch;
    struct progress progress;
};

static int pages_add(struct pages *d, uint64_t page)
{
    if (d->count == d->cap) {
        size_t cap = d->cap ? 2 * d->cap : 1024;
        uint64_t *more = reallocarray(d->page, cap, sizeof *more);
        if (!more)
            return -ENOMEM;
        d->page = more;
        d->cap = cap;
    }
    d->page[d->count++] = page;
    return 0;
}

static int by_number(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static void pages_sort(struct pages *d)
{
    if (d->count)
        qsort(d->page, d->count, sizeof *d->page, by_number);
}

static uint64_t pages_of(uint64_t bytes)
{
    return bytes / FRAME_PAGE + (bytes % FRAME_PAGE != 0);
}

static int todo_add(struct verify *v, struct nodes n)
{
    struct nodes *last = v->count > v->next ? &v->todo[v->count - 1] : NULL;
    if (last && !n.fresh && !last->fresh && last->level == n.level && last->first + last->count == n.first &&
        last->count + n.count <= FRAME_HASHES_MAX) {
        last->count += n.count;
        return 0;
    }
    if (v->next == v->count)
        v->next = v->count = 0;
    if (v->count == v->cap) {
        size_t cap = v->cap ? 2 * v->cap : 256;
        struct nodes *more = reallocarray(v->todo, cap, sizeof *more);
        if (!more)
            return cli_fail(CLI_FAILED, "no memory");
        v->todo = more;
        v->cap = cap;
    }
    v->todo[v->count++] = n;
    return 0;
}

/* All of it. */
static int todo_all(struct verify *v)
{
    unsigned level = 0;
    uint64_t pages = pages_of(v->entry.size);
    while (hashes_nodes(pages, level) > NODES_AT_FIRST)
        level++;
    uint64_t nodes = hashes_nodes(pages, level), step = PAGES_A_REQUEST >> (level * HASH_FAN_BITS);
    int code = 0;
    if (!step)
        step = 1;
    for (uint64_t first = 0; !code && first < nodes; first += step)
        code = todo_add(v, (struct nodes){level, first, nodes - first < step ? nodes - first : step, true, 0});
    return code;
}

static int todo_some(struct verify *v, const struct pages *which)
{
    int code = 0;
    for (size_t i = 0, run; !code && i < which->count; i += run) {
        for (run = 1; i + run < which->count && run < FRAME_HASHES_MAX && which->page[i + run] == which->page[i] + run;)
            run++;
        if (which->page[i] < v->pages)
            code = todo_add(v, (struct nodes){0, which->page[i], run, true, 0});
    }
    return code;
}

static int ask(struct verify *v, struct nodes *slot)
{
    uint8_t payload[64];
    *slot = v->todo[v->next++];
    slot->request = ++v->requests ? v->requests : ++v->requests;
    uint64_t nodes = hashes_nodes(pages_of(v->entry.size), slot->level); /* of what differed it may have fewer by now */
    if (slot->first + slot->count > nodes)
        slot->count = nodes - slot->first;
    struct frame_hash h = {slot->request,        v->pin,     slot->first, (uint32_t)slot->count,
                           (uint8_t)slot->level, slot->fresh};
    v->outstanding++;
    if (peer_send(v->peer, FRAME_HASH, payload, frame_hash_put(payload, sizeof payload, &h)))
        return cli_fail(CLI_FAILED, "%s", v->peer->error);
    return 0;
}

static int read_here(struct verify *v, const struct nodes *n)
{
    unsigned shift = n->level * HASH_FAN_BITS;
    uint64_t end = pages_of(v->size), from = n->first << shift, to = (n->first + n->count) << shift;
    v->read += to - from;
    progress_at(&v->progress, v->read * FRAME_PAGE);
    if (to > end)
        to = end; /* what we do not have is zeros */
    int rc = from < to ? hashes_read(&v->here, v->fd, from, to, v->scratch) : 0;
    return rc ? cli_fail(CLI_FAILED, "%s cannot be read: %s", v->path, strerror(-rc)) : 0;
}

/* Where they differ: children, and pages. */
static int compare(struct verify *v, const struct nodes *n, const uint8_t *theirs, struct pages *different)
{
    uint64_t pages = pages_of(v->entry.size);
    int code = 0;
    for (uint64_t i = 0; !code && i < n->count; i++, theirs += HASH_BYTES) {
        uint64_t node = n->first + i, child = node * HASH_FAN;
        if (page_hash_same(hashes_node(&v->here, n->level, node), page_hash_from(theirs)))
            continue;
        if (n->level) {
            uint64_t left = hashes_nodes(pages, n->level - 1) - child;
            code = todo_add(v, (struct nodes){n->level - 1, child, left < HASH_FAN ? left : HASH_FAN, false, 0});
        } else if (node < v->pages && pages_add(different, node)) {
            code = cli_fail(CLI_FAILED, "no memory");
        }
    }
    return code;
}

/* An answer: requests are answered as they are done, so each is matched by its number. 0, or an exit code (said). */
static int take(struct verify *v, struct pages *different)
{
    struct peer_frame f;
    if (peer_next(v->peer, &f))
        return cli_fail(CLI_FAILED, "%s", v->peer->error);
    if (f.type == FRAME_FAILED) {
        peer_failed(v->peer, &f);
        return cli_fail(CLI_FAILED, "%s at %s: %s; try again", v->name, v->remote, v->peer->error);
    }
    struct nodes *slot = NULL;
    for (unsigned i = 0; i < OUTSTANDING && f.type == FRAME_HASHES && f.len >= 8; i++)
        if (v->asked[i].request && v->asked[i].request == get_u32(f.payload))
            slot = &v->asked[i];
    if (!slot || get_u32(f.payload + 4) != slot->count || f.len != 8 + slot->count * HASH_BYTES) {
        peer_unexpected(v->peer, &f);
        return cli_fail(CLI_FAILED, "%s", v->peer->error);
    }
    int code = slot->fresh ? read_here(v, slot) : 0;
    if (!code)
        code = compare(v, slot, f.payload + 8, different);
    slot->request = 0;
    v->outstanding--;
    return code;
}

static int walk(struct verify *v, struct pages *different)
{
    int code = 0;
    while (!code && (v->next < v->count || v->outstanding)) {
        for (unsigned i = 0; i < OUTSTANDING && v->next < v->count && !code; i++)
            if (!v->asked[i].request)
                code = ask(v, &v->asked[i]);
        if (!code)
            code = take(v, different);
    }
    return code;
}

/* One look: publish, pin, compare. */
static int look(struct verify *v, const struct pages *which, struct pages *different)
{
    if (v->live && local_publish(&v->local, v->name))
        return CLI_FAILED;
    int rc = peer_pin(v->peer, v->name, &v->pin, &v->entry);
    if (rc)
        return cli_fail(rc == -ENOENT ? CLI_NOT_SO : CLI_FAILED, "%s at %s: %s", v->name, v->remote, v->peer->error);
    struct stat st;
    if (fstat(v->fd, &st))
        return cli_fail(CLI_FAILED, "%s cannot be looked at: %m", v->path);
    v->size = (uint64_t)st.st_size;
    uint64_t common = v->entry.size < v->size ? v->entry.size : v->size;
    /* Pages are named as far as both have them; when the sizes differ that is said anyway. */
    v->pages = v->entry.size == v->size ? pages_of(common) : common / FRAME_PAGE;
    v->read = 0;
    if (!which) {
        hashes_free(&v->here);
        v->here.bare = true;
    }
    int code = which ? todo_some(v, which) : todo_all(v);
    if (!code)
        code = walk(v, different);
    if (!code && peer_unpin(v->peer, v->pin))
        code = cli_fail(CLI_FAILED, "%s", v->peer->error);
    return code;
}

static void print_runs(const struct pages *d)
{
    size_t runs = 0;
    for (size_t i = 0; i < d->count && runs < SHOWN; runs++) {
        size_t from = i++;
        while (i < d->count && d->page[i] == d->page[i - 1] + 1)
            i++;
        printf(i - from == 1 ? "%s%llu" : "%s%llu-%llu", from ? ", " : " ", (unsigned long long)d->page[from],
               (unsigned long long)d->page[i - 1]);
        if (runs == SHOWN - 1 && i < d->count)
            printf(", ... (%zu pages in all)", d->count);
    }
}

static int report(struct verify *v, struct pages *d, bool json)
{
    bool same = !d->count && v->size == v->entry.size;
    unsigned long long pages = (v->size + FRAME_PAGE - 1) / FRAME_PAGE, epoch = v->entry.epoch;
    if (json) {
        json_t *list = json_array();
        for (size_t i = 0; i < d->count; i++)
            json_array_append_new(list, json_integer((json_int_t)d->page[i]));
        json_t *o = json_pack("{s:s, s:s, s:b, s:I, s:I, s:I, s:o}", "name", v->name, "path", v->path, "same",
                              (int)same, "epoch", (json_int_t)epoch, "size", (json_int_t)v->size, "remote_size",
                              (json_int_t)v->entry.size, "different_pages", list);
        json_dumpf(o, stdout, JSON_INDENT(2));
        putchar('\n');
        json_decref(o);
    } else if (same) {
        printf("same: %llu pages, epoch %llu\n", pages, epoch);
    } else {
        printf("different:");
        if (v->size != v->entry.size)
            printf(" %llu bytes here, %llu there%s", (unsigned long long)v->size, (unsigned long long)v->entry.size,
                   d->count ? ";" : "");
        if (d->count)
            printf(" pages");
        print_runs(d);
        printf(" (epoch %llu, %s)\n", epoch, v->path);
    }
    return same ? CLI_DONE : CLI_NOT_SO;
}

static int verify(struct verify *v, bool json)
{
    struct pages last = {0};
    struct stat st;
    progress_start(&v->progress, v->name, fstat(v->fd, &st) ? 0 : (uint64_t)st.st_size);
    int code = look(v, NULL, &last);
    progress_end(&v->progress);
    pages_sort(&last);
    for (unsigned n = 1; n < LOOKS && v->live && !code && (last.count || v->size != v->entry.size); n++) {
        struct pages again = {0};
        /* of another size: what grew has not been looked at yet */
        code = look(v, v->size == v->entry.size ? &last : NULL, &again);
        free(last.page);
        last = again;
        pages_sort(&last);
    }
    if (!code)
        code = report(v, &last, json);
    free(last.page);
    return code;
}

/* Which file, which remote, and whether it is live: from the local agent, as far as not given. */
static int find(struct verify *v, const struct args *a, json_t **status)
{
    int rc = local_connect(&v->local);
    if (rc && rc != -ENOENT)
        return CLI_FAILED;
    if (!rc && !(*status = local_status(&v->local)))
        return CLI_FAILED;
    json_t *region = *status ? local_region(*status, v->name, a->remote) : NULL;
    const char *path = json_string_value(json_object_get(region, "path"));
    v->remote = a->remote ? a->remote : json_string_value(json_object_get(region, "remote"));
    if (!a->file && (!path || !*path))
        return cli_fail(CLI_FAILED, "no local agent tracks %s%s%s; name the file with --file PATH", v->name,
                        a->remote ? " at " : "", a->remote ? a->remote : "");
    if (!realpath(a->file ? a->file : path, v->path))
        return cli_fail(CLI_FAILED, "%s cannot be read: %m", a->file ? a->file : path);
    v->live = path && !strcmp(path, v->path);
    v->fd = open(v->path, O_RDONLY | O_CLOEXEC);
    return v->fd < 0 ? cli_fail(CLI_FAILED, "%s cannot be read: %m", v->path) : 0;
}

int command_verify(const struct args *a)
{
    static struct verify v;
    v = (struct verify){.name = a->words[0], .fd = -1, .local = {.fd = -1}};
    const char *fault = name_fault(v.name);
    if (fault)
        return cli_fail(CLI_USAGE, "%s is no name of a region: %s", v.name, fault);
    json_t *status = NULL;
    int code = find(&v, a, &status);
    v.scratch = code ? NULL : malloc(HASH_SCRATCH);
    if (!code && !v.scratch)
        code = cli_fail(CLI_FAILED, "no memory");
    if (!code && !(v.peer = peer_open(v.remote, false)))
        code = CLI_FAILED;
    if (!code)
        code = verify(&v, a->json);
    peer_close(v.peer);
    free(v.scratch);
    free(v.todo);
    hashes_free(&v.here);
    if (v.fd >= 0)
        close(v.fd);
    json_decref(status);
    local_close(&v.local);
    return code;
}
