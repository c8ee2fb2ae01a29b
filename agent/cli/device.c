/* attach and detach. The agent attaches, because it serves the device then; anybody who may can detach, also what a
 * killed agent has left. */
#include "agent/cli/cli.h"
#include "agent/cli/local.h"
#include "agent/nbd/kernel.h"

#include <errno.h>
#include <stdio.h>

static int device_fault(const char *device)
{
    return cli_fail(CLI_USAGE, "%s is no device for it: /dev/nbdN, or auto", device);
}

int command_attach(const struct args *a)
{
    static struct control_attach m;
    static struct control_text r;
    const char *name = a->words[0], *device = a->words[1], *fault = name_fault(name);
    int index;
    if (fault)
        return cli_fail(CLI_USAGE, "%s is no name of a region: %s", name, fault);
    if (kernel_device(device, &index) || strlen(device) >= sizeof m.device)
        return device_fault(device);
    m.read_only = a->read_only;
    snprintf(m.name, sizeof m.name, "%s", name);
    snprintf(m.device, sizeof m.device, "%s", device);
    if (a->remote && strlen(a->remote) >= sizeof m.remote)
        return cli_fail(CLI_USAGE, "the remote's address is too long");
    snprintf(m.remote, sizeof m.remote, "%s", a->remote ? a->remote : "");
    struct local_agent l;
    int rc = a->remote ? local_connect_or_start(&l) : local_connect(&l);
    if (rc == -ENOENT)
        return cli_fail(CLI_FAILED,
                        "no agent is running on %s: name the region's agent by --remote, or start one here with "
                        "--store and --socket",
                        l.socket);
    uint8_t message[CONTROL_MAX];
    if (!rc)
        rc = local_send(&l, message, control_attach_put(message, sizeof message, &m));
    if (!rc)
        rc = local_result(&l, &r, -1);
    local_close(&l);
    if (rc)
        return CLI_FAILED;
    if (r.code)
        return cli_fail(r.code == -ENOENT ? CLI_NOT_SO : CLI_FAILED, "%s", *r.text ? r.text : strerror(-r.code));
    puts(r.text);
    return CLI_DONE;
}

int command_detach(const struct args *a)
{
    const char *device = a->words[0];
    char error[KERNEL_ERROR];
    int index;
    if (kernel_device(device, &index) || index == KERNEL_ANY)
        return cli_fail(CLI_USAGE, "%s is no device for it: /dev/nbdN", device);
    int rc = kernel_disconnect(index, a->force, error);
    if (rc)
        return cli_fail(rc == -ENODEV ? CLI_NOT_SO : CLI_FAILED, "%s", error);
    if (kernel_connected(index))
        cli_say("%s answers nobody any more, but programs have it open still; it is free when they close it", device);
    return CLI_DONE;
}
