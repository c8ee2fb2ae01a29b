#include "agent/options.h"

#include "agent/base/identity.h"
#include "agent/base/version.h"
#include "agent/hub/hub.h"
#include "agent/nbd/store.h"
#include "agent/net/addr.h"

#include <getopt.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static const char help[] =
    "Usage: memsync-agent --listen HOST:PORT... --store URL       the remote side: keeps replicas\n"
    "       memsync-agent --socket PATH                           beside programs: replicates their files\n"
    "\n"
    "  --listen HOST:PORT   serve other agents here; port 0: any; [V6]:PORT and unix:PATH too; may be repeated\n"
    "  --nbd HOST:PORT      serve every region as a network block device here; likewise\n"
    "  --store URL          where replicas are kept:\n"
    "                         file:DIR   region NAME is the file DIR/NAME, crash-safe (journal under DIR/.memsync/)\n"
    "                         mem:       in memory only, gone with the agent\n"
    "                         hub:ADDR,ADDR...  at other agents: each of them gets a copy of all\n"
    "                         nbd://HOST:PORT/EXPORT, nbd+unix:///EXPORT?socket=PATH\n"
    "                                    exports of a block device server are the regions; it has no epochs\n"
    "  --socket PATH        serve this user's programs here (the preload library starts this one by itself)\n"
    "  --linger             leave when no program is connected and all they stored is acknowledged\n"
    "  --state DIR          identity and records; default $XDG_STATE_HOME/memsync or ~/.local/state/memsync\n"
    "  --cert-dir DIR       TLS with the certificates in DIR (memsync certs makes them): ca-cert.pem, server-cert.pem,\n"
    "                       server-key.pem for --listen; client-cert.pem, client-key.pem where this agent dials\n"
    "  --psk-file FILE      TLS with pre-shared keys, IDENTITY:HEXKEY lines (memsync keygen makes one)\n"
    "  --tls auto           TLS when there are certificates or keys; require: or not start; off: never\n"
    "  --grants FILE        who may do what: lines of IDENTITY GLOB read,write,admin; what no line grants is refused\n"
    "  --insecure           allow --listen without TLS, and --nbd, on an address that other hosts reach\n"
    "  --version, --help\n"
    "\n"
    "When ready it prints a line for each listener, such as \"listening wire 127.0.0.1:7070\". SIGTERM or SIGINT: "
    "finishes what was\n"
    "handed in, and exits 0. Exit status: 0 done, 2 usage, 3 could not be done. MEMSYNC_LOG=info says more (error, "
    "warn, info, debug, off).\n"
    "\n"
    "Example:  memsync-agent --listen 127.0.0.1:7070 --store file:/srv/replica\n";

enum { OPT_LISTEN = 1, OPT_STORE, OPT_SOCKET, OPT_LINGER, OPT_STATE, OPT_INSECURE, OPT_NBD, OPT_TLS, OPT_CERTS, OPT_PSK, OPT_GRANTS, OPT_VERSION, OPT_HELP };

static const struct option longs[] = {
    {"listen", required_argument, NULL, OPT_LISTEN}, {"store", required_argument, NULL, OPT_STORE},
    {"socket", required_argument, NULL, OPT_SOCKET}, {"linger", no_argument, NULL, OPT_LINGER},
    {"state", required_argument, NULL, OPT_STATE},   {"insecure", no_argument, NULL, OPT_INSECURE},
    {"tls", required_argument, NULL, OPT_TLS},
    {"cert-dir", required_argument, NULL, OPT_CERTS}, {"psk-file", required_argument, NULL, OPT_PSK},
    {"grants", required_argument, NULL, OPT_GRANTS},
    {"nbd", required_argument, NULL, OPT_NBD},       {"version", no_argument, NULL, OPT_VERSION},
    {"help", no_argument, NULL, OPT_HELP},           {NULL, 0, NULL, 0},
};

static int fault(int status, const char *format, ...) __attribute__((format(printf, 2, 3)));
static int fault(int status, const char *format, ...)
{
    va_list ap;
    fputs("memsync-agent: ", stderr);
    va_start(ap, format);
    vfprintf(stderr, format, ap);
    va_end(ap);
    fputs(status == 2 ? " (see memsync-agent --help)\n" : "\n", stderr);
    return status;
}

static int store_check(const char *url)
{
    static const char *const unbuilt[] = {"dir:", "s3:", "redis:"};
    char error[STORE_ERROR];
    if (!strcmp(url, "mem:") || (!strncmp(url, "file:", 5) && url[5]))
        return OPTIONS_GO;
    if (hub_is(url))
        return hub_check(url, error) ? fault(2, "--store %s", error) : OPTIONS_GO;
    if (nbd_store_is(url))
        return nbd_store_check(url, error) ? fault(2, "--store %s", error) : OPTIONS_GO;
    for (size_t i = 0; i < sizeof unbuilt / sizeof *unbuilt; i++)
        if (!strncmp(url, unbuilt[i], strlen(unbuilt[i])))
            return fault(3, "--store %s: not built; file:DIR, mem:, hub:ADDR,ADDR... and nbd://HOST:PORT/EXPORT are", url);
    return fault(2, "--store %s is not a store: file:DIR, mem:, hub:ADDR,ADDR... or nbd://HOST:PORT/EXPORT", url);
}

static bool tls_given(const struct options *o)
{
    return o->tls.cert_dir || o->tls.psk_file;
}

static int listen_check(const struct options *o, const char *option, const char *text)
{
    struct addr a;
    if (addr_parse(&a, text) < 0)
        return fault(2, "%s %s is not an address: HOST:PORT, [V6]:PORT or unix:PATH", option, text);
    if (a.tls)
        return fault(2, "%s %s: listeners take no tls: before the address; give --cert-dir or --psk-file", option, text);
    bool wire = !strcmp(option, "--listen");
    if (o->insecure || (wire && tls_given(o)) || addr_loopback(&a))
        return OPTIONS_GO;
    return fault(3,
                 wire ? "%s %s without TLS would let every host that reaches it read and write: give --cert-dir or "
                        "--psk-file, use 127.0.0.1, or allow it by --insecure"
                      : "no TLS is built for block devices: %s %s would let every host that reaches it read and write; "
                        "use 127.0.0.1, or allow it by --insecure",
                 option, text);
}

static int listeners_check(const struct options *o)
{
    int rc = OPTIONS_GO;
    if ((o->listen_n || o->nbd_n) && !o->store)
        return fault(2, "%s needs --store: where are replicas to be kept?", o->listen_n ? "--listen" : "--nbd");
    for (unsigned i = 0; i < o->listen_n && rc == OPTIONS_GO; i++)
        rc = listen_check(o, "--listen", o->listen[i]);
    for (unsigned i = 0; i < o->nbd_n && rc == OPTIONS_GO; i++)
        rc = listen_check(o, "--nbd", o->nbd[i]);
    return rc;
}

/* What the options are together. */
static int options_check(struct options *o)
{
    if (!o->listen_n && !o->nbd_n && !o->store && !o->socket)
        return fault(2, "nothing to do: give --listen and --store, or --socket");
    int rc = o->store ? store_check(o->store) : OPTIONS_GO;
    if (rc == OPTIONS_GO && o->store && !o->listen_n && !o->nbd_n && strncmp(o->store, "file:", 5))
        rc = fault(2, "--store mem:, hub: or nbd:// without --listen could be reached by nobody");
    if (rc == OPTIONS_GO && o->linger && !o->socket)
        rc = fault(2, "--linger is for an agent with --socket");
    char error[TLS_ERROR];
    if (rc == OPTIONS_GO && tls_choose(&o->tls, error))
        rc = fault(2, "%s", error);
    if (rc == OPTIONS_GO && o->grants && !o->listen_n)
        rc = fault(2, "--grants is for an agent with --listen");
    if (rc == OPTIONS_GO && o->grants && o->nbd_n)
        rc = fault(3, "--grants beside --nbd is not built: block devices know no identities, and would go around it");
    if (rc == OPTIONS_GO)
        rc = listeners_check(o);
    if (rc == OPTIONS_GO && !o->state[0] && identity_default_dir(o->state, sizeof o->state) < 0)
        rc = fault(2, "the default state directory's path is too long: give one by --state");
    return rc;
}

static int listen_take(const char **all, unsigned *n, const char *option)
{
    if (*n == OPTIONS_LISTEN)
        return fault(2, "more than %d %s", OPTIONS_LISTEN, option);
    all[(*n)++] = optarg;
    return OPTIONS_GO;
}

static int option_take(struct options *o, int opt)
{
    switch (opt) {
    case OPT_LISTEN:
        return listen_take(o->listen, &o->listen_n, "--listen");
    case OPT_NBD:
        return listen_take(o->nbd, &o->nbd_n, "--nbd");
    case OPT_STORE:
        if (o->store)
            return fault(2, "--store given twice: an agent has one store");
        o->store = optarg;
        return OPTIONS_GO;
    case OPT_SOCKET:
        o->socket = optarg;
        return OPTIONS_GO;
    case OPT_TLS:
        o->tls.mode = optarg;
        return OPTIONS_GO;
    case OPT_CERTS:
        o->tls.cert_dir = optarg;
        return OPTIONS_GO;
    case OPT_PSK:
        o->tls.psk_file = optarg;
        return OPTIONS_GO;
    case OPT_GRANTS:
        o->grants = optarg;
        return OPTIONS_GO;
    case OPT_LINGER:
        o->linger = true;
        return OPTIONS_GO;
    case OPT_STATE:
        if (!*optarg || strlen(optarg) >= sizeof o->state)
            return fault(2, "--state needs a directory");
        memcpy(o->state, optarg, strlen(optarg) + 1);
        return OPTIONS_GO;
    case OPT_INSECURE:
        o->insecure = true;
        return OPTIONS_GO;
    case OPT_VERSION:
        puts("memsync-agent " MEMSYNC_VERSION);
        return 0;
    case OPT_HELP:
        fputs(help, stdout);
        return 0;
    default: /* getopt_long has said what is wrong */
        return fault(2, "it takes no such option");
    }
}

int options_parse(struct options *o, int argc, char **argv)
{
    memset(o, 0, sizeof *o);
    for (int opt; (opt = getopt_long(argc, argv, "", longs, NULL)) != -1;) {
        int rc = option_take(o, opt);
        if (rc != OPTIONS_GO)
            return rc;
    }
    if (optind < argc)
        return fault(2, "what is %s?", argv[optind]);
    return options_check(o);
}
