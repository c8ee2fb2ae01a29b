#include "agent/nbd/kernel.h"

#include "agent/base/log.h"

#include <dirent.h>
#include <stdarg.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <linux/genetlink.h>
#include <linux/nbd-netlink.h>
#include <linux/nbd.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <unistd.h>

#define SECTOR 512u
#define READY_MS 10000u
#define GONE_MS 2000u
#define LOOK_US 2000u
#define MESSAGE 1024u
#define NAMED "memsync-agent "

static void fault(char error[KERNEL_ERROR], const char *format, ...) __attribute__((format(printf, 2, 3)));
static void fault(char error[KERNEL_ERROR], const char *format, ...)
{
    va_list ap;
    va_start(ap, format);
    vsnprintf(error, KERNEL_ERROR, format, ap);
    va_end(ap);
}

int kernel_device(const char *text, int *index)
{
    char *end;
    if (!strcmp(text, "auto")) {
        *index = KERNEL_ANY;
        return 0;
    }
    if (strncmp(text, "/dev/nbd", 8) || text[8] < '0' || text[8] > '9')
        return -EINVAL;
    unsigned long n = strtoul(text + 8, &end, 10);
    if (*end || n > 1u << 16)
        return -EINVAL;
    *index = (int)n;
    return 0;
}

/* A line of the device's in sysfs, without its end. False: there is none. */
static bool attribute(int index, const char *name, char *to, size_t cap)
{
    char path[80];
    snprintf(path, sizeof path, "/sys/block/nbd%d/%s", index, name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? -1 : read(fd, to, cap - 1);
    if (fd >= 0)
        close(fd);
    if (n < 0)
        return false;
    to[n] = 0;
    to[strcspn(to, "\n")] = 0;
    return true;
}

bool kernel_connected(int index)
{
    char pid[32];
    return attribute(index, "pid", pid, sizeof pid);
}

#define ALIGNED(n) (((size_t)(n) + 3) & ~(size_t)3) /* the kernel's own macros mix signs */
#define ATTR sizeof(struct nlattr)

/* Generic netlink, as far as it is needed: one request, one answer. */
struct request {
    union {
        struct nlmsghdr head;
        uint8_t bytes[MESSAGE];
    };
};

static void begin(struct request *r, uint16_t family, uint8_t command)
{
    memset(r, 0, sizeof *r);
    r->head.nlmsg_len = sizeof(struct nlmsghdr) + sizeof(struct genlmsghdr);
    r->head.nlmsg_type = family;
    r->head.nlmsg_flags = NLM_F_REQUEST | NLM_F_ACK;
    *(struct genlmsghdr *)(r->bytes + sizeof r->head) = (struct genlmsghdr){.cmd = command, .version = 1};
}

/* All attributes of a request together are far below MESSAGE: the longest is a backend's name, which is cut. */
static struct nlattr *put(struct request *r, uint16_t type, const void *data, size_t len)
{
    struct nlattr *a = (void *)(r->bytes + ALIGNED(r->head.nlmsg_len));
    a->nla_type = type;
    a->nla_len = (uint16_t)(ATTR + len);
    if (len)
        memcpy((uint8_t *)a + ATTR, data, len);
    r->head.nlmsg_len = (uint32_t)(ALIGNED(r->head.nlmsg_len) + ALIGNED(a->nla_len));
    return a;
}

static void put_u32(struct request *r, uint16_t type, uint32_t v)
{
    put(r, type, &v, sizeof v);
}

static void put_u64(struct request *r, uint16_t type, uint64_t v)
{
    put(r, type, &v, sizeof v);
}

static const void *find(const struct nlmsghdr *h, uint16_t type, size_t least)
{
    const uint8_t *at = (const uint8_t *)(h + 1) + sizeof(struct genlmsghdr), *end = (const uint8_t *)h + h->nlmsg_len;
    while (at + ATTR <= end) {
        const struct nlattr *a = (const void *)at;
        if (a->nla_len < ATTR || a->nla_len > end - at)
            return NULL;
        if ((a->nla_type & NLA_TYPE_MASK) == type)
            return a->nla_len >= ATTR + least ? at + ATTR : NULL;
        at += ALIGNED(a->nla_len);
    }
    return NULL;
}

/* 0, with the attribute `type` of the answer in *value (two or four bytes) when one came; or a negative errno. */
static int ask(int fd, struct request *r, uint16_t type, size_t bytes, uint32_t *value)
{
    struct sockaddr_nl kernel = {.nl_family = AF_NETLINK};
    uint8_t in[4096] __attribute__((aligned(NLMSG_ALIGNTO)));
    if (sendto(fd, r->bytes, r->head.nlmsg_len, 0, (struct sockaddr *)&kernel, sizeof kernel) < 0)
        return -errno;
    for (;;) {
        ssize_t n = recv(fd, in, sizeof in, 0);
        if (n < 0 && errno != EINTR)
            return -errno;
        size_t left = n < 0 ? 0 : (size_t)n, step;
        const struct nlmsghdr *h = (const void *)in;
        for (; left >= sizeof *h && h->nlmsg_len >= sizeof *h && h->nlmsg_len <= left;
             step = ALIGNED(h->nlmsg_len), left -= step < left ? step : left,
             h = (const void *)((const uint8_t *)h + step)) {
            if (h->nlmsg_type == NLMSG_ERROR)
                return ((const struct nlmsgerr *)(const void *)(h + 1))->error;
            const void *got = type ? find(h, type, bytes) : NULL;
            if (got && bytes == sizeof(uint16_t))
                *value = *(const uint16_t *)got;
            else if (got)
                *value = *(const uint32_t *)got;
        }
    }
}

/* A socket, and the number of the family "nbd"; or a negative errno: -ENOENT when there is no such family here. */
static int netlink_open(uint16_t *family)
{
    int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_GENERIC);
    if (fd < 0)
        return errno == EPROTONOSUPPORT || errno == EAFNOSUPPORT ? -ENOENT : -errno;
    struct request r;
    uint32_t id = 0;
    begin(&r, GENL_ID_CTRL, CTRL_CMD_GETFAMILY);
    put(&r, CTRL_ATTR_FAMILY_NAME, "nbd", 4);
    int rc = ask(fd, &r, CTRL_ATTR_FAMILY_ID, sizeof(uint16_t), &id);
    if (!rc && !id)
        rc = -ENOENT;
    if (rc) {
        close(fd);
        return rc;
    }
    *family = (uint16_t)id;
    return fd;
}

static int netlink_connect(int nl, uint16_t family, int *index, int fd, uint64_t size, uint16_t flags, const char *name)
{
    struct request r;
    begin(&r, family, NBD_CMD_CONNECT);
    if (*index != KERNEL_ANY)
        put_u32(&r, NBD_ATTR_INDEX, (uint32_t)*index);
    put_u64(&r, NBD_ATTR_SIZE_BYTES, size);
    put_u64(&r, NBD_ATTR_BLOCK_SIZE_BYTES, SECTOR);
    put_u64(&r, NBD_ATTR_SERVER_FLAGS, flags);
    struct nlattr *sockets = put(&r, NBD_ATTR_SOCKETS | NLA_F_NESTED, NULL, 0);
    struct nlattr *item = put(&r, NBD_SOCK_ITEM | NLA_F_NESTED, NULL, 0);
    struct nlattr *number = put(&r, NBD_SOCK_FD, &fd, sizeof(uint32_t));
    item->nla_len = (uint16_t)(ATTR + number->nla_len);
    sockets->nla_len = (uint16_t)(ATTR + item->nla_len);
    put(&r, NBD_ATTR_BACKEND_IDENTIFIER, name, strlen(name) + 1);
    uint32_t got = (uint32_t)*index;
    int rc = ask(nl, &r, NBD_ATTR_INDEX, sizeof(uint32_t), &got);
    *index = (int)got;
    return rc;
}

static int netlink_disconnect(int index)
{
    uint16_t family;
    int nl = netlink_open(&family);
    if (nl < 0)
        return nl;
    struct request r;
    begin(&r, family, NBD_CMD_DISCONNECT);
    put_u32(&r, NBD_ATTR_INDEX, (uint32_t)index);
    int rc = ask(nl, &r, 0, 0, NULL);
    close(nl);
    return rc;
}

static int device_open(int index, int how)
{
    char path[32];
    snprintf(path, sizeof path, "/dev/nbd%d", index);
    int fd = open(path, how | O_CLOEXEC);
    return fd < 0 ? -errno : fd;
}

/* Stays in the kernel until the device is disconnected; the kernel's own work for it is done by other threads. */
static void *ioctl_serve(void *arg)
{
    int fd = (int)(intptr_t)arg;
    ioctl(fd, NBD_DO_IT);
    ioctl(fd, NBD_CLEAR_QUE);
    ioctl(fd, NBD_CLEAR_SOCK);
    close(fd);
    return NULL;
}

static int ioctl_start(int dev)
{
    pthread_t thread;
    pthread_attr_t attr;
    sigset_t all, old;
    sigfillset(&all);
    pthread_attr_init(&attr);
    pthread_attr_setdetachstate(&attr, PTHREAD_CREATE_DETACHED);
    pthread_sigmask(SIG_SETMASK, &all, &old); /* a signal would end the device */
    int rc = pthread_create(&thread, &attr, ioctl_serve, (void *)(intptr_t)dev);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&attr);
    return -rc;
}

static int ioctl_connect(int index, int fd, uint64_t size, uint16_t flags)
{
    int dev = device_open(index, O_RDWR);
    if (dev < 0)
        return dev;
    int rc = kernel_connected(index)                                               ? -EBUSY
             : ioctl(dev, NBD_SET_SOCK, (unsigned long)fd) < 0                     ? -errno
             : ioctl(dev, NBD_SET_BLKSIZE, (unsigned long)SECTOR) < 0              ? -errno
             : ioctl(dev, NBD_SET_SIZE_BLOCKS, (unsigned long)(size / SECTOR)) < 0 ? -errno
             : ioctl(dev, NBD_SET_FLAGS, (unsigned long)flags) < 0                 ? -errno
                                                                                   : 0;
    if (!rc)
        rc = ioctl_start(dev);
    if (!rc)
        return 0;
    if (rc != -EBUSY)
        ioctl(dev, NBD_CLEAR_SOCK);
    close(dev);
    return rc;
}

static int ioctl_connect_any(int *index, int fd, uint64_t size, uint16_t flags)
{
    if (*index != KERNEL_ANY)
        return ioctl_connect(*index, fd, size, flags);
    int rc = -EBUSY;
    for (int i = 0; rc == -EBUSY; i++) {
        rc = ioctl_connect(i, fd, size, flags);
        *index = i;
    }
    return rc == -ENOENT && *index > 0 ? -EBUSY : rc;
}

/* Without udev: the kernel sets the size last. */
static int ready(int index, uint64_t size, char error[KERNEL_ERROR])
{
    char text[32];
    uint64_t bytes = 0;
    for (unsigned us = 0; us < READY_MS * 1000; us += LOOK_US, usleep(LOOK_US)) {
        if (!attribute(index, "size", text, sizeof text) || strtoull(text, NULL, 10) != size / SECTOR)
            continue;
        int fd = device_open(index, O_RDONLY);
        int rc = fd < 0 ? fd : ioctl(fd, BLKGETSIZE64, &bytes) < 0 ? -errno : 0;
        if (fd >= 0)
            close(fd);
        if (fd == -ENOENT)
            continue; /* its node is made by devtmpfs or udev */
        if (rc || bytes == size / SECTOR * SECTOR)
            return rc;
    }
    fault(error, "/dev/nbd%d did not get its size within %u s", index, READY_MS / 1000);
    return -ETIMEDOUT;
}

static void connect_fault(int rc, int index, char error[KERNEL_ERROR])
{
    char device[32] = "no /dev/nbdN";
    if (index != KERNEL_ANY)
        snprintf(device, sizeof device, "/dev/nbd%d", index);
    if (rc == -ENOENT || rc == -ENXIO || rc == -ENODEV)
        fault(error, "%s: this kernel has no such device: load its module (modprobe nbd nbds_max=16)", device);
    else if (rc == -EPERM || rc == -EACCES)
        fault(error, "%s: the agent may not connect block devices: that needs root (CAP_SYS_ADMIN)", device);
    else if (rc == -EBUSY && index == KERNEL_ANY)
        fault(error, "%s is free: memsync detach one, or modprobe nbd with a higher nbds_max", device);
    else if (rc == -EBUSY)
        fault(error, "%s is in use: connected already, or open still since it was; `auto` takes a free one", device);
    else
        fault(error, "%s: %s", device, strerror(-rc));
}

int kernel_connect(int *index, int fd, uint64_t size, uint16_t flags, const char *region, char error[KERNEL_ERROR])
{
    char name[256];
    uint16_t family;
    int asked = *index;
    error[0] = 0;
    snprintf(name, sizeof name, NAMED "%d %.200s", (int)getpid(), region);
    int nl = netlink_open(&family);
    int rc = nl < 0 ? nl : netlink_connect(nl, family, index, fd, size, flags, name);
    if (nl == -ENOENT) {
        *index = asked;
        rc = ioctl_connect_any(index, fd, size, flags);
    }
    if (nl >= 0)
        close(nl);
    close(fd);
    if (rc) {
        connect_fault(rc, asked, error);
        return rc == -ENOENT ? -ENODEV : rc; /* ENOENT is of regions */
    }
    rc = ready(*index, size, error);
    if (rc) {
        char unsaid[KERNEL_ERROR];
        if (!error[0])
            connect_fault(rc, *index, error);
        kernel_disconnect(*index, true, unsaid);
    }
    return rc;
}

/* What was written to it and is not in the region yet. */
static int write_back(int index, bool force, char error[KERNEL_ERROR])
{
    int fd = device_open(index, O_RDONLY | O_EXCL);
    if (fd == -EBUSY && !force) {
        fault(error, "/dev/nbd%d is mounted, or in use by another device: unmount it first (--force takes it away)",
              index);
        return -EBUSY;
    }
    if (fd == -EBUSY)
        fd = device_open(index, O_RDONLY);
    if (fd < 0) {
        connect_fault(fd, index, error);
        return fd;
    }
    int rc = fsync(fd) < 0 ? -errno : 0;
    close(fd);
    if (!rc || rc == -EIO) /* EIO: nobody answers any more, and nothing is to be saved */
        return 0;
    fault(error, "/dev/nbd%d could not be written back: %s", index, strerror(-rc));
    return force ? 0 : rc;
}

int kernel_disconnect(int index, bool force, char error[KERNEL_ERROR])
{
    error[0] = 0;
    if (!kernel_connected(index)) {
        fault(error, "/dev/nbd%d is not connected", index);
        return -ENODEV;
    }
    int rc = write_back(index, force, error);
    if (rc)
        return rc;
    rc = netlink_disconnect(index);
    int fd = rc == -ENOENT || rc == -EINVAL ? device_open(index, O_RDWR) : -1; /* EINVAL: it was connected by ioctl */
    if (fd >= 0) {
        rc = ioctl(fd, NBD_DISCONNECT) < 0 ? -errno : 0;
        close(fd);
    }
    if (rc) {
        connect_fault(rc, index, error);
        return rc;
    }
    for (unsigned us = 0; us < GONE_MS * 1000 && kernel_connected(index); us += LOOK_US)
        usleep(LOOK_US);
    return 0;
}

/* Whether it is an agent's that lives. The number may be another program's by now. */
static bool agent_lives(int pid)
{
    char path[40], name[32] = "";
    snprintf(path, sizeof path, "/proc/%d/comm", pid);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    ssize_t n = fd < 0 ? 0 : read(fd, name, sizeof name - 1);
    if (fd >= 0)
        close(fd);
    return n > 0 && !strncmp(name, "memsync-agent", 13);
}

void kernel_sweep(void)
{
    DIR *all = opendir("/sys/block");
    char backend[512], error[KERNEL_ERROR];
    for (struct dirent *e; all && (e = readdir(all));) {
        int index, pid;
        if (sscanf(e->d_name, "nbd%d", &index) != 1 || !attribute(index, "backend", backend, sizeof backend) ||
            sscanf(backend, NAMED "%d", &pid) != 1 || agent_lives(pid))
            continue;
        int rc = netlink_disconnect(index);
        if (rc)
            snprintf(error, sizeof error, ": %s", strerror(-rc));
        log_warn("/dev/nbd%d was left by an agent that is no more: disconnected%s", index, rc ? error : "");
    }
    if (all)
        closedir(all);
}
