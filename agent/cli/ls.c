/* ls and rm: what the remote has. */
#include "agent/cli/cli.h"
#include "agent/cli/peer.h"

#include <jansson.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static void print_entry(const struct frame_entry *e)
{
    char size[32], age[32];
    printf("%-40s %10s %10llu %8s  %s\n", e->name, cli_bytes(e->size, size), (unsigned long long)e->epoch,
           cli_seconds((double)(time(NULL) - (time_t)e->committed_at), age), e->leased ? e->holder : "-");
}

static json_t *entry_json(const struct frame_entry *e)
{
    char lineage[ID_TEXT], writer[ID_TEXT];
    id_text(&e->lineage, lineage);
    id_text(&e->writer, writer);
    return json_pack("{s:s, s:I, s:I, s:s, s:s, s:I, s:b, s:s}", "name", e->name, "size", (json_int_t)e->size, "epoch",
                     (json_int_t)e->epoch, "lineage", lineage, "writer", writer, "committed_at",
                     (json_int_t)e->committed_at, "leased", (int)e->leased, "holder", e->holder);
}

static int list(struct peer *p, json_t *all)
{
    uint8_t request[4];
    put_u32(request, 1);
    int rc = peer_send(p, FRAME_LIST, request, sizeof request);
    for (size_t n = 0; !rc; n++) {
        static struct frame_entry e;
        struct peer_frame f;
        uint32_t number;
        rc = peer_next(p, &f);
        if (rc || f.type == FRAME_LIST_END)
            break;
        if (f.type == FRAME_FAILED)
            return peer_failed(p, &f);
        if (f.type != FRAME_ENTRY || frame_entry_get(f.payload, f.len, &number, &e))
            return peer_unexpected(p, &f);
        if (!all && !n)
            printf("%-40s %10s %10s %8s  %s\n", "REGION", "SIZE", "EPOCH", "AGE", "WRITER");
        if (all)
            json_array_append_new(all, entry_json(&e));
        else
            print_entry(&e);
    }
    return rc;
}

int command_ls(const struct args *a)
{
    struct peer *p = peer_open(a->remote, false);
    if (!p)
        return CLI_FAILED;
    json_t *all = a->json ? json_array() : NULL;
    int code = list(p, all) ? cli_fail(CLI_FAILED, "%s", p->error) : CLI_DONE;
    if (all && code == CLI_DONE) {
        json_dumpf(all, stdout, JSON_INDENT(2));
        putchar('\n');
    }
    json_decref(all);
    peer_close(p);
    return code;
}

static int ask_remove(struct peer *p, const char *name, bool force)
{
    uint8_t payload[NAME_CAP + 16];
    struct wr w = wr_over(payload, sizeof payload);
    wr_u32(&w, 1);
    wr_str(&w, name);
    wr_u8(&w, force);
    struct peer_frame f;
    if (peer_send(p, FRAME_REMOVE, payload, wr_len(&w)) || peer_next(p, &f))
        return p->dead;
    if (f.type == FRAME_FAILED)
        return peer_failed(p, &f);
    return f.type == FRAME_OK ? 0 : peer_unexpected(p, &f);
}

int command_rm(const struct args *a)
{
    const char *name = a->words[0], *fault = name_fault(name);
    if (fault)
        return cli_fail(CLI_USAGE, "%s is no name of a region: %s", name, fault);
    struct peer *p = peer_open(a->remote, false);
    if (!p)
        return CLI_FAILED;
    int code = CLI_DONE, rc = ask_remove(p, name, a->force);
    if (rc == -ESTALE)
        code = cli_fail(CLI_FAILED, "%s at %s: %s; --force removes it all the same", name, a->remote, p->error);
    else if (rc)
        code = cli_fail(rc == -ENOENT ? CLI_NOT_SO : CLI_FAILED, "%s at %s: %s", name, a->remote, p->error);
    peer_close(p);
    return code;
}
