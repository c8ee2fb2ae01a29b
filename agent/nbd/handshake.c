/* Options, and the choice of an export. Most ask the store, which may answer later: the connection takes nothing more
 * until then. */
#include "agent/nbd/inside.h"

#include "agent/base/log.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>

/* A reply whose data are `more` behind `head_len` bytes of their own head. */
static void reply(struct nbd_conn *c, uint32_t option, enum nbd_reply type, const uint8_t *own, size_t own_len,
                  const void *more, size_t more_len)
{
    uint8_t head[48];
    size_t n = nbd_option_reply(head, option, type, (uint32_t)(own_len + more_len));
    if (own_len)
        memcpy(head + n, own, own_len);
    conn_out_bytes(c, head, n + own_len, more, more_len);
}

void handshake_refuse(struct nbd_conn *c, uint32_t option, enum nbd_reply type, const char *text)
{
    reply(c, option, type, NULL, 0, text, strlen(text));
}

static void ack(struct nbd_conn *c)
{
    reply(c, c->got.option, NBD_REP_ACK, NULL, 0, NULL, 0);
}

/* What an option, or nbd_serve, waits for: the list, or what a name is. The connection takes no more bytes until then.
 */
struct ask {
    struct nbd_conn *conn;
    void (*found)(struct nbd_conn *c, const char *name, int err, const char *text, const struct frame_entry *e);
    unsigned n; /* names that were listed */
    bool later;
    char name[NBD_NAME_MAX + 1];
    struct frame_entry entry;
};

static struct ask *ask_new(struct nbd_conn *c)
{
    struct ask *q = calloc(1, sizeof *q);
    if (!q) {
        conn_fail(c, "no memory for a name");
        return NULL;
    }
    q->conn = c;
    c->asking = true;
    conn_hold(c);
    return q;
}

static void ask_end(struct ask *q)
{
    struct nbd_conn *c = q->conn;
    bool later = q->later;
    free(q);
    c->asking = false;
    c->flushing = true; /* one that leaves is looked at */
    if (later && !c->closing)
        conn_pump(c);
    conn_drop(c);
}

/* Errors have texts of the store's, or their own. */
static const char *why(int err, const char *text)
{
    return text && *text ? text : strerror(-err);
}

static void list_entry(void *arg, const struct frame_entry *e)
{
    struct ask *q = arg;
    uint8_t own[4];
    size_t len = strlen(e->name);
    put_u32(own, (uint32_t)len);
    if (len <= NBD_NAME_MAX && !q->conn->closing)
        reply(q->conn, NBD_OPT_LIST, NBD_REP_SERVER, own, sizeof own, e->name, len);
}

static void on_listed(void *arg, int err, const char *text)
{
    struct ask *q = arg;
    struct nbd_conn *c = q->conn;
    if (err && !c->closing)
        handshake_refuse(c, NBD_OPT_LIST, NBD_REP_ERR_PLATFORM, why(err, text));
    else if (!c->closing)
        ack(c);
    ask_end(q);
}

static void on_list(struct nbd_conn *c)
{
    struct ask *q = ask_new(c);
    if (!q)
        return;
    int err = store_ask_list(c->nbd->store, list_entry, on_listed, q);
    q->later = err == -EINPROGRESS;
    if (!q->later)
        on_listed(q, err, NULL);
}

static void find_end(struct ask *q, int err, const char *text, const struct frame_entry *e)
{
    struct nbd_conn *c = q->conn;
    c->asking = false;
    if (!c->closing)
        q->found(c, q->name, err, err ? why(err, text) : NULL, e);
    else if (c->served)
        c->served(c->served_arg, -ESHUTDOWN, "the connection has been closed", 0, 0);
    ask_end(q);
}

static void on_pinned(void *arg, int err, struct store_pin *pin, const struct frame_entry *e, const char *text)
{
    struct ask *q = arg;
    if (!err)
        store_unpin(pin);
    find_end(q, err, text, e);
}

static void find_named(struct ask *q)
{
    struct store_pin *pin;
    int err = store_ask_pin(q->conn->nbd->store, q->name, &pin, &q->entry, on_pinned, q);
    q->later |= err == -EINPROGRESS;
    if (err != -EINPROGRESS)
        on_pinned(q, err, err ? NULL : pin, &q->entry, NULL);
}

static void only_entry(void *arg, const struct frame_entry *e)
{
    struct ask *q = arg;
    if (!q->n++)
        snprintf(q->name, sizeof q->name, "%s", e->name);
}

static void on_only(void *arg, int err, const char *text)
{
    struct ask *q = arg;
    if (!err && q->n == 1)
        find_named(q);
    else
        find_end(q, err ? err : -ENOENT, err ? text : "there is no default export: several regions, or none, are here",
                 NULL);
}

/* Looks for the region that is meant by the name: the empty one is the only region's. */
static void region_find(struct nbd_conn *c, const char *name,
                        void (*found)(struct nbd_conn *, const char *, int, const char *, const struct frame_entry *))
{
    struct ask *q = ask_new(c);
    if (!q)
        return;
    q->found = found;
    snprintf(q->name, sizeof q->name, "%s", name);
    if (*name) {
        find_named(q);
        return;
    }
    int err = store_ask_list(c->nbd->store, only_entry, on_only, q);
    q->later = err == -EINPROGRESS;
    if (!q->later)
        on_only(q, err, NULL);
}

static uint16_t flags_of(const struct nbd_conn *c, const struct frame_entry *e)
{
    unsigned flags = NBD_FLAG_HAS_FLAGS | NBD_FLAG_FLUSH | NBD_FLAG_FUA | NBD_FLAG_TRIM | NBD_FLAG_WRITE_ZEROES |
                     NBD_FLAG_MULTI_CONN | NBD_FLAG_CACHE | NBD_FLAG_FAST_ZERO;
    if (c->proto.structured)
        flags |= NBD_FLAG_DF;
    if (e->leased && strcmp(e->holder, c->nbd->host))
        flags |= NBD_FLAG_READ_ONLY;
    return (uint16_t)flags;
}

static bool choose(struct nbd_conn *c, const char *name, const struct frame_entry *e, uint16_t flags)
{
    c->export = export_get(c->nbd, name);
    if (!c->export) {
        conn_fail(c, "no memory for an export");
        return false;
    }
    c->lineage = e->lineage;
    c->size = e->size;
    c->read_only = flags & NBD_FLAG_READ_ONLY;
    nbd_server_begin(&c->proto, name);
    log_info("NBD client %s has chosen %s%s", c->party, name, c->read_only ? ", which another writes" : "");
    return true;
}

static void on_export_name(struct nbd_conn *c, const char *name, int err, const char *text, const struct frame_entry *e)
{
    if (err) {
        char why[STORE_ERROR + 64]; /* there is no other answer */
        snprintf(why, sizeof why, "the export that it asked for cannot be had: %.*s", (int)STORE_ERROR - 1, text);
        conn_fail(c, why);
        return;
    }
    uint8_t answer[NBD_EXPORT_REPLY];
    uint16_t flags = flags_of(c, e);
    size_t n = nbd_export_reply(answer, &c->proto, e->size, flags);
    if (choose(c, name, e, flags))
        conn_out_bytes(c, answer, 10, answer + 10, n - 10);
}

static void refuse_region(struct nbd_conn *c, int err, const char *text)
{
    bool unknown = err == -ENOENT || err == -EINVAL;
    bool told = err == -ENOENT && text == strerror(ENOENT);
    handshake_refuse(c, c->got.option, unknown ? NBD_REP_ERR_UNKNOWN : NBD_REP_ERR_PLATFORM,
                     told ? "there is no region of this name" : text);
}

static void send_infos(struct nbd_conn *c, const char *asked, const struct frame_entry *e, uint16_t flags)
{
    uint8_t own[14];
    uint32_t infos = c->got.infos;
    put_u16(own, NBD_INFO_EXPORT);
    put_u64(own + 2, e->size);
    put_u16(own + 10, flags);
    reply(c, c->got.option, NBD_REP_INFO, own, 12, NULL, 0);
    put_u16(own, NBD_INFO_NAME);
    if (infos & 1u << NBD_INFO_NAME)
        reply(c, c->got.option, NBD_REP_INFO, own, 2, asked, strlen(asked));
    put_u16(own, NBD_INFO_DESCRIPTION);
    if (infos & 1u << NBD_INFO_DESCRIPTION) {
        char text[128], lineage[ID_TEXT];
        id_text(&e->lineage, lineage);
        int n = snprintf(text, sizeof text, "epoch %llu of %s", (unsigned long long)e->epoch, lineage);
        reply(c, c->got.option, NBD_REP_INFO, own, 2, text, (size_t)n);
    }
    put_u16(own, NBD_INFO_BLOCK_SIZE);
    put_u32(own + 2, 1);
    put_u32(own + 6, FRAME_PAGE);
    put_u32(own + 10, NBD_PAYLOAD_MAX);
    if (infos & 1u << NBD_INFO_BLOCK_SIZE)
        reply(c, c->got.option, NBD_REP_INFO, own, 14, NULL, 0);
}

static void on_info(struct nbd_conn *c, const char *name, int err, const char *text, const struct frame_entry *e)
{
    if (err) {
        refuse_region(c, err, text);
        return;
    }
    uint16_t flags = flags_of(c, e);
    send_infos(c, name, e, flags);
    ack(c);
    if (c->got.option != NBD_OPT_GO)
        return;
    /* A context chosen for the default name is meant for what that is. */
    if (!c->proto.context_of[0])
        snprintf(c->proto.context_of, sizeof c->proto.context_of, "%s", name);
    choose(c, name, e, flags);
}

static void on_context(struct nbd_conn *c, const char *name, int err, const char *text, const struct frame_entry *e)
{
    (void)name;
    (void)e;
    if (err) {
        c->proto.allocation = false;
        refuse_region(c, err, text);
        return;
    }
    uint8_t own[4];
    static const char allocation[] = "base:allocation";
    put_u32(own, c->got.option == NBD_OPT_SET_META_CONTEXT ? NBD_CONTEXT_ID : 0);
    if (c->got.allocation)
        reply(c, c->got.option, NBD_REP_META_CONTEXT, own, sizeof own, allocation, strlen(allocation));
    ack(c);
}

void handshake_option(struct nbd_conn *c)
{
    switch (c->got.option) {
    case NBD_OPT_EXPORT_NAME:
        region_find(c, c->got.name, on_export_name);
        break;
    case NBD_OPT_ABORT:
        ack(c);
        conn_leave(c);
        break;
    case NBD_OPT_LIST:
        on_list(c);
        break;
    case NBD_OPT_STRUCTURED_REPLY:
        ack(c);
        break;
    case NBD_OPT_INFO:
    case NBD_OPT_GO:
        region_find(c, c->got.name, on_info);
        break;
    default:
        region_find(c, c->got.name, on_context);
    }
}

/* nbd_serve's: the answer comes from the loop, whatever the store. */
struct serving {
    uv_timer_t timer;
    struct nbd_conn *conn;
    char name[];
};

static void on_served(struct nbd_conn *c, const char *name, int err, const char *text, const struct frame_entry *e)
{
    uint16_t flags = err ? 0 : flags_of(c, e);
    if (!err && !choose(c, name, e, flags)) {
        err = -ENOMEM;
        text = "no memory for an export";
    }
    c->served(c->served_arg, err, text, err ? 0 : e->size, flags);
    c->served = NULL;
    if (err)
        conn_fail(c, text);
    else
        conn_pump(c);
}

static void on_serving_closed(uv_handle_t *h)
{
    free(h->data);
}

static void on_serving(uv_timer_t *t)
{
    struct serving *v = t->data;
    struct nbd_conn *c = v->conn;
    c->asking = false;
    if (!c->closing)
        region_find(c, v->name, on_served);
    if (c->served && c->closing) /* no memory, or the server stops */
        c->served(c->served_arg, -ESHUTDOWN, "the server stops", 0, 0);
    conn_drop(c);
    uv_close((uv_handle_t *)t, on_serving_closed);
}

void handshake_serve(struct nbd_conn *c, const char *name)
{
    size_t len = strlen(name) + 1;
    struct serving *v = malloc(sizeof *v + len);
    if (!v)
        abort(); /* a few bytes, and a caller that waits */
    v->conn = c;
    memcpy(v->name, name, len);
    v->timer.data = v;
    c->asking = true;
    conn_hold(c);
    uv_timer_init(c->nbd->loop, &v->timer);
    uv_timer_start(&v->timer, on_serving, 0, 0);
}
