/* Opening and closing a hub, and its clock. */
#include "agent/hub/inside.h"

#include "agent/base/log.h"
#include "agent/net/addr.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#define CLOSE_MS 3000u

bool hub_is(const char *url)
{
    return !strncmp(url, "hub:", 4);
}

void *hub_room(void *array, size_t n, size_t *cap, size_t size)
{
    if (n < *cap)
        return array;
    size_t more = *cap ? *cap * 2 : 16;
    void *p = reallocarray(array, more, size);
    if (p)
        *cap = more;
    return p;
}

void hub_why_none(const struct hub *h, char *text, size_t cap)
{
    int n = snprintf(text, cap, "no replica of this hub is in");
    EACH_REPLICA(r, h)
    if (n > 0 && (size_t)n < cap)
        n += snprintf(text + n, cap - (size_t)n, "; %s: %s (%.200s)", r->address, replica_state_text(r), r->reason);
}

/* Everything that could go on goes on. Callbacks into sessions are made from here and from answers, never from a call
 * of theirs. */
static void step(struct hub *h)
{
    EACH_REPLICA(r, h)
    replica_tick(r);
    if (h->opening)
        opening_step(h);
    EACH_REPLICA(r, h)
    {
        struct replica *from = replica_source(h);
        if (r->state == REPLICA_BEHIND && !r->round && from && !h->opening && hub_now(h) >= r->retry_at && !h->closing)
            round_start(from, r, false);
        if (r->round)
            round_step(r->round);
        if (r->state == REPLICA_FOLLOWING && hub_now(h) >= r->steady_at && !txns_late(r) && names_attached(r))
            replica_enter(r, REPLICA_IN, "caught up");
        if (r->state == REPLICA_IN && r->drops && hub_now(h) - r->since > 60000)
            r->drops = 0;
    }
    txns_step(h);
    attach_step(h);
}

static bool busy(const struct hub *h)
{
    bool busy = h->opening || !TAILQ_EMPTY(&h->txns) || !TAILQ_EMPTY(&h->attaches) || h->closing;
    EACH_REPLICA(r, h)
    busy |= r->state != REPLICA_IN && r->state != REPLICA_REFUSED && r->state != REPLICA_DOWN;
    return busy;
}

static void on_tick(uv_timer_t *t);

static void on_soon(uv_timer_t *t)
{
    struct hub *h = t->data;
    step(h);
    bool quick = uv_timer_get_repeat(&h->tick) == HUB_TICK_MS;
    if (!h->handles && quick != busy(h))
        uv_timer_start(&h->tick, on_tick, quick ? HUB_IDLE_MS : HUB_TICK_MS, quick ? HUB_IDLE_MS : HUB_TICK_MS);
}

void hub_soon(struct hub *h)
{
    if (!h->handles && !uv_is_active((uv_handle_t *)&h->soon))
        uv_timer_start(&h->soon, on_soon, 0, 0);
}

static void hub_free(struct hub *h)
{
    void (*closed)(void *) = h->closed;
    void *arg = h->closed_arg;
    names_free(h);
    lanes_free(h);
    EACH_REPLICA(r, h)
    {
        free(r->address);
        free(r->list);
        free(r);
    }
    free(h);
    if (closed)
        closed(arg);
}

static void on_handle_closed(uv_handle_t *handle)
{
    struct hub *h = handle->data;
    if (!--h->handles)
        hub_free(h);
}

/* What was handed in may still be answered; then connections end, one after the other, and then this does. */
static void close_step(struct hub *h)
{
    bool over = hub_now(h) - h->closing_since > CLOSE_MS, connected = false;
    if (!over && (!TAILQ_EMPTY(&h->txns) || h->reads) && replica_source(h))
        return;
    EACH_REPLICA(r, h)
    {
        if (r->conn && r->state != REPLICA_DOWN) {
            struct conn *c = r->conn;
            replica_enter(r, REPLICA_DOWN, "closed here");
            EACH_REPLICA(o, h)
            if (o->round && round_uses(o->round, r))
                round_free(o->round);
            txns_lost(r);
            names_lost(r);
            conn_close(c, true, 0, NULL);
        }
        connected |= r->conn != NULL;
    }
    if (connected || !TAILQ_EMPTY(&h->txns) || !TAILQ_EMPTY(&h->attaches) || h->handles)
        return;
    h->handles = 2;
    uv_close((uv_handle_t *)&h->tick, on_handle_closed);
    uv_close((uv_handle_t *)&h->soon, on_handle_closed);
}

static void on_tick(uv_timer_t *t)
{
    struct hub *h = t->data;
    txns_tick(h);
    names_tick(h);
    step(h);
    if (h->closing)
        close_step(h);
}

static void hub_close(struct store *s, void (*done)(void *arg), void *arg)
{
    struct hub *h = hub_of(s);
    h->closing = true;
    h->closing_since = hub_now(h);
    h->closed = done;
    h->closed_arg = arg;
    hub_soon(h);
}

static const char *hub_dir(const struct store *s)
{
    (void)s;
    return NULL;
}

static const struct store_ops ops = {
    .close = hub_close,
    .dir = hub_dir,
    .attach = hub_attach,
    .lease_drop = hub_lease_drop,
    .lease_seen = hub_lease_seen,
    .txn_new = hub_txn_new,
    .txn_chain = hub_txn_chain,
    .txn_writer = hub_txn_writer,
    .txn_add = hub_txn_add,
    .txn_received = hub_txn_received,
    .txn_commit = hub_txn_commit,
    .txn_abort = hub_txn_abort,
    .ask_list = hub_ask_list,
    .ask_pin = hub_ask_pin,
    .pin_live = hub_pin_live,
    .pin_changed = hub_pin_changed,
    .pin_read = hub_pin_read,
    .pin_read_now = hub_pin_read_now,
    .pin_hash = hub_pin_hash,
    .pin_extents = hub_pin_extents,
    .unpin = hub_unpin,
    .remove = hub_remove,
};

/* The next address of the list; false at its end. */
static bool next_address(const char **at, char *to, size_t cap)
{
    if (!*at)
        return false;
    const char *end = strchrnul(*at, ',');
    snprintf(to, cap, "%.*s", (int)(end - *at), *at);
    *at = *end ? end + 1 : NULL;
    return true;
}

int hub_check(const char *url, char error[STORE_ERROR])
{
    const char *at = url + 4;
    char one[ADDR_TEXT];
    for (unsigned n = 0; next_address(&at, one, sizeof one); n++) {
        struct addr a;
        const char *before = url + 4;
        char other[ADDR_TEXT];
        if (addr_parse(&a, one) < 0) {
            snprintf(error, STORE_ERROR,
                     "%.200s: \"%.100s\" is not an address: hub:ADDR,ADDR..., each HOST:PORT, [V6]:PORT or unix:PATH",
                     url, one);
            return -EINVAL;
        }
        for (unsigned i = 0; i < n && next_address(&before, other, sizeof other); i++)
            if (!strcmp(one, other)) {
                snprintf(error, STORE_ERROR, "%.200s names %.100s twice: a copy beside itself is none", url, one);
                return -EINVAL;
            }
        if (n == HUB_REPLICAS) {
            snprintf(error, STORE_ERROR, "%.200s: a hub has at most %u replicas", url, HUB_REPLICAS);
            return -EINVAL;
        }
    }
    return 0;
}

int hub_open(struct store **out, uv_loop_t *loop, const char *url, const struct id *identity, const char *host,
             char error[STORE_ERROR])
{
    int err = hub_check(url, error);
    struct hub *h = err ? NULL : calloc(1, sizeof *h);
    if (!h)
        return err ? err : -ENOMEM;
    h->ops = &ops;
    h->loop = loop;
    h->identity = *identity;
    snprintf(h->host, sizeof h->host, "%s", host);
    h->fences = (uint64_t)time(NULL) << 24; /* numbers of an earlier hub do not come again */
    h->next_stream = STREAM_LANES;
    TAILQ_INIT(&h->attaches);
    TAILQ_INIT(&h->lanes);
    TAILQ_INIT(&h->txns);
    for (unsigned i = 0; i < HUB_BUCKETS; i++)
        TAILQ_INIT(&h->by_seq[i]);
    uv_timer_init(loop, &h->tick);
    uv_timer_init(loop, &h->soon);
    h->tick.data = h->soon.data = h;
    const char *at = url + 4;
    for (char one[ADDR_TEXT]; next_address(&at, one, sizeof one);) {
        struct replica *r = calloc(1, sizeof *r);
        if (!r || !(r->address = strdup(one)))
            abort(); /* at the start, with next to nothing allocated */
        r->hub = h;
        r->index = h->replicas_n;
        r->since = hub_now(h);
        TAILQ_INIT(&r->asks);
        h->replicas[h->replicas_n++] = r;
    }
    opening_begin(h);
    uv_timer_start(&h->tick, on_tick, 0, HUB_TICK_MS);
    *out = (struct store *)(void *)h;
    return 0;
}
