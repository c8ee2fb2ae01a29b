/* The block device server. Even inputs: the steps over a stream that arrives in arbitrary pieces give the same
 * messages, and the same end, whatever the cuts. Odd ones: a program of requests to a live server over a mem: store,
 * whose answers are held against a plain array, and raw bytes at the end. */
#include "agent/nbd/inside.h"
#include "tests/fuzz/fuzz.h"

#include <errno.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#define SIZE 40000u

struct seen {
    uint64_t messages, digest;
    size_t used;
    bool dead;
};

static void receive(struct nbd_server *s, struct seen *seen, const uint8_t *data, size_t have)
{
    static struct nbd_got got;
    while (!seen->dead) {
        size_t n = have - seen->used;
        uint8_t *exact = malloc(n ? n : 1);
        memcpy(exact, data + seen->used, n);
        int64_t step = nbd_server_step(s, exact, n, &got);
        free(exact);
        MUST(step <= (int64_t)n, "a step of %lld in %zu bytes", (long long)step, n);
        MUST(strlen(got.name) <= NBD_NAME_MAX, "a long name");
        seen->dead = step < 0;
        MUST(seen->dead == (s->phase == NBD_DEAD), "dead, or not");
        if (!step)
            return;
        seen->used += step > 0 ? (size_t)step : 0;
        if (step < 0 || got.kind == NBD_GOT_NOTHING) /* skipping is cut as the bytes come */
            continue;
        seen->messages++;
        seen->digest = seen->digest * 31 + got.kind * 7 + got.option + (uint32_t)got.reply + got.infos +
                       got.allocation + got.request.cookie + got.request.len + strlen(got.name);
        if (got.kind == NBD_GOT_OPTION && got.option == NBD_OPT_GO)
            nbd_server_begin(s, got.name);
        if (got.kind == NBD_GOT_REQUEST)
            MUST(nbd_request_check(s, &got.request, SIZE, false) <= 0, "a verdict");
    }
}

static void codec(struct in in)
{
    uint8_t cut = in_u8(&in);
    struct nbd_server *s = calloc(2, sizeof *s);
    struct seen whole = {0}, parts = {0};
    receive(&s[0], &whole, in.at, in_left(&in));
    for (size_t have = 0; have < in_left(&in); have += 1 + have % (cut + 1u))
        receive(&s[1], &parts, in.at, have);
    receive(&s[1], &parts, in.at, in_left(&in));
    MUST(whole.messages == parts.messages && whole.digest == parts.digest && whole.dead == parts.dead &&
             whole.used == parts.used,
         "cuts make a difference");
    free(s);
}

static struct {
    uv_loop_t loop;
    struct store *store;
    struct nbd *nbd;
    bool durable;
    int fd;
    uint8_t model[SIZE];
} w;

static const char *name_of(void *arg, uint32_t handle)
{
    (void)arg;
    return handle == 1 ? "r" : NULL;
}

static void on_durable(void *arg, int err, const char *text)
{
    (void)arg;
    MUST(!err, "%s", text);
    w.durable = true;
}

static void on_attached(void *arg, int err, const struct frame_attached *to)
{
    (void)arg;
    (void)err;
    (void)to;
}

static void add(struct store_txn *t, uint8_t type, struct buf *b)
{
    char error[STORE_ERROR];
    MUST(!store_txn_add(t, type, b, error), "%s", error);
    buf_drop(b);
}

static void setup(void)
{
    char error[STORE_ERROR];
    struct id identity = {{0x5e}};
    struct frame_attached to = {0};
    if (w.store)
        return;
    MUST(!uv_loop_init(&w.loop) && !store_open(&w.store, &w.loop, "mem:", error), "no store");
    store_attach(w.store, &(struct store_attach){.name = "r", .host = "h", .identity = &identity, .write = true}, &to,
                 on_attached, NULL);
    struct store_txn *t = store_txn_new(w.store, &identity, (struct store_names){name_of, &w}, NULL, NULL);
    struct frame_op op = {.kind = FRAME_OP_CREATE, .handle = 1, .lineage = {{7}}};
    struct frame_region g = {.handle = 1, .epoch = 1, .fence = to.fence, .min_size = UINT64_MAX, .size = SIZE};
    struct buf *b = buf_new(128);
    b->len = (uint32_t)frame_op_put(b->data, b->cap, &op);
    add(t, FRAME_OP, b);
    b = buf_new(128);
    b->len = (uint32_t)frame_region_put(b->data, b->cap, &g);
    add(t, FRAME_REGION, b);
    store_txn_commit(t, on_durable, NULL);
    while (!w.durable)
        uv_run(&w.loop, UV_RUN_ONCE);
    store_lease_drop(w.store, "r", &identity);
    w.nbd = nbd_new(&w.loop, w.store, &identity, "h");
    MUST(w.nbd, "no server");
}

/* Exactly len bytes, or false at the end of the connection. */
static bool take(void *to, size_t len)
{
    for (size_t at = 0; at < len;) {
        ssize_t n = recv(w.fd, (uint8_t *)to + at, len - at, 0);
        if (!n || (n < 0 && errno != EAGAIN))
            return false;
        if (n < 0)
            uv_run(&w.loop, UV_RUN_ONCE);
        else
            at += (size_t)n;
    }
    return true;
}

static void give(const void *bytes, size_t len)
{
    for (size_t at = 0; at < len;) {
        ssize_t n = send(w.fd, (const uint8_t *)bytes + at, len - at, MSG_NOSIGNAL);
        if (n < 0 && errno != EAGAIN)
            return;
        if (n < 0)
            uv_run(&w.loop, UV_RUN_ONCE);
        else
            at += (size_t)n;
    }
}

static void ask(uint16_t command, uint16_t flags, uint64_t cookie, uint64_t offset, uint32_t len)
{
    uint8_t q[NBD_REQUEST];
    put_u32(q, 0x25609513);
    put_u16(q + 4, flags);
    put_u16(q + 6, command);
    put_u64(q + 8, cookie);
    put_u64(q + 16, offset);
    put_u32(q + 24, len);
    give(q, sizeof q);
}

static void enter(void)
{
    static const uint8_t hello[] = {0, 0, 0, 3, 'I', 'H', 'A', 'V', 'E', 'O', 'P', 'T', 0, 0, 0, 1, 0, 0, 0, 1, 'r'};
    uint8_t got[18 + 10];
    int fds[2];
    MUST(!socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds), "no socket pair");
    MUST(!nbd_serve(w.nbd, fds[1], NULL, "fuzz", NULL, NULL), "no connection");
    w.fd = fds[0];
    give(hello, sizeof hello);
    MUST(take(got, sizeof got) && get_u64(got + 18) == SIZE, "no export");
}

static uint32_t answer(uint64_t cookie)
{
    uint8_t got[NBD_SIMPLE];
    MUST(take(got, sizeof got) && get_u32(got) == 0x67446698 && get_u64(got + 8) == cookie, "no answer");
    return get_u32(got + 4);
}

static void one(struct in *in, uint64_t cookie)
{
    static uint8_t data[SIZE];
    uint8_t what = in_u8(in);
    uint16_t command = what % 7 == NBD_CMD_DISC ? NBD_CMD_READ : what % 7, flags = what & 0x80 ? NBD_CMD_FLAG_FUA : 0;
    uint64_t offset = in_u16(in);
    uint32_t len = in_u16(in);
    bool flush = command == NBD_CMD_FLUSH, inside = offset <= SIZE && len && len <= SIZE - offset;
    if (what & 0x40 && command == NBD_CMD_WRITE_ZEROES)
        flags |= NBD_CMD_FLAG_NO_HOLE;
    ask(command, flags, cookie, flush ? 0 : offset, flush ? 0 : len);
    if (command == NBD_CMD_WRITE) {
        static uint8_t bytes[65536];
        memset(bytes, in_u8(in), len);
        give(bytes, len);
        if (inside)
            memcpy(w.model + offset, bytes, len);
    } else if (inside && (command == NBD_CMD_TRIM || command == NBD_CMD_WRITE_ZEROES)) {
        memset(w.model + offset, 0, len);
    }
    uint32_t error = answer(cookie);
    MUST(!error == (flush || inside), "%u at %llu, %u bytes: error %u", command, (unsigned long long)offset, len,
         error);
    if (command == NBD_CMD_READ && !error)
        MUST(take(data, len) && !memcmp(data, w.model + offset, len), "%u bytes at %llu are others", len,
             (unsigned long long)offset);
}

static void live(struct in in)
{
    setup();
    enter();
    memset(w.model, 0, SIZE);
    ask(NBD_CMD_TRIM, 0, 0, 0, SIZE);
    MUST(!answer(0), "no TRIM");
    uint8_t n = in_u8(&in) % 24;
    for (uint64_t i = 1; i <= n && in_left(&in); i++)
        one(&in, i);
    give(in.at, in_left(&in));
    close(w.fd);
    while (!TAILQ_EMPTY(&w.nbd->conns) || !TAILQ_EMPTY(&w.nbd->exports))
        uv_run(&w.loop, UV_RUN_ONCE);
    MUST(!w.nbd->owed, "%llu bytes are owed to nobody", (unsigned long long)w.nbd->owed);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    signal(SIGPIPE, SIG_IGN); /* as the agent does */
    struct in in = {data, data + size};
    (in_u8(&in) & 1 ? live : codec)(in);
    return 0;
}
