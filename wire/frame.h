/* The protocol between agents: frames over one ordered byte stream. This header is the specification's normative half; frame.md tells the story.
 *
 * A frame is a 24-byte header and a payload of at most FRAME_PAYLOAD_MAX bytes, all integers big-endian:
 *
 *     0   u16  magic 0x4d53 ("MS")
 *     2   u8   type (enum frame_type)
 *     3   u8   zero
 *     4   u32  payload length
 *     8   u32  stream
 *     12  u32  order: the frame's number on its stream, from 0, wrapping; on stream 0 always 0
 *     16  u64  checksum: XXH3-64 of bytes 0..15, seeded with the XXH3-64 of the payload
 *
 * Both sides send HELLO first, on stream 0. A wrong magic, checksum, length or order ends the connection: after such a fault nothing that follows can
 * be trusted. What a peer asks for and may not have is answered by FAILED or ERROR, and the connection lives.
 *
 * The client (a writer's agent, or the command-line tool) numbers streams from 1 and opens one by using it. Stream 0 carries HELLO, ERROR, PING,
 * PONG, WINDOW and CLOSE, and is not limited. On any other stream each side may have FRAME_WINDOW payload bytes of PAGES, DATA and HASHES outstanding; WINDOW gives
 * more.
 *
 * Handles: the client gives a u32 to a region name by ATTACH; it is good on all streams of that connection. */
#ifndef WIRE_FRAME_H
#define WIRE_FRAME_H

#include "agent/base/id.h"
#include "wire/bytes.h"
#include "wire/name.h"

#define FRAME_HEADER 24u
#define FRAME_PAYLOAD_MAX 65536u
#define FRAME_DATA_MAX 61440u /* page bytes in one PAGES or DATA: 15 pages, so that tables fit beside them */
#define FRAME_PAGE 4096u /* unit of hashes and deltas */
#define FRAME_WINDOW (32u << 20) /* 0.8 GB/s over 40 ms */
#define FRAME_VERSION 3u
#define FRAME_TEXT_MAX 512u

enum frame_type {
    FRAME_HELLO = 1,
    FRAME_ERROR,    /* the connection ends; struct frame_failed, seq 0 */
    FRAME_PING,     /* u64 token */
    FRAME_PONG,     /* the same token */
    FRAME_WINDOW_MORE, /* u32 stream, u32 bytes */
    FRAME_CLOSE,    /* u32 stream: its sender uses it no more; an epoch open on it is dropped */

    FRAME_ATTACH,   /* struct frame_attach */
    FRAME_ATTACHED, /* struct frame_attached */
    FRAME_DETACH,   /* u32 handle: gives up the lease, when one is held */

    FRAME_BEGIN,    /* struct frame_begin: an epoch opens on this stream; one at a time */
    FRAME_OP,       /* struct frame_op */
    FRAME_REGION,   /* struct frame_region */
    FRAME_PAGES,    /* struct frame_pages */
    FRAME_END,      /* u64 seq, u64 count of frames between BEGIN and END, [u8 1: nobody waits for RECEIVED, send none]: commit */
    FRAME_ABORT,    /* u64 seq: forget the open epoch */
    FRAME_RECEIVED, /* u64 seq: all of it is in the server's memory */
    FRAME_DURABLE,  /* u64 seq: committed, on disk (in memory for a mem: store) */
    FRAME_FAILED,   /* struct frame_failed: epoch seq, or request, was refused */

    FRAME_LIST,     /* u32 request */
    FRAME_ENTRY,    /* u32 request, struct frame_entry */
    FRAME_LIST_END, /* u32 request */
    FRAME_PIN,      /* struct frame_pin */
    FRAME_PINNED,   /* u32 request, u32 pin, struct frame_entry */
    FRAME_READ,     /* struct frame_read */
    FRAME_DATA,     /* u32 request, u8 kind (FRAME_DATA_* bits), u32 length, data unless zeros */
    FRAME_HASH,     /* struct frame_hash */
    FRAME_HASHES,   /* u32 request, u32 count, count * FRAME_HASH_BYTES: see struct frame_hash */
    FRAME_UNPIN,    /* u32 pin */
    FRAME_REMOVE,   /* u32 request, str name, u8 force (take it although somebody holds its lease) */
    FRAME_OK,       /* u32 request */

    FRAME_JOIN,     /* id token: first on a further socket of a connection, instead of HELLO */
    FRAME_PACKED,   /* u32 length, an LZ4 block: unpacked, `length` bytes of a PAGES payload */

    FRAME_CHANGED,  /* u32 request, u32 pin, u32 pin of a later epoch of the same region */
    FRAME_EXTENTS,  /* struct frame_extents */
    FRAME_TYPES
};

#define FRAME_HASHES_MAX 4000u
#define FRAME_HASH_BYTES 16u
#define FRAME_HASH_FANOUT 16u
#define FRAME_HASH_LEVELS 14u /* a node of the last covers any region */
#define FRAME_PACKED_HEAD 4u

/* Error codes of the wire; never the host's errno. */
enum frame_code {
    FRAME_E_PROTOCOL = 1, /* malformed or out of order */
    FRAME_E_VERSION,
    FRAME_E_NOSPACE, /* the store's disk is full */
    FRAME_E_IO,
    FRAME_E_FENCED, /* another writer holds, or has since held, the lease */
    FRAME_E_LINEAGE, /* the region's lineage or epoch is not the one the frame continues */
    FRAME_E_NAME, /* a bad name, or a clash such as `a` and `a/b` */
    FRAME_E_NOT_FOUND,
    FRAME_E_LIMIT,
    FRAME_E_DELTA, /* a page did not come out as its delta said */
    FRAME_E_CODES
};

int frame_code_errno(uint16_t code); /* negative errno for a wire code; -EPROTO for one unknown */
uint16_t frame_code_from(int err);   /* wire code for a negative errno */

struct frame_header {
    uint8_t type;
    uint32_t len, stream, order;
    uint64_t checksum;
};

uint64_t frame_payload_hash(const void *payload, size_t len);
/* Writes FRAME_HEADER bytes. `hash` is frame_payload_hash of the payload. */
void frame_header_put(uint8_t *to, uint8_t type, uint32_t stream, uint32_t order, uint32_t len, uint64_t hash);
/* The step: looks at the first `have` bytes of a stream. Returns the whole frame's size once all of it is there, its payload being at
 * at + FRAME_HEADER, checked; 0 when more bytes are needed; -EPROTO on a wrong magic, type, length or reserved byte, -EBADMSG on a wrong checksum.
 * With FRAME_HEADER bytes there, h is filled whether or not the rest is (so that a reader can size its buffer). */
int64_t frame_step(const uint8_t *at, size_t have, struct frame_header *h);

/* Every *_put returns the payload's length, or 0 when it does not fit cap; every *_get returns 0 or -EPROTO. Payload buffers need cap <= FRAME_PAYLOAD_MAX. */

struct frame_hello {
    uint16_t version;
    struct id identity;
    char host[256];  /* for people: who holds a lease */
    struct id token; /* the server's name for the connection, which further sockets JOIN; zeros from a client */
};
size_t frame_hello_put(void *to, size_t cap, const struct frame_hello *h);
int frame_hello_get(const void *p, size_t len, struct frame_hello *h);

struct frame_attach {
    uint32_t handle;
    uint8_t write; /* take the writer's lease on the name */
    char name[NAME_CAP];
};
size_t frame_attach_put(void *to, size_t cap, const struct frame_attach *a);
int frame_attach_get(const void *p, size_t len, struct frame_attach *a);

enum frame_attach_status {
    FRAME_ATTACH_NONE,   /* no such region; the lease on its name is given, when asked for */
    FRAME_ATTACH_EXISTS, /* there it is; likewise */
    FRAME_ATTACH_HELD,   /* another writer holds the lease: nothing was attached; holder says who */
    FRAME_ATTACH_BAD     /* the name is refused; holder says why */
};

struct frame_attached {
    uint32_t handle;
    uint8_t status;
    struct id lineage;    /* of the region there, and below */
    uint64_t epoch, size;
    uint64_t fence;       /* number of the lease given; every epoch carries it */
    struct id writer;     /* who wrote the last epoch */
    struct source source; /* and from which file */
    char holder[256];
};
size_t frame_attached_put(void *to, size_t cap, const struct frame_attached *a);
int frame_attached_get(const void *p, size_t len, struct frame_attached *a);

enum frame_op_kind {
    FRAME_OP_CREATE = 1, /* a region of this lineage comes to be under the handle's name; whatever lineage has that name is removed */
    FRAME_OP_RENAME,     /* the handle's region takes the name of handle `to`; whatever lineage has that name is removed; the handle goes on naming
                            its region, and `to` names nothing until CREATE */
    FRAME_OP_UNLINK      /* the handle's region is removed; the handle names nothing until CREATE */
};

struct frame_op {
    uint8_t kind;
    uint32_t handle, to;
    struct id lineage;    /* CREATE */
    struct source source; /* CREATE */
};
size_t frame_op_put(void *to, size_t cap, const struct frame_op *o);
int frame_op_get(const void *p, size_t len, struct frame_op *o);

struct frame_begin {
    uint64_t seq;
    struct id writer; /* who wrote the epoch, if not the peer (a hub passes it through); none: the peer. Not sent when none */
};
size_t frame_begin_put(void *to, size_t cap, const struct frame_begin *b);
int frame_begin_get(const void *p, size_t len, struct frame_begin *b);

/* A region's part in the epoch: for each region touched, after the OPs and before its PAGES. The region is first cut to min_size (UINT64_MAX: it never
 * shrank), then made `size` long, then given its pages. The epoch continues number `base` (0 with a CREATE), and `epoch` is above it: by one, unless a hub brings
 * a replica up to date. May be repeated within the epoch, with the same numbers: the last size counts, and the lowest min_size. */
struct frame_region {
    uint32_t handle;
    uint64_t epoch, base, fence, min_size, size;
};
size_t frame_region_put(void *to, size_t cap, const struct frame_region *r);
int frame_region_get(const void *p, size_t len, struct frame_region *r);

/* PAGES: u32 handle, u32 count, count entries of {u64 offset, u32 length, u32 kind}, then the bytes of the data entries one after the other. Any offset
 * and length (what is behind the region's size at END is dropped); data bytes at most FRAME_DATA_MAX; a zeros entry may be of any length. */
/* DELTA: one whole page (offset a multiple of FRAME_PAGE, length FRAME_PAGE) of which only some blocks of FRAME_DELTA_BLOCK bytes differ from the region as
 * the epoch before left it. Its data: 16 bytes XXH3-128 (canonical) of the page as it is to be, u32 mask (bit i: block i), then the blocks of the mask. The
 * receiver checks the page before it commits the epoch and answers FAILED with FRAME_E_DELTA when it comes out otherwise: the client then compares the
 * region by hashes and sends whole pages. A page is in an epoch as DELTA at most once, and then in no other way. */
/* COPY: one whole page (offset a multiple of FRAME_PAGE, length FRAME_PAGE) that stands at `source` (likewise) in the region as the epoch before left it. Its
 * data: u64 source, 16 bytes XXH3-128 (canonical) of the page. Checked as a DELTA is. Not in an epoch that creates or cuts the region. */
enum frame_pages_kind { FRAME_PAGES_DATA, FRAME_PAGES_ZEROS, FRAME_PAGES_DELTA, FRAME_PAGES_COPY, FRAME_PAGES_KINDS };
#define FRAME_COPY_BYTES 24u
#define FRAME_DELTA_BLOCK 128u
#define FRAME_DELTA_BLOCKS (FRAME_PAGE / FRAME_DELTA_BLOCK)
#define FRAME_DELTA_HEAD 20u
#define FRAME_PAGES_HEAD 8u
#define FRAME_PAGES_ENTRY 16u
#define FRAME_PAGES_ENTRIES 256u /* at most, in one frame */

struct frame_extent {
    uint64_t offset;
    uint32_t len, kind;
    const uint8_t *data; /* NULL for zeros */
};

/* The parts of a DELTA extent's data, which frame_pages_get has checked. */
struct frame_delta {
    const uint8_t *hash, *blocks;
    uint32_t mask;
};
struct frame_delta frame_delta_of(const struct frame_extent *e);
/* The next run of neighbouring blocks from block *at on, as a DATA extent; false when there is none. */
bool frame_delta_run(const struct frame_extent *e, uint32_t *at, struct frame_extent *run);

/* The parts of a COPY extent's data, which frame_pages_get has checked. */
struct frame_copy {
    uint64_t source;
    const uint8_t *hash;
};
struct frame_copy frame_copy_of(const struct frame_extent *e);

struct frame_pages {
    uint32_t handle, count;
    struct rd entries, data;
};
/* Checks the whole payload, entries and sums, once. Then frame_pages_next yields count extents, whose data point into the payload. */
int frame_pages_get(const void *p, size_t len, struct frame_pages *pages);
bool frame_pages_next(struct frame_pages *pages, struct frame_extent *e);
/* Writes head and table for `count` extents (data fields unused) and returns the bytes written: the caller appends the data itself. */
size_t frame_pages_put(void *to, size_t cap, uint32_t handle, const struct frame_extent *e, uint32_t count);

struct frame_failed {
    uint64_t seq; /* the epoch's, or the request's number */
    uint16_t code;
    char text[FRAME_TEXT_MAX];
};
size_t frame_failed_put(void *to, size_t cap, const struct frame_failed *f);
int frame_failed_get(const void *p, size_t len, struct frame_failed *f);

struct frame_entry {
    struct id lineage, writer;
    uint64_t epoch, size;
    int64_t committed_at; /* seconds since 1970-01-01 UTC */
    uint8_t leased;
    char name[NAME_CAP], holder[256];
};
size_t frame_entry_put(void *to, size_t cap, uint32_t request, const struct frame_entry *e);
int frame_entry_get(const void *p, size_t len, uint32_t *request, struct frame_entry *e);
/* PINNED is an entry with the pin's number before it. */
size_t frame_pinned_put(void *to, size_t cap, uint32_t request, uint32_t pin, const struct frame_entry *e);
int frame_pinned_get(const void *p, size_t len, uint32_t *request, uint32_t *pin, struct frame_entry *e);

/* Keeps a region's last committed epoch readable; or one that the client names because it had it pinned before (over a connection that is lost, or another
 * of its own): FRAME_E_LIMIT when that one is not to be had any more. `head`: that many bytes from the region's beginning come right behind PINNED, as if
 * read (demanded) under the same request number; no DATA comes of an empty region. With these on the wire (`keep`), the pin outlives its connection for STORE_LEASE_MS, for the
 * same identity to take it over. */
struct frame_pin {
    uint32_t request;
    uint8_t keep;
    uint64_t epoch;    /* 0: the last */
    struct id lineage; /* of that epoch */
    uint32_t head;  /* at most FRAME_READ_MAX */
    uint8_t live;   /* for the region's writer: see frame.md. Only with keep */
    char name[NAME_CAP];
};
size_t frame_pin_put(void *to, size_t cap, const struct frame_pin *p);
int frame_pin_get(const void *p, size_t len, struct frame_pin *pin);

/* READ is answered by DATA frames that go on where the last one ended; FRAME_DATA_MORE is on all but the last. They are short at the region's end: an empty
 * one behind it. bulk, when it is on the wire, is the client's word on how it waits: 0 a thread stands still for it, 1 nobody waits yet. The stream has the
 * priority of what was last asked on it. */
#define FRAME_READ_MAX (1u << 20)
enum frame_read_bulk { FRAME_READ_DEMAND, FRAME_READ_BULK, FRAME_READ_PLAIN /* not on the wire */ };
struct frame_read {
    uint32_t request, pin;
    uint64_t offset;
    uint32_t len; /* 1 to FRAME_READ_MAX */
    uint8_t bulk; /* enum frame_read_bulk */
};
size_t frame_read_put(void *to, size_t cap, const struct frame_read *r);
int frame_read_get(const void *p, size_t len, struct frame_read *r);

#define FRAME_DATA_ZEROS 1u
#define FRAME_DATA_MORE 2u
#define FRAME_DATA_HEAD 9u
struct frame_data {
    uint32_t request;
    uint8_t kind; /* FRAME_DATA_* bits */
    uint32_t len;
    const uint8_t *data; /* NULL for zeros */
};
/* Writes the FRAME_DATA_HEAD bytes before the data. */
void frame_data_head(uint8_t *to, uint32_t request, uint8_t kind, uint32_t len);
int frame_data_get(const void *p, size_t len, struct frame_data *d);

/* The length of the PAGES payload in a PACKED one; 0 for what cannot be one (too short, or a length beyond FRAME_PAYLOAD_MAX). */
uint32_t frame_packed_length(const void *p, size_t len);

/* Asks for the hashes of nodes first .. first + count of a level of a pinned region's tree; count <= FRAME_HASHES_MAX. Level 0 are the pages: XXH3-128
 * (canonical) of FRAME_PAGE bytes, the last page filled up with zeros. A node of level n + 1 is XXH3-128 over the FRAME_HASH_FANOUT hashes of level n that it
 * covers, those beyond the region's end being zeros. A page of zeros is 16 zero bytes, and so is a node over nothing but such; where XXH3-128 itself is 0 or 1
 * (big-endian), it is given as 2^64 more. */
struct frame_hash {
    uint32_t request, pin;
    uint64_t first;
    uint32_t count;
    uint8_t level; /* below FRAME_HASH_LEVELS */
    uint8_t fresh; /* read the bytes again: do not trust hashes kept from before */
};
/* The answer to CHANGED: pages that may differ between two epochs, in rising order, FRAME_EXTENTS_MAX stretches at most (more are told as fewer, longer ones).
 * What lies behind the end of the shorter of the two is not told. `all`: it is not known, anything may; count is then 0. */
#define FRAME_EXTENTS_MAX 3800u
#define FRAME_EXTENTS_HEAD 9u
struct frame_extents {
    uint32_t request, count;
    uint8_t all;
    const uint8_t *at; /* count times u64 page, u64 pages: frame_extent */
};
/* Writes the FRAME_EXTENTS_HEAD bytes before the stretches. */
void frame_extents_head(uint8_t *to, uint32_t request, uint8_t all, uint32_t count);
int frame_extents_get(const void *p, size_t len, struct frame_extents *e);
void frame_extent(const struct frame_extents *e, uint32_t i, uint64_t *from, uint64_t *to);

size_t frame_hash_put(void *to, size_t cap, const struct frame_hash *h);
int frame_hash_get(const void *p, size_t len, struct frame_hash *h);

#endif
