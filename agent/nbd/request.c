/* Commands. A write is taken piece by piece, as its payload comes, so that no more than one piece of it is in memory
 * that is not in a layer; a client that goes in the middle of one leaves the pieces that had come, as a disk may. */
#include "agent/nbd/inside.h"

#include <errno.h>

static const uint8_t zeros[FRAME_DATA_MAX];

static void answer_error(struct nbd_conn *c, const struct nbd_request *r, int err)
{
    uint8_t head[NBD_CHUNK + 6];
    const char *text = strerror(-err);
    size_t len = strlen(text);
    nbd_chunk_head(head, NBD_CHUNK_DONE, NBD_CHUNK_ERROR, r->cookie, (uint32_t)(6 + len));
    put_u32(head + NBD_CHUNK, nbd_error_from(err));
    put_u16(head + NBD_CHUNK + 4, (uint16_t)len);
    conn_out_bytes(c, head, sizeof head, text, len);
}

void request_answer(struct nbd_conn *c, const struct nbd_request *r, int err)
{
    bool chunks = r->command == NBD_CMD_READ || r->command == NBD_CMD_BLOCK_STATUS;
    if (chunks && err && c->proto.structured) {
        answer_error(c, r, err);
        return;
    }
    uint8_t head[NBD_SIMPLE];
    conn_out(c, head, nbd_simple(head, r->cookie, nbd_error_from(err)), NULL, 0);
}

static void flush_begin(struct nbd_conn *c, const struct nbd_request *r)
{
    struct export *x = c->export;
    layer_want(x);
    if (!layer_wait(c, r))
        request_answer(c, r, x->broken && x->seq != x->durable ? x->err : 0);
}

static void put_begin(struct nbd_conn *c, const struct nbd_request *r)
{
    c->put = *r;
    c->zeros = r->command != NBD_CMD_WRITE;
    c->putting = true;
}

void request_begin(struct nbd_conn *c)
{
    const struct nbd_request *r = &c->got.request;
    if (r->command == NBD_CMD_DISC) {
        conn_leave(c);
        return;
    }
    int err = nbd_request_check(&c->proto, r, c->size, c->read_only);
    uint16_t both = NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO;
    if (!err && (r->flags & both) == both)
        err = -ENOTSUP; /* zeros that are to take room are written */
    if (err) {
        c->drain = r->command == NBD_CMD_WRITE ? r->len : 0;
        request_answer(c, r, err);
        return;
    }
    switch (r->command) {
    case NBD_CMD_READ:
    case NBD_CMD_CACHE:
        read_begin(c, r);
        break;
    case NBD_CMD_BLOCK_STATUS:
        status_begin(c, r);
        break;
    case NBD_CMD_FLUSH:
        flush_begin(c, r);
        break;
    default:
        put_begin(c, r);
    }
}

static void put_end(struct nbd_conn *c, int err)
{
    c->putting = false;
    c->drain = c->zeros ? 0 : c->put.len; /* what is left of it when it failed */
    if (!err && c->put.flags & NBD_CMD_FLAG_FUA)
        flush_begin(c, &c->put);
    else
        request_answer(c, &c->put, err);
}

size_t request_put(struct nbd_conn *c, const uint8_t *at, size_t have, bool *more)
{
    struct nbd_request *r = &c->put;
    bool hole = c->zeros && !(r->flags & NBD_CMD_FLAG_NO_HOLE);
    uint32_t n = hole || r->len < FRAME_DATA_MAX ? r->len : FRAME_DATA_MAX;
    if (!c->zeros && have < n) {
        *more = false;
        return 0;
    }
    int err = export_writer(c);
    if (!err)
        err = layer_put(c, r->offset, n, hole ? NULL : c->zeros ? zeros : at);
    if (err == -EAGAIN) {
        c->blocked = true;
        *more = false;
        return 0;
    }
    if (err) {
        put_end(c, err);
        return 0;
    }
    r->offset += n;
    r->len -= n;
    if (!r->len)
        put_end(c, 0);
    return c->zeros ? 0 : n;
}
