/* One line to stderr (or the file of MEMSYNC_LOG_FILE) per event, at a level. Any thread. The level comes from
 * MEMSYNC_LOG. */
#ifndef BASE_LOG_H
#define BASE_LOG_H

enum log_level { LOG_OFF, LOG_ERROR, LOG_WARN, LOG_INFO, LOG_DEBUG };

void log_setup(
    const char *program); /* reads MEMSYNC_LOG and MEMSYNC_LOG_FILE; an unknown level is said and taken as warn */
void log_at(enum log_level level, const char *format, ...) __attribute__((format(printf, 2, 3)));

#define log_error(...) log_at(LOG_ERROR, __VA_ARGS__)
#define log_warn(...) log_at(LOG_WARN, __VA_ARGS__)
#define log_info(...) log_at(LOG_INFO, __VA_ARGS__)
#define log_debug(...) log_at(LOG_DEBUG, __VA_ARGS__)

#endif
