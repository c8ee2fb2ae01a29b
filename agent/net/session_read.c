/* What a session is asked besides epochs: LIST, PIN, READ, HASH, UNPIN, REMOVE. Every request has one answer, FAILED at
 * worst, and at most SESSION_REQUESTS are under way. */
#include "agent/net/server_private.h"

#include <errno.h>
#include <stdlib.h>

static void refuse(struct session *s, uint32_t stream, uint32_t number, int err, const char *text)
{
    session_failed(s, stream, number, frame_code_from(err), text && *text ? text : strerror(-err));
}

static struct request *request_new(struct session *s, uint32_t stream, uint32_t number, struct pin *pin)
{
    struct request *r = s->requests_n < SESSION_REQUESTS ? malloc(sizeof *r) : NULL;
    if (!r) {
        refuse(s, stream, number, -ENOBUFS, "too many requests at once");
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

static void request_free(struct request *r)
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

static struct pin **pin_slot(struct session *s, uint32_t id)
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
    if (r->session)
        session_reply(r->session, r->stream, FRAME_ENTRY, payload,
                      frame_entry_put(payload, sizeof payload, r->number, e));
}

static void on_listed(void *arg, int err, const char *text)
{
    struct request *r = arg;
    uint8_t payload[4];
    put_u32(payload, r->number);
    if (r->session && err < 0)
        refuse(r->session, r->stream, r->number, err, text);
    else if (r->session)
        session_reply(r->session, r->stream, FRAME_LIST_END, payload, sizeof payload);
    request_free(r);
}

static void request_list(struct session *s, uint32_t stream, uint32_t number)
{
    struct request *r = request_new(s, stream, number, NULL);
    if (r && store_ask_list(s->server->store, list_entry, on_listed, r) == 0)
        on_listed(r, 0, "");
}

static void read_begin(struct session *s, uint32_t stream, uint32_t number, struct pin *pin, uint64_t offset,
                       uint32_t len);

static void pin_answer(struct request *r, struct pinned *of)
{
    struct session *s = r->session;
    struct pin **slot = pin_slot(s, 0), *p = slot ? calloc(1, sizeof *p) : NULL;
    if (!p) {
        pinned_drop(s->server, of, false);
        refuse(s, r->stream, r->number, -ENOBUFS, "too many pinned regions on one connection");
        return;
    }
    p->id = ++s->last_pin ? s->last_pin : ++s->last_pin;
    p->of = of;
    *slot = p;
    uint8_t payload[sizeof of->entry + 64];
    size_t len = frame_pinned_put(payload, sizeof payload, r->number, p->id, &of->entry);
    session_reply(s, r->stream, FRAME_PINNED, payload, len);
    uint64_t size = of->entry.size;
    if (r->keep)
        conn_set_priority(s->conn, r->stream, CONN_URGENT);
    if (r->head && size)
        read_begin(s, r->stream, r->number, p, 0, size < r->head ? (uint32_t)size : r->head);
}

static void on_pinned(void *arg, int err, struct store_pin *pin, const struct frame_entry *e, const char *text)
{
    struct request *r = arg;
    struct session *s = r->session;
    if (!err && s && r->epoch && (e->epoch != r->epoch || !id_same(&e->lineage, &r->lineage))) {
        err = -ENOBUFS;
        text = "that epoch is not kept any more";
        store_unpin(pin);
    } else if (!err && s) {
        struct pinned *of = pinned_new(s->server, pin, e, &s->peer.identity, r->keep);
        if (of)
            pin_answer(r, of);
        else
            err = -ENOMEM;
    } else if (!err) {
        store_unpin(pin);
    }
    if (s && err)
        refuse(s, r->stream, r->number, err, text);
    request_free(r);
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
    struct request *r = request_new(s, stream, f.request, NULL);
    if (!r)
        return;
    r->keep = f.keep;
    r->epoch = f.epoch;
    r->lineage = f.lineage;
    r->head = f.head;
    struct pinned *of = f.epoch ? pinned_find(s->server, &s->peer.identity, f.name, f.epoch, &f.lineage) : NULL;
    if (of) {
        of->refs++;
        pin_answer(r, of);
        request_free(r);
        return;
    }
    int rc = name_fault(f.name) ? -EINVAL : store_ask_pin(s->server->store, f.name, &pin, &e, on_pinned, r);
    if (rc != -EINPROGRESS)
        on_pinned(r, rc, pin, &e, rc == -ENOENT ? "no such region" : name_fault(f.name));
}

static bool all_zero(const uint8_t *p, size_t len)
{
    return len && !p[0] && !memcmp(p, p + 1, len - 1);
}

/* One frame of what was read, from *at on; zeros as many as there are. False without memory. */
static bool data_send(struct request *r, const uint8_t *data, uint32_t *at, uint32_t end)
{
    uint32_t left = end - *at, len = left < FRAME_DATA_MAX ? left : FRAME_DATA_MAX;
    data = data ? data + *at : NULL;
    bool zeros = all_zero(data, len);
    while (zeros && len < left) {
        uint32_t more = left - len < FRAME_DATA_MAX ? left - len : FRAME_DATA_MAX;
        if (!all_zero(data + len, more))
            break;
        len += more;
    }
    struct buf *b = buf_new(FRAME_DATA_HEAD + (zeros ? 0 : len));
    if (!b)
        return false;
    frame_data_head(b->data, r->number, (uint8_t)((zeros ? FRAME_DATA_ZEROS : 0) | (len < left ? FRAME_DATA_MORE : 0)),
                    len);
    if (!zeros && len)
        memcpy(b->data + FRAME_DATA_HEAD, data, len);
    b->len = FRAME_DATA_HEAD + (zeros ? 0 : len);
    conn_send(r->session->conn, r->stream, FRAME_DATA, b);
    *at += len;
    return true;
}

static void on_data(void *arg, int err, struct buf *data)
{
    struct request *r = arg;
    struct session *s = r->session;
    if (s && err < 0) {
        refuse(s, r->stream, r->number, err,
               err == -ENOBUFS ? "the pinned epoch could not be kept: too much was overwritten since" : NULL);
    } else if (s && r->stream) {
        uint32_t len = data ? data->len : 0, at = 0;
        bool sent;
        do
            sent = data_send(r, data ? data->data : NULL, &at, len);
        while (sent && at < len);
        if (!sent)
            session_end(s, -ENOMEM, "no memory for an answer");
    }
    buf_drop(data);
    request_free(r);
}

static void read_begin(struct session *s, uint32_t stream, uint32_t number, struct pin *pin, uint64_t offset,
                       uint32_t len)
{
    struct request *r = request_new(s, stream, number, pin);
    if (r)
        store_pin_read(pin->of->pin, offset, len, on_data, r);
}

static void on_hashes(void *arg, int err, struct buf *data)
{
    struct request *r = arg;
    struct session *s = r->session;
    if (s && err < 0) {
        refuse(s, r->stream, r->number, err,
               err == -ENOBUFS ? "the pinned epoch could not be kept: too much was overwritten since" : NULL);
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
            refuse(s, r->stream, r->number, -ENOBUFS, "no memory for an answer");
        }
    }
    buf_drop(data);
    request_free(r);
}

static void on_removed(void *arg, int err, const char *text)
{
    struct request *r = arg;
    uint8_t payload[4];
    put_u32(payload, r->number);
    if (r->session && err == -EBUSY)
        refuse(r->session, r->stream, r->number, -ESTALE, text);
    else if (r->session && err < 0)
        refuse(r->session, r->stream, r->number, err, text);
    else if (r->session)
        session_reply(r->session, r->stream, FRAME_OK, payload, sizeof payload);
    request_free(r);
}

static void request_read(struct session *s, uint32_t stream, const struct buf *payload)
{
    struct frame_read f;
    if (frame_read_get(payload->data, payload->len, &f) < 0) {
        session_violated(s, "a READ out of form");
        return;
    }
    struct pin **p = f.pin ? pin_slot(s, f.pin) : NULL;
    if (!p) {
        refuse(s, stream, f.request, -ENOENT, "no such pin");
        return;
    }
    if (!f.len || f.len > FRAME_READ_MAX || f.offset > INT64_MAX) {
        refuse(s, stream, f.request, -EPROTO, "a READ of 0, of too many bytes, or from too far");
        return;
    }
    if (f.bulk != FRAME_READ_PLAIN)
        conn_set_priority(s->conn, stream, f.bulk == FRAME_READ_BULK ? CONN_BULK : CONN_URGENT);
    read_begin(s, stream, f.request, *p, f.offset, f.len);
}

static void request_hash(struct session *s, uint32_t stream, const struct buf *payload)
{
    struct frame_hash h;
    if (frame_hash_get(payload->data, payload->len, &h) < 0) {
        session_violated(s, "a HASH out of form");
        return;
    }
    struct pin **p = h.pin ? pin_slot(s, h.pin) : NULL;
    if (!p) {
        refuse(s, stream, h.request, -ENOENT, "no such pin");
        return;
    }
    struct request *r = request_new(s, stream, h.request, *p);
    if (r)
        store_pin_hash(r->pin->of->pin, h.level, h.first, h.count, h.fresh, on_hashes, r);
}

static void request_remove(struct session *s, uint32_t stream, uint32_t number, const char *name, bool force)
{
    if (name_fault(name)) {
        refuse(s, stream, number, -EINVAL, name_fault(name));
        return;
    }
    struct request *r = request_new(s, stream, number, NULL);
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
    if (type == FRAME_READ) {
        request_read(s, stream, payload);
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
        struct pin **p = number ? pin_slot(s, number) : NULL;
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
    while ((r = TAILQ_FIRST(&s->requests))) {
        TAILQ_REMOVE(&s->requests, r, link);
        r->session = NULL;
    }
    s->requests_n = 0;
    for (unsigned i = 0; i < SESSION_PINS; i++)
        if (s->pins[i])
            pin_give_back(s, &s->pins[i], true);
}
