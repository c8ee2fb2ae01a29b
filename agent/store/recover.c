/* The saved table ("meta") and opening a file: store.
 *
 * The table, all integers big-endian: u32 magic "MSMT", u32 version, id store, u64 generation, next file, next spill,
 * sequence and position from which the journal is replayed, journal size, u64 count; then each region {u64 file, id
 * lineage, u64 ino, btime, epoch, fence, size, id writer, i64 committed, str name}; XXH3-128 of all before. It may know
 * of epochs later than that sequence: they are in the journal, and replaying them says the same again.
 *
 * Opening: read the table; walk the journal once for names and figures, which shows what lives in the end; walk it
 * again for the content of what lives; show every name; save the table with the journal
 * empty and the next generation; remove files that no name has. A kill in between changes nothing: the next opening
 * starts from the same table and journal. */
#include "agent/store/inside.h"

#include "agent/base/log.h"
#include "agent/base/xxh3.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#define MAGIC 0x4d534d54u
#define VERSION 1u
#define META_HEAD (8u + 16 + 7 * 8)
#define META_ENTRY (8u + 16 + 16 + 24 + 16 + 8 + 2)
#define META_SUM 16u

void *meta_put(struct store *s, uint64_t seq, uint64_t pos, size_t *len)
{
    size_t cap = META_HEAD + META_SUM, count = 0;
    for (size_t i = 0; i < s->names_len; i++)
        if (s->names[i]->durable) {
            cap += META_ENTRY + strlen(s->names[i]->text);
            count++;
        }
    void *bytes = malloc(cap);
    if (!bytes)
        return NULL;
    struct wr w = wr_over(bytes, cap);
    wr_u32(&w, MAGIC);
    wr_u32(&w, VERSION);
    wr_copy(&w, s->journal.store.b, 16);
    wr_u64(&w, s->generation);
    wr_u64(&w, s->next_file);
    wr_u64(&w, s->next_spill);
    wr_u64(&w, seq);
    wr_u64(&w, pos);
    wr_u64(&w, s->journal.size);
    wr_u64(&w, count);
    for (size_t i = 0; i < s->names_len; i++) {
        const struct region *r = s->names[i]->durable;
        if (!r)
            continue;
        wr_u64(&w, r->file);
        wr_copy(&w, r->lineage.b, 16);
        wr_u64(&w, r->source.ino);
        wr_u64(&w, r->source.btime);
        wr_u64(&w, r->durable.epoch);
        wr_u64(&w, r->durable.fence);
        wr_u64(&w, r->durable.size);
        wr_copy(&w, r->durable.writer.b, 16);
        wr_u64(&w, (uint64_t)r->durable.committed_at);
        wr_str(&w, s->names[i]->text);
    }
    XXH128_canonical_t sum;
    XXH128_canonicalFromHash(&sum, XXH3_128bits(bytes, wr_len(&w)));
    wr_copy(&w, &sum, sizeof sum);
    *len = wr_len(&w);
    return bytes;
}

static int entry_get(struct store *s, struct rd *r)
{
    uint64_t file = rd_u64(r);
    struct id lineage;
    struct source source;
    struct figures f;
    char text[NAME_CAP];
    rd_copy(r, lineage.b, 16);
    source.ino = rd_u64(r);
    source.btime = rd_u64(r);
    f.epoch = rd_u64(r);
    f.fence = rd_u64(r);
    f.size = rd_u64(r);
    rd_copy(r, f.writer.b, 16);
    f.committed_at = (int64_t)rd_u64(r);
    rd_str(r, text, sizeof text);
    if (r->bad || !file || name_fault(text) || region_by_file(s, file))
        return -EBADMSG;
    struct name *n = name_get(s, text);
    struct region *g = region_new(s, file, &lineage, &source);
    if (!n || !g)
        return -ENOMEM;
    g->durable = f;
    g->bound = n;
    n->durable = g;
    return 0;
}

static int meta_get(struct store *s, const uint8_t *bytes, size_t len)
{
    XXH128_canonical_t sum;
    if (len < META_HEAD + META_SUM)
        return -EBADMSG;
    XXH128_canonicalFromHash(&sum, XXH3_128bits(bytes, len - META_SUM));
    if (memcmp(&sum, bytes + len - META_SUM, META_SUM))
        return -EBADMSG;
    struct rd r = rd_over(bytes, len - META_SUM);
    if (rd_u32(&r) != MAGIC)
        return -EBADMSG;
    if (rd_u32(&r) != VERSION)
        return -EPROTONOSUPPORT;
    rd_copy(&r, s->journal.store.b, 16);
    s->generation = rd_u64(&r);
    s->next_file = rd_u64(&r);
    s->next_spill = rd_u64(&r);
    s->journal.seq = rd_u64(&r);
    s->journal.tail = rd_u64(&r);
    s->journal.size = rd_u64(&r);
    uint64_t count = rd_u64(&r);
    int err = s->journal.tail > s->journal.size || s->journal.size < JOURNAL_ALIGN ? -EBADMSG : 0;
    while (!err && count--)
        err = entry_get(s, &r);
    return !err && (r.bad || rd_left(&r)) ? -EBADMSG : err;
}

/* First walk: what is there in the end. */
static int walk_table(void *arg, uint64_t seq, struct rd *body, uint32_t epochs)
{
    struct store *s = arg;
    (void)seq;
    while (epochs--) {
        struct store_txn *t = record_get(s, body);
        if (!t)
            return -errno;
        for (size_t i = 0; i < t->parts_len; i++) {
            struct part *p = t->parts[i];
            if (p->created)
                p->r->made = true;
            if (p->r->file >= s->next_file)
                s->next_file = p->r->file + 1;
        }
        if (t->spill >= s->next_spill)
            s->next_spill = t->spill + 1;
        txn_durable(t);
        /* Kept, although dead: a later record may speak of it, and the second walk asks for it. */
        txn_free(t);
    }
    return 0;
}

/* Second walk: the content of what lives. */
static int walk_content(void *arg, uint64_t seq, struct rd *body, uint32_t epochs)
{
    struct store *s = arg;
    (void)seq;
    while (epochs--) {
        struct store_txn *t = record_get(s, body);
        if (!t)
            return -errno;
        bool alive = false;
        for (size_t i = 0; i < t->parts_len; i++) {
            struct part *p = t->parts[i];
            if (p->r->bound) {
                alive = true;
                if (p->stated)
                    region_dirty(s, p->r);
            } else {
                region_drop(s, p->r);
                p->r = NULL;
            }
        }
        int err = 0;
        if (alive && t->spill_len && (t->spill_fd = s->volume->ops->spill_open(s->volume, t->spill, false)) < 0)
            err = t->spill_fd;
        if (!err && alive)
            err = apply_content(s, t, NULL);
        s->applied_no++;
        txn_free(t);
        if (err)
            return err;
    }
    return 0;
}

static int adopt_all(struct store *s, char error[STORE_ERROR])
{
    for (size_t i = 0; i < s->names_len; i++) {
        struct name *n = s->names[i];
        struct region *r = n->durable;
        if (!r)
            continue;
        int err = s->volume->ops->adopt(s->volume, n->text, r->file);
        if (err == -ENOENT && r->made)
            continue;
        if (err == -ENOENT) {
            log_warn("region %s: its file was removed while no agent ran, and so is the region", n->text);
            n->durable = NULL;
            r->bound = NULL;
            region_drop(s, r);
            continue;
        }
        if (err) {
            snprintf(error, STORE_ERROR, "%.250s in %.150s cannot be taken up: %s%s", n->text,
                     s->volume->ops->dir(s->volume), strerror(-err),
                     err == -EXDEV || err == -EPERM ? " (a store needs one file system with hard links)" : "");
            return err;
        }
    }
    return 0;
}

/* A file that somebody else made longer or shorter is no longer what its writer thinks it is: under a new lineage the
 * writer is told so. */
static int sizes_check(struct store *s)
{
    for (size_t i = 0; i < s->names_len; i++) {
        struct region *r = s->names[i]->durable;
        struct stat st;
        if (!r)
            continue;
        bool open = r->fd >= 0;
        int fd = region_open(s, r, r->made);
        if (fd < 0 || fstat(fd, &st) < 0)
            return fd < 0 ? fd : -errno;
        if (!open) {
            close(r->fd);
            r->fd = -1;
        }
        if ((uint64_t)st.st_size == r->durable.size)
            continue;
        log_warn("region %s: its file was changed while no agent ran (%llu bytes, not %llu): it has a new lineage now",
                 s->names[i]->text, (unsigned long long)st.st_size, (unsigned long long)r->durable.size);
        id_new(&r->lineage);
        r->durable.size = (uint64_t)st.st_size;
    }
    return 0;
}

static int names_show(struct store *s)
{
    int err = 0;
    for (size_t i = 0; !err && i < s->names_len; i++)
        if (!s->names[i]->durable)
            err = name_apply(s, s->names[i]->text, 0);
    for (size_t i = 0; !err && i < s->names_len; i++)
        if (s->names[i]->durable)
            err = name_apply(s, s->names[i]->text, s->names[i]->durable->file);
    return err;
}

static void orphan_file(void *arg, uint64_t file)
{
    struct store *s = arg;
    if (file >= s->next_file)
        s->next_file = file + 1;
    const struct region *r = region_by_file(s, file);
    if (!r || !r->bound)
        s->volume->ops->file_remove(s->volume, file);
}

static void orphan_spill(void *arg, uint64_t number)
{
    struct store *s = arg;
    if (number >= s->next_spill)
        s->next_spill = number + 1;
    s->volume->ops->spill_remove(s->volume, number);
}

static int say(struct store *s, const char *what, int err, char error[STORE_ERROR])
{
    if (err && !*error)
        snprintf(error, STORE_ERROR, "file:%.200s: %s: %s", s->volume->ops->dir(s->volume), what, strerror(-err));
    return err;
}

static int journal_take(struct store *s, uint64_t size, char error[STORE_ERROR])
{
    int fd = s->volume->ops->journal(s->volume, size);
    if (fd < 0)
        return say(s, "the journal cannot be made", fd, error);
    s->journal.fd = fd;
    s->journal.size = size;
    return 0;
}

static int replay(struct store *s, char error[STORE_ERROR])
{
    struct journal *j = &s->journal;
    uint64_t seq = j->seq, tail = j->tail;
    int err = journal_scan(j, walk_table, s, error);
    if (!err)
        err = adopt_all(s, error);
    if (err)
        return say(s, "the journal cannot be read", err, error);
    if (j->seq != seq) {
        log_info("%s: epochs of %llu journal records are put into the files", s->volume->ops->dir(s->volume),
                 (unsigned long long)(j->seq - seq));
        j->seq = seq;
        j->tail = tail;
        err = journal_scan(j, walk_content, s, error);
    }
    return say(s, "epochs in the journal cannot be put into the files", err, error);
}

int store_recover(struct store *s, char error[STORE_ERROR])
{
    void *bytes;
    size_t len;
    uint64_t size = s->limits.journal;
    int err = s->volume->ops->load(s->volume, &bytes, &len);
    bool fresh = err == -ENOENT;
    if (!err) {
        err = meta_get(s, bytes, len);
        free(bytes);
        if (err)
            return say(s, "the saved table (.memsync/meta) is damaged or of another version", err, error);
        size = s->journal.size;
    } else if (fresh) {
        id_new(&s->journal.store);
        s->journal.seq = 1;
    } else
        return say(s, "the saved table cannot be read", err, error);
    if ((err = journal_take(s, size, error)) || (!fresh && (err = replay(s, error))))
        return err;
    if ((err = names_show(s)) || (err = sizes_check(s)))
        return say(s, "the regions' names cannot be shown", err, error);
    for (size_t i = 0; i < s->names_len; i++) {
        s->names[i]->head = s->names[i]->durable;
        struct region *r = s->names[i]->durable;
        if (!r)
            continue;
        r->head = r->durable;
        r->applied = r->durable.epoch;
    }
    s->generation++;
    s->durable_no = s->applied_no;
    s->applied_seq = s->journal.seq - 1;
    if ((err = checkpoint_now(s)))
        return say(s, "the table cannot be saved", err, error);
    /* Only now: until the journal was empty another start could have needed them. */
    if ((err = s->volume->ops->each(s->volume, orphan_file, orphan_spill, s)))
        return say(s, "left-over files cannot be removed", err, error);
    if (s->journal.size == s->limits.journal)
        return 0;
    close(s->journal.fd); /* empty now: give it the length that is asked for */
    s->journal.fd = -1;
    s->journal.tail = 0;
    s->journal.size = s->limits.journal;
    err = checkpoint_now(s);
    return err ? say(s, "the table cannot be saved", err, error) : journal_take(s, s->limits.journal, error);
}
