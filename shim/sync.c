/* Sync points: a request that names a slot goes to the agent, the local call runs, and the thread sleeps on the slot
 * until the agent has answered.
 *
 * A waiting thread holds no lock and leaves signals as they are. It looks every 100 ms whether the agent still lives. A
 * dead agent is replaced by the first thread that notices, everything is announced again, and each waiting thread
 * repeats its request. The agent itself keeps MEMSYNC_TIMEOUT; the limit here is for an agent that does not even count
 * `beats`. */
#include "shim/shim.h"

#define SLICE_MS 100u
#define GRACE_MS 2000u

static uint8_t abandoned[SHARED_SLOTS];

static int slot_take(struct shared *s)
{
    static uint32_t hint;
    uint32_t from = __atomic_add_fetch(&hint, 1, __ATOMIC_RELAXED);
    for (uint32_t i = 0; i < SHARED_SLOTS; i++) {
        uint32_t n = (from + i) % SHARED_SLOTS, seen = __atomic_load_n(&s->slots[n].state, __ATOMIC_ACQUIRE);
        if (seen == SHARED_DONE && abandoned[n]) {
            abandoned[n] = 0;
            seen = SHARED_FREE;
            __atomic_store_n(&s->slots[n].state, SHARED_FREE, __ATOMIC_SEQ_CST);
        }
        if (seen == SHARED_FREE && __atomic_compare_exchange_n(&s->slots[n].state, &seen, SHARED_WAITING, false,
                                                               __ATOMIC_SEQ_CST, __ATOMIC_RELAXED)) {
            __atomic_store_n(&abandoned[n], 0, __ATOMIC_RELEASE); /* what an earlier agent owed is nothing to this one */
            return (int)n;
        }
    }
    return -EAGAIN;
}

uint32_t sync_slot_unheard(void)
{
    int n = slot_take(client_shared());
    if (n < 0)
        return CONTROL_NO_SLOT;
    __atomic_store_n(&abandoned[n], 1, __ATOMIC_RELEASE);
    return (uint32_t)n;
}

/* Lock held. */
static int ticket_send(struct ticket *t)
{
    t->sent = false;
    if (!client_up())
        return -ENOTCONN;
    t->shared = client_shared();
    t->generation = client_generation;
    int slot = slot_take(t->shared);
    if (slot < 0)
        return slot;
    t->slot = (uint32_t)slot;
    size_t n = 0;
    if (t->kind == TICKET_SYNC) {
        struct control_sync m = {.slot = t->slot, .region = t->region};
        n = control_sync_put(client_buffer, sizeof client_buffer, &m);
    } else if (t->kind == TICKET_RETIRE) {
        struct control_retire m = {.slot = t->slot, .publish = t->publish, .addr = t->addr, .len = t->len};
        n = control_retire_put(client_buffer, sizeof client_buffer, &m);
    } else if (t->kind == TICKET_ASK) {
        n = t->put(client_buffer, sizeof client_buffer, t->slot, t->of);
    } else {
        struct control_bye m = {.slot = t->slot};
        n = control_bye_put(client_buffer, sizeof client_buffer, &m);
    }
    int rc = client_send(client_buffer, n, NULL, 0);
    t->sent = !rc;
    return rc;
}

static void ticket_begin(struct ticket *t)
{
    struct held h = shim_lock();
    if (ticket_send(t) == -ENOTCONN)
        t->sent = false;
    shim_unlock(&h);
}

void sync_begin(struct ticket *t, uint32_t region)
{
    files_mark_streams(region);
    *t = (struct ticket){.kind = TICKET_SYNC, .region = region};
    ticket_begin(t);
}

void sync_begin_retire(struct ticket *t, uint64_t addr, uint64_t len, bool publish)
{
    *t = (struct ticket){.kind = TICKET_RETIRE, .publish = publish, .addr = addr, .len = len};
    ticket_begin(t);
}

void sync_abandon(void *ticket)
{
    struct ticket *t = ticket;
    if (t->kind == TICKET_NONE || !t->sent || t->shared != client_shared())
        return;
    __atomic_store_n(&abandoned[t->slot], 1, __ATOMIC_RELEASE);
}

/* 0 with the agent's answer in *result; -EPIPE when the agent is gone, -ETIMEDOUT when it is stuck. */
static int slot_wait(struct ticket *t, int *result)
{
    struct shared_slot *slot = &t->shared->slots[t->slot];
    uint32_t beats = __atomic_load_n(&t->shared->beats, __ATOMIC_RELAXED);
    uint64_t since = raw_now_ms();
    for (;;) {
        if (__atomic_load_n(&slot->state, __ATOMIC_ACQUIRE) == SHARED_DONE) {
            *result = slot->result;
            __atomic_store_n(&slot->state, SHARED_FREE, __ATOMIC_RELEASE);
            return 0;
        }
        raw_futex_wait(&slot->state, SHARED_WAITING, SLICE_MS);
        if (__atomic_load_n(&slot->state, __ATOMIC_ACQUIRE) == SHARED_DONE)
            continue;
        client_notices(); /* what the wait is for, when it is long */
        if (t->generation != __atomic_load_n(&client_generation, __ATOMIC_SEQ_CST) || client_hung_up())
            return __atomic_load_n(&slot->state, __ATOMIC_ACQUIRE) == SHARED_DONE ? slot_wait(t, result) : -EPIPE;
        uint32_t now_beats = __atomic_load_n(&t->shared->beats, __ATOMIC_RELAXED);
        if (now_beats != beats) {
            beats = now_beats;
            since = raw_now_ms();
        } else if (shim.timeout_ms < UINT64_MAX - GRACE_MS && raw_now_ms() - since > shim.timeout_ms + GRACE_MS) {
            return -ETIMEDOUT;
        }
    }
}

/* What MEMSYNC_ON_LOSS says when the agent cannot answer: 1 to try again, else the sync point's result. */
static int on_loss(const char *what)
{
    switch (shim.loss) {
    case CONTROL_LOSS_BLOCK:
        say_once(SAY_WARN, "%s; waiting for it, as MEMSYNC_ON_LOSS=block says", what);
        raw_sleep_ms(SLICE_MS);
        return 1;
    case CONTROL_LOSS_FAIL:
        say_once(SAY_WARN, "%s; sync points fail, as MEMSYNC_ON_LOSS=fail says", what);
        return -EIO;
    default:
        say_once(SAY_WARN, "%s; the program runs on, and what it changes is sent when an agent is there again", what);
        return 0;
    }
}

/* The agent went: another is found and told everything, and the request repeated. 0, or a negative errno. */
static int repeat(struct ticket *t)
{
    struct held h = shim_lock();
    if (t->sent)
        client_lost(t->generation);
    int rc = ticket_send(t);
    shim_unlock(&h);
    return rc;
}

int sync_end(struct ticket *t)
{
    if (t->kind == TICKET_NONE)
        return 0;
    int saved = errno, result = 0;
    uint64_t until = 0; /* for agents that die again and again on the same request */
    for (;;) {
        int rc = t->sent ? slot_wait(t, &result) : -ENOTCONN;
        if (!rc)
            break;
        uint64_t now = raw_now_ms();
        bool given_up = rc == -ETIMEDOUT || (until && now > until);
        if (!given_up) {
            if (until)
                raw_sleep_ms(SLICE_MS);
            else
                until = shim.timeout_ms < UINT64_MAX - now ? now + shim.timeout_ms : UINT64_MAX;
            if (!repeat(t))
                continue;
        }
        result = on_loss(rc == -ETIMEDOUT ? "the agent does not answer" : "there is no agent");
        if (result <= 0) {
            sync_abandon(t);
            break;
        }
        until = 0; /* it blocks: an agent that comes later is asked, too */
    }
    t->kind = TICKET_NONE;
    client_notices();
    errno = saved;
    return result;
}

int sync_ask(sync_put *put, void *of, uint64_t patience)
{
    struct ticket t = {.kind = TICKET_ASK, .put = put, .of = of};
    int saved = errno, result = -ENOTCONN;
    uint64_t alone = 0; /* since when there is no agent */
    unsigned losses = 0;
    ticket_begin(&t);
    for (;;) {
        int rc = t.sent ? slot_wait(&t, &result) : -ENOTCONN;
        if (!rc)
            break;
        if (rc == -ETIMEDOUT) /* it is there, and silent: there is no other to ask */
            continue;
        if (!t.sent && alone && raw_now_ms() - alone >= patience)
            break;
        alone = t.sent || !alone ? raw_now_ms() : alone;
        if (losses++) /* the first may have died at any time; one after the other is no reason to hurry */
            raw_sleep_ms(SLICE_MS);
        repeat(&t);
    }
    client_notices();
    errno = saved;
    return result;
}

void sync_now(uint32_t region)
{
    struct ticket t;
    sync_begin(&t, region);
    sync_end(&t);
}

void sync_async(uint32_t region)
{
    files_mark_streams(region);
    struct held h = shim_lock();
    if (client_up()) {
        struct control_sync m = {.slot = CONTROL_NO_SLOT, .region = region};
        client_send(client_buffer, control_sync_put(client_buffer, sizeof client_buffer, &m), NULL, 0);
    }
    shim_unlock(&h);
}

void sync_bye(void)
{
    files_mark_streams(0);
    struct ticket t = {.kind = TICKET_BYE};
    ticket_begin(&t);
    sync_end(&t);
}

void shim_publish(void)
{
    if (!shim_active() || !shim_mine() || !__atomic_load_n(&files_open, __ATOMIC_RELAXED))
        return;
    sync_now(0);
}
