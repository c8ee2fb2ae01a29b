/* The kernel's network block devices, /dev/nbdN: connecting one to a socket, and letting it go. Blocking, for threads
 * of the pool and for the tool; CAP_SYS_ADMIN is needed.
 *
 * By generic netlink (drivers/block/nbd.c, family "nbd"), else, where that family is not to be had (a network namespace
 * of one's own), by ioctl, with a thread that stays in the kernel as long as the device is connected. Over netlink a
 * device outlives its maker: I/O on it fails (EIO) once the socket is closed, and it has to be disconnected. So that
 * this can be done by anybody later, it is named after us (sysfs: nbdN/backend), with our process number. */
#ifndef NBD_KERNEL_H
#define NBD_KERNEL_H

#include <stdbool.h>
#include <stdint.h>

#define KERNEL_ERROR 512u
#define KERNEL_ANY (-1)

/* N of "/dev/nbdN"; KERNEL_ANY of "auto". -EINVAL. */
int kernel_device(const char *text, int *index);
/* Connects device *index (or a free one, KERNEL_ANY) to `fd`, on whose other end a server speaks simple replies from
 * the first byte on; flags as in wire/nbd.h. fd is the kernel's afterwards, the caller's descriptor is closed in any
 * case. Waits until the device has its size. 0 and *index, or a negative errno and a line. */
int kernel_connect(int *index, int fd, uint64_t size, uint16_t flags, const char *region, char error[KERNEL_ERROR]);
/* Writes back what the page cache has, then lets the device go and waits until it is gone, or, when programs have it
 * open still, until it answers nothing but errors. -EBUSY: mounted or held, and not `force`. -ENODEV: not connected. */
int kernel_disconnect(int index, bool force, char error[KERNEL_ERROR]);
/* Whether it is connected, or open still after it was. */
bool kernel_connected(int index);
/* Disconnects devices that memsync agents have left that are no more. */
void kernel_sweep(void);

#endif
