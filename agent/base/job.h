/* Work on a thread of the pool, then a call on the loop thread: uv_queue_work with its memory managed.
 *
 * Jobs are kept short (at most a few MiB of reading) so that one program's bulk does not hold the pool from another's
 * sync point. */
#ifndef BASE_JOB_H
#define BASE_JOB_H

#include <uv.h>

/* Loop thread only. `work` runs on a pool thread, then `done` on the loop thread; both get arg. 0 or a negative errno,
 * when neither will run. */
int job_run(uv_loop_t *loop, void (*work)(void *arg), void (*done)(void *arg), void *arg);

#endif
