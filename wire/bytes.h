/* Reading and writing big-endian bytes within fixed bounds.
 *
 * A reader or writer that would cross its end sets its `bad` flag and from then on yields zeros, or writes nothing. A codec does all its
 * steps and looks at the flag once, at the end. No function here allocates, blocks or fails otherwise. */
#ifndef WIRE_BYTES_H
#define WIRE_BYTES_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

static inline void put_u16(uint8_t *p, uint16_t v)
{
    v = __builtin_bswap16(v);
    memcpy(p, &v, sizeof v);
}

static inline void put_u32(uint8_t *p, uint32_t v)
{
    v = __builtin_bswap32(v);
    memcpy(p, &v, sizeof v);
}

static inline void put_u64(uint8_t *p, uint64_t v)
{
    v = __builtin_bswap64(v);
    memcpy(p, &v, sizeof v);
}

static inline uint16_t get_u16(const uint8_t *p)
{
    uint16_t v;
    memcpy(&v, p, sizeof v);
    return __builtin_bswap16(v);
}

static inline uint32_t get_u32(const uint8_t *p)
{
    uint32_t v;
    memcpy(&v, p, sizeof v);
    return __builtin_bswap32(v);
}

static inline uint64_t get_u64(const uint8_t *p)
{
    uint64_t v;
    memcpy(&v, p, sizeof v);
    return __builtin_bswap64(v);
}

struct rd {
    const uint8_t *at, *end;
    bool bad;
};

struct wr {
    uint8_t *start, *at, *end;
    bool bad;
};

static inline struct rd rd_over(const void *data, size_t len)
{
    return (struct rd){.at = data, .end = (const uint8_t *)data + len};
}

static inline struct wr wr_over(void *data, size_t cap)
{
    return (struct wr){.start = data, .at = data, .end = (uint8_t *)data + cap};
}

static inline size_t rd_left(const struct rd *r)
{
    return (size_t)(r->end - r->at);
}

static inline size_t wr_len(const struct wr *w)
{
    return (size_t)(w->at - w->start);
}

/* The next n bytes, or NULL when fewer are left. They stay where they are. */
static inline const uint8_t *rd_take(struct rd *r, size_t n)
{
    if (r->bad || rd_left(r) < n) {
        r->bad = true;
        return NULL;
    }
    const uint8_t *p = r->at;
    r->at += n;
    return p;
}

static inline uint8_t *wr_take(struct wr *w, size_t n)
{
    if (w->bad || (size_t)(w->end - w->at) < n) {
        w->bad = true;
        return NULL;
    }
    uint8_t *p = w->at;
    w->at += n;
    return p;
}

static inline uint8_t rd_u8(struct rd *r)
{
    const uint8_t *p = rd_take(r, 1);
    return p ? *p : 0;
}

static inline uint16_t rd_u16(struct rd *r)
{
    const uint8_t *p = rd_take(r, 2);
    return p ? get_u16(p) : 0;
}

static inline uint32_t rd_u32(struct rd *r)
{
    const uint8_t *p = rd_take(r, 4);
    return p ? get_u32(p) : 0;
}

static inline uint64_t rd_u64(struct rd *r)
{
    const uint8_t *p = rd_take(r, 8);
    return p ? get_u64(p) : 0;
}

static inline void rd_copy(struct rd *r, void *to, size_t n)
{
    const uint8_t *p = rd_take(r, n);
    if (p)
        memcpy(to, p, n);
    else
        memset(to, 0, n);
}

static inline void wr_u8(struct wr *w, uint8_t v)
{
    uint8_t *p = wr_take(w, 1);
    if (p)
        *p = v;
}

static inline void wr_u16(struct wr *w, uint16_t v)
{
    uint8_t *p = wr_take(w, 2);
    if (p)
        put_u16(p, v);
}

static inline void wr_u32(struct wr *w, uint32_t v)
{
    uint8_t *p = wr_take(w, 4);
    if (p)
        put_u32(p, v);
}

static inline void wr_u64(struct wr *w, uint64_t v)
{
    uint8_t *p = wr_take(w, 8);
    if (p)
        put_u64(p, v);
}

static inline void wr_copy(struct wr *w, const void *from, size_t n)
{
    uint8_t *p = wr_take(w, n);
    if (p && n)
        memcpy(p, from, n);
}

/* Strings travel as a u16 length and bytes without a terminator. Reading copies into `to` (cap bytes with the terminator) and sets `bad` when the
 * string does not fit or holds a NUL byte. */
static inline void rd_str(struct rd *r, char *to, size_t cap)
{
    size_t n = rd_u16(r);
    const uint8_t *p = n < cap ? rd_take(r, n) : NULL;
    if (!p || memchr(p, 0, n)) {
        r->bad = true;
        to[0] = 0;
        return;
    }
    memcpy(to, p, n);
    to[n] = 0;
}

static inline void wr_str(struct wr *w, const char *s)
{
    size_t n = strlen(s);
    if (n > UINT16_MAX) {
        w->bad = true;
        return;
    }
    wr_u16(w, (uint16_t)n);
    wr_copy(w, s, n);
}

/* Whether all of them are 0. Cheap for what is not: almost everything differs in its first bytes. */
static inline bool bytes_zero(const void *bytes, size_t len)
{
    const uint8_t *p = bytes;
    return !len || (!p[0] && !memcmp(p, p + 1, len - 1));
}

#endif
