/* What a session is asked besides epochs: LIST, PIN, READ, HASH, CHANGED, UNPIN, REMOVE. Every request has one answer, FAILED at
 * worst, and at most SESSION_REQUESTS are under way. READ goes on in session_data.c. */
#include "agent/net/server_private.h"

#include <errno.h>
#include <stdlib.h>

void session_refuse(struct session *s, uint32_t stream, uint32_t number, int err, const char *text)
{
    session_failed(s, stream, number, frame_code_from(err), text && *text ? text : strerror(-err));
}

void session_refuse_read(struct session *s, uint32_t stream, uint32_t number, int err)
{
    if (err == -ESTALE)
        session_refuse(s, stream, number, -ENOBUFS, "another host has written the region since");
    else
        session_refuse(s, stream, number, err,
                       err == -ENOBUFS ? "the pinned epoch could not be kept: too much was overwritten since" : NULL);
}

struct request *session_request_new(struct session *s, uint32_t stream, uint32_t number, struct pin *pin)
{
    struct request *r = s->requests_n < SESSION_REQUESTS ? malloc(sizeof *r) : NULL;
    if (!r) {
        session_refuse(s, stream, number, -ENOBUFS, "too many requests at once");
        return NULL;
    }
    *r = (struct request){.session = s, .server = s->server, .pin = pin, .stream = stream, .number = number};
    TAILQ_INSERT_TAIL(&s->requests, r, link);
    s->requests_n++;
    s->server->work++;
    if (pin)
        pin->running++;
    return r;
}

static void pin_look(struct server *server, struct pin *p)
{
    if (!p->doomed || p->running)
        return;
    pinned_drop(server, p->of, p->lost);
    free(p);
}

void session_request_free(struct request *r)
{
    struct session *s = r->session;
    struct server *server = r->server;
    if (r->pin) {
        r->pin->running--;
        pin_look(server, r->pin);
    }
    if (s) {
        TAILQ_REMOVE(&s->requests, r, link);
        s->requests_n--;
    }
    free(r);
    server->work--;
    if (s)
        session_look(s);
    server_look(server);
}

struct pin **session_pin_slot(struct session *s, uint32_t id)
{
    for (unsigned i = 0; i < SESSION_PINS; i++)
        if (id ? s->pins[i] && s->pins[i]->id == id : !s->pins[i])
            return &s->pins[i];
    return NULL;
}

static void list_entry(void *arg, const struct frame_entry *e)
{
    const struct request *r = arg;
    uint8_t payload[sizeof *e + 64];
    if (r->session && session_may(r->session, e->name, GRANT_READ))
        session_reply(r->session, r->stream, FRAME_ENTRY, payload,
                      frame_entry_put(payload, sizeof payload, r->number, e));
}

static void on_listed(void *arg, int err, const char *text)
{
    struct request *r = arg;
    uint8_t payload[4];
    put_u32(payload, r->number);
    if (r->session && err < 0)
        session_refuse(r->session, r->stream, r->number, err, text);
    else if (r->session)
        session_reply(r->session, r->stream, FRAME_LIST_END, payload, sizeof payload);
    session_request_free(r);
}

static void request_list(struct session *s, uint32_t stream, uint32_t number)
{
    struct request *r = session_request_new(s, stream, number, NULL);
    if (r && store_ask_list(s->server->store, list_entry, on_listed, r) == 0)
        on_listed(r, 0, "");
}

static void pin_answer(struct request *r, struct pinned *of)
{
    struct session *s = r->session;
    struct pin **slot = session_pin_slot(s, 0), *p = slot ? calloc(1, sizeof *p) : NULL;
    if (!p) {
        pinned_drop(s->server, of, false);
        session_refuse(s, r->stream, r->number, -ENOBUFS, "too many pinned regions on one connection");
        return;
    }
    p->id = ++s->last_pin ? s->last_pin : ++s->last_pin;
    p->of = of;
    *slot = p;
    uint8_t payload[sizeof of->entry + 64];
    size_t len = frame_pinned_put(payload, sizeof payload, r->number, p->id, &of->entry);
    session_reply(s, r->stream, FRAME_PINNED, payload, len);
    if (r->keep)
        conn_set_priority(s->conn, r->stream, CONN_URGENT);
    if (r->head && of->entry.size)
        session_read(s, r->stream, p, &(struct frame_read){.request = r->number, .len = r->head});
}

static void on_pinned(void *arg, int err, struct store_pin *pin, const struct frame_entry *e, const char *text)
{
    struct request *r = arg;
    struct session *s = r->session;
    bool own = r->live && id_same(&e->writer, &s->peer.identity);
    if (!err && s && r->epoch && ((e->epoch != r->epoch && !own) || !id_same(&e->lineage, &r->lineage))) {
        err = -ENOBUFS;
        text = "that epoch is not kept any more";
        store_unpin(pin);
    } else if (!err && s && r->live && (err = store_pin_live(pin, &s->peer.identity))) {
        store_unpin(pin);
        text = "this server is a hub: regions cannot be written through it where they are only partly fetched; name one of its replicas";
    } else if (!err && s) {
        struct pinned *of = pinned_new(s->server, pin, e, &s->peer.identity, r->keep && !r->live);
        if (of) {
            of->live = r->live;
            pin_answer(r, of);
        } else {
            err = -ENOMEM;
        }
    } else if (!err) {
        store_unpin(pin);
    }
    if (s && err)
        session_refuse(s, r->stream, r->number, err, text);
    session_request_free(r);
}

static void request_pin(struct session *s, uint32_t stream, const struct buf *payload)
{
    static struct frame_pin f;
    static struct frame_entry e;
    struct store_pin *pin = NULL;
    if (frame_pin_get(payload->data, payload->len, &f) < 0) {
        session_violated(s, "a PIN out of form");
        return;
    }
    const char *denied = name_fault(f.name) ? NULL : session_denied(s, f.name, GRANT_READ);
    if (denied) {
        session_refuse(s, stream, f.request, -EACCES, denied);
        return;
    }
    struct request *r = session_request_new(s, stream, f.request, NULL);
    if (!r)
        return;
    r->keep = f.keep;
    r->live = f.live;
    r->epoch = f.epoch;
    r->lineage = f.lineage;
    r->head = f.head;
    struct pinned *of = f.epoch && !f.live ? pinned_find(s->server, &s->peer.identity, f.name, f.epoch, &f.lineage) : NULL;
    if (of) {
        pinned_hold(s->server, of);
        pin_answer(r, of);
        session_request_free(r);
        return;
    }
    int rc = name_fault(f.name) ? -EINVAL : store_ask_pin(s->server->store, f.name, &pin, &e, on_pinned, r);
    if (rc != -EINPROGRESS)
        on_pinned(r, rc, pin, &e, rc == -ENOENT ? "no such region" : name_fault(f.name));
}

static void on_hashes(void *arg, int err, struct buf *data)
{
    struct request *r = arg;
    struct session *s = r->session;
    if (s && err < 0) {
        session_refuse_read(s, r->stream, r->number, err);
    } else if (s && r->stream) {
        uint32_t len = data ? data->len : 0;
        struct buf *b = buf_new(8 + len);
        if (b) {
            put_u32(b->data, r->number);
            put_u32(b->data + 4, len / 16);
            if (len)
                memcpy(b->data + 8, data->data, len);
            b->len = 8 + len;
            conn_send(s->conn, r->stream, FRAME_HASHES, b);
        } else {
            session_refuse(s, r->stream, r->number, -ENOBUFS, "no memory for an answer");
        }
    }
    buf_drop(data);
    session_request_free(r);
}

static void changed_answer(struct request *r, int err, struct buf *data)
{
    struct session *s = r->session;
    struct buf *b = data;
    if (err == -EOPNOTSUPP && (b = buf_new(FRAME_EXTENTS_HEAD))) {
        b->len = FRAME_EXTENTS_HEAD;
        frame_extents_head(b->data, 0, true, 0);
    }
    if (s && r->stream && b) {
        put_u32(b->data, r->number);
        conn_send(s->conn, r->stream, FRAME_EXTENTS, b);
    } else if (s && err) {
        if (err == -ESTALE)
            session_refuse(s, r->stream, r->number, -EEXIST, "the pins are not of one region, the later one second");
        else
            session_refuse(s, r->stream, r->number, err, NULL);
        buf_drop(b);
    } else {
        buf_drop(b);
    }
    session_request_free(r);
}

static void on_changed(void *arg, int err, struct buf *data)
{
    changed_answer(arg, err, data);
}

static void request_changed(struct session *s, uint32_t stream, const struct buf *payload)
{
    struct rd rd = rd_over(payload->data, payload->len);
    uint32_t number = rd_u32(&rd), pins[2] = {rd_u32(&rd), rd_u32(&rd)};
    if (rd.bad || rd_left(&rd)) {
        session_violated(s, "a CHANGED out of form");
        return;
    }
    struct pin **old = pins[0] ? session_pin_slot(s, pins[0]) : NULL;
    struct pin **later = pins[1] ? session_pin_slot(s, pins[1]) : NULL;
    if (!old || !later) {
        session_refuse(s, stream, number, -ENOENT, "no such pin");
        return;
    }
    struct request *r = session_request_new(s, stream, number, *old);
    int rc = r ? store_pin_changed((*old)->of->pin, (*later)->of->pin, on_changed, r) : 0;
    if (rc)
        changed_answer(r, rc, NULL);
}

static void on_removed(void *arg, int err, const char *text)
{
    struct request *r = arg;
    uint8_t payload[4];
    put_u32(payload, r->number);
    if (r->session && err == -EBUSY)
        session_refuse(r->session, r->stream, r->number, -ESTALE, text);
    else if (r->session && err < 0)
        session_refuse(r->session, r->stream, r->number, err, text);
    else if (r->session)
        session_reply(r->session, r->stream, FRAME_OK, payload, sizeof payload);
    session_request_free(r);
}

static void request_hash(struct session *s, uint32_t stream, const struct buf *payload)
{
    struct frame_hash h;
    if (frame_hash_get(payload->data, payload->len, &h) < 0) {
        session_violated(s, "a HASH out of form");
        return;
    }
    struct pin **p = h.pin ? session_pin_slot(s, h.pin) : NULL;
    if (!p) {
        session_refuse(s, stream, h.request, -ENOENT, "no such pin");
        return;
    }
    struct request *r = session_request_new(s, stream, h.request, *p);
    if (r)
        store_pin_hash(r->pin->of->pin, h.level, h.first, h.count, h.fresh, on_hashes, r);
}

static void request_remove(struct session *s, uint32_t stream, uint32_t number, const char *name, bool force)
{
    if (name_fault(name)) {
        session_refuse(s, stream, number, -EINVAL, name_fault(name));
        return;
    }
    const char *denied = session_denied(s, name, GRANT_ADMIN);
    if (denied) {
        session_refuse(s, stream, number, -EACCES, denied);
        return;
    }
    struct request *r = session_request_new(s, stream, number, NULL);
    if (r)
        store_remove(s->server->store, name, &s->peer.identity, force, on_removed, r);
}

static void pin_give_back(struct session *s, struct pin **slot, bool lost)
{
    struct pin *p = *slot;
    *slot = NULL;
    p->doomed = true;
    p->lost = lost;
    pin_look(s->server, p);
}

void session_request_frame(struct session *s, uint32_t stream, uint8_t type, struct buf *payload)
{
    char name[NAME_CAP];
    struct rd rd = rd_over(payload->data, payload->len);
    if (type == FRAME_HASH) {
        request_hash(s, stream, payload);
        return;
    }
    if (type == FRAME_CHANGED) {
        request_changed(s, stream, payload);
        return;
    }
    if (type == FRAME_READ) {
        session_read_frame(s, stream, payload);
        return;
    }
    if (type == FRAME_PIN) {
        request_pin(s, stream, payload);
        return;
    }
    uint32_t number = rd_u32(&rd);
    if (type == FRAME_REMOVE)
        rd_str(&rd, name, sizeof name);
    bool force = type == FRAME_REMOVE && rd_u8(&rd);
    if (rd.bad || rd_left(&rd)) {
        session_violated(s, "a request out of form");
    } else if (type == FRAME_LIST) {
        request_list(s, stream, number);
    } else if (type == FRAME_REMOVE) {
        request_remove(s, stream, number, name, force);
    } else { /* UNPIN, which names the pin */
        struct pin **p = number ? session_pin_slot(s, number) : NULL;
        if (p)
            pin_give_back(s, p, false);
    }
}

void session_request_drop(struct session *s, uint32_t stream)
{
    struct request *r;
    TAILQ_FOREACH(r, &s->requests, link)
    if (r->stream == stream)
        r->stream = 0;
}

void session_request_orphan(struct session *s)
{
    struct request *r;
    session_read_orphan(s);
    while ((r = TAILQ_FIRST(&s->requests))) {
        TAILQ_REMOVE(&s->requests, r, link);
        r->session = NULL;
    }
    s->requests_n = 0;
    for (unsigned i = 0; i < SESSION_PINS; i++)
        if (s->pins[i])
            pin_give_back(s, &s->pins[i], true);
}
