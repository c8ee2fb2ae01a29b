/* What a mount is, and how its pages come. Inner header of agent/page; all of it belongs to the loop thread.
 *
 *     link -- pager --< mount --< viewer --< stretch        pager --< read (a READ under way), --< opening
 *                                   |
 *                                program
 *
 * A page of a mount is *missing* (a hole of the memfd), *asked* (a READ for it is under way) or *here* (data of the
 * memfd, and never written again). The memfd itself is the record: who takes it over (RESUME, after an agent died)
 * learns from its data and holes what is here. Nothing about a mount is on the disk.
 *
 *                       PIN epoch 0                 DATA            last viewer gone
 *     opening ----------------------------> pinned ------> ... ------------------------> UNPIN, freed
 *        | -ENOENT, -ETIMEDOUT, ...          |   ^
 *        v                        link lost  |   | PINNED: same lineage, epoch, size
 *     answered                               v   |
 *                                         unpinned --link up--> PIN epoch E --LIMIT, NOT_FOUND--> failed
 *
 * - A fault (read from the program's userfaultfd) becomes a window of pages (plan.h), asked for as demand. Windows that
 * cannot be asked for now (unpinned; too many at once) wait in `wanted`. A page that the background has asked for
 * already is asked for again when somebody stands still for it: demand overtakes bulk, and the copy that comes second
 * finds the page there.
 * - Background: as long as less than pager.ahead bytes are under way, the plan's next run is asked for, of each mount
 * in turn. `ahead` rises while answers come as fast as the fastest (twice its time, and BULK_SLACK_MS more) and falls
 * when they do not: full use of a long line, and no queue before a demanded page on a short one.
 * - DATA is put into the memfd from the frame's own bytes, and whoever waits in a mapping of it is woken: in that
 * order, always.
 *
 * What can go wrong:
 *
 *     link lost               reads under way: demand goes back to `wanted`, bulk becomes missing again; PIN anew when
 * it is up. Threads wait.
 *     ... for longer than MEMSYNC_FETCH_TIMEOUT with somebody waiting          failed (-ETIMEDOUT)
 *     epoch not kept at the remote, or another lineage there                   failed (-ESTALE)
 *     remote cannot read its disk                                              failed (-EIO)
 *     no memory for a page here                                                failed (-ENOMEM)
 *     a program punches holes into what is here      the next fault finds a hole and asks for it again
 *     program dies                                   its viewers go; the last one's mount too
 *     agent dies                                     threads wait in their faults: the program keeps its userfaultfd.
 * It hands memfd and descriptor to the next agent, which wakes every announced range once
 *
 * Failed: every page that is missing is poisoned in all stretches, now and when they come later; what is here stays.
 * Said once to every program.
 *
 * Mirror: a mount whose memfd is a push region's file as well (mirror.c). Programs write it; its size is changed by
 * TRUNCATE, and from `base` on a hole is zeros: nothing there is ever asked for.
 *
 * Eager: where this agent or the program has no userfaultfd (or not for shared memory), the whole region is written
 * into the memfd before OPEN is answered, and nothing faults. */
#ifndef PAGE_MOUNT_H
#define PAGE_MOUNT_H

#include "agent/page/page.h"
#include "agent/page/pages.h"
#include "agent/page/plan.h"
#include "agent/track/hashes.h"
#include "wire/control.h"
#include "wire/shared.h"

#define BULK_STREAMS 8u
#define BULK_AHEAD_MIN (2u << 20)
#define BULK_AHEAD_MAX (64u << 20) /* 1.6 GB/s over 40 ms; within the windows of the streams */
#define BULK_SLACK_MS 3u
#define BULK_FAR_MS 4u /* there and back: a socket's buffers are too small for such a path */
#define BULK_READS 96u          /* and this: those of a recorded order are small */
#define DEMAND_READS 128u       /* under way: a server has SESSION_REQUESTS for a connection */
#define HEAD_BYTES (60u << 10) /* comes with the pin: one DATA; with more, the first byte waits for the rest of it */
#define MOUNT_SIZE_MAX (16ULL << 40)
#define STRETCHES_MAX 65536u
#define LEARNING_MS 5000u /* nothing is fetched ahead so long when a first order is to be recorded */
#define BULK_AHEAD_FIRST (8u << 20)
#define OPENED_MS 2u /* at most so long an opened region's background lets its program go first */
#define EVICT_MORE 256u         /* pages that a bound may be exceeded by for a moment */
#define MOUNT_LINGER_MS 10000u /* without viewers: one may be handed on by exec */

struct stretch {
    uint64_t addr, len, offset;
};

/* Pages that were filled one behind the other, and the bound (evict.c). */
struct filled {
    uint64_t from, to;
};

struct eviction {
    uint64_t bound;        /* pages; 0: none */
    struct filled *queue;  /* a ring: the oldest first; every page that is here is in it */
    size_t first, n, cap;
    bool anew; /* not every page that is here is in it: it is made anew before the next one goes */
    struct filled kept[4]; /* what calls asked for last: not evicted */
    unsigned kept_turn;
    uint64_t lead, lead_to; /* what may be fetched ahead all the same */
    uint64_t walked, ahead; /* where a walk was last, and how far it is led */
    bool full;              /* the bound was reached: the background stops */
    uint64_t evicted;       /* bytes, ever */
    bool pressed;           /* nothing more can go before something is published, or a moment is over */
    bool huge;              /* a mirror's pages may be parts of huge ones: the bound is not kept */
    struct hashes came;     /* of a mirror's pages: what the remote had when they came; UNKNOWN where that is not known */
};

/* Where a followed region goes on to (follow.c). */
struct later {
    uint64_t epoch, size;
    int64_t mtime;
};

struct following {
    uint32_t request, changed; /* of a PIN of the newest epoch, of a CHANGED; 0: none is under way */
    uint32_t pin;              /* the newer one */
    struct later to;
    uint64_t next_at;
    bool lost; /* our epoch is */
    bool said;
};

struct viewer {
    struct viewer *next_mount, *next_program;
    struct mount *mount;
    struct program *program;
    uint32_t number;
    uint64_t resident; /* the bound it asks for, bytes; 0: none */
    struct stretch *stretches;
    size_t count, cap;
};

/* A window that waits to be asked for. */
struct want {
    uint64_t from, to; /* pages */
    uint64_t since;
};

enum mount_state { MOUNT_UNPINNED, MOUNT_ASKED, MOUNT_PINNED, MOUNT_FAILED };

struct mount {
    struct mount *next;
    struct pager *pager;
    char *name, *path; /* path: of the first viewer */
    struct id lineage;
    uint64_t epoch, size; /* epoch: of a mirror, the last that is known to be durable; 0: none is yet */
    int64_t mtime;
    struct body *body; /* of a mirror, held; NULL: not written to */
    uint64_t base;     /* bytes: at the smallest, what it was cut to since the remote knows of all its sizes */
    uint64_t unwritten_since; /* nobody has it open for writing, and all is published */
    bool live;                /* the pin is */
    bool live_refused;
    uint32_t swap, swap_live; /* request of a PIN that is to take the pin's place; 0: none */
    uint32_t old_pin;         /* to be given back once no READ of it is under way */
    uint64_t timeout_ms; /* viewers with another one have another mount */
    enum mount_state state;
    uint32_t pin, request;
    uint64_t retry_at;
    int memfd, shared_fd;
    uint64_t dev, ino; /* of memfd */
    struct view *shared;
    uint8_t *window; /* the mapping that is filled; NULL: eager */
    size_t window_len;
    bool eager;
    struct pages pages;
    struct plan plan;
    struct eviction evict;
    struct following follow;
    struct viewer *viewers;
    uint64_t idle_since; /* while it has none */
    uint64_t made_at;
    bool opened; /* just now: its program is about to map it, and would have to share the processors with the background */
    struct fetching *fetchings;
    struct want *wanted;
    size_t wanted_n, wanted_cap; /* bounded by the threads that wait: nothing is in it twice */
    bool starved;                /* there was no memory for one of them */
    uint64_t bytes_in;
    char reason[256]; /* why it failed */
};

struct read {
    struct read *next;
    struct mount *mount; /* NULL: gone meanwhile */
    uint32_t request;
    uint32_t stream; /* of the pager's, by index */
    uint64_t offset, len, got;
    uint64_t limit; /* what lies beyond is of no use any more: cut off meanwhile */
    uint32_t pin;
    uint64_t since; /* uv_now: when somebody began to wait; demand */
    uint64_t sent;  /* uv_hrtime; 0: with the pin */
    bool bulk;
};

/* A call of a program waits for [from, to), of which all before `from` is here. */
struct fetching {
    struct fetching *next;
    struct answer *answer;
    uint64_t from, to, since;
};

/* An OPEN (or a look) that is being asked for. */
struct opening {
    struct opening *next;
    struct program *program; /* held, by the answer; NULL: given up, but asked for: the answer is waited for */
    struct answer *answer;
    uint32_t request; /* 0: not asked */
    uint64_t epoch;   /* and lineage: that one and no other (RESUME); 0: the last */
    struct id lineage;
    uint64_t since;
    uint64_t sent;       /* uv_hrtime */
    struct mount *mount; /* eager: is being filled */
    struct control_open how;
};

struct pager {
    struct link *link;
    uv_timer_t *opened; /* when those that were just opened are so no more */
    struct mount *mounts, *turn; /* turn: whose background was asked last */
    struct read *reads;
    unsigned demand_n, bulk_n;
    struct opening *openings;
    uint32_t streams[1 + BULK_STREAMS]; /* the link's numbers; [0]: pins and demand */
    uint64_t under[1 + BULK_STREAMS];   /* bytes under way on each */
    uint64_t bulk, ahead;               /* bytes */
    uint64_t fastest, usual;            /* ns from a bulk READ to its last DATA */
    uint64_t trip;                      /* ns from a demanding READ to its first DATA */
};

/* mount.c */
/* That epoch, or what has come of it by writing here. */
struct mount *mount_find(struct pager *g, const struct control_open *how, const struct id *lineage, uint64_t epoch,
                         bool eager);
/* memfd: one that is taken over, or -1. NULL without memory or descriptors. */
struct mount *mount_new(struct pager *g, const struct control_open *how, const struct frame_entry *e, int memfd,
                        int shared_fd, bool eager);
void mount_free(struct mount *m);
struct viewer *viewer_add(struct mount *m, struct program *p, const struct control_open *how);
void viewer_end(struct viewer *v);
int viewer_map(struct viewer *v, uint64_t addr, uint64_t len, uint64_t offset);
void viewer_unmap(struct viewer *v, uint64_t addr, uint64_t len);
void mount_wake(struct mount *m, uint64_t from, uint64_t to); /* pages */
/* Pages [from, to) from their bytes, or zeros (NULL). The last page of the region may be short. 0 or negative errno. */
int mount_put(struct mount *m, uint64_t offset, const uint8_t *data, uint64_t len);
void mount_fail(struct mount *m, int err, const char *format, ...) __attribute__((format(printf, 3, 4)));
void mount_poison(struct mount *m, const struct viewer *v, const struct stretch *s); /* what is missing in it */
void mount_fault(struct mount *m, struct viewer *v, const struct stretch *s, uint64_t page);
/* A further viewer asks for this order: the one that fetches more counts. */
void mount_order(struct mount *m, uint8_t order);
/* MADV_*, of bytes. */
void mount_advise(struct mount *m, uint8_t advice, uint64_t offset, uint64_t len);
bool mount_complete(const struct mount *m);
int mount_window(struct mount *m); /* as long as the pages need */

/* fetch.c */
struct pager *pager_of(struct link *k);
void fetch_read_end(struct pager *g, struct read *r); /* what of it did not come is missing again */
void fetch_wanted(struct mount *m);                   /* asks for what waits, as far as it may */
void fetch_step(struct mount *m);                     /* its calls that wait */
void fetch_ahead_begin(struct pager *g, uint64_t trip);
void fetch_ahead_adjust(struct pager *g, const struct read *r);
void fetch_pump(struct pager *g);
void fetch_opened(struct mount *m); /* its background waits until the program has mapped it, or asks for something */
void fetch_begun(struct mount *m);
void fetch_want(struct mount *m, uint64_t from, uint64_t to, uint64_t since); /* demand */
bool fetch_demanded(const struct mount *m, uint64_t page);                    /* already */
/* Of a page that was asked for in the background: a demand would have it here sooner, as far as one can tell by what is
 * under way before it. */
bool fetch_is_far(const struct mount *m, uint64_t page);
/* Answers when the bytes are all here; the answer's reference is taken over. */
void fetch_range(struct mount *m, struct answer *a, uint64_t offset, uint64_t len);
void fetch_forget_program(struct mount *m, const struct program *p); /* its calls wait no more */
void fetch_forget(struct mount *m); /* it goes, or failed */
void fetch_unpin(struct pager *g, uint32_t pin);
void fetch_pin(struct mount *m);
void opening_ask(struct pager *g, struct opening *o);

/* evict.c */
int mount_punch(struct mount *m, uint64_t from, uint64_t to); /* what is here of these pages goes. 0 or -errno */
void evict_queue(struct eviction *e, struct filled f);
uint32_t evict_moves(const struct control_open *how, bool eager); /* struct view's moves */
void evict_bound(struct mount *m); /* viewers came or went: the smallest bound counts */
void evict_free(struct mount *m);
void evict_filled(struct mount *m, uint64_t from, uint64_t to); /* these have come */
/* So many pages are about to be asked for: makes room for them. */
void evict_room(struct mount *m, uint64_t pages);
void evict_keep(struct mount *m, uint64_t from, uint64_t to); /* a call is about to read these */
void evict_lead(struct mount *m, uint64_t from, uint64_t to); /* these will be wanted next */
void evict_walk(struct mount *m, uint64_t at); /* or those from there on, if this goes on */
bool evict_can_ask(const struct mount *m); /* demand; else it waits for answers */
/* The next run to be asked for in the background. */
bool evict_next(struct mount *m, uint64_t *from, uint64_t *to);
void fetch_cut(struct mount *m); /* nothing beyond its base is of use any more */
void fetch_swap(struct mount *m, bool live);
void fetch_retire(struct mount *m); /* the old pin, if nothing needs it */

void fetch_drop(struct mount *m); /* nothing that is under way, or waits to be asked for, is wanted any more */
void fetch_ask_newest(struct pager *g, uint32_t request, const char *name);
void fetch_ask_changed(struct pager *g, uint32_t request, uint32_t pin, uint32_t later);

/* follow.c: true where it was theirs. */
bool follow_is(const struct mount *m);
void follow_tick(struct mount *m, uint64_t now);
void follow_stop(struct mount *m, bool unpin); /* it goes, or the link did */
bool follow_pinned(struct pager *g, uint32_t request, uint32_t pin, const struct frame_entry *e);
bool follow_extents(struct pager *g, const struct frame_extents *e);
bool follow_failed(struct pager *g, uint32_t request);
void follow_lost(struct mount *m); /* our epoch is not to be had any more: on to the newest */
bool follow_repinned(struct mount *m, uint32_t pin, const struct frame_entry *e);

/* mirror.c */
int mount_resize(struct mount *m, uint64_t size);
uint64_t mount_pages(const struct mount *m);   /* that are the remote's, here or not; zeros lie beyond */
struct pages mount_theirs(const struct mount *m); /* only those; shares the bits */
int mount_truncate(struct mount *m, uint64_t size, bool grow);
void mount_unwritten(struct mount *m);            /* its body is let go */
void mount_settle(struct mount *m, uint64_t now); /* the clock: what the remote knows of it by now */
bool mount_kept(const struct mount *m);           /* written to, or with something the remote has not got */
const struct id *mount_lineage(const struct mount *m);
struct mount *mount_made(struct pager *g, const char *name); /* by OPEN with create, and not at the remote yet */

/* evict_written.c: of what programs write to */
bool evict_written_called(const struct mount *m); /* a program is in a writing call */
bool evict_written_can(const struct mount *m); /* between view_punch_begin and _end */
void evict_written(struct mount *m, struct filled f);
void evict_came(struct mount *m, uint64_t from, const uint8_t *data, uint64_t len); /* data NULL: zeros */
void evict_joined(struct mount *m, bool same); /* same: what is here is what the remote has */
bool evict_written_must(const struct mount *m); /* the bound holds demand back until pages can go */
void evict_captured(struct mount *m, const struct extents *looked);
/* Something was published, or a moment is over: what waits for room goes on, or (want) a publication is asked for. */
void evict_again(struct mount *m, bool want);

/* viewers.c */
/* The mount it came to, if any. */
struct mount *opening_pinned(struct pager *g, struct opening *o, uint32_t pin, const struct frame_entry *e);
void opening_end(struct pager *g, struct opening *o, int result);
bool opening_absent(struct pager *g, struct opening *o); /* false: it has to end with -ENOENT */
void openings_look(struct mount *m); /* eager ones that are complete, or failed */

#endif
