/* The local agent of this user, over its control socket (wire/control.h). Blocking. */
#ifndef CLI_LOCAL_H
#define CLI_LOCAL_H

#include "wire/control.h"

#include <jansson.h>

struct local_agent {
    int fd;
    char socket[4096];
    uint32_t pid;
};

/* 0; -ENOENT: no agent is running there (nothing is said); another negative errno: said already. */
int local_connect(struct local_agent *l);
/* Starts an agent for this user, as the preload library does, and connects. 0, or a negative errno, said already. */
int local_connect_or_start(struct local_agent *l);
void local_close(struct local_agent *l);
/* A request as a control_*_put wrote it. 0 or a negative errno, said already. */
int local_send(struct local_agent *l, const void *message, size_t len);
/* Waits for RESULT, at most timeout_ms (-1: for ever). 0: it is in r. -ETIMEDOUT: not yet, nothing is said. Else said
 * already. */
int local_result(struct local_agent *l, struct control_text *r, int timeout_ms);
/* STATUS. NULL: said already. The caller's to json_decref. */
json_t *local_status(struct local_agent *l);
/* Waits until the agent, told to stop, has ended. 0, or a negative errno, said already. */
int local_ended(struct local_agent *l);
/* PUBLISH of one region ("" for all): waits until it is durable, with a progress line on a terminal, as long as it
 * moves; MEMSYNC_TIMEOUT without any movement ends the wait. 0, or a negative errno, said already. */
int local_publish(struct local_agent *l, const char *name);
/* The region of that name in a status, NULL when it is not tracked here. remote NULL: at whichever remote. */
json_t *local_region(json_t *status, const char *name, const char *remote);

#endif
