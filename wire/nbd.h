/* The network block device protocol, the server's side: steps over bytes, and what it answers. No I/O, no memory of its own. nbd.md tells the story; the
 * protocol is that of the NetworkBlockDevice project's doc/proto.md, whose section is named where it matters.
 *
 * A connection: the server sends nbd_greeting; then nbd_server_step takes what the client sends, one message at a time, and says what it was. The owner
 * answers each before it takes the next step. After EXPORT_NAME or GO was granted the owner calls nbd_server_begin, and from then on steps are requests.
 *
 *     FLAGS ---4 bytes---> OPTIONS ---granted EXPORT_NAME, GO---> REQUESTS
 *       \_____________________\_____ out of form _________________/____> DEAD: nothing after it can be understood; the owner closes
 *
 * A WRITE's payload follows its request and is the owner's to take, all `len` bytes of it, whether the request is granted or not. */
#ifndef WIRE_NBD_H
#define WIRE_NBD_H

#include "wire/bytes.h"

#define NBD_NAME_MAX 4096u            /* bytes of an export's name ("String values") */
#define NBD_PAYLOAD_MAX (32u << 20)   /* of READ and WRITE; what clients may rely on ("Size constraints") */
#define NBD_OPTION_MAX (64u << 10)    /* of an option's data that is looked at */
#define NBD_OPTION_DRAIN (16u << 20)  /* longer ones end the connection, others are skipped and refused */
#define NBD_QUERIES_MAX 1024u         /* of one LIST_ or SET_META_CONTEXT */

#define NBD_GREETING 18u
#define NBD_REQUEST 28u
#define NBD_OPTION_HEAD 16u
#define NBD_REPLY_HEAD 20u  /* of an option */
#define NBD_SIMPLE 16u
#define NBD_CHUNK 20u
#define NBD_EXPORT_REPLY 134u
#define NBD_CONTEXT_ID 1u   /* of base:allocation, the one context there is */

enum nbd_option {
    NBD_OPT_EXPORT_NAME = 1,
    NBD_OPT_ABORT,
    NBD_OPT_LIST,
    NBD_OPT_PEEK_EXPORT,
    NBD_OPT_STARTTLS,
    NBD_OPT_INFO,
    NBD_OPT_GO,
    NBD_OPT_STRUCTURED_REPLY,
    NBD_OPT_LIST_META_CONTEXT,
    NBD_OPT_SET_META_CONTEXT,
    NBD_OPT_EXTENDED_HEADERS
};

enum nbd_reply {
    NBD_REP_ACK = 1,
    NBD_REP_SERVER,
    NBD_REP_INFO,
    NBD_REP_META_CONTEXT,
    NBD_REP_ERR_UNSUP = (int)0x80000001,
    NBD_REP_ERR_POLICY,
    NBD_REP_ERR_INVALID,
    NBD_REP_ERR_PLATFORM,
    NBD_REP_ERR_TLS_REQD,
    NBD_REP_ERR_UNKNOWN,
    NBD_REP_ERR_SHUTDOWN,
    NBD_REP_ERR_BLOCK_SIZE_REQD,
    NBD_REP_ERR_TOO_BIG
};

enum nbd_info { NBD_INFO_EXPORT, NBD_INFO_NAME, NBD_INFO_DESCRIPTION, NBD_INFO_BLOCK_SIZE };

/* Of an export. */
#define NBD_FLAG_HAS_FLAGS 0x1u
#define NBD_FLAG_READ_ONLY 0x2u
#define NBD_FLAG_FLUSH 0x4u
#define NBD_FLAG_FUA 0x8u
#define NBD_FLAG_TRIM 0x20u
#define NBD_FLAG_WRITE_ZEROES 0x40u
#define NBD_FLAG_DF 0x80u
#define NBD_FLAG_MULTI_CONN 0x100u
#define NBD_FLAG_CACHE 0x400u
#define NBD_FLAG_FAST_ZERO 0x800u

enum nbd_command {
    NBD_CMD_READ,
    NBD_CMD_WRITE,
    NBD_CMD_DISC,
    NBD_CMD_FLUSH,
    NBD_CMD_TRIM,
    NBD_CMD_CACHE,
    NBD_CMD_WRITE_ZEROES,
    NBD_CMD_BLOCK_STATUS
};

#define NBD_CMD_FLAG_FUA 0x1u
#define NBD_CMD_FLAG_NO_HOLE 0x2u
#define NBD_CMD_FLAG_DF 0x4u
#define NBD_CMD_FLAG_REQ_ONE 0x8u
#define NBD_CMD_FLAG_FAST_ZERO 0x10u

enum nbd_chunk {
    NBD_CHUNK_NONE,
    NBD_CHUNK_DATA,   /* u64 offset, bytes */
    NBD_CHUNK_HOLE,   /* u64 offset, u32 length */
    NBD_CHUNK_STATUS = 5, /* u32 context, {u32 length, u32 NBD_STATE_* bits}... */
    NBD_CHUNK_ERROR = 0x8001, /* u32 error, u16 length, text */
    NBD_CHUNK_ERROR_AT        /* the same, and u64 offset */
};
#define NBD_CHUNK_DONE 1u /* flag: the last of its reply */
#define NBD_STATE_HOLE 1u
#define NBD_STATE_ZERO 2u

struct nbd_request {
    uint16_t flags, command;
    uint64_t cookie, offset;
    uint32_t len;
};

enum nbd_phase { NBD_FLAGS, NBD_OPTIONS, NBD_REQUESTS, NBD_DEAD };

struct nbd_server {
    enum nbd_phase phase;
    bool no_zeroes;  /* the client does without the padding of EXPORT_NAME's answer */
    bool structured; /* replies in chunks were asked for */
    bool allocation; /* base:allocation was chosen, for the export `context_of` */
    uint32_t skip;   /* bytes of a refused option still to come */
    char context_of[NBD_NAME_MAX + 1];
};

enum nbd_kind {
    NBD_GOT_NOTHING, /* consumed, nothing to answer */
    NBD_GOT_REFUSED, /* an option to be answered by `reply` and `text` */
    NBD_GOT_OPTION,  /* EXPORT_NAME, ABORT, LIST, INFO, GO, STRUCTURED_REPLY (to be acknowledged), LIST_ and SET_META_CONTEXT */
    NBD_GOT_REQUEST
};

struct nbd_got {
    enum nbd_kind kind;
    uint32_t option;
    enum nbd_reply reply;
    const char *text;
    uint32_t infos;  /* INFO and GO: bit (1 << enum nbd_info) for each that was asked for */
    bool allocation; /* META_CONTEXT: base:allocation is wanted */
    struct nbd_request request;
    char name[NBD_NAME_MAX + 1]; /* of the export; "": the default one */
};

/* Looks at the `have` bytes that have come. Returns how many of them it took, at least 1, with `got` filled; 0: more are needed (never more than
 * NBD_OPTION_HEAD + NBD_OPTION_MAX); -EPROTO: the phase is DEAD now. */
int64_t nbd_server_step(struct nbd_server *s, const uint8_t *at, size_t have, struct nbd_got *got);
/* The export of this name was granted. A context chosen for another is forgotten. */
void nbd_server_begin(struct nbd_server *s, const char *name);

/* 0, or why the request cannot be granted, as a negative errno. */
int nbd_request_check(const struct nbd_server *s, const struct nbd_request *r, uint64_t size, bool read_only);

/* What the server sends. Each writes its head to `to` and returns its length; what is said to follow is the caller's to append. */
size_t nbd_greeting(uint8_t to[NBD_GREETING]);
size_t nbd_option_reply(uint8_t to[NBD_REPLY_HEAD], uint32_t option, enum nbd_reply reply, uint32_t len);
size_t nbd_export_reply(uint8_t to[NBD_EXPORT_REPLY], const struct nbd_server *s, uint64_t size, uint16_t flags);
size_t nbd_simple(uint8_t to[NBD_SIMPLE], uint64_t cookie, uint32_t error);
size_t nbd_chunk_head(uint8_t to[NBD_CHUNK], uint16_t flags, enum nbd_chunk type, uint64_t cookie, uint32_t len);
/* One of the eight errors that the protocol knows, for a negative errno ("Error values"); 0 for 0. */
uint32_t nbd_error_from(int err);

#endif
