/* Lines on standard error, or appended to MEMSYNC_LOG_FILE, which is opened for each line so that no descriptor is
 * kept.
 *
 * Standard error may be anything by the time a line is due: a program that closed it and got number 2 for its database
 * must not find text of ours in there. So a plain file that is not the one of the start is written to only when it is
 * open for appending. */
#include "shim/shim.h"

#include <string.h>

enum say_level say_threshold = SAY_WARN;
char say_file[CONTROL_PATH];
static uint64_t start_dev, start_ino;

struct text {
    char *at, *end;
};

static void put(struct text *t, const char *s)
{
    while (*s && t->at < t->end)
        *t->at++ = *s++;
}

static void put_number(struct text *t, uint64_t v, unsigned base)
{
    char digits[24], *p = digits + sizeof digits - 1;
    *p = 0;
    do
        *--p = "0123456789abcdef"[v % base];
    while (v /= base);
    put(t, p);
}

static size_t format_into(char *to, size_t cap, const char *format, va_list args)
{
    struct text t = {to, to + cap - 1};
    for (; *format; format++) {
        char one[2] = {*format, 0};
        if (*format != '%') {
            put(&t, one);
            continue;
        }
        switch (*++format) {
        case 's':
            put(&t, va_arg(args, const char *));
            break;
        case 'd': {
            int v = va_arg(args, int);
            if (v < 0)
                put(&t, "-");
            put_number(&t, v < 0 ? 0 - (uint64_t)v : (uint64_t)v, 10);
            break;
        }
        case 'u':
            put_number(&t, va_arg(args, unsigned), 10);
            break;
        case 'l':
            put_number(&t, va_arg(args, uint64_t), 10);
            break;
        case 'x':
            put_number(&t, va_arg(args, uint64_t), 16);
            break;
        case 'e': {
            int e = va_arg(args, int);
            const char *words = strerrordesc_np(e < 0 ? -e : e);
            put(&t, words ? words : "unknown error");
            break;
        }
        default:
            put(&t, "%");
        }
    }
    *t.at = 0;
    return (size_t)(t.at - to);
}

size_t say_format(char *to, size_t cap, const char *format, ...)
{
    va_list args;
    va_start(args, format);
    size_t n = format_into(to, cap, format, args);
    va_end(args);
    return n;
}

void say_start(void)
{
    struct stat st;
    if (!raw_fstat(STDERR_FILENO, &st)) {
        start_dev = st.st_dev;
        start_ino = st.st_ino;
    }
}

static bool stderr_usable(void)
{
    struct stat st;
    if (raw_fstat(STDERR_FILENO, &st))
        return false;
    if (!S_ISREG(st.st_mode) || (st.st_dev == start_dev && st.st_ino == start_ino))
        return true;
    return (raw_fcntl(STDERR_FILENO, F_GETFL, 0) & O_APPEND) && !files_tracked(files_entry(STDERR_FILENO));
}

void say(enum say_level level, const char *format, ...)
{
    if (level > say_threshold)
        return;
    int saved = errno;
    char line[2048];
    size_t n = say_format(line, sizeof line, "memsync: ");
    va_list args;
    va_start(args, format);
    n += format_into(line + n, sizeof line - n - 1, format, args);
    va_end(args);
    line[n++] = '\n';
    int fd = -1;
    if (*say_file)
        fd = raw_openat(AT_FDCWD, say_file, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    if (fd >= 0) {
        syscall(SYS_write, fd, line, n);
        raw_close(fd);
    } else if (stderr_usable()) {
        syscall(SYS_write, STDERR_FILENO, line, n);
    }
    errno = saved;
}
