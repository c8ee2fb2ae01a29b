/* Starting the agent so that the program cannot notice: a child with exit signal 0 (no SIGCHLD, invisible to plain
 * wait) that shares our memory for its few calls, a grandchild in its own session, no descriptors but /dev/null, no
 * LD_PRELOAD. Everything is prepared before the clone; the children only make system calls. Called with the lock held,
 * hence with all signals blocked. */
#include "shim/shim.h"

#include <dlfcn.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>

#define STACK 32768u

static char program[CONTROL_PATH];

struct start {
    char *argv[5];
    char **envp;
    char *stack;
    int error;
};

static void become_agent(struct start *s)
{
    /* The kernel's own layout: handler, flags, restorer, mask. */
    struct {
        void *handler;
        unsigned long flags;
        void *restorer;
        uint64_t mask;
    } dfl = {0};
    for (int sig = 1; sig <= 64; sig++)
        syscall(SYS_rt_sigaction, sig, &dfl, NULL, 8);
    syscall(SYS_setsid);
    syscall(SYS_chdir, "/");
    int null = raw_openat(AT_FDCWD, "/dev/null", O_RDWR, 0);
    for (int fd = 0; fd < 3 && null >= 0; fd++)
        if (fd != null)
            syscall(SYS_dup3, null, fd, 0);
    syscall(SYS_close_range, 3u, ~0u, 0u);
    uint64_t none = 0;
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &none, NULL, 8);
    syscall(SYS_execve, program, s->argv, s->envp);
    s->error = errno;
    syscall(SYS_exit_group, 127);
}

static int grandchild(void *arg)
{
    become_agent(arg);
    return 127;
}

static int child(void *arg)
{
    struct start *s = arg;
    if (clone(grandchild, s->stack + STACK, CLONE_VM | CLONE_VFORK | SIGCHLD, s) < 0)
        s->error = errno;
    syscall(SYS_exit_group, 0);
    return 0;
}

/* Beside the library, else where `make install` puts it. Found out early: dladdr takes the loader's lock, which another
 * thread may have held at a fork. */
void start_prepare(void)
{
    Dl_info info;
    if (dladdr((void *)start_agent, &info) && info.dli_fname && strrchr(info.dli_fname, '/')) {
        size_t dir = (size_t)(strrchr(info.dli_fname, '/') - info.dli_fname);
        if (dir + sizeof "/memsync-agent" < sizeof program && realpath(info.dli_fname, program)) {
            strcpy(strrchr(program, '/'), "/memsync-agent");
            if (!raw_access(program, X_OK))
                return;
        }
    }
    strcpy(program, MEMSYNC_PREFIX "/bin/memsync-agent");
}

static char **environment(size_t *bytes)
{
    extern char **environ;
    size_t n = 0, kept = 0;
    while (environ && environ[n])
        n++;
    *bytes = (n + 1) * sizeof(char *);
    char **to = raw_memory(*bytes);
    for (size_t i = 0; to && i < n; i++)
        if (strncmp(environ[i], "LD_PRELOAD=", 11))
            to[kept++] = environ[i];
    return to;
}

int start_agent(const char *socket)
{
    struct start *s = raw_memory(sizeof *s + 2 * STACK);
    if (!s)
        return -ENOMEM;
    int rc = -ENOENT;
    size_t bytes = 0;
    if (raw_access(program, X_OK)) {
        say(SAY_ERROR,
            "no agent: memsync-agent is neither beside the preload library nor at %s, and none runs on %s; nothing of "
            "%s is "
            "tracked; install it there, or start one",
            program, socket, shim.program);
        rc = -EKEYREJECTED;
        goto out;
    }
    rc = -ENOMEM;
    s->envp = environment(&bytes);
    if (!s->envp)
        goto out;
    static char name[] = "memsync-agent", socket_option[] = "--socket", linger_option[] = "--linger";
    char *argv[] = {name, socket_option, (char *)socket, linger_option, NULL};
    memcpy(s->argv, argv, sizeof argv);
    char *stacks = (char *)(s + 1);
    s->stack = stacks;
    char *top = (char *)((uintptr_t)(stacks + 2 * STACK) & ~(uintptr_t)63);
    int pid = clone(child, top, CLONE_VM | CLONE_VFORK, s);
    if (pid < 0)
        s->error = errno;
    else
        while (syscall(SYS_wait4, pid, NULL, __WCLONE, NULL) < 0 && errno == EINTR)
            ;
    rc = -s->error;
    if (rc)
        say_once(SAY_ERROR, "%s cannot be started: %e", program, rc);
out:
    if (s->envp)
        raw_munmap(s->envp, bytes);
    raw_munmap(s, sizeof *s + 2 * STACK);
    return rc;
}
