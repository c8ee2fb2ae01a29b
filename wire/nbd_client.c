#include "wire/nbd_client.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>

#define MAGIC_HELLO 0x4e42444d41474943u  /* "NBDMAGIC" */
#define MAGIC_OPTION 0x49484156454f5054u /* "IHAVEOPT" */
#define MAGIC_OLDSTYLE 0x00420281861253u
#define MAGIC_OPTION_REPLY 0x0003e889045565a9u
#define MAGIC_REQUEST 0x25609513u
#define MAGIC_SIMPLE 0x67446698u
#define MAGIC_CHUNK 0x668e33efu

#define FIXED_NEWSTYLE 1u
#define NO_ZEROES 2u
#define REPLY_ERROR 0x80000000u
#define CHUNK_ERROR 0x8000u

static __attribute__((format(printf, 3, 4))) int64_t refuse(struct nbd_hello *h, int err, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(h->text, sizeof h->text, format, args);
    va_end(args);
    h->phase = NBD_REFUSED;
    h->err = err;
    return err;
}

/* A server's words, without what would make a mess of a terminal or a log. */
static void said(char to[NBD_SAID], const uint8_t *text, uint32_t len)
{
    uint32_t n = len < NBD_SAID - 1 ? len : NBD_SAID - 1;
    for (uint32_t i = 0; i < n; i++)
        to[i] = text[i] < 0x20 || text[i] >= 0x7f ? '?' : (char)text[i];
    to[n] = 0;
}

/* -- what the client sends -- */

static void option_head(struct wr *w, uint32_t option, size_t len)
{
    wr_u64(w, MAGIC_OPTION);
    wr_u32(w, option);
    wr_u32(w, (uint32_t)len);
}

static void send_name(struct nbd_hello *h, struct wr *w)
{
    option_head(w, NBD_OPT_EXPORT_NAME, strlen(h->name));
    wr_copy(w, h->name, strlen(h->name));
    h->phase = NBD_NAME_SENT;
}

static void send_go(struct nbd_hello *h, struct wr *w)
{
    size_t len = strlen(h->name);
    option_head(w, NBD_OPT_GO, 4 + len + 4);
    wr_u32(w, (uint32_t)len);
    wr_copy(w, h->name, len);
    wr_u16(w, 1);
    wr_u16(w, NBD_INFO_BLOCK_SIZE);
    h->phase = NBD_GO_ASKED;
    h->replies = 0;
}

static void send_context(struct nbd_hello *h, struct wr *w)
{
    static const char query[] = "base:allocation";
    size_t len = strlen(h->name);
    option_head(w, NBD_OPT_SET_META_CONTEXT, 4 + len + 4 + 4 + strlen(query));
    wr_u32(w, (uint32_t)len);
    wr_copy(w, h->name, len);
    wr_u32(w, 1);
    wr_u32(w, (uint32_t)strlen(query));
    wr_copy(w, query, strlen(query));
    h->phase = NBD_CONTEXT_ASKED;
    h->replies = 0;
}

/* -- what the server sends -- */

static int64_t step_greeting(struct nbd_hello *h, const uint8_t *at, size_t have, struct wr *w)
{
    if (have >= 8 && get_u64(at) != MAGIC_HELLO)
        return refuse(h, -EPROTO, "this is no block device server");
    if (have >= 16 && get_u64(at + 8) == MAGIC_OLDSTYLE)
        return refuse(h, -ENOTSUP, "the server speaks the old style of before 2011, which is not spoken here");
    if (have >= 16 && get_u64(at + 8) != MAGIC_OPTION)
        return refuse(h, -EPROTO, "this is no block device server");
    if (have < NBD_GREETING)
        return 0;
    uint16_t flags = get_u16(at + 16);
    bool fixed = flags & FIXED_NEWSTYLE;
    if (strlen(h->name) > NBD_NAME_MAX)
        return refuse(h, -EINVAL, "the export's name is longer than %u bytes", NBD_NAME_MAX);
    h->no_zeroes = flags & NO_ZEROES;
    h->block_min = 1;
    h->block_preferred = 4096;
    h->block_max = NBD_PAYLOAD_MAX;
    wr_u32(w, (fixed ? FIXED_NEWSTYLE : 0) | (h->no_zeroes ? NO_ZEROES : 0));
    if (h->list && !fixed)
        return refuse(h, -ENOTSUP, "the server is too old to list its exports");
    if (h->list) {
        option_head(w, NBD_OPT_LIST, 0);
        h->phase = NBD_LISTING;
    } else if (!fixed) {
        send_name(h, w); /* it would hang up on any other option */
    } else {
        option_head(w, NBD_OPT_STRUCTURED_REPLY, 0);
        h->phase = NBD_STRUCTURED_ASKED;
    }
    return NBD_GREETING;
}

static int64_t take_blocks(struct nbd_hello *h, struct rd *r)
{
    uint32_t min = rd_u32(r), preferred = rd_u32(r), max = rd_u32(r);
    if (r->bad || rd_left(r))
        return refuse(h, -EPROTO, "the server's block sizes are out of form");
    if (!min || min & (min - 1) || min > NBD_BLOCK_MAX || preferred & (preferred - 1) || max < min || max < 512)
        return refuse(h, -EPROTO, "the server's block sizes make no sense: smallest %u, preferred %u, largest %u", min,
                      preferred, max);
    h->block_min = min;
    h->block_preferred = preferred < min ? min : preferred;
    h->block_max = (max < NBD_PAYLOAD_MAX ? max : NBD_PAYLOAD_MAX) & ~(min - 1);
    return 0;
}

static int64_t take_export(struct nbd_hello *h, uint64_t size, uint16_t flags)
{
    if (size > INT64_MAX)
        return refuse(h, -EPROTO, "the server's size makes no sense: %llu", (unsigned long long)size);
    h->size = size;
    h->flags = flags & NBD_FLAG_HAS_FLAGS ? flags : 0;
    h->exported = true;
    return 0;
}

static int64_t take_info(struct nbd_hello *h, struct rd r)
{
    uint16_t info = rd_u16(&r);
    if (r.bad)
        return refuse(h, -EPROTO, "the server's answer to GO is out of form");
    if (info == NBD_INFO_BLOCK_SIZE)
        return take_blocks(h, &r);
    if (info != NBD_INFO_EXPORT)
        return 0;
    uint64_t size = rd_u64(&r);
    uint16_t flags = rd_u16(&r);
    if (r.bad || rd_left(&r))
        return refuse(h, -EPROTO, "the server's answer to GO is out of form");
    return take_export(h, size, flags);
}

static int64_t take_context(struct nbd_hello *h, struct rd r)
{
    uint32_t context = rd_u32(&r);
    static const char wanted[] = "base:allocation";
    if (r.bad || rd_left(&r) != strlen(wanted) || memcmp(r.at, wanted, strlen(wanted)))
        return refuse(h, -EPROTO, "the server chose a context that was not asked for");
    if (h->allocation)
        return refuse(h, -EPROTO, "the server chose the context twice");
    h->context = context;
    h->allocation = true;
    return 0;
}

static int64_t take_listed(struct nbd_hello *h, struct rd r)
{
    uint32_t len = rd_u32(&r);
    const uint8_t *name = len <= NBD_NAME_MAX ? rd_take(&r, len) : NULL;
    if (!name)
        return refuse(h, -EPROTO, "an export's name is out of form");
    h->listed = name;
    h->listed_len = len;
    return 0;
}

static int64_t refused(struct nbd_hello *h, uint32_t reply, const uint8_t *text, uint32_t len)
{
    static const struct {
        enum nbd_reply reply;
        int err;
        const char *text;
    } table[] = {
        {NBD_REP_ERR_UNSUP, -ENOTSUP, "the server cannot do that"},
        {NBD_REP_ERR_POLICY, -EACCES, "the server does not allow it"},
        {NBD_REP_ERR_INVALID, -EINVAL, "the server finds the request out of form"},
        {NBD_REP_ERR_PLATFORM, -ENOTSUP, "the server's system cannot do that"},
        {NBD_REP_ERR_TLS_REQD, -EACCES, "the server wants TLS, which is not built"},
        {NBD_REP_ERR_UNKNOWN, -ENOENT, "there is no such export"},
        {NBD_REP_ERR_SHUTDOWN, -ESHUTDOWN, "the server is shutting down"},
        {NBD_REP_ERR_BLOCK_SIZE_REQD, -ENOTSUP, "the server wants other block sizes"},
        {NBD_REP_ERR_TOO_BIG, -EINVAL, "the server finds the request too long"},
    };
    char words[NBD_SAID];
    said(words, text, len);
    for (size_t i = 0; i < sizeof table / sizeof *table; i++)
        if ((uint32_t)table[i].reply == reply)
            return refuse(h, table[i].err, "%s%s%.180s", table[i].text, *words ? ": " : "", words);
    return refuse(h, -EPROTO, "the server refuses with %#x%s%.180s", reply, *words ? ": " : "", words);
}

static int64_t option_refused(struct nbd_hello *h, uint32_t reply, struct rd data, struct wr *w)
{
    if (h->phase == NBD_STRUCTURED_ASKED) {
        send_go(h, w); /* contexts are not to be had without */
        return 0;
    }
    if (h->phase == NBD_CONTEXT_ASKED) {
        h->allocation = false;
        send_go(h, w);
        return 0;
    }
    if (h->phase == NBD_GO_ASKED && reply == (uint32_t)NBD_REP_ERR_UNSUP) {
        send_name(h, w);
        return 0;
    }
    return refused(h, reply, data.at, (uint32_t)rd_left(&data));
}

static int64_t option_done(struct nbd_hello *h, struct wr *w)
{
    if (h->phase == NBD_STRUCTURED_ASKED) {
        h->structured = true;
        send_context(h, w);
    } else if (h->phase == NBD_CONTEXT_ASKED) {
        send_go(h, w);
    } else if (h->phase == NBD_LISTING) {
        option_head(w, NBD_OPT_ABORT, 0);
        h->phase = NBD_LISTED;
    } else if (!h->exported) {
        return refuse(h, -EPROTO, "the server granted the export without telling its size");
    } else {
        h->phase = NBD_GRANTED;
    }
    return 0;
}

static int64_t option_more(struct nbd_hello *h, uint32_t reply, struct rd data)
{
    if (++h->replies > NBD_HELLO_REPLIES)
        return refuse(h, -EPROTO, "the server's answer has no end");
    if (h->phase == NBD_GO_ASKED && reply == NBD_REP_INFO)
        return take_info(h, data);
    if (h->phase == NBD_CONTEXT_ASKED && reply == NBD_REP_META_CONTEXT)
        return take_context(h, data);
    if (h->phase == NBD_LISTING && reply == NBD_REP_SERVER)
        return take_listed(h, data);
    return refuse(h, -EPROTO, "the server answers what was not asked (%u)", reply);
}

static int64_t step_option(struct nbd_hello *h, const uint8_t *at, size_t have, struct wr *w)
{
    static const uint32_t asked[] = {
        [NBD_STRUCTURED_ASKED] = NBD_OPT_STRUCTURED_REPLY,
        [NBD_CONTEXT_ASKED] = NBD_OPT_SET_META_CONTEXT,
        [NBD_GO_ASKED] = NBD_OPT_GO,
        [NBD_LISTING] = NBD_OPT_LIST,
    };
    if (have < NBD_REPLY_HEAD)
        return 0;
    uint32_t reply = get_u32(at + 12), len = get_u32(at + 16);
    if (get_u64(at) != MAGIC_OPTION_REPLY || get_u32(at + 8) != asked[h->phase])
        return refuse(h, -EPROTO, "the server's answer is to no option that was sent");
    if (len > NBD_HELLO_REPLY)
        return refuse(h, -EPROTO, "the server's answer is too long: %u bytes", len);
    if (have - NBD_REPLY_HEAD < len)
        return 0;
    struct rd data = rd_over(at + NBD_REPLY_HEAD, len);
    int64_t rc = reply & REPLY_ERROR    ? option_refused(h, reply, data, w)
                 : reply == NBD_REP_ACK ? option_done(h, w)
                                        : option_more(h, reply, data);
    return rc < 0 ? rc : (int64_t)NBD_REPLY_HEAD + len;
}

static int64_t step_name(struct nbd_hello *h, const uint8_t *at, size_t have)
{
    size_t len = h->no_zeroes ? 10 : NBD_EXPORT_REPLY;
    if (have < len)
        return 0;
    int64_t rc = take_export(h, get_u64(at), get_u16(at + 8));
    if (rc < 0)
        return rc;
    h->phase = NBD_GRANTED;
    return (int64_t)len;
}

int64_t nbd_hello_step(struct nbd_hello *h, const uint8_t *at, size_t have, uint8_t *to, size_t *sent)
{
    struct wr w = wr_over(to, NBD_HELLO_SEND);
    int64_t rc;
    h->listed = NULL;
    *sent = 0;
    switch (h->phase) {
    case NBD_GREETING_AWAITED:
        rc = step_greeting(h, at, have, &w);
        break;
    case NBD_NAME_SENT:
        rc = step_name(h, at, have);
        break;
    case NBD_GRANTED:
    case NBD_LISTED:
        return 0;
    case NBD_REFUSED:
        return h->err;
    default:
        rc = step_option(h, at, have, &w);
    }
    *sent = rc > 0 ? wr_len(&w) : 0;
    return rc;
}

/* -- requests and their answers -- */

size_t nbd_ask(uint8_t to[NBD_REQUEST], const struct nbd_asked *a)
{
    put_u32(to, MAGIC_REQUEST);
    put_u16(to + 4, a->flags);
    put_u16(to + 6, a->command);
    put_u64(to + 8, a->cookie);
    put_u64(to + 16, a->offset);
    put_u32(to + 24, a->len);
    return NBD_REQUEST;
}

int nbd_errno(uint32_t error)
{
    switch (error) {
    case 0:
        return 0;
    case 1:
        return -EPERM;
    case 12:
        return -ENOMEM;
    case 22:
        return -EINVAL;
    case 28:
        return -ENOSPC;
    case 75:
        return -EOVERFLOW;
    case 95:
        return -ENOTSUP;
    case 108:
        return -ESHUTDOWN;
    default:
        return -EIO;
    }
}

static __attribute__((format(printf, 3, 4))) int64_t dead(struct nbd_talk *t, struct nbd_answer *a, const char *format,
                                                          ...)
{
    va_list args;
    va_start(args, format);
    vsnprintf(a->text, sizeof a->text, format, args);
    va_end(args);
    t->dead = true;
    return -EPROTO;
}

/* Notes that [from, from + len) of the request has come. NULL, or what is wrong with that. */
static const char *see(struct nbd_asked *q, uint32_t from, uint32_t len)
{
    uint32_t to = from + len, i = 0, n = q->seen_n;
    while (i < n && q->seen[i].to < from)
        i++;
    bool left = i < n && q->seen[i].to == from;
    uint32_t next = i + left;
    if (next < n && q->seen[next].from < to)
        return "the same bytes twice";
    bool right = next < n && q->seen[next].from == to;
    if (left && right) {
        q->seen[i].to = q->seen[next].to;
        memmove(&q->seen[next], &q->seen[next + 1], (n - next - 1) * sizeof *q->seen);
        q->seen_n--;
    } else if (left) {
        q->seen[i].to = to;
    } else if (right) {
        q->seen[i].from = from;
    } else if (n == NBD_PIECES_SEEN) {
        return "bytes in too many pieces";
    } else {
        memmove(&q->seen[i + 1], &q->seen[i], (n - i) * sizeof *q->seen);
        q->seen[i].from = from;
        q->seen[i].to = to;
        q->seen_n++;
    }
    return NULL;
}

static bool whole(const struct nbd_asked *q)
{
    if (q->command == NBD_CMD_BLOCK_STATUS)
        return q->status;
    return q->command != NBD_CMD_READ || (q->seen_n == 1 && q->seen[0].from == 0 && q->seen[0].to == q->len);
}

static int64_t step_simple(struct nbd_talk *t, const uint8_t *at, size_t have, struct nbd_answer *a,
                           struct nbd_asked *(*find)(void *arg, uint64_t cookie), void *arg)
{
    if (have < NBD_SIMPLE)
        return 0;
    a->asked = find(arg, get_u64(at + 8));
    if (!a->asked)
        return dead(t, a, "the server answers what was not asked (cookie %#llx)", (unsigned long long)get_u64(at + 8));
    struct nbd_asked *q = a->asked;
    int err = nbd_errno(get_u32(at + 4));
    bool chunked = t->structured && (q->command == NBD_CMD_READ || q->command == NBD_CMD_BLOCK_STATUS);
    if ((chunked && !err) || q->seen_n || q->status || q->err)
        return dead(t, a, "the server answers in a form that was not agreed on");
    if (!err && q->command == NBD_CMD_BLOCK_STATUS)
        return dead(t, a, "the server's answer is not whole");
    q->err = err;
    a->done = true;
    if (!err && q->command == NBD_CMD_READ) {
        a->kind = NBD_ANSWER_DATA;
        a->len = q->len;
        (void)see(q, 0, q->len);
    }
    return NBD_SIMPLE;
}

/* The place of a piece of a READ; NULL, or what is wrong. */
static const char *place(struct nbd_answer *a, uint64_t offset, uint32_t len)
{
    const struct nbd_asked *q = a->asked;
    if (q->command != NBD_CMD_READ)
        return "bytes for a request that wants none";
    if (!len || offset < q->offset || offset - q->offset > q->len || len > q->len - (offset - q->offset))
        return "bytes that were not asked for";
    if (q->flags & NBD_CMD_FLAG_DF && q->seen_n)
        return "a second piece where one was asked for";
    a->at = (uint32_t)(offset - q->offset);
    a->len = len;
    return see(a->asked, a->at, len);
}

static const char *chunk_status(const struct nbd_talk *t, struct nbd_answer *a, const uint8_t *data, uint32_t len)
{
    struct nbd_asked *q = a->asked;
    if (q->command != NBD_CMD_BLOCK_STATUS || !t->allocation || get_u32(data) != t->context)
        return "a status that was not asked for";
    if (q->status)
        return "the status twice";
    uint32_t n = (len - 4) / 8;
    uint64_t sum = 0;
    for (uint32_t i = 0; i < n; i++) {
        uint32_t extent = get_u32(data + 4 + (size_t)i * 8);
        if (!extent)
            return "an extent of no length";
        if (sum >= q->len)
            return "extents that were not asked for";
        sum += extent;
    }
    q->status = true;
    a->kind = NBD_ANSWER_STATUS;
    a->n = n < NBD_STATUS_EXTENTS ? n : NBD_STATUS_EXTENTS;
    a->extents = data + 4;
    return NULL;
}

static const char *chunk_error(struct nbd_answer *a, uint16_t type, const uint8_t *data, uint32_t len)
{
    uint32_t text = len < 6 ? 0 : get_u16(data + 4), error = len < 4 ? 0 : get_u32(data);
    if (len < 6 || text > len - 6 || text > 4096 || !error)
        return "an error out of form";
    if ((type == NBD_CHUNK_ERROR && len != 6 + text) || (type == NBD_CHUNK_ERROR_AT && len != 6 + text + 8))
        return "an error out of form";
    if (!a->asked->err)
        a->asked->err = nbd_errno(error);
    said(a->text, data + 6, text);
    return NULL;
}

/* What is to be there of a chunk before it can be looked at: all of it, but for the bytes of DATA. */
static int64_t chunk_wants(uint16_t type, uint32_t len)
{
    switch (type) {
    case NBD_CHUNK_NONE:
        return len ? -1 : 0;
    case NBD_CHUNK_DATA:
        return len > 8 ? 8 : -1;
    case NBD_CHUNK_HOLE:
        return len == 12 ? 12 : -1;
    case NBD_CHUNK_STATUS:
        return len >= 12 && len <= NBD_STATUS_BYTES && len % 8 == 4 ? (int64_t)len : -1;
    default:
        return type & CHUNK_ERROR && len <= NBD_ANSWER_HEAD - NBD_CHUNK ? (int64_t)len : -1;
    }
}

static const char *chunk_look(const struct nbd_talk *t, struct nbd_answer *a, uint16_t type, const uint8_t *data,
                              uint32_t len)
{
    switch (type) {
    case NBD_CHUNK_NONE:
        return a->done ? NULL : "a piece of nothing";
    case NBD_CHUNK_DATA:
        a->kind = NBD_ANSWER_DATA;
        return place(a, get_u64(data), len - 8);
    case NBD_CHUNK_HOLE:
        a->kind = NBD_ANSWER_HOLE;
        return place(a, get_u64(data), get_u32(data + 8));
    case NBD_CHUNK_STATUS:
        return chunk_status(t, a, data, len);
    default:
        return chunk_error(a, type, data, len);
    }
}

static int64_t step_chunk(struct nbd_talk *t, const uint8_t *at, size_t have, struct nbd_answer *a,
                          struct nbd_asked *(*find)(void *arg, uint64_t cookie), void *arg)
{
    if (have < NBD_CHUNK)
        return 0;
    uint16_t flags = get_u16(at + 4), type = get_u16(at + 6);
    uint32_t len = get_u32(at + 16);
    int64_t wants = chunk_wants(type, len);
    if (wants < 0)
        return dead(t, a, "the server sends a piece out of form (type %#x, %u bytes)", type, len);
    a->asked = find(arg, get_u64(at + 8));
    if (!a->asked)
        return dead(t, a, "the server answers what was not asked (cookie %#llx)", (unsigned long long)get_u64(at + 8));
    if (have - NBD_CHUNK < (size_t)wants)
        return 0;
    a->done = flags & NBD_CHUNK_DONE;
    const char *wrong = chunk_look(t, a, type, at + NBD_CHUNK, len);
    if (wrong)
        return dead(t, a, "the server sends %s", wrong);
    if (a->done && !a->asked->err && !whole(a->asked))
        return dead(t, a, "the server's answer is not whole");
    return NBD_CHUNK + wants;
}

int64_t nbd_answer_step(struct nbd_talk *t, const uint8_t *at, size_t have, struct nbd_answer *a,
                        struct nbd_asked *(*find)(void *arg, uint64_t cookie), void *arg)
{
    a->kind = NBD_ANSWER_NOTHING;
    a->done = false;
    a->asked = NULL;
    a->at = a->len = a->n = 0;
    a->extents = NULL;
    a->text[0] = 0;
    if (t->dead)
        return dead(t, a, "the server broke the rules before");
    if (have < 4)
        return 0;
    uint32_t magic = get_u32(at);
    if (magic == MAGIC_SIMPLE)
        return step_simple(t, at, have, a, find, arg);
    if (magic == MAGIC_CHUNK && t->structured)
        return step_chunk(t, at, have, a, find, arg);
    return dead(t, a, "the server sends what is no answer (%#x)", magic);
}
