/* In which order a region's chunks were first touched, remembered between runs (order=recorded).
 *
 * One small file a region and remote, `orders/HASH` in the state directory: a line that names what it is of, then the
 * numbers of chunks of PLAN_CHUNK pages, one a line. Written when the last program has let go of the region: beside,
 * then renamed. Whatever is wrong with it costs an order, nothing else. */
#ifndef PAGE_ORDER_H
#define PAGE_ORDER_H

#include <stddef.h>
#include <stdint.h>

#define ORDER_MAX 65536u /* chunks: 4 GiB */

/* Chunks below `chunks`, each once, malloc'ed; NULL when there is none. */
uint64_t *order_load(const char *state_dir, const char *remote, const char *name, uint64_t chunks, size_t *n);
void order_save(const char *state_dir, const char *remote, const char *name, const uint64_t *order, size_t n);

#endif
