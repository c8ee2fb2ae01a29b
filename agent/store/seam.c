/* The calls of store.h, handed to the store's ops. */
#include "agent/store/seam.h"

#include <assert.h>

static const struct store_ops *ops_of(const struct store *s)
{
    const struct store_ops *const *ops = (const struct store_ops *const *)(const void *)s;
    return *ops;
}

/* A transaction's or a pin's. */
static const struct store_ops *ops_behind(const void *part)
{
    assert(part);
    struct store *const *s = part;
    return ops_of(*s);
}

void store_close(struct store *s, void (*done)(void *arg), void *arg)
{
    assert(done);
    ops_of(s)->close(s, done, arg);
}

const char *store_dir(const struct store *s)
{
    return ops_of(s)->dir(s);
}

int store_attach(struct store *s, const struct store_attach *a, struct frame_attached *to, store_attach_done *done,
                 void *arg)
{
    assert(a->name && a->identity && a->host && done);
    return ops_of(s)->attach(s, a, to, done, arg);
}

void store_lease_drop(struct store *s, const char *name, const struct id *identity)
{
    ops_of(s)->lease_drop(s, name, identity);
}

void store_lease_seen(struct store *s, const struct id *identity)
{
    ops_of(s)->lease_seen(s, identity);
}

struct store_txn *store_txn_new(struct store *s, const struct id *holder, struct store_names names,
                                void (*spilled)(void *arg, size_t bytes), void *arg)
{
    assert(names.name_of);
    return ops_of(s)->txn_new(s, holder, names, spilled, arg);
}

void store_txn_chain(struct store_txn *t, const void *chain)
{
    assert(chain);
    ops_behind(t)->txn_chain(t, chain);
}

void store_txn_writer(struct store_txn *t, const struct id *writer)
{
    ops_behind(t)->txn_writer(t, writer);
}

int store_txn_add(struct store_txn *t, uint8_t type, struct buf *payload, char error[STORE_ERROR])
{
    assert(payload);
    int err = ops_behind(t)->txn_add(t, type, payload, error);
    assert(err <= 0);
    return err;
}

bool store_txn_received(struct store_txn *t, void (*received)(void *arg))
{
    return ops_behind(t)->txn_received(t, received);
}

void store_txn_commit(struct store_txn *t, void (*durable)(void *arg, int err, const char *text), void *arg)
{
    ops_behind(t)->txn_commit(t, durable, arg);
}

void store_txn_abort(struct store_txn *t)
{
    ops_behind(t)->txn_abort(t);
}

int store_ask_list(struct store *s, store_each *each, void (*done)(void *arg, int err, const char *text), void *arg)
{
    assert(each);
    return ops_of(s)->ask_list(s, each, done, arg);
}

int store_ask_pin(struct store *s, const char *name, struct store_pin **pin, struct frame_entry *e,
                  store_pin_done *done, void *arg)
{
    return ops_of(s)->ask_pin(s, name, pin, e, done, arg);
}

int store_pin_live(struct store_pin *pin, const struct id *owner)
{
    return ops_behind(pin)->pin_live(pin, owner);
}

void store_pin_read(struct store_pin *pin, uint64_t offset, uint32_t len, uint32_t room,
                    void (*done)(void *arg, int err, struct buf *data), void *arg)
{
    assert(done);
    ops_behind(pin)->pin_read(pin, offset, len, room, done, arg);
}

struct buf *store_pin_read_now(struct store_pin *pin, uint64_t offset, uint32_t len, uint32_t room)
{
    return ops_behind(pin)->pin_read_now(pin, offset, len, room);
}

void store_pin_hash(struct store_pin *pin, unsigned level, uint64_t first, uint32_t count, bool fresh,
                    void (*done)(void *arg, int err, struct buf *data), void *arg)
{
    assert(done);
    ops_behind(pin)->pin_hash(pin, level, first, count, fresh, done, arg);
}

int store_pin_extents(struct store_pin *pin, uint64_t offset, uint32_t len,
                      void (*done)(void *arg, int err, struct buf *extents), void *arg)
{
    assert(done);
    return ops_behind(pin)->pin_extents(pin, offset, len, done, arg);
}

int store_pin_changed(struct store_pin *pin, struct store_pin *later,
                      void (*done)(void *arg, int err, struct buf *data), void *arg)
{
    assert(done && ops_behind(pin) == ops_behind(later));
    return ops_behind(pin)->pin_changed(pin, later, done, arg);
}

void store_unpin(struct store_pin *pin)
{
    ops_behind(pin)->unpin(pin);
}

void store_remove(struct store *s, const char *name, const struct id *identity, bool force,
                  void (*done)(void *arg, int err, const char *text), void *arg)
{
    assert(done);
    ops_of(s)->remove(s, name, identity, force, done, arg);
}
