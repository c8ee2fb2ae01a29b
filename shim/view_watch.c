/* A thread that lives while the process has views. The program's own threads may all sleep in page faults, and then
 * nobody else would see that the agent is gone, find another and tell it what to fill; and the agent's notices would
 * wait unseen.
 *
 * It is no thread of the C library's: made by clone with memory of its own, so that a first open in a signal handler or
 * a forked child needs no malloc, the library does not count it, and no signal ever comes to it. What it runs needs of
 * its thread block only errno and our own flag; the rest of the block is a copy of the head of its maker's. */
#include "shim/view.h"

#include <poll.h>
#include <sched.h>
#include <string.h>

#define STACK 65536u
#define HEAD 704u /* of the thread control block: more than what the ABI fixes */
#define RETRY_MS 200u
#define IDLE_MS 5000u

static uint32_t watching; /* 1: there is one */

static void look(void)
{
    struct held h = shim_lock();
    client_read();
    uint32_t generation = client_generation;
    int fd = client_fd;
    bool wanted = view_count;
    bool up = fd >= 0 && !client_hung_up();
    if (!up && wanted) {
        client_lost(generation);
        up = client_up();
    }
    shim_unlock(&h);
    if (!up)
        raw_sleep_ms(wanted ? RETRY_MS : IDLE_MS);
}

static int watch(void *arg)
{
    (void)arg;
    for (;;) {
        int fd = __atomic_load_n(&client_fd, __ATOMIC_RELAXED);
        struct pollfd p = {.fd = fd, .events = POLLIN};
        struct timespec t = {.tv_sec = 10};
        if (fd < 0 || syscall(SYS_ppoll, &p, 1, &t, NULL, 8) != 0)
            look();
    }
    return 0;
}

/* How far from its block the variables of a thread lie that are used here. */
static size_t reach(uintptr_t block)
{
    const uintptr_t used[] = {(uintptr_t)&errno, (uintptr_t)shim_lock_flag()};
    uintptr_t far = 0;
    for (int i = 0; i < 2; i++) {
        uintptr_t distance = used[i] > block ? used[i] - block : block - used[i];
        far = distance > far ? distance : far;
    }
    return (far + 2 * 4096) & ~(size_t)4095;
}

#if defined __x86_64__
/* The block lies above the thread's variables and begins with its own address, twice. */
static uint8_t *thread_block(size_t *room)
{
    uintptr_t self;
    __asm__("mov %%fs:0, %0" : "=r"(self));
    size_t below = reach(self);
    *room = below + 4096;
    uint8_t *memory = raw_memory(*room + STACK);
    if (!memory)
        return NULL;
    uint8_t *at = memory + below;
    memcpy(at, (void *)self, HEAD);
    self = (uintptr_t)at;
    memcpy(at, &self, sizeof self);
    memcpy(at + 16, &self, sizeof self);
    return at;
}
#define STACK_TOP(block) ((block) + 4096 + STACK)
#define WATCH_BUILT 1
#elif defined __aarch64__
/* The block lies below the thread's variables. */
static uint8_t *thread_block(size_t *room)
{
    uint8_t *self = __builtin_thread_pointer();
    size_t above = reach((uintptr_t)self);
    *room = above + 8192;
    uint8_t *memory = raw_memory(*room + STACK);
    if (memory)
        memcpy(memory + STACK + 8192, self, 16);
    return memory ? memory + STACK + 8192 : NULL;
}
#define STACK_TOP(block) ((block)-8192)
#define WATCH_BUILT 1
#endif

void view_watch(void)
{
    if (watching)
        return;
#ifdef WATCH_BUILT
    size_t room;
    uint8_t *block = thread_block(&room);
    if (!block)
        return;
    int flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM | CLONE_SETTLS;
    if (clone(watch, STACK_TOP(block), flags, NULL, NULL, block, NULL) < 0) {
        say_once(SAY_WARN, "no thread can be made to watch the agent: %e", errno);
        return;
    }
    watching = 1;
#endif
}

void view_watch_forget(void)
{
    watching = 0;
}
