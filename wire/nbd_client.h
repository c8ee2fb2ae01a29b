/* The network block device protocol, the client's side: steps over bytes. No I/O, no memory of its own. nbd.md tells
 * the story.
 *
 * The handshake. nbd_hello_step takes what the server sends, one message at a time, and writes what the client sends:
 *
 *     GREETING ---> STRUCTURED ---> CONTEXT ---> GO ---granted---> GRANTED: answers follow (struct nbd_talk)
 *         |   \___________\____________\_________/ | not known at this server
 *         |    a server that is no fixed newstyle  |
 *         |________________________________________|___> NAMING (EXPORT_NAME) ---> GRANTED
 *         \___> LISTING ---> LISTED                       anything else ---> REFUSED: `err` and `text` tell why
 *
 * After it, nbd_answer_step takes the heads of answers. The payload of data is left to the owner, who takes all `len`
 * bytes of it before the next step, straight to where they belong. The owner keeps a struct nbd_asked for each request
 * under way; what the server says is held against it, so that an answer that is granted has every byte exactly once.
 * A server that breaks the rules is not listened to any more: nothing after it can be trusted. */
#ifndef WIRE_NBD_CLIENT_H
#define WIRE_NBD_CLIENT_H

#include "wire/nbd.h"

#define NBD_HELLO_SEND 12288u                   /* the most that one step of the handshake sends */
#define NBD_HELLO_REPLY (64u << 10)             /* of an option; longer ones are refused */
#define NBD_HELLO_REPLIES 100000u               /* to one option */
#define NBD_ANSWER_HEAD (20u + 6u + 4096u + 8u) /* the most that a step of an answer waits for, but for STATUS */
#define NBD_STATUS_EXTENTS 1024u                /* looked at, of one answer; further ones are left out */
#define NBD_STATUS_BYTES (4u << 20)             /* bytes of one; longer is refused */
#define NBD_BLOCK_MAX (64u << 10)               /* the largest smallest block */
#define NBD_SAID 256u

enum nbd_hello_phase {
    NBD_GREETING_AWAITED,
    NBD_STRUCTURED_ASKED,
    NBD_CONTEXT_ASKED,
    NBD_GO_ASKED,
    NBD_NAME_SENT,
    NBD_LISTING,
    NBD_GRANTED,
    NBD_LISTED,
    NBD_REFUSED
};

/* Zeroed, but for the first two, before the first step. */
struct nbd_hello {
    const char *name; /* of the export; stays the caller's */
    bool list;        /* the exports' names are wanted, no export */

    enum nbd_hello_phase phase;
    bool no_zeroes, structured, allocation, exported;
    uint32_t context; /* base:allocation's number at this server */
    uint32_t replies; /* to the option under way */
    uint64_t size;
    uint16_t flags;                                 /* NBD_FLAG_* */
    uint32_t block_min, block_preferred, block_max; /* 1, 4096 and NBD_PAYLOAD_MAX when it does not say */

    int err; /* REFUSED: -EPROTO out of form; -ENOENT no such export; -EACCES not for us; -ENOTSUP too old, ... */
    char text[NBD_SAID];
    const uint8_t *listed; /* after a step: one export's name, in the caller's bytes; else NULL */
    uint32_t listed_len;
};

/* Returns how many bytes it took, at least 1; 0: more are needed; or a negative errno: REFUSED. `to` has room for
 * NBD_HELLO_SEND bytes; *sent of them are to go to the server. */
int64_t nbd_hello_step(struct nbd_hello *h, const uint8_t *at, size_t have, uint8_t *to, size_t *sent);

#define NBD_PIECES_SEEN 64u

struct nbd_asked {
    uint16_t command, flags;
    uint64_t cookie, offset;
    uint32_t len;
    /* Kept by the steps; zeroed before the request is sent. */
    int err;
    bool status; /* has come */
    uint32_t seen_n;
    struct {
        uint32_t from, to;
    } seen[NBD_PIECES_SEEN]; /* of a READ: which bytes have come; in order, not touching */
};

size_t nbd_ask(uint8_t to[NBD_REQUEST], const struct nbd_asked *a);

enum nbd_answer_kind {
    NBD_ANSWER_DATA,   /* `len` bytes for `at` (from the request's offset) follow */
    NBD_ANSWER_HOLE,   /* `len` zeros at `at` */
    NBD_ANSWER_STATUS, /* `extents`: n times {u32 length, u32 state} */
    NBD_ANSWER_NOTHING
};

struct nbd_answer {
    enum nbd_answer_kind kind;
    bool done; /* the request is answered, with asked->err; for DATA: when its bytes are taken */
    struct nbd_asked *asked;
    uint32_t at, len, n;
    const uint8_t *extents;
    char text[NBD_SAID]; /* what the server said of an error, or the step of a -EPROTO; else "" */
};

struct nbd_talk {
    bool structured, allocation;
    uint32_t context;
    bool dead;
};

/* As nbd_hello_step; -EPROTO: the talk is dead, a->text tells why. `find` gives the request under way with a cookie, or
 * NULL. */
int64_t nbd_answer_step(struct nbd_talk *t, const uint8_t *at, size_t have, struct nbd_answer *a,
                        struct nbd_asked *(*find)(void *arg, uint64_t cookie), void *arg);

/* The negative errno that one of the protocol's errors means here; -EIO for one that it does not know. */
int nbd_errno(uint32_t error);

#endif
