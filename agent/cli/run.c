/* memsync run: the variables, then the program. */
#include "agent/cli/cli.h"
#include "shim/rules.h"

#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* Where execvp will find it: "" when it will not. */
static void find_program(const char *name, char to[PATH_MAX])
{
    to[0] = 0;
    if (strchr(name, '/')) {
        snprintf(to, PATH_MAX, "%s", name);
        return;
    }
    const char *path = getenv("PATH");
    for (const char *at = path ? path : "/usr/local/bin:/usr/bin:/bin"; at;) {
        size_t n = strcspn(at, ":");
        if (snprintf(to, PATH_MAX, "%.*s/%s", n ? (int)n : 1, n ? at : ".", name) < PATH_MAX && !access(to, X_OK))
            return;
        at = at[n] ? at + n + 1 : NULL;
    }
    to[0] = 0;
}

/* An ELF program without an interpreter is static: nothing can be preloaded into it. */
static bool is_static(int fd)
{
    Elf64_Ehdr e;
    if (pread(fd, &e, sizeof e, 0) != (ssize_t)sizeof e || memcmp(e.e_ident, ELFMAG, SELFMAG) ||
        e.e_ident[EI_CLASS] != ELFCLASS64)
        return false;
    for (unsigned i = 0; i < e.e_phnum; i++) {
        Elf64_Phdr h;
        if (pread(fd, &h, sizeof h, (off_t)(e.e_phoff + i * sizeof h)) != (ssize_t)sizeof h || h.p_type == PT_INTERP)
            return false;
    }
    return e.e_phnum > 0;
}

/* What will silently not work is said before the program starts; it runs all the same. */
static void warn_unreachable(const char *name)
{
    char path[PATH_MAX];
    find_program(name, path);
    int fd = *path ? open(path, O_RDONLY | O_CLOEXEC) : -1;
    struct stat st;
    if (fd < 0)
        return;
    if (is_static(fd))
        cli_say("%s is statically linked: nothing can be preloaded into it, so its files are not replicated; memsync "
                "watch FILE can do it",
                path);
    else if (!fstat(fd, &st) && (st.st_mode & (S_ISUID | S_ISGID)) && getuid())
        cli_say("%s is setuid or setgid: the preload library is ignored in it, so its files are not replicated; "
                "memsync watch FILE can do it",
                path);
    close(fd);
}

static int check_strategy(const char *strategy)
{
    enum rule_strategy s;
    if (rules_strategy(strategy, &s))
        return cli_fail(CLI_USAGE, "--strategy %s is none; these are: " RULES_BUILT, strategy);
    if (!rules_built(s))
        return cli_fail(CLI_FAILED, "--strategy %s is not built; these are: " RULES_BUILT, strategy);
    return 0;
}

/* Joins the rules into one text and looks whether it can be understood, as the program would only go on without them.
 */
static int set_regions(const struct args *a)
{
    static char text[RULES_TEXT];
    size_t at = 0;
    for (unsigned i = 0; i < a->regions; i++) {
        int n = snprintf(text + at, sizeof text - at, "%s%s", i ? ";" : "", a->region[i]);
        if (n < 0 || (size_t)n >= sizeof text - at)
            return cli_fail(CLI_USAGE, "the rules are longer than %u bytes together", RULES_TEXT);
        at += (size_t)n;
    }
    static struct rules rules;
    struct rules_defaults d = {.strategy = RULE_AUTO, .interval_ms = 1000};
    char error[RULES_ERROR];
    if (rules_parse(&rules, text, &d, error))
        return cli_fail(CLI_USAGE, "--region: %s", error);
    return setenv("MEMSYNC_REGIONS", text, 1) ? cli_fail(CLI_FAILED, "MEMSYNC_REGIONS cannot be set: %m") : 0;
}

static int set_preload(void)
{
    char library[PATH_MAX], real[PATH_MAX];
    if (cli_part("libmemsync_preload.so", library, sizeof library) || !realpath(library, real))
        return cli_fail(CLI_FAILED, "libmemsync_preload.so is neither beside this program nor in " MEMSYNC_PREFIX
                                    "/lib; build it with make, or install it with make install");
    if (strpbrk(real, ": \t"))
        return cli_fail(CLI_FAILED,
                        "LD_PRELOAD cannot name %s, as there is a blank or a colon in it; move or install it elsewhere",
                        real);
    const char *before = getenv("LD_PRELOAD");
    char *value;
    if (asprintf(&value, "%s%s%s", real, before && *before ? ":" : "", before ? before : "") < 0)
        return cli_fail(CLI_FAILED, "no memory");
    int rc = setenv("LD_PRELOAD", value, 1);
    free(value);
    return rc ? cli_fail(CLI_FAILED, "LD_PRELOAD cannot be set: %m") : 0;
}

int command_run(const struct args *a)
{
    int code = 0;
    uint8_t ack;
    if (a->strategy && (code = check_strategy(a->strategy)))
        return code;
    if (a->ack && rules_ack(a->ack, &ack))
        return cli_fail(CLI_USAGE, "--ack %s is none; these are: durable, received, async", a->ack);
    if (a->regions && (code = set_regions(a)))
        return code;
    const char *regions = getenv("MEMSYNC_REGIONS");
    if (!regions || !*regions)
        cli_say("no file will be replicated: give --region RULE or set MEMSYNC_REGIONS");
    if ((code = set_preload()))
        return code;
    const char *const variables[][2] = {{"MEMSYNC_REMOTE", a->remote},
                                        {"MEMSYNC_STRATEGY", a->strategy},
                                        {"MEMSYNC_ACK", a->ack},
                                        {"MEMSYNC_LOG", a->explain ? "info" : NULL}};
    for (size_t i = 0; i < sizeof variables / sizeof *variables; i++)
        if (variables[i][1] && setenv(variables[i][0], variables[i][1], 1))
            return cli_fail(CLI_FAILED, "%s cannot be set: %m", variables[i][0]);
    warn_unreachable(a->words[0]);
    execvp(a->words[0], a->words);
    return cli_fail(CLI_FAILED, "%s cannot be run: %m", a->words[0]);
}
