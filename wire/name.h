/* Region names: relative paths of parts separated by "/". No empty part, no "." or "..", parts up to 255 bytes, 4096 bytes in all, and no first
 * part ".memsync", which a store keeps for itself. No control characters: names are printed. */
#ifndef WIRE_NAME_H
#define WIRE_NAME_H

#include <stddef.h>

#define NAME_MAX_BYTES 4096
#define NAME_CAP (NAME_MAX_BYTES + 1)

/* NULL when the name is good, else what is wrong with it, for an error message. */
const char *name_fault(const char *name);

#endif
