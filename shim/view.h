/* Views: remote regions that appear at a path (rules' modes pull and mirror). What the parts of it share; the rest of the library
 * needs only what shim.h says of view.c. */
#ifndef SHIM_VIEW_H
#define SHIM_VIEW_H

#include "shim/shim.h"

#include <fcntl.h>
#include <sys/uio.h>

#define VIEW_MOUNTS 1024u
#define VIEW_NOT_OURS (-2)
#define VIEW_DEV 0xfffffu /* what stat says of the device: no real one has this number */

/* What a rule says of how its regions are pulled, and the variables. */
struct view_how {
    uint8_t order, follow;
    uint64_t resident, fetch_timeout_ms;
};

/* One view in this process: what several open files and mappings of it share. */
struct mount {
    bool used;
    uint32_t number;   /* the agent's name for it */
    uint32_t opens;    /* open files of this process; mappings are counted in view_maps */
    int memory, meta;  /* the memfd and its struct view: own descriptors */
    uint64_t dev, ino; /* of the memfd */
    const struct view *view;
    uint8_t *window; /* the memfd, mapped without access: only to ask what is there; NULL where there was no room */
    uint64_t window_len;
    uint64_t size, epoch;
    int64_t mtime_ns;
    struct id lineage;
    struct view_how how;
    uint8_t mode; /* enum control_mode */
    /* of a mirror (mirror.c) */
    uint32_t region;  /* under which its changes are published; 0 while this process has it open for reading only */
    bool attached;    /* the agent has the lease of it */
    bool unlinked;    /* no path leads here any more */
    bool locked;      /* a POSIX lock was asked for: closing any descriptor of the memfd drops them all */
    int64_t wrote_ns; /* when this process last changed it by a call; 0: never */
    char path[CONTROL_PATH], name[NAME_CAP];
};

/* One open file: a small memfd, whose O_PATH descriptor is what the program holds. All processes that inherited it, by
 * fork, exec or a message, share the file offset in it, and find in it what it is. As large as the region, so that even
 * an unhooked fstat gives the right size. */
#define VIEW_MAGIC 0x6d656d73796e6376ULL
struct held_file {
    uint64_t magic;
    uint64_t offset;
    uint64_t size, epoch;
    int64_t mtime_ns;
    struct id lineage;
    uint32_t version;
    uint32_t flags; /* of open(2), as F_GETFL tells them */
    struct view_how how;
    uint8_t mode;
    struct control_terms terms; /* of a mirror */
    char path[CONTROL_PATH], name[NAME_CAP];
};

struct open_file {
    struct held_file *held; /* NULL: not in use */
    uint32_t fds;           /* descriptors of this process */
    uint32_t mount;         /* index + 1; 0 until the first use of one that was inherited */
    uint64_t dev, ino;      /* of the small memfd */
    bool writes;            /* one of its region's `fds` */
    int locking;            /* own descriptor: the memfd opened anew, for flock and OFD locks; 0 before the first */
};

extern struct mount view_mounts[VIEW_MOUNTS];
extern struct ranges view_maps; /* their region: a mount's index; private ones have state RANGE_VIEW_PRIVATE */

/* ---- view_mount.c */

/* An OPEN or RESUME on its way: the thread's own, in a list that view_arrived looks through. Large: see raw_memory. */
struct view_pending {
    struct view_pending *next;
    uint32_t number;
    bool arrived;
    int fds[2];
    struct control_view view;
    struct control_resume ask; /* OPEN sends its first part */
    bool resume;
};
void view_terms(struct control_open *o, const char *path, const char *name, uint8_t mode, const struct view_how *how);
int view_ask(struct view_pending *p); /* sends it and waits for its VIEW. 0, or a negative errno */
/* What it brought becomes a mount, or is found to be one that is there. Index + 1 with opens raised, or a negative
 * errno. */
int view_mount_made(struct view_pending *p);
void view_release_idle(uint32_t mount); /* lock held */
/* All pages of [offset, offset + len) are in the memfd: 0, or a negative errno. `since`: what its sequence was before;
 * they are there, still, if it is the same after they were read. */
int view_need(struct mount *m, uint64_t offset, uint64_t len, uint64_t *since);
bool view_same(const struct mount *m, uint64_t since);
bool view_present(const struct mount *m, uint64_t offset, uint64_t len); /* now */
/* The memfd itself, after a check that it still is; -1. */
int view_memory(const struct mount *m);
void view_counted(int by);
void view_retire(void *at, size_t len); /* unmaps it, later: a thread may still be in it. Lock held */

/* ---- view.c */

/* The open file behind a descriptor of the program, checked against what the number means now; NULL when it is none.
 * After EBADF: a descriptor nobody has looked at may be one. */
struct open_file *view_of(int fd);
struct open_file *view_of_unknown(int fd);
static inline bool view_maybe(int fd)
{
    return __builtin_expect(__atomic_load_n(&view_count, __ATOMIC_RELAXED) != 0, 0) && files_viewed(files_entry(fd));
}
struct mount *view_mount(struct open_file *f); /* what is behind it, asked for when needed; NULL with errno */
/* Makes a descriptor of the program for a region. The number, or -1 with errno. */
int view_open_region(const struct rule *rule, const char *path, int flags);
int view_open_again(struct open_file *f, int flags);
/* What is known without opening it. 0 or a negative errno. */
int view_look(const struct rule *rule, const char *path, struct control_view *v, char name[NAME_CAP]);
uint64_t view_ino(const struct id *lineage, uint8_t mode, const char *name);
static inline uint64_t view_epoch(const struct mount *m)
{
    return m->how.follow ? __atomic_load_n(&m->view->epoch, __ATOMIC_ACQUIRE) : m->epoch;
}
static inline uint64_t view_size(const struct mount *m)
{
    return __atomic_load_n(&m->view->size, __ATOMIC_ACQUIRE);
}
uint64_t view_file_size(struct open_file *f);
/* Own descriptors for locks. */
extern uint32_t view_lockings;
struct open_file *view_locking(int fd);
int view_locking_above(int from); /* the lowest from there on, or -1 */
int64_t view_file_mtime(struct open_file *f);
static inline bool view_writable(const struct open_file *f)
{
    return f->held->mode == CONTROL_MIRROR && (f->held->flags & O_ACCMODE) != O_RDONLY;
}

/* ---- mirror.c: regions that programs write to */

bool mirror_possible(const struct rule *rule, const char *path); /* says why not */
/* The mount that this process writes to (or has locks on) under that name, opens raised: index + 1, or 0. Lock held. */
uint32_t mirror_known(const char *name, bool locked);
/* The mount becomes a region of this process, one of whose `fds` the caller then is; the lease is had. 0 or a negative
 * errno. */
int mirror_attach(uint32_t mount, const struct control_terms *terms);
void mirror_let_go(uint32_t mount);   /* one of the fds less, without a sync point. Lock held */
void mirror_unlock(struct mount *m);  /* a descriptor was closed: the process's locks go. Lock held */
int mirror_resize(struct open_file *f, uint64_t size);               /* 0, or -1 with errno */
int mirror_grow(struct mount *m, uint64_t size);                     /* at least. 0 or a negative errno */
int mirror_sync(struct open_file *f);                                /* a sync point. 0, or -1 with errno */
int mirror_fcntl(struct open_file *f, int command, struct flock *lock, __typeof__(&fcntl) call);
int mirror_flock(struct open_file *f, int operation);
void mirror_touch(struct mount *m);
void mirror_released(uint32_t mount); /* its region is. Lock held */
struct shared *mirror_enter(struct mount *m); /* a writing call begins */
void mirror_leave(struct shared *s);          /* and ends */
/* Appends of all processes take turns. */
struct appending {
    uint64_t mask;
    int fd;
};
int mirror_append_begin(const struct mount *m, struct appending *a); /* 0 or a negative errno */
void mirror_append_end(const struct appending *a);
int mirror_remove(const struct rule *rule, const char *path); /* unlink(2): 0, or -1 with errno */

/* ---- view_write.c */

ssize_t view_write(struct open_file *f, const struct iovec *iov, int n, off_t at, int flags); /* at -1: here */
int view_allocate(struct open_file *f, int mode, off_t at, off_t len);
ssize_t view_send(struct open_file *f, int from, off64_t *at, size_t len); /* sendfile(2) into it */

/* ---- view_path.c */

/* What a path names: a remote region (rule, path), the open file behind a descriptor (fd), or nothing of ours. Large:
 * in memory of its own, which view_path_end gives back. */
struct view_path {
    const struct rule *rule;
    int fd;
    char path[CONTROL_PATH], link[CONTROL_PATH], other[CONTROL_PATH];
};
struct view_path *view_path_find(int dir, const char *path, bool follow); /* NULL: nothing of ours */
void view_path_end(struct view_path *p);
/* open(2) of a path: the descriptor, -1 with errno, or VIEW_NOT_OURS. */
int view_open(int dir, const char *path, int flags);
/* The path is a remote region's: its name cannot be changed here. errno is then EROFS. */
bool view_denied(int dir, const char *path);
/* unlink(2), truncate(2): the result, or VIEW_NOT_OURS. */
int view_unlink(int dir, const char *path);
int view_truncate_path(const char *path, off_t size);

/* ---- view_map.c */

void *view_mmap(struct open_file *f, void *at, size_t len, int prot, int flags, off_t offset);
bool view_mirror_range(uint64_t start); /* one that may be stored to lies there. Lock held */
void view_forget(uint64_t start, uint64_t end);                                      /* lock held */
void view_grown(uint64_t end, uint64_t new_end);                                     /* lock held */
/* keep: the old one stays mapped, and is registered again when it lost that (again). Lock held */
void view_moved(uint64_t start, uint64_t old, uint64_t to, uint64_t len, bool keep, bool again);
bool view_shared(uint64_t start, uint64_t end);   /* a shared one that may not be stored to is among them. Takes the lock */
bool view_mirrored(uint64_t start, uint64_t end); /* the first is a mirror's. Takes the lock */
bool view_shows(uint64_t start, uint64_t end);              /* any is. Takes the lock */
void view_advise(uint64_t start, uint64_t end, int advice); /* takes the lock */

void view_advise_file(const struct mount *m, uint64_t offset, uint64_t len,
                      int advice); /* len 0: to the end. Takes the lock */

/* Calls' buffers. Where the kernel's own accesses to a missing page fail (no privilege for more), the pages of a
 * mapping that a call is given are fetched before it. */
extern bool view_buffers; /* there is such a mapping, and such a kernel */
void view_buffer(uint64_t at, uint64_t len);
void view_buffer_vector(const struct iovec *iov, int n);
#define VIEW_BUFFER(at, len)                                                                                           \
    do {                                                                                                               \
        if (__builtin_expect(view_buffers, false))                                                                     \
            view_buffer((uint64_t)(uintptr_t)(at), len);                                                               \
    } while (0)
#define VIEW_BUFFERS(iov, n)                                                                                           \
    do {                                                                                                               \
        if (__builtin_expect(view_buffers, false))                                                                     \
            view_buffer_vector(iov, n);                                                                                \
    } while (0)

/* ---- hooks_read.c */
/* From the memfd at *at, which it moves on. */
typedef ssize_t view_move(int memory, off64_t *at, size_t len, void *of);
ssize_t view_transfer(int from, off64_t *from_at, size_t len, view_move *move, void *of); /* or VIEW_NOT_OURS */

/* ---- view_watch.c */
void view_watch(void);        /* lock held */
void view_watch_forget(void); /* in a forked child */

/* ---- maps.c: changes of either table, under their common sequence. Lock held */
bool maps_room(struct ranges *t);
void maps_change_begin(void);
void maps_change_end(void);

/* ---- maps.c: for the calls that map */
static inline uint64_t maps_pages(uint64_t len) /* filled up to whole pages */
{
    return (len + shim_page - 1) & ~(shim_page - 1);
}
/* Whether [start, start + len) touches a range of either table, without the lock; maps_touched: and it is for this
 * process to care. */
bool maps_touch(uint64_t start, uint64_t len);
bool maps_touched(const void *at, size_t len);
/* Asks the agent for a last look at [start, end) and waits for it. Takes the lock. */
void maps_retire(uint64_t start, uint64_t end, bool publish);
/* The raw call failed after all: [start, end) is still mapped, armed where it was, and only the agent has to hear of it
 * again. Lock held. */
void maps_restore(uint64_t start, uint64_t end);
/* Removes [start, end) from both tables, or from that of tracked ranges; regions left with nothing are released. Lock
 * held. */
void maps_forget(uint64_t start, uint64_t end);
void maps_forget_tracked(uint64_t start, uint64_t end);
void maps_enter(struct range *r, bool writable); /* a new mapping. Lock held */
void maps_track(struct range *r);                /* how it is tracked from now on, armed and said. Lock held */
void maps_add(const struct range *r);            /* to the table as it is. Lock held */

#endif
