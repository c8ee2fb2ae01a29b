/* A connection to a remote agent (wire/frame.h) with blocking calls, for one task at a time, on one stream.
 *
 * States: closed -> (connect, HELLO both ways) open -> dead. Once dead it stays so: every call answers the same error,
 * whose text says what happened. What the protocol asks of a client on stream 0 is done inside peer_next: PINGs are
 * answered, WINDOW is counted. The one who reads a data-bearing frame (DATA, HASHES) has used it when it calls
 * peer_next again: the window is then given back.
 *
 * An address of file:DIR is the store of an agent on this machine: the one that serves it now, on
 * DIR/.memsync/wire.sock, or, when there is none, one that is started for as long as the peer is open. */
#ifndef CLI_PEER_H
#define CLI_PEER_H

#include "agent/net/tls.h"
#include "wire/frame.h"

#include <sys/types.h>

#define PEER_STREAM 1u
#define PEER_SILENCE_MS 15000 /* an agent pings before */
#define PEER_IN (4u * (FRAME_HEADER + FRAME_PAYLOAD_MAX))

struct peer {
    int fd;
    const char *address;
    int dead; /* negative errno */
    char error[1400];
    char host[256];                  /* the other's own name for itself */
    uint32_t window;                 /* bytes of PAGES that may go, packed or not */
    uint32_t used;                   /* bytes of the frame handed out last */
    uint32_t owed;                   /* window bytes not yet given back */
    uint32_t order;                  /* of the next frame on the one stream */
    size_t in_start, in_end, handed; /* handed: length of the frame handed out last */
    struct tls *tls; /* NULL: frames go as they are */
    pid_t child;
    char temporary[64]; /* its directory */
    uint8_t in[PEER_IN];
};

struct peer_frame {
    uint8_t type;
    uint32_t stream, len;
    const uint8_t *payload; /* good until the next call */
};

/* NULL: said already. make_store: a file: store that is not there may be made. */
struct peer *peer_open(const char *address, bool make_store);
void peer_close(struct peer *p); /* NULL allowed */

/* 0 or p->dead. */
int peer_send(struct peer *p, uint8_t type, const void *payload, size_t len);
int peer_send_control(struct peer *p, uint8_t type, const void *payload, size_t len); /* on stream 0 */
/* The next frame that is not the connection's own business. 0 or p->dead. */
int peer_next(struct peer *p, struct peer_frame *f);
/* Waits until `bytes` of PAGES may go. What else comes then must be FAILED or nothing: returns 1 with the frame in f. 0
 * or p->dead. */
int peer_window(struct peer *p, uint32_t bytes, struct peer_frame *f);

/* The frame is FAILED: its text becomes p->error, as the answer to what was asked. Returns the negative errno of its
 * code. The connection lives. */
int peer_failed(struct peer *p, const struct peer_frame *f);
/* The frame is none that may come now: the connection is dead. */
int peer_unexpected(struct peer *p, const struct peer_frame *f);

/* PIN, and what came of it: 0; -ENOENT and others with p->error. */
int peer_pin(struct peer *p, const char *name, uint32_t *pin, struct frame_entry *e);
int peer_unpin(struct peer *p, uint32_t pin);

#endif
