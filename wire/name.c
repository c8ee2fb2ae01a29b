#include "wire/name.h"

#include <string.h>

const char *name_fault(const char *name)
{
    size_t all = strlen(name);
    if (!all)
        return "is empty";
    if (all > NAME_MAX_BYTES)
        return "is longer than 4096 bytes";
    for (const char *c = name; *c; c++)
        if ((unsigned char)*c < 0x20 || *c == 0x7f)
            return "holds a control character";
    for (const char *part = name;;) {
        size_t n = strcspn(part, "/");
        if (!n)
            return "has an empty part";
        if (n > 255)
            return "has a part longer than 255 bytes";
        if (!strncmp(part, "..", n) && n <= 2)
            return "has a part \".\" or \"..\"";
        if (part == name && n == 8 && !strncmp(part, ".memsync", 8))
            return "begins with .memsync, which is reserved";
        if (!part[n])
            return NULL;
        part += n + 1;
    }
}
