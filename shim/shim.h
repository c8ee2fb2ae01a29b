/* What the parts of the preload library share.
 *
 * States. The library is inactive (shim_on false: no rules, another program, a bad value) or active; it never becomes
 * active later than its constructor. Inactive, or called in a process that is not its own (vfork, raw clone:
 * shim_mine() false), every hook passes through.
 *
 * The lock. One lock guards the fd table's meaning, regions, ranges and the connection. It is taken with all signals
 * blocked, so that no handler runs while it is held, and never held while waiting for the agent's answer to a sync
 * point. A thread that holds it never calls a function of ours that hooks (it uses raw calls). Waiting threads hold
 * nothing: a handler that syncs or jumps out finds everything usable.
 *
 * Fast paths read without it: shim_on, the fd table's words, the hull and the sequence of the ranges. */
#ifndef SHIM_SHIM_H
#define SHIM_SHIM_H

#include "shim/ranges.h"
#include "shim/raw.h"
#include "shim/rules.h"
#include "wire/shared.h"

#include <stdarg.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/types.h>

#define SHIM_EXPORT __attribute__((visibility("default")))
#define SHIM_FDS 65536
#define SHIM_REGIONS 16384u

/* ---- init.c: variables and state */

struct shim_settings {
    struct rules rules;
    struct rules_defaults defaults;
    uint8_t loss;
    uint64_t timeout_ms, fetch_timeout_ms;
    char remote[1024], socket[108], program[256], host[256];
};

extern bool shim_on;
extern pid_t shim_pid;
extern uint64_t shim_page;
extern struct shim_settings shim;

static inline bool shim_active(void)
{
    return __builtin_expect(shim_on, false);
}

/* Slow paths only: whether this process is the one the tables describe. */
static inline bool shim_mine(void)
{
    return raw_getpid() == shim_pid;
}

struct held {
    uint64_t mask;
    int error;
    bool inside; /* the thread held it already: nothing to release */
};

struct held shim_lock(void);
void shim_unlock(const struct held *h); /* restores errno too */
void shim_lock_reset(void);             /* in a forked child */
const void *shim_lock_flag(void);       /* the thread's own word of the lock */

/* ---- say.c: lines for people. The format knows %s %d %u %x (64 bits: %l) and %%; %d and %u take int, %e an errno
 * value as text. */

enum say_level { SAY_OFF, SAY_ERROR, SAY_WARN, SAY_INFO, SAY_DEBUG };
extern enum say_level say_threshold;
extern char say_file[CONTROL_PATH]; /* "" for standard error */
void say(enum say_level level, const char *format, ...);
void say_start(void);
/* Says a line for its cause once a process. */
#define say_once(level, ...)                                                                                           \
    do {                                                                                                               \
        static uint32_t said_;                                                                                         \
        if (!__atomic_exchange_n(&said_, 1u, __ATOMIC_RELAXED))                                                        \
            say(level, __VA_ARGS__);                                                                                   \
    } while (0)
/* Bounded text: cut at cap, always terminated; returns the length. */
size_t say_format(char *to, size_t cap, const char *format, ...);

/* ---- files.c: descriptors and regions */

/* FD_VIEW + n: open file n of a view (view.h), FD_TRACKED + n: region n + 1. */
#define SHIM_VIEWS 4096u
enum { FD_UNKNOWN, FD_UNMATCHED, FD_READER, FD_VIEW, FD_TRACKED = FD_VIEW + SHIM_VIEWS };

struct region {
    bool used, fresh;
    uint8_t hashed;   /* enum control_hashed */
    uint32_t streams; /* stdio streams that write it unseen, where it is not hashed anyway */
    uint32_t fds;     /* writable descriptors; of a mirror: open files */
    uint32_t mirror;  /* index + 1 of the mount that it is the other half of (view.h); 0: a file */
    enum rule_strategy strategy;
    uint64_t dev;
    struct source source;
    struct marks *marks; /* NULL before the first writing call */
    struct control_terms terms;
    char path[CONTROL_PATH], name[NAME_CAP];
};

extern uint32_t files_fd[SHIM_FDS];
extern uint32_t files_open;    /* regions in use */
extern uint32_t files_streams; /* streams over all regions */

static inline uint32_t files_entry(int fd)
{
    return (unsigned)fd < SHIM_FDS ? __atomic_load_n(&files_fd[fd], __ATOMIC_RELAXED) : FD_UNMATCHED;
}

static inline bool files_tracked(uint32_t entry)
{
    return entry >= FD_TRACKED;
}

static inline bool files_viewed(uint32_t entry)
{
    return entry - FD_VIEW < SHIM_VIEWS;
}

static inline uint32_t files_number(uint32_t entry)
{
    return entry - FD_TRACKED + 1;
}

struct region *files_region(uint32_t number); /* never NULL for a number that the table gave */
/* The entry of a descriptor, found out and kept when it was unknown. Takes the lock. */
uint32_t files_resolve(int fd);
/* A descriptor that this process has just opened for writing. Takes the lock. */
enum { FILES_TRUNCATED = 1, FILES_STREAM = 2, FILES_FRESH = 4 };
void files_opened(int fd, int how);
void files_renewed(int fd);              /* the number means something new and unknown */
void files_inherited(void);              /* descriptors that came over exec */
void files_copied(int oldfd, int newfd); /* newfd is a copy of oldfd */
void files_streamed(int fd);             /* a stdio stream writes to it from now on */
uint32_t
files_lookup(int fd); /* the region of any descriptor of a file, 0 for none: sync points take read-only ones too */
uint32_t files_lookup_stat(const struct statx *st);
int files_descriptor(uint32_t number); /* an open program descriptor of the region, checked; -1 for none. Lock held */
void files_renamed(uint64_t dev, const struct source *s, const char *path, const char *name); /* lock held */
bool files_identify(int fd, struct statx *st);
void files_source(const struct statx *st, uint64_t *dev, struct source *s);

/* Marks for the agent (wire/shared.h); the memory is made at the first. */
void files_mark(uint32_t number, uint64_t offset, uint64_t len);
void files_mark_size(uint32_t number, uint64_t size); /* cut to size */
void files_mark_resize(uint32_t number, uint64_t before, uint64_t size);
/* A region that is a mirror's, with one of `fds` the caller's: its number, or 0. Lock held. */
uint32_t files_mirror(uint32_t mount, const struct control_terms *terms);
void files_mark_all(uint32_t number);
void files_mark_streams(uint32_t number); /* what stdio may have written, which no hook sees. 0: of all regions */

/* Closing: begin takes the descriptor from the table and says whether its going is a sync point; end releases what
 * nothing holds any more. */
struct closing {
    uint32_t number; /* 0: not tracked */
    bool last;
};
struct closing files_close_begin(int fd);
void files_close_undo(int fd, const struct closing *c);
void files_close_end(const struct closing *c);
bool files_unused(uint32_t number);       /* lock held */
void files_release_idle(uint32_t number); /* releases it if unused. Lock held */
void files_fork_child(void);              /* lock held */

/* ---- maps.c: ranges */

extern struct ranges maps;
void maps_announce_all(bool dirty); /* lock held */
void maps_fork_child(void);         /* lock held */

/* ---- arm.c: userfaultfd */

/* Registers [addr, addr + len) of a memfd's mapping for missing faults, which the agent answers. 0 or a negative
 * errno. Lock held. */
int arm_missing(uint64_t addr, uint64_t len);
bool arm_can_miss(void);        /* lock held */
extern bool arm_user_mode_only; /* the kernel's own accesses to what is missing fail */
/* Registers and write-protects [addr, addr + len). 0 or a negative errno; arm_reason() says more. Lock held. */
int arm_range(uint64_t addr, uint64_t len);
bool arm_can_mirror(void);                     /* lock held */
/* For missing faults and for protection in one, protected. Lock held. */
int arm_mirror(uint64_t addr, uint64_t len);
const char *arm_reason(void);
/* Whether soft-dirty bits tell stores: 0 or a negative errno; arm_soft_reason() says more. Lock held. */
int arm_soft(void);
const char *arm_soft_reason(void);
extern int arm_kept; /* -1 when none is open */
void arm_fork_child(void);

/* ---- client.c: the agent */

extern int client_fd;
extern uint32_t client_generation; /* moves with every connection made or lost */
bool client_up(void);              /* connected, or now made so. Lock held */
bool client_connected(void);
bool client_used(void);   /* there is or was a connection of this process */
void client_forget(void); /* in a forked child. Lock held */
struct shared *client_shared(void);
/* Sends one message with descriptors. 0, or a negative errno (the connection is then lost). Lock held. */
int client_send(const void *message, size_t len, const int *fds, unsigned nfds);
void client_region(uint32_t number, int fd);
void client_marks(uint32_t number);
void client_release(uint32_t number);
void client_map(const struct range *r, bool dirty);
void client_uffd(int fd);
bool client_hung_up(void);
void client_lost(uint32_t generation);
void client_notices(void); /* takes the lock */
void client_read(void);    /* whatever waits in the socket. Lock held */
/* A scratch message buffer of CONTROL_MAX bytes. Lock held. */
extern uint8_t client_buffer[CONTROL_MAX];

/* Writes the message of a request that wants to be answered in this slot; may be called again for another agent. */
typedef size_t sync_put(void *to, size_t cap, uint32_t slot, void *of);

enum ticket_kind { TICKET_NONE, TICKET_SYNC, TICKET_RETIRE, TICKET_BYE, TICKET_ASK };
struct ticket {
    enum ticket_kind kind;
    bool sent;
    uint8_t publish;
    uint32_t region, slot, generation;
    struct shared *shared;
    uint64_t addr, len;
    sync_put *put; /* TICKET_ASK */
    void *of;
};

/* A sync point in two halves: the request goes, the local call runs, the answer is awaited. */
void sync_begin(struct ticket *t, uint32_t region); /* 0: everything of this process */
void sync_begin_retire(struct ticket *t, uint64_t addr, uint64_t len, bool publish);
int sync_end(struct ticket *t);  /* 0 or a negative errno */
void sync_abandon(void *ticket); /* the thread was cancelled in the local call */
/* What the program gets: the local call's result first, then the remote's. */
static inline int sync_result(int local, int remote)
{
    if (local || !remote)
        return local;
    errno = EIO;
    return -1;
}
void sync_async(uint32_t region);
void sync_now(uint32_t region);
void sync_bye(void);
/* A request that no loss excuses: waits for the agent's answer, from one agent after the other, as long as one can be
 * found within `patience` ms of the last. The answer, or -ENOTCONN. */
uint32_t sync_slot_unheard(void); /* a slot whose answer nobody waits for. Lock held */
int sync_ask(sync_put *put, void *of, uint64_t patience);
void shim_publish(void);

/* ---- view.c: what the rest has to know of it */

extern uint32_t view_count; /* open files and mappings of views in this process, and what they need: 0 for none */
extern bool view_pulls;     /* a rule presents remote regions */
bool view_owns(int fd);     /* a descriptor of ours behind a view */
void view_evade(int fd);    /* lock held */
int view_own_above(int fd); /* the lowest of them from fd on, or -1. Lock held */
/* An O_PATH descriptor: its entry when it is one of a view that came by exec or a message, else 0. Lock held. */
uint32_t view_adopt(int fd, const struct statx *st);
void view_closed(uint32_t entry);          /* one descriptor less. Lock held */
/* Before that: the region of which it is the last open file's last descriptor, whose `fds` are then one less; 0. Lock held */
uint32_t view_closing(uint32_t entry);
void view_copied(uint32_t entry, int newfd);
void view_announce(void);                  /* to a new agent, before regions. Lock held */
void view_maps_announce(void);             /* after them. Lock held */
void view_arrived(const void *message, size_t len, const int *fds, unsigned n); /* takes over fds. Lock held */
void view_fork_prepare(void);              /* lock held */
void view_fork_parent(void);               /* lock held */
bool view_fork_child(void);                /* lock held; true when the agent must hear of it at once */

/* ---- start.c */
void start_prepare(void);            /* in the constructor: where the agent's program is */
int start_agent(const char *socket); /* 0, a negative errno, or -EKEYREJECTED: all was said */

/* ---- own.c: descriptors of ours and the program's attempts on them */
int own_keep(int fd); /* moves it out of the way; the new number, close-on-exec */
static inline bool own_is(int fd)
{
    return fd >= 0 && (fd == client_fd || fd == arm_kept || (view_count && view_owns(fd)));
}
void own_evade(int fd); /* the program is about to take this number: move away */

/* ---- hooks_name.c */
bool names_matched(const char *path); /* a rule wants the file at path replicated */

/* ---- hooks_stdio.c, hooks_exit.c */
void streams_flush(void);
void streams_inherited(void); /* the standard streams may be views */
void streams_standard(int fd); /* one of their numbers may be a view's now, or one no more */
void shim_leave(void); /* the last sync point, before the process image goes */

void fork_install(void);

#endif
