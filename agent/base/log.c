#include "agent/base/log.h"

#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static enum log_level threshold = LOG_WARN;
static int log_fd = STDERR_FILENO;
static const char *log_program = "memsync";

void log_setup(const char *program)
{
    static const char *const names[] = {"off", "error", "warn", "info", "debug"};
    log_program = program;
    const char *file = getenv("MEMSYNC_LOG_FILE");
    if (file && *file) {
        int fd = open(file, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
        if (fd >= 0)
            log_fd = fd;
        else
            log_error("MEMSYNC_LOG_FILE=%s cannot be opened: %m; logging to stderr", file);
    }
    const char *level = getenv("MEMSYNC_LOG");
    if (!level || !*level)
        return;
    for (int i = 0; i < 5; i++)
        if (!strcmp(level, names[i])) {
            threshold = (enum log_level)i;
            return;
        }
    log_error("MEMSYNC_LOG=%s is not a level: off, error, warn, info or debug", level);
}

void log_at(enum log_level level, const char *format, ...)
{
    if (level > threshold)
        return;
    char line[1200];
    int n = snprintf(line, sizeof line - 1, "%s: ", log_program);
    va_list ap;
    va_start(ap, format);
    int m = vsnprintf(line + n, sizeof line - 1 - (size_t)n, format, ap);
    va_end(ap);
    size_t len = (size_t)(n + m) < sizeof line - 2 ? (size_t)(n + m) : sizeof line - 2;
    line[len++] = '\n';
    if (write(log_fd, line, len) < 0)
        return;
}
