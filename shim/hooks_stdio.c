/* stdio. Its writes go past the hooks, inside libc, so a file that a stream writes is found by hashing at its sync
 * points. Streams are remembered so that what they still hold can be flushed before the last sync point: exit flushes
 * them only after our destructor. */
#include "shim/real.h"
#include "shim/view.h"

#include <string.h>

#define STREAMS 256

static FILE *streams[STREAMS];

static void stream_add(FILE *f)
{
    for (int i = 0; i < STREAMS; i++) {
        FILE *none = NULL;
        if (__atomic_compare_exchange_n(&streams[i], &none, f, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
            return;
    }
}

static void stream_drop(FILE *f)
{
    for (int i = 0; i < STREAMS; i++) {
        FILE *same = f;
        __atomic_compare_exchange_n(&streams[i], &same, NULL, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED);
    }
}

void streams_flush(void)
{
    for (int i = 0; i < STREAMS; i++) {
        FILE *f = __atomic_load_n(&streams[i], __ATOMIC_SEQ_CST);
        if (!f || ftrylockfile(f))
            continue; /* another thread is in it: its own business */
        fflush_unlocked(f);
        funlockfile(f);
    }
    if (files_tracked(files_entry(STDOUT_FILENO)) && !ftrylockfile(stdout)) {
        fflush_unlocked(stdout);
        funlockfile(stdout);
    }
}

static bool mode_writes(const char *mode)
{
    return mode && (mode[0] == 'w' || mode[0] == 'a' || (mode[0] && mode[strcspn(mode, "+,")] == '+'));
}

/* ---- streams over views: libc's own reads would go past the hooks, so these read through ours. */

#define VIEW_STREAMS 256

static FILE *stand_ins[3], *originals[3]; /* of the standard streams */

static struct {
    FILE *f;
    int fd;
} view_streams[VIEW_STREAMS];
static uint32_t view_streams_count;

static ssize_t stream_read(void *of, char *to, size_t len)
{
    return read((int)(intptr_t)of, to, len);
}

static ssize_t stream_write(void *of, const char *from, size_t len)
{
    ssize_t done = write((int)(intptr_t)of, from, len);
    return done < 0 ? 0 : done; /* what fopencookie wants to hear of an error */
}

static int stream_seek(void *of, off64_t *at, int whence)
{
    off64_t to = lseek64((int)(intptr_t)of, *at, whence);
    if (to < 0)
        return -1;
    *at = to;
    return 0;
}

static int stream_close(void *of)
{
    return close((int)(intptr_t)of);
}

static bool view_stream_add(FILE *f, int fd)
{
    for (int i = 0; i < VIEW_STREAMS; i++) {
        FILE *none = NULL;
        if (!__atomic_compare_exchange_n(&view_streams[i].f, &none, f, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
            continue;
        view_streams[i].fd = fd;
        __atomic_add_fetch(&view_streams_count, 1, __ATOMIC_SEQ_CST);
        return true;
    }
    return false;
}

/* mode as for fopen. */
static FILE *view_stream(int fd, const char *mode)
{
    char plain[3] = {mode[0], mode_writes(mode) && mode[strcspn(mode, "+,")] == '+' ? '+' : 0};
    cookie_io_functions_t calls = {
        .read = stream_read, .write = stream_write, .seek = stream_seek, .close = stream_close};
    FILE *f = fopencookie((void *)(intptr_t)fd, plain, calls);
    if (f && mode_writes(mode))
        stream_add(f); /* exit flushes it after our last sync point */
    if (f && !view_stream_add(f, fd))
        say_once(SAY_WARN, "more than %d streams over pulled files: fileno fails for the rest", VIEW_STREAMS);
    return f;
}

/* The descriptor under a stream of a view, -1 for any other. */
static int view_fileno(FILE *f)
{
    for (int i = 0; i < VIEW_STREAMS && __atomic_load_n(&view_streams_count, __ATOMIC_RELAXED); i++)
        if (__atomic_load_n(&view_streams[i].f, __ATOMIC_RELAXED) == f)
            return view_streams[i].fd;
    return -1;
}

static void view_stream_drop(FILE *f)
{
    for (int i = 0; i < 3; i++)
        if (stand_ins[i] == f)
            stand_ins[i] = NULL;
    for (int i = 0; i < VIEW_STREAMS && __atomic_load_n(&view_streams_count, __ATOMIC_RELAXED); i++) {
        FILE *same = f;
        if (__atomic_compare_exchange_n(&view_streams[i].f, &same, NULL, false, __ATOMIC_SEQ_CST, __ATOMIC_RELAXED))
            __atomic_sub_fetch(&view_streams_count, 1, __ATOMIC_SEQ_CST);
    }
}

SHIM_EXPORT int fileno(FILE *f)
{
    int fd = __builtin_expect(view_streams_count, 0) ? view_fileno(f) : -1;
    return fd >= 0 ? fd : REAL(fileno)(f);
}

SHIM_EXPORT int fileno_unlocked(FILE *f)
{
    return fileno(f);
}

static int open_flags(const char *mode)
{
    int flags = mode[0] == 'r' ? 0 : mode[0] == 'w' ? O_CREAT | O_TRUNC : O_CREAT | O_APPEND;
    int access = mode[0] == 'r' ? O_RDONLY : O_WRONLY;
    for (const char *m = mode + 1; *m && *m != ','; m++) {
        flags |= *m == 'e' ? O_CLOEXEC : *m == 'x' ? O_EXCL : 0;
        access = *m == '+' ? O_RDWR : access;
    }
    return flags | access;
}

/* As view_open. */
static int view_fopen_fd(const char *path, const char *mode)
{
    if (__builtin_expect(!view_pulls, true) || !shim_active() || !mode || !strchr("rwa", mode[0]))
        return VIEW_NOT_OURS;
    return view_open(AT_FDCWD, path, open_flags(mode));
}

/* true when the path is a pulled region's, with the stream, or NULL and errno, in *f. */
static bool view_fopen(const char *path, const char *mode, FILE **f)
{
    int fd = view_fopen_fd(path, mode);
    if (fd == VIEW_NOT_OURS)
        return false;
    *f = fd < 0 ? NULL : view_stream(fd, mode);
    if (fd >= 0 && !*f)
        close(fd);
    return true;
}

/* The standard streams write to their numbers inside libc. While one of these is a view's, a stream of ours stands in. */
void streams_standard(int fd)
{
    FILE **const standard[] = {&stdin, &stdout, &stderr};
    if ((unsigned)fd > 2)
        return;
    FILE **at = standard[fd], *mine = stand_ins[fd];
    bool stands_in = mine && *at == mine;
    if (stands_in == view_maybe(fd) || !shim_mine())
        return;
    if (stands_in) {
        fflush(mine);
        *at = originals[fd];
        return;
    }
    if (!mine)
        mine = stand_ins[fd] = view_stream(fd, fd ? "a" : "r");
    if (!mine)
        return;
    if (fd == STDERR_FILENO)
        setvbuf(mine, NULL, _IONBF, 0);
    originals[fd] = *at;
    *at = mine;
}

void streams_inherited(void)
{
    for (int fd = 0; fd <= 2; fd++)
        streams_standard(fd);
}

/* ---- streams over files */

static FILE *opened(FILE *f, const char *mode)
{
    int fd = f && shim_active() ? fileno(f) : -1;
    if (fd < 0)
        return f;
    int saved = errno;
    if (mode_writes(mode)) {
        files_opened(fd, FILES_FRESH | FILES_STREAM | (mode[0] == 'w' ? FILES_TRUNCATED : 0));
        if (files_tracked(files_entry(fd)))
            stream_add(f);
    } else {
        files_renewed(fd);
    }
    errno = saved;
    return f;
}

SHIM_EXPORT FILE *fopen(const char *path, const char *mode)
{
    FILE *f;
    return view_fopen(path, mode, &f) ? f : opened(REAL(fopen)(path, mode), mode);
}

SHIM_EXPORT FILE *fopen64(const char *path, const char *mode)
{
    FILE *f;
    return view_fopen(path, mode, &f) ? f : opened(REAL(fopen64)(path, mode), mode);
}

SHIM_EXPORT FILE *fdopen(int fd, const char *mode)
{
    if (view_maybe(fd) && view_of(fd)) {
        struct open_file *f = view_of(fd);
        if (mode && strchr("rwa", mode[0]) && (!mode_writes(mode) || view_writable(f))) {
            f->held->flags |= mode[0] == 'a' ? O_APPEND : 0;
            return view_stream(fd, mode);
        }
        errno = EINVAL;
        return NULL;
    }
    FILE *f = REAL(fdopen)(fd, mode);
    if (f && shim_active() && mode_writes(mode)) {
        int saved = errno;
        files_streamed(fd);
        if (files_tracked(files_entry(fd)))
            stream_add(f);
        errno = saved;
    }
    return f;
}

/* The descriptor gets the number that another one had, as freopen promises. */
static int take_place(int fd, int old)
{
    int kept = raw_fcntl(fd, F_GETFD, 0) & FD_CLOEXEC ? O_CLOEXEC : 0;
    if (old < 0 || syscall(SYS_dup3, fd, old, kept) < 0)
        return fd;
    files_copied(fd, old);
    close(fd);
    return old;
}

/* A new stream over the descriptor, which may be -1 with errno, instead of f. */
static FILE *replaced(FILE *f, int fd, const char *mode)
{
    int saved = errno, old = fileno(f);
    FILE **const standard[] = {&stdin, &stdout, &stderr}, **stands = NULL;
    for (int i = 0; i < 3; i++)
        stands = *standard[i] == f ? standard[i] : stands;
    fclose(f);
    errno = saved;
    if (fd < 0)
        return NULL;
    fd = take_place(fd, old);
    FILE *now = fdopen(fd, mode);
    if (now && stands)
        *stands = now;
    return now;
}

/* The stream's old file is flushed and closed within the call. */
static FILE *reopened(const char *path, const char *mode, FILE *f, __typeof__(&freopen) call)
{
    if (!shim_active() || !f)
        return call(path, mode, f);
    bool viewed = view_fileno(f) >= 0; /* made by us, it cannot become a file's; a new one takes its place */
    int at = path ? view_fopen_fd(path, mode) : VIEW_NOT_OURS;
    if (at == VIEW_NOT_OURS && viewed)
        at = path ? open(path, open_flags(mode), 0666) : -1;
    if (at != VIEW_NOT_OURS)
        return replaced(f, at, mode);
    struct closing c = {0};
    int fd = fileno(f);
    stream_drop(f);
    if (fd >= 0)
        c = files_close_begin(fd);
    FILE *now = call(path, mode, f);
    int saved = errno;
    if (c.last) {
        sync_now(c.number);
        files_close_end(&c);
    }
    errno = saved;
    return opened(now, mode);
}

SHIM_EXPORT FILE *freopen(const char *path, const char *mode, FILE *f)
{
    return reopened(path, mode, f, REAL(freopen));
}

SHIM_EXPORT FILE *freopen64(const char *path, const char *mode, FILE *f)
{
    return reopened(path, mode, f, REAL(freopen64));
}

SHIM_EXPORT int fclose(FILE *f)
{
    if (!shim_active())
        return REAL(fclose)(f);
    struct closing c = {0};
    if (view_fileno(f) >= 0) {
        view_stream_drop(f);
        stream_drop(f);
        return REAL(fclose)(f); /* closes the descriptor through our close */
    }
    int saved = errno, fd = fileno(f);
    errno = saved;
    stream_drop(f);
    if (fd >= 0)
        c = files_close_begin(fd);
    int rc = REAL(fclose)(f);
    saved = errno;
    if (c.last) {
        sync_now(c.number);
        files_close_end(&c);
    }
    errno = saved;
    return rc;
}
