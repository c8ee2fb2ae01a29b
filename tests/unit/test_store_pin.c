/* A pinned region reads as it was, whatever comes after. Over both volumes. */
#include "tests/unit/test_store.h"

#include <xxhash.h>

static int setup_mem(void **state)
{
    struct kit *k = malloc(sizeof *k);
    kit_init(k, true);
    kit_open(k);
    kit_attach(k, 0, "r");
    *state = k;
    return 0;
}

static int setup_file(void **state)
{
    struct kit *k = malloc(sizeof *k);
    kit_init(k, false);
    kit_open(k);
    kit_attach(k, 0, "r");
    *state = k;
    return 0;
}

static int teardown(void **state)
{
    kit_end(*state);
    free(*state);
    return 0;
}

static struct store_pin *pin_it(struct kit *k, uint64_t epoch, uint64_t size)
{
    struct store_pin *pin;
    struct frame_entry e;
    assert_int_equal(store_pin(k->s, "r", &pin, &e), 0);
    assert_int_equal(e.epoch, epoch);
    assert_int_equal(e.size, size);
    return pin;
}

/* The pinned bytes from..to are all fill. */
static void expect_pinned(struct kit *k, struct store_pin *pin, uint64_t from, uint64_t to, int fill)
{
    int err;
    struct buf *b = kit_pin_read(k, pin, from, (uint32_t)(to - from), &err);
    assert_int_equal(err, 0);
    assert_int_equal(b->len, to - from);
    for (uint32_t i = 0; i < b->len; i++)
        if (b->data[i] != fill)
            fail_msg("byte %llu is %u, not %d", (unsigned long long)from + i, b->data[i], fill);
    buf_drop(b);
}

struct changes {
    struct kit *k;
    int err;
    bool done;
    struct buf *data;
};

static void on_told(void *arg, int err, struct buf *data)
{
    struct changes *t = arg;
    t->err = err;
    t->data = data;
    t->done = true;
}

/* What differs between two pins is exactly that, as "FROM-TO ..." */
static void expect_changed(struct kit *k, struct store_pin *pin, struct store_pin *later, const char *expected)
{
    struct changes t = {.k = k};
    char text[4096] = "";
    struct frame_extents e;
    assert_int_equal(store_pin_changed(pin, later, on_told, &t), 0);
    while (!t.done)
        uv_run(&k->loop, UV_RUN_ONCE);
    assert_int_equal(t.err, 0);
    assert_int_equal(frame_extents_get(t.data->data, t.data->len, &e), 0);
    if (e.all)
        strcpy(text, "all ");
    for (uint32_t i = 0; i < e.count; i++) {
        uint64_t from, to;
        frame_extent(&e, i, &from, &to);
        if (strlen(text) < sizeof text - 64)
            snprintf(text + strlen(text), 64, "%llu-%llu ", (unsigned long long)from, (unsigned long long)to);
    }
    assert_string_equal(text, expected);
    buf_drop(t.data);
}

static void tells_changes(void **state)
{
    struct kit *k = *state;
    assert_int_equal(kit_write(k, 0, 1, 100000, 'a'), 0);
    struct store_pin *one = pin_it(k, 1, 100000), *same = pin_it(k, 1, 100000);
    expect_changed(k, one, same, "");
    struct store_txn *t = kit_txn(k);
    assert_int_equal(kit_region(k, t, 0, 2, UINT64_MAX, 100000), 0);
    assert_int_equal(kit_pages(k, t, 0, 5000, 20000, 'b'), 0); /* pages 1 to 6 */
    assert_int_equal(kit_pages(k, t, 0, 61440, 4096, 0), 0);   /* page 15 */
    assert_int_equal(kit_commit(k, t), 0);
    struct store_pin *two = pin_it(k, 2, 100000);
    expect_changed(k, one, two, "1-7 15-16 ");
    assert_int_equal(store_pin_changed(two, one, on_told, NULL), -ESTALE);
    t = kit_txn(k);
    assert_int_equal(kit_region(k, t, 0, 3, 30000, 50000), 0); /* cut within page 7, and longer again */
    assert_int_equal(kit_commit(k, t), 0);
    struct store_pin *three = pin_it(k, 3, 50000);
    expect_changed(k, two, three, "7-13 ");
    expect_changed(k, one, three, "1-13 ");
    store_unpin(one);
    store_unpin(same);
    store_unpin(two);
    store_unpin(three);
}

/* More stretches than one answer holds are told as fewer; none of them is forgotten. */
static void tells_many_changes(void **state)
{
    struct kit *k = *state;
    uint64_t size = 20000 * FRAME_PAGE;
    k->s->limits.pin_budget = 64u << 20;
    assert_int_equal(kit_write(k, 0, 1, size, 'a'), 0);
    struct store_pin *one = pin_it(k, 1, size);
    struct store_txn *t = kit_txn(k);
    assert_int_equal(kit_region(k, t, 0, 2, UINT64_MAX, size), 0);
    for (uint64_t page = 0; page < 20000; page += 4)
        assert_int_equal(kit_pages(k, t, 0, page * FRAME_PAGE, 100, 'b'), 0);
    assert_int_equal(kit_pages(k, t, 0, 9 * FRAME_PAGE, 100, 'b'), 0);
    assert_int_equal(kit_commit(k, t), 0);
    struct store_pin *two = pin_it(k, 2, size);
    expect_changed(k, one, two, "0-19997 ");
    store_unpin(one);
    store_unpin(two);
}

static void survives_changes(void **state)
{
    struct kit *k = *state;
    assert_int_equal(kit_write(k, 0, 1, 100000, 'a'), 0);
    struct store_pin *one = pin_it(k, 1, 100000);
    struct store_txn *t = kit_txn(k);
    assert_int_equal(kit_region(k, t, 0, 2, UINT64_MAX, 100000), 0);
    assert_int_equal(kit_pages(k, t, 0, 5000, 20000, 'b'), 0);
    assert_int_equal(kit_pages(k, t, 0, 60000, 10000, 0), 0);
    assert_int_equal(kit_commit(k, t), 0);
    struct store_pin *two = pin_it(k, 2, 100000);
    assert_int_equal(kit_write(k, 0, 3, 200000, 'c'), 0);
    expect_pinned(k, one, 0, 100000, 'a');
    expect_pinned(k, two, 0, 5000, 'a');
    expect_pinned(k, two, 5000, 25000, 'b');
    expect_pinned(k, two, 60000, 70000, 0);
    expect_pinned(k, two, 70000, 100000, 'a');
    int err;
    struct buf *b = kit_pin_read(k, one, 99990, 100, &err);
    assert_int_equal(b->len, 10);
    buf_drop(b);
    b = kit_pin_read(k, one, 100000, 100, &err);
    assert_int_equal(b->len, 0);
    buf_drop(b);
    store_unpin(one);
    expect_pinned(k, two, 5000, 25000, 'b');
    store_unpin(two);
    assert_int_equal(kit_byte(k, "r", 0), 'c');
}

static void survives_truncation_and_removal(void **state)
{
    struct kit *k = *state;
    assert_int_equal(kit_write(k, 0, 1, 50001, 'a'), 0);
    struct store_pin *one = pin_it(k, 1, 50001);
    struct store_txn *t = kit_txn(k);
    assert_int_equal(kit_region(k, t, 0, 2, 10, 60000), 0);
    assert_int_equal(kit_commit(k, t), 0);
    expect_pinned(k, one, 0, 50001, 'a');
    struct store_pin *two = pin_it(k, 2, 60000);
    t = kit_txn(k);
    assert_int_equal(kit_op(k, t, FRAME_OP_UNLINK, 0, 0), 0);
    assert_int_equal(kit_commit(k, t), 0);
    assert_int_equal(kit_write(k, 0, 1, 70000, 'z'), 0);
    expect_pinned(k, one, 0, 50001, 'a');
    expect_pinned(k, two, 0, 10, 'a');
    expect_pinned(k, two, 10, 60000, 0);
    store_unpin(one);
    store_unpin(two);
    assert_int_equal(kit_byte(k, "r", 0), 'z');
}

/* Pinned while epochs are durable but not in the file yet, and others on their way. */
static void pins_in_a_row_of_epochs(void **state)
{
    struct kit *k = *state;
    struct told told[30] = {0};
    struct store_pin *pins[30] = {0};
    uint64_t epochs[30];
    for (int i = 0; i < 30; i++) {
        struct store_txn *t = kit_txn(k);
        if (!i)
            assert_int_equal(kit_op(k, t, FRAME_OP_CREATE, 0, 0), 0);
        assert_int_equal(kit_region(k, t, 0, (uint64_t)i + 1, UINT64_MAX, 50000), 0);
        assert_int_equal(kit_pages(k, t, 0, 0, 50000, i + 1), 0);
        store_txn_commit(t, kit_durable, &told[i]);
    }
    for (int i = 0; i < 30; i++) {
        assert_int_equal(kit_wait(k, &told[i]), 0);
        struct frame_entry e;
        assert_int_equal(store_pin(k->s, "r", &pins[i], &e), 0);
        assert_true(e.epoch > (uint64_t)i);
        epochs[i] = e.epoch;
    }
    for (int i = 0; i < 30; i++) {
        expect_pinned(k, pins[i], 0, 50000, (int)epochs[i]);
        store_unpin(pins[i]);
    }
}

static void beyond_the_budget_says_so(void **state)
{
    struct kit *k = *state;
    k->s->limits.pin_budget = 100 << 10;
    assert_int_equal(kit_write(k, 0, 1, 300000, 'a'), 0);
    struct store_pin *pin = pin_it(k, 1, 300000);
    struct store_txn *t = kit_txn(k);
    assert_int_equal(kit_region(k, t, 0, 2, UINT64_MAX, 300000), 0);
    assert_int_equal(kit_pages(k, t, 0, 0, 50000, 'b'), 0);
    assert_int_equal(kit_commit(k, t), 0);
    expect_pinned(k, pin, 0, 300000, 'a');
    assert_int_equal(kit_write(k, 0, 3, 300000, 'c'), 0);
    assert_int_equal(kit_byte(k, "r", 0), 'c'); /* applied */
    int err;
    assert_null(kit_pin_read(k, pin, 0, 10, &err));
    assert_int_equal(err, -ENOBUFS);
    store_unpin(pin);
}

static void holes_cost_no_budget(void **state)
{
    struct kit *k = *state;
    struct store_txn *t = kit_txn(k);
    assert_int_equal(kit_op(k, t, FRAME_OP_CREATE, 0, 0), 0);
    assert_int_equal(kit_region(k, t, 0, 1, UINT64_MAX, 1ull << 33), 0);
    assert_int_equal(kit_pages(k, t, 0, (1ull << 32) + 4096, 4096, 'h'), 0);
    assert_int_equal(kit_commit(k, t), 0);
    struct store_pin *pin = pin_it(k, 1, 1ull << 33);
    t = kit_txn(k);
    assert_int_equal(kit_region(k, t, 0, 2, 0, 4096), 0);
    assert_int_equal(kit_commit(k, t), 0);
    assert_int_equal(kit_size(k, "r"), 4096);
    assert_int_equal(kit_byte(k, "r", 0), 0);
    expect_pinned(k, pin, 1ull << 32, (1ull << 32) + 4096, 0);
    expect_pinned(k, pin, (1ull << 32) + 4096, (1ull << 32) + 8192, 'h');
    expect_pinned(k, pin, (1ull << 33) - 100, 1ull << 33, 0);
    store_unpin(pin);
}

/* ---- hash trees ---- */

#define MODEL_PAGES 700u /* three levels, and not all of any node */

/* What a region is, page by page, and its tree computed the plain way. */
struct model {
    uint64_t size;
    uint8_t fill[MODEL_PAGES]; /* every byte of a page is this */
};

static uint64_t model_pages(const struct model *m)
{
    return (m->size + FRAME_PAGE - 1) / FRAME_PAGE;
}

static void model_node(const struct model *m, unsigned level, uint64_t i, uint8_t *to)
{
    uint8_t of[16 * 16], page[FRAME_PAGE];
    XXH128_canonical_t c;
    memset(to, 0, 16);
    if (!level) {
        uint64_t left = i < model_pages(m) ? m->size - i * FRAME_PAGE : 0;
        if (!left || !m->fill[i])
            return;
        memset(page, 0, sizeof page);
        memset(page, m->fill[i], left < FRAME_PAGE ? left : FRAME_PAGE);
        XXH128_canonicalFromHash(&c, XXH3_128bits(page, sizeof page));
        memcpy(to, &c, 16);
        return;
    }
    bool zeros = true;
    for (unsigned k = 0; k < 16; k++)
        model_node(m, level - 1, i * 16 + k, of + k * 16);
    for (unsigned k = 0; k < sizeof of; k++)
        zeros = zeros && !of[k];
    if (zeros)
        return;
    XXH128_canonicalFromHash(&c, XXH3_128bits(of, sizeof of));
    memcpy(to, &c, 16);
}

static struct buf *pin_hash(struct kit *k, struct store_pin *pin, unsigned level, uint64_t first, uint32_t count,
                            bool fresh, int *err)
{
    struct told told = {0};
    store_pin_hash(pin, level, first, count, fresh, kit_read_done, &told);
    *err = kit_wait(k, &told);
    return told.data;
}

static void expect_tree(struct kit *k, struct store_pin *pin, const struct model *m, bool fresh)
{
    static const unsigned order[] = {3, 0, 2, 1, 4, 13};
    for (unsigned n = 0; n < sizeof order / sizeof *order; n++) {
        unsigned level = order[n];
        uint64_t nodes = (model_pages(m) + (1ull << 4 * level) - 1) >> 4 * level;
        int err;
        struct buf *b = pin_hash(k, pin, level, 0, FRAME_HASHES_MAX, fresh, &err);
        assert_int_equal(err, 0);
        assert_int_equal(b->len, nodes * 16);
        for (uint64_t i = 0; i < nodes; i++) {
            uint8_t want[16];
            if (level < 4)
                model_node(m, level, i, want);
            if (level < 4 && memcmp(want, b->data + i * 16, 16))
                fail_msg("level %u node %llu%s", level, (unsigned long long)i, fresh ? " (fresh)" : "");
        }
        buf_drop(b);
        b = pin_hash(k, pin, level, nodes, 5, fresh, &err);
        assert_int_equal(err, 0);
        assert_int_equal(b->len, 0);
        buf_drop(b);
    }
}

static unsigned pick(unsigned *seed, unsigned below)
{
    *seed = *seed * 1103515245u + 12345u;
    return (*seed >> 16) % below;
}

/* An epoch of a few changes to both: whole pages, zeros, sizes. */
static void change(struct kit *k, struct model *m, uint64_t epoch, unsigned *seed)
{
    struct store_txn *t = kit_txn(k);
    uint64_t min = UINT64_MAX, size = m->size;
    if (epoch == 1)
        assert_int_equal(kit_op(k, t, FRAME_OP_CREATE, 0, 0), 0);
    if (epoch == 1 || !pick(seed, 3)) {
        size = 1 + pick(seed, MODEL_PAGES * FRAME_PAGE - 1);
        if (epoch > 1 && !pick(seed, 2))
            min = pick(seed, (unsigned)size) / FRAME_PAGE * FRAME_PAGE;
    }
    uint64_t kept = min < size ? min : size;
    for (uint64_t p = kept / FRAME_PAGE; p < MODEL_PAGES; p++) /* what was cut off, or is new, is zeros */
        if (p * FRAME_PAGE >= kept || p * FRAME_PAGE >= m->size)
            m->fill[p] = 0;
    uint64_t old = m->size;
    m->size = size;
    assert_int_equal(kit_region(k, t, 0, epoch, min, size), 0);
    if (old % FRAME_PAGE && old / FRAME_PAGE < model_pages(m)) { /* it may go on: the model knows whole pages only */
        m->fill[old / FRAME_PAGE] = 0;
        assert_int_equal(kit_pages(k, t, 0, old / FRAME_PAGE * FRAME_PAGE, FRAME_PAGE, 0), 0);
    }
    for (unsigned n = pick(seed, 6); n; n--) {
        uint64_t page = pick(seed, (unsigned)model_pages(m));
        unsigned run = 1 + pick(seed, 14), fill = pick(seed, 4) ? 1 + pick(seed, 250) : 0;
        if (!fill)
            run *= 16;
        if (page + run > MODEL_PAGES)
            run = MODEL_PAGES - (unsigned)page;
        assert_int_equal(kit_pages(k, t, 0, page * FRAME_PAGE, run * FRAME_PAGE, (int)fill), 0);
        for (unsigned i = 0; i < run && page + i < model_pages(m); i++)
            m->fill[page + i] = (uint8_t)fill;
    }
    assert_int_equal(kit_commit(k, t), 0);
}

/* Trees asked for at random while epochs go on: each as of its pin, first asked early or late. */
static void trees_are_as_of_the_pin(void **state)
{
    struct kit *k = *state;
    struct model now = {0}, of[8] = {0};
    struct store_pin *pins[8] = {0};
    unsigned seed = 7;
    k->s->limits.pin_budget = 16u << 20;
    for (uint64_t epoch = 1; epoch <= 120; epoch++) {
        change(k, &now, epoch, &seed);
        unsigned i = pick(&seed, 8);
        if (pins[i]) {
            expect_tree(k, pins[i], &of[i], !pick(&seed, 4));
            store_unpin(pins[i]);
        }
        pins[i] = pin_it(k, epoch, now.size);
        of[i] = now;
        if (pick(&seed, 2))
            expect_tree(k, pins[i], &of[i], false);
    }
    for (unsigned i = 0; i < 8; i++)
        if (pins[i]) {
            expect_tree(k, pins[i], &of[i], false);
            store_unpin(pins[i]);
        }
}

/* Asked at once, of two pins, while an epoch is on its way: no answer is a mix. */
static void trees_while_an_epoch_is_applied(void **state)
{
    struct kit *k = *state;
    struct model m = {.size = 600 * FRAME_PAGE};
    memset(m.fill, 'a', sizeof m.fill);
    k->s->limits.pin_budget = 16u << 20;
    assert_int_equal(kit_write(k, 0, 1, m.size, 'a'), 0);
    for (uint64_t epoch = 2; epoch < 12; epoch++) {
        struct store_pin *pin = pin_it(k, epoch - 1, m.size);
        struct told told[6] = {0}, durable = {0};
        for (unsigned i = 0; i < 3; i++)
            store_pin_hash(pin, 3, 0, 1, i == 1, kit_read_done, &told[i]);
        struct store_txn *t = kit_txn(k);
        assert_int_equal(kit_region(k, t, 0, epoch, UINT64_MAX, m.size), 0);
        for (unsigned at = 0; at < 600; at += 15)
            assert_int_equal(kit_pages(k, t, 0, at * FRAME_PAGE, FRAME_DATA_MAX, 'a' + (int)epoch), 0);
        store_txn_commit(t, kit_durable, &durable);
        for (unsigned i = 3; i < 6; i++)
            store_pin_hash(pin, 3, 0, 1, i == 4, kit_read_done, &told[i]);
        uint8_t want[16];
        model_node(&m, 3, 0, want);
        for (unsigned i = 0; i < 6; i++) {
            assert_int_equal(kit_wait(k, &told[i]), 0);
            assert_memory_equal(told[i].data->data, want, 16);
            buf_drop(told[i].data);
        }
        assert_int_equal(kit_wait(k, &durable), 0);
        store_unpin(pin);
        memset(m.fill, 'a' + (int)epoch, sizeof m.fill);
    }
}

static void write_behind_its_back(struct region *r, uint64_t offset, uint8_t byte)
{
    assert_int_equal(pwrite(r->fd, &byte, 1, (off_t)offset), 1);
}

static void fresh_reads_again(void **state)
{
    struct kit *k = *state;
    struct model m = {.size = 40 * FRAME_PAGE};
    memset(m.fill, 'a', 40);
    assert_int_equal(kit_write(k, 0, 1, m.size, 'a'), 0);
    struct store_pin *pin = pin_it(k, 1, m.size);
    expect_tree(k, pin, &m, false);
    write_behind_its_back(pin->r, 20 * FRAME_PAGE, 'x');
    expect_tree(k, pin, &m, false); /* nobody told it */
    int err;
    struct buf *b = pin_hash(k, pin, 1, 0, 1, true, &err); /* does not look there */
    buf_drop(b);
    expect_tree(k, pin, &m, false);
    b = pin_hash(k, pin, 1, 1, 1, true, &err);
    uint8_t want[16];
    model_node(&m, 1, 1, want);
    assert_memory_not_equal(b->data, want, 16);
    buf_drop(b);
    b = pin_hash(k, pin, 0, 20, 1, false, &err); /* it knows now */
    model_node(&m, 0, 20, want);
    assert_memory_not_equal(b->data, want, 16);
    buf_drop(b);
    store_unpin(pin);
}

static void checkpointed(void *arg)
{
    *(bool *)arg = true;
}

/* A checkpoint closes the file of a region that nobody has pinned; its tree stays. */
static void trees_of_a_region_at_rest(void **state)
{
    struct kit *k = *state;
    struct model m = {.size = 3 * FRAME_PAGE, .fill = {'a', 'a', 'a'}};
    bool done = false;
    assert_int_equal(kit_write(k, 0, 1, m.size, 'a'), 0);
    struct store_pin *pin = pin_it(k, 1, m.size);
    expect_tree(k, pin, &m, false);
    store_unpin(pin);
    store_checkpoint(k->s, checkpointed, &done);
    while (!done)
        uv_run(&k->loop, UV_RUN_ONCE);
    pin = pin_it(k, 1, m.size);
    expect_tree(k, pin, &m, true);
    store_unpin(pin);
}

/* A delta that did not come out right: what is in the file is looked at anew. */
static void a_refused_delta_doubts_the_tree(void **state)
{
    struct kit *k = *state;
    assert_int_equal(kit_write(k, 0, 1, 40 * FRAME_PAGE, 'a'), 0);
    struct store_pin *pin = pin_it(k, 1, 40 * FRAME_PAGE);
    int err;
    struct buf *before = pin_hash(k, pin, 2, 0, 1, false, &err);
    write_behind_its_back(pin->r, 20 * FRAME_PAGE, 'x');
    struct buf *b = buf_new(8 + 16 + FRAME_DELTA_HEAD + FRAME_DELTA_BLOCK);
    struct frame_extent e = {.offset = 0, .len = FRAME_PAGE, .kind = FRAME_PAGES_DELTA};
    b->len = (uint32_t)frame_pages_put(b->data, b->cap, 0, &e, 1);
    memset(b->data + b->len, 7, FRAME_DELTA_HEAD + FRAME_DELTA_BLOCK);
    put_u32(b->data + b->len + 16, 1);
    b->len += FRAME_DELTA_HEAD + FRAME_DELTA_BLOCK;
    struct store_txn *t = kit_txn(k);
    assert_int_equal(kit_region(k, t, 0, 2, UINT64_MAX, 40 * FRAME_PAGE), 0);
    assert_int_equal(kit_add(k, t, FRAME_PAGES, b), 0);
    assert_int_equal(kit_commit(k, t), -EBADMSG);
    struct buf *after = pin_hash(k, pin, 2, 0, 1, false, &err);
    assert_int_equal(err, 0);
    assert_memory_not_equal(before->data, after->data, 16);
    buf_drop(before);
    buf_drop(after);
    store_unpin(pin);
}

/* Holes are neither read nor kept. */
static void trees_of_holes(void **state)
{
    struct kit *k = *state;
    struct store_txn *t = kit_txn(k);
    assert_int_equal(kit_op(k, t, FRAME_OP_CREATE, 0, 0), 0);
    assert_int_equal(kit_region(k, t, 0, 1, UINT64_MAX, 1ull << 40), 0);
    assert_int_equal(kit_commit(k, t), 0);
    struct store_pin *pin = pin_it(k, 1, 1ull << 40);
    int err;
    struct buf *b = pin_hash(k, pin, 7, 0, 1, false, &err);
    static const uint8_t zeros[16];
    assert_memory_equal(b->data, zeros, 16);
    buf_drop(b);
    t = kit_txn(k);
    assert_int_equal(kit_region(k, t, 0, 2, UINT64_MAX, 1ull << 40), 0);
    assert_int_equal(kit_pages(k, t, 0, (1ull << 39) + 4096, 4096, 'h'), 0);
    assert_int_equal(kit_commit(k, t), 0);
    b = pin_hash(k, pin, 7, 0, 1, false, &err);
    assert_memory_equal(b->data, zeros, 16);
    buf_drop(b);
    struct store_pin *two = pin_it(k, 2, 1ull << 40);
    b = pin_hash(k, two, 7, 0, 1, false, &err);
    assert_memory_not_equal(b->data, zeros, 16);
    buf_drop(b);
    store_unpin(pin);
    store_unpin(two);
}

/* Later epochs go on in the page in which the pinned one ended. */
static void trees_end_within_a_page(void **state)
{
    struct kit *k = *state;
    struct model m = {.size = FRAME_PAGE + 100, .fill = {'a', 'a'}};
    assert_int_equal(kit_write(k, 0, 1, m.size, 'a'), 0);
    struct store_pin *pin = pin_it(k, 1, m.size);
    expect_tree(k, pin, &m, false);
    struct store_txn *t = kit_txn(k);
    assert_int_equal(kit_region(k, t, 0, 2, UINT64_MAX, 5 * FRAME_PAGE), 0);
    assert_int_equal(kit_pages(k, t, 0, FRAME_PAGE + 200, 100, 'b'), 0);
    assert_int_equal(kit_commit(k, t), 0);
    int err;
    struct store_pin *two = pin_it(k, 2, 5 * FRAME_PAGE);
    buf_drop(pin_hash(k, two, 0, 0, 5, false, &err)); /* the region's tree has the page as it is now */
    expect_tree(k, pin, &m, false);
    store_unpin(pin);
    store_unpin(two);
}

static void trees_beyond_the_budget(void **state)
{
    struct kit *k = *state;
    k->s->limits.pin_budget = 100 << 10;
    assert_int_equal(kit_write(k, 0, 1, 300000, 'a'), 0);
    struct store_pin *pin = pin_it(k, 1, 300000);
    int err;
    struct buf *b = pin_hash(k, pin, 0, 0, 10, false, &err);
    assert_int_equal(err, 0);
    buf_drop(b);
    assert_int_equal(kit_write(k, 0, 2, 300000, 'c'), 0);
    assert_int_equal(kit_byte(k, "r", 0), 'c'); /* applied */
    assert_null(pin_hash(k, pin, 0, 0, 10, false, &err));
    assert_int_equal(err, -ENOBUFS);
    assert_null(pin_hash(k, pin, 2, 0, 1, true, &err));
    assert_int_equal(err, -ENOBUFS);
    store_unpin(pin);
}

/* Reads see what is durable, zeros behind the end, and nothing is kept aside; until another than the owner writes. */
static void a_live_pin_follows_its_owner(void **state)
{
    struct kit *k = *state;
    int err;
    assert_int_equal(kit_write(k, 0, 1, 100000, 'a'), 0);
    struct store_pin *pin = pin_it(k, 1, 100000), *other = pin_it(k, 1, 100000);
    assert_int_equal(store_pin_live(pin, &k->me), 0);
    assert_int_equal(store_pin_live(other, &(struct id){{0x77}}), 0);
    expect_pinned(k, pin, 0, 100000, 'a');
    expect_pinned(k, other, 4096, 8192, 'a');
    assert_int_equal(kit_write(k, 0, 2, 50000, 'b'), 0);
    expect_pinned(k, pin, 0, 50000, 'b');
    expect_pinned(k, pin, 50000, 200000, 0);
    assert_false(pin->behind || pin->saved);
    struct buf *b = kit_pin_read(k, other, 0, 4096, &err);
    assert_true(!b && err == -ESTALE);
    assert_int_equal(kit_write(k, 0, 3, 300000, 'c'), 0);
    expect_pinned(k, pin, 0, 300000, 'c');
    store_unpin(other);
    store_unpin(pin);
}

struct told_extents {
    bool told;
    int err;
    struct buf *b;
};

static void on_extents(void *arg, int err, struct buf *b)
{
    *(struct told_extents *)arg = (struct told_extents){true, err, b};
}

/* The pin's map from..1 MiB: data in the 64 KiB at `at`, holes else, but for what may be either up to `loose`. (Less than 64 KiB a file system may fill up.) */
#define MAPPED 65536u
static void expect_map(struct kit *k, struct store_pin *pin, uint64_t from, uint64_t at, uint64_t loose)
{
    struct told_extents t = {0};
    const uint64_t end = 1 << 20, stop = at + MAPPED;
    assert_int_equal(store_pin_extents(pin, from, (uint32_t)(end - from), on_extents, &t), 0);
    while (!t.told)
        uv_run(&k->loop, UV_RUN_ONCE);
    assert_int_equal(t.err, 0);
    const struct store_extent *e = (const void *)t.b->data;
    size_t n = t.b->len / sizeof *e;
    for (uint64_t i = from; i < end; i += FRAME_PAGE) {
        if (i >= e->end) {
            e++;
            assert_true(--n);
        }
        if (e->hole ? i >= at && i < stop : i < at || i >= (loose > stop ? loose : stop))
            fail_msg("page at %llu: %s", (unsigned long long)i, e->hole ? "a hole" : "data");
    }
    assert_int_equal(n, 1);
    assert_int_equal(e->end, end);
    buf_drop(t.b);
}

/* Whether it can be read without waiting: what it is, then. */
static bool expect_now(struct store_pin *pin)
{
    struct buf *now = store_pin_read_now(pin, 524288 - 10, 20, 0);
    for (uint32_t i = 0; now && i < 20; i++)
        assert_int_equal(now->data[i], i < 10 ? 0 : 'b');
    bool there = now;
    buf_drop(now);
    return there;
}

static void maps_are_as_of_the_pin(void **state)
{
    struct kit *k = *state;
    struct store_txn *t = kit_txn(k);
    assert_int_equal(kit_op(k, t, FRAME_OP_CREATE, 0, 0), 0);
    assert_int_equal(kit_region(k, t, 0, 1, UINT64_MAX, 1 << 20), 0);
    for (uint64_t at = 0; at < MAPPED; at += MAPPED / 2)
        assert_int_equal(kit_pages(k, t, 0, 65536 + at, MAPPED / 2, 'a'), 0);
    assert_int_equal(kit_commit(k, t), 0);
    struct store_pin *one = pin_it(k, 1, 1 << 20);
    expect_map(k, one, 0, 65536, 0);
    expect_map(k, one, 69632, 65536, 0);
    t = kit_txn(k);
    assert_int_equal(kit_region(k, t, 0, 2, UINT64_MAX, 1 << 20), 0);
    assert_int_equal(kit_pages(k, t, 0, 0, 262144, 0), 0);
    for (uint64_t at = 0; at < MAPPED; at += MAPPED / 2)
        assert_int_equal(kit_pages(k, t, 0, 524288 + at, MAPPED / 2, 'b'), 0);
    assert_int_equal(kit_commit(k, t), 0);
    struct store_pin *two = pin_it(k, 2, 1 << 20);
    expect_now(two); /* it may not be in the file yet */
    expect_map(k, two, 0, 524288, 0);
    expect_map(k, one, 0, 65536, 262144); /* kept aside in pieces of that */
    assert_true(expect_now(two) || !k->mem);
    store_unpin(one);
    store_unpin(two);
}

static void no_region_no_pin(void **state)
{
    struct kit *k = *state;
    struct store_pin *pin;
    struct frame_entry e;
    assert_int_equal(store_pin(k->s, "none", &pin, &e), -ENOENT);
    assert_int_equal(store_pin(k->s, "../none", &pin, &e), -EINVAL);
}

#define BOTH(f)                                                                                                        \
    cmocka_unit_test_setup_teardown(f, setup_file, teardown), cmocka_unit_test_setup_teardown(f, setup_mem, teardown)

int main(void)
{
    const struct CMUnitTest tests[] = {
        BOTH(survives_changes),
        BOTH(tells_changes),
        BOTH(tells_many_changes),
        BOTH(survives_truncation_and_removal),
        BOTH(pins_in_a_row_of_epochs),
        BOTH(beyond_the_budget_says_so),
        BOTH(holes_cost_no_budget),
        BOTH(trees_are_as_of_the_pin),
        BOTH(trees_while_an_epoch_is_applied),
        BOTH(fresh_reads_again),
        BOTH(trees_of_a_region_at_rest),
        BOTH(a_refused_delta_doubts_the_tree),
        BOTH(trees_end_within_a_page),
        BOTH(trees_of_holes),
        BOTH(trees_beyond_the_budget),
        BOTH(a_live_pin_follows_its_owner),
        BOTH(maps_are_as_of_the_pin),
        BOTH(no_region_no_pin),
    };
    return cmocka_run_group_tests(tests, NULL, NULL);
}
