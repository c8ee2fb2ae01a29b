/* The client's side of the block device protocol against what a server may say. Even inputs: a handshake of raw bytes,
 * and when the export is granted raw answers to some requests; what the client sends has to be understood by the
 * server's side of wire/nbd.h. Odd ones: answers in a form that is nearly right, to get further. Either way the bytes
 * come at once and in pieces, with the same outcome; and of every READ that is granted each byte has come once. */
#include "tests/fuzz/fuzz.h"
#include "wire/nbd_client.h"

#include <errno.h>

#define STREAM_MAX 8192u
#define REQUESTS 8u
#define CONTEXT 7u

struct request {
    struct nbd_asked asked;
    bool over, status;
    uint8_t *buf;   /* of a READ: exactly its bytes */
    uint8_t *count; /* how often each has come */
};

/* A client, all that it was told, and the other end of what it says. */
struct client {
    struct nbd_hello hello;
    struct nbd_talk talk;
    bool talking;
    struct request requests[REQUESTS];
    uint32_t n;
    struct request *filling;
    uint32_t at, left;
    bool done;
    size_t used;
    int64_t end; /* 0 or the error */
    uint64_t digest;
    struct nbd_server server;
};

static uint8_t stream[STREAM_MAX];

static void digest(struct client *c, const void *bytes, size_t len)
{
    const uint8_t *p = bytes;
    for (size_t i = 0; i < len; i++)
        c->digest = (c->digest ^ p[i]) * 0x100000001b3u;
}

static void digest_number(struct client *c, uint64_t v)
{
    digest(c, &v, sizeof v);
}

/* Small requests, whose cookies are 1, 2, ... */
static void requests_make(struct client *c, struct in *in)
{
    static const uint16_t commands[] = {NBD_CMD_READ, NBD_CMD_READ, NBD_CMD_BLOCK_STATUS, NBD_CMD_WRITE, NBD_CMD_FLUSH};
    c->n = 1 + in_u8(in) % REQUESTS;
    for (uint32_t i = 0; i < c->n; i++) {
        struct request *r = &c->requests[i];
        uint8_t what = in_u8(in);
        r->asked.command = commands[what % 5];
        r->asked.flags = what & 0x80 && what % 5 == 0 ? NBD_CMD_FLAG_DF : 0;
        r->asked.cookie = i + 1;
        r->asked.offset = in_u8(in) * 16u;
        r->asked.len = 1u + in_u8(in);
        if (r->asked.command != NBD_CMD_READ)
            continue;
        r->buf = calloc(1, r->asked.len);
        r->count = calloc(1, r->asked.len);
    }
}

/* What the client says is a message of the protocol, and one that no server would refuse. */
static const struct nbd_got *understood(struct client *c, const uint8_t *at, size_t len)
{
    static struct nbd_got got;
    while (len) {
        int64_t n = nbd_server_step(&c->server, at, len, &got);
        MUST(n > 0 && got.kind != NBD_GOT_REFUSED, "%zu bytes: %lld, %s", len, (long long)n, got.text);
        MUST(!got.name[0] || !strcmp(got.name, c->hello.name), "the name %s", got.name);
        at += n;
        len -= (size_t)n;
    }
    return &got;
}

static void begin(struct client *c)
{
    const struct nbd_hello *h = &c->hello;
    MUST(h->size <= INT64_MAX && h->block_min && h->block_min <= h->block_max && h->block_max <= NBD_PAYLOAD_MAX &&
             h->block_max % h->block_min == 0 && h->block_preferred >= h->block_min,
         "size %llu, blocks %u, %u, %u", (unsigned long long)h->size, h->block_min, h->block_preferred, h->block_max);
    MUST(!h->allocation || h->structured, "a context without structured replies");
    c->talk = (struct nbd_talk){.structured = h->structured, .allocation = h->allocation, .context = h->context};
    c->talking = true;
    nbd_server_begin(&c->server, h->name);
    for (uint32_t i = 0; i < c->n; i++) {
        uint8_t ask[NBD_REQUEST];
        const struct nbd_asked *a = &c->requests[i].asked;
        const struct nbd_got *got = understood(c, ask, nbd_ask(ask, a));
        MUST(got->kind == NBD_GOT_REQUEST && got->request.command == a->command && got->request.flags == a->flags &&
                 got->request.cookie == a->cookie && got->request.offset == a->offset && got->request.len == a->len,
             "another request");
    }
}

/* As nbd_answer_step and nbd_hello_step return. */
static int64_t hello_step(struct client *c, const uint8_t *at, size_t have)
{
    static uint8_t to[NBD_HELLO_SEND];
    size_t sent = SIZE_MAX;
    int64_t n = nbd_hello_step(&c->hello, at, have, to, &sent);
    MUST(sent <= NBD_HELLO_SEND && (n > 0 || !sent), "%zu bytes sent", sent);
    MUST((n < 0) == (c->hello.phase == NBD_REFUSED), "%lld in phase %d", (long long)n, c->hello.phase);
    MUST(n || have < NBD_REPLY_HEAD + NBD_HELLO_REPLY || c->hello.phase >= NBD_GRANTED, "it waits for ever");
    understood(c, to, sent);
    digest(c, to, sent);
    if (c->hello.listed) {
        MUST(n > 0 && c->hello.listed_len <= NBD_NAME_MAX && c->hello.listed_len <= have, "a name");
        digest(c, c->hello.listed, c->hello.listed_len); /* within the caller's bytes, or a sanitizer tells */
    }
    if (n < 0) {
        MUST(c->hello.err == n && *c->hello.text, "refused without a reason");
        digest(c, c->hello.text, strlen(c->hello.text));
        MUST(nbd_hello_step(&c->hello, at, have, to, &sent) == n && !sent, "refused, and then not");
    }
    if (c->hello.phase == NBD_GRANTED)
        begin(c);
    return n;
}

static struct nbd_asked *find(void *arg, uint64_t cookie)
{
    struct client *c = arg;
    return cookie && cookie <= c->n && !c->requests[cookie - 1].over ? &c->requests[cookie - 1].asked : NULL;
}

static void came(struct request *r, uint32_t at, uint32_t len)
{
    MUST(r->asked.command == NBD_CMD_READ && len && at <= r->asked.len && len <= r->asked.len - at, "%u bytes at %u",
         len, at);
    for (uint32_t i = at; i < at + len; i++)
        MUST(!r->count[i]++, "byte %u twice", i);
}

static void over(struct client *c, struct request *r)
{
    MUST(r->asked.err <= 0, "the error %d", r->asked.err);
    r->over = true;
    digest_number(c, r->asked.cookie);
    digest_number(c, (uint64_t)(int64_t)r->asked.err);
    if (r->asked.err)
        return;
    MUST(r->asked.command != NBD_CMD_BLOCK_STATUS || r->status, "a status without one");
    if (r->asked.command != NBD_CMD_READ)
        return;
    MUST(!memchr(r->count, 0, r->asked.len), "a byte is missing");
    digest(c, r->buf, r->asked.len);
}

static void status(struct client *c, struct request *r, const struct nbd_answer *a)
{
    uint64_t sum = 0;
    MUST(c->talk.allocation && r->asked.command == NBD_CMD_BLOCK_STATUS && !r->status, "a status not asked for");
    MUST(a->n && a->n <= NBD_STATUS_EXTENTS, "%u extents", a->n);
    for (uint32_t i = 0; i < a->n; i++) {
        MUST(sum < r->asked.len && get_u32(a->extents + i * 8), "extent %u", i);
        sum += get_u32(a->extents + i * 8);
    }
    digest(c, a->extents, a->n * 8);
    r->status = true;
}

static void take(struct client *c, const struct nbd_answer *a)
{
    struct request *r = (struct request *)(void *)a->asked; /* its first member */
    MUST(r >= c->requests && r < c->requests + c->n && !r->over, "an answer to nothing");
    digest_number(c, a->kind);
    digest(c, a->text, strlen(a->text));
    if (a->kind == NBD_ANSWER_STATUS)
        status(c, r, a);
    if (a->kind == NBD_ANSWER_HOLE || a->kind == NBD_ANSWER_DATA)
        came(r, a->at, a->len);
    if (a->kind == NBD_ANSWER_DATA) {
        c->filling = r;
        c->at = a->at;
        c->left = a->len;
        c->done = a->done;
    } else if (a->done) {
        over(c, r);
    }
}

static int64_t answer_step(struct client *c, const uint8_t *at, size_t have)
{
    struct nbd_answer a;
    int64_t n = nbd_answer_step(&c->talk, at, have, &a, find, c);
    MUST((n < 0) == c->talk.dead && (n >= 0 || n == -EPROTO), "%lld", (long long)n);
    MUST(n || !a.done, "done, with nothing taken");
    MUST(n || have < NBD_ANSWER_HEAD || get_u16(at + 6) == NBD_CHUNK_STATUS, "it waits for ever");
    if (n > 0)
        take(c, &a);
    if (n < 0) {
        MUST(*a.text, "dead without a reason");
        digest(c, a.text, strlen(a.text));
        MUST(nbd_answer_step(&c->talk, at, have, &a, find, c) == -EPROTO, "dead, and then not");
    }
    return n;
}

/* The first `have` bytes have come; each step has them in a block of just their size. */
static void receive(struct client *c, size_t have)
{
    while (!c->end) {
        size_t n = have - c->used;
        if (c->filling) {
            n = n < c->left ? n : c->left;
            memcpy(c->filling->buf + c->at, stream + c->used, n);
            c->used += n;
            c->at += (uint32_t)n;
            c->left -= (uint32_t)n;
            if (c->left)
                return;
            if (c->done)
                over(c, c->filling);
            c->filling = NULL;
            continue;
        }
        uint8_t *bytes = malloc(n ? n : 1);
        memcpy(bytes, stream + c->used, n);
        int64_t step = (c->talking ? answer_step : hello_step)(c, bytes, n);
        free(bytes);
        MUST(step <= (int64_t)n, "a step of %lld in %zu bytes", (long long)step, n);
        c->used += step > 0 ? (size_t)step : 0;
        c->end = step < 0 ? step : 0;
        if (!step)
            return;
    }
}

static struct wr chunk(const struct request *r, struct in *in, struct wr w)
{
    static const uint16_t types[] = {NBD_CHUNK_DATA,  NBD_CHUNK_HOLE,     NBD_CHUNK_DATA, NBD_CHUNK_STATUS,
                                     NBD_CHUNK_ERROR, NBD_CHUNK_ERROR_AT, NBD_CHUNK_NONE, 0x8042};
    static const uint8_t zeros[256];
    uint8_t what = in_u8(in), n = in_u8(in);
    uint16_t type = types[what % 8];
    uint8_t *head = wr_take(&w, NBD_CHUNK), *from = w.at;
    if (type == NBD_CHUNK_DATA || type == NBD_CHUNK_HOLE)
        wr_u64(&w, r->asked.offset + in_u8(in));
    if (type == NBD_CHUNK_HOLE)
        wr_u32(&w, n);
    if (type == NBD_CHUNK_DATA)
        wr_copy(&w, memset(w.at, what, n), n);
    if (type == NBD_CHUNK_STATUS)
        wr_u32(&w, CONTEXT);
    for (uint8_t i = 0; type == NBD_CHUNK_STATUS && i < n % 16; i++) {
        wr_u32(&w, in_u8(in));
        wr_u32(&w, i % 4);
    }
    if (type & 0x8000) {
        wr_u32(&w, in_u8(in));
        wr_u16(&w, n);
        wr_copy(&w, zeros, n);
    }
    if (type == NBD_CHUNK_ERROR_AT)
        wr_u64(&w, r->asked.offset);
    nbd_chunk_head(head, what & 0x80 ? NBD_CHUNK_DONE : 0, type, r->asked.cookie, (uint32_t)(w.at - from));
    return w;
}

/* Answers, each to one of the requests, some of them damaged. */
static size_t build(const struct client *c, struct in *in)
{
    struct wr w = wr_over(stream, sizeof stream);
    while (in_left(in) && sizeof stream - wr_len(&w) > 1024) {
        uint8_t what = in_u8(in), damage = what >> 3 & 1;
        const struct request *r = &c->requests[(what >> 4) % c->n];
        uint8_t *at = w.at;
        size_t n = NBD_SIMPLE;
        if (what % 8 < 2)
            nbd_simple(wr_take(&w, n), r->asked.cookie, what & 1 ? in_u8(in) : 0);
        else if (what % 8 < 7)
            w = chunk(r, in, w);
        else
            n = in_u8(in), wr_copy(&w, memset(w.at, what, n), n);
        if (damage && w.at > at) {
            uint8_t where = in_u8(in);
            at[where % (size_t)(w.at - at)] ^= in_u8(in);
        }
    }
    return wr_len(&w);
}

static void drop(struct client *c)
{
    for (uint32_t i = 0; i < REQUESTS; i++) {
        free(c->requests[i].buf);
        free(c->requests[i].count);
    }
    free(c);
}

static struct client *make(struct in *in, uint8_t what)
{
    struct client *c = calloc(1, sizeof *c);
    c->hello.name = what & 4 ? "" : "r";
    c->hello.list = what & 2;
    requests_make(c, in);
    c->talking = what & 1;
    if (c->talking)
        c->talk = (struct nbd_talk){.structured = !(what & 2), .allocation = !(what & 6), .context = CONTEXT};
    return c;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct in in = {data, data + size};
    if (size < 4 || size > STREAM_MAX)
        return 0;
    uint8_t what = in_u8(&in), cut = in_u8(&in);
    struct in again = in;
    struct client *whole = make(&in, what), *parts = make(&again, what);
    size_t len = in_left(&in);
    if (what & 1)
        len = build(whole, &in);
    else
        memcpy(stream, in.at, len);
    receive(whole, len);
    for (size_t have = 0; have < len; have += 1 + have % (cut + 1u))
        receive(parts, have);
    receive(parts, len);
    MUST(whole->digest == parts->digest && whole->used == parts->used && whole->end == parts->end,
         "cuts make a difference: %zu bytes and %lld, %zu bytes and %lld", whole->used, (long long)whole->end,
         parts->used, (long long)parts->end);
    drop(whole);
    drop(parts);
    return 0;
}
