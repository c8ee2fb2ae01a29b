/* Deltas, checked before their epoch is committed, on the committing job's thread.
 *
 * A delta changes a page that the epoch before left. That page is in its file once all before is applied; the epochs of
 * the same batch are not, so their pages are laid over the file's in memory, in order. What cannot be laid over (a
 * spilled, creating or cutting epoch, or much data) is waited for instead: commit.c keeps the batch apart
 * (bases_simple). */
#include "agent/store/inside.h"
#include "agent/base/xxh3.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define BUCKETS 512u
#define SIMPLE_BYTES (256u << 10)

struct base {
    struct base *next;
    struct region *region;
    uint64_t page;
    uint8_t data[FRAME_PAGE];
};

struct bases {
    struct base *bucket[BUCKETS];
};

struct verifying {
    struct store *s;
    struct bases *bases;
    bool more; /* later transactions of the batch have deltas: what this one writes is their base */
};

struct bases *bases_new(void)
{
    return calloc(1, sizeof(struct bases));
}

void bases_free(struct bases *b)
{
    for (size_t i = 0; b && i < BUCKETS; i++)
        for (struct base *at = b->bucket[i], *next; at; at = next) {
            next = at->next;
            free(at);
        }
    free(b);
}

bool bases_simple(const struct store_txn *t)
{
    for (size_t i = 0; i < t->parts_len; i++)
        if (t->parts[i]->created || t->parts[i]->min_size != UINT64_MAX)
            return false;
    return !t->spill_len && t->data + t->zeros <= SIMPLE_BYTES;
}

int region_page(struct store *s, struct region *r, uint64_t page, uint8_t *to)
{
    size_t have = 0;
    pthread_rwlock_rdlock(&r->lock);
    int fd = r->fd;
    pthread_rwlock_unlock(&r->lock);
    if (fd < 0) {
        pthread_rwlock_wrlock(&r->lock);
        fd = region_open(s, r, false);
        pthread_rwlock_unlock(&r->lock);
    }
    if (fd < 0)
        return fd;
    while (have < FRAME_PAGE) {
        ssize_t n = pread(fd, to + have, FRAME_PAGE - have, (off_t)(page * FRAME_PAGE + have));
        if (n < 0 && errno == EINTR)
            continue;
        if (n < 0)
            return -errno;
        if (!n)
            break;
        have += (size_t)n;
    }
    memset(to + have, 0, FRAME_PAGE - have);
    return 0;
}

/* The page as all before leave it. NULL with *err. */
static uint8_t *base_of(struct verifying *v, struct region *r, uint64_t page, int *err)
{
    struct base **bucket = &v->bases->bucket[(page ^ ((uintptr_t)r >> 6)) % BUCKETS];
    for (struct base *b = *bucket; b; b = b->next)
        if (b->region == r && b->page == page)
            return b->data;
    struct base *b = malloc(sizeof *b);
    *err = b ? region_page(v->s, r, page, b->data) : -ENOMEM;
    if (*err) {
        free(b);
        return NULL;
    }
    b->region = r;
    b->page = page;
    b->next = *bucket;
    *bucket = b;
    return b->data;
}

static int delta_verify(struct verifying *v, struct part *p, const struct frame_extent *e)
{
    struct frame_delta d = frame_delta_of(e);
    struct frame_extent run;
    XXH128_canonical_t sum;
    int err = 0;
    if (p->created || e->offset + e->len > p->size || e->offset + e->len > p->min_size) /* cut: no base is left */
        return -EBADMSG;
    uint8_t *page = base_of(v, p->r, e->offset / FRAME_PAGE, &err);
    if (!page)
        return err;
    for (uint32_t at = 0; frame_delta_run(e, &at, &run);)
        memcpy(page + (run.offset - e->offset), run.data, run.len);
    XXH128_canonicalFromHash(&sum, XXH3_128bits(page, FRAME_PAGE));
    if (!memcmp(&sum, d.hash, sizeof sum))
        return 0;
    pthread_rwlock_wrlock(&p->r->lock); /* the file may not be what its hashes say: they are read anew */
    tree_forget(p->r);
    pthread_rwlock_unlock(&p->r->lock);
    return -EBADMSG;
}

static int extent_verify(void *arg, struct part *p, const struct frame_extent *e)
{
    struct verifying *v = arg;
    int err = 0;
    if (e->kind == FRAME_PAGES_DELTA)
        return delta_verify(v, p, e);
    for (uint64_t at = e->offset, end = e->offset + e->len, n; v->more && at < end; at += n) {
        uint64_t in = at % FRAME_PAGE;
        n = end - at < FRAME_PAGE - in ? end - at : FRAME_PAGE - in;
        uint8_t *page = base_of(v, p->r, at / FRAME_PAGE, &err);
        if (!page)
            return err;
        if (e->data)
            memcpy(page + in, e->data + (at - e->offset), (size_t)n);
        else
            memset(page + in, 0, (size_t)n);
    }
    return 0;
}

int apply_verify(struct store *s, struct bases *b, struct store_txn *t, bool more, char error[STORE_ERROR])
{
    struct verifying v = {s, b, more};
    if (!t->deltas && !more)
        return 0;
    int err = b ? txn_pages(t, PAGES_RAW, extent_verify, &v) : -ENOMEM;
    if (err == -EBADMSG)
        snprintf(error, STORE_ERROR, "a changed page does not come out as its writer has it: whole pages are needed");
    else if (err)
        snprintf(error, STORE_ERROR, "a changed page cannot be checked: %s", strerror(-err));
    return err;
}
