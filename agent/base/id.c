#include "agent/base/id.h"

#include <stdio.h>
#include <stdlib.h>
#include <sys/random.h>

void id_new(struct id *id)
{
    if (getrandom(id->b, sizeof id->b, 0) != (ssize_t)sizeof id->b)
        abort(); /* the pool is up long before any of our programs */
    id->b[6] = (uint8_t)((id->b[6] & 0x0f) | 0x40);
    id->b[8] = (uint8_t)((id->b[8] & 0x3f) | 0x80);
}

void id_text(const struct id *id, char text[ID_TEXT])
{
    char *at = text;
    for (int i = 0; i < 16; i++) {
        if (i == 4 || i == 6 || i == 8 || i == 10)
            *at++ = '-';
        at += sprintf(at, "%02x", id->b[i]);
    }
}

bool id_parse(struct id *id, const char *text)
{
    int used = 0;
    uint8_t *b = id->b;
    return strlen(text) == ID_TEXT - 1 &&
           sscanf(text, "%2hhx%2hhx%2hhx%2hhx-%2hhx%2hhx-%2hhx%2hhx-%2hhx%2hhx-%2hhx%2hhx%2hhx%2hhx%2hhx%2hhx%n", b,
                  b + 1, b + 2, b + 3, b + 4, b + 5, b + 6, b + 7, b + 8, b + 9, b + 10, b + 11, b + 12, b + 13, b + 14,
                  b + 15, &used) == 16 &&
           used == ID_TEXT - 1;
}
