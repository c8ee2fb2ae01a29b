/* Eviction of mirrors that programs write to (see evict.c for the order in which pages go).
 *
 * A page may go when the remote would give it back as it is. What the remote has of it is known by a hash: the one that
 * was published last, or, of a page that nobody has captured, that of the bytes that came. So nothing goes
 *
 * - while a capture or a comparison reads the memfd, or anything captured is not durable: the live pin reads what is;
 * - while a READ of it is under way, whose answer may be older than what was stored and published since;
 * - from `base` on, where a hole would mean zeros;
 * - while a program is in a writing call (struct shared's `calls`), which may have found the page and is about to write
 *   a part of it. The order is: view.punches odd, then `calls`; the call raises `calls` and then looks at punches.
 *
 * A store may come between the look at a page and its going. The page itself is therefore held (vmsplice into a pipe)
 * while the hole is made, and looked at again when no page table has it any more: what differs is put back, before any
 * fault is answered, and is dirty.
 *
 *     here --hash is the remote's--> held --punched--> missing, if the hash still is; else here, dirty
 *
 * Who waits for whom, when more is here than may be:
 *
 *     thread in a fault --room--> something clean that is in the queue, or a publication
 *     publication       --------> the remote's disk; never for a page: captures leave holes out
 *     call that writes  --FETCH-> the remote; never for room (evict_written_must), since while it is under way nothing goes
 *     call that reads   --FETCH-> the remote; never for room; it holds nothing
 *
 * No circle, so demand goes on, if each page that is here comes to the head of the queue and can go there in the end:
 *
 * - every page that is here is in the queue, or the queue is made anew before the next one goes (evict.anew: a change
 *   of size, no memory). What calls have made of holes comes into it when it was captured;
 * - what is not as the remote has it, or of which that is not known, is counted as dirty: after the publication its
 *   hash is known;
 * - each tick looks again, at who waits and at what may go, and asks for a publication if that is not enough;
 * - where nothing is published (refused, fenced, degraded) the bound holds no demand back.
 *
 * Huge pages: a hole in a part of one is made by writing zeros, which the pages that are held show as well. None come
 * by our copies, nor by faults and the kernel's collecting in the window (MADV_NOHUGEPAGE); one can come by a call that
 * writes into holes where shmem_enabled says so, and then the bound is not kept, which is said. A page that is there
 * after its hole was made is written again as it was before.
 *
 * If the agent dies before the hole, nothing has happened. Between hole and putting back: the page comes from the
 * remote again, as it was when it was looked at; a store of the microseconds between look and hole is lost. Not seen:
 * what is written by direct I/O into such a page after it was looked at the second time. */
#include "agent/page/mount.h"

#include "agent/base/log.h"
#include "agent/page/uffd.h"
#include "agent/sync/reconcile.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define HELD 256u /* pages: what a pipe of 1 MiB takes */

/* Of the loop thread, for all mounts. */
static int held[2] = {-1, -1};
static uint8_t *seen, *looked;

static bool hold_ready(void)
{
    if (held[0] < 0 && pipe2(held, O_CLOEXEC | O_NONBLOCK))
        return false;
    if (!seen && fcntl(held[1], F_SETPIPE_SZ, HELD * PAGE_SIZE) < (int)(HELD * PAGE_SIZE))
        return false;
    if (!seen && !looked)
        looked = malloc((size_t)HELD * PAGE_SIZE);
    if (!seen && looked)
        seen = malloc((size_t)HELD * PAGE_SIZE);
    return seen;
}

/* Whether pages that a call writes into a hole may be huge ones, by a file of the kernel's where the value in force
 * stands in brackets. */
static bool says_huge(const char *path)
{
    char text[128] = "";
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? 0 : read(fd, text, sizeof text - 1);
    if (fd >= 0)
        close(fd);
    return n > 0 && (strstr(text, "[always]") || strstr(text, "[within_size]") || strstr(text, "[force]"));
}

/* Looked at once a second. */
static bool huge_pages(uint64_t now)
{
    static uint64_t next;
    static bool huge;
    if (huge || now < next)
        return huge;
    next = now + 1000;
    char path[96];
    huge = says_huge("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
    for (unsigned kb = 8; kb <= 2048 && !huge; kb *= 2) {
        snprintf(path, sizeof path, "/sys/kernel/mm/transparent_hugepage/hugepages-%ukB/shmem_enabled", kb);
        huge = says_huge(path);
    }
    return huge;
}

static bool at_rest(const struct mount *m)
{
    const struct body *b = m->body;
    const struct region *r = b->region;
    return r && r->group && b->joined && b->created && m->live && m->state == MOUNT_PINNED && r->attach == ATTACH_DONE &&
           !b->unknown && !b->refetch && b->durable == b->epoch && b->min_size == UINT64_MAX && !r->group->capture &&
           !reconcile_reads(r->link, r->group);
}

bool evict_written_called(const struct mount *m)
{
    for (const struct viewer *v = m->viewers; v; v = v->next_mount)
        if (v->program->shared && __atomic_load_n(&v->program->shared->calls, __ATOMIC_SEQ_CST))
            return true;
    return false;
}

bool evict_written_can(const struct mount *m)
{
    return at_rest(m) && hold_ready() && !evict_written_called(m);
}

/* Somebody publishes what is stored, sooner or later. */
static bool is_published(const struct mount *m)
{
    const struct region *r = m->body->region;
    return r && r->group && region_takes_part(r) && !r->group->degraded && !r->link->broken;
}

bool evict_written_must(const struct mount *m)
{
    return m->pages.have_n + m->pages.asked_n > m->evict.bound + EVICT_MORE && !m->fetchings && is_published(m) &&
           !evict_written_called(m);
}

static struct page_hash remote_has(const struct mount *m, uint64_t page)
{
    struct page_hash h = hashes_get(&m->body->published, page);
    if (!page_hash_same(h, HASH_UNKNOWN))
        return h;
    return page < m->evict.came.pages ? hashes_get(&m->evict.came, page) : HASH_UNKNOWN;
}

static bool as_there(const struct mount *m, uint64_t page, const uint8_t *bytes)
{
    struct page_hash h = remote_has(m, page);
    return !page_hash_same(h, HASH_UNKNOWN) && page_hash_same(h, page_hash_of(bytes));
}

/* By a call: in the window, a page that somebody has taken out would be waited for. */
static bool page_at(const struct mount *m, uint64_t page, uint8_t *to)
{
    ssize_t n = pread(m->memfd, to, PAGE_SIZE, (off_t)(page * PAGE_SIZE));
    if (n > 0)
        memset(to + n, 0, PAGE_SIZE - (size_t)n);
    return n > 0;
}

static bool is_data(const struct mount *m, uint64_t page)
{
    off_t at = (off_t)(page * PAGE_SIZE);
    return lseek(m->memfd, at, SEEK_DATA) == at;
}

static bool being_read(const struct mount *m, uint64_t page)
{
    for (const struct read *r = m->pager->reads; r; r = r->next)
        if (r->mount == m && page * PAGE_SIZE < r->offset + r->len && r->offset < (page + 1) * PAGE_SIZE)
            return true;
    return false;
}

static void doubt(struct mount *m, uint64_t page)
{
    extents_add(&m->body->dirty, page * PAGE_SIZE, (page + 1) * PAGE_SIZE);
}

static void put_back(struct mount *m, uint64_t page, const uint8_t *bytes)
{
    int rc = page_copy(page_uffd(), m->window + page * PAGE_SIZE, bytes, PAGE_SIZE);
    if (rc && pwrite(m->memfd, bytes, PAGE_SIZE, (off_t)(page * PAGE_SIZE)) != PAGE_SIZE) {
        log_error("%s: page %llu could not be put back: %s", m->name, (unsigned long long)page, strerror(-rc));
        mount_fail(m, -EIO, "no memory for what a program stored");
        return;
    }
    pages_came(&m->pages, page, page + 1);
    doubt(m, page);
    mount_wake(m, page, page + 1);
}

static void not_kept(struct mount *m)
{
    struct eviction *e = &m->evict;
    if (e->bound)
        for (struct viewer *v = m->viewers; v; v = v->next_mount)
            program_notice(v->program,
                           "%s: resident= is not kept to: the kernel gives huge pages to what is written here "
                           "(/sys/kernel/mm/transparent_hugepage/shmem_enabled should say never, or advise)",
                           m->path);
    e->huge = true;
    e->bound = 0;
}

/* It was emptied in its place, as a part of a huge page is, and what we held with it: it is what it was when we looked.
 */
static void emptied(struct mount *m, uint64_t page, const uint8_t *bytes)
{
    log_error("%s: page %llu could not be taken out", m->name, (unsigned long long)page);
    if (pwrite(m->memfd, bytes, PAGE_SIZE, (off_t)(page * PAGE_SIZE)) != PAGE_SIZE)
        mount_fail(m, -EIO, "no memory for what was here");
    pages_came(&m->pages, page, page + 1);
    doubt(m, page);
    not_kept(m);
}

/* All of [from, to) is here, and was as the remote has it when it was copied to `looked`. */
static void let_go(struct mount *m, uint64_t from, uint64_t to)
{
    size_t len = (size_t)((to - from) * PAGE_SIZE), have = 0;
    struct iovec iov = {m->window + from * PAGE_SIZE, len};
    ssize_t n = vmsplice(held[1], &iov, 1, SPLICE_F_NONBLOCK);
    uint64_t end = n < 0 ? from : from + (uint64_t)n / PAGE_SIZE;
    int rc = end > from ? mount_punch(m, from, end) : 0;
    if (rc)
        log_info("%s: pages cannot be taken out: %s", m->name, strerror(-rc));
    while (n > 0 && have < (size_t)n) {
        ssize_t got = read(held[0], seen + have, (size_t)n - have);
        if (got <= 0)
            break;
        have += (size_t)got;
    }
    for (uint64_t page = from; page < end; page++) {
        size_t at = (size_t)((page - from) * PAGE_SIZE);
        if (pages_bit(m->pages.have, page))
            continue;
        if (is_data(m, page))
            emptied(m, page, looked + at);
        else if (!as_there(m, page, seen + at))
            put_back(m, page, seen + at);
    }
}

/* What of it stays is queued anew; what stays because it is not as the remote has it, or nobody knows, is published. */
void evict_written(struct mount *m, struct filled f)
{
    uint64_t most = m->base < m->size ? m->base / PAGE_SIZE : mount_pages(m), from = f.from;
    f.to = f.to < m->pages.count ? f.to : m->pages.count;
    while (from < f.to) {
        uint64_t to = from;
        while (to < f.to && to < most && to - from < HELD && pages_bit(m->pages.have, to) && !being_read(m, to)) {
            uint8_t *copy = looked + (to - from) * PAGE_SIZE;
            if (!page_at(m, to, copy))
                break;
            if (!as_there(m, to, copy)) {
                doubt(m, to);
                break;
            }
            to++;
        }
        if (to > from)
            let_go(m, from, to);
        from = to > from ? to : to + 1;
    }
    for (uint64_t at = f.from, end; (at = pages_hole_end(&m->pages, at, f.to)) < f.to; at = end) {
        end = pages_hole(&m->pages, at, f.to);
        evict_queue(&m->evict, (struct filled){at, end});
    }
}

void evict_came(struct mount *m, uint64_t from, const uint8_t *data, uint64_t len)
{
    struct hashes *h = &m->evict.came;
    for (uint64_t page = from; m->evict.bound && len >= PAGE_SIZE && page < h->pages; page++, len -= PAGE_SIZE)
        hashes_set(h, page, data ? page_hash_of(data + (page - from) * PAGE_SIZE) : HASH_ZEROS);
}

void evict_joined(struct mount *m, bool same)
{
    static uint8_t bytes[PAGE_SIZE] __attribute__((aligned(16)));
    struct hashes *h = &m->evict.came;
    h->bare = true;
    if (!m->evict.bound || hashes_room(h, m->pages.count))
        return;
    hashes_doubt(h, 0, m->pages.count);
    for (uint64_t page = 0; same && (page = pages_hole_end(&m->pages, page, m->pages.count)) < m->pages.count; page++)
        if (page_at(m, page, bytes))
            hashes_set(h, page, page_hash_of(bytes));
}

void evict_captured(struct mount *m, const struct extents *looked_at)
{
    for (size_t i = 0; m->evict.bound && i < looked_at->count; i++) {
        uint64_t page = looked_at->at[i].start / PAGE_SIZE, to = (looked_at->at[i].end + PAGE_SIZE - 1) / PAGE_SIZE;
        to = to < m->pages.count ? to : m->pages.count;
        for (; (page = pages_hole(&m->pages, page, to)) < to; page++)
            if (is_data(m, page)) {
                pages_came(&m->pages, page, page + 1);
                evict_queue(&m->evict, (struct filled){page, page + 1});
            }
    }
}

/* More than may be here, with what calls have made of holes, which is not counted before it is captured. */
static bool too_much(const struct mount *m)
{
    struct stat st;
    return m->evict.pressed || m->pages.have_n > m->evict.bound ||
           (!fstat(m->memfd, &st) && (uint64_t)st.st_blocks * 512 / PAGE_SIZE > m->evict.bound);
}

void evict_again(struct mount *m, bool want)
{
    struct eviction *e = &m->evict;
    if (!m->body || !e->bound || m->state == MOUNT_FAILED)
        return;
    if (huge_pages(uv_now(m->pager->link->local->loop)))
        not_kept(m);
    bool over = e->bound && too_much(m);
    if (over) {
        e->pressed = false;
        evict_room(m, 0);
        over = too_much(m);
    }
    struct region *r = m->body->region;
    if (over && want && r && r->group && !r->group->capture) {
        r->group->wanted = true;
        group_kick(r->group);
    }
    if (!over && !m->wanted_n)
        return;
    fetch_wanted(m);
    fetch_step(m);
    fetch_pump(m->pager);
}
