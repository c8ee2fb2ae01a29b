/* Who may do what with which regions: a file of lines `IDENTITY GLOB RIGHT[,RIGHT]...`, rights read, write, admin.
 *
 * IDENTITY is what TLS proved (a certificate's CN, else its first DNS name; a key's identity), `*` any such one, or
 * `anonymous`: a peer without TLS. GLOB is of region names: `*` and `?` stay within a part, `**` crosses. All lines that
 * fit count together; what no line grants is refused. write is no read, nor is admin (removing) either of them. */
#ifndef NET_GRANTS_H
#define NET_GRANTS_H

#include <stdbool.h>
#include <stddef.h>

#define GRANTS_ERROR 512u

enum { GRANT_READ = 1, GRANT_WRITE = 2, GRANT_ADMIN = 4 };

struct grants;

/* NULL and error: the file cannot be read, or a line is wrong, or others than its owner can write it. */
struct grants *grants_load(const char *file, char error[GRANTS_ERROR]);
/* -EINVAL and error: all stays as it was. */
int grants_reload(struct grants *g, char error[GRANTS_ERROR]);
void grants_free(struct grants *g); /* NULL allowed */
/* identity NULL: none. */
unsigned grants_of(const struct grants *g, const char *identity, const char *region);
bool grants_glob(const char *glob, const char *name);

#endif
