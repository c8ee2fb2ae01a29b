/* The start: symbols, variables, rules; nothing more for a program that no rule concerns. And the lock. */
#include "shim/calls.h"
#include "shim/real.h"

#include <dlfcn.h>
#include <fnmatch.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/utsname.h>

bool shim_on;
pid_t shim_pid;
uint64_t shim_page = 4096;
struct shim_settings shim;
struct real real;

/* ---- the lock: 0 free, 1 held, 2 held and waited for */

static uint32_t lock_word;
static __thread bool lock_inside __attribute__((tls_model("initial-exec")));

struct held shim_lock(void)
{
    struct held h = {.error = errno, .inside = lock_inside};
    if (h.inside)
        return h;
    uint64_t all = ~0ULL;
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &all, &h.mask, 8);
    uint32_t seen = 0;
    if (!__atomic_compare_exchange_n(&lock_word, &seen, 1, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) {
        while (__atomic_exchange_n(&lock_word, 2, __ATOMIC_ACQUIRE))
            raw_futex_wait(&lock_word, 2, 1000);
    }
    lock_inside = true;
    return h;
}

const void *shim_lock_flag(void)
{
    return &lock_inside;
}

void shim_unlock(const struct held *h)
{
    if (!h->inside) {
        lock_inside = false;
        if (__atomic_exchange_n(&lock_word, 0, __ATOMIC_RELEASE) == 2)
            raw_futex_wake(&lock_word);
        syscall(SYS_rt_sigprocmask, SIG_SETMASK, &h->mask, NULL, 8);
    }
    errno = h->error;
}

/* ---- variables */

static const char *variable(const char *name)
{
    const char *value = getenv(name);
    return value && *value ? value : NULL;
}

static bool wrong(const char *name, const char *value, const char *why)
{
    say(SAY_ERROR, "%s=%s: %s; nothing is tracked", name, value, why);
    return false;
}

static bool read_log(void)
{
    static const char *const levels[] = {"off", "error", "warn", "info", "debug"};
    const char *value = variable("MEMSYNC_LOG");
    const char *file = variable("MEMSYNC_LOG_FILE");
    if (file && strlen(file) < sizeof say_file)
        strcpy(say_file, file); /* programs overwrite their environment */
    for (int i = 0; value && i < 5; i++)
        if (!strcmp(value, levels[i])) {
            say_threshold = (enum say_level)i;
            return true;
        }
    return !value || wrong("MEMSYNC_LOG", value, "not a level; off, error, warn, info and debug are");
}

static bool read_time(const char *name, uint64_t *ms, uint64_t otherwise, bool off, bool forever)
{
    const char *value = variable(name);
    *ms = otherwise;
    if (!value)
        return true;
    if (rules_time(value, ms))
        return wrong(name, value, "not a time; 10s, 250ms, 2m, 1h and a number of seconds are");
    if ((*ms == 0 && !off) || (*ms == UINT64_MAX && !forever))
        return wrong(name, value,
                     off       ? "not a time or off"
                     : forever ? "not a time or forever"
                               : "a time above 0 is needed");
    return true;
}

static bool read_remote(void)
{
    const char *value = variable("MEMSYNC_REMOTE");
    static const char *const later[] = {"mem:", "dir:", "s3:", "redis:", "nbds:"};
    if (!value) {
        say(SAY_WARN,
            "MEMSYNC_REGIONS is set but MEMSYNC_REMOTE is not: nothing is tracked; set it to host:port, file:DIR, hub:ADDR,ADDR... or nbd://HOST:PORT/EXPORT");
        return false;
    }
    for (size_t i = 0; i < sizeof later / sizeof *later; i++)
        if (!strncmp(value, later[i], strlen(later[i])))
            return wrong("MEMSYNC_REMOTE", value,
                         "as a store of the local agent this is not built; host:port, file:DIR, hub:ADDR,ADDR... and nbd://HOST:PORT/EXPORT are");
    if (strlen(value) >= sizeof shim.remote)
        return wrong("MEMSYNC_REMOTE", value, "longer than 1023 bytes");
    if (!strchr(value, ':'))
        return wrong("MEMSYNC_REMOTE", value, "neither host:port nor file:DIR nor hub:ADDR,ADDR... nor nbd://HOST:PORT/EXPORT");
    strcpy(shim.remote, value);
    return true;
}

static bool read_choices(void)
{
    const char *value = variable("MEMSYNC_STRATEGY");
    shim.defaults = (struct rules_defaults){.strategy = RULE_AUTO, .ack = CONTROL_ACK_DURABLE, .interval_ms = 1000};
    if (value && rules_strategy(value, &shim.defaults.strategy))
        return wrong("MEMSYNC_STRATEGY", value, "unknown; " RULES_BUILT " are possible");
    if (!rules_built(shim.defaults.strategy))
        return wrong("MEMSYNC_STRATEGY", value, "not built; " RULES_BUILT " are");
    value = variable("MEMSYNC_ACK");
    if (value && rules_ack(value, &shim.defaults.ack))
        return wrong("MEMSYNC_ACK", value, "unknown; durable, received and async are possible");
    value = variable("MEMSYNC_ON_LOSS");
    static const char *const losses[] = {"continue", "block", "fail"};
    shim.loss = CONTROL_LOSS_CONTINUE;
    for (uint8_t i = 0; value && i < 3; i++)
        if (!strcmp(value, losses[i])) {
            shim.loss = i;
            value = NULL;
        }
    return !value || wrong("MEMSYNC_ON_LOSS", value, "unknown; continue, block and fail are possible");
}

/* "tls:" before every host: the agent, which may be another program's and have been started without, never dials those
 * in the clear. */
static bool want_tls(void)
{
    char out[sizeof shim.remote];
    const char *from = shim.remote;
    size_t n = 0;
    if (!strncmp(from, "file:", 5))
        return true;
    bool hub = !strncmp(from, "hub:", 4);
    for (bool begins = true; *from; from++) {
        if (hub && from == shim.remote) {
            memcpy(out, "hub:", 4);
            n = 4;
            from += 4;
        }
        if (begins && strncmp(from, "unix:", 5) && strncmp(from, "tls:", 4)) {
            if (n + 4 >= sizeof out)
                return wrong("MEMSYNC_REMOTE", shim.remote, "longer than 1023 bytes");
            memcpy(out + n, "tls:", 4);
            n += 4;
        }
        begins = hub && *from == ',';
        if (n + 1 >= sizeof out)
            return wrong("MEMSYNC_REMOTE", shim.remote, "longer than 1023 bytes");
        out[n++] = *from;
    }
    out[n] = 0;
    strcpy(shim.remote, out);
    return true;
}

/* The files are the agent's to read, which the shim starts with this environment, and in another directory. */
static bool read_tls(void)
{
    static const char *const names[] = {"MEMSYNC_PSK_FILE", "MEMSYNC_CERT_DIR"};
    const char *mode = variable("MEMSYNC_TLS");
    bool wanted = mode && !strcmp(mode, "require");
    if (mode && !wanted && strcmp(mode, "auto") && strcmp(mode, "off"))
        return wrong("MEMSYNC_TLS", mode, "unknown; auto, require and off are possible");
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        const char *value = variable(names[i]);
        if (value && *value != '/')
            return wrong(names[i], value, "not an absolute path");
        wanted = wanted || value;
    }
    return !wanted || (mode && !strcmp(mode, "off")) || want_tls();
}

static bool read_socket(void)
{
    char path[CONTROL_PATH];
    const char *agent = variable("MEMSYNC_AGENT");
    if (control_socket_path(path, sizeof path, agent, getenv("XDG_RUNTIME_DIR"), (unsigned)geteuid()) ||
        strlen(path) >= sizeof shim.socket)
        return wrong(agent ? "MEMSYNC_AGENT" : "XDG_RUNTIME_DIR", agent ? agent : getenv("XDG_RUNTIME_DIR"),
                     "the socket's path is longer than 107 bytes");
    if (path[0] != '/')
        return wrong("MEMSYNC_AGENT", path, "neither auto nor an absolute path");
    strcpy(shim.socket, path);
    return true;
}

static void drop_unbuilt_rules(void)
{
    for (unsigned i = 0; i < shim.rules.count; i++) {
        struct rule *r = &shim.rules.rule[i];
        if (r->mode == RULE_NONE || !r->not_built)
            continue;
        say(SAY_ERROR, "MEMSYNC_REGIONS: %s: %s is not built; the files it matches are left alone", r->glob,
            r->not_built);
        r->mode = RULE_NONE;
    }
}

static bool program_chosen(void)
{
    char path[CONTROL_PATH] = "";
    ssize_t n = raw_readlink(AT_FDCWD, "/proc/self/exe", path, sizeof path - 1);
    if (n < 0)
        n = 0;
    path[n] = 0;
    const char *base = strrchr(path, '/') ? strrchr(path, '/') + 1 : program_invocation_short_name;
    say_format(shim.program, sizeof shim.program, "%s", base);
    const char *list = variable("MEMSYNC_PROGRAMS");
    if (!list)
        return true;
    while (*list) {
        char glob[CONTROL_PATH];
        size_t len = strcspn(list, ";:,");
        if (len && len < sizeof glob) {
            memcpy(glob, list, len);
            glob[len] = 0;
            if (!fnmatch(glob, path, FNM_PATHNAME) || !fnmatch(glob, base, FNM_PATHNAME))
                return true;
        }
        list += len + (list[len] != 0);
    }
    return false;
}

static bool read_rules(void)
{
    char error[RULES_ERROR];
    const char *value = variable("MEMSYNC_REGIONS");
    if (!value) {
        say(variable("MEMSYNC_REMOTE") ? SAY_WARN : SAY_INFO, "MEMSYNC_REGIONS is not set: nothing is tracked");
        return false;
    }
    if (!read_remote() || !read_tls() || !read_choices() || !read_socket() ||
        !read_time("MEMSYNC_TIMEOUT", &shim.timeout_ms, 10000, false, true) ||
        !read_time("MEMSYNC_INTERVAL", &shim.defaults.interval_ms, 1000, true, false) ||
        !read_time("MEMSYNC_FETCH_TIMEOUT", &shim.fetch_timeout_ms, UINT64_MAX, false, true))
        return false;
    if (rules_parse(&shim.rules, value, &shim.defaults, error)) {
        say(SAY_ERROR, "MEMSYNC_REGIONS: %s; nothing is tracked", error);
        return false;
    }
    drop_unbuilt_rules();
    for (unsigned i = 0; i < shim.rules.count; i++)
        view_pulls |= shim.rules.rule[i].mode == RULE_PULL || shim.rules.rule[i].mode == RULE_MIRROR;
    return shim.rules.count > 0;
}

static void resolve_symbols(void)
{
#define RESOLVE(name) real.name = (__typeof__(real.name))dlsym(RTLD_NEXT, #name);
    REAL_FUNCTIONS(RESOLVE)
#undef RESOLVE
}

__attribute__((constructor)) static void begin(void)
{
    int saved = errno;
    resolve_symbols();
    say_start();
    shim_pid = raw_getpid();
    shim_page = getauxval(AT_PAGESZ);
    struct utsname host;
    if (!uname(&host))
        say_format(shim.host, sizeof shim.host, "%s", host.nodename);
    if (program_chosen() && read_log() && read_rules()) {
        start_prepare();
        fork_install();
        __atomic_store_n(&shim_on, true, __ATOMIC_SEQ_CST);
        files_inherited();
        streams_inherited();
        const char *hooks = variable("MEMSYNC_HOOKS");
        if (hooks)
            calls_install(hooks);
    }
    errno = saved;
}
