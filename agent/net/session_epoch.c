/* Epochs of a session: from BEGIN to DURABLE. A failed one is answered at once by FAILED, and what still comes for it
 * up to its END is dropped, its pages credited, so that the stream stays in step; the client's later epochs then fail
 * by the store's own checks. */
#include "agent/net/pack.h"
#include "agent/net/server_private.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

static const char *name_of(void *arg, uint32_t handle)
{
    struct session *s = arg;
    struct handle *h = session_handle(s, handle);
    return h && !session_denied(s, h->name, GRANT_WRITE) ? h->name : NULL; /* a lease is of who HELLO claims to be */
}

static void credit(struct epoch *e, size_t bytes)
{
    if (bytes > e->owed)
        bytes = e->owed;
    e->owed -= bytes;
    if (e->session && e->lane->stream && bytes)
        conn_credit(e->session->conn, e->lane->stream, (uint32_t)bytes);
}

static void on_spilled(void *arg, size_t bytes)
{
    credit(arg, bytes);
}

static struct lane *lane_find(struct session *s, uint32_t stream)
{
    struct lane *l;
    TAILQ_FOREACH(l, &s->lanes[stream % SESSION_LANES], link)
    if (l->stream == stream)
        return l;
    return NULL;
}

static struct lane *lane_new(struct session *s, uint32_t stream)
{
    struct lane *l = calloc(1, sizeof *l);
    if (!l)
        return NULL;
    l->stream = stream;
    l->refs = 1;
    TAILQ_INSERT_HEAD(&s->lanes[stream % SESSION_LANES], l, link);
    return l;
}

static void lane_drop(struct lane *l)
{
    if (!--l->refs)
        free(l);
}

static void epoch_free(struct epoch *e)
{
    if (e->lane->open == e)
        e->lane->open = NULL;
    lane_drop(e->lane);
    for (size_t i = 0; i < e->renames_n; i++)
        free(e->renames[i].old);
    free(e->renames);
    free(e);
}

static void epoch_abort(struct epoch *e)
{
    if (e->txn)
        store_txn_abort(e->txn);
    e->txn = NULL;
    credit(e, e->owed);
}

static void epoch_fail(struct epoch *e, int err, const char *text)
{
    e->failed = true;
    epoch_abort(e);
    session_failed(e->session, e->lane->stream, e->seq, frame_code_from(err), text);
}

static void epoch_begin(struct session *s, struct lane *l, const struct buf *p)
{
    struct frame_begin b;
    if (frame_begin_get(p->data, p->len, &b) < 0) {
        session_violated(s, "a BEGIN out of form");
        return;
    }
    struct epoch *e = calloc(1, sizeof *e);
    if (!e) {
        session_violated(s, "no memory for an epoch");
        return;
    }
    e->session = s;
    e->lane = l;
    e->seq = b.seq;
    l->refs++;
    l->open = e;
    e->txn = store_txn_new(s->server->store, &s->peer.identity, (struct store_names){name_of, s}, on_spilled, e);
    if (e->txn)
        store_txn_chain(e->txn, l);
    else
        epoch_fail(e, -ENOBUFS, "no memory for an epoch");
    if (e->txn && !id_none(&b.writer))
        store_txn_writer(e->txn, &b.writer);
}

/* A renamed handle's names change when the epoch is handed in; the store follows the renames within the epoch itself.
 */
static int epoch_note(struct epoch *e, const struct buf *p)
{
    struct frame_op op;
    if (frame_op_get(p->data, p->len, &op) < 0 || op.kind != FRAME_OP_RENAME)
        return 0;
    struct rename *more = realloc(e->renames, (e->renames_n + 1) * sizeof *more);
    if (!more)
        return -ENOBUFS;
    e->renames = more;
    e->renames[e->renames_n++] = (struct rename){.handle = op.handle, .to = op.to};
    return 0;
}

static void epoch_add(struct epoch *e, uint8_t type, struct buf *p, uint32_t window)
{
    char error[STORE_ERROR] = "";
    e->frames++;
    e->owed += window;
    if (e->failed) {
        credit(e, e->owed);
        return;
    }
    if (type != FRAME_PAGES && ++e->notes > SESSION_EPOCH_NOTES) {
        epoch_fail(e, -ENOBUFS, "an epoch of too many OP and REGION frames");
        return;
    }
    int rc = store_txn_add(e->txn, type, p, error);
    if (!rc && type == FRAME_OP)
        rc = epoch_note(e, p);
    if (rc == -ENOTCONN)
        session_end(e->session, rc, error);
    else if (rc < 0)
        epoch_fail(e, rc, error[0] ? error : strerror(-rc));
}

static void epoch_add_packed(struct session *s, struct epoch *e, const struct buf *p)
{
    struct buf *pages = NULL;
    int rc = unpack(p, &pages);
    if (rc)
        session_violated(s, rc == -EPROTO ? "a PACKED that does not unpack to its length" : "no memory for an epoch");
    else
        epoch_add(e, FRAME_PAGES, pages, conn_window(FRAME_PACKED, p->data, p->len));
    buf_drop(pages);
}

static void renames_do(struct session *s, struct epoch *e)
{
    for (size_t i = 0; i < e->renames_n; i++) {
        struct rename *r = &e->renames[i];
        struct handle *h = session_handle(s, r->handle), *to = session_handle(s, r->to);
        if (!h || !to)
            continue;
        r->old = strdup(h->name);
        if (!r->old || !session_handle_rename(s, h, to->name))
            session_violated(s, "no memory for a name");
    }
}

/* Its renames did not come to be, and so neither did those of the epochs after it on the stream, which continue it. */
static void renames_undo(struct session *s, struct epoch *e)
{
    for (size_t i = e->renames_n; i-- > 0;) {
        struct handle *h = session_handle(s, e->renames[i].handle);
        if (h && e->renames[i].old && !session_handle_rename(s, h, e->renames[i].old))
            session_violated(s, "no memory for a name");
    }
    struct epoch *later;
    TAILQ_FOREACH(later, &s->pending, link)
    if (later->lane == e->lane) {
        for (size_t i = 0; i < later->renames_n; i++)
            free(later->renames[i].old);
        later->renames_n = 0;
    }
}

static void tell_received(struct epoch *e)
{
    uint8_t seq[8];
    put_u64(seq, e->seq);
    session_reply(e->session, e->lane->stream, FRAME_RECEIVED, seq, sizeof seq);
}

static void on_received(void *arg)
{
    struct epoch *e = arg;
    if (e->session)
        tell_received(e);
}

static void on_durable(void *arg, int err, const char *text)
{
    struct epoch *e = arg;
    struct session *s = e->session;
    if (s) {
        credit(e, e->owed);
        TAILQ_REMOVE(&s->pending, e, link);
        s->pending_n--;
        if (err < 0)
            renames_undo(s, e);
        uint8_t seq[8];
        put_u64(seq, e->seq);
        if (err == -ENOTCONN)
            session_end(s, err, text);
        else if (err < 0)
            session_failed(s, e->lane->stream, e->seq, frame_code_from(err), text && *text ? text : strerror(-err));
        else
            session_reply(s, e->lane->stream, FRAME_DURABLE, seq, sizeof seq);
        session_look(s);
    }
    epoch_free(e);
}

static void epoch_end(struct session *s, struct epoch *e, const struct buf *p)
{
    bool quiet = p->len == 17 && p->data[16] == 1;
    if ((p->len != 16 && !quiet) || get_u64(p->data) != e->seq) {
        session_violated(s, "an END out of form, or of another epoch");
        return;
    }
    if (!e->failed && get_u64(p->data + 8) != e->frames) {
        char text[128];
        snprintf(text, sizeof text, "END counts %llu frames, %llu came", (unsigned long long)get_u64(p->data + 8),
                 (unsigned long long)e->frames);
        epoch_fail(e, -EPROTO, text);
    }
    e->lane->open = NULL;
    if (e->failed) {
        epoch_free(e);
        return;
    }
    if (s->pending_n >= SESSION_PENDING) {
        epoch_abort(e);
        epoch_free(e);
        session_violated(s, "too many epochs ahead of the disk");
        return;
    }
    TAILQ_INSERT_TAIL(&s->pending, e, link);
    s->pending_n++;
    renames_do(s, e);
    struct store_txn *txn = e->txn;
    if (!quiet && store_txn_received(txn, on_received))
        tell_received(e);
    e->txn = NULL;
    store_txn_commit(txn, on_durable, e);
}

void session_epoch_frame(struct session *s, uint32_t stream, uint8_t type, struct buf *p)
{
    struct lane *l = lane_find(s, stream);
    if (!l && type == FRAME_BEGIN && !(l = lane_new(s, stream))) {
        session_violated(s, "no memory for an epoch");
        return;
    }
    struct epoch *e = l ? l->open : NULL;
    if (type == FRAME_BEGIN ? !!e : !e) {
        session_violated(s, e ? "BEGIN within an epoch" : "a frame of an epoch without BEGIN");
    } else if (type == FRAME_BEGIN) {
        epoch_begin(s, l, p);
    } else if (type == FRAME_END) {
        epoch_end(s, e, p);
    } else if (type == FRAME_ABORT) {
        epoch_abort(e);
        epoch_free(e);
    } else if (type == FRAME_PACKED) {
        epoch_add_packed(s, e, p);
    } else {
        epoch_add(e, type, p, conn_window(type, p->data, p->len));
    }
}

static void lane_abort(struct lane *l)
{
    if (!l->open)
        return;
    epoch_abort(l->open);
    epoch_free(l->open);
}

static void lane_close(struct session *s, struct lane *l)
{
    TAILQ_REMOVE(&s->lanes[l->stream % SESSION_LANES], l, link);
    l->stream = 0;
    lane_abort(l);
    lane_drop(l);
}

void session_epoch_drop(struct session *s, uint32_t stream)
{
    struct lane *l = lane_find(s, stream);
    if (l)
        lane_close(s, l);
}

void session_epoch_drop_all(struct session *s)
{
    struct lane *l;
    for (unsigned b = 0; b < SESSION_LANES; b++)
        TAILQ_FOREACH(l, &s->lanes[b], link)
    lane_abort(l);
}

void session_epoch_orphan(struct session *s)
{
    for (unsigned b = 0; b < SESSION_LANES; b++)
        while (!TAILQ_EMPTY(&s->lanes[b]))
            lane_close(s, TAILQ_FIRST(&s->lanes[b]));
    struct epoch *e;
    while ((e = TAILQ_FIRST(&s->pending))) {
        TAILQ_REMOVE(&s->pending, e, link);
        e->session = NULL;
    }
    s->pending_n = 0;
}
