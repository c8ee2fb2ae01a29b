/* One replica's connection: dialled for as long as it takes, and what is asked over it.
 *
 * Requests carry a number that the answer repeats; ATTACH is known by its handle. Whoever asked gets each frame of the
 * answer, or, when the connection ends first, one call that says so; never both, and never from within replica_ask. */
#include "agent/hub/inside.h"

#include "agent/base/log.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define BACKOFF_MIN_MS 100u
#define BACKOFF_MAX_MS 5000u

static const char *const state_texts[] = {"down", "connecting", "behind", "following", "in", "refused"};

const char *replica_state_text(const struct replica *r)
{
    return state_texts[r->state];
}

struct replica *replica_source(const struct hub *h)
{
    EACH_REPLICA(r, h)
    if (r->state == REPLICA_IN)
        return r;
    return NULL;
}

static unsigned others_in(const struct replica *r)
{
    unsigned n = 0;
    EACH_REPLICA(o, r->hub)
    n += o != r && o->state == REPLICA_IN;
    return n;
}

void replica_enter(struct replica *r, enum replica_state state, const char *why)
{
    if (r->state == state)
        return;
    bool matters = r->state == REPLICA_IN || r->told_down;
    double since = (double)(hub_now(r->hub) - r->since) / 1000;
    if (state == REPLICA_IN && r->told_down)
        log_warn("hub: %s is in again (%s)", r->address, why);
    else if (state == REPLICA_DOWN && r->state == REPLICA_IN && !r->hub->closing)
        log_warn("hub: %s, in for %.1f s, is out: %s; %u of %u replicas are in", r->address, since, why, others_in(r),
                 r->hub->replicas_n);
    else
        log_at(LOG_INFO, "hub: %s: %s (%s, for %.1f s before)", r->address, state_texts[state], why, since);
    if (state == REPLICA_IN)
        r->told_down = false;
    else if (matters)
        r->told_down = true;
    r->state = state;
    r->since = hub_now(r->hub);
    snprintf(r->reason, sizeof r->reason, "%s", why);
    hub_soon(r->hub);
}

/* Requests */

static void ask_put(struct replica *r, struct ask a)
{
    struct ask *one = malloc(sizeof *one);
    if (!one)
        abort(); /* there is no way to tell the one who asks, and nothing here outlives the process */
    *one = a;
    TAILQ_INSERT_TAIL(&r->asks, one, link);
}

void replica_send(struct replica *r, uint32_t stream, uint8_t type, const void *payload, size_t len)
{
    struct buf *b = buf_new(len);
    if (!b)
        abort(); /* see ask_put */
    memcpy(b->data, payload, len);
    b->len = (uint32_t)len;
    conn_send(r->conn, stream, type, b);
}

void replica_ask(struct replica *r, uint32_t stream, uint8_t type, void *payload, size_t len, ask_answer *answer,
                 void *arg)
{
    put_u32(payload, ++r->next_request);
    ask_put(r, (struct ask){.number = r->next_request, .stream = stream, .answer = answer, .arg = arg});
    replica_send(r, stream, type, payload, len);
}

void replica_ask_name(struct replica *r, uint8_t type, const char *name, int force, ask_answer *answer, void *arg)
{
    uint8_t payload[NAME_CAP + 16];
    struct wr w = wr_over(payload, sizeof payload);
    wr_u32(&w, 0);
    wr_str(&w, name);
    if (force >= 0)
        wr_u8(&w, (uint8_t)force);
    replica_ask(r, STREAM_OWN, type, payload, wr_len(&w), answer, arg);
}

void replica_ask_attach(struct replica *r, uint32_t stream, uint32_t handle, const char *name, bool write,
                        ask_answer *answer, void *arg)
{
    struct frame_attach a = {.handle = handle, .write = write};
    uint8_t payload[NAME_CAP + 16];
    snprintf(a.name, sizeof a.name, "%s", name);
    ask_put(r, (struct ask){.attach = true, .number = handle, .stream = stream, .answer = answer, .arg = arg});
    replica_send(r, stream, FRAME_ATTACH, payload, frame_attach_put(payload, sizeof payload, &a));
}

static void nobody(void *arg, struct replica *r, uint8_t type, const struct buf *p)
{
    (void)arg;
    (void)r;
    (void)type;
    (void)p;
}

void replica_forget(struct replica *r, const void *arg)
{
    struct ask *a;
    TAILQ_FOREACH(a, &r->asks, link)
    if (a->arg == arg)
        a->answer = nobody;
}

int replica_failed(const struct buf *p, char *text, size_t cap)
{
    struct frame_failed f;
    if (frame_failed_get(p->data, p->len, &f) < 0)
        return -EPROTO;
    snprintf(text, cap, "%s", f.text);
    return frame_code_errno(f.code);
}

static void answered(struct replica *r, bool attach, uint32_t number, bool last, uint8_t type, const struct buf *p)
{
    struct ask *a;
    TAILQ_FOREACH(a, &r->asks, link)
    if (a->attach == attach && a->number == number)
        break;
    if (!a)
        return;
    if (!last) {
        a->answer(a->arg, r, type, p);
        return;
    }
    TAILQ_REMOVE(&r->asks, a, link);
    a->answer(a->arg, r, type, p);
    free(a);
}

static void asks_lost(struct replica *r)
{
    for (struct ask *a; (a = TAILQ_FIRST(&r->asks));) {
        TAILQ_REMOVE(&r->asks, a, link);
        a->answer(a->arg, r, 0, NULL);
        free(a);
    }
}

/* The connection's calls */

static void on_open(void *owner, const struct frame_hello *peer)
{
    struct replica *r = owner;
    (void)peer;
    r->greeted = true;
    r->backoff_ms = 0;
    conn_set_priority(r->conn, STREAM_OWN, CONN_URGENT);
    conn_set_priority(r->conn, STREAM_ROUND, CONN_BULK);
    replica_enter(r, REPLICA_BEHIND, "connected");
    if (r->hub->opening)
        opening_list(r);
}

static void on_frame(void *owner, uint32_t stream, uint8_t type, struct buf *p)
{
    struct replica *r = owner;
    bool round = stream == STREAM_ROUND, more;
    switch (type) {
    case FRAME_ATTACHED:
        answered(r, true, p->len >= 4 ? get_u32(p->data) : 0, true, type, p);
        break;
    case FRAME_DATA:
    case FRAME_HASHES:
        conn_credit(r->conn, stream, p->len);
        more = type == FRAME_DATA && p->len >= FRAME_DATA_HEAD && p->data[4] & FRAME_DATA_MORE;
        answered(r, false, p->len >= 4 ? get_u32(p->data) : 0, !more, type, p);
        break;
    case FRAME_ENTRY:
    case FRAME_LIST_END:
    case FRAME_PINNED:
    case FRAME_OK:
        answered(r, false, p->len >= 4 ? get_u32(p->data) : 0, type != FRAME_ENTRY, type, p);
        break;
    case FRAME_RECEIVED:
    case FRAME_DURABLE:
        if (round && r->round)
            round_answer(r->round, type, p);
        else if (!round)
            txn_answer(r, stream, type, p);
        break;
    case FRAME_FAILED: {
        struct frame_failed f;
        if (frame_failed_get(p->data, p->len, &f) < 0)
            conn_close(r->conn, false, FRAME_E_PROTOCOL, "malformed FAILED");
        else if (stream >= STREAM_LANES)
            txn_answer(r, stream, type, p);
        else if (round && f.seq >> 32) { /* epochs of rounds are numbered beyond any request */
            if (r->round)
                round_answer(r->round, type, p);
        } else
            answered(r, false, (uint32_t)f.seq, true, type, p);
        break;
    }
    case FRAME_CLOSE:
        break;
    default:
        conn_close(r->conn, false, FRAME_E_PROTOCOL, "a frame that a server does not send");
    }
    hub_soon(r->hub);
}

static void on_drained(void *owner, uint32_t stream)
{
    struct replica *r = owner;
    if (stream >= STREAM_LANES)
        txns_drained(r, stream);
    hub_soon(r->hub);
}

/* Nothing goes to it, and nothing of it counts, any more; its connection may still be closing. */
static void lost(struct replica *r)
{
    r->greeted = r->queueing = r->listing = r->listed = false;
    struct hub *h = r->hub;
    EACH_REPLICA(o, h)
    if (o->round && round_uses(o->round, r))
        round_free(o->round);
    txns_lost(r);
    names_lost(r);
    asks_lost(r);
    if (!h->opening && !replica_source(h))
        opening_begin(h);
}

static void on_closed(void *owner, int err, const char *why)
{
    struct replica *r = owner;
    struct hub *h = r->hub;
    r->conn = NULL;
    r->looked = true;
    if (r->state != REPLICA_DOWN && r->state != REPLICA_REFUSED) {
        bool never = r->state == REPLICA_DIALLING && !r->told_down && !h->closing;
        const char *text = why && *why ? why : strerror(-err);
        if (never)
            log_warn("hub: %s is not there: %s; dialled again and again", r->address, text);
        r->told_down |= never;
        r->backoff_ms = !r->backoff_ms                       ? BACKOFF_MIN_MS
                        : r->backoff_ms * 2 > BACKOFF_MAX_MS ? BACKOFF_MAX_MS
                                                             : r->backoff_ms * 2;
        r->retry_at = hub_now(h) + r->backoff_ms;
        replica_enter(r, REPLICA_DOWN, text);
        lost(r);
    }
    hub_soon(h);
}

static const struct conn_ops ops = {.open = on_open, .frame = on_frame, .drained = on_drained, .closed = on_closed};

static void leave(struct replica *r, enum replica_state state, const char *why, unsigned again_ms)
{
    bool refused = state == REPLICA_REFUSED;
    r->retry_at = hub_now(r->hub) + again_ms;
    if (refused && r->greeted)
        names_give_back(r); /* or whoever is to make way for us there would find it leased to us */
    replica_enter(r, state, why);
    lost(r);
    if (r->conn)
        conn_close(r->conn, refused, 0, NULL);
}

void replica_drop(struct replica *r, bool slow, const char *format, ...)
{
    char why[sizeof r->reason];
    va_list ap;
    if (r->state == REPLICA_DOWN || r->state == REPLICA_REFUSED)
        return;
    va_start(ap, format);
    vsnprintf(why, sizeof why, format, ap);
    va_end(ap);
    r->drops += slow;
    leave(r, REPLICA_DOWN, why, slow ? BACKOFF_MIN_MS : 1000);
}

void replica_refuse(struct replica *r, const char *format, ...)
{
    char why[sizeof r->reason];
    va_list ap;
    va_start(ap, format);
    vsnprintf(why, sizeof why, format, ap);
    va_end(ap);
    if (strcmp(why, r->said)) {
        log_warn("hub: %s takes no part: %s", r->address, why);
        snprintf(r->said, sizeof r->said, "%s", why);
    }
    r->looked = r->told_down = true;
    leave(r, REPLICA_REFUSED, why, HUB_RETRY_MS);
}

void replica_tick(struct replica *r)
{
    struct hub *h = r->hub;
    if (r->conn || h->closing || hub_now(h) < r->retry_at)
        return;
    struct frame_hello self = {.version = FRAME_VERSION, .identity = h->identity};
    snprintf(self.host, sizeof self.host, "%s", h->host);
    r->life = ++h->lives;
    replica_enter(r, REPLICA_DIALLING, "dialled");
    r->conn = conn_dial(h->loop, r->address, &self, &ops, r);
    if (!r->conn) {
        r->retry_at = hub_now(h) + BACKOFF_MAX_MS;
        replica_enter(r, REPLICA_DOWN, "no memory");
    }
}
