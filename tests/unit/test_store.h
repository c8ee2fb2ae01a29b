/* What the store's tests share: one store on its own loop, epochs written in a line, waiting by running the loop until
 * a flag. */
#ifndef TEST_STORE_H
#define TEST_STORE_H

#include "agent/store/inside.h"

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <xxhash.h>

#include <cmocka.h>

#define HANDLES 64

struct kit {
    uv_loop_t loop;
    struct store *s;
    char dir[64], url[80];
    bool mem;
    struct limits limits;
    char error[STORE_ERROR];
    char names[HANDLES][64];
    uint64_t fences[HANDLES];
    struct id me, other;
    size_t credited;
};

struct told {
    int calls, err;
    char text[STORE_ERROR];
    struct buf *data;
};

static const struct limits kit_limits = {
    .journal = 1u << 20, .txn_memory = 256u << 10, .all_memory = 4u << 20, .pin_budget = 1u << 20, .lease_ms = 10000};

static inline void kit_open(struct kit *k)
{
    int err = store_open_with(&k->s, &k->loop, k->url, &k->limits, k->error);
    if (err)
        fail_msg("store_open: %s", k->error);
}

static inline void kit_told_closed(void *arg)
{
    *(bool *)arg = true;
}

static inline void kit_close(struct kit *k)
{
    bool closed = false;
    store_close(k->s, kit_told_closed, &closed);
    while (!closed)
        uv_run(&k->loop, UV_RUN_ONCE);
    k->s = NULL;
}

static inline void kit_init(struct kit *k, bool mem)
{
    *k = (struct kit){.mem = mem, .limits = kit_limits};
    uv_loop_init(&k->loop);
    id_new(&k->me);
    id_new(&k->other);
    strcpy(k->dir, "/tmp/memsync-store-XXXXXX");
    if (mem)
        strcpy(k->url, "mem:");
    else {
        assert_non_null(mkdtemp(k->dir));
        snprintf(k->url, sizeof k->url, "file:%s", k->dir);
    }
}

static inline void kit_end(struct kit *k)
{
    if (k->s)
        kit_close(k);
    uv_run(&k->loop, UV_RUN_DEFAULT);
    assert_int_equal(uv_loop_close(&k->loop), 0);
    char command[128];
    snprintf(command, sizeof command, "rm -rf %s", k->dir);
    if (!k->mem && system(command))
        fail();
}

static inline const char *kit_name_of(void *arg, uint32_t handle)
{
    struct kit *k = arg;
    return handle < HANDLES && *k->names[handle] ? k->names[handle] : NULL;
}

static inline void kit_spilled(void *arg, size_t bytes)
{
    struct kit *k = arg;
    k->credited += bytes;
}

/* Gives a handle to a name, and its lease to us. */
static inline void kit_attach(struct kit *k, uint32_t handle, const char *name)
{
    char holder[256];
    snprintf(k->names[handle], sizeof k->names[handle], "%s", name);
    assert_int_equal(store_lease(k->s, name, &k->me, "here", &k->fences[handle], holder), 0);
}

static inline struct store_txn *kit_txn(struct kit *k)
{
    return store_txn_new(k->s, &k->me, (struct store_names){.name_of = kit_name_of, .arg = k}, kit_spilled, k);
}

static inline int kit_add(struct kit *k, struct store_txn *t, uint8_t type, struct buf *b)
{
    int err = store_txn_add(t, type, b, k->error);
    buf_drop(b);
    return err;
}

static inline int kit_op(struct kit *k, struct store_txn *t, uint8_t kind, uint32_t handle, uint32_t to)
{
    struct buf *b = buf_new(256);
    struct frame_op o = {.kind = kind, .handle = handle, .to = to, .source = {.ino = 7, .btime = 9}};
    if (kind == FRAME_OP_CREATE)
        id_new(&o.lineage);
    b->len = (uint32_t)frame_op_put(b->data, b->cap, &o);
    return kit_add(k, t, FRAME_OP, b);
}

static inline int kit_region(struct kit *k, struct store_txn *t, uint32_t handle, uint64_t epoch, uint64_t min,
                             uint64_t size)
{
    struct buf *b = buf_new(64);
    struct frame_region g = {
        .handle = handle, .epoch = epoch, .base = epoch - 1, .fence = k->fences[handle], .min_size = min, .size = size};
    b->len = (uint32_t)frame_region_put(b->data, b->cap, &g);
    return kit_add(k, t, FRAME_REGION, b);
}

static inline int kit_pages(struct kit *k, struct store_txn *t, uint32_t handle, uint64_t offset, uint32_t len,
                            int fill)
{
    struct frame_extent e = {.offset = offset, .len = len, .kind = fill ? FRAME_PAGES_DATA : FRAME_PAGES_ZEROS};
    struct buf *b = buf_new(64 + (fill ? len : 0));
    b->len = (uint32_t)frame_pages_put(b->data, b->cap, handle, &e, 1);
    if (fill) {
        memset(b->data + b->len, fill, len);
        b->len += len;
    }
    return kit_add(k, t, FRAME_PAGES, b);
}

struct moved {
    uint64_t page, source;
    int fill; /* what the source page is full of */
};

/* Pages that stood elsewhere, in one frame. */
static inline int kit_copies(struct kit *k, struct store_txn *t, uint32_t handle, const struct moved *m, uint32_t n)
{
    struct frame_extent e[FRAME_PAGES_ENTRIES];
    uint8_t page[FRAME_PAGE];
    for (uint32_t i = 0; i < n; i++)
        e[i] = (struct frame_extent){.offset = m[i].page * FRAME_PAGE, .len = FRAME_PAGE, .kind = FRAME_PAGES_COPY};
    struct buf *b = buf_new(FRAME_PAYLOAD_MAX);
    b->len = (uint32_t)frame_pages_put(b->data, b->cap, handle, e, n);
    for (uint32_t i = 0; i < n; i++, b->len += FRAME_COPY_BYTES) {
        memset(page, m[i].fill, sizeof page);
        put_u64(b->data + b->len, m[i].source * FRAME_PAGE);
        XXH128_canonicalFromHash((XXH128_canonical_t *)(b->data + b->len + 8), XXH3_128bits(page, sizeof page));
    }
    return kit_add(k, t, FRAME_PAGES, b);
}

static inline void kit_durable(void *arg, int err, const char *text)
{
    struct told *told = arg;
    told->calls++;
    told->err = err;
    snprintf(told->text, sizeof told->text, "%s", text);
}

static inline int kit_wait(struct kit *k, struct told *told)
{
    while (!told->calls)
        uv_run(&k->loop, UV_RUN_ONCE);
    assert_int_equal(told->calls, 1);
    return told->err;
}

static inline int kit_commit(struct kit *k, struct store_txn *t)
{
    struct told told = {0};
    store_txn_commit(t, kit_durable, &told);
    assert_int_equal(told.calls, 0);
    int err = kit_wait(k, &told);
    snprintf(k->error, sizeof k->error, "%s", told.text);
    return err;
}

/* One epoch of one region: its next number, the whole of it `size` bytes of fill (which may be 0: nothing but the
 * size). */
static inline int kit_write(struct kit *k, uint32_t handle, uint64_t epoch, uint64_t size, int fill)
{
    struct store_txn *t = kit_txn(k);
    int err = epoch == 1 ? kit_op(k, t, FRAME_OP_CREATE, handle, 0) : 0;
    err = err ? err : kit_region(k, t, handle, epoch, UINT64_MAX, size);
    for (uint64_t at = 0; !err && fill && at < size; at += FRAME_DATA_MAX)
        err = kit_pages(k, t, handle, at, size - at < FRAME_DATA_MAX ? (uint32_t)(size - at) : FRAME_DATA_MAX, fill);
    if (err) {
        store_txn_abort(t);
        return err;
    }
    return kit_commit(k, t);
}

static inline void kit_read_done(void *arg, int err, struct buf *data)
{
    struct told *told = arg;
    told->calls++;
    told->err = err;
    told->data = data;
}

static inline struct buf *kit_pin_read(struct kit *k, struct store_pin *pin, uint64_t offset, uint32_t len, int *err)
{
    struct told told = {0};
    store_pin_read(pin, offset, len, 0, kit_read_done, &told);
    *err = kit_wait(k, &told);
    return told.data;
}

/* The byte at offset of a region's last epoch: -1 when there is no such region, -2 beyond its end. */
static inline int kit_byte(struct kit *k, const char *name, uint64_t offset)
{
    struct store_pin *pin;
    struct frame_entry e;
    if (store_pin(k->s, name, &pin, &e))
        return -1;
    int err;
    struct buf *b = kit_pin_read(k, pin, offset, 1, &err);
    store_unpin(pin);
    assert_int_equal(err, 0);
    int byte = b->len ? b->data[0] : -2;
    buf_drop(b);
    return byte;
}

static inline int64_t kit_size(struct kit *k, const char *name)
{
    struct frame_entry e;
    int err = store_lookup(k->s, name, &e, NULL, NULL);
    return err ? err : (int64_t)e.size;
}

/* The plain file, after a close: its size, and whether all bytes from..to are fill. */
static inline int64_t kit_file_size(struct kit *k, const char *name)
{
    char path[256];
    struct stat st;
    snprintf(path, sizeof path, "%s/%s", k->dir, name);
    return lstat(path, &st) < 0 ? -errno : (int64_t)st.st_size;
}

static inline int kit_file_byte(struct kit *k, const char *name, off_t offset)
{
    char path[256];
    uint8_t byte = 0;
    snprintf(path, sizeof path, "%s/%s", k->dir, name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -1;
    ssize_t n = pread(fd, &byte, 1, offset);
    close(fd);
    return n == 1 ? byte : -2;
}

#endif
