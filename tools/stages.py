"""Front door of `ddk stages`, for a clone: python tools/stages.py ..."""

import sys

from ddk_ds.commands.stages_command import main

if __name__ == "__main__":
    sys.exit(main())
