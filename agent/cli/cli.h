/* memsync, the command-line tool: what its commands share.
 *
 * One thread, blocking calls: unlike the agent it does one thing at a time. Whatever goes wrong is said once, by
 * cli_fail, on stderr, and becomes the exit code; results go to stdout. */
#ifndef CLI_CLI_H
#define CLI_CLI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum { CLI_DONE, CLI_NOT_SO, CLI_USAGE, CLI_FAILED }; /* exit codes */

enum {
    OPTION_REMOTE = 1 << 0,
    OPTION_JSON = 1 << 1,
    OPTION_FORCE = 1 << 2,
    OPTION_FILE = 1 << 3,
    OPTION_NAME = 1 << 4,
    OPTION_RUN = 1 << 5, /* --region --strategy --ack --explain; the program's own arguments begin at the first word */
    OPTION_READ_ONLY = 1 << 7,
    OPTION_NEEDED = 1 << 6, /* the remote: by option or by variable */
};

#define ARGS_REGIONS 64u

struct args {
    const char *remote; /* --remote, else MEMSYNC_REMOTE, else NULL */
    bool json, force, explain, read_only;
    const char *file, *name, *strategy, *ack;
    const char *region[ARGS_REGIONS];
    unsigned regions;
    int count;    /* words that are not options */
    char **words; /* NULL-terminated */
};

struct command {
    const char *name, *words, *summary, *help;
    unsigned options;
    int min, max; /* words; max -1: any number */
    int (*run)(const struct args *a);
};

extern const char *cli_command; /* for messages */

/* "memsync COMMAND: ..." and a newline on stderr; returns code. */
int cli_fail(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* The same without a code, for what is no failure of the command. */
void cli_say(const char *format, ...) __attribute__((format(printf, 1, 2)));
/* "4.0 KiB", "12 B" */
const char *cli_bytes(uint64_t n, char text[32]);
/* "12s", "3m", "2h", "5d" */
const char *cli_seconds(double s, char text[32]);
/* The directory that this program is in, without its slash at the end. 0 or a negative errno. */
int cli_directory(char *to, size_t cap);
/* Our own part `name` in the build directory or the installed tree: beside this program, in ../lib, else under the
 * prefix. 0 or -ENOENT. */
int cli_part(const char *name, char *to, size_t cap);

/* A line on a terminal that is written over: "export data/db: 37% of 1.0 GiB, 412 MiB/s". Nothing when stderr is no
 * terminal. */
struct progress {
    const char *what;
    uint64_t total, done;
    int64_t started, shown; /* ms */
    bool on, drawn;
};
void progress_start(struct progress *p, const char *what, uint64_t total);
void progress_at(struct progress *p, uint64_t done);
void progress_end(struct progress *p);
int64_t cli_now(void); /* monotonic ms */

int command_run(const struct args *a);
int command_status(const struct args *a);
int command_doctor(const struct args *a);
int command_ls(const struct args *a);
int command_export(const struct args *a);
int command_import(const struct args *a);
int command_verify(const struct args *a);
int command_rm(const struct args *a);
int command_recover(const struct args *a);
int command_sync(const struct args *a);
int command_watch(const struct args *a);
int command_keygen(const struct args *a);
int command_certs(const struct args *a);
int command_stop(const struct args *a);
int command_attach(const struct args *a);
int command_detach(const struct args *a);

#endif
