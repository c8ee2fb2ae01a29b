#include "agent/cli/local.h"
#include "agent/cli/cli.h"
#include "agent/net/addr.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <spawn.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define HELLO_MS 10000
#define STATUS_MS 20000
#define START_MS 5000
#define ENDING_MS 5000 /* between closing its connections and its end */
#define STATUS_MAX (64u << 20)

static int receive(struct local_agent *l, uint8_t *to, size_t cap, int timeout_ms, size_t *len)
{
    struct pollfd p = {.fd = l->fd, .events = POLLIN};
    int n;
    while ((n = poll(&p, 1, timeout_ms)) < 0 && errno == EINTR)
        ;
    if (n == 0)
        return -ETIMEDOUT;
    ssize_t got = n < 0 ? -1 : recv(l->fd, to, cap, MSG_DONTWAIT);
    if (got < 0)
        return -errno;
    *len = (size_t)got;
    return got ? 0 : -ECONNRESET;
}

static int lost(const struct local_agent *l, int err)
{
    if (err == -ECONNRESET || err == -EPIPE)
        cli_say("the agent on %s ended before it answered; memsync status tells whether another one runs", l->socket);
    else
        cli_say("the agent on %s does not answer: %s", l->socket, strerror(-err));
    return err;
}

int local_send(struct local_agent *l, const void *message, size_t len)
{
    if (!len) {
        cli_say("the request is too long");
        return -EMSGSIZE;
    }
    ssize_t n;
    while ((n = send(l->fd, message, len, MSG_NOSIGNAL)) < 0 && errno == EINTR)
        ;
    return n < 0 ? lost(l, -errno) : 0;
}

/* The next answer to us: notices are for programs' terminals, and ours too. */
static int next(struct local_agent *l, uint8_t *message, size_t *len, int timeout_ms)
{
    for (;;) {
        int rc = receive(l, message, CONTROL_MAX, timeout_ms, len);
        if (rc)
            return rc;
        if (control_type_of(message, *len) != CONTROL_NOTICE)
            return 0;
        static struct control_text t;
        if (!control_text_get(message, *len, &t))
            cli_say("%s", t.text);
    }
}

/* -ECONNRESET, unsaid: it closed before it answered, as one does that is about to end. */
static int hello(struct local_agent *l)
{
    uint8_t message[CONTROL_MAX];
    struct control_hello h = {.version = CONTROL_VERSION, .tool = 1, .pid = (uint32_t)getpid(), .program = "memsync"};
    if (send(l->fd, message, control_hello_put(message, sizeof message, &h), MSG_NOSIGNAL) < 0)
        return errno == EPIPE || errno == ECONNRESET ? -ECONNRESET : lost(l, -errno);
    int rc;
    size_t len;
    rc = next(l, message, &len, HELLO_MS);
    if (rc)
        return rc == -ECONNRESET ? rc : lost(l, rc);
    static struct control_text t;
    struct control_welcome w;
    if (control_type_of(message, len) == CONTROL_REFUSED && !control_text_get(message, len, &t)) {
        cli_say("the agent on %s refuses: %s", l->socket, t.text);
        return -EACCES;
    }
    if (control_type_of(message, len) != CONTROL_WELCOME || control_welcome_get(message, len, &w))
        return lost(l, -EPROTO);
    l->pid = w.pid;
    return 0;
}

static int connect_once(struct local_agent *l)
{
    struct sockaddr_un to;
    int dir, rc = addr_unix(l->socket, &to, &dir);
    if (!rc) {
        l->fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
        rc = l->fd < 0 || connect(l->fd, (struct sockaddr *)&to, sizeof to) ? -errno : 0;
        if (dir >= 0)
            close(dir);
    }
    if (!rc)
        rc = hello(l);
    else if (rc == -ENOENT || rc == -ECONNREFUSED || rc == -ENOTDIR)
        rc = -ENOENT;
    else
        cli_say("%s cannot be connected to: %s; MEMSYNC_AGENT says where the agent's socket is", l->socket,
                strerror(-rc));
    if (rc)
        local_close(l);
    return rc;
}

int local_connect(struct local_agent *l)
{
    *l = (struct local_agent){.fd = -1};
    if (control_socket_path(l->socket, sizeof l->socket, getenv("MEMSYNC_AGENT"), getenv("XDG_RUNTIME_DIR"),
                            geteuid())) {
        cli_say("the path of the agent's socket is too long; set MEMSYNC_AGENT to a shorter one");
        return -ENAMETOOLONG;
    }
    int rc;
    int64_t until = cli_now() + ENDING_MS;
    while ((rc = connect_once(l)) == -ECONNRESET && cli_now() < until)
        poll(NULL, 0, 20);
    return rc == -ECONNRESET ? lost(l, rc) : rc;
}

void local_close(struct local_agent *l)
{
    if (l->fd >= 0)
        close(l->fd);
    l->fd = -1;
}

/* In a session of its own, with nothing of ours but /dev/null: it outlives us. */
static int start(const char *socket)
{
    char program[4096];
    if (cli_part("memsync-agent", program, sizeof program)) {
        cli_say("memsync-agent is neither beside this program nor in " MEMSYNC_PREFIX "/bin; build or install it");
        return -ENOENT;
    }
    char *argv[] = {(char *)"memsync-agent", (char *)"--socket", (char *)socket, (char *)"--linger", NULL};
    posix_spawn_file_actions_t files;
    posix_spawnattr_t attr;
    posix_spawn_file_actions_init(&files);
    posix_spawn_file_actions_addopen(&files, 0, "/dev/null", O_RDWR, 0);
    posix_spawn_file_actions_adddup2(&files, 0, 1);
    posix_spawn_file_actions_adddup2(&files, 0, 2);
    posix_spawn_file_actions_addclosefrom_np(&files, 3);
    posix_spawn_file_actions_addchdir_np(&files, "/");
    unsetenv("LD_PRELOAD"); /* an agent must not track itself */
    posix_spawnattr_init(&attr);
    posix_spawnattr_setflags(&attr, POSIX_SPAWN_SETSID);
    pid_t pid;
    extern char **environ;
    int rc = posix_spawn(&pid, program, &files, &attr, argv, environ);
    posix_spawn_file_actions_destroy(&files);
    posix_spawnattr_destroy(&attr);
    if (rc)
        cli_say("%s cannot be started: %s", program, strerror(rc));
    return -rc;
}

int local_connect_or_start(struct local_agent *l)
{
    int rc = local_connect(l);
    if (rc != -ENOENT)
        return rc;
    char socket[sizeof l->socket];
    memcpy(socket, l->socket, sizeof socket);
    rc = start(socket);
    if (rc)
        return rc;
    for (int64_t until = cli_now() + START_MS; cli_now() < until; poll(NULL, 0, 20)) {
        rc = local_connect(l);
        if (rc != -ENOENT)
            return rc;
    }
    cli_say("memsync-agent was started and does not answer on %s; run it by hand to see why: memsync-agent --socket %s",
            socket, socket);
    return -ETIMEDOUT;
}

int local_result(struct local_agent *l, struct control_text *r, int timeout_ms)
{
    uint8_t message[CONTROL_MAX];
    size_t len;
    int rc = next(l, message, &len, timeout_ms);
    if (rc == -ETIMEDOUT)
        return rc;
    if (!rc && (control_type_of(message, len) != CONTROL_RESULT || control_text_get(message, len, r)))
        rc = -EPROTO;
    return rc ? lost(l, rc) : 0;
}

/* The TEXT messages put together; an empty one is the last. */
static int texts(struct local_agent *l, char **out, size_t *out_len)
{
    char *all = NULL;
    size_t have = 0, len;
    int rc;
    for (;;) {
        uint8_t message[CONTROL_MAX];
        static struct control_text t;
        rc = next(l, message, &len, STATUS_MS);
        if (!rc && (control_type_of(message, len) != CONTROL_TEXT || control_text_get(message, len, &t)))
            rc = -EPROTO;
        size_t n = rc ? 0 : strlen(t.text);
        if (rc || !n)
            break;
        char *more = have + n <= STATUS_MAX ? realloc(all, have + n) : NULL;
        if (!more) {
            rc = -ENOMEM;
            break;
        }
        all = more;
        memcpy(all + have, t.text, n);
        have += n;
    }
    *out = all;
    *out_len = have;
    return rc;
}

json_t *local_status(struct local_agent *l)
{
    uint8_t message[CONTROL_MAX];
    if (local_send(l, message, control_empty_put(message, sizeof message, CONTROL_STATUS)))
        return NULL;
    char *text;
    size_t len;
    json_t *status = NULL;
    int rc = texts(l, &text, &len);
    if (rc) {
        lost(l, rc);
    } else {
        json_error_t error;
        status = json_loadb(text ? text : "", len, 0, &error);
        for (size_t i = 0; !status && i < len; i++) /* a path may be any bytes, JSON is UTF-8 */
            if (text[i] & 0x80)
                text[i] = '?';
        if (!status)
            status = json_loadb(text ? text : "", len, 0, &error);
        if (!json_is_object(status)) {
            cli_say("the agent on %s answers with what is no status: %s", l->socket, error.text);
            json_decref(status);
            status = NULL;
        }
    }
    free(text);
    return status;
}

int local_ended(struct local_agent *l)
{
    uint8_t message[CONTROL_MAX];
    static struct control_text r;
    size_t len;
    int rc;
    while (!(rc = next(l, message, &len, -1)))
        if (control_type_of(message, len) == CONTROL_RESULT && !control_text_get(message, len, &r) && r.code) {
            cli_say("the agent on %s: %s", l->socket, *r.text ? r.text : strerror(-r.code));
            return r.code;
        }
    if (rc != -ECONNRESET)
        return lost(l, rc);
    struct pollfd p = {.fd = (int)syscall(SYS_pidfd_open, (pid_t)l->pid, 0), .events = POLLIN};
    if (p.fd >= 0) { /* its last steps come after it has closed our connection */
        poll(&p, 1, ENDING_MS);
        close(p.fd);
    }
    return 0;
}

json_t *local_region(json_t *status, const char *name, const char *remote)
{
    size_t i;
    json_t *region;
    json_array_foreach(json_object_get(status, "regions"), i, region)
    {
        const char *n = json_string_value(json_object_get(region, "name"));
        const char *r = json_string_value(json_object_get(region, "remote"));
        if (n && !strcmp(n, name) && (!remote || (r && !strcmp(r, remote))))
            return region;
    }
    return NULL;
}
