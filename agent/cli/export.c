/* memsync export: a pinned epoch, read with many requests on their way at once, written beside FILE and put in its
 * place in one step. */
#include "agent/cli/cli.h"
#include "agent/cli/peer.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define OUTSTANDING 64u /* together under the stream's window */

static_assert(OUTSTANDING * (FRAME_DATA_MAX + 16) <= FRAME_WINDOW, "the answers must fit into the window");

static int ask(struct peer *p, uint32_t pin, uint32_t number, uint64_t size)
{
    uint8_t payload[20];
    uint64_t offset = (uint64_t)number * FRAME_DATA_MAX;
    put_u32(payload, number);
    put_u32(payload + 4, pin);
    put_u64(payload + 8, offset);
    put_u32(payload + 16, size - offset < FRAME_DATA_MAX ? (uint32_t)(size - offset) : FRAME_DATA_MAX);
    return peer_send(p, FRAME_READ, payload, sizeof payload);
}

/* Runs of pages that are not zeros; the rest of the new file is holes. */
static int write_data(int fd, const uint8_t *data, size_t len, uint64_t offset)
{
    for (size_t at = 0; at < len;) {
        size_t from = at;
        while (at < len) {
            size_t n = len - at < FRAME_PAGE ? len - at : FRAME_PAGE;
            if (bytes_zero(data + at, n))
                break;
            at += n;
        }
        for (size_t done = from; done < at;) {
            ssize_t n = pwrite(fd, data + done, at - done, (off_t)(offset + done));
            if (n < 0)
                return -errno;
            done += (size_t)n;
        }
        while (at < len && bytes_zero(data + at, len - at < FRAME_PAGE ? len - at : FRAME_PAGE))
            at += len - at < FRAME_PAGE ? len - at : FRAME_PAGE;
    }
    return 0;
}

/* One DATA: u32 request, u8 kind, u32 length, bytes. Its bytes in *len. 0; p->dead; or the file's error in *file_error.
 */
static int take(struct peer *p, const struct peer_frame *f, int fd, uint64_t size, uint32_t *len, int *file_error)
{
    if (f->type == FRAME_FAILED)
        return peer_failed(p, f);
    struct rd r = rd_over(f->payload, f->len);
    uint64_t offset = (uint64_t)rd_u32(&r) * FRAME_DATA_MAX;
    uint8_t kind = rd_u8(&r);
    *len = rd_u32(&r);
    uint64_t want = offset < size ? size - offset : 0;
    if (f->type != FRAME_DATA || r.bad || kind > 1 || *len != (want < FRAME_DATA_MAX ? want : FRAME_DATA_MAX) ||
        rd_left(&r) != (kind ? 0 : *len))
        return peer_unexpected(p, f);
    if (!kind)
        *file_error = write_data(fd, r.at, *len, offset);
    return *file_error;
}

static int copy(struct peer *p, uint32_t pin, const struct frame_entry *e, int fd, int *file_error)
{
    struct progress progress;
    progress_start(&progress, e->name, e->size);
    uint64_t count = (e->size + FRAME_DATA_MAX - 1) / FRAME_DATA_MAX, asked = 0, done = 0, bytes = 0;
    int rc = count > UINT32_MAX ? -EFBIG : 0;
    while (!rc && done < count) {
        struct peer_frame f;
        uint32_t len = 0;
        for (; !rc && asked < count && asked - done < OUTSTANDING; asked++)
            rc = ask(p, pin, (uint32_t)asked, e->size);
        if (!rc)
            rc = peer_next(p, &f);
        if (!rc)
            rc = take(p, &f, fd, e->size, &len, file_error);
        done++;
        progress_at(&progress, bytes += len);
    }
    progress_end(&progress);
    return rc;
}

/* The new file is durable under its name, or the old one is untouched. */
static int put_in_place(int fd, const char *temporary, const char *file)
{
    mode_t mask = umask(0);
    umask(mask);
    if (fchmod(fd, 0666 & ~mask) || fsync(fd) || rename(temporary, file))
        return -errno;
    char path[PATH_MAX];
    snprintf(path, sizeof path, "%s", file);
    int dir = open(dirname(path), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    int rc = dir < 0 || fsync(dir) ? -errno : 0;
    if (dir >= 0)
        close(dir);
    return rc;
}

static int export_to(struct peer *p, const char *name, const char *file, const char *temporary, int fd)
{
    static struct frame_entry e;
    uint32_t pin;
    int file_error = 0, rc = peer_pin(p, name, &pin, &e);
    if (rc)
        return cli_fail(rc == -ENOENT ? CLI_NOT_SO : CLI_FAILED, "%s at %s: %s", name, p->address, p->error);
    if (ftruncate(fd, (off_t)e.size))
        file_error = -errno;
    else
        rc = copy(p, pin, &e, fd, &file_error);
    if (!rc && !file_error)
        file_error = put_in_place(fd, temporary, file);
    if (file_error)
        return cli_fail(CLI_FAILED, "%s cannot be written: %s", file, strerror(-file_error));
    if (rc == -ENOBUFS)
        return cli_fail(CLI_FAILED, "%s at %s changed by more than the remote keeps aside for a reader: %s; try again",
                        name, p->address, p->error);
    if (rc)
        return cli_fail(CLI_FAILED, "%s at %s cannot be read: %s", name, p->address,
                        rc == -EFBIG ? "it is too large for this program" : p->error);
    char size[32];
    printf("%s: epoch %llu, %s (%llu bytes) in %s\n", name, (unsigned long long)e.epoch, cli_bytes(e.size, size),
           (unsigned long long)e.size, file);
    return CLI_DONE;
}

int command_export(const struct args *a)
{
    const char *name = a->words[0], *file = a->words[1], *fault = name_fault(name);
    char temporary[PATH_MAX];
    if (fault)
        return cli_fail(CLI_USAGE, "%s is no name of a region: %s", name, fault);
    if ((size_t)snprintf(temporary, sizeof temporary, "%s.tmp-XXXXXX", file) >= sizeof temporary)
        return cli_fail(CLI_FAILED, "%s: the path is too long", file);
    struct peer *p = peer_open(a->remote, false);
    if (!p)
        return CLI_FAILED;
    int code, fd = mkostemp(temporary, O_CLOEXEC);
    if (fd < 0) {
        code = cli_fail(CLI_FAILED, "%s cannot be written: %m", file);
    } else {
        code = export_to(p, name, file, temporary, fd);
        if (code != CLI_DONE)
            unlink(temporary);
        close(fd);
    }
    peer_close(p);
    return code;
}
