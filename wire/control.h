/* The protocol between a program's shim (or the command-line tool) and its local agent: messages on a SOCK_SEQPACKET unix socket, one struct a message,
 * descriptors beside it by SCM_RIGHTS. This header is the specification's normative half; control.md tells the story.
 *
 * A message is u8 type, then its fields, integers big-endian. The agent answers HELLO with WELCOME or REFUSED; whatever names a slot is answered in
 * shared memory (wire/shared.h); everything else is not answered. What goes wrong inside the agent comes as a NOTICE for the user's terminal.
 * A connection that ends without BYE is a program that died: what it had mapped for writing is hashed before it is published again. */
#ifndef WIRE_CONTROL_H
#define WIRE_CONTROL_H

#include "agent/base/id.h"
#include "wire/bytes.h"
#include "wire/name.h"

#define CONTROL_VERSION 4u
#define CONTROL_MAX 20480u /* bytes in a message */
#define CONTROL_PATH 4096u
#define CONTROL_FDS 3u

enum control_type {
    /* shim -> agent */
    CONTROL_HELLO = 1, /* fds: shared memory, [pagemap], [userfaultfd], as hello.fds says */
    CONTROL_REGION,    /* fds: the file, opened for writing by the program */
    CONTROL_MARKS,     /* fds: a struct marks */
    CONTROL_MAP,
    CONTROL_RETIRE,
    CONTROL_RELEASE,
    CONTROL_NAME,
    CONTROL_SYNC,
    CONTROL_BYE,
    CONTROL_UFFD,      /* fds: userfaultfd [after HELLO, when the first mapping needs it]; no fields */
    /* tool -> agent */
    CONTROL_STATUS,    /* answered by TEXT messages (JSON), an empty one last */
    CONTROL_PUBLISH,   /* answered by RESULT */
    CONTROL_WATCH,     /* answered by RESULT */
    CONTROL_STOP,      /* answered by RESULT, when drained */
    /* agent -> */
    CONTROL_WELCOME,
    CONTROL_REFUSED,
    CONTROL_NOTICE,
    CONTROL_TEXT,
    CONTROL_RESULT,
    /* shim -> agent, about views */
    CONTROL_OPEN,
    CONTROL_RESUME,    /* fds: none, or the memfd and its struct view */
    CONTROL_VIEW_MAP,
    CONTROL_VIEW_UNMAP,
    CONTROL_ADVISE,
    CONTROL_FETCH,
    CONTROL_CLOSE,
    /* agent -> shim */
    CONTROL_VIEW,      /* fds: the memfd and its struct view, none when OPEN only looked */
    /* shim -> agent, about views that are written */
    CONTROL_TRUNCATE,
    /* tool -> agent */
    CONTROL_ATTACH,    /* answered by RESULT: 0 and the device's path */
    /* shim -> agent */
    CONTROL_SOFTDIRTY, /* fds: /proc/self/clear_refs, for writing, and /proc/self/stat; before the first MAP tracked so; no fields */
    CONTROL_TYPES
};

enum control_ack { CONTROL_ACK_DURABLE, CONTROL_ACK_RECEIVED, CONTROL_ACK_ASYNC };
enum control_loss { CONTROL_LOSS_CONTINUE, CONTROL_LOSS_BLOCK, CONTROL_LOSS_FAIL };
enum control_initial { CONTROL_INITIAL_SAFE, CONTROL_INITIAL_PUSH, CONTROL_INITIAL_PULL };
enum control_tracker { CONTROL_TRACK_UFFD, CONTROL_TRACK_HASH, CONTROL_TRACK_INOTIFY, CONTROL_TRACK_SOFTDIRTY };
/* Which captures compare a region by hash, whatever its marks and maps say: none, all, all that a sync point asks for and, of the clock's, those before
 * which the file made events (strategy=inotify). */
enum control_hashed { CONTROL_HASHED_NEVER, CONTROL_HASHED_ALL, CONTROL_HASHED_EVENTS };

#define CONTROL_FD_PAGEMAP 1u
#define CONTROL_FD_UFFD 2u

struct control_hello {
    uint16_t version;
    uint8_t tool;          /* 1: the command-line tool; the rest but version is then unused, and no descriptors come */
    uint32_t pid;
    uint8_t fds;           /* CONTROL_FD_* beside the shared memory */
    uint8_t loss;          /* enum control_loss */
    uint64_t timeout_ms;
    char program[256];     /* base name, for people */
    char remote[1024];     /* MEMSYNC_REMOTE as it is */
};

/* What rules and variables say about one region. */
struct control_terms {
    uint8_t ack, initial;
    uint64_t interval_ms; /* 0: off */
    char group[256];      /* "" for none */
};

/* The program opened a matching file for writing (or took one over: exec, fork, re-attach). */
struct control_region {
    uint32_t region;       /* the shim's number for it, of this process: no other open region has it */
    uint8_t fresh;         /* nobody can have stored to the file unseen since this process opened it: 0 after exec, fork, re-attach */
    uint8_t hashed;        /* enum control_hashed: ALL when written through stdio, or strategy=hash */
    uint64_t dev;
    struct source source;
    struct control_terms terms;
    char path[CONTROL_PATH], name[NAME_CAP];
};

struct control_marks {
    uint32_t region;
};

/* A writable shared mapping. Under UFFD it is registered and armed already: what was stored before that is not in it. A mapping that is not known clean
 * comes with dirty = 1: all of it may have changed (registered late). */
struct control_map {
    uint32_t region;
    uint8_t tracker, dirty;
    uint64_t addr, len, offset;
};

/* [addr, addr + len) is about to be unmapped, moved or mapped over: look at it one last time, then forget it. The call is made after the answer. With
 * publish = 1 it is a sync point too. */
struct control_retire {
    uint32_t slot;
    uint8_t publish;
    uint64_t addr, len;
};

/* The last writable descriptor and mapping of the region are gone (a sync point came before). */
struct control_release {
    uint32_t region;
};

/* rename and unlink. Told before the call (BEGUN, with the paths' names under the rules, "" where none matches) and after it (DONE, or FAILED when the call
 * failed), so that a kill in between is noticed. dev and source are those of the file that moves or goes. A sync point follows. */
enum control_name_kind { CONTROL_NAME_RENAME = 1, CONTROL_NAME_EXCHANGE, CONTROL_NAME_UNLINK };
enum control_name_phase { CONTROL_NAME_BEGUN, CONTROL_NAME_DONE, CONTROL_NAME_FAILED };
struct control_name {
    uint8_t kind, phase;
    uint32_t number;       /* joins the phases; of this process */
    uint64_t dev;
    struct source source;
    struct control_terms terms; /* of the new name */
    char old_path[CONTROL_PATH], old_name[NAME_CAP], new_path[CONTROL_PATH], new_name[NAME_CAP];
};

#define CONTROL_NO_SLOT UINT32_MAX
/* A sync point. slot: answered when the region's ack is reached, or at once with CONTROL_NO_SLOT (MS_ASYNC). region 0: the strictest ack of all. */
struct control_sync {
    uint32_t slot, region;
};

/* The program exits or execs: publish, answer, and expect the connection to end. SYNC and others may still follow when an exec failed. */
struct control_bye {
    uint32_t slot;
};

struct control_publish {
    char name[NAME_CAP]; /* "" for all */
};

struct control_watch {
    struct control_terms terms;
    char path[CONTROL_PATH], name[NAME_CAP], remote[1024];
};

/* A region as a block device of this machine. */
struct control_attach {
    uint8_t read_only;
    char device[32]; /* "/dev/nbdN" or "auto" */
    char name[NAME_CAP], remote[1024]; /* remote "": in the agent's own store */
};

struct control_welcome {
    uint16_t version;
    uint32_t pid;
};

struct control_text { /* NOTICE, TEXT, REFUSED, RESULT */
    int32_t code;     /* RESULT: 0 or a negative errno. Else 0 */
    char text[16384];
};

/* A region that appears at a path. Answered by VIEW, if it is there, and then the slot: 0, -ENOENT (no such region), -EACCES, or -EIO with a NOTICE that
 * says why. With look nothing stays open: VIEW only tells. With create a region that is not there is presented empty, at epoch 0 of no lineage; it comes
 * to be at the remote when it is first published. Only a mirror's; nothing to a look. */
enum control_mode { CONTROL_PULL, CONTROL_MIRROR };
enum control_order { CONTROL_ORDER_FAULT, CONTROL_ORDER_LINEAR, CONTROL_ORDER_RECORDED, CONTROL_ORDER_NONE };
#define CONTROL_FOREVER UINT64_MAX

struct control_open {
    uint32_t slot;
    uint32_t view;             /* the shim's number for it, of this process; not 0 */
    uint8_t mode, order;       /* enum control_mode, enum control_order */
    uint8_t follow, look, create;
    uint64_t resident;         /* bytes, 0: no bound */
    uint64_t fetch_timeout_ms; /* CONTROL_FOREVER */
    char path[CONTROL_PATH], name[NAME_CAP];
};

/* A view that the process has already, for an agent that does not know it: after an agent died (with the memfd, whose data extents tell what is there), or
 * over exec (without: just this epoch of this lineage). Answered as OPEN. */
struct control_resume {
    struct control_open open;
    uint64_t epoch;
    struct id lineage;
    uint64_t size;
};

/* The view's bytes from offset on show at [addr, addr + len), registered for missing faults already. */
struct control_view_map {
    uint32_t view;
    uint64_t addr, len, offset;
};

/* Nothing of a view shows there any more. */
struct control_view_unmap {
    uint64_t addr, len;
};

/* What the program said with madvise or posix_fadvise: MADV_NORMAL 0, RANDOM 1, SEQUENTIAL 2, WILLNEED 3, of these bytes of the view. */
struct control_advise {
    uint32_t view;
    uint8_t advice;
    uint64_t offset, len;
};
#define CONTROL_ADVICE_MAX 3u

/* Bytes that a call of the program is about to read. The slot is answered when they all are in the memfd: 0; or -EIO, when the view has failed. */
struct control_fetch {
    uint32_t slot, view;
    uint64_t offset, len;
};

/* The view, a mirror, shall have that size; with grow, at least. What lies beyond its old size reads as zeros. The slot: 0 when the memfd and the struct
 * view have it; -EFBIG, -ENOSPC..., -EINVAL of a view that only reads, -EIO when it has failed. The agent alone changes the size. */
struct control_truncate {
    uint32_t slot, view;
    uint64_t size;
    uint8_t grow;
};

/* The process has neither descriptor nor mapping of the view any more. */
struct control_close {
    uint32_t view;
};

/* Sent before the slot of the OPEN or RESUME is DONE. */
struct control_view {
    uint32_t view;
    uint64_t size;
    int64_t mtime_ns;
    uint64_t epoch;
    struct id lineage;
};

/* Every *_put writes the type and returns the message's length, 0 when it does not fit. control_type_of returns 0 for an unknown or empty message. Every
 * *_get returns 0, or -EPROTO on anything out of form. */
uint8_t control_type_of(const void *p, size_t len);

size_t control_hello_put(void *to, size_t cap, const struct control_hello *m);
int control_hello_get(const void *p, size_t len, struct control_hello *m);
size_t control_region_put(void *to, size_t cap, const struct control_region *m);
int control_region_get(const void *p, size_t len, struct control_region *m);
size_t control_marks_put(void *to, size_t cap, const struct control_marks *m);
int control_marks_get(const void *p, size_t len, struct control_marks *m);
size_t control_map_put(void *to, size_t cap, const struct control_map *m);
int control_map_get(const void *p, size_t len, struct control_map *m);
size_t control_retire_put(void *to, size_t cap, const struct control_retire *m);
int control_retire_get(const void *p, size_t len, struct control_retire *m);
size_t control_release_put(void *to, size_t cap, const struct control_release *m);
int control_release_get(const void *p, size_t len, struct control_release *m);
size_t control_name_put(void *to, size_t cap, const struct control_name *m);
int control_name_get(const void *p, size_t len, struct control_name *m);
size_t control_sync_put(void *to, size_t cap, const struct control_sync *m);
int control_sync_get(const void *p, size_t len, struct control_sync *m);
size_t control_bye_put(void *to, size_t cap, const struct control_bye *m);
int control_bye_get(const void *p, size_t len, struct control_bye *m);
size_t control_publish_put(void *to, size_t cap, const struct control_publish *m);
int control_publish_get(const void *p, size_t len, struct control_publish *m);
size_t control_watch_put(void *to, size_t cap, const struct control_watch *m);
int control_watch_get(const void *p, size_t len, struct control_watch *m);
size_t control_attach_put(void *to, size_t cap, const struct control_attach *m);
int control_attach_get(const void *p, size_t len, struct control_attach *m);
size_t control_welcome_put(void *to, size_t cap, const struct control_welcome *m);
int control_welcome_get(const void *p, size_t len, struct control_welcome *m);
size_t control_open_put(void *to, size_t cap, const struct control_open *m);
int control_open_get(const void *p, size_t len, struct control_open *m);
size_t control_resume_put(void *to, size_t cap, const struct control_resume *m);
int control_resume_get(const void *p, size_t len, struct control_resume *m);
size_t control_view_map_put(void *to, size_t cap, const struct control_view_map *m);
int control_view_map_get(const void *p, size_t len, struct control_view_map *m);
size_t control_view_unmap_put(void *to, size_t cap, const struct control_view_unmap *m);
int control_view_unmap_get(const void *p, size_t len, struct control_view_unmap *m);
size_t control_advise_put(void *to, size_t cap, const struct control_advise *m);
int control_advise_get(const void *p, size_t len, struct control_advise *m);
size_t control_fetch_put(void *to, size_t cap, const struct control_fetch *m);
int control_fetch_get(const void *p, size_t len, struct control_fetch *m);
size_t control_truncate_put(void *to, size_t cap, const struct control_truncate *m);
int control_truncate_get(const void *p, size_t len, struct control_truncate *m);
size_t control_close_put(void *to, size_t cap, const struct control_close *m);
int control_close_get(const void *p, size_t len, struct control_close *m);
size_t control_view_put(void *to, size_t cap, const struct control_view *m);
int control_view_get(const void *p, size_t len, struct control_view *m);
size_t control_text_put(void *to, size_t cap, uint8_t type, const struct control_text *m);
int control_text_get(const void *p, size_t len, struct control_text *m);
size_t control_empty_put(void *to, size_t cap, uint8_t type); /* UFFD, SOFTDIRTY, STATUS, STOP */

/* Where the agent of this user listens: MEMSYNC_AGENT when it is a path, else $XDG_RUNTIME_DIR/memsync/agent.sock when that variable is set and
 * absolute, else /tmp/memsync-UID/agent.sock. env_* are the variables' values or NULL. 0 or -ENAMETOOLONG. */
int control_socket_path(char *to, size_t cap, const char *env_agent, const char *env_runtime, unsigned uid);

#endif
