/* memsync verify: the hashes of all pages here and there.
 *
 * A region that the local agent tracks is published before the remote's epoch is pinned. What a program stores between
 * that publication and our own reading makes pages differ that are right; so those that differ are looked at again,
 * each time against an epoch published after the look before, and only what differs every time is reported. The fewer
 * there are, the shorter the time in which a program can come in between. */
#include "agent/cli/cli.h"
#include "agent/base/xxh3.h"
#include "agent/cli/local.h"
#include "agent/cli/peer.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define OUTSTANDING 16u
#define LOCAL_BYTES ((size_t)FRAME_HASHES_MAX * FRAME_PAGE)
#define LOOKS 10u /* at most, at what differs in a tracked file */
#define SHOWN 16u /* differing runs that are named */

struct pages {
    uint64_t *page;
    size_t count, cap;
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
    uint8_t *buffer;
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

static int ask(struct verify *v, uint64_t first, uint32_t count)
{
    uint8_t payload[64];
    struct frame_hash h = {.request = (uint32_t)(first & UINT32_MAX), .pin = v->pin, .first = first, .count = count};
    return peer_send(v->peer, FRAME_HASH, payload, frame_hash_put(payload, sizeof payload, &h));
}

static int read_here(struct verify *v, uint64_t offset, size_t len)
{
    for (size_t have = 0; have < len;) {
        ssize_t n = pread(v->fd, v->buffer + have, len - have, (off_t)(offset + have));
        if (n <= 0)
            return cli_fail(CLI_FAILED, "%s cannot be read: %s", v->path,
                            n ? strerror(errno) : "it became shorter; try again");
        have += (size_t)n;
    }
    return 0;
}

/* HASHES of pages from `first`: compared with ours, the differing ones added. 0, or an exit code (said). */
static int take(struct verify *v, const struct peer_frame *f, uint64_t first, uint32_t count, struct pages *different)
{
    if (f->type == FRAME_FAILED) {
        peer_failed(v->peer, f);
        return cli_fail(CLI_FAILED, "%s at %s: %s; try again", v->name, v->remote, v->peer->error);
    }
    uint64_t common = v->entry.size < v->size ? v->entry.size : v->size, offset = first * FRAME_PAGE;
    size_t len =
        common - offset < (uint64_t)count * FRAME_PAGE ? (size_t)(common - offset) : (size_t)count * FRAME_PAGE;
    if (f->type != FRAME_HASHES || f->len != 8 + (size_t)count * 16 ||
        get_u32(f->payload) != (uint32_t)(first & UINT32_MAX) || get_u32(f->payload + 4) != count) {
        peer_unexpected(v->peer, f);
        return cli_fail(CLI_FAILED, "%s", v->peer->error);
    }
    int code = read_here(v, offset, len);
    for (uint32_t i = 0; !code && i < count; i++) {
        size_t at = (size_t)i * FRAME_PAGE, n = len - at < FRAME_PAGE ? len - at : FRAME_PAGE;
        XXH128_canonical_t here;
        XXH128_canonicalFromHash(&here, XXH3_128bits(v->buffer + at, n));
        if (memcmp(&here, f->payload + 8 + (size_t)i * 16, sizeof here) && pages_add(different, first + i))
            code = cli_fail(CLI_FAILED, "no memory");
    }
    return code;
}

static int next_hashes(struct verify *v, struct peer_frame *f)
{
    return peer_next(v->peer, f) ? cli_fail(CLI_FAILED, "%s", v->peer->error) : 0;
}

/* All pages up to the shorter end, in order: the remote answers a connection's requests as they are done, so each is
 * matched by its number. */
static int compare_all(struct verify *v, uint64_t pages, struct pages *different)
{
    uint64_t asked = 0, done = 0;
    int code = 0;
    while (!code && done < pages) {
        struct peer_frame f;
        for (; asked < pages && asked - done < (uint64_t)OUTSTANDING * FRAME_HASHES_MAX;) {
            uint32_t n = pages - asked < FRAME_HASHES_MAX ? (uint32_t)(pages - asked) : FRAME_HASHES_MAX;
            if (ask(v, asked, n))
                return cli_fail(CLI_FAILED, "%s", v->peer->error);
            asked += n;
        }
        code = next_hashes(v, &f);
        if (code)
            break;
        uint64_t first = f.len >= 4 ? (done & ~(uint64_t)UINT32_MAX) | get_u32(f.payload) : UINT64_MAX;
        uint32_t n = first < pages && pages - first < FRAME_HASHES_MAX ? (uint32_t)(pages - first) : FRAME_HASHES_MAX;
        code = take(v, &f, first < pages ? first : 0, n, different);
        done += n;
        progress_at(&v->progress, done * FRAME_PAGE);
    }
    return code;
}

static int compare_some(struct verify *v, const struct pages *which, uint64_t pages, struct pages *different)
{
    int code = 0;
    for (size_t i = 0; !code && i < which->count; i++) {
        struct peer_frame f;
        if (which->page[i] >= pages)
            continue;
        if (ask(v, which->page[i], 1))
            return cli_fail(CLI_FAILED, "%s", v->peer->error);
        code = next_hashes(v, &f);
        if (!code)
            code = take(v, &f, which->page[i], 1, different);
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
    /* The last page is compared as far as both have it; when the sizes differ it is said anyway. */
    uint64_t pages = v->entry.size == v->size ? (common + FRAME_PAGE - 1) / FRAME_PAGE : common / FRAME_PAGE;
    int code = which ? compare_some(v, which, pages, different) : compare_all(v, pages, different);
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

static int by_number(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static int report(struct verify *v, struct pages *d, bool json)
{
    bool same = !d->count && v->size == v->entry.size;
    unsigned long long pages = (v->size + FRAME_PAGE - 1) / FRAME_PAGE, epoch = v->entry.epoch;
    if (d->count)
        qsort(d->page, d->count, sizeof *d->page, by_number);
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
    for (unsigned n = 1; n < LOOKS && v->live && !code && (last.count || v->size != v->entry.size); n++) {
        struct pages again = {0};
        /* of another size: what grew has not been looked at yet */
        code = look(v, v->size == v->entry.size ? &last : NULL, &again);
        free(last.page);
        last = again;
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
    v.buffer = code ? NULL : malloc(LOCAL_BYTES);
    if (!code && !v.buffer)
        code = cli_fail(CLI_FAILED, "no memory");
    if (!code && !(v.peer = peer_open(v.remote, false)))
        code = CLI_FAILED;
    if (!code)
        code = verify(&v, a->json);
    peer_close(v.peer);
    free(v.buffer);
    if (v.fd >= 0)
        close(v.fd);
    json_decref(status);
    local_close(&v.local);
    return code;
}
