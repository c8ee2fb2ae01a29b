/* stdio. Its writes go past the hooks, inside libc, so a file that a stream writes is found by hashing at its sync
 * points. Streams are remembered so that what they still hold can be flushed before the last sync point: exit flushes
 * them only after our destructor. */
#include "shim/real.h"

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
    return opened(REAL(fopen)(path, mode), mode);
}

SHIM_EXPORT FILE *fopen64(const char *path, const char *mode)
{
    return opened(REAL(fopen64)(path, mode), mode);
}

SHIM_EXPORT FILE *fdopen(int fd, const char *mode)
{
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

/* The stream's old file is flushed and closed within the call. */
static FILE *reopened(const char *path, const char *mode, FILE *f, __typeof__(&freopen) call)
{
    if (!shim_active() || !f)
        return call(path, mode, f);
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
