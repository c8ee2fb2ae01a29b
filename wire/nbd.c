#include "wire/nbd.h"

#include <errno.h>

#define MAGIC_HELLO 0x4e42444d41474943u  /* "NBDMAGIC" */
#define MAGIC_OPTION 0x49484156454f5054u /* "IHAVEOPT" */
#define MAGIC_OPTION_REPLY 0x0003e889045565a9u
#define MAGIC_REQUEST 0x25609513u
#define MAGIC_SIMPLE 0x67446698u
#define MAGIC_CHUNK 0x668e33efu

/* Handshake flags have the same bits from either side. */
#define FIXED_NEWSTYLE 1u
#define NO_ZEROES 2u

static int64_t dead(struct nbd_server *s)
{
    s->phase = NBD_DEAD;
    return -EPROTO;
}

static void refuse(struct nbd_got *got, enum nbd_reply reply, const char *text)
{
    got->kind = NBD_GOT_REFUSED;
    got->reply = reply;
    got->text = text;
}

static int64_t step_flags(struct nbd_server *s, const uint8_t *at, size_t have)
{
    if (have < 4)
        return 0;
    uint32_t flags = get_u32(at);
    if (flags & ~(FIXED_NEWSTYLE | NO_ZEROES))
        return dead(s);
    s->no_zeroes = flags & NO_ZEROES;
    s->phase = NBD_OPTIONS;
    return 4;
}

/* u32 length and the bytes; false when it is no name. */
static bool name_take(struct rd *r, char name[NBD_NAME_MAX + 1])
{
    uint32_t len = rd_u32(r);
    const uint8_t *p = len <= NBD_NAME_MAX ? rd_take(r, len) : NULL;
    if (!p || memchr(p, 0, len))
        return false;
    memcpy(name, p, len);
    name[len] = 0;
    return true;
}

static void option_info(struct nbd_got *got, struct rd r)
{
    bool named = name_take(&r, got->name);
    uint16_t n = rd_u16(&r);
    for (uint16_t i = 0; i < n && !r.bad; i++) {
        uint16_t info = rd_u16(&r);
        if (info < 32)
            got->infos |= 1u << info;
    }
    if (!named || r.bad || rd_left(&r))
        refuse(got, NBD_REP_ERR_INVALID, "the option is out of form");
}

static bool query_is(const uint8_t *query, uint32_t len, const char *text)
{
    return len == strlen(text) && !memcmp(query, text, len);
}

static void option_context(struct nbd_server *s, struct nbd_got *got, struct rd r)
{
    bool listing = got->option == NBD_OPT_LIST_META_CONTEXT;
    if (!s->structured) {
        refuse(got, NBD_REP_ERR_INVALID, "structured replies have to be asked for first");
        return;
    }
    bool named = name_take(&r, got->name);
    uint32_t n = rd_u32(&r);
    if (n > NBD_QUERIES_MAX) {
        refuse(got, NBD_REP_ERR_TOO_BIG, "too many contexts are asked for");
        return;
    }
    got->allocation = listing && !n;
    for (uint32_t i = 0; i < n && !r.bad; i++) {
        uint32_t len = rd_u32(&r);
        const uint8_t *query = len <= NBD_NAME_MAX ? rd_take(&r, len) : NULL;
        r.bad |= !query;
        if (query && (query_is(query, len, "base:allocation") || (listing && query_is(query, len, "base:"))))
            got->allocation = true;
    }
    if (!named || r.bad || rd_left(&r)) {
        refuse(got, NBD_REP_ERR_INVALID, "the option is out of form");
        return;
    }
    if (listing)
        return;
    s->allocation = got->allocation;
    memcpy(s->context_of, got->name, sizeof s->context_of);
}

static void option_export_name(struct nbd_server *s, struct nbd_got *got, const uint8_t *data, uint32_t len)
{
    if (len > NBD_NAME_MAX || memchr(data, 0, len)) {
        dead(s); /* there is no answer that would refuse it */
        return;
    }
    memcpy(got->name, data, len);
    got->name[len] = 0;
}

static void option_look(struct nbd_server *s, struct nbd_got *got, const uint8_t *data, uint32_t len)
{
    struct rd r = rd_over(data, len);
    got->kind = NBD_GOT_OPTION;
    switch (got->option) {
    case NBD_OPT_EXPORT_NAME:
        option_export_name(s, got, data, len);
        break;
    case NBD_OPT_ABORT:
        break;
    case NBD_OPT_LIST:
    case NBD_OPT_STRUCTURED_REPLY:
        if (len)
            refuse(got, NBD_REP_ERR_INVALID, "the option takes no data");
        else
            s->structured |= got->option == NBD_OPT_STRUCTURED_REPLY;
        break;
    case NBD_OPT_INFO:
    case NBD_OPT_GO:
        option_info(got, r);
        break;
    case NBD_OPT_LIST_META_CONTEXT:
    case NBD_OPT_SET_META_CONTEXT:
        option_context(s, got, r);
        break;
    case NBD_OPT_STARTTLS:
        refuse(got, NBD_REP_ERR_UNSUP, "there is no TLS in this server: use a tunnel, or a trusted network");
        break;
    default:
        refuse(got, NBD_REP_ERR_UNSUP, "the option is not known here");
    }
}

static int64_t step_option(struct nbd_server *s, const uint8_t *at, size_t have, struct nbd_got *got)
{
    if (have < NBD_OPTION_HEAD)
        return 0;
    uint32_t len = get_u32(at + 12);
    got->option = get_u32(at + 8);
    if (get_u64(at) != MAGIC_OPTION || len > NBD_OPTION_DRAIN)
        return dead(s);
    if (len > NBD_OPTION_MAX) {
        if (got->option == NBD_OPT_EXPORT_NAME)
            return dead(s);
        s->skip = len;
        refuse(got, NBD_REP_ERR_TOO_BIG, "the option's data is too long");
        return NBD_OPTION_HEAD;
    }
    if (have - NBD_OPTION_HEAD < len)
        return 0;
    option_look(s, got, at + NBD_OPTION_HEAD, len);
    return s->phase == NBD_DEAD ? -EPROTO : NBD_OPTION_HEAD + (int64_t)len;
}

static int64_t step_request(struct nbd_server *s, const uint8_t *at, size_t have, struct nbd_got *got)
{
    if (have < NBD_REQUEST)
        return 0;
    if (get_u32(at) != MAGIC_REQUEST)
        return dead(s);
    got->kind = NBD_GOT_REQUEST;
    got->request = (struct nbd_request){.flags = get_u16(at + 4),
                                        .command = get_u16(at + 6),
                                        .cookie = get_u64(at + 8),
                                        .offset = get_u64(at + 16),
                                        .len = get_u32(at + 24)};
    return NBD_REQUEST;
}

int64_t nbd_server_step(struct nbd_server *s, const uint8_t *at, size_t have, struct nbd_got *got)
{
    got->kind = NBD_GOT_NOTHING;
    got->option = got->infos = 0;
    got->reply = 0;
    got->text = NULL;
    got->allocation = false;
    got->request = (struct nbd_request){0};
    got->name[0] = 0;
    if (s->phase == NBD_DEAD)
        return -EPROTO;
    if (s->skip) {
        uint32_t n = have < s->skip ? (uint32_t)have : s->skip;
        s->skip -= n;
        return n;
    }
    return s->phase == NBD_FLAGS     ? step_flags(s, at, have)
           : s->phase == NBD_OPTIONS ? step_option(s, at, have, got)
                                     : step_request(s, at, have, got);
}

void nbd_server_begin(struct nbd_server *s, const char *name)
{
    s->phase = NBD_REQUESTS;
    s->allocation = s->allocation && !strcmp(name, s->context_of);
}

static bool writes(uint16_t command)
{
    return command == NBD_CMD_WRITE || command == NBD_CMD_WRITE_ZEROES || command == NBD_CMD_TRIM;
}

int nbd_request_check(const struct nbd_server *s, const struct nbd_request *r, uint64_t size, bool read_only)
{
    static const uint16_t flags[] = {
        [NBD_CMD_READ] = NBD_CMD_FLAG_DF,
        [NBD_CMD_WRITE_ZEROES] = NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO,
        [NBD_CMD_BLOCK_STATUS] = NBD_CMD_FLAG_REQ_ONE,
    };
    if (r->command > NBD_CMD_BLOCK_STATUS || r->flags & ~(flags[r->command] | NBD_CMD_FLAG_FUA))
        return -EINVAL;
    if (r->command == NBD_CMD_FLUSH)
        return r->offset || r->len ? -EINVAL : 0;
    if (writes(r->command) && read_only)
        return -EPERM;
    bool payload = r->command == NBD_CMD_READ || r->command == NBD_CMD_WRITE || r->command == NBD_CMD_CACHE;
    if (!r->len || (payload && r->len > NBD_PAYLOAD_MAX))
        return -EINVAL;
    if (r->offset > size || r->len > size - r->offset)
        return r->command == NBD_CMD_WRITE || r->command == NBD_CMD_WRITE_ZEROES ? -ENOSPC : -EINVAL;
    if (r->command == NBD_CMD_BLOCK_STATUS && !s->allocation)
        return -EINVAL;
    if (r->flags & NBD_CMD_FLAG_DF && !s->structured)
        return -EINVAL;
    return 0;
}

size_t nbd_greeting(uint8_t to[NBD_GREETING])
{
    put_u64(to, MAGIC_HELLO);
    put_u64(to + 8, MAGIC_OPTION);
    put_u16(to + 16, FIXED_NEWSTYLE | NO_ZEROES);
    return NBD_GREETING;
}

size_t nbd_option_reply(uint8_t to[NBD_REPLY_HEAD], uint32_t option, enum nbd_reply reply, uint32_t len)
{
    put_u64(to, MAGIC_OPTION_REPLY);
    put_u32(to + 8, option);
    put_u32(to + 12, (uint32_t)reply);
    put_u32(to + 16, len);
    return NBD_REPLY_HEAD;
}

size_t nbd_export_reply(uint8_t to[NBD_EXPORT_REPLY], const struct nbd_server *s, uint64_t size, uint16_t flags)
{
    memset(to, 0, NBD_EXPORT_REPLY);
    put_u64(to, size);
    put_u16(to + 8, flags);
    return s->no_zeroes ? 10 : NBD_EXPORT_REPLY;
}

size_t nbd_simple(uint8_t to[NBD_SIMPLE], uint64_t cookie, uint32_t error)
{
    put_u32(to, MAGIC_SIMPLE);
    put_u32(to + 4, error);
    put_u64(to + 8, cookie);
    return NBD_SIMPLE;
}

size_t nbd_chunk_head(uint8_t to[NBD_CHUNK], uint16_t flags, enum nbd_chunk type, uint64_t cookie, uint32_t len)
{
    put_u32(to, MAGIC_CHUNK);
    put_u16(to + 4, flags);
    put_u16(to + 6, (uint16_t)type);
    put_u64(to + 8, cookie);
    put_u32(to + 16, len);
    return NBD_CHUNK;
}

uint32_t nbd_error_from(int err)
{
    switch (-err) {
    case 0:
        return 0;
    case EPERM:
    case EACCES:
    case EROFS:
        return 1;
    case ENOMEM:
    case ENOBUFS:
        return 12;
    case EINVAL:
        return 22;
    case ENOSPC:
    case EDQUOT:
    case EFBIG:
        return 28;
    case EOVERFLOW:
        return 75;
    case ENOTSUP:
        return 95;
    case ESHUTDOWN:
    case ESTALE:
        return 108;
    default:
        return 5;
    }
}
