/* What a store is to those who fill in one: an ops table, every member mandatory, reached through the calls of store.h
 * (seam.c). store.h says what each does; the meaning of arguments and results is the same here.
 *
 * Every store begins with its ops, every transaction and every pin with the store it is of: that is all the seam knows
 * of them. */
#ifndef STORE_SEAM_H
#define STORE_SEAM_H

#include "agent/store/store.h"

struct store_ops {
    void (*close)(struct store *s, void (*done)(void *arg), void *arg);
    const char *(*dir)(const struct store *s);

    int (*attach)(struct store *s, const struct store_attach *a, struct frame_attached *to, store_attach_done *done,
                  void *arg);
    void (*lease_drop)(struct store *s, const char *name, const struct id *identity);
    void (*lease_seen)(struct store *s, const struct id *identity);

    struct store_txn *(*txn_new)(struct store *s, const struct id *holder, struct store_names names,
                                 void (*spilled)(void *arg, size_t bytes), void *arg);
    void (*txn_chain)(struct store_txn *t, const void *chain);
    void (*txn_writer)(struct store_txn *t, const struct id *writer);
    int (*txn_add)(struct store_txn *t, uint8_t type, struct buf *payload, char error[STORE_ERROR]);
    bool (*txn_received)(struct store_txn *t, void (*received)(void *arg));
    void (*txn_commit)(struct store_txn *t, void (*durable)(void *arg, int err, const char *text), void *arg);
    void (*txn_abort)(struct store_txn *t);

    int (*ask_list)(struct store *s, store_each *each, void (*done)(void *arg, int err, const char *text), void *arg);
    int (*ask_pin)(struct store *s, const char *name, struct store_pin **pin, struct frame_entry *e,
                   store_pin_done *done, void *arg);
    int (*pin_live)(struct store_pin *pin, const struct id *owner);
    void (*pin_read)(struct store_pin *pin, uint64_t offset, uint32_t len, uint32_t room,
                     void (*done)(void *arg, int err, struct buf *data), void *arg);
    struct buf *(*pin_read_now)(struct store_pin *pin, uint64_t offset, uint32_t len, uint32_t room);
    void (*pin_hash)(struct store_pin *pin, unsigned level, uint64_t first, uint32_t count, bool fresh,
                     void (*done)(void *arg, int err, struct buf *data), void *arg);
    int (*pin_extents)(struct store_pin *pin, uint64_t offset, uint32_t len,
                       void (*done)(void *arg, int err, struct buf *extents), void *arg);
    int (*pin_changed)(struct store_pin *pin, struct store_pin *later,
                       void (*done)(void *arg, int err, struct buf *data), void *arg);
    void (*unpin)(struct store_pin *pin);
    void (*remove)(struct store *s, const char *name, const struct id *identity, bool force,
                   void (*done)(void *arg, int err, const char *text), void *arg);
};

extern const struct store_ops volume_store_ops; /* file: and mem: */

#endif
