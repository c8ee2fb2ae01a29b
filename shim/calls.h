/* MEMSYNC_HOOKS: functions of the program's own libraries after whose return everything is published.
 *
 *     HOOKS = HOOK { "," HOOK }     HOOK = FUNCTION "=" RESULT "(" { ARGUMENT } ")"
 *     letters: v void (a result only), i int, u unsigned, l long, p pointer, d double, f float
 *
 * Calls are caught where they go through a global offset table, of the program or a library of it. Calls within one
 * library that its linker bound directly, and pointers got from dlsym, are not. */
#ifndef SHIM_CALLS_H
#define SHIM_CALLS_H

#include <stdbool.h>

/* Once, in the constructor. NULL or "" for none. A hook that cannot be is said on one line and left out; the others
 * hold. */
void calls_install(const char *spec);
bool calls_any(void);
/* Hooks what was loaded since. Any thread. */
void calls_opened(void);
/* dlopen as `caller` (a return address) would have it done, then calls_opened. For use when calls_any(); otherwise a
 * hook of dlopen has to leave by a tail call of the real one, which looks at its caller to find the directories to
 * search. */
void *calls_dlopen(void *(*real)(const char *, int), const char *file, int mode, const void *caller);

#endif
