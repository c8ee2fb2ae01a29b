/* What the remote answers to pins and READs (fetch.c asks), and what comes of it. */
#include "agent/page/mount.h"

#include "agent/base/log.h"

#include <errno.h>
#include <stdlib.h>

#define PIN_RETRY_MS 1000u

static void violated(struct pager *g, const char *what)
{
    conn_close(g->link->conn, false, FRAME_E_PROTOCOL, what);
}

static struct read *read_of(struct pager *g, uint32_t request)
{
    for (struct read *r = g->reads; r; r = r->next)
        if (r->request == request)
            return r;
    return NULL;
}

static void take_data(struct pager *g, uint32_t stream, const struct buf *p)
{
    struct frame_data d;
    conn_credit(g->link->conn, stream, p->len);
    struct read *r = frame_data_get(p->data, p->len, &d) ? NULL : read_of(g, d.request);
    if (!r)
        return violated(g, "a DATA out of form, or that nobody asked for");
    bool more = d.kind & FRAME_DATA_MORE;
    if (!d.len || d.len > r->len - r->got || more != (d.len < r->len - r->got) || (more && d.len % PAGE_SIZE))
        return violated(g, "a DATA that is not what was asked for");
    if (!r->bulk && !r->got && r->sent)
        g->trip = g->trip ? g->trip - g->trip / 8 + (uv_hrtime() - r->sent) / 8 : uv_hrtime() - r->sent;
    struct mount *m = r->mount;
    uint64_t at = r->offset + r->got, useful = at < r->limit ? r->limit - at : 0;
    int rc = m && useful ? mount_put(m, at, d.data, d.len < useful ? d.len : useful) : 0;
    if (m && m->body && useful && useful < d.len && r->limit % PAGE_SIZE)
        extents_add(&m->body->dirty, r->limit, r->limit + 1); /* the remote's is longer */
    r->got += d.len;
    g->under[r->stream] -= d.len;
    if (r->bulk)
        g->bulk -= d.len;
    if (!more) {
        if (r->bulk)
            fetch_ahead_adjust(g, r);
        fetch_read_end(g, r);
    }
    if (rc)
        mount_fail(m, rc, "no memory for its pages here (%s)", strerror(-rc));
    else if (m && m->eager && mount_complete(m))
        openings_look(m);
    if (m && m->state == MOUNT_PINNED)
        fetch_wanted(m);
    if (m)
        fetch_step(m);
    fetch_pump(g);
}

static struct mount *mount_asked(struct pager *g, uint32_t request)
{
    for (struct mount *m = g->mounts; m; m = m->next)
        if (m->state == MOUNT_ASKED && m->request == request)
            return m;
    return NULL;
}

static struct opening *opening_asked(struct pager *g, uint32_t request)
{
    for (struct opening *o = g->openings; o; o = o->next)
        if (o->request == request)
            return o;
    return NULL;
}

static struct mount *mount_swapping(struct pager *g, uint32_t request)
{
    for (struct mount *m = g->mounts; m; m = m->next)
        if (m->swap && m->swap == request)
            return m;
    return NULL;
}

static void swapped(struct mount *m, uint32_t pin, const struct frame_entry *e)
{
    m->swap = 0;
    if (m->state != MOUNT_PINNED || !id_same(&e->lineage, &m->lineage)) {
        fetch_unpin(m->pager, pin);
        return;
    }
    m->old_pin = m->pin;
    m->pin = pin;
    m->live = m->swap_live;
    fetch_retire(m);
    if (m->body && m->body->region)
        group_step(m->body->region->group);
}

/* Without a live pin it may not be written to; with one it goes on as it is. */
static void swap_failed(struct mount *m, const char *text)
{
    m->swap = 0;
    m->live_refused = m->swap_live;
    log_info("%s: %s", m->name, text);
    if (!m->live_refused || !m->body || !m->body->region)
        return;
    region_notice(m->body->region, "%s: cannot be written to: %s", m->path, text);
    group_step(m->body->region->group);
}

static void mount_pinned(struct mount *m, uint32_t pin, const struct frame_entry *e)
{
    if (follow_repinned(m, pin, e))
        return;
    m->pin = pin;
    m->state = MOUNT_PINNED;
    if (!id_same(&e->lineage, &m->lineage) || (!m->live && (e->epoch != m->epoch || e->size != m->size))) {
        mount_fail(m, -ESTALE, "the remote has another region of that name now");
        return;
    }
    fetch_wanted(m);
    fetch_pump(m->pager);
}

/* The region's beginning, which comes behind PINNED without being asked for again. */
static void head_read(struct pager *g, struct mount *m, uint32_t request, uint64_t size)
{
    uint64_t len = size < HEAD_BYTES ? size : HEAD_BYTES;
    struct read *r = calloc(1, sizeof *r);
    if (!r)
        return violated(g, "no memory for what comes");
    *r = (struct read){.next = g->reads,
                       .mount = m,
                       .request = request,
                       .len = len,
                       .limit = m ? m->base : 0}; /* sent: with the pin */
    r->since = uv_now(g->link->local->loop);
    g->reads = r;
    g->under[0] += len;
    g->demand_n++;
    uint64_t pages = (len + PAGE_SIZE - 1) / PAGE_SIZE;
    if (m)
        pages_ask(&m->pages, 0, pages < mount_pages(m) ? pages : mount_pages(m));
}

static void take_pinned(struct pager *g, const struct buf *p)
{
    static struct frame_entry e;
    uint32_t request, pin;
    if (frame_pinned_get(p->data, p->len, &request, &pin, &e))
        return violated(g, "a PINNED out of form");
    struct mount *m = mount_asked(g, request), *swapping = mount_swapping(g, request);
    struct opening *o = m ? NULL : opening_asked(g, request);
    if (follow_pinned(g, request, pin, &e))
        return;
    if (swapping) {
        swapped(swapping, pin, &e);
        return;
    }
    if (m) {
        mount_pinned(m, pin, &e);
        return;
    }
    if (!o)
        return violated(g, "a PINNED that nobody asked for");
    fetch_ahead_begin(g, uv_hrtime() - o->sent);
    bool head = !o->how.look && e.size;
    m = opening_pinned(g, o, pin, &e);
    if (head)
        head_read(g, m, request, e.size);
    fetch_pump(g);
}

static void take_extents(struct pager *g, const struct buf *p)
{
    struct frame_extents e;
    if (frame_extents_get(p->data, p->len, &e) || !follow_extents(g, &e))
        violated(g, "an EXTENTS out of form, or that nobody asked for");
}

static void take_failed(struct pager *g, const struct buf *p)
{
    static struct frame_failed f;
    if (frame_failed_get(p->data, p->len, &f))
        return violated(g, "a FAILED out of form");
    int err = f.code == FRAME_E_NAME ? -ENOENT : frame_code_errno(f.code); /* a clash: others have names below it */
    struct opening *o = opening_asked(g, (uint32_t)f.seq);
    struct mount *m = mount_asked(g, (uint32_t)f.seq);
    struct read *r = read_of(g, (uint32_t)f.seq);
    struct mount *swapping = mount_swapping(g, (uint32_t)f.seq);
    bool gone = f.code == FRAME_E_LIMIT || f.code == FRAME_E_NOT_FOUND;
    if (follow_failed(g, (uint32_t)f.seq))
        return;
    if (swapping) {
        swap_failed(swapping, f.text);
    } else if (o) {
        if (err == -ENOENT && opening_absent(g, o))
            return;
        if (err != -ENOENT && o->program)
            program_notice(o->program, "%s: region %s at %s: %s", o->how.path, o->how.name, g->link->address, f.text);
        o->request = 0;
        opening_end(g, o, o->epoch && gone ? -ESTALE : err);
    } else if (m && gone && follow_is(m) && !m->follow.lost) {
        follow_lost(m);
    } else if (m && gone) {
        mount_fail(m, -ESTALE, "the remote does not keep its epoch %llu any more: %s", (unsigned long long)m->epoch,
                   f.text);
    } else if (m) {
        m->state = MOUNT_UNPINNED;
        m->retry_at = uv_now(g->link->local->loop) + PIN_RETRY_MS;
        log_info("%s: %s", m->name, f.text);
    } else if (r) {
        m = r->mount;
        fetch_read_end(g, r);
        if (m && gone && follow_is(m))
            follow_lost(m);
        else if (m)
            mount_fail(m, gone ? -ESTALE : -EIO, "the remote cannot read it: %s", f.text);
        fetch_pump(g);
    }
}

bool page_frame(struct link *k, uint32_t stream, uint8_t type, struct buf *payload)
{
    struct pager *g = k->pager;
    if (!g || stream < g->streams[0] || stream > g->streams[BULK_STREAMS])
        return false;
    switch (type) {
    case FRAME_DATA:
        take_data(g, stream, payload);
        break;
    case FRAME_PINNED:
        take_pinned(g, payload);
        break;
    case FRAME_EXTENTS:
        take_extents(g, payload);
        break;
    case FRAME_FAILED:
        take_failed(g, payload);
        break;
    case FRAME_CLOSE:
        break;
    default:
        violated(g, "a frame that answers nothing of a reader");
    }
    return true;
}
