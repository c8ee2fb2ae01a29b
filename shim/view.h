/* Views: remote regions that appear at a path (rules' mode pull). What the parts of it share; the rest of the library
 * needs only what shim.h says of view.c. */
#ifndef SHIM_VIEW_H
#define SHIM_VIEW_H

#include "shim/shim.h"

#include <sys/uio.h>

#define VIEW_MOUNTS 1024u
#define VIEW_NOT_OURS (-2)
#define VIEW_DEV 0xfffffu /* what stat says of the device: no real one has this number */

/* One view in this process: what several open files and mappings of it share. */
struct mount {
    bool used;
    uint32_t number;   /* the agent's name for it */
    uint32_t opens;    /* open files of this process; mappings are counted in view_maps */
    int memory, meta;  /* the memfd and its struct view: own descriptors */
    uint64_t dev, ino; /* of the memfd */
    const struct view *view;
    uint8_t *window; /* the memfd, mapped without access: only to ask what is there; NULL where there was no room */
    uint64_t size, epoch, fetch_timeout_ms;
    int64_t mtime_ns;
    struct id lineage;
    uint8_t order;
    char path[CONTROL_PATH], name[NAME_CAP];
};

/* One open file: a small memfd, whose O_PATH descriptor is what the program holds. All processes that inherited it, by
 * fork, exec or a message, share the file offset in it, and find in it what it is. As large as the region, so that even
 * an unhooked fstat gives the right size. */
#define VIEW_MAGIC 0x6d656d73796e6376ULL
struct held_file {
    uint64_t magic;
    uint64_t offset;
    uint64_t size, epoch, fetch_timeout_ms;
    int64_t mtime_ns;
    struct id lineage;
    uint32_t version;
    uint8_t order;
    char path[CONTROL_PATH], name[NAME_CAP];
};

struct open_file {
    struct held_file *held; /* NULL: not in use */
    uint32_t fds;           /* descriptors of this process */
    uint32_t mount;         /* index + 1; 0 until the first use of one that was inherited */
    uint64_t dev, ino;      /* of the small memfd */
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
void view_terms(struct control_open *o, const char *path, const char *name, uint8_t order, uint64_t timeout);
int view_ask(struct view_pending *p); /* sends it and waits for its VIEW. 0, or a negative errno */
/* What it brought becomes a mount, or is found to be one that is there. Index + 1 with opens raised, or a negative
 * errno. */
int view_mount_made(struct view_pending *p);
void view_release_idle(uint32_t mount); /* lock held */
/* All pages of [offset, offset + len) are in the memfd: 0, or a negative errno. */
int view_need(struct mount *m, uint64_t offset, uint64_t len);
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
int view_look(const struct rule *rule, const char *path, struct control_view *v);
uint64_t view_ino(const struct id *lineage);

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
/* The path is a pulled region's: nothing about it can be changed here. errno is then EROFS. */
bool view_denied(int dir, const char *path);

/* ---- view_map.c */

void *view_mmap(struct open_file *f, void *at, size_t len, int prot, int flags, off_t offset);
void view_forget(uint64_t start, uint64_t end);                                      /* lock held */
void view_grown(uint64_t end, uint64_t new_end);                                     /* lock held */
void view_moved(uint64_t start, uint64_t old, uint64_t to, uint64_t len, bool keep); /* lock held */
bool view_shared(uint64_t start, uint64_t end);             /* a shared mapping is among them. Takes the lock */
bool view_shows(uint64_t start, uint64_t end);              /* any is. Takes the lock */
void view_advise(uint64_t start, uint64_t end, int advice); /* takes the lock */
void view_maps_announce(void);                              /* lock held */

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

/* ---- hooks_map.c: changes of either table, under their common sequence. Lock held */
bool maps_room(struct ranges *t);
void maps_change_begin(void);
void maps_change_end(void);

#endif
