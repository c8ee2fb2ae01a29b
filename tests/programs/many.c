/* 2,000 mappings at once, of 100 files, most of them apart from each other, with stores to each. */
#include "plain.h"

#define FILES 100u
#define EACH 20u
#define LEN (4 * PAGE)

int main(int argc, char **argv)
{
    static unsigned char *map[FILES][EACH];
    char path[4096], name[32];
    if (argc != 2)
        return 2;
    for (unsigned f = 0; f < FILES; f++) {
        snprintf(name, sizeof name, "file-%03u", f);
        int fd = make_file(in_dir(path, argv[1], name), EACH * 2 * LEN);
        for (unsigned i = 0; i < EACH; i++)
            map[f][i] = map_shared(fd, LEN, i * 2 * LEN);
        if (f % 2)
            MUST(close(fd) == 0);
    }
    for (unsigned i = 0; i < EACH; i++)
        for (unsigned f = 0; f < FILES; f++)
            fill(map[f][i] + (f + i) % 4 * PAGE, PAGE / 2, f * EACH + i);
    for (unsigned f = 0; f < FILES; f += 10)
        MUST(msync(map[f][f % EACH], LEN, MS_SYNC) == 0);
    for (unsigned f = 0; f < FILES; f++)
        for (unsigned i = 0; i < EACH; i += 2) {
            map[f][i][PAGE] = 7;
            MUST(munmap(map[f][i], LEN) == 0);
        }
    for (unsigned f = 0; f < FILES; f++)
        for (unsigned i = 1; i < EACH; i += 2)
            map[f][i][2 * PAGE + 5] = 9;
    return 0;
}
