/* MEMSYNC_REGIONS and its relatives: which files are tracked, and how. Pure: no allocation, no system call; parsed once, matched on hooked paths.
 *
 *     RULES = RULE { ";" RULE }     RULE = GLOB [ "=" MODE ] { "," KEY [ "=" VALUE ] }
 *
 * A glob is an absolute path, or begins with "**": "*" and "?" stay within a component, "**" crosses, and "**" between slashes also stands for no
 * directory at all. "\\" takes the special meaning from what follows it, in the glob and, for ";" "," "=" and blanks at a rule's ends, everywhere. Blanks
 * around a rule and empty rules are passed over. */
#ifndef SHIM_RULES_H
#define SHIM_RULES_H

#include "wire/control.h"

#define RULES_MAX 64u
#define RULES_TEXT 16384u
#define RULES_ERROR 320u

enum rule_mode { RULE_PUSH, RULE_PULL, RULE_MIRROR, RULE_NONE };
enum rule_strategy { RULE_AUTO, RULE_UFFD, RULE_SOFTDIRTY, RULE_HASH, RULE_INOTIFY, RULE_FUSE, RULE_NBD, RULE_UBLK, RULE_CUSE, RULE_KMOD, RULE_STRATEGIES };

struct rule {
    const char *glob;      /* into rules.text, NUL-terminated, escapes kept */
    const char *name;      /* the template of name=, or NULL: the path without its leading slash */
    enum rule_mode mode;
    enum rule_strategy strategy;
    uint8_t order;         /* enum control_order, of a pull or mirror */
    bool follow;           /* of a pull */
    uint64_t resident;     /* bytes, of a pull or mirror; 0: no bound */
    struct control_terms terms;
    const char *not_built; /* what of this rule is understood and not built, e.g. "strategy=fuse"; else NULL */
};

struct rules {
    struct rule rule[RULES_MAX];
    unsigned count;
    char text[RULES_TEXT];
};

/* What the variables say where a rule does not. */
struct rules_defaults {
    enum rule_strategy strategy;
    uint8_t ack;
    uint64_t interval_ms;
};

/* 0, or -EINVAL with one line in error that quotes the part that is wrong, says why and what is allowed. On error r has no rules. */
int rules_parse(struct rules *r, const char *text, const struct rules_defaults *d, char error[RULES_ERROR]);
/* The first rule that matches the absolute, resolved path; NULL for none. A matched file's "-wal" and "-journal" companions match by it; "*-shm", "*-lock" and
 * "lock.mdb" match only a rule whose glob is that path exactly, without wildcards. RULE_NONE rules are returned too. */
const struct rule *rules_match(const struct rules *r, const char *path);
/* Whether any path with this last component could match: the cheap test before a path is resolved. (Of the resolved path's last component: a symbolic
 * link's own name says nothing.) */
bool rules_may_match(const struct rules *r, const char *base);
/* The region's name: template with %p (path without leading slash), %b (base name), %h (host name), %% expanded; a companion's name is
 * its file's with the suffix. 0, or -EINVAL with the reason in error. */
int rules_name(const struct rule *rule, const char *path, const char *host, char name[NAME_CAP], char error[RULES_ERROR]);

/* "10s", "250ms", "2m", "1h", a bare number (seconds), "off" and "forever" where allowed by the caller (returned as 0 and UINT64_MAX). -EINVAL else. */
int rules_time(const char *text, uint64_t *ms);
int rules_strategy(const char *text, enum rule_strategy *s); /* -EINVAL */
#define RULES_BUILT "auto, uffd, softdirty, hash and inotify" /* the strategies that there are; of the rest only the names */
bool rules_built(enum rule_strategy s);
int rules_ack(const char *text, uint8_t *ack);               /* -EINVAL */

#endif
