/* An agent's own identity: a UUID in the file `identity` of its state directory, made on first use. It is what leases
 * are held by, so it outlives the process. */
#ifndef BASE_IDENTITY_H
#define BASE_IDENTITY_H

#include "agent/base/id.h"

#include <stddef.h>

/* Reads it, or makes it (and the directory, 0700): of several agents that start at once, all get the same. Blocking:
 * for start-up. 0, or a negative errno and what, where, why in error. */
int identity_load(const char *state_dir, struct id *id, char error[512]);
/* $XDG_STATE_HOME/memsync, else $HOME/.local/state/memsync, else /var/lib/memsync (root) or /tmp/memsync-UID-state. 0
 * or -ENAMETOOLONG. */
int identity_default_dir(char *to, size_t cap);

#endif
