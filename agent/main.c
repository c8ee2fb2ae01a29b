/* memsync-agent: starts the roles its options name, runs the loop, and ends in order.
 *
 * Ending (SIGTERM, SIGINT, `memsync stop`, nothing left to linger for) happens once, one part after the other, each
 * waiting for the one before: the local role publishes, block devices commit what was written, the server finishes the
 * epochs handed in, the store applies and syncs. Then the loop has nothing left, and main returns 0. */
#include "agent/base/identity.h"
#include "agent/base/log.h"
#include "agent/hub/hub.h"
#include "agent/nbd/nbd.h"
#include "agent/net/grants.h"
#include "agent/nbd/store.h"
#include "agent/net/server.h"
#include "agent/net/tls.h"
#include "agent/options.h"
#include "agent/store/store.h"
#include "agent/sync/local.h"

#include <malloc.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

static struct agent {
    uv_loop_t loop;
    uv_signal_t term, interrupt, hangup;
    struct tls_config *tls; /* of listeners */
    struct grants *grants;
    struct local *local;
    struct server *server;
    struct nbd *nbd;
    struct store *store;
    bool leaving;
} agent;

static void on_store_closed(void *arg)
{
    (void)arg;
    uv_close((uv_handle_t *)&agent.term, NULL);
    uv_close((uv_handle_t *)&agent.interrupt, NULL);
    uv_close((uv_handle_t *)&agent.hangup, NULL);
}

static void on_server_stopped(void *arg)
{
    if (agent.store)
        store_close(agent.store, on_store_closed, arg);
    else
        on_store_closed(arg);
}

static void on_nbd_stopped(void *arg)
{
    if (agent.server)
        server_stop(agent.server, on_server_stopped, arg);
    else
        on_server_stopped(arg);
}

static void on_local_stopped(void *arg)
{
    if (agent.nbd)
        nbd_stop(agent.nbd, on_nbd_stopped, arg);
    else
        on_nbd_stopped(arg);
}

void agent_leave(void)
{
    if (agent.leaving)
        return;
    agent.leaving = true;
    if (agent.local)
        local_stop(agent.local, on_local_stopped, NULL);
    else
        on_local_stopped(NULL);
}

static void on_signal(uv_signal_t *handle, int number)
{
    (void)handle;
    log_info("%s: finishing", strsignal(number));
    agent_leave();
}

static bool reload(struct tls_config *c)
{
    char error[TLS_ERROR];
    if (!c || !tls_config_reload(c, error))
        return true;
    log_error("what TLS shows stays as it was: %s", error);
    return false;
}

/* Certificates, keys and grants anew, for connections and requests to come. */
static void on_hangup(uv_signal_t *handle, int number)
{
    (void)handle;
    (void)number;
    char error[GRANTS_ERROR];
    log_info("reading certificates, keys and grants anew");
    if (reload(agent.tls))
        reload(tls_dial_config());
    if (agent.grants && grants_reload(agent.grants, error))
        log_error("grants stay as they were: %s", error);
}

static void process_setup(void)
{
    signal(SIGPIPE, SIG_IGN);
    setenv("UV_THREADPOOL_SIZE", "8", 0);
    struct rlimit files;
    if (!getrlimit(RLIMIT_NOFILE, &files)) {
        files.rlim_cur = files.rlim_max;
        setrlimit(RLIMIT_NOFILE, &files);
    }
    /* Payloads come and go by the megabyte: giving their pages back each time costs more than the copying. */
    mallopt(M_TRIM_THRESHOLD, 64 << 20);
    mallopt(M_MMAP_THRESHOLD, 1 << 20);
    mallopt(M_ARENA_MAX, 2); /* or each thread of the pool warms up pages of its own */
}

static void say_listening(const char *what, const char *where)
{
    printf("listening %s %s\n", what, where);
    fflush(stdout);
}

static int fail(const char *text)
{
    fprintf(stderr, "memsync-agent: %s\n", text);
    return 3;
}

static int listen_failed(const char *addr, int err)
{
    char error[4600];
    snprintf(error, sizeof error, "cannot listen on %s: %s", addr, uv_strerror(err));
    return fail(error);
}

static int listen_on(const char *addr, bool announce)
{
    char bound[4200];
    int rc = server_listen(agent.server, addr, bound, sizeof bound);
    if (rc < 0)
        return listen_failed(addr, rc);
    if (announce)
        say_listening("wire", bound);
    return 0;
}

static int start_nbd(const struct options *o, const struct id *identity, const char *host)
{
    char bound[4200];
    agent.nbd = o->nbd_n ? nbd_new(&agent.loop, agent.store, identity, host) : NULL;
    if (o->nbd_n && !agent.nbd)
        return fail("no memory");
    for (unsigned i = 0; i < o->nbd_n; i++) {
        int rc = nbd_listen(agent.nbd, o->nbd[i], bound, sizeof bound);
        if (rc < 0)
            return listen_failed(o->nbd[i], rc);
        say_listening("nbd", bound);
    }
    return 0;
}

/* What is shown and asked for, by listeners and where this agent dials. A directory may hold the files of one of the two
 * roles only. */
static int start_tls(const struct options *o)
{
    char error[TLS_ERROR], grants[GRANTS_ERROR];
    bool any = o->tls.cert_dir || o->tls.psk_file, serves = false;
    for (unsigned i = 0; i < o->listen_n; i++)
        serves = serves || strncmp(o->listen[i], "unix:", 5); /* where the file's mode decides */
    if (any && serves && !(agent.tls = tls_config_load(true, o->tls.cert_dir, o->tls.psk_file, error)))
        return fail(error);
    if (tls_dial_setup(&o->tls, error)) {
        if (!serves || o->socket || hub_is(o->store))
            return fail(error);
        log_info("this agent dials without TLS: %s", error);
    }
    if (o->grants && !(agent.grants = grants_load(o->grants, grants)))
        return fail(grants);
    return 0;
}

/* The remote role. 0 or the exit status. */
static int start_server(const struct options *o)
{
    char error[STORE_ERROR] = "", host[256] = "", wire[4200];
    struct id identity;
    gethostname(host, sizeof host - 1);
    if (identity_load(o->state, &identity, error) < 0)
        return fail(error);
    int rc = hub_is(o->store)         ? hub_open(&agent.store, &agent.loop, o->store, &identity, host, error)
             : nbd_store_is(o->store) ? nbd_store_open(&agent.store, &agent.loop, o->store, &identity, error)
                                      : store_open(&agent.store, &agent.loop, o->store, error);
    if (rc < 0)
        return fail(error);
    agent.server = server_new(&agent.loop, agent.store, &identity, host);
    if (!agent.server)
        return fail("no memory");
    server_secure(agent.server, agent.tls, agent.grants);
    for (unsigned i = 0; i < o->listen_n; i++)
        if (listen_on(o->listen[i], true))
            return 3;
    if (start_nbd(o, &identity, host))
        return 3;
    if (!store_dir(agent.store))
        return 0;
    snprintf(wire, sizeof wire, "unix:%s/.memsync/wire.sock", store_dir(agent.store));
    return listen_on(wire, false); /* for the tool on this host: found by the directory's name */
}

static int start_local(const struct options *o)
{
    char error[512] = "";
    if (local_start(&agent.local, &agent.loop, o->socket, o->linger, o->state, error) < 0)
        return fail(error);
    if (agent.store)
        local_store(agent.local, agent.store);
    say_listening("control", o->socket);
    return 0;
}

int main(int argc, char **argv)
{
    struct options o;
    int rc = options_parse(&o, argc, argv);
    if (rc != OPTIONS_GO)
        return rc;
    log_setup("memsync-agent");
    process_setup();
    if (uv_loop_init(&agent.loop) < 0)
        return fail("no event loop: the system refuses epoll or eventfd");
    uv_signal_init(&agent.loop, &agent.term);
    uv_signal_init(&agent.loop, &agent.interrupt);
    uv_signal_start(&agent.term, on_signal, SIGTERM);
    uv_signal_start(&agent.interrupt, on_signal, SIGINT);
    uv_signal_init(&agent.loop, &agent.hangup);
    uv_signal_start(&agent.hangup, on_hangup, SIGHUP);
    rc = start_tls(&o);
    if (!rc && o.store)
        rc = start_server(&o);
    if (!rc && o.socket)
        rc = start_local(&o);
    if (rc)
        return rc;
    return uv_run(&agent.loop, UV_RUN_DEFAULT) ? 3 : 0;
}
