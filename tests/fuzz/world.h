/* A server over a mem: store, and peers that talk to it by raw bytes over socket pairs: all in one loop, which
 * world_quiet runs until nothing is left to do. */
#ifndef TESTS_FUZZ_WORLD_H
#define TESTS_FUZZ_WORLD_H

#include "agent/net/server.h"
#include "tests/fuzz/fuzz.h"

#define PEER_OUT (256u << 10)
#define PEER_STREAMS 16u

struct world {
    uv_loop_t loop;
    struct store *store;
    struct server *server;
    unsigned ended;
    bool moved; /* bytes went somewhere since it was last looked at */
};

struct peer {
    struct world *world;
    int fd;          /* -1: the server has ended the connection, or we have */
    struct id token; /* by which further sockets may join; of the server's HELLO */
    uint8_t out[PEER_OUT], in[PEER_OUT];
    size_t out_len, in_len;
    uint32_t sent[PEER_STREAMS]; /* frames, by stream */
    void (*frame)(void *arg, const struct frame_header *h, const uint8_t *payload);
    void *arg;
};

void world_open(struct world *w);
void world_close(struct world *w);

/* A new connection, or, with a token, one more socket of an old one; nothing is waited for. */
void peer_open(struct world *w, struct peer *p, uint8_t identity, const struct id *join);
void peer_close(struct peer *p);
void peer_bytes(struct peer *p, const void *bytes, size_t len);
/* Bytes up to `len` of the payload, and damage (not 0) to byte `at` of the frame. */
void peer_frame(struct peer *p, uint32_t stream, uint32_t order, uint8_t type, const void *payload, size_t len);
void peer_send(struct peer *p, uint32_t stream, uint8_t type, const void *payload, size_t len); /* in order */
/* Sends what is queued, hands over what comes, lets the server do its work, until all is done. */
void world_quiet(struct world *w, struct peer *const *peers, size_t n);

#endif
