#include "agent/sync/record.h"

#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#define SLACK 4096 /* lines that say nothing new before the file is written anew */

static struct record *find(const struct records *r, const char *remote, const char *name)
{
    for (size_t i = 0; i < r->count; i++)
        if (!strcmp(r->at[i].name, name) && !strcmp(r->at[i].remote, remote))
            return &r->at[i];
    return NULL;
}

const struct record *records_find(const struct records *r, const char *remote, const char *name)
{
    return find(r, remote, name);
}

static struct record *keep(struct records *r, const char *remote, const char *name)
{
    struct record *rec = find(r, remote, name);
    if (rec)
        return rec;
    if (r->count == r->cap) {
        size_t cap = r->cap ? r->cap * 2 : 32;
        struct record *more = realloc(r->at, cap * sizeof *more);
        if (!more)
            return NULL;
        r->at = more;
        r->cap = cap;
    }
    char *a = strdup(remote), *b = strdup(name);
    if (!a || !b) {
        free(a);
        free(b);
        return NULL;
    }
    rec = &r->at[r->count++];
    *rec = (struct record){.remote = a, .name = b};
    return rec;
}

static int line_of(char *to, size_t cap, const struct record *rec)
{
    char lineage[ID_TEXT];
    id_text(&rec->lineage, lineage);
    return snprintf(to, cap, "%s %" PRIu64 " %" PRIu64 " %" PRIu64 " %s\t%s\n", lineage, rec->source.ino,
                    rec->source.btime, rec->reserved, rec->remote, rec->name);
}

/* A line cut off by a crash does not parse and is passed over. */
static void take_line(struct records *r, char *line)
{
    char lineage[64], *tab = strchr(line, '\t');
    struct record v = {0};
    int used = 0;
    if (!tab ||
        sscanf(line, "%63s %" SCNu64 " %" SCNu64 " %" SCNu64 " %n", lineage, &v.source.ino, &v.source.btime,
               &v.reserved, &used) < 4 ||
        !used || !id_parse(&v.lineage, lineage) || line + used > tab)
        return;
    *tab = 0;
    struct record *rec = keep(r, line + used, tab + 1);
    if (rec) {
        rec->lineage = v.lineage;
        rec->source = v.source;
        rec->reserved = v.reserved;
    }
}

static int rewrite(struct records *r)
{
    char tmp[4200], line[6000];
    snprintf(tmp, sizeof tmp, "%s.new", r->path);
    FILE *f = fopen(tmp, "we");
    if (!f)
        return -errno;
    for (size_t i = 0; i < r->count; i++) {
        line_of(line, sizeof line, &r->at[i]);
        fputs(line, f);
    }
    int rc = fflush(f) || fsync(fileno(f)) ? -errno : 0;
    if (fclose(f) && !rc)
        rc = -EIO;
    if (!rc && rename(tmp, r->path))
        rc = -errno;
    if (rc)
        return rc;
    int fd = open(r->path, O_WRONLY | O_APPEND | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    close(r->fd);
    r->fd = fd;
    r->lines = r->count;
    return 0;
}

int records_open(struct records *r, const char *state_dir, char error[512])
{
    *r = (struct records){.fd = -1};
    if (asprintf(&r->path, "%s/regions", state_dir) < 0)
        return -ENOMEM;
    r->fd = open(r->path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
    FILE *f = r->fd >= 0 ? fopen(r->path, "re") : NULL;
    if (!f) {
        int err = errno;
        snprintf(error, 512, "%s cannot be opened: %s; give another place by --state DIR", r->path, strerror(err));
        return -err;
    }
    char line[6000];
    while (fgets(line, sizeof line, f)) {
        char *end = strchr(line, '\n');
        if (!end)
            continue;
        *end = 0;
        take_line(r, line);
        r->lines++;
    }
    fclose(f);
    return r->lines > r->count + SLACK ? rewrite(r) : 0;
}

int records_put(struct records *r, const char *remote, const char *name, const struct id *lineage,
                const struct source *source, uint64_t reserved)
{
    struct record *rec = keep(r, remote, name);
    if (!rec)
        return -ENOMEM;
    rec->lineage = *lineage;
    rec->source = *source;
    rec->reserved = reserved;
    char line[6000];
    int n = line_of(line, sizeof line, rec);
    if (write(r->fd, line, (size_t)n) != n)
        return errno ? -errno : -EIO;
    if (++r->lines > r->count * 2 + SLACK)
        return rewrite(r);
    return 0;
}

void records_close(struct records *r)
{
    for (size_t i = 0; i < r->count; i++) {
        free(r->at[i].remote);
        free(r->at[i].name);
    }
    free(r->at);
    free(r->path);
    if (r->fd >= 0)
        close(r->fd);
    *r = (struct records){.fd = -1};
}
