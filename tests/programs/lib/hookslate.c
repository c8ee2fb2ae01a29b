/* Opened late by hooks.c: calls a library of its own, which the program does not know. */
long inner_checkpoint(void *at, long n, double share);

long late_step(void *at, long n);
long late_step(void *at, long n)
{
    return inner_checkpoint(at, n, 0.25) + 1;
}
