"""Front door of `ddk replay`, for a clone: python tools/replay.py ..."""

import sys

from ddk_ds.commands.replay_command import main

if __name__ == "__main__":
    sys.exit(main())
