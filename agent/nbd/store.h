/* A store whose regions are exports of a foreign block device server (disk.h tells the story). What store.h says of a
 * store holds, but for what a server without epochs cannot give. */
#ifndef NBD_STORE_H
#define NBD_STORE_H

#include "agent/store/store.h"

bool nbd_store_is(const char *url); /* nbd:// and the like */
/* 0, or -EINVAL or -EPROTONOSUPPORT, and why in error. */
int nbd_store_check(const char *url, char error[STORE_ERROR]);
/* Nothing is dialled before a region is asked for. `self`: as whose work what stands there is told. */
int nbd_store_open(struct store **out, uv_loop_t *loop, const char *url, const struct id *self,
                   char error[STORE_ERROR]);

#endif
