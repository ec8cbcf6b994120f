"""Memory, time, disks and network that a run will take, estimated from its configuration and a cluster alone."""
