/* The command line of memsync-agent. */
#ifndef AGENT_OPTIONS_H
#define AGENT_OPTIONS_H

#include "agent/net/tls.h"

#include <stdbool.h>

#define OPTIONS_LISTEN 16

struct options {
    const char *listen[OPTIONS_LISTEN], *nbd[OPTIONS_LISTEN];
    unsigned listen_n, nbd_n;
    const char *store, *socket; /* NULL: not given */
    char state[4096];
    bool linger, insecure;
    struct tls_choice tls;
    const char *grants;
};

#define OPTIONS_GO (-1)
/* OPTIONS_GO, or the exit status to leave with: 0 after --help or --version, 2 usage, 3 not built here; what was wrong
 * has been said. */
int options_parse(struct options *o, int argc, char **argv);

#endif
