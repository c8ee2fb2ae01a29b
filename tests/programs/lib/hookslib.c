/* What hooks.c calls; built several times over, with NAME telling the copies apart. Each stores its arguments into the
 * mapping it is given, and returns and sets errno by them, so that a caller can see that nothing was lost on the way
 * through a hook. */
#include <errno.h>
#include <stdio.h>
#include <string.h>

#define JOIN(a, b) a##b
#define NAMED(a, b) JOIN(a, b)

long NAMED(NAME, _checkpoint)(void *at, long n, double share);
long NAMED(NAME, _checkpoint)(void *at, long n, double share)
{
    snprintf(at, 4096, "checkpoint %ld %.3f", n, share);
    errno = (int)(n % 100);
    return -n * 1000000000;
}

/* Ten arguments of all kinds: more than there are registers for. */
float NAMED(NAME, _wide)(int a, unsigned b, long c, void *at, double d, float e, int f, long g, double h, int i);
float NAMED(NAME, _wide)(int a, unsigned b, long c, void *at, double d, float e, int f, long g, double h, int i)
{
    snprintf(at, 4096, "wide %d %u %ld %.2f %.2f %d %ld %.2f %d", a, b, c, d, (double)e, f, g, h, i);
    errno = ERANGE;
    return e * 2;
}

void NAMED(NAME, _quiet)(void *at);
void NAMED(NAME, _quiet)(void *at)
{
    strcpy(at, "quiet");
    errno = ENOTTY;
}

int NAMED(NAME, _unhooked)(void *at);
int NAMED(NAME, _unhooked)(void *at)
{
    strcpy(at, "unhooked");
    return -1;
}
