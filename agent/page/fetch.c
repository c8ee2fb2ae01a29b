/* The pager's half of the wire: pins and READs, over streams of its own (see mount.h); what is answered comes to
 * answers.c. */
#include "agent/page/mount.h"

#include <errno.h>
#include <stdlib.h>

/* The bulk's first use opens sockets of its own for it. */
static void streams_ready(struct pager *g)
{
    conn_set_priority(g->link->conn, g->streams[0], CONN_URGENT);
    for (size_t i = 1; i < 1 + BULK_STREAMS; i++)
        conn_set_priority(g->link->conn, g->streams[i], CONN_BULK);
}

static void timer_free(uv_handle_t *h)
{
    free(h);
}

struct pager *pager_of(struct link *k)
{
    if (k->pager)
        return k->pager;
    struct pager *g = calloc(1, sizeof *g);
    uv_timer_t *opened = g ? malloc(sizeof *opened) : NULL;
    if (!opened || uv_timer_init(k->local->loop, opened)) {
        free(opened);
        free(g);
        return NULL;
    }
    *g = (struct pager){.link = k, .opened = opened, .ahead = BULK_AHEAD_FIRST, .fastest = UINT64_MAX};
    opened->data = g;
    for (size_t i = 0; i < 1 + BULK_STREAMS; i++)
        g->streams[i] = ++k->next_stream;
    k->pager = g;
    if (k->state == LINK_UP)
        streams_ready(g);
    return g;
}

static void send_on(struct pager *g, size_t stream, uint8_t type, struct buf *b)
{
    if (b && g->link->conn)
        conn_send(g->link->conn, g->streams[stream], type, b);
    else
        buf_drop(b);
}

/* ---- pins ---- */

static void pin_send(struct pager *g, uint32_t request, const char *name, uint64_t epoch, const struct id *lineage,
                     uint32_t head, bool live)
{
    static struct frame_pin f;
    struct buf *b = buf_new(NAME_CAP + 32);
    f = (struct frame_pin){
        .request = request, .keep = 1, .epoch = epoch, .lineage = *lineage, .head = head, .live = live};
    snprintf(f.name, sizeof f.name, "%s", name);
    if (b)
        b->len = (uint32_t)frame_pin_put(b->data, b->cap, &f);
    send_on(g, 0, FRAME_PIN, b);
}

void fetch_unpin(struct pager *g, uint32_t pin)
{
    struct buf *b = buf_new(4);
    if (b) {
        put_u32(b->data, pin);
        b->len = 4;
    }
    send_on(g, 0, FRAME_UNPIN, b);
}

void fetch_pin(struct mount *m)
{
    struct pager *g = m->pager;
    if (g->link->state != LINK_UP || m->state != MOUNT_UNPINNED || !m->epoch ||
        id_none(&m->lineage)) /* not at the remote yet */
        return;
    m->request = ++g->link->next_request;
    m->state = MOUNT_ASKED;
    m->live = m->body || m->shared->mirror;
    pin_send(g, m->request, m->name, m->follow.lost ? 0 : m->epoch, &m->lineage, 0, m->live);
}

void fetch_swap(struct mount *m, bool live)
{
    struct pager *g = m->pager;
    if (g->link->state != LINK_UP || m->state != MOUNT_PINNED || m->swap || m->old_pin || m->live == live)
        return;
    m->swap = ++g->link->next_request;
    m->swap_live = live;
    pin_send(g, m->swap, m->name, m->epoch, &m->lineage, 0, live);
}

void fetch_retire(struct mount *m)
{
    if (!m->old_pin)
        return;
    for (const struct read *r = m->pager->reads; r; r = r->next)
        if (r->mount == m && r->pin == m->old_pin)
            return;
    fetch_unpin(m->pager, m->old_pin);
    m->old_pin = 0;
}

void fetch_ask_newest(struct pager *g, uint32_t request, const char *name)
{
    pin_send(g, request, name, 0, &(struct id){0}, 0, false);
}

void fetch_ask_changed(struct pager *g, uint32_t request, uint32_t pin, uint32_t later)
{
    struct buf *b = buf_new(12);
    if (b) {
        put_u32(b->data, request);
        put_u32(b->data + 4, pin);
        put_u32(b->data + 8, later);
        b->len = 12;
    }
    send_on(g, 0, FRAME_CHANGED, b);
}

void opening_ask(struct pager *g, struct opening *o)
{
    if (g->link->state != LINK_UP || o->request || o->mount)
        return;
    o->request = ++g->link->next_request;
    o->sent = uv_hrtime();
    pin_send(g, o->request, o->how.name, o->epoch, &o->lineage, o->how.look ? 0 : HEAD_BYTES, false);
}

/* ---- reads ---- */

static uint64_t byte_of(const struct mount *m, uint64_t page)
{
    return page * PAGE_SIZE < m->size ? page * PAGE_SIZE : m->size;
}

static struct read *read_new(struct mount *m, uint64_t from, uint64_t to, bool bulk, uint32_t stream, uint64_t since)
{
    struct read *r = calloc(1, sizeof *r);
    if (!r)
        return NULL;
    struct pager *g = m->pager;
    *r = (struct read){.next = g->reads,
                       .mount = m,
                       .stream = stream,
                       .offset = byte_of(m, from),
                       .len = byte_of(m, to) - byte_of(m, from),
                       .limit = m->base,
                       .pin = m->pin,
                       .since = since,
                       .sent = uv_hrtime(),
                       .bulk = bulk};
    g->reads = r;
    g->under[stream] += r->len;
    g->bulk += bulk ? r->len : 0;
    g->bulk_n += bulk;
    g->demand_n += !bulk;
    pages_ask(&m->pages, from, to);
    return r;
}

/* What of it has not come. A region that was cut has fewer pages now. */
static void unask(struct mount *m, const struct read *r)
{
    uint64_t from = (r->offset + r->got) / PAGE_SIZE, to = (r->offset + r->len + PAGE_SIZE - 1) / PAGE_SIZE;
    pages_unask(&m->pages, from, to < m->pages.count ? to : m->pages.count);
}

/* What has not come of it is missing again. */
void fetch_read_end(struct pager *g, struct read *r)
{
    struct read **at = &g->reads;
    while (*at != r)
        at = &(*at)->next;
    *at = r->next;
    g->under[r->stream] -= r->len - r->got;
    g->bulk -= r->bulk ? r->len - r->got : 0;
    g->bulk_n -= r->bulk;
    g->demand_n -= !r->bulk;
    struct mount *m = r->mount;
    if (m)
        unask(m, r);
    free(r);
    if (m)
        fetch_retire(m);
}

static void read_send(struct mount *m, uint64_t from, uint64_t to, bool bulk, uint32_t stream, uint64_t since)
{
    struct pager *g = m->pager;
    struct read *r = read_new(m, from, to, bulk, stream, since);
    if (!r)
        return;
    r->request = ++g->link->next_request;
    struct frame_read f = {
        .request = r->request, .pin = m->pin, .offset = r->offset, .len = (uint32_t)r->len, .bulk = bulk};
    struct buf *b = buf_new(32);
    if (b)
        b->len = (uint32_t)frame_read_put(b->data, b->cap, &f);
    send_on(g, stream, FRAME_READ, b);
}

bool fetch_demanded(const struct mount *m, uint64_t page)
{
    uint64_t at = page * PAGE_SIZE;
    for (const struct read *r = m->pager->reads; r; r = r->next)
        if (r->mount == m && !r->bulk && r->offset + r->got <= at && at < r->offset + r->len)
            return true;
    for (size_t i = 0; i < m->wanted_n; i++)
        if (m->wanted[i].from <= page && page < m->wanted[i].to)
            return true;
    return false;
}

bool fetch_is_far(const struct mount *m, uint64_t page)
{
    uint64_t at = page * PAGE_SIZE;
    const struct pager *g = m->pager;
    const struct read *r = g->reads;
    while (r && !(r->mount == m && r->bulk && r->offset + r->got <= at && at < r->offset + r->len))
        r = r->next;
    if (!r)
        return false;
    uint64_t before = at - (r->offset + r->got);
    for (const struct read *q = r->next; q; q = q->next) /* those that were asked for earlier */
        before += q->bulk ? q->len - q->got : 0;
    return (double)g->usual * (double)before > (double)g->trip * (double)g->bulk;
}

static bool can_demand(const struct mount *m)
{
    return m->state == MOUNT_PINNED && m->pager->demand_n < DEMAND_READS && evict_can_ask(m);
}

static void demand(struct mount *m, uint64_t from, uint64_t to, uint64_t since)
{
    to = to < mount_pages(m) ? to : mount_pages(m); /* it may have waited while the region was cut */
    for (uint64_t end; from < to; from = end) {
        end = to - from < PLAN_WINDOW ? to : from + PLAN_WINDOW;
        evict_room(m, end - from);
        read_send(m, from, end, false, 0, since);
    }
}

void fetch_want(struct mount *m, uint64_t from, uint64_t to, uint64_t since)
{
    if (m->state == MOUNT_FAILED)
        return;
    if (can_demand(m)) {
        demand(m, from, to, since);
        fetch_pump(m->pager);
        return;
    }
    if (m->wanted_n == m->wanted_cap) {
        size_t cap = m->wanted_cap ? m->wanted_cap * 2 : 16;
        struct want *more = realloc(m->wanted, cap * sizeof *more);
        if (!more) {
            m->starved = true;
            return;
        }
        m->wanted = more;
        m->wanted_cap = cap;
    }
    m->wanted[m->wanted_n++] = (struct want){from, to, since};
}

void fetch_wanted(struct mount *m)
{
    size_t done = 0;
    for (; done < m->wanted_n && can_demand(m); done++)
        demand(m, m->wanted[done].from, m->wanted[done].to, m->wanted[done].since);
    m->wanted_n -= done;
    if (done && m->wanted_n)
        memmove(m->wanted, m->wanted + done, m->wanted_n * sizeof *m->wanted);
}

/* ---- ranges that calls wait for ---- */

/* Demands what comes next of it. True: it is answered, and gone. */
static bool fetching_step(struct mount *m, struct fetching *f)
{
    f->to = f->to < mount_pages(m) ? f->to : mount_pages(m);
    f->from = f->from < f->to ? pages_hole(&m->pages, f->from, f->to) : f->to;
    if (m->state == MOUNT_FAILED || f->from == f->to) {
        answer_drop(f->answer, f->from == f->to ? 0 : -EIO);
        free(f);
        return true;
    }
    uint64_t end = f->to - f->from < PLAN_WINDOW ? f->to : f->from + PLAN_WINDOW;
    if (pages_bit(m->pages.asked, f->from) && !fetch_demanded(m, f->from) && fetch_is_far(m, f->from))
        fetch_want(m, f->from,
                   pages_hole_end(&m->pages, f->from, end < f->from + PLAN_FIRST ? end : f->from + PLAN_FIRST),
                   f->since);
    for (uint64_t at = f->from, stop; at < end && m->state != MOUNT_FAILED; at = stop) {
        at = pages_gap(&m->pages, at, end);
        stop = pages_gap_end(&m->pages, at, end);
        if (at < stop && !fetch_demanded(m, at))
            fetch_want(m, at, stop, f->since);
    }
    return false;
}

void fetch_step(struct mount *m)
{
    for (struct fetching **at = &m->fetchings, *f; (f = *at);) {
        struct fetching *next = f->next;
        if (fetching_step(m, f))
            *at = next;
        else
            at = &f->next;
    }
}

void fetch_range(struct mount *m, struct answer *a, uint64_t offset, uint64_t len)
{
    uint64_t from = offset / PAGE_SIZE, to = (offset + len + PAGE_SIZE - 1) / PAGE_SIZE;
    struct fetching *f = calloc(1, sizeof *f);
    if (!f) {
        answer_drop(a, -ENOMEM);
        return;
    }
    if (to > mount_pages(m))
        to = mount_pages(m);
    *f = (struct fetching){.next = m->fetchings,
                           .answer = a,
                           .from = from < to ? from : to,
                           .to = to,
                           .since = uv_now(m->pager->link->local->loop)};
    m->fetchings = f;
    m->opened = false;
    if (from < to && plan_touch(&m->plan, from, to))
        evict_walk(m, to);
    evict_keep(m, from, to);
    fetch_wanted(m); /* a call may ask for more than a fault */
    fetch_step(m);
    fetch_pump(m->pager);
}

void fetch_forget_program(struct mount *m, const struct program *p)
{
    for (struct fetching **at = &m->fetchings, *f; (f = *at);) {
        if (f->answer->program != p) {
            at = &f->next;
            continue;
        }
        *at = f->next;
        answer_drop(f->answer, -ECONNRESET);
        free(f);
    }
}

void fetch_cut(struct mount *m)
{
    for (struct read *r = m->pager->reads; r; r = r->next)
        if (r->mount == m && r->limit > m->base)
            r->limit = m->base;
    fetch_step(m);
}

void fetch_drop(struct mount *m)
{
    for (struct read *r = m->pager->reads; r; r = r->next)
        if (r->mount == m) {
            unask(m, r);
            r->mount = NULL;
        }
    m->wanted_n = 0;
}

void fetch_forget(struct mount *m)
{
    fetch_drop(m);
    while (m->fetchings) {
        struct fetching *f = m->fetchings;
        m->fetchings = f->next;
        answer_drop(f->answer, pages_hole(&m->pages, f->from, f->to) < f->to ? -EIO : 0);
        free(f);
    }
}

/* ---- the background ---- */

static uint32_t least_busy(const struct pager *g)
{
    uint32_t best = 1;
    for (uint32_t i = 2; i <= BULK_STREAMS; i++)
        if (g->under[i] < g->under[best])
            best = i;
    return best;
}

static struct mount *next_of(struct pager *g, struct mount *m)
{
    return m && m->next ? m->next : g->mounts;
}

void fetch_pump(struct pager *g)
{
    struct mount *m = next_of(g, g->turn);
    unsigned idle = 0, all = 0;
    for (struct mount *i = g->mounts; i; i = i->next)
        all++;
    while (idle < all && g->bulk < g->ahead && g->bulk_n < BULK_READS) {
        uint64_t from, to;
        if (m->state == MOUNT_PINNED && !m->opened && (m->viewers || m->eager) && evict_next(m, &from, &to)) {
            evict_room(m, to - from);
            read_send(m, from, to, true, least_busy(g), 0);
            idle = 0;
            g->turn = m;
        } else {
            idle++;
        }
        m = next_of(g, m);
    }
}

void fetch_begun(struct mount *m)
{
    if (!m->opened)
        return;
    m->opened = false;
    fetch_pump(m->pager);
}

static void opened_long(uv_timer_t *t)
{
    struct pager *g = t->data;
    for (struct mount *m = g->mounts; m; m = m->next)
        m->opened = false;
    fetch_pump(g);
}

void fetch_opened(struct mount *m)
{
    m->opened = true;
    uv_timer_start(m->pager->opened, opened_long, OPENED_MS, 0);
}

/* What is worth having under way over so long a path, before anything has come over it: 1 GB/s for a round trip. */
void fetch_ahead_begin(struct pager *g, uint64_t trip)
{
    uint64_t most = BULK_AHEAD_MAX / 2;
    if (g->fastest == UINT64_MAX && trip > g->ahead)
        g->ahead = trip < most ? trip : most;
    if (trip > BULK_FAR_MS * 1000000u)
        conn_want(g->link->conn, CONN_SOCKETS);
}

/* An answer to the background is whole: is there room for more under way, or too much? */
void fetch_ahead_adjust(struct pager *g, const struct read *r)
{
    uint64_t took = uv_hrtime() - r->sent;
    if (took < g->fastest)
        g->fastest = took;
    g->usual = g->usual ? g->usual - g->usual / 8 + took / 8 : took;
    if (took < 2 * g->fastest + BULK_SLACK_MS * 1000000u)
        g->ahead += g->bulk + r->len >= g->ahead ? r->len : 0; /* only when it was made use of */
    else
        g->ahead -= g->ahead / 16;
    g->ahead = g->ahead < BULK_AHEAD_MIN ? BULK_AHEAD_MIN : g->ahead > BULK_AHEAD_MAX ? BULK_AHEAD_MAX : g->ahead;
}

void page_link_up(struct link *k)
{
    struct pager *g = k->pager;
    if (!g)
        return;
    streams_ready(g);
    g->ahead = BULK_AHEAD_FIRST;
    g->fastest = UINT64_MAX;
    g->usual = 0;
    g->trip = 0;
    for (struct opening *o = g->openings; o; o = o->next)
        opening_ask(g, o);
    for (struct mount *m = g->mounts; m; m = m->next)
        fetch_pin(m);
}

void page_link_lost(struct link *k)
{
    struct pager *g = k->pager;
    if (!g)
        return;
    for (struct mount *m = g->mounts; m; m = m->next) {
        if (m->state != MOUNT_FAILED)
            m->state = MOUNT_UNPINNED;
        m->swap = m->old_pin = 0;
        follow_stop(m, false);
    }
    for (struct opening *o = g->openings, *next; o; o = next) {
        next = o->next;
        o->request = 0;
        if (!o->program)
            opening_end(g, o, 0);
    }
    while (g->reads) {
        struct read *r = g->reads;
        struct mount *m = r->bulk ? NULL : r->mount;
        uint64_t from = (r->offset + r->got) / PAGE_SIZE, to = (r->offset + r->len + PAGE_SIZE - 1) / PAGE_SIZE;
        uint64_t since = r->since;
        fetch_read_end(g, r);
        if (m)
            fetch_want(m, from, to, since);
    }
}

/* Since when somebody has waited for the remote to send a page of it; 0: nobody does. Who waits for room does not. */
static uint64_t waiting_since(const struct mount *m)
{
    uint64_t since = 0;
    for (size_t i = 0; i < m->wanted_n && !(m->state == MOUNT_PINNED && !evict_can_ask(m)); i++)
        if (!since || m->wanted[i].since < since)
            since = m->wanted[i].since;
    for (const struct read *r = m->pager->reads; r; r = r->next)
        if (r->mount == m && !r->bulk && (!since || r->since < since))
            since = r->since;
    for (const struct fetching *f = m->fetchings; f; f = f->next)
        if (!since || f->since < since)
            since = f->since;
    return since;
}

static bool awaited(const struct mount *m)
{
    for (const struct opening *o = m->pager->openings; o; o = o->next)
        if (o->mount == m)
            return true;
    return m->viewers != NULL || mount_kept(m);
}

static void mount_tick(struct mount *m, uint64_t now)
{
    uint64_t since = m->timeout_ms && m->state != MOUNT_FAILED ? waiting_since(m) : 0;
    if (m->starved)
        mount_fail(m, -ENOMEM, "no memory for those who wait for its pages");
    else if (since && now - since > m->timeout_ms)
        mount_fail(m, -ETIMEDOUT, "%s did not answer within MEMSYNC_FETCH_TIMEOUT (%llu ms)", m->pager->link->address,
                   (unsigned long long)m->timeout_ms);
    if (m->plan.learning && now - m->made_at > LEARNING_MS) {
        m->plan.learning = false;
        fetch_pump(m->pager);
    }
    mount_settle(m, now);
    follow_tick(m, now);
    evict_again(m, true);
    if (!awaited(m) && now - m->idle_since > MOUNT_LINGER_MS)
        mount_free(m);
    else if (now >= m->retry_at)
        fetch_pin(m);
}

void page_tick(struct link *k, uint64_t now)
{
    struct pager *g = k->pager;
    if (!g)
        return;
    for (struct opening *o = g->openings, *next; o; o = next) {
        next = o->next;
        if (o->program && !o->mount && o->program->timeout_ms && now - o->since > o->program->timeout_ms) {
            program_notice(o->program, "%s: %s does not answer: %s", o->how.path, k->address,
                           k->reason[0] ? k->reason : "no word from it");
            opening_end(g, o, -ETIMEDOUT);
        }
    }
    for (struct mount *m = g->mounts, *next; m; m = next) {
        next = m->next;
        mount_tick(m, now);
    }
}

void page_link_free(struct link *k)
{
    struct pager *g = k->pager;
    if (!g)
        return;
    while (g->openings)
        opening_end(g, g->openings, -ECONNRESET);
    while (g->mounts) {
        struct mount *m = g->mounts;
        if (m->body) { /* its region is gone, or going */
            m->body->region = NULL;
            m->body->mount = NULL;
            body_drop(m->body);
            m->body = NULL;
        }
        mount_free(m);
    }
    while (g->reads)
        fetch_read_end(g, g->reads);
    uv_close((uv_handle_t *)g->opened, timer_free);
    free(g);
    k->pager = NULL;
}
