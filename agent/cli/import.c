/* memsync import: all of a file becomes a new region's first epoch, or nothing of it does. The lease is ours from
 * ATTACH to DETACH, so a program that is started meanwhile is not mixed up with it. */
#include "agent/cli/cli.h"
#include "agent/cli/peer.h"
#include "agent/net/pack.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define HANDLE 1u
#define SEQ 1u

struct import {
    struct peer *peer;
    const char *name, *file;
    int fd;
    struct stat before;
    uint64_t fence, frames, bytes;
    struct progress progress;
    struct packer *packer; /* NULL: pages go as they are */
    struct pack_sense packing;
};

static int attach(struct import *m, bool force)
{
    static struct frame_attach at;
    static struct frame_attached is;
    uint8_t payload[NAME_CAP + 64];
    at = (struct frame_attach){.handle = HANDLE, .write = 1};
    memcpy(at.name, m->name, strlen(m->name) + 1);
    struct peer *p = m->peer;
    struct peer_frame f;
    int rc = peer_send(p, FRAME_ATTACH, payload, frame_attach_put(payload, sizeof payload, &at)) ?: peer_next(p, &f);
    if (!rc && f.type == FRAME_FAILED)
        rc = peer_failed(p, &f);
    else if (!rc && (f.type != FRAME_ATTACHED || frame_attached_get(f.payload, f.len, &is)))
        rc = peer_unexpected(p, &f);
    if (rc)
        return cli_fail(CLI_FAILED, "%s at %s: %s", m->name, p->address, p->error);
    if (is.status == FRAME_ATTACH_BAD)
        return cli_fail(CLI_FAILED, "%s at %s: the name is refused: %s", m->name, p->address, is.holder);
    if (is.status == FRAME_ATTACH_HELD)
        return cli_fail(CLI_FAILED,
                        "%s at %s is being written by %s, who holds its lease; stop the programs there first", m->name,
                        p->address, is.holder);
    if (is.status == FRAME_ATTACH_EXISTS && !force)
        return cli_fail(CLI_FAILED, "%s at %s exists already (epoch %llu, %llu bytes); --force replaces it", m->name,
                        p->address, (unsigned long long)is.epoch, (unsigned long long)is.size);
    m->fence = is.fence;
    return CLI_DONE;
}

static int send_counted(struct import *m, uint8_t type, const void *payload, size_t len)
{
    m->frames++;
    return peer_send(m->peer, type, payload, len);
}

static int begin(struct import *m)
{
    uint8_t payload[256];
    put_u64(payload, SEQ);
    int rc = peer_send(m->peer, FRAME_BEGIN, payload, 8);
    struct frame_op op = {.kind = FRAME_OP_CREATE, .handle = HANDLE, .source = {.ino = m->before.st_ino}};
    id_new(&op.lineage);
    struct frame_region region = {
        .handle = HANDLE, .epoch = 1, .base = 0, .fence = m->fence, .min_size = UINT64_MAX, .size = (uint64_t)m->before.st_size};
    if (!rc)
        rc = send_counted(m, FRAME_OP, payload, frame_op_put(payload, sizeof payload, &op));
    return rc ? rc : send_counted(m, FRAME_REGION, payload, frame_region_put(payload, sizeof payload, &region));
}

/* One frame's worth from `offset`; zero bytes need no frame, as the region is new. Less than len at the file's end. */
static int send_pages(struct import *m, uint64_t offset, uint32_t len, int *file_error)
{
    static uint8_t payload[FRAME_PAYLOAD_MAX];
    uint8_t *data = payload + FRAME_PAGES_HEAD + FRAME_PAGES_ENTRY;
    for (uint32_t have = 0; have < len;) {
        ssize_t n = pread(m->fd, data + have, len - have, (off_t)(offset + have));
        if (n <= 0) {
            *file_error = n ? -errno : -ESTALE;
            return *file_error;
        }
        have += (uint32_t)n;
    }
    if (bytes_zero(data, len))
        return 0;
    struct frame_extent e = {.offset = offset, .len = len, .kind = FRAME_PAGES_DATA};
    size_t head = frame_pages_put(payload, sizeof payload, HANDLE, &e, 1);
    struct peer_frame f;
    int rc = peer_window(m->peer, (uint32_t)head + len, &f);
    if (rc > 0)
        return f.type == FRAME_FAILED ? peer_failed(m->peer, &f) : peer_unexpected(m->peer, &f);
    uint32_t packed;
    const uint8_t *shorter = rc || !m->packer ? NULL
                                              : pack(m->packer, &m->packing, payload, (uint32_t)head + len,
                                                     (uint32_t)head, &packed);
    if (shorter)
        return send_counted(m, FRAME_PACKED, shorter, packed);
    return rc ? rc : send_counted(m, FRAME_PAGES, payload, head + len);
}

static int send_data(struct import *m, int *file_error)
{
    uint64_t size = (uint64_t)m->before.st_size, at = 0;
    int rc = 0;
    while (!rc && at < size) {
        off_t data = lseek(m->fd, (off_t)at, SEEK_DATA);
        if (data < 0 && errno == ENXIO)
            break;
        off_t hole = data < 0 ? -1 : lseek(m->fd, data, SEEK_HOLE);
        if (hole < 0) { /* a file system without holes to be asked for */
            data = (off_t)at;
            hole = (off_t)size;
        }
        uint64_t end = (uint64_t)hole < size ? (uint64_t)hole : size;
        for (at = (uint64_t)data & ~(uint64_t)(FRAME_PAGE - 1); !rc && at < end;) {
            uint32_t n = end - at < FRAME_DATA_MAX ? (uint32_t)(end - at) : FRAME_DATA_MAX;
            rc = send_pages(m, at, n, file_error);
            progress_at(&m->progress, at += n);
        }
    }
    return rc;
}

/* END, then DURABLE (RECEIVED may come before it). */
static int commit(struct import *m)
{
    uint8_t payload[16];
    put_u64(payload, SEQ);
    put_u64(payload + 8, m->frames);
    struct peer_frame f;
    int rc = peer_send(m->peer, FRAME_END, payload, sizeof payload);
    while (!rc) {
        rc = peer_next(m->peer, &f);
        if (!rc && f.type == FRAME_FAILED)
            return peer_failed(m->peer, &f);
        if (!rc && f.type == FRAME_DURABLE)
            return 0;
        if (!rc && f.type != FRAME_RECEIVED)
            return peer_unexpected(m->peer, &f);
    }
    return rc;
}

static bool changed(const struct import *m)
{
    struct stat now;
    return fstat(m->fd, &now) || now.st_size != m->before.st_size || now.st_mtim.tv_sec != m->before.st_mtim.tv_sec ||
           now.st_mtim.tv_nsec != m->before.st_mtim.tv_nsec;
}

/* Gives the lease back, and forgets the epoch if it is still open. */
static void leave(struct import *m, bool open)
{
    uint8_t seq[8], handle[4];
    put_u64(seq, SEQ);
    put_u32(handle, HANDLE);
    if (open)
        peer_send(m->peer, FRAME_ABORT, seq, sizeof seq);
    peer_send(m->peer, FRAME_DETACH, handle, sizeof handle);
}

static int send_all(struct import *m)
{
    int file_error = 0;
    progress_start(&m->progress, m->name, (uint64_t)m->before.st_size);
    int rc = begin(m);
    if (!rc)
        rc = send_data(m, &file_error);
    progress_end(&m->progress);
    if (file_error == -ESTALE || (!rc && changed(m)))
        return cli_fail(CLI_FAILED,
                        "%s changed while it was read: nothing was imported; stop what writes it, or replicate it "
                        "(memsync run, memsync watch)",
                        m->file);
    if (file_error)
        return cli_fail(CLI_FAILED, "%s cannot be read: %s", m->file, strerror(-file_error));
    return rc ? cli_fail(CLI_FAILED, "%s at %s: %s", m->name, m->peer->address, m->peer->error) : 0;
}

static int import(struct import *m, bool force)
{
    int code = attach(m, force);
    if (code) {
        leave(m, false);
        return code;
    }
    code = send_all(m);
    if (code) {
        leave(m, true);
        return code;
    }
    if (commit(m))
        code = cli_fail(CLI_FAILED, "%s at %s: %s", m->name, m->peer->address, m->peer->error);
    leave(m, false);
    char size[32];
    if (!code)
        printf("%s: epoch 1, %s (%llu bytes) from %s\n", m->name, cli_bytes((uint64_t)m->before.st_size, size),
               (unsigned long long)m->before.st_size, m->file);
    return code;
}

int command_import(const struct args *a)
{
    struct import m = {.file = a->words[0], .name = a->words[1]};
    const char *fault = name_fault(m.name);
    if (fault)
        return cli_fail(CLI_USAGE, "%s is no name for a region: %s", m.name, fault);
    m.fd = open(m.file, O_RDONLY | O_CLOEXEC);
    if (m.fd < 0 || fstat(m.fd, &m.before))
        return cli_fail(CLI_FAILED, "%s cannot be read: %m", m.file);
    if (!S_ISREG(m.before.st_mode)) {
        close(m.fd);
        return cli_fail(CLI_FAILED, "%s cannot be imported: it is no regular file", m.file);
    }
    m.peer = peer_open(a->remote, true);
    m.packer = m.peer && pack_worth(m.peer->address) ? packer_new() : NULL;
    int code = m.peer ? import(&m, a->force) : CLI_FAILED;
    peer_close(m.peer);
    packer_free(m.packer);
    close(m.fd);
    return code;
}
