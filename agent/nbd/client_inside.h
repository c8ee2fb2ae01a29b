/* What the two parts of the client share: client.c, the calls; client_conn.c, the connections. Names begin with
 * client_. */
#ifndef NBD_CLIENT_INSIDE_H
#define NBD_CLIENT_INSIDE_H

#include "agent/nbd/client.h"
#include "wire/nbd_client.h"

#include <sys/queue.h>

struct line;

struct call {
    TAILQ_ENTRY(call) link;
    struct nbd_client *c;
    struct line *line;
    struct nbd_asked asked;
    uint64_t seq, offset, len, pos, chunk; /* chunk: bytes of the call under way */
    uint16_t command;
    bool told, changing; /* changing: a piece of a block was read, and is to be written */
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
    struct addrinfo *found, *address; /* of the host: all, and the one that is dialled */
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

/* client.c */
void client_pump(struct nbd_client *c);
/* Of what has come on a line: how many bytes were taken; 0: more are needed; -1: the line is lost. */
int64_t client_answer(struct line *l, const uint8_t *at, size_t have);
void client_filled(struct line *l, size_t n); /* n bytes were read to where l->fill points */
void client_put_back(struct nbd_client *c);   /* everything waiting and kept waits, in the order it was asked for */
void client_end_all(struct nbd_client *c, int err, const char *text);

/* client_conn.c */
void client_again(struct nbd_client *c); /* after a while; a broken one answers everything then */
void client_lose(struct nbd_client *c, const char *why);
void client_broke(struct nbd_client *c, int err, const char *why);
void client_bye(struct line *l);

#endif
