/* Mirrors: mounts that programs write (agent/sync/mirror.c tells the other half, from ATTACH on).
 *
 * The memfd is a push region's file. Its body has the mount, and the mount the body, until the region is let go: when
 * nobody has had it open for writing for MOUNT_LINGER_MS and the remote has all of it, or when the mount ends. The pin
 * is changed for a live one before the first program may store, and for one of the epoch when it is let go.
 *
 *     pull --REGION--> adopted --attached, PIN live--> written --all published, nobody writes--> pull
 *                          \--refused--> pull
 *
 * What a hole is. Below `base`, a page that was never fetched (or was evicted): what the remote has. From `base` on:
 * zeros, which the remote may not know yet, since the region was cut there, or is longer here. `base` comes down with
 * each TRUNCATE, at once, and goes up to the size when everything is published: then the remote has these zeros, too.
 * It stands in the struct view, so that an agent that takes over knows as much. A READ that is under way when it comes
 * down is good only up to it (read.limit), however high it has gone when the answer is here.
 *
 * If the agent dies: the programs have memfd, struct view and their page tables. The next one compares all that is data
 * with the remote. If the programs die as well, what was stored since the last sync point is lost, as it would be in a
 * power cut. If only the program dies, the memfd is compared and published by us (program_gone). */
#include "agent/page/mount.h"

#include "agent/base/log.h"

#include <errno.h>
#include <time.h>
#include <sys/stat.h>
#include <unistd.h>

uint64_t mount_pages(const struct mount *m)
{
    uint64_t bytes = m->base < m->size ? m->base : m->size;
    return bytes / PAGE_SIZE + (bytes % PAGE_SIZE != 0);
}

struct pages mount_theirs(const struct mount *m)
{
    struct pages p = m->pages;
    p.count = mount_pages(m);
    return p;
}

const struct id *mount_lineage(const struct mount *m)
{
    return m->body && !id_none(&m->body->lineage) ? &m->body->lineage : &m->lineage;
}

struct mount *mount_made(struct pager *g, const char *name)
{
    for (struct mount *m = g->mounts; m; m = m->next)
        if (m->state != MOUNT_FAILED && !m->epoch && !strcmp(m->name, name) && (!m->body || m->body->region))
            return m;
    return NULL;
}

bool mount_kept(const struct mount *m)
{
    return m->body && (m->body->uses || body_held(m->body));
}

/* ---- its size ---- */

static void base_set(struct mount *m, uint64_t base)
{
    m->base = base;
    __atomic_store_n(&m->shared->base, base, __ATOMIC_SEQ_CST);
    if (m->body)
        __atomic_store_n(&m->body->base, base, __ATOMIC_SEQ_CST);
}

int mount_resize(struct mount *m, uint64_t size)
{
    uint64_t old = m->pages.count, count = size / PAGE_SIZE + (size % PAGE_SIZE != 0);
    int rc = pages_resize(&m->pages, count);
    if (!rc)
        rc = mount_window(m);
    if (!rc && ftruncate(m->memfd, (off_t)size))
        rc = -errno;
    if (rc) {
        pages_resize(&m->pages, old); /* fewer than there is room for */
        return rc;
    }
    m->evict.anew = true;
    m->size = size;
    __atomic_store_n(&m->shared->size, size, __ATOMIC_SEQ_CST);
    if (count < old)
        mount_wake(m, count, old);
    return 0;
}

/* The page that the base cuts, if it is not here: it has to come, and go to the remote without what it had behind the
 * cut, even if the program is killed and nobody knows of the cut any more. */
static void want_cut(struct mount *m)
{
    uint64_t page = m->base / PAGE_SIZE;
    if (m->base % PAGE_SIZE && page < m->pages.count && !pages_bit(m->pages.have, page) &&
        !pages_bit(m->pages.asked, page) && !fetch_demanded(m, page))
        fetch_want(m, page, page + 1, uv_now(m->pager->link->local->loop));
}

int mount_truncate(struct mount *m, uint64_t size, bool grow)
{
    if (!m->body || m->eager)
        return -EINVAL;
    if (m->state == MOUNT_FAILED)
        return -EIO;
    if (size > MOUNT_SIZE_MAX)
        return -EFBIG;
    if (size == m->size || (grow && size < m->size))
        return 0;
    view_punch_begin(m->shared);
    if (size < m->base) {
        uint64_t old = mount_pages(m);
        base_set(m, size);
        pages_unask(&m->pages, mount_pages(m), old);
    }
    if (size < m->size && size < m->body->min_size)
        m->body->min_size = size;
    int rc = mount_resize(m, size);
    view_punch_end(m->shared);
    fetch_cut(m);
    want_cut(m);
    return rc;
}

/* ---- the region's side ---- */

struct mount *page_mount_of(struct link *k, int fd)
{
    struct stat st;
    if (!k->pager || fstat(fd, &st))
        return NULL;
    for (struct mount *m = k->pager->mounts; m; m = m->next)
        if (m->dev == st.st_dev && m->ino == st.st_ino)
            return m;
    return NULL;
}

int page_adopt(struct mount *m, struct body *b)
{
    if (m->eager)
        return -EOPNOTSUPP;
    if (m->state == MOUNT_FAILED)
        return -EIO;
    mount_unwritten(m);
    body_hold(b);
    m->body = b;
    m->live_refused = false;
    b->mount = m;
    b->mirror = true;
    b->base = m->base;
    want_cut(m);
    return 0;
}

bool page_made(const struct mount *m, struct id *lineage, uint64_t *epoch)
{
    *lineage = m->lineage;
    *epoch = m->epoch;
    return !m->epoch;
}

void page_joined(struct body *b)
{
    struct mount *m = b->mount;
    __atomic_store_n(&m->shared->base, m->base, __ATOMIC_SEQ_CST);
    __atomic_store_n(&m->shared->mirror, 1u, __ATOMIC_SEQ_CST);
    m->lineage = b->lineage;
    evict_joined(m, !b->unknown);
    fetch_pin(m);
    fetch_swap(m, true);
}

int page_writable(const struct body *b)
{
    const struct mount *m = b->mount;
    if (!m || m->state == MOUNT_FAILED)
        return -EIO;
    return m->live_refused ? -EOPNOTSUPP : m->live || !m->epoch ? 0 : 1;
}

void page_durable(struct body *b)
{
    struct mount *m = b->mount;
    if (!b->durable || b->durable <= m->epoch)
        return;
    m->epoch = b->durable;
    m->lineage = b->lineage;
    m->mtime = (int64_t)time(NULL);
    __atomic_store_n(&m->shared->epoch, m->epoch, __ATOMIC_SEQ_CST);
    fetch_pin(m); /* one that was made here */
    mount_settle(m, uv_now(m->pager->link->local->loop));
}

void page_published(struct body *b, bool want)
{
    evict_again(b->mount, want);
}

void page_captured(struct body *b, const struct extents *looked)
{
    evict_captured(b->mount, looked);
}

void page_lost(struct body *b, const char *why)
{
    if (b->mount)
        mount_fail(b->mount, -ESTALE, "%s", why);
}

void mount_unwritten(struct mount *m)
{
    struct body *b = m->body;
    if (!b)
        return;
    m->body = NULL;
    b->mount = NULL;
    if (b->region && b->region->body == b)
        region_let_go(b->region);
    body_drop(b);
}

/* The remote has all of it: zeros, sizes and pages. */
static bool settled(const struct mount *m)
{
    const struct body *b = m->body;
    return b->region && b->joined && b->size == m->size && !body_held(b);
}

void mount_settle(struct mount *m, uint64_t now)
{
    if (!m->body || m->state == MOUNT_FAILED)
        return;
    if (!m->live && m->epoch && m->body->joined && !m->live_refused)
        fetch_swap(m, true);
    if (m->live && m->base != m->size && settled(m))
        base_set(m, m->size);
    if (m->body->uses || body_held(m->body) || !m->unwritten_since)
        m->unwritten_since = now;
    if (now - m->unwritten_since <= MOUNT_LINGER_MS)
        return;
    m->unwritten_since = 0;
    mount_unwritten(m);
    __atomic_store_n(&m->shared->mirror, 0u, __ATOMIC_SEQ_CST);
    fetch_swap(m, false);
    log_info("%s: nobody writes to it any more", m->name);
}
