/* Options: each is answered at once, as the store answers from memory. */
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

static void list_entry(void *arg, const struct frame_entry *e)
{
    struct nbd_conn *c = arg;
    uint8_t own[4];
    size_t len = strlen(e->name);
    put_u32(own, (uint32_t)len);
    if (len <= NBD_NAME_MAX)
        reply(c, NBD_OPT_LIST, NBD_REP_SERVER, own, sizeof own, e->name, len);
}

struct only {
    unsigned n;
    char name[NBD_NAME_MAX + 1];
};

static void only_entry(void *arg, const struct frame_entry *e)
{
    struct only *o = arg;
    if (!o->n++)
        snprintf(o->name, sizeof o->name, "%s", e->name);
}

static void no_done(void *arg, int err, const char *text)
{
    (void)arg;
    (void)err;
    (void)text;
}

static void no_pin(void *arg, int err, struct store_pin *pin, const struct frame_entry *e, const char *text)
{
    (void)arg;
    (void)err;
    (void)pin;
    (void)e;
    (void)text;
}

/* The region that is meant by the name, which is completed when it is the default one. 0 or a negative errno. */
static int region_find(struct nbd_conn *c, char name[NBD_NAME_MAX + 1], struct frame_entry *e)
{
    struct nbd *n = c->nbd;
    if (!*name) {
        static struct only only;
        only.n = 0;
        store_ask_list(n->store, only_entry, no_done, &only);
        if (only.n != 1)
            return -ENOENT;
        memcpy(name, only.name, sizeof only.name);
    }
    struct store_pin *pin;
    int err = store_ask_pin(n->store, name, &pin, e, no_pin, NULL);
    if (!err)
        store_unpin(pin);
    return err;
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

static void on_export_name(struct nbd_conn *c, struct frame_entry *e)
{
    int err = region_find(c, c->got.name, e);
    if (err) {
        conn_fail(c, "it asked for an export that is not there");
        return;
    }
    uint8_t answer[NBD_EXPORT_REPLY];
    uint16_t flags = flags_of(c, e);
    size_t n = nbd_export_reply(answer, &c->proto, e->size, flags);
    if (choose(c, c->got.name, e, flags))
        conn_out_bytes(c, answer, 10, answer + 10, n - 10);
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

static void on_info(struct nbd_conn *c, struct frame_entry *e)
{
    int err = region_find(c, c->got.name, e);
    if (err) {
        bool no_default = !c->got.name[0];
        handshake_refuse(c, c->got.option, NBD_REP_ERR_UNKNOWN,
                         no_default ? "there is no default export: several regions, or none, are here"
                                    : "there is no region of this name");
        return;
    }
    uint16_t flags = flags_of(c, e);
    send_infos(c, c->got.name, e, flags);
    ack(c);
    if (c->got.option != NBD_OPT_GO)
        return;
    /* A context chosen for the default name is meant for what that is. */
    if (!c->proto.context_of[0])
        memcpy(c->proto.context_of, c->got.name, sizeof c->proto.context_of);
    choose(c, c->got.name, e, flags);
}

static void on_context(struct nbd_conn *c, struct frame_entry *e)
{
    char name[NBD_NAME_MAX + 1];
    memcpy(name, c->got.name, sizeof name);
    if (region_find(c, name, e)) {
        c->proto.allocation = false;
        handshake_refuse(c, c->got.option, NBD_REP_ERR_UNKNOWN, "there is no region of this name");
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
    struct frame_entry *e = malloc(sizeof *e);
    if (!e) {
        conn_fail(c, "no memory for a name");
        return;
    }
    switch (c->got.option) {
    case NBD_OPT_EXPORT_NAME:
        on_export_name(c, e);
        break;
    case NBD_OPT_ABORT:
        ack(c);
        conn_leave(c);
        break;
    case NBD_OPT_LIST:
        store_ask_list(c->nbd->store, list_entry, no_done, c);
        ack(c);
        break;
    case NBD_OPT_STRUCTURED_REPLY:
        ack(c);
        break;
    case NBD_OPT_INFO:
    case NBD_OPT_GO:
        on_info(c, e);
        break;
    default:
        on_context(c, e);
    }
    free(e);
}
