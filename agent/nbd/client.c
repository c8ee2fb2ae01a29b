/* The client of client.h: connections, and what is asked over them.
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
#include "agent/nbd/client.h"

#include "agent/base/log.h"
#include "wire/nbd_client.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/queue.h>

#define ZERO_CHUNK (1u << 20)
#define LONG_CHUNK (1u << 30) /* of zeros, trims, status */
#define IN_FIRST (128u << 10)
#define IN_MOST (NBD_STATUS_BYTES + 65536u)
#define BACKOFF_MIN_MS 50u
#define DRAIN_MS 1000u
#define BACKOFF_MAX_MS 2000u

static const uint8_t zeros[ZERO_CHUNK];

struct line;

struct call {
    TAILQ_ENTRY(call) link;
    struct nbd_client *c;
    struct line *line;
    struct nbd_asked asked;
    uint64_t seq, offset, len, pos, chunk; /* chunk: bytes of the call under way */
    uint16_t command;
    bool hole, told, changing; /* changing: a piece of a block was read, and is to be written */
    uint8_t *bounce;
    uint8_t *to;
    struct buf *data;
    uint32_t from;
    struct nbd_extents *extents;
    uint64_t flush; /* number of the flush */
    nbd_client_done *done;
    void *arg;
};
TAILQ_HEAD(calls, call);

struct line {
    TAILQ_ENTRY(line) link;
    struct nbd_client *c;
    union {
        uv_handle_t handle;
        uv_stream_t stream;
        uv_tcp_t tcp;
        uv_pipe_t pipe;
    } u;
    uv_connect_t connect;
    struct nbd_hello hello;
    struct nbd_talk talk;
    bool up, closing;
    struct calls calls;
    unsigned n;
    uint64_t bytes;
    uint8_t *in;
    size_t have, cap;
    struct call *filling; /* its data come */
    uint8_t *fill;
    uint32_t fill_left;
    bool fill_done;
};
TAILQ_HEAD(lines, line);

struct nbd_client {
    uv_loop_t *loop;
    struct nbd_uri uri;
    struct nbd_client_watch watch;
    struct nbd_traits traits;
    uv_timer_t timer;
    uv_getaddrinfo_t lookup;
    bool looking, opened, down, closing, timer_closed;
    int broken;
    char why[NBD_CLIENT_TEXT];
    struct lines lines;
    struct calls waiting, kept;
    unsigned ncalls, backoff;
    uint64_t seq, cookie, flush_sent, kept_bytes;
    bool flushing; /* by itself */
    void (*closed)(void *arg);
    void *closed_arg;
};

static void pump(struct nbd_client *c);
static void lose(struct nbd_client *c, const char *why);
static void chunk_send(struct call *a);

static bool changes(const struct call *a)
{
    return a->command == NBD_CMD_WRITE || a->command == NBD_CMD_WRITE_ZEROES || a->command == NBD_CMD_TRIM;
}

static void call_free(struct call *a)
{
    buf_drop(a->data);
    free(a->bounce);
    free(a);
}

static void broke(struct nbd_client *c, int err, const char *why)
{
    if (c->broken)
        return;
    c->broken = err;
    snprintf(c->why, sizeof c->why, "%s", why);
    if (c->opened)
        c->watch.changed(c->watch.arg, false, c->why);
    lose(c, why);
}

/* ---- what is kept ---- */

static void keep(struct nbd_client *c, struct call *a)
{
    a->flush = c->flush_sent;
    a->pos = 0;
    a->told = true;
    free(a->bounce);
    a->bounce = NULL;
    TAILQ_INSERT_TAIL(&c->kept, a, link);
    c->kept_bytes += a->data ? a->len : 0;
}

/* The flush of that number is answered: what was answered before it was sent is durable. */
static void kept_drop(struct nbd_client *c, uint64_t flush)
{
    for (struct call *a = TAILQ_FIRST(&c->kept), *next; a; a = next) {
        next = TAILQ_NEXT(a, link);
        if (a->flush >= flush)
            continue;
        TAILQ_REMOVE(&c->kept, a, link);
        c->kept_bytes -= a->data ? a->len : 0;
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
        broke(c, err, line);
    }
}

/* ---- answers ---- */

static void line_bye(struct line *l);

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
        broke(c, err, "a write that had been answered could not be repeated");
    if (c->closing && l && !l->n)
        line_bye(l);
}

static void chunk_done(struct call *a, int err, const char *text)
{
    struct nbd_client *c = a->c;
    uint64_t at = a->offset + a->pos, within = at % c->traits.block_min;
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

/* How many bytes it took; 0: more are needed; -1: the line is lost. */
static int64_t answer_take(struct line *l, const uint8_t *at, size_t have)
{
    static struct nbd_answer got;
    if (l->fill_left) {
        uint32_t n = have < l->fill_left ? (uint32_t)have : l->fill_left;
        memcpy(l->fill, at, n);
        l->fill += n;
        if (!(l->fill_left -= n) && l->fill_done)
            chunk_done(l->filling, l->filling->asked.err, "");
        return n;
    }
    int64_t n = nbd_answer_step(&l->talk, at, have, &got, find, l);
    if (n < 0) {
        lose(l->c, got.text);
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
        lose(out->line->c, uv_strerror(err));
    out_free(out);
}

/* What the next chunk is, and sends it. */
static void chunk_send(struct call *a)
{
    struct nbd_client *c = a->c;
    const struct nbd_traits *t = &c->traits;
    uint64_t at = a->offset + a->pos, left = a->len - a->pos, min = t->block_min;
    uint32_t len = 0, most = t->block_max / t->block_min * t->block_min;
    uint16_t command = a->command, flags = 0;
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
        if (command == NBD_CMD_WRITE_ZEROES && !a->hole)
            flags = NBD_CMD_FLAG_NO_HOLE;
    }
    a->line->bytes += a->chunk;
    a->asked = (struct nbd_asked){.command = command, .flags = flags, .cookie = ++c->cookie, .offset = at, .len = len};
    if (command == NBD_CMD_FLUSH)
        a->asked.offset = a->asked.len = 0;
    struct out *out = calloc(1, sizeof *out);
    if (!out) {
        lose(c, "no memory for a request");
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
        lose(c, uv_strerror(err));
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

static void pump(struct nbd_client *c)
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

/* ---- lines ---- */

static void line_open(struct nbd_client *c, const struct sockaddr *to);
static void begin(struct nbd_client *c);

static int by_seq(const void *a, const void *b)
{
    const struct call *const *x = a, *const *y = b;
    return (*x)->seq < (*y)->seq ? -1 : (*x)->seq > (*y)->seq;
}

/* Everything waiting and kept, in the order it was asked for. */
static void put_back(struct nbd_client *c)
{
    struct call *a;
    size_t n = 0, i = 0;
    TAILQ_CONCAT(&c->waiting, &c->kept, link);
    c->kept_bytes = 0;
    TAILQ_FOREACH(a, &c->waiting, link)
    n++;
    struct call **all = malloc((n + 1) * sizeof *all);
    if (!all) {
        broke(c, -ENOMEM, "no memory to repeat what was written");
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

static void end_all(struct nbd_client *c, int err, const char *text)
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

static void look_closed(struct nbd_client *c)
{
    if (!c->closing || !c->timer_closed || c->looking || !TAILQ_EMPTY(&c->lines))
        return;
    end_all(c, -ECANCELED, "");
    c->closed(c->closed_arg);
    free(c);
}

static void on_timer(uv_timer_t *t)
{
    struct nbd_client *c = t->data;
    if (c->broken)
        end_all(c, c->broken, c->why);
    else
        begin(c);
}

static void again(struct nbd_client *c)
{
    c->backoff = c->backoff ? c->backoff * 2 : BACKOFF_MIN_MS;
    c->backoff = c->backoff < BACKOFF_MAX_MS ? c->backoff : BACKOFF_MAX_MS;
    uv_timer_start(&c->timer, on_timer, c->broken ? 0 : c->backoff, 0);
}

static void on_timer_closed(uv_handle_t *h)
{
    struct nbd_client *c = h->data;
    c->timer_closed = true;
    look_closed(c);
}

static void timer_end(struct nbd_client *c)
{
    if (!uv_is_closing((uv_handle_t *)&c->timer))
        uv_close((uv_handle_t *)&c->timer, on_timer_closed);
}

static void on_line_closed(uv_handle_t *h)
{
    struct line *l = h->data;
    struct nbd_client *c = l->c;
    for (struct call *a; (a = TAILQ_FIRST(&l->calls));) {
        TAILQ_REMOVE(&l->calls, a, link);
        a->line = NULL;
        TAILQ_INSERT_TAIL(&c->waiting, a, link);
    }
    TAILQ_REMOVE(&c->lines, l, link);
    free(l->in);
    free(l);
    if (!TAILQ_EMPTY(&c->lines))
        return;
    put_back(c);
    if (c->closing)
        timer_end(c);
    else if (c->opened)
        again(c);
}

static void line_close(struct line *l)
{
    if (l->closing)
        return;
    l->closing = true;
    uv_close(&l->u.handle, on_line_closed);
}

static void lose(struct nbd_client *c, const char *why)
{
    struct line *l;
    bool was = !c->down;
    c->down = true;
    if (TAILQ_EMPTY(&c->lines) && c->opened && !c->closing)
        again(c);
    TAILQ_FOREACH(l, &c->lines, link)
    line_close(l);
    if (was && c->opened && !c->closing && !c->broken)
        c->watch.changed(c->watch.arg, false, why);
}

/* Could not be opened, or not again. */
static void fail(struct nbd_client *c, int err, const char *text)
{
    bool first = !c->opened && !c->broken;
    lose(c, text);
    if (!first)
        return;
    c->broken = err;
    snprintf(c->why, sizeof c->why, "%s", text);
    c->watch.opened(c->watch.arg, err, c->why);
}

static void traits_take(struct nbd_client *c, const struct nbd_hello *h)
{
    struct nbd_traits *t = &c->traits;
    *t = (struct nbd_traits){
        .size = h->size / h->block_min * h->block_min,
        .block_min = h->block_min,
        .block_preferred = h->block_preferred,
        .block_max = h->block_max < NBD_PAYLOAD_MAX ? h->block_max : NBD_PAYLOAD_MAX,
        .read_only = h->flags & NBD_FLAG_READ_ONLY,
        .flush = h->flags & NBD_FLAG_FLUSH,
        .trim = h->flags & NBD_FLAG_TRIM,
        .zeroes = h->flags & NBD_FLAG_WRITE_ZEROES,
        .multi_conn = h->flags & NBD_FLAG_MULTI_CONN,
        .structured = h->structured,
        .allocation = h->allocation,
    };
}

static void on_granted(struct line *l)
{
    struct nbd_client *c = l->c;
    struct nbd_traits before = c->traits;
    l->up = true;
    l->talk = (struct nbd_talk){
        .structured = l->hello.structured, .allocation = l->hello.allocation, .context = l->hello.context};
    if (!c->opened || c->down) {
        traits_take(c, &l->hello);
        if (c->opened && (before.size != c->traits.size || (!before.read_only && c->traits.read_only))) {
            broke(c, -EIO, before.size != c->traits.size ? "the export has another size now" : "it is read-only now");
            return;
        }
        c->down = false;
        c->backoff = 0;
        if (c->traits.multi_conn)
            for (unsigned i = 1; i < NBD_CLIENT_CONNS; i++)
                begin(c);
        if (!c->opened) {
            c->opened = true;
            c->watch.opened(c->watch.arg, 0, "");
        } else {
            c->watch.changed(c->watch.arg, true, "");
        }
    }
    pump(c);
}

static void on_hello_sent(uv_write_t *out, int err)
{
    (void)err; /* reading tells */
    free(out);
}

static int64_t hello_take(struct line *l, const uint8_t *at, size_t have)
{
    struct out {
        uv_write_t write;
        uint8_t bytes[NBD_HELLO_SEND];
    } *out = malloc(sizeof *out);
    size_t sent = 0;
    if (!out) {
        fail(l->c, -ENOMEM, "no memory");
        return -1;
    }
    int64_t n = nbd_hello_step(&l->hello, at, have, out->bytes, &sent);
    uv_buf_t buf = uv_buf_init((char *)out->bytes, (unsigned)sent);
    if (!sent || uv_write(&out->write, &l->u.stream, &buf, 1, on_hello_sent))
        free(out);
    if (n < 0 || l->hello.phase == NBD_REFUSED) {
        fail(l->c, l->hello.err ? l->hello.err : -EPROTO, l->hello.text);
        return -1;
    }
    if (l->hello.phase == NBD_GRANTED)
        on_granted(l);
    return n;
}

static void on_alloc(uv_handle_t *h, size_t hint, uv_buf_t *buf)
{
    struct line *l = h->data;
    (void)hint;
    if (l->fill_left && !l->have) {
        *buf = uv_buf_init((char *)l->fill, l->fill_left);
        return;
    }
    if (l->have == l->cap) {
        size_t cap = l->cap ? l->cap * 2 : IN_FIRST;
        uint8_t *in = cap <= 2 * IN_MOST ? realloc(l->in, cap) : NULL;
        if (in) {
            l->in = in;
            l->cap = cap;
        }
    }
    *buf = uv_buf_init((char *)l->in + l->have, (unsigned)(l->cap - l->have));
}

static void on_bytes(uv_stream_t *s, ssize_t n, const uv_buf_t *buf)
{
    struct line *l = s->data;
    struct nbd_client *c = l->c;
    if (!n || l->closing)
        return;
    if (n < 0) {
        fail(c, n == UV_EOF ? -ECONNRESET : (int)n, n == UV_EOF ? "the server ended the connection" : uv_strerror((int)n));
        return;
    }
    if (l->fill_left && (uint8_t *)buf->base == l->fill) {
        l->fill += n;
        if (!(l->fill_left -= (uint32_t)n) && l->fill_done)
            chunk_done(l->filling, l->filling->asked.err, "");
        pump(c);
        return;
    }
    l->have += (size_t)n;
    size_t at = 0;
    while (at < l->have && !l->closing) {
        int64_t took = l->up ? answer_take(l, l->in + at, l->have - at) : hello_take(l, l->in + at, l->have - at);
        if (took <= 0)
            break;
        at += (size_t)took;
    }
    memmove(l->in, l->in + at, l->have - at);
    l->have -= at;
    pump(c);
}

static void on_connect(uv_connect_t *r, int err)
{
    struct line *l = r->data;
    if (err == UV_ECANCELED || l->closing)
        return;
    if (!err)
        err = uv_read_start(&l->u.stream, on_alloc, on_bytes);
    if (err)
        fail(l->c, err, uv_strerror(err));
}

static void line_open(struct nbd_client *c, const struct sockaddr *to)
{
    struct line *l = calloc(1, sizeof *l);
    if (!l) {
        fail(c, -ENOMEM, "no memory");
        return;
    }
    l->c = c;
    l->hello.name = c->uri.name;
    TAILQ_INIT(&l->calls);
    if (to)
        uv_tcp_init(c->loop, &l->u.tcp);
    else
        uv_pipe_init(c->loop, &l->u.pipe, 0);
    l->u.handle.data = l;
    l->connect.data = l;
    TAILQ_INSERT_TAIL(&c->lines, l, link);
    int err = 0;
    if (to) {
        uv_tcp_nodelay(&l->u.tcp, 1);
        err = uv_tcp_connect(&l->connect, &l->u.tcp, to, on_connect);
    } else {
        uv_pipe_connect(&l->connect, &l->u.pipe, c->uri.path, on_connect);
    }
    if (err)
        fail(c, err, uv_strerror(err));
}

static void on_looked_up(uv_getaddrinfo_t *r, int err, struct addrinfo *res)
{
    struct nbd_client *c = r->data;
    c->looking = false;
    if (c->closing)
        look_closed(c);
    else if (err && c->opened)
        again(c);
    else if (err)
        fail(c, -EHOSTUNREACH, uv_strerror(err));
    else
        line_open(c, res->ai_addr);
    uv_freeaddrinfo(res);
}

static void begin(struct nbd_client *c)
{
    struct addrinfo hints = {.ai_socktype = SOCK_STREAM};
    if (c->uri.is_unix) {
        line_open(c, NULL);
        return;
    }
    struct sockaddr_in v4;
    struct sockaddr_in6 v6;
    int port = atoi(c->uri.port);
    if (!uv_ip4_addr(c->uri.host, port, &v4)) {
        line_open(c, (const struct sockaddr *)&v4);
    } else if (!uv_ip6_addr(c->uri.host, port, &v6)) {
        line_open(c, (const struct sockaddr *)&v6);
    } else if (!c->looking) {
        c->lookup.data = c;
        c->looking = !uv_getaddrinfo(c->loop, &c->lookup, on_looked_up, c->uri.host, c->uri.port, &hints);
        if (!c->looking)
            fail(c, -EHOSTUNREACH, "the host's address cannot be looked up");
    }
}

/* ---- the calls of client.h ---- */

static void on_first(uv_timer_t *t)
{
    begin(t->data);
}

int nbd_client_open(struct nbd_client **out, uv_loop_t *loop, const struct nbd_uri *uri,
                    const struct nbd_client_watch *watch)
{
    struct nbd_client *c = calloc(1, sizeof *c);
    if (!c)
        return -ENOMEM;
    c->loop = loop;
    c->uri = *uri;
    c->watch = *watch;
    c->traits.block_min = 1;
    TAILQ_INIT(&c->lines);
    TAILQ_INIT(&c->waiting);
    TAILQ_INIT(&c->kept);
    uv_timer_init(loop, &c->timer);
    c->timer.data = c;
    uv_timer_start(&c->timer, on_first, 0, 0);
    *out = c;
    return 0;
}

/* What is under way is waited for, a while: there are servers that do not bear a connection that ends before. */
static void on_drained(uv_timer_t *t)
{
    struct nbd_client *c = t->data;
    struct line *l;
    TAILQ_FOREACH(l, &c->lines, link)
    line_close(l);
}

static void line_bye(struct line *l)
{
    uint8_t bye[NBD_REQUEST];
    uv_buf_t buf = uv_buf_init((char *)bye, sizeof bye);
    nbd_ask(bye, &(struct nbd_asked){.command = NBD_CMD_DISC, .cookie = ++l->c->cookie});
    if (!l->closing && l->up)
        uv_try_write(&l->u.stream, &buf, 1);
    line_close(l);
}

void nbd_client_close(struct nbd_client *c, void (*closed)(void *arg), void *arg)
{
    struct line *l;
    c->closing = true;
    c->closed = closed;
    c->closed_arg = arg;
    uv_timer_start(&c->timer, on_drained, DRAIN_MS, 0);
    TAILQ_FOREACH(l, &c->lines, link)
    if (!l->up || !l->n)
        line_bye(l);
    if (TAILQ_EMPTY(&c->lines))
        timer_end(c);
}

const struct nbd_traits *nbd_client_traits(const struct nbd_client *c)
{
    return &c->traits;
}

int nbd_client_broken(const struct nbd_client *c)
{
    return c->broken;
}

unsigned nbd_client_conns(const struct nbd_client *c)
{
    unsigned n = 0;
    struct line *l;
    TAILQ_FOREACH(l, &c->lines, link)
    n += l->up && !l->closing;
    return n;
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
        uv_timer_start(&c->timer, on_timer, 0, 0);
    else
        pump(c);
    return 0;
}

int nbd_client_read(struct nbd_client *c, uint64_t offset, uint32_t len, void *to, struct nbd_holes *holes,
                    nbd_client_done *done, void *arg)
{
    if (holes)
        holes->n = 0;
    return ask(c, &(struct call){
                      .command = NBD_CMD_READ, .offset = offset, .len = len, .to = to, .done = done, .arg = arg});
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

int nbd_client_zeroes(struct nbd_client *c, uint64_t offset, uint64_t len, bool hole, nbd_client_done *done, void *arg)
{
    return ask(c, &(struct call){.command = NBD_CMD_WRITE_ZEROES,
                                 .offset = offset,
                                 .len = len,
                                 .hole = hole,
                                 .done = done,
                                 .arg = arg});
}

/* A server without TRIM, or pieces of blocks: what is there may stay, and zeros are as good as anything. */
int nbd_client_trim(struct nbd_client *c, uint64_t offset, uint64_t len, nbd_client_done *done, void *arg)
{
    if (!c->traits.trim)
        return nbd_client_zeroes(c, offset, len, true, done, arg);
    return ask(c, &(struct call){.command = NBD_CMD_TRIM, .offset = offset, .len = len, .done = done, .arg = arg});
}

/* Without FLUSH at the server the smallest of reads stands for it: it is answered like any. */
int nbd_client_flush(struct nbd_client *c, nbd_client_done *done, void *arg)
{
    static uint8_t unused[NBD_BLOCK_MAX];
    if (!c->traits.flush)
        return nbd_client_read(c, 0, c->traits.block_min, unused, NULL, done, arg);
    return ask(c, &(struct call){.command = NBD_CMD_FLUSH, .done = done, .arg = arg});
}

int nbd_client_status(struct nbd_client *c, uint64_t offset, uint64_t len, struct nbd_extents *to,
                      nbd_client_done *done, void *arg)
{
    if (!c->traits.allocation)
        return -ENOTSUP;
    return ask(c, &(struct call){.command = NBD_CMD_BLOCK_STATUS,
                                 .offset = offset,
                                 .len = len,
                                 .extents = to,
                                 .done = done,
                                 .arg = arg});
}
