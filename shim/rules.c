/* Rules: parsed in place in a copy of the variable's text, matched without touching anything else.
 *
 * Parsing cuts the text at unescaped separators, which become terminators: first ";" into rules, then "," into the head
 * and the keys, then "=" within each. Globs keep their escapes, which the matcher reads; values lose theirs. The first
 * fault empties the rules and is said with the rule's number.
 *
 * Matching keeps one place to come back to for the last "*" and one for the last "**". More are not needed: whatever
 * stood before a "**" is best matched as early as possible, and two "*" are either in one component, where the same
 * holds, or parted by a "/", which the first cannot pass. */
#include "shim/rules.h"

#include <errno.h>
#include <stdarg.h>

static const char *const mode_names[] = {"push", "pull", "mirror", "none", NULL};
static const char *const strategy_names[] = {"auto", "uffd", "softdirty", "hash", "inotify", "fuse",
                                             "nbd",  "ublk", "cuse",      "kmod", NULL};
static const char *const strategy_not_built[RULE_STRATEGIES] = {
    [RULE_FUSE] = "strategy=fuse", [RULE_NBD] = "strategy=nbd",   [RULE_UBLK] = "strategy=ublk",
    [RULE_CUSE] = "strategy=cuse", [RULE_KMOD] = "strategy=kmod",
};
static const char *const ack_names[] = {"durable", "received", "async", NULL};
static const char *const initial_names[] = {"push", "pull", NULL};
static const char *const order_names[] = {"fault", "linear", "recorded", "none", NULL};

enum rule_key {
    KEY_NAME,
    KEY_STRATEGY,
    KEY_ACK,
    KEY_INTERVAL,
    KEY_GROUP,
    KEY_INITIAL,
    KEY_RESIDENT,
    KEY_ORDER,
    KEY_FOLLOW
};
static const char *const key_names[] = {"name",    "strategy", "ack",   "interval", "group",
                                        "initial", "resident", "order", "follow",   NULL};

/* Joins the strings up to NULL into error; what does not fit is cut. Returns -EINVAL. */
static int fail(char error[RULES_ERROR], ...)
{
    size_t n = 0;
    va_list parts;
    va_start(parts, error);
    for (const char *s; (s = va_arg(parts, const char *));)
        while (*s && n < RULES_ERROR - 1)
            error[n++] = *s++;
    va_end(parts);
    error[n] = 0;
    return -EINVAL;
}

/* A piece of the user's text short enough to be quoted, with "?" for what would break the line. */
struct quote {
    char s[84];
};

static struct quote quote(const char *text)
{
    struct quote q;
    size_t n = 0;
    for (; *text && n < 80; text++)
        q.s[n++] = (unsigned char)*text < 0x20 || *text == 0x7f ? '?' : *text;
    memcpy(q.s + n, *text ? "..." : "", *text ? 4 : 1);
    return q;
}

static int one_of(const char *const *names, const char *text)
{
    for (int i = 0; names[i]; i++)
        if (!strcmp(names[i], text))
            return i;
    return -1;
}

static bool blank(char c)
{
    return c == ' ' || c == '\t' || c == '\n' || c == '\r';
}

/* The first unescaped c in s becomes a terminator: returns what follows it, or NULL when there is none. */
static char *cut(char *s, char c)
{
    for (; *s; s++) {
        if (*s == '\\' && s[1])
            s++;
        else if (*s == c) {
            *s = 0;
            return s + 1;
        }
    }
    return NULL;
}

static char *trim(char *s)
{
    while (blank(*s))
        s++;
    char *end = s;
    for (char *at = s; *at; at++) {
        bool escaped = *at == '\\' && at[1];
        at += escaped;
        if (escaped || !blank(*at))
            end = at + 1;
    }
    *end = 0;
    return s;
}

static void unescape(char *s)
{
    char *to = s;
    for (; *s; s++) {
        if (*s == '\\' && s[1])
            s++;
        *to++ = *s;
    }
    *to = 0;
}

static bool ends_in_escape(const char *s)
{
    for (; *s; s++)
        if (*s == '\\' && !*++s)
            return true;
    return false;
}

static bool digit(char c)
{
    return c >= '0' && c <= '9';
}

/* The number at *text, which is moved behind it. */
static int number(const char **text, uint64_t *value)
{
    const char *s = *text;
    if (!digit(*s))
        return -EINVAL;
    for (*value = 0; digit(*s); s++)
        if (__builtin_mul_overflow(*value, 10u, value) || __builtin_add_overflow(*value, (unsigned)(*s - '0'), value))
            return -EINVAL;
    *text = s;
    return 0;
}

int rules_time(const char *text, uint64_t *ms)
{
    static const struct {
        const char *unit;
        unsigned ms;
    } units[] = {{"", 1000}, {"ms", 1}, {"s", 1000}, {"m", 60000}, {"h", 3600000}};

    *ms = !strcmp(text, "forever") ? UINT64_MAX : 0;
    if (*ms || !strcmp(text, "off"))
        return 0;
    if (number(&text, ms))
        return -EINVAL;
    for (size_t i = 0; i < sizeof units / sizeof *units; i++)
        if (!strcmp(text, units[i].unit))
            return __builtin_mul_overflow(*ms, units[i].ms, ms) || *ms == UINT64_MAX ? -EINVAL : 0;
    return -EINVAL;
}

bool rules_built(enum rule_strategy s)
{
    return !strategy_not_built[s];
}

int rules_strategy(const char *text, enum rule_strategy *s)
{
    int i = one_of(strategy_names, text);
    if (i < 0)
        return -EINVAL;
    *s = (enum rule_strategy)i;
    return 0;
}

int rules_ack(const char *text, uint8_t *ack)
{
    int i = one_of(ack_names, text);
    if (i < 0)
        return -EINVAL;
    *ack = (uint8_t)i;
    return 0;
}

/* "4096", "512M", "4G". */
static bool size_of(const char *text, uint64_t *size)
{
    static const char units[] = "KMGT";
    if (number(&text, size) || !*size)
        return false;
    const char *unit = *text ? strchr(units, *text) : NULL;
    unsigned shift = unit ? 10u * (unsigned)(unit - units + 1) : 0;
    if (*text && (!unit || text[1] || *size > UINT64_MAX >> shift))
        return false;
    *size <<= shift;
    return true;
}

static bool template_good(const char *t, char letter[3])
{
    for (; *t; t++) {
        if (*t != '%')
            continue;
        t++;
        if (!*t || !strchr("pbh%", *t)) {
            memcpy(letter, (char[3]){'%', *t, 0}, 3);
            return false;
        }
    }
    return true;
}

static int set_name(struct rule *rule, const char *value, char error[RULES_ERROR])
{
    char letter[3];
    if (!template_good(value, letter))
        return fail(error, "'", letter,
                    "' in name= stands for nothing; %p is the path, %b its last component, %h the host, %% a %", NULL);
    rule->name = value;
    return 0;
}

static int set_group(struct rule *rule, const char *value, char error[RULES_ERROR])
{
    if (strlen(value) >= sizeof rule->terms.group)
        return fail(error, "group= is longer than 255 bytes", NULL);
    memcpy(rule->terms.group, value, strlen(value) + 1);
    return 0;
}

static int set_initial(struct rule *rule, const char *value, char error[RULES_ERROR])
{
    int i = one_of(initial_names, value);
    if (i < 0)
        return fail(error, "'", quote(value).s, "' is no value of initial=; it is push or pull", NULL);
    rule->terms.initial = i ? CONTROL_INITIAL_PULL : CONTROL_INITIAL_PUSH;
    return 0;
}

static int set_interval(struct rule *rule, const char *value, char error[RULES_ERROR])
{
    if (rules_time(value, &rule->terms.interval_ms) || rule->terms.interval_ms == UINT64_MAX)
        return fail(error, "'", quote(value).s,
                    "' is no value of interval=; it is off or a time, e.g. 500ms, 10s, 2m, 1h", NULL);
    return 0;
}

static int set_resident(struct rule *rule, const char *value, char error[RULES_ERROR])
{
    if (!size_of(value, &rule->resident))
        return fail(error, "'", quote(value).s, "' is no value of resident=; it is a size, e.g. 512M, 4G", NULL);
    if (rule->mode == RULE_PUSH)
        return fail(error, "resident= is for pull and mirror: under push the file itself is here", NULL);
    return 0;
}

static int set_follow(struct rule *rule, char error[RULES_ERROR])
{
    if (rule->mode != RULE_PULL && rule->mode != RULE_NONE)
        return fail(error, "follow is for pull: who writes a region has its newest epoch", NULL);
    rule->follow = true;
    return 0;
}

static int set_order(struct rule *rule, const char *value, char error[RULES_ERROR])
{
    int i = one_of(order_names, value);
    if (i < 0)
        return fail(error, "'", quote(value).s, "' is no value of order=; it is fault, linear, recorded or none", NULL);
    if (rule->mode == RULE_PUSH)
        return fail(error, "order= is for pull and mirror: nothing is fetched under push", NULL);
    rule->order = (uint8_t)i;
    return 0;
}

static int set_key(struct rule *rule, enum rule_key key, const char *value, char error[RULES_ERROR])
{
    switch (key) {
    case KEY_NAME:
        return set_name(rule, value, error);
    case KEY_STRATEGY:
        if (!rules_strategy(value, &rule->strategy))
            return 0;
        return fail(
            error, "'", quote(value).s,
            "' is no strategy; strategies are auto, uffd, softdirty, hash, inotify, fuse, nbd, ublk, cuse, kmod", NULL);
    case KEY_ACK:
        if (!rules_ack(value, &rule->terms.ack))
            return 0;
        return fail(error, "'", quote(value).s, "' is no value of ack=; it is durable, received or async", NULL);
    case KEY_INTERVAL:
        return set_interval(rule, value, error);
    case KEY_GROUP:
        return set_group(rule, value, error);
    case KEY_INITIAL:
        return set_initial(rule, value, error);
    case KEY_ORDER:
        return set_order(rule, value, error);
    case KEY_RESIDENT:
        return set_resident(rule, value, error);
    case KEY_FOLLOW:
        break;
    }
    return set_follow(rule, error);
}

static int parse_key(struct rule *rule, char *text, unsigned *seen, char error[RULES_ERROR])
{
    char *value = cut(text, '=');
    int key = one_of(key_names, text);
    if (key < 0)
        return fail(error, "'", quote(text).s,
                    "' is no key; keys are name, strategy, ack, interval, group, initial, resident, order, follow (a "
                    "',' of the path "
                    "is written '\\,')",
                    NULL);
    if (*seen & (1u << key))
        return fail(error, text, "= is given twice", NULL);
    *seen |= 1u << key;
    if (key == KEY_FOLLOW && value)
        return fail(error, "follow takes no value", NULL);
    if (key != KEY_FOLLOW && (!value || !*value))
        return fail(error, text, "= has no value", NULL);
    if (value)
        unescape(value);
    return set_key(rule, (enum rule_key)key, value, error);
}

static int parse_head(struct rule *rule, char *text, char error[RULES_ERROR])
{
    char *mode = cut(text, '=');
    rule->glob = text;
    if (*text != '/' && strncmp(text, "**", 2))
        return fail(error, "a pattern is matched against the absolute path: begin it with '/' or '**'", NULL);
    if (text[strlen(text) - 1] == '/')
        return fail(error, "no file's path ends in '/'; for all below a directory write 'DIR/**'", NULL);
    if (!mode)
        return 0;
    int i = one_of(mode_names, mode);
    if (i < 0)
        return fail(error, "'", quote(mode).s,
                    "' is no mode; modes are push, pull, mirror, none (an '=' of the path is written '\\=')", NULL);
    rule->mode = (enum rule_mode)i;
    return 0;
}

static int parse_rule(struct rule *rule, char *text, const struct rules_defaults *d, char error[RULES_ERROR])
{
    *rule = (struct rule){.mode = RULE_PUSH, .strategy = d->strategy};
    rule->terms.ack = d->ack;
    rule->terms.interval_ms = d->interval_ms;

    if (ends_in_escape(text))
        return fail(error, "its last '\\' escapes nothing; a backslash is written '\\\\'", NULL);
    char *keys = cut(text, ',');
    int rc = parse_head(rule, text, error);
    unsigned seen = 0;
    while (!rc && keys) {
        char *key = keys;
        keys = cut(key, ',');
        rc = parse_key(rule, key, &seen, error);
    }
    if (rule->mode == RULE_NONE)
        rule->not_built = NULL;
    else if (rule->mode == RULE_PUSH || rule->mode == RULE_MIRROR)
        rule->not_built = strategy_not_built[rule->strategy];
    return rc;
}

int rules_parse(struct rules *r, const char *text, const struct rules_defaults *d, char error[RULES_ERROR])
{
    r->count = 0;
    size_t len = strlen(text);
    if (len >= sizeof r->text)
        return fail(error, "MEMSYNC_REGIONS is longer than 16383 bytes", NULL);
    memcpy(r->text, text, len + 1);

    for (char *next = r->text; next;) {
        char *at = next;
        next = cut(at, ';');
        at = trim(at);
        if (!*at)
            continue;
        if (r->count == RULES_MAX) {
            r->count = 0;
            return fail(error, "MEMSYNC_REGIONS has more than 64 rules, at '", quote(at).s, "'; widen the patterns",
                        NULL);
        }
        struct quote q = quote(at);
        char why[RULES_ERROR];
        int rc = parse_rule(&r->rule[r->count], at, d, why);
        if (rc) {
            r->count = 0;
            return fail(error, "MEMSYNC_REGIONS, rule '", q.s, "': ", why, NULL);
        }
        r->count++;
    }
    return 0;
}

static bool glob_match(const char *glob, const char *text)
{
    const char *star = NULL, *star_at = NULL; /* after the last "*", and where in text it ends */
    const char *deep = NULL, *deep_at = NULL; /* the same for the last "**" */
    bool whole = false;                       /* it is between slashes: it ends after a "/" only */
    const char *p = glob;

    for (;;) {
        if (*p == '*' && p[1] == '*') {
            const char *from = p;
            while (*p == '*')
                p++;
            whole = *p == '/' && (from == glob || from[-1] == '/');
            p += whole;
            deep = p, deep_at = text;
            star = NULL;
            continue;
        }
        if (*p == '*') {
            star = ++p, star_at = text;
            continue;
        }
        const char *literal = *p == '\\' && p[1] ? p + 1 : p;
        if (*text && (literal == p && *p == '?' ? *text != '/' : *literal == *text)) {
            p = literal + 1;
            text++;
            continue;
        }
        if (!*text && !*p)
            return true;

        if (star && *star_at && *star_at != '/') {
            p = star;
            text = ++star_at;
        } else if (deep && *deep_at) {
            if (whole && !(deep_at = strchr(deep_at, '/')))
                return false;
            p = deep;
            text = ++deep_at;
            star = NULL;
        } else {
            return false;
        }
    }
}

/* Whether the glob has no wildcard and is, unescaped, the path. */
static bool glob_is(const char *glob, const char *path)
{
    for (; *glob && *path; glob++, path++) {
        if (*glob == '*' || *glob == '?')
            return false;
        if (*glob == '\\' && glob[1])
            glob++;
        if (*glob != *path)
            return false;
    }
    return !*glob && !*path;
}

static bool ends_in(const char *s, size_t n, const char *end)
{
    size_t m = strlen(end);
    return n >= m && !memcmp(s + n - m, end, m);
}

/* Locks and shared indexes mean something on this host only. */
static bool never_tracked(const char *path, const char *base)
{
    size_t n = strlen(path);
    return ends_in(path, n, "-shm") || ends_in(path, n, "-lock") || !strcmp(base, "lock.mdb");
}

/* The file that a path is a companion of, in `of`, and the suffix; NULL when it is none. */
static const char *companion(const char *path, char of[CONTROL_PATH])
{
    static const char *const suffixes[] = {"-wal", "-journal"};
    size_t n = strlen(path);
    for (size_t i = 0; i < 2; i++) {
        size_t m = n - strlen(suffixes[i]);
        if (!ends_in(path, n, suffixes[i]) || !m || path[m - 1] == '/' || m >= CONTROL_PATH)
            continue;
        memcpy(of, path, m);
        of[m] = 0;
        return suffixes[i];
    }
    return NULL;
}

const struct rule *rules_match(const struct rules *r, const char *path)
{
    const char *slash = strrchr(path, '/');
    bool exact = never_tracked(path, slash ? slash + 1 : path);
    char of[CONTROL_PATH];
    bool belongs = companion(path, of);
    for (unsigned i = 0; i < r->count; i++) {
        const char *glob = r->rule[i].glob;
        if (exact ? glob_is(glob, path) : glob_match(glob, path) || (belongs && glob_match(glob, of)))
            return &r->rule[i];
    }
    return NULL;
}

/* What of a glob bears on the last component: what follows the last "/", or the last "**" when that comes later, with
 * an ordinary "*" in its place. */
static const char *glob_tail(const char *glob)
{
    const char *tail = glob;
    for (const char *p = glob; *p; p++) {
        if (*p == '\\' && p[1]) {
            p++;
            if (*p != '/')
                continue;
        }
        if (*p == '/' || (*p == '*' && p[1] == '*'))
            tail = p + 1;
    }
    return tail;
}

bool rules_may_match(const struct rules *r, const char *base)
{
    char of[CONTROL_PATH];
    bool belongs = companion(base, of);
    for (unsigned i = 0; i < r->count; i++) {
        const char *tail = glob_tail(r->rule[i].glob);
        if (glob_match(tail, base) || (belongs && glob_match(tail, of)))
            return true;
    }
    return false;
}

/* Appends to name, whose length is *n. false when it does not fit. */
static bool append(char name[NAME_CAP], size_t *n, const char *s)
{
    size_t m = strlen(s);
    if (m >= NAME_CAP - *n)
        return false;
    memcpy(name + *n, s, m + 1);
    *n += m;
    return true;
}

static bool expand(const char *template, const char *path, const char *host, char name[NAME_CAP], size_t *n)
{
    const char *slash = strrchr(path, '/');
    for (const char *t = template; *t; t++) {
        char literal[2] = {*t, 0};
        const char *s = literal;
        if (*t == '%') {
            t++;
            s = *t == 'p' ? path + strspn(path, "/") : *t == 'b' ? (slash ? slash + 1 : path) : *t == 'h' ? host : "%";
        }
        if (!append(name, n, s))
            return false;
    }
    return true;
}

int rules_name(const struct rule *rule, const char *path, const char *host, char name[NAME_CAP],
               char error[RULES_ERROR])
{
    char of[CONTROL_PATH];
    const char *suffix = companion(path, of);
    bool belongs = suffix && glob_match(rule->glob, of);
    size_t n = 0;
    name[0] = 0;
    if (!expand(rule->name ? rule->name : "%p", belongs ? of : path, host, name, &n) ||
        !append(name, &n, belongs ? suffix : ""))
        return fail(error, "the name of '", quote(path).s, "' by rule '", quote(rule->glob).s,
                    "' is longer than 4096 bytes", NULL);
    const char *fault = name_fault(name);
    if (fault)
        return fail(error, "the name '", quote(name).s, "' of '", quote(path).s, "' by rule '", quote(rule->glob).s,
                    "' ", fault, NULL);
    return 0;
}
