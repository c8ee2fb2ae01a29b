/* The client of client.h: what is asked. The connections are in client_conn.c.
 *
 * A call is done in chunks, one after the other: whole smallest blocks, up to the server's largest; a piece of a block
 * is read, changed and written. Calls wait in one queue; its head goes to the connection with the least under way, and
 * stands while it overlaps a write that is under way.
 *
 *     waiting ---sent---> on a line ---answered---> told, or, a write, kept ---FLUSH answered---> gone
 *        ^__________________|______________connections lost___________|
 *
 * When one connection is lost all are closed, and once their requests are the library's no more, everything under way
 * or kept is put back into the queue, in its order. */
#include "agent/nbd/client_inside.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define ZERO_CHUNK (1u << 20)
#define LONG_CHUNK (1u << 30) /* of zeros, status */

static const uint8_t zeros[ZERO_CHUNK];

static void chunk_send(struct call *a);

static bool changes(const struct call *a)
{
    return a->command == NBD_CMD_WRITE || a->command == NBD_CMD_WRITE_ZEROES;
}

static void call_free(struct call *a)
{
    buf_drop(a->data);
    free(a->bounce);
    free(a);
}

/* ---- what is kept ---- */

static uint64_t weight(const struct call *a)
{
    return sizeof *a + (a->data ? a->len : 0);
}

static void keep(struct nbd_client *c, struct call *a)
{
    a->flush = c->flush_sent;
    a->pos = 0;
    a->told = true;
    free(a->bounce);
    a->bounce = NULL;
    TAILQ_INSERT_TAIL(&c->kept, a, link);
    c->kept_bytes += weight(a);
}

/* The flush of that number is answered: what was answered before it was sent is durable. */
static void kept_drop(struct nbd_client *c, uint64_t flush)
{
    for (struct call *a = TAILQ_FIRST(&c->kept), *next; a; a = next) {
        next = TAILQ_NEXT(a, link);
        if (a->flush >= flush)
            continue;
        TAILQ_REMOVE(&c->kept, a, link);
        c->kept_bytes -= weight(a);
        call_free(a);
    }
}

static void on_own_flush(void *arg, int err, const char *text)
{
    struct nbd_client *c = arg;
    c->flushing = false;
    if (err && !c->closing && !c->broken) {
        char line[NBD_CLIENT_TEXT];
        snprintf(line, sizeof line, "what was written cannot be flushed: %.400s", *text ? text : strerror(-err));
        client_broke(c, err, line);
    }
}

/* ---- answers ---- */

static void call_end(struct call *a, int err, const char *text)
{
    struct nbd_client *c = a->c;
    struct line *l = a->line;
    if (a->line) {
        TAILQ_REMOVE(&a->line->calls, a, link);
        a->line->n--;
        a->line->bytes -= a->chunk;
        a->line = NULL;
    }
    bool repeated = a->told;
    nbd_client_done *done = a->done;
    void *arg = a->arg;
    if (!repeated)
        c->ncalls--;
    if (!err && a->command == NBD_CMD_FLUSH)
        kept_drop(c, a->flush);
    if (!err && changes(a) && c->traits.flush && !c->closing)
        keep(c, a);
    else
        call_free(a);
    if (!repeated)
        done(arg, err, text);
    else if (err && !c->closing && !c->broken)
        client_broke(c, err, "a write that had been answered could not be repeated");
    if (c->closing && l && !l->n)
        client_bye(l);
}

static void chunk_done(struct call *a, int err, const char *text)
{
    struct nbd_client *c = a->c;
    uint64_t at = a->offset + a->pos, within = at % c->traits.block_min;
    if (err == -ESHUTDOWN && !c->closing) { /* of the server, not of the request */
        client_lose(c, "the server is shutting down");
        return;
    }
    if (!err && a->bounce && !a->changing) {
        if (a->command == NBD_CMD_READ) {
            memcpy(a->to + a->pos, a->bounce + within, (size_t)a->chunk);
        } else {
            if (a->command == NBD_CMD_WRITE)
                memcpy(a->bounce + within, a->data->data + a->from + a->pos, (size_t)a->chunk);
            else
                memset(a->bounce + within, 0, (size_t)a->chunk);
            a->changing = true;
            chunk_send(a);
            return;
        }
    }
    free(a->bounce);
    a->bounce = NULL;
    a->changing = false;
    if (!err && a->command != NBD_CMD_BLOCK_STATUS)
        a->pos += a->chunk;
    if (!err && a->command != NBD_CMD_BLOCK_STATUS && a->pos < a->len && c->closing)
        call_end(a, -ECANCELED, "");
    else if (!err && a->command != NBD_CMD_BLOCK_STATUS && a->pos < a->len)
        chunk_send(a);
    else
        call_end(a, err, text);
}

static void status_take(struct call *a, const struct nbd_answer *got)
{
    struct nbd_extents *to = a->extents;
    uint64_t skip = a->offset % a->c->traits.block_min, left = a->len;
    to->n = 0;
    for (uint32_t i = 0; i < got->n && left; i++) {
        uint64_t len = get_u32(got->extents + 8 * i);
        uint32_t state = get_u32(got->extents + 8 * i + 4);
        uint64_t cut = skip < len ? skip : len;
        skip -= cut;
        len -= cut;
        len = len < left ? len : left;
        left -= len;
        if (!len)
            continue;
        if (to->n && to->at[to->n - 1].state == state)
            to->at[to->n - 1].len += len;
        else if (to->n < to->cap)
            to->at[to->n++] = (struct nbd_extent){len, state};
        else
            return;
    }
}

static struct nbd_asked *find(void *arg, uint64_t cookie)
{
    struct line *l = arg;
    struct call *a;
    TAILQ_FOREACH(a, &l->calls, link)
    if (a->asked.cookie == cookie)
        return &a->asked;
    return NULL;
}

static struct call *call_of(struct nbd_asked *asked)
{
    return (struct call *)(void *)((char *)asked - offsetof(struct call, asked));
}

static uint8_t *place(struct call *a)
{
    return a->bounce ? a->bounce : a->to + a->pos;
}

void client_filled(struct line *l, size_t n)
{
    l->fill += n;
    if (!(l->fill_left -= (uint32_t)n) && l->fill_done)
        chunk_done(l->filling, l->filling->asked.err, "");
}

int64_t client_answer(struct line *l, const uint8_t *at, size_t have)
{
    static struct nbd_answer got;
    if (l->fill_left) {
        uint32_t n = have < l->fill_left ? (uint32_t)have : l->fill_left;
        memcpy(l->fill, at, n);
        client_filled(l, n);
        return n;
    }
    int64_t n = nbd_answer_step(&l->talk, at, have, &got, find, l);
    if (n < 0) {
        client_lose(l->c, got.text);
        return -1;
    }
    if (!n || !got.asked)
        return n;
    struct call *a = call_of(got.asked);
    if (got.kind == NBD_ANSWER_HOLE)
        memset(place(a) + got.at, 0, got.len);
    else if (got.kind == NBD_ANSWER_STATUS)
        status_take(a, &got);
    if (got.kind == NBD_ANSWER_DATA && got.len) {
        l->filling = a;
        l->fill = place(a) + got.at;
        l->fill_left = got.len;
        l->fill_done = got.done;
    } else if (got.done) {
        chunk_done(a, got.asked->err, got.text);
    }
    return n;
}

/* ---- sending ---- */

/* On its own, with its bytes: an answer may be read before the library has said that the request is sent, and one from
 * a server that has not read all of it ends the call. */
struct out {
    uv_write_t write;
    struct line *line;
    struct buf *data;
    uint8_t *bounce;
    uint8_t head[NBD_REQUEST];
};

static void out_free(struct out *out)
{
    buf_drop(out->data);
    free(out->bounce);
    free(out);
}

static void on_sent(uv_write_t *write, int err)
{
    struct out *out = write->data;
    if (err && err != UV_ECANCELED && !out->line->closing)
        client_lose(out->line->c, uv_strerror(err));
    out_free(out);
}

/* What the next chunk is, and sends it. */
static void chunk_send(struct call *a)
{
    struct nbd_client *c = a->c;
    const struct nbd_traits *t = &c->traits;
    uint64_t at = a->offset + a->pos, left = a->len - a->pos, min = t->block_min;
    uint32_t len = 0, most = t->block_max / t->block_min * t->block_min;
    uint16_t command = a->command;
    const uint8_t *payload = NULL;
    bool by_writing = command == NBD_CMD_WRITE_ZEROES && !t->zeroes;
    bool data = command == NBD_CMD_READ || command == NBD_CMD_WRITE || command == NBD_CMD_WRITE_ZEROES;
    a->line->bytes -= a->chunk;
    if (data && (at % min || left < min)) { /* a piece of a block */
        uint64_t room = min - at % min;
        a->chunk = left < room ? left : room;
        at -= at % min;
        len = (uint32_t)min;
        if (!a->changing && !(a->bounce = malloc(min))) {
            call_end(a, -ENOMEM, "");
            return;
        }
        command = a->changing ? NBD_CMD_WRITE : NBD_CMD_READ;
        payload = a->changing ? a->bounce : NULL;
    } else {
        if (by_writing)
            most = most < ZERO_CHUNK ? most : ZERO_CHUNK / (uint32_t)min * (uint32_t)min;
        else if (command != NBD_CMD_READ && command != NBD_CMD_WRITE)
            most = LONG_CHUNK;
        if (command == NBD_CMD_BLOCK_STATUS) {
            left = (left + at % min + min - 1) / min * min;
            at -= at % min;
            left = left < t->size - at ? left : t->size - at;
        }
        len = left < most ? (uint32_t)(left / min * min) : most;
        a->chunk = command == NBD_CMD_FLUSH ? 0 : len;
        if (by_writing)
            command = NBD_CMD_WRITE;
        payload = by_writing ? zeros : command == NBD_CMD_WRITE ? a->data->data + a->from + a->pos : NULL;
    }
    a->line->bytes += a->chunk;
    a->asked = (struct nbd_asked){.command = command, .cookie = ++c->cookie, .offset = at, .len = len};
    if (command == NBD_CMD_FLUSH)
        a->asked.offset = a->asked.len = 0;
    struct out *out = calloc(1, sizeof *out);
    if (!out) {
        client_lose(c, "no memory for a request");
        return;
    }
    out->line = a->line;
    out->write.data = out;
    if (a->changing) {
        out->bounce = a->bounce;
        a->bounce = NULL;
    } else if (command == NBD_CMD_WRITE && !by_writing) {
        out->data = buf_hold(a->data);
    }
    nbd_ask(out->head, &a->asked);
    uv_buf_t bufs[2] = {uv_buf_init((char *)out->head, NBD_REQUEST),
                        uv_buf_init((char *)(uintptr_t)payload, payload ? len : 0)};
    int err = uv_write(&out->write, &a->line->u.stream, bufs, payload ? 2 : 1, on_sent);
    if (err) {
        out_free(out);
        client_lose(c, uv_strerror(err));
    }
}

static bool overlaps(const struct call *a, const struct call *b)
{
    uint64_t min = a->c->traits.block_min;
    return a->offset / min * min < (b->offset + b->len + min - 1) / min * min &&
           b->offset / min * min < (a->offset + a->len + min - 1) / min * min;
}

/* A FLUSH covers what was answered before it is sent, no more. What rests on an answer that was lost with its server
 * waits until the write is repeated. */
static bool must_stand(struct nbd_client *c, const struct call *a)
{
    struct line *l;
    struct call *b;
    if (changes(a) && !a->told && c->kept_bytes >= NBD_CLIENT_KEPT && c->flushing)
        return true;
    TAILQ_FOREACH(l, &c->lines, link)
    TAILQ_FOREACH(b, &l->calls, link)
    if (changes(b) && (changes(a) ? overlaps(a, b) : a->command == NBD_CMD_FLUSH || b->told))
        return true;
    return false;
}

static struct line *free_line(struct nbd_client *c)
{
    struct line *l, *best = NULL;
    TAILQ_FOREACH(l, &c->lines, link)
    if (l->up && !l->closing && l->n < NBD_CLIENT_IN_FLIGHT && l->bytes < NBD_CLIENT_BYTES &&
        (!best || l->bytes < best->bytes))
        best = l;
    return best;
}

/* Before all that waits: that may be standing for it. */
static void flush_own(struct nbd_client *c)
{
    struct call *a = calloc(1, sizeof *a);
    if (!a)
        return; /* the next write tries again */
    a->c = c;
    a->command = NBD_CMD_FLUSH;
    a->done = on_own_flush;
    a->arg = c;
    c->ncalls++;
    c->flushing = true;
    TAILQ_INSERT_HEAD(&c->waiting, a, link);
}

void client_pump(struct nbd_client *c)
{
    struct call *a;
    struct line *l;
    while (!c->closing && !c->down && (a = TAILQ_FIRST(&c->waiting)) && (l = free_line(c)) && !must_stand(c, a)) {
        TAILQ_REMOVE(&c->waiting, a, link);
        TAILQ_INSERT_TAIL(&l->calls, a, link);
        a->line = l;
        a->chunk = 0;
        l->n++;
        if (a->command == NBD_CMD_FLUSH)
            a->flush = ++c->flush_sent;
        chunk_send(a);
        if (!c->flushing && c->kept_bytes >= NBD_CLIENT_KEPT / 2 && !c->down)
            flush_own(c);
    }
}

/* ---- all of them ---- */

static int by_seq(const void *a, const void *b)
{
    const struct call *const *x = a, *const *y = b;
    return (*x)->seq < (*y)->seq ? -1 : (*x)->seq > (*y)->seq;
}

void client_put_back(struct nbd_client *c)
{
    struct call *a;
    size_t n = 0, i = 0;
    TAILQ_CONCAT(&c->waiting, &c->kept, link);
    c->kept_bytes = 0;
    TAILQ_FOREACH(a, &c->waiting, link)
    n++;
    struct call **all = malloc((n + 1) * sizeof *all);
    if (!all) {
        client_broke(c, -ENOMEM, "no memory to repeat what was written");
        return;
    }
    while ((a = TAILQ_FIRST(&c->waiting))) {
        TAILQ_REMOVE(&c->waiting, a, link);
        free(a->bounce);
        a->bounce = NULL;
        a->changing = false;
        a->pos = 0;
        a->chunk = 0;
        all[i++] = a;
    }
    qsort(all, n, sizeof(struct call *), by_seq);
    for (i = 0; i < n; i++)
        TAILQ_INSERT_TAIL(&c->waiting, all[i], link);
    free(all);
}

void client_end_all(struct nbd_client *c, int err, const char *text)
{
    struct calls all = TAILQ_HEAD_INITIALIZER(all);
    TAILQ_CONCAT(&all, &c->waiting, link);
    TAILQ_CONCAT(&all, &c->kept, link);
    c->kept_bytes = 0;
    for (struct call *a; (a = TAILQ_FIRST(&all));) {
        TAILQ_REMOVE(&all, a, link);
        nbd_client_done *done = a->told ? NULL : a->done;
        void *arg = a->arg;
        c->ncalls -= !a->told;
        call_free(a);
        if (done)
            done(arg, err, text);
    }
}

static int ask(struct nbd_client *c, const struct call *like)
{
    if (like->command != NBD_CMD_FLUSH &&
        (!like->len || like->offset > c->traits.size || like->len > c->traits.size - like->offset))
        return -EINVAL;
    if (c->traits.read_only && changes(like))
        return -EROFS;
    if (c->ncalls >= NBD_CLIENT_CALLS)
        return -ENOBUFS;
    struct call *a = malloc(sizeof *a);
    if (!a)
        return -ENOMEM;
    *a = *like;
    a->c = c;
    a->seq = ++c->seq;
    c->ncalls++;
    if (a->data)
        buf_hold(a->data);
    TAILQ_INSERT_TAIL(&c->waiting, a, link);
    if (c->broken)
        client_again(c);
    else
        client_pump(c);
    return 0;
}

int nbd_client_read(struct nbd_client *c, uint64_t offset, uint32_t len, void *to, nbd_client_done *done, void *arg)
{
    return ask(
        c, &(struct call){.command = NBD_CMD_READ, .offset = offset, .len = len, .to = to, .done = done, .arg = arg});
}

int nbd_client_write(struct nbd_client *c, uint64_t offset, uint32_t len, struct buf *data, uint32_t from,
                     nbd_client_done *done, void *arg)
{
    return ask(c, &(struct call){.command = NBD_CMD_WRITE,
                                 .offset = offset,
                                 .len = len,
                                 .data = data,
                                 .from = from,
                                 .done = done,
                                 .arg = arg});
}

int nbd_client_zeroes(struct nbd_client *c, uint64_t offset, uint64_t len, nbd_client_done *done, void *arg)
{
    return ask(c,
               &(struct call){.command = NBD_CMD_WRITE_ZEROES, .offset = offset, .len = len, .done = done, .arg = arg});
}

/* Without FLUSH at the server the smallest of reads stands for it: it is answered like any. */
int nbd_client_flush(struct nbd_client *c, nbd_client_done *done, void *arg)
{
    static uint8_t unused[NBD_BLOCK_MAX];
    if (!c->traits.flush)
        return nbd_client_read(c, 0, c->traits.block_min, unused, done, arg);
    return ask(c, &(struct call){.command = NBD_CMD_FLUSH, .done = done, .arg = arg});
}

int nbd_client_status(struct nbd_client *c, uint64_t offset, uint64_t len, struct nbd_extents *to,
                      nbd_client_done *done, void *arg)
{
    if (!c->traits.allocation)
        return -ENOTSUP;
    return ask(
        c, &(struct call){
               .command = NBD_CMD_BLOCK_STATUS, .offset = offset, .len = len, .extents = to, .done = done, .arg = arg});
}
