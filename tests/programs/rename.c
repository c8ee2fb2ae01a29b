/* The ways in which programs give names to what they wrote: editors' write-new-and-rename, log rotation, exchange,
 * removal. */
#include "plain.h"

#include <linux/fs.h>

static void write_file(const char *path, unsigned seed, size_t len, int sync)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);
    MUST(fd >= 0);
    write_at(fd, len, 0, seed);
    if (sync)
        MUST(fsync(fd) == 0);
    MUST(close(fd) == 0);
}

static void sync_dir(const char *dir)
{
    int fd = open(dir, O_RDONLY | O_DIRECTORY);
    MUST(fd >= 0 && fsync(fd) == 0 && close(fd) == 0);
}

static void editor_saves(const char *dir, const char *temporary, int sync)
{
    char target[4096], new[4096];
    in_dir(target, dir, "document");
    in_dir(new, dir, temporary);
    write_file(target, 1, 10000, sync);
    for (unsigned i = 2; i < 8; i++) {
        write_file(new, i, 9000 + 1000 * i, sync);
        MUST(rename(new, target) == 0);
        if (sync)
            sync_dir(dir);
    }
}

static void editor(const char *dir)
{
    editor_saves(dir, "document.new", 1);
}

static void editor_nosync(const char *dir)
{
    editor_saves(dir, "document.new", 0);
}

/* The new file is written under a name that the rules may not match (a dot file), in the same directory. */
static void editor_hidden(const char *dir)
{
    editor_saves(dir, ".document.swp", 1);
}

static void rotate(const char *dir)
{
    char log[4096], old[4096], older[4096];
    in_dir(log, dir, "log");
    in_dir(old, dir, "log.1");
    in_dir(older, dir, "log.2");
    int fd = open(log, O_WRONLY | O_CREAT | O_APPEND, 0644);
    MUST(fd >= 0);
    for (unsigned i = 0; i < 4; i++) {
        write_at(fd, 3000, 0, i);
        if (i > 0)
            MUST(rename(old, older) == 0);
        MUST(rename(log, old) == 0);
        write_at(fd, 500, 0, 100 + i); /* still the same file, under its new name */
        MUST(fdatasync(fd) == 0 && close(fd) == 0);
        fd = open(log, O_WRONLY | O_CREAT | O_APPEND, 0644);
        MUST(fd >= 0);
        write_at(fd, 200, 0, 200 + i);
    }
    MUST(close(fd) == 0);
}

static void exchange(const char *dir)
{
    char a[4096], b[4096];
    in_dir(a, dir, "a");
    in_dir(b, dir, "b");
    write_file(a, 1, 5000, 1);
    write_file(b, 2, 15000, 1);
    MUST(renameat2(AT_FDCWD, a, AT_FDCWD, b, RENAME_EXCHANGE) == 0);
    int fd = open(a, O_RDWR);
    MUST(fd >= 0);
    write_at(fd, 100, 50, 3);
    MUST(fsync(fd) == 0 && close(fd) == 0);
}

/* A mapping follows its file: to another name, and to none. */
static void mapped(const char *dir)
{
    char a[4096], b[4096], c[4096];
    int fd = make_file(in_dir(a, dir, "a"), 8 * PAGE);
    unsigned char *p = map_shared(fd, 8 * PAGE, 0);
    fill(p, 2 * PAGE, 1);
    MUST(rename(a, in_dir(b, dir, "b")) == 0);
    fill(p + 3 * PAGE, 2 * PAGE, 2);
    MUST(msync(p, 8 * PAGE, MS_SYNC) == 0);
    fill(p + 6 * PAGE, PAGE, 3);
    int other = make_file(in_dir(c, dir, "c"), 4 * PAGE);
    unsigned char *q = map_shared(other, 4 * PAGE, 0);
    fill(q, 4 * PAGE, 4);
    MUST(msync(q, 4 * PAGE, MS_SYNC) == 0);
    MUST(unlink(c) == 0);
    fill(q, 4 * PAGE, 5);
    MUST(msync(q, 4 * PAGE, MS_SYNC) == 0);
    MUST(munmap(q, 4 * PAGE) == 0 && close(other) == 0);
}

/* Unlinked and made anew under the same name: another file. */
static void anew(const char *dir)
{
    char a[4096];
    in_dir(a, dir, "a");
    write_file(a, 1, 50000, 1);
    MUST(unlink(a) == 0);
    write_file(a, 2, 300, 1);
    MUST(unlink(a) == 0);
    write_file(a, 3, 7000, 0);
}

static void moved_away(const char *dir)
{
    char a[4096], b[4096], outside[4096];
    in_dir(a, dir, "a");
    in_dir(outside, dir, "../outside");
    write_file(a, 1, 20000, 1);
    write_file(in_dir(b, dir, "b"), 2, 20000, 1);
    MUST(rename(a, outside) == 0); /* no rule matches it there: its replica goes */
    write_file(outside, 4, 4000, 1);
    MUST(unlink(b) == 0);
    MUST(rename(outside, b) == 0); /* and comes back as another name */
}

int main(int argc, char **argv)
{
    static const struct plain_case cases[] = {
        {"editor", editor}, {"editor-nosync", editor_nosync}, {"editor-hidden", editor_hidden},
        {"rotate", rotate}, {"exchange", exchange},           {"mapped", mapped},
        {"anew", anew},     {"moved-away", moved_away},
    };
    return run_case(cases, sizeof cases / sizeof *cases, argc, argv);
}
