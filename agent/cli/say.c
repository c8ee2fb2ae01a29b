/* Messages, numbers for people, the progress line, and where our own parts are. */
#include "agent/cli/cli.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define PROGRESS_EVERY_MS 100
#define PROGRESS_AFTER_MS 300 /* what is done sooner needs no line */

const char *cli_command;

static void say(const char *format, va_list ap)
{
    fflush(stdout);
    fprintf(stderr, "memsync%s%s: ", cli_command ? " " : "", cli_command ? cli_command : "");
    vfprintf(stderr, format, ap);
    fputc('\n', stderr);
}

int cli_fail(int code, const char *format, ...)
{
    va_list ap;
    va_start(ap, format);
    say(format, ap);
    va_end(ap);
    return code;
}

void cli_say(const char *format, ...)
{
    va_list ap;
    va_start(ap, format);
    say(format, ap);
    va_end(ap);
}

const char *cli_bytes(uint64_t n, char text[32])
{
    static const char *const units[] = {"KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    if (n < 1024) {
        snprintf(text, 32, "%u B", (unsigned)n);
        return text;
    }
    double v = (double)n / 1024;
    unsigned unit = 0;
    while (v >= 1024 && unit < 5) {
        v /= 1024;
        unit++;
    }
    snprintf(text, 32, v < 10 ? "%.1f %s" : "%.0f %s", v, units[unit]);
    return text;
}

const char *cli_seconds(double s, char text[32])
{
    if (s < 10)
        snprintf(text, 32, "%.1fs", s < 0 ? 0 : s);
    else if (s < 120)
        snprintf(text, 32, "%.0fs", s);
    else if (s < 7200)
        snprintf(text, 32, "%.0fm", s / 60);
    else if (s < 172800)
        snprintf(text, 32, "%.0fh", s / 3600);
    else
        snprintf(text, 32, "%.0fd", s / 86400);
    return text;
}

int64_t cli_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000 + t.tv_nsec / 1000000;
}

void progress_start(struct progress *p, const char *what, uint64_t total)
{
    *p = (struct progress){.what = what, .total = total, .started = cli_now(), .on = isatty(STDERR_FILENO)};
}

void progress_at(struct progress *p, uint64_t done)
{
    p->done = done;
    int64_t now = p->on ? cli_now() : 0;
    if (!p->on || now - p->started < PROGRESS_AFTER_MS || now - p->shown < PROGRESS_EVERY_MS)
        return;
    char total[32], rate[32];
    unsigned percent = p->total ? (unsigned)((double)done * 100 / (double)p->total) : 100;
    fprintf(stderr, "\r%s %s: %u%% of %s, %s/s \033[K", cli_command, p->what, percent, cli_bytes(p->total, total),
            cli_bytes(done * 1000 / (uint64_t)(now - p->started), rate));
    p->shown = now;
    p->drawn = true;
}

void progress_end(struct progress *p)
{
    if (p->drawn)
        fputs("\r\033[K", stderr);
    p->drawn = false;
}

int cli_directory(char *to, size_t cap)
{
    ssize_t n = readlink("/proc/self/exe", to, cap);
    if (n <= 0)
        return n < 0 ? -errno : -ENOENT;
    char *slash = (size_t)n < cap ? memrchr(to, '/', (size_t)n) : NULL;
    if (!slash)
        return -ENAMETOOLONG;
    *slash = 0;
    return 0;
}

int cli_part(const char *name, char *to, size_t cap)
{
    static const char *const places[] = {"", "/../lib"};
    char dir[4096];
    bool known = !cli_directory(dir, sizeof dir);
    for (size_t i = 0; known && i < sizeof places / sizeof *places; i++)
        if ((size_t)snprintf(to, cap, "%s%s/%s", dir, places[i], name) < cap && !access(to, R_OK))
            return 0;
    static const char *const under[] = {MEMSYNC_PREFIX "/lib", MEMSYNC_PREFIX "/bin"};
    for (size_t i = 0; i < sizeof under / sizeof *under; i++)
        if ((size_t)snprintf(to, cap, "%s/%s", under[i], name) < cap && !access(to, R_OK))
            return 0;
    return -ENOENT;
}
