"""What a run will take of memory, time, disks and network, computed from a configuration and a cluster alone. Pure."""
