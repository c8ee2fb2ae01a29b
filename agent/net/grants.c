#include "agent/net/grants.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

#define LINES_MAX 65536u
#define LINE_MAX_LEN 4608u

struct grant {
    char *identity, *glob;
    unsigned rights;
};

struct grants {
    char *file;
    struct grant *line;
    size_t n;
};

/* Backtracks to the last star only: one that crosses once it is past is never shortened again by an earlier one, which
 * could not do better. A single star is not tried over a slash; the crossing one before it is then gone back to. */
bool grants_glob(const char *glob, const char *name)
{
    const char *star = NULL, *star_at = NULL, *cross = NULL, *cross_at = NULL;
    for (;;) {
        if (glob[0] == '*' && glob[1] == '*') {
            cross = glob += 2;
            cross_at = name;
            star = NULL;
        } else if (*glob == '*') {
            star = ++glob;
            star_at = name;
        } else if (*name && (*glob == *name || (*glob == '?' && *name != '/'))) {
            glob++;
            name++;
        } else if (!*glob && !*name) {
            return true;
        } else if (star && *star_at && *star_at != '/') {
            glob = star;
            name = ++star_at;
        } else if (cross && *cross_at) {
            glob = cross;
            name = ++cross_at;
            star = NULL;
        } else {
            return false;
        }
    }
}

static unsigned rights_parse(char *words)
{
    static const char *const names[] = {"read", "write", "admin"};
    unsigned all = 0;
    for (char *save, *word = strtok_r(words, ",", &save); word; word = strtok_r(NULL, ",", &save)) {
        unsigned one = 0;
        for (unsigned i = 0; i < 3; i++)
            if (!strcmp(word, names[i]))
                one = 1u << i;
        if (!one)
            return 0;
        all |= one;
    }
    return all;
}

static int line_add(struct grants *g, char *text)
{
    char *save, *identity = strtok_r(text, " \t\r\n", &save), *glob = strtok_r(NULL, " \t\r\n", &save);
    char *rights = strtok_r(NULL, " \t\r\n", &save), *more = strtok_r(NULL, " \t\r\n", &save);
    if (!identity || *identity == '#')
        return 0;
    unsigned bits = rights && !more ? rights_parse(rights) : 0;
    if (!bits || g->n == LINES_MAX)
        return -EINVAL;
    struct grant *all = realloc(g->line, (g->n + 1) * sizeof *all);
    if (!all)
        return -ENOMEM;
    g->line = all;
    all[g->n] = (struct grant){strdup(identity), strdup(glob), bits};
    g->n++;
    return all[g->n - 1].identity && all[g->n - 1].glob ? 0 : -ENOMEM;
}

static int grants_read(struct grants *g, char error[GRANTS_ERROR])
{
    char line[LINE_MAX_LEN];
    struct stat st;
    int rc = 0;
    FILE *f = fopen(g->file, "re");
    if (!f || fstat(fileno(f), &st) < 0) {
        snprintf(error, GRANTS_ERROR, "%.400s: %m", g->file);
        rc = -EINVAL;
    } else if (st.st_mode & 022) {
        snprintf(error, GRANTS_ERROR, "%.400s can be written by others than its owner: chmod go-w it", g->file);
        rc = -EINVAL;
    }
    for (unsigned number = 1; !rc && fgets(line, sizeof line, f); number++) {
        bool cut = !strchr(line, '\n') && !feof(f);
        rc = cut ? -EINVAL : line_add(g, line);
        if (rc)
            snprintf(error, GRANTS_ERROR, "%.380s, line %u%s", g->file, number,
                     rc == -ENOMEM ? ": no memory" : " is not IDENTITY GLOB RIGHT[,RIGHT]... of read, write and admin");
    }
    if (!rc && ferror(f)) {
        snprintf(error, GRANTS_ERROR, "%.400s cannot be read", g->file);
        rc = -EINVAL;
    }
    if (f)
        fclose(f);
    return rc;
}

static void lines_free(struct grants *g)
{
    for (size_t i = 0; i < g->n; i++) {
        free(g->line[i].identity);
        free(g->line[i].glob);
    }
    free(g->line);
    g->line = NULL;
    g->n = 0;
}

struct grants *grants_load(const char *file, char error[GRANTS_ERROR])
{
    struct grants *g = calloc(1, sizeof *g);
    if (!g || !(g->file = realpath(file, NULL))) {
        snprintf(error, GRANTS_ERROR, "%.400s: %m", file);
        grants_free(g);
        return NULL;
    }
    if (!grants_read(g, error))
        return g;
    grants_free(g);
    return NULL;
}

int grants_reload(struct grants *g, char error[GRANTS_ERROR])
{
    struct grants fresh = {.file = g->file};
    if (grants_read(&fresh, error)) {
        lines_free(&fresh);
        return -EINVAL;
    }
    lines_free(g);
    g->line = fresh.line;
    g->n = fresh.n;
    return 0;
}

void grants_free(struct grants *g)
{
    if (!g)
        return;
    lines_free(g);
    free(g->file);
    free(g);
}

unsigned grants_of(const struct grants *g, const char *identity, const char *region)
{
    unsigned all = 0;
    for (size_t i = 0; i < g->n; i++) {
        const char *who = g->line[i].identity;
        bool fits = identity ? !strcmp(who, "*") || !strcmp(who, identity) : !strcmp(who, "anonymous");
        if (fits && grants_glob(g->line[i].glob, region))
            all |= g->line[i].rights;
    }
    return all;
}
