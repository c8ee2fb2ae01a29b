/* mem: regions in memory only. A file is a memfd; it lives as long as the region's descriptor, so there is nothing to
 * find, sync or remove. */
#include "agent/store/volume.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

static const char *mem_dir(const struct volume *v)
{
    (void)v;
    return NULL;
}

static void mem_close(struct volume *v)
{
    free(v);
}

static int mem_open(struct volume *v, uint64_t number, bool create)
{
    (void)v;
    (void)number;
    if (!create)
        return -ENOENT;
    int fd = memfd_create("memsync-region", MFD_CLOEXEC);
    return fd < 0 ? -errno : fd;
}

static int mem_number(struct volume *v, uint64_t number)
{
    (void)v;
    (void)number;
    return 0;
}

static int mem_nothing(struct volume *v)
{
    (void)v;
    return 0;
}

static int mem_each(struct volume *v, void (*file)(void *, uint64_t), void (*spill)(void *, uint64_t), void *arg)
{
    (void)v;
    (void)file;
    (void)spill;
    (void)arg;
    return 0;
}

static int mem_vacant(struct volume *v, const char *name, bool fresh, char error[STORE_ERROR])
{
    (void)v;
    (void)name;
    (void)fresh;
    (void)error;
    return 0;
}

static int mem_name_file(struct volume *v, const char *name, uint64_t file)
{
    (void)v;
    (void)name;
    (void)file;
    return 0;
}

static int mem_hide(struct volume *v, const char *name)
{
    (void)v;
    (void)name;
    return 0;
}

static uint64_t mem_space(struct volume *v)
{
    (void)v;
    return UINT64_MAX;
}

static int mem_load(struct volume *v, void **bytes, size_t *len)
{
    (void)v;
    *bytes = NULL;
    *len = 0;
    return -ENOENT;
}

static int mem_save(struct volume *v, const void *bytes, size_t len)
{
    (void)v;
    (void)bytes;
    (void)len;
    return 0;
}

static int mem_journal(struct volume *v, uint64_t size)
{
    (void)v;
    (void)size;
    return -ENOTSUP;
}

static const struct volume_ops mem_ops = {
    .lasting = false,
    .dir = mem_dir,
    .close = mem_close,
    .file_open = mem_open,
    .file_remove = mem_number,
    .files_sync = mem_nothing,
    .spill_open = mem_open,
    .spill_remove = mem_number,
    .each = mem_each,
    .vacant = mem_vacant,
    .show = mem_name_file,
    .hide = mem_hide,
    .adopt = mem_name_file,
    .rest = mem_name_file,
    .names_sync = mem_nothing,
    .fits = mem_number,
    .space = mem_space,
    .load = mem_load,
    .save = mem_save,
    .journal = mem_journal,
};

int volume_mem_open(struct volume **out)
{
    struct volume *v = malloc(sizeof *v);
    if (!v)
        return -ENOMEM;
    v->ops = &mem_ops;
    *out = v;
    return 0;
}
