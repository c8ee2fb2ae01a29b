#include "agent/base/job.h"

#include <errno.h>
#include <stdlib.h>

struct job {
    uv_work_t req;
    void (*work)(void *);
    void (*done)(void *);
    void *arg;
};

static void job_work(uv_work_t *req)
{
    struct job *j = req->data;
    j->work(j->arg);
}

static void job_done(uv_work_t *req, int status)
{
    struct job *j = req->data;
    (void)status; /* jobs are never cancelled */
    j->done(j->arg);
    free(j);
}

int job_run(uv_loop_t *loop, void (*work)(void *), void (*done)(void *), void *arg)
{
    struct job *j = malloc(sizeof *j);
    if (!j)
        return -ENOMEM;
    *j = (struct job){.req.data = j, .work = work, .done = done, .arg = arg};
    int rc = uv_queue_work(loop, &j->req, job_work, job_done);
    if (rc < 0)
        free(j);
    return rc;
}
