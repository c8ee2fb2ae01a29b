/* fork. The lock is held over it, so that the child's copy of every table is whole. The child is a program of its own:
 * its own connection, userfaultfd, marks and slots. Where it inherited writable mappings it arms and announces them at
 * once, before it can store anything; with descriptors only, it connects when it first writes or syncs, because most
 * children exec. */
#include "shim/shim.h"

#include <pthread.h>

static struct held over;
static bool holding;

static void prepare(void)
{
    if (!shim_active() || !shim_mine())
        return;
    over = shim_lock();
    view_fork_prepare();
    holding = true;
}

static void parent(void)
{
    if (!holding)
        return;
    holding = false;
    struct held h = over;
    view_fork_parent();
    h.error = errno;
    shim_unlock(&h);
}

static void child(void)
{
    if (!holding)
        return;
    holding = false;
    struct held h = over;
    shim_pid = raw_getpid();
    client_forget();
    arm_fork_child();
    files_fork_child();
    maps_fork_child();
    if (view_fork_child() || maps.count)
        client_up();
    shim_unlock(&h);
}

void fork_install(void)
{
    pthread_atfork(prepare, parent, child);
}
