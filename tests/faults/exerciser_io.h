/* The exerciser's operations on descriptors. Each changes the shadow, and the file by some call that has that effect.
 */
#ifndef EXERCISER_IO_H
#define EXERCISER_IO_H

#include "tests/faults/exerciser.h"

#include <sys/sendfile.h>
#include <sys/uio.h>

/* The remote may have the shadow's state of this moment, or must have it at least. In the program that runs: noted as
 * acknowledged. */
static void point(bool acknowledged);

static unsigned char *buffer; /* LARGEST bytes */

/* What is written: noise, zeros, text, what is there but for a byte, what is elsewhere in the file. */
static void some_content(unsigned char *to, size_t len, int file, uint64_t at)
{
    const struct file *f = &files[file];
    uint64_t kind = draw(8), from = draw(max_size - len + 1);
    switch (kind) {
    case 0:
        memset(to, 0, len);
        break;
    case 1:
        for (size_t i = 0; i < len; i++)
            to[i] = (unsigned char)("line of text\n"[(at + i) % 13]);
        break;
    case 2:
    case 3:
        memcpy(to, f->bytes + at, len);
        to[draw(len)] ^= (unsigned char)(1 + draw(255));
        break;
    case 4:
        if (len >= PAGE && from > at % PAGE)
            from = page_down(from - at % PAGE) + at % PAGE;
        memcpy(to, f->bytes + from, len);
        break;
    default:
        fill(to, len, scramble(seed ^ (uint64_t)op << 20 ^ draw(1u << 20)));
        break;
    }
}

/* Cuts a buffer into up to three pieces. */
static int pieces(struct iovec iov[3], unsigned char *from, size_t len)
{
    size_t a = draw(len + 1), b = a + draw(len - a + 1);
    iov[0] = (struct iovec){from, a};
    iov[1] = (struct iovec){from + a, b - a};
    iov[2] = (struct iovec){from + b, len - b};
    return 3;
}

/* ---- reading */

static void op_read(void)
{
    int file = (int)draw(FILES);
    struct slot *s = some_slot(file, O_RDONLY);
    if (!s)
        return;
    struct range r = some_range(0, max_size);
    uint64_t size = files[file].size;
    ssize_t want = r.at >= size ? 0 : (ssize_t)(size - r.at < r.len ? size - r.at : r.len), got = want;
    struct iovec iov[3];
    int n = pieces(iov, buffer, r.len);
    uint64_t how = draw(5);
    if (!dry) {
        memset(buffer, 0xa5, r.len);
        switch (how) {
        case 0:
            got = pread(s->fd, buffer, r.len, (off_t)r.at);
            break;
        case 1:
            got = preadv(s->fd, iov, n, (off_t)r.at);
            break;
        case 2:
            got = preadv2(s->fd, iov, n, (off_t)r.at, 0);
            break;
        case 3:
            REAL(lseek(s->fd, (off_t)r.at, SEEK_SET) == (off_t)r.at);
            got = read(s->fd, buffer, r.len);
            REAL(lseek(s->fd, 0, SEEK_CUR) == (off_t)r.at + want);
            break;
        default:
            REAL(lseek(s->fd, (off_t)r.at, SEEK_SET) == (off_t)r.at);
            got = readv(s->fd, iov, n);
            break;
        }
    }
    REAL(got == want);
    same_bytes("read", file, r.at, buffer, (uint64_t)want);
}

static void op_size(void)
{
    int file = (int)draw(FILES);
    struct slot *s = some_slot(file, O_RDONLY);
    struct stat st;
    if (!s || dry)
        return;
    REAL(fstat(s->fd, &st) == 0);
    same_size("fstat", file, (uint64_t)st.st_size);
    REAL(stat(files[file].path, &st) == 0);
    same_size("stat", file, (uint64_t)st.st_size);
    same_size("SEEK_END", file, (uint64_t)lseek(s->fd, 0, SEEK_END));
}

/* ---- writing */

/* How a write came to be: it ends on the disk. */
static bool is_sync(const struct slot *s)
{
    return (s->flags & O_DSYNC) != 0;
}

static void op_write(void)
{
    int file = (int)draw(FILES);
    struct file *f = &files[file];
    struct slot *s = some_slot(file, O_WRONLY);
    struct range r = some_range(0, draw(4) ? (f->size ? f->size : PAGE) : max_size);
    uint64_t how = draw(7);
    if (!s)
        return;
    if (s->flags & O_APPEND) {
        r.at = f->size;
        if (r.len > max_size - r.at)
            r.len = max_size - r.at;
    }
    if (!r.len)
        return;
    some_content(buffer, r.len, file, r.at);
    memcpy(f->bytes + r.at, buffer, r.len);
    grow_to(file, r.at + r.len);
    note("write", file, r.at, r.at + r.len);
    struct iovec iov[3];
    int n = pieces(iov, buffer, r.len), again = -1;
    ssize_t got = (ssize_t)r.len;
    off_t at = (off_t)r.at;
    if (!dry)
        switch (how) {
        case 0:
            got = pwrite(s->fd, buffer, r.len, at);
            break;
        case 1:
            got = pwritev(s->fd, iov, n, at);
            break;
        case 2:
            got = pwritev2(s->fd, iov, n, at, RWF_DSYNC);
            break;
        case 3:
            REAL(lseek(s->fd, at, SEEK_SET) == at);
            got = write(s->fd, buffer, r.len);
            REAL(lseek(s->fd, 0, SEEK_CUR) == at + (off_t)r.len);
            break;
        case 4:
            REAL(lseek(s->fd, at, SEEK_SET) == at);
            got = writev(s->fd, iov, n);
            break;
        case 5:
            REAL((again = dup(s->fd)) >= 0);
            got = pwrite(again, buffer, r.len, at);
            REAL(close(again) == 0);
            break;
        default: /* through a pipe, a piece at a time */
            if (r.len <= 65536 && !(s->flags & O_APPEND) && !mirrored) {
                int p[2];
                loff_t to = at;
                REAL(pipe(p) == 0 && write(p[1], buffer, r.len) == (ssize_t)r.len);
                for (size_t left = r.len; left > 0;) {
                    ssize_t moved = splice(p[0], NULL, s->fd, &to, left, 0);
                    REAL(moved > 0);
                    left -= (size_t)moved;
                }
                REAL(close(p[0]) == 0 && close(p[1]) == 0);
            } else {
                got = pwrite(s->fd, buffer, r.len, at);
            }
            break;
        }
    REAL(got == (ssize_t)r.len);
    if (how == 2 || is_sync(s))
        point(true);
}

/* The buffer of the call is a mapping of another file. */
static void op_write_mapped(void)
{
    int m = some_map(PROT_READ), file = (int)draw(FILES);
    struct slot *s = some_slot(file, O_WRONLY);
    if (m < 0 || !s || maps[m].file == file || (s->flags & O_APPEND))
        return;
    struct range r = some_range(maps[m].offset, map_end(&maps[m]));
    uint64_t at = draw(max_size - r.len + 1);
    if (!r.len)
        return;
    memcpy(files[file].bytes + at, files[maps[m].file].bytes + r.at, r.len);
    grow_to(file, at + r.len);
    note("write from a mapping", file, at, at + r.len);
    REAL(pwrite(s->fd, map_at(&maps[m], r.at), r.len, (off_t)at) == (ssize_t)r.len);
    if (is_sync(s))
        point(true);
}

/* From one file to another, or within one, in the kernel. */
static void op_copy(void)
{
    int from = (int)draw(FILES), to = (int)draw(FILES);
    struct slot *in = some_slot(from, O_RDONLY), *out = some_slot(to, O_WRONLY);
    struct range r = some_range(0, files[from].size);
    uint64_t at = draw(max_size - r.len + 1);
    if (!in || !out || !r.len || (out->flags & O_APPEND))
        return;
    if (from == to && at < r.at + r.len && r.at < at + r.len)
        return;
    memcpy(files[to].bytes + at, files[from].bytes + r.at, r.len);
    grow_to(to, at + r.len);
    note("copy", to, at, at + r.len);
    loff_t source = (loff_t)r.at, target = (loff_t)at;
    uint64_t how = mirrored ? 1 : draw(2);
    if (!dry && how)
        REAL(lseek(out->fd, target, SEEK_SET) == target);
    for (size_t left = r.len; !dry && left > 0;) {
        ssize_t n = how ? sendfile(out->fd, in->fd, &source, left)
                        : copy_file_range(in->fd, &source, out->fd, &target, left, 0);
        REAL(n > 0);
        left -= (size_t)n;
    }
    if (is_sync(out))
        point(true);
}

static void op_truncate(void)
{
    static const uint32_t near[] = {1, 100, PAGE, 5 * PAGE, 100000};
    int file = (int)draw(FILES);
    struct slot *s = some_slot(file, O_WRONLY);
    uint64_t size = draw(max_size + 1), step = draw(near[draw(5)] + 1), old = files[file].size;
    switch (draw(8)) {
    case 0:
        size = page_down(size);
        break;
    case 1:
        size = draw(4) ? size : 0;
        break;
    case 2:
        break;
    case 3:
    case 4:
        size = old > step ? old - step : 0;
        break;
    default:
        size = old + step < max_size ? old + step : max_size;
        break;
    }
    bool by_path = draw(4) == 0;
    if (!s)
        return;
    set_size(file, size);
    note("truncate", file, size < old ? size : old, size < old ? old : size);
    if (by_path)
        REAL(truncate(files[file].path, (off_t)size) == 0);
    else
        REAL(ftruncate(s->fd, (off_t)size) == 0);
}

/* ---- fallocate */

static struct slot *to_allocate(int file, struct range r)
{
    struct slot *s = some_slot(file, O_WRONLY);
    return r.len && s ? s : NULL;
}

static void op_allocate(void)
{
    int file = (int)draw(FILES);
    struct range r = some_range(0, max_size);
    struct slot *s = to_allocate(file, r);
    int mode = draw(2) ? FALLOC_FL_KEEP_SIZE : 0;
    bool posix = draw(3) == 0;
    if (!s)
        return;
    note("allocate", file, r.at, r.at + r.len);
    if (!mode || posix)
        grow_to(file, r.at + r.len);
    if (posix)
        REAL(posix_fallocate(s->fd, (off_t)r.at, (off_t)r.len) == 0);
    else
        REAL(fallocate(s->fd, mode, (off_t)r.at, (off_t)r.len) == 0);
}

static void zero(const char *what, int mode)
{
    int file = (int)draw(FILES);
    struct range r = some_range(0, max_size);
    struct slot *s = to_allocate(file, r);
    if (!s)
        return;
    note(what, file, r.at, r.at + r.len);
    memset(files[file].bytes + r.at, 0, r.len);
    if (!(mode & FALLOC_FL_KEEP_SIZE))
        grow_to(file, r.at + r.len);
    REAL(fallocate(s->fd, mode, (off_t)r.at, (off_t)r.len) == 0);
}
static void op_punch(void)
{
    zero("punch", FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE);
}
static void op_zero(void)
{
    zero("zero", FALLOC_FL_ZERO_RANGE | (draw(2) ? FALLOC_FL_KEEP_SIZE : 0));
}

/* What is behind moves up, or down. */
static void op_collapse(void)
{
    int file = (int)draw(FILES);
    struct file *f = &files[file];
    struct range r = some_pages(0, page_down(f->size));
    struct slot *s = to_allocate(file, r);
    if (!s || r.at + r.len >= f->size)
        return;
    note("collapse", file, r.at, f->size);
    memmove(f->bytes + r.at, f->bytes + r.at + r.len, f->size - r.at - r.len);
    set_size(file, f->size - r.len);
    REAL(fallocate(s->fd, FALLOC_FL_COLLAPSE_RANGE, (off_t)r.at, (off_t)r.len) == 0);
}
static void op_insert(void)
{
    int file = (int)draw(FILES);
    struct file *f = &files[file];
    struct range r = some_pages(0, page_down(f->size));
    struct slot *s = to_allocate(file, r);
    if (!s || f->size + r.len > max_size)
        return;
    note("insert", file, r.at, f->size + r.len);
    memmove(f->bytes + r.at + r.len, f->bytes + r.at, f->size - r.at);
    memset(f->bytes + r.at, 0, r.len);
    grow_to(file, f->size + r.len);
    REAL(fallocate(s->fd, FALLOC_FL_INSERT_RANGE, (off_t)r.at, (off_t)r.len) == 0);
}

/* ---- opening, closing, syncing */

static void open_slot(int file, int slot, int flags)
{
    struct slot *s = &files[file].slots[slot];
    *s = (struct slot){-1, flags, true};
    REAL((s->fd = open(files[file].path, flags, 0644)) >= 0);
}

static void op_open(void)
{
    static const int ways[] = {O_RDWR, O_RDWR, O_RDWR, O_RDONLY, O_WRONLY, O_RDWR | O_APPEND, O_RDWR | O_DSYNC};
    int file = (int)draw(FILES), slot = (int)draw(SLOTS), flags = read_only ? O_RDONLY : ways[draw(7)];
    struct slot *s = &files[file].slots[slot];
    bool cut = draw(40) == 0 && (flags & O_ACCMODE) != O_RDONLY;
    note("close", file, 0, 0);
    if (s->open) {
        s->open = false;
        REAL(close(s->fd) == 0);
        point(false);
    }
    if (!draw(4)) /* stays closed: there may be none then, and only mappings */
        return;
    if (cut) {
        note("open with O_TRUNC", file, 0, files[file].size);
        set_size(file, 0);
    }
    open_slot(file, slot, flags | (cut ? O_TRUNC : 0));
    s->flags = flags;
}

static void op_sync(void)
{
    int file = (int)draw(FILES);
    struct slot *s = some_slot(file, O_WRONLY);
    uint64_t how = draw(8);
    if (!s)
        return;
    note(how < 4 ? "fsync" : how < 7 ? "fdatasync" : "syncfs", -1, 0, 0);
    if (how < 4)
        REAL(fsync(s->fd) == 0);
    else if (how < 7)
        REAL(fdatasync(s->fd) == 0);
    else
        REAL(syncfs(s->fd) == 0);
    point(true);
}

#endif
