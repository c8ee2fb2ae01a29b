/* The functions behind the hooks, resolved once, in the constructor. Before that they are NULL, and hooks make raw
 * calls instead. */
#ifndef SHIM_REAL_H
#define SHIM_REAL_H

#include "shim/shim.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/select.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/xattr.h>
#include <unistd.h>

/* Of fortified programs only: no header declares them here. */
ssize_t __read_chk(int fd, void *to, size_t len, size_t room);
ssize_t __pread_chk(int fd, void *to, size_t len, off_t at, size_t room);
ssize_t __pread64_chk(int fd, void *to, size_t len, off64_t at, size_t room);
ssize_t __readlink_chk(const char *path, char *to, size_t cap, size_t room);
ssize_t __readlinkat_chk(int dir, const char *path, char *to, size_t cap, size_t room);
char *__realpath_chk(const char *path, char *to, size_t room);
int __poll_chk(struct pollfd *fds, nfds_t n, int ms, size_t room);
int __ppoll_chk(struct pollfd *fds, nfds_t n, const struct timespec *t, const sigset_t *mask, size_t room);
size_t __fread_chk(void *to, size_t room, size_t size, size_t n, FILE *f);
size_t __fread_unlocked_chk(void *to, size_t room, size_t size, size_t n, FILE *f);
ssize_t __recv_chk(int fd, void *to, size_t len, size_t room, int flags);
ssize_t __recvfrom_chk(int fd, void *to, size_t len, size_t room, int flags, struct sockaddr *from, socklen_t *n);

#define REAL_FUNCTIONS(X)                                                                                              \
    X(msync)                                                                                                           \
    X(fsync) X(fdatasync) X(syncfs) X(sync) X(open) X(open64) X(openat) X(openat64) X(creat) X(creat64) X(close)       \
        X(fcntl) X(fcntl64) X(fopen) X(fopen64) X(freopen) X(freopen64) X(fdopen) X(fclose) X(read) X(pread)         \
            X(pread64) X(readv) X(preadv) X(preadv64) X(preadv2) X(preadv64v2) X(__read_chk) X(__pread_chk)             \
            X(__pread64_chk) X(faccessat) X(eaccess) X(euidaccess) X(fileno) X(fileno_unlocked) X(send) X(sendto) X(sendmsg) X(write) X(pwrite)         \
            X(pwrite64) X(writev) X(pwritev) X(pwritev64) X(pwritev2) X(pwritev64v2) X(sendfile) X(sendfile64)         \
                X(splice) X(copy_file_range) X(fallocate) X(fallocate64) X(posix_fallocate) X(posix_fallocate64)       \
                    X(futimens) X(utimensat) X(lockf) X(lockf64) X(remove) X(quick_exit) X(execvp) X(execvpe) X(fexecve) X(dlopen) X(dlmopen) X(realpath)       \
                        X(__realpath_chk) X(__readlink_chk) X(__readlinkat_chk) X(poll) X(ppoll) X(__poll_chk)         \
                            X(__ppoll_chk) X(select) X(pselect) X(fread) X(fread_unlocked) X(fwrite)                   \
                                X(fwrite_unlocked) X(__fread_chk)                   \
                                    X(__fread_unlocked_chk) X(recv) X(recvfrom) X(recvmsg) X(__recv_chk)               \
                                        X(__recvfrom_chk)

struct real {
#define REAL_MEMBER(name) __typeof__(&name) name;
    REAL_FUNCTIONS(REAL_MEMBER)
#undef REAL_MEMBER
};

extern struct real real;

/* For functions that no allocator calls: resolved at the call when it comes before the constructor. */
#define REAL(name) (real.name ? real.name : (__typeof__(real.name))dlsym(RTLD_NEXT, #name))

#endif
