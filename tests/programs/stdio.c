/* Writes a file through stdio: in pieces, with seeks back, with and without a sync. */
#include "plain.h"

static void write_records(FILE *f, unsigned from, unsigned count)
{
    unsigned char record[700];
    for (unsigned i = from; i < from + count; i++) {
        fill(record, sizeof record, i);
        MUST(fwrite(record, sizeof record, 1, f) == 1);
    }
}

static FILE *open_in(const char *dir, const char *mode)
{
    char path[4096];
    FILE *f = fopen(in_dir(path, dir, "records"), mode);
    MUST(f);
    return f;
}

static void with_sync(const char *dir)
{
    FILE *f = open_in(dir, "w+");
    write_records(f, 0, 300);
    MUST(fflush(f) == 0 && fsync(fileno(f)) == 0);
    MUST(fseek(f, 70000, SEEK_SET) == 0);
    write_records(f, 1000, 50);
    MUST(fflush(f) == 0 && fdatasync(fileno(f)) == 0);
    write_records(f, 2000, 100);
    MUST(fclose(f) == 0);
}

static void without_sync(const char *dir)
{
    FILE *f = open_in(dir, "w");
    write_records(f, 0, 500);
    MUST(fclose(f) == 0);
    f = open_in(dir, "r+");
    MUST(fseek(f, 12345, SEEK_SET) == 0);
    write_records(f, 3000, 20);
    MUST(fclose(f) == 0);
}

/* The last bytes leave the buffer only when exit() closes the streams. */
static void left_open(const char *dir)
{
    FILE *f = open_in(dir, "w");
    write_records(f, 0, 101);
}

static void append(const char *dir)
{
    for (unsigned i = 0; i < 5; i++) {
        FILE *f = open_in(dir, "a");
        write_records(f, i * 10, 10);
        MUST(fclose(f) == 0);
    }
}

static void reopened(const char *dir)
{
    char path[4096];
    FILE *f = open_in(dir, "w");
    write_records(f, 0, 40);
    f = freopen(in_dir(path, dir, "second"), "w+", f);
    MUST(f);
    write_records(f, 50, 40);
    int fd = open(in_dir(path, dir, "third"), O_RDWR | O_CREAT, 0644);
    MUST(fd >= 0);
    FILE *g = fdopen(fd, "r+");
    MUST(g);
    write_records(g, 90, 40);
    MUST(fclose(g) == 0 && fclose(f) == 0);
}

int main(int argc, char **argv)
{
    static const struct plain_case cases[] = {
        {"sync", with_sync}, {"nosync", without_sync}, {"left-open", left_open},
        {"append", append},  {"reopened", reopened},
    };
    return run_case(cases, sizeof cases / sizeof *cases, argc, argv);
}
