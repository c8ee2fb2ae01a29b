/* Stores through functions of its libraries, and never syncs. Before each step it waits for a line on standard input,
 * after each it says what was stored: whoever drives it can look at the replica in between.
 *
 * usage: hooks FILE LIBRARY, the library opened late. */
#include "../plain.h"

#include <dlfcn.h>

long direct_checkpoint(void *at, long n, double share);
float direct_wide(int a, unsigned b, long c, void *at, double d, float e, int f, long g, double h, int i);
void direct_quiet(void *at);
int direct_unhooked(void *at);

static void stored(const char *at)
{
    printf("%s\n", at);
    fflush(stdout);
    char line[16];
    MUST(fgets(line, sizeof line, stdin));
}

int main(int argc, char **argv)
{
    MUST(argc == 3);
    int fd = make_file(argv[1], PAGE);
    char *at = (char *)map_shared(fd, PAGE, 0);

    errno = 0;
    MUST(direct_checkpoint(at, 42, 1.5) == -42000000000 && errno == 42);
    stored(at);
    MUST(direct_checkpoint(at, 43, 2.5) == -43000000000 && errno == 43);
    stored(at);
    long (*volatile pointer)(void *, long, double) = direct_checkpoint;
    MUST(pointer(at, 44, 3.5) == -44000000000 && errno == 44);
    stored(at);
    MUST(direct_wide(-1, 4000000000u, -5000000000, at, 0.25, 1.5f, -6, 7, 8.5, -9) == 3.0f && errno == ERANGE);
    stored(at);
    direct_quiet(at);
    MUST(errno == ENOTTY);
    stored(at);
    MUST(direct_unhooked(at) == -1);
    stored(at);

    void *late = dlopen(argv[2], RTLD_LAZY | RTLD_LOCAL);
    if (!late)
        fprintf(stderr, "%s\n", dlerror());
    MUST(late && !dlerror());
    long (*step)(void *, long) = (long (*)(void *, long))dlsym(late, "late_step");
    MUST(step);
    MUST(step(at, 45) == -45000000000 + 1 && errno == 45);
    stored(at);
    MUST(!dlclose(late));
    late = dlopen(argv[2], RTLD_NOW | RTLD_LOCAL);
    MUST(late);
    step = (long (*)(void *, long))dlsym(late, "late_step");
    MUST(step && step(at, 46) == -46000000000 + 1 && errno == 46);
    stored(at);
    MUST(!dlopen("libnosuch-library.so", RTLD_NOW) && strstr(dlerror(), "libnosuch-library.so"));
    return 0;
}
