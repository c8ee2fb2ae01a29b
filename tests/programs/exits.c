/* The ways in which a program leaves with stores that it never synced. */
#include "plain.h"

#include <pthread.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>

extern char **environ;

static unsigned char *stored(const char *dir)
{
    char path[4096];
    int fd = make_file(in_dir(path, dir, "data"), 32 * PAGE);
    unsigned char *p = map_shared(fd, 32 * PAGE, 0);
    fill(p, 3 * PAGE, 1);
    MUST(msync(p, 32 * PAGE, MS_SYNC) == 0);
    fill(p + 10 * PAGE, 3 * PAGE, 2);
    write_at(fd, 100, 20 * PAGE, 3);
    return p;
}

static void returned(const char *dir)
{
    stored(dir);
}

static void exited(const char *dir)
{
    stored(dir);
    exit(0);
}

static void at_once(const char *dir)
{
    stored(dir);
    _exit(0);
}

static void quickly(const char *dir)
{
    stored(dir);
    quick_exit(0);
}

static unsigned char *late;

static void store_late(void)
{
    fill(late + 25 * PAGE, PAGE, 4);
}

/* A handler of atexit stores after everything else. */
static void in_handler(const char *dir)
{
    late = stored(dir);
    MUST(atexit(store_late) == 0);
}

static void replaced(const char *dir)
{
    stored(dir);
    execl("/bin/true", "true", NULL);
    MUST(0 && "exec returned");
}

/* An exec that fails leaves the program as it was. */
static void exec_failed(const char *dir)
{
    unsigned char *p = stored(dir);
    MUST(execl("/nonexistent", "nonexistent", NULL) == -1 && errno == ENOENT);
    fill(p + 15 * PAGE, PAGE, 5);
    MUST(msync(p, 32 * PAGE, MS_SYNC) == 0);
    fill(p + 16 * PAGE, PAGE, 6);
}

static void exec_self(const char *dir)
{
    stored(dir);
    execl("/proc/self/exe", "exits", "again", dir, NULL);
    MUST(0 && "exec returned");
}

/* What exec-self runs: goes on in the same file. */
static void again(const char *dir)
{
    char path[4096];
    int fd = open(in_dir(path, dir, "data"), O_RDWR);
    MUST(fd >= 0);
    unsigned char *p = map_shared(fd, 32 * PAGE, 0);
    fill(p + 12 * PAGE, 4 * PAGE, 7);
}

static void *exit_from(void *arg)
{
    (void)arg;
    exit(0);
}

static void from_thread(const char *dir)
{
    pthread_t t;
    stored(dir);
    MUST(pthread_create(&t, NULL, exit_from, NULL) == 0);
    pthread_join(t, NULL);
}

static void *store_last(void *arg)
{
    fill((unsigned char *)arg + 28 * PAGE, PAGE, 8);
    return NULL;
}

/* The main thread leaves first; the process ends with the last one. */
static void last_thread(const char *dir)
{
    pthread_t t;
    MUST(pthread_create(&t, NULL, store_last, stored(dir)) == 0);
    pthread_exit(NULL);
}

static void unmapped(const char *dir)
{
    unsigned char *p = stored(dir);
    fill(p + 30 * PAGE, PAGE, 9);
    MUST(munmap(p, 32 * PAGE) == 0);
}

/* Spawned and forked children that touch nothing of ours, while there are stores to publish. */
static void spawns(const char *dir)
{
    unsigned char *p = stored(dir);
    char *args[] = {"true", NULL};
    pid_t child;
    int status;
    for (unsigned i = 0; i < 5; i++) {
        fill(p + (20 + i) * PAGE, PAGE, 10 + i);
        MUST(posix_spawn(&child, "/bin/true", NULL, NULL, args, environ) == 0);
        MUST(waitpid(child, &status, 0) == child && status == 0);
    }
    MUST(system("exit 0") == 0);
    MUST(wait(&status) == -1 && errno == ECHILD); /* no child but the program's own */
    fill(p, PAGE, 20);
}

int main(int argc, char **argv)
{
    static const struct plain_case cases[] = {
        {"return", returned},
        {"exit", exited},
        {"_exit", at_once},
        {"quick-exit", quickly},
        {"atexit", in_handler},
        {"exec", replaced},
        {"exec-failed", exec_failed},
        {"exec-self", exec_self},
        {"again", again},
        {"from-thread", from_thread},
        {"last-thread", last_thread},
        {"munmap", unmapped},
        {"spawn", spawns},
    };
    return run_case(cases, sizeof cases / sizeof *cases, argc, argv);
}
