#include "wire/control.h"

#include <errno.h>

static struct wr begin(void *to, size_t cap, uint8_t type)
{
    struct wr w = wr_over(to, cap);
    wr_u8(&w, type);
    return w;
}

static size_t put_end(const struct wr *w)
{
    return w->bad || wr_len(w) > CONTROL_MAX ? 0 : wr_len(w);
}

static struct rd body(const void *p, size_t len)
{
    struct rd r = rd_over(p, len);
    rd_u8(&r);
    return r;
}

static int get_end(const struct rd *r)
{
    return r->bad || rd_left(r) ? -EPROTO : 0;
}

uint8_t control_type_of(const void *p, size_t len)
{
    const uint8_t *b = p;
    return len && *b < CONTROL_TYPES ? *b : 0;
}

size_t control_hello_put(void *to, size_t cap, const struct control_hello *m)
{
    struct wr w = begin(to, cap, CONTROL_HELLO);
    wr_u16(&w, m->version);
    wr_u8(&w, m->tool);
    wr_u32(&w, m->pid);
    wr_u8(&w, m->fds);
    wr_u8(&w, m->loss);
    wr_u64(&w, m->timeout_ms);
    wr_str(&w, m->program);
    wr_str(&w, m->remote);
    return put_end(&w);
}

/* Of another version only the number is taken: what follows it may have another form. */
int control_hello_get(const void *p, size_t len, struct control_hello *m)
{
    struct rd r = body(p, len);
    memset(m, 0, sizeof *m);
    m->version = rd_u16(&r);
    if (!r.bad && m->version != CONTROL_VERSION)
        return 0;
    m->tool = rd_u8(&r);
    m->pid = rd_u32(&r);
    m->fds = rd_u8(&r);
    m->loss = rd_u8(&r);
    m->timeout_ms = rd_u64(&r);
    rd_str(&r, m->program, sizeof m->program);
    rd_str(&r, m->remote, sizeof m->remote);
    return m->loss > CONTROL_LOSS_FAIL ? -EPROTO : get_end(&r);
}

static void terms_put(struct wr *w, const struct control_terms *t)
{
    wr_u8(w, t->ack);
    wr_u8(w, t->initial);
    wr_u64(w, t->interval_ms);
    wr_str(w, t->group);
}

static void terms_get(struct rd *r, struct control_terms *t)
{
    t->ack = rd_u8(r);
    t->initial = rd_u8(r);
    t->interval_ms = rd_u64(r);
    rd_str(r, t->group, sizeof t->group);
    if (t->ack > CONTROL_ACK_ASYNC || t->initial > CONTROL_INITIAL_PULL)
        r->bad = true;
}

static void source_put(struct wr *w, const struct source *s)
{
    wr_u64(w, s->ino);
    wr_u64(w, s->btime);
}

static void source_get(struct rd *r, struct source *s)
{
    s->ino = rd_u64(r);
    s->btime = rd_u64(r);
}

size_t control_region_put(void *to, size_t cap, const struct control_region *m)
{
    struct wr w = begin(to, cap, CONTROL_REGION);
    wr_u32(&w, m->region);
    wr_u8(&w, m->fresh);
    wr_u8(&w, m->hashed);
    wr_u64(&w, m->dev);
    source_put(&w, &m->source);
    terms_put(&w, &m->terms);
    wr_str(&w, m->path);
    wr_str(&w, m->name);
    return put_end(&w);
}

int control_region_get(const void *p, size_t len, struct control_region *m)
{
    struct rd r = body(p, len);
    m->region = rd_u32(&r);
    m->fresh = rd_u8(&r);
    m->hashed = rd_u8(&r);
    m->dev = rd_u64(&r);
    source_get(&r, &m->source);
    terms_get(&r, &m->terms);
    rd_str(&r, m->path, sizeof m->path);
    rd_str(&r, m->name, sizeof m->name);
    return m->region && m->hashed <= CONTROL_HASHED_EVENTS ? get_end(&r) : -EPROTO;
}

size_t control_marks_put(void *to, size_t cap, const struct control_marks *m)
{
    struct wr w = begin(to, cap, CONTROL_MARKS);
    wr_u32(&w, m->region);
    return put_end(&w);
}

int control_marks_get(const void *p, size_t len, struct control_marks *m)
{
    struct rd r = body(p, len);
    m->region = rd_u32(&r);
    return get_end(&r);
}

size_t control_map_put(void *to, size_t cap, const struct control_map *m)
{
    struct wr w = begin(to, cap, CONTROL_MAP);
    wr_u32(&w, m->region);
    wr_u8(&w, m->tracker);
    wr_u8(&w, m->dirty);
    wr_u64(&w, m->addr);
    wr_u64(&w, m->len);
    wr_u64(&w, m->offset);
    return put_end(&w);
}

static bool range_good(uint64_t addr, uint64_t len)
{
    return len && addr + len > addr;
}

int control_map_get(const void *p, size_t len, struct control_map *m)
{
    struct rd r = body(p, len);
    m->region = rd_u32(&r);
    m->tracker = rd_u8(&r);
    m->dirty = rd_u8(&r);
    m->addr = rd_u64(&r);
    m->len = rd_u64(&r);
    m->offset = rd_u64(&r);
    if (m->tracker > CONTROL_TRACK_SOFTDIRTY || !range_good(m->addr, m->len) || m->len > INT64_MAX ||
        m->offset > (uint64_t)INT64_MAX - m->len)
        return -EPROTO;
    return get_end(&r);
}

size_t control_retire_put(void *to, size_t cap, const struct control_retire *m)
{
    struct wr w = begin(to, cap, CONTROL_RETIRE);
    wr_u32(&w, m->slot);
    wr_u8(&w, m->publish);
    wr_u64(&w, m->addr);
    wr_u64(&w, m->len);
    return put_end(&w);
}

int control_retire_get(const void *p, size_t len, struct control_retire *m)
{
    struct rd r = body(p, len);
    m->slot = rd_u32(&r);
    m->publish = rd_u8(&r);
    m->addr = rd_u64(&r);
    m->len = rd_u64(&r);
    return range_good(m->addr, m->len) ? get_end(&r) : -EPROTO;
}

size_t control_release_put(void *to, size_t cap, const struct control_release *m)
{
    struct wr w = begin(to, cap, CONTROL_RELEASE);
    wr_u32(&w, m->region);
    return put_end(&w);
}

int control_release_get(const void *p, size_t len, struct control_release *m)
{
    struct rd r = body(p, len);
    m->region = rd_u32(&r);
    return get_end(&r);
}

size_t control_name_put(void *to, size_t cap, const struct control_name *m)
{
    struct wr w = begin(to, cap, CONTROL_NAME);
    wr_u8(&w, m->kind);
    wr_u8(&w, m->phase);
    wr_u32(&w, m->number);
    wr_u64(&w, m->dev);
    source_put(&w, &m->source);
    terms_put(&w, &m->terms);
    wr_str(&w, m->old_path);
    wr_str(&w, m->old_name);
    wr_str(&w, m->new_path);
    wr_str(&w, m->new_name);
    return put_end(&w);
}

int control_name_get(const void *p, size_t len, struct control_name *m)
{
    struct rd r = body(p, len);
    m->kind = rd_u8(&r);
    m->phase = rd_u8(&r);
    m->number = rd_u32(&r);
    m->dev = rd_u64(&r);
    source_get(&r, &m->source);
    terms_get(&r, &m->terms);
    rd_str(&r, m->old_path, sizeof m->old_path);
    rd_str(&r, m->old_name, sizeof m->old_name);
    rd_str(&r, m->new_path, sizeof m->new_path);
    rd_str(&r, m->new_name, sizeof m->new_name);
    if (m->kind < CONTROL_NAME_RENAME || m->kind > CONTROL_NAME_UNLINK || m->phase > CONTROL_NAME_FAILED)
        return -EPROTO;
    return get_end(&r);
}

size_t control_sync_put(void *to, size_t cap, const struct control_sync *m)
{
    struct wr w = begin(to, cap, CONTROL_SYNC);
    wr_u32(&w, m->slot);
    wr_u32(&w, m->region);
    return put_end(&w);
}

int control_sync_get(const void *p, size_t len, struct control_sync *m)
{
    struct rd r = body(p, len);
    m->slot = rd_u32(&r);
    m->region = rd_u32(&r);
    return get_end(&r);
}

size_t control_bye_put(void *to, size_t cap, const struct control_bye *m)
{
    struct wr w = begin(to, cap, CONTROL_BYE);
    wr_u32(&w, m->slot);
    return put_end(&w);
}

int control_bye_get(const void *p, size_t len, struct control_bye *m)
{
    struct rd r = body(p, len);
    m->slot = rd_u32(&r);
    return get_end(&r);
}

size_t control_publish_put(void *to, size_t cap, const struct control_publish *m)
{
    struct wr w = begin(to, cap, CONTROL_PUBLISH);
    wr_str(&w, m->name);
    return put_end(&w);
}

int control_publish_get(const void *p, size_t len, struct control_publish *m)
{
    struct rd r = body(p, len);
    rd_str(&r, m->name, sizeof m->name);
    return get_end(&r);
}

size_t control_watch_put(void *to, size_t cap, const struct control_watch *m)
{
    struct wr w = begin(to, cap, CONTROL_WATCH);
    terms_put(&w, &m->terms);
    wr_str(&w, m->path);
    wr_str(&w, m->name);
    wr_str(&w, m->remote);
    return put_end(&w);
}

int control_watch_get(const void *p, size_t len, struct control_watch *m)
{
    struct rd r = body(p, len);
    terms_get(&r, &m->terms);
    rd_str(&r, m->path, sizeof m->path);
    rd_str(&r, m->name, sizeof m->name);
    rd_str(&r, m->remote, sizeof m->remote);
    return get_end(&r);
}

size_t control_attach_put(void *to, size_t cap, const struct control_attach *m)
{
    struct wr w = begin(to, cap, CONTROL_ATTACH);
    wr_u8(&w, m->read_only);
    wr_str(&w, m->device);
    wr_str(&w, m->name);
    wr_str(&w, m->remote);
    return put_end(&w);
}

int control_attach_get(const void *p, size_t len, struct control_attach *m)
{
    struct rd r = body(p, len);
    m->read_only = rd_u8(&r);
    rd_str(&r, m->device, sizeof m->device);
    rd_str(&r, m->name, sizeof m->name);
    rd_str(&r, m->remote, sizeof m->remote);
    return m->read_only > 1 ? -EPROTO : get_end(&r);
}

size_t control_welcome_put(void *to, size_t cap, const struct control_welcome *m)
{
    struct wr w = begin(to, cap, CONTROL_WELCOME);
    wr_u16(&w, m->version);
    wr_u32(&w, m->pid);
    return put_end(&w);
}

int control_welcome_get(const void *p, size_t len, struct control_welcome *m)
{
    struct rd r = body(p, len);
    m->version = rd_u16(&r);
    m->pid = rd_u32(&r);
    return get_end(&r);
}

static void open_put(struct wr *w, const struct control_open *m)
{
    wr_u32(w, m->slot);
    wr_u32(w, m->view);
    wr_u8(w, m->mode);
    wr_u8(w, m->order);
    wr_u8(w, m->follow);
    wr_u8(w, m->look);
    wr_u8(w, m->create);
    wr_u64(w, m->resident);
    wr_u64(w, m->fetch_timeout_ms);
    wr_str(w, m->path);
    wr_str(w, m->name);
}

static void open_get(struct rd *r, struct control_open *m)
{
    m->slot = rd_u32(r);
    m->view = rd_u32(r);
    m->mode = rd_u8(r);
    m->order = rd_u8(r);
    m->follow = rd_u8(r);
    m->look = rd_u8(r);
    m->create = rd_u8(r);
    m->resident = rd_u64(r);
    m->fetch_timeout_ms = rd_u64(r);
    rd_str(r, m->path, sizeof m->path);
    rd_str(r, m->name, sizeof m->name);
    if (!m->view || m->mode > CONTROL_MIRROR || m->order > CONTROL_ORDER_NONE || m->follow > 1 ||
        m->look > 1 || m->create > (m->mode == CONTROL_MIRROR))
        r->bad = true;
}

size_t control_open_put(void *to, size_t cap, const struct control_open *m)
{
    struct wr w = begin(to, cap, CONTROL_OPEN);
    open_put(&w, m);
    return put_end(&w);
}

int control_open_get(const void *p, size_t len, struct control_open *m)
{
    struct rd r = body(p, len);
    open_get(&r, m);
    return get_end(&r);
}

size_t control_resume_put(void *to, size_t cap, const struct control_resume *m)
{
    struct wr w = begin(to, cap, CONTROL_RESUME);
    open_put(&w, &m->open);
    wr_u64(&w, m->epoch);
    wr_copy(&w, m->lineage.b, sizeof m->lineage.b);
    wr_u64(&w, m->size);
    return put_end(&w);
}

int control_resume_get(const void *p, size_t len, struct control_resume *m)
{
    struct rd r = body(p, len);
    open_get(&r, &m->open);
    m->epoch = rd_u64(&r);
    rd_copy(&r, m->lineage.b, sizeof m->lineage.b);
    m->size = rd_u64(&r);
    return m->size <= INT64_MAX ? get_end(&r) : -EPROTO;
}

static bool span_good(uint64_t offset, uint64_t len)
{
    return len && len <= INT64_MAX && offset <= (uint64_t)INT64_MAX - len;
}

size_t control_view_map_put(void *to, size_t cap, const struct control_view_map *m)
{
    struct wr w = begin(to, cap, CONTROL_VIEW_MAP);
    wr_u32(&w, m->view);
    wr_u64(&w, m->addr);
    wr_u64(&w, m->len);
    wr_u64(&w, m->offset);
    return put_end(&w);
}

int control_view_map_get(const void *p, size_t len, struct control_view_map *m)
{
    struct rd r = body(p, len);
    m->view = rd_u32(&r);
    m->addr = rd_u64(&r);
    m->len = rd_u64(&r);
    m->offset = rd_u64(&r);
    return m->view && range_good(m->addr, m->len) && span_good(m->offset, m->len) ? get_end(&r) : -EPROTO;
}

size_t control_view_unmap_put(void *to, size_t cap, const struct control_view_unmap *m)
{
    struct wr w = begin(to, cap, CONTROL_VIEW_UNMAP);
    wr_u64(&w, m->addr);
    wr_u64(&w, m->len);
    return put_end(&w);
}

int control_view_unmap_get(const void *p, size_t len, struct control_view_unmap *m)
{
    struct rd r = body(p, len);
    m->addr = rd_u64(&r);
    m->len = rd_u64(&r);
    return range_good(m->addr, m->len) ? get_end(&r) : -EPROTO;
}

size_t control_advise_put(void *to, size_t cap, const struct control_advise *m)
{
    struct wr w = begin(to, cap, CONTROL_ADVISE);
    wr_u32(&w, m->view);
    wr_u8(&w, m->advice);
    wr_u64(&w, m->offset);
    wr_u64(&w, m->len);
    return put_end(&w);
}

int control_advise_get(const void *p, size_t len, struct control_advise *m)
{
    struct rd r = body(p, len);
    m->view = rd_u32(&r);
    m->advice = rd_u8(&r);
    m->offset = rd_u64(&r);
    m->len = rd_u64(&r);
    return m->view && m->advice <= CONTROL_ADVICE_MAX && span_good(m->offset, m->len) ? get_end(&r) : -EPROTO;
}

size_t control_fetch_put(void *to, size_t cap, const struct control_fetch *m)
{
    struct wr w = begin(to, cap, CONTROL_FETCH);
    wr_u32(&w, m->slot);
    wr_u32(&w, m->view);
    wr_u64(&w, m->offset);
    wr_u64(&w, m->len);
    return put_end(&w);
}

int control_fetch_get(const void *p, size_t len, struct control_fetch *m)
{
    struct rd r = body(p, len);
    m->slot = rd_u32(&r);
    m->view = rd_u32(&r);
    m->offset = rd_u64(&r);
    m->len = rd_u64(&r);
    return m->view && span_good(m->offset, m->len) ? get_end(&r) : -EPROTO;
}

size_t control_truncate_put(void *to, size_t cap, const struct control_truncate *m)
{
    struct wr w = begin(to, cap, CONTROL_TRUNCATE);
    wr_u32(&w, m->slot);
    wr_u32(&w, m->view);
    wr_u64(&w, m->size);
    wr_u8(&w, m->grow);
    return put_end(&w);
}

int control_truncate_get(const void *p, size_t len, struct control_truncate *m)
{
    struct rd r = body(p, len);
    m->slot = rd_u32(&r);
    m->view = rd_u32(&r);
    m->size = rd_u64(&r);
    m->grow = rd_u8(&r);
    return m->view && m->size <= INT64_MAX && m->grow <= 1 ? get_end(&r) : -EPROTO;
}

size_t control_close_put(void *to, size_t cap, const struct control_close *m)
{
    struct wr w = begin(to, cap, CONTROL_CLOSE);
    wr_u32(&w, m->view);
    return put_end(&w);
}

int control_close_get(const void *p, size_t len, struct control_close *m)
{
    struct rd r = body(p, len);
    m->view = rd_u32(&r);
    return m->view ? get_end(&r) : -EPROTO;
}

size_t control_view_put(void *to, size_t cap, const struct control_view *m)
{
    struct wr w = begin(to, cap, CONTROL_VIEW);
    wr_u32(&w, m->view);
    wr_u64(&w, m->size);
    wr_u64(&w, (uint64_t)m->mtime_ns);
    wr_u64(&w, m->epoch);
    wr_copy(&w, m->lineage.b, sizeof m->lineage.b);
    return put_end(&w);
}

int control_view_get(const void *p, size_t len, struct control_view *m)
{
    struct rd r = body(p, len);
    m->view = rd_u32(&r);
    m->size = rd_u64(&r);
    m->mtime_ns = (int64_t)rd_u64(&r);
    m->epoch = rd_u64(&r);
    rd_copy(&r, m->lineage.b, sizeof m->lineage.b);
    return m->view && m->size <= INT64_MAX ? get_end(&r) : -EPROTO;
}

size_t control_text_put(void *to, size_t cap, uint8_t type, const struct control_text *m)
{
    struct wr w = begin(to, cap, type);
    wr_u32(&w, (uint32_t)m->code);
    wr_str(&w, m->text);
    return put_end(&w);
}

int control_text_get(const void *p, size_t len, struct control_text *m)
{
    struct rd r = body(p, len);
    m->code = (int32_t)rd_u32(&r);
    rd_str(&r, m->text, sizeof m->text);
    return get_end(&r);
}

size_t control_empty_put(void *to, size_t cap, uint8_t type)
{
    struct wr w = begin(to, cap, type);
    return put_end(&w);
}

static int join(char *to, size_t cap, const char *a, const char *b)
{
    size_t n = strlen(a), m = strlen(b);
    if (n + m >= cap)
        return -ENAMETOOLONG;
    memcpy(to, a, n);
    memcpy(to + n, b, m + 1);
    return 0;
}

int control_socket_path(char *to, size_t cap, const char *env_agent, const char *env_runtime, unsigned uid)
{
    if (env_agent && *env_agent && strcmp(env_agent, "auto"))
        return join(to, cap, env_agent, "");
    if (env_runtime && *env_runtime == '/')
        return join(to, cap, env_runtime, "/memsync/agent.sock");
    char digits[16], *at = digits + sizeof digits - 1;
    *at = 0;
    do
        *--at = (char)('0' + uid % 10);
    while (uid /= 10);
    char dir[64];
    if (join(dir, sizeof dir, "/tmp/memsync-", at))
        return -ENAMETOOLONG;
    return join(to, cap, dir, "/agent.sock");
}
