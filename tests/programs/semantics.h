/* What a call returned, as a line: the call as written, its result, errno, and every file of the directory as it is
 * afterwards. The same program run twice must print the same. Files are looked at by raw system calls, so that looking
 * is not itself among the calls under test. */
#ifndef SEMANTICS_H
#define SEMANTICS_H

#include "plain.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/syscall.h>

/* The call, whatever it returns. */
#define CALL(call) line(#call, (errno = 0, (long long)(call)))
/* A call that returns a pointer, which `to` gets: only whether it failed is told. */
#define POINTER(to, call) line(#call, (errno = 0, (to) = (call), (void *)(to) == MAP_FAILED ? -1 : !(to) ? 0 : 1))
/* A call that returns nothing. */
#define NOTHING(call) line(#call, (errno = 0, (call), 0))
/* A memory access: 0, or the signal that it raised. */
#define TOUCH(access)                                                                                                  \
    do {                                                                                                               \
        volatile int got_ = sigsetjmp(touch_back, 1);                                                                  \
        if (!got_)                                                                                                     \
            access;                                                                                                    \
        line(#access, (errno = 0, got_));                                                                              \
    } while (0)

static sigjmp_buf touch_back;

static void touch_failed(int sig)
{
    siglongjmp(touch_back, sig);
}

static inline uint64_t digest(const char *path, size_t *size)
{
    static unsigned char bytes[65536];
    uint64_t hash = 0xcbf29ce484222325u;
    *size = 0;
    int fd = (int)syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK, 0);
    long n;
    while (fd >= 0 && (n = syscall(SYS_read, fd, bytes, sizeof bytes)) > 0)
        for (long i = 0; i < n; i++, ++*size)
            hash = (hash ^ bytes[i]) * 0x100000001b3u;
    if (fd >= 0)
        syscall(SYS_close, fd);
    return hash;
}

/* Names that the programs use, in this order. */
static const char *const files[] = {"a", "b", "c", "d", "e", "s", "t", "sub/f", "name with spaces", NULL};

static inline void line(const char *call, long long result)
{
    int error = errno;
    printf("%s = %lld", call, result);
    if (error)
        printf(" (%s)", strerrorname_np(error));
    for (const char *const *f = files; *f; f++) {
        size_t size;
        uint64_t hash = digest(*f, &size);
        if (!syscall(SYS_faccessat, AT_FDCWD, *f, F_OK))
            printf(" %s:%zu:%08x", *f, size, (unsigned)(hash ^ hash >> 32));
    }
    printf("\n");
    fflush(stdout);
}

/* The directory becomes the working directory; what is written has a known form. */
static inline void semantics_start(int argc, char **argv)
{
    MUST(argc == 2 && !chdir(argv[1]));
    MUST(!mkdir("sub", 0755) || errno == EEXIST);
    umask(022);
    struct sigaction action = {.sa_handler = touch_failed};
    sigaction(SIGSEGV, &action, NULL);
    sigaction(SIGBUS, &action, NULL);
    signal(SIGXFSZ, SIG_IGN);
    signal(SIGPIPE, SIG_IGN);
}

#endif
