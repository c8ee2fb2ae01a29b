/* Where a store keeps its bytes: one ops table, every member required, two volumes.
 *
 * A volume knows *files* by number. A number is given once and never again, which is what makes recovery simple:
 * content is always written to a number, names are only shown, and applying either again changes nothing.
 *
 *   file:DIR   file 0x2a is DIR/.memsync/data/000000000000002a, and a region's name DIR/NAME is a second hard link to
 * it. At rest (after a clean close) only DIR/NAME is left. No symlink inside DIR is ever followed. mem:       a file is
 * a memfd, which lives as long as its descriptor; names show nowhere; there is neither journal nor table on disk.
 *
 * Any thread may call, but show, hide and rest are called by one thread at a time. Errors are negative errno. */
#ifndef STORE_VOLUME_H
#define STORE_VOLUME_H

#include "agent/store/store.h"

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct volume;

struct volume_ops {
    bool lasting; /* outlives the process: has a journal and a saved table */
    const char *(*dir)(const struct volume *v);
    void (*close)(struct volume *v); /* and unlocks and frees */

    int (*file_open)(struct volume *v, uint64_t file, bool create); /* a descriptor for reading and writing */
    int (*file_remove)(struct volume *v, uint64_t file);            /* 0 also when it is not there */
    int (*files_sync)(struct volume *v); /* what file_open created is found again after a power cut */
    int (*spill_open)(struct volume *v, uint64_t number, bool create);
    int (*spill_remove)(struct volume *v, uint64_t number);
    /* Every file and spill there is, in no order. */
    int (*each)(struct volume *v, void (*file)(void *arg, uint64_t file), void (*spill)(void *arg, uint64_t number),
                void *arg);

    /* -EINVAL with text when something is in the way of name's directories, or, when `fresh`, stands under the name
     * already. */
    int (*vacant)(struct volume *v, const char *name, bool fresh, char error[STORE_ERROR]);
    int (*show)(struct volume *v, const char *name, uint64_t file); /* name is this file now, whatever it was */
    int (*hide)(struct volume *v, const char *name); /* name is no more; directories that are left empty go too */
    int (*adopt)(struct volume *v, const char *name,
                 uint64_t file); /* after rest: the file is what stands under name. -ENOENT: nothing does */
    int (*rest)(struct volume *v, const char *name, uint64_t file); /* leaves only the name, when it is the file */
    int (*names_sync)(struct volume *v); /* shown and hidden names are so after a power cut */

    int (*fits)(struct volume *v, uint64_t size); /* -EFBIG: no file can be that long here */
    uint64_t (*space)(struct volume *v);          /* free bytes */

    int (*load)(struct volume *v, void **bytes, size_t *len);     /* -ENOENT: none saved; malloc'ed */
    int (*save)(struct volume *v, const void *bytes, size_t len); /* atomically, durably */
    int (*journal)(
        struct volume *v,
        uint64_t size); /* descriptor of the journal file, made of zeros really written when it has another size */
};

struct volume {
    const struct volume_ops *ops;
};

int volume_file_open(struct volume **out, const char *dir, char error[STORE_ERROR]);
int volume_mem_open(struct volume **out);

/* Called at every step that changes the disk, with its name. Does nothing; tests set it to count, or to die there. */
extern void (*store_step)(const char *where);

#endif
