/* A file's events (inotify(7)): whether anybody has written to it by a call, or let go of it after it could have. Of
 * stores through a mapping they tell nothing (inotify.c).
 *
 * Any thread; one watch's calls one at a time. */
#ifndef TRACK_WATCH_H
#define TRACK_WATCH_H

#include <stdbool.h>

struct watch;

/* Watches the file that fd is open on, whatever its name is. 0, or a negative errno: -ENOSPC when the user's watches
 * are used up (fs.inotify.max_user_watches), -EMFILE when the instances or descriptors are. */
int watch_open(int fd, struct watch **out);
/* Whether there may have been events since the last take. True the first time: nothing is known of before. */
bool watch_take(struct watch *w);
void watch_close(struct watch *w); /* NULL: nothing */

#endif
