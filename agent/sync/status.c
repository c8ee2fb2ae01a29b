/* What `memsync status` shows, as one JSON object. */
#include "agent/sync/capture.h"
#include "agent/base/version.h"
#include "agent/nbd/device.h"
#include "agent/page/page.h"

#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static void text(FILE *f, const char *s)
{
    fputc('"', f);
    for (; *s; s++) {
        unsigned char c = (unsigned char)*s;
        if (c == '"' || c == '\\')
            fprintf(f, "\\%c", c);
        else if (c < 0x20)
            fprintf(f, "\\u%04x", c);
        else
            fputc(c, f);
    }
    fputc('"', f);
}

static void field(FILE *f, const char *name, const char *value)
{
    fprintf(f, "\"%s\":", name);
    text(f, value);
    fputc(',', f);
}

static void lag(FILE *f, const struct local *l, const struct region *r)
{
    const struct group *g = r->group;
    uint64_t epochs = 0, bytes = extents_bytes(&r->body->dirty), since = 0;
    for (const struct epoch *e = g->queue; e; e = e->next)
        for (size_t i = 0; i < e->ntouched; i++)
            if (e->touched[i].body == r->body) {
                epochs++;
                bytes += e->bytes;
                since = since ? since : e->captured_at;
            }
    for (size_t i = 0; g->capture && i < g->capture->nparts; i++) {
        const struct part *p = &g->capture->parts[i];
        uint64_t looked = __atomic_load_n(&p->looked, __ATOMIC_RELAXED);
        if (p->body == r->body && p->todo_bytes > looked)
            bytes += p->todo_bytes - looked;
    }
    if (g->degraded)
        since = g->degraded_since;
    fprintf(f, "\"lag_epochs\":%llu,\"lag_bytes\":%llu,\"lag_seconds\":%.3f,", (unsigned long long)epochs,
            (unsigned long long)bytes, since ? (double)(uv_now(l->loop) - since) / 1000 : 0.0);
}

/* At most: pages that never held data have none. Of a page, and its share of the nodes above. */
static uint64_t hash_bytes(uint64_t size)
{
    return (size / PAGE + (size % PAGE != 0)) * (HASH_BYTES + 1);
}

static void region(FILE *f, const struct local *l, const struct region *r)
{
    char lineage[ID_TEXT];
    unsigned programs = 0;
    const struct body *b = r->body;
    for (const struct use *u = b->uses; u; u = u->next_body)
        programs++;
    id_text(&b->lineage, lineage);
    fputc('{', f);
    field(f, "name", r->name);
    field(f, "path", r->path);
    field(f, "remote", r->link->address);
    field(f, "group", r->group->name ? r->group->name : "");
    field(f, "state", region_state(r));
    field(f, "lineage", lineage);
    field(f, "tracker", b->tracker);
    bool diverged = !strcmp(region_state(r), "diverged");
    int64_t since = r->reason[0] ? r->since : r->group->degraded ? r->group->degraded_at : diverged ? b->killed_at : 0;
    field(f, "reason",
          r->reason[0] ? r->reason
          : diverged
              ? "its program died with stores that no sync point covered: the remote stays at its last epoch until a "
                "program opens the file again, or `memsync sync`"
              : r->group->reason);
    lag(f, l, r);
    fprintf(f, "\"hash_bytes\":%llu,\"block_bytes\":%llu,", (unsigned long long)hash_bytes(b->size),
            (unsigned long long)hashes_blocks_bytes(&b->published));
    fprintf(f, "\"epoch\":%llu,\"remote_epoch\":%llu,\"size\":%llu,\"programs\":%u,\"since\":%lld}",
            (unsigned long long)b->epoch, (unsigned long long)b->durable, (unsigned long long)b->size, programs,
            (long long)since);
}

char *status_json(struct local *l)
{
    char *out = NULL, id[ID_TEXT];
    size_t len;
    bool comma = false;
    FILE *f = open_memstream(&out, &len);
    if (!f)
        return NULL;
    id_text(&l->identity, id);
    fprintf(f, "{\"version\":\"%s\",\"pid\":%d,\"identity\":\"%s\",\"block_bytes_most\":%llu,\"regions\":[",
            MEMSYNC_VERSION, (int)getpid(), id, (unsigned long long)hashes_blocks_most);
    for (const struct link *k = l->links; k; k = k->next)
        for (const struct region *r = k->regions; r; r = r->next)
            if (r->body && r->group) {
                fputs(comma ? "," : "", f);
                region(f, l, r);
                comma = true;
            }
    fputs("],\"views\":[", f);
    comma = false;
    for (struct link *k = l->links; k; k = k->next)
        page_status(f, k, &comma, text);
    fputs("],\"devices\":[", f);
    if (l->devices)
        devices_status(l->devices, f, text);
    fputs("],\"programs\":[", f);
    comma = false;
    for (const struct program *p = l->programs; p; p = p->next)
        if (!p->tool && !p->gone) {
            fprintf(f, "%s{\"pid\":%u,\"name\":", comma ? "," : "", p->pid);
            text(f, p->name);
            fputc('}', f);
            comma = true;
        }
    fputs("],\"remotes\":[", f);
    for (const struct link *k = l->links; k; k = k->next) {
        static const char *const states[] = {"down", "connecting", "up"};
        fputs(k == l->links ? "{" : ",{", f);
        field(f, "address", k->address);
        field(f, "state", states[k->state]);
        field(f, "reason", k->reason);
        fprintf(f, "\"bytes_out\":%llu,\"bytes_in\":%llu}",
                (unsigned long long)(k->bytes_out + (k->conn ? conn_bytes_out(k->conn) : 0)),
                (unsigned long long)(k->bytes_in + (k->conn ? conn_bytes_in(k->conn) : 0)));
    }
    fputs("]}", f);
    if (fclose(f)) {
        free(out);
        return NULL;
    }
    return out;
}
