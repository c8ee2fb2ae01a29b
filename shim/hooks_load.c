/* dlopen, so that the tables of what it loads are patched too (MEMSYNC_HOOKS). Without hooks to place, the call leaves
 * as a jump: dlopen looks at its return address to find whose search path to use. */
#include "shim/calls.h"
#include "shim/real.h"

SHIM_EXPORT void *dlopen(const char *file, int mode)
{
    __typeof__(&dlopen) call = REAL(dlopen);
    if (!shim_active() || !calls_any())
        return call(file, mode);
    return calls_dlopen(call, file, mode, __builtin_return_address(0));
}

SHIM_EXPORT void *dlmopen(Lmid_t space, const char *file, int mode)
{
    __typeof__(&dlmopen) call = REAL(dlmopen);
    if (!shim_active() || !calls_any())
        return call(space, file, mode);
    void *got = call(space, file, mode);
    if (got)
        calls_opened();
    return got;
}
