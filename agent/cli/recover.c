/* memsync recover: opens a store and closes it again, which is what recovery is. */
#include "agent/cli/cli.h"
#include "agent/store/store.h"

#include <stdio.h>
#include <string.h>
#include <sys/stat.h>

static void closed(void *arg)
{
    *(bool *)arg = true;
}

static void count(void *arg, const struct frame_entry *e)
{
    unsigned *n = arg;
    (void)e;
    ++*n;
}

int command_recover(const struct args *a)
{
    const char *dir = !strncmp(a->words[0], "file:", 5) ? a->words[0] + 5 : a->words[0];
    char url[4200], meta[4200], error[STORE_ERROR] = "";
    struct stat st;
    if ((size_t)snprintf(meta, sizeof meta, "%s/.memsync", dir) >= sizeof meta)
        return cli_fail(CLI_FAILED, "%s: the path is too long", dir);
    if (stat(meta, &st) || !S_ISDIR(st.st_mode))
        return cli_fail(CLI_FAILED, "%s is no store: there is no directory %s", dir, meta);
    snprintf(url, sizeof url, "file:%s", dir);
    uv_loop_t loop;
    int rc = uv_loop_init(&loop);
    if (rc)
        return cli_fail(CLI_FAILED, "%s", uv_strerror(rc));
    struct store *s;
    if (store_open(&s, &loop, url, error))
        return cli_fail(CLI_FAILED, "%s", error);
    unsigned regions = 0;
    bool done = false;
    store_ask_list(s, count, NULL, &regions);
    store_close(s, closed, &done);
    while (!done && uv_run(&loop, UV_RUN_ONCE))
        ;
    uv_run(&loop, UV_RUN_NOWAIT);
    if (uv_loop_close(&loop) || !done)
        return cli_fail(CLI_FAILED, "%s could not be closed", dir);
    printf("%s: %u regions, the files are exact\n", dir, regions);
    return CLI_DONE;
}
