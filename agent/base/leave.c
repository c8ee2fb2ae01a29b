#include "agent/sync/local.h"

/* Tests and the tool link the local role too, but have no loop of an agent to end: the agent's own agent_leave takes this one's place. */
__attribute__((weak)) void agent_leave(void)
{
}
