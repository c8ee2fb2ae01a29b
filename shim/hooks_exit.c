/* The end of the program, by exit or by exec: everything is published, and the agent told that the connection will end.
 */
#include "shim/real.h"

extern char **environ;

void shim_leave(void)
{
    if (!shim_active() || !shim_mine())
        return;
    int saved = errno;
    streams_flush();
    if (client_used())
        sync_bye();
    errno = saved;
}

__attribute__((destructor)) static void leave_at_exit(void)
{
    shim_leave();
}

SHIM_EXPORT void _exit(int status)
{
    shim_leave();
    for (;;)
        syscall(SYS_exit_group, status);
}

SHIM_EXPORT void _Exit(int status)
{
    _exit(status);
}

SHIM_EXPORT void quick_exit(int status)
{
    /* Its handlers run first; it ends by an _exit that no hook sees. */
    shim_leave();
    REAL(quick_exit)(status);
    __builtin_unreachable();
}

/* ---- exec */

SHIM_EXPORT int execve(const char *path, char *const argv[], char *const envp[])
{
    shim_leave();
    return (int)syscall(SYS_execve, path, argv, envp);
}

SHIM_EXPORT int execv(const char *path, char *const argv[])
{
    return execve(path, argv, environ);
}

SHIM_EXPORT int execveat(int dir, const char *path, char *const argv[], char *const envp[], int flags)
{
    shim_leave();
    return (int)syscall(SYS_execveat, dir, path, argv, envp, flags);
}

SHIM_EXPORT int fexecve(int fd, char *const argv[], char *const envp[])
{
    shim_leave();
    return REAL(fexecve)(fd, argv, envp);
}

SHIM_EXPORT int execvp(const char *file, char *const argv[])
{
    shim_leave();
    return REAL(execvp)(file, argv);
}

SHIM_EXPORT int execvpe(const char *file, char *const argv[], char *const envp[])
{
    shim_leave();
    return REAL(execvpe)(file, argv, envp);
}

/* The argument list as an array on the stack, as libc itself does it: these may be called in a vfork child. */
#define LIST_OF(argv, first, args)                                                                                     \
    va_list args;                                                                                                      \
    size_t n_ = 1;                                                                                                     \
    va_start(args, first);                                                                                             \
    while (va_arg(args, char *))                                                                                       \
        n_++;                                                                                                          \
    va_end(args);                                                                                                      \
    char *argv[n_ + 1];                                                                                                \
    argv[0] = (char *)first;                                                                                           \
    va_start(args, first);                                                                                             \
    for (size_t i_ = 1; i_ <= n_; i_++)                                                                                \
        argv[i_] = va_arg(args, char *);

SHIM_EXPORT int execl(const char *path, const char *first, ...)
{
    LIST_OF(argv, first, args)
    va_end(args);
    return execve(path, argv, environ);
}

SHIM_EXPORT int execlp(const char *file, const char *first, ...)
{
    LIST_OF(argv, first, args)
    va_end(args);
    return execvp(file, argv);
}

SHIM_EXPORT int execle(const char *path, const char *first, ...)
{
    LIST_OF(argv, first, args)
    char *const *envp = va_arg(args, char *const *);
    va_end(args);
    return execve(path, argv, envp);
}
