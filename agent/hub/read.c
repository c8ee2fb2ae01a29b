/* What clients ask besides epochs: of one replica that is in; REMOVE of all. A pin belongs to the connection to the
 * replica that keeps it: when that is lost, what is asked of it fails, and the client pins anew. */
#include "agent/hub/inside.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct hub_pin {
    struct store *s; /* first: see seam.h */
    struct replica *replica;
    uint64_t life;
    uint32_t pin;
};

/* One request of a client's. */
struct query {
    struct hub *hub;
    char name[NAME_CAP];
    unsigned asked;
    bool some, force, removes;
    int err;
    char text[STORE_ERROR];
    store_each *each;
    void (*done)(void *arg, int err, const char *text);
    store_pin_done *pinned;
    void (*read)(void *arg, int err, struct buf *data);
    struct buf *data; /* of it, as far as it has come */
    void *arg;
};

static struct query *query_new(struct store *s, void *arg)
{
    struct query *q = calloc(1, sizeof *q);
    if (!q)
        abort(); /* see ask_put */
    q->hub = hub_of(s);
    q->arg = arg;
    q->hub->reads++;
    return q;
}

static void query_free(struct query *q)
{
    q->hub->reads--;
    free(q);
}

static void failed(struct query *q, uint8_t type, const struct buf *p)
{
    q->err = type == FRAME_FAILED ? replica_failed(p, q->text, sizeof q->text) : -EIO;
    if (type != FRAME_FAILED)
        snprintf(q->text, sizeof q->text, "the hub lost the replica that it asked: try again");
}

static int none_in(const struct hub *h, char *text, size_t cap)
{
    hub_why_none(h, text, cap);
    return -EIO;
}

/* What it says of leases is about this hub's; whose they are, this hub knows. */
static void entry_tell(struct query *q, struct frame_entry *e)
{
    const struct hub_name *n = name_of(q->hub, e->name);
    if (n && name_leased(q->hub, n)) {
        e->leased = 1;
        snprintf(e->holder, sizeof e->holder, "%s", n->holder->host);
    }
    q->each(q->arg, e);
}

static void on_listed(void *arg, struct replica *r, uint8_t type, const struct buf *p)
{
    struct query *q = arg;
    uint32_t request;
    struct frame_entry e;
    (void)r;
    if (type == FRAME_ENTRY) {
        if (!frame_entry_get(p->data, p->len, &request, &e))
            entry_tell(q, &e);
        return;
    }
    if (type != FRAME_LIST_END)
        failed(q, type, p);
    q->done(q->arg, q->err, q->text);
    query_free(q);
}

/* Those who ask while the hub opens wait for it, on its clock. */
static void when_open(uv_timer_t *t);

static void on_waited(uv_handle_t *t)
{
    free(t);
}

static void ask_now(struct query *q);

static void wait_open(struct query *q)
{
    uv_timer_t *t = malloc(sizeof *t);
    if (!t)
        abort(); /* see ask_put */
    uv_timer_init(q->hub->loop, t);
    t->data = q;
    uv_timer_start(t, when_open, 0, 20);
}

static void when_open(uv_timer_t *t)
{
    struct query *q = t->data;
    const struct hub *h = q->hub;
    if (h->opening && !h->closing && hub_now(h) - h->opening_since < HUB_OPEN_MS + 500)
        return;
    if (q->removes && !h->opening && !hub_complete(h) && hub_now(h) - h->opened_at < HUB_OPEN_MS)
        return; /* it would be left on those who are about to come in */
    uv_close((uv_handle_t *)t, on_waited);
    ask_now(q);
}

static void on_pinned(void *arg, struct replica *r, uint8_t type, const struct buf *p)
{
    struct query *q = arg;
    uint32_t request, pin;
    struct frame_entry e;
    struct hub_pin *one = NULL;
    if (type != FRAME_PINNED || frame_pinned_get(p->data, p->len, &request, &pin, &e))
        failed(q, type, p);
    else if ((one = malloc(sizeof *one)))
        *one = (struct hub_pin){.s = (struct store *)(void *)q->hub, .replica = r, .life = r->life, .pin = pin};
    else
        q->err = -ENOMEM;
    q->pinned(q->arg, q->err, (struct store_pin *)(void *)one, &e, q->text);
    query_free(q);
}

/* Removed where it is; who is not in still has it when it comes back, and is then told to be an older copy. */
static void on_removed(void *arg, struct replica *r, uint8_t type, const struct buf *p)
{
    struct query *q = arg;
    (void)r;
    q->some |= type == FRAME_OK;
    if (type != FRAME_OK && !q->err)
        failed(q, type, p);
    if (--q->asked)
        return;
    struct hub_name *n = name_of(q->hub, q->name);
    if (q->some && n) {
        if (lineage_find(q->hub, &n->lineage))
            lineage_note(q->hub, &n->lineage, 0, true);
        n->lineage = (struct id){{0}};
        n->holder = NULL;
        memset(n->there, 0, sizeof n->there);
    }
    q->done(q->arg, q->some ? 0 : q->err == -ESTALE ? -EBUSY : q->err, q->text);
    query_free(q);
}

static void remove_now(struct query *q)
{
    struct hub *h = q->hub;
    struct hub_name *n = name_of(h, q->name);
    q->asked = 1;
    if (n && !q->force && name_leased(h, n)) {
        q->err = -EBUSY;
        snprintf(q->text, sizeof q->text, "%.250s is being written by %.150s", q->name, n->holder->host);
    } else if (!replica_source(h)) {
        q->err = none_in(h, q->text, sizeof q->text);
    } else {
        EACH_REPLICA(r, h)
        if (r->state == REPLICA_IN || r->state == REPLICA_FOLLOWING) {
            q->asked++;
            replica_ask_name(r, FRAME_REMOVE, q->name, q->force, on_removed, q);
        }
    }
    if (--q->asked)
        return;
    q->done(q->arg, q->err, q->text);
    query_free(q);
}

static void ask_now(struct query *q)
{
    if (q->removes) {
        remove_now(q);
        return;
    }
    struct replica *r = replica_source(q->hub);
    uint8_t payload[4];
    if (!r)
        q->err = none_in(q->hub, q->text, sizeof q->text);
    if (r && q->pinned) {
        replica_ask_name(r, FRAME_PIN, q->name, -1, on_pinned, q);
    } else if (r) {
        replica_ask(r, STREAM_OWN, FRAME_LIST, payload, sizeof payload, on_listed, q);
    } else if (q->pinned) {
        q->pinned(q->arg, q->err, NULL, NULL, q->text);
        query_free(q);
    } else {
        q->done(q->arg, q->err, q->text);
        query_free(q);
    }
}

int hub_ask_list(struct store *s, store_each *each, void (*done)(void *arg, int err, const char *text), void *arg)
{
    struct query *q = query_new(s, arg);
    q->each = each;
    q->done = done;
    wait_open(q);
    return -EINPROGRESS;
}

int hub_ask_pin(struct store *s, const char *name, struct store_pin **pin, struct frame_entry *e, store_pin_done *done,
                void *arg)
{
    struct query *q = query_new(s, arg);
    (void)pin;
    (void)e;
    snprintf(q->name, sizeof q->name, "%s", name);
    q->pinned = done;
    wait_open(q);
    return -EINPROGRESS;
}

static struct hub_pin *pin_of(struct store_pin *pin)
{
    return (struct hub_pin *)(void *)pin;
}

static bool pin_lives(const struct hub_pin *pin)
{
    return pin->replica->greeted && pin->replica->life == pin->life;
}

/* READ and HASH: one answer, of one frame or several. */
static void on_read(void *arg, struct replica *r, uint8_t type, const struct buf *p)
{
    struct query *q = arg;
    struct frame_data d = {.kind = 0};
    (void)r;
    if (type == FRAME_HASHES && p->len >= 8)
        d = (struct frame_data){.len = p->len - 8, .data = p->data + 8};
    else if (type != FRAME_DATA || frame_data_get(p->data, p->len, &d) < 0)
        failed(q, type, p);
    if (!q->err && d.len > q->data->cap - q->data->len)
        q->err = -EPROTO;
    if (!q->err) {
        if (d.data)
            memcpy(q->data->data + q->data->len, d.data, d.len);
        else
            memset(q->data->data + q->data->len, 0, d.len);
        q->data->len += d.len;
    }
    if (type == FRAME_DATA && p->len >= FRAME_DATA_HEAD && p->data[4] & FRAME_DATA_MORE)
        return;
    if (q->err) {
        buf_drop(q->data);
        q->data = NULL;
    }
    q->read(q->arg, q->err, q->data);
    query_free(q);
}

static void lost_pin(uv_timer_t *t)
{
    struct query *q = t->data;
    uv_close((uv_handle_t *)t, on_waited);
    buf_drop(q->data);
    q->read(q->arg, -EIO, NULL);
    query_free(q);
}

static struct query *pin_query(struct hub_pin *pin, size_t bytes, void (*done)(void *arg, int err, struct buf *data),
                               void *arg)
{
    struct query *q = query_new(pin->s, arg);
    q->read = done;
    q->data = buf_new(bytes);
    if (!q->data)
        abort(); /* see ask_put */
    if (pin_lives(pin))
        return q;
    uv_timer_t *t = malloc(sizeof *t);
    if (!t)
        abort(); /* see ask_put */
    uv_timer_init(q->hub->loop, t);
    t->data = q;
    uv_timer_start(t, lost_pin, 0, 0);
    return NULL;
}

void hub_pin_read(struct store_pin *store_pin, uint64_t offset, uint32_t len, uint32_t room,
                  void (*done)(void *arg, int err, struct buf *data), void *arg)
{
    struct hub_pin *pin = pin_of(store_pin);
    struct query *q = pin_query(pin, (size_t)room + len, done, arg);
    uint8_t payload[20];
    if (!q)
        return;
    q->data->len = room;
    put_u32(payload + 4, pin->pin);
    put_u64(payload + 8, offset);
    put_u32(payload + 16, len);
    replica_ask(pin->replica, STREAM_READ, FRAME_READ, payload, sizeof payload, on_read, q);
}

void hub_pin_hash(struct store_pin *store_pin, unsigned level, uint64_t first, uint32_t count, bool fresh,
                  void (*done)(void *arg, int err, struct buf *data), void *arg)
{
    struct hub_pin *pin = pin_of(store_pin);
    struct query *q = pin_query(pin, (size_t)count * FRAME_HASH_BYTES, done, arg);
    struct frame_hash h = {.pin = pin->pin, .first = first, .count = count, .level = (uint8_t)level, .fresh = fresh};
    uint8_t payload[64];
    if (q)
        replica_ask(pin->replica, STREAM_READ, FRAME_HASH, payload, frame_hash_put(payload, sizeof payload, &h),
                    on_read, q);
}

/* Its reads go to one replica, and which one has the last epoch is known only while it is up: a writer's pages could not
 * be asked for any more when it goes. */
/* The replicas that the two were made at need not be the same. */
int hub_pin_changed(struct store_pin *pin, struct store_pin *later,
                    void (*done)(void *arg, int err, struct buf *data), void *arg)
{
    (void)pin;
    (void)later;
    (void)done;
    (void)arg;
    return -EOPNOTSUPP;
}

int hub_pin_live(struct store_pin *pin, const struct id *owner)
{
    (void)pin;
    (void)owner;
    return -EOPNOTSUPP;
}

void hub_unpin(struct store_pin *store_pin)
{
    struct hub_pin *pin = pin_of(store_pin);
    uint8_t payload[4];
    put_u32(payload, pin->pin);
    if (pin_lives(pin))
        replica_send(pin->replica, STREAM_OWN, FRAME_UNPIN, payload, sizeof payload);
    free(pin);
}

void hub_remove(struct store *s, const char *name, const struct id *identity, bool force,
                void (*done)(void *arg, int err, const char *text), void *arg)
{
    struct query *q = query_new(s, arg);
    const struct hub_name *n = name_of(q->hub, name);
    snprintf(q->name, sizeof q->name, "%s", name);
    q->removes = true;
    q->force = force || (n && name_lease_good(q->hub, n, identity));
    q->done = done;
    wait_open(q);
}

struct buf *hub_pin_read_now(struct store_pin *pin, uint64_t offset, uint32_t len, uint32_t room)
{
    (void)pin;
    (void)offset;
    (void)len;
    (void)room;
    return NULL;
}

/* The wire does not ask for holes. */
int hub_pin_extents(struct store_pin *pin, uint64_t offset, uint32_t len,
                    void (*done)(void *arg, int err, struct buf *extents), void *arg)
{
    (void)pin;
    (void)offset;
    (void)len;
    (void)done;
    (void)arg;
    return -ENOTSUP;
}
