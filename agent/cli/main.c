/* The table of commands, their options, and the dispatch. */
#include "agent/cli/cli.h"
#include "agent/base/log.h"
#include "agent/base/version.h"
#include "agent/net/tls.h"

#include <getopt.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const struct command commands[] = {
    {"run", "[--] PROGRAM [ARGS...]", "run a program with its matching files replicated",
     "Sets LD_PRELOAD and the MEMSYNC_ variables, then becomes PROGRAM. --region may be given more than once; rules "
     "are\n"
     "those of MEMSYNC_REGIONS, see memsync_preload(7). --explain says on stderr what matched, how it is tracked, and "
     "why not.\n",
     OPTION_REMOTE | OPTION_NEEDED | OPTION_RUN, 1, -1, command_run},
    {"status", "", "what is replicated, how far behind, what is wrong",
     "Asks this user's local agent. Exit code 1 when a region is degraded, diverged, fenced or refused.\n", OPTION_JSON,
     0, 0, command_status},
    {"doctor", "[DIRECTORY...]", "what this machine can do, and what to change for more",
     "Tries out every mechanism on a small file in each DIRECTORY (where data will live; the current one when none is "
     "given).\n"
     "Exit code 1 when the strategy `auto` would not be page-table tracking there, or when something asked for cannot "
     "be reached.\n",
     OPTION_REMOTE | OPTION_JSON, 0, -1, command_doctor},
    {"ls", "", "regions at the remote",
     "One line a region: name, size, epoch, age of the last epoch, who holds the writer's lease.\n",
     OPTION_REMOTE | OPTION_NEEDED | OPTION_JSON, 0, 0, command_ls},
    {"export", "REGION FILE", "copy a region's last epoch from the remote into a file",
     "The epoch is pinned while it is read, so the copy is exactly one epoch even while more arrive. FILE is replaced "
     "in one step at the\n"
     "end; zeros become holes.\n",
     OPTION_REMOTE | OPTION_NEEDED, 2, 2, command_export},
    {"import", "FILE REGION", "make a region at the remote from a file",
     "Takes the writer's lease for as long as it lasts; all of the file becomes the region's first epoch, or nothing "
     "of it. --force\n"
     "replaces a region that has that name.\n",
     OPTION_REMOTE | OPTION_NEEDED | OPTION_FORCE, 2, 2, command_import},
    {"verify", "REGION", "compare a file here with its region at the remote",
     "Compares the hashes of all pages. The file is the one that the local agent tracks under this name, or --file "
     "PATH. A tracked file is\n"
     "published first, and pages that differ are looked at again, after another publication. Exit code 1 when they "
     "differ.\n",
     OPTION_REMOTE | OPTION_FILE | OPTION_JSON, 1, 1, command_verify},
    {"rm", "REGION", "remove a region at the remote",
     "The content at the remote is gone for good. Refused while a writer holds its lease, except with --force.\n",
     OPTION_REMOTE | OPTION_NEEDED | OPTION_FORCE, 1, 1, command_rm},
    {"recover", "DIRECTORY", "make a stopped store's plain files exact",
     "DIRECTORY is that of --store file:DIRECTORY. Applies what its journal holds; needed only after a kill or a power "
     "cut, and only when\n"
     "the files are to be used without starting the agent.\n",
     0, 1, 1, command_recover},
    {"sync", "[REGION]", "publish now, and wait until it is durable at the remote",
     "All regions when none is named. Compares anew what is diverged.\n", 0, 0, 1, command_sync},
    {"watch", "FILE", "replicate a file of programs that the preload library cannot reach",
     "The local agent (started when there is none) finds changes by hashing, once in an interval (MEMSYNC_INTERVAL). "
     "--name NAME: the\n"
     "region's name; else the path without its leading slash.\n",
     OPTION_REMOTE | OPTION_NEEDED | OPTION_NAME, 1, 1, command_watch},
    {"stop", "", "stop the local agent once everything is at the remote",
     "Programs run on; what they store later is not replicated until an agent runs again.\n", 0, 0, 0, command_stop},
    {"attach", "REGION DEVICE", "make a region a block device of this machine",
     "DEVICE is /dev/nbdN, or auto: a free one, whose path is printed. Needs root and the kernel's nbd module. The "
     "region is at the\n"
     "remote (the local agent is started when there is none), or without one in the local agent's own store. "
     "--read-only: nothing can be\n"
     "written to it.\n",
     OPTION_REMOTE | OPTION_READ_ONLY, 2, 2, command_attach},
    {"detach", "DEVICE", "write back such a device, and let it go",
     "Also one that a killed agent has left. Refused while it is mounted, except with --force.\n", OPTION_FORCE, 1, 1,
     command_detach},
    {"keygen", "FILE", "make a pre-shared key for TLS",
     "FILE (MEMSYNC_PSK_FILE, memsync-agent --psk-file) is the same on both sides: IDENTITY:HEXKEY lines, mode 0600. "
     "--name: the\n"
     "identity, else memsync. Lines of several such files make one for a server with several peers; a client shows its "
     "first.\n",
     OPTION_NAME, 1, 1, command_keygen},
    {"certs", "DIR [HOST...]", "make certificates for TLS: an authority, a server's, a client's",
     "DIR (MEMSYNC_CERT_DIR, memsync-agent --cert-dir) gets ca-cert.pem, server-cert.pem, client-cert.pem and their "
     "keys. HOST: names\n"
     "and addresses at which clients dial the server; else this host's name, localhost, 127.0.0.1 and ::1. --name: whom "
     "the client's\n"
     "certificate is of, for grants; else client. What is there already is kept, so that more can be made under the "
     "same authority.\n",
     OPTION_NAME, 1, -1, command_certs},
};

static const char *const not_built[] = {"top", "promote", "migrate"};

static void overview(FILE *to)
{
    fprintf(to, "usage: memsync COMMAND [OPTIONS] [ARGUMENTS]\n\n");
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++)
        fprintf(to, "  %-8s %-26s %s\n", commands[i].name, commands[i].words, commands[i].summary);
    fprintf(to, "\nmemsync COMMAND --help tells more, memsync(1) all. Exit codes: 0 done, 1 the thing asked about is "
                "not so, 2 usage,\n"
                "3 could not be done.\n");
}

static void usage(FILE *to, const struct command *c)
{
    fprintf(to, "usage: memsync %s", c->name);
    unsigned o = c->options;
    if (o & OPTION_REMOTE)
        fprintf(to, " [--remote ADDRESS]");
    if (o & OPTION_RUN)
        fprintf(to, " [--region RULE]... [--strategy S] [--ack A] [--explain]");
    if (o & OPTION_FORCE)
        fprintf(to, " [--force]");
    if (o & OPTION_READ_ONLY)
        fprintf(to, " [--read-only]");
    if (o & OPTION_FILE)
        fprintf(to, " [--file PATH]");
    if (o & OPTION_NAME)
        fprintf(to, " [--name NAME]");
    if (o & OPTION_JSON)
        fprintf(to, " [--json]");
    fprintf(to, "%s%s\n", *c->words ? " " : "", c->words);
}

static void help(const struct command *c)
{
    usage(stdout, c);
    printf("\n%s.\n", c->summary);
    printf("%s", c->help);
    if (c->options & OPTION_REMOTE)
        printf("\nADDRESS: HOST:PORT, unix:PATH, file:DIRECTORY of a store here, hub:ADDRESS,ADDRESS... or nbd://HOST:PORT/EXPORT\n"
               "Without --remote it is that of MEMSYNC_REMOTE.\n");
}

enum {
    LONG_REMOTE = 256,
    LONG_JSON,
    LONG_FORCE,
    LONG_FILE,
    LONG_NAME,
    LONG_REGION,
    LONG_STRATEGY,
    LONG_ACK,
    LONG_EXPLAIN,
    LONG_READ_ONLY,
    LONG_HELP
};

static const struct {
    int value;
    unsigned allowed_by;
} allowed[] = {
    {LONG_REMOTE, OPTION_REMOTE},       {LONG_JSON, OPTION_JSON}, {LONG_FORCE, OPTION_FORCE},
    {LONG_FILE, OPTION_FILE},           {LONG_NAME, OPTION_NAME}, {LONG_REGION, OPTION_RUN},
    {LONG_STRATEGY, OPTION_RUN},        {LONG_ACK, OPTION_RUN},   {LONG_EXPLAIN, OPTION_RUN},
    {LONG_READ_ONLY, OPTION_READ_ONLY},
};

static bool option_allowed(const struct command *c, int value)
{
    for (size_t i = 0; i < sizeof allowed / sizeof *allowed; i++)
        if (allowed[i].value == value)
            return c->options & allowed[i].allowed_by;
    return false;
}

static void take_option(struct args *a, int value)
{
    switch (value) {
    case LONG_REMOTE:
        a->remote = optarg;
        break;
    case LONG_JSON:
        a->json = true;
        break;
    case LONG_FORCE:
        a->force = true;
        break;
    case LONG_FILE:
        a->file = optarg;
        break;
    case LONG_NAME:
        a->name = optarg;
        break;
    case LONG_REGION:
        if (a->regions < ARGS_REGIONS)
            a->region[a->regions] = optarg;
        a->regions++;
        break;
    case LONG_STRATEGY:
        a->strategy = optarg;
        break;
    case LONG_ACK:
        a->ack = optarg;
        break;
    case LONG_READ_ONLY:
        a->read_only = true;
        break;
    case LONG_EXPLAIN:
        a->explain = true;
        break;
    }
}

/* -1: go on and run the command; else the exit code. */
static int parse(const struct command *c, int argc, char **argv, struct args *a)
{
    static const struct option options[] = {
        {"remote", required_argument, NULL, LONG_REMOTE},
        {"json", no_argument, NULL, LONG_JSON},
        {"force", no_argument, NULL, LONG_FORCE},
        {"file", required_argument, NULL, LONG_FILE},
        {"name", required_argument, NULL, LONG_NAME},
        {"region", required_argument, NULL, LONG_REGION},
        {"strategy", required_argument, NULL, LONG_STRATEGY},
        {"ack", required_argument, NULL, LONG_ACK},
        {"explain", no_argument, NULL, LONG_EXPLAIN},
        {"read-only", no_argument, NULL, LONG_READ_ONLY},
        {"help", no_argument, NULL, LONG_HELP},
        {NULL, 0, NULL, 0},
    };
    opterr = 0;
    for (;;) {
        int value = getopt_long(argc, argv, c->options & OPTION_RUN ? "+:h" : ":h", options, NULL);
        if (value == -1)
            break;
        if (value == LONG_HELP || value == 'h') {
            help(c);
            return CLI_DONE;
        }
        if (value == ':')
            return cli_fail(CLI_USAGE, "%s needs a value; see memsync %s --help", argv[optind - 1], c->name);
        if (value == '?' || !option_allowed(c, value))
            return cli_fail(CLI_USAGE, "it has no option %s; see memsync %s --help", argv[optind - 1], c->name);
        take_option(a, value);
    }
    a->count = argc - optind;
    a->words = argv + optind;
    if (a->regions > ARGS_REGIONS)
        return cli_fail(CLI_USAGE, "more than %u rules; put several into one --region, separated by \";\"",
                        ARGS_REGIONS);
    if (a->count < c->min || (c->max >= 0 && a->count > c->max)) {
        usage(stderr, c);
        return CLI_USAGE;
    }
    const char *remote = getenv("MEMSYNC_REMOTE");
    if (!a->remote && remote && *remote)
        a->remote = remote;
    if (!a->remote && c->options & OPTION_NEEDED)
        return cli_fail(CLI_USAGE, "no remote: give --remote ADDRESS or set MEMSYNC_REMOTE");
    return -1;
}

static int dispatch(const char *name, int argc, char **argv)
{
    cli_command = name;
    for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
        if (strcmp(name, commands[i].name))
            continue;
        struct args a = {0};
        int code = parse(&commands[i], argc, argv, &a);
        return code >= 0 ? code : commands[i].run(&a);
    }
    for (size_t i = 0; i < sizeof not_built / sizeof *not_built; i++)
        if (!strcmp(name, not_built[i]))
            return cli_fail(CLI_FAILED, "not built; memsync --help lists what is");
    cli_command = NULL;
    cli_fail(CLI_USAGE, "there is no command \"%s\"; these there are:", name);
    overview(stderr);
    return CLI_USAGE;
}

int main(int argc, char **argv)
{
    char error[TLS_ERROR];
    struct tls_choice tls = {0};
    log_setup("memsync");
    if (argc < 2) {
        overview(stderr);
        return CLI_USAGE;
    }
    if (!strcmp(argv[1], "--help") || !strcmp(argv[1], "-h") || !strcmp(argv[1], "help")) {
        overview(stdout);
        return CLI_DONE;
    }
    if (!strcmp(argv[1], "--version")) {
        puts("memsync " MEMSYNC_VERSION);
        return CLI_DONE;
    }
    bool local = !strcmp(argv[1], "keygen") || !strcmp(argv[1], "certs") || !strcmp(argv[1], "run");
    if (!local && (tls_choose(&tls, error) || tls_dial_setup(&tls, error))) {
        cli_command = argv[1];
        return cli_fail(CLI_FAILED, "%s", error);
    }
    int code = dispatch(argv[1], argc - 1, argv + 1);
    if (fflush(stdout) || ferror(stdout))
        return cli_fail(CLI_FAILED, "its output cannot be written: %m");
    return code;
}
